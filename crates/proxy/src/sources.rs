//! Where resources come from besides the aggregated stream: gRPC servers of their own, and files.
//!
//! One subscription is one stream, as in Envoy: SDS servers such as Istio's agent end a whole stream over one secret that
//! they cannot give.

mod file;

use crate::control::Control;
use crate::{tls, xds};
use mesh_types::ArcStr;
use proxy_core::config_source::Origin;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::task::JoinSet;

/// A resource that somebody else than the aggregated stream is asked for.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Demand {
    pub(crate) origin: Origin,
    pub(crate) type_url: &'static str,
    /// `None`: all there are.
    pub(crate) name: Option<ArcStr>,
}

/// Keeps up a subscription for each demand, until nobody says any more what is demanded.
pub(crate) async fn run(
    mut demands: watch::Receiver<BTreeSet<Demand>>,
    control: Arc<Mutex<Control>>,
    node: envoy_api::core::Node,
) {
    let mut tasks = JoinSet::new();
    let mut running: BTreeMap<Demand, AbortHandle> = BTreeMap::new();
    loop {
        let wanted = demands.borrow_and_update().clone();
        running.retain(|demand, task| {
            let keep = wanted.contains(demand);
            if !keep {
                task.abort();
            }
            keep
        });
        for demand in wanted {
            // Secrets whose names say in which files they are, are read from these.
            if running.contains_key(&demand) || demand.name.as_deref().is_some_and(tls::is_file) {
                continue;
            }
            let task = match &demand.origin {
                Origin::Grpc(source) => match xds::subscribe(source, &demand, &control, node.clone()) {
                    Some(client) => tasks.spawn(client),
                    None => continue,
                },
                Origin::Path(path) => tasks.spawn(file::follow(path.clone(), demand.clone(), control.clone())),
                Origin::Ads | Origin::Static => continue,
            };
            running.insert(demand, task);
        }
        tokio::select! {
            changed = demands.changed() => if changed.is_err() { return },
            // Those that were ended.
            Some(_) = tasks.join_next() => {}
        }
    }
}
