//! Zone-aware routing: traffic stays in our own locality as far as the hosts there can take our share of it.
//!
//! As Envoy's `ZoneAwareLoadBalancerBase`, for the first priority.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::schedule::HostGroup;
use super::{Local, Members};
use crate::cluster::{Cluster, ZoneAware};
use crate::endpoints::{Endpoints, Health, Host, Locality, PrioritySet};
use crate::random::Random;

/// How one pool routes by locality.
#[derive(Debug)]
pub(super) struct Zones {
    /// Healthy and degraded hosts by locality, ours first.
    healthy: Vec<HostGroup>,
    degraded: Vec<HostGroup>,
    route: Route,
    /// Too few of our own kind are healthy to know anything.
    local_panic: bool,
}

#[derive(Debug)]
enum Route {
    Direct,
    /// So many of 10000 stay; the others go where hosts can take more than their share. Sums up to each locality.
    Residual {
        stays: u64,
        capacity: Vec<u64>,
    },
}

/// What a choice among zones came to, for statistics.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ZoneUse {
    /// Zones did not matter.
    #[default]
    None,
    /// All stays in our own.
    Direct,
    /// This one did.
    Sampled,
    /// It went to another one.
    Cross,
    /// It went anywhere, since nobody can take more.
    NoCapacity,
    /// Our own cluster is not well.
    LocalNotOk,
}

/// Why localities do not matter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NoZones {
    /// There is only one, of hosts or of us.
    Few,
    /// We are not in the local cluster.
    LocalNotOk,
    /// There are too few hosts.
    Small,
}

type ByLocality<'a> = Vec<Vec<&'a Arc<Host>>>;

/// Hosts by locality, ours first if it has any, then in order; and whether ours has.
fn by_locality<'a>(
    set: Option<&'a PrioritySet>,
    ours: &Locality,
    fits: &dyn Fn(&Host) -> bool,
) -> (ByLocality<'a>, bool) {
    let mut all: BTreeMap<(bool, &Locality), Vec<&Arc<Host>>> = BTreeMap::new();
    for locality in set.into_iter().flat_map(|set| &set.localities).filter(|locality| !locality.hosts.is_empty()) {
        let hosts = locality.hosts.iter().filter(|host| fits(host));
        all.entry((*locality.locality != *ours, &*locality.locality)).or_default().extend(hosts);
    }
    let has_ours = all.first_key_value().is_some_and(|((other, _), _)| !other);
    (all.into_values().collect(), has_ours)
}

/// Whether localities matter (Envoy `earlyExitNonLocalityRouting`).
fn check(config: &ZoneAware, upstream: (usize, u64), local: &(ByLocality<'_>, bool)) -> Result<(), NoZones> {
    let (localities, healthy) = upstream;
    if localities < 2 || (local.0.len() < 2 && !config.force_direct && config.force_with.is_none()) {
        return Err(NoZones::Few);
    }
    if !local.1 || local.0[0].is_empty() {
        return Err(NoZones::LocalNotOk);
    }
    if healthy < config.min_size.get() {
        return Err(NoZones::Small);
    }
    Ok(())
}

fn is_healthy(host: &Host) -> bool {
    host.health() == Health::Healthy
}

/// Why a cluster does not route by locality, if it does not.
pub fn no_zones(cluster: &Cluster, endpoints: &Endpoints, local: &Local) -> Option<NoZones> {
    let hosts = by_locality(endpoints.priorities.first(), &local.place, &is_healthy).0;
    let healthy = hosts.iter().map(Vec::len).sum::<usize>() as u64;
    let ours = by_locality(local.endpoints.priorities.first(), &local.place, &|_| true);
    check(&cluster.zones, (hosts.len(), healthy), &ours).err()
}

impl Zones {
    pub(super) fn new(
        cluster: &Cluster,
        endpoints: &Endpoints,
        local: &Local,
        seed: u64,
        members: Members<'_>,
    ) -> Option<Self> {
        if cluster.lb.is_hashing() || cluster.locality_weighted {
            return None;
        }
        let of = |health: Health| {
            let fits = move |host: &Host| host.health() == health && (members.fits)(host);
            by_locality(endpoints.priorities.first(), &local.place, &fits)
        };
        let (hosts, has_ours) = of(Health::Healthy);
        let healthy = hosts.iter().map(Vec::len).sum::<usize>() as u64;
        let all = by_locality(local.endpoints.priorities.first(), &local.place, &|_| true);
        check(&cluster.zones, (hosts.len(), healthy), &all).ok()?;
        let ours = by_locality(local.endpoints.priorities.first(), &local.place, &is_healthy).0;
        let groups = |hosts: ByLocality<'_>| -> Vec<HostGroup> {
            let group =
                |hosts: Vec<&Arc<Host>>| HostGroup::new(hosts.into_iter().cloned().collect(), &cluster.lb, seed);
            hosts.into_iter().map(group).collect()
        };
        let (known, well) = (all.0.iter().map(Vec::len).sum::<usize>(), ours.iter().map(Vec::len).sum::<usize>());
        let percent = if known == 0 { 0.0 } else { 100.0 * well as f64 / known as f64 };
        Some(Self {
            route: Route::of(&cluster.zones, &hosts, has_ours, &ours),
            healthy: groups(hosts),
            degraded: groups(of(Health::Degraded).0),
            local_panic: percent < cluster.panic_threshold.get(),
        })
    }

    /// The hosts to choose from, unless localities do not matter for this choice; `Err`: there are none.
    pub(super) fn choose(
        &mut self,
        cluster: &Cluster,
        health: Health,
        used: &mut ZoneUse,
        random: &mut Random,
    ) -> Result<Option<&mut HostGroup>, ()> {
        let percent = cluster.zones.enabled.get();
        if percent < 100 && random.below(100) >= percent {
            return Ok(None);
        }
        if self.local_panic {
            *used = ZoneUse::LocalNotOk;
            return if cluster.fail_on_panic { Err(()) } else { Ok(None) };
        }
        let index = self.route.choose(used, random);
        let groups = if health == Health::Degraded { &mut self.degraded } else { &mut self.healthy };
        groups.get_mut(index).map(Some).ok_or(())
    }
}

