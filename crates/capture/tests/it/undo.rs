//! Whatever happens, a clean-up leaves the namespace as it was, and a second run the same as the first.

use std::process::{Command, Stdio};

use netns::Netns;

use crate::{TOOL, apply, output, pod, tool};

const FLAGS: [&[&str]; 4] = [
    &[
        "-u",
        "1337",
        "-i",
        "*",
        "-b",
        "*",
        "-d",
        "15090,15021,15020",
        "--redirect-dns",
        "--capture-all-dns",
        "--dual-stack",
    ],
    &[
        "-m",
        "TPROXY",
        "-i",
        "*",
        "-b",
        "80,81",
        "-t",
        "77",
        "-r",
        "155",
        "--drop-invalid",
        "--dual-stack",
        "-c",
        "net1",
    ],
    &["-i", "10.0.0.0/8,2001:db8::/32", "-b", "*", "-k", "tap0,tap1", "-c", "net1,net2", "--dual-stack", "-o", "25"],
    &["-i", "*", "-b", "80,8000:8100,9000:", "-o", ":100,0:65535"],
];
const BACKENDS: [&[&str]; 3] =
    [&["--native-nftables"], &["--force-iptables-binary", "nft"], &["--force-iptables-binary", "legacy"]];
const ADDRESSES: [&str; 2] = ["10.244.0.7/24", "fd00:10:244::7/64"];

/// Everything that capture could change, without counters and handles.
fn state(ns: &Netns) -> String {
    let legacy = |program: &str| {
        output(ns, program, &[])
            .lines()
            .filter(|l| !l.starts_with('#'))
            .map(strip_counters)
            .collect::<Vec<_>>()
            .join("\n")
    };
    let mut parts = vec![output(ns, "nft", &["-s", "list", "ruleset"])];
    parts.extend([legacy("iptables-legacy-save"), legacy("ip6tables-legacy-save")]);
    for args in [
        &["rule"][..],
        &["-6", "rule"],
        &["route", "show", "table", "all"],
        &["-6", "route", "show", "table", "all"],
        &["-o", "addr"],
    ] {
        let text = output(ns, "ip", args);
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        parts.push(lines.join("\n"));
    }
    // Link-local addresses are drawn by lot and come up in their own time, and so do the kernel's own routes.
    parts
        .join("\n----\n")
        .lines()
        .filter(|l| !l.contains("fe80:") && !l.contains("proto kernel"))
        .map(|l| format!("{l}\n"))
        .collect()
}

/// Legacy chain lines carry packet counters: `:OUTPUT ACCEPT [3:180]`.
fn strip_counters(line: &str) -> String {
    if line.starts_with(':') { line.split(" [").next().unwrap_or_default().to_owned() } else { line.to_owned() }
}

