//! TLS towards a cluster: what a DestinationRule says, else mutual TLS where the server takes it
//! (istiod `cluster_tls.go`).

use std::sync::LazyLock;

use envoy_api::cluster::cluster::{CustomClusterType, DiscoveryType, TransportSocketMatch};
use envoy_api::core::UpstreamHttpProtocolOptions;
use envoy_api::pb::envoy::extensions::transport_sockets::{
    proxy_protocol::v3::ProxyProtocolUpstreamTransport, raw_buffer::v3::RawBuffer,
};
use envoy_api::tls::{CommonTlsContext, UpstreamTlsContext, common_tls_context::ValidationContextType};
use envoy_api::wire::nested;
use envoy_api::wkt;
use envoy_api::{Any, Message, core, unpack};
use istio_api::destination_rule::{ClientTlsSettings, ProxyProtocolVersion, SimpleLb, TlsMode};
use push_context::{MtlsMode, Profile};
use registry::{Provider, Resolution, TlsMode as EndpointTls};

use super::policy::{Draft, SOCKET_MATCHES, Target};
use crate::context::Context;
use crate::proto::{any, exact, packed_socket, structure, text, transport_socket};
use crate::tls::{
    comply, credential, file_certificate, file_root, file_secret, secret, strings, validation, versions, with_crl,
};

const TLS: &str = "envoy.transport_sockets.tls";

pub(crate) fn raw_buffer() -> core::TransportSocket {
    transport_socket("envoy.transport_sockets.raw_buffer", &RawBuffer {})
}

pub(super) fn apply(cx: &Context<'_>, draft: &mut Draft, target: &Target<'_>) {
    // Whoever answers to a name that is known only by the request has no account here.
    let accounts = if draft.is_dynamic { Vec::new() } else { cx.push.service_accounts(target.service) };
    let (settings, automatic) = settings(cx, target, &accounts);
    if let Some(settings) = settings {
        let socket = context(cx, draft, target, &settings, &accounts).map(|context| packed_socket(TLS, context));
        let by_match = automatic && settings.mode == TlsMode::IstioMutual;
        if by_match && draft.kind() != Some(DiscoveryType::OriginalDst) {
            if let (Some(socket), None) = (&socket, &target.policy.proxy_protocol) {
                draft.fields.extend(encoded_matches(socket).map(|content| (SOCKET_MATCHES, content)));
                return;
            }
            draft.cluster.transport_socket_matches = vec![
                TransportSocketMatch {
                    name: "tlsMode-istio".to_owned(),
                    r#match: Some(structure([("tlsMode", text("istio"))])),
                    transport_socket: socket,
                },
                without_tls(),
            ];
        } else {
            draft.cluster.transport_socket = socket;
        }
    }
    if let Some(proxy_protocol) = &target.policy.proxy_protocol {
        prepend_proxy_protocol(draft, proxy_protocol.version);
    }
}

fn without_tls() -> TransportSocketMatch {
    TransportSocketMatch {
        name: "tlsMode-disabled".to_owned(),
        r#match: Some(wkt::Struct::default()),
        transport_socket: Some(raw_buffer()),
    }
}

/// The same two as bytes, of which all but the first socket is always the same.
fn encoded_matches(socket: &core::TransportSocket) -> [Vec<u8>; 2] {
    static HEAD: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let with_tls = TransportSocketMatch {
            name: "tlsMode-istio".to_owned(),
            r#match: Some(structure([("tlsMode", text("istio"))])),
            transport_socket: None,
        };
        with_tls.encode_to_vec()
    });
    static WITHOUT: LazyLock<Vec<u8>> = LazyLock::new(|| without_tls().encode_to_vec());
    let mut with = Vec::with_capacity(HEAD.len() + 16 + socket.encoded_len());
    with.extend_from_slice(&HEAD);
    // `TransportSocketMatch.transport_socket`.
    nested(3, &mut with, |out| socket.encode_raw(out));
    [with, WITHOUT.clone()]
}

