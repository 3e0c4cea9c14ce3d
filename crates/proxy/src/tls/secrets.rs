//! Named secrets: static ones, those from SDS, and those of the agent in the same process.

use super::{TlsError, files};
use mesh_types::ArcStr;
use proxy_core::config_source::Origin;
use proxy_core::stream_info::PeerCertificate;
use proxy_core::tls::{CertificateSource, DataSource, SdsRef, Secret, Secretive, TlsCommon, Validation};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// Istio's names of the workload's certificate and of the roots that it trusts.
const CERTIFICATE: &str = "default";
const ROOTS: &str = "ROOTCA";

/// Whether a secret is the workload's own.
pub(crate) fn is_workload(name: &str) -> bool {
    matches!(name, CERTIFICATE | ROOTS)
}

/// All secrets by name. Contexts look at the generation when a connection begins.
#[derive(Default)]
pub(crate) struct SecretStore {
    secrets: Mutex<HashMap<ArcStr, Arc<Entry>>>,
    /// Those of SDS servers and files of their own: the same name may mean another secret there.
    sourced: Mutex<HashMap<(Origin, ArcStr), Arc<Entry>>>,
    /// Those of them that were read from files, with the files' state then.
    files: Mutex<HashMap<ArcStr, files::Stamp>>,
    generation: AtomicU64,
}

/// One secret in the form TLS needs.
pub(crate) enum Entry {
    Certificate(Arc<CertifiedKey>),
    Validation(Validation),
    /// Roots given as DER (the agent's), to be used instead of `trusted_ca`.
    Roots(Vec<CertificateDer<'static>>),
}

impl SecretStore {
    fn lock(&self) -> MutexGuard<'_, HashMap<ArcStr, Arc<Entry>>> {
        self.secrets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whenever a secret does.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn put(&self, name: ArcStr, entry: Entry) {
        self.lock().insert(name, Arc::new(entry));
        self.generation.fetch_add(1, Ordering::Release);
    }

    fn sourced(&self) -> MutexGuard<'_, HashMap<(Origin, ArcStr), Arc<Entry>>> {
        self.sourced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A secret of that name, whoever gave it.
    fn any(&self, name: &str) -> Option<Arc<Entry>> {
        let own = self.lock().get(name).cloned();
        own.or_else(|| self.sourced().iter().find(|((_, n), _)| **n == *name).map(|(_, entry)| entry.clone()))
    }

    fn get(&self, sds: &SdsRef) -> Option<Arc<Entry>> {
        let own = || self.lock().get(&sds.name).cloned();
        match &sds.source.origin {
            Origin::Ads | Origin::Static => own(),
            origin => {
                let given = self.sourced().get(&(origin.clone(), sds.name.clone())).cloned();
                // What the agent in this process has is not asked for.
                given.or_else(|| own().filter(|_| is_workload(&sds.name) || files::is_file(&sds.name)))
            }
        }
    }

    /// Whether nobody needs to wait for a secret: it is here, or it is of those that do not come later.
    pub(crate) fn knows(&self, sds: &SdsRef) -> bool {
        sds.source.origin == Origin::Static || files::is_file(&sds.name) || self.get(sds).is_some()
    }

    /// A secret that a context needs. One that its name says is in files is read at its first use.
    fn need(&self, sds: &SdsRef) -> Result<Arc<Entry>, TlsError> {
        let missing = || TlsError::MissingSecret(sds.name.clone());
        match self.get(sds) {
            Some(entry) => Ok(entry),
            None => {
                self.read_files(&sds.name, files::load(&sds.name).ok_or_else(missing)?)?;
                self.get(sds).ok_or_else(missing)
            }
        }
    }

    fn read_files(&self, name: &ArcStr, loaded: Result<(Entry, files::Stamp), TlsError>) -> Result<(), TlsError> {
        let (entry, stamp) = loaded?;
        self.stamps().insert(name.clone(), stamp);
        self.put(name.clone(), entry);
        Ok(())
    }

