//! The bootstrap: static resources, where the rest comes from, admin and statistics settings.

use std::sync::Arc;

use mesh_types::ArcStr;
use serde_json::Value;

use crate::access_log::AccessLog;
use crate::address::Address;
use crate::cluster::{Cluster, DnsServers};
use crate::config_source::{ConfigSource, GrpcSource};
use crate::hcm::TracingProvider;
use crate::listener::Listener;
use crate::matchers::StringMatcher;
use crate::metadata;
use crate::overload::OverloadConfig;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, Rejected, Result, refuse};
use crate::tls::Secret;
use crate::{Options, Runtime};

/// A compiled bootstrap.
#[derive(Debug)]
pub struct Bootstrap {
    /// Who this proxy is.
    pub node: Node,
    /// The admin server.
    pub admin: Option<Admin>,
    /// Static listeners.
    pub listeners: Vec<Arc<Listener>>,
    /// Static clusters.
    pub clusters: Vec<Arc<Cluster>>,
    /// Static secrets.
    pub secrets: Vec<Secret>,
    /// The aggregated stream.
    pub ads: Option<GrpcSource>,
    /// Where listeners come from, besides.
    pub lds: Option<ConfigSource>,
    /// Where clusters come from, besides.
    pub cds: Option<ConfigSource>,
    /// Which statistics there are.
    pub stats: StatsConfig,
    /// Tracing of listeners that name no provider.
    pub tracing: Option<TracingProvider>,
    /// Values that may change while the proxy runs. What the bootstrap holds itself is compiled with it.
    pub runtime: Runtime,
    /// What is done when resources run short.
    pub overload: Option<OverloadConfig>,
    /// The file that tells of ejections.
    pub outlier_log: Option<ArcStr>,
    /// The cluster that we are a host of ourselves.
    pub local_cluster: Option<ArcStr>,
}

/// Who this proxy is.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// `--service-node`.
    pub id: ArcStr,
    /// `--service-cluster`.
    pub cluster: ArcStr,
    /// Istio's node metadata.
    pub metadata: Value,
    /// Where it stands.
    pub locality: crate::endpoints::Locality,
}

/// The admin server.
#[derive(Debug)]
pub struct Admin {
    /// Where it listens.
    pub address: Address,
    /// Logs of its requests.
    pub access_log: Vec<Arc<AccessLog>>,
}

/// Which statistics there are, and how names become tags.
#[derive(Clone, Debug, Default)]
pub struct StatsConfig {
    /// Tags taken out of names.
    pub tags: Vec<TagRule>,
    /// Without Envoy's own rules.
    pub without_default_tags: bool,
    /// Which names.
    pub names: StatsNames,
    /// Bounds of histogram buckets by name.
    pub histogram_buckets: Vec<(StringMatcher, Vec<f64>)>,
}

/// A tag taken out of names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TagRule {
    /// The first group of the expression is removed, the second is the value.
    Regex(ArcStr, ArcStr),
    /// Always this.
    Fixed(ArcStr, ArcStr),
    /// Envoy's own rule of this name.
    Default(ArcStr),
}

/// Which statistics there are.
#[derive(Clone, Debug, Default)]
pub enum StatsNames {
    /// All.
    #[default]
    All,
    /// None.
    None,
    /// Those that one of these fits.
    Only(Vec<StringMatcher>),
    /// Those that none of these fits.
    Except(Vec<StringMatcher>),
}

impl StatsNames {
    /// Whether a statistic of this name is kept.
    pub fn keeps(&self, name: &str) -> bool {
        let any = |matchers: &[StringMatcher]| matchers.iter().any(|m| m.matches(name.as_bytes()));
        match self {
            Self::All => true,
            Self::None => false,
            Self::Only(matchers) => any(matchers),
            Self::Except(matchers) => !any(matchers),
        }
    }
}

impl Bootstrap {
    /// Compiles a `config.bootstrap.v3.Bootstrap` with all static resources; the first that is refused is the error.
    pub fn compile(bootstrap: &pb::bootstrap::Bootstrap, options: &Options) -> Result<Self> {
        let mut head = bootstrap.clone();
        // Each of them is looked at when it is compiled.
        let fixed = head.static_resources.take().unwrap_or_default();
        let compiled = Self::settings(&head, options)?;
        let options =
            &Options { runtime: compiled.runtime.clone(), tracing: compiled.tracing.clone(), ..options.clone() };
        let clusters =
            fixed.clusters.iter().map(|c| Cluster::compile(c, options).map(Arc::new)).collect::<Result<Vec<_>>>()?;
        let listeners =
            fixed.listeners.iter().map(|l| Listener::compile(l, options).map(Arc::new)).collect::<Result<Vec<_>>>()?;
        unique("cluster", clusters.iter().map(|c| &c.name))?;
        unique("listener", listeners.iter().map(|l| &l.name).filter(|n| !n.is_empty()))?;
        let compiled = Self {
            secrets: fixed.secrets.iter().map(Secret::compile).collect::<Result<_>>()?,
            clusters,
            listeners,
            ..compiled
        };
        compiled.check_references()?;
        Ok(compiled)
    }

