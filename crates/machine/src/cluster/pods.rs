//! Keeping pods as the workloads want them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use super::{Cluster, Entry, Key, PlaceState};
use crate::network::{attach, gateway_v4};
use crate::objects::Id;
use crate::plane::{Change, Injected};
use crate::pod::facts::Facts;
use crate::pod::state::Phase;
use crate::pod::{self, Launch};
use crate::services::ServiceView;
use crate::workload::{Controller, Workload};

/// A pod as reconciliation sees it.
struct Seen {
    key: Key,
    current: bool,
    ready: bool,
    /// Ready, and the control plane was told so: clients may know it.
    available: bool,
    phase: Phase,
    ordinal: u32,
}

impl Cluster {
    /// Forgets pods whose processes have ended after a stop.
    pub(super) async fn collect_ended(&mut self) {
        let gone: Vec<Key> = self
            .pods
            .iter()
            .filter(|(_, entry)| entry.handle.as_ref().is_some_and(|handle| handle.state().gone))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            if let Some(entry) = self.pods.remove(&key) {
                self.forget(&key, entry).await;
            }
        }
    }

    async fn forget(&mut self, key: &Key, entry: Entry) {
        let folder = self.pod_folder(&entry.pod);
        if let Some(handle) = entry.handle {
            handle.ended().await;
        }
        self.parts.network.remove_pod(entry.place.slot);
        if let Err(error) = std::fs::remove_dir_all(&folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::debug!(%error, folder = %folder.display(), "pod folder not removed");
        }
        self.pending.push(Change::Delete(Id { kind: "Pod".to_owned(), namespace: key.0.clone(), name: key.1.clone() }));
    }

    fn pod_folder(&self, pod: &Pod) -> std::path::PathBuf {
        self.parts.folder.pods().join(pod.metadata.uid.as_deref().unwrap_or("unknown"))
    }

    /// One step towards what the workloads want; further steps follow the pods' changes.
    pub(super) fn reconcile(&mut self) {
        let workloads: Vec<(Id, Workload)> = self.objects.workloads().map(|(id, w)| (id.clone(), w.clone())).collect();
        let mut seen: BTreeMap<Id, Vec<Seen>> = BTreeMap::new();
        for (key, entry) in &self.pods {
            let state = entry.handle.as_ref().map(pod::PodHandle::state);
            if state.as_ref().is_some_and(|state| state.stopping) {
                continue;
            }
            let current =
                self.objects.workload(&entry.owner).map(|workload| workload.hash.as_str()) == Some(&entry.hash);
            seen.entry(entry.owner.clone()).or_default().push(Seen {
                key: key.clone(),
                current,
                ready: state.as_ref().is_some_and(pod::state::PodState::ready),
                available: state.as_ref().is_some_and(pod::state::PodState::ready)
                    && entry.told.is_some_and(|(ready, _)| ready),
                phase: state.map_or(Phase::Pending, |state| state.phase),
                ordinal: entry.ordinal,
            });
        }
        for (id, workload) in &workloads {
            let pods = seen.remove(id).unwrap_or_default();
            match &workload.controller {
                Controller::Replicas | Controller::Daemon => self.replicas(id, workload, &pods),
                Controller::Stateful { parallel } => self.stateful(id, workload, pods, *parallel),
                Controller::Job { completions, parallelism, backoff_limit } => {
                    self.job(id, workload, &pods, (*completions, *parallelism, *backoff_limit));
                }
                Controller::Pod => self.bare(id, workload, &pods),
                Controller::Cron => {}
            }
        }
        for orphan in seen.into_values().flatten() {
            self.stop(&orphan.key);
        }
    }

    /// New pods as far as the strategy's surge allows; old ones go as far as available new ones stand in for them.
    ///
    /// Source: kubernetes `pkg/controller/deployment/rolling.go`.
    fn replicas(&mut self, id: &Id, workload: &Workload, pods: &[Seen]) {
        let wanted = workload.replicas as usize;
        let rolling = workload.rolling();
        let (mut current, mut old): (Vec<&Seen>, Vec<&Seen>) = pods.iter().partition(|pod| pod.current);
        let room = if old.is_empty() {
            wanted
        } else {
            (wanted + rolling.max_surge).saturating_sub(current.len() + old.len())
        };
        for _ in 0..room.min(wanted.saturating_sub(current.len())) {
            if !self.create(id, workload, 0) {
                break;
            }
        }
        // Those not ready go first.
        current.sort_by_key(|pod| !pod.ready);
        for pod in current.iter().rev().take(current.len().saturating_sub(wanted)) {
            self.stop(&pod.key);
        }
        old.sort_by_key(|pod| pod.available);
        let mut spare = pods
            .iter()
            .filter(|pod| pod.available)
            .count()
            .saturating_sub(wanted.saturating_sub(rolling.max_unavailable));
        for pod in old {
            if pod.available {
                if spare == 0 {
                    break;
                }
                spare -= 1;
            }
            self.stop(&pod.key);
        }
    }

    fn stateful(&mut self, id: &Id, workload: &Workload, mut pods: Vec<Seen>, parallel: bool) {
        pods.sort_by_key(|pod| pod.ordinal);
        for pod in pods.iter().filter(|pod| pod.ordinal >= workload.replicas) {
            self.stop(&pod.key);
        }
        for ordinal in 0..workload.replicas {
            match pods.iter().find(|pod| pod.ordinal == ordinal) {
                Some(pod) if pod.ready || parallel => {}
                Some(_) => return,
                None => {
                    // Its predecessor may still be ending under the same name.
                    let name = format!("{}-{ordinal}", workload.name);
                    let taken = self.pods.contains_key(&(workload.namespace.clone(), name));
                    if (taken || !self.create(id, workload, ordinal)) || !parallel {
                        return;
                    }
                }
            }
        }
        // All there: replace outdated ones, the last first, one at a time.
        if let Some(pod) = pods.iter().rev().find(|pod| !pod.current && pod.ordinal < workload.replicas) {
            self.stop(&pod.key);
        }
    }

    fn job(&mut self, id: &Id, workload: &Workload, pods: &[Seen], limits: (u32, u32, u32)) {
        let (completions, parallelism, backoff_limit) = limits;
        let count = |phase| pods.iter().filter(|pod| pod.phase == phase).count() as u32;
        let (succeeded, failed) = (count(Phase::Succeeded), count(Phase::Failed));
        let active = count(Phase::Pending) + count(Phase::Running);
        if workload.replicas == 0 || failed > backoff_limit {
            return;
        }
        let wanted = parallelism.min(completions.saturating_sub(succeeded));
        for _ in active..wanted {
            if !self.create(id, workload, 0) {
                break;
            }
        }
    }

    fn bare(&mut self, id: &Id, workload: &Workload, pods: &[Seen]) {
        match pods.first() {
            Some(pod) if pod.current => {}
            Some(pod) => self.stop(&pod.key),
            None => {
                if !self.pods.contains_key(&(workload.namespace.clone(), workload.name.clone())) {
                    self.create(id, workload, 0);
                }
            }
        }
    }

    pub(super) fn stop(&mut self, key: &Key) {
        match self.pods.get(key).map(|entry| entry.handle.as_ref()) {
            Some(Some(handle)) => handle.stop(None),
            Some(None) => {
                if let Some(entry) = self.pods.remove(key) {
                    self.parts.network.remove_pod(entry.place.slot);
                    self.pending.push(Change::Delete(Id {
                        kind: "Pod".to_owned(),
                        namespace: key.0.clone(),
                        name: key.1.clone(),
                    }));
                }
            }
            None => {}
        }
    }

    /// Makes a pod's object and place; false (with the problem noted) if that is impossible.
    fn create(&mut self, id: &Id, workload: &Workload, ordinal: u32) -> bool {
        match self.try_create(id, workload, ordinal) {
            Ok(()) => {
                self.problems.remove(id);
                true
            }
            Err(problem) => {
                if self.problems.get(id) != Some(&problem) {
                    self.parts.progress.warn(&format!("{id}: {problem}"));
                    self.problems.insert(id.clone(), problem);
                }
                false
            }
        }
    }

    fn try_create(&mut self, id: &Id, workload: &Workload, ordinal: u32) -> Result<(), String> {
        let mut object = workload.pod(ordinal);
        let meta = self.objects.namespace(&workload.namespace).cloned().unwrap_or_default();
        let mut injected = false;
        match self
            .parts
            .plane
            .inject(&object, &workload.namespace, &meta)
            .map_err(|error| format!("injection: {error}"))?
        {
            Injected::Pod(pod, warnings) => {
                object = *pod;
                injected = true;
                for warning in warnings {
                    self.parts.progress.warn(&format!("{id}: {warning}"));
                }
            }
            Injected::Skipped => {}
        }
        if let Some(threads) = self.parts.concurrency {
            set_flag(&mut object, "--concurrency", &threads.to_string());
        }
        if let Some(envoy) = &self.parts.envoy {
            set_flag(&mut object, "--proxy", "envoy");
            set_flag(&mut object, "--binaryPath", &envoy.to_string_lossy());
        }
        let pod: Pod = serde_json::from_value(object.clone()).map_err(|error| format!("pod: {error}"))?;
        let networks = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(attach::ANNOTATION));
        let attached = networks.map_or_else(|| Ok(Vec::new()), |text| attach::addresses(text))?;
        if let Some(taken) = attached.iter().find(|ip| self.is_taken(**ip)) {
            return Err(format!("annotation {}: another pod has {taken}", attach::ANNOTATION));
        }
        let place = self.parts.network.add_pod(attached).map_err(|error| chain(&error))?;
        let name = pod.metadata.name.clone().unwrap_or_default();
        let entry = Entry {
            object,
            pod: Arc::new(pod),
            place: PlaceState {
                ips: place.ips.clone(),
                attached: place.attached.clone(),
                slot: place.slot(),
                place: Some(place),
            },
            owner: id.clone(),
            hash: workload.hash.clone(),
            ordinal,
            handle: None,
            told: None,
            announced: None,
            injected,
        };
        self.pods.insert((workload.namespace.clone(), name), entry);
        Ok(())
    }

    fn is_taken(&self, ip: IpAddr) -> bool {
        self.pods.values().any(|entry| entry.place.ips.contains(&ip) || entry.place.attached.contains(&ip))
    }

    /// Starts pods that the control plane has been told about.
    pub(super) fn start_placed(&mut self) {
        if self.stopping {
            return;
        }
        let tokens = self.parts.plane.tokens();
        let folder = self.parts.folder.clone();
        let images = Arc::new(self.parts.images.clone());
        let links = service_links(&self.services);
        for (key, entry) in &mut self.pods {
            let Some(place) = entry.place.place.take() else { continue };
            let uid = entry.pod.metadata.uid.clone().unwrap_or_default();
            let launch = Launch {
                facts: Facts {
                    pod: (*entry.pod).clone(),
                    ips: entry.place.ips.clone(),
                    node_ip: gateway_v4(),
                    node_name: crate::NODE_NAME.to_owned(),
                    service_links: if entry.pod.spec.as_ref().and_then(|spec| spec.enable_service_links) == Some(false)
                    {
                        Vec::new()
                    } else {
                        links.get(&key.0).cloned().unwrap_or_default()
                    },
                },
                data: self.data.subscribe(),
                netns: place.netns,
                spawner: self.parts.spawner.clone(),
                dialer: self.parts.network.dialer(),
                tokens: Arc::clone(&tokens),
                images: Arc::clone(&images),
                program: self.parts.program.clone(),
                folder: folder.pods().join(&uid),
                logs: folder.logs().join(format!("{}_{}", key.0, key.1)),
                claims: folder.claims(),
                dns: gateway_v4(),
                changed: self.changed.clone(),
            };
            entry.handle = Some(pod::start(launch));
        }
    }
}

