use super::{Caller, forwarded, page, product_id, service_url};
use crate::server::{App, Reply, html, json, text};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use serde_json::{Value, json};
use std::time::Duration;

/// How long the page waits for another service. As in the original, where it is the planted bug
/// that the fault injection task finds.
const PATIENCE: Duration = Duration::from_secs(3);

/// The front end: one page from details and reviews, and a small JSON API over all three services.
pub(super) struct ProductPage {
    caller: Caller,
    details: String,
    reviews: String,
    ratings: String,
}

impl ProductPage {
    pub(super) fn from_env() -> ProductPage {
        ProductPage {
            caller: Caller::new(),
            details: service_url("details"),
            reviews: service_url("reviews"),
            ratings: service_url("ratings"),
        }
    }

    async fn details(&self, id: u64, headers: HeaderMap) -> (StatusCode, Value) {
        let (status, body) = self.caller.get(&format!("{}/{id}", self.details), headers, PATIENCE).await;
        if status.is_success() {
            return (status, body);
        }
        (status, json!({ "error": "Sorry, product details are currently unavailable for this book." }))
    }

    async fn reviews(&self, id: u64, headers: HeaderMap) -> (StatusCode, Value) {
        let url = format!("{}/{id}", self.reviews);
        let mut last = StatusCode::SERVICE_UNAVAILABLE;
        // Two tries, as in the original.
        for _ in 0..2 {
            let (status, body) = self.caller.get(&url, headers.clone(), PATIENCE).await;
            if status.is_success() {
                return (status, body);
            }
            last = status;
        }
        (last, json!({ "error": "Sorry, product reviews are currently unavailable for this book." }))
    }

    async fn api(&self, path: &str, headers: HeaderMap) -> Reply {
        let product = json!([{ "id": 0, "title": page::TITLE, "descriptionHtml": page::DESCRIPTION }]);
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (status, body) = match parts.as_slice() {
            [] | [""] => (StatusCode::OK, product),
            [id] => match product_id(id) {
                Some(id) => self.details(id, headers).await,
                None => return text(StatusCode::BAD_REQUEST, "please provide a numeric product id"),
            },
            [id, what @ ("reviews" | "ratings")] => match (product_id(id), *what) {
                (Some(id), "reviews") => self.reviews(id, headers).await,
                (Some(id), _) => {
                    let (status, body) = self.caller.get(&format!("{}/{id}", self.ratings), headers, PATIENCE).await;
                    if status.is_success() {
                        (status, body)
                    } else {
                        (status, json!({ "error": "Sorry, product ratings are currently unavailable for this book." }))
                    }
                }
                (None, _) => return text(StatusCode::BAD_REQUEST, "please provide a numeric product id"),
            },
            _ => return text(StatusCode::NOT_FOUND, "not found"),
        };
        json(status, &body)
    }
}

impl App for ProductPage {
    async fn answer(&self, request: Request<Bytes>) -> Reply {
        let user = user(request.headers());
        let mut headers = forwarded(request.headers());
        if let Some(user) = user.as_deref().and_then(|user| HeaderValue::from_str(user).ok()) {
            headers.insert("end-user", user);
        }
        match (request.method(), request.uri().path()) {
            (_, "/health") => text(StatusCode::OK, "Product page is healthy"),
            (&Method::GET, "/" | "/index.html") => html(page::index()),
            (&Method::GET, "/productpage") => {
                let ((_, details), (_, reviews)) =
                    tokio::join!(self.details(0, headers.clone()), self.reviews(0, headers));
                html(page::product(&details, &reviews, user.as_deref()))
            }
            (&Method::POST, "/login") => {
                let name = form_field(request.body(), "username").unwrap_or_default();
                let name: String = name.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
                back(&format!("session={name}; Path=/; HttpOnly; SameSite=Lax"))
            }
            (_, "/logout") => back("session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"),
            (&Method::GET, path) => match path.strip_prefix("/api/v1/products") {
                Some(rest) => self.api(rest, headers).await,
                None => text(StatusCode::NOT_FOUND, "not found"),
            },
            _ => text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed"),
        }
    }
}

/// The user that logged in, from the session cookie.
fn user(headers: &HeaderMap) -> Option<String> {
    let cookies = headers.get(header::COOKIE)?.to_str().ok()?;
    let name = cookies.split(';').find_map(|cookie| cookie.trim().strip_prefix("session="))?;
    (!name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric())).then(|| name.to_owned())
}

/// A field of an `application/x-www-form-urlencoded` body, where it needs no decoding.
fn form_field(body: &[u8], name: &str) -> Option<String> {
    let text = std::str::from_utf8(body).ok()?;
    let pair = text.split('&').find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name))?;
    Some(pair.1.to_owned())
}

/// Back to the product page, with a cookie.
fn back(cookie: &str) -> Reply {
    let mut reply = text(StatusCode::FOUND, "");
    reply.headers_mut().insert(header::LOCATION, HeaderValue::from_static("/productpage"));
    if let Ok(cookie) = HeaderValue::from_str(cookie) {
        reply.headers_mut().insert(header::SET_COOKIE, cookie);
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_names_are_plain() {
        let mut headers = HeaderMap::new();
        headers.insert(header::COOKIE, HeaderValue::from_static("a=b; session=jason"));
        assert_eq!(user(&headers).as_deref(), Some("jason"));
        headers.insert(header::COOKIE, HeaderValue::from_static("session=<b>"));
        assert_eq!(user(&headers), None);
        assert_eq!(form_field(b"username=jason&passwd=x", "username").as_deref(), Some("jason"));
    }

    #[tokio::test]
    async fn page_survives_without_its_services() {
        let page = ProductPage {
            caller: Caller::new(),
            details: "http://127.0.0.1:1/details".into(),
            reviews: "http://127.0.0.1:1/reviews".into(),
            ratings: "http://127.0.0.1:1/ratings".into(),
        };
        let reply = page.answer(Request::get("/productpage").body(Bytes::new()).unwrap()).await;
        assert_eq!(reply.status(), StatusCode::OK);
        let reply = page.answer(Request::get("/api/v1/products/0/reviews").body(Bytes::new()).unwrap()).await;
        assert_eq!(reply.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}
