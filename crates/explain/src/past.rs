//! What a request of the recent past really did: the proxies' own records of it, with the places their decisions come from.

use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::{Context, bail};
use proxy_core::cluster::Discovery;
use proxy_core::listener::Terminal;
use proxy_core::{RouteTable, hcm};
use serde::Deserialize;

use crate::mesh::{Mesh, Pod};
use crate::trace::{Explanation, Logged, Outcome, Side, Source, Step};
use crate::unused::Asked;
use crate::upstream::Departure;
use crate::{Configuration, Files, Payload, Sources, origin, scope, words};

/// Whose records are asked for.
pub(crate) struct Whose<'a> {
    /// Name of the running mesh.
    pub(crate) mesh: &'a str,
    /// Only this pod.
    pub(crate) pod: Option<&'a str>,
    /// A proxy's admin port, instead of a mesh.
    pub(crate) admin: Option<&'a str>,
}

/// `/requests` of the admin port.
#[derive(Debug, Deserialize)]
struct Records {
    requests: Vec<Record>,
}

#[derive(Debug, Deserialize)]
struct Record {
    request_id: String,
    time_ms: u64,
    listener: String,
    filter_chain: String,
    downstream_remote: String,
    downstream_local: String,
    peer: Option<String>,
    sni: Option<String>,
    protocol: String,
    method: String,
    authority: String,
    path: String,
    virtual_host: Option<String>,
    route: Option<String>,
    route_index: Option<usize>,
    cluster: Option<String>,
    host: Option<String>,
    code: u16,
    flags: String,
    details: Option<String>,
    duration_us: u64,
    steps: Vec<Decision>,
}

#[derive(Debug, Deserialize)]
struct Decision {
    at_us: u64,
    step: String,
    decision: String,
}

impl Record {
    fn is_inbound(&self) -> bool {
        self.listener == "virtualInbound"
    }
}

/// What stands for the id of the newest request.
const LATEST: &str = "latest";

/// Explains the request of this id.
pub(crate) fn explain(id: &str, whose: &Whose<'_>) -> anyhow::Result<Explanation> {
    let path = format!("/requests?id={}", escaped(id));
    if let Some(address) = whose.admin {
        if id == LATEST {
            let newest = read(&inspect::ask_admin(address, "/requests?limit=1")?)?.pop();
            return explain(&newest.context("the proxy has seen no request")?.request_id, whose);
        }
        let records = read(&inspect::ask_admin(address, &path)?)?;
        let sides = records.iter().map(|record| passage(record, address, None)).collect();
        return assemble(id, sides, None);
    }
    let mesh = Mesh::new(Files::running(whose.mesh, &Sources::default())?)?;
    let pods = match whose.pod {
        Some(name) => vec![mesh.pod(name)?],
        None => mesh.pods.iter().filter(|pod| pod.has_sidecar).cloned().collect(),
    };
    if id == LATEST {
        let newest = |pod: &Rc<Pod>| {
            let body = machine::ask_proxy(whose.mesh, &pod.full_name(), "GET", "/requests?limit=1").ok()?;
            read(&body).ok()?.pop()
        };
        let newest = pods.iter().filter_map(newest).max_by_key(|record| record.time_ms);
        return explain(&newest.context("no proxy has seen a request")?.request_id, whose);
    }
    let mut found: Vec<(Rc<Pod>, Record)> = Vec::new();
    for pod in pods {
        match machine::ask_proxy(whose.mesh, &pod.full_name(), "GET", &path).and_then(|body| read(&body)) {
            Ok(records) => found.extend(records.into_iter().map(|record| (Rc::clone(&pod), record))),
            // Envoy remembers nothing, and a pod may be ending.
            Err(error) => eprintln!("note: {}: {error:#}", pod.full_name()),
        }
    }
    // Clocks are the same; a client's proxy begins before the server's.
    found.sort_by_key(|(_, record)| (record.time_ms, record.is_inbound()));
    let sides = found.iter().map(|(pod, record)| passage(record, &pod.full_name(), Some((&mesh, pod))));
    assemble(id, sides.collect(), Some(&mesh))
}

fn read(body: &[u8]) -> anyhow::Result<Vec<Record>> {
    let records: Records = serde_json::from_slice(body).context("the proxy's answer to /requests")?;
    Ok(records.requests)
}

