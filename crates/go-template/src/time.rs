//! The calendar, in UTC, and Go's layouts of dates.

use crate::value::Value;

/// Year, month, day, hour, minute, second, and the day of the week from Sunday.
#[derive(Clone, Copy)]
struct Civil {
    year: i64,
    month: u32,
    day: u32,
    hour: i64,
    minute: i64,
    second: i64,
    weekday: usize,
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
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Proleptic Gregorian date of a Unix time.
fn civil(seconds: i64) -> Civil {
    let days = seconds.div_euclid(86_400);
    let rest = seconds.rem_euclid(86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = (of_year - (153 * shifted_month + 2) / 5 + 1) as u32;
    let month = (if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 }) as u32;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    Civil {
        year,
        month,
        day,
        hour: rest / 3600,
        minute: rest / 60 % 60,
        second: rest % 60,
        weekday: (days + 4).rem_euclid(7) as usize,
    }
}

/// What `%v` prints of a time in UTC.
pub(crate) fn display(seconds: i64, nanos: u32) -> String {
    let mut text = layout(seconds, nanos, "2006-01-02 15:04:05");
    if nanos > 0 {
        text.push_str(format!(".{nanos:09}").trim_end_matches('0'));
    }
    text + " +0000 UTC"
}

/// Methods of `time.Time` without arguments.
pub(crate) fn part<'a>(seconds: i64, nanos: u32, name: &str) -> Option<Value<'a>> {
    let date = civil(seconds);
    Some(Value::int(match name {
        "Year" => date.year,
        "Month" => i64::from(date.month),
        "Day" => i64::from(date.day),
        "Hour" => date.hour,
        "Minute" => date.minute,
        "Second" => date.second,
        "Nanosecond" => i64::from(nanos),
        "UnixNano" => seconds.checked_mul(1_000_000_000)?.checked_add(i64::from(nanos))?,
        _ => return None,
    }))
}

/// What a layout can have besides text, as Go's `nextStdChunk` finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Element {
    LongMonth,
    Month,
    /// With this many digits at least, or blanks before it.
    MonthNumber(usize),
    LongDay,
    WeekDay,
    Day(usize),
    BlankDay,
    YearDay,
    BlankYearDay,
    Hour24,
    Hour12(usize),
    Minute(usize),
    Second(usize),
    LongYear,
    Year,
    UpperHalf,
    LowerHalf,
    Zone,
    /// An offset; `Z` for none when it starts with Z. Whether colons stand in it, and how many parts it has.
    Offset {
        zulu: bool,
        colons: bool,
        parts: usize,
    },
    /// `.000`: so many digits; `.999`: at most so many, without zeros at the end.
    Fraction {
        digits: usize,
        trimmed: bool,
    },
}

/// Longer elements first.
const ELEMENTS: [(&str, Element); 33] = [
    ("January", Element::LongMonth),
    ("Jan", Element::Month),
    ("Monday", Element::LongDay),
    ("Mon", Element::WeekDay),
    ("MST", Element::Zone),
    ("002", Element::YearDay),
    ("01", Element::MonthNumber(2)),
    ("02", Element::Day(2)),
    ("03", Element::Hour12(2)),
    ("04", Element::Minute(2)),
    ("05", Element::Second(2)),
    ("06", Element::Year),
    ("15", Element::Hour24),
    ("1", Element::MonthNumber(1)),
    ("2006", Element::LongYear),
    ("2", Element::Day(1)),
    ("__2", Element::BlankYearDay),
    ("_2", Element::BlankDay),
    ("3", Element::Hour12(1)),
    ("4", Element::Minute(1)),
    ("5", Element::Second(1)),
    ("PM", Element::UpperHalf),
    ("pm", Element::LowerHalf),
    ("-07:00:00", Element::Offset { zulu: false, colons: true, parts: 3 }),
    ("-070000", Element::Offset { zulu: false, colons: false, parts: 3 }),
    ("-07:00", Element::Offset { zulu: false, colons: true, parts: 2 }),
    ("-0700", Element::Offset { zulu: false, colons: false, parts: 2 }),
    ("-07", Element::Offset { zulu: false, colons: false, parts: 1 }),
    ("Z07:00:00", Element::Offset { zulu: true, colons: true, parts: 3 }),
    ("Z070000", Element::Offset { zulu: true, colons: false, parts: 3 }),
    ("Z07:00", Element::Offset { zulu: true, colons: true, parts: 2 }),
    ("Z0700", Element::Offset { zulu: true, colons: false, parts: 2 }),
    ("Z07", Element::Offset { zulu: true, colons: false, parts: 1 }),
];

