//! Clusters: how hosts are found, reached, chosen, limited and judged.

mod discovery;
mod dns;
mod policy;
mod protocol;
mod transport;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_types::ArcStr;
use prost::{Message, Name};

pub use discovery::{Discovery, OriginalDst};
pub use dns::{DnsConfig, DnsFamily, DnsServers, NameCache};
pub use policy::{HashFunction, LbPolicy, SlowStart, SubsetConfig, SubsetFallback, SubsetSelector, ZoneAware};
pub use protocol::{HeaderCase, Http1Options, Http2Options, Keepalive, UpstreamProtocol};
pub use transport::{ProxyHeader, TransportMatch, TransportSocket, TransportSockets};

use crate::circuit::BreakerLimits;
use crate::constraints;
use crate::endpoints::{Endpoints, Host};
use crate::fields;
use crate::health_check::{CheckKind, HealthCheckConfig};
use crate::listener::{NetworkFilter, SocketOption, TcpKeepalive};
use crate::metadata::{EncodedMetadata, Metadata};
use crate::outlier::OutlierConfig;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, Result, refuse};
use crate::route::HashPolicy;
use crate::rules;
use crate::runtime::Live;
use crate::{Options, listener};

/// A compiled cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Its name.
    pub name: ArcStr,
    /// The name under which it is counted and logged (`alt_stat_name`, else its name).
    pub stat_name: ArcStr,
    /// How hosts are found.
    pub discovery: Discovery,
    /// The hosts of the configuration itself; names in them are not resolved yet. Empty with EDS.
    pub endpoints: Arc<Endpoints>,
    /// The load assignment as it came, for DNS clusters to resolve.
    assignment: Option<Box<pb::endpoint::ClusterLoadAssignment>>,
    /// A connection must stand by then.
    pub connect_timeout: Duration,
    /// Bytes that may be buffered in a connection.
    pub per_connection_buffer_limit: u32,
    /// TLS or not, by host.
    pub transport: TransportSockets,
    /// HTTP version.
    pub protocol: UpstreamProtocol,
    /// HTTP/1 options.
    pub http1: Http1Options,
    /// HTTP/2 options.
    pub http2: Arc<Http2Options>,
    /// Send the request's host as SNI.
    pub auto_sni: bool,
    /// Header that holds the SNI to send.
    pub auto_sni_header: Option<Box<str>>,
    /// The server's certificate must carry the SNI.
    pub auto_san_validation: bool,
    /// Idle connections are closed after this; `None`: never. Default one hour.
    pub idle_timeout: Option<Duration>,
    /// TCP idle timeout of this cluster's connections, over that of the TCP proxy.
    pub max_connection_duration: Option<Duration>,
    /// A connection serves so many requests; `None`: any number.
    pub max_requests_per_connection: Option<u32>,
    /// A stream may take this long.
    pub max_stream_duration: Option<Duration>,
    /// Most headers of a response.
    pub max_response_headers: u32,
    /// Most bytes of a response head, if that is said.
    max_response_header_bytes: Option<u32>,
    /// Limits, by priority: default, high.
    pub breakers: [BreakerLimits; 2],
    /// Judging hosts by traffic.
    pub outlier: Option<Box<OutlierConfig>>,
    /// Judging hosts by asking them.
    pub health_checks: Vec<HealthCheckConfig>,
    /// Hosts with these statuses keep their sessions; bits by the number of the status.
    pub session_statuses: u32,
    /// A new host does not count before its first active check.
    pub ignore_new_hosts: bool,
    /// Each client's connection has upstream connections of its own.
    pub pool_per_downstream: bool,
    /// TCP connections to a host end when it is found to fail.
    pub close_on_failure: bool,
    /// Each host has statistics.
    pub endpoint_stats: bool,
    /// When hosts come or go, new requests use new connections.
    pub close_on_change: bool,
    /// Connections to a host for each request under way there, at least 1; more are made ahead.
    pub preconnect_ratio: f64,
    /// Connections in sum for each request under way, at least 1; more are made ahead, to the hosts that come next.
    pub predictive_ratio: f64,
    /// How a host is chosen.
    pub lb: LbPolicy,
    /// Localities are weighted.
    pub locality_weighted: bool,
    /// Below this share of healthy hosts all are used; percent.
    pub panic_threshold: Live<f64>,
    /// In panic, fail instead.
    pub fail_on_panic: bool,
    /// Where traffic stays, if there is a local cluster.
    pub zones: ZoneAware,
    /// Hosts in groups by metadata.
    pub subsets: Option<Box<SubsetConfig>>,
    /// What is hashed to choose a host, instead of what routes say.
    pub hash_policies: Box<[HashPolicy]>,
    /// Bind upstream sockets to one of these (one a family).
    pub bind: Vec<SocketAddr>,
    /// Socket options of upstream sockets.
    pub socket_options: Vec<SocketOption>,
    /// Keep-alive probes.
    pub keepalive: Option<TcpKeepalive>,
    metadata: EncodedMetadata,
    /// Filters on upstream connections.
    pub filters: Vec<NetworkFilter>,
}

