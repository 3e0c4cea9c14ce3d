//! TLS contexts of both directions.

use envoy_api::core::{DataSource, data_source::Specifier};
use envoy_api::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_api::tls::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, TlsParameters,
    common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
    tls_parameters::TlsProtocol,
};
use istio_api::gateway::{ServerTlsMode, ServerTlsSettings, TlsProtocol as GatewayProtocol};
use istio_api::mesh_config::TlsProtocol as MeshProtocol;
use push_context::MtlsMode;

use crate::context::Context;
use crate::proto::{bool_value, exact, prefix, sds};

const CIPHERS: [&str; 6] = [
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-GCM-SHA256",
];

pub(crate) fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

/// A secret of the agent: `default`, `ROOTCA`, or files by name.
pub(crate) fn secret(name: &str) -> SdsSecretConfig {
    let mut source = sds("sds-grpc");
    if !matches!(name, "default" | "ROOTCA") {
        // Files may appear late; the connection then fails instead of the listener waiting for ever.
        source.initial_fetch_timeout = None;
    }
    SdsSecretConfig { name: name.to_owned(), sds_config: Some(source) }
}

/// The peer must be one of `names` and be signed by the authority behind `root`.
pub(crate) fn validation(names: Vec<StringMatcher>, root: &str) -> ValidationContextType {
    #[allow(deprecated)] // What istiod sends; typed names would be a different resource.
    let default = CertificateValidationContext { match_subject_alt_names: names, ..Default::default() };
    ValidationContextType::CombinedValidationContext(CombinedCertificateValidationContext {
        default_validation_context: Some(default),
        validation_context_sds_secret_config: Some(secret(root)),
        ..Default::default()
    })
}

/// Adds a file of revoked certificates, if there is one.
pub(crate) fn with_crl(context: ValidationContextType, file: &str) -> ValidationContextType {
    match context {
        ValidationContextType::CombinedValidationContext(mut combined) if !file.is_empty() => {
            let specifier = Some(Specifier::Filename(file.to_owned()));
            combined.default_validation_context.get_or_insert_default().crl =
                Some(DataSource { specifier, ..DataSource::default() });
            ValidationContextType::CombinedValidationContext(combined)
        }
        other => other,
    }
}

/// The oldest and the newest version that both sides of a mesh connection speak.
pub(crate) fn versions() -> TlsParameters {
    TlsParameters {
        tls_minimum_protocol_version: TlsProtocol::TlSv12 as i32,
        tls_maximum_protocol_version: TlsProtocol::TlSv13 as i32,
        ..TlsParameters::default()
    }
}

/// What an inbound port terminates mutual TLS with (istiod `BuildInboundTLS`); nothing for plain text.
pub(crate) fn inbound_mtls(cx: &Context<'_>, mode: MtlsMode, http: bool) -> Option<DownstreamTlsContext> {
    if mode == MtlsMode::Disable {
        return None;
    }
    let mesh = cx.push.mesh.mesh_mtls.as_ref();
    let minimum = match mesh.map(|m| m.min_protocol_version) {
        Some(MeshProtocol::Tlsv1_3) => TlsProtocol::TlSv13,
        _ => TlsProtocol::TlSv12,
    };
    let ciphers = mesh.map(|m| m.cipher_suites.clone()).filter(|c| !c.is_empty());
    let mut domains = vec![cx.push.trust_domain().to_owned()];
    domains.extend(cx.push.mesh.trust_domain_aliases.iter().cloned());
    let names = domains.iter().map(|d| prefix(&format!("spiffe://{d}/"))).collect();
    let alpn: &[&str] = match (http, cx.exchanges_over_tcp()) {
        (true, _) => &["h2", "http/1.1"],
        (false, true) => &["istio-peer-exchange", "h2", "http/1.1"],
        // DIFFERS: whoever agrees on istio-peer-exchange must then speak it.
        (false, false) => &["h2", "http/1.1", "istio"],
    };
    Some(DownstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            alpn_protocols: strings(alpn),
            tls_params: Some(TlsParameters {
                cipher_suites: ciphers.unwrap_or_else(|| strings(&CIPHERS)),
                tls_minimum_protocol_version: minimum as i32,
                ..versions()
            }),
            tls_certificate_sds_secret_configs: vec![secret(server_certificate(cx).as_deref().unwrap_or("default"))],
            validation_context_type: Some(validation(names, server_root(cx).as_deref().unwrap_or("ROOTCA"))),
            ..CommonTlsContext::default()
        }),
        require_client_certificate: bool_value(true),
        ..DownstreamTlsContext::default()
    })
}

/// Name of a certificate in files, as the agent's SDS understands it.
pub(crate) fn file_certificate(certificate: &str, key: &str) -> String {
    format!("file-cert:{certificate}~{key}")
}

/// Name of trusted roots in a file.
pub(crate) fn file_root(path: &str) -> String {
    format!("file-root:{path}")
}

fn server_certificate(cx: &Context<'_>) -> Option<String> {
    Some(file_certificate(cx.node.meta("TLS_SERVER_CERT_CHAIN")?, cx.node.meta("TLS_SERVER_KEY")?))
}

fn server_root(cx: &Context<'_>) -> Option<String> {
    cx.node.meta("TLS_SERVER_ROOT_CERT").map(file_root)
}

/// What a Sidecar's ingress listener terminates TLS with (istiod `BuildListenerTLSContext`).
pub(crate) fn ingress(settings: &ServerTlsSettings) -> DownstreamTlsContext {
    let mutual = matches!(settings.mode, ServerTlsMode::Mutual | ServerTlsMode::IstioMutual);
    let validate = mutual || settings.mode == ServerTlsMode::OptionalMutual;
    let own = settings.mode == ServerTlsMode::IstioMutual;
    let certificates: Vec<SdsSecretConfig> = if own {
        vec![secret("default")]
    } else if settings.tls_certificates.is_empty() {
        vec![secret(&file_certificate(&settings.server_certificate, &settings.private_key))]
    } else {
        let of =
            |c: &istio_api::gateway::TlsCertificate| secret(&file_certificate(&c.server_certificate, &c.private_key));
        settings.tls_certificates.iter().map(of).collect()
    };
    let root = if own || settings.ca_certificates.is_empty() {
        "ROOTCA".to_owned()
    } else {
        file_root(&settings.ca_certificates)
    };
    let names = settings.subject_alt_names.iter().map(|n| exact(n)).collect();
    let version = |v: GatewayProtocol| match v {
        GatewayProtocol::TlsAuto => 0,
        GatewayProtocol::Tlsv1_0 => TlsProtocol::TlSv10 as i32,
        GatewayProtocol::Tlsv1_1 => TlsProtocol::TlSv11 as i32,
        GatewayProtocol::Tlsv1_2 => TlsProtocol::TlSv12 as i32,
        GatewayProtocol::Tlsv1_3 => TlsProtocol::TlSv13 as i32,
    };
    let params = TlsParameters {
        tls_minimum_protocol_version: version(settings.min_protocol_version),
        tls_maximum_protocol_version: version(settings.max_protocol_version),
        cipher_suites: settings.cipher_suites.clone(),
        ..TlsParameters::default()
    };
    DownstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            alpn_protocols: strings(&["h2", "http/1.1"]),
            tls_params: (params != TlsParameters::default()).then_some(params),
            tls_certificate_sds_secret_configs: certificates,
            validation_context_type: validate.then(|| with_crl(validation(names, &root), &settings.ca_crl)),
            ..CommonTlsContext::default()
        }),
        require_client_certificate: bool_value(mutual),
        ..DownstreamTlsContext::default()
    }
}
