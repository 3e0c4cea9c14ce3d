//! Follows folders of manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use config_store::Key;
use manifest::Document;
use tracing::{debug, warn};

use crate::world::Update;

/// How often files are looked at. Modification times are cheap: a thousand files take a few milliseconds.
const INTERVAL: Duration = Duration::from_millis(500);

/// Files and folders, and what was in them when they were last read.
#[derive(Debug)]
pub(crate) struct Folders {
    paths: Vec<PathBuf>,
    seen: BTreeMap<PathBuf, (SystemTime, u64)>,
    /// Where each object was found.
    objects: BTreeMap<Key, PathBuf>,
}

impl Folders {
    pub(crate) fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, seen: BTreeMap::new(), objects: BTreeMap::new() }
    }

    /// Reads everything and gives what is to be done to have the store say the same. A file that cannot be read leaves
    /// its objects as they were.
    pub(crate) fn read(&mut self) -> Vec<Update> {
        self.seen = fingerprints(&self.paths);
        let (documents, errors) = manifest::read(&self.paths);
        let broken: BTreeSet<PathBuf> = errors.iter().map(|error| error.file.clone()).collect();
        for error in errors {
            warn!("{error}; the file is left out");
        }
        let mut found = BTreeMap::new();
        let mut updates = Vec::new();
        for document in documents {
            let Some(key) = Key::of(&document) else {
                debug!(kind = document.kind(), name = document.name(), "object of a kind that sidecars do not need");
                continue;
            };
            if let Some(first) = found.insert(key.clone(), document.file().to_path_buf()) {
                warn!("{}", duplicate(&document, &key, &first));
            }
            updates.push(Update::Apply(Box::new(document)));
        }
        for (key, file) in std::mem::take(&mut self.objects) {
            if found.contains_key(&key) {
                continue;
            }
            if broken.iter().any(|broken| file.starts_with(broken)) {
                found.insert(key, file);
            } else {
                updates.push(Update::Delete(key));
            }
        }
        self.objects = found;
        updates
    }

    /// Waits until a file has changed, come or gone.
    pub(crate) async fn changed(&self) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            if fingerprints(&self.paths) != self.seen {
                return;
            }
        }
    }
}

fn duplicate(document: &Document, key: &Key, first: &Path) -> manifest::Error {
    document.error("metadata.name", format!("{key} is also in {}; the later one is used", first.display()))
}

/// Modification time and size of every file that [`manifest::read`] would look at.
fn fingerprints(paths: &[PathBuf]) -> BTreeMap<PathBuf, (SystemTime, u64)> {
    let mut seen = BTreeMap::new();
    let mut take = |path: PathBuf| {
        if let Ok(metadata) = fs::metadata(&path).and_then(|metadata| Ok((metadata.modified()?, metadata.len()))) {
            seen.insert(path, metadata);
        }
    };
    for path in paths {
        match fs::read_dir(path) {
            Ok(entries) => entries.flatten().for_each(|entry| take(entry.path())),
            Err(_) => take(path.clone()),
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> String {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n")
    }

    #[test]
    fn removed_objects_are_deleted_and_those_of_a_broken_file_stay() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        fs::write(file("a.yaml"), service("a") + "---\n" + &service("b")).unwrap();
        fs::write(file("c.yaml"), service("c")).unwrap();
        let mut folders = Folders::new(vec![dir.path().to_path_buf()]);
        assert_eq!(folders.read().len(), 3);
        fs::write(file("a.yaml"), service("a")).unwrap();
        fs::write(file("c.yaml"), "a: [").unwrap();
        let updates = folders.read();
        let deleted: Vec<_> = updates
            .iter()
            .filter_map(|update| match update {
                Update::Delete(key) => Some(key.to_string()),
                _ => None,
            })
            .collect();
        assert_eq!(deleted, ["Service default/b"]);
        fs::remove_file(file("c.yaml")).unwrap();
        assert!(matches!(&folders.read()[..], [Update::Apply(_), Update::Delete(_)]));
    }
}
