use super::*;

use envoy_api::any;

fn chain(name: &str, criteria: pb::listener::FilterChainMatch) -> pb::listener::FilterChain {
    let proxy = pb::network_filter::tcp_proxy::v3::TcpProxy {
        stat_prefix: name.into(),
        cluster_specifier: Some(pb::network_filter::tcp_proxy::v3::tcp_proxy::ClusterSpecifier::Cluster(name.into())),
        ..Default::default()
    };
    pb::listener::FilterChain {
        name: name.into(),
        filter_chain_match: Some(criteria),
        filters: vec![pb::listener::Filter {
            name: "tcp".into(),
            config_type: Some(pb::listener::filter::ConfigType::TypedConfig(any(&proxy))),
        }],
        ..Default::default()
    }
}

fn listener(name: &str, port: u16, chains: Vec<pb::listener::FilterChain>) -> pb::listener::Listener {
    let socket = pb::core::SocketAddress {
        address: "0.0.0.0".into(),
        port_specifier: Some(pb::core::socket_address::PortSpecifier::PortValue(port.into())),
        ..Default::default()
    };
    pb::listener::Listener {
        name: name.into(),
        address: Some(pb::core::Address { address: Some(pb::core::address::Address::SocketAddress(socket)) }),
        filter_chains: chains,
        ..Default::default()
    }
}

fn cidr(prefix: &str, length: u32) -> pb::core::CidrRange {
    pb::core::CidrRange { address_prefix: prefix.into(), prefix_len: Some(pb::UInt32Value { value: length }) }
}

type Match = pb::listener::FilterChainMatch;

/// Destination, source, SNI, transport, protocols, and the chain.
type Call<'a> = (&'a str, &'a str, &'a str, &'a str, &'a [&'a str], Option<&'a str>);

