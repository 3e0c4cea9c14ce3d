//! The control plane as the cluster uses it: in this process, on the bridge's address.

mod identity;
mod workload;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ca::{Authority, TokenIssuer};
use config_store::{Key, Kind};
use control_plane::{Handle, Listeners, Settings, Update};
use inject::{NativeSidecars, Outcome, Owner, Request};
use lifecycle::drain::{self, Trigger};
use manifest::Document;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::args::PilotEnv;
use crate::ask::{Distribution, ProxySync};
use crate::network::Network;
use crate::objects::{Id, NamespaceMeta};
use crate::pod::volumes::Tokens;
use identity::PodTokens;

/// Trust domain of the mesh, unless its mesh config names another one.
const TRUST_DOMAIN: &str = "cluster.local";
const ROOT_NAMESPACE: &str = "istio-system";
/// Ports of the control plane, as istiod's: plain xDS, xDS and CA over TLS, monitoring, webhooks.
const PORTS: [(&str, u16); 4] =
    [("grpc-xds", 15010), ("https-dns", 15012), ("http-monitoring", 15014), ("https-webhook", 15017)];

/// A step of replacing the CA's root.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rotation {
    /// A new root is made and trusted beside the old one.
    Announce,
    /// It signs.
    Activate,
}

/// A change for the control plane.
pub(crate) enum Change {
    Apply(Box<Document>),
    Delete(Id),
}

/// What an update led to.
pub(crate) struct Updated {
    pub(crate) revision: u64,
    pub(crate) rejected: Vec<String>,
}

/// What injection did.
pub(crate) enum Injected {
    /// The pod with its sidecar, and what the user should know.
    Pod(Box<Value>, Vec<String>),
    Skipped,
}

/// A connected sidecar.
#[derive(Clone, Debug)]
pub(crate) struct ProxyState {
    pub(crate) pod: String,
    pub(crate) namespace: String,
    /// Has everything it was sent, and rejected nothing.
    pub(crate) synced: bool,
    pub(crate) trouble: Option<String>,
}

/// Waits until all sidecars have what the control plane sent.
#[derive(Clone)]
pub(crate) struct SyncWatch(Handle);

impl SyncWatch {
    /// Waits for one revision; returns how many sidecars are connected.
    pub(crate) async fn wait(&self, revision: u64, patience: Duration) -> Result<usize, String> {
        self.0.wait(revision, patience).await.map_err(|laggards| laggards.to_string())?;
        Ok(self.0.sync_status().len())
    }

    /// How far changes got: of one object (kind, namespace, name) or of all.
    pub(crate) fn distribution(&self, object: Option<&(String, String, String)>) -> Result<Distribution, String> {
        let state = self.0.state();
        if let Some((kind, namespace, name)) = object {
            let known = Kind::ALL.iter().find(|known| known.as_str() == kind);
            let kind = known.ok_or_else(|| format!("no sidecar has anything of a {kind}"))?;
            let key = Key::new(*kind, namespace, name);
            state.snapshot.get(&key).ok_or_else(|| format!("there is no {key}"))?;
        }
        // The revision that is out now holds the object's last change; an earlier one might do, but never a later one.
        let wanted = state.revision;
        let proxy = |status: control_plane::ProxyStatus| ProxySync {
            nacks: status
                .refusals()
                .map(|(kind, why)| format!("{}: {why}", kind.rsplit('.').next().unwrap_or(kind)))
                .collect(),
            types: status
                .types
                .iter()
                .filter_map(|(url, status)| Some((short(url)?.to_owned(), word(status))))
                .collect(),
            cluster: status.cluster_id,
            version: status.version,
            proxy: status.proxy,
            synced_to: status.synced_to,
        };
        Ok(Distribution { wanted, proxies: self.0.sync_status().into_iter().map(proxy).collect() })
    }

    /// Waits for the latest revision.
    pub(crate) async fn wait_latest(&self, patience: Duration) -> Result<usize, String> {
        self.wait(self.0.state().revision, patience).await
    }
}

/// Control plane, CA and injection of one mesh.
pub(crate) struct Plane {
    authority: Arc<Authority>,
    tokens: Arc<PodTokens>,
    trust_domain: String,
    /// TLS of published ports; another one when the CA's root is replaced.
    gateway: watch::Sender<Arc<rustls::ClientConfig>>,
    handle: Handle,
    injection: inject::Config,
    /// Dropping it would leave the control plane without anybody to end it; it ends with `up`.
    _shutdown: Trigger,
}

