//! One thread of the data plane: its own runtime, listeners, pools and counters.

use crate::downstream;
use crate::log::LogBuffers;
use crate::runtime::{Clusters, Shared};
use crate::socket::Bound;
use crate::stats::{
    Answers, ClusterStats, Gauge, HttpStats, IstioStats, Kind, ListenerHttpStats, ListenerStats, Named, OfManager,
    OfThread, PlainStats, RequestStats, Scope, TcpStats, Workload,
};
use crate::upstream::WorkerCluster;
use mesh_types::ArcStr;
use proxy_core::Random;
use proxy_core::hcm::HttpConnectionManager;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::LocalOptions;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Orders to a worker.
pub(crate) enum Command {
    /// Accept on this socket for the listener of that name.
    Listen(ArcStr, Bound),
    /// Token providers of this connection manager have keys that are fetched before they are needed.
    FetchKeys(Arc<HttpConnectionManager>),
    /// Stop accepting for the listener.
    StopListening(ArcStr),
    /// The cluster table changed.
    Clusters(Arc<Clusters>),
    /// Nobody counts there any more.
    ForgetStats(Kind, ArcStr),
    /// New requests to the cluster use new connections.
    DrainCluster(ArcStr),
    /// Hosts of the cluster came or went, whose idle connections end, or others of its requests are to be dropped.
    Endpoints(ArcStr),
    /// Let everything go and end.
    Shutdown,
}

/// Names that requests may give to statistics, and bytes that one may have: a peer must not fill the memory.
///
/// DIFFERS: Envoy knows no limit.
const MOST_ANSWERS: usize = 1000;
const LONGEST_ANSWERS: usize = 256;

