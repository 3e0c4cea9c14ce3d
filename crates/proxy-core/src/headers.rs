use crate::text::Digits;
use std::borrow::Cow;

/// A message head: pseudo headers (`:method`, `:path`, `:status`, …) and headers, in order, as Envoy keeps them.
///
/// Names are lower case. All bytes lie in one buffer with an index beside it, so that building a head costs no
/// allocation per header, and [`clear`](Headers::clear) lets a connection reuse the memory for its next request.
/// Each header is a whole line there (`name: value`, CR, LF), as HTTP/1 writes it: a head that was read is copied at once
/// ([`block`](Headers::block)) and leaves in runs ([`write_lines`](Headers::write_lines)).
/// Replaced and removed lines stay in the buffer until it is cleared.
#[derive(Clone, Debug, Default)]
pub struct Headers {
    buffer: Vec<u8>,
    entries: Vec<Entry>,
    /// One bit for every name that was ever added: most names that somebody looks for are not there, which this
    /// says without a look at the entries.
    names: u128,
    /// Bits of names that were added when their bit was set already: perhaps they are there twice.
    again: u128,
    /// Only with `preserve_case`.
    written: Option<Box<WrittenNames>>,
}

/// How the peer wrote the names of a head, which goes on in the same way (Envoy `PreserveCaseHeaderFormatter`).
#[derive(Clone, Debug, Default)]
pub struct WrittenNames {
    names: Vec<Box<[u8]>>,
    /// Names that the peer did not write get capitals.
    pub proper_others: bool,
    /// The peer's reason phrase, if it is passed on.
    pub reason: Option<Box<str>>,
}

impl WrittenNames {
    /// No names yet.
    pub fn new(proper_others: bool) -> Self {
        Self { proper_others, ..Self::default() }
    }

    /// Takes a name down; the first spelling counts.
    pub fn remember(&mut self, name: &[u8]) {
        if self.get(name).is_none() {
            self.names.push(name.into());
        }
    }

    /// The spelling of a name.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.names.iter().find(|known| known.eq_ignore_ascii_case(name)).map(|known| &**known)
    }
}

/// Tells most names apart without a look at their bytes. Looked up by a fixed name it is computed when compiling, for
/// which all between there and here must be inlined.
#[inline(always)]
const fn tag(name: &[u8]) -> u32 {
    let length = name.len();
    if length == 0 {
        return 0;
    }
    let [first, middle, last] = [name[0] as u32, name[length / 2] as u32, name[length - 1] as u32];
    first | middle << 8 | last << 16 | (length as u32) << 24
}

/// The bit of a name with this tag.
#[inline(always)]
const fn bit(tag: u32) -> u128 {
    1 << (tag.wrapping_mul(0x9e37_79b1) >> 25)
}

/// Envoy's inline headers, which exist once, in requests and in responses (`INLINE_REQ_RESP_*` and custom ones). Sorted.
const SINGLE: [&str; 14] = [
    "cache-control",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "keep-alive",
    "proxy-connection",
    "proxy-status",
    "transfer-encoding",
    "upgrade",
    "via",
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-request-id",
];

/// Those of requests alone. Sorted.
const SINGLE_IN_REQUESTS: [&str; 49] = [
    "accept",
    "accept-encoding",
    "access-control-request-headers",
    "access-control-request-method",
    "access-control-request-private-network",
    "authorization",
    "cdn-loop",
    "expect",
    "grpc-accept-encoding",
    "grpc-timeout",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "origin",
    "pragma",
    "referer",
    "te",
    "user-agent",
    "x-client-trace-id",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-external-address",
    "x-envoy-force-trace",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-internal",
    "x-envoy-ip-tags",
    "x-envoy-is-timeout-retry",
    "x-envoy-max-retries",
    "x-envoy-original-host",
    "x-envoy-original-path",
    "x-envoy-original-url",
    "x-envoy-retriable-header-names",
    "x-envoy-retriable-status-codes",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-stream-duration-ms",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
];

