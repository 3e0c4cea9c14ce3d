//! Follows folders of manifests, a file at a time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use config_store::Key;
use manifest::Document;
use rustix::fs::inotify;
use tokio::sync::Notify;
use tracing::{debug, warn};

use crate::world::Update;

/// How often files are looked at, for file systems that do not tell of changes. A thousand files take a few milliseconds.
const INTERVAL: Duration = Duration::from_millis(500);
/// Whoever writes a file writes it in pieces; this long nothing must happen before it is read.
const SETTLE: Duration = Duration::from_millis(2);

/// Files and folders, and what was in them when they were last read.
#[derive(Debug)]
pub(crate) struct Folders {
    paths: Vec<PathBuf>,
    files: BTreeMap<PathBuf, File>,
    /// Where each object was found; in the last file if in several.
    objects: HashMap<Key, PathBuf>,
    /// Tells of changes at once; without, looking now and then has to do.
    watch: Option<Arc<Notify>>,
}

#[derive(Debug, Default)]
struct File {
    fingerprint: Option<Fingerprint>,
    keys: BTreeSet<Key>,
}

/// Modification time, size and inode.
type Fingerprint = (SystemTime, u64, u64);

impl Folders {
    pub(crate) fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, files: BTreeMap::new(), objects: HashMap::new(), watch: None }
    }

    /// Whether there is nothing to follow.
    pub(crate) fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// Reads what has changed and gives what is to be done to have the store say the same. A file that cannot be read
    /// leaves its objects as they were.
    pub(crate) fn read(&mut self) -> Vec<Update> {
        if self.watch.is_none() {
            self.watch = watch(&self.paths);
            for path in self.paths.iter().filter(|path| !path.exists()) {
                warn!("{} does not exist; it is read when it does", path.display());
            }
        }
        let found = fingerprints(&self.paths);
        let mut updates = Vec::new();
        let gone: Vec<PathBuf> = self.files.keys().filter(|path| !found.contains_key(*path)).cloned().collect();
        let mut lost = BTreeSet::new();
        for path in gone {
            lost.extend(self.files.remove(&path).into_iter().flat_map(|file| file.keys).map(|key| (key, path.clone())));
        }
        for (path, fingerprint) in found {
            let known = self.files.get(&path).and_then(|file| file.fingerprint);
            if known != Some(fingerprint) {
                self.read_file(&path, fingerprint, &mut updates, &mut lost);
            }
        }
        for (key, path) in lost {
            if self.objects.get(&key) != Some(&path) {
                continue;
            }
            self.objects.remove(&key);
            match self.files.iter().rfind(|(_, file)| file.keys.contains(&key)).map(|(path, _)| path.clone()) {
                None => updates.push(Update::Delete(key)),
                // Another file has it, too, and is heard now.
                Some(other) => {
                    let (documents, _) = manifest::read(std::slice::from_ref(&other));
                    let document = documents.iter().rfind(|document| Key::of(document).as_ref() == Some(&key));
                    self.objects.insert(key, other);
                    updates.extend(document.map(Update::read));
                }
            }
        }
        updates
    }

    fn read_file(
        &mut self,
        path: &Path,
        fingerprint: Fingerprint,
        updates: &mut Vec<Update>,
        lost: &mut BTreeSet<(Key, PathBuf)>,
    ) {
        let (mut read, mut keys) = (Vec::new(), BTreeSet::new());
        let objects = &mut self.objects;
        let mut owned = Vec::new();
        // Nothing holds before the whole file is read, but of each document only the object is kept.
        let done = manifest::read_each(path, |document| {
            let Some(key) = Key::of(&document) else {
                debug!(kind = document.kind(), name = document.name(), "object of a kind that sidecars do not need");
                return;
            };
            let first = !keys.contains(&key);
            match objects.get(&key) {
                Some(other) if other.as_path() > path => {
                    keys.insert(key);
                    return;
                }
                Some(other) if other != path || !first => warn!("{}", duplicate(&document, &key, other)),
                None if !first => warn!("{}", duplicate(&document, &key, path)),
                _ => {}
            }
            owned.push(key.clone());
            keys.insert(key);
            read.push(Update::read(&document));
        });
        let file = self.files.entry(path.to_path_buf()).or_default();
        file.fingerprint = Some(fingerprint);
        if let Err(error) = done {
            warn!("{error}; the file is left out");
            return;
        }
        updates.append(&mut read);
        objects.extend(owned.into_iter().map(|key| (key, path.to_path_buf())));
        let before = std::mem::replace(&mut file.keys, keys);
        lost.extend(before.into_iter().filter(|key| !file.keys.contains(key)).map(|key| (key, path.to_path_buf())));
    }

    /// Waits until a file has changed, come or gone.
    pub(crate) async fn changed(&self) {
        let same = |files: &BTreeMap<PathBuf, Fingerprint>| {
            files.len() == self.files.len()
                && files
                    .iter()
                    .all(|(path, seen)| self.files.get(path).and_then(|file| file.fingerprint) == Some(*seen))
        };
        if self.paths.is_empty() {
            return std::future::pending().await;
        }
        loop {
            let told = self.told();
            let _ = tokio::time::timeout(INTERVAL, told).await;
            if !same(&fingerprints(&self.paths)) {
                while tokio::time::timeout(SETTLE, self.told()).await.is_ok() {}
                return;
            }
        }
    }

    /// Waits until the kernel tells of something.
    async fn told(&self) {
        match &self.watch {
            Some(watch) => watch.notified().await,
            None => std::future::pending().await,
        }
    }
}

