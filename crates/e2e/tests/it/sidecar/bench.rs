//! Unix sockets beside TCP on the loopback interface, between applications and their sidecars.

use super::{Proxy, Scenario};

const ROUNDS: usize = 5;
const REQUESTS: usize = 400;

/// Prints what a request takes over both ways, and the ratio. Turns are taken, so that whatever else the machine does meets both.
pub(super) fn sockets_beside_loopback(scenario: &Scenario, proxy: Proxy) {
    let socket = ["--unix-socket", "/var/mesh/uds.sock", "-H", "host: provider:15889"];
    let loopback = ["-H", "host: provider:15890"];
    let (mut over_socket, mut over_loopback) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        over_socket.extend(times(scenario, &socket, "http://provider"));
        over_loopback.extend(times(scenario, &loopback, "http://127.0.0.1:15890"));
    }
    let (over_socket, over_loopback) = (Quantiles::of(over_socket), Quantiles::of(over_loopback));
    println!(
        "{}: a request over unix sockets takes {:.0} µs (99 %: {:.0} µs), over loopback {:.0} µs (99 %: {:.0} µs): {:.2} times",
        match proxy {
            Proxy::Ours => "our proxy",
            Proxy::Envoy => "Envoy",
        },
        over_socket.median,
        over_socket.slow,
        over_loopback.median,
        over_loopback.slow,
        over_socket.median / over_loopback.median,
    );
}

/// The time of each of many requests on one connection, in microseconds.
fn times(scenario: &Scenario, way: &[&str], origin: &str) -> Vec<f64> {
    let url = format!("{origin}/status/200?[1-{REQUESTS}]");
    let curl = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code} %{time_total}\n"];
    let output = scenario.mesh.exec("consumer", "app", &[&curl[..], way, &[&url]].concat());
    let times: Vec<f64> =
        output.stdout.lines().filter_map(|line| line.strip_prefix("200 ")?.parse::<f64>().ok()).collect();
    assert_eq!(times.len(), REQUESTS, "every request is answered: {}", output.all());
    times.into_iter().map(|seconds| seconds * 1e6).collect()
}

struct Quantiles {
    median: f64,
    slow: f64,
}

impl Quantiles {
    fn of(mut times: Vec<f64>) -> Quantiles {
        times.sort_by(f64::total_cmp);
        Quantiles { median: times[times.len() / 2], slow: times[times.len() * 99 / 100] }
    }
}
