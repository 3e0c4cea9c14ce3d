//! Who is at the other end, for Istio's metrics: from certificates, endpoint metadata, and headers between our proxies.

mod exchange;
mod metadata;

use crate::bootstrap::NodeInfo;
use crate::hcm::Http;
use crate::stats::{ArcStrOrUnknown, Flags, Peer, RequestLabels, TcpLabels, Workload};
use crate::upstream::WorkerCluster;
use crate::worker::Worker;
use bytes::Bytes;
pub(crate) use exchange::exchange;
use mesh_types::{ArcStr, SpiffeId};
use metadata::Card;
pub(crate) use metadata::of_header;
use proxy_core::filters::PeerMethod;
use proxy_core::listener::{Direction, MetadataExchange};
use proxy_core::{Cluster, Headers, Host, Listener, StreamInfo, TlsInfo};
use serde_json::Value;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// This proxy's own workload.
pub(crate) struct LocalIdentity {
    pub(crate) workload: Arc<Workload>,
    /// What nobody knows.
    pub(crate) unknown: Arc<Workload>,
    card: Card,
    /// The `x-envoy-peer-metadata` value.
    announcement: String,
    baggage: String,
    id: String,
    /// Of our own place; may be empty.
    pub(crate) zone: ArcStr,
}

impl LocalIdentity {
    pub(crate) fn of(node: &NodeInfo) -> Self {
        let workload = Workload {
            name: or(node.text("WORKLOAD_NAME"), node.text("NAME")).into(),
            namespace: node.text("NAMESPACE").into(),
            app: node.label("app").into(),
            version: node.label("version").into(),
            canonical_service: or(
                node.label("service.istio.io/canonical-name"),
                or(node.label("app.kubernetes.io/name"), or(node.label("app"), node.text("WORKLOAD_NAME"))),
            )
            .into(),
            canonical_revision: or(
                node.label("service.istio.io/canonical-revision"),
                or(node.label("app.kubernetes.io/version"), node.label("version")),
            )
            .into(),
            cluster: node.text("CLUSTER_ID").into(),
        };
        let card = Card::of(node, &workload);
        Self {
            workload: Arc::new(workload),
            unknown: Arc::default(),
            announcement: card.header(&[]),
            baggage: card.baggage(),
            card,
            id: node.id.clone(),
            zone: node.message.locality.as_ref().map(|l| l.zone.as_str()).unwrap_or_default().into(),
        }
    }

    /// The first bytes of TCP streams to and from peers that take part.
    pub(crate) fn frame(&self, exchange: &MetadataExchange) -> Bytes {
        self.card.frame(&self.id, &exchange.additional_labels)
    }
}

fn or<'a>(first: &'a str, second: &'a str) -> &'a str {
    if first.is_empty() { second } else { first }
}

/// The headers in which Istio's proxies tell each other who they are.
///
/// DIFFERS: without Istio's filter in the configuration (profile `stock`) they are sent only over mutual TLS to sidecars, believed
/// only of peers with a verified certificate, and taken off before the application sees them. With the filter they go where its
/// configuration says, as from Envoy.
const HEADER: &str = "x-envoy-peer-metadata";
const ID_HEADER: &str = "x-envoy-peer-metadata-id";

/// What is known of a request's peer.
#[derive(Default)]
pub(crate) struct RequestPeer {
    workload: Option<Arc<Workload>>,
    /// The request came with the headers, so its sender reads them, too: the card, the id.
    told: (bool, bool),
}

impl RequestPeer {
    /// Takes the downstream's announcement off a request.
    pub(crate) fn take_from(&mut self, request: &mut Headers, http: &Http) {
        if let Some(config) = http.config.peer_metadata() {
            let mut remove = false;
            for method in &config.downstream_discovery {
                let found = match method {
                    PeerMethod::Headers { .. } => {
                        remove = true;
                        self.told = (request.contains(HEADER), request.contains(ID_HEADER));
                        request.get(HEADER).and_then(|value| http.announced(value))
                    }
                    PeerMethod::Baggage => request
                        .get("baggage")
                        .and_then(metadata::of_baggage)
                        .map(|workload| http.worker.intern(workload)),
                };
                self.workload = self.workload.take().or(found);
            }
            if remove {
                request.remove(HEADER);
                request.remove(ID_HEADER);
            }
            return;
        }
        let inbound = http.listener.direction == Direction::Inbound;
        let sidecar = http.listener.direction != Direction::Unspecified;
        if !sidecar || (!request.contains(ID_HEADER) && !request.contains(HEADER)) {
            return;
        }
        // Only a peer with a verified certificate is believed, and only about itself.
        let verified = http.info.tls.as_ref().is_some_and(|t| t.peer.is_some());
        if inbound && verified {
            self.workload = request.get(HEADER).and_then(|value| http.announced(value));
        }
        request.remove(HEADER);
        request.remove(ID_HEADER);
    }

