//! Verification of peers: chain of trust, then Envoy's matchers on names, hashes and public keys.

use super::trust::{Peers, Trust};
use super::{TlsError, peer_certificate, provider};
use mesh_types::ArcStr;
use proxy_core::TlsInfo;
use proxy_core::stream_info::PeerCertificate;
use proxy_core::tls::Validation;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConnection, DigitallySignedStruct, DistinguishedName, Error,
    HandshakeKind, PeerMisbehaved, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use std::cell::RefCell;
use std::sync::Arc;
use webpki::RawPublicKeyEntity;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Why a handshake failed, for Envoy's ssl counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// `fail_verify_error`
    Chain,
    /// `fail_verify_san`
    San,
    /// `fail_verify_no_cert`
    NoCertificate,
    /// `fail_verify_cert_hash`
    Hash,
    /// Anything else: `connection_error`.
    Other,
}

/// What is wrong with a peer's certificate.
#[derive(Clone, Debug)]
pub(crate) struct Refused {
    pub(crate) failure: Failure,
    /// Makes the alert.
    error: Error,
    /// BoringSSL's code and name, with Envoy's details, because people search for them.
    pub(crate) words: String,
    peer: Option<Box<PeerCertificate>>,
}

impl Refused {
    /// `details`: as in Envoy's `DefaultCertValidator`.
    pub(super) fn new(failure: Failure, error: Error, details: String) -> Self {
        let words =
            format!("268435581:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:verify cert failed: {details}");
        Self { failure, error, words, peer: None }
    }
}

thread_local! {
    /// What the verification that runs inside of rustls found, for whoever drives the handshake: rustls's own errors have no
    /// room for it, and its verifiers are shared by all connections.
    static FOUND: RefCell<Option<Refused>> = const { RefCell::new(None) };
    /// The name that the server's certificate must have.
    static EXPECTED: RefCell<Option<ArcStr>> = const { RefCell::new(None) };
}

/// Drives a handshake. Beside its result: what is wrong with the peer's certificate, which is there without an error where
/// any is accepted. `expected`: a name that a server's certificate must have.
pub(super) async fn heard<T>(expected: Option<&ArcStr>, handshake: impl Future<Output = T>) -> (T, Option<Refused>) {
    let mut handshake = std::pin::pin!(handshake);
    let mut found = None;
    let result = std::future::poll_fn(|cx| {
        // Both are this handshake's, as nothing else runs on this thread meanwhile.
        EXPECTED.set(expected.cloned());
        let polled = handshake.as_mut().poll(cx);
        EXPECTED.set(None);
        found = FOUND.take().or(found.take());
        polled
    })
    .await;
    (result, found)
}

/// A handshake that failed.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: std::io::Error,
    refused: Option<Refused>,
    /// What was known of the connection by then.
    pub(crate) tls: Option<Box<TlsInfo>>,
}

impl From<Failed> for std::io::Error {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

impl Failed {
    pub(super) fn new(error: std::io::Error, refused: Option<Refused>) -> Self {
        Self { error, refused, tls: None }
    }

    /// With what was known of the connection besides the peer.
    pub(super) fn with(mut self, mut known: TlsInfo) -> Self {
        known.peer = self.refused.as_mut().and_then(|refused| refused.peer.take()).map(|peer| *peer);
        self.tls = Some(Box::new(known));
        self
    }

    pub(crate) fn failure(&self) -> Failure {
        match (&self.refused, rustls_error(&self.error)) {
            (Some(refused), _) => refused.failure,
            (_, Some(Error::InvalidCertificate(_))) => Failure::Chain,
            (_, Some(Error::NoCertificatesPresented)) => Failure::NoCertificate,
            _ => Failure::Other,
        }
    }

