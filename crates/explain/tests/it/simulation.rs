//! Istio's request simulator as judge, through the reference data's own script.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of reference data and the program, or nothing and one visible line.
fn tools() -> Option<(PathBuf, PathBuf)> {
    let root = match std::env::var_os("OUTRIGGER_CONFORMANCE") {
        Some(root) => PathBuf::from(root),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"),
    };
    let data = root.join("simulation");
    let Some(program) = std::env::var_os("OUTRIGGER_BIN").map(PathBuf::from).filter(|program| program.exists()) else {
        println!("SKIPPED: no program; set OUTRIGGER_BIN");
        return None;
    };
    if !data.is_dir() {
        println!("SKIPPED: no reference data at {}; set OUTRIGGER_CONFORMANCE", data.display());
        return None;
    }
    Some((data, program))
}

#[test]
fn every_call_goes_where_istio_says() {
    let Some((data, program)) = tools() else { return };
    let result = Command::new("python3")
        .arg(data.join("check.py"))
        .arg("--tool")
        .arg(program)
        .args(["-q", "--show", "3"])
        .output()
        .expect("python3 is needed to compare with the reference cases");
    let text = String::from_utf8_lossy(&result.stdout);
    println!("{}", text.lines().last().unwrap_or_default());
    assert!(result.status.success(), "{text}{}", String::from_utf8_lossy(&result.stderr));
}

/// The questions that are no calls, which the script leaves out.
#[test]
fn every_question_is_answered_as_istio_does() {
    let Some((data, program)) = tools() else { return };
    let (mut right, mut wrong) = (0, Vec::new());
    for case in std::fs::read_dir(data.join("data")).unwrap().map(|entry| entry.unwrap().path()) {
        let read = |name: &str| -> Option<Vec<serde_json::Value>> {
            serde_saphyr::from_str(&std::fs::read_to_string(case.join(name)).ok()?).ok()
        };
        let Some(entries) = read("calls.yaml") else { continue };
        if !entries.iter().any(|entry| entry.get("kind").is_some() || entry.get("checks").is_some()) {
            continue;
        }
        let mut command = Command::new(&program);
        command.args(["explain", "-o", "json"]);
        for (flag, name) in [
            ("--input", "input.yaml"),
            ("--proxy", "proxy.yaml"),
            ("--calls", "calls.yaml"),
            ("--mesh-config", "mesh.yaml"),
            ("--settings", "settings.yaml"),
        ] {
            if case.join(name).exists() {
                command.arg(flag).arg(case.join(name));
            }
        }
        let output = command.output().unwrap();
        let answers: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
        for (entry, answer) in entries.iter().zip(&answers) {
            let problem = differs(entry, answer);
            match problem {
                None => right += 1,
                Some(problem) => wrong.push(format!("{}: {}: {problem}", case.display(), entry["name"])),
            }
        }
    }
    println!("{right} entries as expected");
    assert!(wrong.is_empty() && right > 0, "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

fn differs(entry: &serde_json::Value, answer: &serde_json::Value) -> Option<String> {
    use serde_json::Value;
    let expect = &entry["expect"];
    let result = &answer["result"];
    let unequal = |want: &Value, got: &Value| (want != got).then(|| format!("want {want} got {got}"));
    match entry["kind"].as_str() {
        // Domains that are not listed are not checked.
        Some("virtualHosts") => expect
            .as_object()
            .into_iter()
            .flatten()
            .find_map(|(domain, want)| unequal(want, result.get(domain).unwrap_or(&Value::Null))),
        Some("inboundClusters") => {
            ["clusters", "telemetry"].iter().find_map(|part| unequal(&expect[*part], &result[*part]))
        }
        Some("listenerShape") => {
            expect.as_object().into_iter().flatten().find_map(|(key, want)| match want.get("kind") {
                Some(_) => {
                    (result[key].as_u64() < want["value"].as_u64()).then(|| format!("{key}: got {}", result[key]))
                }
                None => unequal(want, &result[key]),
            })
        }
        Some(other) => Some(format!("unknown kind {other}")),
        None => entry["checks"].as_array().into_iter().flatten().find_map(|check| {
            ["firstCertificateSdsSecret", "requireClientCertificate"]
                .iter()
                .find_map(|key| unequal(&check[*key], &answer["tlsContext"][*key]))
        }),
    }
}
