use hickory_proto::op::{Message, MessageType, OpCode, Query as HickoryQuery, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinEncodable};

use super::*;

fn query(name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(HickoryQuery::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(size) = edns {
        let mut opt = hickory_proto::op::Edns::new();
        opt.set_max_payload(size);
        message.set_edns(opt);
    }
    message.to_bytes().unwrap()
}

#[test]
fn an_answer_is_read_by_another_implementation() {
    let packet = query("API.Example.com.default.svc.cluster.local.", RecordType::A, Some(1400));
    let query = Query::parse(&packet).unwrap();
    assert_eq!(query.name.as_deref(), Some("api.example.com.default.svc.cluster.local"));
    assert_eq!((query.kind, query.udp_limit(), query.is_internet()), (TYPE_A, 1400, true));
    let records = [Record::Address("240.240.0.1".parse().unwrap()), Record::Address("2001:2::1".parse().unwrap())];
    let answer = query.answer(Some("api.example.com"), &records, query.udp_limit());
    assert!(query.is_answered_by(&answer));
    let read = Message::from_bytes(&answer).unwrap();
    assert_eq!(read.metadata.id, 0x1234);
    assert!(read.metadata.authoritative && read.metadata.recursion_desired && !read.metadata.truncation);
    assert_eq!(read.answers.len(), 3);
    assert_eq!(read.answers[0].data.to_string(), "api.example.com.");
    assert_eq!(read.answers[1].name.to_ascii(), "api.example.com.");
    assert_eq!(read.answers[1].ttl, 30);
    assert!(matches!(&read.answers[2].data, RData::AAAA(_)));
    assert!(read.edns.is_some());
}

#[test]
fn what_does_not_fit_is_left_out_and_said() {
    let packet = query("many.example.com.", RecordType::A, None);
    let query = Query::parse(&packet).unwrap();
    let records: Vec<_> = (0..100).map(|i| Record::Address(IpAddr::from([10, 0, 0, i]))).collect();
    let answer = query.answer(None, &records, query.udp_limit());
    assert!(answer.len() <= 512);
    let read = Message::from_bytes(&answer).unwrap();
    assert!(read.metadata.truncation && read.answers.len() == 29, "{}", read.answers.len());
    let whole = Message::from_bytes(&query.answer(None, &records, 65535)).unwrap();
    assert!(!whole.metadata.truncation && whole.answers.len() == 100);
}

#[test]
fn failures_and_pointers() {
    let packet = query("7.0.0.10.in-addr.arpa.", RecordType::PTR, None);
    let query = Query::parse(&packet).unwrap();
    assert_eq!(reverse_address(query.name.as_deref().unwrap()), Some("10.0.0.7".parse().unwrap()));
    let read = Message::from_bytes(&query.answer(None, &[Record::Pointer("a.b.svc.cluster.local")], 512)).unwrap();
    assert_eq!(read.answers[0].data.to_string(), "a.b.svc.cluster.local.");
    let read = Message::from_bytes(&query.failure(SERVER_FAILURE)).unwrap();
    assert_eq!(read.metadata.response_code, ResponseCode::ServFail);
    let six = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.2.0.0.0.1.0.0.2.ip6.arpa";
    assert_eq!(reverse_address(six), Some("2001:2::1".parse().unwrap()));
    assert_eq!(reverse_address("1.2.3.in-addr.arpa"), None);
}

#[test]
fn garbage_is_refused_without_a_panic() {
    assert_eq!(Query::parse(b"").unwrap_err(), Unreadable::Silent);
    assert_eq!(Query::parse(&[0xff; 12]).unwrap_err(), Unreadable::Silent);
    assert_eq!(Query::parse(&[0; 12]).unwrap_err(), Unreadable::Code(FORMAT_ERROR));
    assert_eq!(
        Message::from_bytes(&refuse(&[1, 2, 0x29, 0, 0, 1, 0, 0, 0, 0, 0, 0], NOT_IMPLEMENTED))
            .unwrap()
            .metadata
            .response_code,
        ResponseCode::NotImp
    );
    let packet = query("some.name.example.com.", RecordType::A, Some(1232));
    for cut in 0..packet.len() {
        let _ = Query::parse(&packet[..cut]);
        for byte in [0, 0x3f, 0x40, 0xc0, 0xff] {
            let mut bent = packet.clone();
            bent[cut] = byte;
            if let Ok(query) = Query::parse(&bent) {
                let _ = query.answer(Some("a.b"), &[], 512);
            }
        }
    }
}
