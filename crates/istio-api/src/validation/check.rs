//! Collects violations under a path that follows the walk through a resource.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

use super::text;
use crate::destination_rule::TlsMode;
use crate::selector::{PolicyTargetReference, WorkloadSelector};
use crate::wire::Duration;
use crate::{Severity, Violation};

/// The walk: where it is, and what it found.
pub(super) struct Check {
    path: String,
    found: Vec<Violation>,
}

impl Check {
    /// Walks a resource from its root field, such as `spec`.
    pub(super) fn walk(root: &str, walk: impl FnOnce(&mut Self)) -> Vec<Violation> {
        let mut check = Self { path: root.to_owned(), found: Vec::new() };
        walk(&mut check);
        check.found
    }

    /// Descends into a field.
    pub(super) fn at(&mut self, field: impl Display, inside: impl FnOnce(&mut Self)) {
        let length = self.path.len();
        let dot = if self.path.is_empty() { "" } else { "." };
        // Writing to a String cannot fail.
        let _ = write!(self.path, "{dot}{field}");
        inside(self);
        self.path.truncate(length);
    }

    /// Descends into a field of which nothing is refused.
    pub(super) fn leniently(&mut self, field: impl Display, inside: impl FnOnce(&mut Self)) {
        let before = self.found.len();
        self.at(field, inside);
        for violation in &mut self.found[before..] {
            violation.severity = Severity::Warning;
        }
    }

    /// Descends into each item of a list field.
    pub(super) fn each<'t, T>(&mut self, field: &str, items: &'t [T], mut inside: impl FnMut(&mut Self, &'t T)) {
        for (index, item) in items.iter().enumerate() {
            self.at(format_args!("{field}[{index}]"), |check| inside(check, item));
        }
    }

    /// Descends into each value of a mapping field.
    pub(super) fn entries<T>(
        &mut self,
        field: &str,
        entries: &BTreeMap<String, T>,
        mut inside: impl FnMut(&mut Self, &str, &T),
    ) {
        for (key, value) in entries {
            self.at(format_args!("{field}[\"{key}\"]"), |check| inside(check, key, value));
        }
    }

    /// Descends into a field that is set.
    pub(super) fn some<T>(&mut self, field: &str, value: &Option<T>, inside: impl FnOnce(&mut Self, &T)) {
        if let Some(value) = value {
            self.at(field, |check| inside(check, value));
        }
    }

    /// The resource cannot be used.
    pub(super) fn error(&mut self, message: impl Into<String>) {
        self.found.push(Violation { path: self.path.clone(), message: message.into(), severity: Severity::Error });
    }

    /// The resource is used all the same.
    pub(super) fn warning(&mut self, message: impl Into<String>) {
        self.found.push(Violation { path: self.path.clone(), message: message.into(), severity: Severity::Warning });
    }

    /// An error unless `ok`.
    pub(super) fn require(&mut self, ok: bool, message: &str) {
        if !ok {
            self.error(message);
        }
    }

    /// An error if there is a reason for one.
    pub(super) fn refuse(&mut self, reason: Result<(), String>) {
        if let Err(reason) = reason {
            self.error(reason);
        }
    }

    /// At most one of some fields of a protobuf `oneof`.
    pub(super) fn one_of(&mut self, fields: &[(&str, bool)]) {
        let set: Vec<_> = fields.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
        if set.len() > 1 {
            self.error(format!("only one of {} can be set", set.join(", ")));
        }
    }

    /// istiod `ValidatePort`.
    pub(super) fn port(&mut self, field: &str, port: impl Into<i64>) {
        let port = port.into();
        if !(1..=65535).contains(&port) {
            self.at(field, |check| check.error(format!("port number {port} must be in the range 1..65535")));
        }
    }

    /// istiod `ValidateDuration`: at least a millisecond, and no finer.
    pub(super) fn duration(&mut self, field: &str, duration: Option<Duration>) {
        let Some(duration) = duration else { return };
        if duration < Duration::from_millis(1) {
            self.at(field, |check| check.error(format!("duration {duration} must be greater than 1ms")));
        } else if duration.as_nanos() % 1_000_000 != 0 {
            self.at(field, |check| {
                check.error(format!("duration {duration}: only durations to ms precision are supported"))
            });
        }
    }

    /// istiod `labels.Instance.Validate`.
    pub(super) fn labels(&mut self, field: &str, labels: &BTreeMap<String, String>) {
        self.entries(field, labels, |check, key, value| {
            check.require(text::is_label_key(key), "is not a valid label key");
            check.require(text::is_label_value(value), "is not a valid label value");
        });
    }

