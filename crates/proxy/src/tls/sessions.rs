//! Sessions that clients may resume, for as long as the context allows.

use super::TlsError;
use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::digest::{SHA256, digest};
use proxy_core::tls::TICKET_KEY_LENGTH;
use rustls::server::{ProducesTickets, ServerSessionMemoryCache, StoresServerSessions};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long sessions may be resumed if nothing is said (BoringSSL `SSL_DEFAULT_SESSION_TIMEOUT`).
const TIMEOUT: Duration = Duration::from_secs(2 * 60 * 60);

/// Tickets that every process opens which has one of the keys.
pub(super) struct Tickets {
    /// With the name that stands in front of what each has sealed.
    keys: Vec<(Vec<u8>, RandomizedNonceKey)>,
    /// What a session is for.
    context: Vec<u8>,
    lifetime: u32,
}

const NAME_LENGTH: usize = 16;

impl Tickets {
    /// `keys`: the first one seals. `context`: who has another one does not open them.
    pub(super) fn new(keys: &[Vec<u8>], context: &[u8], lifetime: Option<Duration>) -> Result<Arc<Self>, TlsError> {
        let key = |bytes: &Vec<u8>| {
            if bytes.len() != TICKET_KEY_LENGTH {
                return Err(TlsError::TicketKey(bytes.len()));
            }
            let key = RandomizedNonceKey::new(&AES_256_GCM, digest(&SHA256, bytes).as_ref())
                .map_err(|_| rustls::Error::General("a session ticket key is refused".into()))?;
            Ok((bytes[..NAME_LENGTH].to_vec(), key))
        };
        let lifetime = lifetime.unwrap_or(TIMEOUT).as_secs();
        Ok(Arc::new(Self {
            keys: keys.iter().map(key).collect::<Result<_, _>>()?,
            context: digest(&SHA256, context).as_ref().to_vec(),
            lifetime: u32::try_from(lifetime).unwrap_or(u32::MAX),
        }))
    }
}

impl std::fmt::Debug for Tickets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tickets({} keys)", self.keys.len())
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.lifetime
    }

    /// Name of the key, nonce, what is sealed.
    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let (name, key) = self.keys.first()?;
        let mut sealed = plain.to_vec();
        let nonce = key.seal_in_place_append_tag(Aad::from(&self.context), &mut sealed).ok()?;
        Some([name, &nonce.as_ref()[..], &sealed].concat())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (name, rest) = ticket.split_at_checked(NAME_LENGTH)?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        let (_, key) = self.keys.iter().find(|(own, _)| own == name)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let plain = key.open_in_place(nonce, Aad::from(&self.context), &mut sealed).ok()?;
        Some(plain.to_vec())
    }
}

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
    fn tickets_are_opened_by_who_has_the_key_and_the_context() {
        let (old, new) = (vec![1; TICKET_KEY_LENGTH], vec![2; TICKET_KEY_LENGTH]);
        let tickets = |keys: &[&Vec<u8>], context: &[u8]| {
            let keys: Vec<_> = keys.iter().map(|key| (*key).clone()).collect();
            Tickets::new(&keys, context, None).unwrap()
        };
        let ticket = tickets(&[&old], b"context").encrypt(b"session").unwrap();
        assert_eq!(tickets(&[&new, &old], b"context").decrypt(&ticket).as_deref(), Some(&b"session"[..]));
        assert_eq!(tickets(&[&new], b"context").decrypt(&ticket), None);
        assert_eq!(tickets(&[&old], b"another").decrypt(&ticket), None);
        assert_eq!(tickets(&[&old], b"context").decrypt(&ticket[..20]), None);
        assert!(matches!(Tickets::new(&[vec![1; 79]], b"", None), Err(TlsError::TicketKey(79))));
    }

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
