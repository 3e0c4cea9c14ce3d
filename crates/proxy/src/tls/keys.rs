//! Own certificates with their keys, and keys under a password (RFC 5958 with PBES2 of RFC 8018).

use super::der::{Der, INTEGER, OCTETS, OID, unsigned};
use super::secrets::read;
use super::{TlsError, ocsp};
use aws_lc_rs::cipher::{AES_128, AES_192, AES_256, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey};
use aws_lc_rs::pbkdf2;
use proxy_core::tls::Certificate;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::num::NonZeroU32;
use x509_parser::prelude::{FromDer, Pem, X509Certificate};

const PBES2: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0d";
const PBKDF2: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0c";
const HMAC_SHA1: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x02\x07";
const HMAC_SHA256: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x02\x09";
const AES_128_CBC: &[u8] = b"\x60\x86\x48\x01\x65\x03\x04\x01\x02";
const AES_192_CBC: &[u8] = b"\x60\x86\x48\x01\x65\x03\x04\x01\x16";
const AES_256_CBC: &[u8] = b"\x60\x86\x48\x01\x65\x03\x04\x01\x2a";

/// The kind of PEM that keys under a password are.
const ENCRYPTED: &[u8] = b"-----BEGIN ENCRYPTED PRIVATE KEY-----";

/// What a configured certificate stands for, with its files as they are now.
pub(super) fn load(certificate: &Certificate) -> Result<CertifiedKey, TlsError> {
    let password = certificate.password.as_ref().map(read).transpose()?;
    let mut key = certified_key(&read(&certificate.chain)?, &read(&certificate.key)?, password.as_deref())?;
    if let Some(staple) = &certificate.staple {
        key.ocsp = ocsp::staple(read(staple)?, &key.cert)?;
    }
    Ok(key)
}

/// A chain and its key in PEM.
pub(super) fn certified_key(chain: &[u8], key: &[u8], password: Option<&[u8]>) -> Result<CertifiedKey, TlsError> {
    let certs = certificates(chain).ok_or(TlsError::Pem { what: "certificate_chain" })?;
    if certs.is_empty() {
        return Err(TlsError::NoCertificate);
    }
    let key = super::provider().key_provider.load_private_key(private_key(key, password)?)?;
    let certified = CertifiedKey::new(certs, key);
    match keys_match(&certified)? {
        true => Ok(certified),
        false => Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch).into()),
    }
}

/// All certificates of a text; `None` if one of them is none.
pub(super) fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let certs: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().ok()?;
    certs.iter().all(|cert| Der(cert).is_sequence()).then_some(certs)
}

/// Whether the key is the certificate's. rustls's own way is only for certificates of version 3.
fn keys_match(certified: &CertifiedKey) -> Result<bool, TlsError> {
    let bad = || TlsError::Pem { what: "certificate_chain" };
    let leaf = certified.cert.first().ok_or(TlsError::NoCertificate)?;
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|_| bad())?;
    Ok(certified.key.public_key().is_none_or(|key| *key == *certificate.public_key().raw))
}

/// The first private key of a text. A password that no key needs does no harm.
///
/// DIFFERS: of the ways to put a key under a password those of PKCS#8 with AES are known; Envoy reads OpenSSL's older ones, too.
fn private_key(pem: &[u8], password: Option<&[u8]>) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bad = || TlsError::Pem { what: "private_key" };
    if !pem.windows(ENCRYPTED.len()).any(|part| part == ENCRYPTED) {
        return PrivateKeyDer::from_pem_slice(pem).map_err(|_| bad());
    }
    let first = Pem::iter_from_buffer(pem).find(|pem| pem.as_ref().map_or(true, |p| p.label.ends_with("PRIVATE KEY")));
    let first = first.and_then(Result::ok).ok_or_else(bad)?;
    if first.label != "ENCRYPTED PRIVATE KEY" {
        return PrivateKeyDer::from_pem_slice(pem).map_err(|_| bad());
    }
    let password = password.ok_or(TlsError::Password("there is no password for it"))?;
    let scheme = Scheme::read(&first.contents).ok_or(TlsError::Password("it is not encrypted with PBES2 and AES"))?;
    let key = scheme.decrypt(password).ok_or(TlsError::Password("the password is not its"))?;
    Ok(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key)))
}

