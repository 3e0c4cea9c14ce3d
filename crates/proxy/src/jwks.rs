//! JSON Web Keys and signatures of tokens (RFC 7515, 7517, 7518), with the messages of Envoy's jwt_verify_lib.

use aws_lc_rs::{hmac, signature};
use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use serde_json::Value;

/// Bits that say nothing at the end are taken, as jwt_verify_lib does.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(base64::engine::DecodePaddingMode::RequireNone),
);

/// A set of keys.
#[derive(Debug, Default)]
pub(crate) struct Jwks {
    keys: Vec<Key>,
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    algorithm: Option<String>,
    material: Material,
}

#[derive(Debug)]
enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    Ec { curve: &'static str, point: Vec<u8> },
    Ed25519(Vec<u8>),
    Secret(Vec<u8>),
}

fn bytes(value: &Value, field: &str) -> Option<Vec<u8>> {
    BASE64.decode(value.get(field)?.as_str()?.trim_end_matches('=')).ok()
}

impl Key {
    fn parse(value: &Value) -> Option<Self> {
        let text = |field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
        let material = match value.get("kty")?.as_str()? {
            "RSA" => Material::Rsa { n: bytes(value, "n")?, e: bytes(value, "e")? },
            "EC" => {
                let (curve, size) = match value.get("crv").and_then(Value::as_str).unwrap_or("P-256") {
                    "P-256" => ("P-256", 32),
                    "P-384" => ("P-384", 48),
                    "P-521" => ("P-521", 66),
                    _ => return None,
                };
                let (x, y) = (bytes(value, "x")?, bytes(value, "y")?);
                if x.len() > size || y.len() > size {
                    return None;
                }
                let mut point = vec![4];
                for part in [x, y] {
                    point.extend(std::iter::repeat_n(0, size - part.len()));
                    point.extend(part);
                }
                Material::Ec { curve, point }
            }
            "OKP" if value.get("crv").and_then(Value::as_str) == Some("Ed25519") => {
                Material::Ed25519(bytes(value, "x")?)
            }
            "oct" => Material::Secret(bytes(value, "k")?),
            _ => return None,
        };
        Some(Self { id: text("kid"), algorithm: text("alg"), material })
    }

    /// Whether a token with that algorithm may be signed by this key.
    fn fits(&self, algorithm: &str) -> bool {
        if self.algorithm.as_deref().is_some_and(|own| own != algorithm) {
            return false;
        }
        match &self.material {
            Material::Rsa { .. } => matches!(algorithm, "RS256" | "RS384" | "RS512" | "PS256" | "PS384" | "PS512"),
            Material::Ec { curve, .. } => {
                matches!((algorithm, *curve), ("ES256", "P-256") | ("ES384", "P-384") | ("ES512", "P-521"))
            }
            Material::Ed25519(_) => algorithm == "EdDSA",
            Material::Secret(_) => matches!(algorithm, "HS256" | "HS384" | "HS512"),
        }
    }

    fn verify(&self, algorithm: &str, message: &[u8], sign: &[u8]) -> bool {
        match &self.material {
            Material::Rsa { n, e } => {
                let parameters = match algorithm {
                    "RS256" => &signature::RSA_PKCS1_2048_8192_SHA256,
                    "RS384" => &signature::RSA_PKCS1_2048_8192_SHA384,
                    "RS512" => &signature::RSA_PKCS1_2048_8192_SHA512,
                    "PS256" => &signature::RSA_PSS_2048_8192_SHA256,
                    "PS384" => &signature::RSA_PSS_2048_8192_SHA384,
                    _ => &signature::RSA_PSS_2048_8192_SHA512,
                };
                let key = signature::RsaPublicKeyComponents { n: n.as_slice(), e: e.as_slice() };
                key.verify(parameters, message, sign).is_ok()
            }
            Material::Ec { point, .. } => {
                let parameters = match algorithm {
                    "ES256" => &signature::ECDSA_P256_SHA256_FIXED,
                    "ES384" => &signature::ECDSA_P384_SHA384_FIXED,
                    _ => &signature::ECDSA_P521_SHA512_FIXED,
                };
                signature::UnparsedPublicKey::new(parameters, point).verify(message, sign).is_ok()
            }
            Material::Ed25519(key) => {
                signature::UnparsedPublicKey::new(&signature::ED25519, key).verify(message, sign).is_ok()
            }
            Material::Secret(key) => {
                let algorithm = match algorithm {
                    "HS256" => hmac::HMAC_SHA256,
                    "HS384" => hmac::HMAC_SHA384,
                    _ => hmac::HMAC_SHA512,
                };
                hmac::verify(&hmac::Key::new(algorithm, key), message, sign).is_ok()
            }
        }
    }
}

