use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::*;
use crate::stream_info::{ConnectionInfo, HttpProtocol, ResponseFlags};

fn info() -> StreamInfo {
    let connection = ConnectionInfo { server_name: Some("sni.test".into()), ..ConnectionInfo::default() };
    let mut info = StreamInfo::new(Arc::new(connection), UNIX_EPOCH + Duration::from_millis(1_709_210_096_123));
    info.protocol = Some(HttpProtocol::Http11);
    info.response_code = Some(503);
    info.response_code_details = Some("upstream reset".into());
    info.flags = ResponseFlags::UPSTREAM_CONNECTION_FAILURE;
    info.times.complete = Some(Duration::from_millis(12));
    info.dynamic_metadata.set("ns", "k", serde_json::json!({"a": 1}));
    info
}

#[track_caller]
fn check(format: &str, expected: &str) {
    let info = info();
    let request = Headers::of([(":method", "GET"), (":path", "/a?b=1"), ("x-in", "hello")]);
    let mut out = Vec::new();
    let cx = FormatContext::new(&info, Some(&request), None);
    Format::parse(format, false).unwrap().write(&cx, &mut out);
    assert_eq!(String::from_utf8(out).unwrap(), expected);
}

#[test]
fn paths_times_and_sizes() {
    check("%PATH% %PATH(NQ)% %PATH(WQ:PATH)% %PATH(NQ:ORIG)%", "/a?b=1 /a /a?b=1 -");
    check("%REQUEST_HEADERS_BYTES% %RESPONSE_HEADERS_BYTES% %RESPONSE_TRAILERS_BYTES%", "30 0 0");
    check("%RESPONSE_CODE_DETAILS(ALLOW_WHITESPACES)%|%CUSTOM_FLAGS%", "upstream reset|");
    check("%REQUESTED_SERVER_NAME(HOST_FIRST)% %DOWNSTREAM_DETECTED_CLOSE_TYPE%", "sni.test Normal");
    check("%UPSTREAM_DETECTED_CLOSE_TYPE% %SPAN_ID% %UPSTREAM_HOSTS_ATTEMPTED%", "- - -");
    let mut info = info();
    info.times.upstream_first_rx = Some(Duration::from_micros(1500));
    let mut out = Vec::new();
    let format = "%COMMON_DURATION(DS_RX_BEG:US_RX_BEG:us)% %COMMON_DURATION(DS_RX_BEG:US_RX_BEG)%";
    Format::parse(format, false).unwrap().write(&FormatContext::new(&info, None, None), &mut out);
    assert_eq!(out, b"1500 1");
    let unique = || {
        let mut out = Vec::new();
        Format::parse("%UNIQUE_ID%", false).unwrap().write(&FormatContext::new(&info, None, None), &mut out);
        String::from_utf8(out).unwrap()
    };
    assert_eq!((unique().len(), unique().as_bytes()[14]), (36, b'4'));
    assert!(Format::parse("%PATH(NOPE)%", false).is_err() && Format::parse("%PATH(NQ:NOPE)%", false).is_err());
}

#[test]
fn expressions_and_commands_that_take_nothing() {
    check("%CEL(request.path)% %CEL(request.headers['x-none'])%", "/a?b=1 -");
    check("%PROTOCOL()% %DURATION%", "HTTP/1.1 12");
    for bad in ["%PROTOCOL(x)%", "%RESPONSE_CODE:2%", "%DURATION:1%", "%DYNAMIC_METADATA()%", "%REQ(a\nb)%"] {
        assert!(Format::parse(bad, false).is_err(), "{bad}");
    }
}

