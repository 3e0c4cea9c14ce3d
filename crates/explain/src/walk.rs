//! The whole way: out of the client's pod, through its proxy, into the server's pod, through its proxy.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use proxy_core::listener::{NetworkFilter, Terminal};
use proxy_core::rbac::RbacInput;
use proxy_core::stream_info::PeerCertificate;
use proxy_core::{Address, ConnectionInfo, FilterState, Headers, Metadata, TlsInfo};
use push_context::MtlsMode;

use crate::address::{self, ELSEWHERE};
use crate::hop::{Hop, answered, verdict_step};
use crate::mesh::{Mesh, Pod};
use crate::request::{Request, Scheme};
use crate::trace::{Explanation, Outcome, Side, Source, Step};
use crate::unused::Asked;
use crate::upstream::{Departure, Dialler, Landing};
use crate::{Arrival, Capture, ClientTls, Configuration, Dial, Payload, Quirks, capture_rule, origin};

/// Port of clients; it decides nothing.
const CLIENT_PORT: u16 = 40000;

/// A proxy that a request passes.
struct Proxy<'a> {
    at: &'a Configuration,
    mesh: Option<&'a Mesh>,
    /// Its pod, if that is known.
    pod: Option<&'a Pod>,
}

/// A connection as it reaches a proxy.
struct Incoming<'a> {
    dial: Dial,
    /// The client's certificate, if it shows one.
    peer: Option<&'a str>,
    head: Headers,
}

/// A request from a pod of a mesh to a URL.
pub(crate) fn from_pod(mesh: &Mesh, pod: &Rc<Pod>, request: &Request, random: u64) -> Explanation {
    let mut out = Explanation {
        request: request.line(),
        from: format!("{} ({})", pod.full_name(), pod.identity),
        ..Explanation::default()
    };
    let mut side = Side { role: "client", proxy: pod.full_name(), ..Side::default() };
    let address = match address::resolve(mesh, pod, request, &mut side.steps) {
        Ok(address) => address,
        Err(outcome) => return Explanation { sides: vec![side], outcome, ..out },
    };
    let destination = SocketAddr::new(address, request.url.port);
    let (captured, step) = capture_rule::outbound(&pod.annotations, destination);
    side.steps.push(if pod.has_sidecar { step } else { Step::new("sidecar", "the pod has none") });
    let landing = if !pod.has_sidecar || !captured {
        let landing = Landing {
            address: Some(destination),
            name: destination.to_string(),
            tls: own_tls(request),
            payload: request.payload(),
            by: Dialler::Application,
            tls_policy: None,
        };
        Ok((landing, request.head()))
    } else {
        let configuration = mesh.configuration(pod);
        refusals(&configuration, Some((mesh, pod)), &mut side);
        not_used(mesh, pod, request, &mut side);
        let proxy = Proxy { at: &configuration, mesh: Some(mesh), pod: Some(pod) };
        let dial = Dial {
            capture: Capture::Outbound,
            source: SocketAddr::new(pod.ip, CLIENT_PORT),
            destination,
            tls: own_tls(request),
            payload: request.payload(),
            quirks: Quirks::default(),
        };
        proxy.pass(Incoming { dial, peer: None, head: request.head() }, random, &mut side)
    };
    let landing = landing.and_then(|(landing, head)| {
        let behind = landing.address.map(|address| address::behind_service(mesh, address, &mut side.steps));
        let address = behind.transpose().map_err(|vacancy| unanswered(landing.by, &vacancy.to_string()))?;
        Ok((Landing { address, ..landing }, head))
    });
    out.sides.push(side);
    let (landing, head) = match landing {
        Ok(onward) => onward,
        Err(outcome) => return Explanation { outcome, ..out },
    };
    match landing.address.and_then(|address| Some((mesh.pod_at(address)?, address))) {
        Some((server, address)) => {
            let encrypted = landing.tls.as_ref().is_some_and(|tls| tls.certificate);
            let peer = encrypted.then_some(pod.identity.as_str());
            let dial = Dial {
                capture: Capture::Inbound,
                source: SocketAddr::new(pod.ip, CLIENT_PORT),
                destination: address,
                tls: landing.tls,
                payload: landing.payload,
                quirks: Quirks::default(),
            };
            let conflict = TlsConflict::of(mesh, &server, &dial, landing.tls_policy);
            into_pod(mesh, &server, Incoming { dial, peer, head }, random, &mut out);
            if let Some(conflict) = conflict {
                conflict.tell(landing.by, &mut out);
            }
        }
        None => {
            let summary = match landing.address {
                Some(address) if address.ip().is_loopback() => "it stays in the pod".to_owned(),
                _ => format!("it leaves the mesh for {}", landing.name),
            };
            out.outcome = Outcome { delivered: true, summary, ..Outcome::default() };
        }
    }
    out
}

