//! A pod with real servers, and the network outside of it.
//!
//! The pod's servers are a process of their own, this test program again, so that it can be in the pod's cgroup.
#![allow(unsafe_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use netns::{Netlink, Netns, Route};
use socket2::{Domain, Protocol, Socket, Type};

use crate::pod;

pub(crate) const PROXY: u32 = 1337;
pub(crate) const APP: u32 = 1000;

/// Tells this program which part it plays.
const PART: &str = "CAPTURE_TEST_PART";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("address")
}

/// Not a test: what this program does when a test started it again.
#[test]
fn part_of_another_test() {
    let Ok(part) = std::env::var(PART) else { return };
    match part.split(' ').collect::<Vec<_>>()[..] {
        ["servers"] => serve_pod(),
        ["client", uid, protocol, to, port, from] => {
            let to = SocketAddr::new(ip(to), port.parse().expect("port"));
            client(uid.parse().expect("uid"), protocol, to, SocketAddr::new(ip(from), 0));
        }
        ["inspect", ..] => inspect(&part),
        ["many", count] => many(count.parse().expect("number")),
        ["stay", to, port] => stay(SocketAddr::new(ip(to), port.parse().expect("port"))),
        ["hello", to, port] => hello(SocketAddr::new(ip(to), port.parse().expect("port"))),
        _ => panic!("{part}"),
    }
    std::process::exit(0);
}

/// `outrigger capture …`, between marks.
fn inspect(words: &str) {
    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        args: capture::InspectArgs,
    }
    let program = <Program as clap::Parser>::parse_from(words.split(' '));
    print!("\u{1}");
    capture::inspect(&program.args, |_, pod| Err(format!("no mesh with {pod}")));
    print!("\u{2}");
}

/// Makes what this thread opens or accepts belong to this user and group, as the rules tell owners apart.
fn open_as(id: u32) {
    // SAFETY: both calls change only credentials of the calling thread; the first needs the privilege that the second gives up.
    unsafe {
        libc::setfsgid(id);
        libc::setfsuid(id);
    }
}

/// The proxy says through which port a connection came, where it had been going and from where it comes.
fn serve_pod() {
    // Each with two workers, as a proxy has.
    for port in [15001, 15001, 15006, 15006] {
        serve(port, true, move |stream, peer| {
            let to = capture::original_destination(stream).expect("original destination");
            format!("proxy {port} for {to} from {}", peer.ip().to_canonical())
        });
    }
    let others =
        [(8080, "app"), (15021, "health"), (15020, "metrics"), (15090, "stats"), (15000, "admin"), (15008, "tunnel")];
    for (port, name) in others {
        serve(port, false, move |_, _| name.to_owned());
    }
    answer(15053, "agent");
    std::io::stdout().write_all(b"ready\n").expect("stdout");
    std::io::stdout().flush().expect("stdout");
    // Ends with the test that started it, which holds the other end.
    let _ = std::io::stdin().read(&mut [0]);
}

fn serve(port: u16, proxy: bool, reply: impl Fn(&TcpStream, SocketAddr) -> String + Send + 'static) {
    open_as(if proxy { PROXY } else { 0 });
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None).expect("socket");
    socket.set_only_v6(false).expect("dual");
    socket.set_reuse_address(true).expect("reuse");
    if proxy {
        socket.set_reuse_port(true).expect("reuse");
        // One option serves both families of a dual-stack socket.
        socket.set_ip_transparent_v4(true).expect("transparent");
    }
    socket.bind(&SocketAddr::new(ip("::"), port).into()).expect("bind");
    socket.listen(64).expect("listen");
    let listener: TcpListener = socket.into();
    // Threads begin with the credentials of the one that starts them.
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let Ok(peer) = stream.peer_addr() else { continue };
            let text = reply(&stream, peer);
            let _ = stream.write_all(text.as_bytes());
            // What was sent and not read would make the end a reset.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.set_read_timeout(Some(Duration::from_millis(100)));
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    });
}

