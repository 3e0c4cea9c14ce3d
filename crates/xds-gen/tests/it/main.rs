//! The generators against istiod's own output, and against their own rules.

mod acceptance;
mod addresses;
mod caches;
mod conformance;
mod flags;
mod generated;
mod mesh_routes;
mod networks;
mod patches;
mod policies;
mod proxyless;
mod settings;
mod stock;
