//! Configuration that changes while connections are open, from a server of the aggregated stream.

use crate::fixture::{bootstrap, bound, cluster, connect, free_port, http_manager, http2, listener, tcp_proxy};
use crate::library::get;
use ads::server::{Event, EventKind, Names, Peer, Source};
use envoy_api::type_url::{CLUSTER, ENDPOINT, LISTENER, ROUTE};
use envoy_api::{Resource, core};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// A control plane: resources by type and name, and what its one client said.
struct Plane {
    resources: Mutex<BTreeMap<&'static str, Vec<Resource>>>,
    revision: watch::Sender<u64>,
    said: Mutex<Vec<String>>,
}

impl Plane {
    /// Replaces all resources of a type.
    fn set(&self, of: &'static str, resources: &[Value]) {
        let version = format!("v{}", *self.revision.borrow());
        let encoded = resources.iter().map(|resource| {
            let body = envoy_api::json::from_json(of, resource).expect("a resource");
            let name = resource.get("name").or_else(|| resource.get("cluster_name")).and_then(Value::as_str);
            Resource::with_version(name.expect("a name"), version.as_str(), body)
        });
        self.resources.lock().expect("no test panics with it").insert(of, encoded.collect());
        self.revision.send_modify(|revision| *revision += 1);
    }

    /// Waits until the client has said something that contains this.
    async fn hears(&self, what: &str) -> String {
        for _ in 0..500 {
            let said = self.said.lock().expect("no test panics with it").clone();
            if let Some(found) = said.into_iter().find(|said| said.contains(what)) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nobody said {what:?}: {:?}", self.said.lock().expect("no test panics with it"));
    }

    /// Replaces all resources of a type, and waits for the answer: the refusal, if it is one.
    async fn push(&self, of: &'static str, resources: &[Value]) -> Option<String> {
        self.said.lock().expect("no test panics with it").clear();
        self.set(of, resources);
        let said = self.hears(&format!("{of} ")).await;
        said.split_once(" refused ").map(|(_, why)| why.to_owned())
    }
}

impl Source for Plane {
    type Proxy = ();

    fn connect(&self, _node: &core::Node, _peer: &Peer) -> Result<(), tonic::Status> {
        Ok(())
    }

    fn resources(&self, (): &(), of: &str, names: Names<'_>) -> Arc<[Resource]> {
        let all = self.resources.lock().expect("no test panics with it");
        let wanted = |resource: &&Resource| match &names {
            Names::Wildcard => true,
            Names::List(names) => names.iter().any(|name| **name == *resource.name),
        };
        all.get(of).into_iter().flatten().filter(wanted).cloned().collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    fn report(&self, (): &(), event: &Event) {
        let said = match &event.kind {
            EventKind::Acked { type_url, .. } => format!("{type_url} taken"),
            EventKind::Nacked { type_url, error, .. } => format!("{type_url} refused {error}"),
            _ => return,
        };
        self.said.lock().expect("no test panics with it").push(said);
    }
}

/// As [`launch`], once the proxy is ready.
async fn start(drain_time: Duration, listeners: &[Value], clusters: &[Value]) -> (Arc<Plane>, proxy::Handle) {
    let (plane, proxy) = launch(drain_time, listeners, clusters).await;
    ready(&proxy).await;
    (plane, proxy)
}

async fn ready(proxy: &proxy::Handle) {
    for _ in 0..500 {
        if proxy.ready().is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{:?}", proxy.ready());
}

/// A control plane, and a proxy with this drain time that follows it.
async fn launch(drain_time: Duration, listeners: &[Value], clusters: &[Value]) -> (Arc<Plane>, proxy::Handle) {
    let plane =
        Arc::new(Plane { resources: Mutex::default(), revision: watch::Sender::new(1), said: Mutex::default() });
    plane.set(CLUSTER, clusters);
    plane.set(LISTENER, listeners);
    let (socket, port) = bound().await;
    let router = tonic::transport::Server::builder().add_service(ads::server::service(plane.clone()));
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(socket);
    tokio::spawn(router.serve_with_incoming(incoming));
    let source = json!({"ads": {}, "resource_api_version": "V3"});
    let config = json!({
        "node": {"id": "n", "cluster": "c"},
        "static_resources": {"clusters": [cluster("xds", &[port], http2())]},
        "dynamic_resources": {
            "cds_config": source, "lds_config": source,
            "ads_config": {"api_type": "GRPC", "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]}
        }
    });
    let options = proxy::Options { concurrency: 1, drain_time, ..Default::default() };
    (plane, proxy::start(bootstrap(&config), options).expect("it starts"))
}

/// A chain for clients of these addresses that says `text`.
fn says(name: &str, from: &str, text: &str) -> Value {
    let answer =
        json!([{"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": text}}}]);
    json!({
        "name": name,
        "filter_chain_match": {"source_prefix_ranges": [{"address_prefix": from, "prefix_len": 8}]},
        "filters": [http_manager(answer, json!({"stat_prefix": name}))]
    })
}

fn chains(port: u16, chains: &[Value]) -> Value {
    let mut all = listener("l", port, json!(null));
    all["filter_chains"] = json!(chains);
    all
}

fn gauge(proxy: &proxy::Handle, name: &str) -> u64 {
    let stats = proxy.stats_prometheus(false);
    let line = stats.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {stats}"));
    line.rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a number")
}

async fn ends(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut byte));
    matches!(read.await, Ok(Ok(0) | Err(_)))
}

