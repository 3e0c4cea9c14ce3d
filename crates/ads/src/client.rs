//! The receiving end: one stream to the control plane, kept up, that feeds a [`Handler`].

mod rpc;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use envoy_api::pb::envoy::config::core::v3::Node;
use envoy_api::pb::envoy::service::discovery::v3 as discovery;
use envoy_api::{Message, type_url};
use mesh_types::ArcStr;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Status;
use tonic::transport::Channel;
use tracing::{debug, info, warn};

pub use self::rpc::Rpc;
use self::session::{Request, Session};
use crate::{MAX_RESPONSE, Protocol};

/// A resource that is new or changed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Update {
    /// The resource's name; empty for types that have none (the name table).
    pub name: ArcStr,
    /// The version the server gave it.
    pub version: ArcStr,
    /// The encoded message, without its `Any`.
    pub body: Bytes,
}

/// Receives what the control plane sends. Called on the client's task, one call at a time.
pub trait Handler: Send {
    /// Applies a response. What can be applied must be, even if some of it is refused; a resource that is refused keeps
    /// its former state.
    fn update(&mut self, type_url: &str, updated: Vec<Update>, removed: Vec<ArcStr>) -> Result<(), Rejected>;

    /// A response comes, whose contents are handed over next; `version`: of it as a whole, empty if the server gave it none.
    fn begin(&mut self, type_url: &str, version: &str) {
        let _ = (type_url, version);
    }

    /// A response of that type was refused before anything of it could be handed over.
    fn refused(&mut self, type_url: &str) {
        let _ = type_url;
    }

    /// The stream came up or went down; for readiness and logs.
    fn status(&mut self, status: &ConnectionStatus) {
        let _ = status;
    }
}

impl Handler for Box<dyn Handler> {
    fn update(&mut self, type_url: &str, updated: Vec<Update>, removed: Vec<ArcStr>) -> Result<(), Rejected> {
        (**self).update(type_url, updated, removed)
    }

    fn begin(&mut self, type_url: &str, version: &str) {
        (**self).begin(type_url, version);
    }

    fn refused(&mut self, type_url: &str) {
        (**self).refused(type_url);
    }

    fn status(&mut self, status: &ConnectionStatus) {
        (**self).status(status);
    }
}

/// The state of the stream.
#[derive(Clone, Debug)]
pub enum ConnectionStatus {
    /// The stream is open.
    Connected,
    /// It is not; the client tries again after `retry`.
    Disconnected { reason: String, retry: Duration },
}

/// The resources of a response that the handler refused, each with the reason.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Rejected(pub Vec<(ArcStr, String)>);

impl Rejected {
    /// `Ok` if nothing was refused.
    pub fn into_result(self) -> Result<(), Rejected> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }

    fn names(&self, name: &str) -> bool {
        self.0.iter().any(|(refused, _)| &**refused == name)
    }
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, reason)) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{name}: {reason}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Rejected {}

/// What is wanted of one type.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Wanted {
    wildcard: bool,
    names: BTreeSet<ArcStr>,
}

impl Wanted {
    /// Everything.
    pub fn all() -> Wanted {
        Wanted { wildcard: true, names: BTreeSet::new() }
    }

    /// Exactly these.
    pub fn names(names: impl IntoIterator<Item = ArcStr>) -> Wanted {
        Wanted { wildcard: false, names: names.into_iter().collect() }
    }

    /// Nothing (any more).
    pub fn nothing() -> Wanted {
        Wanted::default()
    }

    fn is_nothing(&self) -> bool {
        !self.wildcard && self.names.is_empty()
    }

    fn covers(&self, name: &ArcStr) -> bool {
        self.wildcard || self.names.contains(name)
    }

    fn list(&self) -> Vec<String> {
        self.names.iter().map(ToString::to_string).collect()
    }

    fn without(&self, other: &Wanted) -> Vec<String> {
        self.names.difference(&other.names).map(ToString::to_string).collect()
    }
}

/// What is wanted of all types; shared with whoever decides it. Cheap to clone.
///
/// A change is sent as soon as the client gets to it; several changes in between go as one.
#[derive(Clone, Debug, Default)]
pub struct Subscriptions(Arc<SubscriptionsInner>);

#[derive(Debug, Default)]
struct SubscriptionsInner {
    /// Held only to read or replace an entry.
    wanted: Mutex<BTreeMap<ArcStr, Wanted>>,
    /// Likewise.
    said: Mutex<BTreeMap<ArcStr, Option<Problem>>>,
    changed: Notify,
}

