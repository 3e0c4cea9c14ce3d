//! 15004: the control plane's debug pages, asked for over an xDS stream with the workload's identity. So who may look into
//! a pod needs no way to the control plane: `pilot-agent request GET /debug/syncz --debug-port 15004`.
//!
//! DIFFERS: the stream is one of its own for each question; istio's agents ask in the middle of their proxy's.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ads::client::Connector;
use anyhow::{Context, bail};
use discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_api::{core, discovery};
use lifecycle::http::{Handler, Request, Response, json, text, with_type};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::warn;

use crate::dataplane::Later;

/// Where istioctl asks.
const PORT: u16 = 15004;
/// Names of pages are resources of this type.
const PAGES: &str = "istio.io/debug";
/// Pages that are types of their own, with messages as resources.
const TYPES: [&str; 2] = ["syncz", "config_dump"];
/// As istio's agent waits.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The largest page: the whole configuration of a big mesh.
const MAX_MESSAGE: usize = 64 << 20;

/// Asks on behalf of this node.
pub(crate) struct DebugRelay {
    connector: Connector,
    node: core::Node,
}

/// Serves this machine's own programs until the drain starts. A port that is taken costs only the pages.
pub(crate) async fn serve(connector: Connector, node: core::Node, drain: lifecycle::drain::Watch) {
    match TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], PORT))).await {
        Ok(listener) => lifecycle::http::serve(listener, Arc::new(DebugRelay { connector, node }), drain).await,
        Err(error) => warn!(%error, port = PORT, "no debug pages of the control plane"),
    }
}

impl Handler for DebugRelay {
    fn handle(&self, request: Request) -> Later<'_, Response> {
        Box::pin(async move {
            let uri = request.uri();
            let Some(page) = uri.path().strip_prefix("/debug").map(|page| page.trim_start_matches('/')) else {
                return text(404, "404 page not found: the pages are below /debug/\n");
            };
            let (type_url, names) = question(page, uri.query());
            match tokio::time::timeout(TIMEOUT, self.ask(type_url, names)).await {
                Ok(Ok(answer)) => show(&answer),
                Ok(Err(error)) => text(503, format!("{error:#}\n")),
                Err(_) => text(504, format!("the control plane did not answer within {TIMEOUT:?}\n")),
            }
        })
    }
}

impl DebugRelay {
    async fn ask(&self, type_url: String, resource_names: Vec<String>) -> anyhow::Result<discovery::DiscoveryResponse> {
        let connection =
            (self.connector)().await.map_err(|error| anyhow::anyhow!("no connection to the control plane: {error}"))?;
        let (sender, questions) = mpsc::channel(1);
        let node = Some(self.node.clone());
        let question =
            discovery::DiscoveryRequest { node, type_url: type_url.clone(), resource_names, ..Default::default() };
        sender.send(question).await.context("the stream cannot start")?;
        let mut outward = tonic::Request::new(ReceiverStream::new(questions));
        if let Some(authorization) = &connection.authorization {
            let mut value: tonic::metadata::MetadataValue<_> =
                authorization.parse().context("the token is no header value")?;
            value.set_sensitive(true);
            outward.metadata_mut().insert("authorization", value);
        }
        let mut client =
            AggregatedDiscoveryServiceClient::new(connection.channel).max_decoding_message_size(MAX_MESSAGE);
        let mut answers = client.stream_aggregated_resources(outward).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            if answer.type_url == type_url {
                return Ok(answer);
            }
        }
        bail!("the control plane ended the stream without an answer")
    }
}

/// The type and the names of resources that stand for a page.
fn question(page: &str, query: Option<&str>) -> (String, Vec<String>) {
    if TYPES.contains(&page) {
        let name = query.unwrap_or_default().split('&').find_map(|pair| pair.strip_prefix("resourceName="));
        return (format!("{PAGES}/{page}"), name.map(str::to_owned).into_iter().collect());
    }
    let name = match query {
        Some(query) => format!("{page}?{query}"),
        None => page.to_owned(),
    };
    (PAGES.to_owned(), vec![name])
}

