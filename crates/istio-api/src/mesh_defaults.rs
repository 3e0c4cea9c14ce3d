//! MeshConfig's built-in defaults, and how what a user wrote is laid over them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use manifest::Document;
use serde_json::{Map, Value};

use crate::destination_rule::LocalityLoadBalancerSetting;
use crate::extension_provider::{
    EnvoyFileAccessLogProvider, ExtensionProvider, PrometheusMetricsProvider, StackdriverProvider,
};
use crate::mesh_config::{
    DefaultProviders, InboundTrafficPolicy, InboundTrafficPolicyMode, IngressControllerMode, MeshConfig,
    OutboundTrafficPolicy, OutboundTrafficPolicyMode,
};
use crate::mesh_proxy::{AuthenticationPolicy, ProxyConfig};
use crate::wire::Duration;
use crate::{Severity, Violation};

impl ProxyConfig {
    /// What every proxy starts from (istio `pkg/config/mesh`, `DefaultProxyConfig`).
    pub fn builtin() -> Self {
        Self {
            config_path: "./etc/istio/proxy".into(),
            binary_path: "/usr/local/bin/envoy".into(),
            service_cluster: Some("istio-proxy".into()),
            drain_duration: Some(Duration::from_secs(45)),
            termination_drain_duration: Some(Duration::from_secs(5)),
            proxy_admin_port: 15000,
            control_plane_auth_policy: AuthenticationPolicy::MutualTls,
            discovery_address: "istiod.istio-system.svc:15012".into(),
            stat_name_length: 189,
            status_port: 15020,
            ..Self::default()
        }
    }

    /// Lays `over`, a ProxyConfig as JSON, over this one (istio `MergeProxyConfig`): its fields replace ours,
    /// except that `proxyMetadata` is merged by key and `proxyHeaders` by header.
    ///
    /// # Errors
    /// When a field has the wrong type; the message names it.
    pub fn merged(&self, over: &Value) -> Result<Self, String> {
        let before_headers = self.proxy_headers.clone();
        let mut merged: Self = overlay(self, over)?;
        let mut metadata = self.proxy_metadata.clone();
        metadata.append(&mut merged.proxy_metadata);
        merged.proxy_metadata = metadata;
        if let (Some(headers), Some(before)) = (&mut merged.proxy_headers, before_headers) {
            if headers.forwarded_client_cert == Default::default() {
                headers.forwarded_client_cert = before.forwarded_client_cert;
            }
            headers.request_id = headers.request_id.take().or(before.request_id);
            headers.attempt_count = headers.attempt_count.take().or(before.attempt_count);
            headers.server = headers.server.take().or(before.server);
            headers.envoy_debug_headers = headers.envoy_debug_headers.take().or(before.envoy_debug_headers);
        }
        Ok(merged)
    }
}

impl MeshConfig {
    /// The mesh before anybody configured it (istio `pkg/config/mesh`, `DefaultMeshConfig`).
    pub fn builtin() -> Self {
        let all = || vec!["*".to_owned()];
        let provider = |name: &str| ExtensionProvider { name: name.into(), ..ExtensionProvider::default() };
        let stdout = EnvoyFileAccessLogProvider { path: "/dev/stdout".into(), ..Default::default() };
        Self {
            enable_tracing: true,
            protocol_detection_timeout: Some(Duration::default()),
            ingress_service: "istio-ingressgateway".into(),
            ingress_controller_mode: IngressControllerMode::Strict,
            ingress_class: "istio".into(),
            trust_domain: "cluster.local".into(),
            enable_auto_mtls: Some(true),
            outbound_traffic_policy: Some(OutboundTrafficPolicy {
                mode: OutboundTrafficPolicyMode::AllowAny,
                ..Default::default()
            }),
            inbound_traffic_policy: Some(InboundTrafficPolicy { mode: InboundTrafficPolicyMode::Passthrough }),
            locality_lb_setting: Some(LocalityLoadBalancerSetting { enabled: Some(true), ..Default::default() }),
            default_config: Some(ProxyConfig::builtin()),
            root_namespace: "istio-system".into(),
            proxy_listen_port: 15001,
            proxy_inbound_listen_port: 15006,
            connect_timeout: Some(Duration::from_secs(10)),
            default_service_export_to: all(),
            default_virtual_service_export_to: all(),
            default_destination_rule_export_to: all(),
            dns_refresh_rate: Some(Duration::from_secs(60)),
            enable_prometheus_merge: Some(true),
            default_providers: Some(DefaultProviders::default()),
            extension_providers: vec![
                ExtensionProvider { prometheus: Some(PrometheusMetricsProvider::default()), ..provider("prometheus") },
                ExtensionProvider { stackdriver: Some(StackdriverProvider::default()), ..provider("stackdriver") },
                ExtensionProvider { envoy_file_access_log: Some(stdout), ..provider("envoy") },
            ],
            ..Self::default()
        }
    }

