/// A message head: pseudo headers (`:method`, `:path`, `:status`, …) and headers, in order, as Envoy keeps them.
///
/// Names are lower case. All bytes lie in one buffer with an index beside it, so that building a head costs no
/// allocation per header, and [`clear`](Headers::clear) lets a connection reuse the memory for its next request.
/// Replaced and removed bytes stay in the buffer until then.
#[derive(Clone, Debug, Default)]
pub struct Headers {
    buffer: Vec<u8>,
    entries: Vec<Entry>,
    /// One bit for every name that was ever added: most names that somebody looks for are not there, which this
    /// says without a look at the entries.
    names: u64,
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

/// The bit of a name, of any case.
fn bit(name: &[u8]) -> u64 {
    let (Some(first), Some(last)) = (name.first(), name.last()) else { return 1 };
    let mixed = name.len() + 5 * usize::from(first | 0x20) + 11 * usize::from(last | 0x20);
    1 << (mixed % 64)
}

/// Envoy's inline headers, which exist once (`Http::Headers`, `INLINE_REQ_*`, `INLINE_RESP_*` and the custom ones). Sorted.
const SINGLE: [&str; 54] = [
    "accept",
    "accept-encoding",
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
    "access-control-request-headers",
    "access-control-request-method",
    "authorization",
    "cache-control",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "date",
    "etag",
    "expect",
    "grpc-accept-encoding",
    "grpc-message",
    "grpc-status",
    "grpc-timeout",
    "host",
    "keep-alive",
    "location",
    "origin",
    "proxy-connection",
    "referer",
    "server",
    "te",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "via",
    "x-client-trace-id",
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-external-address",
    "x-envoy-force-trace",
    "x-envoy-internal",
    "x-envoy-max-retries",
    "x-envoy-original-path",
    "x-envoy-retry-on",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-service-time",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-request-id",
];

#[derive(Clone, Copy, Debug)]
struct Entry {
    name: u32,
    name_len: u32,
    value: u32,
    value_len: u32,
}

impl Entry {
    fn name<'a>(&self, buffer: &'a [u8]) -> &'a [u8] {
        &buffer[self.name as usize..][..self.name_len as usize]
    }

    fn value<'a>(&self, buffer: &'a [u8]) -> &'a [u8] {
        &buffer[self.value as usize..][..self.value_len as usize]
    }
}

impl Headers {
    /// No headers, no memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Room for so many headers with so many bytes of names and values.
    pub fn with_capacity(entries: usize, bytes: usize) -> Self {
        Self { buffer: Vec::with_capacity(bytes), entries: Vec::with_capacity(entries), names: 0, written: None }
    }

    /// Forgets all headers and keeps the memory.
    pub fn clear(&mut self) {
        self.buffer.clear();
        self.entries.clear();
        self.names = 0;
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

    /// Adds a header behind the others, even if there is one of that name. The name is made lower case.
    ///
    /// Heads beyond 4 GiB in sum are not representable; the codecs limit them to far less, and what would not fit is dropped.
    pub fn push(&mut self, name: &[u8], value: &[u8]) {
        let Some((name_at, value_at)) = self.store(name, value) else { return };
        self.buffer[name_at as usize..][..name.len()].make_ascii_lowercase();
        self.names |= bit(name);
        self.entries.push(Entry {
            name: name_at,
            name_len: name.len() as u32,
            value: value_at,
            value_len: value.len() as u32,
        });
    }

    fn store(&mut self, name: &[u8], value: &[u8]) -> Option<(u32, u32)> {
        let name_at = self.buffer.len();
        let value_at = name_at + name.len();
        let end = value_at + value.len();
        u32::try_from(end).ok()?;
        self.buffer.extend_from_slice(name);
        self.buffer.extend_from_slice(value);
        Some((name_at as u32, value_at as u32))
    }

    /// The first value under this (lower-case) name.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.position(name).map(|i| self.entries[i].value(&self.buffer))
    }

