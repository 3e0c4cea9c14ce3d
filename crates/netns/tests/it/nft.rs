use std::time::{Duration, Instant};

use netns::nft::{
    Batch, ChainType, CtState, Expr, Family, Hook, HookPoint, L4, Net, Nft, Op, Pick, Rejection, Rule, Table, Type,
    Value,
};

use crate::{fresh, output};

fn net(text: &str) -> Net {
    let (ip, prefix) = text.split_once('/').expect("prefix");
    Net::new(ip.parse().expect("address"), prefix.parse().expect("length"))
}

/// One rule of every kind we know, in the places where the kernel accepts it.
fn everything(table: &Table) -> Batch {
    let hook = |kind, point, priority| Some(Hook { kind, point, priority });
    let mut b = Batch::new();
    b.replace_table(table);
    b.add_chain(table, "pre", hook(ChainType::Nat, HookPoint::Prerouting, -100));
    b.add_chain(table, "out", hook(ChainType::Nat, HookPoint::Output, -100));
    b.add_chain(table, "post", hook(ChainType::Nat, HookPoint::Postrouting, 100));
    b.add_chain(table, "mangle", hook(ChainType::Filter, HookPoint::Prerouting, -150));
    b.add_chain(table, "raw", hook(ChainType::Filter, HookPoint::Output, -300));
    b.add_chain(table, "filter", hook(ChainType::Filter, HookPoint::Output, 0));
    b.add_chain(table, "plain", None);
    b.add_set(table, "known", &[Type::Ipv4]);
    b.add_elements(table, "known", &[vec![Value::Ip("10.2.3.4".parse().expect("address"))]]);
    let two = ["10.0.0.1:80", "10.0.0.2:81"].map(|a| a.parse().expect("address")).to_vec();
    let two_v6 = ["[fd00::1]:80", "[fd00::2]:81"].map(|a| a.parse().expect("address")).to_vec();
    let one = vec!["10.0.0.3:82".parse().expect("address")];
    let ret = || Expr::Verdict(netns::nft::Verdict::Return);
    let tcp = || Expr::L4Proto(L4::Tcp);
    let rules: Vec<(&str, Vec<Expr>)> = vec![
        ("pre", vec![tcp(), Expr::Dport(L4::Tcp, Op::Eq, vec![15008]), Expr::Counter, ret()]),
        ("pre", vec![tcp(), Expr::DportRange(L4::Tcp, 8000, 8100), Expr::Counter, ret()]),
        ("pre", vec![Expr::Iif(Op::Eq, "not-istio-nic".into()), Expr::Counter, ret()]),
        ("pre", vec![tcp(), Expr::Counter, Expr::Dnat(two, Pick::Random)]),
        ("pre", vec![tcp(), Expr::Dnat(two_v6, Pick::RoundRobin)]),
        ("pre", vec![tcp(), Expr::Dnat(one, Pick::Random)]),
        ("out", vec![Expr::Oif(Op::Eq, "lo".into()), Expr::Saddr(Op::Eq, net("127.0.0.6/32")), Expr::Counter, ret()]),
        (
            "out",
            vec![
                Expr::Oif(Op::Eq, "lo".into()),
                tcp(),
                Expr::Daddr(Op::Ne, net("::1/128")),
                Expr::Dport(L4::Tcp, Op::Ne, vec![53, 15008]),
                Expr::SkUid(Op::Eq, vec![3]),
                Expr::Counter,
                Expr::jump("plain"),
            ],
        ),
        ("out", vec![tcp(), Expr::Daddr(Op::Eq, net("10.0.0.0/12")), Expr::Counter, Expr::Redirect(15001)]),
        ("out", vec![tcp(), Expr::Daddr(Op::Eq, net("10.0.0.0/16")), Expr::Counter, Expr::Redirect(15001)]),
        (
            "out",
            vec![
                Expr::Daddr(Op::Eq, net("fd00::/65")),
                Expr::Dport(L4::Udp, Op::Eq, vec![53]),
                Expr::Counter,
                Expr::Redirect(15053),
            ],
        ),
        ("post", vec![Expr::Saddr(Op::Eq, net("10.0.0.0/8")), Expr::Masquerade]),
        ("mangle", vec![tcp(), Expr::CtState(CtState::INVALID), Expr::Counter, Expr::jump("plain")]),
        ("mangle", vec![tcp(), Expr::CtState(CtState::RELATED_ESTABLISHED), Expr::Counter, Expr::goto("plain")]),
        (
            "mangle",
            vec![
                tcp(),
                Expr::Daddr(Op::Ne, net("127.0.0.1/32")),
                Expr::Tproxy(false, 15006),
                Expr::SetMark(1337),
                Expr::Counter,
                Expr::Verdict(netns::nft::Verdict::Accept),
            ],
        ),
        ("mangle", vec![Expr::Mark(Op::Eq, 1337), Expr::Counter, Expr::SaveMark]),
        ("mangle", vec![Expr::CtMark(Op::Eq, 1337), Expr::Counter, Expr::RestoreMark]),
        ("mangle", vec![Expr::InSet(vec![netns::nft::Field::Ipv4Daddr], Op::Ne, "known".into()), Expr::Counter]),
        (
            "raw",
            vec![
                Expr::Sport(L4::Udp, Op::Eq, vec![15053]),
                Expr::SkUid(Op::Eq, vec![3]),
                Expr::Counter,
                Expr::CtZone(1),
            ],
        ),
        ("raw", vec![Expr::SkGid(Op::Ne, vec![3, 1, 2]), Expr::Counter, ret()]),
        ("filter", vec![tcp(), Expr::Ipv6(true), Expr::Reject(Rejection::TcpReset)]),
        ("filter", vec![Expr::Reject(Rejection::PortUnreachable)]),
    ];
    for (chain, exprs) in rules {
        b.add_rule(table, chain, &Rule::new(exprs));
    }
    b
}

