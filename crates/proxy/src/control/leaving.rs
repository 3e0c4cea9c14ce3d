//! Listeners and filter chains that were removed or changed: their connections go within the drain time.

use super::{Awaited, Control};
use crate::drain::Drain;
use crate::runtime::{ChainEntry, ListenerEntry};
use crate::stats::Kind;
use crate::worker::Command;
use mesh_types::ArcStr;
use proxy_core::Listener;
use proxy_core::listener::Terminal;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

/// What was replaced or removed, until its drain time is over.
pub(crate) struct Leaving {
    pub(crate) entry: Arc<ListenerEntry>,
    /// Those of its chains that are in use no more.
    chains: Vec<Arc<ChainEntry>>,
    /// Not only chains went (Envoy `DrainingFilterChainsManager` has those that did).
    pub(crate) whole: bool,
}

impl Control {
    /// Has the connections of chains that `next` does not have any more end, now and then one with its next answer, and those that
    /// are left when the drain time is over.
    ///
    /// DIFFERS: whatever else of a listener changes, the connections of chains that did not change stay. Envoy has all go
    /// unless only chains changed.
    pub(super) fn let_go(&mut self, entry: Arc<ListenerEntry>, next: Option<&Arc<ListenerEntry>>) {
        let chains = entry.missing_in(next.map(|next| &**next));
        let whole = next.is_none_or(|next| !next.in_place);
        let now = Instant::now();
        for chain in &chains {
            chain.drain.send_replace(Drain::Since(now));
        }
        // The receiver lives as long as the proxy.
        let _ = self.patience.send((self.shared.drain_time, Awaited::Drained(Arc::downgrade(&entry))));
        self.leaving.push(Leaving { entry, chains, whole });
    }

    /// The drain time of a listener is over.
    pub(super) fn cut(&mut self, entry: &Arc<ListenerEntry>) {
        self.leaving.retain(|leaving| {
            let over = Arc::ptr_eq(&leaving.entry, entry);
            if over {
                cut_chains(&leaving.chains);
            }
            !over
        });
        self.forget_stats(&entry.listener);
        // Nobody else may want its routes and secrets.
        self.subscribe();
    }

    /// Forgets what was counted for a listener and its filters, unless others have the same names.
    fn forget_stats(&self, gone: &Listener) {
        let entries = self.listeners.values().chain(self.warming_listeners.values());
        let left: HashSet<_> = entries
            .chain(self.leaving.iter().map(|leaving| &leaving.entry))
            .flat_map(|entry| scopes(&entry.listener).collect::<Vec<_>>())
            .collect();
        for (kind, name) in scopes(gone).filter(|scope| !left.contains(scope)) {
            self.shared.registry.remove(kind, &name);
            self.tell(|| Command::ForgetStats(kind, name.clone()));
        }
    }

    /// The proxy ends.
    pub(super) fn cut_all(&self) {
        let entries = self.listeners.values().chain(self.leaving.iter().map(|l| &l.entry));
        entries.for_each(|entry| cut_chains(&entry.chains));
    }

    /// What has yet to let all connections go.
    pub(crate) fn leaving(&self) -> &[Leaving] {
        &self.leaving
    }

    /// How many listeners drain, and how many chains of others.
    pub(crate) fn leaving_counts(&self) -> (u64, u64) {
        let whole = self.leaving.iter().filter(|leaving| leaving.whole).count();
        let chains =
            self.leaving.iter().filter(|leaving| !leaving.whole).map(|leaving| leaving.chains.len()).sum::<usize>();
        (whole as u64, chains as u64)
    }
}

/// Where a listener and its filters count.
fn scopes(listener: &Listener) -> impl Iterator<Item = (Kind, ArcStr)> {
    let of_chains = listener.all_chains().filter_map(|chain| match &chain.terminal {
        Terminal::Http(hcm) => Some((Kind::Http, hcm.stat_prefix.clone())),
        Terminal::TcpProxy(proxy) => Some((Kind::Tcp, proxy.stat_prefix.clone())),
        Terminal::DirectResponse(_) | Terminal::Echo | Terminal::Close => None,
    });
    std::iter::once((Kind::Listener, listener.stat_prefix.clone())).chain(of_chains)
}

fn cut_chains(chains: &[Arc<ChainEntry>]) {
    for chain in chains {
        chain.drain.send_replace(Drain::Over);
    }
}
