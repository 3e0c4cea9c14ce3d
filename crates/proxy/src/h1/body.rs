//! Body framing: a decoder that takes bytes from a read buffer and gives frames.

use super::head::{BodyLength, CODEC, HeadError, Limits, TOO_LARGE, TOO_MANY, any_field, find, next_line};
use bytes::{Bytes, BytesMut};
use proxy_core::Headers;

/// A piece of a message body.
#[derive(Clone, Debug)]
pub(crate) enum Frame {
    Data(Bytes),
    Trailers(Headers),
}

/// Where in a body the connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Done,
    Length(u64),
    /// In front of or in the size of a chunk, as far as it was read.
    ChunkSize(Option<u64>),
    /// Behind the size, up to the end of its line; `cr`: only the LF is missing.
    ChunkExtension {
        size: u64,
        cr: bool,
    },
    ChunkData(u64),
    ChunkEnd,
    Trailers,
    UntilClose,
}

impl State {
    /// Reads on through what stands around the data of chunks: the new state, and how many bytes that took.
    fn skip_framing(mut self, bytes: &[u8]) -> Result<(Self, usize), HeadError> {
        let mut at = 0;
        loop {
            let rest = &bytes[at..];
            self = match (self, rest.first()) {
                (State::ChunkSize(_) | State::ChunkExtension { .. } | State::ChunkEnd, None) => return Ok((self, at)),
                (State::ChunkSize(size), Some(b)) => match (char::from(*b).to_digit(16), size) {
                    (Some(digit), size) => {
                        at += 1;
                        let longer = size.unwrap_or(0).checked_mul(16).and_then(|size| size.checked_add(digit.into()));
                        State::ChunkSize(Some(longer.ok_or(CODEC)?))
                    }
                    (None, Some(size)) if b"\t\r\n ;".contains(b) => State::ChunkExtension { size, cr: false },
                    (None, _) => return Err(CODEC),
                },
                // Some take a bare CR or LF for the end of a chunk's line, some for a part of it: what is read in two ways
                // is refused.
                (State::ChunkExtension { size, cr: true }, Some(b)) => {
                    at += 1;
                    match (b, size) {
                        (b'\n', 0) => State::Trailers,
                        (b'\n', _) => State::ChunkData(size),
                        _ => return Err(CODEC),
                    }
                }
                (State::ChunkExtension { size, cr: false }, _) => match memchr::memchr2(b'\r', b'\n', rest) {
                    Some(end) if rest[end] == b'\n' => return Err(CODEC),
                    Some(end) => {
                        at += end + 1;
                        State::ChunkExtension { size, cr: true }
                    }
                    None => return Ok((self, bytes.len())),
                },
                // As Envoy: what stands between a chunk's data and the end of its line is skipped. It goes no further.
                (State::ChunkEnd, _) => match find(rest, b'\n') {
                    Some(end) => {
                        at += end + 1;
                        State::ChunkSize(None)
                    }
                    None => return Ok((self, bytes.len())),
                },
                _ => return Ok((self, at)),
            };
        }
    }
}

/// Bounds of trailers.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    bytes: usize,
    fields: usize,
}

/// Decoder of one message body.
#[derive(Debug)]
pub(crate) struct Decoder {
    state: State,
    /// Where what has come ends.
    ahead: State,
    /// What is wrong with the chunks that have come.
    wrong: Option<HeadError>,
    /// What is wrong with the trailers that have come: what is before them is good.
    wrong_trailers: Option<HeadError>,
    trailers: Bounds,
}

/// One step of decoding.
pub(crate) enum Step {
    Frame(Frame),
    /// More bytes are needed.
    More,
    /// The body is complete.
    End,
}

impl Decoder {
    pub(crate) fn new(length: BodyLength, limits: &Limits) -> Self {
        let state = match length {
            BodyLength::None => State::Done,
            BodyLength::Length(n) => State::Length(n),
            BodyLength::Chunked => State::ChunkSize(None),
            BodyLength::Close => State::UntilClose,
        };
        let fields = if limits.trailers { limits.fields } else { usize::MAX };
        let trailers = Bounds { bytes: limits.bytes, fields };
        Self { state, ahead: state, wrong: None, wrong_trailers: None, trailers }
    }

    /// Nothing, or everything, is body.
    pub(crate) fn raw(length: BodyLength) -> Self {
        Self::new(length, &Limits::default())
    }