#[test]
fn the_kernel_reads_what_nft_would_have_sent() {
    let (Some(ours), Some(theirs)) = (fresh(), fresh()) else { return };
    let table = Table::new(Family::Inet, "t");
    let batch = everything(&table);
    Nft::open_in(&ours).expect("socket").apply(&batch).expect("apply");
    // nft needs the dependency spelled out in front of a concatenation in `dnat to`.
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), batch.to_string()).expect("write");
    output(&theirs, "nft", &["-f", file.path().to_str().expect("path")]);
    let list = |ns| output(ns, "nft", &["-s", "list", "ruleset"]);
    assert_eq!(list(&theirs), list(&ours));
    // Elements come in the order of a randomly seeded hash.
    let debug = |ns| {
        let text = output(ns, "nft", &["--debug=netlink", "-s", "list", "ruleset"]);
        text.lines().filter(|l| !l.contains("element ")).map(|l| format!("{l}\n")).collect::<String>()
    };
    assert_eq!(debug(&theirs), debug(&ours));
}

#[test]
fn a_batch_knows_itself_again_and_sees_drift() {
    let Some(ns) = fresh() else { return };
    let table = Table::new(Family::Inet, "t");
    let batch = everything(&table);
    let mut nft = Nft::open_in(&ns).expect("socket");
    assert!(!nft.holds(&table, &batch).expect("holds"));
    nft.apply(&batch).expect("apply");
    assert!(nft.holds(&table, &batch).expect("holds"));
    let marks: Vec<u32> = nft.rules(&table).expect("rules").iter().filter_map(netns::nft::LiveRule::set_mark).collect();
    assert_eq!(marks, [1337]);
    output(&ns, "nft", &["add", "rule", "inet", "t", "plain", "counter"]);
    assert!(!nft.holds(&table, &batch).expect("holds"));
    nft.apply(&batch).expect("replace");
    assert!(nft.holds(&table, &batch).expect("holds"));

    let other = Batch::new();
    assert!(!nft.holds(&table, &other).expect("holds"));
    let mut elements = Batch::new();
    elements.replace_table(&table).add_chain(&table, "c", None);
    let rule = |ports: &[u16]| Rule::new([Expr::Dport(L4::Tcp, Op::Eq, ports.to_vec()), Expr::Counter]);
    elements.add_rule(&table, "c", &rule(&[1, 2]));
    nft.apply(&elements).expect("replace");
    let mut same_shape = Batch::new();
    same_shape.add_chain(&table, "c", None).add_rule(&table, "c", &rule(&[1, 3]));
    assert!(nft.holds(&table, &elements).expect("holds"));
    assert!(!nft.holds(&table, &same_shape).expect("holds"), "the sets differ");
}

#[test]
fn a_failing_batch_changes_nothing_and_names_the_culprit() {
    let Some(ns) = fresh() else { return };
    let table = Table::new(Family::Inet, "t");
    let mut batch = Batch::new();
    batch.add_table(&table).add_chain(&table, "c", None);
    batch.add_rule(&table, "c", &Rule::new([Expr::Counter, Expr::jump("nosuch")]));
    let mut nft = Nft::open_in(&ns).expect("socket");
    let error = nft.apply(&batch).expect_err("no such chain");
    assert_eq!(error.to_string(), "add rule inet t c counter jump nosuch");
    assert!(error.is_missing());
    let cause = std::error::Error::source(&error).expect("cause").to_string();
    assert!(cause.contains("No such file or directory"), "{cause}");
    assert_eq!(nft.tables().expect("tables"), []);
    assert!(nft.apply(Batch::new().delete_table(&table)).expect_err("no table").is_missing());
}

#[test]
fn two_thousand_rules_are_one_batch() {
    let Some(ns) = fresh() else { return };
    let table = Table::new(Family::Inet, "t");
    let mut batch = Batch::new();
    batch.replace_table(&table).add_chain(&table, "c", None).add_set(&table, "s", &[Type::Ipv4, Type::Port]);
    for port in 0..2000 {
        batch.add_rule(&table, "c", &Rule::new([Expr::Dport(L4::Tcp, Op::Eq, vec![port]), Expr::Counter]));
    }
    let element = |i: u32| vec![Value::Ip(std::net::Ipv4Addr::from(0x0a00_0000 + i).into()), Value::Port(80)];
    batch.add_elements(&table, "s", &(0..5000).map(element).collect::<Vec<_>>());
    let mut nft = Nft::open_in(&ns).expect("socket");
    let start = Instant::now();
    nft.apply(&batch).expect("apply");
    let took = start.elapsed();
    println!("2000 rules and 5000 elements: {took:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(nft.rules(&table).expect("rules").len(), 2000);
}
