//! Clusters and their endpoints: taken, warmed, published.

use super::{ADDED, Awaited, Control, Incoming, MODIFIED, REMOVED, Refused};
use crate::runtime::ClusterEntry;
use crate::stats::Kind;
use crate::worker::Command;
use bytes::Bytes;
use envoy_api::{Message, pb, type_url};
use mesh_types::ArcStr;
use proxy_core::cluster::{Discovery, NameCache};
use proxy_core::{Cluster, Endpoints};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

impl Control {
    pub(crate) fn warming_clusters(&self) -> impl Iterator<Item = &Arc<ClusterEntry>> {
        self.warming.values()
    }

    /// Adds, changes and removes clusters.
    pub(crate) fn update_clusters(&mut self, updated: Vec<Incoming>, removed: &[ArcStr], dynamic: bool) -> Refused {
        let mut refused = Vec::new();
        let mut seen = HashSet::new();
        for incoming in updated {
            let put = match seen.insert(incoming.name.clone()) {
                true => self.put_cluster(&incoming, dynamic),
                false => Err(format!("duplicate cluster {} found", incoming.name)),
            };
            if let Err(reason) = put {
                refused.push((incoming.name, reason));
            }
        }
        for name in removed {
            if self.clusters.get(name).is_some_and(|c| c.dynamic)
                && let Some(entry) = self.clusters.remove(name)
            {
                self.shared.registry.remove(Kind::Cluster, &entry.cluster.stat_name);
                self.changes.clusters[REMOVED] += 1;
            }
            self.warming.remove(name);
        }
        self.publish_clusters();
        self.subscribe();
        refused
    }

