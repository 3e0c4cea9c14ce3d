use e2e::{Mesh, Output, can_run_meshes, get, outrigger, sample};

/// The value of a counter in a proxy's Prometheus text, summed over the series whose labels hold all of `labels`.
fn counter(text: &str, name: &str, labels: &[&str]) -> u64 {
    let series = text.lines().filter(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)));
    series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
}

/// Packets that a pod's capture rules redirected, by chain: outbound and inbound.
fn redirected(mesh: &Mesh, pod: &str) -> (u64, u64) {
    let ruleset = mesh.in_pod_network(pod, &["nft", "list", "ruleset"]).stdout;
    let packets = |port: &str| -> u64 {
        let rules = ruleset.lines().filter(|line| line.contains("redirect to") && line.contains(port));
        rules.filter_map(|line| line.split("packets ").nth(1)?.split(' ').next()?.parse::<u64>().ok()).sum()
    };
    (packets(":15001"), packets(":15006"))
}

#[test]
fn check_passes() {
    if !can_run_meshes("check_passes") {
        return;
    }
    let output = Output::of(
        outrigger()
            .args(["up", "samples/bookinfo", "--check", "--name", "e2e-check"])
            .args(["--publish", "productpage:9080=19181"]),
    );
    assert!(output.success, "{}", output.all());
    let last = output.stdout.lines().last().unwrap_or_default();
    assert!(last.starts_with("check passed"), "{}", output.all());
}

#[test]
fn original_shape_runs() {
    if !can_run_meshes("original_shape_runs") {
        return;
    }
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/bookinfo-original-shape.yaml");
    let mesh = Mesh::up("e2e-original", &[file, "--publish", "productpage:9080=19182"]).unwrap();
    for pod in mesh.pods().unwrap() {
        assert_eq!(pod["containers"], 2, "every pod has its sidecar: {pod}");
    }
    let page = get(19182, "/productpage", &[]);
    assert_eq!(page.status, 200);
    assert!(page.text.contains("Book Reviews"), "{}", page.text);
}

#[test]
fn every_hop_goes_through_sidecars() {
    if !can_run_meshes("every_hop_goes_through_sidecars") {
        return;
    }
    let mesh = Mesh::up("e2e-hops", &["samples/bookinfo", "--publish", "productpage:9080=19183"]).unwrap();
    // Only v3, so that every page goes productpage -> reviews-v3 -> ratings.
    let route = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    let canary = std::fs::read_to_string(sample("networking/canary.yaml")).unwrap();
    let all_v3 = canary.replace("weight: 90", "weight: 0").replace("weight: 10\n", "weight: 100\n");
    std::fs::write(route.path(), all_v3).unwrap();
    mesh.apply(route.path());

    let pods = ["productpage-v1", "reviews-v3", "ratings-v1"].map(|prefix| mesh.pod(prefix));
    for _ in 0..20 {
        assert_eq!(get(19183, "/productpage", &[]).status, 200);
    }
    // The rules count connections, not requests, and started from zero with the pod.
    let redirects = pods.clone().map(|pod| redirected(&mesh, &pod));
    let [(productpage_out, _), (reviews_out, reviews_in), (_, ratings_in)] = redirects;
    assert!(productpage_out > 0, "productpage's calls are captured: {redirects:?}");
    assert!(reviews_in > 0, "calls to reviews are captured: {redirects:?}");
    assert!(reviews_out > 0, "reviews' calls are captured: {redirects:?}");
    assert!(ratings_in > 0, "calls to ratings are captured: {redirects:?}");

    let stats = pods.clone().map(|pod| {
        let output = mesh.exec(&pod, "istio-proxy", &["pilot-agent", "request", "GET", "stats/prometheus"]);
        assert!(output.success, "{}", output.all());
        output.stdout
    });
    let hop = |stats: &str, reporter: &str, from: &str, to: &str| {
        let labels = [
            format!("reporter=\"{reporter}\""),
            format!("source_workload=\"{from}\""),
            format!("destination_workload=\"{to}\""),
            "response_code=\"200\"".to_owned(),
            "connection_security_policy=".to_owned(),
        ];
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        counter(stats, "istio_requests_total", &labels)
    };
    assert!(hop(&stats[0], "source", "productpage-v1", "reviews-v3") >= 20, "{}", stats[0]);
    assert!(hop(&stats[1], "destination", "productpage-v1", "reviews-v3") >= 20, "{}", stats[1]);
    assert!(hop(&stats[1], "source", "reviews-v3", "ratings-v1") >= 20, "{}", stats[1]);
    assert!(hop(&stats[2], "destination", "reviews-v3", "ratings-v1") >= 20, "{}", stats[2]);
    let mutual = counter(
        &stats[2],
        "istio_requests_total",
        &[
            "connection_security_policy=\"mutual_tls\"",
            "source_principal=\"spiffe://cluster.local/ns/default/sa/bookinfo-reviews\"",
        ],
    );
    assert!(mutual >= 20, "ratings was called over mutual TLS by reviews: {}", stats[2]);
}
