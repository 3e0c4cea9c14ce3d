use std::sync::Arc;

use mesh_types::ArcStr;
use serde_json::{Map, Value};

use crate::any::Typed;
use crate::endpoints::Host;
use crate::format::FormatContext;
use crate::metadata::{self, Metadata};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::tls::UpstreamTls;
use crate::tlv::{AddedTlv, Tlv, TlvFilter};

/// How bytes travel to a host.
#[derive(Clone, Debug)]
pub enum TransportSocket {
    /// As they are.
    Raw,
    /// In TLS.
    Tls(Arc<UpstreamTls>),
    /// Behind a PROXY protocol header.
    ProxyProtocol { header: Arc<ProxyHeader>, inner: Box<TransportSocket> },
}

/// A compiled `ProxyProtocolConfig` of hosts.
#[derive(Debug)]
pub struct ProxyHeader {
    /// 1 or 2.
    pub version: u8,
    added: Box<[AddedTlv]>,
    passed: TlvFilter,
    /// Connections that are told other fields are others.
    pub keyed: bool,
}

impl ProxyHeader {
    /// The fields for a host: its own, the configuration's, then what the client sent; of a type only the first of these
    /// has any (Envoy `UpstreamProxyProtocolSocket::buildCustomTLVs`).
    pub fn tlvs(&self, host: &Host, cx: &FormatContext<'_>) -> Vec<Tlv> {
        if self.version == 1 {
            return Vec::new();
        }
        let mut all: Vec<Tlv> = Vec::new();
        let sent = cx.info.connection.tlvs.iter().filter(|tlv| self.passed.passes(tlv.kind)).cloned();
        let sources: [&mut dyn Iterator<Item = Tlv>; 3] =
            [&mut host.tlvs.iter().map(|tlv| tlv.tlv(cx)), &mut self.added.iter().map(|tlv| tlv.tlv(cx)), &mut {
                sent
            }];
        for source in sources {
            let before = all.len();
            for tlv in source {
                if all[..before].iter().all(|known| known.kind != tlv.kind) {
                    all.push(tlv);
                }
            }
        }
        all
    }
}

/// A transport for hosts with certain metadata.
#[derive(Clone, Debug)]
pub struct TransportMatch {
    /// Its name.
    pub name: ArcStr,
    /// All of these must be in the host's `envoy.transport_socket_match`; none: every host.
    criteria: Map<String, Value>,
    /// The transport.
    pub socket: TransportSocket,
}

/// The transports of a cluster.
#[derive(Clone, Debug)]
pub struct TransportSockets {
    /// In the order in which they are tried.
    pub matches: Vec<TransportMatch>,
    /// For hosts that none of them fits.
    pub default: TransportSocket,
}

const NAMESPACE: &str = "envoy.transport_socket_match";

impl TransportSockets {
    pub(super) fn compile(cluster: &pb::cluster::Cluster) -> Compiled<Self> {
        let mut matches = Vec::with_capacity(cluster.transport_socket_matches.len());
        for (i, entry) in cluster.transport_socket_matches.iter().enumerate() {
            matches.push(TransportMatch {
                name: entry.name.as_str().into(),
                criteria: entry.r#match.as_ref().map(metadata::object).unwrap_or_default(),
                socket: TransportSocket::compile(entry.transport_socket.as_ref())
                    .at_index("transport_socket_matches", i)?,
            });
        }
        Ok(Self {
            matches,
            default: TransportSocket::compile(cluster.transport_socket.as_ref()).at("transport_socket")?,
        })
    }

    /// The first match that the host's metadata (or its locality's) fulfils, else the default.
    pub(super) fn choose(&self, host: &Metadata, locality: Option<&Metadata>) -> (&TransportSocket, Option<&ArcStr>) {
        // The host's own fields count; the locality's only if the host has none at all.
        let fields = host.namespace(NAMESPACE).or_else(|| locality?.namespace(NAMESPACE));
        self.choose_by(|key| fields?.get(key))
    }

    /// The first match whose criteria are all there, else the default.
    pub(super) fn choose_by<'a>(
        &self,
        field: impl Fn(&str) -> Option<&'a Value>,
    ) -> (&TransportSocket, Option<&ArcStr>) {
        let fits = |found: &&TransportMatch| found.criteria.iter().all(|(key, value)| field(key) == Some(value));
        match self.matches.iter().find(fits) {
            Some(found) => (&found.socket, Some(&found.name)),
            None => (&self.default, None),
        }
    }

    /// All TLS contexts, for finding the secrets they need.
    pub fn tls_contexts(&self) -> impl Iterator<Item = &Arc<UpstreamTls>> {
        self.matches.iter().map(|m| &m.socket).chain([&self.default]).filter_map(|socket| socket.tls())
    }
}

impl TransportSocket {
    fn compile(socket: Option<&pb::core::TransportSocket>) -> Compiled<Self> {
        use pb::core::transport_socket::ConfigType;
        let Some(socket) = socket else { return Ok(Self::Raw) };
        let typed = Typed::open(socket.config_type.as_ref().map(|ConfigType::TypedConfig(any)| any))?;
        match typed.name.as_str() {
            "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => Ok(Self::Raw),
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => {
                Ok(Self::Tls(Arc::new(UpstreamTls::compile(&typed.decode()?)?)))
            }
            "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport" => {
                let config: pb::ext::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport =
                    typed.decode()?;
                refuse!("allow_unspecified_address": config.allow_unspecified_address);
                if config.transport_socket.is_none() {
                    return Err(Invalid::new("transport_socket", "is missing"));
                }
                let header = config.config.clone().unwrap_or_default();
                let proxy = ProxyHeader {
                    version: if header.version == 1 { 2 } else { 1 },
                    added: AddedTlv::compile_all(&header.added_tlvs).at("config.added_tlvs")?,
                    passed: TlvFilter::compile(header.pass_through_tlvs.as_ref()).at("config.pass_through_tlvs")?,
                    keyed: config.tlv_as_pool_key,
                };
                let inner = Self::compile(config.transport_socket.as_ref()).at("transport_socket")?;
                Ok(Self::ProxyProtocol { header: Arc::new(proxy), inner: Box::new(inner) })
            }
            _ => Err(typed.unknown()),
        }
    }

    /// The TLS context, if there is one.
    pub fn tls(&self) -> Option<&Arc<UpstreamTls>> {
        match self {
            Self::Raw => None,
            Self::Tls(tls) => Some(tls),
            Self::ProxyProtocol { inner, .. } => inner.tls(),
        }
    }
}
