//! Keeps the containers' logs from filling the disk.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Containerd's and kubelet's usual limit per file. One older file is kept beside the current one.
const LIMIT: u64 = 10 << 20;
const PERIOD: Duration = Duration::from_secs(5);

/// Looks after all logs until dropped.
pub(crate) async fn rotate(folder: PathBuf) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(PERIOD).await;
        let folder = folder.clone();
        // Copying ten megabytes is no work for the runtime's threads.
        let _ = tokio::task::spawn_blocking(move || {
            for pod in fs::read_dir(folder).into_iter().flatten().flatten() {
                for log in fs::read_dir(pod.path()).into_iter().flatten().flatten() {
                    let path = log.path();
                    if path.extension().is_some_and(|extension| extension == "log")
                        && log.metadata().is_ok_and(|meta| meta.len() > LIMIT)
                        && let Err(error) = cut(&path)
                    {
                        tracing::warn!(path = %path.display(), %error, "log not rotated");
                    }
                }
            }
        })
        .await;
    }
}

/// Copies the log aside and empties it. The container holds it open for appending, so it goes on at the new end; what it writes between
/// copy and cut is lost.
fn cut(path: &Path) -> io::Result<()> {
    fs::copy(path, path.with_extension("log.1"))?;
    OpenOptions::new().write(true).open(path)?.set_len(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_writer_goes_on_after_the_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.log");
        let mut writer = OpenOptions::new().append(true).create(true).open(&path).unwrap();
        writer.write_all(b"old\n").unwrap();
        cut(&path).unwrap();
        writer.write_all(b"new\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new\n");
        assert_eq!(fs::read(folder.path().join("c.log.1")).unwrap(), b"old\n");
    }
}
