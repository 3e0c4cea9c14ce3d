//! Of clusters and their endpoints.

use super::{at_least, count, header_text, known, number, some_text};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};
use std::time::Duration;

/// Names are resolved again after more than this.
const SOONEST_REFRESH: Duration = Duration::from_nanos(1_000_001);

pub(crate) fn cluster(cluster: &pb::cluster::Cluster) -> Compiled<()> {
    use pb::cluster::cluster::common_lb_config::LocalityConfigSpecifier as Place;
    use pb::cluster::cluster::{ClusterDiscoveryType as Found, DiscoveryType, LbConfig, LbPolicy};
    let provided = cluster.lb_policy == LbPolicy::ClusterProvided as i32;
    let common = cluster.common_lb_config.as_ref();
    let place = common.and_then(|common| common.locality_config_specifier.as_ref());
    if let Some(subsets) = &cluster.lb_subset_config {
        if cluster.load_balancing_policy.is_some() || (provided && !subsets.subset_selectors.is_empty()) {
            let why = "cannot stand beside CLUSTER_PROVIDED or load_balancing_policy";
            return Err(Invalid::new("lb_subset_config", why));
        }
        if subsets.locality_weight_aware && !matches!(place, Some(Place::LocalityWeightedLbConfig(_))) {
            return Err(Invalid::new("lb_subset_config.locality_weight_aware", "needs locality_weighted_lb_config"));
        }
    }
    let hashing = common.and_then(|common| common.consistent_hashing_lb_config.as_ref());
    if cluster.load_balancing_policy.is_some() && (place.is_some() || hashing.is_some()) {
        let why = "cannot be combined with zone_aware_lb_config, locality_weighted_lb_config and \
                   consistent_hashing_lb_config of common_lb_config";
        return Err(Invalid::new("load_balancing_policy", why));
    }
    if hashing.is_some_and(|hashing| hashing.use_hostname_for_hashing)
        && cluster.cluster_discovery_type != Some(Found::Type(DiscoveryType::StrictDns as i32))
    {
        let why = "is for clusters of type STRICT_DNS only";
        return Err(Invalid::new("common_lb_config.consistent_hashing_lb_config.use_hostname_for_hashing", why));
    }
    let original = Some(Found::Type(DiscoveryType::OriginalDst as i32));
    if cluster.cluster_discovery_type == original && !provided && cluster.load_balancing_policy.is_none() {
        return Err(Invalid::new("lb_policy", "ORIGINAL_DST only has CLUSTER_PROVIDED"));
    }
    at_least("dns_refresh_rate", cluster.dns_refresh_rate.as_ref(), SOONEST_REFRESH)?;
    if let Some(rate) = &cluster.dns_failure_refresh_rate {
        if rate.base_interval.is_none() {
            return Err(Invalid::new("dns_failure_refresh_rate.base_interval", "is missing"));
        }
        for interval in [&rate.base_interval, &rate.max_interval] {
            at_least("dns_failure_refresh_rate", interval.as_ref(), SOONEST_REFRESH)?;
        }
    }
    known("dns_lookup_family", cluster.dns_lookup_family, 4)?;
    at_least("cleanup_interval", cluster.cleanup_interval.as_ref(), Duration::from_nanos(1))?;
    match &cluster.lb_config {
        Some(LbConfig::RingHashLbConfig(config)) => known("ring_hash_lb_config.hash_function", config.hash_function, 1),
        Some(LbConfig::LeastRequestLbConfig(config)) => {
            number("least_request_lb_config.choice_count", config.choice_count.as_ref(), 2..=u32::MAX)
        }
        _ => Ok(()),
    }?;
    for (i, entry) in cluster.transport_socket_matches.iter().enumerate() {
        some_text("name", &entry.name).at_index("transport_socket_matches", i)?;
        if entry.transport_socket.is_none() {
            return Err(Invalid::new("transport_socket", "is missing")).at_index("transport_socket_matches", i);
        }
    }
    cluster.load_assignment.as_ref().map_or(Ok(()), assignment).at("load_assignment")
}

