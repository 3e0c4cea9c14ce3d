//! A netlink socket with extended acknowledgements: requests, dumps and nf_tables batches.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::wire::{self, Message, attributes, messages};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
pub(crate) const F_REQUEST: u16 = 1;
pub(crate) const F_ACK: u16 = 4;
pub(crate) const F_DUMP: u16 = 0x300;
/// The dump changed under us; the caller starts again.
const F_DUMP_INTR: u16 = 0x10;
/// Set in an error when the original request is not echoed (NETLINK_CAP_ACK).
const F_CAPPED: u16 = 0x100;
/// Set in an error when attributes follow (NETLINK_EXT_ACK).
const F_ACK_TLVS: u16 = 0x200;
const NETLINK_CAP_ACK: libc::c_int = 10;
const NETLINK_EXT_ACK: libc::c_int = 11;
/// Enough for a ruleset of many thousand rules in one datagram.
const SEND_BUFFER: libc::c_int = 8 << 20;
/// The kernel fills dump datagrams up to 32 KiB; nf_tables objects stay below 64 KiB.
const RECEIVE: usize = 1 << 16;

/// What the kernel said about one message.
#[derive(Clone, Debug, Default)]
pub(crate) struct Failure {
    pub(crate) errno: i32,
    pub(crate) message: Option<String>,
    /// Where in the request the fault is, in bytes from its start.
    pub(crate) offset: Option<usize>,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self { errno: error.raw_os_error().unwrap_or(libc::EIO), ..Self::default() }
    }
}