/// Watches folders, and files by their folders, since editors replace them.
fn watch(paths: &[PathBuf]) -> Option<Arc<Notify>> {
    use inotify::{CreateFlags, WatchFlags};
    let fd = inotify::init(CreateFlags::CLOEXEC).ok()?;
    let events = WatchFlags::CLOSE_WRITE | WatchFlags::MOVE | WatchFlags::DELETE;
    for path in paths {
        let parent = || path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = if path.is_dir() { path.as_path() } else { parent() };
        if let Err(error) = inotify::add_watch(&fd, folder, events) {
            debug!(folder = %folder.display(), %error, "changes of files are found by looking now and then");
        }
    }
    let notify = Arc::new(Notify::new());
    let listener = Arc::downgrade(&notify);
    // Nobody waits for this thread: it reads as long as somebody listens, and does nothing but wake.
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        // What the kernel tells is of no interest: all files are looked at.
        while rustix::io::read(&fd, &mut buffer).is_ok_and(|read| read > 0)
            && let Some(notify) = listener.upgrade()
        {
            notify.notify_one();
        }
    });
    Some(notify)
}

fn duplicate(document: &Document, key: &Key, first: &Path) -> manifest::Error {
    document.error("metadata.name", format!("{key} is also in {}; the later one is used", first.display()))
}

/// Every file that [`manifest::read`] would look at.
fn fingerprints(paths: &[PathBuf]) -> BTreeMap<PathBuf, Fingerprint> {
    let mut seen = BTreeMap::new();
    let mut take = |path: PathBuf| {
        if let Ok(metadata) = fs::metadata(&path)
            && metadata.is_file()
            && let Ok(modified) = metadata.modified()
        {
            seen.insert(path, (modified, metadata.len(), metadata.ino()));
        }
    };
    for path in paths {
        match fs::read_dir(path) {
            Ok(entries) => {
                let files = entries.flatten().map(|entry| entry.path());
                files.filter(|path| manifest::is_manifest(path)).for_each(&mut take);
            }
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
        assert!(matches!(&folders.read()[..], [Update::Delete(_)]));
    }

    #[test]
    fn an_object_in_two_files_is_the_later_ones_until_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        fs::write(file("a.yaml"), service("a")).unwrap();
        fs::write(file("b.yaml"), service("a")).unwrap();
        let mut folders = Folders::new(vec![dir.path().to_path_buf()]);
        assert_eq!(folders.read().len(), 2);
        fs::write(file("a.yaml"), service("a") + "# changed\n").unwrap();
        assert!(folders.read().is_empty(), "the later file holds");
        fs::remove_file(file("b.yaml")).unwrap();
        let updates = folders.read();
        let [Update::Read(reading)] = &updates[..] else { panic!("{updates:?}") };
        assert_eq!(reading.as_ref().as_ref().unwrap().0.origin.as_ref().unwrap().file, file("a.yaml"));
    }

    #[tokio::test]
    async fn a_change_is_told_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut folders = Folders::new(vec![dir.path().to_path_buf()]);
        assert!(folders.read().is_empty());
        fs::write(dir.path().join("a.yaml"), service("a")).unwrap();
        folders.changed().await;
        assert_eq!(folders.read().len(), 1);
    }
}
