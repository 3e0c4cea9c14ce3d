//! The certificate authority.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use mesh_types::SpiffeId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::FromDer;

use crate::pem;
use crate::rotation::{Signer, Signers};

/// The longest life of a workload certificate: istiod's MAX_WORKLOAD_CERT_TTL.
pub const MAX_TTL: Duration = Duration::from_secs(90 * 24 * 3600);

/// istiod's CITADEL_SELF_SIGNED_CA_CERT_TTL.
const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How far clocks of two machines may differ: istiod's clock skew grace period.
const CLOCK_SKEW: Duration = Duration::from_secs(120);

/// Bytes of a CSR; one with a 4096 bit RSA key has 2 KB.
const MAX_CSR: usize = 64 << 10;

const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const ROOT: &str = "root-cert.pem";
const CHAIN: &str = "cert-chain.pem";

/// Signs with the key of one CA certificate at a time. The key never leaves it.
pub struct Authority {
    signers: Signers,
    /// The root it started with.
    root: String,
    /// PEM of other meshes' roots, which workloads trust, too. Held for a copy.
    others: RwLock<Vec<String>>,
}

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} holds no certificate")]
    NoCertificate { path: PathBuf },
    #[error("{path} is not usable: {reason}")]
    Certificate { path: PathBuf, reason: String },
    #[error("{path} is not a private key in PKCS#8, SEC1 or PKCS#1 form that fits {CERTIFICATE}")]
    Key { path: PathBuf },
    #[error("cannot make a CA certificate")]
    Generate(#[source] rcgen::Error),
}

/// Why a request was not signed. Nothing in it is secret, so callers may see it.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    #[error("the certificate signing request is larger than {MAX_CSR} bytes")]
    TooLarge,
    #[error("the certificate signing request is not readable: {0}")]
    Malformed(String),
    #[error("the signature of the certificate signing request does not fit its key")]
    Signature,
    #[error("the key of the certificate signing request is not usable: {0}")]
    Key(String),
    #[error("the requested lifetime is longer than {} days", MAX_TTL.as_secs() / 86400)]
    Ttl,
    #[error("the CA certificate has expired")]
    Expired,
    #[error("{0:?} is not a DNS name")]
    Name(String),
    #[error("signing failed")]
    Sign(#[source] rcgen::Error),
}

impl SignError {
    /// istiod's word for it (istio `security/pkg/pki/error`).
    pub fn istio_type(&self) -> &'static str {
        match self {
            SignError::TooLarge | SignError::Malformed(_) | SignError::Signature | SignError::Key(_) => "CSR_ERROR",
            SignError::Ttl => "TTL_ERROR",
            SignError::Expired => "CA_NOT_READY",
            SignError::Name(_) | SignError::Sign(_) => "CERT_GEN_ERROR",
        }
    }
}

/// A certificate with its key, for a server of the control plane.
pub struct ServerCertificate {
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key.
    pub key: PrivateKeyDer<'static>,
    /// When it ends.
    pub not_after: SystemTime,
}

impl Authority {
    /// A fresh self-signed root, kept in memory only.
    pub fn generate(trust_domain: &str) -> Result<Self, AuthorityError> {
        let (certificate, key) = generate_root(trust_domain)?;
        Self::from_pem(Path::new(CERTIFICATE), &certificate, "", &certificate, key)
    }

    /// The authority whose files are in `dir`, which is made, with a fresh self-signed root, when it holds none.
    pub fn load_or_create(dir: &Path, trust_domain: &str) -> Result<Self, AuthorityError> {
        if !dir.join(CERTIFICATE).exists() {
            let (certificate, key) = generate_root(trust_domain)?;
            let save = |name: &str, text: &str, secret| {
                let path = dir.join(name);
                pem::write(&path, text, secret).map_err(|source| AuthorityError::Write { path, source })
            };
            fs::create_dir_all(dir).map_err(|source| AuthorityError::Write { path: dir.to_path_buf(), source })?;
            save(KEY, &key.serialize_pem(), true)?;
            save(ROOT, &certificate, false)?;
            save(CHAIN, "", false)?;
            // Last, since it says that all the others are there.
            save(CERTIFICATE, &certificate, false)?;
        }
        Self::load(dir)
    }

