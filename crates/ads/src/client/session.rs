//! The client's side of one stream and what it remembers across streams. No I/O, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use envoy_api::Message;
use envoy_api::pb::envoy::config::core::v3::Node;
use envoy_api::pb::envoy::service::discovery::v3 as discovery;
use envoy_api::pb::google::rpc;
use mesh_types::ArcStr;

use super::{Problem, Rejected, Update, Wanted};
use crate::{Protocol, is_wildcard_type, rank};

/// `google.rpc.Code.INTERNAL`, which Envoy puts into its NACKs.
const INTERNAL: i32 = 13;

/// Resources may be wrapped, which gives them a name and a version of their own.
const WRAPPED: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";

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
    /// What cannot be understood at all: then nothing of the response is used.
    pub(super) unreadable: Vec<(ArcStr, String)>,
    /// How long resources may be used from now on; `None`: for ever.
    pub(super) leases: Vec<(ArcStr, Option<Duration>)>,
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
        let mut received = Received {
            type_url: ArcStr::from(response.type_url),
            updated: Vec::with_capacity(response.resources.len()),
            removed: response.removed_resources.into_iter().map(ArcStr::from).collect(),
            unreadable: Vec::new(),
            leases: Vec::new(),
            nonce: response.nonce,
            version: response.system_version_info,
        };
        let mut names = BTreeSet::new();
        for resource in response.resources {
            // Which one holds nobody can say (Envoy `WatchMap`, "duplicate name").
            let again = !names.insert(resource.name.clone());
            if again || received.removed.iter().any(|removed| **removed == *resource.name) {
                let name = ArcStr::from(resource.name.as_str());
                received.unreadable.push((name, "it is there twice".to_owned()));
            }
            received.take(resource);
        }
        received
    }

    /// Unpacks a state-of-the-world response. `name_of` reads a resource's name out of its body, as this flavour carries none.
    pub(super) fn on_sotw(
        &mut self,
        response: discovery::DiscoveryResponse,
        name_of: impl Fn(&str, &[u8]) -> Option<ArcStr>,
    ) -> Received {
        let mut received = Received {
            type_url: ArcStr::from(response.type_url),
            updated: Vec::with_capacity(response.resources.len()),
            removed: Vec::new(),
            unreadable: Vec::new(),
            leases: Vec::new(),
            nonce: response.nonce,
            version: response.version_info,
        };
        for any in response.resources {
            let mut resource = if any.type_url == WRAPPED {
                match discovery::Resource::decode(&any.value[..]) {
                    Ok(resource) => resource,
                    Err(e) => {
                        received.unreadable.push((ArcStr::from(""), format!("malformed: {e}")));
                        continue;
                    }
                }
            } else {
                discovery::Resource { resource: Some(any), ..Default::default() }
            };
            if resource.version.is_empty() {
                resource.version.clone_from(&received.version);
            }
            if let (true, Some(any)) = (resource.name.is_empty(), &resource.resource) {
                // Resources without a name of their own (the name table) come alone.
                match name_of(&received.type_url, &any.value) {
                    Some(name) => resource.name = name.to_string(),
                    None if !is_named(&received.type_url) => {}
                    None => {
                        received
                            .unreadable
                            .push((ArcStr::from(""), "malformed: it has no name that can be read".into()));
                        continue;
                    }
                }
            }
            received.take(resource);
        }
        if is_wildcard_type(&received.type_url) {
            let present: BTreeSet<&ArcStr> = received.leases.iter().map(|(name, _)| name).collect();
            let known =
                self.types.get(&(rank(&received.type_url), received.type_url.clone())).map(|kind| &kind.versions);
            let gone = known.into_iter().flat_map(|known| known.keys()).filter(|name| !present.contains(name));
            received.removed = gone.cloned().collect();
        }
        received
    }

    /// The time of a resource is over, and nobody said that it may be used any longer.
    pub(super) fn on_expired(&mut self, type_url: &ArcStr, name: &ArcStr) {
        if let Some(kind) = self.types.get_mut(&(rank(type_url), type_url.clone())) {
            kind.versions.remove(name);
        }
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
            code: INTERNAL,
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

impl Seen {
    /// The version of the response as a whole.
    pub(super) fn version(&self) -> &str {
        &self.version
    }
}

impl Received {
    fn take(&mut self, resource: discovery::Resource) {
        let name = ArcStr::from(resource.name);
        let ttl = resource.ttl.map(|ttl| {
            Duration::from_secs(u64::try_from(ttl.seconds).unwrap_or(0))
                + Duration::from_nanos(u64::try_from(ttl.nanos).unwrap_or(0))
        });
        match resource.resource {
            Some(any) if any.type_url != *self.type_url => {
                self.unreadable.push((name, format!("it is of the type {:?}", any.type_url)));
            }
            Some(any) => {
                let version = ArcStr::from(resource.version);
                self.leases.push((name.clone(), ttl));
                self.updated.push(Update { name, version, body: Bytes::from(any.value) });
            }
            // A heartbeat: what is known may be used for so much longer.
            None => self.leases.push((name, ttl)),
        }
    }

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

/// Whether resources of a type have names.
fn is_named(of: &str) -> bool {
    of != envoy_api::type_url::NAME_TABLE
}

#[cfg(test)]
mod tests;
