//! Tests of the proxy as a process.

mod conformance;
