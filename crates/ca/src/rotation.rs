//! Replacing the root without a moment in which anybody distrusts anybody: the new root is trusted before it signs, the old one
//! until all that it signed has expired.
//!
//! ```text
//!  rotate ─► old signs, both trusted ─► (everybody has both) ─► activate ─► new signs, both trusted ─► (time) ─► new alone
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rcgen::{Issuer, KeyPair};

/// What signs: the key of one CA certificate, which never leaves it.
pub(crate) struct Signer {
    pub(crate) issuer: Issuer<'static, KeyPair>,
    /// PEM of the CA certificate and the intermediates above it, without the root; empty when we are the root.
    pub(crate) intermediates: String,
    pub(crate) root: String,
    pub(crate) not_after: SystemTime,
    /// When the longest-lived certificate of ours ends, in seconds of the epoch.
    last: AtomicU64,
}

impl Signer {
    pub(crate) fn new(
        issuer: Issuer<'static, KeyPair>,
        intermediates: String,
        root: String,
        not_after: SystemTime,
    ) -> Signer {
        Signer { issuer, intermediates, root, not_after, last: AtomicU64::new(0) }
    }

    /// Remembers that something of ours is valid until then.
    pub(crate) fn signed_until(&self, not_after: SystemTime) {
        let seconds = not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        self.last.fetch_max(seconds, Ordering::Relaxed);
    }
}

/// The signer in use, with those before and after it.
pub(crate) struct Signers {
    /// Written by a rotation, twice in years; read for each signature.
    state: RwLock<State>,
    generation: AtomicU64,
}

struct State {
    current: Arc<Signer>,
    next: Option<Arc<Signer>>,
    retired: Vec<Retired>,
}

struct Retired {
    root: String,
    /// Nothing it signed is valid after this.
    until: SystemTime,
}

impl Signers {
    pub(crate) fn new(first: Signer) -> Signers {
        let state = State { current: Arc::new(first), next: None, retired: Vec::new() };
        Signers { state: RwLock::new(state), generation: AtomicU64::new(0) }
    }

    pub(crate) fn current(&self) -> Arc<Signer> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).current.clone()
    }

    /// All roots to trust now as PEM, the signing one first.
    pub(crate) fn bundle(&self, now: SystemTime) -> String {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let next = state.next.iter().map(|signer| signer.root.as_str());
        let retired = state.retired.iter().filter(|retired| now < retired.until).map(|retired| retired.root.as_str());
        let mut bundle = String::new();
        for root in std::iter::once(state.current.root.as_str()).chain(next).chain(retired) {
            bundle.push_str(root.trim_end());
            bundle.push('\n');
        }
        bundle
    }

    /// Counts changes of the signer and of the bundle.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Trusts another root; one that was announced before and never signed is forgotten.
    pub(crate) fn announce(&self, next: Signer) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).next = Some(Arc::new(next));
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Signs with the announced root from now on; false if there is none.
    pub(crate) fn activate(&self, clock_skew: Duration) -> bool {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let Some(next) = state.next.take() else { return false };
        let old = std::mem::replace(&mut state.current, next);
        let until = SystemTime::UNIX_EPOCH + Duration::from_secs(old.last.load(Ordering::Relaxed)) + clock_skew;
        state.retired.push(Retired { root: old.root.clone(), until });
        drop(state);
        self.generation.fetch_add(1, Ordering::Release);
        true
    }
}
