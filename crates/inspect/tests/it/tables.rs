//! The same configuration in our proxy and in Envoy: the same tables from either dump.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use netns::{Netlink, Netns};
use serde_json::{Value, json};

const ADMIN: u16 = 15000;
const XDS: u16 = 15010;
/// What the proxy gets: virtualInbound, virtualOutbound, and one listener for each port or address of a service.
const LISTENERS: usize = 6;

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
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: DISABLE}}
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

/// The control plane's folder, and the bootstrap of both proxies: without TLS, since only an agent gives out certificates.
fn configure(folder: &Path) -> PathBuf {
    let config = folder.join("config");
    std::fs::create_dir(&config).unwrap();
    std::fs::write(config.join("mesh.yaml"), MESH).unwrap();
    std::fs::write(folder.join("mesh-config.yaml"), "enableAutoMtls: false\n").unwrap();
    let address = |port: u16| json!({"socket_address": {"address": "127.0.0.1", "port_value": port}});
    let http2 = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }});
    let ads = json!({"ads": {}, "resource_api_version": "V3"});
    let bootstrap = json!({
        "node": {
            "id": "sidecar~10.0.0.9~client.default~default.svc.cluster.local", "cluster": "client.default",
            "metadata": {"PROFILE": "stock", "NAMESPACE": "default", "LABELS": {"app": "client"}},
        },
        "admin": {"address": address(ADMIN)},
        "static_resources": {"clusters": [{
            "name": "xds-grpc", "type": "STATIC", "typed_extension_protocol_options": http2,
            "load_assignment": {"cluster_name": "xds-grpc", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(XDS)}}]}]},
        }]},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "GRPC", "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
            },
            "lds_config": ads, "cds_config": ads,
        },
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
fn dump_of(mut command: Command, network: &Netns) -> Value {
    let command = command.stdout(Stdio::null()).stderr(Stdio::null());
    let _running = Running(network.run(|| command.spawn()).unwrap().unwrap());
    let began = Instant::now();
    loop {
        let answer = network.run(|| ask("/config_dump?include_eds")).unwrap();
        if let Some(dump) = answer.and_then(|text| serde_json::from_str::<Value>(&text).ok()) {
            let sections = dump["configs"].as_array().into_iter().flatten();
            let lists = sections.filter_map(|section| section["dynamic_listeners"].as_array());
            let ready = lists.flatten().filter(|entry| entry.pointer("/active_state/listener").is_some()).count();
            if ready == LISTENERS {
                return dump;
            }
        }
        assert!(began.elapsed() < Duration::from_secs(60), "the proxy does not get its listeners");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The body of an answer, which comes in chunks.
fn ask(path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], ADMIN))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, mut rest) = text.split_once("\r\n\r\n")?;
    if !head.to_ascii_lowercase().contains("chunked") {
        return Some(rest.to_owned());
    }
    let mut body = String::new();
    while let Some((size, more)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).ok().filter(|size| *size > 0)?;
        body.push_str(more.get(..size)?);
        rest = more.get(size + 2..)?;
        if rest.starts_with("0\r\n") {
            return Some(body);
        }
    }
    None
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
    let bootstrap = configure(folder.path());
    let mut plane = Command::new(&program);
    plane.arg("control-plane").current_dir(folder.path()).arg("--config").arg(folder.path().join("config"));
    plane.arg("--meshConfig").arg(folder.path().join("mesh-config.yaml")).stdout(Stdio::null()).stderr(Stdio::null());
    let _plane = Running(network.run(|| plane.spawn()).unwrap().unwrap());
    let mut ours = Command::new(&program);
    ours.args(["proxy", "-c"]).arg(&bootstrap);
    let mut theirs = Command::new(envoy);
    theirs.arg("-c").arg(&bootstrap).args(["--concurrency", "1", "--use-dynamic-base-id"]);
    for (name, command) in [("ours", ours), ("theirs", theirs)] {
        let dump = dump_of(command, &network);
        std::fs::write(folder.path().join(format!("{name}.json")), dump.to_string()).unwrap();
    }
    control_plane_explains_as_the_dump_does(&program, folder.path(), &bootstrap, &network);
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

/// What the control plane sends to a connected proxy is what the proxy's dump says: `explain` goes the same way by both.
fn control_plane_explains_as_the_dump_does(program: &Path, folder: &Path, bootstrap: &Path, network: &Netns) {
    let mut proxy = Command::new(program);
    proxy.args(["proxy", "-c"]).arg(bootstrap).stdout(Stdio::null()).stderr(Stdio::null());
    let _proxy = Running(network.run(|| proxy.spawn()).unwrap().unwrap());
    let explain = |from: &[&str]| {
        let mut command = Command::new(program);
        command
            .args(["explain", "-o", "json"])
            .args(from)
            .args(["GET", "http://reviews.default.svc.cluster.local:9080/v2"]);
        network.run(|| command.output()).unwrap().unwrap()
    };
    let by_dump = explain(&["--config-dump", folder.join("ours.json").to_str().unwrap()]);
    assert!(by_dump.status.success(), "{}", String::from_utf8_lossy(&by_dump.stderr));
    let began = Instant::now();
    let by_plane = loop {
        let answer = explain(&["--control-plane", "127.0.0.1:15014", "--from", "client.default"]);
        if answer.status.success() {
            break answer;
        }
        let why = String::from_utf8_lossy(&answer.stderr).into_owned();
        assert!(began.elapsed() < Duration::from_secs(30), "the control plane does not know the proxy: {why}");
        std::thread::sleep(Duration::from_millis(50));
    };
    let [by_dump, by_plane] =
        [by_dump, by_plane].map(|output| serde_json::from_slice::<Value>(&output.stdout).unwrap());
    assert_eq!(by_dump["sides"][0]["logged"], by_plane["sides"][0]["logged"]);
    assert!(by_dump["sides"][0]["logged"]["cluster"].as_str().unwrap().contains("|v2|"), "{by_dump}");
}
