use std::time::Duration;

/// A time that is longer at random, so that not all do at once what it is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Jittered {
    /// The least.
    pub least: Duration,
    /// By how much it may be longer, in percent.
    pub(crate) percent: f64,
}

impl Jittered {
    /// One of the times between the least and the longest.
    pub fn draw(&self, random: &mut Random) -> Duration {
        if self.percent == 0.0 {
            return self.least;
        }
        let longer = Duration::try_from_secs_f64(self.least.as_secs_f64() * self.percent / 100.0 * random.unit());
        self.least.saturating_add(longer.unwrap_or_default())
    }
}

/// Numbers for choices that need not be unpredictable: weights, sampling, jitter, balancing.
///
/// SplitMix64. One per worker, seeded by the caller, so that decisions can be repeated in tests.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence that depends on `seed` alone.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    #[expect(clippy::should_implement_trait, reason = "it never ends, so it is no iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..n`, or 0 when `n` is 0. The bias of the multiplication is below 2^-32 for the sizes used here.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// A number in `0.0..1.0`.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_only_makes_longer() {
        let mut random = Random::new(7);
        let second = |percent| Jittered { least: Duration::from_secs(1), percent };
        assert_eq!(second(0.0).draw(&mut random), Duration::from_secs(1));
        let times: Vec<Duration> = (0..1000).map(|_| second(50.0).draw(&mut random)).collect();
        assert!(times.iter().all(|time| (1000..1500).contains(&time.as_millis())));
        assert!(times.iter().any(|time| time.as_millis() > 1400));
    }

    #[test]
    fn below_stays_below_and_reaches_all() {
        let mut random = Random::new(7);
        let mut seen = [0u32; 5];
        for _ in 0..5000 {
            seen[random.below(5) as usize] += 1;
        }
        assert!(seen.iter().all(|n| (850..1150).contains(n)), "{seen:?}");
        assert_eq!(random.below(0), 0);
        assert!((0.0..1.0).contains(&random.unit()));
    }
}
