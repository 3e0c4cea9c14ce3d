use anyhow::{Context, bail};
use netns::{Netlink, Netns};
use socket2::{Domain, Socket, Type};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What injection passes.
const FLAGS: [&str; 8] = ["-u", "1337", "-i", "*", "-b", "*", "-d", "15090,15021,15020"];
/// How long one step of a connection may take before the whole bench gives up and says where.
const PATIENCE: Duration = Duration::from_secs(10);
/// Other flags, for replacements.
const OTHER: [&str; 8] = ["-u", "1337", "-i", "10.0.0.0/8", "-b", "80,8080", "-o", "25"];

/// Prints how long the program takes to bring rules about, how much memory, and what capture adds to a connection.
pub(crate) fn run(
    runs: usize,
    connections: u32,
    program: Option<PathBuf>,
    reference: Option<&Path>,
) -> anyhow::Result<()> {
    let program = super::program(program)?;
    let cgroup = Cgroup::new();
    apply(runs, &program, reference, cgroup.as_ref())?;
    connections_set_up(connections, &program, cgroup.as_ref())
}

fn apply(runs: usize, program: &Path, reference: Option<&Path>, cgroup: Option<&Cgroup>) -> anyhow::Result<()> {
    println!("applying                                   first       again       other flags   peak memory");
    println!("{:<40} {:>8} ms {:>11} {:>12} ms {:>9} MiB", "asked at most: in the process", 5, "", 30, 5);
    println!("{:<40} {:>8} ms", "asked at most: iptables", 30);
    let nft: &[&str] = &["--force-iptables-binary", "nft"];
    let legacy: &[&str] = &["--force-iptables-binary", "legacy"];
    let mut ways: Vec<(&str, &Path, Vec<&str>)> = vec![
        ("nftables, in the process", program, vec!["--native-nftables"]),
        ("iptables-nft", program, nft.to_vec()),
        ("iptables-legacy", program, legacy.to_vec()),
    ];
    let path = cgroup.map(|c| c.path.display().to_string());
    if let Some(path) = &path {
        ways.push(("eBPF and nftables", program, vec!["--native-nftables", "--ebpf-cgroup", path]));
    }
    if let Some(reference) = reference {
        ways.push(("reference, iptables-nft", reference, nft.to_vec()));
        ways.push(("reference, nftables", reference, vec!["--native-nftables"]));
    }
    for (name, program, extra) in ways {
        let mut times = [Vec::new(), Vec::new(), Vec::new()];
        let mut memory = 0;
        for _ in 0..runs {
            let pod = Pod::new()?;
            let flags = [&FLAGS[..], &extra].concat();
            // The reference refuses rules that are there without this.
            let other = [&OTHER[..], &extra, &["--reconcile"]].concat();
            for (times, flags) in times.iter_mut().zip([&flags, &flags, &other]) {
                times.push(pod.timed(program, flags)?);
            }
            pod.timed(program, &[&["--cleanup-only"][..], &extra].concat())?;
            memory = memory.max(pod.peak_memory(program, &flags)?);
            pod.timed(program, &[&["--cleanup-only"][..], &extra].concat())?;
        }
        let [first, again, other] = times.map(median);
        println!(
            "{name:<40} {:>8.1} ms {:>8.1} ms {:>12.1} ms {:>9.1} MiB",
            ms(first),
            ms(again),
            ms(other),
            memory as f64 / 1024.0
        );
    }
    Ok(())
}