    /// What is wrong with the peer's certificate; `None`: something else is wrong.
    pub(crate) fn words(&self) -> Option<&str> {
        Some(&self.refused.as_ref()?.words)
    }
}

fn rustls_error(error: &std::io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

/// What went wrong in a handshake: BoringSSL's code and name where there is one, because people search for them.
pub(crate) fn in_boring_words(error: &std::io::Error) -> String {
    use rustls::PeerIncompatible::{NoCipherSuitesInCommon, NoKxGroupsInCommon};
    let (reason, name) = match rustls_error(error) {
        Some(Error::PeerIncompatible(NoCipherSuitesInCommon)) => (184, "NO_SHARED_CIPHER"),
        Some(Error::PeerIncompatible(NoKxGroupsInCommon)) => (266, "NO_SHARED_GROUP"),
        Some(Error::PeerIncompatible(_)) => (240, "UNSUPPORTED_PROTOCOL"),
        Some(Error::InvalidMessage(_)) => (137, "DECODE_ERROR"),
        Some(Error::InappropriateHandshakeMessage { .. } | Error::InappropriateMessage { .. }) => {
            (223, "UNEXPECTED_MESSAGE")
        }
        Some(Error::AlertReceived(alert)) => {
            let alert = u8::from(*alert);
            (1000 + u32::from(alert), alert_name(alert))
        }
        _ => return error.to_string().replace(' ', "_"),
    };
    // The library's number, and the reason's.
    format!("{}:SSL_routines:OPENSSL_internal:{name}", 16 << 24 | reason)
}

/// The same of what a server did. One that does not speak TLS has the wrong version.
pub(crate) fn of_server_in_boring_words(error: &std::io::Error) -> String {
    let words = in_boring_words(error);
    match rustls_error(error) {
        Some(Error::AlertReceived(AlertDescription::HandshakeFailure)) => {
            format!("{words}|268435610:SSL_routines:OPENSSL_internal:HANDSHAKE_FAILURE_ON_CLIENT_HELLO")
        }
        Some(Error::AlertReceived(_) | Error::PeerIncompatible(_)) => words,
        _ => "268435703:SSL_routines:OPENSSL_internal:WRONG_VERSION_NUMBER".to_owned(),
    }
}

/// Alerts as BoringSSL's errors name them.
fn alert_name(alert: u8) -> &'static str {
    match alert {
        10 => "SSLV3_ALERT_UNEXPECTED_MESSAGE",
        20 => "SSLV3_ALERT_BAD_RECORD_MAC",
        40 => "SSLV3_ALERT_HANDSHAKE_FAILURE",
        42 => "SSLV3_ALERT_BAD_CERTIFICATE",
        43 => "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        44 => "SSLV3_ALERT_CERTIFICATE_REVOKED",
        45 => "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        46 => "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        47 => "SSLV3_ALERT_ILLEGAL_PARAMETER",
        48 => "TLSV1_ALERT_UNKNOWN_CA",
        49 => "TLSV1_ALERT_ACCESS_DENIED",
        50 => "TLSV1_ALERT_DECODE_ERROR",
        51 => "TLSV1_ALERT_DECRYPT_ERROR",
        70 => "TLSV1_ALERT_PROTOCOL_VERSION",
        71 => "TLSV1_ALERT_INSUFFICIENT_SECURITY",
        80 => "TLSV1_ALERT_INTERNAL_ERROR",
        90 => "TLSV1_ALERT_USER_CANCELLED",
        112 => "TLSV1_ALERT_UNRECOGNIZED_NAME",
        116 => "TLSV1_ALERT_CERTIFICATE_REQUIRED",
        120 => "TLSV1_ALERT_NO_APPLICATION_PROTOCOL",
        _ => "TLSV1_ALERT_UNKNOWN",
    }
}

/// What a peer shows.
#[derive(Clone, Copy)]
struct Shown<'a> {
    leaf: &'a CertificateDer<'a>,
    rest: &'a [CertificateDer<'a>],
    now: UnixTime,
    /// One of the names must be this (`auto_san_validation`).
    expected: Option<&'a str>,
}

impl<'a> Shown<'a> {
    fn chain(&self) -> Vec<CertificateDer<'a>> {
        std::iter::once(self.leaf).chain(self.rest).cloned().collect()
    }
}

/// What is asked of a peer's certificate.
#[derive(Debug)]
struct Checks {
    peers: Peers,
    /// `None`: no roots, any certificate will do (but its possession is proven).
    trust: Option<Trust>,
    validation: Validation,
    /// The key's usage is looked at (of servers with RSA keys only if `enforce_rsa_key_usage` says so).
    usage_of_rsa: bool,
}

