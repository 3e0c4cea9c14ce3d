//! Network namespaces and what stands in them: links, addresses, routes and nftables rules, spoken directly over netlink.
//!
//! In: names, addresses and rules as plain data. Out: kernel state, or an [`Error`] that names the operation that failed.
//! Never: other programs (`ip`, `nft`), async runtimes, policy (what to capture, which pod gets which address).
//!
//! A [`Netns`] is a file descriptor: nothing is created under `/run/netns`, so a namespace goes away with its last
//! process and descriptor, however its owner dies. [`Netlink`] speaks rtnetlink, [`nft`] speaks nf_tables.

mod namespace;
pub mod nft;
mod route;
mod socket;
mod sysctl;
mod wire;

pub use namespace::Netns;
pub use route::{Addr, Link, Netlink, Route, RouteKind, Rule, Scope};
pub use sysctl::{read_sysctl, write_sysctl};

use std::io;

/// A netlink operation that failed. `Display` names the operation and its object, `source()` the kernel's reason.
#[derive(Debug, thiserror::Error)]
#[error("{operation}")]
pub struct Error {
    operation: String,
    #[source]
    source: Cause,
}

/// Why the kernel refused, with its own words where it gave some (extended acknowledgements).
#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{errno}: {message}")]
    Explained { errno: io::Error, message: String },
}

impl Error {
    fn new(operation: impl Into<String>, failure: socket::Failure) -> Self {
        let errno = io::Error::from_raw_os_error(failure.errno);
        let source = match failure.message {
            Some(message) => Cause::Explained { errno, message },
            None => Cause::Io(errno),
        };
        Self { operation: operation.into(), source }
    }

    fn io(operation: impl Into<String>, source: io::Error) -> Self {
        Self { operation: operation.into(), source: Cause::Io(source) }
    }

    /// The kernel's error number, for instance `libc::EEXIST`.
    pub fn errno(&self) -> Option<i32> {
        match &self.source {
            Cause::Io(errno) | Cause::Explained { errno, .. } => errno.raw_os_error(),
        }
    }

    /// The object is already there.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }

    /// There is no such object (device, route, table, address).
    pub fn is_missing(&self) -> bool {
        matches!(self.errno(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL))
    }

    /// The caller lacks CAP_NET_ADMIN in this namespace.
    pub fn is_permission(&self) -> bool {
        matches!(self.errno(), Some(libc::EPERM | libc::EACCES))
    }
}
