//! Small constructors for Envoy's messages.

use std::net::IpAddr;

use envoy_api::core::{
    self, AggregatedConfigSource, ApiConfigSource, ApiVersion, ConfigSource, GrpcService,
    address::Address as AddressKind, config_source::ConfigSourceSpecifier, grpc_service, socket_address::PortSpecifier,
};
use envoy_api::istio::TypedStruct;
use envoy_api::listener::{Filter, ListenerFilter, filter, listener_filter};
use envoy_api::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher, string_matcher::MatchPattern};
use envoy_api::pb::envoy::r#type::v3::{FractionalPercent, Percent};
/// Packs a message as Envoy expects it, the same bytes for the same content.
pub(crate) use envoy_api::wire::packed as any;
use envoy_api::wkt::{self, value::Kind};
use envoy_api::{Any, Message, Name};
use istio_api::Duration;
use istio_api::virtual_service::StringMatch;
use serde_json::Value;

pub(crate) fn duration(value: Duration) -> wkt::Duration {
    wkt::Duration { seconds: value.as_secs(), nanos: value.subsec_nanos() }
}

pub(crate) fn seconds(seconds: i64) -> wkt::Duration {
    wkt::Duration { seconds, nanos: 0 }
}

pub(crate) fn u32_value(value: u32) -> Option<wkt::UInt32Value> {
    Some(wkt::UInt32Value { value })
}

pub(crate) fn u64_value(value: u64) -> Option<wkt::UInt64Value> {
    Some(wkt::UInt64Value { value })
}

pub(crate) fn bool_value(value: bool) -> Option<wkt::BoolValue> {
    Some(wkt::BoolValue { value })
}

pub(crate) fn percent(value: f64) -> Option<Percent> {
    Some(Percent { value })
}

/// A percentage with four decimals, as VirtualServices have them.
pub(crate) fn fraction(value: f64) -> FractionalPercent {
    use envoy_api::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
    FractionalPercent { numerator: (value * 10_000.0) as u32, denominator: DenominatorType::Million as i32 }
}

pub(crate) fn whole_percent(value: u32) -> FractionalPercent {
    FractionalPercent { numerator: value, denominator: 0 }
}

/// An address: an IP address with a port, or a unix socket if the port is 0.
pub(crate) fn address(bind: &str, port: u16) -> core::Address {
    let kind = if port == 0 {
        let path = bind.strip_prefix("unix://").unwrap_or(bind).to_owned();
        AddressKind::Pipe(core::Pipe { path, mode: 0 })
    } else {
        AddressKind::SocketAddress(socket_address(bind, port))
    };
    core::Address { address: Some(kind) }
}

pub(crate) fn socket_address(address: &str, port: u16) -> core::SocketAddress {
    core::SocketAddress {
        address: address.to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(u32::from(port))),
        ..core::SocketAddress::default()
    }
}

/// An address or a range in CIDR notation; nothing for other text.
pub(crate) fn cidr(text: &str) -> Option<core::CidrRange> {
    let (address, bits) = match text.split_once('/') {
        Some((address, bits)) => (address, Some(bits.parse::<u8>().ok()?)),
        None => (text, None),
    };
    let ip: IpAddr = address.parse().ok()?;
    let full = if ip.is_ipv4() { 32 } else { 128 };
    let bits = bits.unwrap_or(full);
    (bits <= full).then(|| core::CidrRange { address_prefix: ip.to_string(), prefix_len: u32_value(u32::from(bits)) })
}

/// Text as a host in a Host header: IPv6 addresses in brackets.
pub(crate) fn host_text(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// `host:port`, as Go's `net.JoinHostPort`.
pub(crate) fn host_port(host: &str, port: u16) -> String {
    let port = crate::names::Digits::of(port);
    match host.contains(':') {
        true => ["[", host, "]:", port.as_str()].concat(),
        false => [host, ":", port.as_str()].concat(),
    }
}

pub(crate) fn exact(text: &str) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::Exact(text.to_owned())), ignore_case: false }
}

pub(crate) fn prefix(text: &str) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::Prefix(text.to_owned())), ignore_case: false }
}

pub(crate) fn suffix(text: &str) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::Suffix(text.to_owned())), ignore_case: false }
}

pub(crate) fn regex(text: &str) -> RegexMatcher {
    RegexMatcher { regex: text.to_owned(), ..RegexMatcher::default() }
}

pub(crate) fn regex_match(text: &str) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::SafeRegex(regex(text))), ignore_case: false }
}

/// A rule's string match; nothing if it says nothing.
pub(crate) fn string_match(m: &StringMatch) -> Option<StringMatcher> {
    match (&m.exact, &m.prefix, &m.regex) {
        (Some(text), _, _) => Some(exact(text)),
        (_, Some(text), _) => Some(prefix(text)),
        (_, _, Some(text)) => Some(regex_match(text)),
        _ => None,
    }
}