pub(crate) fn assignment(assignment: &pb::endpoint::ClusterLoadAssignment) -> Compiled<()> {
    use pb::endpoint::lb_endpoint::HostIdentifier;
    some_text("cluster_name", &assignment.cluster_name)?;
    for (i, locality) in assignment.endpoints.iter().enumerate() {
        number("load_balancing_weight", locality.load_balancing_weight.as_ref(), 1..=u32::MAX)
            .at_index("endpoints", i)?;
        for endpoint in &locality.lb_endpoints {
            let Some(HostIdentifier::Endpoint(endpoint)) = &endpoint.host_identifier else { continue };
            if endpoint.health_check_config.as_ref().is_some_and(|config| config.port_value > 65535) {
                return Err(Invalid::new("health_check_config.port_value", "is no port")).at_index("endpoints", i);
            }
        }
    }
    let Some(policy) = &assignment.policy else { return Ok(()) };
    if policy.drop_overloads.len() > 1 {
        return Err(Invalid::new("policy.drop_overloads", "has more than one category"));
    }
    number("policy.overprovisioning_factor", policy.overprovisioning_factor.as_ref(), 1..=u32::MAX)?;
    let mut dropped = 0.0;
    for drop in &policy.drop_overloads {
        some_text("policy.drop_overloads.category", &drop.category)?;
        let share = drop.drop_percentage.unwrap_or_default();
        dropped += f64::from(share.numerator) / [100.0, 1e4, 1e6].get(share.denominator as usize).unwrap_or(&100.0);
    }
    match dropped > 1.0 {
        true => Err(Invalid::new("policy.drop_overloads", "drop more than there is")),
        false => Ok(()),
    }
}

pub(crate) fn health_check(check: &pb::core::HealthCheck) -> Compiled<()> {
    use pb::core::health_check::HealthChecker as Kind;
    use pb::core::health_check::payload::Payload;
    let text = |payload: &pb::core::health_check::Payload| match &payload.payload {
        Some(Payload::Text(text)) => some_text("text", text),
        _ => Ok(()),
    };
    match &check.health_checker {
        Some(Kind::HttpHealthCheck(http)) => {
            header_text("http_health_check.host", &http.host)?;
            known("http_health_check.codec_client_type", http.codec_client_type, 2)?;
            http.send.iter().chain(&http.receive).try_for_each(text).at("http_health_check")
        }
        Some(Kind::TcpHealthCheck(tcp)) => {
            tcp.send.iter().chain(&tcp.receive).try_for_each(text).at("tcp_health_check")
        }
        _ => Ok(()),
    }
}

pub(crate) fn tls_common(common: &pb::tls::CommonTlsContext) -> Compiled<()> {
    use pb::tls::common_tls_context::ValidationContextType as Kind;
    if common.alpn_protocols.iter().any(|name| name.len() > 255) {
        return Err(Invalid::new("alpn_protocols", "is longer than 255 bytes"));
    }
    match &common.validation_context_type {
        // What comes by SDS may bring the roots.
        Some(Kind::ValidationContext(context)) => without_roots(context).at("validation_context"),
        Some(Kind::CombinedValidationContext(combined)) if combined.default_validation_context.is_none() => {
            Err(Invalid::new("combined_validation_context.default_validation_context", "is missing"))
        }
        Some(Kind::CombinedValidationContext(combined)) if combined.validation_context_sds_secret_config.is_none() => {
            Err(Invalid::new("combined_validation_context.validation_context_sds_secret_config", "is missing"))
        }
        _ => Ok(()),
    }
}

/// What only has a meaning beside roots.
fn without_roots(context: &pb::tls::CertificateValidationContext) -> Compiled<()> {
    if context.trusted_ca.is_some() || context.system_root_certs.is_some() {
        return Ok(());
    }
    for (field, set) in [
        ("match_typed_subject_alt_names", !context.match_typed_subject_alt_names.is_empty()),
        ("match_subject_alt_names", !context.match_subject_alt_names.is_empty()),
        ("crl", context.crl.is_some()),
        ("allow_expired_certificate", context.allow_expired_certificate),
    ] {
        if set && context.ca_certificate_provider_instance.is_none() {
            return Err(Invalid::new(field, "is nothing without trusted_ca"));
        }
    }
    Ok(())
}

pub(crate) fn validation(context: &pb::tls::CertificateValidationContext) -> Compiled<()> {
    for hash in &context.verify_certificate_hash {
        count("verify_certificate_hash", hash.len(), 64..=95)?;
        let digits = if hash.len() == 95 { hash.replace(':', "") } else { hash.clone() };
        if digits.len() != 64 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Invalid::new("verify_certificate_hash", "is no SHA-256 in hex digits"));
        }
    }
    for hash in &context.verify_certificate_spki {
        count("verify_certificate_spki", hash.len(), 44..=44)?;
        use base64::Engine as _;
        if base64::engine::general_purpose::STANDARD.decode(hash).is_ok_and(|bytes| bytes.len() == 32) {
            continue;
        }
        return Err(Invalid::new("verify_certificate_spki", "is no SHA-256 in Base64"));
    }
    known("trust_chain_verification", context.trust_chain_verification, 1)?;
    number("max_verify_depth", context.max_verify_depth.as_ref(), 0..=100)
}
