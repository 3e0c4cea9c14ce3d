//! Named secrets: static ones, those from SDS, and those of the agent in the same process.

use super::{TlsError, files, keys};
use mesh_types::ArcStr;
use proxy_core::config_source::Origin;
use proxy_core::stream_info::PeerCertificate;
use proxy_core::tls::{Certificate, CertificateSource, DataSource, SdsRef, Secret, Secretive, TlsCommon, Validation};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use tokio::sync::Notify;

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
    /// Those of them that their names say are in files, with the files' state when they were read.
    files: Mutex<HashMap<ArcStr, files::Stamp>>,
    /// Those that somebody gave whose parts are in files.
    in_files: Mutex<HashMap<(Origin, ArcStr), InFiles>>,
    /// There is one more of these.
    followed: Notify,
    renewals: Mutex<HashMap<ArcStr, Renewals>>,
    generation: AtomicU64,
}

/// A secret whose parts are in files, and their state when they were read.
struct InFiles {
    secret: Secret,
    stamp: files::Stamps,
    /// A hash of what they held.
    content: u64,
}

/// How often a secret came, was changed or was read again from its files, and how often what the files held could not be used.
#[derive(Clone, Copy, Default)]
pub(crate) struct Renewals {
    pub(crate) taken: u64,
    pub(crate) failed: u64,
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
        let mut in_files = self.in_files();
        for ((origin, name), InFiles { secret, stamp, content }) in in_files.iter_mut() {
            let now = files::stamps(secret);
            if now == *stamp {
                continue;
            }
            *stamp = now;
            let now = files::content(secret);
            if now == *content {
                continue;
            }
            match compiled(secret) {
                Ok(entry) => {
                    *content = now;
                    tracing::info!(secret = &**name, "files of a secret were read again");
                    self.insert(origin, name.clone(), entry);
                    self.count(name, |renewals| renewals.taken += 1);
                }
                Err(error) => {
                    tracing::warn!(%error, secret = &**name, "keeping what the files held before");
                    self.count(name, |renewals| renewals.failed += 1);
                }
            }
        }
    }

    fn in_files(&self) -> MutexGuard<'_, HashMap<(Origin, ArcStr), InFiles>> {
        self.in_files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether files have to be looked at now and then.
    pub(super) fn has_files(&self) -> bool {
        !self.in_files().is_empty()
    }

    /// Resolves when there may be files to look at that there were not before.
    pub(super) async fn files_came(&self) {
        self.followed.notified().await;
    }

    fn count(&self, name: &ArcStr, change: impl FnOnce(&mut Renewals)) {
        change(self.renewals.lock().unwrap_or_else(PoisonError::into_inner).entry(name.clone()).or_default());
    }

    /// What became of a secret since it was first asked for.
    pub(crate) fn renewals(&self, name: &str) -> Renewals {
        self.renewals.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied().unwrap_or_default()
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
        self.in_files().remove(&(origin.clone(), name.clone()));
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Takes a secret from configuration or SDS. The files of those from SDS are followed (Envoy `SdsApi::onConfigUpdate`).
    pub(crate) fn set(&self, origin: &Origin, secret: Secret) -> Result<(), TlsError> {
        if matches!(secret, Secret::Generic { .. }) {
            return Ok(());
        }
        let name = secret.name().clone();
        // Taken before the files are read: what is written afterwards is a change.
        let (stamp, content) = (files::stamps(&secret), files::content(&secret));
        let entry = compiled(&secret)?;
        self.insert(origin, name.clone(), entry);
        if *origin != Origin::Static {
            self.count(&name, |renewals| renewals.taken += 1);
            let key = (origin.clone(), name);
            match stamp.is_empty() {
                true => drop(self.in_files().remove(&key)),
                false => {
                    self.in_files().insert(key, InFiles { secret, stamp, content });
                    self.followed.notify_one();
                }
            }
        }
        Ok(())
    }

    fn insert(&self, origin: &Origin, name: ArcStr, entry: Entry) {
        match origin {
            Origin::Ads | Origin::Static => self.put(name, entry),
            origin => {
                self.sourced().insert((origin.clone(), name), Arc::new(entry));
                self.generation.fetch_add(1, Ordering::Release);
            }
        }
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
                CertificateSource::Local(certificate) => Ok(Arc::new(keys::load(certificate)?)),
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

/// A secret in the form TLS needs, with what its files hold now.
fn compiled(secret: &Secret) -> Result<Entry, TlsError> {
    match secret {
        Secret::Certificate { certificate, .. } => Ok(Entry::Certificate(Arc::new(keys::load(certificate)?))),
        Secret::Validation { validation, .. } => {
            let held = |source: &Option<DataSource>| -> Result<_, TlsError> {
                let Some(source) = source else { return Ok(None) };
                Ok(Some(DataSource::Inline(Secretive(read(source)?.into()))))
            };
            let validation = Validation {
                trusted_ca: held(&validation.trusted_ca)?,
                crl: held(&validation.crl)?,
                ..validation.clone()
            };
            // Roots that cannot be read are refused now rather than at the first handshake.
            roots(&validation)?;
            Ok(Entry::Validation(validation))
        }
        Secret::Generic { name, .. } => Err(TlsError::MissingSecret(name.clone())),
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
                CertificateSource::Local(certificate) => read(&certificate.chain).ok().and_then(|pem| {
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
        let CertificateSource::Local(Certificate { chain, .. }) = source else { return None };
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
    keys::certificates(&pem).filter(|certs| !certs.is_empty()).ok_or(TlsError::Pem { what: "trusted_ca" })
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
