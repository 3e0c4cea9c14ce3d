//! One stream's memory of what was asked for, sent, acknowledged. No I/O, no clock.

mod held;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use envoy_api::Resource;
use mesh_types::ArcStr;

use self::held::Held;
use super::Names;
use crate::{Protocol, is_wildcard_type, rank};

/// How many types one stream may watch. Envoy uses about ten.
const MAX_TYPES: usize = 64;
/// The ranks of clusters and of their endpoints, and those of listeners and routes, which refer to clusters.
const CLUSTERS: usize = 0;
const ENDPOINTS: usize = 1;
const REFERRING: std::ops::RangeInclusive<usize> = 2..=3;
/// How many names one stream may subscribe to per type.
const MAX_NAMES: usize = 200_000;

/// A request of either protocol, reduced to what matters.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The type asked for.
    pub type_url: String,
    /// SotW: the names wanted. Delta: the names newly wanted.
    pub names: Vec<String>,
    /// Delta only: the names no longer wanted.
    pub unsubscribe: Vec<String>,
    /// Delta only, on a stream's first request of the type: what the client has from before.
    pub initial_versions: HashMap<String, String>,
    /// The nonce of the response this acknowledges, or empty.
    pub nonce: String,
    /// Why the client refused the response, if it did.
    pub error: Option<String>,
    /// The `google.rpc.Code` of that; 0 without.
    pub code: i32,
}

/// What a request meant.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Heard {
    /// A subscription was opened or changed.
    Subscribed,
    /// The client accepted the response of this nonce.
    Acked { nonce: String },
    /// The client refused the response of this nonce.
    Nacked { nonce: String, error: String },
    /// About a response that a later one replaced.
    Stale,
}

/// A request that no client should make; the stream ends.
#[derive(Debug, thiserror::Error, Eq, PartialEq)]
pub enum BadRequest {
    #[error("a request names no type")]
    NoType,
    #[error("more than {MAX_TYPES} types on one stream")]
    TooManyTypes,
    #[error("more than {MAX_NAMES} names of {type_url}")]
    TooManyNames { type_url: String },
}

/// A response of either protocol.
#[derive(Clone, Debug)]
pub struct Response {
    /// The type of all resources in it.
    pub type_url: ArcStr,
    /// Tells this response from all others of the stream.
    pub nonce: String,
    /// The revision of the snapshot it was made from.
    pub revision: u64,
    /// The resources to carry.
    pub resources: Picked,
    /// Delta only: the names that are gone.
    pub removed: Vec<ArcStr>,
}

/// Some resources of a list that others hold, too.
#[derive(Clone, Debug)]
pub struct Picked {
    list: Arc<[Resource]>,
    /// Places in the list; `None`: all of it.
    places: Option<Vec<u32>>,
}