/// A request to a port of a pod, from another pod or from outside the mesh.
pub(crate) fn to_pod(
    mesh: &Mesh,
    server: &Rc<Pod>,
    from: Option<&Pod>,
    request: &Request,
    mutual: bool,
    random: u64,
) -> Explanation {
    let identity = from.map(|pod| pod.identity.as_str());
    let mut out = Explanation { request: request.line(), ..Explanation::default() };
    out.from = match from {
        Some(pod) => format!("{} ({})", pod.full_name(), pod.identity),
        None => "outside the mesh".to_owned(),
    };
    let source = from.map_or(IpAddr::V4(ELSEWHERE), |pod| pod.ip);
    let alpn = match request.payload() {
        Payload::Http1 => vec![b"istio-http/1.1".to_vec(), b"istio".to_vec(), b"http/1.1".to_vec()],
        Payload::Http2 => vec![b"istio-h2".to_vec(), b"istio".to_vec(), b"h2".to_vec()],
        Payload::Opaque => vec![b"istio-peer-exchange".to_vec(), b"istio".to_vec()],
    };
    let mesh_tls = ClientTls { sni: String::new(), alpn, certificate: true };
    let dial = Dial {
        capture: Capture::Inbound,
        source: SocketAddr::new(source, CLIENT_PORT),
        destination: SocketAddr::new(server.ip, request.url.port),
        tls: if mutual { Some(mesh_tls) } else { own_tls(request) },
        payload: request.payload(),
        quirks: Quirks::default(),
    };
    let peer = identity.filter(|_| mutual);
    into_pod(mesh, server, Incoming { dial, peer, head: request.head() }, random, &mut out);
    out
}

/// A request at a proxy of which only its configuration is known.
///
/// `name` and `address` are the pod's, as far as they are known.
pub(crate) fn at_proxy(
    at: &Configuration,
    name: &str,
    address: Option<IpAddr>,
    request: &Request,
    inbound: bool,
    random: u64,
) -> Explanation {
    let role = if inbound { "server" } else { "client" };
    let mut side = Side { role, proxy: name.to_owned(), ..Side::default() };
    refusals(at, None, &mut side);
    let (address, step) = match inbound {
        true => (address.unwrap_or(IpAddr::V4(ELSEWHERE)), Step::new("name", "the pod itself")),
        false => address::in_tables(at, request),
    };
    side.steps.push(step);
    let dial = Dial {
        capture: if inbound { Capture::Inbound } else { Capture::Outbound },
        source: SocketAddr::new(IpAddr::V4(ELSEWHERE), CLIENT_PORT),
        destination: SocketAddr::new(address, request.url.port),
        tls: own_tls(request),
        payload: request.payload(),
        quirks: Quirks::default(),
    };
    let proxy = Proxy { at, mesh: None, pod: None };
    let outcome = match proxy.pass(Incoming { dial, peer: None, head: request.head() }, random, &mut side) {
        Ok((landing, _)) => {
            let summary = format!("it goes to {}{}", landing.name, if landing.tls.is_some() { " in TLS" } else { "" });
            Outcome { delivered: true, summary, ..Outcome::default() }
        }
        Err(outcome) => outcome,
    };
    Explanation { request: request.line(), from: String::new(), sides: vec![side], outcome }
}

