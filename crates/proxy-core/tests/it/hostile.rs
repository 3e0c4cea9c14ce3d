//! Nothing that a peer or a control plane sends makes a decision panic.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use envoy_api::Message;
use envoy_api::pb::envoy::config::listener::v3 as listener;
use proptest::prelude::*;
use proxy_core::route::{RouteInput, RouteResult};
use proxy_core::{
    Address, Cluster, ConnectionInfo, FilterState, Format, FormatContext, Headers, Listener, Metadata, Options,
    RouteTable, StreamInfo,
};

use crate::reference::message;

fn table() -> RouteTable {
    let value = serde_json::json!({
        "name": "t", "ignore_port_in_host_matching": true,
        "virtual_hosts": [{"name": "v", "domains": ["a.test", "*.b.test", "c.*", "*"], "require_tls": "NONE", "routes": [
            {"match": {"path_separated_prefix": "/sep", "query_parameters": [{"name": "q"}]}, "route": {"cluster": "a", "prefix_rewrite": "/x"}},
            {"match": {"prefix": "/re"}, "redirect": {"prefix_rewrite": "/to", "https_redirect": true, "strip_query": true}},
            {"match": {"safe_regex": {"regex": "/r/([a-z]+)"}, "headers": [{"name": "x-n", "range_match": {"start": "1", "end": "9"}}]},
             "route": {"cluster": "a", "regex_rewrite": {"pattern": {"regex": "/r/([a-z]+)"}, "substitution": "/\\1"},
                       "host_rewrite_path_regex": {"pattern": {"regex": "^/(.+)$"}, "substitution": "\\1"}}},
            {"match": {"prefix": ""}, "route": {"cluster": "a", "timeout": "1s", "hash_policy": [{"cookie": {"name": "c", "ttl": "1s"}}, {"query_parameter": {"name": "q"}}]},
             "request_headers_to_add": [{"header": {"key": "x", "value": "%REQ(x-n):3% %DOWNSTREAM_REMOTE_ADDRESS%"}}]}
        ]}]
    });
    RouteTable::compile(&message(&value, envoy_api::type_url::ROUTE), &Options::default()).unwrap()
}

fn head() -> impl Strategy<Value = Headers> {
    let name = prop_oneof![
        Just(":path".to_owned()),
        Just(":authority".to_owned()),
        Just(":method".to_owned()),
        Just("cookie".to_owned()),
        Just("x-n".to_owned()),
        Just("grpc-timeout".to_owned()),
        Just("content-type".to_owned()),
        Just("x-forwarded-for".to_owned()),
        "[a-z-]{1,12}",
    ];
    let value = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        "[/a-z?=&;:%.\\[\\]#\"]{0,40}".prop_map(String::into_bytes),
        "/(sep|re|r)[/a-z?q=é%]{0,20}".prop_map(String::into_bytes),
    ];
    proptest::collection::vec((name, value), 0..12).prop_map(|pairs| {
        let mut headers = Headers::new();
        for (name, value) in pairs {
            headers.push(name.as_bytes(), &value);
        }
        headers
    })
}

proptest! {
    #[test]
    fn routing_takes_any_head(mut headers in head(), random: u64) {
        let table = table();
        let info = StreamInfo::new(Arc::new(ConnectionInfo::default()), UNIX_EPOCH);
        let input = RouteInput {
            headers: &headers, metadata: &Metadata::default(), filter_state: &FilterState::default(), tls: None, random,
        };
        if let RouteResult::Found(matched) = table.find(&input) {
            if let proxy_core::route::Action::Redirect(redirect) = &matched.route.action {
                redirect.location(&matched.route.matcher, &headers);
            }
            if let Some(forward) = matched.forward() {
                forward.timeouts(None, &mut headers, true, true);
                let remote = Address::Ip("1.2.3.4:5".parse().unwrap());
                forward.hash(&[], &proxy_core::route::HashContext {
                    headers: &headers, remote: &remote, local: &remote, filter_state: &FilterState::default(),
                });
            }
            let before = headers.clone();
            matched.finalize_request(&mut headers, &FormatContext::new(&info, Some(&before), None), true);
        }
    }

    #[test]
    fn formats_take_any_text(text in "[%A-Z_():a-z0-9?. é]{0,40}", headers in head()) {
        if let Ok(format) = Format::parse(&text, false) {
            let info = StreamInfo::new(Arc::new(ConnectionInfo::default()), UNIX_EPOCH);
            format.write(&FormatContext::new(&info, Some(&headers), Some(&headers)), &mut Vec::new());
        }
    }

    #[test]
    fn compilation_takes_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let options = Options::default();
        if let Ok(message) = listener::Listener::decode(bytes.as_slice()) {
            let _ = Listener::compile(&message, &options);
        }
        if let Ok(message) = envoy_api::route::RouteConfiguration::decode(bytes.as_slice()) {
            let _ = RouteTable::compile(&message, &options);
        }
        if let Ok(message) = envoy_api::cluster::Cluster::decode(bytes.as_slice()) {
            let _ = Cluster::compile(&message, &options);
        }
    }
}
