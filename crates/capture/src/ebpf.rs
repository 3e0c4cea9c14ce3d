//! Capture by eBPF programs (`ebpf/capture.c`): outbound on the pod's cgroup, inbound on its interfaces. No packet rules, no connection
//! tracking, no NAT.
//!
//! In: a cgroup (v2) above all containers of the pod, the pod's interfaces, and what to capture. Out: programs attached to them, which
//! stay when this process ends and go with the cgroup and the interfaces; or their removal. Needs CAP_BPF and CAP_NET_ADMIN in the
//! initial user namespace (or root there), and Linux 5.12; for inbound capture Linux 6.6, before which that stays with packet rules.
//!
//! The source is compiled to `ebpf/capture.o`, which is part of this program; aya reads and relocates it and makes the maps.

mod kernel;
mod load;
mod maps;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapInfo};
use netns::Link;

use kernel::{Hook, Place};
use load::{New, load};
pub(crate) use maps::{REASONS, SLOTS_V6, Tables, Who, chain, first_slot, loopback};

/// All programs of the cgroup, in the order of their attachment: first what answers, last what leads connections to the proxy, so that no connection
/// is led there before the proxy can learn its destination. They are detached in the opposite order.
const PROGRAMS: [(&str, Hook); 9] = [
    ("outrigger_orig", Hook::GETSOCKOPT),
    ("outrigger_peer4", Hook::GETPEERNAME4),
    ("outrigger_peer6", Hook::GETPEERNAME6),
    ("outrigger_rcv4", Hook::RECVMSG4),
    ("outrigger_rcv6", Hook::RECVMSG6),
    ("outrigger_snd4", Hook::SENDMSG4),
    ("outrigger_snd6", Hook::SENDMSG6),
    ("outrigger_con4", Hook::CONNECT4),
    ("outrigger_con6", Hook::CONNECT6),
];

/// The program of each interface.
const INBOUND: &str = "outrigger_in";

/// Why capture by eBPF is not possible.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("--ebpf-cgroup {}: not a cgroup (v2) that can be opened", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("--ebpf-cgroup {}: {operation} needs CAP_BPF and CAP_NET_ADMIN in the initial user namespace, and Linux 5.12", path.display())]
    Kernel { path: PathBuf, operation: &'static str, source: io::Error },
    #[error(
        "cannot load the eBPF programs; they need CAP_BPF and CAP_NET_ADMIN in the initial user namespace, and Linux 5.12"
    )]
    Load(#[source] io::Error),
    #[error(
        "interface {interface}: {operation} an eBPF program needs CAP_BPF and CAP_NET_ADMIN in the initial user namespace"
    )]
    Interface { interface: String, operation: &'static str, source: io::Error },
    #[error("more than {} groups and users, or blocks, are too many for eBPF", maps::MAX_ENTRIES)]
    TooMany,
}

/// The verifier's protocol of a refused program fills pages; the instructions, which begin with their number, are left out.
fn load_error(error: impl std::error::Error) -> Error {
    let text = error.to_string();
    let said = text.lines().filter(|line| !line.starts_with(|c: char| c.is_ascii_digit())).take(3);
    Error::Load(io::Error::other(said.collect::<Vec<_>>().join("; ")))
}

/// What is attached to a cgroup, and to the interfaces of this network namespace beside it.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) tables: Tables,
    /// One for each of [`REASONS`].
    pub(crate) counters: Vec<u64>,
    /// Not all programs are there: an earlier run was killed.
    pub(crate) partial: bool,
    /// The interfaces where programs capture what comes in.
    pub(crate) interfaces: Vec<String>,
}

/// A cgroup of the unified hierarchy.
struct Cgroup {
    path: PathBuf,
    file: File,
}

/// A program of ours that is attached.
struct Attached {
    id: u32,
    program: kernel::Loaded,
}

