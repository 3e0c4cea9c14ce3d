//! Resources of one proxy as Envoy's configuration dumps, and what is kept of them.

use std::collections::BTreeMap;

use envoy_api::type_url;
use push_context::Node;
use serde_json::{Value, json};

use super::{About, Failure, parameter};
use crate::world::State;

/// The type that istiod's short name means.
pub(super) fn long(short: &str) -> Option<&'static str> {
    Some(match short.to_ascii_lowercase().as_str() {
        "cds" => type_url::CLUSTER,
        "eds" => type_url::ENDPOINT,
        "lds" => type_url::LISTENER,
        "rds" => type_url::ROUTE,
        "ecds" => type_url::EXTENSION,
        "nds" => type_url::NAME_TABLE,
        _ => return None,
    })
}

/// As Envoy's dump of all that is dynamic.
pub(super) fn whole(state: &State, node: &Node) -> Result<Value, Failure> {
    let dumps = [
        (type_url::CLUSTER, "Clusters", "dynamic_active_clusters", "cluster"),
        (type_url::LISTENER, "Listeners", "dynamic_listeners", "listener"),
        (type_url::ROUTE, "Routes", "dynamic_route_configs", "route_config"),
        (type_url::ENDPOINT, "Endpoints", "dynamic_endpoint_configs", "endpoint_config"),
    ];
    let mut configs = Vec::new();
    for (url, dump, list, field) in dumps {
        let mut items = Vec::new();
        for resource in xds_gen::generate(&state.push, node, url, xds_gen::Names::Wildcard) {
            let config = resource_json(url, &resource.body)?;
            let item = json!({"version_info": &*resource.version, field: config});
            items.push(if list == "dynamic_listeners" {
                json!({"name": &*resource.name, "active_state": item})
            } else {
                item
            });
        }
        configs.push(json!({"@type": format!("type.googleapis.com/envoy.admin.v3.{dump}ConfigDump"), list: items}));
    }
    Ok(json!({"configs": configs}))
}

/// Just the resources of some types, as istiod's `typedConfigDumpHandler`.
pub(super) fn of_types(state: &State, node: &Node, types: &[&str]) -> Result<Value, Failure> {
    let mut configs = Vec::new();
    for url in types {
        for resource in xds_gen::generate(&state.push, node, url, xds_gen::Names::Wildcard) {
            configs.push(resource_json(url, &resource.body)?);
        }
    }
    Ok(json!({"configs": configs}))
}

fn resource_json(url: &str, body: &[u8]) -> Result<Value, Failure> {
    let mut config = envoy_api::json::to_json(url, body).map_err(|error| Failure::Bad(error.to_string()))?;
    config["@type"] = url.into();
    Ok(config)
}

/// Names of resources by type; or how much they are.
pub(super) fn cachez(state: &State, _: &About<'_>, query: &str) -> Result<Value, Failure> {
    let kept = xds_gen::cached(&state.push);
    if parameter(query, "sizes").is_some_and(|value| !value.is_empty()) {
        let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
        for (url, _, bytes) in &kept {
            *sizes.entry(url).or_default() += bytes;
            *sizes.entry("total").or_default() += bytes;
        }
        sizes.entry("total").or_default();
        return Ok(sizes.into_iter().map(|(url, bytes)| (url.to_owned(), Value::from(in_units(bytes)))).collect());
    }
    let mut names: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (url, name, _) in &kept {
        names.entry(url).or_default().push(name);
    }
    Ok(json!(names))
}

/// As istio `pilot/pkg/util/bytes.go`, `ByteCount`.
fn in_units(bytes: usize) -> String {
    if bytes < 1000 {
        return format!("{bytes}B");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut units = "kMGTPE".chars();
    let mut unit = units.next().unwrap_or('k');
    while value >= 1000.0
        && let Some(next) = units.next()
    {
        (value, unit) = (value / 1000.0, next);
    }
    format!("{value:.1}{unit}B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_istiod_does() {
        assert_eq!([0, 999, 1000, 1_550_000].map(in_units), ["0B", "999B", "1.0kB", "1.6MB"]);
    }
}
