//! The mutating admission webhook, without its server: bytes in, status and bytes out.
//!
//! As istio `pkg/kube/inject/webhook.go`, `serveInject`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::decision::NamespaceMeta;
use crate::owner::Owner;
use crate::patch;
use crate::pipeline::{Outcome, ProxyConfigs, Request, inject};
use crate::schema;
use crate::status::{INJECT, label};

/// Largest body that is read. Kubernetes' own limit for an object is 3 MiB; a review may hold two.
pub const BODY_LIMIT: usize = 6 << 20;

/// How an admission went, for counters and logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Result {
    Injected,
    /// Left alone, because of this rule.
    Skipped(String),
    /// Refused or undecodable.
    Failed(String),
}

/// The HTTP answer.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub content_type: &'static str,
    pub body: Vec<u8>,
    pub result: Result,
}

/// What the webhook knows of the cluster, from whoever watches it.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    /// Labels and annotations of a namespace.
    pub namespaces: &'a dyn Fn(&str) -> Option<NamespaceMeta>,
    /// The ProxyConfig resources for a pod of a namespace with these labels, as a JSON object.
    pub proxy_configs: &'a dyn Fn(&str, &Value) -> ProxyConfigs,
}

impl std::fmt::Debug for Known<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Known").finish_non_exhaustive()
    }
}

impl Known<'_> {
    /// Nothing is known; only OpenShift's identities and ProxyConfig resources need more.
    pub const NOTHING: Known<'static> =
        Known { namespaces: &|_| None, proxy_configs: &|_, _| ProxyConfigs { wide: Vec::new(), workload: None } };
}

/// Answers a request to `path` (`/inject` or `/inject/KEY/VALUE/…`) without knowledge of the cluster.
pub fn handle(path: &str, content_type: Option<&str>, body: &[u8], config: &Config) -> Response {
    handle_with(path, content_type, body, config, Known::NOTHING)
}

/// As [`handle`], with what is known of the cluster.
pub fn handle_with(path: &str, content_type: Option<&str>, body: &[u8], config: &Config, known: Known<'_>) -> Response {
    let plain = |status: u16, message: &str| Response {
        status,
        content_type: "text/plain; charset=utf-8",
        body: format!("{message}\n").into_bytes(),
        result: Result::Failed(message.to_owned()),
    };
    if body.len() > BODY_LIMIT {
        // Istio answers 400, not 413.
        return plain(400, &format!("Request entity too large: limit is {BODY_LIMIT}"));
    }
    if body.is_empty() {
        return plain(400, "no body found");
    }
    if content_type != Some("application/json") {
        return plain(415, "invalid Content-Type, want `application/json`");
    }
    let (review, result) = match serde_json::from_slice::<Value>(body) {
        Ok(request) => review(path, &request, config, known),
        Err(error) => {
            let message = format!("could not decode body: {error}");
            (undecodable(&message), Result::Failed(message))
        }
    };
    Response { status: 200, content_type: "application/json", body: review.to_string().into_bytes(), result }
}

/// Answers an AdmissionReview, v1 or v1beta1, in its own version.
pub fn review(path: &str, review: &Value, config: &Config, known: Known<'_>) -> (Value, Result) {
    let version = review["apiVersion"].as_str().unwrap_or_default();
    let request = &review["request"];
    let uid = request["uid"].as_str().unwrap_or_default();
    let supported = matches!(version, "admission.k8s.io/v1" | "admission.k8s.io/v1beta1");
    if !supported || review["kind"] != "AdmissionReview" {
        let message =
            format!("no kind {:?} is registered for version {version:?}", review["kind"].as_str().unwrap_or_default());
        return (undecodable(&message), Result::Failed(message));
    }
    let fail = |message: String| (refused(version, uid, &message), Result::Failed(message));
    let raw = &request["object"];
    if !raw.is_object() {
        return fail("the request has no object".to_owned());
    }
    let mut pod = raw.clone();
    if !pod["metadata"].is_object() {
        pod["metadata"] = json!({});
    }
    if pod["metadata"]["namespace"].as_str().unwrap_or_default().is_empty()
        && let Some(namespace) = request["namespace"].as_str().filter(|namespace| !namespace.is_empty())
    {
        pod["metadata"]["namespace"] = json!(namespace);
    }
    let base = match schema::normalise(schema::named("Pod"), &pod) {
        Ok(base) => base,
        Err(error) => return fail(format!("the pod is malformed: {error}")),
    };
    let owner = Owner::of_pod(&base);
    let name = base["metadata"]["namespace"].as_str().unwrap_or_default();
    let mut namespace = (known.namespaces)(name).unwrap_or_default();
    namespace.name = name.to_owned();
    let mut call = Request::new(&pod, &owner, &namespace);
    call.env = path_env(path);
    call.proxy_configs = (known.proxy_configs)(name, &base["metadata"]["labels"]);
    match inject(&call, config) {
        Ok(Outcome::Injected { pod: mut result, warnings, .. }) => {
            let mut base = base;
            // Managed fields stay as they are: injection works without them.
            for object in [&mut base, &mut result] {
                if let Some(metadata) = object["metadata"].as_object_mut() {
                    metadata.shift_remove("managedFields");
                }
            }
            let patch = patch::between(raw, &base, &result);
            (allowed(version, uid, Some(patch), &warnings), Result::Injected)
        }
        Ok(Outcome::Skipped { decision }) => {
            let mut warnings = decision.warnings;
            if label(&base, INJECT) == Some("true") {
                warnings.push(format!("the pod asks for a sidecar and gets none: {}", decision.rule));
            }
            (allowed(version, uid, None, &warnings), Result::Skipped(decision.rule.to_string()))
        }
        Err(error) => fail(error.to_string()),
    }
}

