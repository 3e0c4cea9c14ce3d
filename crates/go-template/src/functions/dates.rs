//! sprig's functions on dates. All zones are UTC.
//!
//! DIFFERS: sprig uses the local zone of the process; an injected pod must not depend on it.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{Functions, Outcome};
use crate::format;
use crate::time;
use crate::value::Value;

fn text<'a>(value: impl Into<String>) -> Outcome<'a> {
    Ok(Value::from(value.into()))
}

/// Now, as seconds and nanoseconds.
fn now() -> (i64, u32) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs() as i64, since.subsec_nanos())
}

/// A time as sprig takes it: a time, or seconds since 1970; anything else is now.
fn instant(value: &Value<'_>) -> (i64, u32) {
    match value {
        Value::Time(seconds, nanos) => (*seconds, *nanos),
        Value::Int(seconds, "int" | "int64" | "int32") => (*seconds, 0),
        _ => now(),
    }
}

pub(super) fn define(functions: &mut Functions) {
    functions.define("now", 0, Some(0), |_| {
        let (seconds, nanos) = now();
        Ok(Value::Time(seconds, nanos))
    });
    functions.define("date", 2, Some(2), |args| {
        let (seconds, nanos) = instant(args.get(1));
        text(time::layout(seconds, nanos, args.text(0)?))
    });
    for name in ["dateInZone", "date_in_zone"] {
        functions.define(name, 3, Some(3), |args| {
            let (seconds, nanos) = instant(args.get(1));
            args.text(2)?;
            text(time::layout(seconds, nanos, args.text(0)?))
        });
    }
    functions.define("htmlDate", 1, Some(1), |args| {
        let (seconds, nanos) = instant(args.get(0));
        text(time::layout(seconds, nanos, "2006-01-02"))
    });
    functions.define("htmlDateInZone", 2, Some(2), |args| {
        let (seconds, nanos) = instant(args.get(0));
        args.text(1)?;
        text(time::layout(seconds, nanos, "2006-01-02"))
    });
    functions.define("unixEpoch", 1, Some(1), |args| text(args.time(0)?.0.to_string()));
    functions.define("toDate", 2, Some(2), |args| {
        let (layout, written) = (args.text(0)?, args.text(1)?);
        let (seconds, nanos) = time::parse(layout, written).unwrap_or((time::ZERO, 0));
        Ok(Value::Time(seconds, nanos))
    });
    functions.define("mustToDate", 2, Some(2), |args| {
        let (layout, written) = (args.text(0)?, args.text(1)?);
        let (seconds, nanos) = time::parse(layout, written)
            .ok_or_else(|| format!("parsing time {} as {}", format::quote(written), format::quote(layout)))?;
        Ok(Value::Time(seconds, nanos))
    });
    functions.define("ago", 1, Some(1), |args| text(duration(now().0 - instant(args.get(0)).0)));
    functions.define("duration", 1, Some(1), |args| {
        let seconds = match args.get(0) {
            Value::Str(written) => written.as_str().parse().unwrap_or(0),
            Value::Int(seconds, "int64") => *seconds,
            _ => 0,
        };
        text(duration(seconds))
    });
    functions.define("durationRound", 1, Some(1), |args| {
        let nanos = match args.get(0) {
            Value::Str(written) => time::duration(written.as_str()).unwrap_or(0),
            Value::Time(seconds, _) => (now().0 - seconds).saturating_mul(1_000_000_000),
            Value::Int(nanos, "int64") => *nanos,
            _ => 0,
        };
        text(rounded(nanos))
    });
    for name in ["dateModify", "date_modify"] {
        functions.define(name, 2, Some(2), |args| {
            let change = time::duration(args.text(0)?).unwrap_or(0);
            moved(args.time(1)?, change)
        });
    }
    for name in ["mustDateModify", "must_date_modify"] {
        functions.define(name, 2, Some(2), |args| {
            let written = args.text(0)?;
            let change =
                time::duration(written).ok_or_else(|| format!("time: invalid duration {}", format::quote(written)))?;
            moved(args.time(1)?, change)
        });
    }
}

fn moved<'a>((seconds, nanos): (i64, u32), change: i64) -> Outcome<'a> {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanos) + i128::from(change);
    let seconds = i64::try_from(total.div_euclid(1_000_000_000)).map_err(|_| "the date is out of range")?;
    Ok(Value::Time(seconds, total.rem_euclid(1_000_000_000) as u32))
}

/// `time.Duration.String` of whole seconds.
fn duration(seconds: i64) -> String {
    let sign = if seconds < 0 { "-" } else { "" };
    let seconds = seconds.unsigned_abs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{sign}{s}s"),
        (0, m, s) => format!("{sign}{m}m{s}s"),
        (h, m, s) => format!("{sign}{h}h{m}m{s}s"),
    }
}

/// The largest unit only, as `2h` or `5d`; takes nanoseconds.
fn rounded(nanos: i64) -> String {
    let seconds = nanos.unsigned_abs() as f64 / 1e9;
    let units = [(31_536_000.0, "y"), (2_592_000.0, "mo"), (86_400.0, "d"), (3600.0, "h"), (60.0, "m"), (1.0, "s")];
    match units.iter().find(|(size, _)| seconds > *size) {
        Some((size, unit)) => format!("{}{unit}", (seconds / size).floor()),
        None => "0s".to_owned(),
    }
}
