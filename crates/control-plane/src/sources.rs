//! Folders and an API server at once: who says what, when both know an object.

use std::collections::{HashMap, HashSet};

use config_store::Key;
use kube_source::Change;
use tokio::sync::mpsc;
use tracing::warn;

use crate::folder::Folders;
use crate::serve::Handle;
use crate::world::Update;

/// Follows both sources for ever; the first update has all that either has.
pub(crate) async fn follow(handle: &Handle, mut folders: Folders, mut cluster: Option<mpsc::Receiver<Vec<Change>>>) {
    let mut merge = Merge::default();
    // Without a second source nobody needs to know who said what.
    let both = cluster.is_some() && !folders.is_empty();
    let mut updates = folders.read();
    if both {
        updates = merge.of_files(updates, handle);
    }
    if let Some(batches) = &mut cluster {
        let first = updates_of(batches.recv().await.unwrap_or_default());
        updates.extend(if both { merge.of_cluster(first) } else { first });
    }
    handle.update(updates).await;
    // The first reading took more memory than serving does.
    lifecycle::memory::release_unused();
    loop {
        let batch = async {
            match &mut cluster {
                Some(batches) => batches.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            batch = batch => match batch {
                Some(batch) => {
                    let updates = updates_of(batch);
                    handle.update(if both { merge.of_cluster(updates) } else { updates }).await;
                }
                None => cluster = None,
            },
            () = folders.changed() => {
                let updates = folders.read();
                handle.update(if both { merge.of_files(updates, handle) } else { updates }).await;
            }
        }
    }
}

fn updates_of(changes: Vec<Change>) -> Vec<Update> {
    let update = |change| match change {
        Change::Apply(reading) => Update::Read(reading),
        Change::Delete(key) => Update::Delete(key),
    };
    changes.into_iter().map(update).collect()
}

/// Files win: whoever starts the control plane with a file wants it to hold.
#[derive(Debug, Default)]
struct Merge {
    files: HashSet<Key>,
    cluster: HashSet<Key>,
    /// What the API server says of objects that files say, for when they no longer do.
    shadowed: HashMap<Key, Update>,
}

impl Merge {
    fn of_files(&mut self, updates: Vec<Update>, handle: &Handle) -> Vec<Update> {
        let state = handle.state();
        let take = |update: Update| match update {
            Update::Delete(key) => {
                self.files.remove(&key);
                Some(self.shadowed.remove(&key).unwrap_or(Update::Delete(key)))
            }
            update => {
                let key = update.key()?;
                if self.files.insert(key.clone()) && self.cluster.contains(&key) {
                    warn!("{key} is in a file and in the API server; the file is used");
                    if let Some(object) = state.snapshot.get(&key) {
                        self.shadowed.insert(key, Update::Upsert(Box::new(object.as_ref().clone())));
                    }
                }
                Some(update)
            }
        };
        updates.into_iter().filter_map(take).collect()
    }

    fn of_cluster(&mut self, updates: Vec<Update>) -> Vec<Update> {
        let take = |update: Update| match update {
            Update::Delete(key) => {
                self.cluster.remove(&key);
                self.shadowed.remove(&key);
                (!self.files.contains(&key)).then_some(Update::Delete(key))
            }
            update => {
                let key = update.key()?;
                self.cluster.insert(key.clone());
                if self.files.contains(&key) {
                    self.shadowed.insert(key, update);
                    return None;
                }
                Some(update)
            }
        };
        updates.into_iter().filter_map(take).collect()
    }
}
