use envoy_api::type_url::{CLUSTER, ENDPOINT, LISTENER, ROUTE};

use super::*;

fn resources(of: &[(&str, &str)]) -> Arc<[Resource]> {
    of.iter().map(|(name, version)| Resource::with_version(*name, *version, Vec::<u8>::new())).collect()
}

fn request(type_url: &str) -> Request {
    Request { type_url: type_url.to_owned(), ..Default::default() }
}

fn named(type_url: &str, names: &[&str]) -> Request {
    Request { names: names.iter().map(ToString::to_string).collect(), ..request(type_url) }
}

fn ack(response: &Response) -> Request {
    Request { nonce: response.nonce.clone(), ..request(&response.type_url) }
}

fn nack(response: &Response, error: &str) -> Request {
    Request { error: Some(error.to_owned()), ..ack(response) }
}

impl Request {
    fn with_nonce(self, response: &Response) -> Request {
        Request { nonce: response.nonce.clone(), ..self }
    }
}

/// What a response carries: `name@version` for resources, `-name` for removals.
fn contents(response: Option<&Response>) -> Option<Vec<String>> {
    let response = response?;
    let resources = response.resources.iter().map(|r| format!("{}@{}", r.name, r.version));
    Some(resources.chain(response.removed.iter().map(|name| format!("-{name}"))).collect())
}

/// The types due, in order.
fn due(session: &Session) -> Option<String> {
    session.due().map(|(type_url, names)| {
        let names = match names {
            Names::Wildcard => "*".to_owned(),
            Names::List(names) => names.join(","),
        };
        format!("{}:{names}", type_url.rsplit('.').next().unwrap())
    })
}

#[test]
fn delta_sends_changes_and_removals_once() {
    let mut session = Session::new(Protocol::Delta, 1);
    session.on_request(request(CLUSTER)).unwrap();
    assert_eq!(due(&session).as_deref(), Some("Cluster:*"));
    let first = session.evaluate(CLUSTER, resources(&[("a", "1"), ("b", "1")])).unwrap();
    assert_eq!(contents(Some(&first)).unwrap(), ["a@1", "b@1"]);
    assert_eq!(session.on_request(ack(&first)).unwrap(), Heard::Acked { nonce: first.nonce.clone() });
    assert_eq!(due(&session), None, "an acknowledgement asks for nothing");

    session.on_revision(2);
    assert_eq!(
        contents(session.evaluate(CLUSTER, resources(&[("a", "1"), ("b", "1")])).as_ref()),
        None,
        "nothing changed"
    );
    session.on_revision(3);
    let changed = session.evaluate(CLUSTER, resources(&[("a", "2"), ("c", "1")]));
    assert_eq!(contents(changed.as_ref()).unwrap(), ["a@2", "c@1", "-b"]);
    session.on_revision(4);
    assert_eq!(contents(session.evaluate(CLUSTER, resources(&[("a", "2"), ("c", "1")])).as_ref()), None);
    session.on_revision(5);
    assert_eq!(
        contents(session.evaluate(CLUSTER, resources(&[("a", "2"), ("b", "1"), ("c", "1")])).as_ref()).unwrap(),
        ["b@1"],
        "b is back"
    );
}

/// gRPC's clients ask for listeners and clusters by name, and give them up when channels close.
#[test]
fn sotw_names_given_up_are_no_wish_for_all() {
    let mut session = Session::new(Protocol::StateOfTheWorld, 1);
    session.on_request(named(LISTENER, &["a", "b"])).unwrap();
    let first = session.evaluate(LISTENER, resources(&[("a", "1"), ("b", "1")])).unwrap();
    session.on_request(named(LISTENER, &["b"]).with_nonce(&first)).unwrap();
    assert_eq!(due(&session), None, "names given up need no answer");
    session.on_request(ack(&first)).unwrap();
    assert_eq!(due(&session), None);
    session.on_revision(2);
    assert_eq!(due(&session).as_deref(), Some("Listener:"));
    assert_eq!(contents(session.evaluate(LISTENER, resources(&[])).as_ref()), None);
    session.on_request(named(LISTENER, &["c"]).with_nonce(&first)).unwrap();
    assert_eq!(due(&session).as_deref(), Some("Listener:c"));
    session.evaluate(LISTENER, resources(&[("c", "1")])).unwrap();
    // A client that starts over says anew what it wants.
    session.on_request(request(LISTENER)).unwrap();
    assert_eq!(due(&session).as_deref(), Some("Listener:*"));
}