    /// The authority in `dir`, laid out as Istio's `cacerts` secret: ca-cert.pem, ca-key.pem, root-cert.pem,
    /// cert-chain.pem; the last may be empty or absent.
    pub fn load(dir: &Path) -> Result<Self, AuthorityError> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).map_err(|source| AuthorityError::Read { path, source })
        };
        let chain = if dir.join(CHAIN).exists() { read(CHAIN)? } else { String::new() };
        let key = key_pair(&read(KEY)?).ok_or_else(|| AuthorityError::Key { path: dir.join(KEY) })?;
        Self::from_pem(&dir.join(CERTIFICATE), &read(CERTIFICATE)?, &chain, &read(ROOT)?, key)
    }

    /// As [`Authority::load`], of files by name: the data of the Secret `cacerts`, or of [`self_signed`].
    ///
    /// # Errors
    /// As [`Authority::load`].
    pub fn from_files(files: &BTreeMap<String, Vec<u8>>) -> Result<Self, AuthorityError> {
        let text = |name: &str| files.get(name).map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let missing = |name: &str| AuthorityError::NoCertificate { path: name.into() };
        let certificate = text(CERTIFICATE).ok_or_else(|| missing(CERTIFICATE))?;
        let key = text(KEY).and_then(|key| key_pair(&key)).ok_or_else(|| AuthorityError::Key { path: KEY.into() })?;
        // A self-signed authority's own certificate is its root.
        let root = text(ROOT).filter(|root| !root.trim().is_empty()).unwrap_or_else(|| certificate.clone());
        Self::from_pem(Path::new(CERTIFICATE), &certificate, &text(CHAIN).unwrap_or_default(), &root, key)
    }

    fn from_pem(path: &Path, certificate: &str, chain: &str, root: &str, key: KeyPair) -> Result<Self, AuthorityError> {
        let signer = signer(path, certificate, chain, root, key)?;
        Ok(Self { signers: Signers::new(signer), root: root.to_owned(), others: RwLock::default() })
    }

    /// The root certificates it started with, as PEM: those that verify all we sign until a rotation.
    pub fn root_pem(&self) -> &str {
        &self.root
    }

    /// All root certificates to be trusted now, as PEM: during a rotation there are two.
    pub fn trust_bundle(&self) -> String {
        self.signers.bundle(SystemTime::now())
    }

    /// Has workloads trust these roots of other meshes, too: they get them with their next certificate. The control plane
    /// itself goes on trusting only what this authority signs.
    pub fn trust_also(&self, roots: Vec<String>) {
        *self.others.write().unwrap_or_else(PoisonError::into_inner) = roots;
    }

    /// When the root ends, and when the certificate ends whose key signs.
    pub fn expiry(&self) -> (SystemTime, SystemTime) {
        let signer = self.signers.current();
        let root = pem::certificates(signer.root.as_bytes()).ok().and_then(|list| list.into_iter().next());
        let root = root.and_then(|der| {
            let (_, parsed) = x509_parser::parse_x509_certificate(&der).ok()?;
            Some(seconds(parsed.validity().not_after.timestamp()))
        });
        (root.unwrap_or(signer.not_after), signer.not_after)
    }

    /// Changes whenever what signs or what is to be trusted has changed by a rotation.
    pub fn generation(&self) -> u64 {
        self.signers.generation()
    }

    /// Starts a rotation: makes a new self-signed root, which is to be trusted from now on and signs nothing yet. Its trust
    /// bundle must reach everybody before [`Authority::activate`].
    ///
    /// # Errors
    /// When no key can be made.
    pub fn rotate(&self, trust_domain: &str) -> Result<(), AuthorityError> {
        let (certificate, key) = generate_root(trust_domain)?;
        self.signers.announce(signer(Path::new(CERTIFICATE), &certificate, "", &certificate, key)?);
        Ok(())
    }

    /// Signs with the root that [`Authority::rotate`] made; the old one stays trusted until all it has signed has expired.
    /// False if there is none.
    pub fn activate(&self) -> bool {
        self.signers.activate(CLOCK_SKEW)
    }

    /// Signs the key of a CSR (PEM or DER) for `identity`; whatever else the CSR asks for is ignored. The chain is
    /// PEM: leaf, intermediates if any, and last all roots to trust, as istiod answers.
    ///
    /// # Errors
    /// When the CSR does not prove that the caller holds the key, or `ttl` is too long.
    pub fn sign(&self, csr: &[u8], identity: &SpiffeId, ttl: Duration) -> Result<Vec<String>, SignError> {
        let key = verified_key(csr)?;
        let uri = identity.to_string();
        let name = uri.as_str().try_into().map_err(|_| SignError::Name(uri.clone()))?;
        let signer = self.signers.current();
        let leaf = leaf(&signer, &key, vec![SanType::URI(name)], ttl)?.pem();
        let mut chain = vec![leaf];
        if !signer.intermediates.is_empty() {
            chain.push(signer.intermediates.clone());
        }
        let mut roots = if self.signers.generation() == 0 { signer.root.clone() } else { self.trust_bundle() };
        for other in self.others.read().unwrap_or_else(PoisonError::into_inner).iter() {
            if !roots.ends_with('\n') {
                roots.push('\n');
            }
            roots.push_str(other);
        }
        chain.push(roots);
        Ok(chain)
    }

    /// A new key and certificate for a server that answers to `names`.
    ///
    /// # Errors
    /// When a name is not one, or `ttl` is too long.
    pub fn server_certificate(&self, names: &[String], ttl: Duration) -> Result<ServerCertificate, SignError> {
        let key = KeyPair::generate().map_err(SignError::Sign)?;
        let names = names.iter().map(|name| match name.parse() {
            Ok(address) => Ok(SanType::IpAddress(address)),
            Err(_) => name.as_str().try_into().map(SanType::DnsName).map_err(|_| SignError::Name(name.clone())),
        });
        let signer = self.signers.current();
        let leaf = leaf(&signer, &key, names.collect::<Result<_, _>>()?, ttl)?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(pem::certificates(signer.intermediates.as_bytes()).unwrap_or_default());
        let not_after = (SystemTime::now() + ttl).min(signer.not_after);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(ServerCertificate { chain, key, not_after })
    }
}