/// What stays encoded of a `config.cluster.v3.Cluster`.
#[derive(Message)]
struct Facts {
    #[prost(bytes = "vec", tag = "25")]
    metadata: Vec<u8>,
}

impl Cluster {
    /// Compiles a `config.cluster.v3.Cluster`.
    pub fn compile(cluster: &pb::cluster::Cluster, options: &Options) -> Result<Self> {
        let encoded = cluster.encode_to_vec();
        rules::check_encoded(&pb::cluster::Cluster::full_name(), &encoded)
            .and_then(|()| Self::build(cluster, &encoded, options))
            .map_err(|invalid| invalid.of("cluster", &cluster.name))
    }

    fn build(cluster: &pb::cluster::Cluster, encoded: &[u8], options: &Options) -> Compiled<Self> {
        refuse! {
            "transport_socket_matcher": cluster.transport_socket_matcher.is_some(),
            "upstream_config": cluster.upstream_config.is_some(),
            "lrs_server": cluster.lrs_server.is_some(),
            "queuing_policies": cluster.queuing_policies.is_some(),
            "per_connection_buffer_high_watermark_timeout": cluster.per_connection_buffer_high_watermark_timeout.is_some(),
            "stats_matcher": cluster.stats_matcher.is_some(),
            "upstream_connection_options.set_local_interface_name_on_upstream_connections": cluster
                .upstream_connection_options
                .as_ref()
                .is_some_and(|o| o.set_local_interface_name_on_upstream_connections),
        }
        let name = fields::required("name", &cluster.name)?;
        constraints::cluster(cluster)?;
        let discovery = Discovery::compile(cluster)?;
        let http = protocol::HttpOptions::compile(cluster, options)?;
        if let Discovery::DynamicForwardProxy { allow_insecure, .. } = &discovery
            && http.names_in_tls
            && !(*allow_insecure || (http.auto_sni && http.auto_san_validation))
        {
            return Err(Invalid::new(
                "upstream_http_protocol_options",
                "a dynamic forward proxy needs auto_sni and auto_san_validation, or allow_insecure_cluster_options",
            ));
        }
        let common = cluster.common_lb_config.clone().unwrap_or_default();
        let policy = policy::Balancing::compile(cluster, &common, &options.runtime)?;
        let keepalive = cluster.upstream_connection_options.as_ref().and_then(|o| o.tcp_keepalive.as_ref());
        let mut filters = Vec::new();
        for (i, filter) in cluster.filters.iter().enumerate() {
            refuse!("filters.config_discovery": filter.config_discovery.is_some());
            let filter = listener::compile_upstream(&filter.name, filter.typed_config.as_ref(), options);
            filters.push(filter.at_index("filters", i)?);
        }
        let (bind, socket_options) = bind(cluster.upstream_bind_config.as_ref()).at("upstream_bind_config")?;
        let ahead = Ahead::compile(cluster.preconnect_policy.as_ref()).at("preconnect_policy")?;
        let mut compiled = Self {
            stat_name: match cluster.alt_stat_name.as_str() {
                "" => name.clone(),
                other => other.into(),
            },
            endpoints: Arc::new(Endpoints::default()),
            assignment: None,
            connect_timeout: fields::positive(
                "connect_timeout",
                cluster.connect_timeout.as_ref(),
                Duration::from_secs(5),
            )?,
            per_connection_buffer_limit: fields::uint(cluster.per_connection_buffer_limit_bytes.as_ref(), 1 << 20),
            transport: TransportSockets::compile(cluster)?,
            protocol: http.protocol,
            http1: http.http1,
            http2: http.http2.shared(),
            auto_sni: http.auto_sni,
            auto_sni_header: http.auto_sni_header,
            auto_san_validation: http.auto_san_validation,
            idle_timeout: http.idle_timeout,
            max_connection_duration: http.max_connection_duration,
            max_requests_per_connection: http.max_requests_per_connection,
            max_stream_duration: http.max_stream_duration,
            max_response_headers: http.max_response_headers,
            max_response_header_bytes: http.max_response_header_bytes,
            breakers: BreakerLimits::compile(cluster.circuit_breakers.as_ref()).at("circuit_breakers")?,
            outlier: cluster
                .outlier_detection
                .as_ref()
                .map(|o| OutlierConfig::compile(o, &options.runtime).map(Box::new))
                .transpose()
                .at("outlier_detection")?,
            health_checks: HealthCheckConfig::compile_all(&cluster.health_checks, &options.runtime)?,
            session_statuses: session_statuses(common.override_host_status.as_ref())
                .at("common_lb_config.override_host_status")?,
            ignore_new_hosts: common.ignore_new_hosts_until_first_hc,
            pool_per_downstream: cluster.connection_pool_per_downstream_connection,
            close_on_failure: cluster.close_connections_on_host_health_failure,
            endpoint_stats: cluster.track_cluster_stats.as_ref().is_some_and(|track| track.per_endpoint_stats),
            close_on_change: common.close_connections_on_host_set_change,
            preconnect_ratio: ahead.per_host,
            predictive_ratio: ahead.predictive,
            lb: policy.lb,
            locality_weighted: policy.locality_weighted,
            panic_threshold: policy.panic_threshold,
            fail_on_panic: policy.fail_on_panic,
            zones: policy.zones,
            subsets: policy.subsets.map(Box::new),
            hash_policies: policy.hash_policies,
            bind,
            socket_options,
            keepalive: keepalive.map(TcpKeepalive::compile),
            metadata: EncodedMetadata::new(Facts::decode(encoded).unwrap_or_default().metadata),
            filters,
            discovery,
            name,
        };
        compiled.fits()?;
        match (&cluster.load_assignment, &compiled.discovery) {
            (Some(_), Discovery::OriginalDst(_) | Discovery::DynamicForwardProxy { .. }) => {
                return Err(Invalid::new("load_assignment", "has no place in a cluster of this type"));
            }
            (None, Discovery::StrictDns(_) | Discovery::LogicalDns(_)) => {
                return Err(Invalid::new("load_assignment", "is missing"));
            }
            (Some(assignment), discovery) => {
                let names_allowed = !matches!(discovery, Discovery::Static | Discovery::Eds { .. });
                if let Discovery::LogicalDns(_) = discovery
                    && !matches!(assignment.endpoints.as_slice(), [one] if one.lb_endpoints.len() == 1)
                {
                    return Err(Invalid::new(
                        "load_assignment",
                        "LOGICAL_DNS needs a single locality with a single endpoint",
                    ));
                }
                let endpoints = Endpoints::build(assignment, &compiled, None, names_allowed).at("load_assignment")?;
                compiled.endpoints = Arc::new(endpoints);
                if names_allowed {
                    compiled.assignment = Some(Box::new(assignment.clone()));
                }
            }
            (None, _) => {}
        }
        Ok(compiled)
    }

