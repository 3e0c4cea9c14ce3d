//! Root certificates of other meshes: `caCertificates` of the MeshConfig, as PEM or as SPIFFE bundles that are fetched
//! again and again. Workloads get them with their certificates, beside this mesh's own.
//!
//! As istiod, `pkg/spiffe`, `RetrieveSpiffeBundleRootCerts`, and `security/pkg/server/ca`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use ca::Authority;
use data_encoding::BASE64;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use istio_api::MeshConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::world::World;

/// How long a bundle's server may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Real ones have some kilobytes.
const MAX_BUNDLE: usize = 1 << 20;
/// Between two looks at a bundle: as it says, but within these; the last is for those that say nothing.
const REFRESH: (u64, u64, u64) = (60, 24 * 3600, 900);
/// After a failure.
const RETRY: Duration = Duration::from_secs(30);
/// Where systems have the roots that verify servers of the world.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// What was fetched of one place.
struct Bundle {
    roots: Vec<String>,
    due: Instant,
}

/// Keeps `authority` to what the MeshConfig says, until dropped.
pub(crate) async fn follow(world: World, authority: Arc<Authority>) {
    let mut revisions = world.revisions();
    let mut bundles: BTreeMap<String, Bundle> = BTreeMap::new();
    let mut given = Vec::new();
    loop {
        let mesh = world.current().mesh.clone();
        let urls: Vec<&str> = urls(&mesh).collect();
        bundles.retain(|url, _| urls.contains(&url.as_str()));
        give(&authority, &mesh, &bundles, &mut given);
        for url in urls {
            if bundles.get(url).is_some_and(|bundle| bundle.due > Instant::now()) {
                continue;
            }
            let bundle = match tokio::time::timeout(TIMEOUT, fetch(url, &mesh)).await {
                Ok(Ok((roots, refresh))) => Bundle { roots, due: Instant::now() + refresh },
                failed => {
                    let reason = match failed {
                        Ok(Err(error)) => format!("{error:#}"),
                        _ => format!("no answer within {TIMEOUT:?}"),
                    };
                    let roots = bundles.remove(url).map(|bundle| bundle.roots).unwrap_or_default();
                    warn!(url, reason, kept = roots.len(), "the SPIFFE bundle of another mesh cannot be had");
                    Bundle { roots, due: Instant::now() + RETRY }
                }
            };
            bundles.insert(url.to_owned(), bundle);
        }
        give(&authority, &mesh, &bundles, &mut given);
        let due = bundles.values().map(|bundle| bundle.due).min();
        tokio::select! {
            changed = revisions.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
        }
    }
}

fn urls(mesh: &MeshConfig) -> impl Iterator<Item = &str> {
    mesh.ca_certificates.iter().filter_map(|data| data.spiffe_bundle_url.as_deref())
}

/// Tells the authority, if that is news.
fn give(authority: &Authority, mesh: &MeshConfig, bundles: &BTreeMap<String, Bundle>, given: &mut Vec<String>) {
    let written = mesh.ca_certificates.iter().filter_map(|data| data.pem.clone());
    let mut roots = Vec::new();
    for pem in written.chain(bundles.values().flat_map(|bundle| bundle.roots.clone())) {
        match CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>() {
            Ok(certificates) if !certificates.is_empty() => roots.push(pem),
            _ => warn!("a PEM in caCertificates of the mesh configuration is no certificate; it is left out"),
        }
    }
    if roots != *given {
        info!(roots = roots.len(), "root certificates of other meshes are trusted");
        authority.trust_also(roots.clone());
        *given = roots;
    }
}