/// Our program among those with these ids; the programs of others never have names that begin with `outrigger_`.
fn ours(ids: &[u32]) -> Result<Option<Attached>, Error> {
    let ours = |name: &str| name == INBOUND || PROGRAMS.iter().any(|(ours, _)| *ours == name);
    for id in ids {
        if let Some(program) = kernel::loaded(*id).map_err(load_error)?.filter(|program| ours(&program.name)) {
            return Ok(Some(Attached { id: *id, program }));
        }
    }
    Ok(None)
}

impl Cgroup {
    fn open(path: &Path) -> Result<Self, Error> {
        let error = |source| Error::Cgroup { path: path.to_owned(), source };
        // Only folders of the unified hierarchy have this file.
        std::fs::metadata(path.join("cgroup.controllers")).map_err(error)?;
        let file = File::open(path).map_err(error)?;
        Ok(Self { path: path.to_owned(), file })
    }

    fn place(&self) -> Place<'_> {
        Place::Cgroup(self.file.as_fd())
    }

    fn error(&self, operation: &'static str) -> impl Fn(io::Error) -> Error {
        let path = self.path.clone();
        move |source| Error::Kernel { path: path.clone(), operation, source }
    }

    /// Our program at a hook.
    fn ours(&self, hook: Hook) -> Result<Option<Attached>, Error> {
        ours(&kernel::attached(self.place(), hook).map_err(self.error("listing programs"))?)
    }
}

/// Our program on an interface of this network namespace.
fn inbound(link: &Link) -> Result<Option<Attached>, Error> {
    // Before Linux 6.6, and without the privilege to look, there is none.
    ours(&kernel::attached(Place::Interface(link.index), Hook::TCX_INGRESS).unwrap_or_default())
}

fn interface_error(link: &Link, operation: &'static str) -> impl FnOnce(io::Error) -> Error {
    let interface = link.name.clone();
    move |source| Error::Interface { interface, operation, source }
}

/// Whether the kernel has programs on interfaces that stay by themselves, which came with Linux 6.6.
pub(crate) fn can_capture_inbound(links: &[Link]) -> bool {
    let place = links.iter().find(|link| link.loopback).map(|link| Place::Interface(link.index));
    place.is_some_and(|lo| kernel::attached(lo, Hook::TCX_INGRESS).is_ok())
}

/// The interfaces by which connections from outside come.
fn outside(links: &[Link]) -> impl Iterator<Item = &Link> {
    links.iter().filter(|link| !link.loopback)
}

/// Brings the programs of a cgroup, and of the interfaces that connections come in by, to `tables`. False: they were so already. An
/// earlier program is replaced in one step, so that every connection meets either the old or the new one.
pub(crate) fn apply(path: &Path, links: &[Link], tables: &Tables) -> Result<bool, Error> {
    let cgroup = Cgroup::open(path)?;
    let links: Vec<&Link> = if tables.captures_inbound() { outside(links).collect() } else { Vec::new() };
    let earlier = live_of(&cgroup, &links)?;
    if let Some((live, _)) = &earlier
        && live.tables == *tables
        && !live.partial
        && links.iter().all(|link| live.interfaces.contains(&link.name))
    {
        return Ok(false);
    }
    let mut new = load(tables)?;
    if let Some((_, maps)) = &earlier {
        carry_over(maps, &mut new)?;
    }
    for (name, hook) in PROGRAMS {
        let earlier = cgroup.ours(hook)?;
        kernel::attach(cgroup.place(), new.program(name)?, hook, earlier.as_ref().map(|e| e.program.fd.as_fd()))
            .map_err(cgroup.error("attaching"))?;
    }
    for link in links {
        let earlier = inbound(link)?;
        let (place, hook) = (Place::Interface(link.index), Hook::TCX_INGRESS);
        kernel::attach(place, new.program(INBOUND)?, hook, earlier.as_ref().map(|e| e.program.fd.as_fd()))
            .map_err(interface_error(link, "attaching"))?;
    }
    Ok(true)
}

