//! The scenarios of `samples/sidecar`: each runs with our own proxy and with real Envoy, and is proved by what arrives where.

mod bench;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::{Mesh, Output, can_run_meshes};
use serde_json::Value;

/// Which proxy the sidecars run.
#[derive(Clone, Copy)]
enum Proxy {
    Ours,
    Envoy,
}

/// A running scenario.
struct Scenario {
    mesh: Mesh,
}

/// What a client in a pod saw of one request.
#[derive(Debug)]
struct Seen {
    /// The status, or 0 where there was no answer.
    status: u16,
    /// What the echoing server says it was sent.
    echo: Value,
    /// curl's own words where there was no answer.
    error: String,
}

impl Seen {
    /// Asserts that this pod answered a request that came through its sidecar over mutual TLS from that service account.
    #[track_caller]
    fn from(&self, pod: &str, account: &str) {
        assert!(self.status == 200 && self.echo["pod"] == pod, "an answer of {pod}: {self:?}");
        let peer = self.echo["headers"]["X-Forwarded-Client-Cert"].as_str().unwrap_or_default();
        let wanted = format!("URI=spiffe://cluster.local/ns/{account}");
        assert!(peer.ends_with(&wanted), "{pod} was called by {account}: {self:?}");
    }

    /// Asserts that this pod answered, and that no identity came with the request.
    #[track_caller]
    fn without_identity(&self, pod: &str) {
        assert!(self.status == 200 && self.echo["pod"] == pod, "an answer of {pod}: {self:?}");
        assert_eq!(self.echo["headers"]["X-Forwarded-Client-Cert"], Value::Null, "{self:?}");
    }
}

impl Scenario {
    /// Starts a sample; `None`, said visibly, where this machine cannot.
    fn start(test: &str, file: &str, flags: &[&str], proxy: Proxy) -> Option<Scenario> {
        if !can_run_meshes(test) {
            return None;
        }
        let path = samples().join(file);
        let mut arguments = vec![path.to_string_lossy().into_owned()];
        arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let name = match proxy {
            Proxy::Ours => format!("e2e-{}", file.trim_end_matches(".yaml")),
            Proxy::Envoy => {
                let Some(envoy) = envoy() else {
                    println!("SKIPPED: {test}: no Envoy; `cargo xtask setup` installs it");
                    return None;
                };
                arguments.extend(["--envoy".to_owned(), envoy.to_string_lossy().into_owned()]);
                format!("e2e-{}-envoy", file.trim_end_matches(".yaml"))
            }
        };
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mesh = Mesh::up(&name, &arguments).expect("the sample starts");
        let scenario = Scenario { mesh };
        scenario.runs_on(proxy);
        Some(scenario)
    }

    /// Asserts that the sidecars are what the test says, as otherwise it would prove nothing.
    fn runs_on(&self, proxy: Proxy) {
        let pods = self.mesh.pods().expect("ps");
        let with_sidecar = pods.iter().filter(|pod| pod["sidecar"] == "synced");
        let names: Vec<&str> = with_sidecar.filter_map(|pod| pod["name"].as_str()).collect();
        assert!(!names.is_empty(), "no sidecar among {pods:?}");
        for name in names {
            let info = self.sidecar(name, "server_info");
            let is_envoy = info.contains("BoringSSL");
            assert_eq!(is_envoy, matches!(proxy, Proxy::Envoy), "{name}: {info}");
        }
    }

    /// curl in a pod's application container.
    fn curl(&self, pod: &str, arguments: &[&str]) -> Seen {
        let format = "\n%{http_code} %{errormsg}";
        let curl = ["curl", "-s", "--max-time", "10", "-w", format];
        let output = self.mesh.exec(pod, "app", &[&curl, arguments].concat());
        let (body, last) = output.stdout.rsplit_once('\n').unwrap_or(("", &output.stdout));
        let (status, error) = last.split_once(' ').unwrap_or((last, ""));
        Seen {
            status: status.parse().unwrap_or_else(|_| panic!("curl in {pod}: {}", output.all())),
            echo: serde_json::from_str(body).unwrap_or(Value::Null),
            error: error.to_owned(),
        }
    }

    /// A page of the sidecar's admin interface.
    fn sidecar(&self, pod: &str, page: &str) -> String {
        let output = self.mesh.exec(pod, "istio-proxy", &["pilot-agent", "request", "GET", page]);
        assert!(output.success, "{page} of {pod}: {}", output.all());
        output.stdout
    }

