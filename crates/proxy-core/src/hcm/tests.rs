use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::address::Address;
use crate::headers::Headers;
use crate::stream_info::{ConnectionInfo, PeerCertificate, StreamInfo, TlsInfo};

fn hcm(extra: serde_json::Value) -> HttpConnectionManager {
    let mut config = json!({
        "stat_prefix": "in", "route_config": {"name": "r"},
        "http_filters": [{"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
    });
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let url = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let bytes = envoy_api::json::from_json(url, &config).unwrap();
    let options = Options { local_address: Some("192.0.2.1".parse().unwrap()), ..Options::default() };
    HttpConnectionManager::compile(&prost::Message::decode(bytes.as_slice()).unwrap(), &options).unwrap()
}

fn connection(remote: &str) -> ConnectionInfo {
    let remote = Address::Ip(remote.parse().unwrap());
    ConnectionInfo {
        remote: remote.clone(),
        direct_remote: remote,
        local: Address::Ip("10.0.0.9:8080".parse().unwrap()),
        ..ConnectionInfo::default()
    }
}

fn conform(
    extra: serde_json::Value,
    connection: &ConnectionInfo,
    headers: &[(&str, &str)],
) -> (Headers, RequestIdentity) {
    let mut head = Headers::of([(":method", "GET"), (":authority", "a.test:8080"), (":path", "/")]);
    for (name, value) in headers {
        head.push(name.as_bytes(), value.as_bytes());
    }
    let info = StreamInfo::new(Arc::new(connection.clone()), std::time::SystemTime::UNIX_EPOCH);
    let identity = conform_request(&hcm(extra), &mut head, &info, || "id".to_owned());
    (head, identity)
}

#[test]
fn forwarding_headers_at_the_edge() {
    let edge = json!({"use_remote_address": true});
    let (headers, who) = conform(
        edge.clone(),
        &connection("127.0.0.1:5"),
        &[
            ("x-forwarded-for", "1.2.3.4"),
            ("x-envoy-retry-on", "5xx"),
            ("x-envoy-original-host", "o"),
            ("x-request-id", "theirs"),
        ],
    );
    assert_eq!(headers.get_str("x-forwarded-for"), Some("1.2.3.4,192.0.2.1"));
    assert_eq!(headers.get_str("x-envoy-external-address"), Some("127.0.0.1"));
    assert_eq!(headers.get_str("x-request-id"), Some("id"));
    assert!(!headers.contains("x-envoy-retry-on") && !headers.contains("x-envoy-original-host"));
    assert!(who.edge && !who.internal);
    let hops = json!({"use_remote_address": true, "xff_num_trusted_hops": 1});
    let (headers, who) = conform(
        hops,
        &connection("9.9.9.9:5"),
        &[("x-forwarded-for", "1.2.3.4, 5.6.7.8"), ("x-forwarded-proto", "https")],
    );
    assert_eq!(who.remote.to_string(), "5.6.7.8:0");
    assert_eq!((headers.get_str("x-forwarded-proto"), headers.scheme()), (Some("https"), Some("https")));
}

#[test]
fn a_sidecar_trusts_the_header() {
    let (headers, who) =
        conform(json!({}), &connection("10.0.0.2:5"), &[("x-forwarded-for", "1.2.3.4"), ("x-request-id", "theirs")]);
    assert_eq!(who.remote.to_string(), "1.2.3.4:0");
    assert_eq!(
        (headers.get_str("x-forwarded-for"), headers.get_str("x-request-id")),
        (Some("1.2.3.4"), Some("theirs"))
    );
    let (_, who) = conform(json!({}), &connection("10.0.0.2:5"), &[("x-forwarded-for", "junk")]);
    assert_eq!(who.remote.to_string(), "10.0.0.2:5");
}

#[test]
fn inside_is_what_the_configuration_says() {
    let ranges = json!({"use_remote_address": true, "internal_address_config": {"cidr_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 8}]}});
    let (headers, who) = conform(ranges, &connection("10.0.0.2:5"), &[("x-envoy-max-retries", "2")]);
    assert!(who.internal && headers.contains("x-envoy-max-retries"));
    assert_eq!(headers.get_str("x-envoy-internal"), Some("true"));
}

#[test]
fn hop_by_hop_headers_go_but_upgrades_stay() {
    let hop =
        [("connection", "keep-alive"), ("keep-alive", "1"), ("te", "gzip, trailers"), ("transfer-encoding", "chunked")];
    let (headers, _) = conform(json!({}), &connection("10.0.0.2:5"), &hop);
    assert!(["connection", "keep-alive", "transfer-encoding"].iter().all(|n| !headers.contains(n)));
    assert_eq!(headers.get_str("te"), Some("trailers"));
    let (headers, _) =
        conform(json!({}), &connection("10.0.0.2:5"), &[("connection", "Upgrade"), ("upgrade", "websocket")]);
    assert_eq!((headers.get_str("upgrade"), headers.get_str("content-length")), (Some("websocket"), None));
}

#[test]
fn ports_are_stripped_from_hosts() {
    for (mode, expected) in
        [("strip_matching_host_port", "a.test"), ("strip_any_host_port", "a.test"), ("merge_slashes", "a.test:8080")]
    {
        let (headers, _) = conform(json!({mode: true}), &connection("10.0.0.2:5"), &[]);
        assert_eq!(headers.authority(), Some(expected), "{mode}");
    }
}

#[test]
fn client_certificate_header() {
    let certificate = |uri: &str| PeerCertificate {
        uri_sans: vec![uri.into()],
        sha256: "ab".into(),
        subject: "CN=x".into(),
        dns_sans: vec!["d.test".into()],
        ..PeerCertificate::default()
    };
    let tls = TlsInfo {
        peer: Some(certificate("spiffe://td/ns/a/sa/c")),
        local: Some(certificate("spiffe://td/ns/a/sa/s")),
        ..TlsInfo::default()
    };
    let mutual = ConnectionInfo { tls: Some(Arc::new(tls)), ..connection("10.0.0.2:5") };
    let details = json!({"subject": true, "uri": true, "dns": true});
    let value = |mode: &str, connection: &ConnectionInfo| {
        let config = json!({"forward_client_cert_details": mode, "set_current_client_cert_details": details});
        conform(config, connection, &[("x-forwarded-client-cert", "By=old")])
            .0
            .get_str("x-forwarded-client-cert")
            .map(str::to_owned)
    };
    let ours = "By=spiffe://td/ns/a/sa/s;Hash=ab;Subject=\"CN=x\";URI=spiffe://td/ns/a/sa/c;DNS=d.test";
    assert_eq!(value("APPEND_FORWARD", &mutual), Some(format!("By=old,{ours}")));
    assert_eq!(value("SANITIZE_SET", &mutual).as_deref(), Some(ours));
    assert_eq!(value("FORWARD_ONLY", &mutual).as_deref(), Some("By=old"));
    assert_eq!(value("SANITIZE", &mutual), None);
    assert_eq!(value("APPEND_FORWARD", &connection("10.0.0.2:5")), None);
    assert_eq!(value("ALWAYS_FORWARD_ONLY", &connection("10.0.0.2:5")).as_deref(), Some("By=old"));
}

#[test]
fn responses_name_the_server() {
    let respond = |extra: serde_json::Value| {
        let mut headers = Headers::of([
            (":status", "200"),
            ("server", "app"),
            ("connection", "close"),
            ("transfer-encoding", "chunked"),
        ]);
        conform_response(&hcm(extra), &mut headers, &Headers::new());
        assert!(!headers.contains("connection") && !headers.contains("transfer-encoding"));
        headers.get_str("server").unwrap().to_owned()
    };
    assert_eq!(respond(json!({"server_name": "istio-envoy"})), "istio-envoy");
    assert_eq!(respond(json!({"server_header_transformation": "APPEND_IF_ABSENT"})), "app");
    assert_eq!(respond(json!({"server_header_transformation": "PASS_THROUGH"})), "app");
}

#[test]
fn local_replies_are_rewritten() {
    use crate::format::FormatContext;
    use crate::stream_info::StreamInfo;
    let hcm = hcm(json!({"local_reply_config": {
        "mappers": [{"filter": {"status_code_filter": {"comparison": {"op": "EQ", "value": {"default_value": 503}}}}, "status_code": 418,
            "body": {"inline_string": "teapot"}, "headers_to_add": [{"header": {"key": "x-a", "value": "1"}},
                {"header": {"key": "x-b", "value": "2"}, "append_action": "ADD_IF_ABSENT"}]}],
        "body_format": {"json_format": {"code": "%RESPONSE_CODE%", "body": "%LOCAL_REPLY_BODY%"}}}}));
    let mut info = StreamInfo::new(Arc::new(ConnectionInfo::default()), std::time::UNIX_EPOCH);
    info.response_code = Some(503);
    let mut headers = Headers::new();
    headers.set_status(503);
    headers.push(b"x-b", b"own");
    let rewritten = hcm.local_reply.rewrite(503, "old", &mut headers, &FormatContext::new(&info, None, None)).unwrap();
    assert_eq!((headers.status(), &*rewritten.content_type), (Some(418), "application/json"));
    assert_eq!(String::from_utf8(rewritten.body).unwrap().trim(), r#"{"body":"teapot","code":418}"#);
    // A header that is there already stays as it is, where only absent ones are added.
    assert_eq!((headers.get_str("x-a"), headers.get_str("x-b")), (Some("1"), Some("own")));
}

#[test]
fn connect_udp_names_its_target_in_the_path() {
    let of = |path: &str| connect_udp_target(path.as_bytes());
    assert_eq!(of("/.well-known/masque/udp/a.test/53/").as_deref(), Some("a.test:53"));
    assert_eq!(of("/.well-known/masque/udp/2001%3adb8%3a%3a1/53/").as_deref(), Some("[2001:db8::1]:53"));
    for none in ["/x", "/.well-known/masque/udp/a.test/53", "/.well-known/masque/udp//53/"] {
        assert_eq!(of(none), None, "{none}");
    }
    assert_eq!(of("/.well-known/masque/udp/a/1/2/"), None, "one segment too many");
    assert_eq!(of("/.well-known/masque/udp/fe80%3a%3a1%25e/53/"), None, "a zone");
}
