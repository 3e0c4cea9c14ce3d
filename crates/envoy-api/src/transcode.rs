//! JSON to encoded messages without reflection: what a proxy that starts with thousands of clusters reads first.
//!
//! Only the descriptors of the messages that occur are decoded, and nothing is kept. It understands what configurations
//! use; of anything else (and of anything wrong) it says nothing, and [`crate::json::from_json`] is to be asked.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use bytes::Bytes;
use envoy_types::pb::google::protobuf::field_descriptor_proto::{Label, Type};
use envoy_types::pb::google::protobuf::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto};
use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// JSON with its strings left where they are in the text, and objects in their order.
#[derive(Debug)]
pub enum Json<'a> {
    /// `null`
    Null,
    /// `true`, `false`
    Bool(bool),
    /// A number without a fraction.
    Int(i64),
    /// One that is too big for the former.
    Uint(u64),
    /// Any other number.
    Float(f64),
    /// Text.
    Text(Cow<'a, str>),
    /// `[…]`
    List(Vec<Json<'a>>),
    /// `{…}`, equal keys included.
    Object(Vec<(Cow<'a, str>, Json<'a>)>),
}

impl<'a> From<&'a Value> for Json<'a> {
    fn from(value: &'a Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(b) => Self::Bool(*b),
            Value::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(n), _) => Self::Int(n),
                (None, Some(n)) => Self::Uint(n),
                (None, None) => Self::Float(n.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(s) => Self::Text(s.as_str().into()),
            Value::Array(items) => Self::List(items.iter().map(Self::from).collect()),
            Value::Object(map) => Self::Object(map.iter().map(|(k, v)| (k.as_str().into(), v.into())).collect()),
        }
    }
}

impl<'de> Deserialize<'de> for Json<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<Json<'de>, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E: Error>(self, b: bool) -> Result<Json<'de>, E> {
        Ok(Json::Bool(b))
    }

    fn visit_i64<E: Error>(self, n: i64) -> Result<Json<'de>, E> {
        Ok(Json::Int(n))
    }

    fn visit_u64<E: Error>(self, n: u64) -> Result<Json<'de>, E> {
        Ok(i64::try_from(n).map_or(Json::Uint(n), Json::Int))
    }

    fn visit_f64<E: Error>(self, n: f64) -> Result<Json<'de>, E> {
        Ok(Json::Float(n))
    }

    fn visit_borrowed_str<E: Error>(self, s: &'de str) -> Result<Json<'de>, E> {
        Ok(Json::Text(s.into()))
    }

    fn visit_str<E: Error>(self, s: &str) -> Result<Json<'de>, E> {
        Ok(Json::Text(s.to_owned().into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json<'de>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Json::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json<'de>, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Json<'de>>()? {
            let Json::Text(key) = key else { return Err(A::Error::custom("a key is no text")) };
            entries.push((key, map.next_value()?));
        }
        Ok(Json::Object(entries))
    }
}

/// The message of that type which `json` describes, encoded. `None`: reflection has to look at it.
pub fn encode(type_url: &str, json: &Json<'_>) -> Option<Vec<u8>> {
    let schema = Schema::new()?;
    let root = schema.find(type_url.rsplit('/').next()?)?;
    let mut out = Vec::new();
    schema.message(root, json, &mut out)?;
    Some(out)
}

/// A `FileDescriptorSet` whose files are left encoded.
#[derive(Message)]
struct Files {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    file: Vec<Bytes>,
}

/// A `FileDescriptorProto` whose types are left encoded.
#[derive(Message)]
struct File {
    #[prost(string, tag = "2")]
    package: String,
    #[prost(bytes = "bytes", repeated, tag = "4")]
    messages: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "5")]
    enums: Vec<Bytes>,
    #[prost(string, tag = "12")]
    syntax: String,
}

/// The name of a message or enumeration.
#[derive(Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

