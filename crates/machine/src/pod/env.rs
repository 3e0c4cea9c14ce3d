//! A container's environment, command and arguments as Kubernetes forms them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, EnvVarSource};

use super::facts::{Data, Facts};

/// `PATH` of containers that set none, as in most images.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The environment, in the order written (later entries may refer to earlier ones with `$(NAME)`).
///
/// An error is a sentence for the container's `CreateContainerConfigError`.
pub(crate) fn environment(container: &Container, facts: &Facts, data: &Data) -> Result<Vec<(String, String)>, String> {
    let mut env = Environment::default();
    env.set("PATH", PATH.to_owned());
    env.set("HOSTNAME", facts.hostname());
    env.set("HOME", if super::security::user(&facts.pod, container).0 == 0 { "/root" } else { "/" }.to_owned());
    for (key, value) in &facts.service_links {
        env.set(key, value.clone());
    }
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        let (kind, name, optional, found) = if let Some(reference) = &source.config_map_ref {
            let found = data.config_maps.get(&(facts.namespace().to_owned(), reference.name.clone()));
            ("configmap", &reference.name, reference.optional, found)
        } else if let Some(reference) = &source.secret_ref {
            let found = data.secrets.get(&(facts.namespace().to_owned(), reference.name.clone()));
            ("secret", &reference.name, reference.optional, found)
        } else {
            continue;
        };
        match found {
            Some(values) => {
                for (key, value) in values.iter() {
                    env.set(&format!("{prefix}{key}"), String::from_utf8_lossy(value).into_owned());
                }
            }
            None if optional == Some(true) => {}
            None => return Err(format!("{kind} {name:?} not found (envFrom of container {})", container.name)),
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match &variable.value_from {
            None => expand(variable.value.as_deref().unwrap_or_default(), &env.values),
            Some(source) => match referenced(container, source, facts, data, &variable.name)? {
                Some(value) => value,
                None => continue,
            },
        };
        env.set(&variable.name, value);
    }
    Ok(env.into_list())
}

/// Expands `$(NAME)` in a command or argument.
pub(crate) fn expand_all(texts: &[String], env: &[(String, String)]) -> Vec<String> {
    let values: BTreeMap<String, String> = env.iter().cloned().collect();
    texts.iter().map(|text| expand(text, &values)).collect()
}

#[derive(Default)]
struct Environment {
    order: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Environment {
    fn set(&mut self, name: &str, value: String) {
        if self.values.insert(name.to_owned(), value).is_none() {
            self.order.push(name.to_owned());
        }
    }

    fn into_list(mut self) -> Vec<(String, String)> {
        let order = std::mem::take(&mut self.order);
        order.into_iter().filter_map(|name| self.values.remove(&name).map(|value| (name, value))).collect()
    }
}

fn referenced(
    container: &Container,
    source: &EnvVarSource,
    facts: &Facts,
    data: &Data,
    variable: &str,
) -> Result<Option<String>, String> {
    if let Some(field) = &source.field_ref {
        return facts.field(field).map(Some).ok_or_else(|| {
            format!("env {variable} of container {}: fieldPath {:?} is not supported", container.name, field.field_path)
        });
    }
    if let Some(resource) = &source.resource_field_ref {
        return facts.resource(container, resource).map(Some).ok_or_else(|| {
            format!("env {variable} of container {}: resource {:?} is not supported", container.name, resource.resource)
        });
    }
    let (kind, name, key, optional, found) = if let Some(reference) = &source.config_map_key_ref {
        let found = data.config_maps.get(&(facts.namespace().to_owned(), reference.name.clone()));
        ("configmap", &reference.name, &reference.key, reference.optional, found)
    } else if let Some(reference) = &source.secret_key_ref {
        let found = data.secrets.get(&(facts.namespace().to_owned(), reference.name.clone()));
        ("secret", &reference.name, &reference.key, reference.optional, found)
    } else {
        return Err(format!("env {variable} of container {}: this kind of valueFrom is not supported", container.name));
    };
    match found.and_then(|values| values.get(key)) {
        Some(value) => Ok(Some(String::from_utf8_lossy(value).into_owned())),
        None if optional == Some(true) => Ok(None),
        None if found.is_none() => {
            Err(format!("{kind} {name:?} not found (env {variable} of container {})", container.name))
        }
        None => Err(format!("{kind} {name:?} has no key {key:?} (env {variable} of container {})", container.name)),
    }
}

/// As Kubernetes `third_party/forked/golang/expansion`: `$$` is `$`, unknown references stay as they are.
fn expand(text: &str, values: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            match values.get(name) {
                Some(value) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_expand_as_in_kubernetes() {
        let values = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        for (text, expected) in
            [("$(A)-x", "1-x"), ("$$(A)", "$(A)"), ("$(B)", "$(B)"), ("$A $", "$A $"), ("$(A", "$(A"), ("$$$(A)", "$1")]
        {
            assert_eq!(expand(text, &values), expected, "{text}");
        }
    }
}