    /// istiod `ValidateAlphaWorkloadSelector` and `validateWorkloadSelector`: both kinds of selector.
    pub(super) fn selector_labels(&mut self, labels: &BTreeMap<String, String>) {
        if labels.is_empty() {
            self.warning("workload selector specified without labels: it selects every workload of the namespace");
        }
        for (key, value) in labels {
            self.require(!key.is_empty(), "empty key is not supported in selector");
            if key.contains('*') || value.contains('*') {
                self.error(format!("wildcard is not supported in selector: \"{key}={value}\""));
            }
        }
    }

    /// The ways a policy says whom it is for.
    pub(super) fn targets(
        &mut self,
        selector: &Option<WorkloadSelector>,
        target: &Option<PolicyTargetReference>,
        targets: &[PolicyTargetReference],
    ) {
        let set = usize::from(selector.is_some()) + usize::from(target.is_some()) + usize::from(!targets.is_empty());
        self.require(set <= 1, "only one of targetRefs or workloadSelector can be set");
        self.some("selector", selector, |check, selector| {
            check.at("matchLabels", |check| check.selector_labels(&selector.match_labels));
        });
        self.some("targetRef", target, Self::target);
        self.each("targetRefs", targets, Self::target);
    }

    fn target(&mut self, target: &PolicyTargetReference) {
        const ALLOWED: [(&str, &str); 5] = [
            ("", "Service"),
            ("core", "Service"),
            ("networking.istio.io", "ServiceEntry"),
            ("gateway.networking.k8s.io", "Gateway"),
            ("gateway.networking.k8s.io", "GatewayClass"),
        ];
        self.require(!target.name.is_empty(), "name must be set");
        self.require(
            target.namespace.is_empty(),
            "namespace must not be set; cross namespace referencing is not supported",
        );
        if !ALLOWED.contains(&(target.group.as_str(), target.kind.as_str())) {
            let message = format!(
                "must be to a Service, ServiceEntry, Gateway or GatewayClass, not {}/{}",
                target.group, target.kind
            );
            self.error(message);
        }
    }

    /// istiod `validateExportTo`.
    pub(super) fn export_to(&mut self, namespace: &str, export_to: &[String], none_allowed: bool) {
        let mut seen: Vec<&str> = Vec::new();
        self.each("exportTo", export_to, |check, entry| {
            let target = if entry == "." { namespace } else { entry.as_str() };
            if seen.contains(&target) {
                check.error(format!("duplicate entry {entry:?}"));
            } else if target != "*" && !(target == "~" && none_allowed) && !text::is_dns_label(target) {
                check.error(format!(
                    "only ., *, {}or a namespace is allowed, not {entry:?}",
                    if none_allowed { "~ " } else { "" }
                ));
            }
            seen.push(target);
        });
        if seen.len() > 1 {
            self.at("exportTo", |check| {
                check.require(!seen.contains(&"*"), "cannot have both public (*) and non-public values");
                check.require(!seen.contains(&"~"), "cannot export to no one (~) and someone");
            });
        }
    }

    /// istiod `ValidateTLS`.
    pub(super) fn client_tls(&mut self, tls: &crate::destination_rule::ClientTlsSettings) {
        let given = !tls.credential_name.is_empty();
        if tls.insecure_skip_verify == Some(true) {
            let by_name = tls.mode == TlsMode::Simple && given;
            let checked = !tls.ca_certificates.is_empty() || !tls.subject_alt_names.is_empty() || by_name;
            self.require(
                !checked || !matches!(tls.mode, TlsMode::Simple | TlsMode::Mutual),
                "cannot specify caCertificates, credentialName or subjectAltNames when insecureSkipVerify is set true",
            );
        }
        if given && matches!(tls.mode, TlsMode::Simple | TlsMode::Mutual) {
            self.require(
                tls.ca_certificates.is_empty() && tls.ca_crl.is_empty(),
                "cannot specify CA certificates or a CRL when credentialName is set",
            );
            self.require(
                tls.client_certificate.is_empty() && tls.private_key.is_empty(),
                "cannot specify client certificates or private key when credentialName is set",
            );
        } else if tls.mode == TlsMode::Mutual {
            self.require(!tls.client_certificate.is_empty(), "client certificate required for mutual tls");
            self.require(!tls.private_key.is_empty(), "private key required for mutual tls");
        }
    }
}
