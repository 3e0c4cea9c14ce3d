use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};

use crate::Cluster;

/// Why a Secret cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("Secret {namespace}/{name}")]
pub struct SecretError {
    namespace: String,
    name: String,
    #[source]
    source: Box<kube::Error>,
}

impl Cluster {
    /// The data of a Secret; `None` when there is none of this name.
    ///
    /// # Errors
    /// When the server does not answer or refuses to.
    pub async fn secret(&self, namespace: &str, name: &str) -> Result<Option<BTreeMap<String, Vec<u8>>>, SecretError> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), namespace);
        let found = api.get_opt(name).await.map_err(|source| error(namespace, name, source))?;
        Ok(found.map(|secret| secret.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect()))
    }

    /// Makes a Secret; false when somebody else has made it before.
    ///
    /// # Errors
    /// When the server does not answer or refuses to.
    pub async fn create_secret(
        &self,
        namespace: &str,
        name: &str,
        kind: &str,
        data: BTreeMap<String, Vec<u8>>,
    ) -> Result<bool, SecretError> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), namespace);
        let secret = Secret {
            metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
            data: Some(data.into_iter().map(|(key, value)| (key, ByteString(value))).collect()),
            type_: Some(kind.to_owned()),
            ..Secret::default()
        };
        match api.create(&PostParams::default(), &secret).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(false),
            Err(source) => Err(error(namespace, name, source)),
        }
    }
}

fn error(namespace: &str, name: &str, source: kube::Error) -> SecretError {
    SecretError { namespace: namespace.to_owned(), name: name.to_owned(), source: Box::new(source) }
}
