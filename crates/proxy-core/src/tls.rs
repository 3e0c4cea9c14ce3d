//! TLS contexts: which certificates, which roots, which peers. The proxy turns them into rustls configurations.

mod suites;

use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_types::ArcStr;

use crate::config_source::ConfigSource;
use crate::fields;
use crate::matchers::StringMatcher;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, Result, refuse};
use crate::rules;
use crate::stream_info::PeerCertificate;

/// TLS towards clients.
#[derive(Clone, Debug)]
pub struct DownstreamTls {
    /// What both sides have.
    pub common: TlsCommon,
    /// Without a certificate of the client there is no connection.
    pub require_client_certificate: bool,
    /// Without SNI there is no connection.
    pub require_sni: bool,
    /// Issue session tickets (RFC 5077, and those of TLS 1.3).
    pub session_tickets: bool,
    /// What tickets are sealed with: by the first, and opened by any. Without, no other process can open them.
    pub ticket_keys: Vec<DataSource>,
    /// Keep sessions on the server side.
    pub stateful_resumption: bool,
    /// How long sessions may be resumed.
    pub session_timeout: Option<Duration>,
}

/// TLS towards upstreams.
#[derive(Clone, Debug)]
pub struct UpstreamTls {
    /// What both sides have.
    pub common: TlsCommon,
    /// Server name to send, unless the request or the host says another.
    pub sni: Option<ArcStr>,
    /// Send the endpoint's host name.
    pub auto_host_sni: bool,
    /// The server's certificate must carry the SNI that was sent.
    pub auto_sni_san_validation: bool,
    /// Sessions kept for resumption; 0: none.
    pub max_session_keys: u32,
    /// A server's RSA key must be allowed to sign, too (RFC 5280, 4.2.1.3), as other keys must.
    pub enforce_rsa_key_usage: bool,
}

/// What both sides have.
#[derive(Clone, Debug)]
pub struct TlsCommon {
    /// Application protocols, in order of preference.
    pub alpn: Vec<Vec<u8>>,
    /// Oldest version.
    pub min_version: TlsVersion,
    /// Newest version.
    pub max_version: TlsVersion,
    /// OpenSSL's names of suites of TLS 1.2, some of which may not be spoken here; empty: the default ones.
    pub ciphers: Vec<ArcStr>,
    /// Key exchanges, likewise.
    pub curves: Vec<ArcStr>,
    /// Own certificates.
    pub certificates: Vec<CertificateSource>,
    /// How the peer is checked.
    pub validation: Validation,
    /// Of a server: whether its certificates need answers of OCSP responders.
    pub staples: Option<Staples>,
}

/// What a server does about answers of OCSP responders (`ocsp_staple_policy`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Staples {
    /// They are shown as long as they are good.
    Optional,
    /// There must be one of each certificate.
    Required,
}

/// A certificate that is in the configuration itself, or in files that it names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Certificate {
    /// PEM certificates, the own one first.
    pub chain: DataSource,
    /// PEM key.
    pub key: DataSource,
    /// What the key is encrypted with.
    pub password: Option<DataSource>,
    /// An OCSP responder's answer in DER.
    pub staple: Option<DataSource>,
}

impl Certificate {
    /// All parts.
    pub fn parts(&self) -> impl Iterator<Item = &DataSource> {
        [&self.chain, &self.key].into_iter().chain(&self.password).chain(&self.staple)
    }
}

/// A version of TLS. Older ones are refused.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum TlsVersion {
    /// 1.2.
    V12,
    /// 1.3.
    V13,
}

/// Where a certificate comes from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum CertificateSource {
    /// Files or bytes of the configuration.
    Local(Certificate),
    /// A secret by name.
    Sds(SdsRef),
}

/// A secret by name.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SdsRef {
    /// The secret's name.
    pub name: ArcStr,
    /// Who is asked.
    pub source: ConfigSource,
}

/// Where bytes come from; the proxy reads them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum DataSource {
    /// A file's path.
    File(ArcStr),
    /// The bytes themselves. Not printed, since they may be a key.
    Inline(Secretive),
    /// An environment variable's name.
    Environment(ArcStr),
}

/// Name of a session ticket's key, key of its MAC and key of its cipher, as in Envoy.
pub const TICKET_KEY_LENGTH: usize = 80;

