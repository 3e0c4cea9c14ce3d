//! Answers of OCSP responders that are shown with a server's certificate (RFC 6960, RFC 8446 4.4.2.1).
//!
//! DIFFERS: whether a client asked is not known before the handshake, so that no connection is refused for want of an answer that
//! is still good: it goes on without one. `ssl.ocsp_staple_*` stay at 0.

use super::TlsError;
use super::der::{Der, ENUMERATED, INTEGER, OCTETS, OID, TIME, under};
use proxy_core::tls::Staples;
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use x509_parser::prelude::{FromDer, X509Certificate};

/// `id-pkix-ocsp-basic`.
const BASIC: &[u8] = b"\x2b\x06\x01\x05\x05\x07\x30\x01\x01";

/// `id-pe-tlsfeature` with the one feature `status_request`, as Envoy looks for it (RFC 7633).
const MUST_STAPLE: (&str, &[u8]) = ("1.3.6.1.5.5.7.1.24", b"\x30\x03\x02\x01\x05");

/// What an answer says.
struct Answer<'a> {
    serial: &'a [u8],
    /// Without it an answer is not good at any time.
    next_update: Option<SystemTime>,
}

impl<'a> Answer<'a> {
    fn read(der: &'a [u8]) -> Result<Self, &'static str> {
        let malformed = "is malformed";
        let mut response = Der(der).sequence().ok_or(malformed)?;
        if response.take(ENUMERATED).ok_or(malformed)? != [0] {
            return Err("was unsuccessful");
        }
        let bytes = response.take(under(0)).ok_or("has no body")?;
        let mut bytes = Der(bytes).sequence().ok_or(malformed)?;
        if bytes.take(OID).ok_or(malformed)? != BASIC {
            return Err("is of an unknown type");
        }
        let basic = bytes.take(OCTETS).ok_or(malformed)?;
        Self::of_basic(basic).ok_or(malformed)?
    }

    fn of_basic(der: &'a [u8]) -> Option<Result<Self, &'static str>> {
        let mut data = Der(der).sequence()?.sequence()?;
        data.take(under(0)); // version
        data.skip()?; // responder
        data.take(TIME)?;
        let mut answers = data.sequence()?;
        let mut answer = answers.sequence()?;
        if !answers.0.is_empty() {
            return Some(Err("is for more than one certificate"));
        }
        let mut certificate = answer.sequence()?;
        certificate.sequence()?; // hash
        certificate.take(OCTETS)?; // issuer's name
        certificate.take(OCTETS)?; // issuer's key
        let serial = certificate.take(INTEGER)?;
        answer.skip()?; // status
        answer.take(TIME)?;
        let next_update = answer.take(under(0)).and_then(|next| time(Der(next).take(TIME)?));
        Some(Ok(Self { serial, next_update }))
    }
}

/// `YYYYMMDDHHMMSSZ`.
fn time(text: &[u8]) -> Option<SystemTime> {
    use x509_parser::asn1_rs::GeneralizedTime;
    let time = GeneralizedTime::from_bytes(text).ok()?.utc_datetime().ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.unix_timestamp()).ok()?))
}

/// The answer that goes with a chain; none is no fault.
pub(super) fn staple(bytes: Vec<u8>, chain: &[CertificateDer<'_>]) -> Result<Option<Vec<u8>>, TlsError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let answer = Answer::read(&bytes).map_err(TlsError::Staple)?;
    let of = chain.first().and_then(|leaf| X509Certificate::from_der(leaf).ok());
    match of.is_some_and(|(_, leaf)| leaf.tbs_certificate.raw_serial() == answer.serial) {
        true => Ok(Some(bytes)),
        false => Err(TlsError::Staple("does not match its TLS certificate")),
    }
}

/// Whether all certificates of a server have the answers that they need.
pub(super) fn check(staples: Staples, keys: &[Arc<CertifiedKey>]) -> Result<(), TlsError> {
    for key in keys.iter().filter(|key| key.ocsp.is_none()) {
        if staples == Staples::Required {
            return Err(TlsError::Staple("is missing, which is required"));
        }
        let leaf = key.cert.first().and_then(|leaf| X509Certificate::from_der(leaf).ok());
        let must = leaf.is_some_and(|(_, leaf)| {
            let (oid, value) = MUST_STAPLE;
            leaf.extensions().iter().any(|extension| extension.oid.to_id_string() == oid && extension.value == value)
        });
        if must {
            return Err(TlsError::Staple("is required for a must-staple certificate"));
        }
    }
    Ok(())
}

/// The key with its answer only as long as that is good.
pub(super) fn as_of_now(key: &Arc<CertifiedKey>) -> Arc<CertifiedKey> {
    let good = |staple: &Vec<u8>| {
        Answer::read(staple).is_ok_and(|answer| answer.next_update.is_some_and(|until| until >= SystemTime::now()))
    };
    match key.ocsp.as_ref().is_none_or(good) {
        true => key.clone(),
        false => Arc::new(CertifiedKey { cert: key.cert.clone(), key: key.key.clone(), ocsp: None }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let held = parts.concat();
        [&[tag, 0x82, (held.len() >> 8) as u8, held.len() as u8][..], &held].concat()
    }

    fn response(status: u8, serial: &[u8], until: &str, answers: usize) -> Vec<u8> {
        use super::super::der::SEQUENCE;
        let until = tlv(under(0), &[&tlv(TIME, &[until.as_bytes()])]);
        let id = tlv(
            SEQUENCE,
            &[&tlv(SEQUENCE, &[]), &tlv(OCTETS, &[b"n"]), &tlv(OCTETS, &[b"k"]), &tlv(INTEGER, &[serial])],
        );
        let answer = tlv(SEQUENCE, &[&id, &tlv(0x80, &[]), &tlv(TIME, &[b"20260101000000Z"]), &until]);
        let responder = tlv(under(2), &[&tlv(OCTETS, &[b"r"])]);
        let data =
            tlv(SEQUENCE, &[&responder, &tlv(TIME, &[b"20260101000000Z"]), &tlv(SEQUENCE, &[&answer.repeat(answers)])]);
        let basic = tlv(SEQUENCE, &[&data]);
        let bytes = tlv(under(0), &[&tlv(SEQUENCE, &[&tlv(OID, &[BASIC]), &tlv(OCTETS, &[&basic])])]);
        tlv(SEQUENCE, &[&tlv(ENUMERATED, &[&[status]]), &bytes])
    }

    #[test]
    fn answers_are_read() {
        let bytes = response(0, b"\x07", "21190101000000Z", 1);
        let answer = Answer::read(&bytes).unwrap();
        assert_eq!(answer.serial, b"\x07");
        assert!(answer.next_update.unwrap() > SystemTime::now());
        let reason = |bytes: &[u8]| Answer::read(bytes).err().unwrap_or("none");
        assert_eq!(reason(&response(6, b"\x07", "21190101000000Z", 1)), "was unsuccessful");
        assert_eq!(reason(&response(0, b"\x07", "21190101000000Z", 2)), "is for more than one certificate");
        assert!(Answer::read(&response(0, b"\x07", "soon", 1)).unwrap().next_update.is_none());
        for end in 0..bytes.len() {
            assert!(Answer::read(&bytes[..end]).is_err(), "{end}");
        }
    }
}
