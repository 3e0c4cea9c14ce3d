//! What waits before it is used: clusters for hosts, checks and secrets, listeners for routes and secrets.

use super::{Control, Refused, sds_refs};
use crate::runtime::{ClusterEntry, ListenerEntry};
use envoy_api::type_url;
use mesh_types::ArcStr;
use proxy_core::Listener;
use proxy_core::config_source::ConfigSource;
use proxy_core::tls::{SdsRef, TlsCommon};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;

/// What is not waited for without end.
pub(crate) enum Awaited {
    /// The first answer of a type.
    Type(&'static str),
    /// A cluster's endpoints.
    Cluster(Weak<ClusterEntry>),
    /// The first active checks of a cluster's hosts, which have ended.
    Checks,
    /// A cluster's secrets.
    ClusterSecrets(Weak<ClusterEntry>),
    /// A listener's routes.
    Routes(Weak<ListenerEntry>),
    /// A listener's secrets.
    Secrets(Weak<ListenerEntry>),
    /// The end of a listener's connections.
    Drained(Weak<ListenerEntry>),
}

/// Tells the control when the time of what it waits for is over.
pub(crate) async fn lose_patience(mut awaited: UnboundedReceiver<(Duration, Awaited)>, control: Arc<Mutex<Control>>) {
    let mut waiting = JoinSet::new();
    loop {
        tokio::select! {
            next = awaited.recv() => match next {
                Some((time, what)) => {
                    waiting.spawn(async move {
                        tokio::time::sleep(time).await;
                        what
                    });
                }
                None => return,
            },
            Some(Ok(what)) = waiting.join_next() => {
                control.lock().unwrap_or_else(PoisonError::into_inner).go_on_without(what);
            }
        }
    }
}

impl Control {
    /// Sees to it that `what` is not waited for longer than its source allows.
    pub(super) fn expect(&self, source: &ConfigSource, what: Awaited) {
        if let Some(time) = source.initial_fetch_timeout {
            // The receiver lives as long as the proxy.
            let _ = self.patience.send((time, what));
        }
    }

    /// Goes on without what did not come in time, as Envoy does after `initial_fetch_timeout`.
    fn go_on_without(&mut self, what: Awaited) {
        match what {
            Awaited::Checks => self.finish_warming(),
            Awaited::Type(of) => {
                if self.awaiting.remove(of) {
                    self.count_timeout(of, &"".into());
                    tracing::warn!(type_url = of, "the first answer did not come in time; going on without it");
                    self.follow_listeners();
                }
            }
            Awaited::Drained(entry) => {
                if let Some(entry) = entry.upgrade() {
                    self.cut(&entry);
                }
            }
            Awaited::Cluster(entry) => {
                let Some(entry) = entry.upgrade().filter(|entry| !entry.warm.load(Ordering::Acquire)) else { return };
                let current = self.warming.get(&entry.cluster.name).is_some_and(|c| Arc::ptr_eq(c, &entry));
                if current {
                    tracing::warn!(
                        cluster = &*entry.cluster.name,
                        "endpoints did not come in time; going on without them"
                    );
                    entry.warm.store(true, Ordering::Release);
                    if let Some(name) = entry.cluster.eds_name() {
                        self.count_timeout(type_url::ENDPOINT, name);
                    }
                    self.finish_warming();
                }
            }
            Awaited::ClusterSecrets(entry) => {
                let Some(entry) = entry.upgrade() else { return };
                let current = self.warming.get(&entry.cluster.name).is_some_and(|c| Arc::ptr_eq(c, &entry));
                if current && !entry.has_secrets.swap(true, Ordering::AcqRel) {
                    self.count_late(entry.cluster.transport.tls_contexts().map(|tls| &tls.common));
                    tracing::warn!(
                        cluster = &*entry.cluster.name,
                        "secrets did not come in time; going on without them"
                    );
                    self.finish_warming();
                }
            }
            Awaited::Routes(entry) => {
                let Some(entry) = entry.upgrade() else { return };
                if !entry.no_more_routes.swap(true, Ordering::Relaxed) && self.is_warming(&entry) {
                    let came = |name: &ArcStr| self.shared.routes.slot(name).table.load().is_some();
                    let late: Vec<_> = entry.listener.rds_names().filter(|name| !came(name)).cloned().collect();
                    late.iter().for_each(|name| self.count_timeout(type_url::ROUTE, name));
                }
                self.start_late(&entry, "routes did not come in time; going on without them");
            }
            Awaited::Secrets(entry) => {
                let Some(entry) = entry.upgrade() else { return };
                if !entry.no_more_secrets.swap(true, Ordering::Relaxed) && self.is_warming(&entry) {
                    self.count_late(tls_of(&entry.listener));
                }
                self.start_late(&entry, "secrets did not come in time; going on without them");
            }
        }
    }

    /// Goes on without what was refused before anything of it came into use (Envoy's `onConfigUpdateFailed`); of all resources
    /// of a type where no `name` is given.
    pub(super) fn wait_no_more(&mut self, of: &str, name: Option<&ArcStr>) {
        let is_it = |other: &ArcStr| name.is_none_or(|name| name == other);
        let mut secrets = |common: &TlsCommon| {
            let mut refs = BTreeSet::new();
            sds_refs(common, &mut refs);
            refs.iter().any(|sds| is_it(&sds.name))
        };
        let clusters: Vec<_> = self.warming.values().cloned().collect();
        for entry in clusters {
            match of {
                type_url::ENDPOINT if entry.cluster.eds_name().is_some_and(is_it) => {
                    entry.warm.store(true, Ordering::Release);
                }
                type_url::SECRET if entry.cluster.transport.tls_contexts().any(|tls| secrets(&tls.common)) => {
                    entry.has_secrets.store(true, Ordering::Release);
                }
                _ => {}
            }
        }
        self.finish_warming();
        let listeners: Vec<_> = self.warming_listeners.values().cloned().collect();
        for entry in listeners {
            match of {
                type_url::ROUTE if entry.listener.rds_names().any(is_it) => {
                    entry.no_more_routes.store(true, Ordering::Relaxed);
                }
                type_url::SECRET if tls_of(&entry.listener).any(&mut secrets) => {
                    entry.no_more_secrets.store(true, Ordering::Relaxed);
                }
                _ => continue,
            }
            self.start_late(&entry, "what it waited for was refused; going on without it");
        }
    }

