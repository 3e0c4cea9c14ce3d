//! The functions and operators of CEL that Envoy registers (cel-cpp's `RegisterBuiltinFunctions`).

use std::borrow::Cow;
use std::cmp::Ordering;

use crate::cel::attributes;
use crate::cel::value::{SECOND, Value};
use crate::format::FormatContext;
use crate::matchers::searched;
use crate::pb;

/// What is off unless a configuration turns it on (`CelExpressionConfig`).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    string_conversion: bool,
    string_concat: bool,
    string_functions: bool,
}

impl Options {
    pub(crate) fn of(config: Option<&pb::core::CelExpressionConfig>) -> Self {
        config.map_or_else(Self::default, |config| Self {
            string_conversion: config.enable_string_conversion,
            string_concat: config.enable_string_concat,
            string_functions: config.enable_string_functions,
        })
    }
}

/// A function of values.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Function {
    Add,
    /// Of texts, too.
    AddOrJoin,
    Subtract,
    Multiply,
    Divide,
    Modulo,
    Negate,
    Not,
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    Index,
    Size,
    Contains,
    StartsWith,
    EndsWith,
    Matches,
    Int,
    Uint,
    Double,
    Bool,
    Bytes,
    String,
    Same,
    Type,
    Duration,
    Timestamp,
    LowerAscii,
    UpperAscii,
    Replace,
    Split,
    Year,
    Month,
    DayOfMonth,
    Date,
    DayOfWeek,
    DayOfYear,
    Hours,
    Minutes,
    Seconds,
    Milliseconds,
}

impl Function {
    /// The function of this name; `method`: called on its first argument. Operators have the names of the parser's output.
    pub(super) fn find(name: &str, method: bool, arguments: usize, options: Options) -> Option<Self> {
        use Function as F;
        let strings = options.string_functions;
        Some(match (name, method, arguments) {
            ("_+_", _, 2) => {
                if options.string_concat {
                    F::AddOrJoin
                } else {
                    F::Add
                }
            }
            ("_-_", _, 2) => F::Subtract,
            ("_*_", _, 2) => F::Multiply,
            ("_/_", _, 2) => F::Divide,
            ("_%_", _, 2) => F::Modulo,
            ("-_", _, 1) => F::Negate,
            ("!_", _, 1) => F::Not,
            ("_==_", _, 2) => F::Equal,
            ("_!=_", _, 2) => F::NotEqual,
            ("_<_", _, 2) => F::Less,
            ("_<=_", _, 2) => F::LessOrEqual,
            ("_>_", _, 2) => F::Greater,
            ("_>=_", _, 2) => F::GreaterOrEqual,
            ("@in" | "_in_" | "in", _, 2) => F::In,
            ("_[_]", _, 2) => F::Index,
            ("size", _, 1) => F::Size,
            ("contains", _, 2) => F::Contains,
            ("startsWith", _, 2) => F::StartsWith,
            ("endsWith", _, 2) => F::EndsWith,
            ("matches", _, 2) => F::Matches,
            ("int", false, 1) => F::Int,
            ("uint", false, 1) => F::Uint,
            ("double", false, 1) => F::Double,
            ("bool", false, 1) => F::Bool,
            ("bytes", false, 1) => F::Bytes,
            ("string", false, 1) if options.string_conversion => F::String,
            ("dyn", false, 1) => F::Same,
            ("type", false, 1) => F::Type,
            ("duration", false, 1) => F::Duration,
            ("timestamp", false, 1) => F::Timestamp,
            ("lowerAscii", true, 1) if strings => F::LowerAscii,
            ("upperAscii", true, 1) if strings => F::UpperAscii,
            ("replace", true, 3 | 4) if strings => F::Replace,
            ("split", true, 2 | 3) if strings => F::Split,
            ("getFullYear", true, 1 | 2) => F::Year,
            ("getMonth", true, 1 | 2) => F::Month,
            ("getDayOfMonth", true, 1 | 2) => F::DayOfMonth,
            ("getDate", true, 1 | 2) => F::Date,
            ("getDayOfWeek", true, 1 | 2) => F::DayOfWeek,
            ("getDayOfYear", true, 1 | 2) => F::DayOfYear,
            ("getHours", true, 1 | 2) => F::Hours,
            ("getMinutes", true, 1 | 2) => F::Minutes,
            ("getSeconds", true, 1 | 2) => F::Seconds,
            ("getMilliseconds", true, 1 | 2) => F::Milliseconds,
            _ => return None,
        })
    }

