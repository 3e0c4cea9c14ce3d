//! What a certificate says of its holder, as Envoy's formatters and matchers want it.

use aws_lc_rs::digest;
use base64::Engine as _;
use mesh_types::ArcStr;
use proxy_core::stream_info::{PeerCertificate, PeerChain};
use rustls_pki_types::CertificateDer;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::Write;
use std::time::{Duration, SystemTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, X509Name};

/// Chains that a thread remembers: peers come back, and each handshake asks more than once.
const REMEMBERED: usize = 16;

/// A chain and what its leaf says.
type Known = (Vec<CertificateDer<'static>>, PeerCertificate);

thread_local! {
    /// The last one used is the first.
    static KNOWN: RefCell<VecDeque<Known>> = const { RefCell::new(VecDeque::new()) };
}

/// Reads the leaf of a chain; `None` when it is no certificate.
pub(crate) fn peer_certificate(chain: &[CertificateDer<'_>]) -> Option<PeerCertificate> {
    KNOWN.with_borrow_mut(|known| {
        if let Some(at) = known.iter().position(|(remembered, _)| remembered == chain) {
            known.swap(0, at);
        } else {
            let certificate = read(chain)?;
            known.truncate(REMEMBERED - 1);
            known.push_front((chain.iter().map(|c| c.clone().into_owned()).collect(), certificate));
        }
        known.front().map(|(_, certificate)| certificate.clone())
    })
}

/// Adds what is said of who issued the leaf: another one of its chain, or one of these roots.
pub(crate) fn add_issuer(peer: &mut PeerCertificate, chain: &[CertificateDer<'_>], roots: &[CertificateDer<'_>]) {
    KNOWN.with_borrow_mut(|known| {
        let known = known.front_mut().filter(|(remembered, _)| remembered == chain).map(|(_, known)| known);
        if let Some(known) = known.as_deref().filter(|known| !known.issuer_sha256.is_empty()) {
            (peer.issuer_sha256, peer.issuer_serial) = (known.issuer_sha256.clone(), known.issuer_serial.clone());
            return;
        }
        find_issuer(peer, chain, roots);
        if let Some(known) = known {
            (known.issuer_sha256, known.issuer_serial) = (peer.issuer_sha256.clone(), peer.issuer_serial.clone());
        }
    });
}

fn find_issuer(peer: &mut PeerCertificate, chain: &[CertificateDer<'_>], roots: &[CertificateDer<'_>]) {
    let Some(Ok((_, leaf))) = chain.first().map(|leaf| X509Certificate::from_der(leaf)) else { return };
    for candidate in chain.iter().skip(1).chain(roots) {
        if let Ok((_, certificate)) = X509Certificate::from_der(candidate)
            && certificate.subject().as_raw() == leaf.issuer().as_raw()
        {
            peer.issuer_sha256 = fingerprint(&digest::SHA256, candidate);
            peer.issuer_serial = serial(&certificate);
            return;
        }
    }
}

fn read(chain: &[CertificateDer<'_>]) -> Option<PeerCertificate> {
    let leaf = chain.first()?;
    let (_, cert) = X509Certificate::from_der(leaf).ok()?;
    let all = PeerChain {
        sha256: chain.iter().map(|c| fingerprint(&digest::SHA256, c)).collect(),
        sha1: chain.iter().map(|c| fingerprint(&digest::SHA1_FOR_LEGACY_USE_ONLY, c)).collect(),
        serials: chain.iter().filter_map(|c| Some(serial(&X509Certificate::from_der(c).ok()?.1))).collect(),
    };
    let mut out = PeerCertificate {
        subject: rfc2253(cert.subject()).into(),
        issuer: rfc2253(cert.issuer()).into(),
        // The chain begins with the leaf.
        serial: all.serials.first().cloned()?,
        sha256: all.sha256.first().cloned()?,
        sha1: all.sha1.first().cloned()?,
        chain: all,
        pem_url_encoded: url_encoded_pem(leaf).into(),
        chain_url_encoded: chain.iter().map(|c| url_encoded_pem(c)).collect::<String>().into(),
        not_before: time(cert.validity().not_before.timestamp()),
        not_after: time(cert.validity().not_after.timestamp()),
        ..PeerCertificate::default()
    };
    if let Ok(Some(san)) = cert.subject_alternative_name() {
        for name in &san.value.general_names {
            match name {
                GeneralName::URI(uri) => out.uri_sans.push(ArcStr::from(*uri)),
                GeneralName::DNSName(dns) => out.dns_sans.push(ArcStr::from(*dns)),
                GeneralName::RFC822Name(mail) => out.email_sans.push(ArcStr::from(*mail)),
                GeneralName::IPAddress(bytes) => {
                    let ip = match bytes.len() {
                        4 => <[u8; 4]>::try_from(*bytes).ok().map(std::net::IpAddr::from),
                        16 => <[u8; 16]>::try_from(*bytes).ok().map(std::net::IpAddr::from),
                        _ => None,
                    };
                    out.ip_sans.extend(ip.map(|ip| ArcStr::from(ip.to_string())));
                }
                GeneralName::OtherName(_, value) => out.other_sans.extend(text_of(value).map(ArcStr::from)),
                _ => {}
            }
        }
    }
    Some(out)
}

/// The text of an other name's value (`[0] EXPLICIT`): a string of any kind, a number or a truth.
fn text_of(value: &[u8]) -> Option<String> {
    use x509_parser::der_parser::asn1_rs::{Any, FromDer as _, Tag};
    let (_, outer) = Any::from_der(value).ok()?;
    let (_, inner) = Any::from_der(outer.data).ok()?;
    Some(match inner.tag() {
        Tag::Integer | Tag::Enumerated => inner.i64().ok()?.to_string(),
        Tag::Boolean => inner.bool().ok()?.to_string(),
        Tag::Utf8String
        | Tag::PrintableString
        | Tag::T61String
        | Tag::Ia5String
        | Tag::VisibleString
        | Tag::OctetString => String::from_utf8_lossy(inner.data).into_owned(),
        _ => return None,
    })
}

fn fingerprint(algorithm: &'static digest::Algorithm, certificate: &CertificateDer<'_>) -> ArcStr {
    hex(digest::digest(algorithm, certificate).as_ref()).into()
}

fn serial(certificate: &X509Certificate<'_>) -> ArcStr {
    hex(strip_zeros(certificate.raw_serial())).into()
}

fn time(seconds: i64) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(seconds).ok()?))
}

