//! Answers to streams whose heads do not end in time. The `h2` crate knows of a stream only once its head is complete;
//! until then what is to be said of it is written beside the crate, by way of the guard.

use super::switch::Switch;
use crate::frames::{CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM};
use crate::hcm::Http;
use crate::hcm::exchange::{Exchange, Hints};
use crate::hcm::respond::Answer;
use proxy_core::Headers;
use proxy_core::stream_info::HttpProtocol;
use std::cell::RefCell;
use std::rc::Rc;

/// What a frame may carry unless the peer allows more.
const MAX_PAYLOAD: usize = 16384;
/// `:status` in the static table (RFC 7541, appendix A).
const STATUS: u8 = 8;

/// An answer in memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Late(Rc<RefCell<(Vec<u8>, Vec<u8>)>>);

impl Late {
    /// Takes the head.
    pub(crate) fn head(&self, status: u16, headers: &Headers) {
        let mut block = vec![STATUS];
        string(&mut block, status.to_string().as_bytes());
        for (name, value) in headers.iter_regular() {
            // Without a place in the table, which is the crate's.
            block.push(0);
            string(&mut block, name);
            string(&mut block, value);
        }
        self.0.borrow_mut().0 = block;
    }

    /// Takes a part of the body.
    pub(crate) fn push(&self, data: &[u8]) {
        self.0.borrow_mut().1.extend_from_slice(data);
    }

    /// All of it as frames, and a reset, for the rest of the request is not wanted.
    ///
    /// The windows of the peer are not looked at: a few words fit, unless it wants nothing to be sent.
    fn frames(&self, stream: u32) -> Vec<u8> {
        let (block, body) = &*self.0.borrow();
        let mut out = Vec::with_capacity(block.len() + body.len() + 64);
        let mut kind = HEADERS;
        let mut parts = block.chunks(MAX_PAYLOAD).peekable();
        while let Some(part) = parts.next() {
            let mut flags = if parts.peek().is_none() { END_HEADERS } else { 0 };
            if kind == HEADERS && body.is_empty() {
                flags |= END_STREAM;
            }
            frame(&mut out, kind, flags, stream, part);
            kind = CONTINUATION;
        }
        let mut parts = body.chunks(MAX_PAYLOAD).peekable();
        while let Some(part) = parts.next() {
            let flags = if parts.peek().is_none() { END_STREAM } else { 0 };
            frame(&mut out, DATA, flags, stream, part);
        }
        frame(&mut out, RST_STREAM, 0, stream, &u32::from(h2::Reason::NO_ERROR).to_be_bytes());
        out
    }
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// A string literal without Huffman's code (RFC 7541, 5.2).
fn string(out: &mut Vec<u8>, text: &[u8]) {
    const MOST: usize = 127;
    let mut rest = text.len();
    if rest < MOST {
        out.push(rest as u8);
    } else {
        out.push(MOST as u8);
        rest -= MOST;
        while rest >= 128 {
            out.push((rest % 128) as u8 | 128);
            rest /= 128;
        }
        out.push(rest as u8);
    }
    out.extend_from_slice(text);
}

/// Answers a head that did not end in time.
pub(super) async fn refuse(http: &Rc<Http>, switch: &Switch, stream: u32, details: &'static str) {
    let late = Late::default();
    http.count_h2_request();
    let answer = Answer::Late(late.clone());
    let exchange = Exchange::new(http, HttpProtocol::Http2, Headers::new(), answer, Hints::default());
    exchange.refuse(408, details, false).await;
    switch.answer(stream, &late.frames(stream));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_those_of_an_answer() {
        let late = Late::default();
        late.head(408, &Headers::of([("server", "envoy")]));
        late.push(b"late");
        let expected = [
            &[0, 0, 19, 1, 4, 0, 0, 0, 7, 8, 3][..],
            b"408\0\x06server\x05envoy",
            b"\0\0\x04\0\x01\0\0\0\x07late",
            b"\0\0\x04\x03\0\0\0\0\x07\0\0\0\0",
        ];
        assert_eq!(late.frames(7), expected.concat());
    }

    #[test]
    fn long_values_and_heads_are_cut_where_they_must() {
        let late = Late::default();
        let long = "v".repeat(20_000);
        late.head(408, &Headers::of([("x", long.as_str())]));
        let out = late.frames(1);
        assert_eq!(out[..9], [0, 0x40, 0, HEADERS, END_STREAM, 0, 0, 0, 1]);
        // 127 and 19873 = 1 * 16384 + 27 * 128 + 33.
        assert_eq!(out[9..20], [8, 3, b'4', b'0', b'8', 0, 1, b'x', 127, 33 | 128, 27 | 128]);
        let second = 9 + MAX_PAYLOAD;
        assert_eq!(out[second + 3..second + 5], [CONTINUATION, END_HEADERS]);
    }
}
