//! What gRPC clients and servers without a proxy get: `xds:///` names, servers made with `xds.NewGRPCServer`
//! (istiod `pilot/pkg/networking/grpcgen`).
//!
//! They ask by names for little, take a small part of Envoy's messages, and refuse what they do not know. Endpoints are
//! those of everybody.

mod cluster;
mod listener;
mod route;

use std::sync::Arc;

use envoy_api::Resource;
use envoy_api::core::TransportSocket;
use envoy_api::core::transport_socket::ConfigType;
use envoy_api::route::RouteAction;
use envoy_api::route::route_action::MaxStreamDuration;
use envoy_api::tls::common_tls_context::{
    CertificateProviderInstance, CombinedCertificateValidationContext, ValidationContextType,
};
use envoy_api::tls::{CertificateProviderPluginInstance, CertificateValidationContext, CommonTlsContext};
use envoy_api::{Message, Name, any, type_url};
use mesh_types::ArcStr;
use push_context::{ListenerRules, Node, Same, SidecarScope};
use registry::Registry;

use crate::Names;
use crate::cache::{self, Shared};
use crate::context::Context;
use crate::proto::exact;

/// Lists of resources that are kept: a client asks for some names, together.
const LISTS: usize = 4096;

/// Whether the node is a gRPC library instead of a proxy.
pub(crate) fn is_client(node: &Node) -> bool {
    node.meta(cache::GENERATOR) == Some("grpc")
}

/// The resources of one type for such a client; nothing for types that are the same for all.
pub(crate) fn resources(cx: &Context<'_>, type_url: &str, names: Names<'_>) -> Option<Shared> {
    /// Scopes change with every rule and service, registries with endpoints and thus with the client's own ports.
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Node>, Same<SidecarScope>, Same<Registry>, ListenerRules, ArcStr, Option<Vec<ArcStr>>);

    let generate = match type_url {
        type_url::LISTENER => listener::all,
        type_url::ROUTE => route::all,
        type_url::CLUSTER => cluster::all,
        _ => return None,
    };
    let asked = match names {
        Names::Wildcard => None,
        Names::List(list) => Some(list.to_vec()),
    };
    let key = Key(
        Same(cache::itself(cx)),
        Same(cx.scope.clone()),
        Same(cx.push.registry.clone()),
        cx.push.listener_rules(),
        ArcStr::from(type_url),
        asked,
    );
    Some(cx.push.memo().get_of(LISTS, key, || generate(cx, names).into_iter().collect::<Arc<[Resource]>>()))
}

/// The limit of a call; 0 is none. These clients do not read the deprecated field.
#[allow(deprecated)]
pub(crate) fn timeout(action: &mut RouteAction) {
    action.max_grpc_timeout = None;
    action.max_stream_duration =
        Some(MaxStreamDuration { max_stream_duration: action.timeout, ..MaxStreamDuration::default() });
}

/// Certificates come from the plug-in of the client's bootstrap file that is called `default`. Newer and older clients read
/// different fields for the same.
#[allow(deprecated)] // What clients of before gRPC 1.66 read, and what istiod sends.
fn certificates(identities: &[String]) -> CommonTlsContext {
    let old = |certificate: &str| CertificateProviderInstance {
        instance_name: "default".to_owned(),
        certificate_name: certificate.to_owned(),
    };
    let new = |certificate: &str| CertificateProviderPluginInstance {
        instance_name: "default".to_owned(),
        certificate_name: certificate.to_owned(),
    };
    let validation = CertificateValidationContext {
        match_subject_alt_names: identities.iter().map(|identity| exact(identity)).collect(),
        ca_certificate_provider_instance: Some(new("ROOTCA")),
        ..CertificateValidationContext::default()
    };
    CommonTlsContext {
        tls_certificate_provider_instance: Some(new("default")),
        tls_certificate_certificate_provider_instance: Some(old("default")),
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(
            CombinedCertificateValidationContext {
                default_validation_context: Some(validation),
                validation_context_certificate_provider_instance: Some(old("ROOTCA")),
                ..CombinedCertificateValidationContext::default()
            },
        )),
        ..CommonTlsContext::default()
    }
}

/// Clients look for exactly this name.
fn transport_socket<M: Message + Name>(config: &M) -> TransportSocket {
    TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(config))),
    }
}

/// `host:port` or `[host]:port`, as Go's `net.SplitHostPort`.
fn split_host_port(text: &str) -> Option<(&str, &str)> {
    let (host, port) = text.rsplit_once(':')?;
    match host.strip_prefix('[') {
        Some(inside) => Some((inside.strip_suffix(']').filter(|host| !host.contains(['[', ']']))?, port)),
        None => (!host.contains([':', '[', ']']) && !port.contains(['[', ']'])).then_some((host, port)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports_are_split_as_go_does() {
        assert_eq!(split_host_port("a:80"), Some(("a", "80")));
        assert_eq!(split_host_port("[::]:8076"), Some(("::", "8076")));
        for bad in ["a", "::1:80", "[::1]", "[::1:80", "a]:80", "::"] {
            assert_eq!(split_host_port(bad), None, "{bad}");
        }
        assert_eq!(split_host_port("a:"), Some(("a", "")));
    }
}
