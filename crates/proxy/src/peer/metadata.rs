//! How Istio's proxies write down who they are: a `google.protobuf.Struct` in headers and in front of TCP streams, or `baggage`.
//!
//! Source: istio/proxy `extensions/common/metadata_object.cc`.

use crate::bootstrap::NodeInfo;
use crate::stats::{ArcStrOrUnknown, Workload};
use base64::Engine as _;
use base64::alphabet::STANDARD as ALPHABET;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use bytes::Bytes;
use envoy_api::wkt::value::Kind;
use envoy_api::wkt::{Struct, Value};
use envoy_api::{Any, Message};
use mesh_types::ArcStr;
use prost::encoding::{WireType, encode_key, encode_varint};
use std::collections::BTreeMap;

/// With or without padding, as Envoy's `decodeWithoutPadding`.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &ALPHABET,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// Longer descriptions are of nobody that metrics could name.
pub(super) const MAX_LENGTH: usize = 16 * 1024;

const CANONICAL_NAME: &str = "service.istio.io/canonical-name";
const CANONICAL_REVISION: &str = "service.istio.io/canonical-revision";

/// The type url of the `Any` on TCP.
const STRUCT: &str = "type.googleapis.com/google.protobuf.Struct";
const HEADER: &str = "x-envoy-peer-metadata";
const ID_HEADER: &str = "x-envoy-peer-metadata-id";
const OWNERS: &str = "kubernetes://apis/apps/v1/namespaces/";

/// The first bytes of a TCP stream that says who its sender is.
pub(super) const MAGIC: [u8; 4] = 0x3D23_0467_u32.to_be_bytes();

/// What this proxy says about itself.
#[derive(Clone, Debug)]
pub(super) struct Card {
    instance: String,
    kind: Option<&'static str>,
    workload: Workload,
    labels: BTreeMap<String, String>,
}

/// A value, written with its fields in order: equal cards are equal bytes.
enum Written<'a> {
    Text(&'a str),
    Fields(BTreeMap<&'a str, Written<'a>>),
}

impl Card {
    pub(super) fn of(node: &NodeInfo, workload: &Workload) -> Self {
        let labels = node.metadata.get("LABELS").and_then(serde_json::Value::as_object);
        let labels = labels.into_iter().flatten().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())));
        Self {
            instance: node.text("NAME").to_owned(),
            kind: owner_kind(node.text("OWNER"), node.text("WORKLOAD_NAME")),
            workload: workload.clone(),
            labels: labels.collect(),
        }
    }

    fn owner(&self) -> Option<String> {
        let (namespace, name) = (text(&self.workload.namespace)?, text(&self.workload.name)?);
        Some(format!("{OWNERS}{namespace}/{}s/{name}", self.kind?))
    }

    /// The encoded `Struct`, with these labels besides the usual ones.
    pub(super) fn encode(&self, additional: &[ArcStr]) -> Vec<u8> {
        let owner = self.owner();
        let mut out = Vec::new();
        encode_fields(&self.fields(additional, owner.as_deref()), &mut out);
        out
    }

    fn fields<'a>(&'a self, additional: &'a [ArcStr], owner: Option<&'a str>) -> BTreeMap<&'a str, Written<'a>> {
        let workload = &self.workload;
        let mut labels = BTreeMap::new();
        let usual = [
            (CANONICAL_NAME, &workload.canonical_service),
            (CANONICAL_REVISION, &workload.canonical_revision),
            ("app", &workload.app),
            ("version", &workload.version),
        ];
        for (name, value) in usual {
            if let Some(value) = text(value) {
                labels.insert(name, Written::Text(value));
            }
        }
        for name in additional {
            if let Some(value) = self.labels.get(&**name) {
                labels.insert(name, Written::Text(value));
            }
        }
        let fields = [
            ("NAME", Some(self.instance.as_str()).filter(|s| !s.is_empty())),
            ("NAMESPACE", text(&workload.namespace)),
            ("WORKLOAD_NAME", text(&workload.name)),
            ("CLUSTER_ID", text(&workload.cluster)),
            ("OWNER", owner),
        ];
        let mut fields: BTreeMap<_, _> =
            fields.into_iter().filter_map(|(name, value)| Some((name, Written::Text(value?)))).collect();
        fields.insert("LABELS", Written::Fields(labels));
        fields
    }

    /// For the header.
    pub(super) fn header(&self, additional: &[ArcStr]) -> String {
        STANDARD.encode(self.encode(additional))
    }

    /// The first bytes of a TCP stream: magic, length, and an `Any` of a `Struct` with card and id.
    pub(super) fn frame(&self, id: &str, additional: &[ArcStr]) -> Bytes {
        let owner = self.owner();
        let mut whole = BTreeMap::from([(HEADER, Written::Fields(self.fields(additional, owner.as_deref())))]);
        if !id.is_empty() {
            whole.insert(ID_HEADER, Written::Text(id));
        }
        let mut value = Vec::new();
        encode_fields(&whole, &mut value);
        let any = Any { type_url: STRUCT.to_owned(), value }.encode_to_vec();
        let length = u32::try_from(any.len()).unwrap_or(u32::MAX);
        [&MAGIC[..], &length.to_be_bytes(), &any].concat().into()
    }

    /// The `baggage` header.
    pub(super) fn baggage(&self) -> String {
        let workload = &self.workload;
        let kind = format!("k8s.{}.name", self.kind.unwrap_or("pod"));
        let parts = [
            (kind.as_str(), text(&workload.name)),
            ("k8s.namespace.name", text(&workload.namespace)),
            ("k8s.cluster.name", text(&workload.cluster)),
            ("service.name", text(&workload.canonical_service)),
            ("service.version", text(&workload.canonical_revision)),
            ("app.name", text(&workload.app)),
            ("app.version", text(&workload.version)),
            ("k8s.instance.name", Some(self.instance.as_str()).filter(|s| !s.is_empty())),
        ];
        let parts = parts.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?)));
        parts.collect::<Vec<_>>().join(",")
    }
}

