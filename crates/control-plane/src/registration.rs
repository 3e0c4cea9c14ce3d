//! Machines outside of Kubernetes: WorkloadEntries that are made when their agents connect, follow what the agents say of
//! their health, and go when the agents have gone. As istio `pilot/pkg/autoregistration`.
//!
//! ```text
//!  source (streams) ─► Registrar: what is known of each machine ─► keeper: what its entry should say ─► store or API server
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use config_store::{Body, Key, Kind, Object};
use istio_api::workload_entry::WorkloadEntry;
use kube_source::Cluster;
use mesh_types::{Labels, SpiffeId};
use push_context::Node;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::Notify;
use tokio::time::Instant;
use tonic::Status;
use tracing::{info, warn};

use crate::metrics::{Metrics, Registration};
use crate::world::{State, Update, World};

/// Annotations of an entry, as istio.io/api `annotation` names them.
const GROUP: &str = "istio.io/autoRegistrationGroup";
const CONTROLLER: &str = "istio.io/workloadController";
const CONNECTED: &str = "istio.io/connectedAt";
const DISCONNECTED: &str = "istio.io/disconnectedAt";
/// With this the entry counts only while its agent says that it is well.
const CHECKED: &str = "proxy.istio.io/health-checks-enabled";

/// An agent that says so leaves for good: its entry goes at once, without the time to come back.
/// `google.rpc.Code.UNAVAILABLE`; for istiod that is an unhealthy workload.
const LEAVING: i32 = 14;

/// After a write that failed.
const RETRY: Duration = Duration::from_secs(1);
/// An entry whose agent is connected is dated anew so often …
const REFRESH: Duration = Duration::from_secs(15 * 60);
/// … and one that is dated longer ago than this was left behind by a control plane that died. As istiod's, which has its
/// agents connect anew every 30 minutes and waits half as long again.
const ABANDONED: Duration = Duration::from_secs(45 * 60);

/// What a connecting proxy has to do with a WorkloadEntry.
#[derive(Debug)]
pub(crate) struct Claim {
    key: Key,
    /// The WorkloadGroup that the entry is made of; `None`: somebody else made the entry, and the agent tells its health.
    group: Option<String>,
    node: Arc<Node>,
}

/// One machine.
#[derive(Clone, Debug)]
struct Machine {
    claim: Arc<Claim>,
    connections: BTreeSet<u64>,
    connected: OffsetDateTime,
    /// When the last connection ended.
    left: Option<(OffsetDateTime, Instant)>,
    /// What the agent said last; `None` before.
    health: Option<Result<(), String>>,
    leaving: bool,
}

/// Hears of machines. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registrar {
    /// Locked for one event or one copy.
    machines: Arc<Mutex<BTreeMap<Key, Machine>>>,
    changed: Arc<Notify>,
}

impl Registrar {
    /// Whether this proxy is a machine that is to be registered; an error refuses it, and its agent tries again.
    pub(crate) fn claim(
        node: &Arc<Node>,
        identity: Option<&SpiffeId>,
        state: &State,
    ) -> Result<Option<Arc<Claim>>, Status> {
        let metadata = |name: &str| node.metadata.get(name).map(String::as_str).filter(|value| !value.is_empty());
        let find = |kind: Kind, name: &str| state.snapshot.find(kind, &node.namespace, name);
        let (name, group, account) = if let Some(group) = metadata("AUTO_REGISTER_GROUP") {
            let name = entry_name(group, node)?;
            let Some(object) = find(Kind::WorkloadGroup, group) else {
                return Err(Status::failed_precondition(format!(
                    "{} cannot be registered: there is no WorkloadGroup {}/{group}",
                    node.id, node.namespace
                )));
            };
            let account = match &object.body {
                Body::WorkloadGroup(group) => group.template.as_ref().map(|template| template.service_account.clone()),
                _ => None,
            };
            (name, Some(group.to_owned()), account)
        } else if let Some(name) = metadata("WORKLOAD_ENTRY") {
            let Some(object) = find(Kind::WorkloadEntry, name) else {
                let message = format!("{} names a WorkloadEntry {}/{name} that is not there", node.id, node.namespace);
                return Err(Status::failed_precondition(message));
            };
            if !object.annotations.contains_key(CHECKED) {
                return Ok(None);
            }
            let account = match &object.body {
                Body::WorkloadEntry(entry) => Some(entry.service_account.clone()),
                _ => None,
            };
            (name.to_owned(), None, account)
        } else {
            return Ok(None);
        };
        // Whoever could register what it likes would take other workloads' traffic.
        let Some(identity) = identity else {
            return Err(Status::permission_denied("only who has proved its identity is registered"));
        };
        if let Some(account) = account.filter(|account| !account.is_empty() && account != identity.service_account()) {
            return Err(Status::permission_denied(format!(
                "{identity} may not register as service account {account:?} of namespace {:?}",
                node.namespace
            )));
        }
        let key = Key::new(Kind::WorkloadEntry, &node.namespace, &name);
        Ok(Some(Arc::new(Claim { key, group, node: node.clone() })))
    }

