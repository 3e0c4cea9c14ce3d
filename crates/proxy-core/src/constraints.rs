//! What Envoy's API asks of fields by themselves (its validation rules): lengths, ranges, characters. What compiling finds
//! out anyway is not repeated here.

mod upstream;

pub(crate) use upstream::{assignment, cluster, health_check, tls_common, validation};

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::fields;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// Text that can stand in a head (`HTTP_HEADER_VALUE`, not strict).
fn header_text(field: &str, text: &str) -> Compiled<()> {
    match text.bytes().any(|b| matches!(b, 0 | b'\r' | b'\n')) {
        true => Err(Invalid::new(field, "must not contain NUL, CR or LF")),
        false => Ok(()),
    }
}

fn some_text(field: &str, text: &str) -> Compiled<()> {
    fields::required(field, text).map(drop)
}

fn count(field: &str, len: usize, allowed: RangeInclusive<usize>) -> Compiled<()> {
    match allowed.contains(&len) {
        true => Ok(()),
        false => Err(Invalid::new(field, format!("has {len} items, not {} to {}", allowed.start(), allowed.end()))),
    }
}

fn number(field: &str, value: Option<&pb::UInt32Value>, allowed: RangeInclusive<u32>) -> Compiled<()> {
    match value.map(|v| v.value).filter(|value| !allowed.contains(value)) {
        None => Ok(()),
        Some(value) => {
            Err(Invalid::new(field, format!("{value} is not between {} and {}", allowed.start(), allowed.end())))
        }
    }
}

/// An enum's value; there are as many as up to `last`.
fn known(field: &str, value: i32, last: i32) -> Compiled<()> {
    match (0..=last).contains(&value) {
        true => Ok(()),
        false => Err(Invalid::new(field, format!("{value} is no known value"))),
    }
}

/// A share that the runtime may change has a default.
fn runtime_share(field: &str, share: Option<&pb::core::RuntimeFractionalPercent>) -> Compiled<()> {
    match share {
        Some(share) if share.default_value.is_none() => {
            Err(Invalid::new(format!("{field}.default_value"), "is missing"))
        }
        _ => Ok(()),
    }
}

fn at_least(field: &str, value: Option<&pb::Duration>, least: Duration) -> Compiled<()> {
    match fields::duration(field, value)?.filter(|value| *value < least) {
        None => Ok(()),
        Some(value) => Err(Invalid::new(field, format!("{value:?} is less than {least:?}"))),
    }
}

/// Names that stand in a list twice, whatever their case.
fn distinct<'a>(field: &str, names: impl Iterator<Item = &'a str>) -> Compiled<()> {
    let mut seen = std::collections::HashSet::new();
    for name in names {
        if !seen.insert(name.to_ascii_lowercase()) {
            return Err(Invalid::new(field, format!("{name:?} is there twice")));
        }
    }
    Ok(())
}

pub(crate) fn manager(hcm: &pb::hcm::HttpConnectionManager) -> Compiled<()> {
    use pb::hcm::http_connection_manager::StripPortMode;
    known("codec_type", hcm.codec_type, 3)?;
    if !hcm.original_ip_detection_extensions.is_empty()
        && (hcm.xff_num_trusted_hops > 0 || hcm.use_remote_address.as_ref().is_some_and(|v| v.value))
    {
        let why = "cannot be set beside use_remote_address or xff_num_trusted_hops";
        return Err(Invalid::new("original_ip_detection_extensions", why));
    }
    header_text("server_name", &hcm.server_name)?;
    header_text("via", &hcm.via)?;
    let log = hcm.access_log_options.as_ref().and_then(|o| o.access_log_flush_interval.as_ref());
    for interval in [log, hcm.access_log_flush_interval.as_ref()] {
        at_least("access_log_flush_interval", interval, Duration::from_millis(1))?;
    }
    if hcm.strip_port_mode == Some(StripPortMode::StripAnyHostPort(true)) && hcm.strip_matching_host_port {
        return Err(Invalid::new("strip_matching_host_port", "cannot be set beside strip_any_host_port"));
    }
    distinct("upgrade_configs", hcm.upgrade_configs.iter().map(|u| u.upgrade_type.as_str()))?;
    if let Some(common) = &hcm.common_http_protocol_options {
        protocol(common).at("common_http_protocol_options")?;
    }
    if let Some(tracing) = &hcm.tracing {
        for (field, share) in [
            ("tracing.client_sampling", &tracing.client_sampling),
            ("tracing.random_sampling", &tracing.random_sampling),
            ("tracing.overall_sampling", &tracing.overall_sampling),
        ] {
            fields::percent(field, share.as_ref(), 100.0)?;
        }
    }
    for mapper in hcm.local_reply_config.iter().flat_map(|config| &config.mappers) {
        number("local_reply_config.mappers.status_code", mapper.status_code.as_ref(), 200..=599)?;
    }
    Ok(())
}