    /// What parts of the cluster ask of others.
    fn fits(&self) -> Compiled<()> {
        let provides = matches!(self.discovery, Discovery::OriginalDst(_) | Discovery::DynamicForwardProxy { .. });
        if self.lb == LbPolicy::ClusterProvided && !provides {
            return Err(Invalid::new("lb_policy", "a cluster of this type provides none"));
        }
        // Under subsets the policy is theirs.
        if provides && (self.lb != LbPolicy::ClusterProvided || self.subsets.is_some()) {
            return Err(Invalid::new("lb_policy", "a cluster of this type provides its own"));
        }
        let grpc = |check: &HealthCheckConfig| matches!(check.kind, CheckKind::Grpc { .. });
        if self.protocol == UpstreamProtocol::Http1 && self.health_checks.iter().any(grpc) {
            return Err(Invalid::new("health_checks", "a cluster must support HTTP/2 for gRPC healthchecking"));
        }
        let plain = |socket: &TransportSocket| socket.tls().is_none();
        if self.protocol == UpstreamProtocol::Auto && plain(&self.transport.default) {
            return Err(Invalid::new("auto_config", "needs a transport socket with ALPN"));
        }
        Ok(())
    }

    /// Equal numbers mean an unchanged cluster, however its maps are ordered: hosts and connections stay.
    pub fn fingerprint(cluster: &pb::cluster::Cluster) -> u64 {
        hash(cluster)
    }

    /// Its metadata; Istio's default metrics read `istio`/`services` from it.
    pub fn metadata(&self) -> &Arc<Metadata> {
        self.metadata.get()
    }

    /// Most bytes of a response head. HTTP/1 has another default (Envoy `MAX_RESPONSE_HEADERS_KB`).
    pub fn max_response_header_bytes(&self, http1: bool) -> u32 {
        self.max_response_header_bytes.unwrap_or(if http1 { 80 << 10 } else { 60 << 10 })
    }

    /// The load assignment of a DNS cluster, whose names the proxy resolves and hands to [`Endpoints::resolved`].
    pub fn assignment(&self) -> Option<&pb::endpoint::ClusterLoadAssignment> {
        self.assignment.as_deref()
    }

