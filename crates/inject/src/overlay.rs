//! The user's own containers of the sidecar's names, and injecting what was injected before.

use serde_json::{Value, json};

use crate::merge;
use crate::pod::{self, LISTS};
use crate::prometheus;
use crate::schema;
use crate::status::{self, INIT, OVERRIDES, PROXY, STATUS, Status, VALIDATION, annotation};

/// The image that says "the injected one".
const AUTO: &str = "auto";

/// The pod that templates see: without what an earlier injection added, with the user's containers that
/// it took in.
pub(crate) fn strip(original: &Value, status_port: i64) -> Result<Value, String> {
    let mut stripped = original.clone();
    if let Some(before) = Status::of_pod(original) {
        for (list, names) in [("containers", &before.containers), ("initContainers", &before.init_containers)] {
            for name in names.iter().flatten() {
                pod::remove(&mut stripped, list, name);
            }
        }
        if prometheus::port(&stripped) == Some(status_port.to_string().as_str()) {
            prometheus::clear(&mut stripped);
        }
        pod::metadata_mut(&mut stripped, "annotations").shift_remove(STATUS);
    }
    let overrides = overrides(&stripped)?;
    for list in LISTS {
        for container in overrides[list].as_array().into_iter().flatten() {
            let name = container["name"].as_str().unwrap_or_default();
            if pod::find(pod::containers(&stripped, list), name).is_none()
                && let Some(items) = pod::list_mut(&mut stripped, list)
            {
                items.push(container.clone());
            }
        }
    }
    Ok(stripped)
}

/// The containers recorded by an earlier injection.
fn overrides(pod: &Value) -> Result<Value, String> {
    let Some(text) = annotation(pod, OVERRIDES) else { return Ok(json!({})) };
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let mut out = json!({});
    for list in LISTS {
        let mut containers = Vec::new();
        for container in value[list].as_array().into_iter().flatten() {
            containers.push(
                schema::normalise(schema::named("Container"), container).map_err(|error| format!("{list}: {error}"))?,
            );
        }
        out[list] = Value::Array(containers);
    }
    Ok(out)
}

/// Lays the user's containers over those of the same name that the template made, and records them for
/// the next injection.
///
/// As `reapplyOverwrittenContainers`.
pub(crate) fn reapply(
    mut merged: Value,
    original: &Value,
    template: &Value,
    proxy_config: &Value,
) -> Result<Value, String> {
    let before = annotation(original, STATUS);
    let status = Status::of_pod(original).unwrap_or_default();
    let recorded = overrides(original)?;
    let mut found = json!({});
    for (list, injected) in [("containers", &status.containers), ("initContainers", &status.init_containers)] {
        for container in pod::containers(template, list) {
            let name = container["name"].as_str().unwrap_or_default();
            let recorded = recorded[list].as_array().map(Vec::as_slice).unwrap_or_default();
            // What an earlier injection added is not the user's, but what it recorded is.
            // DIFFERS: Istio then leaves out the user's part too, so injecting again undoes it.
            let again = injected.iter().flatten().any(|known| known == name);
            let own = pod::find(recorded, name).or_else(|| match list {
                _ if again => None,
                "containers" => pod::find(pod::containers(original, list), name),
                _ => pod::container(original, name),
            });
            let Some(own) = own else { continue };
            let mut own = own.clone();
            if own["image"] == AUTO
                && let Some(own) = own.as_object_mut()
            {
                own.shift_remove("image");
            }
            if !found[list].is_array() {
                found[list] = json!([]);
            }
            if let Some(items) = found[list].as_array_mut() {
                items.push(own.clone());
            }
            let patch = json!({"spec": {list: [own]}});
            let ty = schema::named("Pod");
            merged = merge::merge(ty, merged, &patch).map_err(|error| error.to_string())?;
            merged = schema::normalise(ty, &merged).map_err(|error| error.to_string())?;
        }
    }
    if before.is_none() && found.as_object().is_some_and(|found| !found.is_empty()) {
        let text = go_template::json::encode(&found, false);
        pod::metadata_mut(&mut merged, "annotations").insert(OVERRIDES.to_owned(), json!(text));
    }
    let of_user = || LISTS.iter().find_map(|list| pod::find(recorded[*list].as_array()?, PROXY));
    if let Some(own) = before.and_then(|_| of_user()).or_else(|| pod::sidecar(original)) {
        adjust_user(&mut merged, own, proxy_config);
    }
    Ok(merged)
}

/// Makes redirection and its check agree with the user that the user gave the proxy.
///
/// As `adjustInitContainerUser`; `own` is the user's istio-proxy.
fn adjust_user(merged: &mut Value, own: &Value, proxy_config: &Value) {
    let context = &own["securityContext"];
    let (user, group) = (context["runAsUser"].as_i64(), context["runAsGroup"].as_i64());
    if user.is_none() && group.is_none() {
        return;
    }
    let init = [INIT, VALIDATION]
        .into_iter()
        .find(|name| pod::find(pod::containers(merged, "initContainers"), name).is_some());
    let Some(init) = init else { return };
    let tproxy =
        proxy_config["interceptionMode"] == "TPROXY" || annotation(merged, status::INTERCEPTION) == Some("TPROXY");
    if tproxy && user.is_some() {
        // Transparent proxying needs root.
        if let Some(proxy) = pod::container_mut(merged, PROXY) {
            proxy["securityContext"]["runAsUser"] = json!(0);
        }
    }
    let Some(container) = merged["spec"]["initContainers"]
        .as_array_mut()
        .and_then(|list| list.iter_mut().find(|container| container["name"] == init))
    else {
        return;
    };
    if !tproxy && init == VALIDATION {
        if let Some(user) = user {
            container["securityContext"]["runAsUser"] = json!(user);
        }
        if let Some(group) = group {
            container["securityContext"]["runAsGroup"] = json!(group);
        }
    }
    // The packet filter cannot tell a proxy that runs as root from the rest.
    let Some(user) = user.filter(|user| *user != 0) else { return };
    if let Some(args) = container["args"].as_array_mut()
        && let Some(at) = args.iter().position(|arg| arg == "-u")
        && let Some(value) = args.get_mut(at + 1)
    {
        *value = json!(user.to_string());
    }
}
