use std::fmt;

/// What went wrong with a stream (Envoy `StreamInfo::CoreResponseFlag`): a set that prints in the order in which the
/// flags were set.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct ResponseFlags {
    bits: u32,
    /// The flags by number plus one, six bits each, the first lowest. Ten fit; more than that never come together, and
    /// would only be missing in print.
    order: u64,
}

macro_rules! flags {
    ($($bit:literal $name:ident $short:literal $long:literal $doc:literal;)+) => {
        impl ResponseFlags {
            /// No flag.
            pub const NONE: Self = Self { bits: 0, order: 0 };
            $(#[doc = $doc] pub const $name: Self = Self { bits: 1 << $bit, order: $bit + 1 };)+

            /// Each flag with its short and long name, in the order in which Envoy prints them.
            pub const ALL: &'static [(Self, &'static str, &'static str)] = &[$((Self::$name, $short, $long)),+];
        }
    };
}

flags! {
    0 LOCAL_HEALTH_CHECK_FAILED "LH" "FailedLocalHealthCheck" "Local service failed its health check.";
    1 NO_HEALTHY_UPSTREAM "UH" "NoHealthyUpstream" "The cluster has no host to send to.";
    2 UPSTREAM_TIMEOUT "UT" "UpstreamRequestTimeout" "The upstream did not answer in time.";
    3 LOCAL_RESET "LR" "LocalReset" "We reset the connection.";
    4 UPSTREAM_RESET "UR" "UpstreamRemoteReset" "The upstream reset the stream.";
    5 UPSTREAM_CONNECTION_FAILURE "UF" "UpstreamConnectionFailure" "No connection to the upstream.";
    6 UPSTREAM_TERMINATION "UC" "UpstreamConnectionTermination" "The upstream closed the connection.";
    7 UPSTREAM_OVERFLOW "UO" "UpstreamOverflow" "A circuit breaker is open.";
    8 NO_ROUTE "NR" "NoRouteFound" "No route, or no filter chain.";
    9 FAULT_DELAY "DI" "DelayInjected" "A fault delayed the request.";
    10 FAULT_ABORT "FI" "FaultInjected" "A fault aborted the request.";
    11 RATE_LIMITED "RL" "RateLimited" "A local or remote rate limit.";
    12 UNAUTHORIZED "UAEX" "UnauthorizedExternalService" "The external authorization service denied.";
    13 RATE_LIMIT_SERVICE_ERROR "RLSE" "RateLimitServiceError" "The rate limit service failed.";
    14 DOWNSTREAM_TERMINATION "DC" "DownstreamConnectionTermination" "The client closed the connection.";
    15 UPSTREAM_RETRY_LIMIT "URX" "UpstreamRetryLimitExceeded" "All retries, or all connect attempts, are used up.";
    16 STREAM_IDLE_TIMEOUT "SI" "StreamIdleTimeout" "The stream was idle for too long.";
    17 INVALID_ENVOY_HEADERS "IH" "InvalidEnvoyRequestHeaders" "A strictly checked x-envoy header is malformed.";
    18 DOWNSTREAM_PROTOCOL_ERROR "DPE" "DownstreamProtocolError" "The client violated HTTP.";
    19 UPSTREAM_MAX_STREAM_DURATION "UMSDR" "UpstreamMaxStreamDurationReached" "The upstream stream took too long.";
    20 RESPONSE_FROM_CACHE "RFCF" "ResponseFromCacheFilter" "Answered from a cache.";
    21 NO_FILTER_CONFIG "NFCF" "NoFilterConfigFound" "A discovered filter configuration has not come.";
    22 DURATION_TIMEOUT "DT" "DurationTimeout" "The stream or connection took longer than allowed.";
    23 UPSTREAM_PROTOCOL_ERROR "UPE" "UpstreamProtocolError" "The upstream violated HTTP.";
    24 NO_CLUSTER "NC" "NoClusterFound" "The route's cluster does not exist.";
    25 OVERLOAD "OM" "OverloadManagerTerminated" "Refused because of overload.";
    26 DNS_FAILURE "DF" "DnsResolutionFailed" "The upstream's name did not resolve.";
    27 DROP_OVERLOAD "DO" "DropOverload" "Dropped as the endpoint policy says.";
    28 DOWNSTREAM_RESET "DR" "DownstreamRemoteReset" "The client reset the stream.";
    29 UNCONDITIONAL_DROP "UDO" "UnconditionalDropOverload" "Dropped as the endpoint policy says, all of it.";
}

impl ResponseFlags {
    /// One bit for each flag, as Envoy numbers them.
    pub fn bits(self) -> u32 {
        self.bits
    }

    /// Adds flags, behind those that are set already.
    pub fn insert(&mut self, flags: Self) {
        for number in flags.numbers() {
            let bit = 1 << (number - 1);
            if self.bits & bit == 0 {
                self.order |= number << (6 * self.bits.count_ones().min(10));
                self.bits |= bit;
            }
        }
    }

    /// The flags' numbers, counted from one, in order.
    fn numbers(self) -> impl Iterator<Item = u64> {
        (0..10).map(move |at| self.order >> (6 * at) & 0x3f).take_while(|number| *number != 0)
    }

    /// Whether all of these are set.
    pub fn contains(self, flags: Self) -> bool {
        self.bits & flags.bits == flags.bits
    }

    /// Whether any of these is set.
    pub fn intersects(self, flags: Self) -> bool {
        self.bits & flags.bits != 0
    }

    /// Whether none is set.
    pub fn is_empty(self) -> bool {
        self.bits == 0
    }

    /// The flag with this short name.
    pub fn from_short(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, short, _)| *short == name).map(|(flag, ..)| *flag)
    }

    /// Long names, comma-separated, `-` for none.
    pub fn long(self) -> String {
        let names: Vec<&str> = self.entries().map(|(_, _, long)| *long).collect();
        if names.is_empty() { "-".to_owned() } else { names.join(",") }
    }

    fn entries(self) -> impl Iterator<Item = &'static (Self, &'static str, &'static str)> {
        self.numbers().filter_map(|number| Self::ALL.get(number as usize - 1))
    }
}

impl std::ops::BitOr for ResponseFlags {
    type Output = Self;

    fn bitor(mut self, other: Self) -> Self {
        self.insert(other);
        self
    }
}

/// Short names, comma-separated, `-` for none.
impl fmt::Display for ResponseFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        for (i, (_, short, _)) in self.entries().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            f.write_str(short)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_print_as_envoy_prints_them() {
        let mut flags = ResponseFlags::NONE;
        assert_eq!(flags.to_string(), "-");
        flags.insert(ResponseFlags::UPSTREAM_RETRY_LIMIT | ResponseFlags::UPSTREAM_CONNECTION_FAILURE);
        flags.insert(ResponseFlags::UPSTREAM_RETRY_LIMIT);
        assert_eq!(flags.to_string(), "URX,UF");
        assert_eq!(flags.long(), "UpstreamRetryLimitExceeded,UpstreamConnectionFailure");
        let all = ResponseFlags::ALL.iter().fold(ResponseFlags::NONE, |all, (flag, ..)| all | *flag);
        assert!(all.contains(ResponseFlags::UNCONDITIONAL_DROP));
        assert_eq!(all.to_string().split(',').count(), 10);
        assert_eq!(ResponseFlags::from_short("NR"), Some(ResponseFlags::NO_ROUTE));
    }
}
