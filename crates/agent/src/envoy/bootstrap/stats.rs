//! Which statistics Envoy keeps, how it names their parts, and when it writes them.

use serde_json::{Value, json};
use tracing::warn;

use crate::settings::Settings;

const TAGS_BEFORE_EXTRA: [(&str, &str); 9] = [
    ("cluster_name", r"^cluster(\.(.+);)"),
    ("http_conn_manager_prefix", r"^http\.(((?:[_.[:digit:]\w]*|[_\[\]aAbBcCdDeEfF[:digit:]\w\:]*));\.)"),
    ("thread_name", r"^server(\.(.+))\.watchdog"),
    ("tcp_prefix", r"^tcp\.((.*?)\.)\w+?$"),
    ("response_code", r"_rq(_(\d{3}))$"),
    ("response_code_class", r"_rq(_(\dxx))$"),
    (
        "http_conn_manager_listener_prefix",
        r"^listener(?=\.).*?\.http\.(((?:[_.[:digit:]]*|[_\[\]aAbBcCdDeEfF[:digit:]]*))\.)",
    ),
    ("listener_address", r"^listener\.(((?:[_.[:digit:]]*|[_\[\]aAbBcCdDeEfF[:digit:]]*))\.)"),
    ("mongo_prefix", r"^mongo\.(.+?)\.(collection|cmd|cx_|op_|delays_|decoding_)(.*?)$"),
];

const TAGS_AFTER_EXTRA: [(&str, &str); 7] = [
    ("cache", r"(cache\.(.+?)\.)"),
    ("component", r"(component\.(.+?)\.)"),
    ("tag", r"(tag\.(.+?);\.)"),
    ("wasm_filter", r"(wasm_filter\.(.+?)\.)"),
    ("authz_enforce_result", r"rbac(\.(allowed|denied))"),
    ("authz_dry_run_action", r"(\.istio_dry_run_(allow|deny)_)"),
    ("authz_dry_run_result", r"(\.shadow_(allowed|denied))"),
];

/// `stats_config` of the bootstrap. Source: istio `pkg/bootstrap/config.go`, `getStatsOptions`.
pub(super) fn config(settings: &Settings) -> Value {
    let mut config = json!({
        "use_all_default_tags": false,
        "stats_tags": tags(settings),
        "stats_matcher": { "inclusion_list": { "patterns": patterns(settings) } },
    });
    if let Some(text) = settings.envoy.annotations.get("sidecar.istio.io/statsHistogramBuckets") {
        match serde_json::from_str::<std::collections::BTreeMap<String, Vec<f64>>>(text) {
            Ok(buckets) => {
                let settings = buckets
                    .iter()
                    .map(|(prefix, buckets)| json!({ "match": { "prefix": prefix }, "buckets": buckets }));
                config["histogram_bucket_settings"] = settings.collect();
            }
            Err(error) => warn!(%error, "annotation sidecar.istio.io/statsHistogramBuckets is ignored"),
        }
    }
    config
}

/// The intervals that annotations ask for: `stats_flush_interval`, `stats_eviction_interval`.
pub(super) fn intervals(settings: &Settings) -> Vec<(&'static str, String)> {
    let seconds = |name: &str| {
        let text = settings.envoy.annotations.get(name)?;
        let parsed = text.parse::<istio_api::Duration>().ok().and_then(istio_api::Duration::to_std);
        if parsed.is_none() {
            warn!(annotation = name, value = text, "not a duration; ignored");
        }
        parsed
    };
    let flush = seconds("sidecar.istio.io/statsFlushInterval");
    let mut found = Vec::new();
    found.extend(flush.map(|flush| ("stats_flush_interval", format!("{}s", flush.as_secs_f64()))));
    if let Some(eviction) = seconds("sidecar.istio.io/statsEvictionInterval") {
        let flush = flush.unwrap_or(std::time::Duration::from_secs(5)).as_nanos();
        if flush == 0 || eviction.as_nanos() % flush != 0 {
            warn!("annotation sidecar.istio.io/statsEvictionInterval is not a multiple of the flush interval; ignored");
        } else {
            found.push(("stats_eviction_interval", format!("{}s", eviction.as_secs())));
        }
    }
    found
}

fn tags(settings: &Settings) -> Vec<Value> {
    let tag = |(name, regex): &(&str, &str)| json!({ "tag_name": name, "regex": regex });
    let annotated = settings.envoy.annotations.get("sidecar.istio.io/extraStatTags");
    let annotated = annotated.into_iter().flat_map(|names| names.split(','));
    let configured = settings.proxy_config.extra_stat_tags.iter().map(String::as_str);
    let mut extra: Vec<&str> = Vec::new();
    for name in configured.chain(annotated) {
        if !name.is_empty() && !extra.contains(&name) {
            extra.push(name);
        }
    }
    let extra = extra.into_iter().map(|name| json!({ "tag_name": name, "regex": format!(r"({name}=\.=(.*?);\.;)") }));
    TAGS_BEFORE_EXTRA.iter().map(tag).chain(extra).chain(TAGS_AFTER_EXTRA.iter().map(tag)).collect()
}

/// Those that readiness and drain need, and what annotation or configuration ask for; the annotation wins.
fn patterns(settings: &Settings) -> Vec<Value> {
    let matcher = settings.proxy_config.proxy_stats_matcher.as_ref();
    let addresses: Vec<String> = settings.addresses.iter().map(ToString::to_string).collect();
    let asked = |annotation: &str, configured: Option<&Vec<String>>, required: &[&str]| {
        let annotated = settings.envoy.annotations.get(annotation).filter(|text| !text.is_empty());
        let asked: Vec<String> = match annotated {
            Some(text) => text.split(',').map(str::to_owned).collect(),
            None => configured.cloned().unwrap_or_default(),
        };
        let all = asked.into_iter().chain(required.iter().map(ToString::to_string));
        all.flat_map(|pattern| {
            if pattern.contains("{pod_ip}") {
                addresses.iter().map(|ip| pattern.replace("{pod_ip}", ip)).collect()
            } else {
                vec![pattern]
            }
        })
        .collect::<Vec<_>>()
    };
    let prefixes = asked(
        "sidecar.istio.io/statsInclusionPrefixes",
        matcher.map(|m| &m.inclusion_prefixes),
        &["cluster_manager", "listener_manager", "server", "cluster.xds-grpc", "wasm"],
    );
    let mut required = vec!["rbac.allowed", "rbac.denied", "shadow_allowed", "shadow_denied"];
    if settings.drain.exit_on_zero {
        required.push("downstream_cx_active");
    }
    let suffixes = asked("sidecar.istio.io/statsInclusionSuffixes", matcher.map(|m| &m.inclusion_suffixes), &required);
    let regexes = asked(
        "sidecar.istio.io/statsInclusionRegexps",
        matcher.map(|m| &m.inclusion_regexps),
        &[r"vhost\..*\.route\..*"],
    );
    let mut patterns = vec![json!({ "prefix": "reporter=" })];
    patterns.extend(prefixes.into_iter().map(|prefix| json!({ "prefix": prefix })));
    patterns.extend(suffixes.into_iter().map(|suffix| json!({ "suffix": suffix })));
    patterns.extend(regexes.into_iter().map(|regex| json!({ "safe_regex": { "regex": regex } })));
    patterns.push(json!({ "prefix": "component" }));
    patterns.push(json!({ "prefix": "istio" }));
    patterns
}
