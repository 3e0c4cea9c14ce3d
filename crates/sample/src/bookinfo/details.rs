use super::product_id;
use crate::server::{App, Reply, json};
use bytes::Bytes;
use http::{Request, StatusCode};
use serde_json::json;

/// Facts about a book.
pub(super) struct Details;

impl App for Details {
    async fn answer(&self, request: Request<Bytes>) -> Reply {
        let path = request.uri().path();
        if path == "/health" {
            return json(StatusCode::OK, &json!({ "status": "Details is healthy" }));
        }
        if !path.starts_with("/details/") {
            return json(StatusCode::NOT_FOUND, &json!({ "error": "not found" }));
        }
        let Some(id) = product_id(path) else {
            return json(StatusCode::BAD_REQUEST, &json!({ "error": "please provide numeric product id" }));
        };
        json(
            StatusCode::OK,
            &json!({
                "id": id,
                "author": "William Shakespeare",
                "year": 1595,
                "type": "paperback",
                "pages": 200,
                "publisher": "PublisherA",
                "language": "English",
                "ISBN-10": "1234567890",
                "ISBN-13": "123-1234567890",
            }),
        )
    }
}
