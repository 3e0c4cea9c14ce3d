//! The xDS relay: Envoy's stream on a unix socket, the control plane's over TLS with the workload's identity, and every message
//! passed on as it is. The name table alone is asked for and kept by the agent.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use ads::client::{Connection, Connector, Handler, Problem, Rejected, Update};
use envoy_api::pb::google::rpc;
use envoy_api::{discovery, type_url};
use futures::{Stream, StreamExt};
use mesh_types::ArcStr;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info};

use crate::health::Said;

use discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use discovery::aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer};

/// Messages on their way each way; more wait in the sender's connection.
const QUEUE: usize = 16;
/// As in `ads`: a state-of-the-world answer for a whole mesh is one message.
const MAX_MESSAGE: usize = 512 << 20;

/// The relay; one for all streams.
pub(crate) struct Relay {
    connector: Connector,
    /// Takes the name table, if DNS is on. Locked for the length of one update.
    names: Option<Arc<Mutex<Box<dyn Handler>>>>,
    /// What is said of the application's health, on every stream and whenever it changes.
    health: watch::Receiver<Said>,
}

impl Relay {
    /// A gRPC service for Envoy.
    pub(crate) fn service(
        connector: Connector,
        names: Option<Box<dyn Handler>>,
        health: watch::Receiver<Said>,
    ) -> AggregatedDiscoveryServiceServer<Relay> {
        let relay = Relay { connector, names: names.map(|handler| Arc::new(Mutex::new(handler))), health };
        AggregatedDiscoveryServiceServer::new(relay)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(usize::MAX)
    }

    async fn open<F: Flavour>(
        &self,
        request: Request<Streaming<F::Request>>,
    ) -> Result<Response<Responses<F::Response>>, Status> {
        let mut from_envoy = request.into_inner();
        let connection = (self.connector)()
            .await
            .map_err(|e| Status::unavailable(format!("no connection to the control plane: {e}")))?;
        let (to_control_plane, requests) = mpsc::channel::<F::Request>(QUEUE);
        let mut outward = Request::new(ReceiverStream::new(requests));
        if let Some(authorization) = &connection.authorization {
            let mut value: tonic::metadata::MetadataValue<_> =
                authorization.parse().map_err(|_| Status::internal("the token is no header value"))?;
            value.set_sensitive(true);
            outward.metadata_mut().insert("authorization", value);
        }
        let ask_names = self.names.is_some();
        let mut health = self.health.clone();
        let acks = to_control_plane.clone();
        // Ends when Envoy hangs up or the control plane's stream is dropped, whichever comes first.
        tokio::spawn(async move {
            let mut first = true;
            // Nothing can be said before Envoy has named its node.
            let mut may_change = false;
            loop {
                let mut messages = Vec::new();
                let mut news = first;
                tokio::select! {
                    request = from_envoy.message() => match request {
                        Ok(Some(request)) => {
                            let names = (first && ask_names).then(|| F::names_request(&request));
                            messages.push(request);
                            messages.extend(names);
                        }
                        _ => break,
                    },
                    changed = health.changed(), if may_change => match changed {
                        Ok(()) => news = true,
                        Err(_) => may_change = false,
                    },
                }
                if news && let Some(problem) = health.borrow_and_update().clone() {
                    messages.push(F::health_request(problem));
                }
                if first {
                    (first, may_change) = (false, true);
                }
                for message in messages {
                    if to_control_plane.send(message).await.is_err() {
                        return;
                    }
                }
            }
            debug!("Envoy closed its xDS stream");
        });
        let responses = F::call(connection, outward).await?;
        info!("Envoy's xDS stream is connected to the control plane");
        let names = self.names.clone();
        let passed = responses.filter_map(move |response| {
            let (names, acks) = (names.clone(), acks.clone());
            async move {
                match (response, names) {
                    (Ok(response), Some(handler)) if F::type_url(&response) == type_url::NAME_TABLE => {
                        let ack = F::take_names(response, &handler);
                        let _ = acks.send(ack).await; // fails when the stream is at its end anyway
                        None
                    }
                    (response, _) => Some(response),
                }
            }
        });
        Ok(Response::new(Box::pin(passed)))
    }
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Relay {
    type StreamAggregatedResourcesStream = Responses<discovery::DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<discovery::DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<discovery::DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        self.open::<Sotw>(request).await
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<discovery::DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        self.open::<Delta>(request).await
    }
}

