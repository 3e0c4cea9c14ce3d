//! Outlier detection: hosts that answer badly get no traffic for a while.
//!
//! Workers count results on the host's atomics ([`OutlierConfig::report`]); when a threshold is reached, and at each
//! interval, the one [`OutlierDetector`] of the cluster decides.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::endpoints::{Endpoints, HealthFlag, Host};
use crate::fields;
use crate::pb;
use crate::random::Random;
use crate::rejected::{Compiled, Invalid, refuse};

/// A compiled `config.cluster.v3.OutlierDetection`.
#[derive(Clone, Debug, PartialEq)]
pub struct OutlierConfig {
    /// Time between looks at all hosts.
    pub interval: Duration,
    base_ejection: Duration,
    max_ejection: Duration,
    jitter: Duration,
    max_percent: u32,
    always_one: bool,
    consecutive_5xx: u32,
    consecutive_gateway: u32,
    consecutive_local: u32,
    enforcing: Enforcing,
    split: bool,
    success_rate: RateRule,
    /// Thousandths.
    stdev_factor: f64,
    failure_percentage: RateRule,
    failure_threshold: f64,
    uneject_on_active_check: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct Enforcing {
    consecutive_5xx: u32,
    consecutive_gateway: u32,
    consecutive_local: u32,
    success_rate: u32,
    local_success_rate: u32,
    failure_percentage: u32,
    local_failure_percentage: u32,
}

#[derive(Clone, Debug, PartialEq)]
struct RateRule {
    min_hosts: usize,
    min_requests: u32,
}

/// How a request, or a try to connect, ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// The host answered with this status.
    Status(u16),
    /// It did not take the connection.
    ConnectFailed,
    /// It did not take the connection in time.
    ConnectTimeout,
    /// It did not answer in time.
    Timeout,
    /// It broke the stream off.
    Reset,
    /// It took a connection on which requests follow, which are judged by themselves.
    ConnectedForRequests,
    /// It took a connection that carries no HTTP.
    Connected,
}

/// Why a host is ejected (names as in Envoy's event log).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// `CONSECUTIVE_5XX`.
    Consecutive5xx,
    /// `CONSECUTIVE_GATEWAY_FAILURE`.
    ConsecutiveGateway,
    /// `CONSECUTIVE_LOCAL_ORIGIN_FAILURE`.
    ConsecutiveLocal,
    /// `SUCCESS_RATE`.
    SuccessRate,
    /// `SUCCESS_RATE_LOCAL_ORIGIN`.
    LocalSuccessRate,
    /// `FAILURE_PERCENTAGE`.
    FailurePercentage,
    /// `FAILURE_PERCENTAGE_LOCAL_ORIGIN`.
    LocalFailurePercentage,
}

/// What the detector did.
#[derive(Clone, Debug)]
pub enum Event {
    /// A host was ejected, or would have been (`enforced` is false).
    Ejected {
        /// The host.
        host: Arc<Host>,
        /// Why.
        cause: Cause,
        /// It really gets no traffic.
        enforced: bool,
    },
    /// A host should have been ejected, but too many are already.
    Overflow {
        /// The host.
        host: Arc<Host>,
        /// Why.
        cause: Cause,
    },
    /// A host is back.
    Returned {
        /// The host.
        host: Arc<Host>,
    },
}

