//! From paths to checked documents: everything is read and checked before anything starts.

use std::fs;
use std::path::{Path, PathBuf};

use config_store::Kind;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Namespace, Pod, Secret, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use manifest::{Document, Error};

use crate::pod::command::Images;

/// Name of the file that maps images to programs.
pub(crate) const IMAGES_FILE: &str = "outrigger.yaml";

/// What was read.
#[derive(Default)]
pub(crate) struct Input {
    pub(crate) documents: Vec<Document>,
    pub(crate) images: Images,
    /// Sentences about objects of kinds that are not run here.
    pub(crate) skipped: Vec<String>,
    pub(crate) errors: Vec<Error>,
}

/// Reads and checks files and folders. Folders are read without their subfolders unless `recursive`, as `kubectl apply` does.
pub(crate) fn load(paths: &[PathBuf], recursive: bool) -> Input {
    let mut input = Input::default();
    let mut files = Vec::new();
    for path in paths {
        collect(path, recursive, &mut files, &mut input);
    }
    let images: Vec<PathBuf> = image_files(paths);
    for file in images {
        if let Err(error) = read_images(&file, &mut input.images) {
            input.errors.push(error);
        }
    }
    let (documents, errors) = manifest::read(&files);
    input.errors.extend(errors);
    if documents.is_empty() && input.errors.is_empty() {
        let named = paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        input.errors.push(failure(Path::new(&named), "there is no YAML with objects here"));
    }
    check(documents, &mut input);
    input
}

/// The files that the paths mean, for a client that sends their text on.
pub(crate) fn files(paths: &[PathBuf], recursive: bool) -> Result<Vec<PathBuf>, Error> {
    let mut input = Input::default();
    let mut files = Vec::new();
    for path in paths {
        collect(path, recursive, &mut files, &mut input);
    }
    match input.errors.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(files),
    }
}

/// Whether pods come of an object as soon as it is there.
pub(crate) fn makes_pods(document: &Document) -> bool {
    let replicas = document.value.pointer("/spec/replicas").and_then(serde_json::Value::as_u64);
    match document.kind() {
        "Pod" | "DaemonSet" | "Job" => true,
        "Deployment" | "ReplicaSet" | "StatefulSet" => replicas != Some(0),
        _ => false,
    }
}

/// Checks documents that came another way (from `apply`).
pub(crate) fn check_all(documents: Vec<Document>) -> Input {
    let mut input = Input::default();
    check(documents, &mut input);
    input
}

fn check(documents: Vec<Document>, input: &mut Input) {
    for document in documents {
        match class(&document) {
            Ok(Class::Known) => input.documents.push(document),
            Ok(Class::Skipped(why)) => input.skipped.push(format!(
                "{}:{}: {} {} {why}",
                document.file().display(),
                document.line(),
                document.kind(),
                document.name()
            )),
            Err(error) => input.errors.push(error),
        }
    }
}

