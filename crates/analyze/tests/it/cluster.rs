//! A real Kubernetes API server, with the Gateway API's routes beside Istio's kinds.

use std::time::Duration;

use config_store::{Key, Kind};
use istio_api::MeshConfig;
use kube_source::{Change, Cluster, Options};
use kube_test::KubeLite;

/// As much of the Gateway API's own definition as a server needs.
const HTTP_ROUTES: &str = "apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: httproutes.gateway.networking.k8s.io
  annotations: {api-approved.kubernetes.io: 'unapproved, for a test'}
spec:
  group: gateway.networking.k8s.io
  scope: Namespaced
  names: {kind: HTTPRoute, listKind: HTTPRouteList, plural: httproutes, singular: httproute}
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
";

const OBJECTS: &str = "apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {ports: [{name: web, port: 80}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: lost}
spec: {hosts: [reviews], http: [{route: [{destination: {host: nobody}}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: broken}
spec: {parentRefs: [{group: '', kind: Service, name: reviews}], rules: [{backendRefs: [{name: reviews}]}]}
";

/// Applies as soon as the server serves the kinds, which it does a moment after their definitions.
fn apply(server: &KubeLite, namespace: &str, yaml: &str) {
    for attempt in 1.. {
        let output = server.try_apply(namespace, yaml);
        if output.success {
            return;
        }
        assert!(attempt < 100, "{}", output.stderr);
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[tokio::test]
async fn a_cluster_is_read_with_routes_of_the_gateway_api() {
    let Some(server) = KubeLite::shared("a_cluster_is_read_with_routes_of_the_gateway_api") else { return };
    let namespace = server.namespace("analyze");
    server.apply(&namespace, &(kube_source::crds() + "---\n" + HTTP_ROUTES));
    apply(server, &namespace, OBJECTS);

    let options = Options { kubeconfig: Some(server.kubeconfig().to_owned()), ..Options::default() };
    let cluster = Cluster::connect(&options).await.unwrap();
    let documents = cluster.documents().await.unwrap();
    let found = analyze::analyze(&documents, &MeshConfig::builtin(), "default");
    let own = found.iter().filter(|message| message.subject.namespace == namespace);
    let lines: Vec<String> = own.map(ToString::to_string).collect();
    let expected = [
        format!("Error [IST0101] (VirtualService {namespace}/lost) Referenced host not found: \"nobody\""),
        format!(
            "Error [IST0106] (HTTPRoute {namespace}/broken) Schema validation error: spec.rules[0].backendRefs[0]: port is required \
             in backendRef"
        ),
        format!(
            "Info [IST0118] (Service {namespace}/reviews) Port name web (port: 80, targetPort: 80) doesn't follow the naming \
             convention of Istio port."
        ),
    ];
    assert_eq!(lines, expected);

    // The control plane's way to the same objects.
    let (batches, mut changes) = tokio::sync::mpsc::channel(4);
    let watch = async { cluster.watch(("istio-system".into(), "istio".into()), batches).await };
    let route = Key::new(Kind::HTTPRoute, &namespace, "broken");
    let heard = async {
        while let Some(batch) = changes.recv().await {
            let is_route = |change: &Change| match change {
                Change::Apply(result) => result.as_ref().as_ref().is_err_and(|r| r.key.as_ref() == Some(&route)),
                Change::Delete(_) => false,
            };
            if batch.iter().any(is_route) {
                return true;
            }
        }
        false
    };
    tokio::select! {
        heard = heard => assert!(heard),
        () = watch => panic!("the watch ended"),
    }
}
