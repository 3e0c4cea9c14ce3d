//! MeshConfig: settings of the whole mesh.

use std::collections::BTreeMap;

use crate::destination_rule::ClientTlsSettings;
use crate::destination_rule::ConnectionPoolSettings;
use crate::destination_rule::LocalityLoadBalancerSetting;
use crate::destination_rule::OutlierDetection;
use crate::destination_rule::TcpKeepalive;
use crate::destination_rule::ZoneAwareLoadBalancerSetting;
use crate::extension_provider::ExtensionProvider;
use crate::mesh_proxy::ProxyConfig;
use crate::virtual_service::HttpRetry;
use crate::wire::Duration;
use crate::wire::{enumeration, message};

message! {
    /// `mesh.v1alpha1.MeshConfig`.
    MeshConfig {
        proxy_listen_port "proxyListenPort": i32,
        proxy_inbound_listen_port "proxyInboundListenPort": i32,
        proxy_http_port "proxyHttpPort": i32,
        connect_timeout "connectTimeout": Option<Duration>,
        hbone_idle_timeout "hboneIdleTimeout": Option<Duration>,
        protocol_detection_timeout "protocolDetectionTimeout": Option<Duration>,
        tcp_keepalive "tcpKeepalive": Option<TcpKeepalive>,
        ingress_class "ingressClass": String,
        ingress_service "ingressService": String,
        ingress_controller_mode "ingressControllerMode": IngressControllerMode,
        ingress_selector "ingressSelector": String,
        enable_tracing "enableTracing": bool,
        access_log_file "accessLogFile": String,
        access_log_format "accessLogFormat": String,
        access_log_encoding "accessLogEncoding": AccessLogEncoding,
        enable_envoy_access_log_service "enableEnvoyAccessLogService": bool,
        disable_envoy_listener_log "disableEnvoyListenerLog": bool,
        default_config "defaultConfig": Option<ProxyConfig>,
        outbound_traffic_policy "outboundTrafficPolicy": Option<OutboundTrafficPolicy>,
        inbound_traffic_policy "inboundTrafficPolicy": Option<InboundTrafficPolicy>,
        config_sources "configSources": Vec<ConfigSource>,
        enable_auto_mtls "enableAutoMtls": Option<bool>,
        trust_domain "trustDomain": String,
        trust_domain_aliases "trustDomainAliases": Vec<String>,
        ca_certificates "caCertificates": Vec<CertificateData>,
        default_service_export_to "defaultServiceExportTo": Vec<String>,
        default_virtual_service_export_to "defaultVirtualServiceExportTo": Vec<String>,
        default_destination_rule_export_to "defaultDestinationRuleExportTo": Vec<String>,
        root_namespace "rootNamespace": String,
        locality_lb_setting "localityLbSetting": Option<LocalityLoadBalancerSetting>,
        zone_aware_lb_setting "zoneAwareLbSetting": Option<ZoneAwareLoadBalancerSetting>,
        dns_refresh_rate "dnsRefreshRate": Option<Duration>,
        h2_upgrade_policy "h2UpgradePolicy": H2UpgradePolicy,
        inbound_cluster_stat_name "inboundClusterStatName": String,
        outbound_cluster_stat_name "outboundClusterStatName": String,
        certificates: Vec<Certificate>,
        service_settings "serviceSettings": Vec<ServiceSettings>,
        service_scope_configs "serviceScopeConfigs": Vec<ServiceScopeConfigs>,
        enable_prometheus_merge "enablePrometheusMerge": Option<bool>,
        verify_certificate_at_client "verifyCertificateAtClient": Option<bool>,
        ca: Option<Ca>,
        extension_providers "extensionProviders": Vec<ExtensionProvider>,
        default_providers "defaultProviders": Option<DefaultProviders>,
        discovery_selectors "discoverySelectors": Vec<LabelSelector>,
        path_normalization "pathNormalization": Option<ProxyPathNormalization>,
        default_http_retry_policy "defaultHttpRetryPolicy": Option<HttpRetry>,
        default_inbound_http_retry_policy "defaultInboundHttpRetryPolicy": Option<HttpRetry>,
        mesh_mtls "meshMTLS" "mesh_mTLS": Option<TlsConfig>,
        tls_defaults "tlsDefaults": Option<TlsConfig>,
        default_traffic_policy "defaultTrafficPolicy": Option<DefaultTrafficPolicy>,
        service_entry_visibility "serviceEntryVisibility": Option<ServiceEntryVisibility>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.IngressControllerMode`.
    IngressControllerMode {
        Unspecified = 0 "UNSPECIFIED",
        Off = 1 "OFF",
        Default = 2 "DEFAULT",
        Strict = 3 "STRICT",
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.AuthPolicy`.
    AuthPolicy {
        None = 0 "NONE",
        MutualTls = 1 "MUTUAL_TLS",
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.AccessLogEncoding`.
    AccessLogEncoding {
        Text = 0 "TEXT",
        Json = 1 "JSON",
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.H2UpgradePolicy`.
    H2UpgradePolicy {
        DoNotUpgrade = 0 "DO_NOT_UPGRADE",
        Upgrade = 1 "UPGRADE",
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.OutboundTrafficPolicy`.
    OutboundTrafficPolicy {
        mode: OutboundTrafficPolicyMode,
        tls: Option<ClientTlsSettings>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.OutboundTrafficPolicy.Mode`.
    OutboundTrafficPolicyMode {
        RegistryOnly = 0 "REGISTRY_ONLY",
        AllowAny = 1 "ALLOW_ANY",
        AllowAnyDynamicDns = 3 "ALLOW_ANY_DYNAMIC_DNS",
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.InboundTrafficPolicy`.
    InboundTrafficPolicy {
        mode: InboundTrafficPolicyMode,
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.InboundTrafficPolicy.Mode`.
    InboundTrafficPolicyMode {
        Passthrough = 0 "PASSTHROUGH",
        Localhost = 1 "LOCALHOST",
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.CertificateData`.
    CertificateData {
        pem: Option<String>,
        spiffe_bundle_url "spiffeBundleUrl": Option<String>,
        cert_signers "certSigners": Vec<String>,
        trust_domains "trustDomains": Vec<String>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ServiceSettings`.
    ServiceSettings {
        settings: Option<ServiceSettingsSettings>,
        hosts: Vec<String>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ServiceSettings.Settings`.
    ServiceSettingsSettings {
        cluster_local "clusterLocal": bool,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ServiceScopeConfigs`.
    ServiceScopeConfigs {
        namespace_selector "namespaceSelector": Option<LabelSelector>,
        services_selector "servicesSelector": Option<LabelSelector>,
        scope: Scope,
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.ServiceScopeConfigs.Scope`.
    Scope {
        Local = 0 "LOCAL",
        Global = 1 "GLOBAL",
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.CA`.
    Ca {
        address: String,
        tls_settings "tlsSettings": Option<ClientTlsSettings>,
        request_timeout "requestTimeout": Option<Duration>,
        istiod_side "istiodSide": bool,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.DefaultProviders`.
    DefaultProviders {
        tracing: Vec<String>,
        metrics: Vec<String>,
        access_logging "accessLogging": Vec<String>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ProxyPathNormalization`.
    ProxyPathNormalization {
        normalization: NormalizationType,
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.ProxyPathNormalization.NormalizationType`.
    NormalizationType {
        Default = 0 "DEFAULT",
        None = 1 "NONE",
        Base = 2 "BASE",
        MergeSlashes = 3 "MERGE_SLASHES",
        DecodeAndMergeSlashes = 4 "DECODE_AND_MERGE_SLASHES",
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.TLSConfig`.
    TlsConfig {
        min_protocol_version "minProtocolVersion": TlsProtocol,
        ecdh_curves "ecdhCurves": Vec<String>,
        cipher_suites "cipherSuites": Vec<String>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.TLSConfig.TLSProtocol`.
    TlsProtocol {
        TlsAuto = 0 "TLS_AUTO",
        Tlsv1_2 = 1 "TLSV1_2",
        Tlsv1_3 = 2 "TLSV1_3",
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.DefaultTrafficPolicy`.
    DefaultTrafficPolicy {
        connection_pool "connectionPool": Option<ConnectionPoolSettings>,
        outlier_detection "outlierDetection": Option<OutlierDetection>,
    }
}

message! {
    /// `mesh.v1alpha1.LabelSelector`.
    LabelSelector {
        match_labels "matchLabels": BTreeMap<String, String>,
        match_expressions "matchExpressions": Vec<LabelSelectorRequirement>,
    }
}

impl LabelSelector {
    /// As Kubernetes' `LabelSelectorAsSelector`: all must hold, an empty selector matches everything. One that makes
    /// no sense matches nothing.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let holds = |rule: &LabelSelectorRequirement| {
            let value = labels.get(&rule.key);
            match (rule.operator.as_str(), rule.values.is_empty()) {
                ("In", false) => value.is_some_and(|value| rule.values.contains(value)),
                ("NotIn", false) => value.is_none_or(|value| !rule.values.contains(value)),
                ("Exists", true) => value.is_some(),
                ("DoesNotExist", true) => value.is_none(),
                _ => false,
            }
        };
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(holds)
    }
}

message! {
    /// `mesh.v1alpha1.LabelSelectorRequirement`.
    LabelSelectorRequirement {
        key: String,
        operator: String,
        values: Vec<String>,
    }
}

message! {
    /// `mesh.v1alpha1.ServiceEntryVisibility`.
    ServiceEntryVisibility {
        default_visibility "defaultVisibility": Visibility,
        apply_to_sidecars "applyToSidecars": bool,
        policies: Vec<VisibilityPolicy>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.ServiceEntryVisibility.Visibility`.
    Visibility {
        VisibilityUnspecified = 0 "VISIBILITY_UNSPECIFIED",
        None = 1 "NONE",
        Namespace = 2 "NAMESPACE",
        Public = 3 "PUBLIC",
    }
}

impl ServiceEntryVisibility {
    /// What holds for ServiceEntries of a namespace with these labels: the first policy all of whose rules match.
    pub fn of_namespace(&self, labels: &BTreeMap<String, String>) -> Visibility {
        let selects = |rule: &VisibilityMatchRule| rule.namespace_selector.as_ref().is_some_and(|s| s.matches(labels));
        let policy = self.policies.iter().find(|policy| policy.matching_rules.iter().all(selects));
        policy.map_or(self.default_visibility, |policy| policy.visibility)
    }
}

message! {
    /// `mesh.v1alpha1.ServiceEntryVisibility.Policy`.
    VisibilityPolicy {
        visibility: Visibility,
        matching_rules "matchingRules": Vec<VisibilityMatchRule>,
    }
}

message! {
    /// `mesh.v1alpha1.ServiceEntryVisibility.MatchRule`.
    VisibilityMatchRule {
        namespace_selector "namespaceSelector": Option<LabelSelector>,
    }
}

message! {
    /// `mesh.v1alpha1.ConfigSource`.
    ConfigSource {
        address: String,
        tls_settings "tlsSettings": Option<ClientTlsSettings>,
        subscribed_resources "subscribedResources": Vec<Resource>,
    }
}

message! {
    /// `mesh.v1alpha1.Certificate`.
    Certificate {
        secret_name "secretName": String,
        dns_names "dnsNames": Vec<String>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.Resource`.
    Resource {
        ServiceRegistry = 0 "SERVICE_REGISTRY",
    }
}
