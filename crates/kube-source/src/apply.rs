//! Making and removing objects, for installation.

use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::Value;

use crate::Cluster;

/// Under this name the API server remembers which fields are ours.
const MANAGER: &str = "outrigger-install";
/// What we make carries this label, and only what carries it is removed.
const OURS: (&str, &str) = ("app.kubernetes.io/managed-by", "outrigger");

/// Why an object was not applied or removed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The object has no kind or no name.
    #[error("the object has no {0}")]
    Incomplete(&'static str),
    /// The API server refused it or could not be reached.
    #[error("the API server refuses")]
    Api(#[source] Box<kube::Error>),
}

/// What became of an object that should go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is gone or going.
    Removed,
    /// There was none.
    Absent,
    /// There is one that somebody else made; it stays.
    Foreign,
}

impl Cluster {
    /// Server-side apply of one object; our fields replace those of others.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn apply(&self, object: &Value) -> Result<(), ApplyError> {
        let (api, name) = self.place(object)?;
        let parameters = PatchParams::apply(MANAGER).force();
        let applied = api.patch(&name, &parameters, &Patch::Apply(object)).await;
        applied.map(drop).map_err(|error| ApplyError::Api(Box::new(error)))
    }

    /// Makes the object unless there is one of its name, which then stays as it is. Whether it was made.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn create_missing(&self, object: &Value) -> Result<bool, ApplyError> {
        let (api, _) = self.place(object)?;
        let object: DynamicObject =
            serde_json::from_value(object.clone()).map_err(|_| ApplyError::Incomplete("metadata"))?;
        match api.create(&PostParams::default(), &object).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(ApplyError::Api(Box::new(error))),
        }
    }

    /// Removes the object of that kind, namespace and name, if it is one of ours.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn remove(&self, object: &Value) -> Result<Removal, ApplyError> {
        let (api, name) = self.place(object)?;
        let fail = |error| ApplyError::Api(Box::new(error));
        let found = match api.get_opt(&name).await {
            Ok(found) => found,
            // A kind that is not served has no objects.
            Err(kube::Error::Api(status)) if status.code == 404 => None,
            Err(error) => return Err(fail(error)),
        };
        let Some(found) = found else { return Ok(Removal::Absent) };
        let labels = found.metadata.labels.unwrap_or_default();
        if labels.get(OURS.0).map(String::as_str) != Some(OURS.1) {
            return Ok(Removal::Foreign);
        }
        match api.delete(&name, &DeleteParams::background()).await {
            Ok(_) => Ok(Removal::Removed),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(Removal::Absent),
            Err(error) => Err(fail(error)),
        }
    }

    fn place(&self, object: &Value) -> Result<(Api<DynamicObject>, String), ApplyError> {
        let text = |value: &Value, what| value.as_str().map(str::to_owned).ok_or(ApplyError::Incomplete(what));
        let version = text(&object["apiVersion"], "apiVersion")?;
        let kind = text(&object["kind"], "kind")?;
        let name = text(&object["metadata"]["name"], "name")?;
        let (group, version) = version.split_once('/').unwrap_or(("", &version));
        // The kinds that are installed have regular plurals.
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
        let api = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        };
        Ok((api, name))
    }
}
