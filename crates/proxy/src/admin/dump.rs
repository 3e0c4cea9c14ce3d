//! `/config_dump`, `/certs` and `/init_dump` in Envoy's shapes. JSON is made from the resources' own bytes, on request only.

use super::{Admin, Query};
use crate::runtime::{ClusterEntry, ListenerEntry};
use crate::tls::named_by;
use envoy_api::type_url;
use lifecycle::http::{Response, with_type};
use proxy_core::Cluster;
use proxy_core::cluster::Discovery;
use proxy_core::endpoints::{Health, LocalitySet};
use proxy_core::format::TimeFormat;
use proxy_core::hcm::Routes;
use proxy_core::listener::Terminal;
use regex_automata::meta::Regex;
use serde_json::{Map, Value, json};
use std::time::SystemTime;

const PREFIX: &str = "type.googleapis.com/envoy.admin.v3.";

impl Admin {
    pub(super) fn config_dump_answer(&self, query: &Query) -> Response {
        let pattern = query.get("name_regex");
        let Ok(regex) = pattern.map(Regex::new).transpose() else {
            let pattern = pattern.unwrap_or_default();
            let why = super::re2_error(pattern);
            let text = format!("INVALID_ARGUMENT: Error while parsing name_regex from {pattern}: {why}");
            return with_type(400, "text/plain", text);
        };
        let mut dump = self.config_dump(if query.get("include_eds").is_some() { &["include_eds"] } else { &[] });
        if let Some(regex) = &regex {
            filter_names(&mut dump, regex);
        }
        if let Some(resource) = query.get("resource") {
            let parts = dump["configs"].as_array().cloned().unwrap_or_default();
            let found = parts.iter().find_map(|part| {
                let list = part.get(resource)?.as_array()?.clone();
                let of = part.get("@type")?.as_str()?.to_owned();
                Some((of, list))
            });
            let known = [
                "static_clusters",
                "dynamic_active_clusters",
                "dynamic_warming_clusters",
                "static_listeners",
                "dynamic_listeners",
                "static_route_configs",
                "dynamic_route_configs",
                "static_secrets",
                "dynamic_active_secrets",
                "static_endpoint_configs",
                "dynamic_endpoint_configs",
            ];
            if parts.iter().any(|part| part.get(resource).is_some_and(Value::is_object)) {
                let why = "is not a repeated field. Use";
                let text = format!("{resource} {why} ?mask={resource} to get only this field");
                return with_type(400, "text/plain", text);
            }
            let Some((of, mut list)) = found else {
                if known.contains(&resource) {
                    return super::pretty(&json!({}));
                }
                return with_type(404, "text/plain", format!("{resource} not found in config dump"));
            };
            if let Some(mask) = query.get("mask") {
                let paths: Vec<Vec<&str>> = mask.split(',').map(|path| path.split('.').collect()).collect();
                let known = |path: &[&str]| list.iter().any(|entry| entry.get(path[0]).is_some());
                if !list.is_empty() && !paths.iter().all(|path| known(path)) {
                    let why = format!("FieldMask paths: {mask:?}\n could not be successfully used.");
                    return with_type(400, "text/plain", why);
                }
                list.iter_mut().for_each(|entry| keep(entry, &paths));
            }
            let item = item_type(resource);
            let list: Vec<Value> = list
                .into_iter()
                .map(|mut entry| {
                    if let Value::Object(map) = &mut entry {
                        let mut typed = Map::new();
                        typed.insert("@type".to_owned(), json!(format!("{of}.{item}")));
                        typed.append(map);
                        return Value::Object(typed);
                    }
                    entry
                })
                .collect();
            return super::pretty(&json!({ "configs": list }));
        }
        if let Some(mask) = query.get("mask") {
            let first = mask.split(['.', ',']).next().unwrap_or_default();
            if let Some(parts) = dump["configs"].as_array_mut() {
                parts.retain(|part| part.get(first).is_some());
                if parts.is_empty() {
                    let why = format!("FieldMask {mask} could not be successfully applied to any configs.");
                    return with_type(400, "text/plain", why);
                }
                for part in parts {
                    keep(part, &mask.split(',').map(|path| path.split('.').collect()).collect::<Vec<_>>());
                }
            }
        }
        super::pretty(&dump)
    }

