//! Messages of Istio's own Envoy filters and discovery types, and of Envoy's contributed filters, which the published
//! Envoy types lack.
//!
//! Field numbers are those of udpa `type/v1/typed_struct.proto`, xds `type/v3/typed_struct.proto`,
//! istio/proxy `alpn` and istio/api `envoy/extensions/stats/config.proto`, and istio `pkg/dns/proto/nds.proto`.

use std::collections::BTreeMap;

use envoy_types::pb::google::protobuf::field_descriptor_proto::{Label, Type};
use envoy_types::pb::google::protobuf::{
    DescriptorProto, Duration, EnumDescriptorProto, EnumValueDescriptorProto, FieldDescriptorProto,
    FileDescriptorProto, FileDescriptorSet, MessageOptions, Struct,
};
use prost::{Message, Name};

macro_rules! named {
    ($type:ty, $package:literal, $name:literal) => {
        impl Name for $type {
            const NAME: &'static str = $name;
            const PACKAGE: &'static str = $package;
            fn type_url() -> String {
                concat!("type.googleapis.com/", $package, ".", $name).to_owned()
            }
        }
    };
}
pub(crate) use named;

/// `udpa.type.v1.TypedStruct`: a message of type `type_url` as free JSON.
#[derive(Clone, PartialEq, Message)]
pub struct TypedStruct {
    /// The type that the receiver turns `value` into.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The message's JSON form.
    #[prost(message, optional, tag = "2")]
    pub value: Option<Struct>,
}
named!(TypedStruct, "udpa.type.v1", "TypedStruct");

/// `xds.type.v3.TypedStruct`: the same under its newer name.
#[derive(Clone, PartialEq, Message)]
pub struct XdsTypedStruct {
    /// The type that the receiver turns `value` into.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The message's JSON form.
    #[prost(message, optional, tag = "2")]
    pub value: Option<Struct>,
}
named!(XdsTypedStruct, "xds.type.v3", "TypedStruct");

/// Configuration of `istio.alpn`: which ALPN to offer upstream for which downstream protocol.
#[derive(Clone, PartialEq, Message)]
pub struct AlpnConfig {
    /// One entry a protocol.
    #[prost(message, repeated, tag = "1")]
    pub alpn_override: Vec<AlpnOverride>,
}
named!(AlpnConfig, "istio.envoy.config.filter.http.alpn.v2alpha1", "FilterConfig");

/// One line of [`AlpnConfig`].
#[derive(Clone, PartialEq, Message)]
pub struct AlpnOverride {
    /// 0 HTTP/1.0, 1 HTTP/1.1, 2 HTTP/2.
    #[prost(int32, tag = "1")]
    pub upstream_protocol: i32,
    /// Offered in this order.
    #[prost(string, repeated, tag = "2")]
    pub alpn_override: Vec<String>,
}

/// `stats.PluginConfig`: configuration of `istio.stats`.
#[derive(Clone, PartialEq, Message)]
pub struct StatsConfig {
    /// Do not use the Host header to find the destination service.
    #[prost(bool, tag = "6")]
    pub disable_host_header_fallback: bool,
    /// How often open TCP connections are reported.
    #[prost(message, optional, tag = "7")]
    pub tcp_reporting_duration: Option<Duration>,
    /// Changes to the standard metrics.
    #[prost(message, repeated, tag = "8")]
    pub metrics: Vec<MetricConfig>,
    /// Reporter: 0 by direction, 1 server gateway.
    #[prost(int32, tag = "10")]
    pub reporter: i32,
    /// How often unused metrics are looked for.
    #[prost(message, optional, tag = "11")]
    pub rotation_interval: Option<Duration>,
    /// How long an unused metric stays.
    #[prost(message, optional, tag = "12")]
    pub graceful_deletion_interval: Option<Duration>,
}
named!(StatsConfig, "stats", "PluginConfig");

