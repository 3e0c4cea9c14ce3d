use super::{Check, text};
use crate::destination_rule::{
    ConnectionPoolSettings, ConsistentHashLb, H2UpgradePolicy, LoadBalancerSettings, LocalityLoadBalancerSetting,
    OutlierDetection, PortTrafficPolicy, TrafficPolicy, ZoneAwareLoadBalancerSetting,
};
use crate::{DestinationRule, Duration, Violation};

impl DestinationRule {
    /// What istiod would refuse or warn of (`ValidateDestinationRule`).
    pub fn validate(&self, namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            check.at("host", |check| check.refuse(text::wildcard_host(&self.host)));
            check.some("trafficPolicy", &self.traffic_policy, traffic_policy);
            let mut names: Vec<&str> = Vec::new();
            for (index, subset) in self.subsets.iter().enumerate() {
                check.at(format_args!("subsets[{index}]"), |check| {
                    check.at("name", |check| {
                        check.require(text::is_dns_label(&subset.name), "subset name is missing or invalid");
                        check.require(!names.contains(&subset.name.as_str()), "duplicate subset name");
                    });
                    names.push(&subset.name);
                    check.labels("labels", &subset.labels);
                    check.some("trafficPolicy", &subset.traffic_policy, traffic_policy);
                });
            }
            self.credentials(check, namespace);
            check.export_to(namespace, &self.export_to, false);
            check.some("workloadSelector", &self.workload_selector, |check, selector| {
                check.at("matchLabels", |check| check.selector_labels(&selector.match_labels));
            });
            if self.workload_selector.is_some() && self.export_to.iter().any(|entry| entry != "." && entry != namespace)
            {
                check.at("exportTo", |check| {
                    check.error("destination rule with workload selector cannot have exportTo beyond current namespace")
                });
            }
        })
    }
}

impl DestinationRule {
    /// Roots in ConfigMaps are taken from the rule's own namespace only (istiod `ValidateTLS`).
    fn credentials(&self, check: &mut Check, namespace: &str) {
        let whole = ("trafficPolicy".to_owned(), &self.traffic_policy);
        let subsets = self.subsets.iter().enumerate();
        let subsets = subsets.map(|(i, subset)| (format!("subsets[{i}].trafficPolicy"), &subset.traffic_policy));
        for (path, policy) in std::iter::once(whole).chain(subsets) {
            let Some(policy) = policy else { continue };
            let own = std::iter::once((format!("{path}.tls"), &policy.tls));
            let ports = policy.port_level_settings.iter().enumerate();
            let ports = ports.map(|(i, port)| (format!("{path}.portLevelSettings[{i}].tls"), &port.tls));
            for (path, tls) in own.chain(ports) {
                let name = tls.as_ref().and_then(|tls| tls.credential_name.strip_prefix("configmap://"));
                let Some((owner, object)) = name.map(|name| name.split_once('/').unwrap_or(("", name))) else {
                    continue;
                };
                check.at(format_args!("{path}.credentialName"), |check| {
                    let whole = !owner.is_empty() && !object.is_empty() && !object.contains('/');
                    check.require(whole, "must be of form configmap://NAMESPACE/NAME");
                    check.require(!whole || owner == namespace, "names another namespace than the rule's");
                });
            }
        }
    }
}

fn traffic_policy(check: &mut Check, policy: &TrafficPolicy) {
    let empty = *policy == TrafficPolicy::default();
    check.require(!empty, "traffic policy must have at least one field");
    check.require(
        policy.tunnel.is_none() || policy.proxy_protocol.is_none(),
        "tunnel and proxyProtocol must not be set together",
    );
    check.some("outlierDetection", &policy.outlier_detection, outlier_detection);
    check.some("connectionPool", &policy.connection_pool, connection_pool);
    let outlier = policy.outlier_detection.is_some();
    check.some("loadBalancer", &policy.load_balancer, |check, settings| load_balancer(check, settings, outlier));
    check.some("tls", &policy.tls, Check::client_tls);
    check.each("portLevelSettings", &policy.port_level_settings, port_policy);
    check.some("tunnel", &policy.tunnel, |check, tunnel| {
        check.at("protocol", |check| {
            check.require(matches!(tunnel.protocol.as_str(), "" | "CONNECT" | "POST"), "must be CONNECT or POST")
        });
        let host = text::fqdn(&tunnel.target_host).is_ok() || text::is_ip(&tunnel.target_host);
        check.at("targetHost", |check| check.require(host, "must be valid FQDN or IP address"));
        check.port("targetPort", tunnel.target_port);
    });
}

fn port_policy(check: &mut Check, policy: &PortTrafficPolicy) {
    check.require(policy.port.is_some(), "portTrafficPolicy must have valid port");
    let empty = PortTrafficPolicy { port: policy.port.clone(), ..PortTrafficPolicy::default() } == *policy;
    check.require(!empty, "port traffic policy must have at least one field");
    check.some("outlierDetection", &policy.outlier_detection, outlier_detection);
    check.some("connectionPool", &policy.connection_pool, connection_pool);
    let outlier = policy.outlier_detection.is_some();
    check.some("loadBalancer", &policy.load_balancer, |check, settings| load_balancer(check, settings, outlier));
    check.some("tls", &policy.tls, Check::client_tls);
}

