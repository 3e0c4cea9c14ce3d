//! What commands do when nobody takes what they print, and what they say of input that holds nothing.

use std::process::Stdio;

use e2e::outrigger;

/// 128 and the number of SIGPIPE, as of a program that the signal ended.
const READER_GONE: i32 = 141;

#[test]
fn a_reader_that_leaves_ends_a_command_quietly() {
    // Each writes more than a pipe holds, one by print!, one by write_all.
    for arguments in [&["completion", "bash"][..], &["crds"]] {
        let mut child = outrigger().args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(READER_GONE), "{arguments:?}");
        assert_eq!(String::from_utf8_lossy(&ended.stderr), "", "{arguments:?}");
    }
}

#[test]
fn a_full_disk_is_an_error_and_no_panic() {
    for arguments in [&["completion", "bash"][..], &["version"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let ended = outrigger().args(arguments).stdout(full).stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        assert!(
            said.starts_with("Error: cannot print: No space left on device") && said.lines().count() == 1,
            "{said}"
        );
    }
}

#[test]
fn misspelt_kinds_of_istio_are_faults() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("typo.yaml");
    let text = "apiVersion: networking.istio.io/v1\nkind: VirtualServce\nmetadata: {name: a}\nspec: {hosts: [a]}\n";
    std::fs::write(&file, text).unwrap();
    let ended = outrigger().args(["validate", "-f"]).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success());
    assert!(said.contains("typo.yaml:2") && said.contains("VirtualService of networking.istio.io is"), "{said}");
}
