//! The HTTP filters before the router, in their configured order. Decisions are proxy-core's; this carries them out.

use super::encode::{AddToAnswer, Session, Throttle};
use super::exchange::{Exchange, Stop};
use super::grpc_web::GrpcWeb;
use super::local_reply::LocalReply;
use super::{Http, authz, ext_authz, limits};
use crate::dns::{self, Lookup};
use crate::stream::{BodyError, Frame, RecvBody};
use bytes::Bytes;
use mesh_types::ArcStr;
use proxy_core::cluster::Discovery;
use proxy_core::endpoints::Health;
use proxy_core::filters::{
    Abort, CorsDecision, Delegates, Execution, FilterAction, FilterStateValue, ForwardProxy, HeaderMutation,
    HealthCheckFilter, HostRewrite, HttpFilter, HttpFilterEntry, PerFilter,
};
use proxy_core::match_tree::{MatchData, Outcome};
use proxy_core::rbac::{HTTP_NAMESPACE, RbacInput, note};
use proxy_core::route::Matched;
use proxy_core::{FormatContext, Headers, ResponseFlags};
use serde_json::{Map, Value};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::Instant;

/// Whether a filter takes part, and its settings at the request's route.
pub(super) fn settings(exchange: &Exchange, entry: &HttpFilterEntry) -> (bool, Option<PerFilter>) {
    let per = exchange.matched.as_ref().and_then(|m| m.per_filter(&entry.name));
    let enabled = match per {
        Some(PerFilter::Disabled) => false,
        Some(_) => true,
        None => !entry.disabled,
    };
    let enabled = enabled
        && !exchange.passed_over.iter().any(|over| matches!(over.decided, Some(Decision::Pass)) && over.is(entry));
    if per.is_none() {
        return (enabled, None);
    }
    // What only switches it on leaves its settings to the levels around.
    let all = exchange.matched.as_ref().into_iter().flat_map(|m| m.per_filters(&entry.name));
    let own = all.filter_map(PerFilter::settings).find(|per| !matches!(per, PerFilter::Disabled));
    (enabled, own.cloned())
}

/// Decides whether a filter that may be passed over is, as far as that can be told by now. What is decided once counts for
/// request and answer (Envoy `DelegatingStreamFilter`).
pub(super) fn pass_over(exchange: &mut Exchange, entry: &HttpFilterEntry, response: Option<&Headers>) {
    let Some(own) = &entry.tree else { return };
    let known = exchange.passed_over.iter().position(|over| over.is(entry));
    if known.is_some_and(|at| exchange.passed_over[at].decided.is_some()) {
        return;
    }
    // A filter that has not seen the request knows neither its head nor its route.
    let reached = known.is_some() || response.is_none();
    let of_route = exchange.matched.as_ref().and_then(|m| m.per_filter(&entry.name)).and_then(PerFilter::settings);
    let tree = match of_route {
        Some(PerFilter::Tree(tree)) if reached => tree,
        _ => own,
    };
    let data = MatchData::of_stream(&exchange.info, reached.then_some(&exchange.request), response);
    let decided = match tree.evaluate(&data) {
        Outcome::Found(FilterAction::Skip) => Some(Decision::Pass),
        Outcome::Found(FilterAction::Execute(execution)) => {
            let execution = execution.clone();
            Some(delegate(exchange, entry, &execution))
        }
        Outcome::Nothing => Some(Decision::Stay),
        Outcome::Unknown => None,
    };
    match known {
        Some(at) => exchange.passed_over[at].decided = decided,
        None => exchange.passed_over.push(PassedOver { entry, decided }),
    }
}

/// What is known of a filter that may be passed over.
pub(super) struct PassedOver {
    /// Which: names may stand there twice.
    entry: *const HttpFilterEntry,
    decided: Option<Decision>,
}

impl PassedOver {
    fn is(&self, entry: &HttpFilterEntry) -> bool {
        std::ptr::eq(self.entry, entry)
    }
}

