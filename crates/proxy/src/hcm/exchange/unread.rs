//! Requests of which there is nothing to serve, in logs and statistics.

use crate::hcm::{End, Http};
use proxy_core::stream_info::HttpProtocol;
use proxy_core::{FormatContext, ResponseFlags, StreamInfo};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

/// Logs an HTTP/2 message that the codec refused.
pub(crate) fn malformed(http: &Rc<Http>, details: &'static str) {
    let mut info = StreamInfo::new(http.info.clone(), SystemTime::now());
    http.worker.named_stats().inc("http2.rx_messaging_error");
    http.count_h2_request();
    http.stats.downstream_rq_total.inc();
    http.stats.downstream_rq_rx_reset.inc();
    info.protocol = Some(HttpProtocol::Http2);
    info.flags.insert(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR);
    info.response_code_details = Some(details.into());
    log_without_request(http, info);
}

/// Logs a request of which not even the head arrived before its connection ended, and of whose `received` bytes the wire tells.
pub(crate) fn abandoned(http: &Rc<Http>, protocol: HttpProtocol, received: u64) {
    let mut info = StreamInfo::new(http.info.clone(), SystemTime::now());
    info.downstream_wire_bytes_received = received;
    if protocol == HttpProtocol::Http2 {
        http.count_h2_request();
    }
    http.stats.downstream_rq_total.inc();
    http.stats.downstream_rq_rx_reset.inc();
    info.protocol = Some(protocol);
    let (flag, details) = match http.end.get() {
        Some(End::Codec { details, blamed }) => {
            (ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR, blamed.map_or(details, |(_, details)| details))
        }
        Some(End::Cut) => (ResponseFlags::DOWNSTREAM_TERMINATION, End::CUT),
        _ => (ResponseFlags::DOWNSTREAM_TERMINATION, "downstream_remote_disconnect"),
    };
    info.flags.insert(flag);
    info.response_code_details = Some(details.into());
    log_without_request(http, info);
}

fn log_without_request(http: &Rc<Http>, mut info: StreamInfo) {
    info.times.complete = Some(Duration::ZERO);
    let mut context = FormatContext::new(&info, None, None);
    context.access_log_type = "DownstreamEnd";
    crate::log::write(&http.worker, &http.config.access_log, &context);
}
