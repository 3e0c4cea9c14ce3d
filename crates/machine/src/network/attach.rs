//! Addresses that a pod has beside its own, as it would on a machine with several networks. Pure.

use std::net::IpAddr;

use serde::Deserialize;

/// As Multus reads it.
pub(crate) const ANNOTATION: &str = "k8s.v1.cni.cncf.io/networks";

/// One entry of the annotation's JSON form; what only matters to a real network is left unread.
///
/// Source: Kubernetes Network Custom Resource Definition De-facto Standard, v1.3, section 4.1.2.1.
#[derive(Deserialize)]
struct Selection {
    name: String,
    #[serde(default)]
    ips: Vec<String>,
}

/// The addresses that the annotation asks for.
///
/// DIFFERS: Multus makes an interface for each network, configured by a NetworkAttachmentDefinition. Here all addresses are on the
/// pod's only interface, every pod of the mesh reaches them, and they must be written in the annotation.
pub(crate) fn addresses(annotation: &str) -> Result<Vec<IpAddr>, String> {
    let bad = |why: &dyn std::fmt::Display| format!("annotation {ANNOTATION}: {why}");
    let selections: Vec<Selection> = serde_json::from_str(annotation).map_err(|error| {
        bad(&format_args!(
            "must be a JSON list such as [{{\"name\": \"front\", \"ips\": [\"172.16.1.32/16\"]}}]: {error}"
        ))
    })?;
    let mut found = Vec::new();
    for selection in selections {
        let name = selection.name;
        if selection.ips.is_empty() {
            return Err(bad(&format_args!(
                "network {name:?} has no \"ips\", and nothing on one machine hands them out"
            )));
        }
        for text in selection.ips {
            let (address, prefix) = text.split_once('/').map_or((&*text, None), |(ip, prefix)| (ip, Some(prefix)));
            let address = address.parse::<IpAddr>().ok().filter(|ip| {
                let most = if ip.is_ipv4() { 32 } else { 128 };
                let fits = prefix.is_none_or(|prefix| prefix.parse::<u8>().is_ok_and(|length| length <= most));
                fits && !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast()
            });
            let Some(address) = address else {
                return Err(bad(&format_args!("network {name:?}: {text:?} is no address that a pod can have")));
            };
            found.push(address);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_refused() {
        let two = r#"[{"name": "front", "ips": ["172.16.1.32/16"]}, {"name": "back", "namespace": "x", "ips": ["192.168.0.32"]}]"#;
        assert_eq!(addresses(two).unwrap(), ["172.16.1.32", "192.168.0.32"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        for (bad, why) in [
            ("front", "must be a JSON list"),
            (r#"[{"name": "front"}]"#, "\"front\" has no \"ips\""),
            (r#"[{"name": "front", "ips": ["172.16.1.32/33"]}]"#, "172.16.1.32/33"),
            (r#"[{"name": "front", "ips": ["127.0.0.1"]}]"#, "127.0.0.1"),
            (r#"[{"ips": ["172.16.1.32"]}]"#, "missing field `name`"),
        ] {
            let error = addresses(bad).unwrap_err();
            assert!(error.contains(why) && error.contains(ANNOTATION), "{bad}: {error}");
        }
    }
}
