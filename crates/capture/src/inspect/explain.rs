//! The way of one new connection's first packet through the live rules. Pure: rules and packet in, steps and end out.

use std::net::{IpAddr, SocketAddr};

use netns::nft::Net;

use super::live::{Action, At, Chain, Condition, Rule, Table, What, is_our_chain};
use crate::ebpf;
use crate::rules::{L4, PASSTHROUGH_V4, PASSTHROUGH_V6};

/// Chains within chains; the kernel allows 16.
const MAX_DEPTH: usize = 16;

/// The first packet of a connection, or a datagram.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) l4: L4,
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    /// User and group of the socket that sends it; none when it comes from outside.
    pub(crate) owner: Option<(u32, u32)>,
    /// By which interface it comes or leaves.
    pub(crate) interface: String,
    pub(crate) mark: u32,
}

/// A rule that the packet met.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Step {
    /// Table with its back end, or the eBPF programs.
    pub(crate) table: String,
    pub(crate) chain: String,
    /// From 1, within the chain.
    pub(crate) number: usize,
    pub(crate) rule: String,
    /// Packets counted there so far.
    pub(crate) packets: u64,
    pub(crate) depth: usize,
    /// Made by this program or by Istio.
    pub(crate) ours: bool,
    /// The rule has a part that this program cannot decide; it was taken not to match.
    pub(crate) uncertain: bool,
}

/// Where the packet ends.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum End {
    /// Where it was going.
    Unchanged,
    /// At a port of this pod.
    Led {
        port: u16,
        to: Destination,
    },
    Dropped,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Destination {
    Outbound,
    Inbound,
    Agent,
    /// By a rule of somebody else.
    Other,
}

#[derive(Clone, Debug)]
pub(crate) struct Trace {
    pub(crate) steps: Vec<Step>,
    pub(crate) end: End,
}

enum Flow {
    Goes,
    Accepted,
    Dropped,
    Redirected(u16, Destination),
}

struct Walk<'a> {
    tables: &'a [Table],
    packet: Packet,
    steps: Vec<Step>,
    tproxy: Option<u16>,
    /// The packet is matched in the hook where it comes in.
    incoming: bool,
}

/// Follows the packet. `local`: the addresses of this namespace. `programs`: what eBPF does when connections are made, if it does.
pub(crate) fn follow(tables: &[Table], programs: Option<&ebpf::Live>, local: &[IpAddr], packet: &Packet) -> Trace {
    let mut walk =
        Walk { tables, packet: packet.clone(), steps: Vec::new(), tproxy: None, incoming: packet.owner.is_none() };
    let mut led = None;
    if let (Some(live), Some((uid, gid))) = (programs, packet.owner) {
        let passthrough = [PASSTHROUGH_V4, PASSTHROUGH_V6].contains(&packet.from.ip().to_canonical());
        let who = ebpf::Who { uid, gid, passthrough };
        let (port, reason) = live.tables.decide(who, packet.l4 == L4::Udp, packet.to);
        walk.steps.push(program_step(live, reason));
        if let Some(port) = port {
            let destination = match reason {
                1 => Destination::Inbound,
                5 => Destination::Agent,
                _ => Destination::Outbound,
            };
            led = Some((port, destination));
            let v6 = walk.packet.to.ip().to_canonical().is_ipv6();
            let ip = match destination {
                Destination::Agent => ebpf::loopback(v6),
                _ => ebpf::first_slot(v6),
            };
            walk.packet.from.set_ip(ebpf::loopback(v6));
            walk.packet.to = SocketAddr::new(ip, port);
            walk.packet.interface = "lo".into();
        }
    }
    if let (Some(live), None, L4::Tcp) = (programs, packet.owner, packet.l4)
        && live.interfaces.contains(&packet.interface)
    {
        let (port, reason) = live.tables.decide_inbound(packet.to);
        walk.steps.push(program_step(live, reason));
        led = port.map(|port| (port, Destination::Inbound));
    }
    let is_local = |ip: IpAddr| ip.is_loopback() || local.contains(&ip) || ip == ebpf::first_slot(true);
    let mut end = match walk.hook(if walk.incoming { At::Prerouting } else { At::Output }, false) {
        Some(end) => end,
        // What stays in the pod comes in again by lo. Connections are translated once, so nat is over.
        None if !walk.incoming && (is_local(walk.packet.to.ip())) => {
            walk.incoming = true;
            walk.packet.interface = "lo".into();
            walk.hook(At::Prerouting, true).unwrap_or(End::Unchanged)
        }
        None => End::Unchanged,
    };
    if let (End::Unchanged, Some(port)) = (&end, walk.tproxy) {
        end = End::Led { port, to: Destination::Inbound };
    }
    if let (End::Unchanged, Some((port, to))) = (&end, led) {
        end = End::Led { port, to };
    }
    Trace { steps: walk.steps, end }
}

