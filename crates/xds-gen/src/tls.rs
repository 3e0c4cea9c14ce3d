//! TLS contexts of both directions.

use envoy_api::core::{ConfigSource, DataSource, data_source::Specifier};
use envoy_api::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_api::tls::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, TlsParameters,
    certificate_validation_context::TrustChainVerification,
    common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
    tls_parameters::{CompliancePolicy, TlsProtocol},
};
use istio_api::gateway::{ServerTlsMode, ServerTlsSettings, TlsProtocol as GatewayProtocol};
use istio_api::mesh_config::TlsProtocol as MeshProtocol;
use push_context::{MtlsMode, Profile};
use registry::Compliance;

use crate::context::Context;
use crate::proto::{ads, bool_value, exact, patient_sds, prefix, sds};

const CIPHERS: [&str; 6] = [
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-GCM-SHA256",
];

const FIPS_CIPHERS: [&str; 4] = [
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
];

pub(crate) fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

/// A secret of the agent: `default`, `ROOTCA`, or files by name.
pub(crate) fn secret(name: &str) -> SdsSecretConfig {
    // Files may appear late; the connection then fails instead of the listener waiting for ever.
    let own = matches!(name, "default" | "ROOTCA");
    let source = if own { sds("sds-grpc") } else { patient_sds("sds-grpc") };
    SdsSecretConfig { name: name.to_owned(), sds_config: Some(source) }
}

/// Metadata of proxies beside which somebody else serves what files hold.
pub(crate) const FILE_SERVER: &str = "file-credential";
/// Metadata of proxies beside which somebody else serves secrets.
pub(crate) const SECRET_SERVER: &str = "credential";

/// A secret in files, from the agent or from the server for files that a user has put beside the proxy.
pub(crate) fn file_secret(cx: &Context<'_>, name: &str) -> SdsSecretConfig {
    let own = cx.node.meta(FILE_SERVER) == Some("true") && !matches!(name, "default" | "ROOTCA");
    let source = own.then(|| patient_sds("sds-files-grpc"));
    let plain = secret(name);
    SdsSecretConfig { sds_config: source.or(plain.sds_config), name: plain.name }
}

/// A secret by the `credentialName` of a rule (istiod `ConstructSdsSecretConfigForCredential`).
pub(crate) fn credential(cx: &Context<'_>, name: &str) -> SdsSecretConfig {
    const BUILTIN: &str = "builtin://";
    const INVALID: &str = "invalid://";
    let of_control_plane = |name: String| SdsSecretConfig {
        name,
        sds_config: Some(ConfigSource { initial_fetch_timeout: None, ..ads() }),
    };
    if let Some(rest) = name.strip_prefix(BUILTIN) {
        match rest {
            "" => return secret("default"),
            "-cacert" => return secret("ROOTCA"),
            _ => return of_control_plane("default".to_owned()),
        }
    }
    if let Some(rest) = name.strip_prefix("sds://") {
        if cx.node.meta(SECRET_SERVER) == Some("true") {
            return SdsSecretConfig { name: name.to_owned(), sds_config: Some(patient_sds("sds-external")) };
        }
        return credential(cx, rest);
    }
    let typed = ["configmap://", "kubernetes://", "kubernetes-gateway://"].iter().any(|kind| name.starts_with(kind));
    of_control_plane(match name {
        _ if name.starts_with(INVALID) => INVALID.to_owned(),
        _ if typed => name.to_owned(),
        _ => format!("kubernetes://{name}"),
    })
}

/// Limits TLS to what the mesh must comply with; the last word about each context (istio `EnforceCompliance`).
pub(crate) fn comply(cx: &Context<'_>, tls: &mut CommonTlsContext) {
    match cx.push.settings.compliance {
        Compliance::None => {}
        Compliance::Fips140_2 => {
            let params = tls.tls_params.get_or_insert_default();
            params.tls_minimum_protocol_version = TlsProtocol::TlSv12 as i32;
            params.tls_maximum_protocol_version = TlsProtocol::TlSv12 as i32;
            params.cipher_suites.retain(|cipher| FIPS_CIPHERS.contains(&cipher.as_str()));
            params.ecdh_curves.clear();
        }
        Compliance::Fips140_3 => {
            let params = tls.tls_params.get_or_insert_default();
            params.compliance_policies = vec![CompliancePolicy::Fips202205 as i32];
        }
        Compliance::PostQuantum => {
            let params = tls.tls_params.get_or_insert_default();
            params.tls_minimum_protocol_version = TlsProtocol::TlSv13 as i32;
            params.cipher_suites = strings(&FIPS_CIPHERS);
            params.ecdh_curves = strings(&["X25519MLKEM768"]);
        }
    }
}

