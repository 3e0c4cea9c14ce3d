//! Mistakes: each is named, nothing is left behind, and the rest runs on where that makes sense.

use crate::mesh::{Mesh, outrigger};

pub(crate) fn named_and_the_rest_runs() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let yaml = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: broken}
spec: {selector: {}, template: {metadata: {labels: {app: broken}}, spec: {containers: [{name: c, image: acme/none:1, command: [/no/such/program]}]}}}
---
apiVersion: v1
kind: Pod
metadata: {name: fine}
spec: {containers: [{name: c, image: any, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Service
metadata: {name: fine}
spec: {selector: {app: nothing}, ports: [{port: 80}]}
---
apiVersion: example.com/v1
kind: Wonder
metadata: {name: w}
"#;
    let mesh = Mesh::start("t-bad", yaml, &["--publish", &format!("fine:80={port}")]);
    mesh.says("1 of 2 pods ready");
    let log = mesh.log();
    assert!(log.contains("/no/such/program") && log.contains("pod broken-"), "{log}");
    assert!(log.contains("Wonder w is of a kind that is not known here"), "{log}");
    assert!(log.contains("service fine is not published") && log.contains("in use"), "{log}");
    assert!(mesh.exec("fine", "true").status.success());
}

pub(crate) fn nothing_starts_with_a_syntax_error() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..20 {
        let text = if number == 7 {
            "kind: Pod\n  apiVersion: v1\n"
        } else {
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\n"
        };
        std::fs::write(folder.path().join(format!("{number}.yaml")), text).unwrap();
    }
    let answer = outrigger(&["up", folder.path().to_str().unwrap(), "--name", "t-syntax"]);
    let text = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(!answer.status.success() && text.contains("7.yaml:2") && text.contains("nothing was started"), "{text}");
    assert!(!std::path::Path::new("/run/outrigger/t-syntax").exists());
}

pub(crate) fn second_up_of_the_same_name() {
    let yaml = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, image: any, command: [sleep, infinity]}]}\n";
    let mesh = Mesh::start("t-twice", yaml, &[]);
    mesh.says("all 1 pods ready");
    let file = mesh.file();
    let answer = outrigger(&["up", file.to_str().unwrap(), "--name", "t-twice"]);
    let text = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(!answer.status.success() && text.contains("is running already"), "{text}");
    assert!(mesh.exec("a", "true").status.success(), "the first one runs on");
}