impl Jwks {
    /// Reads a key set; keys of unknown kinds are left out. `None`: no usable key.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let value: Value = serde_json::from_slice(text).ok()?;
        let keys: Vec<Key> = value.get("keys")?.as_array()?.iter().filter_map(Key::parse).collect();
        (!keys.is_empty()).then_some(Self { keys })
    }

    /// Checks a signature with every key that fits.
    pub(crate) fn verify(&self, token: &Token) -> Result<(), &'static str> {
        let mut found = false;
        for key in &self.keys {
            let id_fits = match (&token.key_id, &key.id) {
                (Some(wanted), Some(own)) => wanted == own,
                _ => true,
            };
            if !id_fits || !key.fits(&token.algorithm) {
                continue;
            }
            found = true;
            if key.verify(&token.algorithm, token.signed.as_bytes(), &token.signature) {
                return Ok(());
            }
        }
        Err(if found { "Jwt verification fails" } else { "Jwks doesn't have key to match kid or alg from Jwt" })
    }
}

/// A parsed, not yet verified token.
#[derive(Debug)]
pub(crate) struct Token {
    pub(crate) header: Value,
    pub(crate) payload: Value,
    /// The payload as it was sent, base64url.
    pub(crate) payload_text: String,
    pub(crate) algorithm: String,
    key_id: Option<String>,
    signed: String,
    signature: Vec<u8>,
}

const ALGORITHMS: [&str; 13] = [
    "ES256", "ES384", "ES512", "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "EdDSA",
];

impl Token {
    /// Takes a token apart; errors are the texts that clients see.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        let parts: Vec<&str> = text.split('.').filter(|p| !p.is_empty()).collect();
        let [head, body, sign] = parts[..] else {
            return Err("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections");
        };
        let decoded = BASE64.decode(head).map_err(|_| "Jwt header is an invalid Base64url encoded")?;
        let header: Value = serde_json::from_slice(&decoded).map_err(|_| "Jwt header is an invalid JSON")?;
        if !header.is_object() {
            return Err("Jwt header is an invalid JSON");
        }
        let Some(Value::String(algorithm)) = header.get("alg").cloned() else {
            return Err("Jwt header [alg] field is required and must be a string");
        };
        if !ALGORITHMS.contains(&algorithm.as_str()) {
            return Err("Jwt header [alg] is not supported");
        }
        let key_id = match header.get("kid") {
            Some(Value::String(s)) => Some(s.clone()),
            Some(_) => return Err("Jwt header [kid] field is not a string"),
            None => None,
        };
        let decoded = BASE64.decode(body).map_err(|_| "Jwt payload is an invalid Base64url encoded")?;
        let payload: Value = serde_json::from_slice(&decoded).map_err(|_| "Jwt payload is an invalid JSON")?;
        check_claims(&payload)?;
        let signature =
            BASE64.decode(sign.trim_end_matches('=')).map_err(|_| "Jwt signature is an invalid Base64url encoded")?;
        Ok(Self {
            header,
            payload,
            payload_text: body.to_owned(),
            algorithm,
            key_id,
            signed: format!("{head}.{body}"),
            signature,
        })
    }

    pub(crate) fn issuer(&self) -> &str {
        self.payload.get("iss").and_then(Value::as_str).unwrap_or_default()
    }

    /// When it ends.
    pub(crate) fn expiration(&self) -> Option<u64> {
        self.payload.get("exp").and_then(Value::as_f64).map(|n| n as u64).filter(|exp| *exp > 0)
    }

    /// `nbf` and `exp`, with a clock skew in seconds.
    pub(crate) fn check_time(&self, now: u64, skew: u64) -> Result<(), &'static str> {
        let time = |field: &str| self.payload.get(field).and_then(Value::as_f64).map(|n| n as u64);
        if time("nbf").is_some_and(|nbf| now.saturating_add(skew) < nbf) {
            return Err("Jwt not yet valid");
        }
        if time("exp").is_some_and(|exp| now > exp.saturating_add(skew)) {
            return Err("Jwt is expired");
        }
        Ok(())
    }

    /// `aud`, one or many.
    pub(crate) fn audiences(&self) -> Vec<&str> {
        match self.payload.get("aud") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        }
    }
}

