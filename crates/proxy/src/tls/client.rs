//! Upstream TLS contexts.

use super::verify::ServerVerifier;
use super::{Current, SecretStore, TlsError, info, peer_certificate, provider_for, versions};
use crate::io::Raw;
use mesh_types::ArcStr;
use proxy_core::TlsInfo;
use proxy_core::stream_info::PeerCertificate;
use proxy_core::tls::UpstreamTls;
use rustls::ClientConfig;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::sign::CertifiedKey;
use rustls_pki_types::ServerName;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use tokio_rustls::{TlsConnector, client::TlsStream};

/// A cluster's TLS, compiled when needed, once per ALPN list (Istio's alpn filter overrides it per route).
pub(crate) struct ClientTls {
    context: Arc<UpstreamTls>,
    /// The certificate must be for the SNI (`auto_san_validation`).
    match_name: bool,
    current: Current<Compiled>,
}

struct Compiled {
    config: Arc<ClientConfig>,
    local: Option<PeerCertificate>,
    validates: bool,
}

/// Presents one certificate whatever the server's hints are.
#[derive(Debug)]
struct Single(Option<Arc<CertifiedKey>>);

impl ResolvesClientCert for Single {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

impl ClientTls {
    pub(crate) fn new(context: Arc<UpstreamTls>, match_name: bool) -> Self {
        let match_name = match_name || context.auto_sni_san_validation;
        Self { context, match_name, current: Current::default() }
    }

    /// All of the context's protocols. Without them, those that say who the peer is are not offered.
    pub(crate) fn alpn(&self) -> &[Vec<u8>] {
        &self.context.common.alpn
    }

    /// The context says nothing about ALPN: the protocol of the cluster decides.
    pub(crate) fn has_no_alpn(&self) -> bool {
        self.context.common.alpn.is_empty()
    }

    fn compile(&self, secrets: &SecretStore) -> Result<Compiled, TlsError> {
        let common = &self.context.common;
        let key = secrets.certificates(common)?.into_iter().next();
        let (validation, roots) = secrets.validation(common)?;
        let validates = !roots.is_empty();
        let verifier = ServerVerifier::new(validation, &roots, self.match_name);
        let local = key.as_ref().and_then(|k| peer_certificate(&k.cert));
        let mut config = ClientConfig::builder_with_provider(provider_for(common)?)
            .with_protocol_versions(versions(common))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(Single(key)));
        config.resumption = match self.context.max_session_keys {
            0 => Resumption::disabled(),
            keys => Resumption::in_memory_sessions(keys.min(8) as usize),
        };
        config.alpn_protocols = super::spoken(&common.alpn);
        Ok(Compiled { config: Arc::new(config), local, validates })
    }

    /// Shakes hands. `server_name`: SNI instead of the context's; `host`: the endpoint's name, may be empty; `alpn`: protocols instead of the context's.
    pub(crate) async fn connect(
        &self,
        raw: Raw,
        secrets: &SecretStore,
        server_name: Option<&ArcStr>,
        host: &ArcStr,
        alpn: Option<&[Vec<u8>]>,
    ) -> io::Result<(Box<TlsStream<Raw>>, TlsInfo)> {
        let compiled = self.current.get(secrets, || self.compile(secrets)).map_err(io::Error::other)?;
        let of_host = (self.context.auto_host_sni && !host.is_empty()).then_some(host);
        let sni: Option<ArcStr> = server_name.or(of_host).or(self.context.sni.as_ref()).cloned();
        let name = match sni.as_deref().filter(|s| !s.is_empty()) {
            Some(sni) => ServerName::try_from(sni.to_owned()).map_err(io::Error::other)?,
            // An address as the name means that no SNI is sent.
            None => ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into()),
        };
        let connector = TlsConnector::from(compiled.config.clone());
        let stream = match alpn {
            Some(alpn) => Box::pin(connector.with_alpn(alpn.to_vec()).connect(name, raw)).await?,
            None => Box::pin(connector.connect(name, raw)).await?,
        };
        let (_, session) = stream.get_ref();
        let info = info(session, sni.as_deref(), compiled.local.as_ref(), compiled.validates);
        Ok((Box::new(stream), info))
    }
}
