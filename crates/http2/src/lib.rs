//! HTTP/2 of the data path (RFC 9113, RFC 7541): frames, header compression, streams and windows of one connection, without
//! sockets.
//!
//! [`Connection`] takes bytes ([`Connection::receive`]), and writes bytes to an [`Out`]; whoever has the socket moves both. What
//! belongs to one request is a [`Stream`]: a handle for one task, which is woken when something is there for it. Everything
//! of a connection lies on one thread behind one cell; nothing is locked, and a stream costs no allocation of its own once a
//! connection is warm.
//!
//! Errors are answered as Envoy's codec answers them, which is nghttp2 with its callbacks (`ConnectionImpl::onInvalidFrame`):
//! broken framing, padding and compression with a GOAWAY, most others by closing without a word.

mod conn;
mod flood;
mod frame;
#[cfg(test)]
mod fuzz;
mod hpack;
mod message;
mod receive;
mod send;
mod stream;
#[cfg(test)]
mod tests;

pub use conn::{Connection, Excess, Fault, Incoming, Malformed, Options, Out, Tally};
pub use flood::{Flooded, Limits, is_rapid_reset};
pub use frame::{PREFACE, Reason};
pub use stream::{Broken, Item, Stream};

/// What Envoy's codec says of malformed fields.
pub const INVALID_FIELD: &str = "http2.invalid.header.field";
/// And of messages that lack some, have a body of another length, or trailers that do not end them.
pub const VIOLATION: &str = "http2.violation.of.messaging.rule";
/// And of a stream with frames that it cannot have.
pub const UNKNOWN: &str = "http2.unknown.nghttp2.error";
/// And of all that is under way on a connection that ends for an error of its peer.
pub const CALLBACK_FAILED: &str = "codec_error:The_user_callback_function_failed";
