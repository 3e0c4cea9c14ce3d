//! The nftables rules of the mesh's namespace: services, hairpins, the way outside. Pure.

use std::net::{IpAddr, SocketAddr};

use netns::nft::{Batch, ChainType, Expr, Family, Hook, HookPoint, L4, Net, Op, Pick, Rejection, Rule, Table, Verdict};

use super::{BRIDGE, OUTSIDE_PORT, PODS_V4, PODS_V6, SERVICES_V4, SERVICES_V6};

const SERVICES: &str = "services";

/// One port of one cluster address and where it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    pub(crate) from: SocketAddr,
    pub(crate) protocol: L4,
    /// Ready endpoints of the same family; none means that connections are refused.
    pub(crate) to: Vec<SocketAddr>,
    /// `NAMESPACE/NAME:PORT`, shown by `nft list ruleset`.
    pub(crate) service: String,
}

/// Replaces the whole table in one transaction, so that no packet sees half of a change. `attached` are
/// addresses of pods outside the pods' own network.
///
/// Established connections keep their endpoint, as connection tracking remembers it.
pub(crate) fn batch(
    translations: &[Translation],
    pods: &[Vec<IpAddr>],
    attached: &[IpAddr],
    dual_stack: bool,
) -> Batch {
    let table = Table::new(Family::Inet, "outrigger");
    let mut batch = Batch::new();
    batch.replace_table(&table);
    batch.add_chain(&table, SERVICES, None);
    for translation in translations.iter().filter(|t| !t.to.is_empty()) {
        batch.add_rule(&table, SERVICES, &dnat(translation));
    }
    let nat = |point, priority| Some(Hook { kind: ChainType::Nat, point, priority });
    batch.add_chain(&table, "prerouting", nat(HookPoint::Prerouting, -100));
    batch.add_rule(&table, "prerouting", &Rule::new([Expr::jump(SERVICES)]));
    let mut families = vec![(PODS_V4, SERVICES_V4)];
    if dual_stack {
        families.push((PODS_V6, SERVICES_V6));
    }
    let keep = |batch: &mut Batch, chain: &str| {
        for ip in attached {
            let rule = Rule::new([Expr::Daddr(Op::Eq, host(*ip)), Expr::Verdict(Verdict::Accept)]);
            batch.add_rule(&table, chain, &rule.comment("a pod's further address"));
        }
    };
    keep(&mut batch, "prerouting");
    for (pod_net, service_net) in &families {
        batch.add_rule(
            &table,
            "prerouting",
            &Rule::new([
                Expr::Iif(Op::Eq, BRIDGE.to_owned()),
                Expr::Ipv6(pod_net.ip.is_ipv6()),
                Expr::Daddr(Op::Ne, *pod_net),
                Expr::Daddr(Op::Ne, *service_net),
                Expr::L4Proto(L4::Tcp),
                Expr::Redirect(OUTSIDE_PORT),
            ])
            .comment("to the outside, through `up`"),
        );
    }
    // `up` itself (published ports) reaches services the same way.
    batch.add_chain(&table, "output", nat(HookPoint::Output, -100));
    batch.add_rule(&table, "output", &Rule::new([Expr::jump(SERVICES)]));
    batch.add_chain(&table, "postrouting", nat(HookPoint::Postrouting, 100));
    // A pod that reaches itself through a service must see another address than its own, or it would answer itself directly.
    for ip in pods.iter().flatten() {
        let own = host(*ip);
        batch.add_rule(
            &table,
            "postrouting",
            &Rule::new([Expr::Saddr(Op::Eq, own), Expr::Daddr(Op::Eq, own), Expr::Masquerade]),
        );
    }
    let filter = |point| Some(Hook { kind: ChainType::Filter, point, priority: 0 });
    for (chain, point) in [("forward", HookPoint::Forward), ("refuse", HookPoint::Output)] {
        batch.add_chain(&table, chain, filter(point));
        for (_, services) in &families {
            // What was not translated has no endpoint: refused at once, as kube-proxy does, instead of a timeout.
            let to_service = Expr::Daddr(Op::Eq, *services);
            batch.add_rule(
                &table,
                chain,
                &Rule::new([to_service.clone(), Expr::L4Proto(L4::Tcp), Expr::Reject(Rejection::TcpReset)]),
            );
            batch.add_rule(&table, chain, &Rule::new([to_service, Expr::Reject(Rejection::PortUnreachable)]));
        }
    }
    keep(&mut batch, "forward");
    for (pod_net, _) in &families {
        // Other protocols have no way outside; say so at once.
        batch.add_rule(
            &table,
            "forward",
            &Rule::new([
                Expr::Ipv6(pod_net.ip.is_ipv6()),
                Expr::Daddr(Op::Ne, *pod_net),
                Expr::Reject(Rejection::PortUnreachable),
            ]),
        );
    }
    batch.add_rule(&table, "forward", &Rule::new([Expr::Verdict(Verdict::Accept)]));
    batch
}

/// Just this address.
fn host(ip: IpAddr) -> Net {
    Net::new(ip, if ip.is_ipv4() { 32 } else { 128 })
}

fn dnat(translation: &Translation) -> Rule {
    let ip = translation.from.ip();
    Rule::new([
        Expr::Daddr(Op::Eq, host(ip)),
        Expr::Dport(translation.protocol, Op::Eq, vec![translation.from.port()]),
        Expr::Dnat(translation.to.clone(), Pick::Random),
    ])
    .comment(&translation.service)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn further_addresses_of_pods_are_not_outside() {
        let text = batch(&[], &[], &["172.16.1.32".parse().unwrap()], false).to_string();
        let rule = |chain: &str| {
            format!(
                "add rule inet outrigger {chain} ip daddr 172.16.1.32/32 accept comment \"a pod's further address\""
            )
        };
        let at = |line: &str| text.find(line).unwrap_or_else(|| panic!("no {line:?} in\n{text}"));
        assert!(at(&rule("prerouting")) < at("redirect to"));
        assert!(at(&rule("forward")) < at("!= 10.244.0.0/16 reject"));
    }

    #[test]
    fn a_service_is_one_rule_and_none_without_endpoints() {
        let translation = |to: &[&str]| Translation {
            from: "10.96.0.7:80".parse().unwrap(),
            protocol: L4::Tcp,
            to: to.iter().map(|text| text.parse().unwrap()).collect(),
            service: "default/reviews:http".to_owned(),
        };
        let text = batch(&[translation(&["10.244.0.2:9080", "10.244.0.3:9080"]), translation(&[])], &[], &[], false)
            .to_string();
        let rules: Vec<_> = text.lines().filter(|line| line.contains("dnat")).collect();
        assert_eq!(
            rules,
            ["add rule inet outrigger services ip daddr 10.96.0.7/32 tcp dport 80 dnat ip to numgen random mod 2 map \
              { 0 : 10.244.0.2 . 9080, 1 : 10.244.0.3 . 9080 } comment \"default/reviews:http\""]
        );
    }
}
