//! The webhooks' registrations, revision-aware as Istio's charts make them.

use serde_json::{Value, json};

use crate::manifests::Choices;

fn client(choices: &Choices, path: &str) -> Value {
    match &choices.webhook_url {
        Some(url) => json!({"url": format!("{}{path}", url.trim_end_matches('/'))}),
        None => json!({
            "service": {
                "name": choices.named("istiod"), "namespace": choices.namespace, "path": path, "port": 443,
            },
        }),
    }
}

/// A condition on a label.
fn on(key: &str, operator: &str, values: &[&str]) -> Value {
    match values {
        [] => json!({"key": key, "operator": operator}),
        values => json!({"key": key, "operator": operator, "values": values}),
    }
}

/// Which namespaces and pods are sent to the injector.
///
/// As istio `manifests/charts/istio-control/istio-discovery/templates/mutatingwebhook.yaml`: labels of the revision
/// first; the default revision also takes `istio-injection` and pods that ask without naming a revision.
pub(crate) fn injection(choices: &Choices) -> Value {
    const REVISION: &str = "istio.io/rev";
    const INJECTION: &str = "istio-injection";
    const INJECT: &str = "sidecar.istio.io/inject";
    let revision = choices.label();
    let webhook = |prefix: &str, namespaces: Value, objects: Value| {
        json!({
            "name": format!("{prefix}.sidecar-injector.istio.io"),
            "clientConfig": client(choices, "/inject"),
            "namespaceSelector": {"matchExpressions": namespaces},
            "objectSelector": {"matchExpressions": objects},
            "rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}],
            "admissionReviewVersions": ["v1", "v1beta1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
        })
    };
    let willing = || on(INJECT, "NotIn", &["false"]);
    let mut webhooks = vec![
        webhook(
            "rev.namespace",
            json!([on(REVISION, "In", &[revision]), on(INJECTION, "DoesNotExist", &[])]),
            json!([willing()]),
        ),
        webhook(
            "rev.object",
            json!([on(REVISION, "DoesNotExist", &[]), on(INJECTION, "DoesNotExist", &[])]),
            json!([willing(), on(REVISION, "In", &[revision])]),
        ),
    ];
    if choices.is_default() {
        webhooks.push(webhook("namespace", json!([on(INJECTION, "In", &["enabled"])]), json!([willing()])));
        webhooks.push(webhook(
            "object",
            json!([on(INJECTION, "DoesNotExist", &[]), on(REVISION, "DoesNotExist", &[])]),
            json!([on(INJECT, "In", &["true"]), on(REVISION, "DoesNotExist", &[])]),
        ));
    }
    choices.global_object(
        "admissionregistration.k8s.io/v1",
        "MutatingWebhookConfiguration",
        &choices.named("istio-sidecar-injector"),
        json!({"webhooks": webhooks}),
    )
}

/// Which objects are sent to validation. Ignored until the control plane answers, which then sets `Fail`.
pub(crate) fn validation(choices: &Choices) -> Value {
    let groups = ["security.istio.io", "networking.istio.io", "telemetry.istio.io", "extensions.istio.io"];
    let values: &[&str] = if choices.is_default() { &["default"] } else { &[&choices.revision] };
    let selector = json!({"matchExpressions": [on("istio.io/rev", "In", values)]});
    let mut webhook = json!({
        "name": "rev.validation.istio.io",
        "clientConfig": client(choices, "/validate"),
        "rules": [{
            "operations": ["CREATE", "UPDATE"], "apiGroups": groups, "apiVersions": ["*"], "resources": ["*"],
        }],
        "failurePolicy": "Ignore",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1", "v1beta1"],
    });
    // The default revision also judges what names no revision.
    if !choices.is_default() {
        webhook["objectSelector"] = selector;
    } else {
        let unnamed = json!({"matchExpressions": [on("istio.io/rev", "DoesNotExist", &[])]});
        let mut own = webhook.clone();
        own["objectSelector"] = selector;
        webhook["name"] = "validation.istio.io".into();
        webhook["objectSelector"] = unnamed;
        return configuration(choices, json!([own, webhook]));
    }
    configuration(choices, json!([webhook]))
}

fn configuration(choices: &Choices, webhooks: Value) -> Value {
    choices.global_object(
        "admissionregistration.k8s.io/v1",
        "ValidatingWebhookConfiguration",
        &choices.global("istio-validator"),
        json!({"webhooks": webhooks}),
    )
}
