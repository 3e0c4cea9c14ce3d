//! The proxy's side of xDS: hands responses to [`Control`], and dials the servers that the bootstrap and resources name.

use crate::control::{Control, Incoming};
use crate::io::{Io, Raw};
use crate::runtime::Shared;
use crate::socket;
use crate::sources::Demand;
use crate::upstream::ServerNames;
use ads::Protocol;
use ads::client::{Client, Config, Connection, Connector, Handler, Rejected, Rpc, Subscriptions, Update, Wanted};
use hyper_util::rt::TokioIo;
use mesh_types::ArcStr;
use proxy_core::Address;
use proxy_core::config_source::{GrpcService, GrpcSource, GrpcTarget, Origin};
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;
use tonic::transport::{Endpoint, Uri};

/// How long a server without a cluster may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that carries nothing is asked for life so often, or a server that vanished would never be noticed.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Sends each type to whom it belongs.
struct Dispatch {
    control: Arc<Mutex<Control>>,
    origin: Origin,
    /// Of the response whose contents come next.
    version: ArcStr,
    extra: HashMap<String, Box<dyn Handler>>,
}

impl Handler for Dispatch {
    fn begin(&mut self, type_url: &str, version: &str) {
        self.version = version.into();
        if let Some(handler) = self.extra.get_mut(type_url) {
            handler.begin(type_url, version);
        }
    }

    fn update(&mut self, type_url: &str, updated: Vec<Update>, removed: Vec<ArcStr>) -> Result<(), Rejected> {
        if let Some(handler) = self.extra.get_mut(type_url) {
            return handler.update(type_url, updated, removed);
        }
        let updated =
            updated.into_iter().map(|u| Incoming { name: u.name, version: u.version, body: u.body }).collect();
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        Rejected(control.update(&self.origin, type_url, &self.version, updated, &removed)).into_result()
    }

    fn refused(&mut self, type_url: &str) {
        self.control.lock().unwrap_or_else(PoisonError::into_inner).count_refused(type_url);
    }

    fn status(&mut self, status: &ads::client::ConnectionStatus) {
        if self.origin == Origin::Ads {
            let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
            match status {
                ads::client::ConnectionStatus::Connected => control.connected(),
                ads::client::ConnectionStatus::Disconnected { .. } => control.disconnected(),
            }
        }
        for handler in self.extra.values_mut() {
            handler.status(status);
        }
    }
}

/// Starts the ADS client, if the bootstrap or the agent wants one.
pub(crate) fn start(
    tasks: &mut JoinSet<()>,
    ads: Option<&GrpcSource>,
    control: &Arc<Mutex<Control>>,
    connector: Option<Connector>,
    extra: Vec<(String, Box<dyn Handler>)>,
) {
    let (subscriptions, shared) = {
        let control = control.lock().unwrap_or_else(PoisonError::into_inner);
        (control.subscriptions.clone(), control.shared.clone())
    };
    let node = shared.node.message.clone();
    let connector = match (connector, ads) {
        (Some(connector), _) => connector,
        (None, Some(ads)) => dialler(shared, ads.services.clone()),
        (None, None) => return,
    };
    let mut config = Config::new(node);
    if let Some(ads) = ads {
        config.protocol = protocol(ads);
    }
    for (type_url, _) in &extra {
        subscriptions.set(type_url, Wanted::all());
    }
    let handler = Dispatch {
        control: control.clone(),
        origin: Origin::Ads,
        version: "".into(),
        extra: extra.into_iter().collect(),
    };
    tasks.spawn(Client::new(config, subscriptions, connector, handler).run());
}

fn protocol(source: &GrpcSource) -> Protocol {
    if source.delta { Protocol::Delta } else { Protocol::StateOfTheWorld }
}

/// A stream for one subscription; `None` for types that no service serves.
pub(crate) fn subscribe(
    source: &GrpcSource,
    demand: &Demand,
    control: &Arc<Mutex<Control>>,
    node: envoy_api::core::Node,
) -> Option<impl Future<Output = ()> + Send + use<>> {
    let mut config = Config::new(node);
    config.protocol = protocol(source);
    config.rpc = Rpc::of(demand.type_url)?;
    let subscriptions = Subscriptions::new();
    subscriptions.set(
        demand.type_url,
        match &demand.name {
            Some(name) => Wanted::names([name.clone()]),
            None => Wanted::all(),
        },
    );
    let shared = control.lock().unwrap_or_else(PoisonError::into_inner).shared.clone();
    let connector = dialler(shared, source.services.clone());
    let handler =
        Dispatch { control: control.clone(), origin: demand.origin.clone(), version: "".into(), extra: HashMap::new() };
    Some(Client::new(config, subscriptions, connector, handler).run())
}

