use std::collections::BTreeMap;

use prost::Message;
use serde_json::{Value, json};

use super::*;
use crate::Options;
use crate::endpoints::HealthFlag;

fn cluster(config: Value) -> Arc<Cluster> {
    let bytes = envoy_api::json::from_json(envoy_api::type_url::CLUSTER, &config).unwrap();
    Arc::new(Cluster::compile(&Message::decode(bytes.as_slice()).unwrap(), &Options::default()).unwrap())
}

/// Hosts `10.0.PRIORITY.N:80`, as many as asked for in each priority.
fn hosts(priorities: &[usize]) -> Value {
    let host = |p: usize, n: usize| json!({"endpoint": {"address": {"socket_address": {"address": format!("10.0.{p}.{n}"), "port_value": 80}}}});
    let endpoints: Vec<_> = priorities
        .iter()
        .enumerate()
        .map(|(p, count)| json!({"priority": p, "lb_endpoints": (1..=*count).map(|n| host(p, n)).collect::<Vec<_>>()}))
        .collect();
    json!({"cluster_name": "c", "endpoints": endpoints})
}

fn balancer(extra: Value, priorities: &[usize]) -> LoadBalancer {
    let mut config = json!({"name": "c", "type": "STATIC", "load_assignment": hosts(priorities)});
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let cluster = cluster(config);
    let endpoints = Arc::clone(&cluster.endpoints);
    LoadBalancer::new(cluster, endpoints, 0)
}

fn shares(balancer: &mut LoadBalancer, picks: usize) -> BTreeMap<String, usize> {
    let mut random = Random::new(1);
    let mut counts = BTreeMap::new();
    for _ in 0..picks {
        if let Some(host) = balancer.pick(&PickContext::at(Instant::now()), &mut random) {
            *counts.entry(host.address.to_string()).or_insert(0) += 1;
        }
    }
    counts
}

fn fail(balancer: &LoadBalancer, address: &str) {
    let host = balancer.endpoints().find(&Address::Ip(address.parse().unwrap())).unwrap();
    host.state.set(HealthFlag::FailedActive, true);
}

#[test]
fn round_robin_goes_round() {
    let counts = shares(&mut balancer(json!({}), &[3]), 9);
    assert_eq!(counts.values().copied().collect::<Vec<_>>(), [3, 3, 3]);
}

#[test]
fn weights_count() {
    let mut assignment = hosts(&[2]);
    assignment["endpoints"][0]["lb_endpoints"][0]["load_balancing_weight"] = json!(3);
    let mut balancer = balancer(json!({"load_assignment": assignment}), &[2]);
    let counts = shares(&mut balancer, 400);
    assert_eq!(counts["10.0.0.1:80"], 300);
}

#[test]
fn unhealthy_hosts_get_nothing_until_panic() {
    let mut balancer = balancer(json!({}), &[4]);
    fail(&balancer, "10.0.0.1:80");
    assert_eq!(shares(&mut balancer, 30).len(), 3);
    fail(&balancer, "10.0.0.2:80");
    fail(&balancer, "10.0.0.3:80");
    // Under half of them are healthy: all are used.
    assert_eq!(shares(&mut balancer, 40).len(), 4);
}

#[test]
fn without_panic_nobody_is_left() {
    let mut balancer = balancer(json!({"common_lb_config": {"healthy_panic_threshold": {}}}), &[1]);
    fail(&balancer, "10.0.0.1:80");
    assert!(shares(&mut balancer, 5).is_empty());
}

#[test]
fn load_spills_over_when_a_priority_gets_sick() {
    let mut balancer = balancer(json!({}), &[4, 4]);
    assert!(shares(&mut balancer, 200).keys().all(|a| a.starts_with("10.0.0.")));
    fail(&balancer, "10.0.0.1:80");
    fail(&balancer, "10.0.0.2:80");
    // 140 % of half the hosts: 70 % stay.
    let counts = shares(&mut balancer, 10_000);
    let stayed: usize = counts.iter().filter(|(a, _)| a.starts_with("10.0.0.")).map(|(_, n)| n).sum();
    assert!((6700..7300).contains(&stayed), "{stayed}");
}

