//! Retries: which outcomes are tried again, how often, and after which pause.

mod backoff;
mod conditions;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use backoff::{BackOff, RateLimitedBackOff};
pub use conditions::RetryOn;

use crate::any::Typed;
use crate::endpoints::Host;
use crate::headers::Headers;
use crate::matchers::{HeaderMatcher, header_matchers};
use crate::metadata::MetadataMatch;
use crate::pb;
use crate::random::Random;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::runtime::{Live, Runtime};
use crate::{constraints, fields};

/// A compiled `route.v3.RetryPolicy`.
#[derive(Debug)]
pub struct RetryPolicy {
    /// What is tried again.
    pub on: RetryOn,
    /// How often.
    pub num_retries: u32,
    /// For each try; `None`: no limit.
    pub per_try_timeout: Option<Duration>,
    /// Between pieces of a response of one try.
    pub per_try_idle_timeout: Option<Duration>,
    /// Statuses for `retriable-status-codes`.
    pub status_codes: Vec<u16>,
    /// Response headers for `retriable-headers`.
    pub headers: Box<[HeaderMatcher]>,
    /// Only requests that fulfil one of these are retried at all.
    pub request_headers: Box<[HeaderMatcher]>,
    /// The pause; `None`: the runtime's.
    pub backoff: Option<BackOff>,
    /// The pause that the upstream asks for.
    pub rate_limited_backoff: Option<RateLimitedBackOff>,
    /// Do not choose a host that was tried already.
    pub avoid_previous_hosts: bool,
    /// Do not choose canaries.
    pub omit_canary_hosts: bool,
    /// Do not choose hosts that one of these fits.
    pub omit_metadata: Vec<MetadataMatch>,
    /// How often a host is chosen anew because of these rules.
    pub host_selection_attempts: u32,
    /// Leave out priorities that were tried, every so many tries.
    pub previous_priorities: Option<u32>,
}

impl RetryPolicy {
    pub(crate) fn compile(policy: &pb::route::RetryPolicy) -> Compiled<Self> {
        use pb::route::retry_policy::{retry_host_predicate, retry_priority};
        refuse! {
            "retry_options_predicates": !policy.retry_options_predicates.is_empty(),
            "refresh_cluster_on_retry": policy.refresh_cluster_on_retry,
        }
        constraints::retry(policy)?;
        let mut avoid_previous_hosts = false;
        let mut omit_canary_hosts = false;
        let mut omit_metadata = Vec::new();
        for (i, predicate) in policy.retry_host_predicate.iter().enumerate() {
            if predicate.name.is_empty() {
                return Err(Invalid::new(format!("retry_host_predicate[{i}].name"), "is empty"));
            }
            let any = predicate.config_type.as_ref().map(|retry_host_predicate::ConfigType::TypedConfig(any)| any);
            let name = match any {
                Some(any) => Typed::open(Some(any))?.name,
                None => predicate.name.clone(),
            };
            match name.as_str() {
                "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                | "envoy.retry_host_predicates.previous_hosts" => avoid_previous_hosts = true,
                "envoy.extensions.retry.host.omit_canary_hosts.v3.OmitCanaryHostsPredicate"
                | "envoy.retry_host_predicates.omit_canary_hosts" => omit_canary_hosts = true,
                "envoy.extensions.retry.host.omit_host_metadata.v3.OmitHostMetadataConfig" => {
                    let config: pb::ext::retry::host::omit_host_metadata::v3::OmitHostMetadataConfig =
                        Typed::open(any)?.decode()?;
                    omit_metadata.extend(MetadataMatch::compile(config.metadata_match.as_ref()));
                }
                other => {
                    return Err(Invalid::new(
                        format!("retry_host_predicate[{i}]"),
                        format!("{other} is not supported"),
                    ));
                }
            }
        }
        let previous_priorities = match &policy.retry_priority {
            None => None,
            Some(priority) => {
                let any = priority.config_type.as_ref().map(|retry_priority::ConfigType::TypedConfig(any)| any);
                let typed = Typed::open(any).at("retry_priority")?;
                if typed.name != "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig" {
                    return Err(typed.unknown()).at("retry_priority");
                }
                let config: pb::ext::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig =
                    typed.decode()?;
                Some(u32::try_from(config.update_frequency).unwrap_or(0).max(1))
            }
        };
        let status_codes = policy.retriable_status_codes.iter().map(|c| u16::try_from(*c).unwrap_or(0)).collect();
        Ok(Self {
            on: RetryOn::parse(&policy.retry_on),
            num_retries: fields::uint(policy.num_retries.as_ref(), 1),
            per_try_timeout: fields::duration_or_off("per_try_timeout", policy.per_try_timeout.as_ref(), None)?,
            per_try_idle_timeout: fields::duration_or_off(
                "per_try_idle_timeout",
                policy.per_try_idle_timeout.as_ref(),
                None,
            )?,
            status_codes,
            headers: header_matchers("retriable_headers", &policy.retriable_headers)?,
            request_headers: header_matchers("retriable_request_headers", &policy.retriable_request_headers)?,
            backoff: policy.retry_back_off.as_ref().map(BackOff::of_retry).transpose().at("retry_back_off")?,
            rate_limited_backoff: policy
                .rate_limited_retry_back_off
                .as_ref()
                .map(RateLimitedBackOff::compile)
                .transpose()
                .at("rate_limited_retry_back_off")?,
            avoid_previous_hosts,
            omit_canary_hosts,
            omit_metadata,
            host_selection_attempts: u32::try_from(policy.host_selection_retry_max_attempts).unwrap_or(0).max(1),
            previous_priorities,
        })
    }
}

