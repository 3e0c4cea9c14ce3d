use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use mesh_types::ArcStr;
use serde_json::Value;

use crate::headers::Headers;
use crate::matchers::Substitution;
use crate::metadata::Metadata;
use crate::pb;
use crate::pb::http_filter::header_to_metadata::v3 as api;
use crate::rejected::{At, Compiled, Invalid};

/// Writes headers and cookies into dynamic metadata (`envoy.filters.http.header_to_metadata`).
#[derive(Clone, Debug, Default)]
pub struct HeaderToMetadata {
    /// Of the request.
    pub request: MetadataRules,
    /// Of the response.
    pub response: MetadataRules,
}

/// Rules, all of which are looked at.
#[derive(Clone, Debug, Default)]
pub struct MetadataRules {
    rules: Box<[Rule]>,
    counters: Option<RuleCounters>,
}

/// Names of the counters of rules, for a filter that counts (Envoy `HeaderToMetadataFilterStats`).
#[derive(Clone, Debug)]
struct RuleCounters {
    processed: ArcStr,
    added: ArcStr,
    not_found: ArcStr,
    too_long: ArcStr,
    not_decoded: ArcStr,
    not_rewritten: ArcStr,
}

/// What became of a value.
enum Written {
    Added,
    TooLong,
    NotDecoded,
    /// The rewrite left nothing of it.
    NotRewritten,
    LeftOut,
}

#[derive(Clone, Debug)]
struct Rule {
    source: Source,
    present: Option<Target>,
    missing: Option<Target>,
    remove: bool,
}

#[derive(Clone, Debug)]
enum Source {
    Header(Box<str>),
    Cookie(Box<str>),
}

#[derive(Clone, Debug)]
struct Target {
    namespace: Box<str>,
    key: Box<str>,
    /// Instead of what was found; may be empty.
    constant: Box<str>,
    rewrite: Option<Substitution>,
    kind: api::config::ValueType,
    base64: bool,
}

/// What Envoy takes no more of (`MAX_HEADER_VALUE_LEN`).
const LONGEST: usize = 8 * 1024;

impl HeaderToMetadata {
    pub(super) fn compile(config: &api::Config) -> Compiled<Self> {
        let rules = |rules, of| MetadataRules::compile(rules, of, &config.stat_prefix);
        Ok(Self {
            request: rules(&config.request_rules, "request")?,
            response: rules(&config.response_rules, "response")?,
        })
    }

    /// The names of its counters.
    pub fn counters(&self) -> impl Iterator<Item = &str> {
        let of_rules = [&self.request, &self.response].into_iter().flat_map(|rules| &rules.counters);
        of_rules
            .flat_map(|c| [&c.processed, &c.added, &c.not_found, &c.too_long, &c.not_decoded, &c.not_rewritten])
            .map(|n| &**n)
    }

    /// The settings of a route, which must say something.
    pub(super) fn of_route(config: &api::Config) -> Compiled<Self> {
        match config.request_rules.is_empty() && config.response_rules.is_empty() {
            true => Err(Invalid::new("", "needs request_rules or response_rules")),
            false => Self::compile(config),
        }
    }
}

impl RuleCounters {
    fn under(prefix: &str, of: &str) -> Option<Self> {
        let name = |what: &str| format!("http_filter_name.{prefix}.{what}").into();
        (!prefix.is_empty()).then(|| Self {
            processed: name(&format!("{of}_rules_processed")),
            added: name(&format!("{of}_metadata_added")),
            not_found: name(&format!("{of}_header_not_found")),
            too_long: name("header_value_too_long"),
            not_decoded: name("base64_decode_failed"),
            not_rewritten: name("regex_substitution_failed"),
        })
    }
}

impl MetadataRules {
    fn compile(rules: &[api::config::Rule], of: &str, stat_prefix: &str) -> Compiled<Self> {
        let field = format!("{of}_rules");
        let rules = rules.iter().enumerate().map(|(i, rule)| Rule::compile(rule).at_index(&field, i));
        Ok(Self { rules: rules.collect::<Compiled<_>>()?, counters: RuleCounters::under(stat_prefix, of) })
    }

    /// Applies them to a head; `count` is told the name of each counter.
    pub fn apply(&self, headers: &mut Headers, metadata: &mut Metadata, count: impl Fn(&str)) {
        let count = |counter: fn(&RuleCounters) -> &ArcStr| {
            self.counters.iter().for_each(|counters| count(counter(counters)));
        };
        for rule in &self.rules {
            count(|c| &c.processed);
            let found = rule.source.find(headers);
            if let (true, Some(_), Source::Header(name)) = (rule.remove, &found, &rule.source) {
                headers.remove(name);
            }
            let target = if found.is_some() { &rule.present } else { &rule.missing };
            let Some(target) = target else { continue };
            if found.is_none() {
                count(|c| &c.not_found);
            }
            match target.write(found.as_deref().unwrap_or_default(), metadata) {
                Written::Added => count(|c| &c.added),
                Written::TooLong => count(|c| &c.too_long),
                Written::NotDecoded => count(|c| &c.not_decoded),
                Written::NotRewritten => count(|c| &c.not_rewritten),
                Written::LeftOut => {}
            }
        }
    }
}

