//! Mesh configuration as injection uses it: as JSON in protobuf's canonical form.

mod validate;

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use crate::schema::{self, Mismatch};

/// What a mesh has where the user says nothing. As istio `pkg/config/mesh`, `DefaultMeshConfig`.
static DEFAULTS: LazyLock<Value> = LazyLock::new(|| {
    json!({
        "proxyListenPort": 15001,
        "proxyInboundListenPort": 15006,
        "connectTimeout": "10s",
        "protocolDetectionTimeout": "0s",
        "ingressClass": "istio",
        "ingressService": "istio-ingressgateway",
        "ingressControllerMode": "STRICT",
        "enableTracing": true,
        "defaultConfig": {
            "configPath": "./etc/istio/proxy",
            "binaryPath": "/usr/local/bin/envoy",
            "serviceCluster": "istio-proxy",
            "drainDuration": "45s",
            "discoveryAddress": "istiod.istio-system.svc:15012",
            "proxyAdminPort": 15000,
            "controlPlaneAuthPolicy": "MUTUAL_TLS",
            "statNameLength": 189,
            "statusPort": 15020,
            "terminationDrainDuration": "5s",
        },
        "outboundTrafficPolicy": {"mode": "ALLOW_ANY"},
        "inboundTrafficPolicy": {"mode": "PASSTHROUGH"},
        "enableAutoMtls": true,
        "trustDomain": "cluster.local",
        "defaultServiceExportTo": ["*"],
        "defaultVirtualServiceExportTo": ["*"],
        "defaultDestinationRuleExportTo": ["*"],
        "rootNamespace": "istio-system",
        "localityLbSetting": {"enabled": true},
        "dnsRefreshRate": "60s",
        "enablePrometheusMerge": true,
        "extensionProviders": [
            {"name": "prometheus", "prometheus": {}},
            {"name": "stackdriver", "stackdriver": {}},
            {"name": "envoy", "envoyFileAccessLog": {"path": "/dev/stdout"}},
        ],
    })
});

/// Mesh configuration, complete with defaults.
#[derive(Clone, Debug)]
pub(crate) struct Mesh {
    value: Value,
}

impl Mesh {
    #[cfg(test)]
    pub(crate) fn defaults() -> Self {
        Self { value: DEFAULTS.clone() }
    }

    /// The user's mesh configuration over the defaults. As `ApplyMeshConfig`: providers of the same
    /// name are replaced, the rest is united.
    pub(crate) fn load(user: &Value) -> Result<Self, Mismatch> {
        let ty = schema::named("MeshConfig");
        let user = schema::message(ty, user, &mut String::new())?;
        let mut value = DEFAULTS.clone();
        let mut providers = value["extensionProviders"].as_array().cloned().unwrap_or_default();
        if let Some(own) = user["extensionProviders"].as_array() {
            for provider in own {
                match providers.iter_mut().find(|known| known["name"] == provider["name"]) {
                    Some(slot) => *slot = provider.clone(),
                    None => providers.push(provider.clone()),
                }
            }
        }
        schema::overlay(ty, &mut value, &user);
        value["extensionProviders"] = Value::Array(providers);
        if let Some(aliases) = value["trustDomainAliases"].as_array_mut() {
            aliases.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            aliases.dedup();
        }
        Ok(Self { value })
    }

    /// What istiod would refuse, first of all what: the field and why.
    pub(crate) fn fault(&self) -> Option<(String, String)> {
        validate::mesh(&self.value).into_iter().next().map(|fault| (fault.path, fault.message))
    }

    /// With the annotation `proxy.istio.io/config` over the default proxy configuration.
    pub(crate) fn with_proxy_config(&self, yaml: &str) -> Result<Self, String> {
        let over = proxy_config(yaml)?;
        let mut value = self.value.clone();
        schema::overlay(schema::named("ProxyConfig"), &mut value["defaultConfig"], &over);
        Ok(Self { value })
    }

    /// With the spec of a ProxyConfig resource over the default proxy configuration.
    pub(crate) fn with_resource(&self, spec: &Value) -> Result<Self, String> {
        let over = json!({
            "concurrency": spec["concurrency"],
            "image": spec["image"],
            "proxyMetadata": spec["environmentVariables"],
        });
        let ty = schema::named("ProxyConfig");
        let over = schema::message(ty, &over, &mut String::new()).map_err(|error| error.to_string())?;
        let mut value = self.value.clone();
        schema::overlay(ty, &mut value["defaultConfig"], &over);
        Ok(Self { value })
    }

    pub(crate) fn value(&self) -> &Value {
        &self.value
    }

    /// `defaultConfig`
    pub(crate) fn proxy(&self) -> &Value {
        &self.value["defaultConfig"]
    }