impl OutlierConfig {
    pub(crate) fn compile(config: &pb::cluster::OutlierDetection) -> Compiled<Self> {
        refuse! {
            "monitors": !config.monitors.is_empty(),
            "detect_degraded_hosts": fields::flag(config.detect_degraded_hosts.as_ref(), false),
        }
        let uint = |value: &Option<pb::UInt32Value>, default: u32| fields::uint(value.as_ref(), default);
        let percent = |field: &str, value: &Option<pb::UInt32Value>, default: u32| match uint(value, default) {
            p if p <= 100 => Ok(p),
            p => Err(Invalid::new(field, format!("{p} is above 100"))),
        };
        let base_ejection =
            fields::positive("base_ejection_time", config.base_ejection_time.as_ref(), Duration::from_secs(30))?;
        Ok(Self {
            interval: fields::positive("interval", config.interval.as_ref(), Duration::from_secs(10))?,
            base_ejection,
            max_ejection: fields::positive(
                "max_ejection_time",
                config.max_ejection_time.as_ref(),
                base_ejection.max(Duration::from_secs(300)),
            )?,
            jitter: fields::duration("max_ejection_time_jitter", config.max_ejection_time_jitter.as_ref())?
                .unwrap_or_default(),
            max_percent: percent("max_ejection_percent", &config.max_ejection_percent, 10)?,
            always_one: fields::flag(config.always_eject_one_host.as_ref(), false),
            consecutive_5xx: uint(&config.consecutive_5xx, 5),
            consecutive_gateway: uint(&config.consecutive_gateway_failure, 5),
            consecutive_local: uint(&config.consecutive_local_origin_failure, 5),
            enforcing: Enforcing {
                consecutive_5xx: percent("enforcing_consecutive_5xx", &config.enforcing_consecutive_5xx, 100)?,
                consecutive_gateway: percent(
                    "enforcing_consecutive_gateway_failure",
                    &config.enforcing_consecutive_gateway_failure,
                    0,
                )?,
                consecutive_local: percent(
                    "enforcing_consecutive_local_origin_failure",
                    &config.enforcing_consecutive_local_origin_failure,
                    100,
                )?,
                success_rate: percent("enforcing_success_rate", &config.enforcing_success_rate, 100)?,
                local_success_rate: percent(
                    "enforcing_local_origin_success_rate",
                    &config.enforcing_local_origin_success_rate,
                    100,
                )?,
                failure_percentage: percent("enforcing_failure_percentage", &config.enforcing_failure_percentage, 0)?,
                local_failure_percentage: percent(
                    "enforcing_failure_percentage_local_origin",
                    &config.enforcing_failure_percentage_local_origin,
                    0,
                )?,
            },
            split: config.split_external_local_origin_errors,
            success_rate: RateRule {
                min_hosts: uint(&config.success_rate_minimum_hosts, 5) as usize,
                min_requests: uint(&config.success_rate_request_volume, 100),
            },
            stdev_factor: f64::from(uint(&config.success_rate_stdev_factor, 1900)) / 1000.0,
            failure_percentage: RateRule {
                min_hosts: uint(&config.failure_percentage_minimum_hosts, 5) as usize,
                min_requests: uint(&config.failure_percentage_request_volume, 50),
            },
            failure_threshold: f64::from(percent(
                "failure_percentage_threshold",
                &config.failure_percentage_threshold,
                85,
            )?),
            uneject_on_active_check: fields::flag(config.successful_active_health_check_uneject_host.as_ref(), true),
        })
    }

    /// Counts a result (Envoy `DetectorHostMonitorImpl::putResult`). Causes mean: tell the detector, in this order.
    pub fn report(&self, host: &Host, outcome: Outcome) -> [Option<Cause>; 2] {
        match outcome {
            Outcome::Status(status) => self.external(host, status),
            Outcome::Reset if self.split => self.external(host, 500),
            Outcome::Connected | Outcome::ConnectedForRequests if self.split => [self.local(host, true), None],
            _ if self.split => [self.local(host, false), None],
            // Without the split, local failures count as the status they end in.
            Outcome::ConnectFailed | Outcome::Reset => self.external(host, 503),
            Outcome::ConnectTimeout | Outcome::Timeout => self.external(host, 504),
            Outcome::Connected => self.external(host, 200),
            Outcome::ConnectedForRequests => [None, None],
        }
    }

    fn external(&self, host: &Host, status: u16) -> [Option<Cause>; 2] {
        let counters = &host.state.outlier;
        counters.window_total.fetch_add(1, Ordering::Relaxed);
        if !(500..600).contains(&status) {
            counters.window_success.fetch_add(1, Ordering::Relaxed);
            counters.consecutive_5xx.store(0, Ordering::Relaxed);
            counters.consecutive_gateway.store(0, Ordering::Relaxed);
            return [None, None];
        }
        let mut gateway = false;
        if (502..=504).contains(&status) {
            gateway = reached(&counters.consecutive_gateway, self.consecutive_gateway);
        } else {
            counters.consecutive_gateway.store(0, Ordering::Relaxed);
        }
        let any = reached(&counters.consecutive_5xx, self.consecutive_5xx);
        [gateway.then_some(Cause::ConsecutiveGateway), any.then_some(Cause::Consecutive5xx)]
    }

    fn local(&self, host: &Host, ok: bool) -> Option<Cause> {
        let counters = &host.state.outlier;
        counters.window_local_total.fetch_add(1, Ordering::Relaxed);
        if ok {
            counters.window_local_success.fetch_add(1, Ordering::Relaxed);
            counters.consecutive_local.store(0, Ordering::Relaxed);
            return None;
        }
        reached(&counters.consecutive_local, self.consecutive_local).then_some(Cause::ConsecutiveLocal)
    }

