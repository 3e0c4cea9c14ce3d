//! `outrigger sidecar generate`: a Sidecar that covers exactly what was seen.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use anyhow::bail;
use serde_json::Value;

use crate::fleet::{self, Pod};
use crate::seen;

/// Write the Sidecar that covers exactly what a pod, or a namespace, called since its proxies started.
///
/// It is valid for every Istio. Apply it once the traffic seen is all that there is: what is not in it leaves the proxies' view.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger sidecar generate --from-traffic productpage
  outrigger sidecar generate --namespace default | outrigger apply -f -")]
pub struct Args {
    /// The pod whose workload the Sidecar is for
    #[arg(long, value_name = "POD", required_unless_present = "namespace")]
    from_traffic: Option<String>,
    /// The namespace all of whose workloads the Sidecar is for
    #[arg(long, value_name = "NAMESPACE", conflicts_with = "from_traffic")]
    namespace: Option<String>,
    /// Name of the mesh, when several run on this machine
    #[arg(long, alias = "name", default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
}

/// Labels that say nothing about the workload.
const PASSING: [&str; 9] = [
    "pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "security.istio.io/tlsMode",
    "service.istio.io/canonical-name",
    "service.istio.io/canonical-revision",
    "istio.io/rev",
];

/// What pods called: host with its namespace, and how often.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    hosts: BTreeMap<(String, String), u64>,
    /// Requests to what is in no registry.
    unknown: u64,
}

/// Runs the command.
///
/// # Errors
/// When there is no such pod or namespace, or its proxies do not answer.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let pods = fleet::pods(&args.mesh)?;
    let (name, namespace, selector, of): (String, String, BTreeMap<String, String>, Vec<&Pod>) =
        match (&args.from_traffic, &args.namespace) {
            (Some(said), _) => {
                let pod = fleet::find(&pods, said)?;
                let labels = pod.labels.iter().filter(|(name, _)| !PASSING.contains(&name.as_str()));
                let labels: BTreeMap<String, String> = labels.map(|(k, v)| (k.clone(), v.clone())).collect();
                if labels.is_empty() {
                    bail!("pod {} has no labels by which a Sidecar could select it", pod.full_name());
                }
                let app = labels.get("app").cloned().unwrap_or_else(|| pod.name.clone());
                let name = labels.get("version").map_or_else(|| app.clone(), |version| format!("{app}-{version}"));
                // All pods of the workload, not only the one that was named.
                let alike = |other: &&Pod| {
                    other.namespace == pod.namespace && labels.iter().all(|(k, v)| other.labels.get(k) == Some(v))
                };
                let of = pods.iter().filter(alike).collect();
                (name, pod.namespace.clone(), labels, of)
            }
            (None, Some(namespace)) => {
                let of: Vec<&Pod> = pods.iter().filter(|pod| pod.namespace == *namespace).collect();
                if of.is_empty() {
                    bail!("no pod of namespace {namespace} has a sidecar");
                }
                ("default".to_owned(), namespace.clone(), BTreeMap::new(), of)
            }
            (None, None) => bail!("say --from-traffic POD or --namespace NAMESPACE"),
        };
    let mut seen = Seen::default();
    for pod in &of {
        collect(&fleet::statistics(&args.mesh, pod)?, &mut seen);
    }
    let foreign = rules_elsewhere(&args.mesh, &seen)?;
    let names: Vec<String> = of.iter().map(|pod| pod.full_name()).collect();
    print!("{}", yaml(&name, &namespace, &selector, &seen, &foreign, &names));
    Ok(ExitCode::SUCCESS)
}

fn collect(text: &str, seen: &mut Seen) {
    for (call, count) in seen::calls(text).into_iter().filter(|(call, _)| call.outbound) {
        let is_known = !call.host.is_empty() && call.host != "unknown" && !call.host.ends_with("Cluster");
        let has_namespace = !matches!(call.service_namespace.as_str(), "" | "unknown");
        match is_known && has_namespace {
            true => *seen.hosts.entry((call.service_namespace, call.host)).or_default() += count,
            false => seen.unknown += count,
        }
    }
}