fn protocol(options: &pb::core::HttpProtocolOptions) -> Compiled<()> {
    number("max_headers_count", options.max_headers_count.as_ref(), 1..=u32::MAX)?;
    number("max_response_headers_kb", options.max_response_headers_kb.as_ref(), 1..=8192)
}

pub(crate) fn http2(options: &pb::core::Http2ProtocolOptions) -> Compiled<()> {
    let some = 1..=u32::MAX;
    number("max_concurrent_streams", options.max_concurrent_streams.as_ref(), 1..=0x7fff_ffff)?;
    number("max_outbound_frames", options.max_outbound_frames.as_ref(), some.clone())?;
    number("max_outbound_control_frames", options.max_outbound_control_frames.as_ref(), some.clone())?;
    number(
        "max_inbound_window_update_frames_per_data_frame_sent",
        options.max_inbound_window_update_frames_per_data_frame_sent.as_ref(),
        some,
    )?;
    if let Some(keepalive) = &options.connection_keepalive {
        for (field, value) in [
            ("connection_keepalive.interval", &keepalive.interval),
            ("connection_keepalive.timeout", &keepalive.timeout),
        ] {
            at_least(field, value.as_ref(), Duration::from_millis(1))?;
        }
    }
    Ok(())
}

/// Most header changes of one level.
const MOST_OPTIONS: usize = 1000;
/// The longest name or value of one.
const LONGEST: usize = 16384;

pub(crate) fn header_options(add: &[pb::core::HeaderValueOption]) -> Compiled<()> {
    count("", add.len(), 0..=MOST_OPTIONS)?;
    for (i, option) in add.iter().enumerate() {
        let Some(header) = &option.header else { continue };
        let check = || {
            if header.key.len().max(header.value.len()).max(header.raw_value.len()) > LONGEST {
                return Err(Invalid::new("", format!("is longer than {LONGEST} bytes")));
            }
            if option.append.is_some() && option.append_action != 0 {
                return Err(Invalid::new("append_action", "cannot be set beside append"));
            }
            header_text("key", &header.key)?;
            header_text("value", &header.value)
        };
        check().at_index("", i)?;
    }
    Ok(())
}

pub(crate) fn table(config: &pb::route::RouteConfiguration) -> Compiled<()> {
    config.internal_only_headers.iter().try_for_each(|name| header_text("internal_only_headers", name))
}

pub(crate) fn virtual_host(host: &pb::route::VirtualHost) -> Compiled<()> {
    host.domains.iter().try_for_each(|domain| header_text("domains", domain))?;
    host.request_headers_to_remove.iter().try_for_each(|name| header_text("request_headers_to_remove", name))?;
    host.response_headers_to_remove.iter().try_for_each(|name| header_text("response_headers_to_remove", name))?;
    for cluster in &host.virtual_clusters {
        some_text("virtual_clusters.name", &cluster.name)?;
        count("virtual_clusters.headers", cluster.headers.len(), 1..=usize::MAX)?;
    }
    Ok(())
}

pub(crate) fn route_match(matcher: &pb::route::RouteMatch) -> Compiled<()> {
    for query in &matcher.query_parameters {
        if query.name.len() > 1024 {
            return Err(Invalid::new("query_parameters.name", "is longer than 1024 bytes"));
        }
    }
    runtime_share("runtime_fraction", matcher.runtime_fraction.as_ref())
}

pub(crate) fn header_matcher(matcher: &pb::route::HeaderMatcher) -> Compiled<()> {
    header_text("name", &matcher.name)
}