/// The peer must be one of `names` and be signed by the authority behind `root`.
pub(crate) fn validation(names: Vec<StringMatcher>, root: SdsSecretConfig) -> ValidationContextType {
    #[allow(deprecated)] // What istiod sends; typed names would be a different resource.
    let default = CertificateValidationContext { match_subject_alt_names: names, ..Default::default() };
    ValidationContextType::CombinedValidationContext(CombinedCertificateValidationContext {
        default_validation_context: Some(default),
        validation_context_sds_secret_config: Some(root),
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

/// Trust domains whose peers are let in (istiod `TrustDomainsForValidation`).
fn trust_domains<'a>(cx: &'a Context<'_>) -> Vec<&'a str> {
    if cx.push.settings.any_trust_domain {
        return Vec::new();
    }
    let mesh = &cx.push.mesh;
    let of_roots = mesh.ca_certificates.iter().flat_map(|c| &c.trust_domains);
    let all = std::iter::once(cx.push.trust_domain()).chain(mesh.trust_domain_aliases.iter().map(String::as_str));
    let mut out: Vec<&str> = Vec::new();
    for domain in all.chain(of_roots.map(String::as_str)) {
        if !domain.is_empty() && !out.contains(&domain) {
            out.push(domain);
        }
    }
    out
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
    let names = trust_domains(cx).iter().map(|d| prefix(&format!("spiffe://{d}/"))).collect();
    let alpn: &[&str] = match (http, cx.agrees_on_exchange()) {
        (true, _) => &["h2", "http/1.1"],
        (false, true) => &["istio-peer-exchange", "h2", "http/1.1"],
        (false, false) if cx.node.profile == Profile::IstioProxy => &["h2", "http/1.1"],
        // DIFFERS: whoever agrees on istio-peer-exchange must then speak it.
        (false, false) => &["h2", "http/1.1", "istio"],
    };
    let root = file_secret(cx, server_root(cx).as_deref().unwrap_or("ROOTCA"));
    let mut common = CommonTlsContext {
        alpn_protocols: strings(alpn),
        tls_params: Some(TlsParameters {
            cipher_suites: ciphers.unwrap_or_else(|| strings(&CIPHERS)),
            tls_minimum_protocol_version: minimum as i32,
            ..versions()
        }),
        tls_certificate_sds_secret_configs: vec![file_secret(
            cx,
            server_certificate(cx).as_deref().unwrap_or("default"),
        )],
        validation_context_type: Some(validation(names, root)),
        ..CommonTlsContext::default()
    };
    comply(cx, &mut common);
    Some(DownstreamTlsContext {
        common_tls_context: Some(common),
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
pub(crate) fn ingress(cx: &Context<'_>, settings: &ServerTlsSettings) -> DownstreamTlsContext {
    let mutual = matches!(settings.mode, ServerTlsMode::Mutual | ServerTlsMode::IstioMutual);
    let validate = mutual || settings.mode == ServerTlsMode::OptionalMutual;
    let own = settings.mode == ServerTlsMode::IstioMutual;
    let files = |certificate: &str, key: &str| match certificate.is_empty() || key.is_empty() {
        true => secret("default"),
        false => file_secret(cx, &file_certificate(certificate, key)),
    };
    let certificates: Vec<SdsSecretConfig> = if own {
        vec![file_secret(cx, server_certificate(cx).as_deref().unwrap_or("default"))]
    } else if settings.tls_certificates.is_empty() {
        vec![files(&settings.server_certificate, &settings.private_key)]
    } else {
        settings.tls_certificates.iter().map(|c| files(&c.server_certificate, &c.private_key)).collect()
    };
    let file = Some(&settings.ca_certificates).filter(|file| !file.is_empty()).map(|file| file_root(file));
    let root = if own { server_root(cx) } else { file }.unwrap_or_else(|| "ROOTCA".to_owned());
    let names = settings.subject_alt_names.iter().map(|n| exact(n)).collect();
    let params = ingress_parameters(cx, settings);
    let mut validation = validation(names, file_secret(cx, &root));
    if let ValidationContextType::CombinedValidationContext(combined) = &mut validation
        && settings.insecure_skip_verify == Some(true)
    {
        combined.default_validation_context.get_or_insert_default().trust_chain_verification =
            TrustChainVerification::AcceptUntrusted as i32;
    }
    let mut common = CommonTlsContext {
        alpn_protocols: strings(&["h2", "http/1.1"]),
        tls_params: (params != TlsParameters::default()).then_some(params),
        tls_certificate_sds_secret_configs: certificates,
        validation_context_type: validate.then(|| with_crl(validation, &settings.ca_crl)),
        ..CommonTlsContext::default()
    };
    comply(cx, &mut common);
    DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: bool_value(mutual),
        ..DownstreamTlsContext::default()
    }
}

/// Whether istiod would pass it on: the ciphers that BoringSSL has, and whatever is no plain name
/// (istio `security.IsValidCipherSuite`).
fn is_cipher_suite(name: &str) -> bool {
    const MORE: [&str; 9] = [
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-RSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA-AES128-SHA",
        "ECDHE-RSA-AES128-SHA",
        "ECDHE-ECDSA-AES256-SHA",
        "ECDHE-RSA-AES256-SHA",
        "AES128-SHA",
        "AES256-SHA",
        "DES-CBC3-SHA",
    ];
    let is_plain = name.starts_with(char::is_alphanumeric);
    !is_plain || name == "ALL" || CIPHERS.contains(&name) || MORE.contains(&name)
}

/// Versions, ciphers and curves: the listener's over the mesh's.
fn ingress_parameters(cx: &Context<'_>, settings: &ServerTlsSettings) -> TlsParameters {
    let mut out = TlsParameters::default();
    if !matches!(settings.mode, ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual) {
        return out;
    }
    if let Some(defaults) = &cx.push.mesh.tls_defaults {
        out.ecdh_curves.clone_from(&defaults.ecdh_curves);
        out.cipher_suites.clone_from(&defaults.cipher_suites);
        out.tls_minimum_protocol_version = match defaults.min_protocol_version {
            MeshProtocol::TlsAuto => 0,
            MeshProtocol::Tlsv1_2 => TlsProtocol::TlSv12 as i32,
            MeshProtocol::Tlsv1_3 => TlsProtocol::TlSv13 as i32,
        };
    }
    let version = |own: GatewayProtocol, default: i32| match own {
        GatewayProtocol::TlsAuto => default,
        GatewayProtocol::Tlsv1_0 => TlsProtocol::TlSv10 as i32,
        GatewayProtocol::Tlsv1_1 => TlsProtocol::TlSv11 as i32,
        GatewayProtocol::Tlsv1_2 => TlsProtocol::TlSv12 as i32,
        GatewayProtocol::Tlsv1_3 => TlsProtocol::TlSv13 as i32,
    };
    out.tls_minimum_protocol_version = version(settings.min_protocol_version, out.tls_minimum_protocol_version);
    out.tls_maximum_protocol_version = version(settings.max_protocol_version, out.tls_maximum_protocol_version);
    if !settings.ecdh_curves.is_empty() {
        out.ecdh_curves.clone_from(&settings.ecdh_curves);
    }
    let mut ciphers: Vec<String> = Vec::new();
    for cipher in &settings.cipher_suites {
        if is_cipher_suite(cipher) && !ciphers.contains(cipher) {
            ciphers.push(cipher.clone());
        }
    }
    if !ciphers.is_empty() {
        out.cipher_suites = ciphers;
    }
    out
}