/// Those of responses alone. Sorted.
const SINGLE_IN_RESPONSES: [&str; 23] = [
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-allow-private-network",
    "access-control-expose-headers",
    "access-control-max-age",
    "age",
    "date",
    "etag",
    "expires",
    "grpc-message",
    "grpc-status",
    "last-modified",
    "location",
    "server",
    "vary",
    "x-envoy-degraded",
    "x-envoy-immediate-health-check-fail",
    "x-envoy-ratelimited",
    "x-envoy-upstream-canary",
    "x-envoy-upstream-healthchecked-cluster",
    "x-envoy-upstream-service-time",
];

/// Where a header's line is.
#[derive(Clone, Copy, Debug)]
struct Entry {
    tag: u32,
    start: u32,
    name_len: u32,
    value_len: u32,
}

impl Entry {
    #[inline]
    fn name<'a>(&self, buffer: &'a [u8]) -> &'a [u8] {
        &buffer[self.start as usize..][..self.name_len as usize]
    }

    #[inline]
    fn value<'a>(&self, buffer: &'a [u8]) -> &'a [u8] {
        &buffer[self.value_start()..][..self.value_len as usize]
    }

    fn value_start(&self) -> usize {
        (self.start + self.name_len) as usize + SEPARATOR.len()
    }

    fn end(&self) -> usize {
        self.value_start() + self.value_len as usize + LINE_END.len()
    }

    #[inline]
    fn is(&self, tag: u32, name: &[u8], buffer: &[u8]) -> bool {
        self.tag == tag && self.name(buffer) == name
    }

    /// Whether the name starts with a colon.
    #[inline]
    fn is_pseudo(&self) -> bool {
        self.tag & 0xff == b':' as u32
    }
}

const SEPARATOR: [u8; 2] = *b": ";
const LINE_END: [u8; 2] = *b"\r\n";

impl Headers {
    /// No headers, no memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Room for so many headers with so many bytes of names and values.
    pub fn with_capacity(entries: usize, bytes: usize) -> Self {
        Self { buffer: Vec::with_capacity(bytes), entries: Vec::with_capacity(entries), ..Self::default() }
    }

    /// Forgets all headers and keeps the memory.
    pub fn clear(&mut self) {
        self.buffer.clear();
        self.entries.clear();
        self.names = 0;
        self.again = 0;
        self.written = None;
    }

    /// How names are written, when that is to be kept.
    pub fn written(&self) -> Option<&WrittenNames> {
        self.written.as_deref()
    }

    /// Keeps the peer's reason phrase, where names are kept.
    pub fn set_reason(&mut self, reason: Option<&str>) {
        if let Some(written) = &mut self.written {
            written.reason = reason.map(Into::into);
        }
    }

    /// Keeps how names are written.
    pub fn set_written(&mut self, names: WrittenNames) {
        self.written = Some(Box::new(names));
    }

    /// Number of headers, pseudo headers included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Sum of the lengths of all names and values (Envoy's `HeaderMap::byteSize`).
    pub fn byte_size(&self) -> usize {
        self.entries.iter().map(|e| (e.name_len + e.value_len) as usize).sum()
    }

    /// Number of the fields that HTTP/1 writes, and the sum of the lengths of their names and values: all but the pseudo headers,
    /// with `:authority` as `host`.
    pub fn line_sizes(&self) -> (usize, usize) {
        const AUTHORITY: u32 = tag(b":authority");
        self.entries.iter().fold((0, 0), |(count, bytes), e| match e.tag {
            AUTHORITY => (count + 1, bytes + "host".len() + e.value_len as usize),
            _ if e.is_pseudo() => (count, bytes),
            _ => (count + 1, bytes + (e.name_len + e.value_len) as usize),
        })
    }

    /// Adds a header behind the others, even if there is one of that name. The name is made lower case.
    ///
    /// Heads beyond 4 GiB in sum are not representable; the codecs limit them to far less, and what would not fit is dropped.
    pub fn push(&mut self, name: &[u8], value: &[u8]) {
        let start = self.buffer.len();
        if let Some(mut entry) = self.store(name, value) {
            let name = &mut self.buffer[start..][..name.len()];
            name.make_ascii_lowercase();
            entry.tag = tag(name);
            self.add_entry(entry);
        }
    }

