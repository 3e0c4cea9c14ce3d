//! Where a request counts besides its cluster: its virtual cluster, its route, and what it and its answer ask for.

use crate::hcm::exchange::Exchange;
use crate::stats::{Answers, RequestStats};
use crate::upstream::WorkerCluster;
use proxy_core::filters::RouterConfig;
use proxy_core::route::Matched;
use proxy_core::{Headers, Host};
use std::sync::Arc;

/// Envoy `Filter::chargeUpstreamCode`.
pub(super) struct Counted {
    requests: [Option<Arc<RequestStats>>; 2],
    /// Answers count once more under this name of the cluster (`x-envoy-upstream-alt-stat-name`).
    alternative: Option<String>,
    /// No answers are counted.
    silent: bool,
    /// Of the cluster's answers only the number is (`suppress_grpc_request_failure_code_stats`).
    pub(super) quiet: bool,
}

/// What cluster statistics tell apart.
#[derive(Clone, Copy)]
pub(super) struct Told {
    /// The request came from inside.
    internal: bool,
    /// The answer is part of a trial.
    canary: bool,
}

/// Whether an answer of a host is part of a trial.
pub(in crate::hcm) fn is_canary(answer: &Headers, host: &Host) -> bool {
    answer.get("x-envoy-upstream-canary").is_some_and(|value| value == b"true") || host.is_canary()
}

impl Told {
    /// Of an answer of the upstream.
    pub(super) fn of(exchange: &Exchange, answer: &Headers) -> Self {
        let canary = exchange.info.upstream.host.as_ref().is_some_and(|host| is_canary(answer, host));
        Self { canary, ..Self::own(exchange) }
    }

    /// Of an answer that the proxy gives in the cluster's place.
    pub(super) fn own(exchange: &Exchange) -> Self {
        let internal = exchange.request.get("x-envoy-internal").is_some_and(|value| value == b"true");
        let canary = exchange.info.upstream.host.as_ref().is_some_and(|host| host.is_canary());
        Self { internal, canary }
    }
}

impl Counted {
    /// Takes the request's wish out of its headers.
    pub(super) fn of(exchange: &mut Exchange, matched: &Matched, router: Option<&RouterConfig>) -> Self {
        const ALTERNATIVE: &str = "x-envoy-upstream-alt-stat-name";
        let worker = &exchange.http.worker;
        let cluster = matched.vhost.virtual_cluster(&exchange.request);
        let requests = [matched.vhost.stat_name(cluster), matched.route.stat_name.as_ref()]
            .map(|name| name.map(|name| worker.request_stats(name)));
        exchange.info.virtual_cluster = cluster.map(|cluster| cluster.name.clone());
        let mut alternative = None;
        if exchange.request.contains(ALTERNATIVE) {
            let name = exchange.request.joined(ALTERNATIVE).unwrap_or_default();
            alternative = Some(String::from_utf8_lossy(&name).into_owned());
            exchange.request.remove(ALTERNATIVE);
        }
        let dynamic = router.is_none_or(|router| router.dynamic_stats);
        let quiet = exchange.grpc && router.is_some_and(|router| router.suppress_grpc_codes);
        Self { requests, alternative, silent: !dynamic || exchange.info.health_check, quiet }
    }

    /// Counts something of the request where it counts besides its cluster.
    pub(super) fn each(&self, count: impl Fn(&RequestStats)) {
        self.requests.iter().flatten().for_each(|stats| count(stats));
    }

    /// An answer that the cluster, or the proxy in its place, gave.
    pub(super) fn answer(&self, exchange: &Exchange, cluster: &WorkerCluster, status: u16, told: Told) {
        if self.silent {
            return;
        }
        match self.quiet {
            false => cluster.stats.charge(status, told.internal),
            true => cluster.stats.charge_quietly(status, told.internal),
        }
        self.each(|stats| stats.codes.inc(status));
        self.again(exchange, cluster, told, |answers| answers.charge(status));
    }

    /// How long the answer took.
    pub(super) fn took(&self, exchange: &Exchange, cluster: &WorkerCluster, millis: u64, told: Told) {
        if self.silent {
            return;
        }
        cluster.stats.took(millis, told.internal);
        self.each(|stats| stats.time.record(millis));
        self.again(exchange, cluster, told, |answers| answers.took(millis));
    }

    fn again(&self, exchange: &Exchange, cluster: &WorkerCluster, told: Told, count: impl Fn(&Answers)) {
        let host = exchange.info.upstream.host.as_ref();
        if let Some(answers) = host.and_then(|host| cluster.answers_between_zones(&exchange.http.worker, host)) {
            count(&answers);
        }
        if !told.canary && self.alternative.is_none() {
            return;
        }
        let name = &cluster.config().stat_name;
        let once = |prefix: String| {
            if let Some(answers) = exchange.http.worker.answers(name, prefix) {
                count(&answers);
            }
        };
        if told.canary {
            once("canary".to_owned());
        }
        if let Some(alternative) = &self.alternative {
            let place = if told.internal { "internal" } else { "external" };
            once(format!("{alternative}.{place}"));
            if told.canary {
                once(format!("{alternative}.canary"));
            }
            once(alternative.clone());
        }
    }
}
