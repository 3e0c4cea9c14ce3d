use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::Options;
use crate::address::Address;
use crate::any::Typed;
use crate::cidr::Cidr;
use crate::match_tree::{MatchData, MatchTree, Place};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};

/// What the choice of a filter chain looks at. IPv4-mapped IPv6 addresses must come as IPv4.
#[derive(Clone, Copy, Debug)]
pub struct ChainInput<'a> {
    /// Where the connection wants to go.
    pub destination: &'a Address,
    /// Where it comes from.
    pub source: &'a Address,
    /// The socket's peer, if that differs.
    pub direct_source: &'a Address,
    /// SNI, lower case; empty without.
    pub server_name: &'a str,
    /// `tls` or `raw_buffer`; empty means the latter.
    pub transport_protocol: &'a str,
    /// In the client's order.
    pub application_protocols: &'a [Vec<u8>],
}

impl<'a> ChainInput<'a> {
    fn match_data(&self) -> MatchData<'a> {
        let transport_protocol = if self.transport_protocol.is_empty() { RAW } else { self.transport_protocol };
        MatchData {
            local: Some(self.destination),
            remote: Some(self.source),
            direct_remote: Some(self.direct_source),
            server_name: self.server_name,
            transport_protocol,
            application_protocols: self.application_protocols,
            ..MatchData::default()
        }
    }
}

/// The transport protocol where nobody has found another one.
const RAW: &str = "raw_buffer";

/// How a listener finds the chain of a connection.
#[derive(Debug)]
pub(super) enum Selection {
    /// By the criteria of the chains.
    Criteria(ChainTable),
    /// By a matcher tree, which names them. `None`: there is no such chain.
    Tree(Box<MatchTree<Option<usize>>>),
}

/// What a [`Selection`] says.
pub(super) enum Selected {
    /// This chain.
    Chain(usize),
    /// The default chain.
    Default,
    /// Not even that.
    Nothing,
}

impl Selection {
    pub(super) fn compile(listener: &pb::listener::Listener, options: &Options) -> Compiled<Self> {
        let chains = &listener.filter_chains;
        let Some(matcher) = &listener.filter_chain_matcher else {
            return Ok(Self::Criteria(ChainTable::compile(chains)?));
        };
        let mut names = HashMap::new();
        for (index, chain) in chains.iter().enumerate() {
            let invalid = |reason: String| Err(Invalid::new(format!("filter_chains[{index}].name"), reason));
            if chain.name.is_empty() {
                return invalid("\"name\" field is required when using a listener matcher".to_owned());
            }
            if names.insert(chain.name.as_str(), index).is_some() {
                return invalid(format!("\"name\" field is duplicated with value '{}'", chain.name));
            }
        }
        let tree = MatchTree::compile(matcher, Place::Listener, options, &mut |typed: &Typed<'_>| {
            if typed.name != "google.protobuf.StringValue" {
                return Err(typed.unknown());
            }
            let name: String = typed.decode()?;
            Ok(names.get(name.as_str()).copied())
        });
        Ok(Self::Tree(Box::new(tree.at("filter_chain_matcher")?)))
    }

    /// Envoy `FilterChainManagerImpl::findFilterChain`.
    pub(super) fn find(&self, input: &ChainInput<'_>) -> Selected {
        match self {
            Self::Criteria(table) => table.find(input).map_or(Selected::Default, Selected::Chain),
            Self::Tree(tree) => match tree.evaluate(&input.match_data()).found() {
                Some(named) => named.map_or(Selected::Nothing, Selected::Chain),
                None => Selected::Default,
            },
        }
    }
}

/// Filter chains by their criteria, as Envoy's `FilterChainManagerImpl`: destination port, destination address, server
/// name, transport protocol, application protocols, direct source address, source type, source address, source port.
///
/// At each step the most specific entry is taken and never given back: if nothing further down fits, nothing fits.
#[derive(Clone, Debug, Default)]
pub struct ChainTable {
    ports: BTreeMap<u16, Ranges<Names>>,
}

