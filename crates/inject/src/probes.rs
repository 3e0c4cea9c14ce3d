//! Probes and hooks of the application go through the agent, since the proxy would refuse kubelet.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::pod;
use crate::status::{PROXY, STATUS, STATUS_PORT, annotation};

const ENV: &str = "ISTIO_KUBE_APP_PROBERS";

/// A handler of a container and the agent's path for it.
const PROBES: [(&str, &str); 3] =
    [("readinessProbe", "readyz"), ("livenessProbe", "livez"), ("startupProbe", "startupz")];
const HOOKS: [(&str, &str); 2] = [("preStop", "prestopz"), ("postStart", "poststartz")];

/// Tells the agent the probes and rewrites them to ask it. Nothing without a sidecar.
///
/// As `applyRewrite`.
pub(crate) fn rewrite(pod: &mut Value, wanted: bool, agent: i64, warnings: &mut Vec<String>) {
    if !wanted || pod::sidecar(pod).is_none() {
        return;
    }
    let probers = collect(pod, agent, warnings);
    if !probers.is_empty() {
        let again = annotation(pod, STATUS).is_some();
        if let Some(proxy) = pod::container_mut(pod, PROXY) {
            record(proxy, probers, again);
        }
    }
    let port = match annotation(pod, STATUS_PORT) {
        Some(text) => text.parse().unwrap_or(0),
        None => agent,
    };
    for list in pod::LISTS {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else { continue };
        for container in containers.iter_mut().filter(|container| container["name"] != PROXY) {
            redirect(container, port);
        }
    }
}

/// What the agent has to ask, by its own paths. The order is that of the paths.
fn collect(pod: &Value, agent: i64, warnings: &mut Vec<String>) -> BTreeMap<String, Value> {
    let mut probers = BTreeMap::new();
    let all = pod::containers(pod, "initContainers").iter().chain(pod::containers(pod, "containers"));
    for container in all.filter(|container| container["name"] != PROXY) {
        let name = container["name"].as_str().unwrap_or_default();
        let mut add = |path: String, handler: &Value, grpc: bool| {
            match prober(container, handler, grpc, agent) {
            // Rewritten before, perhaps to a port that an annotation gave.
            _ if handler["httpGet"]["path"] == path => {}
            Ok(Some(prober)) => {
                probers.insert(path, prober);
            }
            Ok(None) => {}
            // DIFFERS: Istio rewrites such a probe without a word, and it fails for ever.
            Err(port) => warnings.push(format!(
                "container {name}: a probe names the port {port:?}, which the container does not have; the probe will fail"
            )),
        }
        };
        for (field, path) in PROBES {
            add(format!("/app-health/{name}/{path}"), &container[field], true);
        }
        for (field, path) in HOOKS {
            add(format!("/app-lifecycle/{name}/{path}"), &container["lifecycle"][field], false);
        }
    }
    probers
}

/// A handler as the agent reads it; the error is the name of a port that the container lacks.
fn prober(container: &Value, handler: &Value, grpc: bool, agent: i64) -> Result<Option<Value>, String> {
    let kinds: &[&str] = if grpc { &["httpGet", "tcpSocket", "grpc"] } else { &["httpGet", "tcpSocket"] };
    let Some(kind) = kinds.iter().find(|kind| handler[**kind].is_object()) else { return Ok(None) };
    let mut action = handler[*kind].clone();
    if *kind != "grpc" {
        match action.get("port") {
            Some(Value::String(name)) => match named_port(container, name) {
                Some(port) => action["port"] = json!(port),
                None => return Err(name.clone()),
            },
            Some(port) if port.as_i64() == Some(agent) => return Ok(None),
            _ => {}
        }
    }
    let mut prober = Map::new();
    prober.insert((*kind).to_owned(), action);
    if let Some(seconds) = handler["timeoutSeconds"].as_i64().filter(|seconds| *seconds != 0) {
        prober.insert("timeoutSeconds".to_owned(), json!(seconds));
    }
    Ok(Some(Value::Object(prober)))
}

fn named_port(container: &Value, name: &str) -> Option<i64> {
    // The last of several ports with one name counts, as in a Go map.
    let ports = container["ports"].as_array()?;
    ports.iter().rev().find(|port| port["name"] == name)?["containerPort"].as_i64()
}

/// Puts the probers into the proxy's environment. When the pod was injected before, what stands there
/// wins: those are the real probes, the ones found now are the rewritten.
fn record(proxy: &mut Value, mut probers: BTreeMap<String, Value>, again: bool) {
    let encode = |probers: BTreeMap<String, Value>| {
        go_template::json::encode(&Value::Object(probers.into_iter().collect()), false)
    };
    let slot = proxy["env"].as_array_mut().and_then(|env| env.iter_mut().find(|item| item["name"] == ENV));
    match slot.filter(|_| again) {
        Some(item) => {
            let old = item["value"].as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
            if let Some(old) = old {
                probers.extend(old);
                *item = json!({"name": ENV, "value": encode(probers)});
            }
        }
        None => pod::push_env(proxy, ENV, &encode(probers)),
    }
}

fn redirect(container: &mut Value, port: i64) {
    let name = container["name"].as_str().unwrap_or_default().to_owned();
    for (field, path) in PROBES {
        turn(container.get_mut(field), &["tcpSocket", "grpc"], &format!("/app-health/{name}/{path}"), port);
    }
    let Some(lifecycle) = container.get_mut("lifecycle") else { return };
    for (field, path) in HOOKS {
        turn(lifecycle.get_mut(field), &["tcpSocket"], &format!("/app-lifecycle/{name}/{path}"), port);
    }
}

/// Makes a handler an HTTP request to the agent; what is neither HTTP nor of `kinds` stays.
fn turn(handler: Option<&mut Value>, kinds: &[&str], path: &str, port: i64) {
    let Some(handler) = handler.and_then(Value::as_object_mut) else { return };
    if !handler.get("httpGet").is_some_and(Value::is_object) {
        let Some(kind) = kinds.iter().find(|kind| handler.get(**kind).is_some_and(Value::is_object)) else { return };
        handler.shift_remove(*kind);
        handler.insert("httpGet".to_owned(), json!({}));
    }
    let action = &mut handler["httpGet"];
    action["path"] = json!(path);
    action["port"] = json!(port);
    // Kubelet asks the agent in plain text; the agent asks the application over TLS.
    if action["scheme"] == "HTTPS" {
        action["scheme"] = json!("HTTP");
    }
}
