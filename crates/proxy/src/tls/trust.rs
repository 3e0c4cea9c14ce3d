//! The chain of trust from a peer's certificate to one of the roots.

use super::verify::{Failure, Refused};
use super::{TlsError, provider};
use proxy_core::tls::Validation;
use rustls::{CertificateError, DistinguishedName, Error, RootCertStore};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use webpki::{CertRevocationList, EndEntityCert, KeyUsage, OwnedCertRevocationList};
use webpki::{RevocationCheckDepth, RevocationOptionsBuilder, UnknownStatusPolicy};
use x509_parser::prelude::{FromDer, X509Certificate, X509Extension};

/// What peers are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Peers {
    Clients,
    Servers,
}

/// Whom to believe.
#[derive(Debug)]
pub(super) struct Trust {
    peers: Peers,
    store: RootCertStore,
    /// Also as they were given.
    roots: Vec<CertificateDer<'static>>,
    revoked: Vec<CertRevocationList<'static>>,
    only_leaf_revoked: bool,
    allow_expired: bool,
    /// DIFFERS: it holds for servers' chains, too, which Envoy lets be of any length.
    max_depth: Option<u32>,
    verified: Verified,
}

impl Trust {
    pub(super) fn new(
        peers: Peers,
        validation: &Validation,
        roots: &[CertificateDer<'static>],
    ) -> Result<Self, TlsError> {
        let mut store = RootCertStore::empty();
        // A root that webpki cannot read is left out: the others still work, as in OpenSSL.
        store.add_parsable_certificates(roots.iter().cloned());
        Ok(Self {
            peers,
            store,
            roots: roots.to_vec(),
            revoked: crls(validation)?,
            only_leaf_revoked: validation.only_leaf_crl,
            allow_expired: validation.allow_expired,
            max_depth: validation.max_verify_depth,
            verified: Verified::default(),
        })
    }

    /// Whom the roots are of.
    pub(super) fn subjects(&self) -> Vec<DistinguishedName> {
        self.store.subjects()
    }

    /// Whether the certificate leads to a root at this time, for what it is used for.
    pub(super) fn check(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Refused> {
        let now = self.time(leaf, now);
        let verify = || {
            self.verify(leaf, rest, now).map_err(|fault| {
                let path = Path::of(leaf, rest, &self.roots);
                let fault = if path.is_sound() || matches!(fault, Fault::Depth(_)) { fault } else { Fault::Issuer };
                let (depth, words) = self.words(&fault, &path, now);
                Refused::new(
                    Failure::Chain,
                    fault.alert(),
                    format!("X509_verify_cert: certificate verification error at depth {depth}: {words}"),
                )
            })
        };
        match self.revoked.is_empty() {
            true => self.verified.check(leaf, rest, now, verify),
            false => verify(),
        }
    }

    fn verify(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Fault> {
        if let Some(most) = self.max_depth
            && Path::of(leaf, rest, &self.roots).intermediates() > most as usize
        {
            return Err(Fault::Depth(most as usize + 1));
        }
        let authority = || X509Certificate::from_der(leaf).is_ok_and(|(_, leaf)| leaf.is_ca());
        match EndEntityCert::try_from(leaf) {
            Ok(certificate) if !self.roots.contains(leaf) && !authority() => self.verify_usual(&certificate, rest, now),
            Err(error) if error != webpki::Error::UnsupportedCertVersion => Err(error.into()),
            _ => self.verify_odd(&Path::of(leaf, rest, &self.roots), now),
        }
    }

    fn verify_usual(&self, leaf: &EndEntityCert<'_>, rest: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Fault> {
        let lists: Vec<_> = self.revoked.iter().collect();
        // OpenSSL's `X509_V_FLAG_CRL_CHECK_ALL`, with which a list that is missing is as bad as one that names the certificate.
        let revocation = RevocationOptionsBuilder::new(&lists).ok().map(|options| {
            options
                .with_depth(match self.only_leaf_revoked {
                    true => RevocationCheckDepth::EndEntity,
                    false => RevocationCheckDepth::Chain,
                })
                .with_status_policy(UnknownStatusPolicy::Deny)
                .build()
        });
        let usage = match self.peers {
            Peers::Clients => KeyUsage::client_auth(),
            Peers::Servers => KeyUsage::server_auth(),
        };
        let algorithms = provider().signature_verification_algorithms.all;
        let path = leaf.verify_for_usage(algorithms, &self.store.roots, rest, now, usage, revocation, None)?;
        // Of a root webpki looks at the key only.
        let roots = self.roots.iter().filter_map(|der| X509Certificate::from_der(der).ok()).map(|(_, root)| root);
        let anchor = path.anchor();
        let named = |root: &X509Certificate<'_>| {
            root.subject().as_raw().ends_with(&anchor.subject)
                && root.public_key().raw.ends_with(&anchor.subject_public_key_info)
        };
        match self.allow_expired || roots.filter(named).any(|root| is_valid_at(&root, now)) {
            true => Ok(()),
            false => Err(Fault::Time),
        }
    }

    /// Certificates that webpki does not take, but OpenSSL and BoringSSL do: those of version 1, which `openssl x509 -req` makes
    /// and Istio's own documentation has, and those that may sign others. Only plain chains are for them.
    ///
    /// DIFFERS: with revocation lists they are refused, since nothing here looks them up.
    fn verify_odd(&self, path: &Path<'_>, now: UnixTime) -> Result<(), Fault> {
        let [leaf, issuers @ ..] = &*path.certificates else { return Err(Fault::Unreadable) };
        if !path.complete {
            return Err(Fault::Issuer);
        }
        if !self.revoked.is_empty() {
            return Err(Fault::NoList);
        }
        for certificate in std::iter::once(leaf).chain(issuers.split_last().map_or(&[][..], |(_, between)| between)) {
            let usage = certificate.extended_key_usage().map_err(|_| Fault::Unreadable)?;
            let for_this = usage.is_none_or(|usage| match self.peers {
                _ if usage.value.any => true,
                Peers::Clients => usage.value.client_auth,
                Peers::Servers => usage.value.server_auth,
            });
            if !for_this {
                return Err(Fault::Purpose);
            }
        }
        for (at, certificate) in path.certificates.iter().enumerate() {
            if !self.allow_expired && !is_valid_at(certificate, now) {
                return Err(Fault::Time);
            }
            if certificate.extensions().iter().any(|e| limits(e)) {
                return Err(Fault::Extension);
            }
            if let Some(issuer) = path.certificates.get(at + 1)
                && (is_weak(certificate) || certificate.verify_signature(Some(issuer.public_key())).is_err())
            {
                return Err(Fault::Signature);
            }
        }
        for (below, issuer) in issuers.iter().enumerate() {
            // A root of version 1 has nothing to say it may sign.
            let old_root = below + 1 == issuers.len() && issuer.version() == x509_parser::x509::X509Version::V1;
            if !old_root && !signs_certificates(issuer, below) {
                return Err(Fault::Issuer);
            }
        }
        Ok(())
    }

    /// The time at which a chain is looked at: with `allow_expired_certificate` one at which the peer's was good.
    fn time(&self, leaf: &CertificateDer<'_>, now: UnixTime) -> UnixTime {
        let Some((_, leaf)) = X509Certificate::from_der(leaf).ok().filter(|_| self.allow_expired) else { return now };
        let at = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
        let (first, last) = (at(leaf.validity().not_before), at(leaf.validity().not_after));
        UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs().min(last).max(first)))
    }

