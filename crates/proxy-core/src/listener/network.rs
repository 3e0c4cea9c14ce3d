use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_types::ArcStr;

use crate::access_log::AccessLog;
use crate::address::Address;
use crate::any::Typed;
use crate::cluster::NameCache;
use crate::filters::{ExtAuthz, FilterStateValue, IstioStats, TokenBucket, TokenBucketConfig};
use crate::format::{Format, FormatContext};
use crate::hcm::HttpConnectionManager;
use crate::headers::Headers;
use crate::metadata::{FilterState, MetadataMatch};
use crate::rbac::Rbac;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::route::HeaderOps;
use crate::runtime::Live;
use crate::{Jittered, Options, fields, pb};

/// A network filter that does not end the chain.
#[derive(Clone, Debug)]
pub enum NetworkFilter {
    /// Who may connect.
    Rbac(Arc<Rbac>),
    /// Istio's exchange of workload metadata over ALPN `istio-peer-exchange`.
    MetadataExchange(MetadataExchange),
    /// Istio's TCP metrics.
    IstioStats(Arc<IstioStats>),
    /// So many new connections.
    LocalRateLimit(Arc<NetworkLocalRateLimit>),
    /// So many open connections.
    ConnectionLimit(Arc<ConnectionLimit>),
    /// The SNI is the cluster's name.
    SniCluster,
    /// The SNI is resolved and connected to, at this port.
    SniDynamicForwardProxy(Arc<SniForwardProxy>),
    /// Writes filter state when a connection comes.
    SetFilterState(Arc<[FilterStateValue]>),
    /// Asks a service whether the connection may go on.
    ExtAuthz(Arc<ExtAuthz>),
    /// Accepted and without effect here: observers (MySQL, Mongo statistics …) or, if allowed, unsupported ones.
    NoOp { name: ArcStr, type_name: ArcStr },
}

/// A compiled `sni_dynamic_forward_proxy.v3.FilterConfig`.
#[derive(Debug)]
pub struct SniForwardProxy {
    /// What is known of the names.
    pub cache: Arc<NameCache>,
    /// The port of all hosts; without it, that which the client connected to.
    pub port: Option<u16>,
}

/// Configuration of `istio.metadata_exchange` on TCP.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MetadataExchange {
    /// The application protocol that says the peer takes part.
    pub protocol: ArcStr,
    /// Labels told besides those that metrics need.
    pub additional_labels: Vec<ArcStr>,
}

impl MetadataExchange {
    fn of(config: &serde_json::Map<String, serde_json::Value>) -> Compiled<Self> {
        let mut exchange = Self { protocol: "istio-peer-exchange".into(), additional_labels: Vec::new() };
        for (key, value) in config {
            match key.as_str() {
                "protocol" => exchange.protocol = value.as_str().unwrap_or_default().into(),
                "additional_labels" => {
                    let labels = value.as_array().into_iter().flatten().filter_map(|l| l.as_str());
                    exchange.additional_labels = labels.map(ArcStr::from).collect();
                }
                // Needs a provider of workloads in the bootstrap; without one, Envoy finds nobody either.
                "enable_discovery" => {}
                other => return Err(Invalid::unsupported(other)),
            }
        }
        Ok(exchange)
    }
}

/// Limits new connections of a chain, over all workers.
#[derive(Debug)]
pub struct NetworkLocalRateLimit {
    /// Prefix of its statistics.
    pub stat_prefix: ArcStr,
    /// One connection is one token.
    pub bucket: TokenBucketConfig,
    /// Off: all pass.
    pub enabled: Live<bool>,
    tokens: Mutex<Option<TokenBucket>>,
}

impl NetworkLocalRateLimit {
    /// Takes a token for a connection; false: there is none left.
    pub fn take(&self, now: Instant) -> bool {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.get_or_insert_with(|| TokenBucket::new(&self.bucket, now)).take(1, now)
    }
}

/// Limits open connections of a chain.
#[derive(Debug)]
pub struct ConnectionLimit {
    /// Prefix of its statistics.
    pub stat_prefix: ArcStr,
    /// More are closed.
    pub max_connections: u64,
    /// After this time.
    pub delay: Option<Duration>,
    /// Off: all pass.
    pub enabled: Live<bool>,
    active: AtomicU64,
}

