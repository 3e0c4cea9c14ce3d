//! What Envoy asks of messages beyond its API's rules of single fields ([`crate::rules`]) when it takes them. What compiling
//! finds out anyway is not repeated here.

mod upstream;

pub(crate) use upstream::{assignment, cluster, tls_common, validation};

use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// Text that can stand in a head (`HTTP_HEADER_VALUE`, not strict).
fn header_text(field: &str, text: &str) -> Compiled<()> {
    match text.bytes().any(|b| matches!(b, 0 | b'\r' | b'\n')) {
        true => Err(Invalid::new(field, "must not contain NUL, CR or LF")),
        false => Ok(()),
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
    if !hcm.original_ip_detection_extensions.is_empty()
        && (hcm.xff_num_trusted_hops > 0 || hcm.use_remote_address.as_ref().is_some_and(|v| v.value))
    {
        let why = "cannot be set beside use_remote_address or xff_num_trusted_hops";
        return Err(Invalid::new("original_ip_detection_extensions", why));
    }
    if hcm.strip_port_mode == Some(StripPortMode::StripAnyHostPort(true)) && hcm.strip_matching_host_port {
        return Err(Invalid::new("strip_matching_host_port", "cannot be set beside strip_any_host_port"));
    }
    if hcm.common_http_protocol_options.as_ref().is_some_and(|common| common.max_response_headers_kb.is_some()) {
        return Err(Invalid::new("common_http_protocol_options.max_response_headers_kb", "is for clusters only"));
    }
    distinct("upgrade_configs", hcm.upgrade_configs.iter().map(|u| u.upgrade_type.as_str()))
}

pub(crate) fn header_options(add: &[pb::core::HeaderValueOption]) -> Compiled<()> {
    match add.iter().position(|option| option.append.is_some() && option.append_action != 0) {
        None => Ok(()),
        Some(i) => Err(Invalid::new("append_action", "cannot be set beside append")).at_index("", i),
    }
}

/// A field that Envoy's API has and the rules do not know yet.
pub(crate) fn table(config: &pb::route::RouteConfiguration) -> Compiled<()> {
    header_text("vhost_header", &config.vhost_header)
}

pub(crate) fn virtual_host(host: &pb::route::VirtualHost) -> Compiled<()> {
    match host.virtual_clusters.iter().any(|cluster| cluster.headers.is_empty()) {
        true => Err(Invalid::new("virtual_clusters.headers", "is empty")),
        false => Ok(()),
    }
}

pub(crate) fn route_action(action: &pb::route::RouteAction) -> Compiled<()> {
    for (i, upgrade) in action.upgrade_configs.iter().enumerate() {
        if upgrade.connect_config.is_some() && !upgrade.upgrade_type.eq_ignore_ascii_case("connect") {
            return Err(Invalid::new("connect_config", "is only for CONNECT")).at_index("upgrade_configs", i);
        }
    }
    distinct("upgrade_configs", action.upgrade_configs.iter().map(|u| u.upgrade_type.as_str()))
}

pub(crate) fn retry(policy: &pb::route::RetryPolicy) -> Compiled<()> {
    if let Some(predicate) = policy.retry_host_predicate.iter().find(|predicate| predicate.config_type.is_none()) {
        return Err(Invalid::new("retry_host_predicate", format!("{:?} has no typed_config", predicate.name)));
    }
    Ok(())
}

pub(crate) fn ext_authz(config: &pb::http_filter::ext_authz::v3::ExtAuthz) -> Compiled<()> {
    use pb::http_filter::ext_authz::v3::ext_authz::Services;
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
        let asked = service.authorization_request.as_ref().is_some_and(|request| request.allowed_headers.is_some());
        if asked && config.allowed_headers.is_some() {
            return Err(Invalid::new("allowed_headers", "cannot stand beside those of authorization_request"));
        }
    }
    Ok(())
}

pub(crate) fn jwt_provider(provider: &pb::http_filter::jwt_authn::v3::JwtProvider) -> Compiled<()> {
    use pb::http_filter::jwt_authn::v3::jwt_provider::JwksSourceSpecifier as Source;
    if let Some(claim) = provider.claim_to_headers.iter().find(|claim| claim.claim_name.is_empty()) {
        return Err(Invalid::new("claim_to_headers.claim_name", format!("is empty for {:?}", claim.header_name)));
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

#[cfg(test)]
mod tests;
