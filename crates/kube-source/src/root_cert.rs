//! The ConfigMap with the mesh's root certificate, in every namespace: agents verify the control plane by it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{PartialObjectMeta, Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, ResourceExt};
use serde_json::json;
use tracing::{debug, warn};

use crate::Cluster;
use crate::watch::chain;

/// Its name, as istiod's (pilot/pkg/serviceregistry/kube/controller/namespacecontroller.go).
pub const ROOT_CERT_CONFIG_MAP: &str = "istio-ca-root-cert";

const FIELD: &str = "root-cert.pem";
/// Namespaces without workloads: those without injection, but for kube-system, where there may be gateways and plugins.
const IGNORED: [&str; 3] = ["kube-public", "kube-node-lease", "local-path-storage"];
/// How soon a write that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

impl Cluster {
    /// Keeps `root_pem` in the ConfigMap of every namespace. Ends never.
    pub async fn publish_root_certificate(&self, root_pem: &str) {
        let client = &self.client;
        let namespaces = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
        let mut namespaces = watcher::watcher(namespaces, watcher::Config::default()).default_backoff().boxed();
        let only = watcher::Config::default().fields(&format!("metadata.name={ROOT_CERT_CONFIG_MAP}"));
        let mut maps = watcher::watcher(Api::<ConfigMap>::all(client.clone()), only).default_backoff().boxed();
        let mut wanted = Wanted::default();
        loop {
            let retry = !wanted.failed.is_empty();
            tokio::select! {
                Some(event) = namespaces.next() => match event {
                    Ok(event) => wanted.namespace(event),
                    Err(error) => debug!(error = %chain(&error), "namespaces are not watched"),
                },
                Some(event) = maps.next() => match event {
                    Ok(event) => wanted.map(event),
                    Err(error) => debug!(error = %chain(&error), "root certificates are not watched"),
                },
                () = tokio::time::sleep(RETRY), if retry => wanted.failed.clear(),
            }
            for namespace in wanted.missing(root_pem) {
                if let Err(error) = self.write(&namespace, root_pem).await {
                    // A namespace that is being deleted takes no new objects.
                    warn!(namespace, error = %chain(&error), "the root certificate is not published");
                    wanted.failed.insert(namespace);
                } else {
                    wanted.maps.insert(namespace, root_pem.to_owned());
                }
            }
        }
    }

    async fn write(&self, namespace: &str, root_pem: &str) -> Result<(), kube::Error> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let map = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": ROOT_CERT_CONFIG_MAP, "labels": {"istio.io/config": "true"}},
            "data": {FIELD: root_pem},
        });
        let parameters = PatchParams::apply("outrigger").force();
        api.patch(ROOT_CERT_CONFIG_MAP, &parameters, &Patch::Apply(&map)).await.map(drop)
    }
}

#[derive(Default)]
struct Wanted {
    namespaces: BTreeSet<String>,
    /// What each namespace's ConfigMap says.
    maps: BTreeMap<String, String>,
    /// Both have been listed once; before, everything would look missing.
    listed: (bool, bool),
    /// Not to be tried before the pause is over.
    failed: BTreeSet<String>,
}

impl Wanted {
    fn namespace(&mut self, event: Event<PartialObjectMeta<Namespace>>) {
        match event {
            Event::Init => self.namespaces.clear(),
            Event::InitApply(namespace) | Event::Apply(namespace) => {
                let name = namespace.name_any();
                match namespace.metadata.deletion_timestamp.is_some() || IGNORED.contains(&name.as_str()) {
                    true => drop(self.namespaces.remove(&name)),
                    false => drop(self.namespaces.insert(name)),
                }
            }
            Event::Delete(namespace) => drop(self.namespaces.remove(&namespace.name_any())),
            Event::InitDone => self.listed.0 = true,
        }
    }

    fn map(&mut self, event: Event<ConfigMap>) {
        match event {
            Event::Init => self.maps.clear(),
            Event::InitApply(map) | Event::Apply(map) => {
                let namespace = map.namespace().unwrap_or_default();
                let text = map.data.and_then(|mut data| data.remove(FIELD)).unwrap_or_default();
                self.maps.insert(namespace, text);
            }
            Event::Delete(map) => drop(self.maps.remove(&map.namespace().unwrap_or_default())),
            Event::InitDone => self.listed.1 = true,
        }
    }

    fn missing(&self, root_pem: &str) -> Vec<String> {
        if self.listed != (true, true) {
            return Vec::new();
        }
        let lacks =
            |name: &&String| !self.failed.contains(*name) && self.maps.get(*name).is_none_or(|text| text != root_pem);
        self.namespaces.iter().filter(lacks).cloned().collect()
    }
}
