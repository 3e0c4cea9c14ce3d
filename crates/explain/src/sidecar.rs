//! `outrigger sidecar explain`: which Sidecar applies to a pod, which ones lost, what it lets the proxy see and what that saves.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::process::ExitCode;

use config_store::{Body, Kind, Object};
use envoy_api::type_url;
use mesh_types::selects;
use push_context::{PushContext, Settings};
use serde::Serialize;
use xds_gen::{Names, generate};

use crate::Sources;
use crate::mesh::{Mesh, Pod};
use crate::trace::Source;

/// Say which Sidecar applies to a pod, which ones lost, what its proxy sees, and what that saves.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger sidecar explain productpage
  outrigger sidecar explain reviews -f samples/bookinfo samples/bookinfo/networking/sidecar-scoping.yaml")]
pub struct Args {
    /// The pod: its name, the beginning of it, or its `app` label, with `.NAMESPACE` if need be
    #[arg(value_name = "POD")]
    pod: String,
    #[command(flatten)]
    sources: Sources,
    /// Name of the running mesh that is asked where there is no --input
    #[arg(long, alias = "name", default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
    /// How it is written
    #[arg(long, short = 'o', default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

/// What is known of a pod's scope.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Scope {
    pod: String,
    /// None: the namespace's default scope, which is everything that is exported to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    applies: Option<Source>,
    /// Why it does.
    why: String,
    lost: Vec<Lost>,
    /// Host and namespace of what the proxy sees, with the entry of the Sidecar that lets it in.
    sees: Vec<Seen>,
    /// So many it does not see.
    hidden: Vec<String>,
    unknown_hosts: &'static str,
    with: Size,
    without: Size,
}

#[derive(Debug, Serialize)]
struct Lost {
    sidecar: Source,
    why: String,
}

#[derive(Debug, Serialize)]
struct Seen {
    host: String,
    namespace: String,
    /// The entry of `egress[].hosts`, or what else needs it.
    because: String,
}

/// What a proxy is sent.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Size {
    clusters: usize,
    listeners: usize,
    routes: usize,
    endpoints: usize,
    bytes: usize,
}

/// Runs the command.
///
/// # Errors
/// When the input cannot be read, or there is no such pod.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mesh = crate::describe::mesh(&args.sources, &args.mesh)?;
    let scope = scope(&mesh, &*mesh.pod(&args.pod)?);
    match args.output.as_str() {
        "json" => println!("{}", serde_json::to_string_pretty(&scope)?),
        _ => print!("{}", text(&scope)),
    }
    Ok(ExitCode::SUCCESS)
}

fn scope(mesh: &Mesh, pod: &Pod) -> Scope {
    let push = &mesh.files.push;
    let own = push.scope(&pod.node);
    let winner = push.sidecar_for(&pod.namespace, &pod.labels);
    let source = |object: &Object| mesh.source(&object.key, "");
    let is_winner = |object: &Object| {
        winner.is_some_and(|winner| *winner.name == *object.key.name && *winner.namespace == *object.key.namespace)
    };
    let selector = |object: &Object| match &object.body {
        Body::Sidecar(spec) => spec.workload_selector.as_ref().map(|selector| selector.labels.clone()),
        _ => None,
    };
    let sidecars = || mesh.files.snapshot.list(Kind::Sidecar);
    let applies = sidecars().find(|object| is_winner(object));
    let why = match applies {
        None => "no Sidecar is for it: its proxy sees all that is exported to its namespace".to_owned(),
        Some(object) if selector(object).is_some() => "its workloadSelector fits the pod".to_owned(),
        Some(object) if *object.key.namespace == *pod.namespace => "it is for all pods of the namespace".to_owned(),
        Some(_) => "it is the root namespace's, for all pods without one of their own".to_owned(),
    };
    let concerns = |object: &&std::sync::Arc<Object>| {
        *object.key.namespace == *pod.namespace || *object.key.namespace == *push.root_namespace
    };
    let lost = sidecars().filter(concerns).filter(|object| !is_winner(object)).map(|object| {
        let here = *object.key.namespace == *pod.namespace;
        let why = match (selector(object), here) {
            (Some(_), false) => "a workloadSelector of the root namespace's is for gateways there only".to_owned(),
            (Some(labels), true) if !selects(&labels, &pod.labels) => {
                let missing: Vec<String> = labels
                    .iter()
                    .filter(|(name, value)| pod.labels.get(*name) != Some(*value))
                    .map(|(name, value)| format!("{name}={value}"))
                    .collect();
                format!("its workloadSelector wants {}", missing.join(", "))
            }
            (Some(_), true) => "it fits, too, but is younger; of several the oldest wins".to_owned(),
            (None, true) if applies.is_some_and(|winner| selector(winner).is_some()) => {
                "one with a workloadSelector comes before the namespace's".to_owned()
            }
            (None, true) => "it is for the namespace, too, but is younger; of several the oldest wins".to_owned(),
            (None, false) => "the namespace has one of its own".to_owned(),
        };
        Lost { sidecar: source(object), why }
    });
    let lost = lost.collect();
    let sees: Vec<Seen> = own
        .services
        .iter()
        .map(|service| {
            let egress = own.egress.iter().find(|egress| {
                egress.services.iter().any(|s| s.hostname == service.hostname && s.namespace == service.namespace)
            });
            let because = egress.and_then(|egress| {
                let hosts = &egress.listener.hosts;
                let fits = |entry: &&String| {
                    let (namespace, name) = entry.split_once('/').unwrap_or(("*", entry));
                    let namespace_fits = match namespace {
                        "*" => true,
                        "." => *service.namespace == *pod.namespace,
                        other => *service.namespace == *other,
                    };
                    namespace_fits && push_context::host::matches(name, &service.hostname)
                };
                hosts.iter().find(fits).cloned()
            });
            Seen {
                host: service.hostname.to_string(),
                namespace: service.namespace.to_string(),
                because: because.unwrap_or_else(|| "a VirtualService in scope leads there".to_owned()),
            }
        })
        .collect();
    let visible: BTreeSet<(&str, &str)> = sees.iter().map(|s| (s.host.as_str(), s.namespace.as_str())).collect();
    let hidden = push.registry.services.iter().filter(|s| !visible.contains(&(&*s.hostname, &*s.namespace)));
    Scope {
        pod: pod.full_name(),
        applies: applies.map(|object| source(object)),
        why,
        lost,
        hidden: hidden.map(|service| service.hostname.to_string()).collect(),
        unknown_hosts: if own.allows_any() { "ALLOW_ANY" } else { "REGISTRY_ONLY" },
        with: size(push, pod),
        without: size(&without_sidecars(mesh), pod),
        sees,
    }
}

