//! The certificate by which the API server verifies our webhooks.

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use kube::api::{Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::Cluster;
use crate::watch::chain;

/// Injection's webhooks end so (istio pkg/kube/inject, `webhookName`).
const INJECTOR: &str = "sidecar-injector.istio.io";
/// A write that failed is not repeated before.
const PAUSE: Duration = Duration::from_secs(2);

impl Cluster {
    /// Keeps `ca_pem` as the `caBundle` of this revision's webhooks, those with the label `istio.io/rev`, and has
    /// validation refuse what it cannot judge (`failurePolicy: Fail`), as istiod does once it serves. Ends never.
    pub async fn patch_webhooks(&self, revision: &str, ca_pem: &str) {
        let revision = if revision.is_empty() { "default" } else { revision };
        let ours = || watcher::Config::default().labels(&format!("istio.io/rev={revision}"));
        let mutating: Api<MutatingWebhookConfiguration> = Api::all(self.client.clone());
        let validating: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
        let mut injectors = watcher::watcher(mutating.clone(), ours()).default_backoff().boxed();
        let mut validators = watcher::watcher(validating.clone(), ours()).default_backoff().boxed();
        loop {
            let done = tokio::select! {
                Some(event) = injectors.next() => match event {
                    Ok(Event::Apply(object) | Event::InitApply(object)) => {
                        let patches = object.webhooks.iter().flatten().filter(|webhook| webhook.name.ends_with(INJECTOR));
                        let patches = patches.filter(|webhook| lacks(&webhook.client_config, ca_pem));
                        let patches: Vec<_> = patches.map(|webhook| bundle(&webhook.name, ca_pem)).collect();
                        write(&mutating, &object.name_any(), patches).await
                    }
                    _ => Ok(()),
                },
                Some(event) = validators.next() => match event {
                    Ok(Event::Apply(object) | Event::InitApply(object)) => {
                        let stale = object.webhooks.iter().flatten().filter(|webhook| {
                            lacks(&webhook.client_config, ca_pem) || webhook.failure_policy.as_deref() != Some("Fail")
                        });
                        let patches = stale.map(|webhook| {
                            let mut patch = bundle(&webhook.name, ca_pem);
                            patch["failurePolicy"] = "Fail".into();
                            patch
                        });
                        let patches = patches.collect();
                        write(&validating, &object.name_any(), patches).await
                    }
                    _ => Ok(()),
                },
            };
            if let Err(error) = done {
                warn!(error = %chain(&error), "a webhook's caBundle is not written");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn lacks(config: &WebhookClientConfig, ca_pem: &str) -> bool {
    config.ca_bundle.as_ref().is_none_or(|bundle| bundle.0 != ca_pem.as_bytes())
}

fn bundle(name: &str, ca_pem: &str) -> Value {
    json!({"name": name, "clientConfig": {"caBundle": ByteString(ca_pem.as_bytes().to_vec())}})
}

/// Webhooks are merged by name.
async fn write<K>(api: &Api<K>, name: &str, patches: Vec<Value>) -> Result<(), kube::Error>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    if patches.is_empty() {
        return Ok(());
    }
    info!(name, webhooks = patches.len(), "writing the webhooks' caBundle");
    api.patch(name, &PatchParams::default(), &Patch::Strategic(json!({"webhooks": patches}))).await.map(drop)
}
