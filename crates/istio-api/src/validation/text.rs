//! Names and other text that have to have a form.

use std::net::IpAddr;

/// A letter or digit, then letters, digits and `-`, not `-` at the end; 63 characters at most
/// (istiod `labels.IsDNS1123Label`, which takes capitals too).
pub(super) fn is_dns_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    !bytes.is_empty()
        && bytes.len() <= 63
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-'
}

/// istiod `ValidateFQDN`.
pub(super) fn fqdn(host: &str) -> Result<(), String> {
    dns_name(host)?;
    labels(host, host)
}

/// istiod `ValidateWildcardDomain`: `*`, or a name whose first label may start with `*` or `*-`. Alone, that label may
/// also be a number.
pub(super) fn wildcard_host(host: &str) -> Result<(), String> {
    dns_name(host)?;
    let (first, rest) = host.split_once('.').map_or((host, None), |(first, rest)| (first, Some(rest)));
    let name = first.strip_prefix("*-").or(first.strip_prefix('*')).unwrap_or(first);
    if first != "*" && (first.len() > 63 || !is_dns_label(name)) {
        return Err(format!("domain name {host:?} invalid (label {first:?} invalid)"));
    }
    rest.map_or(Ok(()), |rest| labels(host, rest))
}

fn dns_name(host: &str) -> Result<(), String> {
    match host.len() {
        0 => Err("empty domain name not allowed".to_owned()),
        1..=255 => Ok(()),
        _ => Err("a domain name has at most 255 characters".to_owned()),
    }
}

/// istiod `ValidateDNS1123Labels`: the last label may be empty, and must not be a number.
fn labels(host: &str, rest: &str) -> Result<(), String> {
    let (before, last) = rest.rsplit_once('.').map_or((None, rest), |(before, last)| (Some(before), last));
    if last.parse::<i64>().is_ok() {
        return Err(format!("domain name {host:?} invalid (top level domain {last:?} cannot be all-numeric)"));
    }
    for label in before.iter().flat_map(|before| before.split('.')).chain((!last.is_empty()).then_some(last)) {
        if !is_dns_label(label) {
            return Err(format!("domain name {host:?} invalid (label {label:?} invalid)"));
        }
    }
    Ok(())
}

pub(super) fn is_ip(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok()
}

/// istiod `ValidateIPSubnet`: an address or a CIDR block.
pub(super) fn subnet(text: &str) -> Result<(), String> {
    let valid = match text.split_once('/') {
        None => is_ip(text),
        Some((address, length)) => match (address.parse::<IpAddr>(), length.parse::<u8>()) {
            (Ok(IpAddr::V4(_)), Ok(length)) => length <= 32,
            (Ok(IpAddr::V6(_)), Ok(length)) => length <= 128,
            _ => false,
        },
    };
    if valid { Ok(()) } else { Err(format!("{text:?} is not a valid IP address or CIDR block")) }
}

/// istiod `ValidateUnixAddress`: the path after `unix://`.
pub(super) fn unix_address(path: &str) -> Result<(), String> {
    if path.is_empty() {
        return Err("unix address must not be empty".into());
    }
    if path.starts_with('@') || (path.starts_with('/') && !path.ends_with('/')) {
        return Ok(());
    }
    Err(format!("{path} is not an absolute path to a file"))
}

/// istiod `ValidateProtocol`; empty text means the proxy sniffs.
pub(super) fn protocol(text: &str) -> Result<(), String> {
    let is_known = mesh_types::Protocol::parse(text) != mesh_types::Protocol::Unsupported;
    if text.is_empty() || is_known || text.eq_ignore_ascii_case("HTTP_PROXY") {
        return Ok(());
    }
    Err(format!("unsupported protocol: {text}"))
}

/// istiod `ValidatePortName`.
pub(super) fn port_name(name: &str) -> Result<(), String> {
    if is_dns_label(name) { Ok(()) } else { Err(format!("invalid port name: {name:?}")) }
}

/// istiod `validateTagKey`: a name with a DNS name before it, or without.
pub(super) fn is_label_key(key: &str) -> bool {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let prefix_valid = prefix.is_none_or(|prefix| prefix.len() <= 253 && prefix.split('.').all(is_prefix_label));
    prefix_valid && !name.is_empty() && name.len() <= 63 && is_label_value(name)
}

fn is_prefix_label(text: &str) -> bool {
    !text.is_empty() && is_label_value(text) && !text.contains('_')
}

/// Of any length, which Kubernetes would refuse and istiod does not.
pub(super) fn is_label_value(value: &str) -> bool {
    let ends = |c: Option<&u8>| c.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = value.as_bytes();
    bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && ends(bytes.first())
        && ends(bytes.last())
}

/// istiod `validateStringRegexp`: RE2 of at most 1,024 bytes.
pub(super) fn regex(pattern: &str) -> Result<(), String> {
    if pattern.len() > 1024 {
        return Err("regex is too large, max length allowed is 1024".into());
    }
    match regex_automata::util::syntax::parse(pattern) {
        Ok(_) => Ok(()),
        // RE2 takes lone braces for themselves and has \Q…\E and \C, which our parser has not: it cannot tell.
        Err(_) if pattern.contains(['{', '}']) || pattern.contains("\\Q") || pattern.contains("\\C") => Ok(()),
        Err(error) => {
            let text = error.to_string();
            let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            Err(format!("{pattern:?} is not an RE2 regular expression: {reason}"))
        }
    }
}

