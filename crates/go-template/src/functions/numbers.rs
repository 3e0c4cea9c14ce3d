//! sprig's functions on numbers.

mod decimal;

use decimal::Decimal;

use super::{Args, Functions, Outcome};
use crate::format::{self, to_float, to_int};
use crate::value::Value;

fn int64<'a>(value: i64) -> Outcome<'a> {
    Ok(Value::Int(value, "int64"))
}

fn float<'a>(value: f64) -> Outcome<'a> {
    Ok(Value::Float(value))
}

/// All arguments as integers, combined from the left.
fn fold<'a>(args: Args<'a, '_>, combine: fn(i64, i64) -> Option<i64>) -> Outcome<'a> {
    let mut values = args.all().iter().map(to_int);
    let mut result = values.next().unwrap_or(0);
    for value in values {
        result = combine(result, value).ok_or("integer overflow or division by zero")?;
    }
    int64(result)
}

fn fold_float<'a>(args: Args<'a, '_>, combine: fn(f64, f64) -> f64) -> Outcome<'a> {
    let values = args.all().iter().map(to_float);
    float(values.reduce(combine).unwrap_or(0.0))
}

/// All arguments as decimals, combined from the left; with binary numbers where decimals are too large.
fn fold_decimal<'a>(
    values: impl Iterator<Item = f64>,
    exact: fn(Decimal, Decimal) -> Option<Decimal>,
    binary: fn(f64, f64) -> f64,
) -> Outcome<'a> {
    let result = values.reduce(|a, b| {
        let combined = Decimal::new(a).zip(Decimal::new(b)).and_then(|(a, b)| exact(a, b));
        combined.map_or_else(|| binary(a, b), Decimal::to_f64)
    });
    // There is no negative zero among decimals.
    float(result.unwrap_or(0.0) + 0.0)
}

pub(super) fn define(functions: &mut Functions) {
    functions.define("add", 0, None, |args| fold(args, |a, b| Some(a.wrapping_add(b))));
    functions.define("add1", 1, Some(1), |args| int64(args.to_int(0).wrapping_add(1)));
    functions.define("sub", 2, Some(2), |args| fold(args, |a, b| Some(a.wrapping_sub(b))));
    functions.define("mul", 1, None, |args| fold(args, |a, b| Some(a.wrapping_mul(b))));
    functions.define("div", 2, Some(2), |args| fold(args, i64::checked_div));
    functions.define("mod", 2, Some(2), |args| fold(args, i64::checked_rem));
    for name in ["max", "biggest"] {
        functions.define(name, 1, None, |args| fold(args, |a, b| Some(a.max(b))));
    }
    functions.define("min", 1, None, |args| fold(args, |a, b| Some(a.min(b))));
    functions.define("addf", 0, None, |args| fold_decimal(args.all().iter().map(to_float), Decimal::add, |a, b| a + b));
    functions.define("add1f", 1, Some(1), |args| {
        fold_decimal([args.to_float(0), 1.0].into_iter(), Decimal::add, |a, b| a + b)
    });
    functions.define("subf", 1, None, |args| fold_decimal(args.all().iter().map(to_float), Decimal::sub, |a, b| a - b));
    functions.define("mulf", 1, None, |args| fold_decimal(args.all().iter().map(to_float), Decimal::mul, |a, b| a * b));
    functions.define("divf", 1, None, |args| {
        let zero = |value: &Value<'_>| Decimal::new(to_float(value)).is_some_and(Decimal::is_zero);
        if args.all().iter().skip(1).any(zero) {
            return Err("decimal division by 0".to_owned());
        }
        fold_decimal(args.all().iter().map(to_float), Decimal::div, |a, b| a / b)
    });
    functions.define("maxf", 1, None, |args| fold_float(args, f64::max));
    functions.define("minf", 1, None, |args| fold_float(args, f64::min));
    functions.define("floor", 1, Some(1), |args| float(args.to_float(0).floor()));
    functions.define("ceil", 1, Some(1), |args| float(args.to_float(0).ceil()));
    functions.define("round", 2, Some(3), round);
    functions.define("int", 1, Some(1), |args| Ok(Value::int(args.to_int(0))));
    functions.define("int64", 1, Some(1), |args| int64(args.to_int(0)));
    functions.define("float64", 1, Some(1), |args| float(args.to_float(0)));
    functions.define("atoi", 1, Some(1), |args| Ok(Value::int(atoi(args.text(0)?))));
    functions.define("toDecimal", 1, Some(1), |args| {
        int64(i64::from_str_radix(&format::sprint(args.get(0)), 8).unwrap_or(0))
    });
}

/// `strconv.Atoi`, of which sprig drops the error: what is too large is the largest.
fn atoi(text: &str) -> i64 {
    use std::num::IntErrorKind::{NegOverflow, PosOverflow};
    text.parse().unwrap_or_else(|error: std::num::ParseIntError| match error.kind() {
        PosOverflow => i64::MAX,
        NegOverflow => i64::MIN,
        _ => 0,
    })
}

/// Rounds half up at the given number of places, or from the third argument up.
fn round<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let value = args.to_float(0);
    let places = i32::try_from(args.int(1)?).unwrap_or(0);
    let half = match args.get(2) {
        Value::Float(half) => *half,
        Value::Int(half, _) => *half as f64,
        _ if args.len() < 3 => 0.5,
        other => return Err(format!("wrong type for value; expected float64; got {}", other.type_name())),
    };
    let power = 10f64.powi(places);
    let digit = power * value;
    let fraction = digit.fract();
    float(if fraction >= half { digit.ceil() } else { digit.floor() } / power)
}
