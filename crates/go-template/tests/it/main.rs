//! The language, judged by what Go does.

mod functions;
mod language;

use go_template::{Error, Functions, Limits, Template, Value};
use serde_json::{Value as Json, json};

/// What most tests render over. Numbers are float64, as after decoding JSON in Go.
fn data() -> Json {
    json!({
        "a": 1, "f": 1.5, "s": "hello world", "t": true, "e": "", "n": null, "z": 0,
        "l": [3, 1, 2], "ls": ["x", "y", "z"], "el": [], "m": {"a": "1", "b": "2"}, "em": {},
        "nest": {"k": {"deep": "v", "list": [{"name": "p"}, {"name": "q"}]}},
    })
}

fn render(source: &str) -> Result<String, Error> {
    let data = data();
    Template::parse("t", source, &Functions::sprig())?.render(Value::from_json(&data), Limits::default())
}

#[track_caller]
fn check(source: &str, want: &str) {
    assert_eq!(render(source).as_deref(), Ok(want), "{source}");
}

#[track_caller]
fn check_parse_error(source: &str, want: &str) {
    match Template::parse("t", source, &Functions::sprig()) {
        Err(error) => assert!(error.to_string().contains(want), "{source}: {error}"),
        Ok(_) => panic!("{source} parses"),
    }
}

#[track_caller]
fn check_error(source: &str, want: &str) {
    match render(source) {
        Err(error) => assert!(error.to_string().contains(want), "{source}: {error}"),
        Ok(out) => panic!("{source} renders {out:?}"),
    }
}
