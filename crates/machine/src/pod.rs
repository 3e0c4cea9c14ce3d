//! One pod: its volumes, its containers in order, their probes, restarts and end. What kubelet does, for one pod per task.

pub(crate) mod command;
mod env;
pub(crate) mod facts;
mod files;
mod hooks;
pub(crate) mod probe;
mod quantity;
mod security;
pub(crate) mod state;
mod supervise;
pub(crate) mod volumes;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Container;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::container::{Exit, Spawner};
use crate::network::Dialer;
use command::Images;
use facts::{Data, Facts};
use probe::Asker;
use state::{Activity, ContainerState, Phase, PodState, Role};
use supervise::Supervisor;
use volumes::{Tokens, Volumes};

/// All that a pod's task needs.
pub(crate) struct Launch {
    pub(crate) facts: Facts,
    pub(crate) data: watch::Receiver<Arc<Data>>,
    pub(crate) netns: netns::Netns,
    pub(crate) spawner: Spawner,
    pub(crate) dialer: Dialer,
    pub(crate) tokens: Arc<dyn Tokens>,
    pub(crate) images: Arc<Images>,
    /// Path of this program.
    pub(crate) program: PathBuf,
    /// `…/pods/UID`, removed with the pod.
    pub(crate) folder: PathBuf,
    /// `…/logs/NAMESPACE_POD`, kept until `down`.
    pub(crate) logs: PathBuf,
    pub(crate) claims: PathBuf,
    /// Address of the cluster's DNS server.
    pub(crate) dns: std::net::IpAddr,
    /// Bumped with every change of any pod's state.
    pub(crate) changed: watch::Sender<u64>,
}

/// A pod's task as the cluster holds it.
pub(crate) struct PodHandle {
    state: Arc<Mutex<PodState>>,
    stop: watch::Sender<Option<Duration>>,
    task: JoinHandle<()>,
    default_grace: Duration,
}

impl PodHandle {
    /// A copy of the pod's state now.
    pub(crate) fn state(&self) -> PodState {
        lock(&self.state).clone()
    }

    /// Starts termination; later calls may only shorten the grace.
    pub(crate) fn stop(&self, grace: Option<Duration>) {
        let grace = grace.unwrap_or(self.default_grace);
        lock(&self.state).stopping = true;
        self.stop.send_if_modified(|current| {
            let shorter = current.is_none_or(|now| grace < now);
            if shorter {
                *current = Some(grace);
            }
            shorter
        });
    }

    /// Waits for the end of the pod's task.
    pub(crate) async fn ended(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "a pod's task failed");
        }
    }
}

/// The lock protects plain data, so a panic elsewhere leaves it usable.
fn lock(state: &Mutex<PodState>) -> MutexGuard<'_, PodState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a pod's task.
pub(crate) fn start(launch: Launch) -> PodHandle {
    let state = Arc::new(Mutex::new(initial_state(&launch.facts)));
    let (stop, stopped) = watch::channel(None);
    let default_grace = launch
        .facts
        .pod
        .spec
        .as_ref()
        .and_then(|spec| spec.termination_grace_period_seconds)
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(Duration::from_secs(30), Duration::from_secs);
    let task = tokio::spawn(run(launch, Arc::clone(&state), stopped));
    PodHandle { state, stop, task, default_grace }
}

fn initial_state(facts: &Facts) -> PodState {
    let spec = facts.pod.spec.as_ref();
    let of = |container: &Container, role| ContainerState {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        role,
        activity: Activity::Waiting { reason: "PodInitializing", message: String::new() },
        last_exit: None,
        restarts: 0,
        started: false,
        ready: false,
        complaint: None,
        enter: None,
    };
    let inits = spec.and_then(|spec| spec.init_containers.as_ref()).into_iter().flatten();
    let mains = spec.map(|spec| spec.containers.as_slice()).unwrap_or_default();
    PodState {
        phase: Phase::Pending,
        initialized: false,
        stopping: false,
        gone: false,
        started_at: SystemTime::now(),
        containers: inits.map(|c| of(c, init_role(c))).chain(mains.iter().map(|c| of(c, Role::Main))).collect(),
    }
}

fn init_role(container: &Container) -> Role {
    if container.restart_policy.as_deref() == Some("Always") { Role::Sidecar } else { Role::Init }
}

/// What all containers of a pod share.
struct Shared {
    facts: Facts,
    data: watch::Receiver<Arc<Data>>,
    netns: netns::Netns,
    spawner: Spawner,
    asker: Asker,
    images: Arc<Images>,
    program: PathBuf,
    folder: PathBuf,
    logs: PathBuf,
    volumes: tokio::sync::Mutex<Volumes>,
    state: Arc<Mutex<PodState>>,
    changed: watch::Sender<u64>,
}

impl Shared {
    /// Changes the pod's state and tells the cluster.
    fn update(&self, change: impl FnOnce(&mut PodState)) {
        change(&mut lock(&self.state));
        self.changed.send_modify(|count| *count += 1);
    }

    fn update_container(&self, name: &str, change: impl FnOnce(&mut ContainerState)) {
        self.update(|pod| {
            if let Some(container) = pod.containers.iter_mut().find(|c| c.name == name) {
                change(container);
            }
        });
    }

    fn all_waiting(&self, reason: &'static str, message: &str) {
        self.update(|pod| {
            for container in &mut pod.containers {
                container.activity = Activity::Waiting { reason, message: message.to_owned() };
            }
        });
    }
}