fn text(value: &ArcStrOrUnknown) -> Option<&str> {
    Some(value.as_str()).filter(|text| *text != "unknown")
}

/// The kind that an owner like `…/namespaces/NS/deployments/NAME` has.
fn owner_kind(owner: &str, workload: &str) -> Option<&'static str> {
    let rest = owner.strip_suffix(workload)?.strip_suffix("s/")?;
    let kind = rest.rsplit_once('/')?.1;
    ["pod", "deployment", "job", "cronjob"].into_iter().find(|known| *known == kind)
}

fn encode_fields(fields: &BTreeMap<&str, Written<'_>>, out: &mut Vec<u8>) {
    for (name, value) in fields {
        let mut encoded = Vec::new();
        encode_value(value, &mut encoded);
        let mut entry = Vec::new();
        encode_bytes(1, name.as_bytes(), &mut entry);
        encode_bytes(2, &encoded, &mut entry);
        encode_bytes(1, &entry, out);
    }
}

/// `google.protobuf.Value`: 3 is text, 5 a `Struct`.
fn encode_value(value: &Written<'_>, out: &mut Vec<u8>) {
    match value {
        Written::Text(text) => encode_bytes(3, text.as_bytes(), out),
        Written::Fields(fields) => {
            let mut inner = Vec::new();
            encode_fields(fields, &mut inner);
            encode_bytes(5, &inner, out);
        }
    }
}

fn encode_bytes(tag: u32, bytes: &[u8], out: &mut Vec<u8>) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

/// Reads the header.
pub(crate) fn of_header(value: &[u8]) -> Option<Workload> {
    if value.len() > MAX_LENGTH {
        return None;
    }
    known(of_struct(&Struct::decode(&LENIENT.decode(value).ok()?[..]).ok()?))
}

/// Reads the `Any` that follows magic and length.
pub(super) fn of_frame(any: &[u8]) -> Option<Workload> {
    let any = Any::decode(any).ok().filter(|any| any.type_url == STRUCT)?;
    let whole = Struct::decode(&any.value[..]).ok()?;
    match &whole.fields.get(HEADER)?.kind {
        Some(Kind::StructValue(card)) => known(of_struct(card)),
        _ => None,
    }
}

/// Reads the `baggage` header.
pub(super) fn of_baggage(value: &[u8]) -> Option<Workload> {
    let mut workload = Workload::default();
    for (key, value) in std::str::from_utf8(value).ok()?.split(',').filter_map(|part| part.trim().split_once('=')) {
        match key {
            "k8s.namespace.name" => workload.namespace = value.into(),
            "k8s.cluster.name" => workload.cluster = value.into(),
            "service.name" => workload.canonical_service = value.into(),
            "service.version" => workload.canonical_revision = value.into(),
            "app.name" => workload.app = value.into(),
            "app.version" => workload.version = value.into(),
            "k8s.deployment.name" | "k8s.pod.name" | "k8s.job.name" | "k8s.cronjob.name" => {
                workload.name = value.into()
            }
            _ => {}
        }
    }
    known(workload)
}

/// Bytes that decode but say nothing are no description.
fn known(workload: Workload) -> Option<Workload> {
    (workload != Workload::default()).then_some(workload)
}

fn of_struct(card: &Struct) -> Workload {
    let field = |name: &str| string(card.fields.get(name));
    let label = |name: &str| match card.fields.get("LABELS").and_then(|l| l.kind.as_ref()) {
        Some(Kind::StructValue(labels)) => string(labels.fields.get(name)),
        _ => "",
    };
    Workload {
        name: field("WORKLOAD_NAME").into(),
        namespace: field("NAMESPACE").into(),
        app: label("app").into(),
        version: label("version").into(),
        canonical_service: label(CANONICAL_NAME).into(),
        canonical_revision: label(CANONICAL_REVISION).into(),
        cluster: field("CLUSTER_ID").into(),
    }
}

