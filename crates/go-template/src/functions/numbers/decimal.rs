//! Decimal numbers for `addf` and the like, as shopspring/decimal: exact but for division.

use std::cmp::Ordering;

/// `mantissa * 10^exponent`
#[derive(Clone, Copy, Debug)]
pub(super) struct Decimal {
    mantissa: i128,
    exponent: i32,
}

/// Places that a quotient has.
const DIVISION_PLACES: i32 = 16;

fn power(exponent: u32) -> Option<i128> {
    10i128.checked_pow(exponent)
}

impl Decimal {
    /// The shortest decimal that reads back as `value`; `None` for what is not finite.
    pub(super) fn new(value: f64) -> Option<Self> {
        let text = value.is_finite().then(|| format!("{value:e}"))?;
        let (number, exponent) = text.split_once('e')?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let mantissa = format!("{whole}{fraction}").parse().ok()?;
        let exponent: i32 = exponent.parse().ok()?;
        Some(Self { mantissa, exponent: exponent - fraction.len() as i32 })
    }

    pub(super) fn to_f64(self) -> f64 {
        // Reading the text rounds once.
        format!("{}e{}", self.mantissa, self.exponent).parse().unwrap_or(f64::NAN)
    }

    fn aligned(self, other: Self) -> Option<(i128, i128, i32)> {
        let exponent = self.exponent.min(other.exponent);
        let scale = |number: Self| number.mantissa.checked_mul(power((number.exponent - exponent) as u32)?);
        Some((scale(self)?, scale(other)?, exponent))
    }

    pub(super) fn add(self, other: Self) -> Option<Self> {
        let (a, b, exponent) = self.aligned(other)?;
        Some(Self { mantissa: a.checked_add(b)?, exponent })
    }

    pub(super) fn sub(self, other: Self) -> Option<Self> {
        self.add(Self { mantissa: -other.mantissa, ..other })
    }

    pub(super) fn mul(self, other: Self) -> Option<Self> {
        Some(Self { mantissa: self.mantissa.checked_mul(other.mantissa)?, exponent: self.exponent + other.exponent })
    }

    pub(super) fn is_zero(self) -> bool {
        self.mantissa == 0
    }

    /// Rounded half away from zero.
    pub(super) fn div(self, other: Self) -> Option<Self> {
        let shift = self.exponent - other.exponent + DIVISION_PLACES;
        let (mut above, mut below) = (self.mantissa, other.mantissa);
        match shift.cmp(&0) {
            Ordering::Less => below = below.checked_mul(power(shift.unsigned_abs())?)?,
            _ => above = above.checked_mul(power(shift as u32)?)?,
        }
        let (quotient, rest) = (above.checked_div(below)?, above.checked_rem(below)?);
        let away = if rest.unsigned_abs().checked_mul(2)? >= below.unsigned_abs() {
            if (above < 0) == (below < 0) { 1 } else { -1 }
        } else {
            0
        };
        Some(Self { mantissa: quotient + away, exponent: -DIVISION_PLACES })
    }
}
