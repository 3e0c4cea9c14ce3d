//! istiod's metrics, by its names.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ads::server::EventKind;
use ca::SignError;
use config_store::{Kind, Snapshot};
use envoy_api::type_url;
use lifecycle::metrics::Registry;

use crate::push_status::{GAUGES, PushStatus};

/// Seconds; istiod's bounds of `pilot_pushcontext_init_seconds`.
const INIT_BOUNDS: [f64; 6] = [0.01, 0.1, 0.5, 1.0, 3.0, 5.0];

/// Seconds; istiod's bounds of `pilot_debounce_time` and `pilot_xds_push_time`.
const PUSH_BOUNDS: [f64; 9] = [0.01, 0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0];

/// Seconds; istiod's bounds of `pilot_proxy_queue_time` and `pilot_proxy_convergence_time`.
const PROXY_BOUNDS: [f64; 8] = [0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0];

/// Bytes; istiod's bounds of `pilot_xds_config_size_bytes`.
const SIZE_BOUNDS: [f64; 6] = [1.0, 10_000.0, 1_000_000.0, 4_000_000.0, 10_000_000.0, 40_000_000.0];

/// Seconds; istiod's bounds of `sidecar_injection_time_seconds`.
const INJECTION_BOUNDS: [f64; 9] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// What became of the WorkloadEntry of a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Registration {
    Made,
    Updated,
    Disconnected,
    Deleted,
    Error,
}

/// A snapshot that proxies are to get.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    pub(crate) revision: u64,
    /// When the first change in it came.
    pub(crate) changed: Instant,
    /// When proxies could see it.
    pub(crate) at: Instant,
    /// How many changes of each sort are in it.
    pub(crate) reasons: BTreeMap<&'static str, u64>,
}

/// Snapshots whose times are remembered; a proxy that is farther behind is no longer timed.
const REMEMBERED: usize = 64;

/// Counts what happens. Series are made when first used.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    registry: Registry,
    /// The latest snapshots. The lock covers one look-up.
    published: Mutex<VecDeque<Published>>,
    /// When this process began to serve.
    since: OnceLock<Instant>,
    /// Failed look-ups of providers' services that are counted already.
    lookups: Mutex<BTreeMap<&'static str, u64>>,
}

impl Metrics {
    /// Everything in Prometheus' text format.
    pub(crate) fn render(&self) -> String {
        self.registry.render()
    }

    pub(crate) fn started(&self, version: &str) {
        self.registry
            .gauge("istio_build", "Istio component build info", &[("component", "pilot"), ("tag", version)])
            .set(1.0);
        self.registry.gauge("pilot_info", "Pilot version and build information.", &[("version", version)]).set(1.0);
        for (kind, count) in [("local", 1.0), ("remote", 0.0)] {
            let labels = [("cluster_type", kind)];
            self.registry.gauge("istiod_managed_clusters", "Number of clusters managed by istiod", &labels).set(count);
        }
        self.since.get_or_init(Instant::now);
    }

    /// Somebody looks: what depends on the time is brought up to date, such as how long the root and the certificate that
    /// signs are valid.
    pub(crate) fn looked_at(&self, (root, signer): (SystemTime, SystemTime)) {
        let gauge = |name: &str, help: &str, value: f64| self.registry.gauge(name, help, &[]).set(value);
        let uptime = self.since.get().map_or(0.0, |since| since.elapsed().as_secs_f64());
        gauge("istiod_uptime_seconds", "Current istiod server uptime in seconds", uptime);
        let now = SystemTime::now();
        let left = |end: SystemTime| match end.duration_since(now) {
            Ok(left) => left.as_secs_f64(),
            Err(over) => -over.duration().as_secs_f64(),
        };
        let at = |end: SystemTime| end.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let help = "The unix timestamp, in seconds, when the root cert will expire.";
        gauge("citadel_server_root_cert_expiry_timestamp", help, at(root));
        let help = "The time remaining, in seconds, before the root cert will expire. A negative value indicates the cert is \
                    expired.";
        gauge("citadel_server_root_cert_expiry_seconds", help, left(root));
        let help = "The unix timestamp, in seconds, when Istio generated cert chain will expire.";
        gauge("citadel_server_cert_chain_expiry_timestamp", help, at(signer));
        let help = "The time remaining, in seconds, before the Istio Generated cert chain will expire. A negative value \
                    indicates the cert is expired.";
        gauge("citadel_server_cert_chain_expiry_seconds", help, left(signer));
    }

