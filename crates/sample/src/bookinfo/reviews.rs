use super::{Caller, forwarded, product_id, service_url};
use crate::server::{App, Reply, json};
use bytes::Bytes;
use http::{Request, StatusCode};
use serde_json::{Value, json};
use std::time::Duration;

const TEXTS: [(&str, &str); 2] = [
    ("Reviewer1", "An extremely entertaining play by Shakespeare. The slapstick humour is refreshing!"),
    (
        "Reviewer2",
        "Absolutely fun and entertaining. The play lacks thematic depth when compared to other plays by Shakespeare.",
    ),
];

/// What readers say of a book; from v2 on with the stars that `ratings` holds.
pub(super) struct Reviews {
    /// The colour of the stars; none in v1, which does not call ratings.
    stars: Option<&'static str>,
    caller: Caller,
    ratings: String,
}

impl Reviews {
    pub(super) fn new(version: &str) -> Reviews {
        let stars = match version {
            "v1" => None,
            "v2" => Some("black"),
            _ => Some("red"),
        };
        Reviews { stars, caller: Caller::new(), ratings: service_url("ratings") }
    }
}

impl App for Reviews {
    async fn answer(&self, request: Request<Bytes>) -> Reply {
        let path = request.uri().path();
        if path == "/health" {
            return json(StatusCode::OK, &json!({ "status": "Reviews is healthy" }));
        }
        if !path.starts_with("/reviews/") {
            return json(StatusCode::NOT_FOUND, &json!({ "error": "not found" }));
        }
        let Some(id) = product_id(path) else {
            return json(StatusCode::BAD_REQUEST, &json!({ "error": "please provide numeric product id" }));
        };
        let ratings = match self.stars {
            // The original waits longer with black stars than with red ones.
            Some(color) => {
                let timeout = Duration::from_millis(if color == "black" { 10_000 } else { 2_500 });
                let url = format!("{}/{id}", self.ratings);
                Some((color, self.caller.get(&url, forwarded(request.headers()), timeout).await))
            }
            None => None,
        };
        let reviews: Vec<Value> = TEXTS
            .iter()
            .map(|(reviewer, text)| {
                let mut review = json!({ "reviewer": reviewer, "text": text });
                if let Some((color, (status, answer))) = &ratings {
                    review["rating"] = match answer["ratings"][reviewer].as_u64() {
                        Some(stars) if status.is_success() => json!({ "stars": stars, "color": color }),
                        _ => json!({ "error": "Ratings service is currently unavailable" }),
                    };
                }
                review
            })
            .collect();
        json(
            StatusCode::OK,
            &json!({
                "id": id.to_string(),
                "podname": std::env::var("HOSTNAME").unwrap_or_default(),
                "clustername": std::env::var("CLUSTER_NAME").ok(),
                "reviews": reviews,
            }),
        )
    }
}
