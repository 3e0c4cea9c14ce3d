use envoy_api::cluster::Cluster;
use envoy_api::cluster::cluster::{ClusterDiscoveryType, DiscoveryType};

use super::{ClusterFilter, management};
use crate::table::Table;

/// A name such as `outbound|9080|v1|reviews.default.svc.cluster.local` in its parts, for sorting: host, subset, port, direction.
pub(super) fn key(name: &str) -> (&str, &str, i64, &str) {
    match name.split('|').collect::<Vec<_>>()[..] {
        [direction, port, subset, host, ..] => (host, subset, port.parse().unwrap_or(0), direction),
        _ => (name, "", 0, ""),
    }
}

/// Clusters in the order in which they came.
pub(super) fn select(clusters: Vec<Cluster>, filter: &ClusterFilter) -> Vec<Cluster> {
    let has = |name: &str, part: &Option<String>| part.as_ref().is_none_or(|part| name.contains(part.as_str()));
    clusters
        .into_iter()
        .filter(|cluster| {
            let name = cluster.name.as_str();
            has(name, &filter.fqdn)
                && has(name, &filter.direction)
                && has(name, &filter.subset)
                && filter.port.is_none_or(|port| name.contains(&format!("|{port}|")))
        })
        .collect()
}

pub(super) fn table(mut clusters: Vec<Cluster>, filter: &ClusterFilter, typed: bool) -> anyhow::Result<String> {
    if clusters.is_empty() {
        anyhow::bail!("no clusters found");
    }
    clusters.sort_by(|a, b| key(&a.name).cmp(&key(&b.name)));
    let head = ["NAME", "SERVICE FQDN", "PORT", "SUBSET", "DIRECTION", "TYPE", "DESTINATION RULE"];
    let mut table = Table::new(5, if typed { &head } else { &head[1..] });
    for cluster in select(clusters, filter) {
        let (host, subset, port, direction) = key(&cluster.name);
        let rule = management(cluster.metadata.as_ref());
        let dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        let cells = match direction {
            "" => [host.to_owned(), dash(""), dash(""), dash(""), kind(&cluster), rule],
            _ => [host.to_owned(), port.to_string(), dash(subset), direction.to_owned(), kind(&cluster), rule],
        };
        match typed {
            false => table.row(cells),
            true => {
                let [a, b, c, d, e, f] = cells;
                table.row([format!("cluster/{}", cluster.name), a, b, c, d, e, f]);
            }
        }
    }
    Ok(table.render())
}

fn kind(cluster: &Cluster) -> String {
    let kind = match cluster.cluster_discovery_type {
        Some(ClusterDiscoveryType::Type(kind)) => DiscoveryType::try_from(kind).unwrap_or_default(),
        _ => DiscoveryType::default(),
    };
    kind.as_str_name().to_owned()
}
