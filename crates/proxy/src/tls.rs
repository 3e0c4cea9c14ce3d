//! TLS of listeners and clusters: rustls configurations made from Envoy's contexts and the current secrets.
//!
//! A context is compiled when a connection first needs it and again after one of its secrets changed; open connections
//! keep what they were set up with.

mod certificate;
mod client;
mod der;
mod files;
mod keys;
mod ocsp;
mod secrets;
mod server;
mod sessions;
mod trust;
mod verify;

pub(crate) use certificate::peer_certificate;
pub(crate) use client::ClientTls;
pub(crate) use files::{follow as follow_files, is_file};
pub(crate) use secrets::{SecretStore, is_workload, named_by, read as read_source};
pub(crate) use server::ServerTls;
pub(crate) use verify::{Failed, Failure, in_boring_words, of_server_in_boring_words};

use crate::stats::Named;
use arc_swap::ArcSwapOption;
use mesh_types::ArcStr;
use proxy_core::TlsInfo;
use rustls::crypto::CryptoProvider;
use std::sync::{Arc, LazyLock};

/// What a context was compiled into, and of which generation of secrets.
struct Current<T>(ArcSwapOption<(u64, Arc<T>)>);

impl<T> Default for Current<T> {
    fn default() -> Self {
        Self(ArcSwapOption::empty())
    }
}

impl<T> Current<T> {
    /// Compiles anew if a secret has changed. One that went bad does not take down what worked.
    fn get(&self, secrets: &SecretStore, compile: impl FnOnce() -> Result<T, TlsError>) -> Result<Arc<T>, TlsError> {
        let generation = secrets.generation();
        let current = self.0.load();
        match current.as_deref() {
            Some((of, compiled)) if *of == generation => return Ok(compiled.clone()),
            _ => {}
        }
        match (compile(), current.as_deref()) {
            (Ok(compiled), _) => {
                let compiled = Arc::new(compiled);
                self.0.store(Some(Arc::new((generation, compiled.clone()))));
                Ok(compiled)
            }
            (Err(error), Some((_, former))) => {
                tracing::warn!(%error, "keeping the former TLS context");
                Ok(former.clone())
            }
            (Err(error), None) => Err(error),
        }
    }
}

/// Why a context cannot be used now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// SDS has not delivered it yet; connections are refused until it does.
    #[error("secret {0} has not arrived")]
    MissingSecret(ArcStr),
    #[error("cannot read {path}")]
    Read {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{what} is not valid PEM")]
    Pem { what: &'static str },
    #[error("no certificate")]
    NoCertificate,
    #[error("private_key cannot be read: {0}")]
    Password(&'static str),
    #[error("a session ticket key has {0} bytes, not 80")]
    TicketKey(usize),
    #[error("OCSP response {0}")]
    Staple(&'static str),
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
    #[error("{0}")]
    Verifier(String),
}

impl TlsError {
    /// Whether a handshake could not begin because a secret is not there.
    pub(crate) fn is_missing_secret(e: &std::io::Error) -> bool {
        e.get_ref().and_then(|e| e.downcast_ref::<Self>()).is_some_and(|e| matches!(e, Self::MissingSecret(_)))
    }
}

/// The one crypto provider, with all suites Envoy enables by default.
pub(crate) fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.cipher_suites.sort_by_key(|suite| SUITES.iter().position(|known| *known == suite.suite()));
        // Envoy's `DEFAULT_CURVES` are without it.
        provider.kx_groups.retain(|group| group.name() != rustls::NamedGroup::secp384r1);
        Arc::new(provider)
    });
    &PROVIDER
}

/// The suites in the order of Envoy's defaults (`DEFAULT_CIPHER_SUITES`; those of TLS 1.3 are BoringSSL's).
const SUITES: [rustls::CipherSuite; 9] = [
    rustls::CipherSuite::TLS13_AES_128_GCM_SHA256,
    rustls::CipherSuite::TLS13_AES_256_GCM_SHA384,
    rustls::CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
    rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    rustls::CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    rustls::CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    rustls::CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
];

/// The signatures that peers may make, the best first: BoringSSL's order, which many peers follow.
fn signature_schemes() -> Vec<rustls::SignatureScheme> {
    use rustls::SignatureScheme as Scheme;
    const ORDER: [rustls::SignatureScheme; 8] = [
        Scheme::ECDSA_NISTP256_SHA256,
        Scheme::RSA_PSS_SHA256,
        Scheme::RSA_PKCS1_SHA256,
        Scheme::ECDSA_NISTP384_SHA384,
        Scheme::RSA_PSS_SHA384,
        Scheme::RSA_PKCS1_SHA384,
        Scheme::RSA_PSS_SHA512,
        Scheme::RSA_PKCS1_SHA512,
    ];
    let mut schemes = provider().signature_verification_algorithms.supported_schemes();
    schemes.sort_by_key(|scheme| ORDER.iter().position(|known| known == scheme).unwrap_or(ORDER.len()));
    schemes
}

