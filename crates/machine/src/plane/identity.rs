//! What proves who is who inside `up`: service account tokens for pods, and a certificate for published ports.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ca::{Authority, TokenIssuer, TokenRequest};
use identity::WorkloadCertificate;
use identity::tls::{ServerIdentity, client_config};
use mesh_types::SpiffeId;
use rcgen::{CertificateParams, KeyPair};

use crate::pod::facts::Facts;
use crate::pod::volumes::Tokens;

/// Namespace and account of the published ports' identity, for use in authorization policies.
const GATEWAY: (&str, &str) = ("istio-system", "outrigger-gateway");

/// Tokens for pods, signed by the mesh's own key.
pub(super) struct PodTokens(pub(super) TokenIssuer);

impl Tokens for PodTokens {
    fn issue(&self, pod: &Facts, audience: &str, ttl: Duration) -> Result<String, String> {
        let request = TokenRequest {
            namespace: pod.namespace().to_owned(),
            service_account: pod.service_account().to_owned(),
            pod: pod.name().to_owned(),
            uid: pod.uid().to_owned(),
            audience: audience.to_owned(),
            ttl,
        };
        self.0.issue(&request).map_err(|error| format!("service account token: {error}"))
    }
}

/// TLS towards sidecars with an identity of its own. The key never leaves the process, and the certificate lasts as long as a CA of
/// one run signs.
pub(super) fn gateway(authority: &Authority, trust_domain: &str) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let id = SpiffeId::new(trust_domain, GATEWAY.0, GATEWAY.1)?;
    let key = KeyPair::generate().context("make a key")?;
    let request = CertificateParams::default()
        .serialize_request(&key)
        .and_then(|request| request.pem())
        .context("make a request")?;
    let chain = authority.sign(request.as_bytes(), &id, ca::MAX_TTL).context("sign it")?.concat();
    let certificate = WorkloadCertificate::from_pem(
        chain.as_bytes(),
        key.serialize_pem().as_bytes(),
        authority.trust_bundle().as_bytes(),
    )?;
    let roots = certificate.roots.clone();
    let peers = ServerIdentity::TrustDomains(vec![trust_domain.to_owned()]);
    // `istio` is what sidecars take for mutual TLS of the mesh, whatever runs inside.
    let mut config = client_config(&roots, Some(&certificate), peers, &[b"istio"])?;
    config.enable_sni = false;
    Ok(Arc::new(config))
}
