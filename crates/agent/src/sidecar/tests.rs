use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::dataplane::Later;

/// A proxy of whose connections one ends each time they are counted.
#[derive(Default)]
struct Fake {
    open: AtomicU64,
    drained: AtomicU64,
}

impl DataPlane for Fake {
    fn ready(&self) -> Later<'_, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }
    fn prometheus<'a>(&'a self, _query: &'a str) -> Later<'a, Result<String, String>> {
        Box::pin(async { Ok(String::new()) })
    }
    fn drain(&self) -> Later<'_, ()> {
        self.drained.fetch_add(1, Ordering::Relaxed);
        Box::pin(async {})
    }
    fn active_connections(&self) -> Later<'_, Option<u64>> {
        let open = self.open.load(Ordering::Relaxed);
        self.open.store(open.saturating_sub(1), Ordering::Relaxed);
        Box::pin(async move { Some(open) })
    }
    fn stop(&self) -> Later<'_, ()> {
        Box::pin(async {})
    }
    fn ended(&self) -> Later<'_, ()> {
        Box::pin(std::future::pending())
    }
}

fn drain(exit_on_zero: bool) -> Drain {
    let seconds = Duration::from_secs;
    Drain { listeners: seconds(45), termination: seconds(30), minimum: seconds(5), exit_on_zero, deadline: None }
}

async fn time_to_end(open: u64, drain: Drain, controls: &Controls) -> Duration {
    let proxy = Fake { open: AtomicU64::new(open), ..Fake::default() };
    let mut signals = Signals::listen().unwrap();
    let started = Instant::now();
    terminate(&proxy, drain, Shutdown::Terminate, &mut signals, controls).await;
    assert_eq!(proxy.drained.load(Ordering::Relaxed), 1);
    started.elapsed()
}

#[tokio::test(start_paused = true)]
async fn by_default_the_drain_takes_its_time() {
    assert_eq!(time_to_end(0, drain(false), &Controls::default()).await.as_secs(), 30);
}

#[tokio::test(start_paused = true)]
async fn with_exit_on_zero_it_ends_with_the_last_connection_but_not_before_the_minimum() {
    assert_eq!(time_to_end(0, drain(true), &Controls::default()).await.as_secs(), 5);
    let ended = time_to_end(3, drain(true), &Controls::default()).await;
    assert_eq!(ended, Duration::from_secs(5) + 3 * CONNECTIONS_CHECK);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_ends_a_drain_whatever_is_open() {
    let late = Drain { deadline: Some(Duration::from_secs(9)), ..drain(true) };
    assert_eq!(time_to_end(u64::MAX, late, &Controls::default()).await.as_secs(), 9);
}

#[tokio::test(start_paused = true)]
async fn quitting_ends_the_drain() {
    let controls = Controls::default();
    controls.quit.notify_one();
    assert_eq!(time_to_end(9, drain(true), &controls).await.as_secs(), 0);
}
