//! From fields to a header block (RFC 7541 3).

use super::table::{DEFAULT_SIZE, STATIC, Table, room};

/// Encodes the header blocks of one connection.
///
/// Strings are never Huffman coded: on the hops of a mesh, the bytes that would be saved cost less than the time of
/// both ends. What is repeated goes into the dynamic table, where a field costs a byte or two.
pub(crate) struct Encoder {
    table: Table,
    /// The smallest size of the table since the last block, if it has changed (RFC 7541 4.2).
    smallest: Option<u32>,
    /// Made with the first field that might be indexed.
    index: Option<Box<Index>>,
}

impl Encoder {
    pub(crate) fn new() -> Self {
        Self { table: Table::new(DEFAULT_SIZE), smallest: None, index: None }
    }

    /// The peer's SETTINGS_HEADER_TABLE_SIZE, of which at most the default is used. The next block tells the peer.
    pub(crate) fn set_max_size(&mut self, size: u32) {
        let size = size.min(DEFAULT_SIZE);
        if size as usize != self.table.max() {
            self.smallest = Some(self.smallest.map_or(size, |smallest| smallest.min(size)));
            self.table.set_max(size);
        }
    }

    /// Starts a block.
    pub(crate) fn begin(&mut self, out: &mut Vec<u8>) {
        if let Some(smallest) = self.smallest.take() {
            let size = self.table.max();
            if (smallest as usize) < size {
                integer(0x20, 5, smallest as usize, out);
            }
            integer(0x20, 5, size, out);
        }
    }

    /// Appends one field. Names are lower case already.
    pub(crate) fn field(&mut self, name: &[u8], value: &[u8], out: &mut Vec<u8>) {
        let hash = mix(0, name);
        let known = known(name, hash);
        for (at, (_, static_value)) in known.entries.iter().enumerate() {
            if *static_value == value {
                return out.push(0x80 | (known.index + at) as u8);
            }
        }
        match known.policy {
            Policy::Index if room(name, value) <= self.table.max() * 3 / 4 => {}
            Policy::Cookie if value.len() >= SHORT_COOKIE && room(name, value) <= self.table.max() * 3 / 4 => {}
            Policy::Index | Policy::Changes => return literal(0, 4, known.index, name, value, out),
            Policy::Cookie | Policy::Secret => return literal(0x10, 4, known.index, name, value, out),
        }
        let hash = mix(hash, value);
        let index = self.index.get_or_insert_default();
        if let Some(age) = index.find(&self.table, hash, name, value) {
            integer(0x80, 7, STATIC.len() + 1 + age, out);
        } else if index.seen_before(hash) {
            literal(0x40, 6, known.index, name, value, out);
            self.table.insert(name, value);
            index.inserted(hash);
        } else {
            literal(0, 4, known.index, name, value, out);
        }
    }
}

/// Cookies shorter than this could be guessed byte by byte; nghttp2 and Firefox never index them.
const SHORT_COOKIE: usize = 20;

/// What becomes of fields of a name (nghttp2's `hd_deflate_decide_indexing`, and what is known of meshes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    /// Goes into the dynamic table when it is sent again.
    Index,
    /// Another value in each message: would only push others out.
    Changes,
    /// Indexed if it is long.
    Cookie,
    /// A secret: the next hops may not index it either (RFC 7541 7.1.3).
    Secret,
}

const POLICIES: [(&[u8], Policy); 23] = [
    (b":path", Policy::Changes),
    (b"age", Policy::Changes),
    (b"content-length", Policy::Changes),
    (b"etag", Policy::Changes),
    (b"if-modified-since", Policy::Changes),
    (b"if-none-match", Policy::Changes),
    (b"location", Policy::Changes),
    (b"set-cookie", Policy::Changes),
    (b"b3", Policy::Changes),
    (b"grpc-timeout", Policy::Changes),
    (b"grpc-trace-bin", Policy::Changes),
    (b"traceparent", Policy::Changes),
    (b"tracestate", Policy::Changes),
    (b"x-b3-parentspanid", Policy::Changes),
    (b"x-b3-spanid", Policy::Changes),
    (b"x-b3-traceid", Policy::Changes),
    (b"x-cloud-trace-context", Policy::Changes),
    (b"x-datadog-parent-id", Policy::Changes),
    (b"x-datadog-trace-id", Policy::Changes),
    (b"x-envoy-upstream-service-time", Policy::Changes),
    (b"x-request-id", Policy::Changes),
    (b"authorization", Policy::Secret),
    (b"cookie", Policy::Cookie),
];