/// What becomes of a filter with a tree.
enum Decision {
    /// It takes part.
    Stay,
    /// It is passed over.
    Pass,
    /// These take part in its place.
    Delegate(Delegates),
}

/// The filters that do the work of a composite one (Envoy `Composite::Filter::onMatchCallback`).
fn delegate(exchange: &mut Exchange, entry: &HttpFilterEntry, execution: &Execution) -> Decision {
    let HttpFilter::Composite(composite) = &entry.filter else { return Decision::Stay };
    let http = exchange.http.clone();
    if !settings(exchange, entry).0 || !execution.hit(&mut http.worker.random.borrow_mut()) {
        return Decision::Stay;
    }
    let Some(filters) = execution.filters(composite) else { return Decision::Stay };
    http.stats.other.inc(DELEGATIONS);
    let values = &mut exchange.info.filter_state.values;
    let mut actions: Map<String, Value> =
        values.get(MATCHED_ACTIONS).and_then(|known| serde_json::from_str(known).ok()).unwrap_or_default();
    actions.insert(entry.name.to_string(), execution.name.to_string().into());
    values.insert(MATCHED_ACTIONS.into(), Value::Object(actions).to_string().into());
    Decision::Delegate(filters.clone())
}

/// How often composite filters found others; nothing of what can be found here fails (`filter_delegation_error`).
const DELEGATIONS: &str = "composite.filter_delegation_success";
pub(super) const DELEGATION_COUNTERS: [&str; 2] = ["composite.filter_delegation_error", DELEGATIONS];

/// Which actions the trees of composite filters led to, by the filters' names.
const MATCHED_ACTIONS: &str = "envoy.extensions.filters.http.composite.matched_actions";

/// The filters that do the work of a composite one, if any were found.
pub(super) fn delegates<'a>(exchange: &'a Exchange, entry: &HttpFilterEntry) -> Option<&'a Delegates> {
    let known = exchange.passed_over.iter().find(|over| over.is(entry));
    match known?.decided.as_ref()? {
        Decision::Delegate(filters) => Some(filters),
        _ => None,
    }
}

/// The filters that take part as this one, in order: itself, or those that do its work.
pub(super) fn acting<'a>(exchange: &'a Exchange, entry: &'a HttpFilterEntry) -> &'a [HttpFilterEntry] {
    match entry.filter {
        HttpFilter::Composite(_) => delegates(exchange, entry).map(|filters| &**filters).unwrap_or_default(),
        _ => std::slice::from_ref(entry),
    }
}

/// The changes of headers that a filter, a route and the levels around it want, in the order in which they are made.
pub(super) fn mutations<'a>(
    own: &'a HeaderMutation,
    matched: Option<&'a Matched>,
    name: &'a str,
) -> impl Iterator<Item = &'a HeaderMutation> {
    let mut levels = matched.into_iter().flat_map(|m| m.per_filters(name)).filter_map(|per| match per.settings() {
        Some(PerFilter::HeaderMutation(changes)) => Some(&**changes),
        _ => None,
    });
    let next = move || if own.most_specific_wins { levels.next_back() } else { levels.next() };
    std::iter::once(own).chain(std::iter::from_fn(next))
}

fn set_filter_state(exchange: &mut Exchange, values: &[FilterStateValue]) {
    for value in values {
        let mut state = std::mem::take(&mut exchange.info.filter_state);
        value.apply(&FormatContext::new(&exchange.info, Some(&exchange.request), None), &mut state);
        exchange.info.filter_state = state;
    }
}

