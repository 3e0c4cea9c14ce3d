//! Active health checks: what is asked, and what the answers mean.

use std::time::Duration;

use bytes::Bytes;
use mesh_types::ArcStr;
use serde_json::{Map, Value};

use crate::any::Typed;
use crate::endpoints::{HealthFlag, Host};
use crate::fields;
use crate::matchers::StringMatcher;
use crate::metadata;
use crate::pb;
use crate::random::Random;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::route::HeaderOps;
use crate::runtime::{Live, Runtime};

/// A compiled `config.core.v3.HealthCheck`.
#[derive(Clone, Debug)]
pub struct HealthCheckConfig {
    /// What is asked.
    pub kind: CheckKind,
    /// Answer by then.
    pub timeout: Duration,
    /// Where changes of hosts' health are told.
    pub event_logs: Vec<ArcStr>,
    /// Failures that change nothing are told, too.
    pub log_failures: bool,
    /// And so are successes.
    pub log_successes: bool,
    /// Keep the connection between checks.
    pub reuse_connection: bool,
    /// Another port.
    pub alt_port: Option<u16>,
    /// The transport is chosen by this instead of by the host's metadata.
    pub transport: Option<Map<String, Value>>,
    /// Application protocols of TLS connections for checks.
    pub alpn: Vec<Vec<u8>>,
    intervals: Intervals,
    unhealthy_threshold: u32,
    healthy_threshold: u32,
}

#[derive(Clone, Debug)]
struct Intervals {
    initial_jitter: Duration,
    usual: Duration,
    jitter: Duration,
    jitter_percent: u32,
    no_traffic: Duration,
    no_traffic_healthy: Duration,
    unhealthy: Duration,
    unhealthy_edge: Duration,
    healthy_edge: Duration,
    /// The runtime's bounds in milliseconds (`health_check.min_interval`, `health_check.max_interval`).
    least: Live<u64>,
    most: Live<u64>,
}

/// What is asked.
#[derive(Clone, Debug)]
pub enum CheckKind {
    /// An HTTP request.
    Http(Box<HttpCheck>),
    /// Bytes over a connection; none: connecting is enough.
    Tcp {
        /// To send.
        send: Bytes,
        /// To be found in the answer, in this order.
        receive: Vec<Bytes>,
        /// A PROXY header of this version comes first.
        announced: Option<u8>,
    },
    /// gRPC's health service.
    Grpc {
        /// The service to ask about; may be empty.
        service: ArcStr,
        /// The authority to send; empty: the cluster's name.
        authority: ArcStr,
        /// More headers.
        headers: Box<HeaderOps>,
    },
}

/// An HTTP request as check.
#[derive(Clone, Debug)]
pub struct HttpCheck {
    /// Host of endpoints that have none of their own for checks; empty: the cluster's name.
    pub host: ArcStr,
    /// Path.
    pub path: ArcStr,
    /// Method.
    pub method: &'static str,
    /// Over HTTP/2.
    pub http2: bool,
    /// The request's body.
    pub send: Bytes,
    /// To be found in the first bytes of the answer, in this order.
    pub receive: Vec<Bytes>,
    /// So many of them.
    pub buffer: usize,
    /// More headers.
    pub headers: HeaderOps,
    /// `x-envoy-upstream-healthchecked-cluster` must be so.
    pub service_name: Option<StringMatcher>,
    /// The share of checks that look at it (`health_check.verify_cluster`).
    pub verify: Live<(u32, u32)>,
    expected: Vec<(u16, u16)>,
    retriable: Vec<(u16, u16)>,
}

impl HttpCheck {
    /// Whether a body says what is expected.
    pub fn matches(&self, body: &[u8]) -> bool {
        contains_in_order(body, &self.receive)
    }

