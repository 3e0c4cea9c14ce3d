use std::time::Duration;

use mesh_types::ArcStr;

use crate::any::Typed;
use crate::config_source::ConfigSource;
use crate::fields;
use crate::matchers::canonical_name;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};

/// How the hosts of a cluster are found.
#[derive(Clone, Debug)]
pub enum Discovery {
    /// They stand in the configuration.
    Static,
    /// They come by EDS.
    Eds {
        /// The name to ask for.
        service_name: ArcStr,
        /// Who is asked.
        source: ConfigSource,
    },
    /// All addresses of names are hosts.
    StrictDns(DnsConfig),
    /// New connections go to the first address of one name.
    LogicalDns(DnsConfig),
    /// The connection's original destination is the host.
    OriginalDst(OriginalDst),
    /// The request's host (or the SNI) is resolved.
    DynamicForwardProxy(DnsConfig),
}

/// How names are resolved.
#[derive(Clone, Debug)]
pub struct DnsConfig {
    /// Resolve again after this.
    pub refresh: Duration,
    /// Up to this later, at random.
    pub jitter: Duration,
    /// After a failure: first and longest pause.
    pub failure_refresh: (Duration, Duration),
    /// Follow the records' TTL instead.
    pub respect_ttl: bool,
    /// Which addresses.
    pub family: DnsFamily,
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

/// Where an original destination cluster gets the destination from.
#[derive(Clone, Debug, Default)]
pub struct OriginalDst {
    /// This header, if it is there.
    pub http_header: Option<Box<str>>,
    /// Another port.
    pub port_override: Option<u16>,
    /// Hosts without traffic are forgotten after this.
    pub cleanup_interval: Duration,
}

impl Discovery {
    pub(super) fn compile(cluster: &pb::cluster::Cluster) -> Compiled<Self> {
        use pb::cluster::cluster::{ClusterDiscoveryType, DiscoveryType};
        let kind = match &cluster.cluster_discovery_type {
            Some(ClusterDiscoveryType::ClusterType(custom)) => return Self::custom(custom, cluster).at("cluster_type"),
            Some(ClusterDiscoveryType::Type(kind)) => fields::enumeration("type", *kind)?,
            None => DiscoveryType::Static,
        };
        Ok(match kind {
            DiscoveryType::Static => Self::Static,
            DiscoveryType::StrictDns => Self::StrictDns(DnsConfig::of_cluster(cluster)?),
            DiscoveryType::LogicalDns => Self::LogicalDns(DnsConfig::of_cluster(cluster)?),
            DiscoveryType::OriginalDst => Self::OriginalDst(OriginalDst::compile(cluster)?),
            DiscoveryType::Eds => {
                let config = cluster.eds_cluster_config.as_ref();
                let config = config.ok_or_else(|| Invalid::new("eds_cluster_config", "is missing"))?;
                if config.eds_config.is_none() {
                    return Err(Invalid::new("eds_cluster_config.eds_config", "is missing"));
                }
                let name = if config.service_name.is_empty() { &cluster.name } else { &config.service_name };
                Self::Eds {
                    service_name: name.as_str().into(),
                    source: ConfigSource::compile(config.eds_config.as_ref()).at("eds_cluster_config.eds_config")?,
                }
            }
        })
    }

