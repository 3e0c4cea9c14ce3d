//! PINGs that find dead HTTP/2 connections (Envoy `Http2::ConnectionImpl::sendKeepalive`).

use crate::wire::Connection;
use crate::worker::Worker;
use proxy_core::cluster::Keepalive;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};
use tokio::time::Sleep;

/// Counts connections that ended because a PING was not answered: of a cluster, and of all listeners.
pub(crate) const KEEPALIVE_TIMEOUT: &str = "http2.keepalive_timeout";

/// When the peer last said anything, and whether somebody wants to know that it is there.
#[derive(Debug)]
pub(crate) struct Pulse {
    heard: Cell<Instant>,
    asked: Cell<bool>,
    pinger: RefCell<Option<Waker>>,
}

impl Pulse {
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self { heard: Cell::new(Instant::now()), asked: Cell::new(false), pinger: RefCell::default() })
    }

    /// Bytes came.
    pub(crate) fn beat(&self) {
        self.heard.set(Instant::now());
    }

    /// Before a request: asks when nothing was heard for so long.
    pub(crate) fn ask_after(&self, idle: Duration) {
        if self.heard.get().elapsed() >= idle {
            self.asked.set(true);
            if let Some(pinger) = self.pinger.take() {
                pinger.wake();
            }
        }
    }
}

/// What a PING carries, as Envoy's do: milliseconds since 1970.
fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// The PINGs of a connection. They are answered and sent in turns of its driver, who asks this before each.
pub(crate) struct Pinger {
    config: Keepalive,
    pings: Connection,
    pulse: Rc<Pulse>,
    worker: Rc<Worker>,
    next: Option<Instant>,
    /// When the PING that is not answered went out.
    sent: Option<Instant>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Pinger {
    pub(crate) fn new(config: Keepalive, pings: Connection, pulse: Rc<Pulse>, worker: Rc<Worker>) -> Self {
        let mut pinger = Self { config, pings, pulse, worker, next: None, sent: None, sleep: None };
        pinger.plan();
        pinger
    }

    /// The next PING, with jitter.
    fn plan(&mut self) {
        self.next = self.config.interval.map(|interval| {
            let most = interval.as_millis() as u64 * u64::from(self.config.jitter_percent) / 100;
            let jitter = self.worker.random.borrow_mut().below(most);
            Instant::now() + interval + Duration::from_millis(jitter)
        });
    }

    /// Ready when the peer did not answer in time: the connection is dead.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let due = if let Some(sent) = self.sent {
                if self.pings.take_pongs() > 0 {
                    self.sent = None;
                    self.plan();
                    continue;
                }
                // Whatever comes shows that the peer is there; its answer may stand behind that.
                Some(sent.max(self.pulse.heard.get()) + self.config.timeout)
            } else {
                if self.pulse.asked.take() || self.next.is_some_and(|next| next <= Instant::now()) {
                    self.pings.ping(now_ms());
                    self.sent = Some(Instant::now());
                    continue;
                }
                self.pulse.pinger.replace(Some(cx.waker().clone()));
                self.next
            };
            let Some(due) = due else { return Poll::Pending };
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due.into())));
            if sleep.deadline() != due.into() {
                sleep.as_mut().reset(due.into());
            }
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if self.sent.is_some() {
                return Poll::Ready(());
            }
        }
    }
}
