//! Verification of peers: chain of trust, then Envoy's matchers on names, hashes and public keys.

use super::{TlsError, peer_certificate, provider};
use proxy_core::tls::Validation;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

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

impl Failure {
    /// Classifies what tokio-rustls reports.
    pub(crate) fn of(error: &std::io::Error) -> Self {
        match error.get_ref().and_then(|e| e.downcast_ref::<Error>()) {
            Some(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)) => Failure::San,
            Some(Error::InvalidCertificate(CertificateError::Other(other))) if other.0.is::<HashMismatch>() => {
                Failure::Hash
            }
            Some(Error::InvalidCertificate(_)) => Failure::Chain,
            Some(Error::NoCertificatesPresented) => Failure::NoCertificate,
            _ => Failure::Other,
        }
    }
}

/// What went wrong in a handshake: BoringSSL's code and name where there is one, because people search for them.
pub(crate) fn in_boring_words(error: &std::io::Error) -> String {
    use rustls::PeerIncompatible::{NoCipherSuitesInCommon, NoKxGroupsInCommon};
    let (reason, name) = match error.get_ref().and_then(|e| e.downcast_ref::<Error>()) {
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

#[derive(Debug, thiserror::Error)]
#[error("certificate hash or public key does not match")]
struct HashMismatch;

/// What both directions share.
#[derive(Debug)]
struct Checks {
    validation: Validation,
}

impl Checks {
    fn names(&self, chain: &[CertificateDer<'_>]) -> Result<(), Error> {
        let v = &self.validation;
        if v.san.is_empty() && v.hashes.is_empty() && v.spkis.is_empty() {
            return Ok(());
        }
        // Then names and hashes do not matter, either (Envoy `DefaultCertValidator::verifyCertChain`).
        if v.accept_untrusted {
            return Ok(());
        }
        let bad = || Error::InvalidCertificate(CertificateError::BadEncoding);
        let peer = peer_certificate(chain).ok_or_else(bad)?;
        if !v.san_ok(&peer) {
            return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        if v.hashes.is_empty() && v.spkis.is_empty() {
            return Ok(());
        }
        // Either list may match (tls.proto, CertificateValidationContext.verify_certificate_hash).
        let hash_ok = v.hashes.iter().any(|h| normal_hash(h) == *peer.sha256);
        let spki_ok = !v.spkis.is_empty() && spki(chain).is_some_and(|own| v.spkis.iter().any(|s| **s == *own));
        if hash_ok || spki_ok {
            return Ok(());
        }
        Err(Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(Arc::new(HashMismatch)))))
    }
}

fn normal_hash(hash: &str) -> String {
    hash.chars().filter(|c| *c != ':').map(|c| c.to_ascii_lowercase()).collect()
}

/// Base64 of the SHA-256 of the subject public key info.
fn spki(chain: &[CertificateDer<'_>]) -> Option<String> {
    use base64::Engine as _;
    use x509_parser::prelude::{FromDer, X509Certificate};
    let (_, cert) = X509Certificate::from_der(chain.first()?).ok()?;
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, cert.public_key().raw);
    Some(base64::engine::general_purpose::STANDARD.encode(digest.as_ref()))
}

fn chain<'a>(leaf: &CertificateDer<'a>, rest: &[CertificateDer<'a>]) -> Vec<CertificateDer<'a>> {
    std::iter::once(leaf).chain(rest).cloned().collect()
}

pub(super) fn crls(validation: &Validation) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    use rustls_pki_types::pem::PemObject;
    let Some(source) = &validation.crl else { return Ok(Vec::new()) };
    let pem = super::secrets::read(source)?;
    CertificateRevocationListDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| TlsError::Pem { what: "crl" })
}

fn store(roots: &[CertificateDer<'static>]) -> RootCertStore {
    let mut store = RootCertStore::empty();
    // A root that webpki cannot read is left out: the others still work, as in OpenSSL.
    store.add_parsable_certificates(roots.iter().cloned());
    store
}

/// A peer whose certificate is one of the roots itself, as with self-signed ones, needs no chain. webpki refuses those that may
/// sign others, which is what `openssl req -x509` makes; OpenSSL and BoringSSL take them.
fn is_root(roots: &[CertificateDer<'static>], end_entity: &CertificateDer<'_>, now: UnixTime) -> bool {
    use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};
    roots.contains(end_entity)
        && X509Certificate::from_der(end_entity).is_ok_and(|(_, cert)| {
            let now = i64::try_from(now.as_secs()).ok().and_then(|now| ASN1Time::from_timestamp(now).ok());
            now.is_some_and(|now| cert.validity().is_valid_at(now))
        })
}

/// Chains that led to a root. The same bytes lead there again until one of them expires: checking their signatures is a
/// sixth of a handshake, and the peers of a sidecar are few and come back.
#[derive(Debug, Default)]
struct Verified(Mutex<VecDeque<Known>>);

#[derive(Debug)]
struct Known {
    chain: Vec<CertificateDer<'static>>,
    /// Seconds from which and before which this is so.
    from: u64,
    until: u64,
}

/// Chains that a verifier remembers.
const REMEMBERED: usize = 32;

impl Verified {
    /// Asks `verify` unless the answer is known. Only sound without revocation lists, and for one set of roots.
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
        verify: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let presented = || std::iter::once(leaf).chain(rest);
        let holds = |known: &Known| (known.from..known.until).contains(&now.as_secs());
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lock().iter().any(|known| holds(known) && known.chain.iter().eq(presented())) {
            return Ok(());
        }
        verify()?;
        if let Some(until) = presented().map(expiry).min().flatten() {
            let chain = presented().map(|c| c.clone().into_owned()).collect();
            let mut known = lock();
            known.truncate(REMEMBERED - 1);
            known.push_front(Known { chain, from: now.as_secs(), until });
        }
        Ok(())
    }
}

/// The last second of a certificate's life; `None` when that cannot be told, which is less than any.
fn expiry(certificate: &CertificateDer<'_>) -> Option<u64> {
    u64::try_from(parsed(certificate)?.validity().not_after.timestamp()).ok()
}

impl Checks {
    /// Whether the certificates between the peer's and a root are too many (OpenSSL's `X509_VERIFY_PARAM_set_depth`).
    fn too_deep(&self, roots: &[CertificateDer<'_>], leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> bool {
        let Some(most) = self.validation.max_verify_depth else { return false };
        let roots: Vec<_> = roots.iter().filter_map(|der| parsed(der)).collect();
        let mut rest: Vec<_> = rest.iter().filter_map(|der| parsed(der)).collect();
        let Some(mut current) = parsed(leaf) else { return false };
        let mut depth = 0;
        while !roots.iter().any(|root| root.subject() == current.issuer()) {
            let Some(next) = rest.iter().position(|c| c.subject() == current.issuer()) else { return false };
            current = rest.swap_remove(next);
            depth += 1;
        }
        depth > most
    }

    /// The time at which a chain is looked at: with `allow_expired_certificate` one at which the peer's was good.
    fn time(&self, leaf: &CertificateDer<'_>, now: UnixTime) -> UnixTime {
        let Some(leaf) = parsed(leaf).filter(|_| self.validation.allow_expired) else { return now };
        let at = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
        let (first, last) = (at(leaf.validity().not_before), at(leaf.validity().not_after));
        UnixTime::since_unix_epoch(std::time::Duration::from_secs(now.as_secs().min(last).max(first)))
    }
}

fn parsed<'a>(der: &'a CertificateDer<'_>) -> Option<x509_parser::certificate::X509Certificate<'a>> {
    use x509_parser::prelude::FromDer;
    Some(x509_parser::certificate::X509Certificate::from_der(der).ok()?.1)
}

const TOO_DEEP: Error = Error::InvalidCertificate(CertificateError::UnknownIssuer);

/// Verifies clients.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    /// `None`: no roots, any certificate is taken (but its possession proven).
    inner: Option<Arc<dyn ClientCertVerifier>>,
    roots: Vec<CertificateDer<'static>>,
    verified: Verified,
    checks: Checks,
    required: bool,
}

impl ClientVerifier {
    pub(super) fn new(
        validation: Validation,
        roots: &[CertificateDer<'static>],
        required: bool,
    ) -> Result<Arc<Self>, TlsError> {
        let inner = if roots.is_empty() || validation.accept_untrusted {
            None
        } else {
            let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(store(roots)), provider().clone())
                .with_crls(crls(&validation)?)
                .allow_unknown_revocation_status();
            let verifier = builder.build().map_err(|e| TlsError::Verifier(e.to_string()))?;
            Some(verifier)
        };
        let (verified, checks) = (Verified::default(), Checks { validation });
        Ok(Arc::new(Self { inner, roots: roots.to_vec(), verified, checks, required }))
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
        self.inner.as_ref().map_or(&[], |i| i.root_hint_subjects())
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let now = self.checks.time(end_entity, now);
        if let Some(inner) = &self.inner
            && !is_root(&self.roots, end_entity, now)
        {
            let verify = || {
                inner.verify_client_cert(end_entity, intermediates, now)?;
                match self.checks.too_deep(&self.roots, end_entity, intermediates) {
                    true => Err(TOO_DEEP),
                    false => Ok(()),
                }
            };
            match self.checks.validation.crl {
                Some(_) => verify()?,
                None => self.verified.check(end_entity, intermediates, now, verify)?,
            }
        }
        self.checks.names(&chain(end_entity, intermediates))?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        super::signature_schemes()
    }
}

/// Verifies servers: Envoy does not look at the host name unless a matcher (or `auto_san_validation`) says so.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    /// Also as they were given.
    roots: Option<(RootCertStore, Vec<CertificateDer<'static>>)>,
    verified: Verified,
    checks: Checks,
    /// `auto_san_validation`: the certificate must be for the SNI.
    match_server_name: bool,
}

impl ServerVerifier {
    pub(super) fn new(validation: Validation, roots: &[CertificateDer<'static>], match_server_name: bool) -> Arc<Self> {
        let roots = (!roots.is_empty() && !validation.accept_untrusted).then(|| (store(roots), roots.to_vec()));
        Arc::new(Self { roots, verified: Verified::default(), checks: Checks { validation }, match_server_name })
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let now = self.checks.time(end_entity, now);
        if let Some((roots, given)) = &self.roots
            && !is_root(given, end_entity, now)
        {
            self.verified.check(end_entity, intermediates, now, || {
                let cert = rustls::server::ParsedCertificate::try_from(end_entity)?;
                verify_server_cert_signed_by_trust_anchor(
                    &cert,
                    roots,
                    intermediates,
                    now,
                    provider().signature_verification_algorithms.all,
                )?;
                match self.checks.too_deep(given, end_entity, intermediates) {
                    true => Err(TOO_DEEP),
                    false => Ok(()),
                }
            })?;
        }
        let chain = chain(end_entity, intermediates);
        // Without a name to send there is none to look for.
        if self.match_server_name && matches!(server_name, ServerName::DnsName(_)) {
            let wanted = server_name.to_str();
            let peer = peer_certificate(&chain);
            let ok = peer.is_some_and(|p| p.dns_sans.iter().any(|san| dns_match(san, &wanted)));
            if !ok {
                return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
            }
        }
        self.checks.names(&chain)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
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
    use std::time::Duration;

    /// As `openssl req -x509` makes them: for a name, and able to sign.
    fn self_signed() -> CertificateDer<'static> {
        let mut params = rcgen::CertificateParams::new(["ratings".to_owned()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn what_was_verified_holds_for_those_bytes_until_they_expire() {
        let authority = || {
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            let key = rcgen::KeyPair::generate().unwrap();
            let der = params.self_signed(&key).unwrap().der().clone();
            (der, rcgen::Issuer::new(params, key))
        };
        let ((root, ours), (_, other)) = (authority(), authority());
        let leaf = |issuer: &rcgen::Issuer<'_, rcgen::KeyPair>| {
            let params = rcgen::CertificateParams::new(["ratings".to_owned()]).unwrap();
            params.signed_by(&rcgen::KeyPair::generate().unwrap(), issuer).unwrap().der().clone()
        };
        let (good, bad) = (leaf(&ours), leaf(&other));
        let now = UnixTime::now();
        let late = UnixTime::since_unix_epoch(Duration::from_secs(70_000_000_000));
        let early = UnixTime::since_unix_epoch(Duration::from_secs(1));
        let client = ClientVerifier::new(Validation::default(), std::slice::from_ref(&root), true).unwrap();
        let server = ServerVerifier::new(Validation::default(), std::slice::from_ref(&root), false);
        let name = ServerName::try_from("ratings").unwrap();
        let verify = |leaf: &CertificateDer<'_>, now| {
            let client = client.verify_client_cert(leaf, &[], now).is_ok();
            assert_eq!(server.verify_server_cert(leaf, &[], &name, &[], now).is_ok(), client);
            client
        };
        assert!(verify(&good, now) && verify(&good, now));
        assert_eq!(client.verified.0.lock().unwrap().len(), 1);
        assert!(!verify(&good, late) && !verify(&good, early) && !verify(&bad, now) && !verify(&bad, now));
        assert_eq!(client.verified.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_self_signed_certificate_is_its_own_root() {
        let (own, other) = (self_signed(), self_signed());
        let name = ServerName::try_from("ratings").unwrap();
        let now = UnixTime::now();
        // rcgen's certificates end in the year 4096.
        let too_late = UnixTime::since_unix_epoch(Duration::from_secs(70_000_000_000));
        let server = |roots: &[CertificateDer<'static>], now| {
            let verifier = ServerVerifier::new(Validation::default(), roots, true);
            verifier.verify_server_cert(&own, &[], &name, &[], now).map(drop)
        };
        let client = |roots: &[CertificateDer<'static>], now| {
            let verifier = ClientVerifier::new(Validation::default(), roots, true).unwrap();
            verifier.verify_client_cert(&own, &[], now).map(drop)
        };
        for verify in [&server as &dyn Fn(&[CertificateDer<'static>], UnixTime) -> Result<(), Error>, &client] {
            verify(&[other.clone(), own.clone()], now).unwrap();
            for (roots, now) in [(&other, now), (&own, too_late)] {
                let refused = verify(std::slice::from_ref(roots), now).unwrap_err();
                assert_eq!(Failure::of(&std::io::Error::other(refused)), Failure::Chain);
            }
        }
    }
    #[test]
    fn chains_are_as_deep_as_allowed_and_may_be_old() {
        let key = || rcgen::KeyPair::generate().unwrap();
        let named = |name: &str, ca: bool| {
            let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
            params.distinguished_name = rcgen::DistinguishedName::new();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            if ca {
                params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            }
            params
        };
        let root = rcgen::CertifiedIssuer::self_signed(named("root", true), key()).unwrap();
        let middle = rcgen::CertifiedIssuer::signed_by(named("middle", true), key(), &root).unwrap();
        let mut params = named("leaf", false);
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        let leaf = params.signed_by(&key(), &middle).unwrap();
        let name = ServerName::try_from("leaf").unwrap();
        let verify = |allow_expired, max_verify_depth| {
            let validation = Validation { allow_expired, max_verify_depth, ..Validation::default() };
            let verifier = ServerVerifier::new(validation, &[root.der().clone()], false);
            verifier.verify_server_cert(leaf.der(), &[middle.der().clone()], &name, &[], UnixTime::now()).is_ok()
        };
        assert!(!verify(false, None) && verify(true, None) && verify(true, Some(1)) && !verify(true, Some(0)));
    }
}
