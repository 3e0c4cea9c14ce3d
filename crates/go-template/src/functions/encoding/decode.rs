//! base64 and base32 back to text. As sprig, a complaint is the value; it has Go's position.

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// As Go's `base64.StdEncoding`: line ends are skipped everywhere.
pub(super) fn base64(source: &str) -> String {
    match decode64(source.as_bytes()) {
        Ok(bytes) => text(bytes),
        Err(at) => format!("illegal base64 data at input byte {at}"),
    }
}

fn decode64(source: &[u8]) -> Result<Vec<u8>, usize> {
    let mut out = Vec::with_capacity(source.len() / 4 * 3);
    let mut at = 0;
    let skip = |at: &mut usize| {
        while matches!(source.get(*at), Some(b'\n' | b'\r')) {
            *at += 1;
        }
    };
    loop {
        let (mut value, mut count) = (0u32, 0);
        while count < 4 {
            skip(&mut at);
            let Some(&byte) = source.get(at) else {
                return if count == 0 { Ok(out) } else { Err(at - count) };
            };
            at += 1;
            let digit = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                b'=' if count >= 2 => {
                    skip(&mut at);
                    if count == 2 {
                        match source.get(at) {
                            None => return Err(source.len()),
                            Some(b'=') => at += 1,
                            Some(_) => return Err(at - 1),
                        }
                        skip(&mut at);
                    }
                    let value = value << (6 * (4 - count));
                    out.extend_from_slice(&value.to_be_bytes()[1..count]);
                    return if at < source.len() { Err(at) } else { Ok(out) };
                }
                _ => return Err(at - 1),
            };
            value = value << 6 | u32::from(digit);
            count += 1;
        }
        out.extend_from_slice(&value.to_be_bytes()[1..]);
    }
}

/// As Go's `base32.StdEncoding`: line ends are removed before positions are counted.
pub(super) fn base32(source: &str) -> String {
    let source: Vec<u8> = source.bytes().filter(|byte| !matches!(byte, b'\n' | b'\r')).collect();
    match decode32(&source) {
        Ok(bytes) => text(bytes),
        Err(at) => format!("illegal base32 data at input byte {at}"),
    }
}

fn decode32(source: &[u8]) -> Result<Vec<u8>, usize> {
    let mut out = Vec::with_capacity(source.len() / 8 * 5);
    let mut at = 0;
    while at < source.len() {
        let (mut value, mut count) = (0u64, 0);
        while count < 8 {
            let Some(&byte) = source.get(at) else { return Err(source.len() - count) };
            at += 1;
            let digit = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'2'..=b'7' => byte - b'2' + 26,
                b'=' if count >= 2 && source.len() - at < 8 => {
                    let rest = &source[at..];
                    if rest.len() + count < 7 {
                        return Err(source.len());
                    }
                    if let Some(bad) = rest.iter().take(7 - count).position(|byte| *byte != b'=') {
                        return Err((at + bad).saturating_sub(1));
                    }
                    if matches!(count, 3 | 6) {
                        return Err(at - 1);
                    }
                    let value = value << (5 * (8 - count));
                    out.extend_from_slice(&value.to_be_bytes()[3..3 + count * 5 / 8]);
                    return Ok(out);
                }
                _ => return Err(at - 1),
            };
            value = value << 5 | u64::from(digit);
            count += 1;
        }
        out.extend_from_slice(&value.to_be_bytes()[3..]);
    }
    Ok(out)
}
