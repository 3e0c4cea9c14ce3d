use std::sync::Arc;

use mesh_types::ArcStr;

use crate::access_log::AccessLog;
use crate::fields;
use crate::format::{FormatContext, FormatString};
use crate::headers::Headers;
use crate::matchers::{HeaderMatcher, header_matchers};
use crate::metadata::FilterState;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::route::HeaderOps;

/// The router's own settings.
#[derive(Debug, Default)]
pub struct RouterConfig {
    /// Keep statistics of routes and codes.
    pub dynamic_stats: bool,
    /// Do not add Envoy's headers to requests and responses.
    pub suppress_envoy_headers: bool,
    /// A span for the upstream request.
    pub start_child_span: bool,
    /// Headers that make a request fail if they are malformed.
    pub strict_check_headers: Vec<ArcStr>,
    /// Take the timeout of `x-envoy-expected-rq-timeout-ms`.
    pub respect_expected_rq_timeout: bool,
    /// Logs of upstream requests.
    pub upstream_log: Vec<Arc<AccessLog>>,
}

impl RouterConfig {
    pub(super) fn compile(router: &pb::http_filter::router::v3::Router) -> Compiled<Self> {
        let codec = "envoy.filters.http.upstream_codec";
        if let Some(other) = router.upstream_http_filters.iter().find(|f| f.name != codec) {
            return Err(Invalid::new("upstream_http_filters", format!("{} is not supported", other.name)));
        }
        Ok(Self {
            dynamic_stats: fields::flag(router.dynamic_stats.as_ref(), true),
            suppress_envoy_headers: router.suppress_envoy_headers,
            start_child_span: router.start_child_span,
            strict_check_headers: router.strict_check_headers.iter().map(|h| h.to_ascii_lowercase().into()).collect(),
            respect_expected_rq_timeout: router.respect_expected_rq_timeout,
            upstream_log: AccessLog::compile_all(&router.upstream_log, &crate::Options::default())
                .at("upstream_log")?,
        })
    }

    /// The first strictly checked header that is malformed (flag IH, status 400, details
    /// `request_headers_failed_strict_check{NAME}`).
    pub fn malformed<'a>(&'a self, headers: &Headers) -> Option<&'a ArcStr> {
        self.strict_check_headers.iter().find(|name| {
            let Some(value) = headers.get_str(name) else { return false };
            match &***name {
                "x-envoy-retry-on" | "x-envoy-retry-grpc-on" => false,
                _ => value.trim().parse::<u64>().is_err(),
            }
        })
    }
}

/// Changes of headers by a filter.
#[derive(Clone, Debug, Default)]
pub struct HeaderMutation {
    /// Of the request.
    pub request: HeaderChanges,
    /// Of the response.
    pub response: HeaderChanges,
}

/// Changes that are made one after the other.
#[derive(Clone, Debug, Default)]
pub struct HeaderChanges(Vec<HeaderOps>);

impl HeaderChanges {
    /// Changes a request; formats see it as it is then.
    pub fn apply_to_request(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        for ops in &self.0 {
            ops.apply_to_request(headers, cx);
        }
    }

    /// Changes a response; formats see it as it is then.
    pub fn apply_to_response(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        for ops in &self.0 {
            ops.apply_to_response(headers, cx);
        }
    }
}

impl HeaderMutation {
    pub(super) fn compile(mutations: Option<&pb::http_filter::header_mutation::v3::Mutations>) -> Compiled<Self> {
        let Some(mutations) = mutations else { return Ok(Self::default()) };
        refuse! {
            "query_parameter_mutations": !mutations.query_parameter_mutations.is_empty(),
            "request_trailers_mutations": !mutations.request_trailers_mutations.is_empty(),
            "response_trailers_mutations": !mutations.response_trailers_mutations.is_empty(),
        }
        Ok(Self {
            request: HeaderChanges(HeaderOps::compile_mutations(&mutations.request_mutations).at("request_mutations")?),
            response: HeaderChanges(
                HeaderOps::compile_mutations(&mutations.response_mutations).at("response_mutations")?,
            ),
        })
    }
}

/// Answers health checks of this proxy.
#[derive(Clone, Debug)]
pub struct HealthCheckFilter {
    pass_through: bool,
    headers: Box<[HeaderMatcher]>,
}

impl HealthCheckFilter {
    pub(super) fn compile(check: &pb::http_filter::health_check::v3::HealthCheck) -> Compiled<Self> {
        refuse! {
            "cache_time": check.cache_time.is_some(),
            "cluster_min_healthy_percentages": !check.cluster_min_healthy_percentages.is_empty(),
        }
        Ok(Self {
            pass_through: fields::flag(check.pass_through_mode.as_ref(), false),
            headers: header_matchers("headers", &check.headers)?,
        })
    }

    /// The status with which a check is answered here; `None`: it is no check, or it passes through. `failed`: the
    /// operator has set the proxy to fail its checks.
    pub fn answer(&self, headers: &Headers, failed: bool) -> Option<u16> {
        if !self.headers.iter().all(|m| m.matches(headers)) || (self.pass_through && !failed) {
            return None;
        }
        Some(if failed { 503 } else { 200 })
    }
}

/// A value that a filter writes into filter state.
#[derive(Clone, Debug)]
pub struct FilterStateValue {
    key: ArcStr,
    value: FormatString,
    skip_if_empty: bool,
}

impl FilterStateValue {
    pub(crate) fn compile_all(
        values: &[pb::ext::filters::common::set_filter_state::v3::FilterStateValue],
    ) -> Compiled<Arc<[Self]>> {
        use pb::ext::filters::common::set_filter_state::v3::filter_state_value::{Key, Value};
        values
            .iter()
            .map(|value| {
                let Some(Key::ObjectKey(key)) = &value.key else {
                    return Err(Invalid::new("object_key", "is missing"));
                };
                let Some(Value::FormatString(format)) = &value.value else {
                    return Err(Invalid::new("format_string", "is missing"));
                };
                Ok(Self {
                    key: key.as_str().into(),
                    value: FormatString::compile(format).at("format_string")?,
                    skip_if_empty: value.skip_if_empty,
                })
            })
            .collect()
    }

    /// Writes it.
    pub fn apply(&self, cx: &FormatContext<'_>, state: &mut FilterState) {
        let mut value = Vec::new();
        self.value.write(cx, &mut value);
        if !value.is_empty() || !self.skip_if_empty {
            state.0.insert(self.key.clone(), String::from_utf8_lossy(&value).into());
        }
    }
}
