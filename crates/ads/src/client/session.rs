//! The client's side of one stream and what it remembers across streams. No I/O, no clock.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use envoy_api::pb::envoy::config::core::v3::Node;
use envoy_api::pb::envoy::service::discovery::v3 as discovery;
use envoy_api::pb::google::rpc;
use mesh_types::ArcStr;

use super::{Problem, Rejected, Update, Wanted};
use crate::{Protocol, is_wildcard_type, rank};

/// `google.rpc.Code.INVALID_ARGUMENT`, which Envoy puts into its NACKs.
const INVALID_ARGUMENT: i32 = 3;

/// A message to the server.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Request {
    Sotw(discovery::DiscoveryRequest),
    Delta(discovery::DeltaDiscoveryRequest),
}

/// A response, ready for the handler; [`Session::on_verdict`] takes it back with the handler's answer.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) type_url: ArcStr,
    pub(super) updated: Vec<Update>,
    pub(super) removed: Vec<ArcStr>,
    nonce: String,
    version: String,
}

/// Subscriptions as the server knows them, and versions as the handler accepted them.
#[derive(Debug)]
pub(super) struct Session {
    protocol: Protocol,
    node: Node,
    types: BTreeMap<(usize, ArcStr), Type>,
    /// The node has been sent on this stream.
    introduced: bool,
    /// What was said on this stream.
    said: BTreeMap<ArcStr, Option<Problem>>,
}

#[derive(Debug, Default)]
struct Type {
    /// What the server of this stream was told; `None` before the first request.
    told: Option<Wanted>,
    /// Accepted resources and their versions; what a new delta stream starts from.
    versions: BTreeMap<ArcStr, ArcStr>,
    /// SotW: the last accepted version, and the last nonce of this stream.
    version: String,
    nonce: String,
}

impl Session {
    pub(super) fn new(protocol: Protocol, node: Node) -> Session {
        Session { protocol, node, types: BTreeMap::new(), introduced: false, said: BTreeMap::new() }
    }

    /// A new stream is open: the server knows nothing of us.
    pub(super) fn on_connected(&mut self) {
        self.introduced = false;
        self.said.clear();
        for kind in self.types.values_mut() {
            kind.told = None;
            kind.nonce.clear();
        }
    }

    /// The requests that tell the server what is now wanted, in push order.
    pub(super) fn on_wanted(&mut self, wanted: &BTreeMap<ArcStr, Wanted>) -> Vec<Request> {
        let mut changed: Vec<_> =
            wanted.iter().map(|(type_url, wanted)| ((rank(type_url), type_url.clone()), wanted)).collect();
        changed.sort_by(|a, b| a.0.cmp(&b.0));
        let mut requests = Vec::new();
        for (key, wanted) in changed {
            let kind = self.types.entry(key.clone()).or_default();
            if kind.told.as_ref() == Some(wanted) || (kind.told.is_none() && wanted.is_nothing()) {
                continue;
            }
            let before = kind.told.replace(wanted.clone());
            kind.versions.retain(|name, _| wanted.covers(name));
            let node = (!self.introduced).then(|| self.node.clone());
            self.introduced = true;
            requests.push(match self.protocol {
                Protocol::StateOfTheWorld => Request::Sotw(kind.sotw(&key.1, node, None)),
                Protocol::Delta => Request::Delta(kind.delta(&key.1, node, before, wanted)),
            });
        }
        requests
    }

    /// The requests that say what has not been said on this stream. They name no node, so subscriptions go first.
    pub(super) fn on_said(&mut self, said: &BTreeMap<ArcStr, Option<Problem>>) -> Vec<Request> {
        if !self.introduced {
            return Vec::new();
        }
        let news: Vec<_> =
            said.iter().filter(|(type_url, problem)| self.said.get(*type_url) != Some(*problem)).collect();
        let requests = news.iter().map(|(type_url, problem)| {
            let type_url = type_url.to_string();
            let error_detail = problem.as_ref().map(|problem| rpc::Status {
                code: problem.code,
                message: problem.message.clone(),
                details: Vec::new(),
            });
            match self.protocol {
                Protocol::StateOfTheWorld => {
                    Request::Sotw(discovery::DiscoveryRequest { type_url, error_detail, ..Default::default() })
                }
                Protocol::Delta => {
                    Request::Delta(discovery::DeltaDiscoveryRequest { type_url, error_detail, ..Default::default() })
                }
            }
        });
        let requests = requests.collect();
        self.said.clone_from(said);
        requests
    }

    /// Unpacks a delta response.
    pub(super) fn on_delta(&mut self, response: discovery::DeltaDiscoveryResponse) -> Received {
        let update = |r: discovery::Resource| Update {
            name: ArcStr::from(r.name),
            version: ArcStr::from(r.version),
            body: r.resource.map(|any| Bytes::from(any.value)).unwrap_or_default(),
        };
        Received {
            type_url: ArcStr::from(response.type_url),
            updated: response.resources.into_iter().map(update).collect(),
            removed: response.removed_resources.into_iter().map(ArcStr::from).collect(),
            nonce: response.nonce,
            version: String::new(),
        }
    }