/// A request's way through one proxy.
struct Passage<'r> {
    side: Side,
    record: &'r Record,
    /// The response flags in words.
    why: Option<String>,
}

fn assemble(id: &str, sides: Vec<Passage<'_>>, mesh: Option<&Mesh>) -> anyhow::Result<Explanation> {
    let (Some(Passage { record: first, .. }), Some(end)) = (sides.first(), sides.last()) else {
        bail!("no proxy remembers a request {id:?}; each remembers its last 10,000")
    };
    let source = first.downstream_remote.parse().ok();
    let client = source.and_then(|address| mesh?.pod_at(address));
    let from = client.map_or_else(|| first.downstream_remote.clone(), |pod| pod.full_name());
    let request =
        format!("{} http://{}{}  x-request-id: {}", first.method, first.authority, first.path, first.request_id);
    let last = end.record;
    let reached = last.details.as_deref() == Some("via_upstream");
    let by = &end.side.proxy;
    let took = milliseconds(first.duration_us);
    let summary = match (reached, &end.why) {
        (true, _) => format!("{} from the application, after {took}", first.code),
        (false, Some(why)) => format!("{} after {took}, answered by the proxy of {by}: {why}", first.code),
        (false, None) if last.virtual_host.as_deref() == Some("block_all") => format!(
            "{} after {took}, answered by the proxy of {by}: it does not know the host, and may call no others (REGISTRY_ONLY)",
            last.code
        ),
        (false, None) => format!(
            "{} after {took}, answered by the proxy of {by}: {}",
            first.code,
            words::of_details(last.details.as_deref().unwrap_or("-"))
        ),
    };
    let outcome = Outcome {
        delivered: reached,
        status: Some(first.code),
        flag: Some(last.flags.clone()).filter(|flags| flags != "-"),
        details: last.details.clone().unwrap_or_default(),
        summary,
    };
    Ok(Explanation { request, from, sides: sides.into_iter().map(|passage| passage.side).collect(), outcome })
}

/// One proxy's record as steps.
fn passage<'r>(record: &'r Record, proxy: &str, of: Option<(&Mesh, &Rc<Pod>)>) -> Passage<'r> {
    let configuration = of.map(|(mesh, pod)| mesh.configuration(pod));
    let about_rules = of.filter(|_| !record.is_inbound()).and_then(|(mesh, pod)| {
        let (host, _) = record.authority.rsplit_once(':').unwrap_or((&record.authority, ""));
        let port = record.downstream_local.parse::<SocketAddr>().ok()?.port();
        Some(Asked { mesh, pod, service: mesh.service(pod, host)?, port }.all())
    });
    let mesh = of.map(|(mesh, _)| mesh);
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let mut side = Side {
        role: if record.is_inbound() { "server" } else { "client" },
        proxy: proxy.to_owned(),
        logged: Logged {
            listener: record.listener.clone(),
            filter_chain: record.filter_chain.clone(),
            virtual_host: text(&record.virtual_host),
            route: text(&record.route),
            cluster: text(&record.cluster),
            clusters: Vec::new(),
        },
        steps: Vec::new(),
    };
    let from = format!("{} from {} to {}", record.protocol, record.downstream_remote, record.downstream_local);
    side.steps.push(Step::new("listener", record.listener.clone()).fact(from));
    if !record.filter_chain.is_empty() {
        side.steps.push(Step::new("filter chain", record.filter_chain.clone()));
    }
    if let Some(peer) = &record.peer {
        let mut step = Step::new("tls", "mutual, terminated here").fact(format!("they are {peer}"));
        if let Some((_, pod)) = of {
            step = step.fact(format!("we are   {}", pod.identity));
        }
        if let Some(sni) = &record.sni {
            step = step.fact(format!("SNI {sni}"));
        }
        side.steps.push(step);
    }
    if let Some(name) = &record.virtual_host {
        side.steps.push(Step::new("virtual host", name.clone()));
    }
    side.steps.extend(about_rules.into_iter().flatten());
    if record.virtual_host.as_deref() == Some("block_all") {
        side.steps.push(scope::blocked(of.map(|(mesh, pod)| (mesh, &**pod)), &record.authority));
    }
    let mut by_name = false;
    for decision in &record.steps {
        side.steps.extend(step(decision, record, mesh, configuration.as_deref()));
    }
    if let (Some(name), Some(at)) = (&record.cluster, configuration.as_deref()) {
        let after_route =
            side.steps.iter().rposition(|step| step.decides == "route").map_or(side.steps.len(), |at| at + 1);
        if let Some(Ok((cluster, _))) = at.cluster(name) {
            let departure = Departure {
                at,
                mesh,
                cluster: name,
                metadata_match: None,
                http: None,
                payload: Payload::Http1,
                original: ([0, 0, 0, 0], 0).into(),
                pod: of.map(|(_, pod)| &**pod),
                random: 0,
            };
            side.steps.insert(after_route, departure.describe(&cluster));
            by_name = matches!(cluster.discovery, Discovery::StrictDns(_) | Discovery::LogicalDns(_));
        }
    }
    if let Some(host) = &record.host {
        let pod = host.parse().ok().and_then(|address| mesh?.pod_at(address));
        let named = pod.map_or_else(|| host.clone(), |pod| format!("{host} ({})", pod.full_name()));
        side.steps.push(Step::new("endpoint", named));
    }
    let details = record.details.as_deref().unwrap_or("-");
    let mut answer = Step::new("answer", format!("{} {} {details}", record.code, record.flags))
        .fact(format!("after {}", milliseconds(record.duration_us)));
    let why = words::of_flags(&record.flags, by_name);
    if let Some(why) = &why {
        answer = answer.fact(why.as_str());
    }
    answer.ends = details != "via_upstream";
    side.steps.push(answer);
    Passage { side, record, why }
}