/// Variables for the services of each namespace, as kubelet's `enableServiceLinks` (`pkg/kubelet/envvars`).
fn service_links(services: &[ServiceView]) -> BTreeMap<String, Vec<(String, String)>> {
    let mut links: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for service in services {
        let (Some(ip), Some(first)) = (service.cluster_ips.first(), service.ports.first()) else { continue };
        let upper = |text: &str| text.to_ascii_uppercase().replace(['-', '.'], "_");
        let name = upper(&service.name);
        let out = links.entry(service.namespace.clone()).or_default();
        let mut set = |key: String, value: String| out.push((key, value));
        set(format!("{name}_SERVICE_HOST"), ip.to_string());
        set(format!("{name}_SERVICE_PORT"), first.port.to_string());
        for port in service.ports.iter().filter(|port| !port.name.is_empty()) {
            set(format!("{name}_SERVICE_PORT_{}", upper(&port.name)), port.port.to_string());
        }
        for (index, port) in service.ports.iter().enumerate() {
            let protocol = port.protocol.to_ascii_lowercase();
            let url = format!("{protocol}://{}", std::net::SocketAddr::new(*ip, port.port));
            if index == 0 {
                set(format!("{name}_PORT"), url.clone());
            }
            let base = format!("{name}_PORT_{}_{}", port.port, port.protocol);
            set(base.clone(), url);
            set(format!("{base}_PROTO"), protocol);
            set(format!("{base}_PORT"), port.port.to_string());
            set(format!("{base}_ADDR"), ip.to_string());
        }
    }
    links
}

/// Sets a flag of a pod's agent, whatever injection wrote.
fn set_flag(pod: &mut Value, flag: &str, value: &str) {
    for list in ["containers", "initContainers"] {
        let containers = pod.pointer_mut(&format!("/spec/{list}")).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            if container.get("name").and_then(Value::as_str) != Some("istio-proxy") {
                continue;
            }
            if let Some(args) = container.get_mut("args").and_then(Value::as_array_mut) {
                let at = args.iter().position(|arg| arg.as_str() == Some(flag));
                match at {
                    Some(at) if at + 1 < args.len() => args[at + 1] = Value::String(value.to_owned()),
                    _ => args.extend([Value::String(flag.to_owned()), Value::String(value.to_owned())]),
                }
            }
        }
    }
}

/// An error with its causes, for a person.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}
