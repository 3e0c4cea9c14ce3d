//! Many calls at once, asked and answered in the form of Istio's simulator (`--calls`).
//!
//! The simulator stops at the cluster's name, and it regards a call as an error where a proxy would answer one or close.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, bail};
use proxy_core::hcm::Routes;
use proxy_core::listener::{TcpClusters, Terminal};
use proxy_core::route::{Action, ClusterSpecifier, RouteInput, RouteResult};
use proxy_core::tls::{CertificateSource, DownstreamTls};
use proxy_core::{FilterState, Headers, HttpConnectionManager, Metadata, RouteTable};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::shapes::{self, Question};
use crate::{Capture, ClientTls, Configuration, Dial, Payload, Quirks};

/// One entry of the file.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Entry {
    #[serde(default)]
    pub(crate) name: String,
    /// Which proxy is asked; none: the first.
    pub(crate) proxy: Option<String>,
    pub(crate) call: Option<Call>,
    /// A question that is no call.
    #[serde(flatten)]
    question: Option<Question>,
}

/// A call as the file describes it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Call {
    call_mode: String,
    address: String,
    port: u16,
    protocol: String,
    tls: String,
    alpn: Option<String>,
    sni: Option<String>,
    host_header: Option<String>,
    path: Option<String>,
    headers: serde_json::Map<String, Value>,
    mtls_secret_config_name: Option<String>,
}

/// Why a call fails.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Failure {
    NoListener,
    NoFilterChain,
    NoVirtualHost,
    NoRoute,
    TlsRedirect,
    /// TLS or opaque bytes reach a filter chain for plain HTTP.
    ProtocolError,
    /// Plain text reaches a filter chain for TLS.
    TlsError,
    /// The filter chain wants mutual TLS and the caller does not do it, or the reverse.
    MtlsError,
}

/// The answer to one entry; empty names are left out.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Answer {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
    #[serde(skip_serializing_if = "String::is_empty")]
    listener_matched: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    filter_chain_matched: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    route_config_matched: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    virtual_host_matched: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    route_matched: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    cluster_matched: String,
    /// Where a route has several: all of them, with their weights.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    weighted_clusters: Vec<Weighted>,
    /// The TLS that the filter chain terminates.
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_context: Option<TlsContext>,
    /// To a question that is no call.
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Value>,
}

#[derive(Clone, Debug, Serialize)]
struct Weighted {
    cluster: String,
    weight: u64,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct TlsContext {
    first_certificate_sds_secret: String,
    require_client_certificate: bool,
}

/// Answers an entry.
pub(crate) fn answer(entry: &Entry, at: &Configuration) -> anyhow::Result<Answer> {
    let mut answer = Answer { name: entry.name.clone(), ..Answer::default() };
    match (&entry.call, &entry.question) {
        (Some(call), _) => answer.error = run(call, at, &mut answer).with_context(|| entry.name.clone())?.err(),
        (None, Some(question)) => answer.result = Some(shapes::answer(question, at)),
        (None, None) => bail!("{:?}: neither a call nor a question that is known", entry.name),
    }
    Ok(answer)
}

impl Call {
    fn dial(&self) -> anyhow::Result<Dial> {
        let ip = self.address.parse().with_context(|| format!("address {:?}", self.address))?;
        let sni = self.sni.clone().unwrap_or_default();
        let alpn: Vec<Vec<u8>> = self.alpn.iter().map(|a| a.as_bytes().to_vec()).collect();
        Ok(Dial {
            capture: match self.call_mode.as_str() {
                "outbound" => Capture::Outbound,
                "inbound" => Capture::Inbound,
                "gateway" => Capture::None,
                other => bail!("callMode {other:?} is none of outbound, inbound, gateway"),
            },
            // The simulator has no source; any address outside the mesh will do.
            source: SocketAddr::from(([10, 255, 255, 254], 40000)),
            destination: SocketAddr::new(ip, self.port),
            tls: match self.tls.as_str() {
                "" | "plaintext" => None,
                "tls" => Some(ClientTls { sni, alpn, certificate: false }),
                "mtls" => Some(ClientTls { sni, alpn, certificate: true }),
                other => bail!("tls {other:?} is none of plaintext, tls, mtls"),
            },
            payload: match self.protocol.as_str() {
                "http" => Payload::Http1,
                "http2" => Payload::Http2,
                "" | "tcp" => Payload::Opaque,
                other => bail!("protocol {other:?} is none of http, http2, tcp"),
            },
            quirks: Quirks { any_family: true, server_name: self.sni.clone().unwrap_or_default().to_ascii_lowercase() },
        })
    }

    /// The head of its request. The simulator knows no method.
    fn head(&self) -> anyhow::Result<Headers> {
        let scheme = if matches!(self.tls.as_str(), "" | "plaintext") { "http" } else { "https" };
        let mut headers = Headers::of([(":method", "GET"), (":scheme", scheme), ("x-forwarded-proto", scheme)]);
        headers.set(":authority", self.host_header.as_deref().unwrap_or_default().as_bytes());
        let path = self.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/");
        headers.set(":path", path.as_bytes());
        for (name, values) in &self.headers {
            let texts: Vec<&str> = match values {
                Value::String(one) => vec![one],
                Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
                _ => bail!("headers.{name}: neither text nor a list of texts"),
            };
            for text in texts {
                headers.push(name.as_bytes(), text.as_bytes());
            }
        }
        Ok(headers)
    }

