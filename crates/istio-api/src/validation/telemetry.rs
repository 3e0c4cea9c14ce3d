use super::{Check, cel};
use crate::envoy_filter::{ApplyTo, EnvoyConfigObjectPatch, EnvoyFilter, FilterMatch, Operation, PatchContext};
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
                check.some("filter", &logging.filter, |check, filter| {
                    check.at("expression", |check| check.refuse(cel::syntax(&filter.expression)));
                });
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
    /// What istiod would refuse or warn of (`ValidateEnvoyFilter`), except of the values, which are Envoy's messages.
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
    if config.r#match.as_ref().is_some_and(|item| item.context == PatchContext::Waypoint) {
        return;
    }
    if config.apply_to == ApplyTo::Invalid {
        return check.at("applyTo", |check| check.error("missing applyTo"));
    }
    let Some(patch) = &config.patch else { return check.at("patch", |check| check.error("missing patch")) };
    if patch.operation == Operation::Invalid {
        return check.at("patch.operation", |check| check.error("missing patch operation"));
    }
    if patch.operation != Operation::Remove && patch.value.is_none() {
        return check.at("patch", |check| check.error("missing patch value for non-remove operation"));
    }
    check.some("match", &config.r#match, |check, item| {
        let own = [
            ("listener", item.listener.is_some()),
            ("routeConfiguration", item.route_configuration.is_some()),
            ("cluster", item.cluster.is_some()),
            ("waypoint", item.waypoint.is_some()),
        ];
        check.one_of(&own);
        check.some("proxy", &item.proxy, |check, proxy| {
            check.at("proxyVersion", |check| match proxy.proxy_version.len() {
                0 => {}
                1..=1024 => check.refuse(super::text::regex(&proxy.proxy_version)),
                _ => check.warning("has more than 1024 characters and matches nothing"),
            });
        });
        let wanted = match config.apply_to {
            ApplyTo::Listener | ApplyTo::FilterChain | ApplyTo::NetworkFilter | ApplyTo::HttpFilter => "listener",
            ApplyTo::RouteConfiguration | ApplyTo::VirtualHost | ApplyTo::HttpRoute => "routeConfiguration",
            ApplyTo::Cluster => "cluster",
            _ => return,
        };
        if let Some((other, _)) = own.iter().find(|(name, set)| *set && *name != wanted) {
            check.at(other, |check| check.error(format!("applyTo {} takes a {wanted} match only", config.apply_to)));
        }
        let chain = item.listener.as_ref().filter(|_| wanted == "listener").and_then(|l| l.filter_chain.as_ref());
        let Some(filter) = chain.and_then(|chain| chain.filter.as_ref()) else { return };
        check.at("listener.filterChain.filter", |check| filter_match(check, config.apply_to, filter));
    });
}

fn filter_match(check: &mut Check, apply_to: ApplyTo, filter: &FilterMatch) {
    if matches!(apply_to, ApplyTo::Listener | ApplyTo::FilterChain) {
        check.warning(format!("has no effect with applyTo {apply_to}"));
    }
    if filter.name.is_empty() {
        return check.error("filter match has no name to match on");
    }
    let Some(sub_filter) = &filter.sub_filter else { return };
    let manager = ["envoy.filters.network.http_connection_manager", "envoy.http_connection_manager"];
    check.at("subFilter", |check| {
        if apply_to != ApplyTo::HttpFilter {
            check.error("subfilter match can be used with applyTo HTTP_FILTER only");
        } else if !manager.contains(&filter.name.as_str()) {
            check.error(format!("subfilter match requires a filter match with {}", manager[0]));
        } else if sub_filter.name.is_empty() {
            check.error("subfilter match has no name to match on");
        }
    });
}