#[track_caller]
fn check(chains: Vec<pb::listener::FilterChain>, calls: &[Call<'_>]) {
    let listener = Listener::compile(&listener("l", 80, chains), &Options::default()).unwrap();
    for (destination, source, sni, transport, protocols, expected) in calls {
        let address = |text: &str| Address::Ip(text.parse().unwrap());
        let protocols: Vec<Vec<u8>> = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
        let found = listener.find_chain(&ChainInput {
            destination: &address(destination),
            source: &address(source),
            direct_source: &address(source),
            server_name: sni,
            transport_protocol: transport,
            application_protocols: &protocols,
        });
        assert_eq!(found.map(|c| &*c.name), *expected, "{destination} {source} {sni} {transport} {protocols:?}");
    }
}

#[test]
fn port_comes_first_and_is_never_given_back() {
    let port = |p| Some(pb::UInt32Value { value: p });
    check(
        vec![
            chain(
                "port",
                Match { destination_port: port(81), server_names: vec!["a.test".into()], ..Default::default() },
            ),
            chain("any", Match::default()),
        ],
        &[
            ("1.1.1.1:81", "2.2.2.2:9", "a.test", "tls", &[], Some("port")),
            // The port's chains do not fit, and those without a port are not tried any more.
            ("1.1.1.1:81", "2.2.2.2:9", "b.test", "tls", &[], None),
            ("1.1.1.1:82", "2.2.2.2:9", "a.test", "tls", &[], Some("any")),
        ],
    );
}

#[test]
fn longest_prefix_then_name_then_transport_then_protocol() {
    let ranges = |p: &str, l| vec![cidr(p, l)];
    check(
        vec![
            chain("wide", Match { prefix_ranges: ranges("10.0.0.0", 8), ..Default::default() }),
            chain(
                "narrow",
                Match { prefix_ranges: ranges("10.1.0.0", 16), transport_protocol: "tls".into(), ..Default::default() },
            ),
            chain("exact", Match { server_names: vec!["a.b.test".into()], ..Default::default() }),
            chain("star", Match { server_names: vec!["*.b.test".into()], ..Default::default() }),
            chain(
                "h2",
                Match {
                    application_protocols: vec!["h2".into()],
                    transport_protocol: "tls".into(),
                    ..Default::default()
                },
            ),
            chain("raw", Match { transport_protocol: "raw_buffer".into(), ..Default::default() }),
        ],
        &[
            ("10.2.0.1:1", "2.2.2.2:9", "", "", &[], Some("wide")),
            ("10.1.0.1:1", "2.2.2.2:9", "", "tls", &[], Some("narrow")),
            ("10.1.0.1:1", "2.2.2.2:9", "", "raw_buffer", &[], None),
            ("1.1.1.1:1", "2.2.2.2:9", "a.b.test", "tls", &[], Some("exact")),
            ("1.1.1.1:1", "2.2.2.2:9", "c.b.test", "tls", &["h2"], Some("star")),
            ("1.1.1.1:1", "2.2.2.2:9", "x.test", "tls", &["x", "h2"], Some("h2")),
            ("1.1.1.1:1", "2.2.2.2:9", "b.test", "raw_buffer", &[], Some("raw")),
            ("1.1.1.1:1", "2.2.2.2:9", "", "tls", &[], None),
        ],
    );
}

#[test]
fn source_type_range_and_port() {
    let sources = |p: &str, l| vec![cidr(p, l)];
    check(
        vec![
            chain("local", Match { source_type: 1, ..Default::default() }),
            chain("range", Match { source_prefix_ranges: sources("10.0.0.0", 8), ..Default::default() }),
            chain(
                "range-port",
                Match { source_prefix_ranges: sources("10.0.0.0", 8), source_ports: vec![7], ..Default::default() },
            ),
        ],
        &[
            ("1.1.1.1:1", "127.0.0.1:9", "", "", &[], Some("local")),
            ("1.1.1.1:1", "1.1.1.1:9", "", "", &[], Some("local")),
            ("1.1.1.1:1", "10.0.0.9:9", "", "", &[], Some("range")),
            ("1.1.1.1:1", "10.0.0.9:7", "", "", &[], Some("range-port")),
            ("1.1.1.1:1", "11.0.0.9:7", "", "", &[], None),
        ],
    );
}

#[test]
fn equal_criteria_are_refused_with_both_names() {
    let chains = vec![chain("one", Match::default()), chain("two", Match::default())];
    let rejected = Listener::compile(&listener("l", 80, chains), &Options::default()).unwrap_err();
    assert_eq!(
        rejected.to_string(),
        "listener l: filter_chains[1]: filter chain 'two' has the same matching rules defined as 'one'"
    );
}

#[test]
fn names_have_no_case_and_ports_are_ports() {
    let named = |name: &str| Match { server_names: vec![name.into()], ..Default::default() };
    check(
        vec![chain("one", named("One.Test")), chain("any", named("*.Any.Test"))],
        &[
            ("1.1.1.1:80", "2.2.2.2:1", "one.test", "tls", &[], Some("one")),
            ("1.1.1.1:80", "2.2.2.2:1", "x.any.test", "tls", &[], Some("any")),
        ],
    );
    let refused = |criteria: Match| {
        let error = Listener::compile(&listener("l", 80, vec![chain("a", criteria)]), &Options::default());
        error.expect_err("port zero").to_string()
    };
    assert!(refused(Match { source_ports: vec![0], ..Default::default() }).contains("source_ports"));
    let zero = Some(pb::UInt32Value { value: 0 });
    assert!(refused(Match { destination_port: zero, ..Default::default() }).contains("destination_port"));
}

#[test]
fn a_filter_behind_the_last_is_refused() {
    let mut twice = chain("c", Match::default());
    let again = twice.filters[0].clone();
    twice.filters.push(again);
    let rejected = Listener::compile(&listener("l", 80, vec![twice]), &Options::default()).unwrap_err();
    assert_eq!(rejected.field, "filter_chains[0].filters[0]");
}

#[test]
fn original_destination_finds_exact_then_wildcard_then_itself() {
    let compile = |l: pb::listener::Listener| Arc::new(Listener::compile(&l, &Options::default()).unwrap());
    let from = compile(listener("virtualOutbound", 15001, vec![chain("c", Match::default())]));
    let wildcard = compile(listener("0.0.0.0_80", 80, vec![chain("c", Match::default())]));
    let mut exact = listener("10.0.0.1_80", 80, vec![chain("c", Match::default())]);
    if let Some(pb::core::address::Address::SocketAddress(socket)) =
        exact.address.as_mut().and_then(|a| a.address.as_mut())
    {
        socket.address = "10.0.0.1".into();
    }
    let set = ListenerSet::new([Arc::clone(&from), wildcard, compile(exact)]);
    let name = |to: &str| set.find_original_dst(&from, to.parse().unwrap()).name.to_string();
    assert_eq!(name("10.0.0.1:80"), "10.0.0.1_80");
    assert_eq!(name("10.0.0.2:80"), "0.0.0.0_80");
    assert_eq!(name("10.0.0.2:81"), "virtualOutbound");
    assert_eq!(name("[::1]:80"), "virtualOutbound");
}
