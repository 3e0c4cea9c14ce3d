//! Messages put together from bytes, for those of which there are thousands that differ in little but names.

use prost::encoding::{WireType, encode_key, encode_varint};
use prost::{Message, Name};

use crate::Any;
use crate::canonical::{self, next_field};

/// Adds a field of text.
pub fn text(number: u32, text: &str, out: &mut Vec<u8>) {
    field(number, text.as_bytes(), out);
}

/// Adds a field with this content: text, bytes, or a message.
pub fn field(number: u32, content: &[u8], out: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(content.len() as u64, out);
    out.extend_from_slice(content);
}

/// Adds a field with what `inside` adds.
pub fn nested(number: u32, out: &mut Vec<u8>, inside: impl FnOnce(&mut Vec<u8>)) {
    encode_key(number, WireType::LengthDelimited, out);
    let at = out.len();
    // Most are short, and their length one byte.
    out.push(0);
    inside(out);
    let length = out.len() - at - 1;
    if length < 0x80 {
        out[at] = length as u8;
        return;
    }
    let mut bytes = Vec::with_capacity(5);
    encode_varint(length as u64, &mut bytes);
    out.splice(at..=at, bytes);
}

/// A message some of whose fields are bytes already.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spliced<M> {
    /// All the others.
    pub message: M,
    fields: Vec<(u32, Vec<u8>)>,
}

impl<M: Message + Name + Default> Spliced<M> {
    /// The message, with these fields as bytes: their numbers and contents.
    pub fn new(message: M, fields: Vec<(u32, Vec<u8>)>) -> Spliced<M> {
        Spliced { message, fields }
    }

    /// The whole message as bytes, with sorted map entries if those inside the fields and inside every `Any` are sorted.
    pub fn encode(&self) -> Vec<u8> {
        let more: usize = self.fields.iter().map(|(_, content)| content.len() + 8).sum();
        let mut body = Vec::with_capacity(self.message.encoded_len() + more);
        self.message.encode_raw(&mut body);
        canonical::sort_outer_maps(&M::full_name(), &mut body);
        for (number, content) in &self.fields {
            insert(&mut body, *number, content);
        }
        body
    }

    /// The whole message.
    pub fn into_message(self) -> M {
        match self.fields.is_empty() {
            true => self.message,
            // Nothing is wrong with bytes that were just written.
            false => M::decode(self.encode().as_slice()).unwrap_or(self.message),
        }
    }
}

/// Puts a field before those of higher numbers.
fn insert(body: &mut Vec<u8>, number: u32, content: &[u8]) {
    let (mut at, mut place) = (0, 0);
    while let Some(field) = next_field(body, &mut at) {
        if field.number > number {
            break;
        }
        place = at;
    }
    let mut head = Vec::with_capacity(8);
    encode_key(number, WireType::LengthDelimited, &mut head);
    encode_varint(content.len() as u64, &mut head);
    let (end, more) = (body.len(), head.len() + content.len());
    body.resize(end + more, 0);
    body.copy_within(place..end, place + more);
    body[place..place + head.len()].copy_from_slice(&head);
    body[place + head.len()..place + more].copy_from_slice(content);
}

/// Encodes a message with sorted map entries if those inside every `Any` in it are sorted.
pub fn encode<M: Message + Name>(message: &M) -> Vec<u8> {
    encoded(message, &M::full_name())
}

fn encoded<M: Message>(message: &M, name: &str) -> Vec<u8> {
    let mut body = message.encode_to_vec();
    canonical::sort_outer_maps(name, &mut body);
    body
}

/// Packs a message as [`crate::any`] does, with sorted map entries if those inside every `Any` in it are sorted.
pub fn packed<M: Message + Name>(message: &M) -> Any {
    let name = M::full_name();
    let value = encoded(message, &name);
    let mut type_url = String::with_capacity("type.googleapis.com/".len() + name.len());
    type_url.push_str("type.googleapis.com/");
    type_url.push_str(&name);
    Any { type_url, value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Cluster;
    use crate::core::Metadata;
    use crate::wkt::Struct;

    #[test]
    fn spliced_fields_are_where_they_belong() {
        let metadata =
            Metadata { filter_metadata: [("istio".to_owned(), Struct::default())].into(), ..Metadata::default() };
        let short = Cluster { name: "a".to_owned(), alt_stat_name: "b".repeat(200), ..Cluster::default() };
        let whole = Cluster { metadata: Some(metadata.clone()), ..short.clone() };
        let spliced = Spliced::new(short, vec![(25, metadata.encode_to_vec())]);
        assert_eq!(spliced.encode(), whole.encode_to_vec());
        assert_eq!(spliced.into_message(), whole);
    }

    #[test]
    fn nested_fields_know_their_length() {
        for length in [0, 1, 127, 128, 300, 20_000] {
            let name = "x".repeat(length);
            let mut out = Vec::new();
            nested(1, &mut out, |out| text(1, &name, out));
            let mut inner = Vec::new();
            text(1, &name, &mut inner);
            let mut expected = Vec::new();
            field(1, &inner, &mut expected);
            assert_eq!(out, expected);
        }
    }
}
