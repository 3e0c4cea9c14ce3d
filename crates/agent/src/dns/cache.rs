//! Answers of the pod's resolver, kept as long as their own TTLs allow and counted down like any resolver does.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::message::{self, TYPE_OPT, TYPE_SOA};

/// Answers that are kept at most; the oldest half goes when there are more.
const MAX_ENTRIES: usize = 2048;
/// Bytes of an answer that is kept.
const MAX_ANSWER: usize = 4096;
/// An answer is not kept for longer, whatever its TTL says. RFC 8767, section 4, suggests days at most; a pod is short-lived.
const MAX_AGE: Duration = Duration::from_secs(3600);

/// The cache. The key is a query without its id, so only equal questions, options and flags share an answer.
#[derive(Debug, Default)]
pub(super) struct Cache {
    /// Held for one lookup or insertion.
    entries: Mutex<HashMap<Key, Entry>>,
}

type Key = (bool, Box<[u8]>);

#[derive(Debug)]
struct Entry {
    answer: Box<[u8]>,
    since: Instant,
    until: Instant,
}

impl Cache {
    /// The answer to `query`, with the id of the query and TTLs of the moment.
    pub(super) fn get(&self, query: &[u8], tcp: bool, now: Instant) -> Option<Vec<u8>> {
        let key = (tcp, Box::from(query.get(2..)?));
        let (mut answer, age) = {
            let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            let entry = entries.get(&key).filter(|entry| now < entry.until)?;
            (entry.answer.to_vec(), now.duration_since(entry.since).as_secs())
        };
        answer[..2].copy_from_slice(&query[..2]);
        let age = u32::try_from(age).unwrap_or(u32::MAX);
        for at in ttls(&answer)?.into_iter().map(|(at, ..)| at) {
            let left = u32::from_be_bytes(answer[at..at + 4].try_into().ok()?).saturating_sub(age);
            answer[at..at + 4].copy_from_slice(&left.to_be_bytes());
        }
        Some(answer)
    }

    /// Keeps an answer if it may be kept.
    pub(super) fn put(&self, query: &[u8], tcp: bool, answer: &[u8], now: Instant) {
        let Some(life) = lifetime(answer) else { return };
        let Some(rest) = query.get(2..) else { return };
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= MAX_ENTRIES {
            entries.retain(|_, entry| now < entry.until);
            if entries.len() >= MAX_ENTRIES {
                let mut ages: Vec<Instant> = entries.values().map(|entry| entry.since).collect();
                ages.sort_unstable();
                let middle = ages[ages.len() / 2];
                entries.retain(|_, entry| entry.since > middle);
            }
        }
        let entry = Entry { answer: answer.into(), since: now, until: now + life };
        entries.insert((tcp, rest.into()), entry);
    }
}

/// How long an answer may be kept: the least of its TTLs, for negative answers that of RFC 2308, section 5. `None`: not at all.
fn lifetime(answer: &[u8]) -> Option<Duration> {
    const TRUNCATED: u8 = 0x02;
    let (flags, code) = (*answer.get(2)?, *answer.get(3)? & 0x0f);
    if answer.len() > MAX_ANSWER || flags & TRUNCATED != 0 || !(code == 0 || code == message::NAME_ERROR) {
        return None;
    }
    let records = ttls(answer)?;
    let answers = usize::from(u16::from_be_bytes([answer[6], answer[7]]));
    let least = records.iter().map(|(_, ttl, ..)| *ttl).min()?;
    let life = if answers == 0 || code == message::NAME_ERROR {
        let (_, ttl, _, end) = *records.iter().find(|(_, _, kind, _)| *kind == TYPE_SOA)?;
        let minimum = u32::from_be_bytes(answer.get(end.checked_sub(4)?..end)?.try_into().ok()?);
        ttl.min(minimum).min(least)
    } else {
        least
    };
    (life > 0).then(|| Duration::from_secs(life.into()).min(MAX_AGE))
}

