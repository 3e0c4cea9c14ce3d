use super::*;

fn request(text: &str) -> Result<Box<RequestHead>, HeadError> {
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
    let twice = "HTTP/1.1\r\nhost: one\r\nhost: two\r\n\r\n";
    assert_eq!(request(&format!("GET http://abs.test/ {twice}")).unwrap().headers.authority(), Some("abs.test"));
    assert_eq!(request(&format!("CONNECT t:443 {twice}")).unwrap().headers.authority(), Some("t:443"));
    assert_eq!(request(&format!("GET / {twice}")).unwrap().headers.authority(), Some("one,two"));
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

/// Each was sent to Envoy 1.40.
#[test]
fn odd_targets_and_versions() {
    let path = |line: &str| {
        let head = request(&format!("{line}\r\nhost: t\r\n\r\n")).map_err(|e| e.detail)?;
        Ok((
            head.headers.authority().unwrap_or_default().to_owned(),
            head.headers.path().unwrap_or_default().to_owned(),
        ))
    };
    let found = |host: &str, path: &str| Ok((host.to_owned(), path.to_owned()));
    assert_eq!(path("GET http://u@b.test/x HTTP/1.1"), found("b.test", "/x"));
    assert_eq!(path("GET http://[::1]:80/x HTTP/1.1"), found("[::1]:80", "/x"));
    assert_eq!(path("GET http://b.test HTTP/1.1"), found("b.test", "/"));
    assert_eq!(path("GET http://b.test?x=1 HTTP/1.1"), found("b.test", "?x=1"));
    assert_eq!(path("GET http://b.test:99999/ HTTP/1.1"), Err("http1.invalid_url"));
    assert_eq!(path("CONNECT a.test HTTP/1.1"), Err("http1.invalid_url"));
    assert_eq!(path("CONNECT a.test:80 HTTP/1.1"), found("a.test:80", ""));
    assert_eq!(path("GET /x\u{c}y HTTP/1.1"), Err("http1.invalid_characters"));
    assert_eq!(path("GET /x\ry HTTP/1.1"), Err("http1.codec_error"));
    assert_eq!(path("GET /x\ty HTTP/1.1"), Err("http1.codec_error"));
    assert_eq!(path("GET / HTTP/1.1\r"), found("t", "/"));
    assert_eq!(path("GET / HTTP/1.2"), Err("low_version"));
    let old = Limits { accept_http10: true, ..Limits::default() };
    for (line, host) in [("GET / HTTP/2.0", Some("t")), ("GET / HTTP/0.9", Some("t")), ("GET /", None)] {
        let text = format!("{line}\r\nhost: t\r\n\r\n");
        let (head, used) = parse_request(text.as_bytes(), &old).unwrap().unwrap();
        // Without a version the line is all there is.
        assert!(head.http10 && used == if host.is_some() { text.len() } else { line.len() + 2 }, "{line}");
        assert_eq!(head.headers.authority(), host, "{line}");
    }
    // No method begins like that: there is no need to wait for the end of the line.
    assert!(parse_request(b"\x16\x03\x01\x00\xa5\x01", &Limits::default()).is_err());
    assert!(parse_request(b"\r\nG", &Limits::default()).is_ok_and(|head| head.is_none()));
}

#[test]
fn fields_of_this_hop() {
    let fields = |text: &str| request(&format!("GET / HTTP/1.1\r\nhost: t\r\n{text}\r\n\r\n")).map_err(|e| e.detail);
    let head = fields("connection: x-a, close\r\nx-a: 1\r\nx-b: 2").unwrap();
    assert!(!head.headers.contains("x-a") && head.headers.contains("x-b") && !head.keep_alive);
    assert!(fields("connection: host").unwrap().headers.authority().is_none());
    for refused in ["x-forwarded-for", "X-Forwarded-Proto", ":path", "a,b,c,d,e,f,g,h,i,j"] {
        assert_eq!(fields(&format!("connection: {refused}")).unwrap_err(), "http1.connection_header_rejected");
    }
    let head = fields("connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk").unwrap();
    assert!(!head.upgrade && !head.headers.contains("upgrade") && !head.headers.contains("http2-settings"));
    assert!(fields("connection: upgrade\r\nupgrade: websocket").unwrap().upgrade);
}

/// Of several things that are wrong Envoy names the one that it meets first: its framer goes through the whole head, then the
/// codec looks at one field after the other, then at all of them.
#[test]
fn what_is_told_of_several_wrong_things() {
    let few = Limits { fields: 2, ..Limits::default() };
    let told = |text: &str| parse_request(text.as_bytes(), &few).map_err(|e| (e.detail, e.fields));
    let told = |text: &str| told(text).expect_err(text);
    assert_eq!(told("GET / HTTP/1.1\r\nnocolon\r\nx-a: \x01\r\n\r\n"), ("http1.invalid_characters", 0));
    assert_eq!(told("GET a HTTP/1.1\r\nx-a: \x01\r\n\r\n"), ("http1.invalid_characters", 0));
    assert_eq!(told("GET a\r\nx-a: \x01\r\n\r\n"), ("http1.codec_error", 0));
    assert_eq!(told("GET / HTTP/1.0\r\na: 1\r\nb: 2\r\nc: 3\r\ncontent-length: +1\r\n\r\n").0, "http1.codec_error");
    // The name of the fourth field was read when the third one was too many.
    assert_eq!(told("GET / HTTP/1.0\r\na: 1\r\nb: 2\r\nc: 3\r\ndd: 4\r\n\r\n"), ("http1.too_many_headers", 17));
    assert_eq!(told("GET / HTTP/1.0\r\nhost: /\r\nte: x\r\nte: y\r\n\r\n").0, "low_version");
    assert_eq!(told("GET http://:x/ HTTP/1.0\r\nhost: /\r\n\r\n").0, "http1.invalid_url");
    assert_eq!(told("GET ftp://t/ HTTP/1.1\r\ntransfer-encoding: x\r\n\r\n").0, "http1.invalid_transfer_encoding");
    assert_eq!(
        told("GET / HTTP/1.1\r\ntransfer-encoding: x\r\ncontent-length: 1\r\n\r\n").0,
        "http1.content_length_and_chunked_not_allowed"
    );
    // What comes before the end of the head is told at once.
    assert_eq!(told("GET a HTTP/1.1\r\nx-a").0, "http1.codec_error");
    assert!(parse_request(b"GET / HTTP/1.1\r\nhost: t\r\nx-a: 1\r\nte: x\r\nte: y\r\n\r\n", &few).is_err());
    assert!(parse_request(b"GET / HTTP/1.1\r\nhost: t\r\nte: x\r\nte: y\r\n\r\n", &few).is_ok());
    assert!(parse_request(b"GET / HTTP/1.1\r\nhost: t\r\nhost: u\r\nx-a: 1\r\n\r\n", &few).is_ok());
}

#[test]
fn of_chunked_answers_the_length_does_not_go_on() {
    let limits = Limits { chunked_length: true, ..Limits::default() };
    let text = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n";
    let (head, _) = parse_response(text, &limits, false).unwrap().unwrap();
    assert!(head.body == BodyLength::Chunked && !head.headers.contains("content-length"));
    // Refused as soon as the line is there.
    assert!(parse_response(b"HTTP/1.1 2x0 OK\r\nx-a", &limits, false).is_err());
}
