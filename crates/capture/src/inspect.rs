//! `outrigger capture show | explain | doctor`: what is captured in a network namespace, read from what is live.
#![allow(unsafe_code)]

mod doctor;
mod explain;
mod flow;
mod live;
mod saved;

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use netns::{Netlink, Netns};
use serde_json::{Value, json};

use crate::ebpf;
use crate::iptables::Programs;
use crate::rules::L4;
use crate::run::Failure;
use doctor::{Level, Patient};
use explain::{Packet, Trace};
use live::{Table, What};

/// `outrigger capture …`
#[derive(Clone, Debug, clap::Args)]
pub struct InspectArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Verb {
    /// Show the rules as the way that packets take, with counters
    Show {
        #[command(flatten)]
        place: Place,
    },
    /// Show which rules a connection meets, in order, and where it ends
    Explain {
        #[command(flatten)]
        place: Place,
        /// Who opens the connection
        #[arg(long, value_enum)]
        from: From,
        /// Where it is going
        #[arg(long, value_name = "IP:PORT")]
        to: SocketAddr,
        /// A datagram instead of a TCP connection
        #[arg(long)]
        udp: bool,
        /// User of the application or the proxy [default: 1000, or the proxy's as the rules have it]
        #[arg(long)]
        uid: Option<u32>,
        /// Group of the application or the proxy [default: the user's number]
        #[arg(long)]
        gid: Option<u32>,
        /// Address that it comes from [default: one of the pod's, or one that stands for anybody]
        #[arg(long, value_name = "IP")]
        source: Option<IpAddr>,
        /// Interface by which it comes or leaves [default: lo to this pod itself, else the pod's first]
        #[arg(long)]
        interface: Option<String>,
    },
    /// Look for what keeps capture from working; each finding names the command that mends it
    Doctor {
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
enum From {
    App,
    Proxy,
    Outside,
}

#[derive(Clone, Debug, clap::Args)]
struct Place {
    /// Pod of a running mesh: POD[.NAMESPACE]
    #[arg(long, conflicts_with = "netns")]
    pod: Option<String>,
    /// Name of the mesh of --pod, when several run on this machine
    #[arg(long, default_value = "default", env = "OUTRIGGER_NAME")]
    name: String,
    /// Network namespace: a name of `ip netns`, a path, or a process number [default: the current one]
    #[arg(long)]
    netns: Option<String>,
    /// The pod's cgroup, where eBPF programs may be [default: that of the process, and those above it]
    #[arg(long)]
    ebpf_cgroup: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("--netns {name}: no such network namespace")]
    Namespace { name: String, source: io::Error },
    #[error("{0}")]
    Pod(String),
    #[error("{verb}")]
    Read {
        verb: &'static str,
        #[source]
        source: Failure,
    },
}

/// Runs `outrigger capture …`. `process_of` finds a process of a pod by the mesh's and the pod's name. Moves the calling thread into
/// the namespace for good. Exit status 1 on errors, and when the doctor found a problem.
pub fn inspect(args: &InspectArgs, process_of: impl FnOnce(&str, &str) -> Result<u32, String>) -> ExitCode {
    match run(args, process_of) {
        Ok((text, code)) => {
            print!("{text}");
            code
        }
        Err(error) => {
            let mut text = format!("Error: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(next) = cause {
                text.push_str(&format!(": {next}"));
                cause = next.source();
            }
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn run(
    args: &InspectArgs,
    process_of: impl FnOnce(&str, &str) -> Result<u32, String>,
) -> Result<(String, ExitCode), Refused> {
    let (Verb::Show { place } | Verb::Explain { place, .. } | Verb::Doctor { place }) = &args.verb;
    let process = enter(place, process_of)?;
    let read = |source: Failure| Refused::Read { verb: "cannot read the rules that are live", source };
    let mut netlink = Netlink::open().map_err(|e| read(e.into()))?;
    let tables = live::read(&Programs::from_env()).map_err(read)?;
    let cgroups = match &place.ebpf_cgroup {
        Some(given) => vec![given.clone()],
        None => ebpf::cgroups_of(&process),
    };
    let links = netlink.links().map_err(|e| read(e.into()))?;
    // Without the privilege to look at programs there are rules to show all the same.
    let programs: Vec<(String, ebpf::Live)> =
        cgroups.iter().filter_map(|path| Some((path.display().to_string(), ebpf::live(path, &links).ok()??))).collect();
    let local: Vec<IpAddr> =
        netlink.addrs().map_err(|e| read(e.into()))?.into_iter().map(|a| a.ip.to_canonical()).collect();
    let pod_interface = first_interface(&mut netlink);
    match &args.verb {
        Verb::Show { .. } => Ok((
            if place.json { show_json(&tables, &programs) } else { flow::show(&tables, &programs) },
            ExitCode::SUCCESS,
        )),
        Verb::Explain { from, to, udp, uid, gid, source, interface, .. } => {
            let here = to.ip().is_loopback() || local.contains(&to.ip());
            let by_default = if here && *from != From::Outside { "lo".to_owned() } else { pod_interface };
            let uid = uid.unwrap_or_else(|| if *from == From::Proxy { proxy_user(&tables, &programs) } else { 1000 });
            let packet = Packet {
                l4: if *udp { L4::Udp } else { L4::Tcp },
                from: SocketAddr::new(source.unwrap_or_else(|| any_source(*from, *to, &local, here)), 40000),
                to: *to,
                owner: (*from != From::Outside).then(|| (uid, gid.unwrap_or(uid))),
                interface: interface.clone().unwrap_or(by_default),
                mark: 0,
            };
            let trace = explain::follow(&tables, programs.first().map(|p| &p.1), &local, &packet);
            let text = if place.json { explain_json(&packet, &trace) } else { explain_text(*from, &packet, &trace) };
            Ok((text, ExitCode::SUCCESS))
        }
        Verb::Doctor { .. } => {
            let patient = Patient {
                tables: &tables,
                programs: &programs,
                links: &links,
                local: &local,
                interface: &pod_interface,
            };
            let findings = doctor::examine(&patient, &mut netlink);
            let sick = findings.iter().any(|f| f.level == Level::Problem);
            let code = if sick { ExitCode::FAILURE } else { ExitCode::SUCCESS };
            let text = if place.json {
                let all = findings.iter().map(|f| json!({"level": f.level.name(), "what": f.what, "mend": f.command}));
                pretty(&Value::Array(all.collect()))
            } else {
                let line = |f: &doctor::Finding| {
                    let mend = f.command.as_ref().map(|c| format!("\n         mend: {c}")).unwrap_or_default();
                    format!("{:<8} {}{mend}\n", f.level.name(), f.what)
                };
                findings.iter().map(line).collect()
            };
            Ok((text, code))
        }
    }
}

/// Moves this thread to where the rules are; gives the process whose cgroups count.
fn enter(place: &Place, process_of: impl FnOnce(&str, &str) -> Result<u32, String>) -> Result<String, Refused> {
    let (name, process) = match (&place.pod, &place.netns) {
        (Some(pod), _) => {
            let process = process_of(&place.name, pod).map_err(Refused::Pod)?.to_string();
            (process.clone(), process)
        }
        (None, Some(name)) if name.bytes().all(|b| b.is_ascii_digit()) => (name.clone(), name.clone()),
        (None, Some(name)) => (name.clone(), "self".to_owned()),
        (None, None) => return Ok("self".to_owned()),
    };
    let error = |source| Refused::Namespace { name: name.clone(), source };
    let path = match process.as_str() {
        "self" if name.contains('/') => PathBuf::from(&name),
        "self" => Path::new("/run/netns").join(&name),
        number => PathBuf::from(format!("/proc/{number}/ns/net")),
    };
    if process != "self" {
        enter_user_namespace(&process).map_err(error)?;
    }
    Netns::open(&path).and_then(|ns| ns.enter()).map_err(error)?;
    Ok(process)
}

/// A mesh without root has a user namespace of its own, in which alone its rules can be read.
fn enter_user_namespace(process: &str) -> io::Result<()> {
    let theirs = format!("/proc/{process}/ns/user");
    if std::fs::read_link(&theirs)? == std::fs::read_link("/proc/self/ns/user")? {
        return Ok(());
    }
    let file = File::open(theirs)?;
    // SAFETY: the descriptor is open; the call moves this process, which has one thread, for good.
    if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWUSER) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The first interface that is not loopback; `eth0` when there is none.
fn first_interface(netlink: &mut Netlink) -> String {
    let links = netlink.links().unwrap_or_default();
    links.into_iter().map(|l| l.name).find(|name| name != "lo").unwrap_or_else(|| "eth0".to_owned())
}

/// The user of the proxy, as the live programs or rules have it: the first one whose traffic is left alone.
fn proxy_user(tables: &[Table], programs: &[(String, ebpf::Live)]) -> u32 {
    if let Some(user) = programs.iter().find_map(|(_, live)| live.tables.proxy_user()) {
        return user;
    }
    let conditions = tables
        .iter()
        .filter(|t| t.is_ours())
        .flat_map(|t| &t.chains)
        .flat_map(|c| &c.rules)
        .flat_map(|r| &r.conditions);
    let mut users = conditions.filter(|c| !c.not).filter_map(|c| match &c.what {
        What::Uid(ids) => ids.first().copied(),
        _ => None,
    });
    users.next().unwrap_or(1337)
}

/// An address that such a connection would come from.
fn any_source(from: From, to: SocketAddr, local: &[IpAddr], here: bool) -> IpAddr {
    let own = local.iter().find(|ip| ip.is_ipv6() == to.is_ipv6() && !ip.is_loopback());
    match (from, own) {
        // Documentation addresses stand for anybody.
        (From::Outside, _) if to.is_ipv6() => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xff]),
        (From::Outside, _) => IpAddr::from([198, 51, 100, 7]),
        (_, Some(own)) if !here => *own,
        _ => to.ip(),
    }
}

fn explain_text(from: From, packet: &Packet, trace: &Trace) -> String {
    let who = match (from, packet.owner) {
        (From::Outside, _) | (_, None) => "From outside".to_owned(),
        (From::App, Some((uid, gid))) => format!("From an application (user {uid}, group {gid})"),
        (From::Proxy, Some((uid, gid))) => format!("From the proxy (user {uid}, group {gid})"),
    };
    let way = if from == From::Outside { "coming by" } else { "leaving by" };
    let mut out = format!("{who} to {}/{}, {way} {}\n", packet.to, packet.l4.name(), packet.interface);
    let mut table = "";
    for step in &trace.steps {
        if step.table != table {
            out.push_str(&format!("  {}\n", step.table));
            table = &step.table;
        }
        let note = match (step.uncertain, step.ours) {
            (true, _) => "  (cannot be decided here; taken not to match)",
            (false, false) => "  (not ours)",
            (false, true) => "",
        };
        let indent = " ".repeat(4 + step.depth * 2);
        out.push_str(&format!(
            "{indent}{} rule {}: {} [{} packets]{note}\n",
            step.chain, step.number, step.rule, step.packets
        ));
    }
    if trace.steps.is_empty() {
        out.push_str("  no rule matches\n");
    }
    out.push_str(&format!("It {}.\n", trace.end));
    out
}

fn explain_json(packet: &Packet, trace: &Trace) -> String {
    let steps = trace.steps.iter().map(|s| {
        json!({
            "table": s.table, "chain": s.chain, "rule": s.number, "text": s.rule, "packets": s.packets,
            "ours": s.ours, "uncertain": s.uncertain,
        })
    });
    let port = match trace.end {
        explain::End::Led { port, .. } => Some(port),
        _ => None,
    };
    pretty(&json!({
        "to": packet.to.to_string(),
        "protocol": packet.l4.name(),
        "interface": packet.interface,
        "steps": steps.collect::<Vec<_>>(),
        "end": trace.end.to_string(),
        "port": port,
    }))
}

fn show_json(tables: &[Table], programs: &[(String, ebpf::Live)]) -> String {
    let rule = |(number, r): (usize, &live::Rule)| json!({"rule": number + 1, "text": r.to_string(), "packets": r.packets, "bytes": r.bytes});
    let chain = |c: &live::Chain| {
        let rules: Vec<Value> = c.rules.iter().enumerate().map(rule).collect();
        json!({"chain": c.name, "priority": c.hook.map(|h| h.1), "rules": rules})
    };
    let tables = tables.iter().map(|t| {
        let chains: Vec<Value> = t.chains.iter().map(chain).collect();
        json!({"title": t.title(), "table": t.name, "backEnd": t.source.to_string(), "ipv6": t.v6, "ours": t.is_ours(), "chains": chains})
    });
    let programs = programs.iter().map(|(cgroup, live)| {
        let counters: Vec<Value> = ebpf::REASONS
            .iter()
            .zip(&live.counters)
            .zip(0..)
            .map(|((reason, count), at)| {
                json!({"chain": ebpf::chain(at), "rule": at + 1, "text": reason, "packets": count})
            })
            .collect();
        json!({
            "cgroup": cgroup, "interfaces": live.interfaces, "complete": !live.partial,
            "captures": live.tables.describe(), "rules": counters,
        })
    });
    pretty(&json!({"tables": tables.collect::<Vec<_>>(), "programs": programs.collect::<Vec<_>>()}))
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