/// The element at the start of `layout` and its length.
fn element(layout: &str) -> Option<(Element, usize)> {
    if layout.starts_with("_2006") {
        // An underscore before a year.
        return None;
    }
    if layout.starts_with(['.', ',']) {
        let digit = layout[1..].chars().next().filter(|c| matches!(c, '0' | '9'))?;
        let digits = layout[1..].find(|c| c != digit).unwrap_or(layout.len() - 1);
        let ends = !layout[1 + digits..].starts_with(|c: char| c.is_ascii_digit());
        return ends.then_some((Element::Fraction { digits, trimmed: digit == '9' }, digits + 1));
    }
    let (written, element) = ELEMENTS.iter().find(|(written, _)| layout.starts_with(written))?;
    let lower_after = layout[written.len()..].starts_with(|c: char| c.is_ascii_lowercase());
    if matches!(element, Element::Month | Element::WeekDay) && lower_after {
        return None;
    }
    Some((*element, written.len()))
}

/// `time.Format` with Go's reference date.
pub(crate) fn layout(seconds: i64, nanos: u32, layout: &str) -> String {
    let date = civil(seconds);
    let month = MONTHS[date.month as usize - 1];
    let twelve = if date.hour % 12 == 0 { 12 } else { date.hour % 12 };
    let year_day = (seconds - seconds_of(date.year, 1, 1, 0)).div_euclid(86_400) + 1;
    let mut out = String::new();
    let mut rest = layout;
    while let Some(c) = rest.chars().next() {
        let Some((element, length)) = element(rest) else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        };
        rest = &rest[length..];
        out.push_str(&match element {
            Element::LongMonth => month.to_owned(),
            Element::Month => month[..3].to_owned(),
            Element::MonthNumber(width) => format!("{:0width$}", date.month),
            Element::LongDay => DAYS[date.weekday].to_owned(),
            Element::WeekDay => DAYS[date.weekday][..3].to_owned(),
            Element::Day(width) => format!("{:0width$}", date.day),
            Element::BlankDay => format!("{:2}", date.day),
            Element::YearDay => format!("{year_day:03}"),
            Element::BlankYearDay => format!("{year_day:3}"),
            Element::Hour24 => format!("{:02}", date.hour),
            Element::Hour12(width) => format!("{twelve:0width$}"),
            Element::Minute(width) => format!("{:0width$}", date.minute),
            Element::Second(width) => format!("{:0width$}", date.second),
            Element::LongYear => format!("{:04}", date.year),
            Element::Year => format!("{:02}", date.year.rem_euclid(100)),
            Element::UpperHalf => if date.hour < 12 { "AM" } else { "PM" }.to_owned(),
            Element::LowerHalf => if date.hour < 12 { "am" } else { "pm" }.to_owned(),
            Element::Zone => "UTC".to_owned(),
            Element::Offset { zulu: true, .. } => "Z".to_owned(),
            Element::Offset { colons, parts, .. } => {
                format!("+{}", vec!["00"; parts].join(if colons { ":" } else { "" }))
            }
            Element::Fraction { digits, trimmed } => {
                let text = format!("{nanos:09}");
                let text = format!("{:0<digits$}", &text[..digits.min(9)]);
                let text = if trimmed { text.trim_end_matches('0') } else { &text };
                let point = &layout[layout.len() - rest.len() - length..][..1];
                if trimmed && text.is_empty() { String::new() } else { format!("{point}{text}") }
            }
        });
    }
    out
}

