//! What istiod and istioctl refuse of a mesh configuration beyond wrong types.
//!
//! As istio `pkg/config/validation/agent`: `ValidateMeshConfig`, `ValidateMeshConfigProxyConfig`.

use std::net::IpAddr;

use serde_json::Value;

use crate::duration;

/// A setting that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Such as `defaultConfig.statusPort`.
    pub(crate) path: String,
    pub(crate) message: String,
}

/// The faults of what lies at `at`.
struct Faults<'f> {
    found: &'f mut Vec<Fault>,
    at: &'f str,
}

impl Faults<'_> {
    fn add(&mut self, field: &str, message: impl Into<String>) {
        let dot = if self.at.is_empty() || field.is_empty() { "" } else { "." };
        self.found.push(Fault { path: format!("{}{dot}{field}", self.at), message: message.into() });
    }

    fn check(&mut self, field: &str, outcome: Result<(), String>) {
        if let Err(message) = outcome {
            self.add(field, message);
        }
    }

    fn require(&mut self, field: &str, fine: bool, message: &str) {
        if !fine {
            self.add(field, message);
        }
    }

    /// Durations that, where they are set, must be such as Envoy takes.
    fn durations(&mut self, value: &Value, fields: &[&str]) {
        for field in fields {
            if let Some(text) = value[*field].as_str() {
                self.check(field, milliseconds(text));
            }
        }
    }

    fn not_negative(&mut self, value: &Value, fields: &[&str]) {
        for field in fields {
            self.require(field, value[*field].as_i64().unwrap_or(0) >= 0, "must be non-negative");
        }
    }
}

/// The faults of a complete mesh configuration.
pub(crate) fn mesh(mesh: &Value) -> Vec<Fault> {
    let mut found = Vec::new();
    let mut faults = Faults { found: &mut found, at: "" };
    faults.check("proxyListenPort", port(&mesh["proxyListenPort"]));
    let connect = mesh["connectTimeout"].as_str().unwrap_or("0s");
    faults.check("connectTimeout", milliseconds(connect));
    if duration::nanoseconds(connect).is_some_and(|nanos| nanos > 3_600_000_000_000) {
        faults.add("connectTimeout", "must be at most one hour");
    }
    let detection = mesh["protocolDetectionTimeout"].as_str().and_then(duration::nanoseconds).unwrap_or(0);
    faults.require(
        "protocolDetectionTimeout",
        detection % 1_000_000 == 0,
        "only durations to ms precision are supported",
    );
    for (index, settings) in items(&mesh["serviceSettings"]).iter().enumerate() {
        for host in items(&settings["hosts"]).iter().filter_map(Value::as_str) {
            faults.check(&format!("serviceSettings[{index}].hosts"), wildcard_domain(host));
        }
    }
    faults.check("trustDomain", trust_domain(mesh["trustDomain"].as_str().unwrap_or_default()));
    for (index, alias) in items(&mesh["trustDomainAliases"]).iter().filter_map(Value::as_str).enumerate() {
        faults.check(&format!("trustDomainAliases[{index}]"), trust_domain(alias));
    }
    let curves = items(&mesh["meshMTLS"]["ecdhCurves"]);
    faults.require("meshMTLS.ecdhCurves", curves.is_empty(), "mesh TLS does not support ECDH curves configuration");
    locality(&mesh["localityLbSetting"], &mut Faults { found: &mut found, at: "localityLbSetting" });
    traffic(&mesh["defaultTrafficPolicy"], &mut found);
    retry(
        &mesh["defaultInboundHttpRetryPolicy"],
        &mut Faults { found: &mut found, at: "defaultInboundHttpRetryPolicy" },
    );
    for fault in proxy(&mesh["defaultConfig"]) {
        found.push(Fault { path: format!("defaultConfig.{}", fault.path), ..fault });
    }
    found
}

