//! Timeouts, retries and limits, with the lines that set them.

use super::ask;

const RULES: &str = "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: v}
spec:
  hosts: [a]
  http:
  - route: [{destination: {host: a, subset: v1}}]
    timeout: 3s
    retries:
      attempts: 4
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: d}
spec:
  host: a
  trafficPolicy:
    connectionPool: {tcp: {maxConnections: 1}}
    outlierDetection: {consecutive5xxErrors: 7}
  subsets:
  - name: v1
    labels: {version: v1}
    trafficPolicy:
      connectionPool: {tcp: {maxConnections: 2}}
";

#[test]
fn limits_have_the_lines_that_set_them() {
    ask(RULES, "client", "http://a/").arrives().says(&[
        "VirtualService default/v spec.http[0].timeout, ",
        "mesh.yaml:8\n",
        "VirtualService default/v spec.http[0].retries, ",
        "mesh.yaml:9\n",
        "up to 4 retries",
        "connectionPool: tcp.maxConnections 2",
        "DestinationRule default/d spec.subsets[0].trafficPolicy.connectionPool, ",
        "outlierDetection: consecutive5xxErrors 7",
        "DestinationRule default/d spec.trafficPolicy.outlierDetection, ",
        "mesh.yaml:19\n",
    ]);
}

/// What is said of a port replaces all that is said around it.
#[test]
fn what_a_port_does_not_say_is_not_taken_from_around_it() {
    let port = "    portLevelSettings: [{port: {number: 80}, connectionPool: {tcp: {maxConnections: 9}}}]\n  subsets:";
    ask(&RULES.replace("subset: v1", "port: {number: 80}").replace("  subsets:", port), "client", "http://a/")
        .says(&["connectionPool: tcp.maxConnections 9", "spec.trafficPolicy.portLevelSettings[0].connectionPool, "])
        .says_not("outlierDetection");
}
