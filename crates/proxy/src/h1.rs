//! HTTP/1 codec: heads parsed once into an arena, bodies forwarded as bytes, every buffer bounded.

mod body;
mod conn;
#[cfg(test)]
mod fuzz;
mod head;
mod scan;
mod write;

pub(crate) use body::Frame;
pub(crate) use conn::{Conn, ReadError, Shared};
pub(crate) use head::{HeadError, Limits, RequestHead, UnderscoreAction};
pub(crate) use write::{
    CHUNKED, EMPTY, Style, framing_bytes, is_bodiless, reason_phrase, write_request, write_response,
};