/// Runs them all; an error is the answer instead of the router's.
pub(super) async fn run(exchange: &mut Exchange, body: &mut RecvBody) -> Result<(), Stop> {
    let http = exchange.http.clone();
    for entry in exchange.filters(&http.config) {
        if matches!(entry.filter, HttpFilter::Router(_)) {
            return Ok(());
        }
        pass_over(exchange, entry, None);
        if let HttpFilter::Composite(_) = entry.filter {
            let Some(filters) = delegates(exchange, entry).cloned() else { continue };
            for filter in filters.iter() {
                pass(exchange, body, filter).await?;
            }
        } else {
            pass(exchange, body, entry).await?;
        }
    }
    // There is no router: requests are read, and wait for what never comes.
    let mut held = Held::new(exchange, u64::MAX);
    while let Some(frame) = held.next(exchange, body).await? {
        frame.map_err(|e| exchange.client_failed(e))?;
    }
    exchange.request_complete();
    exchange.wait(std::future::pending()).await
}

/// Runs one, if it takes part.
async fn pass(exchange: &mut Exchange, body: &mut RecvBody, entry: &HttpFilterEntry) -> Result<(), Stop> {
    let (enabled, per) = settings(exchange, entry);
    if !enabled {
        return Ok(());
    }
    let steps = exchange.steps.count();
    let done = one(exchange, body, entry, per).await;
    let at = exchange.elapsed();
    match &done {
        Ok(()) if exchange.steps.count() > steps => {}
        Ok(()) => exchange.steps.passed(at, &entry.name),
        Err(Stop::Reply(reply)) => {
            let text = format!("answered {}: {}", reply.status, reply.details);
            exchange.steps.filter(at, &entry.name, text);
        }
        Err(_) => exchange.steps.filter(at, &entry.name, "the client left"),
    }
    done
}

async fn one(
    exchange: &mut Exchange,
    body: &mut RecvBody,
    HttpFilterEntry { name, filter, .. }: &HttpFilterEntry,
    per: Option<PerFilter>,
) -> Result<(), Stop> {
    match filter {
        HttpFilter::Router(_) | HttpFilter::Composite(_) => {}
        HttpFilter::Fault(own) => {
            let fault = match &per {
                Some(PerFilter::Fault(route)) => route,
                _ => own,
            };
            run_fault(exchange, name, fault, own).await?;
        }
        HttpFilter::Cors => cors(exchange, name)?,
        HttpFilter::Rbac(rbac) => {
            let own = match &per {
                Some(PerFilter::Rbac(own)) => own,
                _ => rbac,
            };
            run_rbac(exchange, name, own, rbac)?;
        }
        HttpFilter::LocalRateLimit(limit) => {
            let limit = match &per {
                Some(PerFilter::LocalRateLimit(own)) => own,
                _ => limit,
            };
            limits::run(exchange, limit)?;
        }
        HttpFilter::Buffer(limit) => {
            let limit = match &per {
                Some(PerFilter::Buffer(own)) => *own,
                _ => *limit,
            };
            Box::pin(buffer(exchange, body, limit)).await?;
        }
        // In boxes: few requests need room for these.
        HttpFilter::Jwt(jwt) => Box::pin(authz::jwt(exchange, jwt, per.as_ref())).await?,
        HttpFilter::ExtAuthz(config) => Box::pin(ext_authz::run(exchange, config, per.as_ref(), body)).await?,
        HttpFilter::HeaderMutation(own) => {
            let cx = FormatContext::new(&exchange.info, None, None);
            for changes in mutations(own, exchange.matched.as_deref(), name) {
                changes.request.apply_to_request(&mut exchange.request, &cx);
                changes.query.apply(&mut exchange.request, &cx);
            }
        }
        HttpFilter::HeaderToMetadata(own) => {
            let rules = match &per {
                Some(PerFilter::HeaderToMetadata(route)) => &route.request,
                _ => &own.request,
            };
            let http = exchange.http.clone();
            let count = |name: &str| http.worker.named_stats().inc(name);
            rules.apply(&mut exchange.request, &mut exchange.info.dynamic_metadata, count);
        }
        HttpFilter::SetFilterState(own) => {
            set_filter_state(exchange, own);
            // Those of all levels, the outermost first.
            let matched = exchange.matched.clone();
            let levels = matched.iter().flat_map(|m| m.per_filters(name).rev()).filter_map(PerFilter::settings);
            for level in levels {
                if let PerFilter::SetFilterState(values) = level {
                    set_filter_state(exchange, values);
                }
            }
        }
        HttpFilter::SetMetadata(own) => {
            let denied = own.apply(&mut exchange.info.dynamic_metadata);
            exchange.http.stats.other.add(METADATA_DENIED, denied);
        }
        HttpFilter::StatefulSession(own) => {
            let session = match &per {
                Some(PerFilter::StatefulSession(route)) => route,
                _ => own,
            };
            exchange.session = Some(Session::begin(session, own, &exchange.request));
        }
        HttpFilter::HealthCheck(check) => Box::pin(health_check(exchange, body, check)).await?,
        HttpFilter::DynamicForwardProxy(own) => {
            let rewrite = match &per {
                Some(PerFilter::ForwardProxy(rewrite)) => Some(rewrite),
                _ => None,
            };
            Box::pin(resolve(exchange, own, rewrite)).await?;
        }
        HttpFilter::GrpcWeb => GrpcWeb::begin(exchange),
        HttpFilter::GrpcStats(stats) => exchange.begin_grpc_stats(stats),
        // These act in the router (ALPN, sessions), at the end (metrics), or not at all.
        HttpFilter::IstioAlpn(_)
        | HttpFilter::PeerMetadata(_)
        | HttpFilter::IstioStats(_)
        | HttpFilter::NoOp { .. } => {}
    }
    Ok(())
}