    /// Services of providers that are not there, by kind of provider; numbers that fall are of a new count.
    pub(crate) fn lookups_failed(&self, failures: &BTreeMap<&'static str, u64>) {
        let mut counted = self.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        for (kind, count) in failures {
            let before = counted.insert(kind, *count).unwrap_or_default();
            let more = if *count < before { *count } else { count - before };
            let help = "Number of times a cluster lookup failed";
            self.registry.counter("provider_lookup_cluster_failures", help, &[("type", *kind)]).add(more);
        }
    }

    /// The keys of an issuer were asked for.
    pub(crate) fn keys_fetched(&self, success: bool) {
        let (name, help) = match success {
            true => (
                "pilot_jwks_resolver_network_fetch_success_total",
                "Total number of successfully network fetch by pilot jwks resolver",
            ),
            false => (
                "pilot_jwks_resolver_network_fetch_fail_total",
                "Total number of failed network fetch by pilot jwks resolver",
            ),
        };
        self.registry.counter(name, help, &[]).increment();
    }

    /// An object that is new, other or gone: as istiod counts it where it is heard of, and where it leads to a push.
    pub(crate) fn changed(&self, kind: Kind, event: &str) {
        let count = |name: &str, help: &str, kind: &str| {
            self.registry.counter(name, help, &[("type", kind), ("event", event)]).increment();
        };
        match kind {
            kind if kind.is_custom() => count("pilot_k8s_cfg_events", "Events from k8s config.", kind.as_str()),
            Kind::EndpointSlice => count("pilot_k8s_reg_events", "Events from k8s registry.", "EndpointSlice"),
            kind => {
                let plural = format!("{}s", kind.as_str());
                count("pilot_k8s_reg_events", "Events from k8s registry.", &plural);
            }
        }
        let inbound = match kind {
            Kind::EndpointSlice | Kind::Pod => "eds",
            Kind::Service if event == "delete" => "svcdelete",
            Kind::Service => "svc",
            _ => "config",
        };
        let help = "Total number of updates received by pilot.";
        self.registry.counter("pilot_inbound_updates", help, &[("type", inbound)]).increment();
    }

    /// An object that cannot be used.
    pub(crate) fn rejected(&self, kind: Option<Kind>, name: &str) {
        let labels = [("type", kind.map_or("unknown", Kind::as_str)), ("name", name)];
        let help = "Total number of configs that Pilot had to reject or ignore.";
        self.registry.counter("pilot_total_rejected_configs", help, &labels).increment();
    }

    /// Proxies can see a snapshot.
    pub(crate) fn published(&self, published: Published) {
        let help = "Delay in seconds between the first config enters debouncing and the merged push request is pushed into \
                    the push queue (includes pushcontext_init_seconds).";
        self.registry
            .histogram("pilot_debounce_time", help, &PUSH_BOUNDS, &[])
            .observe((published.at - published.changed).as_secs_f64());
        let mut latest = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        if latest.len() == REMEMBERED {
            latest.pop_front();
        }
        latest.push_back(published);
    }

    /// Works on the times of a snapshot, if they are still known and it came after `since`.
    fn times(&self, revision: u64, since: Instant, work: impl FnOnce(&Published)) {
        let latest = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        // What was there when a proxy came is not what it waited for.
        let known = latest.iter().rev().find(|published| published.revision == revision);
        if let Some(known) = known.filter(|published| published.at > since) {
            work(known);
        }
    }

