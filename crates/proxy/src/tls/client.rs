//! Upstream TLS contexts.

use super::verify::{Failed, Refused, ServerVerifier, heard, resumed_for_another};
use super::{Current, SecretStore, TlsError, info, peer_certificate, provider_for, versions};
use crate::io::Raw;
use crate::upstream::ServerNames;
use mesh_types::ArcStr;
use proxy_core::TlsInfo;
use proxy_core::stream_info::PeerCertificate;
use proxy_core::tls::UpstreamTls;
use rustls::ClientConfig;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::sign::CertifiedKey;
use rustls_pki_types::ServerName;
use std::io;
use std::sync::Arc;
use tokio_rustls::{TlsConnector, client::TlsStream};

/// A cluster's TLS, compiled when needed, once per ALPN list (Istio's alpn filter overrides it per route).
pub(crate) struct ClientTls {
    context: Arc<UpstreamTls>,
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

/// The name of servers that are asked for by none: an address as the name means that no SNI is sent.
pub(super) fn nameless() -> ServerName<'static> {
    ServerName::from(std::net::Ipv4Addr::UNSPECIFIED)
}

impl ClientTls {
    pub(crate) fn new(context: Arc<UpstreamTls>) -> Self {
        Self { context, current: Current::default() }
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
        let verifier = ServerVerifier::new(validation, &roots, self.context.enforce_rsa_key_usage)?;
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

    /// Shakes hands. `names`: instead of the context's; `host`: the endpoint's name, may be empty; `alpn`: protocols instead of
    /// the context's.
    pub(crate) async fn connect(
        &self,
        raw: Raw,
        secrets: &SecretStore,
        names: &ServerNames,
        host: &ArcStr,
        alpn: Option<&[Vec<u8>]>,
    ) -> Result<(Box<TlsStream<Raw>>, TlsInfo, Option<Refused>), Failed> {
        let unusable = |e: TlsError| Failed::new(io::Error::other(e), None);
        let compiled = self.current.get(secrets, || self.compile(secrets)).map_err(unusable)?;
        let of_host = (self.context.auto_host_sni && !host.is_empty()).then_some(host);
        let sni: Option<ArcStr> = names.sni.as_ref().or(of_host).or(self.context.sni.as_ref()).cloned();
        let name = match sni.as_deref().filter(|s| !s.is_empty()) {
            Some(sni) => ServerName::try_from(sni.to_owned()).map_err(|e| Failed::new(io::Error::other(e), None))?,
            None => nameless(),
        };
        let connector = TlsConnector::from(compiled.config.clone());
        let handshake = match alpn {
            Some(alpn) => connector.with_alpn(alpn.to_vec()).connect(name, raw),
            None => connector.connect(name, raw),
        };
        let of_context = sni.as_ref().filter(|_| self.context.auto_sni_san_validation);
        let expected = names.san.as_ref().or(of_context);
        let (stream, refused) = heard(expected, Box::pin(handshake)).await;
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => return Err(Failed::new(error, refused)),
        };
        let (_, session) = stream.get_ref();
        if let Some(refused) = resumed_for_another(session, expected) {
            return Err(Failed::new(io::ErrorKind::InvalidData.into(), Some(refused)));
        }
        let info = info(session, sni.as_deref(), compiled.local.as_ref(), compiled.validates);
        Ok((Box::new(stream), info, refused))
    }
}
