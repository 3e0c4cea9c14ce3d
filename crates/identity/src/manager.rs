//! Keeps one current certificate, whatever happens to the CA.

use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::certificate::{InvalidCertificate, WorkloadCertificate, certificates as certificates_of};
use crate::rotation::Rotation;
use crate::{Authority, Files, write_certificate};

/// How often mounted files are looked at. Kubelets take up to a minute to change them anyway.
const POLL: Duration = Duration::from_secs(5);
/// How often the file with the CA's roots is looked at: one system call.
const POLL_ROOTS: Duration = Duration::from_secs(1);

/// Where certificates come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// The control plane's CA.
    Authority(Box<Authority>),
    /// Files that somebody else keeps current.
    Files(Files),
}

/// The task that fetches and renews. Dropping it stops the renewal; what was fetched stays usable.
#[derive(Debug)]
pub struct Manager {
    certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>,
    failure: watch::Receiver<Option<String>>,
    task: JoinHandle<()>,
}

impl Manager {
    /// Starts at once. `output` is OUTPUT_CERTS: a directory that gets every new certificate.
    pub fn start(source: Source, rotation: Rotation, output: Option<PathBuf>) -> Manager {
        let (certificates, certificate) = watch::channel(None);
        let (failures, failure) = watch::channel(None);
        let task = tokio::spawn(run(source, rotation, output, certificates, failures));
        Manager { certificate, failure, task }
    }

    /// The current certificate; `None` until the first one is there.
    pub fn certificate(&self) -> watch::Receiver<Option<Arc<WorkloadCertificate>>> {
        self.certificate.clone()
    }

    /// Why the last attempt failed; `None` after a success.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure.clone()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(
    source: Source,
    rotation: Rotation,
    output: Option<PathBuf>,
    certificates: watch::Sender<Option<Arc<WorkloadCertificate>>>,
    failures: watch::Sender<Option<String>>,
) {
    let mut failed = 0u32;
    loop {
        let fetched = match &source {
            Source::Authority(authority) => authority.fetch().await.map_err(|e| chain(&e)),
            Source::Files(files) => files.load().map_err(|e| chain(&e)),
        };
        let random = random();
        let pause = match fetched {
            Ok(certificate) => {
                failed = 0;
                failures.send_replace(None);
                accept(certificate, output.as_deref(), &certificates);
                let current = certificates.borrow();
                match (&source, current.as_ref()) {
                    (Source::Authority(_), Some(current)) => {
                        rotation.delay(current.not_before, current.not_after, SystemTime::now(), random)
                    }
                    _ => POLL,
                }
            }
            Err(reason) => {
                failed = failed.saturating_add(1);
                let left = certificates
                    .borrow()
                    .as_ref()
                    .map(|current| current.not_after.duration_since(SystemTime::now()).unwrap_or_default());
                let pause = rotation.pause(failed, left, random);
                // The first failure and then each time the pause has doubled: an hour's outage is a few lines.
                if failed.is_power_of_two() {
                    let left = left
                        .map(|left| format!("; the one in use is valid for another {} s", left.as_secs()))
                        .unwrap_or_default();
                    warn!(%reason, attempt = failed, retry = ?pause, "no new workload certificate{left}");
                }
                failures.send_replace(Some(reason));
                if matches!(source, Source::Files(_)) { POLL.min(pause.max(Duration::from_millis(500))) } else { pause }
            }
        };
        match &source {
            Source::Authority(authority) => watch_roots(authority, pause, &certificates).await,
            Source::Files(_) => tokio::time::sleep(pause).await,
        }
    }
}

/// Waits, and trusts roots that appear in the CA's file meanwhile at once: they must be trusted before anybody has a certificate
/// of theirs. Roots that disappear go with the next certificate.
async fn watch_roots(
    authority: &Authority,
    pause: Duration,
    certificates: &watch::Sender<Option<Arc<WorkloadCertificate>>>,
) {
    let Some(path) = authority.roots_file() else { return tokio::time::sleep(pause).await };
    let changed = |path: &Path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let mut seen = changed(path);
    let end = tokio::time::Instant::now() + pause;
    loop {
        let left = end.saturating_duration_since(tokio::time::Instant::now());
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(POLL_ROOTS)).await;
        let now = changed(path);
        if now == seen {
            continue;
        }
        seen = now;
        let Ok(roots) = std::fs::read(path).map_err(drop).and_then(|pem| roots_in(&pem).map_err(drop)) else {
            continue;
        };
        certificates.send_if_modified(|current| {
            let Some(known) = current else { return false };
            let fresh: Vec<_> = roots.iter().filter(|root| !known.roots.contains(root)).cloned().collect();
            if fresh.is_empty() {
                return false;
            }
            info!(roots = fresh.len(), "further root certificates are trusted");
            let mut updated = WorkloadCertificate::clone(known);
            updated.roots.extend(fresh);
            *current = Some(Arc::new(updated));
            true
        });
    }
}

fn roots_in(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, InvalidCertificate> {
    certificates_of("the root certificate of the CA", pem)
}

/// Publishes a certificate if it is a new one.
fn accept(
    fresh: WorkloadCertificate,
    output: Option<&Path>,
    certificates: &watch::Sender<Option<Arc<WorkloadCertificate>>>,
) {
    let same = certificates.borrow().as_ref().is_some_and(|current| current.is_like(&fresh));
    if same {
        return;
    }
    let now = SystemTime::now();
    let left = fresh.not_after.duration_since(now).unwrap_or_default();
    let identity = fresh.spiffe.as_ref().map(ToString::to_string).unwrap_or_default();
    info!(%identity, valid_for = left.as_secs(), roots = fresh.roots.len(), "new workload certificate");
    if !fresh.is_valid_at(now) {
        warn!(%identity, "the workload certificate is not valid at this machine's time: is a clock wrong?");
    }
    if let Some(dir) = output
        && let Err(error) = write_certificate(dir, &fresh)
    {
        warn!(%error, dir = %dir.display(), "the workload certificate cannot be written to OUTPUT_CERTS");
    }
    certificates.send_replace(Some(Arc::new(fresh)));
}

/// In 0..1; a fresh RandomState is seeded from the system, which is enough to spread renewals.
fn random() -> f64 {
    f64::from(RandomState::new().hash_one(0u8) as u32) / f64::from(u32::MAX)
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
