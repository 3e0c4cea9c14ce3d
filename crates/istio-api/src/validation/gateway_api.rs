use super::{Check, text};
use crate::Violation;
use crate::gateway_api::{
    BackendKind, BackendRef, Filter, GrpcRoute, HeaderFilter, HttpRoute, NamedMatch, ParentReference, PathMatchType,
    ValueMatchType,
};
use crate::wire::Duration;

/// Filters that rules of an HTTPRoute may have, of those that proxies understand.
const HTTP_FILTERS: [&str; 6] =
    ["RequestHeaderModifier", "ResponseHeaderModifier", "RequestRedirect", "RequestMirror", "URLRewrite", "CORS"];
/// Filters that rules of a GRPCRoute may have.
const GRPC_FILTERS: [&str; 3] = ["RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror"];
/// Filters of a single backend.
const BACKEND_FILTERS: [&str; 2] = ["RequestHeaderModifier", "ResponseHeaderModifier"];

impl HttpRoute {
    /// Why istiod would route nothing (`convertHTTPRoute`), or what Envoy would refuse. Routes of gateways alone are
    /// none of our business.
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            if !of_mesh(check, &self.parent_refs) {
                return;
            }
            check.each("rules", &self.rules, |check, rule| {
                check.each("matches", &rule.matches, |check, item| {
                    check.some("path", &item.path, |check, path| {
                        let value = path.value.as_deref().unwrap_or("/");
                        check.at("value", |check| match path.r#type {
                            PathMatchType::RegularExpression => check.refuse(text::regex(value)),
                            _ => check.require(value.starts_with('/'), "must start with /"),
                        });
                    });
                    named(check, "headers", &item.headers);
                    check.each("queryParams", &item.query_params, |check, item| {
                        check.require(!item.name.is_empty(), "name must be set");
                        value(check, item);
                    });
                });
                filters(check, &rule.filters, &HTTP_FILTERS);
                check.each("backendRefs", &rule.backend_refs, backend);
                check.some("timeouts", &rule.timeouts, |check, timeouts| {
                    not_negative(check, "request", timeouts.request);
                    not_negative(check, "backendRequest", timeouts.backend_request);
                });
                check.some("retry", &rule.retry, |check, retry| {
                    check.each("codes", &retry.codes, |check, code| {
                        check.require((400..600).contains(code), "must be a status code of an error");
                    });
                    not_negative(check, "backoff", retry.backoff);
                });
            });
        })
    }
}

impl GrpcRoute {
    /// As [`HttpRoute::validate`] (istiod `convertGRPCRoute`).
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            if !of_mesh(check, &self.parent_refs) {
                return;
            }
            check.each("rules", &self.rules, |check, rule| {
                check.each("matches", &rule.matches, |check, item| {
                    check.some("method", &item.method, |check, method| {
                        let given = method.service.is_some() || method.method.is_some();
                        check.require(given, "gRPC match must have method or service defined");
                        if method.r#type == ValueMatchType::RegularExpression {
                            for (field, pattern) in [("service", &method.service), ("method", &method.method)] {
                                check.some(field, pattern, |check, pattern| check.refuse(text::regex(pattern)));
                            }
                        }
                    });
                    named(check, "headers", &item.headers);
                });
                filters(check, &rule.filters, &GRPC_FILTERS);
                check.each("backendRefs", &rule.backend_refs, backend);
            });
        })
    }
}

/// Whether any parent is of a mesh.
fn of_mesh(check: &mut Check, parents: &[ParentReference]) -> bool {
    check.each("parentRefs", parents, |check, parent| {
        if let (Some(_), Some(port)) = (parent.mesh_parent(), parent.port) {
            check.port("port", port);
        }
    });
    parents.iter().any(|parent| parent.mesh_parent().is_some())
}

fn named(check: &mut Check, field: &str, matches: &[NamedMatch]) {
    check.each(field, matches, |check, item| {
        check.at("name", |check| check.refuse(text::header_name(&item.name)));
        value(check, item);
    });
}