/// A page as it is; messages as JSON in the response around them, which istioctl reads.
fn show(answer: &discovery::DiscoveryResponse) -> Response {
    if let [page] = answer.resources.as_slice()
        && answer.type_url == PAGES
    {
        return with_type(200, "application/json", page.value.clone());
    }
    let resources: Vec<serde_json::Value> = answer
        .resources
        .iter()
        .map(|any| match envoy_api::json::to_json(&any.type_url, &any.value) {
            Ok(serde_json::Value::Object(mut fields)) => {
                fields.insert("@type".to_owned(), json!(any.type_url));
                fields.into()
            }
            _ => json!({"@type": any.type_url, "value": String::from_utf8_lossy(&any.value)}),
        })
        .collect();
    let control_plane = answer.control_plane.as_ref().map(|plane| json!({"identifier": plane.identifier}));
    json(
        200,
        &json!({
            "versionInfo": answer.version_info,
            "resources": resources,
            "typeUrl": answer.type_url,
            "nonce": answer.nonce,
            "controlPlane": control_plane,
        }),
    )
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use discovery::aggregated_discovery_service_server::{
        AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
    };
    use envoy_api::pb::google::protobuf::Any;
    use futures::Stream;
    use tonic::{Status, Streaming};

    use super::*;

    /// Answers with what it was asked.
    struct Echo;

    type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

    #[tonic::async_trait]
    impl AggregatedDiscoveryService for Echo {
        type StreamAggregatedResourcesStream = Answers<discovery::DiscoveryResponse>;
        type DeltaAggregatedResourcesStream = Answers<discovery::DeltaDiscoveryResponse>;

        async fn stream_aggregated_resources(
            &self,
            request: tonic::Request<Streaming<discovery::DiscoveryRequest>>,
        ) -> Result<tonic::Response<Self::StreamAggregatedResourcesStream>, Status> {
            let question = request.into_inner().message().await?.unwrap_or_default();
            let node = question.node.unwrap_or_default().id;
            let text = json!([node, question.type_url, question.resource_names]).to_string();
            let any = Any { type_url: PAGES.to_owned(), value: text.into_bytes() };
            let answer = |type_url: &str| {
                Ok(discovery::DiscoveryResponse {
                    type_url: type_url.to_owned(),
                    resources: vec![any.clone()],
                    ..Default::default()
                })
            };
            // Something else comes first.
            let answers = [answer("other"), answer(&question.type_url)];
            Ok(tonic::Response::new(Box::pin(futures::stream::iter(answers))))
        }

        async fn delta_aggregated_resources(
            &self,
            _: tonic::Request<Streaming<discovery::DeltaDiscoveryRequest>>,
        ) -> Result<tonic::Response<Self::DeltaAggregatedResourcesStream>, Status> {
            Err(Status::unimplemented("delta"))
        }
    }

    #[tokio::test]
    async fn the_control_plane_is_asked_for_a_page() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_service(AggregatedDiscoveryServiceServer::new(Echo));
        tokio::spawn(server.serve_with_incoming(incoming));
        let connector: Connector = Box::new(move || {
            let endpoint = identity::Endpoint { address: address.clone(), tls: None };
            Box::pin(async move {
                let channel = endpoint.connect().await?;
                Ok(ads::client::Connection { channel, authorization: None, metadata: Vec::new() })
            })
        });
        let node = core::Node { id: "sidecar~me".to_owned(), ..Default::default() };
        let relay = DebugRelay { connector, node };
        let (type_url, names) = question("configz", Some("proxyID=a"));
        let answer = relay.ask(type_url, names).await.unwrap();
        assert_eq!(answer.resources[0].value, br#"["sidecar~me","istio.io/debug",["configz?proxyID=a"]]"#);
        assert_eq!(show(&answer).status(), 200);
    }

    #[test]
    fn pages_are_types_or_names() {
        let asked = |page: &str, query| question(page, query);
        assert_eq!(asked("syncz", None), ("istio.io/debug/syncz".to_owned(), vec![]));
        assert_eq!(
            asked("config_dump", Some("resourceName=a.b")),
            ("istio.io/debug/config_dump".to_owned(), vec!["a.b".to_owned()])
        );
        assert_eq!(asked("", None), ("istio.io/debug".to_owned(), vec![String::new()]));
    }
}
