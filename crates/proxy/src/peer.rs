//! Who is at the other end, for Istio's metrics: from certificates, endpoint metadata, and headers between our proxies.

use crate::bootstrap::NodeInfo;
use crate::hcm::Http;
use crate::stats::{RequestLabels, TcpLabels, Workload};
use crate::upstream::WorkerCluster;
use crate::worker::Worker;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use mesh_types::{ArcStr, SpiffeId};
use proxy_core::listener::Direction;
use proxy_core::{Cluster, Headers, Host, Listener, StreamInfo, TlsInfo};
use serde_json::Value;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// This proxy's own workload.
pub(crate) struct LocalIdentity {
    pub(crate) workload: Arc<Workload>,
    /// The `x-envoy-peer-metadata-…` value our proxies announce themselves with.
    announcement: String,
    id: String,
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
        let fields = [
            workload.name.as_str(),
            workload.namespace.as_str(),
            workload.app.as_str(),
            workload.version.as_str(),
            workload.canonical_service.as_str(),
            workload.canonical_revision.as_str(),
            workload.cluster.as_str(),
        ]
        .map(|f| if f == "unknown" { "" } else { f });
        let announcement = STANDARD_NO_PAD.encode(fields.join(";"));
        Self { workload: Arc::new(workload), announcement, id: node.id.clone() }
    }
}

fn or<'a>(first: &'a str, second: &'a str) -> &'a str {
    if first.is_empty() { second } else { first }
}

/// The header in which our proxies tell each other who they are: base64 of the seven workload fields.
/// It never leaves the mesh: it is only sent over mutual TLS to sidecars, and taken off before the application sees it.
///
/// DIFFERS: Istio puts a protobuf `Struct` into `x-envoy-peer-metadata`; that is understood when it comes, but its
/// fields are more than the labels need.
const HEADER: &str = "x-envoy-peer-metadata";
const ID_HEADER: &str = "x-envoy-peer-metadata-id";

/// Longer announcements are not from us.
const MAX_HEADER: usize = 2048;

/// What is known of a request's peer.
#[derive(Default)]
pub(crate) struct RequestPeer {
    workload: Option<Arc<Workload>>,
}

impl RequestPeer {
    /// Takes the downstream's announcement off a request.
    pub(crate) fn take_from(&mut self, request: &mut Headers, http: &Http) {
        let inbound = http.listener.direction == Direction::Inbound;
        let sidecar = http.listener.direction != Direction::Unspecified;
        if !sidecar || (!request.contains(ID_HEADER) && !request.contains(HEADER)) {
            return;
        }
        // Only a peer with a verified certificate is believed, and only about itself.
        let verified = http.info.tls.as_ref().is_some_and(|t| t.peer.is_some());
        if inbound && verified {
            self.workload = request.get(HEADER).and_then(parse).map(Arc::new);
        }
        request.remove(HEADER);
        request.remove(ID_HEADER);
    }

    /// Puts our own announcement on a request that leaves for another sidecar.
    pub(crate) fn announce(&self, request: &mut Headers, http: &Http, cluster: &Cluster) {
        let has_tls = cluster.transport.tls_contexts().next().is_some();
        if http.listener.direction == Direction::Outbound && has_tls {
            let own = &http.worker.shared.identity;
            request.set(HEADER, own.announcement.as_bytes());
            request.set(ID_HEADER, own.id.as_bytes());
        }
    }

    /// Takes the upstream's announcement off an answer.
    pub(crate) fn learn_from_answer(&mut self, headers: &mut Headers, http: &Http) {
        let sidecar = http.listener.direction != Direction::Unspecified;
        if !sidecar {
            return;
        }
        if headers.contains(ID_HEADER) || headers.contains(HEADER) {
            self.workload = headers.get(HEADER).and_then(parse).map(Arc::new);
            headers.remove(HEADER);
            headers.remove(ID_HEADER);
        }
    }
}

fn parse(value: &[u8]) -> Option<Workload> {
    if value.len() > MAX_HEADER {
        return None;
    }
    let text = String::from_utf8(STANDARD_NO_PAD.decode(value).ok()?).ok()?;
    let mut fields = text.split(';');
    let mut next = || fields.next().unwrap_or_default().into();
    Some(Workload {
        name: next(),
        namespace: next(),
        app: next(),
        version: next(),
        canonical_service: next(),
        canonical_revision: next(),
        cluster: next(),
    })
}

