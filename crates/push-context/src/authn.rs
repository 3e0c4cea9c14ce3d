//! Which ports take mutual TLS: PeerAuthentication.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use config_store::{Body, Kind, Snapshot};
use istio_api::PeerAuthentication;
use istio_api::peer_authentication::{MutualTls, MutualTlsMode};
use mesh_types::{ArcStr, Labels, selects};

use crate::rules::ByNamespace;
use crate::{Config, PushContext};

/// What a port accepts.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum MtlsMode {
    /// Plain text only.
    Disable,
    /// Both.
    Permissive,
    /// Mutual TLS only.
    Strict,
}

fn mode(mtls: Option<&MutualTls>) -> Option<MtlsMode> {
    match mtls?.mode {
        MutualTlsMode::Unset => None,
        MutualTlsMode::Disable => Some(MtlsMode::Disable),
        MutualTlsMode::Permissive => Some(MtlsMode::Permissive),
        MutualTlsMode::Strict => Some(MtlsMode::Strict),
    }
}

/// The PeerAuthentication of one workload, merged.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct PeerPolicy {
    /// Of every port.
    pub mode: MtlsMode,
    /// Except these.
    pub ports: BTreeMap<u16, MtlsMode>,
}

impl PeerPolicy {
    /// What one port of the workload accepts.
    pub fn for_port(&self, port: u16) -> MtlsMode {
        self.ports.get(&port).copied().unwrap_or(self.mode)
    }
}

fn has_selector(config: &Config<PeerAuthentication>) -> bool {
    config.spec.selector.as_ref().is_some_and(|s| !s.match_labels.is_empty())
}

/// All PeerAuthentications; of several without selector in one namespace only the oldest.
fn peer_authentications(snapshot: &Snapshot) -> ByNamespace<PeerAuthentication> {
    let mut all = crate::config::by_namespace(snapshot, Kind::PeerAuthentication, |body| match body {
        Body::PeerAuthentication(spec) => Some((**spec).clone()),
        _ => None,
    });
    for list in all.values_mut() {
        let mut seen = false;
        list.retain(|config| has_selector(config) || !std::mem::replace(&mut seen, true));
    }
    all
}

/// Mode of whole namespaces, as clients guess it (istiod `AuthenticationPolicies`).
#[derive(Debug, Default)]
struct NamespaceModes {
    global: Option<MtlsMode>,
    namespaces: HashMap<ArcStr, MtlsMode>,
}

impl NamespaceModes {
    fn build(all: &ByNamespace<PeerAuthentication>, root: &ArcStr) -> NamespaceModes {
        let wide = |list: &Vec<Arc<Config<PeerAuthentication>>>| list.iter().find(|c| !has_selector(c)).cloned();
        let global =
            all.get(root).and_then(wide).map(|config| mode(config.spec.mtls.as_ref()).unwrap_or(MtlsMode::Permissive));
        let inherited = global.unwrap_or(MtlsMode::Permissive);
        let namespaces = all
            .iter()
            .filter(|(namespace, _)| *namespace != root)
            .filter_map(|(namespace, list)| {
                Some((namespace.clone(), mode(wide(list)?.spec.mtls.as_ref()).unwrap_or(inherited)))
            })
            .collect();
        NamespaceModes { global, namespaces }
    }
}

/// All PeerAuthentications, indexed.
#[derive(Debug, Default)]
pub struct PeerRules {
    all: ByNamespace<PeerAuthentication>,
    modes: NamespaceModes,
}

impl PeerRules {
    pub(crate) fn build(snapshot: &Snapshot, root: &ArcStr) -> PeerRules {
        let all = peer_authentications(snapshot);
        PeerRules { modes: NamespaceModes::build(&all, root), all }
    }
}

impl PushContext {
    /// The mode of a namespace's workloads that no selector singles out; `None` when nothing is configured.
    pub fn namespace_mtls_mode(&self, namespace: &str) -> Option<MtlsMode> {
        let modes = &self.rules.peers.modes;
        modes.namespaces.get(namespace).copied().or(modes.global)
    }

    /// What a workload's ports accept (istiod `ComposePeerAuthentication`): mesh, namespace, workload, port.
    pub fn peer_policy(&self, namespace: &str, labels: &Labels) -> PeerPolicy {
        let (mut mesh, mut own, mut workload) = (None, None, None);
        for config in self.for_workload(&self.rules.peers.all, namespace, false) {
            if !has_selector(config) {
                let slot = if config.namespace == self.root_namespace { &mut mesh } else { &mut own };
                slot.get_or_insert(config);
            } else if config.namespace != self.root_namespace
                && config.spec.selector.as_ref().is_some_and(|s| selects(&s.match_labels, labels))
            {
                workload.get_or_insert(config);
            }
        }
        let of = |config: Option<&Arc<Config<PeerAuthentication>>>| mode(config?.spec.mtls.as_ref());
        let effective = of(workload).or_else(|| of(own)).or_else(|| of(mesh)).unwrap_or(MtlsMode::Permissive);
        let ports = workload
            .iter()
            .flat_map(|config| &config.spec.port_level_mtls)
            .filter_map(|(port, mtls)| Some((u16::try_from(*port).ok()?, mode(Some(mtls)).unwrap_or(effective))));
        PeerPolicy { mode: effective, ports: ports.collect() }
    }
}
