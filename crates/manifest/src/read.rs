//! Files and folders to documents.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::{Document, Error, parse};

/// Bytes one file may have; a manifest of 1,000 services is about 2 MB.
pub const FILE_SIZE_LIMIT: u64 = 64 << 20;
/// Nodes that all aliases of one file may expand to, so that a few nested anchors cannot fill memory.
pub const ALIAS_EVENTS_LIMIT: usize = 200_000;

/// File of `outrigger up` beside the manifests; it holds no Kubernetes objects.
const RUN_FILE: &str = "outrigger.yaml";

/// Reads files, folders (in order of name; `*.yaml`, `*.yml`, `*.json`) and `-` for standard input. What
/// cannot be read or parsed becomes an error; all the rest is returned.
///
/// Folders inside folders are left alone, as `kubectl apply -f` does: a sample's folder has variants
/// below it that are applied one by one. Names that start with a dot are passed over, as Kubernetes mounts
/// volumes through `..data` links.
pub fn read(paths: &[PathBuf]) -> (Vec<Document>, Vec<Error>) {
    let (mut documents, mut errors) = (Vec::new(), Vec::new());
    for path in paths {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            let read = std::io::stdin().lock().take(FILE_SIZE_LIMIT).read_to_string(&mut text);
            take(path, read.map(|_| text), &mut documents, &mut errors);
        } else if path.is_dir() {
            list(path, &mut documents, &mut errors);
        } else {
            take(path, read_file(path), &mut documents, &mut errors);
        }
    }
    (documents, errors)
}

fn list(folder: &Path, documents: &mut Vec<Document>, errors: &mut Vec<Error>) {
    let mut entries: Vec<PathBuf> = match fs::read_dir(folder) {
        Ok(entries) => entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect(),
        Err(error) => return errors.push(io_error(folder, &error)),
    };
    entries.sort();
    for path in entries {
        if path.is_file() && is_manifest(&path) {
            take(&path, read_file(&path), documents, errors);
        }
    }
}

/// Reads one file and hands over each document before the next is read; see [`crate::parse_each`].
///
/// # Errors
/// When the file cannot be read or parsed; what was handed over before stands in front of the error.
pub fn read_each(path: &Path, take: impl FnMut(Document)) -> Result<(), Error> {
    let text = read_file(path).map_err(|error| io_error(path, &error))?;
    crate::parse_each(path, &text, take)
}

/// Whether [`read`] takes a file of this name from a folder.
pub fn is_manifest(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let extension = path.extension().and_then(|extension| extension.to_str());
    !name.starts_with('.') && name != RUN_FILE && matches!(extension, Some("yaml" | "yml" | "json"))
}

fn read_file(path: &Path) -> std::io::Result<String> {
    let file = fs::File::open(path)?;
    let mut text = String::new();
    let limit = FILE_SIZE_LIMIT + 1;
    if file.take(limit).read_to_string(&mut text)? as u64 == limit {
        return Err(std::io::Error::other(format!("larger than {} MiB", FILE_SIZE_LIMIT >> 20)));
    }
    Ok(text)
}

fn take(path: &Path, text: std::io::Result<String>, documents: &mut Vec<Document>, errors: &mut Vec<Error>) {
    match text.map_err(|error| io_error(path, &error)).and_then(|text| parse(path, &text)) {
        Ok(more) => documents.extend(more),
        Err(error) => errors.push(error),
    }
}

fn io_error(path: &Path, error: &std::io::Error) -> Error {
    Error { file: path.to_path_buf(), line: 0, column: 0, field: None, message: format!("cannot be read: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_read_in_order_and_one_broken_file_spoils_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let object = |name: &str| format!("apiVersion: v1\nkind: K\nmetadata: {{name: {name}}}\n");
        write("b.yaml", &object("b"));
        write("a.yml", &object("a"));
        write("below/c.yml", &object("c"));
        write("d.json", r#"{"apiVersion": "v1", "kind": "K", "metadata": {"name": "d"}}"#);
        write("broken.yaml", "a: [");
        write("notes.txt", "a: [");
        write(".hidden/e.yaml", &object("e"));
        write("outrigger.yaml", "images: {}");
        let (documents, errors) = read(&[dir.path().to_path_buf(), dir.path().join("missing.yaml")]);
        let names: Vec<_> = documents.iter().map(Document::name).collect();
        assert_eq!(names, ["a", "b", "d"]);
        assert_eq!(errors.len(), 2);
        assert!(errors[0].to_string().contains("broken.yaml:"), "{}", errors[0]);
        assert!(errors[1].to_string().contains("missing.yaml: cannot be read"), "{}", errors[1]);
    }
}
