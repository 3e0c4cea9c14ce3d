//! Cases produced by Istio itself: injection of files, admission, the command line, templates.
//!
//! Compared as the data's own checker does: documents as values, patches by what they lead to.

use std::fs;
use std::path::{Path, PathBuf};

use inject::{Config, Files, NativeSidecars, webhook};
use serde_json::Value;

/// The reference data, or `None` after saying that there is none.
fn data(group: &str) -> Option<PathBuf> {
    let root = std::env::var_os("OUTRIGGER_CONFORMANCE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"), PathBuf::from);
    let folder = root.join(group);
    if folder.is_dir() {
        return Some(folder);
    }
    println!("SKIPPED: no reference data in {}", folder.display());
    None
}

fn cases(folder: &Path) -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir() && !path.ends_with("_config"))
        .collect();
    cases.sort();
    cases
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&text(path)).unwrap()
}

fn documents(text: &str) -> Vec<Value> {
    manifest::parse_plain(Path::new("result"), text)
        .unwrap_or_else(|error| panic!("{error}\n{text}"))
        .into_iter()
        .map(|document| document.value)
        .collect()
}

fn config(folder: &Path, case: &Value) -> Result<Config, String> {
    let file = |key: &str| case[key].as_str().map(|name| folder.join("..").join(name));
    let files = Files {
        inject: file("injectConfigFile"),
        values: file("valuesFile"),
        mesh: file("meshConfigFile"),
        operator: None,
    };
    let mut config = Config::load(&files).map_err(|error| error.to_string())?;
    config.native = if case["nativeSidecars"] == true { NativeSidecars::On } else { NativeSidecars::Off };
    config.compliance_policy = case["compliancePolicy"].as_str().unwrap_or_default().to_owned();
    config.revision = case["revision"].as_str().unwrap_or_default().to_owned();
    Ok(config)
}

fn diff(want: &Value, got: &Value, path: &str, found: &mut Vec<String>) {
    match (want, got) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                match (a.get(key), b.get(key)) {
                    (Some(a), Some(b)) => diff(a, b, &format!("{path}.{key}"), found),
                    (Some(a), None) => found.push(format!("{path}.{key}: missing, want {a}")),
                    (None, Some(b)) => found.push(format!("{path}.{key}: unexpected {b}")),
                    (None, None) => {}
                }
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            if a.len() != b.len() {
                found.push(format!("{path}: want {} items, got {}", a.len(), b.len()));
            }
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                diff(a, b, &format!("{path}[{index}]"), found);
            }
        }
        (Value::Number(a), Value::Number(b)) if a.as_f64() == b.as_f64() => {}
        _ if want == got => {}
        _ => found.push(format!("{path}: want {want} got {got}")),
    }
}

/// Fails with all differences, grouped by case, and says how many passed.
fn report(group: &str, passed: usize, skipped: usize, failed: &[(String, Vec<String>)]) {
    for (case, differences) in failed {
        println!("FAILED {group}/{case}");
        for difference in differences.iter().take(4) {
            println!("    {}", difference.chars().take(400).collect::<String>());
        }
    }
    println!("{group}: {passed} passed, {} failed, {skipped} skipped", failed.len());
    assert!(failed.is_empty(), "{} cases of {group} differ from the reference", failed.len());
}

