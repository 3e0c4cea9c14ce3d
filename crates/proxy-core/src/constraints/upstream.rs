//! Of clusters and their endpoints.

use crate::fields;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

pub(crate) fn cluster(cluster: &pb::cluster::Cluster) -> Compiled<()> {
    use pb::cluster::cluster::common_lb_config::LocalityConfigSpecifier as Place;
    use pb::cluster::cluster::{ClusterDiscoveryType as Found, DiscoveryType, LbPolicy};
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
    if let Some(rate) = &cluster.dns_failure_refresh_rate {
        let base = fields::duration("dns_failure_refresh_rate.base_interval", rate.base_interval.as_ref())?;
        let max = fields::duration("dns_failure_refresh_rate.max_interval", rate.max_interval.as_ref())?;
        if max.is_some_and(|max| Some(max) < base) {
            return Err(Invalid::new("dns_failure_refresh_rate.max_interval", "is less than the base interval"));
        }
    }
    cluster.load_assignment.as_ref().map_or(Ok(()), assignment).at("load_assignment")
}

pub(crate) fn assignment(assignment: &pb::endpoint::ClusterLoadAssignment) -> Compiled<()> {
    let Some(policy) = &assignment.policy else { return Ok(()) };
    if policy.drop_overloads.len() > 1 {
        return Err(Invalid::new("policy.drop_overloads", "has more than one category"));
    }
    let mut dropped = 0.0;
    for drop in &policy.drop_overloads {
        let share = drop.drop_percentage.unwrap_or_default();
        dropped += f64::from(share.numerator) / [100.0, 1e4, 1e6].get(share.denominator as usize).unwrap_or(&100.0);
    }
    match dropped > 1.0 {
        true => Err(Invalid::new("policy.drop_overloads", "drop more than there is")),
        false => Ok(()),
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
        let digits = if hash.len() == 95 { hash.replace(':', "") } else { hash.clone() };
        if digits.len() != 64 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Invalid::new("verify_certificate_hash", "is no SHA-256 in hex digits"));
        }
    }
    for hash in &context.verify_certificate_spki {
        use base64::Engine as _;
        if base64::engine::general_purpose::STANDARD.decode(hash).is_ok_and(|bytes| bytes.len() == 32) {
            continue;
        }
        return Err(Invalid::new("verify_certificate_spki", "is no SHA-256 in Base64"));
    }
    Ok(())
}
