//! Pods and endpoints for manifests that describe workloads only, so that a folder of YAML can be asked as if it ran.
//!
//! Each workload gets one ready pod with a sidecar, each service without endpoints those of the pods that it selects. What the
//! manifests say themselves (pods with addresses, EndpointSlices, cluster IPs) is left as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use manifest::Document;
use serde_json::{Map, Value, json};

/// First address of pods that have none: `outrigger up` and kubeadm take this range.
const POD_NET: [u8; 2] = [10, 244];
/// First address of services that have none.
const SERVICE_NET: [u8; 2] = [10, 96];

/// Fills in addresses, and returns the pods and EndpointSlices that are missing.
pub(crate) fn complete(documents: &mut [Document]) -> Vec<Document> {
    let mut taken: BTreeSet<String> = documents.iter().flat_map(addresses).collect();
    let mut next = |net: [u8; 2]| {
        let free = (1..=u16::MAX).map(|n| Ipv4Addr::new(net[0], net[1], (n >> 8) as u8, n as u8).to_string());
        free.into_iter().find(|ip| taken.insert(ip.clone())).unwrap_or_default()
    };
    let mut pods = Vec::new();
    let mut made = Vec::new();
    for document in documents.iter_mut() {
        let namespace = document.namespace().unwrap_or("default").to_owned();
        match document.kind() {
            "Pod" if document.value.pointer("/status/podIP").is_none() => {
                fill_pod(&mut document.value, &next(POD_NET));
                pods.push((namespace, document.value.clone()));
            }
            "Pod" => pods.push((namespace, document.value.clone())),
            "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" | "Job" => {
                let template = document.value.pointer("/spec/template").cloned().unwrap_or_else(|| json!({}));
                let mut pod = template;
                pod["apiVersion"] = json!("v1");
                pod["kind"] = json!("Pod");
                pod["metadata"]["name"] = json!(document.name());
                pod["metadata"]["namespace"] = json!(namespace);
                fill_pod(&mut pod, &next(POD_NET));
                made.push(Document::from_value(pod.clone(), document.file()));
                pods.push((namespace, pod));
            }
            "Service" => {
                let text = |path: &str| document.value.pointer(path).and_then(Value::as_str).unwrap_or_default();
                let external = text("/spec/type") == "ExternalName";
                if !external && text("/spec/clusterIP").is_empty() && document.value.get("spec").is_some() {
                    document.value["spec"]["clusterIP"] = json!(next(SERVICE_NET));
                }
            }
            _ => {}
        }
    }
    let sliced: BTreeSet<(String, String)> = documents.iter().filter_map(sliced_service).collect();
    for service in documents.iter().filter(|document| document.kind() == "Service") {
        let namespace = service.namespace().unwrap_or("default").to_owned();
        let Some(Value::Object(selector)) = service.value.pointer("/spec/selector") else { continue };
        if selector.is_empty() || sliced.contains(&(namespace.clone(), service.name().to_owned())) {
            continue;
        }
        for (_, pod) in pods.iter().filter(|(ns, pod)| *ns == namespace && is_selected(selector, pod)) {
            made.push(Document::from_value(slice(service, &namespace, pod), service.file()));
        }
    }
    made
}

fn addresses(document: &Document) -> Vec<String> {
    let paths = ["/status/podIP", "/spec/clusterIP", "/spec/address"];
    let text = |path: &&str| document.value.pointer(path).and_then(Value::as_str).map(str::to_owned);
    let lists = ["/spec/addresses", "/spec/endpoints", "/endpoints"];
    let listed = lists.iter().filter_map(|path| document.value.pointer(path)).flat_map(Value::as_array).flatten();
    let in_lists = listed.flat_map(|entry| {
        let own = entry.as_str().map(str::to_owned);
        let address = entry.get("address").and_then(Value::as_str).map(str::to_owned);
        let several = entry.get("addresses").and_then(Value::as_array).into_iter().flatten();
        own.into_iter().chain(address).chain(several.filter_map(|a| a.as_str().map(str::to_owned))).collect::<Vec<_>>()
    });
    paths.iter().filter_map(text).chain(in_lists).collect()
}

/// What the kubelet and the injector would have written.
fn fill_pod(pod: &mut Value, ip: &str) {
    pod["status"] = json!({
        "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
        "conditions": [{"type": "Ready", "status": "True"}],
    });
    if is_injected(pod) {
        pod["metadata"]["labels"]["security.istio.io/tlsMode"] = json!("istio");
    }
}

/// Whether the pod's own labels and annotations let it have a sidecar.
pub(crate) fn is_injected(pod: &Value) -> bool {
    let said = |part: &str| {
        let value = pod.pointer(&format!("/metadata/{part}/sidecar.istio.io~1inject"))?;
        value.as_str().map(str::to_owned).or_else(|| value.as_bool().map(|on| on.to_string()))
    };
    let on_host = pod.pointer("/spec/hostNetwork").and_then(Value::as_bool) == Some(true);
    !on_host && said("labels").or_else(|| said("annotations")).is_none_or(|said| said != "false")
}

fn sliced_service(document: &Document) -> Option<(String, String)> {
    let name = match document.kind() {
        "EndpointSlice" => document.value.pointer("/metadata/labels/kubernetes.io~1service-name")?.as_str()?,
        "Endpoints" => document.name(),
        _ => return None,
    };
    Some((document.namespace().unwrap_or("default").to_owned(), name.to_owned()))
}

fn is_selected(selector: &Map<String, Value>, pod: &Value) -> bool {
    let labels = pod.pointer("/metadata/labels");
    selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

fn slice(service: &Document, namespace: &str, pod: &Value) -> Value {
    let pod_name = pod.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    let ip = pod.pointer("/status/podIP").and_then(Value::as_str).unwrap_or_default();
    let named = named_ports(pod);
    let ports = service.value.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten();
    let ports: Vec<Value> = ports
        .filter_map(|port| {
            let target = match port.get("targetPort") {
                None => port.get("port")?.as_u64()?,
                Some(Value::String(name)) => *named.get(name.as_str())?,
                Some(number) => number.as_u64()?,
            };
            let text = |key: &str, default: &str| port.get(key).and_then(Value::as_str).unwrap_or(default).to_owned();
            let mut out = json!({"name": text("name", ""), "port": target, "protocol": text("protocol", "TCP")});
            if let Some(protocol) = port.get("appProtocol") {
                out["appProtocol"] = protocol.clone();
            }
            Some(out)
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": format!("{}-{pod_name}", service.name()), "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service.name()},
        },
        "ports": ports,
        "endpoints": [{
            "addresses": [ip], "conditions": {"ready": true, "serving": true},
            "targetRef": {"kind": "Pod", "name": pod_name, "namespace": namespace},
        }],
    })
}

fn named_ports(pod: &Value) -> BTreeMap<&str, u64> {
    let containers = pod.pointer("/spec/containers").and_then(Value::as_array).into_iter().flatten();
    let ports = containers.filter_map(|container| container.get("ports")?.as_array()).flatten();
    ports.filter_map(|port| Some((port.get("name")?.as_str()?, port.get("containerPort")?.as_u64()?))).collect()
}