impl Picked {
    /// The whole list.
    pub fn all(list: Arc<[Resource]>) -> Picked {
        Picked { list, places: None }
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.places.as_ref().map_or(self.list.len(), Vec::len)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One of them, by its number.
    pub fn get(&self, number: usize) -> Option<&Resource> {
        match &self.places {
            None => self.list.get(number),
            Some(places) => self.list.get(*places.get(number)? as usize),
        }
    }

    /// All of them, in the list's order.
    pub fn iter(&self) -> impl Iterator<Item = &Resource> {
        (0..self.len()).filter_map(|number| self.get(number))
    }
}

/// One client's subscriptions and what it has been sent.
///
/// Use: feed requests to [`Session::on_request`] and snapshot changes to [`Session::on_revision`]; then, while
/// [`Session::due`] names a type, fetch that type's resources and hand them to [`Session::evaluate`].
#[derive(Debug)]
pub struct Session {
    protocol: Protocol,
    /// Keyed by rank first, so that iteration is push order.
    watches: BTreeMap<(usize, ArcStr), Watch>,
    nonces: u64,
    revision: u64,
    reported_synced: Option<u64>,
    /// Listeners and routes no longer wait for the clusters' acknowledgement.
    gate_lifted: bool,
}

#[derive(Debug, Default)]
struct Watch {
    wildcard: bool,
    /// The names asked for: sorted, each once.
    names: Vec<ArcStr>,
    /// SotW only: it has asked by names, so that an empty list means none and no longer all.
    ///
    /// Source: Envoy protocol description, "How the client specifies what resources to return".
    named: bool,
    /// Names have come since the last evaluation.
    new_names: bool,
    held: Held,
    /// The client must get an answer even if nothing differs.
    owed: bool,
    /// The client asked or the snapshot changed since the last evaluation.
    due: bool,
    /// SotW only: the type this one depends on was pushed, so that an unchanged request asks again.
    ///
    /// As istiod, `pilot/pkg/xds/ads.go`, `AlwaysRespond`: an Envoy that replaces a cluster waits for endpoints
    /// even if it had them.
    asks_again: bool,
    nonce: String,
    /// The client has neither accepted nor refused the last response yet.
    outstanding: bool,
    acked: bool,
    /// Names that are gone but were kept back, because others may still refer to them.
    keeps_back: bool,
    evaluated: u64,
}

impl Session {
    /// A stream that has just been opened, against a snapshot of this revision.
    pub fn new(protocol: Protocol, revision: u64) -> Session {
        Session { protocol, watches: BTreeMap::new(), nonces: 0, revision, reported_synced: None, gate_lifted: false }
    }

    /// Takes in a request. The types then due are to be evaluated.
    pub fn on_request(&mut self, request: Request) -> Result<Heard, BadRequest> {
        if request.type_url.is_empty() {
            return Err(BadRequest::NoType);
        }
        let key = (rank(&request.type_url), ArcStr::from(request.type_url.as_str()));
        if !self.watches.contains_key(&key) && self.watches.len() >= MAX_TYPES {
            return Err(BadRequest::TooManyTypes);
        }
        let first = !self.watches.contains_key(&key);
        if first && request.error.is_some() {
            return Ok(Heard::Stale);
        }
        let watch = self.watches.entry(key).or_default();
        let heard = match self.protocol {
            Protocol::StateOfTheWorld => watch.on_sotw(request, first),
            Protocol::Delta => watch.on_delta(request, first),
        }?;
        if matches!(heard, Heard::Acked { .. } | Heard::Nacked { .. }) {
            watch.outstanding = false;
        }
        self.release_removals();
        Ok(heard)
    }

    /// Once everything that may refer to them is in use, what is gone may go. A client that refused its routes still uses the
    /// old ones, and keeps what these need.
    fn release_removals(&mut self) {
        if !self.is_unsettled() {
            for watch in self.watches.values_mut().filter(|watch| watch.keeps_back) {
                watch.due = true;
            }
        }
    }

    fn is_unsettled(&self) -> bool {
        self.watches.iter().any(|((rank, _), watch)| REFERRING.contains(rank) && (watch.due || !watch.acked))
    }

    /// The types that the client watches and the names that it asks for; none where it wants all.
    pub fn watched(&self) -> Vec<(ArcStr, Vec<ArcStr>)> {
        self.watches.iter().map(|((_, type_url), watch)| (type_url.clone(), watch.names.clone())).collect()
    }

    /// A new snapshot is there: every watched type is due.
    pub fn on_revision(&mut self, revision: u64) {
        self.revision = revision;
        for watch in self.watches.values_mut() {
            watch.due = true;
        }
    }

    /// The first type, in push order, that is to be evaluated, and the names to ask the source for.
    ///
    /// Listeners and routes wait until the client has answered for its clusters: by then it has subscribed to the endpoints of
    /// new ones, which go first, so that no route leads to a cluster that is not there yet. DIFFERS: istiod sends all at once, and
    /// a route switched at the same time as its cluster fails requests for a moment.
    pub fn due(&self) -> Option<(ArcStr, Names<'_>)> {
        let gated = self.is_gated();
        let mut due = self.watches.iter().filter(|(_, watch)| watch.due);
        let ((_, type_url), watch) = due.find(|((rank, _), _)| !gated || !REFERRING.contains(rank))?;
        let names = if watch.wildcard { Names::Wildcard } else { Names::List(&watch.names) };
        Some((type_url.clone(), names))
    }