/// The state of a worker, on its thread only.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    /// Which of the workers it is.
    index: usize,
    pub(crate) random: RefCell<Random>,
    table: RefCell<Arc<Clusters>>,
    /// Counts the changes of the table.
    pub(crate) table_changes: Cell<u64>,
    clusters: RefCell<foldhash::HashMap<ArcStr, Rc<WorkerCluster>>>,
    http: RefCell<HashMap<ArcStr, Arc<HttpStats>>>,
    tcp: RefCell<HashMap<ArcStr, Arc<TcpStats>>>,
    listener: RefCell<HashMap<ArcStr, Arc<ListenerStats>>>,
    listener_http: RefCell<HashMap<(ArcStr, ArcStr), Arc<ListenerHttpStats>>>,
    cluster_stats: RefCell<HashMap<ArcStr, Arc<ClusterStats>>>,
    requests: RefCell<HashMap<ArcStr, Arc<RequestStats>>>,
    answers: RefCell<HashMap<(ArcStr, String), Arc<Answers>>>,
    plain: Arc<PlainStats>,
    pub(crate) istio: Rc<IstioStats>,
    pub(crate) logs: LogBuffers,
    pub(crate) active_faults: Cell<u64>,
    /// Spans and records on their way to collectors.
    pub(crate) exports: crate::export::Batches,
    /// Remembers this worker's requests.
    pub(crate) ring: Arc<crate::hcm::Ring>,
    /// Connection managers whose filters' counters exist.
    pub(crate) touched: RefCell<HashSet<usize>>,
    /// Every workload this worker has met, once.
    workloads: RefCell<HashSet<Arc<Workload>>>,
    /// Keys of JWT providers.
    pub(crate) keys: crate::hcm::Kept,
    accepting: RefCell<HashMap<ArcStr, Vec<AbortHandle>>>,
    /// Downstream connections of this worker.
    pub(crate) connections: Cell<u64>,
    ticking: Cell<bool>,
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, index: usize, seed: u64) -> Rc<Self> {
        let plain = Arc::new(PlainStats::default());
        shared.registry.add(Kind::Plain, "".into(), plain.clone());
        Rc::new(Self {
            index,
            plain,
            random: RefCell::new(Random::new(seed)),
            table: RefCell::new(shared.clusters.load_full()),
            table_changes: Cell::new(0),
            clusters: RefCell::default(),
            http: RefCell::default(),
            tcp: RefCell::default(),
            listener: RefCell::default(),
            listener_http: RefCell::default(),
            cluster_stats: RefCell::default(),
            requests: RefCell::default(),
            answers: RefCell::default(),
            istio: IstioStats::new(shared.registry.clone()),
            logs: LogBuffers::new(shared.clone()),
            active_faults: Cell::new(0),
            exports: crate::export::Batches::default(),
            ring: shared.rings.add(shared.concurrency),
            keys: crate::hcm::Kept::default(),
            touched: RefCell::default(),
            workloads: RefCell::default(),
            accepting: RefCell::default(),
            connections: Cell::new(0),
            ticking: Cell::new(false),
            shared,
        })
    }

    /// A cluster by name, as this worker uses it; `None` when there is none of that name.
    pub(crate) fn cluster(self: &Rc<Self>, name: &str) -> Option<Rc<WorkerCluster>> {
        if let Some(cluster) = self.clusters.borrow().get(name) {
            return Some(cluster.clone());
        }
        let (key, entry) = {
            let table = self.table.borrow();
            let (key, entry) = table.get_key_value(name)?;
            (key.clone(), entry.clone())
        };
        let stats = self.stats(&self.cluster_stats, Kind::Cluster, &entry.cluster.stat_name);
        let seed = self.random.borrow_mut().next();
        let local = self.shared.local_cluster.get().filter(|(local, _)| *local != key);
        let local = local.and_then(|(name, place)| Some((self.table.borrow().get(name)?.clone(), place.clone())));
        let cluster = WorkerCluster::new(entry, stats, seed, local);
        self.clusters.borrow_mut().insert(key, cluster.clone());
        Some(cluster)
    }

    fn stats<S: Scope + Default + 'static>(
        &self,
        map: &RefCell<HashMap<ArcStr, Arc<S>>>,
        kind: Kind,
        name: &ArcStr,
    ) -> Arc<S> {
        if let Some(stats) = map.borrow().get(name) {
            return stats.clone();
        }
        let stats = Arc::new(S::default());
        self.shared.registry.add(kind, name.clone(), stats.clone());
        map.borrow_mut().insert(name.clone(), stats.clone());
        stats
    }

    /// Requests of a virtual cluster or a route, by its place among the statistics.
    pub(crate) fn request_stats(&self, name: &ArcStr) -> Arc<RequestStats> {
        self.stats(&self.requests, Kind::VirtualHost, name)
    }

    /// A cluster's answers that count once more with this in front of their names. `None`: requests name these, and have named
    /// too many, or one that is too long.
    pub(crate) fn answers(&self, cluster: &ArcStr, prefix: String) -> Option<Arc<Answers>> {
        let mut all = self.answers.borrow_mut();
        let key = (cluster.clone(), prefix);
        if let Some(answers) = all.get(&key) {
            return Some(answers.clone());
        }
        if all.len() >= MOST_ANSWERS || key.1.len() > LONGEST_ANSWERS {
            return None;
        }
        let answers = Arc::new(Answers::new(&key.1));
        self.shared.registry.add(Kind::Cluster, key.0.clone(), answers.clone());
        all.insert(key, answers.clone());
        Some(answers)
    }

    pub(crate) fn http_stats(&self, prefix: &ArcStr) -> Arc<HttpStats> {
        self.stats(&self.http, Kind::Http, prefix)
    }

    pub(crate) fn tcp_stats(&self, prefix: &ArcStr) -> Arc<TcpStats> {
        self.stats(&self.tcp, Kind::Tcp, prefix)
    }

    pub(crate) fn listener_stats(&self, prefix: &ArcStr) -> Arc<ListenerStats> {
        if let Some(stats) = self.listener.borrow().get(prefix) {
            return stats.clone();
        }
        let stats = self.stats(&self.listener, Kind::Listener, prefix);
        let own = OfThread(stats.clone(), format!("worker_{}", self.index));
        self.shared.registry.add(Kind::Listener, prefix.clone(), Arc::new(own));
        stats
    }

    /// Answers of a connection manager on this listener.
    pub(crate) fn listener_http_stats(&self, listener: &ArcStr, manager: &ArcStr) -> Arc<ListenerHttpStats> {
        let key = (listener.clone(), manager.clone());
        if let Some(stats) = self.listener_http.borrow().get(&key) {
            return stats.clone();
        }
        let stats = Arc::new(ListenerHttpStats::default());
        let named = OfManager(stats.clone(), manager.clone());
        self.shared.registry.add(Kind::Listener, listener.clone(), Arc::new(named));
        self.listener_http.borrow_mut().insert(key, stats.clone());
        stats
    }

    /// The one copy of a workload.
    pub(crate) fn intern(&self, workload: Workload) -> Arc<Workload> {
        let mut known = self.workloads.borrow_mut();
        if let Some(same) = known.get(&workload) {
            return same.clone();
        }
        if known.len() >= MAX_WORKLOADS {
            // Peers must not fill the memory: the rest is unknown.
            return self.shared.identity.unknown.clone();
        }
        let fresh = Arc::new(workload);
        known.insert(fresh.clone());
        fresh
    }

    /// Keeps a timer while there are connections. A timer that becomes the next one to fire wakes the runtime by a system
    /// call, and then by another; behind this one the timeouts of connections cost neither.
    pub(crate) fn tick(self: &Rc<Self>) {
        if self.ticking.replace(true) {
            return;
        }
        let this = Rc::downgrade(self);
        // Nobody waits for it: it ends with the last connection.
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(TICK).await;
                let Some(worker) = this.upgrade() else { return };
                if worker.connections.get() == 0 {
                    worker.ticking.set(false);
                    return;
                }
            }
        });
    }

    /// Counters with names from configuration.
    pub(crate) fn named_stats(&self) -> &Named {
        &self.plain.other
    }

    /// Streams of clients (`http2.streams_active`).
    pub(crate) fn h2_streams(&self) -> &Gauge {
        &self.plain.http2_streams_active
    }

    fn set_clusters(&self, table: Arc<Clusters>) {
        let mut gone = Vec::new();
        self.clusters.borrow_mut().retain(|name, cluster| {
            let keep = table.get(name).is_some_and(|entry| Arc::ptr_eq(entry, &cluster.entry));
            if !keep {
                gone.push(cluster.clone());
            }
            keep
        });
        // The registry has forgotten them with the cluster.
        let in_use: HashSet<&ArcStr> = table.values().map(|entry| &entry.cluster.stat_name).collect();
        self.cluster_stats.borrow_mut().retain(|name, _| in_use.contains(name));
        // Those of a cluster that comes back are made again.
        let is_gone =
            |name: &ArcStr| gone.iter().any(|cluster: &Rc<WorkerCluster>| cluster.config().stat_name == *name);
        self.answers.borrow_mut().retain(|(name, _), _| !is_gone(name));
        *self.table.borrow_mut() = table;
        self.table_changes.set(self.table_changes.get() + 1);
        for cluster in gone {
            cluster.retire();
        }
    }

    /// The registry has forgotten them: who counts there again makes them anew.
    fn forget_stats(&self, kind: Kind, name: &ArcStr) {
        match kind {
            Kind::Http => {
                self.http.borrow_mut().remove(name);
                // Its filters' counters are made with it.
                self.touched.borrow_mut().clear();
            }
            Kind::Tcp => {
                self.tcp.borrow_mut().remove(name);
            }
            _ => {
                self.listener.borrow_mut().remove(name);
                self.listener_http.borrow_mut().retain(|(listener, _), _| listener != name);
            }
        }
    }

    fn drain_cluster(&self, name: &ArcStr) {
        // It is made again with the next request.
        let cluster = self.clusters.borrow_mut().remove(name);
        if let Some(cluster) = cluster {
            self.table_changes.set(self.table_changes.get() + 1);
            cluster.retire();
        }
    }

    fn take_endpoints(&self, name: &ArcStr) {
        let cluster = self.clusters.borrow().get(name).cloned();
        if let Some(cluster) = cluster {
            cluster.refresh();
        }
    }

    fn listen(self: &Rc<Self>, name: ArcStr, bound: Bound) {
        match downstream::accept_on(self, &name, bound) {
            Ok(handle) => self.accepting.borrow_mut().entry(name).or_default().push(handle),
            Err(e) => tracing::error!(listener = %name, error = %e, "cannot accept"),
        }
    }

    fn stop_listening(&self, name: &ArcStr) {
        for handle in self.accepting.borrow_mut().remove(name).unwrap_or_default() {
            handle.abort();
        }
    }
}

