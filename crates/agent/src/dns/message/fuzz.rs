//! Fuzz target: packets of anybody who can reach the DNS port, and of upstream servers.

use super::*;

#[test]
fn packets() {
    let question = query("api.example.com.", TYPE_A).expect("a name");
    let parsed = Query::parse(&question).expect("a question");
    let answer = parsed.answer(Some("api.example.com"), &[Record::Address(IpAddr::from([10, 0, 0, 1]))], 512);
    let pointer = query("1.0.0.10.in-addr.arpa.", TYPE_PTR).expect("a name");
    let words = ["\u{3}www\u{0}", "\u{c0}\u{c}", "\0\0\u{29}", "\0\u{1}\0\u{1}", "\u{3f}", "in-addr", "\u{4}arpa"];
    ::fuzz::run("DNS packets", &[&question, &answer, &pointer], &words, |packet| {
        refuse(packet, FORMAT_ERROR);
        let found = records(packet).map(|records| {
            // Whoever uses a record looks at these places.
            assert!(records.iter().all(|record| record.data.end <= packet.len() && record.ttl_at + 4 <= packet.len()));
            records.len()
        });
        let name = Query::parse(packet).map(|query| {
            let answer = query.answer(None, &[Record::Address(IpAddr::from([10, 0, 0, 1]))], query.udp_limit());
            assert!(answer.len() <= query.udp_limit().max(packet.len()));
            assert!(query.is_answered_by(&answer), "an answer is not of its question");
            query.is_answered_by(packet);
            query.failure(NAME_ERROR);
            query.name.as_deref().map(reverse_address).is_some()
        });
        (found.map(|count| count.min(4)), name.map_err(|error| format!("{error:?}")))
    });
}
