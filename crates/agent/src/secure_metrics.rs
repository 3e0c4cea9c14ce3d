//! Metrics over mutual TLS, for scrapers with a certificate of the mesh: ENVOY_SECURE_METRICS_PORT (the proxy's) and
//! ENVOY_SECURE_MERGED_METRICS_PORT (agent, proxy and application together). Envoy has listeners of its own for them.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use http_body_util::Limited;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use identity::WorkloadCertificate;
use identity::tls::{ClientIdentity, server_config, spiffe_id};
use lifecycle::drain::Watch;
use lifecycle::http::{Handler, MAX_BODY};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use crate::status::{Port, Status};

/// Connections at a time; scrapers are few.
const MAX_CONNECTIONS: usize = 32;
/// For the handshake, and for the head of each request.
const TIMEOUT: Duration = Duration::from_secs(10);

type Certificate = watch::Receiver<Option<Arc<WorkloadCertificate>>>;

/// Serves `port`'s pages on `listener` until the drain starts, with the certificate of the moment.
pub(crate) async fn serve(
    listener: TcpListener,
    status: Arc<Status>,
    port: Port,
    certificate: Certificate,
    drain: Watch,
) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = drain.started() => return,
        };
        // Above the limit a scraper is turned away; it comes again.
        let (Ok((stream, _)), Ok(permit)) = (accepted, permits.clone().try_acquire_owned()) else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (certificate, pages, drain) = (certificate.clone(), status.pages(port, true), drain.clone());
        // Ends with its peer or the drain, whichever comes first.
        tokio::spawn(async move {
            tokio::select! {
                answered = answer(stream, &certificate, pages) => if let Err(error) = answered {
                    debug!(error = format!("{error:#}"), "a scraper's connection failed");
                },
                () = drain.started() => {}
            }
            drop(permit);
        });
    }
}

async fn answer(stream: TcpStream, certificate: &Certificate, pages: Arc<dyn Handler>) -> anyhow::Result<()> {
    let own = certificate.borrow().clone().context("there is no certificate yet")?;
    let id = own.chain.first().and_then(spiffe_id).context("the certificate has no identity")?;
    // DIFFERS: Envoy's listener takes workloads of federated trust domains, too.
    let clients = ClientIdentity::Required { trust_domains: vec![id.trust_domain().to_owned()] };
    let acceptor = TlsAcceptor::from(Arc::new(server_config(&own, clients, &[b"http/1.1"])?));
    let stream = tokio::time::timeout(TIMEOUT, acceptor.accept(stream)).await.context("no handshake")??;
    let service = service_fn(|request: http::Request<Incoming>| {
        let pages = pages.clone();
        async move { Ok::<_, Infallible>(pages.handle(request.map(|body| Limited::new(body, MAX_BODY))).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(TIMEOUT).max_buf_size(64 << 10);
    Ok(builder.serve_connection(TokioIo::new(stream), service).await?)
}
