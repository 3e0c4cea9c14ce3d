//! istiod's debug pages (pilot/pkg/xds/debug.go), for people and for `istioctl`.

mod dump;
mod objects;
mod registry;

use std::sync::Arc;

use ::registry::{Gateways, NetworkGateway};
use envoy_api::type_url;
use lifecycle::http::{Response, json, text, with_type};
use push_context::Node;
use serde_json::{Map, Value, json};

use crate::metrics::short;
use crate::push_status::PushStatus;
use crate::status::{ProxyStatus, Statuses};
use crate::world::State;

type Page = fn(&State, &About<'_>, &str) -> Result<Value, Failure>;

/// What pages show beside the state, and to whom.
pub(crate) struct About<'a> {
    pub(crate) statuses: &'a Statuses,
    /// The injection configuration, where this control plane injects.
    pub(crate) injector: Option<Arc<inject::Config>>,
    /// The namespace whose proxies the caller may see; `None`: all of them.
    pub(crate) namespace: Option<&'a str>,
}

/// Why a page is not shown.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request makes no sense.
    Bad(String),
    /// There is no such proxy, here.
    NotFound(String),
}

impl<T: Into<String>> From<T> for Failure {
    fn from(message: T) -> Failure {
        Failure::Bad(message.into())
    }
}

/// Pages that workloads may see, of proxies of their own namespace (istiod `activeNamespaceDebuggers`).
const OF_NAMESPACE: [&str; 3] = ["config_dump", "ndsz", "edsz"];

/// Path below `/debug/`, what it shows, how.
const PAGES: &[(&str, &str, Page)] = &[
    ("adsz", "connected proxies and what they watch", adsz),
    ("authorizationz", "authorization policies by namespace", objects::authorizationz),
    ("cachez", "what is kept of generated resources; ?sizes=true how much, ?clear=true forgets it", dump::cachez),
    ("clusterz", "clusters that are read", clusterz),
    ("config_distribution", "version of each proxy", config_distribution),
    (
        "config_dump",
        "what the proxy of ?proxyID=NAME.NAMESPACE is sent; &include_eds: its endpoints, too; &types=cds,lds: nothing else",
        config_dump,
    ),
    ("configz", "Istio resources in effect", objects::configz),
    ("connections", "connected proxies", connections),
    ("ecdsz", "filter configurations of the proxy of ?proxyID=NAME.NAMESPACE", |state, about, query| {
        dump::of_types(state, about, query, &[type_url::EXTENSION])
    }),
    ("edsz", "endpoints of the proxy of ?proxyID=NAME.NAMESPACE", |state, about, query| {
        dump::of_types(state, about, query, &[type_url::ENDPOINT])
    }),
    ("endpointz", "obsolete, as endpointShardz", |state, _, _| Ok(registry::endpoint_shards(&state.push))),
    ("endpointShardz", "endpoints by service and registry", |state, _, _| Ok(registry::endpoint_shards(&state.push))),
    ("force_disconnect", "ends the stream of the proxy of ?proxyID=NAME.NAMESPACE", |_, _, _| {
        Err(Failure::Bad("it is asked for by itself".to_owned()))
    }),
    ("inject", "templates of injection", inject_templates),
    ("instancesz", "services that each connected proxy serves", instancesz),
    ("list", "these pages", |_, _, _| {
        Ok(PAGES.iter().map(|(name, _, _)| *name).filter(|name| *name != "list").collect())
    }),
    ("mcsz", "services of several clusters (Kubernetes MCS), of which none are read", |_, _, _| Ok(json!([]))),
    ("mesh", "MeshConfig in effect", mesh),
    ("ndsz", "the name table of the proxy of ?proxyID=NAME.NAMESPACE", ndsz),
    ("networkz", "gateways between networks", |state, _, _| Ok(gateways(&state.push.registry.networks().gateways))),
    ("push_status", "the latest snapshot", push_status),
    ("pushcontext", "what pushes are made from", pushcontext),
    ("registryz", "services", |state, _, _| Ok(registry::services(state))),
    ("resourcesz", "kinds that are read", objects::resourcesz),
    ("sidecarz", "what the proxy of ?proxyID=NAME.NAMESPACE may see", sidecarz),
    ("syncz", "which proxies have accepted what they were sent; ?namespace= of one namespace", syncz),
    ("telemetryz", "Telemetry resources by namespace; ?proxyID= what holds for a proxy", objects::telemetryz),
];