/// The types that were needed so far, by number, and where the others are found.
struct Schema {
    packages: HashMap<String, Vec<File>>,
    numbers: RefCell<HashMap<String, usize>>,
    kinds: RefCell<Vec<Rc<Kind>>>,
}

enum Kind {
    Message { name: String, map_entry: bool, fields: HashMap<String, Rc<Field>> },
    Enum(HashMap<String, i32>),
}

struct Field {
    number: u32,
    of: Type,
    type_name: String,
    /// The number of the type of that name, once it was looked for.
    target: Cell<Option<usize>>,
    repeated: bool,
    /// Set and zero is something else than not set.
    presence: bool,
    oneof: Option<i32>,
}

impl Schema {
    fn new() -> Option<Self> {
        let mut packages: HashMap<String, Vec<File>> = HashMap::new();
        for set in crate::json::encoded_descriptors() {
            for file in Files::decode(set).ok()?.file {
                let file = File::decode(file).ok()?;
                // Only then are fields without a word about it absent when zero.
                if file.syntax == "proto3" {
                    packages.entry(file.package.clone()).or_default().push(file);
                }
            }
        }
        Some(Self { packages, numbers: RefCell::default(), kinds: RefCell::default() })
    }

    /// The number of a type by its full name.
    fn find(&self, name: &str) -> Option<usize> {
        if let Some(number) = self.numbers.borrow().get(name) {
            return Some(*number);
        }
        // The package is the longest that fits; what follows is the outermost type.
        let mut package = name;
        let (files, path) = loop {
            package = package.rsplit_once('.')?.0;
            if let Some(files) = self.packages.get(package) {
                break (files, &name[package.len() + 1..]);
            }
        };
        let outermost = path.split('.').next()?;
        let is_it = |bytes: &&Bytes| Named::decode((*bytes).clone()).is_ok_and(|n| n.name == outermost);
        if let Some(bytes) = files.iter().flat_map(|f| &f.messages).find(is_it) {
            self.add(package, &DescriptorProto::decode(bytes.clone()).ok()?);
        } else if let Some(bytes) = files.iter().flat_map(|f| &f.enums).find(is_it) {
            self.add_enum(package, &EnumDescriptorProto::decode(bytes.clone()).ok()?);
        }
        self.numbers.borrow().get(name).copied()
    }

    fn add(&self, scope: &str, message: &DescriptorProto) {
        let name = format!("{scope}.{}", message.name());
        for nested in &message.nested_type {
            self.add(&name, nested);
        }
        for nested in &message.enum_type {
            self.add_enum(&name, nested);
        }
        let mut fields = HashMap::new();
        for field in &message.field {
            let compiled = Rc::new(Field::new(field));
            fields.insert(field.name().to_owned(), compiled.clone());
            if let Some(json_name) = &field.json_name {
                fields.insert(json_name.clone(), compiled);
            }
        }
        let map_entry = message.options.as_ref().is_some_and(|o| o.map_entry());
        self.push(name.clone(), Kind::Message { name, map_entry, fields });
    }

    fn add_enum(&self, scope: &str, of: &EnumDescriptorProto) {
        let values = of.value.iter().map(|v| (v.name().to_owned(), v.number())).collect();
        self.push(format!("{scope}.{}", of.name()), Kind::Enum(values));
    }

    fn push(&self, name: String, kind: Kind) {
        let mut kinds = self.kinds.borrow_mut();
        self.numbers.borrow_mut().insert(name, kinds.len());
        kinds.push(Rc::new(kind));
    }

    fn kind(&self, number: usize) -> Option<Rc<Kind>> {
        self.kinds.borrow().get(number).cloned()
    }

    fn target(&self, field: &Field) -> Option<usize> {
        if field.target.get().is_none() {
            field.target.set(self.find(field.type_name.strip_prefix('.')?));
        }
        field.target.get()
    }

