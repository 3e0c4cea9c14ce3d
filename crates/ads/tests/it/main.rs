//! Both ends of the protocol, joined by a real tonic channel over a socket.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ads::Protocol;
use ads::client::{Client, Config, Connection, ConnectionStatus, Handler, Rejected, Subscriptions, Update, Wanted};
use ads::server::{Event, EventKind, Names, Peer, Source};
use envoy_api::Resource;
use envoy_api::core::Node;
use envoy_api::type_url::{CLUSTER, ENDPOINT};
use mesh_types::ArcStr;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

/// A control plane with clusters and endpoints of the same names.
struct Mesh {
    snapshot: Mutex<BTreeMap<&'static str, u32>>,
    revision: watch::Sender<u64>,
    events: mpsc::UnboundedSender<Event>,
}

impl Mesh {
    fn set(&self, of: &[(&'static str, u32)]) -> u64 {
        *self.snapshot.lock().unwrap() = of.iter().copied().collect();
        self.revision.send_modify(|revision| *revision += 1);
        *self.revision.borrow()
    }
}

impl Source for Mesh {
    type Proxy = String;

    fn connect(&self, node: &Node, peer: &Peer) -> Result<String, tonic::Status> {
        assert!(peer.address.is_some());
        if node.id == "stranger" { Err(tonic::Status::permission_denied("who?")) } else { Ok(node.id.clone()) }
    }

    fn resources(&self, _proxy: &String, type_url: &str, names: Names<'_>) -> Arc<[Resource]> {
        let snapshot = self.snapshot.lock().unwrap();
        let wanted = |name: &str| match names {
            Names::Wildcard => true,
            Names::List(list) => list.iter().any(|n| &**n == name),
        };
        let resource = |(name, version): (&&str, &u32)| {
            // Field 1, as all named resources have it.
            let mut body = vec![0x0a, name.len() as u8];
            body.extend_from_slice(name.as_bytes());
            let version = if type_url == CLUSTER { ArcStr::from("fixed") } else { ArcStr::from(version.to_string()) };
            Resource::with_version(*name, version, body)
        };
        snapshot.iter().filter(|(name, _)| wanted(name)).map(resource).collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    fn report(&self, _proxy: &String, event: &Event) {
        let _ = self.events.send(event.clone());
    }
}

/// A proxy that wants endpoints of all clusters it is told of, and dislikes one name.
struct Proxy {
    subscriptions: Subscriptions,
    clusters: BTreeMap<String, String>,
    log: mpsc::UnboundedSender<String>,
}

impl Handler for Proxy {
    fn update(&mut self, type_url: &str, updated: Vec<Update>, removed: Vec<ArcStr>) -> Result<(), Rejected> {
        let kind = type_url.rsplit('.').next().unwrap();
        let mut rejected = Rejected::default();
        for update in &updated {
            if &*update.name == "bad" {
                rejected.0.push((update.name.clone(), "I do not like it".to_owned()));
            } else if type_url == CLUSTER {
                self.clusters.insert(update.name.to_string(), update.version.to_string());
            }
        }
        for name in &removed {
            if type_url == CLUSTER {
                self.clusters.remove(&**name);
            }
        }
        let names: Vec<String> =
            updated.iter().map(|u| u.name.to_string()).chain(removed.iter().map(|n| format!("-{n}"))).collect();
        let _ = self.log.send(format!("{kind} {}", names.join(" ")));
        if type_url == CLUSTER {
            self.subscriptions.set(ENDPOINT, Wanted::names(self.clusters.keys().map(|k| ArcStr::from(k.as_str()))));
        }
        rejected.into_result()
    }

    fn status(&mut self, status: &ConnectionStatus) {
        let _ = self.log.send(match status {
            ConnectionStatus::Connected => "connected".to_owned(),
            ConnectionStatus::Disconnected { reason, .. } => format!("disconnected: {reason}"),
        });
    }
}

struct World {
    mesh: Arc<Mesh>,
    events: mpsc::UnboundedReceiver<Event>,
    log: mpsc::UnboundedReceiver<String>,
    server: Option<Server>,
    client: tokio::task::JoinHandle<()>,
    address: SocketAddr,
}

/// A server on a runtime of its own, so that its end takes all connections with it.
struct Server(Option<tokio::runtime::Runtime>);

impl Server {
    fn start(mesh: Arc<Mesh>, listener: std::net::TcpListener) -> Server {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            let router = tonic::transport::Server::builder().add_service(ads::server::service(mesh));
            let _ = router.serve_with_incoming(incoming).await;
        });
        Server(Some(runtime))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.take().unwrap().shutdown_background();
    }
}

fn listen(address: &str) -> std::io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn world(protocol: Protocol, node: &str, initial: &[(&'static str, u32)]) -> World {
    let (events_in, events) = mpsc::unbounded_channel();
    let mesh = Arc::new(Mesh { snapshot: Mutex::default(), revision: watch::Sender::new(0), events: events_in });
    mesh.set(initial);
    let listener = listen("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::start(mesh.clone(), listener);
    let (log_in, log) = mpsc::unbounded_channel();
    let subscriptions = Subscriptions::new();
    subscriptions.set(CLUSTER, Wanted::all());
    let proxy = Proxy { subscriptions: subscriptions.clone(), clusters: BTreeMap::new(), log: log_in };
    let mut config = Config::new(Node { id: node.to_owned(), ..Default::default() });
    config.protocol = protocol;
    config.min_backoff = Duration::from_millis(10);
    config.max_backoff = Duration::from_millis(50);
    let connector =
        move || -> std::pin::Pin<Box<dyn Future<Output = Result<Connection, ads::client::ConnectError>> + Send>> {
            Box::pin(async move {
                let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
                Ok(Connection { channel, authorization: Some("Bearer secret".to_owned()), metadata: Vec::new() })
            })
        };
    let client = tokio::spawn(Client::new(config, subscriptions, Box::new(connector), proxy).run());
    World { mesh, events, log, server: Some(server), client, address }
}

impl World {
    async fn logged(&mut self) -> String {
        tokio::time::timeout(Duration::from_secs(10), self.log.recv()).await.expect("nothing happened").unwrap()
    }

    async fn event(&mut self, wanted: impl Fn(&EventKind) -> bool) -> EventKind {
        loop {
            let event = tokio::time::timeout(Duration::from_secs(10), self.events.recv())
                .await
                .expect("no such event")
                .unwrap();
            if wanted(&event.kind) {
                return event.kind;
            }
        }
    }

    async fn synced(&mut self, to: u64) {
        self.event(|kind| matches!(kind, EventKind::Synced { revision } if *revision == to)).await;
    }
}

#[tokio::test]
async fn delta_from_first_sight_to_sync() {
    let mut world = world(Protocol::Delta, "me", &[("a", 1), ("b", 1)]).await;
    assert_eq!(world.logged().await, "connected");
    assert_eq!(world.logged().await, "Cluster a b");
    assert_eq!(world.logged().await, "ClusterLoadAssignment a b");
    world.synced(1).await;
    let revision = world.mesh.set(&[("a", 2), ("b", 1)]);
    assert_eq!(world.logged().await, "ClusterLoadAssignment a", "only what changed");
    world.synced(revision).await;
    let revision = world.mesh.set(&[("b", 1), ("c", 1)]);
    assert_eq!(world.logged().await, "Cluster c -a");
    world.synced(revision).await;
    world.client.abort();
    world.event(|kind| matches!(kind, EventKind::Disconnected)).await;
}

#[tokio::test]
async fn state_of_the_world_from_first_sight_to_sync() {
    let mut world = world(Protocol::StateOfTheWorld, "me", &[("a", 1)]).await;
    assert_eq!(world.logged().await, "connected");
    assert_eq!(world.logged().await, "Cluster a");
    assert_eq!(world.logged().await, "ClusterLoadAssignment a");
    world.synced(1).await;
    let revision = world.mesh.set(&[("b", 1)]);
    assert_eq!(world.logged().await, "Cluster b -a");
    assert_eq!(world.logged().await, "ClusterLoadAssignment b");
    world.synced(revision).await;
}

#[tokio::test]
async fn a_refusal_names_the_resource_and_the_rest_is_used() {
    let mut world = world(Protocol::Delta, "me", &[("a", 1), ("bad", 1)]).await;
    let EventKind::Nacked { error, .. } = world.event(|kind| matches!(kind, EventKind::Nacked { .. })).await else {
        unreachable!()
    };
    assert_eq!(error, "bad: I do not like it");
    assert_eq!(world.logged().await, "connected");
    assert_eq!(world.logged().await, "Cluster a bad");
    assert_eq!(world.logged().await, "ClusterLoadAssignment a");
}

#[tokio::test]
async fn a_client_that_lost_its_server_gets_only_what_it_missed() {
    let mut world = world(Protocol::Delta, "me", &[("a", 1), ("b", 1)]).await;
    world.synced(1).await;
    world.server = None;
    while !world.logged().await.starts_with("disconnected") {}
    world.mesh.set(&[("a", 1), ("b", 2)]);
    // The old connection's server task may hold the port for a moment.
    let listener = loop {
        match listen(&world.address.to_string()) {
            Ok(listener) => break listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    world.server = Some(Server::start(world.mesh.clone(), listener));
    while world.logged().await != "connected" {}
    assert_eq!(world.logged().await, "Cluster ", "nothing new, but an answer");
    assert_eq!(world.logged().await, "ClusterLoadAssignment b");
    world.synced(2).await;
}

#[tokio::test]
async fn strangers_are_refused_with_the_reason() {
    let mut world = world(Protocol::Delta, "stranger", &[("a", 1)]).await;
    let mut line = world.logged().await;
    while !line.starts_with("disconnected") {
        line = world.logged().await;
    }
    assert!(line.contains("who?"), "{line}");
}
