//! Waiting with 200 clients, of which some are slow, some hang and some refuse.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ads::client::{Client, Config, Connection, Handler, Rejected, Subscriptions, Update as Resource, Wanted};
use ca::{Authority, TokenIssuer};
use config_store::{Key, Kind};
use control_plane::{Handle, Listeners, Settings, Update, serve};
use envoy_api::{core, type_url};
use inspect::{Progress, Sync, Verdict, Waiter};
use mesh_types::ArcStr;
use tonic::transport::Endpoint;

const CLIENTS: usize = 200;
/// Of these: slow, hanging, refusing. All others are fast.
const SLOW: std::ops::Range<usize> = 0..10;
const HANGING: std::ops::Range<usize> = 10..20;
const REFUSING: std::ops::Range<usize> = 20..30;

/// What all clients look at and write to.
#[derive(Default)]
struct Stage {
    /// Hanging clients hang from now on.
    hang: AtomicBool,
    /// Which clients have applied the cluster of which service; the oracle.
    applied: Mutex<BTreeSet<(usize, String)>>,
}

struct Fake {
    index: usize,
    stage: Arc<Stage>,
}

impl Handler for Fake {
    fn update(&mut self, _: &str, updated: Vec<Resource>, _: Vec<ArcStr>) -> Result<(), Rejected> {
        if SLOW.contains(&self.index) {
            std::thread::sleep(Duration::from_millis(300));
        }
        while HANGING.contains(&self.index) && self.stage.hang.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut refused = Vec::new();
        for resource in updated {
            let host = resource.name.rsplit('|').next().unwrap_or_default().to_owned();
            if REFUSING.contains(&self.index) && host.starts_with("bad.") {
                refused.push((resource.name.clone(), "connect_timeout: is not to my liking".to_owned()));
            } else {
                self.stage.applied.lock().unwrap().insert((self.index, host));
            }
        }
        Rejected(refused).into_result()
    }
}

fn name(index: usize) -> String {
    format!("p{index}.default")
}

fn client(index: usize, stage: &Arc<Stage>, grpc: SocketAddr) -> Client<Fake> {
    let id = format!("sidecar~10.1.{}.{}~{}~default.svc.cluster.local", index / 250, index % 250 + 1, name(index));
    let subscriptions = Subscriptions::new();
    subscriptions.set(type_url::CLUSTER, Wanted::all());
    let connector = Box::new(move || -> std::pin::Pin<Box<dyn Future<Output = _> + Send>> {
        Box::pin(async move {
            let channel = Endpoint::from_shared(format!("http://{grpc}"))?.connect().await?;
            Ok(Connection { channel, authorization: None, metadata: Vec::new() })
        })
    });
    let node = core::Node { id, ..core::Node::default() };
    Client::new(Config::new(node), subscriptions, connector, Fake { index, stage: stage.clone() })
}

async fn apply(handle: &Handle, service: &str) {
    let yaml = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {service}}}\nspec: {{clusterIP: 10.96.0.9, ports: [{{name: http, port: 80}}]}}\n"
    );
    let documents = manifest::parse(Path::new("mesh.yaml"), &yaml).unwrap();
    let (_, rejected) = handle.update(documents.into_iter().map(|d| Update::Apply(Box::new(d))).collect()).await;
    assert!(rejected.is_empty(), "{rejected:?}");
}

fn progress(handle: &Handle, service: &str) -> Progress {
    let state = handle.state();
    let proxies = handle.sync_status().into_iter().map(|status| Sync {
        nacks: status.refusals().map(|(_, why)| why.to_owned()).collect(),
        proxy: status.proxy,
        synced_to: status.synced_to,
    });
    let wanted = state.snapshot.get(&Key::new(Kind::Service, "default", service)).unwrap().resource_version;
    Progress { wanted, proxies: proxies.collect() }
}

/// Looks until the verdict is what is hoped for; every `Live` on the way is held against the oracle.
async fn until(handle: &Handle, stage: &Stage, service: &str, wanted: impl Fn(&Verdict) -> bool) -> Verdict {
    let mut waiter = Waiter::default();
    let host = format!("{service}.default.svc.cluster.local");
    loop {
        let verdict = waiter.look(&progress(handle, service));
        if let Verdict::Live(count) = verdict {
            let applied = stage.applied.lock().unwrap().iter().filter(|(_, own)| *own == host).count();
            assert_eq!((count, applied), (CLIENTS, CLIENTS), "live too early");
        }
        if wanted(&verdict) {
            return verdict;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn names(range: std::ops::Range<usize>) -> Vec<String> {
    let mut names: Vec<String> = range.map(name).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_clients_are_judged_exactly() {
    let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
    let listeners = Listeners { grpc: bind(), grpc_tls: bind(), webhook: bind(), monitoring: bind() };
    let grpc = listeners.grpc.local_addr().unwrap();
    let authority = Arc::new(Authority::generate("cluster.local").unwrap());
    let issuer = TokenIssuer::generate().unwrap();
    let (_trigger, watch) = lifecycle::drain::channel();
    let handle = serve(Settings::default(), listeners, authority, issuer.verifier(), watch).await.unwrap();
    apply(&handle, "first").await;
    let stage = Arc::new(Stage::default());
    for index in 0..CLIENTS {
        let client = client(index, &stage, grpc);
        if index < REFUSING.end {
            // These block their thread now and then, so each has its own.
            std::thread::spawn(move || {
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(client.run());
            });
        } else {
            tokio::spawn(client.run());
        }
    }
    while handle.sync_status().len() < CLIENTS {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    until(&handle, &stage, "first", |verdict| matches!(verdict, Verdict::Live(_))).await;

    stage.hang.store(true, Ordering::SeqCst);
    apply(&handle, "second").await;
    let verdict =
        until(&handle, &stage, "second", |v| matches!(v, Verdict::Pending(names) if names.len() <= HANGING.len()))
            .await;
    assert_eq!(verdict, Verdict::Pending(names(HANGING)));
    stage.hang.store(false, Ordering::SeqCst);
    until(&handle, &stage, "second", |verdict| matches!(verdict, Verdict::Live(_))).await;

    apply(&handle, "bad").await;
    let all = |verdict: &Verdict| matches!(verdict, Verdict::Refused(all) if all.len() == REFUSING.len());
    let Verdict::Refused(refused) = until(&handle, &stage, "bad", all).await else { unreachable!("awaited") };
    let (who, why): (Vec<String>, Vec<String>) = refused.into_iter().unzip();
    assert_eq!(who, names(REFUSING));
    assert!(why.iter().all(|why| why.contains("bad.default.svc.cluster.local: connect_timeout")), "{why:?}");
}
