use std::collections::HashMap;
use std::sync::Arc;

use crate::balance::bounded::Bound;
use crate::balance::schedule::HostGroup;
use crate::balance::{Members, Pool};
use crate::cluster::{Cluster, HashFunction, LbPolicy};
use crate::endpoints::{Endpoints, Host};
use crate::hash::{murmur2, xx64};

/// Hosts by hash, with a bound on what each of them is given.
#[derive(Debug)]
pub(super) struct Table {
    places: Places,
    bound: Option<Bound>,
}

/// A ring or a Maglev table. Equal to Envoy's, entry by entry.
#[derive(Debug)]
enum Places {
    /// Sorted by hash.
    Ring(Vec<(u64, Arc<Host>)>),
    /// Indexes into the hosts.
    Maglev {
        hosts: Vec<Arc<Host>>,
        table: Vec<u32>,
    },
    Empty,
}

/// A host with its share of the whole.
struct Share<'a> {
    host: &'a Arc<Host>,
    key: String,
    weight: f64,
}

impl Table {
    /// `locality_weights`: the groups' shares of the whole, which may be more than all of them; empty: one has it all.
    pub(super) fn new(policy: &LbPolicy, groups: &[HostGroup], locality_weights: &[f64]) -> Self {
        let (by_hostname, factor) = match policy {
            LbPolicy::RingHash { by_hostname, balance_factor, .. }
            | LbPolicy::Maglev { by_hostname, balance_factor, .. } => (*by_hostname, *balance_factor),
            _ => (false, None),
        };
        let shares = shares(groups, locality_weights, by_hostname);
        let weighted = || shares.iter().map(|share| (share.host.clone(), share.weight)).collect();
        let bound = factor.map(|factor| Bound::new(factor, weighted()));
        let places = match policy {
            _ if shares.is_empty() => Places::Empty,
            LbPolicy::RingHash { function, min_size, max_size, .. } => ring(&shares, *function, *min_size, *max_size),
            LbPolicy::Maglev { table_size, .. } => maglev(shares, *table_size),
            _ => Places::Empty,
        };
        Self { places, bound }
    }

    /// The host for a hash; another one with each further attempt, and where it has enough to do of the requests that
    /// are under way.
    pub(super) fn pick(&self, hash: u64, attempt: u32, under_way: u64) -> Option<Arc<Host>> {
        let host = self.places.pick(hash, attempt)?;
        Some(match &self.bound {
            None => host,
            Some(bound) => bound.choose(host, hash, under_way),
        })
    }
}

impl Places {
    /// `None`: there is nobody.
    fn size(&self) -> Option<TableSize> {
        let (mut count, entries): (HashMap<*const Host, u64>, usize) = match self {
            Self::Empty => return None,
            Self::Ring(ring) => (HashMap::new(), ring.len()),
            Self::Maglev { hosts, table } => (hosts.iter().map(|host| (Arc::as_ptr(host), 0)).collect(), table.len()),
        };
        let hosts: Box<dyn Iterator<Item = &Arc<Host>>> = match self {
            Self::Empty => return None,
            Self::Ring(ring) => Box::new(ring.iter().map(|(_, host)| host)),
            Self::Maglev { hosts, table } => Box::new(table.iter().filter_map(|at| hosts.get(*at as usize))),
        };
        hosts.for_each(|host| *count.entry(Arc::as_ptr(host)).or_default() += 1);
        let least = count.values().min().copied().unwrap_or(0);
        let most = count.values().max().copied().unwrap_or(0);
        // A Maglev table of one host is not filled in Envoy, place by place.
        let (least, most) = if let Self::Maglev { hosts, .. } = self
            && hosts.len() == 1
        {
            (1, 1)
        } else {
            (least, most)
        };
        Some(TableSize { is_ring: false, entries: entries as u64, per_host: [least, most] })
    }

    fn pick(&self, hash: u64, attempt: u32) -> Option<Arc<Host>> {
        match self {
            Self::Empty => None,
            Self::Ring(ring) => {
                let at = ring.partition_point(|(h, _)| *h < hash);
                ring.get((at + attempt as usize) % ring.len()).map(|(_, host)| Arc::clone(host))
            }
            Self::Maglev { hosts, table } => {
                // Many bits change, so that another attempt seldom ends at the same host.
                let hash = if attempt > 0 { hash ^ (u64::MAX - u64::from(attempt) + 1) } else { hash };
                let index = *table.get((hash % table.len() as u64) as usize)?;
                hosts.get(index as usize).cloned()
            }
        }
    }
}

/// How large the table of a cluster that hashes is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TableSize {
    is_ring: bool,
    entries: u64,
    /// Of the hosts with the fewest and the most.
    per_host: [u64; 2],
}

