//! Kubernetes quantities (`100m`, `128Mi`), as far as `resourceFieldRef` needs them.

/// The quantity in thousandths, rounded up; `None` for text that is no quantity.
///
/// Grammar: apimachinery `pkg/api/resource/quantity.go`.
pub(super) fn milli(text: &str) -> Option<i128> {
    let text = text.trim();
    let number_end =
        text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '-' || c == '+')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() > 18 || fraction.starts_with(['-', '+']) {
        return None;
    }
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let scale: i128 = 10i128.pow(u32::try_from(fraction.len()).ok()?);
    let milli_factor: i128 = match suffix {
        "n" => return Some(div_up(digits, scale * 1_000_000)),
        "u" => return Some(div_up(digits, scale * 1_000)),
        "m" => 1,
        "" => 1_000,
        "k" => 1_000_000,
        "M" => 1_000_000_000,
        "G" => 1_000_000_000_000,
        "T" => 1_000_000_000_000_000,
        "P" => 1_000_000_000_000_000_000,
        "Ki" => 1_000 << 10,
        "Mi" => 1_000 << 20,
        "Gi" => 1_000 << 30,
        "Ti" => 1_000 << 40,
        "Pi" => 1_000 << 50,
        _ => {
            let exponent: u32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            if exponent > 15 {
                return None;
            }
            1_000 * 10i128.pow(exponent)
        }
    };
    Some(div_up(digits * milli_factor, scale))
}

/// `amount` in units of `divisor`, rounded up, as the downward API prints it.
pub(super) fn divided(amount: i128, divisor: Option<&str>) -> String {
    let divisor = divisor.and_then(milli).filter(|d| *d > 0).unwrap_or(1_000);
    div_up(amount, divisor).to_string()
}

fn div_up(a: i128, b: i128) -> i128 {
    let quotient = a / b;
    if a % b > 0 { quotient + 1 } else { quotient }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downward_api_rounds_up() {
        assert_eq!(divided(milli("100m").unwrap(), None), "1");
        assert_eq!(divided(milli("2").unwrap(), Some("0")), "2");
        assert_eq!(divided(milli("1.5").unwrap(), Some("1m")), "1500");
        assert_eq!(divided(milli("128Mi").unwrap(), Some("1Mi")), "128");
        assert_eq!(divided(milli("1e3").unwrap(), None), "1000");
        assert_eq!(milli("12x"), None);
        assert_eq!(milli(""), None);
    }
}