    /// The turn of a proxy, connected since then, has come to get a snapshot.
    pub(crate) fn dequeued(&self, revision: u64, since: Instant) {
        self.times(revision, since, |published| {
            let help = "Time in seconds, a proxy is in the push queue before being dequeued.";
            let waited = published.at.elapsed().as_secs_f64();
            self.registry.histogram("pilot_proxy_queue_time", help, &PROXY_BOUNDS, &[]).observe(waited);
            let help = "Total number of times a push was triggered, labeled by reason for the push.";
            for (reason, times) in &published.reasons {
                self.registry.counter("pilot_push_triggers", help, &[("type", *reason)]).add(*times);
            }
        });
    }

    /// A proxy, connected since then, uses all of a snapshot.
    pub(crate) fn converged(&self, revision: u64, since: Instant) {
        self.times(revision, since, |published| {
            let help = "Delay in seconds between config change and a proxy receiving all required configuration.";
            let took = published.changed.elapsed().as_secs_f64();
            self.registry.histogram("pilot_proxy_convergence_time", help, &PROXY_BOUNDS, &[]).observe(took);
        });
    }

    pub(crate) fn validated(&self, kind: Option<Kind>, passed: bool) {
        let resource = kind.map_or("unknown", Kind::as_str);
        let (name, help) = if passed {
            ("galley_validation_passed", "Resource is valid.")
        } else {
            ("galley_validation_failed", "Resource validation failed.")
        };
        self.registry
            .counter(name, help, &[("group", kind.map_or("", Kind::group)), ("resource", resource)])
            .increment();
    }

    pub(crate) fn built(&self, took: Duration, snapshot: &Snapshot) {
        let seconds = took.as_secs_f64();
        self.registry
            .histogram(
                "pilot_pushcontext_init_seconds",
                "Total time in seconds Pilot takes to init pushContext.",
                &INIT_BOUNDS,
                &[],
            )
            .observe(seconds);
        let gauge = |name: &str, help: &str, value: usize| self.registry.gauge(name, help, &[]).set(value as f64);
        gauge(
            "pilot_services",
            "Total services known to pilot.",
            snapshot.len(Kind::Service) + snapshot.len(Kind::ServiceEntry),
        );
        gauge("pilot_virt_services", "Total virtual services known to pilot.", snapshot.len(Kind::VirtualService));
    }

    /// What is amiss now.
    pub(crate) fn amiss(&self, status: &PushStatus) {
        for (name, help) in GAUGES {
            self.registry.gauge(name, help, &[]).set(status.count(name) as f64);
        }
    }

    /// How many proxies of a version are connected.
    pub(crate) fn connected(&self, version: &str, count: usize) {
        self.registry
            .gauge("pilot_xds", "Number of endpoints connected to this pilot using XDS.", &[("version", version)])
            .set(count as f64);
    }

    pub(crate) fn xds(&self, event: &EventKind) {
        match event {
            EventKind::Sent { type_url, bytes, took, .. } => {
                let labels = [("type", short(type_url))];
                self.registry
                    .counter("pilot_xds_pushes", "Pilot build and send errors for lds, rds, cds and eds.", &labels)
                    .increment();
                let help = "Total time in seconds Pilot takes to push lds, rds, cds and eds.";
                self.registry.histogram("pilot_xds_push_time", help, &PUSH_BOUNDS, &labels).observe(took.as_secs_f64());
                // Here istiod's label has the whole type URL.
                let help = "Distribution of configuration sizes pushed to clients";
                self.registry
                    .histogram("pilot_xds_config_size_bytes", help, &SIZE_BOUNDS, &[("type", type_url)])
                    .observe(*bytes as f64);
            }
            EventKind::Stale { .. } => {
                let help = "Total number of XDS requests with an expired nonce.";
                self.registry.counter("pilot_xds_expired_nonce", help, &[]).increment();
            }
            EventKind::Nacked { type_url, .. } => {
                let labels = [("type", short(type_url))];
                self.registry
                    .counter(
                        "pilot_total_xds_rejects",
                        "Total number of XDS responses from pilot rejected by proxy.",
                        &labels,
                    )
                    .increment();
            }
            _ => {}
        }
    }