    fn message(&self, number: usize, json: &Json<'_>, out: &mut Vec<u8>) -> Option<()> {
        let kind = self.kind(number)?;
        let Kind::Message { name, fields, .. } = &*kind else { return None };
        if let Some(known) = name.strip_prefix("google.protobuf.") {
            return self.well_known(known, json, out);
        }
        let Json::Object(entries) = json else { return None };
        self.fields(fields, entries, false, out)
    }

    /// `in_any`: one of the entries is the type.
    fn fields(
        &self,
        fields: &HashMap<String, Rc<Field>>,
        entries: &[(Cow<'_, str>, Json<'_>)],
        in_any: bool,
        out: &mut Vec<u8>,
    ) -> Option<()> {
        let mut numbers = Vec::with_capacity(entries.len());
        let mut oneofs = Vec::new();
        for (key, value) in entries {
            if in_any && key == "@type" {
                continue;
            }
            let field = fields.get(&**key)?;
            if matches!(value, Json::Null) {
                if matches!(field.type_name.as_str(), ".google.protobuf.Value" | ".google.protobuf.NullValue") {
                    return None;
                }
                continue;
            }
            if numbers.contains(&field.number) || field.oneof.is_some_and(|o| oneofs.contains(&o)) {
                return None;
            }
            numbers.push(field.number);
            oneofs.extend(field.oneof);
            match field.repeated {
                true => self.repeated(field, value, out)?,
                false => self.single(field, value, field.presence, out)?,
            }
        }
        Some(())
    }

    fn repeated(&self, field: &Field, value: &Json<'_>, out: &mut Vec<u8>) -> Option<()> {
        let items = match value {
            Json::List(items) => items,
            Json::Object(entries) => return self.map(field, entries, out),
            _ => return None,
        };
        if matches!(field.of, Type::Message) && self.is_map(field)? {
            return None;
        }
        if matches!(field.of, Type::Message | Type::String | Type::Bytes) {
            return items.iter().try_for_each(|item| self.single(field, item, true, out));
        }
        if items.is_empty() {
            return Some(());
        }
        delimited(field.number, out, |out| items.iter().try_for_each(|item| self.scalar(field, item, out)))
    }

    fn is_map(&self, field: &Field) -> Option<bool> {
        Some(matches!(&*self.kind(self.target(field)?)?, Kind::Message { map_entry: true, .. }))
    }

    fn map(&self, field: &Field, entries: &[(Cow<'_, str>, Json<'_>)], out: &mut Vec<u8>) -> Option<()> {
        if !matches!(field.of, Type::Message) {
            return None;
        }
        let kind = self.kind(self.target(field)?)?;
        let Kind::Message { map_entry: true, fields, .. } = &*kind else { return None };
        let (key_field, value_field) = (fields.get("key")?, fields.get("value")?);
        let mut seen = HashSet::new();
        for (key, value) in entries {
            if !seen.insert(&**key) || !matches!(key_field.of, Type::String) {
                return None;
            }
            delimited(field.number, out, |out| {
                if !key.is_empty() {
                    text(key_field.number, key, out);
                }
                self.single(value_field, value, value_field.presence, out)
            })?;
        }
        Some(())
    }

    /// A field with one value, or one element of it. `always`: even if it is zero.
    fn single(&self, field: &Field, value: &Json<'_>, always: bool, out: &mut Vec<u8>) -> Option<()> {
        match (field.of, value) {
            (Type::Message, _) => {
                let target = self.target(field)?;
                delimited(field.number, out, |out| self.message(target, value, out))
            }
            (Type::String, Json::Text(value)) => {
                if always || !value.is_empty() {
                    text(field.number, value, out);
                }
                Some(())
            }
            (Type::String | Type::Bytes, _) => None,
            _ => {
                let start = out.len();
                encode_key(field.number, wire_type(field.of)?, out);
                let from = out.len();
                self.scalar(field, value, out)?;
                if !always && out[from..].iter().all(|b| *b == 0) {
                    out.truncate(start);
                }
                Some(())
            }
        }
    }

