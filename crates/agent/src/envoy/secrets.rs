//! The SDS server for Envoy: the workload's certificate as `default`, its roots as `ROOTCA`, and certificates of files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use ads::server::{Event, EventKind, Names, Peer, Source};
use envoy_api::tls::{CertificateValidationContext, Secret, TlsCertificate, secret};
use envoy_api::{Message, Resource, core};
use identity::WorkloadCertificate;
use tokio::sync::watch;
use tracing::{info, warn};
use zeroize::Zeroizing;

/// How often files that were sent are looked at; certificates are renewed hours before they end.
const PERIOD: Duration = Duration::from_secs(2);

/// Files that were asked for, with the time of their last change and their length; `None`: missing.
type Files = Mutex<BTreeMap<PathBuf, Option<(SystemTime, u64)>>>;

/// Certificates by name. Reads files when asked, so that their current contents are sent, and says when they have changed.
pub(crate) struct Secrets {
    certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>,
    files: Arc<Files>,
    revision: watch::Receiver<u64>,
}

impl Secrets {
    /// Follows `certificate` until that ends.
    pub(crate) fn new(certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>) -> Secrets {
        let (revisions, revision) = watch::channel(1);
        let mut changes = certificate.clone();
        let files = Arc::new(Files::default());
        let followed = files.clone();
        // Ends with the certificate's manager or the last stream.
        tokio::spawn(async move {
            loop {
                let changed = tokio::select! {
                    changed = changes.changed() => match changed {
                        Ok(()) => true,
                        Err(_) => return,
                    },
                    () = tokio::time::sleep(PERIOD) => have_changed(&followed),
                };
                if revisions.is_closed() {
                    return;
                }
                if changed {
                    revisions.send_modify(|revision| *revision += 1);
                }
            }
        });
        Secrets { certificate, files, revision }
    }

    /// A file's content, and from now on its changes.
    fn read(&self, path: &str) -> Option<Vec<u8>> {
        let path = Path::new(path);
        let stamp = stamp(path);
        self.files.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), stamp);
        match std::fs::read(path) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                warn!(path = %path.display(), %error, "a certificate that the configuration names cannot be read");
                None
            }
        }
    }

    fn find(&self, name: &str) -> Option<secret::Type> {
        let current = self.certificate.borrow().clone();
        if name == "default" {
            let current = current?;
            return Some(certificate(current.chain_pem().into_bytes(), current.key.to_pem().as_bytes()));
        }
        if name == "ROOTCA" {
            let current = current?;
            return Some(roots(current.roots_pem().into_bytes(), current.crl.clone()));
        }
        // Source: istio `pkg/security`, `SdsCertificateConfig`: names that carry paths.
        if let Some((chain, key)) = name.strip_prefix("file-cert:").and_then(|paths| paths.split_once('~')) {
            let key = Zeroizing::new(self.read(key)?);
            return Some(certificate(self.read(chain)?, &key));
        }
        name.strip_prefix("file-root:").and_then(|path| self.read(path)).map(|pem| roots(pem, None))
    }
}

impl Source for Secrets {
    type Proxy = ();

    fn connect(&self, _node: &core::Node, _peer: &Peer) -> Result<(), tonic::Status> {
        Ok(()) // the socket's mode says who may
    }

    fn resources(&self, (): &(), _type_url: &str, names: Names<'_>) -> Arc<[Resource]> {
        let Names::List(names) = names else { return Arc::default() };
        let found = names.iter().filter_map(|name| {
            let secret = Secret { name: name.to_string(), r#type: Some(self.find(name)?) };
            Some(Resource::from_bytes(name.clone(), secret.encode_to_vec()))
        });
        found.collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.revision.clone()
    }

    fn report(&self, (): &(), event: &Event) {
        match &event.kind {
            EventKind::Nacked { error, .. } => warn!(%error, "Envoy refused a certificate"),
            EventKind::Sent { resources, .. } => info!(resources, "certificates sent to Envoy"),
            _ => {}
        }
    }
}

fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

/// Whether one of the files is another one than before; each change counts once.
fn have_changed(files: &Files) -> bool {
    let mut changed = false;
    for (path, known) in files.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
        let now = stamp(path);
        changed |= std::mem::replace(known, now) != now;
    }
    changed
}

fn inline(bytes: Vec<u8>) -> Option<core::DataSource> {
    Some(core::DataSource { specifier: Some(core::data_source::Specifier::InlineBytes(bytes)), ..Default::default() })
}

fn certificate(chain: Vec<u8>, key: &[u8]) -> secret::Type {
    secret::Type::TlsCertificate(TlsCertificate {
        certificate_chain: inline(chain),
        private_key: inline(key.to_vec()),
        ..Default::default()
    })
}

fn roots(pem: Vec<u8>, crl: Option<Vec<u8>>) -> secret::Type {
    let crl = crl.and_then(inline);
    secret::Type::ValidationContext(CertificateValidationContext { trusted_ca: inline(pem), crl, ..Default::default() })
}
