//! Tests of the proxy as a process and as a library.

mod conformance;
mod dns;
mod draining;
mod dynamic;
mod fixture;
mod floods;
mod goaway;
mod h2spec;
mod library;
mod logs;
mod peers;
mod recorded;
mod sources;
mod spans;
mod tcp;
