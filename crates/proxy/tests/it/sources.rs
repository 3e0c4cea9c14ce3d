//! Resources from others than the aggregated stream: secrets over sockets and from files, everything else from files.

use crate::fixture::{bootstrap, connect, free_port};
use crate::library::{Authority, answering, client, get};
use ads::server::{Event, EventKind, Names, Peer, Source};
use envoy_api::tls::{CertificateValidationContext, Secret, TlsCertificate, secret};
use envoy_api::{Message, Resource, core};
use identity::WorkloadCertificate;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;

/// An SDS server's secrets, and what its clients said.
struct Secrets {
    bodies: Mutex<BTreeMap<String, Vec<u8>>>,
    revision: watch::Sender<u64>,
    refused: Mutex<Vec<String>>,
    accepted: AtomicUsize,
    streams: AtomicUsize,
}

impl Secrets {
    fn of(certificate: &WorkloadCertificate) -> Arc<Self> {
        let secrets = Arc::new(Self {
            bodies: Mutex::default(),
            revision: watch::Sender::new(1),
            refused: Mutex::default(),
            accepted: AtomicUsize::new(0),
            streams: AtomicUsize::new(0),
        });
        secrets.put(certificate);
        secrets
    }

    fn put(&self, certificate: &WorkloadCertificate) {
        let mut bodies = self.bodies.lock().expect("no test panics with it");
        for secret in secrets_of(certificate) {
            bodies.insert(secret.name.clone(), secret.encode_to_vec());
        }
        drop(bodies);
        self.revision.send_modify(|r| *r += 1);
    }
}

fn inline(bytes: Vec<u8>) -> Option<core::DataSource> {
    Some(core::DataSource {
        specifier: Some(core::data_source::Specifier::InlineBytes(bytes)),
        ..core::DataSource::default()
    })
}

