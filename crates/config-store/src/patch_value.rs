//! What an EnvoyFilter lays over Envoy's configuration, read as istiod reads it.
//!
//! Source: golang/protobuf v1.5 `jsonpb`, as in [`istio_api`]: durations are Go's, `null` is unset (in lists an empty
//! element), of the members of a `oneof` the last counts. Fields that nobody knows are ignored.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envoy_api::json::descriptor;
use istio_api::Duration;
use istio_api::envoy_filter::ApplyTo;
use prost_reflect::prost::Message as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value as Field};
use serde_json::{Map, Value};

/// The message that a patch is part of or lies over; none if it is no message that we send.
fn type_of(apply_to: ApplyTo) -> Option<&'static str> {
    Some(match apply_to {
        ApplyTo::Cluster => "envoy.config.cluster.v3.Cluster",
        ApplyTo::Listener => "envoy.config.listener.v3.Listener",
        ApplyTo::ListenerFilter => "envoy.config.listener.v3.ListenerFilter",
        ApplyTo::FilterChain => "envoy.config.listener.v3.FilterChain",
        ApplyTo::NetworkFilter => "envoy.config.listener.v3.Filter",
        ApplyTo::HttpFilter => "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter",
        ApplyTo::RouteConfiguration => "envoy.config.route.v3.RouteConfiguration",
        ApplyTo::VirtualHost => "envoy.config.route.v3.VirtualHost",
        ApplyTo::HttpRoute => "envoy.config.route.v3.Route",
        ApplyTo::ExtensionConfig => "envoy.config.core.v3.TypedExtensionConfig",
        ApplyTo::Bootstrap => "envoy.config.bootstrap.v3.Bootstrap",
        ApplyTo::Invalid => return None,
    })
}

/// A value that is no such message.
#[derive(Debug)]
pub struct InvalidValue {
    /// The field inside the value, such as `.filters[0].name`; empty for the value as a whole.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
}

impl InvalidValue {
    fn new(reason: impl Into<String>) -> InvalidValue {
        InvalidValue { path: String::new(), reason: reason.into() }
    }

    fn below(mut self, parent: &str) -> InvalidValue {
        self.path.insert_str(0, parent);
        self
    }
}

type Read<T> = Result<T, InvalidValue>;

/// The value of a patch as the encoded message that it is for.
///
/// # Errors
/// If it does not fit the message.
pub fn patch_value(apply_to: ApplyTo, value: &Map<String, Value>) -> Read<Vec<u8>> {
    let Some(name) = type_of(apply_to) else { return Err(InvalidValue::new("there is nothing to apply it to")) };
    let descriptor = descriptor(name).map_err(|error| InvalidValue::new(error.to_string()))?;
    Ok(object(&descriptor, value)?.encode_to_vec())
}

fn mismatch<T>(wanted: &str, value: &Value) -> Read<T> {
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    Err(InvalidValue::new(format!("expected {wanted}, found {found}")))
}

fn as_text(value: &Value) -> Read<&str> {
    value.as_str().map_or_else(|| mismatch("text", value), Ok)
}

fn as_object(value: &Value) -> Read<&Map<String, Value>> {
    value.as_object().map_or_else(|| mismatch("an object", value), Ok)
}

fn message(descriptor: &MessageDescriptor, value: &Value) -> Read<DynamicMessage> {
    let name = descriptor.full_name();
    if value.is_null() && name != "google.protobuf.Value" {
        return Ok(DynamicMessage::new(descriptor.clone()));
    }
    let Some(well_known) = name.strip_prefix("google.protobuf.") else { return object(descriptor, as_object(value)?) };
    match well_known {
        "Any" => packed(descriptor, as_object(value)?),
        "Duration" => {
            let text = as_text(value)?;
            let duration: Duration = text.parse().map_err(|e| InvalidValue::new(format!("{e}")))?;
            let mut out = DynamicMessage::new(descriptor.clone());
            out.set_field_by_number(1, Field::I64(duration.as_secs()));
            out.set_field_by_number(2, Field::I32(duration.subsec_nanos()));
            Ok(out)
        }
        "Struct" | "Value" | "ListValue" | "Timestamp" => {
            DynamicMessage::deserialize(descriptor.clone(), value).map_err(|error| InvalidValue::new(error.to_string()))
        }
        wrapper if wrapper.ends_with("Value") => {
            let mut out = DynamicMessage::new(descriptor.clone());
            if let Some(field) = descriptor.get_field(1) {
                out.set_field(&field, single(&field.kind(), value)?);
            }
            Ok(out)
        }
        _ => object(descriptor, as_object(value)?),
    }
}

/// Messages of Google's whose JSON stands under `value` in an `Any`: it may be no object, and has no room for the type.
const VALUES: [&str; 16] = [
    "Any",
    "BoolValue",
    "BytesValue",
    "DoubleValue",
    "Duration",
    "Empty",
    "FloatValue",
    "Int32Value",
    "Int64Value",
    "ListValue",
    "StringValue",
    "Struct",
    "Timestamp",
    "UInt32Value",
    "UInt64Value",
    "Value",
];

