//! `outrigger dns explain NAME`, inside a pod: what a program's resolver would ask, in order, and who answers what.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::{Parser, Subcommand};
use envoy_api::Message;
use envoy_api::istio::{NameInfo, NameTable};
use http::Request;
use http_body_util::Full;

use super::message::{self, TYPE_A, TYPE_AAAA, TYPE_CNAME, TYPE_PTR};
use super::upstream::ResolvConf;
use super::zone::{Naming, Zone};
use crate::fetch::{self, Target};

const TIMEOUT: Duration = Duration::from_secs(6);
/// Name tables of large meshes are megabytes.
const MAX_TABLE: usize = 256 << 20;

/// Look at names as this pod sees them
#[derive(Clone, Debug, Parser)]
pub struct Args {
    #[command(subcommand)]
    command: DnsCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum DnsCommand {
    /// Say what a name or address is here, and who says so
    Explain(ExplainArgs),
}

#[derive(Clone, Debug, clap::Args)]
struct ExplainArgs {
    /// A name as a program would look it up, or an address
    name: String,
    /// The agent's DNS server
    #[arg(long, default_value = "127.0.0.1:15053")]
    server: SocketAddr,
    /// The agent's status port, for the mesh's name table
    #[arg(long = "status-port", default_value_t = 15020)]
    status_port: u16,
    /// The pod's resolver configuration
    #[arg(long = "resolv-conf", default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,
}

/// Runs the command; fails when the name is not found.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let DnsCommand::Explain(args) = args.command;
    crate::on_one_thread(explain(&args))
}

async fn explain(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let conf = ResolvConf::load(&args.resolv_conf)
        .with_context(|| format!("{} cannot be read", args.resolv_conf.display()))?;
    let zone = zone(args, &conf).await;
    let mut out = std::io::stdout().lock();
    if let Err(error) = &zone {
        writeln!(out, "the mesh's name table is not to be had: {error:#}")?;
    }
    let zone = zone.ok();
    let servers: Vec<String> = conf.servers.iter().map(|server| server.ip().to_string()).collect();
    let upstream = servers.join(", ");
    if let Ok(address) = args.name.parse::<IpAddr>() {
        let known = zone.as_ref().and_then(|zone| zone.name_of(address).map(str::to_owned));
        let answer = ask(args.server, &reverse_name(address), TYPE_PTR)?;
        let who = if known.is_some() {
            "the mesh's name table".to_owned()
        } else {
            format!("the pod's resolver ({upstream})")
        };
        writeln!(out, "{address}: {} by {who}", answer.text())?;
        return Ok(if answer.found() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let candidates = conf.candidates(&args.name);
    writeln!(out, "{}: a resolver asks for {} (ndots {})", args.name, candidates.join(", then "), conf.ndots)?;
    for name in candidates {
        let found = zone.as_ref().and_then(|zone| zone.find(&name));
        let who = match found {
            Some(found) => match found.alias_of {
                Some(target) => format!("the mesh's name table, as an alias of {target}"),
                None => "the mesh's name table".to_owned(),
            },
            None => format!("the pod's resolver ({upstream})"),
        };
        let answers = [("A", ask(args.server, &name, TYPE_A)?), ("AAAA", ask(args.server, &name, TYPE_AAAA)?)];
        for (kind, answer) in &answers {
            writeln!(out, "  {name} {kind}: {} by {who}", answer.text())?;
        }
        if answers.iter().any(|(_, answer)| answer.found()) {
            return Ok(ExitCode::SUCCESS);
        }
    }
    writeln!(out, "{}: nobody knows it", args.name)?;
    Ok(ExitCode::FAILURE)
}

/// The mesh's names as the agent has them.
async fn zone(args: &ExplainArgs, conf: &ResolvConf) -> anyhow::Result<Zone> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, args.status_port));
    let request = Request::get("/debug/ndsz").header(http::header::HOST, "localhost").body(Full::new(Bytes::new()))?;
    let answer = fetch::fetch(Target { address, from: None, tls: false }, request, TIMEOUT, MAX_TABLE).await?;
    if answer.status != 200 {
        bail!(
            "the agent at {address} answers {}: DNS capture is off (ISTIO_META_DNS_CAPTURE), or no table has come yet",
            answer.status
        );
    }
    let json: serde_json::Value = serde_json::from_slice(&answer.body).context("the agent's name table")?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let table = json["table"].as_object().into_iter().flatten().map(|(name, info)| {
        let ips = info["ips"].as_array().into_iter().flatten().map(text).collect();
        let info = NameInfo {
            ips,
            registry: text(&info["registry"]),
            shortname: text(&info["shortname"]),
            namespace: text(&info["namespace"]),
        };
        (name.clone(), info)
    });
    let table = NameTable { table: table.collect() };
    // The first search domain of a pod is NAMESPACE.svc.DOMAIN.
    let domain = conf.search.first().cloned().unwrap_or_default();
    let namespace = domain.split('.').next().unwrap_or_default().to_owned();
    Ok(Zone::build(table.encode_to_vec().into(), &Naming { namespace, domain, search: conf.search.clone() })?)
}

/// What came back for one question.
struct Answer {
    code: u8,
    data: Vec<String>,
    ttl: Option<u32>,
}

impl Answer {
    fn found(&self) -> bool {
        self.code == 0 && !self.data.is_empty()
    }

    fn text(&self) -> String {
        let ttl = self.ttl.map(|ttl| format!(" for {ttl} s")).unwrap_or_default();
        match (self.code, self.data.is_empty()) {
            (0, false) => format!("{}{ttl}", self.data.join(", ")),
            (0, true) => "no data".to_owned(),
            (message::NAME_ERROR, _) => "no such name".to_owned(),
            (message::SERVER_FAILURE, _) => "server failure".to_owned(),
            (code, _) => format!("code {code}"),
        }
    }
}

fn ask(server: SocketAddr, name: &str, kind: u16) -> anyhow::Result<Answer> {
    let any: SocketAddr = if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.send(&message::query(name, kind).with_context(|| format!("{name:?} is no name"))?)?;
    let mut buffer = [0; 4096];
    let n = socket.recv(&mut buffer).with_context(|| format!("no answer from the agent's DNS server at {server}"))?;
    let packet = &buffer[..n];
    let records = message::records(packet).context("the answer is not readable")?;
    let answers = usize::from(u16::from_be_bytes([packet[6], packet[7]]));
    let data = records.iter().take(answers).filter_map(|record| {
        let bytes = packet.get(record.data.clone())?;
        match record.kind {
            TYPE_A => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).to_string()),
            TYPE_AAAA => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_string()),
            TYPE_CNAME | TYPE_PTR => Some(format!("{}.", message::name_at(packet, record.data.start)?)),
            _ => None,
        }
    });
    Ok(Answer { code: packet[3] & 0x0f, data: data.collect(), ttl: records.iter().take(answers).map(|r| r.ttl).min() })
}

fn reverse_name(address: IpAddr) -> String {
    match address {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(ip) => {
            let nibbles: Vec<String> = (0..32).map(|i| format!("{:x}", (u128::from(ip) >> (4 * i)) & 0xf)).collect();
            format!("{}.ip6.arpa", nibbles.join("."))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reverse_names_are_read_back() {
        for ip in ["10.1.2.3", "2001:db8::1"] {
            let ip: IpAddr = ip.parse().unwrap();
            assert_eq!(message::reverse_address(&reverse_name(ip)), Some(ip));
        }
    }
}