    /// A number, truth value or enumerator, without its key.
    fn scalar(&self, field: &Field, value: &Json<'_>, out: &mut Vec<u8>) -> Option<()> {
        match field.of {
            Type::Bool => {
                let Json::Bool(b) = value else { return None };
                out.push(u8::from(*b));
            }
            Type::Int32 => encode_varint(i64::from(integer::<i32>(value)?) as u64, out),
            Type::Int64 => encode_varint(integer::<i64>(value)? as u64, out),
            Type::Uint32 => encode_varint(u64::from(integer::<u32>(value)?), out),
            Type::Uint64 => encode_varint(integer::<u64>(value)?, out),
            Type::Double => out.extend(float(value)?.to_le_bytes()),
            Type::Float => {
                let value = float(value)?;
                if value < f64::from(f32::MIN) || value > f64::from(f32::MAX) {
                    return None;
                }
                out.extend((value as f32).to_le_bytes());
            }
            Type::Enum => {
                let kind = self.kind(self.target(field)?)?;
                let Kind::Enum(values) = &*kind else { return None };
                let number = match value {
                    Json::Text(name) => *values.get(&**name)?,
                    value => i32::try_from(plain_integer(value)?).ok()?,
                };
                encode_varint(i64::from(number) as u64, out);
            }
            _ => return None,
        }
        Some(())
    }

    fn well_known(&self, name: &str, json: &Json<'_>, out: &mut Vec<u8>) -> Option<()> {
        let wrapped = match name {
            "Any" => return self.any(json, out),
            "Duration" => return duration(json, out),
            "Struct" => return structure(json, out),
            "Value" => return free_value(json, out),
            "ListValue" => return list(json, out),
            "Empty" => return matches!(json, Json::Object(entries) if entries.is_empty()).then_some(()),
            "BoolValue" => Type::Bool,
            "Int32Value" => Type::Int32,
            "Int64Value" => Type::Int64,
            "UInt32Value" => Type::Uint32,
            "UInt64Value" => Type::Uint64,
            "FloatValue" => Type::Float,
            "DoubleValue" => Type::Double,
            "StringValue" => Type::String,
            _ => return None,
        };
        self.single(&Field::wrapped(wrapped), json, false, out)
    }

    fn any(&self, json: &Json<'_>, out: &mut Vec<u8>) -> Option<()> {
        let Json::Object(entries) = json else { return None };
        if entries.is_empty() {
            // A message of no type, as switches a route's filter on.
            return Some(());
        }
        let mut urls = entries.iter().filter(|(key, _)| key == "@type");
        let (Some((_, Json::Text(url))), None) = (urls.next(), urls.next()) else { return None };
        let (_, name) = url.rsplit_once('/')?;
        let kind = self.kind(self.find(name)?)?;
        let Kind::Message { name, fields, .. } = &*kind else { return None };
        if name.starts_with("google.protobuf.") {
            return None;
        }
        text(1, url, out);
        let start = out.len();
        delimited(2, out, |out| self.fields(fields, entries, true, out))?;
        if out.len() == start + 2 {
            // Nothing but the key and a length of 0.
            out.truncate(start);
        }
        Some(())
    }
}

impl Field {
    fn new(field: &FieldDescriptorProto) -> Self {
        let of = field.r#type();
        let optional = field.proto3_optional();
        Self {
            number: u32::try_from(field.number()).unwrap_or_default(),
            of,
            type_name: field.type_name().to_owned(),
            target: Cell::new(None),
            repeated: field.label() == Label::Repeated,
            presence: optional || field.oneof_index.is_some() || of == Type::Message,
            oneof: field.oneof_index,
        }
    }

    /// The one field of a wrapper.
    fn wrapped(of: Type) -> Self {
        let (type_name, target) = (String::new(), Cell::new(None));
        Self { number: 1, of, type_name, target, repeated: false, presence: false, oneof: None }
    }
}

