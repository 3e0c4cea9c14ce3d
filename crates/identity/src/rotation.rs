//! When a certificate is to be replaced, and how long to wait after a failure. Pure: the caller has the clock.

use std::time::{Duration, SystemTime};

/// The longest pause between attempts.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// The shortest time between two successful fetches, so that a skewed clock does not make a storm of requests.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// When to renew. Source: istio `security/pkg/nodeagent/cache`, SECRET_GRACE_PERIOD_RATIO and its jitter.
#[derive(Clone, Copy, Debug)]
pub struct Rotation {
    /// The part of the lifetime that is left when renewal starts.
    pub grace_ratio: f64,
    /// The part of the lifetime by which that moment is moved at random, either way.
    pub jitter_ratio: f64,
}

impl Default for Rotation {
    fn default() -> Rotation {
        Rotation { grace_ratio: 0.5, jitter_ratio: 0.01 }
    }
}

impl Rotation {
    /// How long from `now`, when the certificate has just come, until renewal. `random` is in 0..1.
    ///
    /// CAs date certificates back to allow for skewed clocks, so what counts is the life that is left, as long as that is
    /// not more than the certificate's whole life: then our own clock is behind.
    pub fn delay(&self, not_before: SystemTime, not_after: SystemTime, now: SystemTime, random: f64) -> Duration {
        let lifetime = not_after.duration_since(not_before).unwrap_or_default();
        let left = not_after.duration_since(now).unwrap_or_default().min(lifetime);
        let grace = (self.grace_ratio + self.jitter_ratio * (2.0 * random - 1.0)).clamp(0.0, 1.0);
        left.mul_f64(1.0 - grace).max(MIN_INTERVAL)
    }

    /// How long to wait after the `failures`th failure in a row. `left` is the remaining life of the certificate in use:
    /// the shorter, the more often, so that no attempt is missed.
    pub fn pause(&self, failures: u32, left: Option<Duration>, random: f64) -> Duration {
        let exponential = Duration::from_millis(100) * 2u32.saturating_pow(failures.min(12).saturating_sub(1));
        let limit = left.map_or(MAX_PAUSE, |left| (left / 10).clamp(Duration::from_millis(500), MAX_PAUSE));
        exponential.min(limit).mul_f64(0.5 + 0.5 * random)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    #[test]
    fn renews_at_half_life_with_jitter() {
        let rotation = Rotation::default();
        let delay = |random| rotation.delay(at(0), at(1000), at(0), random).as_secs_f64();
        assert!((delay(0.5) - 500.0).abs() < 1e-6);
        assert!((delay(0.0) - 510.0).abs() < 1e-6 && (delay(1.0) - 490.0).abs() < 1e-6);
        assert_eq!(rotation.delay(at(0), at(1000), at(2000), 0.5), MIN_INTERVAL, "expired: at once");
    }

    #[test]
    fn a_certificate_dated_back_is_renewed_at_half_of_what_is_left() {
        let delay = Rotation::default().delay(at(0), at(180), at(120), 0.5);
        assert_eq!(delay, Duration::from_secs(30));
    }

    #[test]
    fn a_clock_an_hour_behind_waits_no_longer_than_half_the_life() {
        let delay = Rotation::default().delay(at(3600), at(3660), at(0), 0.5);
        assert_eq!(delay, Duration::from_secs(30));
    }

    #[test]
    fn pauses_grow_and_respect_what_is_left() {
        let rotation = Rotation::default();
        assert_eq!(rotation.pause(1, None, 1.0), Duration::from_millis(100));
        assert_eq!(rotation.pause(4, None, 1.0), Duration::from_millis(800));
        assert_eq!(rotation.pause(40, None, 1.0), MAX_PAUSE);
        assert_eq!(rotation.pause(40, Some(Duration::from_secs(30)), 1.0), Duration::from_secs(3));
    }
}
