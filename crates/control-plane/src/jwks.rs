//! Keys of token issuers: `jwksUri` of RequestAuthentications, or what OpenID discovery says, fetched again and again and
//! sent to proxies inside their listeners.
//!
//! As istiod, `pilot/pkg/model/jwks_resolver.go`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use istio_api::MeshConfig;
use push_context::{KeySource, Keys};
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::federation;
use crate::metrics::Metrics;
use crate::world::{Update, World};

/// Between two looks at a server (istiod's `PILOT_JWT_PUB_KEY_REFRESH_INTERVAL`).
const REFRESH: Duration = Duration::from_secs(20 * 60);
/// After a failure.
const RETRY: Duration = Duration::from_secs(5);
/// Real ones have some kilobytes.
const MAX_BODY: usize = 1 << 20;
/// A server that sends its clients on and on is not followed for ever.
const MAX_HOPS: usize = 5;
/// Where an issuer says where its keys are.
const DISCOVERY: &str = "/.well-known/openid-configuration";

/// What was fetched of one source.
struct Fetched {
    keys: Option<Arc<str>>,
    due: Instant,
}

/// Keeps the keys of all sources that rules name, until dropped.
pub(crate) async fn follow(world: World, metrics: Arc<Metrics>) {
    let mut revisions = world.revisions();
    let mut all: BTreeMap<KeySource, Fetched> = BTreeMap::new();
    loop {
        let state = world.current();
        let wanted = state.push.key_sources();
        all.retain(|source, _| wanted.contains(source));
        let mut fetches = JoinSet::new();
        for source in wanted {
            if all.get(&source).is_none_or(|own| own.due <= Instant::now()) {
                let mesh = state.mesh.clone();
                fetches.spawn(async move { (fetch(&source, &mesh).await, source) });
            }
        }
        while let Some(done) = fetches.join_next().await {
            let Ok((result, source)) = done else { continue };
            metrics.keys_fetched(result.is_ok());
            let own = match result {
                Ok(keys) => Fetched { keys: Some(keys.into()), due: Instant::now() + REFRESH },
                Err(error) => {
                    let keys = all.remove(&source).and_then(|own| own.keys);
                    let (uri, issuer, kept) = (&source.uri, &source.issuer, keys.is_some());
                    warn!(uri, issuer, kept, "the keys of an issuer cannot be had: {error:#}");
                    Fetched { keys, due: Instant::now() + RETRY }
                }
            };
            all.insert(source, own);
        }
        let keys: Keys = all.iter().filter_map(|(source, own)| Some((source.clone(), own.keys.clone()?))).collect();
        let known = |(source, keys): (&KeySource, &Arc<str>)| state.push.keys(source) == Some(keys);
        if !keys.iter().all(known) {
            debug!(sources = keys.len(), "keys of issuers have changed");
            world.update(vec![Update::Keys(keys)]).await;
        }
        let due = all.values().map(|own| own.due).min();
        tokio::select! {
            changed = revisions.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
        }
    }
}

/// The key set of a source, as its server sends it.
async fn fetch(source: &KeySource, mesh: &MeshConfig) -> anyhow::Result<String> {
    let limit = source.timeout.to_std().unwrap_or_default();
    let get = |uri: String| async move {
        let answer = tokio::time::timeout(limit, get(uri, mesh)).await;
        answer.with_context(|| format!("no answer within {limit:?}"))?
    };
    let uri = match source.uri.is_empty() {
        false => source.uri.clone(),
        true => {
            ensure!(!source.issuer.is_empty(), "neither jwksUri nor issuer says where they are");
            let found = get(format!("{}{DISCOVERY}", source.issuer.trim_end_matches('/'))).await?;
            let found: Value = serde_json::from_str(&found).context("the issuer's configuration")?;
            found["jwks_uri"].as_str().context("the issuer's configuration has no jwks_uri")?.to_owned()
        }
    };
    let text = get(uri).await?;
    // Whatever else the server has to say must not get into the proxies' configuration.
    let keys: Value = serde_json::from_str(&text).context("the key set is not JSON")?;
    ensure!(keys["keys"].is_array(), "the key set has no list of keys");
    Ok(text)
}

async fn get(mut uri: String, mesh: &MeshConfig) -> anyhow::Result<String> {
    for _ in 0..MAX_HOPS {
        let parsed: http::Uri = uri.parse().with_context(|| format!("{uri:?} is no URL"))?;
        let (status, location, body) = request(&parsed, mesh).await?;
        if !status.is_redirection() {
            ensure!(status.is_success(), "status {status}");
            return String::from_utf8(body.to_vec()).context("the answer is not UTF-8");
        }
        let location = location.with_context(|| format!("status {status} without a location"))?;
        uri = match location.strip_prefix('/') {
            Some(path) => {
                let authority = parsed.authority().map_or("", |authority| authority.as_str());
                format!("{}://{authority}/{path}", parsed.scheme_str().unwrap_or("http"))
            }
            None => location,
        };
    }
    bail!("more than {MAX_HOPS} redirections")
}