    /// What a status means.
    pub fn judge(&self, status: u16) -> CheckResult {
        let within = |ranges: &[(u16, u16)]| ranges.iter().any(|(start, end)| (*start..*end).contains(&status));
        if within(&self.expected) {
            CheckResult::Passed
        } else if within(&self.retriable) {
            CheckResult::Retriable
        } else {
            CheckResult::Failed
        }
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CheckResult {
    /// Well.
    Passed,
    /// Well, but the host says that it is degraded (`x-envoy-degraded`).
    Degraded,
    /// The host said no: that counts at once.
    Failed,
    /// It said no in a way that counts once the threshold is reached.
    Retriable,
    /// No answer: counts once the threshold is reached.
    Unreachable,
    /// The same, because it took too long.
    TimedOut,
}

impl HealthCheckConfig {
    pub(crate) fn compile_all(checks: &[pb::core::HealthCheck], runtime: &Runtime) -> Compiled<Vec<Self>> {
        if checks.len() > 1 {
            return Err(Invalid::new("health_checks", "has several checks, which must have names"));
        }
        checks.iter().enumerate().map(|(i, c)| Self::compile(c, runtime).at_index("health_checks", i)).collect()
    }

    fn compile(check: &pb::core::HealthCheck, runtime: &Runtime) -> Compiled<Self> {
        use pb::core::health_check::HealthChecker as Kind;
        refuse! {
            "event_service": check.event_service.is_some(),
        }
        let required = |field: &str, value: &Option<pb::Duration>| {
            if value.is_none() {
                Err(Invalid::new(field, "is missing"))
            } else {
                fields::positive(field, value.as_ref(), Duration::ZERO)
            }
        };
        let usual = required("interval", &check.interval)?;
        let interval = |field: &str, value: &Option<pb::Duration>, default: Duration| {
            fields::positive(field, value.as_ref(), default)
        };
        let unhealthy = interval("unhealthy_interval", &check.unhealthy_interval, usual)?;
        let no_traffic = interval("no_traffic_interval", &check.no_traffic_interval, Duration::from_secs(60))?;
        let threshold = |field: &str, value: &Option<pb::UInt32Value>| {
            value.as_ref().map(|v| v.value).ok_or_else(|| Invalid::new(field, "is missing"))
        };
        Ok(Self {
            kind: match &check.health_checker {
                Some(Kind::HttpHealthCheck(http)) => {
                    CheckKind::Http(Box::new(http_check(http, runtime).at("http_health_check")?))
                }
                Some(Kind::TcpHealthCheck(tcp)) => {
                    let announced = tcp.proxy_protocol_config.as_ref().map(|header| header.version);
                    if announced.is_some_and(|version| !(0..=1).contains(&version)) {
                        return Err(Invalid::new(
                            "tcp_health_check.proxy_protocol_config.version",
                            "is no known value",
                        ));
                    }
                    CheckKind::Tcp {
                        announced: announced.map(|version| if version == 1 { 2 } else { 1 }),
                        send: tcp
                            .send
                            .as_ref()
                            .map(payload)
                            .transpose()
                            .at("tcp_health_check.send")?
                            .unwrap_or_default(),
                        receive: tcp
                            .receive
                            .iter()
                            .map(payload)
                            .collect::<Compiled<_>>()
                            .at("tcp_health_check.receive")?,
                    }
                }
                Some(Kind::GrpcHealthCheck(grpc)) => {
                    let headers = HeaderOps::compile(&grpc.initial_metadata, &[]).at("grpc_health_check")?;
                    CheckKind::Grpc {
                        headers: Box::new(headers),
                        service: grpc.service_name.as_str().into(),
                        authority: grpc.authority.as_str().into(),
                    }
                }
                Some(Kind::CustomHealthCheck(custom)) => {
                    return Err(Invalid::new("custom_health_check", format!("{} is not supported", custom.name)));
                }
                None => return Err(Invalid::new("health_checker", "is missing")),
            },
            timeout: required("timeout", &check.timeout)?,
            event_logs: event_logs(check)?,
            log_failures: check.always_log_health_check_failures,
            log_successes: check.always_log_health_check_success,
            reuse_connection: fields::flag(check.reuse_connection.as_ref(), true),
            alt_port: check.alt_port.as_ref().and_then(|p| u16::try_from(p.value).ok()),
            transport: check.transport_socket_match_criteria.as_ref().map(metadata::object),
            alpn: check.tls_options.iter().flat_map(|t| &t.alpn_protocols).map(|p| p.as_bytes().to_vec()).collect(),
            intervals: Intervals {
                initial_jitter: fields::duration("initial_jitter", check.initial_jitter.as_ref())?.unwrap_or_default(),
                usual,
                jitter: fields::duration("interval_jitter", check.interval_jitter.as_ref())?.unwrap_or_default(),
                jitter_percent: check.interval_jitter_percent,
                no_traffic,
                no_traffic_healthy: interval(
                    "no_traffic_healthy_interval",
                    &check.no_traffic_healthy_interval,
                    no_traffic,
                )?,
                unhealthy,
                unhealthy_edge: interval("unhealthy_edge_interval", &check.unhealthy_edge_interval, unhealthy)?,
                healthy_edge: interval("healthy_edge_interval", &check.healthy_edge_interval, usual)?,
                least: runtime.live("health_check.min_interval", 0),
                most: runtime.live("health_check.max_interval", u64::MAX),
            },
            unhealthy_threshold: threshold("unhealthy_threshold", &check.unhealthy_threshold)?,
            healthy_threshold: threshold("healthy_threshold", &check.healthy_threshold)?,
        })
    }
}

/// The file of the older `event_log_path` and those of `event_logger`; Envoy writes to all of them.
#[allow(deprecated)]
fn event_logs(check: &pb::core::HealthCheck) -> Compiled<Vec<ArcStr>> {
    let old = Some(&check.event_log_path).filter(|path| !path.is_empty());
    let mut paths: Vec<ArcStr> = old.map(|path| path.as_str().into()).into_iter().collect();
    for (i, logger) in check.event_logger.iter().enumerate() {
        let typed = Typed::open(logger.typed_config.as_ref()).at_index("event_logger", i)?;
        if typed.name != "envoy.extensions.health_check.event_sinks.file.v3.HealthCheckEventFileSink" {
            return Err(typed.unknown()).at_index("event_logger", i);
        }
        let sink: pb::ext::health_check::event_sinks::file::v3::HealthCheckEventFileSink = typed.decode()?;
        paths.push(fields::required("event_log_path", &sink.event_log_path).at_index("event_logger", i)?);
    }
    Ok(paths)
}

/// Each pattern after the one before, anything in between.
pub fn contains_in_order(mut text: &[u8], patterns: &[Bytes]) -> bool {
    patterns.iter().all(|pattern| match text.windows(pattern.len().max(1)).position(|part| part == &pattern[..]) {
        Some(at) => {
            text = &text[at + pattern.len()..];
            true
        }
        None => pattern.is_empty(),
    })
}

/// TCP payloads are hex where they are text.
fn payload(payload: &pb::core::health_check::Payload) -> Compiled<Bytes> {
    use pb::core::health_check::payload::Payload;
    match &payload.payload {
        Some(Payload::Binary(bytes)) => Ok(Bytes::copy_from_slice(bytes)),
        Some(Payload::Text(hex)) => {
            let bad = || Invalid::new("text", format!("{hex:?} is no hex"));
            if hex.len() % 2 != 0 || !hex.is_ascii() {
                return Err(bad());
            }
            let pairs = (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16));
            pairs.collect::<Result<Vec<u8>, _>>().map(Bytes::from).map_err(|_| bad())
        }
        None => Err(Invalid::new("payload", "is missing")),
    }
}

fn http_check(check: &pb::core::health_check::HttpHealthCheck, runtime: &Runtime) -> Compiled<HttpCheck> {
    let send = check.send.as_ref().map(payload).transpose().at("send")?.unwrap_or_default();
    let receive = check.receive.iter().map(payload).collect::<Compiled<Vec<_>>>().at("receive")?;
    // 0: all of it.
    let buffer = match check.response_buffer_size.as_ref().map_or(1024, |size| size.value) {
        0 => usize::MAX,
        size => usize::try_from(size).unwrap_or(usize::MAX),
    };
    if receive.iter().map(Bytes::len).sum::<usize>() > buffer {
        return Err(Invalid::new("receive", "is longer than response_buffer_size"));
    }
    if check.send.is_some() && matches!(check.method, 0..=2 | 5 | 8) {
        return Err(Invalid::new("send", "has no place in a request of this method"));
    }
    for (field, list) in
        [("expected_statuses", &check.expected_statuses), ("retriable_statuses", &check.retriable_statuses)]
    {
        if let Some(r) = list.iter().find(|r| r.start >= r.end || r.start < 100 || r.end > 600) {
            return Err(Invalid::new(field, format!("{}..{} is no range of statuses", r.start, r.end)));
        }
    }
    let ranges =
        |ranges: &[pb::kind::Int64Range]| ranges.iter().map(|r| (r.start as u16, r.end as u16)).collect::<Vec<_>>();
    Ok(HttpCheck {
        host: check.host.as_str().into(),
        path: fields::required("path", &check.path)?,
        method: match check.method {
            0 | 1 => "GET",
            2 => "HEAD",
            3 => "POST",
            4 => "PUT",
            5 => "DELETE",
            7 => "OPTIONS",
            8 => "TRACE",
            9 => "PATCH",
            other => return Err(Invalid::new("method", format!("{other} is not supported"))),
        },
        http2: check.codec_client_type == 1,
        send,
        receive,
        buffer,
        headers: HeaderOps::compile(&check.request_headers_to_add, &check.request_headers_to_remove)?,
        verify: runtime.live("health_check.verify_cluster", (100, 100)),
        service_name: check.service_name_matcher.as_ref().map(StringMatcher::compile).transpose()?,
        expected: if check.expected_statuses.is_empty() { vec![(200, 201)] } else { ranges(&check.expected_statuses) },
        retriable: ranges(&check.retriable_statuses),
    })
}

/// The checks of one host (Envoy `HealthCheckerImplBase::ActiveHealthCheckSession`).
#[derive(Clone, Debug)]
pub struct HostChecks {
    first: bool,
    passed: u32,
    failed: u32,
}

/// What a check changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transition {
    /// Nothing.
    Unchanged,
    /// The host counts as healthy now.
    Healthy,
    /// The host counts as unhealthy now.
    Unhealthy,
    /// Nothing yet, but more checks like this will.
    Pending,
}

