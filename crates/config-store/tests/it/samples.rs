//! What we ship as samples must be good: no rejects, no warnings.

use std::path::{Path, PathBuf};

use config_store::{Key, Object};

fn folders(root: &Path, out: &mut Vec<PathBuf>) {
    out.push(root.to_path_buf());
    for entry in std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            folders(&entry, out);
        }
    }
}

#[test]
fn every_sample_is_accepted_without_a_warning() {
    let mut all = Vec::new();
    folders(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../samples"), &mut all);
    let (documents, errors) = manifest::read(&all);
    let mut problems: Vec<String> = errors.iter().map(ToString::to_string).collect();
    for document in documents.iter().filter(|document| Key::of(document).is_some()) {
        match Object::read(document) {
            Ok((_, warnings)) => problems.extend(warnings.iter().map(ToString::to_string)),
            Err(rejected) => problems.push(rejected.to_string()),
        }
    }
    assert!(documents.len() > 10);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