/// The faults of a complete proxy configuration.
pub(crate) fn proxy(config: &Value) -> Vec<Fault> {
    let mut found = Vec::new();
    let mut faults = Faults { found: &mut found, at: "" };
    let text = |field: &str| config[field].as_str().unwrap_or_default();
    for field in ["configPath", "binaryPath", "discoveryAddress"] {
        faults.require(field, !text(field).is_empty(), "must be set");
    }
    let named = !text("serviceCluster").is_empty() || config.get("tracingServiceName").is_some();
    faults.require("serviceCluster", named, "service cluster must be specified");
    let drain = config["drainDuration"].as_str().unwrap_or("0s");
    faults.check("drainDuration", milliseconds(drain));
    let whole = duration::nanoseconds(drain).is_some_and(|nanos| nanos % 1_000_000_000 == 0);
    faults.require("drainDuration", whole, "drain time only supports durations to seconds precision");
    let mut address = |field: &str, value: &Value| {
        if let Some(address) = value.as_str().filter(|address| !address.is_empty()) {
            faults.check(field, proxy_address(address));
        }
    };
    for field in ["discoveryAddress", "statsdUdpAddress", "envoyMetricsServiceAddress"] {
        address(field, &config[field]);
    }
    for field in ["envoyMetricsService", "envoyAccessLogService"] {
        address(&format!("{field}.address"), &config[field]["address"]);
    }
    let tracing = &config["tracing"];
    for tracer in ["lightstep", "zipkin", "datadog"] {
        if tracing[tracer].is_object() {
            let address = tracing[tracer]["address"].as_str().unwrap_or_default();
            // The node's address, which the pod's environment gives.
            let address =
                if tracer == "lightstep" { address.to_owned() } else { address.replacen("$(HOST_IP)", "127.0.0.1", 1) };
            faults.check(&format!("tracing.{tracer}.address"), proxy_address(&address));
        }
    }
    if tracing["lightstep"].is_object() {
        let token = tracing["lightstep"]["accessToken"].as_str().unwrap_or_default();
        faults.require("tracing.lightstep.accessToken", !token.is_empty(), "access token is required");
    }
    for field in ["proxyAdminPort", "statusPort"] {
        faults.check(field, port(&config[field]));
    }
    let provider = &config["privateKeyProvider"];
    if provider.is_object() {
        match ["cryptomb", "qat"].into_iter().find(|kind| provider[*kind].is_object()) {
            None => faults.add("privateKeyProvider", "private key provider configuration is required"),
            Some(kind) => {
                let delay = provider[kind]["pollDelay"].as_str().and_then(duration::nanoseconds).unwrap_or(0);
                faults.require(&format!("privateKeyProvider.{kind}.pollDelay"), delay != 0, "must be set and not zero");
            }
        }
    }
    connections(&config["connectionSettings"], &mut Faults { found: &mut found, at: "connectionSettings" });
    found
}

fn connections(settings: &Value, faults: &mut Faults<'_>) {
    faults.not_negative(settings, &["listenerPerConnectionBufferLimitBytes", "clusterPerConnectionBufferLimitBytes"]);
    for field in [
        "httpIdleTimeout",
        "httpMaxConnectionDuration",
        "httpDrainTimeout",
        "httpRequestTimeout",
        "httpRequestHeadersTimeout",
        "httpStreamIdleTimeout",
        "httpMaxStreamDuration",
    ] {
        let negative = settings[field].as_str().is_some_and(|text| text.starts_with('-'));
        faults.require(field, !negative, "must be non-negative");
    }
    for (field, least) in [
        ("httpMaxConcurrentStreams", 1),
        ("listenerConnectionLimit", 1),
        ("globalDownstreamConnectionLimit", 1),
        ("http2InitialStreamWindowSize", 65_535),
        ("http2InitialConnectionWindowSize", 65_535),
    ] {
        if let Some(value) = settings[field].as_i64() {
            faults.require(field, value >= least, &format!("must be at least {least}"));
        }
    }
}

