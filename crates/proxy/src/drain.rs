//! Listeners that drain: which of their connections are told to go, and when.

use proxy_core::Random;
use proxy_core::listener::Direction;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How connections are told to end while listeners drain (`--drain-strategy`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum DrainStrategy {
    /// More and more of them, until the drain time is over.
    Gradual,
    /// All with their next answer.
    #[default]
    Immediate,
}

/// How far a filter chain is with letting its connections go.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Drain {
    /// It is in use.
    #[default]
    No,
    /// It was removed or changed then, and so was its listener.
    Since(Instant),
    /// The drain time is over, or the proxy ends: connections are cut off.
    Over,
}

/// What was begun to drain by `/drain_listeners` or by whoever runs the proxy.
pub(crate) struct Draining {
    pub(crate) strategy: DrainStrategy,
    time: Duration,
    all: OnceLock<Instant>,
    inbound: OnceLock<Instant>,
}

impl Draining {
    pub(crate) fn new(strategy: DrainStrategy, time: Duration) -> Self {
        Self { strategy, time, all: OnceLock::new(), inbound: OnceLock::new() }
    }

    /// Begins; what has begun already goes on.
    pub(crate) fn begin(&self, inbound_only: bool) {
        let scope = if inbound_only { &self.inbound } else { &self.all };
        scope.get_or_init(Instant::now);
    }

    /// Whether a connection is to end with its next answer (Envoy `DrainManagerImpl::drainClose`).
    pub(crate) fn ends(&self, direction: Direction, random: &mut Random) -> bool {
        let inbound = self.inbound.get().filter(|_| direction == Direction::Inbound);
        self.all.get().or(inbound).is_some_and(|began| self.is_due(*began, random))
    }

    /// Likewise of what began to drain then.
    pub(crate) fn is_due(&self, began: Instant, random: &mut Random) -> bool {
        match self.strategy {
            DrainStrategy::Immediate => true,
            DrainStrategy::Gradual => {
                let (gone, all) = (began.elapsed().as_millis() as u64, self.time.as_millis() as u64);
                gone >= all || random.below(all) < gone
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_go_at_once_or_little_by_little() {
        let mut random = Random::new(1);
        let at_once = Draining::new(DrainStrategy::Immediate, Duration::from_secs(600));
        assert!(!at_once.ends(Direction::Outbound, &mut random));
        at_once.begin(true);
        assert!(at_once.ends(Direction::Inbound, &mut random) && !at_once.ends(Direction::Outbound, &mut random));
        let slowly = Draining::new(DrainStrategy::Gradual, Duration::from_secs(3600));
        slowly.begin(false);
        assert!((0..100).filter(|_| slowly.ends(Direction::Inbound, &mut random)).count() < 50);
        let over = Draining::new(DrainStrategy::Gradual, Duration::ZERO);
        over.begin(false);
        assert!(over.ends(Direction::Unspecified, &mut random));
    }
}