/// Most timeouts of connections are not shorter.
const TICK: Duration = Duration::from_secs(1);

/// Workloads a worker tells apart.
const MAX_WORKLOADS: usize = 10_000;

/// How long a worker waits for connections to write their logs when the process ends, after they were cut off.
const LAST_WORDS: Duration = Duration::from_millis(100);
const SOON: Duration = Duration::from_millis(1);

/// Starts a worker's thread.
pub(crate) fn spawn(
    shared: Arc<Shared>,
    index: usize,
) -> std::io::Result<(mpsc::UnboundedSender<Command>, std::thread::JoinHandle<()>)> {
    // Unbounded: commands come from configuration changes only, and must not block the control thread.
    let (sender, mut commands) = mpsc::unbounded_channel();
    let thread = std::thread::Builder::new().name(format!("proxy-{index}")).stack_size(1 << 20).spawn(move || {
        let runtime =
            match tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
                Ok(runtime) => runtime,
                Err(e) => {
                    tracing::error!(error = %e, "cannot start a worker");
                    return;
                }
            };
        // Requests free what the next ones need.
        let _keeping = lifecycle::blocks::keep();
        let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), index);
        let worker = Worker::new(shared, index, seed);
        runtime.block_on(async {
            while let Some(command) = commands.recv().await {
                match command {
                    Command::Listen(name, bound) => worker.listen(name, bound),
                    Command::FetchKeys(http) => crate::hcm::fetch_ahead(&worker, &http),
                    Command::StopListening(name) => worker.stop_listening(&name),
                    Command::Clusters(table) => worker.set_clusters(table),
                    Command::ForgetStats(kind, name) => worker.forget_stats(kind, &name),
                    Command::DrainCluster(name) => worker.drain_cluster(&name),
                    Command::Endpoints(name) => worker.take_endpoints(&name),
                    Command::Shutdown => break,
                }
            }
            let names: Vec<_> = worker.accepting.borrow().keys().cloned().collect();
            for name in names {
                worker.stop_listening(&name);
            }
            let last = tokio::time::Instant::now() + LAST_WORDS;
            while worker.connections.get() > 0 && tokio::time::Instant::now() < last {
                tokio::time::sleep(SOON).await;
            }
        });
        worker.logs.flush();
        drop(runtime);
        worker.logs.flush();
    })?;
    Ok((sender, thread))
}