type Answer = (http::StatusCode, Option<String>, Bytes);

async fn request(uri: &http::Uri, mesh: &MeshConfig) -> anyhow::Result<Answer> {
    let host = uri.host().context("the URL names no host")?;
    let name = host.trim_matches(['[', ']']).to_owned();
    let secure = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        other => bail!("scheme {other:?}: only http and https can be fetched"),
    };
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let stream = tokio::net::TcpStream::connect((name.clone(), port)).await;
    let stream = stream.with_context(|| format!("cannot connect to {host}"))?;
    if !secure {
        return exchange(stream, uri).await;
    }
    let connector = tokio_rustls::TlsConnector::from(Arc::new(federation::client(mesh)?));
    let server = ServerName::try_from(name).context("the URL's host")?;
    exchange(connector.connect(server, stream).await?, uri).await
}

async fn exchange<S>(stream: S, uri: &http::Uri) -> anyhow::Result<Answer>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends when the sender is dropped, at the end of this function.
    tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let request = http::Request::get(path).header(http::header::HOST, authority).body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let location = answer.headers().get(http::header::LOCATION).and_then(|value| Some(value.to_str().ok()?.to_owned()));
    let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
    Ok((status, location, body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes()))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::world;

    /// Answers by path: discovery, a redirection, keys, and nonsense.
    async fn serve(listener: tokio::net::TcpListener) {
        let port = listener.local_addr().unwrap().port();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.unwrap();
            let request = String::from_utf8_lossy(&request[..length]).into_owned();
            let path = request.split(' ').nth(1).unwrap_or_default();
            let (status, header, body) = match path {
                "/.well-known/openid-configuration" => {
                    ("200 OK", String::new(), format!("{{\"jwks_uri\": \"http://127.0.0.1:{port}/moved\"}}"))
                }
                "/moved" => ("302 Found", "location: /keys\r\n".to_owned(), String::new()),
                "/keys" => ("200 OK", String::new(), "{\"keys\": []}".to_owned()),
                "/text" => ("200 OK", String::new(), "hello".to_owned()),
                _ => ("404 Not Found", String::new(), String::new()),
            };
            let answer = format!("HTTP/1.1 {status}\r\n{header}content-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    }

    async fn server() -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(serve(listener));
        base
    }

    fn source(uri: &str, issuer: &str) -> KeySource {
        KeySource { uri: uri.to_owned(), issuer: issuer.to_owned(), timeout: istio_api::Duration::from_secs(5) }
    }

    #[tokio::test]
    async fn keys_are_found_by_discovery_and_what_is_none_is_refused() {
        let (base, mesh) = (server().await, MeshConfig::builtin());
        assert_eq!(fetch(&source("", &format!("{base}/")), &mesh).await.unwrap(), "{\"keys\": []}");
        for (path, said) in [("/text", "the key set is not JSON"), ("/none", "status 404 Not Found")] {
            let error = fetch(&source(&format!("{base}{path}"), ""), &mesh).await.unwrap_err();
            assert_eq!(error.to_string(), said);
        }
        let error = fetch(&source("ftp://x/y", ""), &mesh).await.unwrap_err().to_string();
        assert!(error.contains("only http and https"), "{error}");
    }

    #[tokio::test]
    async fn rules_get_their_keys() {
        let uri = format!("{}/keys", server().await);
        let settings = push_context::Settings::default();
        let (world, writer) = world::new(MeshConfig::builtin(), "", settings, Arc::default());
        tokio::spawn(writer.run());
        tokio::spawn(follow(world.clone(), Arc::default()));
        let rule = format!(
            "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: r}}\n\
             spec: {{jwtRules: [{{issuer: i, jwksUri: '{uri}'}}]}}\n"
        );
        let mut documents = manifest::parse(std::path::Path::new("a.yaml"), &rule).unwrap();
        let mut revisions = world.revisions();
        world.update(vec![Update::Apply(Box::new(documents.remove(0)))]).await;
        let wanted = source(&uri, "i");
        while world.current().push.keys(&wanted).is_none() {
            revisions.changed().await.unwrap();
        }
        assert_eq!(&**world.current().push.keys(&wanted).unwrap(), "{\"keys\": []}");
    }
}