    fn enforcing(&self, cause: Cause) -> u32 {
        match cause {
            Cause::Consecutive5xx => self.enforcing.consecutive_5xx,
            Cause::ConsecutiveGateway => self.enforcing.consecutive_gateway,
            Cause::ConsecutiveLocal => self.enforcing.consecutive_local,
            Cause::SuccessRate => self.enforcing.success_rate,
            Cause::LocalSuccessRate => self.enforcing.local_success_rate,
            Cause::FailurePercentage => self.enforcing.failure_percentage,
            Cause::LocalFailurePercentage => self.enforcing.local_failure_percentage,
        }
    }

    /// Whether a host that passes an active check comes back at once.
    pub fn unejects_on_active_check(&self) -> bool {
        self.uneject_on_active_check
    }
}

/// Exactly at the threshold, so that of many failures at once only one is reported.
fn reached(counter: &AtomicU32, threshold: u32) -> bool {
    counter.fetch_add(1, Ordering::Relaxed) + 1 == threshold
}

/// Ejects hosts of one cluster and lets them return. One for all workers.
#[derive(Debug)]
pub struct OutlierDetector {
    config: OutlierConfig,
    monitors: HashMap<Address, Monitor>,
    next_tick: Instant,
    rates: [Option<RateLine>; 2],
}

/// What hosts' success rates of the last interval were measured by, in percent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateLine {
    /// Their average.
    pub average: f64,
    /// Hosts below it are outliers.
    pub threshold: f64,
}

#[derive(Debug, Default)]
struct Monitor {
    /// How many times in a row it was ejected; the ejection lasts so many base times.
    backoff: u32,
    until: Option<Instant>,
}

impl OutlierDetector {
    /// A detector that has ejected nobody.
    pub fn new(config: OutlierConfig, now: Instant) -> Self {
        Self { next_tick: now + config.interval, config, monitors: HashMap::new(), rates: [None; 2] }
    }

    /// When [`tick`](OutlierDetector::tick) is due.
    pub fn next_tick(&self) -> Instant {
        self.next_tick
    }

    /// By what rates were measured: of answers, and of what the hosts did not even take (with the split). `None`: there
    /// was too little traffic.
    pub fn rates(&self) -> [Option<RateLine>; 2] {
        self.rates
    }

    /// Hosts ejected now.
    pub fn ejections_active(&self) -> usize {
        self.monitors.values().filter(|m| m.until.is_some()).count()
    }

    /// A worker saw a threshold reached.
    pub fn on_threshold(
        &mut self,
        host: &Arc<Host>,
        cause: Cause,
        endpoints: &Endpoints,
        now: Instant,
        random: &mut Random,
    ) -> Option<Event> {
        if host.state.has(HealthFlag::FailedOutlier) {
            return None;
        }
        let event = self.eject(host, cause, endpoints, now, random);
        let counters = &host.state.outlier;
        let counter = match cause {
            Cause::Consecutive5xx => &counters.consecutive_5xx,
            Cause::ConsecutiveGateway => &counters.consecutive_gateway,
            _ => &counters.consecutive_local,
        };
        counter.store(0, Ordering::Relaxed);
        Some(event)
    }

    fn eject(
        &mut self,
        host: &Arc<Host>,
        cause: Cause,
        endpoints: &Endpoints,
        now: Instant,
        random: &mut Random,
    ) -> Event {
        let hosts = endpoints.hosts().count().max(1);
        let active = self.ejections_active();
        let percent = 100.0 * (active + 1) as f64 / hosts as f64;
        let allowed = percent <= f64::from(self.config.max_percent) || (self.config.always_one && active == 0);
        let host = Arc::clone(host);
        if !allowed {
            return Event::Overflow { host, cause };
        }
        let enforced = random.below(100) < u64::from(self.config.enforcing(cause));
        if enforced {
            let monitor = self.monitors.entry(host.address.clone()).or_default();
            if self.config.base_ejection.saturating_mul(monitor.backoff) < self.config.max_ejection {
                monitor.backoff += 1;
            }
            let time = self.config.base_ejection.saturating_mul(monitor.backoff).min(self.config.max_ejection);
            let jitter = Duration::from_millis(random.below(self.config.jitter.as_millis() as u64 + 1));
            monitor.until = Some(now + time + jitter);
            host.state.set(HealthFlag::FailedOutlier, true);
        }
        Event::Ejected { host, cause, enforced }
    }

