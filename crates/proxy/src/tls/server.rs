//! Downstream TLS contexts.

use super::certificate::add_issuer;
use super::verify::{ClientVerifier, Failed, Refused, dns_match, heard};
use super::{Current, SecretStore, TlsError, info, ocsp, peer_certificate, provider_for, sessions, versions};
use crate::io::Raw;
use mesh_types::ArcStr;
use proxy_core::TlsInfo;
use proxy_core::stream_info::PeerCertificate;
use proxy_core::tls::{DownstreamTls, TlsVersion, Validation};
use rustls::ServerConfig;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use std::io;
use std::sync::Arc;
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};

/// A chain's TLS, compiled when needed.
pub(crate) struct ServerTls {
    context: Arc<DownstreamTls>,
    /// The chain has Istio's `metadata_exchange` filter in front of a TCP proxy.
    exchanges: bool,
    current: Current<Compiled>,
}

struct Compiled {
    /// With the context's ALPN protocols.
    with_alpn: Arc<ServerConfig>,
    /// Without: a client that shares none is served without ALPN, as BoringSSL does, instead of refused.
    without_alpn: Arc<ServerConfig>,
    certificates: Arc<Certificates>,
    /// Of whoever issues clients' certificates; none if they are not validated.
    roots: Vec<CertificateDer<'static>>,
    /// Says whether a certificate is good that is accepted in any case.
    afterwards: Option<Arc<ClientVerifier>>,
}

#[derive(Debug)]
struct Certificates(Vec<(Arc<CertifiedKey>, Option<PeerCertificate>)>);

impl Certificates {
    /// By SNI among the DNS names; else the first.
    fn pick(&self, server_name: Option<&str>) -> Option<&(Arc<CertifiedKey>, Option<PeerCertificate>)> {
        let matches = |c: &&(Arc<CertifiedKey>, Option<PeerCertificate>), name: &str| {
            c.1.as_ref().is_some_and(|p| p.dns_sans.iter().any(|san| dns_match(san, name)))
        };
        server_name.and_then(|name| self.0.iter().find(|c| matches(c, name))).or_else(|| self.0.first())
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.pick(hello.server_name()).map(|c| ocsp::as_of_now(&c.0))
    }
}

/// Whether a suite is one of TLS 1.3 (RFC 8446, B.4).
fn is_of_13(suite: rustls::CipherSuite) -> bool {
    u16::from(suite) >> 8 == 0x13
}

/// Sessions kept per context for resumption; each takes about a kilobyte.
const SESSIONS: usize = 128;

impl ServerTls {
    pub(crate) fn new(context: Arc<DownstreamTls>, exchanges: bool) -> Self {
        Self { context, exchanges, current: Current::default() }
    }

