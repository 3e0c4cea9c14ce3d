use std::time::Duration;

use mesh_types::ArcStr;

use crate::fields;
use crate::headers::Headers;
use crate::matchers::{HeaderMatcher, header_matchers};
use crate::pb;
use crate::percent::Fraction;
use crate::random::Random;
use crate::rejected::{At, Compiled, Invalid};
use crate::runtime::{Live, Runtime, RuntimeValue};

/// Delays and aborts on purpose (`filters.http.fault.v3.HTTPFault`).
#[derive(Clone, Debug)]
pub struct Fault {
    delay: Option<(DelaySource, Fraction)>,
    abort: Option<(AbortSource, Fraction)>,
    rate_limit: Option<(RateSource, Fraction)>,
    upstream_cluster: Option<ArcStr>,
    headers: Box<[HeaderMatcher]>,
    downstream_nodes: Vec<ArcStr>,
    max_active: Live<u64>,
    runtime: Runtime,
    /// Written into dynamic metadata with every delay and abort, under the filter's name.
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// Faults are counted for each client that names itself, too.
    pub counts_clients: bool,
    /// Body of an abort.
    pub abort_body: Option<Box<str>>,
}

#[derive(Clone, Debug)]
enum DelaySource {
    /// Milliseconds.
    Fixed(Live<u64>),
    Header,
}

#[derive(Clone, Debug)]
enum AbortSource {
    Http(Live<u64>),
    Grpc(Live<u64>),
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
    /// Faults that do not happen because there are too many under way.
    pub overflow: u64,
}

/// What the runtime has for the client that a request names, `fault.http.CLIENT.*`, whose keys no configuration knows.
struct OfClient<'r>(Option<(&'r Runtime, &'r str)>);

impl OfClient<'_> {
    fn get<T: RuntimeValue>(&self, key: &str) -> Option<T> {
        self.0.and_then(|(runtime, client)| runtime.get(&format!("fault.http.{client}.{key}")))
    }

    /// A number, which stands over the filter's.
    fn number(&self, key: &str, otherwise: u64) -> u64 {
        self.get(key).unwrap_or(otherwise)
    }

    /// Whether a share is hit: the client's, if it has one.
    fn hit(&self, share: &Fraction, key: &str, random: &mut Random) -> bool {
        match self.get(key) {
            Some(parts) => Fraction::of_parts(parts).hit(random),
            None => share.hit(random),
        }
    }
}

