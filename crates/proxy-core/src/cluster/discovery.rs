use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_types::ArcStr;
use serde_json::Value;

use super::dns::{DnsConfig, NameCache};
use crate::any::Typed;
use crate::balance::PickContext;
use crate::config_source::ConfigSource;
use crate::fields;
use crate::matchers::canonical_name;
use crate::metadata::Metadata;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};
use crate::stream_info::StreamInfo;

/// Filter state that names an original destination (Envoy `OriginalDstClusterFilterStateKey`).
const DESTINATION_STATE: &str = "envoy.network.transport_socket.original_dst_address";

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
    DynamicForwardProxy {
        /// What is known of the names.
        cache: Arc<NameCache>,
        /// The cluster may have TLS that is not checked against the names.
        allow_insecure: bool,
    },
}

/// Where an original destination cluster gets the destination from.
#[derive(Clone, Debug, Default)]
pub struct OriginalDst {
    /// This header, if it is there.
    pub http_header: Option<Box<str>>,
    /// The namespace and path in the dynamic metadata, before that.
    pub metadata: Option<(ArcStr, Box<[ArcStr]>)>,
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
        if kind != DiscoveryType::Eds && cluster.eds_cluster_config.is_some() {
            return Err(Invalid::new("eds_cluster_config", "is for clusters of type EDS only"));
        }
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
                let config: pb::ext::clusters::dynamic_forward_proxy::v3::ClusterConfig = typed.decode()?;
                let cache = Arc::new(NameCache::of_cluster(&config)?);
                Ok(Self::DynamicForwardProxy { cache, allow_insecure: config.allow_insecure_cluster_options })
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
    /// Where a connection goes: as the filter state says, the metadata, the request, or where it was going itself. With how
    /// many of them name no address, which counts (Envoy `OriginalDstCluster::LoadBalancer::chooseHost`).
    pub fn destination(&self, cx: &PickContext<'_>) -> (Option<SocketAddr>, u64) {
        let mut invalid = 0;
        let mut read = |text: &str| {
            let address = text.parse();
            invalid += u64::from(address.is_err());
            address.ok()
        };
        let state = |info: &StreamInfo| info.filter_state.values.get(DESTINATION_STATE)?.parse().ok();
        let mut address: Option<SocketAddr> = cx.stream.and_then(state);
        if let (None, Some((namespace, path)), Some(info)) = (address, &self.metadata, cx.stream) {
            let text = |metadata: &'_ Metadata| match metadata.get(namespace, path)? {
                Value::Array(all) => all.first()?.as_str().map(str::to_owned),
                value => value.as_str().map(str::to_owned),
            };
            let named = text(&info.dynamic_metadata).or_else(|| text(&info.connection.metadata));
            address = named.as_deref().and_then(&mut read);
        }
        if let (None, Some(name)) = (address, &self.http_header) {
            address = cx.headers.and_then(|headers| headers.get_str(name)).and_then(&mut read);
        }
        let mut address = address.or(cx.original_dst);
        if let (Some(address), Some(port)) = (&mut address, self.port_override) {
            address.set_port(port);
        }
        (address, invalid)
    }

    fn compile(cluster: &pb::cluster::Cluster) -> Compiled<Self> {
        use pb::cluster::cluster::LbConfig;
        let cleanup = fields::positive("cleanup_interval", cluster.cleanup_interval.as_ref(), Duration::from_secs(5))?;
        let Some(LbConfig::OriginalDstLbConfig(config)) = &cluster.lb_config else {
            return Ok(Self { cleanup_interval: cleanup, ..Self::default() });
        };
        if !config.use_http_header && !config.http_header_name.is_empty() {
            return Err(Invalid::new("original_dst_lb_config.http_header_name", "needs use_http_header"));
        }
        let header = match config.http_header_name.as_str() {
            "" => "x-envoy-original-dst-host".to_owned(),
            name => canonical_name(name),
        };
        let metadata = config.metadata_key.as_ref().map(|key| {
            use pb::metadata_key::metadata_key::path_segment::Segment;
            let name = |segment: &Option<Segment>| match segment {
                Some(Segment::Key(name)) => Ok(name.as_str().into()),
                _ => Err(Invalid::unsupported("original_dst_lb_config.metadata_key.path")),
            };
            let path = key.path.iter().map(|part| name(&part.segment)).collect::<Compiled<_>>()?;
            Ok((key.key.as_str().into(), path))
        });
        let port = config.upstream_port_override.as_ref().map(|v| u16::try_from(v.value));
        Ok(Self {
            http_header: config.use_http_header.then(|| header.into()),
            metadata: metadata.transpose()?,
            port_override: port
                .transpose()
                .map_err(|_| Invalid::new("original_dst_lb_config.upstream_port_override", "is no port"))?,
            cleanup_interval: cleanup,
        })
    }
}
