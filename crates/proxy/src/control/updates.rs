//! What came of each subscription, as Envoy counts it (`SubscriptionStats`).

use super::{Control, Demand, sds_refs, tls_of};
use crate::stats::{Entry, Histogram, HistogramSample, Kind, Sample};
use envoy_api::type_url;
use mesh_types::ArcStr;
use proxy_core::config_source::Origin;
use proxy_core::hcm::Routes;
use proxy_core::listener::Terminal;
use proxy_core::tls::TlsCommon;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

/// The updates of one subscription.
#[derive(Default)]
pub(crate) struct Updates {
    success: u64,
    rejected: u64,
    /// What was asked for was not in it.
    empty: u64,
    /// The server could not be reached, or ended the stream.
    failure: u64,
    /// Nothing came within `initial_fetch_timeout`.
    timeouts: u64,
    /// Of what is in use.
    version: Option<ArcStr>,
    /// When something was last taken, in milliseconds since 1970.
    at: u64,
    /// How often something else came into use, and when last.
    reloads: u64,
    reloaded_at: u64,
    /// How long it took each time, in milliseconds.
    took: Histogram,
}

/// What was taken of an answer: its version, and how long that took.
#[derive(Clone)]
pub(super) struct Taken {
    pub(super) version: ArcStr,
    pub(super) took: Duration,
}

impl Updates {
    /// Counts an answer: what was taken of it, if it was not refused.
    pub(super) fn count(&mut self, taken: Option<Taken>) {
        let Some(Taken { version, took }) = taken else {
            self.rejected += 1;
            return;
        };
        self.success += 1;
        self.version = Some(version);
        self.at = now();
        self.took.record(took.as_millis() as u64);
    }

    /// Something else came into use.
    pub(super) fn reload(&mut self) {
        (self.reloads, self.reloaded_at) = (self.reloads + 1, now());
    }

    /// Whether anything came of it yet, be it nothing in time.
    fn is_settled(&self) -> bool {
        self.success + self.rejected + self.timeouts > 0
    }

    /// `watched`: of a file, which is read when it changes.
    fn visit(&self, watched: bool, put: &mut dyn FnMut(&str, Sample)) {
        // Each answer of a server is answered, which is the attempt to get the next one.
        let attempts = u64::from(!watched) + self.success + self.rejected + self.failure;
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
        let hash = self.version.as_ref().map_or(0, |version| proxy_core::hash::xx64(version.as_bytes(), 0));
        put("version", Sample::Gauge(hash));
        put("version_text", Sample::Text(self.version.clone().unwrap_or_else(|| "".into())));
        put("update_time", Sample::Gauge(self.at));
        let took = if watched { HistogramSample::default() } else { self.took.read() };
        put("update_duration", Sample::Histogram(took));
    }
}

