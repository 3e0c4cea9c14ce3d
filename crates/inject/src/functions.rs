//! Istio's own template functions, which replace sprig's of the same name.
//!
//! As istio `pkg/kube/inject/template.go`.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::LazyLock;

use go_template::{Args, Element, Functions, Map, Outcome, Value, format, json};
use serde_json::Value as Json;

use crate::duration;
use crate::mesh;
use crate::status::PROXY;
use crate::yaml;

/// Everything an injection template can call.
pub(crate) static FUNCTIONS: LazyLock<Functions> = LazyLock::new(|| {
    let mut functions = Functions::sprig();
    define(&mut functions);
    functions
});

fn text<'a>(value: impl Into<String>) -> Outcome<'a> {
    Ok(Value::from(value.into()))
}

fn define(functions: &mut Functions) {
    functions.define("formatDuration", 1, Some(1), |args| match args.typed(0) {
        Some(typed) if typed.ty.name() == "durationpb.Duration" => {
            text(duration::display(typed.data.as_str().and_then(duration::nanoseconds).unwrap_or(0)))
        }
        _ => Err(format!("wrong type for value; expected *durationpb.Duration; got {}", args.get(0).type_name())),
    });
    functions.define("isset", 2, Some(2), |args| Ok(Value::Bool(args.text_map(0)?.get(args.text(1)?).is_some())));
    functions.define("excludeInboundPort", 2, Some(2), |args| {
        text(exclude_inbound_port(&format::sprint(args.get(0)), args.text(1)?))
    });
    functions.define("includeInboundPorts", 1, Some(1), |args| text(container_ports(args, false)?));
    functions.define("applicationPorts", 1, Some(1), |args| text(container_ports(args, true)?));
    functions.define("kubevirtInterfaces", 1, Some(1), |args| text(args.text(0)?));
    functions.define("excludeInterfaces", 1, Some(1), |args| text(args.text(0)?));
    functions.define("annotation", 3, Some(3), annotation);
    functions.define("valueOrDefault", 2, Some(2), |args| {
        let value = args.get(0);
        let unset = matches!(value, Value::Nil) || value.as_str() == Some("");
        Ok(args.get(if unset { 1 } else { 0 }).clone())
    });
    functions.define("toJSON", 1, Some(1), |args| {
        let map = args.text_map(0)?;
        text(if map.is_nil() { "{}".to_owned() } else { json::encode(&args.get(0).to_json(), false) })
    });
    functions.define("fromJSON", 1, Some(1), |args| {
        Ok(serde_json::from_str(args.text(0)?).map_or_else(|_| Value::from("{}"), Value::from_owned_json))
    });
    functions.define("structToJSON", 1, Some(1), |args| {
        text(match args.get(0) {
            Value::Nil => "{}".to_owned(),
            value => json::encode(&value.to_json(), false),
        })
    });
    functions.define("protoToJSON", 1, Some(1), proto_to_json);
    functions.define("toYaml", 1, Some(1), |args| text(yaml::emit(&args.get(0).to_json())));
    functions.define("indent", 2, Some(2), |args| {
        let pad = " ".repeat(usize::try_from(args.int(0)?).unwrap_or(0).min(1000));
        text(args.text(1)?.replace('\n', &format!("\n{pad}")))
    });
    functions.define("directory", 1, Some(1), |args| {
        let path = args.text(0)?;
        text(path.rfind('/').map_or("", |at| &path[..=at]))
    });
    functions.define("contains", 2, Some(2), |args| Ok(Value::Bool(args.text(1)?.contains(args.text(0)?))));
    functions.define("toLower", 1, Some(1), |args| text(args.text(0)?.to_lowercase()));
    functions
        .define("appendMultusNetwork", 2, Some(2), |args| text(append_multus_network(args.text(0)?, args.text(1)?)));
    functions.define("env", 2, Some(2), |args| {
        let set = std::env::var(args.text(0)?).ok().filter(|value| !value.is_empty());
        text(match set {
            Some(value) => value,
            None => args.text(1)?.to_owned(),
        })
    });
    functions.define("omit", 1, None, |args| {
        let map = args.text_map(0)?;
        let mut keys = Vec::new();
        for index in 1..args.len() {
            keys.push(args.text(index)?);
        }
        let kept = map.entries().into_iter().filter(|(key, _)| !keys.contains(&&**key));
        Ok(Value::Map(Map::new(Element::Text, kept)))
    });
    functions.define("strdict", 0, None, |args| {
        let mut entries = Vec::new();
        for at in (0..args.len()).step_by(2) {
            let value = if at + 1 < args.len() { args.text(at + 1)?.to_owned() } else { String::new() };
            entries.push((Rc::from(args.text(at)?), Value::from(value)));
        }
        Ok(Value::Map(Map::new(Element::Text, entries)))
    });
    functions.define("toJsonMap", 0, None, |args| text(json::encode(&merge_maps(args)?.to_json(), false)));
    functions.define("mergeMaps", 0, None, merge_maps);
    functions.define("omitNil", 1, Some(1), |args| {
        Ok(match omit_nil(&args.get(0).to_json()) {
            // What has no nil stays as it is, typed values among it.
            Some(changed) => Value::from_owned_json(changed),
            None => args.get(0).clone(),
        })
    });
    functions.define("otelResourceAttributes", 5, Some(5), otel_resource_attributes);
}

