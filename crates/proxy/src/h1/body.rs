//! Body framing: a decoder that takes bytes from a read buffer and gives frames.

use super::head::{BodyLength, HeadError, find, is_token};
use bytes::{Bytes, BytesMut};
use proxy_core::Headers;

/// A piece of a message body.
#[derive(Clone, Debug)]
pub(crate) enum Frame {
    Data(Bytes),
    Trailers(Headers),
}

/// A chunk line (size and extensions) longer than this is refused.
const MAX_CHUNK_LINE: usize = 4096;
/// Trailers longer than this are refused.
const MAX_TRAILERS: usize = 60 * 1024;

/// Where in a body the connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Done,
    Length(u64),
    ChunkLine,
    ChunkData(u64),
    ChunkEnd,
    Trailers,
    UntilClose,
}

/// Decoder of one message body.
#[derive(Debug)]
pub(crate) struct Decoder {
    state: State,
}

/// One step of decoding.
pub(crate) enum Step {
    Frame(Frame),
    /// More bytes are needed.
    More,
    /// The body is complete.
    End,
}

const BAD_CHUNK: HeadError = HeadError { status: 400, detail: "http1.codec_error" };

impl Decoder {
    pub(crate) fn new(length: BodyLength) -> Self {
        let state = match length {
            BodyLength::None => State::Done,
            BodyLength::Length(n) => State::Length(n),
            BodyLength::Chunked => State::ChunkLine,
            BodyLength::Close => State::UntilClose,
        };
        Self { state }
    }

    /// So many bytes of the body are known to come.
    pub(crate) fn expects(&self) -> usize {
        match self.state {
            State::Length(left) | State::ChunkData(left) => usize::try_from(left).unwrap_or(usize::MAX),
            _ => 0,
        }
    }

    /// True when the whole body was taken from the buffer.
    pub(crate) fn done(&self) -> bool {
        self.state == State::Done
    }

    /// The peer closed: true when that is a proper end of the body.
    pub(crate) fn finish_on_close(&mut self) -> bool {
        if self.state == State::UntilClose {
            self.state = State::Done;
        }
        self.done()
    }

    /// Takes the next frame from `buf`.
    pub(crate) fn step(&mut self, buf: &mut BytesMut) -> Result<Step, HeadError> {
        loop {
            match self.state {
                State::Done => return Ok(Step::End),
                State::UntilClose => {
                    if buf.is_empty() {
                        return Ok(Step::More);
                    }
                    return Ok(Step::Frame(Frame::Data(buf.split().freeze())));
                }
                State::Length(left) => {
                    if buf.is_empty() {
                        return Ok(Step::More);
                    }
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
                    let left = left - take as u64;
                    self.state = if left == 0 { State::Done } else { State::Length(left) };
                    return Ok(Step::Frame(Frame::Data(buf.split_to(take).freeze())));
                }
                State::ChunkData(left) => {
                    if buf.is_empty() {
                        return Ok(Step::More);
                    }
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
                    let left = left - take as u64;
                    self.state = if left == 0 { State::ChunkEnd } else { State::ChunkData(left) };
                    return Ok(Step::Frame(Frame::Data(buf.split_to(take).freeze())));
                }
                // DIFFERS: Envoy skips what stands between a chunk's data and the end of its line; here it is refused, for
                // others may take it for something else.
                State::ChunkEnd => match buf.as_ref() {
                    [] | [b'\r'] => return Ok(Step::More),
                    [b'\r', b'\n', ..] => {
                        let _ = buf.split_to(2);
                        self.state = State::ChunkLine;
                    }
                    [b'\n', ..] => {
                        let _ = buf.split_to(1);
                        self.state = State::ChunkLine;
                    }
                    _ => return Err(BAD_CHUNK),
                },
                State::ChunkLine => {
                    let Some(end) = find(buf, b'\n') else {
                        return if buf.len() > MAX_CHUNK_LINE { Err(BAD_CHUNK) } else { Ok(Step::More) };
                    };
                    let line = buf.split_to(end + 1);
                    let size = chunk_size(&line[..end])?;
                    self.state = if size == 0 { State::Trailers } else { State::ChunkData(size) };
                }
                State::Trailers => {
                    if buf.starts_with(b"\r\n") || buf.starts_with(b"\n") {
                        let _ = buf.split_to(if buf[0] == b'\r' { 2 } else { 1 });
                        self.state = State::Done;
                        return Ok(Step::End);
                    }
                    let Some(end) = trailers_end(buf) else {
                        return if buf.len() > MAX_TRAILERS { Err(BAD_CHUNK) } else { Ok(Step::More) };
                    };
                    let block = buf.split_to(end);
                    self.state = State::Done;
                    return Ok(Step::Frame(Frame::Trailers(parse_trailers(&block)?)));
                }
            }
        }
    }
}

