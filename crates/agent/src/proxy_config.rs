//! ProxyConfig as the agent sees it: defaults, mesh file, PROXY_CONFIG, annotation, older flags, each over the one before.

use std::path::Path;

use istio_api::MeshProxyConfig;
use serde_json::{Map, Value, json};

/// A source of proxy configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("proxy configuration from {source_name} is not usable: {reason}")]
pub(crate) struct BadProxyConfig {
    source_name: String,
    reason: String,
}

/// The texts that are laid over the defaults, weakest first.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sources<'a> {
    /// A MeshConfig, of which `defaultConfig` counts. Gateways mount one.
    pub mesh_file: Option<&'a str>,
    /// PROXY_CONFIG, from the injection.
    pub environment: Option<&'a str>,
    /// `proxy.istio.io/config`.
    pub annotation: Option<&'a str>,
}

/// Istio's defaults. Source: istio `pkg/config/mesh/mesh.go`, `DefaultProxyConfig`.
fn defaults() -> Value {
    json!({
        "configPath": "./etc/istio/proxy",
        "binaryPath": "/usr/local/bin/envoy",
        "drainDuration": "45s",
        "terminationDrainDuration": "5s",
        "proxyAdminPort": 15000,
        "controlPlaneAuthPolicy": "MUTUAL_TLS",
        "discoveryAddress": "istiod.istio-system.svc:15012",
        "statNameLength": 189,
        "statusPort": 15020,
        "serviceCluster": "istio-proxy",
    })
}

/// Lays the sources over each other. Fields replace fields; `proxyMetadata` alone is merged by key.
///
/// Source: istio `pilot/cmd/pilot-agent/config/config.go`, `getMeshConfig`; `pkg/config/mesh/mesh.go`, `ApplyProxyConfig`.
pub(crate) fn merge(sources: Sources<'_>) -> Result<(MeshProxyConfig, Value), BadProxyConfig> {
    let mut merged = match defaults() {
        Value::Object(fields) => fields,
        _ => Map::new(),
    };
    if let Some(text) = sources.mesh_file {
        let mesh = object("the mesh configuration file", text)?;
        if let Some(Value::Object(config)) = mesh.get("defaultConfig") {
            overlay(&mut merged, config.clone());
        }
    }
    for (name, text) in
        [("PROXY_CONFIG", sources.environment), ("annotation proxy.istio.io/config", sources.annotation)]
    {
        if let Some(text) = text {
            overlay(&mut merged, object(name, text)?);
        }
    }
    let value = Value::Object(merged);
    let bad =
        |e: serde_json::Error| BadProxyConfig { source_name: "all sources together".to_owned(), reason: e.to_string() };
    let config = serde_json::from_value(value.clone()).map_err(bad)?;
    Ok((config, value))
}

fn object(name: &str, text: &str) -> Result<Map<String, Value>, BadProxyConfig> {
    let bad = |reason: String| BadProxyConfig { source_name: name.to_owned(), reason };
    let documents = manifest::parse_plain(Path::new(name), text).map_err(|e| bad(e.to_string()))?;
    match documents.into_iter().next().map(|document| document.value) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(fields)) => {
            // Each source alone must be right, so that the message names the culprit.
            serde_json::from_value::<MeshProxyConfig>(Value::Object(fields.clone())).map_err(|e| bad(e.to_string()))?;
            Ok(fields)
        }
        Some(_) => Err(bad("expected a mapping".to_owned())),
    }
}

fn overlay(base: &mut Map<String, Value>, over: Map<String, Value>) {
    for (name, value) in over {
        if value.is_null() {
            continue;
        }
        let name = camel_case(&name);
        match (name.as_str(), base.get_mut(&name), value) {
            ("proxyMetadata", Some(Value::Object(base)), Value::Object(over)) => base.extend(over),
            (_, _, value) => {
                // One of a oneof: the other member goes.
                match name.as_str() {
                    "serviceCluster" => base.remove("tracingServiceName"),
                    "tracingServiceName" => base.remove("serviceCluster"),
                    _ => None,
                };
                base.insert(name, value);
            }
        }
    }
}

/// `proxy_metadata` as `proxyMetadata`: both are read, one must win.
fn camel_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if upper => {
                out.extend(c.to_uppercase());
                upper = false;
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_sources_win_and_metadata_is_merged() {
        let sources = Sources {
            mesh_file: Some(
                "defaultConfig:\n  discoveryAddress: from-file:15012\n  proxyMetadata: {A: file, B: file}\n",
            ),
            environment: Some("{\"proxyMetadata\":{\"B\":\"env\"},\"concurrency\":2}"),
            annotation: Some("terminationDrainDuration: 1m\ndiscovery_address: from-annotation:15012\n"),
        };
        let (config, value) = merge(sources).unwrap();
        assert_eq!(config.discovery_address, "from-annotation:15012");
        assert_eq!(config.proxy_metadata["A"], "file");
        assert_eq!(config.proxy_metadata["B"], "env");
        assert_eq!(config.concurrency, Some(2));
        assert_eq!(
            config.termination_drain_duration.and_then(istio_api::Duration::to_std),
            Some(std::time::Duration::from_secs(60))
        );
        assert_eq!(value["drainDuration"], "45s");
    }

    #[test]
    fn a_bad_source_is_named() {
        let error = merge(Sources { environment: Some("concurrency: [1]"), ..Default::default() }).unwrap_err();
        assert!(error.to_string().starts_with("proxy configuration from PROXY_CONFIG is not usable: "), "{error}");
        assert!(merge(Sources { annotation: Some("- a"), ..Default::default() }).is_err());
        assert!(merge(Sources { environment: Some("{}\n"), ..Default::default() }).is_ok());
    }
}
