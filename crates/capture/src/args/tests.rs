use super::*;
use crate::config::{Groups, Owner, Selection};

fn resolve(args: &[&str], env: &[(&str, &str)]) -> Result<Settings, Invalid> {
    let read = Args::read(args.iter().map(Into::into)).unwrap_or_else(|e| panic!("{e}")).expect("no help");
    let lookup = |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
    let around = Surroundings {
        env: &lookup,
        users: "games:x:5:60:games\nistio-proxy:x:1400:1400::\n",
        groups: "games:x:60:\n",
    };
    read.resolve(&around)
}

#[test]
fn defaults() {
    let settings = resolve(&[], &[]).expect("valid");
    let config = &settings.config;
    assert_eq!((config.proxy_port, config.inbound_port, config.tunnel_port), (15001, 15006, 15008));
    assert_eq!(config.proxy_uids, [Owner::id(1400)], "the user istio-proxy exists here");
    assert_eq!(config.proxy_gids, config.proxy_uids);
    assert!(config.inbound_ports.is_none() && config.outbound_cidrs.is_none());
    assert_eq!((settings.choice, settings.action), (Choice::Auto, Action::Apply));
    assert_eq!((settings.probe_port, settings.probe_timeout), (15002, Duration::from_secs(5)));
}

#[test]
fn flag_before_environment_before_default() {
    let env = [
        ("ENVOY_PORT", "17001"),
        ("INBOUND_CAPTURE_PORT", "17006"),
        ("ISTIO_INBOUND_PORTS", "*"),
        ("PROXY_UID", "1500"),
        ("REDIRECT_DNS", "true"),
        ("INVALID_DROP", "1"),
        ("ISTIO_META_DNS_CAPTURE", "false"),
        ("KUBE_VIRT_INTERFACES", "tap9"),
    ];
    let settings = resolve(&["-z", "16006", "-b", "80,81", "-u=3,4"], &env).expect("valid");
    let config = &settings.config;
    assert_eq!(config.proxy_port, 15001, "ENVOY_PORT is not ours");
    assert_eq!(config.inbound_port, 16006);
    assert_eq!(config.inbound_ports, Selection::Only(vec![80.into(), 81.into()]));
    assert_eq!(config.proxy_uids, [Owner::id(3), Owner::id(4)]);
    assert!(!settings.redirect_dns, "ISTIO_META_DNS_CAPTURE is read later than REDIRECT_DNS");
    assert!(config.drop_invalid);
    assert_eq!(config.virt_interfaces, ["tap9"]);
    let again = resolve(&["--drop-invalid=false", "-z", "1", "-z", "2"], &env).expect("valid");
    assert!(!again.config.drop_invalid);
    assert_eq!(again.config.inbound_port, 2, "the last one counts");
}

#[test]
fn envoy_user_is_looked_up() {
    assert_eq!(resolve(&[], &[("ENVOY_USER", "games")]).expect("valid").config.proxy_uids, [Owner::id(5)]);
    assert_eq!(resolve(&[], &[("ENVOY_USER", "nobody-here")]).expect("valid").config.proxy_uids, [Owner::id(1337)]);
}

#[test]
fn bad_values_name_flag_and_value() {
    let error = |args: &[&str]| resolve(args, &[]).expect_err("invalid").to_string();
    assert!(error(&["-p", "x"]).contains("--envoy-port \"x\""));
    assert!(error(&["-i", "10.0.0.0"]).contains("--istio-service-cidr \"10.0.0.0\""));
    assert!(error(&["-x", "*"]).contains("--istio-service-exclude-cidr \"*\""));
    assert!(error(&["--force-iptables-binary", "foo"]).contains("\"foo\""));
    assert!(error(&["--ebpf-cgroup", "/x", "-c", "eth1"]).contains("--istio-exclude-interfaces \"eth1\""));
}

/// A pod whose unused flags hold nonsense starts with the reference, so it must start with us.
#[test]
fn what_is_not_used_is_not_looked_at() {
    let fails = |args: &[&str]| resolve(args, &[]).is_err();
    assert!(fails(&["-b", "*", "-d", "http"]));
    assert!(!fails(&["-d", "http"]) && !fails(&["-b", "80", "-d", "http"]));
    for (flag, value) in [("-t", "abc"), ("-r", "abc")] {
        assert!(fails(&["-m", "TPROXY", "-b", "*", flag, value]));
        assert!(!fails(&["-b", "*", flag, value]));
    }
    assert!(!fails(&["-m", "TPROXY", "-r", "abc"]) && fails(&["-m", "TPROXY", "-t", "abc"]));
    let mark = |args: &[&str]| resolve(args, &[]).map(|settings| settings.config.tproxy_mark);
    assert_eq!(mark(&["-m", "TPROXY", "-t", "0x10"]), Ok(16));
    assert!(fails(&["-m", "TPROXY", "-b", "80", "-t", "0x10"]), "for routes it must be decimal");
}

