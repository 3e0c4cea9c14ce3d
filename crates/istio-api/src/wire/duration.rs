//! Go's duration text.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error};
use serde::{Serialize, Serializer};

use super::Json;

/// A signed duration of up to 292 years, as Go's `time.Duration`.
///
/// Reads what `time.ParseDuration` reads (`1h1.5s`, `500ms`), prints as canonical protobuf JSON (`3601.500s`).
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Duration {
    nanos: i64,
}

/// Text that Go's `time.ParseDuration` refuses.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("invalid duration {0:?}: expected a number with a unit such as 500ms, 10s or 1h30m")]
pub struct InvalidDuration(pub String);

impl Duration {
    /// A duration of whole seconds.
    pub const fn from_secs(secs: i64) -> Self {
        Self { nanos: secs.saturating_mul(1_000_000_000) }
    }

    /// A duration of milliseconds.
    pub const fn from_millis(millis: i64) -> Self {
        Self { nanos: millis.saturating_mul(1_000_000) }
    }

    /// A duration of nanoseconds.
    pub const fn from_nanos(nanos: i64) -> Self {
        Self { nanos }
    }

    /// All of it in nanoseconds.
    pub const fn as_nanos(self) -> i64 {
        self.nanos
    }

    /// All of it in milliseconds, cut.
    pub const fn as_millis(self) -> i64 {
        self.nanos / 1_000_000
    }

    /// The whole seconds, cut towards zero; with [`Duration::subsec_nanos`] the fields of the protobuf message.
    pub const fn as_secs(self) -> i64 {
        self.nanos / 1_000_000_000
    }

    /// What [`Duration::as_secs`] cut off, with the same sign.
    pub const fn subsec_nanos(self) -> i32 {
        (self.nanos % 1_000_000_000) as i32
    }

    /// Whether it is exactly zero.
    pub const fn is_zero(self) -> bool {
        self.nanos == 0
    }

    /// As the standard library has it; `None` when negative.
    pub fn to_std(self) -> Option<std::time::Duration> {
        u64::try_from(self.nanos).ok().map(std::time::Duration::from_nanos)
    }
}

impl FromStr for Duration {
    type Err = InvalidDuration;

    /// Source: Go `time.ParseDuration`: `[-+]?([0-9]*(\.[0-9]*)?[a-z]+)+`, or a bare `0`.
    fn from_str(text: &str) -> Result<Self, InvalidDuration> {
        parse(text).ok_or_else(|| InvalidDuration(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Duration> {
    let (negative, mut rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Some(Duration { nanos: 0 });
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let whole_end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let whole = &rest[..whole_end];
        rest = &rest[whole_end..];
        let fraction = match rest.strip_prefix('.') {
            Some(after) => {
                let end = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
                rest = &after[end..];
                &after[..end]
            }
            None => "",
        };
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let unit_end = rest.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(rest.len());
        let unit: i128 = match &rest[..unit_end] {
            "ns" => 1,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        rest = &rest[unit_end..];
        let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        total = total.checked_add(whole.checked_mul(unit)?)?;
        let digits = &fraction[..fraction.len().min(18)];
        if !digits.is_empty() {
            let scale = 10i128.pow(digits.len() as u32);
            total += digits.parse::<i128>().ok()? * unit / scale;
        }
        if total > 1 << 63 {
            return None;
        }
    }
    let total = if negative { -total } else { total };
    Some(Duration { nanos: i64::try_from(total).ok()? })
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos < 0 {
            f.write_str("-")?;
        }
        let (secs, nanos) = (self.as_secs().unsigned_abs(), self.subsec_nanos().unsigned_abs());
        // 0, 3, 6 or 9 digits, as canonical protobuf JSON has them.
        if nanos == 0 {
            write!(f, "{secs}s")
        } else if nanos % 1_000_000 == 0 {
            write!(f, "{secs}.{:03}s", nanos / 1_000_000)
        } else if nanos % 1_000 == 0 {
            write!(f, "{secs}.{:06}s", nanos / 1_000)
        } else {
            write!(f, "{secs}.{nanos:09}s")
        }
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl Json for Duration {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_go_reads() {
        for (text, printed) in [
            ("1m", "60s"),
            ("500ms", "0.500s"),
            ("1h1.5s", "3601.500s"),
            ("-1.5h", "-5400s"),
            ("+5s", "5s"),
            (".5s", "0.500s"),
            ("1.s", "1s"),
            ("0", "0s"),
            ("1us", "0.000001s"),
            ("1µs2ns", "0.000001002s"),
            ("2562047h47m16.854775807s", "9223372036.854775807s"),
        ] {
            assert_eq!(text.parse::<Duration>().map(|d| d.to_string()), Ok(printed.to_owned()), "{text}");
        }
        for text in ["", "5", "5x", "s", ".s", "-", "1", "1 s", "1d", "9999999999h", "1s-1s", "１s"] {
            assert_eq!(text.parse::<Duration>(), Err(InvalidDuration(text.to_owned())), "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".*") {
            let _ = text.parse::<Duration>();
        }

        #[test]
        fn round_trips(nanos: i64) {
            let duration = Duration::from_nanos(nanos);
            prop_assert_eq!(duration.to_string().parse::<Duration>(), Ok(duration));
        }
    }
}