type Names = BTreeMap<Box<str>, Transports>;
type Transports = BTreeMap<Box<str>, Applications>;
type Applications = BTreeMap<Box<[u8]>, Ranges<SourceTypes>>;
type SourceTypes = [Ranges<BTreeMap<u16, usize>>; 3];

const ANY: usize = 0;
const SAME_IP_OR_LOOPBACK: usize = 1;
const EXTERNAL: usize = 2;

/// Address ranges, the longest prefix first.
#[derive(Clone, Debug)]
struct Ranges<T>(Vec<(Cidr, T)>);

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Default> Ranges<T> {
    fn entry(&mut self, range: Cidr) -> &mut T {
        let at = match self.0.iter().position(|(r, _)| *r == range) {
            Some(at) => at,
            None => {
                let at = self.0.partition_point(|(r, _)| r.prefix_len() >= range.prefix_len());
                self.0.insert(at, (range, T::default()));
                at
            }
        };
        &mut self.0[at].1
    }

    fn find(&self, address: &Address) -> Option<&T> {
        // Envoy takes 0.0.0.0 for addresses that are no IP addresses.
        let ip = address.ip().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        self.0.iter().find(|(range, _)| range.contains(ip)).map(|(_, found)| found)
    }
}

impl ChainTable {
    pub(super) fn compile(chains: &[pb::listener::FilterChain]) -> Compiled<Self> {
        let mut table = Self::default();
        let empty = pb::listener::FilterChainMatch::default();
        for (index, chain) in chains.iter().enumerate() {
            let criteria = chain.filter_chain_match.as_ref().unwrap_or(&empty);
            table
                .add(criteria, index)
                .at("filter_chain_match")
                .at_index("filter_chains", index)
                .map_err(|invalid| describe_clash(invalid, chains, index))?;
        }
        Ok(table)
    }

