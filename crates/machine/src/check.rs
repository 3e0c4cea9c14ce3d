//! `up --check`: the smoke test over the running mesh.

pub(crate) mod wire;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use http_body_util::Empty;
use hyper::body::Bytes;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::cluster::Remote;
use crate::cluster::command::{Command, PodRow};
use crate::network::Dialer;
use crate::objects::{Id, id_of};
use crate::plane::SyncWatch;
use crate::progress::Progress;
use crate::up::rows;
use wire::Tap;

/// Requests that the canary's shares are measured with, and how far they may be off, in percent.
const CANARY_REQUESTS: usize = 1000;
const CANARY_TOLERANCE: f64 = 3.0;
/// About as many as a browser opens connections; a divisor of the number above.
const AT_ONCE: usize = 8;
/// How long a change may take to reach all sidecars.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);
const REQUEST_PATIENCE: Duration = Duration::from_secs(15);
const REVIEWS: &str = "/api/v1/products/0/reviews";
const RATINGS: &str = "/api/v1/products/0/ratings";

/// The port of bookinfo's services, whose streams are looked at on the wire.
pub(crate) const APP_PORT: u16 = 9080;

/// What the test needs of the mesh.
pub(crate) struct Check<'a> {
    pub(crate) remote: &'a Remote,
    pub(crate) dialer: &'a Dialer,
    pub(crate) sync: SyncWatch,
    pub(crate) tap: &'a Tap,
    pub(crate) progress: &'a Progress,
}

/// Runs all steps; the outcome is one line.
pub(crate) async fn run(check: Check<'_>) -> anyhow::Result<bool> {
    let outcome = check.all().await;
    check.progress.release();
    match outcome {
        Ok(passed) => {
            println!("check passed: {}", passed.join(", "));
            Ok(true)
        }
        Err(error) => {
            println!("check failed: {error:#}");
            Ok(false)
        }
    }
}

