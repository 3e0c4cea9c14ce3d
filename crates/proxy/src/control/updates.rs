//! What came of each subscription, as Envoy counts it (`SubscriptionStats`).

use super::Control;
use crate::stats::{Entry, Kind, Sample};
use envoy_api::type_url;
use mesh_types::ArcStr;
use proxy_core::hcm::Routes;
use proxy_core::listener::Terminal;
use std::collections::BTreeMap;

/// The updates of one subscription.
#[derive(Default)]
pub(crate) struct Updates {
    success: u64,
    rejected: u64,
    /// The server could not be reached, or ended the stream.
    failure: u64,
    /// Nothing came within `initial_fetch_timeout`.
    timeouts: u64,
}

impl Updates {
    pub(super) fn count(&mut self, accepted: bool) {
        if accepted { self.success += 1 } else { self.rejected += 1 }
    }

    fn visit(&self, put: &mut dyn FnMut(&str, Sample)) {
        // Each answer is answered, which is the attempt to get the next one.
        let attempts = 1 + self.success + self.rejected + self.failure;
        let all = [
            ("update_attempt", attempts),
            ("update_success", self.success),
            ("update_rejected", self.rejected),
            ("update_failure", self.failure),
            ("init_fetch_timeout", self.timeouts),
        ];
        for (name, count) in all {
            put(name, Sample::Counter(count));
        }
    }
}

/// Subscriptions by type and by the name that is asked for, which is empty where all resources are.
pub(super) type Subscribed = BTreeMap<(&'static str, ArcStr), Updates>;

impl Control {
    /// The stream to the control plane has ended.
    pub(crate) fn disconnected(&mut self) {
        self.connected = false;
        self.updates.values_mut().for_each(|updates| updates.failure += 1);
    }

    /// It is open.
    pub(crate) fn connected(&mut self) {
        self.connected = true;
    }

    /// Nothing came in time.
    pub(super) fn count_timeout(&mut self, of: &'static str, name: &ArcStr) {
        self.updates.entry((of, name.clone())).or_default().timeouts += 1;
    }

    /// A response of this type was refused as a whole.
    pub(crate) fn count_refused(&mut self, of: &str) {
        self.updates.iter_mut().filter(|((kind, _), _)| *kind == of).for_each(|(_, updates)| updates.count(false));
    }

    /// The statistics of all subscriptions, where Envoy has them.
    pub(crate) fn subscription_stats(&self, f: &mut dyn FnMut(Entry)) {
        let mut gauge = |name: &str, n: u64| {
            let (kind, sample) = (Kind::Plain, Sample::Gauge(n));
            f(Entry { kind, scope: "".into(), name: name.to_owned(), sample });
        };
        gauge("control_plane.connected_state", self.connected.into());
        gauge("control_plane.pending_requests", 0);
        for ((of, name), updates) in &self.updates {
            let (kind, scope, prefix) = match *of {
                type_url::CLUSTER => (Kind::Plain, ArcStr::from(""), "cluster_manager.cds.".to_owned()),
                type_url::LISTENER => (Kind::Plain, "".into(), "listener_manager.lds.".to_owned()),
                type_url::SECRET => (Kind::Plain, "".into(), format!("sds.{name}.")),
                type_url::ROUTE => match self.prefix_of(name) {
                    Some(manager) => (Kind::Http, manager, format!("rds.{name}.")),
                    None => continue,
                },
                _ => {
                    let clusters = self.clusters.values().chain(self.warming.values());
                    let mut users = clusters.filter(|entry| entry.cluster.eds_name() == Some(name));
                    match users.next() {
                        Some(entry) => (Kind::Cluster, entry.cluster.stat_name.clone(), String::new()),
                        None => continue,
                    }
                }
            };
            updates.visit(&mut |what, sample| {
                f(Entry { kind, scope: scope.clone(), name: format!("{prefix}{what}"), sample });
            });
        }
    }

    /// The `stat_prefix` of a connection manager with these routes.
    fn prefix_of(&self, routes: &ArcStr) -> Option<ArcStr> {
        let all = self.listeners.values().chain(self.warming_listeners.values());
        all.flat_map(|entry| entry.listener.all_chains()).find_map(|chain| match &chain.terminal {
            Terminal::Http(hcm) => match &hcm.routes {
                Routes::Rds { name, .. } if name == routes => Some(hcm.stat_prefix.clone()),
                _ => None,
            },
            _ => None,
        })
    }
}
