//! One Envoy, and what its administration says.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::until;

/// Both flavours of ADS, as Envoy calls them.
pub(super) const MODES: [&str; 2] = ["GRPC", "DELTA_GRPC"];
/// Much more than a busy machine needs; a configuration that never becomes complete is told by it.
const PATIENCE: Duration = Duration::from_secs(40);
const HTTP2: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

pub(super) struct Envoy {
    pub(super) mode: &'static str,
    child: Child,
    folder: PathBuf,
}

fn cluster(name: &str, address: Value) -> Value {
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "typed_extension_protocol_options": { HTTP2: {
            "@type": format!("type.googleapis.com/{HTTP2}"), "explicit_http_config": {"http2_protocol_options": {}},
        }},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
    })
}

impl Envoy {
    /// Starts one in the calling thread's network. Its log and its administration's socket are in `folder`.
    pub(super) fn start(
        program: &Path,
        folder: &Path,
        mode: &'static str,
        node: Value,
        grpc: SocketAddr,
        secrets: &Path,
    ) -> Envoy {
        std::fs::create_dir_all(folder).unwrap();
        let source = json!({"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"});
        let bootstrap = json!({
            "node": node,
            "admin": {"address": {"pipe": {"path": folder.join("admin")}}},
            "dynamic_resources": {
                "lds_config": source, "cds_config": source,
                "ads_config": {
                    "api_type": mode, "transport_api_version": "V3", "set_node_on_first_message_only": true,
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
                },
            },
            "static_resources": {"clusters": [
                cluster("xds-grpc", json!({"socket_address": {"address": grpc.ip(), "port_value": grpc.port()}})),
                cluster("sds-grpc", json!({"pipe": {"path": secrets}})),
            ]},
        });
        let file = folder.join("bootstrap.json");
        std::fs::write(&file, bootstrap.to_string()).unwrap();
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let child = Command::new(program)
            .args(["--disable-hot-restart", "--concurrency", "1", "-l", "warning", "-c"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Envoy { mode, child, folder: folder.to_owned() }
    }

    async fn admin(&self, path: &str) -> Option<String> {
        let stream = UnixStream::connect(self.folder.join("admin")).await.ok()?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
        // Ends with the answer.
        tokio::spawn(connection);
        let request = hyper::Request::get(path).header("host", "envoy").body(Empty::<bytes::Bytes>::new()).ok()?;
        let body = sender.send_request(request).await.ok()?.into_body().collect().await.ok()?;
        String::from_utf8(body.to_bytes().to_vec()).ok()
    }

    /// Its counters and gauges whose names match.
    pub(super) async fn stats(&self, filter: &str) -> BTreeMap<String, u64> {
        let text = self.admin(&format!("/stats?filter={filter}")).await.unwrap_or_default();
        let pairs = text.lines().filter_map(|line| line.rsplit_once(": "));
        pairs.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
    }

    /// Waits until everything it was sent first is in force; what hindered that, or was refused.
    pub(super) async fn initial_problems(&self) -> Vec<String> {
        const DONE: [&str; 3] =
            ["server.live", "cluster_manager.cds.update_success", "listener_manager.lds.update_success"];
        let filter = format!("^({})$", DONE.join("|"));
        let mut stats = BTreeMap::new();
        until(PATIENCE, async || {
            stats = self.stats(&filter).await;
            stats.len() == DONE.len() && stats.values().all(|count| *count > 0) || self.is_refused().await
        })
        .await;
        let mut problems = self.refusals().await;
        let missing = DONE.iter().filter(|name| stats.get(**name).is_none_or(|count| *count == 0));
        problems.extend(missing.map(|name| format!("{name} is 0: {}", self.log())));
        problems
    }

    async fn is_refused(&self) -> bool {
        !self.refusals().await.is_empty()
    }

    /// What it has refused since its start.
    pub(super) async fn refusals(&self) -> Vec<String> {
        let stats = self.stats("update_rejected").await;
        let refused = stats.into_iter().filter(|(_, count)| *count > 0);
        refused.map(|(name, count)| format!("{name} is {count}: {}", self.log())).collect()
    }

    /// The end of what it printed.
    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| !line.contains("deprecated")).collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