    /// At which certificate of the chain OpenSSL finds the fault, and how it names it (`X509_verify_cert_error_string`).
    fn words(&self, fault: &Fault, path: &Path<'_>, now: UnixTime) -> (usize, String) {
        let revocation = |what: &str| format!("certificate revocation check against provided CRLs failed: {what}");
        let last = path.certificates.len().saturating_sub(1);
        // The order is OpenSSL's: the chain, what its certificates may be used for, lists, and times from the root down.
        if let Fault::Depth(at) = fault {
            return (*at, "unable to get local issuer certificate".to_owned());
        }
        if !path.complete {
            let own = path.certificates.last().is_some_and(|last| last.subject() == last.issuer());
            let words = match (own, last) {
                (true, 0) => "self signed certificate",
                (true, _) => "self signed certificate in certificate chain",
                (false, _) => "unable to get local issuer certificate",
            };
            return (last, words.to_owned());
        }
        if let Some(at) = path.no_authority() {
            return (at, "invalid CA certificate".to_owned());
        }
        let words = match fault {
            Fault::Time => {
                let found = path.certificates.iter().enumerate().rev().find(|(_, c)| !is_valid_at(c, now));
                let early = found.is_some_and(|(_, c)| c.validity().not_before.timestamp() > seconds(now));
                let words = if early { "certificate is not yet valid" } else { "certificate has expired" };
                return (found.map_or(0, |(at, _)| at), words.to_owned());
            }
            Fault::Revoked => revocation("certificate revoked"),
            Fault::NoList => revocation("unable to get certificate CRL"),
            Fault::OldList => revocation("CRL has expired"),
            Fault::Purpose => "unsupported certificate purpose".to_owned(),
            Fault::Signature => "certificate signature failure".to_owned(),
            Fault::Extension => "unhandled critical extension".to_owned(),
            Fault::Issuer | Fault::Depth(_) => "unable to get local issuer certificate".to_owned(),
            Fault::Unreadable => "unspecified certificate verification error".to_owned(),
            Fault::Other(error) => error.to_string(),
        };
        (0, words)
    }
}

