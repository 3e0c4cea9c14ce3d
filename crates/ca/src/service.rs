//! `istio.v1.auth.IstioCertificateService` over gRPC.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_types::SpiffeId;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Extensions, Request, Response, Status};
use tracing::{debug, warn};

use crate::{Authority, SignError};

/// The path of the one method.
pub const METHOD: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// Lifetime of a certificate when the request names none: istiod's DEFAULT_WORKLOAD_CERT_TTL.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);

/// Bytes of a request: a CSR and a few words.
const MAX_REQUEST: usize = 128 << 10;

/// `istio.v1.auth.IstioCertificateRequest`, istio `security/proto/istioca.proto`. `metadata` (4) is of no use to us.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateRequest {
    /// PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// Seconds.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
}

/// `istio.v1.auth.IstioCertificateResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateResponse {
    /// PEM: leaf, intermediates, root.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

/// Says who a caller is.
pub trait Authenticate: Send + Sync + 'static {
    /// The identity proved by the token or the client certificate of a request.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` when nothing is proved.
    fn identity(&self, metadata: &MetadataMap, extensions: &Extensions) -> Result<SpiffeId, Status>;

    /// Hears what became of the request of somebody who is known.
    fn answered(&self, _result: Result<(), &SignError>) {}
}

/// The service, to be added to a tonic router.
pub struct CertificateService<A> {
    authority: Arc<Authority>,
    authenticate: Arc<A>,
}

impl<A> Clone for CertificateService<A> {
    fn clone(&self) -> Self {
        Self { authority: self.authority.clone(), authenticate: self.authenticate.clone() }
    }
}

impl<A: Authenticate> CertificateService<A> {
    /// Signs with `authority` for whom `authenticate` knows.
    pub fn new(authority: Arc<Authority>, authenticate: Arc<A>) -> Self {
        Self { authority, authenticate }
    }

    fn create(&self, request: Request<CertificateRequest>) -> Result<CertificateResponse, Status> {
        let identity = self.authenticate.identity(request.metadata(), request.extensions())?;
        let request = request.into_inner();
        let ttl = match u64::try_from(request.validity_duration) {
            Ok(0) | Err(_) => DEFAULT_TTL,
            Ok(seconds) => Duration::from_secs(seconds),
        };
        let signed = self.authority.sign(request.csr.as_bytes(), &identity, ttl);
        self.authenticate.answered(signed.as_ref().map(drop));
        match signed {
            Ok(cert_chain) => {
                debug!(%identity, ?ttl, "certificate signed");
                Ok(CertificateResponse { cert_chain })
            }
            Err(error @ (SignError::Sign(_) | SignError::Expired)) => {
                warn!(%identity, error = %error, "certificate not signed");
                Err(Status::internal(error.to_string()))
            }
            Err(error) => {
                debug!(%identity, error = %error, "certificate request refused");
                Err(Status::invalid_argument(error.to_string()))
            }
        }
    }
}

impl<A: Authenticate> UnaryService<CertificateRequest> for CertificateService<A> {
    type Response = CertificateResponse;
    type Future = std::future::Ready<Result<Response<CertificateResponse>, Status>>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        std::future::ready(self.create(request).map(Response::new))
    }
}

impl<A> NamedService for CertificateService<A> {
    const NAME: &'static str = "istio.v1.auth.IstioCertificateService";
}

impl<A: Authenticate> tonic::codegen::Service<http::Request<Body>> for CertificateService<A> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != METHOD {
                return Ok(Status::unimplemented("the service has the method CreateCertificate only").into_http());
            }
            let codec = tonic_prost::ProstCodec::<CertificateResponse, CertificateRequest>::default();
            let mut grpc = Grpc::new(codec).apply_max_message_size_config(Some(MAX_REQUEST), None);
            Ok(grpc.unary(service, request).await)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Only(&'static str);

    impl Authenticate for Only {
        fn identity(&self, metadata: &MetadataMap, _: &Extensions) -> Result<SpiffeId, Status> {
            match metadata.get("authorization").and_then(|value| value.to_str().ok()) {
                Some("Bearer good") => self.0.parse().map_err(|_| Status::internal("test identity")),
                _ => Err(Status::unauthenticated("no token")),
            }
        }
    }

    fn service() -> CertificateService<Only> {
        let authority = Arc::new(Authority::generate("td").unwrap());
        CertificateService::new(authority, Arc::new(Only("spiffe://td/ns/a/sa/b")))
    }

    fn request(token: &str, csr: String) -> Request<CertificateRequest> {
        let mut request = Request::new(CertificateRequest { csr, validity_duration: 60 });
        request.metadata_mut().insert("authorization", token.parse().unwrap());
        request
    }

    #[test]
    fn callers_without_identity_get_nothing() {
        let status = service().create(request("Bearer bad", String::new())).unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unauthenticated);
        let status = service().create(request("Bearer good", "nonsense".into())).unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
    }

    #[test]
    fn callers_with_identity_get_a_chain() {
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
        let response = service().create(request("Bearer good", csr)).unwrap();
        assert_eq!(response.cert_chain.len(), 2);
    }
}