#[test]
fn inject_files() {
    let Some(folder) = data("inject") else { return };
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    let mut equal = 0;
    for case_folder in cases(&folder) {
        let name = case_folder.file_name().unwrap().to_string_lossy().into_owned();
        let case = json(&case_folder.join("case.json"));
        if case["webhookOnly"] == true || case["platform"].is_string() {
            skipped += 1;
            continue;
        }
        let mut found = Vec::new();
        let input = case_folder.join("input.yaml");
        let result = config(&case_folder, &case)
            .and_then(|config| inject::inject_text(&input, &text(&input), &config).map_err(|error| chain(&error)));
        match (result, case_folder.join("expected-error.txt").exists()) {
            (Ok(_), true) => found.push("an error is expected".to_owned()),
            (Err(_), true) => {}
            (Err(error), false) => found.push(error),
            (Ok((out, done)), false) => {
                let want = text(&case_folder.join("expected.yaml"));
                equal += usize::from(want == out);
                if want != out && std::env::var_os("SHOW_BYTES").is_some() {
                    let line = want.lines().zip(out.lines()).find(|(want, got)| want != got);
                    println!("BYTES {name}: {line:?}");
                }
                let (want, got) = (documents(&want), documents(&out));
                diff(&Value::Array(want), &Value::Array(got), "", &mut found);
                let warnings: Vec<String> = done
                    .iter()
                    .flat_map(|document| &document.warnings)
                    .filter(|warning| warning.starts_with("===>"))
                    .cloned()
                    .collect();
                if let Some(want) = case["warnings"].as_array() {
                    diff(&Value::Array(want.clone()), &serde_json::json!(warnings), "warnings", &mut found);
                }
            }
        }
        if found.is_empty() {
            passed += 1;
        } else {
            failed.push((name, found));
        }
    }
    println!("inject: {equal} equal byte for byte");
    report("inject", passed, skipped, &failed);
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Applies add, replace and remove.
fn apply(mut value: Value, operations: &[Value]) -> Value {
    for operation in operations {
        let path = operation["path"].as_str().unwrap();
        let (parent, key) = path.rsplit_once('/').unwrap();
        let key = key.replace("~1", "/").replace("~0", "~");
        let kind = operation["op"].as_str().unwrap();
        match value.pointer_mut(parent).unwrap_or_else(|| panic!("{operation}")) {
            Value::Array(items) => {
                let at: usize = key.parse().unwrap();
                match kind {
                    "add" => items.insert(at, operation["value"].clone()),
                    "remove" => drop(items.remove(at)),
                    _ => items[at] = operation["value"].clone(),
                }
            }
            Value::Object(map) => match kind {
                "remove" => drop(map.shift_remove(&key).unwrap()),
                _ => drop(map.insert(key, operation["value"].clone())),
            },
            _ => panic!("{operation}"),
        }
    }
    value
}

#[test]
fn admission() {
    let Some(folder) = data("admission") else { return };
    let (mut passed, mut failed) = (0, Vec::new());
    for case_folder in cases(&folder) {
        let name = case_folder.file_name().unwrap().to_string_lossy().into_owned();
        let case = json(&case_folder.join("case.json"));
        let mut found = Vec::new();
        let request = text(&case_folder.join("request.json"));
        let mut config = config(&case_folder, &case).unwrap();
        if config.revision.is_empty() {
            config.revision = "default".to_owned();
        }
        let path = case["path"].as_str().unwrap();
        let namespaces = |name: &str| {
            let annotations = case["namespaceAnnotations"][name].as_object()?;
            let annotations = annotations.iter().map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned()));
            Some(inject::NamespaceMeta { annotations: annotations.collect(), ..inject::NamespaceMeta::default() })
        };
        let body = request.as_bytes();
        let known = webhook::Known { namespaces: &namespaces, ..webhook::Known::NOTHING };
        let response = webhook::handle_with(path, Some("application/json"), body, &config, known);
        if i64::from(response.status) != case["httpStatus"].as_i64().unwrap_or(200) {
            found.push(format!("HTTP status {}", response.status));
        } else if response.status == 200 {
            let want = json(&case_folder.join("response.json"));
            let got: Value = serde_json::from_slice(&response.body).unwrap();
            for key in ["apiVersion", "kind"] {
                diff(&want[key], &got[key], key, &mut found);
            }
            for key in ["uid", "allowed"] {
                diff(&want["response"][key], &got["response"][key], key, &mut found);
            }
            let operations: Vec<Value> = match got["response"]["patch"].as_str() {
                Some(patch) => {
                    serde_json::from_slice(&data_encoding::BASE64.decode(patch.as_bytes()).unwrap()).unwrap()
                }
                None => Vec::new(),
            };
            let patched = case_folder.join("patched-pod.json");
            if patched.exists() {
                if got["response"]["allowed"] == false {
                    found.push(got["response"]["status"]["message"].to_string());
                }
                let mut again: Value = serde_json::from_str(&request).unwrap();
                let object = apply(again["request"]["object"].clone(), &operations);
                diff(&json(&patched), &object, "", &mut found);
                // Injecting what was injected changes nothing.
                again["request"]["object"] = object;
                let body = again.to_string();
                let second = webhook::handle_with(path, Some("application/json"), body.as_bytes(), &config, known);
                let second: Value = serde_json::from_slice(&second.body).unwrap();
                let patch = second["response"]["patch"].as_str().unwrap_or_default();
                let patch = data_encoding::BASE64.decode(patch.as_bytes()).unwrap();
                if !patch.is_empty() && patch != b"[]" {
                    found.push(format!("injected again: {}", String::from_utf8_lossy(&patch)));
                }
            } else if !operations.is_empty() {
                found.push("no patch is expected".to_owned());
            }
        }
        if found.is_empty() {
            passed += 1;
        } else {
            failed.push((name, found));
        }
    }
    report("admission", passed, 0, &failed);
}