/// What is wrong with a chain.
#[derive(Debug)]
enum Fault {
    Issuer,
    /// Longer than allowed; where it should have ended.
    Depth(usize),
    Time,
    Purpose,
    Signature,
    Extension,
    Revoked,
    NoList,
    OldList,
    Unreadable,
    Other(webpki::Error),
}

impl From<webpki::Error> for Fault {
    fn from(error: webpki::Error) -> Self {
        use webpki::Error as E;
        match error {
            E::UnknownIssuer | E::EndEntityUsedAsCa => Fault::Issuer,
            E::InvalidCertValidity | E::CertExpired { .. } | E::CertNotValidYet { .. } => Fault::Time,
            E::RequiredEkuNotFoundContext(_) => Fault::Purpose,
            E::InvalidSignatureForPublicKey => Fault::Signature,
            E::UnsupportedCriticalExtension => Fault::Extension,
            E::CertRevoked => Fault::Revoked,
            E::UnknownRevocationStatus => Fault::NoList,
            E::CrlExpired { .. } => Fault::OldList,
            E::BadDer | E::BadDerTime | E::TrailingData(_) => Fault::Unreadable,
            other => Fault::Other(other),
        }
    }
}

impl Fault {
    /// What rustls makes the alert of.
    fn alert(&self) -> Error {
        Error::InvalidCertificate(match self {
            Fault::Time => CertificateError::Expired,
            Fault::Revoked => CertificateError::Revoked,
            Fault::Signature => CertificateError::BadSignature,
            Fault::Purpose => CertificateError::InvalidPurpose,
            Fault::Unreadable => CertificateError::BadEncoding,
            Fault::Issuer | Fault::Depth(_) | Fault::Extension | Fault::NoList | Fault::OldList | Fault::Other(_) => {
                CertificateError::UnknownIssuer
            }
        })
    }
}

fn crls(validation: &Validation) -> Result<Vec<CertRevocationList<'static>>, TlsError> {
    use rustls_pki_types::pem::PemObject;
    let Some(source) = &validation.crl else { return Ok(Vec::new()) };
    let pem = super::secrets::read(source)?;
    let bad = || TlsError::Pem { what: "crl" };
    CertificateRevocationListDer::pem_slice_iter(&pem)
        .map(|der| Ok(OwnedCertRevocationList::from_der(&der.map_err(|_| bad())?).map_err(|_| bad())?.into()))
        .collect()
}

/// Whether a context's lists can be read.
pub(super) fn check_crls(validation: &Validation) -> Result<(), TlsError> {
    crls(validation).map(drop)
}

/// A chain as OpenSSL puts it together: from the roots as soon as one fits. Nothing in it is verified.
struct Path<'a> {
    /// From the peer's to, if it is `complete`, a root.
    certificates: Vec<X509Certificate<'a>>,
    complete: bool,
}

impl<'a> Path<'a> {
    fn of(leaf: &'a CertificateDer<'_>, rest: &'a [CertificateDer<'_>], roots: &'a [CertificateDer<'_>]) -> Self {
        let parsed = |der: &'a CertificateDer<'_>| Some(X509Certificate::from_der(der).ok()?.1);
        let mut certificates: Vec<_> = parsed(leaf).into_iter().collect();
        if roots.contains(leaf) {
            return Self { certificates, complete: true };
        }
        let mut roots: Vec<_> = roots.iter().filter_map(parsed).collect();
        let mut rest: Vec<_> = rest.iter().filter_map(parsed).collect();
        while let Some(current) = certificates.last() {
            if let Some(at) = issuer(current, &roots) {
                certificates.push(roots.swap_remove(at));
                return Self { certificates, complete: true };
            }
            let Some(at) = issuer(current, &rest) else { break };
            certificates.push(rest.swap_remove(at));
        }
        Self { certificates, complete: false }
    }

    /// It ends at a root, and all between may sign certificates.
    fn is_sound(&self) -> bool {
        self.complete && self.no_authority().is_none()
    }

    /// The first between the peer's and the root that may not.
    fn no_authority(&self) -> Option<usize> {
        let between = 1..=self.intermediates();
        between.into_iter().find(|at| !signs_certificates(&self.certificates[*at], at - 1))
    }

    /// Certificates between the peer's and the root.
    fn intermediates(&self) -> usize {
        self.certificates.len().saturating_sub(1 + usize::from(self.complete))
    }
}

