//! Addresses for hosts of ServiceEntries that have none, so that TCP to them can be told apart.
//!
//! As istiod, `pilot/pkg/controllers/ipallocate`: written into the status by one of all control planes, so that all proxies
//! and whoever reads the object see the same; an address stays for as long as its host is there.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use config_store::{Body, Key, Kind, Object, Snapshot};
use istio_api::ServiceEntry;
use istio_api::service_entry::Resolution;
use kube_source::Cluster;
use mesh_types::ArcStr;
use push_context::Settings;
use tracing::{debug, warn};

use crate::serve::Handle;

/// istiod's name of the lease.
const LEASE: &str = "istio-ip-autoallocate";
/// The label by which a ServiceEntry refuses.
const ENABLED: &str = "networking.istio.io/enable-autoallocate-ip";
/// How soon what failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Host and address.
type Addresses = Vec<(ArcStr, IpAddr)>;

/// Keeps the statuses of ServiceEntries while this control plane leads. Ends never.
pub(crate) async fn run(cluster: Cluster, handle: Handle, namespace: String, me: String) {
    let work = || async {
        let mut allocator = Allocator::new(&handle.state().push.settings);
        let mut revisions = handle.revisions();
        loop {
            let state = handle.state();
            let allocates = state.push.settings.auto_allocate;
            let mut failed = false;
            for change in allocator.plan(&state.snapshot, allocates) {
                failed |= !write(&cluster, &mut allocator, change).await;
            }
            tokio::select! {
                changed = revisions.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(RETRY), if failed => {}
            }
        }
    };
    cluster.lead(&namespace, LEASE, &me, work).await;
}

/// Whether it need not be tried again before something changes.
async fn write(cluster: &Cluster, allocator: &mut Allocator, change: Change) -> bool {
    let before: Vec<(&str, IpAddr)> = change.object.allocated.iter().map(|(host, ip)| (&**host, *ip)).collect();
    let after: Vec<(&str, IpAddr)> = change.after.iter().map(|(host, ip)| (&**host, *ip)).collect();
    let key = change.object.key.clone();
    match cluster.write_addresses(&key.namespace, &key.name, &before, &after).await {
        Ok(true) => {
            debug!(object = %key, ?after, "addresses allocated");
            allocator.written(change);
            true
        }
        // It has changed, or is in a file only.
        Ok(false) => true,
        Err(error) => {
            warn!(object = %key, error = %error, "allocated addresses cannot be written");
            false
        }
    }
}

/// A status that is to be written.
#[derive(Clone, Debug)]
struct Change {
    object: Arc<Object>,
    after: Addresses,
}

/// Which addresses are in use, and which comes next.
#[derive(Debug)]
struct Allocator {
    v4: Range,
    v6: Range,
    /// What was written and is not in the snapshot yet: by object, the version that it was written over.
    written: HashMap<Key, (u64, Addresses)>,
}

impl Allocator {
    fn new(settings: &Settings) -> Allocator {
        let (v4, v6) = (&settings.allocated_v4, &settings.allocated_v6);
        Allocator {
            v4: Range::new(v4.network().to_bits().into(), v4.broadcast().to_bits().into()),
            v6: Range::new(v6.network().to_bits(), v6.broadcast().to_bits()),
            written: HashMap::new(),
        }
    }

