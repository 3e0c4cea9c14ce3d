//! Resources of one proxy as Envoy's configuration dumps, and what is kept of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_api::core::{DataSource, data_source::Specifier};
use envoy_api::pb::envoy::extensions::transport_sockets::tls::v3::{Secret, secret};
use envoy_api::{Message, Resource, type_url};
use mesh_types::ArcStr;
use serde_json::{Value, json};

use super::{About, Failure, connection, parameter};
use crate::secrets;
use crate::world::State;

/// The type that istiod's short name means.
pub(super) fn long(short: &str) -> Option<&'static str> {
    Some(match short.to_ascii_lowercase().as_str() {
        "cds" => type_url::CLUSTER,
        "eds" => type_url::ENDPOINT,
        "lds" => type_url::LISTENER,
        "rds" => type_url::ROUTE,
        "ecds" => type_url::EXTENSION,
        "sds" => type_url::SECRET,
        "nds" => type_url::NAME_TABLE,
        _ => return None,
    })
}

/// Who is asked about, and what it watches.
struct Dumped<'a> {
    state: &'a State,
    node: Arc<push_context::Node>,
    watched: BTreeMap<ArcStr, Vec<ArcStr>>,
}

impl Dumped<'_> {
    fn new<'a>(state: &'a State, about: &About<'_>, query: &str) -> Result<Dumped<'a>, Failure> {
        let (status, node) = connection(about, query)?;
        Ok(Dumped { state, node, watched: about.statuses.watched(status.connection) })
    }

    /// What the proxy is sent of a type, or would be if it asked; secrets only by the names that it asked for.
    fn resources(&self, url: &str) -> Vec<Resource> {
        if url == type_url::SECRET {
            let names = self.watched.get(url).into_iter().flatten().cloned();
            let found = secrets::resources(&self.state.snapshot, &self.node.namespace, true, names);
            return found.iter().filter_map(without_key).collect();
        }
        xds_gen::generate(&self.state.push, &self.node, url, xds_gen::Names::Wildcard)
    }
}

/// The secret as everybody may see it.
fn without_key(resource: &Resource) -> Option<Resource> {
    let mut secret = Secret::decode(&*resource.body).ok()?;
    if let Some(secret::Type::TlsCertificate(certificate)) = &mut secret.r#type {
        let redacted = Specifier::InlineBytes(b"[redacted]".to_vec());
        certificate.private_key = Some(DataSource { specifier: Some(redacted), ..DataSource::default() });
    }
    Some(Resource::new(resource.name.clone(), &secret))
}

/// All that is dynamic, in istiod's order (`connectionConfigDump`); endpoints if they are asked for.
pub(super) fn whole(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let dumped = Dumped::new(state, about, query)?;
    let endpoints = query.split('&').any(|pair| pair.split('=').next() == Some("include_eds"));
    let version = state.revision.to_string();
    let dumps = [
        (None, "Bootstrap", "", ""),
        (Some(type_url::CLUSTER), "Clusters", "dynamicActiveClusters", "cluster"),
        (Some(type_url::ENDPOINT).filter(|_| endpoints), "Endpoints", "dynamicEndpointConfigs", "endpointConfig"),
        (Some(type_url::LISTENER), "Listeners", "dynamicListeners", "listener"),
        (None, "ScopedRoutes", "", ""),
        (Some(type_url::ROUTE), "Routes", "dynamicRouteConfigs", "routeConfig"),
        (Some(type_url::SECRET), "Secrets", "dynamicActiveSecrets", "secret"),
        (Some(type_url::EXTENSION), "Ecds", "ecdsFilters", "ecdsFilter"),
    ];
    let mut configs = Vec::new();
    for (url, dump, list, field) in dumps {
        let mut section = json!({"@type": format!("type.googleapis.com/envoy.admin.v3.{dump}ConfigDump")});
        match url {
            None if dump == "Endpoints" => continue,
            None => {}
            Some(url) => {
                let mut items = Vec::new();
                for resource in dumped.resources(url) {
                    let config = resource_json(url, &resource.body);
                    let item = json!({"versionInfo": &*resource.version, field: config});
                    items.push(if list == "dynamicListeners" {
                        json!({"name": &*resource.name, "activeState": item})
                    } else {
                        item
                    });
                }
                section[list] = items.into();
            }
        }
        if matches!(dump, "Clusters" | "Listeners") {
            section["versionInfo"] = version.as_str().into();
        }
        configs.push(section);
    }
    Ok(json!({"configs": configs}))
}

/// Just the resources of some types, as istiod's `typedConfigDumpHandler`.
pub(super) fn of_types(state: &State, about: &About<'_>, query: &str, types: &[&str]) -> Result<Value, Failure> {
    let dumped = Dumped::new(state, about, query)?;
    let mut configs = Vec::new();
    for url in types {
        for resource in dumped.resources(url) {
            configs.push(resource_json(url, &resource.body));
        }
    }
    Ok(json!({"configs": configs}))
}

fn resource_json(url: &str, body: &[u8]) -> Value {
    // What JSON cannot say, such as an `Any` of nothing, does not hide all else.
    let mut config =
        envoy_api::json::to_camel_json(url, body).unwrap_or_else(|error| json!({"error": error.to_string()}));
    config["@type"] = url.into();
    config
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
