//! The timer side of outlier detection: lets hosts return and looks at success rates.

use crate::runtime::{ClusterEntry, Shared};
use crate::stats::{ClusterStats, Kind};
use proxy_core::Random;
use proxy_core::outlier::{Cause, Event};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Instant;

/// Starts the timer of one cluster; it ends with the cluster.
pub(crate) fn watch(shared: &Arc<Shared>, entry: &Arc<ClusterEntry>) {
    if entry.outlier.is_none() || tokio::runtime::Handle::try_current().is_err() {
        return;
    }
    let stats = Arc::new(ClusterStats::default());
    crate::upstream::touch_outlier(&stats);
    shared.registry.add(Kind::Cluster, entry.cluster.stat_name.clone(), stats.clone());
    // Ends when the cluster is dropped.
    tokio::spawn(ticks(shared.clone(), Arc::downgrade(entry), stats));
}

async fn ticks(shared: Arc<Shared>, entry: Weak<ClusterEntry>, stats: Arc<ClusterStats>) {
    let mut random = Random::new(std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0u8));
    loop {
        let next = {
            let Some(entry) = entry.upgrade() else { return };
            let Some(detector) = &entry.outlier else { return };
            detector.lock().unwrap_or_else(PoisonError::into_inner).next_tick()
        };
        tokio::time::sleep_until(next.into()).await;
        let Some(entry) = entry.upgrade() else { return };
        let Some(detector) = &entry.outlier else { return };
        let endpoints = entry.endpoints.load_full();
        let (events, rates) = {
            let mut detector = detector.lock().unwrap_or_else(PoisonError::into_inner);
            (detector.tick(&endpoints, Instant::now(), &mut random), detector.rates())
        };
        for event in &events {
            crate::upstream::count_outlier(&stats, event);
            let local = matches!(event, Event::Ejected { cause: Cause::LocalSuccessRate, .. });
            crate::events::outlier(&shared, &entry.cluster.name, event, rates[usize::from(local)]);
            entry.tell_of_failure(matches!(event, Event::Ejected { enforced: true, .. }));
        }
    }
}
