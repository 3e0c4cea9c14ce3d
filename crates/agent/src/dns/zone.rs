//! Which names the mesh knows, and their addresses. Pure.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::Bytes;
use envoy_api::Message;
use envoy_api::istio::NameTable;

/// Where the pod is, which decides what short names mean.
#[derive(Clone, Debug, Default)]
pub(crate) struct Naming {
    /// The pod's namespace.
    pub namespace: String,
    /// `NAMESPACE.svc.cluster.local`.
    pub domain: String,
    /// Search domains of the pod's resolv.conf.
    pub search: Vec<String>,
}

/// A name table, indexed. Names are lower case, without trailing dot.
#[derive(Debug)]
pub(crate) struct Zone {
    names: HashMap<Box<str>, u32>,
    hosts: Vec<Host>,
    reverse: HashMap<IpAddr, Box<str>>,
    /// `svc.cluster.local` with a dot before it; a name under the first of these is tried without.
    search: Option<String>,
    /// The table as it came; decoded only for debugging.
    source: Bytes,
}

#[derive(Debug, Default)]
struct Host {
    v4: Box<[Ipv4Addr]>,
    v6: Box<[Ipv6Addr]>,
}

/// What is known of a name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Found<'a> {
    /// The name that the one asked for is an alias of, if it was asked for under a search domain.
    pub alias_of: Option<&'a str>,
    pub v4: &'a [Ipv4Addr],
    pub v6: &'a [Ipv6Addr],
}

impl Zone {
    /// Decodes and indexes a name table.
    ///
    /// Short names as istio `pkg/dns/client/dns.go`, `generateAltHosts`: `NAME`, `NAME.NS`, `NAME.NS.svc` and the whole name for
    /// Kubernetes services of the pod's own domain, the first only within the namespace.
    pub(crate) fn build(source: Bytes, naming: &Naming) -> Result<Zone, prost::DecodeError> {
        let table = NameTable::decode(source.clone())?;
        let own_domain = naming
            .domain
            .strip_prefix(&format!("{}.", naming.namespace))
            .unwrap_or(&naming.domain)
            .to_ascii_lowercase();
        let first_label = own_domain.split('.').next().unwrap_or_default();
        let search = naming
            .search
            .first()
            .map(|s| format!(".{}", s.trim_matches('.').to_ascii_lowercase()))
            .filter(|s| s.len() > 1);
        let mut zone = Zone {
            names: HashMap::new(),
            hosts: Vec::with_capacity(table.table.len()),
            reverse: HashMap::new(),
            search,
            source,
        };
        for (name, info) in &table.table {
            let addresses: Vec<IpAddr> = info.ips.iter().filter_map(|ip| ip.parse().ok()).collect();
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            if addresses.is_empty() || name.is_empty() {
                continue;
            }
            let index = zone.hosts.len() as u32;
            let v4 = addresses.iter().filter_map(|ip| if let IpAddr::V4(ip) = ip { Some(*ip) } else { None }).collect();
            let v6 = addresses.iter().filter_map(|ip| if let IpAddr::V6(ip) = ip { Some(*ip) } else { None }).collect();
            zone.hosts.push(Host { v4, v6 });
            let kubernetes = info.registry == "Kubernetes";
            if kubernetes && !own_domain.is_empty() && name.ends_with(&own_domain) {
                let short = info.shortname.to_ascii_lowercase();
                let qualified = format!("{short}.{}", info.namespace.to_ascii_lowercase());
                if naming.namespace == info.namespace {
                    zone.names.entry(short.into()).or_insert(index);
                }
                zone.names.entry(format!("{qualified}.{first_label}").into()).or_insert(index);
                zone.names.entry(qualified.into()).or_insert(index);
            }
            for address in addresses {
                // A headless pod's own name says more than its service's: the longer name wins.
                let known = zone.reverse.entry(address).or_insert_with(|| name.as_str().into());
                if known.len() < name.len() {
                    *known = name.as_str().into();
                }
            }
            // The whole name is itself whatever short name looks the same.
            zone.names.insert(name.into(), index);
        }
        Ok(zone)
    }

    /// How many names there are, short ones included.
    pub(crate) fn count(&self) -> usize {
        self.names.len()
    }

    /// Finds a name, lower case and without trailing dot. `None`: the mesh does not know it.
    pub(super) fn find<'a>(&'a self, name: &'a str) -> Option<Found<'a>> {
        if let Some(host) = self.host(name) {
            return Some(Found { alias_of: None, v4: &host.v4, v6: &host.v6 });
        }
        // A client that goes through its search list asks for NAME.SEARCH first. Answering that with an alias ends the
        // search at once; as `buildDNSAnswers` in istio.
        let search = self.search.as_deref()?;
        let inner = name.strip_suffix(search)?;
        if inner.ends_with(search) {
            return None;
        }
        // DIFFERS: for a wildcard istio's alias points at `*.example.com` itself, which no client can follow.
        let host = self.host(inner)?;
        Some(Found { alias_of: Some(inner), v4: &host.v4, v6: &host.v6 })
    }

    fn host(&self, name: &str) -> Option<&Host> {
        let exact = self.names.get(name);
        let wildcards = || {
            let suffixes = name.match_indices('.').map(|(dot, _)| &name[dot..]);
            suffixes.into_iter().find_map(|suffix| self.names.get(format!("*{suffix}").as_str()))
        };
        let index = exact.or_else(wildcards)?;
        self.hosts.get(*index as usize)
    }