impl RetryPolicy {
    /// Whether a retry should rather go to another host than this one, after tries with `previous`.
    pub(crate) fn avoids(&self, host: &Host, previous: &[Arc<Host>]) -> bool {
        self.avoid_previous_hosts && previous.iter().any(|p| p.address == host.address)
            || self.omit_canary_hosts && host.is_canary()
            || self.omit_metadata.iter().any(|criteria| criteria.fits(&host.metadata, true))
    }
}

/// What the runtime says about retries.
#[derive(Debug)]
pub struct RetryRuntime {
    /// `upstream.use_retry`: the share of retries that take place.
    take_place: Live<(u32, u32)>,
    /// `upstream.base_retry_backoff_ms`, for policies without a pause of their own.
    base_ms: Live<u64>,
}

impl RetryRuntime {
    pub(crate) fn of(runtime: &Runtime) -> Self {
        Self {
            take_place: runtime.live("upstream.use_retry", (100, 100)),
            base_ms: runtime.live("upstream.base_retry_backoff_ms", 25),
        }
    }

    /// Whether a retry that is due takes place.
    pub fn allows(&self, random: &mut Random) -> bool {
        let (parts, whole) = self.take_place.get();
        parts >= whole || random.below(u64::from(whole)) < u64::from(parts)
    }

    fn backoff(&self) -> BackOff {
        // Below a millisecond is rounded up to one.
        let base = Duration::from_millis(self.base_ms.get().max(1));
        BackOff { base, max: base.saturating_mul(10) }
    }
}

impl Default for RetryRuntime {
    /// What holds when the runtime says nothing.
    fn default() -> Self {
        Self { take_place: Live::fixed((100, 100)), base_ms: Live::fixed(25) }
    }
}

/// Why an upstream stream ended without a response.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ResetReason {
    /// No connection.
    ConnectFailure,
    /// No connection in time.
    ConnectTimeout,
    /// The upstream reset the stream.
    RemoteReset,
    /// The upstream refused the stream (HTTP/2 `REFUSED_STREAM`, or beyond its GOAWAY).
    RemoteRefused,
    /// We reset the stream.
    LocalReset,
    /// A circuit breaker or the pool's queue is full.
    Overflow,
    /// The connection ended.
    ConnectionTermination,
    /// The upstream violated the protocol.
    ProtocolError,
    /// The try took too long.
    PerTryTimeout,
}

/// What to do next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RetryVerdict {
    /// Pass on what there is.
    No,
    /// Try again after the pause, if the circuit breaker gives a retry slot (else flag UO, as `Overflow`).
    Retry {
        /// The pause.
        after: Duration,
        /// The upstream said how long.
        asked: bool,
    },
    /// It should be tried again, but not more often: flag URX.
    LimitExceeded,
}

/// The retries of one request.
#[derive(Clone, Debug)]
pub struct RetryState {
    on: RetryOn,
    policy: Option<Arc<RetryPolicy>>,
    status_codes: Vec<u16>,
    header_names: Vec<String>,
    left: u32,
    pause: backoff::Pause,
    /// Tries again so far.
    pub retries: u32,
}

