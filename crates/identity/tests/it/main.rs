//! Certificates from a real authority over real TLS, and handshakes between the workloads that got them.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use ca::{Authenticate, CertificateService, TokenIssuer, TokenRequest, TokenVerifier};
use identity::tls::{self, ClientIdentity, ServerIdentity};
use identity::{Authority, Files, KeyKind, Manager, Roots, Rotation, Source, WorkloadCertificate, write_certificate};
use mesh_types::SpiffeId;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::{Extensions, Status, metadata::MetadataMap};

const NAME: &str = "istiod.istio-system.svc";

/// A control plane's CA with everything a pod has of it, in a folder.
struct World {
    dir: tempfile::TempDir,
    issuer: TokenIssuer,
    address: String,
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

/// tonic wants to know who is connected; these tests do not.
struct Incoming(tokio_rustls::server::TlsStream<TcpStream>);

impl tonic::transport::server::Connected for Incoming {
    type ConnectInfo = ();
    fn connect_info(&self) {}
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

impl World {
    async fn new() -> World {
        let authority = Arc::new(ca::Authority::generate("cluster.local").unwrap());
        let issuer = TokenIssuer::generate().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("root.pem"), authority.root_pem()).unwrap();
        let server = authority.server_certificate(&[NAME.to_owned()], Duration::from_secs(3600)).unwrap();
        let config =
            rustls::ServerConfig::builder_with_provider(tls::provider()).with_safe_default_protocol_versions().unwrap();
        let mut config = config.with_no_client_auth().with_single_cert(server.chain, server.key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (send, receive) = tokio::sync::mpsc::channel::<std::io::Result<Incoming>>(8);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                if let Ok(stream) = acceptor.accept(stream).await {
                    let _ = send.send(Ok(Incoming(stream))).await;
                }
            }
        });
        let service = CertificateService::new(authority, Arc::new(Tokens(issuer.verifier())));
        let router = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(router.serve_with_incoming(tokio_stream::wrappers::ReceiverStream::new(receive)));
        World { dir, issuer, address }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn token(&self, file: &str, namespace: &str, account: &str, audience: &str) {
        let request = TokenRequest {
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
            pod: "pod".to_owned(),
            uid: "uid".to_owned(),
            audience: audience.to_owned(),
            ttl: Duration::from_secs(600),
        };
        std::fs::write(self.path(file), self.issuer.issue(&request).unwrap()).unwrap();
    }

    fn authority(&self, token: &str, identity: &str) -> Authority {
        Authority {
            address: self.address.clone(),
            server_name: Some(NAME.to_owned()),
            roots: Roots::File(self.path("root.pem")),
            token: Some(self.path(token)),
            identity: identity.parse().unwrap(),
            ttl: Duration::from_secs(3600),
            key: KeyKind::EcdsaP256,
            trust_bundle: Vec::new(),
            headers: vec![("x-tenant".to_owned(), "a".to_owned())],
            provisioned: None,
            cert_signer: None,
            cluster_id: "Kubernetes".to_owned(),
        }
    }

    async fn workload(&self, account: &str) -> WorkloadCertificate {
        self.token(account, "default", account, "istio-ca");
        self.authority(account, &format!("spiffe://cluster.local/ns/default/sa/{account}")).fetch().await.unwrap()
    }
}

fn text(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[tokio::test]
async fn the_tokens_identity_wins_over_the_requested_one() {
    let world = World::new().await;
    world.token("token", "default", "reviews", "istio-ca");
    for key in [KeyKind::EcdsaP256, KeyKind::EcdsaP384, KeyKind::Rsa(2048)] {
        let mut authority = world.authority("token", "spiffe://cluster.local/ns/default/sa/admin");
        authority.key = key;
        let certificate = authority.fetch().await.unwrap();
        assert_eq!(certificate.spiffe.as_ref().unwrap().to_string(), "spiffe://cluster.local/ns/default/sa/reviews");
        assert_eq!(
            (certificate.chain.len(), certificate.roots.len()),
            (1, 1),
            "the root is known already and no part of the chain"
        );
        assert!(certificate.is_valid_at(SystemTime::now()));
    }
}

#[tokio::test]
async fn refusals_say_what_is_wrong() {
    let world = World::new().await;
    let fetch = async |authority: Authority| text(&authority.fetch().await.unwrap_err());
    let good = || world.authority("token", "spiffe://cluster.local/ns/default/sa/a");
    assert!(fetch(good()).await.contains("cannot read the service account token"));
    std::fs::write(world.path("token"), "  \n").unwrap();
    assert!(fetch(good()).await.contains("is empty"));
    world.token("token", "default", "a", "other-audience");
    let refused = fetch(good()).await;
    assert!(refused.contains("refused to sign") && refused.contains("audience"), "{refused}");
    world.token("token", "default", "a", "istio-ca");
    let refused = fetch(Authority { server_name: Some("elsewhere".to_owned()), ..good() }).await;
    assert!(refused.contains("cannot connect to"), "{refused}");
    let stranger = ca::Authority::generate("cluster.local").unwrap();
    let refused = fetch(Authority { roots: Roots::Pem(stranger.root_pem().to_owned()), ..good() }).await;
    assert!(refused.contains("certificate"), "{refused}");
    let bundle = vec![stranger.root_pem().to_owned()];
    assert_eq!(
        Authority { trust_bundle: bundle, ..good() }.fetch().await.unwrap().roots.len(),
        2,
        "federated roots are trusted"
    );
    assert!(fetch(Authority { address: "nonsense".to_owned(), ..good() }).await.contains("not HOST:PORT"));
    assert!(good().fetch().await.is_ok());
}

/// One handshake and a byte each way; what the server saw, or either side's error.
async fn handshake(client: rustls::ClientConfig, server: rustls::ServerConfig) -> Result<Option<SpiffeId>, String> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = TlsAcceptor::from(Arc::new(server)).accept(stream).await.map_err(|e| e.to_string())?;
        let peer = stream.get_ref().1.peer_certificates().and_then(|chain| tls::spiffe_id(chain.first()?));
        stream.write_all(b"x").await.map_err(|e| e.to_string())?;
        let _ = stream.shutdown().await;
        Ok(peer)
    };
    let connect = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("outbound.example").unwrap();
        let mut stream = TlsConnector::from(Arc::new(client)).connect(name, stream).await.map_err(|e| e.to_string())?;
        stream.read_u8().await.map_err(|e| e.to_string())
    };
    let (peer, byte): (Result<_, String>, Result<u8, String>) = tokio::join!(serve, connect);
    byte?;
    peer
}

