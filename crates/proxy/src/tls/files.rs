//! Secrets that are files, by the names that Istio gives them.
//!
//! Where Envoy asks its agent for these over SDS, the files are read here: they are in this container.

use super::TlsError;
use super::secrets::{Entry, certified_key};
use crate::runtime::Shared;
use crate::sources::Demand;
use mesh_types::ArcStr;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// How often files are looked at; certificates are renewed hours before they end.
const PERIOD: Duration = Duration::from_secs(2);

/// What a name says (istio `pkg/security`, `SdsCertificateConfig`).
enum Files<'a> {
    Certificate { chain: &'a str, key: &'a str },
    Roots(&'a str),
}

/// When each file was written, and how long it is.
pub(super) type Stamp = [Option<(SystemTime, u64)>; 2];

impl<'a> Files<'a> {
    fn of(name: &'a str) -> Option<Files<'a>> {
        if let Some((chain, key)) = name.strip_prefix("file-cert:").and_then(|paths| paths.split_once('~')) {
            return Some(Files::Certificate { chain, key });
        }
        name.strip_prefix("file-root:").map(Files::Roots)
    }

    fn stamp(&self) -> Stamp {
        let stamp = |path: &str| {
            let meta = std::fs::metadata(path).ok()?;
            Some((meta.modified().ok()?, meta.len()))
        };
        match self {
            Files::Certificate { chain, key } => [stamp(chain), stamp(key)],
            Files::Roots(path) => [stamp(path), None],
        }
    }

    fn load(&self) -> Result<Entry, TlsError> {
        let read = |path: &str| std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source });
        match self {
            Files::Certificate { chain, key } => {
                Ok(Entry::Certificate(Arc::new(certified_key(&read(chain)?, &read(key)?)?)))
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
            () = tokio::time::sleep(PERIOD), if !files.is_empty() => shared.secrets.refresh_files(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::SecretStore;
    use proxy_core::config_source::{ConfigSource, Origin};
    use proxy_core::tls::{CertificateSource, SdsRef, TlsCommon, TlsVersion, Validation};

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
}
