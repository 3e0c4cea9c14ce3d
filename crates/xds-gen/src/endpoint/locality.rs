//! Preference for near endpoints (istiod `loadbalancer.go`).

use std::collections::BTreeMap;

use envoy_api::core::Locality;
use envoy_api::endpoint::{ClusterLoadAssignment, LbEndpoint, LocalityLbEndpoints};
use istio_api::MeshConfig;
use istio_api::destination_rule::{
    Distribute, Failover, LoadBalancerSettings, LocalityLoadBalancerSetting, ZoneAwareLoadBalancerSetting,
};
use mesh_types::Labels;
use push_context::Node;
use registry::{Service, TrafficDistribution};

use crate::proto::u32_value;

const NETWORK: &str = "topology.istio.io/network";

/// The setting that holds for a service.
#[derive(Clone, Debug)]
pub(crate) enum Setting {
    /// By locality or labels.
    Locality {
        setting: LocalityLoadBalancerSetting,
        /// Also without outlier detection: the service itself asks for it.
        force: bool,
    },
    /// Envoy's zone aware routing.
    ZoneAware(ZoneAwareLoadBalancerSetting),
}

pub(crate) fn total_weight(endpoints: &[LbEndpoint]) -> u32 {
    endpoints.iter().fold(0, |sum, e| sum.saturating_add(e.load_balancing_weight.map_or(0, |w| w.value)))
}

impl Setting {
    /// istiod `GetEffectiveLbSetting`: the rule's, the service's, the mesh's.
    pub(crate) fn effective(
        mesh: &MeshConfig,
        lb: Option<&LoadBalancerSettings>,
        service: &Service,
    ) -> Option<Setting> {
        if let Some(zone) = lb.and_then(|lb| lb.zone_aware_lb_setting.clone()) {
            return Some(Setting::ZoneAware(zone));
        }
        let plain = |setting: &LocalityLoadBalancerSetting| {
            (setting.enabled != Some(false)).then(|| Setting::Locality { setting: setting.clone(), force: false })
        };
        if let Some(own) = lb.and_then(|lb| lb.locality_lb_setting.as_ref()) {
            return plain(own);
        }
        let mut order = vec![NETWORK, "topology.kubernetes.io/region", "topology.kubernetes.io/zone"];
        if service.traffic_distribution == TrafficDistribution::PreferSameNode {
            order.extend(["topology.istio.io/subzone", "kubernetes.io/hostname"]);
        }
        if service.traffic_distribution != TrafficDistribution::Any {
            let setting = LocalityLoadBalancerSetting {
                failover_priority: order.into_iter().map(str::to_owned).collect(),
                enabled: Some(true),
                ..LocalityLoadBalancerSetting::default()
            };
            return Some(Setting::Locality { setting, force: true });
        }
        match (&mesh.zone_aware_lb_setting, &mesh.locality_lb_setting) {
            (Some(zone), _) => Some(Setting::ZoneAware(zone.clone())),
            (None, Some(own)) => plain(own),
            (None, None) => None,
        }
    }

    /// Sets priorities and weights. `labels` are those of the endpoints of each locality.
    pub(crate) fn apply(
        &self,
        node: &Node,
        place: &registry::Locality,
        failover: bool,
        assignment: &mut ClusterLoadAssignment,
        labels: &[Vec<&Labels>],
    ) {
        let own = Locality {
            region: place.region.to_string(),
            zone: place.zone.to_string(),
            sub_zone: place.subzone.to_string(),
        };
        match self {
            Setting::Locality { setting, .. } if !setting.distribute.is_empty() => {
                distribute(&own, assignment, &setting.distribute);
            }
            Setting::Locality { setting, force } if failover || *force => {
                if setting.failover_priority.is_empty() {
                    fail_over(&own, assignment, &setting.failover);
                } else {
                    by_labels(node, place, assignment, &setting.failover_priority, labels);
                    if !setting.failover.is_empty() {
                        fail_over(&own, assignment, &setting.failover);
                    }
                }
            }
            Setting::Locality { .. } => {}
            Setting::ZoneAware(zone) if zone.enabled.unwrap_or(true) => {
                if !zone.failover_priority.is_empty() {
                    by_labels(node, place, assignment, &zone.failover_priority, labels);
                }
                by_region(&own, assignment, zone);
            }
            Setting::ZoneAware(_) => {}
        }
    }
}

/// Whether a locality lies in `rule`, such as `us-east/*`.
fn fits(locality: Option<&Locality>, rule: &str) -> bool {
    let mut parts = rule.splitn(3, '/');
    let mut next = || parts.next().unwrap_or_default();
    let (region, zone, sub_zone) = (next(), next(), next());
    let get = |f: fn(&Locality) -> &String| locality.map(|l| f(l).as_str()).unwrap_or_default();
    let fit = |rule: &str, own: &str| rule == "*" || rule.is_empty() || rule == own;
    (region == "*" || region == get(|l| &l.region))
        && fit(zone, get(|l| &l.zone))
        && fit(sub_zone, get(|l| &l.sub_zone))
}

