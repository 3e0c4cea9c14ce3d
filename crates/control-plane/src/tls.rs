//! The server side of TLS: our own certificate, renewed in time, and clients' certificates, verified.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use ca::{Authority, SignError};
use mesh_types::SpiffeId;
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use tracing::{info, warn};

/// Lifetime of our own certificates.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("the control plane's own certificate cannot be signed")]
    Sign(#[from] SignError),
    #[error("TLS cannot be set up")]
    Rustls(#[from] rustls::Error),
    #[error("the CA's root certificate is not readable")]
    Root(#[from] rustls::pki_types::pem::Error),
    #[error("clients cannot be verified with the CA's root certificate")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// A server with `names` that asks clients for certificates of the mesh but takes those without.
pub(crate) fn server_config(
    authority: &Arc<Authority>,
    names: Vec<String>,
    alpn: &[&str],
) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(authority.root_pem().as_bytes()) {
        roots.add(certificate?)?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()?;
    let resolver = OwnCertificate::new(authority.clone(), names, provider.clone())?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    Ok(Arc::new(config))
}

/// Signs itself a new certificate when half of the old one's life is over.
struct OwnCertificate {
    authority: Arc<Authority>,
    names: Vec<String>,
    provider: Arc<CryptoProvider>,
    /// The certificate and when to renew it. Held for a signature at most, a millisecond once a day.
    current: Mutex<(Arc<CertifiedKey>, SystemTime)>,
}

impl OwnCertificate {
    fn new(authority: Arc<Authority>, names: Vec<String>, provider: Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let current = Mutex::new(sign(&authority, &names, &provider)?);
        Ok(Self { authority, names, provider, current })
    }
}

fn sign(
    authority: &Authority,
    names: &[String],
    provider: &CryptoProvider,
) -> Result<(Arc<CertifiedKey>, SystemTime), TlsError> {
    let now = SystemTime::now();
    let certificate = authority.server_certificate(names, LIFETIME)?;
    let life = certificate.not_after.duration_since(now).unwrap_or_default();
    let key = provider.key_provider.load_private_key(certificate.key)?;
    Ok((Arc::new(CertifiedKey::new(certificate.chain, key)), now + life / 2))
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if SystemTime::now() >= current.1 {
            match sign(&self.authority, &self.names, &self.provider) {
                Ok(fresh) => {
                    info!("the control plane's own certificate was renewed");
                    *current = fresh;
                }
                Err(error) => warn!(%error, "the control plane keeps its old certificate"),
            }
        }
        Some(current.0.clone())
    }
}

impl std::fmt::Debug for OwnCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnCertificate").field("names", &self.names).finish_non_exhaustive()
    }
}

/// The SPIFFE identity in a verified certificate: its only URI name.
pub(crate) fn identity(certificate: &CertificateDer<'_>) -> Option<SpiffeId> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        x509_parser::extensions::GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    // SPIFFE X.509-SVID section 2: exactly one URI.
    let uri = uris.next()?;
    if uris.next().is_some() {
        return None;
    }
    uri.parse().ok()
}
