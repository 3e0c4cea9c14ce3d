//! Consistent hashing with bounded loads (Envoy `BoundedLoadHashingLoadBalancer`).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::endpoints::Host;

/// How much a host may have to do, and who helps out.
#[derive(Debug)]
pub(super) struct Bound {
    /// Percent of the average that no host should have more of.
    factor: u32,
    /// Hosts with their share of the whole.
    hosts: Vec<(Arc<Host>, f64)>,
    /// Where each host stands among them, by its address in memory.
    places: HashMap<usize, usize>,
}

fn active(host: &Host) -> u32 {
    host.state.active.load(Ordering::Relaxed)
}

impl Bound {
    pub(super) fn new(factor: u32, hosts: Vec<(Arc<Host>, f64)>) -> Self {
        let places = hosts.iter().enumerate().map(|(at, (host, _))| (Arc::as_ptr(host) as usize, at)).collect();
        Self { factor, hosts, places }
    }

    /// The host itself, or another one if it has too much to do; always the same ones for a hash, in the same order.
    /// `under_way`: the requests of the whole cluster.
    pub(super) fn choose(&self, host: Arc<Host>, hash: u64, under_way: u64) -> Arc<Host> {
        let slots = ((under_way + 1) * u64::from(self.factor)).div_ceil(100);
        let load = |host: &Host, weight: f64| f64::from(active(host)) / (slots as f64 * weight).ceil().max(1.0);
        let weight = self.places.get(&(Arc::as_ptr(&host) as usize)).map_or(0.0, |at| self.hosts[*at].1);
        let mut least = load(&host, weight);
        if least <= 1.0 {
            return host;
        }
        let mut best = &host;
        // A shuffle as far as it is looked at: who has changed places.
        let mut moved: HashMap<usize, usize> = HashMap::new();
        let mut random = MersenneTwister::new(hash as u32);
        for at in 0..self.hosts.len() {
            let drawn = at + random.below((self.hosts.len() - at) as u32) as usize;
            let here = moved.remove(&at).unwrap_or(at);
            let chosen = if drawn == at { here } else { moved.insert(drawn, here).unwrap_or(drawn) };
            let (other, weight) = &self.hosts[chosen];
            if Arc::ptr_eq(other, &host) {
                continue;
            }
            let load = load(other, *weight);
            if load <= 1.0 {
                return Arc::clone(other);
            }
            if load < least {
                (best, least) = (other, load);
            }
        }
        Arc::clone(best)
    }
}

/// MT19937, since two proxies must choose alike.
struct MersenneTwister {
    state: [u32; Self::SIZE],
    next: usize,
}

impl MersenneTwister {
    const SIZE: usize = 624;

    fn new(seed: u32) -> Self {
        let mut state = [seed; Self::SIZE];
        for i in 1..Self::SIZE {
            let last = state[i - 1];
            state[i] = (last ^ (last >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Self { state, next: Self::SIZE }
    }

    fn refill(&mut self) {
        for i in 0..Self::SIZE {
            let bits = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % Self::SIZE] & 0x7fff_ffff);
            let odd = if bits & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + 397) % Self::SIZE] ^ (bits >> 1) ^ odd;
        }
        self.next = 0;
    }

    fn draw(&mut self) -> u32 {
        if self.next == Self::SIZE {
            self.refill();
        }
        let mut bits = self.state[self.next];
        self.next += 1;
        bits ^= bits >> 11;
        bits ^= (bits << 7) & 0x9d2c_5680;
        bits ^= (bits << 15) & 0xefc6_0000;
        bits ^ (bits >> 18)
    }

    /// One of so many numbers, each as likely as the others.
    fn below(&mut self, count: u32) -> u32 {
        let share = (1u64 << 32) / u64::from(count);
        loop {
            let number = u64::from(self.draw()) / share;
            if number < u64::from(count) {
                return number as u32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Address;

    /// The same choice, with all hosts looked at and shuffled.
    fn slow(bound: &Bound, host: &Arc<Host>, hash: u64, under_way: u64) -> Arc<Host> {
        let slots = ((under_way + 1) * u64::from(bound.factor)).div_ceil(100);
        let load = |host: &Host, weight: f64| f64::from(active(host)) / (slots as f64 * weight).ceil().max(1.0);
        let own = bound.hosts.iter().find(|(other, _)| Arc::ptr_eq(other, host)).unwrap();
        let mut best = (host, load(host, own.1));
        let mut order: Vec<usize> = (0..bound.hosts.len()).collect();
        let mut random = MersenneTwister::new(hash as u32);
        for at in 0..order.len() {
            if best.1 <= 1.0 {
                break;
            }
            let other = at + random.below((order.len() - at) as u32) as usize;
            order.swap(at, other);
            let (other, weight) = &bound.hosts[order[at]];
            if load(other, *weight) < best.1 && !Arc::ptr_eq(other, host) {
                best = (other, load(other, *weight));
            }
        }
        best.0.clone()
    }

    #[test]
    fn looks_at_few_hosts_and_chooses_as_if_it_looked_at_all() {
        let mut random = MersenneTwister::new(7);
        for count in [1, 2, 3, 10, 57] {
            let host = |n: u32| {
                Arc::new(Host::made(Address::Ip(([10, 0, 0, n as u8], 80).into()), "".into(), &Arc::default()))
            };
            let hosts: Vec<_> = (0..count).map(|n| (host(n), 1.0 / f64::from(count))).collect();
            let bound = Bound::new(120, hosts.clone());
            for _ in 0..200 {
                for (host, _) in &hosts {
                    host.state.active.store(random.below(6), Ordering::Relaxed);
                }
                let under_way = hosts.iter().map(|(host, _)| u64::from(active(host))).sum();
                let (hash, from) = (u64::from(random.draw()), &hosts[random.below(count) as usize].0);
                let (quick, slow) = (bound.choose(from.clone(), hash, under_way), slow(&bound, from, hash, under_way));
                assert!(Arc::ptr_eq(&quick, &slow), "{} and {}", quick.address, slow.address);
            }
        }
    }

    #[test]
    fn numbers_are_those_of_the_standard() {
        // The 10000th number of the default seed, as the C++ standard gives it.
        let mut random = MersenneTwister::new(5489);
        let last = (0..10_000).map(|_| random.draw()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}
