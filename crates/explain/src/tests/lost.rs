//! Requests that nobody answers, or that may not leave.

use super::{ask, ask_of, mesh};

const EMPTY: &str = "apiVersion: v1
kind: Service
metadata: {name: empty}
spec:
  selector: {app: nobody}
  ports: [{name: http, port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: headless}
spec:
  clusterIP: None
  selector: {app: nobody}
  ports: [{name: http, port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: named}
spec:
  selector: {app: a}
  ports:
  - {name: http, port: 80, targetPort: web}
---
apiVersion: v1
kind: Service
metadata: {name: bodiless}
spec:
  ports: [{name: http, port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: a, namespace: other}
spec: {selector: {app: a}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: late}
spec:
  selector: {app: late}
  ports: [{name: http, port: 80}]
---
apiVersion: v1
kind: Pod
metadata: {name: late-1, labels: {app: late}}
spec: {containers: []}
status: {podIP: 10.244.9.9, podIPs: [{ip: 10.244.9.9}], conditions: [{type: Ready, status: 'False'}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: late, labels: {kubernetes.io/service-name: late}}
addressType: IPv4
ports: [{name: http, port: 80, protocol: TCP}]
endpoints: [{addresses: [10.244.9.9], conditions: {ready: false}, targetRef: {kind: Pod, name: late-1, namespace: default}}]
";

#[test]
fn a_service_that_selects_no_pod_delivers_nothing() {
    let why = "Service default/empty has no ready pod: its selector (app: nobody) fits none; pods of namespace default have app: a, ";
    ask(EMPTY, "bare", "http://empty/")
        .fails(&["nobody answers", why, "mesh.yaml:5"])
        .says(&["sidecar        the pod has none"]);
    ask(EMPTY, "client", "http://empty/").fails(&["503", why, "mesh.yaml:5"]);
    ask(EMPTY, "client", "http://headless/")
        .fails(&["DNS has no address for headless: Service default/headless", "mesh.yaml:13"]);
}

#[test]
fn every_cause_of_a_lack_of_endpoints_is_named() {
    let of = |url: &str| ask(EMPTY, "bare", url);
    of("http://named/").fails(&["leads port 80 to \"web\"", "no container port of that name", "mesh.yaml:22"]);
    of("http://bodiless/").fails(&["neither a selector nor an EndpointSlice", "mesh.yaml:27"]);
    of("http://late/").fails(&["has no ready pod: late-1.default is not", "mesh.yaml:39"]);
}

#[test]
fn a_port_that_the_service_has_not_is_no_way_out() {
    let why = "Service default/a has no port 81, it has 80 (http), 90 (tcp-x)";
    ask("", "client", "http://a:81/").fails(&["nobody answers", why, "base.yaml:7"]);
    ask("", "bare", "http://a:81/").fails(&[why]);
    // Where the port is another service's, the route table of that port lets the request through.
    let other = "{apiVersion: v1, kind: Service, metadata: {name: b}, spec: {selector: {app: a}, ports: [{name: http, port: 81}]}}";
    ask(other, "client", "http://a:81/").fails(&["503: nobody answers", why]);
}

#[test]
fn a_name_of_the_cluster_that_is_no_service_is_not_elsewhere() {
    ask(EMPTY, "client", "http://emty/")
        .fails(&["DNS has no address for emty: there is no Service emty; namespace default has "]);
    ask(EMPTY, "client", "http://empty.other.svc.cluster.local/")
        .fails(&["namespace other has no Service empty; there is empty.default"]);
    ask("", "client", "http://kubernetes.default.svc/").arrives();
    ask("", "client", "http://example.com/").arrives().says(&["it leaves the mesh"]);
    ask("", "client", "http://localhost:8080/").arrives().says(&["it stays in the pod"]);
}

#[test]
fn the_setting_that_blocks_unknown_hosts_is_named() {
    let sidecar = "apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: narrow}
spec:
  egress: [{hosts: ['*/*']}]
  outboundTrafficPolicy:
    mode: REGISTRY_ONLY
";
    let at = "Sidecar default/narrow spec.outboundTrafficPolicy.mode, ";
    ask(sidecar, "client", "http://example.com/").fails(&["REGISTRY_ONLY"]).says(&[
        at,
        "mesh.yaml:7",
        "a ServiceEntry for example.com",
    ]);
    ask(sidecar, "client", "tcp://example.com:5432").fails(&["REGISTRY_ONLY"]).says(&[at, "mesh.yaml:7"]);
    let file = mesh("", "outboundTrafficPolicy:\n  mode: REGISTRY_ONLY\n");
    ask_of(&file.1, "client", "http://example.com/")
        .fails(&[])
        .says(&["MeshConfig outboundTrafficPolicy.mode, ", "config.yaml:2"]);
    let map = "apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    enableTracing: false
    outboundTrafficPolicy:
      mode: REGISTRY_ONLY
";
    ask(map, "client", "http://example.com/")
        .fails(&[])
        .says(&["ConfigMap istio-system/istio data.mesh: outboundTrafficPolicy.mode, ", "mesh.yaml:8"]);
}

const ROUTES: &str = "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: a}
spec:
  hosts: [a]
  http:
  - match: [{uri: {prefix: /undefined}}]
    route:
    - destination:
        host: a
        subset: v9
  - match: [{uri: {prefix: /unfit}}]
    route: [{destination: {host: a, subset: v2}}]
  - match: [{uri: {prefix: /gone}}]
    route:
    - destination:
        host: gone
  - match: [{uri: {prefix: /port}}]
    route:
    - destination:
        host: a
        port:
          number: 99
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: rule}
spec:
  host: a
  subsets:
  - {name: v1, labels: {version: v1}}
  - name: v2
    labels: {version: v2}
";

#[test]
fn a_route_that_leads_nowhere_is_named_with_its_destination() {
    let of = |path: &str| ask(ROUTES, "client", &format!("http://a{path}"));
    of("/undefined").fails(&[
        "503: a route leads to subset v9 of a.default.svc.cluster.local",
        "are v1, v2",
        "mesh.yaml:11)",
    ]);
    of("/undefined").says(&["VirtualService default/a spec.http[0].route[0].destination.subset, "]);
    of("/unfit").fails(&[
        "subset v2 of DestinationRule default/rule wants version: v2",
        "its pods have version: v1",
        "mesh.yaml:33)",
    ]);
    of("/gone").fails(&["a route leads to gone.default.svc.cluster.local, which is no service", "mesh.yaml:17)"]);
    of("/port").fails(&["a route leads to port 99 of a.default", "80 (http)", "mesh.yaml:23)"]);
}
