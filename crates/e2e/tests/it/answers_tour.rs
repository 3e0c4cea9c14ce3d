//! The commands that answer questions, as users paste them: those of the guide and those of each command's help.

use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::{Output, can_run_meshes, outrigger, sample};

const NAME: &str = "e2e-answers-tour";

/// The commands whose help has examples.
const COMMANDS: [&str; 12] = [
    "explain",
    "wait",
    "proxy-config",
    "proxy-status",
    "version",
    "x describe",
    "x authz check",
    "graph",
    "tap",
    "sidecar explain",
    "sidecar generate",
    "doctor",
];

/// A folder in which `outrigger` and `samples` are what a user has; its mesh ends with it.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Desk {
        let folder = tempfile::tempdir().unwrap();
        let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, folder.path().join(name)).unwrap();
        link(sample("..").as_path(), "samples");
        let program = PathBuf::from(outrigger().get_program());
        link(&program, "outrigger");
        link(&program, "kubectl-outrigger");
        Desk(folder)
    }

    fn run(&self, line: &str) -> Output {
        let path = format!("{}:{}", self.0.path().display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("sh");
        command.args(["-c", line]).current_dir(self.0.path()).env("PATH", path).env("OUTRIGGER_NAME", NAME);
        Output::of(&mut command)
    }

    #[track_caller]
    fn works(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.success, "{line}\n{}", output.all());
        assert!(!output.all().trim().is_empty(), "{line} prints nothing");
        output.stdout
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.run("outrigger down");
    }
}

/// The lines of the shell blocks of the guide's section.
fn of_guide() -> Vec<String> {
    let text = std::fs::read_to_string(sample("../../docs/guide.md")).unwrap();
    let section = text.split("\n## ").find(|section| section.starts_with("Answers\n")).expect("the guide's section");
    let blocks = section.split("```sh\n").skip(1).filter_map(|block| block.split("```").next());
    blocks.flat_map(str::lines).map(str::to_owned).collect()
}

#[test]
fn every_example_works_as_it_is_pasted() {
    if !can_run_meshes("every_example_works_as_it_is_pasted") {
        return;
    }
    let desk = Desk::new();
    let lines = of_guide();
    let (last, before) = lines.split_last().expect("commands in the guide");
    assert!(last.starts_with("outrigger down") && before.len() > 20, "{lines:?}");
    for line in before {
        desk.works(line);
    }

    // What the guide promises of two of them.
    let why = desk.works("outrigger explain --request-id tour-1");
    for part in ["reviews-v2", "samples/bookinfo/networking/user-jason.yaml:", "mutual", "200 - via_upstream"] {
        assert!(why.contains(part), "{part}: {why}");
    }
    let graph = desk.works("outrigger graph --window 0 -o json");
    assert!(graph.contains("\"to\": \"reviews-v2.default\""), "{graph}");

    // The dumps that examples name.
    for file in ["dump.json", "envoy-dump.json"] {
        let get = "pilot-agent request GET 'config_dump?include_eds'";
        let line = format!("outrigger exec productpage -c istio-proxy -- {get} > {file}");
        assert!(desk.run(&line).success, "{line}");
    }
    let mut examples = 0;
    for command in COMMANDS {
        let help = desk.works(&format!("outrigger {command} --help"));
        let (_, after) = help.split_once("Example:\n").unwrap_or_else(|| panic!("{command} has no example:\n{help}"));
        for line in after.lines().map(str::trim).filter(|line| line.starts_with("outrigger ")) {
            // What stands behind blanks in parentheses is said about it.
            desk.works(line.split("   (").next().unwrap());
            examples += 1;
        }
    }
    assert!(examples >= COMMANDS.len(), "{examples}");
    desk.works("kubectl-outrigger proxy-status");
    assert!(desk.run(last).success);
}

#[test]
fn the_doctor_finds_what_was_broken() {
    if !can_run_meshes("the_doctor_finds_what_was_broken") {
        return;
    }
    let desk = Desk(tempfile::tempdir().unwrap());
    let name = "e2e-answers-doctor";
    let mesh = e2e::Mesh::up(name, &["samples/bookinfo", "--publish", "productpage:9080=19187"]).unwrap();
    let doctor = || Output::of(outrigger().args(["doctor", "--mesh", name]));
    let healthy = doctor();
    assert!(healthy.success && healthy.stdout.contains("nothing is wrong"), "{}", healthy.all());

    let file = desk.0.path().join("broken.yaml");
    let broken = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: ratings}
spec: {hosts: [ratings], http: [{route: [{destination: {host: ratings, subset: v7}}]}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: details}
spec: {host: details, trafficPolicy: {tls: {mode: DISABLE}}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
---
apiVersion: v1
kind: Service
metadata: {name: astray}
spec: {selector: {app: details}, ports: [{name: http, port: 9080, targetPort: 9999}]}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: narrow}
spec:
  workloadSelector: {labels: {app: ratings}}
  outboundTrafficPolicy: {mode: REGISTRY_ONLY}
  egress: [{hosts: [./details.default.svc.cluster.local]}]
";
    std::fs::write(&file, broken).unwrap();
    mesh.apply(&file);
    let waited = Output::of(outrigger().args(["wait", "--all", "--mesh", name]));
    assert!(waited.success, "{}", waited.all());
    let pod = mesh.pod("productpage");
    for url in ["http://ratings:9080/ratings/0", "http://details:9080/details/0", "http://astray:9080/"] {
        mesh.exec(&pod, "productpage", &["curl", "-s", "-o", "/dev/null", url]);
    }
    mesh.exec(&mesh.pod("ratings"), "ratings", &["curl", "-s", "-o", "/dev/null", "http://reviews:9080/"]);
    let hidden = Output::of(outrigger().args(["explain", "--mesh", name, "--from", "ratings", "http://reviews:9080/"]));
    assert!(hidden.stdout.contains("Sidecar default/narrow spec.egress"), "{}", hidden.all());
    let found = doctor();
    assert!(!found.success, "{}", found.all());
    let place = file.display().to_string();
    for part in [
        "subset \"v7\" of ratings.default.svc.cluster.local, which no DestinationRule defines",
        "kind: DestinationRule",
        "takes mutual TLS only (PeerAuthentication STRICT)",
        "got 503 NC",
        "leads to 9999, which no container of its pods declares",
        "failed at its own application, port 9999, with 503 UF",
        "it may call only what its proxy sees (REGISTRY_ONLY)",
        "outrigger explain --request-id ",
        place.as_str(),
    ] {
        assert!(found.stdout.contains(part), "{part}:\n{}", found.all());
    }
}