fn value(check: &mut Check, item: &NamedMatch) {
    if item.r#type == ValueMatchType::RegularExpression {
        check.at("value", |check| check.refuse(text::regex(&item.value)));
    }
}

fn not_negative(check: &mut Check, field: &str, duration: Option<Duration>) {
    let negative = duration.is_some_and(|duration| duration.as_nanos() < 0);
    check.at(field, |check| check.require(!negative, "must not be negative"));
}

fn filters(check: &mut Check, filters: &[Filter], known: &[&str]) {
    check.each("filters", filters, |check, filter| {
        if !known.contains(&filter.r#type.as_str()) {
            check.at("type", |check| check.error(format!("unsupported filter type {:?}", filter.r#type)));
            return;
        }
        check.some("requestHeaderModifier", &filter.request_header_modifier, headers);
        check.some("responseHeaderModifier", &filter.response_header_modifier, headers);
        check.some("requestMirror", &filter.request_mirror, |check, mirror| {
            check.at("backendRef", |check| backend(check, &mirror.backend_ref));
            check.some("fraction", &mirror.fraction, |check, fraction| {
                check.require(fraction.denominator != Some(0), "denominator must not be 0");
            });
        });
        check.some("requestRedirect", &filter.request_redirect, |check, redirect| {
            check.some("statusCode", &redirect.status_code, |check, code| {
                check.require(matches!(code, 301 | 302 | 303 | 307 | 308), "must be 301, 302, 303, 307 or 308");
            });
            check.some("scheme", &redirect.scheme, |check, scheme| {
                check.require(matches!(scheme.as_str(), "http" | "https"), "must be http or https");
            });
            if let Some(port) = redirect.port {
                check.port("port", port);
            }
        });
        check.some("cors", &filter.cors, |check, cors| {
            for (field, names) in [("allowHeaders", &cors.allow_headers), ("exposeHeaders", &cors.expose_headers)] {
                check.each(field, names, |check, name| {
                    if name != "*" {
                        check.refuse(text::header_name(name));
                    }
                });
            }
        });
    });
}

fn headers(check: &mut Check, filter: &HeaderFilter) {
    for (field, list) in [("set", &filter.set), ("add", &filter.add)] {
        check.each(field, list, |check, header| {
            check.at("name", |check| check.refuse(text::header_name(&header.name)));
            // Envoy reads commands such as `%PROTOCOL%` in values.
            check.at("value", |check| check.refuse(text::header_value(&header.value)));
        });
    }
    check.each("remove", &filter.remove, |check, name| check.refuse(text::header_name(name)));
}

fn backend(check: &mut Check, backend: &BackendRef) {
    match backend.backend_kind() {
        BackendKind::Service => check.at("name", |check| {
            check.require(!backend.name.is_empty(), "must be set");
            check.require(
                !backend.name.contains('.'),
                "service name invalid; the name of the Service must be used, not the hostname",
            );
        }),
        BackendKind::Hostname => {
            check.at("namespace", |check| {
                check.require(backend.namespace.is_none(), "may not be set with Hostname type");
            });
            check.at("name", |check| check.refuse(text::fqdn(&backend.name)));
        }
        BackendKind::Unknown => {
            let (group, kind) = (backend.group.as_deref().unwrap_or_default(), backend.kind.as_deref());
            let kind = kind.unwrap_or_default();
            check.warning(format!("referencing unsupported backendRef: group {group:?} kind {kind:?}"));
            return;
        }
    }
    match backend.port {
        None => check.error("port is required in backendRef"),
        Some(port) => check.port("port", port),
    }
    check.at("weight", |check| {
        check.require(backend.weight.is_none_or(|weight| weight <= 1_000_000), "must be at most 1000000");
    });
    filters(check, &backend.filters, &BACKEND_FILTERS);
}