#[test]
fn least_request_avoids_busy_hosts() {
    let mut balancer = balancer(json!({"lb_policy": "LEAST_REQUEST"}), &[2]);
    let busy = balancer.endpoints().hosts().next().unwrap().clone();
    busy.state.active.store(10, Ordering::Relaxed);
    let counts = shares(&mut balancer, 1000);
    // Only when both draws hit the busy one.
    assert!((200..300).contains(&counts["10.0.0.1:80"]), "{counts:?}");
}

#[test]
fn equal_hashes_go_to_one_host() {
    for policy in ["RING_HASH", "MAGLEV"] {
        let mut balancer = balancer(json!({"lb_policy": policy}), &[5]);
        let mut random = Random::new(1);
        let mut of = |hash: u64| {
            let cx = PickContext { hash: Some(hash), ..PickContext::at(Instant::now()) };
            balancer.pick(&cx, &mut random).unwrap().address.to_string()
        };
        let spread: std::collections::BTreeSet<_> =
            (0..200u64).map(|n| of(crate::hash::xx64(&n.to_le_bytes(), 0))).collect();
        assert_eq!(spread.len(), 5, "{policy}");
        assert_eq!(of(12345), of(12345));
    }
}

#[test]
fn subsets_by_metadata() {
    let mut assignment = hosts(&[3]);
    for (n, version) in [(0, "1"), (1, "2"), (2, "2")] {
        assignment["endpoints"][0]["lb_endpoints"][n]["metadata"] =
            json!({"filter_metadata": {"envoy.lb": {"version": version}}});
    }
    let pick = |fallback: &str, version: Option<&str>| {
        let mut balancer = balancer(
            json!({"load_assignment": assignment, "lb_subset_config": {"fallback_policy": fallback,
                "subset_selectors": [{"keys": ["version"]}], "default_subset": {"version": "1"}}}),
            &[3],
        );
        let criteria = version.map(|v| MetadataMatch(vec![("version".into(), json!(v))]));
        let cx = PickContext { metadata_match: criteria.as_ref(), ..PickContext::at(Instant::now()) };
        let mut random = Random::new(1);
        (0..10)
            .filter_map(|_| balancer.pick(&cx, &mut random))
            .map(|h| h.address.to_string())
            .collect::<std::collections::BTreeSet<_>>()
            .len()
    };
    assert_eq!(pick("NO_FALLBACK", Some("2")), 2);
    assert_eq!(pick("NO_FALLBACK", Some("9")), 0);
    assert_eq!(pick("NO_FALLBACK", None), 0);
    assert_eq!(pick("ANY_ENDPOINT", Some("9")), 3);
    assert_eq!(pick("DEFAULT_SUBSET", Some("9")), 1);
}

#[test]
fn retries_go_elsewhere() {
    let mut balancer = balancer(json!({"lb_policy": "RANDOM"}), &[2]);
    let policy = crate::pb::route::RetryPolicy {
        retry_host_predicate: vec![crate::pb::route::retry_policy::RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".into(),
            config_type: Some(crate::pb::route::retry_policy::retry_host_predicate::ConfigType::TypedConfig(
                crate::pb::Any {
                    type_url:
                        "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                            .into(),
                    ..Default::default()
                },
            )),
        }],
        host_selection_retry_max_attempts: 10,
        ..Default::default()
    };
    let policy = RetryPolicy::compile(&policy).unwrap();
    let first = balancer.endpoints().hosts().next().unwrap().clone();
    let previous = [Arc::clone(&first)];
    let mut random = Random::new(5);
    for _ in 0..50 {
        let cx = PickContext { previous: &previous, retry: Some(&policy), ..PickContext::at(Instant::now()) };
        assert_ne!(balancer.pick(&cx, &mut random).unwrap().address, first.address);
    }
}

#[test]
fn original_destination_is_the_host() {
    let cluster = cluster(json!({"name": "c", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"upstream_port_override": 81}}));
    let endpoints = Arc::clone(&cluster.endpoints);
    let mut balancer = LoadBalancer::new(cluster, endpoints, 0);
    let mut random = Random::new(1);
    let cx = PickContext { original_dst: Some("10.1.1.1:80".parse().unwrap()), ..PickContext::at(Instant::now()) };
    assert_eq!(balancer.pick(&cx, &mut random).unwrap().address.to_string(), "10.1.1.1:81");
    assert!(balancer.pick(&PickContext::at(Instant::now()), &mut random).is_none());
}
