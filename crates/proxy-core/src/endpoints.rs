//! The hosts of a cluster, by priority and locality.

mod host;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_types::ArcStr;

pub use host::{Health, HealthFlag, Host, HostState, HostStats, Locality, OutlierCounters};

use crate::address::{Address, HostAddress};
use crate::any::Typed;
use crate::cluster::{Cluster, Discovery};
use crate::fields;
use crate::metadata::Metadata;
use crate::pb;
use crate::percent::Fraction;
use crate::rejected::{At, Compiled, Invalid, Result, refuse};
use crate::rules;
use crate::tlv::AddedTlv;

/// All hosts of a cluster at one time. Immutable; what changes about a host is in its [`HostState`].
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// By priority, the most wanted first; a priority may be empty.
    pub priorities: Vec<PrioritySet>,
    /// Percent; 140 means that a priority serves all of its load down to 72 % healthy hosts.
    pub overprovisioning: u32,
    /// A priority's health counts by weight instead of by number.
    pub weighted_priority_health: bool,
    /// Shares of requests that are dropped, by category.
    pub drops: Vec<(ArcStr, Fraction)>,
    /// Counts changes of health of any of its hosts; survives updates.
    pub(crate) epoch: Arc<AtomicU64>,
}

/// The hosts of one priority.
#[derive(Clone, Debug, Default)]
pub struct PrioritySet {
    /// Localities in the order of the configuration.
    pub localities: Vec<LocalitySet>,
}

/// The hosts of one locality of a priority.
#[derive(Clone, Debug)]
pub struct LocalitySet {
    /// Which.
    pub locality: Arc<Locality>,
    /// Its weight among the localities of the priority; 0: no traffic if localities are weighted.
    pub weight: u32,
    /// The hosts.
    pub hosts: Vec<Arc<Host>>,
}

impl Default for Endpoints {
    fn default() -> Self {
        Self {
            priorities: Vec::new(),
            overprovisioning: 140,
            weighted_priority_health: false,
            drops: Vec::new(),
            epoch: Arc::default(),
        }
    }
}

/// Turns names into addresses; names that are not resolved yet give nothing.
pub type Resolve<'a> = &'a dyn Fn(&str, u16) -> Vec<SocketAddr>;

impl Endpoints {
    /// Compiles a `ClusterLoadAssignment`. Hosts of `previous` that are still the same keep their state.
    pub fn compile(
        assignment: &pb::endpoint::ClusterLoadAssignment,
        cluster: &Cluster,
        previous: Option<&Endpoints>,
    ) -> Result<Self> {
        rules::check(assignment)
            .and_then(|()| Self::build(assignment, cluster, previous, false))
            .map_err(|invalid| invalid.of("cluster load assignment", &assignment.cluster_name))
    }

    /// The hosts of a DNS cluster with the addresses that its names have now.
    pub fn resolved(cluster: &Cluster, resolve: Resolve<'_>, previous: Option<&Endpoints>) -> Result<Self> {
        let Some(assignment) = cluster.assignment() else { return Ok(Self::default()) };
        Builder::new(cluster, previous, Some(resolve))
            .all(assignment)
            .map_err(|invalid| invalid.of("cluster", &cluster.name))
    }

    /// The hosts of a cluster that makes them as connections need them, after `previous` ones.
    pub fn made(hosts: Vec<Arc<Host>>, previous: &Self) -> Self {
        let locality = LocalitySet { locality: Arc::default(), weight: 0, hosts };
        let priorities = vec![PrioritySet { localities: vec![locality] }];
        Self { priorities, epoch: Arc::clone(&previous.epoch), ..Self::default() }
    }

    /// A host for [`made`](Self::made).
    pub fn make(&self, address: Address, hostname: ArcStr) -> Arc<Host> {
        Arc::new(Host::made(address, hostname, &self.epoch))
    }

    pub(crate) fn build(
        assignment: &pb::endpoint::ClusterLoadAssignment,
        cluster: &Cluster,
        previous: Option<&Endpoints>,
        names_allowed: bool,
    ) -> Compiled<Self> {
        let nothing: Resolve<'_> = &|_, _| Vec::new();
        Builder::new(cluster, previous, names_allowed.then_some(nothing)).all(assignment)
    }

