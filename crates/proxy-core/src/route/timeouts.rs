use std::time::Duration;

use crate::headers::Headers;
use crate::route::Forward;
use crate::route::action::StreamDuration;
use crate::route::matching::is_grpc;

/// A stream that may last for nothing is over in the event loop's next turn, when what came with its head was passed on
/// (as Envoy's timers do).
const LEAST_STREAM_DURATION: Duration = Duration::from_millis(10);

/// The limits of one request towards its upstream; `None`: no limit.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Timeouts {
    /// From the end of the request to the end of the response, all tries included.
    pub global: Option<Duration>,
    /// The same for one try.
    pub per_try: Option<Duration>,
    /// Between two pieces of a response of one try.
    pub per_try_idle: Option<Duration>,
    /// How long a try's stream may last, if the request says so (`x-envoy-upstream-stream-duration-ms`).
    pub upstream_stream: Option<Duration>,
    /// The answer to a request that ran out of time: 504, or 204 for those that ask for it.
    pub status: u16,
    /// Whether `grpc-timeout` tells the upstream, too.
    grpc_header: bool,
    /// Whether `x-envoy-expected-rq-timeout-ms` may be set at all: what a trusted client sent stays.
    expected_header: bool,
}

impl Forward {
    /// The limits for a request, by route and headers (Envoy `FilterUtility::finalTimeout`). Headers that were used up
    /// are removed; `x-envoy-expected-rq-timeout-ms` is set unless `expected_header` is off.
    pub fn timeouts(
        &self,
        retry: Option<&crate::retry::RetryPolicy>,
        headers: &mut Headers,
        respect_expected: bool,
        expected_header: bool,
    ) -> Timeouts {
        let grpc = is_grpc(headers);
        let capped = self.stream_duration.is_none() && grpc && self.max_grpc_timeout.is_some();
        let mut timeouts = Timeouts {
            global: match (self.stream_duration, self.max_grpc_timeout) {
                // With `max_stream_duration` the listener keeps the time (`usingNewTimeouts`).
                (Some(_), _) => None,
                (None, Some(max)) if grpc => self.capped_grpc_timeout(max, headers),
                _ => self.timeout,
            },
            per_try: retry.and_then(|r| r.per_try_timeout),
            per_try_idle: retry.and_then(|r| r.per_try_idle_timeout),
            grpc_header: capped,
            expected_header: true,
            upstream_stream: None,
            status: 504,
        };
        if headers.remove("x-envoy-upstream-rq-timeout-alt-response") {
            timeouts.status = 204;
        }
        if headers.contains("x-envoy-upstream-stream-duration-ms") {
            timeouts.upstream_stream = milliseconds(headers, "x-envoy-upstream-stream-duration-ms");
            headers.remove("x-envoy-upstream-stream-duration-ms");
        }
        let expected = respect_expected.then(|| milliseconds(headers, "x-envoy-expected-rq-timeout-ms")).flatten();
        let expected_given = expected.is_some();
        timeouts.expected_header = !expected_given;
        if expected_given {
            timeouts.global = expected.map_or(timeouts.global, off_if_zero);
        } else if headers.contains("x-envoy-upstream-rq-timeout-ms") {
            if let Some(asked) = milliseconds(headers, "x-envoy-upstream-rq-timeout-ms") {
                timeouts.global = off_if_zero(asked);
            }
            headers.remove("x-envoy-upstream-rq-timeout-ms");
        }
        if headers.contains("x-envoy-upstream-rq-per-try-timeout-ms") {
            if let Some(asked) = milliseconds(headers, "x-envoy-upstream-rq-per-try-timeout-ms") {
                timeouts.per_try = off_if_zero(asked);
            }
            headers.remove("x-envoy-upstream-rq-per-try-timeout-ms");
        }
        if let (Some(per_try), Some(global)) = (timeouts.per_try, timeouts.global)
            && per_try >= global
        {
            timeouts.per_try = None;
        }
        if grpc
            && let Some(limits) = self.stream_duration
            && let Some(duration) = match limits.capped(headers) {
                // The upstream is told less than none is left.
                Some(asked) => Some(asked.saturating_sub(limits.grpc_header_offset.unwrap_or_default())),
                None => self.max_stream_duration(headers, None),
            }
        {
            headers.set("grpc-timeout", format!("{}m", duration.as_millis()).as_bytes());
        }
        timeouts.tell(Duration::ZERO, headers, expected_header, true);
        timeouts
    }

    fn capped_grpc_timeout(&self, max: Option<Duration>, headers: &Headers) -> Option<Duration> {
        let mut asked = grpc_timeout(headers).unwrap_or(Duration::ZERO);
        if let Some(offset) = self.grpc_timeout_offset.filter(|offset| *offset < asked) {
            asked -= offset;
        }
        match max {
            Some(max) if asked.is_zero() || asked > max => Some(max),
            _ => off_if_zero(asked),
        }
    }

    pub(super) fn max_stream_duration(&self, headers: &Headers, of_listener: Option<Duration>) -> Option<Duration> {
        let Some(duration) = self.stream_duration else { return of_listener };
        match duration.capped(headers) {
            Some(asked) => {
                let left = asked.saturating_sub(duration.grpc_header_offset.unwrap_or_default());
                Some(left.max(LEAST_STREAM_DURATION))
            }
            None => match duration.max {
                Some(max) => off_if_zero(max),
                None => of_listener,
            },
        }
    }
}

impl StreamDuration {
    /// What the client's `grpc-timeout` leaves, where it counts.
    fn capped(&self, headers: &Headers) -> Option<Duration> {
        let max = self.grpc_header_max?;
        let asked = grpc_timeout(headers)?;
        Some(if max.is_zero() { asked } else { asked.min(max) })
    }
}

impl Timeouts {
    /// Tells the upstream how long it has (Envoy `FilterUtility::setTimeoutHeaders`). Called again for each retry with
    /// the time that has passed.
    pub fn tell(&self, elapsed: Duration, headers: &mut Headers, expected_header: bool, grpc_header: bool) {
        let Some(mut expected) = self.per_try.or(self.global) else { return };
        if let Some(global) = self.global {
            expected = match global.checked_sub(elapsed) {
                // Zero would mean no limit.
                None | Some(Duration::ZERO) => Duration::from_millis(1),
                Some(left) => expected.min(left),
            };
        }
        let milliseconds = expected.as_millis().to_string();
        if expected_header && self.expected_header {
            headers.set("x-envoy-expected-rq-timeout-ms", milliseconds.as_bytes());
        }
        if grpc_header && self.grpc_header {
            headers.set("grpc-timeout", format!("{milliseconds}m").as_bytes());
        }
    }
}

fn off_if_zero(duration: Duration) -> Option<Duration> {
    (!duration.is_zero()).then_some(duration)
}

fn milliseconds(headers: &Headers, name: &str) -> Option<Duration> {
    headers.get_str(name)?.trim().parse().ok().map(Duration::from_millis)
}

/// The client's `grpc-timeout`: up to eight digits and a unit, in whole milliseconds (Envoy `Grpc::Common::getGrpcTimeout`).
pub fn grpc_timeout(headers: &Headers) -> Option<Duration> {
    let text = headers.get_str("grpc-timeout")?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    // Fractions of a millisecond are rounded up.
    let milliseconds = match unit {
        "H" => n * 3_600_000,
        "M" => n * 60_000,
        "S" => n * 1000,
        "m" => n,
        "u" => n.div_ceil(1000),
        "n" => n.div_ceil(1_000_000),
        _ => return None,
    };
    Some(Duration::from_millis(milliseconds))
}