#[tokio::test]
async fn workloads_verify_each_other() {
    let world = World::new().await;
    let (reviews, ratings) = (world.workload("reviews").await, world.workload("ratings").await);
    let id = |account: &str| SpiffeId::new("cluster.local", "default", account).unwrap();
    let client = |own: Option<&WorkloadCertificate>, accept| {
        tls::client_config(&reviews.roots, own, accept, &[b"istio"]).unwrap()
    };
    let server = |clients| tls::server_config(&ratings, clients, &[b"istio"]).unwrap();
    let ours = || vec!["cluster.local".to_owned()];
    let required = || ClientIdentity::Required { trust_domains: ours() };
    let expect = || ServerIdentity::OneOf(vec![id("ratings")]);

    assert_eq!(handshake(client(Some(&reviews), expect()), server(required())).await, Ok(Some(id("reviews"))));
    assert_eq!(
        handshake(client(Some(&reviews), ServerIdentity::TrustDomains(ours())), server(required())).await,
        Ok(Some(id("reviews")))
    );
    assert!(
        handshake(client(Some(&reviews), ServerIdentity::OneOf(vec![id("details")])), server(required()))
            .await
            .is_err(),
        "not whom it wanted"
    );
    assert!(handshake(client(None, expect()), server(required())).await.is_err(), "no certificate");
    assert_eq!(
        handshake(client(None, expect()), server(ClientIdentity::Optional { trust_domains: ours() })).await,
        Ok(None)
    );
    let elsewhere = ClientIdentity::Required { trust_domains: vec!["elsewhere".to_owned()] };
    assert!(handshake(client(Some(&reviews), expect()), server(elsewhere)).await.is_err(), "not of this trust domain");
    let strange = World::new().await.workload("reviews").await;
    assert!(
        handshake(client(Some(&strange), expect()), server(required())).await.is_err(),
        "the same name under another root"
    );
}

async fn next(
    certificates: &mut tokio::sync::watch::Receiver<Option<Arc<WorkloadCertificate>>>,
) -> Arc<WorkloadCertificate> {
    let change = async {
        certificates.changed().await.unwrap();
        certificates.borrow_and_update().clone().unwrap()
    };
    tokio::time::timeout(Duration::from_secs(20), change).await.expect("no new certificate")
}

#[tokio::test]
async fn certificates_are_renewed_before_they_end_and_written_out() {
    let world = World::new().await;
    world.token("token", "default", "a", "istio-ca");
    let authority =
        Authority { ttl: Duration::from_secs(4), ..world.authority("token", "spiffe://cluster.local/ns/default/sa/a") };
    let out = world.path("out");
    let manager = Manager::start(Source::Authority(Box::new(authority)), Rotation::default(), Some(out.clone()));
    let mut certificates = manager.certificate();
    let first = next(&mut certificates).await;
    let second = next(&mut certificates).await;
    assert_ne!(first.chain, second.chain);
    assert!(first.is_valid_at(SystemTime::now()), "renewed in time");
    assert_eq!(Files::in_dir(&out).load().unwrap().chain, second.chain);
}

#[tokio::test]
async fn a_manager_recovers_by_itself_and_says_what_it_waits_for() {
    let world = World::new().await;
    let authority = world.authority("late-token", "spiffe://cluster.local/ns/default/sa/a");
    let manager = Manager::start(Source::Authority(Box::new(authority)), Rotation::default(), None);
    let mut failure = manager.failure();
    let reason = failure.wait_for(Option::is_some).await.unwrap().clone().unwrap();
    assert!(reason.contains("late-token"), "{reason}");
    world.token("late-token", "default", "a", "istio-ca");
    next(&mut manager.certificate()).await;
    assert_eq!(*manager.failure().borrow(), None);
}

#[tokio::test]
async fn mounted_files_are_followed() {
    let world = World::new().await;
    let dir = world.path("certs");
    let write = |dir: &Path, certificate: &WorkloadCertificate| write_certificate(dir, certificate).unwrap();
    let first = world.workload("a").await;
    write(&dir, &first);
    let manager = Manager::start(Source::Files(Files::in_dir(&dir)), Rotation::default(), None);
    let mut certificates = manager.certificate();
    assert_eq!(next(&mut certificates).await.chain, first.chain);
    let second = world.workload("a").await;
    write(&dir, &second);
    assert_eq!(next(&mut certificates).await.chain, second.chain);
}
