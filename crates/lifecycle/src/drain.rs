//! Ending in order: one says "start draining", many say "I am done".
//!
//! ```
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let (trigger, watch) = lifecycle::drain::channel();
//! let connection = tokio::spawn(async move {
//!     watch.started().await; // … finish the request under way …
//!     drop(watch);           // done
//! });
//! assert!(trigger.drain(std::time::Duration::from_secs(5)).await);
//! # connection.await.unwrap();
//! # });
//! ```

use std::time::Duration;

use tokio::sync::{mpsc, watch};

/// Starts the drain and waits for its end. Held by the owner of the tasks.
#[derive(Debug)]
pub struct Trigger {
    start: watch::Sender<bool>,
    /// Closes when the last [`Watch`] is dropped; nothing is ever sent.
    done: mpsc::Receiver<()>,
}

/// Hears of the drain's start; while it lives, the drain is not done. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Watch {
    start: watch::Receiver<bool>,
    _busy: mpsc::Sender<()>,
}

/// A trigger and the first watch.
pub fn channel() -> (Trigger, Watch) {
    let (start, started) = watch::channel(false);
    let (busy, done) = mpsc::channel(1);
    (Trigger { start, done }, Watch { start: started, _busy: busy })
}

impl Trigger {
    /// Tells all participants to finish; does not wait.
    pub fn start(&self) {
        self.start.send_replace(true);
    }

    /// Waits until every watch is dropped, drained or not.
    pub async fn finished(&mut self) {
        // `recv` gives `None` exactly when the last sender is gone.
        while self.done.recv().await.is_some() {}
    }

    /// Starts the drain and waits up to `limit`; false if participants were still busy then.
    pub async fn drain(mut self, limit: Duration) -> bool {
        self.start();
        tokio::time::timeout(limit, self.finished()).await.is_ok()
    }
}

impl Watch {
    /// Waits for the drain to start, or for its trigger to be dropped, which means the same.
    pub async fn started(&self) {
        let mut start = self.start.clone();
        let _ = start.wait_for(|started| *started).await; // Err: the trigger is gone
    }

    /// Whether the drain has started.
    pub fn is_started(&self) -> bool {
        *self.start.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_for_the_slowest_and_no_longer_than_the_limit() {
        let (trigger, watch) = channel();
        let slow = watch.clone();
        tokio::spawn(async move {
            slow.started().await;
            tokio::time::sleep(Duration::from_secs(3)).await;
        });
        drop(watch);
        assert!(trigger.drain(Duration::from_secs(4)).await);

        let (trigger, watch) = channel();
        assert!(!watch.is_started());
        assert!(!trigger.drain(Duration::from_secs(4)).await);
        assert!(watch.is_started());
    }

    #[tokio::test]
    async fn a_dropped_trigger_starts_the_drain() {
        let (trigger, watch) = channel();
        drop(trigger);
        watch.started().await;
    }
}
