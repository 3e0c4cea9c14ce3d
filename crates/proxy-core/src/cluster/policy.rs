use std::time::Duration;

use envoy_api::pb::google::protobuf::UInt64Value;
use mesh_types::ArcStr;
use serde_json::{Map, Value};

use crate::any::Typed;
use crate::metadata::MetadataMatch;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};
use crate::route::HashPolicy;
use crate::runtime::{Live, Runtime};
use crate::{fields, metadata};

/// How a host is chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum LbPolicy {
    /// One after the other.
    RoundRobin(Option<SlowStart>),
    /// Of so many random ones the one with the fewest requests; `bias` matters with unequal weights.
    LeastRequest { choices: u32, bias: Live<f64>, full_scan: bool, slow_start: Option<SlowStart> },
    /// Any.
    Random,
    /// By hash on a ring.
    RingHash {
        /// Of hosts and requests.
        function: HashFunction,
        /// Entries at least.
        min_size: u64,
        /// Entries at most.
        max_size: u64,
        /// Hosts are hashed by their names.
        by_hostname: bool,
        /// No host gets more than so many percent of the average.
        balance_factor: Option<u32>,
    },
    /// By hash in a table of this (prime) size.
    Maglev {
        /// Entries, a prime number.
        table_size: u64,
        /// Hosts are hashed by their names.
        by_hostname: bool,
        /// As of a ring.
        balance_factor: Option<u32>,
    },
    /// The cluster's type decides (original destination, dynamic forward proxy).
    ClusterProvided,
}

impl LbPolicy {
    /// Whether it asks for a request's hash.
    pub fn is_hashing(&self) -> bool {
        matches!(self, Self::RingHash { .. } | Self::Maglev { .. })
    }
}

/// How traffic stays in our own zone, where there is a local cluster (`ZoneAwareLbConfig`).
#[derive(Clone, Debug)]
pub struct ZoneAware {
    /// So many percent of it are routed by zone.
    pub enabled: Live<u64>,
    /// Only if there are so many hosts.
    pub min_size: Live<u64>,
    /// All of it stays if there is a host at all.
    pub force_direct: bool,
    /// All of it stays if there are so many hosts.
    pub force_with: Option<u64>,
    /// Shares are those of the hosts' weights instead of their number.
    pub by_weight: bool,
}

impl ZoneAware {
    fn new(
        enabled: Option<&pb::kind::Percent>,
        min_size: Option<&UInt64Value>,
        force_direct: bool,
        runtime: &Runtime,
    ) -> Compiled<Self> {
        let enabled = fields::percent("routing_enabled", enabled, 100.0)?.round() as u64;
        let min_size = min_size.map_or(6, |size| size.value);
        Ok(Self {
            enabled: runtime.live("upstream.zone_routing.enabled", enabled),
            min_size: runtime.live("upstream.zone_routing.min_cluster_size", min_size),
            force_direct,
            force_with: None,
            by_weight: false,
        })
    }
}

/// The hash function of a ring.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HashFunction {
    /// xxHash64.
    Xx,
    /// MurmurHash2.
    Murmur2,
}

/// New hosts get their share little by little.
#[derive(Clone, Debug, PartialEq)]
pub struct SlowStart {
    /// After this they have all of it.
    pub window: Duration,
    /// 1: linear; more: slower at first.
    pub aggression: Live<f64>,
    /// Never less than this share.
    pub min_weight: f64,
}

/// Hosts in groups by their `envoy.lb` metadata.
#[derive(Clone, Debug, Default)]
pub struct SubsetConfig {
    /// What happens to requests that fit no group.
    pub fallback: SubsetFallback,
    /// The group of [`SubsetFallback::DefaultSubset`].
    pub default_subset: Map<String, Value>,
    /// Which keys make groups.
    pub selectors: Vec<SubsetSelector>,
    /// Lists in metadata stand for each of their members.
    pub list_as_any: bool,
    /// A group without healthy hosts falls back to any host.
    pub panic_mode_any: bool,
    /// Locality weights count in groups.
    pub locality_weight_aware: bool,
    /// They count by the share of a locality's hosts that are in the group.
    pub scale_locality_weight: bool,
    /// Requests may bring a list of criteria, of which the first that finds a host is used.
    pub fallback_list: bool,
}