fn program_step(live: &ebpf::Live, reason: usize) -> Step {
    Step {
        table: "eBPF programs".into(),
        chain: ebpf::chain(reason).into(),
        number: reason + 1,
        rule: ebpf::REASONS[reason].into(),
        packets: live.counters.get(reason).copied().unwrap_or(0),
        depth: 0,
        ours: true,
        uncertain: false,
    }
}

impl Walk<'_> {
    /// All base chains of one hook, in the order of their priorities.
    fn hook(&mut self, at: At, without_nat: bool) -> Option<End> {
        let v6 = self.packet.to.ip().to_canonical().is_ipv6();
        let tables = self.tables;
        let mut chains: Vec<(i32, &Table, &Chain)> = Vec::new();
        for table in tables.iter().filter(|t| t.v6.is_none_or(|of| of == v6) && !(without_nat && t.nat)) {
            let of_hook = |chain: &&Chain| matches!(chain.hook, Some((hook, _)) if hook == at);
            chains.extend(table.chains.iter().filter(of_hook).map(|c| (c.hook.map_or(0, |(_, p)| p), table, c)));
        }
        chains.sort_by_key(|(priority, ..)| *priority);
        let mut redirected = None;
        for (_, table, chain) in chains {
            if table.nat && redirected.is_some() {
                continue;
            }
            match self.chain(table, chain, 0) {
                Flow::Dropped => return Some(End::Dropped),
                Flow::Redirected(port, to) => redirected = Some(End::Led { port, to }),
                Flow::Goes if chain.drops => return Some(End::Dropped),
                Flow::Goes | Flow::Accepted => {}
            }
        }
        redirected
    }

    fn chain(&mut self, table: &Table, chain: &Chain, depth: usize) -> Flow {
        for (rule, number) in chain.rules.iter().zip(1..) {
            let matched = self.matches(rule);
            if matched == Some(false) {
                continue;
            }
            self.steps.push(Step {
                table: table.title(),
                chain: chain.name.clone(),
                number,
                rule: rule.to_string(),
                packets: rule.packets,
                depth,
                ours: table.is_ours()
                    && (is_our_chain(&chain.name) || leads_to_us(rule) || table.name.starts_with("istio-proxy-")),
                uncertain: matched.is_none(),
            });
            if matched.is_none() {
                continue;
            }
            for action in &rule.actions {
                match action {
                    Action::Return => return Flow::Goes,
                    Action::Accept => return Flow::Accepted,
                    Action::Drop => return Flow::Dropped,
                    Action::Redirect(port) => return Flow::Redirected(*port, destination(&chain.name)),
                    Action::SetMark(mark) => self.packet.mark = *mark,
                    Action::Tproxy(port, mark) => {
                        self.tproxy = Some(*port);
                        self.packet.mark = mark.unwrap_or(self.packet.mark);
                        // The iptables target ends the table; natively `accept` follows.
                        if mark.is_some() {
                            return Flow::Accepted;
                        }
                    }
                    Action::Jump(name) | Action::Goto(name) => {
                        let Some(next) = table.chain(name).filter(|_| depth < MAX_DEPTH) else { continue };
                        match self.chain(table, next, depth + 1) {
                            Flow::Goes if matches!(action, Action::Goto(_)) => return Flow::Goes,
                            Flow::Goes => {}
                            done => return done,
                        }
                    }
                    Action::Nothing
                    | Action::NoTrack
                    | Action::SaveMark
                    | Action::RestoreMark
                    | Action::Zone(_)
                    | Action::Other(_) => {}
                }
            }
        }
        Flow::Goes
    }

    /// `None`: a part of the rule is unknown here, and the rest matches.
    fn matches(&self, rule: &Rule) -> Option<bool> {
        let mut certain = !rule.actions.iter().any(|action| matches!(action, Action::Other(_)));
        for condition in &rule.conditions {
            match self.holds(condition) {
                Some(false) => return Some(false),
                Some(true) => {}
                None => certain = false,
            }
        }
        certain.then_some(true)
    }

    fn holds(&self, condition: &Condition) -> Option<bool> {
        let packet = &self.packet;
        let interface = |name: &str| match name.strip_suffix('*') {
            Some(start) => packet.interface.starts_with(start),
            None => packet.interface == name,
        };
        let owner = |ids: &[u32], of: fn((u32, u32)) -> u32| packet.owner.map(|owner| ids.contains(&of(owner)));
        let holds = match &condition.what {
            What::In(name) => self.incoming && interface(name),
            What::Out(name) => !self.incoming && interface(name),
            What::Src(net) => covers(*net, packet.from.ip()),
            What::Dst(net) => covers(*net, packet.to.ip()),
            What::Ipv6(v6) => packet.to.ip().is_ipv6() == *v6,
            What::Proto(l4) => packet.l4 == *l4,
            What::Dport(ports) => ports.iter().any(|ports| ports.contains(packet.to.port())),
            What::Sport(ports) => ports.iter().any(|ports| ports.contains(packet.from.port())),
            // A packet without a socket has no owner, not even another one.
            What::Uid(ids) => return Some(owner(ids, |o| o.0).is_some_and(|is| is != condition.not)),
            What::Gid(ids) => return Some(owner(ids, |o| o.1).is_some_and(|is| is != condition.not)),
            What::Mark(mark) => packet.mark == *mark,
            // The connection is new, so it has no mark yet.
            What::ConnMark(mark) => *mark == 0,
            What::Known | What::Invalid => false,
            What::Other(_) => return None,
        };
        Some(holds != condition.not)
    }
}

