use serde_json::{Map, Value};

/// One value, as what it can be understood (Envoy `Runtime::Snapshot::Entry`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entry {
    written: String,
    number: Option<f64>,
    flag: Option<bool>,
    /// Parts and whole.
    share: Option<(u32, u32)>,
}

impl Entry {
    /// A value of a static layer; `None`: lists and nothing are none.
    pub(super) fn of_value(value: &Value) -> Option<Self> {
        Some(match value {
            Value::Number(number) => {
                let number = number.as_f64()?;
                Self { written: six_digits(number), number: Some(number), ..Self::default() }
            }
            Value::Bool(flag) => Self { written: flag.to_string(), flag: Some(*flag), ..Self::default() },
            Value::String(text) => Self::of_text(text),
            Value::Object(fields) => Self { written: value.to_string(), share: share(fields), ..Self::default() },
            Value::Null | Value::Array(_) => return None,
        })
    }

    /// Text that is a number or a truth value is that.
    fn of_text(text: &str) -> Self {
        let flag =
            [true, false].into_iter().find(|flag| text.eq_ignore_ascii_case(if *flag { "true" } else { "false" }));
        let number = text.trim().parse().ok().filter(|n: &f64| n.is_finite());
        Self { written: text.to_owned(), number, flag, share: None }
    }

    /// A value given to `/runtime_modify`, which Envoy reads as YAML: besides text, `{numerator: 1, denominator: TEN_THOUSAND}`.
    pub(super) fn of_written(text: &str) -> Self {
        let inner = text.trim().strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
        let Some(inner) = inner else { return Self::of_text(text) };
        let unquoted = |part: &str| part.trim().trim_matches(['"', '\'']).to_owned();
        let pairs = inner.split(',').filter_map(|pair| pair.split_once(':'));
        let fields = pairs.map(|(key, value)| {
            let value = unquoted(value);
            (unquoted(key), value.parse::<u32>().map_or(Value::String(value), Value::from))
        });
        Self { written: text.to_owned(), share: share(&fields.collect()), ..Self::default() }
    }

    /// As it was written.
    pub fn written(&self) -> &str {
        &self.written
    }

    /// Any number.
    pub fn number(&self) -> Option<f64> {
        self.number
    }

    /// A number that is not negative, without its fraction.
    pub fn whole(&self) -> Option<u64> {
        self.number.filter(|n| *n >= 0.0).map(|n| n as u64)
    }

    /// A truth value; a number is one, too.
    pub fn flag(&self) -> Option<bool> {
        self.flag.or_else(|| self.number.map(|n| n != 0.0))
    }

    /// A share; a number means percent, and one above 100 always.
    pub fn share(&self) -> Option<(u32, u32)> {
        self.share.or_else(|| self.whole().map(|n| (u32::try_from(n.min(100)).unwrap_or(100), 100)))
    }
}

/// A `FractionalPercent` in its JSON form.
fn share(fields: &Map<String, Value>) -> Option<(u32, u32)> {
    if fields.keys().any(|key| key != "numerator" && key != "denominator") {
        return None;
    }
    let numerator = match fields.get("numerator") {
        None => 0,
        Some(value) => value.as_f64().filter(|n| *n >= 0.0 && *n <= f64::from(u32::MAX))? as u32,
    };
    let denominator = match fields.get("denominator") {
        None => 100,
        Some(Value::String(name)) => match name.as_str() {
            "HUNDRED" => 100,
            "TEN_THOUSAND" => 10_000,
            "MILLION" => 1_000_000,
            _ => return None,
        },
        Some(value) => [100, 10_000, 1_000_000].get(value.as_u64()? as usize).copied()?,
    };
    Some((numerator, denominator))
}

/// As C's `%g`, which Envoy prints numbers with.
fn six_digits(number: f64) -> String {
    let scientific = format!("{number:.5e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trimmed = |digits: &str| match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits.to_owned(),
    };
    if (-4..6).contains(&exponent) {
        return trimmed(&format!("{number:.*}", (5 - exponent).unsigned_abs() as usize));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", trimmed(digits), exponent.abs())
}