impl Route {
    fn of(config: &ZoneAware, hosts: &ByLocality<'_>, has_ours: bool, ours: &ByLocality<'_>) -> Self {
        let size = |hosts: &Vec<&Arc<Host>>| match config.by_weight {
            true => hosts.iter().map(|host| u64::from(host.weight)).sum(),
            false => hosts.len() as u64,
        };
        let sum = |all: &ByLocality<'_>| all.iter().map(size).sum::<u64>();
        let (all_hosts, all_ours) = (sum(hosts), sum(ours));
        let share = |part: u64, all: u64| (10_000 * part).checked_div(all).unwrap_or(0);
        let shares: Vec<(u64, u64)> = hosts
            .iter()
            .map(|here| {
                let Some(first) = here.first() else { return (0, 0) };
                let same = ours.iter().find(|of| of.first().is_some_and(|host| host.locality == first.locality));
                (share(same.map_or(0, size), all_ours), share(size(here), all_hosts))
            })
            .collect();
        let (local, upstream) = shares.first().copied().unwrap_or_default();
        let here = hosts.first().map_or(0, Vec::len) as u64;
        let forced = config.force_direct || config.force_with.is_some_and(|least| here >= least);
        if has_ours && ((upstream > 0 && upstream >= local) || forced) {
            return Self::Direct;
        }
        let stays = if has_ours && local > 0 { upstream * 10_000 / local } else { 0 };
        let mut sum = 0;
        let capacity = shares.iter().enumerate().map(|(i, (local, upstream))| {
            if !(i == 0 && has_ours) {
                sum += upstream.saturating_sub(*local);
            }
            sum
        });
        Self::Residual { capacity: capacity.collect(), stays }
    }

    fn choose(&self, used: &mut ZoneUse, random: &mut Random) -> usize {
        match self {
            Self::Direct => {
                *used = ZoneUse::Direct;
                0
            }
            Self::Residual { stays, .. } if random.below(10_000) < *stays => {
                *used = ZoneUse::Sampled;
                0
            }
            Self::Residual { capacity, .. } => match capacity.last() {
                Some(all @ 1..) => {
                    *used = ZoneUse::Cross;
                    let draw = random.below(*all);
                    capacity.iter().position(|sum| draw < *sum).unwrap_or(0)
                }
                _ => {
                    *used = ZoneUse::NoCapacity;
                    random.below(capacity.len().max(1) as u64) as usize
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use serde_json::json;

    use super::*;
    use crate::Options;

    fn locality(zone: &str, hosts: std::ops::Range<u32>) -> serde_json::Value {
        let host = |n: u32| {
            let address = json!({"socket_address": {"address": format!("10.0.0.{n}"), "port_value": 80}});
            json!({"endpoint": {"address": address}, "load_balancing_weight": n})
        };
        json!({"locality": {"zone": zone}, "lb_endpoints": hosts.map(host).collect::<Vec<_>>()})
    }

    fn cluster(config: serde_json::Value, localities: Vec<serde_json::Value>) -> Cluster {
        let policy = "type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin";
        let policy = json!({"@type": policy, "locality_lb_config": {"zone_aware_lb_config": config}});
        let value = json!({"name": "c", "load_assignment": {"cluster_name": "c", "endpoints": localities},
            "load_balancing_policy": {"policies": [{"typed_extension_config": {"name": "p", "typed_config": policy}}]}});
        let bytes = envoy_api::json::from_json(envoy_api::type_url::CLUSTER, &value).unwrap();
        Cluster::compile(&Message::decode(bytes.as_slice()).unwrap(), &Options::default()).unwrap()
    }

    /// Shares of 10000 that stay, or `None`: all.
    fn stays(config: serde_json::Value) -> Result<Option<u64>, NoZones> {
        let local = cluster(json!({}), vec![locality("a", 1..3), locality("b", 3..4)]);
        let local = Local {
            endpoints: Arc::clone(&local.endpoints),
            place: Locality { zone: "a".into(), ..Locality::default() },
        };
        let cluster = cluster(config, vec![locality("a", 1..2), locality("b", 2..5)]);
        if let Some(why) = no_zones(&cluster, &cluster.endpoints, &local) {
            return Err(why);
        }
        let members = Members { fits: &|_| true, weights: super::super::LocalityWeights::Ignored };
        Ok(match Zones::new(&cluster, &cluster.endpoints, &local, 0, members).unwrap().route {
            Route::Direct => None,
            Route::Residual { stays, .. } => Some(stays),
        })
    }

    #[test]
    fn as_much_stays_as_our_share_of_the_hosts_can_take() {
        assert_eq!(stays(json!({})), Err(NoZones::Small));
        assert_eq!(stays(json!({"min_cluster_size": 4})), Ok(Some(2500 * 10_000 / 6666)));
        assert_eq!(stays(json!({"min_cluster_size": 4, "locality_basis": "HEALTHY_HOSTS_WEIGHT"})), Ok(Some(2000)));
        assert_eq!(stays(json!({"min_cluster_size": 4, "force_local_zone": {}})), Ok(None));
        let two = json!({"min_cluster_size": 4, "force_local_zone": {"min_size": 2}});
        assert_eq!(stays(two), Ok(Some(3750)));
    }
}
