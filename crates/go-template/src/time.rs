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

/// `time.Format` with Go's reference date.
pub(crate) fn layout(seconds: i64, _nanos: u32, layout: &str) -> String {
    let date = civil(seconds);
    let month = MONTHS[date.month as usize - 1];
    let twelve = if date.hour % 12 == 0 { 12 } else { date.hour % 12 };
    // Longer elements first: "January" before "Jan", "2006" before "2".
    let elements: [(&str, String); 25] = [
        ("January", month.to_owned()),
        ("Jan", month[..3].to_owned()),
        ("Monday", DAYS[date.weekday].to_owned()),
        ("Mon", DAYS[date.weekday][..3].to_owned()),
        ("MST", "UTC".to_owned()),
        ("2006", format!("{:04}", date.year)),
        ("Z07:00", "Z".to_owned()),
        ("Z0700", "Z".to_owned()),
        ("-07:00", "+00:00".to_owned()),
        ("-0700", "+0000".to_owned()),
        ("-07", "+00".to_owned()),
        ("01", format!("{:02}", date.month)),
        ("02", format!("{:02}", date.day)),
        ("03", format!("{twelve:02}")),
        ("04", format!("{:02}", date.minute)),
        ("05", format!("{:02}", date.second)),
        ("06", format!("{:02}", date.year.rem_euclid(100))),
        ("15", format!("{:02}", date.hour)),
        ("PM", if date.hour < 12 { "AM" } else { "PM" }.to_owned()),
        ("pm", if date.hour < 12 { "am" } else { "pm" }.to_owned()),
        ("1", date.month.to_string()),
        ("2", date.day.to_string()),
        ("3", twelve.to_string()),
        ("4", date.minute.to_string()),
        ("5", date.second.to_string()),
    ];
    let mut out = String::new();
    let mut rest = layout;
    while let Some(c) = rest.chars().next() {
        match elements.iter().find(|(element, _)| rest.starts_with(element)) {
            Some((element, value)) => {
                out.push_str(value);
                rest = &rest[element.len()..];
            }
            None => {
                out.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    out
}

/// Seconds since 1970 of a civil date, the inverse of [`civil`].
fn seconds_of(year: i64, month: i64, day: i64, time: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    days * 86_400 + time
}

/// `time.Parse` for layouts of digits: year, month, day, hour, minute, second.
pub(crate) fn parse(layout: &str, text: &str) -> Option<i64> {
    let (mut year, mut month, mut day, mut time) = (0, 1, 1, 0);
    let (mut layout, mut text) = (layout, text);
    while let Some(c) = layout.chars().next() {
        let element = ["2006", "01", "02", "15", "04", "05"].into_iter().find(|element| layout.starts_with(element));
        match element {
            Some(element) => {
                let value: i64 = text.get(..element.len())?.parse().ok()?;
                text = &text[element.len()..];
                layout = &layout[element.len()..];
                match element {
                    "2006" => year = value,
                    "01" => month = (1..=12).contains(&value).then_some(value)?,
                    "02" => day = (1..=31).contains(&value).then_some(value)?,
                    "15" => time += value * 3600,
                    "04" => time += value * 60,
                    _ => time += value,
                }
            }
            None => {
                layout = &layout[c.len_utf8()..];
                text = text.strip_prefix(c)?;
            }
        }
    }
    text.is_empty().then(|| seconds_of(year, month, day, time))
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
            let seconds = parse("2006-01-02 15:04:05", text).unwrap();
            assert_eq!(layout(seconds, 0, "2006-01-02 15:04:05"), text);
        }
        assert_eq!(layout(0, 0, "Mon, 02 Jan 2006 3:04PM MST"), "Thu, 01 Jan 1970 12:00AM UTC");
    }
}
