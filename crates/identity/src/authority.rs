//! Certificates from the control plane's CA: `istio.v1.auth.IstioCertificateService`, as pilot-agent asks.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_types::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, RsaKeySize, SanType};
use rustls_pki_types::CertificateDer;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request, Status};
use zeroize::Zeroizing;

use crate::certificate::{InvalidCertificate, PrivateKey, WorkloadCertificate, certificates};
use crate::channel::{ChannelError, Endpoint, within};
use crate::files::{Files, FilesError};
use crate::tls::{self, ServerIdentity};

/// How long a CA may take to sign.
const SIGN_TIMEOUT: Duration = Duration::from_secs(10);

/// The CA to ask and who asks.
#[derive(Clone, Debug)]
pub struct Authority {
    /// `HOST:PORT`, CA_ADDR.
    pub address: String,
    /// The name to verify, and SNI, if it is not the host of `address`.
    pub server_name: Option<String>,
    /// What verifies the CA's own certificate.
    pub roots: Roots,
    /// The service account token, read anew for each request: kubelets replace it.
    pub token: Option<PathBuf>,
    /// The identity asked for. The CA gives what the token says.
    pub identity: SpiffeId,
    /// The lifetime asked for, SECRET_TTL.
    pub ttl: Duration,
    /// The key to make.
    pub key: KeyKind,
    /// Further roots to trust peers by, PEM: those of federated trust domains, ProxyConfig.caCertificatesPem.
    pub trust_bundle: Vec<String>,
    /// Sent as the `ClusterID` header, by which an istiod of several clusters finds the token's issuer.
    pub cluster_id: String,
    /// Further headers, CA_HEADER_*.
    pub headers: Vec<(String, String)>,
    /// A certificate given beforehand (PROV_CERT), shown to the CA beside the token or instead of it. Machines outside of
    /// Kubernetes have one.
    pub provisioned: Option<Files>,
    /// Which of the CA's signers to use, ISTIO_META_CERT_SIGNER.
    pub cert_signer: Option<String>,
}

/// What verifies the CA's certificate.
#[derive(Clone, Debug)]
pub enum Roots {
    /// A PEM file, read anew for each connection.
    File(PathBuf),
    /// PEM text.
    Pem(String),
    /// No TLS at all: only for plaintext control planes on this machine.
    Plaintext,
}

/// Algorithms for workload keys.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum KeyKind {
    /// ECDSA on P-256. DIFFERS: pilot-agent defaults to RSA 2048 (ECC_SIGNATURE_ALGORITHM unset); handshakes with P-256 cost a tenth.
    #[default]
    EcdsaP256,
    /// ECDSA on P-384.
    EcdsaP384,
    /// RSA of this many bits: 2048, 3072 or 4096; others are rounded up.
    Rsa(u32),
}