impl Check<'_> {
    async fn all(&self) -> anyhow::Result<Vec<String>> {
        let pods = rows(self.remote).await?;
        if let Some(pod) = pods.iter().find(|pod| !pod.settled) {
            bail!("pod {} is not ready: {}", pod.name, pod.message.as_deref().unwrap_or(&pod.status));
        }
        let mut passed = Vec::new();
        let done = |name: String, passed: &mut Vec<String>| {
            self.progress.step(&format!("check: {name}"));
            passed.push(name);
        };
        let Some(page) = pods.iter().find(|pod| pod.app == "productpage") else {
            done(format!("{} pods ready", pods.len()), &mut passed);
            done(self.in_sync().await?, &mut passed);
            return Ok(passed);
        };
        let namespace = page.namespace.clone();
        let page = SocketAddr::new(*page.ips.first().context("productpage has no address")?, APP_PORT);
        done(self.page_served(page).await.context("page")?, &mut passed);
        done(self.three_versions(page).await.context("reviews versions")?, &mut passed);
        done(self.canary(page, &namespace).await.context("canary")?, &mut passed);
        done(self.strict(page, &namespace, &pods).await.context("STRICT mutual TLS")?, &mut passed);
        done(self.fault(page, &namespace).await.context("fault")?, &mut passed);
        done(self.timeout(page, &namespace).await.context("timeout")?, &mut passed);
        done(self.in_sync().await?, &mut passed);
        Ok(passed)
    }

    async fn page_served(&self, page: SocketAddr) -> anyhow::Result<String> {
        let (status, body) = self.get(page, "/productpage").await?;
        let text = String::from_utf8_lossy(&body);
        ensure!(status.is_success(), "answered {status}");
        ensure!(text.to_ascii_lowercase().contains("<html") && text.contains("Reviews"), "is no product page");
        Ok("page served".to_owned())
    }

    async fn three_versions(&self, page: SocketAddr) -> anyhow::Result<String> {
        let mut seen = BTreeMap::new();
        for _ in 0..60 {
            let (_, body) = self.get(page, REVIEWS).await?;
            *seen.entry(version_of(&body)).or_insert(0) += 1;
            if ["v1", "v2", "v3"].iter().all(|version| seen.contains_key(*version)) {
                return Ok("3 reviews versions seen".to_owned());
            }
        }
        bail!("60 requests reached only {seen:?}")
    }

    async fn canary(&self, page: SocketAddr, namespace: &str) -> anyhow::Result<String> {
        let ids = self.apply(namespace, CANARY).await?;
        // A fair coin leaves the tolerance once in 600 times; twice in a row is no accident.
        let mut outcome = self.shares(page).await?;
        if outcome.is_err() {
            outcome = self.shares(page).await?;
        }
        self.delete(ids).await?;
        outcome.map_err(anyhow::Error::msg)
    }

    /// Measures the canary once; the inner error says how far off it is.
    async fn shares(&self, page: SocketAddr) -> anyhow::Result<Result<String, String>> {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let mut tasks = JoinSet::new();
        for _ in 0..AT_ONCE {
            let dialer = self.dialer.clone();
            tasks.spawn(async move {
                let mut versions = Vec::with_capacity(CANARY_REQUESTS / AT_ONCE);
                for _ in 0..CANARY_REQUESTS / AT_ONCE {
                    versions.push(match get(&dialer, page, REVIEWS).await {
                        Ok((_, body)) => version_of(&body),
                        Err(error) => format!("{error:#}"),
                    });
                }
                versions
            });
        }
        while let Some(done) = tasks.join_next().await {
            for version in done? {
                *counts.entry(version).or_insert(0) += 1;
            }
        }
        let percent = |version: &str| 100.0 * counts.get(version).copied().unwrap_or(0) as f64 / CANARY_REQUESTS as f64;
        let (stable, canary) = (percent("v1"), percent("v3"));
        let fair = (stable - 90.0).abs() <= CANARY_TOLERANCE && (canary - 10.0).abs() <= CANARY_TOLERANCE;
        Ok(if fair {
            Ok(format!("canary {stable:.1}/{canary:.1}"))
        } else {
            Err(format!("90/10 became {stable:.1}/{canary:.1} over {CANARY_REQUESTS} requests: {counts:?}"))
        })
    }

    async fn strict(&self, page: SocketAddr, namespace: &str, pods: &[PodRow]) -> anyhow::Result<String> {
        let reviews =
            pods.iter().find(|pod| pod.app == "reviews").and_then(|pod| pod.ips.first()).context("no reviews pod")?;
        let reviews = SocketAddr::new(*reviews, APP_PORT);
        let (status, _) = self.get(reviews, "/reviews/0").await.context("a plaintext client before STRICT")?;
        ensure!(status.is_success(), "a plaintext client before STRICT got {status}");
        let ids = self.apply(namespace, STRICT).await?;
        let plain_before = self.tap.seen().plain.load(Ordering::Relaxed);
        let tls_before = self.tap.seen().tls.load(Ordering::Relaxed);
        let refused = self.get(reviews, "/reviews/0").await;
        let mut works = Ok(());
        for _ in 0..10 {
            let answer = self.get(page, REVIEWS).await;
            if !answer.as_ref().is_ok_and(|(status, _)| status.is_success()) {
                works = Err(anyhow::anyhow!("the application itself failed: {:?}", answer.map(|(status, _)| status)));
            }
        }
        self.delete(ids).await?;
        if let Ok((status, _)) = refused {
            bail!("a plaintext client was answered {status}");
        }
        works?;
        let seen = self.tap.seen();
        let plain = seen.plain.load(Ordering::Relaxed) - plain_before;
        ensure!(plain == 0, "{plain} bytes between pods were not TLS: {}", seen.example().unwrap_or_default());
        let tls = seen.tls.load(Ordering::Relaxed);
        ensure!(tls > 0, "nothing was seen on the wire");
        Ok(format!(
            "STRICT mTLS ({} TLS bytes on the wire, no others, plaintext refused)",
            tls.saturating_sub(tls_before).max(1)
        ))
    }

    async fn fault(&self, page: SocketAddr, namespace: &str) -> anyhow::Result<String> {
        let ids = self.apply(namespace, FAULT).await?;
        let answer = self.get(page, RATINGS).await;
        self.delete(ids).await?;
        let (status, _) = answer?;
        ensure!(status.as_u16() == 500, "ratings answered {status} instead of the injected 500");
        Ok("fault injected".to_owned())
    }

    async fn timeout(&self, page: SocketAddr, namespace: &str) -> anyhow::Result<String> {
        let ids = self.apply(namespace, TIMEOUT).await?;
        let began = Instant::now();
        let answer = self.get(page, REVIEWS).await;
        let took = began.elapsed();
        self.delete(ids).await?;
        let (status, _) = answer?;
        ensure!(status.is_server_error(), "reviews answered {status} in spite of the timeout");
        // The product page asks twice; without the timeout each try would take the two seconds of the delay.
        ensure!(took < Duration::from_millis(1900), "the timeout of 0.5 s let requests take {} ms", took.as_millis());
        Ok("timeout kept".to_owned())
    }

    async fn in_sync(&self) -> anyhow::Result<String> {
        let count =
            self.sync.wait_latest(SYNC_PATIENCE).await.map_err(anyhow::Error::msg).context("proxies in sync")?;
        Ok(format!("all {count} proxies in sync"))
    }

    async fn get(&self, address: SocketAddr, path: &str) -> anyhow::Result<(http::StatusCode, Bytes)> {
        get(self.dialer, address, path).await
    }

    async fn apply(&self, namespace: &str, text: &str) -> anyhow::Result<Vec<Id>> {
        let text = text.replace("NAMESPACE", namespace);
        let documents = manifest::parse(Path::new("<check>"), &text)?;
        let ids = documents.iter().map(id_of).collect();
        let (reply, answer) = oneshot::channel();
        self.remote.send(Command::Apply { documents, dry_run: false, reply }).await.map_err(anyhow::Error::msg)?;
        self.synced(answer.await?.revision).await?;
        Ok(ids)
    }

    async fn delete(&self, ids: Vec<Id>) -> anyhow::Result<()> {
        let (reply, answer) = oneshot::channel();
        self.remote.send(Command::Delete { ids, reply }).await.map_err(anyhow::Error::msg)?;
        self.synced(answer.await?.revision).await
    }

    async fn synced(&self, revision: u64) -> anyhow::Result<()> {
        self.sync
            .wait(revision, SYNC_PATIENCE)
            .await
            .map_err(anyhow::Error::msg)
            .context("a change did not reach all sidecars")?;
        Ok(())
    }
}

