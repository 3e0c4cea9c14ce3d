//! Kubernetes' and Istio's object types as data: their Go names, JSON names and merge rules.
//!
//! One table serves three ends: templates read pods and mesh configuration by Go field names, strategic
//! merge needs the keys of lists, and objects are written back as Go would write them.

mod normal;
mod proto;
mod quantity;
mod view;

use std::collections::HashMap;
use std::sync::LazyLock;

pub(crate) use normal::{Mismatch, decode, normalise, scalar_text, texts, unknown};
pub(crate) use proto::{camel_case, message, overlay};
pub(crate) use quantity::canonical as canonical_quantity;
pub(crate) use view::view;

/// A struct type.
#[derive(Debug)]
pub(crate) struct TypeDef {
    /// As Go prints it, such as `v1.Container`.
    pub(crate) name: String,
    pub(crate) fields: Vec<Field>,
    /// Fields by JSON name, those of embedded structs among them, in Go's order.
    pub(crate) json: Vec<(&'static str, (usize, usize))>,
    by_json: HashMap<&'static str, (usize, usize)>,
    by_go: HashMap<&'static str, (usize, usize)>,
    index: usize,
}

/// A field of a struct type.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) go: &'static str,
    pub(crate) json: &'static str,
    pub(crate) kind: Kind,
    pub(crate) omit_empty: bool,
    pub(crate) omit_zero: bool,
    pub(crate) inline: bool,
    /// Items of the list are merged by this field.
    pub(crate) merge_key: Option<&'static str>,
    /// A list of scalars that is united.
    pub(crate) set: bool,
    /// The oneof that the field is a member of.
    pub(crate) oneof: Option<&'static str>,
}

/// How a value is typed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    Text,
    Bool,
    /// The Go type's name.
    Int(&'static str),
    Float,
    Quantity,
    Time,
    IntOrString,
    Bytes,
    Any,
    /// Index of the type.
    Struct(usize),
    Pointer(Box<Kind>),
    List(Box<Kind>),
    Map(Box<Kind>),
    /// Index of the enum.
    Enum(usize),
    Duration,
    /// A protobuf wrapper, by its Go name.
    Wrapped(&'static str),
}

/// A protobuf enum.
#[derive(Debug)]
pub(crate) struct EnumDef {
    pub(crate) go: String,
    /// Names; the index is the number.
    pub(crate) names: Vec<&'static str>,
}

pub(crate) struct Schema {
    types: Vec<TypeDef>,
    enums: Vec<EnumDef>,
    names: HashMap<&'static str, usize>,
}

static SCHEMA: LazyLock<Schema> = LazyLock::new(Schema::load);

/// The type of that name in the tables. Asking for one that is not there is a mistake in this crate.
pub(crate) fn named(name: &str) -> &'static TypeDef {
    find(name).expect("the type is in the tables, see the test below")
}

/// The type of that name, if the tables have it.
pub(crate) fn find(name: &str) -> Option<&'static TypeDef> {
    SCHEMA.names.get(name).map(|index| &SCHEMA.types[*index])
}

impl TypeDef {
    /// The field that JSON calls so.
    pub(crate) fn by_json(&self, name: &str) -> Option<&'static Field> {
        self.by_json.get(name).map(|(ty, field)| &SCHEMA.types[*ty].fields[*field])
    }

    /// The field that Go calls so, also of an embedded struct.
    pub(crate) fn by_go(&self, name: &str) -> Option<&'static Field> {
        self.by_go.get(name).map(|(ty, field)| &SCHEMA.types[*ty].fields[*field])
    }

    /// All fields that JSON shows, in Go's order.
    pub(crate) fn all(&self) -> impl Iterator<Item = &'static Field> {
        self.json.iter().map(|(_, (ty, field))| &SCHEMA.types[*ty].fields[*field])
    }
}

impl Kind {
    pub(crate) fn definition(&self) -> Option<&'static TypeDef> {
        match self {
            Self::Struct(index) => Some(&SCHEMA.types[*index]),
            Self::Pointer(inner) => inner.definition(),
            _ => None,
        }
    }
}

pub(crate) fn enumeration(index: usize) -> &'static EnumDef {
    &SCHEMA.enums[index]
}

const TABLES: [(&str, &str); 2] =
    [("v1", include_str!("schema/kubernetes.types")), ("v1alpha1", include_str!("schema/mesh.types"))];