    /// Lets hosts return and looks at the rates since the last time (Envoy `DetectorImpl::onIntervalTimer`).
    pub fn tick(&mut self, endpoints: &Endpoints, now: Instant, random: &mut Random) -> Vec<Event> {
        self.next_tick = now + self.config.interval;
        let mut events = Vec::new();
        self.monitors.retain(|address, _| endpoints.hosts().any(|h| h.address == *address));
        for host in endpoints.hosts() {
            let Some(monitor) = self.monitors.get_mut(&host.address) else { continue };
            match monitor.until {
                Some(until) if until <= now => {
                    monitor.until = None;
                    host.state.outlier.reset_consecutive();
                    host.state.set(HealthFlag::FailedOutlier, false);
                    events.push(Event::Returned { host: Arc::clone(host) });
                }
                Some(_) => {}
                None => monitor.backoff = monitor.backoff.saturating_sub(1),
            }
        }
        self.rates = [None; 2];
        for host in endpoints.hosts() {
            host.state.outlier.set_rate(false, None);
            host.state.outlier.set_rate(true, None);
        }
        let external = window(endpoints, |c| (&c.window_success, &c.window_total));
        self.by_rate(&external, [Cause::SuccessRate, Cause::FailurePercentage], endpoints, now, random, &mut events);
        if self.config.split {
            let local = window(endpoints, |c| (&c.window_local_success, &c.window_local_total));
            let causes = [Cause::LocalSuccessRate, Cause::LocalFailurePercentage];
            self.by_rate(&local, causes, endpoints, now, random, &mut events);
        }
        events
    }

    fn by_rate(
        &mut self,
        window: &[(Arc<Host>, u32, u32)],
        [rate_cause, percentage_cause]: [Cause; 2],
        endpoints: &Endpoints,
        now: Instant,
        random: &mut Random,
        events: &mut Vec<Event>,
    ) {
        let is_local = rate_cause == Cause::LocalSuccessRate;
        let rates = |least: u32| -> Vec<(&Arc<Host>, f64)> {
            let counted = window.iter().filter(|(host, ..)| !host.state.has(HealthFlag::FailedOutlier));
            let enough = counted.filter(|(_, _, total)| *total > 0 && *total >= least);
            enough.map(|(host, success, total)| (host, 100.0 * f64::from(*success) / f64::from(*total))).collect()
        };
        let least = self.config.success_rate.min_requests.min(self.config.failure_percentage.min_requests);
        for (host, rate) in rates(least) {
            host.state.outlier.set_rate(is_local, Some(rate));
        }
        let mut out: Vec<(Arc<Host>, Cause)> = Vec::new();
        let by_success = rates(self.config.success_rate.min_requests);
        if !by_success.is_empty() && by_success.len() >= self.config.success_rate.min_hosts {
            let n = by_success.len() as f64;
            let mean = by_success.iter().map(|(_, r)| r).sum::<f64>() / n;
            let variance = by_success.iter().map(|(_, r)| (r - mean).powi(2)).sum::<f64>() / n;
            let threshold = mean - self.config.stdev_factor * variance.sqrt();
            self.rates[usize::from(is_local)] = Some(RateLine { average: mean, threshold });
            out.extend(by_success.iter().filter(|(_, r)| *r < threshold).map(|(h, _)| (Arc::clone(h), rate_cause)));
        }
        let by_failure = rates(self.config.failure_percentage.min_requests);
        if !by_failure.is_empty() && by_failure.len() >= self.config.failure_percentage.min_hosts {
            let failing = by_failure.iter().filter(|(_, r)| 100.0 - r >= self.config.failure_threshold);
            out.extend(failing.map(|(h, _)| (Arc::clone(h), percentage_cause)));
        }
        for (host, cause) in out {
            if !host.state.has(HealthFlag::FailedOutlier) {
                events.push(self.eject(&host, cause, endpoints, now, random));
            }
        }
    }

    /// A host passed an active check: if so configured, it is back.
    pub fn on_active_check_passed(&mut self, host: &Arc<Host>) -> Option<Event> {
        if !self.config.uneject_on_active_check || !host.state.set(HealthFlag::FailedOutlier, false) {
            return None;
        }
        if let Some(monitor) = self.monitors.get_mut(&host.address) {
            monitor.until = None;
        }
        host.state.outlier.reset_consecutive();
        Some(Event::Returned { host: Arc::clone(host) })
    }
}

impl crate::endpoints::OutlierCounters {
    fn reset_consecutive(&self) {
        for counter in [&self.consecutive_5xx, &self.consecutive_gateway, &self.consecutive_local] {
            counter.store(0, Ordering::Relaxed);
        }
    }
}

/// Takes the counts of the last interval: host, successes, total.
fn window(
    endpoints: &Endpoints,
    counters: impl Fn(&crate::endpoints::OutlierCounters) -> (&AtomicU32, &AtomicU32),
) -> Vec<(Arc<Host>, u32, u32)> {
    endpoints
        .hosts()
        .map(|host| {
            let (success, total) = counters(&host.state.outlier);
            (Arc::clone(host), success.swap(0, Ordering::Relaxed), total.swap(0, Ordering::Relaxed))
        })
        .collect()
}

#[cfg(test)]
mod tests;
