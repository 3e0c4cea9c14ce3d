use std::time::Duration;

use mesh_types::ArcStr;

use crate::fields;
use crate::headers::Headers;
use crate::matchers::{HeaderMatcher, header_matchers};
use crate::pb;
use crate::percent::Fraction;
use crate::random::Random;
use crate::rejected::{At, Compiled, Invalid};

/// Delays and aborts on purpose (`filters.http.fault.v3.HTTPFault`).
#[derive(Clone, Debug, Default)]
pub struct Fault {
    delay: Option<(DelaySource, Fraction)>,
    abort: Option<(AbortSource, Fraction)>,
    rate_limit: Option<(RateSource, Fraction)>,
    upstream_cluster: Option<ArcStr>,
    headers: Box<[HeaderMatcher]>,
    downstream_nodes: Vec<ArcStr>,
    max_active: Option<u64>,
    /// Body of an abort.
    pub abort_body: Option<Box<str>>,
}

#[derive(Clone, Copy, Debug)]
enum DelaySource {
    Fixed(Duration),
    Header,
}

#[derive(Clone, Copy, Debug)]
enum AbortSource {
    Http(u16),
    Grpc(u32),
    Header,
}

#[derive(Clone, Copy, Debug)]
enum RateSource {
    Fixed(u64),
    Header,
}

/// How a request is aborted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Abort {
    /// With this status.
    Http(u16),
    /// With this gRPC status.
    Grpc(u32),
}

/// What is done to a request: first the delay, then the abort.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FaultDecision {
    /// Wait.
    pub delay: Option<Duration>,
    /// Answer.
    pub abort: Option<Abort>,
    /// Send the response no faster than so many KiB a second.
    pub rate_limit_kib: Option<u64>,
}

impl Fault {
    pub(super) fn compile(fault: &pb::http_filter::fault::v3::HttpFault) -> Compiled<Self> {
        use pb::ext::filters::common::fault::v3::fault_delay::FaultDelaySecifier as Delay;
        use pb::ext::filters::common::fault::v3::fault_rate_limit::LimitType;
        use pb::http_filter::fault::v3::fault_abort::ErrorType;
        let share =
            |percentage: &Option<pb::kind::FractionalPercent>| Fraction::compile(percentage.as_ref(), Fraction::NONE);
        let delay = match &fault.delay {
            None => None,
            Some(delay) => {
                let source = match &delay.fault_delay_secifier {
                    Some(Delay::FixedDelay(d)) => {
                        DelaySource::Fixed(fields::positive("delay.fixed_delay", Some(d), Duration::ZERO)?)
                    }
                    Some(Delay::HeaderDelay(_)) => DelaySource::Header,
                    None => return Err(Invalid::new("delay", "is empty")),
                };
                Some((source, share(&delay.percentage).at("delay.percentage")?))
            }
        };
        let abort = match &fault.abort {
            None => None,
            Some(abort) => {
                let source = match &abort.error_type {
                    Some(ErrorType::HttpStatus(status)) => {
                        let status = u16::try_from(*status).ok().filter(|s| (200..600).contains(s));
                        AbortSource::Http(status.ok_or_else(|| Invalid::new("abort.http_status", "is no status"))?)
                    }
                    Some(ErrorType::GrpcStatus(status)) => AbortSource::Grpc(*status),
                    Some(ErrorType::HeaderAbort(_)) => AbortSource::Header,
                    None => return Err(Invalid::new("abort", "is empty")),
                };
                Some((source, share(&abort.percentage).at("abort.percentage")?))
            }
        };
        let rate_limit = match &fault.response_rate_limit {
            None => None,
            Some(limit) => {
                let source = match &limit.limit_type {
                    Some(LimitType::FixedLimit(fixed)) => RateSource::Fixed(fixed.limit_kbps.max(1)),
                    Some(LimitType::HeaderLimit(_)) => RateSource::Header,
                    None => return Err(Invalid::new("response_rate_limit", "is empty")),
                };
                Some((source, share(&limit.percentage).at("response_rate_limit.percentage")?))
            }
        };
        let body = fault.abort.as_ref().map(|a| a.response_body.as_str()).filter(|b| !b.is_empty());
        Ok(Self {
            delay,
            abort,
            rate_limit,
            upstream_cluster: (!fault.upstream_cluster.is_empty()).then(|| fault.upstream_cluster.as_str().into()),
            headers: header_matchers("headers", &fault.headers)?,
            downstream_nodes: fault.downstream_nodes.iter().map(|n| n.as_str().into()).collect(),
            max_active: fault.max_active_faults.as_ref().map(|v| v.value.into()),
            abort_body: body.map(Box::from),
        })
    }