    /// Looks at bytes that have just come. Wrong chunks show before data of the same read is taken, as in Envoy, whose codec
    /// passes on what a read brought once all of it was parsed.
    pub(crate) fn look(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.ahead {
                State::ChunkData(left) => {
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    bytes = &bytes[take..];
                    let left = left - take as u64;
                    self.ahead = if left == 0 { State::ChunkEnd } else { State::ChunkData(left) };
                }
                State::ChunkSize(_) | State::ChunkExtension { .. } | State::ChunkEnd => {
                    match self.ahead.skip_framing(bytes) {
                        Ok((state, used)) => {
                            self.ahead = state;
                            bytes = &bytes[used..];
                        }
                        Err(e) => {
                            self.wrong = Some(e);
                            self.ahead = State::Done;
                        }
                    }
                }
                State::Trailers => {
                    if !bytes.starts_with(b"\n")
                        && !bytes.starts_with(b"\r\n")
                        && let Some(end) = trailers_end(bytes)
                    {
                        self.wrong_trailers = parse_trailers(&bytes[..end], self.trailers.fields).err();
                    }
                    return;
                }
                _ => return,
            }
        }
    }

    /// So many bytes of the body are known to come.
    pub(crate) fn expects(&self) -> usize {
        match self.state {
            State::Length(left) | State::ChunkData(left) => usize::try_from(left).unwrap_or(usize::MAX),
            _ => 0,
        }
    }

    /// What is wrong with what has come.
    pub(crate) fn wrong(&self) -> Option<HeadError> {
        self.wrong.or(self.wrong_trailers)
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

    /// `data` and that of the chunks behind it, as far as they are in `buf`.
    pub(crate) fn join(&mut self, data: Bytes, buf: &mut BytesMut) -> Bytes {
        let mut all = data;
        while self.state == State::ChunkEnd && !buf.is_empty() {
            match self.state.skip_framing(buf) {
                Ok((state @ State::ChunkData(_), used)) if buf.len() > used => {
                    let _ = buf.split_to(used);
                    self.state = state;
                }
                // What stands there is for the next step.
                _ => break,
            }
            let Ok(Step::Frame(Frame::Data(more))) = self.step(buf) else { break };
            let mut joined = all.try_into_mut().unwrap_or_else(|data| BytesMut::from(&data[..]));
            joined.extend_from_slice(&more);
            all = joined.freeze();
        }
        all
    }

    /// Takes the next frame from `buf`.
    pub(crate) fn step(&mut self, buf: &mut BytesMut) -> Result<Step, HeadError> {
        if let Some(wrong) = self.wrong {
            return Err(wrong);
        }
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
                State::ChunkSize(_) | State::ChunkExtension { .. } | State::ChunkEnd => {
                    let (state, used) = self.state.skip_framing(buf)?;
                    let _ = buf.split_to(used);
                    self.state = state;
                    if matches!(state, State::ChunkSize(_) | State::ChunkExtension { .. } | State::ChunkEnd) {
                        return Ok(Step::More);
                    }
                }
                State::Trailers => {
                    if buf.starts_with(b"\r\n") || buf.starts_with(b"\n") {
                        let _ = buf.split_to(if buf[0] == b'\r' { 2 } else { 1 });
                        self.state = State::Done;
                        return Ok(Step::End);
                    }
                    let Some(end) = trailers_end(buf) else {
                        return if buf.len() > self.trailers.bytes { Err(TOO_LARGE) } else { Ok(Step::More) };
                    };
                    if end > self.trailers.bytes {
                        return Err(TOO_LARGE);
                    }
                    let block = buf.split_to(end);
                    let trailers = parse_trailers(&block, self.trailers.fields)?;
                    self.state = State::Done;
                    return Ok(Step::Frame(Frame::Trailers(trailers)));
                }
            }
        }
    }
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

fn parse_trailers(block: &[u8], most: usize) -> Result<Headers, HeadError> {
    let mut trailers = Headers::new();
    let mut rest = block;
    while let Some(line) = next_line(&mut rest)? {
        let (colon, _, value) = any_field(line)?;
        if trailers.len() == most {
            return Err(TOO_MANY);
        }
        trailers.push(&line[..colon], &value);
    }
    Ok(trailers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(length: BodyLength, input: &[u8], piece: usize) -> Result<(Vec<u8>, usize), HeadError> {
        let mut decoder = Decoder::raw(length);
        let mut buf = BytesMut::new();
        let (mut out, mut trailers) = (Vec::new(), 0);
        let mut pieces = input.chunks(piece);
        loop {
            match decoder.step(&mut buf)? {
                Step::Frame(Frame::Data(d)) => out.extend_from_slice(&d),
                Step::Frame(Frame::Trailers(t)) => trailers = t.len(),
                Step::End => return Ok((out, trailers)),
                Step::More => {
                    let piece = pieces.next().expect("the body ends within the input");
                    decoder.look(piece);
                    buf.extend_from_slice(piece);
                }
            }
        }
    }

    #[test]
    fn chunked_in_any_pieces() {
        let input = b"5;ext=1\r\nhello\r\n00000000000000000006 \r\n world what is skipped\r\n0\r\nx-a: 1\r\n\r\n";
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
            b"1\r\na\r\n\r\n",
            b"-1\r\n",
            b"1x\r\na\r\n",
            b"1;a\rb\r\na\r\n",
            b"1\na\r\n",
            b"1;\na\r\n",
        ] {
            assert!(decode(BodyLength::Chunked, input, 64).is_err(), "{input:?}");
        }
    }

    #[test]
    fn chunks_of_one_read_are_one_piece() {
        let mut decoder = Decoder::raw(BodyLength::Chunked);
        let mut buf = BytesMut::from(&b"2\r\nab\r\n1;x\r\nc\r\n3\r\nde"[..]);
        let Ok(Step::Frame(Frame::Data(first))) = decoder.step(&mut buf) else { panic!("no data") };
        assert_eq!(decoder.join(first, &mut buf), &b"abcde"[..]);
        buf.extend_from_slice(b"f\r\n0\r\nx-a: 1\r\n 2\r\n\r\n");
        let Ok(Step::Frame(Frame::Data(rest))) = decoder.step(&mut buf) else { panic!("no data") };
        assert_eq!(decoder.join(rest, &mut buf), &b"f"[..]);
        let Ok(Step::Frame(Frame::Trailers(trailers))) = decoder.step(&mut buf) else { panic!("no trailers") };
        assert_eq!(trailers.get("x-a"), Some(&b"1 2"[..]));
        assert!(decoder.done());
    }

    #[test]
    fn wrong_trailers_are_known_with_the_data_before_them() {
        let input = b"1\r\na\r\n0\r\nbad\r\n\r\n";
        let mut decoder = Decoder::raw(BodyLength::Chunked);
        decoder.look(input);
        assert!(decoder.wrong().is_some());
        let mut buf = BytesMut::from(&input[..]);
        assert!(matches!(decoder.step(&mut buf), Ok(Step::Frame(Frame::Data(_)))));
        assert!(decoder.step(&mut buf).is_err() && !decoder.done());
    }
}