/// How a key is encrypted (`EncryptedPrivateKeyInfo`), and the key.
struct Scheme<'a> {
    salt: &'a [u8],
    rounds: NonZeroU32,
    hmac: pbkdf2::Algorithm,
    cipher: &'static aws_lc_rs::cipher::Algorithm,
    iv: [u8; 16],
    encrypted: &'a [u8],
}

impl<'a> Scheme<'a> {
    fn read(der: &'a [u8]) -> Option<Self> {
        let mut info = Der(der).sequence()?;
        let mut algorithm = info.sequence()?;
        let encrypted = info.take(OCTETS)?;
        algorithm.take(OID).filter(|of| *of == PBES2)?;
        let mut parameters = algorithm.sequence()?;
        let (mut derivation, mut cipher) = (parameters.sequence()?, parameters.sequence()?);
        derivation.take(OID).filter(|of| *of == PBKDF2)?;
        let mut derivation = derivation.sequence()?;
        let salt = derivation.take(OCTETS)?;
        let rounds = NonZeroU32::new(unsigned(derivation.take(INTEGER)?)?)?;
        // The key's length, which the cipher says as well.
        derivation.take(INTEGER);
        // These two are all that BoringSSL has.
        let hmac = match derivation.sequence().and_then(|mut hmac| hmac.take(OID)) {
            None | Some(HMAC_SHA1) => pbkdf2::PBKDF2_HMAC_SHA1,
            Some(HMAC_SHA256) => pbkdf2::PBKDF2_HMAC_SHA256,
            Some(_) => return None,
        };
        let of = match cipher.take(OID)? {
            AES_128_CBC => &AES_128,
            AES_192_CBC => &AES_192,
            AES_256_CBC => &AES_256,
            _ => return None,
        };
        let iv = cipher.take(OCTETS)?.try_into().ok()?;
        Some(Self { salt, rounds, hmac, cipher: of, iv, encrypted })
    }

    fn decrypt(&self, password: &[u8]) -> Option<Vec<u8>> {
        let length = if *self.cipher == AES_128 {
            16
        } else if *self.cipher == AES_192 {
            24
        } else {
            32
        };
        let mut key = [0; 32];
        let key = &mut key[..length];
        pbkdf2::derive(self.hmac, self.rounds, self.salt, password, key);
        let key = PaddedBlockDecryptingKey::cbc_pkcs7(UnboundCipherKey::new(self.cipher, key).ok()?).ok()?;
        let mut bytes = self.encrypted.to_vec();
        let plain = key.decrypt(&mut bytes, DecryptionContext::Iv128(self.iv.into())).ok()?;
        // A wrong password may leave something that ends as if it were right.
        Der(plain).is_sequence().then(|| plain.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `openssl pkcs8 -topk8 -v2 aes256` of a P-256 key, under the word `secret`.
    const KEY: &str = include_str!("testdata/key_under_password.pem");

    #[test]
    fn a_key_opens_with_its_password_only() {
        let open = |password: Option<&[u8]>| private_key(KEY.as_bytes(), password);
        let key = open(Some(b"secret")).unwrap();
        super::super::provider().key_provider.load_private_key(key).unwrap();
        assert!(open(Some(b"wrong")).is_err());
        assert!(open(None).unwrap_err().to_string().contains("password"));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let text = |body: &str| {
            format!("{}\n{body}\n-----END ENCRYPTED PRIVATE KEY-----\n", std::str::from_utf8(ENCRYPTED).unwrap())
        };
        for body in ["", "MAA=", "MAMCAQA=", "!"] {
            assert!(private_key(text(body).as_bytes(), Some(b"x")).is_err(), "{body}");
        }
    }
}
