use super::*;

fn request(text: &str) -> Result<RequestHead, HeadError> {
    parse_request(text.as_bytes(), &Limits::default()).map(|r| r.expect("a complete head").0)
}

fn detail(text: &str) -> &'static str {
    request(text).expect_err("refused").detail
}

#[test]
fn a_usual_request() {
    let text = b"GET /a?b=c HTTP/1.1\r\nHost: h\r\nX-A:  1 \r\n\r\nrest";
    let (head, used) = parse_request(text, &Limits::default()).unwrap().unwrap();
    assert_eq!(used, text.len() - 4);
    assert_eq!(head.headers.path(), Some("/a?b=c"));
    assert_eq!(head.headers.authority(), Some("h"));
    assert_eq!(head.headers.get("x-a"), Some(&b"1"[..]));
    assert!(head.keep_alive);
    assert_eq!(head.body, BodyLength::None);
}

#[test]
fn smuggling_vectors_are_refused() {
    let head = |fields: &str| format!("POST / HTTP/1.1\r\nhost: t\r\n{fields}\r\n\r\n");
    assert_eq!(
        detail(&head("content-length: 5\r\ntransfer-encoding: chunked")),
        "http1.content_length_and_chunked_not_allowed"
    );
    assert_eq!(detail(&head("content-length: 3\r\ncontent-length: 3")), "http1.codec_error");
    assert_eq!(detail(&head("content-length: +3")), "http1.codec_error");
    assert_eq!(detail(&head("content-length: 99999999999999999999999")), "http1.codec_error");
    assert_eq!(detail(&head("transfer-encoding: gzip, chunked")), "http1.invalid_transfer_encoding");
    assert_eq!(detail(&head("x-a : 1")), "http1.codec_error");
    assert_eq!(detail(&head("x-a: a\0b")), "http1.invalid_characters");
    assert_eq!(detail("GET / HTTP/1.1\r\n host: t\r\n\r\n"), "http1.codec_error");
}

#[test]
fn folded_lines_are_joined() {
    let head = request("GET / HTTP/1.1\r\nhost: t\r\nx-a: 1\r\n folded\r\n\r\n").unwrap();
    assert_eq!(head.headers.get("x-a"), Some(&b"1 folded"[..]));
}

#[test]
fn absolute_form_replaces_the_host() {
    let head = request("GET http://abs.test:81/p?q=1 HTTP/1.1\r\nhost: other\r\n\r\n").unwrap();
    assert_eq!(head.headers.authority(), Some("abs.test:81"));
    assert_eq!(head.headers.path(), Some("/p?q=1"));
    assert_eq!(detail("GET ftp://abs.test/p HTTP/1.1\r\nhost: other\r\n\r\n"), "http1.invalid_scheme");
}

#[test]
fn never_panics_on_any_prefix_or_flip() {
    let text = b"POST /x HTTP/1.1\r\nhost: t\r\nx-a: 1\r\n folded\r\ntransfer-encoding: chunked\r\n\r\n";
    for i in 0..text.len() {
        let _ = parse_request(&text[..i], &Limits::default());
        for byte in [0u8, 10, 13, 32, 58, 255] {
            let mut copy = text.to_vec();
            copy[i] = byte;
            let _ = parse_request(&copy, &Limits::default());
            let _ = parse_response(&copy, &Limits::default(), false);
        }
    }
}