fn into_pod(mesh: &Mesh, server: &Rc<Pod>, incoming: Incoming<'_>, random: u64, out: &mut Explanation) {
    let mut side = Side { role: "server", proxy: server.full_name(), ..Side::default() };
    let destination = incoming.dial.destination;
    let encrypted = incoming.dial.tls.is_some();
    let peer = incoming.peer.map(str::to_owned);
    let (captured, step) = capture_rule::inbound(&server.annotations, destination);
    let passed = if !server.has_sidecar || !captured {
        match server.has_sidecar {
            true => side.steps.push(step),
            false => {
                side.steps.push(Step::new("sidecar", "the pod has none: its application gets the bytes as they are"))
            }
        }
        Ok(())
    } else {
        side.steps.push(step);
        let (mode, source) = mesh.peer_policy(server, destination.port());
        let takes = match mode {
            MtlsMode::Disable => "plain text only",
            MtlsMode::Permissive => "plain text and mutual TLS",
            MtlsMode::Strict => "mutual TLS only",
        };
        side.steps.push(Step::new("port takes", takes).source(source));
        let configuration = mesh.configuration(server);
        refusals(&configuration, Some((mesh, server)), &mut side);
        let proxy = Proxy { at: &configuration, mesh: Some(mesh), pod: Some(server) };
        proxy.pass(incoming, random, &mut side).map(|_| ())
    };
    out.sides.push(side);
    out.outcome = match passed {
        Err(outcome) => outcome,
        Ok(()) => {
            let how = match (encrypted, peer) {
                (true, Some(peer)) => format!("in mutual TLS as {peer}"),
                (true, None) => "in TLS".to_owned(),
                (false, _) => "in plain text".to_owned(),
            };
            let summary = format!("delivered to {} port {}, {how}", server.full_name(), destination.port());
            Outcome { delivered: true, summary, ..Outcome::default() }
        }
    };
}

/// What the proxy does not see of the service that is asked, and which of its rules do nothing.
fn not_used(mesh: &Mesh, pod: &Pod, request: &Request, side: &mut Side) {
    let head = request.head();
    // Requests find their routes by the host that they name, which need not be the one that was dialled.
    let named = head.authority().map(|named| named.rsplit_once(':').map_or(named, |(host, _)| host));
    let Some(service) = named.and_then(|host| mesh.service(pod, host)) else { return };
    side.steps.extend(Asked { mesh, pod, service, port: request.url.port }.all());
}

fn refusals(at: &Configuration, of: Option<(&Mesh, &Pod)>, side: &mut Side) {
    for error in &at.rejected {
        let source = of.and_then(|(mesh, pod)| origin::of_refusal(&error.to_string(), &mesh.files, &pod.node));
        side.steps.push(Step::new("warning", format!("the proxy refuses {error}")).source(source));
    }
}

fn own_tls(request: &Request) -> Option<ClientTls> {
    let alpn: &[&[u8]] = match request.url.scheme {
        Scheme::Http | Scheme::Tcp => return None,
        Scheme::Https => &[b"h2", b"http/1.1"],
        Scheme::Tls => &[],
    };
    let sni = if request.url.host.parse::<IpAddr>().is_ok() { String::new() } else { request.url.host.clone() };
    Some(ClientTls { sni, alpn: alpn.iter().map(|p| p.to_vec()).collect(), certificate: false })
}

/// A client and a server that do not agree about mutual TLS.
struct TlsConflict {
    why: String,
    sources: Vec<Source>,
    /// The server's proxy is the one that refuses; otherwise what arrives is what its application cannot read.
    is_strict: bool,
}

impl TlsConflict {
    /// `client` is the DestinationRule's word, if it has one.
    fn of(mesh: &Mesh, server: &Pod, dial: &Dial, client: Option<Source>) -> Option<Self> {
        let is_mesh =
            |tls: &ClientTls| tls.certificate && tls.alpn.iter().any(|protocol| protocol.starts_with(b"istio"));
        // A gateway without sidecar is a proxy itself.
        let of_gateway = server.labels.get("istio").is_some_and(|name| name.ends_with("gateway"))
            || server.labels.contains_key("gateway.networking.k8s.io/gateway-name");
        if of_gateway && !server.has_sidecar {
            return None;
        }
        let is_captured = server.has_sidecar && capture_rule::inbound(&server.annotations, dial.destination).0;
        let (mode, policy) = mesh.peer_policy(server, dial.destination.port());
        let (server_wants, client_does, policy) = match (&dial.tls, is_captured, mode) {
            (None, true, MtlsMode::Strict) => ("mutual TLS only", "plain text", policy),
            (Some(tls), true, MtlsMode::Disable) if is_mesh(tls) => ("plain text only", "mutual TLS", policy),
            (Some(tls), false, _) if is_mesh(tls) => ("plain text only, it has no sidecar there", "mutual TLS", None),
            _ => return None,
        };
        let place = |source: &Option<Source>| source.as_ref().map_or_else(String::new, |source| format!(" ({source})"));
        let mut why =
            format!("{} takes {server_wants}{}, the client sends {client_does}", server.full_name(), place(&policy));
        if let Some(client) = &client {
            why.push_str(&format!(" because of {client}: remove it"));
        }
        Some(Self { why, sources: client.into_iter().chain(policy).collect(), is_strict: dial.tls.is_none() })
    }