/// Where each record's TTL is, the TTL, the record's type and end. Options have none.
fn ttls(answer: &[u8]) -> Option<Vec<(usize, u32, u16, usize)>> {
    let mut found = Vec::new();
    for record in message::records(answer)? {
        if record.kind != TYPE_OPT {
            found.push((record.ttl_at, record.ttl, record.kind, record.data.end));
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A query for `a.` and an answer with these records: (type, ttl, data).
    fn exchange(code: u8, sections: (u8, u8), records: &[(u16, u32, &[u8])]) -> (Vec<u8>, Vec<u8>) {
        let question = [1, b'a', 0, 0, 1, 0, 1];
        let query = [&[0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0], &question[..]].concat();
        let mut answer = [&[0, 7, 0x81, 0x80 | code, 0, 1, 0, sections.0, 0, sections.1, 0, 0], &question[..]].concat();
        for (kind, ttl, data) in records {
            answer.extend_from_slice(&[0xc0, 12]);
            answer.extend_from_slice(&kind.to_be_bytes());
            answer.extend_from_slice(&[0, 1]);
            answer.extend_from_slice(&ttl.to_be_bytes());
            answer.extend_from_slice(&(data.len() as u16).to_be_bytes());
            answer.extend_from_slice(data);
        }
        (query, answer)
    }

    #[test]
    fn ttls_count_down_and_end() {
        let (cache, now) = (Cache::default(), Instant::now());
        let (query, answer) = exchange(0, (2, 0), &[(1, 60, &[1, 2, 3, 4]), (1, 30, &[1, 2, 3, 5])]);
        cache.put(&query, false, &answer, now);
        let mut other = query.clone();
        other[1] = 9;
        let later = cache.get(&other, false, now + Duration::from_secs(10)).unwrap();
        let ttls: Vec<u32> = ttls(&later).unwrap().into_iter().map(|(_, ttl, ..)| ttl).collect();
        assert_eq!((later[1], ttls), (9, vec![50, 20]), "the id is the query's, the TTLs are what is left");
        assert_eq!(cache.get(&query, false, now + Duration::from_secs(30)), None);
        assert_eq!(cache.get(&query, true, now), None, "UDP and TCP answers differ in size");
    }

    #[test]
    fn negative_answers_live_as_their_soa_says() {
        let soa = [&[0, 0][..], &[0; 16], &5u32.to_be_bytes()].concat();
        for code in [0, message::NAME_ERROR] {
            let (_, answer) = exchange(code, (0, 1), &[(TYPE_SOA, 900, &soa)]);
            assert_eq!(lifetime(&answer), Some(Duration::from_secs(5)));
        }
        assert_eq!(lifetime(&exchange(message::NAME_ERROR, (0, 0), &[]).1), None, "without an SOA nobody knows");
    }

    #[test]
    fn failures_truncated_and_momentary_answers_are_not_kept() {
        assert_eq!(lifetime(&exchange(message::SERVER_FAILURE, (1, 0), &[(1, 60, &[1, 2, 3, 4])]).1), None);
        assert_eq!(lifetime(&exchange(0, (1, 0), &[(1, 0, &[1, 2, 3, 4])]).1), None);
        let (_, mut answer) = exchange(0, (1, 0), &[(1, 60, &[1, 2, 3, 4])]);
        answer[2] |= 2;
        assert_eq!(lifetime(&answer), None);
        for length in 0..answer.len() {
            let _ = lifetime(&answer[..length]);
        }
    }

    #[test]
    fn the_cache_is_bounded() {
        let (cache, now) = (Cache::default(), Instant::now());
        let (query, answer) = exchange(0, (1, 0), &[(1, 60, &[1, 2, 3, 4])]);
        for i in 0..3 * MAX_ENTRIES {
            let query = [&query[..], &i.to_be_bytes()].concat();
            cache.put(&query, false, &answer, now + Duration::from_millis(i as u64));
        }
        assert!(cache.entries.lock().unwrap().len() <= MAX_ENTRIES);
    }
}
