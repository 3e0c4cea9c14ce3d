//! Consistent hashing with bounded loads (Envoy `BoundedLoadHashingLoadBalancer`).

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
    /// All hosts of the cluster.
    all: Vec<Arc<Host>>,
}

fn active(host: &Host) -> u32 {
    host.state.active.load(Ordering::Relaxed)
}

impl Bound {
    pub(super) fn new(factor: u32, hosts: Vec<(Arc<Host>, f64)>, all: Vec<Arc<Host>>) -> Self {
        Self { factor, hosts, all }
    }

    /// The host itself, or another one if it has too much to do; always the same ones for a hash, in the same order.
    ///
    /// Looks at every host of the cluster for each request, as all proxies' connections to a host count only on the host.
    pub(super) fn choose(&self, host: Arc<Host>, hash: u64) -> Arc<Host> {
        let under_way: u64 = self.all.iter().map(|host| u64::from(active(host))).sum();
        let slots = ((under_way + 1) * u64::from(self.factor)).div_ceil(100);
        let load = |host: &Host, weight: f64| f64::from(active(host)) / (slots as f64 * weight).ceil().max(1.0);
        let weight = self.hosts.iter().find(|(other, _)| Arc::ptr_eq(other, &host)).map_or(0.0, |(_, weight)| *weight);
        let mut least = load(&host, weight);
        if least <= 1.0 {
            return host;
        }
        let mut best = &host;
        let mut order: Vec<usize> = (0..self.hosts.len()).collect();
        let mut random = MersenneTwister::new(hash as u32);
        for at in 0..order.len() {
            let other = at + random.below((order.len() - at) as u32) as usize;
            order.swap(at, other);
            let (other, weight) = &self.hosts[order[at]];
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

    #[test]
    fn numbers_are_those_of_the_standard() {
        // The 10000th number of the default seed, as the C++ standard gives it.
        let mut random = MersenneTwister::new(5489);
        let last = (0..10_000).map(|_| random.draw()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}
