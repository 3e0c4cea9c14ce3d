//! Listeners: taken, bound, replaced, stopped.

use super::{ADDED, Awaited, Control, Failed, Incoming, MODIFIED, REMOVED, Refused, Stops, rds_sources, tls_of};
use crate::runtime::{ListenerEntry, Listeners};
use crate::socket::{self, BindOptions, Bound};
use crate::worker::Command;
use bytes::Bytes;
use envoy_api::{Message, pb, type_url};
use mesh_types::ArcStr;
use proxy_core::access_log::LogSink;
use proxy_core::cluster::NameCache;
use proxy_core::filters::HttpFilter;
use proxy_core::hcm::{HttpConnectionManager, Routes};
use proxy_core::listener::{Direction, NetworkFilter, Terminal};
use proxy_core::{Address, Listener, ListenerSet};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

impl Control {
    pub(crate) fn warming_listeners(&self) -> impl Iterator<Item = &Arc<ListenerEntry>> {
        self.warming_listeners.values()
    }

    /// Adds, changes and removes listeners.
    pub(crate) fn update_listeners(&mut self, updated: Vec<Incoming>, removed: &[ArcStr], dynamic: bool) -> Refused {
        let mut refused = Vec::new();
        // First, because a new one may have the address of one that goes.
        for name in removed {
            self.warming_listeners.remove(name);
            if self.listeners.get(name).is_some_and(|l| l.dynamic) {
                self.drop_listener(name);
            }
        }
        self.failed.clear();
        self.last_failed.clear();
        let mut seen = HashSet::new();
        for incoming in updated {
            let again = !seen.insert(incoming.name.clone());
            // In a bootstrap, a later listener of the same name is an update.
            let put = match again && dynamic {
                true => Err(format!("duplicate listener {} found", incoming.name)),
                false => self.put_listener(&incoming, dynamic),
            };
            if let Err(reason) = put {
                self.fail(&incoming.name, &incoming.body, &reason, !again);
                refused.push((incoming.name, reason));
            }
        }
        // Subscriptions first: a listener may wait for routes that nobody asked for yet.
        self.subscribe();
        refused.extend(self.finish_listeners());
        self.publish_listeners();
        refused
    }

    /// Takes note of a listener that was refused; `known`: under its name.
    pub(super) fn fail(&mut self, name: &ArcStr, body: &Bytes, details: &str, known: bool) {
        let failed = Arc::new(Failed { body: body.clone(), details: details.to_owned(), at: SystemTime::now() });
        if known {
            self.failed.insert(name.clone(), failed.clone());
        }
        self.last_failed.push(failed);
    }

    /// Listeners whose last state was refused, and what was refused of the last update.
    pub(crate) fn failed_listeners(&self) -> (impl Iterator<Item = (&ArcStr, &Failed)>, impl Iterator<Item = &Failed>) {
        (self.failed.iter().map(|(name, failed)| (name, &**failed)), self.last_failed.iter().map(|failed| &**failed))
    }