async fn run(launch: Launch, state: Arc<Mutex<PodState>>, mut stopped: watch::Receiver<Option<Duration>>) {
    let ip = launch.facts.ips.first().copied().unwrap_or(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
    let shared = Arc::new(Shared {
        volumes: tokio::sync::Mutex::new(Volumes::new(&launch.folder, &launch.claims, Arc::clone(&launch.tokens))),
        facts: launch.facts,
        data: launch.data,
        netns: launch.netns,
        spawner: launch.spawner,
        asker: Asker { dialer: launch.dialer, ip },
        images: launch.images,
        program: launch.program,
        folder: launch.folder,
        logs: launch.logs,
        state,
        changed: launch.changed,
    });
    let finished = match prepare(&shared, launch.dns, &mut stopped).await {
        Some(renewal) => {
            let keep_fresh = refresh(Arc::clone(&shared), renewal);
            tokio::select! {
                outcome = containers(&shared, &stopped) => outcome,
                never = keep_fresh => match never {},
            }
        }
        None => Phase::Failed,
    };
    shared.update(|pod| {
        pod.phase = finished;
        pod.gone = pod.stopping;
    });
    if !lock(&shared.state).stopping {
        // Completed pods stay visible until they are deleted.
        let _ = stopped.wait_for(Option::is_some).await;
        shared.update(|pod| pod.gone = true);
    }
}

/// Makes files and volumes, again and again until it works (a missing config map may be applied later).
async fn prepare(
    shared: &Shared,
    dns: std::net::IpAddr,
    stopped: &mut watch::Receiver<Option<Duration>>,
) -> Option<Option<Duration>> {
    let mut data = shared.data.clone();
    loop {
        let current = Arc::clone(&data.borrow_and_update());
        let made = match files::write(&shared.facts, &shared.folder, &shared.logs, dns) {
            Ok(()) => shared.volumes.lock().await.write(&shared.facts, &current),
            Err(error) => Err(error),
        };
        match made {
            Ok(renewal) => return Some(renewal),
            Err(error) => shared.all_waiting("ContainerCreating", &format!("pod {}: {error}", shared.facts.name())),
        }
        tokio::select! {
            changed = data.changed() => changed.ok()?,
            () = tokio::time::sleep(Duration::from_secs(10)) => {}
            _ = stopped.wait_for(Option::is_some) => return None,
        }
    }
}

/// Renews tokens in time and follows changes of config maps and secrets.
async fn refresh(shared: Arc<Shared>, mut renewal: Option<Duration>) -> std::convert::Infallible {
    let mut data = shared.data.clone();
    loop {
        let due = renewal.unwrap_or(Duration::from_secs(3600));
        tokio::select! {
            changed = data.changed() => if changed.is_err() {
                std::future::pending::<()>().await;
            },
            () = tokio::time::sleep(due) => {}
        }
        let current = Arc::clone(&data.borrow_and_update());
        match shared.volumes.lock().await.write(&shared.facts, &current) {
            Ok(next) => renewal = next,
            Err(error) => {
                tracing::warn!(pod = shared.facts.name(), error, "volumes not brought up to date");
                renewal = Some(Duration::from_secs(10));
            }
        }
    }
}

/// Runs the containers in order and returns how the pod ended.
async fn containers(shared: &Arc<Shared>, stopped: &watch::Receiver<Option<Duration>>) -> Phase {
    let Some(spec) = shared.facts.pod.spec.as_ref() else {
        return Phase::Failed;
    };
    // Sidecars outlive the main containers: they have a stop signal of their own.
    let (stop_sidecars, sidecars_stopped) = watch::channel(None);
    let mut sidecars = JoinSet::new();
    let mut initialized = true;
    for container in spec.init_containers.iter().flatten() {
        let role = init_role(container);
        let supervisor = Supervisor::new(shared, container, role);
        if role == Role::Sidecar {
            let mut settled = supervisor.settled();
            sidecars.spawn(supervisor.run(sidecars_stopped.clone()));
            let mut stopped = stopped.clone();
            tokio::select! {
                _ = settled.wait_for(|done| *done) => {}
                _ = stopped.wait_for(Option::is_some) => {}
            }
        } else if supervisor.run(stopped.clone()).await != Some(Exit::Code(0)) {
            initialized = false;
        }
        if stopped.borrow().is_some() || !initialized {
            initialized = false;
            break;
        }
    }
    let mut outcome = Phase::Failed;
    if initialized {
        shared.update(|pod| {
            pod.initialized = true;
            pod.phase = Phase::Running;
        });
        let mut mains = JoinSet::new();
        for container in &spec.containers {
            let supervisor = Supervisor::new(shared, container, Role::Main);
            let mut settled = supervisor.settled();
            mains.spawn(supervisor.run(stopped.clone()));
            // As kubelet: the next container waits for this one's start and postStart hook.
            let _ = settled.wait_for(|done| *done).await;
        }
        let mut all_good = true;
        while let Some(end) = mains.join_next().await {
            all_good &= matches!(end, Ok(Some(Exit::Code(0))));
        }
        if all_good {
            outcome = Phase::Succeeded;
        }
    }
    let grace = stopped.borrow().unwrap_or(Duration::from_secs(30));
    stop_sidecars.send_replace(Some(grace));
    while sidecars.join_next().await.is_some() {}
    outcome
}
