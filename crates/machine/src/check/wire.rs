//! What really crosses the wire between pods: a packet socket in the mesh's namespace that follows TCP streams and tells TLS records
//! from anything else.

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};

use crate::network::{PODS_V4, gateway_v4};

/// Streams followed at once; a smoke test has dozens.
const STREAMS_MAX: usize = 4096;

/// Bytes seen between pods since the tap was opened.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// In streams that are TLS records from their first byte on.
    pub(crate) tls: AtomicU64,
    /// Everything else, on the ports looked at.
    pub(crate) plain: AtomicU64,
    example: Mutex<Option<String>>,
}

impl Seen {
    /// One stream that was not TLS.
    pub(crate) fn example(&self) -> Option<String> {
        self.example.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// An open tap; it closes when dropped.
pub(crate) struct Tap {
    seen: Arc<Seen>,
    stop: Arc<AtomicBool>,
}

impl Tap {
    /// Listens to all packets of the mesh's namespace; streams to `port` of pods count.
    pub(crate) fn open(ns: &Netns, port: u16) -> io::Result<Self> {
        let socket = ns.run(|| {
            // Cooked packets: they start at the IP header, whatever the interface.
            Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(i32::from(0x0003u16.to_be()))))
        })??;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        // A burst must not overrun the reader: lost packets would look like a stream out of step.
        let _ = socket.set_recv_buffer_size(8 << 20);
        let seen = Arc::new(Seen::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (seen_inside, stop_inside) = (Arc::clone(&seen), Arc::clone(&stop));
        std::thread::Builder::new().name("wire-tap".to_owned()).spawn(move || {
            let mut streams = Streams { port, streams: HashMap::new() };
            let mut packet = vec![0u8; 1 << 17];
            while !stop_inside.load(Ordering::Relaxed) {
                if let Ok(length) = (&socket).read(&mut packet) {
                    streams.packet(&packet[..length], &seen_inside);
                }
            }
        })?;
        Ok(Self { seen, stop })
    }

    pub(crate) fn seen(&self) -> &Seen {
        &self.seen
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Streams {
    port: u16,
    streams: HashMap<(SocketAddrV4, SocketAddrV4), Stream>,
}

/// One direction of a connection, from its SYN on.
struct Stream {
    next: u32,
    /// Bytes left of the record being read; 0 at a header.
    left: usize,
    header: Vec<u8>,
    plain: bool,
}

impl Streams {
    /// Takes one packet. The same packet passes several interfaces; what was seen already is skipped by its sequence number.
    fn packet(&mut self, packet: &[u8], seen: &Seen) {
        let Some(segment) = Segment::parse(packet) else { return };
        let between_pods = is_pod(*segment.from.ip()) && is_pod(*segment.to.ip());
        if !between_pods || (segment.from.port() != self.port && segment.to.port() != self.port) {
            return;
        }
        let key = (segment.from, segment.to);
        if segment.syn {
            if self.streams.len() < STREAMS_MAX {
                let next = segment.sequence.wrapping_add(1);
                let known = self.streams.get(&key).is_some_and(|stream| stream.next.wrapping_sub(next) < 1 << 30);
                if !known {
                    self.streams.insert(key, Stream { next, left: 0, header: Vec::new(), plain: false });
                }
            }
            return;
        }
        // Streams that began before the tap are not judged.
        let Some(stream) = self.streams.get_mut(&key) else { return };
        let behind = stream.next.wrapping_sub(segment.sequence) as usize;
        if behind > 1 << 30 || behind >= segment.payload.len() {
            return;
        }
        let fresh = &segment.payload[behind..];
        stream.next = stream.next.wrapping_add(u32::try_from(fresh.len()).unwrap_or(0));
        if !stream.plain {
            stream.take(fresh);
        }
        if stream.plain {
            seen.plain.fetch_add(fresh.len() as u64, Ordering::Relaxed);
            let start = String::from_utf8_lossy(&fresh[..fresh.len().min(40)]).into_owned();
            seen.example
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert_with(|| format!("{} to {}: {start:?}", segment.from, segment.to));
        } else {
            seen.tls.fetch_add(fresh.len() as u64, Ordering::Relaxed);
        }
    }
}

impl Stream {
    /// Follows record headers: type 20 to 24, version 3.x, at most 2^14 + 2048 bytes (RFC 5246, 6.2).
    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let step = self.left.min(bytes.len());
                self.left -= step;
                bytes = &bytes[step..];
                continue;
            }
            let step = (5 - self.header.len()).min(bytes.len());
            self.header.extend(&bytes[..step]);
            bytes = &bytes[step..];
            if let [kind, major, _, high, low] = self.header[..] {
                let length = usize::from(u16::from_be_bytes([high, low]));
                if !(20..=24).contains(&kind) || major != 3 || length > (1 << 14) + 2048 {
                    self.plain = true;
                    return;
                }
                self.left = length;
                self.header.clear();
            }
        }
    }
}

