//! Workload controllers: from a Deployment, StatefulSet, … to the pods it wants. Pure but for names' random ends.

use std::hash::{BuildHasher, RandomState};
use std::time::SystemTime;

use manifest::Document;
use serde_json::{Map, Value, json};

use crate::clock;

/// Letters of generated names: no vowels, so that no words appear (apimachinery `pkg/util/rand`).
const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Which controller's rules a workload follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Controller {
    /// Deployment or ReplicaSet.
    Replicas,
    Stateful {
        parallel: bool,
    },
    Daemon,
    Job {
        completions: u32,
        parallelism: u32,
        backoff_limit: u32,
    },
    /// A bare pod.
    Pod,
    /// Jobs on request only.
    Cron,
}

/// A workload as its YAML describes it.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    pub(crate) controller: Controller,
    pub(crate) kind: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) replicas: u32,
    /// metadata and spec of its pods.
    pub(crate) template: Value,
    /// Changes when the template does.
    pub(crate) hash: String,
    service_name: Option<String>,
    claims: Vec<String>,
    /// `spec.strategy`.
    strategy: Value,
}

/// How far a rollout may go over and under the number of replicas.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Rolling {
    pub(crate) max_surge: usize,
    pub(crate) max_unavailable: usize,
}

/// The workload in a document; `None` for other kinds.
pub(crate) fn of(document: &Document, namespace: &str) -> Option<Workload> {
    let spec = document.value.get("spec").cloned().unwrap_or(Value::Null);
    let number = |path: &str, default: u32| {
        spec.pointer(path).and_then(Value::as_u64).map_or(default, |n| u32::try_from(n).unwrap_or(u32::MAX))
    };
    let template = |path: &str| spec.pointer(path).cloned().unwrap_or_else(|| json!({}));
    let (controller, template) = match document.kind() {
        "Deployment" | "ReplicaSet" => (Controller::Replicas, template("/template")),
        "StatefulSet" => {
            let parallel = spec.pointer("/podManagementPolicy").and_then(Value::as_str) == Some("Parallel");
            (Controller::Stateful { parallel }, template("/template"))
        }
        "DaemonSet" => (Controller::Daemon, template("/template")),
        "Job" => {
            let completions = number("/completions", 1);
            let job = Controller::Job {
                completions,
                parallelism: number("/parallelism", 1),
                backoff_limit: number("/backoffLimit", 6),
            };
            (job, template("/template"))
        }
        "CronJob" => (Controller::Cron, template("/jobTemplate/spec/template")),
        "Pod" => {
            let meta = document.value.get("metadata").cloned().unwrap_or_else(|| json!({}));
            (Controller::Pod, json!({"metadata": meta, "spec": spec}))
        }
        _ => return None,
    };
    let suspended = spec.get("suspend").and_then(Value::as_bool) == Some(true);
    let replicas = match controller {
        Controller::Daemon | Controller::Pod => 1,
        Controller::Cron => 0,
        Controller::Job { .. } if suspended => 0,
        _ => number("/replicas", 1),
    };
    let claims = spec.get("volumeClaimTemplates").and_then(Value::as_array).into_iter().flatten();
    Some(Workload {
        controller,
        kind: document.kind().to_owned(),
        namespace: namespace.to_owned(),
        name: document.name().to_owned(),
        uid: uid(),
        replicas,
        hash: hash_name(&template.to_string()),
        claims: claims.filter_map(|claim| claim.pointer("/metadata/name")?.as_str().map(str::to_owned)).collect(),
        strategy: spec.get("strategy").cloned().unwrap_or(Value::Null),
        service_name: spec.get("serviceName").and_then(Value::as_str).map(str::to_owned),
        template,
    })
}

impl Workload {
    /// The strategy of a Deployment; others replace all pods at once, the new ones first.
    ///
    /// Source: kubernetes `pkg/controller/deployment/util`, `ResolveFenceposts`: a quarter each by default, surge rounded up,
    /// unavailability down, and not both zero.
    pub(crate) fn rolling(&self) -> Rolling {
        let replicas = self.replicas as usize;
        if self.kind != "Deployment" {
            return Rolling { max_surge: replicas, max_unavailable: 0 };
        }
        if self.strategy["type"] == "Recreate" {
            return Rolling { max_surge: 0, max_unavailable: replicas };
        }
        let count = |field: &str, up: bool| {
            let value = &self.strategy["rollingUpdate"][field];
            let percent = match value.as_str() {
                Some(text) => text.trim_end_matches('%').parse().unwrap_or(25),
                None => match value.as_u64() {
                    Some(count) => return usize::try_from(count).unwrap_or(replicas),
                    None => 25,
                },
            };
            if up { (replicas * percent).div_ceil(100) } else { replicas * percent / 100 }
        };
        match (count("maxSurge", true), count("maxUnavailable", false)) {
            (0, 0) => Rolling { max_surge: 0, max_unavailable: 1 },
            (max_surge, max_unavailable) => Rolling { max_surge, max_unavailable },
        }
    }