fn locality(lb: &Value, faults: &mut Faults<'_>) {
    let (distribute, failover) = (items(&lb["distribute"]), items(&lb["failover"]));
    if !distribute.is_empty() && !failover.is_empty() {
        return faults.add("", "cannot specify both distribute and failover");
    }
    for (index, rule) in distribute.iter().enumerate() {
        let weights = rule["to"].as_object();
        let weights = || weights.into_iter().flatten().map(|(_, weight)| weight.as_i64().unwrap_or(0));
        let fine = weights().all(|weight| (1..=100).contains(&weight)) && weights().sum::<i64>() == 100;
        faults.require(&format!("distribute[{index}].to"), fine, "locality weights must be 1 to 100 and add up to 100");
    }
    for (index, rule) in failover.iter().enumerate() {
        let (from, to) = (rule["from"].as_str().unwrap_or_default(), rule["to"].as_str().unwrap_or_default());
        let field = format!("failover[{index}]");
        faults.require(&field, from != to, "must specify different regions");
        let plain = ![from, to].iter().any(|region| region.contains(['/', '*']));
        faults.require(&field, plain, "takes regions only, without wildcards");
    }
}

fn traffic(policy: &Value, found: &mut Vec<Fault>) {
    let pool = &policy["connectionPool"];
    if pool.is_object() {
        let mut faults = Faults { found, at: "defaultTrafficPolicy.connectionPool" };
        let some = pool["http"].is_object() || pool["tcp"].is_object();
        faults.require("", some, "connection pool must have at least one field");
    }
    let mut faults = Faults { found, at: "defaultTrafficPolicy.connectionPool.http" };
    let counts = [
        "http1MaxPendingRequests",
        "http2MaxRequests",
        "maxRequestsPerConnection",
        "maxRetries",
        "maxConcurrentStreams",
    ];
    faults.not_negative(&pool["http"], &counts);
    faults.durations(&pool["http"], &["idleTimeout"]);
    let mut faults = Faults { found, at: "defaultTrafficPolicy.connectionPool.tcp" };
    faults.not_negative(&pool["tcp"], &["maxConnections"]);
    faults.durations(&pool["tcp"], &["connectTimeout", "maxConnectionDuration"]);
    let mut faults = Faults { found, at: "defaultTrafficPolicy.outlierDetection" };
    let outlier = &policy["outlierDetection"];
    faults.durations(outlier, &["baseEjectionTime", "interval"]);
    for field in ["maxEjectionPercent", "minHealthPercent"] {
        let percent = outlier[field].as_i64().unwrap_or(0);
        faults.require(field, (0..=100).contains(&percent), "is not in range 0..100");
    }
}

fn retry(retry: &Value, faults: &mut Faults<'_>) {
    if !retry.is_object() {
        return;
    }
    let attempts = retry["attempts"].as_i64().unwrap_or(0);
    faults.require("attempts", attempts >= 0, "attempts cannot be negative");
    let more = ["perTryTimeout", "retryOn", "retryRemoteLocalities", "backoff"];
    let off = attempts == 0 && more.iter().any(|field| !retry[*field].is_null() && retry[*field] != "");
    faults.require("attempts", !off, "http retry policy configured when attempts are set to 0 (disabled)");
    faults.durations(retry, &["perTryTimeout", "backoff"]);
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn port(value: &Value) -> Result<(), String> {
    match value.as_i64().unwrap_or(0) {
        1..=65_535 => Ok(()),
        port => Err(format!("port number {port} must be in the range 1..65535")),
    }
}

fn milliseconds(text: &str) -> Result<(), String> {
    match duration::nanoseconds(text) {
        Some(nanos) if nanos < 1_000_000 => Err("duration must be greater than 1ms".to_owned()),
        Some(nanos) if nanos % 1_000_000 != 0 => Err("only durations to ms precision are supported".to_owned()),
        Some(_) => Ok(()),
        None => Err(format!("{text:?} is not a duration")),
    }
}

/// `HOST:PORT`
fn proxy_address(address: &str) -> Result<(), String> {
    let wrong = || format!("{address:?} is not of the form HOST:PORT");
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(host) => host,
        None if host.contains(':') => return Err(wrong()),
        None => host,
    };
    if !port.parse::<u16>().is_ok_and(|port| port > 0) {
        return Err(format!("{address:?}: the port must be in the range 1..65535"));
    }
    if host.parse::<IpAddr>().is_ok() || labels(host) {
        return Ok(());
    }
    Err(format!("{host:?} is not a valid hostname or an IP address"))
}

