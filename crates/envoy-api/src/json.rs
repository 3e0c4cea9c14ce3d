//! Canonical proto3 JSON of Envoy's messages, for config dumps, files and EnvoyFilter patches.
//!
//! Works by reflection over the committed descriptor set. The pool is made at first use, because it
//! costs some megabytes that a sidecar which nobody asks for a dump should not pay.

use std::sync::LazyLock;

use bytes::Bytes;
use envoy_types::pb::google::protobuf::FileDescriptorSet;
use prost::Message;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions};
use serde_json::Value;

use crate::{istio, xds};

static DESCRIPTORS: &[u8] = include_bytes!("../descriptors.bin");

static POOL: LazyLock<Result<DescriptorPool, String>> = LazyLock::new(|| {
    let mut pool = DescriptorPool::decode(DESCRIPTORS).map_err(|e| e.to_string())?;
    let own = own_descriptors().encode_to_vec();
    pool.decode_file_descriptor_set(own.as_slice()).map_err(|e| e.to_string())?;
    Ok(pool)
});

/// A message that could not be turned into JSON or back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The type is in none of the known packages.
    #[error("unknown message type {type_url:?}")]
    UnknownType {
        /// As it was given.
        type_url: String,
    },
    /// The bytes are no message of that type.
    #[error("bytes are no {type_url}")]
    Bytes {
        /// As it was given.
        type_url: String,
        /// Where it broke.
        #[source]
        source: prost::DecodeError,
    },
    /// The JSON does not fit the type.
    #[error("JSON does not fit {type_url}: {reason}")]
    Json {
        /// As it was given.
        type_url: String,
        /// The field and what is wrong with it.
        reason: String,
    },
}

/// Those of messages that Envoy's published types lack.
fn own_descriptors() -> FileDescriptorSet {
    let mut set = istio::descriptors();
    set.file.extend(xds::descriptors());
    set
}

/// All descriptors: Envoy's and those of Istio's filters.
pub(crate) fn descriptor_set() -> FileDescriptorSet {
    let mut set = FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_default();
    set.file.extend(own_descriptors().file);
    set
}

/// The same, encoded, in the order in which they build on each other.
pub(crate) fn encoded_descriptors() -> [Bytes; 2] {
    [Bytes::from_static(DESCRIPTORS), Bytes::from(own_descriptors().encode_to_vec())]
}

/// The reflection descriptor of `type_url` (a full name, with or without a prefix ending in `/`).
pub fn descriptor(type_url: &str) -> Result<MessageDescriptor, Error> {
    let unknown = || Error::UnknownType { type_url: type_url.to_owned() };
    let name = type_url.rsplit('/').next().unwrap_or(type_url);
    POOL.as_ref().map_err(|_| unknown())?.get_message_by_name(name).ok_or_else(unknown)
}

/// The message as reflection sees it.
pub fn decode(type_url: &str, bytes: &[u8]) -> Result<DynamicMessage, Error> {
    DynamicMessage::decode(descriptor(type_url)?, bytes)
        .map_err(|source| Error::Bytes { type_url: type_url.to_owned(), source })
}

/// Canonical JSON with proto field names, as Envoy's config dump writes it; `Any` inlined with `@type`. One without a
/// type, such as the empty `config` that enables a filter for a route, is `{}`, and so is one of an unknown type.
pub fn to_json(type_url: &str, bytes: &[u8]) -> Result<Value, Error> {
    let options = SerializeOptions::new().use_proto_field_name(true).stringify_64_bit_integers(false);
    let mut message = decode(type_url, bytes)?;
    let written = message.serialize_with_options(serde_json::value::Serializer, &options).or_else(|_| {
        mark_unreadable(&mut message);
        let mut marked = message.serialize_with_options(serde_json::value::Serializer, &options)?;
        empty_marked(&mut marked);
        Ok::<_, serde_json::Error>(marked)
    });
    written.map_err(|e| Error::Json { type_url: type_url.to_owned(), reason: e.to_string() })
}