/// The provider with what a context allows: `cipher_suites` of TLS 1.2 (those of 1.3 are always on, as in BoringSSL) and
/// `ecdh_curves`, in their order. Those that are not spoken here are left out, as long as others remain.
fn provider_for(common: &proxy_core::tls::TlsCommon) -> Result<Arc<CryptoProvider>, TlsError> {
    if common.ciphers.is_empty() && common.curves.is_empty() {
        return Ok(provider().clone());
    }
    let mut own = (**provider()).clone();
    if !common.ciphers.is_empty() {
        let (newer, older): (Vec<_>, Vec<_>) =
            own.cipher_suites.iter().copied().partition(|suite| suite.tls13().is_some());
        let named = |name: &ArcStr| older.iter().copied().find(|suite| cipher_name(suite.suite()) == *name);
        let allowed = common.ciphers.iter().filter_map(named);
        own.cipher_suites = newer.into_iter().chain(allowed).collect();
        let only_12 = versions(common).iter().all(|v| v.version == rustls::ProtocolVersion::TLSv1_2);
        if only_12 && !own.cipher_suites.iter().any(|suite| suite.tls13().is_none()) {
            return Err(TlsError::Verifier(format!("none of the cipher suites {} is known", common.ciphers.join(" "))));
        }
    }
    if !common.curves.is_empty() {
        let known = rustls::crypto::aws_lc_rs::default_provider().kx_groups;
        let named = |curve: &str| known.iter().copied().find(|group| curve_name(group.name()) == Some(curve));
        own.kx_groups = common.curves.iter().filter_map(|curve| named(curve)).collect();
        if own.kx_groups.is_empty() {
            return Err(TlsError::Verifier(format!("none of the curves {} is known", common.curves.join(" "))));
        }
    }
    Ok(Arc::new(own))
}

/// Whether a context can be used: its files are there and fit, its suites and groups are known.
pub(crate) fn check(common: &proxy_core::tls::TlsCommon, secrets: &SecretStore) -> Result<(), TlsError> {
    use proxy_core::config_source::Origin;
    use proxy_core::tls::CertificateSource;
    // What others bring under a name may still come.
    let later = |source: &CertificateSource| match source {
        CertificateSource::Sds(sds) => sds.source.origin != Origin::Static || is_workload(&sds.name),
        CertificateSource::Local(_) => false,
    };
    if !common.certificates.iter().any(later) {
        let keys = secrets.certificates(common)?;
        if let Some(staples) = common.staples {
            ocsp::check(staples, &keys)?;
        }
    }
    if common.validation.sds.is_none() {
        secrets.validation(common)?;
        trust::check_crls(&common.validation)?;
    }
    provider_for(common).map(drop)
}

/// BoringSSL's name of a key exchange.
fn curve_name(group: rustls::NamedGroup) -> Option<&'static str> {
    Some(match group {
        rustls::NamedGroup::X25519 => "X25519",
        rustls::NamedGroup::X25519MLKEM768 => "X25519MLKEM768",
        rustls::NamedGroup::secp256r1 => "P-256",
        rustls::NamedGroup::secp384r1 => "P-384",
        rustls::NamedGroup::secp521r1 => "P-521",
        _ => return None,
    })
}

fn versions(common: &proxy_core::tls::TlsCommon) -> &'static [&'static rustls::SupportedProtocolVersion] {
    use proxy_core::tls::TlsVersion;
    static ALL: [&rustls::SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];
    let low = matches!(common.min_version, TlsVersion::V13);
    let high = matches!(common.max_version, TlsVersion::V13);
    match (low, high) {
        (true, _) => &ALL[..1],
        (false, true) => &ALL,
        (false, false) => &ALL[1..],
    }
}

/// The protocol by which Istio's proxies agree to say who they are in the first bytes of a TCP stream.
const PEER_EXCHANGE: &[u8] = b"istio-peer-exchange";

/// The protocols of a context that are spoken where nobody says who they are: a peer that negotiated it would wait for bytes
/// that never come.
fn spoken(alpn: &[Vec<u8>]) -> Vec<Vec<u8>> {
    alpn.iter().filter(|p| p.as_slice() != PEER_EXCHANGE).cloned().collect()
}

/// OpenSSL's name of a suite, as Envoy prints it.
fn cipher_name(suite: rustls::CipherSuite) -> ArcStr {
    let name = suite.as_str().unwrap_or_default();
    match name.strip_prefix("TLS13_") {
        Some(rest) => format!("TLS_{rest}").into(),
        None => {
            let rest = name.strip_prefix("TLS_").unwrap_or(name).replace("_WITH_", "_");
            let rest = rest.replace("AES_128", "AES128").replace("AES_256", "AES256");
            rest.replace("_POLY1305_SHA256", "_POLY1305").replace('_', "-").into()
        }
    }
}