    /// The secrets that are asked for and have not come.
    pub(crate) fn awaited_secrets(&self) -> BTreeSet<ArcStr> {
        let secrets = self.wanted().into_iter().filter(|demand| demand.type_url == type_url::SECRET);
        let names = secrets.filter_map(|demand| demand.name);
        names.filter(|name| !self.taken_secrets.contains_key(name) && !crate::tls::is_file(name)).collect()
    }

    /// Counts the secrets of these contexts that did not come in time.
    fn count_late<'a>(&mut self, contexts: impl Iterator<Item = &'a TlsCommon>) {
        for secret in self.missing_secrets(contexts) {
            self.count_timeout(type_url::SECRET, &secret.name);
        }
    }

    fn is_warming(&self, entry: &Arc<ListenerEntry>) -> bool {
        self.warming_listeners.get(&entry.listener.name).is_some_and(|current| Arc::ptr_eq(current, entry))
    }

    /// Starts a listener that has waited for long enough, unless another has come in its place.
    fn start_late(&mut self, entry: &Arc<ListenerEntry>, why: &str) {
        let name = &entry.listener.name;
        if self.is_warming(entry) {
            tracing::warn!(listener = &**name, "{why}");
            self.start_listeners();
        }
    }

    /// Starts the listeners that wait for nothing any more.
    fn start_listeners(&mut self) {
        for (name, reason) in self.finish_listeners() {
            tracing::error!(listener = &*name, reason, "cannot start");
        }
        self.publish_listeners();
    }

    /// Moves clusters into use whose endpoints came.
    pub(crate) fn finish_warming(&mut self) {
        let warm: Vec<ArcStr> =
            self.warming.iter().filter(|(_, c)| c.is_warm()).map(|(name, _)| name.clone()).collect();
        if warm.is_empty() {
            return;
        }
        for name in warm {
            if let Some(entry) = self.warming.remove(&name) {
                self.clusters.insert(name, entry);
            }
        }
        self.publish_clusters();
        // Endpoints of what these replace are wanted no more.
        self.subscribe();
        if !self.waits_for_static_clusters() && !self.warming_listeners.is_empty() {
            self.start_listeners();
        }
    }

    /// Listeners begin to serve when the clusters of the bootstrap have found and checked their hosts, as in Envoy. Where
    /// nothing can change any more, because only a configuration is checked, nobody waits.
    pub(super) fn waits_for_static_clusters(&self) -> bool {
        !self.workers.is_empty() && self.warming.values().any(|cluster| !cluster.dynamic)
    }

    /// Moves listeners into use whose routes and secrets are there.
    pub(crate) fn finish_listeners(&mut self) -> Refused {
        if self.waits_for_static_clusters() {
            return Refused::new();
        }
        let ready: Vec<ArcStr> = self
            .warming_listeners
            .iter()
            .filter(|(_, l)| l.no_more_routes.load(Ordering::Relaxed) || has_routes(l))
            .filter(|(_, l)| {
                l.no_more_secrets.load(Ordering::Relaxed) || self.missing_secrets(tls_of(&l.listener)).is_empty()
            })
            .map(|(name, _)| name.clone())
            .collect();
        let mut refused = Vec::new();
        for name in ready {
            if let Err(reason) = self.start_listener(name.clone()) {
                refused.push((name, reason));
            }
        }
        refused
    }

    /// Moves on what waited for secrets that are there now.
    pub(crate) fn secrets_came(&mut self) {
        for entry in self.warming.values() {
            let missing = self.missing_secrets(entry.cluster.transport.tls_contexts().map(|tls| &tls.common));
            entry.has_secrets.fetch_or(missing.is_empty(), Ordering::AcqRel);
        }
        self.finish_warming();
        if !self.warming_listeners.is_empty() {
            self.start_listeners();
        }
    }

    /// The secrets that these contexts wait for. Where only a configuration is checked, nobody waits.
    pub(super) fn missing_secrets<'a>(&self, contexts: impl Iterator<Item = &'a TlsCommon>) -> BTreeSet<SdsRef> {
        let mut wanted = BTreeSet::new();
        if !self.workers.is_empty() {
            contexts.for_each(|common| sds_refs(common, &mut wanted));
        }
        wanted.retain(|secret| !self.shared.secrets.knows(secret) && !self.is_settled(type_url::SECRET, &secret.name));
        wanted
    }
}

/// Whether all routes of a listener have come.
pub(super) fn has_routes(listener: &ListenerEntry) -> bool {
    listener.chains.iter().all(|chain| chain.routes.as_ref().is_none_or(|routes| routes.table.load().is_some()))
}

/// The TLS of a listener's chains.
pub(super) fn tls_of(listener: &Listener) -> impl Iterator<Item = &TlsCommon> {
    listener.all_chains().filter_map(|chain| chain.tls.as_ref()).map(|tls| &tls.common)
}
