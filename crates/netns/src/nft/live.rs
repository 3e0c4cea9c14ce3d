//! The socket: applying batches, and reading what is there.

use std::collections::BTreeMap;

use super::batch::{self, Batch};
use super::decode::{self, Part};
use super::{Family, Table};
use crate::socket::{F_REQUEST, Socket};
use crate::wire::{self, HEADER, Message, attributes, find};
use crate::{Error, Netns};

const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const GETTABLE: u16 = 1;
const GETCHAIN: u16 = 4;
const GETRULE: u16 = 7;
const GETSETELEM: u16 = 13;
/// Length of `struct nfgenmsg`.
const NFGEN: usize = 4;

/// A chain as the kernel has it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LiveChain {
    pub name: String,
    /// Base chains only: number of the hook and priority.
    pub hook: Option<(u32, i32)>,
    /// Base chains only: the policy drops what no rule decided.
    pub drops: bool,
    /// Base chains only: of type nat.
    pub nat: bool,
}

/// A rule as the kernel has it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LiveRule {
    pub chain: String,
    pub handle: u64,
    /// Of the first counter, when there is one.
    pub packets: u64,
    pub bytes: u64,
    pub comment: Option<String>,
    exprs: Vec<u8>,
}

impl LiveRule {
    /// The number that the rule sets as packet mark, when it does.
    pub fn set_mark(&self) -> Option<u32> {
        const META_MARK: u32 = 3;
        let all = expressions(&self.exprs);
        all.windows(2).find_map(|pair| {
            let [(load, value), (store, meta)] = pair else { return None };
            let stores = store == "meta" && find(meta, 2).map(wire::be32) == Some(META_MARK) && find(meta, 3).is_some();
            (load == "immediate" && stores).then(|| find(value, 2).and_then(|data| find(data, 1)).map(wire::ne32))?
        })
    }
}

/// An nf_tables socket. It stays in the namespace it was opened in.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
}

