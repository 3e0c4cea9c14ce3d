//! A transaction under construction.

use std::fmt;

use super::expr::{AnonymousSet, Encoder, encode_verdict};
use super::set::{self, Type, Value, Verdict};
use super::{Family, Hook, Rule, Table};
use crate::wire::Message;

pub(super) const SUBSYS: u16 = 10 << 8;
const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const DELRULE: u16 = 8;
const NEWSET: u16 = 9;
const DELSET: u16 = 11;
const NEWSETELEM: u16 = 12;
const DELSETELEM: u16 = 14;

const F_CREATE: u16 = 0x400;
const F_APPEND: u16 = 0x800;

const SET_ANONYMOUS: u32 = 1;
const SET_CONSTANT: u32 = 2;
const SET_MAP: u32 = 8;
/// `data type` of a verdict map.
const DATA_IS_VERDICT: u32 = 0xffff_ff00;
/// Keeps element lists well below the 64 KiB that an attribute can hold.
const ELEMENTS_PER_MESSAGE: usize = 400;

/// A message and what it does, in nft syntax.
pub(super) struct Command {
    pub(super) message: Message,
    pub(super) text: String,
}

/// What a rule sent looks like, for comparison with live rules.
pub(super) struct SentRule {
    pub(super) table: Table,
    pub(super) chain: String,
    pub(super) exprs: Vec<u8>,
    /// (id in the batch, sorted keys and data of its elements)
    pub(super) sets: Vec<(u32, Vec<Vec<u8>>)>,
}

/// Changes that happen together or not at all. `Display` is the same transaction as input for `nft -f`.
#[derive(Default)]
pub struct Batch {
    pub(super) commands: Vec<Command>,
    pub(super) chains: Vec<(Table, String)>,
    pub(super) rules: Vec<SentRule>,
    sets: u32,
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Anonymous sets are part of the rule that follows them and have no text of their own.
        self.commands.iter().filter(|c| !c.text.is_empty()).try_for_each(|c| writeln!(f, "{}", c.text))
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Batch {{\n{self}}}")
    }
}

impl Batch {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    fn push(&mut self, message: Message, text: String) {
        self.commands.push(Command { message, text });
    }

    /// Nothing happens when the table exists.
    pub fn add_table(&mut self, table: &Table) -> &mut Self {
        let mut message = message(NEWTABLE, F_CREATE, table.family);
        message.text(1, &table.name).be32(2, 0);
        self.push(message, format!("add table {table}"));
        self
    }

    /// With everything in it. Fails the batch when there is no such table.
    pub fn delete_table(&mut self, table: &Table) -> &mut Self {
        let mut message = message(DELTABLE, 0, table.family);
        message.text(1, &table.name);
        self.push(message, format!("delete table {table}"));
        self
    }

    /// An empty table, whether there was one or not.
    pub fn replace_table(&mut self, table: &Table) -> &mut Self {
        self.add_table(table).delete_table(table).add_table(table)
    }

    /// Removes all rules of the table; chains and sets stay.
    pub fn flush_table(&mut self, table: &Table) -> &mut Self {
        let mut message = message(DELRULE, 0, table.family);
        message.text(1, &table.name);
        self.push(message, format!("flush table {table}"));
        self
    }

    /// A base chain with a hook, a plain chain without.
    pub fn add_chain(&mut self, table: &Table, name: &str, hook: Option<Hook>) -> &mut Self {
        let mut message = message(NEWCHAIN, F_CREATE, table.family);
        message.text(1, &table.name).text(3, name);
        let mut text = format!("add chain {table} {name}");
        if let Some(hook) = hook {
            message.nest(4, |m| {
                m.be32(1, hook.point.number()).be32(2, hook.priority as u32);
            });
            message.text(7, hook.kind.name());
            text = format!("{text} {hook}");
        }
        self.chains.push((table.clone(), name.to_owned()));
        self.push(message, text);
        self
    }

    pub fn flush_chain(&mut self, table: &Table, name: &str) -> &mut Self {
        let mut message = message(DELRULE, 0, table.family);
        message.text(1, &table.name).text(2, name);
        self.push(message, format!("flush chain {table} {name}"));
        self
    }