fn ticket_keys(keys: &pb::tls::TlsSessionTicketKeys) -> Compiled<Vec<DataSource>> {
    if keys.keys.is_empty() {
        return Err(Invalid::new("keys", "is empty"));
    }
    let compile = |(i, source)| {
        let key = DataSource::compile(source).at_index("keys", i)?;
        match &key {
            DataSource::Inline(bytes) if bytes.0.len() != TICKET_KEY_LENGTH => {
                let text = format!("has {} bytes, not {TICKET_KEY_LENGTH}", bytes.0.len());
                Err(Invalid::new(format!("keys[{i}]"), text))
            }
            _ => Ok(key),
        }
    };
    keys.keys.iter().enumerate().map(compile).collect()
}

/// Bytes that `Debug` does not show.
#[derive(Clone, Eq, PartialEq)]
pub struct Secretive(pub Bytes);

impl std::fmt::Debug for Secretive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "({} bytes)", self.0.len())
    }
}

impl DataSource {
    pub(crate) fn compile(source: &pb::core::DataSource) -> Compiled<Self> {
        use pb::core::data_source::Specifier;
        Ok(match &source.specifier {
            Some(Specifier::Filename(path)) => Self::File(path.as_str().into()),
            Some(Specifier::InlineString(text)) => Self::Inline(Secretive(Bytes::copy_from_slice(text.as_bytes()))),
            Some(Specifier::InlineBytes(bytes)) => Self::Inline(Secretive(Bytes::copy_from_slice(bytes))),
            Some(Specifier::EnvironmentVariable(name)) => Self::Environment(name.as_str().into()),
            None => return Err(Invalid::new("specifier", "is missing")),
        })
    }
}

/// Bytes that must be in the configuration itself.
pub(crate) fn inline_bytes(source: Option<&pb::core::DataSource>) -> Compiled<Bytes> {
    match source.map(DataSource::compile).transpose()? {
        None => Ok(Bytes::new()),
        Some(DataSource::Inline(bytes)) => Ok(bytes.0),
        Some(_) => Err(Invalid::unsupported("filename")),
    }
}

/// How a peer's certificate is checked.
#[derive(Clone, Debug, Default)]
pub struct Validation {
    /// Roots in PEM.
    pub trusted_ca: Option<DataSource>,
    /// The machine's roots.
    pub system_roots: bool,
    /// Roots (and more) out of a secret; merged with this by [`merged`](Validation::merged).
    pub sds: Option<SdsRef>,
    /// One of these must hold for one of the certificate's names; none: any name will do.
    pub san: Vec<SanMatcher>,
    /// Lower-case hex of SHA-256 of acceptable certificates.
    pub hashes: Vec<ArcStr>,
    /// Base64 of SHA-256 of acceptable keys.
    pub spkis: Vec<ArcStr>,
    /// Revocation lists in PEM.
    pub crl: Option<DataSource>,
    /// They are asked about the peer's certificate only, and not about those of its chain.
    pub only_leaf_crl: bool,
    /// Connections of unverifiable peers are accepted, as not validated.
    pub accept_untrusted: bool,
    /// An expired certificate will do.
    pub allow_expired: bool,
    /// Longest chain.
    pub max_verify_depth: Option<u32>,
}

/// A condition on a name in a certificate.
#[derive(Clone, Debug)]
pub struct SanMatcher {
    /// Which names.
    pub kind: SanKind,
    /// The condition.
    pub matcher: StringMatcher,
}

/// A kind of subject alternative name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SanKind {
    /// All of them (`match_subject_alt_names`).
    Any,
    /// rfc822Name.
    Email,
    /// dNSName.
    Dns,
    /// uniformResourceIdentifier.
    Uri,
    /// iPAddress.
    Ip,
}

