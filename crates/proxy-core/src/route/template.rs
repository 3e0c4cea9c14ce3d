use crate::any::Typed;
use crate::matchers::{Regex, Substitution};
use crate::pb;
use crate::pb::route::route_match::PathSpecifier;
use crate::rejected::{Compiled, Invalid};

/// Bytes of one path element, as Envoy's `uri_template` has them.
const ELEMENT: &str = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=]";
/// The same with slashes.
const ANY: &str = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=/]";

/// Turns a URI template (`/a/*`, `/a/**`, `/a/{name}`, `/a/{name=b/*}/c`) into a regular expression
/// (Envoy `UriTemplateMatcher`, which does the same).
pub(crate) fn template_regex(template: &str) -> Compiled<Regex> {
    let (pattern, _) = pattern(template)?;
    Regex::new(&pattern).map_err(|reason| Invalid::new("path_template", format!("{template:?} {reason}")))
}

/// Whether an extension matches the paths of a route.
pub(super) fn has_path_policy(matcher: Option<&pb::route::RouteMatch>) -> bool {
    matches!(matcher.and_then(|m| m.path_specifier.as_ref()), Some(PathSpecifier::PathMatchPolicy(_)))
}

/// `path_rewrite_policy` of a route, which builds on its `path_match_policy`.
pub(super) fn rewrite_policy(
    policy: &pb::core::TypedExtensionConfig,
    matcher: Option<&pb::route::RouteMatch>,
) -> Compiled<Substitution> {
    use pb::ext::path::{r#match::uri_template::v3 as matching, rewrite::uri_template::v3 as rewriting};
    let typed = Typed::open(policy.typed_config.as_ref())?;
    if typed.name != "envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig" {
        return Err(typed.unknown());
    }
    let rewrite: rewriting::UriTemplateRewriteConfig = typed.decode()?;
    let Some(PathSpecifier::PathMatchPolicy(extension)) = matcher.and_then(|m| m.path_specifier.as_ref()) else {
        return Err(Invalid::new("", "needs a path_match_policy"));
    };
    let template: matching::UriTemplateMatchConfig = Typed::open(extension.typed_config.as_ref())?.decode()?;
    template_rewrite(&template.path_template, &rewrite.path_template_rewrite)
}

/// The rewrite of paths that a template matches: `{name}` stands for what its variable held (Envoy `UriTemplateRewriter`).
fn template_rewrite(template: &str, rewrite: &str) -> Compiled<Substitution> {
    let bad = |reason: &str| Invalid::new("path_template_rewrite", format!("{rewrite:?} {reason}"));
    let (pattern, names) = pattern(template)?;
    let mut parts = Vec::new();
    let mut rest = rewrite;
    while let Some((literal, after)) = rest.split_once('{') {
        let (name, after) = after.split_once('}').ok_or_else(|| bad("has an unclosed brace"))?;
        let group = names.iter().position(|known| known == name).ok_or_else(|| bad("names no variable"))?;
        parts.push((literal.to_owned(), group + 1));
        rest = after;
    }
    if rest.contains('}') || !rewrite.starts_with('/') {
        return Err(bad("is no path"));
    }
    Substitution::of_groups(&pattern, parts, rest).map_err(|reason| bad(&reason))
}

/// The expression of a template, with a group for each variable, and the names of those.
fn pattern(template: &str) -> Compiled<(String, Vec<String>)> {
    let bad = |reason: &str| Invalid::new("path_template", format!("{template:?} {reason}"));
    if !template.starts_with('/') {
        return Err(bad("does not start with a slash"));
    }
    let mut pattern = String::new();
    let mut names: Vec<String> = Vec::new();
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
                if names.iter().any(|known| known == name) {
                    return Err(bad("has a variable twice"));
                }
                names.push(name.to_owned());
                pattern.push('(');
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
            '}' if depth == 1 => {
                pattern.push(')');
                depth = 0;
            }
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
    Ok((pattern, names))
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
        let rewrite = template_rewrite("/a/{x}/{rest=**}", "/{rest}/z/{x}").unwrap();
        assert_eq!(rewrite.apply(b"/a/1/b/c"), b"/b/c/z/1");
        for bad in ["/{y}", "/{x", "{x}", "/x}"] {
            assert!(template_rewrite("/a/{x}", bad).is_err(), "{bad}");
        }
        for bad in ["/{a}/{a}", "x", "/{", "/{}", "/}", "/**/*", "/a b", "/{a={b}}"] {
            assert!(template_regex(bad).is_err(), "{bad}");
        }
    }
}
