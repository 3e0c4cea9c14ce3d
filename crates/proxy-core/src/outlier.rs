//! Outlier detection: hosts that answer badly get no traffic for a while.
//!
//! Workers count results on the host's atomics ([`OutlierConfig::report`]); when a threshold is reached, and at each
//! interval, the one [`OutlierDetector`] of the cluster decides.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::endpoints::{Endpoints, HealthFlag, Host, HostState};
use crate::fields;
use crate::headers::Headers;
use crate::pb;
use crate::random::Random;
use crate::rejected::{Compiled, Invalid, refuse};
use crate::runtime::{Live, Runtime};

/// A compiled `config.cluster.v3.OutlierDetection`. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct OutlierConfig {
    /// Between looks at all hosts.
    interval: Live<u64>,
    base_ejection: Live<u64>,
    max_ejection: Live<u64>,
    jitter: Live<u64>,
    max_percent: Live<u64>,
    always_one: bool,
    consecutive_5xx: Live<u64>,
    consecutive_gateway: Live<u64>,
    consecutive_local: Live<u64>,
    enforcing: Enforcing,
    split: bool,
    success_rate: RateRule,
    /// Thousandths.
    stdev_factor: Live<u64>,
    failure_percentage: RateRule,
    failure_threshold: Live<u64>,
    uneject_on_active_check: Live<bool>,
    /// Hosts that call themselves degraded in answers get less for a while.
    detect_degraded: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct Enforcing {
    consecutive_5xx: Live<u64>,
    consecutive_gateway: Live<u64>,
    consecutive_local: Live<u64>,
    success_rate: Live<u64>,
    local_success_rate: Live<u64>,
    failure_percentage: Live<u64>,
    local_failure_percentage: Live<u64>,
}

#[derive(Clone, Debug, PartialEq)]
struct RateRule {
    min_hosts: Live<u64>,
    min_requests: Live<u64>,
}

/// How a request, or a try to connect, ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// The host answered with this status.
    Status(u16),
    /// It did, and said that it is degraded (`x-envoy-degraded`).
    Degraded(u16),
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

impl Outcome {
    /// The host answered with these headers.
    pub fn of_answer(status: u16, headers: &Headers) -> Self {
        if headers.contains("x-envoy-degraded") { Self::Degraded(status) } else { Self::Status(status) }
    }
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
        /// What came before.
        history: History,
    },
    /// A host should have been ejected, but too many are already.
    Overflow {
        /// The host.
        host: Arc<Host>,
        /// Why.
        cause: Cause,
    },
    /// A host said that it is degraded.
    Degraded {
        /// The host.
        host: Arc<Host>,
        /// What came before.
        history: History,
    },
    /// A host is back, or degraded no more.
    Returned {
        /// The host.
        host: Arc<Host>,
        /// What came before.
        history: History,
    },
}

/// What a detector remembers of a host.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct History {
    /// How often it was ejected, with this time.
    pub ejections: u32,
    /// Since it returned (for an ejection), or was ejected (for a return).
    pub since_last: Option<Duration>,
}

