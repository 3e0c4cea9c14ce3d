//! The serving end: a [`Source`] of encoded resources behind the aggregated discovery service.

mod session;
mod wire;

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use envoy_api::Resource;
use envoy_api::pb::envoy::config::core::v3::Node;
use http_body::Frame;
use http_body_util::StreamBody;
use mesh_types::{ArcStr, SpiffeId};
use prost::Message as _;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tonic::body::Body;
use tonic::codec::Codec;
use tonic::server::NamedService;
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

pub use self::session::{BadRequest, Heard, Picked, Response, Session};
use self::wire::{Chunks, Delta, Sotw, Wire};
use crate::{MAX_REQUEST, Protocol};

/// Bytes of a client's description of itself, which is kept as long as its stream; real ones have some kilobytes.
const MAX_NODE: usize = 1 << 20;
/// How long listeners and routes wait for a client to acknowledge clusters; real proxies take milliseconds.
const PATIENCE: Duration = Duration::from_millis(500);

/// Which resources of a type are wanted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Names<'a> {
    /// All that the proxy may see.
    Wildcard,
    /// These and no others; a name that does not exist is left out. Sorted.
    List(&'a [ArcStr]),
}

/// Where resources come from: the control plane.
pub trait Source: Send + Sync + 'static {
    /// What the source remembers of one connected client. It lives as long as the stream.
    type Proxy: Send + Sync + 'static;

    /// A client opened a stream; an error refuses it.
    fn connect(&self, node: &Node, peer: &Peer) -> Result<Self::Proxy, Status>;

    /// The resources of the latest snapshot. Called for each watched type at each revision, so cheap when nothing changed:
    /// then the same list as before, ideally, which needs no comparison.
    fn resources(&self, proxy: &Self::Proxy, type_url: &str, names: Names<'_>) -> Arc<[Resource]>;

    /// The revision of the snapshot that [`Source::resources`] reads. When it changes, all streams look again.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Called before [`Source::resources`] with the same words, for what takes time to find out.
    fn prepare(&self, proxy: &Self::Proxy, type_url: &str, names: Names<'_>) -> impl Future<Output = ()> + Send {
        let _ = (proxy, type_url, names);
        std::future::ready(())
    }

    /// Ends when the stream is to, with the reason. Dropped and asked for anew at will.
    fn ended(&self, proxy: &Self::Proxy) -> impl Future<Output = Status> + Send {
        let _ = proxy;
        std::future::pending()
    }

    /// Hears what happens on a stream. Called on the stream's task: do not block.
    fn report(&self, proxy: &Self::Proxy, event: &Event);
}

/// Who is at the other end. The listener that accepted the connection puts one into the request's extensions;
/// without, the peer is unknown.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// The address the connection came from.
    pub address: Option<SocketAddr>,
    /// The identity proved by the client certificate.
    pub identity: Option<SpiffeId>,
    /// The token of an `authorization: Bearer` header. Filled in by [`service`].
    pub token: Option<BearerToken>,
}

/// A token that does not show itself in logs.
#[derive(Clone)]
pub struct BearerToken(String);

impl BearerToken {
    /// The token itself, for verification.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken(…)")
    }
}

/// Something that happened on a stream.
#[derive(Clone, Debug)]
pub struct Event {
    /// Tells the streams of this process apart.
    pub stream: u64,
    /// The client's node id, such as `sidecar~10.0.0.1~reviews-1.default~default.svc.cluster.local`.
    pub node_id: ArcStr,
    /// What it was.
    pub kind: EventKind,
}

/// What happened on a stream.
#[derive(Clone, Debug)]
pub enum EventKind {
    /// The stream is open.
    Connected { protocol: Protocol, peer: Peer, watching: Watching },
    /// The stream ended, whoever ended it.
    Disconnected,
    /// A response was handed to the stream; `took` is what the source and the comparison needed for it.
    Sent {
        type_url: ArcStr,
        nonce: String,
        revision: u64,
        resources: usize,
        removed: usize,
        bytes: usize,
        took: Duration,
    },
    /// The client accepted a response.
    Acked { type_url: ArcStr, nonce: String },
    /// The connection has taken all of a response, `took` after it was made.
    Delivered { took: Duration },
    /// A request larger than all before it on the stream.
    Larger { bytes: usize },
    /// The client refused a response; it keeps what it had. `code` is a `google.rpc.Code`.
    Nacked { type_url: ArcStr, nonce: String, code: i32, error: String },
    /// The client spoke of a response that a later one had replaced.
    Stale { type_url: ArcStr },
    /// The client has applied all of this snapshot that concerns it.
    Synced { revision: u64 },
    /// The client says that the workload beside it is well, or what is wrong (a `google.rpc.Code` and a text).
    Health { problem: Option<(i32, String)> },
}

/// What a stream's client watches, for whoever looks at it.
#[derive(Clone, Debug)]
pub struct Watching(Arc<Mutex<Session>>);

impl Watching {
    /// As [`Session::watched`], of this moment; nothing while the stream is being served.
    pub fn now(&self) -> Option<Vec<(ArcStr, Vec<ArcStr>)>> {
        Some(self.0.try_lock().ok()?.watched())
    }
}

