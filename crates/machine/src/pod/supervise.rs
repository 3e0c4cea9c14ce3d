//! One container from its first start to its last end: hooks, probes, restarts.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::{Container, Probe};
use rustix::process::Signal;
use tokio::sync::watch;
use tokio::time::Instant;

use super::probe::{Counter, Timing};
use super::state::{Activity, Role};
use super::{Shared, command, env, files, security};
use crate::container::enter::Enter;
use crate::container::{Exit, Running, Spec, StartError};

/// Kubelet's crash back-off: doubles from 10 s to 5 min, forgotten after 10 min of running.
const BACKOFF_FIRST: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_secs(300);
const BACKOFF_FORGET: Duration = Duration::from_secs(600);
/// While a container is young, it is asked this often until the first success.
///
/// DIFFERS: kubelet asks once per period from the start. Early failures do not count here, so thresholds mean the same.
const EAGER_PERIOD: Duration = Duration::from_millis(100);
const EAGER_FOR: Duration = Duration::from_secs(10);
/// Failures of a container that has just started are no news.
const STARTING: Duration = Duration::from_secs(2);
/// What kubelet leaves a container after a preStop hook has used up the grace.
const GRACE_MIN: Duration = Duration::from_secs(2);

/// How long clients have to learn that a pod is no endpoint any more before its applications are told to end.
///
/// DIFFERS: kubelet signals at once, and what clients send until they know is refused by applications that end at once.
const HEAD_START: Duration = Duration::from_millis(500);

/// Looks after one container.
pub(super) struct Supervisor {
    shared: Arc<Shared>,
    container: Container,
    role: Role,
    settled: watch::Sender<bool>,
}

/// Why a container did not start.
struct Trouble {
    reason: &'static str,
    message: String,
}

enum End {
    Exited(Exit),
    Unhealthy(String),
    Stop,
}

impl Supervisor {
    pub(super) fn new(shared: &Arc<Shared>, container: &Container, role: Role) -> Self {
        Self { shared: Arc::clone(shared), container: container.clone(), role, settled: watch::Sender::new(false) }
    }

    /// Becomes true when the next container may start: after postStart, and for sidecars after the startup probe.
    pub(super) fn settled(&self) -> watch::Receiver<bool> {
        self.settled.subscribe()
    }

    /// Runs the container until its policy says it is done, or it is stopped. Returns how it ended, `None` if it never ran.
    pub(super) async fn run(self, mut stopped: watch::Receiver<Option<Duration>>) -> Option<Exit> {
        let mut crashes = 0u32;
        let mut last = None;
        loop {
            if stopped.borrow().is_some() {
                self.settled.send_replace(true);
                return last;
            }
            let began = Instant::now();
            match self.start().await {
                Err(trouble) => {
                    self.waiting(trouble.reason, trouble.message);
                    if self.role == Role::Main {
                        self.settled.send_replace(true);
                    }
                    crashes = crashes.saturating_add(1);
                    // There is no first free retry for what cannot start at all.
                    if !pause(backoff(crashes + 1), &mut stopped).await {
                        return last;
                    }
                    continue;
                }
                Ok(running) => {
                    let exit = self.live(&running, &mut stopped).await;
                    self.ended(exit);
                    last = Some(exit);
                }
            }
            if self.role == Role::Main {
                self.settled.send_replace(true);
            }
            if stopped.borrow().is_some() || !self.restarts(last) {
                return last;
            }
            crashes = if began.elapsed() >= BACKOFF_FORGET { 1 } else { crashes.saturating_add(1) };
            let wait = backoff(crashes);
            if !wait.is_zero() {
                let code = last.map_or(0, Exit::code);
                let message = format!(
                    "back-off {} s restarting container {} (exit code {code})",
                    wait.as_secs(),
                    self.container.name
                );
                self.waiting("CrashLoopBackOff", message);
            }
            if !pause(wait, &mut stopped).await {
                return last;
            }
            self.shared.update_container(&self.container.name, |state| state.restarts += 1);
        }
    }

