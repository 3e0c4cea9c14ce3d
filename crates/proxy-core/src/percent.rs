use crate::Random;
use crate::pb;
use crate::rejected::{Compiled, Invalid};

/// A share of cases (`FractionalPercent`). Runtime keys are not looked up: there is no runtime layer besides the defaults.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fraction {
    numerator: u32,
    denominator: u32,
}

/// In percent: `0.5 %`.
impl std::fmt::Display for Fraction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} %", f64::from(self.numerator) * 100.0 / f64::from(self.denominator))
    }
}

impl Fraction {
    /// Always.
    pub const ALL: Fraction = Fraction { numerator: 100, denominator: 100 };
    /// Never.
    pub const NONE: Fraction = Fraction { numerator: 0, denominator: 100 };

    pub(crate) fn compile(fraction: Option<&pb::kind::FractionalPercent>, default: Fraction) -> Compiled<Self> {
        use pb::kind::fractional_percent::DenominatorType;
        let Some(fraction) = fraction else { return Ok(default) };
        let denominator = match DenominatorType::try_from(fraction.denominator) {
            Ok(DenominatorType::Hundred) => 100,
            Ok(DenominatorType::TenThousand) => 10_000,
            Ok(DenominatorType::Million) => 1_000_000,
            Err(_) => return Err(Invalid::new("denominator", format!("{} is no known value", fraction.denominator))),
        };
        Ok(Self { numerator: fraction.numerator, denominator })
    }

    pub(crate) fn runtime(fraction: Option<&pb::core::RuntimeFractionalPercent>, default: Fraction) -> Compiled<Self> {
        Self::compile(fraction.and_then(|f| f.default_value.as_ref()), default)
    }

    /// A plain percentage as share of a million.
    pub(crate) fn of_percent(percent: f64) -> Self {
        Self { numerator: (percent.clamp(0.0, 100.0) * 10_000.0).round() as u32, denominator: 1_000_000 }
    }

    /// Parts and whole: (1, 100) is one percent.
    pub fn parts(&self) -> (u32, u32) {
        (self.numerator, self.denominator)
    }

    /// The same share with at most this numerator (fault headers may only lower it).
    pub fn at_most(self, numerator: u32) -> Self {
        Self { numerator: self.numerator.min(numerator), ..self }
    }

    /// Whether a random value falls into the share (Envoy `ProtobufPercentHelper::evaluateFractionalPercent`).
    pub fn holds_for(&self, random: u64) -> bool {
        random % u64::from(self.denominator) < u64::from(self.numerator)
    }

    /// Draws.
    pub fn hit(&self, random: &mut Random) -> bool {
        match self.numerator {
            0 => false,
            n if n >= self.denominator => true,
            _ => self.holds_for(random.next()),
        }
    }
}
