//! Istio's resources, the Gateway API's routes of meshes, and MeshConfig as users write them.
//!
//! In: JSON (from YAML) of a resource's `spec`. Out: one plain struct per protobuf message, where unset is
//! `None`, empty or the first enum value, and [`Violation`]s that name the offending field as istiod's
//! validation would. Field names are the snake_case of the proto's.
//! Never: Kubernetes metadata, positions in files, Envoy, I/O.
//!
//! The messages follow the protos of istio/api (July 2026); `networking.v1alpha3` stands for all three
//! versions of a kind, which are identical in shape.

pub mod authorization_policy;
pub mod destination_rule;
pub mod envoy_filter;
pub mod extension_provider;
pub mod gateway;
pub mod gateway_api;
pub mod mesh_config;
pub mod mesh_networks;
pub mod mesh_proxy;
pub mod peer_authentication;
pub mod proxy_config;
pub mod request_authentication;
pub mod selector;
pub mod service_entry;
pub mod sidecar;
pub mod telemetry;
pub mod traffic_extension;
pub mod virtual_service;
pub mod wasm_plugin;
pub mod workload_entry;
pub mod workload_group;

mod mesh_defaults;
mod validation;
mod violation;
mod wire;

pub use authorization_policy::AuthorizationPolicy;
pub use destination_rule::DestinationRule;
pub use envoy_filter::EnvoyFilter;
pub use gateway::Gateway;
pub use gateway_api::{GrpcRoute, HttpRoute};
pub use mesh_config::MeshConfig;
pub use mesh_networks::MeshNetworks;
pub use mesh_proxy::ProxyConfig as MeshProxyConfig;
pub use peer_authentication::PeerAuthentication;
pub use proxy_config::ProxyConfig;
pub use request_authentication::RequestAuthentication;
pub use service_entry::ServiceEntry;
pub use sidecar::Sidecar;
pub use telemetry::Telemetry;
pub use traffic_extension::TrafficExtension;
pub use violation::{Severity, Violation};
pub use virtual_service::VirtualService;
pub use wasm_plugin::WasmPlugin;
pub use wire::{Duration, InvalidDuration};
pub use workload_entry::WorkloadEntry;
pub use workload_group::WorkloadGroup;
