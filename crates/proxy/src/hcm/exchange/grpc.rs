//! What the `grpc_stats` filter counts and says.

use super::Exchange;
use crate::hcm::Http;
use proxy_core::Headers;
use proxy_core::filters::HttpFilter;

impl Exchange {
    /// Remembers `grpc-status`, which is in the trailers or, without a body, in the head.
    pub(crate) fn note_grpc(&mut self, headers: &Headers) {
        if self.grpc
            && let Some(status) = headers.get_str("grpc-status").and_then(|s| s.parse().ok())
        {
            self.grpc_status = Some(status);
        }
    }

    /// `cluster.NAME.grpc.SERVICE.METHOD.STATUS`, for the grpc_stats filter.
    pub(super) fn count_grpc(&self) {
        let wanted = self.grpc && self.http.config.filters.iter().any(|f| matches!(f.filter, HttpFilter::GrpcStats(_)));
        if !wanted {
            return;
        }
        let path = self.request.path().unwrap_or_default();
        let mut parts = path.trim_start_matches('/').splitn(2, '/');
        let (Some(service), Some(method)) = (parts.next(), parts.next()) else { return };
        let cluster = self.info.upstream.cluster.as_deref().and_then(|name| self.http.worker.cluster(name));
        let Some(cluster) = cluster else { return };
        let prefix = format!("grpc.{service}.{method}");
        let stats = &cluster.stats.other;
        let Some(status) = self.grpc_status else {
            // Envoy counts messages as they pass.
            let counts = self.messages.iter().flat_map(|messages| messages.iter().zip(["request", "response"]));
            for (messages, way) in counts.filter(|(messages, _)| messages.count > 0) {
                stats.add(&format!("{prefix}.{way}_message_count"), messages.count);
            }
            return;
        };
        if let Some(messages) = &self.messages {
            stats.add(&format!("{prefix}.request_message_count"), messages[0].count);
            stats.add(&format!("{prefix}.response_message_count"), messages[1].count);
        }
        stats.inc(&format!("{prefix}.{status}"));
        stats.inc(&format!("{prefix}.{}", if status == 0 { "success" } else { "failure" }));
        stats.inc(&format!("{prefix}.total"));
    }

    /// Filter state `envoy.filters.http.grpc_stats` (`emit_filter_state`).
    pub(super) fn tell_messages(&mut self) {
        let emits = self.http.config.filters.iter().any(|f| matches!(f.filter, HttpFilter::GrpcStats(true)));
        let Some(messages) = self.messages.as_ref().filter(|_| emits) else { return };
        let fields: Vec<String> =
            [("requestMessageCount", messages[0].count), ("responseMessageCount", messages[1].count)]
                .into_iter()
                .filter(|(_, n)| *n > 0)
                .map(|(name, n)| format!("\"{name}\":\"{n}\""))
                .collect();
        let text = format!("{{{}}}", fields.join(","));
        self.info.filter_state.0.insert("envoy.filters.http.grpc_stats".into(), text.into());
    }
}

/// Whether the `grpc_stats` filter is there.
pub(super) fn counts_messages(http: &Http) -> bool {
    http.config.filters.iter().any(|f| matches!(f.filter, HttpFilter::GrpcStats(_)))
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
