//! From an accepted socket to a filter chain: original destination, inspection, chain match, TLS, network filters.

mod secure;

use crate::dns;
use crate::inspect::{self, HttpVersion, Look};
use crate::io::{Io, Raw};
use crate::runtime::{ChainEntry, ListenerEntry};
use crate::socket::{self, Bound};
use crate::stats::{ListenerStats, Named};

use crate::worker::Worker;
use crate::{hcm, overload, tcp};
use mesh_types::ArcStr;
use proxy_core::filters::FilterStateValue;
use proxy_core::listener::{ChainInput, Fingerprints, NetworkFilter, Place, SniForwardProxy, Terminal};
use proxy_core::rbac::Rbac;
use proxy_core::stream_info::ClientFingerprints;
use proxy_core::tlv::{Tlv, TlvRule};
use proxy_core::{Address, ConnectionInfo, FormatContext, Listener, Metadata, ResponseFlags, StreamInfo};
use secure::{Insecure, secure};
use std::cell::{Cell, OnceCell};
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::task::AbortHandle;

/// Accepts on a socket until aborted.
pub(crate) fn accept_on(worker: &Rc<Worker>, name: &ArcStr, bound: Bound) -> io::Result<AbortHandle> {
    let worker = worker.clone();
    let name = name.clone();
    // The worker keeps the handle and aborts it when the listener goes.
    let task = match bound {
        Bound::Tcp(listener) => {
            let listener = TcpListener::from_std(listener)?;
            tokio::task::spawn_local(async move {
                loop {
                    let bypass = bypasses(&worker, &name);
                    overload::may_accept(&worker.shared, bypass).await;
                    tokio::select! {
                        next = listener.accept() => match next {
                            Ok((stream, peer)) => accepted(&worker, &name, Raw::Tcp(stream), Some(peer)),
                            Err(e) => accept_failed(&e).await,
                        },
                        () = overload::must_stop(&worker.shared, bypass) => {}
                    }
                }
            })
        }
        Bound::Unix(listener) => {
            let listener = UnixListener::from_std(listener)?;
            tokio::task::spawn_local(async move {
                loop {
                    let bypass = bypasses(&worker, &name);
                    overload::may_accept(&worker.shared, bypass).await;
                    tokio::select! {
                        next = listener.accept() => match next {
                            Ok((stream, _)) => accepted(&worker, &name, Raw::Unix(stream), None),
                            Err(e) => accept_failed(&e).await,
                        },
                        () = overload::must_stop(&worker.shared, bypass) => {}
                    }
                }
            })
        }
    };
    Ok(task.abort_handle())
}

/// Whether a listener accepts connections whatever runs short, as it is now.
fn bypasses(worker: &Worker, name: &ArcStr) -> bool {
    worker.shared.overload.get().is_some()
        && worker.shared.listeners.load().by_name.get(name).is_some_and(|entry| entry.listener.bypass_overload)
}

/// Out of descriptors or memory: accepting again at once would spin.
async fn accept_failed(e: &io::Error) {
    tracing::warn!(error = %e, "accept failed");
    tokio::time::sleep(Duration::from_millis(20)).await;
}

fn accepted(worker: &Rc<Worker>, name: &ArcStr, raw: Raw, peer: Option<SocketAddr>) {
    let Some(entry) = worker.shared.listeners.load().by_name.get(name).cloned() else { return };
    let stats = worker.listener_stats(&entry.listener.stat_prefix);
    let admitted = overload::admit(&worker.shared, &entry.listener, &stats, &mut worker.random.borrow_mut());
    let Some(admitted) = admitted else { return };
    worker.connections.set(worker.connections.get() + 1);
    worker.tick();
    let open = Open { worker: worker.clone(), stats: OnceCell::new(), since: std::time::Instant::now() };
    let worker = worker.clone();
    // A connection is its own owner; it ends with its peer, its timeouts, or the worker's runtime.
    tokio::task::spawn_local(async move {
        let _admitted = admitted;
        // Each phase is in a box of its own: a connection has memory for the one that it is in.
        let establishing = Box::pin(establish(worker, entry, stats, raw, peer, &open));
        let Some(connection) = establishing.await else { return };
        run_chain(connection).await;
    });
}

struct Open {
    worker: Rc<Worker>,
    /// Where it counts.
    stats: OnceCell<Arc<ListenerStats>>,
    since: std::time::Instant,
}

