//! Questions to a running mesh from other commands of the program: a proxy's admin server, and how far a change got.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, bail};
use manifest::Document;
use netns::Netns;
use serde::{Deserialize, Serialize};

use crate::client::ask;
use crate::cluster::command::PodRow;
use crate::control::{Request, Response};
use crate::folder::Folder;

/// Where a proxy's admin server listens, in its pod.
const ADMIN_PORT: u16 = 15000;
const PATIENCE: Duration = Duration::from_secs(10);
/// A dump of ten thousand services has some hundred megabytes.
const ANSWER_MAX: u64 = 1 << 30;

/// How far a change got.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Distribution {
    /// The revision that holds it.
    pub wanted: u64,
    /// The connected proxies.
    pub proxies: Vec<ProxySync>,
}

/// How far one proxy is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ProxySync {
    /// `NAME.NAMESPACE`.
    pub proxy: String,
    /// It has accepted all that concerns it up to this revision.
    pub synced_to: u64,
    /// What it refuses, with its reasons.
    pub nacks: Vec<String>,
    /// Its Kubernetes cluster.
    pub cluster: String,
    /// The version that it reports.
    pub version: String,
    /// How far each type is, in istioctl's words; those that it never asked for are missing.
    pub types: BTreeMap<String, String>,
}

/// Which change is meant: kind, namespace and name of an object; `None`: all changes so far.
pub type Wanted = Option<(String, String, String)>;

/// How far a change got in the mesh of this name.
///
/// # Errors
/// When no such mesh runs, or it has no such object.
pub fn distribution(mesh: &str, object: Wanted) -> anyhow::Result<Distribution> {
    match ask(&Folder::of(mesh)?, &Request::Distribution { object })? {
        Response::Distribution(distribution) => Ok(distribution),
        Response::Refused(errors) => bail!("{}", errors.join("; ")),
        _ => bail!("the mesh answered something else; is it of another version?"),
    }
}

/// All objects of a running mesh.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Objects {
    /// What was applied, with the services' addresses, and the pods and endpoints that came of it.
    pub documents: Vec<Document>,
    /// Pods and services have IPv6 addresses, too.
    pub dual_stack: bool,
}

/// What the control plane of the mesh of this name knows.
///
/// # Errors
/// When no such mesh runs.
pub fn objects(mesh: &str) -> anyhow::Result<Objects> {
    match ask(&Folder::of(mesh)?, &Request::Objects)? {
        Response::Objects(objects) => Ok(objects),
        _ => bail!("the mesh answered something else; is it of another version?"),
    }
}

/// Asks the admin server of a pod's proxy; `pod` is its name or the beginning of it, with `.NAMESPACE` if need be.
///
/// # Errors
/// When no such pod runs, its network cannot be entered, or the answer is no success.
pub fn ask_proxy(mesh: &str, pod: &str, method: &str, path: &str) -> anyhow::Result<Vec<u8>> {
    let folder = Folder::of(mesh)?;
    let rows = match ask(&folder, &Request::Ps)? {
        Response::Pods(rows) => rows,
        _ => bail!("the mesh answered something else; is it of another version?"),
    };
    let row = find(&rows, pod)?;
    let pid = row.pid.and_then(|pid| u32::try_from(pid).ok()).with_context(|| format!("pod {pod} does not run"))?;
    let network = Netns::of_pid(pid).context("find the pod's network")?;
    let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, ADMIN_PORT));
    let answer = network.run(|| exchange(admin, method, path));
    let answer = answer.context("enter the pod's network; a mesh of another user needs root")?;
    body(&answer.context("ask the proxy's admin server")?)
}

/// Asks a proxy's admin server by its address, which must be reachable from here.
///
/// # Errors
/// When nothing answers there, or the answer is no success.
pub fn ask_admin(address: &str, method: &str, path: &str) -> anyhow::Result<Vec<u8>> {
    let address = address.to_socket_addrs()?.next().context("the name has no address")?;
    body(&exchange(address, method, path)?)
}

fn find<'r>(rows: &'r [PodRow], said: &str) -> anyhow::Result<&'r PodRow> {
    let (name, namespace) = match said.rsplit_once('.') {
        Some((name, namespace)) if rows.iter().any(|row| row.namespace == namespace) => (name, Some(namespace)),
        _ => (said, None),
    };
    let here = || rows.iter().filter(|row| namespace.is_none_or(|namespace| row.namespace == namespace));
    let found = here().find(|row| row.name == name).or_else(|| here().find(|row| row.name.starts_with(name)));
    found.with_context(|| {
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        format!("there is no pod {said:?}; there is {}", names.join(", "))
    })
}

fn exchange(address: SocketAddr, method: &str, path: &str) -> std::io::Result<Vec<u8>> {
    let request =
        format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer)?;
    Ok(answer)
}

/// The body of an HTTP/1.1 answer, with or without chunks.
fn body(answer: &[u8]) -> anyhow::Result<Vec<u8>> {
    let at = answer.windows(4).position(|part| part == b"\r\n\r\n").context("the answer has no end of its head")?;
    let head = String::from_utf8_lossy(&answer[..at]).to_ascii_lowercase();
    let body = &answer[at + 4..];
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status != "200" {
        bail!("answered {status}: {}", String::from_utf8_lossy(body).trim());
    }
    if !head.contains("transfer-encoding: chunked") {
        return Ok(body.to_vec());
    }
    let mut out = Vec::new();
    let mut rest = body;
    loop {
        let end = rest.windows(2).position(|part| part == b"\r\n").context("a chunk is cut off")?;
        let size = std::str::from_utf8(&rest[..end]).ok().and_then(|size| usize::from_str_radix(size.trim(), 16).ok());
        let size = size.context("a chunk has no size")?;
        rest = &rest[end + 2..];
        if size == 0 {
            return Ok(out);
        }
        out.extend_from_slice(rest.get(..size).context("a chunk is cut off")?);
        rest = rest.get(size + 2..).context("a chunk is cut off")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_whole_or_in_chunks() {
        assert_eq!(body(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab").unwrap(), b"ab");
        let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n";
        assert_eq!(body(chunked).unwrap(), b"abc");
        assert!(body(b"HTTP/1.1 404 Not Found\r\n\r\nno").is_err());
        assert!(body(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\nab").is_err());
        assert!(body(b"").is_err());
    }
}
