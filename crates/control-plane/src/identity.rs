//! Who is at the other end: by client certificate, or by service account token.

use std::sync::Arc;

use ads::server::Peer;
use ca::{Authenticate, TokenVerifier};
use mesh_types::SpiffeId;
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Status};
use tracing::debug;

use crate::metrics::Metrics;
use crate::world::World;

/// Verifies callers against the mesh's trust domain.
#[derive(Clone)]
pub(crate) struct Identities {
    pub(crate) world: World,
    pub(crate) tokens: Arc<TokenVerifier>,
    /// A token for any of these is accepted.
    pub(crate) audiences: Arc<[String]>,
    pub(crate) metrics: Arc<Metrics>,
}

impl Identities {
    /// The identity that a connection's certificate or a request's token proves.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` when neither does.
    pub(crate) fn verify(&self, certificate: Option<&SpiffeId>, token: Option<&str>) -> Result<SpiffeId, Status> {
        let mesh = self.world.current().mesh.clone();
        // As istiod: the token first, since an agent that renews sends both.
        if let Some(token) = token {
            let mut reason = None;
            for audience in self.audiences.iter() {
                match self.tokens.verify(token, audience).and_then(|claims| claims.identity(&mesh.trust_domain)) {
                    Ok(identity) => return Ok(identity),
                    Err(error) => reason = Some(error),
                }
            }
            if let Some(error) = reason {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                debug!(%error, cause, "token refused");
                // A stale token beside a good certificate does no harm.
                if certificate.is_none() {
                    return Err(Status::unauthenticated(format!("{error}: {cause}")));
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
}

impl Authenticate for Identities {
    fn identity(&self, metadata: &MetadataMap, extensions: &Extensions) -> Result<SpiffeId, Status> {
        let token = metadata.get("authorization").and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let certificate = extensions.get::<Peer>().and_then(|peer| peer.identity.as_ref());
        self.verify(certificate, token).inspect(|_| self.metrics.csr(true)).inspect_err(|_| self.metrics.csr(false))
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
        Identities {
            world,
            tokens: Arc::new(issuer.verifier()),
            audiences: ["istio-ca".to_owned()].into(),
            metrics: Arc::default(),
        }
    }

    #[test]
    fn a_token_or_a_certificate_of_this_mesh_proves_who_calls() {
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
        assert_eq!(identities.verify(None, Some(&token)).unwrap(), sleep);
        assert_eq!(identities.verify(Some(&sleep), None).unwrap(), sleep);
        assert_eq!(identities.verify(Some(&sleep), Some("stale")).unwrap(), sleep);
        assert!(identities.verify(None, None).is_err());
        assert!(identities.verify(None, Some("forged")).is_err());
        assert!(identities.verify(Some(&other), None).is_err());
    }
}