    pub(crate) fn connected(&self, claim: &Arc<Claim>, connection: u64) {
        self.change(|machines| {
            let machine = machines.entry(claim.key.clone()).or_insert_with(|| Machine {
                claim: claim.clone(),
                connections: BTreeSet::new(),
                connected: OffsetDateTime::now_utc(),
                left: None,
                health: None,
                leaving: false,
            });
            if machine.connections.is_empty() {
                machine.connected = OffsetDateTime::now_utc();
            }
            machine.claim = claim.clone();
            machine.connections.insert(connection);
            machine.left = None;
            machine.leaving = false;
        });
    }

    /// `problem`: a `google.rpc.Code` and a text; `None` when all is well.
    pub(crate) fn health(&self, claim: &Claim, problem: Option<&(i32, String)>) {
        self.change(|machines| {
            let Some(machine) = machines.get_mut(&claim.key) else { return };
            machine.leaving = problem.is_some_and(|(code, _)| *code == LEAVING);
            machine.health = Some(problem.map_or(Ok(()), |(_, text)| Err(text.clone())));
        });
    }

    pub(crate) fn disconnected(&self, claim: &Claim, connection: u64) {
        self.change(|machines| {
            let Some(machine) = machines.get_mut(&claim.key) else { return };
            machine.connections.remove(&connection);
            if machine.connections.is_empty() {
                machine.left = Some((OffsetDateTime::now_utc(), Instant::now()));
            }
        });
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<Key, Machine>)) {
        change(&mut self.machines.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
    }

    fn all(&self) -> Vec<Machine> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Forgets a machine, unless it came back.
    fn forget(&self, key: &Key) {
        let mut machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        if machines.get(key).is_some_and(|machine| machine.connections.is_empty()) {
            machines.remove(key);
        }
    }
}

/// istiod's name: group, address and network. Source: `autoregisteredWorkloadEntryName`.
fn entry_name(group: &str, node: &Node) -> Result<String, Status> {
    let address = node.addresses.first().map(|ip| ip.replace(':', "-")).unwrap_or_default();
    let mut name = format!("{group}-{address}");
    if !node.network.is_empty() {
        name = format!("{name}-{}", node.network);
    }
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.') {
        return Err(Status::invalid_argument(format!("{name:?} cannot be the name of a WorkloadEntry")));
    }
    // From the end: that is what tells machines apart.
    Ok(name.split_off(name.len().saturating_sub(253)))
}

/// Keeps the entries as the machines are.
pub(crate) struct Keeper {
    pub(crate) registrar: Registrar,
    pub(crate) world: World,
    /// Where entries are written; without, they live in this process.
    pub(crate) cluster: Option<Cluster>,
    /// How long a machine may be away, `PILOT_WORKLOAD_ENTRY_GRACE_PERIOD`.
    pub(crate) grace: Duration,
    /// What tells this control plane from others of the same mesh.
    pub(crate) name: String,
    pub(crate) metrics: Arc<Metrics>,
}

/// What an entry should be.
enum Wanted {
    Entry(Box<Object>),
    Gone,
    /// Nothing: the claimed entry is not there.
    Nothing,
}

