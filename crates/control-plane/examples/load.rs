//! Many sidecars on one control plane: `load PROGRAM`, with the built `outrigger`.
//!
//! 1000 services with 10 endpoints each and 100 proxies, as what istiod was measured with. Every proxy takes clusters,
//! endpoints, listeners and routes over delta ADS and accepts all. Then a VirtualService changes, and an endpoint, some
//! times each; of every round the slowest proxy counts. CPU and memory are the server's, from /proc.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use envoy_api::pb::envoy::config::cluster::v3::Cluster;
use envoy_api::pb::envoy::config::core::v3::Node;
use envoy_api::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_api::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use envoy_api::wkt::{Struct, Value, value::Kind};
use envoy_api::{Message, type_url};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::transport::Endpoint;

const SERVICES: usize = 1000;
const ENDPOINTS: usize = 10;
const PROXIES: usize = 100;
const ROUNDS: usize = 5;
/// Nothing may come for so long before a phase is over.
const QUIET: Duration = Duration::from_millis(1000);

fn pod_ip(service: usize, endpoint: usize) -> String {
    let number = service * ENDPOINTS + endpoint;
    format!("10.{}.{}.{}", 128 + (number >> 16), number >> 8 & 255, number & 255)
}

/// Each tenth service is TCP; half of the endpoints are of version v2.
fn objects() -> String {
    let mut out = String::new();
    for i in 0..SERVICES {
        let (namespace, name) = (format!("ns-{}", i % 10), format!("svc-{i}"));
        let (port_name, port, target) = if i % 10 == 9 { ("tcp", 9000, 9000) } else { ("http", 80, 8080) };
        let ip = format!("10.96.{}.{}", i >> 8, i & 255);
        let _ = write!(
            out,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{type: ClusterIP, clusterIP: {ip}, clusterIPs: [{ip}], selector: {{app: {name}}}, ports: [{{name: {port_name}, port: {port}, targetPort: {target}, protocol: TCP}}]}}\n"
        );
        for e in 0..ENDPOINTS {
            let (ip, version) = (pod_ip(i, e), e % 2 + 1);
            let _ = write!(
                out,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}-{e}, namespace: {namespace}, labels: {{app: {name}, version: v{version}, security.istio.io/tlsMode: istio}}}}\nspec: {{serviceAccountName: {name}, nodeName: node-{}, containers: [{{name: app, image: app}}]}}\nstatus: {{phase: Running, podIP: {ip}, podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: 'True'}}]}}\n",
                e % 3
            );
        }
        // The one that changes stands in a file of its own.
        if i != 5 {
            out += &slice(i, &pod_ip(i, 0));
        }
    }
    out
}

fn slice(service: usize, first: &str) -> String {
    let (namespace, name) = (format!("ns-{}", service % 10), format!("svc-{service}"));
    let (port_name, target) = if service % 10 == 9 { ("tcp", 9000) } else { ("http", 8080) };
    let mut out = format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-x, namespace: {namespace}, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\nports: [{{name: {port_name}, port: {target}, protocol: TCP}}]\nendpoints:\n"
    );
    for e in 0..ENDPOINTS {
        let ip = if e == 0 { first.to_owned() } else { pod_ip(service, e) };
        let _ = writeln!(
            out,
            "- {{addresses: [{ip}], conditions: {{ready: true}}, targetRef: {{kind: Pod, name: {name}-{e}, namespace: {namespace}}}}}"
        );
    }
    out
}

fn virtual_service(mark: &str) -> String {
    let host = "svc-7.ns-7.svc.cluster.local";
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: svc-7, namespace: ns-7}}\nspec:\n  hosts: [{host}]\n  http:\n  - headers: {{request: {{set: {{x-mark: {mark}}}}}}}\n    route: [{{destination: {{host: {host}}}}}]\n"
    )
}