/// As `encoding/json` writes a time.
pub(crate) fn rfc3339(seconds: i64, nanos: u32) -> String {
    layout(seconds, nanos, "2006-01-02T15:04:05.999999999Z07:00")
}

/// `time.Time{}`, in seconds since 1970.
pub(crate) const ZERO: i64 = -62_135_596_800;

/// Seconds since 1970 of a civil date, the inverse of [`civil`].
fn seconds_of(year: i64, month: i64, day: i64, time: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    days * 86_400 + time
}

/// Takes a number of `least` to `most` digits off the start.
fn digits(text: &mut &str, least: usize, most: usize) -> Option<i64> {
    let length = text.bytes().take(most).take_while(u8::is_ascii_digit).count();
    if length < least {
        return None;
    }
    let (number, rest) = text.split_at(length);
    *text = rest;
    number.parse().ok()
}

/// Takes one of the names off the start, as a whole or its first three letters.
fn name(text: &mut &str, names: &[&str], long: bool) -> Option<i64> {
    let found = names.iter().position(|name| {
        let name = if long { name } else { &name[..3] };
        text.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name))
    })?;
    *text = &text[if long { names[found].len() } else { 3 }..];
    Some(found as i64)
}

/// `time.Parse`: seconds and nanoseconds since 1970.
pub(crate) fn parse(layout: &str, text: &str) -> Option<(i64, u32)> {
    let (mut year, mut month, mut day, mut year_day) = (0, None, None, None);
    let (mut hour, mut minute, mut second, mut nanos, mut offset) = (0, 0, 0, 0u32, 0);
    let mut afternoon = None;
    let (mut layout, mut text) = (layout, text);
    while let Some(c) = layout.chars().next() {
        let Some((element, length)) = element(layout) else {
            layout = &layout[c.len_utf8()..];
            if c == ' ' {
                // Blanks match any number of blanks.
                layout = layout.trim_start_matches(' ');
                text = text.strip_prefix(' ')?.trim_start_matches(' ');
            } else {
                text = text.strip_prefix(c)?;
            }
            continue;
        };
        layout = &layout[length..];
        let within = |value: i64, low: i64, high: i64| (low..=high).contains(&value).then_some(value);
        match element {
            Element::LongYear => year = digits(&mut text, 4, 4)?,
            Element::Year => {
                let short = digits(&mut text, 2, 2)?;
                year = if short >= 69 { 1900 + short } else { 2000 + short };
            }
            Element::LongMonth => month = Some(name(&mut text, &MONTHS, true)? + 1),
            Element::Month => month = Some(name(&mut text, &MONTHS, false)? + 1),
            Element::MonthNumber(width) => month = Some(within(digits(&mut text, width, 2)?, 1, 12)?),
            Element::LongDay => _ = name(&mut text, &DAYS, true)?,
            Element::WeekDay => _ = name(&mut text, &DAYS, false)?,
            Element::Day(width) => day = Some(digits(&mut text, width, 2)?),
            Element::BlankDay => {
                text = text.strip_prefix(' ').unwrap_or(text);
                day = Some(digits(&mut text, 1, 2)?);
            }
            Element::YearDay => year_day = Some(digits(&mut text, 3, 3)?),
            Element::BlankYearDay => {
                text = text.trim_start_matches(' ');
                year_day = Some(digits(&mut text, 1, 3)?);
            }
            Element::Hour24 => hour = within(digits(&mut text, 1, 2)?, 0, 23)?,
            Element::Hour12(width) => hour = within(digits(&mut text, width, 2)?, 0, 12)?,
            Element::Minute(width) => minute = within(digits(&mut text, width, 2)?, 0, 59)?,
            Element::Second(width) => {
                second = within(digits(&mut text, width, 2)?, 0, 59)?;
                // A fraction may follow that the layout does not name.
                let fraction = text.starts_with(['.', ',']) && text[1..].starts_with(|c: char| c.is_ascii_digit());
                if fraction && !layout.starts_with(['.', ',']) {
                    nanos = fraction_of(&mut text, 1)?;
                }
            }
            Element::Fraction { digits, trimmed: false } => nanos = exact_fraction(&mut text, digits)?,
            Element::Fraction { .. } => {
                if text.starts_with(['.', ',']) {
                    nanos = fraction_of(&mut text, 0)?;
                }
            }
            Element::UpperHalf | Element::LowerHalf => {
                let half = text.get(..2)?;
                afternoon = Some(match half {
                    "PM" | "pm" => true,
                    "AM" | "am" => false,
                    _ => return None,
                });
                text = &text[2..];
            }
            // Names of zones other than UTC have no known offset here.
            Element::Zone => text = text.strip_prefix("UTC").or_else(|| text.get(3..))?,
            Element::Offset { zulu: true, .. } if text.starts_with('Z') => text = &text[1..],
            Element::Offset { colons, parts, .. } => {
                let sign = match text.chars().next()? {
                    '+' => 1,
                    '-' => -1,
                    _ => return None,
                };
                text = &text[1..];
                for part in 0..parts {
                    if part > 0 && colons {
                        text = text.strip_prefix(':')?;
                    }
                    offset += sign * digits(&mut text, 2, 2)? * [3600, 60, 1][part];
                }
            }
        }
    }
    if !text.is_empty() {
        return None;
    }
    match afternoon {
        Some(true) if hour < 12 => hour += 12,
        Some(false) if hour == 12 => hour = 0,
        _ => {}
    }
    let time = hour * 3600 + minute * 60 + second - offset;
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    if let Some(year_day) = year_day.filter(|_| month.is_none()) {
        let last = if leap { 366 } else { 365 };
        return (1..=last).contains(&year_day).then(|| (seconds_of(year, 1, 1, time) + (year_day - 1) * 86_400, nanos));
    }
    let (month, day) = (month.unwrap_or(1), day.unwrap_or(1));
    let last = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month as usize - 1];
    (1..=last).contains(&day).then(|| (seconds_of(year, month, day, time), nanos))
}

