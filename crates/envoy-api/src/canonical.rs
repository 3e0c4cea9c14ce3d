//! Sorts map entries inside encoded messages.
//!
//! The generated types keep `map` fields in hash maps, whose order changes from one message to the
//! next. Sorting the encoded entries afterwards gives one encoding for one content. Which fields are
//! maps is read once from the descriptor set; everything else is copied as it is.

use std::collections::HashMap;
use std::sync::LazyLock;

use envoy_types::pb::google::protobuf::DescriptorProto;
use envoy_types::pb::google::protobuf::field_descriptor_proto::Type;

/// How a field leads to a map.
#[derive(Clone, Copy, Debug)]
enum Inside {
    /// A message of the type with this index.
    Message(usize),
    /// A map; the value may be a message of the type with this index.
    Map(Option<usize>),
}

struct Schema {
    by_name: HashMap<String, usize>,
    /// For each message type the fields that can contain maps.
    fields: Vec<Vec<(u32, Inside)>>,
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
        let by_name: HashMap<String, usize> =
            messages.iter().enumerate().map(|(index, (name, _))| (name.clone(), index)).collect();
        let index_of = |type_name: &str| by_name.get(type_name.trim_start_matches('.')).copied();
        let any = index_of("google.protobuf.Any");
        let is_map = |index: usize| messages[index].1.options.as_ref().is_some_and(|o| o.map_entry());
        // Fixed point: a type matters when it is Any, has a map, or has a field of a type that matters.
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
        let fields = messages
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
            .collect();
        Schema { by_name, fields, any }
    }
}

/// The same message with the entries of every map sorted by key, also inside `Any`.
///
/// Bytes that are no message of that type are returned as far as they could be read, unchanged.
pub(crate) fn sort_maps(full_name: &str, body: &[u8]) -> Vec<u8> {
    match SCHEMA.by_name.get(full_name) {
        Some(&index) => rewrite(index, body),
        None => body.to_vec(),
    }
}

/// One field of an encoded message.
struct Field<'a> {
    number: u32,
    /// Key and value.
    whole: &'a [u8],
    /// The content of a length-delimited field.
    content: Option<&'a [u8]>,
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn next_field<'a>(bytes: &mut &'a [u8]) -> Option<Field<'a>> {
    let start = *bytes;
    let key = varint(bytes)?;
    let mut content = None;
    let skip = match key & 7 {
        0 => {
            varint(bytes)?;
            0
        }
        1 => 8,
        2 => {
            let length = usize::try_from(varint(bytes)?).ok()?;
            content = Some(bytes.get(..length)?);
            length
        }
        5 => 4,
        _ => return None,
    };
    *bytes = bytes.get(skip..)?;
    Some(Field { number: u32::try_from(key >> 3).ok()?, whole: &start[..start.len() - bytes.len()], content })
}

fn put(out: &mut Vec<u8>, number: u32, content: &[u8]) {
    for mut value in [u64::from(number) << 3 | 2, content.len() as u64] {
        while value >= 0x80 {
            out.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }
    out.extend_from_slice(content);
}

fn rewrite(index: usize, body: &[u8]) -> Vec<u8> {
    if SCHEMA.any == Some(index) {
        return rewrite_any(body);
    }
    let fields = &SCHEMA.fields[index];
    let mut out = Vec::with_capacity(body.len());
    // Entries of the map being read: prost writes them one after the other.
    let mut entries: Vec<(&[u8], Vec<u8>)> = Vec::new();
    let mut map = 0;
    let mut rest = body;
    let flush = |out: &mut Vec<u8>, map: u32, entries: &mut Vec<(&[u8], Vec<u8>)>| {
        entries.sort();
        entries.drain(..).for_each(|(_, entry)| put(out, map, &entry));
    };
    while !rest.is_empty() {
        let before = rest;
        let Some(field) = next_field(&mut rest) else {
            flush(&mut out, map, &mut entries);
            out.extend_from_slice(before);
            return out;
        };
        let inside = fields.iter().find(|(number, _)| *number == field.number).map(|(_, inside)| *inside);
        if field.number != map {
            flush(&mut out, map, &mut entries);
            map = field.number;
        }
        match (inside, field.content) {
            (Some(Inside::Message(index)), Some(content)) => put(&mut out, field.number, &rewrite(index, content)),
            (Some(Inside::Map(value)), Some(content)) => {
                let mut key: &[u8] = &[];
                let mut entry = Vec::with_capacity(content.len());
                let mut parts = content;
                while let Some(part) = next_field(&mut parts) {
                    match (part.number, part.content, value) {
                        (1, Some(text), _) => {
                            key = text;
                            entry.extend_from_slice(part.whole);
                        }
                        (2, Some(inner), Some(index)) => put(&mut entry, 2, &rewrite(index, inner)),
                        _ => entry.extend_from_slice(part.whole),
                    }
                }
                entries.push((key, entry));
            }
            _ => out.extend_from_slice(field.whole),
        }
    }
    flush(&mut out, map, &mut entries);
    out
}

fn rewrite_any(body: &[u8]) -> Vec<u8> {
    let mut url: &[u8] = &[];
    let mut out = Vec::with_capacity(body.len());
    let mut rest = body;
    while let Some(field) = next_field(&mut rest) {
        match (field.number, field.content) {
            (1, Some(text)) => {
                url = text;
                out.extend_from_slice(field.whole);
            }
            (2, Some(value)) => {
                let name = std::str::from_utf8(url).unwrap_or_default();
                let name = name.rsplit('/').next().unwrap_or_default();
                put(&mut out, 2, &sort_maps(name, value));
            }
            _ => out.extend_from_slice(field.whole),
        }
    }
    out
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
        let name = LbEndpoint::full_name();
        assert_eq!(sort_maps(&name, &a), sort_maps(&name, &b));
        assert_eq!(LbEndpoint::decode(sort_maps(&name, &a).as_slice()).unwrap(), make());
    }

    #[test]
    fn garbage_passes_through() {
        for bytes in [&[0xffu8; 3][..], &[0x0a, 0x7f, 0x01], &[0x0a]] {
            sort_maps("envoy.config.cluster.v3.Cluster", bytes);
        }
    }
}
