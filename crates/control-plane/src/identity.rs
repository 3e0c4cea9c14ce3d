//! Who is at the other end: by client certificate, or by service account token.

use std::sync::Arc;

use ads::server::Peer;
use ca::{Authenticate, SignError, TokenVerifier};
use kube_source::{Cluster, ReviewError};
use mesh_types::SpiffeId;
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Status};
use tracing::debug;

use crate::metrics::Metrics;
use crate::world::World;

/// What proves that a token is good.
#[derive(Clone, Debug)]
pub enum Tokens {
    /// The issuer's public keys.
    Keys(Arc<TokenVerifier>),
    /// The API server that issued it, asked each time, which knows accounts and pods that are gone.
    Review(Cluster),
}

impl From<TokenVerifier> for Tokens {
    fn from(verifier: TokenVerifier) -> Self {
        Tokens::Keys(Arc::new(verifier))
    }
}

impl From<Cluster> for Tokens {
    fn from(cluster: Cluster) -> Self {
        Tokens::Review(cluster)
    }
}

/// Verifies callers against the mesh's trust domain.
#[derive(Clone)]
pub(crate) struct Identities {
    pub(crate) world: World,
    pub(crate) tokens: Tokens,
    /// A token for any of these is accepted.
    pub(crate) audiences: Arc<[String]>,
}

impl Identities {
    /// The identity that a connection's certificate or a request's token proves.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` when neither does, `UNAVAILABLE` when nobody can say.
    pub(crate) async fn verify(&self, certificate: Option<&SpiffeId>, token: Option<&str>) -> Result<SpiffeId, Status> {
        let mesh = self.world.current().mesh.clone();
        // As istiod: the token first, since an agent that renews sends both.
        if let Some(token) = token {
            match self.of_token(token, &mesh.trust_domain).await {
                Ok(identity) => return Ok(identity),
                Err(status) => {
                    debug!(reason = status.message(), "token refused");
                    // A stale token beside a good certificate does no harm.
                    if certificate.is_none() {
                        return Err(status);
                    }
                }
            }
        }
        let identity = certificate.ok_or_else(|| {
            Status::unauthenticated("neither a service account token nor a client certificate was shown")
        })?;
        let domain = identity.trust_domain();
        if domain != mesh.trust_domain && !mesh.trust_domain_aliases.iter().any(|alias| alias == domain) {
            return Err(Status::unauthenticated(format!("trust domain {domain:?} is not this mesh's")));
        }
        Ok(identity.clone())
    }

    async fn of_token(&self, token: &str, trust_domain: &str) -> Result<SpiffeId, Status> {
        match &self.tokens {
            Tokens::Keys(verifier) => {
                let mut last = Status::unauthenticated("no audience is accepted");
                for audience in self.audiences.iter() {
                    match verifier.verify(token, audience).and_then(|claims| claims.identity(trust_domain)) {
                        Ok(identity) => return Ok(identity),
                        Err(error) => {
                            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                            last = Status::unauthenticated(format!("{error}: {cause}"));
                        }
                    }
                }
                Err(last)
            }
            Tokens::Review(cluster) => match cluster.review_token(token, &self.audiences).await {
                Ok(account) => SpiffeId::new(trust_domain, &account.namespace, &account.name)
                    .map_err(|_| Status::unauthenticated("the token's subject is no identity")),
                Err(error @ ReviewError::Unavailable(_)) => Err(Status::unavailable(error.to_string())),
                Err(error) => Err(Status::unauthenticated(error.to_string())),
            },
        }
    }
}

/// The bearer token of a request, if it shows one.
pub(crate) fn bearer(headers: &http::HeaderMap) -> Option<&str> {
    headers.get(http::header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// Takes the identity that the secure port has verified before anything else saw the request.
pub(crate) struct Verified(pub(crate) Arc<Metrics>);

impl Authenticate for Verified {
    fn identity(&self, _: &MetadataMap, extensions: &Extensions) -> Result<SpiffeId, Status> {
        let identity = extensions.get::<Peer>().and_then(|peer| peer.identity.clone());
        identity.ok_or_else(|| Status::unauthenticated("nobody has verified who calls"))
    }

    fn answered(&self, result: Result<(), &SignError>) {
        self.0.signed(result);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ca::{TokenIssuer, TokenRequest};
    use istio_api::MeshConfig;

    use super::*;

    fn identities(issuer: &TokenIssuer) -> Identities {
        let (world, _writer) = crate::world::new(MeshConfig::builtin(), "", Default::default(), Arc::default());
        Identities { world, tokens: issuer.verifier().into(), audiences: ["istio-ca".to_owned()].into() }
    }

    #[tokio::test]
    async fn a_token_or_a_certificate_of_this_mesh_proves_who_calls() {
        let issuer = TokenIssuer::generate().unwrap();
        let identities = identities(&issuer);
        let request = TokenRequest {
            namespace: "default".into(),
            service_account: "sleep".into(),
            audience: "istio-ca".into(),
            ttl: Duration::from_secs(60),
            ..TokenRequest::default()
        };
        let token = issuer.issue(&request).unwrap();
        let sleep: SpiffeId = "spiffe://cluster.local/ns/default/sa/sleep".parse().unwrap();
        let other: SpiffeId = "spiffe://evil/ns/default/sa/sleep".parse().unwrap();
        assert_eq!(identities.verify(None, Some(&token)).await.unwrap(), sleep);
        assert_eq!(identities.verify(Some(&sleep), None).await.unwrap(), sleep);
        assert_eq!(identities.verify(Some(&sleep), Some("stale")).await.unwrap(), sleep);
        assert!(identities.verify(None, None).await.is_err());
        assert!(identities.verify(None, Some("forged")).await.is_err());
        assert!(identities.verify(Some(&other), None).await.is_err());
    }
}