impl OutlierConfig {
    pub(crate) fn compile(config: &pb::cluster::OutlierDetection, runtime: &Runtime) -> Compiled<Self> {
        refuse! {
            "monitors": !config.monitors.is_empty(),
        }
        let live = |key: &str, value: u64| runtime.live(&format!("outlier_detection.{key}"), value);
        let uint = |key: &str, value: &Option<pb::UInt32Value>, default: u32| {
            live(key, fields::uint(value.as_ref(), default).into())
        };
        let percent =
            |key: &str, value: &Option<pb::UInt32Value>, default: u32| match fields::uint(value.as_ref(), default) {
                p if p <= 100 => Ok(live(key, p.into())),
                p => Err(Invalid::new(key, format!("{p} is above 100"))),
            };
        let millis = |key: &str, time: Duration| live(key, u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let base_ejection =
            fields::positive("base_ejection_time", config.base_ejection_time.as_ref(), Duration::from_secs(30))?;
        let max_ejection = base_ejection.max(Duration::from_secs(300));
        let max_ejection = fields::positive("max_ejection_time", config.max_ejection_time.as_ref(), max_ejection)?;
        // The default of the base counts, too.
        if max_ejection < base_ejection {
            return Err(Invalid::new("max_ejection_time", "is less than base_ejection_time"));
        }
        let jitter = fields::duration("max_ejection_time_jitter", config.max_ejection_time_jitter.as_ref())?;
        let interval = fields::positive("interval", config.interval.as_ref(), Duration::from_secs(10))?;
        let uneject = fields::flag(config.successful_active_health_check_uneject_host.as_ref(), true);
        Ok(Self {
            interval: millis("interval_ms", interval),
            base_ejection: millis("base_ejection_time_ms", base_ejection),
            max_ejection: millis("max_ejection_time_ms", max_ejection),
            jitter: millis("max_ejection_time_jitter_ms", jitter.unwrap_or_default()),
            max_percent: percent("max_ejection_percent", &config.max_ejection_percent, 10)?,
            always_one: fields::flag(config.always_eject_one_host.as_ref(), false),
            consecutive_5xx: uint("consecutive_5xx", &config.consecutive_5xx, 5),
            consecutive_gateway: uint("consecutive_gateway_failure", &config.consecutive_gateway_failure, 5),
            consecutive_local: uint("consecutive_local_origin_failure", &config.consecutive_local_origin_failure, 5),
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
                min_hosts: uint("success_rate_minimum_hosts", &config.success_rate_minimum_hosts, 5),
                min_requests: uint("success_rate_request_volume", &config.success_rate_request_volume, 100),
            },
            stdev_factor: uint("success_rate_stdev_factor", &config.success_rate_stdev_factor, 1900),
            failure_percentage: RateRule {
                min_hosts: uint("failure_percentage_minimum_hosts", &config.failure_percentage_minimum_hosts, 5),
                min_requests: uint("failure_percentage_request_volume", &config.failure_percentage_request_volume, 50),
            },
            failure_threshold: percent("failure_percentage_threshold", &config.failure_percentage_threshold, 85)?,
            uneject_on_active_check: runtime
                .live("outlier_detection.successful_active_health_check_uneject_host", uneject),
            detect_degraded: fields::flag(config.detect_degraded_hosts.as_ref(), false),
        })
    }

    /// Counts a result (Envoy `DetectorHostMonitorImpl::putResult`). Causes mean: tell the detector, in this order.
    pub fn report(&self, host: &Host, outcome: Outcome) -> [Option<Cause>; 2] {
        match outcome {
            Outcome::Status(status) | Outcome::Degraded(status) => self.external(host, status),
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

    /// Whether the detector is to hear that the host called itself degraded: errors count as errors alone.
    pub fn degrades(&self, host: &Host, outcome: Outcome) -> bool {
        let said = matches!(outcome, Outcome::Degraded(status) if !(500..600).contains(&status));
        said && self.detect_degraded && !host.state.has(HealthFlag::DegradedOutlier)
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
            gateway = reached(&counters.consecutive_gateway, &self.consecutive_gateway);
        } else {
            counters.consecutive_gateway.store(0, Ordering::Relaxed);
        }
        let any = reached(&counters.consecutive_5xx, &self.consecutive_5xx);
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
        reached(&counters.consecutive_local, &self.consecutive_local).then_some(Cause::ConsecutiveLocal)
    }

    fn enforcing(&self, cause: Cause) -> u64 {
        let share = match cause {
            Cause::Consecutive5xx => &self.enforcing.consecutive_5xx,
            Cause::ConsecutiveGateway => &self.enforcing.consecutive_gateway,
            Cause::ConsecutiveLocal => &self.enforcing.consecutive_local,
            Cause::SuccessRate => &self.enforcing.success_rate,
            Cause::LocalSuccessRate => &self.enforcing.local_success_rate,
            Cause::FailurePercentage => &self.enforcing.failure_percentage,
            Cause::LocalFailurePercentage => &self.enforcing.local_failure_percentage,
        };
        share.get()
    }

    fn interval(&self) -> Duration {
        Duration::from_millis(self.interval.get().max(1))
    }

    /// Whether a host that passes an active check comes back at once.
    pub fn unejects_on_active_check(&self) -> bool {
        self.uneject_on_active_check.get()
    }
}

/// Exactly at the threshold, so that of many failures at once only one is reported.
fn reached(counter: &AtomicU32, threshold: &Live<u64>) -> bool {
    u64::from(counter.fetch_add(1, Ordering::Relaxed)) + 1 == threshold.get()
}

/// Ejects hosts of one cluster and lets them return. One for all workers.
#[derive(Debug)]
pub struct OutlierDetector {
    config: OutlierConfig,
    /// By where they are, with what is known of the host: one that is another now begins anew.
    monitors: HashMap<Address, (Arc<HostState>, Monitor)>,
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
    ejection: Penalty,
    degradation: Penalty,
    ejections: u32,
    ejected: Option<Instant>,
    returned: Option<Instant>,
}

/// How long a host stays ejected or degraded.
#[derive(Debug, Default)]
struct Penalty {
    /// How many times in a row there was one; it lasts so many base times.
    backoff: u64,
    until: Option<Instant>,
}

impl Penalty {
    fn begin(&mut self, config: &OutlierConfig, now: Instant, random: &mut Random) {
        let (base, most) = (config.base_ejection.get(), config.max_ejection.get());
        if base.saturating_mul(self.backoff) < most {
            self.backoff += 1;
        }
        let time = base.saturating_mul(self.backoff).min(most);
        let jitter = random.below(config.jitter.get().saturating_add(1));
        self.until = now.checked_add(Duration::from_millis(time.saturating_add(jitter)));
    }