fn wire_type(of: Type) -> Option<WireType> {
    match of {
        Type::Bool | Type::Int32 | Type::Int64 | Type::Uint32 | Type::Uint64 | Type::Enum => Some(WireType::Varint),
        Type::Double => Some(WireType::SixtyFourBit),
        Type::Float => Some(WireType::ThirtyTwoBit),
        _ => None,
    }
}

/// A field of bytes that `write` gives, whose number is known only then.
fn delimited(number: u32, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>) -> Option<()>) -> Option<()> {
    encode_key(number, WireType::LengthDelimited, out);
    let length_at = out.len();
    // Most lengths take one byte.
    out.push(0);
    write(out)?;
    let mut length = [0; 10];
    let mut rest = &mut length[..];
    encode_varint((out.len() - length_at - 1) as u64, &mut rest);
    let used = 10 - rest.len();
    out.splice(length_at..=length_at, length[..used].iter().copied());
    Some(())
}

fn text(number: u32, value: &str, out: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(value.len() as u64, out);
    out.extend_from_slice(value.as_bytes());
}

fn plain_integer(value: &Json<'_>) -> Option<i128> {
    match value {
        Json::Int(n) => Some(i128::from(*n)),
        Json::Uint(n) => Some(i128::from(*n)),
        _ => None,
    }
}

fn integer<N: TryFrom<i128> + std::str::FromStr>(value: &Json<'_>) -> Option<N> {
    match value {
        Json::Text(text) => text.parse().ok(),
        value => N::try_from(plain_integer(value)?).ok(),
    }
}

fn float(value: &Json<'_>) -> Option<f64> {
    match value {
        Json::Float(n) => Some(*n),
        Json::Int(n) => Some(*n as f64),
        Json::Uint(n) => Some(*n as f64),
        _ => None,
    }
}

/// Seconds with up to nine digits after the point; signs are left to reflection.
fn duration(json: &Json<'_>, out: &mut Vec<u8>) -> Option<()> {
    let Json::Text(text) = json else { return None };
    let text = text.strip_suffix('s')?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |s: &str, most: usize| (1..=most).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_digit());
    // Eleven digits stay below the limit of ten thousand years.
    if !digits(seconds, 11) || !digits(fraction, 9) {
        return None;
    }
    let seconds: u64 = seconds.parse().ok()?;
    let nanos = fraction.parse::<u64>().ok()? * 10_u64.pow(9 - fraction.len() as u32);
    for (number, value) in [(1, seconds), (2, nanos)] {
        if value != 0 {
            encode_key(number, WireType::Varint, out);
            encode_varint(value, out);
        }
    }
    Some(())
}

fn structure(json: &Json<'_>, out: &mut Vec<u8>) -> Option<()> {
    let Json::Object(entries) = json else { return None };
    let mut seen = HashSet::new();
    for (key, value) in entries {
        if !seen.insert(&**key) {
            return None;
        }
        delimited(1, out, |out| {
            text(1, key, out);
            delimited(2, out, |out| free_value(value, out))
        })?;
    }
    Some(())
}

fn list(json: &Json<'_>, out: &mut Vec<u8>) -> Option<()> {
    let Json::List(items) = json else { return None };
    items.iter().try_for_each(|item| delimited(1, out, |out| free_value(item, out)))
}

