//! Sorts map entries inside encoded messages.
//!
//! The generated types keep `map` fields in hash maps, whose order changes from one message to the
//! next. Sorting the encoded entries afterwards gives one encoding for one content. Which fields are
//! maps is read once from the descriptor set; everything else is copied as it is.

use std::ops::Range;
use std::sync::LazyLock;

use envoy_types::pb::google::protobuf::DescriptorProto;
use envoy_types::pb::google::protobuf::field_descriptor_proto::Type;
use foldhash::{HashMap, HashMapExt};

/// How a field leads to a map.
#[derive(Clone, Copy, Debug)]
enum Inside {
    /// A message of the type with this index.
    Message(usize),
    /// A map; the value may be a message of the type with this index.
    Map(Option<usize>),
}

/// For each message type the fields that can contain maps.
type Fields = Vec<Vec<(u32, Inside)>>;

struct Schema {
    by_name: HashMap<String, usize>,
    /// With those inside `Any`.
    fields: Fields,
    /// Without.
    outer: Fields,
    any: Option<usize>,
}

static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let set = crate::json::descriptor_set();
    let mut messages = Vec::new();
    for file in &set.file {
        let package = file.package.clone().unwrap_or_default();
        for message in &file.message_type {
            collect(message, &package, &mut messages);
        }
    }
    Schema::build(&messages)
});

/// Adds `message` and all messages nested in it with their full names.
fn collect<'a>(message: &'a DescriptorProto, scope: &str, out: &mut Vec<(String, &'a DescriptorProto)>) {
    let name = format!("{scope}.{}", message.name());
    for nested in &message.nested_type {
        collect(nested, &name, out);
    }
    out.push((name, message));
}

impl Schema {
    fn build(messages: &[(String, &DescriptorProto)]) -> Schema {
        let mut by_name = HashMap::with_capacity(messages.len());
        by_name.extend(messages.iter().enumerate().map(|(index, (name, _))| (name.clone(), index)));
        let any = by_name.get("google.protobuf.Any").copied();
        let (fields, outer) = (fields(messages, &by_name, any), fields(messages, &by_name, None));
        Schema { by_name, fields, outer, any }
    }
}