/// From the endpoint's `istio.workload` metadata: `name;namespace;canonical service;revision;cluster`
/// (istiod, `util.AppendLbEndpointMetadata`).
fn of_host(host: &Host) -> Option<Workload> {
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

/// The service's names, from the cluster's metadata.
fn service(cluster: Option<&Cluster>) -> (ArcStr, ArcStr, ArcStr) {
    let field = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).unwrap_or_default().into();
    let entry = cluster.and_then(|c| c.metadata.get("istio", &["services"])).and_then(|s| s.get(0));
    match entry {
        Some(entry) => (field(entry, "host"), field(entry, "name"), field(entry, "namespace")),
        None => {
            let name = cluster.map(|c| c.name.clone()).unwrap_or_else(|| "".into());
            // Pass-through and black-hole traffic is labelled with the cluster's name, as Istio does.
            if name.ends_with("Cluster") { (name.clone(), name, "".into()) } else { ("".into(), "".into(), "".into()) }
        }
    }
}

fn text(value: &ArcStr) -> crate::stats::ArcStrOrUnknown {
    (&**value).into()
}

fn labels(
    worker: &Worker,
    direction: Direction,
    info: &StreamInfo,
    cluster: Option<&Cluster>,
    peer: Option<Arc<Workload>>,
) -> TcpLabels {
    let own = worker.shared.identity.workload.clone();
    let (host, name, namespace) = service(cluster);
    let (reporter, tls) = match direction {
        Direction::Inbound => ("destination", info.connection.tls.clone()),
        _ => ("source", info.upstream.tls.clone()),
    };
    let local_principal = principal(tls.as_deref(), true);
    let peer_principal = principal(tls.as_deref(), false);
    let peer = peer
        .or_else(|| match direction {
            Direction::Inbound => None,
            _ => info.upstream.host.as_ref().and_then(|h| of_host(h)).map(Arc::new),
        })
        .unwrap_or_else(|| Arc::new(peer_principal.as_deref().map(of_principal).unwrap_or_default()));
    let known = |p: Option<ArcStr>| p.as_ref().map(text).unwrap_or_default();
    let inbound = direction == Direction::Inbound;
    // Istio's source reports do not claim to know the connection's security.
    let mutual_tls = if inbound { Some(peer_principal.is_some()) } else { None };
    let (source, destination) = if inbound { (peer, own) } else { (own, peer) };
    let (source_principal, destination_principal) =
        if inbound { (peer_principal, local_principal) } else { (local_principal, peer_principal) };
    TcpLabels {
        reporter,
        source,
        destination,
        source_principal: known(source_principal),
        destination_principal: known(destination_principal),
        service: text(&host),
        service_name: text(&name),
        service_namespace: text(&namespace),
        mutual_tls,
        flags: crate::stats::Flags::of(info.flags),
    }
}

/// Labels of a TCP connection; `None` on listeners that are neither inbound nor outbound.
pub(crate) fn tcp_labels(
    worker: &Rc<Worker>,
    listener: &Listener,
    info: &StreamInfo,
    cluster: &Rc<WorkerCluster>,
) -> Option<TcpLabels> {
    if listener.direction == Direction::Unspecified {
        return None;
    }
    Some(labels(worker, listener.direction, info, Some(cluster.config()), None))
}

/// Counts a finished request.
pub(crate) fn report(exchange: &crate::hcm::Exchange, elapsed: Duration) {
    let http = &exchange.http;
    if http.listener.direction == Direction::Unspecified {
        return;
    }
    let info = &exchange.info;
    let cluster = info.upstream.cluster.as_deref().and_then(|name| http.worker.cluster(name));
    let peers = labels(
        &http.worker,
        http.listener.direction,
        info,
        cluster.as_ref().map(|c| &**c.config()),
        exchange.peer.workload.clone(),
    );
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_round_trip() {
        let node = NodeInfo {
            metadata: serde_json::json!({
                "WORKLOAD_NAME": "reviews-v1", "NAMESPACE": "default", "CLUSTER_ID": "Kubernetes",
                "LABELS": {"app": "reviews", "version": "v1"}
            }),
            ..NodeInfo::default()
        };
        let own = LocalIdentity::of(&node);
        assert_eq!(parse(own.announcement.as_bytes()).as_ref(), Some(&*own.workload));
        assert_eq!(parse(b"not base64!"), None);
    }
}
