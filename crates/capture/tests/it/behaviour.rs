//! Who is redirected where: real servers and clients, for every back end.
#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::process::CommandExt;
use std::process::Command;

use netns::{Netlink, Netns, Route};
use socket2::{Domain, Socket, Type};

use crate::{apply, pod};

/// Makes sockets that this thread opens or accepts belong to the proxy's user and group, as the rules tell owners apart.
fn become_proxy() {
    // SAFETY: both calls change only credentials of the calling thread, which is one of this file's own.
    unsafe {
        libc::setfsgid(PROXY);
        libc::setfsuid(PROXY);
    }
}

const PROXY: u32 = 1337;
const APP: u32 = 1000;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("address")
}

/// A pod and the network outside of it.
struct World {
    pod: Netns,
    outside: Netns,
}

impl World {
    fn new() -> Option<Self> {
        let pod_ns = pod(&[])?;
        let outside = Netns::create().expect("namespace");
        let (mut inside, mut out) =
            (Netlink::open_in(&pod_ns).expect("socket"), Netlink::open_in(&outside).expect("socket"));
        inside.del_link("eth0").expect("delete");
        out.loopback_up().expect("lo");
        inside.add_veth("eth0", "wire", &outside).expect("veth");
        for (netlink, dev, v4, v6) in
            [(&mut inside, "eth0", "10.244.0.7", "fd00:10:244::7"), (&mut out, "wire", "10.244.0.1", "fd00:10:244::1")]
        {
            netlink.add_addr(dev, ip(v4), 24).expect("v4");
            netlink.add_addr(dev, ip(v6), 64).expect("v6");
            netlink.set_up(dev).expect("up");
        }
        inside.add_route(&Route::default_via(ip("10.244.0.1"))).expect("route");
        let world = Self { pod: pod_ns, outside };
        // The proxy says through which port a connection came, and where it had been going.
        for port in [15001, 15006] {
            world.serve(&world.pod, port, true, move |stream, peer| {
                let to = capture::original_destination(stream).expect("original destination");
                format!("proxy {port} for {to} from {}", peer.ip().to_canonical())
            });
        }
        for (port, name) in [(8080, "app"), (15021, "health"), (15008, "tunnel")] {
            world.serve(&world.pod, port, false, move |_, _| name.to_owned());
        }
        for port in [9000, 53, 5432] {
            world.serve(&world.outside, port, false, |_, _| "outside".to_owned());
        }
        world.answer(&world.pod, 15053, "agent");
        world.answer(&world.outside, 53, "server");
        world.answer(&world.outside, 123, "time");
        Some(world)
    }

    fn serve(
        &self,
        ns: &Netns,
        port: u16,
        transparent: bool,
        answer: impl Fn(&std::net::TcpStream, SocketAddr) -> String + Send + 'static,
    ) {
        let listener: TcpListener = ns
            .run(|| {
                if transparent {
                    become_proxy();
                }
                let socket = Socket::new(Domain::IPV6, Type::STREAM, None).expect("socket");
                socket.set_only_v6(false).expect("dual");
                socket.set_reuse_address(true).expect("reuse");
                if transparent {
                    // One option serves both families of a dual-stack socket.
                    socket.set_ip_transparent_v4(true).expect("transparent");
                }
                socket.bind(&SocketAddr::new(ip("::"), port).into()).expect("bind");
                socket.listen(16).expect("listen");
                socket.into()
            })
            .expect("enter");
        std::thread::spawn(move || {
            if transparent {
                become_proxy();
            }
            for mut stream in listener.incoming().flatten() {
                let peer = stream.peer_addr().expect("peer");
                let text = answer(&stream, peer);
                let _ = stream.write_all(text.as_bytes());
            }
        });
    }