/// The page at `path`, which starts with `/debug`.
pub(crate) fn page(path: &str, query: &str, state: &State, about: &About<'_>) -> Response {
    let name = path.trim_start_matches("/debug").trim_matches('/');
    if about.namespace.is_some() && !OF_NAMESPACE.contains(&name) {
        return text(403, "this page is for the root namespace's service accounts, or for this machine\n");
    }
    if name.is_empty() {
        return with_type(200, "text/html; charset=utf-8", index());
    }
    if let Some(said) = act(name, query, state, about) {
        return match said {
            Ok(said) => text(200, said),
            Err(failure) => failure.answer(),
        };
    }
    match PAGES.iter().find(|(other, _, _)| *other == name) {
        None => text(404, format!("there is no page {name:?}; /debug lists them\n")),
        Some((_, _, page)) => match page(state, about, query) {
            Ok(value) => json(200, &value),
            Err(failure) => failure.answer(),
        },
    }
}

/// For browsers.
fn index() -> String {
    let row = |(name, what, _): &(&str, &str, Page)| {
        let what = what.replace('&', "&amp;");
        format!("<tr><td><a href='/debug/{name}'>/debug/{name}</a></td><td>{what}</td></tr>\n")
    };
    let rows: String = PAGES.iter().map(row).collect();
    format!(
        "<html>\n<head><title>Outrigger's debug pages</title></head>\n<body>\n<table id=\"endpoints\">\n\
         <tr><th>Endpoint</th><th>Description</th></tr>\n{rows}</table>\n</body>\n</html>\n"
    )
}

/// Pages over xDS, as `istioctl experimental internal-debug` and agents ask for them: a resource of this type whose name is
/// a page with its query, and whose content is the page (istiod `debuggen.go`).
pub(crate) const TYPE: &str = "istio.io/debug";

/// The page of that name, for [`TYPE`].
pub(crate) fn resource(name: &str, state: &State, about: &About<'_>) -> Result<Vec<u8>, String> {
    let (page, query) = name.split_once('?').unwrap_or((name, ""));
    if about.namespace.is_some() && !OF_NAMESPACE.contains(&page) {
        return Err("it is for the root namespace's service accounts".to_owned());
    }
    let Some((_, _, made)) = PAGES.iter().find(|(other, _, _)| *other == page) else {
        return Err("there is no such page".to_owned());
    };
    match made(state, about, query) {
        Ok(value) => Ok(value.to_string().into_bytes()),
        Err(Failure::Bad(message) | Failure::NotFound(message)) => Err(message),
    }
}

impl Failure {
    fn answer(self) -> Response {
        match self {
            Failure::Bad(message) => text(400, format!("{message}\n")),
            Failure::NotFound(message) => text(404, format!("{message}\n")),
        }
    }
}

/// Requests that do something, and what is said of it.
fn act(name: &str, query: &str, state: &State, about: &About<'_>) -> Option<Result<String, Failure>> {
    match name {
        "cachez" if parameter(query, "clear").is_some() => {
            state.push.memo().clear();
            Some(Ok("Cache cleared\n".to_owned()))
        }
        "adsz" if parameter(query, "push").is_some_and(|value| !value.is_empty()) => {
            // DIFFERS: whoever has what there is gets nothing again.
            Some(Ok(format!("Pushed to {} servers\n", about.statuses.all().len())))
        }
        "force_disconnect" => Some(connection(about, query).map(|(_, node)| {
            about.statuses.disconnect(&node.id);
            "OK".to_owned()
        })),
        _ => None,
    }
}

/// The value of `key` in a query string. Names of proxies need no decoding.
fn parameter<'q>(query: &'q str, key: &str) -> Option<&'q str> {
    query.split('&').filter_map(|pair| pair.split_once('=')).find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// As istiod's `SyncStatus`: per type what was sent, accepted and, ours, refused.