    /// What is to be written for this snapshot.
    fn plan(&mut self, snapshot: &Snapshot, allocates: bool) -> Vec<Change> {
        let mut objects: Vec<&Arc<Object>> = snapshot.list(Kind::ServiceEntry).collect();
        // The oldest keep what they have.
        objects.sort_by(|a, b| {
            (a.created, &a.key.namespace, &a.key.name).cmp(&(b.created, &b.key.namespace, &b.key.name))
        });
        self.written.retain(|key, (over, _)| snapshot.get(key).is_some_and(|object| object.resource_version == *over));
        let entry = |object: &Arc<Object>| match &object.body {
            Body::ServiceEntry(entry) => Some(entry.as_ref().clone()),
            _ => None,
        };
        let entries: Vec<(&Arc<Object>, ServiceEntry)> =
            objects.into_iter().filter_map(|object| Some((object, entry(object)?))).collect();
        // Users' own addresses first: those of others give way to them.
        let mut used: HashSet<IpAddr> = HashSet::new();
        used.extend(
            entries.iter().flat_map(|(_, entry)| &entry.addresses).filter_map(|text| text.parse::<IpAddr>().ok()),
        );
        let mut conflicting = HashSet::new();
        for (object, entry) in &entries {
            let own: BTreeSet<IpAddr> = self.current(object).iter().map(|(_, ip)| *ip).collect();
            let theirs: HashSet<IpAddr> = entry.addresses.iter().filter_map(|text| text.parse().ok()).collect();
            for ip in own.iter().filter(|ip| !theirs.contains(*ip)) {
                if !used.insert(*ip) {
                    conflicting.insert(object.key.clone());
                }
            }
        }
        let mut out = Vec::new();
        for (object, entry) in &entries {
            let current = self.current(object).to_vec();
            if !(allocates && wants(object, entry)) {
                // With the feature off nobody looks at the statuses, and they stay.
                if allocates && !current.is_empty() {
                    out.push(Change { object: (*object).clone(), after: Vec::new() });
                }
                continue;
            }
            let mut seen = HashSet::new();
            let hosts =
                entry.hosts.iter().filter(|host| !host.starts_with('*') || entry.resolution == Resolution::DynamicDns);
            let hosts: Vec<&String> = hosts.filter(|host| seen.insert(host.as_str())).collect();
            let having: HashSet<&str> = current.iter().map(|(host, _)| &**host).collect();
            let moves = conflicting.contains(&object.key);
            if having == seen && !moves {
                continue;
            }
            let mut after = Addresses::new();
            for host in hosts {
                let kept = current.iter().filter(|(own, _)| !moves && **own == **host);
                let before = after.len();
                after.extend(kept.cloned());
                if after.len() == before {
                    let next = [
                        self.v4.next(&mut used, |bits| IpAddr::V4(Ipv4Addr::from_bits(bits as u32))),
                        self.v6.next(&mut used, |bits| IpAddr::V6(Ipv6Addr::from_bits(bits))),
                    ];
                    after.extend(next.into_iter().flatten().map(|ip| (ArcStr::from(host.as_str()), ip)));
                }
            }
            out.push(Change { object: (*object).clone(), after });
        }
        out
    }

    /// What an object has, as far as we know.
    fn current<'a>(&'a self, object: &'a Object) -> &'a [(ArcStr, IpAddr)] {
        self.written.get(&object.key).map_or(&object.allocated, |(_, addresses)| addresses)
    }

    fn written(&mut self, change: Change) {
        self.written.insert(change.object.key.clone(), (change.object.resource_version, change.after));
    }
}

/// As istiod `ShouldV2AutoAllocateIP`.
fn wants(object: &Object, entry: &ServiceEntry) -> bool {
    let refused = object.labels.get(ENABLED).is_some_and(|text| text.eq_ignore_ascii_case("false"));
    !refused && entry.addresses.is_empty() && entry.resolution != Resolution::None
}

/// Addresses of one family, given one after the other.
#[derive(Debug)]
struct Range {
    first: u128,
    last: u128,
    next: u128,
}

impl Range {
    /// All but the first address of a network, unless that is its only one.
    fn new(network: u128, last: u128) -> Range {
        let first = last.min(network + 1);
        Range { first, last, next: first }
    }

    /// An address that nobody has; `None` when all are taken.
    fn next(&mut self, used: &mut HashSet<IpAddr>, make: impl Fn(u128) -> IpAddr) -> Option<IpAddr> {
        // One more than are used cannot all be used.
        let tries = (self.last - self.first + 1).min(used.len() as u128 + 1);
        for _ in 0..tries {
            let ip = make(self.next);
            self.next = if self.next == self.last { self.first } else { self.next + 1 };
            if used.insert(ip) {
                return Some(ip);
            }
        }
        warn!("all addresses for ServiceEntries are taken");
        None
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use config_store::Store;

    use super::*;

    fn store(yaml: &str) -> Store {
        let mut store = Store::new();
        apply(&mut store, yaml);
        store
    }

    fn apply(store: &mut Store, yaml: &str) {
        for document in manifest::parse(Path::new("a.yaml"), yaml).unwrap() {
            store.apply(&document).unwrap_or_else(|rejected| panic!("{rejected}"));
        }
    }

    fn entry(name: &str, age: u8, hosts: &str, rest: &str, status: &str) -> String {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
             metadata: {{name: {name}, creationTimestamp: '2024-01-{age:02}T00:00:00Z'}}\n\
             spec: {{hosts: [{hosts}], ports: [{{number: 80, name: http, protocol: HTTP}}], {rest}}}\n\
             status: {{addresses: [{status}]}}\n---\n"
        )
    }

