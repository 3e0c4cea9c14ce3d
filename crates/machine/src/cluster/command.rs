//! What the cluster can be asked to do.

use std::net::IpAddr;
use std::path::PathBuf;

use manifest::Document;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::oneshot;

use super::Cluster;
use crate::clock;
use crate::container::enter::Enter;
use crate::objects::{Applied, Id};
use crate::plane::{Change, ProxyState, Rotation};
use crate::pod::state::Role;
use crate::pod::{self};

/// A request with the place its answer goes to.
pub(crate) enum Command {
    Apply {
        documents: Vec<Document>,
        /// Only say what would be done.
        dry_run: bool,
        reply: oneshot::Sender<Report>,
    },
    Delete {
        ids: Vec<Id>,
        reply: oneshot::Sender<Report>,
    },
    Ps {
        reply: oneshot::Sender<Vec<PodRow>>,
    },
    Find {
        pod: String,
        namespace: Option<String>,
        container: Option<String>,
        reply: oneshot::Sender<Result<Found, String>>,
    },
    RunCron {
        name: String,
        namespace: String,
        reply: oneshot::Sender<Result<String, String>>,
    },
    Objects {
        reply: oneshot::Sender<crate::ask::Objects>,
    },
    /// Files for a machine that joins.
    Workload {
        namespace: String,
        group: String,
        reply: oneshot::Sender<Result<std::collections::BTreeMap<String, String>, String>>,
    },
    RotateRoot {
        step: Rotation,
        reply: oneshot::Sender<Result<(), String>>,
    },
    ShutDown,
}

/// What an apply or delete did.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// `virtualservice/reviews configured`
    pub(crate) lines: Vec<String>,
    /// What was to be deleted and is not there: `virtualservice/reviews`
    #[serde(default)]
    pub(crate) missing: Vec<String>,
    /// Revision of the control plane that holds the change.
    pub(crate) revision: u64,
}

/// One line of `ps`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PodRow {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) app: String,
    pub(crate) version: String,
    pub(crate) ready: usize,
    pub(crate) containers: usize,
    /// All that should run is ready, or the pod has completed.
    pub(crate) settled: bool,
    pub(crate) status: String,
    pub(crate) restarts: u32,
    pub(crate) age: String,
    pub(crate) ips: Vec<IpAddr>,
    /// Process 1 of a running container, as the host numbers it: a way into the pod's namespaces for nsenter(1).
    pub(crate) pid: Option<i32>,
    pub(crate) sidecar: Option<String>,
    pub(crate) message: Option<String>,
}

/// A container that `exec` and `logs` mean.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Found {
    pub(crate) pod: String,
    pub(crate) namespace: String,
    pub(crate) container: String,
    pub(crate) log: PathBuf,
    /// `None` while it does not run.
    pub(crate) enter: Option<Enter>,
}

impl Cluster {
    pub(super) async fn command(&mut self, command: Command) {
        match command {
            Command::Apply { documents, dry_run: true, reply } => {
                let would = |document: &Document| {
                    let (id, applied) = self.objects.would_apply(document);
                    format!("{id} {} (dry run)", applied.word())
                };
                let lines = documents.iter().map(would).collect();
                let _ = reply.send(Report { lines, revision: self.revision, ..Report::default() });
            }
            Command::Apply { documents, dry_run: false, reply } => {
                let lines = self.apply(documents);
                self.settle().await;
                let _ = reply.send(Report { lines, revision: self.revision, ..Report::default() });
            }
            Command::Delete { ids, reply } => {
                let mut report = Report::default();
                for id in &ids {
                    match self.delete(id) {
                        true => report.lines.push(format!("{id} deleted")),
                        false => report.missing.push(id.to_string()),
                    }
                }
                self.settle().await;
                report.revision = self.revision;
                let _ = reply.send(report);
            }
            Command::Ps { reply } => {
                let _ = reply.send(self.rows());
            }
            Command::Objects { reply } => {
                let _ = reply.send(self.all_objects());
            }
            Command::Find { pod, namespace, container, reply } => {
                let _ = reply.send(self.find(&pod, namespace.as_deref(), container.as_deref()));
            }
            Command::RunCron { name, namespace, reply } => {
                let id = Id { kind: "CronJob".to_owned(), namespace, name };
                let outcome = match self.objects.workload(&id).map(crate::workload::Workload::job_of_cron) {
                    Some(job) => {
                        let name = job.name.clone();
                        self.objects.add_workload(job);
                        Ok(name)
                    }
                    None => Err(format!("there is no {id}")),
                };
                let _ = reply.send(outcome);
            }
            Command::Workload { namespace, group, reply } => {
                let gateway = self.parts.network.gateway().to_string();
                let _ = reply.send(self.parts.plane.workload_files(&namespace, &group, &gateway));
            }
            Command::RotateRoot { step, reply } => {
                let done = self.parts.plane.rotate_root(step);
                self.data.send_replace(std::sync::Arc::new(self.objects.data(&self.parts.plane.root_pem())));
                let _ = reply.send(done);
            }
            Command::ShutDown => self.shut_down(),
        }
    }

