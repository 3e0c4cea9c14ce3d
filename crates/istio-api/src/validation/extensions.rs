//! WasmPlugin and TrafficExtension.

use super::Check;
use crate::traffic_extension::{TrafficExtension, WasmConfig};
use crate::wasm_plugin::{EnvValueSource, TrafficSelector, VmConfig};
use crate::{Violation, WasmPlugin};

/// Bytes of Lua code that istiod takes at most.
const MAX_LUA: usize = 65_536;

impl WasmPlugin {
    /// What istiod would refuse or warn of (`ValidateWasmPlugin`).
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            check.targets(&self.selector, &self.target_ref, &self.target_refs);
            module(check, &self.url, &self.sha256, &self.image_pull_secret, &self.plugin_name, &self.vm_config);
            selectors(check, &self.r#match);
        })
    }
}

impl TrafficExtension {
    /// What istiod would refuse or warn of (`ValidateTrafficExtension`).
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            check.require(self.wasm.is_some() != self.lua.is_some(), "exactly one of wasm or lua must be set");
            check.targets(&self.selector, &None, &self.target_refs);
            check.some("lua", &self.lua, |check, lua| {
                check.at("inlineCode", |check| {
                    check.require(!lua.inline_code.is_empty(), "lua.inlineCode cannot be empty");
                    check.require(lua.inline_code.len() <= MAX_LUA, "lua.inlineCode exceeds maximum size of 64KB");
                });
            });
            check.some("wasm", &self.wasm, |check, wasm: &WasmConfig| {
                module(check, &wasm.url, &wasm.sha256, &wasm.image_pull_secret, &wasm.plugin_name, &wasm.vm_config);
            });
            selectors(check, &self.r#match);
        })
    }
}

fn module(check: &mut Check, url: &str, sha256: &str, secret: &str, name: &str, vm: &Option<VmConfig>) {
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    check.at("url", |check| {
        check.require(!url.is_empty(), "url field needs to be set");
        check.require(escapes_are_valid(url), "is not a URL: % must be followed by two hexadecimal digits");
        check.require(matches!(scheme, "" | "file" | "http" | "https" | "oci"), "contains unsupported scheme");
    });
    let hex = sha256.len() == 64 && sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    check.at("sha256", |check| check.require(sha256.is_empty() || hex, "must match [a-f0-9]{64} pattern"));
    check.require(secret.len() <= 253, "imagePullSecret field must be less than 253 characters long");
    check.require(name.len() <= 256, "pluginName field must be less than 255 characters long");
    check.some("vmConfig", vm, |check, vm| {
        for (index, variable) in vm.env.iter().enumerate() {
            check.at(format_args!("env[{index}]"), |check| {
                check.require((1..=256).contains(&variable.name.len()), "name must have 1 to 256 characters");
                check.require(!vm.env[..index].iter().any(|other| other.name == variable.name), "duplicate env");
                let inline = variable.value_from == EnvValueSource::Inline;
                check.require(inline || variable.value.is_empty(), "value may only be set when valueFrom is INLINE");
            });
        }
    });
}

fn selectors(check: &mut Check, selectors: &[TrafficSelector]) {
    check.each("match", selectors, |check, selector| {
        check.each("ports", &selector.ports, |check, port| check.port("number", port.number));
    });
}

fn escapes_are_valid(url: &str) -> bool {
    let hex = |b: Option<&u8>| b.is_some_and(u8::is_ascii_hexdigit);
    let bytes = url.as_bytes();
    (0..bytes.len()).filter(|at| bytes[*at] == b'%').all(|at| hex(bytes.get(at + 1)) && hex(bytes.get(at + 2)))
}