    fn tell(self, by: Dialler, out: &mut Explanation) {
        let arrives = out.outcome.delivered;
        if arrives && self.is_strict {
            return;
        }
        if let Some(side) = out.sides.last_mut() {
            let step = Step::new("mutual TLS", "the two sides do not agree").end();
            side.steps.push(Step { sources: self.sources, ..step });
        }
        match arrives {
            true if by == Dialler::HttpProxy => out.outcome = answered(503, Some("UF"), "", &self.why),
            true => out.outcome = closed("UF", "", &self.why),
            false => out.outcome.summary = format!("closed: {}", self.why),
        }
    }
}

/// What becomes of a request when nobody answers the connection that is made for it.
fn unanswered(by: Dialler, why: &str) -> Outcome {
    match by {
        Dialler::Application => Outcome { summary: format!("nobody answers: {why}"), ..Outcome::default() },
        Dialler::TcpProxy => closed("UF", "", &format!("nobody answers: {why}")),
        Dialler::HttpProxy => answered(503, Some("UF"), "", &format!("nobody answers: {why}")),
    }
}

fn closed(flag: &'static str, details: &str, summary: &str) -> Outcome {
    Outcome {
        flag: Some(flag.to_owned()),
        details: details.to_owned(),
        summary: format!("closed: {summary}"),
        ..Outcome::default()
    }
}