    fn answer(&self, ns: &Netns, port: u16, text: &'static str) {
        // An answer must leave with the address that the question was redirected to, so the agent listens on loopback only.
        for any in if text == "agent" { ["127.0.0.1", "::1"] } else { ["0.0.0.0", "::"] } {
            let socket = ns.run(|| {
                if text == "agent" {
                    become_proxy();
                }
                let domain = if any.contains(':') { Domain::IPV6 } else { Domain::IPV4 };
                let socket = Socket::new(domain, Type::DGRAM, None).expect("socket");
                if any.contains(':') {
                    socket.set_only_v6(true).expect("v6 only");
                }
                socket.bind(&SocketAddr::new(ip(any), port).into()).expect("bind");
                UdpSocket::from(socket)
            });
            let socket = socket.expect("enter");
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(text.as_bytes(), from);
                }
            });
        }
    }

    /// What a client with this user and group gets; empty when it is refused.
    fn ask(&self, ns: &Netns, uid: u32, protocol: &str, to: &str, port: u16) -> String {
        // One datagram, or all that a connection brings.
        let read = if protocol == "udp" { "dd bs=200 count=1 status=none" } else { "cat" };
        let script = format!("exec 3<>/dev/{protocol}/{to}/{port}; echo question >&3; {read} <&3");
        let mut command = Command::new("timeout");
        command.args(["1", "bash", "-c", &script]).uid(uid).gid(uid);
        let mut child = ns
            .run(|| command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null()).spawn())
            .expect("enter")
            .expect("bash");
        let mut text = String::new();
        child.stdout.take().expect("stdout").read_to_string(&mut text).expect("read");
        let _ = child.wait();
        text
    }

    #[track_caller]
    fn pod_gets(&self, uid: u32, protocol: &str, to: &str, port: u16, want: &str) {
        let got = self.ask(&self.pod, uid, protocol, to, port);
        assert!(got.starts_with(want), "{uid} {protocol} {to}:{port}: wanted {want:?}, got {got:?}");
    }

    #[track_caller]
    fn outside_gets(&self, to: &str, port: u16, want: &str) {
        let got = self.ask(&self.outside, APP, "tcp", to, port);
        assert!(got.starts_with(want), "outside to {to}:{port}: wanted {want:?}, got {got:?}");
    }
}

const INJECTED: [&str; 15] =
    ["-p", "15001", "-z", "15006", "-u", "1337", "-g", "1337", "-i", "*", "-b", "*", "-d", "15090,15021,15020", "-x"];

/// (name, extra flags)
const BACKENDS: [(&str, &[&str]); 3] = [
    ("nftables", &["--native-nftables"]),
    ("iptables-nft", &["--force-iptables-binary", "nft"]),
    ("iptables-legacy", &["--force-iptables-binary", "legacy"]),
];

#[test]
fn everybody_is_redirected_where_they_belong() {
    for (name, extra) in BACKENDS {
        for mode in ["REDIRECT", "TPROXY"] {
            let Some(world) = World::new() else { return };
            println!("{name} {mode}");
            let flags = ["", "-m", mode, "--redirect-dns", "--capture-all-dns", "--dual-stack", "-o", "5432"];
            apply(&world.pod, &[&INJECTED[..], &flags, extra].concat());

            // Outbound: the application through the proxy, the proxy itself not, excluded ports neither.
            world.pod_gets(APP, "tcp", "10.244.0.1", 9000, "proxy 15001 for 10.244.0.1:9000 from 10.244.0.7");
            world.pod_gets(APP, "tcp", "fd00:10:244::1", 9000, "proxy 15001 for [fd00:10:244::1]:9000");
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

            if name == "nftables" {
                let mut nft = netns::nft::Nft::open_in(&world.pod).expect("socket");
                let counted = capture::captured(&mut nft).expect("counters");
                assert_eq!(counted.outbound, 3, "{counted:?}");
                assert!(counted.inbound >= 2 && counted.dns >= 2, "{counted:?}");
            }

            // And after a clean-up nobody is.
            apply(&world.pod, &["--cleanup-only"]);
            world.pod_gets(APP, "tcp", "10.244.0.1", 9000, "outside");
            world.outside_gets("10.244.0.7", 8080, "app");
            world.pod_gets(APP, "udp", "10.244.0.1", 53, "server");
        }
    }
}

#[test]
fn only_what_is_listed_is_captured() {
    for (name, extra) in BACKENDS {
        let Some(world) = World::new() else { return };
        println!("{name}");
        apply(
            &world.pod,
            &[&["-u", "1337", "-i", "192.0.2.0/24", "-x", "192.0.2.128/25", "-q", "9000", "-b", "8080"], extra]
                .concat(),
        );
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
        let Some(world) = World::new() else { return };
        println!("{name}");
        let args = [&INJECTED[..], &[""], extra].concat();
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