/// What logs and policies may know of a finished handshake.
fn info(
    common: &rustls::CommonState,
    server_name: Option<&str>,
    local: Option<&proxy_core::stream_info::PeerCertificate>,
    validated: bool,
) -> TlsInfo {
    let version = match common.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_2) => "TLSv1.2",
        _ => "TLSv1.3",
    };
    let peer = common.peer_certificates().and_then(|chain| {
        let mut peer = peer_certificate(chain)?;
        peer.validated = validated;
        Some(peer)
    });
    TlsInfo {
        version: version.into(),
        cipher: common.negotiated_cipher_suite().map_or_else(|| "".into(), |s| cipher_name(s.suite())),
        group: common.negotiated_key_exchange_group().and_then(|group| curve_name(group.name())).unwrap_or_default(),
        cipher_id: common.negotiated_cipher_suite().map_or(0, |s| u16::from(s.suite()).into()),
        alpn: common.alpn_protocol().and_then(|p| std::str::from_utf8(p).ok()).map(ArcStr::from),
        session_id: "".into(),
        server_name: server_name.map(ArcStr::from),
        peer,
        local: local.cloned(),
    }
}

/// BoringSSL's name of the signature that the owner of a certificate makes. rustls does not tell; an elliptic curve leaves no
/// choice, and of RSA's the first one offered is taken.
fn signature_name(chain: &[rustls_pki_types::CertificateDer<'_>]) -> Option<&'static str> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let (_, certificate) = X509Certificate::from_der(chain.first()?).ok()?;
    Some(match certificate.public_key().parsed().ok()? {
        x509_parser::public_key::PublicKey::RSA(_) => "rsa_pss_rsae_sha256",
        x509_parser::public_key::PublicKey::EC(point) => match point.key_size() {
            256 => "ecdsa_secp256r1_sha256",
            384 => "ecdsa_secp384r1_sha384",
            521 => "ecdsa_secp521r1_sha512",
            _ => return None,
        },
        _ => return None,
    })
}

/// Counts what was agreed on in a handshake; true: an earlier session went on.
pub(crate) fn count(common: &rustls::CommonState, info: &TlsInfo, stats: &Named) -> bool {
    stats.inc(&format!("ssl.versions.{}", info.version));
    stats.inc(&format!("ssl.ciphers.{}", info.cipher));
    if !info.group.is_empty() {
        stats.inc(&format!("ssl.curves.{}", info.group));
    }
    if let Some(name) = common.peer_certificates().and_then(signature_name) {
        stats.inc(&format!("ssl.sigalgs.{name}"));
    }
    common.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_and_curves_are_those_allowed() {
        let names = |list: &[&str]| list.iter().map(|name| ArcStr::from(*name)).collect::<Vec<_>>();
        let mut common = proxy_core::tls::TlsCommon {
            alpn: Vec::new(),
            min_version: proxy_core::tls::TlsVersion::V12,
            max_version: proxy_core::tls::TlsVersion::V13,
            certificates: Vec::new(),
            validation: proxy_core::tls::Validation::default(),
            staples: None,
            ciphers: names(&["ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-RSA-AES128-GCM-SHA256", "AES128-SHA"]),
            curves: names(&["P-384", "X25519"]),
        };
        let own = provider_for(&common).unwrap();
        let older: Vec<_> = own.cipher_suites.iter().filter(|s| s.tls13().is_none()).map(|s| s.suite()).collect();
        use rustls::CipherSuite as Suite;
        assert_eq!(older, [Suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, Suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]);
        assert_eq!(own.cipher_suites.len(), older.len() + 3, "those of TLS 1.3 stay");
        let groups: Vec<_> = own.kx_groups.iter().map(|group| group.name()).collect();
        assert_eq!(groups, [rustls::NamedGroup::secp384r1, rustls::NamedGroup::X25519]);
        common.ciphers = names(&["AES128-SHA"]);
        common.max_version = proxy_core::tls::TlsVersion::V12;
        assert!(provider_for(&common).is_err());
    }

    #[test]
    fn cipher_names_are_openssls() {
        assert_eq!(&*cipher_name(rustls::CipherSuite::TLS13_AES_128_GCM_SHA256), "TLS_AES_128_GCM_SHA256");
        let tls12 = rustls::CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256;
        assert_eq!(&*cipher_name(tls12), "ECDHE-RSA-AES128-GCM-SHA256");
        let chacha = rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256;
        assert_eq!(&*cipher_name(chacha), "ECDHE-ECDSA-CHACHA20-POLY1305");
    }
}