/// Namespaces other than a host's own in which VirtualServices or DestinationRules for it are written: a Sidecar takes them only with
/// the host.
fn rules_elsewhere(mesh: &str, seen: &Seen) -> anyhow::Result<BTreeSet<(String, String)>> {
    let mut out = BTreeSet::new();
    for document in machine::objects(mesh)?.documents {
        if document.kind() != "VirtualService" {
            continue;
        }
        let own = document.namespace().unwrap_or("default").to_owned();
        let hosts = document.value.pointer("/spec/hosts").and_then(Value::as_array).into_iter().flatten();
        for host in hosts.filter_map(Value::as_str) {
            let host = if host.contains('.') { host.to_owned() } else { format!("{host}.{own}.svc.cluster.local") };
            let called = seen.hosts.keys().any(|(namespace, name)| *name == host && *namespace != own);
            if called {
                out.insert((own.clone(), host));
            }
        }
    }
    Ok(out)
}

/// The Sidecar. Names and labels come from Kubernetes objects, so they are safe as quoted JSON text, which YAML reads.
fn yaml(
    name: &str,
    namespace: &str,
    selector: &BTreeMap<String, String>,
    seen: &Seen,
    foreign: &BTreeSet<(String, String)>,
    pods: &[String],
) -> String {
    let quoted = |text: &str| Value::from(text).to_string();
    let scope = |of: &str| if of == namespace { ".".to_owned() } else { of.to_owned() };
    let mut out = format!("# What {} called.\n", pods.join(", "));
    if seen.unknown > 0 {
        out.push_str(&format!(
            "# {} requests went to hosts that no service or ServiceEntry names; with REGISTRY_ONLY they would fail.\n",
            seen.unknown
        ));
    }
    out.push_str("apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata:\n");
    out.push_str(&format!("  name: {}\n  namespace: {}\nspec:\n", quoted(name), quoted(namespace)));
    if !selector.is_empty() {
        out.push_str("  workloadSelector:\n    labels:\n");
        for (key, value) in selector {
            out.push_str(&format!("      {}: {}\n", quoted(key), quoted(value)));
        }
    }
    out.push_str("  egress:\n    - hosts:\n");
    // Not traffic of the application's, and so in no proxy's count of calls: tracing, external authorization, …
    out.push_str("        - \"istio-system/*\" # providers of the mesh\n");
    for ((of, host), count) in &seen.hosts {
        out.push_str(&format!("        - {} # {count}\n", quoted(&format!("{}/{host}", scope(of)))));
    }
    for (of, host) in foreign {
        out.push_str(&format!("        - {} # routing rules\n", quoted(&format!("{}/{host}", scope(of)))));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_called_becomes_a_sidecar() {
        let mut seen = Seen::default();
        let line = |host: &str, namespace: &str, count: u64| {
            format!(
                "istio_requests_total{{reporter=\"source\",destination_service=\"{host}\",\
                 destination_service_namespace=\"{namespace}\",response_code=\"200\"}} {count}\n"
            )
        };
        let text = [
            line("b.shop.svc.cluster.local", "shop", 3),
            line("c.other.svc.cluster.local", "other", 1),
            line("PassthroughCluster", "unknown", 2),
        ];
        collect(&text.concat(), &mut seen);
        let selector = BTreeMap::from([("app".to_owned(), "a".to_owned())]);
        let foreign = BTreeSet::from([("rules".to_owned(), "b.shop.svc.cluster.local".to_owned())]);
        assert_eq!(
            yaml("a", "shop", &selector, &seen, &foreign, &["a-1.shop".to_owned()]),
            "# What a-1.shop called.
# 2 requests went to hosts that no service or ServiceEntry names; with REGISTRY_ONLY they would fail.
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata:
  name: \"a\"
  namespace: \"shop\"
spec:
  workloadSelector:
    labels:
      \"app\": \"a\"
  egress:
    - hosts:
        - \"istio-system/*\" # providers of the mesh
        - \"other/c.other.svc.cluster.local\" # 1
        - \"./b.shop.svc.cluster.local\" # 3
        - \"rules/b.shop.svc.cluster.local\" # routing rules
"
        );
    }
}
