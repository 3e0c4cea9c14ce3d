//! Starting a proxy inside a test.

use envoy_api::Message;
use envoy_api::bootstrap::Bootstrap;
use tokio::net::TcpStream;

const BOOTSTRAP: &str = "type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap";

/// A bootstrap out of its JSON form.
pub(crate) fn bootstrap(value: &serde_json::Value) -> Bootstrap {
    let bytes = envoy_api::json::from_json(BOOTSTRAP, value).expect("a bootstrap");
    Bootstrap::decode(&bytes[..]).expect("its own encoding")
}

pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback works");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// Connects as soon as something listens.
pub(crate) async fn connect(port: u16) -> TcpStream {
    for _ in 0..100 {
        if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)).await {
            return stream;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("nothing listens on {port}");
}

/// An HTTP connection manager's configuration: `routes` for every host, `fields` on top of the rest.
pub(crate) fn http_manager(routes: serde_json::Value, fields: serde_json::Value) -> serde_json::Value {
    let mut manager = serde_json::json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [{
            "name": "router",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
        }]
    });
    if let serde_json::Value::Object(fields) = fields {
        for (name, value) in fields {
            manager[name] = value;
        }
    }
    serde_json::json!({"name": "hcm", "typed_config": manager})
}

/// A listener on a port of the loopback interface with one chain.
pub(crate) fn listener(name: &str, port: u16, chain: serde_json::Value) -> serde_json::Value {
    serde_json::json!({
        "name": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [chain]
    })
}