impl Open {
    /// The connection has a filter chain: only then it counts (Envoy `ActiveTcpListener::newConnection`).
    fn count(&self, stats: &Arc<ListenerStats>) {
        let stats = self.stats.get_or_init(|| stats.clone());
        stats.downstream_cx_total.inc();
        // Each is accepted for itself.
        stats.connections_accepted_per_socket_event.record(1);
        stats.downstream_cx_active.inc();
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(stats) = self.stats.get() {
            stats.downstream_cx_active.dec();
            stats.downstream_cx_destroy.inc();
            stats.downstream_cx_length_ms.record(self.since.elapsed().as_millis() as u64);
        }
        self.worker.connections.set(self.worker.connections.get() - 1);
    }
}

/// What a chain's terminal filter needs of a connection.
pub(crate) struct Connection {
    pub(crate) worker: Rc<Worker>,
    pub(crate) listener: Arc<Listener>,
    pub(crate) chain: Arc<ChainEntry>,
    pub(crate) original_dst: Option<SocketAddr>,
    pub(crate) info: Arc<ConnectionInfo>,
    pub(crate) io: Io,
}

/// Finds the chain of a connection and makes it secure. `None`: it is over.
async fn establish(
    worker: Rc<Worker>,
    entry: Arc<ListenerEntry>,
    stats: Arc<ListenerStats>,
    mut raw: Raw,
    peer: Option<SocketAddr>,
    open: &Open,
) -> Option<Connection> {
    let worker = &worker;
    let local = match &raw {
        Raw::Tcp(stream) => match stream.local_addr() {
            Ok(local) => Address::Ip(unmapped(local)),
            Err(_) => return None,
        },
        Raw::Unix(_) => entry.listener.address.clone(),
    };
    let mut facts = Facts {
        // A client without a name of its own is known by the name it came to (Envoy `addressFromSockAddr…`).
        remote: peer.map_or_else(|| local.clone(), |p| Address::Ip(unmapped(p))),
        local,
        ..Facts::default_for(&entry)
    };
    facts.direct_remote = facts.remote.clone();
    let first = entry.listener.clone();
    let entry = match hand_over(worker, entry, &mut raw, &mut facts).await {
        Ok(entry) => entry,
        Err(e) => {
            tracing::debug!(error = %e, "listener filter failed");
            if e.kind() == io::ErrorKind::UnexpectedEof {
                stats.downstream_listener_filter_remote_close.inc();
            }
            log_early_end(worker, &first, facts);
            return None;
        }
    };
    let stats = worker.listener_stats(&entry.listener.stat_prefix);
    if inspect_within(worker, &entry.listener, &mut raw, &mut facts, &stats).await.is_err() {
        log_early_end(worker, &entry.listener, facts);
        return None;
    }
    let input = ChainInput {
        destination: &facts.local,
        source: &facts.remote,
        direct_source: &facts.direct_remote,
        server_name: facts.server_name.as_deref().unwrap_or_default(),
        transport_protocol: if facts.tls { "tls" } else { "raw_buffer" },
        application_protocols: &facts.alpn,
    };
    let chain = entry.listener.find_chain(&input).and_then(|c| entry.entry_of(c)).cloned();
    let Some(chain) = chain else {
        stats.no_filter_chain_match.inc();
        let info = Arc::new(facts.into_info(worker, &entry.listener, None));
        log_no_chain(worker, &entry.listener, info);
        return None;
    };
    open.count(&stats);
    let original_dst = facts.original_dst;
    let (io, tls) = match secure(worker, &chain, &stats, raw).await {
        Ok(secured) => secured,
        Err(Insecure { reason, tls }) => {
            let mut info = facts.into_info(worker, &entry.listener, Some(&chain));
            info.transport_failure = Some(reason).filter(|reason| !reason.is_empty());
            info.tls = tls.map(|tls| Arc::new(*tls));
            Box::pin(give_up(worker, &entry.listener, &chain, Arc::new(info), original_dst)).await;
            return None;
        }
    };
    facts.tls |= tls.is_some();
    let mut info = facts.into_info(worker, &entry.listener, Some(&chain));
    info.tls = tls.map(Arc::new);
    Some(Connection {
        worker: worker.clone(),
        listener: entry.listener.clone(),
        chain: chain.clone(),
        original_dst,
        info: Arc::new(info),
        io,
    })
}

