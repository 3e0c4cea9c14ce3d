//! The rules in the kernel against those that the reference makes, case by case.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Known faults of the reference, where the better behaviour is wanted: capture.md, section 8. Tests of our own cover them.
const FAULTS: [&str; 17] = [
    "cleanup-only-other-flags-forced-nft",
    "rerun-different-forced-nft",
    "rerun-drift-in-istio-chain-forced-nft",
    "rerun-same-force-forced-nft",
    "owner-groups-64",
    "nft-owner-groups-64",
    "run-validation",
    "nft-run-validation",
    "tproxy-rerun-forced-nft",
    "nft-tproxy-rerun",
    "cleanup-tproxy-forced-nft",
    "nft-dry-run",
    "bad-port",
    "nft-bad-port",
    "dual-addr-without-dual-flag",
    "preexisting-v6-istio-chain",
    "tproxy-no-inbound",
];

const SCRIPT: &str = r#"
ip link set lo up
sysctl -qw net.ipv6.conf.all.disable_ipv6=0 2>/dev/null
ip link add eth0 type veth peer name eth0p && ip link set eth0 up && ip link set eth0p up
while read -r dev addr; do case $addr in *:*) ip -6 addr add "$addr" dev "$dev" nodad;; ?*) ip addr add "$addr" dev "$dev";; esac; done < "$OUT/addresses"
[ -f "$OUT/resolv.conf" ] && mount --bind "$OUT/resolv.conf" /etc/resolv.conf
[ -s "$OUT/before" ] && bash "$OUT/before" > "$OUT/before.log" 2>&1
$RUNAS "$TOOL" istio-iptables "$@" > "$OUT/log" 2>&1; echo $? > "$OUT/exit-code"
iptables-save > "$OUT/iptables-save.v4" 2>/dev/null; ip6tables-save > "$OUT/iptables-save.v6" 2>/dev/null
iptables-legacy-save > "$OUT/iptables-legacy-save.v4" 2>/dev/null; ip6tables-legacy-save > "$OUT/iptables-legacy-save.v6" 2>/dev/null
nft -s list ruleset > "$OUT/nft-ruleset" 2>&1
ip rule > "$OUT/ip-rule.v4"; ip -6 rule > "$OUT/ip-rule.v6" 2>/dev/null
ip route show table all > "$OUT/ip-route.v4" 2>/dev/null
ip -6 route show table all 2>/dev/null | sed -E 's/ metric [0-9]+//' > "$OUT/ip-route.v6"
ip -6 -o addr show dev lo 2>/dev/null | awk '{print $4}' > "$OUT/lo-addr.v6"
"#;

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

/// (table, chain) -> rules.
type Rules = BTreeMap<(String, String), Vec<String>>;

/// The rules of an `iptables-save` text.
fn saved(text: &str) -> Rules {
    let (mut all, mut table) = (BTreeMap::new(), String::new());
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.trim().to_owned();
        } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) {
            let words = rule.split_whitespace().collect::<Vec<_>>().join(" ");
            all.entry((table.clone(), chain.to_owned())).or_insert_with(Vec::new).push(words);
        }
    }
    all
}

/// The lines of our native tables in `nft list ruleset`.
fn native(text: &str) -> Rules {
    let (mut all, mut table, mut chain) = (BTreeMap::new(), String::new(), String::new());
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches(" {").to_owned();
        } else if let Some(name) = line.strip_prefix("chain ") {
            chain = name.trim_end_matches(" {").to_owned();
        } else if !matches!(line, "" | "}") && table.contains("istio-proxy") {
            all.entry((table.clone(), chain.clone())).or_insert_with(Vec::new).push(line.to_owned());
        }
    }
    all
}

fn lines(text: &str, keep: impl Fn(&str) -> bool) -> Rules {
    let mut all: Vec<String> = text
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|l| !l.is_empty() && keep(l))
        .collect();
    all.sort();
    [((String::new(), String::new()), all)].into()
}

