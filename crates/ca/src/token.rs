//! Service account tokens: the JSON Web Tokens that Kubernetes projects into pods.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jsonwebtoken::jwk::{Jwk, JwkSet, KeyAlgorithm};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use mesh_types::SpiffeId;
use rcgen::KeyPair;
use serde::{Deserialize, Serialize};

use crate::pem;

/// `iss` of a cluster's own tokens.
pub const DEFAULT_ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// `aud` of the tokens that sidecars show to the control plane.
pub const DEFAULT_AUDIENCE: &str = "istio-ca";

/// Bytes of a token; Kubernetes' own have about 1.2 KB.
const MAX_TOKEN: usize = 16 << 10;
/// How far clocks may differ, in seconds.
const LEEWAY: u64 = 10;

/// Whom a token is for.
#[derive(Clone, Debug, Default)]
pub struct TokenRequest {
    /// Namespace of pod and account.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// The pod's name; "" for a token bound to no pod.
    pub pod: String,
    /// The pod's uid.
    pub uid: String,
    /// Who shall accept it.
    pub audience: String,
    /// How long it lives.
    pub ttl: Duration,
}

/// What a verified token says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Claims {
    /// Namespace of the account.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// The pod the token is bound to, if any.
    pub pod: Option<String>,
    /// Unix seconds.
    pub expires: u64,
}

impl Claims {
    /// The identity of the caller in `trust_domain`.
    ///
    /// # Errors
    /// When a name in the token cannot be part of an identity.
    pub fn identity(&self, trust_domain: &str) -> Result<SpiffeId, InvalidToken> {
        SpiffeId::new(trust_domain, &self.namespace, &self.service_account).map_err(|_| InvalidToken::Subject)
    }
}

/// Why there is no issuer.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the signing key is not usable")]
    Key(#[source] rcgen::Error),
    #[error("the token cannot be signed")]
    Sign(#[source] jsonwebtoken::errors::Error),
    #[error("the key set is not a JSON Web Key Set")]
    KeySet(#[source] serde_json::Error),
}

/// Why a token is not accepted. Says nothing of the token's content but what is wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum InvalidToken {
    #[error("the token is larger than {MAX_TOKEN} bytes")]
    TooLarge,
    #[error("the token is not accepted")]
    Token(#[source] jsonwebtoken::errors::Error),
    #[error("no known key has signed the token")]
    UnknownKey,
    #[error("the token's subject is not a service account")]
    Subject,
}

#[derive(Serialize, Deserialize)]
struct Payload {
    aud: Audience,
    exp: u64,
    #[serde(default)]
    iat: u64,
    #[serde(default)]
    iss: String,
    #[serde(default)]
    jti: String,
    #[serde(default, rename = "kubernetes.io")]
    kubernetes: Kubernetes,
    #[serde(default)]
    nbf: u64,
    sub: String,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Audience {
    Many(Vec<String>),
    One(String),
}

#[derive(Default, Serialize, Deserialize)]
struct Kubernetes {
    #[serde(default)]
    namespace: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<Reference>,
    #[serde(default)]
    serviceaccount: Reference,
}

#[derive(Default, Serialize, Deserialize)]
struct Reference {
    #[serde(default)]
    name: String,
    #[serde(default)]
    uid: String,
}

/// Signs tokens, in the API server's place.
pub struct TokenIssuer {
    key: EncodingKey,
    jwk: Jwk,
    issuer: String,
}

impl TokenIssuer {
    /// An issuer with a fresh key, kept in memory only.
    pub fn generate() -> Result<Self, TokenError> {
        Self::of(&KeyPair::generate().map_err(TokenError::Key)?)
    }

    /// The issuer whose key is in `dir`, which is made when there is none.
    pub fn load_or_create(dir: &Path) -> Result<Self, TokenError> {
        let path = dir.join("service-account-key.pem");
        match fs::read_to_string(&path) {
            Ok(text) => Self::of(&KeyPair::from_pem(&text).map_err(TokenError::Key)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = KeyPair::generate().map_err(TokenError::Key)?;
                fs::create_dir_all(dir)
                    .and_then(|()| pem::write(&path, &key.serialize_pem(), true))
                    .map_err(|source| TokenError::Write { path, source })?;
                Self::of(&key)
            }
            Err(source) => Err(TokenError::Read { path, source }),
        }
    }

    fn of(pair: &KeyPair) -> Result<Self, TokenError> {
        let key = EncodingKey::from_ec_der(pair.serialized_der());
        let mut jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).map_err(TokenError::Sign)?;
        let id = jwk.thumbprint(jsonwebtoken::jwk::ThumbprintHash::SHA256).map_err(TokenError::Sign)?;
        jwk.common.key_id = Some(id);
        Ok(Self { key, jwk, issuer: DEFAULT_ISSUER.to_owned() })
    }

    /// A signed token.
    ///
    /// # Errors
    /// When the key refuses to sign.
    pub fn issue(&self, request: &TokenRequest) -> Result<String, TokenError> {
        let now = jsonwebtoken::get_current_timestamp();
        let mut id = [0; 16];
        let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
        random.fill(&mut id).map_err(|_| TokenError::Key(rcgen::Error::RingUnspecified))?;
        let pod = (!request.pod.is_empty()).then(|| Reference { name: request.pod.clone(), uid: request.uid.clone() });
        let payload = Payload {
            aud: Audience::Many(vec![request.audience.clone()]),
            exp: now.saturating_add(request.ttl.as_secs()),
            iat: now,
            iss: self.issuer.clone(),
            jti: id.iter().map(|byte| format!("{byte:02x}")).collect(),
            kubernetes: Kubernetes {
                namespace: request.namespace.clone(),
                pod,
                serviceaccount: Reference { name: request.service_account.clone(), uid: String::new() },
            },
            nbf: now,
            sub: format!("system:serviceaccount:{}:{}", request.namespace, request.service_account),
        };
        let mut header = Header::new(Algorithm::ES256);
        header.kid = self.jwk.common.key_id.clone();
        jsonwebtoken::encode(&header, &payload, &self.key).map_err(TokenError::Sign)
    }

    /// What verifies our tokens.
    pub fn verifier(&self) -> TokenVerifier {
        TokenVerifier { keys: vec![self.jwk.clone()], issuer: Some(self.issuer.clone()) }
    }

    /// The public key as a JSON Web Key Set.
    pub fn key_set(&self) -> String {
        serde_json::to_string(&JwkSet { keys: vec![self.jwk.clone()] }).unwrap_or_default()
    }
}

/// Shows no key.
impl std::fmt::Debug for TokenIssuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenIssuer").field("issuer", &self.issuer).finish_non_exhaustive()
    }
}

