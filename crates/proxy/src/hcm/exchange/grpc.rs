//! What the `grpc_stats` filter counts and says.

use super::Exchange;
use crate::hcm::Http;
use mesh_types::ArcStr;
use proxy_core::Headers;
use proxy_core::filters::{GrpcStats, HttpFilter};
use std::borrow::Cow;

/// The cluster that a call goes to, and what stands before its counters there.
#[derive(Debug)]
pub(crate) struct Call {
    cluster: ArcStr,
    prefix: Cow<'static, str>,
}

impl Call {
    fn of(exchange: &Exchange, prefix: Option<Cow<'static, str>>) -> Option<Box<Self>> {
        Some(Box::new(Self { cluster: exchange.info.upstream.cluster.clone()?, prefix: prefix? }))
    }

    fn add(&self, http: &Http, what: &str, n: u64) {
        if let Some(cluster) = http.worker.cluster(&self.cluster) {
            cluster.stats.other.add(&format!("{}{what}", self.prefix), n);
        }
    }

    fn add_status(&self, http: &Http, status: u32) {
        for what in [&*status.to_string(), if status == 0 { "success" } else { "failure" }, "total"] {
            self.add(http, what, 1);
        }
    }
}

impl Exchange {
    /// The `grpc_stats` filter sees the request (Envoy `GrpcStatsFilter::decodeHeaders`): a path and a cluster that come later are not
    /// counted.
    pub(crate) fn begin_grpc_stats(&mut self, filter: &GrpcStats) {
        // Answers may be of gRPC whatever was asked, but only the filter state tells.
        if self.grpc || filter.emit_filter_state {
            self.messages = Some(Box::default());
        }
        if self.grpc {
            self.call = Call::of(self, self.request.path().and_then(|path| filter.prefix(path)));
        }
    }

    /// The same for the `grpc_web` filter (Envoy `GrpcWebFilter::setupStatTracking`).
    pub(crate) fn begin_grpc_web(&mut self) {
        let call = self.request.path().and_then(GrpcStats::call);
        let prefix = call.map(|(service, method)| format!("grpc-web.{service}.{method}.").into());
        self.web_call = Call::of(self, prefix);
    }

    /// Remembers `grpc-status`, which is in the trailers or, without a body, in the head.
    pub(crate) fn note_grpc(&mut self, headers: &Headers) {
        if self.grpc
            && let Some(status) = headers.get_str("grpc-status").and_then(|s| s.parse().ok())
        {
            self.grpc_status = Some(status);
        }
    }

    /// `cluster.NAME.grpc.…` and `cluster.NAME.grpc-web.…`, for the filters that count.
    pub(super) fn count_grpc(&self) {
        if let (Some(call), Some(status)) = (&self.web_call, self.grpc_status) {
            call.add_status(&self.http, status);
        }
        let (Some(call), Some(messages)) = (&self.call, &self.messages) else { return };
        for (messages, way) in messages.iter().zip(["request", "response"]).filter(|(messages, _)| messages.count > 0) {
            call.add(&self.http, &format!("{way}_message_count"), messages.count);
        }
        if let Some(status) = self.grpc_status {
            call.add_status(&self.http, status);
        }
    }

    /// Filter state `envoy.filters.http.grpc_stats` (`emit_filter_state`).
    pub(super) fn tell_messages(&mut self) {
        let emits = grpc_stats(&self.http).is_some_and(|filter| filter.emit_filter_state);
        let Some(messages) = self.messages.as_ref().filter(|_| emits) else { return };
        let fields: Vec<String> =
            [("requestMessageCount", messages[0].count), ("responseMessageCount", messages[1].count)]
                .into_iter()
                .filter(|(_, n)| *n > 0)
                .map(|(name, n)| format!("\"{name}\":\"{n}\""))
                .collect();
        if fields.is_empty() {
            return;
        }
        let text = format!("{{{}}}", fields.join(","));
        self.info.filter_state.values.insert("envoy.filters.http.grpc_stats".into(), text.into());
    }
}

/// The `grpc_stats` filter, if there is one.
fn grpc_stats(http: &Http) -> Option<&GrpcStats> {
    http.config.filters.iter().find_map(|entry| match &entry.filter {
        HttpFilter::GrpcStats(filter) => Some(&**filter),
        _ => None,
    })
}

/// `application/grpc` and its variants.
pub(crate) fn is_grpc(headers: &Headers) -> bool {
    headers.get("content-type").is_some_and(|v| {
        v.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest.first(), None | Some(b'+')))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_content_types() {
        let of = |v: &str| is_grpc(&Headers::of([("content-type", v)]));
        assert!(of("application/grpc") && of("application/grpc+proto") && !of("application/grpc-web"));
    }
}
