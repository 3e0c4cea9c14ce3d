//! `urlParse` and `urlJoin`, as Go's `net/url`.

use std::fmt::Write;
use std::rc::Rc;

use crate::functions::Outcome;
use crate::value::{Element, Map, Value};

/// Where a part stands decides which characters it may have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Path,
    Host,
    User,
    Fragment,
}

fn plain(byte: u8, part: Part) -> bool {
    match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => true,
        b'$' | b'&' | b'+' | b',' | b'/' | b':' | b';' | b'=' | b'?' | b'@' if part == Part::Fragment => true,
        b'$' | b'&' | b'+' | b',' | b';' | b'=' => true,
        b'/' | b':' | b'@' => part == Part::Path || (part == Part::Host && byte == b':'),
        b'!' | b'(' | b')' | b'*' => matches!(part, Part::Fragment | Part::Host),
        b'\'' | b'[' | b']' | b'<' | b'>' | b'"' => part == Part::Host,
        _ => false,
    }
}

fn escape(text: &str, part: Part) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if plain(byte, part) {
            out.push(byte as char);
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

fn unescape(text: &str, part: Part) -> Result<String, String> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if byte == b'%' {
            let code = text.get(at + 1..at + 3).filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
            let Some(code) = code.and_then(|hex| u8::from_str_radix(hex, 16).ok()) else {
                let shown: String = text[at..].chars().take(3).collect();
                return Err(format!("invalid URL escape {shown:?}"));
            };
            if part == Part::Host && code < 0x80 && code != b'%' {
                return Err(format!("invalid URL escape {:?}", &text[at..at + 3]));
            }
            out.push(code);
            at += 3;
            continue;
        }
        if part == Part::Host && byte < 0x80 && !plain(byte, part) {
            return Err(format!("invalid character {:?} in host name", (byte as char).to_string()));
        }
        out.push(byte);
        at += 1;
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

fn scheme(url: &str) -> Result<(&str, &str), String> {
    for (at, c) in url.char_indices() {
        match c {
            'a'..='z' | 'A'..='Z' => {}
            '0'..='9' | '+' | '-' | '.' if at > 0 => {}
            ':' if at == 0 => return Err("missing protocol scheme".to_owned()),
            ':' => return Ok((&url[..at], &url[at + 1..])),
            _ => break,
        }
    }
    Ok(("", url))
}

fn user_info(written: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._:~!$&'()*+,;=%@".contains(c);
    if !written.chars().all(allowed) {
        return Err("net/url: invalid userinfo".to_owned());
    }
    let part = |text: &str| Ok::<_, String>(escape(&unescape(text, Part::User)?, Part::User));
    match written.split_once(':') {
        Some((name, password)) => Ok(format!("{}:{}", part(name)?, part(password)?)),
        None => part(written),
    }
}

fn host(written: &str) -> Result<String, String> {
    let port = match written.rfind('[') {
        Some(0) => match written.rfind(']') {
            Some(close) => {
                if written[1..close].split('%').next().and_then(|ip| ip.parse::<std::net::Ipv6Addr>().ok()).is_none() {
                    return Err("invalid host".to_owned());
                }
                &written[close + 1..]
            }
            None => return Err("missing ']' in host".to_owned()),
        },
        Some(_) => return Err("invalid IP-literal".to_owned()),
        None => written.find(':').map_or("", |colon| &written[colon..]),
    };
    let fine =
        port.is_empty() || port.strip_prefix(':').is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    if !fine {
        return Err(format!("invalid port {port:?} after host"));
    }
    unescape(written, Part::Host)
}

/// The parts of a URL under sprig's names.
pub(super) fn parse<'a>(url: &str) -> Outcome<'a> {
    let fail = |reason: String| format!("unable to parse url: parse {}: {reason}", crate::format::quote(url));
    let parts = split(url).map_err(fail)?;
    Ok(Value::Map(Map::new(Element::Any, parts.map(|(name, part)| (Rc::from(name), Value::from(part))))))
}

fn split(url: &str) -> Result<[(&'static str, String); 8], String> {
    let (rest, fragment) = url.split_once('#').unwrap_or((url, ""));
    if rest.bytes().any(|byte| byte < b' ' || byte == 0x7f) {
        return Err("net/url: invalid control character in URL".to_owned());
    }
    let (scheme, rest) = if rest == "*" { ("", rest) } else { scheme(rest)? };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (mut authority, mut path, mut opaque) = ("", rest, "");
    if !rest.starts_with('/') {
        if !scheme.is_empty() {
            (path, opaque) = ("", rest);
        } else if rest.split('/').next().is_some_and(|segment| segment.contains(':')) {
            return Err("first path segment in URL cannot contain colon".to_owned());
        }
    } else if let Some(after) = rest.strip_prefix("//").filter(|_| !scheme.is_empty() || !rest.starts_with("///")) {
        (authority, path) = after.split_at(after.find('/').unwrap_or(after.len()));
    }
    let (user, host_part) = authority.rsplit_once('@').unwrap_or(("", authority));
    let host = host(host_part)?;
    let name = match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
        Some((name, _)) => name.to_owned(),
        None => host.rsplit_once(':').map_or(host.as_str(), |(name, _)| name).to_owned(),
    };
    Ok([
        ("scheme", scheme.to_lowercase()),
        ("hostname", name),
        ("host", host),
        ("path", unescape(path, Part::Path)?),
        ("query", query.to_owned()),
        ("opaque", opaque.to_owned()),
        ("fragment", unescape(fragment, Part::Fragment)?),
        ("userinfo", user_info(user)?),
    ])
}

/// A URL from the parts that [`parse`] makes.
pub(super) fn join(parts: &Map<'_>) -> Result<String, String> {
    let part = |name: &str| match parts.get(name) {
        None => Ok(String::new()),
        Some(Value::Str(text)) => Ok(text.as_str().to_owned()),
        Some(other) => Err(format!("unable to parse {name} key, must be of type string, but {} found", other.kind())),
    };
    let (scheme, host, path) = (part("scheme")?, part("host")?, part("path")?);
    let (query, opaque, fragment, user) = (part("query")?, part("opaque")?, part("fragment")?, part("userinfo")?);
    let user = user_info(&user)?;
    let mut url = if scheme.is_empty() { String::new() } else { format!("{scheme}:") };
    if opaque.is_empty() {
        let path = if path == "*" { path } else { escape(&path, Part::Path) };
        if !scheme.is_empty() || !host.is_empty() || !user.is_empty() {
            if !host.is_empty() || !path.is_empty() || !user.is_empty() {
                url.push_str("//");
            }
            if !user.is_empty() {
                let _ = write!(url, "{user}@");
            }
            url.push_str(&escape(&host, Part::Host));
        }
        if !path.is_empty() && !path.starts_with('/') && !host.is_empty() {
            url.push('/');
        }
        if url.is_empty() && path.split('/').next().is_some_and(|segment| segment.contains(':')) {
            url.push_str("./");
        }
        url.push_str(&path);
    } else {
        url.push_str(&opaque);
    }
    for (mark, part) in [('?', query), ('#', escape(&fragment, Part::Fragment))] {
        if !part.is_empty() {
            url.push(mark);
            url.push_str(&part);
        }
    }
    Ok(url)
}