fn secrets_of(certificate: &WorkloadCertificate) -> [Secret; 2] {
    let own = TlsCertificate {
        certificate_chain: inline(certificate.chain_pem().into_bytes()),
        private_key: inline(certificate.key.to_pem().as_bytes().to_vec()),
        ..TlsCertificate::default()
    };
    let roots = CertificateValidationContext {
        trusted_ca: inline(certificate.roots_pem().into_bytes()),
        ..CertificateValidationContext::default()
    };
    [
        Secret { name: "default".into(), r#type: Some(secret::Type::TlsCertificate(own)) },
        Secret { name: "ROOTCA".into(), r#type: Some(secret::Type::ValidationContext(roots)) },
    ]
}

impl Source for Secrets {
    type Proxy = ();

    fn connect(&self, node: &core::Node, _peer: &Peer) -> Result<(), tonic::Status> {
        assert_eq!(node.id, "sidecar~10.0.0.1~a.default~default.svc.cluster.local");
        self.streams.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn resources(&self, (): &(), _: &str, names: Names<'_>) -> Arc<[Resource]> {
        let Names::List(names) = names else { panic!("secrets are asked for by name") };
        let bodies = self.bodies.lock().expect("no test panics with it");
        let version = format!("v{}", *self.revision.borrow());
        let found = names.iter().filter_map(|name| {
            let body = bodies.get(&**name)?.clone();
            Some(Resource::with_version(name.clone(), version.as_str(), body))
        });
        found.collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    fn report(&self, (): &(), event: &Event) {
        match &event.kind {
            EventKind::Nacked { error, .. } => self.refused.lock().expect("not poisoned").push(error.clone()),
            EventKind::Acked { .. } => {
                self.accepted.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

/// Serves SDS on a socket until the task is ended.
fn serve(path: &Path, secrets: Arc<Secrets>) -> tokio::task::JoinHandle<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).expect("a socket in a folder of the test");
    let router = tonic::transport::Server::builder().add_service(ads::server::secret_service(secrets));
    tokio::spawn(async move {
        router.serve_with_incoming(UnixListenerStream::new(listener)).await.expect("it serves");
    })
}

/// A listener whose secrets come from `source`.
fn over_tls(port: u16, source: &Value) -> Value {
    let mut config = answering(port, "secret", true);
    let context = &mut config["static_resources"]["listeners"][0]["filter_chains"][0]["transport_socket"]["typed_config"]
        ["common_tls_context"];
    context["tls_certificate_sds_secret_configs"][0]["sds_config"] = source.clone();
    context["combined_validation_context"]["validation_context_sds_secret_config"]["sds_config"] = source.clone();
    config["node"] = json!({"id": "sidecar~10.0.0.1~a.default~default.svc.cluster.local", "cluster": "a.default"});
    config
}

/// Istio's own way: a static cluster `sds-grpc` with the agent's socket.
fn agent(path: &Path) -> Value {
    json!([{
        "name": "sds-grpc", "type": "STATIC", "connect_timeout": "1s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}}
        }},
        "load_assignment": {"cluster_name": "sds-grpc", "endpoints": [{"lb_endpoints": [
            {"endpoint": {"address": {"pipe": {"path": path}}}}
        ]}]}
    }])
}

fn api(kind: &str, service: Value) -> Value {
    json!({"resource_api_version": "V3", "initial_fetch_timeout": "0s", "api_config_source": {
        "api_type": kind, "transport_api_version": "V3", "grpc_services": [service], "set_node_on_first_message_only": true
    }})
}

fn start(config: &Value) -> proxy::Handle {
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    proxy::start(bootstrap(config), options).expect("it starts")
}

type Tls = tokio_rustls::client::TlsStream<tokio::net::TcpStream>;

/// Connects until the listener shows this certificate.
async fn served_with(port: u16, me: &WorkloadCertificate, expected: &WorkloadCertificate) -> Tls {
    for _ in 0..1000 {
        let name = ServerName::try_from("server").expect("a name");
        if let Ok(stream) = client(me).connect(name, connect(port).await).await {
            let seen = stream.get_ref().1.peer_certificates().expect("a server certificate")[0].clone();
            if seen == expected.chain[0] {
                return stream;
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the certificate is not served");
}

/// Secrets come, change and outlive their server; a bad one is refused and changes nothing.
async fn secrets_over(source: impl Fn(&Path) -> (Value, Value)) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let authority = Authority::new();
    let [me, first, second, third] = ["client", "first", "second", "third"].map(|name| authority.workload(name));
    let secrets = Secrets::of(&first);
    let port = free_port();
    let (sds, clusters) = source(&path);
    let mut config = over_tls(port, &sds);
    config["static_resources"]["clusters"] = clusters;
    // The proxy is there before its agent.
    let _proxy = start(&config);
    let server = serve(&path, secrets.clone());
    let mut old = served_with(port, &me, &first).await;
    assert!(get(&mut old).await.ends_with("secret"));
    secrets.put(&second);
    let mut newer = served_with(port, &me, &second).await;
    assert!(get(&mut newer).await.ends_with("secret"));
    assert!(get(&mut old).await.ends_with("secret"), "a connection from before the rotation goes on");

    // A key that does not fit.
    let [mut bad, _] = secrets_of(&third);
    let [good, _] = secrets_of(&first);
    if let (Some(secret::Type::TlsCertificate(bad)), Some(secret::Type::TlsCertificate(good))) =
        (&mut bad.r#type, good.r#type)
    {
        bad.private_key = good.private_key;
    }
    secrets.bodies.lock().expect("not poisoned").insert("default".into(), bad.encode_to_vec());
    secrets.revision.send_modify(|r| *r += 1);
    while secrets.refused.lock().expect("not poisoned").is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let refused = secrets.refused.lock().expect("not poisoned")[0].clone();
    assert!(refused.starts_with("default: "), "{refused}");
    served_with(port, &me, &second).await;

    // A new server has another certificate.
    assert!(secrets.accepted.load(Ordering::Relaxed) >= 3);
    let streams = secrets.streams.load(Ordering::Relaxed);
    assert_eq!(streams, 2, "one stream for each of two secrets");
    server.abort();
    let _ = server.await;
    secrets.put(&third);
    let server = serve(&path, secrets.clone());
    served_with(port, &me, &third).await;

    // The server has it no more, which changes nothing for who uses it.
    secrets.bodies.lock().expect("not poisoned").clear();
    secrets.revision.send_modify(|r| *r += 1);
    tokio::time::sleep(Duration::from_millis(100)).await;
    served_with(port, &me, &third).await;
    assert!(get(&mut old).await.ends_with("secret"));
    server.abort();
}

#[tokio::test]
async fn secrets_over_the_agents_socket() {
    secrets_over(|path| (api("GRPC", json!({"envoy_grpc": {"cluster_name": "sds-grpc"}})), agent(path))).await;
}

#[tokio::test]
async fn secrets_over_the_agents_socket_incrementally() {
    secrets_over(|path| (api("DELTA_GRPC", json!({"envoy_grpc": {"cluster_name": "sds-grpc"}})), agent(path))).await;
}

#[tokio::test]
async fn secrets_over_a_socket_without_a_cluster() {
    secrets_over(|path| {
        let uri = format!("unix:{}", path.display());
        (api("GRPC", json!({"google_grpc": {"target_uri": uri, "stat_prefix": "sds"}})), json!([]))
    })
    .await;
}

/// A file as Kubernetes' volumes replace theirs: whole.
fn replace(path: &Path, response: &Value) {
    let next = path.with_extension("next");
    std::fs::write(&next, response.to_string()).expect("written");
    std::fs::rename(&next, path).expect("renamed");
}

fn secret_file(path: &Path, certificate: &WorkloadCertificate) {
    let secrets = secrets_of(certificate);
    let url = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    let resources: Vec<Value> = secrets
        .iter()
        .map(|secret| {
            let mut json = envoy_api::json::to_json(url, &secret.encode_to_vec()).expect("JSON");
            json["@type"] = url.into();
            json
        })
        .collect();
    replace(path, &json!({ "resources": resources }));
}

#[tokio::test]
async fn secrets_of_a_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("secrets.json");
    let authority = Authority::new();
    let [me, first, second] = ["client", "first", "second"].map(|name| authority.workload(name));
    secret_file(&path, &first);
    let port = free_port();
    let _proxy = start(&over_tls(port, &json!({"path_config_source": {"path": path}})));
    let mut old = served_with(port, &me, &first).await;
    secret_file(&path, &second);
    served_with(port, &me, &second).await;
    std::fs::write(&path, "resources: [").expect("written");
    served_with(port, &me, &second).await;
    assert!(get(&mut old).await.ends_with("secret"));
}

async fn answers(port: u16, expected: &str) {
    let mut last = String::new();
    for _ in 0..1000 {
        last = get(&mut connect(port).await).await;
        if last.contains(expected) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{last}");
}

#[tokio::test]
async fn everything_from_files() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str| folder.path().join(name);
    let path = |name: &str| json!({"path_config_source": {"path": file(name)}});
    let typed = |of: &str, mut resource: Value| {
        resource["@type"] = format!("type.googleapis.com/envoy.config.{of}").into();
        resource
    };
    let (port, upstream) = (free_port(), free_port());
    let fixed = |name: &str, port: u16, body: &str| {
        let mut listener = answering(port, body, false)["static_resources"]["listeners"][0].clone();
        listener["name"] = name.into();
        typed("listener.v3.Listener", listener)
    };
    let mut routed = fixed("out", port, "");
    let manager = &mut routed["filter_chains"][0]["filters"][0]["typed_config"];
    manager.as_object_mut().expect("a message").remove("route_config");
    manager["rds"] = json!({"route_config_name": "routes", "config_source": path("rds.yaml")});
    replace(
        &file("lds.json"),
        &json!({"version_info": "1", "resources": [routed, fixed("up", upstream, "from files")]}),
    );
    let cluster = typed(
        "cluster.v3.Cluster",
        json!({"name": "c", "type": "EDS", "connect_timeout": "1s",
        "eds_cluster_config": {"eds_config": path("eds.json")}}),
    );
    replace(&file("cds.json"), &json!({"version_info": "1", "resources": [cluster]}));
    let endpoints = typed(
        "endpoint.v3.ClusterLoadAssignment",
        json!({"cluster_name": "c", "endpoints": [{"lb_endpoints": [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": upstream}}}}]}]}),
    );
    replace(&file("eds.json"), &json!({"resources": [endpoints]}));
    std::fs::write(
        file("rds.yaml"),
        "resources:\n- \"@type\": type.googleapis.com/envoy.config.route.v3.RouteConfiguration\n  name: routes\n  \
         virtual_hosts:\n  - {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: c}}]}\n",
    )
    .expect("written");
    let proxy = start(&json!({
        "node": {"id": "n", "cluster": "c"},
        "dynamic_resources": {"cds_config": path("cds.json"), "lds_config": path("lds.json")}
    }));
    answers(port, "from files").await;
    assert_eq!(proxy.ready(), Ok(()));

    // One listener changes, the routes too, and what is no longer in the file goes.
    let changed = routed_to(&file("lds.json"), fixed("other", upstream, "changed"));
    replace(&file("lds.json"), &changed);
    answers(port, "changed").await;
    replace(&file("cds.json"), &json!({"version_info": "2", "resources": []}));
    answers(port, "503 Service Unavailable").await;
}

/// The file's first listener, and another one in place of the rest.
fn routed_to(path: &Path, other: Value) -> Value {
    let text = std::fs::read_to_string(path).expect("the file");
    let mut response: Value = serde_json::from_str(&text).expect("JSON");
    response["resources"][1] = other;
    response["version_info"] = "2".into();
    response
}

#[tokio::test]
async fn what_never_comes_is_waited_for_only_so_long() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing =
        json!({"path_config_source": {"path": folder.path().join("missing")}, "initial_fetch_timeout": "0.05s"});
    let port = free_port();
    let mut config = answering(port, "", false);
    let manager = &mut config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"];
    manager.as_object_mut().expect("a message").remove("route_config");
    manager["rds"] = json!({"route_config_name": "routes", "config_source": missing});
    config["static_resources"]["clusters"] =
        json!([{"name": "c", "type": "EDS", "connect_timeout": "1s", "eds_cluster_config": {"eds_config": missing}}]);
    config["dynamic_resources"] = json!({ "cds_config": missing });
    let proxy = start(&config);
    answers(port, "404 Not Found").await;
    while let Err(waiting) = proxy.ready() {
        assert!(waiting.starts_with("waiting for"), "{waiting}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