/// Counters of the fault filter.
pub(super) const FAULT_COUNTERS: [&str; 4] =
    ["fault.aborts_injected", "fault.delays_injected", "fault.faults_overflow", "fault.response_rl_injected"];

/// Counters of the health check filter.
pub(super) const HEALTH_COUNTERS: [&str; 8] = [
    "health_check.request_total",
    "health_check.ok",
    "health_check.failed",
    "health_check.degraded",
    "health_check.cached_response",
    "health_check.failed_cluster_not_found",
    "health_check.failed_cluster_empty",
    "health_check.failed_cluster_unhealthy",
];

/// Answers a health check, or lets it through and marks it.
async fn health_check(
    exchange: &mut Exchange,
    body: &mut RecvBody,
    check: &Arc<HealthCheckFilter>,
) -> Result<(), Stop> {
    if !check.is_check(&exchange.request) {
        return Ok(());
    }
    exchange.info.health_check = true;
    exchange.http.stats.other.inc(super::span::HEALTH_CHECK);
    if let Some(span) = &mut exchange.span {
        span.forget();
    }
    let worker = exchange.http.worker.clone();
    let members = |name: &str| {
        let endpoints = worker.cluster(name)?.entry.endpoints.load_full();
        let healthy = endpoints.hosts().filter(|host| host.health() == Health::Healthy).count();
        Some((healthy, endpoints.hosts().count()))
    };
    let failed = worker.shared.health_failed.load(Relaxed);
    let Some(answer) = check.answer(failed, Instant::now(), members) else { return Ok(()) };
    // As Envoy: answered once the whole request is there. A filter before may have read it already.
    let mut size = 0;
    while let Some(frame) = poll_fn(|cx| exchange.poll_with(cx, |cx| body.poll_frame(cx).map(Ok))).await? {
        if let Frame::Data(data) = frame.map_err(|e| exchange.client_failed(e))? {
            size += data.len() as u64;
            exchange.info.bytes_received = exchange.info.bytes_received.max(size);
        }
    }
    exchange.request_complete();
    let mut reply = LocalReply::new(answer.status, "", answer.details);
    let stats = &exchange.http.stats.other;
    let passed = (200..300).contains(&answer.status);
    let [total, ok, failed, degraded, cached, unknown, empty, unhealthy] = HEALTH_COUNTERS;
    stats.inc(total);
    stats.inc(if passed { ok } else { failed });
    if answer.degraded {
        stats.inc(degraded);
    }
    match answer.details {
        "health_check_cached" => stats.inc(cached),
        "health_check_failed_no_cluster_found" => stats.inc(unknown),
        "health_check_failed_cluster_empty" => stats.inc(empty),
        "health_check_failed_cluster_unhealthy" => stats.inc(unhealthy),
        _ => {}
    }
    if !passed {
        reply.flags = ResponseFlags::LOCAL_HEALTH_CHECK_FAILED;
    }
    if answer.degraded {
        reply.headers.push(("x-envoy-degraded".into(), Vec::new()));
    }
    Err(reply.into())
}