/// What is wrong with the workload beside this client.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    /// A `google.rpc.Code`.
    pub code: i32,
    /// For people.
    pub message: String,
}

impl Subscriptions {
    /// No subscriptions.
    pub fn new() -> Subscriptions {
        Subscriptions::default()
    }

    /// Replaces what is wanted of a type.
    pub fn set(&self, type_url: &str, wanted: Wanted) {
        let mut all = self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(type_url) != Some(&wanted) {
            all.insert(ArcStr::from(type_url), wanted);
            self.0.changed.notify_one();
        }
    }

    /// Says something of this client itself, such as its health: a request that no response answers. The last word of each
    /// type is said again on every new stream.
    pub fn say(&self, type_url: &str, problem: Option<Problem>) {
        let mut all = self.0.said.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(type_url) != Some(&problem) {
            all.insert(ArcStr::from(type_url), problem);
            self.0.changed.notify_one();
        }
    }

    fn snapshot(&self) -> BTreeMap<ArcStr, Wanted> {
        self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn said(&self) -> BTreeMap<ArcStr, Option<Problem>> {
        self.0.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// An open connection to the control plane.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The channel to open the stream on.
    pub channel: Channel,
    /// An `authorization` header for the stream, such as `Bearer …`.
    pub authorization: Option<String>,
    /// Further headers of the stream (`initial_metadata` of a gRPC service).
    pub metadata: Vec<(ArcStr, ArcStr)>,
}

/// Why a connector could not connect.
pub type ConnectError = Box<dyn std::error::Error + Send + Sync>;

/// Makes a connection; called for each attempt, so that new certificates and tokens are used.
pub type Connector =
    Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Connection, ConnectError>> + Send>> + Send + Sync>;

/// How to run a client.
#[derive(Clone, Debug)]
pub struct Config {
    /// Sent with the first request of each stream.
    pub node: Node,
    /// Which flavour to speak.
    pub protocol: Protocol,
    /// Which service is called.
    pub rpc: Rpc,
    /// The first pause after a failure; doubled up to `max_backoff`, with jitter.
    pub min_backoff: Duration,
    /// The longest pause.
    pub max_backoff: Duration,
}

impl Config {
    /// Delta, with pauses from 200 ms to 15 s.
    pub fn new(node: Node) -> Config {
        Config {
            node,
            protocol: Protocol::Delta,
            rpc: Rpc::AGGREGATED,
            min_backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(15),
        }
    }
}

/// The client: give it a connector and a handler and await [`Client::run`].
pub struct Client<H> {
    config: Config,
    subscriptions: Subscriptions,
    connector: Connector,
    handler: H,
    session: Session,
    /// Until when resources may be used that do not say so again.
    leases: BTreeMap<(ArcStr, ArcStr), Instant>,
}

impl<H: Handler> Client<H> {
    /// A client for what `subscriptions` says now and later.
    pub fn new(config: Config, subscriptions: Subscriptions, connector: Connector, handler: H) -> Client<H> {
        let session = Session::new(config.protocol, config.node.clone());
        Client { config, subscriptions, connector, handler, session, leases: BTreeMap::new() }
    }

    /// Keeps a stream up for ever. Drop the future to stop.
    pub async fn run(mut self) {
        let mut pause = self.config.min_backoff;
        loop {
            let opened = Instant::now();
            let reason = match self.stream().await {
                Ok(()) => "the server closed the stream".to_owned(),
                Err(error) => error.to_string(),
            };
            // A stream that lived for a while was healthy: servers end streams to spread load.
            if opened.elapsed() > self.config.max_backoff {
                pause = self.config.min_backoff;
            }
            let retry = jittered(pause);
            pause = (pause * 2).min(self.config.max_backoff);
            self.handler.status(&ConnectionStatus::Disconnected { reason: reason.clone(), retry });
            warn!(%reason, ?retry, "no stream to the control plane; keeping the last configuration");
            tokio::time::sleep(retry).await;
        }
    }

    async fn stream(&mut self) -> Result<(), StreamError> {
        let connection = (self.connector)().await.map_err(StreamError::Connect)?;
        self.session.on_connected();
        match self.config.protocol {
            Protocol::Delta => self.stream_delta(connection).await,
            Protocol::StateOfTheWorld => self.stream_sotw(connection).await,
        }
    }

    async fn stream_delta(&mut self, connection: Connection) -> Result<(), StreamError> {
        // Unbounded in type only: one acknowledgement per response read, and subscription changes are merged before they get here.
        let (send, requests) = mpsc::unbounded_channel();
        let outbox = |request| {
            if let Request::Delta(request) = request {
                let _ = send.send(request); // fails only when the stream is gone, which the next read reports
            }
        };
        self.announce(&outbox);
        let request = authorized(tonic::Request::new(UnboundedReceiverStream::new(requests)), &connection)?;
        let opening = open::<_, discovery::DeltaDiscoveryResponse>(connection.channel, self.path(), request);
        let mut responses = self.opened(opening, &outbox).await?;
        self.handler.status(&ConnectionStatus::Connected);
        info!(protocol = %Protocol::Delta, "stream to the control plane is open");
        let subscriptions = self.subscriptions.clone();
        loop {
            tokio::select! {
                response = responses.message() => match response.map_err(stream_error)? {
                    Some(response) => {
                        let received = self.session.on_delta(response);
                        self.deliver(received, &outbox);
                    }
                    None => return Ok(()),
                },
                () = subscriptions.0.changed.notified() => self.announce(&outbox),
                () = lease_over(&self.leases) => self.expire(),
            }
        }
    }

    async fn stream_sotw(&mut self, connection: Connection) -> Result<(), StreamError> {
        let (send, requests) = mpsc::unbounded_channel(); // as above
        let outbox = |request| {
            if let Request::Sotw(request) = request {
                let _ = send.send(request);
            }
        };
        self.announce(&outbox);
        let request = authorized(tonic::Request::new(UnboundedReceiverStream::new(requests)), &connection)?;
        let opening = open::<_, discovery::DiscoveryResponse>(connection.channel, self.path(), request);
        let mut responses = self.opened(opening, &outbox).await?;
        self.handler.status(&ConnectionStatus::Connected);
        info!(protocol = %Protocol::StateOfTheWorld, "stream to the control plane is open");
        let subscriptions = self.subscriptions.clone();
        loop {
            tokio::select! {
                response = responses.message() => match response.map_err(stream_error)? {
                    Some(response) => {
                        let received = self.session.on_sotw(response, resource_name);
                        self.deliver(received, &outbox);
                    }
                    None => return Ok(()),
                },
                () = subscriptions.0.changed.notified() => self.announce(&outbox),
                () = lease_over(&self.leases) => self.expire(),
            }
        }
    }

    /// Waits until the server says that the stream is open, which some do with their first response only.
    async fn opened<T>(
        &mut self,
        opening: impl Future<Output = Result<T, StreamError>>,
        outbox: &impl Fn(Request),
    ) -> Result<T, StreamError> {
        let mut opening = std::pin::pin!(opening);
        let subscriptions = self.subscriptions.clone();
        loop {
            tokio::select! {
                opened = &mut opening => return opened,
                () = subscriptions.0.changed.notified() => self.announce(outbox),
                () = lease_over(&self.leases) => self.expire(),
            }
        }
    }

    /// Has the handler forget resources whose time is over.
    fn expire(&mut self) {
        let now = Instant::now();
        let over: Vec<(ArcStr, ArcStr)> =
            self.leases.iter().filter(|(_, until)| **until <= now).map(|(key, _)| key.clone()).collect();
        for key in over {
            self.leases.remove(&key);
            let (type_url, name) = key;
            info!(%type_url, %name, "the time of a resource is over");
            self.session.on_expired(&type_url, &name);
            if let Err(rejected) = self.handler.update(&type_url, Vec::new(), vec![name]) {
                warn!(%type_url, %rejected, "cannot remove it");
            }
        }
    }

    fn path(&self) -> http::uri::PathAndQuery {
        self.config.rpc.path(self.config.protocol)
    }

    /// Tells the server of changed subscriptions, and what there is to say.
    fn announce(&mut self, outbox: &impl Fn(Request)) {
        let wanted = self.subscriptions.snapshot();
        self.session.on_wanted(&wanted).into_iter().for_each(outbox);
        self.session.on_said(&self.subscriptions.said()).into_iter().for_each(outbox);
    }

    fn deliver(&mut self, mut received: session::Received, outbox: &impl Fn(Request)) {
        let unreadable = Rejected(std::mem::take(&mut received.unreadable)).into_result();
        if unreadable.is_err() {
            // What it says of all other resources, and of those that are not in it, cannot be relied on either.
            received.updated.clear();
            received.removed.clear();
            received.leases.clear();
        }
        let leases = std::mem::take(&mut received.leases);
        let (seen, updated, removed) = received.hand_over();
        debug!(type_url = %seen.type_url, updated = updated.len(), removed = removed.len(), "response");
        let verdict = match unreadable {
            Ok(()) => {
                self.handler.begin(&seen.type_url, seen.version());
                self.handler.update(&seen.type_url, updated, removed)
            }
            Err(rejected) => {
                self.handler.refused(&seen.type_url);
                Err(rejected)
            }
        };
        if let Err(rejected) = &verdict {
            warn!(type_url = %seen.type_url, %rejected, "refused part of a response; what it replaced stays in use");
        }
        // What stays in use instead of a refused resource has the time that it had.
        for (name, ttl) in leases {
            if verdict.as_ref().is_err_and(|rejected| rejected.names(&name)) {
                continue;
            }
            let key = (seen.type_url.clone(), name);
            match ttl {
                Some(ttl) => self.leases.insert(key, Instant::now() + ttl),
                None => self.leases.remove(&key),
            };
        }
        let answer = self.session.on_verdict(&seen, verdict);
        // Subscriptions first: a server that waits for the acknowledgement then already knows which endpoints are wanted.
        self.announce(outbox);
        answer.into_iter().for_each(outbox);
    }
}

#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("cannot connect to the control plane: {}", chain(.0.as_ref()))]
    Connect(ConnectError),
    #[error("the control plane ended the stream: {}: {}", .0.code(), .0.message())]
    Stream(Box<Status>),
    #[error("the authorization header has characters that a header cannot carry")]
    Authorization,
    #[error("initial_metadata has a name or value that a header cannot carry")]
    Metadata,
}

/// Every cause on one line: these errors end in a log line and in the agent's "waiting for" text.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn stream_error(status: Status) -> StreamError {
    StreamError::Stream(Box::new(status))
}