fn packed(descriptor: &MessageDescriptor, fields: &Map<String, Value>) -> Read<DynamicMessage> {
    let url = fields.get("@type").ok_or_else(|| InvalidValue::new("lacks \"@type\""))?;
    let url = as_text(url).map_err(|error| error.below(".@type"))?;
    let inner = envoy_api::json::descriptor(url)
        .map_err(|_| InvalidValue::new(format!("{url:?} is no known message type")).below(".@type"))?;
    let is_value = inner.full_name().strip_prefix("google.protobuf.").is_some_and(|name| VALUES.contains(&name));
    let content = if is_value {
        let value = fields.get("value").ok_or_else(|| InvalidValue::new("lacks \"value\""))?;
        message(&inner, value).map_err(|error| error.below(".value"))?
    } else {
        object(&inner, fields)?
    };
    let mut out = DynamicMessage::new(descriptor.clone());
    out.set_field_by_number(1, Field::String(url.to_owned()));
    out.set_field_by_number(2, Field::Bytes(content.encode_to_vec().into()));
    Ok(out)
}

fn object(descriptor: &MessageDescriptor, fields: &Map<String, Value>) -> Read<DynamicMessage> {
    let mut out = DynamicMessage::new(descriptor.clone());
    for field in descriptor.fields() {
        // The name in camel case wins over that of the proto.
        let named = [field.json_name(), field.name()].into_iter().find_map(|name| Some((name, fields.get(name)?)));
        let Some((name, value)) = named else { continue };
        let takes_null = matches!(field.kind(), Kind::Message(m) if m.full_name() == "google.protobuf.Value");
        if value.is_null() && (!takes_null || field.is_list()) {
            continue;
        }
        let value = whole(&field, value).map_err(|error| error.below(&format!(".{name}")))?;
        out.set_field(&field, value);
    }
    Ok(out)
}

fn whole(field: &FieldDescriptor, value: &Value) -> Read<Field> {
    let kind = field.kind();
    if field.is_map() {
        let Kind::Message(entry) = kind else { return mismatch("a map", value) };
        let (key_kind, value_kind) = (entry.map_entry_key_field().kind(), entry.map_entry_value_field().kind());
        let mut out = HashMap::new();
        for (name, value) in as_object(value)? {
            let below = |error: InvalidValue| error.below(&format!("[{name:?}]"));
            let key = match single(&key_kind, &Value::String(name.clone())).map_err(below)? {
                Field::String(key) => MapKey::String(key),
                Field::I32(key) => MapKey::I32(key),
                Field::I64(key) => MapKey::I64(key),
                Field::U32(key) => MapKey::U32(key),
                Field::U64(key) => MapKey::U64(key),
                _ => return Err(below(InvalidValue::new("is no key"))),
            };
            out.insert(key, single(&value_kind, value).map_err(below)?);
        }
        return Ok(Field::Map(out));
    }
    if !field.is_list() {
        return single(&kind, value);
    }
    let Some(items) = value.as_array() else { return mismatch("a list", value) };
    let item = |(index, item)| single(&kind, item).map_err(|error| error.below(&format!("[{index}]")));
    items.iter().enumerate().map(item).collect::<Read<Vec<_>>>().map(Field::List)
}

fn single(kind: &Kind, value: &Value) -> Read<Field> {
    if value.is_null() && !matches!(kind, Kind::Message(_)) {
        return Ok(Field::default_value(kind));
    }
    Ok(match kind {
        Kind::Message(descriptor) => Field::Message(message(descriptor, value)?),
        Kind::Bool => Field::Bool(value.as_bool().map_or_else(|| mismatch("true or false", value), Ok)?),
        Kind::String => Field::String(as_text(value)?.to_owned()),
        Kind::Bytes => {
            let bytes = STANDARD.decode(as_text(value)?).map_err(|error| InvalidValue::new(error.to_string()))?;
            Field::Bytes(bytes.into())
        }
        Kind::Enum(names) => match value {
            Value::String(name) => {
                let known = names.get_value_by_name(name);
                let unknown = || InvalidValue::new(format!("{name:?} is no value of {}", names.full_name()));
                Field::EnumNumber(known.ok_or_else(unknown)?.number())
            }
            _ => Field::EnumNumber(integer(value, "the name or number of a value")?),
        },
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Field::I32(integer(value, "a 32-bit integer")?),
        Kind::Uint32 | Kind::Fixed32 => Field::U32(integer(value, "an unsigned 32-bit integer")?),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Field::I64(integer(value, "a 64-bit integer")?),
        Kind::Uint64 | Kind::Fixed64 => Field::U64(integer(value, "an unsigned 64-bit integer")?),
        Kind::Float => Field::F32(float(value)? as f32),
        Kind::Double => Field::F64(float(value)?),
    })
}

