use std::ops::Range;

use mesh_types::ArcStr;

use crate::any::Typed;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::tlv::{TlvFilter, TlvRule};
use crate::{fields, pb};

/// What is looked at in the first bytes of a connection, and where.
#[derive(Clone, Debug, Default)]
pub struct Inspect {
    /// Restore the original destination from the kernel (SO_ORIGINAL_DST).
    pub original_dst: bool,
    /// Use the peer's address as source towards upstream, with this mark.
    pub original_src: Option<u32>,
    /// Read the PROXY protocol header first.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// But not here.
    no_header: Option<PortPredicate>,
    /// What is made of the offers of TLS clients.
    pub fingerprints: Fingerprints,
    tls: Option<Inspector>,
    http: Option<Inspector>,
}

/// Which fingerprints of TLS clients are taken.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Fingerprints {
    /// JA3.
    pub ja3: bool,
    /// JA4.
    pub ja4: bool,
}

/// An inspector and where it is off.
#[derive(Clone, Debug)]
struct Inspector {
    disabled: Option<PortPredicate>,
}

/// How PROXY protocol is read.
#[derive(Clone, Debug, Default)]
pub struct ProxyProtocol {
    /// Connections without the header are served too.
    pub optional: bool,
    /// Connections with headers of version 1, and 2, are not.
    pub disallowed: [bool; 2],
    /// Fields that are told to other filters.
    pub rules: Box<[TlvRule]>,
    /// In filter state instead of dynamic metadata.
    pub in_filter_state: bool,
    /// Fields that hosts may get.
    pub passed: TlvFilter,
    /// In the names of its counters.
    pub stat_prefix: ArcStr,
}

impl ProxyProtocol {
    fn compile(config: &pb::listener_filter::proxy_protocol::v3::ProxyProtocol) -> Compiled<Self> {
        use pb::core::proxy_protocol_config::Version;
        use pb::listener_filter::proxy_protocol::v3::proxy_protocol::TlvLocation;
        let mut disallowed = [false; 2];
        for version in &config.disallowed_versions {
            match fields::enumeration("disallowed_versions", *version)? {
                Version::V1 => disallowed[0] = true,
                Version::V2 => disallowed[1] = true,
            }
        }
        if disallowed == [true; 2] {
            return Err(Invalid::new("disallowed_versions", "all proxy protocol versions are disallowed"));
        }
        let location: TlvLocation = fields::enumeration("tlv_location", config.tlv_location)?;
        Ok(Self {
            optional: config.allow_requests_without_proxy_protocol,
            disallowed,
            rules: config.rules.iter().map(TlvRule::compile).collect::<Compiled<_>>().at("rules")?,
            in_filter_state: location == TlvLocation::FilterState,
            passed: TlvFilter::compile(config.pass_through_tlvs.as_ref()).at("pass_through_tlvs")?,
            stat_prefix: config.stat_prefix.as_str().into(),
        })
    }
}

/// A condition on the destination port (`ListenerFilterChainMatchPredicate`).
#[derive(Clone, Debug)]
pub enum PortPredicate {
    /// Always, or never.
    Always(bool),
    /// The port lies in the range.
    Port(Range<i32>),
    /// Not so.
    Not(Box<PortPredicate>),
    /// All of them.
    All(Vec<PortPredicate>),
    /// One of them.
    Any(Vec<PortPredicate>),
}

impl PortPredicate {
    fn compile(predicate: &pb::listener::ListenerFilterChainMatchPredicate) -> Compiled<Self> {
        use pb::listener::listener_filter_chain_match_predicate::{MatchSet, Rule};
        let set = |set: &MatchSet| set.rules.iter().map(Self::compile).collect::<Compiled<Vec<_>>>();
        Ok(match &predicate.rule {
            None => return Err(Invalid::new("rule", "is missing")),
            Some(Rule::AnyMatch(always)) => Self::Always(*always),
            Some(Rule::DestinationPortRange(range)) => Self::Port(range.start..range.end),
            Some(Rule::NotMatch(inner)) => Self::Not(Box::new(Self::compile(inner)?)),
            Some(Rule::AndMatch(rules)) => Self::All(set(rules)?),
            Some(Rule::OrMatch(rules)) => Self::Any(set(rules)?),
        })
    }

