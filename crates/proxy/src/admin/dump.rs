//! `/config_dump`, `/certs` and `/init_dump` in Envoy's shapes. JSON is made from the resources' own bytes, on request only.

use super::{Admin, Query};
use crate::control::Failed;
use crate::runtime::{ClusterEntry, ListenerEntry, Shared};
use crate::tls::named_by;
use envoy_api::type_url;
use lifecycle::http::{Response, with_type};
use proxy_core::Host;
use proxy_core::cluster::Discovery;
use proxy_core::endpoints::{Health, LocalitySet};
use proxy_core::format::TimeFormat;
use proxy_core::hcm::Routes;
use proxy_core::listener::Terminal;
use proxy_core::matchers::Regex;
use proxy_core::stream_info::PeerCertificate;
use serde_json::{Map, Value, json};
use std::time::SystemTime;

const PREFIX: &str = "type.googleapis.com/envoy.admin.v3.";

impl Admin {
    pub(super) fn config_dump_answer(&self, query: &Query) -> Response {
        let refused = |status: u16, why: String| with_type(status, "text/plain", why);
        let pattern = query.given("name_regex");
        let regex = match pattern.map(super::whole).transpose() {
            Ok(regex) => regex,
            Err(why) => {
                let pattern = pattern.unwrap_or_default();
                return refused(400, format!("INVALID_ARGUMENT: Error while parsing name_regex from {pattern}: {why}"));
            }
        };
        let mut dump = self.config_dump(if query.has("include_eds") { &["include_eds"] } else { &[] });
        let Some(parts) = dump["configs"].as_array_mut() else { return super::pretty(&dump) };
        if let Some(regex) = &regex {
            filter_names(parts, regex);
        }
        let mask = query.given("mask").map(Mask::parse);
        if let Some(resource) = query.given("resource") {
            let list = parts.iter().enumerate().find_map(|(i, part)| Some((i, list_of(part, resource)?)));
            let (i, of) = match list {
                None => return refused(404, format!("{resource} not found in config dump")),
                Some((_, None)) => {
                    let why = "is not a repeated field. Use";
                    return refused(400, format!("{resource} {why} ?mask={resource} to get only this field"));
                }
                Some((i, Some(of))) => (i, of),
            };
            let mut found = Vec::new();
            for entry in parts[i][resource].as_array_mut().into_iter().flatten() {
                if let Some(mask) = &mask {
                    if !mask.fits(&of, entry) {
                        let why = "could not be successfully used.";
                        return refused(400, format!("FieldMask paths: {:?}\n {why}", mask.text));
                    }
                    keep(entry, &mask.paths);
                }
                let mut typed = Map::new();
                typed.insert("@type".to_owned(), json!(of));
                if let Value::Object(fields) = entry {
                    typed.append(fields);
                }
                found.push(Value::Object(typed));
            }
            return match found.is_empty() {
                true => super::pretty(&json!({})),
                false => super::pretty(&json!({ "configs": found })),
            };
        }
        if let Some(mask) = &mask {
            let fits = |of: &str| mask.paths.iter().all(|path| names_field(of, path));
            parts.retain(|part| part["@type"].as_str().is_some_and(fits));
            if parts.is_empty() {
                let why = "could not be successfully applied to any configs.";
                return refused(400, format!("FieldMask {} {why}", mask.text));
            }
            parts.iter_mut().for_each(|part| keep(part, &mask.paths));
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
        let mut dump = json!({ "configs": configs });
        redact(&mut dump);
        dump
    }

    fn bootstrap_dump(&self) -> Value {
        let of = "type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap";
        let mut bootstrap = envoy_api::json::to_json(of, &self.bootstrap.encode()).unwrap_or_default();
        bootstrap["node"]["user_agent_name"] = json!("envoy");
        // DIFFERS: as in `/server_info`, extensions are not listed.
        bootstrap["node"]["user_agent_build_version"] = json!({"version": {"major_number": 1, "minor_number": 40}});
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
        let entries = self.listeners_in_order();
        let mut out = typed("ListenersConfigDump");
        if let Some(state) = self.control().types.get(type_url::LISTENER) {
            out.insert("version_info".to_owned(), json!(&*state.version.0));
        }
        let stat = entries
            .iter()
            .filter(|e| !e.dynamic)
            .map(|e| json!({"listener": listener_json(e), "last_updated": timestamp(e.updated)}));
        put(&mut out, "static_listeners", stat.collect());
        let mut dynamic: Vec<Value> = Vec::new();
        let mut state = |name: &str, field: &str, state: Value| {
            let known = dynamic.iter_mut().find(|listener| listener["name"] == name);
            match known {
                Some(listener) => listener[field] = state,
                None => dynamic.push(json!({"name": name, field: state})),
            }
        };
        let control = self.control();
        let active = entries.iter().filter(|e| e.dynamic).map(|e| ("active_state", e));
        let warming = control.warming_listeners().map(|e| ("warming_state", e));
        let leaving = control.leaving().iter().filter(|l| l.whole).map(|l| ("draining_state", &l.entry));
        for (field, entry) in active.chain(warming).chain(leaving) {
            state(&entry.listener.name, field, listener_state(entry));
        }
        let (failed, last_failed) = control.failed_listeners();
        for (name, failed) in failed {
            state(name, "error_state", error_state(failed, true));
        }
        // Envoy names those of the last update once more, by nothing but what they hold.
        dynamic.extend(last_failed.map(|failed| json!({"error_state": error_state(failed, false)})));
        put(&mut out, "dynamic_listeners", dynamic);
        Value::Object(out)
    }

    fn routes_dump(&self) -> Value {
        let mut stat = Vec::new();
        for entry in self.listeners_in_order() {
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
            let discovery = &entry.cluster.discovery;
            let is_resolved =
                !matches!(discovery, Discovery::Static | Discovery::Eds { .. } | Discovery::OriginalDst(_));
            let mut localities = Vec::new();
            for (priority, set) in endpoints.priorities.iter().enumerate() {
                let mut inhabited: Vec<_> = set.localities.iter().filter(|l| !l.hosts.is_empty()).collect();
                inhabited.sort_by(|a, b| a.locality.cmp(&b.locality));
                for locality in inhabited {
                    match discovery {
                        // Envoy knows no localities of these hosts.
                        Discovery::OriginalDst(_) => localities.extend(
                            locality
                                .hosts
                                .iter()
                                .map(|host| json!({"lb_endpoints": [host_json(host, false)], "locality": {}})),
                        ),
                        _ => localities.push(locality_json(locality, priority, is_resolved)),
                    }
                }
            }
            let name = entry.cluster.eds_name().unwrap_or(&entry.cluster.name);
            let mut config = Map::new();
            config.insert("@type".to_owned(), json!(type_url::ENDPOINT));
            config.insert("cluster_name".to_owned(), json!(&**name));
            put(&mut config, "endpoints", localities);
            let mut policy = json!({"overprovisioning_factor": endpoints.overprovisioning});
            // Envoy keeps shares as floating-point numbers, and writes them so.
            let drops = endpoints.drops.iter().filter_map(|(category, share)| {
                let (n, of) = share.parts();
                let share = u64::from(n) * 1_000_000 / u64::from(of);
                let percentage = json!({"numerator": share, "denominator": "MILLION"});
                (share > 0).then(|| json!({"category": &**category, "drop_percentage": percentage}))
            });
            let drops: Vec<Value> = drops.collect();
            if !drops.is_empty() {
                policy["drop_overloads"] = json!(drops);
            }
            config.insert("policy".to_owned(), policy);
            let config = json!({"endpoint_config": config});
            if entry.dynamic { dynamic.push(config) } else { stat.push(config) }
        }
        let mut out = typed("EndpointsConfigDump");
        put(&mut out, "static_endpoint_configs", stat);
        put(&mut out, "dynamic_endpoint_configs", dynamic);
        Value::Object(out)
    }

    /// Names and public parts only: keys never leave the process.
    fn secrets_dump(&self) -> Value {
        let written = self.bootstrap.resources.secrets.iter().map(|body| with_at_type(type_url::SECRET, body));
        let written: Vec<Value> = written.collect();
        let is_static = |name: &str| written.iter().any(|secret| secret["name"] == name);
        let mut dynamic = Vec::new();
        for name in self.shared.secrets.names().into_iter().filter(|name| !is_static(name)) {
            let Some(chain) = self.shared.secrets.public_pem(&name) else { continue };
            let field = if chain.0 { "tls_certificate" } else { "validation_context" };
            let part = if chain.0 { "certificate_chain" } else { "trusted_ca" };
            let mut secret = json!({"@type": type_url::SECRET, "name": &*name});
            use base64::Engine as _;
            let encoded = base64::engine::general_purpose::STANDARD.encode(chain.1);
            secret[field] = json!({part: {"inline_bytes": encoded}});
            if chain.0 {
                secret[field]["private_key"] = json!({"inline_bytes": REDACTED_BYTES});
            }
            let (version, updated) = match self.control().taken_secrets.get(&name) {
                Some(taken) => (taken.version.to_string(), taken.at),
                None => (String::new(), self.shared.started_at),
            };
            dynamic.push(json!({
                "name": &*name, "version_info": version, "last_updated": timestamp(updated), "secret": secret,
            }));
        }
        let stat = written.iter().map(|secret| json!({"name": secret["name"], "secret": secret})).collect();
        let warming = self.control().awaited_secrets().into_iter().map(|name| {
            json!({
                "name": &*name, "version_info": "uninitialized", "last_updated": timestamp(self.shared.started_at),
                "secret": {"@type": type_url::SECRET, "name": &*name},
            })
        });
        let warming = warming.collect();
        let mut out = typed("SecretsConfigDump");
        put(&mut out, "static_secrets", stat);
        put(&mut out, "dynamic_active_secrets", dynamic);
        put(&mut out, "dynamic_warming_secrets", warming);
        Value::Object(out)
    }

    /// Of chains, what the owner's certificate says, and of roots what the first one does, as Envoy has it.
    pub(super) fn certs(&self) -> Value {
        let mut certificates = Vec::new();
        for name in self.shared.secrets.names() {
            let Some(entry) = self.shared.secrets.details(&name) else { continue };
            let list = |certs: Vec<PeerCertificate>| -> Vec<Value> {
                certs.iter().take(1).map(|c| certificate_json(c, "<inline>")).collect()
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
                certs.iter().take(1).map(|c| certificate_json(c, &path)).collect()
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

/// Whole days until the first of all certificates ends; Envoy's number where there is none.
pub(super) fn days_until_first_expires(shared: &Shared) -> u64 {
    let secrets = shared.secrets.names().into_iter().filter_map(|name| shared.secrets.details(&name));
    let mut certs: Vec<_> = secrets.flat_map(|(chain, roots)| [chain, roots]).flatten().collect();
    let listeners = shared.listeners.load();
    for chain in listeners.by_name.values().flat_map(|entry| entry.listener.all_chains()) {
        let own = chain.tls.iter().flat_map(|tls| named_by(&tls.common));
        certs.extend(own.flatten().flat_map(|(certs, _)| certs));
    }
    for entry in shared.clusters.load().values() {
        let own = entry.cluster.transport.tls_contexts().flat_map(|tls| named_by(&tls.common));
        certs.extend(own.flatten().flat_map(|(certs, _)| certs));
    }
    certs.iter().map(days_left).min().unwrap_or(u64::from(u32::MAX))
}

fn days_left(c: &PeerCertificate) -> u64 {
    c.not_after.and_then(|t| t.duration_since(SystemTime::now()).ok()).map_or(0, |d| d.as_secs() / 86400)
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

/// One host of a load assignment, as Envoy dumps it. `is_resolved`: it has metadata, if empty.
fn host_json(host: &Host, is_resolved: bool) -> Value {
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
}

/// One locality of a load assignment, as Envoy dumps it.
fn locality_json(set: &LocalitySet, priority: usize, is_resolved: bool) -> Value {
    let hosts = set.hosts.iter().map(|host| host_json(host, is_resolved));
    let mut out = json!({"lb_endpoints": hosts.collect::<Vec<_>>()});
    let locality = &set.locality;
    let parts = [("region", &locality.region), ("zone", &locality.zone), ("sub_zone", &locality.sub_zone)];
    let parts: Map<String, Value> =
        parts.iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| ((*k).to_owned(), json!(&***v))).collect();
    out["locality"] = Value::Object(parts);
    if priority > 0 {
        out["priority"] = json!(priority);
    }
    out["load_balancing_weight"] = json!(set.weight);
    out
}

fn certificate_json(c: &PeerCertificate, path: &str) -> Value {
    let mut names: Vec<Value> = c.dns_sans.iter().map(|d| json!({"dns": &**d})).collect();
    names.extend(c.uri_sans.iter().map(|u| json!({"uri": &**u})));
    names.extend(c.ip_sans.iter().map(|ip| json!({"ip_address": &**ip})));
    let days = days_left(c);
    json!({
        "path": path,
        "serial_number": &*c.serial,
        "subject_alt_names": names,
        "days_until_expiration": days.to_string(),
        "valid_from": c.not_before.map(to_the_second),
        "expiration_time": c.not_after.map(to_the_second),
    })
}

/// Whether a path names a field of messages of that type: it must not go on below a list.
fn names_field(of: &str, path: &[&str]) -> bool {
    let Ok(mut message) = envoy_api::json::descriptor(of) else { return false };
    for (i, name) in path.iter().enumerate() {
        let Some(field) = message.get_field_by_name(name) else { return false };
        if i + 1 == path.len() {
            return true;
        }
        match field.kind().as_message() {
            Some(inner) if !field.is_list() => message = inner.clone(),
            _ => return false,
        }
    }
    false
}

/// The type of what is in a list of a part of the dump; `None` in one of a field that is no list.
fn list_of(part: &Value, field: &str) -> Option<Option<String>> {
    let part = envoy_api::json::descriptor(part["@type"].as_str()?).ok()?;
    let field = part.get_field_by_name(field)?;
    let kind = field.kind();
    Some(kind.as_message().filter(|_| field.is_list()).map(|of| format!("type.googleapis.com/{}", of.full_name())))
}

/// A `google.protobuf.FieldMask` in a request.
struct Mask<'a> {
    text: &'a str,
    paths: Vec<Vec<&'a str>>,
}

impl<'a> Mask<'a> {
    fn parse(text: &'a str) -> Self {
        Self { text, paths: text.split(',').map(|path| path.split('.').collect()).collect() }
    }

    /// Whether all of it can be applied to a message of that type. A resource in an `Any` of it is there to be asked.
    fn fits(&self, of: &str, message: &Value) -> bool {
        self.paths.iter().all(|path| {
            let Some((name, rest)) = path.split_first() else { return false };
            match message[*name]["@type"].as_str() {
                Some(inner) => names_field(inner, rest),
                None => names_field(of, path),
            }
        })
    }
}

/// Leaves nothing of keys, passwords and other secrets, as Envoy, which marks such fields in their definition.
fn redact(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                match name.as_str() {
                    "private_key" | "password" | "secret" if field.get("@type").is_none() => hide(field),
                    "session_ticket_keys" => {
                        let keys = field.get_mut("keys").and_then(Value::as_array_mut);
                        keys.into_iter().flatten().for_each(hide);
                    }
                    _ => redact(field),
                }
            }
        }
        Value::Array(all) => all.iter_mut().for_each(redact),
        _ => {}
    }
}

/// Replaces all that a `core.v3.DataSource` says.
fn hide(source: &mut Value) {
    let Value::Object(fields) = source else { return };
    for (name, field) in fields {
        match name.as_str() {
            "inline_bytes" => *field = json!(REDACTED_BYTES),
            "filename" | "inline_string" | "environment_variable" => *field = json!("[redacted]"),
            _ => {}
        }
    }
}

/// `[redacted]` in base64.
const REDACTED_BYTES: &str = "W3JlZGFjdGVkXQ==";

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

/// `admin.v3.UpdateFailureState`.
fn error_state(failed: &Failed, with_time: bool) -> Value {
    let mut out = json!({
        "failed_configuration": with_at_type(type_url::LISTENER, &failed.body),
        "details": failed.details,
    });
    if with_time {
        out["last_update_attempt"] = json!(timestamp(failed.at));
    }
    out
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

/// Keeps the entries whose resource's name matches as a whole.
fn filter_names(parts: &mut [Value], regex: &Regex) {
    for part in parts {
        let Value::Object(map) = part else { continue };
        for list in map.values_mut() {
            if let Value::Array(entries) = list {
                entries.retain(|entry| {
                    let inner = ["cluster", "listener", "route_config", "endpoint_config", "secret"];
                    let found = inner.iter().find_map(|k| entry.get(k)).unwrap_or(entry);
                    let name = found.get("name").or_else(|| found.get("cluster_name")).and_then(Value::as_str);
                    name.is_some_and(|n| regex.matches(n.as_bytes()))
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