/// A number without fraction, or text that holds one. istiod has all numbers as floats before it comes to this.
fn integer<T: TryFrom<i128>>(value: &Value, wanted: &str) -> Read<T> {
    let number = match value {
        Value::Number(number) => number.as_f64().filter(|v| v.fract() == 0.0 && v.abs() < 1e20).map(|v| v as i128),
        Value::String(text) if !text.starts_with('+') => text.parse().ok(),
        _ => None,
    };
    let fits = number.and_then(|number| T::try_from(number).ok());
    fits.ok_or_else(|| InvalidValue::new(format!("expected {wanted}, found {value}")))
}

fn float(value: &Value) -> Read<f64> {
    let number = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    number.map_or_else(|| mismatch("a number", value), Ok)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(apply_to: ApplyTo, value: Value) -> Result<Value, String> {
        let Value::Object(fields) = &value else { panic!("{value} is no object") };
        let bytes = patch_value(apply_to, fields).map_err(|e| format!("{}: {}", e.path, e.reason))?;
        Ok(envoy_api::json::to_json(type_of(apply_to).unwrap(), &bytes).unwrap())
    }

    fn cluster(value: Value) -> Result<Value, String> {
        read(ApplyTo::Cluster, value)
    }

    #[test]
    fn reads_what_jsonpb_reads() {
        let same = |value: Value, wanted: Value| assert_eq!(cluster(value.clone()), Ok(wanted), "{value}");
        same(json!({"connect_timeout": "1m30s"}), json!({"connect_timeout": "90s"}));
        same(
            json!({"connectTimeout": "500ms", "lb_policy": 3}),
            json!({"connect_timeout": "0.500s", "lb_policy": "RANDOM"}),
        );
        same(json!({"per_connection_buffer_limit_bytes": "100"}), json!({"per_connection_buffer_limit_bytes": 100}));
        same(json!({"nobody_knows": {"a": 1}, "circuit_breakers": null}), json!({}));
        let thresholds = |list: Value| json!({"circuit_breakers": {"thresholds": list}});
        same(thresholds(json!([{"max_retries": 7.0}, null])), thresholds(json!([{"max_retries": 7}, {}])));
        let last = json!({"ring_hash_lb_config": {}, "least_request_lb_config": {"choice_count": 5}});
        same(last, json!({"least_request_lb_config": {"choice_count": 5}}));
        let metadata = json!({"metadata": {"filter_metadata": {"x": {"a": null, "b": [1.0, "x"]}}}});
        same(metadata.clone(), metadata);
        let options = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        let any = |timeout: &str| {
            let common = json!({"@type": options, "common_http_protocol_options": {"idle_timeout": timeout}});
            json!({"typed_extension_protocol_options": {"o": common}})
        };
        same(any("1h"), any("3600s"));
    }

    #[test]
    fn says_what_does_not_fit() {
        for (value, wanted) in [
            (json!({"connect_timeout": 3}), ".connect_timeout: expected text, found a number"),
            (json!({"connect_timeout": "3"}), ".connect_timeout: invalid duration \"3\""),
            (
                json!({"lb_policy": "random"}),
                ".lb_policy: \"random\" is no value of envoy.config.cluster.v3.Cluster.LbPolicy",
            ),
            (json!({"respect_dns_ttl": "true"}), ".respect_dns_ttl: expected true or false, found text"),
            (
                json!({"per_connection_buffer_limit_bytes": -1}),
                ".per_connection_buffer_limit_bytes: expected an unsigned",
            ),
            (json!({"filters": [{}, 5]}), ".filters[1]: expected an object, found a number"),
            (json!({"filters": [{"typed_config": {}}]}), ".filters[0].typed_config: lacks \"@type\""),
            (
                json!({"filters": [{"typed_config": {"@type": "a/no.such"}}]}),
                ".filters[0].typed_config.@type: \"a/no.such\" is no",
            ),
        ] {
            let found = cluster(value.clone()).unwrap_err();
            assert!(found.starts_with(wanted), "{value}: {found}");
        }
        let lua = "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua";
        let bytes = |text: &str| json!({"name": "l", "typed_config": {"@type": lua, "default_source_code": {"inline_bytes": text}}});
        assert!(read(ApplyTo::HttpFilter, bytes("aGk=")).is_ok());
        assert!(read(ApplyTo::HttpFilter, bytes("_-8=")).unwrap_err().contains("inline_bytes"));
    }

    proptest! {
        #[test]
        fn no_value_makes_it_panic(name in "name|connect_timeout|lb_policy|filters|metadata|circuit_breakers", text in ".*", number: f64) {
            for value in [json!(text), json!(number), json!([text, null]), json!({text.clone(): number}), json!([[{}]])] {
                let _ = cluster(json!({name.clone(): value}));
            }
        }
    }
}
