use crate::matchers::Regex;
use crate::rejected::{Compiled, Invalid};

/// Bytes of one path element, as Envoy's `uri_template` has them.
const ELEMENT: &str = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=]";
/// The same with slashes.
const ANY: &str = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=/]";

/// Turns a URI template (`/a/*`, `/a/**`, `/a/{name}`, `/a/{name=b/*}/c`) into a regular expression
/// (Envoy `UriTemplateMatcher`, which does the same).
pub(crate) fn template_regex(template: &str) -> Compiled<Regex> {
    let bad = |reason: &str| Invalid::new("path_template", format!("{template:?} {reason}"));
    if !template.starts_with('/') {
        return Err(bad("does not start with a slash"));
    }
    let mut pattern = String::new();
    let mut rest = template;
    let mut depth = 0;
    let mut seen_any = false;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '*' if rest.starts_with('*') => {
                rest = &rest[1..];
                seen_any = true;
                pattern.push_str(&format!("{ANY}*"));
            }
            '*' if seen_any => return Err(bad("has an operator after **")),
            '*' => pattern.push_str(&format!("{ELEMENT}+")),
            '{' if depth == 0 => {
                let end = rest.find('}').ok_or_else(|| bad("has an unclosed brace"))?;
                let inside = &rest[..end];
                let name = inside.split('=').next().unwrap_or_default();
                if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                    return Err(bad("has an invalid variable name"));
                }
                match inside.split_once('=') {
                    None => {
                        pattern.push_str(&format!("{ELEMENT}+"));
                        rest = &rest[end..];
                    }
                    // What follows is a template of its own, up to the closing brace.
                    Some(_) => rest = &rest[name.len() + 1..],
                }
                depth = 1;
            }
            '}' if depth == 1 => depth = 0,
            '{' | '}' => return Err(bad("has unbalanced braces")),
            c if c.is_ascii_alphanumeric() || "-._~%!$&'()+,;:@=/".contains(c) => {
                if !c.is_ascii_alphanumeric() && c != '/' && c != '_' {
                    pattern.push('\\');
                }
                pattern.push(c);
            }
            _ => return Err(bad("has an invalid character")),
        }
    }
    if depth != 0 {
        return Err(bad("has an unclosed brace"));
    }
    Regex::new(&pattern).map_err(|reason| bad(&reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates() {
        let check = |template: &str, path: &str| template_regex(template).unwrap().matches(path.as_bytes());
        assert!(check("/t/*/x", "/t/abc/x") && !check("/t/*/x", "/t/a/b/x") && !check("/t/*/x", "/t//x"));
        assert!(check("/u/**", "/u/a/b") && check("/u/**", "/u/") && !check("/u/**", "/u"));
        assert!(check("/a/{x}/b", "/a/1.2/b") && check("/a/{x=c/*}/b", "/a/c/1/b"));
        assert!(check("/a.b&c", "/a.b&c") && !check("/a.b", "/axb"));
        for bad in ["x", "/{", "/{}", "/}", "/**/*", "/a b", "/{a={b}}"] {
            assert!(template_regex(bad).is_err(), "{bad}");
        }
    }
}
