//! Connections to the control plane's xDS server, each made with the certificate and token of the moment.

use std::path::Path;
use std::sync::Arc;

use ads::client::{ConnectError, Connection, Connector};
use anyhow::Context;
use identity::tls::{ServerIdentity, client_config};
use identity::{Endpoint, Roots, WorkloadCertificate};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::sync::watch;

use crate::settings::Discovery;

/// A connector for an ADS client.
pub(crate) fn connector(
    discovery: Discovery,
    certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>,
) -> Connector {
    Box::new(move || {
        let (discovery, certificate) = (discovery.clone(), certificate.clone());
        Box::pin(
            async move { connect(&discovery, certificate).await.map_err(|e| ConnectError::from(format!("{e:#}"))) },
        )
    })
}

async fn connect(
    discovery: &Discovery,
    mut certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>,
) -> anyhow::Result<Connection> {
    let pem = match &discovery.roots {
        Roots::Plaintext => None,
        Roots::Pem(pem) => Some(pem.clone().into_bytes()),
        Roots::File(path) => Some(
            tokio::fs::read(path)
                .await
                .with_context(|| format!("root certificate {} cannot be read", path.display()))?,
        ),
    };
    let tls = match pem {
        None => None,
        Some(pem) => {
            // The stream proves the workload's identity with its certificate, so that must be there first.
            let own = certificate.wait_for(Option::is_some).await.context("the agent is ending")?.clone();
            let mut roots: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem)
                .collect::<Result<_, _>>()
                .context("the control plane's root certificate")?;
            // While the root is being replaced, the control plane may already use the new one.
            if let Some(own) = &own {
                let fresh: Vec<_> = own.roots.iter().filter(|root| !roots.contains(root)).cloned().collect();
                roots.extend(fresh);
            }
            let config = client_config(&roots, own.as_deref(), ServerIdentity::Name, &[b"h2"])
                .context("TLS to the control plane")?;
            Some((Arc::new(config), discovery.server_name.clone()))
        }
    };
    let authorization = match &discovery.token {
        // A token over plaintext would be anybody's.
        Some(path) if tls.is_some() => token(path).await,
        _ => None,
    };
    let channel = Endpoint { address: discovery.address.clone(), tls }.connect().await?;
    Ok(Connection { channel, authorization, metadata: Vec::new() })
}

/// The token, if it can be read; the certificate is enough for a control plane that has signed it.
async fn token(path: &Path) -> Option<String> {
    let token = tokio::fs::read_to_string(path).await.ok()?;
    let token = token.trim();
    (!token.is_empty()).then(|| format!("Bearer {token}"))
}