/// In milliseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64
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

    /// There is nothing of that name.
    pub(crate) fn count_empty(&mut self, of: &'static str, name: &ArcStr) {
        let updates = self.updates.entry((of, name.clone())).or_default();
        updates.success += 1;
        updates.empty += 1;
    }

    /// What came is none of what was asked for, where there must be some.
    pub(crate) fn count_refused_one(&mut self, of: &'static str, name: &ArcStr) {
        self.updates.entry((of, name.clone())).or_default().count(None);
        self.wait_no_more(of, Some(name));
    }

    /// Nothing could be read.
    pub(crate) fn count_failure(&mut self, of: &'static str, name: Option<&ArcStr>) {
        let name = name.cloned().unwrap_or_else(|| "".into());
        self.updates.entry((of, name)).or_default().failure += 1;
    }

    /// Whether nobody waits for a resource any more, whose subscription others began (Envoy's shared providers).
    pub(super) fn is_settled(&self, of: &'static str, name: &ArcStr) -> bool {
        self.updates.get(&(of, name.clone())).is_some_and(Updates::is_settled)
    }

    /// Nothing came in time.
    pub(super) fn count_timeout(&mut self, of: &'static str, name: &ArcStr) {
        self.updates.entry((of, name.clone())).or_default().timeouts += 1;
    }

    /// A response of this type was refused as a whole.
    pub(crate) fn count_refused(&mut self, of: &str) {
        self.updates.iter_mut().filter(|((kind, _), _)| *kind == of).for_each(|(_, updates)| updates.count(None));
        self.wait_no_more(of, None);
    }

    /// The statistics of all subscriptions, where Envoy has them.
    pub(crate) fn subscription_stats(&self, f: &mut dyn FnMut(Entry)) {
        let none = Updates::default();
        let mut put =
            |(kind, scope, prefix): (Kind, ArcStr, String), of: &'static str, name: &ArcStr, origin: &Origin| {
                let updates = self.updates.get(&(of, name.clone())).unwrap_or(&none);
                let mut own = |what: &str, sample: Sample| {
                    f(Entry { kind, scope: scope.clone(), name: format!("{prefix}{what}"), sample });
                };
                updates.visit(matches!(origin, Origin::Path(_)), &mut own);
                match of {
                    type_url::CLUSTER | type_url::ROUTE => {
                        own("config_reload", Sample::Counter(updates.reloads));
                        own("config_reload_time_ms", Sample::Gauge(updates.reloaded_at));
                        if *of == *type_url::ROUTE {
                            own("update_empty", Sample::Counter(updates.empty));
                        }
                    }
                    type_url::SECRET => {
                        own("key_rotation_failed", Sample::Counter(self.shared.secrets.renewals(name).failed));
                    }
                    type_url::ENDPOINT => own("update_empty", Sample::Counter(updates.empty)),
                    _ => {}
                }
            };
        let plain = |prefix: String| (Kind::Plain, ArcStr::from(""), prefix);
        let mut servers = false;
        for (of, origin) in &self.all_of {
            let prefix = if *of == type_url::CLUSTER { "cluster_manager.cds." } else { "listener_manager.lds." };
            put(plain(prefix.to_owned()), of, &"".into(), origin);
            servers |= !matches!(origin, Origin::Path(_));
        }
        for Demand { origin, type_url: of, name } in self.wanted() {
            let Some(name) = name.filter(|_| origin != Origin::Static) else { continue };
            servers |= !matches!(origin, Origin::Path(_));
            match of {
                type_url::SECRET => put(plain(format!("sds.{name}.")), of, &name, &origin),
                type_url::ROUTE => {
                    if let Some(manager) = self.prefix_of(&name) {
                        put((Kind::Http, manager, format!("rds.{name}.")), of, &name, &origin);
                    }
                }
                _ => {
                    let clusters = self.clusters.values().chain(self.warming.values());
                    for entry in clusters.filter(|entry| entry.cluster.eds_name() == Some(&name)) {
                        put((Kind::Cluster, entry.cluster.stat_name.clone(), String::new()), of, &name, &origin);
                    }
                }
            }
        }
        // Contexts are made again whenever one of their secrets comes.
        let renewed = |common: &TlsCommon| {
            let mut secrets = BTreeSet::new();
            sds_refs(common, &mut secrets);
            secrets.retain(|secret| secret.source.origin != Origin::Static);
            secrets.into_iter().map(|secret| self.shared.secrets.renewals(&secret.name).taken).sum::<u64>()
        };
        let mut context = |kind: Kind, scope: &ArcStr, side: &str, n: u64| {
            let name = format!("{side}_ssl_socket_factory.ssl_context_update_by_sds");
            f(Entry { kind, scope: scope.clone(), name, sample: Sample::Counter(n) });
        };
        for entry in self.clusters.values().chain(self.warming.values()) {
            let n = entry.cluster.transport.tls_contexts().map(|tls| renewed(&tls.common)).sum::<u64>();
            if n > 0 {
                context(Kind::Cluster, &entry.cluster.stat_name, "client", n);
            }
        }
        for entry in self.listeners.values().chain(self.warming_listeners.values()) {
            let n = tls_of(&entry.listener).map(renewed).sum::<u64>();
            if n > 0 {
                context(Kind::Listener, &entry.listener.stat_prefix, "server", n);
            }
        }
        if servers {
            let mut gauge = |name: &str, n: u64| {
                let (kind, sample) = (Kind::Plain, Sample::Gauge(n));
                f(Entry { kind, scope: "".into(), name: name.to_owned(), sample });
            };
            gauge("control_plane.connected_state", self.connected.into());
            gauge("control_plane.pending_requests", 0);
        }
    }

    /// The `stat_prefix` of a connection manager with these routes.
    fn prefix_of(&self, routes: &ArcStr) -> Option<ArcStr> {
        self.all_listeners().flat_map(|entry| entry.listener.all_chains()).find_map(|chain| match &chain.terminal {
            Terminal::Http(hcm) => match &hcm.routes {
                Routes::Rds { name, .. } if name == routes => Some(hcm.stat_prefix.clone()),
                _ => None,
            },
            _ => None,
        })
    }
}