    /// Its value; `None`: CEL's error, as of arguments of a wrong type.
    pub(super) fn call(self, arguments: &[Cow<'_, Value>], cx: &FormatContext<'_>) -> Option<Value> {
        use Function as F;
        let first = &**arguments.first()?;
        let second = arguments.get(1).map(|value| &**value);
        Some(match self {
            F::Add | F::AddOrJoin | F::Subtract | F::Multiply | F::Divide | F::Modulo => {
                return self.arithmetic(first, second?);
            }
            F::Negate => match first {
                Value::Int(n) => Value::Int(n.checked_neg()?),
                Value::Double(n) => Value::Double(-n),
                _ => return None,
            },
            F::Not => match first {
                Value::Bool(b) => Value::Bool(!b),
                _ => return None,
            },
            F::Equal => Value::Bool(first == second?),
            F::NotEqual => Value::Bool(first != second?),
            F::Less => Value::Bool(first.order(second?)? == Ordering::Less),
            F::LessOrEqual => Value::Bool(first.order(second?)? != Ordering::Greater),
            F::Greater => Value::Bool(first.order(second?)? == Ordering::Greater),
            F::GreaterOrEqual => Value::Bool(first.order(second?)? != Ordering::Less),
            F::In => Value::Bool(match second? {
                Value::List(items) => items.contains(first),
                Value::Map(entries) => entries.iter().any(|(key, _)| key == first),
                Value::Place(place) => matches!(first, Value::Text(key) if place.at(key, cx).is_some()),
                _ => return None,
            }),
            F::Index => return index(first, second?, cx),
            F::Size => Value::Int(match first {
                Value::Text(text) => text.chars().count(),
                Value::Bytes(bytes) => bytes.len(),
                Value::List(items) => items.len(),
                Value::Map(entries) => entries.len(),
                Value::Place(place) => attributes::size(place, cx),
                _ => return None,
            } as i64),
            F::Contains | F::StartsWith | F::EndsWith => {
                let (Value::Text(text), Value::Text(part)) = (first, second?) else { return None };
                Value::Bool(match self {
                    F::Contains => text.contains(part),
                    F::StartsWith => text.starts_with(part),
                    _ => text.ends_with(part),
                })
            }
            F::Matches => match (first, second?) {
                (Value::Text(text), Value::Text(regex)) => Value::Bool(searched(regex).ok()?.is_match(text.as_bytes())),
                _ => return None,
            },
            F::Int => Value::Int(match first {
                Value::Int(n) => *n,
                Value::Uint(n) => i64::try_from(*n).ok()?,
                Value::Double(n) if (-9.3e18..9.3e18).contains(n) => i64::try_from(*n as i128).ok()?,
                Value::Text(text) => text.trim().parse().ok()?,
                Value::Bool(b) => i64::from(*b),
                Value::Time(nanos) => i64::try_from(nanos.div_euclid(SECOND)).ok()?,
                _ => return None,
            }),
            F::Uint => Value::Uint(match first {
                Value::Int(n) => u64::try_from(*n).ok()?,
                Value::Uint(n) => *n,
                Value::Double(n) if (0.0..1.9e19).contains(n) => u64::try_from(*n as i128).ok()?,
                Value::Text(text) => text.trim().parse().ok()?,
                _ => return None,
            }),
            F::Double => Value::Double(match first {
                Value::Int(n) => *n as f64,
                Value::Uint(n) => *n as f64,
                Value::Double(n) => *n,
                Value::Text(text) => text.trim().parse().ok()?,
                _ => return None,
            }),
            F::Bool => Value::Bool(match first {
                Value::Bool(b) => *b,
                Value::Text(text) => match text.as_str() {
                    "1" | "t" | "T" | "true" | "True" | "TRUE" => true,
                    "0" | "f" | "F" | "false" | "False" | "FALSE" => false,
                    _ => return None,
                },
                _ => return None,
            }),
            F::Bytes => Value::Bytes(match first {
                Value::Text(text) => text.as_bytes().to_vec(),
                Value::Bytes(bytes) => bytes.clone(),
                _ => return None,
            }),
            F::String => Value::Text(match first {
                Value::Bytes(bytes) => String::from_utf8(bytes.clone()).ok()?,
                // Spans are in seconds here, moments in UTC.
                Value::Duration(_) | Value::Time(_) => match first.clone().json()? {
                    serde_json::Value::String(text) => text,
                    _ => return None,
                },
                Value::Text(_) | Value::Int(_) | Value::Uint(_) | Value::Double(_) | Value::Bool(_) => {
                    String::from_utf8(first.clone().into_text()).ok()?
                }
                _ => return None,
            }),
            F::Same => first.clone(),
            F::Type => Value::Type(first.kind()),
            F::Duration => match first {
                Value::Text(text) => Value::Duration(duration(text)?),
                Value::Duration(_) => first.clone(),
                _ => return None,
            },
            F::Timestamp => match first {
                Value::Text(text) => Value::Time(timestamp(text)?),
                Value::Int(seconds) => Value::Time(i128::from(*seconds) * SECOND),
                Value::Time(_) => first.clone(),
                _ => return None,
            },
            F::LowerAscii | F::UpperAscii | F::Replace | F::Split => return self.of_text(first, &arguments[1..]),
            _ => return self.of_time(first, second).map(Value::Int),
        })
    }

    fn arithmetic(self, a: &Value, b: &Value) -> Option<Value> {
        use Function as F;
        Some(match (a, b) {
            (Value::Int(a), Value::Int(b)) => Value::Int(match self {
                F::Add | F::AddOrJoin => a.checked_add(*b)?,
                F::Subtract => a.checked_sub(*b)?,
                F::Multiply => a.checked_mul(*b)?,
                F::Divide => a.checked_div(*b)?,
                _ => a.checked_rem(*b)?,
            }),
            (Value::Uint(a), Value::Uint(b)) => Value::Uint(match self {
                F::Add | F::AddOrJoin => a.checked_add(*b)?,
                F::Subtract => a.checked_sub(*b)?,
                F::Multiply => a.checked_mul(*b)?,
                F::Divide => a.checked_div(*b)?,
                _ => a.checked_rem(*b)?,
            }),
            (Value::Double(a), Value::Double(b)) => Value::Double(match self {
                F::Add | F::AddOrJoin => a + b,
                F::Subtract => a - b,
                F::Multiply => a * b,
                F::Divide => a / b,
                _ => return None,
            }),
            (Value::Text(a), Value::Text(b)) if self == F::AddOrJoin => Value::Text(format!("{a}{b}")),
            (Value::Duration(a), Value::Duration(b)) => Value::Duration(self.of_spans(*a, *b)?),
            (Value::Time(a), Value::Duration(b)) => Value::Time(self.of_spans(*a, *b)?),
            (Value::Duration(a), Value::Time(b)) if self != F::Subtract => Value::Time(self.of_spans(*a, *b)?),
            (Value::Time(a), Value::Time(b)) if self == F::Subtract => Value::Duration(self.of_spans(*a, *b)?),
            _ => return None,
        })
    }

    fn of_spans(self, a: i128, b: i128) -> Option<i128> {
        match self {
            Function::Add | Function::AddOrJoin => a.checked_add(b),
            Function::Subtract => a.checked_sub(b),
            _ => None,
        }
    }

    /// cel-cpp's `RegisterStringsFunctions`, as far as the option names them.
    fn of_text(self, text: &Value, arguments: &[Cow<'_, Value>]) -> Option<Value> {
        let Value::Text(text) = text else { return None };
        // A negative number sets no limit.
        let limit = |at: usize| match arguments.get(at).map(|value| &**value) {
            None => Some(usize::MAX),
            Some(Value::Int(n)) => Some(usize::try_from(*n).unwrap_or(usize::MAX)),
            Some(_) => None,
        };
        let part = |at: usize| match arguments.get(at).map(|value| &**value) {
            Some(Value::Text(part)) => Some(part.as_str()),
            _ => None,
        };
        Some(match self {
            Function::LowerAscii => Value::Text(text.to_ascii_lowercase()),
            Function::UpperAscii => Value::Text(text.to_ascii_uppercase()),
            Function::Replace => Value::Text(text.replacen(part(0)?, part(1)?, limit(2)?)),
            _ => {
                let (by, limit) = (part(0)?, limit(1)?);
                Value::List(match (by, limit) {
                    (_, 0) => Vec::new(),
                    // Without a separator, into characters.
                    ("", _) => text.chars().map(|c| Value::Text(c.into())).collect(),
                    _ => text.splitn(limit, by).map(|part| Value::Text(part.to_owned())).collect(),
                })
            }
        })
    }

    /// A part of a date, or of a span of time.
    fn of_time(self, value: &Value, zone: Option<&Value>) -> Option<i64> {
        use Function as F;
        let nanos = match (value, zone) {
            (Value::Time(nanos), None) => *nanos,
            (Value::Time(nanos), Some(Value::Text(zone))) => nanos + offset(zone)?,
            (Value::Duration(nanos), None) => {
                return i64::try_from(match self {
                    F::Hours => nanos / (3600 * SECOND),
                    F::Minutes => nanos / (60 * SECOND),
                    F::Seconds => nanos / SECOND,
                    F::Milliseconds => nanos % SECOND / 1_000_000,
                    _ => return None,
                })
                .ok();
            }
            _ => return None,
        };
        let seconds = i64::try_from(nanos.div_euclid(SECOND)).ok()?;
        let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let (year, month, day) = crate::format::civil(days);
        Some(match self {
            F::Year => year,
            F::Month => i64::from(month) - 1,
            F::DayOfMonth => i64::from(day) - 1,
            F::Date => i64::from(day),
            // The first of January 1970 was a Thursday.
            F::DayOfWeek => (days + 4).rem_euclid(7),
            F::DayOfYear => days - day_number(year, 1, 1),
            F::Hours => second / 3600,
            F::Minutes => second / 60 % 60,
            F::Seconds => second % 60,
            F::Milliseconds => i64::try_from(nanos.rem_euclid(SECOND) / 1_000_000).ok()?,
            _ => return None,
        })
    }
}

/// What is under a key.
pub(super) fn index(of: &Value, key: &Value, cx: &FormatContext<'_>) -> Option<Value> {
    match (of, key) {
        (Value::Place(place), Value::Text(key)) => place.at(key, cx),
        (Value::Map(entries), key) => Value::at_key(entries, key),
        (Value::List(items), Value::Int(at)) => items.get(usize::try_from(*at).ok()?).cloned(),
        (Value::List(items), Value::Uint(at)) => items.get(usize::try_from(*at).ok()?).cloned(),
        (Value::List(items), Value::Double(at)) if at.fract() == 0.0 && *at >= 0.0 => items.get(*at as usize).cloned(),
        _ => None,
    }
}

/// `-1h2.5s`: numbers with units, as Go writes them. `None`, too, of what protobuf's durations cannot hold.
fn duration(text: &str) -> Option<i128> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    let mut all = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let (number, after) = rest.split_at(end);
        let unit = &after[..after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len())];
        let nanos = match unit {
            "h" => 3600e9,
            "m" => 60e9,
            "s" => 1e9,
            "ms" => 1e6,
            "us" => 1e3,
            "ns" => 1.0,
            _ => return None,
        };
        all += number.parse::<f64>().ok()? * nanos;
        rest = &after[unit.len()..];
    }
    let possible = !text.is_empty() && all <= 315_576_000_000e9;
    possible.then_some(all.round() as i128 * if negative { -1 } else { 1 })
}