    /// Whether the restart policy wants the container again.
    fn restarts(&self, exit: Option<Exit>) -> bool {
        let policy =
            self.shared.facts.pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()).unwrap_or("Always");
        let failed = exit != Some(Exit::Code(0));
        match (self.role, policy) {
            (Role::Sidecar, _) => true,
            (Role::Init, "Never") => false,
            (Role::Init, _) => failed,
            (Role::Main, "Never") => false,
            (Role::Main, "OnFailure") => failed,
            (Role::Main, _) => true,
        }
    }

    async fn start(&self) -> Result<Running, Trouble> {
        let config = |message| Trouble { reason: "CreateContainerConfigError", message };
        let (shared, container) = (&self.shared, &self.container);
        let data = Arc::clone(&shared.data.borrow());
        let env = env::environment(container, &shared.facts, &data).map_err(config)?;
        let credentials = security::credentials(&shared.facts.pod, container).map_err(config)?;
        let own_mounts = shared.volumes.lock().await.mounts(container, &env).map_err(config)?;
        let mounted: Vec<String> = own_mounts.iter().map(|mount| mount.target.clone()).collect();
        let command = env::expand_all(container.command.as_deref().unwrap_or_default(), &env);
        let args = env::expand_all(container.args.as_deref().unwrap_or_default(), &env);
        let argv = command::resolve(container, &command, &args, &mounted, &shared.images)
            .map_err(|message| Trouble { reason: "ErrImagePull", message })?;
        let spec = Spec {
            hostname: shared.facts.hostname(),
            argv,
            env,
            cwd: container.working_dir.clone().filter(|path| !path.is_empty()),
            credentials,
            scratch: shared.folder.join("scratch"),
            read_only_root: container.security_context.as_ref().and_then(|c| c.read_only_root_filesystem) == Some(true),
            mounts: files::mounts(&shared.folder).chain(own_mounts).collect(),
            program: shared.program.clone(),
            privileged: security::privileged(container),
        };
        let failed = |error: &dyn std::fmt::Display| Trouble {
            reason: "RunContainerError",
            message: format!("container {}: {error}", container.name),
        };
        let log = self.log().map_err(|error| failed(&error))?;
        let netns = std::os::fd::AsFd::as_fd(&shared.netns).try_clone_to_owned().map_err(|error| failed(&error))?;
        let running = shared.spawner.start(&spec, netns, log).await.map_err(|error| match &error {
            StartError::Setup(message) => failed(message),
            other => failed(&format_args!(
                "{other}: {}",
                std::error::Error::source(other).map_or_else(String::new, ToString::to_string)
            )),
        })?;
        let enter = Enter {
            pid: running.pid,
            argv: Vec::new(),
            env: spec.env,
            cwd: spec.cwd,
            credentials: spec.credentials,
            user_namespace: false,
        };
        shared.update_container(&container.name, |state| {
            state.activity = Activity::Running { since: SystemTime::now() };
            state.enter = Some(enter);
            state.complaint = None;
        });
        Ok(running)
    }

    fn log(&self) -> std::io::Result<File> {
        let path = self.shared.logs.join(format!("{}.log", self.container.name));
        let log = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        // Programs open /dev/stdout anew, as Envoy does for its access log; container runtimes give its pipe to the user too.
        let (user, group) = security::user(&self.shared.facts.pod, &self.container);
        if let Err(error) = std::os::unix::fs::fchown(&log, Some(user), Some(group)) {
            // In a user namespace there are few users.
            tracing::debug!(%error, container = self.container.name, "the log stays root's");
        }
        Ok(log)
    }

    /// From start to end of one process.
    async fn live(&self, running: &Running, stopped: &mut watch::Receiver<Option<Duration>>) -> Exit {
        let end = tokio::select! {
            biased;
            exit = running.wait() => End::Exited(exit.unwrap_or(Exit::Code(255))),
            why = self.watch_health() => End::Unhealthy(why),
            _ = stopped.wait_for(Option::is_some) => End::Stop,
        };
        match end {
            End::Exited(exit) => exit,
            End::Unhealthy(why) => {
                tracing::info!(
                    pod = self.shared.facts.name(),
                    container = self.container.name,
                    why,
                    "restarting container"
                );
                let why_kept = why.clone();
                self.shared.update_container(&self.container.name, |state| state.complaint = Some(why_kept));
                let spec = self.shared.facts.pod.spec.as_ref();
                let grace = spec
                    .and_then(|spec| spec.termination_grace_period_seconds)
                    .and_then(|s| u64::try_from(s).ok())
                    .map_or(Duration::from_secs(30), Duration::from_secs);
                self.terminate(running, grace, stopped).await
            }
            End::Stop => {
                let grace = stopped.borrow().unwrap_or_default();
                self.terminate(running, grace, stopped).await
            }
        }
    }

    /// preStop, SIGTERM, SIGKILL, within the grace; a shorter grace given meanwhile counts from when it is given.
    async fn terminate(
        &self,
        running: &Running,
        grace: Duration,
        stopped: &mut watch::Receiver<Option<Duration>>,
    ) -> Exit {
        self.shared.update_container(&self.container.name, |state| state.ready = false);
        let orderly = async {
            let deadline = Instant::now() + grace;
            if self.role == Role::Main && grace >= 4 * HEAD_START {
                tokio::select! {
                    () = tokio::time::sleep(HEAD_START) => {}
                    exit = running.wait() => return exit.ok(),
                }
            }
            if let Some(hook) = self.container.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref())
                && !grace.is_zero()
            {
                tokio::select! {
                    result = tokio::time::timeout_at(deadline, self.shared.hook(&self.container, hook)) => {
                        if let Ok(Err(error)) = result {
                            tracing::info!(container = self.container.name, error, "preStop hook failed");
                        }
                    }
                    exit = running.wait() => return exit.ok(),
                }
            }
            running.signal(self.stop_signal());
            let deadline = if grace < GRACE_MIN { deadline } else { deadline.max(Instant::now() + GRACE_MIN) };
            tokio::time::timeout_at(deadline, running.wait()).await.ok().and_then(Result::ok)
        };
        let hurried = async {
            while stopped.changed().await.is_ok() {
                let shorter = stopped.borrow().unwrap_or_default();
                if shorter < grace {
                    running.signal(self.stop_signal());
                    tokio::time::sleep(shorter).await;
                    return;
                }
            }
            std::future::pending::<()>().await;
        };
        let exit = tokio::select! {
            exit = orderly => exit,
            () = hurried => None,
        };
        match exit {
            Some(exit) => exit,
            None => {
                running.signal(Signal::KILL);
                running.wait().await.unwrap_or(Exit::Signal(9))
            }
        }
    }

    fn stop_signal(&self) -> Signal {
        match self.container.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref()) {
            Some("SIGINT") => Signal::INT,
            Some("SIGQUIT") => Signal::QUIT,
            Some("SIGHUP") => Signal::HUP,
            Some("SIGKILL") => Signal::KILL,
            _ => Signal::TERM,
        }
    }

    /// Runs hook and probes; returns, with the reason, only when the container must be killed.
    async fn watch_health(&self) -> String {
        let (shared, container) = (&self.shared, &self.container);
        if let Some(hook) = container.lifecycle.as_ref().and_then(|l| l.post_start.as_ref())
            && let Err(error) = shared.hook(container, hook).await
        {
            return format!("postStart hook failed: {error}");
        }
        if self.role == Role::Main {
            self.settled.send_replace(true);
        }
        if self.role == Role::Init {
            // Init containers have no probes.
            return std::future::pending().await;
        }
        if let Some(probe) = &container.startup_probe
            && let Err(why) = self.until_first(probe, true).await
        {
            return format!("startup probe failed: {why}");
        }
        let has_readiness = container.readiness_probe.is_some();
        shared.update_container(&container.name, |state| {
            state.started = true;
            state.ready = !has_readiness;
        });
        self.settled.send_replace(true);
        let liveness = async {
            match &container.liveness_probe {
                Some(probe) => format!("liveness probe failed: {}", self.until_failed(probe).await),
                None => std::future::pending().await,
            }
        };
        let readiness = async {
            match &container.readiness_probe {
                Some(probe) => self.track_readiness(probe).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            why = liveness => why,
            never = readiness => match never {},
        }
    }

    /// Asks until success; with `counting`, gives up after the failure threshold.
    async fn until_first(&self, probe: &Probe, counting: bool) -> Result<(), String> {
        let timing = Timing::of(probe);
        tokio::time::sleep(timing.initial_delay).await;
        let began = Instant::now();
        let mut failures = 0;
        loop {
            match self.shared.probe(&self.container, probe).await {
                Ok(()) => return Ok(()),
                Err(why) => {
                    if began.elapsed() >= STARTING {
                        let kept = why.clone();
                        self.shared.update_container(&self.container.name, |state| state.complaint = Some(kept));
                    }
                    if began.elapsed() < EAGER_FOR.min(timing.period * timing.failure_threshold.saturating_sub(1)) {
                        tokio::time::sleep(EAGER_PERIOD.min(timing.period)).await;
                        continue;
                    }
                    failures += 1;
                    if counting && failures >= timing.failure_threshold {
                        return Err(why);
                    }
                }
            }
            tokio::time::sleep(timing.period).await;
        }
    }

    async fn until_failed(&self, probe: &Probe) -> String {
        let timing = Timing::of(probe);
        let mut counter = Counter::new(Timing { success_threshold: 1, ..timing });
        tokio::time::sleep(timing.initial_delay).await;
        loop {
            if let Err(why) = self.shared.probe(&self.container, probe).await {
                if counter.add(false) == Some(false) {
                    return why;
                }
            } else {
                counter.add(true);
            }
            tokio::time::sleep(timing.period).await;
        }
    }

    async fn track_readiness(&self, probe: &Probe) -> std::convert::Infallible {
        let timing = Timing::of(probe);
        let mut counter = Counter::new(timing);
        let _ = self.until_first(probe, false).await;
        let mut answer = Ok(());
        loop {
            if let Some(ready) = counter.add(answer.is_ok()) {
                let complaint = answer.err();
                let current =
                    super::lock(&self.shared.state).containers.iter().any(|c| c.name == self.container.name && c.ready);
                if ready != current {
                    self.shared.update_container(&self.container.name, |state| {
                        state.ready = ready;
                        state.complaint = complaint;
                    });
                }
            }
            tokio::time::sleep(timing.period).await;
            answer = self.shared.probe(&self.container, probe).await;
        }
    }

    fn waiting(&self, reason: &'static str, message: String) {
        self.shared.update_container(&self.container.name, |state| {
            state.activity = Activity::Waiting { reason, message };
        });
    }

    fn ended(&self, exit: Exit) {
        self.shared.update_container(&self.container.name, |state| {
            state.activity = Activity::Terminated { exit, at: SystemTime::now() };
            state.last_exit = Some(exit);
            state.ready = false;
            state.started = false;
            state.enter = None;
        });
    }
}

/// The pause before the n-th restart (from 1): the first is free.
fn backoff(restart: u32) -> Duration {
    match restart {
        0 | 1 => Duration::ZERO,
        n => BACKOFF_FIRST.saturating_mul(1 << (n - 2).min(5)).min(BACKOFF_MAX),
    }
}

/// Waits; false when stopped meanwhile.
async fn pause(time: Duration, stopped: &mut watch::Receiver<Option<Duration>>) -> bool {
    tokio::select! {
        () = tokio::time::sleep(time) => true,
        _ = stopped.wait_for(Option::is_some) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_back_off_as_kubelet_does() {
        let pauses: Vec<u64> = (1..9).map(|n| backoff(n).as_secs()).collect();
        assert_eq!(pauses, [0, 10, 20, 40, 80, 160, 300, 300]);
    }
}
