//! The agent's HTTP ports: 15020 (status, probes, merged metrics), 15021 (health) and 15090 (the proxy's metrics).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use http::Method;
use lifecycle::http::{Handler, Request, Response, json, text, with_type};
use lifecycle::metrics::{Counter, Registry};
use lifecycle::readiness::Readiness;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::dataplane::{DataPlane, Later};
use crate::dns::SharedTable;
use crate::probes::Probers;
use crate::scrape::Scrape;

/// Requests of the outside world to the agent.
#[derive(Debug, Default)]
pub(crate) struct Controls {
    /// `/quitquitquit`: end now.
    pub quit: Notify,
    /// `/drain`: drain, and end at once when told to end.
    pub drain: Notify,
}

/// Everything the pages show.
pub(crate) struct Status {
    pub readiness: Readiness,
    /// `None` until the proxy has been started.
    pub data_plane: watch::Receiver<Option<Arc<dyn DataPlane>>>,
    pub controls: Arc<Controls>,
    pub probers: Probers,
    pub scrape: Option<Scrape>,
    pub names: SharedTable,
    pub metrics: Registry,
    pub status_port: u16,
    /// METRICS_LOCALHOST_ACCESS_ONLY: metrics are for this pod alone.
    local_metrics: bool,
    counters: Counters,
    was_ready: AtomicBool,
    started: Instant,
}

/// Source: istio `pilot/cmd/pilot-agent/metrics/metrics.go`.
struct Counters {
    scrapes: Counter,
    proxy_errors: Counter,
    application_errors: Counter,
}

impl Status {
    /// Counts from now.
    pub(crate) fn new(
        readiness: Readiness,
        data_plane: watch::Receiver<Option<Arc<dyn DataPlane>>>,
        controls: Arc<Controls>,
        (probers, scrape): (Probers, Option<Scrape>),
        names: SharedTable,
        metrics: Registry,
        (status_port, local_metrics): (u16, bool),
    ) -> Status {
        let errors = |kind| {
            metrics.counter(
                "istio_agent_scrape_failures_total",
                "The total number of failed scrapes.",
                &[("type", kind)],
            )
        };
        let counters = Counters {
            scrapes: metrics.counter("istio_agent_scrapes_total", "The total number of scrapes.", &[]),
            proxy_errors: errors("envoy"),
            application_errors: errors("application"),
        };
        let was_ready = AtomicBool::new(false);
        Status {
            readiness,
            data_plane,
            controls,
            probers,
            scrape,
            names,
            metrics,
            status_port,
            local_metrics,
            counters,
            was_ready,
            started: Instant::now(),
        }
    }

    /// What a port serves to a peer; who comes with a certificate counts as local.
    pub(crate) fn pages(self: &Arc<Self>, port: Port, peer_is_local: bool) -> Arc<dyn Handler> {
        Arc::new(Pages { status: self.clone(), port, peer_is_local })
    }

    async fn ready(&self) -> Response {
        let missing = if self.readiness.is_ready() {
            match self.running() {
                Some(proxy) => proxy.ready().await.err(),
                None => Some("the proxy is not running".to_owned()),
            }
        } else {
            Some(self.readiness.missing())
        };
        let was_ready = self.was_ready.swap(missing.is_none(), Ordering::Relaxed);
        match missing {
            None => {
                if !was_ready {
                    info!(after = ?self.started.elapsed(), "ready");
                }
                text(200, "")
            }
            Some(reason) => {
                if was_ready {
                    warn!(%reason, "not ready any more");
                }
                text(503, format!("not ready: {reason}\n"))
            }
        }
    }

    fn running(&self) -> Option<Arc<dyn DataPlane>> {
        self.data_plane.borrow().clone()
    }

    async fn proxy_metrics(&self, query: &str) -> Option<String> {
        let proxy = self.running()?;
        match proxy.prometheus(query).await {
            Ok(text) => Some(text),
            Err(error) => {
                warn!(%error, "the proxy's metrics cannot be had");
                self.counters.proxy_errors.increment();
                None
            }
        }
    }

