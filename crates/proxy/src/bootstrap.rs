//! Reading a bootstrap: YAML or JSON into the typed message, and what the proxy keeps of it.

use bytes::Bytes;
use envoy_api::Message;
use envoy_api::bootstrap::Bootstrap;
use envoy_api::transcode::{self, Json};
use prost::encoding::{DecodeContext, WireType, decode_key, skip_field};
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::Arc;

/// A bootstrap that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InvalidBootstrap {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Not YAML or JSON.
    #[error("{0}")]
    Syntax(String),
    /// Does not fit `envoy.config.bootstrap.v3.Bootstrap`.
    #[error("bootstrap: {0}")]
    Shape(String),
    /// A resource in it is refused.
    #[error("{0}")]
    Refused(String),
}

const TYPE: &str = "type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap";

/// Reads `-c FILE` and `--config-yaml TEXT`; the latter is merged over the former.
pub(crate) fn read(path: Option<&Path>, inline: Option<&str>) -> Result<Parts, InvalidBootstrap> {
    let mut value = Value::Object(Map::new());
    if let Some(path) = path {
        let text = std::fs::read_to_string(path)
            .map_err(|source| InvalidBootstrap::Read { path: path.display().to_string(), source })?;
        // What agents write is JSON, and may be long. Everything else goes the slow way, which knows what is wrong with it.
        if inline.is_none()
            && text.trim_start().starts_with('{')
            && let Ok(json) = serde_json::from_str::<Json<'_>>(&text)
            && let Some(bytes) = transcode::encode(TYPE, &json)
        {
            return Parts::split(bytes.into_boxed_slice().into());
        }
        value = parse(path, &text)?;
    }
    if let Some(inline) = inline {
        merge(&mut value, parse(Path::new("--config-yaml"), inline)?);
    }
    let bytes = match transcode::encode(TYPE, &Json::from(&value)) {
        Some(bytes) => bytes,
        None => envoy_api::json::from_json(TYPE, &value).map_err(|e| InvalidBootstrap::Shape(e.to_string()))?,
    };
    Parts::split(bytes.into_boxed_slice().into())
}

/// A bootstrap whose static resources are still encoded: there may be thousands, each of which is wanted once.
pub(crate) struct Parts {
    /// All but the static resources.
    pub(crate) head: Bootstrap,
    /// The static resources.
    pub(crate) resources: Resources,
    /// The fields of the message that hold them, for dumps.
    statics: Vec<Bytes>,
}

/// Resources as they are encoded.
#[derive(prost::Message)]
pub(crate) struct Resources {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub(crate) listeners: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub(crate) clusters: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub(crate) secrets: Vec<Bytes>,
}

/// The number of `static_resources`.
const STATIC_RESOURCES: u32 = 2;

/// What is asked of a bootstrap before the rest of it.
#[derive(prost::Message)]
struct Statics {
    #[prost(message, optional, tag = "2")]
    static_resources: Option<Resources>,
}

impl Parts {
    /// Takes an encoded bootstrap apart.
    pub(crate) fn split(bytes: Bytes) -> Result<Self, InvalidBootstrap> {
        let shape = |e: prost::DecodeError| InvalidBootstrap::Shape(e.to_string());
        let mut rest = bytes.clone();
        let (mut head, mut statics) = (Vec::new(), Vec::new());
        while !rest.is_empty() {
            let start = bytes.len() - rest.len();
            let (number, wire_type) = decode_key(&mut rest).map_err(shape)?;
            skip_field(wire_type, number, &mut rest, DecodeContext::default()).map_err(shape)?;
            let field = bytes.slice(start..bytes.len() - rest.len());
            match (number, wire_type) {
                (STATIC_RESOURCES, WireType::LengthDelimited) => statics.push(field),
                _ => head.extend_from_slice(&field),
            }
        }
        let head = Bootstrap::decode(&head[..]).map_err(shape)?;
        let resources = Statics::decode(bytes).map_err(shape)?.static_resources.unwrap_or_default();
        Ok(Self { head, resources, statics })
    }

    /// The message as it was, but for changes of the head.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.head.encode_to_vec();
        self.statics.iter().for_each(|field| bytes.extend_from_slice(field));
        bytes
    }
}

fn parse(path: &Path, text: &str) -> Result<Value, InvalidBootstrap> {
    let mut documents = manifest::parse_envoy(path, text).map_err(|e| InvalidBootstrap::Syntax(e.to_string()))?;
    match documents.len() {
        0 => Ok(Value::Object(Map::new())),
        _ => {
            let mut value = documents.swap_remove(0).value;
            if path.extension().is_none_or(|of| of != "json") {
                numbers_as_yaml(&mut value);
            }
            Ok(value)
        }
    }
}