impl Proxy<'_> {
    /// From the socket to the next connection, or to an answer.
    fn pass(&self, incoming: Incoming<'_>, random: u64, side: &mut Side) -> Result<(Landing, Headers), Outcome> {
        let Incoming { dial, peer, head } = incoming;
        let Some(arrival) = dial.arrive(self.at) else {
            side.steps.push(Step::new("listener", "there is none").end());
            let name = if dial.capture == Capture::Inbound { "virtualInbound" } else { "virtualOutbound" };
            let why = match self.at.refusal(name) {
                Some(error) => origin::refused(error, self.mesh.zip(self.pod)),
                None => "nothing listens there".to_owned(),
            };
            return Err(closed("NR", "no listener", &why));
        };
        side.logged.listener = arrival.listener.name.to_string();
        let steps = &mut side.steps;
        steps.push(Step::new("listener", &*arrival.listener.name));
        let Some(chain) = arrival.chain else {
            steps.push(Step::new("filter chain", "none fits").fact(seen(&dial, &arrival)).end());
            return Err(closed("NR", "filter_chain_not_found", "no filter chain fits the connection"));
        };
        let name = if chain.name.is_empty() { "(unnamed)" } else { &chain.name };
        side.logged.filter_chain = chain.name.to_string();
        steps.push(Step::new("filter chain", name).fact(seen(&dial, &arrival)));
        let terminates = chain.tls.as_ref();
        match (terminates, &dial.tls) {
            (Some(_), None) => {
                steps.push(Step::new("tls", "the chain wants TLS, plain text comes").end());
                return Err(closed("-", "TLS_error", "plain text where TLS is wanted"));
            }
            (Some(tls), Some(client)) if tls.require_client_certificate && !client.certificate => {
                steps.push(Step::new("tls", "the chain wants a client certificate, none comes").end());
                return Err(closed("-", "TLS_error:peer_did_not_return_a_certificate", "no client certificate"));
            }
            (Some(tls), Some(_)) => {
                let word = if tls.require_client_certificate { "mutual, terminated here" } else { "terminated here" };
                let mut step = Step::new("tls", word);
                if let Some(peer) = peer {
                    step = step.fact(format!("they are {peer}"));
                }
                if let Some(pod) = self.pod {
                    step = step.fact(format!("we are   {}", pod.identity));
                }
                steps.push(step);
            }
            (None, _) => {}
        }
        let connection = Arc::new(self.connection(&dial, &arrival, chain, peer));
        for filter in &chain.filters {
            if let NetworkFilter::Rbac(rbac) = filter {
                let verdict = rbac.check(&RbacInput {
                    headers: None,
                    connection: &connection,
                    remote: &connection.remote,
                    metadata: &Metadata::default(),
                    filter_state: &FilterState::default(),
                    route: None,
                    stream: None,
                });
                steps.extend(verdict_step(rbac, &verdict, self.mesh, self.pod));
                if !verdict.allowed {
                    return Err(closed("UAEX", &verdict.details(), "denied by an AuthorizationPolicy"));
                }
            }
        }
        match &chain.terminal {
            Terminal::TcpProxy(proxy) => {
                let (cluster, metadata_match) = proxy.cluster(random);
                side.logged.cluster = cluster.to_string();
                let departure = Departure {
                    at: self.at,
                    mesh: self.mesh,
                    cluster,
                    metadata_match,
                    http: None,
                    payload: dial.payload,
                    original: dial.destination,
                    pod: self.pod,
                    random,
                };
                let mut landing = departure.run(steps)?;
                // What the application encrypted stays encrypted underneath.
                if landing.tls.is_none() && terminates.is_none() {
                    landing.tls.clone_from(&dial.tls);
                }
                Ok((landing, head))
            }
            Terminal::Http(_) if dial.payload == Payload::Opaque || (dial.tls.is_some() && terminates.is_none()) => {
                steps.push(Step::new("protocol", "HTTP is expected, something else comes").end());
                Err(closed("DPE", "http1.codec_error", "the filter chain expects HTTP"))
            }
            Terminal::Http(hcm) => {
                let hop = Hop { at: self.at, mesh: self.mesh, pod: self.pod, hcm, connection: &connection, random };
                let onward = hop.run(head, side)?;
                // The log names a cluster that was found.
                if self.at.cluster(&onward.cluster).is_none() {
                    side.logged.cluster.clear();
                }
                let departure = Departure {
                    at: self.at,
                    mesh: self.mesh,
                    cluster: &onward.cluster,
                    metadata_match: onward.matched.metadata_match(),
                    http: Some(&onward),
                    payload: dial.payload,
                    original: dial.destination,
                    pod: self.pod,
                    random,
                };
                let landing = departure.run(&mut side.steps)?;
                Ok((landing, onward.head))
            }
            Terminal::DirectResponse(bytes) => {
                steps.push(Step::new("action", format!("{} fixed bytes are sent back", bytes.len())).end());
                Err(closed("-", "", "the listener answers by itself"))
            }
            Terminal::Echo | Terminal::Close => {
                steps.push(Step::new("action", "the connection is closed").end());
                Err(closed("-", "", "the listener leads nowhere"))
            }
        }
    }

    fn connection(
        &self,
        dial: &Dial,
        arrival: &Arrival<'_>,
        chain: &proxy_core::FilterChain,
        peer: Option<&str>,
    ) -> ConnectionInfo {
        let certificate =
            |uri: &str| PeerCertificate { validated: true, uri_sans: vec![uri.into()], ..PeerCertificate::default() };
        let tls = chain.tls.as_ref().map(|_| {
            Arc::new(TlsInfo {
                server_name: (!arrival.server_name.is_empty()).then(|| arrival.server_name.as_str().into()),
                peer: peer.map(certificate),
                local: self.pod.map(|pod| certificate(&pod.identity)),
                ..TlsInfo::default()
            })
        });
        ConnectionInfo {
            remote: Address::Ip(dial.source),
            direct_remote: Address::Ip(dial.source),
            local: Address::Ip(dial.destination),
            server_name: (!arrival.server_name.is_empty()).then(|| arrival.server_name.as_str().into()),
            transport_protocol: if arrival.saw_tls { "tls" } else { "raw_buffer" },
            application_protocols: arrival.protocols.clone(),
            tls,
            listener: arrival.listener.name.clone(),
            filter_chain: chain.name.clone(),
            direction: arrival.listener.direction,
            ..ConnectionInfo::default()
        }
    }
}

/// What the choice of a filter chain looked at.
fn seen(dial: &Dial, arrival: &Arrival<'_>) -> String {
    let protocols: Vec<_> = arrival.protocols.iter().map(|p| String::from_utf8_lossy(p).into_owned()).collect();
    let mut text = format!("for {}, {}", dial.destination, if arrival.saw_tls { "TLS" } else { "no TLS seen" });
    if !arrival.server_name.is_empty() {
        text = format!("{text}, SNI {}", arrival.server_name);
    }
    if !protocols.is_empty() {
        text = format!("{text}, {}", protocols.join(","));
    }
    text
}