fn leads_to_us(rule: &Rule) -> bool {
    rule.actions.iter().any(|a| matches!(a, Action::Jump(name) | Action::Goto(name) if is_our_chain(name)))
}

fn destination(chain: &str) -> Destination {
    match chain {
        "ISTIO_REDIRECT" | "istio-redirect" => Destination::Outbound,
        "ISTIO_IN_REDIRECT" | "istio-in-redirect" => Destination::Inbound,
        "ISTIO_OUTPUT_DNS" | "istio-output-dns" => Destination::Agent,
        _ => Destination::Other,
    }
}

fn covers(net: Net, ip: IpAddr) -> bool {
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => (u128::from(u32::from(ip)) << 96, 32),
        IpAddr::V6(ip) => (u128::from(ip), 128),
    };
    let ((a, length), (b, other)) = (bits(net.ip), bits(ip.to_canonical()));
    let mask = u128::MAX.checked_shl(128 - u32::from(net.prefix)).unwrap_or(0);
    length == other && a & mask == b & mask
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unchanged => f.write_str("goes where it was going; no rule leads it elsewhere"),
            Self::Dropped => f.write_str("is dropped"),
            Self::Led { port, to } => write!(
                f,
                "ends at port {port} of this pod: {}",
                match to {
                    Destination::Outbound => "the proxy, as an outbound connection",
                    Destination::Inbound => "the proxy, as an inbound connection",
                    Destination::Agent => "the agent's name server",
                    Destination::Other => "by a rule that is not ours",
                }
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::live::Source;
    use super::*;
    use crate::iptables::Backend;

    fn tables(config: &crate::Config, more: &str) -> Vec<Table> {
        let text = crate::iptables::saved_text(&crate::rules(config), false) + more;
        super::super::saved::tables(&text, Source::Iptables(Backend::Nft), false)
    }

    fn packet(owner: Option<u32>, l4: L4, to: &str, interface: &str) -> Packet {
        Packet {
            l4,
            from: "10.244.0.7:40000".parse().expect("address"),
            to: to.parse().expect("address"),
            owner: owner.map(|id| (id, id)),
            interface: interface.into(),
            mark: 0,
        }
    }

    fn config(mode: crate::Mode) -> crate::Config {
        crate::Config {
            mode,
            inbound_ports: crate::Selection::All,
            inbound_exclude: vec![15020.into()],
            outbound_cidrs: crate::Selection::All,
            dns: crate::Dns::All,
            ..crate::Config::default()
        }
    }

    #[track_caller]
    fn check(tables: &[Table], packet: &Packet, last: &str, end: End) {
        let local = ["10.244.0.7".parse().expect("address")];
        let trace = follow(tables, None, &local, packet);
        assert_eq!(trace.end, end, "{:#?}", trace.steps);
        let step = trace.steps.last().map(|s| format!("{} {}", s.chain, s.rule)).unwrap_or_default();
        assert!(step.starts_with(last), "{step}");
    }

    #[test]
    fn packets_end_where_the_rules_lead_them() {
        let tables = tables(&config(crate::Mode::Redirect), "");
        let led = |port, to| End::Led { port, to };
        let app = |to: &str| packet(Some(1000), L4::Tcp, to, "eth0");
        check(&tables, &app("192.0.2.1:80"), "ISTIO_REDIRECT ", led(15001, Destination::Outbound));
        let proxy = packet(Some(1337), L4::Tcp, "192.0.2.1:80", "eth0");
        check(&tables, &proxy, "ISTIO_OUTPUT user 1337: back", End::Unchanged);
        let own = packet(Some(1337), L4::Tcp, "10.244.0.7:80", "lo");
        check(&tables, &own, "ISTIO_IN_REDIRECT ", led(15006, Destination::Inbound));
        let query = packet(Some(1000), L4::Udp, "192.0.2.1:53", "eth0");
        check(&tables, &query, "ISTIO_OUTPUT_DNS ", led(15053, Destination::Agent));
        let outside = |to: &str| packet(None, L4::Tcp, to, "eth0");
        check(&tables, &outside("10.244.0.7:80"), "ISTIO_IN_REDIRECT ", led(15006, Destination::Inbound));
        check(&tables, &outside("10.244.0.7:15020"), "ISTIO_INBOUND tcp, port 15020: back", End::Unchanged);
    }

    #[test]
    fn tproxy_takes_inbound_connections_and_lets_the_pod_reach_itself() {
        let tables = tables(&config(crate::Mode::Tproxy), "");
        let outside = packet(None, L4::Tcp, "10.244.0.7:80", "eth0");
        check(&tables, &outside, "", End::Led { port: 15006, to: Destination::Inbound });
        let own = packet(Some(1000), L4::Tcp, "10.244.0.7:80", "lo");
        check(&tables, &own, "ISTIO_INBOUND ", End::Unchanged);
    }

    #[test]
    fn rules_of_others_count_and_what_is_unknown_is_said() {
        let more = "*filter\n:OUTPUT ACCEPT [0:0]\n[1:2] -A OUTPUT -p tcp -m tcp --dport 25 -j DROP\n\
                    -A OUTPUT -m set --match-set x dst -j ACCEPT\nCOMMIT\n";
        let tables = tables(&config(crate::Mode::Redirect), more);
        check(&tables, &packet(Some(1337), L4::Tcp, "192.0.2.1:25", "eth0"), "OUTPUT ", End::Dropped);
        let trace = follow(&tables, None, &[], &packet(Some(1337), L4::Tcp, "192.0.2.1:80", "eth0"));
        let last = trace.steps.last().expect("a step");
        assert!(last.uncertain && !last.ours, "{last:?}");
    }
}