struct Segment<'a> {
    from: SocketAddrV4,
    to: SocketAddrV4,
    sequence: u32,
    syn: bool,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    fn parse(packet: &'a [u8]) -> Option<Self> {
        let first = *packet.first()?;
        if first >> 4 != 4 || *packet.get(9)? != 6 {
            return None;
        }
        let header = usize::from(first & 15) * 4;
        let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
        // Large receive offload may leave the total length at zero.
        let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
        let ip = |at: usize| {
            Some(Ipv4Addr::new(*packet.get(at)?, *packet.get(at + 1)?, *packet.get(at + 2)?, *packet.get(at + 3)?))
        };
        let tcp = packet.get(header..end)?;
        let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
        let sequence = u32::from_be_bytes([*tcp.get(4)?, *tcp.get(5)?, *tcp.get(6)?, *tcp.get(7)?]);
        let offset = usize::from(*tcp.get(12)? >> 4) * 4;
        Some(Self {
            from: SocketAddrV4::new(ip(12)?, port(0)?),
            to: SocketAddrV4::new(ip(16)?, port(2)?),
            sequence,
            syn: *tcp.get(13)? & 2 != 0,
            payload: tcp.get(offset..)?,
        })
    }
}

fn is_pod(ip: Ipv4Addr) -> bool {
    match PODS_V4.ip {
        std::net::IpAddr::V4(base) => {
            ip.octets()[..2] == base.octets()[..2] && std::net::IpAddr::V4(ip) != gateway_v4()
        }
        std::net::IpAddr::V6(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(sequence: u32, syn: bool, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 244, 0, 2, 10, 244, 0, 3];
        bytes.extend([0x9c, 0x40, 0x23, 0x78]);
        bytes.extend(sequence.to_be_bytes());
        bytes.extend([0, 0, 0, 0, 0x50, if syn { 2 } else { 16 }, 0, 0, 0, 0, 0, 0]);
        bytes.extend(payload);
        let total = u16::try_from(bytes.len()).unwrap().to_be_bytes();
        bytes[2..4].copy_from_slice(&total);
        bytes
    }

    #[test]
    fn records_are_told_from_plaintext() {
        let seen = Seen::default();
        let mut streams = Streams { port: 9080, streams: HashMap::new() };
        streams.packet(&packet(7, true, b""), &seen);
        let record = [23, 3, 3, 0, 4, 1, 2, 3, 4];
        // Cut inside a header, repeated, and continued.
        streams.packet(&packet(8, false, &record[..3]), &seen);
        streams.packet(&packet(8, false, &record[..3]), &seen);
        streams.packet(&packet(11, false, &record[3..]), &seen);
        assert_eq!((seen.tls.load(Ordering::Relaxed), seen.plain.load(Ordering::Relaxed)), (9, 0));
        streams.packet(&packet(17, false, b"GET / HTTP/1.1\r\n"), &seen);
        assert_eq!(seen.plain.load(Ordering::Relaxed), 16);
        assert!(seen.example().unwrap().contains("GET /"));
    }

    #[test]
    fn noise_is_ignored() {
        let seen = Seen::default();
        let mut streams = Streams { port: 9080, streams: HashMap::new() };
        for bytes in [&b""[..], b"\x45", &[0x4f; 30], &[0x60; 60]] {
            streams.packet(bytes, &seen);
        }
        assert_eq!(seen.plain.load(Ordering::Relaxed), 0);
    }
}