/// Keys that make groups.
#[derive(Clone, Debug)]
pub struct SubsetSelector {
    /// Sorted.
    pub keys: Vec<ArcStr>,
    /// Instead of the general fallback.
    pub fallback: Option<SubsetFallback>,
    /// Keys to try with [`SubsetFallback::Keys`]. Sorted.
    pub fallback_keys: Vec<ArcStr>,
    /// Only the first host of a group counts.
    pub single_host: bool,
}

/// What happens to requests that fit no group.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum SubsetFallback {
    /// They fail.
    #[default]
    None,
    /// Any host serves them.
    Any,
    /// The default group does.
    DefaultSubset,
    /// Fewer keys are tried (selectors only).
    Keys,
}

/// Everything about choosing hosts.
pub(super) struct Balancing {
    pub(super) lb: LbPolicy,
    pub(super) locality_weighted: bool,
    pub(super) panic_threshold: Live<f64>,
    pub(super) fail_on_panic: bool,
    pub(super) zones: ZoneAware,
    pub(super) subsets: Option<SubsetConfig>,
    pub(super) hash_policies: Box<[HashPolicy]>,
}

impl Balancing {
    pub(super) fn compile(
        cluster: &pb::cluster::Cluster,
        common: &pb::cluster::cluster::CommonLbConfig,
        runtime: &Runtime,
    ) -> Compiled<Self> {
        use pb::cluster::cluster::common_lb_config::LocalityConfigSpecifier as Locality;
        // Without selectors the rest means nothing (Envoy `LegacyLbPolicyConfigHelper`).
        let subsets = cluster.lb_subset_config.as_ref().filter(|config| !config.subset_selectors.is_empty());
        let mut balancing = Self {
            lb: LbPolicy::RoundRobin(None),
            locality_weighted: matches!(common.locality_config_specifier, Some(Locality::LocalityWeightedLbConfig(_))),
            // Absent means 50, while an empty message means 0.
            panic_threshold: runtime.live(
                "upstream.healthy_panic_threshold",
                fields::percent(
                    "common_lb_config.healthy_panic_threshold",
                    common.healthy_panic_threshold.as_ref(),
                    50.0,
                )?,
            ),
            fail_on_panic: matches!(&common.locality_config_specifier,
                Some(Locality::ZoneAwareLbConfig(zone)) if zone.fail_traffic_on_panic)
                // Hashing knows no zones.
                && !matches!(cluster.lb_policy(), pb::cluster::cluster::LbPolicy::RingHash | pb::cluster::cluster::LbPolicy::Maglev),
            zones: match &common.locality_config_specifier {
                Some(Locality::ZoneAwareLbConfig(zone)) => {
                    let (enabled, size) = (zone.routing_enabled.as_ref(), zone.min_cluster_size.as_ref());
                    ZoneAware::new(enabled, size, false, runtime).at("common_lb_config.zone_aware_lb_config")?
                }
                _ => ZoneAware::new(None, None, false, runtime)?,
            },
            subsets: subsets.map(SubsetConfig::compile).transpose().at("lb_subset_config")?,
            hash_policies: Box::default(),
        };
        // An explicit policy replaces `lb_policy` and its settings (Envoy takes the first it knows).
        match &cluster.load_balancing_policy {
            Some(policies) => balancing.explicit(policies, runtime).at("load_balancing_policy")?,
            None => balancing.lb = by_enum(cluster, common, runtime)?,
        }
        Ok(balancing)
    }

