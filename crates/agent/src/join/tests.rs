use clap::Parser;

use super::*;

#[derive(Parser)]
struct Program {
    #[command(flatten)]
    args: JoinArgs,
}

fn args(words: &[&str]) -> JoinArgs {
    Program::parse_from(["join"].iter().chain(words)).args
}

fn folder() -> Folder {
    let variables = [
        ("ISTIO_INBOUND_PORTS", "8080"),
        ("ISTIO_NAMESPACE", "bar"),
        ("ISTIO_META_AUTO_REGISTER_GROUP", "vm"),
        ("ISTIO_SVC_IP", "10.1.1.1"),
        ("CA_ADDR", "elsewhere:15012"),
    ];
    Folder {
        variables: variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        hosts: [("istiod.istio-system.svc".to_owned(), [10, 0, 0, 1].into())].into_iter().collect(),
        mesh: Some("defaultConfig: {discoveryAddress: 'istiod.istio-system.svc:15012'}".to_owned()),
        ..Folder::default()
    }
}

#[test]
fn a_folder_becomes_an_agents_environment() {
    let plan = plan(&args(&["dir", "--state", "/s"]), &folder(), true, "Host1.example").unwrap();
    let value = |name: &str| plan.variables.get(name).map(String::as_str);
    assert_eq!(value("POD_NAMESPACE"), Some("bar"));
    assert_eq!(value("POD_NAME"), Some("host1"));
    assert_eq!(value("INSTANCE_IP"), Some("10.1.1.1"));
    // The control plane is dialled where `hosts` says, and verified by its name.
    assert_eq!(value("CA_ADDR"), Some("10.0.0.1:15012"));
    assert_eq!(value("ISTIOD_SAN"), Some("istiod.istio-system.svc"));
    assert_eq!(value("ISTIO_META_INTERCEPTION_MODE"), Some("REDIRECT"));
    assert_eq!(value("PROV_CERT"), Some("/s/certs"));
    assert!(plan.flags.join(" ").ends_with("--discoveryAddress 10.0.0.1:15012 --meshConfig /s/mesh.yaml"));
    // What cluster.env says reaches capture as a variable, the rest as flags.
    assert_eq!(plan.capture.unwrap().join(" "), format!("-u 1337 -g 1337 -i * -d {EXCLUDED}"));
    assert_eq!(plan.user, Some((1337, 1337)));
}

#[test]
fn flags_alone_do() {
    let words =
        ["--group", "vm", "--namespace", "ns", "--control-plane", "10.2.2.2:15012", "--control-plane-name", "istiod"];
    let none = plan(&args(&[&words[..], &["--capture", "none"]].concat()), &Folder::default(), false, "h").unwrap();
    let value = |name: &str| none.variables.get(name).map(String::as_str);
    assert_eq!(
        (value("ISTIO_META_AUTO_REGISTER_GROUP"), value("ISTIO_META_INTERCEPTION_MODE")),
        (Some("vm"), Some("NONE"))
    );
    assert_eq!((value("ISTIO_META_WORKLOAD_NAME"), value("ISTIOD_SAN")), (Some("vm"), Some("istiod")));
    assert_eq!((none.capture, none.user), (None, None));

    let refused =
        |words: &[&str], root: bool| plan(&args(words), &Folder::default(), root, "h").unwrap_err().to_string();
    assert!(refused(&words, false).starts_with("capturing traffic needs root"));
    assert!(refused(&["--control-plane", "istiod"], true).contains("\"istiod\" is not HOST:PORT"));
    assert!(refused(&["--control-plane", "istiod:15010"], true).contains("15012"));
}

#[test]
fn secrets_are_kept_for_the_agent_only() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let args = args(&["--state", state.to_str().unwrap()]);
    let without = keep(&args, &Folder::default(), None).unwrap_err().to_string();
    assert!(without.contains("there is no token"), "{without}");
    let folder = Folder { token: Some("t".to_owned()), root_cert: Some("r".to_owned()), ..Folder::default() };
    keep(&args, &folder, None).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state), 0o700);
    assert_eq!(mode(&state.join("istio-token")), 0o600);
    // With a certificate the token is not needed, and an old one does not stay.
    std::fs::write(state.join("certs/cert-chain.pem"), "c").unwrap();
    keep(&args, &Folder::default(), None).unwrap();
    assert!(!state.join("istio-token").exists() && state.join("root-cert.pem").exists());
}
