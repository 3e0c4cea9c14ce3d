//! Kubernetes quantities in their canonical form.

/// `resource.Quantity`'s canonical text: the largest suffix that leaves no fraction. `None` when the
/// text is not a quantity.
///
/// As k8s.io/apimachinery `pkg/api/resource`: binary suffixes stay binary, decimal ones decimal, and
/// exponents stay exponents.
pub(crate) fn canonical(text: &str) -> Option<String> {
    let (negative, rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 || fraction.contains('.') || number.len() > 30 {
        return None;
    }
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let places = i32::try_from(fraction.len()).ok()?;
    let sign = if negative { "-" } else { "" };

    const BINARY: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    if let Some(power) = BINARY.iter().skip(1).position(|known| *known == suffix) {
        let power = power as u32 + 1;
        let scaled = digits.checked_mul(1024i128.checked_pow(power)?)?;
        let divisor = 10i128.checked_pow(places as u32)?;
        if scaled % divisor != 0 {
            // A fraction of a byte: Go falls back to decimal.
            return decimal(sign, scaled, -places);
        }
        let mut value = scaled / divisor;
        if value.abs() < 1024 {
            return decimal(sign, value, 0);
        }
        let mut index = 0;
        while value != 0 && value % 1024 == 0 && index + 1 < BINARY.len() {
            value /= 1024;
            index += 1;
        }
        return Some(format!("{sign}{value}{}", BINARY[index]));
    }
    if let Some(exponent) = suffix.strip_prefix(['e', 'E'])
        && !exponent.is_empty()
    {
        let exponent: i32 = exponent.parse().ok().filter(|exponent: &i32| exponent.abs() < 60)?;
        let (value, power) = reduced(digits, exponent - places)?;
        return Some(if power == 0 { format!("{sign}{value}") } else { format!("{sign}{value}e{power}") });
    }
    let power = match suffix {
        "n" => -9,
        "u" => -6,
        "m" => -3,
        "" => 0,
        "k" => 3,
        "M" => 6,
        "G" => 9,
        "T" => 12,
        "P" => 15,
        "E" => 18,
        _ => return None,
    };
    decimal(sign, digits, power - places)
}

/// Value and exponent with the exponent a multiple of three and as large as it can be.
fn reduced(mut digits: i128, mut exponent: i32) -> Option<(i128, i32)> {
    if digits == 0 {
        return Some((0, 0));
    }
    // Nothing is smaller than a nano; the rest is rounded up.
    while exponent < -9 {
        digits = digits / 10 + i128::from(digits % 10 > 0);
        exponent += 1;
    }
    while exponent.rem_euclid(3) != 0 {
        digits = digits.checked_mul(10)?;
        exponent -= 1;
    }
    while digits % 1000 == 0 && exponent < 18 {
        digits /= 1000;
        exponent += 3;
    }
    Some((digits, exponent))
}

fn decimal(sign: &str, digits: i128, exponent: i32) -> Option<String> {
    let (mut value, mut power) = reduced(digits, exponent)?;
    while power > 18 {
        value = value.checked_mul(1000)?;
        power -= 3;
    }
    let suffix = match power {
        -9 => "n",
        -6 => "u",
        -3 => "m",
        0 => "",
        3 => "k",
        6 => "M",
        9 => "G",
        12 => "T",
        15 => "P",
        _ => "E",
    };
    Some(if value == 0 { "0".to_owned() } else { format!("{sign}{value}{suffix}") })
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn quantities_are_canonical() {
        for (text, want) in [
            ("2000m", "2"),
            ("1024Mi", "1Gi"),
            ("100m", "100m"),
            ("0.5", "500m"),
            ("1000", "1k"),
            ("0", "0"),
            ("128Mi", "128Mi"),
            ("1536Mi", "1536Mi"),
            ("1.5Gi", "1536Mi"),
            ("1e3", "1e3"),
            ("1Ki", "1Ki"),
            ("0.1", "100m"),
        ] {
            assert_eq!(canonical(text).as_deref(), Some(want), "{text}");
        }
        for bad in ["", "x", "1x", "1.2.3", "-", "1 "] {
            assert_eq!(canonical(bad), None, "{bad}");
        }
    }
}