/// The client's settings, and whether they are only for servers that can (istiod `buildUpstreamTLSSettings`).
fn settings(cx: &Context<'_>, target: &Target<'_>, accounts: &[String]) -> (Option<ClientTlsSettings>, bool) {
    if let Some(tls) = &target.policy.tls {
        if matches!(tls.mode, TlsMode::Disable | TlsMode::Simple) {
            return (Some(tls.clone()), false);
        }
        if let Some(own) = own_certificates(cx) {
            if cx.push.settings.external_rule_tls && target.service.mesh_external {
                return (Some(tls.clone()), false);
            }
            let names = tls.subject_alt_names.clone();
            let (sni, insecure_skip_verify) = (tls.sni.clone(), tls.insecure_skip_verify);
            let tls = ClientTlsSettings { subject_alt_names: names, sni, insecure_skip_verify, ..own };
            return (Some(tls), false);
        }
        if tls.mode != TlsMode::IstioMutual {
            return (Some(tls.clone()), false);
        }
        let mut tls = tls.clone();
        if tls.sni.is_empty() {
            tls.sni.clone_from(&target.sni);
        }
        if tls.subject_alt_names.is_empty() {
            tls.subject_alt_names = accounts.to_vec();
        }
        return (Some(tls), false);
    }
    let enabled = cx.push.mesh.enable_auto_mtls.unwrap_or(true);
    if target.service.mesh_external || !enabled || server_mode(cx, target) == MtlsMode::Disable {
        return (None, false);
    }
    let own = own_certificates(cx);
    let own = own.unwrap_or_else(|| ClientTlsSettings { mode: TlsMode::IstioMutual, ..ClientTlsSettings::default() });
    (Some(ClientTlsSettings { subject_alt_names: accounts.to_vec(), sni: target.sni.clone(), ..own }), true)
}

/// Mutual TLS with the certificate files that the proxy itself names, in place of the mesh's certificate.
fn own_certificates(cx: &Context<'_>) -> Option<ClientTlsSettings> {
    let meta = |key: &str| cx.node.meta(key).unwrap_or_default().to_owned();
    let client_certificate = meta("TLS_CLIENT_CERT_CHAIN");
    (!client_certificate.is_empty()).then(|| ClientTlsSettings {
        mode: TlsMode::Mutual,
        client_certificate,
        private_key: meta("TLS_CLIENT_KEY"),
        ca_certificates: meta("TLS_CLIENT_ROOT_CERT"),
        ..ClientTlsSettings::default()
    })
}

/// What the servers probably take (istiod `BestEffortInferServiceMTLSMode`).
fn server_mode(cx: &Context<'_>, target: &Target<'_>) -> MtlsMode {
    let lb = target.unmerged.and_then(|p| p.load_balancer.as_ref());
    let passthrough = target.service.resolution == Resolution::Passthrough
        || lb.and_then(|lb| lb.simple) == Some(SimpleLb::Passthrough);
    if passthrough {
        let mut endpoints = cx.push.registry.endpoints_by_number(target.service, target.port.port).peekable();
        if endpoints.peek().is_none() || endpoints.any(|e| e.workload.tls_mode == EndpointTls::Disabled) {
            return MtlsMode::Disable;
        }
    }
    cx.push.namespace_mtls_mode(&target.service.namespace).unwrap_or(MtlsMode::Permissive)
}

fn context(
    cx: &Context<'_>,
    draft: &mut Draft,
    target: &Target<'_>,
    tls: &ClientTlsSettings,
    accounts: &[String],
) -> Option<Any> {
    let for_all = target.rule.is_none_or(|r| r.workload_selector.is_none());
    if for_all && is_privileged(tls) {
        return None;
    }
    let mut names = tls.subject_alt_names.clone();
    if target.service.provider == Provider::External && names.is_empty() {
        names = accounts.to_vec();
    }
    match tls.mode {
        TlsMode::Disable => None,
        TlsMode::IstioMutual => Some(istio_mutual(cx, draft, target.port.protocol.is_http(), tls)),
        TlsMode::Simple => originate(cx, draft, &names, tls, false).map(|context| compliant(cx, context)),
        TlsMode::Mutual => originate(cx, draft, &names, tls, true).map(|context| compliant(cx, context)),
    }
}

