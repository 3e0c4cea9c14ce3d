//! What a pod and its containers are doing, as `ps` shows it and as the pod's `status` tells the control plane.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde_json::{Value, json};

use crate::clock;
use crate::container::Exit;
use crate::container::enter::Enter;

/// Which part a container plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Role {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container with `restartPolicy: Always`.
    Sidecar,
    Main,
}

/// A pod's phase (core/v1 `PodPhase`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl Phase {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

/// What a container is doing right now.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Activity {
    /// Not running, and why (`PodInitializing`, `CrashLoopBackOff`, `ErrImagePull`, …).
    Waiting {
        reason: &'static str,
        message: String,
    },
    Running {
        since: SystemTime,
    },
    Terminated {
        exit: Exit,
        at: SystemTime,
    },
}

/// One container of a pod.
#[derive(Clone, Debug)]
pub(crate) struct ContainerState {
    pub(crate) name: String,
    pub(crate) image: String,
    pub(crate) role: Role,
    pub(crate) activity: Activity,
    pub(crate) last_exit: Option<Exit>,
    pub(crate) restarts: u32,
    /// The startup probe succeeded, or there is none and it runs.
    pub(crate) started: bool,
    pub(crate) ready: bool,
    /// Why the last probe failed, for `ps`.
    pub(crate) complaint: Option<String>,
    /// How to run a program inside, while it runs.
    pub(crate) enter: Option<Enter>,
}

/// A pod.
#[derive(Clone, Debug)]
pub(crate) struct PodState {
    pub(crate) phase: Phase,
    pub(crate) initialized: bool,
    pub(crate) stopping: bool,
    /// The pod's processes have all ended and it can be forgotten.
    pub(crate) gone: bool,
    pub(crate) started_at: SystemTime,
    pub(crate) containers: Vec<ContainerState>,
}

impl PodState {
    /// All long-running containers are ready.
    pub(crate) fn ready(&self) -> bool {
        self.phase == Phase::Running
            && !self.stopping
            && self.containers.iter().filter(|c| c.role != Role::Init).all(|container| container.ready)
    }

    /// (ready, all) as `kubectl get pods` counts them: sidecars count, init containers do not.
    pub(crate) fn ready_count(&self) -> (usize, usize) {
        let counted = || self.containers.iter().filter(|c| c.role != Role::Init);
        (counted().filter(|c| c.ready).count(), counted().count())
    }

    pub(crate) fn restarts(&self) -> u32 {
        self.containers.iter().map(|c| c.restarts).sum()
    }

    pub(crate) fn age(&self) -> Duration {
        self.started_at.elapsed().unwrap_or_default()
    }

    /// The `STATUS` column: what keeps the pod from running, or its phase.
    pub(crate) fn summary(&self) -> String {
        if self.stopping {
            return "Terminating".to_owned();
        }
        let inits = self.containers.iter().filter(|c| c.role != Role::Main).count();
        for (index, container) in self.containers.iter().enumerate() {
            match &container.activity {
                Activity::Waiting { reason, .. } if *reason != "PodInitializing" && *reason != "ContainerCreating" => {
                    return if container.role == Role::Main { (*reason).to_owned() } else { format!("Init:{reason}") };
                }
                Activity::Terminated { exit: Exit::Code(0), .. } => {}
                _ if container.role == Role::Init && !self.initialized && self.phase == Phase::Pending => {
                    return format!("Init:{index}/{inits}");
                }
                _ => {}
            }
        }
        match self.phase {
            Phase::Succeeded => "Completed".to_owned(),
            Phase::Failed => "Error".to_owned(),
            phase => phase.as_str().to_owned(),
        }
    }

    /// The sentence of the first container in trouble.
    pub(crate) fn message(&self) -> Option<String> {
        self.containers.iter().find_map(|container| match &container.activity {
            Activity::Waiting { message, .. } if !message.is_empty() => Some(message.clone()),
            Activity::Running { .. } if !container.ready && container.role != Role::Init => {
                container.complaint.as_ref().map(|complaint| format!("container {}: {complaint}", container.name))
            }
            _ => None,
        })
    }

    /// The pod's `status` as kubelet would write it.
    pub(crate) fn status(&self, ips: &[IpAddr], node_ip: IpAddr) -> Value {
        let condition = |kind: &str, holds: bool| json!({"type": kind, "status": if holds { "True" } else { "False" }});
        let ready = self.ready();
        let statuses = |main: bool| {
            self.containers
                .iter()
                .filter(|c| (c.role == Role::Main) == main)
                .map(ContainerState::status)
                .collect::<Vec<_>>()
        };
        json!({
            "phase": self.phase.as_str(),
            "hostIP": node_ip.to_string(),
            "hostIPs": [{"ip": node_ip.to_string()}],
            "podIP": ips.first().map(ToString::to_string),
            "podIPs": ips.iter().map(|ip| json!({"ip": ip.to_string()})).collect::<Vec<_>>(),
            "startTime": clock::rfc3339(self.started_at),
            "conditions": [
                condition("PodScheduled", true),
                condition("Initialized", self.initialized),
                condition("ContainersReady", ready),
                condition("Ready", ready),
            ],
            "containerStatuses": statuses(true),
            "initContainerStatuses": statuses(false),
        })
    }
}

impl ContainerState {
    fn status(&self) -> Value {
        let state = match &self.activity {
            Activity::Waiting { reason, message } => json!({"waiting": {"reason": reason, "message": message}}),
            Activity::Running { since } => json!({"running": {"startedAt": clock::rfc3339(*since)}}),
            Activity::Terminated { exit, at } => {
                let reason = if exit.code() == 0 { "Completed" } else { "Error" };
                json!({"terminated": {"exitCode": exit.code(), "reason": reason, "finishedAt": clock::rfc3339(*at)}})
            }
        };
        // As kubelets say it of init containers that have done their work.
        let is_done =
            self.role != Role::Main && matches!(&self.activity, Activity::Terminated { exit, .. } if exit.code() == 0);
        json!({
            "name": self.name,
            "image": self.image,
            "imageID": "",
            "ready": self.ready || is_done,
            "started": self.started,
            "restartCount": self.restarts,
            "state": state,
        })
    }
}