fn run(folder: &Path, case: &Value) -> Vec<String> {
    let out = tempfile::tempdir().expect("folder");
    let write = |name: &str, text: &str| std::fs::write(out.path().join(name), text).expect(name);
    // Some cases run as another user, who writes nothing but must find the program.
    std::fs::set_permissions(out.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("permissions");
    write("addresses", &format!("{}\n", strings(&case["addresses"]).join("\n")));
    write("before", &strings(&case["before"]).join("\n"));
    if let Some(text) = case["resolvConf"].as_str() {
        write("resolv.conf", text);
    }
    let runas = case["runAsUid"].as_u64().filter(|uid| *uid > 0);
    let runas = runas.map(|uid| format!("setpriv --reuid={uid} --regid={uid} --clear-groups")).unwrap_or_default();
    let done = Command::new("unshare")
        .args(["-n", "-m", "bash", "-c", SCRIPT, "capture"])
        .args(strings(&case["args"]))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("OUT", out.path())
        .env("TOOL", env!("CARGO_BIN_EXE_istio-iptables"))
        .env("RUNAS", runas)
        .envs(case["env"].as_object().into_iter().flatten().filter_map(|(k, v)| Some((k, v.as_str()?))))
        .output()
        .expect("unshare");
    let got = |name: &str| std::fs::read_to_string(out.path().join(name)).unwrap_or_default();
    let want = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    if got("exit-code").is_empty() {
        return vec![format!("nothing ran: {}", String::from_utf8_lossy(&done.stderr))];
    }
    let mut wrong = Vec::new();
    if want("exit-code").map(|s| s.trim().to_owned()) != Some(got("exit-code").trim().to_owned()) {
        wrong.push(format!("exit status {}, wanted {:?}: {}", got("exit-code").trim(), want("exit-code"), got("log")));
    }
    let table = |l: &str| l.contains("table 133") || l.contains("table 144");
    let every = |text: &str| lines(text, |_| true);
    let mut compare = |name: &str, read: &dyn Fn(&str) -> Rules| {
        if let Some(want) = want(name) {
            let (want, got) = (read(&want), read(&got(name)));
            let keys: std::collections::BTreeSet<_> = want.keys().chain(got.keys()).collect();
            for key in keys.into_iter().filter(|k| want.get(*k) != got.get(*k)) {
                wrong.push(format!("{name} {key:?}: wanted {:#?} got {:#?}", want.get(key), got.get(key)));
            }
        }
    };
    for name in ["iptables-save.v4", "iptables-save.v6", "iptables-legacy-save.v4", "iptables-legacy-save.v6"] {
        compare(name, &saved);
    }
    compare("nft-ruleset", &native);
    for name in ["ip-rule.v4", "ip-rule.v6", "lo-addr.v6"] {
        compare(name, &every);
    }
    for name in ["ip-route.v4", "ip-route.v6"] {
        compare(name, &|text| lines(text, table));
    }
    wrong
}

#[test]
fn the_kernel_has_the_rules_of_the_reference() {
    let root = std::env::var_os("OUTRIGGER_CONFORMANCE")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"), PathBuf::from)
        .join("iptables/applied");
    if !root.is_dir() {
        println!("SKIPPED: no reference data at {}", root.display());
        return;
    }
    if netns::Netns::create().is_err() || Command::new("iptables-nft").arg("-V").output().is_err() {
        println!("SKIPPED: needs root and iptables");
        return;
    }
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root).expect("folder").flatten().map(|e| e.path()).collect();
    folders.sort();
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    for folder in folders {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // The reference's back end detection shows a fault of its own there.
        if name.ends_with("-autodetect") || FAULTS.contains(&name.as_str()) {
            skipped += 1;
            continue;
        }
        let case: Value =
            serde_json::from_str(&std::fs::read_to_string(folder.join("case.json")).expect("case.json")).expect("JSON");
        match run(&folder, &case) {
            wrong if wrong.is_empty() => passed += 1,
            wrong => failed.push(format!("{name}:\n  {}", wrong.join("\n  "))),
        }
    }
    println!("{passed} passed, {} failed, {skipped} skipped", failed.len());
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
