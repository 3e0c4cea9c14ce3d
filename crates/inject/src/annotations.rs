//! Checks of the annotations that steer injection. All faults are found, not only the first.

use std::net::IpAddr;

use serde_json::Value;

use crate::mesh;
use crate::schema::canonical_quantity;
use crate::status;

/// A wrong annotation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid value '{value}' for annotation '{name}': {message}")]
pub struct InvalidAnnotation {
    pub name: String,
    pub value: String,
    pub message: String,
}

/// A check: the complaint about a value, if any.
type Check = fn(&str) -> Result<(), String>;

const CHECKS: [(&str, Check); 24] = [
    (status::INTERCEPTION, |value| match value {
        "REDIRECT" | "TPROXY" | "NONE" => Ok(()),
        _ => Err("interceptionMode invalid, use REDIRECT, TPROXY or NONE".to_owned()),
    }),
    (status::STATUS_PORT, port),
    ("readiness.status.sidecar.istio.io/initialDelaySeconds", unsigned),
    ("readiness.status.sidecar.istio.io/periodSeconds", unsigned),
    ("readiness.status.sidecar.istio.io/failureThreshold", unsigned),
    ("traffic.sidecar.istio.io/includeOutboundIPRanges", |value| if value == "*" { Ok(()) } else { cidrs(value) }),
    ("traffic.sidecar.istio.io/excludeOutboundIPRanges", cidrs),
    ("traffic.sidecar.istio.io/includeInboundPorts", |value| if value == "*" { Ok(()) } else { ports(value) }),
    ("traffic.sidecar.istio.io/excludeInboundPorts", ports),
    // DIFFERS: Istio does not check this one and passes whatever stands there to iptables.
    ("traffic.sidecar.istio.io/includeOutboundPorts", |value| if value == "*" { Ok(()) } else { ports(value) }),
    ("traffic.sidecar.istio.io/excludeOutboundPorts", ports),
    ("traffic.sidecar.istio.io/excludeInterfaces", interfaces),
    ("traffic.sidecar.istio.io/kubevirtInterfaces", interfaces),
    ("istio.io/reroute-virtual-interfaces", interfaces),
    (status::MERGE_METRICS, |value| match status::parse_bool(value) {
        Some(_) => Ok(()),
        None => Err("expected true or false".to_owned()),
    }),
    (status::PROXY_CONFIG, mesh::check_proxy_config),
    ("sidecar.istio.io/proxyCPU", quantity),
    ("sidecar.istio.io/proxyCPULimit", quantity),
    ("sidecar.istio.io/proxyMemory", quantity),
    ("sidecar.istio.io/proxyMemoryLimit", quantity),
    ("sidecar.istio.io/proxyEphemeralStorage", quantity),
    ("sidecar.istio.io/proxyEphemeralStorageLimit", quantity),
    ("sidecar.istio.io/userVolume", |_| Ok(())),
    ("sidecar.istio.io/userVolumeMount", |_| Ok(())),
];

/// Annotations that are known but need no check, so that others can be called unknown.
const FREE: [&str; 18] = [
    status::INJECT,
    status::STATUS,
    status::NATIVE,
    status::IMAGE_TYPE,
    status::REWRITE_PROBES,
    "sidecar.istio.io/proxyImage",
    "sidecar.istio.io/logLevel",
    "sidecar.istio.io/componentLogLevel",
    "sidecar.istio.io/agentLogLevel",
    "sidecar.istio.io/bootstrapOverride",
    "sidecar.istio.io/capNetBindService",
    "sidecar.istio.io/discoveryAddress",
    "sidecar.istio.io/extraStatTags",
    "sidecar.istio.io/enableCoreDump",
    "sidecar.istio.io/statsInclusionPrefixes",
    "sidecar.istio.io/statsInclusionRegexps",
    "sidecar.istio.io/statsInclusionSuffixes",
    "sidecar.istio.io/statsHistogramBuckets",
];

/// All faults of the pod's annotations.
pub(crate) fn check(pod: &Value) -> Vec<InvalidAnnotation> {
    let mut faults = Vec::new();
    let Some(annotations) = pod["metadata"]["annotations"].as_object() else { return faults };
    let mut names: Vec<&String> = annotations.keys().collect();
    names.sort();
    for name in names {
        let value = annotations[name.as_str()].as_str().unwrap_or_default();
        let Some((_, check)) = CHECKS.iter().find(|(known, _)| known == name) else { continue };
        if let Err(message) = check(value) {
            faults.push(InvalidAnnotation { name: name.clone(), value: value.to_owned(), message });
        }
    }
    faults
}

/// Checks a single annotation; those that need no check are fine.
///
/// # Errors
/// What is wrong with the value.
pub fn check_annotation(name: &str, value: &str) -> Result<(), String> {
    CHECKS.iter().find(|(known, _)| *known == name).map_or(Ok(()), |(_, check)| check(value))
}