impl Default for HostChecks {
    fn default() -> Self {
        Self { first: true, passed: 0, failed: 0 }
    }
}

impl HostChecks {
    /// Takes a result, sets the host's flags, and says what changed and when to ask again.
    pub fn on_result(
        &mut self,
        config: &HealthCheckConfig,
        host: &Host,
        result: CheckResult,
        cluster_has_traffic: bool,
        random: &mut Random,
    ) -> (Transition, Duration) {
        let first = std::mem::take(&mut self.first);
        let state = &host.state;
        state.set_checked();
        state.set(HealthFlag::PendingActive, false);
        let was_unhealthy = state.has(HealthFlag::FailedActive);
        let mut transition = Transition::Unchanged;
        let passed = matches!(result, CheckResult::Passed | CheckResult::Degraded);
        if passed {
            self.failed = 0;
            if was_unhealthy {
                self.passed += 1;
                // The first check decides at once.
                if first || self.passed >= config.healthy_threshold {
                    self.passed = 0;
                    for flag in [HealthFlag::ActiveTimeout, HealthFlag::Excluded, HealthFlag::FailedActive] {
                        state.set(flag, false);
                    }
                    transition = Transition::Healthy;
                } else {
                    transition = Transition::Pending;
                }
            }
            state.set(HealthFlag::DegradedActive, result == CheckResult::Degraded);
        } else {
            self.passed = 0;
            if !was_unhealthy {
                self.failed += 1;
                if result == CheckResult::Failed || self.failed >= config.unhealthy_threshold {
                    self.failed = 0;
                    state.set(HealthFlag::FailedActive, true);
                    transition = Transition::Unhealthy;
                } else {
                    transition = Transition::Pending;
                }
            }
            if state.has(HealthFlag::FailedActive) {
                state.set(HealthFlag::ActiveTimeout, result == CheckResult::TimedOut);
            }
        }
        let intervals = &config.intervals;
        // Edges are the time in which a change is in the making.
        let base = match (cluster_has_traffic, passed, transition == Transition::Pending) {
            (true, true, false) => intervals.usual,
            (true, true, true) => intervals.healthy_edge,
            (true, false, false) => intervals.unhealthy,
            (true, false, true) => intervals.unhealthy_edge,
            // A cluster that was never used is asked less often.
            (false, true, false) => intervals.no_traffic_healthy,
            (false, _, _) => intervals.no_traffic,
        };
        (transition, intervals.jittered(base, random))
    }