pub(crate) fn route_action(action: &pb::route::RouteAction) -> Compiled<()> {
    use pb::route::route_action::hash_policy::PolicySpecifier as Hash;
    use pb::route::route_action::{ClusterSpecifier, HostRewriteSpecifier as Host};
    use pb::route::weighted_cluster::RandomValueSpecifier;
    header_text("prefix_rewrite", &action.prefix_rewrite)?;
    known("priority", action.priority, 1)?;
    known("cluster_not_found_response_code", action.cluster_not_found_response_code, 2)?;
    if let Some(rewrite) = &action.regex_rewrite {
        header_text("regex_rewrite.substitution", &rewrite.substitution)?;
    }
    if let Some(ClusterSpecifier::ClusterHeader(name)) = &action.cluster_specifier {
        some_text("cluster_header", name)?;
    }
    if let Some(cors) = &action.cors {
        use pb::route::cors_policy::EnabledSpecifier::FilterEnabled;
        let enabled = cors.enabled_specifier.as_ref().map(|FilterEnabled(share)| share);
        shares_of_cors(enabled, cors.shadow_enabled.as_ref()).at("cors")?;
    }
    if let Some(policy) = &action.internal_redirect_policy {
        count("internal_redirect_policy.redirect_response_codes", policy.redirect_response_codes.len(), 0..=5)?;
    }
    match &action.host_rewrite_specifier {
        Some(Host::HostRewriteLiteral(text)) => header_text("host_rewrite_literal", text)?,
        Some(Host::HostRewriteHeader(text)) => header_text("host_rewrite_header", text)?,
        _ => {}
    }
    if let Some(ClusterSpecifier::WeightedClusters(weighted)) = &action.cluster_specifier
        && let Some(RandomValueSpecifier::HeaderName(name)) = &weighted.random_value_specifier
    {
        header_text("weighted_clusters.header_name", name)?;
    }
    if let Some(ClusterSpecifier::WeightedClusters(weighted)) = &action.cluster_specifier {
        use pb::route::weighted_cluster::cluster_weight::HostRewriteSpecifier::HostRewriteLiteral;
        for cluster in &weighted.clusters {
            let Some(HostRewriteLiteral(text)) = &cluster.host_rewrite_specifier else { continue };
            header_text("weighted_clusters.clusters.host_rewrite_literal", text)?;
        }
    }
    for (i, policy) in action.hash_policy.iter().enumerate() {
        let check = match &policy.policy_specifier {
            Some(Hash::Header(header)) => some_text("header.header_name", &header.header_name),
            Some(Hash::Cookie(cookie)) => some_text("cookie.name", &cookie.name),
            Some(Hash::QueryParameter(query)) => some_text("query_parameter.name", &query.name),
            Some(Hash::FilterState(state)) => some_text("filter_state.key", &state.key),
            _ => Ok(()),
        };
        check.at_index("hash_policy", i)?;
    }
    for (i, upgrade) in action.upgrade_configs.iter().enumerate() {
        some_text("upgrade_type", &upgrade.upgrade_type).at_index("upgrade_configs", i)?;
        if upgrade.connect_config.is_some() && !upgrade.upgrade_type.eq_ignore_ascii_case("connect") {
            return Err(Invalid::new("connect_config", "is only for CONNECT")).at_index("upgrade_configs", i);
        }
    }
    distinct("upgrade_configs", action.upgrade_configs.iter().map(|u| u.upgrade_type.as_str()))?;
    if let Some(hedge) = &action.hedge_policy {
        number("hedge_policy.initial_requests", hedge.initial_requests.as_ref(), 1..=u32::MAX)?;
    }
    Ok(())
}

pub(crate) fn shares_of_cors(
    enabled: Option<&pb::core::RuntimeFractionalPercent>,
    shadow: Option<&pb::core::RuntimeFractionalPercent>,
) -> Compiled<()> {
    runtime_share("filter_enabled", enabled)?;
    runtime_share("shadow_enabled", shadow)
}

pub(crate) fn mirror(policy: &pb::route::route_action::RequestMirrorPolicy) -> Compiled<()> {
    runtime_share("runtime_fraction", policy.runtime_fraction.as_ref())
}

pub(crate) fn listener(listener: &pb::listener::Listener) -> Compiled<()> {
    number(
        "max_connections_to_accept_per_socket_event",
        listener.max_connections_to_accept_per_socket_event.as_ref(),
        1..=u32::MAX,
    )?;
    listener.socket_options.iter().try_for_each(|option| known("socket_options.state", option.state, 2))
}

pub(crate) fn redirect(redirect: &pb::route::RedirectAction) -> Compiled<()> {
    use pb::route::redirect_action::PathRewriteSpecifier as Path;
    header_text("host_redirect", &redirect.host_redirect)?;
    match &redirect.path_rewrite_specifier {
        Some(Path::PathRedirect(text)) => header_text("path_redirect", text),
        Some(Path::PrefixRewrite(text)) => header_text("prefix_rewrite", text),
        _ => Ok(()),
    }
}

