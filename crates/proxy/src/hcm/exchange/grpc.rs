//! What the `grpc_stats` filter counts and says.

use super::Exchange;
use crate::hcm::Http;
use proxy_core::Headers;
use proxy_core::filters::{GrpcStats, HttpFilter};

impl Exchange {
    /// Remembers `grpc-status`, which is in the trailers or, without a body, in the head.
    pub(crate) fn note_grpc(&mut self, headers: &Headers) {
        if self.grpc
            && let Some(status) = headers.get_str("grpc-status").and_then(|s| s.parse().ok())
        {
            self.grpc_status = Some(status);
        }
    }

    /// `cluster.NAME.grpc.…`, for the grpc_stats filter.
    pub(super) fn count_grpc(&self) {
        if self.web.is_some() {
            self.count_web();
        }
        // They are there when the filter ran.
        let Some(messages) = &self.messages else { return };
        let Some(filter) = grpc_stats(&self.http).filter(|_| self.grpc) else { return };
        let Some(prefix) = filter.prefix(self.request.path().unwrap_or_default()) else { return };
        let cluster = self.info.upstream.cluster.as_deref().and_then(|name| self.http.worker.cluster(name));
        let Some(cluster) = cluster else { return };
        let add = |what: &str, n| cluster.stats.other.add(&format!("{prefix}{what}"), n);
        for (messages, way) in messages.iter().zip(["request", "response"]).filter(|(messages, _)| messages.count > 0) {
            add(&format!("{way}_message_count"), messages.count);
        }
        if let Some(status) = self.grpc_status {
            add(&status.to_string(), 1);
            add(if status == 0 { "success" } else { "failure" }, 1);
            add("total", 1);
        }
    }

    /// `cluster.NAME.grpc-web.…`, for the grpc_web filter.
    fn count_web(&self) {
        let call = GrpcStats::call(self.request.path().unwrap_or_default());
        let cluster = self.info.upstream.cluster.as_deref().and_then(|name| self.http.worker.cluster(name));
        if let (Some((service, method)), Some(cluster), Some(status)) = (call, cluster, self.grpc_status) {
            for what in [&*status.to_string(), if status == 0 { "success" } else { "failure" }, "total"] {
                cluster.stats.other.inc(&format!("grpc-web.{service}.{method}.{what}"));
            }
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
