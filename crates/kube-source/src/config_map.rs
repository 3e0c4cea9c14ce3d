//! Single ConfigMaps that somebody needs as they are, and what the nodes can do.

use std::collections::BTreeMap;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::Api;
use kube::api::ListParams;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use tokio::sync::mpsc;
use tracing::debug;

use crate::Cluster;
use crate::watch::chain;

/// From this minor version of Kubernetes 1 on, Istio's `auto` runs sidecars as init containers.
const NATIVE_SIDECARS: u32 = 33;
/// Nodes asked for at a time.
const PAGE: u32 = 500;

impl Cluster {
    /// Sends the data of a ConfigMap whenever it is other than before; `None` where there is no such map. The first
    /// is sent as soon as the server has answered. Ends when nobody listens.
    pub async fn watch_config_map(
        &self,
        namespace: &str,
        name: &str,
        maps: mpsc::Sender<Option<BTreeMap<String, String>>>,
    ) {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut events = watcher::watcher(api, only).default_backoff().boxed();
        let (mut listed, mut current, mut sent) = (false, None, None);
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => current = None,
                Ok(Event::InitApply(map) | Event::Apply(map)) => current = Some(map.data.unwrap_or_default()),
                Ok(Event::Delete(_)) => current = None,
                Ok(Event::InitDone) => listed = true,
                Err(error) => {
                    debug!(namespace, name, error = %chain(&error), "a ConfigMap is not watched");
                    continue;
                }
            }
            if listed && sent.as_ref() != Some(&current) {
                if maps.send(current.clone()).await.is_err() {
                    return;
                }
                sent = Some(current.clone());
            }
        }
    }

    /// Whether every node runs init containers that stay, as Istio's `ENABLE_NATIVE_SIDECARS=auto` asks; false where
    /// there are no nodes or they cannot be listed.
    pub async fn runs_native_sidecars(&self) -> bool {
        let api: Api<Node> = Api::all(self.client.clone());
        let mut page = ListParams::default().limit(PAGE);
        let mut any = false;
        loop {
            let nodes = match api.list(&page).await {
                Ok(nodes) => nodes,
                Err(error) => {
                    debug!(error = %chain(&error), "nodes cannot be listed");
                    return false;
                }
            };
            for node in &nodes.items {
                let info = node.status.as_ref().and_then(|status| status.node_info.as_ref());
                let minor = info.and_then(|info| minor(&info.kubelet_version));
                if minor.is_none_or(|minor| minor < NATIVE_SIDECARS) {
                    return false;
                }
                any = true;
            }
            match nodes.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return any,
            }
        }
    }
}

/// Of `v1.33.4`, 33; later majors count as newer than all.
fn minor(version: &str) -> Option<u32> {
    let mut numbers = version.strip_prefix('v').unwrap_or(version).split(['.', '+', '-']);
    let major: u32 = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    Some(if major > 1 { u32::MAX } else { minor })
}

#[cfg(test)]
mod tests {
    use super::minor;

    #[test]
    fn kubelet_versions() {
        assert_eq!(minor("v1.33.4-gke.1"), Some(33));
        assert_eq!(minor("v2.0.0"), Some(u32::MAX));
        assert_eq!(minor("x"), None);
    }
}
