//! istiod's metrics, by its names.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ads::server::EventKind;
use ca::SignError;
use config_store::{Kind, Snapshot};
use envoy_api::type_url;
use kube_source::Notice;
use lifecycle::metrics::Registry;
use push_context::Node;

use crate::push_status::{GAUGES, PushStatus};

/// Seconds; istiod's bounds of `pilot_pushcontext_init_seconds`.
const INIT_BOUNDS: [f64; 6] = [0.01, 0.1, 0.5, 1.0, 3.0, 5.0];

/// Seconds; istiod's bounds of `pilot_debounce_time` and `pilot_xds_push_time`.
const PUSH_BOUNDS: [f64; 9] = [0.01, 0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0];

/// Seconds; istiod's bounds of `pilot_proxy_queue_time` and `pilot_proxy_convergence_time`.
const PROXY_BOUNDS: [f64; 8] = [0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0];

/// Seconds; istiod's bounds of `pilot_xds_send_time`.
const SEND_BOUNDS: [f64; 8] = [0.01, 0.1, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0];

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
    /// Bytes of the largest request.
    largest_request: AtomicUsize,
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

    /// The turn of a proxy, connected since then, has come to get a snapshot; whether it has other services than before.
    pub(crate) fn dequeued(&self, revision: u64, since: Instant) -> bool {
        let mut has_other_services = false;
        self.times(revision, since, |published| {
            has_other_services = published.reasons.contains_key("service");
            let help = "Time in seconds, a proxy is in the push queue before being dequeued.";
            let waited = published.at.elapsed().as_secs_f64();
            self.registry.histogram("pilot_proxy_queue_time", help, &PROXY_BOUNDS, &[]).observe(waited);
            let help = "Total number of times a push was triggered, labeled by reason for the push.";
            for (reason, times) in &published.reasons {
                self.registry.counter("pilot_push_triggers", help, &[("type", *reason)]).add(*times);
            }
        });
        has_other_services
    }

    /// A proxy that no service leads to.
    pub(crate) fn serves_nothing(&self, reason: &str) {
        let help = "Number of proxies that do not have any corresponding service targets.";
        let labels = [("reason", reason)];
        self.registry.counter("pilot_k8s_proxies_with_no_service_targets", help, &labels).increment();
    }

    /// New or changed EndpointSlices speak of so many addresses of pods that are not there.
    pub(crate) fn without_pods(&self, addresses: usize) {
        if addresses == 0 {
            return;
        }
        let help = "Endpoints that does not have any corresponding pods.";
        self.registry.counter("pilot_k8s_endpoints_with_no_pods", help, &[]).add(addresses as u64);
    }

    /// Something between us and the API server of this cluster.
    pub(crate) fn api_server(&self, cluster: &str, notice: &Notice<'_>) {
        let count = |name: &str, help: &str, labels: &[(&str, &str)]| {
            self.registry.counter(name, help, labels).increment();
        };
        match notice {
            Notice::WatchFailed => {
                let help = "Total number of errorMetric syncing controllers.";
                count("controller_sync_errors_total", help, &[("cluster", cluster)]);
            }
            // istiod's label of an attempt is the webhook's name; of the others it is the object's.
            Notice::InjectorWritten { object, result } => {
                let name = ("name", kube_source::INJECTOR);
                count("webhook_patch_attempts_total", "Webhook patching attempts", &[name]);
                if result.is_err() {
                    let labels = [("name", *object), ("reason", "webhook_update_failure")];
                    count("webhook_patch_failures_total", "Webhook patching total failures", &labels);
                    count("webhook_patch_retries_total", "Webhook patching retries", &labels[..1]);
                }
            }
            Notice::InjectorLacksWebhook { object } => {
                let labels = [("name", *object), ("reason", "webhook_entry_not_found")];
                count("webhook_patch_failures_total", "Webhook patching total failures", &labels);
            }
            Notice::ValidatorWritten { result: Ok(()) } => {
                count("galley_validation_config_updates", "k8s webhook configuration updates", &[]);
            }
            Notice::ValidatorWritten { result: Err(reason) } => {
                let labels = [("reason", *reason)];
                count("galley_validation_config_update_error", "k8s webhook configuration update error", &labels);
            }
        }
    }

    /// A proxy, connected since then, uses all of a snapshot.
    pub(crate) fn converged(&self, revision: u64, since: Instant) {
        self.times(revision, since, |published| {
            let help = "Delay in seconds between config change and a proxy receiving all required configuration.";
            let took = published.changed.elapsed().as_secs_f64();
            self.registry.histogram("pilot_proxy_convergence_time", help, &PROXY_BOUNDS, &[]).observe(took);
        });
    }

    /// An object that a webhook judged: group, version and plural of its resource, and why it was refused, as istio
    /// `pkg/webhooks/validation/server/monitoring.go` counts.
    pub(crate) fn validated(&self, [group, version, resource]: [&str; 3], refused: Option<&str>) {
        let (name, help) = match refused {
            None => ("galley_validation_passed", "Resource is valid"),
            Some(_) => ("galley_validation_failed", "Resource validation failed"),
        };
        let labels = [("group", group), ("version", version), ("resource", resource)];
        let labels: Vec<_> = labels.into_iter().chain(refused.map(|reason| ("reason", reason))).collect();
        self.registry.counter(name, help, &labels).increment();
    }

    /// A request to `/validate` that is none.
    pub(crate) fn not_a_review(&self, status: u16) {
        let status = status.to_string();
        let help = "Resource validation http serve errors";
        self.registry.counter("galley_validation_http_error", help, &[("status", &status)]).increment();
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

    /// What happened on the stream of this proxy.
    pub(crate) fn xds(&self, event: &EventKind, node: &Node) {
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
            EventKind::Delivered { took } => {
                let help = "Total time in seconds Pilot takes to send generated configuration.";
                self.registry.histogram("pilot_xds_send_time", help, &SEND_BOUNDS, &[]).observe(took.as_secs_f64());
            }
            EventKind::Larger { bytes } => {
                let most = self.largest_request.fetch_max(*bytes, Ordering::Relaxed).max(*bytes);
                let help = "The maximum size request we have received so far.";
                self.registry.gauge("pilot_xds_recv_max", help, &[]).set(most as f64);
            }
            EventKind::Nacked { type_url, code, .. } => {
                let labels = [("type", short(type_url))];
                let of_type = match &**type_url {
                    type_url::CLUSTER => Some(("pilot_xds_cds_reject", "Pilot rejected CDS configs.")),
                    type_url::ENDPOINT => Some(("pilot_xds_eds_reject", "Pilot rejected EDS.")),
                    type_url::LISTENER => Some(("pilot_xds_lds_reject", "Pilot rejected LDS.")),
                    type_url::ROUTE => Some(("pilot_xds_rds_reject", "Pilot rejected RDS.")),
                    _ => None,
                };
                if let Some((name, help)) = of_type {
                    // As istiod, which sets them and takes none back.
                    let labels = [("err", &*code_name(*code)), ("node", proxy_id(node))];
                    self.registry.gauge(name, help, &labels).set(1.0);
                }
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

/// How istiod calls a proxy: `NAME.NAMESPACE` of `sidecar~ADDRESS~NAME.NAMESPACE~DOMAIN`.
pub(crate) fn proxy_id(node: &Node) -> &str {
    node.id.split('~').nth(2).unwrap_or(&node.id)
}

/// What gRPC's library for Go calls a `google.rpc.Code`.
fn code_name(code: i32) -> Cow<'static, str> {
    const NAMES: [&str; 17] = [
        "OK",
        "Canceled",
        "Unknown",
        "InvalidArgument",
        "DeadlineExceeded",
        "NotFound",
        "AlreadyExists",
        "PermissionDenied",
        "ResourceExhausted",
        "FailedPrecondition",
        "Aborted",
        "OutOfRange",
        "Unimplemented",
        "Internal",
        "Unavailable",
        "DataLoss",
        "Unauthenticated",
    ];
    let known = usize::try_from(code).ok().and_then(|code| NAMES.get(code));
    // The library's type is unsigned.
    known.map_or_else(|| format!("Code({})", code.cast_unsigned()).into(), |name| Cow::Borrowed(*name))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_names_of_gos_library() {
        for (code, name) in [(0, "OK"), (1, "Canceled"), (13, "Internal"), (16, "Unauthenticated"), (17, "Code(17)")] {
            assert_eq!(code_name(code), name);
        }
        assert_eq!(code_name(-1), "Code(4294967295)");
    }

    #[test]
    fn what_happens_with_the_api_server_is_counted() {
        let metrics = Metrics::default();
        let object = "istio-sidecar-injector";
        for notice in [
            Notice::WatchFailed,
            Notice::InjectorWritten { object, result: Ok(()) },
            Notice::InjectorWritten { object, result: Err("Conflict") },
            Notice::InjectorLacksWebhook { object },
            Notice::ValidatorWritten { result: Ok(()) },
            Notice::ValidatorWritten { result: Err("Forbidden") },
        ] {
            metrics.api_server("east", &notice);
        }
        let page = metrics.render();
        for line in [
            "controller_sync_errors_total{cluster=\"east\"} 1",
            "webhook_patch_attempts_total{name=\"sidecar-injector.istio.io\"} 2",
            "webhook_patch_retries_total{name=\"istio-sidecar-injector\"} 1",
            "webhook_patch_failures_total{name=\"istio-sidecar-injector\",reason=\"webhook_update_failure\"} 1",
            "webhook_patch_failures_total{name=\"istio-sidecar-injector\",reason=\"webhook_entry_not_found\"} 1",
            "galley_validation_config_updates 1",
            "galley_validation_config_update_error{reason=\"Forbidden\"} 1",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
    }
}
