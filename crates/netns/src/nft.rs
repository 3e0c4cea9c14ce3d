//! nf_tables: typed tables, chains, sets and rules, sent as one transaction; live rules and counters read back.
//!
//! A [`Batch`] collects changes and describes each of them in nft syntax, for dry runs and for errors that read
//! `add rule inet t c jump nosuch: No such file or directory (at "nosuch")`. [`Nft::apply`] makes all of it happen or nothing.

mod batch;
mod decode;
mod expr;
mod live;
mod set;

use std::fmt;
use std::net::IpAddr;

pub use batch::Batch;
pub use decode::Part;
pub use expr::{CtState, Expr, Field, Op, Pick, Rejection};
pub use live::{LiveChain, LiveRule, Nft};
pub use set::{Type, Value, Verdict};

/// Which packets a table sees.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    Ip,
    Ip6,
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Ip => 2,
            Self::Ip6 => 10,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [Self::Inet, Self::Ip, Self::Ip6].into_iter().find(|f| f.number() == number)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        })
    }
}

/// A table's identity.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Table {
    pub family: Family,
    pub name: String,
}

impl Table {
    pub fn new(family: Family, name: impl Into<String>) -> Self {
        Self { family, name: name.into() }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

/// What a base chain may do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ChainType {
    Filter,
    Nat,
    /// Routes again when the mark changed; output only.
    Route,
}

impl ChainType {
    fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Route => "route",
        }
    }
}

/// Where in the packet's way a base chain stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HookPoint {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

impl HookPoint {
    fn number(self) -> u32 {
        match self {
            Self::Prerouting => 0,
            Self::Input => 1,
            Self::Forward => 2,
            Self::Output => 3,
            Self::Postrouting => 4,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
            Self::Postrouting => "postrouting",
        }
    }
}

/// Makes a chain a base chain. The policy is accept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hook {
    pub kind: ChainType,
    pub point: HookPoint,
    /// Lower runs first; -300 raw, -150 mangle, -100 destination NAT, 0 filter, 100 source NAT.
    pub priority: i32,
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{ type {} hook {} priority {} ; }}", self.kind.name(), self.point.name(), self.priority)
    }
}

/// Transport protocols.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum L4 {
    Tcp,
    Udp,
}

impl L4 {
    fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl fmt::Display for L4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// An address block. Bits behind the prefix are kept as written and ignored by the kernel.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Net {
    pub ip: IpAddr,
    pub prefix: u8,
}

impl Net {
    pub fn new(ip: IpAddr, prefix: u8) -> Self {
        Self { ip, prefix }
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

/// A rule: matches and statements in order, and a comment that [`LiveRule`] shows again.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Rule {
    pub exprs: Vec<Expr>,
    pub comment: Option<String>,
}

impl Rule {
    pub fn new(exprs: impl Into<Vec<Expr>>) -> Self {
        Self { exprs: exprs.into(), comment: None }
    }

    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, expr) in self.exprs.iter().enumerate() {
            if i > 0 {
                f.write_str(" ")?;
            }
            expr.fmt(f)?;
        }
        match &self.comment {
            Some(comment) => write!(f, " comment \"{comment}\""),
            None => Ok(()),
        }
    }
}