    /// The sidecar's log; waits for a line with all these words, as access logs are written a little later.
    #[track_caller]
    fn logged(&self, pod: &str, words: &[&str]) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let log = Output::of(self.mesh.command("logs").args([pod, "-c", "istio-proxy"])).all();
            if log.lines().any(|line| words.iter().all(|word| line.contains(word))) {
                return;
            }
            assert!(Instant::now() < deadline, "no line of {pod}'s sidecar with {words:?}:\n{log}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("crates/e2e lies two below the root").to_owned()
}

fn samples() -> PathBuf {
    root().join("samples/sidecar")
}

/// Real Envoy, as `cargo xtask setup` installs it.
fn envoy() -> Option<PathBuf> {
    let folder = std::env::var_os("OUTRIGGER_BUILD").map_or_else(|| root().join("build"), PathBuf::from);
    // Programs under test run in the workspace's root, so that is what a relative path is relative to.
    Some(root().join(folder).join("envoy")).filter(|path| path.is_file())
}

/// Each scenario as two tests, one for each proxy.
macro_rules! scenarios {
    ($($scenario:ident),* $(,)?) => { $(
        mod $scenario {
            #[test]
            fn our_proxy() {
                super::$scenario(concat!(stringify!($scenario), "::our_proxy"), super::Proxy::Ours);
            }

            #[test]
            fn real_envoy() {
                super::$scenario(concat!(stringify!($scenario), "::real_envoy"), super::Proxy::Envoy);
            }
        }
    )* };
}

#[test]
fn every_sample_is_explained_and_tested() {
    let files =
        std::fs::read_dir(samples()).expect("samples/sidecar").map(|entry| entry.expect("an entry").file_name());
    let files: Vec<String> = files.map(|name| name.to_string_lossy().into_owned()).collect();
    let readme = std::fs::read_to_string(samples().join("README.md")).expect("its README");
    let tests = include_str!("sidecar.rs");
    for file in files.iter().filter(|file| *file != "README.md") {
        assert!(readme.contains(&format!("\n## [{file}]({file})\n")), "{file} has no paragraph in the README");
        assert!(tests.contains(&format!("Scenario::start(test, \"{file}\"")), "{file} has no test");
    }
    assert!(files.len() > 8, "{files:?}");
}

scenarios! {
    machine_without_capture, partial_capture, tls_termination, unix_sockets, mysql, outbound_policy, no_egress, precedence,
}

fn machine_without_capture(test: &str, proxy: Proxy) {
    let Some(scenario) = Scenario::start(test, "machine-without-capture.yaml", &[], proxy) else { return };
    let rules = scenario.mesh.in_pod_network("shop", &["nft", "list", "ruleset"]).stdout;
    assert_eq!(rules.trim(), "", "the machine captures nothing");
    // In: the listener is on the machine's own address, nowhere else, and the mesh finds it there.
    scenario.curl("client", &["http://shop/get"]).from("shop", "default/sa/default");
    scenario.curl("client", &["-H", "host: shop", "http://172.16.1.32/get"]).from("shop", "default/sa/default");
    let pods = scenario.mesh.pods().expect("ps");
    let shop = pods.iter().find(|pod| pod["name"] == "shop").expect("shop runs");
    let elsewhere = format!("http://{}/get", shop["ips"][0].as_str().expect("it has an address"));
    let refused = scenario.curl("client", &[&elsewhere]);
    assert!(refused.status != 200, "port 80 of the machine's other address: {refused:?}");
    // Out: by the listener that the Sidecar names, and only to the service that it names.
    let listener = "http://127.0.0.1:7070/get";
    scenario.curl("shop", &["-H", "host: stock:7070", listener]).from("stock", "default/sa/shop");
    assert_eq!(scenario.curl("shop", &["-H", "host: payroll:7070", listener]).status, 502, "payroll is hidden");
    assert!(!scenario.sidecar("shop", "config_dump").contains("payroll"), "the sidecar was told of payroll");
    // Past the listeners nothing is captured: the request arrives as it was sent, without an identity.
    scenario.curl("shop", &["http://stock:7070/get"]).without_identity("stock");
}

fn partial_capture(test: &str, proxy: Proxy) {
    let Some(scenario) = Scenario::start(test, "partial-capture.yaml", &[], proxy) else { return };
    scenario.curl("client", &["http://shop/get"]).from("shop", "default/sa/default");
    // The captured network needs no more than the address.
    scenario.curl("shop", &["http://192.168.7.20:7070/get"]).from("stock", "default/sa/shop");
    // On the other one, the same server refuses who comes past the listener and answers who comes through it.
    let past = scenario.curl("shop", &["http://prices:7071/get"]);
    assert_eq!(past.status, 0, "prices only answers the mesh: {past:?}");
    let through = scenario.curl("shop", &["-H", "host: prices:7071", "http://127.0.0.1:7071/get"]);
    through.from("prices", "default/sa/shop");
    let rules = scenario.mesh.in_pod_network("shop", &["nft", "list", "ruleset"]).stdout;
    assert!(rules.contains("192.168.0.0/16"), "{rules}");
}

fn tls_termination(test: &str, proxy: Proxy) {
    // As in Istio, off unless it is asked for.
    let flags = ["--pilot-env", "ENABLE_TLS_ON_SIDECAR_INGRESS=true"];
    let Some(scenario) = Scenario::start(test, "tls-termination.yaml", &flags, proxy) else { return };
    let url = "https://ratings:9080/get";
    for pod in ["client", "stranger"] {
        let seen = scenario.curl(pod, &["--cacert", "/etc/certs/servercert.pem", url]);
        seen.without_identity("ratings");
        assert_eq!(seen.echo["headers"]["X-Forwarded-Proto"], "https", "{seen:?}");
        let untrusting = scenario.curl(pod, &[url]);
        assert!(untrusting.status == 0 && untrusting.error.contains("certificate"), "{pod}: {untrusting:?}");
        let plain = scenario.curl(pod, &["http://ratings:9080/get"]);
        assert_eq!(plain.status, 0, "plain text to a port with TLS: {plain:?}");
    }
    let ports = scenario.mesh.exec("ratings", "app", &["ss", "-Hltn"]).stdout;
    assert!(ports.contains(":15006") && !ports.contains(":9080"), "the application has no TCP port: {ports}");

    // Another certificate in the same files is taken without a restart.
    let folder = tempfile::tempdir().expect("a folder for files");
    scenario.mesh.apply(&renewed_certificate(folder.path()));
    let ask = "openssl s_client -connect ratings:9080 </dev/null 2>/dev/null | openssl x509 -noout -subject";
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let shown = scenario.mesh.exec("stranger", "app", &["sh", "-c", ask]);
        if shown.stdout.contains("renewed") {
            break;
        }
        assert!(Instant::now() < deadline, "the certificate after its renewal: {}", shown.all());
        std::thread::sleep(Duration::from_millis(200));
    }
    let pods = scenario.mesh.pods().expect("ps");
    assert!(pods.iter().all(|pod| pod["restarts"] == 0), "{pods:?}");
}