/// Belongs to the network namespace of the thread that opened it, whoever uses it later.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    pub(crate) fn open(protocol: libc::c_int) -> io::Result<Self> {
        // SAFETY: plain system call without pointers; the result is checked before it is owned.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let socket = Self { fd, sequence: 0, buffer: Vec::new() };
        // Old kernels lack these two: errors are then only numbers.
        let _ = socket.option(libc::SOL_NETLINK, NETLINK_CAP_ACK, 1);
        let _ = socket.option(libc::SOL_NETLINK, NETLINK_EXT_ACK, 1);
        Ok(socket)
    }

    fn option(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
        // SAFETY: `value` lives on the stack for the whole call and its size is given.
        let result = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    pub(crate) fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            // SAFETY: pointer and length are those of one live slice. Unconnected netlink sockets send to the kernel.
            let sent = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
            match sent {
                n if n >= 0 => return Ok(()),
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
    }

    /// One datagram into the buffer; `None` when `wait` is false and there is none.
    fn receive(&mut self, wait: bool) -> io::Result<Option<usize>> {
        if self.buffer.is_empty() {
            // Zeroed by the kernel: pages that no answer reaches are never touched.
            self.buffer = vec![0; RECEIVE];
        }
        let flags = libc::MSG_TRUNC | if wait { 0 } else { libc::MSG_DONTWAIT };
        loop {
            // SAFETY: the buffer is live, exclusively borrowed, and its length is given.
            let got =
                unsafe { libc::recv(self.fd.as_raw_fd(), self.buffer.as_mut_ptr().cast(), self.buffer.len(), flags) };
            if got >= 0 {
                let got = got as usize;
                if got > self.buffer.len() {
                    return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
                }
                return Ok(Some(got));
            }
            match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e if e.kind() == io::ErrorKind::WouldBlock && !wait => return Ok(None),
                e => return Err(e),
            }
        }
    }

    /// Sends one change and waits for its acknowledgement.
    pub(crate) fn request(&mut self, message: Message) -> Result<(), Failure> {
        self.query(message).map(drop)
    }

    /// Sends one request and returns the body of the object that comes before the acknowledgement, if one does.
    pub(crate) fn query(&mut self, mut message: Message) -> Result<Option<Vec<u8>>, Failure> {
        let sequence = self.next_sequence();
        message.or_flags(F_REQUEST | F_ACK);
        message.set_sequence(sequence);
        self.send(message.finish())?;
        let mut answer = None;
        loop {
            let Some(length) = self.receive(true)? else { continue };
            for received in messages(&self.buffer[..length]).filter(|r| r.sequence == sequence) {
                if received.kind != NLMSG_ERROR {
                    answer = Some(received.body.to_vec());
                    continue;
                }
                let failure = failure(received.flags, received.body);
                return if failure.errno == 0 { Ok(answer) } else { Err(failure) };
            }
        }
    }

    /// Asks for all objects and keeps what `each` makes of their bodies. Starts again when the kernel says that the state changed
    /// during the dump, so the result is always of one moment.
    pub(crate) fn dump<T>(
        &mut self,
        message: &Message,
        mut each: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Failure> {
        const ATTEMPTS: usize = 20;
        for _ in 0..ATTEMPTS {
            let mut message = message.clone();
            let sequence = self.next_sequence();
            message.or_flags(F_REQUEST | F_DUMP);
            message.set_sequence(sequence);
            self.send(message.finish())?;
            if let Some(all) = self.collect(sequence, &mut each)? {
                return Ok(all);
            }
        }
        Err(Failure { errno: libc::EINTR, ..Failure::default() })
    }

    fn collect<T>(
        &mut self,
        sequence: u32,
        each: &mut impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Failure> {
        let mut all = Vec::new();
        let mut torn = false;
        loop {
            let Some(length) = self.receive(true)? else { continue };
            for received in messages(&self.buffer[..length]) {
                if received.sequence != sequence {
                    continue;
                }
                torn |= received.flags & F_DUMP_INTR != 0;
                match received.kind {
                    NLMSG_DONE => {
                        let errno = -(wire::ne32(received.body) as i32);
                        return match errno {
                            libc::EINTR => Ok(None),
                            e if e > 0 => Err(Failure { errno: e, ..Failure::default() }),
                            _ => Ok((!torn).then_some(all)),
                        };
                    }
                    NLMSG_ERROR => {
                        let failure = failure(received.flags, received.body);
                        return if failure.errno == 0 { Ok(Some(all)) } else { Err(failure) };
                    }
                    _ => all.extend(each(received.body)),
                }
            }
        }
    }

    /// Sends a batch in one datagram. nfnetlink works on it before `send` returns, so every answer is already queued then:
    /// the failures as (sequence, failure), in order.
    pub(crate) fn batch(&mut self, bytes: &[u8]) -> Result<Vec<(u32, Failure)>, Failure> {
        let wanted = SEND_BUFFER.max(i32::try_from(bytes.len()).unwrap_or(i32::MAX).saturating_mul(2));
        // Refused in a user namespace; the plain option is capped by the system but enough for some thousand rules.
        if self.option(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, wanted).is_err() {
            self.option(libc::SOL_SOCKET, libc::SO_SNDBUF, wanted)?;
        }
        self.send(bytes)?;
        let mut failures = Vec::new();
        while let Some(length) = self.receive(false)? {
            for received in messages(&self.buffer[..length]) {
                if received.kind == NLMSG_ERROR {
                    let failure = failure(received.flags, received.body);
                    if failure.errno != 0 {
                        failures.push((received.sequence, failure));
                    }
                }
            }
        }
        Ok(failures)
    }
}

/// Reads an `nlmsgerr`: error, header of the request (with its body unless capped), then attributes.
fn failure(flags: u16, body: &[u8]) -> Failure {
    const MESSAGE: u16 = 1;
    const OFFSET: u16 = 2;
    let mut failure = Failure { errno: -(wire::ne32(body) as i32), ..Failure::default() };
    if flags & F_ACK_TLVS != 0 {
        let request = body.get(4..).map_or(0, |b| wire::ne32(b) as usize);
        let skip = 4 + if flags & F_CAPPED != 0 { wire::HEADER } else { request.next_multiple_of(4) };
        for (kind, value) in attributes(body.get(skip..).unwrap_or_default()) {
            match kind {
                MESSAGE => failure.message = Some(wire::text(value)),
                OFFSET => failure.offset = Some(wire::ne32(value) as usize),
                _ => {}
            }
        }
    }
    failure
}