/// Verifies tokens by the issuer's public keys.
#[derive(Clone, Debug)]
pub struct TokenVerifier {
    keys: Vec<Jwk>,
    issuer: Option<String>,
}

impl TokenVerifier {
    /// Accepts what one of the keys of a JSON Web Key Set has signed, and `issuer` issued, if given.
    ///
    /// # Errors
    /// When the text is not a key set.
    pub fn from_key_set(json: &str, issuer: Option<String>) -> Result<Self, TokenError> {
        let keys: JwkSet = serde_json::from_str(json).map_err(TokenError::KeySet)?;
        Ok(Self { keys: keys.keys, issuer })
    }

    /// Verifies signature, issuer, audience and times.
    ///
    /// # Errors
    /// When any of them is wrong.
    pub fn verify(&self, token: &str, audience: &str) -> Result<Claims, InvalidToken> {
        if token.len() > MAX_TOKEN {
            return Err(InvalidToken::TooLarge);
        }
        let header = jsonwebtoken::decode_header(token).map_err(InvalidToken::Token)?;
        let mut last = InvalidToken::UnknownKey;
        let named = |jwk: &&Jwk| header.kid.is_none() || jwk.common.key_id.is_none() || jwk.common.key_id == header.kid;
        for jwk in self.keys.iter().filter(named) {
            // The key, not the token, says which algorithm it is for; a token that says `none` or HMAC finds no key.
            let Some(algorithm) = jwk.common.key_algorithm.and_then(algorithm).or_else(|| by_shape(jwk)) else {
                continue;
            };
            let Ok(key) = DecodingKey::from_jwk(jwk) else { continue };
            let mut validation = Validation::new(algorithm);
            validation.leeway = LEEWAY;
            validation.validate_nbf = true;
            validation.set_audience(&[audience]);
            validation.set_required_spec_claims(&["exp", "aud", "sub"]);
            if let Some(issuer) = &self.issuer {
                validation.set_issuer(&[issuer]);
            }
            match jsonwebtoken::decode::<Payload>(token, &key, &validation) {
                Ok(data) => return claims(data.claims),
                Err(error) => last = InvalidToken::Token(error),
            }
        }
        Err(last)
    }
}

fn algorithm(key: KeyAlgorithm) -> Option<Algorithm> {
    Some(match key {
        KeyAlgorithm::ES256 => Algorithm::ES256,
        KeyAlgorithm::ES384 => Algorithm::ES384,
        KeyAlgorithm::RS256 => Algorithm::RS256,
        KeyAlgorithm::RS384 => Algorithm::RS384,
        KeyAlgorithm::RS512 => Algorithm::RS512,
        KeyAlgorithm::PS256 => Algorithm::PS256,
        KeyAlgorithm::EdDSA => Algorithm::EdDSA,
        _ => return None,
    })
}

/// Key sets may leave `alg` out.
fn by_shape(jwk: &Jwk) -> Option<Algorithm> {
    use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve};
    match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Some(Algorithm::RS256),
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => Some(Algorithm::ES256),
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P384 => Some(Algorithm::ES384),
        AlgorithmParameters::OctetKeyPair(_) => Some(Algorithm::EdDSA),
        _ => None,
    }
}

