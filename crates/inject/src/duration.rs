//! Durations as protobuf JSON and Go write them.

/// Nanoseconds of a text such as `45s`, `1m30s` or `100ms`, as Go's `time.ParseDuration`.
pub(crate) fn nanoseconds(text: &str) -> Option<i128> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() || rest.len() > 60 {
        return None;
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let (number, after) = rest.split_at(end);
        let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let scale: i128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || fraction.len() > 18 {
            return None;
        }
        let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        total = total.checked_add(whole.checked_mul(scale)?)?;
        if !fraction.is_empty() {
            let parts: i128 = fraction.parse().ok()?;
            total += parts * scale / 10i128.pow(u32::try_from(fraction.len()).ok()?);
        }
        rest = after;
    }
    Some(if negative { -total } else { total })
}

/// `time.Duration.String`
pub(crate) fn display(nanos: i128) -> String {
    if nanos == 0 {
        return "0s".to_owned();
    }
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    let decimal = |value: u128, unit: u128, name: &str| {
        let fraction = format!("{:0width$}", value % unit, width = unit.ilog10() as usize);
        let fraction = fraction.trim_end_matches('0');
        let point = if fraction.is_empty() || unit == 1 { String::new() } else { format!(".{fraction}") };
        format!("{}{point}{name}", value / unit)
    };
    if nanos < 1_000 {
        return format!("{sign}{nanos}ns");
    }
    if nanos < 1_000_000 {
        return format!("{sign}{}", decimal(nanos, 1_000, "µs"));
    }
    if nanos < 1_000_000_000 {
        return format!("{sign}{}", decimal(nanos, 1_000_000, "ms"));
    }
    let minutes = nanos / 60_000_000_000;
    let seconds = decimal(nanos % 60_000_000_000, 1_000_000_000, "s");
    match (minutes / 60, minutes % 60) {
        (0, 0) => format!("{sign}{seconds}"),
        (0, m) => format!("{sign}{m}m{seconds}"),
        (h, m) => format!("{sign}{h}h{m}m{seconds}"),
    }
}

/// A duration as protobuf's JSON writes it: seconds, with 0, 3, 6 or 9 digits of fraction.
pub(crate) fn protobuf(nanos: i128) -> String {
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    let (seconds, fraction) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    let text = format!("{fraction:09}");
    let text = match () {
        () if fraction == 0 => String::new(),
        () if fraction % 1_000_000 == 0 => format!(".{}", &text[..3]),
        () if fraction % 1_000 == 0 => format!(".{}", &text[..6]),
        () => format!(".{text}"),
    };
    format!("{sign}{seconds}{text}s")
}

#[cfg(test)]
mod tests {
    use super::{display, nanoseconds, protobuf};

    #[test]
    fn durations() {
        for (text, shown, wire) in [
            ("45s", "45s", "45s"),
            ("1m", "1m0s", "60s"),
            ("1h1.5s", "1h0m1.5s", "3601.500s"),
            ("100ms", "100ms", "0.100s"),
            ("0s", "0s", "0s"),
            ("1us", "1µs", "0.000001s"),
        ] {
            let nanos = nanoseconds(text).unwrap();
            assert_eq!((display(nanos).as_str(), protobuf(nanos).as_str()), (shown, wire));
        }
        for bad in ["", "5", "5x", "s", "1.2.3s", "-"] {
            assert_eq!(nanoseconds(bad), None, "{bad}");
        }
    }
}