    /// The whole dump. `what`: `include_eds` adds endpoints.
    pub(crate) fn config_dump(&self, what: &[&str]) -> Value {
        let mut configs = vec![self.bootstrap_dump(), self.clusters_dump()];
        if what.contains(&"include_eds") {
            configs.push(self.endpoints_dump());
        }
        configs.push(self.listeners_dump());
        configs.push(json!({"@type": format!("{PREFIX}ScopedRoutesConfigDump")}));
        configs.push(self.routes_dump());
        configs.push(self.secrets_dump());
        json!({ "configs": configs })
    }

    fn bootstrap_dump(&self) -> Value {
        let of = "type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap";
        let bootstrap = envoy_api::json::to_json(of, &self.bootstrap.encode()).unwrap_or_default();
        json!({
            "@type": format!("{PREFIX}BootstrapConfigDump"),
            "bootstrap": bootstrap,
            "last_updated": timestamp(self.shared.started_at),
        })
    }

    fn clusters_dump(&self) -> Value {
        let clusters = self.shared.clusters.load();
        let mut entries: Vec<_> = clusters.values().cloned().collect();
        entries.sort_by(|a, b| a.cluster.name.cmp(&b.cluster.name));
        let mut out = typed("ClustersConfigDump");
        if let Some(state) = self.control().types.get(type_url::CLUSTER) {
            out.insert("version_info".to_owned(), json!(&*state.version.0));
        }
        let stat = entries.iter().filter(|e| !e.dynamic).map(|e| cluster_json(e)).collect();
        let active = entries.iter().filter(|e| e.dynamic).map(|e| cluster_json(e)).collect();
        let warming = self.control().warming_clusters().map(|e| cluster_json(e)).collect();
        put(&mut out, "static_clusters", stat);
        put(&mut out, "dynamic_active_clusters", active);
        put(&mut out, "dynamic_warming_clusters", warming);
        Value::Object(out)
    }

    fn listeners_dump(&self) -> Value {
        let listeners = self.shared.listeners.load();
        let mut entries: Vec<_> = listeners.by_name.values().cloned().collect();
        entries.sort_by(|a, b| a.listener.name.cmp(&b.listener.name));
        let mut out = typed("ListenersConfigDump");
        if let Some(state) = self.control().types.get(type_url::LISTENER) {
            out.insert("version_info".to_owned(), json!(&*state.version.0));
        }
        let stat = entries
            .iter()
            .filter(|e| !e.dynamic)
            .map(|e| json!({"listener": listener_json(e), "last_updated": timestamp(e.updated)}));
        put(&mut out, "static_listeners", stat.collect());
        let mut dynamic: Vec<Value> = entries
            .iter()
            .filter(|e| e.dynamic)
            .map(|e| json!({"name": &*e.listener.name, "active_state": listener_state(e)}))
            .collect();
        for entry in self.control().warming_listeners() {
            dynamic.push(json!({"name": &*entry.listener.name, "warming_state": listener_state(entry)}));
        }
        put(&mut out, "dynamic_listeners", dynamic);
        Value::Object(out)
    }