    /// A job made of a CronJob now, as `kubectl create job --from` does.
    pub(crate) fn job_of_cron(&self) -> Self {
        Self {
            controller: Controller::Job { completions: 1, parallelism: 1, backoff_limit: 6 },
            kind: "Job".to_owned(),
            name: format!("{}-{}", self.name, random_end(5)),
            uid: uid(),
            replicas: 1,
            ..self.clone()
        }
    }

    /// The object of one more pod. `ordinal` is a StatefulSet's.
    pub(crate) fn pod(&self, ordinal: u32) -> Value {
        let mut meta = self.template.get("metadata").and_then(Value::as_object).cloned().unwrap_or_default();
        let mut spec = self.template.get("spec").cloned().unwrap_or_else(|| json!({}));
        let mut labels = meta.get("labels").and_then(Value::as_object).cloned().unwrap_or_default();
        let mut label = |key: &str, value: String| {
            labels.insert(key.to_owned(), Value::String(value));
        };
        let owner = |api: &str, kind: &str, name: &str| json!([{"apiVersion": api, "kind": kind, "name": name, "uid": self.uid, "controller": true, "blockOwnerDeletion": true}]);
        let mut owners = None;
        let name = match &self.controller {
            Controller::Pod => self.name.clone(),
            Controller::Replicas => {
                let set =
                    if self.kind == "Deployment" { format!("{}-{}", self.name, self.hash) } else { self.name.clone() };
                if self.kind == "Deployment" {
                    label("pod-template-hash", self.hash.clone());
                }
                owners = Some(owner("apps/v1", "ReplicaSet", &set));
                generated(&mut meta, &set)
            }
            Controller::Stateful { .. } => {
                let name = format!("{}-{ordinal}", self.name);
                label("statefulset.kubernetes.io/pod-name", name.clone());
                label("apps.kubernetes.io/pod-index", ordinal.to_string());
                label("controller-revision-hash", format!("{}-{}", self.name, self.hash));
                owners = Some(owner("apps/v1", "StatefulSet", &self.name));
                self.stateful_spec(&mut spec, &name);
                name
            }
            Controller::Daemon => {
                label("controller-revision-hash", self.hash.clone());
                owners = Some(owner("apps/v1", "DaemonSet", &self.name));
                generated(&mut meta, &self.name)
            }
            Controller::Job { .. } | Controller::Cron => {
                label("batch.kubernetes.io/job-name", self.name.clone());
                label("job-name", self.name.clone());
                owners = Some(owner("batch/v1", "Job", &self.name));
                generated(&mut meta, &self.name)
            }
        };
        meta.insert("name".to_owned(), json!(name));
        meta.insert("namespace".to_owned(), json!(self.namespace));
        meta.insert("labels".to_owned(), Value::Object(labels));
        meta.insert("uid".to_owned(), json!(uid()));
        meta.insert("creationTimestamp".to_owned(), json!(clock::rfc3339(SystemTime::now())));
        if let Some(owners) = owners {
            meta.insert("ownerReferences".to_owned(), owners);
        }
        if let Some(spec) = spec.as_object_mut() {
            // What the API server and the scheduler fill in.
            spec.entry("serviceAccountName").or_insert_with(|| json!("default"));
            spec.entry("restartPolicy").or_insert_with(|| json!("Always"));
            spec.insert("nodeName".to_owned(), json!(crate::NODE_NAME));
        }
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    }

    fn stateful_spec(&self, spec: &mut Value, pod: &str) {
        let Some(spec) = spec.as_object_mut() else { return };
        spec.insert("hostname".to_owned(), json!(pod));
        if let Some(service) = &self.service_name {
            spec.insert("subdomain".to_owned(), json!(service));
        }
        if self.claims.is_empty() {
            return;
        }
        let mut volumes = spec.get("volumes").and_then(Value::as_array).cloned().unwrap_or_default();
        volumes.retain(|volume| {
            !self.claims.iter().any(|claim| volume.get("name").and_then(Value::as_str) == Some(claim))
        });
        volumes.extend(
            self.claims
                .iter()
                .map(|claim| json!({"name": claim, "persistentVolumeClaim": {"claimName": format!("{claim}-{pod}")}})),
        );
        spec.insert("volumes".to_owned(), Value::Array(volumes));
    }
}