impl Rule {
    fn compile(rule: &api::config::Rule) -> Compiled<Self> {
        let source = match (rule.header.as_str(), rule.cookie.as_str()) {
            (name, "") if !name.is_empty() => Source::Header(name.to_ascii_lowercase().into()),
            ("", name) if !name.is_empty() => Source::Cookie(name.into()),
            _ => return Err(Invalid::new("", "exactly one of header and cookie must be set")),
        };
        if rule.on_header_present.is_none() && rule.on_header_missing.is_none() {
            return Err(Invalid::new("", "needs on_header_present or on_header_missing"));
        }
        if rule.remove && matches!(source, Source::Cookie(_)) {
            return Err(Invalid::new("remove", "is not for cookies"));
        }
        if rule.on_header_missing.as_ref().is_some_and(|target| target.value.is_empty()) {
            return Err(Invalid::new("on_header_missing.value", "is missing"));
        }
        let target = |target: &Option<api::config::KeyValuePair>, field: &str| {
            target.as_ref().map(Target::compile).transpose().at(field)
        };
        Ok(Self {
            source,
            present: target(&rule.on_header_present, "on_header_present")?,
            missing: target(&rule.on_header_missing, "on_header_missing")?,
            remove: rule.remove,
        })
    }
}

impl Source {
    fn find(&self, headers: &Headers) -> Option<String> {
        let value = match self {
            Self::Header(name) => headers.joined(name)?,
            Self::Cookie(name) => {
                let cookies = headers.get_all("cookie").flat_map(|line| line.split(|b| *b == b';'));
                let found = cookies.filter_map(|pair| {
                    let pair = pair.trim_ascii();
                    let at = pair.iter().position(|b| *b == b'=')?;
                    (&pair[..at] == name.as_bytes()).then(|| &pair[at + 1..])
                });
                Cow::Owned(found.into_iter().next().filter(|value| !value.is_empty())?.to_vec())
            }
        };
        Some(String::from_utf8_lossy(&value).into_owned())
    }
}

impl Target {
    fn compile(target: &api::config::KeyValuePair) -> Compiled<Self> {
        let invalid = |field: &str, reason: &str| Invalid::new(field, reason);
        if target.key.is_empty() {
            return Err(invalid("key", "is missing"));
        }
        if target.regex_value_rewrite.is_some() && !target.value.is_empty() {
            return Err(invalid("regex_value_rewrite", "cannot stand beside value"));
        }
        let namespace = match target.metadata_namespace.as_str() {
            "" => "envoy.filters.http.header_to_metadata",
            own => own,
        };
        Ok(Self {
            namespace: namespace.into(),
            key: target.key.as_str().into(),
            constant: target.value.as_str().into(),
            rewrite: target
                .regex_value_rewrite
                .as_ref()
                .map(Substitution::compile)
                .transpose()
                .at("regex_value_rewrite")?,
            kind: target.r#type.try_into().map_err(|_| invalid("type", "is no known value"))?,
            base64: target.encode == api::config::ValueEncode::Base64 as i32,
        })
    }

    /// Envoy `HeaderToMetadataFilter::addMetadata`: what cannot be read is left out.
    fn write(&self, found: &str, metadata: &mut Metadata) -> Written {
        let value: Cow<'_, [u8]> = match (&*self.constant, &self.rewrite) {
            ("", Some(rewrite)) => rewrite.apply(found.as_bytes()).into(),
            ("", None) => found.as_bytes().into(),
            (constant, _) => constant.as_bytes().into(),
        };
        if value.is_empty() {
            return if found.is_empty() { Written::LeftOut } else { Written::NotRewritten };
        }
        if value.len() >= LONGEST {
            return Written::TooLong;
        }
        let value = match self.base64 {
            false => value,
            true => {
                let unpadded: Vec<u8> = value.iter().copied().filter(|b| *b != b'=').collect();
                match STANDARD_NO_PAD.decode(unpadded) {
                    Ok(decoded) if !decoded.is_empty() => decoded.into(),
                    _ => return Written::NotDecoded,
                }
            }
        };
        let text = || String::from_utf8_lossy(&value).into_owned();
        let value = match self.kind {
            api::config::ValueType::String => Value::String(text()),
            api::config::ValueType::Number => match text().trim().parse::<f64>() {
                Ok(number) => crate::metadata::number(number),
                Err(_) => return Written::LeftOut,
            },
            api::config::ValueType::ProtobufValue => match <pb::Value as envoy_api::Message>::decode(&*value) {
                Ok(message) => crate::metadata::json(&message),
                Err(_) => return Written::LeftOut,
            },
        };
        metadata.set(&self.namespace, &self.key, value);
        Written::Added
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_read_what_can_be_read() {
        let config: api::Config = api::Config {
            request_rules: vec![
                api::config::Rule {
                    header: "x-n".into(),
                    on_header_present: Some(api::config::KeyValuePair {
                        key: "n".into(),
                        r#type: 1,
                        ..Default::default()
                    }),
                    remove: true,
                    ..Default::default()
                },
                api::config::Rule {
                    cookie: "c".into(),
                    on_header_present: Some(api::config::KeyValuePair {
                        key: "c".into(),
                        encode: 1,
                        ..Default::default()
                    }),
                    ..Default::default()
                },
            ],
            ..Default::default()
        };
        let rules = HeaderToMetadata::compile(&config).unwrap().request;
        let mut metadata = Metadata::default();
        let mut headers = Headers::of([("x-n", "1.5"), ("cookie", "b=1; c=YWJj")]);
        rules.apply(&mut headers, &mut metadata, |_| {});
        const NAMESPACE: &str = "envoy.filters.http.header_to_metadata";
        assert_eq!(metadata.get(NAMESPACE, &["n"]), Some(&Value::from(1.5)));
        assert_eq!(metadata.get(NAMESPACE, &["c"]), Some(&Value::from("abc")));
        assert!(!headers.contains("x-n"));
        let mut none = Metadata::default();
        rules.apply(&mut Headers::of([("x-n", "no"), ("cookie", "c=!")]), &mut none, |_| {});
        assert!(none.is_empty());
    }
}