/// Resolves the request's host when its route leads to a dynamic forward proxy (Envoy `ProxyFilter::decodeHeaders`).
async fn resolve(exchange: &mut Exchange, filter: &ForwardProxy, rewrite: Option<&HostRewrite>) -> Result<(), Stop> {
    let worker = exchange.http.worker.clone();
    let name = exchange.matched.as_ref().and_then(|matched| matched.cluster(&exchange.request));
    let Some(cluster) = name.and_then(|name| worker.cluster(&name)) else { return Ok(()) };
    let Discovery::DynamicForwardProxy { .. } = &cluster.config().discovery else { return Ok(()) };
    if let Some(rewrite) = rewrite {
        rewrite.apply(&mut exchange.request);
    }
    let stream = filter.from_filter_state.then_some(&exchange.info);
    let Some((key, port)) = dns::name_of(cluster.config(), Some(&exchange.request), stream) else { return Ok(()) };
    let names = worker.shared.names.get(&worker.shared, &filter.cache);
    let found = exchange.wait(names.look_up(&worker.shared, &key, port)).await?;
    let reply = match found {
        Lookup::Found => return Ok(()),
        Lookup::Unknown(_) => {
            LocalReply::new(503, "DNS resolution failure", found.details()).flagged(ResponseFlags::DNS_FAILURE)
        }
        Lookup::Overflow => LocalReply::new(503, "DNS cache overflow", found.details()),
        Lookup::Pending => {
            let body = "Dynamic forward proxy pending request overflow";
            LocalReply::new(503, body, "dynamic_forward_proxy_pending_request_overflow")
        }
    };
    Err(reply.into())
}

/// A request that a fault was done to counts as an active one until it ends, for whatever faults it has.
pub(crate) struct ActiveFault(Rc<Http>);

impl ActiveFault {
    pub(super) const GAUGE: &str = "fault.active_faults";

    fn begin(http: &Rc<Http>) -> Self {
        http.worker.active_faults.set(http.worker.active_faults.get() + 1);
        http.stats.other.shift(Self::GAUGE, true);
        Self(http.clone())
    }
}

impl Drop for ActiveFault {
    fn drop(&mut self) {
        let active = &self.0.worker.active_faults;
        active.set(active.get() - 1);
        self.0.stats.other.shift(Self::GAUGE, false);
    }
}

/// Counts a fault for the client that the request names.
fn fault_of_client(exchange: &Exchange, what: &str) {
    let client = exchange.request.get_str("x-envoy-downstream-service-cluster");
    if let Some(client) = client.filter(|client| !client.is_empty()) {
        exchange.http.stats.other.inc(&format!("fault.{client}.{what}"));
    }
}

