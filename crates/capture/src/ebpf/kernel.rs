//! The few calls of bpf(2) that aya keeps to itself or wraps in more than is needed here: programs loaded and looked at, attachments that
//! outlive this process without a bpf file system, replaced one for one, and listed.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use aya_obj::generated::bpf_insn;

const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const BTF_LOAD: libc::c_long = 18;
/// Other programs may be attached to the same hook, here and below.
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;
/// In front of those that are there, which may end the packet's way.
const BEFORE: u32 = 8;
/// More than the kernel lets be attached to one hook of one place.
const MAX_ATTACHED: usize = 64;
/// More maps than a program of ours has.
const MAX_MAPS: usize = 16;
/// Names in the kernel, with their final zero.
const NAME: usize = 16;

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

    /// The kind of program for this hook, by the number of `enum bpf_prog_type`, and what it must be told when it is loaded.
    fn kind(self) -> (u32, u32) {
        const SCHED_CLS: u32 = 3;
        const CGROUP_SOCK_ADDR: u32 = 18;
        const CGROUP_SOCKOPT: u32 = 25;
        match self {
            Self::TCX_INGRESS => (SCHED_CLS, 0),
            Self::GETSOCKOPT => (CGROUP_SOCKOPT, self.0),
            _ => (CGROUP_SOCK_ADDR, self.0),
        }
    }
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

/// The members of `union bpf_attr` for loading a program.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    length: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; NAME],
    interface: u32,
    hook: u32,
}

/// The members of `union bpf_attr` for loading types.
#[repr(C)]
#[derive(Default)]
struct LoadTypes {
    types: u64,
    log: u64,
    size: u32,
    log_size: u32,
    log_level: u32,
    unused: u32,
}

/// The members of `union bpf_attr` for opening by number.
#[repr(C)]
#[derive(Default)]
struct Open {
    id: u32,
    next_id: u32,
    flags: u32,
}

/// The members of `union bpf_attr` for asking what a descriptor is.
#[repr(C)]
struct Ask {
    fd: u32,
    size: u32,
    info: u64,
}

/// The first members of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    before: [u32; 13],
    map_count: u32,
    maps: u64,
    name: [u8; NAME],
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the attribute is a live structure of the given size, laid out as the kernel's; pointers in it are to live buffers.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// For the commands that answer with a new descriptor.
fn open<T>(command: libc::c_long, attr: &mut T) -> io::Result<OwnedFd> {
    // Descriptors fit.
    let fd = bpf(command, attr)? as RawFd;
    // SAFETY: the kernel made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives the kernel the types of an object's maps.
pub(super) fn load_types(types: &[u8]) -> io::Result<OwnedFd> {
    let size = u32::try_from(types.len()).map_err(io::Error::other)?;
    open(BTF_LOAD, &mut LoadTypes { types: types.as_ptr() as u64, size, ..LoadTypes::default() })
}

/// Gives the kernel a program. An error says what the verifier found.
pub(super) fn load(hook: Hook, name: &str, license: &CStr, instructions: &[bpf_insn]) -> io::Result<OwnedFd> {
    const LOG: usize = 1 << 20;
    let (kind, expected) = hook.kind();
    let mut attr = Load {
        kind,
        length: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        hook: expected,
        ..Load::default()
    };
    attr.name.iter_mut().zip(name.bytes().take(NAME - 1)).for_each(|(to, from)| *to = from);
    let refused = match open(PROG_LOAD, &mut attr) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EINVAL)) => e,
        other => return other,
    };
    // Once more for its protocol, which costs much and is nothing to anybody as long as all is well.
    let mut log = vec![0_u8; LOG];
    (attr.log_level, attr.log_size, attr.log) = (1, LOG as u32, log.as_mut_ptr() as u64);
    open(PROG_LOAD, &mut attr).map_err(|_| {
        let log = log.split(|byte| *byte == 0).next().unwrap_or_default();
        io::Error::new(
            refused.kind(),
            format!("the verifier refuses {name} ({refused})\n{}", String::from_utf8_lossy(log)),
        )
    })
}

/// A program in the kernel.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) fd: OwnedFd,
    pub(super) name: String,
    /// Their numbers.
    pub(super) maps: Vec<u32>,
}

/// Opens a program by its number; none when it is gone.
pub(super) fn loaded(id: u32) -> io::Result<Option<Loaded>> {
    let fd = match open(PROG_GET_FD_BY_ID, &mut Open { id, ..Open::default() }) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut maps = vec![0_u32; MAX_MAPS];
    let mut info = Info { map_count: MAX_MAPS as u32, maps: maps.as_mut_ptr() as u64, ..Info::default() };
    let mut attr =
        Ask { fd: number(fd.as_fd()), size: size_of::<Info>() as u32, info: std::ptr::from_mut(&mut info) as u64 };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr)?;
    maps.truncate(info.map_count as usize);
    let name = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(Some(Loaded { fd, name: String::from_utf8_lossy(name).into_owned(), maps }))
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
    bpf(PROG_ATTACH, &mut attr).map(drop)
}

pub(super) fn detach(place: Place<'_>, program: BorrowedFd<'_>, hook: Hook) -> io::Result<()> {
    let mut attr = Attach { target: place.number(), program: number(program), hook: hook.0, ..Attach::default() };
    bpf(PROG_DETACH, &mut attr).map(drop)
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

/// What a program for frames answers to this one, without any being there.
#[cfg(test)]
pub(super) fn run(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<i32> {
    const PROG_TEST_RUN: libc::c_long = 10;
    #[repr(C)]
    #[derive(Default)]
    struct Run {
        program: u32,
        answer: u32,
        length: u32,
        length_out: u32,
        data: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
    }
    let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
    let mut attr = Run { program: number(program), length, data: frame.as_ptr() as u64, ..Run::default() };
    bpf(PROG_TEST_RUN, &mut attr)?;
    Ok(attr.answer.cast_signed())
}
