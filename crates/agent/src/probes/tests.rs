use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// Answers each connection with the next of `answers`; gives back what was asked.
async fn application(answers: &'static [&'static str]) -> (u16, tokio::task::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let task = tokio::spawn(async move {
        let mut asked = Vec::new();
        for answer in answers {
            let (mut stream, peer) = listener.accept().await.unwrap();
            assert_eq!(peer.ip().to_string(), "127.0.0.6");
            let mut buffer = vec![0; 4096];
            let n = stream.read(&mut buffer).await.unwrap();
            asked.push(String::from_utf8_lossy(&buffer[..n]).into_owned());
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
        asked
    });
    (port, task)
}

fn probers(json: &str) -> Probers {
    Probers::parse(Some(json), "127.0.0.1".parse().unwrap()).unwrap()
}

#[tokio::test]
async fn http_probe_passes_headers_status_and_body() {
    let (port, task) = application(&["HTTP/1.1 418 x\r\ncontent-length: 3\r\n\r\nno!"]).await;
    let probers = probers(&format!(
        "{{\"/app-health/a/livez\":{{\"httpGet\":{{\"path\":\"live?x=1\",\"port\":{port},\"scheme\":\"HTTP\"}},\"timeoutSeconds\":3}}}}"
    ));
    let headers = HeaderMap::from_iter([
        (HOST, http::HeaderValue::from_static("10.0.0.1:15020")),
        (http::header::USER_AGENT, http::HeaderValue::from_static("kube-probe/1.36")),
    ]);
    let response = probers.handle("/app-health/a/livez", &headers, 15020).await.unwrap();
    assert_eq!(response.status(), 418);
    let asked = task.await.unwrap().remove(0);
    assert!(asked.starts_with("GET /live?x=1 HTTP/1.1\r\n"), "{asked}");
    assert!(
        asked.contains(&format!("host: 10.0.0.1:{port}\r\n")) && asked.contains("user-agent: kube-probe/1.36\r\n"),
        "{asked}"
    );
}

#[tokio::test]
async fn redirects_are_followed_at_home_and_fine_elsewhere() {
    let (port, _task) = application(&[
        "HTTP/1.1 302 x\r\nlocation: /ok\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 204 x\r\n\r\n",
        "HTTP/1.1 302 x\r\nlocation: http://example.com/\r\ncontent-length: 0\r\n\r\n",
    ])
    .await;
    let probers = probers(&format!("{{\"/app-health/a/readyz\":{{\"httpGet\":{{\"port\":{port}}}}}}}"));
    let status =
        async || probers.handle("/app-health/a/readyz", &HeaderMap::new(), 15020).await.unwrap().status().as_u16();
    assert_eq!(status().await, 204);
    assert_eq!(status().await, 200);
}

#[tokio::test]
async fn tcp_probe_and_unknown_paths() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let probers = probers(&format!("{{\"/app-health/a/startupz\":{{\"tcpSocket\":{{\"port\":{port}}}}}}}"));
    let status = async |path: &str| probers.handle(path, &HeaderMap::new(), 15020).await.map(|r| r.status().as_u16());
    assert_eq!(status("/app-health/a/startupz").await, Some(200));
    drop(listener);
    assert_eq!(status("/app-health/a/startupz").await, Some(500));
    assert_eq!(status("/app-health/b/startupz").await, Some(400));
    assert_eq!(status("/other").await, None);
}

#[test]
fn bad_probers_are_refused_with_their_path() {
    let refused = |json: &str| Probers::parse(Some(json), "127.0.0.1".parse().unwrap()).unwrap_err().to_string();
    assert!(refused("{").contains("not the JSON"));
    assert!(refused("{\"/app-health/a/x\":{\"tcpSocket\":{\"port\":1}}}").contains("/app-health/a/x: the path"));
    assert!(refused("{\"/app-health/a/livez\":{}}").contains("exactly one"));
    assert!(refused("{\"/app-health/a/livez\":{\"tcpSocket\":{\"port\":70000}}}").contains("70000"));
}

#[test]
fn a_redirect_to_another_port_stays_at_home() {
    let from = Target { address: "10.0.0.1:80".parse().unwrap(), from: None, tls: false };
    let to = |location: &str| same_host(location, from).map(|(to, path)| (to.address.to_string(), to.tls, path));
    let at = |address: &str, tls, path: &str| Some((address.to_owned(), tls, path.to_owned()));
    assert_eq!(to("/a?b"), at("10.0.0.1:80", false, "/a?b"));
    assert_eq!(to("http://10.0.0.1:8080/a"), at("10.0.0.1:8080", false, "/a"));
    assert_eq!(to("https://10.0.0.1/a"), at("10.0.0.1:443", true, "/a"));
    assert_eq!(to("//10.0.0.1/a"), at("10.0.0.1:80", false, "/a"));
    assert_eq!(to("http://10.0.0.2/a"), None);
    assert_eq!(to("http://example.com"), None);
}

#[tokio::test(start_paused = true)]
async fn hooks_take_their_time_where_probes_do_not() {
    // Accepts and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let json = |path: &str| format!("{{\"{path}\":{{\"httpGet\":{{\"port\":{port}}}}}}}");
    for (path, ends) in [("/app-health/a/livez", true), ("/app-lifecycle/a/prestopz", false)] {
        let probers = probers(&json(path));
        let answer = tokio::time::timeout(Duration::from_secs(3600), async {
            probers.handle(path, &HeaderMap::new(), 15020).await.unwrap().status().as_u16()
        });
        assert_eq!(answer.await.ok(), ends.then_some(500), "{path}");
    }
}
