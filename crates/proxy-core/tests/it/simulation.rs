//! Istio's simulator as judge: for each call, listener, filter chain, virtual host, route and cluster must be the ones it named.
//!
//! Over the recorded xDS, so that nothing but the decisions of this crate is judged. Calls with `limits` are left out:
//! there the simulator is known not to model Envoy.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use envoy_api::type_url;
use proxy_core::hcm::Routes;
use proxy_core::listener::{ChainInput, TcpClusters, Terminal};
use proxy_core::route::{Action, ClusterSpecifier, RouteInput, RouteResult};
use proxy_core::tls::CertificateSource;
use proxy_core::{Address, FilterState, Headers, Listener, ListenerSet, Metadata, Options, RouteTable};
use serde_json::Value;

use crate::reference::{folder, folders, messages, yaml};

/// Keys of an expectation, without those that are empty.
type Answer = BTreeMap<&'static str, String>;

struct Proxy {
    listeners: Vec<Arc<Listener>>,
    set: ListenerSet,
    tables: Vec<RouteTable>,
}

impl Proxy {
    fn load(golden: &Path) -> Self {
        let options = Options { allow_unsupported_filters: true, ..Options::default() };
        let listeners: Vec<Arc<Listener>> = messages(&golden.join("listeners.json"), type_url::LISTENER)
            .iter()
            .map(|l| Arc::new(Listener::compile(l, &options).unwrap()))
            .collect();
        let tables = messages(&golden.join("routes.json"), type_url::ROUTE)
            .iter()
            .map(|r| RouteTable::compile(r, &options).unwrap())
            .collect();
        Self { set: ListenerSet::new(listeners.iter().cloned()), listeners, tables }
    }

    fn listener(&self, call: &Call, destination: SocketAddr) -> Option<&Arc<Listener>> {
        let named = |name: &str| self.listeners.iter().find(|l| &*l.name == name);
        match call.text("callMode").as_str() {
            "inbound" => named("virtualInbound"),
            "outbound" => Some(self.set.find_original_dst(named("virtualOutbound")?, destination)),
            _ => self
                .listeners
                .iter()
                .find(|l| l.address.socket() == Some(destination))
                .or_else(|| {
                    self.listeners.iter().find(|l| {
                        l.address.socket().is_some_and(|s| {
                            s.ip().is_unspecified() && s.ip().is_ipv4() && s.port() == destination.port()
                        })
                    })
                })
                .or_else(|| named("virtualOutbound")),
        }
    }

    fn run(&self, call: &Call) -> Answer {
        let mut answer = Answer::new();
        let error = |mut answer: Answer, kind: &str| {
            answer.insert("error", kind.to_owned());
            answer
        };
        let ip: IpAddr = call.text("address").parse().unwrap();
        let port = call.0["port"].as_u64().unwrap() as u16;
        let destination = SocketAddr::new(ip, port);
        let Some(listener) = self.listener(call, destination) else { return error(answer, "noListener") };
        answer.insert("listenerMatched", listener.name.to_string());
        let tls = call.text("tls") != "plaintext";
        let inspected = tls && listener.inspect.needs_tls(port);
        let http = match call.text("protocol").as_str() {
            "http" => Some("http/1.1"),
            "http2" => Some("h2c"),
            _ => None,
        };
        let alpn: Vec<Vec<u8>> = match (inspected, http) {
            (true, _) => call.0.get("alpn").and_then(Value::as_str).iter().map(|a| a.as_bytes().to_vec()).collect(),
            (false, Some(protocol)) if !tls && listener.inspect.needs_http(port) => vec![protocol.as_bytes().to_vec()],
            _ => Vec::new(),
        };
        let sni = if inspected { call.text("sni") } else { String::new() };
        let source = Address::Ip("10.255.255.254:40000".parse().unwrap());
        let chain = listener.find_chain(&ChainInput {
            destination: &Address::Ip(destination),
            source: &source,
            direct_source: &source,
            server_name: &sni,
            transport_protocol: if inspected { "tls" } else { "raw_buffer" },
            application_protocols: &alpn,
        });
        let Some(chain) = chain else { return error(answer, "noFilterChain") };
        put(&mut answer, "filterChainMatched", &chain.name);
        if let Some(context) = &chain.tls {
            if !tls {
                return error(answer, "tlsError");
            }
            let secret = match call.text("mtlsSecretConfigName") {
                name if name.is_empty() => "default".to_owned(),
                name => name,
            };
            let first = context.common.certificates.first();
            let mutual = context.require_client_certificate
                && matches!(first, Some(CertificateSource::Sds(sds)) if *sds.name == *secret);
            if mutual != (call.text("tls") == "mtls") {
                return error(answer, "mtlsError");
            }
        }
        match &chain.terminal {
            Terminal::TcpProxy(proxy) => {
                if let TcpClusters::Single(cluster) = &proxy.clusters {
                    put(&mut answer, "clusterMatched", cluster);
                }
                answer
            }
            Terminal::Http(hcm) => {
                if http.is_none() || (tls && chain.tls.is_none()) {
                    return error(answer, "protocolError");
                }
                let table = match &hcm.routes {
                    Routes::Inline(table) => Some(&**table),
                    Routes::Rds { name, .. } => {
                        put(&mut answer, "routeConfigMatched", name);
                        self.tables.iter().find(|t| t.common.name == *name)
                    }
                };
                match table {
                    Some(table) => Self::route(table, call, answer),
                    None => error(answer, "noVirtualHost"),
                }
            }
            _ => answer,
        }
    }

