//! The eBPF programs: the object in the repository, and what is left of them in a cgroup.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use netns::Netns;
use socket2::{Domain, Socket, Type};

use crate::behaviour::{BACKENDS, INJECTED, run, world};
use crate::undo::{calls, kill_at};
use crate::world::{APP, PROXY, World, new_cgroup};
use crate::{cannot_load_programs, output, pod, tool};

/// The version of clang whose output is in the repository. Others make other instructions of the same source.
const VERSION: &str = "14.0.6";
const COMPILE: &str = "clang -target bpf -mcpu=v3 -O2 -g -Wall -Wextra -Werror -fdebug-compilation-dir=. -c capture.c -o \"$OUT\" && \
    llvm-objcopy --strip-debug --remove-section=.BTF.ext --remove-section=.rel.BTF.ext --remove-section=.llvm_addrsig \"$OUT\"";

/// Programs, maps and licence: the sections whose names do not depend on the compiler.
fn sections(object: &Path) -> Vec<String> {
    let out = Command::new("llvm-objdump").arg("-h").arg(object).output().expect("llvm-objdump");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let names = text.lines().filter_map(|line| line.split_whitespace().nth(1));
    let lasting =
        |name: &&str| ["cgroup/", "classifier", ".maps", "license"].iter().any(|start| name.starts_with(start));
    names.filter(lasting).map(str::to_owned).collect()
}

#[test]
fn the_object_is_what_clang_makes_of_the_source() {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !["clang", "llvm-objcopy", "llvm-objdump"].into_iter().all(has) {
        println!("SKIPPED: needs clang and llvm");
        return;
    }
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("ebpf");
    let scratch = tempfile::tempdir().expect("folder");
    let made = scratch.path().join("capture.o");
    let status = Command::new("sh").args(["-c", COMPILE]).env("OUT", &made).current_dir(&folder).status().expect("sh");
    assert!(status.success(), "capture.c does not compile");
    let kept = folder.join("capture.o");
    let version = Command::new("clang").arg("--version").output().expect("clang").stdout;
    let version = String::from_utf8_lossy(&version).lines().next().unwrap_or_default().to_owned();
    if !version.contains(VERSION) {
        println!("SKIPPED in part: {version} is not {VERSION}, so only the sections are compared");
        assert_eq!(sections(&made), sections(&kept));
        return;
    }
    let bytes = std::fs::read(&made).expect("object");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&kept, &bytes).expect("write");
    }
    assert!(bytes == std::fs::read(&kept).expect("object"), "capture.o is not made of capture.c: UPDATE=1 writes it");
    assert_eq!(sections(&kept).len(), 12);
}

const FLAGS: [&str; 6] = ["--native-nftables", "-i", "*", "-b", "*", "--redirect-dns"];

/// Those of the cgroup, and one for each end of the pod's wire.
const ALL: usize = 9 + 2;