/// Annotations in Istio's name space that nothing reads: most often a slip of the pen.
pub(crate) fn unknown(pod: &Value) -> Vec<&str> {
    let Some(annotations) = pod["metadata"]["annotations"].as_object() else { return Vec::new() };
    annotations
        .keys()
        .map(String::as_str)
        .filter(|name| {
            ["sidecar.istio.io/", "traffic.sidecar.istio.io/", "status.sidecar.istio.io/"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        })
        .filter(|name| !FREE.contains(name) && !CHECKS.iter().any(|(known, _)| known == name))
        .collect()
}

fn port(value: &str) -> Result<(), String> {
    let number = value.trim();
    let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    if plain && number.parse::<u16>().is_ok() { Ok(()) } else { Err(format!("failed parsing port '{value}'")) }
}

fn unsigned(value: &str) -> Result<(), String> {
    let plain = value.bytes().all(|byte| byte.is_ascii_digit());
    if plain && value.parse::<u32>().is_ok() { Ok(()) } else { Err("expected a number".to_owned()) }
}

fn ports(value: &str) -> Result<(), String> {
    if value.trim().is_empty() {
        return Ok(());
    }
    value.split(',').try_for_each(port)
}

fn cidrs(value: &str) -> Result<(), String> {
    if value.is_empty() {
        return Ok(());
    }
    value.split(',').try_for_each(|part| {
        let (address, length) = part.split_once('/').ok_or_else(|| format!("failed parsing cidr '{part}': no '/'"))?;
        let address: IpAddr = address.parse().map_err(|_| format!("failed parsing cidr '{part}'"))?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let plain = length == "0" || length.starts_with(|first: char| matches!(first, '1'..='9'));
        match length.parse::<u8>() {
            Ok(length) if plain && length <= most => Ok(()),
            _ => Err(format!("failed parsing cidr '{part}': bad prefix length")),
        }
    })
}

fn interfaces(value: &str) -> Result<(), String> {
    if value.is_empty() {
        return Ok(());
    }
    value.split(',').map(str::trim).try_for_each(|name| {
        let fine = name.len() <= 15
            && name.starts_with(|first: char| first.is_ascii_alphabetic())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
        if fine { Ok(()) } else { Err(format!("invalid interface name '{name}'")) }
    })
}

fn quantity(value: &str) -> Result<(), String> {
    // Control characters would reach the YAML that the template makes.
    if value.chars().any(char::is_control) {
        return Err("control characters are not allowed".to_owned());
    }
    match canonical_quantity(value) {
        Some(_) => Ok(()),
        None => Err("not a quantity such as 100m or 128Mi".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn faults(name: &str, value: &str) -> usize {
        check(&json!({"metadata": {"annotations": {name: value}}})).len()
    }

    #[test]
    fn every_fault_is_found() {
        let pod = json!({"metadata": {"annotations": {
            "sidecar.istio.io/interceptionMode": "FOO",
            "status.sidecar.istio.io/port": "70000",
            "sidecar.istio.io/proxyCpu": "1",
        }}});
        let found: Vec<String> = check(&pod).into_iter().map(|fault| fault.name).collect();
        assert_eq!(found, ["sidecar.istio.io/interceptionMode", "status.sidecar.istio.io/port"]);
        assert_eq!(unknown(&pod), ["sidecar.istio.io/proxyCpu"]);
    }

    #[test]
    fn values() {
        assert_eq!(faults("traffic.sidecar.istio.io/includeOutboundIPRanges", "*"), 0);
        assert_eq!(faults("traffic.sidecar.istio.io/excludeOutboundIPRanges", "*"), 1);
        assert_eq!(faults("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.0.0.0/8,::/0"), 0);
        assert_eq!(faults("traffic.sidecar.istio.io/includeInboundPorts", ""), 0);
        assert_eq!(faults("traffic.sidecar.istio.io/includeInboundPorts", "bad"), 1);
        assert_eq!(faults("traffic.sidecar.istio.io/includeInboundPorts", " 80, 90 "), 0);
        assert_eq!(faults("traffic.sidecar.istio.io/includeInboundPorts", "80,,90"), 1);
        assert_eq!(faults("traffic.sidecar.istio.io/excludeOutboundPorts", "80,"), 1);
        assert_eq!(faults("status.sidecar.istio.io/port", " 15020"), 0);
        assert_eq!(faults("traffic.sidecar.istio.io/excludeInterfaces", "eth0, net_1.2-x"), 0);
        for name in ["1eth", "eth0,", "eth:0", "a-name-of-16-char"] {
            assert_eq!(faults("istio.io/reroute-virtual-interfaces", name), 1, "{name}");
        }
        assert_eq!(faults("sidecar.istio.io/proxyCPU", "1\n  evil: true"), 1);
        assert_eq!(faults("proxy.istio.io/config", "concurrency: 2"), 0);
        assert_eq!(faults("proxy.istio.io/config", "concurrency: [2"), 1);
        assert_eq!(faults("proxy.istio.io/config", "statusPort: 0"), 1);
        assert_eq!(faults("proxy.istio.io/config", "discoveryAddress: nowhere"), 1);
    }
}