impl RetryState {
    /// Retries by the policy and by the request's `x-envoy-retry-on` and friends, which are removed.
    /// `None`: nothing is retried.
    pub fn new(policy: Option<&Arc<RetryPolicy>>, headers: &mut Headers, runtime: &RetryRuntime) -> Option<Self> {
        let mut on = policy.map_or(RetryOn::NONE, |p| p.on);
        for (header, grpc) in [("x-envoy-retry-on", false), ("x-envoy-retry-grpc-on", true)] {
            if let Some(asked) = headers.get_str(header) {
                on.insert(RetryOn::parse(asked).of_grpc(grpc));
            }
        }
        let mut left = policy.map_or(1, |p| p.num_retries);
        if let Some(asked) = headers.get_str("x-envoy-max-retries").and_then(|v| v.parse().ok()) {
            left = asked;
        }
        let mut status_codes: Vec<u16> = policy.map(|p| p.status_codes.clone()).unwrap_or_default();
        if let Some(asked) = headers.get_str("x-envoy-retriable-status-codes") {
            status_codes.extend(asked.split(',').filter_map(|c| c.trim().parse::<u16>().ok()));
        }
        let names = headers.get_str("x-envoy-retriable-header-names").unwrap_or_default();
        let header_names = names.split(',').map(|n| n.trim().to_ascii_lowercase()).filter(|n| !n.is_empty()).collect();
        // One by one, so that each look for a fixed name is a test of one bit.
        headers.remove("x-envoy-retry-on");
        headers.remove("x-envoy-retry-grpc-on");
        headers.remove("x-envoy-max-retries");
        headers.remove("x-envoy-hedge-on-per-try-timeout");
        headers.remove("x-envoy-retriable-header-names");
        headers.remove("x-envoy-retriable-status-codes");
        if let Some(policy) = policy
            && !policy.request_headers.is_empty()
            && !policy.request_headers.iter().any(|m| m.matches(headers))
        {
            return None;
        }
        if on.is_empty() {
            return None;
        }
        let backoff = policy.and_then(|p| p.backoff).unwrap_or_else(|| runtime.backoff());
        Some(Self {
            on,
            policy: policy.cloned(),
            status_codes,
            header_names,
            left,
            pause: backoff::Pause::new(backoff),
            retries: 0,
        })
    }

    /// Whether any retry is left, so that the request's body is worth keeping.
    pub fn may_retry(&self) -> bool {
        self.left > 0
    }

    /// After the head of a response (Envoy `RetryStateImpl::wouldRetryFromHeaders`). `now` is for headers that name a moment.
    pub fn on_response(&mut self, response: &Headers, random: &mut Random, now: SystemTime) -> RetryVerdict {
        let names = &self.header_names;
        let by_header = |headers: &Headers| {
            self.policy.as_ref().is_some_and(|p| p.headers.iter().any(|m| m.matches(headers)))
                || names.iter().any(|name| headers.contains(name))
        };
        if !self.on.wants_response(response, &self.status_codes, by_header) {
            return RetryVerdict::No;
        }
        let asked = self.policy.as_ref().and_then(|p| p.rate_limited_backoff.as_ref()?.interval(response, now));
        self.verdict(asked, random)
    }

    /// After a try that gave no response (Envoy `RetryStateImpl::wouldRetryFromReset`). `request_started`: bytes of the
    /// request may have reached the upstream.
    pub fn on_reset(&mut self, reason: ResetReason, request_started: bool, random: &mut Random) -> RetryVerdict {
        if self.on.wants_reset(reason, request_started) { self.verdict(None, random) } else { RetryVerdict::No }
    }

    fn verdict(&mut self, asked: Option<Duration>, random: &mut Random) -> RetryVerdict {
        if self.left == 0 {
            return RetryVerdict::LimitExceeded;
        }
        self.left -= 1;
        self.retries += 1;
        let after = match asked {
            // A jitter of up to half of it on top, so that not all clients come back at once.
            Some(least) => least + Duration::from_millis(random.below(least.as_millis() as u64 / 2)),
            None => self.pause.next(random),
        };
        RetryVerdict::Retry { after, asked: asked.is_some() }
    }
}

/// The HTTP status that stands for one of gRPC; `None` and unknown ones are failures (Envoy `Grpc::Utility::grpcToHttpStatus`).
pub fn http_status_of_grpc(status: Option<u32>) -> u16 {
    match status {
        Some(0) => 200,
        Some(1) => 499,
        Some(3 | 9 | 11) => 400,
        Some(4) => 504,
        Some(5) => 404,
        Some(6 | 10) => 409,
        Some(7) => 403,
        Some(8) => 429,
        Some(12) => 501,
        Some(14) => 503,
        Some(16) => 401,
        _ => 500,
    }
}

/// Envoy `Grpc::Utility::httpToGrpcStatus`.
pub fn grpc_status_of_http(status: u16) -> u32 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

#[cfg(test)]
mod tests;
