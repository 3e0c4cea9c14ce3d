//! Labels and annotations as the downward API writes them: `key="value"` a line, the value quoted as Go's `%q` does.

use std::collections::BTreeMap;
use std::path::Path;

/// A line that is not of that form.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("{key}: the value {value} is not a quoted string")]
pub(crate) struct BadLine {
    key: String,
    value: String,
}

/// Parses the text of a downward API file. Lines without `=` are skipped, as istio's `ParseDownwardAPI` does.
pub(crate) fn parse(text: &str) -> Result<BTreeMap<String, String>, BadLine> {
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let unquoted = pairs.map(|(key, value)| {
        let bad = || BadLine { key: key.to_owned(), value: value.to_owned() };
        Ok((key.to_owned(), unquote(value).ok_or_else(bad)?))
    });
    unquoted.collect()
}

/// Reads and parses a file; one that is missing or unreadable is empty, and the latter is logged.
pub(crate) fn read(path: &Path) -> BTreeMap<String, String> {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text).unwrap_or_else(|error| {
            tracing::warn!(%error, path = %path.display(), "pod information is not usable");
            BTreeMap::new()
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "pod information cannot be read");
            BTreeMap::new()
        }
    }
}

/// Go's `strconv.Unquote` for double-quoted strings.
fn unquote(quoted: &str) -> Option<String> {
    let inner = quoted.strip_prefix('"')?.strip_suffix('"')?;
    let mut out = Vec::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => return None,
            '\\' => escape(&mut chars, &mut out)?,
            c => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    String::from_utf8(out).ok()
}

fn escape(chars: &mut std::str::Chars<'_>, out: &mut Vec<u8>) -> Option<()> {
    let kind = chars.next()?;
    let simple = match kind {
        'a' => 7,
        'b' => 8,
        'f' => 12,
        'n' => b'\n',
        'r' => b'\r',
        't' => b'\t',
        'v' => 11,
        '\\' | '"' => kind as u8,
        'x' => u8::try_from(hex(chars, 2)?).ok()?,
        'u' | 'U' => {
            let c = char::from_u32(hex(chars, if kind == 'u' { 4 } else { 8 })?)?;
            out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            return Some(());
        }
        _ => return None,
    };
    out.push(simple);
    Some(())
}

fn hex(chars: &mut std::str::Chars<'_>, digits: usize) -> Option<u32> {
    let text: String = chars.take(digits).collect();
    (text.len() == digits).then(|| u32::from_str_radix(&text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kubelets_write() {
        let text = "app=\"reviews\"\nnote=\"a \\\"b\\\" \\n \\u00e9 \\x41\"\n\nrubbish\n";
        let parsed = parse(text).unwrap();
        assert_eq!(parsed["app"], "reviews");
        assert_eq!(parsed["note"], "a \"b\" \n é A");
        assert_eq!(parsed.len(), 2);
        for bad in ["a=b", "a=\"b", "a=\"\\", "a=\"\\u12\"", "a=\"\\q\"", "a=\"\"\""] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