    /// Fails the batch while a rule or map refers to the chain.
    pub fn delete_chain(&mut self, table: &Table, name: &str) -> &mut Self {
        let mut message = message(DELCHAIN, 0, table.family);
        message.text(1, &table.name).text(3, name);
        self.push(message, format!("delete chain {table} {name}"));
        self
    }

    /// At the end of the chain.
    pub fn add_rule(&mut self, table: &Table, chain: &str, rule: &Rule) -> &mut Self {
        const EXPRESSIONS: u16 = 4;
        const USERDATA: u16 = 7;
        const ATTR_HEADER: usize = 4;
        let mut message = message(NEWRULE, F_CREATE | F_APPEND, table.family);
        message.text(1, &table.name).text(2, chain);
        let mut next = self.sets;
        let mut sets = Vec::new();
        let before = message.len();
        message.nest(EXPRESSIONS, |m| {
            let mut encoder = Encoder::new(m, &mut next, table.family == Family::Inet);
            rule.exprs.iter().for_each(|e| encoder.encode(e));
            sets = encoder.sets;
        });
        self.sets = next;
        let exprs = message.since(before + ATTR_HEADER).to_vec();
        if let Some(comment) = &rule.comment {
            // As nft stores comments: type 0, length with the final zero, text.
            let mut data = vec![0, (comment.len().min(126) + 1) as u8];
            data.extend(comment.bytes().take(126));
            data.push(0);
            message.attr(USERDATA, &data);
        }
        let elements = sets.iter().map(|s| (s.id, sent_elements(s))).collect();
        sets.iter().for_each(|set| self.add_anonymous(table, set));
        self.rules.push(SentRule { table: table.clone(), chain: chain.to_owned(), exprs, sets: elements });
        self.push(message, format!("add rule {table} {chain} {rule}"));
        self
    }

    /// By the handle that [`super::LiveRule`] carries.
    pub fn delete_rule(&mut self, table: &Table, chain: &str, handle: u64) -> &mut Self {
        let mut message = message(DELRULE, 0, table.family);
        message.text(1, &table.name).text(2, chain).attr(3, &handle.to_be_bytes());
        self.push(message, format!("delete rule {table} {chain} handle {handle}"));
        self
    }

    /// A named set of (concatenated) keys.
    pub fn add_set(&mut self, table: &Table, name: &str, key: &[Type]) -> &mut Self {
        self.sets += 1;
        let message = set_message(table, name, self.sets, 0, key, None);
        self.push(message, format!("add set {table} {name} {{ type {} ; }}", set::names(key)));
        self
    }

