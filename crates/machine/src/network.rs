//! The mesh's own network: one unnamed namespace with a bridge, a namespace per pod, services as destination NAT.
//!
//! Nothing here exists in the host's namespace. All of it hangs on file descriptors of `up`, so it goes when `up` does.

pub(crate) mod attach;
pub(crate) mod dialer;
pub(crate) mod dns;
pub(crate) mod outside;
pub(crate) mod publish;
pub(crate) mod rules;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;

use netns::nft::{Net, Nft};
use netns::{Netlink, Netns, Route, Scope, write_sysctl};

pub(crate) use dialer::Dialer;

/// Name of the bridge inside the mesh's namespace.
pub(crate) const BRIDGE: &str = "mesh0";
/// Pod addresses. The bridge has the first one. Private to the mesh, so two meshes may use the same.
pub(crate) const PODS_V4: Net = Net { ip: IpAddr::V4(Ipv4Addr::new(10, 244, 0, 0)), prefix: 16 };
/// Cluster addresses of services.
pub(crate) const SERVICES_V4: Net = Net { ip: IpAddr::V4(Ipv4Addr::new(10, 96, 0, 0)), prefix: 16 };
pub(crate) const PODS_V6: Net = Net { ip: IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0)), prefix: 64 };
pub(crate) const SERVICES_V6: Net =
    Net { ip: IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0)), prefix: 112 };
/// Where traffic to the outside is handed over, on the bridge's address.
pub(crate) const OUTSIDE_PORT: u16 = 15999;

/// A step of network set-up that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("make a network namespace")]
    Namespace(#[source] io::Error),
    #[error(transparent)]
    Netlink(#[from] netns::Error),
    #[error("listen on {address} in the mesh")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("all addresses of {0} are in use")]
    Exhausted(String),
}

/// The mesh's namespace and what is in it.
pub(crate) struct Network {
    ns: Arc<Netns>,
    netlink: Netlink,
    nft: Nft,
    dialer: Dialer,
    used: BTreeSet<u32>,
    next: u32,
    dual_stack: bool,
}

/// A pod's place in the network.
pub(crate) struct Place {
    pub(crate) netns: Netns,
    pub(crate) ips: Vec<IpAddr>,
    /// Further addresses, of networks that Kubernetes knows nothing of.
    pub(crate) attached: Vec<IpAddr>,
    slot: u32,
}

impl Place {
    /// The number its addresses were made from, for giving it back.
    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }
}

impl Network {
    /// Makes namespace and bridge.
    pub(crate) fn create(dual_stack: bool) -> Result<Self, Error> {
        let ns = Netns::create().map_err(Error::Namespace)?;
        let mut netlink = Netlink::open_in(&ns)?;
        netlink.loopback_up()?;
        write_sysctl(&ns, "net.ipv4.ip_forward", "1")?;
        // Pods reach each other through the bridge's address, which the kernel would call a detour.
        write_sysctl(&ns, "net.ipv4.conf.all.send_redirects", "0")?;
        write_sysctl(&ns, "net.ipv4.conf.default.send_redirects", "0")?;
        write_sysctl(&ns, "net.ipv4.ip_unprivileged_port_start", "0")?;
        if dual_stack {
            write_sysctl(&ns, "net.ipv6.conf.all.forwarding", "1")?;
        }
        netlink.add_bridge(BRIDGE)?;
        // Where the bridge hands its frames to the IP rules (br_netfilter, loaded by container engines), packets would be translated
        // before they are routed here, and lost.
        for family in ["iptables", "ip6tables", "arptables"] {
            match write_sysctl(&ns, &format!("net.bridge.bridge-nf-call-{family}"), "0") {
                Ok(()) => {}
                Err(error) if error.errno() == Some(rustix::io::Errno::NOENT.raw_os_error()) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // A fixed address keeps the pods' neighbour tables right when ports come and go.
        netlink.set_mac(BRIDGE, [0x02, 0x6d, 0x65, 0x73, 0x68, 0x30])?;
        netlink.add_addr(BRIDGE, gateway_v4(), PODS_V4.prefix)?;
        if dual_stack {
            netlink.add_addr(BRIDGE, gateway_v6(), PODS_V6.prefix)?;
        }
        netlink.set_up(BRIDGE)?;
        // Cluster addresses are translated before routing; those that are not (no endpoints) must be routable to be refused.
        let on_bridge =
            |net: Net| Route { dev: Some(BRIDGE.to_owned()), scope: Scope::Link, ..Route::new(net.ip, net.prefix) };
        netlink.add_route(&on_bridge(SERVICES_V4))?;
        // Traffic to the outside is redirected before routing, but must have a route to be accepted for it.
        netlink.add_route(&on_bridge(Net::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)))?;
        if dual_stack {
            netlink.add_route(&on_bridge(SERVICES_V6))?;
            netlink.add_route(&on_bridge(Net::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0)))?;
        }
        let nft = Nft::open_in(&ns)?;
        let ns = Arc::new(ns);
        let dialer = Dialer::start(Arc::clone(&ns)).map_err(Error::Namespace)?;
        Ok(Self { ns, netlink, nft, dialer, used: BTreeSet::new(), next: 2, dual_stack })
    }