fn node(i: usize) -> Node {
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let (namespace, name, ip) = (format!("ns-{}", i % 10), format!("svc-{i}"), pod_ip(i, 0));
    let labels = [("app", name.as_str()), ("version", "v1"), ("security.istio.io/tlsMode", "istio")];
    let labels = Struct { fields: labels.into_iter().map(|(key, value)| (key.to_owned(), text(value))).collect() };
    let fields = [
        ("NAMESPACE", text(&namespace)),
        ("CLUSTER_ID", text("Kubernetes")),
        ("MESH_ID", text("cluster.local")),
        ("ISTIO_VERSION", text("1.32.0")),
        ("INTERCEPTION_MODE", text("REDIRECT")),
        ("INSTANCE_IPS", text(&ip)),
        ("NAME", text(&format!("{name}-0"))),
        ("SERVICE_ACCOUNT", text(&name)),
        ("LABELS", Value { kind: Some(Kind::StructValue(labels)) }),
    ];
    Node {
        id: format!("sidecar~{ip}~{name}-0.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(Struct { fields: fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() }),
        ..Node::default()
    }
}

/// What all proxies together have received.
#[derive(Default)]
struct Totals {
    messages: AtomicU64,
    resources: AtomicU64,
    bytes: AtomicU64,
    /// Microseconds since the start, of the last message.
    last: AtomicU64,
}

/// What a proxy tells: that it has everything, or that it has seen the mark.
enum Told {
    Synced(Instant),
    Marked(Instant),
}

struct Proxy {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    wanted: BTreeMap<&'static str, BTreeSet<String>>,
    missing: BTreeMap<&'static str, BTreeSet<String>>,
    told: mpsc::Sender<Told>,
    mark: watch::Receiver<String>,
    totals: Arc<Totals>,
    started: Instant,
    synced: bool,
}

impl Proxy {
    async fn run(
        mut self,
        channel: tonic::transport::Channel,
        node: Node,
        receiver: mpsc::Receiver<DeltaDiscoveryRequest>,
    ) {
        for type_url in [type_url::CLUSTER, type_url::LISTENER] {
            let node = (type_url == type_url::CLUSTER).then(|| node.clone());
            let request = DeltaDiscoveryRequest { node, type_url: type_url.into(), ..DeltaDiscoveryRequest::default() };
            let _ = self.requests.send(request).await;
        }
        let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(1 << 30);
        let opened = client.delta_aggregated_resources(Request::new(ReceiverStream::new(receiver))).await;
        let mut responses = opened.expect("the control plane takes the stream").into_inner();
        let mut answered = BTreeSet::new();
        while let Ok(Some(response)) = responses.message().await {
            answered.insert(response.type_url.clone());
            self.take(response).await;
            if !self.synced && answered.len() == 4 && self.missing.values().all(BTreeSet::is_empty) {
                self.synced = true;
                let _ = self.told.send(Told::Synced(Instant::now())).await;
            }
        }
    }

    async fn take(&mut self, response: DeltaDiscoveryResponse) {
        let now = Instant::now();
        let mark = self.mark.borrow().clone();
        let mut marked = false;
        let mut bytes = 0;
        let refers_to = match response.type_url.as_str() {
            type_url::CLUSTER => Some(type_url::ENDPOINT),
            type_url::LISTENER => Some(type_url::ROUTE),
            _ => None,
        };
        let mut new = Vec::new();
        for resource in &response.resources {
            let Some(body) = &resource.resource else { continue };
            bytes += body.value.len() as u64;
            marked |= !mark.is_empty() && body.value.windows(mark.len()).any(|window| window == mark.as_bytes());
            if let Some(missing) = self.missing.get_mut(response.type_url.as_str()) {
                missing.remove(&resource.name);
            }
            if response.type_url == type_url::CLUSTER {
                new.extend(endpoints_of(&body.value));
            }
        }
        if response.type_url == type_url::LISTENER {
            new = vec!["80".to_owned()];
        }
        self.totals.messages.fetch_add(1, Ordering::Relaxed);
        self.totals.resources.fetch_add(response.resources.len() as u64, Ordering::Relaxed);
        self.totals.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.totals.last.store((now - self.started).as_micros() as u64, Ordering::Relaxed);
        if marked {
            let _ = self.told.send(Told::Marked(now)).await;
        }
        let acknowledgement = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        let _ = self.requests.send(acknowledgement).await;
        let Some(refers_to) = refers_to else { return };
        let wanted = self.wanted.entry(refers_to).or_default();
        new.retain(|name| wanted.insert(name.clone()));
        if !new.is_empty() {
            self.missing.entry(refers_to).or_default().extend(new.iter().cloned());
            let request = DeltaDiscoveryRequest {
                type_url: refers_to.into(),
                resource_names_subscribe: new,
                ..DeltaDiscoveryRequest::default()
            };
            let _ = self.requests.send(request).await;
        }
    }
}

fn endpoints_of(cluster: &[u8]) -> Option<String> {
    let cluster = Cluster::decode(cluster).ok()?;
    let service = cluster.eds_cluster_config?.service_name;
    Some(if service.is_empty() { cluster.name } else { service })
}

/// The server, with its CPU seconds and peak memory.
struct Server(Child);

impl Server {
    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or(0.0);
        (ticks(11) + ticks(12)) / 100.0
    }

    fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Bench {
    server: Server,
    folder: tempfile::TempDir,
    totals: Arc<Totals>,
    started: Instant,
    told: mpsc::Receiver<Told>,
    mark: watch::Sender<String>,
}

impl Bench {
    /// Waits until nothing has come for a while.
    async fn quiet(&self) {
        loop {
            let last = Duration::from_micros(self.totals.last.load(Ordering::Relaxed));
            let silence = self.started.elapsed().saturating_sub(last);
            match QUIET.checked_sub(silence) {
                None => return,
                Some(rest) => tokio::time::sleep(rest).await,
            }
        }
    }

    /// Puts a file in place, as whole, and waits until every proxy has the mark.
    async fn change(
        &mut self,
        what: &str,
        istiod: &str,
        file: &str,
        text: impl Fn(&str) -> String,
    ) -> anyhow::Result<()> {
        let (mut times, mut cpu, mut resources, mut bytes) = (Vec::new(), 0.0, 0, 0);
        for round in 0..ROUNDS {
            let mark = format!("10.77.0.{}", round + 1);
            self.mark.send_replace(mark.clone());
            let before = (
                self.server.cpu(),
                self.totals.resources.load(Ordering::Relaxed),
                self.totals.bytes.load(Ordering::Relaxed),
            );
            let changed = Instant::now();
            replace(self.folder.path(), file, &text(&mark))?;
            let mut last = changed;
            for _ in 0..PROXIES {
                match tokio::time::timeout(Duration::from_secs(30), self.told.recv()).await {
                    Ok(Some(Told::Marked(when) | Told::Synced(when))) => last = last.max(when),
                    _ => bail!("{what}: a proxy has not got the change"),
                }
            }
            self.quiet().await;
            times.push((last - changed).as_secs_f64() * 1000.0);
            cpu += self.server.cpu() - before.0;
            resources += self.totals.resources.load(Ordering::Relaxed) - before.1;
            bytes += self.totals.bytes.load(Ordering::Relaxed) - before.2;
        }
        times.sort_by(f64::total_cmp);
        let rounds = ROUNDS as f64;
        println!(
            "{what:<24} | last proxy {:6.1} ms (of {ROUNDS}: {:.1} to {:.1}) | CPU {:5.3} s | {:.1} resources, {:.1} KB a proxy | istiod: {istiod}",
            times[ROUNDS / 2],
            times[0],
            times[ROUNDS - 1],
            cpu / rounds,
            resources as f64 / rounds / PROXIES as f64,
            bytes as f64 / rounds / PROXIES as f64 / 1e3,
        );
        Ok(())
    }
}

fn replace(folder: &Path, file: &str, text: &str) -> std::io::Result<()> {
    let new = folder.join(format!(".{file}"));
    std::fs::write(&new, text)?;
    std::fs::rename(new, folder.join(file))
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let program: PathBuf = std::env::args_os().nth(1).context("usage: load PROGRAM")?.into();
    let folder = tempfile::tempdir()?;
    replace(folder.path(), "a-objects.yaml", &objects())?;
    replace(folder.path(), "b-slice.yaml", &slice(5, &pod_ip(5, 0)))?;
    replace(folder.path(), "c-virtual-service.yaml", &virtual_service("none"))?;
    let ports = [(); 4].map(|()| std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()));
    let mut addresses = Vec::new();
    for port in ports {
        addresses.push(port?.to_string());
    }
    let flags = ["--grpcAddr", "--secureGRPCAddr", "--httpsAddr", "--monitoringAddr"];
    let mut command = Command::new(&program);
    command.arg("control-plane").arg("--config").arg(folder.path()).args(["--log_output_level", "default:warn"]);
    for (flag, address) in flags.iter().zip(&addresses) {
        command.args([flag, address.as_str()]);
    }
    let server = Server(command.stdout(Stdio::null()).spawn().context("cannot start the control plane")?);
    let channel = Endpoint::from_shared(format!("http://{}", addresses[0]))?
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(1 << 20);
    // Proxies are refused until the configuration is loaded, which is seen by memory that no longer grows.
    let mut idle = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let now = server.memory("VmRSS:");
        if now == idle && channel.connect().await.is_ok() {
            break;
        }
        idle = now;
    }
    println!(
        "{SERVICES} services x {ENDPOINTS} endpoints loaded | CPU {:.2} s, memory {idle} MB | istiod: 205 MB",
        server.cpu()
    );
    let (tell, told) = mpsc::channel(PROXIES);
    let (mark, marked) = watch::channel(String::new());
    let totals = Arc::new(Totals::default());
    let started = Instant::now();
    let before = server.cpu();
    for i in 0..PROXIES {
        let (requests, receiver) = mpsc::channel(64);
        let proxy = Proxy {
            requests,
            wanted: BTreeMap::new(),
            missing: BTreeMap::new(),
            told: tell.clone(),
            mark: marked.clone(),
            totals: totals.clone(),
            started,
            synced: false,
        };
        tokio::spawn(proxy.run(channel.connect().await?, node(i), receiver));
    }
    let mut bench = Bench { server, folder, totals, started, told, mark };
    let mut last = started;
    for _ in 0..PROXIES {
        match tokio::time::timeout(Duration::from_secs(60), bench.told.recv()).await {
            Ok(Some(Told::Synced(when) | Told::Marked(when))) => last = last.max(when),
            _ => bail!("not all proxies are in sync after a minute"),
        }
    }
    bench.quiet().await;
    println!(
        "{:<24} | last proxy {:6.1} ms | CPU {:5.3} s | {:.0} MB sent | peak memory {} MB | istiod: 13.7 s, CPU 11.0 s, 852 MB",
        "connect and full sync",
        (last - started).as_secs_f64() * 1000.0,
        bench.server.cpu() - before,
        bench.totals.bytes.load(Ordering::Relaxed) as f64 / 1e6,
        bench.server.memory("VmHWM:"),
    );
    bench
        .change("VirtualService change", "1070 ms, CPU 0.75 s, 480 KB", "c-virtual-service.yaml", virtual_service)
        .await?;
    bench.change("endpoint change", "139 ms, CPU 0.02 s, 1.4 KB", "b-slice.yaml", |ip| slice(5, ip)).await?;
    println!("{:<24} | memory {} MB, peak {} MB", "end", bench.server.memory("VmRSS:"), bench.server.memory("VmHWM:"));
    Ok(())
}