    /// Reads the YAML of a MeshConfig over the built-in defaults. Empty text gives the defaults.
    ///
    /// # Errors
    /// A syntax error, a field of the wrong type, or a setting that [`MeshConfig::validate`] refuses.
    pub fn load(file: &Path, yaml: &str) -> Result<Self, manifest::Error> {
        Self::builtin().load_over(file, yaml)
    }

    /// Reads the YAML of a MeshConfig over this one. Empty text changes nothing.
    ///
    /// # Errors
    /// As [`MeshConfig::load`].
    pub fn load_over(&self, file: &Path, yaml: &str) -> Result<Self, manifest::Error> {
        let documents = manifest::parse_plain(file, yaml)?;
        let Some(document) = documents.first() else { return Ok(self.clone()) };
        let config = self.merged(&document.value).map_err(|message| named(document, message))?;
        match config.validate().into_iter().find(|violation| violation.severity == Severity::Error) {
            Some(Violation { path, message, .. }) => Err(document.error(&path, message)),
            None => Ok(config),
        }
    }

    /// Lays `over`, a MeshConfig as JSON, over this one (istio `ApplyMeshConfig`): its fields replace ours, except
    /// that `defaultConfig` and `defaultProviders` are merged by field, `extensionProviders` by name, and
    /// `trustDomainAliases` add up.
    ///
    /// # Errors
    /// When a field has the wrong type; the message names it.
    pub fn merged(&self, over: &Value) -> Result<Self, String> {
        let mut merged: Self = overlay(self, over)?;
        merged.default_config = self.default_config.clone();
        if let Some(over) = child(over, "defaultConfig", "default_config") {
            let base = self.default_config.clone().unwrap_or_default();
            merged.default_config = Some(base.merged(over).map_err(|message| format!("defaultConfig.{message}"))?);
        }
        merged.default_providers = self.default_providers.clone();
        if let Some(over) = child(over, "defaultProviders", "default_providers") {
            let base = self.default_providers.clone().unwrap_or_default();
            merged.default_providers =
                Some(overlay(&base, over).map_err(|message| format!("defaultProviders.{message}"))?);
        }
        let mut providers = self.extension_providers.clone();
        if child(over, "extensionProviders", "extension_providers").is_some() {
            for provider in std::mem::take(&mut merged.extension_providers) {
                match providers.iter_mut().find(|other| other.name == provider.name) {
                    Some(other) => *other = provider,
                    None => providers.push(provider),
                }
            }
        }
        merged.extension_providers = providers;
        let aliases: BTreeSet<String> =
            self.trust_domain_aliases.iter().chain(&merged.trust_domain_aliases).cloned().collect();
        merged.trust_domain_aliases = aliases.into_iter().collect();
        Ok(merged)
    }
}

fn child<'v>(value: &'v Value, camel: &str, proto: &str) -> Option<&'v Value> {
    value.get(camel).or_else(|| value.get(proto)).filter(|value| !value.is_null())
}

