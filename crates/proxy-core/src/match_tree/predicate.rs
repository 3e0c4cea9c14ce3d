use std::net::IpAddr;

use envoy_api::Message;
use envoy_api::xds::CelMatcher;

use crate::Options;
use crate::any::Typed;
use crate::cel::{self, Expression};
use crate::cidr::Cidr;
use crate::hash::xx64;
use crate::match_tree::MAX_DEPTH;
use crate::match_tree::input::{Found, Input, MatchData, Place};
use crate::matchers::{StringMatcher, ValueMatcher};
use crate::pb;
use crate::pb::ext::matching::input_matchers as custom;
use crate::pb::xds_matcher::{self as proto, matcher::matcher_list as list};
use crate::percent::Fraction;
use crate::rejected::{At, Compiled, Invalid};

/// A condition (`Matcher.MatcherList.Predicate`).
#[derive(Clone, Debug)]
pub(super) enum Predicate {
    Single(Input, Condition),
    Any(Box<[Predicate]>),
    All(Box<[Predicate]>),
    Not(Box<Predicate>),
}

/// A condition on what an input has.
#[derive(Clone, Debug)]
pub(super) enum Condition {
    Text(StringMatcher),
    /// Of a number that the text is hashed to.
    Hash {
        threshold: u32,
        modulo: u32,
        seed: u64,
    },
    /// Likewise, of so many of all.
    Share(Fraction, u64),
    Ranges(Box<[Cidr]>),
    Value {
        value: ValueMatcher,
        invert: bool,
    },
    Expression {
        expression: Box<Expression>,
        of_answer: bool,
    },
}

impl Predicate {
    pub(super) fn compile(
        predicate: &list::Predicate,
        place: Place,
        options: &Options,
        depth: usize,
    ) -> Compiled<Self> {
        use list::predicate::MatchType;
        if depth > MAX_DEPTH {
            return Err(Invalid::new("", "is nested too deeply"));
        }
        let several = |list: &list::predicate::PredicateList| -> Compiled<Box<[Self]>> {
            if list.predicate.len() < 2 {
                return Err(Invalid::new("predicate", "must have at least two items"));
            }
            let all = list.predicate.iter().enumerate();
            all.map(|(i, p)| Self::compile(p, place, options, depth + 1).at_index("predicate", i)).collect()
        };
        Ok(match &predicate.match_type {
            None => return Err(Invalid::new("match_type", "is missing")),
            Some(MatchType::OrMatcher(all)) => Self::Any(several(all).at("or_matcher")?),
            Some(MatchType::AndMatcher(all)) => Self::All(several(all).at("and_matcher")?),
            Some(MatchType::NotMatcher(inner)) => {
                Self::Not(Box::new(Self::compile(inner, place, options, depth + 1).at("not_matcher")?))
            }
            Some(MatchType::SinglePredicate(single)) => Self::single(single, place, options).at("single_predicate")?,
        })
    }

    fn single(single: &list::predicate::SinglePredicate, place: Place, options: &Options) -> Compiled<Self> {
        use list::predicate::single_predicate::Matcher;
        let input = Input::compile(single.input.as_ref(), place).at("input")?;
        let condition = match &single.matcher {
            None => return Err(Invalid::new("matcher", "is missing")),
            Some(Matcher::ValueMatch(text)) => Condition::Text(string_matcher(text).at("value_match")?),
            Some(Matcher::CustomMatch(extension)) => {
                let typed = Typed::open(extension.typed_config.as_ref()).at("custom_match")?;
                Condition::compile(&typed, options).at("custom_match")?
            }
        };
        // Expressions look at all attributes, everything else at texts (Envoy `SingleFieldMatcher::create`).
        match (&input, &condition) {
            (Input::Attributes, Condition::Expression { .. }) => {}
            (Input::Attributes, _) => return Err(Invalid::new("input", "Unsupported data input type: cel_data_input")),
            (_, Condition::Expression { .. }) => {
                return Err(Invalid::new("input", "Unsupported data input type: string"));
            }
            _ => {}
        }
        Ok(Self::Single(input, condition))
    }

    /// Whether it holds; `None`: that is not known yet (Envoy `FieldMatcher::match`).
    pub(super) fn holds(&self, data: &MatchData<'_>) -> Option<bool> {
        match self {
            Self::Single(input, condition) => condition.holds(&input.find(data)),
            Self::Not(inner) => inner.holds(data).map(|holds| !holds),
            Self::All(all) => all.iter().map(|p| p.holds(data)).find(|held| *held != Some(true)).unwrap_or(Some(true)),
            Self::Any(any) => {
                let mut unknown = false;
                for predicate in any {
                    match predicate.holds(data) {
                        Some(true) => return Some(true),
                        Some(false) => {}
                        None => unknown = true,
                    }
                }
                (!unknown).then_some(false)
            }
        }
    }
}

/// Both APIs have the same message; that of xDS must name its engine.
fn string_matcher(matcher: &proto::StringMatcher) -> Compiled<StringMatcher> {
    use proto::string_matcher::MatchPattern;
    if let Some(MatchPattern::SafeRegex(regex)) = &matcher.match_pattern
        && regex.engine_type.is_none()
    {
        return Err(Invalid::new("safe_regex.engine_type", "is missing"));
    }
    StringMatcher::compile(&converted(matcher)?)
}

