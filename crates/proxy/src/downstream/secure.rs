//! The TLS handshake of a connection.

use crate::io::{Io, Raw};
use crate::runtime::ChainEntry;
use crate::socket;
use crate::stats::ListenerStats;
use crate::tls::{self, Failure, TlsError};
use crate::worker::Worker;
use mesh_types::ArcStr;
use proxy_core::TlsInfo;
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// The TLS handshake, when the chain has one. An error was counted; it is what logs say.
pub(super) async fn secure(
    worker: &Rc<Worker>,
    chain: &ChainEntry,
    stats: &ListenerStats,
    raw: Raw,
) -> Result<(Io, Option<TlsInfo>), Insecure> {
    let Some(tls) = &chain.tls else { return Ok((Io::Raw(raw), None)) };
    let handshake = async {
        match refusal(&raw).await {
            None => tls.accept(raw, &worker.shared.secrets).await.map_err(Unsecured::Failed),
            Some(refusal) => {
                refusal.tell(&raw);
                Err(Unsecured::Refused(refusal))
            }
        }
    };
    let result = match chain.chain.transport_socket_connect_timeout {
        Some(timeout) => match tokio::time::timeout(timeout, handshake).await {
            Ok(result) => result,
            Err(_) => {
                stats.downstream_cx_transport_socket_connect_timeout.inc();
                return Err(Insecure::without("connect_timeout"));
            }
        },
        None => handshake.await,
    };
    match result {
        Ok((stream, info, refused)) => {
            stats.ssl_handshake.inc();
            if let Some(refused) = refused {
                count_failure(stats, refused.failure);
            }
            if tls::count(stream.get_ref().1, &info, &stats.other) {
                stats.ssl_session_reused.inc();
            }
            if info.peer.is_none() {
                stats.ssl_no_certificate.inc();
            }
            Ok((Io::Server(stream), Some(info)))
        }
        Err(Unsecured::Refused(refusal)) => {
            if refusal.reason.is_empty() {
                return Err(Insecure::without(""));
            }
            stats.ssl_connection_error.inc();
            Err(Insecure { reason: tls_error(refusal.reason), tls: None })
        }
        Err(Unsecured::Failed(failed)) if TlsError::is_missing_secret(&failed.error) => {
            stats.other.inc("server_ssl_socket_factory.downstream_context_secrets_not_ready");
            Err(Insecure::without("TLS_error:_Secret_is_not_supplied_by_SDS"))
        }
        Err(Unsecured::Failed(failed)) => {
            let kind = failed.error.kind();
            // Who hangs up without a word makes no error.
            if failed.failure() != Failure::Other || kind != io::ErrorKind::UnexpectedEof {
                count_failure(stats, failed.failure());
            }
            tracing::debug!(error = %failed.error, "downstream TLS handshake failed");
            let reason = match (failed.words(), failed.failure()) {
                (Some(words), _) => tls_error(&words.replace(' ', "_")),
                (None, Failure::NoCertificate) => tls_error(
                    "268435648:SSL_routines:OPENSSL_internal:PEER_DID_NOT_RETURN_A_CERTIFICATE:peer_did_not_provide_required_client_certificate",
                ),
                // The peer hanging up without a reason has none in Envoy either.
                _ if matches!(kind, io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => "".into(),
                _ => tls_error(&tls::in_boring_words(&failed.error)),
            };
            Err(Insecure { reason, tls: failed.tls })
        }
    }
}

fn count_failure(stats: &ListenerStats, failure: Failure) {
    match failure {
        Failure::San => stats.ssl_fail_verify_san.inc(),
        Failure::Hash => stats.ssl_fail_verify_cert_hash.inc(),
        Failure::Chain => stats.ssl_fail_verify_error.inc(),
        Failure::NoCertificate => stats.ssl_fail_verify_no_cert.inc(),
        Failure::Other => stats.ssl_connection_error.inc(),
    }
}

/// A failed handshake in logs. The codes are BoringSSL's, because people search for them.
fn tls_error(what: &str) -> ArcStr {
    format!("TLS_error:|{what}:TLS_error_end").into()
}

/// A connection that is not secure.
pub(super) struct Insecure {
    /// For logs; may be empty.
    pub(super) reason: ArcStr,
    /// What was known of it by then.
    pub(super) tls: Option<Box<TlsInfo>>,
}

impl Insecure {
    fn without(reason: &str) -> Self {
        Self { reason: reason.into(), tls: None }
    }
}

/// Why a connection is not secure.
enum Unsecured {
    /// It does not begin with TLS.
    Refused(Refusal),
    /// The handshake failed.
    Failed(tls::Failed),
}

/// Why a connection is not shaken hands on, in BoringSSL's words, and the alert that says so.
#[derive(Clone, Copy, Debug)]
struct Refusal {
    /// Empty: the client left.
    reason: &'static str,
    alert: Option<u8>,
}

impl Refusal {
    /// Sends the alert. What the client has sent is taken: what is not read when a connection ends takes along what was
    /// written last.
    fn tell(self, raw: &Raw) {
        let (Raw::Tcp(stream), Some(alert)) = (raw, self.alert) else { return };
        let mut bytes = [0; 1024];
        while stream.try_read(&mut bytes).is_ok_and(|n| n > 0) {}
        // A fatal alert in a record of TLS 1.0, as no version was agreed on. Nobody can do anything for a client that is gone.
        let _ = stream.try_write(&[21, 3, 1, 0, 2, 2, alert]);
    }
}

/// Looks at the first bytes, which are waited for, as BoringSSL does (`tls_open_handshake`, `tls_open_record`): `None` when
/// they start a record, or when the end before them is the handshake's problem.
async fn refusal(raw: &Raw) -> Option<Refusal> {
    const PROTOCOL_VERSION: u8 = 70;
    const UNEXPECTED_MESSAGE: u8 = 10;
    let Raw::Tcp(stream) = raw else { return None };
    let mut seen = [0; 5];
    loop {
        match stream.peek(&mut seen).await {
            Ok(5) => break,
            Ok(n) if n > 0 && socket::peer_is_done(stream) => return Some(Refusal { reason: "", alert: None }),
            // A peek leaves the bytes, so the socket stays readable.
            Ok(n) if n > 0 => tokio::time::sleep(HEADER_AGAIN).await,
            _ => return None,
        }
    }
    let (reason, alert) = match &seen {
        [b'G', b'E', b'T', b' ', _] | [b'P', b'U', b'T', b' ', _] | b"POST " | b"HEAD " => {
            ("268435612:SSL_routines:OPENSSL_internal:HTTP_REQUEST", None)
        }
        b"CONNE" => ("268435611:SSL_routines:OPENSSL_internal:HTTPS_PROXY_REQUEST", None),
        // Handshakes and alerts.
        [21 | 22, 3, ..] => return None,
        [_, 3, ..] => ("268435681:SSL_routines:OPENSSL_internal:UNEXPECTED_RECORD", Some(UNEXPECTED_MESSAGE)),
        _ => ("268435703:SSL_routines:OPENSSL_internal:WRONG_VERSION_NUMBER", Some(PROTOCOL_VERSION)),
    };
    Some(Refusal { reason, alert })
}

/// A header of a record that comes in pieces is looked at again after this.
const HEADER_AGAIN: Duration = Duration::from_millis(10);
