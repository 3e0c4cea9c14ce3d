//! Retries (istiod `route/retry`).

use std::sync::LazyLock;

use envoy_api::pb::envoy::extensions::retry::{
    host::previous_hosts::v3::PreviousHostsPredicate, priority::previous_priorities::v3::PreviousPrioritiesConfig,
};
use envoy_api::route::{
    RetryPolicy,
    retry_policy::{RetryBackOff, RetryHostPredicate, RetryPriority, retry_host_predicate, retry_priority},
};
use istio_api::virtual_service::{HttpRetry, is_http_status};

use crate::proto::{any, duration, u32_value};

const DEFAULT_ON: &str = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";

/// Hosts that were tried are not tried again.
fn other_hosts() -> Vec<RetryHostPredicate> {
    // Most routes have it.
    static PREDICATE: LazyLock<RetryHostPredicate> = LazyLock::new(|| RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(retry_host_predicate::ConfigType::TypedConfig(any(&PreviousHostsPredicate {}))),
    });
    vec![PREDICATE.clone()]
}

/// Retries of a route. With consistent hashing the same host may be tried again: there is no other.
pub(super) fn outbound(policy: Option<&HttpRetry>, is_hashed: bool) -> Option<RetryPolicy> {
    let mut out = RetryPolicy {
        num_retries: u32_value(2),
        retry_on: DEFAULT_ON.to_owned(),
        host_selection_retry_max_attempts: 5,
        retry_host_predicate: if is_hashed { Vec::new() } else { other_hosts() },
        ..RetryPolicy::default()
    };
    let Some(policy) = policy else { return Some(out) };
    let attempts = u32::try_from(policy.attempts).ok().filter(|n| *n > 0)?;
    out.num_retries = u32_value(attempts);
    if !policy.retry_on.is_empty() {
        (out.retry_on, out.retriable_status_codes) = conditions(&policy.retry_on);
    }
    out.per_try_timeout = policy.per_try_timeout.map(duration);
    if let Some(ignore) = policy.retry_ignore_previous_hosts {
        out.retry_host_predicate = if ignore { other_hosts() } else { Vec::new() };
    }
    if policy.retry_remote_localities == Some(true) {
        let config = PreviousPrioritiesConfig { update_frequency: 2 };
        out.retry_priority = Some(RetryPriority {
            name: "envoy.retry_priorities.previous_priorities".to_owned(),
            config_type: Some(retry_priority::ConfigType::TypedConfig(any(&config))),
        });
    }
    out.retry_back_off =
        policy.backoff.map(|b| RetryBackOff { base_interval: Some(duration(b)), ..RetryBackOff::default() });
    Some(out)
}

/// Retries towards the proxy's own application: only what it cannot have seen.
pub(super) fn inbound(policy: Option<&HttpRetry>) -> Option<RetryPolicy> {
    let mut out = RetryPolicy {
        num_retries: u32_value(2),
        retry_on: "reset-before-request".to_owned(),
        ..RetryPolicy::default()
    };
    let Some(policy) = policy else { return Some(out) };
    out.num_retries = u32_value(u32::try_from(policy.attempts).ok().filter(|n| *n > 0)?);
    if !policy.retry_on.is_empty() {
        (out.retry_on, out.retriable_status_codes) = conditions(&policy.retry_on);
    }
    out.retry_back_off =
        policy.backoff.map(|b| RetryBackOff { base_interval: Some(duration(b)), ..RetryBackOff::default() });
    Some(out)
}

/// Status codes among the conditions become a list of their own.
fn conditions(text: &str) -> (String, Vec<u32>) {
    let (mut names, mut codes) = (Vec::new(), Vec::new());
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        match part.parse::<u16>().ok().filter(|code| is_http_status(*code)) {
            Some(code) => codes.push(u32::from(code)),
            None => names.push(part),
        }
    }
    let mut names = names.join(",");
    if !codes.is_empty() && !names.contains("retriable-status-codes") {
        names.push_str(",retriable-status-codes");
    }
    (names, codes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_codes_are_taken_out() {
        let (on, codes) = conditions("gateway-error, 503,reset");
        assert_eq!((on.as_str(), codes), ("gateway-error,reset,retriable-status-codes", vec![503]));
    }
}