    /// All hosts.
    pub fn hosts(&self) -> impl Iterator<Item = &Arc<Host>> {
        self.priorities.iter().flat_map(|p| &p.localities).flat_map(|l| &l.hosts)
    }

    /// Whether the same hosts get the same share of the traffic as with others: what else is said of them means nothing
    /// to balancers (Envoy `EdsClusterImpl::updateHostsPerLocality`).
    pub fn weighs_as(&self, other: &Self) -> bool {
        let weights = |endpoints: &Self| {
            let localities = endpoints.priorities.iter().enumerate();
            let localities = localities.flat_map(|(priority, set)| set.localities.iter().map(move |l| (priority, l)));
            let weighted = localities.filter(|(_, l)| l.weight > 0);
            let named = weighted.map(|(priority, l)| ((priority, Arc::clone(&l.locality)), l.weight));
            named.collect::<HashMap<_, _>>()
        };
        let hosts: HashMap<_, _> = self.hosts().map(|host| (Arc::as_ptr(&host.state), host)).collect();
        let is_same = |host: &Arc<Host>| {
            hosts.get(&Arc::as_ptr(&host.state)).is_some_and(|was| {
                was.weight == host.weight
                    && was.metadata == host.metadata
                    && was.priority == host.priority
                    && was.said == host.said
            })
        };
        self.overprovisioning == other.overprovisioning
            && self.weighted_priority_health == other.weighted_priority_health
            && hosts.len() == other.hosts().count()
            && other.hosts().all(is_same)
            && weights(self) == weights(other)
    }

    /// Whether there is no host.
    pub fn is_empty(&self) -> bool {
        self.hosts().next().is_none()
    }

    /// The host with this address.
    pub fn find(&self, address: &Address) -> Option<&Arc<Host>> {
        self.hosts().find(|host| host.address == *address)
    }

    /// Moves with each change of the health of a host.
    pub fn health_changes(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Whether all requests are dropped.
    pub fn drops_all(&self) -> bool {
        self.drops.iter().any(|(_, fraction)| fraction.parts().0 >= fraction.parts().1)
    }

    /// The category for which a request is dropped, if it is (`drop_overloads`).
    pub fn drop_category(&self, random: &mut crate::Random) -> Option<&ArcStr> {
        self.drops.iter().find(|(_, fraction)| fraction.hit(random)).map(|(category, _)| category)
    }
}

/// The names that an assignment needs resolved.
pub(crate) fn names(assignment: &pb::endpoint::ClusterLoadAssignment) -> Vec<(ArcStr, u16)> {
    use pb::endpoint::lb_endpoint::HostIdentifier;
    let mut all = Vec::new();
    for endpoint in assignment.endpoints.iter().flat_map(|l| &l.lb_endpoints) {
        if let Some(HostIdentifier::Endpoint(endpoint)) = &endpoint.host_identifier
            && let Ok(HostAddress::Name(name, port)) = HostAddress::compile(endpoint.address.as_ref())
            && !all.contains(&(name.clone(), port))
        {
            all.push((name, port));
        }
    }
    all
}

/// What PROXY headers tell a host besides (`core.v3.PerHostConfig` in its typed metadata).
fn tlvs(metadata: Option<&pb::core::Metadata>) -> Compiled<Arc<[AddedTlv]>> {
    let config = metadata.and_then(|m| m.typed_filter_metadata.get("envoy.transport_sockets.proxy_protocol"));
    let Some(config) = config else { return Ok(Arc::default()) };
    let typed = Typed::open(Some(config))?;
    match typed.name.as_str() {
        "envoy.config.core.v3.PerHostConfig" => {
            let config: pb::core::PerHostConfig = typed.decode()?;
            Ok(AddedTlv::compile_all(&config.added_tlvs).at("added_tlvs")?.into())
        }
        _ => Ok(Arc::default()),
    }
}

struct Builder<'a> {
    cluster: &'a Cluster,
    /// By address; hosts of several names may have the same.
    old: HashMap<&'a Address, Vec<&'a Arc<Host>>>,
    resolve: Option<Resolve<'a>>,
    epoch: Arc<AtomicU64>,
    /// So many there were.
    priorities: usize,
}