/// Gives new programs the lasting slots of the earlier ones, so that connections that are open keep their peers' names.
fn carry_over(earlier: &[u32], new: &mut New) -> Result<(), Error> {
    /// Slots that the earlier programs may still take before they are replaced; they stay empty.
    const MEANWHILE: u64 = 64;
    let named = |name: &str| -> Result<Option<MapData>, Error> {
        for id in earlier {
            if MapInfo::from_id(*id).map_err(load_error)?.name_as_str() == Some(name) {
                return MapData::from_id(*id).map(Some).map_err(load_error);
            }
        }
        Ok(None)
    };
    let (Some(old_taken), Some(old_slots)) = (named("taken")?, named("slots")?) else { return Ok(()) };
    let old_taken: Array<_, u64> = Map::Array(old_taken).try_into().map_err(load_error)?;
    let old_slots: Array<_, maps::Place> = Map::Array(old_slots).try_into().map_err(load_error)?;
    let lasting = u64::from(maps::LASTING);
    let used = old_taken.get(&0, 0).map_err(load_error)?.min(lasting);
    let mut slots: Array<_, maps::Place> = new.array("slots")?;
    let mut numbers: HashMap<_, maps::Place, u32> = new.hash("numbers")?;
    for at in (0..maps::LASTING).take_while(|at| u64::from(*at) < used) {
        let place = old_slots.get(&at, 0).map_err(load_error)?;
        slots.set(at, place, 0).map_err(load_error)?;
        // Two slots may hold the same place; one of them is enough for connections to come.
        if place != maps::Place::default() {
            numbers.insert(place, maps::address_of(at), 0).map_err(load_error)?;
        }
    }
    let mut taken: Array<_, u64> = new.array("taken")?;
    let turns = old_taken.get(&1, 0).map_err(load_error)?;
    taken.set(0, if used == 0 { 0 } else { lasting.min(used + MEANWHILE) }, 0).map_err(load_error)?;
    taken.set(1, turns, 0).map_err(load_error)
}

/// Detaches our programs from a cgroup. False: there were none.
pub(crate) fn remove(path: &Path) -> Result<bool, Error> {
    let cgroup = Cgroup::open(path)?;
    let mut any = false;
    for (_, hook) in PROGRAMS.iter().rev() {
        while let Some(found) = cgroup.ours(*hook)? {
            kernel::detach(cgroup.place(), found.program.fd.as_fd(), *hook).map_err(cgroup.error("detaching"))?;
            any = true;
        }
    }
    Ok(any)
}

/// Detaches our programs from the interfaces of this network namespace.
pub(crate) fn remove_inbound(links: &[Link]) -> Result<(), Error> {
    for link in outside(links) {
        while let Some(found) = inbound(link)? {
            kernel::detach(Place::Interface(link.index), found.program.fd.as_fd(), Hook::TCX_INGRESS)
                .map_err(interface_error(link, "detaching"))?;
        }
    }
    Ok(())
}

/// The interfaces of this network namespace that have a program of ours.
pub(crate) fn inbound_interfaces(links: &[Link]) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for link in outside(links) {
        if inbound(link)?.is_some() {
            names.push(link.name.clone());
        }
    }
    Ok(names)
}

/// The ids of our programs that are attached to this cgroup itself and to the interfaces of this network namespace.
pub fn attached_programs(path: &Path) -> io::Result<Vec<u32>> {
    let links = netns::Netlink::open().and_then(|mut netlink| netlink.links()).map_err(io::Error::other)?;
    let cgroup = Cgroup::open(path).map_err(io::Error::other)?;
    let on_cgroup = PROGRAMS.into_iter().map(|(_, hook)| cgroup.ours(hook));
    let all = on_cgroup.chain(outside(&links).map(inbound)).filter_map(Result::transpose);
    all.map(|found| found.map(|found| found.id)).collect::<Result<_, _>>().map_err(io::Error::other)
}

