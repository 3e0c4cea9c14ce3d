//! TLS configurations for both ends, with peers verified by chain and by SPIFFE identity.

use std::sync::Arc;

use mesh_types::SpiffeId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::certificate::{WorkloadCertificate, uri_names};

/// The crypto provider of the whole program.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Whom a client accepts at the other end; the chain must lead to a root in all cases.
#[derive(Clone, Debug)]
pub enum ServerIdentity {
    /// The name used for the connection, as on the web. For control planes.
    Name,
    /// One of these workload identities. For mesh peers.
    OneOf(Vec<SpiffeId>),
    /// Any workload of these trust domains.
    TrustDomains(Vec<String>),
}

/// What a server asks of clients.
#[derive(Clone, Debug)]
pub enum ClientIdentity {
    /// No certificate is asked for.
    Anonymous,
    /// A certificate is verified if there is one.
    Optional { trust_domains: Vec<String> },
    /// Without a workload certificate of these trust domains there is no connection.
    Required { trust_domains: Vec<String> },
}

/// A client that trusts `roots` and, given a certificate, proves itself with it.
pub fn client_config(
    roots: &[CertificateDer<'static>],
    own: Option<&WorkloadCertificate>,
    accept: ServerIdentity,
    alpn: &[&[u8]],
) -> Result<ClientConfig, Error> {
    let store = Arc::new(root_store(roots)?);
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms;
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let builder = match accept {
        ServerIdentity::Name => builder.with_root_certificates(store),
        ServerIdentity::OneOf(ids) => {
            let verifier = PeerVerifier { roots: store, algorithms, accept: Accept::OneOf(ids) };
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        }
        ServerIdentity::TrustDomains(domains) => {
            let verifier = PeerVerifier { roots: store, algorithms, accept: Accept::TrustDomains(domains) };
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        }
    };
    let mut config = match own {
        Some(own) => builder.with_client_auth_cert(own.chain.clone(), own.key.der().clone_key())?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(config)
}

/// A server that proves itself with `own` and verifies clients against the same roots.
pub fn server_config(
    own: &WorkloadCertificate,
    clients: ClientIdentity,
    alpn: &[&[u8]],
) -> Result<ServerConfig, Error> {
    let provider = provider();
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let verifier = |trust_domains: Vec<String>, optional: bool| -> Result<Arc<dyn ClientCertVerifier>, Error> {
        let inner = WebPkiClientVerifier::builder_with_provider(Arc::new(root_store(&own.roots)?), provider.clone());
        let inner = if optional { inner.allow_unauthenticated() } else { inner };
        let inner = inner.build().map_err(|e| Error::General(e.to_string()))?;
        Ok(Arc::new(SpiffeClients { inner, accept: Accept::TrustDomains(trust_domains) }))
    };
    let builder = match clients {
        ClientIdentity::Anonymous => builder.with_no_client_auth(),
        ClientIdentity::Optional { trust_domains } => builder.with_client_cert_verifier(verifier(trust_domains, true)?),
        ClientIdentity::Required { trust_domains } => {
            builder.with_client_cert_verifier(verifier(trust_domains, false)?)
        }
    };
    let mut config = builder.with_single_cert(own.chain.clone(), own.key.der().clone_key())?;
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(config)
}

/// The workload identity in a peer's certificate.
pub fn spiffe_id(certificate: &CertificateDer<'_>) -> Option<SpiffeId> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    // Source: SPIFFE X.509-SVID, section 2: exactly one URI name.
    let mut names = uri_names(&parsed);
    let only = names.next()?;
    names.next().is_none().then(|| only.parse().ok()).flatten()
}

fn root_store(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    Ok(store)
}

#[derive(Clone, Debug)]
enum Accept {
    OneOf(Vec<SpiffeId>),
    TrustDomains(Vec<String>),
}

impl Accept {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let refused = Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let id = spiffe_id(certificate).ok_or(refused.clone())?;
        let accepted = match self {
            Accept::OneOf(ids) => ids.contains(&id),
            Accept::TrustDomains(domains) => domains.iter().any(|domain| domain == id.trust_domain()),
        };
        accepted.then_some(()).ok_or(refused)
    }
}

/// Verifies a server by chain and SPIFFE identity: workloads have no DNS names in their certificates.
#[derive(Debug)]
struct PeerVerifier {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    accept: Accept,
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        self.accept.check(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The usual verification of clients, then the SPIFFE identity.
#[derive(Debug)]
struct SpiffeClients {
    inner: Arc<dyn ClientCertVerifier>,
    accept: Accept,
}

impl ClientCertVerifier for SpiffeClients {
    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        self.accept.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