/// Hex digits, then blanks and an optional extension, which is dropped.
fn chunk_size(line: &[u8]) -> Result<u64, HeadError> {
    // Some take a bare LF for the end of a chunk's line, some for a part of it: what is read in two ways is refused.
    let line = line.strip_suffix(b"\r").ok_or(BAD_CHUNK)?;
    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    // 15 hex digits stay below 2^60: no overflow, and nobody sends such a chunk.
    if digits == 0 || digits > 15 {
        return Err(BAD_CHUNK);
    }
    let rest = line[digits..].trim_ascii_start();
    if !rest.is_empty() && rest[0] != b';' {
        return Err(BAD_CHUNK);
    }
    Ok(line[..digits].iter().fold(0, |n, d| n * 16 + u64::from((*d as char).to_digit(16).unwrap_or(0))))
}

fn trailers_end(buf: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        at += find(&buf[at..], b'\n')? + 1;
        match buf.get(at..) {
            Some([b'\n', ..]) => return Some(at + 1),
            Some([b'\r', b'\n', ..]) => return Some(at + 2),
            _ => {}
        }
    }
}

fn parse_trailers(block: &[u8]) -> Result<Headers, HeadError> {
    let mut trailers = Headers::new();
    for line in block.split(|b| *b == b'\n') {
        let line = line.trim_ascii_end();
        if line.is_empty() {
            continue;
        }
        let colon = find(line, b':').ok_or(BAD_CHUNK)?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.is_empty() || !name.iter().all(|b| is_token(*b)) || value.iter().any(|b| *b < 32 && *b != 9) {
            return Err(BAD_CHUNK);
        }
        trailers.push(name, value);
    }
    Ok(trailers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(length: BodyLength, input: &[u8], piece: usize) -> Result<(Vec<u8>, usize), HeadError> {
        let mut decoder = Decoder::new(length);
        let mut buf = BytesMut::new();
        let (mut out, mut trailers) = (Vec::new(), 0);
        let mut pieces = input.chunks(piece);
        loop {
            match decoder.step(&mut buf)? {
                Step::Frame(Frame::Data(d)) => out.extend_from_slice(&d),
                Step::Frame(Frame::Trailers(t)) => trailers = t.len(),
                Step::End => return Ok((out, trailers)),
                Step::More => buf.extend_from_slice(pieces.next().expect("the body ends within the input")),
            }
        }
    }

    #[test]
    fn chunked_in_any_pieces() {
        let input = b"5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nx-a: 1\r\n\r\n";
        for piece in 1..input.len() {
            assert_eq!(decode(BodyLength::Chunked, input, piece).unwrap(), (b"hello world".to_vec(), 1));
        }
    }

    #[test]
    fn bad_chunks_are_refused() {
        for input in [
            &b"g\r\n"[..],
            b"\r\n",
            b"ffffffffffffffffff\r\n",
            b"1\r\nabc\r\n",
            b"-1\r\n",
            b"1 2\r\na\r\n",
            b"1\na\r\n",
            b"1;\na\r\n",
        ] {
            assert!(decode(BodyLength::Chunked, input, 64).is_err(), "{input:?}");
        }
    }
}