    pub(crate) fn refused_connection(&self) {
        self.registry
            .counter("pilot_total_xds_internal_errors", "Total number of internal XDS errors in pilot.", &[])
            .increment();
    }

    /// Secrets that proxies asked for and do not get.
    pub(crate) fn secrets_missing(&self, count: usize) {
        let help = "Total number of failures to fetch SDS key and certificate.";
        self.registry.counter("pilot_sds_certificate_errors_total", help, &[]).add(count as u64);
    }

    /// A request for a certificate, of a caller who is known.
    pub(crate) fn csr(&self) {
        self.registry
            .counter("citadel_server_csr_count", "The number of CSRs received by Citadel server.", &[])
            .increment();
    }

    /// What became of it.
    pub(crate) fn signed(&self, result: Result<(), &SignError>) {
        match result {
            Ok(()) => {
                let help = "The number of certificates issuances that have succeeded.";
                self.registry.counter("citadel_server_success_cert_issuance_count", help, &[]).increment();
            }
            Err(error) => {
                let help = "The number of errors occurred when signing the CSR.";
                let labels = [("error", error.istio_type())];
                self.registry.counter("citadel_server_csr_sign_err_count", help, &labels).increment();
            }
        }
    }

    /// A caller without identity; `csr`: it wanted a certificate.
    pub(crate) fn unauthenticated(&self, csr: bool) {
        if csr {
            self.csr();
            self.registry
                .counter("citadel_server_authentication_failure_count", "The number of authentication failures.", &[])
                .increment();
        } else {
            self.refused_connection();
        }
    }

    /// A request to `/inject`, as istio `pkg/kube/inject/monitoring.go` counts.
    pub(crate) fn injected(&self, result: &inject::webhook::Result, took: Duration) {
        use inject::webhook::Result::{Failed, Injected, Skipped};
        let count = |name: &str, help: &str| self.registry.counter(name, help, &[]).increment();
        count("sidecar_injection_requests_total", "Total number of sidecar injection requests.");
        match result {
            Injected => {
                count("sidecar_injection_success_total", "Total number of successful sidecar injection requests.")
            }
            Skipped(_) => {
                count("sidecar_injection_skip_total", "Total number of skipped sidecar injection requests.");
            }
            Failed(_) => {
                count("sidecar_injection_failure_total", "Total number of failed sidecar injection requests.");
            }
        }
        let help = "Total time taken for injection in seconds.";
        self.registry
            .histogram("sidecar_injection_time_seconds", help, &INJECTION_BOUNDS, &[])
            .observe(took.as_secs_f64());
    }

    /// As istio `pilot/pkg/autoregistration/controller.go` counts.
    pub(crate) fn registration(&self, what: Registration) {
        let (name, help) = match what {
            Registration::Made => ("auto_registration_success_total", "Total number of successful auto registrations."),
            Registration::Updated => ("auto_registration_updates_total", "Total number of auto registration updates."),
            Registration::Disconnected => ("auto_registration_unregister_total", "Total number of unregistrations."),
            Registration::Deleted => {
                ("auto_registration_deletes_total", "Total number of auto registration cleaned up by periodic timer.")
            }
            Registration::Error => ("auto_registration_errors_total", "Total number of auto registration errors."),
        };
        self.registry.counter(name, help, &[]).increment();
    }

    /// An injection configuration was read: used, or refused.
    pub(crate) fn injection_configured(&self, used: bool) {
        let labels = [("result", if used { "used" } else { "refused" })];
        let help = "Injection configurations that were read, and whether they could be used.";
        self.registry.counter("outrigger_injection_config_loads_total", help, &labels).increment();
    }
}

/// istiod's short names of types.
pub(crate) fn short(url: &str) -> &str {
    match url {
        type_url::CLUSTER => "cds",
        type_url::ENDPOINT => "eds",
        type_url::LISTENER => "lds",
        type_url::ROUTE => "rds",
        type_url::SECRET => "sds",
        type_url::NAME_TABLE => "nds",
        type_url::EXTENSION => "ecds",
        other => other.rsplit('/').next().unwrap_or(other),
    }
}