/// What a user saw: a changed DestinationRule kept an Envoy's cluster warming for good, and `wait` never ended.
#[test]
fn delta_sends_the_endpoints_of_a_replaced_cluster_again() {
    let mut session = Session::new(Protocol::Delta, 1);
    session.on_request(request(CLUSTER)).unwrap();
    let clusters = session.evaluate(CLUSTER, resources(&[("a", "1"), ("b", "1")])).unwrap();
    session.on_request(ack(&clusters)).unwrap();
    session.on_request(named(ENDPOINT, &["a", "b"])).unwrap();
    let endpoints = session.evaluate(ENDPOINT, resources(&[("a", "1"), ("b", "1")])).unwrap();
    session.on_request(ack(&endpoints)).unwrap();
    session.on_revision(2);
    session.evaluate(ENDPOINT, resources(&[("a", "1"), ("b", "1")]));
    let clusters = session.evaluate(CLUSTER, resources(&[("a", "2"), ("b", "1"), ("c", "1")])).unwrap();
    assert_eq!(contents(Some(&clusters)).unwrap(), ["a@2", "c@1"]);
    assert_eq!(due(&session).as_deref(), Some("ClusterLoadAssignment:a,b"));
    let again = session.evaluate(ENDPOINT, resources(&[("a", "1"), ("b", "1")])).unwrap();
    assert_eq!(contents(Some(&again)).unwrap(), ["a@1"]);
    session.on_request(ack(&again)).unwrap();
    session.on_request(ack(&clusters)).unwrap();
    assert_eq!(session.newly_synced(), Some(2));
}

#[test]
fn delta_first_answer_comes_even_if_empty() {
    let mut session = Session::new(Protocol::Delta, 1);
    session.on_request(request(LISTENER)).unwrap();
    assert_eq!(contents(session.evaluate(LISTENER, resources(&[])).as_ref()).unwrap(), Vec::<String>::new());
    session.on_request(named(ROUTE, &["r"])).unwrap();
    assert_eq!(
        contents(session.evaluate(ROUTE, resources(&[])).as_ref()).unwrap(),
        ["-r"],
        "a name that does not exist is said to be gone"
    );
    session.on_revision(2);
    assert_eq!(contents(session.evaluate(ROUTE, resources(&[])).as_ref()), None, "once");
    assert_eq!(contents(session.evaluate(ROUTE, resources(&[("r", "1")])).as_ref()).unwrap(), ["r@1"]);
}

#[test]
fn delta_subscriptions_grow_shrink_and_repeat() {
    let mut session = Session::new(Protocol::Delta, 1);
    session.on_request(named(ENDPOINT, &["a"])).unwrap();
    session.evaluate(ENDPOINT, resources(&[("a", "1")])).unwrap();
    session.on_request(named(ENDPOINT, &["b"])).unwrap();
    assert_eq!(due(&session).as_deref(), Some("ClusterLoadAssignment:a,b"));
    assert_eq!(contents(session.evaluate(ENDPOINT, resources(&[("a", "1"), ("b", "1")])).as_ref()).unwrap(), ["b@1"]);
    // An Envoy that replaces a cluster asks for its endpoints again.
    session.on_request(named(ENDPOINT, &["a"])).unwrap();
    assert_eq!(contents(session.evaluate(ENDPOINT, resources(&[("a", "1"), ("b", "1")])).as_ref()).unwrap(), ["a@1"]);
    session.on_request(Request { unsubscribe: vec!["a".to_owned()], ..request(ENDPOINT) }).unwrap();
    session.on_revision(2);
    assert_eq!(due(&session).as_deref(), Some("ClusterLoadAssignment:b"));
    assert_eq!(
        contents(session.evaluate(ENDPOINT, resources(&[("b", "1")])).as_ref()),
        None,
        "no removal for what nobody wants"
    );
}

#[test]
fn delta_reconnect_sends_only_what_the_client_lacks() {
    let mut session = Session::new(Protocol::Delta, 9);
    let initial_versions = HashMap::from([("a".to_owned(), "1".to_owned()), ("gone".to_owned(), "1".to_owned())]);
    session.on_request(Request { initial_versions, ..request(CLUSTER) }).unwrap();
    assert_eq!(
        contents(session.evaluate(CLUSTER, resources(&[("a", "1"), ("b", "1")])).as_ref()).unwrap(),
        ["b@1", "-gone"]
    );
}