/// `fault`: what holds for the request; `filter`: the filter's own.
async fn run_fault(
    exchange: &mut Exchange,
    name: &ArcStr,
    fault: &Arc<proxy_core::filters::Fault>,
    filter: &proxy_core::filters::Fault,
) -> Result<(), Stop> {
    let worker = exchange.http.worker.clone();
    let cluster = exchange.info.upstream.cluster.as_deref();
    let decision =
        fault.decide(&exchange.request, cluster, &mut worker.random.borrow_mut(), worker.active_faults.get());
    let http = exchange.http.clone();
    let stats = &http.stats;
    let counts_clients = fault.counts_clients && filter.counts_clients;
    (0..decision.overflow).for_each(|_| stats.other.inc("fault.faults_overflow"));
    if decision.delay.is_some() || decision.abort.is_some() || decision.rate_limit_kib.is_some() {
        exchange.fault = Some(ActiveFault::begin(&http));
    }
    if let Some(kib) = decision.rate_limit_kib {
        stats.other.inc("fault.response_rl_injected");
        let limit = exchange.buffer_limit() as usize;
        exchange.throttle = Some(Throttle::new(kib, limit));
    }
    if let Some(delay) = decision.delay {
        exchange.http.stats.other.inc("fault.delays_injected");
        if counts_clients {
            fault_of_client(exchange, "delays_injected");
        }
        exchange.info.dynamic_metadata.merge(name, &fault.metadata);
        exchange.info.flags.insert(ResponseFlags::FAULT_DELAY);
        exchange.wait(Box::pin(tokio::time::sleep(delay))).await?;
        exchange.steps.filter(exchange.timers.elapsed(), name, format!("delayed by {delay:?}"));
    }
    if let Some(abort) = decision.abort {
        exchange.http.stats.other.inc("fault.aborts_injected");
        if counts_clients {
            fault_of_client(exchange, "aborts_injected");
        }
        exchange.info.dynamic_metadata.merge(name, &fault.metadata);
        let text = fault.abort_body.as_deref().unwrap_or("fault filter abort").to_owned();
        let mut reply = LocalReply::new(200, text, "fault_filter_abort").flagged(ResponseFlags::FAULT_ABORT);
        match abort {
            Abort::Http(status) => reply.status = status,
            Abort::Grpc(status) => reply.grpc_status = Some(status),
        }
        return Err(reply.into());
    }
    Ok(())
}

fn cors(exchange: &mut Exchange, name: &str) -> Result<(), Stop> {
    let matched = exchange.matched.clone();
    let policies = matched.as_ref().map(|m| m.cors_policies_of(name)).unwrap_or_default();
    let http = exchange.http.clone();
    let stats = &http.stats;
    match proxy_core::filters::cors_decide(&policies, &exchange.request) {
        CorsDecision::NotCors => {}
        CorsDecision::Invalid | CorsDecision::Shadow(false) => stats.other.inc("cors.origin_invalid"),
        CorsDecision::Shadow(true) => stats.other.inc("cors.origin_valid"),
        CorsDecision::Preflight(headers) | CorsDecision::Refused(headers) => {
            let valid = headers.iter().any(|(name, _)| *name == "access-control-allow-origin");
            stats.other.inc(if valid { "cors.origin_valid" } else { "cors.origin_invalid" });
            let mut reply = LocalReply::new(200, "", "cors_response");
            reply.direct = true;
            reply.headers = headers.into_iter().map(|(n, v)| (n.to_string(), v.to_vec())).collect();
            return Err(reply.into());
        }
        CorsDecision::Actual(headers) => {
            stats.other.inc("cors.origin_valid");
            exchange
                .add_to_response
                .extend(headers.into_iter().map(|(n, v)| AddToAnswer::set(n.to_string(), v.to_vec())));
        }
    }
    Ok(())
}

/// Metadata that was there already, of the filter that sets it.
pub(super) const METADATA_DENIED: &str = "set_metadata.overwrite_denied";

/// The name of a counter of the RBAC filter. `joinPrefix` of Envoy puts a dot behind the prefix of statistics, but not of
/// metadata.
pub(super) fn rbac_counter(prefix: &str, what: &str) -> String {
    // A name has no empty parts.
    let prefix = prefix.trim_end_matches('.');
    if prefix.is_empty() { format!("rbac.{what}") } else { format!("rbac.{prefix}.{what}") }
}

