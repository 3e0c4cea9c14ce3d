//! The overload manager at work: looks at the resources now and then, and tells the workers what is done about them.

use crate::runtime::Shared;
use crate::stats::{Computed, Kind, ListenerStats, Sample};
use proxy_core::listener::OpenConnection;
use proxy_core::overload::{ActionKind, Monitor, OverloadConfig};
use proxy_core::{Listener, Random};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// Strengths are kept in thousandths.
const FULL: u32 = 1000;

/// What is known of the resources, and what is done. Read by all workers.
pub(crate) struct Overload {
    config: OverloadConfig,
    strengths: [AtomicU32; ActionKind::ALL.len()],
    /// By monitor: the pressure, if it could be measured, and how often that failed.
    pressures: Mutex<Vec<(Option<f64>, u64)>>,
    refused: AtomicU64,
    shrunk: AtomicU64,
    /// Workers do not accept.
    stopped: watch::Sender<bool>,
}

impl Overload {
    pub(crate) fn new(config: OverloadConfig) -> Self {
        for name in &config.skipped {
            tracing::warn!(%name, "has no effect in the overload manager");
        }
        Self {
            pressures: Mutex::new(vec![(None, 0); config.monitors.len()]),
            config,
            strengths: Default::default(),
            refused: AtomicU64::new(0),
            shrunk: AtomicU64::new(0),
            stopped: watch::Sender::new(false),
        }
    }

    fn strength(&self, kind: ActionKind) -> u32 {
        self.strengths[kind as usize].load(Relaxed)
    }

    /// Whether an action is done this time: an action that is half as strong as it can be, every other time.
    pub(crate) fn happens(&self, kind: ActionKind, random: &mut Random) -> bool {
        match self.strength(kind) {
            0 => false,
            FULL => true,
            some => random.below(FULL.into()) < some.into(),
        }
    }

    /// Looks at all resources.
    fn look(&self) {
        let mut pressures = self.pressures.lock().unwrap_or_else(PoisonError::into_inner);
        for ((_, monitor), known) in self.config.monitors.iter().zip(pressures.iter_mut()) {
            match pressure(monitor) {
                Some(pressure) => known.0 = Some(pressure),
                // What was known last stays.
                None => known.1 += 1,
            }
        }
        let of = |name: &str| {
            let at = self.config.monitors.iter().position(|(monitor, _)| **monitor == *name)?;
            pressures.get(at)?.0
        };
        for kind in ActionKind::ALL {
            let all = self.config.actions.iter().filter(|action| action.kind == kind);
            let strength = all.map(|action| action.strength(of)).fold(0.0, f64::max);
            self.strengths[kind as usize].store((strength * f64::from(FULL)) as u32, Relaxed);
        }
        drop(pressures);
        let stop = self.strength(ActionKind::StopConnections) == FULL;
        self.stopped.send_if_modified(|stopped| std::mem::replace(stopped, stop) != stop);
        if self.strength(ActionKind::ShrinkHeap) == FULL {
            lifecycle::memory::release_unused();
            self.shrunk.fetch_add(1, Relaxed);
        }
    }

    fn rejects(&self, listener: &Listener, random: &mut Random) -> bool {
        !listener.bypass_overload && self.happens(ActionKind::RejectConnections, random)
    }
}

/// Limits connections as the runtime says, unless a monitor of the overload manager does.
pub(crate) fn limit_connections(shared: &Shared, settings: &proxy_core::Bootstrap) {
    let monitored = settings.overload.as_ref().is_some_and(|overload| overload.max_connections.is_some());
    if !monitored {
        let limit = settings.runtime.live("overload.global_downstream_max_connections", u64::MAX);
        // It is set once, when the proxy starts.
        let _ = shared.connection_limit.set(limit);
    }
}

/// Takes a new connection, if resources and limits allow it; `None`: it is to be closed.
pub(crate) fn admit(
    shared: &Arc<Shared>,
    listener: &Arc<Listener>,
    stats: &ListenerStats,
    random: &mut Random,
) -> Option<Admitted> {
    let overload = shared.overload.get();
    if overload.is_some_and(|overload| overload.rejects(listener, random)) {
        stats.downstream_cx_overload_reject.inc();
        return None;
    }
    let mut admitted = Admitted { all: None, own: None };
    let monitored = overload.and_then(|overload| overload.config.max_connections.as_ref());
    let most = monitored.map(|(_, most)| *most).or_else(|| Some(shared.connection_limit.get()?.get()));
    if let Some(most) = most.filter(|_| !listener.ignore_connection_limit) {
        let more = |open| (open < most).then_some(open + 1);
        if shared.connections.fetch_update(Relaxed, Relaxed, more).is_err() {
            stats.downstream_global_cx_overflow.inc();
            if let Some(overload) = overload {
                overload.refused.fetch_add(1, Relaxed);
            }
            return None;
        }
        admitted.all = Some(shared.clone());
    }
    admitted.own = listener.open();
    if admitted.own.is_none() {
        stats.downstream_cx_overflow.inc();
        return None;
    }
    Some(admitted)
}

