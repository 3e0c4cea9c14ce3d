use std::process::Command;

use e2e::{Mesh, Output, can_run_meshes};

#[test]
fn a_browser_shows_stars() {
    if !can_run_meshes("a_browser_shows_stars") {
        return;
    }
    let browser = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok());
    let Some(browser) = browser else {
        println!("SKIPPED: a_browser_shows_stars: no Chromium on this machine");
        return;
    };
    let _mesh = Mesh::up("e2e-browser", &["samples/bookinfo", "--publish", "productpage:9080=19184"]).unwrap();
    let profile = tempfile::tempdir().unwrap();
    // Reviews take turns; two of the three versions have stars.
    let stars = (0..6).any(|_| {
        let output = Output::of(
            Command::new(browser)
                .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
                .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
                .arg(format!("--user-data-dir={}", profile.path().display()))
                .args(["--dump-dom", "http://localhost:19184/productpage"]),
        );
        assert!(output.stdout.contains("The Comedy of Errors"), "{}", output.all());
        output.stdout.contains("★★★★★")
    });
    assert!(stars, "no version of reviews showed its stars");
}