impl DownstreamTls {
    pub(crate) fn compile(context: &pb::tls::DownstreamTlsContext) -> Compiled<Self> {
        use pb::tls::downstream_tls_context::OcspStaplePolicy as Policy;
        use pb::tls::downstream_tls_context::SessionTicketKeysType as Tickets;
        refuse! {
            "session_ticket_keys_sds_secret_config":
                matches!(context.session_ticket_keys_type, Some(Tickets::SessionTicketKeysSdsSecretConfig(_))),
        }
        let mut common =
            TlsCommon::compile(context.common_tls_context.as_ref(), TlsVersion::V13).at("common_tls_context")?;
        common.staples = Some(match Policy::try_from(context.ocsp_staple_policy) {
            Ok(Policy::LenientStapling | Policy::StrictStapling) => Staples::Optional,
            Ok(Policy::MustStaple) => Staples::Required,
            Err(_) => return Err(Invalid::new("ocsp_staple_policy", "is not defined")),
        });
        let by_name = |source: &CertificateSource| matches!(source, CertificateSource::Sds(_));
        if common.certificates.iter().any(by_name) && !common.certificates.iter().all(by_name) {
            return Err(Invalid::new("common_tls_context", "SDS and non-SDS TLS certificates may not be mixed"));
        }
        if common.certificates.is_empty() {
            return Err(Invalid::new("common_tls_context", "no TLS certificates found for server context"));
        }
        Ok(Self {
            common,
            require_client_certificate: fields::flag(context.require_client_certificate.as_ref(), false),
            require_sni: fields::flag(context.require_sni.as_ref(), false),
            session_tickets: !matches!(
                context.session_ticket_keys_type,
                Some(Tickets::DisableStatelessSessionResumption(true))
            ),
            ticket_keys: match &context.session_ticket_keys_type {
                Some(Tickets::SessionTicketKeys(keys)) => ticket_keys(keys).at("session_ticket_keys")?,
                _ => Vec::new(),
            },
            stateful_resumption: !context.disable_stateful_session_resumption,
            session_timeout: fields::duration("session_timeout", context.session_timeout.as_ref())?
                .map(|timeout| match timeout.as_secs() > u64::from(u32::MAX) {
                    true => Err(Invalid::new("session_timeout", "is too long")),
                    false => Ok(timeout),
                })
                .transpose()?,
        })
    }
}

impl UpstreamTls {
    pub(crate) fn compile(context: &pb::tls::UpstreamTlsContext) -> Compiled<Self> {
        refuse!("allow_renegotiation": context.allow_renegotiation);
        if context.sni.len() > 255 {
            return Err(Invalid::new("sni", "is longer than 255 bytes"));
        }
        let certificates = context.common_tls_context.as_ref().map_or(0, |common| common.tls_certificates.len());
        if certificates > 1 {
            return Err(Invalid::new("common_tls_context.tls_certificates", "a client has one certificate"));
        }
        if context.sni.contains('\0') {
            return Err(Invalid::new("sni", "contains NUL"));
        }
        let validates =
            context.common_tls_context.as_ref().is_some_and(|common| common.validation_context_type.is_some());
        if context.auto_sni_san_validation && !validates {
            return Err(Invalid::new("auto_sni_san_validation", "needs a validation context"));
        }
        Ok(Self {
            // Envoy's clients offer at most TLS 1.2 by default (`TLS_AUTO` of an upstream context), but 1.3 when allowed.
            common: TlsCommon::compile(context.common_tls_context.as_ref(), TlsVersion::V12)
                .at("common_tls_context")?,
            sni: (!context.sni.is_empty()).then(|| context.sni.as_str().into()),
            auto_host_sni: context.auto_host_sni,
            auto_sni_san_validation: context.auto_sni_san_validation,
            max_session_keys: fields::uint(context.max_session_keys.as_ref(), 1),
            enforce_rsa_key_usage: fields::flag(context.enforce_rsa_key_usage.as_ref(), true),
        })
    }
}

impl TlsCommon {
    fn compile(common: Option<&pb::tls::CommonTlsContext>, default_max: TlsVersion) -> Compiled<Self> {
        let empty = pb::tls::CommonTlsContext::default();
        let common = common.unwrap_or(&empty);
        refuse! {
            "custom_handshaker": common.custom_handshaker.is_some(),
            "custom_tls_certificate_selector": common.custom_tls_certificate_selector.is_some(),
            "tls_certificate_provider_instance": common.tls_certificate_provider_instance.is_some(),
            "tls_certificate_certificate_provider": common.tls_certificate_certificate_provider.is_some(),
            "tls_certificate_certificate_provider_instance": common.tls_certificate_certificate_provider_instance.is_some(),
            "key_log": common.key_log.is_some(),
        }
        crate::constraints::tls_common(common)?;
        let params = common.tls_params.clone().unwrap_or_default();
        refuse! {
            "tls_params.signature_algorithms": !params.signature_algorithms.is_empty(),
            "tls_params.compliance_policies": !params.compliance_policies.is_empty(),
        }
        let mut certificates = Vec::new();
        for (i, certificate) in common.tls_certificates.iter().enumerate() {
            let certificate = local_certificate(certificate).at_index("tls_certificates", i)?;
            certificates.push(CertificateSource::Local(certificate));
        }
        for (i, sds) in common.tls_certificate_sds_secret_configs.iter().enumerate() {
            certificates
                .push(CertificateSource::Sds(SdsRef::compile(sds).at_index("tls_certificate_sds_secret_configs", i)?));
        }
        let max_version =
            version("tls_params.tls_maximum_protocol_version", params.tls_maximum_protocol_version, default_max)?;
        Ok(Self {
            alpn: common.alpn_protocols.iter().map(|p| p.as_bytes().to_vec()).collect(),
            min_version: version(
                "tls_params.tls_minimum_protocol_version",
                params.tls_minimum_protocol_version,
                TlsVersion::V12,
            )?
            .min(max_version),
            max_version,
            ciphers: suites::suites(&params.cipher_suites)?,
            curves: suites::curves(&params.ecdh_curves)?,
            certificates,
            validation: validation(common)?,
            staples: None,
        })
    }
}

