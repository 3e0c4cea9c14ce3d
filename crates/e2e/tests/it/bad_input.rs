use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use e2e::{Mesh, Output, can_run_meshes, outrigger};

fn write(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).unwrap();
}

const SLEEPER: &str = "
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec: {containers: [{name: a, image: curlimages/curl}]}
";

#[test]
fn one_bad_file_of_twenty_is_named_and_nothing_starts() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..19 {
        write(folder.path(), &format!("{number:02}.yaml"), &SLEEPER.replace("NAME", &format!("p{number}")));
    }
    write(folder.path(), "19.yaml", "apiVersion: v1\nkind: Pod\nmetadata:\n  name: [\n");
    let output = Output::of(outrigger().arg("up").arg(folder.path()).args(["--name", "e2e-syntax"]));
    assert!(!output.success);
    assert!(output.stderr.contains("19.yaml:"), "{}", output.all());
    assert!(output.stderr.contains("nothing was started"), "{}", output.all());
}

#[test]
fn a_wrong_field_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let text = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: a\nspec:\n  hosts: 7\n";
    write(folder.path(), "vs.yaml", text);
    let output = Output::of(outrigger().arg("up").arg(folder.path()).args(["--name", "e2e-field"]));
    assert!(!output.success);
    assert!(output.stderr.contains("vs.yaml:6:") && output.stderr.contains("spec.hosts"), "{}", output.all());
}

#[test]
fn a_second_up_of_the_same_name_is_refused_and_two_names_live_together() {
    if !can_run_meshes("a_second_up_of_the_same_name_is_refused_and_two_names_live_together") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "a.yaml", &SLEEPER.replace("NAME", "sleeper"));
    let path = folder.path().to_str().unwrap();
    let _first = Mesh::up("e2e-two-a", &[path]).unwrap();
    let _second = Mesh::up("e2e-two-b", &[path]).unwrap();
    let output = Output::of(outrigger().args(["up", path, "--name", "e2e-two-a"]));
    assert!(!output.success);
    assert!(output.stderr.contains("e2e-two-a") && output.stderr.contains("running"), "{}", output.all());
}

#[test]
fn a_command_that_does_not_exist_names_the_object_and_the_rest_runs() {
    if !can_run_meshes("a_command_that_does_not_exist_names_the_object_and_the_rest_runs") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "a.yaml", &SLEEPER.replace("NAME", "good"));
    let bad = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: broken}
spec:
  selector: {matchLabels: {app: broken}}
  template:
    metadata: {labels: {app: broken}}
    spec: {containers: [{name: a, image: example/unheard-of, command: [/no/such/program]}]}
";
    write(folder.path(), "b.yaml", bad);
    let mesh = Mesh::start("e2e-command", &[folder.path().to_str().unwrap()]).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let output = Output::of(&mut mesh.command("ps"));
        let good = output.stdout.lines().any(|line| line.contains("good") && line.contains("Running"));
        if good && output.stdout.contains("broken") && output.stdout.contains("/no/such/program") {
            break;
        }
        assert!(Instant::now() < deadline, "{}", output.all());
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_port_that_is_taken_is_named_and_the_rest_runs() {
    if !can_run_meshes("a_port_that_is_taken_is_named_and_the_rest_runs") {
        return;
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut up = outrigger();
    up.args(["up", "samples/bookinfo", "--name", "e2e-port", "--publish", &format!("productpage:9080={port}")]);
    let mut up = up.stdout(Stdio::null()).stderr(log.reopen().unwrap()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let said = loop {
        let text = std::fs::read_to_string(log.path()).unwrap();
        if text.contains("pods ready") || Instant::now() > deadline {
            break text;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    drop(taken);
    Output::of(outrigger().args(["down", "--name", "e2e-port"]));
    up.wait().unwrap();
    assert!(said.contains(&port) && said.contains("productpage"), "{said}");
    assert!(said.contains("all 6 pods ready"), "{said}");
}
