use clap::Parser;

use super::*;
use crate::config::{Owner, Selection};

#[derive(Parser)]
struct Program {
    #[command(flatten)]
    args: Args,
}

fn resolve(args: &[&str], env: &[(&str, &str)]) -> Result<Settings, Invalid> {
    let program = Program::try_parse_from(["istio-iptables"].iter().chain(args)).unwrap_or_else(|e| panic!("{e}"));
    let lookup = |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
    let around = Surroundings {
        env: &lookup,
        users: "games:x:5:60:games\nistio-proxy:x:1400:1400::\n",
        groups: "games:x:60:\n",
    };
    program.args.resolve(&around)
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
    assert_eq!(config.inbound_ports, Selection::Only(vec![80, 81]));
    assert_eq!(config.proxy_uids, [Owner::id(3), Owner::id(4)]);
    assert!(settings.redirect_dns && config.drop_invalid);
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
    assert!(error(&["--probe-timeout", "5"]).contains("--probe-timeout"));
    assert!(resolve(&[], &[("REDIRECT_DNS", "maybe")]).expect_err("invalid").to_string().contains("REDIRECT_DNS"));
}

#[test]
fn what_injected_pods_pass_is_understood() {
    let args =
        "-p 15001 -z 15006 -u 1337 -m REDIRECT -i * -x  -b * -d 15090,15021,15020 --log_output_level=default:info";
    let settings = resolve(&args.split(' ').collect::<Vec<_>>(), &[]).expect("valid");
    assert_eq!(settings.config.outbound_cidrs, Selection::All);
    assert_eq!(settings.config.inbound_exclude, [15090, 15021, 15020]);
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