const LONG: Duration = Duration::from_secs(600);

#[tokio::test]
async fn connections_of_chains_that_stay_are_still_the_listeners() {
    let port = free_port();
    let (here, there) = (says("here", "127.0.0.0", "1"), says("there", "10.0.0.0", "2"));
    let (plane, proxy) = start(Duration::from_millis(300), &[chains(port, &[here.clone(), there])], &[]).await;
    let mut client = connect(port).await;
    assert!(get(&mut client).await.ends_with('1'));
    // The other chain changes, goes, and the listener gets an access log: nothing to do with this connection.
    let changed = says("there", "10.0.0.0", "3");
    assert_eq!(plane.push(LISTENER, &[chains(port, &[here.clone(), changed])]).await, None);
    assert_eq!(plane.push(LISTENER, &[chains(port, std::slice::from_ref(&here))]).await, None);
    assert_eq!(gauge(&proxy, "envoy_listener_manager_listener_in_place_updated"), 2);
    let mut more = chains(port, &[here]);
    more["per_connection_buffer_limit_bytes"] = json!(4096);
    assert_eq!(plane.push(LISTENER, &[more.clone()]).await, None);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert!(get(&mut client).await.ends_with('1'));
    assert_eq!(proxy.connections(), 1);
    // Its own chain goes: it may stay for the drain time.
    more["filter_chains"][0] = says("here", "127.0.0.0", "4");
    assert_eq!(plane.push(LISTENER, &[more]).await, None);
    assert_eq!(gauge(&proxy, "envoy_listener_manager_total_filter_chains_draining"), 1);
    assert!(get(&mut client).await.ends_with('1'));
    assert!(get(&mut connect(port).await).await.ends_with('4'));
    assert!(ends(&mut client).await, "the drain time is over");
    assert_eq!(gauge(&proxy, "envoy_listener_manager_total_filter_chains_draining"), 0);
}