    /// Agent, proxy, application, in this order: the last may end the exposition.
    async fn merged_metrics(&self, request: &Request) -> Response {
        self.counters.scrapes.increment();
        let proxy = self.proxy_metrics(request.uri().query().unwrap_or_default());
        let application = async {
            match &self.scrape {
                Some(scrape) => Some(scrape.fetch(request.headers()).await),
                None => None,
            }
        };
        let (proxy, application) = tokio::join!(proxy, application);
        let mut body = self.metrics.render().into_bytes();
        body.extend_from_slice(proxy.unwrap_or_default().as_bytes());
        let mut media_type = "text/plain; version=0.0.4; charset=utf-8".to_owned();
        if let Some((metrics, kind, failed)) = application {
            self.counters.application_errors.add(failed);
            body.extend_from_slice(&metrics);
            media_type = kind;
        }
        let mut response = with_type(200, "text/plain", body);
        if let Ok(value) = http::HeaderValue::try_from(media_type) {
            response.headers_mut().insert(http::header::CONTENT_TYPE, value);
        }
        response
    }

    async fn status_page(&self, request: Request, peer_is_local: bool) -> Response {
        let path = request.uri().path().to_owned();
        match path.as_str() {
            "/healthz/ready" => self.ready().await,
            "/metrics" | "/stats/prometheus" if self.local_metrics && !peer_is_local => only_local(),
            "/metrics" | "/stats/prometheus" => self.merged_metrics(&request).await,
            "/quitquitquit" | "/drain" | "/debug/ndsz" if !peer_is_local => only_local(),
            _ if path.starts_with("/debug/pprof/") && !peer_is_local => only_local(),
            _ if path.starts_with("/debug/pprof/") => text(
                404,
                "there is no Go runtime to profile: `perf record -p PID` sees this process, /stats/prometheus counts its work\n",
            ),
            "/quitquitquit" | "/drain" if request.method() != Method::POST => text(405, "Method Not Allowed\n"),
            "/quitquitquit" => {
                info!("asked to quit");
                self.controls.quit.notify_one();
                text(200, "OK")
            }
            "/drain" => {
                info!("asked to drain");
                self.controls.drain.notify_one();
                text(200, "OK")
            }
            "/debug/ndsz" => match self.names.load_full() {
                Some(table) => json(200, &table.to_json()),
                None => json(404, &serde_json::json!({})),
            },
            _ => match self.probers.handle(&path, request.headers(), self.status_port).await {
                Some(response) => response,
                None => text(404, "404 page not found\n"),
            },
        }
    }
}

fn only_local() -> Response {
    text(403, "Only requests from localhost are allowed\n")
}

/// Which pages a port serves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Port {
    /// 15020.
    Status,
    /// 15021: readiness only; open to the whole network.
    Health,
    /// 15090: the proxy's own metrics.
    Prometheus,
    /// ENVOY_SECURE_MERGED_METRICS_PORT: the merged metrics of 15020, nothing else of it.
    Merged,
}

struct Pages {
    status: Arc<Status>,
    port: Port,
    peer_is_local: bool,
}

impl Handler for Pages {
    fn handle(&self, request: Request) -> Later<'_, Response> {
        Box::pin(async move {
            match self.port {
                Port::Status => self.status.status_page(request, self.peer_is_local).await,
                Port::Health if request.uri().path() == "/healthz/ready" => self.status.ready().await,
                Port::Merged if matches!(request.uri().path(), "/metrics" | "/stats/prometheus") => {
                    self.status.merged_metrics(&request).await
                }
                Port::Prometheus if self.status.local_metrics && !self.peer_is_local => only_local(),
                Port::Prometheus if request.uri().path() == "/stats/prometheus" => {
                    let metrics = self.status.proxy_metrics(request.uri().query().unwrap_or_default()).await;
                    with_type(200, "text/plain; version=0.0.4; charset=utf-8", metrics.unwrap_or_default())
                }
                _ => text(404, ""),
            }
        })
    }
}

/// Serves `port` on `listener` until the drain starts.
pub(crate) async fn serve(listener: TcpListener, status: Arc<Status>, port: Port, drain: lifecycle::drain::Watch) {
    let pages = move |peer: SocketAddr| status.pages(port, is_local(peer.ip()));
    lifecycle::http::serve_by_peer(listener, pages, drain).await;
}

fn is_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip == Ipv6Addr::LOCALHOST || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback()),
    }
}

/// Listens on all addresses of both families, or of IPv4 where there is no IPv6.
pub(crate) fn bind(port: u16) -> std::io::Result<TcpListener> {
    let listener = bind_to(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
        .or_else(|_| bind_to(SocketAddr::from(([0, 0, 0, 0], port))));
    listener.map_err(|e| std::io::Error::new(e.kind(), format!("port {port} cannot be listened on: {e}")))
}

fn bind_to(address: SocketAddr) -> std::io::Result<TcpListener> {
    // tokio's bind sets SO_REUSEADDR, so that a restarted agent gets its port back.
    let socket = if address.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(128)
}
