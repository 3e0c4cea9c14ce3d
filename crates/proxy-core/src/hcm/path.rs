use crate::format::percent_decode;
use crate::hcm::{EscapedSlashes, HttpConnectionManager};
use crate::headers::Headers;

/// What to do with a request after its path was looked at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PathVerdict {
    /// Go on.
    Ok,
    /// 400 with these details.
    Reject(&'static str),
    /// 307 to this path.
    Redirect(String),
}

/// Host and port that the path of a CONNECT-UDP request names (RFC 9298, section 3; Envoy
/// `HeaderUtility::rewriteAuthorityForConnectUdp`). `None`: it is not of the one template that Envoy knows.
pub fn connect_udp_target(path: &[u8]) -> Option<String> {
    let path = std::str::from_utf8(path).ok().filter(|path| path.bytes().all(|b| b.is_ascii_graphic()))?;
    let (host, port) = path.strip_prefix("/.well-known/masque/udp/")?.strip_suffix('/')?.split_once('/')?;
    if host.is_empty() || port.is_empty() || port.contains('/') {
        return None;
    }
    let decoded = |text| {
        let mut bytes = Vec::new();
        percent_decode(text, &mut bytes);
        String::from_utf8(bytes).ok()
    };
    let (host, port) = (decoded(host)?, decoded(port)?);
    match host.parse::<std::net::Ipv6Addr>() {
        // An address with a zone.
        _ if host.contains('%') => None,
        Ok(_) => Some(format!("[{host}]:{port}")),
        Err(_) => Some(format!("{host}:{port}")),
    }
}

/// Normalises the path (Envoy `ConnectionManagerUtility::maybeNormalizePath`): escaped slashes, RFC 3986, repeated slashes.
pub fn normalize(config: &HttpConnectionManager, headers: &mut Headers) -> PathVerdict {
    let Some(original) = headers.get(":path") else { return PathVerdict::Ok };
    // A fragment has no place in a request (`http_reject_path_with_fragment`).
    if original.contains(&b'#') {
        return PathVerdict::Reject("path_normalization_failed");
    }
    let keep = config.escaped_slashes == EscapedSlashes::KeepUnchanged;
    if keep && !config.normalize_path && !config.merge_slashes {
        return PathVerdict::Ok;
    }
    if is_plain(original) {
        return PathVerdict::Ok;
    }
    let split = original.iter().position(|b| *b == b'?').unwrap_or(original.len());
    let (path, query) = original.split_at(split);
    let mut redirect = false;
    let mut new = path.to_vec();
    if !keep {
        let unescaped = unescape_slashes(&new);
        if unescaped != new {
            match config.escaped_slashes {
                EscapedSlashes::RejectRequest => {
                    // The log shows the path as it was understood.
                    let shown = [&*unescaped, query].concat();
                    headers.set(":path", &shown);
                    return PathVerdict::Reject("path_normalization_failed");
                }
                EscapedSlashes::UnescapeAndRedirect => redirect = true,
                _ => {}
            }
            new = unescaped;
        }
    }
    if config.normalize_path {
        match canonical(&new) {
            Some(canonical) => new = canonical,
            None => return PathVerdict::Reject("path_normalization_failed"),
        }
    }
    if config.merge_slashes {
        new = merge_slashes(&new);
    }
    if new != path {
        new.extend_from_slice(query);
        headers.set(":path", &new);
    }
    match redirect {
        true => PathVerdict::Redirect(headers.path().unwrap_or("/").to_owned()),
        false => PathVerdict::Ok,
    }
}

