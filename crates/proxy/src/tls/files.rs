//! Secrets that are files, by the names that Istio gives them, and files that parts of secrets are in.
//!
//! Where Envoy asks its agent for the former over SDS, the files are read here: they are in this container.

use super::TlsError;
use super::keys::certified_key;
use super::secrets::Entry;
use crate::runtime::Shared;
use crate::sources::Demand;
use mesh_types::ArcStr;
use proxy_core::tls::{DataSource, Secret};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// How often files are looked at. Envoy hears of files that are moved into place; what is written into them counts here as well.
const PERIOD: Duration = Duration::from_millis(250);

/// What a name says (istio `pkg/security`, `SdsCertificateConfig`).
enum Files<'a> {
    Certificate { chain: &'a str, key: &'a str },
    Roots(&'a str),
}

/// When a file was written, how long it is, and which one it is.
type FileStamp = Option<(SystemTime, u64, u64)>;

/// Of each file.
pub(super) type Stamp = [FileStamp; 2];

/// Of each file that parts of a secret are in.
pub(super) type Stamps = Vec<FileStamp>;

fn stamp(path: &str) -> FileStamp {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len(), meta.ino()))
}

/// The files that parts of a secret are in.
fn files(secret: &Secret) -> impl Iterator<Item = &ArcStr> {
    let sources: Vec<_> = match secret {
        Secret::Certificate { certificate, .. } => certificate.parts().collect(),
        Secret::Validation { validation, .. } => validation.trusted_ca.iter().chain(&validation.crl).collect(),
        Secret::Generic { .. } => Vec::new(),
    };
    sources.into_iter().filter_map(|source| match source {
        DataSource::File(path) => Some(path),
        _ => None,
    })
}

/// Their state.
pub(super) fn stamps(secret: &Secret) -> Stamps {
    files(secret).map(|path| stamp(path)).collect()
}

/// A hash of what they hold.
pub(super) fn content(secret: &Secret) -> u64 {
    let held = |path: &ArcStr| std::fs::read(&**path).unwrap_or_default();
    files(secret).fold(0, |hash, path| proxy_core::hash::xx64(&held(path), hash))
}

impl<'a> Files<'a> {
    fn of(name: &'a str) -> Option<Files<'a>> {
        if let Some((chain, key)) = name.strip_prefix("file-cert:").and_then(|paths| paths.split_once('~')) {
            return Some(Files::Certificate { chain, key });
        }
        name.strip_prefix("file-root:").map(Files::Roots)
    }

    fn stamp(&self) -> Stamp {
        match self {
            Files::Certificate { chain, key } => [stamp(chain), stamp(key)],
            Files::Roots(path) => [stamp(path), None],
        }
    }

    fn load(&self) -> Result<Entry, TlsError> {
        let read = |path: &str| std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source });
        match self {
            Files::Certificate { chain, key } => {
                Ok(Entry::Certificate(Arc::new(certified_key(&read(chain)?, &read(key)?, None)?)))
            }
            Files::Roots(path) => {
                let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
                match certs {
                    Ok(certs) if !certs.is_empty() => Ok(Entry::Roots(certs)),
                    _ => Err(TlsError::Pem { what: "trusted_ca" }),
                }
            }
        }
    }
}

/// Whether a secret's name says that it is in files.
pub(crate) fn is_file(name: &str) -> bool {
    Files::of(name).is_some()
}

/// The secret of a name that stands for files, and their state before they were read; `None` for any other name.
pub(super) fn load(name: &str) -> Option<Result<(Entry, Stamp), TlsError>> {
    let files = Files::of(name)?;
    let stamp = files.stamp();
    Some(files.load().map(|entry| (entry, stamp)))
}

/// Whether a secret's files are others than those that were read.
pub(super) fn changed(name: &str, stamp: &Stamp) -> bool {
    Files::of(name).is_some_and(|files| files.stamp() != *stamp)
}

/// Follows the files of the secrets that are wanted, until nobody says any more which.
pub(crate) async fn follow(shared: Arc<Shared>, mut wanted: watch::Receiver<BTreeSet<Demand>>) {
    loop {
        let files: BTreeSet<ArcStr> = {
            let wanted = wanted.borrow_and_update();
            wanted.iter().filter_map(|demand| demand.name.clone()).filter(|name| is_file(name)).collect()
        };
        shared.secrets.keep_files(&files);
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = shared.secrets.files_came() => {}
            () = tokio::time::sleep(PERIOD), if !files.is_empty() || shared.secrets.has_files() => {
                shared.secrets.refresh_files();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::SecretStore;
    use proxy_core::config_source::{ConfigSource, Origin};
    use proxy_core::tls::{Certificate, CertificateSource, SdsRef, TlsCommon, TlsVersion, Validation};

    fn write(folder: &std::path::Path, subject: &str) {
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = rcgen::CertificateParams::new([subject.to_owned()]).unwrap().self_signed(&key).unwrap();
        std::fs::write(folder.join("cert"), cert.pem()).unwrap();
        std::fs::write(folder.join("key"), key.serialize_pem()).unwrap();
    }

    #[test]
    fn files_are_read_when_needed_and_again_when_they_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        let name = format!("file-cert:{path}/cert~{path}/key");
        let origin = Origin::Path("of an agent".into());
        let source = ConfigSource { origin, initial_fetch_timeout: None };
        let sds = SdsRef { name: name.as_str().into(), source };
        let common = TlsCommon {
            alpn: Vec::new(),
            min_version: TlsVersion::V12,
            max_version: TlsVersion::V13,
            ciphers: Vec::new(),
            curves: Vec::new(),
            certificates: vec![CertificateSource::Sds(sds)],
            validation: Validation::default(),
            staples: None,
        };
        let store = SecretStore::default();
        let missing = store.certificates(&common).unwrap_err();
        assert!(missing.to_string().contains("/cert"), "{missing}");
        write(folder.path(), "one.example");
        let names = || store.certificates(&common).unwrap()[0].cert.clone();
        let first = names();
        store.refresh_files();
        assert_eq!(names(), first);
        write(folder.path(), "another.example");
        store.refresh_files();
        let second = names();
        assert_ne!(second, first);
        // Half of a change, or a mistake, is not taken.
        std::fs::write(folder.path().join("cert"), "nonsense").unwrap();
        store.refresh_files();
        assert_eq!(names(), second);
        store.keep_files(&BTreeSet::new());
        assert!(store.certificates(&common).is_err());
    }

    #[test]
    fn files_of_given_secrets_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| DataSource::File(format!("{}/{name}", folder.path().display()).as_str().into());
        let certificate = Certificate { chain: file("cert"), key: file("key"), password: None, staple: None };
        let secret = Secret::Certificate { name: "given".into(), certificate };
        let store = SecretStore::default();
        assert!(store.set(&Origin::Ads, secret.clone()).is_err());
        write(folder.path(), "one.example");
        store.set(&Origin::Ads, secret).unwrap();
        let names = || store.details("given").unwrap().0[0].dns_sans.clone();
        assert_eq!(&*names()[0], "one.example");
        write(folder.path(), "another.example");
        store.refresh_files();
        assert_eq!(&*names()[0], "another.example");
        std::fs::write(folder.path().join("key"), "nonsense").unwrap();
        store.refresh_files();
        store.refresh_files();
        assert_eq!(&*names()[0], "another.example");
        let renewals = store.renewals("given");
        assert_eq!((renewals.taken, renewals.failed), (2, 1));
        store.remove(&Origin::Ads, &"given".into());
        assert!(!store.has_files());
    }
}
