//! Merging of metrics: the proxy's agent is scraped and passes the application's metrics on.

use serde_json::{Value, json};

use crate::mesh::Mesh;
use crate::pod;
use crate::status::{MERGE_METRICS, PROXY, annotation, parse_bool};

const SCRAPE: &str = "prometheus_io_scrape";
const PORT: &str = "prometheus_io_port";
const PATH: &str = "prometheus_io_path";
const TARGETS: &str = "prometheus_istio_io_scrape_targets";
const SECURE_PORT: &str = "prometheus_istio_io_secure_port";

/// The proxy's own ports: scraping them through the agent would go round in circles or leak.
const RESERVED: [i64; 9] = [15000, 15001, 15004, 15006, 15008, 15020, 15021, 15053, 15090];

/// A name as Prometheus sees it: `prometheus.io/port` and `prometheus-io/port` are one.
fn sanitised(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// Annotations whose sanitised name is this; the exact spelling first, the rest in order.
fn values<'a>(pod: &'a Value, name: &str) -> impl Iterator<Item = &'a str> {
    let mut found: Vec<(&String, &'a str)> = pod["metadata"]["annotations"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| sanitised(key) == name)
        .filter_map(|(key, value)| Some((key, value.as_str()?)))
        .collect();
    found.sort_by_key(|(key, _)| (!key.starts_with("prometheus.io/"), *key));
    found.into_iter().map(|(_, value)| value)
}

/// The port that the pod asks to be scraped at.
pub(crate) fn port(pod: &Value) -> Option<&str> {
    values(pod, PORT).next()
}

/// Removes every spelling of the annotations.
pub(crate) fn clear(pod: &mut Value) {
    pod::metadata_mut(pod, "annotations")
        .retain(|name, _| ![SCRAPE, PORT, PATH, TARGETS].contains(&sanitised(name).as_str()));
}

/// Moves the pod's scraping annotations into the proxy's environment and points Prometheus at the agent.
///
/// # Errors
/// A port that is none, or one of the proxy's own.
pub(crate) fn merge(pod: &mut Value, mesh: &Mesh) -> Result<(), String> {
    let scraped = values(pod, SCRAPE).find_map(parse_bool).unwrap_or(true);
    let wanted = annotation(pod, MERGE_METRICS).and_then(parse_bool).unwrap_or_else(|| mesh.prometheus_merge());
    if !scraped || !wanted {
        return Ok(());
    }
    let agent = mesh.status_port().to_string();
    if port(pod) == Some(agent.as_str()) {
        return Ok(());
    }
    let targets = match values(pod, TARGETS).next() {
        Some(text) => targets(text).unwrap_or_default(),
        None => Vec::new(),
    };
    let of = |name| values(pod, name).next().unwrap_or_default();
    // Agents that don't know of targets scrape the first.
    let (port, path) = targets.first().map_or((of(PORT), of(PATH)), |(port, path)| (port, path));
    let scrape = of(SCRAPE);
    if targets.is_empty() && !port.is_empty() {
        check(port, &agent, "invalid prometheus scrape configuration")?;
    }
    for (port, _) in &targets {
        check(port, &agent, "invalid prometheus scrape targets")?;
    }
    let mut config = json!({"scrape": scrape, "path": path, "port": port});
    if !targets.is_empty() {
        config["targets"] = targets.iter().map(|(port, path)| json!({"port": port, "path": path})).collect();
    }
    let empty = [scrape, path, port].iter().all(|text| text.is_empty());
    if !empty && let Some(proxy) = pod::container_mut(pod, PROXY) {
        pod::push_env(proxy, "ISTIO_PROMETHEUS_ANNOTATIONS", &go_template::json::encode(&config, false));
    }
    clear(pod);
    let annotations = pod::metadata_mut(pod, "annotations");
    annotations.insert("prometheus.io/port".to_owned(), json!(agent));
    annotations.insert("prometheus.io/path".to_owned(), json!("/stats/prometheus"));
    annotations.insert("prometheus.io/scrape".to_owned(), json!("true"));
    Ok(())
}

/// `port[:path],…`; a target without path is scraped at `/metrics`. `None` when one is empty.
fn targets(text: &str) -> Option<Vec<(String, String)>> {
    let mut targets = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (port, path) = part.split_once(':').unwrap_or((part, ""));
        let (port, path) = (port.trim(), path.trim());
        if port.is_empty() {
            return None;
        }
        // The agent makes the path absolute.
        targets.push((port.to_owned(), if path.is_empty() { "/metrics" } else { path }.to_owned()));
    }
    Some(targets)
}

fn check(port: &str, agent: &str, what: &str) -> Result<(), String> {
    let number = port.parse::<i64>().ok().filter(|number| (1..=65535).contains(number));
    match number {
        None => Err(format!("{what}: invalid port {port:?}")),
        Some(number) if number.to_string() == agent => Err(format!("{what}: port {port} is the agent's own")),
        Some(number) if RESERVED.contains(&number) => Err(format!("{what}: port {port} is reserved for the proxy")),
        Some(_) => Ok(()),
    }
}

/// Announces the port of merged metrics over mutual TLS when the proxy's environment sets one.
pub(crate) fn secure_port(pod: &mut Value) {
    if values(pod, SECURE_PORT).next().is_some() {
        return;
    }
    let port = pod::sidecar(pod).and_then(|proxy| {
        proxy["env"].as_array()?.iter().find_map(|item| {
            let value = item["value"].as_str().filter(|value| !matches!(*value, "" | "0"))?;
            (item["name"] == "ENVOY_SECURE_MERGED_METRICS_PORT").then(|| value.to_owned())
        })
    });
    if let Some(port) = port {
        pod::metadata_mut(pod, "annotations").insert("prometheus.istio.io/secure-port".to_owned(), json!(port));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(annotations: Value) -> Value {
        json!({"metadata": {"annotations": annotations}, "spec": {"containers": [{"name": "istio-proxy"}]}})
    }

    #[test]
    fn annotations_move_into_the_proxy() {
        let mut pod = pod(json!({"prometheus-io/port": "80", "prometheus.io.path": "/m"}));
        merge(&mut pod, &Mesh::defaults()).unwrap();
        assert_eq!(pod["spec"]["containers"][0]["env"][0]["value"], r#"{"scrape":"","path":"/m","port":"80"}"#);
        assert_eq!(
            pod["metadata"]["annotations"],
            json!({"prometheus.io/port": "15020", "prometheus.io/path": "/stats/prometheus", "prometheus.io/scrape": "true"})
        );
    }

    #[test]
    fn several_targets() {
        let mut pod = pod(json!({"prometheus.istio.io/scrape-targets": "8080, 9090 : /x,81:m"}));
        merge(&mut pod, &Mesh::defaults()).unwrap();
        assert_eq!(
            pod["spec"]["containers"][0]["env"][0]["value"],
            r#"{"scrape":"","path":"/metrics","port":"8080","targets":[{"port":"8080","path":"/metrics"},{"port":"9090","path":"/x"},{"port":"81","path":"m"}]}"#
        );
    }

    #[test]
    fn own_ports_are_refused() {
        for port in ["15090", "0", "x", "15021"] {
            assert!(merge(&mut pod(json!({"prometheus.io/port": port})), &Mesh::defaults()).is_err(), "{port}");
        }
    }
}
