//! All deadlines of one exchange on one timer.

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::time::Sleep;

/// What ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deadline {
    /// The route's timeout.
    Global,
    PerTry,
    PerTryIdle,
    /// `stream_idle_timeout` or the route's `idle_timeout`.
    Idle,
    /// `request_timeout` of the connection manager: the request must be there by then.
    Request,
    /// `max_stream_duration`.
    Stream,
    /// `max_stream_duration` of the upstream's protocol options.
    UpstreamStream,
    /// `access_log_flush_interval`: a record is due.
    Log,
}

const COUNT: usize = 8;

/// The deadlines of one exchange. The timer is only made for those that are set, and only moved when it must.
#[derive(Default)]
pub(crate) struct Timers {
    at: [Option<Instant>; COUNT],
    idle_for: [Option<Duration>; COUNT],
    sleep: Option<Pin<Box<Sleep>>>,
    /// The time, once somebody asked since the last wait, and how long that is after the start.
    now: Cell<Option<(Instant, Duration)>>,
    start: Option<Instant>,
}

impl Timers {
    /// The exchange starts now.
    pub(crate) fn start(&mut self) -> Instant {
        let now = Instant::now();
        self.start = Some(now);
        self.now.set(Some((now, Duration::ZERO)));
        now
    }

    /// The time. The clock is only read once between two waits: what is done in between takes microseconds.
    pub(crate) fn now(&self) -> Instant {
        self.clock().0
    }

    /// Time since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.clock().1
    }

    fn clock(&self) -> (Instant, Duration) {
        match self.now.get() {
            Some(read) => read,
            None => {
                let now = Instant::now();
                let read = (now, self.start.map_or(Duration::ZERO, |start| now.saturating_duration_since(start)));
                self.now.set(Some(read));
                read
            }
        }
    }

    /// Something was waited for without [`Timers::poll`].
    pub(crate) fn waited(&self) {
        self.now.set(None);
    }

    pub(crate) fn set(&mut self, which: Deadline, after: Option<Duration>) {
        self.at[which as usize] = after.and_then(|after| self.now().checked_add(after));
    }

    /// A deadline that [`Timers::touch`] pushes out.
    pub(crate) fn set_idle(&mut self, which: Deadline, after: Option<Duration>) {
        self.idle_for[which as usize] = after;
        self.set(which, after);
    }

    /// Something moved.
    pub(crate) fn touch(&mut self, which: Deadline) {
        if let Some(after) = self.idle_for[which as usize] {
            self.set(which, Some(after));
        }
    }

    pub(crate) fn clear(&mut self, which: Deadline) {
        self.at[which as usize] = None;
        self.idle_for[which as usize] = None;
    }

    /// Ready with the earliest deadline that passed.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Deadline> {
        const ALL: [Deadline; COUNT] = [
            Deadline::Global,
            Deadline::PerTry,
            Deadline::PerTryIdle,
            Deadline::Idle,
            Deadline::Request,
            Deadline::Stream,
            Deadline::UpstreamStream,
            Deadline::Log,
        ];
        self.waited();
        loop {
            let Some((which, at)) =
                ALL.iter().filter_map(|d| self.at[*d as usize].map(|at| (*d, at))).min_by_key(|(_, at)| *at)
            else {
                return Poll::Pending;
            };
            let sleep = match &mut self.sleep {
                Some(sleep) => {
                    // A timer that fires too early is set again; moving it for every byte would cost more.
                    if sleep.deadline().into_std() > at {
                        sleep.as_mut().reset(at.into());
                    }
                    sleep
                }
                None => self.sleep.insert(Box::pin(tokio::time::sleep_until(at.into()))),
            };
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= at {
                self.at[which as usize] = None;
                return Poll::Ready(which);
            }
            sleep.as_mut().reset(at.into());
        }
    }
}

use std::future::Future;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_earliest_fires() {
        let mut timers = Timers::default();
        timers.set(Deadline::Global, Some(Duration::from_millis(20)));
        timers.set(Deadline::PerTry, Some(Duration::ZERO));
        assert_eq!(std::future::poll_fn(|cx| timers.poll(cx)).await, Deadline::PerTry);
    }
}
