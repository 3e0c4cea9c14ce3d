//! How host names are resolved: by which servers, which addresses, and when again.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_types::ArcStr;

use crate::address::Address;
use crate::any::Typed;
use crate::fields;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};

/// How names are resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct DnsConfig {
    /// Resolve again after this.
    pub refresh: Duration,
    /// Up to this later, at random.
    pub jitter: Duration,
    /// After a failure: first and longest pause.
    pub failure_refresh: (Duration, Duration),
    /// Follow the records' TTL instead of [`Self::refresh`].
    pub respect_ttl: bool,
    /// A TTL counts for no less than this.
    pub min_refresh: Duration,
    /// Which addresses.
    pub family: DnsFamily,
    /// Who is asked.
    pub servers: DnsServers,
}

/// Servers that are asked for names.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct DnsServers {
    /// Empty: those of the system.
    pub addresses: Vec<SocketAddr>,
    /// The addresses are asked only where the system names no servers.
    pub fallback: bool,
    /// By TCP only.
    pub tcp: bool,
    /// Names are tried as they are, without the system's search domains.
    pub no_search: bool,
}

/// Names that requests and handshakes bring, resolved and kept (`common.dynamic_forward_proxy.v3.DnsCacheConfig`).
#[derive(Clone, Debug, PartialEq)]
pub struct NameCache {
    /// Clusters and filters whose caches have the same name share it.
    pub name: ArcStr,
    /// How they are resolved.
    pub dns: DnsConfig,
    /// So many are kept.
    pub max_names: usize,
    /// A name that nobody used for so long is forgotten.
    pub host_ttl: Duration,
    /// An answer takes no longer than this.
    pub query_timeout: Option<Duration>,
    /// Names that are known before anybody asks.
    pub ahead: Vec<(ArcStr, u16)>,
    /// So many requests may wait for answers.
    pub max_pending: u64,
}

/// Which addresses of a name are used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DnsFamily {
    /// IPv6 if there are any, else IPv4.
    Auto,
    /// IPv4.
    V4Only,
    /// IPv6.
    V6Only,
    /// IPv4 if there are any, else IPv6.
    V4Preferred,
    /// Both.
    All,
}

/// Base and longest pause after failures.
type FailureRate = (Option<pb::Duration>, Option<pb::Duration>);

/// Default pause between two lookups of a cluster's name.
const REFRESH: Duration = Duration::from_secs(5);

impl DnsConfig {
    /// The fields of a `Cluster` of type STRICT_DNS or LOGICAL_DNS.
    pub(super) fn of_cluster(cluster: &pb::cluster::Cluster) -> Compiled<Self> {
        let refresh = fields::positive("dns_refresh_rate", cluster.dns_refresh_rate.as_ref(), REFRESH)?;
        let failure = cluster.dns_failure_refresh_rate.as_ref().map(|rate| (rate.base_interval, rate.max_interval));
        let old = DnsServers::old(&cluster.dns_resolvers, cluster.use_tcp_for_dns_lookups).at("dns_resolvers")?;
        Ok(Self {
            refresh,
            jitter: fields::duration("dns_jitter", cluster.dns_jitter.as_ref())?.unwrap_or_default(),
            failure_refresh: failure_refresh(failure, refresh)?,
            respect_ttl: cluster.respect_dns_ttl,
            min_refresh: Duration::ZERO,
            family: DnsFamily::compile(cluster.dns_lookup_family)?,
            servers: DnsServers::compile(
                cluster.typed_dns_resolver_config.as_ref(),
                cluster.dns_resolution_config.as_ref(),
                old,
            )?,
        })
    }

    /// `clusters.dns.v3.DnsCluster`.
    pub(super) fn of_dns_cluster(config: &pb::ext::clusters::dns::v3::DnsCluster) -> Compiled<Self> {
        let refresh = fields::positive("dns_refresh_rate", config.dns_refresh_rate.as_ref(), REFRESH)?;
        let failure = config.dns_failure_refresh_rate.as_ref().map(|rate| (rate.base_interval, rate.max_interval));
        Ok(Self {
            refresh,
            jitter: fields::duration("dns_jitter", config.dns_jitter.as_ref())?.unwrap_or_default(),
            failure_refresh: failure_refresh(failure, refresh)?,
            respect_ttl: config.respect_dns_ttl,
            min_refresh: min_refresh(config.dns_min_refresh_rate.as_ref(), Duration::ZERO)?,
            // This message counts from UNSPECIFIED.
            family: DnsFamily::compile((config.dns_lookup_family - 1).max(0))?,
            servers: DnsServers::compile(config.typed_dns_resolver_config.as_ref(), None, DnsServers::default())?,
        })
    }
}

impl NameCache {
    pub(super) fn of_cluster(config: &pb::ext::clusters::dynamic_forward_proxy::v3::ClusterConfig) -> Compiled<Self> {
        use pb::ext::clusters::dynamic_forward_proxy::v3::cluster_config::ClusterImplementationSpecifier as Kind;
        let Some(Kind::DnsCacheConfig(cache)) = &config.cluster_implementation_specifier else {
            return Err(Invalid::unsupported("sub_clusters_config"));
        };
        Self::compile(cache).at("dns_cache_config")
    }

