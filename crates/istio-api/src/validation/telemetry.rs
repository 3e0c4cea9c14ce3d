use super::Check;
use crate::envoy_filter::{ApplyTo, EnvoyConfigObjectPatch, EnvoyFilter, Operation};
use crate::proxy_config::ProxyConfig;
use crate::telemetry::{ProviderRef, TagOperation, Telemetry};
use crate::{Gateway, Violation};

impl Telemetry {
    /// What istiod would refuse or warn of (`ValidateTelemetry`).
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            check.targets(&self.selector, &self.target_ref, &self.target_refs);
            if self.tracing.len() > 1 {
                check.at("tracing", |check| check.warning("multiple tracing is not currently supported"));
            }
            check.each("tracing", &self.tracing, |check, tracing| {
                if tracing.providers.len() > 1 {
                    check.at("providers", |check| check.warning("multiple providers is not currently supported"));
                }
                providers(check, &tracing.providers);
                let percentage = tracing.random_sampling_percentage.unwrap_or_default();
                check.at("randomSamplingPercentage", |check| {
                    check.require((0.0..=100.0).contains(&percentage), "must be in range [0.0, 100.0]");
                });
                check.entries("customTags", &tracing.custom_tags, |check, name, tag| {
                    check.require(!name.is_empty(), "tag name may not be empty");
                    check.require(
                        tag.literal.as_ref().is_none_or(|tag| !tag.value.is_empty()),
                        "literal tag value may not be empty",
                    );
                    check.require(
                        tag.header.as_ref().is_none_or(|tag| !tag.name.is_empty()),
                        "header tag name may not be empty",
                    );
                    check.require(
                        tag.environment.as_ref().is_none_or(|tag| !tag.name.is_empty()),
                        "environment tag name may not be empty",
                    );
                });
            });
            check.each("metrics", &self.metrics, |check, metrics| {
                providers(check, &metrics.providers);
                check.each("overrides", &metrics.overrides, |check, item| {
                    check.entries("tagOverrides", &item.tag_overrides, |check, _, tag| match tag.operation {
                        TagOperation::Upsert => {
                            check.require(!tag.value.is_empty(), "value must be set when operation is UPSERT")
                        }
                        TagOperation::Remove => {
                            check.require(tag.value.is_empty(), "value may only be set when operation is UPSERT")
                        }
                    });
                    check.some("match", &item.r#match, |check, selector| {
                        check.one_of(&[
                            ("metric", selector.metric.is_some()),
                            ("customMetric", selector.custom_metric.is_some()),
                        ]);
                        check.require(selector.custom_metric.as_deref() != Some(""), "customMetric may not be empty");
                    });
                });
            });
            check.each("accessLogging", &self.access_logging, |check, logging| {
                providers(check, &logging.providers);
                let empty = logging.filter.as_ref().is_some_and(|filter| filter.expression.trim().is_empty());
                check.at("filter.expression", |check| check.require(!empty, "must be a valid CEL expression"));
            });
        })
    }
}

fn providers(check: &mut Check, providers: &[ProviderRef]) {
    check.each("providers", providers, |check, provider| {
        check.require(!provider.name.is_empty(), "name may not be empty")
    });
}

impl ProxyConfig {
    /// What istiod would refuse or warn of (`ValidateProxyConfig`).
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            check.some("selector", &self.selector, |check, selector| {
                check.at("matchLabels", |check| check.selector_labels(&selector.match_labels));
            });
            check.require(
                self.concurrency.is_none_or(|concurrency| concurrency >= 0),
                "concurrency must be greater than or equal to 0",
            );
        })
    }
}

impl Gateway {
    /// Gateways are out of our scope; what names them is not refused on their account.
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| check.require(!self.servers.is_empty(), "gateway must have at least one server"))
    }
}

impl EnvoyFilter {
    /// What istiod would refuse or warn of (`ValidateEnvoyFilter`), as far as it does not need Envoy's messages.
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            check.require(
                usize::from(self.workload_selector.is_some()) + usize::from(!self.target_refs.is_empty()) <= 1,
                "only one of targetRefs or workloadSelector can be set",
            );
            check.some("workloadSelector", &self.workload_selector, |check, selector| {
                check.at("labels", |check| check.selector_labels(&selector.labels));
            });
            check.each("configPatches", &self.config_patches, config_patch);
        })
    }
}

fn config_patch(check: &mut Check, config: &EnvoyConfigObjectPatch) {
    if config.apply_to == ApplyTo::Invalid {
        check.at("applyTo", |check| check.error("missing applyTo"));
    }
    let Some(patch) = &config.patch else { return check.at("patch", |check| check.error("missing patch")) };
    check.at("patch", |check| {
        match patch.operation {
            Operation::Invalid => check.at("operation", |check| check.error("missing patch operation")),
            Operation::Remove => {
                check.require(patch.value.is_none(), "patch value must not be set for remove operations")
            }
            _ => check.require(patch.value.is_some(), "missing patch value for non-remove operation"),
        }
        let filters = matches!(config.apply_to, ApplyTo::HttpFilter | ApplyTo::NetworkFilter | ApplyTo::ListenerFilter);
        let ordered =
            matches!(patch.operation, Operation::InsertBefore | Operation::InsertAfter | Operation::InsertFirst);
        let routes = matches!(config.apply_to, ApplyTo::HttpRoute);
        check.require(!ordered || filters || routes, "insert operations apply to filters and routes only");
    });
    check.some("match", &config.r#match, |check, item| {
        check.one_of(&[
            ("listener", item.listener.is_some()),
            ("routeConfiguration", item.route_configuration.is_some()),
            ("cluster", item.cluster.is_some()),
            ("waypoint", item.waypoint.is_some()),
        ]);
        check.some("proxy", &item.proxy, |check, proxy| {
            if !proxy.proxy_version.is_empty() {
                check.at("proxyVersion", |check| check.refuse(super::text::regex(&proxy.proxy_version)));
            }
        });
    });
}
