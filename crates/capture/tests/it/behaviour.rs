//! Who is redirected where: real servers and clients, for every back end.

use crate::world::{APP, PROXY, World};
use crate::{apply, cannot_load_programs};

pub(crate) const INJECTED: [&str; 15] =
    ["-p", "15001", "-z", "15006", "-u", "1337", "-g", "1337", "-i", "*", "-b", "*", "-d", "15090,15021,15020", "-x"];

/// (name, extra flags); the last one captures outbound traffic by programs on the pod's cgroup.
pub(crate) const BACKENDS: [(&str, &[&str]); 4] = [
    ("nftables", &["--native-nftables"]),
    ("iptables-nft", &["--force-iptables-binary", "nft"]),
    ("iptables-legacy", &["--force-iptables-binary", "legacy"]),
    ("eBPF", &["--native-nftables"]),
];

/// A pod for this back end and the flags that choose it, or nothing after saying why.
pub(crate) fn world(name: &str, extra: &[&'static str]) -> Option<(World, Vec<String>)> {
    let by_programs = name == "eBPF";
    if by_programs && cannot_load_programs() {
        return None;
    }
    let world = World::new(by_programs)?;
    let mut flags: Vec<String> = extra.iter().map(|flag| (*flag).to_owned()).collect();
    if let Some(cgroup) = &world.cgroup {
        flags.extend(["--ebpf-cgroup".to_owned(), cgroup.display().to_string()]);
    }
    Some((world, flags))
}

pub(crate) fn run(world: &World, flags: &[&str], extra: &[String]) {
    apply(&world.pod, &flags.iter().copied().chain(extra.iter().map(String::as_str)).collect::<Vec<_>>());
}

#[test]
fn everybody_is_redirected_where_they_belong() {
    for (name, extra) in BACKENDS {
        for mode in ["REDIRECT", "TPROXY"] {
            let Some((world, extra)) = world(name, extra) else { continue };
            println!("{name} {mode}");
            let flags = ["", "-m", mode, "--redirect-dns", "--capture-all-dns", "--dual-stack", "-o", "5432"];
            run(&world, &[&INJECTED[..], &flags].concat(), &extra);
            // The proxy sees a connection that a program led to it come from this host.
            let from = if name == "eBPF" { "127.0.0.1" } else { "10.244.0.7" };

            // Outbound: the application through the proxy, the proxy itself not, excluded ports neither.
            world.pod_gets(APP, "tcp", "10.244.0.1", 9000, &format!("proxy 15001 for 10.244.0.1:9000 from {from}"));
            world.pod_gets(APP, "tcp", "::ffff:10.244.0.1", 9000, "proxy 15001 for 10.244.0.1:9000");
            let from6 = if name == "eBPF" { "::1" } else { "fd00:10:244::7" };
            let want = format!("proxy 15001 for [fd00:10:244::1]:9000 from {from6}");
            world.pod_gets(APP, "tcp", "fd00:10:244::1", 9000, &want);
            world.pod_gets(APP, "mptcp", "10.244.0.1", 9000, "proxy 15001 for 10.244.0.1:9000");
            world.pod_gets(PROXY, "tcp", "10.244.0.1", 9000, "outside");
            world.pod_gets(PROXY, "tcp", "fd00:10:244::1", 9000, "outside");
            world.pod_gets(APP, "tcp", "10.244.0.1", 5432, "outside");
            // Nobody listens there, the proxy gets it all the same.
            world.pod_gets(APP, "tcp", "192.0.2.1", 80, "proxy 15001 for 192.0.2.1:80");

            // Inbound: everything but the excluded ports and the tunnel. TPROXY shows the client's address.
            world.outside_gets("10.244.0.7", 8080, "proxy 15006 for 10.244.0.7:8080 from 10.244.0.1");
            world.outside_gets("fd00:10:244::7", 8080, "proxy 15006 for [fd00:10:244::7]:8080");
            world.outside_gets("10.244.0.7", 15021, "health");
            if mode == "REDIRECT" {
                world.outside_gets("10.244.0.7", 15008, "tunnel");
            }

            // Loopback: the application reaches itself; the proxy calling its own pod comes in again.
            world.pod_gets(APP, "tcp", "127.0.0.1", 8080, "app");
            world.pod_gets(APP, "tcp", "::1", 8080, "app");
            world.pod_gets(APP, "tcp", "10.244.0.7", 8080, "app");
            world.pod_gets(PROXY, "tcp", "127.0.0.1", 8080, "app");
            if mode == "REDIRECT" {
                world.pod_gets(PROXY, "tcp", "10.244.0.7", 8080, "proxy 15006 for 10.244.0.7:8080");
                world.pod_gets(PROXY, "tcp", "fd00:10:244::7", 8080, "proxy 15006 for [fd00:10:244::7]:8080");
            }

            // DNS: the application asks the agent, whichever server it names; the proxy asks the server. Other UDP is left alone.
            world.pod_gets(APP, "udp", "10.244.0.1", 53, "agent");
            world.pod_gets(APP, "udp", "fd00:10:244::1", 53, "agent");
            world.pod_gets(PROXY, "udp", "10.244.0.1", 53, "server");
            world.pod_gets(PROXY, "udp", "fd00:10:244::1", 53, "server");
            world.pod_gets(APP, "udp", "10.244.0.1", 123, "time");
            // The same without a connection, as some resolvers ask.
            world.pod_gets(APP, "datagram", "10.244.0.1", 53, "agent");
            world.pod_gets(APP, "datagram", "fd00:10:244::1", 53, "agent");
            world.pod_gets(APP, "datagram", "10.244.0.1", 123, "time");

            if name == "nftables" {
                let mut nft = netns::nft::Nft::open_in(&world.pod).expect("socket");
                let counted = capture::captured(&mut nft).expect("counters");
                assert_eq!(counted.outbound, 5, "{counted:?}");
                assert!(counted.inbound >= 2 && counted.dns >= 2, "{counted:?}");
            }

            // And after a clean-up nobody is.
            run(&world, &["--cleanup-only"], &extra);
            world.pod_gets(APP, "tcp", "10.244.0.1", 9000, "outside");
            world.outside_gets("10.244.0.7", 8080, "app");
            world.pod_gets(APP, "udp", "10.244.0.1", 53, "server");
        }
    }
}

#[test]
fn only_what_is_listed_is_captured() {
    for (name, extra) in BACKENDS {
        let Some((world, extra)) = world(name, extra) else { continue };
        println!("{name}");
        let only = ["-u", "1337", "-i", "192.0.2.0/24", "-x", "192.0.2.128/25", "-q", "8999:9001", "-b", "8000:8100"];
        run(&world, &[&only[..], &["-o", "5000:"]].concat(), &extra);
        // Excluded ports come before captured ones.
        world.pod_gets(APP, "tcp", "10.244.0.1", 9000, "outside");
        run(&world, &only, &extra);
        world.pod_gets(APP, "tcp", "192.0.2.1", 80, "proxy 15001 for 192.0.2.1:80");
        world.pod_gets(APP, "tcp", "192.0.2.200", 80, "");
        world.pod_gets(APP, "tcp", "10.244.0.1", 9000, "proxy 15001 for 10.244.0.1:9000");
        world.pod_gets(APP, "tcp", "10.244.0.1", 5432, "outside");
        world.pod_gets(APP, "udp", "10.244.0.1", 53, "server");
        world.outside_gets("10.244.0.7", 8080, "proxy 15006");
        world.outside_gets("10.244.0.7", 15021, "health");
    }
}

/// More owner groups than one iptables rule can hold.
#[test]
fn many_owner_groups_are_captured_and_no_others() {
    let groups = (2000..2064).map(|g| g.to_string()).collect::<Vec<_>>().join(",");
    for (name, extra) in BACKENDS {
        let Some((world, extra)) = world(name, extra) else { continue };
        println!("{name}");
        let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
        let args = [&INJECTED[..], &[""], &extra].concat();
        let out = crate::tool(&world.pod, &args, &[("ISTIO_OUTBOUND_OWNER_GROUPS", &groups)]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        for member in [2000, 2063] {
            world.pod_gets(member, "tcp", "10.244.0.1", 9000, "proxy 15001");
            world.pod_gets(member, "tcp", "127.0.0.1", 8080, "app");
        }
        world.pod_gets(APP, "tcp", "10.244.0.1", 9000, "outside");
        let again = crate::tool(&world.pod, &args, &[("ISTIO_OUTBOUND_OWNER_GROUPS", &groups)]);
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    }
}