impl<'a> Builder<'a> {
    fn new(cluster: &'a Cluster, previous: Option<&'a Endpoints>, resolve: Option<Resolve<'a>>) -> Self {
        let mut old: HashMap<_, Vec<_>> = HashMap::new();
        for host in previous.into_iter().flat_map(Endpoints::hosts) {
            old.entry(&host.address).or_default().push(host);
        }
        let epoch = previous.unwrap_or(&cluster.endpoints).epoch.clone();
        Self { cluster, old, resolve, epoch, priorities: previous.map_or(0, |p| p.priorities.len()) }
    }

    fn all(&self, assignment: &pb::endpoint::ClusterLoadAssignment) -> Compiled<Endpoints> {
        let policy = assignment.policy.clone().unwrap_or_default();
        refuse!("policy.endpoint_stale_after": policy.endpoint_stale_after.is_some());
        crate::constraints::assignment(assignment)?;
        // A priority that was there once stays, if empty, as in Envoy.
        let mut priorities: Vec<PrioritySet> = vec![PrioritySet::default(); self.priorities];
        let mut seen: HashMap<Address, ()> = HashMap::new();
        for (i, locality) in assignment.endpoints.iter().enumerate() {
            let priority = locality.priority as usize;
            if priority > 128 {
                return Err(Invalid::new(format!("endpoints[{i}].priority"), format!("{priority} is above 128")));
            }
            if priorities.len() <= priority {
                priorities.reserve_exact(priority + 1 - priorities.len());
                priorities.resize_with(priority + 1, PrioritySet::default);
            }
            let set = self.locality(locality, &mut seen).at_index("endpoints", i)?;
            priorities[priority].localities.push(set);
        }
        // Most have one, and there are thousands of them.
        priorities.iter_mut().for_each(|set| set.localities.shrink_to_fit());
        Ok(Endpoints {
            priorities,
            overprovisioning: fields::uint(policy.overprovisioning_factor.as_ref(), 140),
            weighted_priority_health: policy.weighted_priority_health,
            drops: policy
                .drop_overloads
                .iter()
                .map(|d| {
                    Ok((d.category.as_str().into(), Fraction::compile(d.drop_percentage.as_ref(), Fraction::NONE)?))
                })
                .collect::<Compiled<_>>()
                .at("policy.drop_overloads")?,
            epoch: Arc::clone(&self.epoch),
        })
    }

    fn locality(
        &self,
        locality: &pb::endpoint::LocalityLbEndpoints,
        seen: &mut HashMap<Address, ()>,
    ) -> Compiled<LocalitySet> {
        use pb::endpoint::lb_endpoint::HostIdentifier;
        refuse!("lb_config": locality.lb_config.is_some());
        let place = locality.locality.clone().unwrap_or_default();
        let place = Arc::new(Locality {
            region: place.region.as_str().into(),
            zone: place.zone.as_str().into(),
            sub_zone: place.sub_zone.as_str().into(),
        });
        let place_metadata = locality.metadata.as_ref().map(|m| Arc::new(Metadata::compile(Some(m))));
        let mut hosts = Vec::with_capacity(locality.lb_endpoints.len());
        for (i, entry) in locality.lb_endpoints.iter().enumerate() {
            let endpoint = match &entry.host_identifier {
                Some(HostIdentifier::Endpoint(endpoint)) => endpoint,
                Some(HostIdentifier::EndpointName(_)) => {
                    return Err(Invalid::unsupported(format!("lb_endpoints[{i}].endpoint_name")));
                }
                None => return Err(Invalid::new(format!("lb_endpoints[{i}].endpoint"), "is missing")),
            };
            let weight = fields::uint(entry.load_balancing_weight.as_ref(), 1);
            if weight == 0 {
                return Err(Invalid::new(format!("lb_endpoints[{i}].load_balancing_weight"), "must be at least 1"));
            }
            let more = endpoint
                .additional_addresses
                .iter()
                .map(|a| Address::compile(a.address.as_ref()))
                .collect::<Compiled<Vec<_>>>()
                .at_index("lb_endpoints", i)?;
            let metadata = Arc::new(Metadata::compile(entry.metadata.as_ref()));
            let tlvs = tlvs(entry.metadata.as_ref()).at_index("lb_endpoints", i)?;
            let addresses = self.addresses(endpoint).at_index("lb_endpoints", i)?;
            if let Discovery::StrictDns(_) | Discovery::Static = self.cluster.discovery {
                // Each name, and each entry of a static cluster, has hosts of its own.
                seen.clear();
            }
            for (address, hostname) in addresses {
                // A repeated address counts once (Envoy `BaseDynamicClusterImpl::updateDynamicHostList`).
                if seen.insert(address.clone(), ()).is_some() {
                    continue;
                }
                let health_check = host::HealthCheckTarget::compile(endpoint.health_check_config.as_ref(), &address);
                let mut host = Host {
                    state: Arc::default(),
                    said: entry.health_status,
                    additional_addresses: more.clone(),
                    hostname,
                    metadata: Arc::clone(&metadata),
                    locality_metadata: place_metadata.clone(),
                    tlvs: Arc::clone(&tlvs),
                    weight,
                    locality: Arc::clone(&place),
                    priority: locality.priority,
                    health_check,
                    address,
                };
                host.state = self.state(&host, entry.health_status);
                hosts.push(self.kept(host));
            }
        }
        // Without a locality a weight means nothing (Envoy `PriorityStateManager::initializePriorityFor`).
        let weight = locality.load_balancing_weight.as_ref().filter(|_| locality.locality.is_some());
        Ok(LocalitySet { locality: place, weight: fields::uint(weight, 0), hosts })
    }

