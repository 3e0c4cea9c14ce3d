//! The four services of Istio's bookinfo sample: same paths, same JSON, same calls between them,
//! same behaviour under faults (the product page gives up on reviews after 3 seconds, twice).

mod details;
mod page;
mod product;
mod ratings;
mod reviews;

use crate::server::{self, At};
use bytes::Bytes;
use clap::ValueEnum;
use http::{HeaderMap, HeaderName, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde_json::Value;
use std::time::Duration;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    service: Service,
    /// Port to listen on, on all addresses.
    #[arg(long, default_value_t = 9080)]
    port: u16,
    /// Version of the service: reviews shows no stars (v1), black (v2) or red ones (v3).
    #[arg(long, default_value = "v1")]
    version: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Service {
    Productpage,
    Details,
    Reviews,
    Ratings,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    match args.service {
        Service::Productpage => server::serve(At::Port(args.port), product::ProductPage::from_env()).await,
        Service::Details => server::serve(At::Port(args.port), details::Details).await,
        Service::Reviews => server::serve(At::Port(args.port), reviews::Reviews::new(&args.version)).await,
        Service::Ratings => server::serve(At::Port(args.port), ratings::Ratings::default()).await,
    }
}

/// The last path segment as a product's number: `/reviews/0`.
fn product_id(path: &str) -> Option<u64> {
    path.rsplit('/').next()?.parse().ok()
}

/// Headers that every service passes on, so that traces join up and routes can match on the user.
/// Source: bookinfo's `getForwardHeaders`.
const FORWARDED: [&str; 18] = [
    "x-request-id",
    "x-ot-span-context",
    "x-datadog-trace-id",
    "x-datadog-parent-id",
    "x-datadog-sampling-priority",
    "traceparent",
    "tracestate",
    "x-cloud-trace-context",
    "grpc-trace-bin",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
    "sw8",
    "end-user",
    "user-agent",
    "authorization",
];

fn forwarded(from: &HeaderMap) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for name in FORWARDED {
        if let Some(value) = from.get(name) {
            headers.insert(HeaderName::from_static(name), value.clone());
        }
    }
    headers
}

/// The largest answer that a service takes from another, in bytes.
const ANSWER_LIMIT: usize = 1 << 20;

/// Calls another service by name, with kept-alive connections.
struct Caller {
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Caller {
    fn new() -> Caller {
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .pool_timer(TokioTimer::new())
            .build_http();
        Caller { client }
    }

    /// The status and JSON of a GET; status 503 with null where there is no answer within `timeout`.
    async fn get(&self, url: &str, headers: HeaderMap, timeout: Duration) -> (StatusCode, Value) {
        let call = async {
            let mut request = Request::get(url).body(Full::default()).ok()?;
            *request.headers_mut() = headers;
            let answer = self.client.request(request).await.ok()?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_LIMIT).collect().await.ok()?.to_bytes();
            Some((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
        };
        let answer = tokio::time::timeout(timeout, call).await.ok().flatten();
        answer.unwrap_or((StatusCode::SERVICE_UNAVAILABLE, Value::Null))
    }
}

/// Where a service is: `NAME` may be replaced by the variables that bookinfo's images read.
fn service_url(name: &str) -> String {
    let upper = name.to_uppercase();
    let host = std::env::var(format!("{upper}_HOSTNAME")).unwrap_or_else(|_| name.to_owned());
    // Kubernetes' service links set the _SERVICE_PORT variables; the images read them too.
    let port = std::env::var(format!("{upper}_SERVICE_PORT")).unwrap_or_else(|_| "9080".to_owned());
    match std::env::var("SERVICES_DOMAIN") {
        Ok(domain) if !domain.is_empty() => format!("http://{host}.{domain}:{port}/{name}"),
        _ => format!("http://{host}:{port}/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_headers_are_passed_on() {
        let mut from = HeaderMap::new();
        from.insert("end-user", "jason".parse().unwrap());
        from.insert("cookie", "session=jason".parse().unwrap());
        assert_eq!(forwarded(&from).len(), 1);
    }

    #[test]
    fn product_is_the_last_segment() {
        assert_eq!(product_id("/reviews/7"), Some(7));
        assert_eq!(product_id("/reviews/"), None);
    }
}