/// Connections from a pod to a listener of its own: without capture straight to it, with capture to somewhere else.
fn connections_set_up(connections: u32, program: &Path, cgroup: Option<&Cgroup>) -> anyhow::Result<()> {
    // Many and short: the machine's own pace changes from second to second.
    const ROUNDS: usize = 21;
    println!("\nsetting up a connection               connect(2)  captured   ratio   to first byte  captured   ratio");
    println!("{:<36} {:>29.2} {:>34.2}", "asked at most: eBPF and TPROXY", 1.10, 1.10);
    let path = cgroup.map(|c| c.path.display().to_string());
    let mut ways: Vec<(&str, bool, Vec<&str>)> = vec![
        ("outbound, REDIRECT (nftables)", false, vec!["--native-nftables"]),
        ("outbound, REDIRECT (iptables-nft)", false, vec!["--force-iptables-binary", "nft"]),
        ("outbound, REDIRECT (iptables-legacy)", false, vec!["--force-iptables-binary", "legacy"]),
        ("inbound, REDIRECT (nftables)", true, vec!["--native-nftables"]),
        ("inbound, TPROXY (nftables)", true, vec!["--native-nftables", "-m", "TPROXY"]),
    ];
    if let Some(path) = &path {
        ways.push(("outbound, eBPF", false, vec!["--native-nftables", "--ebpf-cgroup", path]));
        ways.push(("inbound, eBPF", true, vec!["--native-nftables", "--ebpf-cgroup", path]));
    } else {
        println!("SKIPPED: eBPF needs a writable cgroup v2");
    }
    for (name, inbound, extra) in ways {
        let by_programs = extra.contains(&"--ebpf-cgroup");
        // Sockets belong to the cgroup that this process is in when it makes them.
        let _inside = if by_programs { cgroup.map(Cgroup::enter).transpose()? } else { None };
        let pod = Pod::new()?;
        let captured_port = if inbound { 15006 } else { 15001 };
        let listener = pod.listen(captured_port)?;
        let straight: SocketAddr = if inbound {
            SocketAddr::from(([10, 244, 0, 7], 15006))
        } else {
            SocketAddr::from(([127, 0, 0, 1], 15001))
        };
        let led: SocketAddr =
            if inbound { SocketAddr::from(([10, 244, 0, 7], 8080)) } else { SocketAddr::from(([192, 0, 2, 1], 80)) };
        let flags = [&FLAGS[..], &extra].concat();
        let (mut without, mut with) = (Vec::new(), Vec::new());
        // In turns, so that what the machine does beside hits both alike.
        for _ in 0..ROUNDS {
            without.push(pod.set_up(&listener, inbound, straight, false, connections)?);
            pod.timed(program, &flags)?;
            with.push(pod.set_up(&listener, inbound, led, true, connections)?);
            pod.timed(program, &[&["--cleanup-only"][..], &extra].concat())?;
        }
        print!("{name:<36}");
        for part in [|time: &SetUp| time.connect, |time: &SetUp| time.first_byte] {
            let times = |of: &[SetUp]| of.iter().map(part).collect::<Vec<_>>();
            let (without, with) = (times(&without), times(&with));
            let ratio = median(without.iter().zip(&with).map(|(a, b)| b.as_secs_f64() / a.as_secs_f64()).collect());
            let [without, with] = [without, with].map(|times| median(times).as_secs_f64() * 1e6);
            print!(" {without:>9.1} µs {with:>6.1} µs {ratio:>6.2}     ");
        }
        println!();
    }
    Ok(())
}

/// Median times of one connection.
struct SetUp {
    /// `connect(2)` alone.
    connect: Duration,
    /// From before `connect(2)` until the client has read a byte that the server wrote after it asked where the connection was
    /// meant to go: with both sides' turns of waiting and being woken.
    first_byte: Duration,
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn median<T: Copy + Default + PartialOrd>(mut all: Vec<T>) -> T {
    all.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    all.get(all.len() / 2).copied().unwrap_or_default()
}

/// A pod's network with another one at the end of its wire.
struct Pod {
    inside: Netns,
    outside: Netns,
    /// The last part of the address that clients outside have.
    client: std::cell::Cell<u8>,
}

impl Pod {
    fn new() -> anyhow::Result<Self> {
        let inside = Netns::create().context("this needs root")?;
        let outside = Netns::create()?;
        let mut netlink = Netlink::open_in(&inside)?;
        let mut other = Netlink::open_in(&outside)?;
        netlink.loopback_up()?;
        netlink.add_veth("eth0", "wire", &outside)?;
        netlink.add_addr("eth0", [10, 244, 0, 7].into(), 24)?;
        other.add_addr("wire", [10, 244, 0, 1].into(), 24)?;
        netlink.set_up("eth0")?;
        other.set_up("wire")?;
        netlink.add_route(&netns::Route::default_via([10, 244, 0, 1].into()))?;
        Ok(Self { inside, outside, client: 1.into() })
    }

    /// Gives clients outside an address that none had before, so that no connection has the addresses and ports of an earlier one.
    ///
    /// Connection tracking remembers for ten seconds how each ended. When a reset overtook the client's last packet, as it does when
    /// the client moved to another processor, TPROXY's rules (Istio's) take a new connection from that port for the old one, lead it
    /// past the proxy, and the client is refused.
    fn new_client(&self) -> anyhow::Result<()> {
        let mut netlink = Netlink::open_in(&self.outside)?;
        let last = self.client.get();
        let next = last.checked_add(if last == 6 { 2 } else { 1 }).context("too many rounds")?;
        netlink.del_addr("wire", [10, 244, 0, last].into(), 24)?;
        netlink.add_addr("wire", [10, 244, 0, next].into(), 24)?;
        self.client.set(next);
        Ok(())
    }

