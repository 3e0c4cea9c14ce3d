//! The bootstraps of the behaviour corpus are accepted or refused as Envoy did.

use std::path::Path;

use proxy_core::{Bootstrap, Options};
use serde_json::Value;

use crate::reference::{folder, folders, yaml};

const TYPE: &str = "type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap";

/// Ports are numbered, everything else becomes a harmless text.
fn substituted(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    let mut ports: Vec<&str> = Vec::new();
    while let Some((before, after)) = rest.split_once("{{") {
        out.push_str(before);
        let (name, after) = after.split_once("}}").unwrap();
        rest = after;
        match name.strip_prefix("port.") {
            Some(port) => {
                let index = ports.iter().position(|p| *p == port).unwrap_or_else(|| {
                    ports.push(port);
                    ports.len() - 1
                });
                out.push_str(&(20_000 + index).to_string());
            }
            None if name.starts_with("jwks") => out.push_str(r#"{"keys":[{"kty":"RSA"}]}"#),
            None => out.push_str("somewhere"),
        }
    }
    out + rest
}

fn compile(case: &Path) -> Result<Bootstrap, String> {
    let text = std::fs::read_to_string(case.join("bootstrap.yaml")).unwrap();
    let value = yaml(&substituted(&text));
    let bytes = envoy_api::json::from_json(TYPE, &value).map_err(|e| e.to_string())?;
    let message = envoy_api::Message::decode(bytes.as_slice()).map_err(|e| e.to_string())?;
    Bootstrap::compile(&message, &Options::default()).map_err(|e| e.to_string())
}

#[test]
fn bootstraps_are_accepted_as_envoy_accepts_them() {
    let Some(cases) = folder("proxy/cases") else { return };
    let mut wrong = Vec::new();
    for case in folders(&cases) {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let expected: Value =
            serde_json::from_str(&std::fs::read_to_string(case.join("expected.json")).unwrap()).unwrap();
        let record = &expected["record"];
        // Only the validation cases say it in words; all others ran.
        let accepted = match record.get("validate").or_else(|| record.get("accepted")) {
            Some(Value::Bool(accepted)) => *accepted,
            Some(Value::String(word)) => word == "accepted",
            _ => true,
        };
        match (accepted, compile(&case)) {
            (true, Err(reason)) => wrong.push(format!("{name}: refused: {reason}")),
            (false, Ok(_)) => wrong.push(format!("{name}: accepted, but Envoy refuses it")),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
