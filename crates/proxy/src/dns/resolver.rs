//! What names mean now: by the hosts file, then by DNS.

use hickory_resolver::config::{NameServerConfig, ProtocolConfig, ResolveHosts};
use hickory_resolver::config::{ResolverConfig, ResolverOpts, ServerOrderingStrategy};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::Query;
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
}

/// Asks for names; the system's files are read anew when they change.
#[derive(Default)]
pub(crate) struct Resolvers(Mutex<State>);

#[derive(Default)]
struct State {
    /// When the files last changed, if they are there.
    stamps: [Option<SystemTime>; 2],
    hosts: Arc<Hosts>,
    resolvers: HashMap<DnsServers, TokioResolver>,
}

impl Resolvers {
    /// The addresses of a name or, of an address, itself. An error: nobody could say.
    pub(crate) async fn resolve(
        &self,
        servers: &DnsServers,
        family: DnsFamily,
        name: &str,
    ) -> Result<Answer, NetError> {
        if let Ok(ip) = name.parse::<IpAddr>() {
            return Ok(Answer { addresses: vec![ip], ttl: None });
        }
        let mut name = Name::from_str_relaxed(name)?;
        if servers.no_search {
            name.set_fqdn(true);
        }
        let (resolver, hosts) = self.current(servers)?;
        let ask = Ask { resolver: &resolver, hosts: &hosts, name: &name };
        match family {
            DnsFamily::V4Only => ask.of(RecordType::A).await,
            DnsFamily::V6Only => ask.of(RecordType::AAAA).await,
            DnsFamily::Auto => ask.first_of(RecordType::AAAA, RecordType::A).await,
            DnsFamily::V4Preferred => ask.first_of(RecordType::A, RecordType::AAAA).await,
            DnsFamily::All => ask.all().await,
        }
    }

    fn current(&self, servers: &DnsServers) -> Result<(TokioResolver, Arc<Hosts>), NetError> {
        let stamps = [HOSTS, RESOLV_CONF].map(|file| std::fs::metadata(file).and_then(|file| file.modified()).ok());
        let state = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        let here = |addresses| Ok(Answer { addresses, ttl: None });
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
                Ok(Answer { addresses: addresses(&lookup).collect(), ttl })
            }
            Err(error) if error.is_no_records_found() => Ok(Answer::default()),
            Err(error) => Err(error),
        }
    }

    /// Addresses of the first kind or, if there are none, of the second.
    async fn first_of(&self, first: RecordType, second: RecordType) -> Result<Answer, NetError> {
        match self.of(first).await {
            Ok(answer) if !answer.addresses.is_empty() => Ok(answer),
            _ => self.of(second).await,
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
