//! A machine that is no pod joins a mesh, serves in it, and leaves without a trace.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::{Mesh, Output, can_run_meshes, outrigger};

/// Two kinds of machines: one whose traffic is captured, and one whose applications call the proxy themselves.
const MESH: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: server}
spec: {selector: {app: server}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec: {containers: [{name: a, image: example/echo, command: [outrigger, sample, echo, --port, "8080"]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec: {containers: [{name: a, image: curlimages/curl, command: [outrigger, sample, sleep]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: vm}
spec:
  metadata: {labels: {app: vm}}
  template: {serviceAccount: machine, ports: {http: 8080}}
  probe: {periodSeconds: 1, httpGet: {path: /status/200, port: 8080}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: vm}
spec:
  hosts: [vm.example]
  addresses: [240.1.1.1]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  workloadSelector: {labels: {app: vm}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: vm-none}
spec:
  metadata: {labels: {app: vm-none}}
  template: {serviceAccount: machine, ports: {http: 9090}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: vm-none}
spec:
  hosts: [vm-none.example]
  addresses: [240.1.1.2]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 9090}]
  workloadSelector: {labels: {app: vm-none}}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: vm-none}
spec:
  workloadSelector: {labels: {app: vm-none}}
  ingress:
  - {port: {number: 9090, name: http, protocol: HTTP}, bind: 0.0.0.0, captureMode: NONE, defaultEndpoint: "127.0.0.1:8081"}
  egress:
  - {port: {number: 8080, name: http, protocol: HTTP}, bind: 127.0.0.1, captureMode: NONE, hosts: ["./server.default.svc.cluster.local"]}
"#;

/// A network namespace of its own on the mesh's network, which no pod is in.
struct Machine {
    /// Keeps the namespace.
    holder: Child,
}

impl Machine {
    fn on(mesh: &Mesh, wire: &str, address: &str) -> Machine {
        let holder = Command::new("unshare").args(["--net", "sleep", "600"]).spawn().unwrap();
        let machine = Machine { holder };
        let network = mesh_network(mesh.pid());
        // The namespace is another one as soon as `unshare` has done its work.
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        until("a namespace", || std::fs::read_link(machine.network()).is_ok_and(|link| link != own));
        let pid = machine.holder.id().to_string();
        run(&network, &["ip", "link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", &pid]);
        run(&network, &["ip", "link", "set", wire, "master", "mesh0", "up"]);
        for arguments in [
            &["link", "set", "lo", "up"][..],
            &["addr", "add", &format!("{address}/16"), "dev", "eth0"],
            &["link", "set", "eth0", "up"],
            &["route", "add", "default", "via", "10.244.0.1"],
        ] {
            run(&machine.network(), &[&["ip"], arguments].concat());
        }
        machine
    }

    fn network(&self) -> String {
        format!("/proc/{}/ns/net", self.holder.id())
    }

    /// A command inside.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.network())).arg("--").args(words).stdin(Stdio::null());
        command
    }

    fn program(&self, words: &[&str]) -> Child {
        let program = outrigger().get_program().to_str().unwrap().to_owned();
        self.command(&[&[program.as_str()], words].concat()).spawn().unwrap()
    }

    /// What a user of the machine gets from a page.
    fn curl(&self, words: &[&str]) -> String {
        let curl = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "curl", "-s", "-m", "3"];
        Output::of(&mut self.command(&[&curl[..], words].concat())).stdout
    }

    /// Everything that capture could have left.
    fn rules(&self) -> String {
        let all = [["nft", "list", "ruleset"], ["ip", "rule", "list"], ["ip", "route", "list"]];
        all.map(|words| Output::of(&mut self.command(&words)).all()).concat()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Ends with the test, in good order.
struct Running(Child);

impl Running {
    fn end(&mut self) -> bool {
        let pid = self.0.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &pid]).status();
        let asked = Instant::now();
        while asked.elapsed() < Duration::from_secs(20) {
            if let Ok(Some(status)) = self.0.try_wait() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        false
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.end();
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The network of the mesh: the one that a thread of `up` is in, and `up` itself is not.
fn mesh_network(pid: u32) -> String {
    let own = std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut networks = threads.map(|thread| format!("{}/ns/net", thread.unwrap().path().display()));
    networks.find(|network| std::fs::read_link(network).is_ok_and(|link| link != own)).expect("the mesh's network")
}

fn run(network: &str, words: &[&str]) {
    let done = Output::of(Command::new("nsenter").arg(format!("--net={network}")).arg("--").args(words));
    assert!(done.success, "{words:?}: {}", done.all());
}

#[track_caller]
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let asked = Instant::now();
    while !so() {
        assert!(asked.elapsed() < Duration::from_secs(30), "{what}: not in time");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn configure(mesh: &Mesh, group: &str, folder: &Path) {
    let mut command = outrigger();
    command.args(["workload", "configure", group, "--name", mesh.name(), "-o"]).arg(folder);
    let done = Output::of(&mut command);
    assert!(done.success && done.stdout.lines().count() == 5, "{}", done.all());
}

/// The status that a pod gets from a service of a machine.
fn status(mesh: &Mesh, host: &str, address: &str) -> String {
    let resolve = format!("{host}:80:{address}");
    let url = format!("http://{host}/status/200");
    let words = ["curl", "-s", "-m", "3", "-o", "/dev/null", "-w", "%{http_code}", "--resolve", &resolve, &url];
    mesh.exec("client", "a", &words).stdout
}

#[test]
fn a_machine_joins_serves_and_leaves() {
    if !can_run_meshes("a_machine_joins_serves_and_leaves") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let manifest = folder.path().join("mesh.yaml");
    std::fs::write(&manifest, MESH).unwrap();
    let mesh = Mesh::up("e2e-join", &[manifest.to_str().unwrap()]).unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();

    configure(&mesh, "vm", &folder.path().join("vm"));
    let vm = Machine::on(&mesh, "vm1", "10.244.200.1");
    let before = vm.rules();
    let mut app = Running(vm.program(&["sample", "echo", "--port", "8080"]));
    assert_eq!(status(&mesh, "vm.example", "240.1.1.1"), "503", "nobody is there yet");
    let (config, state) = (path("vm"), path("state"));
    let join = ["join", &config, "--state", &state, "--capture", "nftables"];
    let mut agent = Running(vm.program(&join));
    until("the machine serves", || status(&mesh, "vm.example", "240.1.1.1") == "200");
    assert!(vm.rules().contains("istio-proxy-nat"), "its traffic is captured");

    // The other way: names and pages of the mesh, which takes nothing but mutual TLS.
    let page = ["-o", "/dev/null", "-w", "%{http_code}", "http://server.default.svc.cluster.local:8080/status/200"];
    until("the machine calls the mesh", || vm.curl(&page) == "200");

    // While its application is down nobody is sent there, and then again.
    app.end();
    until("an ill machine is left alone", || status(&mesh, "vm.example", "240.1.1.1") == "503");
    let _app = Running(vm.program(&["sample", "echo", "--port", "8080"]));
    until("a well one is not", || status(&mesh, "vm.example", "240.1.1.1") == "200");

    // It leaves, and all is as it was; it comes back with the certificate that it has, without a token.
    assert!(agent.end(), "the agent ends in good order");
    assert_eq!(status(&mesh, "vm.example", "240.1.1.1"), "503");
    assert_eq!(vm.rules(), before);
    std::fs::remove_file(folder.path().join("vm/istio-token")).unwrap();
    let mut agent = Running(vm.program(&join));
    until("the machine is back", || status(&mesh, "vm.example", "240.1.1.1") == "200");
    assert!(agent.end());

    // Without capture: the application is reached by the port that the Sidecar names, and calls the proxy's own.
    configure(&mesh, "vm-none", &folder.path().join("vm-none"));
    let none = Machine::on(&mesh, "vm2", "10.244.200.2");
    let before = none.rules();
    let _none_app = Running(none.program(&["sample", "echo", "--port", "8081"]));
    let (config, state) = (path("vm-none"), path("state-none"));
    let mut agent = Running(none.program(&["join", &config, "--state", &state, "--capture", "none"]));
    until("the machine without capture serves", || status(&mesh, "vm-none.example", "240.1.1.2") == "200");
    assert_eq!(none.rules(), before, "nothing is captured");
    let page = [
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "-H",
        "host: server.default.svc.cluster.local:8080",
        "http://127.0.0.1:8080/status/200",
    ];
    until("it calls through the proxy", || none.curl(&page) == "200");
    assert!(agent.end());
    assert_eq!(status(&mesh, "vm-none.example", "240.1.1.2"), "503");
}