fn answer(port: u16, text: &'static str) {
    // An answer must leave with the address that the question was redirected to, so the agent listens on loopback only.
    for any in if text == "agent" { ["127.0.0.1", "::1"] } else { ["0.0.0.0", "::"] } {
        let domain = if any.contains(':') { Domain::IPV6 } else { Domain::IPV4 };
        open_as(if text == "agent" { PROXY } else { 0 });
        let socket = Socket::new(domain, Type::DGRAM, None).expect("socket");
        if any.contains(':') {
            socket.set_only_v6(true).expect("v6 only");
        }
        socket.bind(&SocketAddr::new(ip(any), port).into()).expect("bind");
        let socket = UdpSocket::from(socket);
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(text.as_bytes(), from);
            }
        });
    }
}

/// Prints what it gets, and whom it takes its peer to be.
fn client(uid: u32, protocol: &str, to: SocketAddr, from: SocketAddr) {
    const WAIT: Duration = Duration::from_secs(1);
    become_user(uid);
    let mut got = [0; 256];
    let (length, peer) = match protocol {
        "tcp" | "mptcp" => {
            let domain = if to.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
            // As programs do that would like several paths: without them by one.
            let several = Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP)).ok().filter(|_| protocol == "mptcp");
            let socket = several.unwrap_or_else(|| Socket::new(domain, Type::STREAM, None).expect("socket"));
            socket.bind(&from.into()).expect("bind");
            if socket.connect_timeout(&to.into(), WAIT).is_err() {
                return;
            }
            let mut stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(WAIT)).expect("timeout");
            let peer = stream.peer_addr();
            (stream.read(&mut got), peer)
        }
        "udp" => {
            let socket = UdpSocket::bind(from).expect("bind");
            socket.set_read_timeout(Some(WAIT)).expect("timeout");
            let _ = socket.connect(to).and_then(|()| socket.send(b"question"));
            (socket.recv(&mut got), socket.peer_addr())
        }
        // Without a connection, as some resolvers do; the peer is the sender of the answer.
        _ => {
            let socket = UdpSocket::bind(from).expect("bind");
            socket.set_read_timeout(Some(WAIT)).expect("timeout");
            let _ = socket.send_to(b"question", to);
            match socket.recv_from(&mut got) {
                Ok((length, from)) => (Ok(length), Ok(from)),
                Err(_) => return,
            }
        }
    };
    let (Ok(length), Ok(peer)) = (length, peer) else { return };
    let text = format!("\u{1}{} as {peer}\u{2}", String::from_utf8_lossy(&got[..length]));
    std::io::stdout().write_all(text.as_bytes()).expect("stdout");
}

/// As this user from here on.
fn become_user(uid: u32) {
    // SAFETY: plain system calls; this process does nothing else.
    unsafe {
        assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
        assert_eq!(libc::setgid(uid), 0);
        assert_eq!(libc::setuid(uid), 0);
    }
}

/// Calls as many places, from four threads; prints how often the proxy was told another one, or the peer was shown as another.
fn many(count: u32) {
    const THREADS: u32 = 4;
    become_user(APP);
    let place = |n: u32| SocketAddr::new(IpAddr::from((0xc612_0000 + n / 2).to_be_bytes()), 80 + (n % 2) as u16);
    let call = move |n: u32| -> std::io::Result<(TcpStream, bool)> {
        let mut stream = TcpStream::connect(place(n))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let right = text.starts_with(&format!("proxy 15001 for {} from", place(n))) && stream.peer_addr()? == place(n);
        Ok((stream, right))
    };
    let (first, right) = call(0).expect("connection");
    assert!(right);
    let threads = (0..THREADS).map(|thread| {
        let mine = (1..count).filter(move |n| n % THREADS == thread);
        std::thread::spawn(move || mine.filter(|n| !call(*n).is_ok_and(|(_, right)| right)).count())
    });
    let wrong: usize = threads.collect::<Vec<_>>().into_iter().map(|t| t.join().expect("thread")).sum();
    // One of those that came when the lasting slots were full, while others take the slot that it had.
    let (last, right) = call(count).expect("connection");
    assert!(right);
    let later = (0..(1 << 14) + 1).filter(|n| !call(count + 1 + n % 8).is_ok_and(|(_, right)| right)).count();
    let peers = [first.peer_addr().expect("peer") == place(0), last.peer_addr().expect("peer") == place(count)];
    print!("\u{1}{} wrong, peers {peers:?}\u{2}", wrong + later);
}