impl Checks {
    fn new(
        peers: Peers,
        validation: Validation,
        roots: &[CertificateDer<'static>],
        usage_of_rsa: bool,
    ) -> Result<Self, TlsError> {
        let trust = (!roots.is_empty()).then(|| Trust::new(peers, &validation, roots)).transpose()?;
        Ok(Self { peers, trust, validation, usage_of_rsa })
    }

    /// The order is that of BoringSSL and Envoy's `DefaultCertValidator::verifyCertAndUpdateStatus`.
    fn find(&self, shown: Shown<'_>) -> Result<(), Refused> {
        match self.peers {
            Peers::Clients => {
                self.usage(shown.leaf)?;
                self.certificate(shown)
            }
            Peers::Servers => {
                self.certificate(shown)?;
                self.usage(shown.leaf)
            }
        }
    }

    /// Whether the key may sign handshakes (RFC 5280, 4.2.1.3): a certificate that says nothing about it may.
    fn usage(&self, leaf: &CertificateDer<'_>) -> Result<(), Refused> {
        use x509_parser::oid_registry::OID_PKCS1_RSAENCRYPTION;
        let Ok((_, certificate)) = X509Certificate::from_der(leaf) else { return Ok(()) };
        let of_rsa = certificate.public_key().algorithm.algorithm == OID_PKCS1_RSAENCRYPTION;
        let usage = certificate.key_usage().ok().flatten();
        if (of_rsa && !self.usage_of_rsa) || usage.is_none_or(|usage| usage.value.digital_signature()) {
            return Ok(());
        }
        Err(Refused {
            failure: Failure::Other,
            error: Error::PeerMisbehaved(PeerMisbehaved::BadCertChainExtensions),
            words: "268435758:SSL routines:OPENSSL_internal:KEY_USAGE_BIT_INCORRECT".to_owned(),
            peer: None,
        })
    }

    fn certificate(&self, shown: Shown<'_>) -> Result<(), Refused> {
        if let Some(trust) = &self.trust {
            trust.check(shown.leaf, shown.rest, shown.now)?;
        }
        let v = &self.validation;
        if shown.expected.is_none() && v.san.is_empty() && v.hashes.is_empty() && v.spkis.is_empty() {
            return Ok(());
        }
        let chain = shown.chain();
        let Some(peer) = peer_certificate(&chain) else {
            let error = Error::InvalidCertificate(CertificateError::BadEncoding);
            return Err(Refused::new(Failure::Chain, error, "it cannot be read".to_owned()));
        };
        if let Some(refused) = shown.expected.and_then(|expected| not_for(shown.leaf, &peer, expected)) {
            return Err(refused);
        }
        if !v.san_ok(&peer) {
            let details = format!("SAN matcher, certificate SANs are [{}]", all_names(shown.leaf));
            return Err(Refused::new(Failure::San, mismatch(), details));
        }
        if v.hashes.is_empty() && v.spkis.is_empty() {
            return Ok(());
        }
        // Either list may match (tls.proto, CertificateValidationContext.verify_certificate_hash).
        let hash_ok = v.hashes.iter().any(|h| normal_hash(h) == *peer.sha256);
        let spki_ok = !v.spkis.is_empty() && spki(&chain).is_some_and(|own| v.spkis.iter().any(|s| **s == *own));
        if hash_ok || spki_ok {
            return Ok(());
        }
        Err(Refused::new(Failure::Hash, mismatch(), "cert hash and spki".to_owned()))
    }

    /// For rustls: leaves what was found for [`heard`].
    fn tell(&self, shown: Shown<'_>) -> Result<(), Error> {
        let Err(mut refused) = self.find(shown) else { return Ok(()) };
        refused.peer = peer_certificate(&shown.chain()).map(Box::new);
        let error = refused.error.clone();
        let accepted = self.validation.accept_untrusted && refused.failure != Failure::Other;
        FOUND.set(Some(refused));
        if accepted { Ok(()) } else { Err(error) }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("a name, hash or public key does not match")]
struct Mismatch;

/// DIFFERS: the alert is `certificate_unknown` for hashes, too, for which BoringSSL has `bad_certificate_hash_value`: rustls cannot
/// be told to send that.
fn mismatch() -> Error {
    Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(Arc::new(Mismatch))))
}