    /// Puts our own announcement on a request that leaves for a host of `cluster`.
    /// `mutual`: the host is reached over TLS with our certificate.
    pub(crate) fn announce(&self, request: &mut Headers, http: &Http, cluster: &Cluster, mutual: bool) {
        let own = &http.worker.shared.identity;
        if let Some(config) = http.config.peer_metadata() {
            for method in &config.upstream_propagation {
                match method {
                    PeerMethod::Headers { skip_external } if tells_nothing(cluster, *skip_external) => {
                        // A try before may have gone elsewhere.
                        request.remove(HEADER);
                        request.remove(ID_HEADER);
                    }
                    PeerMethod::Headers { .. } => own.tell(request, &config.additional_labels, (true, true)),
                    PeerMethod::Baggage => request.set("baggage", own.baggage.as_bytes()),
                }
            }
            return;
        }
        if http.listener.direction != Direction::Outbound {
            return;
        }
        if mutual {
            own.tell(request, &[], (true, true));
        } else {
            // A try before may have gone to a sidecar.
            request.remove(HEADER);
            request.remove(ID_HEADER);
        }
    }

    /// Takes the upstream's announcement off an answer, and tells the client who we are.
    pub(crate) fn pass_answer(&mut self, headers: &mut Headers, http: &Http, cluster: &Cluster) {
        if let Some(config) = http.config.peer_metadata() {
            if !config.upstream_discovery.is_empty() {
                if let Some(found) = headers.get(HEADER).and_then(of_header) {
                    self.workload = Some(http.worker.intern(found));
                }
                headers.remove(HEADER);
                headers.remove(ID_HEADER);
            }
            let own = &http.worker.shared.identity;
            for method in &config.downstream_propagation {
                match method {
                    PeerMethod::Headers { skip_external } if tells_nothing(cluster, *skip_external) => {}
                    PeerMethod::Headers { .. } => own.tell(headers, &config.additional_labels, self.told),
                    PeerMethod::Baggage => headers.set("baggage", own.baggage.as_bytes()),
                }
            }
            return;
        }
        let sidecar = http.listener.direction != Direction::Unspecified;
        if sidecar && (headers.contains(ID_HEADER) || headers.contains(HEADER)) {
            self.workload = headers.get(HEADER).and_then(of_header).map(|w| http.worker.intern(w));
            headers.remove(HEADER);
            headers.remove(ID_HEADER);
        }
    }
}

impl LocalIdentity {
    /// Puts card and id on a message, as far as they are wanted.
    fn tell(&self, headers: &mut Headers, labels: &[ArcStr], (card, id): (bool, bool)) {
        if id {
            headers.set(ID_HEADER, self.id.as_bytes());
        }
        match labels {
            _ if !card => {}
            [] => headers.set(HEADER, self.announcement.as_bytes()),
            labels => headers.set(HEADER, self.card.header(labels).as_bytes()),
        }
    }
}

/// Whether the hosts of a cluster are not told who we are.
fn tells_nothing(cluster: &Cluster, skip_external: bool) -> bool {
    let says = |key: &str| cluster.metadata().get("istio", &[key]).and_then(Value::as_bool).unwrap_or(false);
    says("disable_mx") || skip_external && (&*cluster.name == "PassthroughCluster" || says("external"))
}

/// From the endpoint's `istio.workload` metadata: `name;namespace;canonical service;revision;cluster`
/// (istiod, `util.AppendLbEndpointMetadata`).
pub(crate) fn of_host(host: &Host) -> Option<Workload> {
    let text = host.metadata.get("istio", &["workload"])?.as_str()?;
    let mut fields = text.split(';');
    let mut next = || fields.next().unwrap_or_default();
    let (name, namespace, service, revision, cluster) = (next(), next(), next(), next(), next());
    Some(Workload {
        name: name.into(),
        namespace: namespace.into(),
        app: service.into(),
        version: revision.into(),
        canonical_service: service.into(),
        canonical_revision: revision.into(),
        cluster: cluster.into(),
    })
}

/// From a SPIFFE id, where nothing better is known: namespace only.
fn of_principal(principal: &str) -> Workload {
    let mut workload = Workload::default();
    if let Ok(id) = principal.parse::<SpiffeId>() {
        workload.namespace = id.namespace().into();
    }
    workload
}

