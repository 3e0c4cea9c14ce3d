use std::time::Instant;

use serde_json::json;

use super::*;
use crate::{Cluster, Options};

fn cluster(outlier: serde_json::Value, hosts: usize) -> Cluster {
    let host = |n: usize| json!({"endpoint": {"address": {"socket_address": {"address": format!("10.0.0.{n}"), "port_value": 80}}}});
    let config = json!({"name": "c", "type": "STATIC", "outlier_detection": outlier, "load_assignment": {"cluster_name": "c",
        "endpoints": [{"lb_endpoints": (1..=hosts).map(host).collect::<Vec<_>>()}]}});
    let bytes = envoy_api::json::from_json(envoy_api::type_url::CLUSTER, &config).unwrap();
    Cluster::compile(&prost::Message::decode(bytes.as_slice()).unwrap(), &Options::default()).unwrap()
}

#[test]
fn consecutive_errors_eject_for_longer_each_time() {
    let cluster = cluster(json!({"consecutive_5xx": 3, "max_ejection_percent": 100, "base_ejection_time": "30s"}), 2);
    let config = cluster.outlier.clone().unwrap();
    let host = Arc::clone(cluster.endpoints.hosts().next().unwrap());
    let mut random = Random::new(1);
    let start = Instant::now();
    let mut detector = OutlierDetector::new(*config.clone(), start);
    assert_eq!(config.report(&host, Outcome::Status(500)), [None, None]);
    assert_eq!(config.report(&host, Outcome::Status(200)), [None, None]);
    let causes: Vec<_> = (0..3).map(|_| config.report(&host, Outcome::Status(500))).collect();
    assert_eq!(causes, [[None, None], [None, None], [None, Some(Cause::Consecutive5xx)]]);
    let event = detector.on_threshold(&host, Cause::Consecutive5xx, &cluster.endpoints, start, &mut random);
    assert!(matches!(event, Some(Event::Ejected { enforced: true, .. })));
    assert_eq!(host.health(), crate::endpoints::Health::Unhealthy);
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    assert!(detector.tick(&cluster.endpoints, at(29), &mut random).is_empty());
    assert!(matches!(detector.tick(&cluster.endpoints, at(30), &mut random)[..], [Event::Returned { .. }]));
    detector.on_threshold(&host, Cause::Consecutive5xx, &cluster.endpoints, at(30), &mut random);
    assert!(detector.tick(&cluster.endpoints, at(89), &mut random).is_empty());
    assert_eq!(detector.tick(&cluster.endpoints, at(90), &mut random).len(), 1);
}

#[test]
fn hosts_that_call_themselves_degraded_are_so_for_longer_each_time() {
    let cluster = cluster(
        json!({"detect_degraded_hosts": true, "consecutive_5xx": 1, "max_ejection_percent": 0, "base_ejection_time": "30s"}),
        1,
    );
    let config = cluster.outlier.clone().unwrap();
    let host = Arc::clone(cluster.endpoints.hosts().next().unwrap());
    let mut random = Random::new(1);
    let start = Instant::now();
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    let mut detector = OutlierDetector::new(*config.clone(), start);
    assert!(!config.degrades(&host, Outcome::Status(200)));
    assert!(!config.degrades(&host, Outcome::Degraded(500)), "an error is an error");
    assert!(config.degrades(&host, Outcome::Degraded(404)));
    let degrade = |detector: &mut OutlierDetector, seconds| {
        detector.degrade(&host, &cluster.endpoints, at(seconds), &mut Random::new(1)).is_some()
    };
    assert!(degrade(&mut detector, 0));
    assert!(!degrade(&mut detector, 1), "it is already");
    assert!(!config.degrades(&host, Outcome::Degraded(200)));
    assert_eq!((host.health(), detector.ejections_active()), (crate::endpoints::Health::Degraded, 0));
    let mut events = |seconds| detector.tick(&cluster.endpoints, at(seconds), &mut random).len();
    assert_eq!([events(29), events(30)], [0, 1]);
    assert_eq!(host.health(), crate::endpoints::Health::Healthy);
    assert!(degrade(&mut detector, 30));
    let mut events = |seconds| detector.tick(&cluster.endpoints, at(seconds), &mut random).len();
    assert_eq!([events(89), events(90)], [0, 1]);
}

#[test]
fn not_all_hosts_are_ejected() {
    let cluster = cluster(json!({"consecutive_5xx": 1, "max_ejection_percent": 50}), 2);
    let mut random = Random::new(1);
    let now = Instant::now();
    let mut detector = OutlierDetector::new(*cluster.outlier.clone().unwrap(), now);
    let events: Vec<_> = cluster
        .endpoints
        .hosts()
        .filter_map(|h| detector.on_threshold(h, Cause::Consecutive5xx, &cluster.endpoints, now, &mut random))
        .collect();
    assert!(matches!(events[..], [Event::Ejected { .. }, Event::Overflow { .. }]));
    assert_eq!(detector.ejections_active(), 1);
}

#[test]
fn the_worst_host_by_success_rate_goes() {
    let cluster = cluster(
        json!({"success_rate_minimum_hosts": 3, "success_rate_request_volume": 10, "success_rate_stdev_factor": 1000,
        "consecutive_5xx": 1000, "max_ejection_percent": 100}),
        5,
    );
    let config = cluster.outlier.clone().unwrap();
    for (n, host) in cluster.endpoints.hosts().enumerate() {
        for i in 0..20 {
            let bad = n == 2 && i % 2 == 0;
            config.report(host, Outcome::Status(if bad { 500 } else { 200 }));
        }
    }
    let now = Instant::now();
    let events = OutlierDetector::new(*config, now).tick(&cluster.endpoints, now, &mut Random::new(1));
    assert!(
        matches!(&events[..], [Event::Ejected { host, cause: Cause::SuccessRate, .. }] if host.address.to_string() == "10.0.0.3:80")
    );
}

#[test]
fn only_failures_in_a_row_count() {
    let of = |split: bool| {
        cluster(
            json!({"consecutive_5xx": 2, "consecutive_local_origin_failure": 2,
            "split_external_local_origin_errors": split}),
            2,
        )
    };
    for (split, cause) in [(false, Cause::Consecutive5xx), (true, Cause::ConsecutiveLocal)] {
        let cluster = of(split);
        let config = cluster.outlier.clone().unwrap();
        let host = cluster.endpoints.hosts().next().unwrap();
        for _ in 0..3 {
            assert_eq!(config.report(host, Outcome::ConnectFailed), [None, None]);
            assert_eq!(config.report(host, Outcome::Connected), [None, None]);
        }
        assert_eq!(config.report(host, Outcome::ConnectFailed), [None, None]);
        // A connection for requests says nothing of the requests on it.
        assert_eq!(config.report(host, Outcome::ConnectedForRequests), [None, None]);
        let next = config.report(host, Outcome::ConnectFailed);
        assert_eq!(next, [None, (!split).then_some(cause)]);
    }
}