/// What is known of a name.
#[derive(Clone, Copy)]
struct Known {
    name: &'static [u8],
    policy: Policy,
    /// Of the first of its entries in the static table; 0 if there is none, which says in a literal that the name
    /// follows.
    index: usize,
    entries: &'static [(&'static [u8], &'static [u8])],
}

const UNKNOWN: Known = Known { name: b"", policy: Policy::Index, index: 0, entries: &[] };

const KNOWN_SLOTS: usize = 256;

/// All names of [`STATIC`] and [`POLICIES`], where their hashes say or in the slots that follow.
static KNOWN: [Known; KNOWN_SLOTS] = {
    let mut slots = [UNKNOWN; KNOWN_SLOTS];
    let (mut entries, mut index): (&[_], _) = (&STATIC, 1);
    while let [(name, _), ..] = entries {
        let mut count = 1;
        while count < entries.len() && same(entries[count].0, name) {
            count += 1;
        }
        let (of_name, after) = entries.split_at(count);
        slots[free_or_same(&slots, name)] = Known { name, policy: Policy::Index, index, entries: of_name };
        index += count;
        entries = after;
    }
    let mut at = 0;
    while at < POLICIES.len() {
        let (name, policy) = POLICIES[at];
        let slot = free_or_same(&slots, name);
        slots[slot].name = name;
        slots[slot].policy = policy;
        at += 1;
    }
    slots
};

const fn free_or_same(slots: &[Known; KNOWN_SLOTS], name: &[u8]) -> usize {
    let mut slot = known_slot(mix(0, name));
    while !slots[slot].name.is_empty() && !same(slots[slot].name, name) {
        slot = (slot + 1) % KNOWN_SLOTS;
    }
    slot
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    let mut at = 0;
    while at < a.len() && at < b.len() && a[at] == b[at] {
        at += 1;
    }
    at == a.len() && at == b.len()
}

const fn known_slot(hash: u64) -> usize {
    (hash >> 56) as usize % KNOWN_SLOTS
}

fn known(name: &[u8], hash: u64) -> &'static Known {
    let mut slot = known_slot(hash);
    loop {
        let known = &KNOWN[slot];
        if known.name == name || known.name.is_empty() {
            return known;
        }
        slot = (slot + 1) % KNOWN_SLOTS;
    }
}

/// A quick hash. A peer that makes its fields collide has them compressed less, that is all.
const fn mix(mut hash: u64, bytes: &[u8]) -> u64 {
    const fn add(hash: u64, word: u64) -> u64 {
        let product = (hash ^ word) as u128 * 0x9e37_79b9_7f4a_7c15;
        (product as u64) ^ (product >> 64) as u64
    }
    hash = add(hash, bytes.len() as u64 | 1 << 32);
    let mut rest = bytes;
    while let Some((word, after)) = rest.split_first_chunk() {
        hash = add(hash, u64::from_le_bytes(*word));
        rest = after;
    }
    // The last words overlap what was before them: no loop over single bytes.
    match (bytes.last_chunk(), rest.first_chunk(), rest.last_chunk()) {
        _ if rest.is_empty() => hash,
        (Some(last), _, _) => add(hash, u64::from_le_bytes(*last)),
        (None, Some(first), Some(last)) => {
            add(hash, (u32::from_le_bytes(*first) as u64) << 32 | u32::from_le_bytes(*last) as u64)
        }
        _ => add(hash, (rest[0] as u64) << 16 | (rest[rest.len() / 2] as u64) << 8 | rest[rest.len() - 1] as u64),
    }
}

const BUCKETS: usize = 64;
const SEEN: usize = 128;

/// Finds entries of the dynamic table by their hash. What does not fit a bucket is forgotten: a field is then written
/// once more, and no chain can become long. Entries that were evicted stay until something else takes their slot.
struct Index {
    buckets: [[Slot; 4]; BUCKETS],
    /// Parts of the hashes of fields that were sent: what comes once only does not push others out of the table.
    seen: [u16; SEEN],
    /// Entries inserted so far; wraps.
    inserted: u16,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    tag: u16,
    /// [`Index::inserted`] after the entry was.
    number: u16,
}

