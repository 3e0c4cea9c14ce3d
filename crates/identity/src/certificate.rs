//! A certificate chain with its key and the roots its peers are verified against.

use std::fmt;
use std::time::{Duration, SystemTime};

use mesh_types::SpiffeId;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use zeroize::{Zeroize, Zeroizing};

/// What a workload proves itself with, and checks others by. Immutable; a rotation makes a new one.
#[derive(Clone, Debug)]
pub struct WorkloadCertificate {
    /// The workload's certificate, then intermediates; the root is not among them.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key of the first certificate.
    pub key: PrivateKey,
    /// The roots that peers' certificates must lead to; more than one while a root is being replaced.
    pub roots: Vec<CertificateDer<'static>>,
    /// From when the certificate is valid.
    pub not_before: SystemTime,
    /// Until when.
    pub not_after: SystemTime,
    /// The identity in the certificate, if it has one of Istio's form.
    pub spiffe: Option<SpiffeId>,
    /// Revoked certificates of peers, as PEM; `None`: none is known to be.
    pub crl: Option<Vec<u8>>,
}

/// A private key that is zeroised when dropped and not shown in logs.
#[derive(Clone)]
pub struct PrivateKey(Zeroizing<KeyBytes>);

#[derive(Clone)]
struct KeyBytes {
    format: KeyFormat,
    der: Vec<u8>,
}

#[derive(Clone, Copy)]
enum KeyFormat {
    Pkcs8,
    Pkcs1,
    Sec1,
}

impl Zeroize for KeyBytes {
    fn zeroize(&mut self) {
        self.der.zeroize();
    }
}

/// A chain, key or root that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCertificate {
    #[error("the certificate chain holds no certificate")]
    NoCertificate,
    #[error("no root certificate")]
    NoRoot,
    #[error("{what} is not PEM: {reason}")]
    Pem { what: &'static str, reason: String },
    #[error("the workload's certificate cannot be parsed: {0}")]
    X509(String),
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
}

impl PrivateKey {
    /// A PKCS #8 key, as key generation gives it.
    pub fn from_pkcs8(der: Vec<u8>) -> PrivateKey {
        PrivateKey(Zeroizing::new(KeyBytes { format: KeyFormat::Pkcs8, der }))
    }

    /// The first key of a PEM file: PKCS #8, PKCS #1 or SEC 1.
    pub fn from_pem(pem: &[u8]) -> Result<PrivateKey, InvalidCertificate> {
        let key = PrivateKeyDer::from_pem_slice(pem)
            .map_err(|e| InvalidCertificate::Pem { what: "the private key", reason: e.to_string() })?;
        let (format, der) = match key {
            PrivateKeyDer::Pkcs1(_) => (KeyFormat::Pkcs1, key.secret_der().to_vec()),
            PrivateKeyDer::Sec1(_) => (KeyFormat::Sec1, key.secret_der().to_vec()),
            _ => (KeyFormat::Pkcs8, key.secret_der().to_vec()),
        };
        Ok(PrivateKey(Zeroizing::new(KeyBytes { format, der })))
    }

    /// The key for rustls, borrowed.
    pub fn der(&self) -> PrivateKeyDer<'_> {
        let der = self.0.der.as_slice();
        match self.0.format {
            KeyFormat::Pkcs8 => PrivateKeyDer::Pkcs8(der.into()),
            KeyFormat::Pkcs1 => PrivateKeyDer::Pkcs1(der.into()),
            KeyFormat::Sec1 => PrivateKeyDer::Sec1(der.into()),
        }
    }

    /// The key as PEM, for Envoy and for OUTPUT_CERTS.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let label = match self.0.format {
            KeyFormat::Pkcs8 => "PRIVATE KEY",
            KeyFormat::Pkcs1 => "RSA PRIVATE KEY",
            KeyFormat::Sec1 => "EC PRIVATE KEY",
        };
        Zeroizing::new(pem_block(label, &self.0.der))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