    /// Whether it ends at this look at all hosts. Each look without one makes the next shorter.
    fn ends(&mut self, now: Instant) -> bool {
        match self.until {
            Some(until) if until <= now => {
                self.until = None;
                return true;
            }
            Some(_) => {}
            None => self.backoff = self.backoff.saturating_sub(1),
        }
        false
    }
}

impl Monitor {
    fn history(&self, last: Option<Instant>, now: Instant) -> History {
        History { ejections: self.ejections, since_last: last.map(|last| now.saturating_duration_since(last)) }
    }
}

impl OutlierDetector {
    /// A detector that has ejected nobody.
    pub fn new(config: OutlierConfig, now: Instant) -> Self {
        Self { next_tick: now + config.interval(), config, monitors: HashMap::new(), rates: [None; 2] }
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
        self.monitors.values().filter(|(_, monitor)| monitor.ejection.until.is_some()).count()
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
        self.forget_gone(endpoints);
        let hosts = endpoints.hosts().count().max(1);
        let active = self.ejections_active();
        let percent = 100.0 * (active + 1) as f64 / hosts as f64;
        let allowed = percent <= self.config.max_percent.get() as f64 || (self.config.always_one && active == 0);
        let host = Arc::clone(host);
        if !allowed {
            return Event::Overflow { host, cause };
        }
        let enforced = random.below(100) < self.config.enforcing(cause);
        if enforced {
            let monitor = monitor(&mut self.monitors, &host);
            monitor.ejection.begin(&self.config, now, random);
            monitor.ejections += 1;
            monitor.ejected = Some(now);
            host.state.set(HealthFlag::FailedOutlier, true);
        }
        let monitor = self.monitors.get(&host.address);
        let history = monitor.map(|(_, m)| m.history(m.returned, now)).unwrap_or_default();
        Event::Ejected { host, cause, enforced, history }
    }

    /// A worker heard a host call itself degraded (`detect_degraded_hosts`). Unlike ejections, of which it knows nothing,
    /// it is for any number of hosts.
    pub fn degrade(
        &mut self,
        host: &Arc<Host>,
        endpoints: &Endpoints,
        now: Instant,
        random: &mut Random,
    ) -> Option<Event> {
        self.forget_gone(endpoints);
        if !host.state.set(HealthFlag::DegradedOutlier, true) {
            return None;
        }
        let monitor = monitor(&mut self.monitors, host);
        monitor.degradation.begin(&self.config, now, random);
        Some(Event::Degraded { host: Arc::clone(host), history: monitor.history(monitor.returned, now) })
    }

    fn forget_gone(&mut self, endpoints: &Endpoints) {
        if self.monitors.is_empty() {
            return;
        }
        let present: HashMap<&Address, &Arc<HostState>> = endpoints.hosts().map(|h| (&h.address, &h.state)).collect();
        self.monitors.retain(|address, (state, _)| present.get(address).is_some_and(|now| Arc::ptr_eq(now, state)));
    }