fn outlier_detection(check: &mut Check, outlier: &OutlierDetection) {
    check.duration("baseEjectionTime", outlier.base_ejection_time);
    check.duration("interval", outlier.interval);
    if outlier.consecutive_errors != 0 {
        check.at("consecutiveErrors", |check| {
            check.warning("is deprecated, use consecutiveGatewayErrors or consecutive5xxErrors instead")
        });
    }
    let local = outlier.consecutive_local_origin_failures.is_some_and(|failures| failures > 0);
    if local && !outlier.split_external_local_origin_errors {
        check.error(
            "consecutive local origin failures is specified, but split external local origin errors is set to false",
        );
    }
    for (field, value) in
        [("maxEjectionPercent", outlier.max_ejection_percent), ("minHealthPercent", outlier.min_health_percent)]
    {
        check.at(field, |check| check.require((0..=100).contains(&value), "percentage is not in range 0..100"));
    }
}

/// istiod `validateConnectionPool`.
pub(super) fn connection_pool(check: &mut Check, pool: &ConnectionPoolSettings) {
    check.require(pool.http.is_some() || pool.tcp.is_some(), "connection pool must have at least one field");
    check.some("http", &pool.http, |check, http| {
        let counts = [
            ("http1MaxPendingRequests", http.http1_max_pending_requests),
            ("http2MaxRequests", http.http2_max_requests),
            ("maxRequestsPerConnection", http.max_requests_per_connection),
            ("maxRetries", http.max_retries),
            ("maxConcurrentStreams", http.max_concurrent_streams),
        ];
        for (field, count) in counts {
            check.at(field, |check| check.require(count >= 0, "must be non-negative"));
        }
        check.duration("idleTimeout", http.idle_timeout);
        let both = http.h2_upgrade_policy == H2UpgradePolicy::Upgrade && http.use_client_protocol;
        check.require(!both, "use client protocol must not be true when H2UpgradePolicy is UPGRADE");
        check.some("http2KeepAlive", &http.http2_keep_alive, |check, keepalive| {
            check.require(keepalive.interval.is_some(), "interval is required");
            check.require(keepalive.timeout.is_some(), "timeout is required");
            check.duration("interval", keepalive.interval);
            check.duration("timeout", keepalive.timeout);
        });
    });
    check.some("tcp", &pool.tcp, |check, tcp| {
        check.at("maxConnections", |check| check.require(tcp.max_connections >= 0, "must be non-negative"));
        check.duration("connectTimeout", tcp.connect_timeout);
        check.duration("maxConnectionDuration", tcp.max_connection_duration);
        // 0s turns the idle timeout off.
        check.duration("idleTimeout", tcp.idle_timeout.filter(|timeout| *timeout != Duration::default()));
        check.some("tcpKeepalive", &tcp.tcp_keepalive, |check, keepalive| {
            check.duration("time", keepalive.time);
            check.duration("interval", keepalive.interval);
        });
    });
}

fn load_balancer(check: &mut Check, settings: &LoadBalancerSettings, outlier: bool) {
    check.one_of(&[("simple", settings.simple.is_some()), ("consistentHash", settings.consistent_hash.is_some())]);
    check.one_of(&[
        ("localityLbSetting", settings.locality_lb_setting.is_some()),
        ("zoneAwareLbSetting", settings.zone_aware_lb_setting.is_some()),
    ]);
    check.some("consistentHash", &settings.consistent_hash, consistent_hash);
    check.some("localityLbSetting", &settings.locality_lb_setting, |check, lb| locality(check, lb, outlier));
    check.some("zoneAwareLbSetting", &settings.zone_aware_lb_setting, |check, lb| zones(check, lb, outlier));
    check.some("warmup", &settings.warmup, |check, warmup| {
        check.require(warmup.duration.is_some(), "duration is required");
        check.duration("duration", warmup.duration);
        check.require(
            warmup.minimum_percent.is_none_or(|p| p <= 100.0),
            "minimumPercent value should be less than or equal to 100",
        );
        check.require(warmup.aggression.is_none_or(|a| a > 0.0), "aggression should be greater than 0");
    });
}