    pub(super) fn put_listener(&mut self, incoming: &Incoming, dynamic: bool) -> Result<(), String> {
        let old = self.listeners.get(&incoming.name).cloned();
        let newest = self.warming_listeners.get(&incoming.name).or(old.as_ref());
        if newest.is_some_and(|newest| newest.body == incoming.body) {
            return Ok(());
        }
        if dynamic && old.as_ref().is_some_and(|old| !old.dynamic) {
            return Err("a static listener of that name exists".into());
        }
        let decode = |body: &Bytes| pb::envoy::config::listener::v3::Listener::decode(body.clone());
        let message = decode(&incoming.body).map_err(|e| format!("malformed: {e}"))?;
        let mut listener = Listener::compile(&message, &self.options).map_err(|e| e.to_string())?;
        let name = listener.name.clone();
        if self.is_stopped(&listener) {
            tracing::debug!(listener = &*name, "not taken, as listeners of its direction were stopped");
            return Ok(());
        }
        if let Some(old) = &old {
            if old.listener.reuse_port != listener.reuse_port {
                return Err("reuse port cannot be changed during an update".into());
            }
            listener.replaces(&old.listener);
        }
        if let Some(address) = self.address_in_use(&listener) {
            return Err(format!(
                "error adding listener: '{name}' has duplicate address '{address}' as existing listener"
            ));
        }
        if dynamic {
            if let Some(cluster) = self.unknown_cluster(&listener) {
                return Err(format!("route: unknown cluster '{cluster}'"));
            }
            self.check_tls(tls_of(&listener))?;
        }
        if let Some(cluster) = tracers(&listener).find(|cluster| !self.has_cluster(cluster)) {
            return Err(format!("envoy.tracers.zipkin: unknown cluster '{cluster}'"));
        }
        name_caches(&listener).try_for_each(|cache| self.claim_cache(cache))?;
        for path in log_files(&listener) {
            self.shared.logs.open(path).map_err(|e| format!("unable to open file '{path}': {e}"))?;
        }
        let known = old.is_some() || self.warming_listeners.contains_key(&name);
        self.changes.listeners[if known { MODIFIED } else { ADDED }] += 1;
        let in_place = old.as_ref().is_some_and(|old| decode(&old.body).is_ok_and(|old| same_but_chains(old, message)));
        self.changes.in_place += u64::from(in_place);
        let mut entry = ListenerEntry::new(
            Arc::new(listener),
            incoming.body.clone(),
            // As in Envoy, where only chains change the listener keeps the version that it came with.
            old.as_ref().filter(|_| in_place).map_or_else(|| incoming.version.clone(), |old| old.version.clone()),
            dynamic,
            old.as_deref(),
            &self.shared.routes,
        );
        entry.in_place = in_place;
        let settled = entry.listener.rds_names().all(|name| self.is_settled(type_url::ROUTE, name));
        entry.no_more_routes = settled.into();
        let entry = Arc::new(entry);
        for source in rds_sources(&entry.listener).map(|(_, source)| source) {
            self.expect(source, Awaited::Routes(Arc::downgrade(&entry)));
        }
        for secret in self.missing_secrets(tls_of(&entry.listener)) {
            self.expect(&secret.source, Awaited::Secrets(Arc::downgrade(&entry)));
        }
        self.warming_listeners.insert(name, entry);
        Ok(())
    }

    /// Moves a listener into use.
    pub(super) fn start_listener(&mut self, name: ArcStr) -> Result<(), String> {
        let Some(entry) = self.warming_listeners.remove(&name) else { return Ok(()) };
        if let Err(reason) = self.bind(&entry) {
            self.changes.refused_listeners += 1;
            // It was counted when it came, and is not what it was counted for.
            let known = self.listeners.contains_key(&name);
            let counted = &mut self.changes.listeners[if known { MODIFIED } else { ADDED }];
            *counted = counted.saturating_sub(1);
            self.fail(&name, &entry.body, &reason, true);
            return Err(reason);
        }
        self.changes.served += self.workers.len() as u64;
        if let Some(old) = self.listeners.insert(name, entry.clone()) {
            self.let_go(old, Some(&entry));
        }
        Ok(())
    }

    pub(super) fn drop_listener(&mut self, name: &ArcStr) {
        if let Some(entry) = self.forget_listener(name) {
            self.let_go(entry, None);
        }
    }

    /// An address that another listener has already. Those that bind any port can have no conflict.
    pub(super) fn address_in_use(&self, listener: &Listener) -> Option<Address> {
        let addresses =
            |l: &Listener| std::iter::once(&l.address).chain(&l.additional_addresses).cloned().collect::<Vec<_>>();
        let own = addresses(listener);
        let all = self.listeners.values().chain(self.warming_listeners.values()).map(|entry| &entry.listener);
        let others = all.filter(|other| other.name != listener.name && other.bind_to_port == listener.bind_to_port);
        others.flat_map(|other| addresses(other)).find(|address| {
            let any_port = address.socket().is_some_and(|socket| socket.port() == 0);
            !(any_port && listener.bind_to_port) && own.contains(address)
        })
    }