    /// Unpacks a state-of-the-world response. `name_of` reads a resource's name out of its body, as this flavour carries none.
    pub(super) fn on_sotw(
        &mut self,
        response: discovery::DiscoveryResponse,
        name_of: impl Fn(&str, &[u8]) -> Option<ArcStr>,
    ) -> Received {
        let type_url = ArcStr::from(response.type_url);
        let version = ArcStr::from(response.version_info.as_str());
        let update = |any: envoy_api::Any| {
            let body = Bytes::from(any.value);
            // Resources without a name of their own (the name table) come alone.
            let name = name_of(&type_url, &body).unwrap_or_else(|| ArcStr::from(""));
            Update { name, version: version.clone(), body }
        };
        let updated: Vec<Update> = response.resources.into_iter().map(update).collect();
        let mut removed = Vec::new();
        if is_wildcard_type(&type_url) {
            let present: BTreeSet<&ArcStr> = updated.iter().map(|u| &u.name).collect();
            let known = self.types.get(&(rank(&type_url), type_url.clone())).map(|kind| &kind.versions);
            removed.extend(
                known.into_iter().flat_map(|known| known.keys()).filter(|name| !present.contains(name)).cloned(),
            );
        }
        Received { type_url, updated, removed, nonce: response.nonce, version: response.version_info }
    }

    /// The ACK or NACK that answers a response, once the handler has seen it. `None`: a type nobody asked for.
    pub(super) fn on_verdict(&mut self, received: &Seen, verdict: Result<(), Rejected>) -> Option<Request> {
        let kind = self.types.get_mut(&(rank(&received.type_url), received.type_url.clone()))?;
        kind.nonce.clone_from(&received.nonce);
        for name in &received.removed {
            kind.versions.remove(name);
        }
        let refused = verdict.as_ref().err();
        for (name, version) in &received.updated {
            if refused.is_none_or(|rejected| !rejected.names(name)) {
                kind.versions.insert(name.clone(), version.clone());
            }
        }
        if refused.is_none() {
            kind.version.clone_from(&received.version);
        }
        let error_detail = verdict.err().map(|rejected| rpc::Status {
            code: INVALID_ARGUMENT,
            message: rejected.to_string(),
            details: Vec::new(),
        });
        Some(match self.protocol {
            Protocol::StateOfTheWorld => Request::Sotw(kind.sotw(&received.type_url, None, error_detail)),
            Protocol::Delta => Request::Delta(discovery::DeltaDiscoveryRequest {
                type_url: received.type_url.to_string(),
                response_nonce: received.nonce.clone(),
                error_detail,
                ..Default::default()
            }),
        })
    }
}

/// What is kept of a response while the handler has its contents.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) type_url: ArcStr,
    updated: Vec<(ArcStr, ArcStr)>,
    removed: Vec<ArcStr>,
    nonce: String,
    version: String,
}

impl Received {
    /// Splits off what the handler gets.
    pub(super) fn hand_over(self) -> (Seen, Vec<Update>, Vec<ArcStr>) {
        let seen = Seen {
            type_url: self.type_url,
            updated: self.updated.iter().map(|u| (u.name.clone(), u.version.clone())).collect(),
            removed: self.removed.clone(),
            nonce: self.nonce,
            version: self.version,
        };
        (seen, self.updated, self.removed)
    }
}

impl Type {
    fn sotw(
        &self,
        type_url: &str,
        node: Option<Node>,
        error_detail: Option<rpc::Status>,
    ) -> discovery::DiscoveryRequest {
        discovery::DiscoveryRequest {
            version_info: self.version.clone(),
            node,
            resource_names: self.told.as_ref().map(Wanted::list).unwrap_or_default(),
            type_url: type_url.to_owned(),
            response_nonce: self.nonce.clone(),
            error_detail,
            ..Default::default()
        }
    }

    fn delta(
        &self,
        type_url: &str,
        node: Option<Node>,
        before: Option<Wanted>,
        wanted: &Wanted,
    ) -> discovery::DeltaDiscoveryRequest {
        let first = before.is_none();
        let before = before.unwrap_or_else(Wanted::nothing);
        let gone = before.without(wanted);
        let mut subscribe = wanted.without(&before);
        if wanted.wildcard && (first || !before.wildcard) {
            // The legacy form, an empty first request, works everywhere as long as no name is asked for beside it.
            let legacy = first && wanted.names.is_empty() && is_wildcard_type(type_url);
            subscribe.extend((!legacy).then(|| "*".to_owned()));
        }
        let mut unsubscribe = gone;
        unsubscribe.extend((before.wildcard && !wanted.wildcard).then(|| "*".to_owned()));
        let versions = self.versions.iter().map(|(name, version)| (name.to_string(), version.to_string()));
        discovery::DeltaDiscoveryRequest {
            node,
            type_url: type_url.to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: if first { versions.collect() } else { Default::default() },
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests;
