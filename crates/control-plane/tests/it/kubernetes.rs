//! The program against a real Kubernetes API server, with proxies on the secure port.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use envoy_api::pb::envoy::config::cluster::v3::Cluster;
use envoy_api::pb::envoy::config::core::v3::Node;
use envoy_api::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_api::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_api::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use envoy_api::{Message, type_url};
use hyper_util::rt::TokioIo;
use kube_test::KubeLite;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Endpoint, Uri};
use tonic::{Request, Streaming};

use crate::mesh::tls_stream;

/// How long anything may take; what is asked of us is a second, and machines of tests are busy.
const PATIENCE: Duration = Duration::from_secs(20);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// `outrigger control-plane` as a process.
struct ControlPlane {
    process: Child,
    ports: [u16; 4],
    kubeconfig: PathBuf,
}

impl ControlPlane {
    fn new(kubeconfig: &Path) -> ControlPlane {
        let free = [(); 4].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let ports = free.map(|listener| listener.local_addr().unwrap().port());
        ControlPlane { process: Self::start(ports, kubeconfig), ports, kubeconfig: kubeconfig.to_owned() }
    }

    fn start([grpc, grpc_tls, webhook, monitoring]: [u16; 4], kubeconfig: &Path) -> Child {
        let address = |port: u16| format!("127.0.0.1:{port}");
        program()
            .args(["control-plane", "--grpcAddr", &address(grpc), "--secureGRPCAddr", &address(grpc_tls)])
            .args(["--httpsAddr", &address(webhook), "--monitoringAddr", &address(monitoring), "--kubeconfig"])
            .arg(kubeconfig)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// The same again, as after a crash.
    fn restart(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = Self::start(self.ports, &self.kubeconfig);
    }

    async fn ready(&self) {
        let asked = Instant::now();
        while !self.get("/ready").await.starts_with("HTTP/1.1 200") {
            assert!(asked.elapsed() < PATIENCE, "the control plane did not become ready");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn get(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let Ok(mut stream) = tokio::net::TcpStream::connect(("127.0.0.1", self.ports[3])).await else {
            return String::new();
        };
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let mut answer = String::new();
        if stream.write_all(request.as_bytes()).await.is_ok() {
            let _ = stream.read_to_string(&mut answer).await;
        }
        answer
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn program() -> Command {
    let binary = std::env::var_os("OUTRIGGER_BIN").map(PathBuf::from);
    let binary = binary.unwrap_or_else(|| root().join("target/release/outrigger"));
    assert!(binary.is_file(), "{} is missing: run `cargo build --release` first", binary.display());
    Command::new(binary)
}

/// A sidecar's side of a delta stream: subscribes as Envoy does, accepts everything, keeps what it has.
struct Proxy {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    state: Known,
    /// Resources received on this stream.
    received: usize,
}

/// Resources by type and name: version and bytes.
#[derive(Clone, Default)]
struct Known(BTreeMap<String, BTreeMap<String, (String, Vec<u8>)>>);

impl Known {
    fn names(&self, type_url: &str) -> BTreeSet<&str> {
        self.0.get(type_url).into_iter().flatten().map(|(name, _)| name.as_str()).collect()
    }

    fn addresses(&self, cluster: &str) -> usize {
        let Some((_, bytes)) = self.0.get(type_url::ENDPOINT).and_then(|all| all.get(cluster)) else { return 0 };
        let assignment = ClusterLoadAssignment::decode(bytes.as_slice()).unwrap();
        assignment.endpoints.iter().map(|locality| locality.lb_endpoints.len()).sum()
    }

    fn text(&self, type_url: &str, name: &str) -> String {
        let bytes = self.0.get(type_url).and_then(|all| all.get(name)).map_or(&[][..], |(_, bytes)| bytes);
        String::from_utf8_lossy(bytes).into_owned()
    }
}

impl Proxy {
    /// Connects to the secure port with a token; `state` is what it has from before.
    async fn connect(port: u16, root_pem: &str, token: &str, node: Node, state: Known) -> Proxy {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(root_pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let (config, address) = (Arc::new(config), SocketAddr::from(([127, 0, 0, 1], port)));
        let connect = tower::service_fn(move |_: Uri| {
            let config = config.clone();
            async move { tls_stream(address, config).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://istiod").connect_with_connector(connect).await.unwrap();
        let (requests, receiver) = mpsc::channel(64);
        for type_url in [type_url::CLUSTER, type_url::ENDPOINT, type_url::LISTENER, type_url::ROUTE] {
            let known = state.0.get(type_url).cloned().unwrap_or_default();
            let wildcard = matches!(type_url, type_url::CLUSTER | type_url::LISTENER);
            let names: Vec<_> = known.keys().cloned().collect();
            let mut first = DeltaDiscoveryRequest {
                type_url: type_url.into(),
                resource_names_subscribe: if wildcard { Vec::new() } else { names.clone() },
                initial_resource_versions: known.into_iter().map(|(name, (version, _))| (name, version)).collect(),
                ..DeltaDiscoveryRequest::default()
            };
            if type_url == type_url::CLUSTER {
                first.node = Some(node.clone());
            }
            if wildcard || !names.is_empty() {
                requests.send(first).await.unwrap();
            }
        }
        let mut request = Request::new(ReceiverStream::new(receiver));
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(64 << 20);
        let responses = client.delta_aggregated_resources(request).await.unwrap().into_inner();
        Proxy { requests, responses, state, received: 0 }
    }

    /// Takes responses until it is so.
    async fn until(&mut self, what: &str, is_so: impl Fn(&Known) -> bool) {
        let asked = Instant::now();
        while !is_so(&self.state) {
            let rest = PATIENCE.saturating_sub(asked.elapsed());
            match tokio::time::timeout(rest, self.responses.message()).await {
                Ok(response) => self.take(response.unwrap().expect("an open stream")).await,
                Err(_) => panic!("{what}: not so; clusters {:?}", self.state.names(type_url::CLUSTER)),
            }
        }
        println!("{what}: {} ms", asked.elapsed().as_millis());
    }

    /// Takes what comes until nothing has come for a while.
    async fn quiet(&mut self) {
        while let Ok(response) = tokio::time::timeout(Duration::from_millis(700), self.responses.message()).await {
            self.take(response.unwrap().expect("an open stream")).await;
        }
    }

    async fn take(&mut self, response: DeltaDiscoveryResponse) {
        let known = self.state.0.entry(response.type_url.clone()).or_default();
        let mut wanted = Vec::new();
        self.received += response.resources.len() + response.removed_resources.len();
        for resource in response.resources {
            let bytes = resource.resource.unwrap().value;
            if response.type_url == type_url::CLUSTER && !known.contains_key(&resource.name) {
                let cluster = Cluster::decode(bytes.as_slice()).unwrap();
                wanted.extend(cluster.eds_cluster_config.map(|eds| eds.service_name));
            }
            known.insert(resource.name, (resource.version, bytes));
        }
        for name in &response.removed_resources {
            known.remove(name);
        }
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(ack).await.unwrap();
        let subscribe = |type_url: &str, names| DeltaDiscoveryRequest {
            type_url: type_url.into(),
            resource_names_subscribe: names,
            ..DeltaDiscoveryRequest::default()
        };
        if !wanted.is_empty() {
            self.requests.send(subscribe(type_url::ENDPOINT, wanted)).await.unwrap();
        }
        if response.type_url == type_url::LISTENER && !self.state.0.contains_key(type_url::ROUTE) {
            self.requests.send(subscribe(type_url::ROUTE, vec!["9080".into()])).await.unwrap();
        }
    }
}

/// Forwards connections to an API server, and cuts them when told to.
struct Wire {
    port: u16,
    up: Arc<AtomicBool>,
}

impl Wire {
    async fn to(server: String) -> Wire {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let up = Arc::new(AtomicBool::new(true));
        let switch = up.clone();
        tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let (server, switch) = (server.clone(), switch.clone());
                tokio::spawn(async move {
                    let down = async {
                        while switch.load(Ordering::Relaxed) {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    };
                    let forward = async {
                        let mut far = tokio::net::TcpStream::connect(server).await.unwrap();
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    };
                    tokio::select! { () = down => {}, () = forward => {} }
                });
            }
        });
        Wire { port, up }
    }
}

fn sidecar_yaml(host: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: default}}\nspec: {{egress: [{{hosts: ['{host}']}}]}}\n"
    )
}

fn virtual_service(weight: &str, header: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: details}}\nspec:\n  hosts: [details]\n  http:\n  - headers: {{request: {{set: {{x-mark: {header}}}}}}}\n    route:\n    - {{destination: {{host: details}}, weight: {weight}}}\n"
    )
}

/// A proxy of productpage's service account, with what its pod would be given.
async fn connect(kube: &KubeLite, namespace: &str, port: u16, state: Known) -> Proxy {
    let find = |arguments: &[&str]| {
        let asked = Instant::now();
        loop {
            let found = kube.kubectl(arguments);
            if found.success && !found.stdout.trim().is_empty() {
                return found.stdout;
            }
            assert!(asked.elapsed() < PATIENCE, "{arguments:?}: {}", found.stderr);
        }
    };
    let path = "jsonpath={.data.root-cert\\.pem}";
    let root_pem = find(&["get", "configmap", "istio-ca-root-cert", "-n", namespace, "-o", path]);
    let account = "bookinfo-productpage";
    let token = find(&["create", "token", account, "-n", namespace, "--audience", "istio-ca"]);
    let id = format!("sidecar~10.9.9.9~client.{namespace}~{namespace}.svc.cluster.local");
    Proxy::connect(port, &root_pem, token.trim(), Node { id, ..Node::default() }, state).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_api_server_drives_proxies() {
    let test = "a control plane on a real Kubernetes API server";
    let Some(kube) = tokio::task::spawn_blocking(move || KubeLite::shared(test)).await.unwrap() else { return };
    // The control plane reaches the server over a wire that can be cut.
    let config = std::fs::read_to_string(kube.kubeconfig()).unwrap();
    let server = config.split("https://").nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned();
    let wire = Wire::to(server.clone()).await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    std::fs::write(&kubeconfig, config.replace(&server, &format!("127.0.0.1:{}", wire.port))).unwrap();

    let created = kube.kubectl(&["create", "namespace", "istio-system"]);
    // Another test of this process may have installed a control plane there.
    assert!(created.success || created.stderr.contains("AlreadyExists"), "{}", created.stderr);
    let mut control_plane = ControlPlane::new(&kubeconfig);
    control_plane.ready().await;

    // The kinds come after the start, and are followed from then on.
    let crds = program().arg("crds").output().unwrap();
    kube.apply("default", &String::from_utf8(crds.stdout).unwrap());
    let namespace = kube.namespace("bookinfo");
    let bookinfo = std::fs::read_to_string(root().join("samples/bookinfo/bookinfo.yaml")).unwrap();
    kube.apply(&namespace, &bookinfo);

    let host = |name: &str| format!("{name}.{namespace}.svc.cluster.local");
    let (reviews, details) =
        (format!("outbound|9080||{}", host("reviews")), format!("outbound|9080||{}", host("details")));
    let port = control_plane.ports[1];
    let mut proxy = connect(kube, &namespace, port, Known::default()).await;
    proxy
        .until("bookinfo", |known| known.names(type_url::CLUSTER).contains(&*reviews) && known.addresses(&reviews) == 3)
        .await;

    kube.apply(&namespace, &sidecar_yaml(&format!("./{}", host("details"))));
    let fewer = |known: &Known| {
        let names = known.names(type_url::CLUSTER);
        !names.contains(&*reviews) && names.contains(&*details)
    };
    proxy.until("Sidecar", fewer).await;

    let scaled = kube.kubectl(&["scale", "deployment", "details-v1", "-n", &namespace, "--replicas=0"]);
    assert!(scaled.success, "{}", scaled.stderr);
    proxy.until("endpoint removed", |known| known.addresses(&details) == 0).await;

    kube.apply(&namespace, &virtual_service("100", "one"));
    proxy.until("VirtualService", |known| known.text(type_url::ROUTE, "9080").contains("one")).await;

    // The control plane gives the API server the certificate by which to trust its webhook.
    let hook = format!(
        "apiVersion: admissionregistration.k8s.io/v1\nkind: ValidatingWebhookConfiguration\nmetadata: {{name: istio-validator, labels: {{istio.io/rev: default}}}}\nwebhooks:\n- name: rev.validation.istio.io\n  admissionReviewVersions: [v1]\n  sideEffects: None\n  failurePolicy: Ignore\n  clientConfig: {{url: 'https://127.0.0.1:{}/validate'}}\n  rules:\n  - {{apiGroups: [networking.istio.io], apiVersions: ['*'], operations: [CREATE, UPDATE], resources: ['*']}}\n",
        control_plane.ports[2]
    );
    kube.apply("default", &hook);
    let asked = Instant::now();
    let refused = loop {
        let refused = kube.try_apply(&namespace, &virtual_service("-1", "two"));
        if !refused.success && refused.stderr.contains("configuration is invalid") {
            break refused.stderr;
        }
        assert!(asked.elapsed() < PATIENCE, "not refused: {}{}", refused.stdout, refused.stderr);
    };
    assert!(refused.contains("weight"), "{refused}");
    kube.apply(&namespace, &virtual_service("100", "three"));
    proxy
        .until("a good VirtualService after a bad one", |known| known.text(type_url::ROUTE, "9080").contains("three"))
        .await;

    // A server that is away takes nothing back; what changed meanwhile is heard when it returns.
    wire.up.store(false, Ordering::Relaxed);
    kube.kubectl(&["delete", "validatingwebhookconfiguration", "istio-validator"]);
    kube.apply(&namespace, &virtual_service("100", "four"));
    proxy.quiet().await;
    assert!(proxy.state.text(type_url::ROUTE, "9080").contains("three"));
    assert!(control_plane.get("/ready").await.starts_with("HTTP/1.1 200"));
    wire.up.store(true, Ordering::Relaxed);
    proxy.until("the server is back", |known| known.text(type_url::ROUTE, "9080").contains("four")).await;

    // After a restart with nothing changed, who reconnects with what it has is sent nothing.
    proxy.quiet().await;
    let state = proxy.state.clone();
    drop(proxy);
    control_plane.restart();
    control_plane.ready().await;
    let mut again = connect(kube, &namespace, port, state).await;
    again.quiet().await;
    assert_eq!(again.received, 0, "nothing has changed");
}

/// `HOST=ADDRESS` of a ServiceEntry's status.
fn allocated(kube: &KubeLite, namespace: &str, name: &str) -> Vec<String> {
    let path = "jsonpath={range .status.addresses[*]}{.host}={.value} {end}";
    let output = kube.kubectl(&["get", "serviceentry", name, "-n", namespace, "-o", path]);
    output.stdout.split_whitespace().map(str::to_owned).collect()
}

fn entry(name: &str, rest: &str, label: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, labels: {{{label}}}}}\n\
         spec: {{hosts: [{name}.example], ports: [{{number: 9000, name: tcp, protocol: TCP}}], resolution: DNS{rest}}}\n---\n"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_control_planes_gives_hosts_their_addresses() {
    let test = "one_of_two_control_planes_gives_hosts_their_addresses";
    let Some(kube) = tokio::task::spawn_blocking(move || KubeLite::shared(test)).await.unwrap() else { return };
    let created = kube.kubectl(&["create", "namespace", "istio-system"]);
    assert!(created.success || created.stderr.contains("AlreadyExists"), "{}", created.stderr);
    let crds = program().arg("crds").output().unwrap();
    kube.apply("default", &String::from_utf8(crds.stdout).unwrap());
    let namespace = kube.namespace("addresses");
    let asked = Instant::now();
    // The kinds are served a moment after they are known.
    while !kube.try_apply(&namespace, &entry("own", ", addresses: [240.240.0.1]", "")).success {
        assert!(asked.elapsed() < PATIENCE, "ServiceEntries are not served");
    }
    let planes = [ControlPlane::new(kube.kubeconfig()), ControlPlane::new(kube.kubeconfig())];
    for plane in &planes {
        plane.ready().await;
    }
    let refused = "networking.istio.io/enable-autoallocate-ip: 'false'";
    kube.apply(&namespace, &(entry("a", "", "") + &entry("b", "", "") + &entry("c", "", refused)));
    let until = async |name: &str, done: &dyn Fn(&[String]) -> bool| {
        let asked = Instant::now();
        loop {
            let got = allocated(kube, &namespace, name);
            if done(&got) {
                return got;
            }
            // A control plane of another test may have been ended without giving the lease back, which lasts 30 s.
            assert!(asked.elapsed() < PATIENCE * 3, "{name}: {got:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let both = |got: &[String]| got.len() == 2;
    let (a, b) = (until("a", &both).await, until("b", &both).await);
    assert!(a[0].starts_with("a.example=240.240.0.") && a[1].starts_with("a.example=2001:2::"), "{a:?}");
    let ip = |text: &String| text.split_once('=').unwrap().1.to_owned();
    let all: BTreeSet<String> = a.iter().chain(&b).map(ip).collect();
    assert_eq!(all.len(), 4, "nobody shares: {a:?} {b:?}");
    assert!(!all.contains("240.240.0.1"), "a user's own: {all:?}");
    assert!(allocated(kube, &namespace, "c").is_empty() && allocated(kube, &namespace, "own").is_empty());
    // Who has an address of its own needs none; the others keep theirs.
    kube.apply(&namespace, &entry("a", ", addresses: [10.1.2.3]", ""));
    until("a", &|got: &[String]| got.is_empty()).await;
    assert_eq!(allocated(kube, &namespace, "b"), b);
    let holder = "jsonpath={.spec.holderIdentity}";
    let lease = kube.kubectl(&["get", "lease", "istio-ip-autoallocate", "-n", "istio-system", "-o", holder]).stdout;
    // Control planes of other tests work on the same server, and one of them may have been first.
    assert!(lease.starts_with("outrigger_"), "one holder: {lease:?}");
}
