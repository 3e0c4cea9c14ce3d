use envoy_api::Message;
use envoy_api::json::from_json;
use serde_json::{Value, json};

use super::*;
use crate::headers::Headers;
use crate::stream_info::{PeerCertificate, TlsInfo};

fn typed(name: &str, fields: Value) -> Value {
    let mut config = json!({ "@type": format!("type.googleapis.com/{name}") });
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    json!({ "name": "x", "typed_config": config })
}

/// An action is a text.
fn act(text: &str) -> Value {
    json!({ "action": typed("google.protobuf.StringValue", json!({ "value": text })) })
}

fn header(name: &str) -> Value {
    typed("envoy.type.matcher.v3.HttpRequestHeaderMatchInput", json!({ "header_name": name }))
}

fn network(name: &str) -> Value {
    typed(&format!("envoy.extensions.matching.common_inputs.{name}"), json!({}))
}

fn exact(input: Value, text: &str) -> Value {
    json!({ "single_predicate": { "input": input, "value_match": { "exact": text } } })
}

fn compile(tree: &Value, place: Place) -> Compiled<MatchTree<String>> {
    let bytes = from_json("xds.type.matcher.v3.Matcher", tree).unwrap();
    let tree = proto::Matcher::decode(bytes.as_slice()).unwrap();
    MatchTree::compile(&tree, place, &Options::default(), &mut |typed| typed.decode::<String>())
}

/// Where requests with these values of the header `x` are led.
fn led(tree: &Value, values: &[&str]) -> Vec<String> {
    let tree = compile(tree, Place::Filter).unwrap();
    let lead = |value: &&str| {
        let headers = Headers::of([("x", *value)].into_iter().filter(|(_, value)| *value != "-"));
        match tree.evaluate(&MatchData { request: Some(&headers), ..MatchData::default() }) {
            Outcome::Found(action) => action.clone(),
            Outcome::Nothing => "nothing".to_owned(),
            Outcome::Unknown => "unknown".to_owned(),
        }
    };
    values.iter().map(lead).collect()
}

#[test]
fn the_first_condition_that_leads_anywhere_counts() {
    let dead_end = json!({ "matcher": { "matcher_tree": {
        "input": header("y"), "exact_match_map": { "map": { "b": act("deep") } } } } });
    let tree = json!({
        "matcher_list": { "matchers": [
            { "predicate": { "not_matcher": exact(header("x"), "a") }, "on_match": dead_end },
            { "predicate": { "or_matcher": { "predicate": [exact(header("x"), "a"), exact(header("x"), "b")] } },
              "on_match": act("a or b") },
        ] },
        "on_no_match": act("other"),
    });
    assert_eq!(led(&tree, &["a", "b", "c", "-"]), ["a or b", "a or b", "other", "other"]);
}

#[test]
fn long_keys_come_before_short_ones() {
    let dead_end = json!({ "matcher": {} });
    let prefixes = json!({ "matcher_tree": { "input": header("x"), "prefix_match_map": { "map": {
        "/a": act("a"), "/a/b": act("b"), "/a/b/c": dead_end } } } });
    assert_eq!(led(&prefixes, &["/a/b/c", "/a/b", "/a/", "/"]), ["b", "b", "a", "nothing"]);

    let range = |address: &str, length: u32, action: Value, exclusive: bool| {
        let ranges = json!([{ "address_prefix": address, "prefix_len": length }]);
        json!({ "ranges": ranges, "on_match": action, "exclusive": exclusive })
    };
    let ranges = json!({ "matcher_tree": { "input": header("x"), "custom_match": typed("xds.type.matcher.v3.IPMatcher",
        json!({ "range_matchers": [
            range("10.0.0.0", 8, act("8"), false),
            range("10.1.0.0", 16, act("16"), true),
            range("10.1.1.0", 24, dead_end, false),
        ] })) } });
    // What is exclusive is not tried behind a range that led to nothing.
    assert_eq!(led(&ranges, &["10.1.2.3", "10.1.1.1", "10.2.0.1", "text"]), ["16", "8", "8", "nothing"]);

    let domain = |name: &str, action: &str| json!({ "domains": [name], "on_match": act(action) });
    let domains = json!({ "matcher_tree": { "input": header("x"), "custom_match": typed(
        "xds.type.matcher.v3.ServerNameMatcher", json!({ "domain_matchers": [
            domain("*", "any"), domain("*.test", "short"), domain("*.a.test", "long"), domain("b.a.test", "name"),
        ] })) } });
    assert_eq!(
        led(&domains, &["b.a.test", "c.a.test", "a.test", "x", ""]),
        ["name", "long", "short", "any", "nothing"]
    );
}

