//! The workload that a pod belongs to.

use serde_json::Value;

use crate::status::label;

/// A workload: what templates see as TypeMeta and DeploymentMeta.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    pub kind: String,
    pub api_version: String,
    pub name: String,
    /// As it is written; "" when it is not.
    pub namespace: String,
}

impl Owner {
    /// The owner that a pod names. As istio `pkg/kube`, `GetDeployMetaFromPod`.
    pub fn of_pod(pod: &Value) -> Self {
        let text = |field: &str| pod["metadata"][field].as_str().unwrap_or_default();
        let (name, generated) = (text("name"), text("generateName"));
        let mut owner = Self {
            kind: "Pod".to_owned(),
            api_version: "v1".to_owned(),
            name: name.to_owned(),
            namespace: text("namespace").to_owned(),
        };
        let controller = pod["metadata"]["ownerReferences"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|reference| reference["controller"] == true);
        if let Some(reference) = controller.filter(|_| !generated.is_empty()) {
            let text = |field: &str| reference[field].as_str().unwrap_or_default();
            owner.kind = text("kind").to_owned();
            owner.api_version = text("apiVersion").to_owned();
            owner.name = text("name").to_owned();
            owner.climb(pod);
        }
        if owner.name.is_empty() {
            owner.name = name.to_owned();
        }
        owner
    }

    /// From the controller to what made it, as far as names tell.
    fn climb(&mut self, pod: &Value) {
        let without = |suffix: Option<&str>| {
            let suffix = suffix.filter(|suffix| !suffix.is_empty())?;
            Some(self.name.strip_suffix(suffix)?.strip_suffix('-')?.to_owned())
        };
        match self.kind.as_str() {
            "ReplicaSet" => {
                if let Some(name) = without(label(pod, "pod-template-hash")) {
                    self.name = name;
                    self.kind = "Deployment".to_owned();
                } else if let Some(name) = without(label(pod, "rollouts-pod-template-hash")) {
                    self.name = name;
                    self.kind = "Rollout".to_owned();
                    self.api_version = "v1alpha1".to_owned();
                }
            }
            "ReplicationController" => {
                if let Some(name) = label(pod, "deploymentconfig").filter(|name| !name.is_empty()) {
                    self.name = name.to_owned();
                    self.kind = "DeploymentConfig".to_owned();
                }
            }
            "Job" => {
                if let Some((name, digits)) = self.name.rsplit_once('-')
                    && (8..=10).contains(&digits.len())
                    && digits.bytes().all(|byte| byte.is_ascii_digit())
                    && !name.is_empty()
                {
                    self.name = name.to_owned();
                    self.kind = "CronJob".to_owned();
                    self.api_version = "batch/v1".to_owned();
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(kind: &str, name: &str, labels: Value, want: (&str, &str)) {
        let pod = json!({"metadata": {
            "generateName": "x-", "labels": labels,
            "ownerReferences": [{"kind": kind, "apiVersion": "v", "name": name, "controller": true}],
        }});
        let owner = Owner::of_pod(&pod);
        assert_eq!((owner.kind.as_str(), owner.name.as_str()), want);
    }

    #[test]
    fn owners() {
        check("ReplicaSet", "web-abc", json!({"pod-template-hash": "abc"}), ("Deployment", "web"));
        check("ReplicaSet", "web-abc", json!({}), ("ReplicaSet", "web-abc"));
        check("ReplicaSet", "web-abc", json!({"rollouts-pod-template-hash": "abc"}), ("Rollout", "web"));
        check("Job", "backup-12345678", json!({}), ("CronJob", "backup"));
        check("Job", "backup-1", json!({}), ("Job", "backup-1"));
        assert_eq!(Owner::of_pod(&json!({"metadata": {"name": "p"}})).kind, "Pod");
    }
}