fn principal(tls: Option<&TlsInfo>, local: bool) -> Option<ArcStr> {
    let tls = tls?;
    let certificate = if local { tls.local.as_ref() } else { tls.peer.as_ref() };
    certificate?.uri_sans.first().cloned()
}

/// The names of a cluster's service, from its metadata.
pub(crate) struct Service {
    host: ArcStrOrUnknown,
    name: ArcStrOrUnknown,
    namespace: ArcStrOrUnknown,
}

impl Service {
    pub(crate) fn of(cluster: &Cluster) -> Self {
        let entry = cluster.metadata().get("istio", &["services"]).and_then(|s| s.get(0));
        let field = |key: &str| entry.and_then(|e| e.get(key)).and_then(Value::as_str).unwrap_or_default().into();
        // Pass-through and black-hole traffic is labelled with the cluster's name, as Istio does.
        if entry.is_none() && cluster.name.ends_with("Cluster") {
            let name: ArcStrOrUnknown = (&*cluster.name).into();
            return Self { host: name.clone(), name, namespace: ArcStrOrUnknown::default() };
        }
        Self { host: field("host"), name: field("name"), namespace: field("namespace") }
    }
}

fn labels(
    worker: &Worker,
    direction: Direction,
    info: &StreamInfo,
    cluster: Option<&WorkerCluster>,
    peer: Option<Arc<Workload>>,
) -> TcpLabels {
    let identity = &worker.shared.identity;
    let (reporter, tls) = match direction {
        Direction::Inbound => ("destination", info.connection.tls.as_deref()),
        _ => ("source", info.upstream.tls.as_deref()),
    };
    let local_principal = principal(tls, true);
    let peer_principal = principal(tls, false);
    let inbound = direction == Direction::Inbound;
    let peer = peer
        .or_else(|| match (inbound, cluster, &info.upstream.host) {
            (false, Some(cluster), Some(host)) => cluster.workload_of(worker, host),
            _ => None,
        })
        .or_else(|| peer_principal.as_deref().map(|p| worker.intern(of_principal(p))))
        .unwrap_or_else(|| identity.unknown.clone());
    // Istio's source reports do not claim to know the connection's security.
    let mutual_tls = if inbound { Some(peer_principal.is_some()) } else { None };
    let own = Peer(identity.workload.clone());
    let (source, destination) = if inbound { (Peer(peer), own) } else { (own, Peer(peer)) };
    let (source_principal, destination_principal) =
        if inbound { (peer_principal, local_principal) } else { (local_principal, peer_principal) };
    let service = cluster.map(|c| c.entry.service());
    TcpLabels {
        reporter,
        source,
        destination,
        source_principal: ArcStrOrUnknown(source_principal),
        destination_principal: ArcStrOrUnknown(destination_principal),
        service: service.map(|s| s.host.clone()).unwrap_or_default(),
        service_name: service.map(|s| s.name.clone()).unwrap_or_default(),
        service_namespace: service.map(|s| s.namespace.clone()).unwrap_or_default(),
        mutual_tls,
        flags: Flags::of(info.flags),
    }
}

/// Labels of a TCP connection; `None` on listeners that are neither inbound nor outbound.
/// `peer`: what the other end said of itself.
pub(crate) fn tcp_labels(
    worker: &Rc<Worker>,
    listener: &Listener,
    info: &StreamInfo,
    cluster: &Rc<WorkerCluster>,
    peer: Option<Workload>,
) -> Option<TcpLabels> {
    if listener.direction == Direction::Unspecified {
        return None;
    }
    Some(labels(worker, listener.direction, info, Some(cluster), peer.map(|peer| worker.intern(peer))))
}

/// Counts a finished request.
pub(crate) fn report(exchange: &crate::hcm::Exchange, elapsed: Duration) {
    let http = &exchange.http;
    if http.listener.direction == Direction::Unspecified {
        return;
    }
    let info = &exchange.info;
    let cluster = info.upstream.cluster.as_deref().and_then(|name| http.worker.cluster(name));
    let peers = labels(&http.worker, http.listener.direction, info, cluster.as_deref(), exchange.peer.workload.clone());
    let labels = RequestLabels {
        peers,
        response_code: info.response_code.unwrap_or(0),
        grpc_status: exchange.grpc_status,
        grpc: exchange.grpc,
    };
    let request = info.bytes_received + info.downstream_header_bytes_received;
    let response = info.bytes_sent + info.downstream_header_bytes_sent;
    http.worker.istio.request(labels, elapsed.as_millis() as u64, request, response);
}