fn leaf(
    signer: &Signer,
    key: &impl PublicKeyData,
    names: Vec<SanType>,
    ttl: Duration,
) -> Result<rcgen::Certificate, SignError> {
    if ttl > MAX_TTL {
        return Err(SignError::Ttl);
    }
    let now = SystemTime::now();
    if now >= signer.not_after {
        return Err(SignError::Expired);
    }
    let not_after = (now + ttl).min(signer.not_after);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = not_after.into();
    params.serial_number = Some(serial()?);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(key, &signer.issuer).map_err(SignError::Sign)?;
    signer.signed_until(not_after);
    Ok(certificate)
}

/// Of the epoch; what was before it counts as its beginning.
fn seconds(of_epoch: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(of_epoch).unwrap_or(0))
}

/// What signs, put together from PEM texts.
fn signer(path: &Path, certificate: &str, chain: &str, root: &str, key: KeyPair) -> Result<Signer, AuthorityError> {
    let unusable = |reason: String| AuthorityError::Certificate { path: path.to_path_buf(), reason };
    let list = |text: &str| pem::certificates(text.as_bytes()).map_err(|error| unusable(error.to_string()));
    let missing = || AuthorityError::NoCertificate { path: path.to_path_buf() };
    let der = list(certificate)?.into_iter().next().ok_or_else(missing)?;
    let roots = list(root)?;
    if roots.is_empty() {
        return Err(missing());
    }
    let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(|error| unusable(error.to_string()))?;
    if !parsed.is_ca() {
        return Err(unusable("it is not a CA certificate".into()));
    }
    if parsed.public_key().raw != key.subject_public_key_info() {
        return Err(AuthorityError::Key { path: path.with_file_name(KEY) });
    }
    let not_after = seconds(parsed.validity().not_after.timestamp());
    let mut intermediates = Vec::new();
    if !roots.contains(&der) {
        intermediates.push(certificate.trim());
        // As istiod: cert-chain.pem usually starts with ca-cert.pem itself.
        if list(chain)?.contains(&der) {
            intermediates.clear();
        }
        intermediates.push(chain.trim());
    }
    let intermediates: String =
        intermediates.iter().filter(|text| !text.is_empty()).map(|text| format!("{text}\n")).collect();
    let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|error| unusable(error.to_string()))?;
    Ok(Signer::new(issuer, intermediates, root.to_owned(), not_after))
}

