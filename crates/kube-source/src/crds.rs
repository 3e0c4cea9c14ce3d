use serde_json::{Value, json};

use crate::kinds::{Api, CUSTOM};

/// The CustomResourceDefinitions of Istio's kinds that sidecars are configured by, as one stream of documents.
///
/// For clusters that lack Istio's own. DIFFERS: the schemas leave `spec` open, since the control plane's `/validate`
/// webhook judges it, with messages that name the field. The Gateway API's, whose group is Kubernetes' own, are not
/// ours to give.
pub fn crds() -> String {
    let documents = istio().map(|api| serde_json::to_string_pretty(&crd(api)).unwrap_or_default());
    documents.collect::<Vec<_>>().join("\n---\n") + "\n"
}

fn istio() -> impl Iterator<Item = &'static Api> {
    CUSTOM.iter().filter(|api| api.kind.is_istio())
}

fn crd(api: &Api) -> Value {
    let kind = api.kind.as_str();
    let version = |(index, name): (usize, &&str)| {
        json!({
            "name": name, "served": true, "storage": index == 0,
            "schema": {"openAPIV3Schema": {
                "type": "object",
                "properties": {
                    "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                    "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                },
            }},
            "subresources": {"status": {}},
            "additionalPrinterColumns": columns(kind),
        })
    };
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": api.crd_name(), "labels": {"app.kubernetes.io/part-of": "outrigger"}},
        "spec": {
            "group": api.kind.group(),
            "scope": "Namespaced",
            "names": {
                "kind": kind, "listKind": format!("{kind}List"), "plural": api.plural,
                "singular": kind.to_lowercase(), "shortNames": api.short, "categories": ["istio-io"],
            },
            "versions": api.versions.iter().enumerate().map(version).collect::<Vec<_>>(),
        },
    })
}

fn columns(kind: &str) -> Value {
    let column = |name: &str, path: &str| json!({"name": name, "type": "string", "jsonPath": path});
    let mut columns = match kind {
        "VirtualService" => vec![column("Gateways", ".spec.gateways"), column("Hosts", ".spec.hosts")],
        "DestinationRule" => vec![column("Host", ".spec.host")],
        "ServiceEntry" => vec![
            column("Hosts", ".spec.hosts"),
            column("Location", ".spec.location"),
            column("Resolution", ".spec.resolution"),
        ],
        "WorkloadEntry" => vec![column("Address", ".spec.address")],
        "PeerAuthentication" => vec![column("Mode", ".spec.mtls.mode")],
        "AuthorizationPolicy" => vec![column("Action", ".spec.action")],
        _ => Vec::new(),
    };
    columns.push(json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}));
    Value::Array(columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_version_is_stored() {
        for api in istio() {
            let crd = crd(api);
            let versions = crd["spec"]["versions"].as_array().unwrap();
            assert_eq!(versions.iter().filter(|version| version["storage"] == true).count(), 1, "{}", api.plural);
        }
        assert_eq!(crds().matches("\n---\n").count() + 1, istio().count());
    }
}
