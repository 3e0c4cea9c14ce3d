use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_types::ArcStr;

use crate::access_log::AccessLog;
use crate::fields;
use crate::format::{Format, FormatContext, FormatString, percent_decode};
use crate::headers::Headers;
use crate::matchers::{HeaderMatcher, header_matchers};
use crate::metadata::FilterState;
use crate::pb;
use crate::pb::core::key_value_append::KeyValueAppendAction;
use crate::rejected::{At, Compiled, Invalid};
use crate::retry::RetryRuntime;
use crate::route::HeaderOps;
use crate::runtime::Runtime;

/// The router's own settings.
#[derive(Debug, Default)]
pub struct RouterConfig {
    /// Keep statistics of routes and codes.
    pub dynamic_stats: bool,
    /// The codes of answers to calls of gRPC are not counted.
    pub suppress_grpc_codes: bool,
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
    /// They get a record when a request has its connection, too.
    pub upstream_log_on_stream: bool,
    /// What the runtime says about retries.
    pub retries: RetryRuntime,
}

impl RouterConfig {
    pub(super) fn compile(router: &pb::http_filter::router::v3::Router, runtime: &Runtime) -> Compiled<Self> {
        const CHECKED: [&str; 5] = [
            "x-envoy-upstream-rq-timeout-ms",
            "x-envoy-upstream-rq-per-try-timeout-ms",
            "x-envoy-max-retries",
            "x-envoy-retry-grpc-on",
            "x-envoy-retry-on",
        ];
        let codec = "envoy.filters.http.upstream_codec";
        if let Some(other) = router.upstream_http_filters.iter().find(|f| f.name != codec) {
            return Err(Invalid::new("upstream_http_filters", format!("{} is not supported", other.name)));
        }
        if let Some(other) = router.strict_check_headers.iter().find(|name| !CHECKED.contains(&name.as_str())) {
            return Err(Invalid::new("strict_check_headers", format!("{other:?} is none of {CHECKED:?}")));
        }
        Ok(Self {
            dynamic_stats: fields::flag(router.dynamic_stats.as_ref(), true),
            suppress_grpc_codes: router.suppress_grpc_request_failure_code_stats,
            suppress_envoy_headers: router.suppress_envoy_headers,
            start_child_span: router.start_child_span,
            retries: RetryRuntime::of(runtime),
            strict_check_headers: router.strict_check_headers.iter().map(|h| h.to_ascii_lowercase().into()).collect(),
            respect_expected_rq_timeout: router.respect_expected_rq_timeout,
            upstream_log_on_stream: router
                .upstream_log_options
                .as_ref()
                .is_some_and(|o| o.flush_upstream_log_on_upstream_stream),
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
                "x-envoy-retry-on" => !crate::retry::RetryOn::are_known(value, false),
                "x-envoy-retry-grpc-on" => !crate::retry::RetryOn::are_known(value, true),
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
    /// Of the request's query.
    pub query: QueryChanges,
    /// Of the request's trailers, if it has some.
    pub request_trailers: HeaderChanges,
    /// Of the response's trailers, if it has some.
    pub response_trailers: HeaderChanges,
    /// Of the levels around a route, the innermost comes last, so that its word stands.
    pub most_specific_wins: bool,
}

/// Changes of query parameters.
#[derive(Clone, Debug, Default)]
pub struct QueryChanges(Box<[QueryChange]>);

#[derive(Clone, Debug)]
enum QueryChange {
    Remove(Box<str>),
    Add { key: Box<str>, value: Format, action: KeyValueAppendAction },
}

impl QueryChanges {
    fn compile(mutations: &[pb::core::KeyValueMutation]) -> Compiled<Self> {
        let one = |mutation: &pb::core::KeyValueMutation| {
            let change = match (&mutation.append, mutation.remove.as_str()) {
                (None, key) if !key.is_empty() => QueryChange::Remove(key.into()),
                (Some(append), "") => {
                    let record = append.record.as_ref().ok_or_else(|| Invalid::new("append.record", "is missing"))?;
                    let value = match record.value.as_ref().and_then(|value| value.kind.as_ref()) {
                        Some(pb::ValueKind::StringValue(text)) => text,
                        _ => return Err(Invalid::new("append.record.value", "is no text")),
                    };
                    QueryChange::Add {
                        key: record.key.as_str().into(),
                        value: Format::compile(value, true).at("append.record.value")?,
                        action: KeyValueAppendAction::try_from(append.action)
                            .map_err(|_| Invalid::new("append.action", "is no known value"))?,
                    }
                }
                _ => return Err(Invalid::new("", "one of append and remove must be set")),
            };
            Ok(change)
        };
        let all = mutations.iter().enumerate().map(|(i, m)| one(m).at_index("query_parameter_mutations", i));
        all.collect::<Compiled<_>>().map(Self)
    }

    /// Changes a request's path. As in Envoy (`QueryParamsMulti`), parameters are sorted by name then, and those that were there are
    /// decoded, while new values are encoded.
    pub fn apply(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        if self.0.is_empty() {
            return;
        }
        let Some(whole) = headers.path().map(str::to_owned) else { return };
        let (path, query) = whole.split_once('?').unwrap_or((&whole, ""));
        let mut parameters: BTreeMap<String, Vec<String>> = BTreeMap::new();
        // What is empty at the end is no parameter, unlike what is empty before others.
        let parts = query.strip_suffix('&').unwrap_or(query).split('&');
        for parameter in parts.filter(|_| !query.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            parameters.entry(decoded(key)).or_default().push(decoded(value));
        }
        for change in &self.0 {
            match change {
                QueryChange::Remove(key) => {
                    parameters.remove(&**key);
                }
                QueryChange::Add { key, value, action } => {
                    let known = parameters.contains_key(&**key);
                    let cx = FormatContext { request: Some(headers), ..*cx };
                    let mut text = Vec::new();
                    value.write(&cx, &mut text);
                    let value = encoded(&text);
                    match action {
                        KeyValueAppendAction::AddIfAbsent if known => {}
                        KeyValueAppendAction::OverwriteIfExists if !known => {}
                        KeyValueAppendAction::OverwriteIfExists | KeyValueAppendAction::OverwriteIfExistsOrAdd => {
                            parameters.insert(key.to_string(), vec![value]);
                        }
                        _ => parameters.entry(key.to_string()).or_default().push(value),
                    }
                }
            }
        }
        let pairs =
            parameters.iter().flat_map(|(key, values)| values.iter().map(move |value| format!("{key}={value}")));
        let query = pairs.collect::<Vec<_>>().join("&");
        let new = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        headers.set(":path", new.as_bytes());
    }
}

/// Part of a query without its percent signs. What would not be text then stays as it is.
fn decoded(part: &str) -> String {
    let mut bytes = Vec::with_capacity(part.len());
    percent_decode(part, &mut bytes);
    String::from_utf8(bytes).unwrap_or_else(|_| part.to_owned())
}

/// A value as part of a query (Envoy `PercentEncoding::urlEncode`).
fn encoded(value: &[u8]) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value {
        match byte {
            b'-' | b'_' | b'.' | b'~' => out.push(char::from(*byte)),
            _ if byte.is_ascii_alphanumeric() => out.push(char::from(*byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// Changes that are made one after the other.
#[derive(Clone, Debug, Default)]
pub struct HeaderChanges(Vec<HeaderOps>);

impl HeaderChanges {
    pub(crate) fn compile(mutations: &[pb::mutation::HeaderMutation]) -> Compiled<Self> {
        HeaderOps::compile_mutations(mutations).map(Self)
    }

    /// Changes a request; formats see it as it is then.
    pub fn apply_to_request(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        for ops in &self.0 {
            ops.apply_to_request(headers, cx);
        }
    }

    /// Changes trailers.
    pub fn apply_to_trailers(&self, trailers: &mut Headers, cx: &FormatContext<'_>) {
        for ops in &self.0 {
            ops.apply(trailers, cx);
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
        let changes = |field, mutations: &[_]| HeaderChanges::compile(mutations).at(field);
        Ok(Self {
            query: QueryChanges::compile(&mutations.query_parameter_mutations)?,
            request: changes("request_mutations", &mutations.request_mutations)?,
            response: changes("response_mutations", &mutations.response_mutations)?,
            request_trailers: changes("request_trailers_mutations", &mutations.request_trailers_mutations)?,
            response_trailers: changes("response_trailers_mutations", &mutations.response_trailers_mutations)?,
            most_specific_wins: false,
        })
    }
}

/// Answers health checks of this proxy (Envoy `HealthCheckFilter`).
#[derive(Debug)]
pub struct HealthCheckFilter {
    pass_through: bool,
    headers: Box<[HeaderMatcher]>,
    /// Clusters of which so many percent must be healthy.
    minimum: Vec<(ArcStr, f64)>,
    cache: Option<CachedChecks>,
}

/// The last answer, which stands for others for some time.
#[derive(Debug)]
struct CachedChecks {
    time: Duration,
    last: Mutex<Option<(Instant, u16, bool)>>,
}

/// What the proxy says of its own health.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HealthAnswer {
    /// The status.
    pub status: u16,
    /// Envoy's details.
    pub details: &'static str,
    /// It works, but not as well as it should.
    pub degraded: bool,
}

impl HealthCheckFilter {
    pub(super) fn compile(check: &pb::http_filter::health_check::v3::HealthCheck) -> Compiled<Self> {
        if check.pass_through_mode.is_none() {
            return Err(Invalid::new("pass_through_mode", "is missing"));
        }
        let pass_through = fields::flag(check.pass_through_mode.as_ref(), false);
        let time = fields::duration("cache_time", check.cache_time.as_ref())?.filter(|time| !time.is_zero());
        if time.is_some() && !pass_through {
            return Err(Invalid::new("cache_time", "must not be set without pass_through_mode"));
        }
        let mut minimum: Vec<_> = check
            .cluster_min_healthy_percentages
            .iter()
            .map(|(cluster, percent)| {
                let percent = fields::percent("cluster_min_healthy_percentages", Some(percent), 0.0)?;
                Ok((ArcStr::from(cluster.as_str()), percent))
            })
            .collect::<Compiled<_>>()?;
        minimum.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Self {
            pass_through,
            headers: header_matchers("headers", &check.headers)?,
            minimum,
            cache: time.map(|time| CachedChecks { time, last: Mutex::default() }),
        })
    }

    /// Whether a request is a health check.
    pub fn is_check(&self, headers: &Headers) -> bool {
        self.headers.iter().all(|m| m.matches(headers))
    }

    /// The answer to a check; `None`: it passes through. `failed`: the operator has set the proxy to fail its checks.
    /// `members`: how many hosts of a cluster are healthy, and how many there are; `None`: there is no such cluster.
    pub fn answer(
        &self,
        failed: bool,
        now: Instant,
        members: impl Fn(&str) -> Option<(usize, usize)>,
    ) -> Option<HealthAnswer> {
        let answer = |status, details| Some(HealthAnswer { status, details, degraded: false });
        if failed {
            return answer(503, "health_check_failed");
        }
        if self.pass_through {
            let cache = self.cache.as_ref()?;
            let last = *cache.last.lock().unwrap_or_else(PoisonError::into_inner);
            let (_, status, degraded) = last.filter(|(at, ..)| now.saturating_duration_since(*at) < cache.time)?;
            return Some(HealthAnswer { status, details: "health_check_cached", degraded });
        }
        for (cluster, percent) in &self.minimum {
            let Some((healthy, all)) = members(cluster) else {
                return answer(503, "health_check_failed_no_cluster_found");
            };
            if all == 0 && *percent > 0.0 {
                return answer(503, "health_check_failed_cluster_empty");
            }
            if (healthy as f64) < all as f64 * percent / 100.0 {
                return answer(503, "health_check_failed_cluster_unhealthy");
            }
        }
        let details = if self.minimum.is_empty() { "health_check_ok" } else { "health_check_ok_cluster_healthy" };
        answer(200, details)
    }

    /// Keeps what was answered to a check.
    pub fn remember(&self, status: u16, degraded: bool, now: Instant) {
        if let Some(cache) = &self.cache {
            *cache.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, status, degraded));
        }
    }
}

/// A value that a filter writes into filter state.
#[derive(Clone, Debug)]
pub struct FilterStateValue {
    key: ArcStr,
    value: FormatString,
    skip_if_empty: bool,
    hashable: bool,
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
                // Envoy looks for a factory of that name, of which extensions have more than are known here.
                let factory = if value.factory_key.is_empty() { key } else { &value.factory_key };
                if !["envoy.", "io.istio.", "istio."].iter().any(|start| factory.starts_with(start)) {
                    return Err(Invalid::new("object_key", format!("{factory:?} does not have an object factory")));
                }
                let Some(Value::FormatString(format)) = &value.value else {
                    return Err(Invalid::new("format_string", "is missing"));
                };
                Ok(Self {
                    key: key.as_str().into(),
                    value: FormatString::compile(format).at("format_string")?,
                    skip_if_empty: value.skip_if_empty,
                    hashable: factory == "envoy.hashable_string",
                })
            })
            .collect()
    }

    /// Writes it.
    pub fn apply(&self, cx: &FormatContext<'_>, state: &mut FilterState) {
        let mut value = Vec::new();
        self.value.write(cx, &mut value);
        if !value.is_empty() || !self.skip_if_empty {
            state.values.insert(self.key.clone(), String::from_utf8_lossy(&value).into());
            match self.hashable {
                true => state.hashable.insert(self.key.clone()),
                false => state.hashable.remove(&self.key),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded_and_new_values_encoded() {
        use crate::stream_info::{ConnectionInfo, StreamInfo};
        let changes = QueryChanges(Box::new([QueryChange::Add {
            key: "a".into(),
            value: Format::compile("x y&\u{e9}", true).unwrap(),
            action: KeyValueAppendAction::AppendIfExistsOrAdd,
        }]));
        let info = StreamInfo::new(Arc::new(ConnectionInfo::default()), std::time::UNIX_EPOCH);
        for (path, wanted) in [
            ("/", "/?a=x%20y%26%C3%A9"),
            ("/?", "/?a=x%20y%26%C3%A9"),
            ("/?%61=%2B+%zz&b", "/?a=++%zz&a=x%20y%26%C3%A9&b="),
            ("/?&&b=1&", "/?=&=&a=x%20y%26%C3%A9&b=1"),
            ("/?b=%ff", "/?a=x%20y%26%C3%A9&b=%ff"),
        ] {
            let mut headers = Headers::of([(":path", path)]);
            changes.apply(&mut headers, &FormatContext::new(&info, None, None));
            assert_eq!(headers.path(), Some(wanted), "{path}");
        }
    }

    #[test]
    fn health_is_that_of_clusters_or_of_the_last_answer() {
        let filter = |pass_through, minimum: &[(&str, f64)], time: Option<u64>| HealthCheckFilter {
            pass_through,
            headers: Box::default(),
            minimum: minimum.iter().map(|(name, percent)| ((*name).into(), *percent)).collect(),
            cache: time.map(|t| CachedChecks { time: Duration::from_secs(t), last: Mutex::default() }),
        };
        let now = Instant::now();
        let members = |name: &str| match name {
            "half" => Some((1, 2)),
            "empty" => Some((0, 0)),
            _ => None,
        };
        let details = |f: &HealthCheckFilter, failed| f.answer(failed, now, members).map(|a| (a.status, a.details));
        assert_eq!(details(&filter(false, &[], None), false), Some((200, "health_check_ok")));
        assert_eq!(details(&filter(true, &[], None), true), Some((503, "health_check_failed")));
        for (name, percent, wanted) in [
            ("half", 50.0, (200, "health_check_ok_cluster_healthy")),
            ("half", 51.0, (503, "health_check_failed_cluster_unhealthy")),
            ("empty", 0.0, (200, "health_check_ok_cluster_healthy")),
            ("empty", 1.0, (503, "health_check_failed_cluster_empty")),
            ("none", 1.0, (503, "health_check_failed_no_cluster_found")),
        ] {
            assert_eq!(details(&filter(false, &[(name, percent)], None), false), Some(wanted), "{name} {percent}");
        }
        let caching = filter(true, &[], Some(10));
        assert_eq!(details(&caching, false), None);
        caching.remember(204, true, now);
        let cached = HealthAnswer { status: 204, details: "health_check_cached", degraded: true };
        assert_eq!(caching.answer(false, now, members), Some(cached));
        assert_eq!(caching.answer(false, now + Duration::from_secs(10), members), None);
    }
}