/// The files of a fresh self-signed authority, for a Secret.
///
/// # Errors
/// When no key can be made.
pub fn self_signed(trust_domain: &str) -> Result<BTreeMap<String, Vec<u8>>, AuthorityError> {
    let (certificate, key) = generate_root(trust_domain)?;
    let files =
        [(CERTIFICATE, certificate.clone()), (KEY, key.serialize_pem()), (ROOT, certificate), (CHAIN, String::new())];
    Ok(files.into_iter().map(|(name, text)| (name.to_owned(), text.into_bytes())).collect())
}

/// Shows no key.
impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.signers.current().not_after).finish_non_exhaustive()
    }
}

/// PEM of a self-signed root, named as istiod's: `O=TRUST_DOMAIN`.
fn generate_root(trust_domain: &str) -> Result<(String, KeyPair), AuthorityError> {
    let key = KeyPair::generate().map_err(AuthorityError::Generate)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + ROOT_TTL).into();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params.serial_number = serial().ok();
    let certificate = params.self_signed(&key).map_err(AuthorityError::Generate)?;
    Ok((certificate.pem(), key))
}

/// 126 random bits, as istiod; the first is not set, for the number must be positive.
fn serial() -> Result<SerialNumber, SignError> {
    let mut bytes = [0; 16];
    let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
    random.fill(&mut bytes).map_err(|_| SignError::Sign(rcgen::Error::RingUnspecified))?;
    bytes[0] = bytes[0] & 0x3f | 0x20;
    Ok(SerialNumber::from_slice(&bytes))
}

/// Reads a key in any of the forms OpenSSL writes.
fn key_pair(pem: &str) -> Option<KeyPair> {
    use rustls_pki_types::pem::PemObject;
    let der = PrivateKeyDer::from_pem_slice(pem.as_bytes()).ok()?;
    KeyPair::try_from(&der).ok()
}