fn generated(meta: &mut Map<String, Value>, base: &str) -> String {
    // As the API server: the base is cut so that the whole stays below 63 characters.
    let base: String = base.chars().take(57).collect();
    meta.insert("generateName".to_owned(), json!(format!("{base}-")));
    format!("{base}-{}", random_end(5))
}

/// A random UUID (version 4).
pub(crate) fn uid() -> String {
    let (a, b) = (random(), random());
    let (b, variant) = (b & 0x3fff_ffff_ffff_ffff, 0x8000_0000_0000_0000u64);
    let b = b | variant;
    format!(
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        a >> 32,
        (a >> 16) & 0xffff,
        a & 0xfff,
        b >> 48,
        b & 0xffff_ffff_ffff
    )
}

/// Names need no secrecy, only difference: the standard library's per-process random keys do.
fn random() -> u64 {
    RandomState::new().hash_one(SystemTime::now())
}

fn random_end(length: usize) -> String {
    letters(random(), length)
}

fn hash_name(text: &str) -> String {
    // FNV-1a: the same text must give the same name in every run.
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    letters(hash, 10)
}

fn letters(mut number: u64, length: usize) -> String {
    (0..length)
        .map(|_| {
            let letter = LETTERS[(number % LETTERS.len() as u64) as usize];
            number /= LETTERS.len() as u64;
            char::from(letter)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(text: &str) -> Workload {
        of(&manifest::parse(std::path::Path::new("w.yaml"), text).unwrap()[0], "shop").unwrap()
    }

    #[test]
    fn deployment_pods_look_like_those_of_a_replica_set() {
        let text = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  replicas: 2\n  template:\n    metadata: {labels: {app: web}}\n    spec: {containers: [{name: c, image: i}]}";
        let web = workload(text);
        let pod = web.pod(0);
        let name = pod["metadata"]["name"].as_str().unwrap();
        assert_eq!(name.split('-').map(str::len).collect::<Vec<_>>(), [3, 10, 5]);
        assert_eq!(pod["metadata"]["labels"]["pod-template-hash"], json!(web.hash));
        assert_eq!(pod["metadata"]["ownerReferences"][0]["name"], json!(format!("web-{}", web.hash)));
        assert_eq!(workload(text).hash, web.hash);
    }

    #[test]
    fn rollouts_keep_to_their_strategy() {
        let rolling = |replicas: u32, strategy: &str| {
            let text = format!(
                "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web}}\nspec:\n  replicas: {replicas}\n  strategy: {strategy}\n  template: {{}}"
            );
            let rolling = workload(&text).rolling();
            (rolling.max_surge, rolling.max_unavailable)
        };
        assert_eq!(rolling(3, "{}"), (1, 0));
        assert_eq!(rolling(1, "{}"), (1, 0));
        assert_eq!(rolling(8, "{rollingUpdate: {maxSurge: 3, maxUnavailable: 50%}}"), (3, 4));
        assert_eq!(rolling(2, "{rollingUpdate: {maxSurge: 0, maxUnavailable: 0}}"), (0, 1));
        assert_eq!(rolling(2, "{type: Recreate}"), (0, 2));
    }

    #[test]
    fn stateful_pods_have_ordinals_and_claims() {
        let text = "apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {name: db}\nspec:\n  serviceName: db\n  volumeClaimTemplates: [{metadata: {name: data}}]\n  template:\n    metadata: {labels: {app: db}}\n    spec: {containers: [{name: c, image: i}]}";
        let pod = workload(text).pod(1);
        assert_eq!(pod["metadata"]["name"], json!("db-1"));
        assert_eq!(pod["spec"]["subdomain"], json!("db"));
        assert_eq!(pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"], json!("data-db-1"));
    }

    #[test]
    fn uids_are_uuids() {
        let uid = uid();
        assert_eq!(uid.split('-').map(str::len).collect::<Vec<_>>(), [8, 4, 4, 4, 12], "{uid}");
        assert_eq!(&uid[14..15], "4");
    }
}