fn exclude_inbound_port(port: &str, excluded: &str) -> String {
    let port = port.trim();
    if port.is_empty() || port == "0" {
        return excluded.to_owned();
    }
    if excluded.split(',').any(|known| known == port) {
        return excluded.to_owned();
    }
    let mut ports: Vec<&str> = excluded.split(',').map(str::trim).filter(|port| !port.is_empty()).collect();
    ports.push(port);
    ports.join(",")
}

/// TCP ports of the containers, with commas between.
fn container_ports(args: Args<'_, '_>, applications: bool) -> Result<String, String> {
    let containers = args.get(0);
    let typed = |item: &Value<'_>| matches!(item, Value::Typed(typed) if typed.ty.name() == "v1.Container");
    match containers {
        Value::Nil => {}
        Value::List(list) if list.iter().all(|item| typed(&item)) => {}
        other => return Err(format!("wrong type for value; expected []v1.Container; got {}", other.type_name())),
    }
    let mut ports = Vec::new();
    let containers = containers.to_json();
    for container in containers.as_array().map(Vec::as_slice).unwrap_or_default() {
        if applications && container["name"] == PROXY {
            continue;
        }
        for port in container["ports"].as_array().map(Vec::as_slice).unwrap_or_default() {
            if !matches!(port["protocol"].as_str(), Some("UDP" | "SCTP"))
                && let Some(number) = port["containerPort"].as_i64()
            {
                ports.push(number.to_string());
            }
        }
    }
    Ok(ports.join(","))
}

/// An annotation of the pod, or the default as text.
fn annotation<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let name = args.text(1)?;
    let annotations = match args.get(0) {
        Value::Typed(typed) => typed.ty.field(typed.data, "Annotations"),
        other => return Err(format!("wrong type for value; expected v1.ObjectMeta; got {}", other.type_name())),
    };
    if let Some(Value::Map(map)) = annotations
        && let Some(value) = map.get(name)
    {
        return Ok(value);
    }
    text(format::sprint(args.get(2)))
}

/// The JSON of a protobuf message; a ProxyConfig without what is as the defaults are.
fn proto_to_json<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    match args.get(0) {
        Value::Typed(typed) if typed.nil => text("{}"),
        Value::Typed(typed) if typed.ty.name() == "v1alpha1.ProxyConfig" => {
            text(json::encode(&mesh::without_defaults(typed.data), false))
        }
        Value::Nil => text("{}"),
        Value::Typed(typed) => text(json::encode(&typed.ty.to_json(typed.data), false)),
        other => Err(format!("wrong type for value; expected protoreflect.ProtoMessage; got {}", other.type_name())),
    }
}