/// What stands for an `Any` that cannot be written: no extension is configured by it.
const UNREADABLE: &str = "type.googleapis.com/google.protobuf.Empty";

/// Replaces every `Any` that cannot be decoded, also inside others, by [`UNREADABLE`].
fn mark_unreadable(message: &mut DynamicMessage) {
    use prost_reflect::{ReflectMessage, Value as Field};
    if message.descriptor().full_name() == "google.protobuf.Any" {
        let text = |field| message.get_field_by_name(field).map(std::borrow::Cow::into_owned);
        let (Some(Field::String(url)), Some(Field::Bytes(bytes))) = (text("type_url"), text("value")) else { return };
        let (url, bytes) = match decode(&url, &bytes) {
            Ok(mut inner) => {
                mark_unreadable(&mut inner);
                (url, inner.encode_to_vec())
            }
            Err(_) => (UNREADABLE.to_owned(), Vec::new()),
        };
        message.set_field_by_name("type_url", Field::String(url));
        message.set_field_by_name("value", Field::Bytes(bytes.into()));
        return;
    }
    for (_, value) in message.fields_mut() {
        match value {
            Field::Message(inner) => mark_unreadable(inner),
            Field::List(items) => items.iter_mut().filter_map(Field::as_message_mut).for_each(mark_unreadable),
            Field::Map(entries) => entries.values_mut().filter_map(Field::as_message_mut).for_each(mark_unreadable),
            _ => {}
        }
    }
}

/// Empties the objects of [`UNREADABLE`].
fn empty_marked(value: &mut Value) {
    match value {
        Value::Object(map) if map.get("@type").is_some_and(|url| url == UNREADABLE) => map.clear(),
        Value::Object(map) => map.values_mut().for_each(empty_marked),
        Value::Array(items) => items.iter_mut().for_each(empty_marked),
        _ => {}
    }
}

/// Canonical JSON with names in camel case, as istiod's debug pages write it; `Any` inlined with `@type`.
pub fn to_camel_json(type_url: &str, bytes: &[u8]) -> Result<Value, Error> {
    decode(type_url, bytes)?
        .serialize_with_options(serde_json::value::Serializer, &SerializeOptions::new())
        .map_err(|e| Error::Json { type_url: type_url.to_owned(), reason: e.to_string() })
}

/// The message that `value` describes; fields by proto or lowerCamel name. Unknown fields are refused.
pub fn message_from_json(type_url: &str, value: &Value) -> Result<DynamicMessage, Error> {
    let fail = |reason: String| Error::Json { type_url: type_url.to_owned(), reason };
    DynamicMessage::deserialize(descriptor(type_url)?, value).map_err(|e| fail(e.to_string()))
}

/// As [`message_from_json`], encoded.
pub fn from_json(type_url: &str, value: &Value) -> Result<Vec<u8>, Error> {
    Ok(message_from_json(type_url, value)?.encode_to_vec())
}

/// As [`from_json`], but unknown fields are ignored: proxies may be newer than our messages.
pub fn from_json_lenient(type_url: &str, value: &Value) -> Result<Vec<u8>, Error> {
    let fail = |reason: String| Error::Json { type_url: type_url.to_owned(), reason };
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let message = DynamicMessage::deserialize_with_options(descriptor(type_url)?, value, &options)
        .map_err(|e| fail(e.to_string()))?;
    Ok(message.encode_to_vec())
}

/// Lays the fields that `over` sets over `base`, both encoded messages of one type: messages merge, lists
/// grow (or are replaced), maps are merged by key, durations are replaced as a whole (istio `pkg/proto/merge`).
pub fn merge(type_url: &str, base: &[u8], over: &[u8], replace_lists: bool) -> Result<Vec<u8>, Error> {
    let mut out = decode(type_url, base)?;
    merge_message(&mut out, &decode(type_url, over)?, replace_lists);
    Ok(out.encode_to_vec())
}