#[test]
fn what_is_not_known_yet_ends_the_search() {
    let status = typed("envoy.type.matcher.v3.HttpResponseStatusCodeMatchInput", json!({}));
    let tree = json!({ "matcher_list": { "matchers": [
        { "predicate": { "or_matcher": { "predicate": [exact(status, "200"), exact(header("x"), "a")] } },
          "on_match": act("either") },
    ] }, "on_no_match": act("other") });
    assert_eq!(led(&tree, &["a", "b"]), ["either", "unknown"]);
    let compiled = compile(&tree, Place::Filter).unwrap();
    let (request, response) = (Headers::new(), Headers::of([(":status", "404")]));
    let data = MatchData { request: Some(&request), response: Some(&response), ..MatchData::default() };
    assert_eq!(compiled.evaluate(&data).found().map(String::as_str), Some("other"));
}

#[test]
fn names_of_certificates_are_joined() {
    let tree = json!({ "matcher_tree": { "input": network("ssl.v3.DnsSanInput"), "exact_match_map": { "map": {
        "a,b": act("both") } } }, "on_no_match": act("other") });
    let tree = compile(&tree, Place::NetworkRbac).unwrap();
    let peer = PeerCertificate { dns_sans: vec!["a".into(), "b".into()], ..PeerCertificate::default() };
    let with = TlsInfo { peer: Some(peer), ..TlsInfo::default() };
    let without = TlsInfo::default();
    let of = |tls| tree.evaluate(&MatchData { tls, ..MatchData::default() });
    assert_eq!(of(Some(&with)), Outcome::Found(&"both".to_owned()));
    assert_eq!(of(Some(&without)), Outcome::Found(&"other".to_owned()));
    assert_eq!(of(None), Outcome::Unknown);
}

#[test]
fn each_place_has_its_inputs() {
    let on =
        |input: Value| json!({ "matcher_tree": { "input": input, "exact_match_map": { "map": { "a": act("a") } } } });
    let (alpn, method) = (network("network.v3.ApplicationProtocolInput"), header(":method"));
    assert!(compile(&on(alpn.clone()), Place::Listener).is_ok() && compile(&on(alpn), Place::HttpRbac).is_err());
    assert!(
        compile(&on(method.clone()), Place::VirtualHost).is_ok() && compile(&on(method), Place::NetworkRbac).is_err()
    );
    let mut keeps = act("a");
    keeps["keep_matching"] = true.into();
    let keeps = json!({ "on_no_match": keeps });
    assert_eq!(compile(&keeps, Place::Listener).unwrap().evaluate(&MatchData::default()), Outcome::Nothing);
    assert!(compile(&keeps, Place::HttpRbac).is_err());
}

#[test]
fn trees_may_not_be_too_deep() {
    use proto::matcher::on_match::OnMatch as Then;
    let nested = |depth| {
        let mut tree = proto::Matcher::default();
        for _ in 0..depth {
            let on_match = Some(Then::Matcher(Box::new(tree)));
            let on_no_match = proto::matcher::OnMatch { on_match, keep_matching: false };
            tree = proto::Matcher { on_no_match: Some(Box::new(on_no_match)), matcher_type: None };
        }
        MatchTree::<()>::compile(&tree, Place::Filter, &Options::default(), &mut |typed| Err(typed.unknown()))
    };
    assert!(nested(MAX_DEPTH).is_ok() && nested(MAX_DEPTH + 1).is_err());
}
