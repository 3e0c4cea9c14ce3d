//! Keys of those who issue tokens, and tokens that were found good; each worker keeps its own.

use crate::internal;
use crate::jwks::{Jwks, Token};
use crate::stats::HttpStats;
use crate::worker::Worker;
use bytes::Bytes;
use proxy_core::Headers;
use proxy_core::filters::{HttpFilter, HttpFilterEntry, JwksSource, JwtAuthn, JwtProvider};
use proxy_core::hcm::HttpConnectionManager;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// What a worker keeps of the providers of its configurations.
#[derive(Default)]
pub(crate) struct Kept(RefCell<HashMap<usize, OfProvider>>);

struct OfProvider {
    /// As long as this is here, nothing else has the provider's address.
    owner: Weak<JwtProvider>,
    keys: Option<Arc<Jwks>>,
    /// What the keys were read from.
    document: Bytes,
    /// When the keys are stale.
    until: Option<Instant>,
    /// Keys are fetched ahead.
    ahead: bool,
    tokens: Tokens,
}

impl Kept {
    fn of<T>(&self, provider: &Arc<JwtProvider>, use_it: impl FnOnce(&mut OfProvider) -> T) -> T {
        let mut kept = self.0.borrow_mut();
        let key = Arc::as_ptr(provider) as usize;
        if !kept.contains_key(&key) {
            // Providers come with configurations, so this is the time to forget those of earlier ones.
            kept.retain(|_, of| of.owner.strong_count() > 0);
        }
        use_it(kept.entry(key).or_insert_with(|| OfProvider {
            owner: Arc::downgrade(provider),
            keys: None,
            document: Bytes::new(),
            until: None,
            ahead: false,
            tokens: Tokens::default(),
        }))
    }

    /// A provider's keys, if they are known and not stale.
    pub(super) fn keys(&self, provider: &Arc<JwtProvider>) -> Option<Arc<Jwks>> {
        self.of(provider, |of| of.keys.clone().filter(|_| of.until.is_none_or(|until| Instant::now() < until)))
    }

    /// A token that was good, if it still is.
    pub(super) fn token(&self, provider: &Arc<JwtProvider>, text: &str, now: u64) -> Option<Rc<Token>> {
        provider.token_cache?;
        let skew = provider.clock_skew.as_secs();
        self.of(provider, |of| of.tokens.find(text, |token| token.check_time(now, skew).is_ok()))
    }

    /// Keeps a good token, if the provider says so.
    pub(super) fn keep(&self, provider: &Arc<JwtProvider>, text: &str, token: &Rc<Token>) {
        if let Some(cache) = provider.token_cache.filter(|cache| text.len() <= cache.longest) {
            self.of(provider, |of| of.tokens.keep(text, token.clone(), cache.most));
        }
    }
}

/// Good tokens by their text; the one that was not asked for longest leaves first.
#[derive(Default)]
struct Tokens {
    by_text: HashMap<Rc<str>, (u64, Rc<Token>)>,
    by_use: BTreeMap<u64, Rc<str>>,
    uses: u64,
}

impl Tokens {
    fn find(&mut self, text: &str, is_good: impl FnOnce(&Token) -> bool) -> Option<Rc<Token>> {
        let (used, token) = self.by_text.get_mut(text)?;
        let name = self.by_use.remove(used)?;
        if !is_good(token) {
            self.by_text.remove(text);
            return None;
        }
        self.uses += 1;
        *used = self.uses;
        self.by_use.insert(self.uses, name);
        Some(token.clone())
    }

    fn keep(&mut self, text: &str, token: Rc<Token>, most: usize) {
        if self.by_text.contains_key(text) {
            return;
        }
        while self.by_text.len() >= most.max(1)
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.by_text.remove(&oldest);
        }
        self.uses += 1;
        let text: Rc<str> = text.into();
        self.by_use.insert(self.uses, text.clone());
        self.by_text.insert(text, (self.uses, token));
    }
}

/// A provider's keys: out of the configuration, or fetched; they are kept. `config`: its filter.
pub(super) async fn fetch(
    worker: &Rc<Worker>,
    stats: &HttpStats,
    config: &JwtAuthn,
    provider: &Arc<JwtProvider>,
) -> Option<Arc<Jwks>> {
    let (text, until) = match &provider.jwks {
        JwksSource::Local(source) => (crate::tls::read_source(source).ok().map(Bytes::from), None),
        JwksSource::Remote { uri, cluster, timeout, cache, retries, ahead } => {
            let rest = uri.split_once("://").map_or(&**uri, |(_, rest)| rest);
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let mut headers = Headers::of([(":method", "GET"), (":scheme", "http"), (":authority", host)]);
            headers.push(b":path", if path.is_empty() { b"/" } else { path.as_bytes() });
            headers.push(b"user-agent", b"Go-browser");
            internal::mark(worker, &mut headers, Some(*timeout));
            let body = document(worker, cluster, headers, *timeout, *retries).await;
            let good = body.as_ref().is_some_and(|text| Jwks::parse(text).is_some());
            let counters = &config.counters;
            stats.other.inc(if good { &counters.jwks_fetch_success } else { &counters.jwks_fetch_failed });
            // Who fetches ahead does so before they are stale.
            (body, (ahead.is_none()).then(|| Instant::now() + *cache))
        }
    };
    let text = text?;
    let keys = Arc::new(Jwks::parse(&text)?);
    worker.keys.of(provider, |of| {
        if of.document != text {
            // DIFFERS: tokens that were good by keys which are no more are looked at again; Envoy lets them pass until they expire.
            of.tokens = Tokens::default();
        }
        (of.keys, of.document, of.until) = (Some(keys.clone()), text, until);
    });
    Some(keys)
}