fn string(value: Option<&Value>) -> &str {
    match value.and_then(|v| v.kind.as_ref()) {
        Some(Kind::StringValue(text)) => text,
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeInfo {
        NodeInfo {
            id: "sidecar~10.0.0.1~reviews-v1-1.default~default.svc.cluster.local".into(),
            metadata: serde_json::json!({
                "NAME": "reviews-v1-1", "WORKLOAD_NAME": "reviews-v1", "NAMESPACE": "default", "CLUSTER_ID": "Kubernetes",
                "OWNER": "kubernetes://apis/apps/v1/namespaces/default/deployments/reviews-v1",
                "LABELS": {"app": "reviews", "version": "v1", "role": "back", "pod-template-hash": "1",
                    "service.istio.io/canonical-name": "reviews", "service.istio.io/canonical-revision": "v1"}
            }),
            ..NodeInfo::default()
        }
    }

    fn card() -> Card {
        let node = node();
        Card::of(&node, &super::super::LocalIdentity::of(&node).workload)
    }

    /// A `Struct` as another implementation encodes it.
    fn foreign(json: &serde_json::Value) -> Vec<u8> {
        envoy_api::json::from_json("type.googleapis.com/google.protobuf.Struct", json).expect("a struct")
    }

    #[test]
    fn the_card_is_what_istios_filter_reads() {
        let expected = serde_json::json!({
            "NAME": "reviews-v1-1", "NAMESPACE": "default", "WORKLOAD_NAME": "reviews-v1", "CLUSTER_ID": "Kubernetes",
            "OWNER": "kubernetes://apis/apps/v1/namespaces/default/deployments/reviews-v1",
            "LABELS": {"service.istio.io/canonical-name": "reviews", "service.istio.io/canonical-revision": "v1",
                "app": "reviews", "version": "v1", "role": "back"}
        });
        let labels = ["role".into(), "not-there".into()];
        let bytes = STANDARD.decode(card().header(&labels)).expect("base64 with padding");
        assert_eq!(Struct::decode(&bytes[..]), Struct::decode(&foreign(&expected)[..]));
        assert_eq!(of_header(card().header(&[]).as_bytes()).as_ref(), Some(&card().workload));
    }

    #[test]
    fn other_proxies_cards_are_read_padded_or_not() {
        let bytes = foreign(&serde_json::json!({
            "NAME": "a-1", "NAMESPACE": "ns", "WORKLOAD_NAME": "a", "MESH_ID": "x", "PLATFORM_METADATA": {"zone": "z"},
            "LABELS": {"app": "a", "service.istio.io/canonical-name": "svc"}
        }));
        let padded = STANDARD.encode(bytes);
        let expected = Workload {
            name: "a".into(),
            namespace: "ns".into(),
            app: "a".into(),
            canonical_service: "svc".into(),
            ..Workload::default()
        };
        assert_eq!(of_header(padded.as_bytes()), Some(expected.clone()));
        assert_eq!(of_header(padded.trim_end_matches('=').as_bytes()), Some(expected));
    }

    #[test]
    fn what_says_nothing_is_nobody() {
        let former = STANDARD.encode("reviews-v1;default;reviews;v1;reviews;v1;Kubernetes");
        for value in ["not base64!", "", "AAAA", &former, &STANDARD.encode(foreign(&serde_json::json!({"x": 1})))] {
            assert_eq!(of_header(value.as_bytes()), None, "{value}");
        }
        assert_eq!(of_header(&vec![b'A'; MAX_LENGTH + 1]), None);
        assert_eq!(of_baggage(b"userId=alice,isProduction=false"), None);
    }

    #[test]
    fn tcp_streams_begin_with_an_any_of_card_and_id() {
        let frame = card().frame(&node().id, &[]);
        assert_eq!(frame[..4], [0x3D, 0x23, 0x04, 0x67]);
        assert_eq!(u32::from_be_bytes([frame[4], frame[5], frame[6], frame[7]]) as usize, frame.len() - 8);
        let any = Any::decode(&frame[8..]).expect("an Any");
        assert_eq!(any.type_url, "type.googleapis.com/google.protobuf.Struct");
        let whole = Struct::decode(&any.value[..]).expect("a Struct");
        assert_eq!(string(whole.fields.get("x-envoy-peer-metadata-id")), node().id);
        assert_eq!(of_frame(&frame[8..]).as_ref(), Some(&card().workload));
    }

    #[test]
    fn baggage_has_istios_names() {
        let baggage = card().baggage();
        let expected = "k8s.deployment.name=reviews-v1,k8s.namespace.name=default,k8s.cluster.name=Kubernetes,\
                        service.name=reviews,service.version=v1,app.name=reviews,app.version=v1,\
                        k8s.instance.name=reviews-v1-1";
        assert_eq!(baggage, expected);
        assert_eq!(of_baggage(baggage.as_bytes()).as_ref(), Some(&card().workload));
    }
}