    /// As [`Self::compile`], without the static resources. Those, and all that comes later, are compiled with its
    /// [`runtime`](Self::runtime).
    pub fn settings(bootstrap: &pb::bootstrap::Bootstrap, options: &Options) -> Result<Self> {
        let runtime = Runtime::compile(bootstrap.layered_runtime.as_ref()).at("layered_runtime");
        let build = |runtime| Self::build(bootstrap, &Options { runtime, ..options.clone() });
        runtime.and_then(build).map_err(|invalid| invalid.of("bootstrap", ""))
    }

    fn build(bootstrap: &pb::bootstrap::Bootstrap, options: &Options) -> Compiled<Self> {
        crate::rules::check(bootstrap)?;
        refuse! {
            "hds_config": bootstrap.hds_config.is_some(),
            "header_prefix": !bootstrap.header_prefix.is_empty() && bootstrap.header_prefix != "x-envoy",
            "config_sources": !bootstrap.config_sources.is_empty(),
            "default_config_source": bootstrap.default_config_source.is_some(),
            "certificate_provider_instances": !bootstrap.certificate_provider_instances.is_empty(),
            "default_socket_interface": !bootstrap.default_socket_interface.is_empty(),
            "xds_delegate_extension": bootstrap.xds_delegate_extension.is_some(),
            "xds_config_tracker_extension": bootstrap.xds_config_tracker_extension.is_some(),
            "listener_manager": bootstrap.listener_manager.is_some(),
            "dns_resolution_config": bootstrap.dns_resolution_config.as_ref().is_some_and(|c| !c.resolvers.is_empty()),
            "use_tcp_for_dns_lookups": bootstrap.use_tcp_for_dns_lookups,
            "typed_dns_resolver_config": match &bootstrap.typed_dns_resolver_config {
                Some(config) => DnsServers::typed(config).at("typed_dns_resolver_config")? != DnsServers::default(),
                None => false,
            },
            "admin.allow_paths": bootstrap.admin.as_ref().is_some_and(|admin| !admin.allow_paths.is_empty()),
        }
        let manager = bootstrap.cluster_manager.clone().unwrap_or_default();
        refuse! {
            "cluster_manager.upstream_bind_config": manager.upstream_bind_config.is_some(),
            "cluster_manager.outlier_detection.event_service":
                manager.outlier_detection.as_ref().is_some_and(|o| o.event_service.is_some()),
            "cluster_manager.load_stats_config": manager.load_stats_config.is_some(),
        }
        let dynamic = bootstrap.dynamic_resources.clone().unwrap_or_default();
        refuse! {
            "dynamic_resources.lds_resources_locator": !dynamic.lds_resources_locator.is_empty(),
            "dynamic_resources.cds_resources_locator": !dynamic.cds_resources_locator.is_empty(),
        }
        let source = |field: &str, source: &Option<pb::core::ConfigSource>| {
            source.as_ref().map(|s| ConfigSource::compile(Some(s))).transpose().at(field)
        };
        Ok(Self {
            node: Node::of(bootstrap.node.as_ref()),
            admin: bootstrap.admin.as_ref().map(|a| Admin::compile(a, options)).transpose().at("admin")?.flatten(),
            listeners: Vec::new(),
            clusters: Vec::new(),
            secrets: Vec::new(),
            ads: dynamic
                .ads_config
                .as_ref()
                .map(|config| GrpcSource::compile(config, true))
                .transpose()
                .at("dynamic_resources.ads_config")?,
            lds: source("dynamic_resources.lds_config", &dynamic.lds_config)?,
            cds: source("dynamic_resources.cds_config", &dynamic.cds_config)?,
            stats: StatsConfig::compile(bootstrap.stats_config.as_ref()).at("stats_config")?,
            tracing: bootstrap
                .tracing
                .as_ref()
                .and_then(|t| t.http.as_ref())
                .map(TracingProvider::compile)
                .transpose()
                .at("tracing.http")?,
            runtime: options.runtime.clone(),
            local_cluster: Some(manager.local_cluster_name.as_str()).filter(|name| !name.is_empty()).map(ArcStr::from),
            outlier_log: manager
                .outlier_detection
                .map(|o| ArcStr::from(o.event_log_path.as_str()))
                .filter(|path| !path.is_empty()),
            overload: bootstrap
                .overload_manager
                .as_ref()
                .map(OverloadConfig::compile)
                .transpose()
                .at("overload_manager")?,
        })
    }

    /// Static routes and proxies may only name clusters that exist (Envoy checks them while it starts).
    fn check_references(&self) -> Result<()> {
        if self.cds.is_some() {
            return Ok(());
        }
        let exists = |name: &str| self.clusters.iter().any(|c| *c.name == *name);
        for listener in &self.listeners {
            let unknown = |field: &str, name: &str| Rejected {
                resource: format!("listener {}", listener.name),
                field: field.to_owned(),
                reason: format!("unknown cluster '{name}'"),
            };
            for chain in listener.all_chains() {
                match &chain.terminal {
                    crate::listener::Terminal::Http(hcm) => {
                        let crate::hcm::Routes::Inline(table) = &hcm.routes else { continue };
                        // Inline tables are checked unless they say otherwise.
                        if table.common.validate_clusters == Some(false) {
                            continue;
                        }
                        if let Some(name) = table.cluster_names().find(|name| !exists(name)) {
                            return Err(unknown("route_config", name));
                        }
                    }
                    // `tcp_proxy` finds its cluster when a connection comes.
                    _ => continue,
                }
            }
        }
        Ok(())
    }
}