/// The same mesh as if nobody had written a Sidecar.
fn without_sidecars(mesh: &Mesh) -> PushContext {
    let mut store = config_store::Store::new();
    for document in mesh.files.documents.iter().filter(|document| document.kind() != "Sidecar") {
        // What is refused was said when the mesh was read.
        let _ = store.apply(document);
    }
    let settings: &Settings = &mesh.files.push.settings;
    PushContext::build(&store.snapshot(), &mesh.files.push.mesh, settings)
}

fn size(push: &PushContext, pod: &Pod) -> Size {
    let mut out = Size::default();
    let types = [type_url::CLUSTER, type_url::LISTENER, type_url::ROUTE, type_url::ENDPOINT];
    for (at, url) in types.into_iter().enumerate() {
        let all = generate(push, &pod.node, url, Names::Wildcard);
        let count = match at {
            0 => &mut out.clusters,
            1 => &mut out.listeners,
            2 => &mut out.routes,
            _ => &mut out.endpoints,
        };
        *count = all.len();
        out.bytes += all.iter().map(|resource| resource.body.len()).sum::<usize>();
    }
    out
}

fn text(scope: &Scope) -> String {
    let mut out = String::new();
    let place = |source: &Source| match source.place.as_str() {
        "" => source.object.clone(),
        place => format!("{}, {place}", source.object),
    };
    match &scope.applies {
        Some(source) => drop(writeln!(out, "{} has {}: {}", scope.pod, place(source), scope.why)),
        None => drop(writeln!(out, "{}: {}", scope.pod, scope.why)),
    }
    for lost in &scope.lost {
        let _ = writeln!(out, "  not {}: {}", place(&lost.sidecar), lost.why);
    }
    let _ =
        writeln!(out, "\nIt sees {} services; hosts that it does not know: {}", scope.sees.len(), scope.unknown_hosts);
    let width = scope.sees.iter().map(|seen| seen.host.len()).max().unwrap_or(0);
    for seen in &scope.sees {
        let _ = writeln!(out, "  {:width$}  {}", seen.host, seen.because);
    }
    if !scope.hidden.is_empty() {
        let _ = writeln!(out, "It does not see {}:", scope.hidden.len());
        for host in &scope.hidden {
            let _ = writeln!(out, "  {host}");
        }
    }
    let _ = writeln!(out, "\n              with it  without a Sidecar");
    let rows = [
        ("clusters", scope.with.clusters, scope.without.clusters),
        ("endpoints", scope.with.endpoints, scope.without.endpoints),
        ("listeners", scope.with.listeners, scope.without.listeners),
        ("route tables", scope.with.routes, scope.without.routes),
        ("bytes", scope.with.bytes, scope.without.bytes),
    ];
    for (what, with, without) in rows {
        let _ = writeln!(out, "{what:12}  {with:7}  {without:7}");
    }
    out
}
