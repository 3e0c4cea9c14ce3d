//! The program in fresh network namespaces; the host's own is never touched.

mod applied;
mod behaviour;
mod ebpf;
mod inspect;
mod traffic;
mod undo;
mod world;

use std::process::{Command, Output};

use netns::{Netlink, Netns};

const TOOL: &str = env!("CARGO_BIN_EXE_istio-iptables");

/// A fresh namespace with loopback and `eth0`, or a visible reason why the test does not run.
fn pod(addresses: &[&str]) -> Option<Netns> {
    let ns = match Netns::create() {
        Ok(ns) if Command::new("iptables-nft").arg("-V").output().is_ok() => ns,
        _ => {
            println!("SKIPPED: needs root and iptables");
            return None;
        }
    };
    let mut netlink = Netlink::open_in(&ns).expect("socket");
    netlink.loopback_up().expect("lo");
    netlink.add_veth("eth0", "eth0p", &ns).expect("veth");
    netlink.set_up("eth0").expect("up");
    netlink.set_up("eth0p").expect("up");
    for address in addresses {
        let (ip, prefix) = address.split_once('/').expect("prefix");
        netlink.add_addr("eth0", ip.parse().expect("address"), prefix.parse().expect("prefix")).expect("address");
    }
    Some(ns)
}

/// Runs the program in a namespace with an empty environment but for `env`.
fn tool(ns: &Netns, args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(TOOL);
    command.args(args).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).envs(env.iter().copied());
    ns.run(|| command.output()).expect("enter").expect("run")
}

#[track_caller]
fn apply(ns: &Netns, args: &[&str]) {
    let out = tool(ns, args, &[]);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// What a program prints in a namespace.
fn output(ns: &Netns, program: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    let out = ns.run(|| command.args(args).output()).expect("enter").unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Says visibly why eBPF programs cannot be tried here, when they cannot.
fn cannot_load_programs() -> bool {
    let (Some(ns), Some(cgroup)) = (pod(&["10.244.0.7/24"]), world::new_cgroup()) else { return true };
    let path = cgroup.display().to_string();
    let out = tool(&ns, &["--native-nftables", "--ebpf-cgroup", &path], &[]);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    tool(&ns, &["--cleanup-only", "--ebpf-cgroup", &path], &[]);
    let _ = std::fs::remove_dir(&cgroup);
    if !out.status.success() {
        println!("SKIPPED: this system loads no eBPF programs: {text}");
        // A refusal by the verifier is our own fault and no reason to skip.
        assert!(!text.contains("erifier"), "{text}");
    }
    !out.status.success()
}