fn compliant(cx: &Context<'_>, mut context: UpstreamTlsContext) -> Any {
    context.common_tls_context.iter_mut().for_each(|common| comply(cx, common));
    any(&context)
}

/// Secrets of Kubernetes are only for clients that a rule names.
fn is_privileged(tls: &ClientTlsSettings) -> bool {
    let by_credential = !tls.credential_name.is_empty() && !tls.credential_name.starts_with("configmap://");
    by_credential && matches!(tls.mode, TlsMode::Simple | TlsMode::Mutual)
}

/// TLS as the mesh's settings say, to hosts that are known only by the request.
pub(super) fn without_service(
    cx: &Context<'_>,
    draft: &mut Draft,
    tls: &ClientTlsSettings,
) -> Option<core::TransportSocket> {
    let context = match tls.mode {
        _ if is_privileged(tls) => None,
        TlsMode::Disable => None,
        TlsMode::IstioMutual => Some(istio_mutual(cx, draft, true, tls)),
        TlsMode::Simple => {
            originate(cx, draft, &tls.subject_alt_names, tls, false).map(|context| compliant(cx, context))
        }
        TlsMode::Mutual => {
            originate(cx, draft, &tls.subject_alt_names, tls, true).map(|context| compliant(cx, context))
        }
    };
    context.map(|context| packed_socket(TLS, context))
}

fn istio_mutual(cx: &Context<'_>, draft: &mut Draft, is_http: bool, tls: &ClientTlsSettings) -> Any {
    let http2 = draft.is_http2();
    // DIFFERS: without istio.alpn the cluster itself says that HTTP follows, so that the server's HTTP chain
    // matches; the last name is what the server's chain answers with. Sniffed ports go as TCP then: nobody
    // could say for each connection what it carries.
    let alpn: &'static [&'static str] = match (cx.node.profile, http2) {
        (Profile::IstioProxy, true) if cx.agrees_on_exchange() => &["istio-peer-exchange", "istio", "h2"],
        (Profile::IstioProxy, false) if cx.agrees_on_exchange() => &["istio-peer-exchange", "istio"],
        (Profile::IstioProxy | Profile::Outrigger, true) => &["istio", "h2"],
        (Profile::IstioProxy | Profile::Outrigger, false) => &["istio"],
        (Profile::Stock, true) => &["istio-h2", "istio", "h2"],
        (Profile::Stock, false) if is_http && draft.follows_client() => &["istio-http/1.1", "istio-h2", "istio"],
        (Profile::Stock, false) if is_http => &["istio-http/1.1", "istio", "http/1.1"],
        (Profile::Stock, false) => &["istio"],
    };
    let sni = match tls.sni.is_empty() && !draft.is_dynamic {
        true => draft.cluster.name.clone(),
        false => tls.sni.clone(),
    };
    if draft.is_dynamic {
        auto_sni(draft, tls);
    }
    let context = UpstreamTlsContext { sni, ..UpstreamTlsContext::default() };
    let common = cx.common.client_tls.get((alpn, tls.subject_alt_names.clone()), || {
        let names = tls.subject_alt_names.iter().map(|n| exact(n)).collect();
        let mut common = CommonTlsContext {
            alpn_protocols: strings(alpn),
            tls_params: Some(versions()),
            tls_certificate_sds_secret_configs: vec![secret("default")],
            validation_context_type: Some(validation(names, secret("ROOTCA"))),
            ..CommonTlsContext::default()
        };
        comply(cx, &mut common);
        any(&UpstreamTlsContext { common_tls_context: Some(common), ..UpstreamTlsContext::default() }).value.into()
    });
    // The common part is the first field.
    let mut packed = any(&context);
    packed.value.splice(0..0, common.iter().copied());
    packed
}