/// The sample's Secret with a certificate of another subject.
fn renewed_certificate(folder: &Path) -> PathBuf {
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    let made = Output::of(
        Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=renewed", "-addext", "subjectAltName=DNS:ratings", "-out"])
            .arg(&cert)
            .arg("-keyout")
            .arg(&key),
    );
    assert!(made.success, "{}", made.all());
    let read = |path: &Path| std::fs::read_to_string(path).expect("openssl wrote it");
    let secret = serde_json::json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ratings"},
        "stringData": {"servercert.pem": read(&cert), "privatekey.pem": read(&key)},
    });
    let file = folder.join("secret.yaml");
    std::fs::write(&file, secret.to_string()).expect("the folder is ours");
    file
}

fn unix_sockets(test: &str, proxy: Proxy) {
    let Some(scenario) = Scenario::start(test, "unix-sockets.yaml", &[], proxy) else { return };
    let socket = ["--unix-socket", "/var/mesh/uds.sock"];
    let ask = |url: &'static str| scenario.curl("consumer", &[&socket[..], &[url]].concat());
    ask("http://provider:15889/get").from("provider-over-unix-socket", "default/sa/consumer");
    // The socket leads to all ports of the service, told apart by the request's authority.
    ask("http://provider:15890/get").from("provider-over-loopback", "default/sa/consumer");
    assert_eq!(ask("http://somewhere:15889/get").status, 502, "only what the Sidecar names");
    let loopback = scenario.curl("consumer", &["-H", "host: provider:15890", "http://127.0.0.1:15890/get"]);
    loopback.from("provider-over-loopback", "default/sa/consumer");
    // Neither application has a TCP port on that way.
    let ports = scenario.mesh.exec("provider", "sockets", &["ss", "-Hltn"]).stdout;
    assert!(ports.contains(":15889"), "the sidecar's: {ports}");
    assert!(scenario.mesh.exec("provider", "sockets", &["test", "-S", "/var/mesh/provider.sock"]).success);
    bench::sockets_beside_loopback(&scenario, proxy);
}