    fn explicit(&mut self, policies: &pb::cluster::LoadBalancingPolicy, runtime: &Runtime) -> Compiled<()> {
        use pb::ext::load_balancing_policies as policy;
        let mut unknown = Invalid::new("policies", "is empty");
        for entry in &policies.policies {
            let typed = Typed::open(entry.typed_extension_config.as_ref().and_then(|e| e.typed_config.as_ref()))?;
            let short = typed.name.strip_prefix("envoy.extensions.load_balancing_policies.").unwrap_or(&typed.name);
            match short {
                "round_robin.v3.RoundRobin" => {
                    let config: policy::round_robin::v3::RoundRobin = typed.decode_unchecked()?;
                    let slow = config
                        .slow_start_config
                        .as_ref()
                        .map(|s| (s.slow_start_window.as_ref(), s.aggression.as_ref(), s.min_weight_percent.as_ref()));
                    self.lb = LbPolicy::RoundRobin(slow_start(slow, runtime)?);
                    self.locality(config.locality_lb_config.as_ref(), runtime)?;
                }
                "least_request.v3.LeastRequest" => {
                    let config: policy::least_request::v3::LeastRequest = typed.decode_unchecked()?;
                    let slow = config
                        .slow_start_config
                        .as_ref()
                        .map(|s| (s.slow_start_window.as_ref(), s.aggression.as_ref(), s.min_weight_percent.as_ref()));
                    self.lb = LbPolicy::LeastRequest {
                        choices: fields::uint(config.choice_count.as_ref(), 2).max(2),
                        bias: runtime.double(config.active_request_bias.as_ref(), 1.0),
                        full_scan: config.selection_method == 1
                            || fields::flag(config.enable_full_scan.as_ref(), false),
                        slow_start: slow_start(slow, runtime)?,
                    };
                    self.locality(config.locality_lb_config.as_ref(), runtime)?;
                }
                "random.v3.Random" => {
                    let config: policy::random::v3::Random = typed.decode_unchecked()?;
                    self.lb = LbPolicy::Random;
                    self.locality(config.locality_lb_config.as_ref(), runtime)?;
                }
                "ring_hash.v3.RingHash" => {
                    let config: policy::ring_hash::v3::RingHash = typed.decode_unchecked()?;
                    let hashing = config.consistent_hashing_lb_config.clone().unwrap_or_default();
                    self.hash_policies = HashPolicy::compile_all(&hashing.hash_policy)?;
                    let (min_size, max_size) =
                        ring_sizes(config.minimum_ring_size.as_ref(), config.maximum_ring_size.as_ref())?;
                    self.lb = LbPolicy::RingHash {
                        function: if config.hash_function == 2 { HashFunction::Murmur2 } else { HashFunction::Xx },
                        min_size,
                        max_size,
                        by_hostname: hashing.use_hostname_for_hashing || config.use_hostname_for_hashing,
                        balance_factor: balance_factor(
                            hashing.hash_balance_factor.as_ref().or(config.hash_balance_factor.as_ref()),
                        ),
                    };
                    self.locality_weighted |= config.locality_weighted_lb_config.is_some();
                }
                "maglev.v3.Maglev" => {
                    let config: policy::maglev::v3::Maglev = typed.decode_unchecked()?;
                    let hashing = config.consistent_hashing_lb_config.clone().unwrap_or_default();
                    self.hash_policies = HashPolicy::compile_all(&hashing.hash_policy)?;
                    self.lb = LbPolicy::Maglev {
                        table_size: table_size(fields::ulong(config.table_size.as_ref(), 65_537))?,
                        by_hostname: hashing.use_hostname_for_hashing,
                        balance_factor: balance_factor(hashing.hash_balance_factor.as_ref()),
                    };
                    self.locality_weighted |= config.locality_weighted_lb_config.is_some();
                }
                "cluster_provided.v3.ClusterProvided" => self.lb = LbPolicy::ClusterProvided,
                "wrr_locality.v3.WrrLocality" => {
                    let config: policy::wrr_locality::v3::WrrLocality = typed.decode_unchecked()?;
                    return Err(picked_by_locality(config.endpoint_picking_policy.as_ref()));
                }
                "subset.v3.Subset" => {
                    let config: policy::subset::v3::Subset = typed.decode_unchecked()?;
                    self.subsets = Some(SubsetConfig::of_policy(&config)?);
                    return self.explicit(&config.subset_lb_policy.unwrap_or_default(), runtime);
                }
                _ => {
                    unknown = typed.unknown();
                    continue;
                }
            }
            return Ok(());
        }
        Err(unknown)
    }

