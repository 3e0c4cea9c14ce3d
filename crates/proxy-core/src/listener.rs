//! Listeners: what they inspect, which filter chain a connection gets, which listener a redirected connection belongs to.

mod inspect;
mod matching;
mod network;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_types::ArcStr;
use prost::Message;

pub use inspect::ProxyProtocol;
pub use inspect::{Fingerprints, Inspect, PortPredicate};
pub(crate) use matching::is_same_ip_or_loopback;
pub use matching::{ChainInput, ChainTable};
use matching::{Selected, Selection};
pub(crate) use network::compile_upstream;
pub use network::{
    ConnectionLimit, MetadataExchange, NetworkFilter, NetworkLocalRateLimit, Place, SniForwardProxy, TcpClusters,
    TcpProxy, Terminal, Tunneling,
};

use crate::access_log::AccessLog;
use crate::address::Address;
use crate::any::Typed;
use crate::metadata::Metadata;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, Result, refuse};
use crate::rules;
use crate::runtime::Live;
use crate::tls::DownstreamTls;
use crate::{Options, fields};

/// Which way traffic of a listener goes.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Direction {
    /// Not said.
    #[default]
    Unspecified,
    /// To the workload.
    Inbound,
    /// From the workload.
    Outbound,
}

/// A compiled listener.
#[derive(Debug)]
pub struct Listener {
    /// Its name; equal names replace each other.
    pub name: ArcStr,
    /// Where it listens, if it does.
    pub address: Address,
    /// Further addresses, for instance the IPv6 one.
    pub additional_addresses: Vec<Address>,
    /// Whether a socket is bound at all. Others get connections through [`ListenerSet::find_original_dst`].
    pub bind_to_port: bool,
    /// Hand connections over to the listener of their original destination.
    pub use_original_dst: bool,
    /// IP_TRANSPARENT on the socket (TPROXY).
    pub transparent: bool,
    /// Its connections do not count in the sum that is limited.
    pub ignore_connection_limit: bool,
    /// Its own limit of connections, which only the runtime sets.
    connection_limit: Live<u64>,
    /// Shared by all states of the listener.
    open: Arc<AtomicU64>,
    /// Its connections go when it changes, not when the proxy's health checks are made to fail.
    pub drains_when_modified_only: bool,
    /// It serves whatever runs short.
    pub bypass_overload: bool,
    /// IP_FREEBIND on the socket.
    pub freebind: bool,
    /// SO_REUSEPORT, one socket a worker.
    pub reuse_port: bool,
    /// Which way traffic goes.
    pub direction: Direction,
    /// What is looked at before the filter chain is chosen.
    pub inspect: Inspect,
    /// How long inspection may take; zero: as long as it wants.
    pub listener_filters_timeout: Duration,
    /// After that, go on with what is known instead of closing.
    pub continue_on_listener_filters_timeout: bool,
    /// Bytes that may be buffered in a connection.
    pub per_connection_buffer_limit: u32,
    /// listen(2)'s backlog; `None`: the system's.
    pub tcp_backlog: Option<u32>,
    /// Keep-alive probes on accepted connections.
    pub keepalive: Option<TcpKeepalive>,
    /// Plain socket options, to be set as they are.
    pub socket_options: Vec<SocketOption>,
    /// Logs for connections without a filter chain.
    pub access_log: Vec<Arc<AccessLog>>,
    /// The chains in the order of the configuration.
    pub chains: Vec<Arc<FilterChain>>,
    /// For connections that match none.
    pub default_chain: Option<Arc<FilterChain>>,
    /// Prefix of its statistics.
    pub stat_prefix: ArcStr,
    /// The listener's metadata.
    pub metadata: Arc<Metadata>,
    selection: Selection,
}

/// TCP keep-alive; `None`: the system's value.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TcpKeepalive {
    /// Probes before giving up.
    pub probes: Option<u32>,
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
}

impl TcpKeepalive {
    pub(crate) fn compile(keepalive: &pb::core::TcpKeepalive) -> Self {
        let seconds = |v: &Option<pb::UInt32Value>| v.as_ref().map(|v| Duration::from_secs(v.value.into()));
        Self {
            probes: keepalive.keepalive_probes.as_ref().map(|v| v.value),
            time: seconds(&keepalive.keepalive_time),
            interval: seconds(&keepalive.keepalive_interval),
        }
    }
}

/// An option for setsockopt(2).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SocketOption {
    /// Level.
    pub level: i64,
    /// Name.
    pub name: i64,
    /// Value: bytes, an integer in native order.
    pub value: Vec<u8>,
    /// When: 0 before bind, 1 after bind, 2 while listening.
    pub state: i32,
}

impl SocketOption {
    pub(crate) fn compile(option: &pb::core::SocketOption) -> Compiled<Self> {
        use pb::core::socket_option::Value;
        let value = match &option.value {
            Some(Value::IntValue(n)) => i32::try_from(*n)
                .map_err(|_| Invalid::new("int_value", format!("{n} does not fit")))?
                .to_ne_bytes()
                .to_vec(),
            Some(Value::BufValue(bytes)) => bytes.clone(),
            None => return Err(Invalid::new("value", "is missing")),
        };
        Ok(Self { level: option.level, name: option.name, value, state: option.state })
    }
}