/// An IPv4 peer of an IPv6 socket is an IPv4 peer.
fn unmapped(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::from((v4, v6.port())),
            None => addr,
        },
        SocketAddr::V4(_) => addr,
    }
}

/// What is found out about a connection before its chain is chosen.
struct Facts {
    remote: Address,
    direct_remote: Address,
    local: Address,
    server_name: Option<ArcStr>,
    alpn: Vec<Vec<u8>>,
    tls: bool,
    fingerprints: ClientFingerprints,
    /// Why the first bytes are none of TLS, if that was asked.
    no_tls: Option<&'static str>,
    original_dst: Option<SocketAddr>,
    /// The further fields of its PROXY header, and the listener that read them.
    header: Option<(Arc<Listener>, Vec<Tlv>)>,
}

impl Facts {
    fn default_for(entry: &ListenerEntry) -> Self {
        Self {
            remote: entry.listener.address.clone(),
            direct_remote: entry.listener.address.clone(),
            local: entry.listener.address.clone(),
            server_name: None,
            alpn: Vec::new(),
            tls: false,
            fingerprints: ClientFingerprints::default(),
            no_tls: None,
            original_dst: None,
            header: None,
        }
    }

    fn into_info(self, worker: &Worker, listener: &Listener, chain: Option<&ChainEntry>) -> ConnectionInfo {
        let mut info = ConnectionInfo {
            id: worker.shared.next_id(),
            remote: self.remote,
            direct_remote: self.direct_remote,
            local: self.local,
            server_name: self.server_name,
            transport_protocol: if self.tls { "tls" } else { "raw_buffer" },
            application_protocols: self.alpn,
            fingerprints: self.fingerprints,
            transport_failure: self.no_tls.map(ArcStr::from),
            listener: listener.name.clone(),
            filter_chain: chain.map_or_else(|| "".into(), |c| c.chain.name.clone()),
            direction: listener.direction,
            listener_metadata: Some(listener.metadata.clone()).filter(|metadata| !metadata.is_empty()),
            filter_chain_metadata: chain.map(|c| c.chain.metadata.clone()).filter(|metadata| !metadata.is_empty()),
            node: Some(worker.shared.node.facts.clone()),
            environment: |name| std::env::var(name).ok(),
            clock: SystemTime::now,
            ..ConnectionInfo::default()
        };
        let header = self.header.as_ref().filter(|(_, tlvs)| !tlvs.is_empty());
        if let Some((config, tlvs)) = header.and_then(|(l, tlvs)| Some((l.inspect.proxy_protocol.as_ref()?, tlvs))) {
            match config.in_filter_state {
                true => TlvRule::keep(&config.rules, tlvs, &mut info.filter_state),
                false => info.metadata = TlvRule::tell(&config.rules, tlvs),
            }
            info.tlvs = tlvs.iter().filter(|tlv| config.passed.passes(tlv.kind)).cloned().collect();
        }
        info
    }
}

/// Runs the address-changing listener filters and finds the listener that the connection belongs to.
async fn hand_over(
    worker: &Rc<Worker>,
    entry: Arc<ListenerEntry>,
    raw: &mut Raw,
    facts: &mut Facts,
) -> io::Result<Arc<ListenerEntry>> {
    let Raw::Tcp(stream) = raw else { return Ok(entry) };
    let listener = &entry.listener;
    let mut restored = None;
    if listener.inspect.original_dst || listener.use_original_dst {
        // With TPROXY the local address is the original destination already.
        restored = if listener.transparent { facts.local.socket() } else { socket::original_destination(stream) };
        if let Some(destination) = restored {
            facts.local = Address::Ip(unmapped(destination));
            facts.original_dst = Some(unmapped(destination));
        }
    }
    if let Some(config) = listener.inspect.reads_header(facts.local.port().unwrap_or_default()) {
        let stats = worker.named_stats();
        let tlvs = crate::proxy_protocol::read(stream, config, &mut facts.remote, &mut facts.local, stats).await?;
        facts.header = Some((listener.clone(), tlvs));
    }
    if !listener.use_original_dst || restored.is_none() {
        return Ok(entry);
    }
    let Some(destination) = facts.local.socket() else { return Ok(entry) };
    let listeners = worker.shared.listeners.load();
    let target = listeners.set.find_original_dst(listener, destination);
    Ok(listeners.by_name.get(&target.name).cloned().unwrap_or(entry))
}