fn claims(payload: Payload) -> Result<Claims, InvalidToken> {
    // As istiod, security/pkg/k8s/tokenreview: the subject decides.
    let mut parts = payload.sub.split(':');
    let (Some("system"), Some("serviceaccount"), Some(namespace), Some(account), None) =
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(InvalidToken::Subject);
    };
    let clean = |name: &str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
    };
    if !clean(namespace) || !clean(account) {
        return Err(InvalidToken::Subject);
    }
    Ok(Claims {
        namespace: namespace.to_owned(),
        service_account: account.to_owned(),
        pod: payload.kubernetes.pod.map(|pod| pod.name).filter(|name| !name.is_empty()),
        expires: payload.exp,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request() -> TokenRequest {
        TokenRequest {
            namespace: "default".into(),
            service_account: "bookinfo-reviews".into(),
            pod: "reviews-v1-0".into(),
            uid: "u".into(),
            audience: DEFAULT_AUDIENCE.into(),
            ttl: Duration::from_secs(600),
        }
    }

    #[test]
    fn a_token_verifies_for_its_audience_and_issuer_only() {
        let issuer = TokenIssuer::generate().unwrap();
        let token = issuer.issue(&request()).unwrap();
        let claims = issuer.verifier().verify(&token, DEFAULT_AUDIENCE).unwrap();
        assert_eq!(claims.pod.as_deref(), Some("reviews-v1-0"));
        let identity = claims.identity("cluster.local").unwrap();
        assert_eq!(identity.to_string(), "spiffe://cluster.local/ns/default/sa/bookinfo-reviews");
        assert!(issuer.verifier().verify(&token, "api").is_err());
        assert!(TokenIssuer::generate().unwrap().verifier().verify(&token, DEFAULT_AUDIENCE).is_err());
        let from_set = TokenVerifier::from_key_set(&issuer.key_set(), None).unwrap();
        assert!(from_set.verify(&token, DEFAULT_AUDIENCE).is_ok());
        let other = TokenVerifier::from_key_set(&issuer.key_set(), Some("https://else".into())).unwrap();
        assert!(other.verify(&token, DEFAULT_AUDIENCE).is_err());
    }

    #[test]
    fn an_old_token_is_refused() {
        let issuer = TokenIssuer::generate().unwrap();
        let mut payload = request();
        payload.ttl = Duration::ZERO;
        let token = issuer.issue(&payload).unwrap();
        // Within the leeway it still holds; so verify against a verifier of the far future by shifting `exp`.
        assert!(issuer.verifier().verify(&token, DEFAULT_AUDIENCE).is_ok());
        let expired = Payload {
            aud: Audience::One(DEFAULT_AUDIENCE.into()),
            exp: 1,
            iat: 0,
            iss: DEFAULT_ISSUER.into(),
            jti: String::new(),
            kubernetes: Kubernetes::default(),
            nbf: 0,
            sub: "system:serviceaccount:a:b".into(),
        };
        let token = jsonwebtoken::encode(&Header::new(Algorithm::ES256), &expired, &issuer.key).unwrap();
        assert!(issuer.verifier().verify(&token, DEFAULT_AUDIENCE).is_err());
    }

    #[test]
    fn only_service_accounts_pass() {
        let of = |sub: &str| {
            claims(Payload {
                aud: Audience::One(String::new()),
                exp: 0,
                iat: 0,
                iss: String::new(),
                jti: String::new(),
                kubernetes: Kubernetes::default(),
                nbf: 0,
                sub: sub.into(),
            })
        };
        assert!(of("system:serviceaccount:a:b").is_ok());
        for sub in [
            "",
            "system:node:a",
            "system:serviceaccount:a",
            "system:serviceaccount:a:b:c",
            "system:serviceaccount:a/b:c",
        ] {
            assert!(matches!(of(sub), Err(InvalidToken::Subject)), "{sub}");
        }
    }

    #[test]
    fn a_token_that_brings_its_own_algorithm_is_refused() {
        let issuer = TokenIssuer::generate().unwrap();
        let secret = EncodingKey::from_secret(issuer.key_set().as_bytes());
        let token = jsonwebtoken::encode(
            &Header::new(Algorithm::HS256),
            &serde_json::json!({"sub": "system:serviceaccount:a:b", "aud": "istio-ca", "exp": 99999999999u64}),
            &secret,
        )
        .unwrap();
        assert!(issuer.verifier().verify(&token, DEFAULT_AUDIENCE).is_err());
    }

    proptest! {
        #[test]
        fn no_token_makes_it_panic(token in "[A-Za-z0-9_.=-]{0,200}|.*") {
            let verifier = TokenVerifier { keys: Vec::new(), issuer: None };
            prop_assert!(verifier.verify(&token, "a").is_err());
        }
    }
}