    /// Whether something is due that waits for an acknowledgement only.
    pub fn is_waiting(&self) -> bool {
        self.is_gated() && self.watches.iter().any(|((rank, _), watch)| watch.due && REFERRING.contains(rank))
    }

    /// Stops waiting for a client that does not acknowledge.
    pub fn lift_gate(&mut self) {
        self.gate_lifted = true;
    }

    fn is_gated(&self) -> bool {
        !self.gate_lifted && self.watches.iter().any(|((rank, _), watch)| *rank == CLUSTERS && watch.outstanding)
    }

    /// Compares what the source has with what the client has; `None` if the client needs nothing.
    pub fn evaluate(&mut self, type_url: &str, resources: Arc<[Resource]>) -> Option<Response> {
        let key = (rank(type_url), ArcStr::from(type_url));
        let response = self.compare(&key, resources);
        // Without a response there will be no acknowledgement to release on.
        self.release_removals();
        response
    }

    fn compare(&mut self, key: &(usize, ArcStr), resources: Arc<[Resource]>) -> Option<Response> {
        let revision = self.revision;
        let keep_back = key.0 < *REFERRING.start() && self.is_unsettled();
        let watch = self.watches.get_mut(key)?;
        watch.due = false;
        watch.evaluated = revision;
        let (resources, removed) = match self.protocol {
            Protocol::StateOfTheWorld => watch.evaluate_sotw(is_wildcard_type(&key.1), resources)?,
            Protocol::Delta => watch.evaluate_delta(resources, keep_back)?,
        };
        self.nonces += 1;
        watch.owed = false;
        watch.acked = false;
        watch.outstanding = true;
        if key.0 == CLUSTERS {
            self.gate_lifted = false;
        }
        watch.nonce = format!("{revision}-{}", self.nonces);
        let nonce = watch.nonce.clone();
        if self.protocol == Protocol::Delta && key.0 == CLUSTERS {
            self.replace_endpoints(&resources);
        }
        if self.protocol == Protocol::StateOfTheWorld {
            // Clusters are rank 0 and their endpoints 1; listeners 2 and their routes 3.
            if let Some(dependent) =
                [(0, 1), (2, 3)].iter().find(|(of, _)| *of == key.0).map(|(_, dependent)| *dependent)
            {
                let dependents = self.watches.iter_mut().filter(|((rank, _), _)| *rank == dependent);
                dependents.for_each(|(_, watch)| watch.asks_again = true);
            }
        }
        Some(Response { type_url: key.1.clone(), nonce, revision, resources, removed })
    }

    /// Endpoints of clusters that the client has and now gets anew are sent anew, too. Envoy warms a replaced cluster until an
    /// answer with its endpoints comes, even if it has them, and asks for nothing meanwhile; it acknowledges the clusters only then.
    /// They have the clusters' names, as in all that Istio generates.
    fn replace_endpoints(&mut self, clusters: &Picked) {
        let names: HashSet<&str> = clusters.iter().map(|cluster| &*cluster.name).collect();
        for (_, watch) in self.watches.iter_mut().filter(|((rank, _), _)| *rank == ENDPOINTS) {
            watch.due |= watch.held.forget(&names);
        }
    }

