//! Checks of what runs: proxies, their statistics and certificates, capture.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::Context;
use config_store::{Body, Kind};
use explain::{Files, words};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::Finding;

/// Certificates are renewed at half of their life; one with so little of it left was not.
const LEFT: f64 = 0.2;

/// All of them.
pub(crate) fn check(mesh: &str, files: &Files) -> anyhow::Result<Vec<Finding>> {
    let mut out = Vec::new();
    proxies(mesh, &mut out)?;
    for object in files.snapshot.list(Kind::Pod) {
        let Body::Pod(pod) = &object.body else { continue };
        let name = format!("{}.{}", object.key.name, object.key.namespace);
        let status = serde_json::to_value(pod)?;
        not_ready(&name, &status, &mut out);
        if object.labels.get("security.istio.io/tlsMode").is_none_or(|mode| mode != "istio") {
            continue;
        }
        match machine::ask_proxy(mesh, &name, "GET", "/stats/prometheus") {
            Ok(text) => failures(mesh, &name, &String::from_utf8_lossy(&text), &mut out),
            Err(error) => {
                let what = format!("the proxy of {name} does not answer: {error:#}");
                out.push(Finding::problem("proxy", what, format!("outrigger logs {name} -c istio-proxy")));
                continue;
            }
        }
        if let Ok(text) = machine::ask_proxy(mesh, &name, "GET", "/certs") {
            certificates(&name, &serde_json::from_slice(&text).unwrap_or_default(), &mut out);
        }
        capture(mesh, &name, &mut out);
    }
    Ok(out)
}

/// Proxies that refuse what they are sent, or do not answer for it.
fn proxies(mesh: &str, out: &mut Vec<Finding>) -> anyhow::Result<()> {
    let all = machine::distribution(mesh, None)?;
    for proxy in all.proxies {
        if !proxy.nacks.is_empty() {
            let what = format!(
                "{} refuses its configuration and keeps the last good one: {}",
                proxy.proxy,
                proxy.nacks.join("; ")
            );
            let mend = "correct the object that the resource is made from, or delete it; then: outrigger wait --all"
                .to_owned();
            out.push(Finding::problem("stale", what, mend));
        } else if proxy.synced_to < all.wanted {
            let what = format!("{} has revision {} of {}", proxy.proxy, proxy.synced_to, all.wanted);
            out.push(Finding::warning("stale", what, "outrigger wait --all --timeout 10s".to_owned()));
        }
    }
    Ok(())
}

fn not_ready(name: &str, pod: &Value, out: &mut Vec<Finding>) {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    let ready = conditions.into_iter().flatten().find(|condition| condition["type"] == "Ready");
    let over = matches!(pod.pointer("/status/phase").and_then(Value::as_str), Some("Succeeded" | "Failed"));
    if let Some(ready) = ready.filter(|ready| !over && ready["status"] != "True") {
        let why = ready["message"].as_str().unwrap_or("a container is not ready");
        let what = format!("pod {name} is not ready and gets no requests: {why}");
        out.push(Finding::problem("pod", what, format!("outrigger logs {name}")));
    }
}

/// Requests that this proxy answered itself, or that failed behind it, by cause.
fn failures(mesh: &str, name: &str, text: &str, out: &mut Vec<Finding>) {
    let mut failed: BTreeMap<(String, String, String), (u64, u64)> = BTreeMap::new();
    for sample in text.lines().filter_map(machine::parse_sample).filter(|sample| sample.name == "istio_requests_total")
    {
        let label = |name: &str| sample.labels.get(name).cloned().unwrap_or_default();
        let host = label("destination_service");
        let count = sample.value as u64;
        if label("reporter") != "source" || count == 0 {
            continue;
        }
        let (code, flags) = (label("response_code"), label("response_flags"));
        let all = failed.entry((host.clone(), String::new(), String::new())).or_default();
        all.1 += count;
        if flags != "-" && (code.starts_with('5') || code == "0") {
            failed.entry((host, code, flags)).or_default().0 += count;
        }
    }
    let totals: BTreeMap<String, u64> = failed
        .iter()
        .filter(|((_, code, _), _)| code.is_empty())
        .map(|((host, ..), (_, all))| (host.clone(), *all))
        .collect();
    for ((host, code, flags), (count, _)) in failed.iter().filter(|((_, code, _), _)| !code.is_empty()) {
        let all = totals.get(host).copied().unwrap_or(*count);
        let why = words::of_flags(flags).unwrap_or_else(|| "the cause has no words".to_owned());
        let what = format!("{count} of {all} requests of {name} to {host} got {code} {flags}: {why}");
        let mend = match last(mesh, name, code, flags) {
            Some(id) => format!("outrigger explain --request-id {id}"),
            None => format!("outrigger tap {name} --code {code} --steps"),
        };
        out.push(Finding::problem("failed requests", what, mend));
    }
}