enum Class {
    Known,
    Skipped(&'static str),
}

/// Kinds of the cluster that make sense only with a real one; running without them changes nothing on one machine.
const HARMLESS: [&str; 14] = [
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "HorizontalPodAutoscaler",
    "PodDisruptionBudget",
    "NetworkPolicy",
    "ResourceQuota",
    "LimitRange",
    "PriorityClass",
    "StorageClass",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "CustomResourceDefinition",
];

fn class(document: &Document) -> Result<Class, Error> {
    if document.name().is_empty() {
        return Err(document.error("metadata.name", "is missing"));
    }
    let kind = document.kind();
    match document.group() {
        "" => match kind {
            "Namespace" => document.decode::<Namespace>().map(drop)?,
            "Pod" => document
                .decode::<Pod>()
                .and_then(|pod| check_pod(document, "spec", pod.spec.as_ref().map(|s| s.containers.len())))?,
            "Service" => document.decode::<Service>().and_then(|service| check_service(document, &service))?,
            "ServiceAccount" => document.decode::<ServiceAccount>().map(drop)?,
            "ConfigMap" => document.decode::<ConfigMap>().map(drop)?,
            "Secret" => document.decode::<Secret>().map(drop)?,
            "Endpoints" => document.decode::<Endpoints>().map(drop)?,
            _ => return Ok(unknown(kind)),
        },
        "apps" => match kind {
            "Deployment" => {
                let template = document.decode::<Deployment>()?.spec.map(|s| s.template);
                check_pod(document, "spec.template.spec", template.and_then(|t| t.spec).map(|s| s.containers.len()))?;
            }
            "ReplicaSet" => {
                let template = document.decode::<ReplicaSet>()?.spec.and_then(|s| s.template);
                check_pod(document, "spec.template.spec", template.and_then(|t| t.spec).map(|s| s.containers.len()))?;
            }
            "StatefulSet" => {
                let template = document.decode::<StatefulSet>()?.spec.map(|s| s.template);
                check_pod(document, "spec.template.spec", template.and_then(|t| t.spec).map(|s| s.containers.len()))?;
            }
            "DaemonSet" => {
                let template = document.decode::<DaemonSet>()?.spec.map(|s| s.template);
                check_pod(document, "spec.template.spec", template.and_then(|t| t.spec).map(|s| s.containers.len()))?;
            }
            _ => return Ok(unknown(kind)),
        },
        "batch" => match kind {
            "Job" => {
                let template = document.decode::<Job>()?.spec.map(|s| s.template);
                check_pod(document, "spec.template.spec", template.and_then(|t| t.spec).map(|s| s.containers.len()))?;
            }
            "CronJob" => {
                let template = document.decode::<CronJob>()?.spec.job_template.spec.map(|s| s.template);
                check_pod(
                    document,
                    "spec.jobTemplate.spec.template.spec",
                    template.and_then(|t| t.spec).map(|s| s.containers.len()),
                )?;
            }
            _ => return Ok(unknown(kind)),
        },
        "discovery.k8s.io" if kind == "EndpointSlice" => document.decode::<EndpointSlice>().map(drop)?,
        group if group.ends_with("istio.io") => return istio(document),
        // The Gateway API's routes of services.
        group if Kind::of(group, kind).is_some_and(Kind::is_custom) => return istio(document),
        _ => return Ok(unknown(kind)),
    }
    Ok(Class::Known)
}

fn unknown(kind: &str) -> Class {
    Class::Skipped(if HARMLESS.contains(&kind) {
        "has no meaning on one machine; skipped"
    } else {
        "is of a kind that is not known here; skipped"
    })
}

/// Istio's objects are checked by what will hold them: the control plane's store.
fn istio(document: &Document) -> Result<Class, Error> {
    if document.kind() == "IstioOperator" {
        return Ok(Class::Skipped("is for installers; skipped"));
    }
    crate::plane::check(document)?;
    Ok(Class::Known)
}

fn check_pod(document: &Document, path: &str, containers: Option<usize>) -> Result<(), Error> {
    match containers {
        Some(0) | None => Err(document.error(&format!("{path}.containers"), "a pod needs at least one container")),
        Some(_) => Ok(()),
    }
}

fn check_service(document: &Document, service: &Service) -> Result<(), Error> {
    let Some(spec) = &service.spec else {
        return Err(document.error("spec", "is missing"));
    };
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        if !(1..=65_535).contains(&port.port) {
            return Err(document.error(&format!("spec.ports[{index}].port"), format!("{} is no port", port.port)));
        }
    }
    if spec.type_.as_deref() == Some("ExternalName") && spec.external_name.as_deref().unwrap_or_default().is_empty() {
        return Err(document.error("spec.externalName", "is missing for type ExternalName"));
    }
    Ok(())
}

fn failure(file: &Path, message: impl Into<String>) -> Error {
    Error { file: file.to_owned(), line: 0, column: 0, field: None, message: message.into() }
}

fn collect(path: &Path, recursive: bool, files: &mut Vec<PathBuf>, input: &mut Input) {
    if ["http://", "https://"].iter().any(|scheme| path.to_string_lossy().starts_with(scheme)) {
        let message = "is an address, and nothing is fetched; `curl -fsSL ADDRESS | outrigger … -f -` reads it";
        input.errors.push(failure(path, message));
        return;
    }
    if path == Path::new("-") || !path.is_dir() {
        // What does not exist is named by the reader.
        files.push(path.to_owned());
        return;
    }
    let mut entries: Vec<PathBuf> = match fs::read_dir(path) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(error) => {
            input.errors.push(failure(path, error.to_string()));
            return;
        }
    };
    entries.sort();
    for entry in entries {
        let name = entry.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') || name == IMAGES_FILE {
            continue;
        }
        if entry.is_dir() {
            if recursive {
                collect(&entry, recursive, files, input);
            }
        } else if entry.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json") {
            files.push(entry);
        }
    }
}

/// The mapping files beside the given paths: in each folder, and in the folder of each file.
fn image_files(paths: &[PathBuf]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for path in paths {
        let folder = if path.is_dir() { Some(path.as_path()) } else { path.parent() };
        let file = folder.unwrap_or(Path::new(".")).join(IMAGES_FILE);
        if file.is_file() && !found.contains(&file) {
            found.push(file);
        }
    }
    found
}

fn read_images(file: &Path, images: &mut Images) -> Result<(), Error> {
    let text = fs::read_to_string(file).map_err(|error| failure(file, error.to_string()))?;
    for document in manifest::parse_plain(file, &text)? {
        images.add(file, &document)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_text(text: &str, expected: &str) {
        let documents = manifest::parse(Path::new("a.yaml"), text).unwrap();
        let input = check_all(documents);
        let mut lines: Vec<String> = input.errors.iter().map(ToString::to_string).collect();
        lines.extend(input.skipped);
        lines.extend(input.documents.iter().map(|d| format!("{} {}", d.kind(), d.name())));
        assert_eq!(lines.join("; "), expected);
    }

    #[test]
    fn faults_name_file_line_and_field() {
        check_text("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\n", "ServiceAccount a");
        check_text(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: a\nspec:\n  ports:\n  - port: 99999\n",
            "a.yaml:7:5: spec.ports[0].port: 99999 is no port",
        );
        check_text(
            "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: {name: r}\n",
            "a.yaml:1: Role r has no meaning on one machine; skipped",
        );
        let route =
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r}\nspec: {rules: []}\n";
        check_text(route, "HTTPRoute r");
    }
}