/// The roots in a bundle, as PEM, and when to look again.
async fn fetch(url: &str, mesh: &MeshConfig) -> anyhow::Result<(Vec<String>, Duration)> {
    let uri: http::Uri = url.parse().context("not a URL")?;
    ensure!(uri.scheme_str() == Some("https"), "only https proves whose bundle it is");
    let host = uri.host().context("the URL names no host")?;
    let name = host.trim_matches(['[', ']']).to_owned();
    let address = (name.clone(), uri.port_u16().unwrap_or(443));
    let stream = tokio::net::TcpStream::connect(address).await.with_context(|| format!("cannot connect to {host}"))?;
    let server = ServerName::try_from(name).context("the URL's host")?;
    let stream = tokio_rustls::TlsConnector::from(Arc::new(client(mesh)?)).connect(server, stream).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends when the sender is dropped, at the end of this function.
    tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = http::Request::get(path).header(http::header::HOST, host).body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    ensure!(answer.status().is_success(), "status {}", answer.status());
    let body = Limited::new(answer.into_body(), MAX_BUNDLE).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes();
    read(&body)
}

/// TLS to a bundle's server: by the system's roots, and those that the mesh configuration gives as PEM.
pub(crate) fn client(mesh: &MeshConfig) -> anyhow::Result<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    let file = std::env::var_os("SSL_CERT_FILE").map(std::path::PathBuf::from);
    let file = file.or_else(|| SYSTEM_ROOTS.map(std::path::PathBuf::from).into_iter().find(|path| path.exists()));
    let system = file.and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
    let written = mesh.ca_certificates.iter().filter_map(|data| data.pem.as_deref().map(str::as_bytes));
    for pem in std::iter::once(system.as_slice()).chain(written) {
        // What cannot be read verifies nobody.
        roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten());
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// A SPIFFE bundle (SPIFFE Trust Domain and Bundle, section 4): a JSON Web Key Set with certificates.
fn read(text: &[u8]) -> anyhow::Result<(Vec<String>, Duration)> {
    let bundle: Value = serde_json::from_slice(text).context("the bundle is not JSON")?;
    let Some(keys) = bundle["keys"].as_array() else { bail!("the bundle has no keys") };
    let mut roots = Vec::new();
    for key in keys.iter().filter(|key| key["use"] == "x509-svid") {
        let chain = key["x5c"].as_array().map(Vec::as_slice).unwrap_or_default();
        let [certificate] = chain else { bail!("a key of the bundle has {} certificates, not one", chain.len()) };
        let der =
            BASE64.decode(certificate.as_str().unwrap_or_default().as_bytes()).context("a certificate's Base64")?;
        x509_parser::parse_x509_certificate(&der).context("a certificate of the bundle")?;
        let text = BASE64.encode(&der);
        let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
        roots.push(format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n")));
    }
    ensure!(!roots.is_empty(), "the bundle has no certificate");
    let hint = bundle["spiffe_refresh_hint"].as_u64().unwrap_or(REFRESH.2);
    Ok((roots, Duration::from_secs(hint.clamp(REFRESH.0, REFRESH.1))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundles_are_read_and_what_is_wrong_is_said() {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        let x5c = BASE64.encode(certificate.der());
        let bundle = serde_json::json!({
            "spiffe_refresh_hint": 5,
            "keys": [{"use": "jwt-svid", "kid": "k"}, {"use": "x509-svid", "x5c": [x5c]}],
        });
        let (roots, refresh) = read(bundle.to_string().as_bytes()).unwrap();
        assert_eq!(refresh, Duration::from_secs(60), "not more often than is kind");
        let read_back = CertificateDer::from_pem_slice(roots[0].as_bytes()).unwrap();
        assert_eq!((roots.len(), &read_back), (1, certificate.der()));
        for (text, said) in [
            ("<html>", "the bundle is not JSON"),
            ("{}", "the bundle has no keys"),
            (r#"{"keys": []}"#, "the bundle has no certificate"),
            (r#"{"keys": [{"use": "x509-svid"}]}"#, "a key of the bundle has 0 certificates, not one"),
            (r#"{"keys": [{"use": "x509-svid", "x5c": ["AA=="]}]}"#, "a certificate of the bundle"),
        ] {
            assert_eq!(read(text.as_bytes()).unwrap_err().to_string(), said);
        }
    }
}