/// Resources of this kind come over the stream that the proxy already has.
pub(crate) fn ads() -> ConfigSource {
    ConfigSource {
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        initial_fetch_timeout: Some(seconds(0)),
        resource_api_version: ApiVersion::V3 as i32,
        ..ConfigSource::default()
    }
}

/// Secrets come from the agent, over a cluster of the bootstrap.
pub(crate) fn sds(cluster: &str) -> ConfigSource {
    let target = grpc_service::TargetSpecifier::EnvoyGrpc(grpc_service::EnvoyGrpc {
        cluster_name: cluster.to_owned(),
        ..Default::default()
    });
    ConfigSource {
        config_source_specifier: Some(ConfigSourceSpecifier::ApiConfigSource(ApiConfigSource {
            api_type: core::api_config_source::ApiType::Grpc as i32,
            grpc_services: vec![GrpcService { target_specifier: Some(target), ..Default::default() }],
            set_node_on_first_message_only: true,
            transport_api_version: ApiVersion::V3 as i32,
            ..Default::default()
        })),
        initial_fetch_timeout: Some(seconds(0)),
        resource_api_version: ApiVersion::V3 as i32,
        ..ConfigSource::default()
    }
}

/// As [`sds`], but who waits for the secret waits no longer than Envoy does by itself.
pub(crate) fn patient_sds(cluster: &str) -> ConfigSource {
    ConfigSource { initial_fetch_timeout: None, ..sds(cluster) }
}

pub(crate) fn extension(name: &str, config: Any) -> core::TypedExtensionConfig {
    core::TypedExtensionConfig { name: name.to_owned(), typed_config: Some(config) }
}

pub(crate) fn transport_socket<M: Message + Name>(name: &str, config: &M) -> core::TransportSocket {
    packed_socket(name, any(config))
}

pub(crate) fn packed_socket(name: &str, config: Any) -> core::TransportSocket {
    let config_type = Some(core::transport_socket::ConfigType::TypedConfig(config));
    core::TransportSocket { name: name.to_owned(), config_type }
}

pub(crate) fn network_filter(name: &str, config: Any) -> Filter {
    Filter { name: name.to_owned(), config_type: Some(filter::ConfigType::TypedConfig(config)) }
}

pub(crate) fn listener_filter<M: Message + Name>(name: &str, config: &M) -> ListenerFilter {
    ListenerFilter {
        name: name.to_owned(),
        config_type: Some(listener_filter::ConfigType::TypedConfig(any(config))),
        filter_disabled: None,
    }
}

pub(crate) fn text(value: &str) -> wkt::Value {
    wkt::Value { kind: Some(Kind::StringValue(value.to_owned())) }
}

pub(crate) fn list(values: Vec<wkt::Value>) -> wkt::Value {
    wkt::Value { kind: Some(Kind::ListValue(wkt::ListValue { values })) }
}

pub(crate) fn structure<'a>(fields: impl IntoIterator<Item = (&'a str, wkt::Value)>) -> wkt::Struct {
    wkt::Struct { fields: fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect() }
}

/// JSON as protobuf's free-form value.
pub(crate) fn value(json: &Value) -> wkt::Value {
    let kind = match json {
        Value::Null => Kind::NullValue(0),
        Value::Bool(b) => Kind::BoolValue(*b),
        Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        Value::String(s) => Kind::StringValue(s.clone()),
        Value::Array(items) => return list(items.iter().map(value).collect()),
        Value::Object(_) => Kind::StructValue(json_struct(json)),
    };
    wkt::Value { kind: Some(kind) }
}

/// A JSON object as a protobuf struct; anything else is empty.
pub(crate) fn json_struct(json: &Value) -> wkt::Struct {
    let fields = json.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), value(v)));
    wkt::Struct { fields: fields.collect() }
}

/// A message as JSON, for filters whose type only Istio's Envoy knows.
pub(crate) fn typed_struct(type_url: &str, json: &Value) -> Any {
    any(&TypedStruct { type_url: type_url.to_owned(), value: Some(json_struct(json)) })
}

/// One entry under `istio` in a resource's metadata.
pub(crate) fn set_istio_metadata(metadata: &mut Option<core::Metadata>, key: &str, value: wkt::Value) {
    let metadata = metadata.get_or_insert_default();
    let fields = metadata.filter_metadata.entry("istio".to_owned()).or_default();
    fields.fields.insert(key.to_owned(), value);
}

/// The rule that a resource is made from, as istiod's `BuildConfigInfoMetadata` names it.
pub(crate) fn config_path(kind: &str, namespace: &str, name: &str) -> wkt::Value {
    text(&config_text(kind, namespace, name))
}

pub(crate) fn config_text(kind: &str, namespace: &str, name: &str) -> String {
    ["/apis/networking.istio.io/v1/namespaces/", namespace, "/", kind, "/", name].concat()
}

/// Go duration text; nothing if it is empty or malformed.
pub(crate) fn parse_duration(value: &str) -> Option<wkt::Duration> {
    value.parse::<Duration>().ok().map(duration)
}