/// Which of these issued the certificate. Of several with the name, as after the rotation of a root, the one whose key it was.
fn issuer(certificate: &X509Certificate<'_>, candidates: &[X509Certificate<'_>]) -> Option<usize> {
    let named = || (0..candidates.len()).filter(|at| candidates[*at].subject() == certificate.issuer());
    let signed = |at: &usize| certificate.verify_signature(Some(candidates[*at].public_key())).is_ok();
    named().find(signed).or_else(|| named().next())
}

/// Whether the certificate is an authority's, with as many below it.
fn signs_certificates(certificate: &X509Certificate<'_>, below: usize) -> bool {
    let basic = certificate.basic_constraints().ok().flatten();
    let usage = certificate.key_usage().ok().flatten();
    basic.is_some_and(|b| b.value.ca && b.value.path_len_constraint.is_none_or(|most| below <= most as usize))
        && usage.is_none_or(|usage| usage.value.key_cert_sign())
}

/// Whether the signature is one that webpki does not take, either.
fn is_weak(certificate: &X509Certificate<'_>) -> bool {
    use x509_parser::oid_registry::{OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA};
    [OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA].contains(&certificate.signature_algorithm.algorithm)
}

/// Whether an extension may forbid what `verify_odd` does not look at.
fn limits(extension: &X509Extension<'_>) -> bool {
    use x509_parser::oid_registry as known;
    let looked_at = [
        known::OID_X509_EXT_BASIC_CONSTRAINTS,
        known::OID_X509_EXT_KEY_USAGE,
        known::OID_X509_EXT_EXTENDED_KEY_USAGE,
        known::OID_X509_EXT_SUBJECT_ALT_NAME,
    ];
    extension.oid == known::OID_X509_EXT_NAME_CONSTRAINTS || (extension.critical && !looked_at.contains(&extension.oid))
}

fn is_valid_at(certificate: &X509Certificate<'_>, time: UnixTime) -> bool {
    let validity = certificate.validity();
    (validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&seconds(time))
}

fn seconds(time: UnixTime) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
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

/// Chains that are remembered of one set of roots.
const REMEMBERED: usize = 32;