    pub fn add_elements(&mut self, table: &Table, name: &str, elements: &[Vec<Value>]) -> &mut Self {
        for part in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let message = elements_message(
                NEWSETELEM,
                table,
                name,
                None,
                part.iter().map(|key| (set::key_bytes(key), Data::None)),
            );
            let list = part.iter().map(|key| set::join(key)).collect::<Vec<_>>().join(", ");
            self.push(message, format!("add element {table} {name} {{ {list} }}"));
        }
        self
    }

    /// From a set or a map.
    pub fn delete_elements(&mut self, table: &Table, name: &str, keys: &[Vec<Value>]) -> &mut Self {
        for part in keys.chunks(ELEMENTS_PER_MESSAGE) {
            let message = elements_message(
                DELSETELEM,
                table,
                name,
                None,
                part.iter().map(|key| (set::key_bytes(key), Data::None)),
            );
            let list = part.iter().map(|key| set::join(key)).collect::<Vec<_>>().join(", ");
            self.push(message, format!("delete element {table} {name} {{ {list} }}"));
        }
        self
    }

    /// A named map from (concatenated) keys to verdicts, for [`super::Expr::VerdictMap`].
    pub fn add_verdict_map(&mut self, table: &Table, name: &str, key: &[Type]) -> &mut Self {
        self.sets += 1;
        let message = set_message(table, name, self.sets, SET_MAP, key, Some((DATA_IS_VERDICT, 0)));
        self.push(message, format!("add map {table} {name} {{ type {} : verdict ; }}", set::names(key)));
        self
    }

    pub fn add_verdicts(&mut self, table: &Table, name: &str, elements: &[(Vec<Value>, Verdict)]) -> &mut Self {
        for part in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let all = part.iter().map(|(key, verdict)| (set::key_bytes(key), Data::Verdict(verdict)));
            let message = elements_message(NEWSETELEM, table, name, None, all);
            let list = part.iter().map(|(key, v)| format!("{} : {v}", set::join(key))).collect::<Vec<_>>().join(", ");
            self.push(message, format!("add element {table} {name} {{ {list} }}"));
        }
        self
    }

    /// A named set or map with its elements.
    pub fn delete_set(&mut self, table: &Table, name: &str) -> &mut Self {
        let mut message = message(DELSET, 0, table.family);
        message.text(1, &table.name).text(2, name);
        self.push(message, format!("delete set {table} {name}"));
        self
    }

    fn add_anonymous(&mut self, table: &Table, set: &AnonymousSet) {
        let flags = SET_ANONYMOUS | SET_CONSTANT | if set.data.is_empty() { 0 } else { SET_MAP };
        let data = (!set.data.is_empty()).then(|| (set::type_number(&set.data), set::key_len(&set.data) as u32));
        let mut message = set_message(table, set.name(), set.id, flags, &[set.key], data);
        message.nest(9, |m| {
            m.be32(1, set.elements.len() as u32);
        });
        self.push(message, String::new());
        for part in set.elements.chunks(ELEMENTS_PER_MESSAGE) {
            let all = part.iter().map(|(key, data)| {
                let data = if data.is_empty() { Data::None } else { Data::Value(set::key_bytes(data)) };
                (set::key_bytes(&[*key]), data)
            });
            self.push(elements_message(NEWSETELEM, table, set.name(), Some(set.id), all), String::new());
        }
    }
}

/// Keys and data of a set, sorted, as they can be compared with live ones.
fn sent_elements(set: &AnonymousSet) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = set
        .elements
        .iter()
        .map(|(k, d)| [set::key_bytes(&[*k]), if d.is_empty() { Vec::new() } else { set::key_bytes(d) }].concat())
        .collect();
    all.sort();
    all
}

/// A message of nf_tables with its family header.
pub(super) fn message(kind: u16, flags: u16, family: Family) -> Message {
    let mut message = Message::new(SUBSYS | kind, flags);
    message.raw(&[family.number(), 0, 0, 0]);
    message
}

fn set_message(table: &Table, name: &str, id: u32, flags: u32, key: &[Type], data: Option<(u32, u32)>) -> Message {
    let mut message = message(NEWSET, F_CREATE, table.family);
    message.text(1, &table.name).text(2, name).be32(3, flags);
    message.be32(4, set::type_number(key)).be32(5, set::key_len(key) as u32);
    if let Some((kind, len)) = data {
        message.be32(6, kind);
        if len > 0 {
            message.be32(7, len);
        }
    }
    message.be32(10, id);
    // nft asks for the byte order of keys when it lists: 1 is the host's, 2 the network's.
    let order: u32 = if key.iter().any(|t| t.host_order()) { 1 } else { 2 };
    let [a, b, c, d] = order.to_ne_bytes();
    message.attr(13, &[0, 4, a, b, c, d]);
    message
}

enum Data<'a> {
    None,
    Value(Vec<u8>),
    Verdict(&'a Verdict),
}

fn elements_message<'a>(
    kind: u16,
    table: &Table,
    name: &str,
    id: Option<u32>,
    elements: impl Iterator<Item = (Vec<u8>, Data<'a>)>,
) -> Message {
    let mut message = message(kind, if kind == NEWSETELEM { F_CREATE } else { 0 }, table.family);
    message.text(1, &table.name).text(2, name);
    if let Some(id) = id {
        message.be32(4, id);
    }
    message.nest(3, |m| {
        for (key, data) in elements {
            m.nest(1, |m| {
                m.nest(1, |m| {
                    m.attr(1, &key);
                });
                match data {
                    Data::None => {}
                    Data::Value(bytes) => {
                        m.nest(2, |m| {
                            m.attr(1, &bytes);
                        });
                    }
                    Data::Verdict(verdict) => {
                        m.nest(2, |m| encode_verdict(m, verdict));
                    }
                }
            });
        }
    });
    message
}
