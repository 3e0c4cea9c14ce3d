//! A control plane of one listener and one name: CA and xDS on one TLS port, as istiod's 15012.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use ads::server::{Event, Names, Peer, Source};
use ca::{Authenticate, Authority, CertificateService, TokenIssuer, TokenRequest, TokenVerifier};
use envoy_api::core::Node;
use envoy_api::istio::{NameInfo, NameTable};
use envoy_api::{Message, Resource, core, http, listener, route, type_url};
use identity::tls;
use mesh_types::{ArcStr, SpiffeId};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Status};

pub(crate) const NAME: &str = "istiod.istio-system.svc";

pub(crate) struct ControlPlane {
    pub(crate) address: String,
    authority: Arc<Authority>,
    issuer: TokenIssuer,
    mesh: Arc<Mesh>,
    /// Ending the runtime ends all connections.
    runtime: Mutex<Option<tokio::runtime::Runtime>>,
}

struct Mesh {
    listener_port: u16,
    text: Mutex<String>,
    revision: watch::Sender<u64>,
    peer: Mutex<Option<String>>,
}

struct Tokens(TokenVerifier);

impl Authenticate for Tokens {
    fn identity(&self, metadata: &MetadataMap, _: &Extensions) -> Result<SpiffeId, Status> {
        let header = metadata.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let claims = self.0.verify(header.strip_prefix("Bearer ").unwrap_or_default(), "istio-ca");
        let claims = claims.map_err(|e| Status::unauthenticated(e.to_string()))?;
        claims.identity("cluster.local").map_err(|e| Status::unauthenticated(e.to_string()))
    }
}

struct Incoming(tokio_rustls::server::TlsStream<TcpStream>);

/// Who is connected, for the services.
#[derive(Clone)]
struct Who(Option<SpiffeId>);

impl tonic::transport::server::Connected for Incoming {
    type ConnectInfo = Who;
    fn connect_info(&self) -> Who {
        let chain = self.0.get_ref().1.peer_certificates();
        Who(chain.and_then(|chain| tls::spiffe_id(chain.first()?)))
    }
}

impl AsyncRead for Incoming {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Incoming {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl ControlPlane {
    pub(crate) async fn start(listener_port: u16) -> ControlPlane {
        let authority = Arc::new(Authority::generate("cluster.local").unwrap());
        let issuer = TokenIssuer::generate().unwrap();
        let server = authority.server_certificate(&[NAME.to_owned()], Duration::from_secs(3600)).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(rustls_pki_types::pem::PemObject::from_pem_slice(authority.root_pem().as_bytes()).unwrap()).unwrap();
        let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), tls::provider())
            .allow_unauthenticated()
            .build()
            .unwrap();
        let config =
            rustls::ServerConfig::builder_with_provider(tls::provider()).with_safe_default_protocol_versions().unwrap();
        let mut config = config.with_client_cert_verifier(clients).with_single_cert(server.chain, server.key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let mesh = Arc::new(Mesh {
            listener_port,
            text: Mutex::new("hello".to_owned()),
            revision: watch::Sender::new(1),
            peer: Mutex::default(),
        });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let router = {
            let certificates = CertificateService::new(authority.clone(), Arc::new(Tokens(issuer.verifier())));
            let identify = |mut request: tonic::Request<()>| {
                let identity = request.extensions().get::<Who>().and_then(|who| who.0.clone());
                request.extensions_mut().insert(Peer { identity, ..Peer::default() });
                Ok(request)
            };
            let xds =
                tonic::service::interceptor::InterceptedService::new(ads::server::service(mesh.clone()), identify);
            tonic::transport::Server::builder().add_service(certificates).add_service(xds)
        };
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            let (send, receive) = tokio::sync::mpsc::channel::<std::io::Result<Incoming>>(8);
            tokio::spawn(router.serve_with_incoming(tokio_stream::wrappers::ReceiverStream::new(receive)));
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                if let Ok(stream) = acceptor.accept(stream).await {
                    let _ = send.send(Ok(Incoming(stream))).await;
                }
            }
        });
        ControlPlane { address, authority, issuer, mesh, runtime: Mutex::new(Some(runtime)) }
    }

    pub(crate) fn root_pem(&self) -> &str {
        self.authority.root_pem()
    }

    pub(crate) fn token(&self, namespace: &str, account: &str) -> String {
        let request = TokenRequest {
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
            audience: "istio-ca".to_owned(),
            ttl: Duration::from_secs(600),
            ..TokenRequest::default()
        };
        self.issuer.issue(&request).unwrap()
    }

    /// The identity of the last client of xDS.
    pub(crate) fn peer(&self) -> Option<String> {
        self.mesh.peer.lock().unwrap().clone()
    }

    /// Changes what the listener answers.
    pub(crate) fn say(&self, text: &str) {
        *self.mesh.text.lock().unwrap() = text.to_owned();
        self.mesh.revision.send_modify(|revision| *revision += 1);
    }

    pub(crate) fn stop(&self) {
        self.runtime.lock().unwrap().take().unwrap().shutdown_background();
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.lock().unwrap().take() {
            runtime.shutdown_background();
        }
    }
}