pub(crate) fn retry(policy: &pb::route::RetryPolicy) -> Compiled<()> {
    if let Some(predicate) = policy.retry_host_predicate.iter().find(|predicate| predicate.config_type.is_none()) {
        return Err(Invalid::new("retry_host_predicate", format!("{:?} has no typed_config", predicate.name)));
    }
    if let Some(back_off) = &policy.retry_back_off {
        fields::positive("retry_back_off.base_interval", back_off.base_interval.as_ref(), Duration::MAX)?;
        fields::positive("retry_back_off.max_interval", back_off.max_interval.as_ref(), Duration::MAX)?;
    }
    if let Some(back_off) = &policy.rate_limited_retry_back_off {
        for header in &back_off.reset_headers {
            some_text("rate_limited_retry_back_off.reset_headers.name", &header.name)?;
            known("rate_limited_retry_back_off.reset_headers.format", header.format, 1)?;
        }
        count("rate_limited_retry_back_off.reset_headers", back_off.reset_headers.len(), 1..=usize::MAX)?;
    }
    Ok(())
}

pub(crate) fn rate_limit(limit: &pb::route::RateLimit) -> Compiled<()> {
    use pb::route::rate_limit::action::ActionSpecifier as Kind;
    number("stage", limit.stage.as_ref(), 0..=10)?;
    count("actions", limit.actions.len(), 1..=usize::MAX)?;
    for (i, action) in limit.actions.iter().enumerate() {
        let check = match &action.action_specifier {
            Some(Kind::GenericKey(a)) => some_text("generic_key.descriptor_value", &a.descriptor_value),
            Some(Kind::RequestHeaders(a)) => some_text("request_headers.header_name", &a.header_name)
                .and_then(|()| some_text("request_headers.descriptor_key", &a.descriptor_key)),
            Some(Kind::HeaderValueMatch(a)) => count("header_value_match.headers", a.headers.len(), 1..=usize::MAX),
            Some(Kind::MaskedRemoteAddress(a)) => {
                number("masked_remote_address.v4_prefix_mask_len", a.v4_prefix_mask_len.as_ref(), 0..=32).and_then(
                    |()| number("masked_remote_address.v6_prefix_mask_len", a.v6_prefix_mask_len.as_ref(), 0..=128),
                )
            }
            Some(Kind::QueryParameterValueMatch(a)) => {
                count("query_parameter_value_match.query_parameters", a.query_parameters.len(), 1..=usize::MAX)
            }
            _ => Ok(()),
        };
        check.at_index("actions", i)?;
    }
    Ok(())
}

pub(crate) fn local_rate_limit(config: &pb::http_filter::local_ratelimit::v3::LocalRateLimit) -> Compiled<()> {
    for (field, share) in [("filter_enabled", &config.filter_enabled), ("filter_enforced", &config.filter_enforced)] {
        runtime_share(field, share.as_ref())?;
    }
    count("response_headers_to_add", config.response_headers_to_add.len(), 0..=10)?;
    count("request_headers_to_add_when_not_enforced", config.request_headers_to_add_when_not_enforced.len(), 0..=10)?;
    if config.stage > 10 {
        return Err(Invalid::new("stage", format!("{} is more than 10", config.stage)));
    }
    if let Some(status) = &config.status
        && pb::kind::StatusCode::try_from(status.code).is_err()
    {
        return Err(Invalid::new("status.code", format!("{} is no known value", status.code)));
    }
    if let Some(bucket) = &config.token_bucket {
        number("token_bucket.tokens_per_fill", bucket.tokens_per_fill.as_ref(), 1..=u32::MAX)?;
    }
    for (i, descriptor) in config.descriptors.iter().enumerate() {
        count("entries", descriptor.entries.len(), 1..=usize::MAX).at_index("descriptors", i)?;
    }
    Ok(())
}

pub(crate) fn fault(config: &pb::http_filter::fault::v3::HttpFault) -> Compiled<()> {
    use pb::ext::filters::common::fault::v3::fault_rate_limit::LimitType;
    let limit = config.response_rate_limit.as_ref().and_then(|limit| limit.limit_type.as_ref());
    match limit {
        Some(LimitType::FixedLimit(limit)) if limit.limit_kbps == 0 => {
            Err(Invalid::new("response_rate_limit.fixed_limit.limit_kbps", "must be greater than 0"))
        }
        _ => Ok(()),
    }
}

