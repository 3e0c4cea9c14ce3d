//! Does the API server reach the control plane, and is every pod injected just once?

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_types::Labels;
use serde_json::Value;

use crate::message::{Level, Message};
use crate::world::{Resource, World, label_selector_fits, list_text};

const GROUP: &str = "admissionregistration.k8s.io";
const REVISION: &str = "istio.io/rev";

fn hooks<'a>(resource: &Resource<'a>) -> &'a [Value] {
    resource.list("/webhooks")
}

fn name_of(hook: &Value) -> &str {
    hook["name"].as_str().unwrap_or_default()
}

/// The revisions that a webhook is for.
fn revisions(resource: &Resource<'_>) -> BTreeSet<String> {
    let mut out: BTreeSet<String> = resource.labels.get(REVISION).cloned().into_iter().collect();
    for selector in hooks(resource).iter().flat_map(|hook| [&hook["namespaceSelector"], &hook["objectSelector"]]) {
        out.extend(selector["matchLabels"][REVISION].as_str().map(str::to_owned));
        for expression in selector["matchExpressions"].as_array().into_iter().flatten() {
            if expression["key"] == REVISION {
                let values = expression["values"].as_array().into_iter().flatten();
                out.extend(values.filter_map(|value| Some(value.as_str()?.to_owned())));
            }
        }
    }
    out
}

/// Labels that steer injection: none, yes, no; each for no revision and for every known one.
fn choices(key: &str, values: [&str; 2], revisions: &BTreeSet<String>) -> Vec<Labels> {
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let plain = [Labels::new(), Labels::from([pair(key, values[0])]), Labels::from([pair(key, values[1])])];
    let mut out = plain.to_vec();
    for revision in revisions {
        out.extend(plain.iter().cloned().map(|mut labels| {
            labels.extend([pair(REVISION, revision)]);
            labels
        }));
    }
    out
}

pub(super) fn injectors(world: &World<'_>, out: &mut Vec<Message>) {
    let is_istios = |r: &&Resource<'_>| hooks(r).iter().any(|hook| name_of(hook).ends_with("istio.io"));
    let all = world.all(GROUP, "MutatingWebhookConfiguration").iter();
    let ours: Vec<_> = all.filter(|r| !revisions(r).is_empty() || is_istios(r)).collect();
    let known: BTreeSet<String> = ours.iter().flat_map(|r| revisions(r)).collect();
    let mut invalid = |resource: &Resource<'_>, hook: &Value, text: String| {
        let index = hooks(resource).iter().position(|other| std::ptr::eq(other, hook)).unwrap_or_default();
        let message = Message::new("IST0139", Level::Error, resource, text);
        out.push(message.at(resource, &format!("webhooks[{index}]")));
    };
    for namespace in choices("istio-injection", ["enabled", "disabled"], &known) {
        for object in choices("sidecar.istio.io/inject", ["true", "false"], &known) {
            let mut fitting: BTreeMap<String, (&Resource<'_>, &Value)> = BTreeMap::new();
            for (resource, hook) in ours.iter().flat_map(|r| hooks(r).iter().map(move |hook| (*r, hook))) {
                if label_selector_fits(&hook["namespaceSelector"], &namespace)
                    && label_selector_fits(&hook["objectSelector"], &object)
                {
                    fitting.insert(format!("{}/{}", resource.name, name_of(hook)), (resource, hook));
                }
            }
            for (name, (resource, hook)) in fitting.iter().filter(|_| fitting.len() > 1) {
                let others: Vec<&String> = fitting.keys().filter(|other| *other != name).collect();
                let others = list_text(&others);
                let text = format!("Webhook overlaps with others: {others}. This may cause injection to occur twice.");
                invalid(resource, hook, text);
            }
        }
    }
    for (resource, hook) in ours.iter().flat_map(|r| hooks(r).iter().map(move |hook| (*r, hook))) {
        let service = &hook["clientConfig"]["service"];
        let text = |key: &str| service[key].as_str().unwrap_or_default();
        let exists = |s: &Resource<'_>| s.name == text("name") && s.namespace == text("namespace");
        if !service.is_null() && !world.all("", "Service").iter().any(exists) {
            let service = format!("{}/{}", text("namespace"), text("name"));
            let text = format!("Injector refers to a control plane service that does not exist: {service}.");
            invalid(resource, hook, text);
        }
    }
}

/// The host of a URL; nothing if it is none.
fn host_of(url: &str) -> Option<&str> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let is_scheme = !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    let plain = !url.chars().any(|c| c.is_control() || c == ' ');
    let host = match host.strip_prefix('[') {
        Some(inside) => inside.split_once(']')?.0,
        None => host.split(':').next().unwrap_or_default(),
    };
    (is_scheme && plain).then_some(host)
}

/// A control plane outside of the cluster.
pub(super) fn external(world: &World<'_>, out: &mut Vec<Message>) {
    let validating = world.all(GROUP, "ValidatingWebhookConfiguration").iter();
    let validating =
        validating.filter(|r| r.name == "istiod-default-validator" || r.name.starts_with("istio-validator"));
    let mutating = world.all(GROUP, "MutatingWebhookConfiguration").iter();
    let mutating = mutating.filter(|r| r.name.starts_with("istio-sidecar-injector"));
    for resource in validating.chain(mutating) {
        for (index, hook) in hooks(resource).iter().enumerate() {
            let name = name_of(hook);
            let client = &hook["clientConfig"];
            let field = format!("webhooks[{index}].clientConfig");
            let mut invalid = |url: &str, why: &str| {
                let text = format!(
                    "The hostname ({url}) that was provided for the webhook ({name}) to reach the ingress gateway on the external \
                     control plane cluster {why}. Traffic may not flow properly."
                );
                out.push(Message::new("IST0163", Level::Warning, resource, text).at(resource, &field));
            };
            match client["url"].as_str() {
                Some(url) => match host_of(url) {
                    None => invalid(url, "was provided in an invalid format"),
                    Some(host) if host.parse::<IpAddr>().is_ok() => {
                        let text = format!(
                            "The address ({url}) that was provided for the webhook ({name}) to reach the ingress gateway on the \
                             external control plane cluster is an IP address. This is not recommended for a production \
                             environment."
                        );
                        out.push(Message::new("IST0164", Level::Info, resource, text).at(resource, &field));
                    }
                    Some(_) => {}
                },
                None if client["service"].is_null() => invalid("", "is blank"),
                None => {}
            }
        }
    }
}
