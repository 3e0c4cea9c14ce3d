//! Bytes that decide something before HTTP does, values of headers that are read closer, and the bootstrap.

use crate::inspect::{self, Look};
use crate::jwks::{Jwks, Token};
use crate::proxy_protocol::{self, Header};
use envoy_api::Message;
use std::fmt::Debug;
use std::sync::Arc;

/// A client's first flight, from rustls.
fn hello(alpn: &[&str]) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has suites")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let name = "outbound_.80_._.a.test".try_into().expect("a name");
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).expect("a fitting configuration");
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).expect("memory takes all");
    bytes
}

/// More bytes never change what was found, and a part of it is never taken for something else.
fn same_in_pieces<T: Debug + PartialEq>(bytes: &[u8], look: impl Fn(&[u8]) -> Look<T>) -> Look<T> {
    let whole = look(bytes);
    if matches!(whole, Look::Found(_)) {
        for end in (0..bytes.len()).step_by(1 + bytes.len() / 64) {
            let part = look(&bytes[..end]);
            assert!(part == Look::More || part == whole, "at {end}: {part:?} instead of {whole:?}");
        }
    }
    whole
}

#[test]
fn inspectors() {
    let hello = hello(&["istio-peer-exchange", "istio", "h2"]);
    let mut pieces =
        hello[5..].chunks(100).map(|p| [&[22, 3, 1, 0, p.len() as u8][..], p].concat()).collect::<Vec<_>>();
    let records = pieces.drain(..).flatten().collect::<Vec<u8>>();
    let seeds: [&[u8]; 9] = [
        &hello,
        &records,
        b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n",
        b"M-SEARCH * HTTP/1.0\n",
        inspect::PREFACE,
        b"PROXY TCP4 1.2.3.4 5.6.7.8 10 20\r\nrest",
        b"PROXY TCP6 ::1 fe80::1 1 65535\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x01\x02\x03\x04\x05\x06\x07\x08\0\x0a\0\x14",
        b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\x03\x04\0\0",
    ];
    let words = ["PROXY UNKNOWN", " 65536", "HTTP/1.1\r\n", "\r\n", "\x16\x03\x01", "\0\0", "\0\x10", "CONNECT a:1 "];
    ::fuzz::run("inspectors", &seeds, &words, |bytes| {
        let tls = same_in_pieces(bytes, inspect::client_hello);
        if let Some(offer) = inspect::Offer::of(bytes) {
            assert_eq!((offer.ja3().len(), offer.ja4().chars().count()), (32, 36));
        }
        let http = same_in_pieces(bytes, inspect::http);
        let proxied = proxy_protocol::parse(bytes);
        if let Some(Header::Found(length, addresses)) = &proxied {
            assert!(*length <= bytes.len());
            for end in 0..*length {
                assert_eq!(proxy_protocol::parse(&bytes[..end]), Some(Header::More), "{addresses:?} at {end}");
            }
        }
        let hello = match tls {
            Look::Found(hello) => (2, hello.server_name.is_some(), hello.alpn.len()),
            Look::No => (0, false, 0),
            Look::More => (1, false, 0),
        };
        (hello, format!("{http:?}"), proxied.map(|p| matches!(p, Header::Found(_, Some(_)))))
    });
}

const TOKEN: &[u8] = b"eyJhbGciOiJSUzI1NiIsImtpZCI6ImsifQ.eyJpc3MiOiJpIiwiYXVkIjpbImEiXSwiZXhwIjo5OTk5fQ.c2ln";
const KEYS: &[u8] = br#"{"keys":[{"kty":"RSA","kid":"k","n":"0vx7agoebGcQ","e":"AQAB"},{"kty":"oct","k":"c2VjcmV0"},
{"kty":"EC","crv":"P-256","x":"AAAA","y":"AAAA"},{"kty":"OKP","crv":"Ed25519","x":"AAAA"}]}"#;

/// Tokens of clients, key sets of issuers, announcements of peers.
#[test]
fn credentials() {
    let keys = Jwks::parse(KEYS);
    let seeds: [&[u8]; 4] =
        [TOKEN, KEYS, b"eyJhbGciOiJub25lIn0.e30.", b"cG9kO2RlZmF1bHQ7YXBwO3YxO3N2Yzt2MTtLdWJlcm5ldGVz"];
    let words = [".", "e30", "eyJhbGciOiJIUzI1NiJ9", "\"kty\":\"oct\"", "\"k\":\"\"", "AQAB", "=", "-_", "\"n\":\"\""];
    ::fuzz::run("credentials", &seeds, &words, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let token = Token::parse(&text);
        let mut way = token.as_ref().err().copied();
        if let Ok(token) = &token {
            let _ = token.check_time(1000, 60);
            token.audiences();
            way = keys.as_ref().and_then(|keys| keys.verify(token).err());
            assert!(way.is_some(), "a signature out of nothing: {text}");
        }
        let others = Jwks::parse(bytes);
        if let (Some(keys), Ok(token)) = (&others, Token::parse(&String::from_utf8_lossy(TOKEN))) {
            assert!(keys.verify(&token).is_err());
        }
        (way, others.is_some(), crate::peer::of_header(bytes).is_some())
    });
}

const BOOTSTRAP: &[u8] = br#"
node: {id: "sidecar~10.0.0.9~a.b~b.svc.cluster.local", cluster: a, metadata: {LABELS: {app: a}}}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 15000}}}
dynamic_resources:
  ads_config: {api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}
  cds_config: {ads: {}, resource_api_version: V3}
static_resources:
  listeners:
  - name: in
    address: {socket_address: {address: 0.0.0.0, port_value: 80}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: xds}
  clusters:
  - {name: xds, type: STATIC, connect_timeout: 1s, load_assignment: {cluster_name: xds, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: /x}}}}]}]}}
"#;

/// Text as `-c` reads it: YAML or JSON, the message, the tables.
#[test]
fn bootstrap() {
    let json = br#"{"stats_config": {"stats_tags": [{"tag_name": "a", "regex": "^(a)$"}]}, "layered_runtime": {"layers": []}}"#;
    let words = [
        "&a ",
        "*a",
        "<<: ",
        "\n- ",
        "!!binary ",
        "? ",
        "|\n ",
        "{",
        "}",
        "[",
        "]",
        "1e999",
        "0x1",
        "null",
        "\"@type\": ",
    ];
    ::fuzz::run("bootstrap", &[BOOTSTRAP, json], &words, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let message = match crate::bootstrap::read(None, Some(&text)) {
            Ok(parts) => envoy_api::bootstrap::Bootstrap::decode(&parts.encode()[..]).expect("it was taken apart"),
            Err(error) => return (Some(std::mem::discriminant(&error)), None, 0),
        };
        let again = envoy_api::bootstrap::Bootstrap::decode(&message.encode_to_vec()[..]);
        assert_eq!(again.as_ref(), Ok(&message), "it is read as it was written");
        match proxy_core::Bootstrap::compile(&message, &proxy_core::Options::default()) {
            Ok(tables) => (None, None, tables.listeners.len() + tables.clusters.len()),
            Err(rejected) => (None, Some(rejected.field), 0),
        }
    });
}