/// TLS 1.0 and 1.1 as lower bound mean 1.2 here; as upper bound there is nothing left to speak.
fn version(field: &str, version: i32, default: TlsVersion) -> Compiled<TlsVersion> {
    match version {
        0 => Ok(default),
        1 | 2 if field.ends_with("minimum_protocol_version") => Ok(TlsVersion::V12),
        3 => Ok(TlsVersion::V12),
        4 => Ok(TlsVersion::V13),
        _ => Err(Invalid::new(field, "is not supported: TLS 1.2 is the oldest version")),
    }
}

fn local_certificate(certificate: &pb::tls::TlsCertificate) -> Compiled<Certificate> {
    use pb::core::data_source::Specifier;
    refuse! {
        "pkcs12": certificate.pkcs12.is_some(),
        "private_key_provider": certificate.private_key_provider.is_some(),
        "tls_params": certificate.tls_params.is_some(),
    }
    let source = |field: &str, data: &Option<pb::core::DataSource>| {
        DataSource::compile(data.as_ref().ok_or_else(|| Invalid::new(field, "is missing"))?).at(field)
    };
    let staple = certificate.ocsp_staple.as_ref();
    if staple.is_some_and(|staple| matches!(staple.specifier, Some(Specifier::InlineString(_)))) {
        return Err(Invalid::new("ocsp_staple", "is no text"));
    }
    Ok(Certificate {
        chain: source("certificate_chain", &certificate.certificate_chain)?,
        key: source("private_key", &certificate.private_key)?,
        password: certificate.password.as_ref().map(DataSource::compile).transpose().at("password")?,
        staple: staple.map(DataSource::compile).transpose().at("ocsp_staple")?,
    })
}

impl SdsRef {
    fn compile(config: &pb::tls::SdsSecretConfig) -> Compiled<Self> {
        Ok(Self {
            name: fields::required("name", &config.name)?,
            source: ConfigSource::compile(config.sds_config.as_ref()).at("sds_config")?,
        })
    }
}

fn validation(common: &pb::tls::CommonTlsContext) -> Compiled<Validation> {
    use pb::tls::common_tls_context::ValidationContextType as Kind;
    match &common.validation_context_type {
        None => Ok(Validation::default()),
        Some(Kind::ValidationContext(context)) => Validation::compile(context).at("validation_context"),
        Some(Kind::ValidationContextSdsSecretConfig(sds)) => {
            let sds = SdsRef::compile(sds).at("validation_context_sds_secret_config")?;
            Ok(Validation { sds: Some(sds), ..Validation::default() })
        }
        Some(Kind::CombinedValidationContext(combined)) => {
            refuse! {
                "combined_validation_context.validation_context_certificate_provider":
                    combined.validation_context_certificate_provider.is_some()
                        || combined.validation_context_certificate_provider_instance.is_some(),
            }
            let context = combined.default_validation_context.clone().unwrap_or_default();
            let mut validation =
                Validation::compile(&context).at("default_validation_context").at("combined_validation_context")?;
            if let Some(sds) = &combined.validation_context_sds_secret_config {
                validation.sds = Some(SdsRef::compile(sds).at("combined_validation_context")?);
            }
            Ok(validation)
        }
        Some(_) => Err(Invalid::unsupported("validation_context_certificate_provider")),
    }
}