/// `filter`: the filter's own rules, whose prefixes hold for rules of a route that have none.
fn run_rbac(
    exchange: &mut Exchange,
    name: &ArcStr,
    rbac: &proxy_core::Rbac,
    filter: &proxy_core::Rbac,
) -> Result<(), Stop> {
    if rbac.is_empty() {
        return Ok(());
    }
    let verdict = rbac.check(&RbacInput {
        headers: Some(&exchange.request),
        connection: &exchange.http.info,
        remote: &exchange.info.remote,
        metadata: &exchange.info.dynamic_metadata,
        filter_state: &exchange.info.filter_state,
        route: exchange.matched.as_deref(),
        stream: Some(&exchange.info),
    });
    let http = exchange.http.clone();
    let stats = &http.stats.other;
    let metadata = &mut exchange.info.dynamic_metadata;
    // Statistics go by the filter's prefixes, notes by the route's own, if it has some.
    let prefix = &filter.stat_prefix;
    if let Some(shadow) = &verdict.shadow {
        let prefix = &filter.shadow_prefix;
        let what = if shadow.allowed { "shadow_allowed" } else { "shadow_denied" };
        stats.inc(&rbac_counter(prefix, what));
        if let (true, Some(policy)) = (rbac.tracks_policies, &shadow.policy) {
            stats.inc(&rbac_counter(prefix, &format!("policy.{policy}.{what}")));
        }
        match *prefix == rbac.shadow_prefix || !rbac.shadow_prefix.is_empty() {
            true => metadata.share(&HTTP_NAMESPACE, &shadow.note),
            false => metadata.share(&HTTP_NAMESPACE, &note(prefix, true, shadow.allowed, shadow.policy.as_deref())),
        }
    }
    if let (Some(allowed), Some(own)) = (verdict.enforced, &verdict.note) {
        match *prefix == rbac.stat_prefix || !rbac.stat_prefix.is_empty() {
            true => metadata.share(&HTTP_NAMESPACE, own),
            false => metadata.share(&HTTP_NAMESPACE, &note(prefix, false, allowed, verdict.policy.as_deref())),
        }
    }
    if let Some(hint) = verdict.log_hint {
        exchange.info.dynamic_metadata.set("envoy.common", "access_log_hint", hint.into());
    }
    if verdict.allowed && verdict.enforced.is_some() {
        exchange.steps.allowed(exchange.timers.elapsed(), name, verdict.policy.as_ref());
    }
    // Shadow rules alone allow nothing that would be counted.
    if let Some(allowed) = verdict.enforced {
        let what = if allowed { "allowed" } else { "denied" };
        match &**prefix {
            // Nothing is put together for each request.
            "" if allowed => stats.inc("rbac.allowed"),
            prefix => stats.inc(&rbac_counter(prefix, what)),
        }
        if let (true, Some(policy)) = (rbac.tracks_policies, &verdict.policy) {
            stats.inc(&rbac_counter(prefix, &format!("policy.{policy}.{what}")));
        }
    }
    if verdict.allowed {
        return Ok(());
    }
    let reply = LocalReply::new(403, "RBAC: access denied", verdict.details());
    Err(reply.into())
}

/// How a filter that holds a request's body judges its length, as Envoy's filter manager does with its buffer: what the
/// buffer held before is not looked at, and data that brings the end is not put there unless something is there already.
struct Held {
    limit: u64,
    size: u64,
    /// What came while an earlier filter waited is being read.
    before: bool,
    empty: bool,
}

impl Held {
    fn new(exchange: &Exchange, limit: u64) -> Self {
        Self { limit, size: 0, before: exchange.waited, empty: true }
    }

    /// Waits for the next frame.
    async fn next(
        &mut self,
        exchange: &mut Exchange,
        body: &mut RecvBody,
    ) -> Result<Option<Result<Frame, BodyError>>, Stop> {
        poll_fn(|cx| {
            exchange.poll_with(cx, |cx| {
                let polled = body.poll_frame(cx);
                self.before &= polled.is_ready();
                polled.map(Ok)
            })
        })
        .await
    }

    /// Takes note of data, after which `body` follows. An error is the answer to too much of it.
    fn take(&mut self, exchange: &mut Exchange, data: &[u8], body: &RecvBody) -> Result<(), Stop> {
        self.size += data.len() as u64;
        exchange.info.bytes_received = exchange.info.bytes_received.max(self.size);
        let whole = std::mem::replace(&mut self.empty, false) && body.is_over() && !exchange.answer.is_h1();
        if self.size <= self.limit || self.before || whole {
            return Ok(());
        }
        exchange.http.stats.downstream_rq_too_large.inc();
        Err(LocalReply::new(413, "Payload Too Large", "request_payload_too_large").into())
    }
}