fn strip_zeros(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|b| **b == 0).count().min(bytes.len().saturating_sub(1));
    &bytes[zeros..]
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

/// The name with the most specific part first (RFC 2253).
fn rfc2253(name: &X509Name<'_>) -> String {
    let mut parts: Vec<String> = name
        .iter()
        .map(|rdn| {
            let attributes: Vec<String> = rdn
                .iter()
                .map(|a| {
                    let kind = match a.attr_type().to_id_string().as_str() {
                        "2.5.4.3" => "CN".to_owned(),
                        "2.5.4.6" => "C".to_owned(),
                        "2.5.4.7" => "L".to_owned(),
                        "2.5.4.8" => "ST".to_owned(),
                        "2.5.4.9" => "street".to_owned(),
                        "2.5.4.10" => "O".to_owned(),
                        "2.5.4.11" => "OU".to_owned(),
                        "0.9.2342.19200300.100.1.25" => "DC".to_owned(),
                        "0.9.2342.19200300.100.1.1" => "UID".to_owned(),
                        "1.2.840.113549.1.9.1" => "emailAddress".to_owned(),
                        other => other.to_owned(),
                    };
                    format!("{kind}={}", escape(a.as_str().unwrap_or_default()))
                })
                .collect();
            attributes.join("+")
        })
        .collect();
    parts.reverse();
    parts.join(",")
}

fn escape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for (i, c) in value.char_indices() {
        let first = i == 0 && (c == '#' || c == ' ');
        let last = i + c.len_utf8() == value.len() && c == ' ';
        if first || last || matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// PEM with everything but unreserved characters percent-encoded, as Envoy's urlEncodedPemEncodedPeerCertificate.
fn url_encoded_pem(der: &[u8]) -> String {
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = String::with_capacity(body.len() * 5 / 4 + 100);
    out.push_str("-----BEGIN%20CERTIFICATE-----%0A");
    for line in body.as_bytes().chunks(64) {
        for b in line {
            match b {
                b'+' => out.push_str("%2B"),
                b'/' => out.push_str("%2F"),
                b'=' => out.push_str("%3D"),
                b => out.push(char::from(*b)),
            }
        }
        out.push_str("%0A");
    }
    out.push_str("-----END%20CERTIFICATE-----%0A");
    out
}