fn consistent_hash(check: &mut Check, hash: &ConsistentHashLb) {
    check.one_of(&[
        ("httpHeaderName", hash.http_header_name.is_some()),
        ("httpCookie", hash.http_cookie.is_some()),
        ("useSourceIp", hash.use_source_ip.is_some()),
        ("httpQueryParameterName", hash.http_query_parameter_name.is_some()),
    ]);
    check.one_of(&[
        ("ringHash", hash.ring_hash.is_some()),
        ("maglev", hash.maglev.is_some()),
        ("minimumRingSize", hash.minimum_ring_size != 0),
    ]);
    if hash.minimum_ring_size != 0 {
        check.at("minimumRingSize", |check| check.warning("is deprecated, use ringHash instead"));
    }
    check.some("httpCookie", &hash.http_cookie, |check, cookie| {
        check.require(!cookie.name.is_empty(), "name required for HttpCookie");
        let mut names: Vec<&str> = Vec::new();
        for (index, attribute) in cookie.attributes.iter().enumerate() {
            check.at(format_args!("attributes[{index}].name"), |check| {
                check.require(!attribute.name.is_empty(), "cookie attribute name cannot be empty");
                check.require(!names.contains(&attribute.name.as_str()), "duplicate cookie attribute name");
            });
            names.push(&attribute.name);
        }
    });
    check.some("maglev", &hash.maglev, |check, maglev| {
        check.at("tableSize", |check| match maglev.table_size {
            0 => check.error("must be set for maglev"),
            size if size >= 5_000_011 => check.error("must be less than 5000011 for maglev"),
            size => check.require(is_prime(size), "must be a prime number for maglev"),
        });
    });
}

/// For numbers below 5,000,011.
fn is_prime(n: u64) -> bool {
    n >= 2 && (2..).take_while(|factor| factor * factor <= n).all(|factor| !n.is_multiple_of(factor))
}

/// istiod `ValidateLocalityLbSetting`.
pub(super) fn locality(check: &mut Check, lb: &LocalityLoadBalancerSetting, outlier: bool) {
    if !lb.distribute.is_empty() && !lb.failover.is_empty() {
        return check.error("can not simultaneously specify 'distribute' and 'failover'");
    }
    if !lb.failover.is_empty() && lb.failover_priority.iter().any(|label| is_topology(label)) {
        return check.error("can not simultaneously set 'failover' and a topology label in 'failover_priority'");
    }
    check.each("distribute", &lb.distribute, |check, distribute| {
        check.require(
            distribute.to.values().all(|weight| (1..=100).contains(weight)),
            "locality weight must be in range [1, 100]",
        );
        let total: u64 = distribute.to.values().map(|weight| u64::from(*weight)).sum();
        check.require(total == 100, "total locality weight is not 100");
        localities(check, distribute.to.keys());
    });
    localities(check, lb.distribute.iter().map(|distribute| &distribute.from));
    if (!lb.failover.is_empty() || !lb.failover_priority.is_empty()) && !outlier {
        check.warning("outlier detection policy must be provided for failover");
    }
    check.each("failover", &lb.failover, |check, failover| {
        check.require(failover.from != failover.to, "locality lb failover settings must specify different regions");
        let text = [&failover.from, &failover.to];
        check.require(!text.iter().any(|region| region.contains('/')), "locality lb failover only specify region");
        check.require(
            !text.iter().any(|region| region.contains('*')),
            "locality lb failover region should not contain '*' wildcard",
        );
    });
}

fn is_topology(label: &str) -> bool {
    matches!(label, "topology.kubernetes.io/region" | "topology.kubernetes.io/zone" | "topology.istio.io/subzone")
}

/// istiod `ValidateZoneAwareLbSetting`: the proxy itself sees to what is near.
pub(super) fn zones(check: &mut Check, lb: &ZoneAwareLoadBalancerSetting, outlier: bool) {
    check.each("failoverPriority", &lb.failover_priority, |check, label| {
        check.require(!is_topology(label), "region- and zone-level routing are handled automatically");
    });
    if (!lb.failover.is_empty() || !lb.failover_priority.is_empty()) && !outlier {
        check.warning("outlier detection policy must be provided for failover");
    }
    check.each("failover", &lb.failover, |check, failover| {
        let text = [&failover.from, &failover.to];
        check.require(failover.from != failover.to, "failover settings must specify different regions");
        check.require(!text.iter().any(|region| region.contains('/')), "failover only specifies region");
        check.require(
            !text.iter().any(|region| region.contains('*')),
            "failover region should not contain '*' wildcard",
        );
    });
}

/// istiod `validateLocalities`: region[/zone[/subzone]], `*` only as the last part, none covering another.
fn localities<'a>(check: &mut Check, localities: impl Iterator<Item = &'a String>) {
    let localities: Vec<&String> = localities.collect();
    for (index, locality) in localities.iter().enumerate() {
        let parts: Vec<&str> = locality.split('/').collect();
        if parts.len() > 3 || parts.iter().any(|part| part.is_empty()) {
            check.error(format!("locality {locality:?} must be region, region/zone or region/zone/subzone"));
        }
        let star = parts.iter().position(|part| part.contains('*'));
        if star.is_some_and(|at| at + 1 != parts.len() || parts[at] != "*") {
            check.error(format!("locality {locality:?} wildcard '*' number can not exceed 1 and must be in the end"));
        }
        if localities.iter().enumerate().any(|(other, text)| other < index && covers(text, locality)) {
            check.error(format!("locality {locality:?} overlaps with another one"));
        }
    }
}

fn covers(a: &str, b: &str) -> bool {
    let (mut a, mut b) = (a.split('/'), b.split('/'));
    loop {
        match (a.next(), b.next()) {
            (Some("*") | None, _) | (_, Some("*") | None) => return true,
            (a, b) if a != b => return false,
            _ => {}
        }
    }
}