impl ConnectionLimit {
    /// A place for a connection while there is one; it is free again when the place is dropped.
    pub fn enter(self: &Arc<Self>) -> Option<Place> {
        let more = |active| (active < self.max_connections).then_some(active + 1);
        self.active.fetch_update(Relaxed, Relaxed, more).is_ok().then(|| Place(self.clone()))
    }

    /// That of one that is refused, which counts until it is closed (Envoy `Config::incrementConnection`).
    pub fn overfill(self: &Arc<Self>) -> Place {
        self.active.fetch_add(1, Relaxed);
        Place(self.clone())
    }
}

/// One of the connections that a [`ConnectionLimit`] counts.
#[derive(Debug)]
pub struct Place(Arc<ConnectionLimit>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

/// The filter that ends a chain.
#[derive(Clone, Debug)]
pub enum Terminal {
    /// Bytes to a cluster.
    TcpProxy(Arc<TcpProxy>),
    /// HTTP.
    Http(Arc<HttpConnectionManager>),
    /// These bytes, then close.
    DirectResponse(Bytes),
    /// Bytes back to the sender.
    Echo,
    /// No filter at all: close.
    Close,
}

/// Where a TCP connection goes.
#[derive(Clone, Debug)]
pub enum TcpClusters {
    /// One cluster.
    Single(ArcStr),
    /// One of several, by weight.
    Weighted { clusters: Box<[TcpClusterWeight]>, total: u64 },
}

/// One of several clusters.
#[derive(Clone, Debug)]
pub struct TcpClusterWeight {
    /// The cluster.
    pub name: ArcStr,
    /// Its share of the total.
    pub weight: u64,
    /// Subset criteria.
    pub metadata_match: Option<MetadataMatch>,
}

/// Configuration of `tcp_proxy`.
#[derive(Debug)]
pub struct TcpProxy {
    /// Prefix of its statistics.
    pub stat_prefix: ArcStr,
    /// Where connections go.
    pub clusters: TcpClusters,
    /// Close after so long without bytes; `None`: never. Default one hour.
    pub idle_timeout: Option<Duration>,
    /// Hosts to try.
    pub max_connect_attempts: u32,
    /// Wait between tries.
    pub backoff: Option<crate::retry::BackOff>,
    /// Close after so long.
    pub max_downstream_connection_duration: Option<Jittered>,
    /// Logs.
    pub access_log: Vec<Arc<AccessLog>>,
    /// Write a log record every so often.
    pub access_log_flush_interval: Option<Duration>,
    /// Write a record when a connection comes.
    pub access_log_on_start: bool,
    /// Write a record when its host took it.
    pub access_log_on_connected: bool,
    /// Subset criteria.
    pub metadata_match: Option<MetadataMatch>,
    /// What ring hash and Maglev choose by.
    pub hash: Option<TcpHash>,
    /// Connections travel inside requests.
    pub tunneling: Option<Tunneling>,
}

/// A `hash_policy` of the TCP proxy.
#[derive(Debug)]
pub enum TcpHash {
    /// The client's address.
    SourceIp,
    /// The object of this name, if it can be hashed (Envoy `Network::HashPolicyImpl`).
    FilterState(ArcStr),
}

/// The request that carries a connection (`tcp_proxy.tunneling_config`).
#[derive(Debug)]
pub struct Tunneling {
    hostname: Format,
    /// POST to this path, instead of CONNECT.
    post: Option<ArcStr>,
    headers: HeaderOps,
    /// The answer's head goes into the filter state.
    pub keeps_headers: bool,
    /// Its trailers do.
    pub keeps_trailers: bool,
}

impl Tunneling {
    fn compile(config: &pb::network_filter::tcp_proxy::v3::tcp_proxy::TunnelingConfig) -> Compiled<Self> {
        if !config.use_post && !config.post_path.is_empty() {
            return Err(Invalid::new("post_path", "needs use_post"));
        }
        let path = if config.post_path.is_empty() { "/" } else { config.post_path.as_str() };
        let hostname: ArcStr = fields::required("hostname", &config.hostname)?;
        Ok(Self {
            hostname: Format::compile(&hostname, false).at("hostname")?,
            post: config.use_post.then(|| path.into()),
            headers: HeaderOps::compile(&config.headers_to_add, &[]).at("headers_to_add")?,
            keeps_headers: config.propagate_response_headers,
            keeps_trailers: config.propagate_response_trailers,
        })
    }

    /// The head of the request for a connection.
    pub fn request(&self, cx: &FormatContext<'_>) -> Headers {
        let mut host = Vec::new();
        self.hostname.write(cx, &mut host);
        let mut headers = Headers::new();
        headers.push(b":method", if self.post.is_some() { b"POST" } else { b"CONNECT" });
        headers.push(b":authority", &host);
        if let Some(path) = &self.post {
            headers.push(b":path", path.as_bytes());
            headers.push(b":scheme", b"http");
        }
        self.headers.apply_to_request(&mut headers, cx);
        headers
    }
}

impl TcpProxy {
    fn compile(proxy: &pb::network_filter::tcp_proxy::v3::TcpProxy, options: &Options) -> Compiled<Self> {
        use pb::kind::hash_policy::PolicySpecifier;
        use pb::network_filter::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
        refuse! {
            "on_demand": proxy.on_demand.is_some(),
            "downstream_idle_timeout": proxy.downstream_idle_timeout.is_some(),
            "upstream_idle_timeout": proxy.upstream_idle_timeout.is_some(),
            "max_early_data_bytes": proxy.max_early_data_bytes.is_some(),
            "upstream_connect_mode": proxy.upstream_connect_mode != 0,
            "proxy_protocol_tlvs": !proxy.proxy_protocol_tlvs.is_empty(),
        }
        let metadata_match = MetadataMatch::compile(proxy.metadata_match.as_ref());
        let clusters = match &proxy.cluster_specifier {
            Some(ClusterSpecifier::Cluster(name)) => TcpClusters::Single(fields::required("cluster", name)?),
            Some(ClusterSpecifier::WeightedClusters(weighted)) => {
                let clusters: Box<[TcpClusterWeight]> = weighted
                    .clusters
                    .iter()
                    .map(|c| TcpClusterWeight {
                        name: c.name.as_str().into(),
                        weight: c.weight.into(),
                        metadata_match: MetadataMatch::compile(c.metadata_match.as_ref())
                            .map(|m| m.merged_over(metadata_match.as_ref())),
                    })
                    .collect();
                let total = clusters.iter().map(|c| c.weight).sum();
                if total == 0 {
                    return Err(Invalid::new("weighted_clusters", "weights are all zero"));
                }
                TcpClusters::Weighted { clusters, total }
            }
            None => return Err(Invalid::new("cluster", "is missing")),
        };
        let hash = proxy.hash_policy.iter().find_map(|policy| match policy.policy_specifier.as_ref()? {
            PolicySpecifier::SourceIp(_) => Some(TcpHash::SourceIp),
            PolicySpecifier::FilterState(state) => Some(TcpHash::FilterState(state.key.as_str().into())),
        });
        let log_interval = proxy.access_log_options.as_ref().and_then(|o| o.access_log_flush_interval.as_ref());
        Ok(Self {
            stat_prefix: fields::required("stat_prefix", &proxy.stat_prefix)?,
            clusters,
            idle_timeout: fields::duration_or_off(
                "idle_timeout",
                proxy.idle_timeout.as_ref(),
                Some(Duration::from_secs(3600)),
            )?,
            max_connect_attempts: fields::uint(proxy.max_connect_attempts.as_ref(), 1).max(1),
            backoff: proxy
                .backoff_options
                .as_ref()
                .map(crate::retry::BackOff::of_strategy)
                .transpose()
                .at("backoff_options")?,
            max_downstream_connection_duration: fields::duration_or_off(
                "max_downstream_connection_duration",
                proxy.max_downstream_connection_duration.as_ref(),
                None,
            )?
            .map(|least| Jittered {
                least,
                percent: proxy.max_downstream_connection_duration_jitter_percentage.map_or(0.0, |jitter| jitter.value),
            }),
            access_log: AccessLog::compile_all(&proxy.access_log, options)?,
            access_log_flush_interval: fields::duration_or_off(
                "access_log_flush_interval",
                log_interval.or(proxy.access_log_flush_interval.as_ref()),
                None,
            )?,
            access_log_on_start: proxy.access_log_options.as_ref().is_some_and(|o| o.flush_access_log_on_start),
            access_log_on_connected: proxy.flush_access_log_on_connected
                || proxy.access_log_options.as_ref().is_some_and(|o| o.flush_access_log_on_connected),
            metadata_match,
            hash,
            tunneling: proxy.tunneling_config.as_ref().map(Tunneling::compile).transpose().at("tunneling_config")?,
        })
    }

    /// What ring hash and Maglev choose by, if the configuration asks for that.
    pub fn hash(&self, remote: &Address, state: &FilterState) -> Option<u64> {
        match self.hash.as_ref()? {
            TcpHash::SourceIp => Some(crate::hash::xx64(remote.socket()?.ip().to_string().as_bytes(), 0)),
            TcpHash::FilterState(key) => state.hash(key),
        }
    }

    /// The cluster for a connection, with its subset criteria. `random` decides between weighted clusters.
    pub fn cluster(&self, random: u64) -> (&ArcStr, Option<&MetadataMatch>) {
        match &self.clusters {
            TcpClusters::Single(name) => (name, self.metadata_match.as_ref()),
            TcpClusters::Weighted { clusters, total } => {
                let mut left = random % total;
                let chosen = clusters.iter().find(|c| {
                    let hit = left < c.weight;
                    left = left.saturating_sub(c.weight);
                    hit
                });
                // The weights sum up to `total`, so one always covers the number.
                let chosen = chosen.unwrap_or(&clusters[0]);
                (&chosen.name, chosen.metadata_match.as_ref().or(self.metadata_match.as_ref()))
            }
        }
    }
}

pub(super) fn compile_chain(
    filters: &[pb::listener::Filter],
    options: &Options,
) -> Compiled<(Vec<NetworkFilter>, Terminal)> {
    let mut before = Vec::new();
    for (i, filter) in filters.iter().enumerate() {
        match compile(&filter.name, typed(filter).at_index("filters", i)?, options).at_index("filters", i)? {
            Part::Filter(filter) => before.push(filter),
            Part::Terminal(terminal) if i + 1 == filters.len() => return Ok((before, terminal)),
            Part::Terminal(_) => {
                return Err(Invalid::new(
                    format!("filters[{i}]"),
                    format!("terminal filter {} must be the last filter in its chain", filter.name),
                ));
            }
        }
    }
    match filters.last() {
        None => Ok((before, Terminal::Close)),
        Some(last) => Err(Invalid::new(
            format!("filters[{}]", filters.len() - 1),
            format!("non-terminal filter {} is the last filter in its chain", last.name),
        )),
    }
}

/// The network filters of a cluster: none of them ends a chain.
pub(crate) fn compile_upstream(name: &str, any: Option<&pb::Any>, options: &Options) -> Compiled<NetworkFilter> {
    match compile(name, Typed::open(any)?, options)? {
        Part::Filter(filter) => Ok(filter),
        Part::Terminal(_) => Err(Invalid::new("typed_config", format!("{name} cannot stand in a cluster"))),
    }
}

fn typed(filter: &pb::listener::Filter) -> Compiled<Typed<'_>> {
    use pb::listener::filter::ConfigType;
    match &filter.config_type {
        Some(ConfigType::TypedConfig(any)) => Typed::open(Some(any)),
        Some(ConfigType::ConfigDiscovery(source)) => Typed::discovered(source),
        None => Err(Invalid::new("typed_config", "is missing")),
    }
}