/// The id of the last request that failed so.
fn last(mesh: &str, name: &str, code: &str, flags: &str) -> Option<String> {
    let body = machine::ask_proxy(mesh, name, "GET", &format!("/requests?code={code}&limit=100")).ok()?;
    let answer: Value = serde_json::from_slice(&body).ok()?;
    let found = answer["requests"].as_array()?.iter().find(|record| record["flags"] == flags)?;
    Some(found["request_id"].as_str()?.to_owned()).filter(|id| !id.is_empty())
}

fn certificates(name: &str, answer: &Value, out: &mut Vec<Finding>) {
    let now = OffsetDateTime::now_utc();
    for certificate in answer["certificates"].as_array().into_iter().flatten() {
        for (list, what) in [("cert_chain", "certificate"), ("ca_cert", "root certificate")] {
            for entry in certificate[list].as_array().into_iter().flatten() {
                let moment = |key: &str| OffsetDateTime::parse(entry[key].as_str().unwrap_or_default(), &Rfc3339).ok();
                let (Some(from), Some(to)) = (moment("valid_from"), moment("expiration_time")) else { continue };
                let left = (to - now).as_seconds_f64() / (to - from).as_seconds_f64().max(1.0);
                if left > LEFT {
                    continue;
                }
                let when = if left <= 0.0 { "has expired" } else { "expires soon and was not renewed" };
                let text =
                    format!("a {what} of {name} {when} ({})", entry["expiration_time"].as_str().unwrap_or_default());
                let mend = match what {
                    "certificate" => {
                        format!("outrigger logs {name} -c istio-proxy --tail 50   (why the renewal fails)")
                    }
                    _ => "outrigger ca rotate-root".to_owned(),
                };
                out.push(match left <= 0.0 {
                    true => Finding::problem("certificate", text, mend),
                    false => Finding::warning("certificate", text, mend),
                });
            }
        }
    }
}

/// What `capture doctor` finds in the pod. It moves into the pod's network for good, so it is a process of its own.
fn capture(mesh: &str, name: &str, out: &mut Vec<Finding>) {
    let run = || -> anyhow::Result<Vec<Value>> {
        let program = std::env::current_exe().context("find this program")?;
        let arguments = ["capture", "doctor", "--pod", name, "--name", mesh, "--json"];
        let output = Command::new(program).args(arguments).output().context("start capture doctor")?;
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
    };
    match run() {
        Ok(findings) => {
            for finding in findings.iter().filter(|finding| finding["level"] != "ok") {
                let what = format!("capture in {name}: {}", finding["what"].as_str().unwrap_or_default());
                let mend = finding["mend"].as_str().unwrap_or("outrigger capture show --pod").to_owned();
                out.push(match finding["level"].as_str() {
                    Some("problem") => Finding::problem("capture", what, mend),
                    _ => Finding::warning("capture", what, mend),
                });
            }
        }
        Err(error) => {
            let what = format!("capture in {name} could not be looked at: {error:#}");
            out.push(Finding::warning("capture", what, format!("outrigger capture doctor --pod {name}")));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn old_certificates_are_named() {
        let entry = |from: &str, to: &str| json!({ "valid_from": from, "expiration_time": to });
        let answer = json!({ "certificates": [
            { "cert_chain": [entry("2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")], "ca_cert": [] },
            { "cert_chain": [], "ca_cert": [entry("2020-01-01T00:00:00.000Z", "2999-01-01T00:00:00.000Z")] },
        ] });
        let mut out = Vec::new();
        certificates("a.x", &answer, &mut out);
        assert_eq!(out.len(), 1);
        assert!(out[0].what.contains("certificate of a.x has expired"), "{out:?}");
    }
}