impl Validation {
    pub(crate) fn compile(context: &pb::tls::CertificateValidationContext) -> Compiled<Self> {
        refuse! {
            "ca_certificate_provider_instance": context.ca_certificate_provider_instance.is_some(),
            "custom_validator_config": context.custom_validator_config.is_some(),

            "require_signed_certificate_timestamp":
                fields::flag(context.require_signed_certificate_timestamp.as_ref(), false),
        }
        crate::constraints::validation(context)?;
        let mut san = Vec::new();
        for (i, matcher) in context.match_typed_subject_alt_names.iter().enumerate() {
            san.push(SanMatcher::compile(matcher).at_index("match_typed_subject_alt_names", i)?);
        }
        for (i, matcher) in context.match_subject_alt_names.iter().enumerate() {
            let matcher = StringMatcher::compile(matcher).at_index("match_subject_alt_names", i)?;
            san.push(SanMatcher { kind: SanKind::Any, matcher });
        }
        let list = |values: &[String], clean: fn(&str) -> String| {
            values.iter().map(|v| clean(v).into()).collect::<Vec<ArcStr>>()
        };
        Ok(Self {
            trusted_ca: context.trusted_ca.as_ref().map(DataSource::compile).transpose().at("trusted_ca")?,
            system_roots: context.system_root_certs.is_some(),
            sds: None,
            san,
            hashes: list(&context.verify_certificate_hash, |h| h.replace(':', "").to_ascii_lowercase()),
            spkis: list(&context.verify_certificate_spki, str::to_owned),
            crl: context.crl.as_ref().map(DataSource::compile).transpose().at("crl")?,
            only_leaf_crl: context.only_verify_leaf_cert_crl,
            accept_untrusted: context.trust_chain_verification == 1,
            allow_expired: context.allow_expired_certificate,
            max_verify_depth: context.max_verify_depth.as_ref().map(|v| v.value),
        })
    }

    /// This context with a secret's over it, as protobuf merges them: what the secret says wins, lists add up.
    pub fn merged(&self, secret: &Validation) -> Validation {
        let both = |a: &[ArcStr], b: &[ArcStr]| a.iter().chain(b).cloned().collect();
        Validation {
            trusted_ca: secret.trusted_ca.clone().or_else(|| self.trusted_ca.clone()),
            system_roots: self.system_roots || secret.system_roots,
            sds: self.sds.clone(),
            san: self.san.iter().chain(&secret.san).cloned().collect(),
            hashes: both(&self.hashes, &secret.hashes),
            spkis: both(&self.spkis, &secret.spkis),
            crl: secret.crl.clone().or_else(|| self.crl.clone()),
            accept_untrusted: self.accept_untrusted || secret.accept_untrusted,
            allow_expired: self.allow_expired || secret.allow_expired,
            max_verify_depth: secret.max_verify_depth.or(self.max_verify_depth),
            only_leaf_crl: self.only_leaf_crl || secret.only_leaf_crl,
        }
    }

    /// Whether peers are checked against roots at all.
    pub fn has_roots(&self) -> bool {
        self.trusted_ca.is_some() || self.sds.is_some() || self.system_roots
    }

    /// Whether the certificate's names fulfil one of the conditions; true without conditions.
    pub fn san_ok(&self, certificate: &PeerCertificate) -> bool {
        self.san.is_empty() || self.san.iter().any(|m| m.matches(certificate))
    }
}

impl SanMatcher {
    pub(crate) fn compile(matcher: &pb::tls::SubjectAltNameMatcher) -> Compiled<Self> {
        use pb::tls::subject_alt_name_matcher::SanType;
        let kind = match SanType::try_from(matcher.san_type) {
            Ok(SanType::Email) => SanKind::Email,
            Ok(SanType::Dns) => SanKind::Dns,
            Ok(SanType::Uri) => SanKind::Uri,
            Ok(SanType::IpAddress) => SanKind::Ip,
            _ => return Err(Invalid::unsupported("san_type")),
        };
        let matcher = StringMatcher::compile(&matcher.matcher.clone().unwrap_or_default())?;
        Ok(Self { kind, matcher })
    }

    pub(crate) fn matches(&self, certificate: &PeerCertificate) -> bool {
        let any = |names: &[ArcStr]| names.iter().any(|n| self.matcher.matches(n.as_bytes()));
        let dns = || certificate.dns_sans.iter().any(|name| self.dns_matches(name));
        match self.kind {
            SanKind::Uri => any(&certificate.uri_sans),
            SanKind::Email => any(&certificate.email_sans),
            SanKind::Ip => certificate.ip_sans.iter().any(|ip| self.ip_matches(ip)),
            SanKind::Dns => dns(),
            SanKind::Any => {
                any(&certificate.uri_sans)
                    || dns()
                    || any(&certificate.email_sans)
                    || certificate.ip_sans.iter().any(|ip| self.ip_matches(ip))
            }
        }
    }

