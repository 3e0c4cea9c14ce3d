//! Policies of traffic to a host once routing has chosen it: subsets, load balancing, pools, TLS.

use std::collections::BTreeMap;

use crate::selector::WorkloadSelector;
use crate::virtual_service::PortSelector;
use crate::wire::Duration;
use crate::wire::{enumeration, message};

message! {
    /// `networking.v1alpha3.DestinationRule`.
    DestinationRule {
        host: String,
        traffic_policy "trafficPolicy": Option<TrafficPolicy>,
        subsets: Vec<Subset>,
        export_to "exportTo": Vec<String>,
        workload_selector "workloadSelector": Option<WorkloadSelector>,
    }
}

message! {
    /// `networking.v1alpha3.TrafficPolicy`.
    TrafficPolicy {
        load_balancer "loadBalancer": Option<LoadBalancerSettings>,
        connection_pool "connectionPool": Option<ConnectionPoolSettings>,
        outlier_detection "outlierDetection": Option<OutlierDetection>,
        tls: Option<ClientTlsSettings>,
        port_level_settings "portLevelSettings": Vec<PortTrafficPolicy>,
        tunnel: Option<TunnelSettings>,
        proxy_protocol "proxyProtocol": Option<ProxyProtocol>,
        retry_budget "retryBudget": Option<RetryBudget>,
    }
}

message! {
    /// `networking.v1alpha3.TrafficPolicy.PortTrafficPolicy`.
    PortTrafficPolicy {
        port: Option<PortSelector>,
        load_balancer "loadBalancer": Option<LoadBalancerSettings>,
        connection_pool "connectionPool": Option<ConnectionPoolSettings>,
        outlier_detection "outlierDetection": Option<OutlierDetection>,
        tls: Option<ClientTlsSettings>,
    }
}

message! {
    /// `networking.v1alpha3.TrafficPolicy.TunnelSettings`.
    TunnelSettings {
        protocol: String,
        target_host "targetHost": String,
        target_port "targetPort": u32,
    }
}

message! {
    /// `networking.v1alpha3.TrafficPolicy.ProxyProtocol`.
    ProxyProtocol {
        version: ProxyProtocolVersion,
    }
}

enumeration! {
    /// `networking.v1alpha3.TrafficPolicy.ProxyProtocol.VERSION`.
    ProxyProtocolVersion {
        V1 = 0 "V1",
        V2 = 1 "V2",
    }
}

message! {
    /// `networking.v1alpha3.TrafficPolicy.RetryBudget`.
    RetryBudget {
        percent: Option<f64>,
        min_retry_concurrency "minRetryConcurrency": u32,
        budget_interval "budgetInterval": Option<Duration>,
    }
}

message! {
    /// `networking.v1alpha3.Subset`.
    Subset {
        name: String,
        labels: BTreeMap<String, String>,
        traffic_policy "trafficPolicy": Option<TrafficPolicy>,
    }
}

message! {
    /// `networking.v1alpha3.LoadBalancerSettings`.
    LoadBalancerSettings {
        simple: Option<SimpleLb>,
        consistent_hash "consistentHash": Option<ConsistentHashLb>,
        locality_lb_setting "localityLbSetting": Option<LocalityLoadBalancerSetting>,
        zone_aware_lb_setting "zoneAwareLbSetting": Option<ZoneAwareLoadBalancerSetting>,
        warmup_duration_secs "warmupDurationSecs": Option<Duration>,
        warmup: Option<WarmupConfiguration>,
    }
}

enumeration! {
    /// `networking.v1alpha3.LoadBalancerSettings.SimpleLB`.
    SimpleLb {
        Unspecified = 0 "UNSPECIFIED",
        LeastConn = 1 "LEAST_CONN",
        Random = 2 "RANDOM",
        Passthrough = 3 "PASSTHROUGH",
        RoundRobin = 4 "ROUND_ROBIN",
        LeastRequest = 5 "LEAST_REQUEST",
    }
}

message! {
    /// `networking.v1alpha3.LoadBalancerSettings.ConsistentHashLB`.
    ConsistentHashLb {
        http_header_name "httpHeaderName": Option<String>,
        http_cookie "httpCookie": Option<HttpCookie>,
        use_source_ip "useSourceIp": Option<bool>,
        http_query_parameter_name "httpQueryParameterName": Option<String>,
        ring_hash "ringHash": Option<RingHash>,
        maglev: Option<Maglev>,
        minimum_ring_size "minimumRingSize": u64,
    }
}

message! {
    /// `networking.v1alpha3.LoadBalancerSettings.ConsistentHashLB.RingHash`.
    RingHash {
        minimum_ring_size "minimumRingSize": u64,
    }
}

message! {
    /// `networking.v1alpha3.LoadBalancerSettings.ConsistentHashLB.MagLev`.
    Maglev {
        table_size "tableSize": u64,
    }
}

message! {
    /// `networking.v1alpha3.LoadBalancerSettings.ConsistentHashLB.HTTPCookie`.
    HttpCookie {
        name: String,
        path: String,
        ttl: Option<Duration>,
        attributes: Vec<CookieAttribute>,
    }
}

message! {
    /// `networking.v1alpha3.LoadBalancerSettings.ConsistentHashLB.HTTPCookie.Attribute`.
    CookieAttribute {
        name: String,
        value: String,
    }
}

