//! The agent with our proxy against our whole control plane, with bookinfo, in a network namespace of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::{Environment, ProxyFlags, Root, Settings};
use control_plane::{Listeners, Update};

const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: productpage-v1-1
  namespace: default
  labels: {app: productpage, version: v1}
spec:
  serviceAccountName: bookinfo-productpage
  containers: [{name: productpage, image: x, ports: [{containerPort: 9080}]}]
status:
  phase: Running
  podIP: 10.244.0.5
  podIPs: [{ip: 10.244.0.5}]
  conditions: [{type: Ready, status: "True"}]
---
apiVersion: v1
kind: Pod
metadata:
  name: details-v1-1
  namespace: default
  labels: {app: details, version: v1}
spec:
  serviceAccountName: bookinfo-details
  containers: [{name: details, image: x, ports: [{containerPort: 9080}]}]
status:
  phase: Running
  podIP: 10.244.0.6
  podIPs: [{ip: 10.244.0.6}]
  conditions: [{type: Ready, status: "True"}]
"#;

#[test]
fn bookinfo_is_accepted_by_our_proxy() {
    let namespace = match netns::Netns::create() {
        Ok(namespace) => namespace,
        Err(error) => {
            println!("SKIPPED: no network namespace can be made here: {error}");
            return;
        }
    };
    namespace
        .run(|| {
            let mut links = netns::Netlink::open().unwrap();
            links.loopback_up().unwrap();
            links.add_addr("lo", "10.244.0.5".parse().unwrap(), 32).unwrap();
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(run());
        })
        .unwrap();
}

async fn run() {
    let authority = Arc::new(ca::Authority::generate("cluster.local").unwrap());
    let issuer = ca::TokenIssuer::generate().unwrap();
    let bind = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let listeners =
        Listeners { grpc: bind(15010), grpc_tls: bind(15012), webhook: bind(15017), monitoring: bind(15014) };
    let (_shutdown, watch) = lifecycle::drain::channel();
    let settings = control_plane::Settings::default();
    let control_plane =
        control_plane::serve(settings, listeners, authority.clone(), issuer.verifier(), watch).await.unwrap();
    let bookinfo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../samples/bookinfo/bookinfo.yaml");
    let (documents, errors) = manifest::read(&[bookinfo]);
    assert!(errors.is_empty(), "{errors:?}");
    let pods = manifest::parse(Path::new("pods.yaml"), PODS).unwrap();
    let updates =
        documents.into_iter().chain(pods).filter(|d| d.kind() != "Deployment").map(|d| Update::Apply(Box::new(d)));
    let (revision, rejected) = control_plane.update(updates.collect()).await;
    println!("revision {revision}, rejected {rejected:?}");

    let dir = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let token = ca::TokenRequest {
        namespace: "default".to_owned(),
        service_account: "bookinfo-productpage".to_owned(),
        pod: "productpage-v1-1".to_owned(),
        uid: "1".to_owned(),
        audience: "istio-ca".to_owned(),
        ttl: Duration::from_secs(600),
    };
    write("var/run/secrets/tokens/istio-token", &issuer.issue(&token).unwrap());
    write("var/run/secrets/istio/root-cert.pem", authority.root_pem());
    write("etc/istio/pod/labels", "app=\"productpage\"\nversion=\"v1\"\n");
    let env = Environment::from([
        ("PROXY_CONFIG", "{\"discoveryAddress\":\"localhost:15012\",\"concurrency\":1}"),
        ("POD_NAME", "productpage-v1-1"),
        ("POD_NAMESPACE", "default"),
        ("SERVICE_ACCOUNT", "bookinfo-productpage"),
        ("INSTANCE_IP", "10.244.0.5"),
        ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
        ("ISTIO_META_WORKLOAD_NAME", "productpage-v1"),
        ("ISTIO_META_INTERCEPTION_MODE", "REDIRECT"),
        ("ISTIO_META_MESH_ID", "cluster.local"),
    ]);
    let settings = Settings::resolve(&ProxyFlags::default(), &env, Root::at(dir.path())).unwrap();
    let started = Instant::now();
    let agent = tokio::spawn(agent::sidecar(settings));
    super::eventually("readiness", async || match super::http(15021, "GET /healthz/ready").await {
        Ok((200, _)) => Ok(()),
        other => Err(format!("{other:?}; {:?}", control_plane.sync_status())),
    })
    .await;
    println!("ready after {:?}", started.elapsed());
    let waited = control_plane.wait(revision, Duration::from_secs(10)).await;
    assert!(waited.is_ok(), "{waited:?}");
    let status = control_plane.sync_status();
    assert_eq!(status.len(), 1);
    assert_eq!(status[0].refusals().count(), 0, "{:?}", status[0]);
    assert_eq!(status[0].identity.as_deref(), Some("spiffe://cluster.local/ns/default/sa/bookinfo-productpage"));
    // The pod's own commands, on the ports of a real pod.
    for line in [
        "wait --timeoutSeconds 5",
        "request GET server_info",
        "request --debug-port=15020 POST drain",
        "version --short",
    ] {
        assert_eq!(command(line).await, Ok(()), "{line}");
    }
    assert!(command("request --debug-port=22 GET x").await.unwrap_err().contains("not in allowed list"));
    let late = command("wait --timeoutSeconds 0 --periodMillis 1 --url http://127.0.0.1:15099/x").await;
    assert!(late.unwrap_err().contains("timeout waiting for the proxy"));
    assert_eq!(super::http(15020, "POST /quitquitquit").await.unwrap().0, 200);
    tokio::time::timeout(Duration::from_secs(5), agent).await.expect("the agent did not end").unwrap().unwrap();
}

/// Runs the agent's program as a container's hook would.
async fn command(line: &str) -> Result<(), String> {
    let args = <agent::Args as clap::Parser>::parse_from(std::iter::once("pilot-agent").chain(line.split(' ')));
    let done = tokio::task::spawn_blocking(move || agent::run(args).map_err(|e| format!("{e:#}"))).await.unwrap();
    // ExitCode cannot be compared, only shown.
    done.and_then(|code| {
        if format!("{code:?}") == format!("{:?}", std::process::ExitCode::SUCCESS) {
            Ok(())
        } else {
            Err(format!("{code:?}"))
        }
    })
}
