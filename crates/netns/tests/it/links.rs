use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use netns::nft::{Batch, ChainType, Expr, Family, Field, Hook, HookPoint, L4, Nft, Pick, Table, Type, Value, Verdict};
use netns::{Netlink, Netns, Route, RouteKind, Rule, Scope};

use crate::fresh;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("address")
}

fn pod(mesh: &Netns, index: u8) -> Netns {
    let ns = Netns::create().expect("namespace");
    let mut inside = Netlink::open_in(&ns).expect("socket");
    let mut outside = Netlink::open_in(mesh).expect("socket");
    let (port, address) = (format!("veth{index}"), ip(&format!("10.1.0.{index}")));
    inside.loopback_up().expect("lo");
    outside.add_veth(&port, "eth0", &ns).expect("veth");
    outside.set_master(&port, "br0").expect("master");
    outside.set_bridge_port(&port, true, false).expect("isolated");
    outside.set_up(&port).expect("up");
    inside.add_addr("eth0", address, 32).expect("address");
    inside.set_up("eth0").expect("up");
    let gateway = ip("10.1.0.254");
    let to_gateway = Route { dev: Some("eth0".into()), scope: Scope::Link, ..Route::new(gateway, 32) };
    inside.add_route(&to_gateway).expect("gateway route");
    inside.add_route(&Route { dev: Some("eth0".into()), ..Route::default_via(gateway) }).expect("default route");
    let back = Route { dev: Some("br0".into()), scope: Scope::Link, ..Route::new(address, 32) };
    outside.add_route(&back).expect("pod route");
    ns
}

/// Two pods behind isolated ports of a bridge reach each other through the router, and a service address reaches both,
/// as `outrigger up` builds it.
#[test]
fn pods_on_an_isolated_bridge_reach_each_other_and_a_service() {
    let Some(mesh) = fresh() else { return };
    let mut netlink = Netlink::open_in(&mesh).expect("socket");
    netlink.add_bridge("br0").expect("bridge");
    netlink.add_addr("br0", ip("10.1.0.254"), 32).expect("address");
    netlink.set_up("br0").expect("up");
    netns::write_sysctl(&mesh, "net.ipv4.ip_forward", "1").expect("forwarding");
    netns::write_sysctl(&mesh, "net.ipv4.conf.all.send_redirects", "0").expect("redirects");
    assert_eq!(netns::read_sysctl(&mesh, "net.ipv4.ip_forward").expect("read"), "1");
    // With br_netfilter in the kernel, destination NAT would happen while the packet is still being bridged, and an isolated port
    // would then not be reached. The setting exists only where the module is loaded.
    let _ = netns::write_sysctl(&mesh, "net.bridge.bridge-nf-call-iptables", "0");
    let (a, b, client) = (pod(&mesh, 1), pod(&mesh, 2), pod(&mesh, 3));

    let table = Table::new(Family::Inet, "services");
    let hook = |point| Some(Hook { kind: ChainType::Nat, point, priority: -100 });
    let mut batch = Batch::new();
    batch.replace_table(&table).add_chain(&table, "svc-a", None);
    batch.add_verdict_map(&table, "services", &[Type::Ipv4, Type::Protocol, Type::Port]);
    batch.add_chain(&table, "prerouting", hook(HookPoint::Prerouting));
    let endpoints: Vec<SocketAddr> =
        vec!["10.1.0.1:9080".parse().expect("address"), "10.1.0.2:9080".parse().expect("address")];
    batch.add_rule(
        &table,
        "svc-a",
        &netns::nft::Rule::new([Expr::L4Proto(L4::Tcp), Expr::Counter, Expr::Dnat(endpoints, Pick::RoundRobin)])
            .comment("a.default"),
    );
    let key = vec![Value::Ip(ip("10.96.0.10")), Value::Protocol(L4::Tcp), Value::Port(80)];
    batch.add_verdicts(&table, "services", &[(key, Verdict::Goto("svc-a".into()))]);
    let fields = vec![Field::Ipv4Daddr, Field::L4Proto, Field::Dport];
    batch.add_rule(&table, "prerouting", &netns::nft::Rule::new([Expr::VerdictMap(fields, "services".into())]));
    let mut nft = Nft::open_in(&mesh).expect("socket");
    nft.apply(&batch).expect("services");

    for (ns, name) in [(&a, b"a"), (&b, b"b")] {
        let listener = ns.run(|| TcpListener::bind("0.0.0.0:9080")).expect("enter").expect("listen");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = stream.and_then(|mut s| s.write_all(name));
            }
        });
    }
    let ask = |to: &str| {
        let to: SocketAddr = to.parse().expect("address");
        let mut stream =
            client.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5))).expect("enter").expect("connect");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("read");
        text
    };
    assert_eq!(ask("10.1.0.1:9080"), "a");
    assert_eq!(ask("10.1.0.2:9080"), "b");
    let mut seen = [ask("10.96.0.10:80"), ask("10.96.0.10:80")];
    seen.sort();
    assert_eq!(seen, ["a", "b"]);
    let rules = nft.rules(&table).expect("rules");
    let service = rules.iter().find(|r| r.comment.as_deref() == Some("a.default")).expect("the service's rule");
    assert_eq!(service.packets, 2, "one per connection: the rest follows connection tracking");
}