impl Plane {
    /// Starts the control plane on the bridge's address. A ConfigMap `istio` among the documents is the mesh config.
    pub(crate) async fn start(
        network: &Network,
        documents: &[Document],
        templates: &inject::Files,
        environment: &[PilotEnv],
    ) -> anyhow::Result<Self> {
        let mut mesh = mesh_config(documents)?;
        let mut settings = Settings::default();
        for variable in environment {
            settings.push.set_env(&variable.name, &variable.value);
        }
        if network.dual_stack() {
            settings.push.dual_stack = true;
            // As Istio's dual-stack instructions: the agents and the capture learn it from their environment.
            let metadata = mesh
                .as_object_mut()
                .map(|mesh| mesh.entry("defaultConfig").or_insert_with(|| json!({})))
                .and_then(|config| Some(config.as_object_mut()?.entry("proxyMetadata").or_insert_with(|| json!({}))))
                .and_then(Value::as_object_mut)
                .context("defaultConfig.proxyMetadata of the mesh config is no object")?;
            metadata.entry("ISTIO_DUAL_STACK").or_insert_with(|| json!("true"));
        }
        let trust_domain = mesh.get("trustDomain").and_then(Value::as_str).unwrap_or(TRUST_DOMAIN).to_owned();
        let authority = Arc::new(Authority::generate(&trust_domain)?);
        let issuer = TokenIssuer::generate()?;
        let verifier = issuer.verifier();
        let [grpc, grpc_tls, monitoring, webhook] = PORTS.map(|(_, port)| network.listen(port));
        let listeners = Listeners { grpc: grpc?, grpc_tls: grpc_tls?, webhook: webhook?, monitoring: monitoring? };
        let (shutdown, watch) = drain::channel();
        // The mesh config itself reaches the control plane with the other documents.
        let handle = control_plane::serve(settings, listeners, Arc::clone(&authority), verifier, watch).await?;
        let mut injection = inject::Config::load(templates).context("injection")?;
        injection.set_mesh(&mesh).context("mesh configuration")?;
        // The pods' keeper runs native sidecars, so applications start after their proxy and jobs end; as istiod decides from Kubernetes 1.33 on.
        injection.native = NativeSidecars::On;
        let gateway = identity::gateway(&authority, &trust_domain).context("make the gateway's certificate")?;
        Ok(Self {
            gateway: watch::Sender::new(gateway),
            authority,
            tokens: Arc::new(PodTokens(issuer)),
            trust_domain,
            handle,
            injection,
            _shutdown: shutdown,
        })
    }