    fn compile(&self, secrets: &SecretStore) -> Result<Compiled, TlsError> {
        let common = &self.context.common;
        let keys = secrets.certificates(common)?;
        if keys.is_empty() {
            return Err(TlsError::NoCertificate);
        }
        if let Some(staples) = common.staples {
            ocsp::check(staples, &keys)?;
        }
        let certificates = Arc::new(Certificates(
            keys.into_iter()
                .map(|k| {
                    let p = peer_certificate(&k.cert);
                    (k, p)
                })
                .collect(),
        ));
        let (validation, roots) = secrets.validation(common)?;
        // To require a certificate without a word about which is nothing to Envoy: it does not even ask for one.
        let asks = !roots.is_empty() || !validation.hashes.is_empty() || !validation.spkis.is_empty();
        let builder =
            ServerConfig::builder_with_provider(provider_for(common)?).with_protocol_versions(versions(common))?;
        let validates = !roots.is_empty();
        // Who says which certificates it takes does not do without one (Envoy `DefaultCertValidator::initializeSslContexts`).
        let picky = !validation.san.is_empty() || !validation.hashes.is_empty() || !validation.spkis.is_empty();
        let required = self.context.require_client_certificate || (picky && !validation.accept_untrusted);
        let checks = format!("{validation:?}");
        let afterwards = match validates && validation.accept_untrusted {
            true => {
                let strict = Validation { accept_untrusted: false, ..validation.clone() };
                Some(ClientVerifier::new(strict, &roots, required)?)
            }
            false => None,
        };
        let builder = if asks {
            builder.with_client_cert_verifier(ClientVerifier::new(validation, &roots, required)?)
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_cert_resolver(certificates.clone());
        // Sessions are kept here even where BoringSSL would put them into tickets, unless keeping them is forbidden.
        match (self.context.session_tickets, self.context.stateful_resumption) {
            (tickets, true) => {
                config.session_storage = sessions::storage(SESSIONS, self.context.session_timeout);
                config.send_tls13_tickets = usize::from(tickets);
            }
            (true, false) => {
                config.session_storage = Arc::new(NoServerSessionStorage {});
                config.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new()?;
                config.send_tls13_tickets = 1;
            }
            (false, false) => {
                config.session_storage = Arc::new(NoServerSessionStorage {});
                config.send_tls13_tickets = 0;
            }
        }
        if !self.context.ticket_keys.is_empty() {
            // A session of a client that was checked in another way, or was told other names, is not resumed here
            // (Envoy `ContextImpl::generateHashForSessionContextId`).
            let names = certificates.0.iter().filter_map(|(_, names)| names.as_ref());
            let names: Vec<_> = names.map(|names| (&names.subject, &names.dns_sans, &names.uri_sans)).collect();
            let context = format!("{names:?} {required} {checks} {roots:?}");
            let keys = self.context.ticket_keys.iter().map(super::secrets::read).collect::<Result<Vec<_>, _>>()?;
            config.ticketer = sessions::Tickets::new(&keys, context.as_bytes(), self.context.session_timeout)?;
            config.send_tls13_tickets = 1;
        }
        // Of the suites of TLS 1.2 the server's favourite is taken, as in BoringSSL.
        config.ignore_client_order = versions(common).iter().all(|v| v.version == rustls::ProtocolVersion::TLSv1_2);
        let without_alpn = Arc::new(config.clone());
        config.alpn_protocols = if self.exchanges { common.alpn.clone() } else { super::spoken(&common.alpn) };
        Ok(Compiled { with_alpn: Arc::new(config), without_alpn, certificates, roots, afterwards })
    }

    /// Shakes hands.
    pub(crate) async fn accept(
        &self,
        raw: Raw,
        secrets: &SecretStore,
    ) -> Result<(Box<TlsStream<Raw>>, TlsInfo, Option<Refused>), Failed> {
        let failed = |error| Failed::new(error, None);
        let compiled = self.current.get(secrets, || self.compile(secrets)).map_err(|e| failed(io::Error::other(e)))?;
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), raw).await.map_err(failed)?;
        let mut known = TlsInfo::default();
        let config = {
            let hello = start.client_hello();
            let offers_13 = hello.cipher_suites().iter().any(|suite| is_of_13(*suite));
            let newest = self.context.common.max_version;
            known.version = if offers_13 && newest == TlsVersion::V13 { "TLSv1.3" } else { "TLSv1.2" }.into();
            known.server_name = hello.server_name().map(ArcStr::from);
            let ours = &compiled.with_alpn.alpn_protocols;
            let shared = hello.alpn().is_none_or(|mut theirs| theirs.any(|p| ours.iter().any(|o| o == p)));
            let config = if shared { &compiled.with_alpn } else { &compiled.without_alpn };
            if config.ignore_client_order || offers_13 {
                config.clone()
            } else {
                let mut config = (**config).clone();
                config.ignore_client_order = true;
                Arc::new(config)
            }
        };
        let (stream, refused) = heard(None, Box::pin(start.into_stream(config))).await;
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                return Err(Failed::new(error, refused).with(known));
            }
        };
        let (_, session) = stream.get_ref();
        let name = session.server_name().map(str::to_owned);
        let local = compiled.certificates.pick(name.as_deref()).and_then(|c| c.1.as_ref());
        let validated = match (&compiled.afterwards, session.peer_certificates().and_then(<[_]>::split_first)) {
            (Some(verifier), Some((own, others))) => verifier.is_good(own, others),
            _ => !compiled.roots.is_empty(),
        };
        let mut info = info(session, name.as_deref(), local, validated);
        if let (Some(peer), Some(chain)) = (&mut info.peer, session.peer_certificates()) {
            match validated {
                true => add_issuer(peer, chain, &compiled.roots),
                false => (peer.issuer_sha256, peer.issuer_serial) = ("".into(), "".into()),
            }
        }
        Ok((Box::new(stream), info, refused))
    }
}
