//! The SDS server for Envoy: the workload's certificate as `default`, its roots as `ROOTCA`, and certificates of files.

use std::hash::{DefaultHasher, Hasher};
use std::path::Path;
use std::sync::Arc;

use ads::server::{Event, EventKind, Names, Peer, Source};
use envoy_api::tls::{CertificateValidationContext, Secret, TlsCertificate, secret};
use envoy_api::{Message, Resource, core};
use identity::WorkloadCertificate;
use mesh_types::ArcStr;
use tokio::sync::watch;
use tracing::{info, warn};
use zeroize::Zeroizing;

/// Certificates by name. Reads files when asked, so that their current contents are sent.
pub(crate) struct Secrets {
    certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>,
    revision: watch::Receiver<u64>,
}

impl Secrets {
    /// Follows `certificate` until that ends.
    pub(crate) fn new(certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>) -> Secrets {
        let (revisions, revision) = watch::channel(1);
        let mut changes = certificate.clone();
        // Ends with the certificate's manager or the last stream.
        tokio::spawn(async move {
            while changes.changed().await.is_ok() && !revisions.is_closed() {
                revisions.send_modify(|revision| *revision += 1);
            }
        });
        Secrets { certificate, revision }
    }

    fn find(&self, name: &str) -> Option<secret::Type> {
        let current = self.certificate.borrow().clone();
        if name == "default" {
            let current = current?;
            return Some(certificate(current.chain_pem().into_bytes(), current.key.to_pem().as_bytes()));
        }
        if name == "ROOTCA" {
            return Some(roots(current?.roots_pem().into_bytes()));
        }
        // Source: istio `pkg/security`, `SdsCertificateConfig`: names that carry paths.
        if let Some((chain, key)) = name.strip_prefix("file-cert:").and_then(|paths| paths.split_once('~')) {
            let key = Zeroizing::new(read(key)?);
            return Some(certificate(read(chain)?, &key));
        }
        name.strip_prefix("file-root:").and_then(read).map(roots)
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
            let body = secret.encode_to_vec();
            let mut hasher = DefaultHasher::new();
            hasher.write(&body);
            Some(Resource {
                name: name.clone(),
                version: ArcStr::from(format!("{:016x}", hasher.finish())),
                body: body.into(),
            })
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

fn read(path: &str) -> Option<Vec<u8>> {
    match std::fs::read(Path::new(path)) {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            warn!(path, %error, "a certificate that the configuration names cannot be read");
            None
        }
    }
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

fn roots(pem: Vec<u8>) -> secret::Type {
    secret::Type::ValidationContext(CertificateValidationContext { trusted_ca: inline(pem), ..Default::default() })
}
