//! Outbound capture by eBPF programs on the pod's cgroup (`ebpf/outbound.c`): no packet rules, no connection tracking, no NAT.
//!
//! In: a cgroup (v2) above all containers of the pod, and what to capture. Out: programs attached to it, which stay when this process
//! ends and go with the cgroup; or their removal. Needs CAP_BPF and CAP_NET_ADMIN in the initial user namespace (or root there), and
//! Linux 5.10. Inbound capture remains with packet rules.
//!
//! The source is compiled to `ebpf/outbound.o`, which is part of this program; aya relocates it, makes the maps and loads it.

mod kernel;
mod maps;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapInfo};
use aya::programs::{Program, ProgramFd, loaded_programs};
use aya::{Ebpf, EbpfLoader};

use kernel::Hook;
pub(crate) use maps::{REASONS, Tables, Who};

/// All programs, in the order of their attachment: first what answers, last what leads connections to the proxy, so that no connection
/// is led there before the proxy can learn its destination. They are detached in the opposite order.
const PROGRAMS: [(&str, Hook); 10] = [
    ("outrigger_orig", Hook::GETSOCKOPT),
    ("outrigger_flow", Hook::SOCK_OPS),
    ("outrigger_peer4", Hook::GETPEERNAME4),
    ("outrigger_peer6", Hook::GETPEERNAME6),
    ("outrigger_rcv4", Hook::RECVMSG4),
    ("outrigger_rcv6", Hook::RECVMSG6),
    ("outrigger_snd4", Hook::SENDMSG4),
    ("outrigger_snd6", Hook::SENDMSG6),
    ("outrigger_con4", Hook::CONNECT4),
    ("outrigger_con6", Hook::CONNECT6),
];

/// Why outbound capture by eBPF is not possible.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("--ebpf-cgroup {}: not a cgroup (v2) that can be opened", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("--ebpf-cgroup {}: {operation} needs CAP_BPF and CAP_NET_ADMIN in the initial user namespace, and Linux 5.10", path.display())]
    Kernel { path: PathBuf, operation: &'static str, source: io::Error },
    #[error(
        "cannot load the eBPF programs; they need CAP_BPF and CAP_NET_ADMIN in the initial user namespace, and Linux 5.10"
    )]
    Load(#[source] io::Error),
    #[error("more than {} ports, groups and users, or blocks, are too many for eBPF", maps::MAX_ENTRIES)]
    TooMany,
}

/// The verifier's protocol of a refused program fills pages; the instructions, which begin with their number, are left out.
fn load_error(error: impl std::error::Error) -> Error {
    let text = error.to_string();
    let said = text.lines().filter(|line| !line.starts_with(|c: char| c.is_ascii_digit())).take(3);
    Error::Load(io::Error::other(said.collect::<Vec<_>>().join("; ")))
}

/// What is attached to a cgroup.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) tables: Tables,
    /// One for each of [`REASONS`].
    pub(crate) counters: Vec<u64>,
    /// Not all programs are there: an earlier run was killed.
    pub(crate) partial: bool,
}

/// A cgroup of the unified hierarchy.
struct Cgroup {
    path: PathBuf,
    file: File,
}

impl Cgroup {
    fn open(path: &Path) -> Result<Self, Error> {
        let error = |source| Error::Cgroup { path: path.to_owned(), source };
        // Only folders of the unified hierarchy have this file.
        std::fs::metadata(path.join("cgroup.controllers")).map_err(error)?;
        let file = File::open(path).map_err(error)?;
        Ok(Self { path: path.to_owned(), file })
    }

    fn error(&self, operation: &'static str) -> impl Fn(io::Error) -> Error {
        let path = self.path.clone();
        move |source| Error::Kernel { path: path.clone(), operation, source }
    }

    /// Our program at a hook, by its name; the names of others never begin with `outrigger_`.
    fn ours(&self, hook: Hook) -> Result<Option<(u32, ProgramFd, Vec<u32>)>, Error> {
        let ids = kernel::attached(self.file.as_fd(), hook).map_err(self.error("listing programs"))?;
        if ids.is_empty() {
            return Ok(None);
        }
        for info in loaded_programs() {
            let info = info.map_err(load_error)?;
            let named = info.name_as_str().is_some_and(|name| PROGRAMS.iter().any(|(ours, _)| *ours == name));
            if named && ids.contains(&info.id()) {
                let maps = info.map_ids().map_err(load_error)?.unwrap_or_default();
                return Ok(Some((info.id(), info.fd().map_err(load_error)?, maps)));
            }
        }
        Ok(None)
    }
}