    /// A revision that this client now has applied entirely, reported once.
    ///
    /// That is: every type it watches was compared with the snapshot, and every response acknowledged.
    pub fn newly_synced(&mut self) -> Option<u64> {
        let all = !self.watches.is_empty()
            && self.watches.values().all(|w| w.acked && !w.due && !w.keeps_back && w.evaluated == self.revision);
        if !all || self.reported_synced == Some(self.revision) {
            return None;
        }
        self.reported_synced = Some(self.revision);
        Some(self.revision)
    }
}

impl Watch {
    fn on_sotw(&mut self, request: Request, first: bool) -> Result<Heard, BadRequest> {
        if let Some(error) = request.error {
            if request.nonce != self.nonce {
                return Ok(Heard::Stale);
            }
            return Ok(Heard::Nacked { nonce: request.nonce, error });
        }
        if !first && request.nonce != self.nonce && !request.nonce.is_empty() {
            return Ok(Heard::Stale);
        }
        // An empty nonce on a watched type is a client that starts over (Envoy does after a lost stream); it gets everything.
        let restart = first || (request.nonce.is_empty() && !self.nonce.is_empty());
        self.named &= !restart;
        let changed = self.set_names(request)?;
        if restart {
            self.held = Held::default();
            (self.owed, self.due) = (true, true);
            return Ok(Heard::Subscribed);
        }
        self.acked = true;
        let again = std::mem::take(&mut self.asks_again);
        if changed || again {
            if again {
                self.held = Held::default();
            }
            (self.owed, self.due) = (true, true);
        }
        Ok(Heard::Acked { nonce: self.nonce.clone() })
    }

    /// Replaces the names of a SotW watch; true if some are new. Names given up need no answer.
    fn set_names(&mut self, request: Request) -> Result<bool, BadRequest> {
        if request.names.len() > MAX_NAMES {
            return Err(BadRequest::TooManyNames { type_url: request.type_url });
        }
        let explicit = request.names.iter().any(|name| name == "*");
        let wildcard = explicit || (request.names.is_empty() && !self.named && is_wildcard_type(&request.type_url));
        self.named |= !request.names.is_empty();
        let mut names = if wildcard { Vec::new() } else { request.names };
        names.sort_unstable();
        names.dedup();
        let grown = (wildcard && !self.wildcard) || names.iter().any(|name| !self.asked_for(name));
        let same = wildcard == self.wildcard && names.len() == self.names.len() && !grown;
        // An acknowledgement repeats all names.
        if same {
            return Ok(false);
        }
        self.names = names.into_iter().map(ArcStr::from).collect();
        if !wildcard {
            let names = &self.names;
            self.held.map().retain(|name, _| names.binary_search(name).is_ok());
        }
        self.wildcard = wildcard;
        Ok(grown)
    }

    fn asked_for(&self, name: &str) -> bool {
        self.names.binary_search_by(|asked| (**asked).cmp(name)).is_ok()
    }

    /// SotW: wildcard types go whole or not at all; of the others only what changed.
    fn evaluate_sotw(&mut self, whole: bool, resources: Arc<[Resource]>) -> Option<(Picked, Vec<ArcStr>)> {
        if self.held.is(&resources) && !self.owed {
            return None;
        }
        let difference = self.held.difference(&resources);
        let differs = !difference.changed.is_empty() || (whole && !difference.gone.is_empty());
        self.share_names(&resources);
        self.held = Held::List(resources.clone(), BTreeSet::new());
        if !(self.owed || differs) {
            return None;
        }
        let places = (!whole).then_some(difference.changed);
        Some((Picked { list: resources, places }, Vec::new()))
    }

    /// Names are kept as the resources' own where there are such.
    fn share_names(&mut self, resources: &[Resource]) {
        if self.names.len() == resources.len() {
            for (name, resource) in self.names.iter_mut().zip(resources) {
                if *name == resource.name {
                    name.clone_from(&resource.name);
                }
            }
        }
    }

