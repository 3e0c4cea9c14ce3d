//! Makes the maps of `capture.o`, fills them, and loads its programs.
//!
//! aya reads the object, makes the maps and writes their descriptors into the instructions. Its own loader, which is for programs of
//! all kinds, reads the types of the whole kernel first, which takes 20 MiB and most of the time, and tries out what the kernel
//! can; these programs need neither.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use aya::Pod;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData};
use aya_obj::Object;
use aya_obj::btf::BtfFeatures;

use super::kernel::{self, Hook};
use super::maps::{self, Tables};
use super::{Error, INBOUND, PROGRAMS, load_error};

/// Programs that are in the kernel but not attached.
pub(super) struct New {
    maps: BTreeMap<String, MapData>,
    programs: BTreeMap<&'static str, OwnedFd>,
}

impl New {
    fn map(&mut self, name: &str) -> Result<MapData, Error> {
        self.maps.remove(name).ok_or_else(|| load_error(io::Error::other(format!("no map {name}"))))
    }

    /// Each map can be had once.
    pub(super) fn array<V: Pod>(&mut self, name: &str) -> Result<Array<MapData, V>, Error> {
        Map::Array(self.map(name)?).try_into().map_err(load_error)
    }

    /// As [`New::array`].
    pub(super) fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> Result<HashMap<MapData, K, V>, Error> {
        Map::HashMap(self.map(name)?).try_into().map_err(load_error)
    }

    fn trie<K: Pod, V: Pod>(&mut self, name: &str) -> Result<LpmTrie<MapData, K, V>, Error> {
        Map::LpmTrie(self.map(name)?).try_into().map_err(load_error)
    }

    pub(super) fn program(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        self.programs.get(name).map(AsFd::as_fd).ok_or_else(|| missing_program(name))
    }
}

fn missing_program(name: &str) -> Error {
    load_error(io::Error::other(format!("no program {name}")))
}

/// Nothing is attached yet.
pub(super) fn load(tables: &Tables) -> Result<New, Error> {
    if tables.listed.len().max(tables.blocks.len()) > maps::MAX_ENTRIES {
        return Err(Error::TooMany);
    }
    let mut new = make(aya::include_bytes_aligned!("../../ebpf/capture.o"))?;
    new.array::<maps::Settings>("settings")?.set(0, tables.settings, 0).map_err(load_error)?;
    let mut listed = new.hash::<maps::Listed, u8>("listed")?;
    for key in &tables.listed {
        listed.insert(key, 1, 0).map_err(load_error)?;
    }
    let mut blocks = new.trie::<maps::Block, u8>("blocks")?;
    for (bits, data) in &tables.blocks {
        blocks.insert(&Key::new(*bits, *data), 1, 0).map_err(load_error)?;
    }
    new.array::<maps::PortBits>("ports")?.set(0, *tables.ports.0, 0).map_err(load_error)?;
    Ok(new)
}

fn make(bytes: &[u8]) -> Result<New, Error> {
    // The types that C has are known to every kernel that has these hooks.
    const TYPES: BtfFeatures = BtfFeatures::new(true, true, true, false, false, false, false, false);
    let mut object = Object::parse(bytes).map_err(load_error)?;
    // Storage of sockets is made only of known types.
    let types = match object.fixup_and_sanitize_btf(&TYPES).map_err(load_error)? {
        Some(types) => Some(kernel::load_types(&types.to_bytes()).map_err(load_error)?),
        None => None,
    };
    let mut maps = BTreeMap::new();
    let definitions = std::mem::take(&mut object.maps);
    for (name, definition) in &definitions {
        let map = MapData::create(definition.clone(), name, types.as_ref().map(AsFd::as_fd)).map_err(load_error)?;
        maps.insert(name.clone(), map);
    }
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    let made = definitions.iter().filter_map(|(name, definition)| {
        maps.get(name).map(|map: &MapData| (name.as_str(), map.fd().as_fd().as_raw_fd(), definition))
    });
    object.relocate_maps(made, &sections).map_err(load_error)?;
    object.relocate_calls(&sections).map_err(load_error)?;
    let mut programs = BTreeMap::new();
    for (name, hook) in PROGRAMS.into_iter().chain([(INBOUND, Hook::TCX_INGRESS)]) {
        let program = object.programs.get(name).ok_or_else(|| missing_program(name))?;
        let function = object.functions.get(&program.function_key()).ok_or_else(|| missing_program(name))?;
        let fd = kernel::load(hook, name, &program.license, &function.instructions).map_err(load_error)?;
        programs.insert(name, fd);
    }
    Ok(New { maps, programs })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Selection};

    /// A frame with an opening packet for port 81, and this in the field of the length.
    fn frame(v6: bool, length: u16) -> Vec<u8> {
        let [a, b] = length.to_be_bytes();
        let tcp = [0x9c, 0x40, 0, 81, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0];
        let ip = if v6 {
            [&[0x60, 0, 0, 0, a, b, 6, 64][..], &[0xfd; 16], &[0xfe; 16]].concat()
        } else {
            vec![0x45, 0, a, b, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]
        };
        [&[0; 12][..], if v6 { &[0x86, 0xdd] } else { &[8, 0] }, &ip, &tcp].concat()
    }

    #[test]
    fn only_packets_too_short_for_their_ports_are_dropped() {
        const NEXT: i32 = -1;
        const DROP: i32 = 2;
        let config = Config {
            inbound_ports: Selection::Only(vec![80.into()]),
            inbound_by_programs: true,
            ipv6: true,
            ..Config::default()
        };
        let new = match load(&Tables::new(&config, &[])) {
            Ok(new) => new,
            Err(e) => {
                let text =
                    format!("{e}: {}", std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default());
                println!("SKIPPED: this system loads no eBPF programs: {text}");
                // A refusal by the verifier is our own fault and no reason to skip.
                assert!(!text.contains("verifier"), "{text}");
                return;
            }
        };
        let run = |v6, length| kernel::run(new.program(INBOUND).expect("program"), &frame(v6, length)).expect("run");
        // 0 is what segments have that were put together to more than the field holds (BIG TCP).
        assert_eq!([40, 39, 0].map(|length| run(false, length)), [NEXT, DROP, NEXT]);
        assert_eq!([20, 19, 0].map(|length| run(true, length)), [NEXT, DROP, NEXT]);
    }
}
