//! The serving end: a [`Source`] of encoded resources behind the aggregated discovery service.

mod session;

use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use envoy_api::Resource;
use envoy_api::pb::envoy::config::core::v3::{ControlPlane, Node};
use envoy_api::pb::envoy::service::discovery::v3 as discovery;
use envoy_api::pb::envoy::service::secret::v3 as secret;
use envoy_api::pb::google::protobuf::Any;
use futures::Stream;
use mesh_types::{ArcStr, SpiffeId};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Request, Status, Streaming};

pub use self::session::{BadRequest, Heard, Response, Session};
use crate::{MAX_REQUEST, Protocol};

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

    /// The resources of the latest snapshot. Called for each watched type at each revision, so cheap when nothing changed.
    fn resources(&self, proxy: &Self::Proxy, type_url: &str, names: Names<'_>) -> Vec<Arc<Resource>>;

    /// The revision of the snapshot that [`Source::resources`] reads. When it changes, all streams look again.
    fn changes(&self) -> watch::Receiver<u64>;

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
    Connected { protocol: Protocol, peer: Peer },
    /// The stream ended, whoever ended it.
    Disconnected,
    /// A response was handed to the stream.
    Sent { type_url: ArcStr, nonce: String, revision: u64, resources: usize, removed: usize, bytes: usize },
    /// The client accepted a response.
    Acked { type_url: ArcStr, nonce: String },
    /// The client refused a response; it keeps what it had.
    Nacked { type_url: ArcStr, nonce: String, error: String },
    /// The client has applied all of this snapshot that concerns it.
    Synced { revision: u64 },
}

/// The gRPC service.
pub type Service<S> = discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer<Server<S>>;

/// The aggregated discovery service over `source`, to be added to a tonic router.
pub fn service<S: Source>(source: Arc<S>) -> Service<S> {
    let server = Server { source, streams: Arc::default() };
    Service::new(server).max_decoding_message_size(MAX_REQUEST).max_encoding_message_size(usize::MAX)
}

/// The secret discovery service over `source`: the same sessions under SDS' own name, as Envoy asks an agent on this machine.
pub fn secret_service<S: Source>(source: Arc<S>) -> SecretService<S> {
    let server = Server { source, streams: Arc::default() };
    SecretService::new(server).max_decoding_message_size(MAX_REQUEST).max_encoding_message_size(usize::MAX)
}

/// The gRPC service of [`secret_service`].
pub type SecretService<S> = secret::secret_discovery_service_server::SecretDiscoveryServiceServer<Server<S>>;

/// Implements the generated traits; made by [`service`] and [`secret_service`].
#[derive(Debug)]
pub struct Server<S> {
    source: Arc<S>,
    streams: Arc<AtomicU64>,
}

