//! Further fields of PROXY headers (type, length, value): which are told to filters, which go on to hosts, what is added.

use std::sync::Arc;

use mesh_types::ArcStr;
use serde_json::Value;

use crate::fields;
use crate::format::{FormatContext, FormatString};
use crate::metadata::{FilterState, Metadata};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};

/// One field.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Tlv {
    /// Its type.
    pub kind: u8,
    /// Its value.
    pub value: Arc<[u8]>,
}

/// Which fields go on (`ProxyProtocolPassThroughTLVs`).
#[derive(Clone, Debug, Default)]
pub enum TlvFilter {
    /// None.
    #[default]
    None,
    /// All.
    All,
    /// Those of these types.
    Only(Box<[u8]>),
}

/// Names the value of fields of a type for other filters (`ProxyProtocol.Rule`).
#[derive(Clone, Debug)]
pub struct TlvRule {
    kind: u8,
    namespace: ArcStr,
    key: ArcStr,
}

/// A field of our own (`core.v3.TlvEntry`).
#[derive(Clone, Debug)]
pub struct AddedTlv {
    kind: u8,
    value: AddedValue,
}

#[derive(Clone, Debug)]
enum AddedValue {
    Plain(Arc<[u8]>),
    Format(FormatString),
}

/// Where rules without a namespace write.
const NAMESPACE: &str = "envoy.filters.listener.proxy_protocol";
/// Where they write in filter state.
const STATE: &str = "envoy.network.proxy_protocol.tlv";

fn kind(value: u32) -> Compiled<u8> {
    u8::try_from(value).map_err(|_| Invalid::new("type", "must be less than 256"))
}

impl TlvFilter {
    pub(crate) fn compile(config: Option<&pb::core::ProxyProtocolPassThroughTlVs>) -> Compiled<Self> {
        use pb::core::proxy_protocol_pass_through_tl_vs::PassTlVsMatchType as Match;
        let Some(config) = config else { return Ok(Self::None) };
        Ok(match fields::enumeration("match_type", config.match_type)? {
            Match::IncludeAll => Self::All,
            Match::Include => Self::Only(config.tlv_type.iter().map(|t| kind(*t)).collect::<Compiled<_>>()?),
        })
    }

    /// Whether fields of this type go on.
    pub fn passes(&self, kind: u8) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Only(kinds) => kinds.contains(&kind),
        }
    }
}

impl TlvRule {
    pub(crate) fn compile(rule: &pb::listener_filter::proxy_protocol::v3::proxy_protocol::Rule) -> Compiled<Self> {
        let pair = rule.on_tlv_present.as_ref().ok_or_else(|| Invalid::new("on_tlv_present", "is missing"))?;
        let namespace = if pair.metadata_namespace.is_empty() { NAMESPACE } else { &pair.metadata_namespace };
        Ok(Self {
            kind: kind(rule.tlv_type).at("tlv_type")?,
            namespace: namespace.into(),
            key: fields::required("on_tlv_present.key", &pair.key)?,
        })
    }

    /// Into dynamic metadata, where the first value of a type stays (Envoy `Filter::parseTlvs`).
    pub fn tell(rules: &[Self], tlvs: &[Tlv]) -> Metadata {
        let mut metadata = Metadata::default();
        for (rule, tlv) in Self::matches(rules, tlvs) {
            if metadata.get(&rule.namespace, &[&*rule.key]).is_none() {
                metadata.set(&rule.namespace, &rule.key, Value::from(printable(&tlv.value)));
            }
        }
        metadata
    }

    /// Into filter state, where the last one does.
    pub fn keep(rules: &[Self], tlvs: &[Tlv], state: &mut FilterState) {
        let values = Self::matches(rules, tlvs).map(|(rule, tlv)| (rule.key.to_string(), printable(&tlv.value).into()));
        let mut values: serde_json::Map<String, Value> = values.collect();
        if !values.is_empty() {
            values.sort_keys();
            state.values.insert(STATE.into(), Value::Object(values).to_string().into());
        }
    }

    fn matches<'a>(rules: &'a [Self], tlvs: &'a [Tlv]) -> impl Iterator<Item = (&'a Self, &'a Tlv)> {
        tlvs.iter().filter_map(|tlv| Some((rules.iter().find(|rule| rule.kind == tlv.kind)?, tlv)))
    }
}

/// Each byte that is no UTF-8 becomes `!` (Envoy `MessageUtil::sanitizeUtf8String`).
fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| '!'));
    }
    text
}

impl AddedTlv {
    pub(crate) fn compile_all(entries: &[pb::core::TlvEntry]) -> Compiled<Box<[Self]>> {
        let compile = |entry: &pb::core::TlvEntry| {
            let value = match &entry.format_string {
                Some(format) => {
                    refuse!("value": !entry.value.is_empty());
                    AddedValue::Format(FormatString::compile(format).at("format_string")?)
                }
                None if entry.value.is_empty() => return Err(Invalid::new("value", "is missing")),
                None => AddedValue::Plain(entry.value.as_slice().into()),
            };
            Ok(Self { kind: kind(entry.r#type)?, value })
        };
        entries.iter().map(compile).collect()
    }

    /// The field for a connection.
    pub fn tlv(&self, cx: &FormatContext<'_>) -> Tlv {
        let value = match &self.value {
            AddedValue::Plain(value) => Arc::clone(value),
            AddedValue::Format(format) => {
                let mut out = Vec::new();
                format.write(cx, &mut out);
                out.into()
            }
        };
        Tlv { kind: self.kind, value }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(kind: u8, key: &str) -> TlvRule {
        TlvRule { kind, namespace: "ns".into(), key: key.into() }
    }

    fn tlv(kind: u8, value: &[u8]) -> Tlv {
        Tlv { kind, value: value.into() }
    }

    #[test]
    fn metadata_has_the_first_value_and_filter_state_the_last() {
        let (rules, tlvs) = ([rule(1, "k")], [tlv(1, b"a\xffb"), tlv(2, b"c"), tlv(1, b"d")]);
        assert_eq!(TlvRule::tell(&rules, &tlvs).get("ns", &["k"]), Some(&Value::from("a!b")));
        let mut state = FilterState::default();
        TlvRule::keep(&rules, &tlvs, &mut state);
        assert_eq!(&*state.values[STATE], r#"{"k":"d"}"#);
    }
}
