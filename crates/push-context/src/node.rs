use std::net::IpAddr;
use std::sync::Arc;

use envoy_api::core;
use envoy_api::wkt;
use istio_api::MeshProxyConfig;
use mesh_types::{ArcStr, Labels, SpiffeId};
use registry::{Locality, ProxyQuery};
use serde_json::{Map, Value};

/// How traffic reaches the proxy (metadata `INTERCEPTION_MODE`).
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum InterceptionMode {
    /// iptables REDIRECT.
    #[default]
    Redirect,
    /// iptables TPROXY: source addresses are kept.
    Tproxy,
    /// Not at all: applications dial the proxy's own listeners.
    None,
}

/// Address families of the proxy.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum IpMode {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

/// Which filters the proxy has.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Profile {
    /// Istio's build of Envoy.
    #[default]
    IstioProxy,
    /// Stock Envoy: no `istio.alpn`, `istio.metadata_exchange`, `istio.stats` (metadata `PROFILE: stock`).
    Stock,
    /// Our own proxy: all but the exchange of metadata over TCP (metadata `OUTRIGGER_PROXY: true`).
    Outrigger,
}

/// A proxy, as it introduces itself with its first request.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Node {
    /// `sidecar~IP~NAME.NAMESPACE~DNS_DOMAIN`.
    pub id: String,
    /// Envoy's name for the cluster of like proxies, which the agent sets to `APP.NAMESPACE`.
    pub cluster: String,
    /// Pod name.
    pub name: ArcStr,
    /// Pod namespace; from the verified identity where there is one.
    pub namespace: ArcStr,
    /// First is the primary address.
    pub addresses: Vec<String>,
    /// `NAMESPACE.svc.cluster.local`.
    pub dns_domain: String,
    /// Pod labels.
    pub labels: Labels,
    /// Kubernetes service account.
    pub service_account: String,
    /// Where it runs.
    pub locality: Locality,
    /// Kubernetes cluster.
    pub cluster_id: ArcStr,
    /// Network; empty is the default one.
    pub network: ArcStr,
    /// How traffic reaches it.
    pub interception: InterceptionMode,
    /// Its filters.
    pub profile: Profile,
    /// Its address families.
    pub ip_mode: IpMode,
    /// The agent answers DNS from name tables (`DNS_CAPTURE`).
    pub dns_capture: bool,
    /// Services without address get one (`DNS_AUTO_ALLOCATE`).
    pub dns_auto_allocate: bool,
    /// HTTP/1.0 is accepted (`HTTP10`).
    pub http10: bool,
    /// Port of the forward proxy, over the mesh's (`HTTP_PROXY_PORT`).
    pub http_proxy_port: Option<u16>,
    /// Idle timeout of connections, Go syntax (`IDLE_TIMEOUT`).
    pub idle_timeout: String,
    /// May not bind ports below 1024 (`UNPRIVILEGED_POD`).
    pub unprivileged: bool,
    /// Ports of listeners that the proxy has from its start: health, statistics.
    pub reserved_ports: Vec<u16>,
    /// Its threads share inbound connections exactly (`INBOUND_LISTENER_EXACT_BALANCE`).
    pub inbound_exact_balance: bool,
    /// And outbound ones (`OUTBOUND_LISTENER_EXACT_BALANCE`).
    pub outbound_exact_balance: bool,
    /// All other metadata that generators read by name; strings only.
    pub metadata: std::collections::BTreeMap<String, String>,
    /// `PROXY_CONFIG`: what the pod's annotation and ProxyConfig resource say.
    pub proxy_config: Option<ProxyConfigText>,
}

/// A ProxyConfig as JSON text, so that it can be compared and hashed.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ProxyConfigText(Arc<str>);

impl ProxyConfigText {
    /// The settings; unreadable ones count as none.
    pub fn parse(&self) -> MeshProxyConfig {
        serde_json::from_str(&self.0).unwrap_or_default()
    }
}

/// A node that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum InvalidNode {
    /// Not `TYPE~IP~NAME.NAMESPACE~DOMAIN`.
    #[error("node id {0:?} is not of the form sidecar~IP~NAME.NAMESPACE~DOMAIN")]
    Id(String),
    /// Gateways and waypoints.
    #[error("node {id:?}: only sidecars are served, not {kind:?}")]
    Kind {
        /// The node's id.
        id: String,
        /// Its first part.
        kind: String,
    },
    /// No usable address.
    #[error("node {0:?} has no IP address")]
    NoAddress(String),
    /// It says to be in another namespace than its certificate or token.
    #[error("node {id:?} is not in namespace {namespace:?} of its identity")]
    Namespace {
        /// The node's id.
        id: String,
        /// Of the verified peer.
        namespace: String,
    },
    /// Metadata beyond any sane size.
    #[error("node {0:?} sent more than 1 MiB of metadata")]
    TooBig(String),
    /// proxy.yaml that says too little.
    #[error("proxy description: {0}")]
    Yaml(String),
}