    /// Accepts no more connections of a listener.
    pub(super) fn forget_listener(&mut self, name: &ArcStr) -> Option<Arc<ListenerEntry>> {
        let entry = self.listeners.remove(name)?;
        self.changes.listeners[REMOVED] += 1;
        if self.bound.remove(name).is_some() {
            self.tell(|| Command::StopListening(name.clone()));
        }
        Some(entry)
    }

    /// Binds a listener's addresses on all workers, unless that was done.
    pub(super) fn bind(&mut self, entry: &ListenerEntry) -> Result<(), String> {
        let listener = &entry.listener;
        if !listener.bind_to_port || self.workers.is_empty() {
            return Ok(());
        }
        let addresses: Vec<Address> =
            std::iter::once(&listener.address).chain(&listener.additional_addresses).cloned().collect();
        if self.bound.get(&listener.name) == Some(&addresses) {
            if let Some(real) = self.listeners.get(&listener.name).and_then(|old| old.addresses.get()) {
                // A state of a listener starts once.
                let _ = entry.addresses.set(real.clone());
            }
            return Ok(());
        }
        let mut real = Vec::with_capacity(addresses.len());
        let mut sockets: Vec<Vec<Bound>> = self.workers.iter().map(|_| Vec::new()).collect();
        for address in &addresses {
            let own_sockets = listener.reuse_port && matches!(address, Address::Ip(_));
            let options = BindOptions {
                transparent: listener.transparent,
                freebind: listener.freebind,
                reuse_port: own_sockets,
                backlog: listener.tcp_backlog.map_or(4096, |b| i32::try_from(b).unwrap_or(i32::MAX)),
                others: &listener.socket_options,
            };
            let fail = |e: std::io::Error| format!("cannot bind '{address}': {e}");
            let first = socket::listen(address, options).map_err(fail)?;
            // Port 0 is the same one for all workers.
            let address = first.address().unwrap_or_else(|| address.clone());
            for list in sockets.iter_mut().skip(1) {
                let bound = match (&first, own_sockets) {
                    (_, true) => socket::listen(&address, options).map_err(fail)?,
                    (Bound::Tcp(s), false) => Bound::Tcp(s.try_clone().map_err(fail)?),
                    (Bound::Unix(s), false) => Bound::Unix(s.try_clone().map_err(fail)?),
                };
                list.push(bound);
            }
            sockets[0].push(first);
            real.push(address);
        }
        // As above.
        let _ = entry.addresses.set(real);
        if self.bound.insert(listener.name.clone(), addresses).is_some() {
            self.tell(|| Command::StopListening(listener.name.clone()));
        }
        for (worker, list) in self.workers.iter().zip(sockets) {
            for bound in list {
                let _ = worker.send(Command::Listen(listener.name.clone(), bound));
            }
        }
        Ok(())
    }

    pub(super) fn publish_listeners(&mut self) {
        let by_name: HashMap<_, _> = self.listeners.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let set = ListenerSet::new(self.listeners.values().map(|l| l.listener.clone()));
        self.shared.listeners.store(Arc::new(Listeners { set, by_name }));
        for chain in self.listeners.values().flat_map(|entry| entry.listener.all_chains()) {
            if let Terminal::Http(http) = &chain.terminal
                && crate::hcm::fetches_ahead(http)
            {
                self.tell(|| Command::FetchKeys(http.clone()));
            }
        }
        let rds: BTreeSet<ArcStr> = self.rds_names();
        self.shared.routes.retain(|name| rds.contains(name));
    }

    /// Tells inbound and outbound connections to end as soon as that loses nothing, all at once or one after the other.
    pub(crate) fn drain(&mut self, inbound_only: bool) {
        self.shared.draining.begin(inbound_only);
    }