    /// As [`get`](Headers::get), if the value is UTF-8.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.get(name)?).ok()
    }

    fn position(&self, name: &str) -> Option<usize> {
        let name = name.as_bytes();
        if self.names & bit(name) == 0 {
            return None;
        }
        self.entries.iter().position(|e| e.name_len as usize == name.len() && e.name(&self.buffer) == name)
    }

    /// All values under this name, in order.
    pub fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> + 'a {
        self.entries.iter().filter(move |e| e.name(&self.buffer) == name.as_bytes()).map(|e| e.value(&self.buffer))
    }

    /// All values under this name joined by commas, as header matchers and formats see them
    /// (Envoy `HeaderUtility::getAllOfHeaderAsString`). Borrowed when there is only one.
    pub fn joined(&self, name: &str) -> Option<std::borrow::Cow<'_, [u8]>> {
        let first = self.position(name)?;
        let mut value = std::borrow::Cow::Borrowed(self.entries[first].value(&self.buffer));
        for entry in self.entries[first + 1..].iter().filter(|e| e.name(&self.buffer) == name.as_bytes()) {
            let joined = value.to_mut();
            joined.push(b',');
            joined.extend_from_slice(entry.value(&self.buffer));
        }
        Some(value)
    }

    /// Whether there is a header of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.position(name).is_some()
    }

    /// Makes this the only value under the name, at the place of the first one, or at the end.
    pub fn set(&mut self, name: &str, value: &[u8]) {
        let Some(at) = self.position(name) else { return self.push(name.as_bytes(), value) };
        if value.len() <= self.entries[at].value_len as usize {
            let start = self.entries[at].value as usize;
            self.buffer[start..start + value.len()].copy_from_slice(value);
        } else {
            let start = self.buffer.len();
            if u32::try_from(start + value.len()).is_err() {
                return;
            }
            self.buffer.extend_from_slice(value);
            self.entries[at].value = start as u32;
        }
        self.entries[at].value_len = value.len() as u32;
        let buffer = &self.buffer;
        let mut index = 0;
        self.entries.retain(|e| {
            index += 1;
            index - 1 <= at || e.name(buffer) != name.as_bytes()
        });
    }

    /// Puts `value` behind the first value of that name, with the separator between them, or adds the header
    /// (Envoy `HeaderMap::appendCopy`).
    pub fn append(&mut self, name: &str, value: &[u8], separator: &str) {
        match self.get(name) {
            None => self.push(name.as_bytes(), value),
            Some([]) => self.set(name, value),
            Some(old) => {
                let joined = [old, separator.as_bytes(), value].concat();
                let at = self.position(name).unwrap_or(0);
                let start = self.buffer.len();
                if u32::try_from(start + joined.len()).is_ok() {
                    self.buffer.extend_from_slice(&joined);
                    self.entries[at].value = start as u32;
                    self.entries[at].value_len = joined.len() as u32;
                }
            }
        }
    }

    /// Adds a header as Envoy's `HeaderMap` does: headers that it keeps only once get the value appended with a comma
    /// (`cookie`: a semicolon), all others get another line.
    pub fn add(&mut self, name: &str, value: &[u8]) {
        match name {
            "cookie" => self.append(name, value, "; "),
            _ if SINGLE.binary_search(&name).is_ok() => self.append(name, value, ","),
            _ => self.push(name.as_bytes(), value),
        }
    }

    /// Removes all values under the name; says whether there were any.
    pub fn remove(&mut self, name: &str) -> bool {
        if self.names & bit(name.as_bytes()) == 0 {
            return false;
        }
        let before = self.entries.len();
        let buffer = &self.buffer;
        self.entries.retain(|e| e.name(buffer) != name.as_bytes());
        before != self.entries.len()
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
        self.iter().filter(|(name, _)| !name.starts_with(b":"))
    }

    /// `:method`.
    pub fn method(&self) -> Option<&str> {
        self.get_str(":method")
    }

    /// `:path`, with the query.
    pub fn path(&self) -> Option<&str> {
        self.get_str(":path")
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
        self.get_str(":status")?.parse().ok()
    }

    /// Sets `:status`.
    pub fn set_status(&mut self, status: u16) {
        self.set(":status", status.to_string().as_bytes());
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
        assert!(SINGLE.is_sorted());
        h.clear();
        assert_eq!((h.len(), h.byte_size()), (0, 0));
    }
}
