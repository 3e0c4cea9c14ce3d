//! Sessions that clients may resume, for as long as the context allows.

use rustls::server::{ServerSessionMemoryCache, StoresServerSessions};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Room for so many sessions; `timeout`: none is resumed after this.
pub(super) fn storage(room: usize, timeout: Option<Duration>) -> Arc<dyn StoresServerSessions> {
    let kept = ServerSessionMemoryCache::new(room);
    match timeout.filter(|timeout| !timeout.is_zero()) {
        None => kept,
        Some(timeout) => Arc::new(Aging { kept, timeout, start: Instant::now() }),
    }
}

/// Puts the time in front of what is kept.
#[derive(Debug)]
struct Aging {
    kept: Arc<ServerSessionMemoryCache>,
    timeout: Duration,
    start: Instant,
}

impl Aging {
    fn fresh(&self, kept: Option<Vec<u8>>, now: Duration) -> Option<Vec<u8>> {
        let kept = kept?;
        let (then, value) = kept.split_first_chunk::<8>()?;
        let age = now.saturating_sub(Duration::from_millis(u64::from_be_bytes(*then)));
        (age < self.timeout).then(|| value.to_vec())
    }
}

impl StoresServerSessions for Aging {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        let now = self.start.elapsed().as_millis() as u64;
        self.kept.put(key, [&now.to_be_bytes()[..], &value].concat())
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.fresh(self.kept.get(key), self.start.elapsed())
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.fresh(self.kept.take(key), self.start.elapsed())
    }

    fn can_cache(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_age() {
        let timeout = Duration::from_secs(10);
        let aging = Aging { kept: ServerSessionMemoryCache::new(8), timeout, start: Instant::now() };
        assert!(aging.put(b"key".to_vec(), b"value".to_vec()));
        let kept = || aging.kept.get(b"key");
        assert_eq!(aging.fresh(kept(), Duration::from_secs(9)).as_deref(), Some(&b"value"[..]));
        assert_eq!(aging.fresh(kept(), Duration::from_secs(100)), None);
        assert_eq!(aging.take(b"key").as_deref(), Some(&b"value"[..]));
        assert_eq!(aging.get(b"key"), None);
    }
}
