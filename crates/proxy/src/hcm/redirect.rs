//! Internal redirects: the answer sends the request on, and the proxy follows by itself.

use super::exchange::Exchange;
use crate::stream::{Frame, RecvBody};
use mesh_types::ArcStr;
use proxy_core::route::{Forward, Hop, InternalRedirect, NotFollowed, RouteInput, RouteResult};
use proxy_core::stream_info::HttpProtocol;
use proxy_core::{Headers, StreamInfo};
use std::time::{Duration, SystemTime};

/// Counters of redirects that were passed on.
pub(super) const COUNTERS: [&str; 5] = [
    "passthrough_internal_redirect_bad_location",
    "passthrough_internal_redirect_unsafe_scheme",
    "passthrough_internal_redirect_too_many_redirects",
    "passthrough_internal_redirect_no_route",
    "passthrough_internal_redirect_predicate",
];

/// A request that replaces the one it came from.
pub(crate) struct Redirected {
    pub(super) request: Headers,
    pub(super) body: Vec<Frame>,
    /// The head of the redirect, for the record.
    pub(super) answer: Headers,
}

/// The next request, if the answer is a redirect that is to be followed. `body`: the request's, when all of it is
/// still there.
pub(super) fn follow(
    exchange: &mut Exchange,
    forward: &Forward,
    answer: &Headers,
    body: Option<&[Frame]>,
) -> Option<Redirected> {
    let policy = forward.internal_redirect.as_ref()?;
    if !answer.status().is_some_and(|status| policy.codes.contains(&status)) {
        return None;
    }
    let http = exchange.http.clone();
    let cluster = exchange.info.upstream.cluster.as_deref().and_then(|name| http.worker.cluster(name))?;
    let failed = |what: Option<&str>| {
        if let Some(what) = what {
            http.stats.other.inc(&format!("passthrough_internal_redirect_{what}"));
        }
        cluster.stats.upstream_internal_redirect_failed_total.inc();
        None
    };
    let Some(body) = body else { return failed(None) };
    let tls = http.info.tls.is_some();
    let request = match policy.next(&exchange.request, answer, exchange.redirects, tls) {
        Ok(request) => request,
        Err(NotFollowed::NoLocation) => return failed(None),
        Err(NotFollowed::BadLocation) => return failed(Some("bad_location")),
        Err(NotFollowed::UnsafeScheme) => return failed(Some("unsafe_scheme")),
        Err(NotFollowed::TooMany) => return failed(Some("too_many_redirects")),
    };
    // Envoy looks the route up on the stream, whose record shows it even if it is not taken.
    let Some(target) = exchange.peek_route(&request) else { return failed(Some("no_route")) };
    let hop = Hop {
        from: exchange.matched.as_ref().map(|matched| &*matched.route.name).unwrap_or_default(),
        to: &target,
        from_https: InternalRedirect::is_https(&exchange.request, tls),
        to_https: request.scheme() == Some("https"),
    };
    if !policy.accepts(hop, &mut exchange.previous_routes) {
        return failed(Some("predicate"));
    }
    cluster.stats.upstream_internal_redirect_succeeded_total.inc();
    let keeps_body = answer.status() != Some(303) || matches!(exchange.request.method(), Some("GET" | "HEAD"));
    // As Envoy, which keeps what it buffered and no trailers.
    let data = |frame: &&Frame| keeps_body && matches!(frame, Frame::Data(_));
    Some(Redirected { request, body: body.iter().filter(data).cloned().collect(), answer: answer.clone() })
}

impl Exchange {
    /// Name of the route that a request would take; its cluster is the stream's from now on.
    fn peek_route(&mut self, request: &Headers) -> Option<ArcStr> {
        let table = self.http.route_table()?;
        let input = RouteInput {
            headers: request,
            metadata: &self.info.dynamic_metadata,
            filter_state: &self.info.filter_state,
            tls: self.http.info.tls.as_deref(),
            random: 0,
        };
        // Without that field Envoy finds none; the route before may have removed it.
        let found = match request.contains("x-forwarded-proto") {
            true => table.find(&input),
            false => RouteResult::NoVirtualHost,
        };
        let cluster = match &found {
            RouteResult::Found(matched) => matched.cluster(request).and_then(|name| self.http.worker.cluster(&name)),
            _ => None,
        };
        self.info.upstream.cluster = cluster.as_ref().map(|cluster| cluster.config().name.clone());
        self.info.upstream.cluster_stat_name = cluster.map(|cluster| cluster.config().stat_name.clone());
        match found {
            RouteResult::Found(matched) => {
                self.info.route = Some(matched.route.clone());
                self.info.virtual_host = Some(matched.vhost.clone());
                Some(matched.route.name.clone())
            }
            RouteResult::RedirectToTls(vhost, _) => {
                self.info.virtual_host = Some(vhost);
                Some(ArcStr::default())
            }
            RouteResult::NoRoute(_) | RouteResult::NoVirtualHost => {
                self.info.route = None;
                None
            }
        }
    }

    /// Becomes the redirected request: the one before is logged as a stream of its own, as in Envoy.
    pub(super) fn redirect_to(&mut self, redirected: Redirected, status: u16) -> RecvBody {
        self.steps.settle(&self.info);
        self.request = redirected.request;
        let host = self.info.upstream.host.clone();
        // Envoy looks the new route up before it logs the old stream.
        self.clear_route();
        self.info.upstream.host = host;
        self.info.response_code = Some(status);
        self.info.response_code_details = Some("internal_redirect".into());
        self.info.times.complete = Some(self.elapsed());
        self.steps.own(self.elapsed(), "redirect", format!("followed the {status}"));
        self.response = Some(redirected.answer);
        self.log("DownstreamEnd");
        super::record::remember(self);
        self.response = None;
        self.http.stats.downstream_rq_total.inc();
        match self.info.protocol {
            Some(HttpProtocol::Http2) => self.http.stats.downstream_rq_http2_total.inc(),
            _ => self.http.stats.downstream_rq_http1_total.inc(),
        }
        let mut info = StreamInfo::new(self.http.info.clone(), SystemTime::now());
        info.protocol = self.info.protocol;
        info.remote = self.info.remote.clone();
        info.bytes_received = self.info.bytes_received;
        info.filter_state = std::mem::take(&mut self.info.filter_state);
        info.trace_id = self.info.trace_id.take();
        info.traced = self.info.traced;
        // All of the request is there.
        info.times.request_received = Some(Duration::ZERO);
        self.info = info;
        self.timers.start();
        self.redirects += 1;
        self.add_to_response.clear();
        self.passed_over.clear();
        self.matched = None;
        if redirected.body.is_empty() { RecvBody::Empty } else { RecvBody::Memory(redirected.body.into()) }
    }
}
