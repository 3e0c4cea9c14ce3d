//! Starting a proxy inside a test.

use envoy_api::Message;
use envoy_api::bootstrap::Bootstrap;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

const BOOTSTRAP: &str = "type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap";

/// A bootstrap out of its JSON form.
pub(crate) fn bootstrap(value: &Value) -> Bootstrap {
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
pub(crate) fn http_manager(routes: Value, fields: Value) -> Value {
    let mut manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [{
            "name": "router",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
        }]
    });
    if let Value::Object(fields) = fields {
        for (name, value) in fields {
            manager[name] = value;
        }
    }
    json!({"name": "hcm", "typed_config": manager})
}

/// A listener on a port of the loopback interface with one chain.
pub(crate) fn listener(name: &str, port: u16, chain: Value) -> Value {
    json!({
        "name": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [chain]
    })
}

fn endpoint(port: u16) -> Value {
    json!({"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}})
}

/// A cluster with hosts on these ports of the loopback interface; `fields` on top.
pub(crate) fn cluster(name: &str, ports: &[u16], fields: Value) -> Value {
    let endpoints: Vec<Value> = ports.iter().map(|port| endpoint(*port)).collect();
    let mut cluster = json!({
        "name": name, "type": "STATIC", "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}
    });
    for (name, value) in fields.as_object().into_iter().flatten() {
        cluster[name] = value.clone();
    }
    cluster
}

/// The fields of a cluster that speaks HTTP/2.
pub(crate) fn http2() -> Value {
    json!({"typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}}
    }}})
}

/// The terminal filter that passes bytes on to a cluster.
pub(crate) fn tcp_proxy(cluster: &str, fields: Value) -> Value {
    let mut config = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "tcp", "cluster": cluster
    });
    for (name, value) in fields.as_object().into_iter().flatten() {
        config[name] = value.clone();
    }
    json!({"name": "tcp", "typed_config": config})
}

/// Starts a proxy with one worker.
pub(crate) fn start(listeners: Value, clusters: Value) -> proxy::Handle {
    let config = json!({"static_resources": {"listeners": listeners, "clusters": clusters}});
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    proxy::start(bootstrap(&config), options).expect("it starts")
}

/// A port that is listened on.
pub(crate) async fn bound() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback works");
    let port = listener.local_addr().expect("bound").port();
    (listener, port)
}

/// Reads up to and with the empty line.
pub(crate) async fn head(stream: &mut TcpStream) -> String {
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        seen.push(stream.read_u8().await.expect("a whole head"));
    }
    String::from_utf8(seen).expect("ASCII")
}
