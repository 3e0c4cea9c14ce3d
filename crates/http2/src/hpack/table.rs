//! The two tables that fields are looked up in (RFC 7541 2.3).

use std::collections::VecDeque;

/// What an entry counts beside its name and value (RFC 7541 4.1).
const OVERHEAD: usize = 32;
/// SETTINGS_HEADER_TABLE_SIZE before anything was said (RFC 9113 6.5.2).
pub(super) const DEFAULT_SIZE: u32 = 4096;

/// What an entry of these lengths counts.
pub(super) fn room(name: &[u8], value: &[u8]) -> usize {
    name.len() + value.len() + OVERHEAD
}

/// The static table (RFC 7541 appendix A). Index 1 is the first.
pub(super) static STATIC: [(&[u8], &[u8]); 61] = [
    (b":authority", b""),
    (b":method", b"GET"),
    (b":method", b"POST"),
    (b":path", b"/"),
    (b":path", b"/index.html"),
    (b":scheme", b"http"),
    (b":scheme", b"https"),
    (b":status", b"200"),
    (b":status", b"204"),
    (b":status", b"206"),
    (b":status", b"304"),
    (b":status", b"400"),
    (b":status", b"404"),
    (b":status", b"500"),
    (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"),
    (b"accept-language", b""),
    (b"accept-ranges", b""),
    (b"accept", b""),
    (b"access-control-allow-origin", b""),
    (b"age", b""),
    (b"allow", b""),
    (b"authorization", b""),
    (b"cache-control", b""),
    (b"content-disposition", b""),
    (b"content-encoding", b""),
    (b"content-language", b""),
    (b"content-length", b""),
    (b"content-location", b""),
    (b"content-range", b""),
    (b"content-type", b""),
    (b"cookie", b""),
    (b"date", b""),
    (b"etag", b""),
    (b"expect", b""),
    (b"expires", b""),
    (b"from", b""),
    (b"host", b""),
    (b"if-match", b""),
    (b"if-modified-since", b""),
    (b"if-none-match", b""),
    (b"if-range", b""),
    (b"if-unmodified-since", b""),
    (b"last-modified", b""),
    (b"link", b""),
    (b"location", b""),
    (b"max-forwards", b""),
    (b"proxy-authenticate", b""),
    (b"proxy-authorization", b""),
    (b"range", b""),
    (b"referer", b""),
    (b"refresh", b""),
    (b"retry-after", b""),
    (b"server", b""),
    (b"set-cookie", b""),
    (b"strict-transport-security", b""),
    (b"transfer-encoding", b""),
    (b"user-agent", b""),
    (b"vary", b""),
    (b"via", b""),
    (b"www-authenticate", b""),
];

/// The dynamic table (RFC 7541 2.3.2).
///
/// Nothing is allocated before the first entry, nor once it is warm: the bytes of all entries lie in one buffer, oldest
/// first, each entry in one piece. Evicted entries leave dead bytes in front, dropped when the buffer is full.
pub(super) struct Table {
    bytes: Vec<u8>,
    /// How many bytes were dropped in front of `bytes` so far: entries need not be touched when bytes move.
    dropped: u64,
    /// Newest first.
    entries: VecDeque<Entry>,
    size: usize,
    max: usize,
}

struct Entry {
    /// Where the name begins, counted from the first byte that was ever inserted. The value follows it.
    at: u64,
    name: u32,
    value: u32,
}

impl Table {
    pub(super) fn new(max: u32) -> Self {
        Self { bytes: Vec::new(), dropped: 0, entries: VecDeque::new(), size: 0, max: max as usize }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn max(&self) -> usize {
        self.max
    }

    /// RFC 7541 4.3.
    pub(super) fn set_max(&mut self, max: u32) {
        self.max = max as usize;
        self.evict(self.max);
    }

    /// The name and value of an entry; 0 is the newest.
    pub(super) fn get(&self, age: usize) -> Option<(&[u8], &[u8])> {
        let entry = self.entries.get(age)?;
        let entry_bytes = self.bytes.get((entry.at - self.dropped) as usize..)?;
        let (name, rest) = entry_bytes.split_at_checked(entry.name as usize)?;
        Some((name, rest.get(..entry.value as usize)?))
    }

    /// Makes the newest entry, after old ones made room. One larger than the table leaves it empty (RFC 7541 4.4).
    pub(super) fn insert(&mut self, name: &[u8], value: &[u8]) {
        let room = room(name, value);
        self.evict(self.max.saturating_sub(room));
        if room > self.max {
            return;
        }
        self.reserve(name.len() + value.len());
        let at = self.dropped + self.bytes.len() as u64;
        self.bytes.extend_from_slice(name);
        self.bytes.extend_from_slice(value);
        self.entries.push_front(Entry { at, name: name.len() as u32, value: value.len() as u32 });
        self.size += room;
    }

    fn evict(&mut self, limit: usize) {
        while self.size > limit
            && let Some(entry) = self.entries.pop_back()
        {
            self.size -= entry.name as usize + entry.value as usize + OVERHEAD;
        }
    }

    /// Room for `more` bytes. The buffer is at most twice as large as the table (or has 256 bytes). After dead bytes
    /// were dropped, half of it is free: each byte inserted moves another one at most once.
    fn reserve(&mut self, more: usize) {
        if self.bytes.len() + more <= self.bytes.capacity() {
            return;
        }
        let live = self.size - self.entries.len() * OVERHEAD;
        let dead = self.bytes.len() - live;
        self.bytes.drain(..dead);
        self.dropped += dead as u64;
        let wanted = ((live + more) * 2).next_power_of_two().clamp(256, (self.max * 2).max(256));
        if wanted > self.bytes.capacity() {
            self.bytes.reserve_exact(wanted - live);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_stays_small_and_keeps_its_newest() {
        let mut table = Table::new(4096);
        for i in 0..100_000u32 {
            let value = vec![b'a' + (i % 26) as u8; (i % 97) as usize];
            table.insert(b"name", &value);
            assert_eq!(table.get(0), Some((&b"name"[..], &value[..])));
            let oldest = i + 1 - table.len() as u32;
            let value = vec![b'a' + (oldest % 26) as u8; (oldest % 97) as usize];
            assert_eq!(table.get(table.len() - 1), Some((&b"name"[..], &value[..])));
            assert!(table.size <= 4096 && table.bytes.capacity() <= 8192 && table.entries.capacity() <= 256);
        }
        table.insert(b"", &[0; 4096]);
        assert_eq!((table.len(), table.size), (0, 0));
        table.insert(b"", &[0; 4064]);
        assert_eq!((table.len(), table.size), (1, 4096));
        table.set_max(4095);
        assert_eq!((table.len(), table.size), (0, 0));
    }

    #[test]
    fn nothing_is_allocated_before_the_first_entry() {
        let table = Table::new(4096);
        assert_eq!((table.bytes.capacity(), table.entries.capacity()), (0, 0));
    }
}
