//! Which requests are traced, and with which tags (istiod `tracing.go`).

use envoy_api::http::http_connection_manager::Tracing;
use envoy_api::pb::envoy::r#type::metadata::v3::{
    MetadataKey, MetadataKind,
    metadata_key::{PathSegment, path_segment::Segment},
    metadata_kind::{Kind, Request},
};
use envoy_api::pb::envoy::r#type::tracing::v3::{
    CustomTag,
    custom_tag::{Environment, Header, Literal, Metadata, Type},
};
use istio_api::telemetry::{CustomTag as RuleTag, WorkloadMode};
use std::collections::BTreeMap;

use crate::context::Context;
use crate::proto::{bool_value, percent, u32_value};
use crate::telemetry::Side;

/// Tracing of one direction, and whether the request id decides about sampling.
pub(super) struct Settings {
    pub(super) tracing: Option<Tracing>,
    pub(super) use_request_id: bool,
}

pub(super) fn settings(cx: &Context<'_>, side: Side) -> Settings {
    let own = cx.proxy_config.tracing.as_ref();
    let sampling = match own.map(|t| t.sampling) {
        Some(sampling) if sampling > 100.0 => 1.0,
        Some(sampling) if sampling != 0.0 => sampling,
        _ => cx.push.settings.trace_sampling,
    };
    let max_path = own.map(|t| t.max_path_tag_length).filter(|l| *l != 0).and_then(u32_value);
    let default_provider = cx.push.mesh.default_providers.as_ref().and_then(|d| d.tracing.first().cloned());
    if cx.telemetry.tracing.is_empty() && default_provider.is_none() {
        if !cx.push.mesh.enable_tracing {
            return Settings { tracing: None, use_request_id: true };
        }
        let mut tags = Vec::new();
        if own.and_then(|t| t.enable_istio_tags).unwrap_or(true) {
            tags.extend(istio_tags(cx));
        }
        tags.extend(proxy_config_tags(cx));
        return Settings { tracing: Some(build(sampling, tags, max_path)), use_request_id: true };
    }
    // Each section holds for the sides it names and replaces what wider ones said.
    let mut provider = default_provider;
    let (mut disabled, mut istio, mut request_id, mut no_context) = (false, true, true, false);
    let mut percentage = None;
    let mut custom: BTreeMap<String, RuleTag> = BTreeMap::new();
    for section in &cx.telemetry.tracing {
        use istio_api::telemetry::WorkloadMode::{Client, Server};
        let mode: WorkloadMode = section.r#match.as_ref().map(|m| m.mode).unwrap_or_default();
        if (mode == Client && side == Side::Server) || (mode == Server && side == Side::Client) {
            continue;
        }
        if let Some(first) = section.providers.first() {
            provider = Some(first.name.clone());
        }
        disabled = section.disable_span_reporting.unwrap_or(disabled);
        percentage = section.random_sampling_percentage.or(percentage);
        request_id = section.use_request_id_for_trace_sampling.unwrap_or(request_id);
        istio = section.enable_istio_tags.unwrap_or(istio);
        no_context = section.disable_context_propagation.unwrap_or(no_context);
        if !section.custom_tags.is_empty() {
            custom.clone_from(&section.custom_tags);
        }
    }
    let known = |name: &String| cx.push.mesh.extension_providers.iter().find(|p| p.name.eq_ignore_ascii_case(name));
    let Some(provider) = provider.as_ref().and_then(known).filter(|_| !disabled) else {
        return Settings { tracing: None, use_request_id: true };
    };
    let Some(exporter) = crate::trace_provider::build(cx, provider) else {
        return Settings { tracing: None, use_request_id: true };
    };
    let mut tags: Vec<CustomTag> = if istio { istio_tags(cx) } else { Vec::new() };
    if custom.is_empty() {
        tags.extend(proxy_config_tags(cx));
    } else {
        tags.extend(custom.iter().filter_map(|(name, tag)| rule_tag(cx, name, tag)));
    }
    let limit = (exporter.max_tag_length != 0).then_some(exporter.max_tag_length).and_then(u32_value).or(max_path);
    let percentage = if exporter.samples_itself { 100.0 } else { percentage.unwrap_or(sampling) };
    let tracing = Tracing {
        provider: Some(exporter.http),
        spawn_upstream_span: if exporter.starts_child_span { bool_value(true) } else { None },
        no_context_propagation: no_context && cx.node.is_at_least((1, 30, 0)),
        ..build(percentage, tags, limit)
    };
    Settings { tracing: Some(tracing), use_request_id: request_id }
}

