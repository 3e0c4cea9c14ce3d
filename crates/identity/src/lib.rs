//! A workload's keys and certificates: fetched, rotated, written out, and turned into TLS configurations.
//!
//! ```text
//!  token + root ─► Source::Authority ─┐
//!  cert, key, root files ─► Source::Files ─┴─► Manager ─► watch of WorkloadCertificate ─► tls::{client,server}_config
//! ```
//!
//! In: where the certificate comes from. Out: the current one, always valid when it can be, and TLS that verifies SPIFFE peers.
//! Never: proxies, xDS. Keys live in zeroised memory and reach the disk only when OUTPUT_CERTS asks for it, mode 0600.

mod authority;
mod certificate;
mod channel;
mod files;
mod manager;
mod rotation;
pub mod tls;

pub use authority::{Authority, AuthorityError, KeyKind, Roots};
pub use certificate::{InvalidCertificate, PrivateKey, WorkloadCertificate};
pub use channel::{ChannelError, Endpoint};
pub use files::{Files, write_certificate};
pub use manager::{Manager, Source};
pub use rotation::Rotation;