    /// Whether the filter chain's TLS is what the simulator calls mutual: it wants a certificate and shows the workload's own.
    fn is_mutual(&self, tls: &DownstreamTls) -> bool {
        let wanted = self.mtls_secret_config_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("default");
        tls.require_client_certificate && secret_of(tls) == Some(wanted)
    }
}

fn secret_of(tls: &DownstreamTls) -> Option<&str> {
    match tls.common.certificates.first() {
        Some(CertificateSource::Sds(sds)) => Some(&sds.name),
        _ => None,
    }
}

fn run(call: &Call, at: &Configuration, answer: &mut Answer) -> anyhow::Result<Result<(), Failure>> {
    let dial = call.dial()?;
    let Some(arrival) = dial.arrive(at) else { return Ok(Err(Failure::NoListener)) };
    answer.listener_matched = arrival.listener.name.to_string();
    let Some(chain) = arrival.chain else { return Ok(Err(Failure::NoFilterChain)) };
    answer.filter_chain_matched = chain.name.to_string();
    if let Some(tls) = &chain.tls {
        answer.tls_context = Some(TlsContext {
            first_certificate_sds_secret: secret_of(tls).unwrap_or_default().to_owned(),
            require_client_certificate: tls.require_client_certificate,
        });
        match &dial.tls {
            None => return Ok(Err(Failure::TlsError)),
            Some(client) if client.certificate != call.is_mutual(tls) => return Ok(Err(Failure::MtlsError)),
            Some(_) => {}
        }
    }
    match &chain.terminal {
        Terminal::TcpProxy(proxy) => {
            match &proxy.clusters {
                TcpClusters::Single(cluster) => answer.cluster_matched = cluster.to_string(),
                TcpClusters::Weighted { clusters, .. } => {
                    let weighted = clusters.iter().map(|c| Weighted { cluster: c.name.to_string(), weight: c.weight });
                    answer.weighted_clusters = weighted.collect();
                }
            }
            Ok(Ok(()))
        }
        Terminal::Http(_) if dial.payload == Payload::Opaque || (dial.tls.is_some() && chain.tls.is_none()) => {
            Ok(Err(Failure::ProtocolError))
        }
        Terminal::Http(hcm) => {
            let Some(table) = table(hcm, at, answer) else { return Ok(Err(Failure::NoVirtualHost)) };
            Ok(route(&table, &call.head()?, answer))
        }
        _ => Ok(Ok(())),
    }
}

fn table(hcm: &HttpConnectionManager, at: &Configuration, answer: &mut Answer) -> Option<Arc<RouteTable>> {
    match &hcm.routes {
        Routes::Inline(table) => Some(Arc::clone(table)),
        Routes::Rds { name, .. } => {
            answer.route_config_matched = name.to_string();
            at.tables.get(name).cloned()
        }
    }
}

fn route(table: &RouteTable, headers: &Headers, answer: &mut Answer) -> Result<(), Failure> {
    let input = RouteInput {
        headers,
        metadata: &Metadata::default(),
        filter_state: &FilterState::default(),
        tls: None,
        random: 0,
    };
    let matched = match table.find(&input) {
        RouteResult::NoVirtualHost => return Err(Failure::NoVirtualHost),
        RouteResult::NoRoute(vhost) => {
            answer.virtual_host_matched = vhost.name.to_string();
            return Err(Failure::NoRoute);
        }
        RouteResult::RedirectToTls(vhost, _) => {
            answer.virtual_host_matched = vhost.name.to_string();
            return Err(Failure::TlsRedirect);
        }
        RouteResult::Found(matched) => matched,
    };
    answer.virtual_host_matched = matched.vhost.name.to_string();
    answer.route_matched = matched.route.name.to_string();
    if let Action::Forward(forward) = &matched.route.action {
        match &forward.clusters {
            ClusterSpecifier::Single(name) => answer.cluster_matched = name.to_string(),
            ClusterSpecifier::Header(_) => {}
            ClusterSpecifier::Weighted { clusters, .. } => {
                let weighted =
                    clusters.iter().map(|c| Weighted { cluster: c.name.to_string(), weight: c.weight.get() });
                answer.weighted_clusters = weighted.collect();
            }
        }
    }
    Ok(())
}

/// Reads a file of calls.
pub(crate) fn read(path: &std::path::Path) -> anyhow::Result<Vec<Entry>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let calls: Vec<Value> =
        serde_saphyr::from_str(&text).with_context(|| format!("{}: not a list of calls", path.display()))?;
    let entries = calls
        .into_iter()
        .enumerate()
        .map(|(i, value)| serde_json::from_value(value).with_context(|| format!("{}: entry {i}", path.display())));
    entries.collect()
}