fn merge_message(base: &mut DynamicMessage, over: &DynamicMessage, replace_lists: bool) {
    use prost_reflect::{Kind, ReflectMessage, Value as Field};
    for (field, value) in over.fields() {
        match (value, field.kind()) {
            (Field::List(items), _) => {
                if replace_lists {
                    base.clear_field(&field);
                }
                if let Field::List(list) = base.get_field_mut(&field) {
                    list.extend(items.iter().cloned());
                }
            }
            (Field::Map(entries), _) => {
                if let Field::Map(map) = base.get_field_mut(&field) {
                    map.extend(entries.iter().map(|(k, v)| (k.clone(), v.clone())));
                }
            }
            (Field::Message(message), Kind::Message(_))
                if message.descriptor().full_name() != "google.protobuf.Duration" && base.has_field(&field) =>
            {
                if let Field::Message(own) = base.get_field_mut(&field) {
                    merge_message(own, message, replace_lists);
                }
            }
            (value, _) => base.set_field(&field, value.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Name;
    use serde_json::json;

    #[test]
    fn any_is_inlined_and_round_trips() {
        let url = "type.googleapis.com/envoy.config.listener.v3.Filter";
        let value = json!({
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": "x", "cluster": "x", "idle_timeout": "1.500s"
            }
        });
        assert_eq!(to_json(url, &from_json(url, &value).unwrap()).unwrap(), value);
    }

    #[test]
    fn istio_filters_are_known() {
        let url = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig";
        let value = json!({
            "name": "istio.alpn",
            "typed_config": {
                "@type": "type.googleapis.com/istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig",
                "alpn_override": [{"upstream_protocol": "HTTP2", "alpn_override": ["istio-h2", "h2"]}]
            }
        });
        assert_eq!(to_json(url, &from_json(url, &value).unwrap()).unwrap(), value);
        for name in [
            istio::TypedStruct::full_name(),
            istio::XdsTypedStruct::full_name(),
            istio::StatsConfig::full_name(),
            istio::NameTable::full_name(),
            istio::MySqlProxy::full_name(),
        ] {
            assert!(descriptor(&name).is_ok(), "{name}");
        }
    }

    #[test]
    fn any_without_a_known_type_is_empty() {
        let any = |url: &str, value: &[u8]| {
            envoy_types::pb::google::protobuf::Any { type_url: url.to_owned(), value: value.to_vec() }.encode_to_vec()
        };
        // Field 2 of FilterConfig is `is_optional`, field 1 is `config`.
        let with_config = |config: Vec<u8>| [vec![0x0a, config.len() as u8], config, vec![0x10, 1]].concat();
        let url = "type.googleapis.com/envoy.config.route.v3.FilterConfig";
        for config in [any("", b""), any("type.googleapis.com/no.such", b"x")] {
            let outer = any(url, &with_config(config));
            let expected = json!({"@type": url, "config": {}, "is_optional": true});
            assert_eq!(to_json("google.protobuf.Any", &outer).unwrap(), expected);
        }
    }

    #[test]
    fn merging_adds_to_lists_and_replaces_durations() {
        let url = "envoy.config.cluster.v3.Cluster";
        let encode = |value| from_json(url, &value).unwrap();
        let base = encode(json!({"name": "a", "connect_timeout": "1.500s", "filters": [{"name": "x"}]}));
        let over = encode(json!({"connect_timeout": "2s", "filters": [{"name": "y"}]}));
        let merged = |replace| to_json(url, &merge(url, &base, &over, replace).unwrap()).unwrap();
        let filters = json!([{"name": "x"}, {"name": "y"}]);
        assert_eq!(merged(false), json!({"name": "a", "connect_timeout": "2s", "filters": filters}));
        assert_eq!(merged(true), json!({"name": "a", "connect_timeout": "2s", "filters": [{"name": "y"}]}));
    }

    #[test]
    fn refuses_unknown_fields_and_types() {
        assert!(from_json("envoy.config.cluster.v3.Cluster", &json!({"nam": "x"})).is_err());
        assert!(to_json("no.such.Type", &[]).is_err());
        assert!(to_json("envoy.config.cluster.v3.Cluster", &[0xff]).is_err());
    }
}