impl Verified {
    /// Asks `verify` unless the answer is known. Only sound without revocation lists, and for one set of roots.
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
        verify: impl FnOnce() -> Result<(), Refused>,
    ) -> Result<(), Refused> {
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
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    u64::try_from(certificate.validity().not_after.timestamp()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> rcgen::KeyPair {
        rcgen::KeyPair::generate().unwrap()
    }

    fn named(name: &str, ca: bool) -> rcgen::CertificateParams {
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        if ca {
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        }
        params
    }

    fn root(name: &str) -> rcgen::CertifiedIssuer<'static, rcgen::KeyPair> {
        rcgen::CertifiedIssuer::self_signed(named(name, true), key()).unwrap()
    }

    fn trust(roots: &[CertificateDer<'static>], validation: &Validation) -> Trust {
        Trust::new(Peers::Servers, validation, roots).unwrap()
    }

    /// The end of what is said about it, with the place.
    fn refusal(trust: &Trust, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> String {
        let words = trust.check(leaf, rest, UnixTime::now()).unwrap_err().words;
        words.rsplit_once(" at ").unwrap().1.to_owned()
    }

    #[test]
    fn what_was_verified_holds_for_those_bytes_until_they_expire() {
        let (ours, other) = (root("ours"), root("other"));
        let leaf = |issuer: &rcgen::CertifiedIssuer<'_, rcgen::KeyPair>| {
            named("leaf", false).signed_by(&key(), issuer).unwrap().der().clone()
        };
        let (good, bad) = (leaf(&ours), leaf(&other));
        let now = UnixTime::now();
        let late = UnixTime::since_unix_epoch(Duration::from_secs(70_000_000_000));
        let early = UnixTime::since_unix_epoch(Duration::from_secs(1));
        let trust = trust(&[ours.der().clone()], &Validation::default());
        let verify = |leaf: &CertificateDer<'_>, now| trust.check(leaf, &[], now).is_ok();
        let remembered = || trust.verified.0.lock().unwrap().len();
        assert!(verify(&good, now) && verify(&good, now));
        assert_eq!(remembered(), 1);
        assert!(!verify(&good, late) && !verify(&good, early) && !verify(&bad, now) && !verify(&bad, now));
        assert_eq!(remembered(), 1);
    }

    #[test]
    fn chains_are_as_deep_as_allowed_and_may_be_old() {
        let root = root("root");
        let middle = rcgen::CertifiedIssuer::signed_by(named("middle", true), key(), &root).unwrap();
        let mut params = named("leaf", false);
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        let leaf = params.signed_by(&key(), &middle).unwrap();
        let verify = |allow_expired, max_verify_depth| {
            let validation = Validation { allow_expired, max_verify_depth, ..Validation::default() };
            let trust = trust(&[root.der().clone()], &validation);
            trust.check(leaf.der(), &[middle.der().clone()], UnixTime::now()).is_ok()
        };
        assert!(!verify(false, None) && verify(true, None) && verify(true, Some(1)) && !verify(true, Some(0)));
    }

    #[test]
    fn what_is_wrong_is_said_in_openssls_words() {
        let (root_of, usual) = (root("root"), Validation::default());
        let trust_of = |validation: &Validation| trust(&[root_of.der().clone()], validation);
        let middle = rcgen::CertifiedIssuer::signed_by(named("middle", true), key(), &root_of).unwrap();
        let signed = |params: rcgen::CertificateParams| params.signed_by(&key(), &root_of).unwrap().der().clone();
        let below = named("below", false).signed_by(&key(), &middle).unwrap().der().clone();
        assert_eq!(refusal(&trust_of(&usual), &below, &[]), "depth 0: unable to get local issuer certificate");
        let own = root("own").der().clone();
        assert_eq!(refusal(&trust_of(&usual), &own, &[]), "depth 0: self signed certificate");
        let mut old = named("old", false);
        old.not_after = rcgen::date_time_ymd(2001, 1, 1);
        assert_eq!(refusal(&trust_of(&usual), &signed(old), &[]), "depth 0: certificate has expired");
        let mut client = named("client", false);
        client.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        assert_eq!(refusal(&trust_of(&usual), &signed(client), &[]), "depth 0: unsupported certificate purpose");
        let no_authority = key();
        let fake = named("fake", false).signed_by(&no_authority, &root_of).unwrap().der().clone();
        let issuer = rcgen::Issuer::new(named("fake", true), no_authority);
        let leaf = named("leaf", false).signed_by(&key(), &issuer).unwrap().der().clone();
        assert_eq!(refusal(&trust_of(&usual), &leaf, &[fake]), "depth 1: invalid CA certificate");
        let short = Validation { max_verify_depth: Some(0), ..Validation::default() };
        let words = refusal(&trust_of(&short), &below, &[middle.der().clone()]);
        assert_eq!(words, "depth 1: unable to get local issuer certificate");
    }

    #[test]
    fn authorities_may_serve_and_be_checked_like_others() {
        let (first, second) = (root("root"), root("root"));
        // The name alone does not say which root it was.
        let trust = trust(&[first.der().clone(), second.der().clone()], &Validation::default());
        let mut ca = named("serves", true);
        ca.not_after = rcgen::date_time_ymd(4000, 1, 1);
        let good = ca.clone().signed_by(&key(), &second).unwrap().der().clone();
        trust.check(&good, &[], UnixTime::now()).unwrap();
        ca.not_after = rcgen::date_time_ymd(2001, 1, 1);
        let old = ca.signed_by(&key(), &second).unwrap().der().clone();
        assert_eq!(refusal(&trust, &old, &[]), "depth 0: certificate has expired");
        let forged = named("serves", true).signed_by(&key(), &root("root")).unwrap().der().clone();
        assert_eq!(refusal(&trust, &forged, &[]), "depth 0: certificate signature failure");
    }

    #[test]
    fn roots_expire_too() {
        let mut params = named("root", true);
        params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        let old = rcgen::CertifiedIssuer::self_signed(params, key()).unwrap();
        let leaf = named("leaf", false).signed_by(&key(), &old).unwrap().der().clone();
        let of = |validation: &Validation| trust(&[old.der().clone()], validation);
        assert_eq!(refusal(&of(&Validation::default()), &leaf, &[]), "depth 1: certificate has expired");
        let lenient = Validation { allow_expired: true, ..Validation::default() };
        of(&lenient).check(&leaf, &[], UnixTime::now()).unwrap();
    }
}
