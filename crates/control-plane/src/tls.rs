//! The server side of TLS: our own certificate, renewed in time, and clients' certificates, verified.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use ca::{Authority, SignError};
use mesh_types::SpiffeId;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
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
    let verifier = Clients::new(authority.clone(), provider.clone())?;
    let resolver = OwnCertificate::new(authority.clone(), names, provider.clone())?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    Ok(Arc::new(config))
}

fn client_verifier(
    authority: &Authority,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(authority.trust_bundle().as_bytes()) {
        roots.add(certificate?)?;
    }
    Ok(WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()?)
}

/// Verifies clients against the roots of the moment: while the CA's root is replaced there are two.
struct Clients {
    authority: Arc<Authority>,
    provider: Arc<CryptoProvider>,
    /// Never asked to verify: says which signatures and names are understood, which no rotation changes.
    first: Arc<dyn ClientCertVerifier>,
    /// The verifier and the generation of the CA that it is for. Held for a comparison.
    current: Mutex<(Arc<dyn ClientCertVerifier>, u64)>,
}

impl Clients {
    fn new(authority: Arc<Authority>, provider: Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let generation = authority.generation();
        let first = client_verifier(&authority, &provider)?;
        Ok(Self { authority, provider, current: Mutex::new((first.clone(), generation)), first })
    }

    fn now(&self) -> Arc<dyn ClientCertVerifier> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = self.authority.generation();
        if current.1 != generation {
            match client_verifier(&self.authority, &self.provider) {
                Ok(fresh) => *current = (fresh, generation),
                Err(error) => warn!(%error, "clients are still verified with the old root certificates"),
            }
        }
        current.0.clone()
    }
}

impl ClientCertVerifier for Clients {
    /// A hint only; without it clients send the one certificate they have.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.now().verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.first.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.first.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.first.supported_verify_schemes()
    }
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").field("authority", &self.authority).finish_non_exhaustive()
    }
}

/// Signs itself a new certificate when half of the old one's life is over.
struct OwnCertificate {
    authority: Arc<Authority>,
    names: Vec<String>,
    provider: Arc<CryptoProvider>,
    /// Held for a signature at most, a millisecond once a day.
    current: Mutex<Own>,
}

struct Own {
    certificate: Arc<CertifiedKey>,
    renew: SystemTime,
    /// Of the CA that signed it.
    generation: u64,
}

impl OwnCertificate {
    fn new(authority: Arc<Authority>, names: Vec<String>, provider: Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let current = Mutex::new(sign(&authority, &names, &provider)?);
        Ok(Self { authority, names, provider, current })
    }
}

fn sign(authority: &Authority, names: &[String], provider: &CryptoProvider) -> Result<Own, TlsError> {
    let generation = authority.generation();
    let now = SystemTime::now();
    let certificate = authority.server_certificate(names, LIFETIME)?;
    let life = certificate.not_after.duration_since(now).unwrap_or_default();
    let key = provider.key_provider.load_private_key(certificate.key)?;
    let certificate = Arc::new(CertifiedKey::new(certificate.chain, key));
    Ok(Own { certificate, renew: now + life / 2, generation })
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if SystemTime::now() >= current.renew || self.authority.generation() != current.generation {
            match sign(&self.authority, &self.names, &self.provider) {
                Ok(fresh) => {
                    info!("the control plane's own certificate was renewed");
                    *current = fresh;
                }
                Err(error) => warn!(%error, "the control plane keeps its old certificate"),
            }
        }
        Some(current.certificate.clone())
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
