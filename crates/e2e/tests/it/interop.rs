//! Other people's clients and servers through two of our sidecars, with mutual TLS between them.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use e2e::{Mesh, can_run_meshes};

const CLIENT: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: client}
spec: {containers: [{name: a, image: curlimages/curl, command: [outrigger, sample, sleep]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
"#;

/// A server of that name and the Service in front of it.
fn server(name: &str, port_name: &str, port: u16, command: &[&str]) -> String {
    let command = serde_json::to_string(command).expect("texts are JSON");
    format!(
        r#"---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec: {{containers: [{{name: a, image: example/{name}, command: {command}, ports: [{{containerPort: {port}}}]}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{app: {name}}}, ports: [{{name: {port_name}, port: {port}}}]}}
"#
    )
}

/// The build folder, where set-up puts other people's programs.
fn tools() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("crates/e2e lies two below the root");
    std::env::var_os("OUTRIGGER_BUILD").map_or_else(|| root.join("build"), PathBuf::from)
}

fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

struct Interop {
    mesh: Mesh,
    _yaml: tempfile::TempDir,
}

impl Interop {
    fn start(name: &str, server: &str) -> Interop {
        let folder = tempfile::tempdir().expect("a folder for YAML");
        let file = folder.path().join("interop.yaml");
        std::fs::write(&file, format!("{CLIENT}{server}")).expect("the folder is ours");
        let mesh = Mesh::up(name, &[&file.to_string_lossy()]).expect("the mesh starts");
        Interop { mesh, _yaml: folder }
    }

    /// Runs a command in the client's pod until it succeeds: servers take a moment to listen.
    fn run(&self, command: &[&str]) -> String {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let output = self.mesh.exec("client", "a", command);
            if output.success {
                return output.all();
            }
            assert!(Instant::now() < deadline, "{command:?} through two sidecars: {}", output.all());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

#[test]
fn grpc_clients_and_servers_of_others_work() {
    let test = "grpc_clients_and_servers_of_others_work";
    let programs = tools().join("tools/grpc-interop");
    let (grpc_server, client) = (programs.join("server"), programs.join("client"));
    if !grpc_server.is_file() || !client.is_file() {
        println!("SKIPPED: {test}: gRPC's interop programs are not in {}: `cargo xtask setup`", programs.display());
        return;
    }
    if !can_run_meshes(test) {
        return;
    }
    let command = [&*grpc_server.to_string_lossy(), "--port=10000"];
    let interop = Interop::start("e2e-grpc", &server("grpc", "grpc", 10000, &command));
    let cases = [
        "empty_unary",
        "large_unary",
        "client_streaming",
        "server_streaming",
        "ping_pong",
        "empty_stream",
        "timeout_on_sleeping_server",
        "cancel_after_begin",
        "cancel_after_first_response",
        "status_code_and_message",
        "special_status_message",
        "unimplemented_method",
        "unimplemented_service",
        "custom_metadata",
    ];
    for case in cases {
        let case = format!("--test_case={case}");
        interop.run(&[&client.to_string_lossy(), "--server_host=grpc", "--server_port=10000", &case]);
    }
}

#[test]
fn curl_speaks_both_versions() {
    if !can_run_meshes("curl_speaks_both_versions") {
        return;
    }
    let echo = ["outrigger", "sample", "echo", "--port", "8080"];
    let interop = Interop::start("e2e-curl", &server("echo", "http", 8080, &echo));
    let format = "%{http_version} %{http_code} %{size_upload}";
    for (flag, expected) in [("--http1.1", "1.1 200 70000"), ("--http2-prior-knowledge", "2 200 70000")] {
        let body = "x".repeat(70_000);
        let url = "http://echo:8080/anything";
        let told = interop.run(&["curl", "-sSf", flag, "-o", "/dev/null", "-w", format, "--data-binary", &body, url]);
        assert_eq!(told.trim(), expected, "curl {flag}");
    }
}

#[test]
fn redis_clients_work() {
    let test = "redis_clients_work";
    if !installed("redis-server") || !installed("redis-cli") {
        println!("SKIPPED: {test}: redis-server and redis-cli are not installed: `cargo xtask setup`");
        return;
    }
    if !can_run_meshes(test) {
        return;
    }
    let redis = ["redis-server", "--port", "6379", "--save", "", "--protected-mode", "no"];
    let interop = Interop::start("e2e-redis", &server("redis", "tcp-redis", 6379, &redis));
    let cli = ["redis-cli", "-h", "redis"];
    let ask = |command: &[&str]| interop.run(&[&cli, command].concat());
    ask(&["-e", "SET", "greeting", "hello"]);
    assert_eq!(ask(&["-e", "GET", "greeting"]).trim(), "hello");
    // A value of several buffers, there and back.
    ask(&["-e", "EVAL", "return redis.call('SET', 'large', string.rep('x', 3000000))", "0"]);
    assert_eq!(ask(&["-e", "GET", "large"]).trim().len(), 3_000_000);
    // Many requests on one connection without waiting for each answer.
    let printed = interop.run(&["redis-benchmark", "-h", "redis", "-q", "-n", "2000", "-P", "16", "-t", "get,set"]);
    assert!(printed.contains("GET"), "{printed}");
}

const WEBSOCKET_SERVER: &str = "
import asyncio, websockets
async def echo(socket):
    async for message in socket:
        await socket.send(message)
async def main():
    async with websockets.serve(echo, '0.0.0.0', 8081, max_size=None):
        await asyncio.Future()
asyncio.run(main())
";

const WEBSOCKET_CLIENT: &str = "
import asyncio, os, websockets
async def main():
    async with websockets.connect('ws://socket:8081/chat', max_size=None) as socket:
        for message in ['hello', b'', os.urandom(300000), 'x' * 70000]:
            await socket.send(message)
            assert await socket.recv() == message
        await (await socket.ping())
asyncio.run(main())
print('all came back')
";

#[test]
fn websockets_work() {
    let test = "websockets_work";
    let python = tools().join("python/bin/python3");
    let python = &*python.to_string_lossy();
    let probe = std::process::Command::new(python).args(["-c", "import websockets"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: {test}: the Python package websockets is not installed: `cargo xtask setup`");
        return;
    }
    if !can_run_meshes(test) {
        return;
    }
    let interop = Interop::start("e2e-websocket", &server("socket", "http", 8081, &[python, "-c", WEBSOCKET_SERVER]));
    assert!(interop.run(&[python, "-c", WEBSOCKET_CLIENT]).contains("all came back"));
}