    fn holds(&self, port: u16) -> bool {
        match self {
            Self::Always(always) => *always,
            Self::Port(range) => range.contains(&i32::from(port)),
            Self::Not(inner) => !inner.holds(port),
            Self::All(rules) => rules.iter().all(|r| r.holds(port)),
            Self::Any(rules) => rules.iter().any(|r| r.holds(port)),
        }
    }
}

impl Inspect {
    pub(super) fn compile(filters: &[pb::listener::ListenerFilter]) -> Compiled<Self> {
        let mut inspect = Self::default();
        for (i, filter) in filters.iter().enumerate() {
            inspect.add(filter).at_index("listener_filters", i)?;
        }
        Ok(inspect)
    }

    fn add(&mut self, filter: &pb::listener::ListenerFilter) -> Compiled<()> {
        use pb::listener::listener_filter::ConfigType;
        let typed = match &filter.config_type {
            Some(ConfigType::TypedConfig(any)) => Typed::open(Some(any))?,
            Some(ConfigType::ConfigDiscovery(_)) => return Err(Invalid::unsupported("config_discovery")),
            None => return Err(Invalid::new("typed_config", "is missing")),
        };
        let disabled = filter.filter_disabled.as_ref().map(PortPredicate::compile).transpose().at("filter_disabled")?;
        match typed.name.as_str() {
            "envoy.extensions.filters.listener.original_dst.v3.OriginalDst" => {
                refuse!("filter_disabled": disabled.is_some());
                self.original_dst = true;
            }
            "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector" => {
                let config: pb::listener_filter::tls_inspector::v3::TlsInspector = typed.decode()?;
                let close = config.close_connection_on_client_hello_parsing_errors;
                refuse!("close_connection_on_client_hello_parsing_errors": close);
                self.fingerprints = Fingerprints {
                    ja3: fields::flag(config.enable_ja3_fingerprinting.as_ref(), false),
                    ja4: fields::flag(config.enable_ja4_fingerprinting.as_ref(), false),
                };
                self.tls = Some(Inspector { disabled })
            }
            "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector" => {
                self.http = Some(Inspector { disabled })
            }
            "envoy.extensions.filters.listener.original_src.v3.OriginalSrc" => {
                let config: pb::listener_filter::original_src::v3::OriginalSrc = typed.decode()?;
                refuse!("bind_port": config.bind_port);
                self.original_src = Some(config.mark);
            }
            "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol" => {
                let config: pb::listener_filter::proxy_protocol::v3::ProxyProtocol = typed.decode()?;
                self.proxy_protocol = Some(ProxyProtocol::compile(&config)?);
                self.no_header = disabled;
            }
            _ => return Err(typed.unknown()),
        }
        Ok(())
    }

    /// Whether there is an inspector for TLS.
    pub fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether there is an inspector for HTTP.
    pub fn has_http(&self) -> bool {
        self.http.is_some()
    }

    /// The filter that reads PROXY headers, on connections to this port.
    pub fn reads_header(&self, port: u16) -> Option<&ProxyProtocol> {
        self.proxy_protocol.as_ref().filter(|_| !self.no_header.as_ref().is_some_and(|d| d.holds(port)))
    }

    /// Whether TLS is looked for on connections to this port.
    pub fn needs_tls(&self, port: u16) -> bool {
        on(&self.tls, port)
    }

    /// Whether HTTP is looked for on (plaintext) connections to this port.
    pub fn needs_http(&self, port: u16) -> bool {
        on(&self.http, port)
    }
}

fn on(inspector: &Option<Inspector>, port: u16) -> bool {
    inspector.as_ref().is_some_and(|i| !i.disabled.as_ref().is_some_and(|d| d.holds(port)))
}
