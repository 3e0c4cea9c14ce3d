//! The six types of traffic and three special cases, sent for real, with the rules that they met. docs/traffic-types.md shows them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use serde_json::Value;

use crate::behaviour::{BACKENDS, INJECTED, run, world};
use crate::world::{APP, PROXY, World};

/// One connection, or one datagram.
struct Leg {
    /// `outside`, `app` or `proxy`
    who: &'static str,
    protocol: &'static str,
    to: (&'static str, u16),
    /// The address it is bound to before.
    bound: Option<&'static str>,
    what: &'static str,
    /// What answers.
    answer: &'static str,
    /// The port of this pod that it is led to.
    led: Option<u16>,
}

struct Type {
    title: &'static str,
    text: &'static str,
    flags: &'static [&'static str],
    legs: &'static [Leg],
}

const fn leg(
    who: &'static str,
    protocol: &'static str,
    to: (&'static str, u16),
    what: &'static str,
    answer: &'static str,
    led: Option<u16>,
) -> Leg {
    Leg { who, protocol, to, bound: None, what, answer, led }
}

const POD: &str = "10.244.0.7";
const OUTSIDE: &str = "10.244.0.1";
/// The address of a service that leads to this pod.
const SERVICE: &str = "10.96.0.50";

/// The proxy calls the application behind it from an address that is never captured.
const fn to_application() -> Leg {
    Leg {
        who: "proxy",
        protocol: "tcp",
        to: (POD, 8080),
        bound: Some("127.0.0.6"),
        what: "the proxy calls the application, from 127.0.0.6",
        answer: "app",
        led: None,
    }
}

const TYPES: [Type; 9] = [
    Type {
        title: "1. From another pod to this one",
        text: "The connection comes in by the proxy's inbound port; the proxy calls the application.",
        flags: &[],
        legs: &[
            leg(
                "outside",
                "tcp",
                (POD, 8080),
                "another pod calls port 8080",
                "proxy 15006 for 10.244.0.7:8080",
                Some(15006),
            ),
            to_application(),
        ],
    },
    Type {
        title: "2. From this pod to another one",
        text: "The application's connection is led to the proxy's outbound port; the proxy's own connection leaves untouched.",
        flags: &[],
        legs: &[
            leg(
                "app",
                "tcp",
                (OUTSIDE, 9000),
                "the application calls another pod",
                "proxy 15001 for 10.244.0.1:9000",
                Some(15001),
            ),
            leg("proxy", "tcp", (OUTSIDE, 9000), "the proxy calls that pod", "outside", None),
        ],
    },
    Type {
        title: "3. Prometheus to this pod",
        text: "The ports with metrics are not captured: 15020 is the agent's, 15090 the proxy's.",
        flags: &[],
        legs: &[
            leg("outside", "tcp", (POD, 15020), "Prometheus reads the merged metrics", "metrics", None),
            leg("outside", "tcp", (POD, 15090), "Prometheus reads the proxy's metrics", "stats", None),
        ],
    },
    Type {
        title: "4. This pod to itself",
        text: "Through its service's address the pod's own call goes through both ports of the proxy; by its own address it stays as it is.",
        flags: &[],
        legs: &[
            leg(
                "app",
                "tcp",
                (SERVICE, 80),
                "the application calls its own service",
                "proxy 15001 for 10.96.0.50:80",
                Some(15001),
            ),
            leg(
                "proxy",
                "tcp",
                (POD, 8080),
                "the proxy calls this pod, which it chose",
                "proxy 15006 for 10.244.0.7:8080",
                Some(15006),
            ),
            to_application(),
            leg("app", "tcp", (POD, 8080), "the application calls itself by the pod's address", "app", None),
            leg("app", "tcp", ("127.0.0.1", 8080), "the application calls itself by localhost", "app", None),
        ],
    },
    Type {
        title: "5. Inside the proxy, over loopback",
        text: "Agent and proxy talk over localhost, and nothing leads that elsewhere.",
        flags: &[],
        legs: &[
            leg("proxy", "tcp", ("127.0.0.1", 15000), "the agent asks the proxy's admin port", "admin", None),
            leg("proxy", "tcp", ("127.0.0.1", 15020), "the proxy asks the agent", "metrics", None),
        ],
    },
    Type {
        title: "6. The sidecar to the control plane",
        text: "Configuration and certificates come by connections of the proxy's user, which are never captured.",
        flags: &[],
        legs: &[leg("proxy", "tcp", (OUTSIDE, 15012), "the sidecar calls the control plane", "outside", None)],
    },
    Type {
        title: "7. A virtual machine without rules",
        text: "With captureMode NONE nothing is applied. Applications reach the proxy only where they call its ports themselves.",
        flags: &["--cleanup-only"],
        legs: &[
            leg("app", "tcp", (OUTSIDE, 9000), "the application calls another pod", "outside", None),
            leg("outside", "tcp", (POD, 8080), "another pod calls port 8080", "app", None),
            leg(
                "app",
                "tcp",
                ("127.0.0.1", 15001),
                "the application calls the proxy itself",
                "proxy 15001 for 127.0.0.1:15001",
                None,
            ),
        ],
    },
    Type {
        title: "8. A subnet captured only in part",
        text: "`-i 10.244.0.0/24 -x 10.244.0.128/25`: the first half of the subnet is captured, the second half and the rest are not.",
        flags: &["-i", "10.244.0.0/24", "-x", "10.244.0.128/25"],
        legs: &[
            leg(
                "app",
                "tcp",
                (OUTSIDE, 9000),
                "the application calls into the first half",
                "proxy 15001 for 10.244.0.1:9000",
                Some(15001),
            ),
            leg("app", "tcp", ("10.244.0.200", 9000), "the application calls into the second half", "", None),
            leg("app", "tcp", ("192.0.2.1", 80), "the application calls another subnet", "", None),
        ],
    },
    Type {
        title: "9. DNS",
        text: "`--redirect-dns --capture-all-dns`: the application asks the agent, whatever server it names; the agent asks the server.",
        flags: &["--redirect-dns", "--capture-all-dns"],
        legs: &[
            leg("app", "udp", (OUTSIDE, 53), "the application asks a name server", "agent", Some(15053)),
            leg("proxy", "udp", (OUTSIDE, 53), "the agent asks that server", "server", None),
            leg(
                "app",
                "tcp",
                (OUTSIDE, 53),
                "the application asks over TCP, where this agent does not listen",
                "",
                Some(15053),
            ),
            leg("app", "udp", (OUTSIDE, 123), "the application asks for the time", "time", None),
        ],
    },
];

const HEAD: &str = "# Types of traffic

Which rules each type of traffic meets, for every back end and mode. The test `traffic::every_type_of_traffic_meets_its_rules` sends
each of them through a pod (10.244.0.7, its proxy is user 1337; the network outside is 10.244.0.1), reads every rule's counter before
and after, compares them with what `outrigger capture explain` says, and writes this page (`UPDATE=1 cargo test -p capture traffic`).

A way reads `chain number (+packets) > chain number …`. Rules of the nat tables see the first packet of a connection, those of mangle
and raw (`+n`) all of them. iptables-legacy has the same rules as iptables-nft and is one line with it where the ways are equal.
Flags, unless others are named: `-u 1337 -g 1337 -i '*' -b '*' -d 15090,15021,15020`.
";

type Counters = BTreeMap<(String, String, u64), u64>;

fn counters(world: &World) -> Counters {
    let text = world.inspect("show --json");
    let shown: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let mut all = Counters::new();
    let mut add = |title: &str, chain: &str, rules: &Value| {
        for rule in rules.as_array().into_iter().flatten() {
            let key = (title.to_owned(), chain.to_owned(), rule["rule"].as_u64().expect("number"));
            all.insert(key, rule["packets"].as_u64().expect("packets"));
        }
    };
    for table in shown["tables"].as_array().into_iter().flatten() {
        for chain in table["chains"].as_array().into_iter().flatten() {
            add(table["title"].as_str().expect("title"), chain["chain"].as_str().expect("chain"), &chain["rules"]);
        }
    }
    for programs in shown["programs"].as_array().into_iter().flatten() {
        for rule in programs["rules"].as_array().into_iter().flatten() {
            add("eBPF programs", rule["chain"].as_str().expect("chain"), &Value::Array(vec![rule.clone()]));
        }
    }
    all
}

/// Sends one leg, checks it, and draws its way.
fn send(world: &World, leg: &Leg, what: &str) -> String {
    let (to, port) = leg.to;
    let udp = if leg.protocol == "udp" { " --udp" } else { "" };
    let from = leg.bound.map(|ip| format!(" --source {ip}")).unwrap_or_default();
    let text = world.inspect(&format!("explain --json --from {} --to {to}:{port}{udp}{from}", leg.who));
    let trace: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{what}: {e}: {text}"));
    let before = counters(world);
    let answer = match leg.who {
        "outside" => world.outside_asks(to, port),
        who => world.pod_asks(if who == "app" { APP } else { PROXY }, leg.protocol, to, port, leg.bound),
    };
    let after = counters(world);
    assert!(
        answer.starts_with(leg.answer) && (!leg.answer.is_empty() || answer.is_empty()),
        "{what}: wanted {:?}, got {answer:?}\n{text}",
        leg.answer
    );
    assert_eq!(trace["port"].as_u64(), leg.led.map(u64::from), "{what}: {text}");
    let mut way = Vec::new();
    for step in trace["steps"].as_array().expect("steps") {
        let (table, chain) = (step["table"].as_str().expect("table"), step["chain"].as_str().expect("chain"));
        let number = step["rule"].as_u64().expect("number");
        let key = (table.to_owned(), chain.to_owned(), number);
        let more = after[&key] - before[&key];
        assert!(more > 0, "{what}: {key:?} was not met\n{text}");
        let every_packet = table.contains("mangle") || table.contains("raw");
        let table = table.split(' ').next().unwrap_or_default().trim_start_matches("istio-proxy-");
        let more = if every_packet { "n".to_owned() } else { more.to_string() };
        way.push(format!("{table} {chain} {number} (+{more})"));
    }
    way.push(match leg.led {
        Some(port) => format!("port {port}"),
        None if leg.answer.is_empty() => "where it was going (nobody is there)".to_owned(),
        None => "where it was going".to_owned(),
    });
    way.join(" > ")
}

#[test]
fn every_type_of_traffic_meets_its_rules() {
    // (type, leg) -> back end and mode -> way
    let mut ways: BTreeMap<(usize, usize), Vec<(String, String)>> = BTreeMap::new();
    let mut complete = true;
    for (name, extra) in BACKENDS {
        let Some((world, extra)) = world(name, extra) else {
            complete = false;
            continue;
        };
        for mode in ["REDIRECT", "TPROXY"] {
            for (kind, at) in TYPES.iter().zip(0..) {
                run(&world, &["--cleanup-only"], &extra);
                if kind.flags != ["--cleanup-only"] {
                    run(&world, &[&INJECTED[..], &["", "-m", mode], kind.flags].concat(), &extra);
                }
                for (leg, number) in kind.legs.iter().zip(0..) {
                    let what = format!("{name} {mode}, {}: {}", kind.title, leg.what);
                    ways.entry((at, number)).or_default().push((format!("{name}, {mode}"), send(&world, leg, &what)));
                }
            }
        }
    }
    let mut page = HEAD.to_owned();
    for (kind, at) in TYPES.iter().zip(0..) {
        let _ = write!(page, "\n## {}\n\n{}\n", kind.title, kind.text);
        for (leg, number) in kind.legs.iter().zip(0..) {
            let to = leg.to;
            let _ = write!(page, "\n{} ({}, {}:{}):\n\n```text\n", capital(leg.what), leg.protocol, to.0, to.1);
            let mut lines: Vec<(Vec<&str>, &str)> = Vec::new();
            for (who, way) in ways.get(&(at, number)).into_iter().flatten() {
                match lines.iter_mut().find(|(_, there)| there == way) {
                    Some((names, _)) => names.push(who),
                    None => lines.push((vec![who], way)),
                }
            }
            for (names, way) in lines {
                let _ = write!(page, "{}\n  {way}\n", names.join("; "));
            }
            page.push_str("```\n");
        }
    }
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/traffic-types.md");
    if !complete {
        println!("SKIPPED in part: docs/traffic-types.md is not compared, since not every back end works here");
        return;
    }
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &page).expect("write");
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = page.lines().zip(there.lines()).find(|(a, b)| a != b);
    assert!(page == there, "docs/traffic-types.md is old (UPDATE=1 writes it): {differs:#?}");
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}
