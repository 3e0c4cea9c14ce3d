//! Messages of the xDS matcher API (cncf/xds `xds/type/matcher/v3`) which the published Envoy types lack: they stand only
//! behind `Any` there. Field numbers are those of `ip.proto`, `domain.proto`, `cel.proto` and `http_inputs.proto`.

use envoy_types::pb::google::protobuf::{DescriptorProto, FileDescriptorProto};
use envoy_types::pb::xds::core::v3::CidrRange;
use envoy_types::pb::xds::r#type::matcher::v3::matcher::OnMatch;
use envoy_types::pb::xds::r#type::v3::CelExpression;
use prost::{Message, Name};

use crate::istio::{file, message, named};

const PACKAGE: &str = "xds.type.matcher.v3";

/// `IPMatcher`: what to do for addresses of which ranges.
#[derive(Clone, PartialEq, Message)]
pub struct IpMatcher {
    /// The longest prefix comes first, then the order of the list.
    #[prost(message, repeated, tag = "1")]
    pub range_matchers: Vec<IpRangeMatcher>,
}
named!(IpMatcher, "xds.type.matcher.v3", "IPMatcher");

/// One entry of an [`IpMatcher`].
#[derive(Clone, PartialEq, Message)]
pub struct IpRangeMatcher {
    /// Any of them.
    #[prost(message, repeated, tag = "1")]
    pub ranges: Vec<CidrRange>,
    /// What to do.
    #[prost(message, optional, tag = "2")]
    pub on_match: Option<OnMatch>,
    /// Not tried where a longer prefix held, but led to nothing.
    #[prost(bool, tag = "3")]
    pub exclusive: bool,
}

/// `ServerNameMatcher`: what to do for which domains.
#[derive(Clone, PartialEq, Message)]
pub struct ServerNameMatcher {
    /// Names come before wildcards, long wildcards before short ones.
    #[prost(message, repeated, tag = "1")]
    pub domain_matchers: Vec<DomainMatcher>,
}
named!(ServerNameMatcher, "xds.type.matcher.v3", "ServerNameMatcher");

/// One entry of a [`ServerNameMatcher`].
#[derive(Clone, PartialEq, Message)]
pub struct DomainMatcher {
    /// Names, `*.name` or `*`.
    #[prost(string, repeated, tag = "1")]
    pub domains: Vec<String>,
    /// What to do.
    #[prost(message, optional, tag = "2")]
    pub on_match: Option<OnMatch>,
}

/// `CelMatcher`: an expression over [`HttpAttributesCelMatchInput`].
#[derive(Clone, PartialEq, Message)]
pub struct CelMatcher {
    /// The condition.
    #[prost(message, optional, tag = "1")]
    pub expr_match: Option<CelExpression>,
    /// For people.
    #[prost(string, tag = "2")]
    pub description: String,
}
named!(CelMatcher, "xds.type.matcher.v3", "CelMatcher");

/// `HttpAttributesCelMatchInput`: all attributes of a request.
#[derive(Clone, PartialEq, Message)]
pub struct HttpAttributesCelMatchInput {}
named!(HttpAttributesCelMatchInput, "xds.type.matcher.v3", "HttpAttributesCelMatchInput");

/// Descriptors of the messages above, for reflection.
pub(crate) fn descriptors() -> Vec<FileDescriptorProto> {
    let on_match = (2, "on_match", ".xds.type.matcher.v3.Matcher.OnMatch");
    let range = message(
        "IPRangeMatcher",
        &[(1, "ranges", "repeated .xds.core.v3.CidrRange"), on_match, (3, "exclusive", "bool")],
    );
    let ip = DescriptorProto {
        nested_type: vec![range],
        ..message("IPMatcher", &[(1, "range_matchers", "repeated .xds.type.matcher.v3.IPMatcher.IPRangeMatcher")])
    };
    let domain = DescriptorProto {
        nested_type: vec![message("DomainMatcher", &[(1, "domains", "repeated string"), on_match])],
        ..message(
            "ServerNameMatcher",
            &[(1, "domain_matchers", "repeated .xds.type.matcher.v3.ServerNameMatcher.DomainMatcher")],
        )
    };
    let cel = message("CelMatcher", &[(1, "expr_match", ".xds.type.v3.CelExpression"), (2, "description", "string")]);
    let attributes = message("HttpAttributesCelMatchInput", &[]);
    let imports = ["xds/core/v3/cidr.proto", "xds/type/matcher/v3/matcher.proto", "xds/type/v3/cel.proto"];
    vec![file("xds/type/matcher/v3/inputs.proto", PACKAGE, &imports, vec![ip, domain, cel, attributes])]
}
