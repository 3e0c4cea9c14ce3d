use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{Ipv4Net, Ipv6Net};
use istio_api::{Duration, MeshNetworks};
use mesh_types::ArcStr;

use crate::network::GatewayAddresses;

/// Who fetches the keys that `jwksUri` of a RequestAuthentication names.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum JwksMode {
    /// The control plane, which sends what it got.
    #[default]
    ControlPlane,
    /// The proxy if it knows a cluster for the server, else the control plane.
    Hybrid,
    /// The proxy.
    Proxy,
}

/// What TLS is limited to, whatever else is configured (istio `pkg/features/security.go`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Compliance {
    /// Nothing.
    #[default]
    None,
    /// `fips-140-2`: TLS 1.2, its ciphers.
    Fips140_2,
    /// `fips-140-3`: as Envoy's policy of that name.
    Fips140_3,
    /// `pqc`: TLS 1.3 with keys agreed on by ML-KEM.
    PostQuantum,
}

/// What the control plane knows about itself; not part of MeshConfig. The defaults are istiod's.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Name of the Kubernetes cluster, as proxies report it in `CLUSTER_ID`.
    pub cluster_id: ArcStr,
    /// Networks of the mesh and gateways between them, as the file or ConfigMap says.
    pub networks: Arc<MeshNetworks>,
    /// Addresses of gateways that are given by name, as far as they are known.
    pub gateway_addresses: Arc<GatewayAddresses>,
    /// Such names are resolved (`RESOLVE_HOSTNAME_GATEWAYS`).
    pub resolve_gateways: bool,
    /// DNS domain of the cluster.
    pub domain: ArcStr,
    /// Listen and send on both address families (`ISTIO_DUAL_STACK`).
    pub dual_stack: bool,
    /// Accept HTTP/1.0 everywhere (`PILOT_HTTP10`).
    pub http10: bool,
    /// Parse MongoDB, for its statistics (`PILOT_ENABLE_MONGO_FILTER`).
    pub mongo_filter: bool,
    /// Parse MySQL (`PILOT_ENABLE_MYSQL_FILTER`).
    pub mysql_filter: bool,
    /// Parse Redis (`PILOT_ENABLE_REDIS_FILTER`).
    pub redis_filter: bool,
    /// Terminate TLS that a Sidecar's ingress listener declares (`ENABLE_TLS_ON_SIDECAR_INGRESS`).
    pub tls_on_ingress: bool,
    /// Service ports keep their inbound listeners beside a Sidecar's
    /// (`PILOT_ALLOW_SIDECAR_SERVICE_INBOUND_LISTENER_MERGE`).
    pub merge_inbound: bool,
    /// Clients that name an endpoint return to it (`PILOT_ENABLE_PERSISTENT_SESSION_FILTER`).
    pub persistent_sessions: bool,
    /// Services with this label keep clients by a cookie (`PILOT_PERSISTENT_SESSION_LABEL`).
    pub session_label: ArcStr,
    /// Services with this label keep clients by a header (`PILOT_PERSISTENT_SESSION_HEADER_LABEL`).
    pub session_header_label: ArcStr,
    /// Workloads with this label are draining (`PILOT_DRAINING_LABEL`).
    pub draining_label: ArcStr,
    /// Headless TCP services share one listener for all their pods (`PILOT_ENABLE_HEADLESS_FILTER_CHAIN_LISTENER`).
    pub headless_chains: bool,
    /// Clusters of headless services balance load (`PILOT_ENABLE_EDS_FOR_HEADLESS_SERVICES`).
    pub headless_eds: bool,
    /// Sidecars trust the connection's address (`PILOT_SIDECAR_USE_REMOTE_ADDRESS`).
    pub use_remote_address: bool,
    /// Endpoints that are not ready are always sent (`PILOT_SEND_UNHEALTHY_ENDPOINTS`).
    pub force_unhealthy: bool,
    /// And unless a policy speaks against it (`PILOT_AUTO_SEND_UNHEALTHY_ENDPOINTS`).
    pub send_unhealthy: bool,
    /// Several external authorizers for one workload (`PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS`).
    pub several_authorizers: bool,
    /// Load is always balanced by locality weights (`ENABLE_LOCALITY_WEIGHTED_LB_CONFIG`).
    pub locality_weighted: bool,
    /// Virtual hosts also match names with a final dot (`PILOT_ENABLE_ABSOLUTE_FQDN_VHOST_DOMAIN`).
    pub absolute_names: bool,
    /// Proxies tell each other who they are (`PILOT_ENABLE_METADATA_EXCHANGE`).
    pub metadata_exchange: bool,
    /// But not over TCP (`PILOT_DISABLE_MX_ALPN`).
    pub no_peer_exchange: bool,
    /// Clients tell by ALPN what they speak (`PILOT_ENABLE_ALPN_FILTER`).
    pub alpn_filter: bool,
    /// Clusters name their services, for telemetry (`PILOT_ENABLE_TELEMETRY_LABEL`).
    pub telemetry_label: bool,
    /// And endpoints their workloads (`PILOT_ENDPOINT_TELEMETRY_LABEL`).
    pub endpoint_telemetry: bool,
    /// Mirrored requests keep their host (`DISABLE_SHADOW_HOST_SUFFIX`).
    pub no_shadow_suffix: bool,
    /// What circuit breakers have left is not measured (`DISABLE_TRACK_REMAINING_CB_METRICS`).
    pub no_remaining: bool,
    /// `Expect: 100-continue` is passed on (`ENABLE_100_CONTINUE_HEADERS`).
    pub proxy_100_continue: bool,
    /// Connections taken at one wake-up (`MAX_CONNECTIONS_PER_SOCKET_EVENT_LOOP`).
    pub connections_per_event: u32,
    /// How long TLS may shake hands (`PILOT_GATEWAY_TRANSPORT_SOCKET_CONNECT_TIMEOUT`).
    pub handshake_timeout: Duration,
    /// Spread of periodic DNS look-ups (`PILOT_DNS_JITTER_DURATION`).
    pub dns_jitter: Duration,
    /// DNS queries over one socket (`PILOT_DNS_CARES_UDP_MAX_QUERIES`).
    pub dns_queries: u32,
    /// Share of traced requests in percent (`PILOT_TRACE_SAMPLING`).
    pub trace_sampling: f64,
    /// Peers of any trust domain are let in (`PILOT_SKIP_VALIDATE_TRUST_DOMAIN`).
    pub any_trust_domain: bool,
    /// A DestinationRule's TLS settings hold for outside services as they are
    /// (`PREFER_DESTINATIONRULE_TLS_FOR_EXTERNAL_SERVICES`).
    pub external_rule_tls: bool,
    /// Services without address may have one of their own (`PILOT_ENABLE_IP_AUTOALLOCATE`).
    pub auto_allocate: bool,
    /// Addresses for them (`PILOT_IP_AUTOALLOCATE_IPV4_PREFIX`); nobody should route them.
    pub allocated_v4: Ipv4Net,
    /// The same of the other family (`PILOT_IP_AUTOALLOCATE_IPV6_PREFIX`).
    pub allocated_v6: Ipv6Net,
    /// Of several services of one name that a Sidecar imports, those of one namespace are taken
    /// (`PILOT_SIDECAR_PICK_BEST_SERVICE_NAMESPACE`).
    pub best_namespace: bool,
    /// Kubernetes' services come before ServiceEntries of the same name in other namespaces, a namespace's own routes of the
    /// Gateway API before others' (`PILOT_UNIFIED_SIDECAR_SCOPE`).
    pub unified_scope: bool,
    /// Names that are looked up for `ALLOW_ANY_DYNAMIC_DNS` at most (`PILOT_ALLOW_ANY_DYNAMIC_DNS_MAX_HOSTS`).
    pub dynamic_dns_hosts: u32,
    /// Who fetches keys (`PILOT_JWT_ENABLE_REMOTE_JWKS`).
    pub jwks: JwksMode,
    /// What TLS is limited to (`COMPLIANCE_POLICY`).
    pub compliance: Compliance,
    /// DestinationRules with different audiences are not made one (`ENABLE_ENHANCED_DESTINATIONRULE_MERGE`).
    pub audiences_apart: bool,
    /// Labels that proxies tell each other beside the usual ones, with commas (`PILOT_MX_ADDITIONAL_LABELS`).
    pub exchanged_labels: ArcStr,
    /// Outside services have canonical names (`LABEL_CANONICAL_SERVICES_FOR_MESH_EXTERNAL_SERVICE_ENTRIES`).
    pub external_canonical: bool,
    /// Addresses of the mesh's networks count as internal (`ENABLE_HCM_INTERNAL_NETWORKS`).
    pub internal_networks: bool,
    /// Proxies with IPv6 only take IPv4 connections, too (`ISTIO_ENABLE_IPV4_OUTBOUND_LISTENER_FOR_IPV6_CLUSTERS`).
    pub v4_outbound: bool,
    /// ServiceEntries select pods (`PILOT_ENABLE_SERVICEENTRY_SELECT_PODS`).
    pub entries_select_pods: bool,
    /// Kubernetes' services select WorkloadEntries (`PILOT_ENABLE_K8S_SELECT_WORKLOAD_ENTRIES`).
    pub services_select_entries: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            cluster_id: "Kubernetes".into(),
            networks: Arc::default(),
            gateway_addresses: Arc::default(),
            resolve_gateways: true,
            domain: "cluster.local".into(),
            dual_stack: false,
            http10: false,
            mongo_filter: true,
            mysql_filter: false,
            redis_filter: false,
            tls_on_ingress: false,
            merge_inbound: false,
            persistent_sessions: false,
            session_label: "istio.io/persistent-session".into(),
            session_header_label: "istio.io/persistent-session-header".into(),
            draining_label: "istio.io/draining".into(),
            headless_chains: false,
            headless_eds: false,
            use_remote_address: false,
            force_unhealthy: false,
            send_unhealthy: true,
            several_authorizers: false,
            locality_weighted: false,
            absolute_names: true,
            metadata_exchange: true,
            no_peer_exchange: false,
            alpn_filter: true,
            telemetry_label: true,
            endpoint_telemetry: true,
            no_shadow_suffix: true,
            no_remaining: true,
            proxy_100_continue: true,
            connections_per_event: 1,
            handshake_timeout: Duration::from_secs(15),
            dns_jitter: Duration::from_millis(100),
            dns_queries: 100,
            trace_sampling: 1.0,
            any_trust_domain: false,
            external_rule_tls: true,
            auto_allocate: true,
            allocated_v4: Ipv4Net::new_assert(Ipv4Addr::new(240, 240, 0, 0), 16),
            allocated_v6: Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0), 48),
            best_namespace: true,
            unified_scope: true,
            dynamic_dns_hosts: 1024,
            jwks: JwksMode::ControlPlane,
            compliance: Compliance::None,
            audiences_apart: true,
            exchanged_labels: "".into(),
            external_canonical: false,
            internal_networks: false,
            v4_outbound: false,
            entries_select_pods: true,
            services_select_entries: true,
        }
    }
}

