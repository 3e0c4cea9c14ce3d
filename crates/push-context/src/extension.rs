//! TrafficExtensions, and WasmPlugins as if they were such (istiod `pilot/pkg/config/kube/extensions`).

use std::sync::Arc;

use config_store::{Body, Kind, Object, Snapshot};
use istio_api::traffic_extension::ExecutionPhase;
use istio_api::wasm_plugin::PluginPhase;
use istio_api::{TrafficExtension, WasmPlugin};

use crate::Config;
use crate::rules::ByNamespace;

/// After the name of what was a WasmPlugin; no object's own name can have it.
const TRANSLATED: &str = "~istio-translated-wasmplugin";

/// Code in the filter chain.
#[derive(Clone, Debug, PartialEq)]
pub struct Extension {
    /// Where it stands and, unless it is in Lua, what is run.
    pub plugin: WasmPlugin,
    /// Lua code.
    pub lua: Option<String>,
}

/// All of them by namespace, the oldest first.
pub(crate) fn by_namespace(snapshot: &Snapshot) -> ByNamespace<Extension> {
    let plugins = snapshot.list(Kind::WasmPlugin).filter_map(|object| match &object.body {
        Body::WasmPlugin(spec) => Some(of_plugin(object, (**spec).clone())),
        _ => None,
    });
    let extensions = snapshot.list(Kind::TrafficExtension).filter_map(|object| match &object.body {
        Body::TrafficExtension(spec) => Some(Config::of(object, of_extension(spec)?)),
        _ => None,
    });
    let mut out = ByNamespace::new();
    for config in plugins.chain(extensions) {
        out.entry(config.namespace.clone()).or_insert_with(Vec::new).push(Arc::new(config));
    }
    for list in out.values_mut() {
        list.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    }
    out
}

fn of_plugin(object: &Object, plugin: WasmPlugin) -> Config<Extension> {
    let name = format!("{}{TRANSLATED}", object.key.name).into();
    Config { name, ..Config::of(object, Extension { plugin, lua: None }) }
}

fn of_extension(spec: &TrafficExtension) -> Option<Extension> {
    let place = WasmPlugin {
        selector: spec.selector.clone(),
        target_refs: spec.target_refs.clone(),
        phase: match spec.phase {
            ExecutionPhase::Unspecified => PluginPhase::UnspecifiedPhase,
            ExecutionPhase::Authn => PluginPhase::Authn,
            ExecutionPhase::Authz => PluginPhase::Authz,
            ExecutionPhase::Stats => PluginPhase::Stats,
        },
        priority: spec.priority,
        r#match: spec.r#match.clone(),
        ..WasmPlugin::default()
    };
    if let Some(wasm) = spec.wasm.clone() {
        let plugin = WasmPlugin {
            url: wasm.url,
            sha256: wasm.sha256,
            image_pull_policy: wasm.image_pull_policy,
            image_pull_secret: wasm.image_pull_secret,
            plugin_config: wasm.plugin_config,
            plugin_name: wasm.plugin_name,
            fail_strategy: wasm.fail_strategy,
            vm_config: wasm.vm_config,
            r#type: wasm.r#type,
            ..place
        };
        return Some(Extension { plugin, lua: None });
    }
    Some(Extension { plugin: place, lua: Some(spec.lua.as_ref()?.inline_code.clone()) })
}
