//! Who a container's process is: user, groups, capabilities, limits; and becoming that.

use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};

/// The rights of a container's process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Credentials {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups, without `gid`.
    pub(crate) groups: Vec<u32>,
    /// Bounding set; root also has them effective, other users do not (Kubernetes sets no ambient capabilities).
    pub(crate) capabilities: u64,
    /// `allowPrivilegeEscalation: false`.
    pub(crate) no_new_privileges: bool,
}

/// Capability names in the order of their numbers (linux/capability.h).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// All capabilities known here.
pub(crate) const ALL: u64 = (1 << NAMES.len()) - 1;

/// What container runtimes grant by default (containerd's list).
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// Open files a container may have; container runtimes give 1 Mi, and proxies need many.
const MAX_FILES: u64 = 1 << 20;

fn bit(name: &str) -> Option<u64> {
    let name = name.strip_prefix("CAP_").unwrap_or(name);
    NAMES.iter().position(|known| known.eq_ignore_ascii_case(name)).map(|index| 1 << index)
}

/// Applies `securityContext.capabilities` to the default set. Unknown names are returned.
pub(crate) fn capability_set(add: &[String], drop: &[String]) -> (u64, Vec<String>) {
    let mut set = DEFAULT.iter().filter_map(|name| bit(name)).fold(0, |all, one| all | one);
    let mut unknown = Vec::new();
    let is_all = |name: &String| name.eq_ignore_ascii_case("ALL");
    // As runc's spec builders: ALL first, then single names, and what is added wins.
    if add.iter().any(is_all) {
        set = ALL;
    }
    if drop.iter().any(is_all) {
        set = 0;
    }
    for name in drop.iter().filter(|name| !is_all(name)) {
        match bit(name) {
            Some(one) => set &= !one,
            None => unknown.push(name.clone()),
        }
    }
    for name in add.iter().filter(|name| !is_all(name)) {
        match bit(name) {
            Some(one) => set |= one,
            None => unknown.push(name.clone()),
        }
    }
    (set, unknown)
}

impl Credentials {
    /// Takes on these rights for good. The last thing before exec, as most other steps need root.
    pub(crate) fn assume(&self) -> Result<(), String> {
        let what = |step: &'static str| move |error: rustix::io::Errno| format!("{step}: {error}");
        raise_file_limit();
        let wanted = CapabilitySet::from_bits_truncate(self.capabilities);
        for (index, name) in NAMES.iter().enumerate() {
            let one = CapabilitySet::from_bits_retain(1 << index);
            if !wanted.contains(one) {
                match rustix::thread::remove_capability_from_bounding_set(one) {
                    // An older kernel does not know the newest ones.
                    Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                    Err(error) => return Err(format!("drop capability {name}: {error}")),
                }
            }
        }
        let groups: Vec<Gid> = self.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        match rustix::thread::set_thread_groups(&groups) {
            Ok(()) => {}
            // A user namespace without a helper forbids it and has no groups to give up.
            Err(rustix::io::Errno::PERM) if groups.is_empty() => {}
            Err(error) => return Err(format!("set groups: {error}")),
        }
        let gid = Gid::from_raw(self.gid);
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(what("set group"))?;
        let uid = Uid::from_raw(self.uid);
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(what("set user"))?;
        if self.uid == 0 {
            let current = rustix::thread::capabilities(None).map_err(what("read capabilities"))?;
            let kept = current.permitted & wanted;
            rustix::thread::set_capabilities(
                None,
                CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
            )
            .map_err(what("set capabilities"))?;
        }
        if self.no_new_privileges {
            rustix::thread::set_no_new_privs(true).map_err(what("set no_new_privs"))?;
        }
        Ok(())
    }
}

fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: Some(MAX_FILES), maximum: Some(MAX_FILES) };
    if rustix::process::setrlimit(Resource::Nofile, wanted).is_err() {
        // Rootless: as far as the hard limit allows.
        let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istio_init_gets_net_admin_and_nothing_else() {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let (set, unknown) = capability_set(&names(&["NET_ADMIN", "NET_RAW"]), &names(&["ALL"]));
        assert_eq!(set, (1 << 12) | (1 << 13));
        assert!(unknown.is_empty());
        let (set, unknown) = capability_set(&names(&["CAP_SYS_TIME", "NOPE"]), &names(&["KILL"]));
        assert_ne!(set & (1 << 25), 0);
        assert_eq!(set & (1 << 5), 0);
        assert_eq!(unknown, ["NOPE"]);
    }
}