/// As Go's `strconv.ParseBool`.
fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

impl Settings {
    /// Reads one of istiod's environment variables. Returns whether it is known; a value that makes no sense leaves
    /// the default, as in istiod.
    pub fn set_env(&mut self, name: &str, value: &str) -> bool {
        macro_rules! read {
            ($($name:literal => $field:ident $parse:expr,)*) => {
                match name {
                    $($name => if let Some(value) = ($parse)(value) { self.$field = value },)*
                    _ => return false,
                }
            };
        }
        let text = |text: &str| Some(ArcStr::from(text));
        let duration = |text: &str| text.parse::<Duration>().ok();
        let number = |text: &str| text.parse::<u32>().ok();
        read! {
            "CLUSTER_ID" => cluster_id text,
            "RESOLVE_HOSTNAME_GATEWAYS" => resolve_gateways boolean,
            "ISTIO_DUAL_STACK" => dual_stack boolean,
            "PILOT_HTTP10" => http10 boolean,
            "PILOT_ENABLE_MONGO_FILTER" => mongo_filter boolean,
            "PILOT_ENABLE_MYSQL_FILTER" => mysql_filter boolean,
            "PILOT_ENABLE_REDIS_FILTER" => redis_filter boolean,
            "ENABLE_TLS_ON_SIDECAR_INGRESS" => tls_on_ingress boolean,
            "PILOT_ALLOW_SIDECAR_SERVICE_INBOUND_LISTENER_MERGE" => merge_inbound boolean,
            "PILOT_ENABLE_PERSISTENT_SESSION_FILTER" => persistent_sessions boolean,
            "PILOT_PERSISTENT_SESSION_LABEL" => session_label text,
            "PILOT_PERSISTENT_SESSION_HEADER_LABEL" => session_header_label text,
            "PILOT_DRAINING_LABEL" => draining_label text,
            "PILOT_ENABLE_HEADLESS_FILTER_CHAIN_LISTENER" => headless_chains boolean,
            "PILOT_ENABLE_EDS_FOR_HEADLESS_SERVICES" => headless_eds boolean,
            "PILOT_SIDECAR_USE_REMOTE_ADDRESS" => use_remote_address boolean,
            "PILOT_SEND_UNHEALTHY_ENDPOINTS" => force_unhealthy boolean,
            "PILOT_AUTO_SEND_UNHEALTHY_ENDPOINTS" => send_unhealthy boolean,
            "PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS" => several_authorizers boolean,
            "ENABLE_LOCALITY_WEIGHTED_LB_CONFIG" => locality_weighted boolean,
            "PILOT_ENABLE_ABSOLUTE_FQDN_VHOST_DOMAIN" => absolute_names boolean,
            "PILOT_ENABLE_METADATA_EXCHANGE" => metadata_exchange boolean,
            "PILOT_DISABLE_MX_ALPN" => no_peer_exchange boolean,
            "PILOT_ENABLE_ALPN_FILTER" => alpn_filter boolean,
            "PILOT_ENABLE_TELEMETRY_LABEL" => telemetry_label boolean,
            "PILOT_ENDPOINT_TELEMETRY_LABEL" => endpoint_telemetry boolean,
            "DISABLE_SHADOW_HOST_SUFFIX" => no_shadow_suffix boolean,
            "DISABLE_TRACK_REMAINING_CB_METRICS" => no_remaining boolean,
            "ENABLE_100_CONTINUE_HEADERS" => proxy_100_continue boolean,
            "MAX_CONNECTIONS_PER_SOCKET_EVENT_LOOP" => connections_per_event number,
            "PILOT_GATEWAY_TRANSPORT_SOCKET_CONNECT_TIMEOUT" => handshake_timeout duration,
            "PILOT_DNS_JITTER_DURATION" => dns_jitter duration,
            "PILOT_DNS_CARES_UDP_MAX_QUERIES" => dns_queries number,
            "PILOT_TRACE_SAMPLING" => trace_sampling
                |text: &str| text.parse().ok().filter(|share| (0.0..=100.0).contains(share)),
            "PILOT_SKIP_VALIDATE_TRUST_DOMAIN" => any_trust_domain boolean,
            "PREFER_DESTINATIONRULE_TLS_FOR_EXTERNAL_SERVICES" => external_rule_tls boolean,
            "PILOT_ENABLE_IP_AUTOALLOCATE" => auto_allocate boolean,
            "PILOT_IP_AUTOALLOCATE_IPV4_PREFIX" => allocated_v4 |text: &str| text.parse().ok(),
            "PILOT_IP_AUTOALLOCATE_IPV6_PREFIX" => allocated_v6 |text: &str| text.parse().ok(),
            "PILOT_SIDECAR_PICK_BEST_SERVICE_NAMESPACE" => best_namespace boolean,
            "PILOT_UNIFIED_SIDECAR_SCOPE" => unified_scope boolean,
            "PILOT_ALLOW_ANY_DYNAMIC_DNS_MAX_HOSTS" => dynamic_dns_hosts number,
            "PILOT_JWT_ENABLE_REMOTE_JWKS" => jwks |text: &str| match text {
                "hybrid" | "true" => Some(JwksMode::Hybrid),
                "envoy" => Some(JwksMode::Proxy),
                _ => Some(JwksMode::ControlPlane),
            },
            "ENABLE_ENHANCED_DESTINATIONRULE_MERGE" => audiences_apart boolean,
            "PILOT_MX_ADDITIONAL_LABELS" => exchanged_labels text,
            "LABEL_CANONICAL_SERVICES_FOR_MESH_EXTERNAL_SERVICE_ENTRIES" => external_canonical boolean,
            "ENABLE_HCM_INTERNAL_NETWORKS" => internal_networks boolean,
            "ISTIO_ENABLE_IPV4_OUTBOUND_LISTENER_FOR_IPV6_CLUSTERS" => v4_outbound boolean,
            "PILOT_ENABLE_SERVICEENTRY_SELECT_PODS" => entries_select_pods boolean,
            "PILOT_ENABLE_K8S_SELECT_WORKLOAD_ENTRIES" => services_select_entries boolean,
            "COMPLIANCE_POLICY" => compliance |text: &str| Some(match text {
                "fips-140-2" => Compliance::Fips140_2,
                "fips-140-3" => Compliance::Fips140_3,
                "pqc" => Compliance::PostQuantum,
                _ => Compliance::None,
            }),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_read_as_go_reads_them() {
        let mut settings = Settings::default();
        assert!(settings.set_env("PILOT_HTTP10", "True"));
        assert!(settings.set_env("PILOT_ENABLE_MONGO_FILTER", "yes"), "known, and no boolean");
        assert!(settings.set_env("PILOT_DNS_JITTER_DURATION", "1m30s"));
        assert!(settings.set_env("PILOT_TRACE_SAMPLING", "200"));
        assert!(settings.set_env("PILOT_JWT_ENABLE_REMOTE_JWKS", "true"));
        assert!(settings.set_env("PILOT_IP_AUTOALLOCATE_IPV4_PREFIX", "10.9.0.0/24"));
        assert!(settings.set_env("PILOT_IP_AUTOALLOCATE_IPV6_PREFIX", "10.9.0.0/24"), "known, and no IPv6");
        assert!(!settings.set_env("PILOT_TEAPOT", "1"));
        let expected = Settings {
            http10: true,
            dns_jitter: Duration::from_secs(90),
            jwks: JwksMode::Hybrid,
            allocated_v4: "10.9.0.0/24".parse().unwrap(),
            ..Settings::default()
        };
        assert_eq!(settings, expected);
    }
}
