use serde_json::Value;
use std::fmt::Write;

pub(super) const TITLE: &str = "The Comedy of Errors";
pub(super) const DESCRIPTION: &str = "The Comedy of Errors is one of William Shakespeare's early plays. It is his \
    shortest and one of his most farcical comedies, with a major part of the humour coming from slapstick and \
    mistaken identity, in addition to puns and word play.";

const STYLE: &str = "
body{margin:0;font:16px/1.5 system-ui,sans-serif;color:#1d2733;background:#f5f6f8}
header{background:#14384f;color:#fff;padding:14px 32px;display:flex;align-items:center;gap:16px}
header b{flex:1;font-size:19px}header a,header button{color:#fff}
input,button{font:inherit;padding:4px 10px;border:1px solid #4f7288;border-radius:6px;background:#0e2a3c;color:#fff}
main{max-width:980px;margin:28px auto;padding:0 24px}
h1{text-align:center;margin:8px 0}.summary{text-align:center;color:#4a5764;max-width:720px;margin:0 auto 28px}
section{background:#fff;border-radius:12px;padding:18px 26px;box-shadow:0 1px 3px #0002}
.columns{display:grid;grid-template-columns:2fr 3fr;gap:22px;align-items:start}
dl{display:grid;grid-template-columns:auto 1fr;gap:4px 18px;margin:0}dt{color:#6b7885}dd{margin:0}
blockquote{margin:0 0 18px;padding-left:14px;border-left:3px solid #cfd8df}cite{color:#6b7885}
.stars{font-size:22px;letter-spacing:2px}.error{color:#a3261b}.pod{color:#6b7885;font-size:13px}
";

fn layout(user: Option<&str>, body: &str) -> String {
    let session = match user {
        Some(user) => format!("<span>{}</span> <a href=\"/logout\">sign out</a>", escape(user)),
        None => "<form method=\"post\" action=\"/login\"><input name=\"username\" placeholder=\"user\" aria-label=\"user\"> \
                 <button>Sign in</button></form>"
            .to_owned(),
    };
    format!(
        "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Simple Bookstore App</title>\
         <style>{STYLE}</style></head><body><header><b>BookInfo Sample</b>{session}</header>\
         <main>{body}</main></body></html>"
    )
}

pub(super) fn index() -> String {
    layout(
        None,
        "<h1>Hello! This is a simple bookstore application consisting of four services</h1>\
         <p class=\"summary\"><a href=\"/productpage?u=normal\">Normal user</a> · \
         <a href=\"/productpage?u=test\">Test user</a></p>",
    )
}

/// The product page from the answers of details and reviews; an `error` field shows as such.
pub(super) fn product(details: &Value, reviews: &Value, user: Option<&str>) -> String {
    let mut body = format!(
        "<h1>{TITLE}</h1><p class=\"summary\">Summary: {}</p><div class=\"columns\"><section><h2>Book Details</h2>",
        escape(DESCRIPTION)
    );
    match details["error"].as_str() {
        Some(error) => unavailable(&mut body, "Error fetching product details!", error),
        None => {
            body.push_str("<dl>");
            for (label, field) in [
                ("Type", "type"),
                ("Pages", "pages"),
                ("Publisher", "publisher"),
                ("Language", "language"),
                ("ISBN-10", "ISBN-10"),
                ("ISBN-13", "ISBN-13"),
            ] {
                let _ = write!(body, "<dt>{label}</dt><dd>{}</dd>", escape(&plain(&details[field])));
            }
            body.push_str("</dl>");
        }
    }
    body.push_str("</section><section><h2>Book Reviews</h2>");
    match reviews["error"].as_str() {
        Some(error) => unavailable(&mut body, "Error fetching product reviews!", error),
        None => {
            for review in reviews["reviews"].as_array().into_iter().flatten() {
                review_html(&mut body, review);
            }
            let _ = write!(body, "<p class=\"pod\">Reviews served by: {}</p>", escape(&plain(&reviews["podname"])));
        }
    }
    body.push_str("</section></div>");
    layout(user, &body)
}

fn review_html(body: &mut String, review: &Value) {
    let _ = write!(
        body,
        "<blockquote><p>{}</p><cite>{}</cite>",
        escape(&plain(&review["text"])),
        escape(&plain(&review["reviewer"]))
    );
    let rating = &review["rating"];
    if let Some(stars) = rating["stars"].as_u64() {
        let stars = stars.min(5) as usize;
        let color = if rating["color"] == "red" { "red" } else { "black" };
        let _ = write!(
            body,
            "<div class=\"stars\" style=\"color:{color}\" aria-label=\"{stars} of 5 stars\">{}{}</div>",
            "★".repeat(stars),
            "☆".repeat(5 - stars)
        );
    } else if let Some(error) = rating["error"].as_str() {
        let _ = write!(body, "<div class=\"error\">{}</div>", escape(error));
    }
    body.push_str("</blockquote>");
}

fn unavailable(body: &mut String, title: &str, error: &str) {
    let _ = write!(body, "<h4 class=\"error\">{title}</h4><p class=\"error\">{}</p>", escape(error));
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn stars_and_errors_show() {
        let reviews = json!({ "podname": "reviews-v3", "reviews": [
            { "reviewer": "<R>", "text": "t", "rating": { "stars": 4, "color": "red" } },
            { "reviewer": "R2", "text": "t", "rating": { "error": "Ratings service is currently unavailable" } } ] });
        let page = product(&json!({ "error": "gone" }), &reviews, Some("jason"));
        for part in
            ["★★★★☆", "color:red", "&lt;R&gt;", "currently unavailable", "Error fetching product details!", "jason"]
        {
            assert!(page.contains(part), "{part}");
        }
    }
}