    fn add(&mut self, criteria: &pb::listener::FilterChainMatch, index: usize) -> Compiled<()> {
        refuse! {
            "address_suffix": !criteria.address_suffix.is_empty(),
            "suffix_len": criteria.suffix_len.is_some(),
        }
        let port = match &criteria.destination_port {
            None => 0,
            Some(port) => port_number("destination_port", port.value)?,
        };
        let source_type = match criteria.source_type {
            0 => ANY,
            1 => SAME_IP_OR_LOOPBACK,
            2 => EXTERNAL,
            other => return Err(Invalid::new("source_type", format!("{other} is no known value"))),
        };
        let names = server_names(&criteria.server_names)?;
        let applications: Vec<&[u8]> = match criteria.application_protocols.as_slice() {
            [] => vec![b""],
            some => some.iter().map(String::as_bytes).collect(),
        };
        let source_ports: Vec<u16> = match criteria.source_ports.as_slice() {
            [] => vec![0],
            some => some.iter().map(|p| port_number("source_ports", *p)).collect::<Compiled<_>>()?,
        };
        let destinations = ranges("prefix_ranges", &criteria.prefix_ranges)?;
        let direct_sources = ranges("direct_source_prefix_ranges", &criteria.direct_source_prefix_ranges)?;
        let sources = ranges("source_prefix_ranges", &criteria.source_prefix_ranges)?;
        let by_address = self.ports.entry(port).or_default();
        for destination in destinations {
            let by_name = by_address.entry(destination);
            for name in &names {
                let by_transport = by_name.entry(name.clone()).or_default();
                let by_application = by_transport.entry(criteria.transport_protocol.as_str().into()).or_default();
                for application in &applications {
                    let by_direct_source = by_application.entry((*application).into()).or_default();
                    for direct in &direct_sources {
                        let by_source = &mut by_direct_source.entry(*direct)[source_type];
                        for source in &sources {
                            let by_port = by_source.entry(*source);
                            for source_port in &source_ports {
                                if by_port.insert(*source_port, index).is_some() {
                                    return Err(Invalid::new("", "duplicate"));
                                }
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn find(&self, input: &ChainInput<'_>) -> Option<usize> {
        let by_address = input
            .destination
            .port()
            .filter(|port| *port != 0)
            .and_then(|port| self.ports.get(&port))
            .or_else(|| self.ports.get(&0))?;
        let by_transport = by_name(by_address.find(input.destination)?, input.server_name)?;
        let transport = if input.transport_protocol.is_empty() { RAW } else { input.transport_protocol };
        let by_application = by_transport.get(transport).or_else(|| by_transport.get(""))?;
        let by_direct_source = input
            .application_protocols
            .iter()
            .find_map(|protocol| by_application.get(protocol.as_slice()))
            .or_else(|| by_application.get(&b""[..]))?;
        let types = by_direct_source.find(input.direct_source)?;
        let specific = if types[SAME_IP_OR_LOOPBACK].0.is_empty() && types[EXTERNAL].0.is_empty() {
            ANY
        } else if is_same_ip_or_loopback(input.source, input.destination) {
            SAME_IP_OR_LOOPBACK
        } else {
            EXTERNAL
        };
        let by_source = [specific, ANY].into_iter().map(|t| &types[t]).find(|t| !t.0.is_empty())?;
        let by_port = by_source.find(input.source)?;
        input.source.port().and_then(|port| by_port.get(&port)).or_else(|| by_port.get(&0)).copied()
    }
}

fn by_name<'t>(names: &'t Names, server_name: &str) -> Option<&'t Transports> {
    if let Some(found) = names.get(server_name) {
        return Some(found);
    }
    // `*.example.com` is kept as `.example.com`; the longest suffix comes first. A leading dot is no label's end.
    let mut from = 1;
    while let Some(at) = server_name.get(from..).and_then(|rest| rest.find('.')).map(|at| at + from) {
        if at + 1 >= server_name.len() {
            break;
        }
        if let Some(found) = names.get(&server_name[at..]) {
            return Some(found);
        }
        from = at + 1;
    }
    names.get("")
}

/// Envoy `Utility::isSameIpOrLoopback`.
pub(crate) fn is_same_ip_or_loopback(source: &Address, destination: &Address) -> bool {
    match source.ip() {
        Some(ip) => source.is_loopback() || Some(ip) == destination.ip(),
        None => true,
    }
}

fn port_number(field: &'static str, port: u32) -> Compiled<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0).ok_or_else(|| Invalid::new(field, format!("{port} is no port")))
}

fn server_names(names: &[String]) -> Compiled<Vec<Box<str>>> {
    if names.is_empty() {
        return Ok(vec!["".into()]);
    }
    names
        .iter()
        .map(|name| match name.strip_prefix('*') {
            // Clients' names come in lower case.
            Some(suffix) if suffix.starts_with('.') && !suffix.contains('*') => Ok(suffix.to_lowercase().into()),
            None if !name.contains('*') => Ok(name.to_lowercase().into()),
            _ => Err(Invalid::new("server_names", format!("partial wildcards are not supported: {name:?}"))),
        })
        .collect()
}

fn ranges(field: &str, ranges: &[pb::core::CidrRange]) -> Compiled<Vec<Cidr>> {
    if ranges.is_empty() {
        let all = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
        return Ok(all.into_iter().filter_map(|ip| IpNet::new(ip, 0).ok()).map(Cidr::from).collect());
    }
    ranges.iter().enumerate().map(|(i, range)| Cidr::compile(range).at_index(field, i)).collect()
}

/// Envoy's words for two chains with equal criteria, with the names of both.
fn describe_clash(invalid: Invalid, chains: &[pb::listener::FilterChain], index: usize) -> Invalid {
    if !invalid.is("duplicate") {
        return invalid;
    }
    let same = chains[..index].iter().find(|c| c.filter_chain_match == chains[index].filter_chain_match);
    let reason = match same {
        Some(earlier) => {
            format!("filter chain '{}' has the same matching rules defined as '{}'", chains[index].name, earlier.name)
        }
        None => format!("multiple filter chains with overlapping matching rules are defined: '{}'", chains[index].name),
    };
    Invalid::new(format!("filter_chains[{index}]"), reason)
}