impl<S: Source> Server<S> {
    async fn open<W: Wire>(
        &self,
        request: Request<Streaming<W::Request>>,
    ) -> Result<tonic::Response<ResponseStream<W::Response>>, Status> {
        let mut peer = request.extensions().get::<Peer>().cloned().unwrap_or_default();
        peer.address = peer.address.or_else(|| request.remote_addr());
        if let Some(header) = request.metadata().get("authorization").and_then(|value| value.to_str().ok()) {
            peer.token = header.strip_prefix("Bearer ").map(|token| BearerToken(token.to_owned()));
        }
        let mut requests = request.into_inner();
        // The node comes with the first message only, so nothing can be said before it.
        let first =
            requests.message().await?.ok_or_else(|| Status::invalid_argument("the stream ended without a request"))?;
        let node =
            W::node(&first).ok_or_else(|| Status::invalid_argument("the first request of a stream names no node"))?;
        let proxy = self.source.connect(node, &peer)?;
        let changes = self.source.changes();
        let revision = *changes.borrow();
        let mut stream = Driver::<S, W> {
            session: Session::new(W::PROTOCOL, revision),
            requests,
            changes,
            source: self.source.clone(),
            proxy,
            waiting_since: None,
            number: self.streams.fetch_add(1, Ordering::Relaxed),
            node_id: ArcStr::from(node.id.as_str()),
        };
        stream.report(EventKind::Connected { protocol: W::PROTOCOL, peer });
        stream.hear(first)?;
        // The stream is driven by whoever reads it: when the client reads slowly, snapshots pass by and are skipped.
        let responses = futures::stream::unfold(Some(stream), |state| async move {
            let mut stream = state?;
            match stream.next().await {
                Ok(Some(response)) => Some((Ok(response), Some(stream))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(tonic::Response::new(Box::pin(responses)))
    }
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// One open stream. Dropping it, at whatever point, reports the disconnection.
struct Driver<S: Source, W: Wire> {
    session: Session,
    requests: Streaming<W::Request>,
    changes: watch::Receiver<u64>,
    source: Arc<S>,
    proxy: S::Proxy,
    /// Since when listeners and routes wait for the clusters' acknowledgement.
    waiting_since: Option<Instant>,
    number: u64,
    node_id: ArcStr,
}

impl<S: Source, W: Wire> Driver<S, W> {
    /// Waits until there is something to send; `None` when the client has hung up or the source is gone.
    async fn next(&mut self) -> Result<Option<W::Response>, Status> {
        loop {
            while let Some((type_url, names)) = self.session.due() {
                let resources = self.source.resources(&self.proxy, &type_url, names);
                if let Some(response) = self.session.evaluate(&type_url, resources) {
                    self.report(EventKind::Sent {
                        type_url: response.type_url.clone(),
                        nonce: response.nonce.clone(),
                        revision: response.revision,
                        resources: response.resources.len(),
                        removed: response.removed.len(),
                        bytes: response.resources.iter().map(|r| r.body.len()).sum(),
                    });
                    return Ok(Some(W::encode(response)));
                }
            }
            if !self.session.is_waiting() {
                self.waiting_since = None;
            }
            let waiting_since = self.session.is_waiting().then(|| *self.waiting_since.get_or_insert_with(Instant::now));
            if let Some(revision) = self.session.newly_synced() {
                self.report(EventKind::Synced { revision });
            }
            tokio::select! {
                request = self.requests.message() => match request? {
                    Some(request) => self.hear(request)?,
                    None => return Ok(None),
                },
                changed = self.changes.changed() => {
                    if changed.is_err() {
                        return Ok(None);
                    }
                    let revision = *self.changes.borrow_and_update();
                    self.session.on_revision(revision);
                }
                () = tokio::time::sleep_until(waiting_since.unwrap_or_else(Instant::now) + PATIENCE), if waiting_since.is_some() => {
                    self.session.lift_gate();
                }
            }
        }
    }

    fn hear(&mut self, request: W::Request) -> Result<(), Status> {
        let request = W::decode(request);
        let type_url = ArcStr::from(request.type_url.as_str());
        match self.session.on_request(request) {
            Ok(Heard::Acked { nonce }) => self.report(EventKind::Acked { type_url, nonce }),
            Ok(Heard::Nacked { nonce, error }) => self.report(EventKind::Nacked { type_url, nonce, error }),
            Ok(Heard::Subscribed | Heard::Stale) => {}
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

#[tonic::async_trait]
impl<S: Source> discovery::aggregated_discovery_service_server::AggregatedDiscoveryService for Server<S> {
    type StreamAggregatedResourcesStream = ResponseStream<discovery::DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = ResponseStream<discovery::DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<discovery::DiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::StreamAggregatedResourcesStream>, Status> {
        self.open::<Sotw>(request).await
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<discovery::DeltaDiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::DeltaAggregatedResourcesStream>, Status> {
        self.open::<Delta>(request).await
    }
}

#[tonic::async_trait]
impl<S: Source> secret::secret_discovery_service_server::SecretDiscoveryService for Server<S> {
    type StreamSecretsStream = ResponseStream<discovery::DiscoveryResponse>;
    type DeltaSecretsStream = ResponseStream<discovery::DeltaDiscoveryResponse>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<discovery::DiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::StreamSecretsStream>, Status> {
        self.open::<Sotw>(request).await
    }

    async fn delta_secrets(
        &self,
        request: Request<Streaming<discovery::DeltaDiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::DeltaSecretsStream>, Status> {
        self.open::<Delta>(request).await
    }

    async fn fetch_secrets(
        &self,
        _request: Request<discovery::DiscoveryRequest>,
    ) -> Result<tonic::Response<discovery::DiscoveryResponse>, Status> {
        Err(Status::unimplemented("secrets are streamed"))
    }
}

/// The messages of one flavour of the protocol.
trait Wire: Send + Sync + 'static {
    const PROTOCOL: Protocol;
    type Request: Send;
    type Response: Send;
    fn node(request: &Self::Request) -> Option<&Node>;
    fn decode(request: Self::Request) -> session::Request;
    fn encode(response: Response) -> Self::Response;
}

struct Sotw;
struct Delta;

impl Wire for Sotw {
    const PROTOCOL: Protocol = Protocol::StateOfTheWorld;
    type Request = discovery::DiscoveryRequest;
    type Response = discovery::DiscoveryResponse;

    fn node(request: &Self::Request) -> Option<&Node> {
        request.node.as_ref()
    }

    fn decode(request: Self::Request) -> session::Request {
        session::Request {
            type_url: request.type_url,
            names: request.resource_names,
            nonce: request.response_nonce,
            error: request.error_detail.map(|status| status.message),
            ..Default::default()
        }
    }

    fn encode(response: Response) -> Self::Response {
        let resources = response.resources.iter().map(|r| any(&response.type_url, r)).collect();
        discovery::DiscoveryResponse {
            version_info: response.revision.to_string(),
            resources,
            type_url: response.type_url.to_string(),
            nonce: response.nonce,
            control_plane: Some(control_plane()),
            ..Default::default()
        }
    }
}

impl Wire for Delta {
    const PROTOCOL: Protocol = Protocol::Delta;
    type Request = discovery::DeltaDiscoveryRequest;
    type Response = discovery::DeltaDiscoveryResponse;

    fn node(request: &Self::Request) -> Option<&Node> {
        request.node.as_ref()
    }

    fn decode(request: Self::Request) -> session::Request {
        session::Request {
            type_url: request.type_url,
            names: request.resource_names_subscribe,
            unsubscribe: request.resource_names_unsubscribe,
            initial_versions: request.initial_resource_versions,
            nonce: request.response_nonce,
            error: request.error_detail.map(|status| status.message),
        }
    }

    fn encode(response: Response) -> Self::Response {
        let resource = |r: &Arc<Resource>| discovery::Resource {
            name: r.name.to_string(),
            version: r.version.to_string(),
            resource: Some(any(&response.type_url, r)),
            ..Default::default()
        };
        discovery::DeltaDiscoveryResponse {
            system_version_info: response.revision.to_string(),
            resources: response.resources.iter().map(resource).collect(),
            removed_resources: response.removed.iter().map(ToString::to_string).collect(),
            type_url: response.type_url.to_string(),
            nonce: response.nonce,
            control_plane: Some(control_plane()),
            ..Default::default()
        }
    }
}

fn any(type_url: &str, resource: &Resource) -> Any {
    Any { type_url: type_url.to_owned(), value: resource.body.to_vec() }
}

fn control_plane() -> ControlPlane {
    ControlPlane { identifier: format!("outrigger-{}", env!("CARGO_PKG_VERSION")) }
}