    fn routes_dump(&self) -> Value {
        let listeners = self.shared.listeners.load();
        let mut stat = Vec::new();
        let mut entries: Vec<_> = listeners.by_name.values().cloned().collect();
        entries.sort_by(|a, b| a.listener.name.cmp(&b.listener.name));
        for entry in entries {
            for chain in entry.listener.all_chains() {
                if let Terminal::Http(hcm) = &chain.terminal
                    && let Routes::Inline(table) = &hcm.routes
                {
                    let body = inline_routes(&entry, &table.common.name);
                    stat.push(json!({"route_config": body, "last_updated": timestamp(entry.updated)}));
                }
            }
        }
        let dynamic = self
            .shared
            .routes
            .all()
            .into_iter()
            .filter_map(|(_, slot)| {
                let dump = slot.dump.load_full()?;
                Some(json!({
                    "version_info": &*dump.1,
                    "route_config": with_at_type(type_url::ROUTE, &dump.0),
                    "last_updated": timestamp(dump.2),
                }))
            })
            .collect();
        let mut out = typed("RoutesConfigDump");
        put(&mut out, "static_route_configs", stat);
        put(&mut out, "dynamic_route_configs", dynamic);
        Value::Object(out)
    }

    fn endpoints_dump(&self) -> Value {
        let clusters = self.shared.clusters.load();
        let (mut stat, mut dynamic) = (Vec::new(), Vec::new());
        let mut entries: Vec<_> = clusters.values().cloned().collect();
        entries.sort_by(|a, b| a.cluster.name.cmp(&b.cluster.name));
        for entry in entries {
            let endpoints = entry.endpoints.load();
            let mut localities = Vec::new();
            for (priority, set) in endpoints.priorities.iter().enumerate() {
                localities
                    .extend(set.localities.iter().map(|locality| locality_json(locality, priority, &entry.cluster)));
            }
            let name = entry.cluster.eds_name().unwrap_or(&entry.cluster.name);
            let config = json!({"endpoint_config": {
                "@type": type_url::ENDPOINT,
                "cluster_name": &**name,
                "endpoints": localities,
                "policy": {"overprovisioning_factor": endpoints.overprovisioning},
            }});
            if entry.cluster.eds_name().is_some() { dynamic.push(config) } else { stat.push(config) }
        }
        let mut out = typed("EndpointsConfigDump");
        put(&mut out, "static_endpoint_configs", stat);
        put(&mut out, "dynamic_endpoint_configs", dynamic);
        Value::Object(out)
    }

    /// Names and public parts only: keys never leave the process.
    fn secrets_dump(&self) -> Value {
        let mut dynamic = Vec::new();
        for name in self.shared.secrets.names() {
            let Some(chain) = self.shared.secrets.public_pem(&name) else { continue };
            let field = if chain.0 { "tls_certificate" } else { "validation_context" };
            let part = if chain.0 { "certificate_chain" } else { "trusted_ca" };
            let mut secret = json!({"@type": type_url::SECRET, "name": &*name});
            use base64::Engine as _;
            let encoded = base64::engine::general_purpose::STANDARD.encode(chain.1);
            secret[field] = json!({part: {"inline_bytes": encoded}});
            if chain.0 {
                secret[field]["private_key"] = json!({"inline_bytes": "W3JlZGFjdGVkXQ=="});
            }
            dynamic.push(json!({
                "name": &*name, "version_info": "", "last_updated": timestamp(self.shared.started_at), "secret": secret,
            }));
        }
        let mut out = typed("SecretsConfigDump");
        put(&mut out, "dynamic_active_secrets", dynamic);
        Value::Object(out)
    }

    pub(super) fn certs(&self) -> Value {
        let mut certificates = Vec::new();
        for name in self.shared.secrets.names() {
            let Some(entry) = self.shared.secrets.details(&name) else { continue };
            let list = |certs: Vec<proxy_core::stream_info::PeerCertificate>| -> Vec<Value> {
                certs.into_iter().map(|c| certificate_json(&c, "<inline>")).collect()
            };
            certificates.push(json!({"ca_cert": list(entry.1), "cert_chain": list(entry.0)}));
        }
        let listeners = self.shared.listeners.load();
        let chains = listeners.by_name.values().flat_map(|entry| entry.listener.all_chains());
        let of_chains = chains.filter_map(|chain| chain.tls.as_ref()).map(|tls| named_by(&tls.common));
        let clusters = self.shared.clusters.load();
        let contexts = clusters.values().flat_map(|entry| entry.cluster.transport.tls_contexts());
        for [roots, chain] in of_chains.chain(contexts.map(|tls| named_by(&tls.common))).flatten() {
            let list = |(certs, path): (Vec<_>, String)| -> Vec<Value> {
                certs.iter().map(|c| certificate_json(c, &path)).collect()
            };
            certificates.push(json!({"ca_cert": list(roots), "cert_chain": list(chain)}));
        }
        json!({ "certificates": certificates })
    }