    fn locality(
        &mut self,
        config: Option<&pb::ext::load_balancing_policies::common::v3::LocalityLbConfig>,
        runtime: &Runtime,
    ) -> Compiled<()> {
        use pb::ext::load_balancing_policies::common::v3::locality_lb_config::LocalityConfigSpecifier as Kind;
        use pb::ext::load_balancing_policies::common::v3::locality_lb_config::zone_aware_lb_config::{
            ForceLocalZone, LocalityBasis,
        };
        match config.and_then(|c| c.locality_config_specifier.as_ref()) {
            Some(Kind::LocalityWeightedLbConfig(_)) => self.locality_weighted = true,
            Some(Kind::ZoneAwareLbConfig(zone)) => {
                self.fail_on_panic = zone.fail_traffic_on_panic;
                let (enabled, size) = (zone.routing_enabled.as_ref(), zone.min_cluster_size.as_ref());
                self.zones = ZoneAware::new(enabled, size, zone.force_locality_direct_routing, runtime)
                    .at("locality_lb_config.zone_aware_lb_config")?;
                let basis: LocalityBasis = fields::enumeration("locality_basis", zone.locality_basis)?;
                self.zones.by_weight = basis == LocalityBasis::HealthyHostsWeight;
                let least = |force: &ForceLocalZone| u64::from(fields::uint(force.min_size.as_ref(), 1));
                self.zones.force_with = zone.force_local_zone.as_ref().map(least);
            }
            None => {}
        }
        Ok(())
    }
}

/// Why weighted localities are refused: Envoy has them for hosts that report their load only, which are not supported.
fn picked_by_locality(policy: Option<&pb::cluster::LoadBalancingPolicy>) -> Invalid {
    let types =
        policy.iter().flat_map(|policy| &policy.policies).filter_map(|entry| entry.typed_extension_config.as_ref());
    let by_load =
        "envoy.extensions.load_balancing_policies.client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin";
    let mut types = types.filter_map(|extension| extension.typed_config.as_ref());
    match types.any(|any| any.type_url.ends_with(by_load)) {
        true => Invalid::unsupported("endpoint_picking_policy.client_side_weighted_round_robin"),
        false => Invalid::new("endpoint_picking_policy", "only goes with client_side_weighted_round_robin"),
    }
}

/// Envoy's bound on the size of a ring.
const MAX_RING: u64 = 8 << 20;

fn by_enum(
    cluster: &pb::cluster::Cluster,
    common: &pb::cluster::cluster::CommonLbConfig,
    runtime: &Runtime,
) -> Compiled<LbPolicy> {
    use pb::cluster::cluster::{LbConfig, LbPolicy as Enum};
    type Parts<'a> = (Option<&'a pb::Duration>, Option<&'a pb::core::RuntimeDouble>, Option<&'a pb::kind::Percent>);
    fn parts(s: &pb::cluster::cluster::SlowStartConfig) -> Parts<'_> {
        (s.slow_start_window.as_ref(), s.aggression.as_ref(), s.min_weight_percent.as_ref())
    }
    let hashing = common.consistent_hashing_lb_config.unwrap_or_default();
    let by_hostname = hashing.use_hostname_for_hashing;
    let balance_factor = balance_factor(hashing.hash_balance_factor.as_ref());
    Ok(match fields::enumeration("lb_policy", cluster.lb_policy)? {
        Enum::RoundRobin => LbPolicy::RoundRobin(match &cluster.lb_config {
            Some(LbConfig::RoundRobinLbConfig(config)) => {
                slow_start(config.slow_start_config.as_ref().map(parts), runtime).at("round_robin_lb_config")?
            }
            _ => None,
        }),
        Enum::LeastRequest => {
            let config = match &cluster.lb_config {
                Some(LbConfig::LeastRequestLbConfig(config)) => config.clone(),
                _ => Default::default(),
            };
            LbPolicy::LeastRequest {
                choices: fields::uint(config.choice_count.as_ref(), 2).max(2),
                bias: runtime.double(config.active_request_bias.as_ref(), 1.0),
                full_scan: false,
                slow_start: slow_start(config.slow_start_config.as_ref().map(parts), runtime)
                    .at("least_request_lb_config")?,
            }
        }
        Enum::Random => LbPolicy::Random,
        Enum::RingHash => {
            let config = match &cluster.lb_config {
                Some(LbConfig::RingHashLbConfig(config)) => *config,
                _ => Default::default(),
            };
            let sizes = ring_sizes(config.minimum_ring_size.as_ref(), config.maximum_ring_size.as_ref());
            let (min_size, max_size) = sizes.at("ring_hash_lb_config")?;
            let function = if config.hash_function == 1 { HashFunction::Murmur2 } else { HashFunction::Xx };
            LbPolicy::RingHash { function, min_size, max_size, by_hostname, balance_factor }
        }
        Enum::Maglev => {
            let size = match &cluster.lb_config {
                Some(LbConfig::MaglevLbConfig(config)) => fields::ulong(config.table_size.as_ref(), 65_537),
                _ => 65_537,
            };
            LbPolicy::Maglev { table_size: table_size(size).at("maglev_lb_config")?, by_hostname, balance_factor }
        }
        Enum::ClusterProvided => LbPolicy::ClusterProvided,
        Enum::LoadBalancingPolicyConfig => return Err(Invalid::new("load_balancing_policy", "is missing")),
    })
}

