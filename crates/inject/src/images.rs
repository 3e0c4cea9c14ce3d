//! The proxy's image names, and its user.

use serde_json::Value;

use crate::decision::NamespaceMeta;
use crate::pod as pods;
use crate::status::{INIT, PROXY, VALIDATION};

/// Types that Istio publishes; a tag that ends in one has it replaced.
const TYPES: [&str; 2] = ["-distroless", "-debug"];

/// The user and group of the proxy where nothing else is said.
const PROXY_ID: i64 = 1337;

/// The sidecar's image.
pub(crate) fn proxy(values: &Value, proxy_config: &Value, annotated: Option<&str>) -> String {
    let name = text(values, "/global/proxy/image");
    let configured = proxy_config.pointer("/image/imageType").and_then(Value::as_str).unwrap_or_default();
    url(values, name, configured, annotated)
}

/// The init container's image; a ProxyConfig has no say in it.
pub(crate) fn init(values: &Value, annotated: Option<&str>) -> String {
    url(values, text(values, "/global/proxy_init/image"), "", annotated)
}

fn text<'a>(values: &'a Value, path: &str) -> &'a str {
    values.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

fn url(values: &Value, name: &str, configured: &str, annotated: Option<&str>) -> String {
    let name = if name.is_empty() { "proxyv2" } else { name };
    let tag = match values.pointer("/global/tag") {
        Some(Value::String(tag)) => tag.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => go_template::format::sprint(&go_template::Value::from_json(other)),
    };
    let variant = if configured.is_empty() { text(values, "/global/variant") } else { configured };
    let image_type = annotated.unwrap_or(variant);
    format!("{}/{name}:{}", text(values, "/global/hub"), typed(&tag, image_type))
}

fn typed(tag: &str, image_type: &str) -> String {
    if image_type.is_empty() {
        return tag.to_owned();
    }
    let plain = TYPES.iter().find_map(|suffix| tag.strip_suffix(suffix)).unwrap_or(tag);
    if image_type == "default" { plain.to_owned() } else { format!("{plain}-{image_type}") }
}

/// User and group of the proxy: on OpenShift the last of the namespace's ranges.
pub(crate) fn proxy_ids(namespace: &NamespaceMeta) -> (i64, i64) {
    let range = |name: &str| -> Option<i64> {
        let value = namespace.annotations.get(name)?;
        let first = value.split(',').next()?;
        if let Some((start, count)) = first.split_once('/') {
            return start.parse::<i64>().ok()?.checked_add(count.parse::<i64>().ok()?)?.checked_sub(1);
        }
        first.split_once('-')?.1.parse().ok()
    };
    let uid = range("openshift.io/sa.scc.uid-range").unwrap_or(PROXY_ID);
    (uid, range("openshift.io/sa.scc.supplemental-groups").unwrap_or(PROXY_ID))
}

/// OpenShift gives every container the same user. A proxy with the application's user could not be told
/// from it by the redirection, so then the user's choice is dropped.
///
/// As `isSidecarUserMatchingAppUser`.
pub(crate) fn drop_openshift_user(pod: &mut Value, namespace: &NamespaceMeta) {
    if !namespace.annotations.contains_key("openshift.io/sa.scc.uid-range") {
        return;
    }
    let user = |container: &Value| container["securityContext"]["runAsUser"].as_i64();
    let (mut proxy, mut application) = (0, 0);
    for container in pods::LISTS.iter().flat_map(|list| pods::containers(pod, list)) {
        match container["name"].as_str() {
            Some(PROXY) => proxy = user(container).unwrap_or(proxy),
            Some(INIT | VALIDATION) => {}
            _ => application = user(container).unwrap_or(application),
        }
    }
    if proxy == application
        && let Some(container) = pods::container_mut(pod, PROXY)
        && let Some(context) = container.get_mut("securityContext").and_then(Value::as_object_mut)
    {
        context.shift_remove("runAsUser");
        context.shift_remove("runAsGroup");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn image_types_replace_each_other() {
        let values = json!({"global": {"hub": "h", "tag": "1-debug", "variant": "distroless"}});
        assert_eq!(proxy(&values, &json!({}), None), "h/proxyv2:1-distroless");
        assert_eq!(proxy(&values, &json!({"image": {"imageType": "x"}}), None), "h/proxyv2:1-x");
        assert_eq!(init(&values, Some("default")), "h/proxyv2:1");
        assert_eq!(init(&json!({"global": {"hub": "h", "tag": 1.5}}), None), "h/proxyv2:1.5");
    }
}
