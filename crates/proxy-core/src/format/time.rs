use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::text::padded;

/// How a moment prints (Envoy `DateFormatter`: strftime with fractions), in UTC.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TimeFormat(Box<[Part]>);

#[derive(Clone, Debug, Eq, PartialEq)]
enum Part {
    Text(Box<str>),
    /// One strftime letter.
    Field(char),
    /// So many digits of the fraction.
    Fraction(u8),
    /// Seconds, a dot, and so many digits.
    SecondsWithFraction(u8),
    /// Seconds since 1970, then so many digits of the fraction.
    Epoch(u8),
}

/// Year, month, day.
type Date = (i64, u32, u32);

impl TimeFormat {
    /// Parses; empty means `%Y-%m-%dT%H:%M:%E3SZ`.
    pub fn parse(format: &str) -> Self {
        let format = if format.is_empty() { "%Y-%m-%dT%H:%M:%E3SZ" } else { format };
        let mut parts = Vec::new();
        let mut text = String::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            text.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            let (part, used) = Self::part(rest);
            let Some(part) = part else {
                text.push('%');
                continue;
            };
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text).into()));
            }
            parts.push(part);
            rest = &rest[used..];
        }
        text.push_str(rest);
        if !text.is_empty() {
            parts.push(Part::Text(text.into()));
        }
        Self(parts.into())
    }

    fn part(rest: &str) -> (Option<Part>, usize) {
        let bytes = rest.as_bytes();
        let digit = |b: u8| b.is_ascii_digit().then(|| b - b'0');
        match bytes {
            [b'E', d, b'S', ..] => (digit(*d).map(Part::SecondsWithFraction), 3),
            [d, b'f', ..] if d.is_ascii_digit() => (digit(*d).map(Part::Fraction), 2),
            [d, b's', ..] if d.is_ascii_digit() => (digit(*d).map(Part::Epoch), 2),
            [b'f', ..] => (Some(Part::Fraction(9)), 1),
            [b's', ..] => (Some(Part::Epoch(0)), 1),
            [b'%', ..] => (Some(Part::Text("%".into())), 1),
            [letter, ..] if letter.is_ascii_alphabetic() => (Some(Part::Field(*letter as char)), 1),
            _ => (None, 0),
        }
    }

    /// Appends the moment.
    pub fn write(&self, time: SystemTime, out: &mut Vec<u8>) {
        // Times before 1970 do not occur; they print as 1970.
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let days = (since.as_secs() / 86_400) as i64;
        let second = since.as_secs() % 86_400;
        let date = civil(days);
        for part in &self.0 {
            match part {
                Part::Text(text) => out.extend_from_slice(text.as_bytes()),
                Part::Field(letter) => field(*letter, date, days, second, out),
                Part::Fraction(digits) => fraction(since, *digits, out),
                Part::SecondsWithFraction(digits) => {
                    padded(out, second % 60, 2);
                    if *digits > 0 {
                        out.push(b'.');
                    }
                    fraction(since, *digits, out);
                }
                Part::Epoch(digits) => {
                    padded(out, since.as_secs(), 1);
                    fraction(since, *digits, out);
                }
            }
        }
    }
}

fn fraction(since: Duration, digits: u8, out: &mut Vec<u8>) {
    let digits = digits.min(9);
    if digits == 0 {
        return;
    }
    let cut = since.subsec_nanos() / 10u32.pow(9 - u32::from(digits));
    padded(out, cut.into(), digits.into());
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Two digits at least, behind something.
fn two(out: &mut Vec<u8>, before: &[u8], n: u64) {
    out.extend_from_slice(before);
    padded(out, n, 2);
}

fn field(letter: char, (year, month, day): Date, days: i64, second: u64, out: &mut Vec<u8>) {
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let year = year.unsigned_abs();
    let month_name = MONTHS[month as usize - 1].as_bytes();
    let weekday = WEEKDAYS[days.rem_euclid(7) as usize].as_bytes();
    let (month, day) = (u64::from(month), u64::from(day));
    match letter {
        'Y' => padded(out, year, 1),
        'y' => two(out, b"", year % 100),
        'm' => two(out, b"", month),
        'd' => two(out, b"", day),
        'e' => {
            if day < 10 {
                out.push(b' ');
            }
            padded(out, day, 1);
        }
        'H' => two(out, b"", hour),
        'I' => two(out, b"", (hour + 11) % 12 + 1),
        'p' => out.extend_from_slice(if hour < 12 { b"AM" } else { b"PM" }),
        'M' => two(out, b"", minute),
        'S' => two(out, b"", second),
        'b' | 'h' => out.extend_from_slice(&month_name[..3]),
        'B' => out.extend_from_slice(month_name),
        'a' => out.extend_from_slice(&weekday[..3]),
        'A' => out.extend_from_slice(weekday),
        'F' => {
            padded(out, year, 1);
            two(out, b"-", month);
            two(out, b"-", day);
        }
        'T' => {
            two(out, b"", hour);
            two(out, b":", minute);
            two(out, b":", second);
        }
        'R' => {
            two(out, b"", hour);
            two(out, b":", minute);
        }
        'D' => {
            two(out, b"", month);
            two(out, b"/", day);
            two(out, b"/", year % 100);
        }
        'z' => out.extend_from_slice(b"+0000"),
        'Z' => out.extend_from_slice(b"UTC"),
        other => {
            let mut text = [0; 4];
            out.push(b'%');
            out.extend_from_slice(other.encode_utf8(&mut text).as_bytes());
        }
    }
}

/// The date of a day counted from 1970-01-01 in the Gregorian calendar (the well-known era algorithm: years start in March).
pub(crate) fn civil(days: i64) -> Date {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let mp = (5 * day_of_year + 2) / 153;
    let day = (day_of_year - (153 * mp + 2) / 5 + 1) as u32;
    let month = if mp < 10 { mp + 3 } else { mp - 9 } as u32;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(format: &str, at: Duration, expected: &str) {
        let mut out = Vec::new();
        TimeFormat::parse(format).write(UNIX_EPOCH + at, &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn dates() {
        let at = Duration::new(1_709_210_096, 123_456_789);
        check("", at, "2024-02-29T12:34:56.123Z");
        check("%s.%3f %9f %3s", at, "1709210096.123 123456789 1709210096123");
        check("%a, %d %b %Y %T %%", at, "Thu, 29 Feb 2024 12:34:56 %");
        check("", Duration::ZERO, "1970-01-01T00:00:00.000Z");
        check("%F", Duration::from_secs(946_684_799), "1999-12-31");
    }
}