    pub(crate) fn status_port(&self) -> i64 {
        self.proxy()["statusPort"].as_i64().unwrap_or(0)
    }

    pub(crate) fn hold_application(&self) -> bool {
        self.proxy()["holdApplicationUntilProxyStarts"].as_bool().unwrap_or(false)
    }

    /// On unless it is switched off.
    pub(crate) fn prometheus_merge(&self) -> bool {
        self.value["enablePrometheusMerge"].as_bool().unwrap_or(true)
    }

    /// `localhost` or `passthrough`.
    pub(crate) fn inbound_mode(&self) -> &'static str {
        if self.value["inboundTrafficPolicy"]["mode"] == "LOCALHOST" { "localhost" } else { "passthrough" }
    }
}

/// A ProxyConfig from the YAML of an annotation.
pub(crate) fn proxy_config(yaml: &str) -> Result<Value, String> {
    let value = crate::yaml::mapping("proxy.istio.io/config", yaml).map_err(|error| error.to_string())?;
    schema::message(schema::named("ProxyConfig"), &value, &mut String::new()).map_err(|error| error.to_string())
}

/// Fields of an annotation's ProxyConfig that there are not, which Istio passes over without a word.
pub(crate) fn unknown_proxy_fields(yaml: &str) -> Vec<String> {
    let value = crate::yaml::mapping("proxy.istio.io/config", yaml).unwrap_or_default();
    let known = schema::named("ProxyConfig");
    let names = value.as_object().into_iter().flatten().map(|(name, _)| name);
    names.filter(|name| known.by_json(&schema::camel_case(name)).is_none()).cloned().collect()
}

/// All faults of an annotation's ProxyConfig, over the defaults.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_proxy_config(yaml: &str) -> Result<(), String> {
    let over = proxy_config(yaml)?;
    let mut config = DEFAULTS["defaultConfig"].clone();
    schema::overlay(schema::named("ProxyConfig"), &mut config, &over);
    let faults: Vec<String> =
        validate::proxy(&config).into_iter().map(|fault| format!("{}: {}", fault.path, fault.message)).collect();
    if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) }
}

/// A ProxyConfig without the fields that are as the defaults have them, which makes pods much smaller.
///
/// As `cleanProxyConfig`.
pub(crate) fn without_defaults(proxy: &Value) -> Value {
    let ty = schema::named("ProxyConfig");
    let proxy = schema::decode(ty, proxy).unwrap_or_else(|_| proxy.clone());
    let defaults = &DEFAULTS["defaultConfig"];
    let mut out = Map::new();
    for (key, value) in proxy.as_object().into_iter().flatten() {
        let empty = value.as_object().is_some_and(Map::is_empty) && key == "proxyMetadata";
        if !empty && defaults.get(key) != Some(value) {
            out.insert(key.clone(), value.clone());
        }
    }
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_fields_of_the_annotation_are_named() {
        let yaml = "concurrency: 2\ntracing_service_name: CANONICAL_NAME_ONLY\nproxyMetadata: {X: y}\nconcurencyy: 2\n";
        assert_eq!(unknown_proxy_fields(yaml), ["concurencyy"]);
        assert!(unknown_proxy_fields("[").is_empty());
    }

    #[test]
    fn the_users_configuration_lies_over_the_defaults() {
        let mesh = Mesh::load(&json!({
            "defaultConfig": {"proxyMetadata": {"A": "1"}, "tracing_service_name": "CANONICAL_NAME_ONLY", "drainDuration": "1m"},
            "extensionProviders": [{"name": "otel", "opentelemetry": {"port": 4317, "service": "s"}}],
            "unknown": 1,
        }))
        .unwrap();
        assert_eq!(mesh.proxy()["serviceCluster"], Value::Null, "a oneof has one member");
        assert_eq!(mesh.proxy()["drainDuration"], "60s");
        assert_eq!(mesh.value()["extensionProviders"].as_array().unwrap().len(), 4);
        let own = mesh.with_proxy_config("proxyMetadata:\n  B: \"2\"\nconcurrency: 2\n").unwrap();
        assert_eq!(
            without_defaults(own.proxy()).to_string(),
            r#"{"tracingServiceName":"CANONICAL_NAME_ONLY","drainDuration":"60s","concurrency":2,"proxyMetadata":{"A":"1","B":"2"}}"#
        );
    }

    #[test]
    fn a_wrong_field_is_named() {
        let error = Mesh::load(&json!({"defaultConfig": {"statusPort": "x"}})).unwrap_err();
        assert_eq!(error.to_string(), r#"defaultConfig.statusPort: expected an integer, found a string ("x")"#);
    }
}