impl Keeper {
    /// Works until dropped.
    pub(crate) async fn run(self) {
        let mut revisions = self.world.revisions();
        // What was written last of each; entries that nobody claims any more fall out.
        let mut written: BTreeMap<Key, Option<Box<Object>>> = BTreeMap::new();
        let mut sweep = Instant::now() + self.grace * 10;
        loop {
            let mut next = sweep;
            let machines = self.registrar.all();
            written.retain(|key, _| machines.iter().any(|machine| machine.claim.key == *key));
            for mut machine in machines {
                let key = machine.claim.key.clone();
                let expires = machine.left.map(|(_, at)| at + self.grace);
                let expired = expires.is_some_and(|at| at <= Instant::now());
                if let Some(expires) = expires.filter(|_| !expired) {
                    next = next.min(expires);
                }
                if machine.left.is_none() && OffsetDateTime::now_utc() - machine.connected > REFRESH {
                    machine.connected = OffsetDateTime::now_utc();
                    self.registrar.change(|machines| {
                        if let Some(kept) = machines.get_mut(&key) {
                            kept.connected = machine.connected;
                        }
                    });
                }
                if machine.left.is_none() {
                    next = next.min(Instant::now() + REFRESH);
                }
                let state = self.world.current();
                let wanted = match self.wanted(&machine, &state, expired) {
                    Wanted::Entry(object) => Some(object),
                    Wanted::Gone => None,
                    Wanted::Nothing => {
                        if expired {
                            self.registrar.forget(&key);
                        }
                        continue;
                    }
                };
                let before = written.get(&key);
                let same = match (before, &wanted) {
                    (Some(Some(before)), Some(wanted)) => same(before, wanted),
                    (Some(None), None) => true,
                    // Nothing of ours is there to be removed.
                    (None, None) => state.snapshot.get(&key).is_none(),
                    _ => false,
                };
                let failed = match same {
                    true => false,
                    false => !self.write(&machine, before.and_then(Option::as_deref), wanted.as_deref()).await,
                };
                if failed {
                    next = next.min(Instant::now() + RETRY);
                    continue;
                }
                written.insert(key.clone(), wanted);
                if expired {
                    self.registrar.forget(&key);
                }
            }
            if sweep <= Instant::now() {
                self.sweep().await;
                sweep = Instant::now() + self.grace * 10;
                next = next.min(sweep);
            }
            tokio::select! {
                () = self.registrar.changed.notified() => {}
                // WorkloadGroups come, change and go. Nobody else needs waking: without machines this costs nothing.
                changed = revisions.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(next) => {}
            }
        }
    }

    fn wanted(&self, machine: &Machine, state: &State, expired: bool) -> Wanted {
        let claim = &machine.claim;
        let mut object = match &claim.group {
            Some(name) => {
                if expired || machine.leaving {
                    return Wanted::Gone;
                }
                match state.snapshot.find(Kind::WorkloadGroup, &claim.key.namespace, name) {
                    Some(group) => entry_of(claim, name, group),
                    None => return Wanted::Gone,
                }
            }
            None => match state.snapshot.get(&claim.key) {
                Some(object) => Object { origin: None, ..object.as_ref().clone() },
                None => return Wanted::Nothing,
            },
        };
        object.annotations.insert(CONTROLLER.to_owned(), self.name.clone());
        object.annotations.remove(CONNECTED);
        object.annotations.remove(DISCONNECTED);
        match machine.left {
            None => object.annotations.insert(CONNECTED.to_owned(), rfc3339(machine.connected)),
            Some((at, _)) => object.annotations.insert(DISCONNECTED.to_owned(), rfc3339(at)),
        };
        // Of who has been away too long nothing is known.
        object.healthy = machine.health.as_ref().filter(|_| !expired).map(Result::is_ok);
        Wanted::Entry(Box::new(object))
    }

    /// Writes what is wanted; whether that worked.
    async fn write(&self, machine: &Machine, before: Option<&Object>, wanted: Option<&Object>) -> bool {
        let (key, group) = (&machine.claim.key, machine.claim.group.as_deref());
        let result = match (&self.cluster, wanted) {
            (None, Some(object)) => {
                self.world.update(vec![Update::Upsert(Box::new(object.clone()))]).await;
                Ok(())
            }
            (None, None) => {
                self.world.update(vec![Update::Delete(key.clone())]).await;
                Ok(())
            }
            (Some(cluster), None) => cluster.remove_workload_entry(&key.namespace, &key.name).await,
            (Some(cluster), Some(object)) => {
                let manifest = manifest(object, group.is_some());
                let entry = cluster.write_workload_entry(&manifest, group).await;
                match entry {
                    Ok(()) if before.and_then(|before| before.healthy) != object.healthy => {
                        let conditions = conditions(machine.health.as_ref().filter(|_| object.healthy.is_some()));
                        cluster.write_workload_conditions(&key.namespace, &key.name, &conditions).await
                    }
                    result => result,
                }
            }
        };
        if let Err(error) = result {
            self.metrics.registration(Registration::Error);
            warn!(error = %chain(&error), "{key} cannot be written");
            return false;
        }
        match (before, wanted, machine.left) {
            (_, None, _) => {
                self.metrics.registration(Registration::Deleted);
                info!("{key} removed: its machine has left");
            }
            (None, Some(_), None) if group.is_some() => {
                self.metrics.registration(Registration::Made);
                info!("{key} registered");
            }
            (_, Some(_), Some(_)) => {
                self.metrics.registration(Registration::Disconnected);
                info!(grace = ?self.grace, "{key}: its machine is away");
            }
            (_, Some(object), None) => {
                self.metrics.registration(Registration::Updated);
                info!(healthy = ?object.healthy, "{key} updated");
            }
        }
        true
    }

