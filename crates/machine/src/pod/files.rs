//! The files every container of a pod gets: `/etc/hosts`, `/etc/resolv.conf`, `/etc/hostname`.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use super::facts::Facts;
use crate::container::Mount;

const FILES: [&str; 3] = ["hosts", "resolv.conf", "hostname"];

/// Makes the pod's folders and writes the files.
pub(super) fn write(facts: &Facts, folder: &Path, logs: &Path, dns: IpAddr) -> Result<(), String> {
    for path in [folder, logs, &folder.join("scratch")] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|error| format!("make {}: {error}", path.display()))?;
    }
    let contents = [hosts(facts), resolv_conf(facts, dns), format!("{}\n", facts.hostname())];
    for (name, content) in FILES.iter().zip(contents) {
        let path = folder.join(name);
        fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o644)))
            .map_err(|error| format!("write {}: {error}", path.display()))?;
    }
    Ok(())
}

/// Where they are mounted; before the container's own mounts, which may replace them.
pub(super) fn mounts(folder: &Path) -> impl Iterator<Item = Mount> {
    FILES.iter().map(move |name| Mount {
        source: folder.join(name),
        sub_path: None,
        target: format!("/etc/{name}"),
        read_only: false,
    })
}

/// As kubelet `pkg/kubelet/kubelet_pods.go`, `managedHostsFileContent`.
fn hosts(facts: &Facts) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let hostname = facts.hostname();
    let subdomain = facts.pod.spec.as_ref().and_then(|spec| spec.subdomain.as_deref()).filter(|name| !name.is_empty());
    for ip in &facts.ips {
        match subdomain {
            Some(sub) => {
                text.push_str(&format!("{ip}\t{hostname}.{sub}.{}.svc.cluster.local\t{hostname}\n", facts.namespace()))
            }
            None => text.push_str(&format!("{ip}\t{hostname}\n")),
        }
    }
    for alias in facts.pod.spec.iter().flat_map(|spec| spec.host_aliases.iter().flatten()) {
        text.push_str(&format!("{}\t{}\n", alias.ip, alias.hostnames.as_deref().unwrap_or_default().join("\t")));
    }
    text
}

fn resolv_conf(facts: &Facts, dns: IpAddr) -> String {
    let spec = facts.pod.spec.as_ref();
    let policy = spec.and_then(|spec| spec.dns_policy.as_deref()).unwrap_or("ClusterFirst");
    let namespace = facts.namespace();
    let (mut servers, mut searches, mut options) = match policy {
        "None" => (Vec::new(), Vec::new(), Vec::new()),
        // DIFFERS: the host's own resolvers cannot be reached from a pod; the cluster's server forwards to them.
        "Default" => (vec![dns.to_string()], Vec::new(), Vec::new()),
        _ => (
            vec![dns.to_string()],
            vec![format!("{namespace}.svc.cluster.local"), "svc.cluster.local".to_owned(), "cluster.local".to_owned()],
            vec!["ndots:5".to_owned()],
        ),
    };
    if let Some(config) = spec.and_then(|spec| spec.dns_config.as_ref()) {
        servers.extend(config.nameservers.iter().flatten().cloned());
        searches.extend(config.searches.iter().flatten().cloned());
        for option in config.options.iter().flatten() {
            let name = option.name.clone().unwrap_or_default();
            options.retain(|old: &String| old.split(':').next() != Some(&name));
            options.push(option.value.as_ref().map_or(name.clone(), |value| format!("{name}:{value}")));
        }
    }
    let mut text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    if !searches.is_empty() {
        text.push_str(&format!("search {}\n", searches.join(" ")));
    }
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    text
}