fn step(decision: &Decision, record: &Record, mesh: Option<&Mesh>, at: Option<&Configuration>) -> Option<Step> {
    let moment = format!("at {}", milliseconds(decision.at_us));
    match decision.step.as_str() {
        "route" => {
            let (Some(vhost), Some(index)) = (&record.virtual_host, record.route_index) else {
                return Some(Step::new("route", decision.decision.clone()).fact(moment).end());
            };
            let name = record.route.as_deref().filter(|name| !name.is_empty());
            let named = name.map_or_else(String::new, |name| format!(" {name:?}"));
            let found = at.and_then(|at| origin_of_route(at, record, vhost, index, mesh));
            let (conditions, source) =
                found.map_or((String::new(), None), |(all, source)| (format!(": {all}"), source));
            Some(Step::new("route", format!("#{}{named}{conditions}", index + 1)).source(source).fact(moment))
        }
        // A filter that let the request pass says nothing.
        _ if decision.decision == "passed" => None,
        name if name.starts_with("try ") => Some(Step::new("try", decision.decision.clone()).fact(moment)),
        "retry" => Some(Step::new("retry", decision.decision.clone()).fact(moment)),
        "redirect" => Some(Step::new("redirect", decision.decision.clone()).fact(moment)),
        name if name.contains("rbac") => {
            let source = origin::of_policy(&decision.decision, mesh);
            let step = Step::new("authorization", decision.decision.clone()).source(source).fact(moment);
            Some(if decision.decision.starts_with("answered") { step.end() } else { step })
        }
        name => {
            let step = Step::new("filter", format!("{name}: {}", decision.decision)).fact(moment);
            Some(if decision.decision.starts_with("answered") { step.end() } else { step })
        }
    }
}

/// The conditions of the route that was taken, and where it is written; nothing if the configuration has changed since.
fn origin_of_route(
    at: &Configuration,
    record: &Record,
    vhost: &str,
    index: usize,
    mesh: Option<&Mesh>,
) -> Option<(String, Option<Source>)> {
    let in_listener = at.listener(&record.listener).into_iter().flat_map(|listener| &listener.chains).filter_map(
        |chain| match &chain.terminal {
            Terminal::Http(http) => match &http.routes {
                hcm::Routes::Inline(table) => Some(&**table),
                hcm::Routes::Rds { name, .. } => at.tables.get(name).map(|table| &**table),
            },
            _ => None,
        },
    );
    let tables: Vec<&RouteTable> = in_listener.collect();
    let found = tables.iter().flat_map(|table| table.virtual_hosts()).find(|host| *host.name == *vhost)?;
    let route = found.routes.get(index).filter(|route| Some(&*route.name) == record.route.as_deref())?;
    Some((route.matcher.conditions().join(", "), origin::of_metadata(&route.metadata, mesh)))
}

fn milliseconds(microseconds: u64) -> String {
    format!("{:.1} ms", microseconds as f64 / 1000.0)
}

/// For a query string.
fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}
