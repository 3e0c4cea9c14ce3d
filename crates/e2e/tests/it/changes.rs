use std::time::{Duration, Instant};

use e2e::{Load, Mesh, can_run_meshes, get, sample};

const PORT: u16 = 19185;

/// How soon a condition holds, looking again and again; panics after five seconds, which a busy machine needs:
/// the times that are printed tell how soon it was.
fn until(what: &str, condition: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(5), "{what}: not after five seconds");
        std::thread::sleep(Duration::from_millis(5));
    }
    start.elapsed()
}

#[test]
fn changes_take_effect_and_fail_no_request() {
    if !can_run_meshes("changes_take_effect_and_fail_no_request") {
        return;
    }
    let mesh = Mesh::up("e2e-changes", &["samples/bookinfo", "--publish", "productpage:9080=19185"]).unwrap();
    let load = Load::start(PORT, "/productpage", 200);
    std::thread::sleep(Duration::from_secs(2));

    let page = |headers: &[(&str, &str)]| get(PORT, "/productpage", headers).text;
    // Twenty pages in a row without a sign of v2: by chance once in 3,000 runs before the change.
    let canary = sample("networking/canary.yaml");
    mesh.apply(&canary);
    let canary_took = until("canary", || (0..20).all(|_| !page(&[]).contains("color:black")));
    mesh.delete(&canary);

    let fault = sample("networking/fault-abort.yaml");
    mesh.apply(&fault);
    let fault_took = until("fault", || (0..6).any(|_| page(&[]).contains("Ratings service is currently unavailable")));
    mesh.delete(&fault);
    until("no fault", || (0..20).all(|_| !page(&[]).contains("Ratings service is currently unavailable")));

    let timeout = sample("networking/timeout.yaml");
    mesh.apply(&timeout);
    let timeout_took = until("timeout", || page(&[]).contains("product reviews are currently unavailable"));
    mesh.delete(&timeout);
    until("no timeout", || !page(&[]).contains("product reviews are currently unavailable"));

    let report = load.stop();
    println!("canary after {canary_took:?}, fault after {fault_took:?}, timeout after {timeout_took:?}; {report:?}");
    assert_eq!(report.failed, 0, "{report:?}");
    assert!(report.sent > 400, "the load ran: {report:?}");
}