/// Why there is no certificate from the CA.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("cannot read the {what} {path}")]
    Read {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the service account token {path} is empty")]
    EmptyToken { path: PathBuf },
    #[error("the service account token has characters that a header cannot carry")]
    BadToken,
    #[error("the root certificate of the CA is not usable")]
    Roots(#[source] InvalidCertificate),
    #[error("TLS cannot be set up with the root certificate of the CA")]
    Tls(#[source] rustls::Error),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("the CA at {address} did not answer within {} s", SIGN_TIMEOUT.as_secs())]
    Timeout { address: String },
    #[error("the CA at {address} refused to sign: {}: {}{}", .status.code(), .status.message(), hint(.status))]
    Refused { address: String, status: Box<Status> },
    #[error("the provisioned certificate is not usable")]
    Provisioned(#[source] FilesError),
    #[error("a key pair or CSR cannot be made")]
    Csr(#[source] rcgen::Error),
    #[error("the CA's answer is not usable")]
    Answer(#[source] InvalidCertificate),
}

/// A word on the two refusals that people meet.
fn hint(status: &Status) -> &'static str {
    match status.code() {
        Code::Unauthenticated => " (is the token expired, of another audience, or of another cluster?)",
        Code::PermissionDenied => " (may this service account have certificates?)",
        _ => "",
    }
}

/// `istio.v1.auth.IstioCertificateRequest`, istio `security/proto/istioca.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct CertificateRequest {
    #[prost(string, tag = "1")]
    csr: String,
    #[prost(int64, tag = "3")]
    validity_duration: i64,
    /// A `google.protobuf.Struct`.
    #[prost(message, optional, tag = "4")]
    metadata: Option<Metadata>,
}

/// A `google.protobuf.Struct` of texts.
#[derive(Clone, PartialEq, prost::Message)]
struct Metadata {
    #[prost(map = "string, message", tag = "1")]
    fields: HashMap<String, Text>,
}

/// A `google.protobuf.Value` that is a text.
#[derive(Clone, PartialEq, prost::Message)]
struct Text {
    #[prost(string, tag = "3")]
    text: String,
}

impl Metadata {
    /// Names the signer of certificates that a CA of several is to use.
    fn signer(name: &str) -> Self {
        Self { fields: HashMap::from([("CertSigner".to_owned(), Text { text: name.to_owned() })]) }
    }
}

/// `istio.v1.auth.IstioCertificateResponse`: the chain as PEM, leaf first, root last.
#[derive(Clone, PartialEq, prost::Message)]
struct CertificateResponse {
    #[prost(string, repeated, tag = "1")]
    cert_chain: Vec<String>,
}

impl Authority {
    /// The file that verifies the CA, if it is one.
    pub(crate) fn roots_file(&self) -> Option<&std::path::Path> {
        match &self.roots {
            Roots::File(path) => Some(path),
            _ => None,
        }
    }

    /// Makes a key, has it signed.
    pub async fn fetch(&self) -> Result<WorkloadCertificate, AuthorityError> {
        let (key, csr) = self.request()?;
        let mut request = Request::new(CertificateRequest {
            csr,
            validity_duration: i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: self.cert_signer.as_deref().map(Metadata::signer),
        });
        if let Some(token) = self.read_token().await? {
            let bearer = Zeroizing::new(format!("Bearer {}", token.as_str()));
            let mut value: tonic::metadata::MetadataValue<_> = bearer.parse().map_err(|_| AuthorityError::BadToken)?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        if let Ok(cluster) = self.cluster_id.parse() {
            request.metadata_mut().insert("clusterid", cluster);
        }
        for (name, value) in &self.headers {
            let key = name.to_ascii_lowercase().parse::<tonic::metadata::MetadataKey<_>>();
            let (Ok(key), Ok(mut value)) = (key, value.parse::<tonic::metadata::MetadataValue<_>>()) else { continue };
            value.set_sensitive(true);
            request.metadata_mut().insert(key, value);
        }
        let (endpoint, roots) = self.endpoint().await?;
        let channel = endpoint.connect().await?;
        let call = async {
            let mut client = tonic::client::Grpc::new(channel);
            client.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
            let path = PathAndQuery::from_static("/istio.v1.auth.IstioCertificateService/CreateCertificate");
            client
                .unary::<CertificateRequest, CertificateResponse, _>(request, path, tonic_prost::ProstCodec::default())
                .await
        };
        let answer = within(SIGN_TIMEOUT, call)
            .await
            .ok_or_else(|| AuthorityError::Timeout { address: self.address.clone() })?;
        let answer = answer
            .map_err(|status| AuthorityError::Refused { address: self.address.clone(), status: Box::new(status) })?;
        self.assemble(answer.into_inner(), key, roots)
    }

    /// The last text of the answer holds the roots the CA signs under; they and the roots that verified the CA are trusted
    /// together, so that both old and new ones are while a root is replaced.
    fn assemble(
        &self,
        answer: CertificateResponse,
        key: PrivateKey,
        known: Vec<CertificateDer<'static>>,
    ) -> Result<WorkloadCertificate, AuthorityError> {
        let parse = |pem: &str| certificates("the CA's answer", pem.as_bytes()).map_err(AuthorityError::Answer);
        let mut roots = known;
        let chain = match answer.cert_chain.as_slice() {
            // Real istiod puts all roots into the last text, so that a root that is being replaced comes with its successor.
            [own @ .., last] if !own.is_empty() => {
                let fresh: Vec<_> = parse(last)?.into_iter().filter(|root| !roots.contains(root)).collect();
                roots.extend(fresh);
                parse(&own.join("\n"))?
            }
            all => parse(&all.join("\n"))?,
        };
        for pem in &self.trust_bundle {
            let federated =
                certificates("a root of caCertificatesPem", pem.as_bytes()).map_err(AuthorityError::Answer)?;
            let fresh: Vec<_> = federated.into_iter().filter(|root| !roots.contains(root)).collect();
            roots.extend(fresh);
        }
        WorkloadCertificate::new(chain, key, roots).map_err(AuthorityError::Answer)
    }

    fn request(&self) -> Result<(PrivateKey, String), AuthorityError> {
        let pair = match self.key {
            KeyKind::EcdsaP256 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256),
            KeyKind::EcdsaP384 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384),
            KeyKind::Rsa(bits) => KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rsa_size(bits)),
        };
        let pair = pair.map_err(AuthorityError::Csr)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let uri = self.identity.to_string().try_into().map_err(AuthorityError::Csr)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        let csr = params.serialize_request(&pair).and_then(|csr| csr.pem()).map_err(AuthorityError::Csr)?;
        Ok((PrivateKey::from_pkcs8(pair.serialize_der()), csr))
    }

    async fn read_token(&self) -> Result<Option<Zeroizing<String>>, AuthorityError> {
        let Some(path) = &self.token else { return Ok(None) };
        let text = tokio::fs::read_to_string(path).await;
        if self.provisioned.is_some() && text.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
        {
            return Ok(None);
        }
        let text =
            text.map_err(|source| AuthorityError::Read { what: "service account token", path: path.clone(), source })?;
        let token = Zeroizing::new(text).trim().to_owned();
        if token.is_empty() {
            return Err(AuthorityError::EmptyToken { path: path.clone() });
        }
        Ok(Some(Zeroizing::new(token)))
    }

    async fn endpoint(&self) -> Result<(Endpoint, Vec<CertificateDer<'static>>), AuthorityError> {
        let pem = match &self.roots {
            Roots::Plaintext => return Ok((Endpoint { address: self.address.clone(), tls: None }, Vec::new())),
            Roots::Pem(pem) => pem.clone().into_bytes(),
            Roots::File(path) => {
                let read = tokio::fs::read(path).await;
                read.map_err(|source| AuthorityError::Read {
                    what: "root certificate of the CA",
                    path: path.clone(),
                    source,
                })?
            }
        };
        let roots = certificates("the root certificate of the CA", &pem).map_err(AuthorityError::Roots)?;
        let own = self.provisioned.as_ref().filter(|files| files.exist());
        let own = own.map(Files::load).transpose().map_err(AuthorityError::Provisioned)?;
        let config =
            tls::client_config(&roots, own.as_ref(), ServerIdentity::Name, &[b"h2"]).map_err(AuthorityError::Tls)?;
        let host = self.address.rsplit_once(':').map_or(self.address.as_str(), |(host, _)| host);
        let name = self.server_name.clone().unwrap_or_else(|| host.trim_matches(['[', ']']).to_owned());
        Ok((Endpoint { address: self.address.clone(), tls: Some((Arc::new(config), name)) }, roots))
    }
}

fn rsa_size(bits: u32) -> RsaKeySize {
    match bits {
        0..=2048 => RsaKeySize::_2048,
        2049..=3072 => RsaKeySize::_3072,
        _ => RsaKeySize::_4096,
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn the_signer_is_named_in_the_metadata() {
        let metadata = Metadata::signer("a.b/c").encode_to_vec();
        // Field 1, an entry of key 1 and value 2, which is a Value with field 3, string_value.
        assert_eq!(metadata, b"\x0a\x15\x0a\x0aCertSigner\x12\x07\x1a\x05a.b/c");
    }
}