/// A connection that was let in; counts until it is dropped.
pub(crate) struct Admitted {
    all: Option<Arc<Shared>>,
    /// Of its listener.
    own: Option<OpenConnection>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if let Some(shared) = &self.all {
            shared.connections.fetch_sub(1, Relaxed);
        }
    }
}

/// How much of a resource is in use, 0 to 1; `None`: nobody knows.
fn pressure(monitor: &Monitor) -> Option<f64> {
    match monitor {
        Monitor::Heap(most) => {
            let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
            let mut pages = statm.split(' ').skip(1).map_while(|n| n.parse::<u64>().ok());
            let own = pages.next()?.saturating_sub(pages.next()?);
            Some(own as f64 * PAGE / *most as f64)
        }
        Monitor::File(path) => {
            std::fs::read_to_string(&**path).ok()?.trim().parse().ok().filter(|n| (0.0..=1.0).contains(n))
        }
    }
}

/// The unit of `/proc/self/statm` on the processors that there are builds for.
const PAGE: f64 = 4096.0;

/// Resolves as soon as connections may be accepted.
pub(crate) async fn may_accept(shared: &Shared, bypass: bool) {
    let Some(overload) = shared.overload.get().filter(|_| !bypass) else { return };
    // The sender lives as long as the proxy.
    let _ = overload.stopped.subscribe().wait_for(|stopped| !*stopped).await;
}

/// Resolves when no connection may be accepted any more.
pub(crate) async fn must_stop(shared: &Shared, bypass: bool) {
    if let Some(overload) = shared.overload.get().filter(|_| !bypass)
        && overload.stopped.subscribe().wait_for(|stopped| *stopped).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// Begins to watch; the first look is over when this returns.
pub(crate) fn install(shared: &Arc<Shared>, config: OverloadConfig) {
    let overload = Arc::new(Overload::new(config));
    overload.look();
    register(shared, &overload);
    // It is installed once, when the proxy starts.
    let _ = shared.overload.set(overload);
}

/// Looks at the resources until the proxy ends.
pub(crate) async fn watch(overload: Arc<Overload>) {
    let mut ticks = tokio::time::interval(overload.config.refresh);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        overload.look();
    }
}

fn register(shared: &Arc<Shared>, overload: &Arc<Overload>) {
    let weak = Arc::downgrade(overload);
    let computed = Computed(move |f: &mut dyn FnMut(&str, Sample)| {
        let Some(overload) = weak.upgrade() else { return };
        for action in &overload.config.actions {
            let (name, strength) = (action.kind.name(), overload.strength(action.kind));
            f(&format!("overload.{name}.active"), Sample::Gauge(u64::from(strength == FULL)));
            f(&format!("overload.{name}.scale_percent"), Sample::Gauge(u64::from(strength / 10)));
            if action.kind == ActionKind::ShrinkHeap {
                f(&format!("overload.{name}.shrink_count"), Sample::Counter(overload.shrunk.load(Relaxed)));
            }
        }
        let pressures = overload.pressures.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for ((name, _), (pressure, failed)) in overload.config.monitors.iter().zip(pressures) {
            f(&format!("overload.{name}.pressure"), Sample::Gauge((pressure.unwrap_or_default() * 100.0) as u64));
            f(&format!("overload.{name}.failed_updates"), Sample::Counter(failed));
            f(&format!("overload.{name}.skipped_updates"), Sample::Counter(0));
        }
        if let Some((name, _)) = &overload.config.max_connections {
            // Envoy looks at this one when a connection comes, and never at its pressure.
            f(&format!("overload.{name}.pressure"), Sample::Gauge(0));
            f(&format!("overload.{name}.failed_updates"), Sample::Counter(overload.refused.load(Relaxed)));
        }
    });
    shared.registry.add(Kind::Plain, "".into(), Arc::new(computed));
}
