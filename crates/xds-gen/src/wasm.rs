//! WebAssembly modules and Lua code: their place in the filter chains, and what they are (istiod `model/extensions.go`).

use envoy_api::core::{
    AggregatedConfigSource, ApiVersion, AsyncDataSource, ConfigSource, DataSource, ExtensionConfigSource, HttpUri,
    RemoteDataSource, TypedExtensionConfig, async_data_source, config_source::ConfigSourceSpecifier, data_source,
    http_uri::HttpUpstreamType,
};
use envoy_api::http::{HttpFilter, http_filter};
use envoy_api::listener::{Filter, filter};
use envoy_api::pb::envoy::extensions::filters::http::lua::v3::Lua;
use envoy_api::pb::envoy::extensions::filters::{http::wasm::v3 as http_wasm, network::wasm::v3 as network_wasm};
use envoy_api::pb::envoy::extensions::wasm::v3::{
    EnvironmentVariables, FailurePolicy, PluginConfig, VmConfig, plugin_config::Vm,
};
use envoy_api::{Any, wkt};
use istio_api::WasmPlugin;
use istio_api::selector::WorkloadMode;
use istio_api::wasm_plugin::{EnvValueSource, FailStrategy, PluginPhase, PluginType, PullPolicy};
use mesh_types::ArcStr;
use push_context::{Config, Extension, Profile};
use serde_json::Value;

use crate::context::Context;
use crate::proto::{any, seconds};
use crate::telemetry::Side;

/// Where in a chain a plugin stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Phase {
    /// Before tokens are looked at.
    Authn,
    /// Before policies are.
    Authz,
    /// Before statistics.
    Stats,
    /// Anywhere: last.
    Any,
}

const ALL: [Phase; 4] = [Phase::Authn, Phase::Authz, Phase::Stats, Phase::Any];
const PREFIX: &str = "extensions.istio.io/trafficextension/";

fn resource_name(extension: &Config<Extension>) -> String {
    format!("{PREFIX}{}.{}", extension.namespace, extension.name)
}

/// The extensions of a chain to this port, in the order of their priority.
fn plugins<'a>(
    cx: &'a Context<'_>,
    side: Side,
    port: u16,
    phase: Phase,
    network: bool,
) -> impl Iterator<Item = &'a Config<Extension>> {
    let fits = move |extension: &Extension| {
        let spec = &extension.plugin;
        let own = match spec.phase {
            PluginPhase::Authn => Phase::Authn,
            PluginPhase::Authz => Phase::Authz,
            PluginPhase::Stats => Phase::Stats,
            PluginPhase::UnspecifiedPhase => Phase::Any,
        };
        let of_side = |mode: WorkloadMode| match mode {
            WorkloadMode::Client => side == Side::Client,
            WorkloadMode::Server => side == Side::Server,
            _ => true,
        };
        let of_port = |ports: &[istio_api::selector::PortSelector]| {
            ports.is_empty() || ports.iter().any(|p| p.number != 0 && p.number == u32::from(port))
        };
        own == phase
            && network == (spec.r#type == PluginType::Network)
            && (spec.r#match.is_empty() || spec.r#match.iter().any(|m| of_side(m.mode) && of_port(&m.ports)))
    };
    // DIFFERS: our own proxy runs neither WebAssembly nor Lua; it gets chains without the extensions.
    let known = cx.node.profile != Profile::Outrigger;
    let all = if known { cx.push.extensions(&cx.node.namespace, &cx.node.labels) } else { Vec::new() };
    let mut out: Vec<_> = all.into_iter().filter(|p| fits(&p.spec)).collect();
    out.sort_by_key(|p| std::cmp::Reverse(p.spec.plugin.priority.unwrap_or(i32::MIN)));
    out.into_iter().map(|p| &**p)
}

fn discovery(types: [&str; 2]) -> ExtensionConfigSource {
    ExtensionConfigSource {
        config_source: Some(ConfigSource {
            config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
            initial_fetch_timeout: Some(seconds(0)),
            resource_api_version: ApiVersion::V3 as i32,
            ..ConfigSource::default()
        }),
        type_urls: types.map(|t| format!("type.googleapis.com/envoy.extensions.filters.{t}")).into(),
        ..ExtensionConfigSource::default()
    }
}

/// HTTP filters of one phase.
pub(crate) fn http<'a>(
    cx: &'a Context<'_>,
    side: Side,
    port: u16,
    phase: Phase,
) -> impl Iterator<Item = HttpFilter> + use<'a> {
    plugins(cx, side, port, phase, false).map(|extension| HttpFilter {
        name: resource_name(extension),
        config_type: Some(match &extension.spec.lua {
            Some(code) => http_filter::ConfigType::TypedConfig(any(&Lua {
                default_source_code: Some(DataSource {
                    specifier: Some(data_source::Specifier::InlineString(code.clone())),
                    ..DataSource::default()
                }),
                ..Lua::default()
            })),
            None => {
                let discovered = discovery(["http.wasm.v3.Wasm", "http.rbac.v3.RBAC"]);
                http_filter::ConfigType::ConfigDiscovery(discovered)
            }
        }),
        ..HttpFilter::default()
    })
}