/// Less than 100 is refused in clusters' own fields only, whose rules Envoy looks at; 0 is no bound.
fn balance_factor(factor: Option<&pb::UInt32Value>) -> Option<u32> {
    factor.map(|factor| factor.value).filter(|factor| *factor > 0)
}

/// Bounds of a ring's entries: every one takes memory.
fn ring_sizes(min: Option<&UInt64Value>, max: Option<&UInt64Value>) -> Compiled<(u64, u64)> {
    let (min, max) = (fields::ulong(min, 1024), fields::ulong(max, MAX_RING));
    if min > max || max > MAX_RING {
        let why = format!("({min}) > maximum_ring_size ({max}), or above {MAX_RING}");
        return Err(Invalid::new("minimum_ring_size", why));
    }
    Ok((min, max))
}

fn table_size(size: u64) -> Compiled<u64> {
    let is_prime = || size >= 2 && (2..).take_while(|d| d * d <= size).all(|d| !size.is_multiple_of(d));
    // In this order: whether a large number is prime takes long to find out.
    if size > 5_000_011 || !is_prime() {
        return Err(Invalid::new(
            "table_size",
            format!("the table size of maglev must be a prime up to 5000011, not {size}"),
        ));
    }
    Ok(size)
}

fn slow_start(
    config: Option<(Option<&pb::Duration>, Option<&pb::core::RuntimeDouble>, Option<&pb::kind::Percent>)>,
    runtime: &Runtime,
) -> Compiled<Option<SlowStart>> {
    let Some((window, aggression, min_weight)) = config else { return Ok(None) };
    let min_weight = fields::percent("min_weight_percent", min_weight, 10.0)? / 100.0;
    let Some(window) = fields::duration_or_off("slow_start_window", window, None)? else { return Ok(None) };
    Ok(Some(SlowStart { window, aggression: runtime.double(aggression, 1.0), min_weight }))
}

impl SubsetFallback {
    fn general(value: i32) -> Compiled<Self> {
        Ok(match value {
            0 => Self::None,
            1 => Self::Any,
            2 => Self::DefaultSubset,
            other => return Err(Invalid::new("fallback_policy", format!("{other} is no known value"))),
        })
    }

    fn of_selector(value: i32) -> Compiled<Option<Self>> {
        Ok(match value {
            0 => None,
            1 => Some(Self::None),
            2 => Some(Self::Any),
            3 => Some(Self::DefaultSubset),
            4 => Some(Self::Keys),
            other => return Err(Invalid::new("fallback_policy", format!("{other} is no known value"))),
        })
    }
}