fn unique<'a>(kind: &str, names: impl Iterator<Item = &'a ArcStr>) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(Rejected {
                resource: format!("{kind} {name}"),
                field: "name".to_owned(),
                reason: format!("duplicate {kind} {name} found"),
            });
        }
    }
    Ok(())
}

impl Node {
    /// What a proxy says about itself.
    pub fn of(node: Option<&pb::core::Node>) -> Self {
        let Some(node) = node else { return Self::default() };
        let locality = node.locality.clone().unwrap_or_default();
        Self {
            id: node.id.as_str().into(),
            cluster: node.cluster.as_str().into(),
            metadata: node.metadata.as_ref().map(|m| Value::Object(metadata::object(m))).unwrap_or_default(),
            locality: crate::endpoints::Locality {
                region: locality.region.as_str().into(),
                zone: locality.zone.as_str().into(),
                sub_zone: locality.sub_zone.as_str().into(),
            },
        }
    }
}

impl Admin {
    fn compile(admin: &pb::bootstrap::Admin, options: &Options) -> Compiled<Option<Self>> {
        if admin.address.is_none() {
            return Ok(None);
        }
        Ok(Some(Self {
            address: Address::compile(admin.address.as_ref()).at("address")?,
            access_log: AccessLog::compile_all(&admin.access_log, options)?,
        }))
    }
}

/// Envoy's own rule for a tag, where it is asked for by its name alone (`source/common/config/well_known_names.cc`).
pub fn default_tag(name: &str) -> Option<&'static str> {
    Some(match name {
        "envoy.cluster_name" => r"^cluster\.((.*?)\.)",
        "envoy.http_conn_manager_prefix" => r"^http\.((.*?)\.)",
        "envoy.listener_address" => r"^listener\.((.*?)\.)",
        "envoy.response_code" => r"_rq(_(\d{3}))$",
        "envoy.response_code_class" => r"_rq_((\d))xx$",
        "envoy.tcp_prefix" => r"^tcp\.((.*?)\.)",
        _ => return None,
    })
}

impl StatsConfig {
    fn compile(config: Option<&pb::metrics::StatsConfig>) -> Compiled<Self> {
        use pb::metrics::stats_matcher::StatsMatcher as Kind;
        use pb::metrics::tag_specifier::TagValue;
        let Some(config) = config else { return Ok(Self::default()) };
        let mut tags = Vec::new();
        for (i, tag) in config.stats_tags.iter().enumerate() {
            let name: ArcStr = tag.tag_name.as_str().into();
            if name.is_empty() {
                return Err(Invalid::new(format!("stats_tags[{i}].tag_name"), "is empty"));
            }
            tags.push(match &tag.tag_value {
                Some(TagValue::Regex(regex)) => {
                    // Envoy's expressions may look ahead; Istio's do so for a dot, behind which they ask for one anyway.
                    let regex = &regex.replace(r"(?=\.)", "");
                    crate::matchers::Regex::new(regex)
                        .map_err(|r| Invalid::new(format!("stats_tags[{i}].regex"), r))?;
                    TagRule::Regex(name, regex.as_str().into())
                }
                Some(TagValue::FixedValue(value)) => TagRule::Fixed(name, value.as_str().into()),
                None => {
                    let all = config.use_all_default_tags.as_ref().is_none_or(|all| all.value);
                    let known = if all { name.starts_with("envoy.") } else { default_tag(&name).is_some() };
                    if !known {
                        return Err(Invalid::new(format!("stats_tags[{i}]"), format!("{name} alone is not supported")));
                    }
                    TagRule::Default(name)
                }
            });
        }
        let names = match config.stats_matcher.as_ref().and_then(|m| m.stats_matcher.as_ref()) {
            None | Some(Kind::RejectAll(false)) => StatsNames::All,
            Some(Kind::RejectAll(true)) => StatsNames::None,
            Some(Kind::InclusionList(list)) => {
                StatsNames::Only(StringMatcher::compile_list(&list.patterns).at("inclusion_list")?)
            }
            Some(Kind::ExclusionList(list)) => {
                StatsNames::Except(StringMatcher::compile_list(&list.patterns).at("exclusion_list")?)
            }
        };
        let mut histogram_buckets = Vec::new();
        for (i, settings) in config.histogram_bucket_settings.iter().enumerate() {
            let matcher = settings.r#match.clone().unwrap_or_default();
            let matcher = StringMatcher::compile(&matcher).at_index("histogram_bucket_settings", i)?;
            histogram_buckets.push((matcher, settings.buckets.clone()));
        }
        Ok(Self {
            tags,
            without_default_tags: config.use_all_default_tags.as_ref().is_some_and(|v| !v.value),
            names,
            histogram_buckets,
        })
    }
}