    fn stamps(&self) -> MutexGuard<'_, HashMap<ArcStr, files::Stamp>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads again the files that have changed; what cannot be used leaves the former content.
    pub(super) fn refresh_files(&self) {
        let changed: Vec<ArcStr> = self
            .stamps()
            .iter()
            .filter(|(name, stamp)| files::changed(name, stamp))
            .map(|(name, _)| name.clone())
            .collect();
        for name in changed {
            let Some(loaded) = files::load(&name) else { continue };
            match self.read_files(&name, loaded) {
                Ok(()) => tracing::info!(secret = &*name, "files of a secret were read again"),
                Err(error) => tracing::warn!(%error, secret = &*name, "keeping what the files held before"),
            }
        }
    }

    /// Forgets the secrets from files that nothing names any more.
    pub(super) fn keep_files(&self, wanted: &BTreeSet<ArcStr>) {
        let gone: Vec<ArcStr> = self.stamps().keys().filter(|name| !wanted.contains(*name)).cloned().collect();
        for name in gone {
            self.stamps().remove(&name);
            self.remove(&Origin::Static, &name);
        }
    }

    /// Names of the secrets present, sorted.
    pub(crate) fn names(&self) -> Vec<ArcStr> {
        let own: BTreeSet<_> = self.lock().keys().cloned().collect();
        let given = self.sourced().keys().map(|(_, name)| name.clone()).collect();
        own.union(&given).cloned().collect()
    }

    /// The public part of a secret as PEM; `true`: a certificate chain, `false`: roots.
    pub(crate) fn public_pem(&self, name: &str) -> Option<(bool, Vec<u8>)> {
        match &*self.any(name)? {
            Entry::Certificate(key) => Some((true, pem(&key.cert))),
            Entry::Roots(roots) => Some((false, pem(roots))),
            Entry::Validation(validation) => {
                let source = validation.trusted_ca.as_ref()?;
                Some((false, read(source).ok()?))
            }
        }
    }

    /// What the certificates of a secret say: the chain, and the roots.
    pub(crate) fn details(&self, name: &str) -> Option<(Vec<PeerCertificate>, Vec<PeerCertificate>)> {
        match &*self.any(name)? {
            Entry::Certificate(key) => Some((each(&key.cert), Vec::new())),
            Entry::Roots(certs) => Some((Vec::new(), each(certs))),
            Entry::Validation(validation) => Some((Vec::new(), each(&roots(validation).ok()?))),
        }
    }