enum Part {
    Filter(NetworkFilter),
    Terminal(Terminal),
}

/// Filters that only watch a protocol for statistics: leaving them out changes no byte.
const OBSERVERS: [&str; 4] = [
    "envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy",
    "envoy.extensions.filters.network.mysql_proxy.v3.MySQLProxy",
    "envoy.extensions.filters.network.postgres_proxy.v3alpha.PostgresProxy",
    "envoy.extensions.filters.network.zookeeper_proxy.v3.ZooKeeperProxy",
];

fn compile(name: &str, typed: Typed<'_>, options: &Options) -> Compiled<Part> {
    let filter = match typed.name.as_str() {
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => {
            let hcm = HttpConnectionManager::compile(&typed.decode()?, options)?;
            return Ok(Part::Terminal(Terminal::Http(Arc::new(hcm))));
        }
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy" => {
            let proxy = TcpProxy::compile(&typed.decode()?, options)?;
            return Ok(Part::Terminal(Terminal::TcpProxy(Arc::new(proxy))));
        }
        "envoy.extensions.filters.network.direct_response.v3.Config" => {
            let config: pb::network_filter::direct_response::v3::Config = typed.decode()?;
            let bytes = crate::tls::inline_bytes(config.response.as_ref()).at("response")?;
            return Ok(Part::Terminal(Terminal::DirectResponse(bytes)));
        }
        "envoy.extensions.filters.network.echo.v3.Echo" => return Ok(Part::Terminal(Terminal::Echo)),
        "envoy.extensions.filters.network.rbac.v3.RBAC" => {
            NetworkFilter::Rbac(Arc::new(Rbac::compile_network(&typed.decode()?, options)?))
        }
        "envoy.tcp.metadataexchange.config.MetadataExchange" => {
            NetworkFilter::MetadataExchange(MetadataExchange::of(&typed.fields()?)?)
        }
        "stats.PluginConfig" => NetworkFilter::IstioStats(Arc::new(IstioStats::compile(&typed.decode()?)?)),
        "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit" => {
            let config: pb::network_filter::local_ratelimit::v3::LocalRateLimit = typed.decode()?;
            refuse!("share_key": !config.share_key.is_empty());
            NetworkFilter::LocalRateLimit(Arc::new(NetworkLocalRateLimit {
                stat_prefix: config.stat_prefix.as_str().into(),
                bucket: TokenBucketConfig::compile(config.token_bucket.as_ref())?,
                enabled: options.runtime.flag(config.runtime_enabled.as_ref(), true),
                tokens: Mutex::default(),
            }))
        }
        "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit" => {
            let config: pb::network_filter::connection_limit::v3::ConnectionLimit = typed.decode()?;
            NetworkFilter::ConnectionLimit(Arc::new(ConnectionLimit {
                stat_prefix: config.stat_prefix.as_str().into(),
                max_connections: config
                    .max_connections
                    .ok_or_else(|| Invalid::new("max_connections", "is missing"))?
                    .value,
                delay: fields::duration("delay", config.delay.as_ref())?,
                enabled: options.runtime.flag(config.runtime_enabled.as_ref(), true),
                active: AtomicU64::new(0),
            }))
        }
        "envoy.extensions.filters.network.sni_cluster.v3.SniCluster" => NetworkFilter::SniCluster,
        "envoy.extensions.filters.network.sni_dynamic_forward_proxy.v3.FilterConfig" => {
            use pb::network_filter::sni_dynamic_forward_proxy::v3::filter_config::PortSpecifier;
            let config: pb::network_filter::sni_dynamic_forward_proxy::v3::FilterConfig = typed.decode()?;
            let cache =
                config.dns_cache_config.as_ref().ok_or_else(|| Invalid::new("dns_cache_config", "is missing"))?;
            let cache = Arc::new(NameCache::compile(cache).at("dns_cache_config")?);
            let port = config.port_specifier.map(|PortSpecifier::PortValue(port)| u16::try_from(port));
            let port = port.transpose().map_err(|_| Invalid::new("port_value", "is no port"))?;
            NetworkFilter::SniDynamicForwardProxy(Arc::new(SniForwardProxy { cache, port }))
        }
        "envoy.extensions.filters.network.set_filter_state.v3.Config" => {
            let config: pb::network_filter::set_filter_state::v3::Config = typed.decode()?;
            NetworkFilter::SetFilterState(FilterStateValue::compile_all(&config.on_new_connection)?)
        }
        "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz" => {
            NetworkFilter::ExtAuthz(Arc::new(ExtAuthz::compile_network(&typed.decode()?)?))
        }
        // `SetFilterState` of Istio's `connect_authority` is not sent to sidecars.
        other if OBSERVERS.contains(&other) || options.allow_unsupported_filters => {
            NetworkFilter::NoOp { name: name.into(), type_name: other.into() }
        }
        _ => return Err(typed.unknown()),
    };
    Ok(Part::Filter(filter))
}