/// Network filters of one phase.
pub(crate) fn network<'a>(
    cx: &'a Context<'_>,
    side: Side,
    port: u16,
    phase: Phase,
) -> impl Iterator<Item = Filter> + use<'a> {
    plugins(cx, side, port, phase, true).map(|plugin| Filter {
        name: resource_name(plugin),
        config_type: Some(filter::ConfigType::ConfigDiscovery(discovery([
            "network.wasm.v3.Wasm",
            "network.rbac.v3.RBAC",
        ]))),
    })
}

/// Network filters of all phases, before an HTTP connection manager.
pub(crate) fn before_http<'a>(cx: &'a Context<'_>, side: Side, port: u16) -> impl Iterator<Item = Filter> + use<'a> {
    ALL.into_iter().flat_map(move |phase| network(cx, side, port, phase))
}

/// The modules of these names, of the proxy's namespace or the root's; Lua code is part of the listeners.
pub(crate) fn configurations(cx: &Context<'_>, wanted: impl Fn(&str) -> bool) -> Vec<TypedExtensionConfig> {
    let extensions = cx.push.extensions(&cx.node.namespace, &cx.node.labels).into_iter();
    let named = extensions
        .filter(|extension| extension.spec.lua.is_none())
        .map(|plugin| (ArcStr::from(resource_name(plugin)), plugin));
    named
        .filter(|(name, _)| wanted(name))
        .map(|(name, plugin)| TypedExtensionConfig { name: name.to_string(), typed_config: Some(config(plugin)) })
        .collect()
}

fn config(plugin: &Config<Extension>) -> Any {
    let config = Some(plugin_config(plugin));
    match plugin.spec.plugin.r#type {
        PluginType::Network => any(&network_wasm::Wasm { config }),
        _ => any(&http_wasm::Wasm { config }),
    }
}

fn plugin_config(plugin: &Config<Extension>) -> PluginConfig {
    let spec = &plugin.spec.plugin;
    let settings = spec.plugin_config.clone().filter(|fields| !fields.is_empty()).map(Value::Object);
    PluginConfig {
        name: format!("{}.{}", plugin.namespace, plugin.name),
        root_id: spec.plugin_name.clone(),
        configuration: Some(settings.map_or_else(Any::default, |c| any(&wkt::StringValue { value: c.to_string() }))),
        failure_policy: match spec.fail_strategy {
            FailStrategy::FailOpen => FailurePolicy::FailOpen,
            FailStrategy::FailClose => FailurePolicy::FailClosed,
            FailStrategy::FailReload => FailurePolicy::FailReload,
        } as i32,
        vm: Some(Vm::VmConfig(vm(plugin))),
        ..PluginConfig::default()
    }
}

/// The machine; what the agent needs to fetch the module stands in its environment.
fn vm(plugin: &Config<Extension>) -> VmConfig {
    let spec = &plugin.spec.plugin;
    let mut environment = EnvironmentVariables::default();
    let mut set = |key: &str, value: String| {
        environment.key_values.insert(key.to_owned(), value);
    };
    if !spec.image_pull_secret.is_empty() {
        let name = spec.image_pull_secret.trim_start_matches("kubernetes://");
        let name = name.rsplit('/').next().unwrap_or(name);
        set("ISTIO_META_WASM_IMAGE_PULL_SECRET", format!("kubernetes://{}/{name}", plugin.namespace));
    }
    match spec.image_pull_policy {
        PullPolicy::UnspecifiedPolicy => {}
        PullPolicy::Ifnotpresent => set("ISTIO_META_WASM_IMAGE_PULL_POLICY", "IfNotPresent".to_owned()),
        PullPolicy::Always => set("ISTIO_META_WASM_IMAGE_PULL_POLICY", "Always".to_owned()),
    }
    set("ISTIO_META_WASM_PLUGIN_RESOURCE_VERSION", String::new());
    for variable in spec.vm_config.iter().flat_map(|vm| &vm.env) {
        match variable.value_from {
            EnvValueSource::Inline => {
                environment.key_values.insert(variable.name.clone(), variable.value.clone());
            }
            EnvValueSource::Host => environment.host_env_keys.push(variable.name.clone()),
        }
    }
    VmConfig {
        runtime: "envoy.wasm.runtime.v8".to_owned(),
        code: Some(code(spec)),
        environment_variables: Some(environment),
        ..VmConfig::default()
    }
}

fn code(spec: &WasmPlugin) -> AsyncDataSource {
    let specifier = match spec.url.strip_prefix("file://") {
        Some(path) => async_data_source::Specifier::Local(DataSource {
            specifier: Some(data_source::Specifier::Filename(path.to_owned())),
            ..DataSource::default()
        }),
        None => async_data_source::Specifier::Remote(RemoteDataSource {
            http_uri: Some(HttpUri {
                uri: if spec.url.contains("://") { spec.url.clone() } else { format!("oci://{}", spec.url) },
                timeout: Some(seconds(30)),
                // The agent fetches it.
                http_upstream_type: Some(HttpUpstreamType::Cluster("_".to_owned())),
            }),
            sha256: spec.sha256.clone(),
            ..RemoteDataSource::default()
        }),
    };
    AsyncDataSource { specifier: Some(specifier) }
}
