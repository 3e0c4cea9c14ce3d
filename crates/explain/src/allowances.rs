//! ALLOW policies of which no rule applies: what each of them wants.

use config_store::{Key, Kind};
use istio_api::authorization_policy::Action;
use serde_json::Value;

use crate::mesh::{Mesh, Pod};
use crate::trace::PassedOver;

/// Annotation of policies that only log what they would do.
const DRY_RUN: &str = "istio.io/dry-run";

/// Every rule of every ALLOW policy of a pod. `is_there`: whether the port's filter has a rule of this name.
pub(crate) fn passed_over(mesh: &Mesh, pod: &Pod, is_there: impl Fn(&str) -> bool) -> Vec<PassedOver> {
    let all = mesh.files.push.authorization_policies(&pod.node.namespace, &pod.node.labels);
    let mut out = Vec::new();
    for policy in all.into_iter().filter(|policy| policy.spec.action == Action::Allow) {
        // As Go's strconv.ParseBool.
        let said = policy.annotations.get(DRY_RUN).map(String::as_str);
        if matches!(said, Some("1" | "t" | "T" | "true" | "TRUE" | "True")) {
            continue;
        }
        let key = Key::new(Kind::AuthorizationPolicy, &policy.namespace, &policy.name);
        if policy.spec.rules.is_empty() {
            let what = format!("by {key}: it has no rules, and so allows nobody");
            out.push(PassedOver { what, why: String::new(), source: Some(mesh.source(&key, "spec")) });
            continue;
        }
        let document = mesh.files.document(&key);
        for index in 0..policy.spec.rules.len() {
            let rule = document.and_then(|document| document.value.pointer(&format!("/spec/rules/{index}")));
            let mut why = rule.map(wants).unwrap_or_default();
            if !is_there(&format!("ns[{}]-policy[{}]-rule[{index}]", policy.namespace, policy.name)) {
                why.push_str(", which is of HTTP, and the port is not");
            }
            let source = Some(mesh.source(&key, &format!("spec.rules[{index}]")));
            out.push(PassedOver { what: format!("by rule {index} of {key}"), why, source });
        }
    }
    out
}

/// A rule in one line: `from principals a or b, to methods GET, when request.headers[x] is 1`.
fn wants(rule: &Value) -> String {
    let parts = |list: &str, inner: &str| {
        let all = rule.get(list).and_then(Value::as_array).into_iter().flatten();
        let each = all.filter_map(|entry| entry.get(inner)?.as_object());
        let each =
            each.map(|fields| fields.iter().map(|(name, v)| format!("{name} {}", values(v))).collect::<Vec<_>>());
        each.map(|fields| fields.join(" and ")).collect::<Vec<_>>().join(", or ")
    };
    let conditions = rule.get("when").and_then(Value::as_array).into_iter().flatten().map(|condition| {
        let text = |field: &str| condition.get(field).map(values).unwrap_or_default();
        match condition.get("values") {
            Some(_) => format!("{} is {}", text("key"), text("values")),
            None => format!("{} is not {}", text("key"), text("notValues")),
        }
    });
    let all = [
        ("from", parts("from", "source")),
        ("to", parts("to", "operation")),
        ("when", conditions.collect::<Vec<_>>().join(" and ")),
    ];
    let said = all.iter().filter(|(_, text)| !text.is_empty()).map(|(word, text)| format!("{word} {text}"));
    said.collect::<Vec<_>>().join("; ")
}

fn values(value: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    value.as_array().map_or_else(|| text(value), |all| all.iter().map(text).collect::<Vec<_>>().join(" or "))
}
