//! What each connected proxy has been sent, accepted and refused.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use ads::server::{EventKind, Watching};
use mesh_types::{ArcStr, SpiffeId};
use push_context::Node;
use serde::Serialize;
use tokio::sync::{Notify, watch};

/// One connected proxy.
#[derive(Clone, Debug, Serialize)]
pub struct ProxyStatus {
    /// Tells connections apart, also of one proxy.
    pub connection: u64,
    /// `sidecar~IP~NAME.NAMESPACE~DOMAIN`.
    pub node_id: ArcStr,
    /// `NAME.NAMESPACE` of the pod.
    pub proxy: String,
    /// Its verified identity; `None` on the plaintext port.
    pub identity: Option<String>,
    /// Where it connects from.
    pub address: String,
    /// Its Kubernetes cluster.
    pub cluster_id: String,
    /// The version it reports.
    pub version: String,
    /// Unix seconds.
    pub connected_at: u64,
    /// The revision up to which it has accepted all that concerns it.
    pub synced_to: u64,
    /// By type URL.
    pub types: BTreeMap<ArcStr, TypeStatus>,
}

impl ProxyStatus {
    /// What istiod calls the connection.
    pub fn connection_id(&self) -> String {
        format!("{}-{}", self.proxy, self.connection)
    }

    /// Refusals that still stand: type URL and message.
    pub fn refusals(&self) -> impl Iterator<Item = (&str, &str)> {
        self.types.iter().filter_map(|(type_url, status)| Some((&**type_url, status.nacked.as_deref()?)))
    }
}

/// One type of resource of one proxy.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TypeStatus {
    /// Revision of the last response.
    pub sent_revision: u64,
    /// Nonce of the last response.
    pub sent_nonce: String,
    /// Unix seconds.
    pub sent_at: u64,
    /// Nonce of the last accepted response.
    pub acked_nonce: String,
    /// Resources in the last response.
    pub resources: usize,
    /// Bytes of the last response.
    pub bytes: usize,
    /// What the proxy said when it refused the last response.
    pub nacked: Option<String>,
}

/// The proxies that did not catch up in time.
#[derive(Clone, Debug)]
pub struct Laggards {
    /// The revision that was waited for.
    pub revision: u64,
    /// At least one.
    pub proxies: Vec<Laggard>,
}

/// A proxy that did not catch up.
#[derive(Clone, Debug)]
pub struct Laggard {
    /// `NAME.NAMESPACE` of the pod.
    pub proxy: String,
    /// How far it got.
    pub synced_to: u64,
    /// What it refused, if it did.
    pub refusal: Option<String>,
}

impl fmt::Display for Laggards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, laggard) in self.proxies.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            match &laggard.refusal {
                Some(refusal) => write!(f, "{} refuses its configuration: {refusal}", laggard.proxy)?,
                None => write!(f, "{} is at revision {} of {}", laggard.proxy, laggard.synced_to, self.revision)?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for Laggards {}

#[derive(Debug)]
struct Entry {
    status: ProxyStatus,
    node: Arc<Node>,
    /// Rung when the stream is to end.
    end: Arc<Notify>,
    watching: Option<Watching>,
}

/// All connected proxies.
#[derive(Debug)]
pub(crate) struct Statuses {
    /// Held for one event or one copy, never across an await.
    proxies: Mutex<BTreeMap<u64, Entry>>,
    /// Ticks when somebody may have caught up.
    progress: watch::Sender<()>,
}

impl Default for Statuses {
    fn default() -> Self {
        Self { proxies: Mutex::default(), progress: watch::Sender::new(()) }
    }
}

/// What is known of a proxy when it connects.
pub(crate) struct Arrival<'a> {
    pub(crate) connection: u64,
    pub(crate) node: Arc<Node>,
    pub(crate) identity: Option<&'a SpiffeId>,
    pub(crate) address: String,
    pub(crate) end: Arc<Notify>,
}

impl Statuses {
    pub(crate) fn arrive(&self, arrival: Arrival<'_>) {
        let status = ProxyStatus {
            connection: arrival.connection,
            node_id: arrival.node.id.as_str().into(),
            proxy: format!("{}.{}", arrival.node.name, arrival.node.namespace),
            identity: arrival.identity.map(ToString::to_string),
            address: arrival.address,
            cluster_id: arrival.node.cluster_id.to_string(),
            version: arrival.node.metadata.get("ISTIO_VERSION").cloned().unwrap_or_default(),
            connected_at: now(),
            synced_to: 0,
            types: BTreeMap::new(),
        };
        let entry = Entry { status, node: arrival.node, end: arrival.end, watching: None };
        self.lock().insert(arrival.connection, entry);
    }

    /// Takes in an event; false when it says nothing new to those who wait.
    pub(crate) fn hear(&self, connection: u64, event: &EventKind) {
        let mut proxies = self.lock();
        if matches!(event, EventKind::Disconnected) {
            proxies.remove(&connection);
            self.progress.send_replace(());
            return;
        }
        let Some(Entry { status: proxy, watching, .. }) = proxies.get_mut(&connection) else { return };
        match event {
            EventKind::Connected { watching: own, .. } => *watching = Some(own.clone()),
            EventKind::Sent { type_url, nonce, revision, resources, bytes, .. } => {
                let status = proxy.types.entry(type_url.clone()).or_default();
                status.sent_revision = *revision;
                status.sent_nonce.clone_from(nonce);
                status.sent_at = now();
                status.resources = *resources;
                status.bytes = *bytes;
            }
            EventKind::Acked { type_url, nonce } => {
                let status = proxy.types.entry(type_url.clone()).or_default();
                status.acked_nonce.clone_from(nonce);
                status.nacked = None;
            }
            EventKind::Nacked { type_url, error, .. } => {
                proxy.types.entry(type_url.clone()).or_default().nacked = Some(error.clone());
                self.progress.send_replace(());
            }
            EventKind::Synced { revision } => {
                proxy.synced_to = proxy.synced_to.max(*revision);
                self.progress.send_replace(());
            }
            EventKind::Disconnected
            | EventKind::Delivered { .. }
            | EventKind::Larger { .. }
            | EventKind::Stale { .. }
            | EventKind::Health { .. } => {}
        }
    }