/// One metric's overrides in [`StatsConfig`].
#[derive(Clone, PartialEq, Message)]
pub struct MetricConfig {
    /// Tag name to CEL expression.
    #[prost(btree_map = "string, string", tag = "1")]
    pub dimensions: BTreeMap<String, String>,
    /// The metric's short name; empty means all.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Tags that are not reported.
    #[prost(string, repeated, tag = "3")]
    pub tags_to_remove: Vec<String>,
    /// CEL condition of the override.
    #[prost(string, tag = "4")]
    pub r#match: String,
    /// Do not report the metric.
    #[prost(bool, tag = "5")]
    pub drop: bool,
}

/// `istio.networking.nds.v1.NameTable`: what the agent's DNS proxy answers.
#[derive(Clone, PartialEq, Message)]
pub struct NameTable {
    /// By host name without trailing dot.
    #[prost(btree_map = "string, message", tag = "1")]
    pub table: BTreeMap<String, NameInfo>,
}
named!(NameTable, "istio.networking.nds.v1", "NameTable");

/// One host of a [`NameTable`].
#[derive(Clone, PartialEq, Message)]
pub struct NameInfo {
    /// Addresses, both families.
    #[prost(string, repeated, tag = "1")]
    pub ips: Vec<String>,
    /// `Kubernetes` or `External`.
    #[prost(string, tag = "2")]
    pub registry: String,
    /// The Kubernetes service name.
    #[prost(string, tag = "3")]
    pub shortname: String,
    /// The Kubernetes namespace.
    #[prost(string, tag = "4")]
    pub namespace: String,
}

/// `envoy.extensions.filters.network.mysql_proxy.v3.MySQLProxy`: statistics of MySQL.
#[derive(Clone, PartialEq, Message)]
pub struct MySqlProxy {
    /// Of the statistics.
    #[prost(string, tag = "1")]
    pub stat_prefix: String,
}
named!(MySqlProxy, "envoy.extensions.filters.network.mysql_proxy.v3", "MySQLProxy");

/// A field of a descriptor: number, name and type; a type with a dot is a message.
fn field(number: i32, name: &str, kind: &str) -> FieldDescriptorProto {
    let (kind, label) = match kind.strip_prefix("repeated ") {
        Some(rest) => (rest, Label::Repeated),
        None => (kind, Label::Optional),
    };
    let (r#type, type_name) = match kind {
        "string" => (Type::String, None),
        "bool" => (Type::Bool, None),
        other => match other.strip_prefix("enum ") {
            Some(name) => (Type::Enum, Some(name.to_owned())),
            None => (Type::Message, Some(other.to_owned())),
        },
    };
    FieldDescriptorProto {
        name: Some(name.to_owned()),
        number: Some(number),
        label: Some(label as i32),
        r#type: Some(r#type as i32),
        type_name,
        ..FieldDescriptorProto::default()
    }
}

pub(crate) fn message(name: &str, fields: &[(i32, &str, &str)]) -> DescriptorProto {
    DescriptorProto {
        name: Some(name.to_owned()),
        field: fields.iter().map(|(number, name, kind)| field(*number, name, kind)).collect(),
        ..DescriptorProto::default()
    }
}

/// The entry type that stands for a `map<string, VALUE>` in descriptors.
fn map_entry(name: &str, value: &str) -> DescriptorProto {
    DescriptorProto {
        options: Some(MessageOptions { map_entry: Some(true), ..MessageOptions::default() }),
        ..message(name, &[(1, "key", "string"), (2, "value", value)])
    }
}

fn enumeration(name: &str, values: &[&str]) -> EnumDescriptorProto {
    let value = |(number, name): (i32, &&str)| EnumValueDescriptorProto {
        name: Some((*name).to_owned()),
        number: Some(number),
        ..EnumValueDescriptorProto::default()
    };
    EnumDescriptorProto {
        name: Some(name.to_owned()),
        value: (0..).zip(values).map(value).collect(),
        ..EnumDescriptorProto::default()
    }
}