/// The public key of a CSR that is signed by it.
fn verified_key(csr: &[u8]) -> Result<SubjectPublicKeyInfo, SignError> {
    use rustls_pki_types::CertificateSigningRequestDer;
    use rustls_pki_types::pem::PemObject;
    if csr.len() > MAX_CSR {
        return Err(SignError::TooLarge);
    }
    let der = if csr.trim_ascii_start().starts_with(b"-----BEGIN") {
        CertificateSigningRequestDer::from_pem_slice(csr).map_err(|error| SignError::Malformed(error.to_string()))?
    } else {
        CertificateSigningRequestDer::from(csr.to_vec())
    };
    let (_, request) = x509_parser::certification_request::X509CertificationRequest::from_der(&der)
        .map_err(|error| SignError::Malformed(error.to_string()))?;
    request.verify_signature().map_err(|_| SignError::Signature)?;
    let spki = &request.certification_request_info.subject_pki;
    if let Ok(x509_parser::public_key::PublicKey::RSA(rsa)) = spki.parsed()
        && rsa.key_size() < 2048
    {
        return Err(SignError::Key(format!("an RSA key of {} bits is too weak", rsa.key_size())));
    }
    SubjectPublicKeyInfo::from_der(spki.raw).map_err(|error| SignError::Key(error.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn identity() -> SpiffeId {
        "spiffe://cluster.local/ns/default/sa/bookinfo-reviews".parse().unwrap()
    }

    /// A CSR that asks for somebody else's name and to be a CA.
    fn greedy_csr() -> (KeyPair, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/ns/default/sa/admin".try_into().unwrap())];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let csr = params.serialize_request(&key).unwrap();
        (key, csr.der().to_vec())
    }

    #[test]
    fn identity_is_the_callers_and_never_the_requests() {
        let authority = Authority::generate("cluster.local").unwrap();
        let (key, csr) = greedy_csr();
        let chain = authority.sign(&csr, &identity(), Duration::from_secs(3600)).unwrap();
        assert_eq!(chain.len(), 2);
        let leaf = pem::certificates(chain[0].as_bytes()).unwrap().remove(0);
        let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).unwrap();
        assert!(!leaf.is_ca());
        let names = &leaf.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(names.len(), 1);
        assert!(names[0].to_string().contains("/sa/bookinfo-reviews"), "{}", names[0]);
        assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
        let root = pem::certificates(authority.root_pem().as_bytes()).unwrap().remove(0);
        let (_, root) = x509_parser::parse_x509_certificate(&root).unwrap();
        leaf.verify_signature(Some(root.public_key())).unwrap();
    }

    #[test]
    fn while_a_root_is_replaced_both_are_trusted_and_only_one_signs() {
        let authority = Authority::generate("td").unwrap();
        assert!(!authority.activate(), "nothing was announced");
        let count = |text: &str| pem::certificates(text.as_bytes()).unwrap().len();
        let issuer = |authority: &Authority| {
            let chain = authority.sign(&greedy_csr().1, &identity(), Duration::from_secs(3600)).unwrap();
            let leaf = pem::certificates(chain[0].as_bytes()).unwrap().remove(0);
            let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).unwrap();
            let roots = pem::certificates(chain.last().unwrap().as_bytes()).unwrap();
            roots.iter().position(|root| {
                let (_, root) = x509_parser::parse_x509_certificate(root).unwrap();
                leaf.verify_signature(Some(root.public_key())).is_ok()
            })
        };
        let old = authority.trust_bundle();
        assert_eq!((count(&old), issuer(&authority)), (1, Some(0)));
        authority.rotate("td").unwrap();
        let both = authority.trust_bundle();
        assert!(both.starts_with(old.trim_end()), "the old root still signs");
        assert_eq!((count(&both), issuer(&authority)), (2, Some(0)));
        assert!(authority.activate());
        let bundle = authority.trust_bundle();
        assert!(!bundle.starts_with(old.trim_end()) && bundle.contains(old.trim_end()));
        assert_eq!((count(&bundle), issuer(&authority)), (2, Some(0)));
        let later = SystemTime::now() + Duration::from_secs(3600) + CLOCK_SKEW + Duration::from_secs(5);
        assert!(!authority.signers.bundle(later).contains(old.trim_end()), "the old root goes with what it signed");
        assert_eq!(authority.generation(), 2);
    }

    #[test]
    fn a_request_must_be_signed_by_its_own_key() {
        let authority = Authority::generate("cluster.local").unwrap();
        let (_, mut csr) = greedy_csr();
        let last = csr.len() - 1;
        csr[last] ^= 1;
        assert!(matches!(
            authority.sign(&csr, &identity(), Duration::from_secs(60)),
            Err(SignError::Signature | SignError::Malformed(_))
        ));
        let (_, csr) = greedy_csr();
        assert!(matches!(authority.sign(&csr, &identity(), MAX_TTL + Duration::from_secs(1)), Err(SignError::Ttl)));
    }

    #[test]
    fn the_folder_keeps_the_authority_and_its_key_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("ca");
        let first = Authority::load_or_create(&dir, "td").unwrap();
        let second = Authority::load_or_create(&dir, "td").unwrap();
        assert_eq!(first.root_pem(), second.root_pem());
        assert_eq!(fs::metadata(dir.join(KEY)).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(dir.join(KEY), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(matches!(Authority::load(&dir), Err(AuthorityError::Key { .. })));
    }

    #[test]
    fn an_intermediate_is_sent_along() {
        let dir = tempfile::tempdir().unwrap();
        let (root_pem, root_key) = generate_root("root").unwrap();
        let root = pem::certificates(root_pem.as_bytes()).unwrap().remove(0);
        let issuer = Issuer::from_ca_cert_der(&root, root_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let intermediate = params.signed_by(&key, &issuer).unwrap().pem();
        for (name, text) in
            [(KEY, &key.serialize_pem()), (CERTIFICATE, &intermediate), (CHAIN, &intermediate), (ROOT, &root_pem)]
        {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let authority = Authority::load(dir.path()).unwrap();
        let chain = authority.sign(&greedy_csr().1, &identity(), Duration::from_secs(60)).unwrap();
        let all = pem::certificates(chain.concat().as_bytes()).unwrap();
        assert_eq!(all.len(), 3);
        assert_eq!(all[2], root);
        let server =
            authority.server_certificate(&["istiod.istio-system.svc".into(), "::1".into()], Duration::from_secs(60));
        assert_eq!(server.unwrap().chain.len(), 2);
    }

    proptest! {
        #[test]
        fn no_request_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), flip in 0usize..200, bit in 0u8..8) {
            let _ = verified_key(&bytes).is_ok();
            let (_, mut csr) = greedy_csr();
            let at = flip % csr.len();
            csr[at] ^= 1 << bit;
            let _ = verified_key(&csr).is_ok();
        }
    }
}
