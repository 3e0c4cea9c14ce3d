//! Rules that seem to apply and do not.

use super::ask;

const ROUTE: &str = "http: [{route: [{destination: {host: a.default.svc.cluster.local}}]}]";

fn rule(kind: &str, name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n{spec}\n---\n"
    )
}

#[test]
fn a_virtual_service_that_nobody_follows_is_told_with_its_reason() {
    let of = |namespace: &str, spec: &str| {
        ask(
            &rule(
                "VirtualService",
                "v",
                namespace,
                &format!("  hosts: [a.default.svc.cluster.local]\n{spec}\n  {ROUTE}"),
            ),
            "client",
            "http://a/",
        )
    };
    of("default", "  gateways: [edge]").arrives().says(&[
        "not used       VirtualService default/v: it is for gateways only (edge); add mesh to spec.gateways",
        "← VirtualService default/v spec.gateways, ",
        "mesh.yaml:6",
    ]);
    of("other", "  exportTo: ['.']").says(&["it is exported to . only, and the client is in default", "mesh.yaml:6"]);
    of("default", "  gateways: [mesh]").says_not("not used");
    let port = "  hosts: [a]\n  http: [{match: [{port: 91}], route: [{destination: {host: a}}]}]";
    ask(&rule("VirtualService", "v", "default", port), "client", "http://a/")
        .says(&["none of its routes is for port 80 and this client"]);
    let short = rule("VirtualService", "v", "other", &format!("  hosts: [a]\n  {ROUTE}"));
    ask(&short, "client", "http://a/")
        .says(&["its host a means a.other.svc.cluster.local, which is no service", "mesh.yaml:5"]);
}

#[test]
fn of_two_virtual_services_the_one_that_loses_is_told() {
    let both =
        ["first", "second"].map(|name| rule("VirtualService", name, "default", &format!("  hosts: [a]\n  {ROUTE}")));
    ask(&both.concat(), "client", "http://a/")
        .says(&[
            "VirtualService default/second: VirtualService default/first (",
            "is for the same host and comes first",
        ])
        .says_not("VirtualService default/first: ");
}

#[test]
fn http_rules_of_a_tcp_port_are_told_with_the_port() {
    let yaml = rule("VirtualService", "v", "default", &format!("  hosts: [a]\n  {ROUTE}"));
    ask(&yaml, "client", "tcp://a:90").says_not("is for the same host");
    ask(&yaml, "client", "http://a:90/").says(&[
        "its HTTP rules do not apply to port 90 of a.default.svc.cluster.local, which is declared as TCP by its name \"tcp-x\"",
        "base.yaml:9",
    ]);
}

#[test]
fn a_destination_rule_that_is_not_found_or_loses_is_told() {
    let policy = "  trafficPolicy: {connectionPool: {tcp: {maxConnections: 1}}}";
    let of = |name: &str, namespace: &str, more: &str| {
        rule("DestinationRule", name, namespace, &format!("  host: a.default.svc.cluster.local\n{policy}\n{more}"))
    };
    ask(&of("d", "other", ""), "client", "http://a/")
        .says(&["DestinationRule other/d: rules are looked for in the namespaces of client (default) and service (default) and in istio-system, not in other"]);
    ask(&of("d", "istio-system", "  exportTo: ['.']"), "client", "http://a/")
        .says(&["it is exported to . only", "mesh.yaml:7"]);
    let both = of("first", "default", "") + &of("second", "default", "");
    ask(&both, "client", "http://a/").says(&[
        "DestinationRule default/second: the trafficPolicy of DestinationRule default/first (",
        "which is older, holds",
    ]);
    let subsets = of("first", "default", "")
        + &rule("DestinationRule", "second", "default", "  host: a\n  subsets: [{name: v1, labels: {version: v1}}]");
    ask(&subsets, "client", "http://a/").says_not("not used");
    ask(&of("d", "default", "  workloadSelector: {matchLabels: {app: x}}"), "client", "http://a/")
        .says(&["workloadSelector does not fit the client"]);
}
