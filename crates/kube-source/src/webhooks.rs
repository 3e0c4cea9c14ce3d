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

use crate::watch::chain;
use crate::{Cluster, Notice};

/// Injection's webhooks end so (istio pkg/kube/inject, `webhookName`).
pub const INJECTOR: &str = "sidecar-injector.istio.io";
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
                        let ours = object.webhooks.iter().flatten().filter(|webhook| webhook.name.ends_with(INJECTOR));
                        let ours: Vec<_> = ours.collect();
                        let object = object.name_any();
                        if ours.is_empty() {
                            self.notice(&Notice::InjectorLacksWebhook { object: &object });
                        }
                        let stale = ours.into_iter().filter(|webhook| lacks(&webhook.client_config, ca_pem));
                        let patches = stale.map(|webhook| bundle(&webhook.name, ca_pem)).collect();
                        let told = |result: Result<(), &str>| {
                            self.notice(&Notice::InjectorWritten { object: &object, result });
                        };
                        write(&mutating, &object, patches, told).await
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
                        let told = |result: Result<(), &str>| self.notice(&Notice::ValidatorWritten { result });
                        write(&validating, &object.name_any(), patches, told).await
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

/// Webhooks are merged by name. `told` hears how it went, unless there is nothing to write.
async fn write<K>(
    api: &Api<K>,
    name: &str,
    patches: Vec<Value>,
    told: impl Fn(Result<(), &str>),
) -> Result<(), kube::Error>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    if patches.is_empty() {
        return Ok(());
    }
    info!(name, webhooks = patches.len(), "writing the webhooks' caBundle");
    let patched = api.patch(name, &PatchParams::default(), &Patch::Strategic(json!({"webhooks": patches}))).await;
    match &patched {
        Ok(_) => told(Ok(())),
        Err(kube::Error::Api(status)) => told(Err(&status.reason)),
        // As Kubernetes' library calls what no answer says.
        Err(_) => told(Err("")),
    }
    patched.map(drop)
}