/// What is wrong with a session that was resumed: it began with a server that had another name.
pub(super) fn resumed_for_another(session: &ClientConnection, expected: Option<&ArcStr>) -> Option<Refused> {
    let expected = expected.filter(|_| session.handshake_kind() == Some(HandshakeKind::Resumed))?;
    let chain = session.peer_certificates()?;
    not_for(chain.first()?, &peer_certificate(chain)?, expected)
}

fn not_for(leaf: &CertificateDer<'_>, peer: &PeerCertificate, expected: &str) -> Option<Refused> {
    let named = peer.dns_sans.iter().any(|san| dns_match(san, expected));
    (!named && !peer.ip_sans.iter().any(|san| **san == *expected)).then(|| {
        let details = format!("verify SAN list, expected SANs: [{expected}], certificate SANs: [{}]", all_names(leaf));
        Refused::new(Failure::San, mismatch(), details)
    })
}

/// The certificate's names in its order, for messages.
fn all_names(leaf: &CertificateDer<'_>) -> String {
    use x509_parser::extensions::GeneralName;
    let Ok((_, certificate)) = X509Certificate::from_der(leaf) else { return String::new() };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return String::new() };
    let text = |name: &GeneralName<'_>| {
        Some(match name {
            GeneralName::DNSName(text) | GeneralName::URI(text) | GeneralName::RFC822Name(text) => (*text).to_owned(),
            GeneralName::IPAddress(bytes) => match **bytes {
                [a, b, c, d] => std::net::Ipv4Addr::new(a, b, c, d).to_string(),
                _ => std::net::Ipv6Addr::from(<[u8; 16]>::try_from(*bytes).ok()?).to_string(),
            },
            _ => return None,
        })
    };
    names.value.general_names.iter().filter_map(text).collect::<Vec<_>>().join(", ")
}

fn normal_hash(hash: &str) -> String {
    hash.chars().filter(|c| *c != ':').map(|c| c.to_ascii_lowercase()).collect()
}

/// Base64 of the SHA-256 of the subject public key info.
fn spki(chain: &[CertificateDer<'_>]) -> Option<String> {
    use base64::Engine as _;
    let (_, cert) = X509Certificate::from_der(chain.first()?).ok()?;
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, cert.public_key().raw);
    Some(base64::engine::general_purpose::STANDARD.encode(digest.as_ref()))
}

/// Whether a handshake was signed by the certificate's key. Unlike rustls's own way it takes certificates of version 1.
fn signed_by(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
    is_tls13: bool,
) -> Result<HandshakeSignatureValid, Error> {
    let algorithms = &provider().signature_verification_algorithms;
    let bad = |error| Error::InvalidCertificate(error);
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(|_| bad(CertificateError::BadEncoding))?;
    let key = SubjectPublicKeyInfoDer::from(certificate.public_key().raw);
    if is_tls13 {
        return rustls::crypto::verify_tls13_signature_with_raw_key(message, &key, dss, algorithms);
    }
    let key = RawPublicKeyEntity::try_from(&key).map_err(|_| bad(CertificateError::BadEncoding))?;
    let candidates = algorithms.mapping.iter().find(|(scheme, _)| *scheme == dss.scheme).map_or(&[][..], |(_, a)| *a);
    // A scheme of TLS 1.2 names a hash, not a curve: whichever fits the key decides.
    match candidates.iter().any(|algorithm| key.verify_signature(*algorithm, message, dss.signature()).is_ok()) {
        true => Ok(HandshakeSignatureValid::assertion()),
        false => Err(bad(CertificateError::BadSignature)),
    }
}

/// Verifies clients.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    checks: Checks,
    /// Of the roots, for clients that have several certificates.
    hints: Vec<DistinguishedName>,
    required: bool,
}

