//! Integration tests: a control plane on loopback ports, and clients of every port.

mod mesh;
mod ports;
