//! Checks of what runs: proxies, their statistics and certificates, capture.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::Context;
use config_store::{Body, Kind};
use explain::{Files, words};
use registry::Resolution;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::Finding;

/// Certificates are renewed at half of their life; one with so little of it left was not.
const LEFT: f64 = 0.2;

/// All of them.
pub(crate) fn check(mesh: &str, files: &Files) -> anyhow::Result<Vec<Finding>> {
    let mut out = Vec::new();
    proxies(mesh, files, &mut out)?;
    for object in files.snapshot.list(Kind::Pod) {
        let Body::Pod(pod) = &object.body else { continue };
        let name = format!("{}.{}", object.key.name, object.key.namespace);
        let status = serde_json::to_value(pod)?;
        not_ready(&name, &status, &mut out);
        if object.labels.get("security.istio.io/tlsMode").is_none_or(|mode| mode != "istio") {
            continue;
        }
        match machine::ask_proxy(mesh, &name, "GET", "/stats/prometheus") {
            Ok(text) => {
                failures(mesh, files, &name, &String::from_utf8_lossy(&text), &mut out);
                refusals(mesh, &name, &mut out);
            }
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
fn proxies(mesh: &str, files: &Files, out: &mut Vec<Finding>) -> anyhow::Result<()> {
    let all = machine::distribution(mesh, None)?;
    // What one proxy refuses, most do.
    let mut refused: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for proxy in all.proxies {
        if !proxy.nacks.is_empty() {
            refused.entry(proxy.nacks.join("; ")).or_default().push(proxy.proxy);
        } else if proxy.synced_to < all.wanted {
            let what = format!("{} has revision {} of {}", proxy.proxy, proxy.synced_to, all.wanted);
            out.push(Finding::warning("stale", what, "outrigger wait --all --timeout 10s".to_owned()));
        }
    }
    for (why, mut proxies) in refused {
        proxies.sort();
        let who = match proxies.as_slice() {
            [one] => format!("{one} refuses its"),
            [first, rest @ ..] => format!("{first} and {} more refuse their", rest.len()),
            [] => continue,
        };
        let what = format!("{who} configuration, and the last good one stays: {why}");
        let mend =
            "correct the object that the resource is made from, or delete it; then: outrigger wait --all".to_owned();
        let finding = Finding::problem("stale", what, mend);
        // With the same words all refuse the same.
        let source = proxies.first().and_then(|proxy| explain::blame(files, proxy, &why));
        out.push(match source {
            Some(source) => finding.at(source),
            None => finding,
        });
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

/// A failure so old is history, if requests passed since, or nothing can be sent there any more.
const HISTORY_MS: u64 = 60_000;

/// Requests that failed, by cause: those that this proxy sent, and those that its own application did not take.
fn failures(mesh: &str, files: &Files, name: &str, text: &str, out: &mut Vec<Finding>) {
    let mut failed: BTreeMap<(bool, String, String, String), u64> = BTreeMap::new();
    let mut all: BTreeMap<(bool, String), u64> = BTreeMap::new();
    for sample in text.lines().filter_map(machine::parse_sample).filter(|sample| sample.name == "istio_requests_total")
    {
        let label = |name: &str| sample.labels.get(name).cloned().unwrap_or_default();
        let (host, code, flags) = (label("destination_service"), label("response_code"), label("response_flags"));
        let count = sample.value as u64;
        let sent = label("reporter") == "source";
        *all.entry((sent, host.clone())).or_default() += count;
        // Of clients that left, their own proxy knows more than the server's.
        let left = !sent && flags.split(',').any(|flag| flag == "DC");
        if count > 0 && flags != "-" && !left && (code.starts_with('5') || code == "0") {
            *failed.entry((sent, host, code, flags)).or_default() += count;
        }
    }
    if failed.is_empty() {
        return;
    }
    let records = Records::ask(mesh, name, "");
    for ((sent, host, code, flags), count) in failed {
        let of = all.get(&(sent, host.clone())).copied().unwrap_or(count);
        let last = Records::ask(mesh, name, &format!("code={code}&")).last(sent, &host, &flags);
        let ago = last.as_ref().map(Failed::ago_ms);
        let passed = last.as_ref().is_some_and(|last| records.passed_since(sent, &host, last));
        let is_gone = sent && !files.push.registry.services.iter().any(|service| *service.hostname == *host);
        let mut what = match sent {
            true => {
                let services = &files.push.registry.services;
                let by_name = services.iter().find(|service| *service.hostname == *host).is_some_and(|service| {
                    matches!(service.resolution, Resolution::DnsLb | Resolution::DnsRoundRobinLb)
                });
                let why = words::of_flags(&flags, by_name).unwrap_or_else(|| "the cause has no words".to_owned());
                format!("{count} of {of} requests of {name} to {host} got {code} {flags}: {why}")
            }
            false => {
                let port = last.as_ref().map_or_else(String::new, |last| format!(", port {}", last.port));
                let why = match flags.contains("UF") {
                    true => "it takes no connections there; does the Service's targetPort fit?".to_owned(),
                    false => words::of_flags(&flags, false).unwrap_or_default(),
                };
                format!(
                    "{count} of {of} requests to {name} failed at its own application{port}, with {code} {flags}: {why}"
                )
            }
        };
        let mend = match last.as_ref().filter(|last| !last.id.is_empty()) {
            Some(last) => format!("outrigger explain --request-id {}", last.id),
            None => format!("outrigger tap {name} --code {code} --steps"),
        };
        if let Some(ago) = ago {
            let later = if passed { "; later ones passed" } else { "" };
            what.push_str(&format!(" (the last one {} s ago{later})", ago / 1000));
        }
        let is_history = (passed || is_gone) && ago.is_some_and(|ago| ago > HISTORY_MS);
        // Nothing in the mesh failed where the application itself gave up.
        let gave_up = flags.split(',').any(|flag| flag == "DC");
        out.push(match is_history || gave_up {
            false => Finding::problem("failed requests", what, mend),
            true => Finding::warning("failed requests", what, mend),
        });
    }
}

/// Requests that policies denied, and those to hosts that the proxy may not know, as far as it remembers.
fn refusals(mesh: &str, name: &str, out: &mut Vec<Finding>) {
    let mut seen: BTreeMap<String, (u64, String)> = BTreeMap::new();
    // The newest comes last.
    let mut count = |what: String, id: &Value| {
        let entry = seen.entry(what).or_default();
        entry.0 += 1;
        id.as_str().unwrap_or_default().clone_into(&mut entry.1);
    };
    for record in Records::ask(mesh, name, "code=403&").0.iter().rev() {
        let details = record["details"].as_str().unwrap_or_default();
        if details.starts_with("rbac_access_denied") {
            let peer = record["peer"].as_str().unwrap_or("somebody without a certificate");
            let what = format!("requests of {peer} were denied at {name}: {}", words::of_details(details));
            count(what, &record["request_id"]);
        }
    }
    for record in Records::ask(mesh, name, "code=502&").0.iter().rev() {
        if record["virtual_host"] == "block_all" {
            let host = record["authority"].as_str().unwrap_or_default();
            let what =
                format!("requests of {name} to {host} got 502: it may call only what its proxy sees (REGISTRY_ONLY)");
            count(what, &record["request_id"]);
        }
    }
    for (what, (times, id)) in seen {
        let mend = format!("outrigger explain --request-id {id}");
        out.push(Finding::warning("denied requests", format!("{times} {what}"), mend));
    }
}

/// What a proxy of ours remembers of its requests; nothing of an Envoy.
struct Records(Vec<Value>);

/// A request that failed.
struct Failed {
    id: String,
    time_ms: u64,
    /// Where it was to go.
    port: String,
}

impl Records {
    /// The newest that a query selects.
    fn ask(mesh: &str, name: &str, query: &str) -> Self {
        let answer = machine::ask_proxy(mesh, name, "GET", &format!("/requests?{query}limit=200")).ok();
        let answer: Option<Value> = answer.and_then(|body| serde_json::from_slice(&body).ok());
        Self(answer.and_then(|answer| answer["requests"].as_array().cloned()).unwrap_or_default())
    }

    /// Those to a host, or those to the application.
    fn to<'a>(&'a self, sent: bool, host: &'a str) -> impl Iterator<Item = (&'a Value, u64)> {
        let fits = move |record: &&Value| {
            let inbound = record["listener"] == "virtualInbound";
            let cluster = record["cluster"].as_str().and_then(|cluster| cluster.rsplit('|').next());
            // Requests to clusters that are not there count for no host.
            inbound != sent && (inbound || host == "unknown" || cluster == Some(host))
        };
        self.0.iter().filter(fits).map(|record| (record, record["time_ms"].as_u64().unwrap_or_default()))
    }

    /// The last one that failed so.
    fn last(&self, sent: bool, host: &str, flags: &str) -> Option<Failed> {
        // Statistics and records name them in different orders.
        let sorted = |flags: &str| {
            let mut all: Vec<String> = flags.split(',').map(str::to_owned).collect();
            all.sort();
            all
        };
        let wanted = sorted(flags);
        let failed =
            self.to(sent, host).filter(|(record, _)| record["flags"].as_str().is_some_and(|own| sorted(own) == wanted));
        let (record, time_ms) = failed.max_by_key(|(_, time)| *time)?;
        let cluster = record["cluster"].as_str().unwrap_or_default();
        Some(Failed {
            id: record["request_id"].as_str().unwrap_or_default().to_owned(),
            time_ms,
            port: cluster.split('|').nth(1).unwrap_or("?").to_owned(),
        })
    }

    /// Whether requests to the same place have passed since it failed.
    fn passed_since(&self, sent: bool, host: &str, failed: &Failed) -> bool {
        let passed = |record: &Value| record["flags"] == "-" && record["code"].as_u64().is_some_and(|code| code < 500);
        self.to(sent, host).any(|(record, time)| time > failed.time_ms && passed(record))
    }
}

impl Failed {
    fn ago_ms(&self) -> u64 {
        let now = OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
        u64::try_from(now).unwrap_or_default().saturating_sub(self.time_ms)
    }
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
    fn the_last_failure_is_of_the_same_place() {
        let record = |id: &str, time: u64, listener: &str, cluster: &str, code: u16, flags: &str| json!({ "request_id": id, "time_ms": time, "listener": listener, "cluster": cluster, "code": code, "flags": flags });
        let records = Records(vec![
            record("a", 1, "0.0.0.0_80", "outbound|80||a.x", 503, "UH"),
            record("b", 2, "0.0.0.0_80", "outbound|80||b.x", 503, "UH"),
            record("in", 3, "virtualInbound", "inbound|9999||", 503, "URX,UF"),
            record("ok", 4, "0.0.0.0_80", "outbound|80|v1|a.x", 200, "-"),
        ]);
        let a = records.last(true, "a.x", "UH").unwrap();
        assert_eq!(a.id, "a");
        assert!(records.passed_since(true, "a.x", &a) && a.ago_ms() > HISTORY_MS);
        let b = records.last(true, "b.x", "UH").unwrap();
        assert_eq!((b.id.as_str(), records.passed_since(true, "b.x", &b)), ("b", false));
        assert_eq!(records.last(false, "any", "UF,URX").unwrap().port, "9999");
    }

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