    /// An exact condition fits a wildcard in the certificate (Envoy `Utility::dnsNameMatch`).
    fn dns_matches(&self, name: &str) -> bool {
        match self.matcher.as_exact() {
            Some(wanted) => dns_name_match(wanted, name),
            None => self.matcher.matches(name.as_bytes()),
        }
    }

    fn ip_matches(&self, ip: &str) -> bool {
        let same = || Some(self.matcher.as_exact()?.parse::<IpAddr>().ok()? == ip.parse::<IpAddr>().ok()?);
        self.matcher.matches(ip.as_bytes()) || same().unwrap_or(false)
    }
}

/// Whether a DNS name is covered by a certificate's name, whose first label may be `*`.
fn dns_name_match(name: &str, pattern: &str) -> bool {
    if name.eq_ignore_ascii_case(pattern) {
        return true;
    }
    match (pattern.strip_prefix("*."), name.split_once('.')) {
        (Some(suffix), Some((label, rest))) => !label.is_empty() && rest.eq_ignore_ascii_case(suffix),
        _ => false,
    }
}

/// A secret as SDS or the bootstrap gives it.
#[derive(Clone, Debug)]
pub enum Secret {
    /// A certificate.
    Certificate {
        /// The secret's name.
        name: ArcStr,
        /// The certificate.
        certificate: Certificate,
    },
    /// Roots.
    Validation {
        /// The secret's name.
        name: ArcStr,
        /// The context.
        validation: Validation,
    },
    /// Bytes for a filter.
    Generic {
        /// The secret's name.
        name: ArcStr,
        /// The bytes.
        secret: DataSource,
    },
}

impl Secret {
    /// Compiles a `tls.v3.Secret`.
    pub fn compile(secret: &pb::tls::Secret) -> Result<Self> {
        rules::check(secret).and_then(|()| Self::build(secret)).map_err(|invalid| invalid.of("secret", &secret.name))
    }

    fn build(secret: &pb::tls::Secret) -> Compiled<Self> {
        use pb::tls::secret::Type;
        let name: ArcStr = secret.name.as_str().into();
        Ok(match &secret.r#type {
            Some(Type::TlsCertificate(certificate)) => {
                Self::Certificate { name, certificate: local_certificate(certificate).at("tls_certificate")? }
            }
            Some(Type::ValidationContext(context)) => {
                Self::Validation { name, validation: Validation::compile(context).at("validation_context")? }
            }
            Some(Type::GenericSecret(generic)) => {
                let source = generic.secret.as_ref().ok_or_else(|| Invalid::new("generic_secret", "is empty"))?;
                Self::Generic { name, secret: DataSource::compile(source).at("generic_secret")? }
            }
            Some(Type::SessionTicketKeys(_)) => return Err(Invalid::unsupported("session_ticket_keys")),
            None => return Err(Invalid::new("type", "is missing")),
        })
    }

    /// The secret's name.
    pub fn name(&self) -> &ArcStr {
        match self {
            Self::Certificate { name, .. } | Self::Validation { name, .. } | Self::Generic { name, .. } => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn san_conditions() {
        let certificate = PeerCertificate {
            uri_sans: vec!["spiffe://cluster.local/ns/a/sa/b".into()],
            dns_sans: vec!["*.wild.test".into()],
            ..PeerCertificate::default()
        };
        let check = |kind: SanKind, matcher: StringMatcher| {
            let validation = Validation { san: vec![SanMatcher { kind, matcher }], ..Validation::default() };
            validation.san_ok(&certificate)
        };
        assert!(Validation::default().san_ok(&certificate));
        assert!(check(
            SanKind::Any,
            StringMatcher::Prefix { text: "spiffe://cluster.local/".into(), ignore_case: false }
        ));
        assert!(!check(SanKind::Dns, StringMatcher::exact("spiffe://cluster.local/ns/a/sa/b")));
        assert!(check(SanKind::Dns, StringMatcher::exact("a.wild.test")));
        assert!(!check(SanKind::Dns, StringMatcher::exact("a.b.wild.test")));
        assert!(!check(SanKind::Any, StringMatcher::exact("spiffe://cluster.local/ns/a/sa/c")));
    }
}
