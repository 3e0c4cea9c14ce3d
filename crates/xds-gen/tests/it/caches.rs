//! What is kept from earlier and shared with others is what would be made anew.

use std::path::Path;
use std::sync::Arc;

use config_store::Store;
use envoy_api::{Resource, type_url};
use push_context::{Node, PushContext};
use xds_gen::{Names, shared};

use crate::conformance::{cases, documents, each_case, load};

const ALL: [&str; 5] =
    [type_url::CLUSTER, type_url::LISTENER, type_url::ROUTE, type_url::ENDPOINT, type_url::NAME_TABLE];

fn everything(push: &PushContext, node: &Arc<Node>) -> Vec<Vec<Resource>> {
    ALL.iter().map(|type_url| shared(push, node, type_url, Names::Wildcard).to_vec()).collect()
}

/// The proxy, and some that differ from it a little.
fn relatives(node: &Arc<Node>) -> Vec<Arc<Node>> {
    let itself = || Node::clone(node);
    let mut labelled = itself();
    labelled.labels.insert("app".to_owned(), "relative".to_owned());
    labelled.labels.insert("version".to_owned(), "v0".to_owned());
    labelled.labels.insert("service.istio.io/canonical-name".to_owned(), "relative".to_owned());
    let mut elsewhere = itself();
    elsewhere.locality.zone = "elsewhere".into();
    elsewhere.metadata.insert("NODE_NAME".to_owned(), "elsewhere".to_owned());
    let mut unlabelled = itself();
    unlabelled.labels.clear();
    let stranger = Node {
        name: "stranger".into(),
        id: "sidecar~10.9.8.7~stranger.default~default.svc.cluster.local".to_owned(),
        addresses: vec!["10.9.8.7".to_owned()],
        ..itself()
    };
    let guest = Node {
        namespace: "guests".into(),
        dns_domain: "guests.svc.cluster.local".to_owned(),
        dns_capture: true,
        dns_auto_allocate: true,
        ..stranger.clone()
    };
    let others = [labelled, elsewhere, unlabelled, stranger, guest, itself()].map(Arc::new);
    [node.clone()].into_iter().chain(others).collect()
}

fn check(case: &Path, push: &PushContext, fresh: impl Fn() -> PushContext, node: &Arc<Node>) {
    for relative in relatives(node) {
        let (kept, made) = (everything(push, &relative), everything(&fresh(), &relative));
        for ((kept, made), type_url) in kept.iter().zip(&made).zip(ALL) {
            assert!(kept == made, "{} {type_url} {relative:?}", case.display());
        }
    }
}

#[test]
fn proxies_that_share_get_what_they_would_get_alone() {
    let Some(cases) = cases() else { return };
    for case in each_case(&cases) {
        let (push, nodes) = load(&case);
        for node in nodes.into_iter().map(Arc::new) {
            check(&case, &push, || load(&case).0, &node);
        }
    }
}

#[test]
fn an_updated_context_gives_what_a_new_one_gives() {
    let Some(cases) = cases() else { return };
    for case in each_case(&cases) {
        let (whole, nodes) = load(&case);
        // As streams do: each holds on to its node.
        let nodes: Vec<Arc<Node>> = nodes.into_iter().map(Arc::new).collect();
        let build = |store: &Store| PushContext::build(&store.snapshot(), &whole.mesh, &whole.settings);
        let documents = documents(&case);
        let mut store = Store::new();
        let mut push = build(&store);
        // Each kind of object comes alone, half of it later; the last is taken away again.
        let (early, late): (Vec<_>, Vec<_>) = documents.iter().enumerate().partition(|(i, _)| i % 2 == 0);
        for half in [&early, &late] {
            let mut kinds: Vec<&str> = half.iter().map(|(_, d)| d.value["kind"].as_str().unwrap_or_default()).collect();
            kinds.dedup();
            for kind in kinds {
                for (_, document) in half.iter().filter(|(_, d)| d.value["kind"] == kind) {
                    let _ = store.apply(document);
                }
                push = push.update(&store.snapshot(), &whole.mesh);
                nodes.iter().for_each(|node| drop(everything(&push, node)));
            }
        }
        let last = documents.iter().rev().find_map(|d| config_store::Object::read(d).ok());
        let key = last.map(|(object, _)| object.key);
        for node in &nodes {
            check(&case, &push, || build(&store), node);
        }
        if let Some(key) = key {
            store.delete(&key);
            push = push.update(&store.snapshot(), &Arc::new((*whole.mesh).clone()));
            for node in &nodes {
                check(&case, &push, || build(&store), node);
            }
        }
    }
}
