//! The state folder of a mesh: lock, control socket, volumes and logs. The only thing that outlives a killed `up`.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

/// Why a mesh cannot have its state folder.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "mesh {0:?} is running already; `outrigger down --name {0}` ends it, `--name OTHER` starts another one beside it"
    )]
    Running(String),
    #[error("{0:?} is no name for a mesh: use up to 40 of a-z, 0-9 and -")]
    Name(String),
    #[error("{}: it belongs to user {owner}, not to this one", path.display())]
    Stranger { path: PathBuf, owner: u32 },
    #[error("no folder for state: set XDG_RUNTIME_DIR, or run as root")]
    NoRuntimeDir,
    #[error("state folder {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Paths below a mesh's state folder.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    name: String,
}

/// Held by the running `up`; its end, however it comes, releases the lock.
#[derive(Debug)]
pub(crate) struct Held {
    folder: Folder,
    _lock: File,
}

/// Where the state folders of this user's meshes are.
pub(crate) fn parent() -> Result<PathBuf, Error> {
    if rustix::process::geteuid().is_root() && !crate::rootless::inside() {
        return Ok(PathBuf::from("/run/outrigger"));
    }
    std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("outrigger")).ok_or(Error::NoRuntimeDir)
}

impl Folder {
    /// The folder of the mesh called `name`; it need not exist.
    pub(crate) fn of(name: &str) -> Result<Self, Error> {
        let fine = !name.is_empty()
            && name.len() <= 40
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if !fine {
            return Err(Error::Name(name.to_owned()));
        }
        Ok(Self { path: parent()?.join(name), name: name.to_owned() })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    pub(crate) fn pods(&self) -> PathBuf {
        self.path.join("pods")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    pub(crate) fn claims(&self) -> PathBuf {
        self.path.join("claims")
    }

    /// Output of a detached `up`.
    pub(crate) fn own_log(&self) -> PathBuf {
        // Beside the folder, as it exists before the folder does.
        self.path.with_extension("log")
    }

    fn lock_file(&self) -> PathBuf {
        // Beside the folder: removing the folder must not remove the lock that guards the removal.
        self.path.with_extension("lock")
    }

    fn io(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }

    /// Takes the folder, new and empty. What a killed `up` left behind goes.
    pub(crate) fn hold(&self) -> Result<Held, Error> {
        let lock = self.lock()?.ok_or_else(|| Error::Running(self.name.clone()))?;
        self.clear()?;
        DirBuilder::new().mode(0o700).create(&self.path).map_err(|e| self.io(e))?;
        for path in [self.pods(), self.logs(), self.claims()] {
            DirBuilder::new().mode(0o700).create(&path).map_err(|e| self.io(e))?;
        }
        Ok(Held { folder: self.clone(), _lock: lock })
    }

    /// Whether an `up` of this name runs.
    pub(crate) fn is_running(&self) -> Result<bool, Error> {
        Ok(self.lock_file().exists() && self.lock()?.is_none())
    }

    /// Removes what a killed `up` left; true if there was something. Does nothing to a running mesh.
    pub(crate) fn remove_stale(&self) -> Result<bool, Error> {
        if !self.path.exists() && !self.lock_file().exists() {
            return Ok(false);
        }
        let Some(_lock) = self.lock()? else { return Ok(false) };
        let was = self.path.exists();
        self.clear()?;
        self.remove_lock_and_parent();
        Ok(was)
    }

    fn lock(&self) -> Result<Option<File>, Error> {
        let parent = self.path.parent().ok_or(Error::NoRuntimeDir)?;
        // Another mesh that ends takes the parent away while it is empty, which may be between any two steps.
        let mut tries = 0..100;
        let file = loop {
            match self.open_lock(parent) {
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && tries.next().is_some() => {
                }
                opened => break opened?,
            }
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(self.io(error.into())),
        }
    }

    fn open_lock(&self, parent: &Path) -> Result<File, Error> {
        DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(|e| self.io(e))?;
        let meta = fs::symlink_metadata(parent).map_err(|e| self.io(e))?;
        let me = rustix::process::geteuid().as_raw();
        if meta.uid() != me || !meta.is_dir() {
            return Err(Error::Stranger { path: parent.to_owned(), owner: meta.uid() });
        }
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        options.open(self.lock_file()).map_err(|e| self.io(e))
    }

    fn clear(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.io(error)),
        }
    }

    fn remove_lock_and_parent(&self) {
        let _ = fs::remove_file(self.own_log());
        let _ = fs::remove_file(self.lock_file());
        if let Some(parent) = self.path.parent() {
            // Fails while other meshes have folders there, as it should.
            let _ = fs::remove_dir(parent);
        }
    }
}

impl Held {
    pub(crate) fn folder(&self) -> &Folder {
        &self.folder
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Err(error) = self.folder.clear() {
            tracing::warn!(%error, "state folder not removed");
        }
        self.folder.remove_lock_and_parent();
    }
}

/// Names of all meshes that have a state folder.
pub(crate) fn names() -> Vec<String> {
    let Ok(parent) = parent() else { return Vec::new() };
    let mut names: Vec<String> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}
