//! Everything that istiod sent in the reference cases is understood.

use std::path::{Path, PathBuf};

use envoy_api::{Message, type_url};
use proxy_core::endpoints::Endpoints;
use proxy_core::{Cluster, Listener, Options, RouteTable};

use crate::reference::{folder, folders, messages};

/// Each proxy's configuration: the case's own folder and those of further proxies.
pub(crate) fn configurations(cases: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for case in folders(cases) {
        let golden = case.join("golden");
        all.extend(folders(&golden));
        all.push(golden);
    }
    all
}

#[test]
fn all_goldens_compile() {
    let Some(cases) = folder("xds/cases") else { return };
    let options = Options::default();
    let (mut count, mut refused) = (0, Vec::new());
    for golden in configurations(&cases) {
        let mut note = |result: Result<(), proxy_core::Rejected>| {
            count += 1;
            // What only Envoy has, and what an operator may allow to be left out: the next test looks at it.
            let lua = |e: &proxy_core::Rejected| e.reason.contains("extensions.filters.http.lua.v3.Lua");
            refused.extend(result.err().filter(|e| !lua(e)).map(|e| format!("{}: {e}", golden.display())));
        };
        for listener in messages(&golden.join("listeners.json"), type_url::LISTENER) {
            note(Listener::compile(&listener, &options).map(drop));
        }
        for table in messages(&golden.join("routes.json"), type_url::ROUTE) {
            note(RouteTable::compile(&table, &options).map(drop));
        }
        let mut clusters = Vec::new();
        for cluster in messages(&golden.join("clusters.json"), type_url::CLUSTER) {
            note(Cluster::compile(&cluster, &options).map(|c| clusters.push(c)));
        }
        for assignment in
            messages::<envoy_api::endpoint::ClusterLoadAssignment>(&golden.join("endpoints.json"), type_url::ENDPOINT)
        {
            let cluster = clusters.iter().find(|c| c.eds_name().is_some_and(|n| **n == *assignment.cluster_name));
            let Some(cluster) = cluster else { continue };
            note(
                Endpoints::compile(&assignment, cluster, None)
                    .map(|e| assert!(e.hosts().count() > 0 || assignment.endpoints.is_empty())),
            );
        }
    }
    assert!(refused.is_empty(), "{} of {count} refused:\n{}", refused.len(), refused.join("\n"));
    println!("{count} resources compiled");
}

#[test]
fn lua_is_refused_by_name_unless_allowed() {
    let Some(cases) = folder("xds/cases") else { return };
    let mut named = Vec::new();
    for golden in configurations(&cases) {
        for listener in messages(&golden.join("listeners.json"), type_url::LISTENER) {
            if let Err(rejected) = Listener::compile(&listener, &Options::default()) {
                named.push(rejected.to_string());
            }
        }
    }
    assert!(!named.is_empty());
    for text in named {
        assert!(text.starts_with("listener ") && text.contains("http_filters["), "{text}");
        assert!(text.ends_with("envoy.extensions.filters.http.lua.v3.Lua is not supported"), "{text}");
    }
}

#[test]
fn hashes_do_not_depend_on_the_order_of_maps() {
    let Some(cases) = folder("xds/cases") else { return };
    let golden = cases.join("vs-match/golden");
    // Decoding anew shuffles the maps.
    let clusters: Vec<Vec<u8>> =
        messages::<envoy_api::cluster::Cluster>(&golden.join("clusters.json"), type_url::CLUSTER)
            .iter()
            .map(Message::encode_to_vec)
            .collect();
    let listeners: Vec<Vec<u8>> =
        messages::<envoy_api::listener::Listener>(&golden.join("listeners.json"), type_url::LISTENER)
            .iter()
            .map(Message::encode_to_vec)
            .collect();
    let hashes = || {
        let options = Options::default();
        let of_clusters = clusters.iter().map(|c| Cluster::fingerprint(&Message::decode(c.as_slice()).unwrap()));
        let of_chains = listeners.iter().flat_map(|l| {
            let listener = Listener::compile(&Message::decode(l.as_slice()).unwrap(), &options).unwrap();
            listener.all_chains().map(|c| c.hash).collect::<Vec<_>>()
        });
        of_clusters.chain(of_chains).collect::<Vec<u64>>()
    };
    let first = hashes();
    assert!(first.len() > 10);
    for _ in 0..20 {
        assert_eq!(first, hashes());
    }
}
