//! A network namespace held by a file descriptor.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// A network namespace. It lives as long as a descriptor, a process or a mount refers to it.
#[derive(Debug)]
pub struct Netns(OwnedFd);

impl Netns {
    /// A new, empty, unnamed namespace (loopback down), owned by the caller's user namespace.
    ///
    /// Needs CAP_SYS_ADMIN in the current user namespace.
    pub fn create() -> io::Result<Self> {
        scratch(|| {
            // SAFETY: affects only the calling thread, which is a scratch thread that ends right after.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
                return Err(io::Error::last_os_error());
            }
            Self::current()
        })?
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// The namespace behind a file: `/run/netns/NAME`, `/proc/PID/ns/net`.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        File::open(path).map(|file| Self(file.into()))
    }

    /// The namespace of a running process.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// Runs `f` in this namespace on a thread of its own, so that the caller's thread never moves.
    ///
    /// Sockets opened in `f` stay in the namespace and can be returned. A process started in `f` with a parent-death signal gets
    /// that signal when `run` returns, since the signal follows the thread: use [`Netns::enter`] in the child instead.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        scratch(|| self.enter().map(|()| f()))?
    }

    /// Moves the calling thread into this namespace for good. Async-signal-safe: made for children between fork and exec and for
    /// threads that serve one namespace all their life.
    pub fn enter(&self) -> io::Result<()> {
        // SAFETY: the descriptor is open for as long as `self`; the call moves only this thread.
        if unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// A second descriptor of the same namespace.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Netns {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

/// Runs `f` on a new thread and waits for it; a panic in `f` goes on in the caller.
fn scratch<T: Send>(f: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, f)?;
        match thread.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
