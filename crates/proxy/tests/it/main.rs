//! Tests of the proxy as a process and as a library.

mod conformance;
mod library;