impl ClientVerifier {
    pub(super) fn new(
        validation: Validation,
        roots: &[CertificateDer<'static>],
        required: bool,
    ) -> Result<Arc<Self>, TlsError> {
        let checks = Checks::new(Peers::Clients, validation, roots, true)?;
        let hints = match &checks.trust {
            Some(trust) if !checks.validation.accept_untrusted => trust.subjects(),
            _ => Vec::new(),
        };
        Ok(Arc::new(Self { checks, hints, required }))
    }

    /// Whether nothing is wrong with a client's certificates, which may have been accepted all the same.
    pub(super) fn is_good(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> bool {
        self.checks.find(Shown { leaf, rest, now: UnixTime::now(), expected: None }).is_ok()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        self.required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.checks.tell(Shown { leaf: end_entity, rest: intermediates, now, expected: None })?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signed_by(message, cert, dss, false)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signed_by(message, cert, dss, true)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        super::signature_schemes()
    }
}

/// Verifies servers: Envoy does not look at the host name unless a matcher (or `auto_san_validation`) says so.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    checks: Checks,
}

impl ServerVerifier {
    pub(super) fn new(
        validation: Validation,
        roots: &[CertificateDer<'static>],
        usage_of_rsa: bool,
    ) -> Result<Arc<Self>, TlsError> {
        Ok(Arc::new(Self { checks: Checks::new(Peers::Servers, validation, roots, usage_of_rsa)? }))
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let expected = EXPECTED.with_borrow(Clone::clone);
        self.checks.tell(Shown { leaf: end_entity, rest: intermediates, now, expected: expected.as_deref() })?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signed_by(message, cert, dss, false)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signed_by(message, cert, dss, true)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        super::signature_schemes()
    }
}

/// DNS SAN against a name; `*` stands for exactly one leftmost label.
pub(super) fn dns_match(san: &str, name: &str) -> bool {
    match san.strip_prefix("*.") {
        Some(parent) => name.split_once('.').is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(parent)),
        None => san.eq_ignore_ascii_case(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `openssl req -x509` makes them: for a name, and able to sign.
    fn self_signed() -> CertificateDer<'static> {
        let mut params = rcgen::CertificateParams::new(["ratings".to_owned()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn a_self_signed_certificate_is_its_own_root() {
        let (own, other) = (self_signed(), self_signed());
        let now = UnixTime::now();
        // rcgen's certificates end in the year 4096.
        let too_late = UnixTime::since_unix_epoch(std::time::Duration::from_secs(70_000_000_000));
        let server = |roots: &[CertificateDer<'static>], now| {
            let verifier = ServerVerifier::new(Validation::default(), roots, true).unwrap();
            verifier.checks.find(Shown { leaf: &own, rest: &[], now, expected: Some("ratings") })
        };
        let client = |roots: &[CertificateDer<'static>], now| {
            let verifier = ClientVerifier::new(Validation::default(), roots, true).unwrap();
            verifier.checks.find(Shown { leaf: &own, rest: &[], now, expected: None })
        };
        for verify in [&server as &dyn Fn(&[CertificateDer<'static>], UnixTime) -> Result<(), Refused>, &client] {
            verify(&[other.clone(), own.clone()], now).unwrap();
            for (roots, now) in [(&other, now), (&own, too_late)] {
                let refused = verify(std::slice::from_ref(roots), now).unwrap_err();
                assert_eq!(refused.failure, Failure::Chain);
            }
        }
    }

    #[test]
    fn names_that_do_not_fit_are_said() {
        let mut params = rcgen::CertificateParams::new(["a.test".to_owned(), "10.0.0.1".to_owned()]).unwrap();
        let uri = rcgen::SanType::URI("spiffe://t/ns/n/sa/s".to_owned().try_into().unwrap());
        params.subject_alt_names.insert(1, uri);
        let own = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().clone();
        let verifier = ServerVerifier::new(Validation::default(), std::slice::from_ref(&own), true).unwrap();
        let find =
            |name| verifier.checks.find(Shown { leaf: &own, rest: &[], now: UnixTime::now(), expected: Some(name) });
        find("a.test").unwrap();
        find("10.0.0.1").unwrap();
        let refused = find("b.test").unwrap_err();
        assert_eq!(refused.failure, Failure::San);
        let expected =
            "verify SAN list, expected SANs: [b.test], certificate SANs: [a.test, spiffe://t/ns/n/sa/s, 10.0.0.1]";
        assert!(refused.words.ends_with(expected), "{}", refused.words);
    }
}
