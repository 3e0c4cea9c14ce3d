//! istiod's metrics, by its names.

use std::time::Duration;

use ads::server::EventKind;
use config_store::{Kind, Snapshot};
use envoy_api::type_url;
use lifecycle::metrics::Registry;

/// Seconds; istiod's bounds of `pilot_proxy_convergence_time`.
const BOUNDS: [f64; 8] = [0.01, 0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 30.0];

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

/// Counts what happens. Series are made when first used.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    registry: Registry,
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
    }

    pub(crate) fn config_event(&self, kind: Kind, event: &str) {
        let labels = [("type", kind.as_str()), ("event", event)];
        self.registry.counter("pilot_k8s_cfg_events", "Events from k8s config.", &labels).increment();
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
                &BOUNDS,
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

    pub(crate) fn connected(&self, count: usize) {
        self.registry
            .gauge("pilot_xds", "Number of endpoints connected to this pilot using XDS.", &[])
            .set(count as f64);
    }

    pub(crate) fn xds(&self, event: &EventKind) {
        match event {
            EventKind::Sent { type_url, bytes, .. } => {
                let labels = [("type", short(type_url))];
                self.registry
                    .counter("pilot_xds_pushes", "Pilot build and send errors for lds, rds, cds and eds.", &labels)
                    .increment();
                self.registry
                    .counter("pilot_xds_config_size_bytes_total", "Bytes of configuration pushed to clients.", &labels)
                    .add(*bytes as u64);
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

    /// A request for a certificate, of a caller who is known.
    pub(crate) fn csr(&self) {
        self.registry
            .counter("citadel_server_csr_count", "The number of CSRs received by Citadel server.", &[])
            .increment();
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