impl WorkloadCertificate {
    /// Puts a certificate together and checks that the parts fit.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKey,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<WorkloadCertificate, InvalidCertificate> {
        let leaf = chain.first().ok_or(InvalidCertificate::NoCertificate)?;
        if roots.is_empty() {
            return Err(InvalidCertificate::NoRoot);
        }
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| InvalidCertificate::X509(e.to_string()))?;
        let time = |t: x509_parser::time::ASN1Time| {
            let seconds = u64::try_from(t.timestamp()).unwrap_or(0); // before 1970: long expired either way
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(SystemTime::UNIX_EPOCH)
        };
        let (not_before, not_after) = (time(parsed.validity().not_before), time(parsed.validity().not_after));
        let spiffe = uri_names(&parsed).find_map(|uri| uri.parse().ok());
        let provider = crate::tls::provider();
        let signer = provider
            .key_provider
            .load_private_key(key.der().clone_key())
            .map_err(|_| InvalidCertificate::KeyMismatch)?;
        let certified = rustls::sign::CertifiedKey::new(chain, signer);
        // Unknown: a key kind whose public half rustls cannot show; the handshake will tell.
        match certified.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(_) => return Err(InvalidCertificate::KeyMismatch),
        }
        Ok(WorkloadCertificate { chain: certified.cert, key, roots, not_before, not_after, spiffe, crl: None })
    }

    /// Whether certificate and roots are the same, whatever is revoked.
    pub fn is_like(&self, other: &WorkloadCertificate) -> bool {
        self.chain == other.chain && self.roots == other.roots
    }

    /// The same from PEM texts.
    pub fn from_pem(chain: &[u8], key: &[u8], roots: &[u8]) -> Result<WorkloadCertificate, InvalidCertificate> {
        WorkloadCertificate::new(
            certificates("the certificate chain", chain)?,
            PrivateKey::from_pem(key)?,
            certificates("the root certificate", roots)?,
        )
    }

    /// The chain as PEM.
    pub fn chain_pem(&self) -> String {
        self.chain.iter().map(|c| pem_block("CERTIFICATE", c)).collect()
    }

    /// The roots as PEM.
    pub fn roots_pem(&self) -> String {
        self.roots.iter().map(|c| pem_block("CERTIFICATE", c)).collect()
    }

    /// Whether the certificate is valid at `now`.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }
}

/// All certificates of a PEM text; other blocks are skipped.
pub(crate) fn certificates(what: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, InvalidCertificate> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let parsed = parsed.map_err(|e| InvalidCertificate::Pem { what, reason: e.to_string() })?;
    if parsed.is_empty() {
        return Err(InvalidCertificate::Pem { what, reason: "there is no CERTIFICATE block in it".to_owned() });
    }
    Ok(parsed)
}

/// The URI names of a certificate.
pub(crate) fn uri_names<'a>(certificate: &'a X509Certificate<'_>) -> impl Iterator<Item = &'a str> {
    let names = certificate.subject_alternative_name().ok().flatten().map(|san| &san.value.general_names);
    names.into_iter().flatten().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    })
}

/// RFC 7468, section 2: base64 in lines of 64.
fn pem_block(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = format!("-----BEGIN {label}-----\n");
    // 48 bytes make a line of 64 characters.
    for line in der.chunks(48) {
        for triple in line.chunks(3) {
            let bits = triple.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - triple.len()));
            for i in 0..4 {
                let sextet = (bits >> (18 - 6 * i)) & 63;
                out.push(if i <= triple.len() { char::from(ALPHABET[sextet as usize]) } else { '=' });
            }
        }
        out.push('\n');
    }
    out.push_str("-----END ");
    out.push_str(label);
    out.push_str("-----\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_round_trips_at_every_length() {
        for length in [0, 1, 2, 3, 47, 48, 49, 100] {
            let der: Vec<u8> = (0..length).map(|i| i as u8 ^ 0xa5).collect();
            let parsed = CertificateDer::from_pem_slice(pem_block("CERTIFICATE", &der).as_bytes()).unwrap();
            assert_eq!(parsed.as_ref(), der.as_slice());
        }
    }

    #[test]
    fn keys_do_not_show_themselves() {
        assert_eq!(format!("{:?}", PrivateKey::from_pkcs8(vec![1, 2, 3])), "PrivateKey(…)");
    }

    #[test]
    fn a_foreign_key_is_refused() {
        let key = rcgen::KeyPair::generate().unwrap();
        let other = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let build = |key: &rcgen::KeyPair| {
            WorkloadCertificate::from_pem(
                certificate.pem().as_bytes(),
                key.serialize_pem().as_bytes(),
                certificate.pem().as_bytes(),
            )
        };
        assert!(matches!(build(&other), Err(InvalidCertificate::KeyMismatch)));
        let good = build(&key).unwrap();
        assert_eq!(good.chain_pem().replace('\r', ""), certificate.pem().replace('\r', ""));
        assert!(WorkloadCertificate::from_pem(b"", b"", b"").is_err());
    }
}
