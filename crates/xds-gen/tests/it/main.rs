//! The generators against istiod's own output, and against their own rules.

mod acceptance;
mod caches;
mod conformance;
mod mesh_routes;
mod stock;
