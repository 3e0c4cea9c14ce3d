//! From flags to rules in the kernel, and the exit status.

use std::fmt::Write;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use netns::nft::{LiveRule, Nft};
use netns::{Link, Netlink};

use crate::args::{Action, Args, Choice, Settings, Surroundings};
use crate::config::{Config, Dns, Invalid, Mode};
use crate::iptables::{self, Backend, Programs};
use crate::rules::{Chain, RuleSet, Table, rules};
use crate::validate::{self, validate};
use crate::{ebpf, host, nftables, routes};

/// Why capture could not be set up. Nothing is half-applied: each table changes in one transaction.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("no valid local IP address found in this network namespace")]
    NoAddress,
    #[error("cannot set up traffic capture: this needs root and CAP_NET_ADMIN in the pod's network namespace")]
    Permission(#[source] netns::Error),
    #[error("cannot set up traffic capture")]
    Netlink(#[source] netns::Error),
    #[error("cannot set up traffic capture with iptables")]
    Iptables(#[from] iptables::Error),
    #[error("cannot capture outbound traffic with eBPF")]
    Ebpf(#[from] ebpf::Error),
    #[error("failed to load /etc/resolv.conf, which --redirect-dns needs without --capture-all-dns")]
    Resolver(#[source] io::Error),
    #[error(transparent)]
    Validation(#[from] validate::Failed),
}

impl From<netns::Error> for Failure {
    fn from(error: netns::Error) -> Self {
        if error.is_permission() { Self::Permission(error) } else { Self::Netlink(error) }
    }
}

impl Failure {
    /// 126 when validation failed, else 1, as the reference.
    pub(crate) fn exit_status(&self) -> u8 {
        if matches!(self, Self::Validation(_)) { 126 } else { 1 }
    }
}

/// Does what the flags say; what a dry run would do comes back as text.
pub(crate) fn run(args: &Args) -> Result<String, Failure> {
    let read = |file| std::fs::read_to_string(file).unwrap_or_default();
    let (users, groups) = (read("/etc/passwd"), read("/etc/group"));
    let env = |name: &str| std::env::var(name).ok();
    let settings = args.resolve(&Surroundings { env: &env, users: &users, groups: &groups })?;
    let mut netlink = Netlink::open()?;
    let resolver = || std::fs::read_to_string("/etc/resolv.conf");
    let (mut config, first_ipv6) = complete(&settings, &mut netlink, resolver)?;
    let links = netlink.links()?;
    if config.by_sockets && config.mode == Mode::Redirect && !config.inbound_ports.is_none() {
        config.inbound_by_programs = ebpf::can_capture_inbound(&links);
        if !config.inbound_by_programs && settings.action == Action::Apply {
            eprintln!("Warning: inbound capture stays with packet rules; without them it needs Linux 6.6");
        }
    }
    let set = rules(&config);
    let mut shown = String::new();
    match settings.action {
        Action::Nothing => {}
        Action::Apply if settings.dry_run => {
            shown = dry_run(&settings, &set);
            if let Some(cgroup) = &settings.cgroup {
                let tables = ebpf::Tables::new(&config, &host::local_addresses(&mut netlink)?);
                let _ = write!(shown, "eBPF programs on {}\n  {}\n", cgroup.display(), tables.describe().join("\n  "));
            }
        }
        Action::Apply => {
            if let Some(unknown) = config.unknown_owner() {
                return Err(unknown.into());
            }
            apply(&settings, &config, &set, &mut netlink, &links)?;
        }
        Action::CleanUp | Action::CleanUpAll => shown = clean_up(&settings, &config, &mut netlink, &links)?,
    }
    if settings.validate && !settings.dry_run {
        validate(&config, first_ipv6, settings.probe_port, settings.probe_timeout)?;
    }
    Ok(shown)
}

/// Adds what depends on this namespace, and says whether its first address is IPv6.
fn complete(
    settings: &Settings,
    netlink: &mut Netlink,
    resolver: impl FnOnce() -> io::Result<String>,
) -> Result<(Config, bool), Failure> {
    let mut config = settings.config.clone();
    let mut first_ipv6 = false;
    match host::addresses(netlink, settings.dual_stack)? {
        Some(addresses) => {
            config.ipv6 = addresses.ipv6;
            first_ipv6 = addresses.first_ipv6;
            // DIFFERS: Istio says nothing, and IPv6 traffic silently passes the proxy by.
            if addresses.ipv6_uncaptured && settings.action == Action::Apply {
                eprintln!(
                    "Warning: this pod has an IPv6 address whose traffic is not captured; --dual-stack captures it"
                );
            }
        }
        // Removing needs no addresses.
        None if matches!(settings.action, Action::CleanUp | Action::CleanUpAll) => {}
        None => return Err(Failure::NoAddress),
    }
    config.dns = match (settings.redirect_dns, settings.capture_all_dns) {
        (true, true) => Dns::All,
        (true, false) if settings.action == Action::Apply => {
            let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = host::name_servers(&resolver().map_err(Failure::Resolver)?);
            if v4.is_empty() && v6.is_empty() {
                eprintln!("Warning: no name servers in /etc/resolv.conf; DNS queries are not captured");
                Dns::Off
            } else {
                Dns::Servers { v4, v6 }
            }
        }
        _ => Dns::Off,
    };
    Ok((config, first_ipv6))
}

/// What the reference logs in a dry run: its commands and their input.
///
/// DIFFERS: Istio's `--native-nftables --dry-run` changes the rules.
fn dry_run(settings: &Settings, set: &RuleSet) -> String {
    if settings.choice == Choice::Native {
        return nftables::text(set);
    }
    let saves = if set.ipv6 { "iptables-save\nip6tables-save\n" } else { "iptables-save\n" };
    format!(
        "iptables-save\nip6tables-save\n{}{}{saves}",
        iptables::restore_text(set, false),
        iptables::restore_text(set, true)
    )
}

fn apply(
    settings: &Settings,
    config: &Config,
    set: &RuleSet,
    netlink: &mut Netlink,
    links: &[Link],
) -> Result<(), Failure> {
    let programs = Programs::from_env();
    let mut nft = open_nft()?;
    let leftovers = iptables::find_leftovers(nft.as_mut(), &programs)?;
    let backend = match settings.choice {
        Choice::Native => None,
        Choice::Forced(name) => Some(programs.forced(name)?),
        Choice::Auto => programs.choose(&leftovers, nft.is_some())?,
    };
    // Marked packets must have somewhere to go before the first one is marked.
    routes::apply(netlink, config)?;
    // Programs come before the rules that they replace go, and go after the rules that replace them have come.
    if let Some(cgroup) = &settings.cgroup {
        let outside: Vec<Link> = links.iter().filter(|l| !config.virt_interfaces.contains(&l.name)).cloned().collect();
        ebpf::apply(cgroup, &outside, &ebpf::Tables::new(config, &host::local_addresses(netlink)?))?;
    }
    let mut marks = nft.as_mut().map(native_marks).transpose()?.unwrap_or_default();
    match backend {
        Some(backend) => marks.extend(iptables::apply(&programs, backend, Some(set), &leftovers, false)?.marks),
        None => native(set)?,
    }
    // Only now the rules of an earlier run through another back end go, so that nothing passes uncaptured in between.
    for (other, found) in [(Backend::Nft, leftovers.nft), (Backend::Legacy, leftovers.legacy)] {
        let same = backend == Some(other) || backend == Some(Backend::Plain);
        if !same && found.contains(&true) {
            marks.extend(iptables::apply(&programs, other, None, &leftovers, false)?.marks);
        }
    }
    if let (Some(_), Some(nft)) = (backend, nft.as_mut()) {
        remove_native(nft, false)?;
    }
    for cgroup in programmed_cgroups(settings) {
        if Some(&cgroup) != settings.cgroup.as_ref() {
            ebpf::remove(&cgroup)?;
        }
    }
    if !config.inbound_by_programs {
        ebpf::remove_inbound(links)?;
    }
    if !(config.by_sockets && config.ipv6) {
        routes::remove_slots(netlink)?;
    }
    routes::remove_stale(netlink, config, &marks, true)?;
    if !config.ipv6 {
        routes::remove_passthrough(netlink)?;
    }
    Ok(())
}

/// The cgroups that may hold programs of ours: the one given, else this process's own and those above it, since the containers of a pod
/// are below the pod's.
fn programmed_cgroups(settings: &Settings) -> Vec<PathBuf> {
    match &settings.cgroup {
        Some(given) => vec![given.clone()],
        // Without the privilege to look, there was none to attach either.
        None => ebpf::cgroups_of("self").into_iter().filter(|c| matches!(ebpf::live(c, &[]), Ok(Some(_)))).collect(),
    }
}

/// The kernel's nftables; none in a kernel without them, which leaves iptables-legacy.
pub(crate) fn open_nft() -> Result<Option<Nft>, Failure> {
    let mut nft = Nft::open()?;
    match nft.tables() {
        Ok(_) => Ok(Some(nft)),
        Err(e) if e.is_permission() => Err(e.into()),
        Err(_) => Ok(None),
    }
}

/// Brings our native tables to the wanted rules in one transaction; nothing happens when they are so already.
fn native(set: &RuleSet) -> Result<(), Failure> {
    let mut nft = Nft::open()?;
    let present = nft.tables()?;
    let batch = nftables::batch(Some(set), &present);
    let mut same = true;
    for kind in Table::ALL {
        let table = nftables::table(kind);
        let wanted = !set.chains(kind, None).is_empty();
        same &= wanted == present.contains(&table) && (!wanted || nft.holds(&table, &batch)?);
    }
    if !same {
        nft.apply(&batch)?;
    }
    Ok(())
}

/// The marks of live TPROXY rules in our native tables, whatever flags they were made with.
fn native_marks(nft: &mut Nft) -> Result<Vec<u32>, Failure> {
    let rules = nft.rules(&nftables::table(Table::Mangle))?;
    Ok(rules.iter().filter(|r| r.chain == Chain::Divert.nft_name()).filter_map(LiveRule::set_mark).collect())
}

fn remove_native(nft: &mut Nft, dry_run: bool) -> Result<String, Failure> {
    let present = nft.tables()?;
    let batch = nftables::batch(None, &present);
    if !dry_run {
        nft.apply(&batch)?;
    }
    Ok(batch.to_string())
}

/// Removes everything of ours: in both iptables back ends and in native nftables, whatever flags made it.
///
/// DIFFERS: Istio removes only what the same flags would make, and leaves routes, rules and addresses.
fn clean_up(settings: &Settings, config: &Config, netlink: &mut Netlink, links: &[Link]) -> Result<String, Failure> {
    let programs = Programs::from_env();
    let mut shown = String::new();
    let mut marks = Vec::new();
    let mut nft = open_nft()?;
    let leftovers = iptables::find_leftovers(nft.as_mut(), &programs)?;
    let mut backends = Vec::new();
    backends.extend(leftovers.nft.contains(&true).then_some(Backend::Nft));
    backends.extend(leftovers.legacy.contains(&true).then_some(Backend::Legacy));
    for backend in backends {
        let done = iptables::apply(&programs, backend, None, &leftovers, settings.dry_run)?;
        marks.extend(done.marks);
        for (program, text) in [("iptables-restore", done.v4), ("ip6tables-restore", done.v6)] {
            if let Some(text) = text {
                // Writing into a string cannot fail.
                let _ = write!(shown, "# {program} --noflush ({backend:?})\n{text}");
            }
        }
    }
    if let Some(nft) = nft.as_mut() {
        marks.extend(native_marks(nft)?);
        shown.push_str(&remove_native(nft, settings.dry_run)?);
    }
    for cgroup in programmed_cgroups(settings) {
        if !settings.dry_run {
            ebpf::remove(&cgroup)?;
        } else if ebpf::live(&cgroup, &[])?.is_some() {
            let _ = writeln!(shown, "detach eBPF programs from {}", cgroup.display());
        }
    }
    for interface in ebpf::inbound_interfaces(links)?.iter().filter(|_| settings.dry_run) {
        let _ = writeln!(shown, "detach the eBPF program from interface {interface}");
    }
    if !settings.dry_run {
        ebpf::remove_inbound(links)?;
        routes::remove_slots(netlink)?;
        routes::remove_stale(netlink, config, &marks, false)?;
        if settings.action == Action::CleanUpAll || !config.ipv6 {
            routes::remove_passthrough(netlink)?;
        }
    }
    Ok(if settings.dry_run { shown } else { String::new() })
}