/// What happens to connections of one kind.
#[derive(Debug)]
pub struct FilterChain {
    /// Its name; may be empty.
    pub name: ArcStr,
    /// Equal hashes mean an unchanged chain: its connections stay over a listener update.
    pub hash: u64,
    /// TLS is terminated with this.
    pub tls: Option<Arc<DownstreamTls>>,
    /// The handshake may take this long.
    pub transport_socket_connect_timeout: Option<Duration>,
    /// Run in this order before the terminal filter.
    pub filters: Vec<NetworkFilter>,
    /// Where the bytes go.
    pub terminal: Terminal,
    /// The chain's metadata.
    pub metadata: Arc<Metadata>,
}

/// An open connection of a listener; it counts until it is dropped.
#[derive(Debug)]
pub struct OpenConnection(Arc<AtomicU64>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Listener {
    /// One more connection, unless there are as many as there may be.
    pub fn open(&self) -> Option<OpenConnection> {
        let most = self.connection_limit.get();
        let more = |open| (open < most).then_some(open + 1);
        self.open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
            .then(|| OpenConnection(self.open.clone()))
    }

    /// Takes over the connections of the state that it replaces: they count against its limit.
    pub fn replaces(&mut self, previous: &Listener) {
        self.open = previous.open.clone();
    }

    /// Compiles a `config.listener.v3.Listener`.
    pub fn compile(listener: &pb::listener::Listener, options: &Options) -> Result<Self> {
        rules::check(listener)
            .and_then(|()| Self::build(listener, options))
            .map_err(|invalid| invalid.of("listener", &listener.name))
    }

    fn build(listener: &pb::listener::Listener, options: &Options) -> Compiled<Self> {
        use pb::listener::listener::connection_balance_config::BalanceType as Balance;
        refuse! {
            "api_listener": listener.api_listener.is_some(),
            "fcds_config": listener.fcds_config.is_some(),
            "listener_specifier": listener.listener_specifier.is_some(),
            "udp_listener_config": listener.udp_listener_config.as_ref().is_some_and(|u| u.quic_options.is_some()),
            "enable_mptcp": listener.enable_mptcp,
            "connection_balance_config": listener
                .connection_balance_config
                .as_ref()
                .and_then(|c| c.balance_type.as_ref())
                .is_some_and(|kind| !matches!(kind, Balance::ExactBalance(_))),
            "stats_matcher": listener.stats_matcher.is_some(),
            "per_connection_buffer_high_watermark_timeout":
                listener.per_connection_buffer_high_watermark_timeout.is_some(),
        }
        let mut chains = Vec::with_capacity(listener.filter_chains.len());
        for (i, chain) in listener.filter_chains.iter().enumerate() {
            chains.push(Arc::new(FilterChain::compile(chain, options).at_index("filter_chains", i)?));
        }
        let default_chain = match &listener.default_filter_chain {
            Some(chain) => Some(Arc::new(FilterChain::compile(chain, options).at("default_filter_chain")?)),
            None => None,
        };
        if chains.is_empty() && default_chain.is_none() {
            return Err(Invalid::new("filter_chains", "no filter chains specified"));
        }
        let address = Address::compile(listener.address.as_ref()).at("address")?;
        let mut additional_addresses = Vec::new();
        for (i, additional) in listener.additional_addresses.iter().enumerate() {
            additional_addresses
                .push(Address::compile(additional.address.as_ref()).at_index("additional_addresses", i)?);
        }
        // `deprecated_v1.bind_to_port` is what older control planes still send.
        let old_bind = listener.deprecated_v1.as_ref().and_then(|d| d.bind_to_port.as_ref());
        let stat_prefix = match listener.stat_prefix.as_str() {
            "" => address.to_string().replace(':', "_"),
            prefix => prefix.to_owned(),
        };
        Ok(Self {
            name: listener.name.as_str().into(),
            additional_addresses,
            bind_to_port: fields::flag(listener.bind_to_port.as_ref().or(old_bind), true),
            use_original_dst: fields::flag(listener.use_original_dst.as_ref(), false),
            transparent: fields::flag(listener.transparent.as_ref(), false),
            connection_limit: options
                .runtime
                .live(&format!("envoy.resource_limits.listener.{}.connection_limit", listener.name), u64::MAX),
            open: Arc::default(),
            drains_when_modified_only: listener.drain_type != 0,
            ignore_connection_limit: listener.ignore_global_conn_limit,
            bypass_overload: listener.bypass_overload_manager,
            freebind: fields::flag(listener.freebind.as_ref(), false),
            reuse_port: fields::flag(listener.enable_reuse_port.as_ref(), true),
            direction: match listener.traffic_direction {
                1 => Direction::Inbound,
                2 => Direction::Outbound,
                _ => Direction::Unspecified,
            },
            inspect: Inspect::compile(&listener.listener_filters)?,
            listener_filters_timeout: fields::duration(
                "listener_filters_timeout",
                listener.listener_filters_timeout.as_ref(),
            )?
            .unwrap_or(Duration::from_secs(15)),
            continue_on_listener_filters_timeout: listener.continue_on_listener_filters_timeout,
            per_connection_buffer_limit: fields::uint(listener.per_connection_buffer_limit_bytes.as_ref(), 1 << 20),
            tcp_backlog: listener.tcp_backlog_size.as_ref().map(|v| v.value),
            keepalive: listener.tcp_keepalive.as_ref().map(TcpKeepalive::compile),
            socket_options: listener
                .socket_options
                .iter()
                .map(SocketOption::compile)
                .collect::<Compiled<_>>()
                .at("socket_options")?,
            access_log: AccessLog::compile_all(&listener.access_log, options)?,
            selection: Selection::compile(listener, options)?,
            metadata: Arc::new(Metadata::compile(listener.metadata.as_ref())),
            stat_prefix: stat_prefix.into(),
            address,
            chains,
            default_chain,
        })
    }

    /// The filter chain for a connection: by Envoy's order of criteria or by the matcher tree, then the default chain.
    /// `None`: the connection is closed (flag `NR`, details `filter_chain_not_found`).
    pub fn find_chain(&self, input: &ChainInput<'_>) -> Option<&Arc<FilterChain>> {
        match self.selection.find(input) {
            Selected::Chain(index) => self.chains.get(index),
            Selected::Default => self.default_chain.as_ref(),
            Selected::Nothing => None,
        }
    }

    /// All chains, the default one last.
    pub fn all_chains(&self) -> impl Iterator<Item = &Arc<FilterChain>> {
        self.chains.iter().chain(&self.default_chain)
    }

    /// Names of the route configurations that its chains wait for.
    pub fn rds_names(&self) -> impl Iterator<Item = &ArcStr> {
        self.all_chains().filter_map(|chain| match &chain.terminal {
            Terminal::Http(hcm) => hcm.rds_name(),
            _ => None,
        })
    }
}

impl FilterChain {
    fn compile(chain: &pb::listener::FilterChain, options: &Options) -> Compiled<Self> {
        refuse!("use_proxy_proto": fields::flag(chain.use_proxy_proto.as_ref(), false));
        let (filters, terminal) = network::compile_chain(&chain.filters, options)?;
        Ok(Self {
            name: chain.name.as_str().into(),
            hash: hash(chain),
            tls: match &chain.transport_socket {
                None => None,
                Some(socket) => downstream_tls(socket).at("transport_socket")?,
            },
            transport_socket_connect_timeout: fields::duration_or_off(
                "transport_socket_connect_timeout",
                chain.transport_socket_connect_timeout.as_ref(),
                None,
            )?,
            filters,
            terminal,
            metadata: Arc::new(Metadata::compile(chain.metadata.as_ref())),
        })
    }
}

fn downstream_tls(socket: &pb::core::TransportSocket) -> Compiled<Option<Arc<DownstreamTls>>> {
    use pb::core::transport_socket::ConfigType;
    let typed = Typed::open(socket.config_type.as_ref().map(|ConfigType::TypedConfig(any)| any))?;
    match typed.name.as_str() {
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => Ok(None),
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext" => {
            Ok(Some(Arc::new(DownstreamTls::compile(&typed.decode()?)?)))
        }
        _ => Err(typed.unknown()),
    }
}