fn append_multus_network(existing: &str, network: &str) -> String {
    if existing.is_empty() {
        return network.to_owned();
    }
    if let Some(end) = existing.rfind(']') {
        let Ok(Json::Array(networks)) = serde_json::from_str::<Json>(existing) else { return existing.to_owned() };
        let (namespace, name) = network.split_once('/').unwrap_or(("", network));
        let known =
            networks.iter().any(|item| item["name"] == name && item["namespace"].as_str().unwrap_or("") == namespace);
        if known {
            return existing.to_owned();
        }
        let item = match namespace {
            "" => format!(r#", {{"name": "{name}"}}"#),
            _ => format!(r#", {{"name": "{name}", "namespace": "{namespace}"}}"#),
        };
        return format!("{}{item}{}", &existing[..end], &existing[end..]);
    }
    if existing.split(',').any(|known| known.trim() == network) {
        return existing.to_owned();
    }
    format!("{existing}, {network}")
}

fn merge_maps<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let mut merged = BTreeMap::new();
    for index in 0..args.len() {
        merged.extend(args.text_map(index)?.entries());
    }
    Ok(Value::Map(if args.is_empty() { Map::nil(Element::Text) } else { Map::new(Element::Text, merged) }))
}

/// The value without nulls; `None` when it has none. What is empty then goes too.
fn omit_nil(value: &Json) -> Option<Json> {
    let nulls = match value {
        Json::Null => true,
        Json::Array(items) => items.iter().any(|item| omit_nil(item).is_some()),
        Json::Object(map) => map.values().any(|item| omit_nil(item).is_some()),
        _ => false,
    };
    if !nulls {
        return None;
    }
    let keep = |item: &Json| omit_nil(item).unwrap_or_else(|| item.clone());
    Some(match value {
        Json::Array(items) => {
            let kept: Vec<Json> = items.iter().map(keep).filter(|item| !item.is_null()).collect();
            if kept.is_empty() { Json::Null } else { Json::Array(kept) }
        }
        Json::Object(map) => {
            let kept: serde_json::Map<String, Json> =
                map.iter().map(|(key, item)| (key.clone(), keep(item))).filter(|(_, item)| !item.is_null()).collect();
            if kept.is_empty() { Json::Null } else { Json::Object(kept) }
        }
        _ => Json::Null,
    })
}

/// `OTEL_RESOURCE_ATTRIBUTES` when a provider asks for OpenTelemetry's conventions, else "".
fn otel_resource_attributes<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let mesh = match args.get(0) {
        Value::Typed(typed) => typed.data.clone(),
        other => other.to_json(),
    };
    let wanted = mesh["extensionProviders"].as_array().is_some_and(|providers| {
        providers
            .iter()
            .any(|provider| provider["opentelemetry"]["serviceAttributeEnrichment"] == "OTEL_SEMANTIC_CONVENTIONS")
    });
    if !wanted {
        return text("");
    }
    let lookup = |index: usize, key: &str| -> Option<String> {
        let value = args.text_map(index).ok()?.get(key)?;
        value.as_str().filter(|value| !value.is_empty()).map(str::to_owned)
    };
    let namespace = args.text(3)?;
    let containers = args.get(4).to_json();
    let containers = containers.as_array().map(Vec::as_slice).unwrap_or_default();
    let mut attributes = Vec::new();
    let annotated = |name: &str| lookup(1, &format!("resource.opentelemetry.io/{name}"));
    if let Some(value) =
        annotated("service.namespace").or_else(|| (!namespace.is_empty()).then(|| namespace.to_owned()))
    {
        attributes.push(format!("service.namespace={value}"));
    }
    let version = annotated("service.version").or_else(|| lookup(2, "app.kubernetes.io/version")).or_else(|| {
        let [container] = containers else { return None };
        image_version(container["image"].as_str().unwrap_or(""))
    });
    if let Some(version) = version {
        attributes.push(format!("service.version={version}"));
    }
    let instance = annotated("service.instance.id").or_else(|| {
        let name = containers.first()?["name"].as_str().unwrap_or("");
        // Kubernetes fills in the pod's name, which is not known yet.
        Some(format!("{namespace}.$(POD_NAME).{name}"))
    });
    if let Some(instance) = instance {
        attributes.push(format!("service.instance.id={instance}"));
    }
    text(attributes.join(","))
}

/// Tag, digest or both of an image reference.
fn image_version(image: &str) -> Option<String> {
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    let tag =
        name.rfind(':').filter(|colon| name.rfind('/').is_none_or(|slash| *colon > slash)).map(|at| &name[at + 1..]);
    match (tag.filter(|tag| !tag.is_empty()), digest) {
        (Some(tag), Some(digest)) => Some(format!("{tag}@{digest}")),
        (Some(version), None) | (None, Some(version)) => Some(version.to_owned()),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_excluded_once() {
        assert_eq!(exclude_inbound_port("15020", ""), "15020");
        assert_eq!(exclude_inbound_port("15020", "1, 2"), "1,2,15020");
        assert_eq!(exclude_inbound_port("2", "1,2"), "1,2");
        assert_eq!(exclude_inbound_port("0", "1"), "1");
    }

    #[test]
    fn image_versions() {
        assert_eq!(image_version("registry:5000/nginx"), None);
        assert_eq!(image_version("registry:5000/nginx:1.2").as_deref(), Some("1.2"));
        assert_eq!(image_version("nginx:1@sha256:a").as_deref(), Some("1@sha256:a"));
    }
}