fn build(
    sampling: f64,
    mut custom_tags: Vec<CustomTag>,
    max_path_tag_length: Option<envoy_api::wkt::UInt32Value>,
) -> Tracing {
    custom_tags.sort_by(|a, b| a.tag.cmp(&b.tag));
    Tracing {
        client_sampling: percent(100.0),
        overall_sampling: percent(100.0),
        random_sampling: percent(sampling),
        custom_tags,
        max_path_tag_length,
        ..Tracing::default()
    }
}

fn literal(tag: &str, value: &str) -> CustomTag {
    CustomTag { tag: tag.to_owned(), r#type: Some(Type::Literal(Literal { value: value.to_owned() })) }
}

/// Who the proxy is, and what authorization policies in dry run would have done.
fn istio_tags(cx: &Context<'_>) -> Vec<CustomTag> {
    let label = |key: &str| cx.node.labels.get(key).map(String::as_str).filter(|v| !v.is_empty());
    let dry_run = |tag: &str, key: &str| {
        let key = MetadataKey {
            key: "envoy.filters.http.rbac".to_owned(),
            path: vec![PathSegment { segment: Some(Segment::Key(key.to_owned())) }],
        };
        let kind = MetadataKind { kind: Some(Kind::Request(Request {})) };
        let metadata = Metadata { kind: Some(kind), metadata_key: Some(key), ..Metadata::default() };
        CustomTag { tag: format!("istio.authorization.dry_run.{tag}"), r#type: Some(Type::Metadata(metadata)) }
    };
    vec![
        literal("istio.canonical_revision", label("service.istio.io/canonical-revision").unwrap_or("latest")),
        literal("istio.canonical_service", label("service.istio.io/canonical-name").unwrap_or("unknown")),
        literal("istio.mesh_id", cx.node.meta("MESH_ID").unwrap_or("unknown")),
        literal("istio.namespace", if cx.node.namespace.is_empty() { "default" } else { &cx.node.namespace }),
        literal("istio.cluster_id", if cx.node.cluster_id.is_empty() { "unknown" } else { &cx.node.cluster_id }),
        dry_run("allow_policy.name", "istio_dry_run_allow_shadow_effective_policy_id"),
        dry_run("allow_policy.result", "istio_dry_run_allow_shadow_engine_result"),
        dry_run("deny_policy.name", "istio_dry_run_deny_shadow_effective_policy_id"),
        dry_run("deny_policy.result", "istio_dry_run_deny_shadow_engine_result"),
    ]
}

fn tag(name: &str, kind: Type) -> CustomTag {
    CustomTag { tag: name.to_owned(), r#type: Some(kind) }
}

fn environment(name: &str, default_value: &str) -> Type {
    Type::Environment(Environment { name: name.to_owned(), default_value: default_value.to_owned() })
}

fn header(name: &str, default_value: &str) -> Type {
    Type::RequestHeader(Header { name: name.to_owned(), default_value: default_value.to_owned() })
}

fn proxy_config_tags(cx: &Context<'_>) -> Vec<CustomTag> {
    let tags = cx.proxy_config.tracing.iter().flat_map(|t| &t.custom_tags);
    tags.filter_map(|(name, t)| match (&t.literal, &t.environment, &t.header) {
        (Some(l), _, _) => Some(literal(name, &l.value)),
        (_, Some(e), _) => Some(tag(name, environment(&e.name, &e.default_value))),
        (_, _, Some(h)) => Some(tag(name, header(&h.name, &h.default_value))),
        _ => None,
    })
    .collect()
}

fn rule_tag(cx: &Context<'_>, name: &str, t: &RuleTag) -> Option<CustomTag> {
    match (&t.literal, &t.environment, &t.header, &t.formatter) {
        (Some(l), _, _, _) => Some(literal(name, &l.value)),
        (_, Some(e), _, _) => Some(tag(name, environment(&e.name, &e.default_value))),
        (_, _, Some(h), _) => Some(tag(name, header(&h.name, &h.default_value))),
        (_, _, _, Some(f)) if cx.node.is_at_least((1, 29, 0)) => Some(tag(name, Type::Value(f.value.clone()))),
        _ => None,
    }
}