    fn custom(custom: &pb::cluster::cluster::CustomClusterType, cluster: &pb::cluster::Cluster) -> Compiled<Self> {
        let typed = Typed::open(custom.typed_config.as_ref())?;
        match typed.name.as_str() {
            "envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig" => {
                use pb::ext::clusters::dynamic_forward_proxy::v3::cluster_config::ClusterImplementationSpecifier as Kind;
                let config: pb::ext::clusters::dynamic_forward_proxy::v3::ClusterConfig = typed.decode()?;
                let mut dns = DnsConfig::of_cluster(cluster)?;
                match config.cluster_implementation_specifier {
                    Some(Kind::DnsCacheConfig(cache)) => {
                        dns.family = DnsFamily::compile(cache.dns_lookup_family)?;
                        dns.refresh = fields::positive(
                            "dns_refresh_rate",
                            cache.dns_refresh_rate.as_ref(),
                            Duration::from_secs(60),
                        )?;
                    }
                    _ => return Err(Invalid::unsupported("sub_clusters_config")),
                }
                Ok(Self::DynamicForwardProxy(dns))
            }
            "envoy.extensions.clusters.dns.v3.DnsCluster" => {
                let config: pb::ext::clusters::dns::v3::DnsCluster = typed.decode()?;
                check_resolver(config.typed_dns_resolver_config.as_ref()).at("typed_dns_resolver_config")?;
                let dns = DnsConfig {
                    refresh: fields::positive(
                        "dns_refresh_rate",
                        config.dns_refresh_rate.as_ref(),
                        Duration::from_secs(5),
                    )?,
                    jitter: fields::duration("dns_jitter", config.dns_jitter.as_ref())?.unwrap_or_default(),
                    failure_refresh: (Duration::from_secs(5), Duration::from_secs(50)),
                    respect_ttl: config.respect_dns_ttl,
                    // This message counts from UNSPECIFIED.
                    family: DnsFamily::compile((config.dns_lookup_family - 1).max(0))?,
                };
                Ok(if config.all_addresses_in_single_endpoint { Self::LogicalDns(dns) } else { Self::StrictDns(dns) })
            }
            _ => Err(typed.unknown()),
        }
    }
}

impl DnsConfig {
    fn of_cluster(cluster: &pb::cluster::Cluster) -> Compiled<Self> {
        check_resolver(cluster.typed_dns_resolver_config.as_ref()).at("typed_dns_resolver_config")?;
        let refresh = fields::positive("dns_refresh_rate", cluster.dns_refresh_rate.as_ref(), Duration::from_secs(5))?;
        let failure = match &cluster.dns_failure_refresh_rate {
            None => (refresh, refresh),
            Some(rate) => {
                let base = fields::positive("dns_failure_refresh_rate", rate.base_interval.as_ref(), refresh)?;
                (base, fields::positive("dns_failure_refresh_rate", rate.max_interval.as_ref(), base * 10)?)
            }
        };
        Ok(Self {
            refresh,
            jitter: fields::duration("dns_jitter", cluster.dns_jitter.as_ref())?.unwrap_or_default(),
            failure_refresh: failure,
            respect_ttl: cluster.respect_dns_ttl,
            family: DnsFamily::compile(cluster.dns_lookup_family)?,
        })
    }
}

/// Names are resolved as the system says: servers of its own cannot be given. Other settings are those of one library.
fn check_resolver(config: Option<&pb::core::TypedExtensionConfig>) -> Compiled<()> {
    let Some(config) = config else { return Ok(()) };
    let typed = Typed::open(config.typed_config.as_ref())?;
    match typed.name.as_str() {
        "envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig" => {
            let config: pb::ext::network::dns_resolver::cares::v3::CaresDnsResolverConfig = typed.decode()?;
            refuse!("resolvers": !config.resolvers.is_empty());
            Ok(())
        }
        "envoy.extensions.network.dns_resolver.getaddrinfo.v3.GetAddrInfoDnsResolverConfig" => Ok(()),
        _ => Err(typed.unknown()),
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

impl OriginalDst {
    /// Whether a request names its destination, but no address (statistic `original_dst_host_invalid`).
    pub fn names_invalid_host(&self, request: &crate::Headers) -> bool {
        let named = self.http_header.as_ref().and_then(|name| request.get_str(name));
        named.is_some_and(|address| address.parse::<std::net::SocketAddr>().is_err())
    }

    fn compile(cluster: &pb::cluster::Cluster) -> Compiled<Self> {
        use pb::cluster::cluster::LbConfig;
        let cleanup = fields::positive("cleanup_interval", cluster.cleanup_interval.as_ref(), Duration::from_secs(5))?;
        let Some(LbConfig::OriginalDstLbConfig(config)) = &cluster.lb_config else {
            return Ok(Self { cleanup_interval: cleanup, ..Self::default() });
        };
        refuse!("original_dst_lb_config.metadata_key": config.metadata_key.is_some());
        let header = match config.http_header_name.as_str() {
            "" => "x-envoy-original-dst-host".to_owned(),
            name => canonical_name(name),
        };
        let port = config.upstream_port_override.as_ref().map(|v| u16::try_from(v.value));
        Ok(Self {
            http_header: config.use_http_header.then(|| header.into()),
            port_override: port
                .transpose()
                .map_err(|_| Invalid::new("original_dst_lb_config.upstream_port_override", "is no port"))?,
            cleanup_interval: cleanup,
        })
    }
}
