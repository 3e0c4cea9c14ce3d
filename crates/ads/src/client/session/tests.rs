use envoy_api::type_url::{CLUSTER, ENDPOINT, NAME_TABLE};

use super::*;

fn session(protocol: Protocol) -> Session {
    Session::new(protocol, Node { id: "me".to_owned(), ..Default::default() })
}

fn wanted(of: &[(&str, Wanted)]) -> BTreeMap<ArcStr, Wanted> {
    of.iter().map(|(type_url, wanted)| (ArcStr::from(*type_url), wanted.clone())).collect()
}

fn names(of: &[&str]) -> Wanted {
    Wanted::names(of.iter().map(|name| ArcStr::from(*name)))
}

fn delta(requests: Vec<Request>) -> Vec<discovery::DeltaDiscoveryRequest> {
    requests
        .into_iter()
        .map(|r| match r {
            Request::Delta(r) => r,
            Request::Sotw(_) => panic!("not delta"),
        })
        .collect()
}

fn answer(
    type_url: &str,
    nonce: &str,
    resources: &[(&str, &str)],
    removed: &[&str],
) -> discovery::DeltaDiscoveryResponse {
    let resource = |(name, version): &(&str, &str)| discovery::Resource {
        name: name.to_string(),
        version: version.to_string(),
        resource: Some(envoy_api::Any { type_url: type_url.to_owned(), value: Vec::new() }),
        ..Default::default()
    };
    discovery::DeltaDiscoveryResponse {
        type_url: type_url.to_owned(),
        nonce: nonce.to_owned(),
        resources: resources.iter().map(resource).collect(),
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

#[test]
fn the_node_is_introduced_once_a_stream_and_types_go_in_order() {
    let mut session = session(Protocol::Delta);
    session.on_connected();
    let wanted = wanted(&[(NAME_TABLE, Wanted::all()), (CLUSTER, Wanted::all()), (ENDPOINT, Wanted::nothing())]);
    let requests = delta(session.on_wanted(&wanted));
    assert_eq!(requests.iter().map(|r| r.type_url.as_str()).collect::<Vec<_>>(), [CLUSTER, NAME_TABLE]);
    assert_eq!(requests.iter().map(|r| r.node.is_some()).collect::<Vec<_>>(), [true, false]);
    assert!(requests[0].resource_names_subscribe.is_empty());
    assert!(session.on_wanted(&wanted).is_empty(), "nothing new");
    session.on_connected();
    assert!(delta(session.on_wanted(&wanted))[0].node.is_some(), "a new stream knows nothing");
}

#[test]
fn subscriptions_are_sent_as_differences() {
    let mut session = session(Protocol::Delta);
    session.on_connected();
    let requests = delta(session.on_wanted(&wanted(&[(ENDPOINT, names(&["a", "b"]))])));
    assert_eq!(requests[0].resource_names_subscribe, ["a", "b"]);
    let requests = delta(session.on_wanted(&wanted(&[(ENDPOINT, names(&["b", "c"]))])));
    assert_eq!(
        (&requests[0].resource_names_subscribe[..], &requests[0].resource_names_unsubscribe[..]),
        (&["c".to_owned()][..], &["a".to_owned()][..])
    );
}

#[test]
fn a_new_stream_starts_from_what_was_accepted() {
    let mut session = session(Protocol::Delta);
    session.on_connected();
    session.on_wanted(&wanted(&[(CLUSTER, Wanted::all())]));
    let (seen, updated, _) =
        session.on_delta(answer(CLUSTER, "1", &[("good", "1"), ("bad", "1"), ("gone", "1")], &[])).hand_over();
    assert_eq!(updated.len(), 3);
    let rejected = Rejected(vec![(ArcStr::from("bad"), "no such filter".to_owned())]);
    let Some(Request::Delta(nack)) = session.on_verdict(&seen, Err(rejected)) else { panic!() };
    assert_eq!(nack.response_nonce, "1");
    assert_eq!(nack.error_detail.unwrap().message, "bad: no such filter");
    let (seen, ..) = session.on_delta(answer(CLUSTER, "2", &[], &["gone"])).hand_over();
    let Some(Request::Delta(ack)) = session.on_verdict(&seen, Ok(())) else { panic!() };
    assert!(ack.error_detail.is_none() && ack.response_nonce == "2");
    session.on_connected();
    let requests = delta(session.on_wanted(&wanted(&[(CLUSTER, Wanted::all())])));
    assert_eq!(requests[0].initial_resource_versions, [("good".to_owned(), "1".to_owned())].into());
}

#[test]
fn sotw_removals_are_worked_out_and_versions_kept() {
    let mut session = session(Protocol::StateOfTheWorld);
    session.on_connected();
    let all = wanted(&[(CLUSTER, Wanted::all())]);
    let Request::Sotw(first) = session.on_wanted(&all).remove(0) else { panic!() };
    assert!(first.version_info.is_empty() && first.node.is_some());
    let name_of = |_: &str, body: &[u8]| Some(ArcStr::from(String::from_utf8_lossy(body).as_ref()));
    let response = |version: &str, names: &[&str]| discovery::DiscoveryResponse {
        version_info: version.to_owned(),
        nonce: format!("n{version}"),
        type_url: CLUSTER.to_owned(),
        resources: names
            .iter()
            .map(|n| envoy_api::Any { type_url: CLUSTER.to_owned(), value: n.as_bytes().to_vec() })
            .collect(),
        ..Default::default()
    };
    let (seen, _, removed) = session.on_sotw(response("1", &["a", "b"]), name_of).hand_over();
    assert!(removed.is_empty());
    session.on_verdict(&seen, Ok(()));
    let (seen, updated, removed) = session.on_sotw(response("2", &["b"]), name_of).hand_over();
    assert_eq!((updated.len(), removed), (1, vec![ArcStr::from("a")]));
    let rejected = Rejected(vec![(ArcStr::from("b"), "x".to_owned())]);
    let Some(Request::Sotw(nack)) = session.on_verdict(&seen, Err(rejected)) else { panic!() };
    assert_eq!(
        (nack.version_info.as_str(), nack.response_nonce.as_str()),
        ("1", "n2"),
        "a NACK keeps the accepted version"
    );
}

fn sotw(resources: Vec<envoy_api::Any>) -> discovery::DiscoveryResponse {
    discovery::DiscoveryResponse { version_info: "2".into(), type_url: CLUSTER.into(), resources, ..Default::default() }
}

#[test]
fn what_cannot_be_read_removes_nothing() {
    let mut session = session(Protocol::StateOfTheWorld);
    let of = |type_url: &str, value: &[u8]| envoy_api::Any { type_url: type_url.into(), value: value.into() };
    let odd = session.on_sotw(sotw(vec![of(ENDPOINT, b"\x0a\x01a")]), crate::client::resource_name);
    assert_eq!(odd.unreadable, [(ArcStr::from("a"), format!("it is of the type {ENDPOINT:?}"))]);
    let broken = session.on_sotw(sotw(vec![of(CLUSTER, b"\xff")]), crate::client::resource_name);
    assert_eq!((broken.unreadable.len(), broken.updated.len()), (1, 0));
}

#[test]
fn wrapped_resources_have_names_versions_and_times() {
    let mut session = session(Protocol::StateOfTheWorld);
    let wrapped = discovery::Resource {
        name: "a".into(),
        version: "7".into(),
        resource: Some(envoy_api::Any { type_url: CLUSTER.into(), value: b"body".to_vec() }),
        ttl: Some(envoy_api::pb::google::protobuf::Duration { seconds: 1, nanos: 500_000_000 }),
        ..Default::default()
    };
    let any = |of: &discovery::Resource| envoy_api::Any { type_url: WRAPPED.into(), value: of.encode_to_vec() };
    let received = session.on_sotw(sotw(vec![any(&wrapped)]), crate::client::resource_name);
    assert_eq!((&*received.updated[0].name, &*received.updated[0].version), ("a", "7"));
    assert_eq!(received.leases, [(ArcStr::from("a"), Some(Duration::from_millis(1500)))]);
    let heartbeat = discovery::Resource { resource: None, ..wrapped };
    let received = session.on_sotw(sotw(vec![any(&heartbeat)]), crate::client::resource_name);
    assert_eq!((received.updated.len(), received.unreadable.len(), received.leases.len()), (0, 0, 1));
}