    /// As [`push`](Headers::push), for a name that is in lower case.
    pub fn push_lower(&mut self, name: &str, value: &[u8]) {
        if let Some(entry) = self.store(name.as_bytes(), value) {
            self.add_entry(entry);
        }
    }

    fn add_entry(&mut self, entry: Entry) {
        let bit = bit(entry.tag);
        self.again |= self.names & bit;
        self.names |= bit;
        self.entries.push(entry);
    }

    /// Makes one of those headers that Envoy keeps only once, for a head that was read: the values with commas between them.
    pub fn join_single(&mut self) {
        let mut at = 0;
        while self.again != 0 && at + 1 < self.entries.len() {
            let Entry { tag, .. } = self.entries[at];
            if self.again & bit(tag) != 0 && self.entries[at + 1..].iter().any(|e| e.tag == tag) {
                self.join_from(at);
            }
            at += 1;
        }
    }

    /// So many of the headers are further ones of those that [`join_single`](Headers::join_single) makes one.
    pub fn repeated_single(&self) -> usize {
        let mut seen: Vec<&str> = Vec::new();
        let again = self.entries.iter().filter(|e| self.again & bit(e.tag) != 0);
        let names = again.filter_map(|e| std::str::from_utf8(e.name(&self.buffer)).ok());
        names
            .filter(|name| {
                let repeated = seen.contains(name);
                if !repeated && self.keeps_once(name) {
                    seen.push(name);
                }
                repeated
            })
            .count()
    }

    fn join_from(&mut self, at: usize) {
        let name = self.entries[at].name(&self.buffer).to_vec();
        let Ok(text) = std::str::from_utf8(&name) else { return };
        if !self.keeps_once(text) {
            return;
        }
        let values: Vec<&[u8]> = self.get_all(text).filter(|value| !value.is_empty()).collect();
        let joined = values.join(&b","[..]);
        self.set(text, &joined);
    }

    /// Puts a line behind the others; the name must be in lower case, or be made so.
    fn store(&mut self, name: &[u8], value: &[u8]) -> Option<Entry> {
        let start = self.buffer.len();
        let length = name.len() + value.len() + SEPARATOR.len() + LINE_END.len();
        u32::try_from(start + length).ok()?;
        self.buffer.reserve(length);
        self.buffer.extend_from_slice(name);
        self.buffer.extend_from_slice(&SEPARATOR);
        self.buffer.extend_from_slice(value);
        self.buffer.extend_from_slice(&LINE_END);
        let tag = tag(name);
        Some(Entry { tag, start: start as u32, name_len: name.len() as u32, value_len: value.len() as u32 })
    }

    /// Copies lines of a head as they are; says where they begin. They count once [`push_line`](Headers::push_line) names them.
    pub fn block(&mut self, lines: &[u8]) -> usize {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(lines);
        start
    }

    /// Adds the header whose line starts at `start` of the buffer, in a [`block`](Headers::block). It must be in the usual form
    /// (`name: value`, CR, LF); any other must be [pushed](Headers::push). `lower`: the name has no capitals.
    pub fn push_line(&mut self, start: usize, name_len: usize, value_len: usize, lower: bool) {
        if u32::try_from(self.buffer.len()).is_err() {
            return;
        }
        let name = &mut self.buffer[start..][..name_len];
        if !lower {
            name.make_ascii_lowercase();
        }
        let tag = tag(name);
        let entry = Entry { tag, start: start as u32, name_len: name_len as u32, value_len: value_len as u32 };
        debug_assert!(self.buffer[..entry.end()].ends_with(&LINE_END));
        self.add_entry(entry);
    }

    /// Writes all but the pseudo headers as lines.
    pub fn write_lines(&self, out: &mut Vec<u8>) {
        out.reserve(self.buffer.len());
        let mut run = 0..0;
        for entry in self.entries.iter().filter(|e| !e.is_pseudo()) {
            if entry.start as usize != run.end {
                out.extend_from_slice(&self.buffer[run]);
                run = entry.start as usize..0;
            }
            run.end = entry.end();
        }
        out.extend_from_slice(&self.buffer[run]);
    }