message! {
    /// `networking.v1alpha3.WarmupConfiguration`.
    WarmupConfiguration {
        duration: Option<Duration>,
        minimum_percent "minimumPercent": Option<f64>,
        aggression: Option<f64>,
    }
}

message! {
    /// `networking.v1alpha3.ConnectionPoolSettings`.
    ConnectionPoolSettings {
        tcp: Option<TcpSettings>,
        http: Option<HttpSettings>,
    }
}

message! {
    /// `networking.v1alpha3.ConnectionPoolSettings.TCPSettings`.
    TcpSettings {
        max_connections "maxConnections": i32,
        connect_timeout "connectTimeout": Option<Duration>,
        tcp_keepalive "tcpKeepalive": Option<TcpKeepalive>,
        max_connection_duration "maxConnectionDuration": Option<Duration>,
        idle_timeout "idleTimeout": Option<Duration>,
    }
}

message! {
    /// `networking.v1alpha3.ConnectionPoolSettings.TCPSettings.TcpKeepalive`.
    TcpKeepalive {
        probes: u32,
        time: Option<Duration>,
        interval: Option<Duration>,
    }
}

message! {
    /// `networking.v1alpha3.ConnectionPoolSettings.HTTPSettings`.
    HttpSettings {
        http1_max_pending_requests "http1MaxPendingRequests": i32,
        http2_max_requests "http2MaxRequests": i32,
        max_requests_per_connection "maxRequestsPerConnection": i32,
        max_retries "maxRetries": i32,
        idle_timeout "idleTimeout": Option<Duration>,
        h2_upgrade_policy "h2UpgradePolicy": H2UpgradePolicy,
        use_client_protocol "useClientProtocol": bool,
        max_concurrent_streams "maxConcurrentStreams": i32,
        http2_keep_alive "http2KeepAlive": Option<ConnectionKeepalive>,
    }
}

enumeration! {
    /// `networking.v1alpha3.ConnectionPoolSettings.HTTPSettings.H2UpgradePolicy`.
    H2UpgradePolicy {
        Default = 0 "DEFAULT",
        DoNotUpgrade = 1 "DO_NOT_UPGRADE",
        Upgrade = 2 "UPGRADE",
    }
}

message! {
    /// `networking.v1alpha3.ConnectionPoolSettings.HTTPSettings.ConnectionKeepalive`.
    ConnectionKeepalive {
        interval: Option<Duration>,
        timeout: Option<Duration>,
    }
}

message! {
    /// `networking.v1alpha3.OutlierDetection`.
    OutlierDetection {
        consecutive_errors "consecutiveErrors": i32,
        split_external_local_origin_errors "splitExternalLocalOriginErrors": bool,
        consecutive_local_origin_failures "consecutiveLocalOriginFailures": Option<u32>,
        consecutive_gateway_errors "consecutiveGatewayErrors": Option<u32>,
        consecutive_5xx_errors "consecutive5xxErrors": Option<u32>,
        interval: Option<Duration>,
        base_ejection_time "baseEjectionTime": Option<Duration>,
        max_ejection_percent "maxEjectionPercent": i32,
        min_health_percent "minHealthPercent": i32,
        outlier_detection_http_error_codes "outlierDetectionHttpErrorCodes": Vec<u32>,
    }
}

message! {
    /// `networking.v1alpha3.ClientTLSSettings`.
    ClientTlsSettings {
        mode: TlsMode,
        client_certificate "clientCertificate": String,
        private_key "privateKey": String,
        ca_certificates "caCertificates": String,
        credential_name "credentialName": String,
        subject_alt_names "subjectAltNames": Vec<String>,
        sni: String,
        insecure_skip_verify "insecureSkipVerify": Option<bool>,
        ca_crl "caCrl": String,
    }
}

enumeration! {
    /// `networking.v1alpha3.ClientTLSSettings.TLSmode`.
    TlsMode {
        Disable = 0 "DISABLE",
        Simple = 1 "SIMPLE",
        Mutual = 2 "MUTUAL",
        IstioMutual = 3 "ISTIO_MUTUAL",
    }
}

message! {
    /// `networking.v1alpha3.LocalityLoadBalancerSetting`.
    LocalityLoadBalancerSetting {
        distribute: Vec<Distribute>,
        failover: Vec<Failover>,
        failover_priority "failoverPriority": Vec<String>,
        enabled: Option<bool>,
    }
}

message! {
    /// `networking.v1alpha3.LocalityLoadBalancerSetting.Distribute`.
    Distribute {
        from: String,
        to: BTreeMap<String, u32>,
    }
}

message! {
    /// `networking.v1alpha3.LocalityLoadBalancerSetting.Failover`.
    Failover {
        from: String,
        to: String,
    }
}

message! {
    /// `networking.v1alpha3.ZoneAwareLoadBalancerSetting`.
    ZoneAwareLoadBalancerSetting {
        enabled: Option<bool>,
        failover: Vec<ZoneAwareFailover>,
        failover_priority "failoverPriority": Vec<String>,
        min_cluster_size "minClusterSize": Option<u64>,
    }
}

message! {
    /// `networking.v1alpha3.ZoneAwareLoadBalancerSetting.Failover`.
    ZoneAwareFailover {
        from: String,
        to: String,
    }
}