fn syncz(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let (wanted, namespace) = (parameter(query, "proxyID"), parameter(query, "namespace").unwrap_or_default());
    let mut proxies = about.statuses.all();
    let of_namespace = |proxy: &str| proxy.split_once('.').is_some_and(|(_, own)| own == namespace);
    proxies.retain(|proxy| wanted.is_none_or(|wanted| wanted == proxy.proxy));
    proxies.retain(|proxy| namespace.is_empty() || of_namespace(&proxy.proxy));
    proxies.sort_by_cached_key(ProxyStatus::connection_id);
    let rows = proxies.iter().map(|proxy| {
        let mut row = Map::new();
        row.insert("cluster_id".into(), proxy.cluster_id.as_str().into());
        row.insert("proxy".into(), proxy.proxy.as_str().into());
        row.insert("proxy_type".into(), "sidecar".into());
        row.insert("istio_version".into(), proxy.version.as_str().into());
        row.insert("revision".into(), state.revision.into());
        row.insert("synced_to".into(), proxy.synced_to.into());
        let mut resources = Map::new();
        for (url, status) in &proxy.types {
            let kind = kind_of(url);
            row.insert(format!("{kind}_sent"), status.sent_nonce.as_str().into());
            row.insert(format!("{kind}_acked"), status.acked_nonce.as_str().into());
            let at = registry::time(i64::try_from(status.sent_at).unwrap_or_default());
            let mut resource = json!({"sent": status.sent_nonce, "acked": status.acked_nonce, "sentTime": at});
            if let Some(error) = &status.nacked {
                row.insert(format!("{kind}_nacked"), error.as_str().into());
                resource["lastError"] = error.as_str().into();
            }
            resources.insert(url.to_string(), resource);
        }
        row.insert("resources".into(), Value::Object(resources));
        Value::Object(row)
    });
    Ok(rows.collect())
}

fn kind_of(url: &str) -> &str {
    match short(url) {
        "cds" => "cluster",
        "eds" => "endpoint",
        "lds" => "listener",
        "rds" => "route",
        "ecds" => "extensionconfig",
        other => other,
    }
}

/// As istiod's `SyncedVersions`; our nonces begin with the revision that was accepted.
fn config_distribution(_: &State, about: &About<'_>, _: &str) -> Result<Value, Failure> {
    let rows = about.statuses.all().into_iter().map(|proxy| {
        let mut row = Map::new();
        row.insert("proxy".into(), proxy.proxy.as_str().into());
        for (url, status) in &proxy.types {
            let version = status.acked_nonce.split('-').next().unwrap_or_default();
            row.insert(format!("{}_acked", kind_of(url)), version.into());
        }
        Value::Object(row)
    });
    Ok(rows.collect())
}

/// As istiod's, which is Envoy's `/config_dump` with names in camel case, so that `istioctl proxy-config -f` reads it.
fn config_dump(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let Some(types) = parameter(query, "types").filter(|types| !types.is_empty()) else {
        return dump::whole(state, about, query);
    };
    let types: Vec<&str> = types.split(',').filter_map(dump::long).collect();
    dump::of_types(state, about, query, &types)
}

fn ndsz(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    dump::of_types(state, about, query, &[type_url::NAME_TABLE])
}

/// istiod's clusters by secret; here there is one.
fn clusterz(state: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
    Ok(json!([{"id": &*state.push.settings.cluster_id, "secretName": "", "syncStatus": "synced"}]))
}

fn inject_templates(_: &State, about: &About<'_>, _: &str) -> Result<Value, Failure> {
    let config = about.injector.as_ref();
    let config = config.ok_or_else(|| Failure::NotFound("this control plane does not inject".to_owned()))?;
    Ok(json!(config.template_sources()))
}

fn pushcontext(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let policies = objects::authorizationz(state, about, query)?["authorization_policies"].take();
    let networks = state.push.registry.networks();
    Ok(json!({"AuthorizationPolicies": policies, "NetworkGateways": gateways(&networks.gateways),
        "UnresolvedGateways": gateways(&networks.unresolved)}))
}

/// As Go writes istiod's `NetworkGateway`.
fn gateways(gateways: &Gateways) -> Value {
    let row = |gateway: &NetworkGateway| {
        json!({"Network": &*gateway.network, "Cluster": &*gateway.cluster, "Addr": &*gateway.address,
            "Port": gateway.port, "HBONEPort": gateway.hbone_port,
            "ServiceAccount": {"Namespace": "", "Name": ""}})
    };
    gateways.all().into_iter().map(row).collect()
}