    /// The name of an address of the mesh.
    pub(crate) fn name_of(&self, address: IpAddr) -> Option<&str> {
        self.reverse.get(&address).map(AsRef::as_ref)
    }

    /// The table as Istio's `/debug/ndsz` shows it.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        let table = NameTable::decode(self.source.clone()).unwrap_or_default(); // it was decoded once already
        let entries = table.table.iter().map(|(name, info)| {
            let mut fields = serde_json::Map::new();
            fields.insert("ips".to_owned(), info.ips.clone().into());
            let texts = [("registry", &info.registry), ("shortname", &info.shortname), ("namespace", &info.namespace)];
            fields.extend(
                texts
                    .into_iter()
                    .filter(|(_, text)| !text.is_empty())
                    .map(|(key, text)| (key.to_owned(), text.as_str().into())),
            );
            (name.clone(), serde_json::Value::Object(fields))
        });
        serde_json::json!({ "table": serde_json::Value::Object(entries.collect()) })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use envoy_api::istio::NameInfo;

    use super::*;

    pub(in crate::dns) fn zone() -> Zone {
        let service = |ip: &str, name: &str, namespace: &str| NameInfo {
            ips: vec![ip.to_owned()],
            registry: "Kubernetes".to_owned(),
            shortname: name.to_owned(),
            namespace: namespace.to_owned(),
        };
        let outside = |ips: &[&str]| NameInfo {
            ips: ips.iter().map(ToString::to_string).collect(),
            registry: "External".to_owned(),
            ..Default::default()
        };
        let table = [
            ("details.default.svc.cluster.local", service("10.1.0.1", "details", "default")),
            ("db.other.svc.cluster.local", service("10.1.0.2", "db", "other")),
            ("db-0.db.other.svc.cluster.local", service("10.1.0.3", "db-0.db", "other")),
            ("Api.Example.com", outside(&["240.240.0.1", "2001:2::1"])),
            ("*.wild.example.com", outside(&["240.240.0.2"])),
            ("broken.example.com", outside(&["not an address"])),
        ];
        let table = NameTable { table: table.map(|(name, info)| (name.to_owned(), info)).into() };
        let naming = Naming {
            namespace: "default".to_owned(),
            domain: "default.svc.cluster.local".to_owned(),
            search: vec!["default.svc.cluster.local".to_owned(), "svc.cluster.local".to_owned()],
        };
        Zone::build(table.encode_to_vec().into(), &naming).unwrap()
    }

    fn v4(zone: &Zone, name: &str) -> Option<String> {
        zone.find(name).map(|found| {
            format!("{:?}{}", found.v4, found.alias_of.map(|alias| format!(" = {alias}")).unwrap_or_default())
        })
    }

    #[test]
    fn names_and_their_short_forms() {
        let zone = zone();
        for name in ["details", "details.default", "details.default.svc", "details.default.svc.cluster.local"] {
            assert_eq!(v4(&zone, name).as_deref(), Some("[10.1.0.1]"), "{name}");
        }
        for name in ["db.other", "db.other.svc", "db.other.svc.cluster.local"] {
            assert_eq!(v4(&zone, name).as_deref(), Some("[10.1.0.2]"), "{name}");
        }
        for name in ["db", "details.other", "broken.example.com", "example.com", "com", ""] {
            assert_eq!(v4(&zone, name), None, "{name}");
        }
        let api = zone.find("api.example.com").unwrap();
        assert_eq!((api.v4.len(), api.v6.len()), (1, 1));
    }

    #[test]
    fn search_domains_give_aliases() {
        let zone = zone();
        assert_eq!(
            v4(&zone, "api.example.com.default.svc.cluster.local").as_deref(),
            Some("[240.240.0.1] = api.example.com")
        );
        assert_eq!(v4(&zone, "db.other.default.svc.cluster.local").as_deref(), Some("[10.1.0.2] = db.other"));
        assert_eq!(
            v4(&zone, "x.wild.example.com.default.svc.cluster.local").as_deref(),
            Some("[240.240.0.2] = x.wild.example.com")
        );
        assert_eq!(v4(&zone, "details.default.svc.cluster.local.default.svc.cluster.local"), None);
    }

    #[test]
    fn wildcards_cover_every_depth_but_not_their_own_parent() {
        let zone = zone();
        assert_eq!(v4(&zone, "a.wild.example.com").as_deref(), Some("[240.240.0.2]"));
        assert_eq!(v4(&zone, "a.b.wild.example.com").as_deref(), Some("[240.240.0.2]"));
        assert_eq!(v4(&zone, "wild.example.com"), None);
    }

    #[test]
    fn addresses_have_names() {
        let zone = zone();
        assert_eq!(zone.name_of("10.1.0.3".parse().unwrap()), Some("db-0.db.other.svc.cluster.local"));
        assert_eq!(zone.name_of("2001:2::1".parse().unwrap()), Some("api.example.com"));
        assert_eq!(zone.name_of("10.9.9.9".parse().unwrap()), None);
        assert_eq!(zone.to_json()["table"]["details.default.svc.cluster.local"]["ips"][0], "10.1.0.1");
    }
}
