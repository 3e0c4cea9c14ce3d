//! Rules of VirtualServices that nothing reaches.

use std::collections::BTreeMap;

use istio_api::VirtualService;
use istio_api::virtual_service::{HttpMatchRequest, StringMatch};

use crate::message::{Level, Message};
use crate::world::{NETWORKING, Resource, World};

/// A rule for this purpose: what it is called, and its matches as text that compares, each with what it is called.
struct Rule {
    name: String,
    matches: Vec<(String, String)>,
}

/// istioctl `routeName`, `requestName`.
fn called(name: &str, number: usize) -> String {
    if name.is_empty() { format!("#{number}") } else { format!("{name:?}") }
}

fn text<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn unreachable(resource: &Resource<'_>, field: &str, rule: &str, reason: &str, out: &mut Vec<Message>) {
    let text = format!("VirtualService rule {rule} not used ({reason}).");
    out.push(Message::new("IST0130", Level::Warning, resource, text).at(resource, field));
}

fn ineffective(resource: &Resource<'_>, field: &str, [rule, what, by]: [&str; 3], out: &mut Vec<Message>) {
    let text =
        format!("VirtualService rule {rule} match {what} is not used (duplicate/overlapping match in rule {by}).");
    out.push(Message::new("IST0131", Level::Info, resource, text).at(resource, field));
}

fn duplicates(resource: &Resource<'_>, kind: &str, rules: &[Rule], out: &mut Vec<Message>) {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut catch_all = false;
    for (i, rule) in rules.iter().enumerate() {
        let field = format!("spec.{kind}[{i}]");
        if rule.matches.is_empty() {
            if catch_all {
                unreachable(resource, &field, &rule.name, "only the last rule can have no matches", out);
            }
            catch_all = true;
            continue;
        }
        let mut twice = 0;
        for (j, (name, text)) in rule.matches.iter().enumerate() {
            if catch_all {
                unreachable(resource, &field, &rule.name, "route without matches defined before", out);
                continue;
            }
            match seen.get(text.as_str()) {
                Some(by) => {
                    let field = format!("{field}.match[{j}]");
                    ineffective(resource, &field, [&rule.name, name, &rules[*by].name], out);
                    twice += 1;
                }
                None => {
                    seen.insert(text, i);
                }
            }
        }
        if twice == rule.matches.len() {
            unreachable(resource, &field, &rule.name, "all matches used by prior rules", out);
        }
    }
}

/// A match by prefix, so far as istioctl compares it.
struct Prefix<'a> {
    rule: String,
    name: String,
    field: String,
    prefix: &'a str,
    m: &'a HttpMatchRequest,
}

/// `exact` and `prefix` as text; other matches compare as equal.
fn simple(m: Option<&StringMatch>) -> String {
    let set =
        |kind: &str, text: &Option<String>| text.as_ref().filter(|t| !t.is_empty()).map(|t| format!("{kind} {t}"));
    m.and_then(|m| set("exact", &m.exact).or_else(|| set("prefix", &m.prefix))).unwrap_or_default()
}

/// istioctl `coveredValidation`: whether requests for `b` are all taken by `a`, as far as prefixes tell.
fn covers(a: &Prefix<'_>, b: &Prefix<'_>) -> bool {
    let method = |m: &HttpMatchRequest| match simple(m.method.as_ref()) {
        none if none.is_empty() => "exact GET".to_owned(),
        text => text,
    };
    let maps = |a: &BTreeMap<String, StringMatch>, b: &BTreeMap<String, StringMatch>| {
        let fits = |(key, value)| b.get(key).is_some_and(|other| simple(Some(value)).starts_with(&simple(Some(other))));
        a.len() == b.len() && a.iter().all(fits)
    };
    b.prefix.starts_with(a.prefix)
        && a.m.port == b.m.port
        && method(a.m).starts_with(&method(b.m))
        && simple(a.m.authority.as_ref()).starts_with(&simple(b.m.authority.as_ref()))
        && maps(&a.m.headers, &b.m.headers)
        && maps(&a.m.query_params, &b.m.query_params)
        && maps(&a.m.without_headers, &b.m.without_headers)
}

fn overlaps(resource: &Resource<'_>, spec: &VirtualService, out: &mut Vec<Message>) {
    let (mut seen, mut prefixes, mut catch_all) = (Vec::new(), Vec::new(), false);
    for (i, route) in spec.http.iter().enumerate() {
        catch_all |= route.r#match.is_empty();
        for (j, m) in route.r#match.iter().enumerate().filter(|_| !catch_all) {
            let unnamed = HttpMatchRequest { name: String::new(), ..m.clone() };
            let prefix = m.uri.as_ref().and_then(|uri| uri.prefix.as_deref()).filter(|prefix| !prefix.is_empty());
            if seen.contains(&unnamed) {
                continue;
            }
            seen.push(unnamed);
            prefixes.extend(prefix.map(|prefix| Prefix {
                rule: called(&route.name, i),
                name: called(&m.name, j),
                field: format!("spec.http[{i}].match[{j}]"),
                prefix,
                m,
            }));
        }
    }
    for (i, a) in prefixes.iter().enumerate() {
        for b in prefixes[i + 1..].iter().filter(|b| a.prefix != b.prefix && covers(a, b)) {
            let what = format!("{} of prefix {}", b.name, b.prefix);
            let by = format!("{} of prefix {} on {}", a.name, a.prefix, a.rule);
            ineffective(resource, &b.field, [&b.rule, &what, &by], out);
        }
    }
}

pub(super) fn check(world: &World<'_>, out: &mut Vec<Message>) {
    for (resource, spec) in world.specs::<VirtualService>(NETWORKING, "VirtualService") {
        let http = spec.http.iter().enumerate().map(|(i, route)| Rule {
            name: called(&route.name, i),
            matches: route
                .r#match
                .iter()
                .enumerate()
                .map(|(j, m)| (called(&m.name, j), text(&HttpMatchRequest { name: String::new(), ..m.clone() })))
                .collect(),
        });
        duplicates(resource, "http", &http.collect::<Vec<_>>(), out);
        overlaps(resource, &spec, out);
        let numbered = |texts: Vec<String>, i: usize| Rule {
            name: called("", i),
            matches: texts.into_iter().enumerate().map(|(j, text)| (called("", j), text)).collect(),
        };
        let tcp = spec.tcp.iter().enumerate().map(|(i, r)| numbered(r.r#match.iter().map(text).collect(), i));
        duplicates(resource, "tcp", &tcp.collect::<Vec<_>>(), out);
        let tls = spec.tls.iter().enumerate().map(|(i, r)| numbered(r.r#match.iter().map(text).collect(), i));
        duplicates(resource, "tls", &tls.collect::<Vec<_>>(), out);
    }
}