impl Nft {
    /// In the namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        Socket::open(libc::NETLINK_NETFILTER)
            .map(|socket| Self { socket })
            .map_err(|e| Error::io("open an nf_tables socket", e))
    }

    /// In another namespace.
    pub fn open_in(ns: &Netns) -> Result<Self, Error> {
        ns.run(Self::open).map_err(|e| Error::io("enter a network namespace", e))?
    }

    /// Applies all changes as one transaction; on an error nothing has changed, and the error names the first fault.
    pub fn apply(&mut self, batch: &Batch) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::new();
        let first = self.socket.next_sequence();
        let mut begin = border(BATCH_BEGIN);
        begin.set_sequence(first);
        bytes.extend_from_slice(begin.finish());
        let mut sent = Vec::with_capacity(batch.commands.len());
        for command in &batch.commands {
            let mut message = command.message.clone();
            message.or_flags(F_REQUEST);
            let sequence = self.socket.next_sequence();
            message.set_sequence(sequence);
            bytes.extend_from_slice(message.finish());
            sent.push((sequence, message));
        }
        let mut end = border(BATCH_END);
        end.set_sequence(self.socket.next_sequence());
        bytes.extend_from_slice(end.finish());

        let failures = self.socket.batch(&bytes).map_err(|e| Error::new("send a batch to nf_tables", e))?;
        let Some((sequence, mut failure)) = failures.into_iter().next() else { return Ok(()) };
        let Some(at) = sent.iter().position(|(s, _)| *s == sequence) else {
            return Err(Error::new("commit a batch to nf_tables", failure));
        };
        if let Some(culprit) = failure.offset.and_then(|offset| attribute_at(sent[at].1.finish(), offset)) {
            let said = failure.message.map(|m| format!("{m} ")).unwrap_or_default();
            failure.message = Some(format!("{said}(at \"{culprit}\")"));
        }
        // An anonymous set has no text; what fails is the rule that it belongs to.
        let text = batch.commands[at..].iter().find(|c| !c.text.is_empty()).map_or("nf_tables batch", |c| &c.text);
        Err(Error::new(text, failure))
    }

    /// All tables of the inet, ip and ip6 families.
    pub fn tables(&mut self) -> Result<Vec<Table>, Error> {
        let mut request = Message::new(batch::SUBSYS | GETTABLE, 0);
        request.raw(&[0; NFGEN]);
        let parse = |body: &[u8]| {
            let (header, rest) = body.split_at_checked(NFGEN)?;
            Some(Table::new(Family::from_number(header[0])?, wire::text(find(rest, 1)?)))
        };
        self.socket.dump(&request, parse).map_err(|e| Error::new("list tables", e))
    }

    /// The chains of one table, in the order they were made; none when there is no such table.
    pub fn chains(&mut self, table: &Table) -> Result<Vec<LiveChain>, Error> {
        let request = batch::message(GETCHAIN, 0, table.family);
        let parse = |body: &[u8]| {
            let rest = body.get(NFGEN..)?;
            if wire::text(find(rest, 1)?) != table.name {
                return None;
            }
            let hook =
                find(rest, 4).map(|h| (find(h, 1).map_or(0, wire::be32), find(h, 2).map_or(0, wire::be32) as i32));
            let drops = find(rest, 5).is_some_and(|policy| wire::be32(policy) == 0);
            let nat = find(rest, 7).is_some_and(|kind| wire::text(kind) == "nat");
            Some(LiveChain { name: wire::text(find(rest, 3)?), hook, drops, nat })
        };
        self.socket.dump(&request, parse).map_err(|e| Error::new(format!("list chains of {table}"), e))
    }

    /// The rules of one table, chain after chain, in order, with their counters; none when there is no such table.
    pub fn rules(&mut self, table: &Table) -> Result<Vec<LiveRule>, Error> {
        let mut request = batch::message(GETRULE, 0, table.family);
        request.text(1, &table.name);
        let parse = |body: &[u8]| {
            let rest = body.get(NFGEN..)?;
            if wire::text(find(rest, 1)?) != table.name {
                return None;
            }
            live_rule(rest)
        };
        match self.socket.dump(&request, parse) {
            Err(e) if e.errno == libc::ENOENT => Ok(Vec::new()),
            other => other.map_err(|e| Error::new(format!("list rules of {table}"), e)),
        }
    }

    /// Whether exactly the rules of `batch` are live in `table`: same chains, same rules, same order. Counters don't matter.
    pub fn holds(&mut self, table: &Table, batch: &Batch) -> Result<bool, Error> {
        let mut wanted: BTreeMap<&str, Vec<&batch::SentRule>> =
            batch.chains.iter().filter(|(t, _)| t == table).map(|(_, chain)| (chain.as_str(), Vec::new())).collect();
        for rule in batch.rules.iter().filter(|r| r.table == *table) {
            wanted.entry(&rule.chain).or_default().push(rule);
        }
        let chains = self.chains(table)?;
        if chains.is_empty()
            || chains.len() != wanted.len()
            || chains.iter().any(|c| !wanted.contains_key(c.name.as_str()))
        {
            return Ok(false);
        }
        let mut live: BTreeMap<String, Vec<LiveRule>> = BTreeMap::new();
        for rule in self.rules(table)? {
            live.entry(rule.chain.clone()).or_default().push(rule);
        }
        for (chain, rules) in wanted {
            let there = live.remove(chain).unwrap_or_default();
            if there.len() != rules.len() {
                return Ok(false);
            }
            for (want, have) in rules.into_iter().zip(&there) {
                if !self.same_rule(want, have)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn same_rule(&mut self, want: &batch::SentRule, have: &LiveRule) -> Result<bool, Error> {
        let (wanted, there) = (expressions(&want.exprs), expressions(&have.exprs));
        if wanted.len() != there.len() {
            return Ok(false);
        }
        for ((name, data), (live_name, live_data)) in wanted.iter().zip(&there) {
            if name != live_name {
                return Ok(false);
            }
            match name.as_str() {
                "counter" => {}
                "lookup" => {
                    let id = find(data, 4).map(wire::be32);
                    let Some((_, elements)) = want.sets.iter().find(|(set, _)| Some(*set) == id) else {
                        if !covers(data, live_data) {
                            return Ok(false);
                        }
                        continue;
                    };
                    let name = find(live_data, 1).map(wire::text).unwrap_or_default();
                    let flags = |d| find(d, 5).map_or(0, wire::be32);
                    if flags(data) != flags(live_data) || *elements != self.elements(&want.table, &name)? {
                        return Ok(false);
                    }
                }
                _ if !covers(data, live_data) => return Ok(false),
                _ => {}
            }
        }
        Ok(true)
    }

    /// What a live rule of this table is made of.
    pub fn parts(&mut self, table: &Table, rule: &LiveRule) -> Vec<Part> {
        let v6_table = match table.family {
            Family::Inet => None,
            Family::Ip => Some(false),
            Family::Ip6 => Some(true),
        };
        // A set that went in the meantime reads as an empty one.
        decode::parts(&rule.exprs, v6_table, &mut |set| self.elements(table, set).unwrap_or_default())
    }

    /// Keys and data of a set, sorted.
    fn elements(&mut self, table: &Table, set: &str) -> Result<Vec<Vec<u8>>, Error> {
        let mut request = batch::message(GETSETELEM, 0, table.family);
        request.text(1, &table.name).text(2, set);
        let parse = |body: &[u8]| {
            let list = find(body.get(NFGEN..)?, 3)?;
            let value = |element, kind| find(element, kind).and_then(|d| find(d, 1)).unwrap_or_default().to_vec();
            Some(attributes(list).map(|(_, e)| [value(e, 1), value(e, 2)].concat()).collect::<Vec<_>>())
        };
        let parts =
            self.socket.dump(&request, parse).map_err(|e| Error::new(format!("list elements of {table} {set}"), e))?;
        let mut all: Vec<_> = parts.into_iter().flatten().collect();
        all.sort();
        Ok(all)
    }
}

/// Begin or end of a batch: names the subsystem, in network order, where other messages have a resource id.
fn border(kind: u16) -> Message {
    let mut message = Message::new(kind, F_REQUEST);
    let [a, b] = (batch::SUBSYS >> 8).to_be_bytes();
    message.raw(&[0, 0, a, b]);
    message
}

fn live_rule(rest: &[u8]) -> Option<LiveRule> {
    let exprs = find(rest, 4).unwrap_or_default().to_vec();
    let counter = expressions(&exprs).into_iter().find(|(name, _)| name == "counter").map(|(_, data)| data);
    let number = |kind| counter.and_then(|c| find(c, kind)).map_or(0, wire::be64);
    Some(LiveRule {
        chain: wire::text(find(rest, 2)?),
        handle: find(rest, 3).map_or(0, wire::be64),
        packets: number(2),
        bytes: number(1),
        comment: find(rest, 7).and_then(comment),
        exprs: exprs.clone(),
    })
}

/// A comment in nft's user data: a list of (type, length, value); comments have type 0.
fn comment(mut data: &[u8]) -> Option<String> {
    while let [kind, len, rest @ ..] = data {
        let value = rest.get(..usize::from(*len))?;
        if *kind == 0 {
            return Some(wire::text(value));
        }
        data = &rest[value.len()..];
    }
    None
}

/// The expressions of a rule as (name, attributes).
fn expressions(list: &[u8]) -> Vec<(String, &[u8])> {
    attributes(list)
        .map(|(_, e)| (find(e, 1).map(wire::text).unwrap_or_default(), find(e, 2).unwrap_or_default()))
        .collect()
}

/// Whether every attribute that was sent is there with the same value. The kernel adds attributes of its own on output.
fn covers(sent: &[u8], live: &[u8]) -> bool {
    const REGISTER: u32 = 8;
    attributes(sent).all(|(kind, value)| {
        find(live, kind).is_some_and(|there| {
            // Registers 8, 12, 16, 20 come back by their old names 1 to 4.
            let same_register = || {
                let (a, b) = (wire::be32(value), wire::be32(there));
                value.len() == 4
                    && there.len() == 4
                    && a >= REGISTER
                    && (a - REGISTER).is_multiple_of(4)
                    && b == (a - REGISTER) / 4 + 1
            };
            value == there
                || same_register()
                || (value.len() > 4 && attributes(value).count() > 0 && covers(value, there))
        })
    })
}

/// The text of the attribute that starts at `offset` of a message.
fn attribute_at(message: &[u8], offset: usize) -> Option<String> {
    const NESTED: u16 = 1 << 15;
    let mut at = HEADER + NFGEN;
    while at + 4 <= message.len() {
        let length = usize::from(u16::from_ne_bytes([message[at], message[at + 1]]));
        let nested = u16::from_ne_bytes([message[at + 2], message[at + 3]]) & NESTED != 0;
        let value = message.get(at + 4..at + length)?;
        if at == offset {
            let text = wire::text(value);
            return (!text.is_empty() && text.chars().all(|c| c.is_ascii_graphic())).then_some(text);
        }
        at += if nested && offset < at + length { 4 } else { length.next_multiple_of(4) };
    }
    None
}
