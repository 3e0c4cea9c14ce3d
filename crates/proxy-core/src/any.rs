//! Opening `Any`: the type's name and its message, also when it comes as a `TypedStruct`.

use envoy_api::istio::{TypedStruct, XdsTypedStruct};
use prost::{Message, Name};
use serde_json::{Map, Value};

use crate::metadata;
use crate::pb;
use crate::rejected::{Compiled, Invalid};
use crate::rules;

/// An opened `Any`.
pub(crate) struct Typed<'a> {
    /// Full name of the message, without the host before the slash.
    pub(crate) name: String,
    body: Body<'a>,
}

enum Body<'a> {
    Bytes(&'a [u8]),
    /// The JSON form out of a `TypedStruct`.
    Fields(Map<String, Value>),
    /// A service is to bring it.
    Awaited,
}

/// Filters of Wasm, which istiod has brought by a service, so that proxies get the code first.
const WASM: [&str; 2] = ["envoy.extensions.filters.http.wasm.v3.Wasm", "envoy.extensions.filters.network.wasm.v3.Wasm"];

impl<'a> Typed<'a> {
    /// Fails if nothing is there, or a wrapper is malformed.
    pub(crate) fn open(any: Option<&'a pb::Any>) -> Compiled<Self> {
        let any = any.ok_or_else(|| Invalid::new("typed_config", "is missing"))?;
        let name = type_name(&any.type_url);
        let (url, fields) = if name == TypedStruct::full_name() {
            let wrapper = decode::<TypedStruct>(&any.value, name)?;
            (wrapper.type_url, wrapper.value)
        } else if name == XdsTypedStruct::full_name() {
            let wrapper = decode::<XdsTypedStruct>(&any.value, name)?;
            (wrapper.type_url, wrapper.value)
        } else {
            return Ok(Self { name: name.to_owned(), body: Body::Bytes(&any.value) });
        };
        let fields = fields.as_ref().map(metadata::object).unwrap_or_default();
        Ok(Self { name: type_name(&url).to_owned(), body: Body::Fields(fields) })
    }

    /// A filter that a service is to bring. There is no such service here, but where the filter may be one of Wasm it is known not to be
    /// supported, whatever comes.
    pub(crate) fn discovered(source: &pb::core::ExtensionConfigSource) -> Compiled<Self> {
        let name = source.type_urls.iter().map(|url| type_name(url)).find(|name| WASM.contains(name));
        let name = name.ok_or_else(|| Invalid::unsupported("config_discovery"))?;
        Ok(Self { name: name.to_owned(), body: Body::Awaited })
    }

    /// The message, which the caller has chosen by [`name`](Typed::name).
    ///
    /// Only a `TypedStruct` of an Envoy type needs the descriptor pool here; nothing that istiod sends by default does.
    pub(crate) fn decode<M: Message + Default>(&self) -> Compiled<M> {
        self.checked(rules::check_encoded)
    }

    /// The same where Envoy takes a message as it is, whatever its rules say.
    pub(crate) fn decode_unchecked<M: Message + Default>(&self) -> Compiled<M> {
        self.checked(|_, _| Ok(()))
    }

    fn checked<M: Message + Default>(&self, check: fn(&str, &[u8]) -> Compiled<()>) -> Compiled<M> {
        let decode = |bytes: &[u8]| {
            let message = decode(bytes, &self.name)?;
            check(&self.name, bytes)?;
            Ok(message)
        };
        match &self.body {
            Body::Bytes(bytes) => decode(bytes),
            Body::Fields(fields) => {
                let url = format!("type.googleapis.com/{}", self.name);
                let bytes = envoy_api::json::from_json(&url, &Value::Object(fields.clone()))
                    .map_err(|e| Invalid::new("typed_config.value", chain(&e)))?;
                decode(&bytes)
            }
            Body::Awaited => Err(self.unknown()),
        }
    }

    /// The fields of a `TypedStruct`. Istio's own messages that have no type here must come as one.
    pub(crate) fn fields(&self) -> Compiled<Map<String, Value>> {
        match &self.body {
            Body::Bytes([]) => Ok(Map::new()),
            Body::Bytes(_) => Err(Invalid::new("typed_config", format!("{} must come as a TypedStruct", self.name))),
            Body::Fields(fields) => Ok(fields.clone()),
            Body::Awaited => Err(self.unknown()),
        }
    }

    /// "this filter is not known here", with the type's name.
    pub(crate) fn unknown(&self) -> Invalid {
        let field = if matches!(self.body, Body::Awaited) { "config_discovery" } else { "typed_config" };
        Invalid::new(field, format!("{} is not supported", self.name))
    }
}

fn type_name(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or_default()
}

fn decode<M: Message + Default>(bytes: &[u8], name: &str) -> Compiled<M> {
    M::decode(bytes).map_err(|e| Invalid::new("typed_config", format!("malformed {name}: {e}")))
}

/// An error with its causes in one line, since a NACK is one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_service_is_to_bring_is_wasm_or_not_to_be_had() {
        let of = |types: &[&str]| {
            let type_urls = types.iter().map(|name| format!("type.googleapis.com/{name}")).collect();
            pb::core::ExtensionConfigSource { type_urls, ..Default::default() }
        };
        const RBAC: &str = "envoy.extensions.filters.http.rbac.v3.RBAC";
        let source = of(&[RBAC, WASM[0]]);
        let typed = Typed::discovered(&source).unwrap();
        assert_eq!(typed.name, WASM[0]);
        let refused = typed.unknown().of("listener", "l").to_string();
        assert_eq!(refused, format!("listener l: config_discovery: {} is not supported", WASM[0]));
        assert!(typed.decode::<pb::Any>().is_err());
        assert!(Typed::discovered(&of(&[RBAC])).is_err(), "nobody may leave that out");
    }
}
