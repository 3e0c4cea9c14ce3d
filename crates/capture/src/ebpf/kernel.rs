//! The few calls of bpf(2) that aya keeps to itself: attachments that outlive this process without a bpf file system, replaced one
//! for one, and listed.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const PROG_QUERY: libc::c_long = 16;
/// Other programs may be attached to the same hook, here and below.
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;
/// In front of those that are there, which may end the packet's way.
const BEFORE: u32 = 8;
/// More than the kernel lets be attached to one hook of one place.
const MAX_ATTACHED: usize = 64;

/// Where a program can be attached; the numbers of `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Hook(u32);

impl Hook {
    pub(super) const CONNECT4: Self = Self(10);
    pub(super) const CONNECT6: Self = Self(11);
    pub(super) const SENDMSG4: Self = Self(14);
    pub(super) const SENDMSG6: Self = Self(15);
    pub(super) const RECVMSG4: Self = Self(19);
    pub(super) const RECVMSG6: Self = Self(20);
    pub(super) const GETSOCKOPT: Self = Self(21);
    pub(super) const GETPEERNAME4: Self = Self(29);
    pub(super) const GETPEERNAME6: Self = Self(30);
    /// Of an interface: what comes in, before anything else in the kernel sees it (Linux 6.6).
    pub(super) const TCX_INGRESS: Self = Self(46);
}

/// What a program is attached to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place<'a> {
    Cgroup(BorrowedFd<'a>),
    /// By its number in this thread's network namespace.
    Interface(u32),
}

impl Place<'_> {
    fn number(self) -> u32 {
        match self {
            Self::Cgroup(fd) => number(fd),
            Self::Interface(index) => index,
        }
    }
}

/// The members of `union bpf_attr` for attaching and detaching.
#[repr(C)]
#[derive(Default)]
struct Attach {
    target: u32,
    program: u32,
    hook: u32,
    flags: u32,
    replaced: u32,
    relative: u32,
    revision: u64,
}

/// The members of `union bpf_attr` for queries.
#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    hook: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    unused: [u32; 11],
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<()> {
    // SAFETY: the attribute is a live structure of the given size, laid out as the kernel's; pointers in it are to live buffers.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    // Descriptors are never negative.
    fd.as_raw_fd().unsigned_abs()
}

/// Attaches a program; it stays until it is detached or the place goes. With `replaced`, that one leaves in the same step.
pub(super) fn attach(
    place: Place<'_>,
    program: BorrowedFd<'_>,
    hook: Hook,
    replaced: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let flags = match (place, replaced) {
        (Place::Cgroup(_), None) => ALLOW_MULTI,
        (Place::Cgroup(_), Some(_)) => ALLOW_MULTI | REPLACE,
        (Place::Interface(_), None) => BEFORE,
        (Place::Interface(_), Some(_)) => REPLACE,
    };
    let mut attr = Attach {
        target: place.number(),
        program: number(program),
        hook: hook.0,
        flags,
        replaced: replaced.map_or(0, number),
        ..Attach::default()
    };
    bpf(PROG_ATTACH, &mut attr)
}

pub(super) fn detach(place: Place<'_>, program: BorrowedFd<'_>, hook: Hook) -> io::Result<()> {
    let mut attr = Attach { target: place.number(), program: number(program), hook: hook.0, ..Attach::default() };
    bpf(PROG_DETACH, &mut attr)
}

/// The ids of the programs that are attached to this place itself, in the order in which they run.
pub(super) fn attached(place: Place<'_>, hook: Hook) -> io::Result<Vec<u32>> {
    let mut ids = vec![0_u32; MAX_ATTACHED];
    let mut attr = Query {
        target: place.number(),
        hook: hook.0,
        ids: ids.as_mut_ptr() as u64,
        count: MAX_ATTACHED as u32,
        ..Query::default()
    };
    bpf(PROG_QUERY, &mut attr)?;
    ids.truncate(attr.count as usize);
    Ok(ids)
}
