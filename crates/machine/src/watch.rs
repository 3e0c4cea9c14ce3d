//! `up --watch`: applies files as they are saved.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio::sync::oneshot;

use crate::cluster::Remote;
use crate::cluster::command::{Command, Report};
use crate::load;
use crate::objects::{Id, id_of};
use crate::progress::Progress;

/// Looking at a few dozen files costs less than a millisecond, and works on every file system.
const PERIOD: Duration = Duration::from_millis(300);

type Stamps = BTreeMap<PathBuf, (SystemTime, u64)>;

/// Watches until cancelled.
pub(crate) async fn run(
    paths: &[PathBuf],
    recursive: bool,
    remote: &Remote,
    progress: &Progress,
) -> anyhow::Result<std::convert::Infallible> {
    let mut stamps = stamps(paths, recursive);
    let mut known: BTreeSet<Id> = load::load(paths, recursive).documents.iter().map(id_of).collect();
    loop {
        tokio::time::sleep(PERIOD).await;
        let now = self::stamps(paths, recursive);
        if now == stamps {
            continue;
        }
        stamps = now;
        let input = load::load(paths, recursive);
        if !input.errors.is_empty() {
            // Half-saved files are common; the mesh goes on with what it has.
            for error in &input.errors {
                progress.warn(&error.to_string());
            }
            continue;
        }
        let present: BTreeSet<Id> = input.documents.iter().map(id_of).collect();
        let gone: Vec<Id> = known.difference(&present).cloned().collect();
        known = present;
        let (reply, answer) = oneshot::channel();
        remote
            .send(Command::Apply { documents: input.documents, dry_run: false, reply })
            .await
            .map_err(anyhow::Error::msg)?;
        tell(progress, &answer.await.context("the mesh is ending")?);
        if !gone.is_empty() {
            let (reply, answer) = oneshot::channel();
            remote.send(Command::Delete { ids: gone, reply }).await.map_err(anyhow::Error::msg)?;
            tell(progress, &answer.await.context("the mesh is ending")?);
        }
    }
}

fn tell(progress: &Progress, report: &Report) {
    for line in report.lines.iter().filter(|line| !line.ends_with("unchanged")) {
        progress.step(line);
    }
}

fn stamps(paths: &[PathBuf], recursive: bool) -> Stamps {
    load::files(paths, recursive)
        .unwrap_or_default()
        .into_iter()
        .filter_map(|path| {
            let meta = std::fs::metadata(&path).ok()?;
            Some((path, (meta.modified().ok()?, meta.len())))
        })
        .collect()
}