/// Fixed point: a type matters when it is `any`, has a map, or has a field of a type that matters.
fn fields(messages: &[(String, &DescriptorProto)], by_name: &HashMap<String, usize>, any: Option<usize>) -> Fields {
    let index_of = |type_name: &str| by_name.get(type_name.trim_start_matches('.')).copied();
    let is_map = |index: usize| messages[index].1.options.as_ref().is_some_and(|o| o.map_entry());
    let mut matters = vec![false; messages.len()];
    if let Some(any) = any {
        matters[any] = true;
    }
    loop {
        let mut changed = false;
        for (index, (_, message)) in messages.iter().enumerate() {
            if !matters[index]
                && message.field.iter().any(|f| {
                    f.r#type() == Type::Message && index_of(f.type_name()).is_some_and(|t| matters[t] || is_map(t))
                })
            {
                matters[index] = true;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    messages
        .iter()
        .map(|(_, message)| {
            let inside = message.field.iter().filter_map(|f| {
                let index = index_of(f.type_name()).filter(|_| f.r#type() == Type::Message)?;
                let number = u32::try_from(f.number()).ok()?;
                if is_map(index) {
                    let value = messages[index].1.field.iter().find(|f| f.number() == 2)?;
                    return Some((number, Inside::Map(index_of(value.type_name()).filter(|&v| matters[v]))));
                }
                matters[index].then_some((number, Inside::Message(index)))
            });
            inside.collect()
        })
        .collect()
}

/// Sorts the entries of every map of an encoded message by key, also inside `Any`.
///
/// Sorting changes no length, so it is done in place. Bytes that are no message of that type are left as they are from
/// where they could no longer be read.
pub(crate) fn sort_maps(full_name: &str, body: &mut [u8]) {
    if let Some(&index) = SCHEMA.by_name.get(full_name) {
        sort(&SCHEMA, &SCHEMA.fields, index, body);
    }
}

/// As [`sort_maps`] where what is inside `Any` is sorted already.
pub(crate) fn sort_outer_maps(full_name: &str, body: &mut [u8]) {
    if let Some(&index) = SCHEMA.by_name.get(full_name) {
        sort(&SCHEMA, &SCHEMA.outer, index, body);
    }
}

/// One field of an encoded message, as places in its bytes.
pub(crate) struct Field {
    pub(crate) number: u32,
    /// Key and value.
    whole: Range<usize>,
    /// The content of a length-delimited field.
    content: Option<Range<usize>>,
}

fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// The field at `at`, which is moved behind it.
pub(crate) fn next_field(bytes: &[u8], at: &mut usize) -> Option<Field> {
    let start = *at;
    let mut end = start;
    let key = varint(bytes, &mut end)?;
    let mut content = None;
    match key & 7 {
        0 => drop(varint(bytes, &mut end)?),
        1 => end += 8,
        2 => {
            let length = usize::try_from(varint(bytes, &mut end)?).ok()?;
            let from = end;
            end = end.checked_add(length)?;
            content = Some(from..end);
        }
        5 => end += 4,
        _ => return None,
    }
    if end > bytes.len() {
        return None;
    }
    *at = end;
    Some(Field { number: u32::try_from(key >> 3).ok()?, whole: start..end, content })
}

/// Entries of one map, one after the other, as prost writes them.
struct Entries {
    field: u32,
    /// The key and the whole entry.
    places: Vec<(Range<usize>, Range<usize>)>,
}

impl Entries {
    /// Puts the entries in order and begins with another field.
    fn finish(&mut self, body: &mut [u8]) {
        if !self.places.is_sorted_by(|a, b| body[a.0.clone()] <= body[b.0.clone()]) {
            let (from, to) = (self.places[0].1.start, self.places[self.places.len() - 1].1.end);
            let before = body[from..to].to_vec();
            let of = |place: &Range<usize>| &before[place.start - from..place.end - from];
            self.places.sort_by(|a, b| of(&a.0).cmp(of(&b.0)));
            let mut at = from;
            for (_, whole) in &self.places {
                body[at..at + whole.len()].copy_from_slice(of(whole));
                at += whole.len();
            }
        }
        self.places.clear();
    }
}

fn sort(schema: &Schema, all: &Fields, index: usize, body: &mut [u8]) {
    let fields = &all[index];
    if schema.any == Some(index) {
        return sort_any(schema, all, body);
    }
    if fields.is_empty() {
        return;
    }
    let mut entries = Entries { field: 0, places: Vec::new() };
    let mut at = 0;
    while let Some(field) = next_field(body, &mut at) {
        if field.number != entries.field {
            entries.finish(body);
            entries.field = field.number;
        }
        let Some(content) = field.content else { continue };
        match fields.iter().find(|(number, _)| *number == field.number) {
            Some((_, Inside::Message(index))) => sort(schema, all, *index, &mut body[content]),
            Some((_, Inside::Map(value))) => {
                let key = sort_entry(schema, all, *value, &mut body[content.clone()]);
                entries.places.push((content.start + key.start..content.start + key.end, field.whole));
            }
            None => {}
        }
    }
    entries.finish(body);
}

/// Sorts what is inside a map's entry; where its key is.
fn sort_entry(schema: &Schema, all: &Fields, value: Option<usize>, entry: &mut [u8]) -> Range<usize> {
    let (mut key, mut at) = (0..0, 0);
    while let Some(part) = next_field(entry, &mut at) {
        match (part.number, part.content, value) {
            (1, Some(text), _) => key = text,
            (2, Some(inner), Some(index)) => sort(schema, all, index, &mut entry[inner]),
            _ => {}
        }
    }
    key
}

fn sort_any(schema: &Schema, all: &Fields, body: &mut [u8]) {
    let (mut index, mut at) = (None, 0);
    while let Some(field) = next_field(body, &mut at) {
        match (field.number, field.content) {
            (1, Some(url)) => {
                let name = std::str::from_utf8(&body[url]).unwrap_or_default();
                index = schema.by_name.get(name.rsplit('/').next().unwrap_or_default()).copied();
            }
            (2, Some(value)) => {
                if let Some(index) = index {
                    sort(schema, all, index, &mut body[value]);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::config::core::v3::Metadata;
    use envoy_types::pb::envoy::config::endpoint::v3::LbEndpoint;
    use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
    use prost::{Message, Name};

    #[test]
    fn equal_messages_have_equal_bytes() {
        let text = |s: &str| Value { kind: Some(Kind::StringValue(s.to_owned())) };
        let make = || {
            let fields = || Struct { fields: (0..20).map(|i| (format!("key{i}"), text("x"))).collect() };
            LbEndpoint {
                metadata: Some(Metadata {
                    filter_metadata: (0..20).map(|i| (format!("filter{i}"), fields())).collect(),
                    ..Metadata::default()
                }),
                ..LbEndpoint::default()
            }
        };
        let (a, b) = (make().encode_to_vec(), make().encode_to_vec());
        assert_ne!(a, b, "two hash maps of 20 entries hardly ever agree on an order");
        let sorted = |mut bytes: Vec<u8>| {
            sort_maps(&LbEndpoint::full_name(), &mut bytes);
            bytes
        };
        assert_eq!(sorted(a.clone()), sorted(b));
        assert_eq!(LbEndpoint::decode(sorted(a).as_slice()).unwrap(), make());
    }

    #[test]
    fn garbage_passes_through() {
        for bytes in [&[0xffu8; 3][..], &[0x0a, 0x7f, 0x01], &[0x0a], &[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]] {
            let mut sorted = bytes.to_vec();
            sort_maps("envoy.config.cluster.v3.Cluster", &mut sorted);
            assert_eq!(sorted, bytes);
        }
    }
}