async fn get(dialer: &Dialer, address: SocketAddr, path: &str) -> anyhow::Result<(http::StatusCode, Bytes)> {
    let request = http::Request::get(path)
        .header("host", format!("productpage:{}", address.port()))
        .body(Empty::<Bytes>::new())?;
    tokio::time::timeout(REQUEST_PATIENCE, dialer.http(address, request))
        .await
        .context("no answer in time")?
        .map_err(anyhow::Error::msg)
}

/// The version of reviews that answered, from the pod's name in its answer.
fn version_of(body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let pod = value.get("podname").and_then(Value::as_str).unwrap_or_default();
    pod.strip_prefix("reviews-")
        .and_then(|rest| rest.split('-').next())
        .unwrap_or("an answer without a version")
        .to_owned()
}

const CANARY: &str = r"
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: outrigger-check, namespace: NAMESPACE}
spec:
  host: reviews
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v3, labels: {version: v3}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: outrigger-check, namespace: NAMESPACE}
spec:
  hosts: [reviews]
  http:
  - route:
    - {destination: {host: reviews, subset: v1}, weight: 90}
    - {destination: {host: reviews, subset: v3}, weight: 10}
";

const STRICT: &str = r"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: NAMESPACE}
spec: {mtls: {mode: STRICT}}
---
# The test itself asks the product page from outside the mesh.
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: outrigger-check, namespace: NAMESPACE}
spec:
  selector: {matchLabels: {app: productpage}}
  mtls: {mode: PERMISSIVE}
";

const FAULT: &str = r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: outrigger-check, namespace: NAMESPACE}
spec:
  hosts: [ratings]
  http:
  - fault: {abort: {httpStatus: 500, percentage: {value: 100}}}
    route: [{destination: {host: ratings}}]
";

const TIMEOUT: &str = r"
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: outrigger-check, namespace: NAMESPACE}
spec:
  host: reviews
  subsets: [{name: v2, labels: {version: v2}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: outrigger-check, namespace: NAMESPACE}
spec:
  hosts: [reviews]
  http:
  - timeout: 0.5s
    route: [{destination: {host: reviews, subset: v2}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: outrigger-check-ratings, namespace: NAMESPACE}
spec:
  hosts: [ratings]
  http:
  - fault: {delay: {fixedDelay: 2s, percentage: {value: 100}}}
    route: [{destination: {host: ratings}}]
";