    pub(super) fn put_cluster(&mut self, incoming: &Incoming, dynamic: bool) -> Result<(), String> {
        let newest = self.warming.get(&incoming.name).or_else(|| self.clusters.get(&incoming.name));
        if newest.is_some_and(|newest| newest.body == incoming.body) {
            return Ok(());
        }
        let decode = |body: &Bytes| pb::envoy::config::cluster::v3::Cluster::decode(body.clone());
        let message = decode(&incoming.body).map_err(|e| format!("malformed: {e}"))?;
        let cluster = Cluster::compile(&message, &self.options).map_err(|e| e.to_string())?;
        let name = cluster.name.clone();
        if let Discovery::DynamicForwardProxy { cache, .. } = &cluster.discovery {
            self.claim_cache(cache)?;
        }
        if dynamic {
            self.check_tls(cluster.transport.tls_contexts().map(|tls| &tls.common))?;
        }
        if let Some(old) = self.clusters.get(&name) {
            let fingerprint = Cluster::fingerprint(&message);
            let same = decode(&old.body).is_ok_and(|old| Cluster::fingerprint(&old) == fingerprint);
            if same && !self.warming.contains_key(&name) {
                return Ok(());
            }
            if !old.dynamic && dynamic {
                return Err("a static cluster of that name exists".into());
            }
        }
        let known = self.clusters.contains_key(&name) || self.warming.contains_key(&name);
        self.changes.clusters[if known { MODIFIED } else { ADDED }] += 1;
        let (body, version) = (incoming.body.clone(), incoming.version.clone());
        let entry = ClusterEntry::new(Arc::new(cluster), body, version, dynamic, &self.options.runtime);
        if let Some(old) = self.clusters.get(&name) {
            // To its statistics it is still the same cluster.
            entry.membership_changes.fetch_add(old.membership_changes.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        crate::ejection::watch(&self.shared, &entry);
        let patience = self.patience.clone();
        crate::checks::watch(&self.shared, &entry, move || {
            // The receiver lives as long as the proxy.
            let _ = patience.send((Duration::ZERO, Awaited::Checks));
        });
        match &entry.cluster.discovery {
            Discovery::Eds { service_name, .. } => {
                if let Some(body) = self.assignments.get(service_name).cloned() {
                    // Good for another cluster, or for this one as it was: if it is not for this one, EDS says so.
                    let _ = self.assign(&entry, &body);
                } else if self.is_settled(type_url::ENDPOINT, service_name) {
                    // What there was is refused, and nothing else comes until it is sent anew.
                    entry.warm.store(true, Ordering::Release);
                }
            }
            Discovery::Static => {}
            _ => {
                // The receiver lives as long as the proxy.
                let _ = self.dns.send(entry.clone());
            }
        }
        let secrets = self.missing_secrets(entry.cluster.transport.tls_contexts().map(|tls| &tls.common));
        entry.has_secrets.store(secrets.is_empty(), Ordering::Release);
        for secret in &secrets {
            self.expect(&secret.source, Awaited::ClusterSecrets(Arc::downgrade(&entry)));
        }
        if entry.is_warm() {
            self.warming.remove(&name);
            self.clusters.insert(name, entry);
        } else {
            if let Discovery::Eds { source, .. } = &entry.cluster.discovery {
                self.expect(source, Awaited::Cluster(Arc::downgrade(&entry)));
            }
            self.warming.insert(name, entry);
        }
        Ok(())
    }

    /// What a cache of names is first said to be, it is for as long as the proxy lives (Envoy `DnsCacheManagerImpl::getCache`).
    pub(super) fn claim_cache(&mut self, cache: &Arc<NameCache>) -> Result<(), String> {
        match self.name_caches.entry(cache.name.clone()).or_insert_with(|| cache.clone()) {
            first if first == cache => Ok(()),
            _ => Err(format!("config specified DNS cache '{}' with different settings", cache.name)),
        }
    }

    /// Puts a cluster's endpoints into use.
    pub(crate) fn put_endpoints(&mut self, entry: &ClusterEntry, endpoints: Endpoints) {
        let name = &entry.cluster.name;
        let before = entry.membership_changes.load(Ordering::Relaxed);
        let drops_others = entry.endpoints.load().drops != endpoints.drops;
        let moved = entry.set_endpoints(Arc::new(endpoints));
        if moved && self.clusters.get(name).is_some_and(|current| std::ptr::eq(&**current, entry)) {
            self.changes.hosts += entry.membership_changes.load(Ordering::Relaxed) - before;
        }
        if moved && entry.cluster.close_on_change {
            self.tell(|| Command::DrainCluster(name.clone()));
        } else if moved || drops_others {
            self.tell(|| Command::Endpoints(name.clone()));
        }
    }

    pub(super) fn assign(&mut self, entry: &Arc<ClusterEntry>, body: &Bytes) -> Result<(), String> {
        let message = pb::envoy::config::endpoint::v3::ClusterLoadAssignment::decode(body.clone())
            .map_err(|e| format!("malformed: {e}"))?;
        // The hosts of a changed cluster are others: nothing is known of them yet.
        let previous = entry.has_endpoints().then(|| entry.endpoints.load_full());
        let endpoints = Endpoints::compile(&message, &entry.cluster, previous.as_deref()).map_err(|e| e.to_string())?;
        self.put_endpoints(entry, endpoints);
        Ok(())
    }

    /// Takes assignments for all clusters that use them.
    pub(super) fn update_endpoints(&mut self, updated: Vec<Incoming>, _removed: &[ArcStr]) -> Refused {
        let mut refused = Vec::new();
        for incoming in updated {
            let users: Vec<_> = self
                .clusters
                .values()
                .chain(self.warming.values())
                .filter(|c| c.cluster.eds_name() == Some(&incoming.name))
                .cloned()
                .collect();
            let results: Vec<_> = users.iter().map(|entry| self.assign(entry, &incoming.body)).collect();
            match results.into_iter().find_map(Result::err) {
                Some(reason) => refused.push((incoming.name, reason)),
                // The last good one is what a cluster that changes goes on with.
                None => _ = self.assignments.insert(incoming.name, incoming.body),
            }
        }
        self.finish_warming();
        refused
    }

    pub(super) fn publish_clusters(&mut self) {
        let table: crate::runtime::Clusters = self.clusters.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let table = Arc::new(table);
        self.shared.clusters.store(table.clone());
        self.tell(|| Command::Clusters(table.clone()));
        self.follow_listeners();
    }
}