#[tokio::test]
async fn a_limit_of_connections_counts_those_of_before_a_change() {
    let port = free_port();
    let chain = says("here", "127.0.0.0", "1");
    let mut config = chains(port, std::slice::from_ref(&chain));
    config["name"] = json!("limited");
    let limit = json!({"layers": [{"name": "l", "static_layer": {
        "envoy.resource_limits.listener.limited.connection_limit": 1}}]});
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("lds.json");
    let write = |listener: &Value| {
        let mut listener = listener.clone();
        listener["@type"] = json!(LISTENER);
        let next = file.with_extension("next");
        std::fs::write(&next, json!({"version_info": "1", "resources": [listener]}).to_string()).expect("written");
        std::fs::rename(&next, &file).expect("renamed");
    };
    write(&config);
    let source = json!({"path_config_source": {"path": file}, "resource_api_version": "V3"});
    let root = json!({
        "node": {"id": "n", "cluster": "c"}, "layered_runtime": limit, "dynamic_resources": {"lds_config": source}
    });
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    let proxy = proxy::start(bootstrap(&root), options).expect("it starts");
    let mut first = connect(port).await;
    assert!(get(&mut first).await.ends_with('1'));
    assert!(ends(&mut connect(port).await).await, "one is the limit");
    config["filter_chains"] = json!([chain, says("there", "10.0.0.0", "2")]);
    write(&config);
    while gauge(&proxy, "envoy_listener_manager_listener_modified") == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(ends(&mut connect(port).await).await, "the first one still counts");
    assert!(get(&mut first).await.ends_with('1'));
}

#[tokio::test]
async fn removed_listeners_cut_what_is_left_after_the_drain_time() {
    let (port, raw) = (free_port(), free_port());
    let (origin, upstream) = bound().await;
    let echo = tokio::spawn(async move {
        let (mut stream, _) = origin.accept().await.expect("a connection");
        let mut byte = [0];
        while stream.read_exact(&mut byte).await.is_ok() {
            stream.write_all(&byte).await.expect("open");
        }
    });
    let tcp = listener("raw", raw, json!({"filters": [tcp_proxy("c", json!({}))]}));
    let listeners = [chains(port, &[says("here", "127.0.0.0", "1")]), tcp];
    let clusters = [cluster("c", &[upstream], json!({}))];
    let (plane, proxy) = start(Duration::from_millis(300), &listeners, &clusters).await;
    let (mut idle, mut partial, mut tunnel) = (connect(port).await, connect(port).await, connect(raw).await);
    assert!(get(&mut idle).await.ends_with('1'));
    partial.write_all(b"GET / HT").await.expect("open");
    let mut byte = [0];
    tunnel.write_all(b"x").await.expect("open");
    tunnel.read_exact(&mut byte).await.expect("its echo");
    assert_eq!(plane.push(LISTENER, &[]).await, None);
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err(), "nobody listens any more");
    assert!(get(&mut idle).await.ends_with('1'), "but what is open is served");
    let draining = &proxy.config_dump()["configs"][2]["dynamic_listeners"];
    assert!(draining[0]["draining_state"].is_object() && draining[1]["draining_state"].is_object(), "{draining}");
    tunnel.write_all(b"y").await.expect("open");
    tunnel.read_exact(&mut byte).await.expect("its echo");
    for stream in [&mut idle, &mut partial, &mut tunnel] {
        assert!(ends(stream).await);
    }
    echo.await.expect("the origin hears of it");
}

#[tokio::test]
async fn what_is_refused_is_named_and_shown() {
    let (port, other) = (free_port(), free_port());
    let good = chains(port, &[says("here", "127.0.0.0", "1")]);
    let (plane, proxy) = start(LONG, std::slice::from_ref(&good), &[]).await;
    // The same address, an unknown cluster, a port that is taken by somebody else: each is refused, the rest is taken.
    let mut same = good.clone();
    same["name"] = json!("same");
    let to_nobody = json!([{"match": {"prefix": "/"}, "route": {"cluster": "nobody"}}]);
    let nobody = listener("nobody", free_port(), json!({"filters": [http_manager(to_nobody, json!({}))]}));
    let (_socket, taken) = bound().await;
    let taken = listener("taken", taken, json!({"filters": [http_manager(json!([]), json!({}))]}));
    let fine = listener("fine", other, says("fine", "127.0.0.0", "2"));
    let refused = plane.push(LISTENER, &[good.clone(), same, nobody, taken, fine]).await.expect("a refusal");
    for reason in
        ["same: error adding listener: 'same' has duplicate address", "nobody: route: unknown cluster 'nobody'"]
    {
        assert!(refused.contains(reason), "{refused}");
    }
    assert!(refused.contains("taken: cannot bind"), "{refused}");
    assert!(get(&mut connect(other).await).await.ends_with('2'));
    let dump = proxy.config_dump()["configs"][2]["dynamic_listeners"].clone();
    let named = |name: &str| dump.as_array().into_iter().flatten().find(|l| l["name"] == name).cloned();
    for name in ["same", "nobody", "taken"] {
        let state = named(name).expect("it is shown")["error_state"].clone();
        assert!(state["details"].is_string() && state["failed_configuration"]["name"] == name, "{state}");
    }
    assert!(named("l").expect("it is shown")["active_state"].is_object());
    // What comes next without them is taken, and forgets them.
    assert_eq!(plane.push(LISTENER, &[good]).await, None);
    assert!(!proxy.config_dump().to_string().contains("error_state"));
    assert_eq!(gauge(&proxy, "envoy_listener_manager_lds_update_rejected"), 1);
}