/// A message of another package with the same fields.
fn converted<M: Message + Default>(message: &impl Message) -> Compiled<M> {
    M::decode(message.encode_to_vec().as_slice()).map_err(|e| Invalid::new("", e.to_string()))
}

impl Condition {
    fn compile(typed: &Typed<'_>, options: &Options) -> Compiled<Self> {
        if typed.name == "xds.type.matcher.v3.CelMatcher" {
            let config: CelMatcher = typed.decode()?;
            let expression = expression(config.expr_match.as_ref()).at("expr_match")?;
            return Ok(Self::Expression { of_answer: expression.reads("response"), expression: Box::new(expression) });
        }
        Ok(match typed.name.strip_prefix("envoy.extensions.matching.input_matchers.").unwrap_or_default() {
            "consistent_hashing.v3.ConsistentHashing" => {
                let config: custom::consistent_hashing::v3::ConsistentHashing = typed.decode()?;
                if config.modulo == 0 {
                    return Err(Invalid::new("modulo", "must be greater than 0"));
                }
                Self::Hash { threshold: config.threshold, modulo: config.modulo, seed: config.seed }
            }
            "runtime_fraction.v3.RuntimeFraction" => {
                let config: custom::runtime_fraction::v3::RuntimeFraction = typed.decode()?;
                let Some(fraction) = config.runtime_fraction.as_ref().filter(|f| f.default_value.is_some()) else {
                    return Err(Invalid::new("runtime_fraction", "has no default"));
                };
                Self::Share(Fraction::runtime(Some(fraction), Fraction::NONE, &options.runtime)?, config.seed)
            }
            "ip.v3.Ip" => {
                let config: custom::ip::v3::Ip = typed.decode()?;
                crate::fields::required("stat_prefix", &config.stat_prefix)?;
                if config.cidr_ranges.is_empty() {
                    return Err(Invalid::new("cidr_ranges", "is empty"));
                }
                let ranges = config.cidr_ranges.iter().enumerate();
                Self::Ranges(ranges.map(|(i, r)| Cidr::compile(r).at_index("cidr_ranges", i)).collect::<Compiled<_>>()?)
            }
            "metadata.v3.Metadata" => {
                let config: custom::metadata::v3::Metadata = typed.decode()?;
                let value = config.value.as_ref().ok_or_else(|| Invalid::new("value", "is missing"))?;
                Self::Value { value: ValueMatcher::compile(value).at("value")?, invert: config.invert }
            }
            _ => return Err(typed.unknown()),
        })
    }

    fn holds(&self, found: &Found<'_>) -> Option<bool> {
        let text = match found {
            Found::NotYet => return None,
            Found::Text(text) => Some(text),
            Found::Missing | Found::Value(_) | Found::Attributes(_) => None,
        };
        Some(match self {
            Self::Value { value, invert } => match found {
                Found::Value(found) => value.matches(*found) != *invert,
                _ => false,
            },
            Self::Expression { expression, of_answer } => match found {
                Found::Attributes(cx) => match expression.holds(cx) {
                    // What the answer brings may still make it hold.
                    false if *of_answer && cx.response.is_none() => return None,
                    holds => holds,
                },
                _ => false,
            },
            // Nothing fulfils no condition.
            Self::Text(condition) => text.is_some_and(|text| condition.matches(text)),
            Self::Hash { threshold, modulo, seed } => {
                text.is_some_and(|text| xx64(text, *seed) % u64::from(*modulo) >= u64::from(*threshold))
            }
            Self::Share(share, seed) => text.is_some_and(|text| share.holds_for(xx64(text, *seed))),
            Self::Ranges(ranges) => {
                let ip = text.and_then(|text| std::str::from_utf8(text).ok()?.parse::<IpAddr>().ok());
                ip.is_some_and(|ip| ranges.iter().any(|range| range.contains(ip)))
            }
        })
    }
}

/// The expression of whichever field Envoy takes: the newer ones, checked ones first; never text.
fn expression(message: Option<&pb::xds_type::CelExpression>) -> Compiled<Expression> {
    use pb::xds_type::cel_expression::ExprSpecifier;
    let unset = || Invalid::new("", "failed to create an expression: CEL expression not set.");
    let message = message.ok_or_else(unset)?;
    let newer = |expr: Option<&envoy_api::pb::cel::expr::Expr>| expr.map(converted).transpose();
    let expression: Option<pb::cel::Expr> = if let Some(checked) = &message.cel_expr_checked {
        newer(checked.expr.as_ref())?
    } else if let Some(parsed) = &message.cel_expr_parsed {
        newer(parsed.expr.as_ref())?
    } else {
        match message.expr_specifier.as_ref().ok_or_else(unset)? {
            ExprSpecifier::ParsedExpr(parsed) => parsed.expr.clone(),
            ExprSpecifier::CheckedExpr(checked) => checked.expr.clone(),
        }
    };
    Expression::of_message(&expression.unwrap_or_default(), cel::Options::default())
}
