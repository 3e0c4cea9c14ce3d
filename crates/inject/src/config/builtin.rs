//! The configuration that this program brings along.

use manifest::Document;
use serde_json::{Value, json};

use super::{Config, ConfigError, load_mesh};

const SIDECAR: &str = include_str!("../builtin/sidecar.tmpl");

/// Choices of the built-in configuration.
#[derive(Clone, Debug)]
pub struct Builtin {
    /// Registry and path before `/proxyv2`.
    pub hub: String,
    pub tag: String,
    /// "" or `default` for the default revision.
    pub revision: String,
    /// Laid over the built-in values, field by field, as Helm does.
    pub values: Value,
    /// A MeshConfig laid over the defaults; an empty object for none.
    pub mesh: Value,
}

impl Default for Builtin {
    fn default() -> Self {
        Self {
            hub: "outrigger".to_owned(),
            tag: env!("CARGO_PKG_VERSION").to_owned(),
            revision: String::new(),
            values: json!({}),
            mesh: json!({}),
        }
    }
}

impl Builtin {
    /// `policy`, `templates` and so on, as in a config map.
    pub fn injection(&self) -> Value {
        json!({"policy": "enabled", "defaultTemplates": ["sidecar"], "templates": {"sidecar": SIDECAR}})
    }

    /// Helm's values, as far as the template reads them.
    pub fn values(&self) -> Value {
        let mut values = json!({
            "revision": if self.revision == "default" { "" } else { &self.revision },
            "global": {
                "hub": self.hub,
                "tag": self.tag,
                "variant": "",
                "istioNamespace": "istio-system",
                "caAddress": "",
                "pilotCertProvider": "istiod",
                "imagePullPolicy": "",
                "imagePullSecrets": [],
                "logAsJson": false,
                "logging": {"level": "default:info"},
                "meshID": "",
                "network": "",
                "multiCluster": {"clusterName": ""},
                "nativeNftables": false,
                "sds": {"token": {"aud": "istio-ca"}},
                "proxy": {
                    "image": "proxyv2",
                    "clusterDomain": "cluster.local",
                    "logLevel": "warning",
                    "componentLogLevel": "misc:error",
                    "includeIPRanges": "*",
                    "excludeIPRanges": "",
                    "includeInboundPorts": "*",
                    "excludeInboundPorts": "",
                    "includeOutboundPorts": "",
                    "excludeOutboundPorts": "",
                    "privileged": false,
                    "statusPort": 15020,
                    "readinessInitialDelaySeconds": 0,
                    "readinessPeriodSeconds": 15,
                    "readinessFailureThreshold": 4,
                    "startupProbe": {"enabled": true, "failureThreshold": 600},
                    "resources": {
                        "requests": {"cpu": "100m", "memory": "128Mi"},
                        "limits": {"cpu": "2000m", "memory": "1024Mi"},
                    },
                },
                "proxy_init": {"image": "proxyv2", "forceApplyIptables": false},
            },
            "pilot": {"cni": {"enabled": false}},
            "sidecarInjectorWebhook": {"rewriteAppHTTPProbe": true},
        });
        overlay(&mut values, &self.values);
        values
    }
}

/// Objects field by field, anything else replaced.
fn overlay(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                overlay(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over.clone(),
    }
}

impl Config {
    /// The built-in template and values with these choices.
    ///
    /// # Errors
    /// Values or mesh configuration of the wrong types.
    pub fn builtin(choices: &Builtin) -> Result<Self, ConfigError> {
        let document = |value, name: &str| Document::from_value(value, name);
        let mut config = Self::assemble(
            &document(choices.injection(), "built-in"),
            &document(choices.values(), "values"),
            &document(choices.mesh.clone(), "mesh"),
        )?;
        config.revision.clone_from(&choices.revision);
        Ok(config)
    }

    /// Replaces the mesh configuration, given as the user's part of it.
    ///
    /// # Errors
    /// A field of the wrong type.
    pub fn set_mesh(&mut self, mesh: &Value) -> Result<(), ConfigError> {
        self.mesh = load_mesh(&Document::from_value(mesh.clone(), "mesh"))?;
        Ok(())
    }
}