impl Default for Index {
    fn default() -> Self {
        Self { buckets: [[Slot::default(); 4]; BUCKETS], seen: [0; SEEN], inserted: 0 }
    }
}

impl Index {
    /// How many entries are newer than the one of exactly this field.
    fn find(&self, table: &Table, hash: u64, name: &[u8], value: &[u8]) -> Option<usize> {
        let bucket = &self.buckets[hash as usize % BUCKETS];
        bucket.iter().filter(|slot| slot.tag == (hash >> 48) as u16).map(|slot| self.age(*slot)).find(|&age| {
            // An old slot may point at an entry of another field.
            table.get(age) == Some((name, value))
        })
    }

    fn age(&self, slot: Slot) -> usize {
        usize::from(self.inserted.wrapping_sub(slot.number))
    }

    /// Whether a field was sent a short while ago, probably. It has been from now on.
    fn seen_before(&mut self, hash: u64) -> bool {
        let tag = (hash >> 48) as u16;
        std::mem::replace(&mut self.seen[(hash >> 8) as usize % SEEN], tag) == tag
    }

    /// The table's newest entry is the field of this hash.
    fn inserted(&mut self, hash: u64) {
        self.inserted = self.inserted.wrapping_add(1);
        let inserted = self.inserted;
        let bucket = &mut self.buckets[hash as usize % BUCKETS];
        // The oldest is evicted already, or will be first.
        if let Some(oldest) = bucket.iter_mut().max_by_key(|slot| inserted.wrapping_sub(slot.number)) {
            *oldest = Slot { tag: (hash >> 48) as u16, number: inserted };
        }
    }
}

/// A literal field (RFC 7541 6.2): `kind` are the bits in front of the prefix.
fn literal(kind: u8, prefix: u32, name_index: usize, name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    // The integers take at most six bytes each.
    out.reserve(name.len() + value.len() + 18);
    integer(kind, prefix, name_index, out);
    if name_index == 0 {
        string(name, out);
    }
    string(value, out);
}

/// A string as it is (RFC 7541 5.2).
fn string(bytes: &[u8], out: &mut Vec<u8>) {
    integer(0, 7, bytes.len(), out);
    out.extend_from_slice(bytes);
}