fn distribute(own: &Locality, assignment: &mut ClusterLoadAssignment, rules: &[Distribute]) {
    let Some(rule) = rules.iter().find(|r| fits(Some(own), &r.from)) else { return };
    let mut unmatched: Vec<usize> = (0..assignment.endpoints.len()).collect();
    // More exact patterns first, so that a locality counts where it belongs whatever the map's order was.
    let mut targets: Vec<(&String, &u32)> = rule.to.iter().collect();
    targets.sort_by_key(|(pattern, _)| std::cmp::Reverse((!pattern.contains('*'), pattern.len())));
    for (pattern, weight) in targets {
        let fitting: Vec<usize> =
            unmatched.iter().copied().filter(|i| fits(assignment.endpoints[*i].locality.as_ref(), pattern)).collect();
        unmatched.retain(|i| !fitting.contains(i));
        let of = |e: &LocalityLbEndpoints| e.load_balancing_weight.map_or(1, |w| w.value);
        let total: u64 = fitting.iter().map(|i| u64::from(of(&assignment.endpoints[*i]))).sum();
        for i in fitting {
            let endpoints = &mut assignment.endpoints[i];
            let share = u64::from(of(endpoints)) * u64::from(*weight);
            if total > 0 && share > 0 {
                endpoints.load_balancing_weight = u32_value(u32::try_from(share.div_ceil(total)).unwrap_or(u32::MAX));
            }
        }
    }
    for i in unmatched {
        assignment.endpoints[i].lb_endpoints.clear();
    }
}

/// Gaps between priorities are closed, because Envoy wants them consecutive.
fn close_gaps(endpoints: &mut [LocalityLbEndpoints]) {
    let mut used: Vec<u32> = endpoints.iter().map(|e| e.priority).collect();
    used.sort_unstable();
    used.dedup();
    for endpoint in endpoints {
        let index = used.iter().position(|p| *p == endpoint.priority).unwrap_or_default();
        endpoint.priority = u32::try_from(index).unwrap_or_default();
    }
}

/// istiod `applyLocalityFailover`: same subzone, zone, region, the failover's target, the rest.
fn fail_over(own: &Locality, assignment: &mut ClusterLoadAssignment, rules: &[Failover]) {
    for endpoints in &mut assignment.endpoints {
        let there = endpoints.locality.clone().unwrap_or_default();
        let mut priority = match (own.region == there.region, own.zone == there.zone, own.sub_zone == there.sub_zone) {
            (true, true, true) => 0,
            (true, true, false) => 1,
            (true, false, _) => 2,
            (false, _, _) => 3,
        };
        if priority == 3 && rules.iter().find(|r| r.from == own.region).is_some_and(|r| r.to != there.region) {
            priority = 4;
        }
        endpoints.priority = endpoints.priority * 5 + priority;
    }
    close_gaps(&mut assignment.endpoints);
}

fn by_region(own: &Locality, assignment: &mut ClusterLoadAssignment, zone: &ZoneAwareLoadBalancerSetting) {
    for endpoints in &mut assignment.endpoints {
        let region = endpoints.locality.as_ref().map(|l| l.region.clone()).unwrap_or_default();
        let preferred = zone.failover.iter().find(|f| f.from == own.region).is_some_and(|f| f.to == region);
        let priority = match (region == own.region, preferred) {
            (true, _) => 0,
            (false, true) => 1,
            (false, false) => 2,
        };
        endpoints.priority = endpoints.priority * 3 + priority;
    }
    close_gaps(&mut assignment.endpoints);
}

/// istiod `applyFailoverPriorities`: the more leading labels an endpoint shares with the client, the better.
fn by_labels(
    node: &Node,
    place: &registry::Locality,
    assignment: &mut ClusterLoadAssignment,
    order: &[String],
    labels: &[Vec<&Labels>],
) {
    if node.labels.is_empty() || labels.len() != assignment.endpoints.len() {
        return;
    }
    // `label=value` holds for the label wherever it stands; text with more signs names the label only.
    let name = |text: &'_ String| text.split('=').next().unwrap_or_default().to_owned();
    let values: BTreeMap<String, &str> = order
        .iter()
        .filter_map(|text| text.split_once('=').filter(|(_, value)| !value.contains('=')).map(|(_, v)| (name(text), v)))
        .collect();
    let labels_in_order: Vec<String> = order.iter().map(name).collect();
    let value = |label: &String| match values.get(label) {
        Some(value) => *value,
        None => proxy_label(node, place, label),
    };
    let wanted: Vec<(&str, &str)> = labels_in_order.iter().map(|label| (label.as_str(), value(label))).collect();
    let network_first = order.first().is_some_and(|text| text == NETWORK);
    let mut out = Vec::new();
    for (group, labels) in assignment.endpoints.iter().zip(labels) {
        let mut by_priority: BTreeMap<usize, Vec<LbEndpoint>> = BTreeMap::new();
        for (endpoint, labels) in group.lb_endpoints.iter().zip(labels) {
            let differs = |(label, value): &(&str, &str)| labels.get(*label).map_or("", String::as_str) != *value;
            let skip = usize::from(network_first);
            let mut priority = wanted.iter().skip(skip).position(differs).map_or(0, |j| order.len() - j - skip);
            if network_first && wanted.first().is_some_and(differs) {
                priority += order.len();
            }
            by_priority.entry(priority).or_default().push(endpoint.clone());
        }
        for (priority, lb_endpoints) in by_priority {
            out.push(LocalityLbEndpoints {
                priority: u32::try_from(priority).unwrap_or_default(),
                load_balancing_weight: u32_value(total_weight(&lb_endpoints)),
                lb_endpoints,
                ..group.clone()
            });
        }
    }
    close_gaps(&mut out);
    assignment.endpoints = out;
}

/// A label of the client; where it runs counts as labels too.
fn proxy_label<'a>(node: &'a Node, place: &'a registry::Locality, label: &str) -> &'a str {
    if let Some(value) = node.labels.get(label) {
        return value;
    }
    match label {
        "topology.kubernetes.io/region" => &place.region,
        "topology.kubernetes.io/zone" => &place.zone,
        "topology.istio.io/subzone" => &place.subzone,
        "topology.istio.io/cluster" => &node.cluster_id,
        NETWORK => &node.network,
        "kubernetes.io/hostname" => node.meta("NODE_NAME").unwrap_or_default(),
        _ => "",
    }
}
