use crate::server::{self, App, At, Reply, json, text};
use bytes::Bytes;
use http::{Request, StatusCode};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// The longest delay that `/delay/SECONDS` grants, as httpbin's.
const LONGEST_DELAY: f64 = 10.0;

/// The most that `/bytes/N` sends, as httpbin's.
const MOST_BYTES: usize = 100 * 1024;

struct Echo;

pub(crate) async fn run(at: At) -> anyhow::Result<()> {
    server::serve(at, Echo).await
}

impl App for Echo {
    async fn answer(&self, request: Request<Bytes>) -> Reply {
        let path = request.uri().path().to_owned();
        let mut parts = path.trim_matches('/').split('/');
        match (parts.next().unwrap_or_default(), parts.next()) {
            ("status", Some(code)) => match code.parse().ok().and_then(|code: u16| StatusCode::from_u16(code).ok()) {
                Some(status) => text(status, ""),
                None => text(StatusCode::BAD_REQUEST, "Invalid status code"),
            },
            ("delay", Some(seconds)) => match seconds.parse::<f64>() {
                Ok(seconds) if seconds >= 0.0 => {
                    tokio::time::sleep(Duration::from_secs_f64(seconds.min(LONGEST_DELAY))).await;
                    echo(&request)
                }
                _ => text(StatusCode::BAD_REQUEST, "Invalid delay"),
            },
            ("bytes", Some(count)) => match count.parse::<usize>() {
                Ok(count) => text(StatusCode::OK, &"x".repeat(count.min(MOST_BYTES))),
                Err(_) => text(StatusCode::BAD_REQUEST, "Invalid number"),
            },
            ("headers", None) => json(StatusCode::OK, &json!({ "headers": headers(&request) })),
            ("user-agent", None) => json(StatusCode::OK, &json!({ "user-agent": header(&request, "user-agent") })),
            ("health" | "healthz", None) => text(StatusCode::OK, "ok"),
            ("" | "get" | "post" | "put" | "patch" | "delete" | "anything" | "ip", _) => echo(&request),
            _ => text(StatusCode::NOT_FOUND, "not found"),
        }
    }
}

fn echo(request: &Request<Bytes>) -> Reply {
    let body = String::from_utf8_lossy(request.body());
    let parsed: Value = serde_json::from_slice(request.body()).unwrap_or(Value::Null);
    json(
        StatusCode::OK,
        &json!({
            "method": request.method().as_str(),
            "url": format!("http://{}{}", header(request, "host"), request.uri()),
            "origin": header(request, "x-forwarded-for"),
            "headers": headers(request),
            "data": body,
            "json": parsed,
            "pod": std::env::var("HOSTNAME").unwrap_or_default(),
        }),
    )
}

fn header(request: &Request<Bytes>, name: &str) -> String {
    request.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).unwrap_or_default()
}

/// Header values by canonical name (`X-Request-Id`), several of one name joined by a comma.
fn headers(request: &Request<Bytes>) -> Value {
    let mut all = Map::new();
    for name in request.headers().keys() {
        let values: Vec<_> =
            request.headers().get_all(name).iter().map(|v| String::from_utf8_lossy(v.as_bytes())).collect();
        let canonical = name.as_str().split('-').map(capitalize).collect::<Vec<_>>().join("-");
        all.insert(canonical, values.join(",").into());
    }
    all.into()
}

fn capitalize(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map(|first| first.to_ascii_uppercase().to_string() + chars.as_str()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    async fn get(path: &str) -> (u16, Value) {
        let request = Request::get(path).header("x-one", "1").body(Bytes::new()).unwrap();
        let reply = Echo.answer(request).await;
        let status = reply.status().as_u16();
        let body = reply.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    #[tokio::test(start_paused = true)]
    async fn answers_as_httpbin() {
        assert_eq!(get("/status/418").await.0, 418);
        assert_eq!(get("/status/x").await.0, 400);
        assert_eq!(get("/headers").await.1["headers"]["X-One"], "1");
        assert_eq!(get("/delay/3").await.0, 200);
        assert_eq!(get("/nothing").await.0, 404);
    }
}