impl TableSize {
    /// That of the last priority with hosts, as Envoy tells; `None`: the cluster does not hash.
    pub fn of(cluster: &Cluster, endpoints: &Endpoints) -> Option<Self> {
        let is_ring = match cluster.lb {
            LbPolicy::RingHash { .. } => true,
            LbPolicy::Maglev { .. } => false,
            _ => return None,
        };
        let pool = Pool::new(cluster, endpoints, None, 0, Members::of_all(cluster));
        let mut tables = pool.loads.iter().zip(&pool.groups).filter_map(|(load, groups)| {
            let chosen = if load.panic { &groups.any } else { &groups.healthy };
            chosen.hash.as_ref()?.places.size()
        });
        Some(Self { is_ring, ..tables.next_back().unwrap_or_default() })
    }

    /// Its gauges with their names.
    pub fn gauges(self) -> impl Iterator<Item = (&'static str, u64)> {
        let [least, most] = self.per_host;
        let names = match self.is_ring {
            true => ["ring_hash_lb.min_hashes_per_host", "ring_hash_lb.max_hashes_per_host", "ring_hash_lb.size"],
            false => ["maglev_lb.min_entries_per_host", "maglev_lb.max_entries_per_host", ""],
        };
        names.into_iter().zip([least, most, self.entries]).filter(|(name, _)| !name.is_empty())
    }
}

fn shares<'a>(groups: &'a [HostGroup], locality_weights: &[f64], by_hostname: bool) -> Vec<Share<'a>> {
    let mut all = Vec::new();
    for (i, group) in groups.iter().enumerate() {
        let of_group = locality_weights.get(i).copied().unwrap_or(1.0);
        let total: f64 = group.hosts().map(|h| f64::from(h.weight)).sum();
        for host in group.hosts() {
            all.push(Share { host, key: key(host, by_hostname), weight: of_group * f64::from(host.weight) / total });
        }
    }
    all
}

/// What is hashed of a host: metadata `envoy.lb`/`hash_key`, else name or address (Envoy `hashKey`).
fn key(host: &Host, by_hostname: bool) -> String {
    match host.metadata.get("envoy.lb", &["hash_key"]).and_then(|v| v.as_str()) {
        Some(key) if !key.is_empty() => key.to_owned(),
        _ if by_hostname => host.hostname.to_string(),
        _ => host.address.to_string(),
    }
}

fn ring(shares: &[Share<'_>], function: HashFunction, min_size: u64, max_size: u64) -> Places {
    let smallest = shares.iter().map(|s| s.weight).fold(f64::INFINITY, f64::min);
    // The least host gets a whole number of entries, and the ring its least size.
    let scale = ((smallest * min_size as f64).ceil() / smallest).min(max_size as f64);
    let mut ring = Vec::with_capacity(scale.ceil() as usize);
    let (mut current, mut target) = (0.0, 0.0);
    for share in shares {
        target += scale * share.weight;
        let mut i = 0u64;
        while current < target {
            let key = format!("{}_{i}", share.key);
            let hash = match function {
                HashFunction::Xx => xx64(key.as_bytes(), 0),
                HashFunction::Murmur2 => murmur2(key.as_bytes()),
            };
            ring.push((hash, Arc::clone(share.host)));
            i += 1;
            current += 1.0;
        }
    }
    ring.sort_by_key(|(hash, _)| *hash);
    Places::Ring(ring)
}

fn maglev(mut shares: Vec<Share<'_>>, size: u64) -> Places {
    struct Build {
        offset: u64,
        skip: u64,
        weight: f64,
        target: f64,
        next: u64,
    }
    // The table is filled in the order of the hosts, so that order must not change with an update.
    shares.sort_by(|a, b| a.key.cmp(&b.key));
    let heaviest = shares.iter().map(|s| s.weight).fold(0.0, f64::max);
    let mut builds: Vec<Build> = shares
        .iter()
        .map(|s| Build {
            offset: xx64(s.key.as_bytes(), 0) % size,
            skip: xx64(s.key.as_bytes(), 1) % (size - 1).max(1) + 1,
            weight: s.weight,
            target: 0.0,
            next: 0,
        })
        .collect();
    const FREE: u32 = u32::MAX;
    let mut table = vec![FREE; size as usize];
    let mut filled = 0;
    let mut round = 1.0;
    while filled < size {
        for (index, build) in builds.iter_mut().enumerate() {
            if filled == size {
                break;
            }
            // A host of a third of the greatest weight takes its turn in every third round.
            if round * build.weight < build.target {
                continue;
            }
            build.target += heaviest;
            let free = loop {
                let slot = ((u128::from(build.offset) + u128::from(build.skip) * u128::from(build.next))
                    % u128::from(size)) as usize;
                build.next += 1;
                if table[slot] == FREE {
                    break slot;
                }
            };
            table[free] = index as u32;
            filled += 1;
        }
        round += 1.0;
    }
    Places::Maglev { hosts: shares.iter().map(|s| Arc::clone(s.host)).collect(), table }
}