/// Metadata is a map, whose encoding has no fixed order; it is hashed in its sorted form.
fn hash(chain: &pb::listener::FilterChain) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut chain = chain.clone();
    let metadata = Metadata::compile(chain.metadata.take().as_ref());
    chain.encode_to_vec().hash(&mut hasher);
    format!("{metadata:?}").hash(&mut hasher);
    hasher.finish()
}

/// All listeners by address, for handing over redirected connections.
#[derive(Debug, Default)]
pub struct ListenerSet {
    by_address: HashMap<SocketAddr, Arc<Listener>>,
}

impl ListenerSet {
    /// Later listeners of an address do not replace earlier ones.
    pub fn new(listeners: impl IntoIterator<Item = Arc<Listener>>) -> Self {
        let mut by_address = HashMap::new();
        for listener in listeners {
            for address in std::iter::once(&listener.address).chain(&listener.additional_addresses) {
                if let Some(socket) = address.socket() {
                    by_address.entry(socket).or_insert_with(|| Arc::clone(&listener));
                }
            }
        }
        Self { by_address }
    }

    /// The listener that serves a connection which `from` accepted and which wanted to go to `destination`
    /// (Envoy `ConnectionHandlerImpl::getBalancedHandlerByAddress`): the one of this very address, else the wildcard one
    /// of its port, else `from` itself.
    pub fn find_original_dst<'a>(&'a self, from: &'a Arc<Listener>, destination: SocketAddr) -> &'a Arc<Listener> {
        let any: IpAddr = match destination {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        self.by_address
            .get(&destination)
            .or_else(|| self.by_address.get(&SocketAddr::new(any, destination.port())))
            .unwrap_or(from)
    }
}

#[cfg(test)]
mod tests;
