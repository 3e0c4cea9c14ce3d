//! Certificates that a plugged-in CA has revoked, from the file that the control plane's ConfigMap `istio-ca-crl` is mounted as.
//!
//! Source: istio `pkg/security`, `CACRLFilePath`, and `security/pkg/nodeagent/sds`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use identity::WorkloadCertificate;
use rustls_pki_types::CertificateRevocationListDer;
use rustls_pki_types::pem::PemObject;
use tokio::sync::watch;
use tracing::{info, warn};

/// Where it is mounted.
pub(crate) const FILE: &str = "/var/run/secrets/istio/crl/ca-crl.pem";
/// How often the file is looked at: one system call.
const POLL: Duration = Duration::from_secs(2);

type Certificates = watch::Receiver<Option<Arc<WorkloadCertificate>>>;

/// The certificates with the revocations of the moment. A list that cannot be read leaves the last good one.
pub(crate) fn attach(mut certificates: Certificates, path: PathBuf) -> Certificates {
    let (sender, attached) = watch::channel(None);
    // Ends with the certificates or the last who wants them.
    tokio::spawn(async move {
        let (mut seen, mut list) = (None, None);
        loop {
            let stamp = stamp(&path);
            let news = stamp != seen;
            if news {
                seen = stamp;
                list = read(&path, list);
            }
            if let Some(certificate) = certificates.borrow_and_update().clone() {
                sender.send_if_modified(|current| {
                    let same = |now: &Arc<WorkloadCertificate>| now.crl == list && now.is_like(&certificate);
                    if current.as_ref().is_some_and(same) {
                        return false;
                    }
                    let mut with = WorkloadCertificate::clone(&certificate);
                    with.crl.clone_from(&list);
                    *current = Some(Arc::new(with));
                    true
                });
            }
            tokio::select! {
                changed = certificates.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(POLL) => {}
                () = sender.closed() => return,
            }
        }
    });
    attached
}

fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

fn read(path: &Path, last: Option<Vec<u8>>) -> Option<Vec<u8>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            warn!(path = %path.display(), %error, "revoked certificates cannot be read; the last list holds");
            return last;
        }
    };
    match CertificateRevocationListDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>() {
        Ok(lists) if !lists.is_empty() => {
            info!(path = %path.display(), lists = lists.len(), "revoked certificates are refused");
            Some(text)
        }
        _ => {
            warn!(path = %path.display(), "no list of revoked certificates is in the file; the last list holds");
            last
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, CertificateRevocationListParams, Issuer, KeyPair, SerialNumber};

    use super::*;

    fn crl() -> String {
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer = Issuer::new(params, KeyPair::generate().unwrap());
        let list = CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2026, 1, 1),
            next_update: rcgen::date_time_ymd(2036, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        list.signed_by(&issuer).unwrap().pem().unwrap()
    }

    #[tokio::test]
    async fn a_list_comes_with_the_certificate_and_a_bad_one_does_not() {
        let key = KeyPair::generate().unwrap();
        let pem = CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap().pem();
        let certificate =
            WorkloadCertificate::from_pem(pem.as_bytes(), key.serialize_pem().as_bytes(), pem.as_bytes()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca-crl.pem");
        let (_sender, certificates) = watch::channel(Some(Arc::new(certificate)));
        let mut attached = attach(certificates, path.clone());
        let mut next = async || {
            attached.changed().await.unwrap();
            attached.borrow_and_update().as_ref().unwrap().crl.clone()
        };
        assert_eq!(next().await, None);
        let list = crl();
        std::fs::write(&path, &list).unwrap();
        assert_eq!(next().await, Some(list.clone().into_bytes()));
        assert_eq!(read(&path, None), Some(list.clone().into_bytes()));
        std::fs::write(&path, "nonsense").unwrap();
        assert_eq!(read(&path, Some(b"last".to_vec())), Some(b"last".to_vec()));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(next().await, None, "no file: nothing is revoked");
    }
}
