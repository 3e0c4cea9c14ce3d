//! WebAssembly modules and Lua code in the filter chain.

use serde_json::{Map, Value};

use crate::selector::{PolicyTargetReference, WorkloadSelector};
use crate::wasm_plugin::{FailStrategy, PluginType, PullPolicy, TrafficSelector, VmConfig};
use crate::wire::{enumeration, message};

message! {
    /// `extensions.v1alpha1.TrafficExtension`.
    TrafficExtension {
        selector: Option<WorkloadSelector>,
        target_refs "targetRefs": Vec<PolicyTargetReference>,
        phase: ExecutionPhase,
        priority: Option<i32>,
        r#match: Vec<TrafficSelector>,
        wasm: Option<WasmConfig>,
        lua: Option<LuaConfig>,
    }
}

message! {
    /// `extensions.v1alpha1.WasmConfig`.
    WasmConfig {
        url: String,
        sha256: String,
        image_pull_policy "imagePullPolicy": PullPolicy,
        image_pull_secret "imagePullSecret": String,
        verification_key "verificationKey": String,
        plugin_config "pluginConfig": Option<Map<String, Value>>,
        plugin_name "pluginName": String,
        fail_strategy "failStrategy": FailStrategy,
        vm_config "vmConfig": Option<VmConfig>,
        r#type: PluginType,
    }
}

message! {
    /// `extensions.v1alpha1.LuaConfig`.
    LuaConfig {
        inline_code "inlineCode": String,
    }
}

enumeration! {
    /// `extensions.v1alpha1.TrafficExtension.ExecutionPhase`.
    ExecutionPhase {
        Unspecified = 0 "UNSPECIFIED",
        Authn = 1 "AUTHN",
        Authz = 2 "AUTHZ",
        Stats = 3 "STATS",
    }
}