/// Connects, prints a line, and when it was sent one prints whom it takes its peer to be.
fn stay(to: SocketAddr) {
    become_user(APP);
    let stream = TcpStream::connect(to).expect("connection");
    println!("connected");
    let _ = std::io::stdin().read_line(&mut String::new());
    println!("{}", stream.peer_addr().expect("peer"));
}

/// Prints what answers to data that went with the first packet.
fn hello(to: SocketAddr) {
    become_user(APP);
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
    let sent = socket.send_to_with_flags(b"hello", &to.into(), libc::MSG_FASTOPEN).expect("send");
    let mut text = String::new();
    let mut stream = TcpStream::from(socket);
    stream.read_to_string(&mut text).expect("read");
    print!("\u{1}{sent} bytes to {text} as {}\u{2}", stream.peer_addr().expect("peer"));
}

/// A pod, the network outside of it, and, if it was wanted, the pod's cgroup.
pub(crate) struct World {
    pub(crate) pod: Netns,
    pub(crate) outside: Netns,
    pub(crate) cgroup: Option<PathBuf>,
    servers: Child,
}

impl World {
    /// `None` after saying why not.
    pub(crate) fn new(with_cgroup: bool) -> Option<Self> {
        let pod_ns = pod(&[])?;
        let cgroup = if with_cgroup { Some(new_cgroup()?) } else { None };
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
        outside
            .run(|| {
                for port in [9000, 53, 5432, 15012] {
                    serve(port, false, |_, _| "outside".to_owned());
                }
                answer(53, "server");
                answer(123, "time");
            })
            .expect("enter");
        let mut servers =
            start(&pod_ns, cgroup.as_ref(), "servers").stdin(Stdio::piped()).spawn().expect("this program again");
        let mut lines = BufReader::new(servers.stdout.take().expect("stdout")).lines();
        assert!(lines.any(|line| line.is_ok_and(|l| l.ends_with("ready"))), "the pod's servers did not start");
        Some(Self { pod: pod_ns, outside, cgroup, servers })
    }

    /// What another part of this program prints in the pod.
    pub(crate) fn pod_does(&self, what: &str) -> String {
        self.ask(&self.pod, self.cgroup.as_ref(), what)
    }