    fn route(table: &RouteTable, call: &Call, mut answer: Answer) -> Answer {
        let mut headers = Headers::of([(":method", "GET"), (":scheme", "http"), ("x-forwarded-proto", "http")]);
        headers.set(":authority", call.text("hostHeader").as_bytes());
        let path = call.text("path");
        headers.set(":path", if path.is_empty() { b"/" } else { path.as_bytes() });
        for (name, values) in call.0.get("headers").and_then(Value::as_object).into_iter().flatten() {
            for value in values.as_array().into_iter().flatten() {
                headers.push(name.as_bytes(), value.as_str().unwrap().as_bytes());
            }
        }
        let input = RouteInput {
            headers: &headers,
            metadata: &Metadata::default(),
            filter_state: &FilterState::default(),
            tls: None,
            random: 0,
        };
        match table.find(&input) {
            RouteResult::NoVirtualHost => {
                answer.insert("error", "noVirtualHost".into());
            }
            RouteResult::NoRoute(vhost) => {
                put(&mut answer, "virtualHostMatched", &vhost.name);
                answer.insert("error", "noRoute".into());
            }
            RouteResult::RedirectToTls(vhost, _) => {
                put(&mut answer, "virtualHostMatched", &vhost.name);
                answer.insert("error", "tlsRedirect".into());
            }
            RouteResult::Found(matched) => {
                put(&mut answer, "virtualHostMatched", &matched.vhost.name);
                put(&mut answer, "routeMatched", &matched.route.name);
                if let Action::Forward(forward) = &matched.route.action
                    && let ClusterSpecifier::Single(name) = &forward.clusters
                {
                    put(&mut answer, "clusterMatched", name);
                }
            }
        }
        answer
    }
}

fn put(answer: &mut Answer, key: &'static str, value: &str) {
    if !value.is_empty() {
        answer.insert(key, value.to_owned());
    }
}

/// The `call` part of an entry.
struct Call(Value);

impl Call {
    fn text(&self, key: &str) -> String {
        self.0.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    }
}

fn expected(expect: &Value) -> Answer {
    let keys = [
        "error",
        "listenerMatched",
        "filterChainMatched",
        "routeConfigMatched",
        "virtualHostMatched",
        "routeMatched",
        "clusterMatched",
    ];
    let text = |key: &'static str| Some((key, expect.get(key)?.as_str()?.to_owned()));
    keys.into_iter().filter_map(text).filter(|(_, value)| !value.is_empty()).collect()
}

#[test]
fn calls_of_the_xds_cases_go_where_istio_says() {
    let (Some(cases), Some(xds)) = (folder("simulation/generated/cases"), folder("xds/cases")) else { return };
    let (mut right, mut limited, mut wrong) = (0, 0, Vec::new());
    for case in folders(&cases) {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let golden = xds.join(&name).join("golden");
        let mut proxies: BTreeMap<String, Proxy> = BTreeMap::new();
        let calls = yaml(&std::fs::read_to_string(case.join("calls.yaml")).unwrap());
        for entry in calls.as_array().unwrap() {
            let Some(call) = entry.get("call") else { continue };
            if entry.get("limits").is_some() {
                limited += 1;
                continue;
            }
            let of = entry.get("proxy").and_then(Value::as_str).unwrap_or_default().to_owned();
            let proxy = proxies.entry(of.clone()).or_insert_with(|| {
                let own = golden.join(&of);
                // The first proxy's configuration stands in the folder itself.
                Proxy::load(if own.join("listeners.json").is_file() { &own } else { &golden })
            });
            let (expected, got) = (expected(&entry["expect"]), proxy.run(&Call(call.clone())));
            if expected == got {
                right += 1;
            } else {
                wrong.push(format!("{name}: {}\n  expected {expected:?}\n  got      {got:?}", entry["name"]));
            }
        }
    }
    println!("{right} calls as expected, {limited} left out because of the simulator's limits");
    assert!(
        wrong.is_empty(),
        "{} wrong of {}:\n{}",
        wrong.len(),
        right + wrong.len(),
        wrong[..wrong.len().min(25)].join("\n")
    );
}