/// What is attached to this cgroup itself, and to these interfaces with it.
pub(crate) fn live(path: &Path, links: &[Link]) -> Result<Option<Live>, Error> {
    let links: Vec<&Link> = outside(links).collect();
    Ok(live_of(&Cgroup::open(path)?, &links)?.map(|(live, _)| live))
}

/// With the ids of the maps.
fn live_of(cgroup: &Cgroup, links: &[&Link]) -> Result<Option<(Live, Vec<u32>)>, Error> {
    let mut found = 0;
    let mut maps = Vec::new();
    for (_, hook) in PROGRAMS {
        if let Some(program) = cgroup.ours(hook)? {
            found += 1;
            // The programs that lead connections know all maps.
            if program.program.maps.len() > maps.len() {
                maps = program.program.maps;
            }
        }
    }
    if found == 0 {
        return Ok(None);
    }
    read(maps, found != PROGRAMS.len(), links).map(Some)
}

/// What these maps hold. Not a part of its caller, whose stack would else take their hundred kilobytes where there are none.
#[inline(never)]
fn read(maps: Vec<u32>, partial: bool, links: &[&Link]) -> Result<(Live, Vec<u32>), Error> {
    let mut live = Live { tables: Tables::default(), counters: Vec::new(), partial, interfaces: Vec::new() };
    let mut settings = None;
    for id in &maps {
        let info = MapInfo::from_id(*id).map_err(load_error)?;
        let data = || MapData::from_id(*id).map_err(load_error);
        match info.name_as_str() {
            Some("settings") => {
                let array: Array<_, maps::Settings> = Map::Array(data()?).try_into().map_err(load_error)?;
                live.tables.settings = array.get(&0, 0).map_err(load_error)?;
                settings = Some(*id);
            }
            Some("ports") => {
                let array: Array<_, maps::PortBits> = Map::Array(data()?).try_into().map_err(load_error)?;
                *live.tables.ports.0 = array.get(&0, 0).map_err(load_error)?;
            }
            Some("listed") => {
                let hash: HashMap<_, maps::Listed, u8> = Map::HashMap(data()?).try_into().map_err(load_error)?;
                live.tables.listed = hash.keys().collect::<Result<_, _>>().map_err(load_error)?;
            }
            Some("blocks") => {
                let trie: LpmTrie<_, maps::Block, u8> = Map::LpmTrie(data()?).try_into().map_err(load_error)?;
                for key in trie.keys() {
                    let key = key.map_err(load_error)?;
                    live.tables.blocks.insert((key.prefix_len(), key.data()));
                }
            }
            Some("counters") => {
                let array: Array<_, u64> = Map::Array(data()?).try_into().map_err(load_error)?;
                live.counters = array.iter().collect::<Result<_, _>>().map_err(load_error)?;
            }
            _ => {}
        }
    }
    for link in links {
        // One of another load works with other settings, until it is replaced, too.
        let same = |found: Attached| settings.is_some_and(|id| found.program.maps.contains(&id));
        match inbound(link)?.map(same) {
            Some(true) => live.interfaces.push(link.name.clone()),
            Some(false) => live.partial = true,
            None => {}
        }
    }
    live.partial |= live.tables.captures_inbound() && live.interfaces.is_empty() && !links.is_empty();
    Ok((live, maps))
}

/// The cgroup of a process (`self` or a number) and those above it, innermost first, as far as they can be seen from here.
pub(crate) fn cgroups_of(process: &str) -> Vec<PathBuf> {
    let read = |file: String| std::fs::read_to_string(file).unwrap_or_default();
    let mounts = read("/proc/self/mountinfo".into());
    let root = mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    });
    let Some(root) = root else { return Vec::new() };
    let own = read(format!("/proc/{process}/cgroup"));
    let Some(own) = own.lines().find_map(|line| line.strip_prefix("0::/")) else { return Vec::new() };
    let own = root.join(own);
    own.ancestors().take_while(|path| path.starts_with(&root)).map(PathBuf::from).collect()
}