    pub(crate) fn all(&self) -> Vec<ProxyStatus> {
        self.lock().values().map(|entry| entry.status.clone()).collect()
    }

    /// The connected proxy with this node id or `NAME.NAMESPACE`, else one whose connection's name has this in it, as for istiod.
    pub(crate) fn find(&self, proxy: &str) -> Option<ProxyStatus> {
        let proxies = self.lock();
        let statuses = || proxies.values().map(|entry| &entry.status);
        let found = statuses().find(|status| status.proxy == proxy || &*status.node_id == proxy);
        found.or_else(|| statuses().find(|status| status.connection_id().contains(proxy))).cloned()
    }

    /// The connected proxy of this connection.
    pub(crate) fn node(&self, connection: u64) -> Option<Arc<Node>> {
        Some(self.lock().get(&connection)?.node.clone())
    }

    /// Types and names that the proxy of this connection watches; of names none where that cannot be said now.
    pub(crate) fn watched(&self, connection: u64) -> BTreeMap<ArcStr, Vec<ArcStr>> {
        let proxies = self.lock();
        let Some(entry) = proxies.get(&connection) else { return BTreeMap::new() };
        match entry.watching.as_ref().and_then(Watching::now) {
            Some(watched) => watched.into_iter().collect(),
            None => entry.status.types.keys().map(|type_url| (type_url.clone(), Vec::new())).collect(),
        }
    }

    /// All connected proxies' nodes.
    pub(crate) fn nodes(&self) -> Vec<Arc<Node>> {
        self.lock().values().map(|entry| entry.node.clone()).collect()
    }

    /// Ends the streams of the proxy with this node id; it will come again.
    pub(crate) fn disconnect(&self, node_id: &str) {
        self.lock().values().filter(|entry| &*entry.status.node_id == node_id).for_each(|entry| entry.end.notify_one());
    }

    /// How many report this version.
    pub(crate) fn count(&self, version: &str) -> usize {
        self.lock().values().filter(|entry| entry.status.version == version).count()
    }

    /// Waits until every connected proxy has accepted `revision`.
    pub(crate) async fn wait(&self, revision: u64, timeout: Duration) -> Result<(), Laggards> {
        let mut progress = self.progress.subscribe();
        let caught_up = async {
            while !self.laggards(revision).is_empty() {
                // The sender lives as long as `self`.
                let _ = progress.changed().await;
            }
        };
        match tokio::time::timeout(timeout, caught_up).await {
            Ok(()) => Ok(()),
            Err(_) => match self.laggards(revision) {
                proxies if proxies.is_empty() => Ok(()),
                proxies => Err(Laggards { revision, proxies }),
            },
        }
    }

    fn laggards(&self, revision: u64) -> Vec<Laggard> {
        let proxies = self.lock();
        let statuses = proxies.values().map(|entry| &entry.status);
        let behind = statuses.filter(|proxy| proxy.synced_to < revision || proxy.refusals().next().is_some());
        behind
            .map(|proxy| Laggard {
                proxy: proxy.proxy.clone(),
                synced_to: proxy.synced_to,
                refusal: proxy.refusals().next().map(|(type_url, text)| format!("{type_url}: {text}")),
            })
            .collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Entry>> {
        self.proxies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// In Unix seconds.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrive(statuses: &Statuses, connection: u64) {
        let node = envoy_api::pb::envoy::config::core::v3::Node {
            id: "sidecar~10.0.0.1~a.b~b.svc.cluster.local".into(),
            ..Default::default()
        };
        statuses.arrive(Arrival {
            connection,
            node: Arc::new(Node::from_envoy(&node, None).unwrap()),
            identity: None,
            address: String::new(),
            end: Arc::default(),
        });
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_when_all_have_caught_up_or_gone() {
        let statuses = Statuses::default();
        let second = Duration::from_secs(1);
        assert!(statuses.wait(5, second).await.is_ok(), "nobody is connected");
        arrive(&statuses, 1);
        arrive(&statuses, 2);
        statuses.hear(1, &EventKind::Synced { revision: 5 });
        let laggards = statuses.wait(5, second).await.unwrap_err();
        assert_eq!(laggards.to_string(), "a.b is at revision 0 of 5");
        statuses.hear(2, &EventKind::Disconnected);
        assert!(statuses.wait(5, second).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_told_until_it_is_taken_back() {
        let statuses = Statuses::default();
        arrive(&statuses, 1);
        let type_url: ArcStr = "cds".into();
        statuses
            .hear(1, &EventKind::Nacked { type_url: type_url.clone(), nonce: "1".into(), code: 3, error: "no".into() });
        statuses.hear(1, &EventKind::Synced { revision: 5 });
        let laggards = statuses.wait(5, Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(laggards.to_string(), "a.b refuses its configuration: cds: no");
        statuses.hear(1, &EventKind::Acked { type_url, nonce: "2".into() });
        assert!(statuses.wait(5, Duration::from_secs(1)).await.is_ok());
    }
}