/// Registered claims have the types that they are registered with, in the order in which jwt_verify_lib looks.
fn check_claims(payload: &Value) -> Result<(), &'static str> {
    if !payload.is_object() {
        return Err("Jwt payload is an invalid JSON");
    }
    let is_text = |name: &str| payload.get(name).is_none_or(Value::is_string);
    let time = |name: &str, kind: &'static str, range: &'static str| match payload.get(name) {
        None => Ok(()),
        Some(Value::Number(n)) => match n.as_f64() {
            // Beyond this, jwt_verify_lib's integer ends.
            Some(n) if (0.0..1.844_674_407_370_955_2e19).contains(&n) => Ok(()),
            _ => Err(range),
        },
        Some(_) => Err(kind),
    };
    if !is_text("iss") {
        return Err("Jwt payload [iss] field is not a string");
    }
    if !is_text("sub") {
        return Err("Jwt payload [sub] field is not a string");
    }
    for (name, kind, range) in TIMES {
        time(name, kind, range)?;
    }
    if !is_text("jti") {
        return Err("Jwt payload [jti] field is not a string");
    }
    match payload.get("aud") {
        None | Some(Value::String(_)) => Ok(()),
        Some(Value::Array(list)) if list.iter().all(Value::is_string) => Ok(()),
        Some(_) => Err("Jwt payload [aud] field is not a string or string list"),
    }
}

/// Claims that are points in time, and what is said of other types and values.
const TIMES: [(&str, &str, &str); 3] = [
    ("iat", "Jwt payload [iat] field is not an integer", "Jwt payload [iat] field is not a positive 64 bit integer"),
    ("nbf", "Jwt payload [nbf] field is not an integer", "Jwt payload [nbf] field is not a positive 64 bit integer"),
    ("exp", "Jwt payload [exp] field is not an integer", "Jwt payload [exp] field is not a positive 64 bit integer"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_tokens_are_named() {
        let error = |text: &str| Token::parse(text).expect_err("refused");
        assert!(error("a.b").starts_with("Jwt is not in the form"));
        let payload =
            |text: &str| error(&format!("{}.{}.aa", BASE64.encode(r#"{"alg":"HS256"}"#), BASE64.encode(text)));
        assert_eq!(payload("[]"), "Jwt payload is an invalid JSON");
        assert_eq!(payload(r#"{"iss":1}"#), "Jwt payload [iss] field is not a string");
        assert_eq!(payload(r#"{"exp":"1"}"#), "Jwt payload [exp] field is not an integer");
        assert_eq!(payload(r#"{"exp":-1}"#), "Jwt payload [exp] field is not a positive 64 bit integer");
        assert_eq!(payload(r#"{"aud":[1]}"#), "Jwt payload [aud] field is not a string or string list");
        assert_eq!(error("x.y.z"), "Jwt header is an invalid Base64url encoded");
        let none = BASE64.encode(r#"{"alg":"none"}"#);
        assert_eq!(error(&format!("{none}.e30.aa")), "Jwt header [alg] is not supported");
    }

    #[test]
    fn a_shared_secret_signs() {
        let keys = Jwks::parse(br#"{"keys":[{"kty":"oct","k":"c2VjcmV0","kid":"1"}]}"#).unwrap();
        let head = BASE64.encode(r#"{"alg":"HS256","kid":"1"}"#);
        let signed = format!("{head}.{}", BASE64.encode(r#"{"iss":"me","exp":10}"#));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, b"secret"), signed.as_bytes());
        let token = Token::parse(&format!("{signed}.{}", BASE64.encode(tag.as_ref()))).unwrap();
        assert_eq!(keys.verify(&token), Ok(()));
        assert_eq!(token.check_time(100, 60), Err("Jwt is expired"));
        assert_eq!(token.check_time(60, 60), Ok(()));
        let forged = Token::parse(&format!("{signed}.{}", BASE64.encode([0u8; 32]))).unwrap();
        assert_eq!(keys.verify(&forged), Err("Jwt verification fails"));
    }
}