fn answer(version: &str, response: impl Into<Value>) -> Value {
    json!({"kind": "AdmissionReview", "apiVersion": version, "response": response.into()})
}

fn refusal(uid: &str, message: &str) -> Value {
    json!({"uid": uid, "allowed": false, "status": {"metadata": {}, "message": message}})
}

fn refused(version: &str, uid: &str, message: &str) -> Value {
    answer(version, refusal(uid, message))
}

/// What was not read as a review has neither version nor identity, and so has its answer.
fn undecodable(message: &str) -> Value {
    json!({"response": refusal("", message)})
}

fn allowed(version: &str, uid: &str, patch: Option<Vec<Value>>, warnings: &[String]) -> Value {
    let mut response = Map::new();
    response.insert("uid".to_owned(), json!(uid));
    response.insert("allowed".to_owned(), json!(true));
    if let Some(patch) = patch {
        let text = Value::Array(patch).to_string();
        response.insert("patch".to_owned(), json!(data_encoding::BASE64.encode(text.as_bytes())));
        response.insert("patchType".to_owned(), json!("JSONPatch"));
    }
    if !warnings.is_empty() {
        response.insert("warnings".to_owned(), json!(warnings));
    }
    answer(version, response)
}

/// Environment of the proxy from a path `/inject/cluster/C/net/N` or the old `/inject/:ENV:a=b:ENV:c=d`.
///
/// As `parseInjectEnvs`: a last key without value is ignored.
pub fn path_env(path: &str) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let Some(rest) = path.strip_suffix('/').unwrap_or(path).splitn(3, '/').nth(2) else { return env };
    let mut insert = |key: &str, value: String| {
        let name = match key {
            "" => return,
            "cluster" => "ISTIO_META_CLUSTER_ID".to_owned(),
            "net" => "ISTIO_META_NETWORK".to_owned(),
            other => other.to_uppercase(),
        };
        env.insert(name, value);
    };
    if let Some(pairs) = rest.strip_prefix(":ENV:") {
        for (key, value) in pairs.split(":ENV:").filter_map(|pair| pair.split_once('=')) {
            insert(key, value.to_owned());
        }
        return env;
    }
    let mut parts = rest.split('/');
    while let (Some(key), Some(value)) = (parts.next(), parts.next()) {
        insert(key, value.replace("--slash--", "/"));
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Builtin;

    #[test]
    fn paths() {
        let env = |path: &str| path_env(path).into_iter().collect::<Vec<_>>();
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(env("/inject"), []);
        assert_eq!(
            env("/inject/cluster/c--slash--d/net/n/x"),
            [pair("ISTIO_META_CLUSTER_ID", "c/d"), pair("ISTIO_META_NETWORK", "n")]
        );
        assert_eq!(
            env("/inject/:ENV:cluster=a:ENV:foo=:ENV:=x"),
            [pair("FOO", ""), pair("ISTIO_META_CLUSTER_ID", "a")]
        );
    }

    #[test]
    fn http_faults() {
        let config = Config::builtin(&Builtin::default()).unwrap();
        let status = |content_type, body: &[u8]| handle("/inject", content_type, body, &config).status;
        assert_eq!(status(Some("application/json"), b""), 400);
        assert_eq!(status(Some("text/plain"), b"{}"), 415);
        let bad = handle("/inject", Some("application/json"), b"{", &config);
        assert_eq!(bad.status, 200);
        let answer: Value = serde_json::from_slice(&bad.body).unwrap();
        assert_eq!(answer["response"]["allowed"], false);
    }

    #[test]
    fn what_is_no_review_is_answered_without_version_and_identity() {
        let config = Config::builtin(&Builtin::default()).unwrap();
        for body in [
            "{",
            r#"{"kind": "Pod", "apiVersion": "v1", "request": {"uid": "u"}}"#,
            r#"{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v2", "request": {"uid": "u"}}"#,
        ] {
            let response = handle("/inject", Some("application/json"), body.as_bytes(), &config);
            let answer: Value = serde_json::from_slice(&response.body).unwrap();
            assert_eq!(answer.as_object().unwrap().len(), 1, "{answer}");
            assert_eq!((&answer["response"]["uid"], &answer["response"]["allowed"]), (&json!(""), &json!(false)));
        }
    }
}
