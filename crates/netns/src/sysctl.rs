//! Settings under `/proc/sys/net`, which belong to the network namespace of the thread that opens them.

use std::{fs, io};

use crate::{Error, Netns};

/// Writes one setting in a namespace; `name` as sysctl(8) spells it, with `/` where an interface name holds dots
/// (`net.ipv4.ip_forward`, `net/ipv4/conf/eth0.1/rp_filter`).
pub fn write_sysctl(ns: &Netns, name: &str, value: &str) -> Result<(), Error> {
    let path = path(name);
    ns.run(|| fs::write(&path, value)).and_then(|r| r).map_err(|e| Error::io(format!("set {name} to {value}"), e))
}

/// Reads one setting in a namespace, without the trailing newline.
pub fn read_sysctl(ns: &Netns, name: &str) -> Result<String, Error> {
    let path = path(name);
    let read: io::Result<String> = ns.run(|| fs::read_to_string(&path)).and_then(|r| r);
    read.map(|text| text.trim_end().to_owned()).map_err(|e| Error::io(format!("read {name}"), e))
}

fn path(name: &str) -> String {
    let slashes = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    format!("/proc/sys/{slashes}")
}