#[tokio::test]
async fn listeners_are_asked_for_once_the_first_clusters_are_warm() {
    let (port, upstream) = (free_port(), free_port());
    let eds = json!({"name": "c", "type": "EDS", "connect_timeout": "1s", "eds_cluster_config": {"eds_config": {
        "ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}}});
    let to_c = json!([{"match": {"prefix": "/"}, "route": {"cluster": "c"}}]);
    let routed = listener("l", port, json!({"filters": [http_manager(to_c, json!({}))]}));
    let (plane, proxy) = launch(LONG, &[routed], &[eds]).await;
    plane.hears(CLUSTER).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(proxy.ready(), Err("waiting for endpoints of cluster c".to_owned()));
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err(), "nobody listens");
    assert!(plane.said.lock().expect("no test panics with it").iter().all(|said| !said.starts_with(LISTENER)));
    let mut assignment = cluster("c", &[upstream], json!({}))["load_assignment"].take();
    plane.set(ENDPOINT, &[assignment.take()]);
    ready(&proxy).await;
    assert!(get(&mut connect(port).await).await.starts_with("HTTP/1.1 503"), "its one host is not there");
}

#[tokio::test]
async fn routes_may_only_lead_to_clusters_that_exist_where_that_is_asked_for() {
    let port = free_port();
    let source = json!({"ads": {}, "resource_api_version": "V3"});
    let mut manager = http_manager(json!([]), json!({"rds": {"route_config_name": "r", "config_source": source}}));
    manager["typed_config"].as_object_mut().expect("a message").remove("route_config");
    let table = |to: Value, validate: bool| {
        let mut route = json!({"match": {"prefix": "/"}});
        for (name, value) in to.as_object().into_iter().flatten() {
            route[name] = value.clone();
        }
        json!({"name": "r", "validate_clusters": validate,
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]})
    };
    let listeners = [listener("l", port, json!({"filters": [manager]}))];
    let (plane, proxy) = launch(LONG, &listeners, &[]).await;
    plane.hears(LISTENER).await;
    assert_eq!(proxy.ready(), Err("waiting for routes of listener l".to_owned()));
    plane.set(ROUTE, &[table(json!({"direct_response": {"status": 204}}), true)]);
    ready(&proxy).await;
    let mut client = connect(port).await;
    assert!(get(&mut client).await.starts_with("HTTP/1.1 204"));
    let to_nobody = json!({"route": {"cluster": "nobody"}});
    let refused = plane.push(ROUTE, &[table(to_nobody.clone(), true)]).await;
    assert_eq!(refused.as_deref(), Some("r: route: unknown cluster 'nobody'"));
    assert!(get(&mut client).await.starts_with("HTTP/1.1 204"));
    assert_eq!(plane.push(ROUTE, &[table(to_nobody, false)]).await, None);
    assert!(get(&mut client).await.starts_with("HTTP/1.1 503"));
}

/// Asks the admin page, and gives its text.
async fn admin(port: u16, method: &str, path: &str) -> String {
    let mut stream = connect(port).await;
    let request = format!("{method} {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("open");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("text");
    answer.split_once("\r\n\r\n").expect("a head").1.to_owned()
}

#[tokio::test]
async fn workers_share_a_port_that_the_system_chose_and_stopped_listeners_stay_stopped() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("lds.json");
    let write = |text: &str| {
        let mut listener = chains(0, &[says("here", "127.0.0.0", text)]);
        listener["@type"] = json!(LISTENER);
        let next = file.with_extension("next");
        std::fs::write(&next, json!({"version_info": "1", "resources": [listener]}).to_string()).expect("written");
        std::fs::rename(&next, &file).expect("renamed");
    };
    write("1");
    let page = free_port();
    let root = json!({
        "node": {"id": "n", "cluster": "c"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": page}}},
        "dynamic_resources": {"lds_config": {"path_config_source": {"path": file}, "resource_api_version": "V3"}}
    });
    let options = proxy::Options { concurrency: 2, drain_time: LONG, ..Default::default() };
    let proxy = proxy::start(bootstrap(&root), options).expect("it starts");
    ready(&proxy).await;
    let at = |listeners: &str| -> u16 {
        let port = listeners.trim().rsplit(':').next().and_then(|port| port.parse().ok());
        port.unwrap_or_else(|| panic!("{listeners}"))
    };
    let port = at(&admin(page, "GET", "/listeners").await);
    for _ in 0..20 {
        assert!(get(&mut connect(port).await).await.ends_with('1'), "whichever worker it is");
    }
    // A change of its chains leaves it where it is.
    write("2");
    while gauge(&proxy, "envoy_listener_manager_listener_in_place_updated") == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(at(&admin(page, "GET", "/listeners").await), port);
    assert!(get(&mut connect(port).await).await.ends_with('2'));
    admin(page, "POST", "/drain_listeners").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
    write("3");
    while gauge(&proxy, "envoy_listener_manager_lds_update_success") < 3 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err(), "a change does not open it again");
    assert_eq!(gauge(&proxy, "envoy_listener_manager_listener_stopped"), 1);
}

#[tokio::test]
async fn other_hosts_end_the_connections_of_clusters_that_say_so() {
    let source = json!({"eds_config": {"ads": {}, "resource_api_version": "V3"}});
    let eds = json!({"name": "c", "type": "EDS", "connect_timeout": "1s", "eds_cluster_config": source,
        "common_lb_config": {"close_connections_on_host_set_change": true}});
    let (origin, upstream) = bound().await;
    let (accepted, mut connections) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = origin.accept().await {
            let accepted = accepted.clone();
            accepted.send(()).expect("the test counts");
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {
                    stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.expect("open");
                }
                // The proxy has ended it.
                drop(accepted);
            });
        }
    });
    let port = free_port();
    let to_c = json!([{"match": {"prefix": "/"}, "route": {"cluster": "c"}}]);
    let routed = listener("l", port, json!({"filters": [http_manager(to_c, json!({}))]}));
    let (plane, proxy) = launch(LONG, &[routed], &[eds]).await;
    let assignment = |ports: &[u16]| cluster("c", ports, json!({}))["load_assignment"].take();
    plane.set(ENDPOINT, &[assignment(&[upstream])]);
    ready(&proxy).await;
    let mut client = connect(port).await;
    for _ in 0..3 {
        assert!(get(&mut client).await.starts_with("HTTP/1.1 204"));
    }
    connections.recv().await.expect("one connection");
    assert!(connections.try_recv().is_err(), "which all requests used");
    // The same hosts change nothing, another one does.
    let mut same = assignment(&[upstream]);
    same["endpoints"][0]["lb_endpoints"][0]["load_balancing_weight"] = json!(2);
    assert_eq!(plane.push(ENDPOINT, &[same]).await, None);
    assert!(get(&mut client).await.starts_with("HTTP/1.1 204"));
    assert!(connections.try_recv().is_err());
    let mut both = assignment(&[upstream, free_port()]);
    both["endpoints"][0]["lb_endpoints"][1]["health_status"] = json!("UNHEALTHY");
    assert_eq!(plane.push(ENDPOINT, &[both]).await, None);
    assert!(get(&mut client).await.starts_with("HTTP/1.1 204"));
    connections.recv().await.expect("a new connection");
}