fn plain(value: &wkt::Value) -> Value {
    use wkt::value::Kind;
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::NumberValue(n)) => serde_json::Number::from_f64(*n).map_or(Value::Null, Value::Number),
        Some(Kind::StringValue(s)) => Value::String(s.clone()),
        Some(Kind::BoolValue(b)) => Value::Bool(*b),
        Some(Kind::StructValue(s)) => Value::Object(plain_map(s)),
        Some(Kind::ListValue(l)) => Value::Array(l.values.iter().map(plain).collect()),
    }
}

fn plain_map(fields: &wkt::Struct) -> Map<String, Value> {
    fields.fields.iter().map(|(k, v)| (k.clone(), plain(v))).collect()
}

fn is_true(value: Option<&Value>) -> bool {
    match value {
        Some(Value::Bool(b)) => *b,
        Some(Value::String(s)) => matches!(s.as_str(), "true" | "True" | "TRUE" | "1"),
        _ => false,
    }
}

/// Metadata that name ports of the proxy's own.
const RESERVED_PORTS: [&str; 4] =
    ["ENVOY_STATUS_PORT", "ENVOY_PROMETHEUS_PORT", "ENVOY_SECURE_METRICS_PORT", "ENVOY_SECURE_MERGED_METRICS_PORT"];

/// A port as a number, which Envoy sends with a fraction, or as text.
fn port(value: &Value) -> Option<u16> {
    let number = match value {
        Value::String(text) => text.parse().ok()?,
        other => other.as_f64()?,
    };
    let whole = (number.fract() == 0.0 && (1.0..=65535.0).contains(&number)).then_some(number)?;
    // In range, as just checked.
    Some(whole as u16)
}

impl Node {
    /// Reads a node as Envoy sends it; `peer` is the verified identity of the connection.
    pub fn from_envoy(node: &core::Node, peer: Option<&SpiffeId>) -> Result<Node, InvalidNode> {
        use envoy_api::Message;
        if node.encoded_len() > 1 << 20 {
            return Err(InvalidNode::TooBig(node.id.chars().take(200).collect()));
        }
        let metadata = node.metadata.as_ref().map(plain_map).unwrap_or_default();
        let locality = node.locality.as_ref().map(|l| Locality {
            region: l.region.as_str().into(),
            zone: l.zone.as_str().into(),
            subzone: l.sub_zone.as_str().into(),
        });
        let mut out = Node::from_parts(&node.id, metadata, locality)?;
        out.cluster.clone_from(&node.cluster);
        if let Some(peer) = peer {
            if *out.namespace != *peer.namespace() {
                return Err(InvalidNode::Namespace { id: node.id.clone(), namespace: peer.namespace().to_owned() });
            }
            peer.service_account().clone_into(&mut out.service_account);
        }
        Ok(out)
    }