#[test]
fn commands() {
    check("%REQ(X-IN):2% %REQ(x-none)% %REQ(x-none?x-in)%", "he - hello");
    check("a%%b %PROTOCOL% %RESPONSE_CODE% %RESPONSE_FLAGS%", "a%b HTTP/1.1 503 UF");
    check("%START_TIME% %DURATION% %RESPONSE_DURATION%", "2024-02-29T12:34:56.123Z 12 -");
    check("%RESPONSE_CODE_DETAILS% %REQUESTED_SERVER_NAME%", "upstream_reset sni.test");
    check("%DYNAMIC_METADATA(ns:k)% %DYNAMIC_METADATA(ns:k:a)% %DYNAMIC_METADATA(x)%", r#"{"a":1} 1 -"#);
    check("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_HOST%", "0.0.0.0 -");
    check("%PATH(NQ:PATH)% %PATH(NQ)%", "/a /a");
}

#[test]
fn malformed_formats_are_refused() {
    for format in ["%", "%REQ", "%REQ(", "%REQ(a%", "%WHAT%", "%REQ(a):x%", "%REQ%", "%lower%"] {
        assert!(Format::parse(format, false).is_err(), "{format}");
    }
}

#[test]
fn json_keeps_numbers_and_nulls() {
    let info = info();
    let fields = envoy_api::pb::google::protobuf::Struct {
        fields: [("code", "%RESPONSE_CODE%"), ("a", "x %PROTOCOL%"), ("none", "%UPSTREAM_HOST%"), ("text", "q\"")]
            .into_iter()
            .map(|(k, v)| (k.to_owned(), pb::Value { kind: Some(pb::ValueKind::StringValue(v.to_owned())) }))
            .collect(),
    };
    let cx = FormatContext::new(&info, None, None);
    let mut out = Vec::new();
    JsonFormat::compile(&fields, false, Dialect::default()).unwrap().write(&cx, &mut out);
    out.push(b' ');
    JsonFormat::compile(&fields, true, Dialect::default()).unwrap().write(&cx, &mut out);
    assert_eq!(
        String::from_utf8(out).unwrap(),
        r#"{"a":"x HTTP/1.1","code":503,"none":null,"text":"q\""} {"a":"x HTTP/1.1","code":503,"text":"q\""}"#
    );
}

#[test]
fn commands_take_what_envoys_take() {
    for good in ["%PATH:3%", "%REQ(?x-in)%", "%REQ(a-b?:path):3%", "%QUERY_PARAMS(DECODED)%", "%FILTER_STATE(a:)%"] {
        assert!(Format::parse(good, false).is_ok(), "{good}");
    }
    let bad = [
        "%VIRTUAL_HOST_NAME%",
        "%UPSTREAM_LOCALITY%",
        "%TRAFFIC_DIRECTION%",
        "%PER_REQUEST_STATE(a)%",
        "%REQ_WITHOUT_QUERY(:path)%",
        "%UPSTREAM_PEER_SERIAL%",
        "%START_TIME:3%",
        "%GRPC_STATUS(NUMBER):1%",
        "%UPSTREAM_HOST(a)%",
        "%QUERY_PARAMS(x)%",
        "%REQ(a b)%",
        "%COMMON_DURATION(a:b:ms:c)%",
        r#"%COALESCE({"operators": [{"command": "PROTOCOL", "max_length": 2}]})%"#,
        r#"%COALESCE({"operators": [{"command": "REQ", "param": "a", "max_length": 0}]})%"#,
    ];
    for bad in bad {
        assert!(Format::parse(bad, false).is_err(), "{bad}");
    }
    let old = Dialect { old_forms: true, ..Dialect::default() };
    assert!(Format::in_dialect("%PER_REQUEST_STATE(a)%%UPSTREAM_METADATA([\"a\", \"b\"])%", true, old).is_ok());
}

#[test]
fn queries_are_decoded_as_far_as_they_can_be_read() {
    let mut out = Vec::new();
    let info = info();
    let request = Headers::of([(":path", "/?a=%41%20%3c&b=%zz%4")]);
    let cx = FormatContext::new(&info, Some(&request), None);
    Format::parse("%QUERY_PARAMS(DECODED)%", false).unwrap().write(&cx, &mut out);
    assert_eq!(String::from_utf8(out).unwrap(), "a=A%20%3c&b=zz%4");
}