    pub(crate) fn remove(&self, origin: &Origin, name: &ArcStr) {
        match origin {
            Origin::Ads | Origin::Static => self.lock().remove(name),
            origin => self.sourced().remove(&(origin.clone(), name.clone())),
        };
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Takes a secret from configuration or SDS.
    pub(crate) fn set(&self, origin: &Origin, secret: Secret) -> Result<(), TlsError> {
        let (name, entry) = match secret {
            Secret::Certificate { name, chain, key, .. } => {
                let key = certified_key(&read(&chain)?, &read(&key)?)?;
                (name, Entry::Certificate(Arc::new(key)))
            }
            Secret::Validation { name, validation, .. } => {
                // Roots that cannot be read are refused now rather than at the first handshake.
                roots(&validation)?;
                (name, Entry::Validation(validation))
            }
            Secret::Generic { .. } => return Ok(()),
        };
        match origin {
            Origin::Ads | Origin::Static => self.put(name, entry),
            origin => {
                self.sourced().insert((origin.clone(), name), Arc::new(entry));
                self.generation.fetch_add(1, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Takes the workload's certificate from the agent: `default` and `ROOTCA`.
    pub(crate) fn set_workload(&self, cert: &identity::WorkloadCertificate) -> Result<(), TlsError> {
        let key = super::provider().key_provider.load_private_key(cert.key.der().clone_key())?;
        self.put(CERTIFICATE.into(), Entry::Certificate(Arc::new(CertifiedKey::new(cert.chain.clone(), key))));
        let roots = match &cert.crl {
            None => Entry::Roots(cert.roots.clone()),
            Some(crl) => {
                let inline = |bytes: Vec<u8>| Some(DataSource::Inline(Secretive(bytes.into())));
                let (trusted_ca, crl) = (inline(cert.roots_pem().into_bytes()), inline(crl.clone()));
                Entry::Validation(Validation { trusted_ca, crl, ..Validation::default() })
            }
        };
        self.put(ROOTS.into(), roots);
        Ok(())
    }

    /// The certificates of a context, inline or by name.
    pub(crate) fn certificates(&self, common: &TlsCommon) -> Result<Vec<Arc<CertifiedKey>>, TlsError> {
        common
            .certificates
            .iter()
            .map(|source| match source {
                CertificateSource::Local { chain, key } => Ok(Arc::new(certified_key(&read(chain)?, &read(key)?)?)),
                CertificateSource::Sds(sds) => match &*self.need(sds)? {
                    Entry::Certificate(key) => Ok(key.clone()),
                    _ => Err(TlsError::MissingSecret(sds.name.clone())),
                },
            })
            .collect()
    }

    /// The validation of a context, combined with its SDS part, and the roots (empty: nothing is verified against).
    pub(crate) fn validation(
        &self,
        common: &TlsCommon,
    ) -> Result<(Validation, Vec<CertificateDer<'static>>), TlsError> {
        let own = &common.validation;
        let Some(sds) = &own.sds else {
            let roots = roots(own)?;
            return Ok((own.clone(), roots));
        };
        match &*self.need(sds)? {
            Entry::Validation(validation) => {
                let merged = own.merged(validation);
                let roots = roots(&merged)?;
                Ok((merged, roots))
            }
            Entry::Roots(roots) => Ok((own.clone(), roots.clone())),
            _ => Err(TlsError::MissingSecret(sds.name.clone())),
        }
    }
}

/// What each of these certificates says.
fn each(certs: &[CertificateDer<'static>]) -> Vec<PeerCertificate> {
    certs.iter().filter_map(|c| super::peer_certificate(std::slice::from_ref(c))).collect()
}

impl SecretStore {
    /// When the certificates of a context end, in seconds since 1970, by the names that Envoy's statistics have for them
    /// (`ssl.certificate.NAME.expiration_unix_time_seconds`).
    pub(crate) fn expirations(&self, common: &TlsCommon) -> Vec<(String, u64)> {
        let end = |certs: &[PeerCertificate]| {
            let at = certs.first()?.not_after?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
            Some(at.as_secs())
        };
        let named = |sds: &SdsRef| {
            let (own, roots) = self.details(&sds.name)?;
            Some((sds.name.to_string(), end(if own.is_empty() { &roots } else { &own })?))
        };
        let mut all = BTreeMap::new();
        for source in &common.certificates {
            all.extend(match source {
                CertificateSource::Sds(sds) => named(sds),
                CertificateSource::Local { chain, .. } => read(chain).ok().and_then(|pem| {
                    let certs: Vec<_> = CertificateDer::pem_slice_iter(&pem).flatten().take(1).collect();
                    Some((unnamed("cert"), end(&each(&certs))?))
                }),
            });
        }
        let validation = &common.validation;
        let picky = !validation.san.is_empty() || !validation.hashes.is_empty() || !validation.spkis.is_empty();
        all.extend(match (&validation.sds, &validation.trusted_ca) {
            (Some(sds), _) => named(sds),
            (None, Some(_)) => end(&each(&roots(validation).unwrap_or_default())).map(|at| (unnamed("ca_cert"), at)),
            // Roots that are not there never end.
            (None, None) => picky.then(|| ("unnamed_ca_cert".to_owned(), i64::MAX as u64)),
        });
        all.into_iter().collect()
    }
}

/// Envoy's name of what is no secret: it ends with the hash of the `inline_bytes`, of which there are none in a file or a text.
///
/// DIFFERS: bytes and texts of a configuration are not told apart here, and what comes as bytes has the texts' name.
fn unnamed(what: &str) -> String {
    format!("unnamed_{what}_e3b0c442")
}

/// What the certificates say that a context names by itself: chain and roots, with the files they are in.
pub(crate) fn named_by(common: &TlsCommon) -> Vec<[(Vec<PeerCertificate>, String); 2]> {
    let path = |source: &DataSource| match source {
        DataSource::File(path) => path.to_string(),
        DataSource::Inline(_) => "<inline>".to_owned(),
        DataSource::Environment(_) => String::new(),
    };
    let ca = || {
        let at = common.validation.trusted_ca.as_ref().map(path).unwrap_or_default();
        (each(&roots(&common.validation).unwrap_or_default()), at)
    };
    let own = common.certificates.iter().filter_map(|source| {
        let CertificateSource::Local { chain, .. } = source else { return None };
        let certs: Vec<_> = CertificateDer::pem_slice_iter(&read(chain).ok()?).flatten().collect();
        Some((each(&certs), path(chain)))
    });
    let own: Vec<_> = own.collect();
    match own.is_empty() {
        true if ca().0.is_empty() => Vec::new(),
        true => vec![[ca(), (Vec::new(), String::new())]],
        false => own.into_iter().map(|own| [ca(), own]).collect(),
    }
}

fn roots(validation: &Validation) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let Some(ca) = &validation.trusted_ca else { return Ok(Vec::new()) };
    let pem = read(ca)?;
    let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certs {
        Ok(certs) if !certs.is_empty() => Ok(certs),
        _ => Err(TlsError::Pem { what: "trusted_ca" }),
    }
}

/// The bytes a data source names. Files are small and read when a context is compiled, not per connection.
pub(crate) fn read(source: &DataSource) -> Result<Vec<u8>, TlsError> {
    match source {
        DataSource::Inline(bytes) => Ok(bytes.0.to_vec()),
        DataSource::File(path) => {
            std::fs::read(&**path).map_err(|source| TlsError::Read { path: path.to_string(), source })
        }
        DataSource::Environment(name) => Ok(std::env::var(&**name).unwrap_or_default().into_bytes()),
    }
}

fn pem(certs: &[CertificateDer<'_>]) -> Vec<u8> {
    use base64::Engine as _;
    let mut out = Vec::new();
    for cert in certs {
        out.extend_from_slice(b"-----BEGIN CERTIFICATE-----\n");
        for line in base64::engine::general_purpose::STANDARD.encode(cert).as_bytes().chunks(64) {
            out.extend_from_slice(line);
            out.push(b'\n');
        }
        out.extend_from_slice(b"-----END CERTIFICATE-----\n");
    }
    out
}

pub(super) fn certified_key(chain: &[u8], key: &[u8]) -> Result<CertifiedKey, TlsError> {
    let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
    let certs = certs.map_err(|_| TlsError::Pem { what: "certificate_chain" })?;
    if certs.is_empty() {
        return Err(TlsError::NoCertificate);
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| TlsError::Pem { what: "private_key" })?;
    let key = super::provider().key_provider.load_private_key(key)?;
    let certified = CertifiedKey::new(certs, key);
    match keys_match(&certified)? {
        true => Ok(certified),
        false => Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch).into()),
    }
}

/// Whether the key is the certificate's. rustls's own way is only for certificates of version 3.
fn keys_match(certified: &CertifiedKey) -> Result<bool, TlsError> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let bad = || TlsError::Pem { what: "certificate_chain" };
    let leaf = certified.cert.first().ok_or(TlsError::NoCertificate)?;
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|_| bad())?;
    Ok(certified.key.public_key().is_none_or(|key| *key == *certificate.public_key().raw))
}