/// istiod `ValidateHTTPHeaderNameOrJwtClaimRoute`.
pub(super) fn header_match(name: &str) -> Result<(), String> {
    let pseudo = matches!(name, ":method" | ":scheme" | ":authority" | ":path" | ":status");
    if pseudo || is_jwt_claim(name) { Ok(()) } else { header_name(name) }
}

/// istiod `jwt.ToRoutingClaim`.
pub(super) fn is_jwt_claim(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    lower.strip_prefix("@request.auth.claims").is_some_and(|rest| rest.starts_with('.') || rest.starts_with('['))
}

/// A header's name as HTTP allows it, RFC 9110 section 5.6.2.
pub(super) fn header_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("header name cannot be empty".into());
    }
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.bytes().all(token) { Ok(()) } else { Err(format!("header name {name:?} is not a valid header name")) }
}

/// A header's name in Kubernetes' narrower form: letters, digits, `-`, and `_`, which istiod adds.
pub(super) fn strict_header_name(name: &str) -> Result<(), String> {
    let valid = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if valid { Ok(()) } else { Err(format!("header name {name:?} is not a valid header name")) }
}

/// istiod `ValidateHTTPHeaderOperationName`, and `…WithAuthorityOperationName` where `authority` may be set.
pub(super) fn header_operation(name: &str, authority: bool) -> Result<(), String> {
    let is_authority = is_authority(name);
    if name.is_empty() {
        Err("header name cannot be empty".into())
    } else if is_authority && authority {
        Ok(())
    } else if name.eq_ignore_ascii_case("host") {
        Err(format!("invalid header {name:?}: cannot set Host header"))
    } else if name.starts_with(':') {
        Err(format!("invalid header {name:?}: header cannot have \":\" prefix"))
    } else {
        Ok(())
    }
}

pub(super) fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case(":authority") || name.eq_ignore_ascii_case("host")
}

/// istiod `ValidateHTTPHeaderValue`: no control characters, and `%` only in pairs around a command.
pub(super) fn header_value(value: &str) -> Result<(), String> {
    if value.bytes().any(|b| (b < 0x20 && b != b'\t') || b == 0x7f) {
        return Err(format!("header value configuration {value:?} is invalid"));
    }
    let mut rest = value;
    while let Some(start) = rest.find('%') {
        let after = &rest[start + 1..];
        if let Some(escaped) = after.strip_prefix('%') {
            rest = escaped;
            continue;
        }
        let Some(end) = closing_percent(after) else {
            return Err(format!("header value configuration {value:?}: a single % must be written %%"));
        };
        rest = &after[end + 1..];
    }
    Ok(())
}

/// The end of a command such as `DOWNSTREAM_REMOTE_ADDRESS` or `REQ(x)`; `%` may stand in the parentheses.
fn closing_percent(command: &str) -> Option<usize> {
    let mut depth = 0usize;
    for (index, byte) in command.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b'%' if depth == 0 => return (index > 0).then_some(index),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hosts() {
        for good in ["a", "a.b.", "*", "*.com", "*-a.b", "*a.b", "A.b-c", "xn--a.b", "999", "a.1."] {
            assert!(wildcard_host(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "a..b", "a.*.b", "-a", "a.1", "*.*.a", "a_b", "a/b", &"a.".repeat(200)] {
            assert!(wildcard_host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_as_istiod_takes_them() {
        for good in ["a", "a.b/c", "A_b.c", &format!("{}/a", "a".repeat(100))] {
            assert!(is_label_key(good), "{good}");
        }
        for bad in ["", "a/", "/a", "a/b/c", "-a", "a_b/c", &"a".repeat(64)] {
            assert!(!is_label_key(bad), "{bad}");
        }
        assert!(is_label_value("") && is_label_value(&"a".repeat(100)) && !is_label_value("a-"));
    }

    #[test]
    fn regexes_that_only_re2_knows_pass() {
        for good in ["/users/{id}", r"\Qa.b\E", "^(.*?;)?(user=jason)(;.*)?$"] {
            assert_eq!(regex(good), Ok(()), "{good}");
        }
        for bad in ["(", "[a", "*a", "(?=x)"] {
            assert!(regex(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn header_values() {
        for good in ["a", "100%%", "%HOSTNAME%", "a %REQ(x%y)% b"] {
            assert_eq!(header_value(good), Ok(()), "{good}");
        }
        for bad in ["abc%123", "%START_TIME%%", "a\u{1}"] {
            assert!(header_value(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_check_panic(text in ".{0,80}") {
            let _ = (wildcard_host(&text), fqdn(&text), subnet(&text), regex(&text), header_value(&text));
            let _ = (is_label_key(&text), header_match(&text), header_operation(&text, true), unix_address(&text));
        }
    }
}