/// Whether no rule finds anything to change: the case of most paths.
fn is_plain(path: &[u8]) -> bool {
    let path = path.split(|b| *b == b'?').next().unwrap_or_default();
    let mut slash = false;
    path.first() == Some(&b'/')
        && path.iter().all(|b| {
            let repeated = slash && *b == b'/';
            slash = *b == b'/';
            !repeated && (slash || b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        })
}

fn hex(pair: &[u8]) -> Option<u8> {
    let digit = |b: u8| (b as char).to_digit(16);
    Some((digit(*pair.first()?)? * 16 + digit(*pair.get(1)?)?) as u8)
}

/// `%2F` and `%5C` become slash and backslash (Envoy `PathUtil::unescapeSlashes`).
fn unescape_slashes(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut i = 0;
    while i < path.len() {
        match (path[i], hex(&path[i + 1..])) {
            (b'%', Some(byte @ (b'/' | b'\\'))) => {
                out.push(byte);
                i += 3;
            }
            (byte, _) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    out
}

/// Envoy `PathUtil::mergeSlashes`: a path of slashes only keeps two.
fn merge_slashes(path: &[u8]) -> Vec<u8> {
    if !path.windows(2).any(|pair| pair == b"//") {
        return path.to_vec();
    }
    let parts: Vec<&[u8]> = path.split(|b| *b == b'/').filter(|part| !part.is_empty()).collect();
    let mut out: Vec<u8> = Vec::with_capacity(path.len());
    if path.starts_with(b"/") {
        out.push(b'/');
    }
    out.extend_from_slice(&parts.join(&b'/'));
    if path.ends_with(b"/") {
        out.push(b'/');
    }
    out
}

/// What happens to a byte of a path that stands there itself.
enum Class {
    Pass,
    Escape,
}

/// As the table of Envoy's `LegacyPathCanonicalizer` (Chromium's URL library).
fn class(byte: u8) -> Class {
    match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' => Class::Pass,
        b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b'-' | b'.' | b':' | b';' | b'=' | b'@'
        | b'[' | b']' | b'_' | b'~' => Class::Pass,
        _ => Class::Escape,
    }
}

/// Whether a byte that is escaped need not be.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// The path by RFC 3986: dot segments resolved, needless escapes undone, needed ones made, backslashes turned.
/// `None`: it holds an escaped NUL.
fn canonical(path: &[u8]) -> Option<Vec<u8>> {
    let mut out: Vec<u8> = Vec::with_capacity(path.len());
    if !matches!(path.first(), Some(b'/' | b'\\')) {
        out.push(b'/');
    }
    let mut i = 0;
    // The last percent sign that escapes nothing.
    let mut bare = None;
    while i < path.len() {
        escape_bare(&mut out, &mut bare);
        if out.last() == Some(&b'/')
            && let Some(dots) = dot_segment(&path[i..])
        {
            i += dots.length;
            if dots.up {
                back_up(&mut out);
                bare = bare.filter(|at| *at < out.len());
            }
            continue;
        }
        let byte = path[i];
        i += 1;
        match (byte, hex(path.get(i..).unwrap_or_default())) {
            (b'\\', _) => out.push(b'/'),
            (b'/', _) => out.push(b'/'),
            (b'%', Some(0)) => return None,
            (b'%', Some(decoded)) => {
                if is_unreserved(decoded) {
                    out.push(decoded);
                } else {
                    out.extend_from_slice(&path[i - 1..i + 2]);
                }
                i += 2;
            }
            // A percent sign that escapes nothing passes as it is.
            (b'%', None) => {
                bare = Some(out.len());
                out.push(b'%');
            }
            (byte, _) => match class(byte) {
                Class::Pass => out.push(byte),
                Class::Escape => out.extend_from_slice(format!("%{byte:02X}").as_bytes()),
            },
        }
    }
    escape_bare(&mut out, &mut bare);
    Some(out)
}

/// Escapes a percent sign (`bare`: where it is) that has become an escape: unescaping may make no new ones.
fn escape_bare(out: &mut Vec<u8>, bare: &mut Option<usize>) {
    if let Some(at) = *bare
        && let Some([first, second]) = out.get(at + 1..)
        && hex(&[*first, *second]).is_some()
    {
        out.splice(at + 1..at + 1, *b"25");
        *bare = None;
    }
}

struct Dots {
    length: usize,
    up: bool,
}

/// A whole `.` or `..` segment, escaped or not, with the slash behind it.
fn dot_segment(rest: &[u8]) -> Option<Dots> {
    let dot = |at: usize| match rest.get(at) {
        Some(b'.') => Some(1),
        Some(b'%') if hex(rest.get(at + 1..).unwrap_or_default()) == Some(b'.') => Some(3),
        _ => None,
    };
    let first = dot(0)?;
    // Parameters of a segment (`..;x`) do not hide its dots, if those stand there themselves.
    let plain = |dots: usize| rest[..dots].iter().all(|b| *b == b'.');
    let end = |at: usize| match rest.get(at) {
        None => Some(at),
        Some(b'/' | b'\\') => Some(at + 1),
        Some(b';') if plain(at) => Some(rest.iter().position(|b| *b == b'/').map_or(rest.len(), |slash| slash + 1)),
        _ => None,
    };
    if let Some(length) = end(first) {
        return Some(Dots { length, up: false });
    }
    let both = first + dot(first)?;
    end(both).map(|length| Dots { length, up: true })
}

/// Removes the last segment, up to the slash before it.
fn back_up(out: &mut Vec<u8>) {
    if out.len() > 1 {
        out.pop();
        while out.last().is_some_and(|b| *b != b'/') {
            out.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, expected: &str) {
        assert_eq!(String::from_utf8(canonical(path.as_bytes()).unwrap()).unwrap(), expected);
    }

    #[test]
    fn canonical_paths() {
        check("/a/b/../c", "/a/c");
        check("/a/./b/.", "/a/b/");
        check("/a/%2e%2E/b", "/b");
        check("/../../x", "/x");
        check("/a//b", "/a//b");
        check("/a\\b", "/a/b");
        check("/%41%7e%2f%3a", "/A~%2f%3a");
        check("/a b\"c", "/a%20b%22c");
        check("/a%zz", "/a%zz");
        check("/...", "/...");
        check("/a..", "/a..");
        check("/a/..;/b", "/b");
        check("/a/.;x/b", "/a/b");
        check("/a/..;x", "/");
        check("/a/..;\\b", "/");
        check("/a/%2e%2e;/b", "/a/..;/b");
        check("/a/x..;/b", "/a/x..;/b");
        check("/%%32%65", "/%252e");
        check("/%2%35", "/%2525");
        check("/%%3%30", "/%%2530");
        check("/%a%62c", "/%25abc");
        check("/%%41", "/%A");
        assert_eq!(canonical(b"/%00"), None);
    }

    #[test]
    fn slashes() {
        assert_eq!(unescape_slashes(b"/a%2Fb%5cc%2"), b"/a/b\\c%2");
        assert_eq!(merge_slashes(b"//a///b/"), b"/a/b/");
    }
}
