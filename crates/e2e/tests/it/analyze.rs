//! `outrigger analyze` as a pipeline calls it: output formats, thresholds, exit codes.

use std::process::Command;

use e2e::{Output, outrigger};
use serde_json::Value;

const FAULTY: &str = "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: lost}
spec:
  hosts: [reviews]
  http:
  - route:
    - destination: {host: nobody}
---
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {ports: [{name: web, port: 80}]}
";

fn analyze(arguments: &[&str]) -> (Output, Option<i32>) {
    let mut command: Command = outrigger();
    command.args(["analyze", "--use-kube=false"]).args(arguments);
    let code = command.output().unwrap().status.code();
    (Output::of(&mut command), code)
}

#[test]
fn analysis_says_what_is_wrong_as_istioctl_does() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("faulty.yaml");
    std::fs::write(&file, FAULTY).unwrap();
    let path = file.to_str().unwrap();

    let (output, code) = analyze(&[path]);
    assert_eq!(code, Some(79), "{}", output.all());
    let expected = format!(
        "Error [IST0101] (VirtualService default/lost {path}:8) Referenced host not found: \"nobody\"\n\
         Info [IST0118] (Service default/reviews {path}:13) Port name web (port: 80, targetPort: 0) doesn't follow the naming \
         convention of Istio port.\n"
    );
    assert_eq!(output.stdout, expected);
    assert!(output.stderr.contains("Analyzers found issues when analyzing namespace: default."), "{}", output.stderr);

    let (output, code) = analyze(&[path, "-o", "json", "--output-threshold", "error"]);
    assert_eq!(code, Some(0), "as istioctl, for programs: {}", output.all());
    let found: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(found.as_array().unwrap().len(), 1);
    assert_eq!((&found[0]["code"], &found[0]["origin"]), (&"IST0101".into(), &"VirtualService default/lost".into()));
    assert_eq!(found[0]["reference"], format!("{path}:8"));
    let (output, _) = analyze(&[path, "-o", "yaml"]);
    assert!(output.stdout.contains("code: IST0101") && output.stdout.contains("level: Info"), "{}", output.stdout);

    let quiet = ["-S", "IST0101=VirtualService default/*"];
    assert_eq!(analyze(&[&[path][..], &quiet].concat()).1, Some(0));
    assert_eq!(analyze(&[&[path, "--failure-threshold", "Info"][..], &quiet].concat()).1, Some(79));
    let (output, code) = analyze(&[path, "-n", "other"]);
    assert_eq!(code, Some(79), "objects without a namespace are of the one that is looked at: {}", output.all());

    let good = folder.path().join("good.yaml");
    std::fs::write(
        &good,
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{name: http, port: 80}]}\n",
    )
    .unwrap();
    let (output, code) = analyze(&[good.to_str().unwrap()]);
    assert_eq!((code, output.stdout.as_str()), (Some(0), "\n"));
    assert!(output.stderr.contains("No validation issues found when analyzing"), "{}", output.stderr);

    let broken = folder.path().join("broken.yaml");
    std::fs::write(&broken, "a: [").unwrap();
    assert_eq!(analyze(&[broken.to_str().unwrap()]).1, Some(65));
    assert_eq!(analyze(&[broken.to_str().unwrap(), "--ignore-unknown"]).1, Some(0));
    assert_eq!(analyze(&["no-such-file.yaml"]).1, Some(1));
}
