//! Integration tests: a control plane on loopback ports, and clients of every port.

mod bad_input;
mod envoy;
mod federation;
mod injection;
mod kubernetes;
mod mesh;
mod ports;
mod proxyless;
mod registration;
mod secrets;
