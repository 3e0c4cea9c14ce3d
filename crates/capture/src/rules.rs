//! The rules of a [`Config`], as data, in the order that binds (iptables evaluates in order, and so does nftables).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::{Cidr, Config, Dns, Groups, Mode, Owner, Ports, Selection};
use crate::ebpf::SLOTS_V6;

/// The address that the proxy binds to when it calls an application behind it: that traffic is never captured again.
pub(crate) const PASSTHROUGH_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6));
/// Its IPv6 form, which must first be added to `lo`.
pub(crate) const PASSTHROUGH_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));
const LOOPBACK_V6: Cidr = Cidr::host(IpAddr::V6(Ipv6Addr::LOCALHOST));
/// Marks the proxy's packets to applications over loopback.
const OUTBOUND_MARK: u32 = 1338;
const DNS: u16 = 53;
/// A rule with more owner matches than this is refused by iptables-nft ("cannot handle more arguments").
const MAX_GROUPS_IN_A_RULE: usize = 40;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Table {
    Nat,
    Mangle,
    Raw,
}

impl Table {
    pub(crate) const ALL: [Self; 3] = [Self::Nat, Self::Mangle, Self::Raw];

    pub fn name(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Mangle => "mangle",
            Self::Raw => "raw",
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Chain {
    Prerouting,
    OutputHook,
    Inbound,
    Redirect,
    InRedirect,
    Output,
    /// Outbound rules for the groups that are captured, when they are too many for one rule.
    OutputGroups,
    OutputDns,
    Divert,
    Tproxy,
    Drop,
}

impl Chain {
    pub fn is_hook(self) -> bool {
        matches!(self, Self::Prerouting | Self::OutputHook)
    }

    pub fn iptables_name(self) -> &'static str {
        match self {
            Self::Prerouting => "PREROUTING",
            Self::OutputHook => "OUTPUT",
            Self::Inbound => "ISTIO_INBOUND",
            Self::Redirect => "ISTIO_REDIRECT",
            Self::InRedirect => "ISTIO_IN_REDIRECT",
            Self::Output => "ISTIO_OUTPUT",
            Self::OutputGroups => "ISTIO_OUTPUT_GROUPS",
            Self::OutputDns => "ISTIO_OUTPUT_DNS",
            Self::Divert => "ISTIO_DIVERT",
            Self::Tproxy => "ISTIO_TPROXY",
            Self::Drop => "ISTIO_DROP",
        }
    }

    pub fn nft_name(self) -> &'static str {
        match self {
            Self::Prerouting => "prerouting",
            Self::OutputHook => "output",
            Self::Inbound => "istio-inbound",
            Self::Redirect => "istio-redirect",
            Self::InRedirect => "istio-in-redirect",
            Self::Output => "istio-output",
            Self::OutputGroups => "istio-output-groups",
            Self::OutputDns => "istio-output-dns",
            Self::Divert => "istio-divert",
            Self::Tproxy => "istio-tproxy",
            Self::Drop => "istio-drop",
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum L4 {
    Tcp,
    Udp,
}

impl L4 {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// One condition. Lists in `Gid` and `Dport` mean any of them (none of them when negated).
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Match {
    In(String),
    Out(String),
    Src(Cidr),
    Dst(Cidr),
    NotDst(Cidr),
    Proto(L4),
    Dport(Ports),
    NotDport(Vec<u16>),
    Sport(u16),
    Uid(Owner),
    NotUid(Owner),
    Gid(Owner),
    NotGid(Vec<Owner>),
    Mark(u32),
    NotMark(u32),
    ConnMark(u32),
    Invalid,
    RelatedEstablished,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Target {
    Return,
    Accept,
    Drop,
    Jump(Chain),
    /// Does not come back to the rule after it.
    Goto(Chain),
    Redirect(u16),
    SetMark(u32),
    SaveMark,
    RestoreMark,
    /// Mark and port.
    Tproxy(u32, u16),
    Zone(u16),
    /// Connection tracking does not see it.
    NoTrack,
}

/// The address families that a rule is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Families {
    Both,
    V4,
    V6,
}

impl Families {
    pub fn include(self, v6: bool) -> bool {
        match self {
            Self::Both => true,
            Self::V4 => !v6,
            Self::V6 => v6,
        }
    }
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rule {
    pub families: Families,
    pub table: Table,
    pub chain: Chain,
    /// Inserted before the rule with this index (from 0) of what stands there by then; else at the end.
    pub insert: Option<usize>,
    pub matches: Vec<Match>,
    pub target: Target,
}

/// The rules in the order of their making.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RuleSet {
    pub rules: Vec<Rule>,
    pub ipv6: bool,
}

impl RuleSet {
    /// The rules of one table for one family, or of both in one list, in the order of their evaluation within each chain.
    pub(crate) fn evaluated(&self, table: Table, v6: Option<bool>) -> Vec<&Rule> {
        let mut chains: Vec<(Chain, Vec<&Rule>)> = Vec::new();
        for rule in self.rules.iter().filter(|r| r.table == table && v6.is_none_or(|v6| r.families.include(v6))) {
            let at = chains.iter().position(|(c, _)| *c == rule.chain).unwrap_or_else(|| {
                chains.push((rule.chain, Vec::new()));
                chains.len() - 1
            });
            let list = &mut chains[at].1;
            // Indexes behind the end append.
            let index = rule.insert.unwrap_or(list.len()).min(list.len());
            list.insert(index, rule);
        }
        chains.into_iter().flat_map(|(_, rules)| rules).collect()
    }

    /// The chains that hold rules, in the order of their first rule.
    pub(crate) fn chains(&self, table: Table, v6: Option<bool>) -> Vec<Chain> {
        let mut chains = Vec::new();
        for rule in self.rules.iter().filter(|r| r.table == table && v6.is_none_or(|v6| r.families.include(v6))) {
            if !chains.contains(&rule.chain) {
                chains.push(rule.chain);
            }
        }
        chains
    }
}

/// Builds the rules. Pure: same configuration, same rules.
pub fn rules(config: &Config) -> RuleSet {
    let mut builder = Builder { config, out: RuleSet { rules: Vec::new(), ipv6: config.ipv6 } };
    builder.build();
    builder.out
}

struct Builder<'a> {
    config: &'a Config,
    out: RuleSet,
}

impl Builder<'_> {
    fn push(&mut self, rule: Rule) {
        if self.config.ipv6 || rule.families != Families::V6 {
            self.out.rules.push(rule);
        }
    }

    fn append(&mut self, table: Table, chain: Chain, matches: impl Into<Vec<Match>>, target: Target) {
        let matches = matches.into();
        self.push(Rule { families: families(&matches), table, chain, insert: None, matches, target });
    }

    fn insert(&mut self, table: Table, chain: Chain, index: usize, matches: impl Into<Vec<Match>>, target: Target) {
        let matches = matches.into();
        self.push(Rule { families: families(&matches), table, chain, insert: Some(index), matches, target });
    }

    /// The same rule for each family with that family's address.
    fn for_both(&mut self, v4: Cidr, v6: Cidr, add: impl Fn(&mut Self, Cidr)) {
        add(self, v4);
        add(self, v6);
    }

    /// The chain that the later outbound rules stand in.
    fn outbound_chain(&self) -> Chain {
        match &self.config.groups {
            Groups::Only(groups) if groups.len() > MAX_GROUPS_IN_A_RULE => Chain::OutputGroups,
            _ => Chain::Output,
        }
    }

    fn build(&mut self) {
        let config = self.config;
        for name in &config.exclude_interfaces {
            for table in [Table::Nat, Table::Mangle] {
                if table == Table::Nat || config.mode == Mode::Tproxy {
                    self.append(table, Chain::Prerouting, [Match::In(name.clone())], Target::Return);
                    self.append(table, Chain::OutputHook, [Match::Out(name.clone())], Target::Return);
                }
            }
        }
        for name in &config.virt_interfaces {
            self.insert(Table::Nat, Chain::Prerouting, 0, [Match::In(name.clone())], Target::Return);
        }
        if config.drop_invalid {
            self.append(Table::Mangle, Chain::Prerouting, [Match::Invalid], Target::Jump(Chain::Drop));
            self.append(Table::Mangle, Chain::Drop, [], Target::Drop);
        }
        // Where programs lead outbound connections, nat has nothing to do but for inbound ones and virtual machines.
        let nat_inbound = !config.by_sockets
            || (config.mode == Mode::Redirect && !config.inbound_by_programs && !config.inbound_ports.is_none());
        let tcp = Match::Proto(L4::Tcp);
        if nat_inbound {
            let tunnel = [tcp.clone(), Match::Dport(config.tunnel_port.into())];
            self.append(Table::Nat, Chain::Inbound, tunnel, Target::Return);
        }
        if !config.by_sockets || !config.virt_interfaces.is_empty() {
            self.append(Table::Nat, Chain::Redirect, [tcp.clone()], Target::Redirect(config.proxy_port));
        }
        if nat_inbound {
            self.append(Table::Nat, Chain::InRedirect, [tcp], Target::Redirect(config.inbound_port));
        }
        self.inbound();
        self.outbound();
        if config.mode == Mode::Tproxy {
            self.tproxy_marks();
        }
    }

    fn inbound(&mut self) {
        let config = self.config;
        if config.inbound_ports.is_none() || config.inbound_by_programs {
            return;
        }
        let tcp = Match::Proto(L4::Tcp);
        let table = match config.mode {
            Mode::Redirect => Table::Nat,
            Mode::Tproxy => Table::Mangle,
        };
        if config.mode == Mode::Tproxy {
            self.append(table, Chain::Divert, [], Target::SetMark(config.tproxy_mark));
            self.append(table, Chain::Divert, [], Target::Accept);
            self.for_both(config.loopback_v4, LOOPBACK_V6, |b, loopback| {
                let matches = [Match::NotDst(loopback), Match::Proto(L4::Tcp)];
                b.append(table, Chain::Tproxy, matches, Target::Tproxy(config.tproxy_mark, config.inbound_port));
            });
        }
        self.append(table, Chain::Prerouting, [tcp.clone()], Target::Jump(Chain::Inbound));
        let captured: Vec<Vec<Match>> = match &config.inbound_ports {
            Selection::All => {
                for port in &config.inbound_exclude {
                    self.append(table, Chain::Inbound, [tcp.clone(), Match::Dport(*port)], Target::Return);
                }
                vec![vec![tcp]]
            }
            Selection::Only(ports) => ports.iter().map(|port| vec![tcp.clone(), Match::Dport(*port)]).collect(),
        };
        for matches in captured {
            match config.mode {
                Mode::Redirect => self.append(table, Chain::Inbound, matches, Target::Jump(Chain::InRedirect)),
                Mode::Tproxy => {
                    // Packets of connections that a socket here already has need no second look.
                    let mut known = matches.clone();
                    known.push(Match::RelatedEstablished);
                    self.append(table, Chain::Inbound, known, Target::Jump(Chain::Divert));
                    self.append(table, Chain::Inbound, matches, Target::Jump(Chain::Tproxy));
                }
            }
        }
    }

    fn outbound(&mut self) {
        let config = self.config;
        let (nat, output) = (Table::Nat, Chain::Output);
        let tcp = Match::Proto(L4::Tcp);
        let lo = || Match::Out("lo".to_owned());
        let dns = config.dns != Dns::Off;
        if config.by_sockets {
            self.by_sockets();
            return;
        }
        self.append(nat, Chain::OutputHook, [], Target::Jump(output));
        for port in &config.outbound_exclude_ports {
            self.append(nat, output, [tcp.clone(), Match::Dport(*port)], Target::Return);
            self.append(nat, output, [Match::Proto(L4::Udp), Match::Dport(*port)], Target::Return);
        }
        self.for_both(Cidr::host(PASSTHROUGH_V4), Cidr::host(PASSTHROUGH_V6), |b, from| {
            b.append(nat, output, [lo(), Match::Src(from)], Target::Return);
        });

        let owners: Vec<(Match, Match, bool)> =
            (config.proxy_uids.iter().map(|u| (Match::Uid(u.clone()), Match::NotUid(u.clone()), dns)))
                .chain(config.proxy_gids.iter().map(|g| (Match::Gid(g.clone()), Match::NotGid(vec![g.clone()]), false)))
                .collect();
        // An application may want its own loopback traffic captured: then it says so with a loopback block in -i.
        let captures_loopback = match &config.outbound_cidrs {
            Selection::All => false,
            Selection::Only(list) => list.iter().any(|cidr| cidr.ip.is_loopback()),
        };
        for (owner, others, spare_dns) in owners {
            // The proxy calls its own application by the pod's address: back in through the inbound listener.
            let ports = if spare_dns { vec![DNS, config.tunnel_port] } else { vec![config.tunnel_port] };
            self.for_both(config.loopback_v4, LOOPBACK_V6, |b, loopback| {
                let matches =
                    [lo(), Match::NotDst(loopback), tcp.clone(), Match::NotDport(ports.clone()), owner.clone()];
                b.append(nat, output, matches, Target::Jump(Chain::InRedirect));
            });
            if !captures_loopback {
                let matches =
                    if dns { vec![lo(), tcp.clone(), Match::NotDport(vec![DNS]), others] } else { vec![lo(), others] };
                self.append(nat, output, matches, Target::Return);
            }
            self.append(nat, output, [owner], Target::Return);
        }
        match &config.groups {
            Groups::AllExcept(groups) => {
                for group in groups {
                    self.append(nat, output, [Match::Gid(group.clone())], Target::Return);
                }
            }
            // DIFFERS: Istio makes one rule whatever their number, which iptables refuses when they are many.
            Groups::Only(groups) if groups.len() > MAX_GROUPS_IN_A_RULE => {
                for group in groups {
                    self.append(nat, output, [Match::Gid(group.clone())], Target::Goto(Chain::OutputGroups));
                }
            }
            Groups::Only(groups) if !groups.is_empty() => {
                self.append(nat, output, [Match::NotGid(groups.clone())], Target::Return);
            }
            // The list was set and is empty: nobody's traffic is captured.
            Groups::Only(_) => self.append(nat, output, [], Target::Return),
        }
        self.dns();
        self.destinations();
    }

    /// Programs decide about outbound connections. What they lead to the proxy needs no tracking, which would cost more than they do;
    /// where no rule of ours tracks anything, there is none to be kept from.
    fn by_sockets(&mut self) {
        let config = self.config;
        let (raw, output) = (Table::Raw, Chain::Output);
        let hop = |port: Match| [Match::Out("lo".to_owned()), Match::Proto(L4::Tcp), port];
        if !self.out.rules.is_empty() || !config.virt_interfaces.is_empty() || config.mode == Mode::Tproxy {
            self.append(raw, Chain::OutputHook, [], Target::Jump(output));
            self.append(raw, output, hop(Match::Dport(config.proxy_port.into())), Target::NoTrack);
            self.append(raw, output, hop(Match::Sport(config.proxy_port)), Target::NoTrack);
        }
        // Nor can others reach the addresses that the programs make, as long as no program drops that, too.
        if config.ipv6 && !config.inbound_by_programs {
            let slots = Match::Dst(SLOTS_V6);
            self.append(raw, Chain::Prerouting, [Match::In("lo".to_owned()), slots.clone()], Target::Return);
            self.append(raw, Chain::Prerouting, [slots], Target::Drop);
        }
        match &config.outbound_cidrs {
            Selection::All => self.virtual_machines(None),
            Selection::Only(cidrs) => by_family(cidrs).for_each(|cidr| self.virtual_machines(Some(cidr))),
        }
    }

    /// What remains of the outbound rules once the sender is known to be captured: by destination.
    fn destinations(&mut self) {
        let config = self.config;
        let (nat, output) = (Table::Nat, self.outbound_chain());
        self.for_both(config.loopback_v4, LOOPBACK_V6, |b, loopback| {
            b.append(nat, output, [Match::Dst(loopback)], Target::Return);
        });
        for cidr in by_family(&config.outbound_exclude_cidrs) {
            self.append(nat, output, [Match::Dst(cidr)], Target::Return);
        }
        for port in &config.outbound_ports {
            self.append(nat, output, [Match::Proto(L4::Tcp), Match::Dport(*port)], Target::Jump(Chain::Redirect));
        }
        match &config.outbound_cidrs {
            Selection::All => {
                self.append(nat, output, [], Target::Jump(Chain::Redirect));
                self.virtual_machines(None);
            }
            Selection::Only(cidrs) => {
                for cidr in by_family(cidrs) {
                    self.virtual_machines(Some(cidr));
                    self.append(nat, output, [Match::Dst(cidr)], Target::Jump(Chain::Redirect));
                }
            }
        }
    }

    /// What comes in from a virtual machine goes where outbound traffic goes.
    fn virtual_machines(&mut self, to: Option<Cidr>) {
        for name in &self.config.virt_interfaces {
            let matches: Vec<Match> = [Match::In(name.clone())].into_iter().chain(to.map(Match::Dst)).collect();
            self.insert(Table::Nat, Chain::Prerouting, 0, matches, Target::Jump(Chain::Redirect));
        }
    }

    /// Queries go to the agent; its own queries and answers get connection tracking zones of their own, so that two queries
    /// from one port (application to agent, agent to server) are not taken for one connection.
    fn dns(&mut self) {
        let config = self.config;
        let (nat, raw, chain) = (Table::Nat, Table::Raw, Chain::OutputDns);
        let (udp, tcp) = (Match::Proto(L4::Udp), Match::Proto(L4::Tcp));
        // One empty condition for all servers, else one per server.
        let to: Vec<Option<Cidr>> = match &config.dns {
            Dns::Off => return,
            Dns::All => vec![None],
            Dns::Servers { v4, v6 } => v4.iter().chain(v6).map(|ip| Some(Cidr::host(*ip))).collect(),
        };
        // The family without servers needs no detour; as the reference, nothing is tracked apart for it either, except the proxy's own.
        let (has_v4, has_v6) = match &config.dns {
            Dns::Servers { v4, v6 } => (!v4.is_empty(), !v6.is_empty()),
            Dns::All | Dns::Off => (true, true),
        };
        let families = match (has_v4, has_v6 && config.ipv6) {
            (true, true) => Families::Both,
            (false, _) => Families::V6,
            (true, false) => Families::V4,
        };
        let outbound = self.outbound_chain();
        self.push(Rule {
            families,
            table: nat,
            chain: outbound,
            insert: None,
            matches: Vec::new(),
            target: Target::Jump(chain),
        });
        for l4 in [tcp, udp.clone()] {
            for server in &to {
                let matches = [l4.clone(), Match::Dport(DNS.into())]
                    .into_iter()
                    .chain(server.map(Match::Dst))
                    .collect::<Vec<_>>();
                self.append(nat, chain, matches, Target::Redirect(config.dns_port));
            }
        }
        self.append(raw, Chain::OutputHook, [], Target::Jump(chain));
        let owners = config
            .proxy_uids
            .iter()
            .map(|u| Match::Uid(u.clone()))
            .chain(config.proxy_gids.iter().map(|g| Match::Gid(g.clone())));
        for owner in owners.collect::<Vec<_>>() {
            self.append(raw, chain, [udp.clone(), Match::Dport(DNS.into()), owner.clone()], Target::Zone(1));
            self.append(raw, chain, [udp.clone(), Match::Sport(config.dns_port), owner], Target::Zone(2));
        }
        let target = Target::Jump(Chain::Inbound);
        self.push(Rule { families, table: raw, chain: Chain::Prerouting, insert: None, matches: Vec::new(), target });
        for server in &to {
            let queries =
                [udp.clone(), Match::Dport(DNS.into())].into_iter().chain(server.map(Match::Dst)).collect::<Vec<_>>();
            self.append(raw, chain, queries, Target::Zone(2));
            let answers =
                [udp.clone(), Match::Sport(DNS)].into_iter().chain(server.map(Match::Src)).collect::<Vec<_>>();
            self.append(raw, Chain::Inbound, answers, Target::Zone(1));
        }
    }

    /// TPROXY keeps the client's address, so answers and the proxy's own calls are told apart by marks.
    fn tproxy_marks(&mut self) {
        let config = self.config;
        let (table, mark) = (Table::Mangle, config.tproxy_mark);
        let tcp = Match::Proto(L4::Tcp);
        let lo_out = || Match::Out("lo".to_owned());
        let lo_in = || Match::In("lo".to_owned());
        self.append(table, Chain::Prerouting, [tcp.clone(), Match::Mark(mark)], Target::SaveMark);
        self.append(table, Chain::OutputHook, [tcp.clone(), lo_out(), Match::Mark(mark)], Target::Return);
        let owners = config
            .proxy_uids
            .iter()
            .map(|u| Match::Uid(u.clone()))
            .chain(config.proxy_gids.iter().map(|g| Match::Gid(g.clone())));
        for owner in owners.collect::<Vec<_>>() {
            self.for_both(config.loopback_v4, LOOPBACK_V6, |b, loopback| {
                let matches = [Match::NotDst(loopback), Match::Proto(L4::Tcp), lo_out(), owner.clone()];
                b.append(table, Chain::OutputHook, matches, Target::SetMark(OUTBOUND_MARK));
            });
        }
        self.append(table, Chain::OutputHook, [tcp.clone(), Match::ConnMark(mark)], Target::RestoreMark);
        // Also without -b, when nothing jumps to that chain: as the reference.
        self.insert(table, Chain::Inbound, 0, [tcp.clone(), Match::Mark(mark)], Target::Return);
        self.for_both(Cidr::host(PASSTHROUGH_V4), Cidr::host(PASSTHROUGH_V6), |b, from| {
            b.insert(table, Chain::Inbound, 1, [Match::Proto(L4::Tcp), Match::Src(from), lo_in()], Target::Return);
        });
        self.insert(table, Chain::Inbound, 2, [tcp, lo_in(), Match::NotMark(OUTBOUND_MARK)], Target::Return);
    }
}

fn families(matches: &[Match]) -> Families {
    matches
        .iter()
        .find_map(|m| match m {
            Match::Src(cidr) | Match::Dst(cidr) | Match::NotDst(cidr) => {
                Some(if cidr.is_ipv6() { Families::V6 } else { Families::V4 })
            }
            _ => None,
        })
        .unwrap_or(Families::Both)
}

/// IPv4 first, as the reference lists them.
fn by_family(cidrs: &[Cidr]) -> impl Iterator<Item = Cidr> {
    let (v6, v4): (Vec<Cidr>, Vec<Cidr>) = cidrs.iter().partition(|c| c.is_ipv6());
    v4.into_iter().chain(v6)
}