#[test]
fn a_nack_is_reported_and_not_answered_until_something_changes() {
    for protocol in [Protocol::Delta, Protocol::StateOfTheWorld] {
        let mut session = Session::new(protocol, 1);
        session.on_request(request(LISTENER)).unwrap();
        let first = session.evaluate(LISTENER, resources(&[("l", "1")])).unwrap();
        let heard = session.on_request(nack(&first, "l: bad")).unwrap();
        assert_eq!(heard, Heard::Nacked { nonce: first.nonce.clone(), error: "l: bad".to_owned() });
        assert_eq!((due(&session), session.newly_synced()), (None, None), "{protocol}");
        session.on_revision(2);
        assert_eq!(contents(session.evaluate(LISTENER, resources(&[("l", "1")])).as_ref()), None);
        session.on_revision(3);
        let fixed = session.evaluate(LISTENER, resources(&[("l", "2")])).unwrap();
        session.on_request(ack(&fixed)).unwrap();
        assert_eq!(session.newly_synced(), Some(3), "{protocol}");
        assert_eq!(session.newly_synced(), None, "once");
    }
}

#[test]
fn sotw_wildcard_types_go_whole_and_others_in_part() {
    let mut session = Session::new(Protocol::StateOfTheWorld, 1);
    session.on_request(request(CLUSTER)).unwrap();
    let clusters = session.evaluate(CLUSTER, resources(&[("a", "1"), ("b", "1")])).unwrap();
    session.on_request(ack(&clusters)).unwrap();
    session.on_revision(2);
    assert_eq!(
        contents(session.evaluate(CLUSTER, resources(&[("a", "1"), ("b", "2")])).as_ref()).unwrap(),
        ["a@1", "b@2"]
    );
    session.on_revision(3);
    assert_eq!(
        contents(session.evaluate(CLUSTER, resources(&[("a", "1")])).as_ref()).unwrap(),
        ["a@1"],
        "a removal is the absence"
    );
    session.on_revision(4);
    assert_eq!(contents(session.evaluate(CLUSTER, resources(&[("a", "1")])).as_ref()), None);

    session.on_request(named(ROUTE, &["x", "y"])).unwrap();
    session.evaluate(ROUTE, resources(&[("x", "1"), ("y", "1")])).unwrap();
    session.on_revision(5);
    assert_eq!(contents(session.evaluate(ROUTE, resources(&[("x", "1"), ("y", "2")])).as_ref()).unwrap(), ["y@2"]);
}

#[test]
fn sotw_endpoints_are_sent_again_when_clusters_were() {
    let mut session = Session::new(Protocol::StateOfTheWorld, 1);
    session.on_request(request(CLUSTER)).unwrap();
    let clusters = session.evaluate(CLUSTER, resources(&[("c", "1")])).unwrap();
    session.on_request(ack(&clusters)).unwrap();
    session.on_request(named(ENDPOINT, &["c"])).unwrap();
    let endpoints = session.evaluate(ENDPOINT, resources(&[("c", "1")])).unwrap();
    let again = || Request { names: vec!["c".to_owned()], ..ack(&endpoints) };
    session.on_request(again()).unwrap();
    assert_eq!(due(&session), None);
    session.on_revision(2);
    session.evaluate(CLUSTER, resources(&[("c", "2")])).unwrap();
    assert_eq!(
        contents(session.evaluate(ENDPOINT, resources(&[("c", "1")])).as_ref()),
        None,
        "endpoints did not change"
    );
    session.on_request(again()).unwrap();
    assert_eq!(
        contents(session.evaluate(ENDPOINT, resources(&[("c", "1")])).as_ref()).unwrap(),
        ["c@1"],
        "but a warming cluster waits for them"
    );
}

#[test]
fn sotw_stale_nonces_change_nothing_and_names_do() {
    let mut session = Session::new(Protocol::StateOfTheWorld, 1);
    session.on_request(named(ROUTE, &["x"])).unwrap();
    let first = session.evaluate(ROUTE, resources(&[("x", "1")])).unwrap();
    session.on_revision(2);
    let second = session.evaluate(ROUTE, resources(&[("x", "2")])).unwrap();
    let late = Request { names: vec!["x".to_owned(), "y".to_owned()], ..ack(&first) };
    assert_eq!(session.on_request(late).unwrap(), Heard::Stale);
    assert_eq!(due(&session), None);
    let more = Request { names: vec!["x".to_owned(), "y".to_owned()], ..ack(&second) };
    session.on_request(more).unwrap();
    assert_eq!(due(&session).as_deref(), Some("RouteConfiguration:x,y"));
    assert_eq!(contents(session.evaluate(ROUTE, resources(&[("x", "2"), ("y", "1")])).as_ref()).unwrap(), ["y@1"]);
}

