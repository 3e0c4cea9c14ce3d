//! JSON of structured values, with numbers as Envoy writes them.

use std::io::Write;

use serde_json::{Map, Number, Value};

use super::write_json_string;

/// One value.
pub(super) fn value(of: &Value, out: &mut Vec<u8>) {
    match of {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(yes) => out.extend_from_slice(if *yes { b"true" } else { b"false" }),
        Value::Number(n) => number(n, out),
        Value::String(text) => write_json_string(text.as_bytes(), out),
        Value::Array(list) => {
            out.push(b'[');
            for (i, item) in list.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                value(item, out);
            }
            out.push(b']');
        }
        Value::Object(fields) => object(fields, out),
    }
}

/// The members of an object.
pub(super) fn object(fields: &Map<String, Value>, out: &mut Vec<u8>) {
    out.push(b'{');
    for (i, (key, item)) in fields.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write_json_string(key.as_bytes(), out);
        out.push(b':');
        value(item, out);
    }
    out.push(b'}');
}

/// All numbers of a protobuf struct are floating: the shorter of plain and scientific digits, as C++'s `to_chars`.
fn number(of: &Number, out: &mut Vec<u8>) {
    let Some(float) = of.as_f64() else { return };
    // Whole numbers to their last digit, though a float does not hold it.
    let plain = if float.fract() == 0.0 { format!("{float:.0}") } else { of.to_string() };
    let scientific = format!("{float:e}");
    let scientific = match scientific.split_once('e') {
        // At least two digits of exponent, with a sign.
        Some((digits, power)) => match power.strip_prefix('-') {
            Some(power) => format!("{digits}e-{power:0>2}"),
            None => format!("{digits}e+{power:0>2}"),
        },
        None => scientific,
    };
    let shorter = if scientific.len() < plain.len() { &scientific } else { &plain };
    // Writing into a vector does not fail.
    let _ = out.write_all(shorter.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_as_short_as_they_can_be() {
        let of = |text: &str| {
            let mut out = Vec::new();
            value(&serde_json::from_str(text).unwrap(), &mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(of("1600000000"), "1.6e+09");
        assert_eq!(of("4102444800"), "4102444800");
        assert_eq!(of("12345678901234567890"), "12345678901234567168");
        assert_eq!(of("[1,10000,100000,-3,1.5,0.00001,0]"), "[1,10000,1e+05,-3,1.5,1e-05,0]");
    }
}
