use super::product_id;
use crate::server::{App, Reply, json};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The most products whose ratings are kept; further ones are refused.
const MOST_PRODUCTS: usize = 10_000;

/// Stars by reviewer. Lives in memory, as the original's default.
#[derive(Default)]
pub(super) struct Ratings {
    /// Ratings that were posted, by product. Held for a lookup only.
    posted: Mutex<BTreeMap<u64, Map<String, Value>>>,
}

impl App for Ratings {
    async fn answer(&self, request: Request<Bytes>) -> Reply {
        let path = request.uri().path();
        if path == "/health" {
            return json(StatusCode::OK, &json!({ "status": "Ratings is healthy" }));
        }
        if !path.starts_with("/ratings/") {
            return json(StatusCode::NOT_FOUND, &json!({ "error": "not found" }));
        }
        let Some(id) = product_id(path) else {
            return json(StatusCode::BAD_REQUEST, &json!({ "error": "please provide numeric product ID" }));
        };
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        if request.method() == Method::POST {
            let Ok(Value::Object(ratings)) = serde_json::from_slice(request.body()) else {
                return json(StatusCode::BAD_REQUEST, &json!({ "error": "please provide valid ratings JSON" }));
            };
            if posted.len() >= MOST_PRODUCTS && !posted.contains_key(&id) {
                return json(StatusCode::INSUFFICIENT_STORAGE, &json!({ "error": "too many products" }));
            }
            posted.insert(id, ratings);
        }
        let ratings = match posted.get(&id) {
            Some(ratings) => Value::Object(ratings.clone()),
            None => json!({ "Reviewer1": 5, "Reviewer2": 4 }),
        };
        json(StatusCode::OK, &json!({ "id": id, "ratings": ratings }))
    }
}
