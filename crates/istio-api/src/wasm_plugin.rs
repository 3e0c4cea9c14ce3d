//! WebAssembly modules in the filter chain.

use serde_json::{Map, Value};

use crate::selector::PolicyTargetReference;
use crate::selector::PortSelector;
use crate::selector::WorkloadMode;
use crate::selector::WorkloadSelector;
use crate::wire::{enumeration, message};

message! {
    /// `extensions.v1alpha1.WasmPlugin`.
    WasmPlugin {
        selector: Option<WorkloadSelector>,
        target_ref "targetRef": Option<PolicyTargetReference>,
        target_refs "targetRefs": Vec<PolicyTargetReference>,
        url: String,
        sha256: String,
        image_pull_policy "imagePullPolicy": PullPolicy,
        image_pull_secret "imagePullSecret": String,
        verification_key "verificationKey": String,
        plugin_config "pluginConfig": Option<Map<String, Value>>,
        plugin_name "pluginName": String,
        phase: PluginPhase,
        priority: Option<i32>,
        fail_strategy "failStrategy": FailStrategy,
        vm_config "vmConfig": Option<VmConfig>,
        r#match: Vec<TrafficSelector>,
        r#type: PluginType,
    }
}

message! {
    /// `extensions.v1alpha1.WasmPlugin.TrafficSelector`.
    TrafficSelector {
        mode: WorkloadMode,
        ports: Vec<PortSelector>,
    }
}

message! {
    /// `extensions.v1alpha1.VmConfig`.
    VmConfig {
        env: Vec<EnvVar>,
    }
}

message! {
    /// `extensions.v1alpha1.EnvVar`.
    EnvVar {
        name: String,
        value_from "valueFrom": EnvValueSource,
        value: String,
    }
}

enumeration! {
    /// `extensions.v1alpha1.PluginType`.
    PluginType {
        UnspecifiedPluginType = 0 "UNSPECIFIED_PLUGIN_TYPE",
        Http = 1 "HTTP",
        Network = 2 "NETWORK",
    }
}

enumeration! {
    /// `extensions.v1alpha1.PluginPhase`.
    PluginPhase {
        UnspecifiedPhase = 0 "UNSPECIFIED_PHASE",
        Authn = 1 "AUTHN",
        Authz = 2 "AUTHZ",
        Stats = 3 "STATS",
    }
}

enumeration! {
    /// `extensions.v1alpha1.PullPolicy`.
    PullPolicy {
        UnspecifiedPolicy = 0 "UNSPECIFIED_POLICY",
        Ifnotpresent = 1 "IfNotPresent",
        Always = 2 "Always",
    }
}

enumeration! {
    /// `extensions.v1alpha1.EnvValueSource`.
    EnvValueSource {
        Inline = 0 "INLINE",
        Host = 1 "HOST",
    }
}

enumeration! {
    /// `extensions.v1alpha1.FailStrategy`.
    FailStrategy {
        FailClose = 0 "FAIL_CLOSE",
        FailOpen = 1 "FAIL_OPEN",
        FailReload = 2 "FAIL_RELOAD",
    }
}