/// The aggregated discovery service over `source`, to be added to a tonic router.
pub fn service<S: Source>(source: Arc<S>) -> Service<S> {
    Service(Server { source, streams: Arc::default() })
}

/// The secret discovery service over `source`: the same sessions under SDS' own name, as Envoy asks an agent on this machine.
pub fn secret_service<S: Source>(source: Arc<S>) -> SecretService<S> {
    SecretService(Server { source, streams: Arc::default() })
}

/// Opens streams; shared by all connections of a port.
#[derive(Debug)]
struct Server<S> {
    source: Arc<S>,
    streams: Arc<AtomicU64>,
}

impl<S> Clone for Server<S> {
    fn clone(&self) -> Self {
        Server { source: self.source.clone(), streams: self.streams.clone() }
    }
}

impl<S: Source> Server<S> {
    async fn open<W: Wire>(&self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let mut peer = request.extensions().get::<Peer>().cloned().unwrap_or_default();
        peer.address = peer.address.or_else(|| {
            request.extensions().get::<tonic::transport::server::TcpConnectInfo>().and_then(|info| info.remote_addr())
        });
        if let Some(header) = request.headers().get(http::header::AUTHORIZATION).and_then(|value| value.to_str().ok()) {
            peer.token = header.strip_prefix("Bearer ").map(|token| BearerToken(token.to_owned()));
        }
        let decoder = ProstCodec::<W::Request, W::Request>::default().decoder();
        let mut requests = Streaming::new_request(decoder, request.into_body(), None, Some(MAX_REQUEST));
        // The node comes with the first message only, so nothing can be said before it.
        let first =
            requests.message().await?.ok_or_else(|| Status::invalid_argument("the stream ended without a request"))?;
        let node =
            W::node(&first).ok_or_else(|| Status::invalid_argument("the first request of a stream names no node"))?;
        if node.encoded_len() > MAX_NODE {
            return Err(Status::resource_exhausted(format!("a node of more than {MAX_NODE} bytes")));
        }
        let proxy = self.source.connect(node, &peer)?;
        let changes = self.source.changes();
        let revision = *changes.borrow();
        let mut driver = Driver::<S, W> {
            session: Arc::new(Mutex::new(Session::new(W::PROTOCOL, revision))),
            requests,
            changes,
            source: self.source.clone(),
            proxy,
            waiting_since: None,
            number: self.streams.fetch_add(1, Ordering::Relaxed),
            node_id: ArcStr::from(node.id.as_str()),
            largest: 0,
        };
        let watching = Watching(driver.session.clone());
        driver.report(EventKind::Connected { protocol: W::PROTOCOL, peer, watching });
        driver.hear(first).await?;
        let mut response = http::Response::new(body(driver));
        let content_type = http::HeaderValue::from_static("application/grpc");
        response.headers_mut().insert(http::header::CONTENT_TYPE, content_type);
        Ok(response)
    }
}

/// The stream's responses. It is driven by whoever reads it: when the client reads slowly, snapshots pass by and are
/// skipped, and of a response no more is encoded than the connection takes.
fn body<S: Source, W: Wire>(driver: Driver<S, W>) -> Body {
    let frames = futures::stream::unfold(Some((driver, None::<(Chunks, Instant)>)), |state| async move {
        let (mut driver, mut chunks) = state?;
        loop {
            if let Some((pieces, since)) = chunks.as_mut() {
                if let Some(chunk) = pieces.next() {
                    return Some((Ok::<_, Status>(Frame::data(chunk)), Some((driver, chunks))));
                }
                driver.report(EventKind::Delivered { took: since.elapsed() });
            }
            let ended = match driver.next().await {
                Ok(Some(response)) => match W::chunks(response) {
                    Ok(encoded) => {
                        chunks = Some((encoded, Instant::now()));
                        continue;
                    }
                    Err(status) => status,
                },
                Ok(None) => Status::ok(""),
                Err(status) => status,
            };
            let mut trailers = http::HeaderMap::new();
            // A message that no header can carry is left out.
            if brief(ended).add_header(&mut trailers).is_err() {
                trailers.insert("grpc-status", http::HeaderValue::from_static("13"));
            }
            return Some((Ok(Frame::trailers(trailers)), None));
        }
    });
    Body::new(StreamBody::new(frames))
}

/// Reasons often quote what the client sent; what is longer than this fits into no header.
fn brief(status: Status) -> Status {
    const MOST: usize = 1024;
    if status.message().len() <= MOST {
        return status;
    }
    let message: String = status.message().chars().take(MOST).chain(['…']).collect();
    Status::new(status.code(), message)
}

