//! What names mean now: by the hosts file, then by DNS.

use crate::stats::{Kind, Named, PlainStats, Registry};
use hickory_resolver::config::{NameServerConfig, ProtocolConfig, ResolveHosts};
use hickory_resolver::config::{ResolverConfig, ResolverOpts, ServerOrderingStrategy};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{Query, ResponseCode};
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::{Hosts, TokioResolver, lookup::Lookup, system_conf};
use proxy_core::cluster::{DnsFamily, DnsServers};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What a name means.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// Empty: there is no such name, or it has no address of that family.
    pub(crate) addresses: Vec<IpAddr>,
    /// For how long, if DNS said it.
    pub(crate) ttl: Option<Duration>,
    /// What c-ares would say, if there are no addresses.
    pub(crate) details: &'static str,
}

/// Why nobody could say what a name means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Unresolved {
    /// It is no name.
    Misformatted,
    /// Nobody answered in the time that the configuration gives.
    Late,
    /// Servers do not answer.
    Silence,
    /// They cannot be reached.
    NoServer,
    /// A server answered that it cannot say.
    Refused,
    Failed,
}

impl Unresolved {
    /// In the words of c-ares, after Envoy's.
    pub(crate) fn details(self) -> &'static str {
        match self {
            Self::Misformatted => "cares_failure:Misformatted domain name",
            Self::Late => "resolver_timeout",
            Self::Silence => "cares_failure:Timeout while contacting DNS servers",
            Self::NoServer => "cares_failure:Could not contact DNS servers",
            Self::Refused => "cares_failure:DNS server refused query",
            Self::Failed => "cares_failure:DNS server returned general failure",
        }
    }
}

impl From<NetError> for Unresolved {
    fn from(error: NetError) -> Self {
        tracing::debug!(%error, "cannot resolve");
        match error {
            NetError::Timeout => Self::Silence,
            NetError::Io(_) | NetError::NoConnections => Self::NoServer,
            NetError::Dns(DnsError::ResponseCode(ResponseCode::Refused)) => Self::Refused,
            _ => Self::Failed,
        }
    }
}

/// Counters, and how a name is said not to be there.
const COUNTERS: [&str; 5] = [
    "dns.cares.get_addr_failure",
    "dns.cares.not_found",
    "dns.cares.reinits",
    "dns.cares.resolve_total",
    "dns.cares.timeouts",
];
const PENDING: &str = "dns.cares.pending_resolutions";
const NOT_FOUND: &str = "cares_norecords:Domain name not found";
const NO_DATA: &str = "cares_norecords:DNS server returned answer with no data";

/// Asks for names; the system's files are read anew when they change.
pub(crate) struct Resolvers {
    state: Mutex<State>,
    stats: Arc<PlainStats>,
}

#[derive(Default)]
struct State {
    /// When the files last changed, if they are there.
    stamps: [Option<SystemTime>; 2],
    hosts: Arc<Hosts>,
    resolvers: HashMap<DnsServers, TokioResolver>,
}

impl Resolvers {
    pub(crate) fn new(registry: &Registry) -> Self {
        let stats = Arc::new(PlainStats::default());
        registry.add(Kind::Plain, "".into(), stats.clone());
        Self { state: Mutex::default(), stats }
    }

    /// Somebody may ask.
    pub(crate) fn touch(&self) {
        self.stats.other.touch_all(&COUNTERS);
        self.stats.other.touch_gauges(&[PENDING]);
    }

    /// The addresses of a name or, of an address, itself. An error: nobody could say.
    pub(crate) async fn resolve(
        &self,
        servers: &DnsServers,
        family: DnsFamily,
        name: &str,
    ) -> Result<Answer, Unresolved> {
        let stats = &self.stats.other;
        self.touch();
        stats.inc("dns.cares.resolve_total");
        let _pending = Pending::begin(stats);
        let answer = self.ask(servers, family, name).await;
        if let Err(Unresolved::Misformatted) = answer {
            stats.inc("dns.cares.get_addr_failure");
        }
        answer
    }

    async fn ask(&self, servers: &DnsServers, family: DnsFamily, name: &str) -> Result<Answer, Unresolved> {
        let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
        if let Ok(ip) = bare.parse::<IpAddr>() {
            return match (ip, family) {
                // c-ares takes it for a name, which it cannot be.
                (IpAddr::V6(_), DnsFamily::V4Only) => Err(Unresolved::Misformatted),
                _ => Ok(Answer { addresses: vec![ip], ..Answer::default() }),
            };
        }
        let mut name = Name::from_str_relaxed(name).map_err(|_| Unresolved::Misformatted)?;
        if servers.no_search {
            name.set_fqdn(true);
        }
        let (resolver, hosts) = self.current(servers)?;
        let ask = Ask { resolver: &resolver, hosts: &hosts, name: &name };
        match family {
            DnsFamily::V4Only => self.counted(ask.of(RecordType::A).await),
            DnsFamily::V6Only => self.counted(ask.of(RecordType::AAAA).await),
            DnsFamily::Auto => self.first_of(&ask, RecordType::AAAA, RecordType::A).await,
            DnsFamily::V4Preferred => self.first_of(&ask, RecordType::A, RecordType::AAAA).await,
            DnsFamily::All => self.counted(ask.all().await),
        }
    }

    /// Addresses of the first kind or, if there are none, of the second.
    async fn first_of(&self, ask: &Ask<'_>, first: RecordType, second: RecordType) -> Result<Answer, Unresolved> {
        match self.counted(ask.of(first).await) {
            Ok(answer) if !answer.addresses.is_empty() => Ok(answer),
            _ => self.counted(ask.of(second).await),
        }
    }