/// RFC 3339.
fn timestamp(text: &str) -> Option<i128> {
    let digits = |at: usize, width: usize| -> Option<i64> {
        let part = text.get(at..at + width)?;
        part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok())?
    };
    let has = |at: usize, byte: u8| text.as_bytes().get(at) == Some(&byte);
    if !(has(4, b'-') && has(7, b'-') && (has(10, b'T') || has(10, b't')) && has(13, b':') && has(16, b':')) {
        return None;
    }
    let (year, month, day) = (digits(0, 4)?, digits(5, 2)?, digits(8, 2)?);
    let (hour, minute, second) = (digits(11, 2)?, digits(14, 2)?, digits(17, 2)?);
    let plausible = (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second < 60;
    let days = day_number(year, month, day);
    if !plausible || crate::format::civil(days).2 as i64 != day {
        return None;
    }
    let rest = text.get(19..)?;
    let (fraction, zone) = match rest.strip_prefix('.') {
        Some(rest) => {
            let end = rest.find(|c: char| !c.is_ascii_digit()).filter(|end| (1..=9).contains(end))?;
            (format!("{:0<9}", &rest[..end]).parse::<i128>().ok()?, &rest[end..])
        }
        None => (0, rest),
    };
    let away = match zone {
        "Z" | "z" => 0,
        zone if zone.starts_with(['+', '-']) => offset(zone)?,
        _ => return None,
    };
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second;
    Some(i128::from(seconds) * SECOND + fraction - away)
}

