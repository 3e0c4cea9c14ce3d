//! Machines that register themselves: in memory, and in a real API server.

use std::time::{Duration, Instant};

use control_plane::Settings;
use envoy_api::pb::envoy::config::core::v3::Node;
use envoy_api::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_api::pb::envoy::service::discovery::v3::DiscoveryRequest;
use envoy_api::pb::google::rpc;
use envoy_api::wkt::{Struct, Value, value::Kind};
use envoy_api::{Message, type_url};
use kube_source::{Cluster, Options};
use kube_test::KubeLite;
use tonic::Code;

use crate::mesh::Mesh;
use crate::ports::{Stream, open};

/// How long anything may take; machines of tests are busy.
const PATIENCE: Duration = Duration::from_secs(20);
/// Short, so that the end of it can be waited for.
const GRACE: Duration = Duration::from_millis(600);

const GROUP: &str = "
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: vm, namespace: NAMESPACE}
spec:
  metadata: {labels: {app: vm}, annotations: {note: kept}}
  template: {serviceAccount: machine, ports: {http: 8080}, labels: {class: metal}}
  probe: {httpGet: {port: 8080}}
";

const SERVICE: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: vm, namespace: default}
spec:
  hosts: [vm.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  workloadSelector: {labels: {app: vm}}
";

const ENDPOINTS: &str = "outbound|80||vm.example";

/// What an agent says of itself; with health checks its proxy's configuration has a probe.
fn machine(namespace: &str, checked: bool) -> Node {
    let text = |value: &str| Value { kind: Some(Kind::StringValue(value.to_owned())) };
    let message = |fields: Vec<(&str, Value)>| {
        let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Value { kind: Some(Kind::StructValue(Struct { fields })) }
    };
    let port = message(vec![("port", Value { kind: Some(Kind::NumberValue(8080.0)) })]);
    let probe = message(vec![("tcpSocket", port)]);
    let config = message(if checked { vec![("readinessProbe", probe)] } else { Vec::new() });
    let fields = vec![
        ("AUTO_REGISTER_GROUP", text("vm")),
        ("NAMESPACE", text(namespace)),
        ("SERVICE_ACCOUNT", text("machine")),
        ("NETWORK", text("lab")),
        ("LABELS", message(vec![("own", text("label"))])),
        ("PROXY_CONFIG", config),
    ];
    let Some(Kind::StructValue(metadata)) = message(fields).kind else { unreachable!("a message") };
    Node {
        id: format!("sidecar~10.1.2.3~host1.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(metadata),
        ..Node::default()
    }
}

/// A machine's stream, watching the endpoints of its own service.
async fn join(mesh: &Mesh, namespace: &str, account: &str, checked: bool) -> Result<Stream, tonic::Status> {
    let first = DiscoveryRequest {
        node: Some(machine(namespace, checked)),
        type_url: type_url::ENDPOINT.into(),
        resource_names: vec![ENDPOINTS.into()],
        ..DiscoveryRequest::default()
    };
    open(mesh.tls_channel(None).await, Some(&mesh.token_in(namespace, account)), first).await
}

async fn say(stream: &Stream, problem: Option<(i32, &str)>) {
    let error_detail = problem.map(|(code, text)| rpc::Status { code, message: text.into(), ..Default::default() });
    let request = DiscoveryRequest { type_url: type_url::HEALTH.into(), error_detail, ..DiscoveryRequest::default() };
    stream.requests.send(request).await.unwrap();
}

/// Takes responses until the service has these addresses.
async fn until(stream: &mut Stream, what: &str, wanted: &[&str]) {
    let asked = Instant::now();
    let mut last = Vec::new();
    loop {
        let rest = PATIENCE.saturating_sub(asked.elapsed());
        let Ok(response) = tokio::time::timeout(rest, stream.responses.message()).await else {
            panic!("{what}: not in time; the last were {last:?}");
        };
        let response = response.unwrap().expect("an open stream");
        // The names again: an acknowledgement without would end the subscription.
        let acknowledgement = DiscoveryRequest {
            type_url: response.type_url.clone(),
            version_info: response.version_info.clone(),
            response_nonce: response.nonce.clone(),
            resource_names: vec![ENDPOINTS.into()],
            ..DiscoveryRequest::default()
        };
        stream.requests.send(acknowledgement).await.unwrap();
        let addresses: Vec<String> = response
            .resources
            .iter()
            .map(|any| ClusterLoadAssignment::decode(&*any.value).unwrap())
            .flat_map(|assignment| assignment.endpoints)
            .flat_map(|locality| locality.lb_endpoints)
            .map(|endpoint| format!("{endpoint:?}"))
            .collect();
        let all = addresses.len() == wanted.len();
        if all && wanted.iter().all(|wanted| addresses.iter().any(|one| one.contains(&format!("{wanted:?}")))) {
            return;
        }
        last = addresses;
    }
}

async fn mesh(settings: Settings, namespace: &str) -> Mesh {
    let mesh = Mesh::with(Settings { entry_grace: GRACE, name: "cp-1".into(), ..settings }).await;
    mesh.apply(SERVICE).await;
    mesh.apply(&GROUP.replace("NAMESPACE", namespace)).await;
    mesh
}

#[tokio::test]
async fn a_machine_is_registered_while_its_agent_is_there() {
    let mesh = mesh(Settings::default(), "default").await;
    // Somebody else of the mesh, who sees the machine come and go.
    let first = DiscoveryRequest {
        node: Some(crate::ports::node()),
        type_url: type_url::ENDPOINT.into(),
        resource_names: vec![ENDPOINTS.into()],
        ..DiscoveryRequest::default()
    };
    let mut other = open(mesh.plain_channel().await, None, first).await.unwrap();
    until(&mut other, "nobody yet", &[]).await;

    let agent = join(&mesh, "default", "machine", false).await.unwrap();
    until(&mut other, "registered", &["10.1.2.3"]).await;
    // Back within the grace, on a second connection before the first one is gone.
    let again = join(&mesh, "default", "machine", false).await.unwrap();
    drop(agent);
    tokio::time::sleep(GRACE * 2).await;
    let state = mesh.handle.state();
    let entry = state.snapshot.find(config_store::Kind::WorkloadEntry, "default", "vm-10.1.2.3-lab").unwrap();
    assert_eq!(entry.annotations["istio.io/autoRegistrationGroup"], "vm");
    assert_eq!(entry.annotations["note"], "kept");
    assert_eq!(entry.annotations["istio.io/workloadController"], "cp-1");
    assert!(!entry.annotations.contains_key("istio.io/disconnectedAt"), "{:?}", entry.annotations);
    for (label, value) in [("app", "vm"), ("class", "metal"), ("own", "label")] {
        assert_eq!(entry.labels[label], value);
    }
    // Gone without a word: the entry stays for the grace.
    drop(again);
    until(&mut other, "removed", &[]).await;
}

#[tokio::test]
async fn a_machine_serves_while_its_agent_says_that_it_is_well() {
    let mesh = mesh(Settings::default(), "default").await;
    let mut agent = join(&mesh, "default", "machine", true).await.unwrap();
    until(&mut agent, "not before it is well", &[]).await;
    say(&agent, None).await;
    until(&mut agent, "well", &["10.1.2.3"]).await;
    say(&agent, Some((13, "connection refused"))).await;
    until(&mut agent, "ill", &[]).await;
    say(&agent, None).await;
    until(&mut agent, "well again", &["10.1.2.3"]).await;
    // Who says that it leaves is gone at once, while it still serves what it has.
    say(&agent, Some((14, "leaving"))).await;
    until(&mut agent, "left", &[]).await;
    let entry =
        mesh.handle.state().snapshot.find(config_store::Kind::WorkloadEntry, "default", "vm-10.1.2.3-lab").cloned();
    assert_eq!(entry.map(|entry| entry.key.to_string()), None);
}

#[tokio::test]
async fn only_who_may_is_registered() {
    let mesh = mesh(Settings::default(), "default").await;
    let other = join(&mesh, "default", "other", false).await.err().unwrap();
    assert_eq!(other.code(), Code::PermissionDenied, "{other}");
    let first = |namespace| DiscoveryRequest {
        node: Some(machine(namespace, false)),
        type_url: type_url::ENDPOINT.into(),
        ..DiscoveryRequest::default()
    };
    let unproved = open(mesh.plain_channel().await, None, first("default")).await.err().unwrap();
    assert!(unproved.message().contains("proved its identity"), "{unproved}");
    let nowhere = join(&mesh, "elsewhere", "machine", false).await.err().unwrap();
    assert_eq!(nowhere.code(), Code::FailedPrecondition);
    assert!(nowhere.message().contains("there is no WorkloadGroup elsewhere/vm"), "{nowhere}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_are_written_to_a_real_api_server() {
    let Some(kube) = KubeLite::shared("machines in a real API server") else { return };
    let crds = crate::kubernetes::program().arg("crds").output().unwrap();
    kube.apply("default", &String::from_utf8(crds.stdout).unwrap());
    let namespace = kube.namespace("machines");
    let group = GROUP.replace("NAMESPACE", &namespace);
    let asked = Instant::now();
    // The kinds are served a moment after they are made.
    while !kube.try_apply(&namespace, &group).success {
        assert!(asked.elapsed() < PATIENCE, "the WorkloadGroup is refused");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let options = Options { kubeconfig: Some(kube.kubeconfig().to_owned()), context: None };
    let cluster = Cluster::connect(&options).await.unwrap();
    let mesh = mesh(Settings { cluster: Some(cluster), ..Settings::default() }, &namespace).await;
    let read = || -> Option<serde_json::Value> {
        let found = kube.kubectl(&["get", "workloadentry", "vm-10.1.2.3-lab", "-n", &namespace, "-o", "json"]);
        serde_json::from_str(&found.stdout).ok()
    };
    let until = async |what: &str, so: &dyn Fn(Option<&serde_json::Value>) -> bool| {
        let asked = Instant::now();
        loop {
            let entry = read();
            if so(entry.as_ref()) {
                return entry;
            }
            assert!(asked.elapsed() < PATIENCE, "{what}: {entry:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let agent = join(&mesh, &namespace, "machine", true).await.unwrap();
    let entry = until("made", &|entry| entry.is_some()).await.unwrap();
    assert_eq!(entry["spec"]["address"], "10.1.2.3");
    assert_eq!(entry["spec"]["network"], "lab");
    assert_eq!(entry["metadata"]["ownerReferences"][0]["name"], "vm");
    assert_eq!(entry["metadata"]["annotations"]["proxy.istio.io/health-checks-enabled"], "true");
    let healthy = |wanted: &'static str| {
        move |entry: Option<&serde_json::Value>| {
            entry.is_some_and(|entry| entry["status"]["conditions"][0]["status"] == wanted)
        }
    };
    say(&agent, None).await;
    until("well", &healthy("True")).await;
    say(&agent, Some((13, "refused"))).await;
    let ill = until("ill", &healthy("False")).await.unwrap();
    assert_eq!(ill["status"]["conditions"][0]["message"], "refused");
    drop(agent);
    until("removed", &|entry| entry.is_none()).await;
}