fn mysql(test: &str, proxy: Proxy) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = |program: &str| {
        let folders = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
        folders.into_iter().any(|folder| folder.join(program).is_file())
    };
    if !["mariadbd", "mariadb", "mariadb-install-db"].into_iter().all(installed) {
        println!("SKIPPED: {test}: MariaDB is not installed: `cargo xtask setup`");
        return;
    }
    let Some(scenario) = Scenario::start(test, "mysql.yaml", &[], proxy) else { return };
    let client = ["mariadb", "--no-defaults", "-h127.0.0.1", "-ureader", "-preader", "-N", "-B", "-e"];
    let sql = |statement: &str| scenario.mesh.exec("bookshop", "app", &[&client[..], &[statement]].concat());
    let written = sql("INSERT INTO shop.books VALUES ('Measure for Measure')");
    assert!(written.success, "{}", written.all());
    let read = sql("SELECT @@hostname, @@port, COUNT(*) FROM shop.books");
    assert_eq!(read.stdout.trim(), "mariadb\t3306\t2", "{}", read.all());
    // More than one buffer, there and back.
    let large = sql("SELECT LENGTH(CONCAT(REPEAT('x', 3000000))), REPEAT('x', 3000000)");
    assert!(large.stdout.starts_with("3000000\txxx") && large.stdout.trim().len() == 3_000_008, "{}", large.stderr);
    scenario.logged("bookshop", &["outbound|3306||mysql.foo.com", "127.0.0.1:3306"]);
    scenario.curl("client", &["http://bookshop:9080/get"]).from("bookshop", "default/sa/default");
}

fn outbound_policy(test: &str, proxy: Proxy) {
    let Some(scenario) = Scenario::start(test, "outbound-policy.yaml", &[], proxy) else { return };
    for pod in ["closed", "open"] {
        scenario.curl(pod, &["http://inside:8080/get"]).from("inside", "default/sa/default");
    }
    let urls = ["http://203.0.113.10:8080/get", "http://203.0.113.10:9090/get"];
    for url in urls {
        scenario.curl("open", &[url]).without_identity("outside");
    }
    scenario.logged("open", &["PassthroughCluster", "203.0.113.10:8080"]);
    // Where the mesh has HTTP on that port the client is told, else its connection ends.
    assert_eq!(scenario.curl("closed", &[urls[0]]).status, 502);
    scenario.logged("closed", &["203.0.113.10:8080", " 502 "]);
    let refused = scenario.curl("closed", &[urls[1]]);
    assert_eq!(refused.status, 0, "{refused:?}");
    scenario.logged("closed", &["BlackHoleCluster", "203.0.113.10:9090"]);
}

fn no_egress(test: &str, proxy: Proxy) {
    let Some(scenario) = Scenario::start(test, "no-egress.yaml", &[], proxy) else { return };
    scenario.curl("other", &["http://vault:8080/get"]).from("vault", "default/sa/default");
    let refused = scenario.curl("vault", &["http://other:8080/get"]);
    assert_eq!(refused.status, 0, "{refused:?}");
    let told = scenario.sidecar("vault", "config_dump");
    assert!(!told.contains("other.default"), "the sidecar was told of another service");
    assert!(told.contains("BlackHoleCluster") && !told.contains("outbound|8080"), "nothing but the way nowhere");
}

fn precedence(test: &str, proxy: Proxy) {
    let Some(scenario) = Scenario::start(test, "precedence.yaml", &[], proxy) else { return };
    let services = ["mesh-wide", "namespace-wide", "selected"];
    let counts = [("client.elsewhere", "mesh-wide"), ("client.shop", "namespace-wide"), ("special.shop", "selected")];
    for (pod, allowed) in counts {
        let told = scenario.sidecar(pod, "config_dump");
        for service in services {
            let seen = scenario.curl(pod, &[&format!("http://{service}.services:8080/get")]);
            let (_, namespace) = pod.split_once('.').expect("pods are written with their namespaces");
            if service == allowed {
                seen.from(service, &format!("{namespace}/sa/default"));
            } else {
                assert_eq!(seen.status, 502, "{pod} and {service}: {seen:?}");
            }
            let known = told.contains(&format!("outbound|8080||{service}.services.svc.cluster.local"));
            assert_eq!(known, service == allowed, "what {pod} was told of {service}");
        }
    }
}