pub(crate) fn ext_authz(config: &pb::http_filter::ext_authz::v3::ExtAuthz) -> Compiled<()> {
    use pb::http_filter::ext_authz::v3::ext_authz::Services;
    if config.with_request_body.as_ref().is_some_and(|body| body.max_request_bytes == 0) {
        return Err(Invalid::new("with_request_body.max_request_bytes", "must be greater than 0"));
    }
    if let Some(status) = &config.status_on_error
        && pb::kind::StatusCode::try_from(status.code).is_err()
    {
        return Err(Invalid::new("status_on_error.code", format!("{} is no known value", status.code)));
    }
    // Nobody looks at it with an HTTP service.
    if config.transport_api_version == 1 && !matches!(config.services, Some(Services::HttpService(_))) {
        return Err(Invalid::new("transport_api_version", "V2 is no longer supported"));
    }
    if let Some(Services::HttpService(service)) = &config.services {
        for (field, path) in
            [("http_service.path_prefix", &service.path_prefix), ("http_service.path_override", &service.path_override)]
        {
            if !path.is_empty() && !path.starts_with('/') {
                return Err(Invalid::new(field, "must begin with '/'"));
            }
        }
        if !service.path_prefix.is_empty() && !service.path_override.is_empty() {
            return Err(Invalid::new("http_service.path_override", "cannot stand beside path_prefix"));
        }
        http_uri(service.server_uri.as_ref()).at("http_service.server_uri")?;
        let asked = service.authorization_request.as_ref().is_some_and(|request| request.allowed_headers.is_some());
        if asked && config.allowed_headers.is_some() {
            return Err(Invalid::new("allowed_headers", "cannot stand beside those of authorization_request"));
        }
    }
    Ok(())
}

fn http_uri(uri: Option<&pb::core::HttpUri>) -> Compiled<()> {
    match uri {
        Some(uri) if uri.uri.is_empty() => Err(Invalid::new("uri", "is missing")),
        Some(uri) if uri.timeout.is_none() => Err(Invalid::new("timeout", "is missing")),
        _ => Ok(()),
    }
}

pub(crate) fn jwt_provider(provider: &pb::http_filter::jwt_authn::v3::JwtProvider) -> Compiled<()> {
    use pb::http_filter::jwt_authn::v3::jwt_provider::JwksSourceSpecifier as Source;
    header_text("forward_payload_header", &provider.forward_payload_header)?;
    for header in &provider.from_headers {
        some_text("from_headers.name", &header.name)?;
        header_text("from_headers.name", &header.name)?;
    }
    for claim in &provider.claim_to_headers {
        some_text("claim_to_headers.header_name", &claim.header_name)?;
        some_text("claim_to_headers.claim_name", &claim.claim_name)?;
    }
    match &provider.jwks_source_specifier {
        Some(Source::LocalJwks(source)) => match &source.specifier {
            Some(pb::core::data_source::Specifier::InlineString(text)) => {
                let keys = serde_json::from_str::<serde_json::Value>(text).ok();
                let some =
                    keys.as_ref().and_then(|jwks| jwks.get("keys")?.as_array()).is_some_and(|keys| !keys.is_empty());
                some.then_some(()).ok_or_else(|| Invalid::new("local_jwks", "holds no keys"))
            }
            _ => Ok(()),
        },
        Some(Source::RemoteJwks(remote)) => {
            http_uri(remote.http_uri.as_ref()).at("remote_jwks.http_uri")?;
            let kept = |cache: &envoy_api::wkt::Duration| {
                (cache.seconds > 0 || cache.nanos >= 1_000_000) && cache.seconds < 9_000_000_000
            };
            match &remote.cache_duration {
                Some(cache) if !kept(cache) => {
                    Err(Invalid::new("remote_jwks.cache_duration", "must be from 0.001s to 9000000000s"))
                }
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

pub(crate) fn log_filter(filter: &pb::accesslog::AccessLogFilter) -> Compiled<()> {
    use pb::accesslog::access_log_filter::FilterSpecifier as Kind;
    match &filter.filter_specifier {
        Some(Kind::AndFilter(f)) => count("and_filter.filters", f.filters.len(), 2..=usize::MAX),
        Some(Kind::OrFilter(f)) => count("or_filter.filters", f.filters.len(), 2..=usize::MAX),
        Some(Kind::RuntimeFilter(f)) => some_text("runtime_filter.runtime_key", &f.runtime_key),
        Some(Kind::GrpcStatusFilter(f)) => {
            f.statuses.iter().try_for_each(|status| known("grpc_status_filter.statuses", *status, 16))
        }
        Some(Kind::LogTypeFilter(f)) => f.types.iter().try_for_each(|kind| known("log_type_filter.types", *kind, 12)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
