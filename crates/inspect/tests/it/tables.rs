//! The same configuration in our proxy and in Envoy: the same tables from either dump.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use netns::{Netlink, Netns};
use serde_json::{Value, json};

const ADMIN: u16 = 15000;

const MESH: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {clusterIP: 10.96.0.1, selector: {app: reviews}, ports: [{name: http, port: 9080}, {name: tcp, port: 9000}]}
---
apiVersion: v1
kind: Service
metadata: {name: client}
spec: {clusterIP: 10.96.0.2, selector: {app: client}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec: {serviceAccountName: client, containers: []}
status: {podIP: 10.0.0.9, phase: Running, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: reviews-1, labels: {kubernetes.io/service-name: reviews}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.1], conditions: {ready: true}}, {addresses: [10.0.0.2], conditions: {ready: true}}]
ports: [{name: http, port: 9080}, {name: tcp, port: 9000}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: client-1, labels: {kubernetes.io/service-name: client}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.9], conditions: {ready: true}, targetRef: {kind: Pod, name: client, namespace: default}}]
ports: [{name: http, port: 8080}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - match: [{uri: {prefix: /v2}}, {uri: {exact: /exact}}, {uri: {regex: '/r.*'}}]
    route: [{destination: {host: reviews, subset: v2}}]
  - route: [{destination: {host: reviews, subset: v1}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews}
spec: {host: reviews, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside}
spec: {hosts: [example.com], ports: [{number: 443, name: tls, protocol: TLS}], location: MESH_EXTERNAL, resolution: DNS}
";

fn envoy() -> Option<PathBuf> {
    let build = std::env::var_os("OUTRIGGER_BUILD").map(PathBuf::from);
    let build = build.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../build"));
    let pythons = std::fs::read_dir(build.join("python/lib")).ok()?;
    let at = |python: std::fs::DirEntry| python.path().join("site-packages/envoy/_bin/envoy");
    pythons.flatten().map(at).find(|path| path.exists())
}

/// References to the aggregated stream become references to a file.
fn localise(value: &mut Value, folder: &Path) {
    match value {
        Value::Object(fields) => {
            for (key, file) in [("rds", "routes.json"), ("eds_cluster_config", "endpoints.json")] {
                if let Some(Value::Object(source)) = fields.get_mut(key) {
                    let key =
                        if source.contains_key("eds_config") || key != "rds" { "eds_config" } else { "config_source" };
                    let path = folder.join(format!("served-{file}"));
                    source.insert(
                        key.into(),
                        json!({"path_config_source": {"path": path}, "resource_api_version": "V3"}),
                    );
                }
            }
            // Certificates come from nowhere in this test.
            fields.remove("transport_socket");
            fields.remove("transport_socket_matches");
            fields.values_mut().for_each(|value| localise(value, folder));
        }
        Value::Array(items) => items.iter_mut().for_each(|value| localise(value, folder)),
        _ => {}
    }
}

/// Bootstrap and the files that it refers to; returns the bootstrap's path.
fn configure(program: &Path, folder: &Path) -> PathBuf {
    std::fs::write(folder.join("mesh.yaml"), MESH).unwrap();
    let proxy =
        "{name: client, ips: [10.0.0.9], serviceAccount: client, labels: {app: client}, metadata: {PROFILE: stock}}\n";
    std::fs::write(folder.join("proxy.yaml"), proxy).unwrap();
    let done = Command::new(program)
        .args(["xds", "generate", "--input"])
        .arg(folder.join("mesh.yaml"))
        .arg("--proxy")
        .arg(folder.join("proxy.yaml"))
        .arg("--output")
        .arg(folder)
        .status()
        .unwrap();
    assert!(done.success());
    for (file, kind) in [
        ("listeners.json", "config.listener.v3.Listener"),
        ("clusters.json", "config.cluster.v3.Cluster"),
        ("routes.json", "config.route.v3.RouteConfiguration"),
        ("endpoints.json", "config.endpoint.v3.ClusterLoadAssignment"),
    ] {
        let mut all: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(folder.join(file)).unwrap()).unwrap();
        for resource in &mut all {
            localise(resource, folder);
            resource["@type"] = json!(format!("type.googleapis.com/envoy.{kind}"));
        }
        let served = json!({"version_info": "1", "resources": all});
        std::fs::write(folder.join(format!("served-{file}")), served.to_string()).unwrap();
    }
    let source = |file: &str| json!({"path_config_source": {"path": folder.join(format!("served-{file}.json"))}, "resource_api_version": "V3"});
    let bootstrap = json!({
        "node": {"id": "sidecar~10.0.0.9~client.default~default.svc.cluster.local", "cluster": "client.default"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": ADMIN}}},
        "dynamic_resources": {"lds_config": source("listeners"), "cds_config": source("clusters")},
    });
    let path = folder.join("bootstrap.json");
    std::fs::write(&path, bootstrap.to_string()).unwrap();
    path
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a proxy in the namespace says once it has all listeners.
fn dump_of(mut command: Command, network: &Netns, listeners: usize) -> Value {
    let command = command.stdout(Stdio::null()).stderr(Stdio::null());
    let _running = Running(network.run(|| command.spawn()).unwrap().unwrap());
    let began = Instant::now();
    loop {
        let answer = network.run(|| ask("/config_dump?include_eds")).unwrap();
        if let Some(dump) = answer.and_then(|text| serde_json::from_str::<Value>(&text).ok()) {
            let sections = dump["configs"].as_array().into_iter().flatten();
            let lists = sections.filter_map(|section| section["dynamic_listeners"].as_array());
            let ready = lists.flatten().filter(|entry| entry.pointer("/active_state/listener").is_some()).count();
            if ready == listeners {
                return dump;
            }
        }
        assert!(began.elapsed() < Duration::from_secs(60), "the proxy does not get its {listeners} listeners");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn ask(path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], ADMIN))).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\nhost: x\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

#[test]
fn tables_of_our_dump_and_of_envoys_are_equal() {
    let Some(program) = std::env::var_os("OUTRIGGER_BIN").map(PathBuf::from).filter(|program| program.exists()) else {
        return println!("SKIPPED: no program; set OUTRIGGER_BIN");
    };
    let Some(envoy) = envoy() else { return println!("SKIPPED: no envoy; cargo xtask setup installs it") };
    let Ok(network) = Netns::create() else { return println!("SKIPPED: network namespaces need root") };
    Netlink::open_in(&network).unwrap().loopback_up().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bootstrap = configure(&program, folder.path());
    let all: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join("listeners.json")).unwrap()).unwrap();
    let listeners = all.as_array().unwrap().len();
    let mut ours = Command::new(&program);
    ours.args(["proxy", "-c"]).arg(&bootstrap);
    let mut theirs = Command::new(envoy);
    theirs.arg("-c").arg(&bootstrap).args(["--concurrency", "1", "--use-dynamic-base-id"]);
    for (name, command) in [("ours", ours), ("theirs", theirs)] {
        let dump = dump_of(command, &network, listeners);
        std::fs::write(folder.path().join(format!("{name}.json")), dump.to_string()).unwrap();
    }
    for what in [
        &["clusters"][..],
        &["listeners"],
        &["routes"],
        &["endpoints"],
        &["listeners", "--verbose=false"],
        &["routes", "--verbose=false"],
    ] {
        let table = |name: &str| {
            let output = Command::new(&program)
                .arg("proxy-config")
                .args(what)
                .arg("-f")
                .arg(folder.path().join(format!("{name}.json")))
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        let (ours, theirs) = (table("ours"), table("theirs"));
        assert!(ours.lines().count() > 2, "{what:?}: {ours}");
        assert_eq!(ours, theirs, "{what:?}");
    }
}
