use crate::headers::Headers;
use crate::retry::ResetReason;

/// What is tried again; a set (`x-envoy-retry-on` and `x-envoy-retry-grpc-on` together).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RetryOn(u32);

/// Names by bit.
const NAMES: [&str; 17] = [
    "5xx",
    "gateway-error",
    "connect-failure",
    "retriable-4xx",
    "refused-stream",
    "cancelled",
    "deadline-exceeded",
    "resource-exhausted",
    "unavailable",
    "retriable-status-codes",
    "reset",
    "retriable-headers",
    "envoy-ratelimited",
    "internal",
    "http3-post-connect-failure",
    "reset-before-request",
    "connect-failure-before-request",
];

const FIVE_XX: u32 = 1 << 0;
const GATEWAY_ERROR: u32 = 1 << 1;
const CONNECT_FAILURE: u32 = 1 << 2;
const RETRIABLE_4XX: u32 = 1 << 3;
const REFUSED_STREAM: u32 = 1 << 4;
const CANCELLED: u32 = 1 << 5;
const DEADLINE_EXCEEDED: u32 = 1 << 6;
const RESOURCE_EXHAUSTED: u32 = 1 << 7;
const UNAVAILABLE: u32 = 1 << 8;
const STATUS_CODES: u32 = 1 << 9;
const RESET: u32 = 1 << 10;
const HEADERS: u32 = 1 << 11;
const RATE_LIMITED: u32 = 1 << 12;
const INTERNAL: u32 = 1 << 13;
const RESET_BEFORE_REQUEST: u32 = 1 << 15;

/// Conditions on gRPC answers.
const GRPC: u32 = CANCELLED | DEADLINE_EXCEEDED | RESOURCE_EXHAUSTED | UNAVAILABLE | INTERNAL;

/// As configured: `connect-failure,refused-stream`.
impl std::fmt::Display for RetryOn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> =
            NAMES.iter().enumerate().filter(|(i, _)| self.0 & 1 << i != 0).map(|(_, n)| *n).collect();
        f.write_str(&names.join(","))
    }
}

impl RetryOn {
    /// Nothing.
    pub const NONE: Self = Self(0);

    /// Reads a comma-separated list; unknown names are left out, as in Envoy.
    pub fn parse(text: &str) -> Self {
        let bits = text.split(',').filter_map(|name| NAMES.iter().position(|known| *known == name.trim()));
        Self(bits.fold(0, |all, bit| all | 1 << bit))
    }

    /// Whether all names of a list are those of conditions on gRPC answers, or all of others.
    pub(crate) fn are_known(text: &str, grpc: bool) -> bool {
        text.split(',').all(|name| {
            let bit = NAMES.iter().position(|known| *known == name.trim());
            bit.is_some_and(|bit| (GRPC & 1 << bit != 0) == grpc)
        })
    }

    /// Of these, the conditions on gRPC answers, or all others.
    pub(super) fn of_grpc(self, grpc: bool) -> Self {
        Self(self.0 & if grpc { GRPC } else { !GRPC })
    }

    /// Adds others.
    pub fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn has(self, bits: u32) -> bool {
        self.0 & bits != 0
    }

    pub(super) fn wants_response(
        self,
        response: &Headers,
        status_codes: &[u16],
        by_header: impl Fn(&Headers) -> bool,
    ) -> bool {
        // A rate limit of another Envoy would only be made worse.
        if response.contains("x-envoy-ratelimited") {
            return self.has(RATE_LIMITED);
        }
        let status = response.status().unwrap_or(0);
        let grpc = || match response.get_str("grpc-status") {
            Some("1") => self.has(CANCELLED),
            Some("4") => self.has(DEADLINE_EXCEEDED),
            Some("8") => self.has(RESOURCE_EXHAUSTED),
            Some("13") => self.has(INTERNAL),
            Some("14") => self.has(UNAVAILABLE),
            _ => false,
        };
        self.has(FIVE_XX) && (500..600).contains(&status)
            || self.has(GATEWAY_ERROR) && (502..=504).contains(&status)
            || self.has(RETRIABLE_4XX) && status == 409
            || self.has(STATUS_CODES) && status_codes.contains(&status)
            || self.has(HEADERS) && by_header(response)
            || grpc()
    }

    pub(super) fn wants_reset(self, reason: ResetReason, request_started: bool) -> bool {
        // An overflow would only be made worse.
        if reason == ResetReason::Overflow {
            return false;
        }
        let connect = matches!(reason, ResetReason::ConnectFailure | ResetReason::ConnectTimeout);
        // A reset ends as a 503, so it counts as such.
        self.has(RESET | FIVE_XX | GATEWAY_ERROR)
            || self.has(RESET_BEFORE_REQUEST) && !request_started
            || self.has(REFUSED_STREAM) && reason == ResetReason::RemoteRefused
            || self.has(CONNECT_FAILURE) && connect
    }
}