/// State of the world or delta.
trait Flavour: 'static {
    type Request: Send + 'static;
    type Response: Send + 'static;

    fn call(
        connection: Connection,
        requests: Request<ReceiverStream<Self::Request>>,
    ) -> impl Future<Output = Result<Streaming<Self::Response>, Status>> + Send;
    fn type_url(response: &Self::Response) -> &str;
    /// The request for the name table, on behalf of the node of Envoy's first request.
    fn names_request(first: &Self::Request) -> Self::Request;
    /// What is said of the application's health; `None`: it is well.
    fn health_request(problem: Option<Problem>) -> Self::Request;
    /// Hands a name table over; the acknowledgement.
    fn take_names(response: Self::Response, handler: &Mutex<Box<dyn Handler>>) -> Self::Request;
}

struct Sotw;
struct Delta;

impl Flavour for Sotw {
    type Request = discovery::DiscoveryRequest;
    type Response = discovery::DiscoveryResponse;

    async fn call(
        connection: Connection,
        requests: Request<ReceiverStream<Self::Request>>,
    ) -> Result<Streaming<Self::Response>, Status> {
        Ok(client(connection).stream_aggregated_resources(requests).await?.into_inner())
    }

    fn type_url(response: &Self::Response) -> &str {
        &response.type_url
    }

    fn names_request(first: &Self::Request) -> Self::Request {
        discovery::DiscoveryRequest {
            node: first.node.clone(),
            type_url: type_url::NAME_TABLE.to_owned(),
            ..Default::default()
        }
    }

    fn health_request(problem: Option<Problem>) -> Self::Request {
        discovery::DiscoveryRequest {
            type_url: type_url::HEALTH.to_owned(),
            error_detail: problem.map(status),
            ..Default::default()
        }
    }

    fn take_names(response: Self::Response, handler: &Mutex<Box<dyn Handler>>) -> Self::Request {
        let version = ArcStr::from(response.version_info.as_str());
        let updates = response.resources.into_iter().map(|any| Update {
            name: ArcStr::from(""),
            version: version.clone(),
            body: any.value.into(),
        });
        let error_detail = update(handler, updates.collect());
        discovery::DiscoveryRequest {
            type_url: type_url::NAME_TABLE.to_owned(),
            version_info: response.version_info,
            response_nonce: response.nonce,
            error_detail,
            ..Default::default()
        }
    }
}

impl Flavour for Delta {
    type Request = discovery::DeltaDiscoveryRequest;
    type Response = discovery::DeltaDiscoveryResponse;

    async fn call(
        connection: Connection,
        requests: Request<ReceiverStream<Self::Request>>,
    ) -> Result<Streaming<Self::Response>, Status> {
        Ok(client(connection).delta_aggregated_resources(requests).await?.into_inner())
    }

    fn type_url(response: &Self::Response) -> &str {
        &response.type_url
    }

    fn names_request(first: &Self::Request) -> Self::Request {
        discovery::DeltaDiscoveryRequest {
            node: first.node.clone(),
            type_url: type_url::NAME_TABLE.to_owned(),
            ..Default::default()
        }
    }

    fn health_request(problem: Option<Problem>) -> Self::Request {
        discovery::DeltaDiscoveryRequest {
            type_url: type_url::HEALTH.to_owned(),
            error_detail: problem.map(status),
            ..Default::default()
        }
    }

    fn take_names(response: Self::Response, handler: &Mutex<Box<dyn Handler>>) -> Self::Request {
        let updates = response.resources.into_iter().filter_map(|r| {
            Some(Update { name: r.name.into(), version: r.version.into(), body: r.resource?.value.into() })
        });
        let error_detail = update(handler, updates.collect());
        discovery::DeltaDiscoveryRequest {
            type_url: type_url::NAME_TABLE.to_owned(),
            response_nonce: response.nonce,
            error_detail,
            ..Default::default()
        }
    }
}

fn client(connection: Connection) -> AggregatedDiscoveryServiceClient<tonic::transport::Channel> {
    AggregatedDiscoveryServiceClient::new(connection.channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(usize::MAX)
}

fn status(problem: Problem) -> rpc::Status {
    rpc::Status { code: problem.code, message: problem.message, details: Vec::new() }
}

fn update(handler: &Mutex<Box<dyn Handler>>, updates: Vec<Update>) -> Option<rpc::Status> {
    let mut handler = handler.lock().unwrap_or_else(PoisonError::into_inner);
    let refused = |rejected: Rejected| rpc::Status {
        code: tonic::Code::InvalidArgument as i32,
        message: rejected.to_string(),
        details: Vec::new(),
    };
    handler.update(type_url::NAME_TABLE, updates, Vec::new()).err().map(refused)
}