enum Ended {
    Closed,
    Timeout,
}

async fn inspect_within(
    worker: &Worker,
    listener: &Listener,
    raw: &mut Raw,
    facts: &mut Facts,
    stats: &ListenerStats,
) -> Result<(), Ended> {
    let port = facts.local.port().unwrap_or(0);
    let (tls, http) = (listener.inspect.needs_tls(port), listener.inspect.needs_http(port));
    let Raw::Tcp(stream) = raw else { return Ok(()) };
    if !tls && !http {
        return Ok(());
    }
    let timeout = listener.listener_filters_timeout;
    stats.downstream_pre_cx_active.inc();
    let wanted = tls.then_some(listener.inspect.fingerprints);
    let look = look(stream, wanted, http, facts, worker.named_stats());
    let result = if timeout.is_zero() { Ok(look.await) } else { tokio::time::timeout(timeout, look).await };
    stats.downstream_pre_cx_active.dec();
    match result {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => {
            stats.downstream_listener_filter_remote_close.inc();
            Err(Ended::Closed)
        }
        Err(_) => {
            stats.downstream_pre_cx_timeout.inc();
            if listener.continue_on_listener_filters_timeout { Ok(()) } else { Err(Ended::Timeout) }
        }
    }
}

/// Peeks until TLS and HTTP inspection have made up their minds. The bytes stay in the socket.
async fn look(
    stream: &TcpStream,
    mut tls: Option<Fingerprints>,
    http: bool,
    facts: &mut Facts,
    stats: &Named,
) -> io::Result<()> {
    let mut buf = vec![0u8; 2048];
    let mut seen = 0;
    loop {
        let n = stream.peek(&mut buf).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(wanted) = tls {
            match inspect::client_hello(&buf[..n]) {
                Look::Found(hello) => {
                    stats.inc("tls_inspector.tls_found");
                    let known = |found: bool, what: [&'static str; 2]| stats.inc(what[usize::from(found)]);
                    known(hello.server_name.is_some(), ["tls_inspector.sni_not_found", "tls_inspector.sni_found"]);
                    known(!hello.alpn.is_empty(), ["tls_inspector.alpn_not_found", "tls_inspector.alpn_found"]);
                    facts.tls = true;
                    facts.server_name = hello.server_name.map(ArcStr::from);
                    facts.alpn = hello.alpn;
                    let offer = (wanted != Fingerprints::default()).then(|| inspect::Offer::of(&buf[..n])).flatten();
                    facts.fingerprints = ClientFingerprints {
                        ja3: offer.as_ref().filter(|_| wanted.ja3).map(|offer| offer.ja3().into()),
                        ja4: offer.as_ref().filter(|_| wanted.ja4).map(|offer| offer.ja4().into()),
                    };
                    return Ok(());
                }
                Look::No => {
                    stats.inc("tls_inspector.tls_not_found");
                    facts.no_tls = Some(inspect::why_no_hello(&buf[..n]));
                    tls = None;
                }
                Look::More => {}
            }
        }
        if tls.is_none() {
            if !http {
                return Ok(());
            }
            match inspect::http(&buf[..n]) {
                Look::Found(version) => {
                    let (name, counter): (&[u8], _) = match version {
                        HttpVersion::Http10 => (b"http/1.0", "http_inspector.http10_found"),
                        HttpVersion::Http11 => (b"http/1.1", "http_inspector.http11_found"),
                        HttpVersion::Http2 => (b"h2c", "http_inspector.http2_found"),
                    };
                    stats.inc(counter);
                    facts.alpn = vec![name.to_vec()];
                    return Ok(());
                }
                Look::No => {
                    stats.inc("http_inspector.http_not_found");
                    return Ok(());
                }
                Look::More => {}
            }
        }
        if socket::peer_is_done(stream) && stream.peek(&mut buf).await? == n {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if n == buf.len() {
            if n >= inspect::MAX_HELLO + 1024 {
                return Ok(());
            }
            buf.resize(n * 2, 0);
        } else if n == seen {
            // Level-triggered readiness with nothing new: a peek leaves the bytes, so the socket stays readable.
            tokio::time::sleep(PEEK_AGAIN).await;
        }
        seen = n;
    }
}

/// A ClientHello that comes in pieces is looked at again after this.
const PEEK_AGAIN: Duration = Duration::from_millis(1);

/// The listener's record of a connection that ended before it had a filter chain.
fn log_early_end(worker: &Rc<Worker>, listener: &Listener, facts: Facts) {
    if listener.access_log.is_empty() {
        return;
    }
    let info = Arc::new(facts.into_info(worker, listener, None));
    let mut stream = StreamInfo::new(info, SystemTime::now());
    stream.times.complete = Some(Duration::ZERO);
    crate::log::write(worker, &listener.access_log, &FormatContext::new(&stream, None, None));
}

fn log_no_chain(worker: &Rc<Worker>, listener: &Listener, info: Arc<ConnectionInfo>) {
    let mut stream = StreamInfo::new(info, SystemTime::now());
    stream.flags.insert(ResponseFlags::NO_ROUTE);
    stream.response_code_details = Some("filter_chain_not_found".into());
    stream.times.complete = Some(Duration::ZERO);
    let context = FormatContext::new(&stream, None, None);
    crate::log::write(worker, &listener.access_log, &context);
}

/// A connection whose handshake failed. To Envoy it was there for the chain's filters all the same: connection managers
/// have counted it, and `tcp_proxy` has connected to its host.
async fn give_up(
    worker: &Rc<Worker>,
    listener: &Listener,
    chain: &ChainEntry,
    mut info: Arc<ConnectionInfo>,
    original_dst: Option<SocketAddr>,
) {
    for filter in &chain.chain.filters {
        if let NetworkFilter::SetFilterState(values) = filter {
            write_state(&mut info, values);
        }
    }
    let mut stream = match &chain.chain.terminal {
        Terminal::TcpProxy(proxy) => tcp::give_up(worker, proxy, info, original_dst).await,
        Terminal::Http(http) => {
            hcm::count_unserved(&worker.http_stats(&http.stat_prefix), true).downstream_cx_destroy_remote.inc();
            StreamInfo::new(info, SystemTime::now())
        }
        Terminal::DirectResponse(_) | Terminal::Echo | Terminal::Close => StreamInfo::new(info, SystemTime::now()),
    };
    stream.times.complete = Some(Duration::ZERO);
    crate::log::write(worker, &listener.access_log, &FormatContext::new(&stream, None, None));
}
/// What the filters of a chain leave to its terminal one.
#[derive(Default)]
struct Passed {
    /// Chosen by `sni_cluster`.
    cluster: Option<ArcStr>,
    /// Asked at the client's first byte.
    gates: Vec<Arc<Rbac>>,
    /// Held until the connection ends.
    places: Vec<Place>,
    gauges: Vec<Counted>,
}

/// A connection in a gauge.
struct Counted {
    worker: Rc<Worker>,
    name: String,
}

impl Counted {
    fn new(worker: &Rc<Worker>, name: String) -> Self {
        worker.named_stats().shift(&name, true);
        Self { worker: worker.clone(), name }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.worker.named_stats().shift(&self.name, false);
    }
}

/// Has the SNI looked up (Envoy `ProxyFilter::onNewConnection`): the connection goes on either way.
async fn resolve_name(connection: &mut Connection, filter: &SniForwardProxy) {
    let worker = connection.worker.clone();
    let Some(name) = connection.info.server_name.clone() else { return };
    let port = filter.port.or_else(|| connection.info.local.port()).unwrap_or(443);
    let names = worker.shared.names.get(&worker.shared, &filter.cache);
    names.look_up(&worker.shared, &dns::key_of(&name, port), port).await;
    let state = &mut Arc::make_mut(&mut connection.info).filter_state.values;
    state.insert("envoy.upstream.dynamic_port".into(), port.to_string().into());
}

/// What a `set_filter_state` filter does when a connection comes.
fn write_state(connection: &mut Arc<ConnectionInfo>, values: &[FilterStateValue]) {
    let info = StreamInfo::new(connection.clone(), SystemTime::now());
    let context = FormatContext::new(&info, None, None);
    let mut state = info.filter_state.clone();
    for value in values {
        value.apply(&context, &mut state);
    }
    Arc::make_mut(connection).filter_state = state;
}

/// Runs the filters in front of the terminal one; an error ends the connection.
async fn pass_filters(connection: &mut Connection) -> Result<Passed, Refused> {
    let chain = connection.chain.clone();
    let worker = connection.worker.clone();
    let mut passed = Passed::default();
    for filter in &chain.chain.filters {
        match filter {
            // The check happens at the client's first byte, as in Envoy.
            NetworkFilter::Rbac(rbac) => passed.gates.push(rbac.clone()),
            NetworkFilter::SniDynamicForwardProxy(forward) => Box::pin(resolve_name(connection, forward)).await,
            NetworkFilter::SniCluster => passed.cluster = connection.info.server_name.clone(),
            NetworkFilter::SetFilterState(values) => write_state(&mut connection.info, values),
            // Who the peer is and what is counted of it is for the terminal filter.
            NetworkFilter::MetadataExchange(_) | NetworkFilter::IstioStats(_) | NetworkFilter::NoOp { .. } => {}
            NetworkFilter::LocalRateLimit(limit) => {
                let name = format!("local_rate_limit.{}.rate_limited", limit.stat_prefix);
                worker.named_stats().touch(&name);
                if limit.enabled.get() && !limit.take(std::time::Instant::now()) {
                    worker.named_stats().inc(&name);
                    return Err(Refused {
                        flags: ResponseFlags::UPSTREAM_RETRY_LIMIT,
                        reason: Some("local_ratelimit_close_over_limit"),
                        ..Refused::default()
                    });
                }
            }
            NetworkFilter::ConnectionLimit(limit) => {
                let prefix = &limit.stat_prefix;
                worker.named_stats().touch(&format!("connection_limit.{prefix}.limited_connections"));
                if !limit.enabled.get() {
                    continue;
                }
                passed.gauges.push(Counted::new(&worker, format!("connection_limit.{prefix}.active_connections")));
                match limit.enter() {
                    Some(place) => passed.places.push(place),
                    None => {
                        worker.named_stats().inc(&format!("connection_limit.{prefix}.limited_connections"));
                        if let Some(delay) = limit.delay {
                            let _place = limit.overfill();
                            tokio::time::sleep(delay).await;
                        }
                        return Err(Refused { reason: Some("over_connection_limit"), ..Refused::default() });
                    }
                }
            }
            NetworkFilter::ExtAuthz(config) => {
                // Asked at the first byte, as by Envoy.
                poll_fn(|cx| connection.io.poll_first_byte(cx)).await;
                if !Box::pin(tcp::check_authz(connection, config)).await {
                    return Err(Refused::default());
                }
            }
        }
    }
    for rbac in &passed.gates {
        tcp::touch_rbac(&worker, rbac);
    }
    Ok(passed)
}

/// Why a filter has a connection end.
#[derive(Default)]
struct Refused {
    flags: ResponseFlags,
    /// `CONNECTION_TERMINATION_DETAILS`.
    details: Option<String>,
    /// `DOWNSTREAM_LOCAL_CLOSE_REASON`.
    reason: Option<&'static str>,
    /// What the filter has seen.
    bytes_received: u64,
}

/// Reads once, as Envoy does before it asks filters, and says how much that was.
async fn take_what_came(io: &mut Io) -> u64 {
    let mut bytes = vec![0; 16 * 1024];
    let mut bytes = ReadBuf::new(&mut bytes);
    poll_fn(|cx| {
        // Nothing to be read, or a client that is gone: nothing came.
        let _ = Pin::new(&mut *io).poll_read(cx, &mut bytes);
        Poll::Ready(())
    })
    .await;
    bytes.filled().len() as u64
}

/// Policies in front of anything but `tcp_proxy`, which asks them itself.
async fn pass_gates(connection: &mut Connection, gates: &[Arc<Rbac>]) -> Result<(), Refused> {
    if gates.is_empty() {
        return Ok(());
    }
    let chain = connection.chain.clone();
    // Filters before a connection manager do not keep its idle clients from it.
    let http = match &chain.chain.terminal {
        Terminal::Http(http) => Some(http),
        _ => None,
    };
    let idle = async {
        match http.and_then(|http| http.idle_timeout) {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = poll_fn(|cx| connection.io.poll_first_byte(cx)) => {}
        () = chain.cut() => return Err(Refused::default()),
        () = idle => {
            let stats = http.map(|http| connection.worker.http_stats(&http.stat_prefix));
            stats.iter().for_each(|stats| stats.downstream_cx_idle_timeout.inc());
            return Err(Refused::default());
        }
    }
    for rbac in gates {
        let checked = tcp::check_rbac(&connection.worker, &connection.info, rbac, &mut Metadata::default());
        if let Err(details) = checked {
            let bytes_received = take_what_came(&mut connection.io).await;
            if let Some(delay) = rbac.delay_deny {
                Box::pin(tcp::linger(&mut connection.io, delay, false)).await;
            }
            let reason = Some(tcp::RBAC_DENIED);
            return Err(Refused { details: Some(details), reason, bytes_received, ..Refused::default() });
        }
    }
    Ok(())
}

/// Serves a connection by its chain, then logs it.
// Not an `async fn`, which has memory for two of its argument as long as the connection lives; for the same reason what the log
// says is put together at the end.
fn run_chain(mut connection: Connection) -> impl Future<Output = ()> {
    let chain = connection.chain.clone();
    let listener = connection.listener.clone();
    let worker = connection.worker.clone();
    let start = SystemTime::now();
    async move {
        let passed = Box::pin(pass_filters(&mut connection)).await;
        let info = connection.info.clone();
        let mut stream = match (&chain.chain.terminal, passed) {
            (Terminal::TcpProxy(proxy), Ok(Passed { cluster, gates, places, gauges })) => {
                let stream = Box::pin(tcp::serve(connection, proxy.clone(), cluster, gates)).await;
                drop((places, gauges));
                stream
            }
            (Terminal::TcpProxy(proxy), Err(refused)) => tcp::refuse(&connection, proxy, refused.flags, refused.reason),
            (Terminal::Http(http), passed) => {
                let allowed = match passed {
                    Ok(passed) => pass_gates(&mut connection, &passed.gates).await.map(|()| passed),
                    Err(refused) => Err(refused),
                };
                let (mut details, mut reason) = (None, None);
                let served = match allowed {
                    Ok(_passed) => Box::pin(hcm::serve(connection, http.clone())).await,
                    Err(refused) => {
                        let stats = worker.http_stats(&http.stat_prefix);
                        hcm::count_unserved(&stats, info.tls.is_some()).downstream_cx_destroy_local.inc();
                        (details, reason) = (refused.details, refused.reason);
                        let Refused { flags, bytes_received, .. } = refused;
                        hcm::Served { flags, bytes_received, ..hcm::Served::default() }
                    }
                };
                let hcm::Served { protocol, bytes_received, bytes_sent, flags } = served;
                let connection_termination_details = details.map(Into::into);
                StreamInfo {
                    protocol,
                    bytes_received,
                    bytes_sent,
                    flags,
                    connection_termination_details,
                    local_close_reason: reason.map(Into::into),
                    ..StreamInfo::new(info, start)
                }
            }
            (_, Err(Refused { flags, reason, .. })) => {
                StreamInfo { flags, local_close_reason: reason.map(Into::into), ..StreamInfo::new(info, start) }
            }
            // It speaks first, so that nobody is asked.
            (Terminal::DirectResponse(bytes), Ok(_)) => {
                Box::pin(tcp::respond(connection, bytes.clone())).await;
                let mut stream = StreamInfo::new(info, start);
                stream.response_code_details = Some("direct_response".into());
                stream.bytes_sent = bytes.len() as u64;
                stream
            }
            (Terminal::Echo, Ok(passed)) => {
                let allowed = pass_gates(&mut connection, &passed.gates).await;
                let bytes = Cell::new(0);
                if allowed.is_ok() {
                    tokio::select! {
                        () = Box::pin(tcp::echo(connection, &bytes)) => {}
                        () = chain.cut() => {}
                    }
                }
                let refused = allowed.err().unwrap_or_default();
                StreamInfo {
                    connection_termination_details: refused.details.map(Into::into),
                    local_close_reason: refused.reason.map(Into::into),
                    bytes_received: bytes.get() + refused.bytes_received,
                    bytes_sent: bytes.get(),
                    ..StreamInfo::new(info, start)
                }
            }
            (Terminal::Close, Ok(_)) => StreamInfo::new(info, start),
        };
        if !listener.access_log.is_empty() {
            stream.local_close_reason = stream.local_close_reason.or_else(|| chain.cut_reason());
            stream.times.complete = start.elapsed().ok();
            crate::log::write(&worker, &listener.access_log, &FormatContext::new(&stream, None, None));
        }
    }
}
