//! The live table of `up` on a terminal: pods, their sidecars, and the traffic on every edge.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::Bytes;
use tokio::task::JoinSet;

use crate::client::columns;
use crate::cluster::Remote;
use crate::cluster::command::PodRow;
use crate::metrics::{self, EdgeRow, Edges};
use crate::network::Dialer;
use crate::progress::Progress;
use crate::up::rows;

/// How often it is drawn anew.
const PERIOD: Duration = Duration::from_secs(1);
/// Where an agent serves its own, its proxy's and its application's metrics.
const METRICS_PORT: u16 = 15020;
const SCRAPE_TIMEOUT: Duration = Duration::from_millis(800);

/// Draws until cancelled.
pub(crate) async fn show(
    remote: &Remote,
    dialer: &Dialer,
    urls: &[String],
    progress: &Progress,
) -> anyhow::Result<std::convert::Infallible> {
    progress.hold();
    let _restore = Restore(progress);
    let mut drawn = 0;
    loop {
        let pods = rows(remote).await?;
        let edges = scrape(dialer, &pods).await;
        let text = render(&pods, &edges, urls, &progress.held());
        let mut out = std::io::stdout().lock();
        if drawn > 0 {
            // Up to the first line of the last picture, and clear from there.
            write!(out, "\x1b[{drawn}A\x1b[J")?;
        }
        // Without wrapping: a long line that took two would spoil the count of lines to go up.
        write!(out, "\x1b[?7l{text}\x1b[?7h")?;
        out.flush()?;
        drop(out);
        drawn = text.lines().count();
        tokio::time::sleep(PERIOD).await;
    }
}

struct Restore<'a>(&'a Progress);

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// The traffic as all sidecars report it now.
pub(crate) async fn scrape(dialer: &Dialer, pods: &[PodRow]) -> Vec<EdgeRow> {
    let mut tasks = JoinSet::new();
    for ip in pods.iter().filter(|pod| pod.sidecar.is_some()).filter_map(|pod| pod.ips.first().copied()) {
        let dialer = dialer.clone();
        tasks.spawn(async move { tokio::time::timeout(SCRAPE_TIMEOUT, metrics_of(&dialer, ip)).await.ok().flatten() });
    }
    let mut edges = Edges::new();
    while let Some(done) = tasks.join_next().await {
        if let Ok(Some(text)) = done {
            metrics::add(&mut edges, &text);
        }
    }
    metrics::rows(&edges)
}

async fn metrics_of(dialer: &Dialer, ip: IpAddr) -> Option<String> {
    let address = SocketAddr::new(ip, METRICS_PORT);
    let request =
        http::Request::get("/stats/prometheus").header("host", address.to_string()).body(Empty::<Bytes>::new()).ok()?;
    let (status, body) = dialer.http(address, request).await.ok()?;
    status.is_success().then(|| String::from_utf8_lossy(&body).into_owned())
}

fn render(pods: &[PodRow], edges: &[EdgeRow], urls: &[String], messages: &[String]) -> String {
    let mut text = String::from("\n");
    let mut lines = vec![["POD", "READY", "STATUS", "RESTARTS", "AGE", "IP", "SIDECAR"].map(str::to_owned)];
    for pod in pods {
        let name =
            if pod.namespace == "default" { pod.name.clone() } else { format!("{}.{}", pod.name, pod.namespace) };
        lines.push([
            name,
            format!("{}/{}", pod.ready, pod.containers),
            pod.status.clone(),
            pod.restarts.to_string(),
            pod.age.clone(),
            pod.ips.first().map_or_else(String::new, ToString::to_string),
            pod.sidecar
                .as_ref()
                .map_or_else(|| "none".to_owned(), |state| format!("{} {state}", env!("CARGO_PKG_VERSION"))),
        ]);
    }
    text.push_str(&columns(&lines));
    text.push('\n');
    text.push_str(&edge_table(edges));
    if !urls.is_empty() {
        text.push_str(&format!("\n{}    Ctrl-C ends the mesh\n", urls.join("  ")));
    }
    for message in messages {
        text.push_str(message);
        text.push('\n');
    }
    text
}

/// The edges as aligned columns.
pub(crate) fn edge_table(edges: &[EdgeRow]) -> String {
    let milliseconds = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms"));
    let mut lines = vec![["FROM", "TO", "REQUESTS", "SUCCESS", "P50", "P99"].map(str::to_owned)];
    for edge in edges {
        lines.push([
            edge.from.clone(),
            edge.to.clone(),
            edge.requests.to_string(),
            format!("{:.1} %", edge.success),
            milliseconds(edge.p50_ms),
            milliseconds(edge.p99_ms),
        ]);
    }
    columns(&lines)
}