/// A name of DNS labels, with or without a dot at its end, whose last is no number.
fn labels(domain: &str) -> bool {
    let name = domain.strip_suffix('.').unwrap_or(domain);
    let last = name.rsplit('.').next().unwrap_or_default();
    domain.len() <= 255 && last.parse::<i64>().is_err() && name.split('.').all(label)
}

fn label(label: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=63).contains(&label.len()) && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
}

fn wildcard_domain(domain: &str) -> Result<(), String> {
    let (first, rest) = domain.split_once('.').map_or((domain, None), |(first, rest)| (first, Some(rest)));
    let first = first == "*" || label(first.strip_prefix('*').unwrap_or(first));
    if first && rest.is_none_or(labels) { Ok(()) } else { Err(format!("domain name {domain:?} invalid")) }
}

fn trust_domain(domain: &str) -> Result<(), String> {
    let name = domain.strip_suffix('.').unwrap_or(domain);
    if name.split('.').all(label) { Ok(()) } else { Err(format!("trust domain name {domain:?} invalid")) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::mesh::Mesh;

    #[track_caller]
    fn faults(user: serde_json::Value) -> Vec<String> {
        let mesh = Mesh::load(&user).unwrap();
        super::mesh(mesh.value()).into_iter().map(|fault| fault.path).collect()
    }

    #[test]
    fn the_defaults_have_no_fault() {
        assert!(faults(json!({})).is_empty());
        let fine = json!({
            "connectTimeout": "1.5s",
            "trustDomainAliases": ["old.example.", "b"],
            "defaultConfig": {
                "discoveryAddress": "[::1]:15012",
                "tracing": {"zipkin": {"address": "$(HOST_IP):9411"}},
                "tracingServiceName": "CANONICAL_NAME_ONLY",
                "concurrency": -1,
            },
        });
        assert!(faults(fine).is_empty());
    }

    #[test]
    fn what_istiod_refuses_is_named() {
        for (user, path) in [
            (json!({"proxyListenPort": 0}), "proxyListenPort"),
            (json!({"connectTimeout": "2h"}), "connectTimeout"),
            (json!({"connectTimeout": "0s"}), "connectTimeout"),
            (json!({"trustDomain": "a_b"}), "trustDomain"),
            (json!({"trustDomainAliases": ["a", "-b"]}), "trustDomainAliases[0]"),
            (json!({"localityLbSetting": {"failover": [{"from": "a", "to": "a"}]}}), "localityLbSetting.failover[0]"),
            (json!({"defaultConfig": {"statusPort": 70_000}}), "defaultConfig.statusPort"),
            (json!({"defaultConfig": {"proxyAdminPort": 0}}), "defaultConfig.proxyAdminPort"),
            (json!({"defaultConfig": {"drainDuration": "1500ms"}}), "defaultConfig.drainDuration"),
            (json!({"defaultConfig": {"drainDuration": "-1s"}}), "defaultConfig.drainDuration"),
            (json!({"defaultConfig": {"binaryPath": ""}}), "defaultConfig.binaryPath"),
            (json!({"defaultConfig": {"discoveryAddress": "istiod"}}), "defaultConfig.discoveryAddress"),
            (json!({"defaultConfig": {"statsdUdpAddress": "a:b"}}), "defaultConfig.statsdUdpAddress"),
            (json!({"defaultConfig": {"tracing": {"zipkin": {}}}}), "defaultConfig.tracing.zipkin.address"),
        ] {
            assert!(faults(user.clone()).contains(&path.to_owned()), "{user}: {:?}", faults(user.clone()));
        }
    }
}
