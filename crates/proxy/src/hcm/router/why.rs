//! What went wrong upstream, in Envoy's words and flags.

use crate::hcm::local_reply::LocalReply;
use crate::upstream::{ConnectError, Failure};
use proxy_core::ResponseFlags;
use proxy_core::retry::ResetReason;

/// What went wrong, as Envoy names it.
#[derive(Clone, Debug)]
pub(super) enum Why {
    Connect(ConnectError),
    Overflow,
    Stream(Failure),
}

impl Why {
    pub(super) fn text(&self) -> &'static str {
        match self {
            Why::Connect(e) if e.timeout => "connection timeout",
            Why::Connect(_) => "remote connection failure",
            Why::Overflow => "overflow",
            Why::Stream(Failure::Terminated) => "connection termination",
            Why::Stream(Failure::Reset) => "remote reset",
            Why::Stream(Failure::Refused) => "remote refused stream reset",
            Why::Stream(Failure::Connect) => "remote error with CONNECT request",
            Why::Stream(Failure::Protocol(_) | Failure::Blamed) => "protocol error",
        }
    }

    pub(super) fn flags(&self) -> ResponseFlags {
        match self {
            Why::Connect(_) => ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
            Why::Overflow => ResponseFlags::UPSTREAM_OVERFLOW,
            Why::Stream(Failure::Terminated) => ResponseFlags::UPSTREAM_TERMINATION,
            Why::Stream(Failure::Reset | Failure::Refused | Failure::Connect) => ResponseFlags::UPSTREAM_RESET,
            Why::Stream(Failure::Protocol(_) | Failure::Blamed) => ResponseFlags::UPSTREAM_PROTOCOL_ERROR,
        }
    }

    pub(super) fn reason(&self) -> ResetReason {
        match self {
            Why::Connect(e) if e.timeout => ResetReason::ConnectTimeout,
            Why::Connect(_) => ResetReason::ConnectFailure,
            Why::Overflow => ResetReason::Overflow,
            Why::Stream(Failure::Terminated) => ResetReason::ConnectionTermination,
            Why::Stream(Failure::Reset | Failure::Connect) => ResetReason::RemoteReset,
            Why::Stream(Failure::Refused) => ResetReason::RemoteRefused,
            Why::Stream(Failure::Protocol(_) | Failure::Blamed) => ResetReason::ProtocolError,
        }
    }

    /// `upstream_reset_before_response_started{connection_termination}`
    pub(super) fn details(&self, phase: &str) -> String {
        let text = self.text().replace(' ', "_");
        match self {
            Why::Connect(e) if !e.reason.is_empty() => {
                format!("upstream_reset_{phase}_response_started{{{text}|{}}}", e.reason.replace(' ', "_"))
            }
            _ => format!("upstream_reset_{phase}_response_started{{{text}}}"),
        }
    }

    /// `answered`: interim answers came. `suppress`: Envoy's own headers are not sent.
    pub(super) fn reply(&self, retried: bool, answered: bool, suppress: bool) -> LocalReply {
        let retried = if retried { "retried and the latest " } else { "" };
        let body = format!(
            "upstream connect error or disconnect/reset before headers. {retried}reset reason: {}",
            self.text()
        );
        let status = if matches!(self, Why::Stream(Failure::Protocol(_) | Failure::Blamed)) { 502 } else { 503 };
        let mut reply = LocalReply::new(status, body, self.details(if answered { "after" } else { "before" }))
            .flagged(self.flags());
        if matches!(self, Why::Overflow) && !suppress {
            reply.headers.push(("x-envoy-overloaded".into(), b"true".to_vec()));
        }
        reply
    }
}