impl Fault {
    pub(super) fn compile(fault: &pb::http_filter::fault::v3::HttpFault, runtime: &Runtime) -> Compiled<Self> {
        use pb::ext::filters::common::fault::v3::fault_delay::FaultDelaySecifier as Delay;
        use pb::ext::filters::common::fault::v3::fault_rate_limit::LimitType;
        use pb::http_filter::fault::v3::fault_abort::ErrorType;
        // The runtime's own names, where the configuration gives no others.
        let key = |given: &str, own: &'static str| if given.is_empty() { own.to_owned() } else { given.to_owned() };
        let share = |percentage: &Option<pb::kind::FractionalPercent>, given: &str, own: &'static str| {
            Ok(Fraction::compile(percentage.as_ref(), Fraction::NONE)?.under(&key(given, own), runtime))
        };
        let number = |value: u64, given: &str, own: &'static str| runtime.live(&key(given, own), value);
        let delay = match &fault.delay {
            None => None,
            Some(delay) => {
                let source = match &delay.fault_delay_secifier {
                    Some(Delay::FixedDelay(d)) => {
                        let delay = fields::positive("delay.fixed_delay", Some(d), Duration::ZERO)?.as_millis() as u64;
                        DelaySource::Fixed(number(
                            delay,
                            &fault.delay_duration_runtime,
                            "fault.http.delay.fixed_duration_ms",
                        ))
                    }
                    Some(Delay::HeaderDelay(_)) => DelaySource::Header,
                    None => return Err(Invalid::new("delay", "is empty")),
                };
                Some((
                    source,
                    share(&delay.percentage, &fault.delay_percent_runtime, "fault.http.delay.fixed_delay_percent")
                        .at("delay.percentage")?,
                ))
            }
        };
        let abort = match &fault.abort {
            None => None,
            Some(abort) => {
                let source = match &abort.error_type {
                    Some(ErrorType::HttpStatus(status)) => {
                        let status = u16::try_from(*status).ok().filter(|s| (200..600).contains(s));
                        let status = status.ok_or_else(|| Invalid::new("abort.http_status", "is no status"))?;
                        let status = u64::from(status);
                        AbortSource::Http(number(
                            status,
                            &fault.abort_http_status_runtime,
                            "fault.http.abort.http_status",
                        ))
                    }
                    Some(ErrorType::GrpcStatus(status)) => AbortSource::Grpc(number(
                        (*status).into(),
                        &fault.abort_grpc_status_runtime,
                        "fault.http.abort.grpc_status",
                    )),
                    Some(ErrorType::HeaderAbort(_)) => AbortSource::Header,
                    None => return Err(Invalid::new("abort", "is empty")),
                };
                Some((
                    source,
                    share(&abort.percentage, &fault.abort_percent_runtime, "fault.http.abort.abort_percent")
                        .at("abort.percentage")?,
                ))
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
                let given = &fault.response_rate_limit_percent_runtime;
                let share = share(&limit.percentage, given, "fault.http.rate_limit.response_percent");
                Some((source, share.at("response_rate_limit.percentage")?))
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
            max_active: number(
                fault.max_active_faults.as_ref().map_or(u64::MAX, |v| v.value.into()),
                &fault.max_active_faults_runtime,
                "fault.http.max_active_faults",
            ),
            runtime: runtime.clone(),
            metadata: fault.filter_metadata.as_ref().map(crate::json_object).unwrap_or_default(),
            counts_clients: !fault.disable_downstream_cluster_stats,
            abort_body: body.map(Box::from),
        })
    }

    /// What it may do to requests that it touches, and to how many of them, in words.
    pub fn describe(&self) -> Vec<String> {
        let of = |fraction: &Fraction| format!("{fraction} of requests");
        let delay = self.delay.as_ref().map(|(source, fraction)| match source {
            DelaySource::Fixed(delay) => format!("delays {} by {:?}", of(fraction), Duration::from_millis(delay.get())),
            DelaySource::Header => format!("delays {} as their headers say", of(fraction)),
        });
        let abort = self.abort.as_ref().map(|(source, fraction)| match source {
            AbortSource::Http(status) => format!("answers {} with {}", of(fraction), status.get()),
            AbortSource::Grpc(status) => format!("answers {} with gRPC status {}", of(fraction), status.get()),
            AbortSource::Header => format!("answers {} as their headers say", of(fraction)),
        });
        delay.into_iter().chain(abort).collect()
    }

    /// Whether there are as many faults under way as there may be.
    fn is_full(&self, active: u64) -> bool {
        active >= self.max_active.get()
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
        if !self.touches(headers, cluster) {
            return FaultDecision::default();
        }
        let number = |name: &str| headers.get_str(name).and_then(|v| v.trim().parse::<u64>().ok());
        let client = headers.get_str("x-envoy-downstream-service-cluster");
        let client = OfClient(client.map(|client| (&self.runtime, client)));
        // Percentages of headers may only lower the configured ones.
        let share = |fraction: &Fraction, name: &str| match number(name) {
            Some(asked) => fraction.at_most(u32::try_from(asked).unwrap_or(u32::MAX)),
            None => fraction.clone(),
        };
        let delay = self.delay.as_ref().and_then(|(source, fraction)| match source {
            DelaySource::Fixed(delay) => {
                let hit = client.hit(fraction, "delay.fixed_delay_percent", random);
                let delay = Duration::from_millis(client.number("delay.fixed_duration_ms", delay.get()));
                (hit && !delay.is_zero()).then_some(delay)
            }
            DelaySource::Header => {
                let delay = number("x-envoy-fault-delay-request")?;
                let share = share(fraction, "x-envoy-fault-delay-request-percentage");
                let hit = client.hit(&share, "delay.fixed_delay_percent", random);
                let delay = Duration::from_millis(client.number("delay.fixed_duration_ms", delay));
                (hit && !delay.is_zero()).then_some(delay)
            }
        });
        let abort = self.abort.as_ref().and_then(|(source, fraction)| match source {
            AbortSource::Http(status) => {
                let status = client.number("abort.http_status", status.get());
                let status = u16::try_from(status).unwrap_or(u16::MAX);
                let hit = client.hit(fraction, "abort.abort_percent", random);
                hit.then_some(Abort::Http(status.clamp(200, 599)))
            }
            AbortSource::Grpc(status) => {
                let status = client.number("abort.grpc_status", status.get());
                let hit = client.hit(fraction, "abort.abort_percent", random);
                hit.then_some(Abort::Grpc(u32::try_from(status).unwrap_or(u32::MAX)))
            }
            AbortSource::Header => {
                let http = number("x-envoy-fault-abort-request").filter(|s| (200..600).contains(s));
                let grpc = || number("x-envoy-fault-abort-grpc-request").and_then(|s| u32::try_from(s).ok());
                let abort = http.map(|s| Abort::Http(s as u16)).or_else(|| grpc().map(Abort::Grpc))?;
                let share = share(fraction, "x-envoy-fault-abort-request-percentage");
                client.hit(&share, "abort.abort_percent", random).then_some(abort)
            }
        });
        let rate_limit_kib = self.rate_limit.as_ref().and_then(|(source, fraction)| match source {
            RateSource::Fixed(limit) => fraction.hit(random).then_some(*limit),
            RateSource::Header => {
                let limit = number("x-envoy-fault-throughput-response").filter(|l| *l > 0)?;
                share(fraction, "x-envoy-fault-throughput-response-percentage").hit(random).then_some(limit)
            }
        });
        if self.is_full(active) {
            let faults = [delay.is_some(), abort.is_some(), rate_limit_kib.is_some()];
            return FaultDecision { overflow: faults.into_iter().map(u64::from).sum(), ..FaultDecision::default() };
        }
        FaultDecision { delay, abort, rate_limit_kib, overflow: 0 }
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
        let fault = Fault::compile(&config, &Runtime::default()).unwrap();
        let mut random = Random::new(3);
        let hits =
            (0..4000).filter(|_| fault.decide(&Headers::new(), Some("a"), &mut random, 0).abort.is_some()).count();
        assert!((900..1100).contains(&hits), "{hits}");
        assert_eq!(fault.decide(&Headers::new(), Some("b"), &mut random, 0), FaultDecision::default());
    }
}