/// Resolves when the first lease ends.
async fn lease_over(leases: &BTreeMap<(ArcStr, ArcStr), Instant>) {
    match leases.values().min() {
        Some(until) => tokio::time::sleep_until(*until).await,
        None => std::future::pending().await,
    }
}

/// Calls a method of streams in both directions.
async fn open<Q, A>(
    channel: Channel,
    path: http::uri::PathAndQuery,
    requests: tonic::Request<UnboundedReceiverStream<Q>>,
) -> Result<tonic::Streaming<A>, StreamError>
where
    Q: Message + Send + Sync + 'static,
    A: Message + Default + Send + Sync + 'static,
{
    let mut client = tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_RESPONSE);
    client.ready().await.map_err(|e| StreamError::Connect(Box::new(e)))?;
    let responses = client.streaming(requests, path, tonic_prost::ProstCodec::<Q, A>::default()).await;
    Ok(responses.map_err(stream_error)?.into_inner())
}

fn authorized<T>(mut request: tonic::Request<T>, connection: &Connection) -> Result<tonic::Request<T>, StreamError> {
    if let Some(authorization) = &connection.authorization {
        let mut value: tonic::metadata::MetadataValue<_> =
            authorization.parse().map_err(|_| StreamError::Authorization)?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
    }
    for (name, value) in &connection.metadata {
        let name = tonic::metadata::MetadataKey::<tonic::metadata::Ascii>::from_bytes(name.as_bytes());
        let (Ok(name), Ok(value)) = (name, value.parse()) else { return Err(StreamError::Metadata) };
        request.metadata_mut().append(name, value);
    }
    Ok(request)
}

/// Between half and all of `pause`, so that the proxies of a restarted control plane do not return as one.
fn jittered(pause: Duration) -> Duration {
    // A fresh RandomState is seeded from the system; nothing here needs better randomness.
    let random = RandomState::new().hash_one(0u8) as u32;
    pause / 2 + (pause / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// The first string field of a message with number 1, which is the name in every named resource of the protocol.
#[derive(Clone, PartialEq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

/// A resource's name, from field 1 of its body: `name` of clusters, listeners, routes, secrets and filter configurations,
/// `cluster_name` of endpoints.
pub fn resource_name(of: &str, body: &[u8]) -> Option<ArcStr> {
    if of == type_url::NAME_TABLE {
        return None;
    }
    Named::decode(body).ok().map(|named| ArcStr::from(named.name))
}
