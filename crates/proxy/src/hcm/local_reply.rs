//! Answers the proxy gives itself.

use super::exchange::{Exchange, Stop};
use crate::stream::{BodyError, Gone};
use bytes::Bytes;
use proxy_core::filters::LocalRateLimit;
use proxy_core::retry::grpc_status_of_http;
use proxy_core::{FormatContext, Headers, ResponseFlags};
use std::borrow::Cow;
use std::sync::Arc;

/// What to answer, and how it shows in logs.
pub(crate) struct LocalReply {
    pub(crate) status: u16,
    pub(crate) body: Cow<'static, str>,
    /// Envoy's response code details.
    pub(crate) details: Cow<'static, str>,
    pub(crate) flags: ResponseFlags,
    /// The flags show in logs only: Envoy knows of them once the answer is made.
    pub(crate) flagged_late: bool,
    pub(crate) headers: Vec<(String, Vec<u8>)>,
    /// Refused by this limit, which changes the answer's headers after the route.
    pub(crate) limit: Option<Arc<LocalRateLimit>>,
    pub(crate) grpc_status: Option<u32>,
    /// Close the connection afterwards (HTTP/1).
    pub(crate) close: bool,
    /// The body is not text of ours (direct responses): no content type is set for it beyond text/plain.
    pub(crate) raw_body: Option<Bytes>,
    /// The answer that is wanted, no refusal: never turned into gRPC, nor mapped or changed by the route.
    pub(crate) direct: bool,
    /// The router's: the route's header changes apply.
    pub(crate) finalize: bool,
}

impl LocalReply {
    pub(crate) fn new(status: u16, body: impl Into<Cow<'static, str>>, details: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            body: body.into(),
            details: details.into(),
            flags: ResponseFlags::NONE,
            flagged_late: false,
            headers: Vec::new(),
            limit: None,
            grpc_status: None,
            close: false,
            raw_body: None,
            direct: false,
            finalize: false,
        }
    }

    pub(crate) fn flagged(mut self, flags: ResponseFlags) -> Self {
        self.flags = flags;
        self
    }

    /// Head and body, for gRPC as a trailers-only answer (Envoy `Utility::prepareLocalReply`).
    pub(crate) fn render(self, exchange: &mut Exchange) -> (Headers, Bytes) {
        let mut headers = Headers::with_capacity(12, 512);
        headers.set_status(self.status);
        // As Envoy, the route's changes first: what a filter says itself stands over them.
        if !self.direct {
            exchange.add_route_headers(&mut headers, self.finalize);
        }
        if let Some(limit) = &self.limit {
            let cx = FormatContext::new(&exchange.info, Some(&exchange.request), None);
            limit.response_headers.apply_to_response(&mut headers, &cx);
        }
        for (name, _) in &self.headers {
            headers.remove(name);
        }
        for (name, value) in &self.headers {
            headers.push(name.as_bytes(), value);
        }
        let body = self.raw_body.unwrap_or_else(|| match self.body {
            Cow::Borrowed(text) => Bytes::from_static(text.as_bytes()),
            Cow::Owned(text) => Bytes::from(text),
        });
        let mut body = body;
        let text = String::from_utf8_lossy(&body).into_owned();
        let mut content_type: Cow<'static, str> = "text/plain".into();
        // The mappers' filters look at the status; the route's formats must not see it yet.
        exchange.info.response_code = Some(self.status);
        let rewritten = if self.direct {
            None
        } else {
            let cx = FormatContext::new(&exchange.info, Some(&exchange.request), None);
            exchange.http.config.local_reply.rewrite(self.status, &text, &mut headers, &cx)
        };
        exchange.info.response_code = None;
        if let Some(rewritten) = rewritten {
            body = Bytes::from(rewritten.body);
            content_type = rewritten.content_type.to_string().into();
        }
        let status = headers.status().unwrap_or(self.status);
        // Filters see it, whatever a call of gRPC is told; of what a filter answers itself they see it once it has left.
        exchange.info.response_code = (!self.direct).then_some(status);
        if exchange.grpc && !self.direct && exchange.web.is_none() {
            headers.set_status(200);
            headers.set("content-type", b"application/grpc");
            // What a mapper says stands.
            if headers.get("grpc-status").is_none_or(<[u8]>::is_empty) {
                let code = self.grpc_status.unwrap_or_else(|| grpc_status_of_http(status));
                headers.set("grpc-status", code.to_string().as_bytes());
            }
            // A format of JSON ends with a line's end, which is none of the message.
            let message = body.strip_suffix(b"\n").filter(|_| content_type == "application/json").unwrap_or(&body);
            if !message.is_empty() && exchange.request.method() != Some("HEAD") {
                headers.set("grpc-message", percent_encode(message).as_bytes());
            }
            return (headers, Bytes::new());
        }
        if !body.is_empty() {
            headers.set("content-length", body.len().to_string().as_bytes());
            if !headers.contains("content-type") {
                headers.push(b"content-type", content_type.as_bytes());
            }
        } else {
            headers.remove("content-length");
            headers.remove("content-type");
        }
        (headers, body)
    }
}

impl Exchange {
    /// The client's side of a request broke.
    pub(super) fn client_failed(&mut self, e: BodyError) -> Stop {
        match e {
            BodyError::Protocol(detail) if self.answer.is_h1() => {
                self.http.stats.downstream_cx_protocol_error.inc();
                self.http.broken.set(true);
                let status = match detail {
                    "http1.headers_too_large" | "http1.too_many_headers" => 431,
                    _ => 400,
                };
                let mut reply = LocalReply::new(status, crate::h1::reason_phrase(status), detail)
                    .flagged(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR);
                reply.close = true;
                reply.flagged_late = true;
                reply.into()
            }
            BodyError::Unreadable(details) => {
                LocalReply::new(400, "Bad gRPC-web request, invalid base64 data.", details).into()
            }
            e => Stop::Gone(Gone::from(&e)),
        }
    }
}

/// gRPC's percent encoding of messages.
pub(super) fn percent_encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for b in bytes {
        if (0x20..0x7f).contains(b) && *b != b'%' {
            out.push(char::from(*b));
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}