    /// What the cluster has besides the user's objects: the control plane's own service.
    pub(crate) fn own_documents(network: &Network) -> Vec<Document> {
        let ports = |field: &str| {
            PORTS.map(|(name, port)| json!({"name": name, "port": port, field: port, "protocol": "TCP"})).to_vec()
        };
        let endpoints: Vec<Value> =
            PORTS.map(|(name, port)| json!({"name": name, "port": port, "protocol": "TCP"})).to_vec();
        [
            json!({
                "apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": ROOT_NAMESPACE, "labels": {"kubernetes.io/metadata.name": ROOT_NAMESPACE}},
            }),
            json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {"name": "istiod", "namespace": ROOT_NAMESPACE, "labels": {"app": "istiod"}},
                "spec": {"ports": ports("targetPort")},
            }),
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": "istiod-outrigger", "namespace": ROOT_NAMESPACE,
                    "labels": {"kubernetes.io/service-name": "istiod"},
                },
                "addressType": "IPv4",
                "endpoints": [{"addresses": [network.gateway().to_string()], "conditions": {"ready": true}}],
                "ports": endpoints,
            }),
        ]
        .into_iter()
        .map(|value| Document::from_value(value, "<cluster>"))
        .collect()
    }

    pub(crate) fn sync_watch(&self) -> SyncWatch {
        SyncWatch(self.handle.clone())
    }

    /// TLS for published ports.
    pub(crate) fn gateway_tls(&self) -> watch::Receiver<Arc<rustls::ClientConfig>> {
        self.gateway.subscribe()
    }

    /// One step of replacing the CA's root: first it is to be trusted, then it signs.
    pub(crate) fn rotate_root(&self, step: Rotation) -> Result<(), String> {
        match step {
            Rotation::Announce => self.authority.rotate(&self.trust_domain).map_err(|error| error.to_string())?,
            Rotation::Activate => {
                if !self.authority.activate() {
                    return Err("no new root was announced".to_owned());
                }
            }
        }
        let gateway = identity::gateway(&self.authority, &self.trust_domain).map_err(|error| format!("{error:#}"))?;
        self.gateway.send_replace(gateway);
        Ok(())
    }

    pub(crate) fn tokens(&self) -> Arc<dyn Tokens> {
        Arc::clone(&self.tokens) as Arc<dyn Tokens>
    }

    /// The root certificates that workloads trust.
    pub(crate) fn root_pem(&self) -> String {
        self.authority.trust_bundle()
    }

    /// Injects a pod, if its namespace and itself want that.
    pub(crate) fn inject(&self, pod: &Value, namespace: &str, meta: &NamespaceMeta) -> Result<Injected, String> {
        let namespace = inject::NamespaceMeta {
            name: namespace.to_owned(),
            labels: meta.labels.clone(),
            annotations: meta.annotations.clone(),
        };
        let owner = Owner::of_pod(pod);
        match inject::inject(&Request::new(pod, &owner, &namespace).selecting(), &self.injection) {
            Ok(Outcome::Injected { pod, warnings, .. }) => Ok(Injected::Pod(Box::new(pod), warnings)),
            Ok(Outcome::Skipped { .. }) => Ok(Injected::Skipped),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Passes changes on as one snapshot.
    pub(crate) async fn update(&self, changes: Vec<Change>) -> Updated {
        let updates = changes
            .into_iter()
            .filter_map(|change| match change {
                Change::Apply(document) => Kind::of(document.group(), document.kind()).map(|_| Update::Apply(document)),
                Change::Delete(id) => {
                    let kind = Kind::ALL.iter().find(|kind| kind.as_str() == id.kind)?;
                    Some(Update::Delete(Key::new(*kind, &id.namespace, &id.name)))
                }
            })
            .collect();
        let (revision, rejected) = self.handle.update(updates).await;
        Updated { revision, rejected: rejected.iter().map(ToString::to_string).collect() }
    }

    /// The connected sidecars.
    pub(crate) fn proxies(&self) -> Vec<ProxyState> {
        self.handle
            .sync_status()
            .into_iter()
            .map(|status| {
                let (pod, namespace) = status.proxy.rsplit_once('.').unwrap_or((&status.proxy, ""));
                let trouble = status.refusals().next().map(|(kind, why)| format!("refuses {kind}: {why}"));
                ProxyState {
                    pod: pod.to_owned(),
                    namespace: namespace.to_owned(),
                    synced: trouble.is_none() && status.types.values().all(|kind| kind.sent_nonce == kind.acked_nonce),
                    trouble,
                }
            })
            .collect()
    }
}

/// istioctl's name of a type that it lists.
fn short(type_url: &str) -> Option<&'static str> {
    Some(match type_url.rsplit('.').next()? {
        "Cluster" => "CDS",
        "Listener" => "LDS",
        "ClusterLoadAssignment" => "EDS",
        "RouteConfiguration" => "RDS",
        "TypedExtensionConfig" => "ECDS",
        _ => return None,
    })
}

/// How far a type is, as istioctl says it (`xdsStatus`); refusals are ours.
fn word(status: &control_plane::TypeStatus) -> String {
    let word = match (status.sent_nonce.as_str(), status.acked_nonce.as_str()) {
        _ if status.nacked.is_some() => "NACKED",
        ("", _) => "NOT SENT",
        (sent, acked) if sent == acked => "SYNCED",
        (_, "") => "STALE (Never Acknowledged)",
        _ => "STALE",
    };
    word.to_owned()
}

/// The mesh config that the user's YAML brings along, as Istio's installation does: ConfigMap `istio` in the root namespace.
fn mesh_config(documents: &[Document]) -> anyhow::Result<Value> {
    let map = documents.iter().find(|document| {
        document.kind() == "ConfigMap" && document.name() == "istio" && document.namespace() == Some(ROOT_NAMESPACE)
    });
    let Some(map) = map else { return Ok(json!({})) };
    let text = map.value.pointer("/data/mesh").and_then(Value::as_str).unwrap_or_default();
    let parsed = manifest::parse_plain(map.file(), text).map_err(|error| map.error("data.mesh", error.to_string()))?;
    Ok(parsed.into_iter().next().map_or_else(|| json!({}), |document| document.value))
}

/// Refuses an object that the control plane would refuse.
pub(crate) fn check(document: &Document) -> Result<(), manifest::Error> {
    match config_store::Object::read(document) {
        Ok(_) => Ok(()),
        Err(rejected) => {
            let first = rejected.errors.into_iter().next();
            Err(first.unwrap_or_else(|| document.error("kind", "is refused by the control plane")))
        }
    }
}