/// An integer (RFC 7541 5.1) in the low `prefix` bits of a byte and those that follow; `kind` are the bits above them.
fn integer(kind: u8, prefix: u32, value: usize, out: &mut Vec<u8>) {
    let mask = (1 << prefix) - 1;
    if value < mask {
        out.push(kind | value as u8);
        return;
    }
    out.push(kind | mask as u8);
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(0x80 | rest as u8);
        rest >>= 7;
    }
    out.push(rest as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hpack::Decoder;

    type Fields = Vec<(Vec<u8>, Vec<u8>)>;

    fn encode(encoder: &mut Encoder, fields: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        encoder.begin(&mut block);
        for (name, value) in fields {
            encoder.field(name.as_bytes(), value.as_bytes(), &mut block);
        }
        block
    }

    fn decode(decoder: &mut Decoder, block: &[u8]) -> Fields {
        let mut fields = Vec::new();
        decoder.decode(block, |name, value| fields.push((name.to_vec(), value.to_vec()))).unwrap();
        fields
    }

    #[test]
    fn every_static_entry_is_found() {
        for (at, (name, value)) in STATIC.iter().enumerate() {
            let mut block = Vec::new();
            Encoder::new().field(name, value, &mut block);
            assert_eq!(block, [0x80 | (at + 1) as u8]);
            let known = known(name, mix(0, name));
            assert!((known.index..known.index + known.entries.len()).contains(&(at + 1)));
        }
        for (name, policy) in POLICIES {
            assert_eq!(known(name, mix(0, name)).policy, policy);
        }
        assert_eq!(known(b"x-other", mix(0, b"x-other")).policy, Policy::Index);
    }

    #[test]
    fn what_is_sent_again_is_indexed() {
        let mut encoder = Encoder::new();
        let head = [(":method", "GET"), (":path", "/p"), ("x-a", "b"), ("user-agent", "c"), ("authorization", "d")];
        assert_eq!(encode(&mut encoder, &head), b"\x82\x04\x02/p\x00\x03x-a\x01b\x0f\x2b\x01c\x1f\x08\x01d");
        assert_eq!(encode(&mut encoder, &head), b"\x82\x04\x02/p\x40\x03x-a\x01b\x7a\x01c\x1f\x08\x01d");
        assert_eq!(encode(&mut encoder, &head), b"\x82\x04\x02/p\xbf\xbe\x1f\x08\x01d");
    }

    #[test]
    fn secrets_are_never_indexed_and_what_changes_is_not() {
        let mut encoder = Encoder::new();
        let long = "v".repeat(4000);
        for _ in 0..3 {
            for (name, value, first) in [
                ("cookie", "short", 0x1f),
                ("authorization", "Basic", 0x1f),
                ("etag", "e", 0x0f),
                ("x-request-id", "r", 0x00),
                ("x-long", &long, 0x00),
            ] {
                assert_eq!(encode(&mut encoder, &[(name, value)])[0], first, "{name}");
            }
            encode(&mut encoder, &[("cookie", "a session of 20 bytes or more")]);
        }
        assert_eq!(encode(&mut encoder, &[("cookie", "a session of 20 bytes or more")]), b"\xbe");
    }

    /// RFC 7541 4.2.
    #[test]
    fn size_updates_tell_the_smallest_and_the_last() {
        let mut encoder = Encoder::new();
        let field = [("x-a", "b")];
        encoder.set_max_size(1 << 20);
        assert_eq!(encode(&mut encoder, &[]), b"");
        encode(&mut encoder, &field);
        encode(&mut encoder, &field);
        assert_eq!(encode(&mut encoder, &field), b"\xbe");
        encoder.set_max_size(0);
        encoder.set_max_size(100);
        encoder.set_max_size(50);
        assert_eq!(encode(&mut encoder, &[]), b"\x20\x3f\x13");
        assert_eq!(encode(&mut encoder, &field)[0], 0x40);
        encoder.set_max_size(20);
        assert_eq!(encode(&mut encoder, &field)[..2], [0x34, 0x00]);
        assert_eq!(encode(&mut encoder, &field)[..1], [0x00]);
    }

    #[test]
    fn integers_of_the_rfc() {
        for (prefix, value, bytes) in
            [(5, 10, &[10][..]), (5, 1337, &[31, 154, 10]), (8, 42, &[42]), (7, 127, &[127, 0])]
        {
            let mut out = Vec::new();
            integer(0, prefix, value, &mut out);
            assert_eq!(out, bytes);
        }
    }

    /// Both ends stay alike whatever is sent, evicted and announced.
    #[test]
    fn what_was_encoded_is_decoded() {
        let mut state = 1u64;
        let mut below = |limit: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % limit
        };
        for _ in 0..20 {
            let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new(4096));
            let pool: Fields = (0..1 + below(200))
                .map(|_| {
                    let name = match below(4) {
                        0 => STATIC[below(STATIC.len())].0.to_vec(),
                        1 => POLICIES[below(POLICIES.len())].0.to_vec(),
                        _ => vec![b'a' + below(26) as u8; below(30)],
                    };
                    let length = if below(30) == 0 { below(6000) } else { below(60) };
                    (name, (0..length).map(|_| below(256) as u8).collect())
                })
                .collect();
            let mut indexed = 0;
            for _ in 0..300 {
                for _ in 0..if below(20) == 0 { below(4) } else { 0 } {
                    encoder.set_max_size([0, 33, 200, 1000, 4096, 100_000][below(6)]);
                }
                let fields: Fields = (0..below(20)).map(|_| pool[below(pool.len())].clone()).collect();
                let mut block = Vec::new();
                encoder.begin(&mut block);
                for (name, value) in &fields {
                    let start = block.len();
                    encoder.field(name, value, &mut block);
                    indexed += usize::from(block[start] >= 0xbe);
                }
                assert_eq!(decode(&mut decoder, &block), fields);
            }
            assert!(indexed > 0);
        }
    }
}
