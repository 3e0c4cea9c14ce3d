//! A control plane for tests, and connections to it.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ca::{Authority, TokenIssuer, TokenRequest};
use control_plane::{Handle, Listeners, Settings, Update, serve};
use hyper_util::rt::TokioIo;
use lifecycle::drain::Trigger;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// Two services with one endpoint each.
pub(crate) const MESH: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: default}
spec: {clusterIP: 10.96.0.1, selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: sleep, namespace: default, labels: {app: sleep}}
spec: {serviceAccountName: sleep, containers: []}
status: {podIP: 10.0.0.9, phase: Running, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: reviews-1, namespace: default, labels: {kubernetes.io/service-name: reviews}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.1], conditions: {ready: true}}]
ports: [{name: http, port: 9080}]
";

pub(crate) const SERVER_NAME: &str = "istiod.istio-system.svc";

pub(crate) struct Mesh {
    pub(crate) handle: Handle,
    pub(crate) authority: Arc<Authority>,
    pub(crate) issuer: TokenIssuer,
    pub(crate) grpc: SocketAddr,
    pub(crate) grpc_tls: SocketAddr,
    pub(crate) webhook: SocketAddr,
    pub(crate) monitoring: SocketAddr,
    _trigger: Trigger,
}

impl Mesh {
    /// A control plane without configuration.
    pub(crate) async fn empty() -> Self {
        Self::with(Settings::default()).await
    }

    /// One with these settings, and injection.
    pub(crate) async fn with(settings: Settings) -> Self {
        let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
        let listeners = Listeners { grpc: bind(), grpc_tls: bind(), webhook: bind(), monitoring: bind() };
        let address = |listener: &TcpListener| listener.local_addr().unwrap();
        let (grpc, grpc_tls) = (address(&listeners.grpc), address(&listeners.grpc_tls));
        let (webhook, monitoring) = (address(&listeners.webhook), address(&listeners.monitoring));
        let authority = Arc::new(Authority::generate("cluster.local").unwrap());
        let issuer = TokenIssuer::generate().unwrap();
        let (trigger, watch) = lifecycle::drain::channel();
        let injector = inject::Config::builtin(&inject::Builtin::default()).unwrap();
        let settings = Settings { injector: Some(control_plane::Injector::new(injector)), ..settings };
        let handle = serve(settings, listeners, authority.clone(), issuer.verifier(), watch).await.unwrap();
        Self { handle, authority, issuer, grpc, grpc_tls, webhook, monitoring, _trigger: trigger }
    }

    /// A control plane with [`MESH`].
    pub(crate) async fn start() -> Self {
        let mesh = Self::empty().await;
        mesh.apply(MESH).await;
        mesh
    }

    pub(crate) async fn apply(&self, yaml: &str) -> u64 {
        let documents = manifest::parse(Path::new("mesh.yaml"), yaml).unwrap();
        let updates = documents.into_iter().map(|document| Update::Apply(Box::new(document))).collect();
        let (revision, rejected) = self.handle.update(updates).await;
        assert!(rejected.is_empty(), "{rejected:?}");
        revision
    }

    pub(crate) fn token(&self, service_account: &str) -> String {
        self.token_in("default", service_account)
    }

    pub(crate) fn token_in(&self, namespace: &str, service_account: &str) -> String {
        let request = TokenRequest {
            namespace: namespace.into(),
            service_account: service_account.into(),
            audience: "istio-ca".into(),
            ttl: Duration::from_secs(60),
            ..TokenRequest::default()
        };
        self.issuer.issue(&request).unwrap()
    }

    pub(crate) async fn plain_channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.grpc)).unwrap().connect().await.unwrap()
    }

    /// A channel over TLS that trusts the mesh's root, with a client certificate if given.
    pub(crate) async fn tls_channel(
        &self,
        certificate: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    ) -> Channel {
        let config = Arc::new(self.client_config(certificate, &[b"h2"]));
        let address = self.grpc_tls;
        let connect = tower::service_fn(move |_: Uri| {
            let config = config.clone();
            async move { tls_stream(address, config).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://istiod").connect_with_connector(connect).await.unwrap()
    }

    pub(crate) fn client_config(
        &self,
        certificate: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
        alpn: &[&[u8]],
    ) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.root_pem().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match certificate {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config
    }
}

pub(crate) async fn tls_stream(
    address: SocketAddr,
    config: Arc<rustls::ClientConfig>,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    tokio_rustls::TlsConnector::from(config).connect(name, stream).await
}