fn take<T: TryFrom<Map, Error = aya::maps::MapError>>(ebpf: &mut Ebpf, name: &str) -> Result<T, Error> {
    let map = ebpf.take_map(name).ok_or_else(|| load_error(io::Error::other(format!("no map {name}"))))?;
    T::try_from(map).map_err(load_error)
}

/// Makes the maps, fills them, and loads the programs. Nothing is attached yet.
fn load(tables: &Tables) -> Result<Ebpf, Error> {
    if tables.listed.len().max(tables.blocks.len()) > maps::MAX_ENTRIES {
        return Err(Error::TooMany);
    }
    let object = aya::include_bytes_aligned!("../ebpf/outbound.o");
    let mut ebpf = EbpfLoader::new().load(object).map_err(load_error)?;
    let mut settings: Array<_, maps::Settings> = take(&mut ebpf, "settings")?;
    settings.set(0, tables.settings, 0).map_err(load_error)?;
    let mut listed: HashMap<_, maps::Listed, u8> = take(&mut ebpf, "listed")?;
    for key in &tables.listed {
        listed.insert(key, 1, 0).map_err(load_error)?;
    }
    let mut blocks: LpmTrie<_, maps::Block, u8> = take(&mut ebpf, "blocks")?;
    for (bits, data) in &tables.blocks {
        blocks.insert(&Key::new(*bits, *data), 1, 0).map_err(load_error)?;
    }
    for (_, program) in ebpf.programs_mut() {
        match program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSockopt(program) => program.load(),
            Program::SockOps(program) => program.load(),
            _ => continue,
        }
        .map_err(load_error)?;
    }
    Ok(ebpf)
}

/// Brings the programs of a cgroup to `tables`. False: they were so already. An earlier program is replaced in one step, so that every
/// connection meets either the old or the new one.
pub(crate) fn apply(path: &Path, tables: &Tables) -> Result<bool, Error> {
    let cgroup = Cgroup::open(path)?;
    if live_of(&cgroup)?.is_some_and(|live| live.tables == *tables && !live.partial) {
        return Ok(false);
    }
    let ebpf = load(tables)?;
    for (name, hook) in PROGRAMS {
        let program = ebpf.program(name).ok_or_else(|| load_error(io::Error::other(format!("no program {name}"))))?;
        let earlier = cgroup.ours(hook)?;
        let earlier = earlier.as_ref().map(|(_, fd, _)| fd.as_fd());
        kernel::attach(cgroup.file.as_fd(), program.fd().map_err(load_error)?.as_fd(), hook, earlier)
            .map_err(cgroup.error("attaching"))?;
    }
    Ok(true)
}

/// Detaches our programs from a cgroup. False: there were none.
pub(crate) fn remove(path: &Path) -> Result<bool, Error> {
    let cgroup = Cgroup::open(path)?;
    let mut any = false;
    for (_, hook) in PROGRAMS.iter().rev() {
        while let Some((_, fd, _)) = cgroup.ours(*hook)? {
            kernel::detach(cgroup.file.as_fd(), fd.as_fd(), *hook).map_err(cgroup.error("detaching"))?;
            any = true;
        }
    }
    Ok(any)
}

/// The ids of our programs that are attached to this cgroup itself: ten, or none.
pub fn attached_programs(path: &Path) -> io::Result<Vec<u32>> {
    let cgroup = Cgroup::open(path).map_err(io::Error::other)?;
    let ours = |(_, hook)| cgroup.ours(hook).map(|found| found.map(|(id, ..)| id)).transpose();
    PROGRAMS.into_iter().filter_map(ours).collect::<Result<_, _>>().map_err(io::Error::other)
}

/// What is attached to this cgroup itself.
pub(crate) fn live(path: &Path) -> Result<Option<Live>, Error> {
    live_of(&Cgroup::open(path)?)
}

fn live_of(cgroup: &Cgroup) -> Result<Option<Live>, Error> {
    let mut found = 0;
    let mut maps = Vec::new();
    for (_, hook) in PROGRAMS {
        if let Some((_, _, ids)) = cgroup.ours(hook)? {
            found += 1;
            // The programs that lead connections know all maps but one.
            if ids.len() > maps.len() {
                maps = ids;
            }
        }
    }
    if found == 0 {
        return Ok(None);
    }
    let mut live = Live { tables: Tables::default(), counters: Vec::new(), partial: found != PROGRAMS.len() };
    for id in maps {
        let info = MapInfo::from_id(id).map_err(load_error)?;
        let data = || MapData::from_id(id).map_err(load_error);
        match info.name_as_str() {
            Some("settings") => {
                let array: Array<_, maps::Settings> = Map::Array(data()?).try_into().map_err(load_error)?;
                live.tables.settings = array.get(&0, 0).map_err(load_error)?;
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
    Ok(Some(live))
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
