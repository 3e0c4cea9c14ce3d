//! Admission webhooks: `/inject` and `/validate`.

use std::sync::Arc;
use std::time::Instant;

use config_store::{Kind, Object};
use http::Method;
use http_body_util::BodyExt;
use manifest::Document;
use serde_json::{Value, json};
use tracing::{debug, warn};

use crate::connection::{Request, Response};
use crate::injection::{self, Injector};
use crate::metrics::Metrics;
use crate::world::World;

/// Everything behind port 15017.
#[derive(Clone)]
pub(crate) struct Webhooks {
    /// `None` when injection is done elsewhere.
    pub(crate) injector: Option<Injector>,
    /// For namespaces and ProxyConfig resources.
    pub(crate) world: World,
    pub(crate) metrics: Arc<Metrics>,
}

impl Webhooks {
    /// The answer to one request.
    pub(crate) async fn answer(self, request: Request) -> Response {
        let path = request.uri().path().trim_end_matches('/').to_owned();
        if path == "/ready" || path == "/healthz" {
            return plain(200, "ready\n");
        }
        if request.method() != Method::POST {
            return plain(405, "admission reviews are posted\n");
        }
        let content_type = request.headers().get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let content_type = content_type.map(str::to_owned);
        let started = Instant::now();
        let body = match request.into_body().collect().await {
            Ok(body) => body.to_bytes(),
            // istiod answers so too when a body is too large.
            Err(error) => return plain(400, &format!("the request cannot be read: {error}\n")),
        };
        if path == "/validate" || path.starts_with("/validate/") {
            return self.validate(&body);
        }
        if path == "/inject" || path.starts_with("/inject/") {
            return match &self.injector {
                Some(injector) => {
                    let config = injector.current();
                    let state = self.world.current();
                    let known = inject::webhook::Known {
                        namespaces: &|name| injection::namespace(&state, name),
                        proxy_configs: &|namespace, labels| injection::proxy_configs(&state, namespace, labels),
                    };
                    let answer = inject::webhook::handle_with(&path, content_type.as_deref(), &body, &config, known);
                    match &answer.result {
                        inject::webhook::Result::Failed(reason) => warn!(reason, "injection refused"),
                        inject::webhook::Result::Skipped(rule) => debug!(rule, "not injected"),
                        inject::webhook::Result::Injected => {}
                    }
                    self.metrics.injected(&answer.result, started.elapsed());
                    lifecycle::http::with_type(answer.status, answer.content_type, answer.body)
                }
                None => plain(503, "this control plane has no injection configuration\n"),
            };
        }
        plain(404, "there are /inject and /validate\n")
    }

    fn validate(&self, body: &[u8]) -> Response {
        match serde_json::from_slice::<Value>(body) {
            Ok(review) if review.get("request").is_some_and(Value::is_object) => {
                let answer = review_object(&review, &self.metrics);
                json_body(200, answer.to_string().into_bytes())
            }
            Ok(_) => {
                self.metrics.not_a_review(400);
                plain(400, "the admission review has no request\n")
            }
            Err(error) => {
                self.metrics.not_a_review(400);
                plain(400, &format!("the admission review is not JSON: {error}\n"))
            }
        }
    }
}

