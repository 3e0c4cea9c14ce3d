//! Workloads as files hold them: `kube-inject`.
//!
//! As istio `pkg/kube/inject/inject.go`, `IntoResourceFile` and `IntoObject`.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::decision::{Decision, NamespaceMeta, Rule};
use crate::owner::Owner;
use crate::pipeline::{InjectError, Outcome, Request, inject};
use crate::schema;

/// A file that cannot be injected.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    #[error(transparent)]
    Yaml(Box<manifest::Error>),
    #[error("{object}: {message}")]
    Malformed { object: String, message: String },
    #[error("{object}")]
    Inject { object: String, source: Box<InjectError> },
}

impl From<manifest::Error> for WorkloadError {
    fn from(error: manifest::Error) -> Self {
        Self::Yaml(Box::new(error))
    }
}

/// What was done with a workload of the file.
#[derive(Clone, Debug)]
pub struct Document {
    /// Such as `Deployment "ns/name"`.
    pub object: String,
    pub decision: Decision,
    /// What to tell the user on standard error, in order, without line ends.
    pub warnings: Vec<String>,
}

/// Injects all workloads of a text of YAML or JSON documents and returns the new text: each document is
/// followed by `---`. What is no known workload is passed through byte for byte.
///
/// # Errors
/// A syntax error, a malformed workload, and whatever refuses an injection.
pub fn inject_text(name: &Path, text: &str, config: &Config) -> Result<(String, Vec<Document>), WorkloadError> {
    let mut out = String::with_capacity(text.len() * 4);
    let mut done = Vec::new();
    for raw in split(text) {
        match parse(name, &raw)? {
            Some(value) => {
                let injected = object(value, config, &mut done)?;
                out.push_str(&crate::yaml::emit(&injected));
            }
            None => out.push_str(&raw),
        }
        out.push_str("---\n");
    }
    Ok((out, done))
}

/// Documents as kubectl's YAML reader cuts them. A separator that nothing precedes belongs to the document
/// after it, which shows where documents are passed through.
fn split(text: &str) -> Vec<String> {
    let mut documents = Vec::new();
    let mut current = String::new();
    for line in text.lines() {
        let separates =
            line.strip_prefix("---").map(str::trim).is_some_and(|rest| rest.is_empty() || rest.starts_with('#'));
        if separates && !current.is_empty() {
            documents.push(std::mem::take(&mut current));
            continue;
        }
        current.push_str(line);
        current.push('\n');
    }
    if !current.is_empty() {
        documents.push(current);
    }
    documents
}

