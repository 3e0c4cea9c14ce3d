//! A proxy's own configuration out of its `/config_dump`, of Envoy or ours.

use anyhow::{Context, bail};
use envoy_api::{Message, cluster, endpoint, json, listener, route, type_url};
use serde_json::Value;

/// What a dump says. Dynamic resources come before static ones, as istioctl lists them.
#[derive(Debug, Default)]
pub struct Dump {
    /// The proxy's name with its namespace, as its node id says.
    pub name: String,
    /// The pod's address, by the same.
    pub address: String,
    /// Listeners.
    pub listeners: Vec<listener::Listener>,
    /// Route tables, those inside of listeners included.
    pub routes: Vec<route::RouteConfiguration>,
    /// Clusters.
    pub clusters: Vec<cluster::Cluster>,
    /// Endpoints.
    pub endpoints: Vec<endpoint::ClusterLoadAssignment>,
    /// The sections as they came.
    pub(crate) sections: Vec<Value>,
}

impl Dump {
    /// Asks a proxy's admin server at `ADDRESS:PORT`.
    ///
    /// # Errors
    /// When it does not answer, or not with a dump.
    pub fn of_admin(address: &str) -> anyhow::Result<Self> {
        let bytes = crate::ask_admin(address, "/config_dump?include_eds")?;
        Self::parse(serde_json::from_slice(&bytes).context("the proxy's answer is no JSON")?)
    }

    /// Asks a control plane's monitoring port what it sends to the proxy of this name, `NAME.NAMESPACE`.
    ///
    /// # Errors
    /// When it does not answer, or not with a dump: it knows connected proxies only.
    pub fn of_control_plane(address: &str, proxy: &str) -> anyhow::Result<Self> {
        let bytes = crate::ask_admin(address, &format!("/debug/config_dump?proxyID={proxy}&include_eds"))?;
        Self::parse(serde_json::from_slice(&bytes).context("the control plane's answer is no JSON")?)
    }

    /// Takes the answer to `/config_dump?include_eds` apart.
    ///
    /// # Errors
    /// When it is none, or holds resources that are malformed.
    pub fn parse(value: Value) -> anyhow::Result<Self> {
        let Value::Object(mut fields) = value else { bail!("this is no config dump: not an object") };
        let Some(Value::Array(sections)) = fields.remove("configs") else {
            bail!("this is no config dump: it has no configs")
        };
        let mut dump = Self { sections, ..Self::default() };
        if let Some(bootstrap) = dump.section("BootstrapConfigDump") {
            let id = bootstrap.pointer("/bootstrap/node/id").and_then(Value::as_str).unwrap_or_default();
            let part = |at: usize| id.split('~').nth(at);
            (dump.name, dump.address) = (part(2).unwrap_or(id).to_owned(), part(1).unwrap_or_default().to_owned());
        }
        dump.listeners = dump.resources(
            "ListenersConfigDump",
            [("dynamic_listeners", "/active_state/listener"), ("static_listeners", "/listener")],
            type_url::LISTENER,
        )?;
        dump.routes = dump.resources(
            "RoutesConfigDump",
            [("dynamic_route_configs", "/route_config"), ("static_route_configs", "/route_config")],
            type_url::ROUTE,
        )?;
        dump.clusters = dump.resources(
            "ClustersConfigDump",
            [("dynamic_active_clusters", "/cluster"), ("static_clusters", "/cluster")],
            type_url::CLUSTER,
        )?;
        dump.endpoints = dump.resources(
            "EndpointsConfigDump",
            [("dynamic_endpoint_configs", "/endpoint_config"), ("static_endpoint_configs", "/endpoint_config")],
            type_url::ENDPOINT,
        )?;
        Ok(dump)
    }

    /// The section of this type, for instance `SecretsConfigDump`.
    pub(crate) fn section(&self, kind: &str) -> Option<&Value> {
        self.sections.iter().find(|section| {
            let of = section.get("@type").and_then(Value::as_str).unwrap_or_default();
            of.rsplit('.').next() == Some(kind)
        })
    }

    fn resources<M: Message + Default>(
        &self,
        kind: &str,
        lists: [(&str, &str); 2],
        type_url: &str,
    ) -> anyhow::Result<Vec<M>> {
        let Some(section) = self.section(kind) else { return Ok(Vec::new()) };
        let mut out = Vec::new();
        for (list, path) in lists {
            for entry in field(section, list).and_then(Value::as_array).into_iter().flatten() {
                // A listener without active state is still warming, or was refused.
                let Some(value) = path.split('/').skip(1).try_fold(entry, field) else { continue };
                let mut value = value.clone();
                // A resource is an `Any`; its type is known here.
                if let Some(fields) = value.as_object_mut() {
                    fields.remove("@type");
                }
                let bytes = json::from_json_lenient(type_url, &value)?;
                out.push(M::decode(bytes.as_slice()).with_context(|| format!("malformed {type_url}"))?);
            }
        }
        Ok(out)
    }
}

/// A field as Envoy writes it, by its name in protobuf, or as istiod does, in camel case.
fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    value.get(name).or_else(|| {
        let mut words = name.split('_');
        let mut camel = words.next().unwrap_or_default().to_owned();
        for word in words {
            let (first, rest) = word.split_at_checked(1).unwrap_or((word, ""));
            camel.push_str(&first.to_ascii_uppercase());
            camel.push_str(rest);
        }
        value.get(camel)
    })
}