    /// Host names that must be resolved for this cluster, with ports.
    pub fn dns_names(&self) -> Vec<(ArcStr, u16)> {
        self.assignment.as_deref().map(crate::endpoints::names).unwrap_or_default()
    }

    /// The transport towards a host, with the name of the match that chose it.
    pub fn transport(&self, host: &Host) -> (&TransportSocket, Option<&ArcStr>) {
        self.transport.choose(&host.metadata, host.locality_metadata.as_deref())
    }

    /// The transport of active checks, which may ask for one by `criteria` in place of what the host says.
    pub fn check_transport(
        &self,
        host: &Host,
        criteria: Option<&serde_json::Map<String, serde_json::Value>>,
    ) -> &TransportSocket {
        match criteria {
            None => self.transport(host).0,
            Some(criteria) => self.transport.choose_by(|key| criteria.get(key)).0,
        }
    }

    /// The name under which EDS serves it.
    pub fn eds_name(&self) -> Option<&ArcStr> {
        match &self.discovery {
            Discovery::Eds { service_name, .. } => Some(service_name),
            _ => None,
        }
    }
}

fn session_statuses(set: Option<&pb::core::HealthStatusSet>) -> Compiled<u32> {
    use pb::core::HealthStatus;
    let Some(set) = set else {
        return Ok([HealthStatus::Unknown, HealthStatus::Healthy, HealthStatus::Degraded].map(bit).iter().sum());
    };
    set.statuses.iter().try_fold(0, |all, status| Ok(all | bit(fields::enumeration("statuses", *status)?)))
}

fn bit(status: pb::core::HealthStatus) -> u32 {
    1 << status as u32
}

/// A compiled `PreconnectPolicy`.
struct Ahead {
    per_host: f64,
    predictive: f64,
}

impl Ahead {
    fn compile(policy: Option<&pb::cluster::cluster::PreconnectPolicy>) -> Compiled<Self> {
        let ratio = |field: &str, value: Option<f64>| match value {
            Some(ratio) if !(1.0..=3.0).contains(&ratio) => {
                Err(Invalid::new(field, format!("{ratio} is not between 1 and 3")))
            }
            other => Ok(other.unwrap_or(1.0)),
        };
        refuse!("preconnect_enabled_metadata": policy.is_some_and(|p| p.preconnect_enabled_metadata.is_some()));
        let per_host = policy.and_then(|p| p.per_upstream_preconnect_ratio.map(|r| r.value));
        let predictive = policy.and_then(|p| p.predictive_preconnect_ratio.map(|r| r.value));
        Ok(Self {
            per_host: ratio("per_upstream_preconnect_ratio", per_host)?,
            predictive: ratio("predictive_preconnect_ratio", predictive)?,
        })
    }
}

fn bind(config: Option<&pb::core::BindConfig>) -> Compiled<(Vec<SocketAddr>, Vec<SocketOption>)> {
    let Some(config) = config else { return Ok((Vec::new(), Vec::new())) };
    refuse! {
        "local_address_selector": config.local_address_selector.is_some(),
        "freebind": fields::flag(config.freebind.as_ref(), false),
        "extra_source_addresses.socket_options":
            config.extra_source_addresses.iter().any(|a| a.socket_options.is_some()),
    }
    let mut addresses = Vec::new();
    let extra = config.extra_source_addresses.iter().filter_map(|a| a.address.as_ref());
    for address in config.source_address.iter().chain(extra).chain(&config.additional_source_addresses) {
        addresses.push(crate::address::bind_address(address)?);
    }
    let options = config.socket_options.iter().map(SocketOption::compile).collect::<Compiled<_>>()?;
    Ok((addresses, options))
}

/// Maps are hashed in sorted form, the rest as encoded.
fn hash(cluster: &pb::cluster::Cluster) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut cluster = cluster.clone();
    let metadata = Metadata::compile(cluster.metadata.take().as_ref());
    let mut protocols: Vec<_> = std::mem::take(&mut cluster.typed_extension_protocol_options).into_iter().collect();
    protocols.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, any) in protocols {
        name.hash(&mut hasher);
        any.encode_to_vec().hash(&mut hasher);
    }
    // Endpoint metadata and transport matches hold maps, too.
    for found in cluster.transport_socket_matches.iter_mut() {
        let fields = found.r#match.take().as_ref().map(crate::metadata::object);
        format!("{fields:?}").hash(&mut hasher);
    }
    for endpoint in cluster.load_assignment.iter_mut().flat_map(|a| &mut a.endpoints).flat_map(|e| &mut e.lb_endpoints)
    {
        format!("{:?}", Metadata::compile(endpoint.metadata.take().as_ref())).hash(&mut hasher);
    }
    cluster.encode_to_vec().hash(&mut hasher);
    format!("{metadata:?}").hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
