//! Writes what Envoy's API asks of its fields (protoc-gen-validate's options) as text: `rules.txt` of `proxy-core`, where
//! `src/rules.rs` reads it.
//!
//! Usage: `cargo run -p envoy-api --example validation_rules -- TYPES_BIN rules.txt`, where TYPES_BIN is
//! `src/generated/types.bin` of the `envoy-types` package at the pinned version.
//!
//! Each message that has rules or durations, or has fields of messages that have, is a line with its name. The lines behind it are its fields: number,
//! name, type, rules, with tabs between them. `*` before a type is a list, `?` one that knows whether it was set. A oneof
//! that must be set is `oneof`, its name, and the numbers of its fields.

use std::collections::HashSet;
use std::fmt::Write as _;

use prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, ExtensionDescriptor, FieldDescriptor, Kind, MessageDescriptor, Value,
};

/// Packages of configuration; services and what is logged are not configured.
const PACKAGES: [&str; 5] = ["envoy.config.", "envoy.extensions.", "envoy.type.", "xds.", "udpa."];

struct Rules {
    field: ExtensionDescriptor,
    oneof: ExtensionDescriptor,
}

impl Rules {
    /// The rules of a field, one to a token.
    fn of(&self, field: &FieldDescriptor) -> Vec<String> {
        let options = field.options();
        let mut out = Vec::new();
        if options.has_extension(&self.field)
            && let Value::Message(rules) = options.get_extension(&self.field).as_ref()
        {
            let kinds = enums(field);
            rules
                .fields()
                .filter_map(|(_, value)| value.as_message().cloned())
                .for_each(|m| tokens(&m, "", &kinds, &mut out));
        }
        // One of several that is not chosen may be missing, whatever is asked of it.
        if field.containing_oneof().is_some_and(|oneof| !oneof.is_synthetic()) {
            out.retain(|rule| rule != "required=true");
        }
        out
    }

    fn oneofs(&self, message: &MessageDescriptor) -> Vec<String> {
        let required = message.oneofs().filter(|oneof| {
            let options = oneof.options();
            options.has_extension(&self.oneof) && options.get_extension(&self.oneof).as_bool() == Some(true)
        });
        required
            .map(|oneof| {
                let numbers: Vec<String> = oneof.fields().map(|f| f.number().to_string()).collect();
                format!("oneof\t{}\t{}", oneof.name(), numbers.join(","))
            })
            .collect()
    }
}

/// The values of a field's enum.
fn enums(field: &FieldDescriptor) -> String {
    match field.kind() {
        Kind::Enum(kind) => kind.values().map(|v| v.number().to_string()).collect::<Vec<_>>().join(","),
        _ => String::new(),
    }
}

fn tokens(rules: &DynamicMessage, prefix: &str, values: &str, out: &mut Vec<String>) {
    for (rule, value) in rules.fields() {
        match (rule.name(), value) {
            (name @ ("items" | "keys" | "values"), Value::Message(inner)) => {
                for of in inner.fields().filter_map(|(_, value)| value.as_message().cloned()) {
                    tokens(&of, &format!("{name}."), values, out);
                }
            }
            // A rule that does not hold. Headers' rules are strict where nothing is said.
            (name, Value::Bool(false)) if name != "strict" => {}
            ("defined_only", _) => out.push(format!("{prefix}defined={values}")),
            (name, Value::List(list)) => {
                let list: Vec<String> = list.iter().map(shown).collect();
                out.push(format!("{prefix}{name}={}", list.join(",")));
            }
            (name, value) => out.push(format!("{prefix}{name}={}", shown(value))),
        }
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Bool(v) => v.to_string(),
        Value::I32(v) | Value::EnumNumber(v) => v.to_string(),
        Value::I64(v) => v.to_string(),
        Value::U32(v) => v.to_string(),
        Value::U64(v) => v.to_string(),
        Value::F32(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        Value::String(v) => v.clone(),
        Value::Message(duration) => {
            let part = |name| {
                duration.get_field_by_name(name).map(|v| v.as_i64().or(v.as_i32().map(i64::from)).unwrap_or_default())
            };
            format!("{}.{:09}", part("seconds").unwrap_or_default(), part("nanos").unwrap_or_default())
        }
        other => panic!("no such rule: {other:?}"),
    }
}

fn type_of(kind: &Kind) -> String {
    match kind {
        Kind::Message(message) => match message.full_name() {
            "google.protobuf.Any" => "any".to_owned(),
            "google.protobuf.Duration" => "duration".to_owned(),
            name => format!(".{name}"),
        },
        Kind::Enum(_) => "enum".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// The message whose rules count for a field's value.
fn inner(field: &FieldDescriptor) -> Option<MessageDescriptor> {
    let kind = match field.kind() {
        Kind::Message(entry) if entry.is_map_entry() => entry.map_entry_value_field().kind(),
        kind => kind,
    };
    kind.as_message().cloned()
}

/// Durations have bounds without any rule.
fn is_duration(field: &FieldDescriptor) -> bool {
    inner(field).is_some_and(|message| message.full_name() == "google.protobuf.Duration")
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, input, output] = args.as_slice() else {
        return Err("usage: validation_rules TYPES_BIN OUTPUT".into());
    };
    let pool = DescriptorPool::decode(std::fs::read(input)?.as_slice())?;
    let extension = |name| pool.get_extension_by_name(name).ok_or("no validation rules in there");
    let rules = Rules { field: extension("validate.rules")?, oneof: extension("validate.required")? };
    let configured = |m: &MessageDescriptor| !m.is_map_entry() && PACKAGES.iter().any(|p| m.full_name().starts_with(p));
    let mut messages: Vec<MessageDescriptor> = pool.all_messages().filter(configured).collect();
    messages.sort_by(|a, b| a.full_name().cmp(b.full_name()));
    // Fixed point: a message matters when it has rules, or a field of a message that matters.
    let mut matter: HashSet<String> = HashSet::new();
    loop {
        let before = matter.len();
        for message in &messages {
            let leads = |field: FieldDescriptor| {
                !rules.of(&field).is_empty()
                    || is_duration(&field)
                    || inner(&field).is_some_and(|m| matter.contains(m.full_name()))
            };
            if !rules.oneofs(message).is_empty() || message.fields().any(leads) {
                matter.insert(message.full_name().to_owned());
            }
        }
        if matter.len() == before {
            break;
        }
    }
    let mut text = String::new();
    for message in messages.iter().filter(|m| matter.contains(m.full_name())) {
        writeln!(text, "{}", message.full_name())?;
        for field in message.fields() {
            let own = rules.of(&field);
            if own.is_empty() && !is_duration(&field) && !inner(&field).is_some_and(|m| matter.contains(m.full_name()))
            {
                continue;
            }
            let kind = match field.kind() {
                Kind::Message(entry) if entry.is_map_entry() => {
                    format!(
                        "map {} {}",
                        type_of(&entry.map_entry_key_field().kind()),
                        type_of(&entry.map_entry_value_field().kind())
                    )
                }
                kind if field.cardinality() == Cardinality::Repeated => format!("*{}", type_of(&kind)),
                kind if field.supports_presence() => format!("?{}", type_of(&kind)),
                kind => type_of(&kind),
            };
            writeln!(
                text,
                "{}",
                [vec![field.number().to_string(), field.name().to_owned(), kind], own].concat().join("\t")
            )?;
        }
        for oneof in rules.oneofs(message) {
            writeln!(text, "{oneof}")?;
        }
    }
    Ok(std::fs::write(output, text)?)
}
