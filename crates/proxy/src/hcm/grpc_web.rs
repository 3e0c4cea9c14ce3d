//! The `grpc_web` filter: calls of gRPC as browsers make them, with trailers in the body, and with bodies in base64 if asked
//! for (Envoy `GrpcWebFilter`, and <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-WEB.md>).

use super::exchange::{Exchange, Stop, is_grpc};
use super::local_reply::percent_encode;
use crate::stream::{BodyError, Frame, RecvBody};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use proxy_core::Headers;
use proxy_core::retry::grpc_status_of_http;

const BINARY: [&[u8]; 2] = [b"application/grpc-web", b"application/grpc-web+proto"];
const TEXT: [&[u8]; 2] = [b"application/grpc-web-text", b"application/grpc-web-text+proto"];

/// Bytes of a foreign answer that become `grpc-message`.
const LONGEST_MESSAGE: usize = 16384;

/// A call that came this way.
#[derive(Debug)]
pub(crate) struct GrpcWeb {
    /// The answer goes back as text.
    text: bool,
    /// Of an answer in text: what is no group of three bytes yet, or no head of a message.
    held: BytesMut,
    /// And how much of the message there is behind that, its head included.
    left: usize,
    /// What turns the request's body into bytes, if it is text.
    pub(super) request: Option<TextBody>,
}

impl GrpcWeb {
    /// Makes the request one of gRPC, if it is a browser's.
    pub(super) fn begin(exchange: &mut Exchange) {
        let request = &mut exchange.request;
        let kind = request.get("content-type").unwrap_or_default();
        let is_text = TEXT.contains(&kind);
        if !(is_text || BINARY.contains(&kind)) || !request.contains(":path") {
            return;
        }
        let text = request.get("accept").is_some_and(|accept| TEXT.contains(&accept));
        // It would be that of another body.
        request.remove("content-length");
        request.set("content-type", b"application/grpc");
        request.set("te", b"trailers");
        if request.get("grpc-accept-encoding").is_none_or(<[u8]>::is_empty) {
            request.set("grpc-accept-encoding", b"identity");
        }
        exchange.grpc = true;
        exchange.begin_grpc_web();
        exchange.web =
            Some(Box::new(Self { text, held: BytesMut::new(), left: 0, request: is_text.then(TextBody::default) }));
    }

    /// Makes the head of an answer a browser's.
    pub(super) fn head(&self, headers: &mut Headers) {
        headers.remove("content-length");
        let [[_, binary], [_, text]] = [BINARY, TEXT];
        headers.set("content-type", if self.text { text } else { binary });
    }

    /// Whether an answer with a body is none of gRPC, nor a browser's: its body then says what went wrong.
    pub(super) fn is_foreign(headers: &Headers) -> bool {
        let kind = headers.get("content-type").unwrap_or_default();
        let kind = kind.split(|b| *b == b';').next().unwrap_or_default().trim_ascii_end();
        let is_web = BINARY.iter().any(|binary| binary.eq_ignore_ascii_case(kind));
        headers.status() != Some(200) || !(is_web || is_grpc(headers))
    }

    /// Makes a status of gRPC of such an answer.
    pub(super) fn explain(headers: &mut Headers, body: &[u8]) {
        headers.set("grpc-message", percent_encode(body).as_bytes());
        headers.set("grpc-status", grpc_status_of_http(headers.status().unwrap_or_default()).to_string().as_bytes());
    }

    /// A frame of the answer as the browser gets it; it may be empty.
    pub(super) fn frame(&mut self, frame: Frame) -> Frame {
        Frame::Data(match frame {
            Frame::Trailers(trailers) => {
                let mut lines = vec![0x80, 0, 0, 0, 0];
                for (name, value) in trailers.iter() {
                    for part in [name, b":", value, b"\r\n"] {
                        lines.extend_from_slice(part);
                    }
                }
                let length = (lines.len() - 5) as u32;
                lines[1..5].copy_from_slice(&length.to_be_bytes());
                if self.text { STANDARD.encode(lines).into() } else { lines.into() }
            }
            Frame::Data(data) if !self.text => data,
            Frame::Data(data) => self.text_of(&data),
        })
    }

    /// In base64, each message by itself: as far as it can be written by now.
    fn text_of(&mut self, data: &[u8]) -> Bytes {
        let mut out = String::new();
        self.held.extend_from_slice(data);
        loop {
            if self.left == 0 {
                let Some([_, length @ ..]) = self.held.first_chunk::<5>() else { break };
                self.left = 5 + u32::from_be_bytes(*length) as usize;
            }
            let ready = if self.held.len() < self.left { self.held.len() / 3 * 3 } else { self.left };
            if ready == 0 {
                break;
            }
            STANDARD.encode_string(self.held.split_to(ready), &mut out);
            self.left -= ready;
        }
        out.into()
    }
}

/// The first bytes of a foreign answer, once all of it is there.
pub(super) async fn foreign_body(exchange: &mut Exchange, body: &mut RecvBody) -> Result<Vec<u8>, Stop> {
    let mut text = Vec::new();
    // What an upstream does not say to its end is said as far as it got.
    while let Some(Ok(frame)) =
        std::future::poll_fn(|cx| exchange.poll_with(cx, |cx| body.poll_frame(cx).map(Ok))).await?
    {
        if let Frame::Data(data) = frame {
            let room = LONGEST_MESSAGE - text.len();
            text.extend_from_slice(&data[..data.len().min(room)]);
        }
    }
    Ok(text)
}

/// A request's body in base64, of which four characters are three bytes.
#[derive(Debug, Default)]
pub(super) struct TextBody {
    /// Up to three characters.
    held: BytesMut,
}

impl TextBody {
    /// The bytes of as much as can be read by now.
    pub(super) fn read(&mut self, data: &[u8]) -> Result<Bytes, BodyError> {
        self.held.extend_from_slice(data);
        let whole = self.held.split_to(self.held.len() / 4 * 4);
        STANDARD.decode(&whole).map(Bytes::from).map_err(|_| BodyError::Unreadable("grpc_base_64_decode_failed"))
    }

    /// Nothing follows.
    pub(super) fn end(&self) -> Result<(), BodyError> {
        match self.held.is_empty() {
            true => Ok(()),
            false => Err(BodyError::Unreadable("grpc_base_64_decode_failed_bad_size")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_over_any_cuts() {
        let mut body = TextBody::default();
        let parts: Vec<u8> = [&b"aG"[..], b"VsbG", b"8="].iter().flat_map(|part| body.read(part).unwrap()).collect();
        assert_eq!(parts, b"hello");
        assert!(body.end().is_ok());
        assert!(body.read(b"a").is_ok() && body.end().is_err());
        assert!(body.read(b"***").is_err());
    }

    #[test]
    fn messages_and_trailers_become_text() {
        let mut web = GrpcWeb { text: true, held: BytesMut::new(), left: 0, request: None };
        let mut text = |frame| match web.frame(frame) {
            Frame::Data(text) => text,
            Frame::Trailers(_) => panic!("a browser sees none"),
        };
        let parts = [&b"\0\0\0"[..], b"\0\x02h", b"i\0\0\0\0\0\0"];
        let all: Vec<u8> = parts.iter().flat_map(|part| text(Frame::Data(Bytes::from_static(part)))).collect();
        assert_eq!(all, b"AAAAAAJoaQ==AAAAAAA=");
        let trailers = text(Frame::Trailers(Headers::of([("grpc-status", "0")])));
        assert_eq!(STANDARD.decode(trailers).unwrap(), b"\x80\0\0\0\x0fgrpc-status:0\r\n");
    }
}
