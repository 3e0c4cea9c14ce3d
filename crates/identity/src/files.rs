//! Certificates from mounted files, and written to files for others.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::certificate::{InvalidCertificate, WorkloadCertificate};

/// Where mounted certificates are: `/etc/certs` or `/var/run/secrets/workload-spiffe-credentials`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Files {
    /// PEM, the workload's certificate first.
    pub chain: PathBuf,
    /// PEM.
    pub key: PathBuf,
    /// PEM, one or more.
    pub roots: PathBuf,
}

/// Why there is no certificate in the files.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the certificate in {path} is not usable")]
    Invalid {
        path: PathBuf,
        #[source]
        source: InvalidCertificate,
    },
}

impl Files {
    /// `cert-chain.pem`, `key.pem`, `root-cert.pem` in `dir`, as Istio names them.
    pub fn in_dir(dir: &Path) -> Files {
        Files { chain: dir.join("cert-chain.pem"), key: dir.join("key.pem"), roots: dir.join("root-cert.pem") }
    }

    /// Whether all three are there.
    pub fn exist(&self) -> bool {
        [&self.chain, &self.key, &self.roots].into_iter().all(|path| path.exists())
    }

    /// Reads and checks all three. While they are being replaced one by one, the key does not fit: try again.
    pub fn load(&self) -> Result<WorkloadCertificate, FilesError> {
        let read =
            |path: &PathBuf| std::fs::read(path).map_err(|source| FilesError::Read { path: path.clone(), source });
        let (chain, roots) = (read(&self.chain)?, read(&self.roots)?);
        let key = zeroize::Zeroizing::new(read(&self.key)?);
        WorkloadCertificate::from_pem(&chain, &key, &roots)
            .map_err(|source| FilesError::Invalid { path: self.chain.clone(), source })
    }
}

/// Writes the three files into `dir` (OUTPUT_CERTS), each replaced as a whole and readable by the owner only.
pub fn write_certificate(dir: &Path, certificate: &WorkloadCertificate) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let files = Files::in_dir(dir);
    replace(&files.roots, certificate.roots_pem().as_bytes())?;
    replace(&files.chain, certificate.chain_pem().as_bytes())?;
    replace(&files.key, certificate.key.to_pem().as_bytes())
}

fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(format!("tmp-{}", std::process::id()));
    let write = || {
        let _ = std::fs::remove_file(&temporary); // left by a crash; mode applies to new files only
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(contents)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn written_certificates_can_be_read_by_the_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap().pem();
        let certificate =
            WorkloadCertificate::from_pem(pem.as_bytes(), key.serialize_pem().as_bytes(), pem.as_bytes()).unwrap();
        let out = dir.path().join("out");
        write_certificate(&out, &certificate).unwrap();
        write_certificate(&out, &certificate).unwrap();
        let files = Files::in_dir(&out);
        assert!(files.exist());
        assert_eq!(files.load().unwrap().chain, certificate.chain);
        for entry in std::fs::read_dir(&out).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
        }
    }
}