/// The proxy that is asked about, as its pod says.
fn connected(state: &State, about: &About<'_>, query: &str) -> Result<Arc<Node>, Failure> {
    let (_, node) = connection(about, query)?;
    Ok(state.push.effective(&node).map_or(node, Arc::new))
}

/// The proxy that is asked about, if the caller may see it.
fn connection(about: &About<'_>, query: &str) -> Result<(ProxyStatus, Arc<Node>), Failure> {
    let proxy = parameter(query, "proxyID").filter(|proxy| !proxy.is_empty());
    let proxy = proxy.ok_or("You must provide a proxyID in the query string: ?proxyID=NAME.NAMESPACE")?;
    let found = about.statuses.find(proxy).and_then(|status| {
        let node = about.statuses.node(status.connection)?;
        about.namespace.is_none_or(|own| *node.namespace == *own).then_some((status, node))
    });
    found.ok_or_else(|| {
        Failure::NotFound(format!("no proxy {proxy:?} is connected to this control plane; it may be to another"))
    })
}

/// As istiod's `AdsClients`, with what each type's last response was.
fn adsz(_: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let proxies = match parameter(query, "proxyID").filter(|proxy| !proxy.is_empty()) {
        None => about.statuses.all(),
        Some(_) => vec![connection(about, query)?.0],
    };
    let row = |proxy: ProxyStatus| {
        let node = about.statuses.node(proxy.connection);
        let watched = about.statuses.watched(proxy.connection);
        let watches = watched
            .iter()
            .map(|(url, names)| (url.to_string(), names.iter().map(|name| Value::from(&**name)).collect::<Value>()));
        let mut row = client(&proxy);
        row["watches"] = Value::Object(watches.collect());
        row["types"] = json!(proxy.types);
        if let Some(node) = node {
            row["labels"] = json!(node.labels);
            row["metadata"] = json!(node.metadata);
            row["metadata"]["LABELS"] = json!(node.labels);
            let parts = [("region", &node.locality.region), ("zone", &node.locality.zone)];
            let parts = parts.into_iter().chain([("sub_zone", &node.locality.subzone)]);
            let parts = parts.filter(|(_, part)| !part.is_empty());
            row["locality"] = Value::Object(parts.map(|(key, part)| (key.to_owned(), (&**part).into())).collect());
        }
        row
    };
    Ok(json!({"totalClients": proxies.len(), "clients": proxies.into_iter().map(row).collect::<Value>()}))
}

fn client(proxy: &ProxyStatus) -> Value {
    json!({"connectionId": proxy.connection_id(),
        "connectedAt": registry::time(i64::try_from(proxy.connected_at).unwrap_or_default()),
        "address": proxy.address, "identity": proxy.identity})
}

fn connections(_: &State, about: &About<'_>, _: &str) -> Result<Value, Failure> {
    let proxies = about.statuses.all();
    Ok(json!({"totalClients": proxies.len(), "clients": proxies.iter().map(client).collect::<Value>()}))
}

/// `NAME.NAMESPACE` and what it serves.
fn instancesz(state: &State, about: &About<'_>, _: &str) -> Result<Value, Failure> {
    let rows = about.statuses.all().into_iter().filter_map(|proxy| {
        let node = about.statuses.node(proxy.connection)?;
        let targets = state.push.registry.targets(&node.query(&state.push.settings.cluster_id));
        let targets = targets.iter().map(|target| registry::target(state, target));
        Some((proxy.proxy, targets.collect()))
    });
    Ok(Value::Object(rows.collect()))
}

fn mesh(state: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
    serde_json::to_value(&*state.mesh).map_err(|error| Failure::Bad(error.to_string()))
}

/// As istiod's: what each of its gauges counts.
fn push_status(state: &State, about: &About<'_>, _: &str) -> Result<Value, Failure> {
    Ok(PushStatus::of(state, &about.statuses.nodes()).to_json())
}

fn sidecarz(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let node = connected(state, about, query)?;
    Ok(registry::scope(state, &state.push.scope(&node)))
}
