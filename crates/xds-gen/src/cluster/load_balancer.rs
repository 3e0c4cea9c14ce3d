//! Which endpoint is chosen.

use envoy_api::cluster::cluster::{
    ClusterDiscoveryType, DiscoveryType, LbConfig, LbPolicy, LeastRequestLbConfig, MaglevLbConfig, RingHashLbConfig,
    RoundRobinLbConfig, SlowStartConfig,
    common_lb_config::{LocalityConfigSpecifier, LocalityWeightedLbConfig, ZoneAwareLbConfig},
};
use envoy_api::core::RuntimeDouble;
use istio_api::destination_rule::{ConsistentHashLb, LoadBalancerSettings, SimpleLb};
use mesh_types::Protocol;

use super::policy::{Draft, Target};
use crate::context::Context;
use crate::endpoint::locality::Setting;
use crate::proto::{duration, percent, u64_value};

/// istiod `applyLoadBalancer`.
pub(super) fn apply(cx: &Context<'_>, draft: &mut Draft, target: &Target<'_>) {
    let cluster = &mut draft.cluster;
    if cluster.lb_policy == LbPolicy::ClusterProvided as i32 {
        return;
    }
    let lb = target.policy.load_balancer.as_ref();
    let common = cluster.common_lb_config.get_or_insert_default();
    if common.healthy_panic_threshold.is_none()
        && (cx.push.settings.send_unhealthy || target.service.forces_unhealthy(&cx.push.settings))
    {
        // Unhealthy endpoints are sent too, and never used.
        common.healthy_panic_threshold = percent(0.0);
    }
    let setting = Setting::effective(&cx.push.mesh, lb, target.service);
    let has_outlier = cluster.outlier_detection.is_some();
    let weighted = || Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(LocalityWeightedLbConfig {}));
    match &setting {
        Some(Setting::ZoneAware(zone)) => {
            let enabled = zone.enabled.unwrap_or(true);
            common.locality_config_specifier = Some(LocalityConfigSpecifier::ZoneAwareLbConfig(ZoneAwareLbConfig {
                routing_enabled: if enabled { None } else { percent(0.0) },
                min_cluster_size: zone.min_cluster_size.and_then(u64_value),
                ..ZoneAwareLbConfig::default()
            }));
        }
        Some(Setting::Locality { setting, force }) => {
            let failover = !setting.failover.is_empty() || !setting.failover_priority.is_empty();
            if cx.push.settings.locality_weighted
                || ((*force || has_outlier) && failover)
                || !setting.distribute.is_empty()
            {
                common.locality_config_specifier = weighted();
            }
        }
        None if cx.push.settings.locality_weighted => common.locality_config_specifier = weighted(),
        None => {}
    }
    if let (Some(setting), Some(assignment)) = (&setting, &mut cluster.load_assignment) {
        let builder = crate::endpoint::Builder::new(cx, target.service, target.port.port, target.subset, target.rule);
        // As istiod: endpoints of subsets inside a cluster are not compared by labels.
        let labels = if target.subset.is_empty() { builder.group().1 } else { Vec::new() };
        builder.apply_locality(setting, has_outlier, assignment, &labels);
    }
    if cluster.cluster_discovery_type == Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst as i32)) {
        cluster.lb_policy = LbPolicy::ClusterProvided as i32;
        return;
    }
    // So that the client spreads keys over the servers.
    if cx.push.settings.redis_filter && target.port.protocol == Protocol::Redis {
        cluster.lb_policy = LbPolicy::Maglev as i32;
        return;
    }
    match lb.and_then(|lb| lb.simple).unwrap_or_default() {
        SimpleLb::Random => cluster.lb_policy = LbPolicy::Random as i32,
        SimpleLb::RoundRobin => {
            cluster.lb_policy = LbPolicy::RoundRobin as i32;
            cluster.lb_config = slow_start(lb)
                .map(|slow| LbConfig::RoundRobinLbConfig(RoundRobinLbConfig { slow_start_config: Some(slow) }));
        }
        SimpleLb::Passthrough => {
            cluster.lb_policy = LbPolicy::ClusterProvided as i32;
            cluster.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst as i32));
            cluster.load_assignment = None;
        }
        SimpleLb::LeastRequest | SimpleLb::LeastConn | SimpleLb::Unspecified => {
            cluster.lb_policy = LbPolicy::LeastRequest as i32;
            cluster.lb_config = slow_start(lb).map(|slow| {
                LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
                    slow_start_config: Some(slow),
                    ..Default::default()
                })
            });
        }
    }
    if let Some(hash) = lb.and_then(|lb| lb.consistent_hash.as_ref()) {
        let (policy, config) = consistent_hash(hash);
        cluster.lb_policy = policy as i32;
        if config.is_some() {
            cluster.lb_config = config;
        }
    }
}

fn slow_start(lb: Option<&LoadBalancerSettings>) -> Option<SlowStartConfig> {
    let lb = lb?;
    if let Some(warmup) = &lb.warmup {
        return Some(SlowStartConfig {
            slow_start_window: warmup.duration.map(duration),
            // The key is a name that no runtime has; istiod sends just this.
            aggression: Some(RuntimeDouble {
                default_value: warmup.aggression.unwrap_or(1.0),
                runtime_key: "(".to_owned(),
            }),
            min_weight_percent: percent(warmup.minimum_percent.unwrap_or(10.0)),
        });
    }
    let window = lb.warmup_duration_secs?;
    Some(SlowStartConfig { slow_start_window: Some(duration(window)), ..SlowStartConfig::default() })
}

/// By what requests stay with an endpoint (istiod `ApplyRingHashLoadBalancer`).
pub(crate) fn consistent_hash(hash: &ConsistentHashLb) -> (LbPolicy, Option<LbConfig>) {
    let ring = |size: u64| {
        LbConfig::RingHashLbConfig(RingHashLbConfig { minimum_ring_size: u64_value(size), ..Default::default() })
    };
    if let Some(maglev) = &hash.maglev {
        let config = LbConfig::MaglevLbConfig(MaglevLbConfig { table_size: u64_value(maglev.table_size) });
        return (LbPolicy::Maglev, (maglev.table_size != 0).then_some(config));
    }
    if let Some(own) = &hash.ring_hash {
        return (LbPolicy::RingHash, (own.minimum_ring_size != 0).then(|| ring(own.minimum_ring_size)));
    }
    let size = if hash.minimum_ring_size == 0 { 1024 } else { hash.minimum_ring_size };
    (LbPolicy::RingHash, Some(ring(size)))
}
