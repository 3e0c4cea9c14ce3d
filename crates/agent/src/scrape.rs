//! Metrics of the application, merged behind those of the agent and the proxy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderMap, HeaderValue, Request};
use http_body_util::Full;
use serde::Deserialize;
use tracing::warn;

use crate::fetch::{self, FetchError, Target};

/// Source: istio `pilot/cmd/pilot-agent/status/server.go`, `defaultMaxAppMetricsBodyBytes`.
const MAX_BODY: usize = 10 << 20;
/// Without a timeout of Prometheus' own: its default.
const TIMEOUT: Duration = Duration::from_secs(10);
const TIMEOUT_HEADER: &str = "x-prometheus-scrape-timeout-seconds";

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=";

/// Source: istio `pilot/cmd/pilot-agent/status/server.go`, `istioReservedPorts`.
const RESERVED: [(u16, &str); 9] = [
    (15000, "Envoy admin"),
    (15001, "outbound traffic capture"),
    (15004, "pilot debug"),
    (15006, "inbound traffic capture"),
    (15008, "HBONE tunnel"),
    (15020, "pilot-agent status / merged Prometheus"),
    (15021, "Envoy health"),
    (15053, "DNS proxy"),
    (15090, "Envoy Prometheus (already merged)"),
];

/// ISTIO_PROMETHEUS_ANNOTATIONS: where the application's metrics are.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Scrape {
    targets: Vec<(u16, String)>,
}