    /// The bridge's address: gateway, DNS server and control plane for the pods.
    pub(crate) fn gateway(&self) -> IpAddr {
        gateway_v4()
    }

    pub(crate) fn dual_stack(&self) -> bool {
        self.dual_stack
    }

    pub(crate) fn dialer(&self) -> Dialer {
        self.dialer.clone()
    }

    pub(crate) fn namespace(&self) -> &Netns {
        &self.ns
    }

    /// Listens on the bridge's address. Non-blocking.
    pub(crate) fn listen(&self, port: u16) -> Result<TcpListener, Error> {
        self.listen_at(SocketAddr::new(gateway_v4(), port))
    }

    /// Listens in the mesh's namespace. Non-blocking.
    pub(crate) fn listen_at(&self, address: SocketAddr) -> Result<TcpListener, Error> {
        let listen = || -> io::Result<TcpListener> {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        self.ns.run(listen).and_then(|r| r).map_err(|source| Error::Listen { address, source })
    }

    /// A UDP socket on the bridge's address. Non-blocking.
    pub(crate) fn listen_udp(&self, port: u16) -> Result<UdpSocket, Error> {
        let address = SocketAddr::new(gateway_v4(), port);
        let listen = || -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        self.ns.run(listen).and_then(|r| r).map_err(|source| Error::Listen { address, source })
    }

    /// Makes a pod's namespace and wires it to the bridge. `attached` are addresses it has beside its own.
    pub(crate) fn add_pod(&mut self, attached: Vec<IpAddr>) -> Result<Place, Error> {
        let slot = self.take_slot()?;
        let netns = Netns::create().map_err(Error::Namespace)?;
        let port = port_name(slot);
        let mut inside = Netlink::open_in(&netns)?;
        inside.loopback_up()?;
        self.netlink.add_veth(&port, "eth0", &netns)?;
        self.netlink.set_master(&port, BRIDGE)?;
        // Every packet between pods passes the mesh's own routing, where services are translated.
        self.netlink.set_bridge_port(&port, true, false)?;
        self.netlink.set_up(&port)?;
        inside.set_up("eth0")?;
        let mut ips = vec![pod_v4(slot)];
        if self.dual_stack {
            ips.push(pod_v6(slot));
        }
        for ip in &ips {
            let (length, gateway) = if ip.is_ipv4() { (32, gateway_v4()) } else { (128, gateway_v6()) };
            inside.add_addr("eth0", *ip, length)?;
            inside.add_route(&Route {
                dev: Some("eth0".to_owned()),
                scope: Scope::Link,
                ..Route::new(gateway, length)
            })?;
            inside.add_route(&Route { dev: Some("eth0".to_owned()), ..Route::default_via(gateway) })?;
        }
        for ip in &attached {
            inside.add_addr("eth0", *ip, if ip.is_ipv4() { 32 } else { 128 })?;
        }
        // As container runtimes do: any user may listen on any port, and ping.
        write_sysctl(&netns, "net.ipv4.ip_unprivileged_port_start", "0")?;
        if let Err(error) = write_sysctl(&netns, "net.ipv4.ping_group_range", "0 2147483647") {
            tracing::debug!(%error, "unprivileged ping stays off");
        }
        Ok(Place { netns, ips, attached, slot })
    }

    /// Takes a pod's wire away and frees its addresses.
    pub(crate) fn remove_pod(&mut self, slot: u32) {
        match self.netlink.del_link(&port_name(slot)) {
            Ok(()) => {}
            Err(error) if error.is_missing() => {}
            Err(error) => tracing::warn!(%error, "a pod's network port stays"),
        }
        self.used.remove(&slot);
    }

    fn take_slot(&mut self) -> Result<u32, Error> {
        let last = (1 << (32 - u32::from(PODS_V4.prefix))) - 2;
        // Addresses are reused as late as possible: clients may still know the former owner.
        for _ in 0..last {
            let slot = self.next;
            self.next = if slot >= last { 2 } else { slot + 1 };
            if self.used.insert(slot) {
                return Ok(slot);
            }
        }
        Err(Error::Exhausted(PODS_V4.to_string()))
    }

    /// Loads the rules for the services and the pods' addresses as they are now, all at once.
    pub(crate) fn program(
        &mut self,
        translations: &[rules::Translation],
        pods: &[Vec<IpAddr>],
        attached: &[IpAddr],
    ) -> Result<(), Error> {
        self.nft.apply(&rules::batch(translations, pods, attached, self.dual_stack))?;
        Ok(())
    }
}

fn port_name(slot: u32) -> String {
    format!("pod{slot}")
}

fn pod_v4(slot: u32) -> IpAddr {
    let IpAddr::V4(base) = PODS_V4.ip else { return PODS_V4.ip };
    IpAddr::V4(Ipv4Addr::from(u32::from(base) + slot))
}

fn pod_v6(slot: u32) -> IpAddr {
    let IpAddr::V6(base) = PODS_V6.ip else { return PODS_V6.ip };
    IpAddr::V6(Ipv6Addr::from(u128::from(base) + u128::from(slot)))
}

pub(crate) fn gateway_v4() -> IpAddr {
    pod_v4(1)
}

pub(crate) fn gateway_v6() -> IpAddr {
    pod_v6(1)
}
