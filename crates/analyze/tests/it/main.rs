//! Integration tests: faults in YAML, and what is said of them.

mod cluster;

use std::path::Path;

use istio_api::MeshConfig;

/// What is found, a line each; codes of `ignored` are left out.
#[track_caller]
fn check(yaml: &str, ignored: &[&str], expected: &[&str]) {
    let documents = manifest::parse(Path::new("a.yaml"), yaml).unwrap();
    let found = analyze::analyze(&documents, &MeshConfig::builtin(), "default");
    let lines: Vec<String> =
        found.iter().filter(|message| !ignored.contains(&message.code)).map(ToString::to_string).collect();
    assert_eq!(lines, expected);
}

const SERVICES: &str = "apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {selector: {app: reviews}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: two}
spec: {selector: {app: two}, ports: [{name: http, port: 80}, {name: tcp-b, port: 90}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: reviews-v1}
spec:
  template:
    metadata: {labels: {app: reviews, version: v1}}
    spec: {containers: [{name: reviews, image: reviews}]}
---
";

#[test]
fn destinations_must_exist() {
    let yaml = SERVICES.to_owned()
        + "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews}
spec:
  host: reviews
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: routes}
spec:
  hosts: [reviews]
  http:
  - match: [{uri: {prefix: /a}}]
    route:
    - destination: {host: reviews, subset: v1}
    mirror: {host: nobody}
  - match: [{uri: {prefix: /b}}]
    route:
    - destination:
        host: two
  - match: [{uri: {prefix: /c}}]
    route:
    - destination: {host: reviews, port: {number: 81}}
  - route:
    - destination: {host: reviews.default.svc.cluster.local, subset: v3}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: gone, namespace: other}
spec: {host: reviews, trafficPolicy: {tls: {mode: SIMPLE}}}
";
    check(
        &yaml,
        &[],
        &[
            "Error [IST0101] (VirtualService default/routes a.yaml:41) Referenced mirror host not found: \"nobody\"",
            "Error [IST0101] (VirtualService default/routes a.yaml:48) Referenced host:port not found: \"reviews:81\"",
            "Error [IST0101] (VirtualService default/routes a.yaml:50) Referenced host+subset in destinationrule not found: \
             \"reviews.default.svc.cluster.local+v3\"",
            "Error [IST0112] (VirtualService default/routes a.yaml:45) This VirtualService routes to a service \"two\" that \
             exposes multiple ports [80 90]. Specifying a port in the destination is required to disambiguate.",
            "Error [IST0173] (DestinationRule default/reviews a.yaml:30) The Subset v2 defined in the DestinationRule does not \
             select any pods. Which may lead to 503 UH (NoHealthyUpstream).",
            "Warning [IST0128] (DestinationRule other/gone a.yaml:55) DestinationRule other/gone in namespace other has TLS mode \
             set to SIMPLE but no caCertificates are set to validate server identity for host: reviews",
            "Warning [IST0174] (DestinationRule other/gone a.yaml:55) The host reviews defined in the DestinationRule does not \
             match any services in the mesh.",
        ],
    );
}