    fn on_delta(&mut self, request: Request, first: bool) -> Result<Heard, BadRequest> {
        if self.names.len() + request.names.len() > MAX_NAMES || request.initial_versions.len() > MAX_NAMES {
            return Err(BadRequest::TooManyNames { type_url: request.type_url });
        }
        let mut asked = first;
        if first {
            // Source: Envoy protocol description, "How the client specifies what resources to return": an empty first
            // request of a wildcard type means all, for clients that do not say "*".
            self.wildcard = request.names.is_empty() && is_wildcard_type(&request.type_url);
            let had = request.initial_versions.into_iter();
            let had = had.map(|(name, version)| (ArcStr::from(name), Some(ArcStr::from(version))));
            self.held = Held::Map(had.collect());
            self.owed = true;
        }
        let mut added = Vec::new();
        for name in request.names {
            asked = true;
            if name == "*" {
                self.wildcard = true;
                self.owed = true;
                continue;
            }
            if !first {
                // Asking again for a name means that the client has lost it.
                self.held.map().remove(name.as_str());
            }
            added.push(ArcStr::from(name));
        }
        if !added.is_empty() {
            self.new_names = true;
            self.names.extend(added);
            self.names.sort();
            self.names.dedup();
        }
        let mut dropped = BTreeSet::new();
        for name in request.unsubscribe {
            if name == "*" {
                self.wildcard = false;
                let names = &self.names;
                self.held.map().retain(|name, _| names.binary_search(name).is_ok());
                continue;
            }
            if !self.wildcard {
                self.held.map().remove(name.as_str());
            } else if let Some(version) = self.held.map().get_mut(name.as_str()) {
                // Still covered by the wildcard, but the client forgot it with its own subscription.
                *version = Some(ArcStr::from(""));
                asked = true;
            }
            dropped.insert(name);
        }
        if !dropped.is_empty() {
            self.names.retain(|name| !dropped.contains(&**name));
        }
        self.due |= asked;
        let nonce = request.nonce;
        if nonce.is_empty() || first {
            return Ok(Heard::Subscribed);
        }
        if nonce != self.nonce {
            return Ok(if asked { Heard::Subscribed } else { Heard::Stale });
        }
        match request.error {
            Some(error) => Ok(Heard::Nacked { nonce, error }),
            None => {
                self.acked = true;
                Ok(Heard::Acked { nonce })
            }
        }
    }

    /// `keep_back`: names that are gone are not said to be, yet.
    fn evaluate_delta(&mut self, resources: Arc<[Resource]>, keep_back: bool) -> Option<(Picked, Vec<ArcStr>)> {
        let new_names = std::mem::take(&mut self.new_names);
        if self.held.is(&resources) && !new_names {
            self.keeps_back = false;
            return self.owed.then(|| (Picked { list: resources, places: Some(Vec::new()) }, Vec::new()));
        }
        let difference = self.held.difference(&resources);
        self.keeps_back = keep_back && !difference.gone.is_empty();
        let mut removed = if self.keeps_back { Vec::new() } else { difference.gone.clone() };
        self.share_names(&resources);
        // A name that was asked for and does not exist is reported as removed, once, so that the client stops waiting.
        let mut none = BTreeSet::new();
        if self.names.len() != resources.len() || self.names.iter().zip(&*resources).any(|(a, b)| *a != b.name) {
            let present: HashSet<&str> = resources.iter().map(|r| &*r.name).collect();
            for name in self.names.iter().filter(|name| !present.contains(&***name)) {
                let gone = difference.gone.binary_search(name).is_ok();
                if gone && self.keeps_back {
                    continue;
                }
                if !gone && !self.held.knows_of_nothing(name) {
                    removed.push(name.clone());
                }
                none.insert(name.clone());
            }
        }
        removed.sort();
        if self.keeps_back {
            let map = self.held.map();
            let kept: Vec<_> = difference.gone.iter().filter_map(|name| map.remove_entry(name)).collect();
            *map = resources.iter().map(|r| (r.name.clone(), Some(r.version.clone()))).collect();
            map.extend(none.into_iter().map(|name| (name, None)));
            map.extend(kept);
        } else {
            self.held = Held::List(resources.clone(), none);
        }
        let answer = self.owed || !difference.changed.is_empty() || !removed.is_empty();
        answer.then(|| (Picked { list: resources, places: Some(difference.changed) }, removed))
    }
}

#[cfg(test)]
mod tests;