/// ISTIO_PROMETHEUS_ANNOTATIONS that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadScrape {
    #[error("ISTIO_PROMETHEUS_ANNOTATIONS is not JSON")]
    Json(#[source] serde_json::Error),
    #[error("invalid prometheus scrape configuration: port {port:?} is not a port")]
    Port { port: String },
    #[error(
        "invalid prometheus scrape configuration: application port {port} is the agent's own, which would scrape itself for ever; is the pod injected twice?"
    )]
    Own { port: u16 },
    #[error("invalid prometheus scrape configuration: port {port} is reserved for Istio ({reason})")]
    Reserved { port: u16, reason: &'static str },
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Annotations {
    scrape: String,
    path: String,
    port: String,
    targets: Vec<Annotated>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Annotated {
    port: String,
    path: String,
}

impl Scrape {
    /// Reads the variable; `None` if the application is not to be scraped.
    pub fn parse(json: &str, status_port: u16) -> Result<Option<Scrape>, BadScrape> {
        let annotations: Annotations = serde_json::from_str(json).map_err(BadScrape::Json)?;
        if annotations.scrape == "false" {
            return Ok(None);
        }
        let single = annotations.targets.is_empty();
        let targets = if single {
            vec![Annotated { port: annotations.port, path: annotations.path }]
        } else {
            annotations.targets
        };
        let checked = targets.into_iter().map(|target| {
            let text = if target.port.is_empty() && single { "80".to_owned() } else { target.port };
            let port = text.parse::<u16>().ok().filter(|port| *port != 0).ok_or(BadScrape::Port { port: text })?;
            if port == status_port {
                return Err(BadScrape::Own { port });
            }
            // DIFFERS: istio checks reserved ports only in the list form; scraping the proxy twice helps nobody.
            if let Some((_, reason)) = RESERVED.iter().find(|(reserved, _)| *reserved == port) {
                return Err(BadScrape::Reserved { port, reason });
            }
            let path = if target.path.is_empty() { "/metrics".to_owned() } else { target.path };
            Ok((port, if path.starts_with('/') { path } else { format!("/{path}") }))
        });
        Ok(Some(Scrape { targets: checked.collect::<Result<_, _>>()? }))
    }

    /// Asks all targets; gives the merged text, its media type, and how many failed.
    pub async fn fetch(&self, headers: &HeaderMap) -> (Bytes, String, u64) {
        let answers = futures_in_order(self.targets.iter().map(|(port, path)| one(*port, path, headers))).await;
        let failed = answers.iter().filter(|answer| answer.is_none()).count() as u64;
        let answers: Vec<fetch::Answer> = answers.into_iter().flatten().collect();
        let media_type = media_type(&answers);
        let open = media_type.starts_with("application/openmetrics");
        let mut merged = BytesMut::new();
        for answer in &answers {
            // One terminator at the very end, or none.
            let body = without_eof(&answer.body);
            merged.extend_from_slice(body);
            if !body.is_empty() && !body.ends_with(b"\n") {
                merged.extend_from_slice(b"\n");
            }
        }
        if open {
            merged.extend_from_slice(b"# EOF\n");
        }
        (merged.freeze(), media_type, failed)
    }
}

/// Runs futures at once and keeps their order; there are a handful at most.
async fn futures_in_order<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    futures::future::join_all(futures).await
}

async fn one(port: u16, path: &str, headers: &HeaderMap) -> Option<fetch::Answer> {
    let mut request = match Request::get(path).header(HOST, format!("localhost:{port}")).body(Full::new(Bytes::new())) {
        Ok(request) => request,
        Err(error) => {
            warn!(port, path, %error, "the application's metrics cannot be asked for");
            return None;
        }
    };
    let accept = accepted(headers.get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default());
    if let Ok(accept) = HeaderValue::try_from(accept) {
        request.headers_mut().insert(ACCEPT, accept);
    }
    for name in [USER_AGENT, http::HeaderName::from_static(TIMEOUT_HEADER)] {
        if let Some(value) = headers.get(&name) {
            request.headers_mut().insert(name, value.clone());
        }
    }
    let timeout = headers.get(TIMEOUT_HEADER).and_then(|t| t.to_str().ok()).and_then(|t| t.parse::<f64>().ok());
    let timeout = timeout.and_then(|t| Duration::try_from_secs_f64(t).ok()).unwrap_or(TIMEOUT);
    // As `localhost`: an application may listen on one family only.
    let target = |address: IpAddr| Target { address: SocketAddr::new(address, port), from: None, tls: false };
    let first = fetch::fetch(target(Ipv4Addr::LOCALHOST.into()), request.clone(), timeout, MAX_BODY).await;
    let answer = match first {
        Err(FetchError::Connect { .. }) => {
            match fetch::fetch(target(Ipv6Addr::LOCALHOST.into()), request, timeout, MAX_BODY).await {
                // There, too: then the first says more.
                Err(FetchError::Connect { .. }) => first,
                second => second,
            }
        }
        first => first,
    };
    let reason = match answer {
        Ok(answer) if answer.status == 200 && !answer.cut => return Some(answer),
        Ok(answer) if answer.cut => format!("more than {MAX_BODY} bytes"),
        Ok(answer) => format!("status {}", answer.status),
        Err(error) => error.to_string(),
    };
    warn!(port, path, %reason, "the application's metrics cannot be had");
    None
}

/// What of an Accept header goes on to the application: the formats that can be merged by appending, in the
/// scraper's order, with its parameters. Source: `allowedContentTypes` in status/server.go.
fn accepted(accept: &str) -> String {
    const TEXT_004: (&str, &str) = ("text/plain", "; version=0.0.4");
    let mut formats: Vec<(String, String)> = Vec::new();
    for entry in accept.split(',') {
        let (media, parameters) = entry.split_once(';').unwrap_or((entry, ""));
        let (media, parameters) = match media.trim().to_ascii_lowercase().as_str() {
            "*" | "*/*" => (TEXT_004.0.to_owned(), TEXT_004.1.to_owned()),
            "application/*" => ("application/openmetrics-text".to_owned(), "; version=0.0.1".to_owned()),
            media @ ("text/*" | "text/plain" | "application/openmetrics-text") => {
                let kept = parameters.split(';').map(str::trim).filter(|parameter| {
                    let name = parameter.split('=').next().unwrap_or_default().trim();
                    !name.is_empty() && !name.eq_ignore_ascii_case("q")
                });
                (media.to_owned(), kept.map(|parameter| format!("; {parameter}")).collect())
            }
            _ => continue,
        };
        if !formats.contains(&(media.clone(), parameters.clone())) {
            formats.push((media, parameters));
        }
    }
    if formats.is_empty() {
        return "text/plain;version=0.0.4".to_owned();
    }
    let count = formats.len();
    let weighted = formats.into_iter().enumerate().map(|(at, (media, parameters))| {
        // Nine steps of a decimal are enough for what scrapers write.
        format!("{media}{parameters}; q=0.{}", (count - at).min(9))
    });
    weighted.collect::<Vec<_>>().join(",")
}

/// OpenMetrics if all say so, else text. Source: `negotiateMetricsFormat` in status/server.go.
fn media_type(answers: &[fetch::Answer]) -> String {
    let version = |answer: &fetch::Answer| {
        let media = answer.headers.get(CONTENT_TYPE)?.to_str().ok()?;
        let (kind, parameters) = media.split_once(';').unwrap_or((media, ""));
        if kind.trim() != "application/openmetrics-text" {
            return None;
        }
        Some(if parameters.contains("version=1.0.0") { "1.0.0" } else { "0.0.1" })
    };
    let first = answers.first().and_then(version);
    match first {
        Some(first) if answers.iter().all(|answer| version(answer) == Some(first)) => {
            format!("{OPEN_METRICS}{first}; charset=utf-8")
        }
        _ => TEXT.to_owned(),
    }
}

fn without_eof(body: &[u8]) -> &[u8] {
    let trimmed = body.trim_ascii_end();
    trimmed.strip_suffix(b"# EOF").unwrap_or(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(media: &'static str, body: &'static str) -> fetch::Answer {
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(media))]);
        fetch::Answer { status: 200, headers, body: Bytes::from_static(body.as_bytes()), cut: false }
    }

    #[test]
    fn annotations_are_read_as_istio_does() {
        let parse = |json| Scrape::parse(json, 15020);
        assert_eq!(
            parse("{\"scrape\":\"true\",\"port\":\"9080\"}").unwrap().unwrap().targets,
            [(9080, "/metrics".to_owned())]
        );
        assert_eq!(parse("{\"scrape\":\"true\"}").unwrap().unwrap().targets, [(80, "/metrics".to_owned())]);
        assert_eq!(parse("{\"scrape\":\"false\"}").unwrap(), None);
        assert_eq!(
            parse("{\"targets\":[{\"port\":\"1\"},{\"port\":\"2\",\"path\":\"m\"}]}").unwrap().unwrap().targets,
            [(1, "/metrics".to_owned()), (2, "/m".to_owned())]
        );
        for (json, text) in [
            ("{\"port\":\"15020\"}", "own"),
            ("{\"port\":\"015020\"}", "own"),
            ("{\"port\":\"15090\"}", "already merged"),
            ("{\"port\":\"x\"}", "not a port"),
            ("{", "not JSON"),
        ] {
            let error = parse(json).unwrap_err().to_string();
            assert!(error.contains(text), "{json}: {error}");
        }
    }

    #[test]
    fn what_the_scraper_accepts_goes_on() {
        for (accept, want) in [
            ("", "text/plain;version=0.0.4"),
            ("application/json", "text/plain;version=0.0.4"),
            ("*/*", "text/plain; version=0.0.4; q=0.1"),
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/vnd.google.protobuf;q=0.9,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
                "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8; q=0.2,text/plain; version=0.0.4; q=0.1",
            ),
            ("text/*, application/*", "text/*; q=0.2,application/openmetrics-text; version=0.0.1; q=0.1"),
        ] {
            assert_eq!(accepted(accept), want, "{accept}");
        }
    }

    #[tokio::test]
    async fn applications_on_one_family_only_are_found() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = tokio::net::TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let application = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 1024]).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 x\r\ncontent-length: 4\r\n\r\na 1\n").await.unwrap();
            });
            let scrape = Scrape::parse(&format!("{{\"port\":\"{port}\"}}"), 15020).unwrap().unwrap();
            let (body, _, failed) = scrape.fetch(&HeaderMap::new()).await;
            assert_eq!((body.as_ref(), failed), (b"a 1\n".as_slice(), 0), "{address}");
            application.await.unwrap();
        }
    }

    #[test]
    fn formats_are_merged_only_when_equal() {
        let open = answer("application/openmetrics-text; version=1.0.0; charset=utf-8", "a 1\n# EOF\n");
        let text = answer("text/plain", "b 1");
        assert_eq!(
            media_type(std::slice::from_ref(&open)),
            "application/openmetrics-text; version=1.0.0; charset=utf-8"
        );
        assert_eq!(media_type(&[open.clone(), text]), TEXT);
        assert_eq!(media_type(&[]), TEXT);
        assert_eq!(without_eof(&open.body), b"a 1\n");
        assert_eq!(without_eof(b"# EOFs 1\n"), b"# EOFs 1\n");
    }
}