/// Rules and sets of other people, in both kernel interfaces.
fn furnish(ns: &Netns, legacy: bool) {
    output(
        ns,
        "nft",
        &[
            "add table inet theirs; add chain inet theirs output { type nat hook output priority -100; }; add rule inet theirs output tcp dport 7 counter",
        ],
    );
    let iptables = if legacy { "iptables-legacy" } else { "iptables-nft" };
    for rule in [
        &["-t", "nat", "-A", "PREROUTING", "-i", "eth9", "-j", "RETURN"][..],
        &["-t", "nat", "-N", "THEIRS"],
        &["-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "9", "-j", "THEIRS"],
        &["-t", "mangle", "-A", "PREROUTING", "-p", "tcp", "-j", "MARK", "--set-mark", "5"],
    ] {
        output(ns, iptables, rule);
    }
    output(ns, "ip", &["rule", "add", "fwmark", "9", "lookup", "99"]);
    // A legacy program loads its tables, even when it only looks; that is no change of ours.
    output(ns, "iptables-legacy", &["-t", "raw", "-S"]);
    for table in ["nat", "mangle", "raw"] {
        output(ns, "ip6tables-legacy", &["-t", table, "-S"]);
        output(ns, "iptables-legacy", &["-t", table, "-S"]);
    }
}

#[test]
fn a_clean_up_with_other_flags_leaves_the_namespace_as_it_was() {
    for backend in BACKENDS {
        for furnished in [false, true] {
            for flags in FLAGS {
                let Some(ns) = pod(&ADDRESSES) else { return };
                if furnished {
                    furnish(&ns, backend.contains(&"legacy"));
                } else if backend.contains(&"legacy") {
                    for (program, table) in ["iptables-legacy", "ip6tables-legacy"]
                        .into_iter()
                        .flat_map(|p| ["nat", "mangle", "raw"].map(|t| (p, t)))
                    {
                        output(&ns, program, &["-t", table, "-S"]);
                    }
                }
                let before = state(&ns);
                apply(&ns, &[flags, backend].concat());
                assert_ne!(state(&ns), before);
                apply(&ns, &["--cleanup-only"]);
                let passthrough = |text: String| {
                    text.lines().filter(|l| !l.contains("::6")).map(|l| format!("{l}\n")).collect::<String>()
                };
                pretty(
                    &passthrough(before),
                    &passthrough(state(&ns)),
                    &format!("{backend:?} {flags:?} furnished {furnished}"),
                );
            }
        }
    }
}

#[track_caller]
fn pretty(want: &str, got: &str, what: &str) {
    if want != got {
        let missing: Vec<_> = want.lines().filter(|l| !got.lines().any(|g| g == *l)).collect();
        let extra: Vec<_> = got.lines().filter(|l| !want.lines().any(|w| w == *l)).collect();
        let first = want.lines().zip(got.lines()).find(|(w, g)| w != g);
        panic!("{what}: missing {missing:#?} extra {extra:#?} first {first:#?}");
    }
}

#[test]
fn the_same_flags_twice_change_nothing_and_other_flags_replace() {
    for backend in BACKENDS {
        let Some(reference) = pod(&ADDRESSES) else { return };
        let Some(ns) = pod(&ADDRESSES) else { return };
        for flags in FLAGS {
            let args = [flags, backend].concat();
            apply(&ns, &args);
            let first = output(&ns, "nft", &["-s", "-a", "list", "ruleset"]) + &state(&ns);
            apply(&ns, &args);
            // With handles: not one rule was written again.
            pretty(
                &first,
                &(output(&ns, "nft", &["-s", "-a", "list", "ruleset"]) + &state(&ns)),
                &format!("{args:?} twice"),
            );
            // The same as in a namespace that never knew other flags, but for what fell out of use.
            apply(&reference, &["--cleanup-only"]);
            apply(&reference, &args);
            let rules = |ns: &Netns| {
                let text = output(ns, "iptables-legacy-save", &[])
                    + &output(ns, "ip6tables-legacy-save", &[])
                    + &output(ns, "iptables-save", &[])
                    + &output(ns, "ip6tables-save", &[]);
                let native: String = output(ns, "nft", &["-s", "list", "ruleset"])
                    .lines()
                    .skip_while(|l| !l.contains("istio-proxy"))
                    .collect();
                (
                    text.lines().filter(|l| l.starts_with("-A ")).map(|l| format!("{l}\n")).collect::<String>()
                        + &native,
                    output(ns, "ip", &["rule"]),
                )
            };
            pretty(&rules(&reference).0, &rules(&ns).0, &format!("{args:?} after others"));
            assert_eq!(rules(&reference).1, rules(&ns).1);
        }
    }
}

#[test]
fn drift_is_repaired_and_the_rules_of_others_are_no_drift() {
    let Some(ns) = pod(&ADDRESSES) else { return };
    let args = [FLAGS[0], BACKENDS[1]].concat();
    apply(&ns, &args);
    let good = output(&ns, "nft", &["-s", "list", "ruleset"]);
    output(&ns, "iptables-nft", &["-t", "nat", "-A", "ISTIO_INBOUND", "-p", "tcp", "--dport", "123", "-j", "ACCEPT"]);
    output(&ns, "iptables-nft", &["-t", "nat", "-D", "OUTPUT", "1"]);
    apply(&ns, &args);
    pretty(&good, &output(&ns, "nft", &["-s", "list", "ruleset"]), "drift");
    output(&ns, "iptables-nft", &["-t", "nat", "-I", "OUTPUT", "1", "-p", "tcp", "--dport", "9", "-j", "RETURN"]);
    let with_theirs = output(&ns, "nft", &["-s", "-a", "list", "ruleset"]);
    apply(&ns, &args);
    pretty(&with_theirs, &output(&ns, "nft", &["-s", "-a", "list", "ruleset"]), "others");
}

#[test]
fn a_changed_back_end_leaves_nothing_of_the_old_one() {
    for (from, to) in [(0, 1), (1, 0), (1, 2), (2, 0), (0, 2), (2, 1)] {
        let Some(ns) = pod(&ADDRESSES) else { return };
        apply(&ns, &[FLAGS[0], BACKENDS[from]].concat());
        apply(&ns, &[FLAGS[0], BACKENDS[to]].concat());
        let native = output(&ns, "nft", &["-s", "list", "ruleset"]).contains("istio-proxy");
        let nft = output(&ns, "iptables-nft-save", &[]).contains("ISTIO_");
        let legacy = output(&ns, "iptables-legacy-save", &[]).contains("ISTIO_");
        assert_eq!([native, nft, legacy], [to == 0, to == 1, to == 2], "{from} -> {to}");
    }
}

/// Runs the program under strace; the positions, from 1, of the calls of this name whose line holds `text`.
pub(crate) fn calls(ns: &Netns, args: &[&str], name: &str, text: &str) -> Option<Vec<usize>> {
    let file = tempfile::NamedTempFile::new().expect("file");
    let mut command = Command::new("strace");
    command.arg("-qq").arg("-o").arg(file.path()).args(["-e", &format!("trace={name}"), TOOL]).args(args);
    match ns.run(|| command.output()).expect("enter") {
        Ok(out) if out.status.success() => {}
        other => {
            println!("SKIPPED: needs strace to stop the program at a system call: {other:?}");
            return None;
        }
    }
    let lines = std::fs::read_to_string(file.path()).expect("strace's lines");
    let calls = lines.lines().filter(|line| line.starts_with(&format!("{name}("))).zip(1..);
    Some(calls.filter(|(line, _)| line.contains(text)).map(|(_, at)| at).collect())
}

/// Runs the program and kills it, or the program that it runs, before the given call of this name takes effect.
/// False: it made no such call.
pub(crate) fn kill_at(ns: &Netns, args: &[&str], name: &str, at: usize) -> bool {
    let mut command = Command::new("strace");
    let inject = format!("inject={name}:error=EINTR:signal=KILL:when={at}");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={name}"), "-e", &inject, TOOL]).args(args);
    let status = ns.run(|| command.stderr(Stdio::null()).status()).expect("enter").expect("strace");
    !status.success()
}

/// The system calls by which each back end changes the kernel's state: netlink messages, and for legacy iptables socket options.
const CHANGES: [&[&str]; 3] = [&["sendto"], &["sendto", "sendmsg"], &["sendto", "setsockopt"]];

#[test]
fn killed_at_every_call_that_changes_state_and_run_again_it_is_the_same() {
    if calls(&pod(&ADDRESSES).expect("namespace"), &["--dry-run"], "sendto", "").is_none() {
        return;
    }
    for (backend, changes) in BACKENDS.into_iter().zip(CHANGES) {
        let args = [FLAGS[1], backend].concat();
        let Some(reference) = pod(&ADDRESSES) else { return };
        apply(&reference, &args);
        let want = state(&reference);
        // One namespace for all steps: each starts from a clean one, which the clean-up before is tested to leave.
        let Some(ns) = pod(&ADDRESSES) else { return };
        state(&ns);
        for name in changes {
            let mut steps = 0;
            while kill_at(&ns, &args, name, steps + 1) {
                steps += 1;
                apply(&ns, &args);
                pretty(&want, &state(&ns), &format!("{backend:?} killed at {name} {steps}"));
                apply(&ns, &["--cleanup-only"]);
                let left = state(&ns);
                assert!(!left.contains("ISTIO_") && !left.contains("istio-") && !left.contains("fwmark"), "{left}");
            }
            assert!(steps > 0, "{backend:?} makes no call {name}");
            println!("{backend:?}: killed at {steps} calls of {name}");
            apply(&ns, &["--cleanup-only"]);
        }
    }
}

/// The same on the way from other rules: whatever is there at the moment of death, a second run brings the new rules, and at no
/// moment is there none.
#[test]
fn killed_while_it_replaces_there_are_always_rules() {
    if calls(&pod(&ADDRESSES).expect("namespace"), &["--dry-run"], "sendto", "").is_none() {
        return;
    }
    for (backend, changes) in BACKENDS.into_iter().zip(CHANGES) {
        let (old, new) = ([FLAGS[0], backend].concat(), [FLAGS[2], backend].concat());
        let Some(ns) = pod(&ADDRESSES) else { return };
        apply(&ns, &old);
        apply(&ns, &new);
        let want = state(&ns);
        for name in changes {
            let mut steps = 0;
            loop {
                apply(&ns, &old);
                if !kill_at(&ns, &new, name, steps + 1) {
                    break;
                }
                steps += 1;
                let between = state(&ns);
                assert!(
                    between.contains("jump istio-output")
                        || between.contains("-j ISTIO_OUTPUT")
                        || between.contains("jump ISTIO_OUTPUT"),
                    "{backend:?} {name} {steps}: {between}"
                );
                apply(&ns, &new);
                pretty(&want, &state(&ns), &format!("{backend:?} killed at {name} {steps}"));
            }
        }
    }
}

#[test]
fn a_dry_run_and_refusals_change_nothing() {
    let Some(ns) = pod(&ADDRESSES) else { return };
    let before = state(&ns);
    for (args, status) in [
        (&["--dry-run", "-b", "*"][..], 0),
        (&["--dry-run", "--native-nftables", "-b", "*"], 0),
        (&["--nosuch"], 255),
        (&["-b", "http"], 1),
        (&["-b", "8100:8000"], 1),
        (&["-i", "10.0.0.0"], 1),
        (&["-c", "a/b"], 1),
        (&["--force-iptables-binary", "foo"], 1),
        (&["--skip-rule-apply"], 0),
        (&["--cleanup-only", "--dry-run"], 0),
    ] {
        let out = tool(&ns, args, &[]);
        assert_eq!(out.status.code(), Some(status), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        pretty(&before, &state(&ns), &format!("{args:?}"));
    }
    let out = tool(&ns, &["-b", "*"], &[("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "no-such-group")]);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&out.stderr)
            .contains("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE \"no-such-group\": no such group here")
    );
    let Some(empty) = pod(&[]) else { return };
    let out = tool(&empty, &[], &[]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("no valid local IP address found"));
}

/// Without iptables in the image the kernel is spoken to directly.
#[test]
fn no_iptables_is_needed() {
    let Some(ns) = pod(&ADDRESSES) else { return };
    let out = tool(&ns, FLAGS[0], &[("PATH", "/nowhere")]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(output(&ns, "nft", &["-s", "list", "ruleset"]).contains("istio-proxy-nat"));
    let out = tool(&ns, &["--force-iptables-binary", "nft"], &[("PATH", "/nowhere")]);
    assert_eq!(out.status.code(), Some(1));
}

#[test]
fn without_privileges_the_message_says_so() {
    let Some(ns) = pod(&ADDRESSES) else { return };
    for backend in BACKENDS {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=1000", "--regid=1000", "--clear-groups", TOOL]).args(FLAGS[0]).args(backend);
        let out = ns.run(|| command.output()).expect("enter").expect("setpriv");
        assert_eq!(out.status.code(), Some(1));
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(text.contains("needs root and CAP_NET_ADMIN"), "{text}");
    }
}
