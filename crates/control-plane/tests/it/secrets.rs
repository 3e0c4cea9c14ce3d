//! Certificates of Kubernetes Secrets, for proxies that an API server lets have them.

use std::time::{Duration, Instant};

use control_plane::{Settings, Update};
use envoy_api::core::{DataSource, Node, data_source::Specifier};
use envoy_api::discovery::{DiscoveryRequest, DiscoveryResponse};
use envoy_api::tls::{Secret, secret::Type};
use envoy_api::{Message, type_url};
use kube_source::{Change, Cluster, Options};
use kube_test::KubeLite;
use tokio::sync::mpsc;

use crate::mesh::Mesh;
use crate::ports::{self, Stream};

/// A control plane that follows the API server.
async fn follow(server: &KubeLite) -> Mesh {
    let options = Options { kubeconfig: Some(server.kubeconfig().to_owned()), context: None };
    let cluster = Cluster::connect(&options).await.unwrap();
    let mesh = Mesh::with(Settings { cluster: Some(cluster.clone()), ..Settings::default() }).await;
    let (sender, mut batches) = mpsc::channel(1);
    tokio::spawn(async move { cluster.watch(("istio-system".into(), "istio".into()), sender).await });
    let handle = mesh.handle.clone();
    let first = updates(batches.recv().await.unwrap());
    handle.update(first).await;
    tokio::spawn(async move {
        while let Some(batch) = batches.recv().await {
            handle.update(updates(batch)).await;
        }
    });
    mesh
}

fn updates(batch: Vec<Change>) -> Vec<Update> {
    let update = |change| match change {
        Change::Apply(reading) => Update::Read(reading),
        Change::Delete(key) => Update::Delete(key),
    };
    batch.into_iter().map(update).collect()
}

const NAMES: [&str; 3] = ["kubernetes://pair", "kubernetes://pair-cacert", "kubernetes://other/pair-cacert"];

async fn ask(mesh: &Mesh, namespace: &str, account: &str) -> Stream {
    ask_for(mesh, namespace, account, &NAMES).await
}

async fn ask_for(mesh: &Mesh, namespace: &str, account: &str, names: &[&str]) -> Stream {
    let request = DiscoveryRequest {
        node: Some(Node {
            id: format!("sidecar~10.0.0.9~{account}.{namespace}~{namespace}.svc.cluster.local"),
            ..Node::default()
        }),
        type_url: type_url::SECRET.into(),
        resource_names: names.iter().map(|&name| name.to_owned()).collect(),
        ..DiscoveryRequest::default()
    };
    let token = mesh.token_in(namespace, account);
    ports::open(mesh.tls_channel(None).await, Some(&token), request).await.unwrap()
}

/// `NAME=CONTENT` of each secret: of keys the key.
fn contents(response: &DiscoveryResponse) -> Vec<String> {
    let text = |source: Option<DataSource>| match source.and_then(|source| source.specifier) {
        Some(Specifier::InlineBytes(bytes)) => String::from_utf8(bytes).unwrap(),
        other => panic!("{other:?}"),
    };
    let secrets = response.resources.iter().map(|any| Secret::decode(&*any.value).unwrap());
    let row = |secret: Secret| match secret.r#type.unwrap() {
        Type::TlsCertificate(pair) => format!("{}={}", secret.name, text(pair.private_key)),
        Type::ValidationContext(context) => {
            format!("{}={},{}", secret.name, text(context.trusted_ca), text(context.crl))
        }
        other => panic!("{other:?}"),
    };
    secrets.map(row).collect()
}

fn secret(key: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: pair}}\n\
         stringData: {{cert: chain, key: {key}, cacert: roots, crl: revoked, password: hidden}}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_for_service_accounts_that_may_list_secrets_and_roots_for_all() {
    let Some(server) = KubeLite::shared("keys_are_for_service_accounts_that_may_list_secrets_and_roots_for_all") else {
        return;
    };
    let namespace = server.namespace("credentials");
    let rights = format!(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: {{name: reader}}\n\
         rules: [{{apiGroups: [''], resources: [secrets], verbs: [list]}}]\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {{name: reader}}\n\
         roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}}\n\
         subjects: [{{kind: ServiceAccount, name: reader, namespace: {namespace}}}]\n---\n"
    );
    server.apply(&namespace, &(rights + &secret("one")));
    // The server learns of rights a moment after it was told.
    let account = format!("--as=system:serviceaccount:{namespace}:reader");
    let started = Instant::now();
    while !server.kubectl(&["auth", "can-i", "list", "secrets", "-n", &namespace, &account]).success {
        assert!(started.elapsed() < Duration::from_secs(20), "the role is not in effect");
    }
    let mesh = follow(server).await;
    let mut reader = ask(&mesh, &namespace, "reader").await;
    let first = reader.next().await;
    let roots = "kubernetes://pair-cacert=roots,revoked";
    assert_eq!(contents(&first), ["kubernetes://pair=one", roots]);
    let accepted = DiscoveryRequest {
        type_url: type_url::SECRET.into(),
        resource_names: NAMES.map(str::to_owned).to_vec(),
        response_nonce: first.nonce.clone(),
        ..DiscoveryRequest::default()
    };
    reader.requests.send(accepted).await.unwrap();
    let mut stranger = ask(&mesh, &namespace, "stranger").await;
    assert_eq!(contents(&stranger.next().await), [roots]);
    server.apply(&namespace, &secret("two"));
    assert_eq!(contents(&reader.next().await), ["kubernetes://pair=two"], "what changed");
    let state = mesh.handle.state();
    let object = state.snapshot.find(config_store::Kind::Secret, &namespace, "pair").unwrap();
    assert!(!format!("{:?}", object.body).contains("password"), "what nobody may be given is not kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_in_config_maps_of_any_namespace_are_for_all() {
    let Some(server) = KubeLite::shared("roots_in_config_maps_of_any_namespace_are_for_all") else { return };
    let (of, asks) = (server.namespace("roots"), server.namespace("asks"));
    let map = |roots: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: trusted}}\n\
             data: {{ca.crt: {roots}, ca.crl: revoked, note: private}}\n---\n\
             apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: other}}\ndata: {{note: private}}\n"
        )
    };
    server.apply(&of, &map("one"));
    let mesh = follow(server).await;
    // As a DestinationRule's `credentialName` of simple TLS is asked for.
    let name = format!("configmap://{of}/trusted-cacert");
    let mut stream = ask_for(&mesh, &asks, "anybody", &[&name, &format!("configmap://{of}/other")]).await;
    let first = stream.next().await;
    assert_eq!(contents(&first), [format!("{name}=one,revoked")]);
    let accepted = DiscoveryRequest {
        type_url: type_url::SECRET.into(),
        resource_names: vec![name.clone(), format!("configmap://{of}/other")],
        response_nonce: first.nonce.clone(),
        ..DiscoveryRequest::default()
    };
    stream.requests.send(accepted).await.unwrap();
    server.apply(&of, &map("two"));
    assert_eq!(contents(&stream.next().await), [format!("{name}=two,revoked")]);
    let state = mesh.handle.state();
    let kept = state.snapshot.find(config_store::Kind::ConfigMap, &of, "trusted").unwrap();
    assert!(!format!("{:?}", kept.body).contains("private"), "what nobody may be given is not kept");
    assert!(state.snapshot.find(config_store::Kind::ConfigMap, &of, "other").is_none());
}