    /// Takes documents in: namespaces first, so that those which use them find their labels.
    fn apply(&mut self, mut documents: Vec<Document>) -> Vec<String> {
        documents.sort_by_key(|document| document.kind() != "Namespace");
        let mut lines = Vec::new();
        for document in documents {
            let (id, applied, document) = self.objects.apply(document);
            lines.push(format!("{id} {}", applied.word()));
            if applied != Applied::Unchanged {
                self.tell(document);
            }
        }
        for namespace in self.objects.undeclared() {
            let mut labels = json!({"kubernetes.io/metadata.name": namespace});
            if self.parts.inject_undeclared {
                labels["istio-injection"] = json!("enabled");
            }
            let value =
                json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}});
            let (_, _, document) = self.objects.apply(Document::from_value(value, "<cluster>"));
            self.tell(document);
        }
        self.data.send_replace(std::sync::Arc::new(self.objects.data(&self.parts.plane.root_pem())));
        lines
    }

    /// Queues a document for the control plane.
    fn tell(&mut self, document: Document) {
        if let Some(document) = self.filled_in(document) {
            self.pending.push(Change::Apply(Box::new(document)));
        }
    }

    /// All that the control plane was told.
    fn all_objects(&mut self) -> crate::ask::Objects {
        let written: Vec<Document> = self.objects.documents().into_iter().cloned().collect();
        let mut documents: Vec<Document> = written.into_iter().filter_map(|d| self.filled_in(d)).collect();
        documents.extend(self.slices.values().map(|slice| Document::from_value(slice.clone(), "<cluster>")));
        documents.extend(self.pods.values().map(|entry| self.with_status(entry)));
        crate::ask::Objects { documents, dual_stack: self.parts.network.dual_stack() }
    }

    /// A document with what the API server would have filled in; `None` for kinds that are told as they are, not as they are wished for.
    fn filled_in(&mut self, mut document: Document) -> Option<Document> {
        match document.kind() {
            "Pod" | "Endpoints" | "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" | "Job" | "CronJob" => {
                return None;
            }
            "Service" => {
                let key = (document.namespace().unwrap_or("default").to_owned(), document.name().to_owned());
                let dual = self.parts.network.dual_stack();
                let ips = match self.objects.service(&key.0, &key.1) {
                    Some(service) => self.addresses.of(&key, service, dual),
                    None => Vec::new(),
                };
                let texts: Vec<String> = ips.iter().map(ToString::to_string).collect();
                if let (Some(first), Some(spec)) =
                    (texts.first(), document.value.get_mut("spec").and_then(|s| s.as_object_mut()))
                {
                    spec.insert("clusterIP".to_owned(), json!(first));
                    spec.insert("clusterIPs".to_owned(), json!(texts));
                }
            }
            _ => {}
        }
        Some(document)
    }

    /// Returns whether it was there.
    fn delete(&mut self, id: &Id) -> bool {
        if !self.objects.delete(id) {
            return false;
        }
        match id.kind.as_str() {
            "Service" => self.addresses.release(&(id.namespace.clone(), id.name.clone())),
            "ConfigMap" | "Secret" => {
                self.data.send_replace(std::sync::Arc::new(self.objects.data(&self.parts.plane.root_pem())));
            }
            _ => {}
        }
        self.problems.remove(id);
        self.pending.push(Change::Delete(id.clone()));
        true
    }

    fn rows(&self) -> Vec<PodRow> {
        let proxies = self.parts.plane.proxies();
        let mut rows: Vec<PodRow> = self.pods.iter().map(|(key, entry)| row(key, entry, &proxies)).collect();
        for (id, problem) in &self.problems {
            rows.push(PodRow {
                namespace: id.namespace.clone(),
                name: id.name.clone(),
                app: String::new(),
                version: String::new(),
                ready: 0,
                containers: 0,
                settled: false,
                status: "Problem".to_owned(),
                restarts: 0,
                age: String::new(),
                ips: Vec::new(),
                pid: None,
                sidecar: None,
                message: Some(problem.clone()),
            });
        }
        rows
    }

    /// A pod by its name, or by the beginning of its name if only one pod starts so; `kind/name` works for workloads.
    fn find(&self, pod: &str, namespace: Option<&str>, container: Option<&str>) -> Result<Found, String> {
        let wanted = pod.rsplit('/').next().unwrap_or(pod);
        let inside = |ns: &str| namespace.is_none_or(|n| n == ns);
        let exact = self.pods.iter().find(|((ns, name), _)| name == wanted && inside(ns));
        let (key, entry) = match exact {
            Some(found) => found,
            None => {
                let dashed = &format!("{wanted}-");
                let runs = |entry: &super::Entry| entry.handle.as_ref().is_some_and(|handle| !handle.state().stopping);
                let like = |whole: bool| {
                    self.pods.iter().filter(move |((ns, name), entry)| {
                        let fits = match whole {
                            true => entry.owner.name == wanted || name.starts_with(dashed),
                            false => name.starts_with(wanted),
                        };
                        inside(ns) && fits && runs(entry)
                    })
                };
                let has_whole = like(true).next().is_some();
                let mut candidates = like(has_whole);
                let first =
                    candidates.next().ok_or_else(|| format!("there is no pod {pod:?}; `outrigger ps` shows all"))?;
                // Several pods of one workload are alike.
                if let Some(second) = candidates.next()
                    && first.1.owner != second.1.owner
                {
                    return Err(format!("{pod:?} may be {} or {}", first.0.1, second.0.1));
                }
                first
            }
        };
        let handle = entry.handle.as_ref().ok_or_else(|| format!("pod {} has not started yet", key.1))?;
        let state = handle.state();
        let default =
            entry.pod.metadata.annotations.as_ref().and_then(|a| a.get("kubectl.kubernetes.io/default-container"));
        let chosen = match container {
            Some(name) => state.containers.iter().find(|c| c.name == name),
            None => default
                .and_then(|name| state.containers.iter().find(|c| &c.name == name))
                .or_else(|| state.containers.iter().find(|c| c.role == Role::Main && c.name != "istio-proxy"))
                .or_else(|| state.containers.first()),
        };
        let names = || state.containers.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", ");
        let chosen = chosen.ok_or_else(|| format!("pod {} has no such container; it has {}", key.1, names()))?;
        Ok(Found {
            pod: key.1.clone(),
            namespace: key.0.clone(),
            container: chosen.name.clone(),
            log: self.parts.folder.logs().join(format!("{}_{}", key.0, key.1)).join(format!("{}.log", chosen.name)),
            enter: chosen.enter.clone(),
        })
    }
}

