//! Containers as processes: what one is told ([`Spec`]), how it is started ([`Spawner`]), and how it ends ([`Running`]).
//!
//! A container is this program started again (`container-init`) as process 1 of new pid, mount, uts and ipc namespaces. It reads its
//! [`Spec`] from a pipe, builds its view of the file system, gives up rights, and becomes the container's program. A report pipe that
//! closes on exec says that all went well; otherwise it carries one sentence.

pub(crate) mod clone;
pub(crate) mod credentials;
pub(crate) mod enter;
pub(crate) mod init;
pub(crate) mod mounts;

use std::fs::File;
use std::io;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

pub(crate) use clone::Spawner;

/// Everything a container needs to become itself. Crosses from `up` to `container-init` as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// Host name inside; the pod's name.
    pub(crate) hostname: String,
    /// Program and arguments. A program without a slash is looked up in the container's `PATH`, inside the container.
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) cwd: Option<String>,
    pub(crate) credentials: credentials::Credentials,
    /// An empty folder of the host on which the private tmpfs for the overlay is mounted, inside the container's mount namespace only.
    pub(crate) scratch: PathBuf,
    pub(crate) read_only_root: bool,
    /// Bind mounts in mount order.
    pub(crate) mounts: Vec<Mount>,
    /// Path of this program on the host, placed in the container as `outrigger`, `pilot-agent` and `istio-iptables`.
    pub(crate) program: PathBuf,
    /// Kernel settings of the container's own view stay writable and nothing is masked (`privileged: true`).
    pub(crate) privileged: bool,
}

/// One bind mount of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Mount {
    /// A path of the host.
    pub(crate) source: PathBuf,
    /// `subPath` below the source; symbolic links in it cannot leave the source.
    pub(crate) sub_path: Option<String>,
    /// A path in the container.
    pub(crate) target: String,
    pub(crate) read_only: bool,
}

/// How a container's process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    /// The exit code as Kubernetes shows it: 128 + signal for a killed process.
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// A started container process. Dropping it leaves the process alone; `up`'s end kills it (parent death signal).
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) pid: i32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Running {
    /// Waits for the end of the process and collects it.
    pub(crate) async fn wait(&self) -> io::Result<Exit> {
        loop {
            let mut guard = self.pidfd.readable().await?;
            match rustix::process::waitid(
                rustix::process::WaitId::PidFd(self.pidfd.get_ref().as_fd()),
                rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOHANG,
            )? {
                Some(status) => {
                    return Ok(match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => Exit::Code(code),
                        (_, Some(signal)) => Exit::Signal(signal),
                        _ => Exit::Code(255),
                    });
                }
                None => guard.clear_ready(),
            }
        }
    }

    /// Kills the process if it still runs, and sees to it that somebody collects it.
    pub(crate) fn kill_and_forget(&self) {
        self.signal(rustix::process::Signal::KILL);
        let Ok(pidfd) = self.pidfd.get_ref().try_clone() else { return };
        // Detached on purpose: it ends as soon as the kernel has finished the kill.
        tokio::task::spawn_blocking(move || {
            let _ = rustix::process::waitid(
                rustix::process::WaitId::PidFd(pidfd.as_fd()),
                rustix::process::WaitIdOptions::EXITED,
            );
        });
    }

    /// Sends a signal; a process that has ended already is no error.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        if let Err(error) = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), signal)
            && error != rustix::io::Errno::SRCH
        {
            tracing::warn!(pid = self.pid, %error, "cannot signal container process");
        }
    }
}

/// What may go wrong before the container's program runs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("start a process")]
    Clone(#[source] io::Error),
    #[error("{0}")]
    Setup(String),
    #[error("talk to the new process")]
    Pipe(#[source] io::Error),
}

impl Spawner {
    /// Starts a container in network namespace `netns`, its output appended to `log`. Returns once its program runs.
    pub(crate) async fn start(&self, spec: &Spec, netns: OwnedFd, log: File) -> Result<Running, StartError> {
        let job = Job::Start(Box::new(spec.clone()));
        self.launch(job, Some(netns), log.into(), clone::Namespaces::Fresh).await
    }

    /// Runs `argv` inside a running container (hooks and exec probes), its output going to `output`.
    pub(crate) async fn exec(&self, enter: enter::Enter, output: OwnedFd) -> Result<Running, StartError> {
        self.launch(Job::Enter(Box::new(enter)), None, output, clone::Namespaces::Inherited).await
    }

    async fn launch(
        &self,
        job: Job,
        netns: Option<OwnedFd>,
        output: OwnedFd,
        namespaces: clone::Namespaces,
    ) -> Result<Running, StartError> {
        let text = serde_json::to_vec(&job).map_err(|error| StartError::Pipe(error.into()))?;
        let (spec_read, spec_write) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| StartError::Pipe(e.into()))?;
        let (report_read, report_write) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| StartError::Pipe(e.into()))?;
        let child = self
            .clone_process(clone::Request { namespaces, spec: spec_read, report: report_write, netns, output })
            .await
            .map_err(StartError::Clone)?;
        let pidfd = clone::watch(child.pidfd).map_err(StartError::Pipe)?;
        let running = Running { pid: child.pid, pidfd };
        // The set-up takes milliseconds (mounts), and the pipes are small: a blocking thread is simpler than async pipes.
        let report = tokio::task::spawn_blocking(move || -> io::Result<String> {
            let mut spec_write = File::from(spec_write);
            // A child that died at once closes the pipe; its report says why.
            let sent = spec_write.write_all(&text);
            drop(spec_write);
            let mut report = String::new();
            File::from(report_read).take(64 * 1024).read_to_string(&mut report)?;
            if report.is_empty() {
                sent?;
            }
            Ok(report)
        })
        .await
        .map_err(|error| StartError::Setup(error.to_string()))?
        .map_err(StartError::Pipe)?;
        if !report.is_empty() {
            let _ = running.wait().await;
            return Err(StartError::Setup(report));
        }
        Ok(running)
    }
}

/// What the re-executed program is asked to do; read from file descriptor [`clone::SPEC_FD`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    Start(Box<Spec>),
    Enter(Box<enter::Enter>),
}