/// The document, when it is of a kind that is injected.
fn parse(name: &Path, raw: &str) -> Result<Option<Value>, WorkloadError> {
    let documents = manifest::parse_lenient(name, raw)?;
    Ok(documents.into_iter().next().map(|document| document.value).filter(known))
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn known(value: &Value) -> bool {
    matches!(
        (text(value, "apiVersion"), text(value, "kind")),
        // OpenShift's kind is also known without its group, as it once was.
        ("v1", "Pod" | "ReplicationController" | "List" | "DeploymentConfig")
            | ("apps/v1", "Deployment" | "DaemonSet" | "ReplicaSet" | "StatefulSet")
            | ("batch/v1", "Job" | "CronJob")
            | ("apps.openshift.io/v1", "DeploymentConfig")
    )
}

fn object(value: Value, config: &Config, done: &mut Vec<Document>) -> Result<Value, WorkloadError> {
    if text(&value, "kind") == "List" {
        return items(value, config, done);
    }
    let kind = text(&value, "kind").to_owned();
    let malformed = |message: String| WorkloadError::Malformed {
        object: format!("{kind} {:?}", value["metadata"]["name"].as_str().unwrap_or_default()),
        message,
    };
    let ty = schema::find(&kind).ok_or_else(|| malformed("unknown kind".to_owned()))?;
    let mut typed = value.clone();
    schema::texts(ty, &mut typed);
    let mut unknown = Vec::new();
    schema::unknown(ty, &typed, "", &mut unknown);
    // As Istio, which writes out what its types hold.
    let mut workload = schema::decode(ty, &typed).map_err(|error| malformed(error.to_string()))?;
    let (metadata, spec) = match kind.as_str() {
        "Pod" => ("/metadata", "/spec"),
        // As Istio: the job's metadata, not that of its pods, is read and annotated.
        "CronJob" => ("/spec/jobTemplate/metadata", "/spec/jobTemplate/spec/template/spec"),
        _ => ("/spec/template/metadata", "/spec/template/spec"),
    };
    if workload.pointer(spec).is_none() {
        return Err(malformed("spec.template is required value".to_owned()));
    }
    let pod = json!({"metadata": workload.pointer(metadata), "spec": workload.pointer(spec)});
    let owner = match kind.as_str() {
        "Pod" => Owner::of_pod(&pod),
        _ => Owner {
            kind: kind.clone(),
            api_version: text(&workload, "apiVersion").to_owned(),
            name: text(&workload["metadata"], "name").to_owned(),
            namespace: text(&workload["metadata"], "namespace").to_owned(),
        },
    };
    let name = match text(&pod["metadata"], "name") {
        "" => owner.name.as_str(),
        name => name,
    };
    let full = if owner.namespace.is_empty() { name.to_owned() } else { format!("{}/{name}", owner.namespace) };
    let described = format!("{kind} \"{full}\"");
    let namespace = NamespaceMeta { name: text(&pod["metadata"], "namespace").to_owned(), ..NamespaceMeta::default() };
    let mut request = Request::new(&pod, &owner, &namespace);
    request.always = true;
    let outcome = inject(&request, config)
        .map_err(|source| WorkloadError::Inject { object: described.clone(), source: Box::new(source) })?;
    let left_out = unknown.iter().map(|path| format!("{described}: field {path} is not known and left out"));
    let left_out: Vec<String> = left_out.collect();
    match outcome {
        Outcome::Injected { pod, mut warnings, decision } => {
            warnings.extend(left_out);
            for (path, part) in [(metadata, "metadata"), (spec, "spec")] {
                if let Some(slot) = workload.pointer_mut(path) {
                    *slot = pod[part].clone();
                }
            }
            workload = schema::decode(ty, &workload).map_err(|error| malformed(error.to_string()))?;
            done.push(Document { object: described, decision, warnings });
        }
        Outcome::Skipped { decision } => {
            let why = match decision.rule {
                Rule::HostNetwork => "host networking enabled",
                _ => "sidecar injection disabled",
            };
            let mut warnings = decision.warnings.clone();
            warnings.extend(left_out);
            warnings.push(format!("===> Skipping injection because {described} has {why}\n"));
            done.push(Document { object: described, decision, warnings });
        }
    }
    Ok(workload)
}

/// A List: its items one by one; those of unknown kinds stay as they are.
fn items(list: Value, config: &Config, done: &mut Vec<Document>) -> Result<Value, WorkloadError> {
    let Value::Object(list) = list else { return Ok(list) };
    let mut out = Map::new();
    for (key, value) in list {
        match (key.as_str(), value) {
            ("items", Value::Array(items)) => {
                let mut injected = Vec::with_capacity(items.len());
                for item in items {
                    injected.push(if known(&item) { object(item, config, done)? } else { item });
                }
                out.insert(key, Value::Array(injected));
            }
            (_, value) => {
                out.insert(key, value);
            }
        }
    }
    out.entry("metadata").or_insert_with(|| json!({}));
    Ok(Value::Object(out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Builtin;

    #[test]
    fn what_is_no_workload_passes_through() {
        let text = "---\n# only a comment\n---\nkind: Service\napiVersion:  v1 # kept\n";
        let config = Config::builtin(&Builtin::default()).unwrap();
        let (out, done) = inject_text(Path::new("f"), text, &config).unwrap();
        assert_eq!(out, "---\n# only a comment\n---\nkind: Service\napiVersion:  v1 # kept\n---\n");
        assert!(done.is_empty());
    }

    #[test]
    fn a_workload_without_pods_is_refused() {
        let config = Config::builtin(&Builtin::default()).unwrap();
        for text in
            ["kind: Deployment\napiVersion: apps/v1\nspec: {template: 1}", "kind: Pod\napiVersion: v1\nspec: []"]
        {
            assert!(inject_text(Path::new("f"), text, &config).is_err(), "{text}");
        }
    }
}