    /// Whether no check has ended yet.
    pub fn is_first(&self) -> bool {
        self.first
    }

    /// The host said in an answer to somebody that it fails.
    pub fn on_own_word(&mut self) {
        self.passed = 0;
        self.failed = 0;
    }

    /// The pause before the first check.
    pub fn initial_delay(&self, config: &HealthCheckConfig, random: &mut Random) -> Duration {
        Duration::from_millis(random.below(config.intervals.initial_jitter.as_millis() as u64 + 1))
    }
}

impl Intervals {
    fn jittered(&self, base: Duration, random: &mut Random) -> Duration {
        let percent = (base.as_millis() as u64).saturating_mul(self.jitter_percent.into()) / 100;
        let jitter = random.below(self.jitter.as_millis() as u64 + 1) + random.below(percent + 1);
        let whole = u64::try_from(base.as_millis()).unwrap_or(u64::MAX).saturating_add(jitter);
        // Never at once, whatever the runtime says.
        Duration::from_millis(whole.min(self.most.get()).max(self.least.get()).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoints::Health;
    use serde_json::json;

    #[test]
    fn patterns_in_order() {
        let patterns = [Bytes::from_static(b"ab"), Bytes::from_static(b"cd")];
        assert!(contains_in_order(b"xxab--cd", &patterns));
        assert!(!contains_in_order(b"cdab", &patterns));
        assert!(contains_in_order(b"", &[]));
    }

    #[test]
    fn thresholds_and_intervals() {
        let config = json!({"name": "c", "type": "STATIC",
            "health_checks": [{"timeout": "1s", "interval": "5s", "unhealthy_threshold": 2, "healthy_threshold": 2, "unhealthy_interval": "2s",
                "unhealthy_edge_interval": "1s", "healthy_edge_interval": "3s", "no_traffic_healthy_interval": "70s",
                "http_health_check": {"path": "/h", "expected_statuses": [{"start": 200, "end": 300}], "retriable_statuses": [{"start": 503, "end": 504}]}}],
            "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": [
                {"endpoint": {"address": {"socket_address": {"address": "10.0.0.1", "port_value": 80}}}}]}]}});
        let bytes = envoy_api::json::from_json(envoy_api::type_url::CLUSTER, &config).unwrap();
        let message = prost::Message::decode(bytes.as_slice()).unwrap();
        let cluster = crate::Cluster::compile(&message, &crate::Options::default()).unwrap();
        let config = &cluster.health_checks[0];
        let CheckKind::Http(http) = &config.kind else { panic!() };
        assert_eq!(
            [http.judge(204), http.judge(503), http.judge(404)],
            [CheckResult::Passed, CheckResult::Retriable, CheckResult::Failed]
        );
        let host = cluster.endpoints.hosts().next().unwrap();
        // Not proven yet.
        assert_eq!(host.health(), Health::Unhealthy);
        let mut checks = HostChecks::default();
        let mut random = Random::new(1);
        let mut step = |result| {
            let (transition, next) = checks.on_result(config, host, result, true, &mut random);
            (transition, next.as_secs(), host.state.describe())
        };
        let flags = |flags: &str| flags.to_owned();
        assert_eq!(step(CheckResult::Passed), (Transition::Healthy, 5, flags("healthy")));
        assert_eq!(step(CheckResult::Unreachable), (Transition::Pending, 1, flags("healthy")));
        let failed = flags("/failed_active_hc/active_hc_timeout");
        assert_eq!(step(CheckResult::TimedOut), (Transition::Unhealthy, 2, failed.clone()));
        assert_eq!(step(CheckResult::Passed), (Transition::Pending, 3, failed));
        assert_eq!(step(CheckResult::Passed), (Transition::Healthy, 5, flags("healthy")));
        assert_eq!(step(CheckResult::Failed), (Transition::Unhealthy, 2, flags("/failed_active_hc")));
        let mut unused = |result| checks.on_result(config, host, result, false, &mut Random::new(1)).1.as_secs();
        assert_eq!(
            [unused(CheckResult::Failed), unused(CheckResult::Passed), unused(CheckResult::Passed)],
            [60, 60, 70]
        );
    }
}