    fn command(program: &Path, flags: &[&str]) -> Command {
        let mut command = Command::new(program);
        // The one program has many roles; istio-iptables alone has one.
        if program.file_name() == Some(OsStr::new("outrigger"))
            || program.file_name() == Some(OsStr::new("pilot-agent"))
        {
            command.arg("istio-iptables");
        }
        command.args(flags).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// From the start of the process to its end.
    fn timed(&self, program: &Path, flags: &[&str]) -> anyhow::Result<Duration> {
        let mut command = Self::command(program, flags);
        let (status, time) = self.inside.run(|| {
            let started = Instant::now();
            (command.status(), started.elapsed())
        })?;
        if !status.as_ref().is_ok_and(std::process::ExitStatus::success) {
            bail!("{command:?} failed: {status:?}");
        }
        Ok(time)
    }

    /// Peak resident memory in KiB, as GNU time tells it: of a process started by this one it would be at least this one's.
    fn peak_memory(&self, program: &Path, flags: &[&str]) -> anyhow::Result<u64> {
        let inner = Self::command(program, flags);
        let mut command = Command::new("time");
        command.args(["-q", "-f", "%M"]).arg(inner.get_program()).args(inner.get_args()).stdout(Stdio::null());
        let out = self.inside.run(|| command.output())?.context("GNU time is needed (Debian: time)")?;
        let text = String::from_utf8_lossy(&out.stderr);
        text.lines().last().and_then(|line| line.trim().parse().ok()).with_context(|| format!("time said: {text}"))
    }

    fn listen(&self, port: u16) -> anyhow::Result<Socket> {
        let listener = self.inside.run(|| -> std::io::Result<Socket> {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.set_ip_transparent_v4(true)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.bind(&SocketAddr::from(([0, 0, 0, 0], port)).into())?;
            socket.listen(1024)?;
            Ok(socket)
        })??;
        Ok(listener)
    }

    /// Medians of many connections made one after the other; the mean would tell what else the machine does.
    fn set_up(
        &self,
        listener: &Socket,
        from_outside: bool,
        to: SocketAddr,
        captured: bool,
        count: u32,
    ) -> anyhow::Result<SetUp> {
        let ns = if from_outside { &self.outside } else { &self.inside };
        let accept = || -> anyhow::Result<Socket> {
            let (accepted, _) = listener
                .accept()
                .with_context(|| format!("nothing to accept within {PATIENCE:?} of what went to {to}"))?;
            accepted.set_read_timeout(Some(PATIENCE))?;
            // With TPROXY it is the socket's own address; nobody redirected the others.
            let original = accepted.original_dst_v4().or_else(|_| accepted.local_addr())?;
            if captured && original.as_socket() != Some(to) {
                bail!("the original destination of a connection to {to} is said to be {original:?}");
            }
            Ok(accepted)
        };
        // Ended by a reset, so that no port stays taken.
        let open = || -> std::io::Result<Socket> {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_linger(Some(Duration::ZERO))?;
            // Of `connect`, too.
            socket.set_write_timeout(Some(PATIENCE))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket)
        };
        let failed = |what: &str, number: u32, socket: &Socket| {
            let from = socket.local_addr().ok().and_then(|from| from.as_socket());
            let from = from.map_or_else(|| "nowhere".to_owned(), |from| from.to_string());
            format!("{what} {to} from {from}, number {number} of {count}")
        };
        self.new_client()?;
        let connect = ns.run(|| -> anyhow::Result<Duration> {
            let mut times = Vec::new();
            for number in 0..count {
                let socket = open()?;
                let started = Instant::now();
                socket.connect(&to.into()).with_context(|| failed("cannot connect to", number, &socket))?;
                times.push(started.elapsed());
                // By the same thread: another one that waits must be woken within `connect`, but only where it had the time to
                // fall asleep.
                accept()?;
            }
            Ok(median(times))
        })??;
        self.new_client()?;
        let first_byte = std::thread::scope(|scope| -> anyhow::Result<Duration> {
            // Ends in any case: nothing is waited for longer than `PATIENCE`.
            let server = scope.spawn(|| -> anyhow::Result<()> {
                for _ in 0..count {
                    // Kept until the client has ended it.
                    let mut stream = std::net::TcpStream::from(accept()?);
                    stream.write_all(b"!").context("cannot write to the client")?;
                    let _ = stream.read(&mut [0]);
                }
                Ok(())
            });
            let times = ns.run(|| -> anyhow::Result<Vec<Duration>> {
                let mut times = Vec::new();
                for number in 0..count {
                    let socket = open()?;
                    let started = Instant::now();
                    socket.connect(&to.into()).with_context(|| failed("cannot connect to", number, &socket))?;
                    (&socket).read_exact(&mut [0]).with_context(|| failed("no byte came from", number, &socket))?;
                    times.push(started.elapsed());
                }
                Ok(times)
            })?;
            let served = server.join().map_err(|_| anyhow::anyhow!("the server panicked"))?;
            // The client's trouble first: without its connection the server only waited in vain.
            let times = times?;
            served?;
            Ok(median(times))
        })?;
        Ok(SetUp { connect, first_byte })
    }
}

/// A cgroup (v2) for the programs.
struct Cgroup {
    path: PathBuf,
    own: PathBuf,
}

/// This process is in the cgroup until this goes.
struct Inside<'a>(&'a Cgroup);

impl Cgroup {
    fn new() -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
        let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = Path::new(mount.split(' ').nth(4)?).join(groups.lines().find_map(|line| line.strip_prefix("0::/"))?);
        let path = own.join(format!("outrigger-bench-{}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        Some(Self { path, own })
    }

    fn enter(&self) -> anyhow::Result<Inside<'_>> {
        std::fs::write(self.path.join("cgroup.procs"), "0")?;
        Ok(Inside(self))
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.own.join("cgroup.procs"), "0");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.path);
    }
}
