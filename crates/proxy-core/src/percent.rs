use crate::Random;
use crate::pb;
use crate::rejected::{Compiled, Invalid};
use crate::runtime::{Live, Runtime};

/// A share of cases (`FractionalPercent`), which the runtime may change if it has a key.
#[derive(Clone, Debug, PartialEq)]
pub struct Fraction(Live<(u32, u32)>);

/// In percent: `0.5 %`.
impl std::fmt::Display for Fraction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (numerator, denominator) = self.parts();
        write!(f, "{} %", f64::from(numerator) * 100.0 / f64::from(denominator))
    }
}

impl Fraction {
    /// Always.
    pub const ALL: Fraction = Fraction(Live::fixed((100, 100)));
    /// Never.
    pub const NONE: Fraction = Fraction(Live::fixed((0, 100)));

    pub(crate) fn compile(fraction: Option<&pb::kind::FractionalPercent>, default: Fraction) -> Compiled<Self> {
        use pb::kind::fractional_percent::DenominatorType;
        let Some(fraction) = fraction else { return Ok(default) };
        let denominator = match DenominatorType::try_from(fraction.denominator) {
            Ok(DenominatorType::Hundred) => 100,
            Ok(DenominatorType::TenThousand) => 10_000,
            Ok(DenominatorType::Million) => 1_000_000,
            Err(_) => return Err(Invalid::new("denominator", format!("{} is no known value", fraction.denominator))),
        };
        Ok(Self(Live::fixed((fraction.numerator, denominator))))
    }

    pub(crate) fn runtime(
        fraction: Option<&pb::core::RuntimeFractionalPercent>,
        default: Fraction,
        runtime: &Runtime,
    ) -> Compiled<Self> {
        let Some(fraction) = fraction else { return Ok(default) };
        Ok(Self::compile(fraction.default_value.as_ref(), default)?.under(&fraction.runtime_key, runtime))
    }

    /// The same share, unless the runtime has another one under this key.
    pub(crate) fn under(self, key: &str, runtime: &Runtime) -> Self {
        Self(runtime.live(key, self.parts()))
    }

    /// A plain percentage as share of a million.
    pub(crate) fn of_percent(percent: f64) -> Self {
        Self(Live::fixed(((percent.clamp(0.0, 100.0) * 10_000.0).round() as u32, 1_000_000)))
    }

    /// So many parts of a whole.
    pub(crate) fn of_parts(parts: (u32, u32)) -> Self {
        Self(Live::fixed(parts))
    }

    /// Parts and whole: (1, 100) is one percent.
    pub fn parts(&self) -> (u32, u32) {
        self.0.get()
    }

    /// The same share with at most this numerator (fault headers may only lower it).
    pub fn at_most(&self, most: u32) -> Self {
        let (numerator, denominator) = self.parts();
        Self(Live::fixed((numerator.min(most), denominator)))
    }

    /// Whether a random value falls into the share (Envoy `ProtobufPercentHelper::evaluateFractionalPercent`).
    pub fn holds_for(&self, random: u64) -> bool {
        let (numerator, denominator) = self.parts();
        random % u64::from(denominator) < u64::from(numerator)
    }

    /// Draws.
    pub fn hit(&self, random: &mut Random) -> bool {
        match self.parts() {
            (0, _) => false,
            (numerator, denominator) if numerator >= denominator => true,
            _ => self.holds_for(random.next()),
        }
    }
}