    /// Counts how servers answered (Envoy `AddrInfoPendingResolution::onAresGetAddrInfoCallback`).
    fn counted(&self, answer: Result<Answer, NetError>) -> Result<Answer, Unresolved> {
        let stats = &self.stats.other;
        let answer = answer.map_err(Unresolved::from);
        match &answer {
            Ok(answer) if answer.addresses.is_empty() => stats.inc("dns.cares.not_found"),
            Ok(_) => {}
            Err(Unresolved::Silence) => stats.inc("dns.cares.timeouts"),
            Err(_) => {
                stats.inc("dns.cares.get_addr_failure");
                // Whoever answers so is left for a fresh start.
                stats.inc("dns.cares.reinits");
            }
        }
        answer
    }

    fn current(&self, servers: &DnsServers) -> Result<(TokioResolver, Arc<Hosts>), NetError> {
        let stamps = [HOSTS, RESOLV_CONF].map(|file| std::fs::metadata(file).and_then(|file| file.modified()).ok());
        let state = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.stamps != stamps {
            state.hosts = Arc::new(Hosts::from_system().unwrap_or_default());
            state.resolvers.clear();
            state.stamps = stamps;
        }
        let resolver = match state.resolvers.get(servers) {
            Some(resolver) => resolver.clone(),
            None => {
                let resolver = resolver(servers)?;
                state.resolvers.insert(servers.clone(), resolver.clone());
                resolver
            }
        };
        Ok((resolver, state.hosts.clone()))
    }
}

fn resolver(servers: &DnsServers) -> Result<TokioResolver, NetError> {
    // Without the file there is a server on this machine (resolv.conf(5)).
    let system = system_conf::read_system_conf().unwrap_or_else(|error| {
        tracing::debug!(%error, file = RESOLV_CONF, "no servers for names: asking this machine");
        let here = NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into());
        (ResolverConfig::from_name_servers(vec![here]), ResolverOpts::default())
    });
    let (config, mut options) = system;
    let (domain, search, mut asked) = config.into_parts();
    if !(servers.addresses.is_empty() || (servers.fallback && std::fs::exists(RESOLV_CONF).unwrap_or(false))) {
        let server = |address: &SocketAddr| {
            let mut server = NameServerConfig::udp_and_tcp(address.ip());
            server.connections.iter_mut().for_each(|connection| connection.port = address.port());
            server
        };
        asked = servers.addresses.iter().map(server).collect();
    }
    if servers.tcp {
        for server in &mut asked {
            server.connections.retain(|connection| matches!(connection.protocol, ProtocolConfig::Tcp));
        }
    }
    // One after the other, as the file says: the next may know another world.
    options.num_concurrent_reqs = 1;
    options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
    // Who asks wants to know how it is now; the hosts file is read here.
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    let config = ResolverConfig::from_parts(domain, search, asked);
    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).with_options(options).build()
}

/// A lookup under way.
struct Pending<'a>(&'a Named);

impl<'a> Pending<'a> {
    fn begin(stats: &'a Named) -> Self {
        stats.shift(PENDING, true);
        Self(stats)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.0.shift(PENDING, false);
    }
}

/// One name, and who is asked.
struct Ask<'a> {
    resolver: &'a TokioResolver,
    hosts: &'a Hosts,
    name: &'a Name,
}

impl Ask<'_> {
    async fn of(&self, kind: RecordType) -> Result<Answer, NetError> {
        let both = [RecordType::A, RecordType::AAAA]
            .map(|kind| (kind, self.hosts.lookup_static_host(&Query::query(self.name.clone(), kind))));
        let here = |addresses| Ok(Answer { addresses, ttl: None, details: NO_DATA });
        let own = both.iter().filter(|(of, _)| *of == kind).flat_map(|(_, found)| found).flat_map(addresses);
        let own: Vec<IpAddr> = own.collect();
        if own.is_empty() && self.name.is_localhost() {
            // RFC 6761, 6.3: never asked for.
            return here(match kind {
                RecordType::A => vec![Ipv4Addr::LOCALHOST.into()],
                _ => vec![Ipv6Addr::LOCALHOST.into()],
            });
        }
        // A name that the file has is not asked for, even if the file has no address of this family.
        if both.iter().any(|(_, found)| found.is_some()) {
            return here(own);
        }
        match self.resolver.lookup(self.name.clone(), kind).await {
            Ok(lookup) => {
                // Aliases on the way to the address end, too.
                let ttl = lookup.answers().iter().map(|record| record.ttl).min();
                let ttl = ttl.filter(|ttl| *ttl > 0).map(|ttl| Duration::from_secs(ttl.into()));
                Ok(Answer { addresses: addresses(&lookup).collect(), ttl, details: NO_DATA })
            }
            Err(error) if error.is_nx_domain() => Ok(Answer { details: NOT_FOUND, ..Answer::default() }),
            Err(error) if error.is_no_records_found() => Ok(Answer { details: NO_DATA, ..Answer::default() }),
            Err(error) => Err(error),
        }
    }

    async fn all(&self) -> Result<Answer, NetError> {
        match tokio::join!(self.of(RecordType::A), self.of(RecordType::AAAA)) {
            (Ok(mut four), Ok(six)) => {
                four.addresses.extend(six.addresses);
                four.ttl = [four.ttl, six.ttl].into_iter().flatten().min();
                Ok(four)
            }
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            (Err(error), Err(_)) => Err(error),
        }
    }
}

fn addresses(lookup: &Lookup) -> impl Iterator<Item = IpAddr> {
    lookup.answers().iter().filter_map(|record| record.data.ip_addr())
}