    /// What it may do to requests that it touches, and to how many of them, in words.
    pub fn describe(&self) -> Vec<String> {
        let of = |fraction: Fraction| format!("{fraction} of requests");
        let delay = self.delay.map(|(source, fraction)| match source {
            DelaySource::Fixed(delay) => format!("delays {} by {delay:?}", of(fraction)),
            DelaySource::Header => format!("delays {} as their headers say", of(fraction)),
        });
        let abort = self.abort.map(|(source, fraction)| match source {
            AbortSource::Http(status) => format!("answers {} with {status}", of(fraction)),
            AbortSource::Grpc(status) => format!("answers {} with gRPC status {status}", of(fraction)),
            AbortSource::Header => format!("answers {} as their headers say", of(fraction)),
        });
        delay.into_iter().chain(abort).collect()
    }

    /// Whether there are as many faults under way as there may be.
    pub fn is_full(&self, active: u64) -> bool {
        self.max_active.is_some_and(|max| active >= max)
    }

    /// Whether requests like this one are meant at all, before any chance.
    pub fn touches(&self, headers: &Headers, cluster: Option<&str>) -> bool {
        let node = || headers.get_str("x-envoy-downstream-service-node");
        self.upstream_cluster.as_deref().is_none_or(|wanted| Some(wanted) == cluster)
            && (self.downstream_nodes.is_empty()
                || node().is_some_and(|n| self.downstream_nodes.iter().any(|d| **d == *n)))
            && self.headers.iter().all(|m| m.matches(headers))
    }

    /// Decides for a request that goes to `cluster` (Envoy `FaultFilter::decodeHeaders`). `active`: faults under way.
    pub fn decide(&self, headers: &Headers, cluster: Option<&str>, random: &mut Random, active: u64) -> FaultDecision {
        if !self.touches(headers, cluster) || self.is_full(active) {
            return FaultDecision::default();
        }
        let number = |name: &str| headers.get_str(name).and_then(|v| v.trim().parse::<u64>().ok());
        // Percentages of headers may only lower the configured ones.
        let share = |fraction: Fraction, name: &str| match number(name) {
            Some(asked) => fraction.at_most(u32::try_from(asked).unwrap_or(u32::MAX)),
            None => fraction,
        };
        let delay = self.delay.and_then(|(source, fraction)| match source {
            DelaySource::Fixed(delay) => fraction.hit(random).then_some(delay),
            DelaySource::Header => {
                let delay = number("x-envoy-fault-delay-request").map(Duration::from_millis)?;
                (share(fraction, "x-envoy-fault-delay-request-percentage").hit(random) && !delay.is_zero())
                    .then_some(delay)
            }
        });
        let abort = self.abort.and_then(|(source, fraction)| match source {
            AbortSource::Http(status) => fraction.hit(random).then_some(Abort::Http(status)),
            AbortSource::Grpc(status) => fraction.hit(random).then_some(Abort::Grpc(status)),
            AbortSource::Header => {
                let http = number("x-envoy-fault-abort-request").filter(|s| (200..600).contains(s));
                let grpc = || number("x-envoy-fault-abort-grpc-request").and_then(|s| u32::try_from(s).ok());
                let abort = http.map(|s| Abort::Http(s as u16)).or_else(|| grpc().map(Abort::Grpc))?;
                share(fraction, "x-envoy-fault-abort-request-percentage").hit(random).then_some(abort)
            }
        });
        let rate_limit_kib = self.rate_limit.and_then(|(source, fraction)| match source {
            RateSource::Fixed(limit) => fraction.hit(random).then_some(limit),
            RateSource::Header => {
                let limit = number("x-envoy-fault-throughput-response").filter(|l| *l > 0)?;
                share(fraction, "x-envoy-fault-throughput-response-percentage").hit(random).then_some(limit)
            }
        });
        FaultDecision { delay, abort, rate_limit_kib }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_apply_to_their_share_and_requests() {
        let config = pb::http_filter::fault::v3::HttpFault {
            abort: Some(pb::http_filter::fault::v3::FaultAbort {
                percentage: Some(pb::kind::FractionalPercent { numerator: 25, denominator: 0 }),
                error_type: Some(pb::http_filter::fault::v3::fault_abort::ErrorType::HttpStatus(418)),
                ..Default::default()
            }),
            upstream_cluster: "a".into(),
            ..Default::default()
        };
        let fault = Fault::compile(&config).unwrap();
        let mut random = Random::new(3);
        let hits =
            (0..4000).filter(|_| fault.decide(&Headers::new(), Some("a"), &mut random, 0).abort.is_some()).count();
        assert!((900..1100).contains(&hits), "{hits}");
        assert_eq!(fault.decide(&Headers::new(), Some("b"), &mut random, 0), FaultDecision::default());
    }
}
