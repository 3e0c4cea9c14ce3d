//! Clusters by name, subsets too: endpoints by EDS, and the part of a DestinationRule that these clients know.

use envoy_api::Resource;
use envoy_api::cluster::circuit_breakers::Thresholds;
use envoy_api::cluster::cluster::{ClusterDiscoveryType, CommonLbConfig, DiscoveryType, EdsClusterConfig, LbPolicy};
use envoy_api::cluster::{CircuitBreakers, Cluster};
use envoy_api::core::{
    AggregatedConfigSource, ConfigSource, HealthStatus, HealthStatusSet, config_source::ConfigSourceSpecifier,
};
use envoy_api::tls::UpstreamTlsContext;
use istio_api::destination_rule::{SimpleLb, TlsMode, TrafficPolicy};
use registry::Service;

use crate::Names;
use crate::cluster::{consistent_hash, merged_policy};
use crate::context::Context;
use crate::names;
use crate::proto::u32_value;

/// The clusters of these names; without names there is none.
pub(super) fn all(cx: &Context<'_>, wanted: Names<'_>) -> Vec<Resource> {
    let Names::List(list) = wanted else { return Vec::new() };
    let clusters = list.iter().filter_map(|name| cluster(cx, name));
    clusters.map(|cluster| Resource::new(cluster.name.as_str(), &cluster)).collect()
}

fn cluster(cx: &Context<'_>, name: &str) -> Option<Cluster> {
    let (port, subset, host) = names::parse_outbound(name)?;
    let service = cx.scope.service(host)?;
    service.port(port)?;
    let rule = cx.scope.destination_rule(cx.node, &service.hostname, true).map(|rule| &rule.spec);
    let of_rule = rule.and_then(|rule| rule.traffic_policy.as_ref());
    let mut out = eds(name);
    let policy = if subset.is_empty() {
        if service.keeps_draining(&cx.push.settings) {
            let usable = [HealthStatus::Healthy, HealthStatus::Draining, HealthStatus::Unknown, HealthStatus::Degraded];
            let statuses = usable.map(|status| status as i32).to_vec();
            out.common_lb_config = Some(CommonLbConfig {
                override_host_status: Some(HealthStatusSet { statuses }),
                ..CommonLbConfig::default()
            });
        }
        merged_policy(of_rule, None, port)
    } else {
        let subset = rule?.subsets.iter().find(|own| own.name == subset)?;
        merged_policy(of_rule, subset.traffic_policy.as_ref(), port)
    };
    if let Some(policy) = policy {
        apply(cx, &mut out, service, &policy);
    }
    Some(out)
}

fn eds(name: &str) -> Cluster {
    let source = ConfigSourceSpecifier::Ads(AggregatedConfigSource {});
    Cluster {
        name: name.to_owned(),
        alt_stat_name: names::stat(name),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32)),
        eds_cluster_config: Some(EdsClusterConfig {
            service_name: name.to_owned(),
            eds_config: Some(ConfigSource { config_source_specifier: Some(source), ..ConfigSource::default() }),
        }),
        ..Cluster::default()
    }
}

fn apply(cx: &Context<'_>, out: &mut Cluster, service: &Service, policy: &TrafficPolicy) {
    // Mutual TLS only where a rule says so: nobody knows whether the client takes credentials from xDS, and servers that also
    // take plain text cannot be told apart by it.
    if policy.tls.as_ref().is_some_and(|tls| tls.mode == TlsMode::IstioMutual) {
        let common = super::certificates(&cx.push.service_accounts(service));
        let context = UpstreamTlsContext { common_tls_context: Some(common), ..UpstreamTlsContext::default() };
        out.transport_socket = Some(super::transport_socket(&context));
    }
    if let Some(lb) = &policy.load_balancer {
        match (&lb.consistent_hash, lb.simple.unwrap_or_default()) {
            (Some(hash), _) => {
                let (policy, config) = consistent_hash(hash);
                (out.lb_policy, out.lb_config) = (policy as i32, config);
            }
            (None, SimpleLb::LeastRequest) => out.lb_policy = LbPolicy::LeastRequest as i32,
            // Their own default is taking turns; they know no other policies.
            (None, _) => {}
        }
    }
    let http = policy.connection_pool.as_ref().and_then(|pool| pool.http.as_ref());
    let most = http.and_then(|http| u32::try_from(http.http2_max_requests).ok()).filter(|most| *most > 0);
    if let Some(most) = most {
        // The only limit that they know.
        let thresholds = vec![Thresholds { max_requests: u32_value(most), ..Thresholds::default() }];
        out.circuit_breakers = Some(CircuitBreakers { thresholds, ..CircuitBreakers::default() });
    }
}