fn free_value(json: &Json<'_>, out: &mut Vec<u8>) -> Option<()> {
    match json {
        Json::Null => out.extend([8, 0]),
        Json::Bool(b) => out.extend([32, u8::from(*b)]),
        Json::Int(_) | Json::Uint(_) | Json::Float(_) => {
            encode_key(2, WireType::SixtyFourBit, out);
            out.extend(float(json)?.to_le_bytes());
        }
        Json::Text(value) => text(3, value, out),
        Json::Object(_) => delimited(5, out, |out| structure(json, out))?,
        Json::List(_) => delimited(6, out, |out| list(json, out))?,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const BOOTSTRAP: &str = "type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap";

    /// What is encoded is what reflection encodes, as text and as a value.
    fn assert_same(value: &Value) {
        let text = value.to_string();
        let slow = crate::json::from_json(BOOTSTRAP, value).expect("reflection reads it");
        let slow = crate::json::to_json(BOOTSTRAP, &slow).unwrap();
        let read: Json<'_> = serde_json::from_str(&text).unwrap();
        for json in [read, Json::from(value)] {
            let bytes = encode(BOOTSTRAP, &json).expect("it is understood");
            assert_eq!(crate::json::to_json(BOOTSTRAP, &bytes).unwrap(), slow);
        }
    }

    #[test]
    fn encodes_as_reflection_does() {
        assert_same(&json!({
            "node": {
                "id": "sidecar~\u{e9}\n\"",
                "metadata": {"N": 1.5, "I": -3, "B": true, "Z": null, "L": ["a", {"b": []}], "": {}},
                "locality": {"region": "", "zone": null, "subZone": "c"},
            },
            "statsConfig": {"use_all_default_tags": false, "stats_tags": [{"tag_name": "t", "fixed_value": ""}]},
            "layered_runtime": {"layers": [{"name": "x", "static_layer": {"a.b": {"c": 7}}}]},
            "dynamic_resources": {"ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": 2}},
            "static_resources": {
                "clusters": [{
                    "name": "a".repeat(300), "type": "EDS", "connect_timeout": "1.250s", "alt_stat_name": "",
                    "per_connection_buffer_limit_bytes": 32768, "cleanup_interval": "0s",
                    "circuit_breakers": {"thresholds": [{"priority": "HIGH", "max_retries": "4294967295"}, {}]},
                    "common_lb_config": {"healthy_panic_threshold": {"value": 33.5}},
                    "metadata": {"filter_metadata": {"istio": {"services": [{"host": "h"}]}}},
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "common_http_protocol_options": {"max_headers_count": 0},
                            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                            "use_downstream_protocol_config": {"http2_protocol_options": {}},
                        },
                    },
                    "transport_socket": {"name": "raw", "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer",
                    }},
                    "outlier_detection": {"consecutive_5xx": 0, "interval": "315576000s"},
                }],
                "listeners": [{
                    "name": "l", "reuse_port": false, "traffic_direction": "OUTBOUND", "transparent": true,
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
                    "filter_chains": [{"filter_chain_match": {"prefix_ranges": [], "source_ports": [1, 300, 0]}}],
                }],
            },
        }));
    }

    #[test]
    fn leaves_to_reflection_what_is_doubtful() {
        for text in [
            r#"{"nod": {}}"#,
            r#"{"node": []}"#,
            r#"{"node": {"@type": "x/y"}}"#,
            r#"{"node": {"id": "a", "id": "b"}}"#,
            r#"{"node": {"metadata": {"a": 1, "a": 2}}}"#,
            r#"{"admin": {"profile_path": 1}}"#,
            r#"{"static_resources": {"clusters": [null]}}"#,
            r#"{"static_resources": {"clusters": {}}}"#,
            r#"{"static_resources": {"clusters": [{"type": "NO_SUCH"}]}}"#,
            r#"{"static_resources": {"clusters": [{"type": "EDS", "cluster_type": {}}]}}"#,
            r#"{"static_resources": {"clusters": [{"connect_timeout": "-1s"}]}}"#,
            r#"{"static_resources": {"clusters": [{"connect_timeout": "1"}]}}"#,
            r#"{"static_resources": {"clusters": [{"per_connection_buffer_limit_bytes": -1}]}}"#,
            r#"{"static_resources": {"clusters": [{"per_connection_buffer_limit_bytes": 1.5}]}}"#,
            r#"{"static_resources": {"clusters": [{"metadata": {"filter_metadata": {"a": 1}}}]}}"#,
            r#"{"static_resources": {"clusters": [{"transport_socket": {"typed_config": {"@type": "x/no.Such"}}}]}}"#,
        ] {
            let json: Json<'_> = serde_json::from_str(text).unwrap();
            assert!(encode(BOOTSTRAP, &json).is_none(), "{text}");
        }
    }
}