#[test]
fn programs_stay_are_replaced_and_go() {
    if cannot_load_programs() {
        return;
    }
    let (Some(ns), Some(cgroup)) = (pod(&["10.244.0.7/24"]), new_cgroup()) else { return };
    let path = cgroup.display().to_string();
    let with = |extra: &[&'static str]| {
        let flags = [&FLAGS[..], extra, &["--capture-all-dns", "--ebpf-cgroup", &path]].concat();
        let out = tool(&ns, &flags, &[]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    let attached = || attached(&ns, &cgroup);
    assert_eq!(attached(), Vec::<u32>::new());
    with(&[]);
    let first = attached();
    assert_eq!(first.len(), ALL);
    with(&[]);
    assert_eq!(attached(), first, "the same flags change nothing");
    with(&["-o", "25"]);
    let second = attached();
    assert!(second.len() == ALL && second.iter().all(|id| !first.contains(id)), "other flags replace each program");

    // Killed before each program is attached, and run again, it is whole.
    let clean = || {
        let out = tool(&ns, &["--cleanup-only", "--ebpf-cgroup", &path], &[]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(attached(), Vec::<u32>::new());
    };
    clean();
    let flags = [&FLAGS[..], &["--capture-all-dns", "--ebpf-cgroup", &path]].concat();
    let Some(steps) = calls(&ns, &flags, "bpf", "BPF_PROG_ATTACH") else { return };
    assert_eq!(steps.len(), ALL);
    for (before, step) in steps.into_iter().enumerate() {
        clean();
        kill_at(&ns, &flags, "bpf", step);
        assert_eq!(attached().len(), before);
        with(&[]);
        assert_eq!(attached().len(), ALL);
    }
    let out = tool(&ns, &["--cleanup-only"], &[]);
    assert!(out.status.success());
    let out = tool(&ns, &["--cleanup-only", "--ebpf-cgroup", &path], &[]);
    assert!(out.status.success());
    assert_eq!(attached(), Vec::<u32>::new());

    let out = tool(&ns, &["--ebpf-cgroup", "/proc", "-i", "*"], &[]);
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("--ebpf-cgroup /proc: not a cgroup (v2)"), "{text}");
    std::fs::remove_dir(&cgroup).expect("remove");
}

#[test]
fn every_connection_keeps_its_destination_however_many_places_are_called() {
    let (name, extra) = BACKENDS[3];
    let Some((world, extra)) = world(name, extra) else { return };
    run(&world, &[&INJECTED[..], &[""]].concat(), &extra);
    assert_eq!(world.pod_does(&format!("many {}", (1 << 14) + 500)), "0 wrong, peers [true, true]");
    // Data in the first packet changes nothing.
    output(&world.pod, "sysctl", &["-qw", "net.ipv4.tcp_fastopen=1027"]);
    for _ in 0..2 {
        let got = world.pod_does("hello 192.0.2.1 80");
        assert_eq!(got, "5 bytes to proxy 15001 for 192.0.2.1:80 from 127.0.0.1 as 192.0.2.1:80");
    }
    // Programs that replace others know what those had been told.
    let replace = || run(&world, &[&INJECTED[..], &["", "-o", "25"]].concat(), &extra);
    assert_eq!(world.peer_after("198.18.0.0", 80, replace), "198.18.0.0:80");
    assert_eq!(world.pod_does("many 20"), "0 wrong, peers [true, true]");
}

/// What a client outside gets that calls from a port of its own choice.
fn from_port(world: &World, port: u16, to: &str) -> String {
    let to: SocketAddr = to.parse().expect("address");
    let from: SocketAddr = match to {
        SocketAddr::V4(_) => ([10, 244, 0, 1], port).into(),
        SocketAddr::V6(_) => SocketAddr::new("fd00:10:244::1".parse().expect("address"), port),
    };
    let call = || -> std::io::Result<String> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        socket.connect_timeout(&to.into(), Duration::from_secs(2))?;
        let mut text = String::new();
        TcpStream::from(socket).read_to_string(&mut text)?;
        Ok(text)
    };
    world.outside.run(call).expect("enter").unwrap_or_else(|e| e.to_string())
}

/// The kernel leads an opening packet that meets a connection in TIME_WAIT to the listener that it finds itself.
#[test]
fn a_port_that_is_used_again_at_once_gets_no_way_around_the_proxy() {
    let (name, extra) = BACKENDS[3];
    let Some((world, extra)) = world(name, extra) else { return };
    run(&world, &[&INJECTED[..], &["", "--dual-stack"]].concat(), &extra);
    // At the last one no application listens.
    for (to, port) in
        [("10.244.0.7:8080", ":1F90 "), ("[fd00:10:244::7]:8080", ":1F90 "), ("10.244.0.7:8090", ":1F9A ")]
    {
        for round in 0..2 {
            let got = from_port(&world, 41000, to);
            assert!(got.starts_with(&format!("proxy 15006 for {to} from")), "round {round}: {got}");
            let waiting = |file: &str| {
                let text = std::fs::read_to_string(file).unwrap_or_default();
                text.lines().any(|line| line.contains(port) && line.contains(":A028 06"))
            };
            let any = || ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"].into_iter().any(waiting);
            assert!(world.pod.run(any).expect("enter"), "nothing waits, so nothing is shown here");
        }
    }
}

/// An opening packet from this port to port 8080 of the pod, in two pieces.
fn pieces(port: u16) -> [Vec<u8>; 2] {
    const FROM_TO: [u8; 8] = [10, 244, 0, 1, 10, 244, 0, 7];
    // Header with four bytes of options, and eight bytes of data.
    let mut tcp =
        [&port.to_be_bytes()[..], &8080_u16.to_be_bytes(), &[0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 255, 255]].concat();
    tcp.extend([0, 0, 0, 0, 1, 1, 1, 1]);
    tcp.extend(b"somedata");
    let pseudo = [&FROM_TO[..], &[0, 6], &(tcp.len() as u16).to_be_bytes(), &tcp].concat();
    let mut sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    tcp[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    // Length and checksum of the outer header are the kernel's; the last field is the place, in eights, after the flag for more.
    let piece = |data: &[u8], place: u16| {
        let [a, b] = place.to_be_bytes();
        [&[0x45, 0, 0, 0, 7, port as u8, a, b, 64, 6, 0, 0], &FROM_TO[..], data].concat()
    };
    [piece(&tcp[..24], 0x2000), piece(&tcp[24..], 3)]
}

#[test]
fn an_opening_packet_in_pieces_gets_no_way_around_the_proxy() {
    let (name, extra) = BACKENDS[3];
    let Some((world, extra)) = world(name, extra) else { return };
    let raw =
        || Socket::new(Domain::IPV4, Type::from(libc::SOCK_RAW), Some(socket2::Protocol::TCP)).expect("raw socket");
    let mut socket = world.outside.run(raw).expect("enter");
    socket.set_header_included_v4(true).expect("option");
    socket.set_nonblocking(true).expect("option");
    // The ports that the pod answered.
    let mut answered = |port: u16| {
        let to = SocketAddr::from(([10, 244, 0, 7], 0));
        pieces(port).iter().for_each(|piece| assert_eq!(socket.send_to(piece, &to.into()).expect("send"), piece.len()));
        // Another connection after it, so that all that came of it has come.
        assert!(!from_port(&world, 0, "10.244.0.7:8080").is_empty());
        let (mut ports, mut packet) = (Vec::new(), [0; 128]);
        while socket.read(&mut packet).is_ok_and(|length| length >= 40) {
            ports.push(u16::from_be_bytes([packet[22], packet[23]]));
        }
        ports.contains(&port)
    };
    assert!(answered(42000), "in the open it is a packet like any other");
    run(&world, &[&INJECTED[..], &[""]].concat(), &extra);
    assert!(!answered(42001));
}

/// It would lead to where an application in the pod once went.
#[test]
fn an_address_that_names_a_destination_is_nobodys_from_outside() {
    const SLOT: &str = "fd6f:7574:7269:6767:6572:0:7f80:0";
    let (name, extra) = BACKENDS[3];
    let Some((world, extra)) = world(name, extra) else { return };
    output(&world.outside, "ip", &["-6", "route", "add", "fd6f:7574:7269:6767:6572::/96", "via", "fd00:10:244::7"]);
    for flags in [&["-m", "REDIRECT"][..], &["-m", "TPROXY"], &["-b", ""]] {
        run(&world, &[&INJECTED[..], &["", "--dual-stack"], flags].concat(), &extra);
        world.pod_gets(APP, "tcp", "fd00:10:244::1", 9000, "proxy 15001 for [fd00:10:244::1]:9000");
        let within = world.pod_asks(PROXY, "tcp", SLOT, 15001, None);
        assert!(within.contains(" for [fd00:10:244::1]:9000 from ::1 as"), "{flags:?}: {within}");
        let outside = from_port(&world, 0, &format!("[{SLOT}]:15001"));
        assert!(outside.contains("timed out"), "{flags:?}: {outside}");
        run(&world, &["--cleanup-only"], &extra);
        assert!(!output(&world.pod, "ip", &["-6", "route", "show", "table", "all"]).contains("fd6f:"));
    }
}

#[test]
fn without_a_listening_proxy_nothing_comes_in() {
    let (name, extra) = BACKENDS[3];
    let Some((mut world, extra)) = world(name, extra) else { return };
    run(&world, &[&INJECTED[..], &[""]].concat(), &extra);
    assert!(from_port(&world, 0, "10.244.0.7:8080").starts_with("proxy 15006"));
    world.stop_servers();
    let application = world.pod.run(|| TcpListener::bind("0.0.0.0:8080")).expect("enter").expect("bind");
    application.set_nonblocking(true).expect("option");
    let got = from_port(&world, 0, "10.244.0.7:8080");
    assert!(got.contains("timed out"), "{got}");
    assert!(application.accept().is_err(), "the application was reached past the proxy");
    let shown = world.inspect("show");
    assert!(shown.contains("and on what comes in by eth0"), "{shown}");
    assert!(!shown.contains(" 0  dropped: the proxy does not listen"), "{shown}");
    assert!(world.inspect("doctor").contains("nobody listens on port 15001, 15006 where connections are led"));
    // An interface that comes later is not captured, and that is said.
    output(&world.pod, "ip", &["link", "add", "net1", "type", "veth", "peer", "name", "net1p"]);
    output(&world.pod, "ip", &["link", "set", "net1", "up"]);
    assert!(world.inspect("doctor").contains("no program captures what comes in by interface net1"));
    run(&world, &[&INJECTED[..], &[""]].concat(), &extra);
    assert!(!world.inspect("doctor").contains("interface net1"));
    run(&world, &["--cleanup-only"], &extra);
    assert!(world.inspect("show").starts_with("No capture"));
}

fn attached(ns: &Netns, cgroup: &Path) -> Vec<u32> {
    ns.run(|| capture::attached_programs(cgroup)).expect("enter").expect("query")
}