    pub(super) fn init_dump(&self) -> Value {
        match self.control().ready() {
            Ok(()) => json!({}),
            Err(what) => json!({"unready_targets_dumps": [{"name": "init manager", "target_names": [what]}]}),
        }
    }
}

/// Leaves of a message only the fields on these paths, and its type. Below lists nothing is left out.
fn keep(value: &mut Value, paths: &[Vec<&str>]) {
    let Value::Object(fields) = value else { return };
    fields.retain(|key, _| key == "@type" || paths.iter().any(|path| path.first() == Some(&key.as_str())));
    for (key, field) in fields {
        let below = paths.iter().filter(|path| path.first() == Some(&key.as_str())).map(|path| path[1..].to_vec());
        let below: Vec<Vec<&str>> = below.collect();
        if !below.iter().any(Vec::is_empty) {
            keep(field, &below);
        }
    }
}

/// One locality of a load assignment, as Envoy dumps it.
fn locality_json(set: &LocalitySet, priority: usize, cluster: &Cluster) -> Value {
    let is_resolved = matches!(cluster.discovery, Discovery::StrictDns(_) | Discovery::LogicalDns(_));
    let hosts = set.hosts.iter().map(|host| {
        let health = match host.health() {
            Health::Healthy => "HEALTHY",
            Health::Degraded => "DEGRADED",
            Health::Unhealthy => "UNHEALTHY",
        };
        let mut out = json!({
            "endpoint": {"address": super::tables::address_json(&host.address), "health_check_config": {}},
            "health_status": health,
            "load_balancing_weight": host.weight,
        });
        if !host.hostname.is_empty() {
            out["endpoint"]["hostname"] = json!(&*host.hostname);
        }
        if !host.metadata.is_empty() {
            let fields: Map<String, Value> =
                host.metadata.iter().map(|(name, fields)| (name.to_string(), json!(fields))).collect();
            out["metadata"] = json!({"filter_metadata": fields});
        } else if is_resolved {
            out["metadata"] = json!({});
        }
        out
    });
    let mut out = json!({"lb_endpoints": hosts.collect::<Vec<_>>()});
    let locality = &set.locality;
    let parts = [("region", &locality.region), ("zone", &locality.zone), ("sub_zone", &locality.sub_zone)];
    let parts: Map<String, Value> =
        parts.iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| ((*k).to_owned(), json!(&***v))).collect();
    out["locality"] = Value::Object(parts);
    if priority > 0 {
        out["priority"] = json!(priority);
    }
    out["load_balancing_weight"] = json!(if cluster.locality_weighted { set.weight } else { 0 });
    out
}

fn certificate_json(c: &proxy_core::stream_info::PeerCertificate, path: &str) -> Value {
    let mut names: Vec<Value> = c.uri_sans.iter().map(|u| json!({"uri": &**u})).collect();
    names.extend(c.dns_sans.iter().map(|d| json!({"dns": &**d})));
    let days = c.not_after.and_then(|t| t.duration_since(SystemTime::now()).ok()).map_or(0, |d| d.as_secs() / 86400);
    json!({
        "path": path,
        "serial_number": &*c.serial,
        "subject_alt_names": names,
        "days_until_expiration": days.to_string(),
        "valid_from": c.not_before.map(to_the_second),
        "expiration_time": c.not_after.map(to_the_second),
    })
}