/// Holds the request until all of it is there.
async fn buffer(exchange: &mut Exchange, body: &mut RecvBody, limit: u64) -> Result<(), Stop> {
    if body.is_empty() {
        return Ok(());
    }
    // It holds for the router, too, which keeps bodies for retries (Envoy `setBufferLimit`).
    exchange.body_limit = Some(u32::try_from(limit).unwrap_or(u32::MAX));
    let mut frames = VecDeque::new();
    let mut held = Held::new(exchange, limit);
    loop {
        match held.next(exchange, body).await? {
            None => break,
            Some(Ok(Frame::Data(data))) => {
                held.take(exchange, &data, body)?;
                frames.push_back(Frame::Data(data));
            }
            Some(Ok(trailers)) => frames.push_back(trailers),
            Some(Err(e)) => return Err(exchange.client_failed(e)),
        }
    }
    exchange.request_complete();
    // Envoy's buffer filter sets the length that is known now.
    if !exchange.request.contains("content-length") {
        exchange.request.set("content-length", held.size.to_string().as_bytes());
    }
    exchange.request.remove("transfer-encoding");
    *body = RecvBody::Memory(frames);
    Ok(())
}

/// What was seen of a body that stays readable.
pub(super) struct Peeked {
    /// The first bytes.
    pub(super) data: Bytes,
    /// They are all that there was by then.
    pub(super) whole: bool,
    /// How many there were.
    pub(super) size: u64,
}

/// The first `limit` bytes of the request's body; none of one of which nothing came, but perhaps trailers (in Envoy no
/// buffer is made for it).
pub(super) async fn peek_body(
    exchange: &mut Exchange,
    body: &mut RecvBody,
    limit: usize,
    allow_partial: bool,
) -> Result<Option<Peeked>, Stop> {
    let mut frames = VecDeque::new();
    let mut seen = Vec::new();
    let mut ended = body.is_empty();
    let mut held = Held::new(exchange, if allow_partial { u64::MAX } else { limit as u64 });
    while !ended {
        match held.next(exchange, body).await? {
            None => ended = true,
            Some(Ok(frame)) => {
                if let Frame::Data(data) = &frame {
                    seen.extend_from_slice(data);
                    held.take(exchange, data, body)?;
                }
                frames.push_back(frame);
                if seen.len() < limit || !allow_partial {
                    continue;
                }
                // No more is waited for, but what ends just here is whole.
                match poll_fn(|cx| Poll::Ready(body.poll_frame(cx))).await {
                    Poll::Ready(None) => ended = true,
                    Poll::Ready(Some(Ok(frame))) => {
                        if let Frame::Data(data) = &frame {
                            let came = (seen.len() + data.len()) as u64;
                            exchange.info.bytes_received = exchange.info.bytes_received.max(came);
                        }
                        frames.push_back(frame);
                    }
                    Poll::Ready(Some(Err(e))) => return Err(exchange.client_failed(e)),
                    Poll::Pending => {}
                }
                break;
            }
            Some(Err(e)) => return Err(exchange.client_failed(e)),
        }
    }
    if ended {
        exchange.request_complete();
    }
    // As Envoy, which looks at the length only: what comes after just as much is not known yet.
    let whole = seen.len() <= limit;
    seen.truncate(limit);
    let any_data = frames.iter().any(|frame| matches!(frame, Frame::Data(_)));
    if !frames.is_empty() {
        let rest = std::mem::replace(body, RecvBody::Empty);
        *body = if ended { RecvBody::Memory(frames) } else { RecvBody::Then(frames, Box::new(rest)) };
    }
    Ok(any_data.then(|| Peeked { data: seen.into(), whole, size: held.size }))
}