#[test]
fn a_variable_that_is_no_switch_does_not_count() {
    assert!(!resolve(&[], &[("REDIRECT_DNS", "maybe")]).expect("valid").redirect_dns);
    assert!(
        resolve(&[], &[("REDIRECT_DNS", "true"), ("ISTIO_META_DNS_CAPTURE", "maybe")]).expect("valid").redirect_dns
    );
    assert_eq!(resolve(&[], &[("PROBE_TIMEOUT", "5")]).expect("valid").probe_timeout, Duration::from_secs(5));
}

#[test]
fn owner_groups_as_the_reference_reads_them() {
    let groups = |include: &str, exclude: &str| {
        let env = [("ISTIO_OUTBOUND_OWNER_GROUPS", include), ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", exclude)];
        resolve(&[], &env).expect("valid").config.groups
    };
    assert_eq!(groups("*", "202,,203"), Groups::AllExcept(vec![Owner::id(202), Owner::id(203)]));
    assert_eq!(groups("", "202"), Groups::Only(Vec::new()), "set but empty is nobody");
    assert_eq!(groups("1,2", "202"), Groups::Only(vec![Owner::id(1), Owner::id(2)]));
    let env = [("ISTIO_OUTBOUND_OWNER_GROUPS", "*,1")];
    let unknown = resolve(&[], &env).expect("valid").config.unknown_owner().expect("no group is called *");
    assert_eq!(unknown.value, "*");
}

#[test]
fn the_command_line_is_read_as_the_reference_reads_it() {
    let config = |args: &[&str]| resolve(args, &[]).expect("valid").config;
    // A value may look like a flag, words that are no flags do not count, -- ends the flags.
    assert_eq!(
        config(&["-b", "80", "stray", "-d", "81", "--", "-b", "82"]).inbound_ports,
        Selection::Only(vec![80.into()])
    );
    assert!(resolve(&["-i", "-x"], &[]).is_err(), "-x is the value of -i");
    assert_eq!(config(&["-b=80"]).inbound_ports, config(&["-b80"]).inbound_ports);
    let settings = resolve(&["-nz", "16000", "--dual-stack=false", "--redirect-dns", "false"], &[]).expect("valid");
    assert!(settings.dry_run && settings.redirect_dns && !settings.dual_stack);
    assert_eq!(settings.config.inbound_port, 16000);
    assert!(!resolve(&["-n=f"], &[]).expect("valid").dry_run);
    assert_eq!(resolve(&["--iptables-probe-port", "0x10"], &[]).expect("valid").probe_port, 16);

    let usage = |args: &[&str]| Args::read(args.iter().map(Into::into)).expect_err("usage").to_string();
    assert_eq!(usage(&["--nosuch=1"]), "unknown flag: --nosuch");
    assert_eq!(usage(&["-ny"]), "unknown shorthand flag: 'y' in -ny");
    assert_eq!(usage(&["-b"]), "flag needs an argument: 'b' in -b");
    assert_eq!(usage(&["--istio-inbound-ports"]), "flag needs an argument: --istio-inbound-ports");
    assert_eq!(usage(&["--=x"]), "bad flag syntax: --=x");
    assert!(usage(&["-n=maybe"]).contains("\"maybe\" for \"-n, --dry-run\""));
    assert!(usage(&["--probe-timeout", "5"]).contains("\"5\" for \"--probe-timeout\""));
    assert!(usage(&["--iptables-probe-port", "70000"]).contains("70000"));
    assert_eq!(Args::read(["-h"].map(Into::into)).map(|a| a.is_none()), Ok(true));
    assert!(Args::help().contains("-p, --envoy-port"));
}

#[test]
fn what_injected_pods_pass_is_understood() {
    let args =
        "-p 15001 -z 15006 -u 1337 -m REDIRECT -i * -x  -b * -d 15090,15021,15020 --log_output_level=default:info";
    let settings = resolve(&args.split(' ').collect::<Vec<_>>(), &[]).expect("valid");
    assert_eq!(settings.config.outbound_cidrs, Selection::All);
    assert_eq!(settings.config.inbound_exclude, [15090, 15021, 15020].map(crate::Ports::from));
}

#[test]
fn durations_as_go_writes_them() {
    assert_eq!(duration("1m30s"), Some(Duration::from_secs(90)));
    assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
    assert_eq!(duration("1.5s"), Some(Duration::from_millis(1500)));
    assert_eq!(duration("0"), Some(Duration::ZERO));
    for bad in ["", "5", "s", "5x", "-5s", "5s3"] {
        assert_eq!(duration(bad), None, "{bad}");
    }
}