    /// Removes entries that a control plane left behind which is gone itself.
    async fn sweep(&self) {
        let state = self.world.current();
        let ours: BTreeSet<Key> = self.registrar.all().into_iter().map(|machine| machine.claim.key.clone()).collect();
        let now = OffsetDateTime::now_utc();
        let age = |object: &Object, name: &str| {
            let at = OffsetDateTime::parse(object.annotations.get(name)?, &Rfc3339).ok()?;
            Duration::try_from(now - at).ok()
        };
        let left = |object: &Object| match age(object, CONNECTED) {
            Some(age) => age > ABANDONED,
            None => age(object, DISCONNECTED).is_some_and(|age| age > self.grace),
        };
        let entries = state.snapshot.list(Kind::WorkloadEntry);
        for object in entries.filter(|o| o.annotations.contains_key(GROUP) && !ours.contains(&o.key) && left(o)) {
            let key = &object.key;
            let removed = match &self.cluster {
                None => {
                    self.world.update(vec![Update::Delete(key.clone())]).await;
                    Ok(())
                }
                Some(cluster) => cluster.remove_workload_entry(&key.namespace, &key.name).await,
            };
            match removed {
                Ok(()) => {
                    self.metrics.registration(Registration::Deleted);
                    info!("{key} removed: nobody keeps it any more");
                }
                Err(error) => warn!(error = %chain(&error), "{key} cannot be removed"),
            }
        }
    }
}

fn same(a: &Object, b: &Object) -> bool {
    a.labels == b.labels && a.annotations == b.annotations && a.healthy == b.healthy && a.body == b.body
}

/// The entry of a machine of this group. Source: `workloadEntryFromGroup`.
fn entry_of(claim: &Claim, name: &str, group: &Object) -> Object {
    let Body::WorkloadGroup(spec) = &group.body else {
        return Object::new(&claim.key.namespace, &claim.key.name, Body::WorkloadEntry(Box::default()));
    };
    let node = &claim.node;
    let mut entry: WorkloadEntry = spec.template.clone().unwrap_or_default();
    entry.address = node.addresses.first().cloned().unwrap_or_default();
    let of_group = spec.metadata.clone().unwrap_or_default();
    // The proxy's labels win over the group's, and those over the template's.
    entry.labels.extend(of_group.labels);
    entry.labels.extend(node.labels.iter().map(|(key, value)| (key.clone(), value.clone())));
    // The entry has a field for it.
    entry.labels.remove("istio-locality");
    if !node.network.is_empty() {
        entry.network = node.network.to_string();
    }
    if !node.locality.is_empty() {
        let parts = [&node.locality.region, &node.locality.zone, &node.locality.subzone];
        let parts: Vec<&str> = parts.into_iter().map(|part| &**part).take_while(|part| !part.is_empty()).collect();
        entry.locality = parts.join("/");
    }
    let mut annotations: Labels = [(GROUP.to_owned(), name.to_owned())].into_iter().collect();
    annotations.extend(of_group.annotations);
    if node.proxy_config.as_ref().is_some_and(|config| config.parse().readiness_probe.is_some()) {
        annotations.insert(CHECKED.to_owned(), "true".to_owned());
    }
    let labels = entry.labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    let object = Object::new(&claim.key.namespace, &claim.key.name, Body::WorkloadEntry(Box::new(entry)));
    Object { labels, annotations, ..object }
}

/// As the API server is told; of an entry that others made only the annotations that are ours.
fn manifest(object: &Object, whole: bool) -> Value {
    let ours = |name: &str| whole || matches!(name, CONTROLLER | CONNECTED | DISCONNECTED);
    let annotations: BTreeMap<_, _> = object.annotations.iter().filter(|(name, _)| ours(name)).collect();
    let mut manifest = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
        "metadata": {"name": *object.key.name, "namespace": *object.key.namespace, "annotations": annotations},
    });
    if let (true, Body::WorkloadEntry(entry)) = (whole, &object.body) {
        manifest["metadata"]["labels"] = json!(object.labels);
        manifest["spec"] = serde_json::to_value(entry).unwrap_or_default();
    }
    manifest
}

/// `status.conditions`, as istio `pilot/pkg/autoregistration/internal/health` writes it.
fn conditions(health: Option<&Result<(), String>>) -> Value {
    let Some(health) = health else { return json!([]) };
    let now = rfc3339(OffsetDateTime::now_utc());
    json!([{
        "type": "Healthy", "status": if health.is_ok() { "True" } else { "False" },
        "message": health.as_ref().err().cloned().unwrap_or_default(),
        "lastProbeTime": now, "lastTransitionTime": now,
    }])
}

fn rfc3339(at: OffsetDateTime) -> String {
    // Fails only for years of more than four digits.
    at.format(&Rfc3339).unwrap_or_default()
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
