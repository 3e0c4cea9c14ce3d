use std::process::Command;

use crate::Output;

/// What a mesh could leave behind on the host, as text that compares.
#[derive(Debug, Eq, PartialEq)]
pub struct HostState {
    links: String,
    addresses: String,
    routes: String,
    rules: String,
    namespaces: String,
    nft: String,
    mounts: String,
    cgroups: Vec<String>,
    sysctls: Vec<String>,
    state: Vec<String>,
}

impl HostState {
    /// Reads it now; of the state folders only that of the mesh called `name`, as other meshes may run.
    pub fn read(name: &str) -> HostState {
        let ip = |arguments: &[&str]| Output::of(Command::new("ip").args(["-j"]).args(arguments)).stdout;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        HostState {
            links: ip(&["link"]),
            addresses: without_lifetimes(&ip(&["address"])),
            routes: ip(&["route", "show", "table", "all"]),
            rules: ip(&["rule"]),
            namespaces: ip(&["netns"]),
            nft: Output::of(Command::new("nft").args(["-j", "list", "ruleset"])).stdout,
            mounts,
            cgroups: folders("/sys/fs/cgroup"),
            sysctls: ["net/ipv4/ip_forward", "net/ipv4/conf/all/rp_filter", "net/ipv6/conf/all/forwarding"]
                .map(|name| std::fs::read_to_string(format!("/proc/sys/{name}")).unwrap_or_default())
                .to_vec(),
            state: folders(&format!("/run/outrigger/{name}")),
        }
    }
}

/// Addresses that DHCP gave count down; that is not a mesh's doing.
fn without_lifetimes(json: &str) -> String {
    let mut links: serde_json::Value = serde_json::from_str(json).unwrap_or_default();
    for link in links.as_array_mut().into_iter().flatten() {
        for address in link["addr_info"].as_array_mut().into_iter().flatten() {
            if let Some(address) = address.as_object_mut() {
                address.remove("valid_life_time");
                address.remove("preferred_life_time");
            }
        }
    }
    links.to_string()
}

/// All folders below one, sorted.
fn folders(path: &str) -> Vec<String> {
    let found = Output::of(Command::new("find").args([path, "-xdev", "-mindepth", "1", "-type", "d"])).stdout;
    let mut found: Vec<String> = found.lines().map(str::to_owned).collect();
    found.sort();
    found
}
