//! Header compression (RFC 7541).
//!
//! In: header blocks and fields as bytes.  Out: the same the other way. What fields mean is not known here.
//! One [`Decoder`] and one [`Encoder`] per connection; each has a dynamic table that both ends keep alike.

mod decoder;
mod encoder;
#[cfg(test)]
mod fuzz;
mod huffman;
mod table;

pub(crate) use decoder::{Decoder, Malformed};
pub(crate) use encoder::Encoder;