pub(crate) fn file(path: &str, package: &str, imports: &[&str], messages: Vec<DescriptorProto>) -> FileDescriptorProto {
    FileDescriptorProto {
        name: Some(path.to_owned()),
        package: Some(package.to_owned()),
        dependency: imports.iter().map(|i| (*i).to_owned()).collect(),
        message_type: messages,
        syntax: Some("proto3".to_owned()),
        ..FileDescriptorProto::default()
    }
}

/// Descriptors of the messages above, for reflection.
pub(crate) fn descriptors() -> FileDescriptorSet {
    let typed_struct = || message("TypedStruct", &[(1, "type_url", "string"), (2, "value", ".google.protobuf.Struct")]);
    let alpn = "istio.envoy.config.filter.http.alpn.v2alpha1";
    let alpn_override = DescriptorProto {
        nested_type: vec![message(
            "AlpnOverride",
            &[
                (1, "upstream_protocol", &format!("enum .{alpn}.FilterConfig.Protocol")),
                (2, "alpn_override", "repeated string"),
            ],
        )],
        enum_type: vec![enumeration("Protocol", &["HTTP10", "HTTP11", "HTTP2"])],
        ..message("FilterConfig", &[(1, "alpn_override", &format!("repeated .{alpn}.FilterConfig.AlpnOverride"))])
    };
    let metric = DescriptorProto {
        nested_type: vec![map_entry("DimensionsEntry", "string")],
        ..message(
            "MetricConfig",
            &[
                (1, "dimensions", "repeated .stats.MetricConfig.DimensionsEntry"),
                (2, "name", "string"),
                (3, "tags_to_remove", "repeated string"),
                (4, "match", "string"),
                (5, "drop", "bool"),
            ],
        )
    };
    let plugin = message(
        "PluginConfig",
        &[
            (6, "disable_host_header_fallback", "bool"),
            (7, "tcp_reporting_duration", ".google.protobuf.Duration"),
            (8, "metrics", "repeated .stats.MetricConfig"),
            (10, "reporter", "enum .stats.Reporter"),
            (11, "rotation_interval", ".google.protobuf.Duration"),
            (12, "graceful_deletion_interval", ".google.protobuf.Duration"),
        ],
    );
    let info = message(
        "NameInfo",
        &[
            (1, "ips", "repeated string"),
            (2, "registry", "string"),
            (3, "shortname", "string"),
            (4, "namespace", "string"),
        ],
    );
    let table = DescriptorProto {
        nested_type: vec![info, map_entry("TableEntry", ".istio.networking.nds.v1.NameTable.NameInfo")],
        ..message("NameTable", &[(1, "table", "repeated .istio.networking.nds.v1.NameTable.TableEntry")])
    };
    let mysql = message(MySqlProxy::NAME, &[(1, "stat_prefix", "string")]);
    let (structs, duration) = (["google/protobuf/struct.proto"], ["google/protobuf/duration.proto"]);
    FileDescriptorSet {
        file: vec![
            file("udpa/type/v1/typed_struct.proto", "udpa.type.v1", &structs, vec![typed_struct()]),
            file("xds/type/v3/typed_struct.proto", "xds.type.v3", &structs, vec![typed_struct()]),
            file("istio/alpn.proto", alpn, &[], vec![alpn_override]),
            FileDescriptorProto {
                enum_type: vec![enumeration("Reporter", &["UNSPECIFIED", "SERVER_GATEWAY"])],
                ..file("istio/stats.proto", "stats", &duration, vec![metric, plugin])
            },
            file("istio/nds.proto", "istio.networking.nds.v1", &[], vec![table]),
            file("contrib/mysql_proxy.proto", MySqlProxy::PACKAGE, &[], vec![mysql]),
        ],
    }
}
