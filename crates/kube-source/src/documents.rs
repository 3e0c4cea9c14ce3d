use kube::Api as KubeApi;
use kube::api::{DynamicObject, ListParams};
use kube::discovery::ApiResource;
use manifest::Document;

use crate::Cluster;
use crate::kinds;

/// Kinds that say how workloads and webhooks are set up; group, version, plural and kind.
const OTHERS: [(&str, &str, &str, &str); 8] = [
    ("apps", "v1", "deployments", "Deployment"),
    ("apps", "v1", "statefulsets", "StatefulSet"),
    ("apps", "v1", "daemonsets", "DaemonSet"),
    ("", "v1", "configmaps", "ConfigMap"),
    ("gateway.networking.k8s.io", "v1", "gateways", "Gateway"),
    ("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition"),
    ("admissionregistration.k8s.io", "v1", "mutatingwebhookconfigurations", "MutatingWebhookConfiguration"),
    ("admissionregistration.k8s.io", "v1", "validatingwebhookconfigurations", "ValidatingWebhookConfiguration"),
];

impl Cluster {
    /// Everything that has to do with a mesh, as it is now. What the server does not serve is left out.
    ///
    /// # Errors
    /// When the server cannot be reached, or refuses to tell.
    pub async fn documents(&self) -> Result<Vec<Document>, kube::Error> {
        let core = kinds::CORE.iter().map(|api| api.resource(api.versions[0]));
        let custom = self.served(&kinds::CUSTOM.iter().map(|api| api.kind).collect()).await?;
        let others = OTHERS.iter().map(|(group, version, plural, kind)| ApiResource {
            group: (*group).to_owned(),
            version: (*version).to_owned(),
            api_version: if group.is_empty() { (*version).to_owned() } else { format!("{group}/{version}") },
            kind: (*kind).to_owned(),
            plural: (*plural).to_owned(),
        });
        let mut out = Vec::new();
        for resource in core.chain(custom.into_iter().map(|(_, resource)| resource)).chain(others) {
            let api = KubeApi::<DynamicObject>::all_with(self.client.clone(), &resource);
            let list = match api.list(&ListParams::default()).await {
                Ok(list) => list,
                Err(kube::Error::Api(status)) if status.code == 404 => continue,
                Err(error) => return Err(error),
            };
            for object in list.items {
                let mut value = serde_json::to_value(&object).unwrap_or_default();
                // A list's items do not say what they are.
                value["apiVersion"] = resource.api_version.as_str().into();
                value["kind"] = resource.kind.as_str().into();
                out.push(Document::from_value(value, ""));
            }
        }
        Ok(out)
    }
}