/// Files of other groups are named from the group's folder, own files from the case's.
fn root(folder: &Path, case_folder: &Path, path: &str) -> PathBuf {
    if path.starts_with("..") { folder.join(path) } else { case_folder.join(path) }
}

#[test]
fn command_line() {
    let Some(folder) = data("inject-cli") else { return };
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    for case_folder in cases(&folder) {
        let name = case_folder.file_name().unwrap().to_string_lossy().into_owned();
        let case = json(&case_folder.join("case.json"));
        let mut found = Vec::new();
        let mut args = vec!["kube-inject".to_owned()];
        for arg in case["args"].as_array().unwrap() {
            let mut arg = arg.as_str().unwrap().to_owned();
            for key in ["INPUT", "INJECT", "VALUES", "MESH"] {
                if let Some(path) = case[key].as_str() {
                    arg = arg.replace(&format!("${key}"), &root(&folder, &case_folder, path).display().to_string());
                }
            }
            if !arg.starts_with('-') && case_folder.join(&arg).is_file() {
                arg = case_folder.join(&arg).display().to_string();
            }
            args.push(arg);
        }
        if args.iter().any(|arg| arg == "-") {
            // Standard input is the program's own; the same text from a file is compared elsewhere.
            skipped += 1;
            continue;
        }
        let out = tempfile::NamedTempFile::new().unwrap();
        args.extend(["-o".to_owned(), out.path().display().to_string()]);
        if let Some(native) = case["env"]["ENABLE_NATIVE_SIDECARS"].as_str() {
            args.extend(["--native-sidecars".to_owned(), native.to_owned()]);
        }
        let command = <inject::Args as clap::Args>::augment_args(clap::Command::new("kube-inject"));
        let done = command
            .try_get_matches_from(&args)
            .map_err(anyhow::Error::from)
            .and_then(|matches| Ok(<inject::Args as clap::FromArgMatches>::from_arg_matches(&matches)?))
            .and_then(inject::run);
        match (done, case["exit"] == 0) {
            (Err(error), true) => found.push(format!("{error:#}")),
            (Ok(_), false) => found.push("an error is expected".to_owned()),
            (Ok(_), true) => {
                let want = documents(&text(&case_folder.join("stdout")));
                let got = documents(&text(out.path()));
                diff(&Value::Array(want), &Value::Array(got), "", &mut found);
            }
            (Err(_), false) => {}
        }
        if found.is_empty() {
            passed += 1;
        } else {
            failed.push((name, found));
        }
    }
    report("inject-cli", passed, skipped, &failed);
}

#[test]
fn templates() {
    let Some(folder) = data("gotmpl/istio") else { return };
    let (mut passed, mut failed) = (0, Vec::new());
    for case_folder in cases(&folder) {
        let name = case_folder.file_name().unwrap().to_string_lossy().into_owned();
        let template = text(&case_folder.join("template.tmpl"));
        let got = inject::render(&template, "data.json", &text(&case_folder.join("data.json")));
        let mut found = Vec::new();
        match (got, case_folder.join("rendered.txt").exists()) {
            (Ok(got), true) => {
                let want = text(&case_folder.join("rendered.txt"));
                let lines = want.lines().zip(got.lines()).enumerate().find(|(_, (want, got))| want != got);
                if let Some((at, (want, got))) = lines {
                    found.push(format!("line {}: want {want:?} got {got:?}", at + 1));
                } else if want != got {
                    found.push(format!("want {} bytes, got {}", want.len(), got.len()));
                }
            }
            (Err(error), true) => found.push(format!("{error:#}")),
            (Ok(_), false) => found.push("an error is expected".to_owned()),
            (Err(_), false) => {}
        }
        if found.is_empty() {
            passed += 1;
        } else {
            failed.push((name, found));
        }
    }
    report("templates", passed, 0, &failed);
}

#[test]
fn snippets() {
    let Some(folder) = data("gotmpl") else { return };
    let table = json(&folder.join("snippets.json"));
    let data = table["data"].to_string();
    let (mut passed, mut failed) = (0, Vec::new());
    for case in table["cases"].as_array().unwrap() {
        let template = case["template"].as_str().unwrap();
        let got = inject::render(template, "data.json", &data);
        let found = match (&got, case["output"].as_str()) {
            (Ok(got), Some(want)) if got == want => Vec::new(),
            (Err(_), None) => Vec::new(),
            _ => vec![format!("{template:?}: want {} got {got:?}", case["output"])],
        };
        if found.is_empty() {
            passed += 1;
        } else {
            failed.push((case["name"].as_str().unwrap().to_owned(), found));
        }
    }
    report("snippets", passed, 0, &failed);
}
