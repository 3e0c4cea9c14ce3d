//! A proxy's own configuration out of its `/config_dump`, of Envoy or ours.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use envoy_api::{Message, json, type_url};
use serde_json::Value;

use crate::Resources;

/// What a dump says.
#[derive(Debug, Default)]
pub(crate) struct Dump {
    /// The proxy's name, as its node id says.
    pub(crate) name: String,
    /// Its resources, static ones included.
    pub(crate) resources: Resources,
}

/// The largest dump that is read; a proxy of ten thousand services writes some hundred megabytes.
const LIMIT: u64 = 1 << 30;

/// Reads a file, or standard input for `-`.
pub(crate) fn read(path: &Path) -> anyhow::Result<Dump> {
    let mut text = Vec::new();
    match path.as_os_str() == "-" {
        true => std::io::stdin().lock().take(LIMIT).read_to_end(&mut text)?,
        false => {
            let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
            file.take(LIMIT).read_to_end(&mut text)?
        }
    };
    let value: Value = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    parse(&value).with_context(|| path.display().to_string())
}

/// Takes a dump apart.
pub(crate) fn parse(value: &Value) -> anyhow::Result<Dump> {
    let Some(configs) = value.get("configs").and_then(Value::as_array) else {
        bail!("this is no config dump: it has no configs")
    };
    let mut dump = Dump::default();
    let all = |section: &Value, lists: &[(&str, &str)]| -> Vec<Value> {
        lists
            .iter()
            .flat_map(|(list, path)| {
                let entries = section.get(*list).and_then(Value::as_array).into_iter().flatten();
                entries.filter_map(|entry| entry.pointer(path).cloned()).collect::<Vec<_>>()
            })
            .collect()
    };
    for section in configs {
        let kind = section.get("@type").and_then(Value::as_str).unwrap_or_default();
        match kind.rsplit('.').next().unwrap_or_default() {
            "BootstrapConfigDump" => {
                let id = section.pointer("/bootstrap/node/id").and_then(Value::as_str).unwrap_or_default();
                dump.name = id.split('~').nth(2).unwrap_or(id).to_owned();
            }
            "ListenersConfigDump" => {
                let found =
                    all(section, &[("dynamic_listeners", "/active_state/listener"), ("static_listeners", "/listener")]);
                dump.resources.listeners = decode(&found, type_url::LISTENER)?;
            }
            "RoutesConfigDump" => {
                let found = all(
                    section,
                    &[("dynamic_route_configs", "/route_config"), ("static_route_configs", "/route_config")],
                );
                dump.resources.routes = decode(&found, type_url::ROUTE)?;
            }
            "ClustersConfigDump" => {
                let found = all(section, &[("dynamic_active_clusters", "/cluster"), ("static_clusters", "/cluster")]);
                dump.resources.clusters = decode(&found, type_url::CLUSTER)?;
            }
            "EndpointsConfigDump" => {
                let found = all(
                    section,
                    &[
                        ("dynamic_endpoint_configs", "/endpoint_config"),
                        ("static_endpoint_configs", "/endpoint_config"),
                    ],
                );
                dump.resources.endpoints = decode(&found, type_url::ENDPOINT)?;
            }
            _ => {}
        }
    }
    Ok(dump)
}

fn decode<M: Message + Default>(values: &[Value], type_url: &str) -> anyhow::Result<Vec<M>> {
    let one = |value: &Value| {
        let mut value = value.clone();
        // A resource is an `Any`; its type is known here.
        if let Some(fields) = value.as_object_mut() {
            fields.remove("@type");
        }
        let bytes = json::from_json_lenient(type_url, &value)?;
        M::decode(bytes.as_slice()).with_context(|| format!("malformed {type_url}"))
    };
    values.iter().map(one).collect()
}
