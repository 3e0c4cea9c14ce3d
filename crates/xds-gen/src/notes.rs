//! What stands under `istio` in a resource's metadata, written straight to bytes: every cluster and every rule's route has some.

use envoy_api::wire::{nested, text};
use registry::Service;

/// Field numbers of google/protobuf/struct.proto: of `Value`.
const STRING: u32 = 3;
const BOOL: u32 = 4;
const STRUCT: u32 = 5;
const LIST: u32 = 6;
/// Of a map's entries, and of the only field of `Metadata`, `Struct` and `ListValue`.
const KEY: u32 = 1;
const VALUE: u32 = 2;
const ONLY: u32 = 1;

/// Values by key.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notes(Vec<(&'static str, Vec<u8>)>);

impl Notes {
    /// In place of what was noted before.
    fn note(&mut self, key: &'static str, value: Vec<u8>) {
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key, value)),
        }
    }

    pub(crate) fn text(&mut self, key: &'static str, value: &str) {
        let mut out = Vec::with_capacity(value.len() + 4);
        text(STRING, value, &mut out);
        self.note(key, out);
    }

    /// Just "yes".
    pub(crate) fn yes(&mut self, key: &'static str) {
        self.note(key, vec![(BOOL << 3) as u8, 1]);
    }

    /// The rule that the resource is made from, as istiod's `BuildConfigInfoMetadata` names it.
    pub(crate) fn config(&mut self, kind: &str, namespace: &str, name: &str) {
        self.text("config", &crate::proto::config_text(kind, namespace, name));
    }

    /// Which service a cluster leads to, for telemetry.
    pub(crate) fn service(&mut self, service: &Service) {
        let mut out = Vec::with_capacity(128);
        nested(LIST, &mut out, |out| {
            nested(ONLY, out, |out| {
                nested(STRUCT, out, |out| {
                    let fields =
                        [("host", &service.hostname), ("name", &service.name), ("namespace", &service.namespace)];
                    for (key, value) in fields {
                        nested(ONLY, out, |out| {
                            text(KEY, key, out);
                            nested(VALUE, out, |out| text(STRING, value, out));
                        });
                    }
                });
            });
        });
        self.note("services", out);
    }

    /// All of it as `envoy.config.core.v3.Metadata`, as the field of that number.
    pub(crate) fn into_field(mut self, number: u32) -> Option<(u32, Vec<u8>)> {
        if self.0.is_empty() {
            return None;
        }
        self.0.sort_by_key(|(key, _)| *key);
        let mut out =
            Vec::with_capacity(32 + self.0.iter().map(|(key, value)| key.len() + value.len() + 10).sum::<usize>());
        nested(ONLY, &mut out, |out| {
            text(KEY, "istio", out);
            nested(VALUE, out, |out| {
                for (key, value) in &self.0 {
                    nested(ONLY, out, |out| {
                        text(KEY, key, out);
                        nested(VALUE, out, |out| out.extend_from_slice(value));
                    });
                }
            });
        });
        Some((number, out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto;
    use envoy_api::{Message, core::Metadata, wkt};

    #[test]
    fn notes_are_metadata() {
        let mut notes = Notes::default();
        notes.text("subset", "v1");
        notes.yes("external");
        notes.text("subset", "v2");
        notes.config("virtual-service", "ns", &"long".repeat(50));
        let (number, bytes) = notes.into_field(25).unwrap();
        assert_eq!(number, 25);
        let mut expected = None;
        let yes = wkt::Value { kind: Some(wkt::value::Kind::BoolValue(true)) };
        proto::set_istio_metadata(&mut expected, "subset", proto::text("v2"));
        proto::set_istio_metadata(&mut expected, "external", yes);
        let path = proto::config_path("virtual-service", "ns", &"long".repeat(50));
        proto::set_istio_metadata(&mut expected, "config", path);
        assert_eq!(Metadata::decode(bytes.as_slice()).unwrap(), expected.unwrap());
        assert!(Notes::default().into_field(25).is_none());
    }
}