/// Dials the first of the services that answers.
fn dialler(shared: Arc<Shared>, services: Vec<GrpcService>) -> Connector {
    Box::new(move || {
        let (shared, services) = (shared.clone(), services.clone());
        Box::pin(async move {
            let mut failure = None;
            for service in services {
                let (shared, target) = (shared.clone(), service.target.clone());
                let dial = tower::service_fn(move |_: Uri| {
                    let (shared, target) = (shared.clone(), target.clone());
                    async move { dial(&shared, &target).await.map(TokioIo::new) }
                });
                let endpoint = endpoint(&service)
                    .http2_keep_alive_interval(KEEPALIVE)
                    .keep_alive_timeout(CONNECT_TIMEOUT)
                    .keep_alive_while_idle(true);
                match endpoint.connect_with_connector(dial).await {
                    Ok(channel) => {
                        return Ok(Connection { channel, authorization: None, metadata: service.initial_metadata });
                    }
                    Err(e) => failure = Some(e),
                }
            }
            Err(failure.map_or_else(|| "no gRPC service is configured".into(), |e| e.into()))
        })
    })
}

/// Names the server. A cluster's name that is no authority is not sent.
fn endpoint(service: &GrpcService) -> Endpoint {
    let authority = match (&*service.authority, &service.target) {
        ("", GrpcTarget::Cluster(name)) => name.to_string(),
        ("", GrpcTarget::Address(Address::Ip(address))) => address.to_string(),
        ("", GrpcTarget::Address(_)) => "localhost".to_owned(),
        ("", GrpcTarget::Name(name, port)) => format!("{name}:{port}"),
        (authority, _) => authority.to_owned(),
    };
    Endpoint::from_shared(format!("http://{authority}")).unwrap_or_else(|_| Endpoint::from_static("http://xds"))
}

async fn dial(shared: &Shared, target: &GrpcTarget) -> io::Result<Io> {
    let plain = |address: Address| async move {
        let connecting = socket::connect(&address, socket::ConnectOptions::default());
        tokio::time::timeout(CONNECT_TIMEOUT, connecting).await?.map(Io::Raw)
    };
    match target {
        GrpcTarget::Cluster(name) => dial_cluster(shared, name).await,
        GrpcTarget::Address(address) => plain(address.clone()).await,
        GrpcTarget::Name(name, port) => {
            let mut result = Err(io::Error::other(format!("{name} has no address")));
            for address in tokio::net::lookup_host((&**name, *port)).await? {
                result = plain(Address::Ip(address)).await;
                if result.is_ok() {
                    break;
                }
            }
            result
        }
    }
}

/// One of a cluster's hosts, the first that can be reached, with the cluster's TLS.
async fn dial_cluster(shared: &Shared, name: &str) -> io::Result<Io> {
    let entry = shared.clusters.load().get(name).cloned();
    let entry =
        entry.ok_or_else(|| io::Error::other(format!("cluster {name} does not exist or has no endpoints yet")))?;
    let hosts: Vec<_> = entry.endpoints.load().hosts().cloned().collect();
    let mut result = Err(io::Error::other(format!("cluster {name} has no endpoints")));
    for host in hosts {
        let options = socket::ConnectOptions { others: &entry.cluster.socket_options, ..Default::default() };
        let reached = tokio::time::timeout(entry.cluster.connect_timeout, async {
            let raw: Raw = socket::connect(&host.address, options).await?;
            match entry.client_tls(&host) {
                Some(tls) => Ok(Io::Client(
                    tls.connect(raw, &shared.secrets, &ServerNames::default(), &host.hostname, None).await?.0,
                )),
                None => Ok(Io::Raw(raw)),
            }
        });
        result = reached.await.unwrap_or_else(|elapsed| Err(elapsed.into()));
        if result.is_ok() {
            break;
        }
    }
    result
}
