//! The rules as text against those of the reference.

use std::path::PathBuf;

use serde_json::Value;

use crate::args::{Args, Surroundings};
use crate::config::Dns;
use crate::rules::rules;
use crate::{iptables, nftables};

/// The folder with reference data, or nothing after saying so.
fn data(folder: &str) -> Option<PathBuf> {
    let root = std::env::var_os("OUTRIGGER_CONFORMANCE")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"), PathBuf::from);
    let path = root.join(folder);
    if path.is_dir() {
        return Some(path);
    }
    println!("SKIPPED: no reference data at {}", path.display());
    None
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

#[test]
fn dry_runs_print_what_the_reference_prints() {
    let Some(root) = data("iptables/commands") else { return };
    let (mut count, mut failed) = (0, Vec::new());
    for entry in std::fs::read_dir(root).expect("folder").flatten() {
        let read = |name: &str| std::fs::read_to_string(entry.path().join(name)).expect(name);
        let case: Value = serde_json::from_str(&read("case.json")).expect("case.json");
        let args = strings(&case["args"]);
        let given = Args::read(args.into_iter().map(Into::into)).unwrap_or_else(|e| panic!("{e}")).expect("no help");
        let env = |name: &str| case["env"][name].as_str().map(str::to_owned);
        let settings = given.resolve(&Surroundings { env: &env, users: "", groups: "" }).expect("valid");
        let mut config = settings.config.clone();
        config.ipv6 = case["ipv6Enabled"].as_bool().expect("bool");
        let servers = |key: &str| strings(&case[key]).iter().map(|ip| ip.parse().expect("address")).collect::<Vec<_>>();
        let (v4, v6) = (servers("dnsServersV4"), servers("dnsServersV6"));
        if settings.redirect_dns {
            config.dns = match (settings.capture_all_dns, v4.is_empty() && v6.is_empty()) {
                (true, _) => Dns::All,
                (false, true) => Dns::Off,
                (false, false) => Dns::Servers { v4, v6 },
            };
        }
        let set = rules(&config);
        let saves = if set.ipv6 { "iptables-save\nip6tables-save\n" } else { "iptables-save\n" };
        let text = format!(
            "iptables-save\nip6tables-save\n{}{}{saves}",
            iptables::restore_text(&set, false),
            iptables::restore_text(&set, true)
        );
        let name = entry.file_name().to_string_lossy().into_owned();
        for (kind, want, got) in [
            ("iptables", read("expected.iptables.txt"), text),
            ("nftables", read("expected.nftables.txt"), nftables::text(&set)),
        ] {
            count += 1;
            if want.trim() != got.trim() {
                let line = want.lines().zip(got.lines()).find(|(w, g)| w != g);
                failed.push(format!(
                    "{name} {kind}: {} and {} lines; {line:#?}",
                    want.lines().count(),
                    got.lines().count()
                ));
            }
        }
    }
    println!("{} of {count} texts equal the reference's", count - failed.len());
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