#[test]
fn links_addresses_routes_and_rules_are_read_back() {
    let Some(ns) = fresh() else { return };
    let mut netlink = Netlink::open_in(&ns).expect("socket");
    netlink.add_bridge("d0").expect("bridge");
    netlink.set_mtu("d0", 1400).expect("mtu");
    netlink.set_up("d0").expect("up");
    netlink.add_addr("d0", ip("10.9.0.1"), 24).expect("v4");
    netlink.add_addr("d0", ip("fd00:9::1"), 64).expect("v6");
    assert!(netlink.add_addr("d0", ip("10.9.0.1"), 24).expect_err("twice").is_exists());
    let index = netlink.link("d0").expect("link").index;
    let mine: Vec<_> =
        netlink.addrs().expect("addresses").into_iter().filter(|a| a.index == index && !a.link_local).collect();
    assert_eq!(mine.iter().map(|a| a.ip).collect::<Vec<_>>(), [ip("10.9.0.1"), ip("fd00:9::1")]);

    for v6 in [false, true] {
        let any = ip(if v6 { "::" } else { "0.0.0.0" });
        let local = Route {
            dev: Some("lo".into()),
            kind: RouteKind::Local,
            scope: if v6 { Scope::Universe } else { Scope::Host },
            table: 133,
            ..Route::new(any, 0)
        };
        netlink.add_route(&local).expect("route");
        assert!(netlink.add_route(&local).expect_err("twice").is_exists());
        assert_eq!(netlink.routes(v6, 133).expect("routes"), std::slice::from_ref(&local));
        let rule = Rule { v6, fwmark: Some(1337), fwmask: None, table: 133, priority: None };
        netlink.add_rule(&rule).expect("rule");
        assert!(netlink.add_rule(&rule).expect_err("twice").is_exists());
        assert_eq!(
            netlink.rules(v6).expect("rules").iter().filter(|r| r.table == 133 && r.fwmark == Some(1337)).count(),
            1
        );
        netlink.del_rule(&rule).expect("delete rule");
        netlink.del_route(&local).expect("delete route");
        assert!(netlink.del_rule(&rule).expect_err("gone").is_missing());
        assert_eq!(netlink.routes(v6, 133).unwrap_or_default(), []);
    }
    netlink.del_addr("d0", ip("10.9.0.1"), 24).expect("delete address");
    netlink.del_link("d0").expect("delete link");
    let error = netlink.set_up("d0").expect_err("gone");
    assert!(error.is_missing());
    assert_eq!(error.to_string(), "find interface d0");
}

#[test]
fn a_namespace_is_its_descriptor() {
    let Some(ns) = fresh() else { return };
    let clone = ns.try_clone().expect("clone");
    Netlink::open_in(&ns).expect("socket").add_bridge("only-here").expect("bridge");
    drop(ns);
    assert!(Netlink::open_in(&clone).expect("socket").link("only-here").is_ok());
    assert!(Netlink::open().expect("socket").link("only-here").is_err());
}
