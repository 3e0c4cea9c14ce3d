//! `outrigger inject render`: a template over data, for tests and for users who write templates.

use std::rc::Rc;

use anyhow::Context;
use go_template::{Limits, Record, Template, Value as Data};
use serde_json::{Value, json};

use super::embedded;
use crate::functions::FUNCTIONS;
use crate::schema;
use crate::yaml;

/// Renders `template` over `data` (YAML or JSON).
///
/// Data as injection has it carries the JSON of its typed parts in `ObjectMetaJSON`, `SpecJSON`,
/// `ProxyConfigJSON` and `MeshConfigJSON`; then `ObjectMeta`, `Spec`, `ProxyConfig` and `MeshConfig` are
/// the typed objects. Any other data is what it is.
///
/// # Errors
/// Data that is no mapping, a template that cannot be parsed or fails.
pub fn render(template: &str, data_name: &str, data: &str) -> anyhow::Result<String> {
    // JSON first: it may hold what YAML reads in another way.
    let data = match serde_json::from_str::<Value>(data) {
        Ok(data) => data,
        Err(_) => yaml::mapping(data_name, data).context("cannot read the data")?,
    };
    let template = Template::parse("inject", template, &FUNCTIONS)?;
    let typed = Typed::of(&data);
    Ok(template.render(typed.view(&data), Limits::default())?)
}

/// The typed parts of the data.
struct Typed {
    parts: Vec<(&'static str, &'static str, Value)>,
}

impl Typed {
    fn of(data: &Value) -> Self {
        let mut parts = Vec::new();
        for (name, ty, key) in [
            ("ObjectMeta", "ObjectMeta", "ObjectMetaJSON"),
            ("Spec", "PodSpec", "SpecJSON"),
            ("MeshConfig", "MeshConfig", "MeshConfigJSON"),
        ] {
            if let Some(value) = embedded(&data[key]) {
                parts.push((name, ty, value));
            }
        }
        if let Some(own) = embedded(&data["ProxyConfigJSON"]) {
            // Its JSON leaves out what is as in the mesh's defaults.
            let mesh = embedded(&data["MeshConfigJSON"]).unwrap_or_else(|| json!({}));
            let mut proxy = mesh["defaultConfig"].clone();
            if !proxy.is_object() {
                proxy = json!({});
            }
            schema::overlay(schema::named("ProxyConfig"), &mut proxy, &own);
            parts.push(("ProxyConfig", "ProxyConfig", proxy));
        }
        Self { parts }
    }

    fn view<'a>(&'a self, data: &'a Value) -> Data<'a> {
        let Some(map) = data.as_object().filter(|_| !self.parts.is_empty()) else { return Data::from_json(data) };
        const NAMES: [&str; 11] = [
            "TypeMeta",
            "DeploymentMeta",
            "Values",
            "Revision",
            "NativeSidecars",
            "ProxyImage",
            "ProxyInitImage",
            "ProxyUID",
            "ProxyGID",
            "InboundTrafficPolicyMode",
            "CompliancePolicy",
        ];
        let mut fields: Vec<(&'static str, Data<'a>)> = Vec::new();
        for (name, ty, value) in &self.parts {
            fields.push((name, schema::view(schema::named(ty), value)));
        }
        for name in NAMES {
            match map.get(name) {
                Some(Value::Number(number)) if number.is_i64() => {
                    fields.push((name, Data::Int(number.as_i64().unwrap_or(0), "int64")));
                }
                Some(value) => fields.push((name, Data::from_json(value))),
                None => {}
            }
        }
        Data::Record(Rc::new(Record { name: "inject.SidecarTemplateData", fields }))
    }
}
