use std::time::Duration;

use mesh_types::ArcStr;

use super::dns::{DnsConfig, NameCache};
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
        /// The configuration says that name; else it is the cluster's own.
        is_named: bool,
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
    DynamicForwardProxy(NameCache),
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
            Some(ClusterDiscoveryType::ClusterType(custom)) => return Self::custom(custom).at("cluster_type"),
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
                    is_named: !config.service_name.is_empty(),
                    source: ConfigSource::compile(config.eds_config.as_ref()).at("eds_cluster_config.eds_config")?,
                }
            }
        })
    }

    fn custom(custom: &pb::cluster::cluster::CustomClusterType) -> Compiled<Self> {
        let typed = Typed::open(custom.typed_config.as_ref())?;
        match typed.name.as_str() {
            "envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig" => {
                Ok(Self::DynamicForwardProxy(NameCache::compile(&typed.decode()?)?))
            }
            "envoy.extensions.clusters.dns.v3.DnsCluster" => {
                let config: pb::ext::clusters::dns::v3::DnsCluster = typed.decode()?;
                let dns = DnsConfig::of_dns_cluster(&config)?;
                Ok(if config.all_addresses_in_single_endpoint { Self::LogicalDns(dns) } else { Self::StrictDns(dns) })
            }
            _ => Err(typed.unknown()),
        }
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
        if !config.use_http_header && !config.http_header_name.is_empty() {
            return Err(Invalid::new("original_dst_lb_config.http_header_name", "needs use_http_header"));
        }
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