/// TLS to a server outside of the mesh, or with certificates of the user's (istiod `constructUpstreamTLS`).
fn originate(
    cx: &Context<'_>,
    draft: &mut Draft,
    names: &[String],
    tls: &ClientTlsSettings,
    mutual: bool,
) -> Option<UpstreamTlsContext> {
    auto_sni(draft, tls);
    let matchers = names.iter().map(|n| exact(n)).collect();
    let insecure = tls.insecure_skip_verify == Some(true);
    let mut common = CommonTlsContext { tls_params: Some(versions()), ..CommonTlsContext::default() };
    if !tls.credential_name.is_empty() {
        if mutual {
            common.tls_certificate_sds_secret_configs = vec![credential(cx, &tls.credential_name)];
        }
        if !insecure {
            let root = credential(cx, &format!("{}-cacert", tls.credential_name));
            common.validation_context_type = Some(validation(matchers, root));
        }
    } else {
        if mutual {
            if tls.client_certificate.is_empty() || tls.private_key.is_empty() {
                return None;
            }
            common.tls_certificate_sds_secret_configs =
                vec![file_secret(cx, &file_certificate(&tls.client_certificate, &tls.private_key))];
        }
        let roots = if tls.ca_certificates.is_empty() { "system" } else { &tls.ca_certificates };
        common.validation_context_type = Some(if insecure {
            ValidationContextType::ValidationContext(Default::default())
        } else {
            with_crl(validation(matchers, file_secret(cx, &file_root(roots))), &tls.ca_crl)
        });
    }
    if let (Some(defaults), Some(params)) = (&cx.push.mesh.tls_defaults, &mut common.tls_params) {
        params.ecdh_curves.clone_from(&defaults.ecdh_curves);
        params.cipher_suites.clone_from(&defaults.cipher_suites);
    }
    if draft.is_http2() {
        common.alpn_protocols = strings(&["h2"]);
    }
    Some(UpstreamTlsContext { common_tls_context: Some(common), sni: tls.sni.clone(), ..UpstreamTlsContext::default() })
}

/// Without a configured SNI the request's host is used, and checked in the certificate.
fn auto_sni(draft: &mut Draft, tls: &ClientTlsSettings) {
    let insecure = tls.insecure_skip_verify == Some(true);
    let sni = tls.sni.is_empty();
    let validate = (draft.is_dynamic || (sni && tls.subject_alt_names.is_empty())) && !insecure;
    if draft.is_dynamic && (insecure || !sni || !validate) {
        allow_insecure(draft);
    }
    if sni || validate {
        let options: &mut UpstreamHttpProtocolOptions =
            draft.options().upstream_http_protocol_options.get_or_insert_default();
        options.auto_sni = sni;
        options.auto_san_validation = validate;
    }
}

fn allow_insecure(draft: &mut Draft) {
    use envoy_api::cluster::cluster::ClusterDiscoveryType;
    use envoy_api::pb::envoy::extensions::clusters::dynamic_forward_proxy::v3::ClusterConfig;
    if let Some(ClusterDiscoveryType::ClusterType(CustomClusterType { typed_config: Some(config), .. })) =
        &mut draft.cluster.cluster_discovery_type
        && let Ok(mut own) = unpack::<ClusterConfig>(config)
    {
        own.allow_insecure_cluster_options = true;
        *config = any(&own);
    }
}

fn prepend_proxy_protocol(draft: &mut Draft, version: ProxyProtocolVersion) {
    let wrap = |name: &str, inner: core::TransportSocket| {
        let config = ProxyProtocolUpstreamTransport {
            config: Some(core::ProxyProtocolConfig { version: version as i32, ..Default::default() }),
            transport_socket: Some(inner),
            ..Default::default()
        };
        transport_socket(name, &config)
    };
    const NAME: &str = "envoy.transport_sockets.upstream_proxy_protocol";
    let cluster = &mut draft.cluster;
    match cluster.transport_socket.take() {
        Some(inner) => cluster.transport_socket = Some(wrap(NAME, inner)),
        None if cluster.transport_socket_matches.is_empty() => {
            cluster.transport_socket = Some(wrap(NAME, transport_socket("raw_buffer", &RawBuffer {})));
        }
        None => {
            for m in &mut cluster.transport_socket_matches {
                m.transport_socket = m.transport_socket.take().map(|inner| wrap(NAME, inner));
            }
        }
    }
}