#[test]
fn types_are_due_in_push_order() {
    let mut session = Session::new(Protocol::Delta, 1);
    for type_url in ["other", ROUTE, LISTENER, ENDPOINT, CLUSTER] {
        session.on_request(named(type_url, &["x"])).unwrap();
        let response = session.evaluate(type_url, Arc::default()).unwrap();
        session.on_request(ack(&response)).unwrap();
    }
    session.on_revision(2);
    let mut order = Vec::new();
    while let Some((type_url, _)) = session.due() {
        order.push(type_url.rsplit('.').next().unwrap().to_owned());
        session.evaluate(&type_url, Arc::default());
    }
    assert_eq!(order, ["Cluster", "ClusterLoadAssignment", "Listener", "RouteConfiguration", "other"]);
}

#[test]
fn synced_means_all_types_compared_and_acknowledged() {
    let mut session = Session::new(Protocol::Delta, 7);
    assert_eq!(session.newly_synced(), None);
    session.on_request(request(CLUSTER)).unwrap();
    let clusters = session.evaluate(CLUSTER, resources(&[("c", "1")])).unwrap();
    assert_eq!(session.newly_synced(), None);
    session.on_request(ack(&clusters)).unwrap();
    assert_eq!(session.newly_synced(), Some(7));
    session.on_request(named(ENDPOINT, &["c"])).unwrap();
    let endpoints = session.evaluate(ENDPOINT, resources(&[("c", "1")])).unwrap();
    session.on_revision(8);
    session.evaluate(CLUSTER, resources(&[("c", "1")]));
    session.evaluate(ENDPOINT, resources(&[("c", "1")]));
    assert_eq!(session.newly_synced(), None, "endpoints are not acknowledged");
    session.on_request(ack(&endpoints)).unwrap();
    assert_eq!(session.newly_synced(), Some(8), "a revision without changes for this client needs no new answer");
}

#[test]
fn hostile_clients_are_bounded() {
    let mut session = Session::new(Protocol::Delta, 1);
    assert_eq!(session.on_request(request("")), Err(BadRequest::NoType));
    for i in 0..MAX_TYPES {
        session.on_request(request(&format!("t{i}"))).unwrap();
    }
    assert_eq!(session.on_request(request("one-more")), Err(BadRequest::TooManyTypes));
    let many = (0..=MAX_NAMES).map(|i| i.to_string()).collect();
    assert!(matches!(
        session.on_request(Request { names: many, ..request("t1") }),
        Err(BadRequest::TooManyNames { .. })
    ));
    assert_eq!(
        session.on_request(Request { error: Some("x".to_owned()), ..request("t2") }).unwrap(),
        Heard::Subscribed
    );
}

/// A session that watches clusters, endpoints of `a`, and routes, all answered.
fn settled(protocol: Protocol) -> Session {
    let mut session = Session::new(protocol, 1);
    for (request, of) in
        [(request(CLUSTER), CLUSTER), (named(ENDPOINT, &["a"]), ENDPOINT), (named(ROUTE, &["r"]), ROUTE)]
    {
        let names = request.names.clone();
        session.on_request(request).unwrap();
        let name = if of == ROUTE { "r" } else { "a" };
        let response = session.evaluate(of, resources(&[(name, "1")])).unwrap();
        session
            .on_request(Request {
                names: if protocol == Protocol::Delta { Vec::new() } else { names },
                ..ack(&response)
            })
            .unwrap();
    }
    assert_eq!((session.newly_synced(), due(&session)), (Some(1), None));
    session
}

#[test]
fn routes_wait_until_new_clusters_are_known_with_their_endpoints() {
    let mut session = settled(Protocol::Delta);
    session.on_revision(2);
    let clusters = session.evaluate(CLUSTER, resources(&[("a", "1"), ("b", "1")])).unwrap();
    assert_eq!(due(&session).as_deref(), Some("ClusterLoadAssignment:a"));
    session.evaluate(ENDPOINT, resources(&[("a", "1")]));
    assert_eq!(due(&session), None, "routes may lead to b, which the proxy does not have yet");
    assert!(session.is_waiting());
    session.on_request(named(ENDPOINT, &["b"])).unwrap();
    session.on_request(ack(&clusters)).unwrap();
    assert_eq!(due(&session).as_deref(), Some("ClusterLoadAssignment:a,b"));
    session.evaluate(ENDPOINT, resources(&[("a", "1"), ("b", "1")])).unwrap();
    assert_eq!(due(&session).as_deref(), Some("RouteConfiguration:r"));
    assert!(!session.is_waiting());
}