impl SubsetSelector {
    fn new(keys: &[String], fallback: i32, fallback_keys: &[String]) -> Compiled<Self> {
        let sorted = |keys: &[String]| {
            let mut keys: Vec<ArcStr> = keys.iter().map(|k| k.as_str().into()).collect();
            keys.sort();
            keys.dedup();
            keys
        };
        let fallback = SubsetFallback::of_selector(fallback)?;
        let (keys, fallback_keys) = (sorted(keys), sorted(fallback_keys));
        let fits = match fallback {
            Some(SubsetFallback::Keys) => {
                !fallback_keys.is_empty()
                    && fallback_keys.len() < keys.len()
                    && fallback_keys.iter().all(|key| keys.contains(key))
            }
            _ => fallback_keys.is_empty(),
        };
        if !fits {
            let why = "must be some, not all, of the selector's keys, with KEYS_SUBSET only";
            return Err(Invalid::new("fallback_keys_subset", why));
        }
        Ok(Self { keys, fallback, fallback_keys, single_host: false })
    }
}

/// The key of criteria under which a list of others stands.
const FALLBACK_LIST: &str = "fallback_list";

fn fallback_list(policy: i32) -> Compiled<bool> {
    match policy {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Invalid::new("metadata_fallback_policy", format!("{other} is no known value"))),
    }
}

impl SubsetConfig {
    /// The criteria to try one after the other, if a request brings a list of them.
    pub(crate) fn alternatives(&self, criteria: Option<&MetadataMatch>) -> Option<Vec<MetadataMatch>> {
        let criteria = criteria.filter(|_| self.fallback_list)?;
        let (_, list) = criteria.0.iter().find(|(key, _)| **key == *FALLBACK_LIST)?;
        let rest = criteria.0.iter().filter(|(key, _)| **key != *FALLBACK_LIST).cloned();
        let rest = MetadataMatch(rest.collect());
        let one = |entry: &Value| {
            let fields = entry.as_object().into_iter().flatten();
            let fields = fields.map(|(key, value)| (key.as_str().into(), value.clone()));
            MetadataMatch(fields.collect()).merged_over(Some(&rest))
        };
        Some(match list.as_array() {
            Some(list) if !list.is_empty() => list.iter().map(one).collect(),
            _ => vec![rest],
        })
    }

    fn compile(config: &pb::cluster::cluster::LbSubsetConfig) -> Compiled<Self> {
        let mut selectors = Vec::new();
        for (i, selector) in config.subset_selectors.iter().enumerate() {
            let (keys, fallback_keys) = (&selector.keys, &selector.fallback_keys_subset);
            let mut compiled =
                SubsetSelector::new(keys, selector.fallback_policy, fallback_keys).at_index("subset_selectors", i)?;
            compiled.single_host = selector.single_host_per_subset;
            selectors.push(compiled);
        }
        Ok(Self {
            fallback: SubsetFallback::general(config.fallback_policy)?,
            default_subset: config.default_subset.as_ref().map(metadata::object).unwrap_or_default(),
            selectors,
            list_as_any: config.list_as_any,
            panic_mode_any: config.panic_mode_any,
            locality_weight_aware: config.locality_weight_aware,
            scale_locality_weight: config.scale_locality_weight,
            fallback_list: fallback_list(config.metadata_fallback_policy)?,
        })
    }

    fn of_policy(config: &pb::ext::load_balancing_policies::subset::v3::Subset) -> Compiled<Self> {
        let mut selectors = Vec::new();
        for (i, selector) in config.subset_selectors.iter().enumerate() {
            let (keys, fallback_keys) = (&selector.keys, &selector.fallback_keys_subset);
            let mut compiled =
                SubsetSelector::new(keys, selector.fallback_policy, fallback_keys).at_index("subset_selectors", i)?;
            compiled.single_host = selector.single_host_per_subset;
            selectors.push(compiled);
        }
        Ok(Self {
            fallback: SubsetFallback::general(config.fallback_policy)?,
            default_subset: config.default_subset.as_ref().map(metadata::object).unwrap_or_default(),
            selectors,
            list_as_any: config.list_as_any,
            panic_mode_any: config.panic_mode_any,
            locality_weight_aware: config.locality_weight_aware,
            scale_locality_weight: config.scale_locality_weight,
            fallback_list: fallback_list(config.metadata_fallback_policy)?,
        })
    }
}