    /// Lets hosts return and looks at the rates since the last time (Envoy `DetectorImpl::onIntervalTimer`).
    pub fn tick(&mut self, endpoints: &Endpoints, now: Instant, random: &mut Random) -> Vec<Event> {
        self.next_tick = now + self.config.interval();
        let mut events = Vec::new();
        self.forget_gone(endpoints);
        for host in endpoints.hosts() {
            let Some((_, monitor)) = self.monitors.get_mut(&host.address) else { continue };
            if monitor.ejection.ends(now) {
                monitor.returned = Some(now);
                host.state.outlier.reset_consecutive();
                host.state.set(HealthFlag::FailedOutlier, false);
                let history = monitor.history(monitor.ejected, now);
                events.push(Event::Returned { host: Arc::clone(host), history });
            }
            if monitor.degradation.ends(now) {
                host.state.set(HealthFlag::DegradedOutlier, false);
                let history = monitor.history(monitor.ejected, now);
                events.push(Event::Returned { host: Arc::clone(host), history });
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
        let rates = |least: u64| -> Vec<(&Arc<Host>, f64)> {
            let counted = window.iter().filter(|(host, ..)| !host.state.has(HealthFlag::FailedOutlier));
            let enough = counted.filter(|(_, _, total)| *total > 0 && u64::from(*total) >= least);
            enough.map(|(host, success, total)| (host, 100.0 * f64::from(*success) / f64::from(*total))).collect()
        };
        let (by_rate, by_share) = (&self.config.success_rate, &self.config.failure_percentage);
        // Where neither rule has hosts enough nothing is worked out (Envoy `DetectorImpl::processSuccessRateEjections`).
        if (window.len() as u64) < by_rate.min_hosts.get().min(by_share.min_hosts.get()) {
            return;
        }
        for (host, rate) in rates(by_rate.min_requests.get().min(by_share.min_requests.get())) {
            host.state.outlier.set_rate(is_local, Some(rate));
        }
        let mut out: Vec<(Arc<Host>, Cause)> = Vec::new();
        let by_success = rates(by_rate.min_requests.get());
        if !by_success.is_empty() && by_success.len() as u64 >= by_rate.min_hosts.get() {
            let n = by_success.len() as f64;
            let mean = by_success.iter().map(|(_, r)| r).sum::<f64>() / n;
            let variance = by_success.iter().map(|(_, r)| (r - mean).powi(2)).sum::<f64>() / n;
            let threshold = mean - self.config.stdev_factor.get() as f64 / 1000.0 * variance.sqrt();
            self.rates[usize::from(is_local)] = Some(RateLine { average: mean, threshold });
            out.extend(by_success.iter().filter(|(_, r)| *r < threshold).map(|(h, _)| (Arc::clone(h), rate_cause)));
        }
        let by_failure = rates(by_share.min_requests.get());
        if !by_failure.is_empty() && by_failure.len() as u64 >= by_share.min_hosts.get() {
            let threshold = self.config.failure_threshold.get() as f64;
            let failing = by_failure.iter().filter(|(_, r)| 100.0 - r >= threshold);
            out.extend(failing.map(|(h, _)| (Arc::clone(h), percentage_cause)));
        }
        // Whoever is an outlier by both rules is ejected twice, as in Envoy.
        for (host, cause) in out {
            events.push(self.eject(&host, cause, endpoints, now, random));
        }
    }

    /// A host passed an active check: if so configured, it is back.
    pub fn on_active_check_passed(&mut self, host: &Arc<Host>, now: Instant) -> Option<Event> {
        if !self.config.uneject_on_active_check.get() || !host.state.set(HealthFlag::FailedOutlier, false) {
            return None;
        }
        let mut history = History::default();
        if let Some((_, monitor)) = self.monitors.get_mut(&host.address) {
            monitor.ejection.until = None;
            monitor.returned = Some(now);
            history = monitor.history(monitor.ejected, now);
        }
        host.state.outlier.reset_consecutive();
        Some(Event::Returned { host: Arc::clone(host), history })
    }
}

/// What is known of a host, from now on.
fn monitor<'a>(monitors: &'a mut HashMap<Address, (Arc<HostState>, Monitor)>, host: &Host) -> &'a mut Monitor {
    let new = || (Arc::clone(&host.state), Monitor::default());
    &mut monitors.entry(host.address.clone()).or_insert_with(new).1
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