fn row(key: &super::Key, entry: &super::Entry, proxies: &[ProxyState]) -> PodRow {
    let label = |name: &str| {
        entry.pod.metadata.labels.as_ref().and_then(|labels| labels.get(name)).cloned().unwrap_or_default()
    };
    let state = entry.handle.as_ref().map(pod::PodHandle::state);
    let (ready, containers) = state.as_ref().map_or((0, 0), pod::state::PodState::ready_count);
    let proxy = proxies.iter().find(|proxy| proxy.pod == key.1 && proxy.namespace == key.0);
    let sidecar = entry.injected.then(|| match proxy {
        Some(proxy) if proxy.synced => "synced".to_owned(),
        Some(proxy) => proxy.trouble.clone().unwrap_or_else(|| "stale".to_owned()),
        None => "-".to_owned(),
    });
    let settled = state.as_ref().is_some_and(|state| state.ready() || state.phase == pod::state::Phase::Succeeded);
    PodRow {
        namespace: key.0.clone(),
        name: key.1.clone(),
        app: label("app"),
        version: label("version"),
        ready,
        containers,
        settled,
        status: state.as_ref().map_or_else(|| "Pending".to_owned(), pod::state::PodState::summary),
        restarts: state.as_ref().map_or(0, pod::state::PodState::restarts),
        age: state.as_ref().map_or_else(String::new, |state| clock::age(state.age())),
        ips: entry.place.ips.clone(),
        pid: state
            .as_ref()
            .and_then(|state| state.containers.iter().find_map(|c| c.enter.as_ref().map(|enter| enter.pid))),
        sidecar,
        message: state.and_then(|state| state.message()),
    }
}
