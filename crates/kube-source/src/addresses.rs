//! Addresses allocated to ServiceEntries, in their status.

use std::net::IpAddr;

use kube::Api;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use crate::{ApplyError, Cluster};

const MANAGER: &str = "outrigger-addresses";

impl Cluster {
    /// Replaces `before`, the hosts and addresses in a ServiceEntry's status. False if something else is there now, or the
    /// object is gone: then a change is on its way to whoever asks.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn write_addresses(
        &self,
        namespace: &str,
        name: &str,
        before: &[(&str, IpAddr)],
        after: &[(&str, IpAddr)],
    ) -> Result<bool, ApplyError> {
        let kind = GroupVersionKind::gvk("networking.istio.io", "v1", "ServiceEntry");
        let resource = ApiResource::from_gvk_with_plural(&kind, "serviceentries");
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource);
        let fail = |error| ApplyError::Api(Box::new(error));
        let Some(object) = api.get_opt(name).await.map_err(fail)? else { return Ok(false) };
        if allocated(&object.data) != before {
            return Ok(false);
        }
        let addresses: Vec<Value> = after.iter().map(|(host, ip)| json!({"host": host, "value": ip})).collect();
        // With the version that was read, so that nothing that comes between is lost.
        let version = object.metadata.resource_version;
        let patch = json!({"metadata": {"resourceVersion": version}, "status": {"addresses": addresses}});
        let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        match api.patch_status(name, &parameters, &Patch::Merge(&patch)).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
            Err(error) => Err(fail(error)),
        }
    }
}

/// As the store reads them: what is no address is passed over.
fn allocated(object: &Value) -> Vec<(&str, IpAddr)> {
    let list = object["status"]["addresses"].as_array().into_iter().flatten();
    list.filter_map(|entry| Some((entry["host"].as_str()?, entry["value"].as_str()?.parse().ok()?))).collect()
}