/// Fetches a document, if need be several times, all of which takes at most `timeout`; `None`: none came.
async fn document(
    worker: &Rc<Worker>,
    cluster: &str,
    mut headers: Headers,
    timeout: Duration,
    retries: Option<(u32, Duration, Duration)>,
) -> Option<Bytes> {
    let (tries, base, most) = retries.unwrap_or_default();
    let ends = Instant::now() + timeout;
    for attempt in 0..=tries {
        let left = ends.saturating_duration_since(Instant::now());
        let own = if tries > 0 { left.min(most) } else { left };
        if tries > 0 {
            headers.set("x-envoy-expected-rq-timeout-ms", own.as_millis().to_string().as_bytes());
        }
        match internal::ask(worker, cluster, headers.clone(), Bytes::new(), own, 1 << 20).await {
            Some((200, _, body)) => return Some(body),
            // Only what a later try may mend is tried again.
            Some((status, ..)) if status < 500 => return None,
            _ if attempt == tries || Instant::now() >= ends => return None,
            _ => {}
        }
        let longest = (base * 2u32.saturating_pow(attempt)).min(most);
        let pause = worker.random.borrow_mut().below(longest.as_millis().max(1) as u64);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    None
}

/// Keys are fetched again so long before they are stale (Envoy `JwksAsyncFetcher`).
const BEFORE: Duration = Duration::from_secs(5);

/// Whether there is anything to fetch ahead.
pub(crate) fn fetches_ahead(http: &HttpConnectionManager) -> bool {
    let is_ahead = |of: &Arc<JwtProvider>| matches!(&of.jwks, JwksSource::Remote { ahead: Some(_), .. });
    let any =
        |entry: &HttpFilterEntry| matches!(&entry.filter, HttpFilter::Jwt(jwt) if jwt.providers.iter().any(is_ahead));
    http.filters.iter().any(any)
}

/// Begins to fetch the keys that are fetched ahead (`async_fetch`), and goes on as long as the configuration is there.
///
/// DIFFERS: Envoy's main thread fetches for all workers, and listeners without `fast_listener` wait for the first answer; here
/// each worker fetches, and a request that comes before the answer fetches, too.
pub(crate) fn fetch_ahead(worker: &Rc<Worker>, http: &HttpConnectionManager) {
    for entry in &http.filters {
        let HttpFilter::Jwt(config) = &entry.filter else { continue };
        for provider in &config.providers {
            let JwksSource::Remote { ahead: Some(failed), cache, .. } = &provider.jwks else { continue };
            if worker.keys.of(provider, |of| std::mem::replace(&mut of.ahead, true)) {
                continue;
            }
            let again = if *cache > BEFORE { *cache - BEFORE } else { *cache };
            let (failed, stats) = (*failed, worker.http_stats(&http.stat_prefix));
            let (worker, config) = (Rc::downgrade(worker), Arc::downgrade(config));
            let provider = Arc::downgrade(provider);
            // Ends with the configuration, or with the worker.
            tokio::task::spawn_local(async move {
                while let (Some(worker), Some(config), Some(provider)) =
                    (worker.upgrade(), config.upgrade(), provider.upgrade())
                {
                    let came = fetch(&worker, &stats, &config, &provider).await.is_some();
                    drop((worker, config, provider));
                    tokio::time::sleep(if came { again } else { failed }).await;
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_that_was_not_used_longest_leaves() {
        let token = |text: &str| {
            use base64::Engine as _;
            let encode = |text: &str| base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(text);
            let text = format!("{}.{}.aa", encode(r#"{"alg":"HS256"}"#), encode(&format!(r#"{{"sub":"{text}"}}"#)));
            Rc::new(Token::parse(&text).unwrap())
        };
        let mut tokens = Tokens::default();
        for name in ["a", "b"] {
            tokens.keep(name, token(name), 2);
        }
        assert!(tokens.find("a", |_| true).is_some());
        tokens.keep("c", token("c"), 2);
        assert!(tokens.find("b", |_| true).is_none());
        assert!(tokens.find("a", |_| false).is_none());
        assert!(tokens.find("a", |_| true).is_none());
        assert!(tokens.find("c", |_| true).is_some());
        assert_eq!((tokens.by_text.len(), tokens.by_use.len()), (1, 1));
    }
}