    /// Compiles a `DnsCacheConfig`.
    pub(crate) fn compile(cache: &pb::ext::common::dynamic_forward_proxy::v3::DnsCacheConfig) -> Compiled<Self> {
        refuse! {
            "key_value_config": cache.key_value_config.is_some(),
            "resolved_address_filter": cache.resolved_address_filter.is_some(),
        }
        use pb::core::socket_address::PortSpecifier;
        let refresh = fields::positive("dns_refresh_rate", cache.dns_refresh_rate.as_ref(), Duration::from_secs(60))?;
        let failure = cache.dns_failure_refresh_rate.as_ref().map(|rate| (rate.base_interval, rate.max_interval));
        let old = DnsServers { tcp: cache.use_tcp_for_dns_lookups, ..DnsServers::default() };
        let dns = DnsConfig {
            refresh,
            jitter: Duration::ZERO,
            failure_refresh: failure_refresh(failure, refresh)?,
            respect_ttl: true,
            min_refresh: min_refresh(cache.dns_min_refresh_rate.as_ref(), Duration::from_secs(5))?,
            family: DnsFamily::compile(cache.dns_lookup_family)?,
            servers: DnsServers::compile(
                cache.typed_dns_resolver_config.as_ref(),
                cache.dns_resolution_config.as_ref(),
                old,
            )?,
        };
        let max = fields::uint(cache.max_hosts.as_ref(), 1024);
        if max == 0 {
            return Err(Invalid::new("max_hosts", "must be greater than 0"));
        }
        if cache.preresolve_hostnames.len() > max as usize {
            return Err(Invalid::new("preresolve_hostnames", "has more names than max_hosts allows"));
        }
        Ok(Self {
            name: fields::required("name", &cache.name)?,
            dns,
            max_names: max as usize,
            query_timeout: fields::duration_or_off(
                "dns_query_timeout",
                cache.dns_query_timeout.as_ref(),
                Some(Duration::from_secs(5)),
            )?,
            host_ttl: fields::positive("host_ttl", cache.host_ttl.as_ref(), Duration::from_secs(300))?,
            ahead: cache
                .preresolve_hostnames
                .iter()
                .map(|name| match &name.port_specifier {
                    Some(PortSpecifier::PortValue(port)) => {
                        let port = u16::try_from(*port).map_err(|_| Invalid::new("port_value", "is no port"))?;
                        Ok((name.address.as_str().into(), port))
                    }
                    _ => Err(Invalid::unsupported("named_port")),
                })
                .collect::<Compiled<_>>()
                .at("preresolve_hostnames")?,
            max_pending: fields::uint(
                cache.dns_cache_circuit_breaker.as_ref().and_then(|limits| limits.max_pending_requests.as_ref()),
                1024,
            )
            .into(),
        })
    }
}

fn failure_refresh(rate: Option<FailureRate>, refresh: Duration) -> Compiled<(Duration, Duration)> {
    let Some((base, max)) = rate else { return Ok((refresh, refresh)) };
    let base = fields::positive("dns_failure_refresh_rate", base.as_ref(), refresh)?;
    Ok((base, fields::positive("dns_failure_refresh_rate", max.as_ref(), base * 10)?))
}

fn min_refresh(least: Option<&pb::Duration>, default: Duration) -> Compiled<Duration> {
    let least = fields::duration("dns_min_refresh_rate", least)?;
    if least.is_some_and(|least| least < Duration::from_secs(1)) {
        return Err(Invalid::new("dns_min_refresh_rate", "must be 1s or more"));
    }
    Ok(least.unwrap_or(default))
}

impl DnsServers {
    /// `typed` before `resolution` before `old`, as Envoy's `makeDnsResolverConfig`.
    fn compile(
        typed: Option<&pb::core::TypedExtensionConfig>,
        resolution: Option<&pb::core::DnsResolutionConfig>,
        old: Self,
    ) -> Compiled<Self> {
        if let Some(typed) = typed {
            return Self::typed(typed).at("typed_dns_resolver_config");
        }
        let Some(config) = resolution.filter(|config| !config.resolvers.is_empty()) else { return Ok(old) };
        let servers = Self::old(&config.resolvers, false).at("dns_resolution_config.resolvers")?;
        Ok(servers.with(config.dns_resolver_options.as_ref()))
    }

    fn old(resolvers: &[pb::core::Address], tcp: bool) -> Compiled<Self> {
        let address = |address: &pb::core::Address| {
            let address = Address::compile(Some(address))?;
            address.socket().ok_or_else(|| Invalid::new("address", format!("{address} is no IP address")))
        };
        let addresses = resolvers.iter().map(address).collect::<Compiled<_>>()?;
        Ok(Self { addresses, tcp, ..Self::default() })
    }

    fn with(self, options: Option<&pb::core::DnsResolverOptions>) -> Self {
        let Some(options) = options else { return self };
        Self { tcp: options.use_tcp_for_dns_lookups, no_search: options.no_default_search_domain, ..self }
    }

    pub(crate) fn typed(config: &pb::core::TypedExtensionConfig) -> Compiled<Self> {
        let typed = Typed::open(config.typed_config.as_ref())?;
        match typed.name.as_str() {
            "envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig" => {
                let config: pb::ext::network::dns_resolver::cares::v3::CaresDnsResolverConfig = typed.decode()?;
                let servers = Self::old(&config.resolvers, false).at("resolvers")?;
                let servers = servers.with(config.dns_resolver_options.as_ref());
                Ok(Self { fallback: config.use_resolvers_as_fallback, ..servers })
            }
            "envoy.extensions.network.dns_resolver.getaddrinfo.v3.GetAddrInfoDnsResolverConfig" => Ok(Self::default()),
            _ => Err(typed.unknown()),
        }
    }
}

impl DnsFamily {
    fn compile(family: i32) -> Compiled<Self> {
        Ok(match family {
            0 => Self::Auto,
            1 => Self::V4Only,
            2 => Self::V6Only,
            3 => Self::V4Preferred,
            4 => Self::All,
            other => return Err(Invalid::new("dns_lookup_family", format!("{other} is no known value"))),
        })
    }
}
