//! Integration tests: a control plane on loopback ports, and clients of every port.

mod injection;
mod kubernetes;
mod mesh;
mod ports;
