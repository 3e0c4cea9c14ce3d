//! Every pod that real Istio's injection made: its agent's command line and environment are understood here.

use std::path::{Path, PathBuf};

use agent::{Args, Command, Environment, Root, Settings};
use clap::Parser;
use serde_json::Value;

fn conformance() -> Option<PathBuf> {
    let dir = std::env::var_os("OUTRIGGER_CONFORMANCE").map(PathBuf::from);
    let dir = dir.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"));
    dir.join("inject").is_dir().then(|| dir.join("inject"))
}

/// The containers of all pods in a document, wherever the pod template is.
fn containers<'a>(value: &'a Value, found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                if name == "containers" || name == "initContainers" {
                    found.extend(field.as_array().into_iter().flatten());
                }
                containers(field, found);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| containers(value, found)),
        _ => {}
    }
}

/// What kubelets make of a variable's source, near enough.
fn value(variable: &Value) -> String {
    if let Some(text) = variable["value"].as_str() {
        return text.to_owned();
    }
    match variable.pointer("/valueFrom/fieldRef/fieldPath").and_then(Value::as_str) {
        Some("metadata.name") => "pod-1",
        Some("metadata.namespace") => "default",
        Some("status.podIP" | "status.hostIP" | "status.podIPs") => "10.0.0.7",
        Some("spec.serviceAccountName") => "account",
        Some(_) => "node-1",
        None => "2",
    }
    .to_owned()
}

fn resolve(container: &Value) -> Result<Option<Settings>, String> {
    let args: Vec<&str> = container["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if args.first() != Some(&"proxy") {
        return Ok(None);
    }
    let args = args.into_iter().map(|arg| arg.replace("$(POD_NAMESPACE)", "default"));
    let args =
        Args::try_parse_from(std::iter::once("pilot-agent".to_owned()).chain(args)).map_err(|e| e.to_string())?;
    let Command::Proxy(flags) = args.command else { return Err("not the proxy command".to_owned()) };
    let variables = container["env"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|v| Some((v["name"].as_str()?.to_owned(), value(v))));
    let env: Environment = variables.collect();
    Settings::resolve(&flags, &env, Root::at("nowhere")).map(Some).map_err(|e| format!("{e:#}"))
}

#[test]
fn every_injected_agent_is_understood() {
    let Some(dir) = conformance() else {
        println!("SKIPPED: no reference data; set OUTRIGGER_CONFORMANCE to its folder");
        return;
    };
    let (mut agents, mut failures) = (0, Vec::new());
    for case in std::fs::read_dir(dir).unwrap().flatten() {
        let file = case.path().join("expected.yaml");
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        for document in manifest::parse_plain(&file, &text).unwrap() {
            let mut found = Vec::new();
            containers(&document.value, &mut found);
            for container in found {
                match resolve(container) {
                    Ok(None) => {}
                    Ok(Some(settings)) => {
                        agents += 1;
                        let id = &settings.node.id;
                        assert!(id.contains("~10.0.0.7~pod-1.default~default.svc."), "{}: {id}", file.display());
                    }
                    Err(reason) => failures.push(format!("{}: {reason}", case.file_name().to_string_lossy())),
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(agents > 50, "{agents}");
    println!("{agents} agents");
}