impl Schema {
    fn load() -> Self {
        let mut schema = Self { types: Vec::new(), enums: Vec::new(), names: HashMap::new() };
        let mut enums = HashMap::new();
        let lines = || {
            TABLES.iter().flat_map(|(package, text)| {
                text.lines().filter(|line| !line.starts_with('#')).map(move |line| (*package, line))
            })
        };
        // First the names, so that fields can point at types that come later.
        for (package, line) in lines() {
            if let Some(words) = line.strip_prefix("enum ") {
                let mut words = words.split(' ');
                let name = words.next().unwrap_or_default();
                enums.insert(name, schema.enums.len());
                schema.enums.push(EnumDef { go: format!("{package}.{name}"), names: words.collect() });
            } else if !line.starts_with(' ') {
                // Both tables have label selectors; Kubernetes' come first and mean the same.
                let index = schema.types.len();
                schema.names.entry(line).or_insert(index);
                schema.types.push(TypeDef {
                    name: format!("{package}.{line}"),
                    fields: Vec::new(),
                    json: Vec::new(),
                    by_json: HashMap::new(),
                    by_go: HashMap::new(),
                    index,
                });
            }
        }
        let mut at = 0;
        for (_, line) in lines() {
            if line.starts_with("  ") {
                let field = schema.field(line.trim_start(), &enums);
                schema.types[at - 1].fields.push(field);
            } else if !line.starts_with("enum ") {
                at += 1;
            }
        }
        for index in 0..schema.types.len() {
            let mut all = Vec::new();
            schema.flatten(index, &mut all);
            let ty = &schema.types[index];
            let go: HashMap<_, _> = ty.fields.iter().enumerate().map(|(at, field)| (field.go, (index, at))).collect();
            let mut by_go: HashMap<_, _> =
                all.iter().map(|(ty, at)| (schema.types[*ty].fields[*at].go, (*ty, *at))).collect();
            by_go.extend(go);
            let json: Vec<_> = all.iter().map(|(ty, at)| (schema.types[*ty].fields[*at].json, (*ty, *at))).collect();
            let by_json = json.iter().copied().collect();
            let ty = &mut schema.types[index];
            ty.by_go = by_go;
            ty.json = json;
            ty.by_json = by_json;
        }
        schema
    }

    /// Fields of a type and of the structs that it embeds.
    fn flatten(&self, index: usize, all: &mut Vec<(usize, usize)>) {
        for (at, field) in self.types[index].fields.iter().enumerate() {
            match field.kind {
                Kind::Struct(inner) if field.inline => self.flatten(inner, all),
                _ => all.push((index, at)),
            }
        }
    }

    fn field(&self, line: &'static str, enums: &HashMap<&str, usize>) -> Field {
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap_or_default();
        let (go, json, kind) = (word(), word(), word());
        let mut field = Field {
            go,
            json,
            kind: self.kind(kind, enums),
            omit_empty: false,
            omit_zero: false,
            inline: false,
            merge_key: None,
            set: false,
            oneof: None,
        };
        for flag in words {
            match flag.split_once('=') {
                Some(("k", key)) => field.merge_key = Some(key),
                Some(("1", group)) => {
                    field.oneof = Some(group);
                    field.omit_empty = true;
                }
                _ => match flag {
                    "o" => field.omit_empty = true,
                    "z" => field.omit_zero = true,
                    "i" => field.inline = true,
                    "s" => field.set = true,
                    _ => {}
                },
            }
        }
        field
    }

    fn kind(&self, text: &'static str, enums: &HashMap<&str, usize>) -> Kind {
        if let Some(inner) = text.strip_prefix('*') {
            return Kind::Pointer(Box::new(self.kind(inner, enums)));
        }
        if let Some(inner) = text.strip_prefix("[]") {
            return Kind::List(Box::new(self.kind(inner, enums)));
        }
        if let Some(inner) = text.strip_prefix("{}") {
            return Kind::Map(Box::new(self.kind(inner, enums)));
        }
        if let Some(name) = text.strip_prefix('@') {
            return self.names.get(name).map_or(Kind::Any, |index| Kind::Struct(*index));
        }
        if let Some(name) = text.strip_prefix("wrapped:") {
            return Kind::Wrapped(name);
        }
        if let Some(name) = text.strip_prefix("enum:") {
            return enums.get(name).map_or(Kind::Text, |index| Kind::Enum(*index));
        }
        match text {
            "string" => Kind::Text,
            "bool" => Kind::Bool,
            "float64" => Kind::Float,
            "quantity" => Kind::Quantity,
            "time" => Kind::Time,
            "intstr" => Kind::IntOrString,
            "bytes" => Kind::Bytes,
            "duration" => Kind::Duration,
            "int32" | "int64" | "uint32" | "uint64" => Kind::Int(text),
            _ => Kind::Any,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_complete() {
        for name in ["Pod", "PodSpec", "ObjectMeta", "Container", "Volume", "ProxyConfig", "MeshConfig", "Deployment"] {
            assert!(find(name).is_some(), "{name}");
        }
        let container = named("Container");
        assert_eq!(container.by_go("VolumeMounts").unwrap().merge_key, Some("mountPath"));
        assert_eq!(named("Volume").by_go("EmptyDir").unwrap().json, "emptyDir");
        assert_eq!(named("Volume").by_json("emptyDir").unwrap().go, "EmptyDir");
        for ty in &SCHEMA.types {
            for field in &ty.fields {
                assert!(!field.go.is_empty() && !field.json.is_empty(), "{}", ty.name);
            }
        }
    }
}
