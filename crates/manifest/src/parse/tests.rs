use std::path::Path;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn one(yaml: &str) -> Document {
    let mut documents = parse(Path::new("a.yaml"), yaml).unwrap();
    assert_eq!(documents.len(), 1);
    documents.remove(0)
}

fn error(yaml: &str) -> String {
    parse(Path::new("a.yaml"), yaml).unwrap_err().to_string()
}

const HEAD: &str = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: a\n";

#[test]
fn every_field_knows_its_line() {
    let text = format!(
        "# comment\n{HEAD}spec:\n  http:\n  - route:\n    - destination:\n        host: x\n    - {{destination: {{host: y}}}}\n"
    );
    let document = one(&text);
    assert_eq!((document.line(), document.name(), document.group()), (2, "a", "networking.istio.io"));
    assert_eq!(document.line_of("spec.http[0].route[0].destination.host"), Some(10));
    assert_eq!(document.line_of("spec.http[0].route[1].destination.host"), Some(11));
    assert_eq!(document.line_of("spec.http[1]"), None);
    let error = document.error("spec.http[0].route[0].destination.port.number", "is missing");
    assert_eq!(error.to_string(), "a.yaml:9:7: spec.http[0].route[0].destination.port.number: is missing");
}

#[test]
fn scalars_mean_what_kubectl_reads() {
    let document = one(
        "apiVersion: v1\nkind: K\na: yes\nb: on\nc: 'yes'\nd: 010\ne: 1_000\nf: 0x10\ng: ~\nh: 1.5\ni: '1'\nj: 2024-01-01\n",
    );
    let value = &document.value;
    assert_eq!([&value["a"], &value["b"], &value["c"]], [&json!(true), &json!(true), &json!("yes")]);
    assert_eq!([&value["d"], &value["e"], &value["f"]], [&json!(8), &json!(1000), &json!(16)]);
    assert_eq!([&value["g"], &value["h"], &value["i"]], [&json!(null), &json!(1.5), &json!("1")]);
    assert_eq!(value["j"], json!("2024-01-01"));
}

#[test]
fn names_of_fields_mean_what_kubectl_reads() {
    let text = "apiVersion: v1\nkind: K\nk: {y: 1, 'n': 2, off: 3, 8080: 4, 0x10: 5, 1.50: 6, a: 7, \"on\": 8}\n";
    let wanted = json!({"true": 1, "n": 2, "false": 3, "8080": 4, "16": 5, "1.5": 6, "a": 7, "on": 8});
    assert_eq!(one(text).value["k"], wanted);
    assert_eq!(parse_values(Path::new("a.yaml"), text).unwrap()[0]["k"], wanted);
    assert!(error("apiVersion: v1\nkind: K\nk: {~: 1}\n").starts_with("a.yaml:3:"));
    // Envoy reads them as they are written.
    let written = parse_envoy(Path::new("a.yaml"), "k: {y: yes, 0x10: 1}\n").unwrap();
    assert_eq!(written[0].value["k"], json!({"y": true, "0x10": 1}));
}

#[test]
fn anchors_and_merge_keys_are_expanded() {
    let document = one("apiVersion: v1\nkind: K\nbase: &b {x: 1, z: 2}\nused: {<<: *b, z: 3}\nagain: *b\n");
    assert_eq!(document.value["used"], json!({"x": 1, "z": 3}));
    assert_eq!(document.value["again"], json!({"x": 1, "z": 2}));
}

#[test]
fn lists_are_expanded_and_keep_their_lines() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: A\n  metadata: {name: a}\n- apiVersion: v1\n  kind: B\n  x: 1\n---\n---\n# nothing\n";
    let documents = parse(Path::new("a.yaml"), text).unwrap();
    let kinds: Vec<_> = documents.iter().map(Document::kind).collect();
    assert_eq!(kinds, ["A", "B"]);
    assert_eq!((documents[0].line(), documents[1].line_of("x")), (4, Some(9)));
}

#[test]
fn what_is_wrong_is_named_with_its_line() {
    assert!(error("apiVersion: v1\nkind: K\na: [1\nb: 2\n").starts_with("a.yaml:"), "{}", error("a: ["));
    assert!(error("apiVersion: v1\nkind: K\nx: 1\nx: 2\n").starts_with("a.yaml:4:1: "), "duplicate key");
    assert_eq!(error("- a\n"), "a.yaml:1:1: expected an object, found a list");
    assert!(error("a: 1\n").contains(": kind: is missing"));
    assert!(error("kind: K\n").contains(": apiVersion: is missing"));
    assert!(error("apiVersion: v1\nkind: List\nitems: [1]\n").contains("items[0]: is not an object"));
}

#[test]
fn decoding_names_the_field() {
    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(default)]
    struct Spec {
        number: u32,
        list: Vec<u32>,
    }
    let document = one(&format!("{HEAD}spec:\n  number: 1\n  list:\n  - 1\n  - x\n"));
    let error = document.decode_field::<Spec>("spec").unwrap_err();
    assert_eq!((error.line, error.field.as_deref()), (9, Some("spec.list[1]")));
    let document = one(&format!("{HEAD}spec: {{number: 2, list: [1]}}\n"));
    let spec = document.decode_field::<Spec>("spec").unwrap();
    assert_eq!((spec.number, spec.list), (2, vec![1]));
    for nothing in ["", "spec: null\n"] {
        assert_eq!(one(&format!("{HEAD}{nothing}")).decode_field::<Spec>("spec").unwrap().number, 0);
    }
    let error = one(&format!("{HEAD}spec: [2, [1]]\n")).decode_field::<Spec>("spec").unwrap_err();
    assert_eq!((error.field.as_deref(), &*error.message), (Some("spec"), "expected an object, found a list"));
}

#[test]
fn json_is_read_even_with_tabs() {
    let document = one("{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"K\"\n}");
    assert_eq!(document.kind(), "K");
}

#[test]
fn a_bomb_of_aliases_is_refused() {
    let mut text = "apiVersion: v1\nkind: K\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let before = format!("*a{}", level - 1);
        let list = vec![before; 10].join(", ");
        text.push_str(&format!("a{level}: &a{level} [{list}]\n"));
    }
    assert!(parse(Path::new("a.yaml"), &text).is_err());
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in r"(?s)([-:\[\]{}&*!|>'\x22#%@,? \n\ta-z0-9]{0,120}|.{0,80})") {
        let _ = parse(Path::new("a.yaml"), &text);
    }

    #[test]
    fn json_comes_back_as_it_was(numbers in proptest::collection::btree_map("[a-z]{1,8}", any::<i64>(), 0..5), text in "[^\\p{C}]{0,40}") {
        let value = json!({"apiVersion": "v1", "kind": "K", "numbers": numbers, "text": text});
        let documents = parse(Path::new("a.json"), &value.to_string()).unwrap();
        prop_assert_eq!(&documents[0].value, &value);
    }
}
