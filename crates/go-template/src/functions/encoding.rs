//! sprig's functions on JSON, base64, checksums, paths, URLs and the environment.

mod decode;
mod url;

use std::fmt::Write;

use data_encoding::{BASE32, BASE64};
use sha2::Digest;

use super::{Functions, Outcome};
use crate::json;
use crate::value::Value;

fn text<'a>(value: impl Into<String>) -> Outcome<'a> {
    Ok(Value::from(value.into()))
}

pub(super) fn define(functions: &mut Functions) {
    for name in ["toJson", "mustToJson"] {
        functions.define(name, 1, Some(1), |args| text(json::encode(&args.get(0).to_json(), false)));
    }
    for name in ["toRawJson", "mustToRawJson"] {
        functions.define(name, 1, Some(1), |args| text(json::encode(&args.get(0).to_json(), true)));
    }
    for name in ["toPrettyJson", "mustToPrettyJson"] {
        functions.define(name, 1, Some(1), |args| text(json::encode_pretty(&args.get(0).to_json())));
    }
    functions.define("fromJson", 1, Some(1), |args| {
        Ok(serde_json::from_str(args.text(0)?).map_or(Value::Nil, Value::from_owned_json))
    });
    functions.define("mustFromJson", 1, Some(1), |args| {
        serde_json::from_str(args.text(0)?).map(Value::from_owned_json).map_err(|error| error.to_string())
    });
    functions.define("b64enc", 1, Some(1), |args| text(BASE64.encode(args.text(0)?.as_bytes())));
    functions.define("b64dec", 1, Some(1), |args| text(decode::base64(args.text(0)?)));
    functions.define("b32enc", 1, Some(1), |args| text(BASE32.encode(args.text(0)?.as_bytes())));
    functions.define("b32dec", 1, Some(1), |args| text(decode::base32(args.text(0)?)));
    functions.define("sha1sum", 1, Some(1), |args| text(checksum::<sha1::Sha1>(args.text(0)?)));
    functions.define("sha256sum", 1, Some(1), |args| text(checksum::<sha2::Sha256>(args.text(0)?)));
    functions.define("sha512sum", 1, Some(1), |args| text(checksum::<sha2::Sha512>(args.text(0)?)));
    functions.define("adler32sum", 1, Some(1), |args| text(adler32(args.text(0)?.as_bytes()).to_string()));

    for name in ["base", "osBase"] {
        functions.define(name, 1, Some(1), |args| text(base(args.text(0)?)));
    }
    for name in ["dir", "osDir"] {
        functions.define(name, 1, Some(1), |args| {
            let path = args.text(0)?;
            text(clean(path.rfind('/').map_or("", |at| &path[..=at])))
        });
    }
    for name in ["clean", "osClean"] {
        functions.define(name, 1, Some(1), |args| text(clean(args.text(0)?)));
    }
    for name in ["ext", "osExt"] {
        functions.define(name, 1, Some(1), |args| {
            let file = args.text(0)?.rsplit('/').next().unwrap_or("");
            text(file.rfind('.').map_or("", |at| &file[at..]))
        });
    }
    for name in ["isAbs", "osIsAbs"] {
        functions.define(name, 1, Some(1), |args| Ok(Value::Bool(args.text(0)?.starts_with('/'))));
    }
    functions.define("urlParse", 1, Some(1), |args| url::parse(args.text(0)?));
    functions.define("urlJoin", 1, Some(1), |args| text(url::join(&args.map(0)?)?));
    functions.define("env", 1, Some(1), |args| text(std::env::var(args.text(0)?).unwrap_or_default()));
    functions.define("expandenv", 1, Some(1), |args| text(expand(args.text(0)?)));
}

fn checksum<D: Digest>(text: &str) -> String {
    let mut out = String::new();
    for byte in D::digest(text.as_bytes()) {
        let _ = write!(out, "{byte:02x}");
    }
    out
}

fn adler32(bytes: &[u8]) -> u32 {
    let (mut a, mut b) = (1u32, 0u32);
    for byte in bytes {
        a = (a + u32::from(*byte)) % 65521;
        b = (b + a) % 65521;
    }
    b << 16 | a
}

/// `path.Base`
fn base(path: &str) -> &str {
    if path.is_empty() {
        return ".";
    }
    let trimmed = path.trim_end_matches('/');
    if trimmed.is_empty() { "/" } else { trimmed.rsplit('/').next().unwrap_or(trimmed) }
}

/// `path.Clean`
fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    let joined = parts.join("/");
    match (rooted, joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".to_owned(),
        (false, false) => joined,
    }
}

/// `os.ExpandEnv`: `$NAME` and `${NAME}`.
fn expand(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let (name, after) = if let Some(braced) = rest.strip_prefix('{') {
            match braced.split_once('}') {
                Some(pair) => pair,
                None => (braced, ""),
            }
        } else {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
            rest.split_at(end)
        };
        out.push_str(&std::env::var(name).unwrap_or_default());
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::{base, clean};

    #[test]
    fn paths_are_cleaned_as_go_does() {
        assert_eq!(clean("/a/./b/../c/"), "/a/c");
        assert_eq!(clean("../a"), "../a");
        assert_eq!(clean(""), ".");
        assert_eq!(clean("/.."), "/");
        assert_eq!(base("/a/b/"), "b");
    }
}
