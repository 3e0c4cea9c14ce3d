//! WorkloadEntries of machines outside of the cluster, which the control plane writes.

use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use crate::{ApplyError, Cluster};

/// Under this name the API server remembers which fields are ours.
const MANAGER: &str = "outrigger-registration";

impl Cluster {
    /// Makes or changes a WorkloadEntry. With `group`, the WorkloadGroup of that name becomes its owner, and takes it along
    /// when it goes.
    ///
    /// # Errors
    /// When the API server refuses, or there is no such group.
    pub async fn write_workload_entry(&self, entry: &Value, group: Option<&str>) -> Result<(), ApplyError> {
        let (namespace, name) = place(entry);
        let mut entry = entry.clone();
        if let Some(group) = group {
            let owner = self.machines("WorkloadGroup", namespace).get(group).await.map_err(fail)?;
            entry["metadata"]["ownerReferences"] = json!([{
                "apiVersion": "networking.istio.io/v1", "kind": "WorkloadGroup", "name": group,
                "uid": owner.metadata.uid, "controller": true,
            }]);
        }
        let parameters = PatchParams::apply(MANAGER).force();
        let api = self.machines("WorkloadEntry", namespace);
        api.patch(name, &parameters, &Patch::Apply(&entry)).await.map(drop).map_err(fail)
    }

    /// Replaces the conditions in a WorkloadEntry's status.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn write_workload_conditions(
        &self,
        namespace: &str,
        name: &str,
        conditions: &Value,
    ) -> Result<(), ApplyError> {
        let patch = json!({"status": {"conditions": conditions}});
        let api = self.machines("WorkloadEntry", namespace);
        let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        api.patch_status(name, &parameters, &Patch::Merge(&patch)).await.map(drop).map_err(fail)
    }

    /// Removes a WorkloadEntry; one that is gone already is no error.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn remove_workload_entry(&self, namespace: &str, name: &str) -> Result<(), ApplyError> {
        match self.machines("WorkloadEntry", namespace).delete(name, &DeleteParams::default()).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(fail(error)),
        }
    }

    fn machines(&self, kind: &str, namespace: &str) -> Api<DynamicObject> {
        // "entry" has no regular plural.
        let plural = if kind == "WorkloadEntry" { "workloadentries" } else { "workloadgroups" };
        let resource =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("networking.istio.io", "v1", kind), plural);
        Api::namespaced_with(self.client.clone(), namespace, &resource)
    }
}

fn place(entry: &Value) -> (&str, &str) {
    let text = |field: &str| entry["metadata"][field].as_str().unwrap_or_default();
    (text("namespace"), text("name"))
}

fn fail(error: kube::Error) -> ApplyError {
    ApplyError::Api(Box::new(error))
}