    pub(crate) fn from_parts(
        id: &str,
        metadata: Map<String, Value>,
        locality: Option<Locality>,
    ) -> Result<Node, InvalidNode> {
        let mut parts = id.split('~');
        let (Some(kind), Some(ip), Some(name), Some(domain), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidNode::Id(id.to_owned()));
        };
        if kind != "sidecar" {
            return Err(InvalidNode::Kind { id: id.to_owned(), kind: kind.to_owned() });
        }
        let text = |key: &str| metadata.get(key).and_then(Value::as_str).filter(|v| !v.is_empty());
        let mut addresses: Vec<String> = vec![ip.to_owned()];
        if let Some(list) = text("INSTANCE_IPS") {
            addresses.extend(list.split(',').map(|a| a.trim().to_owned()));
        }
        let mut seen = Vec::new();
        addresses.retain(|a| {
            let fresh = a.parse::<IpAddr>().is_ok() && !seen.contains(a);
            seen.push(a.clone());
            fresh
        });
        // As istiod orders the instance's addresses: loopback and link-local ones say nothing.
        if addresses.is_empty() {
            return Err(InvalidNode::NoAddress(id.to_owned()));
        }
        let (short, id_namespace) = name.split_once('.').unwrap_or((name, ""));
        let namespace = text("NAMESPACE").unwrap_or(id_namespace);
        let labels: Labels = metadata
            .get("LABELS")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
            .collect();
        let locality = locality.filter(|l| !l.is_empty()).or_else(|| Locality::of_label(&labels)).unwrap_or_default();
        let ip_mode = match (addresses.iter().any(|a| !a.contains(':')), addresses.iter().any(|a| a.contains(':'))) {
            (true, true) => IpMode::Dual,
            (false, _) => IpMode::V6,
            (true, false) => IpMode::V4,
        };
        let profile = match text("PROFILE") {
            Some("stock") => Profile::Stock,
            _ if is_true(metadata.get("OUTRIGGER_PROXY")) => Profile::Outrigger,
            _ => Profile::IstioProxy,
        };
        let strings = metadata.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())));
        Ok(Node {
            id: id.to_owned(),
            cluster: format!("{}.{namespace}", labels.get("app").map_or(short, String::as_str)),
            name: short.into(),
            namespace: namespace.into(),
            dns_domain: domain.to_owned(),
            service_account: text("SERVICE_ACCOUNT").unwrap_or_default().to_owned(),
            locality,
            cluster_id: text("CLUSTER_ID").unwrap_or_default().into(),
            network: text("NETWORK").unwrap_or_default().into(),
            interception: match text("INTERCEPTION_MODE") {
                Some("NONE") => InterceptionMode::None,
                Some("TPROXY") => InterceptionMode::Tproxy,
                _ => InterceptionMode::Redirect,
            },
            profile,
            ip_mode,
            dns_capture: is_true(metadata.get("DNS_CAPTURE")),
            dns_auto_allocate: is_true(metadata.get("DNS_AUTO_ALLOCATE")),
            http10: text("HTTP10") == Some("1"),
            http_proxy_port: text("HTTP_PROXY_PORT").and_then(|p| p.parse().ok()),
            idle_timeout: text("IDLE_TIMEOUT").unwrap_or_default().to_owned(),
            unprivileged: is_true(metadata.get("UNPRIVILEGED_POD")),
            reserved_ports: RESERVED_PORTS.iter().filter_map(|key| port(metadata.get(*key)?)).collect(),
            inbound_exact_balance: is_true(metadata.get("INBOUND_LISTENER_EXACT_BALANCE")),
            outbound_exact_balance: is_true(metadata.get("OUTBOUND_LISTENER_EXACT_BALANCE")),
            proxy_config: metadata
                .get("PROXY_CONFIG")
                .filter(|v| v.is_object())
                .map(|v| ProxyConfigText(v.to_string().into())),
            metadata: strings.collect(),
            labels,
            addresses,
        })
    }

    /// Whether it has an IPv4 address.
    pub fn supports_v4(&self) -> bool {
        self.ip_mode != IpMode::V6
    }

    /// Whether it has an IPv6 address.
    pub fn supports_v6(&self) -> bool {
        self.ip_mode != IpMode::V4
    }

    /// One of its string metadata.
    pub fn meta(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// Whether its version, as it says itself, is this one or later; one that cannot be read counts as the latest.
    ///
    /// As istiod `ParseIstioVersion`, `VersionGreaterOrEqual`: a missing patch is the last one.
    pub fn is_at_least(&self, version: (u32, u32, u32)) -> bool {
        let text = self.meta("ISTIO_VERSION").unwrap_or_default();
        let mut parts = text.strip_prefix("release-").unwrap_or(text).split('.');
        let mut number = || -> Option<u32> {
            let part = parts.next()?;
            part[..part.bytes().take_while(u8::is_ascii_digit).count()].parse().ok()
        };
        let (Some(major), Some(minor)) = (number(), number()) else { return true };
        (major, minor, number().unwrap_or(u32::MAX)) >= version
    }

    /// What the registry of a cluster asks for to find the proxy's own services.
    pub fn query(&self, cluster: &str) -> ProxyQuery<'_> {
        ProxyQuery {
            name: &self.name,
            namespace: &self.namespace,
            addresses: &self.addresses,
            labels: &self.labels,
            elsewhere: !self.cluster_id.is_empty() && *self.cluster_id != *cluster,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str) -> Result<Node, InvalidNode> {
        Node::from_envoy(&core::Node { id: id.to_owned(), ..core::Node::default() }, None)
    }

    #[test]
    fn ids_are_taken_apart_and_checked() {
        let good = node("sidecar~10.0.0.1~reviews-v1.default~default.svc.cluster.local").unwrap();
        assert_eq!((&*good.name, &*good.namespace), ("reviews-v1", "default"));
        assert!(matches!(node("sidecar~10.0.0.1"), Err(InvalidNode::Id(_))));
        assert!(matches!(node("router~10.0.0.1~a.b~c"), Err(InvalidNode::Kind { .. })));
        assert!(matches!(node("sidecar~x~a.b~c"), Err(InvalidNode::NoAddress(_))));
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        let at_least = |text: &str, version| {
            let mut node = node("sidecar~10.0.0.1~a.b~c").unwrap();
            node.metadata.insert("ISTIO_VERSION".to_owned(), text.to_owned());
            node.is_at_least(version)
        };
        for (text, minor, expected) in [
            ("1.9.5", 28, false),
            ("1.28.0", 28, true),
            ("1.28.3", 29, false),
            ("release-1.29", 29, true),
            ("1.29-alpha.0", 29, true),
            ("", 29, true),
            ("master", 29, true),
        ] {
            assert_eq!(at_least(text, (1, minor, 0)), expected, "{text} {minor}");
        }
        assert!(!at_least("1.29.1", (1, 29, 2)) && at_least("1.29", (1, 29, 2)));
    }

    #[test]
    fn the_peers_namespace_must_be_the_nodes() {
        let envoy = core::Node { id: "sidecar~10.0.0.1~a.default~x".to_owned(), ..core::Node::default() };
        let peer = SpiffeId::new("cluster.local", "other", "sa").unwrap();
        assert!(matches!(Node::from_envoy(&envoy, Some(&peer)), Err(InvalidNode::Namespace { .. })));
    }
}