/// Judges the object in an `AdmissionReview`; what is not ours to judge is allowed.
fn review_object(review: &Value, metrics: &Metrics) -> Value {
    let request = &review["request"];
    let mut response = json!({"uid": request["uid"], "allowed": true});
    let object = &request["object"];
    let kind = Kind::of(text(request, "/kind/group"), text(request, "/kind/kind")).filter(|kind| kind.is_istio());
    let deleting = text(request, "/operation") == "DELETE";
    let resource = ["/resource/group", "/resource/version", "/resource/resource"].map(|part| text(request, part));
    let in_earnest = request["dryRun"] != true;
    if let (Some(kind), false, true) = (kind, deleting, object.is_object()) {
        let mut object = object.clone();
        // A new object need not name the namespace it is created in, and may leave its name to the server.
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.entry("namespace").or_insert_with(|| request["namespace"].clone());
            if metadata.get("name").is_none_or(Value::is_null) {
                let prefix = metadata.get("generateName").and_then(Value::as_str).unwrap_or("");
                let name = format!("{prefix}x");
                metadata.insert("name".into(), name.into());
            }
        }
        let name = format!("{kind} {}", text(&object, "/metadata/name"));
        match Object::read(&Document::from_value(object, name.as_str())) {
            Ok((_, warnings)) => {
                metrics.validated(resource, None);
                if !warnings.is_empty() {
                    response["warnings"] = warnings.iter().map(|warning| Value::from(warning.to_string())).collect();
                }
            }
            Err(rejected) => {
                if in_earnest {
                    metrics.validated(resource, Some("invalid_resource"));
                }
                let lines: Vec<_> = rejected.errors.iter().map(ToString::to_string).collect();
                let message = format!("configuration is invalid: {}", lines.join("; "));
                debug!(object = name, message, "object refused by validation");
                response["allowed"] = false.into();
                response["status"] = json!({"status": "Failure", "code": 400, "reason": "Invalid", "message": message});
            }
        }
    }
    let version = review.get("apiVersion").and_then(Value::as_str).unwrap_or("admission.k8s.io/v1");
    if !version.starts_with("admission.k8s.io/") {
        warn!(version, "admission review of an unknown version");
    }
    json!({"apiVersion": version, "kind": "AdmissionReview", "response": response})
}

fn text<'v>(value: &'v Value, pointer: &str) -> &'v str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn plain(status: u16, message: &str) -> Response {
    lifecycle::http::text(status, message)
}

fn json_body(status: u16, body: Vec<u8>) -> Response {
    lifecycle::http::with_type(status, "application/json", body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn review(kind: &str, spec: Value) -> Value {
        let review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "u", "operation": "CREATE", "namespace": "default",
                "kind": {"group": "networking.istio.io", "version": "v1", "kind": kind},
                "object": {"apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": {"name": "a"}, "spec": spec},
            },
        });
        review_object(&review, &Metrics::default())
    }

    #[test]
    fn a_field_of_the_wrong_type_is_refused_by_name() {
        let answer = review("VirtualService", json!({"hosts": "a"}));
        assert_eq!(answer["response"]["allowed"], false);
        let message = answer["response"]["status"]["message"].as_str().unwrap();
        assert!(message.contains("spec.hosts"), "{message}");
        assert_eq!(answer["response"]["uid"], "u");
    }

    #[test]
    fn what_was_judged_is_counted_by_resource() {
        let metrics = Metrics::default();
        let judge = |spec: Value, dry_run: bool| {
            let request = json!({"operation": "CREATE", "namespace": "default", "dryRun": dry_run,
                "kind": {"group": "networking.istio.io", "version": "v1", "kind": "Sidecar"},
                "resource": {"group": "networking.istio.io", "version": "v1", "resource": "sidecars"},
                "object": {"apiVersion": "networking.istio.io/v1", "kind": "Sidecar", "metadata": {"name": "a"}, "spec": spec}});
            review_object(&json!({"apiVersion": "admission.k8s.io/v1", "request": request}), &metrics);
        };
        judge(json!({"egress": [{"hosts": ["./*"]}]}), false);
        judge(json!({"egress": 1}), false);
        judge(json!({"egress": 1}), true);
        let page = metrics.render();
        let labels = "group=\"networking.istio.io\",version=\"v1\",resource=\"sidecars\"";
        for line in [
            format!("galley_validation_passed{{{labels}}} 1"),
            format!("galley_validation_failed{{{labels},reason=\"invalid_resource\"}} 1"),
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
    }

    #[test]
    fn good_objects_and_foreign_kinds_pass() {
        let good = json!({"hosts": ["a"], "http": [{"route": [{"destination": {"host": "a"}}]}]});
        assert_eq!(review("VirtualService", good)["response"]["allowed"], true);
        assert_eq!(review("Foreign", json!(1))["response"]["allowed"], true);
    }
}