    /// Stops accepting, for good (Envoy `ListenerManagerImpl::stopListeners`).
    pub(crate) fn stop_listeners(&mut self, inbound_only: bool) {
        if self.stops != Some(Stops::All) {
            self.stops = Some(if inbound_only { Stops::Inbound } else { Stops::All });
        }
        let all = self.listeners.values().map(|entry| &entry.listener);
        let stopped: Vec<ArcStr> = all.filter(|listener| self.is_stopped(listener)).map(|l| l.name.clone()).collect();
        for name in stopped {
            if self.bound.remove(&name).is_some() {
                self.tell(|| Command::StopListening(name.clone()));
            }
            self.stopped.insert(name);
        }
    }

    pub(super) fn is_stopped(&self, listener: &Listener) -> bool {
        match self.stops {
            None => false,
            Some(Stops::Inbound) => listener.direction == Direction::Inbound,
            Some(Stops::All) => true,
        }
    }

    /// Likewise of one listener's inline routes.
    pub(super) fn unknown_cluster(&self, listener: &Listener) -> Option<ArcStr> {
        listener.all_chains().find_map(|chain| match &chain.terminal {
            Terminal::Http(hcm) => match &hcm.routes {
                Routes::Inline(table) => self.unknown_in(table, true),
                Routes::Rds { .. } => None,
            },
            Terminal::TcpProxy(_) | Terminal::DirectResponse(_) | Terminal::Echo | Terminal::Close => None,
        })
    }

    /// Cuts all connections off and ends the workers.
    pub(crate) fn shutdown(&self) {
        self.cut_all();
        self.tell(|| Command::Shutdown);
    }
}

/// Whether two states of a listener differ in their filter chains only.
fn same_but_chains(
    mut one: pb::envoy::config::listener::v3::Listener,
    mut other: pb::envoy::config::listener::v3::Listener,
) -> bool {
    for listener in [&mut one, &mut other] {
        listener.filter_chains.clear();
        listener.default_filter_chain = None;
    }
    one == other
}

/// The connection managers of a listener.
fn managers(listener: &Listener) -> impl Iterator<Item = &HttpConnectionManager> {
    listener.all_chains().filter_map(|chain| match &chain.terminal {
        Terminal::Http(hcm) => Some(&**hcm),
        _ => None,
    })
}

/// The clusters that tracers of a listener need.
fn tracers(listener: &Listener) -> impl Iterator<Item = &ArcStr> {
    managers(listener).filter_map(|hcm| hcm.tracing.as_ref()?.provider.as_ref()?.needed_cluster())
}

/// The caches of names that filters of a listener use.
fn name_caches(listener: &Listener) -> impl Iterator<Item = &Arc<NameCache>> {
    let of_sni = listener.all_chains().flat_map(|chain| &chain.filters).filter_map(|filter| match filter {
        NetworkFilter::SniDynamicForwardProxy(forward) => Some(&forward.cache),
        _ => None,
    });
    let entries = managers(listener).flat_map(|hcm| {
        let of_upgrades = hcm.upgrades.iter().flat_map(|upgrade| upgrade.filters.iter().flatten());
        hcm.filters.iter().chain(of_upgrades)
    });
    let of_http = entries.filter_map(|entry| match &entry.filter {
        HttpFilter::DynamicForwardProxy(forward) => Some(&forward.cache),
        _ => None,
    });
    of_sni.chain(of_http)
}

/// The files that a listener writes its records to.
fn log_files(listener: &Listener) -> impl Iterator<Item = &ArcStr> {
    let chains = listener.all_chains().flat_map(|chain| match &chain.terminal {
        Terminal::Http(hcm) => &hcm.access_log[..],
        Terminal::TcpProxy(proxy) => &proxy.access_log[..],
        _ => &[],
    });
    listener.access_log.iter().chain(chains).filter_map(|log| match &log.sink {
        LogSink::File(path) => Some(path),
        _ => None,
    })
}