/// `over`'s fields instead of `base`'s, on the first level only, as jsonpb decodes into a filled message.
fn overlay<T>(base: &T, over: &Value) -> Result<T, String>
where
    T: serde::Serialize + serde::de::DeserializeOwned,
{
    let over = match over {
        Value::Object(fields) => fields,
        Value::Null => &Map::new(),
        _ => return Err(": expected an object".into()),
    };
    let Ok(Value::Object(base)) = serde_json::to_value(base) else { return Err(": expected an object".into()) };
    let mut fields: BTreeMap<String, &Value> = base.iter().map(|(key, value)| (key.clone(), value)).collect();
    for (key, value) in over.iter().filter(|(_, value)| !value.is_null()) {
        fields.insert(camel_case(key), value);
    }
    let merged: Value = fields.into_iter().map(|(key, value)| (key, value.clone())).collect::<Map<_, _>>().into();
    serde_path_to_error::deserialize(&merged).map_err(|error| format!("{}: {}", error.path(), error.inner()))
}

fn camel_case(name: &str) -> String {
    let mut words = name.split('_');
    let mut out = words.next().unwrap_or_default().to_owned();
    for word in words {
        let mut chars = word.chars();
        out.extend(chars.next().map(|c| c.to_ascii_uppercase()));
        out.push_str(chars.as_str());
    }
    out
}

fn named(document: &Document, message: String) -> manifest::Error {
    match message.split_once(": ") {
        Some((path, message)) => document.error(path, message),
        None => document.error("", message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(yaml: &str) -> Result<MeshConfig, String> {
        MeshConfig::load(Path::new("mesh.yaml"), yaml).map_err(|error| error.to_string())
    }

    #[test]
    fn empty_text_gives_the_defaults() {
        assert_eq!(load("").unwrap(), MeshConfig::builtin());
        assert_eq!(load("trustDomain: null\n").unwrap(), MeshConfig::builtin());
    }

    #[test]
    fn fields_replace_but_proxy_config_merges() {
        let config = load(
            "trustDomain: td\ntrust_domain_aliases: [b, a]\noutboundTrafficPolicy: {mode: REGISTRY_ONLY}\n\
             defaultConfig: {concurrency: 3, proxyMetadata: {A: x}}\nextensionProviders: [{name: envoy, zipkin: {port: 1, service: a}}]",
        )
        .unwrap();
        assert_eq!(config.trust_domain, "td");
        assert_eq!(config.trust_domain_aliases, ["a", "b"]);
        assert_eq!(config.outbound_traffic_policy.unwrap().mode, OutboundTrafficPolicyMode::RegistryOnly);
        let proxy = config.default_config.unwrap();
        assert_eq!((proxy.concurrency, proxy.status_port), (Some(3), 15020));
        assert_eq!(proxy.proxy_metadata["A"], "x");
        let names: Vec<_> = config.extension_providers.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["prometheus", "stackdriver", "envoy"]);
        assert!(config.extension_providers[2].envoy_file_access_log.is_none());
    }

    #[test]
    fn mesh_mtls_is_read_under_every_name() {
        for name in ["meshMTLS", "mesh_mTLS"] {
            let config = load(&format!("{name}: {{minProtocolVersion: TLSV1_3}}")).unwrap();
            assert!(config.mesh_mtls.is_some(), "{name}");
        }
    }

    #[test]
    fn errors_name_file_line_and_field() {
        assert_eq!(
            load("trustDomain: td\nconnectTimeout: soon\n").unwrap_err(),
            "mesh.yaml:2:1: connectTimeout: invalid duration \"soon\": expected a number with a unit such as 500ms, 10s or 1h30m"
        );
        assert!(
            load("defaultConfig:\n  statusPort: x\n")
                .unwrap_err()
                .starts_with("mesh.yaml:2:3: defaultConfig.statusPort: ")
        );
    }
}
