//! Port 15014: readiness, version, metrics, debug pages.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use ca::Authority;
use lifecycle::drain::Watch;
use lifecycle::http::{Handler, Request, Response, text, with_type};
use tokio::net::TcpListener;

use crate::debug;
use crate::identity::{Identities, bearer};
use crate::injection::Injector;
use crate::metrics::Metrics;
use crate::push_status::PushStatus;
use crate::status::Statuses;
use crate::world::World;

/// What the pages are made from.
#[derive(Clone)]
pub(crate) struct Monitoring {
    pub(crate) world: World,
    pub(crate) statuses: Arc<Statuses>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) identities: Identities,
    pub(crate) injector: Option<Injector>,
    pub(crate) authority: Arc<Authority>,
}

impl Monitoring {
    /// Serves until the shutdown starts.
    pub(crate) async fn serve(self, listener: TcpListener, shutdown: Watch) {
        let handler = move |peer: SocketAddr| -> Arc<dyn Handler> {
            // An IPv4 peer of a dual-stack listener looks like ::ffff:127.0.0.1.
            let local = peer.ip().to_canonical().is_loopback();
            Arc::new(Pages { monitoring: self.clone(), local })
        };
        lifecycle::http::serve_by_peer(listener, handler, shutdown).await;
    }
}

struct Pages {
    monitoring: Monitoring,
    /// Debug pages show the whole mesh, so, as istiod, they are for this machine and for those who show a token of the root
    /// namespace; others see what concerns their own.
    local: bool,
}

impl Handler for Pages {
    fn handle(&self, request: Request) -> Pin<Box<dyn Future<Output = Response> + Send + '_>> {
        Box::pin(async move { self.page(&request).await })
    }
}

impl Pages {
    async fn page(&self, request: &Request) -> Response {
        let Monitoring { world, statuses, metrics, identities, injector, authority } = &self.monitoring;
        let path = request.uri().path();
        match path {
            "/ready" | "/healthz" | "/healthz/ready" => match *world.revisions().borrow() {
                0 => text(503, "the configuration is not loaded yet\n"),
                _ => text(200, ""),
            },
            // As istiod, which `istioctl version` takes apart: version, revision of the source, state of the source.
            "/version" => text(200, concat!(env!("CARGO_PKG_VERSION"), "-unknown-Clean")),
            "/metrics" => {
                let state = world.current();
                metrics.amiss(&PushStatus::of(&state, &statuses.nodes()));
                metrics.lookups_failed(&state.push.memo().failures());
                metrics.looked_at(authority.expiry());
                with_type(200, "text/plain; version=0.0.4; charset=utf-8", metrics.render())
            }
            _ if path == "/debug" || path.starts_with("/debug/") => {
                let state = world.current();
                let namespace = match (self.local, bearer(request.headers())) {
                    (true, _) => None,
                    (false, None) => return refused(),
                    (false, token) => match identities.verify(None, token).await {
                        Ok(identity) => Some(identity.namespace().to_owned()),
                        Err(_) => return refused(),
                    },
                };
                let namespace = namespace.as_deref().filter(|own| *own != &*state.push.root_namespace);
                let injector = injector.as_ref().map(Injector::current);
                let about = debug::About { statuses, injector, namespace };
                debug::page(path, request.uri().query().unwrap_or(""), &state, &about)
            }
            _ => text(404, "there are /ready, /version, /metrics and /debug\n"),
        }
    }
}

fn refused() -> Response {
    text(401, "debug pages are for this machine, or for a valid service account token\n")
}
