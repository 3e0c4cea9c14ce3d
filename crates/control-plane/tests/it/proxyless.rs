//! gRPC's own client, without any proxy, through `xds:///` names of this control plane.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use envoy_api::pb::envoy::config::listener::v3::Listener;
use envoy_api::pb::envoy::service::discovery::v3::DiscoveryRequest;
use envoy_api::{Message, type_url, wkt};
use tokio::process::{Child, Command};

use crate::mesh::Mesh;
use crate::ports;

fn program(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the crate lies two below the root");
    let build = std::env::var_os("OUTRIGGER_BUILD").map_or_else(|| root.join("build"), PathBuf::from);
    build.join("tools/grpc-interop").join(name)
}

fn server(port: u16) -> Child {
    let mut command = Command::new(program("server"));
    command.arg(format!("--port={port}")).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    command.spawn().unwrap()
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A service of gRPC whose endpoint is this machine's.
fn echo(target: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: echo, namespace: test}}\n\
         spec: {{clusterIP: 10.1.0.1, ports: [{{name: grpc, port: 7070, targetPort: {target}}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: echo-1, namespace: test, labels: {{kubernetes.io/service-name: echo}}}}\n\
         addressType: IPv4\nendpoints: [{{addresses: [127.0.0.1], conditions: {{ready: true}}}}]\n\
         ports: [{{name: grpc, port: {target}}}]\n"
    )
}

fn bootstrap(mesh: &Mesh) -> String {
    serde_json::json!({
        "xds_servers": [{
            "server_uri": mesh.grpc.to_string(),
            "channel_creds": [{"type": "insecure"}],
            "server_features": ["xds_v3"],
        }],
        "node": {
            "id": "sidecar~10.0.0.7~client.test~test.svc.cluster.local",
            "metadata": {"GENERATOR": "grpc", "NAMESPACE": "test", "CLUSTER_ID": "Kubernetes"},
        },
        "server_listener_resource_name_template": "xds.istio.io/grpc/lds/inbound/%s",
    })
    .to_string()
}

/// Runs a case of gRPC's interop client until it succeeds: servers take a moment to listen.
async fn call(bootstrap: &str, target: &str, case: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let run = Command::new(program("client"))
            .env("GRPC_XDS_BOOTSTRAP_CONFIG", bootstrap)
            .arg(format!("--server_host={target}"))
            .args(["--server_port=0", &format!("--test_case={case}")])
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(Duration::from_secs(40), run).await.expect("an end in time").unwrap();
        if output.status.success() {
            return;
        }
        assert!(Instant::now() < deadline, "{target} {case}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_itself_finds_services_by_xds_names_and_follows_their_endpoints() {
    let test = "grpc_itself_finds_services_by_xds_names_and_follows_their_endpoints";
    if !program("client").is_file() {
        println!("SKIPPED: {test}: gRPC's interop programs are not built: `cargo xtask setup`");
        return;
    }
    let mesh = Mesh::empty().await;
    let (first, second) = (free_port(), free_port());
    let one = server(first);
    mesh.apply(&echo(first)).await;
    let bootstrap = bootstrap(&mesh);
    for case in ["empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "custom_metadata"] {
        call(&bootstrap, "xds:///echo.test.svc.cluster.local:7070", case).await;
    }
    call(&bootstrap, "xds:///echo:7070", "empty_unary").await;
    // The rule that splits by header leads to a subset, which is another cluster with the same endpoint.
    let rules = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: echo, namespace: test}\n\
                 spec: {host: echo, subsets: [{name: all, labels: {}}]}\n---\n\
                 apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: echo, namespace: test}\n\
                 spec: {hosts: [echo], http: [{timeout: 30s, route: [{destination: {host: echo, subset: all}}]}]}\n";
    mesh.apply(rules).await;
    call(&bootstrap, "xds:///echo:7070", "large_unary").await;
    let _two = server(second);
    drop(one);
    mesh.apply(&echo(second)).await;
    call(&bootstrap, "xds:///echo:7070", "empty_unary").await;
    assert!(mesh.handle.sync_status().iter().all(|proxy| proxy.refusals().next().is_none()));
}

#[tokio::test]
async fn names_are_added_and_given_up_one_by_one() {
    let mesh = Mesh::empty().await;
    mesh.apply(&echo(7070)).await;
    let text = |value: &str| wkt::Value { kind: Some(wkt::value::Kind::StringValue(value.to_owned())) };
    let metadata = wkt::Struct { fields: [("GENERATOR".to_owned(), text("grpc"))].into() };
    let id = "sidecar~10.0.0.7~client.test~test.svc.cluster.local".to_owned();
    let node = envoy_api::core::Node { id, metadata: Some(metadata), ..Default::default() };
    let request = |names: &[&str], nonce: &str| DiscoveryRequest {
        node: Some(node.clone()),
        type_url: type_url::LISTENER.into(),
        resource_names: names.iter().map(|name| (*name).to_owned()).collect(),
        response_nonce: nonce.into(),
        ..DiscoveryRequest::default()
    };
    let mut stream = ports::open(mesh.plain_channel().await, None, request(&["echo:7070"], "")).await.unwrap();
    let names = |response: &envoy_api::discovery::DiscoveryResponse| -> Vec<String> {
        response.resources.iter().map(|any| Listener::decode(&*any.value).unwrap().name).collect()
    };
    let first = stream.next().await;
    assert_eq!(names(&first), ["echo:7070"]);
    stream.requests.send(request(&["echo.test:7070", "echo:7070", "none:1"], &first.nonce)).await.unwrap();
    let second = stream.next().await;
    assert_eq!(names(&second), ["echo:7070", "echo.test:7070"], "all that is asked for, as this type's answers are");
    // Giving up names needs no answer, and giving up the last is no wish for all.
    stream.requests.send(request(&["echo:7070"], &second.nonce)).await.unwrap();
    stream.requests.send(request(&[], &second.nonce)).await.unwrap();
    mesh.apply("apiVersion: v1\nkind: Service\nmetadata: {name: late, namespace: test}\nspec: {clusterIP: 10.1.0.9, ports: [{name: grpc, port: 1}]}\n").await;
    stream.requests.send(request(&["late:1"], &second.nonce)).await.unwrap();
    assert_eq!(names(&stream.next().await), ["late:1"]);
}
