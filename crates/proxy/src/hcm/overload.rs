//! What the overload manager does to requests.

use super::exchange::Exchange;
use super::local_reply::LocalReply;
use proxy_core::overload::ActionKind;

impl Exchange {
    /// Whether resources are too short to serve another request.
    pub(super) fn is_overloaded(&self) -> bool {
        let worker = &self.http.worker;
        let overload = worker.shared.overload.get().filter(|_| !self.http.listener.bypass_overload);
        overload.is_some_and(|o| o.happens(ActionKind::StopRequests, &mut worker.random.borrow_mut()))
    }

    /// The answer to a request that is too much (Envoy `ActiveStream::decodeHeaders`).
    pub(super) fn overloaded(&self) -> LocalReply {
        self.http.stats.downstream_rq_overload_close.inc();
        let mut reply = LocalReply::new(503, "envoy overloaded", "overload");
        if self.http.config.append_local_overload {
            reply.headers.push(("x-envoy-local-overloaded".into(), b"true".to_vec()));
        }
        reply
    }

    /// Whether connections of HTTP/1 are too much to be kept.
    pub(super) fn ends_for_overload(&self) -> bool {
        let worker = &self.http.worker;
        let Some(overload) = worker.shared.overload.get() else { return false };
        if self.http.listener.bypass_overload || !self.answer.is_h1() {
            return false;
        }
        let ends = overload.happens(ActionKind::DisableKeepalive, &mut worker.random.borrow_mut());
        if ends {
            self.http.stats.downstream_cx_overload_disable_keepalive.inc();
        }
        ends
    }
}