    /// `NAME: HOST=ADDRESS …` of each change.
    fn plan(allocator: &mut Allocator, store: &Store) -> Vec<String> {
        let changes = allocator.plan(&store.snapshot(), true);
        let row = |change: &Change| {
            let list: Vec<String> = change.after.iter().map(|(host, ip)| format!("{host}={ip}")).collect();
            format!("{}: {}", change.object.key.name, list.join(" "))
        };
        let out = changes.iter().map(row).collect();
        changes.into_iter().for_each(|change| allocator.written(change));
        out
    }

    #[test]
    fn hosts_without_address_get_one_of_each_family_in_order_and_once() {
        let yaml = entry("b", 2, "b.example, '*.wild.example', b2.example, b.example", "resolution: STATIC", "")
            + &entry("a", 1, "a.example", "resolution: STATIC", "")
            + &entry("none", 3, "n.example", "resolution: NONE", "")
            + &entry("own", 4, "o.example", "resolution: STATIC, addresses: [240.240.0.1]", "");
        let mut store = store(&yaml);
        let mut allocator = Allocator::new(&Settings::default());
        let expected = [
            "a: a.example=240.240.0.2 a.example=2001:2::1",
            "b: b.example=240.240.0.3 b.example=2001:2::2 b2.example=240.240.0.4 b2.example=2001:2::3",
        ];
        assert_eq!(plan(&mut allocator, &store), expected, "the oldest first, and none that a user has");
        assert_eq!(plan(&mut allocator, &store), [""; 0], "what is written is not written again");
        let seen = "{host: a.example, value: 240.240.0.2}, {host: a.example, value: '2001:2::1'}";
        apply(&mut store, &entry("a", 1, "a.example", "resolution: STATIC", seen));
        assert_eq!(
            plan(&mut Allocator::new(&Settings::default()), &store).len(),
            1,
            "another leader keeps what is there"
        );
        assert_eq!(plan(&mut allocator, &store), [""; 0]);
        apply(&mut store, &entry("a", 1, "a.example, more.example", "resolution: STATIC", seen));
        let grown = "a: a.example=240.240.0.2 a.example=2001:2::1 more.example=240.240.0.5 more.example=2001:2::4";
        assert_eq!(plan(&mut allocator, &store), [grown]);
    }

    #[test]
    fn the_younger_of_two_with_one_address_moves_and_what_is_not_wanted_goes() {
        let same = |host: &str| format!("{{host: {host}, value: 240.240.0.1}}");
        let yaml = entry("young", 9, "y.example", "resolution: DNS", &same("y.example"))
            + &entry("old", 1, "o.example", "resolution: DNS", &same("o.example"))
            + &entry("stale", 2, "s.example", "resolution: NONE", "{host: s.example, value: 240.240.0.9}");
        let store = store(&yaml);
        let mut allocator = Allocator::new(&Settings::default());
        let expected = ["stale: ", "young: y.example=240.240.0.2 y.example=2001:2::1"];
        assert_eq!(plan(&mut allocator, &store), expected);
        assert_eq!(plan(&mut allocator, &store), [""; 0]);
        assert!(Allocator::new(&Settings::default()).plan(&store.snapshot(), false).is_empty(), "switched off");
        let mut settings = Settings::default();
        settings.set_env("PILOT_IP_AUTOALLOCATE_IPV4_PREFIX", "10.9.0.0/24");
        settings.set_env("PILOT_IP_AUTOALLOCATE_IPV6_PREFIX", "fd00::/64");
        let ours = plan(&mut Allocator::new(&settings), &store);
        assert_eq!(ours[1], "young: y.example=10.9.0.1 y.example=fd00::1");
    }

    #[test]
    fn a_label_refuses() {
        let yaml = entry("a", 1, "a.example", "resolution: DNS", "")
            .replace("{name: a,", "{name: a, labels: {networking.istio.io/enable-autoallocate-ip: 'False'},");
        assert_eq!(plan(&mut Allocator::new(&Settings::default()), &store(&yaml)), [""; 0]);
    }

    #[test]
    fn a_range_ends_and_starts_over() {
        let mut range = Range::new(0xF0F0_0000, 0xF0F0_0003);
        let mut used = HashSet::new();
        let mut next =
            |used: &mut HashSet<IpAddr>| range.next(used, |bits| IpAddr::V4(Ipv4Addr::from_bits(bits as u32)));
        let given: Vec<_> = (0..3).filter_map(|_| next(&mut used)).map(|ip| ip.to_string()).collect();
        assert_eq!(given, ["240.240.0.1", "240.240.0.2", "240.240.0.3"]);
        assert_eq!(next(&mut used), None);
        used.remove(&"240.240.0.2".parse().unwrap());
        assert_eq!(next(&mut used).map(|ip| ip.to_string()).as_deref(), Some("240.240.0.2"));
    }
}
