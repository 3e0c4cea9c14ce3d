//! Who is at the other end of a TCP stream, said in its first bytes by proxies that agreed on it by ALPN.

use super::metadata::{MAGIC, MAX_LENGTH, of_frame};
use crate::io::Io;
use crate::stats::Workload;
use std::io;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};

/// Says who we are and hears who the peer is. `None`: it did not say; what it sent instead is still to be read.
///
/// Our frame goes out at once: Envoy's filter writes its own only when it has something to write or has read something, so a
/// peer whose protocol lets the server speak first would otherwise never be heard.
pub(crate) async fn exchange(io: &mut Io, own: &[u8]) -> io::Result<Option<Workload>> {
    io.write_all(own).await?;
    io.flush().await?;
    if !says_who(io).await? {
        return Ok(None);
    }
    let length = io.read_u32().await? as usize;
    if length > MAX_LENGTH {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{length} bytes of peer metadata")));
    }
    let mut card = vec![0; length];
    io.read_exact(&mut card).await?;
    Ok(of_frame(&card))
}

/// Takes the magic off the stream, if it is there. A peer writes it in one piece, so what it begins with shows at once.
async fn says_who(io: &mut Io) -> io::Result<bool> {
    let mut seen = 0;
    while seen < MAGIC.len() {
        let ahead = match io {
            Io::Server(stream) => stream.fill_buf().await?,
            Io::Client(stream) => stream.fill_buf().await?,
            // There is no ALPN without TLS.
            Io::Raw(_) => return Ok(false),
        };
        let next = &MAGIC[seen..];
        let n = ahead.len().min(next.len());
        if n == 0 || ahead[..n] != next[..n] {
            // Only a peer that stops within the magic loses bytes by this.
            return if seen == 0 { Ok(false) } else { Err(io::ErrorKind::InvalidData.into()) };
        }
        match io {
            Io::Server(stream) => stream.consume(n),
            Io::Client(stream) => stream.consume(n),
            Io::Raw(_) => {}
        }
        seen += n;
    }
    Ok(true)
}