macro_rules! grpc_service {
    ($(#[$doc:meta])* $name:ident, $grpc:literal, $sotw:literal, $delta:literal) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name<S>(Server<S>);

        impl<S> Clone for $name<S> {
            fn clone(&self) -> Self {
                $name(self.0.clone())
            }
        }

        impl<S> NamedService for $name<S> {
            const NAME: &'static str = $grpc;
        }

        impl<S: Source> tonic::codegen::Service<http::Request<Body>> for $name<S> {
            type Response = http::Response<Body>;
            type Error = Infallible;
            type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: http::Request<Body>) -> Self::Future {
                let server = self.0.clone();
                Box::pin(async move {
                    let opened = match request.uri().path() {
                        concat!("/", $grpc, "/", $sotw) => server.open::<Sotw>(request).await,
                        concat!("/", $grpc, "/", $delta) => server.open::<Delta>(request).await,
                        _ => Err(Status::unimplemented("resources are streamed")),
                    };
                    Ok(opened.unwrap_or_else(|status| brief(status).into_http()))
                })
            }
        }
    };
}

grpc_service!(
    /// The gRPC service of [`service`].
    Service,
    "envoy.service.discovery.v3.AggregatedDiscoveryService",
    "StreamAggregatedResources",
    "DeltaAggregatedResources"
);
grpc_service!(
    /// The gRPC service of [`secret_service`].
    SecretService,
    "envoy.service.secret.v3.SecretDiscoveryService",
    "StreamSecrets",
    "DeltaSecrets"
);

/// One open stream. Dropping it, at whatever point, reports the disconnection.
struct Driver<S: Source, W: Wire> {
    /// Locked while the driver works, by others for a look only.
    session: Arc<Mutex<Session>>,
    requests: Streaming<W::Request>,
    changes: watch::Receiver<u64>,
    source: Arc<S>,
    proxy: S::Proxy,
    /// Since when listeners and routes wait for the clusters' acknowledgement.
    waiting_since: Option<Instant>,
    number: u64,
    node_id: ArcStr,
    /// Bytes of the largest request.
    largest: usize,
}

impl<S: Source, W: Wire> Driver<S, W> {
    /// Waits until there is something to send; `None` when the client has hung up or the source is gone.
    async fn next(&mut self) -> Result<Option<Response>, Status> {
        let shared = self.session.clone();
        loop {
            let mut session = shared.lock().await;
            while let Some((type_url, names)) = session.due() {
                self.source.prepare(&self.proxy, &type_url, names).await;
                let started = Instant::now();
                let resources = self.source.resources(&self.proxy, &type_url, names);
                if let Some(response) = session.evaluate(&type_url, resources) {
                    self.report(EventKind::Sent {
                        type_url: response.type_url.clone(),
                        nonce: response.nonce.clone(),
                        revision: response.revision,
                        resources: response.resources.len(),
                        removed: response.removed.len(),
                        bytes: response.resources.iter().map(|r| r.body.len()).sum(),
                        took: started.elapsed(),
                    });
                    return Ok(Some(response));
                }
            }
            let (is_waiting, synced) = (session.is_waiting(), session.newly_synced());
            drop(session);
            self.waiting_since = is_waiting.then(|| self.waiting_since.unwrap_or_else(Instant::now));
            let waiting_since = self.waiting_since;
            if let Some(revision) = synced {
                self.report(EventKind::Synced { revision });
            }
            tokio::select! {
                request = self.requests.message() => match request? {
                    Some(request) => self.hear(request).await?,
                    None => return Ok(None),
                },
                changed = self.changes.changed() => {
                    if changed.is_err() {
                        return Ok(None);
                    }
                    let revision = *self.changes.borrow_and_update();
                    shared.lock().await.on_revision(revision);
                }
                reason = self.source.ended(&self.proxy) => return Err(reason),
                () = tokio::time::sleep_until(waiting_since.unwrap_or_else(Instant::now) + PATIENCE), if waiting_since.is_some() => {
                    shared.lock().await.lift_gate();
                }
            }
        }
    }

    async fn hear(&mut self, request: W::Request) -> Result<(), Status> {
        let bytes = request.encoded_len();
        if bytes > self.largest {
            self.largest = bytes;
            self.report(EventKind::Larger { bytes });
        }
        let request = W::decode(request);
        let code = request.code;
        if request.type_url == envoy_api::type_url::HEALTH {
            // No subscription: nothing is ever sent of this type.
            self.report(EventKind::Health { problem: request.error.map(|message| (request.code, message)) });
            return Ok(());
        }
        let type_url = ArcStr::from(request.type_url.as_str());
        let heard = self.session.lock().await.on_request(request);
        match heard {
            Ok(Heard::Acked { nonce }) => self.report(EventKind::Acked { type_url, nonce }),
            Ok(Heard::Nacked { nonce, error }) => self.report(EventKind::Nacked { type_url, nonce, code, error }),
            Ok(Heard::Stale) => self.report(EventKind::Stale { type_url }),
            Ok(Heard::Subscribed) => {}
            Err(bad) => return Err(Status::invalid_argument(bad.to_string())),
        }
        Ok(())
    }

    fn report(&self, kind: EventKind) {
        self.source.report(&self.proxy, &Event { stream: self.number, node_id: self.node_id.clone(), kind });
    }
}

impl<S: Source, W: Wire> Drop for Driver<S, W> {
    fn drop(&mut self) {
        self.report(EventKind::Disconnected);
    }
}