    /// Whom a client in the pod takes its peer to be after `meanwhile`, when it has been connected since before.
    pub(crate) fn peer_after(&self, to: &str, port: u16, meanwhile: impl FnOnce()) -> String {
        let mut client = start(&self.pod, self.cgroup.as_ref(), &format!("stay {to} {port}"))
            .stdin(Stdio::piped())
            .spawn()
            .expect("this program again");
        let mut lines = BufReader::new(client.stdout.take().expect("stdout")).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.ends_with("connected")));
        meanwhile();
        client.stdin.take().expect("stdin").write_all(b"\n").expect("write");
        let peer = lines.next().unwrap_or_default();
        let _ = client.wait();
        peer
    }

    /// The pod's proxy ends, and with it everything else that listens there.
    pub(crate) fn stop_servers(&mut self) {
        let _ = self.servers.kill();
        let _ = self.servers.wait();
    }

    fn ask(&self, ns: &Netns, cgroup: Option<&PathBuf>, what: &str) -> String {
        let out = start(ns, cgroup, what).stderr(Stdio::null()).output().expect("this program again");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let answer = text.split_once('\u{1}').and_then(|(_, rest)| rest.split_once('\u{2}'));
        answer.map_or_else(String::new, |(answer, _)| answer.to_owned())
    }

    /// What a client of this user and group in the pod gets, and from whom; empty when it is refused.
    pub(crate) fn pod_asks(&self, uid: u32, protocol: &str, to: &str, port: u16, from: Option<&str>) -> String {
        let from = from.unwrap_or(if to.contains(':') { "::" } else { "0.0.0.0" });
        self.ask(&self.pod, self.cgroup.as_ref(), &format!("client {uid} {protocol} {to} {port} {from}"))
    }

    pub(crate) fn outside_asks(&self, to: &str, port: u16) -> String {
        let from = if to.contains(':') { "::" } else { "0.0.0.0" };
        self.ask(&self.outside, None, &format!("client {APP} tcp {to} {port} {from}"))
    }

    /// What `outrigger capture …` prints in the pod.
    pub(crate) fn inspect(&self, words: &str) -> String {
        let cgroup = self.cgroup.as_ref().map(|path| format!(" --ebpf-cgroup {}", path.display())).unwrap_or_default();
        self.ask(&self.pod, None, &format!("inspect {words}{cgroup}"))
    }

    #[track_caller]
    pub(crate) fn pod_gets(&self, uid: u32, protocol: &str, to: &str, port: u16, want: &str) {
        let got = self.pod_asks(uid, protocol, to, port, None);
        assert!(
            got.starts_with(want) && (!want.is_empty() || got.is_empty()),
            "{uid} {protocol} {to}:{port}: wanted {want:?}, got {got:?}"
        );
        // Whoever answers, the application sees the peer that it asked for.
        let peer = SocketAddr::new(ip(to), port);
        assert!(got.is_empty() || got.ends_with(&format!(" as {peer}")), "{to}:{port} answers as another: {got}");
    }

    #[track_caller]
    pub(crate) fn outside_gets(&self, to: &str, port: u16, want: &str) {
        let got = self.outside_asks(to, port);
        assert!(got.starts_with(want), "outside to {to}:{port}: wanted {want:?}, got {got:?}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop_servers();
        if let Some(cgroup) = &self.cgroup {
            // A process that ended leaves its cgroup a moment later.
            for _ in 0..50 {
                if std::fs::remove_dir(cgroup).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// This program again, in a namespace and a cgroup.
fn start(ns: &Netns, cgroup: Option<&PathBuf>, part: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .args(["--exact", "world::part_of_another_test", "--nocapture", "--test-threads=1"])
        .env(PART, part)
        .stdout(Stdio::piped());
    let ns = ns.try_clone().expect("descriptor");
    let procs = cgroup.map(|path| {
        let path = path.join("cgroup.procs");
        std::ffi::CString::new(path.into_os_string().into_encoded_bytes()).expect("no zero")
    });
    let prepare = move || {
        ns.enter()?;
        // SAFETY: async-signal-safe calls on live buffers, between fork and exec.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if let Some(procs) = &procs {
                let fd = libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                if fd < 0 || libc::write(fd, b"0".as_ptr().cast(), 1) != 1 {
                    return Err(std::io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: `prepare` allocates nothing and calls only what is allowed between fork and exec.
    unsafe { command.pre_exec(prepare) };
    command
}

/// A new cgroup (v2) below this program's own, or a visible reason why not.
pub(crate) fn new_cgroup() -> Option<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let mounts = read("/proc/self/mountinfo");
    let root = mounts.lines().find(|l| l.contains(" - cgroup2 ")).and_then(|l| l.split(' ').nth(4).map(PathBuf::from));
    let own = read("/proc/self/cgroup");
    let own = own.lines().find_map(|l| l.strip_prefix("0::/"));
    let name = format!("outrigger-capture-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = root.zip(own).map(|(root, own)| root.join(own).join(&name));
    match path.map(|path| std::fs::create_dir(&path).map(|()| path)) {
        Some(Ok(path)) => Some(path),
        other => {
            println!("SKIPPED: needs a writable cgroup v2: {other:?}");
            None
        }
    }
}
