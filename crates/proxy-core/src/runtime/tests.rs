use serde_json::json;

use super::*;
use crate::Fraction;

fn runtime(layers: Value) -> Result<Runtime, String> {
    let config = json!({"layers": layers});
    let bytes = envoy_api::json::from_json("type.googleapis.com/envoy.config.bootstrap.v3.LayeredRuntime", &config);
    let message = prost::Message::decode(bytes.unwrap().as_slice()).unwrap();
    Runtime::compile(Some(&message)).map_err(|e| e.of("runtime", "").to_string())
}

#[test]
fn later_layers_win_and_changes_are_seen_by_what_was_bound() {
    let runtime = runtime(json!([
        {"name": "a", "static_layer": {"x": {"n": 1, "t": "s"}, "only": 2.5}},
        {"name": "b", "static_layer": {"x.n": 2}},
        {"name": "c", "admin_layer": {}}]))
    .unwrap();
    let number = runtime.live("x.n", 7u64);
    let other = runtime.live("x.n", 8u64);
    assert_eq!((number.get(), other.get(), runtime.live("none", 9u64).get()), (2, 2, 9));
    assert!(runtime.modify([("x.n", "5"), ("new", "true")]));
    assert_eq!((number.get(), other.get(), runtime.get("new")), (5, 5, Some(true)));
    assert_eq!(runtime.entries()["x.n"], ["1", "2", "5"]);
    assert_eq!(runtime.counts(), RuntimeCounts { keys: 4, layers: 3, overridden: true, loads: 3 });
    // What is no number leaves the default.
    assert!(runtime.modify([("x.n", "many")]));
    assert_eq!((number.get(), other.get()), (7, 8));
    assert!(runtime.modify([("x.n", ""), ("new", "")]));
    assert_eq!((number.get(), runtime.counts().overridden), (2, false));
}

#[test]
fn values_mean_what_they_mean_to_envoy() {
    let shares = [
        ("100", Some((100, 100))),
        ("1000", Some((100, 100))),
        ("50.5", Some((50, 100))),
        ("-1", None),
        ("true", None),
        ("\"100\"", None),
        ("{numerator: 3}", Some((3, 100))),
        ("{numerator: 7,denominator: TEN_THOUSAND}", Some((7, 10_000))),
        ("{other: 7}", None),
    ];
    for (text, share) in shares {
        assert_eq!(Entry::of_written(text).share(), share, "{text}");
    }
    // Written into the bootstrap, text is text.
    assert_eq!(Entry::of_value(&json!("{numerator: 3}")).unwrap().share(), None);
    assert_eq!(
        Entry::of_value(&json!({"numerator": 3, "denominator": "MILLION"})).unwrap().share(),
        Some((3, 1_000_000))
    );
    for (number, text) in [(1e12, "1e+12"), (2.5, "2.5"), (-3.0, "-3"), (100_000.0, "100000"), (0.000_01, "1e-05")] {
        assert_eq!(Entry::of_value(&json!(number)).unwrap().written(), text);
    }
}

#[test]
fn layers_that_are_none_are_refused() {
    for (layers, why) in [
        (json!([{"name": "x", "static_layer": {}}, {"name": "x", "static_layer": {}}]), "two layers x"),
        (json!([{"name": "x", "admin_layer": {}}, {"name": "y", "admin_layer": {}}]), "one admin layer"),
        (json!([{"name": "x"}]), "layer_specifier"),
        (json!([{"static_layer": {}}]), "name"),
        (json!([{"name": "x", "static_layer": {"a": {"b": [1]}}}]), "a.b"),
        (json!([{"name": "x", "disk_layer": {"symlink_root": "/x"}}]), "disk_layer"),
    ] {
        let refused = runtime(layers).unwrap_err();
        assert!(refused.contains(why), "{refused}");
    }
    assert!(!Runtime::default().modify([("a", "1")]), "there is no admin layer");
}

#[test]
fn a_share_follows_its_key() {
    let runtime = runtime(json!([{"name": "c", "admin_layer": {}}])).unwrap();
    let share = pb::core::RuntimeFractionalPercent { default_value: None, runtime_key: "k".into() };
    let share = Fraction::runtime(Some(&share), Fraction::NONE, &runtime).unwrap();
    assert_eq!(share.parts(), (0, 100));
    runtime.modify([("k", "30")]);
    assert_eq!(share.parts(), (30, 100));
}