impl Source for Mesh {
    type Proxy = ();

    fn connect(&self, _node: &Node, peer: &Peer) -> Result<(), Status> {
        *self.peer.lock().unwrap() = peer.identity.as_ref().map(ToString::to_string);
        Ok(())
    }

    fn resources(&self, (): &(), type_url: &str, names: Names<'_>) -> Arc<[Resource]> {
        let text = self.text.lock().unwrap().clone();
        let resource = |name: &str, body: Vec<u8>| Arc::from([Resource::with_version(name, text.as_str(), body)]);
        match type_url {
            type_url::LISTENER => resource("hello", self.listener().encode_to_vec()),
            type_url::ROUTE if names == Names::List(&[ArcStr::from("hello")]) => {
                resource("hello", routes(&text).encode_to_vec())
            }
            type_url::NAME_TABLE => resource("", names_of_the_mesh().encode_to_vec()),
            _ => Arc::default(),
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    fn report(&self, (): &(), event: &Event) {
        println!("{event:?}");
    }
}

fn names_of_the_mesh() -> NameTable {
    let details = NameInfo {
        ips: vec!["10.1.0.1".to_owned()],
        registry: "Kubernetes".to_owned(),
        shortname: "details".to_owned(),
        namespace: "default".to_owned(),
    };
    NameTable { table: [("details.default.svc.cluster.local".to_owned(), details)].into() }
}

fn routes(text: &str) -> route::RouteConfiguration {
    let body = core::DataSource {
        specifier: Some(core::data_source::Specifier::InlineString(text.to_owned())),
        ..Default::default()
    };
    let answer = route::route::Action::DirectResponse(route::DirectResponseAction {
        status: 200,
        body: Some(body),
        ..Default::default()
    });
    let matcher = route::RouteMatch {
        path_specifier: Some(route::route_match::PathSpecifier::Prefix("/".to_owned())),
        ..Default::default()
    };
    let route = route::Route { r#match: Some(matcher), action: Some(answer), ..Default::default() };
    let host = route::VirtualHost {
        name: "all".to_owned(),
        domains: vec!["*".to_owned()],
        routes: vec![route],
        ..Default::default()
    };
    route::RouteConfiguration { name: "hello".to_owned(), virtual_hosts: vec![host], ..Default::default() }
}

impl Mesh {
    /// A listener on a real port that gets its routes by RDS.
    fn listener(&self) -> listener::Listener {
        let ads = core::ConfigSource {
            config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(Default::default())),
            resource_api_version: core::ApiVersion::V3 as i32,
            ..Default::default()
        };
        let rds = http::Rds { config_source: Some(ads), route_config_name: "hello".to_owned() };
        let router = envoy_api::pb::envoy::extensions::filters::http::router::v3::Router::default();
        let filter = http::HttpFilter {
            name: "envoy.filters.http.router".to_owned(),
            config_type: Some(http::http_filter::ConfigType::TypedConfig(envoy_api::any(&router))),
            ..Default::default()
        };
        let manager = http::HttpConnectionManager {
            stat_prefix: "hello".to_owned(),
            route_specifier: Some(http::http_connection_manager::RouteSpecifier::Rds(rds)),
            http_filters: vec![filter],
            ..Default::default()
        };
        let filter = listener::Filter {
            name: "envoy.filters.network.http_connection_manager".to_owned(),
            config_type: Some(listener::filter::ConfigType::TypedConfig(envoy_api::any(&manager))),
        };
        let port = core::socket_address::PortSpecifier::PortValue(self.listener_port.into());
        let socket =
            core::SocketAddress { address: "127.0.0.1".to_owned(), port_specifier: Some(port), ..Default::default() };
        listener::Listener {
            name: "hello".to_owned(),
            address: Some(core::Address { address: Some(core::address::Address::SocketAddress(socket)) }),
            filter_chains: vec![listener::FilterChain { filters: vec![filter], ..Default::default() }],
            ..Default::default()
        }
    }
}