#[test]
fn a_refusal_of_clusters_or_impatience_lets_routes_go() {
    let mut session = settled(Protocol::Delta);
    session.on_revision(2);
    let clusters = session.evaluate(CLUSTER, resources(&[("a", "2")])).unwrap();
    session.evaluate(ENDPOINT, resources(&[("a", "1")]));
    session.on_request(nack(&clusters, "no")).unwrap();
    assert_eq!(due(&session).as_deref(), Some("RouteConfiguration:r"));
    session.evaluate(ROUTE, resources(&[("r", "1")]));
    session.on_revision(3);
    session.evaluate(CLUSTER, resources(&[("a", "3")])).unwrap();
    session.evaluate(ENDPOINT, resources(&[("a", "1")]));
    assert_eq!(due(&session), None);
    session.lift_gate();
    assert_eq!(due(&session).as_deref(), Some("RouteConfiguration:r"));
}

#[test]
fn clusters_are_removed_after_the_routes_that_led_to_them() {
    let mut session = settled(Protocol::Delta);
    session.on_revision(2);
    assert_eq!(contents(session.evaluate(CLUSTER, resources(&[])).as_ref()), None, "a is still in use");
    session.evaluate(ENDPOINT, resources(&[("a", "1")]));
    let routes = session.evaluate(ROUTE, resources(&[("r", "2")])).unwrap();
    assert_eq!((due(&session), session.newly_synced()), (None, None));
    session.on_request(ack(&routes)).unwrap();
    assert_eq!(due(&session).as_deref(), Some("Cluster:*"));
    let clusters = session.evaluate(CLUSTER, resources(&[])).unwrap();
    assert_eq!(contents(Some(&clusters)).unwrap(), ["-a"]);
    session.on_request(ack(&clusters)).unwrap();
    assert_eq!(session.newly_synced(), Some(2));
}

#[test]
fn clusters_of_refused_routes_stay() {
    let mut session = settled(Protocol::Delta);
    session.on_revision(2);
    session.evaluate(CLUSTER, resources(&[]));
    session.evaluate(ENDPOINT, resources(&[("a", "1")]));
    let routes = session.evaluate(ROUTE, resources(&[("r", "2")])).unwrap();
    session.on_request(nack(&routes, "no")).unwrap();
    assert_eq!(due(&session), None, "the old route leads to a");
    session.on_revision(3);
    assert_eq!(contents(session.evaluate(CLUSTER, resources(&[])).as_ref()), None);
}

#[test]
fn a_cluster_that_comes_back_in_time_is_never_removed() {
    let mut session = settled(Protocol::Delta);
    session.on_revision(2);
    session.evaluate(CLUSTER, resources(&[]));
    session.on_revision(3);
    assert_eq!(contents(session.evaluate(CLUSTER, resources(&[("a", "1")])).as_ref()), None);
    session.evaluate(ENDPOINT, resources(&[("a", "1")]));
    session.evaluate(ROUTE, resources(&[("r", "1")]));
    assert_eq!((due(&session), session.newly_synced()), (None, Some(3)));
}

#[test]
fn a_cluster_that_no_route_led_to_goes_without_waiting_for_an_acknowledgement_that_never_comes() {
    let mut session = settled(Protocol::Delta);
    session.on_revision(2);
    assert_eq!(contents(session.evaluate(CLUSTER, resources(&[])).as_ref()), None);
    session.evaluate(ENDPOINT, resources(&[("a", "1")]));
    assert_eq!(contents(session.evaluate(ROUTE, resources(&[("r", "1")])).as_ref()), None, "routes did not change");
    assert_eq!(due(&session).as_deref(), Some("Cluster:*"));
    let clusters = session.evaluate(CLUSTER, resources(&[])).unwrap();
    assert_eq!(contents(Some(&clusters)).unwrap(), ["-a"]);
    session.on_request(ack(&clusters)).unwrap();
    assert_eq!(session.newly_synced(), Some(2));
}
