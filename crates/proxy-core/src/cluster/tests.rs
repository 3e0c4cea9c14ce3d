use serde_json::json;

use super::*;

fn compile(config: serde_json::Value) -> Result<Cluster> {
    let bytes = envoy_api::json::from_json(envoy_api::type_url::CLUSTER, &config).unwrap();
    Cluster::compile(&Message::decode(bytes.as_slice()).unwrap(), &Options::default())
}

fn raw() -> serde_json::Value {
    json!({"name": "raw", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"}})
}

#[test]
fn transport_follows_the_hosts_metadata() {
    let tls = json!({"name": "tls", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", "sni": "s"}});
    let host = |port: u16, mode: Option<&str>| {
        let metadata = mode.map(|m| json!({"filter_metadata": {"envoy.transport_socket_match": {"tlsMode": m}}}));
        json!({"endpoint": {"address": {"socket_address": {"address": "10.0.0.1", "port_value": port}}}, "metadata": metadata})
    };
    let cluster = compile(json!({
        "name": "c", "type": "STATIC",
        "transport_socket_matches": [
            {"name": "tlsMode-istio", "match": {"tlsMode": "istio"}, "transport_socket": tls},
            {"name": "tlsMode-disabled", "match": {}, "transport_socket": raw()},
        ],
        "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": [host(1, Some("istio")), host(2, Some("x")), host(3, None)]}]},
    }))
    .unwrap();
    let names: Vec<_> = cluster.endpoints.hosts().map(|h| cluster.transport(h).1.unwrap().to_string()).collect();
    assert_eq!(names, ["tlsMode-istio", "tlsMode-disabled", "tlsMode-disabled"]);
    let first = cluster.endpoints.hosts().next().unwrap();
    assert_eq!(cluster.transport(first).0.tls().unwrap().sni.as_deref(), Some("s"));
}

#[test]
fn defaults_are_envoys() {
    let cluster =
        compile(json!({"name": "c", "type": "EDS", "eds_cluster_config": {"eds_config": {"ads": {}}}})).unwrap();
    assert_eq!(cluster.eds_name().map(|n| &**n), Some("c"));
    assert_eq!((cluster.connect_timeout, cluster.panic_threshold.get()), (Duration::from_secs(5), 50.0));
    assert_eq!((cluster.breakers[0].connections, cluster.breakers[0].retries), (1024, 3));
    assert_eq!(cluster.lb, LbPolicy::RoundRobin(None));
}

#[test]
fn what_is_not_understood_is_named() {
    let text = |config| compile(config).unwrap_err().to_string();
    assert_eq!(
        text(
            json!({"name": "c", "type": "STATIC", "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": [
            {"endpoint": {"address": {"socket_address": {"address": "a.test", "port_value": 1}}}}]}]}})
        ),
        "cluster c: load_assignment.endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address: malformed IP address: a.test"
    );
    assert_eq!(
        text(json!({"name": "c", "lb_policy": "MAGLEV", "maglev_lb_config": {"table_size": 100}})),
        "cluster c: maglev_lb_config.table_size: the table size of maglev must be a prime up to 5000011, not 100"
    );
}

#[test]
fn tables_of_hashes_are_bounded() {
    let policy = |name: &str, config: serde_json::Value| {
        let url = format!("type.googleapis.com/envoy.extensions.load_balancing_policies.{name}");
        let mut typed = json!({"@type": url});
        typed.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        let policy = json!({"typed_extension_config": {"name": "p", "typed_config": typed}});
        compile(json!({"name": "c", "load_balancing_policy": {"policies": [policy]}})).map(|_| ())
    };
    let ring = |min: u64| policy("ring_hash.v3.RingHash", json!({"minimum_ring_size": min}));
    let maglev = |size: u64| policy("maglev.v3.Maglev", json!({"table_size": size}));
    assert_eq!((ring(1024), maglev(65_537)), (Ok(()), Ok(())));
    assert!(ring(1_000_000_000_000).unwrap_err().to_string().contains("minimum_ring_size: (1000000000000) >"));
    // A prime, but to find that out would take minutes.
    assert!(maglev(9_223_372_036_854_775_783).unwrap_err().to_string().ends_with("not 9223372036854775783"));
}

#[test]
fn names_are_resolved_and_hosts_keep_their_state() {
    let cluster = compile(json!({"name": "c", "type": "STRICT_DNS", "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": [
        {"endpoint": {"address": {"socket_address": {"address": "a.test", "port_value": 80}}}}]}]}}))
    .unwrap();
    assert_eq!(cluster.dns_names(), [("a.test".into(), 80)]);
    assert!(cluster.endpoints.is_empty());
    let at = |ips: &'static [&'static str]| {
        move |_: &str, port: u16| ips.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), port)).collect::<Vec<_>>()
    };
    let first = Endpoints::resolved(&cluster, &at(&["10.0.0.1", "10.0.0.2"]), None).unwrap();
    let second = Endpoints::resolved(&cluster, &at(&["10.0.0.2", "10.0.0.3"]), Some(&first)).unwrap();
    let addresses: Vec<_> = second.hosts().map(|h| h.address.to_string()).collect();
    assert_eq!(addresses, ["10.0.0.2:80", "10.0.0.3:80"]);
    assert!(Arc::ptr_eq(first.hosts().nth(1).unwrap(), second.hosts().next().unwrap()));
    assert_eq!(&*second.hosts().next().unwrap().hostname, "a.test");
}

#[test]
fn pings_need_a_timeout_and_have_jitter() {
    let keepalive =
        |settings| compile(json!({"name": "c", "http2_protocol_options": {"connection_keepalive": settings}}));
    let compiled = keepalive(json!({"interval": "30s", "timeout": "10s"})).unwrap();
    let expected = Keepalive {
        interval: Some(Duration::from_secs(30)),
        jitter_percent: 15,
        timeout: Duration::from_secs(10),
        idle_interval: None,
    };
    assert_eq!(compiled.http2.keepalive, Some(expected));
    let jittered = keepalive(json!({"timeout": "1s", "interval_jitter": {"value": 3.9}})).unwrap();
    assert_eq!(jittered.http2.keepalive.map(|k| (k.interval, k.jitter_percent)), Some((None, 3)));
    assert_eq!(
        keepalive(json!({"interval": "1s"})).unwrap_err().to_string(),
        "cluster c: http2_protocol_options.connection_keepalive.timeout: is missing"
    );
}
