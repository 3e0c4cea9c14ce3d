use serde_json::{Value, json};

use crate::{Options, RouteTable};

fn table(route: Value, host: Value) -> Result<RouteTable, String> {
    let mut virtual_host = json!({"name": "v", "domains": ["*"], "routes": [route]});
    virtual_host.as_object_mut().unwrap().extend(host.as_object().unwrap().clone());
    let config = json!({"name": "r", "virtual_hosts": [virtual_host]});
    let url = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
    let bytes = envoy_api::json::from_json(url, &config).unwrap();
    let config = prost::Message::decode(bytes.as_slice()).unwrap();
    RouteTable::compile(&config, &Options::default()).map_err(|e| e.to_string())
}

fn route(action: Value) -> Value {
    let mut all = json!({"cluster": "a"});
    all.as_object_mut().unwrap().extend(action.as_object().unwrap().clone());
    json!({"match": {"prefix": "/"}, "route": all})
}

#[test]
fn values_that_envoys_api_refuses_are_refused_with_their_place() {
    let long = "x".repeat(16385);
    for (action, host, place) in [
        (json!({"prefix_rewrite": "/a\nb"}), json!({}), "route.prefix_rewrite"),
        (json!({"host_rewrite_literal": "a\rb"}), json!({}), "host_rewrite_literal"),
        (json!({"hash_policy": [{"header": {"header_name": ""}}]}), json!({}), "hash_policy[0].header.header_name"),
        (json!({"upgrade_configs": [{"upgrade_type": "a"}, {"upgrade_type": "A"}]}), json!({}), "upgrade_configs"),
        (
            json!({"upgrade_configs": [{"upgrade_type": "websocket", "connect_config": {}}]}),
            json!({}),
            "upgrade_configs[0].connect_config",
        ),
        (json!({"rate_limits": [{"actions": []}]}), json!({}), "rate_limits[0].actions"),
        (
            json!({"rate_limits": [{"stage": 11, "actions": [{"source_cluster": {}}]}]}),
            json!({}),
            "rate_limits[0].stage",
        ),
        (
            json!({"retry_policy": {"retry_on": "5xx", "retry_back_off": {"base_interval": "0s"}}}),
            json!({}),
            "retry_policy.retry_back_off.base_interval",
        ),
        (json!({}), json!({"domains": ["a\nb"]}), "virtual_hosts[0].domains"),
        (
            json!({}),
            json!({"virtual_clusters": [{"headers": [{"name": ":path", "present_match": true}]}]}),
            "virtual_clusters[0].name",
        ),
        (
            json!({}),
            json!({"request_headers_to_add": [{"header": {"key": "x", "value": long}}]}),
            "request_headers_to_add",
        ),
        (
            json!({}),
            json!({"request_headers_to_add": [{"header": {"key": "x", "value": "a"}, "append": true,
                "append_action": "OVERWRITE_IF_EXISTS"}]}),
            "append_action",
        ),
    ] {
        let said = table(route(action), host).unwrap_err();
        assert!(said.contains(place), "{place}: {said}");
    }
}

#[test]
fn values_on_the_edge_pass() {
    for action in [
        json!({"rate_limits": [{"stage": 10, "actions": [{"source_cluster": {}}]}]}),
        json!({"hash_policy": [{"header": {"header_name": "x"}}]}),
        json!({"upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]}),
    ] {
        table(route(action), json!({})).unwrap();
    }
    let value = "x".repeat(16384);
    table(route(json!({})), json!({"request_headers_to_add": [{"header": {"key": "x", "value": value}}]})).unwrap();
}