fn item_type(resource: &str) -> &'static str {
    match resource {
        "static_clusters" => "StaticCluster",
        "dynamic_active_clusters" | "dynamic_warming_clusters" => "DynamicCluster",
        "static_listeners" => "StaticListener",
        "dynamic_listeners" => "DynamicListener",
        "static_route_configs" => "StaticRouteConfig",
        "dynamic_route_configs" => "DynamicRouteConfig",
        "static_secrets" => "StaticSecret",
        "static_endpoint_configs" => "StaticEndpointConfig",
        "dynamic_endpoint_configs" => "DynamicEndpointConfig",
        _ => "DynamicSecret",
    }
}

fn typed(name: &str) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("@type".to_owned(), json!(format!("{PREFIX}{name}")));
    map
}

fn put(map: &mut Map<String, Value>, key: &str, list: Vec<Value>) {
    if !list.is_empty() {
        map.insert(key.to_owned(), Value::Array(list));
    }
}

fn with_at_type(of: &str, body: &[u8]) -> Value {
    let mut map = Map::new();
    map.insert("@type".to_owned(), json!(of));
    if let Ok(Value::Object(mut fields)) = envoy_api::json::to_json(of, body) {
        map.append(&mut fields);
    }
    Value::Object(map)
}

fn cluster_json(entry: &ClusterEntry) -> Value {
    let mut out = json!({
        "cluster": with_at_type(type_url::CLUSTER, &entry.body),
        "last_updated": timestamp(entry.updated),
    });
    if entry.dynamic {
        out["version_info"] = json!(&*entry.version);
    }
    out
}

fn listener_json(entry: &ListenerEntry) -> Value {
    with_at_type(type_url::LISTENER, &entry.body)
}

fn listener_state(entry: &ListenerEntry) -> Value {
    json!({
        "version_info": &*entry.version,
        "listener": listener_json(entry),
        "last_updated": timestamp(entry.updated),
    })
}

/// The inline route configuration of that name, out of the listener's JSON.
fn inline_routes(entry: &ListenerEntry, name: &str) -> Value {
    fn search(value: &Value, name: &str) -> Option<Value> {
        match value {
            Value::Object(map) => {
                if let Some(found) = map.get("route_config")
                    && found.get("name").and_then(Value::as_str).unwrap_or_default() == name
                {
                    return Some(found.clone());
                }
                map.values().find_map(|v| search(v, name))
            }
            Value::Array(list) => list.iter().find_map(|v| search(v, name)),
            _ => None,
        }
    }
    let mut out = Map::new();
    out.insert("@type".to_owned(), json!(type_url::ROUTE));
    if let Some(Value::Object(mut found)) = search(&listener_json(entry), name) {
        out.append(&mut found);
    }
    Value::Object(out)
}

/// Keeps the entries whose resource's name matches.
fn filter_names(dump: &mut Value, regex: &Regex) {
    let Some(parts) = dump["configs"].as_array_mut() else { return };
    for part in parts {
        let Value::Object(map) = part else { continue };
        for list in map.values_mut() {
            if let Value::Array(entries) = list {
                entries.retain(|entry| {
                    let inner = ["cluster", "listener", "route_config", "endpoint_config", "secret"];
                    let found = inner.iter().find_map(|k| entry.get(k)).unwrap_or(entry);
                    let name = found.get("name").or_else(|| found.get("cluster_name")).and_then(Value::as_str);
                    name.is_some_and(|n| regex.is_match(n.as_bytes()))
                });
            }
        }
        map.retain(|_, v| !matches!(v, Value::Array(a) if a.is_empty()));
    }
}

/// RFC 3339 of a moment that is a whole second.
fn to_the_second(time: SystemTime) -> String {
    timestamp(time).replace(".000Z", "Z")
}

/// RFC 3339 with milliseconds.
pub(crate) fn timestamp(time: SystemTime) -> String {
    let mut text = Vec::new();
    TimeFormat::parse("").write(time, &mut text);
    String::from_utf8_lossy(&text).into_owned()
}
