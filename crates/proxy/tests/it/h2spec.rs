//! h2spec judges the HTTP/2 of our listeners: all of its cases, the strict ones, too.

use crate::fixture::{bootstrap, connect, free_port, http_manager, listener};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Where `cargo xtask setup` puts it.
fn program() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let build = std::env::var_os("OUTRIGGER_BUILD").map_or_else(|| root.join("build"), PathBuf::from);
    build.join("tools/h2spec/h2spec")
}

/// What failed, by its title, and the line that sums up.
async fn judge(port: u16, flags: &[&str]) -> (Vec<String>, String) {
    let output = tokio::process::Command::new(program())
        .args(["--strict", "--timeout", "5", "--host", "127.0.0.1", "--port", &port.to_string()])
        .args(flags)
        .output()
        .await
        .expect("h2spec runs");
    let text = String::from_utf8_lossy(&output.stdout);
    // Progress is overwritten by carriage returns; the list of failures at the end has whole lines.
    let (_, failures) = text.split_once("Failures:").unwrap_or_default();
    let failed = failures.lines().filter_map(|line| line.trim().strip_prefix("× ")).map(str::to_owned).collect();
    let last = text.lines().last().unwrap_or_default().to_owned();
    (failed, last)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_of_h2spec_passes() {
    if !program().is_file() {
        println!("SKIPPED: every_case_of_h2spec_passes: no {}: `cargo xtask setup`", program().display());
        return;
    }
    let key = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let routes =
        json!([{"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "hello"}}}]);
    // A request is answered when it is whole: otherwise the answer may come before the frame that is judged.
    let filters = json!([
        {"name": "buffer", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer", "max_request_bytes": 100_000
        }},
        {"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}
    ]);
    let manager =
        |codec: &str| http_manager(routes.clone(), json!({"codec_type": codec, "http_filters": filters.clone()}));
    let tls = json!({
        "name": "tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {
                "alpn_protocols": ["h2", "http/1.1"],
                "tls_certificates": [{
                    "certificate_chain": {"inline_string": key.cert.pem()},
                    "private_key": {"inline_string": key.signing_key.serialize_pem()}
                }]
            }
        }
    });
    let ports = [free_port(), free_port(), free_port()];
    let config = json!({"static_resources": {"listeners": [
        listener("h2", ports[0], json!({"filters": [manager("HTTP2")]})),
        listener("auto", ports[1], json!({"filters": [manager("AUTO")]})),
        listener("tls", ports[2], json!({"filters": [manager("AUTO")], "transport_socket": tls})),
    ]}});
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    let handle = proxy::start(bootstrap(&config), options).expect("it starts");
    for port in ports {
        connect(port).await;
    }

    // What does not begin as HTTP/2 is HTTP/1 to a listener that finds out by itself, and gets a 400, as from Envoy.
    let http1 = ["2: Sends invalid connection preface".to_owned()];
    for (port, flags, allowed) in
        [(ports[0], &[][..], &[][..]), (ports[1], &[], &http1), (ports[2], &["--tls", "--insecure"], &[])]
    {
        let (failed, last) = judge(port, flags).await;
        assert_eq!(failed, allowed, "{flags:?}: {last}");
        let expected = format!(" passed, 0 skipped, {} failed", allowed.len());
        assert!(last.ends_with(&expected), "{flags:?}: {last}");
    }
    handle.shutdown();
}