/// Nanoseconds from a point and as many digits as follow, at least `least`.
fn fraction_of(text: &mut &str, least: usize) -> Option<u32> {
    let count = text[1..].bytes().take_while(u8::is_ascii_digit).count();
    if count < least { None } else { exact_fraction(text, count) }
}

fn exact_fraction(text: &mut &str, count: usize) -> Option<u32> {
    let rest = text.strip_prefix(['.', ','])?;
    let digits = rest.get(..count).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))?;
    *text = &rest[count..];
    format!("{:0<9}", &digits[..count.min(9)]).parse().ok()
}

/// Nanoseconds of `time.ParseDuration`.
pub(crate) fn duration(text: &str) -> Option<i64> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    let mut total = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let (number, after) = rest.split_at(unit_at);
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let scale = match unit {
            "ns" => 1.0,
            "us" | "µs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * scale;
        rest = after;
    }
    (total < 9.2e18).then_some((sign * total) as i64)
}

#[cfg(test)]
mod tests {
    use super::{layout, parse};

    #[test]
    fn dates_go_back_and_forth() {
        for text in ["1970-01-01 00:00:00", "2000-02-29 23:59:59", "2026-11-21 10:00:01", "1969-12-31 12:00:00"] {
            let (seconds, _) = parse("2006-01-02 15:04:05", text).unwrap();
            assert_eq!(layout(seconds, 0, "2006-01-02 15:04:05"), text);
        }
        assert_eq!(layout(0, 0, "Mon, 02 Jan 2006 3:04PM MST"), "Thu, 01 Jan 1970 12:00AM UTC");
    }
}
