//! The cluster: one task that owns all state. It takes commands, keeps pods as the workloads want them, and tells network, DNS and
//! control plane about every change.

mod addresses;
pub(crate) mod command;
mod pods;
mod publish;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use tokio::sync::{mpsc, watch};

use crate::container::Spawner;
use crate::folder::Folder;
use crate::network::dns::Zone;
use crate::network::publish::Destination;
use crate::network::{Network, Place};
use crate::objects::{Id, Objects};
use crate::plane::{Change, Plane};
use crate::pod::PodHandle;
use crate::pod::command::Images;
use crate::pod::facts::Data;
use crate::progress::Progress;
use crate::services::ServiceView;
use addresses::Addresses;
use command::Command;

/// Commands waiting; each is a user's action, so more than a few means something is stuck.
const COMMANDS: usize = 16;
/// Changes of pods within this time become one update of everything.
const GATHER: Duration = Duration::from_millis(5);

/// (namespace, name)
pub(crate) type Key = (String, String);

/// What the cluster is made of.
pub(crate) struct Parts {
    pub(crate) folder: Folder,
    pub(crate) network: Network,
    pub(crate) plane: Plane,
    pub(crate) spawner: Spawner,
    pub(crate) images: Images,
    pub(crate) program: std::path::PathBuf,
    pub(crate) progress: Progress,
    /// Label of namespaces that no document declares.
    pub(crate) inject_undeclared: bool,
    /// `--concurrency`: worker threads of each sidecar.
    pub(crate) concurrency: Option<u32>,
    /// `--envoy`: the program that sidecars run instead of our own proxy.
    pub(crate) envoy: Option<std::path::PathBuf>,
}

/// A pod as the cluster keeps it.
struct Entry {
    /// After injection, without status.
    object: Value,
    pod: Arc<Pod>,
    place: PlaceState,
    owner: Id,
    hash: String,
    ordinal: u32,
    handle: Option<PodHandle>,
    /// What the control plane was told last.
    told: Option<(bool, &'static str)>,
    /// Lines already printed about it.
    announced: Option<String>,
    injected: bool,
}

struct PlaceState {
    ips: Vec<IpAddr>,
    /// Not in the pod's status, as Multus'.
    attached: Vec<IpAddr>,
    slot: u32,
    /// Handed to the pod's task when it starts.
    place: Option<Place>,
}

/// Owner of all state; see the module's head.
pub(crate) struct Cluster {
    parts: Parts,
    objects: Objects,
    pods: BTreeMap<Key, Entry>,
    addresses: Addresses,
    services: Vec<ServiceView>,
    slices: BTreeMap<Key, Value>,
    known_ips: Vec<Vec<IpAddr>>,
    known_attached: Vec<IpAddr>,
    /// Not yet told to the control plane.
    pending: Vec<Change>,
    /// Why workloads have no pods, printed once and shown by `ps`.
    problems: BTreeMap<Id, String>,
    data: watch::Sender<Arc<Data>>,
    zone: watch::Sender<Arc<Zone>>,
    changed: watch::Sender<u64>,
    published: BTreeMap<(String, String, u16), watch::Sender<Destination>>,
    /// Revision of the control plane after the last update.
    revision: u64,
    stopping: bool,
}

/// How others talk to the cluster.
#[derive(Clone)]
pub(crate) struct Remote {
    commands: mpsc::Sender<Command>,
}

impl Remote {
    /// Sends a command; an error means that the cluster is ending.
    pub(crate) async fn send(&self, command: Command) -> Result<(), String> {
        self.commands.send(command).await.map_err(|_| "the mesh is ending".to_owned())
    }
}

impl Cluster {
    pub(crate) fn new(parts: Parts) -> (Self, Remote, mpsc::Receiver<Command>) {
        let (commands, queue) = mpsc::channel(COMMANDS);
        let cluster = Self {
            addresses: Addresses::default(),
            parts,
            objects: Objects::default(),
            pods: BTreeMap::new(),
            services: Vec::new(),
            slices: BTreeMap::new(),
            known_ips: Vec::new(),
            known_attached: Vec::new(),
            pending: Vec::new(),
            problems: BTreeMap::new(),
            data: watch::Sender::new(Arc::new(Data::default())),
            zone: watch::Sender::new(Arc::new(Zone::default())),
            changed: watch::Sender::new(0),
            published: BTreeMap::new(),
            revision: 0,
            stopping: false,
        };
        (cluster, Remote { commands }, queue)
    }

    /// The names as the DNS server shall answer them.
    pub(crate) fn zone(&self) -> watch::Receiver<Arc<Zone>> {
        self.zone.subscribe()
    }

    /// Where a published port leads; follows the service's address.
    pub(crate) fn publish_target(
        &mut self,
        namespace: &str,
        service: &str,
        port: u16,
    ) -> crate::network::publish::Target {
        self.published
            .entry((namespace.to_owned(), service.to_owned(), port))
            .or_insert_with(|| watch::Sender::new(Destination::default()))
            .subscribe()
    }

    /// Runs until told to shut down and all pods have ended.
    pub(crate) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut changed = self.changed.subscribe();
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => self.shut_down(),
                },
                _ = changed.changed() => {
                    tokio::time::sleep(GATHER).await;
                    changed.borrow_and_update();
                }
            }
            self.settle().await;
            if self.stopping && self.pods.is_empty() {
                return;
            }
        }
    }

    /// Brings everything in line with the objects and the pods' states.
    pub(crate) async fn settle(&mut self) {
        self.collect_ended().await;
        if !self.stopping {
            self.reconcile();
        }
        self.publish().await;
        self.start_placed();
        self.announce();
    }

    /// Asks all pods to end.
    fn shut_down(&mut self) {
        self.stopping = true;
        let mut unstarted = Vec::new();
        for (key, entry) in &self.pods {
            match &entry.handle {
                // Nobody waits for a demonstration's connections to drain on the way out.
                Some(handle) => handle.stop(Some(Duration::from_secs(1))),
                None => unstarted.push(key.clone()),
            }
        }
        for key in unstarted {
            self.pods.remove(&key);
        }
    }
}