    /// The addresses of an endpoint with their host name.
    fn addresses(&self, endpoint: &pb::endpoint::Endpoint) -> Compiled<Vec<(Address, ArcStr)>> {
        Ok(match (HostAddress::compile(endpoint.address.as_ref()).at("endpoint.address")?, self.resolve) {
            (HostAddress::Literal(address), _) => vec![(address, endpoint.hostname.as_str().into())],
            (HostAddress::Name(name, _), None) => {
                return Err(Invalid::new(
                    "endpoint.address.socket_address.address",
                    format!("malformed IP address: {name}"),
                ));
            }
            (HostAddress::Name(name, port), Some(resolve)) => {
                let hostname: ArcStr =
                    if endpoint.hostname.is_empty() { name.clone() } else { endpoint.hostname.as_str().into() };
                let mut found = resolve(&name, port);
                if let Discovery::LogicalDns(_) = self.cluster.discovery {
                    found.truncate(1);
                }
                found.into_iter().map(|address| (Address::Ip(address), hostname.clone())).collect()
            }
        })
    }

    fn state(&self, host: &Host, health_status: i32) -> Arc<HostState> {
        use pb::core::HealthStatus;
        let epoch = || Arc::clone(&self.epoch);
        let checked = !self.cluster.health_checks.is_empty();
        let checkable = checked && host.health_check.address.is_some();
        let state = match self.before(host) {
            Some(old) if host.is_still(old, checked) => Arc::clone(&old.state),
            Some(old) if checkable => Arc::new(HostState::succeeding(&old.state, epoch())),
            _ => {
                // With active checks a new host must prove itself first.
                let flags: &[HealthFlag] = match (checkable, self.cluster.ignore_new_hosts) {
                    (false, _) => &[],
                    (true, false) => &[HealthFlag::FailedActive],
                    (true, true) => &[HealthFlag::FailedActive, HealthFlag::PendingActive],
                };
                Arc::new(HostState::new(epoch(), flags))
            }
        };
        let status = HealthStatus::try_from(health_status).unwrap_or(HealthStatus::Unknown);
        state.set(HealthFlag::EdsUnhealthy, matches!(status, HealthStatus::Unhealthy | HealthStatus::Timeout));
        state.set(HealthFlag::EdsDraining, status == HealthStatus::Draining);
        state.set(HealthFlag::EdsDegraded, status == HealthStatus::Degraded);
        state
    }

    /// Who had this address, under the same name if somebody had.
    fn before(&self, host: &Host) -> Option<&Arc<Host>> {
        let all = self.old.get(&host.address)?;
        all.iter().find(|old| old.hostname == host.hostname).or(all.first()).copied()
    }

    /// The old object if nothing about the host changed, so that pools keyed by it stay.
    fn kept(&self, host: Host) -> Arc<Host> {
        match self.before(&host) {
            Some(old) if old.same_as(&host) => Arc::clone(old),
            _ => Arc::new(host),
        }
    }
}