/// Of YAML, Envoy takes for numbers only what is whole and has 32 bits (`MessageUtil::loadFromYaml`): all else is text,
/// which shows where a field may hold either, as in metadata.
fn numbers_as_yaml(value: &mut Value) {
    match value {
        Value::Number(n) if n.as_i64().is_none_or(|n| i32::try_from(n).is_err()) => *value = n.to_string().into(),
        Value::Array(all) => all.iter_mut().for_each(numbers_as_yaml),
        Value::Object(all) => all.values_mut().for_each(numbers_as_yaml),
        _ => {}
    }
}

/// As protobuf's MergeFrom: messages are merged, lists appended, scalars replaced.
fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                match base.get_mut(&key) {
                    Some(old) => merge(old, value),
                    None => {
                        base.insert(key, value);
                    }
                }
            }
        }
        (Value::Array(base), Value::Array(over)) => base.extend(over),
        (base, over) => *base = over,
    }
}

/// Who this proxy is.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeInfo {
    pub(crate) id: String,
    pub(crate) cluster: String,
    pub(crate) metadata: Value,
    /// What expressions see of the message.
    pub(crate) facts: Arc<Map<String, Value>>,
    pub(crate) message: envoy_api::core::Node,
}

impl NodeInfo {
    pub(crate) fn of(node: Option<&envoy_api::core::Node>) -> Self {
        let node = node.cloned().unwrap_or_default();
        let metadata = node.metadata.as_ref().map(struct_json).unwrap_or_default();
        let locality = node.locality.clone().unwrap_or_default();
        let facts = Map::from_iter([
            ("id".to_owned(), node.id.as_str().into()),
            ("cluster".to_owned(), node.cluster.as_str().into()),
            ("user_agent_name".to_owned(), "envoy".into()),
            ("metadata".to_owned(), if metadata.is_null() { Map::new().into() } else { metadata.clone() }),
            (
                "locality".to_owned(),
                json!({"region": locality.region, "zone": locality.zone, "sub_zone": locality.sub_zone}),
            ),
        ]);
        Self { id: node.id.clone(), cluster: node.cluster.clone(), metadata, facts: Arc::new(facts), message: node }
    }

    /// A text field of the node's metadata.
    pub(crate) fn text(&self, key: &str) -> &str {
        self.metadata.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    /// A label of the workload.
    pub(crate) fn label(&self, key: &str) -> &str {
        self.metadata.get("LABELS").and_then(|l| l.get(key)).and_then(Value::as_str).unwrap_or_default()
    }
}

fn struct_json(s: &envoy_api::wkt::Struct) -> Value {
    Value::Object(s.fields.iter().map(|(k, v)| (k.clone(), value_json(v))).collect())
}

fn value_json(v: &envoy_api::wkt::Value) -> Value {
    use envoy_api::wkt::value::Kind;
    match &v.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::NumberValue(n)) => serde_json::Number::from_f64(*n).map_or(Value::Null, Value::Number),
        Some(Kind::StringValue(s)) => Value::String(s.clone()),
        Some(Kind::BoolValue(b)) => Value::Bool(*b),
        Some(Kind::StructValue(s)) => struct_json(s),
        Some(Kind::ListValue(l)) => Value::Array(l.values.iter().map(value_json).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_the_whole() {
        let text = r#"{"node": {"id": "a"}, "static_resources": {"clusters": [{"name": "c"}, {"name": "d"}],
            "listeners": [{"name": "l"}], "secrets": [{"name": "s"}]}, "flags_path": "f"}"#;
        let parts = read(None, Some(text)).unwrap();
        let counts = (parts.resources.listeners.len(), parts.resources.clusters.len(), parts.resources.secrets.len());
        assert_eq!(counts, (1, 2, 1));
        assert_eq!((parts.head.flags_path.as_str(), parts.head.static_resources.is_none()), ("f", true));
        let whole = Bootstrap::decode(&parts.encode()[..]).unwrap();
        assert_eq!(whole.static_resources.unwrap().clusters[1].name, "d");
    }

    #[test]
    fn inline_is_merged_over_the_file() {
        let mut base = serde_json::json!({"node": {"id": "a"}, "l": [1]});
        merge(&mut base, serde_json::json!({"node": {"cluster": "c"}, "l": [2]}));
        assert_eq!(base, serde_json::json!({"node": {"id": "a", "cluster": "c"}, "l": [1, 2]}));
    }
}