    /// The first value under this (lower-case) name.
    #[inline(always)]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.position(name).map(|i| self.entries[i].value(&self.buffer))
    }

    /// As [`get`](Headers::get), if the value is UTF-8.
    #[inline(always)]
    pub fn get_str(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.get(name)?).ok()
    }

    #[inline(always)]
    fn position(&self, name: &str) -> Option<usize> {
        let tag = tag(name.as_bytes());
        if self.names & bit(tag) == 0 {
            return None;
        }
        self.position_tagged(tag, name.as_bytes())
    }

    fn position_tagged(&self, tag: u32, name: &[u8]) -> Option<usize> {
        self.entries.iter().position(|e| e.is(tag, name, &self.buffer))
    }

    /// All values under this name, in order.
    pub fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> + 'a {
        let tag = tag(name.as_bytes());
        let entries = if self.names & bit(tag) == 0 { &[] } else { &self.entries[..] };
        entries.iter().filter(move |e| e.is(tag, name.as_bytes(), &self.buffer)).map(|e| e.value(&self.buffer))
    }

    /// All values under this name joined by commas, as header matchers and formats see them
    /// (Envoy `HeaderUtility::getAllOfHeaderAsString`). Borrowed when there is only one.
    pub fn joined(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let first = self.position(name)?;
        let mut value = Cow::Borrowed(self.entries[first].value(&self.buffer));
        let tag = self.entries[first].tag;
        for entry in self.entries[first + 1..].iter().filter(|e| e.is(tag, name.as_bytes(), &self.buffer)) {
            let joined = value.to_mut();
            joined.push(b',');
            joined.extend_from_slice(entry.value(&self.buffer));
        }
        Some(value)
    }

    /// Whether there is a header of this name.
    #[inline(always)]
    pub fn contains(&self, name: &str) -> bool {
        self.position(name).is_some()
    }

    /// Makes this the only value under the name, at the place of the first one, or at the end.
    pub fn set(&mut self, name: &str, value: &[u8]) {
        let Some(at) = self.position(name) else { return self.push_lower(name, value) };
        let entry = &mut self.entries[at];
        if value.len() <= entry.value_len as usize {
            entry.value_len = value.len() as u32;
            let start = entry.value_start();
            self.buffer[start..][..value.len()].copy_from_slice(value);
            self.buffer[start + value.len()..][..LINE_END.len()].copy_from_slice(&LINE_END);
        } else {
            let Some(entry) = self.store(name.as_bytes(), value) else { return };
            self.entries[at] = entry;
        }
        let tag = self.entries[at].tag;
        if self.again & bit(tag) != 0 {
            let buffer = &self.buffer;
            let mut index = 0;
            self.entries.retain(|e| {
                index += 1;
                index - 1 <= at || !e.is(tag, name.as_bytes(), buffer)
            });
        }
    }

    /// Puts `value` behind the first value of that name, with the separator between them, or adds the header
    /// (Envoy `HeaderMap::appendCopy`). Of an empty value nothing is left behind another.
    pub fn append(&mut self, name: &str, value: &[u8], separator: &str) {
        let Some(at) = self.position(name) else { return self.push_lower(name, value) };
        match self.entries[at].value(&self.buffer) {
            _ if value.is_empty() => {}
            [] => self.set(name, value),
            old => {
                let joined = [old, separator.as_bytes(), value].concat();
                if let Some(entry) = self.store(name.as_bytes(), &joined) {
                    self.entries[at] = entry;
                }
            }
        }
    }

    /// Adds a header as Envoy's `HeaderMap` does: headers that it keeps only once get the value appended with a comma,
    /// all others get another line. Those of requests are nothing special in a response, nor the other way round.
    pub fn add(&mut self, name: &str, value: &[u8]) {
        match self.keeps_once(name) {
            true => self.append(name, value, ","),
            false => self.push(name.as_bytes(), value),
        }
    }

    /// Whether Envoy keeps a header only once in such a head.
    fn keeps_once(&self, name: &str) -> bool {
        let own: &[&str] = if self.contains(":status") { &SINGLE_IN_RESPONSES } else { &SINGLE_IN_REQUESTS };
        SINGLE.binary_search(&name).is_ok() || own.binary_search(&name).is_ok()
    }

    /// Removes all values under the name; says whether there were any.
    #[inline(always)]
    pub fn remove(&mut self, name: &str) -> bool {
        match self.position(name) {
            Some(first) => {
                self.remove_from(first);
                true
            }
            None => false,
        }
    }

    /// Removes this header and those of the same name behind it.
    fn remove_from(&mut self, first: usize) {
        let removed = self.entries.remove(first);
        if self.again & bit(removed.tag) != 0 {
            let buffer = &self.buffer;
            self.entries.retain(|e| !e.is(removed.tag, removed.name(buffer), buffer));
        }
    }

    /// Removes all headers whose name starts so.
    pub fn remove_prefix(&mut self, prefix: &str) {
        let buffer = &self.buffer;
        self.entries.retain(|e| !e.name(buffer).starts_with(prefix.as_bytes()));
    }

    /// Keeps the headers for which `keep(name, value)` holds.
    pub fn retain(&mut self, mut keep: impl FnMut(&[u8], &[u8]) -> bool) {
        let buffer = &self.buffer;
        self.entries.retain(|e| keep(e.name(buffer), e.value(buffer)));
    }

    /// All headers in order, pseudo headers too.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.entries.iter().map(|e| (e.name(&self.buffer), e.value(&self.buffer)))
    }

    /// All headers without those whose name starts with a colon.
    pub fn iter_regular(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.entries.iter().filter(|e| !e.is_pseudo()).map(|e| (e.name(&self.buffer), e.value(&self.buffer)))
    }

    /// `:method`.
    pub fn method(&self) -> Option<&str> {
        self.get_str(":method")
    }

    /// `:path`, with the query.
    pub fn path(&self) -> Option<&str> {
        self.get_str(":path")
    }

    /// The same as text, for rules about it: bytes that are not UTF-8 are U+FFFD there, for Envoy's rules look at bytes, and hold
    /// for the others.
    pub fn path_text(&self) -> Option<Cow<'_, str>> {
        let path = self.get(":path")?;
        // Faster for the usual case than the lossy conversion.
        Some(std::str::from_utf8(path).map_or_else(|_| String::from_utf8_lossy(path), Cow::Borrowed))
    }

    /// `:authority` (HTTP/1's `Host`).
    pub fn authority(&self) -> Option<&str> {
        self.get_str(":authority")
    }

    /// `:scheme`.
    pub fn scheme(&self) -> Option<&str> {
        self.get_str(":scheme")
    }

    /// `:status` as a number.
    pub fn status(&self) -> Option<u16> {
        let digits = self.get(":status").filter(|digits| (1..=5).contains(&digits.len()))?;
        let value =
            digits.iter().try_fold(0u32, |n, digit| digit.is_ascii_digit().then(|| n * 10 + u32::from(digit - b'0')));
        value?.try_into().ok()
    }

    /// Sets `:status`.
    pub fn set_status(&mut self, status: u16) {
        self.set_number(":status", status.into());
    }

    /// As [`set`](Headers::set), in decimal.
    pub fn set_number(&mut self, name: &str, value: u64) {
        self.set(name, Digits::of(value).as_bytes());
    }

    /// A head of these headers; for tests and fixed answers.
    pub fn of<'a>(headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut all = Self::new();
        for (name, value) in headers {
            all.push(name.as_bytes(), value.as_bytes());
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_requests_are_many_in_responses() {
        let added = |first: (&str, &str)| {
            let mut headers = Headers::of([first]);
            headers.add("x-forwarded-for", b"1");
            headers.add("x-forwarded-for", b"2");
            headers.get_all("x-forwarded-for").map(<[u8]>::to_vec).collect::<Vec<_>>()
        };
        assert_eq!(added((":method", "GET")), [b"1,2"]);
        assert_eq!(added((":status", "200")), [b"1", b"2"]);
    }

    #[test]
    fn set_replaces_all_and_keeps_the_place() {
        let mut h = Headers::of([(":method", "GET"), ("X-A", "1"), ("b", "2"), ("x-a", "3")]);
        assert_eq!(h.get_all("x-a").collect::<Vec<_>>(), [b"1", b"3"]);
        assert_eq!(h.joined("x-a").as_deref(), Some(&b"1,3"[..]));
        h.set("x-a", b"longer than before");
        h.set("b", b"");
        let all: Vec<_> = h.iter_regular().collect();
        assert_eq!(all, [(&b"x-a"[..], &b"longer than before"[..]), (b"b", b"")]);
        h.append("b", b"x", ",");
        h.append("b", b"y", ",");
        assert_eq!(h.get("b"), Some(&b"x,y"[..]));
        assert!(h.remove("x-a") && !h.contains("x-a"));
        h.add("x-forwarded-for", b"1.1.1.1");
        h.add("x-forwarded-for", b"2.2.2.2");
        assert_eq!(h.get("x-forwarded-for"), Some(&b"1.1.1.1,2.2.2.2"[..]));
        h.add("x-forwarded-for", b"");
        h.add("cookie", b"a=1");
        h.add("cookie", b"b=2");
        assert_eq!((h.get("x-forwarded-for"), h.len()), (Some(&b"1.1.1.1,2.2.2.2"[..]), 5));
        assert!(SINGLE.is_sorted() && SINGLE_IN_REQUESTS.is_sorted() && SINGLE_IN_RESPONSES.is_sorted());
        h.clear();
        assert_eq!((h.len(), h.byte_size()), (0, 0));
    }

    #[test]
    fn of_a_head_that_was_read_some_headers_exist_once() {
        let mut h = Headers::of([("accept", "a"), ("x-b", "1"), ("x-b", "2"), ("accept", ""), ("accept", "c")]);
        h.join_single();
        let all: Vec<_> = h.iter_regular().collect();
        assert_eq!(all, [(&b"accept"[..], &b"a,c"[..]), (b"x-b", b"1"), (b"x-b", b"2")]);
        // Which ones is another matter in requests than in responses.
        let two = |head| {
            let mut h = Headers::of([(head, "1"), ("etag", "a"), ("etag", "b"), ("pragma", "a"), ("pragma", "b")]);
            h.join_single();
            (h.get_all("etag").count(), h.get_all("pragma").count())
        };
        assert_eq!((two(":method"), two(":status")), ((2, 1), (1, 2)));
        let h = Headers::of([("accept", "a"), ("x-b", "1"), ("x-b", "2"), ("accept", ""), ("accept", "c")]);
        assert_eq!(h.repeated_single(), 2);
    }

    #[test]
    fn lines_leave_as_they_came_with_what_was_changed() {
        let lines = |h: &Headers| {
            let mut out = Vec::new();
            h.write_lines(&mut out);
            String::from_utf8(out).unwrap()
        };
        let mut h = Headers::of([(":path", "/")]);
        let block = b"Host: a\r\nX-A: one\r\nb:two\r\nx-a: three\r\nc: \r\n";
        let start = h.block(block);
        h.push_line(start + 9, 3, 3, false);
        h.push(b"B", b"two");
        h.push_line(start + 26, 3, 5, true);
        h.push_line(start + 38, 1, 0, true);
        assert_eq!(lines(&h), "x-a: one\r\nb: two\r\nx-a: three\r\nc: \r\n");
        assert_eq!(h.joined("x-a").as_deref(), Some(&b"one,three"[..]));
        h.set("x-a", b"1");
        h.append("c", b"4", ",");
        h.append("c", b"5", ",");
        assert_eq!(lines(&h), "x-a: 1\r\nb: two\r\nc: 4,5\r\n");
        h.set("b", b"twenty");
        h.set_number("e", 0);
        h.set_number("e", u64::MAX);
        assert!(h.get("e") == Some(b"18446744073709551615") && h.remove("e"));
        h.push(b"d", b"6");
        assert!(h.remove("x-a") && !h.remove("x-a"));
        assert_eq!(lines(&h), "b: twenty\r\nc: 4,5\r\nd: 6\r\n");
        assert_eq!(h.get("b"), Some(&b"twenty"[..]));
        // `:path` is in no line, `:authority` is that of `host`.
        assert_eq!(h.line_sizes(), (3, "btwentyc4,5d6".len()));
        h.push(b":authority", b"a.b");
        assert_eq!(h.line_sizes(), (4, "btwentyc4,5d6hosta.b".len()));
    }
}