#[test]
fn sidecars_must_not_compete() {
    let sidecar = |name: &str, selector: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: {name}}}\nspec: {{{selector}egress: [{{hosts: \
             [./*]}}]}}\n"
        )
    };
    let selector = |app: &str| format!("workloadSelector: {{labels: {{app: {app}}}}}, ");
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {app: a}}\nspec: {containers: []}\n";
    let yaml = pod.to_owned()
        + &sidecar("one", &selector("a"))
        + &sidecar("two", &selector("a"))
        + &sidecar("three", &selector("b"))
        + &sidecar("four", "")
        + &sidecar("five", "");
    let both = "The Sidecars [one two] in namespace \"default\" select the same workload pod \"a\", which can lead to undefined \
                behavior.";
    let general = "The Sidecars [five four] in namespace \"default\" have no workload selector, which can lead to undefined \
                   behavior.";
    check(
        &yaml,
        &[],
        &[
            "Error [IST0101] (Sidecar default/three a.yaml:19) Referenced selector not found: \"app=b\"",
            &format!("Error [IST0110] (Sidecar default/one a.yaml:8) {both}"),
            &format!("Error [IST0110] (Sidecar default/two a.yaml:13) {both}"),
            &format!("Error [IST0111] (Sidecar default/five a.yaml:26) {general}"),
            &format!("Error [IST0111] (Sidecar default/four a.yaml:21) {general}"),
        ],
    );
}

#[test]
fn rules_that_nothing_reaches_are_told() {
    let yaml = SERVICES.to_owned()
        + "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: routes}
spec:
  hosts: [reviews]
  http:
  - name: first
    match: [{uri: {prefix: /a}}, {headers: {x: {exact: why}}}]
    route: [{destination: {host: reviews}}]
  - match:
    - headers: {x: {exact: why}}
    route: [{destination: {host: reviews}}]
  - match: [{uri: {prefix: /a/b}}]
    route: [{destination: {host: reviews}}]
  - route: [{destination: {host: reviews}}]
  - route: [{destination: {host: reviews}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: routes, namespace: other}
spec:
  hosts: [reviews.default.svc.cluster.local]
  http:
  - fault: {delay: {percent: 5, fixedDelay: 1s}}
    route: [{destination: {host: reviews.default.svc.cluster.local}}]
";
    let conflict = "The VirtualServices default/routes,other/routes associated with mesh gateway define the same host \
                    */reviews.default.svc.cluster.local which can lead to undefined behavior. This can be fixed by merging the \
                    conflicting VirtualServices into a single resource.";
    check(
        &yaml,
        &["IST0133"],
        &[
            &format!("Error [IST0109] (VirtualService default/routes a.yaml:25) {conflict}"),
            &format!("Error [IST0109] (VirtualService other/routes a.yaml:42) {conflict}"),
            "Warning [IST0002] (VirtualService other/routes a.yaml:46) Deprecated: HTTPRoute.fault.delay.percent is deprecated; \
             use HTTPRoute.fault.delay.percentage",
            "Warning [IST0130] (VirtualService default/routes a.yaml:32) VirtualService rule #1 not used (all matches used by prior \
             rules).",
            "Warning [IST0130] (VirtualService default/routes a.yaml:38) VirtualService rule #4 not used (only the last rule can \
             have no matches).",
            "Info [IST0131] (VirtualService default/routes a.yaml:33) VirtualService rule #1 match #0 is not used \
             (duplicate/overlapping match in rule \"first\").",
            "Info [IST0131] (VirtualService default/routes a.yaml:35) VirtualService rule #2 match #0 of prefix /a/b is not used \
             (duplicate/overlapping match in rule #0 of prefix /a on \"first\").",
        ],
    );
}

#[test]
fn workloads_and_services_must_fit_the_sidecar() {
    check(
        "apiVersion: v1
kind: Namespace
metadata: {name: plain}
---
apiVersion: v1
kind: Namespace
metadata: {name: mesh, labels: {istio-injection: enabled, istio.io/rev: canary}}
---
apiVersion: v1
kind: Pod
metadata:
  name: bare
  namespace: mesh
  annotations:
    sidecar.istio.io/inject: 'yes'
    sidecar.istio.io/slip: a
    traffic.sidecar.istio.io/excludeInboundPorts: x
    networking.istio.io/exportTo: '*'
spec: {securityContext: {runAsUser: 1337}, containers: [{name: a, image: a}]}
---
apiVersion: v1
kind: Service
metadata: {name: a, namespace: mesh}
spec:
  ports:
  - {name: web, port: 80, targetPort: http}
  - {name: http-b, port: 81}
---
apiVersion: v1
kind: Service
metadata:
  name: quiet
  namespace: mesh
  annotations: {galley.istio.io/analyze-suppress: 'IST0118,IST0107'}
spec: {ports: [{name: web, port: 80}]}
",
        &[],
        &[
            "Warning [IST0103] (Pod mesh/bare a.yaml:9) The pod mesh/bare is missing the Istio proxy. This can often be resolved by \
             restarting or redeploying the workload.",
            "Warning [IST0107] (Pod mesh/bare a.yaml:18) Misplaced annotation: networking.istio.io/exportTo can only be applied to \
             Service",
            "Warning [IST0108] (Pod mesh/bare a.yaml:16) Unknown annotation: sidecar.istio.io/slip",
            "Warning [IST0123] (Namespace mesh a.yaml:5) The namespace has more than one type of injection labels \
             [istio-injection=enabled istio.io/rev=canary], which may lead to undefined behavior. Make sure only one injection label \
             exists.",
            "Warning [IST0125] (Pod mesh/bare a.yaml:17) Invalid annotation traffic.sidecar.istio.io/excludeInboundPorts: failed \
             parsing port 'x'",
            "Warning [IST0144] (Pod mesh/bare a.yaml:9) User ID (UID) 1337 is reserved for the sidecar proxy.",
            "Info [IST0102] (Namespace plain a.yaml:3) The namespace is not enabled for Istio injection. Run 'kubectl label \
             namespace plain istio-injection=enabled' to enable it, or 'kubectl label namespace plain istio-injection=disabled' to \
             explicitly mark it as not needing injection.",
            "Info [IST0118] (Service mesh/a a.yaml:26) Port name web (port: 80, targetPort: http) doesn't follow the naming \
             convention of Istio port.",
            "Info [IST0135] (Pod mesh/bare a.yaml:15) Annotation \"sidecar.istio.io/inject\" has been deprecated in favor of the \
             \"sidecar.istio.io/inject\" label and may not work in future Istio versions.",
        ],
    );
}

#[test]
fn entries_policies_and_the_rest() {
    check(
        "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: one}
spec: {hosts: [db.example.com], ports: [{number: 3306, name: tcp, protocol: TCP}], resolution: DNS}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: two, namespace: other}
spec: {hosts: [db.example.com], addresses: [10.1.2.3], ports: [{number: 3306, name: tls, protocol: TLS}], resolution: DNS}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny}
spec:
  action: DENY
  rules:
  - from:
    - source:
        namespaces: [gone]
---
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: patch}
spec:
  configPatches:
  - applyTo: HTTP_ROUTE
    patch: {operation: ADD, value: {name: a}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: broken}
spec: {hosts: [db.example.com], gateways: [nowhere, mesh], http: [{route: [{destination: {host: db.example.com}, weight: -1}]}]}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata: {name: istio-sidecar-injector}
webhooks:
- {name: inject.istio.io, clientConfig: {url: 'https://10.0.0.1:15017/inject'}}
- {name: other.istio.io, clientConfig: {}}
",
        &["IST0139", "IST0151"],
        &[
            "Error [IST0101] (AuthorizationPolicy default/deny a.yaml:19) Referenced namespace not found: \"gone\"",
            "Error [IST0101] (VirtualService default/broken a.yaml:32) Referenced gateway not found: \"nowhere\"",
            "Error [IST0106] (VirtualService default/broken a.yaml:32) Schema validation error: spec.http[0].route[0].weight: must not \
             be negative",
            "Error [IST0153] (EnvoyFilter default/patch a.yaml:27) The ADD operation will be ignored when applyTo is set to \
             ROUTE_CONFIGURATION, or HTTP_ROUTE.",
            "Warning [IST0127] (AuthorizationPolicy default/deny a.yaml:11) No matching workloads for this resource with the following \
             labels: ",
            "Warning [IST0132] (VirtualService default/broken a.yaml:32) one or more host [db.example.com] defined in VirtualService \
             default/broken not found in Gateway default/nowhere.",
            "Warning [IST0134] (ServiceEntry default/one a.yaml:4) ServiceEntry addresses are required for this protocol.",
            "Warning [IST0163] (MutatingWebhookConfiguration istio-sidecar-injector a.yaml:39) The hostname () that was provided for \
             the webhook (other.istio.io) to reach the ingress gateway on the external control plane cluster is blank. Traffic may not \
             flow properly.",
            "Warning [IST0177] (ServiceEntry default/one a.yaml:3) Multiple ServiceEntries (default/one, other/two) define the same \
             host \"db.example.com\" and port 3306 with conflicting protocols (TCP, TLS).",
            "Warning [IST0177] (ServiceEntry other/two a.yaml:8) Multiple ServiceEntries (default/one, other/two) define the same host \
             \"db.example.com\" and port 3306 with conflicting protocols (TCP, TLS).",
            "Info [IST0164] (MutatingWebhookConfiguration istio-sidecar-injector a.yaml:38) The address \
             (https://10.0.0.1:15017/inject) that was provided for the webhook (inject.istio.io) to reach the ingress gateway on the \
             external control plane cluster is an IP address. This is not recommended for a production environment.",
        ],
    );
}

#[test]
fn a_mesh_without_faults_is_told_nothing() {
    check(SERVICES, &[], &[]);
}
