//! Reading protobuf's wrapped fields.

use std::time::Duration;

use envoy_api::pb::google::protobuf::UInt64Value;

use crate::pb;
use crate::rejected::{Compiled, Invalid};

/// A duration; negative ones and those beyond protobuf's range are refused.
pub(crate) fn duration(field: &str, value: Option<&pb::Duration>) -> Compiled<Option<Duration>> {
    let Some(value) = value else { return Ok(None) };
    let bad = || Invalid::new(field, format!("{}s {}ns is no valid duration", value.seconds, value.nanos));
    let seconds = u64::try_from(value.seconds).map_err(|_| bad())?;
    let nanos = u32::try_from(value.nanos).ok().filter(|n| *n < 1_000_000_000).ok_or_else(bad)?;
    Ok(Some(Duration::new(seconds, nanos)))
}

/// A duration of which zero means "off".
pub(crate) fn duration_or_off(
    field: &str,
    value: Option<&pb::Duration>,
    default: Option<Duration>,
) -> Compiled<Option<Duration>> {
    Ok(match duration(field, value)? {
        None => default,
        Some(Duration::ZERO) => None,
        some => some,
    })
}

/// A duration that must be above zero where it is given.
pub(crate) fn positive(field: &str, value: Option<&pb::Duration>, default: Duration) -> Compiled<Duration> {
    match duration(field, value)? {
        None => Ok(default),
        Some(Duration::ZERO) => Err(Invalid::new(field, "must be greater than 0")),
        Some(d) => Ok(d),
    }
}

pub(crate) fn uint(value: Option<&pb::UInt32Value>, default: u32) -> u32 {
    value.map_or(default, |v| v.value)
}

pub(crate) fn ulong(value: Option<&UInt64Value>, default: u64) -> u64 {
    value.map_or(default, |v| v.value)
}

pub(crate) fn flag(value: Option<&pb::BoolValue>, default: bool) -> bool {
    value.map_or(default, |v| v.value)
}

/// A wrapped percentage in 0..=100.
pub(crate) fn percent(field: &str, value: Option<&pb::kind::Percent>, default: f64) -> Compiled<f64> {
    match value.map(|v| v.value) {
        None => Ok(default),
        Some(p) if (0.0..=100.0).contains(&p) => Ok(p),
        Some(p) => Err(Invalid::new(field, format!("{p} is not between 0 and 100"))),
    }
}

/// Text that must not be empty.
pub(crate) fn required(field: &str, text: &str) -> Compiled<mesh_types::ArcStr> {
    if text.is_empty() { Err(Invalid::new(field, "is empty")) } else { Ok(text.into()) }
}

/// An enum's number to its value, or an error naming the number.
pub(crate) fn enumeration<E: TryFrom<i32>>(field: &str, value: i32) -> Compiled<E> {
    E::try_from(value).map_err(|_| Invalid::new(field, format!("{value} is no known value")))
}
