//! `outrigger capture show | explain | doctor` on live rules.

use crate::behaviour::{BACKENDS, INJECTED, run, world};
use crate::output;
use crate::world::World;

#[test]
fn what_is_live_is_shown_whoever_made_it() {
    for (name, extra) in BACKENDS {
        let Some((world, extra)) = world(name, extra) else { continue };
        assert!(world.inspect("show").starts_with("No capture"));
        for mode in ["REDIRECT", "TPROXY"] {
            let flags = [
                "",
                "-m",
                mode,
                "--redirect-dns",
                "--capture-all-dns",
                "--dual-stack",
                "--drop-invalid",
                "-o",
                "25,26",
            ];
            run(&world, &[&INJECTED[..], &flags].concat(), &extra);
            let text = world.inspect("show");
            // Every rule of ours is understood, and every chain is led to.
            assert!(!text.contains('[') && text.contains("port 15006"), "{name} {mode}: {text}");
            assert!(!text.contains("nothing leads to") || mode == "TPROXY", "{name} {mode}: {text}");
            let value: serde_json::Value = serde_json::from_str(&world.inspect("show --json")).expect("JSON");
            assert!(value["tables"].as_array().is_some_and(|t| t.iter().any(|t| t["ours"] == true)));
            assert_eq!(value["programs"].as_array().map(Vec::len), Some(usize::from(name == "eBPF")));
        }
    }
}

#[test]
fn rules_of_others_that_decide_first_are_found() {
    let Some(world) = World::new(false) else { return };
    let native = ["--native-nftables".to_owned()];
    run(&world, &[&INJECTED[..], &["", "--dual-stack"]].concat(), &native);
    let healthy = world.inspect("doctor");
    assert!(!healthy.contains("problem"), "{healthy}");
    assert_eq!(healthy.matches("ok ").count(), healthy.lines().filter(|l| !l.starts_with(' ')).count(), "{healthy}");
    output(
        &world.pod,
        "nft",
        &[
            "add table ip theirs; add chain ip theirs o { type nat hook output priority -110; }; add rule ip theirs o tcp dport 80 counter redirect to :9999",
        ],
    );
    let text = world.inspect("explain --from app --to 192.0.2.1:80");
    assert!(
        text.contains("theirs (nftables, IPv4)") && text.contains("(not ours)") && text.contains("ends at port 9999"),
        "{text}"
    );
    let sick = world.inspect("doctor");
    assert!(
        sick.contains("problem  a rule of others decides an application's outbound connection before ours"),
        "{sick}"
    );
    assert!(sick.contains("mend: "));
}

#[test]
fn the_doctor_finds_what_is_wrong_and_names_what_mends_it() {
    let Some(world) = World::new(false) else { return };
    let problems = || {
        let text = world.inspect("doctor --json");
        let all: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        let bad = all.as_array().expect("list").iter().filter(|f| f["level"] != "ok");
        bad.map(|f| {
            assert!(
                f["mend"].is_string() || f["what"].as_str().is_some_and(|w| w.starts_with("nothing is captured")),
                "{f}"
            );
            f["what"].as_str().expect("text").to_owned()
        })
        .collect::<Vec<_>>()
        .join("\n")
    };
    let native = ["--native-nftables".to_owned()];
    assert!(problems().contains("nothing is captured here"));
    // Without --dual-stack IPv6 passes the proxy by.
    run(&world, &[&INJECTED[..], &[""]].concat(), &native);
    assert!(problems().contains("IPv6 traffic passes the proxy by"), "{}", problems());
    // The same rules in two back ends.
    run(&world, &[&INJECTED[..], &["", "--dual-stack", "-p", "15011"]].concat(), &native);
    assert!(problems().contains("nobody listens on port 15011"), "{}", problems());
    run(&world, &[&INJECTED[..], &["", "--dual-stack"]].concat(), &native);
    assert_eq!(problems(), "");
    output(&world.pod, "iptables-nft", &["-t", "nat", "-N", "ISTIO_OUTPUT"]);
    output(&world.pod, "iptables-nft", &["-t", "nat", "-A", "OUTPUT", "-j", "ISTIO_OUTPUT"]);
    assert!(problems().contains("every connection is captured twice"), "{}", problems());
    run(&world, &["--cleanup-only"], &native);
    // A policy rule that an old istio-iptables left.
    output(&world.pod, "ip", &["rule", "add", "fwmark", "1337", "lookup", "133"]);
    output(&world.pod, "ip", &["route", "add", "local", "default", "dev", "lo", "table", "133"]);
    assert!(problems().contains("policy rule of TPROXY (mark 1337, table 133) was left behind"), "{}", problems());
    run(&world, &[&INJECTED[..], &["", "-m", "TPROXY", "--dual-stack"]].concat(), &native);
    assert_eq!(problems(), "");
    output(&world.pod, "ip", &["rule", "del", "fwmark", "1337"]);
    assert!(problems().contains("no policy rule leads their packets to this host"), "{}", problems());
}