/// How far a zone is ahead of UTC.
// DIFFERS: zones by name, which are files of the machine, are not known; what is asked of them is an error.
fn offset(zone: &str) -> Option<i128> {
    if matches!(zone, "" | "UTC" | "Z") {
        return Some(0);
    }
    let (sign, rest) = match zone.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, zone.strip_prefix('+').unwrap_or(zone)),
    };
    let (hours, minutes) = rest.split_once(':')?;
    let number = |text: &str| if text.len() == 2 { text.parse::<u8>().ok() } else { None };
    Some(sign * (i128::from(number(hours)?) * 3600 + i128::from(number(minutes)?) * 60) * SECOND)
}

/// Days from 1970-01-01 to a date: the inverse of `civil`.
fn day_number(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(timestamp("1970-01-01T00:00:01.5Z"), Some(1_500_000_000));
        assert_eq!(timestamp("2020-01-02T03:04:05+02:00"), timestamp("2020-01-02T01:04:05Z"));
        assert_eq!(timestamp("2020-02-29T00:00:00Z"), Some(1_582_934_400 * SECOND));
        for bad in ["", "x", "2020-02-30T00:00:00Z", "2020-01-02T03:04:05", "2020-01-02T03:04:05.Z", "2020-01-02"] {
            assert_eq!(timestamp(bad), None, "{bad}");
        }
        assert_eq!(duration("-1h0.5s"), Some(-3_600_500_000_000));
        for bad in ["", "x", "100", "1.5", "1d", "5000000000000000h"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
        for days in [-719_468, -1, 0, 59, 18_262, 40_000] {
            let (year, month, day) = crate::format::civil(days);
            assert_eq!(day_number(year, month.into(), day.into()), days);
        }
    }
}
