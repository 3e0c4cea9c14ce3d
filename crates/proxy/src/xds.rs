//! The proxy's side of ADS: hands responses to [`Control`], and dials the bootstrap's ADS cluster when no agent does.

use crate::control::{Control, Incoming};
use crate::io::{Io, Raw};
use crate::runtime::Shared;
use crate::socket;
use ads::Protocol;
use ads::client::{Client, Config, Connection, Connector, Handler, Rejected, Update, Wanted};
use envoy_api::bootstrap::Bootstrap;
use envoy_api::core::api_config_source::ApiType;
use envoy_api::core::grpc_service::TargetSpecifier;
use hyper_util::rt::TokioIo;
use mesh_types::ArcStr;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::task::JoinSet;
use tonic::transport::{Endpoint, Uri};

/// Sends each type to whom it belongs.
struct Dispatch {
    control: Arc<Mutex<Control>>,
    extra: HashMap<String, Box<dyn Handler>>,
}

impl Handler for Dispatch {
    fn update(&mut self, type_url: &str, updated: Vec<Update>, removed: Vec<ArcStr>) -> Result<(), Rejected> {
        if let Some(handler) = self.extra.get_mut(type_url) {
            return handler.update(type_url, updated, removed);
        }
        let updated =
            updated.into_iter().map(|u| Incoming { name: u.name, version: u.version, body: u.body }).collect();
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        Rejected(control.update(type_url, updated, &removed)).into_result()
    }

    fn status(&mut self, status: &ads::client::ConnectionStatus) {
        for handler in self.extra.values_mut() {
            handler.status(status);
        }
    }
}

/// Starts the ADS client, if the bootstrap or the agent wants one.
pub(crate) fn start(
    tasks: &mut JoinSet<()>,
    bootstrap: &Bootstrap,
    control: &Arc<Mutex<Control>>,
    connector: Option<Connector>,
    extra: Vec<(String, Box<dyn Handler>)>,
) -> io::Result<()> {
    let ads = bootstrap.dynamic_resources.as_ref().and_then(|d| d.ads_config.as_ref());
    let (subscriptions, shared) = {
        let control = control.lock().unwrap_or_else(PoisonError::into_inner);
        (control.subscriptions.clone(), control.shared.clone())
    };
    let connector = match (connector, ads) {
        (Some(connector), _) => connector,
        (None, Some(ads)) => {
            let cluster = ads.grpc_services.first().and_then(|s| match &s.target_specifier {
                Some(TargetSpecifier::EnvoyGrpc(grpc)) => Some(ArcStr::from(grpc.cluster_name.as_str())),
                _ => None,
            });
            let Some(cluster) = cluster else {
                return Err(io::Error::other("ads_config has no envoy_grpc service"));
            };
            to_cluster(shared, cluster)
        }
        (None, None) => return Ok(()),
    };
    let mut config = Config::new(bootstrap.node.clone().unwrap_or_default());
    if let Some(ads) = ads {
        let delta = matches!(ApiType::try_from(ads.api_type), Ok(ApiType::DeltaGrpc | ApiType::AggregatedDeltaGrpc));
        config.protocol = if delta { Protocol::Delta } else { Protocol::StateOfTheWorld };
    }
    for (type_url, _) in &extra {
        subscriptions.set(type_url, Wanted::all());
    }
    let handler = Dispatch { control: control.clone(), extra: extra.into_iter().collect() };
    tasks.spawn(Client::new(config, subscriptions, connector, handler).run());
    Ok(())
}

/// Dials the first host of a static cluster, with its TLS.
fn to_cluster(shared: Arc<Shared>, name: ArcStr) -> Connector {
    Box::new(move || {
        let (shared, name) = (shared.clone(), name.clone());
        Box::pin(async move {
            let channel = Endpoint::from_static("http://ads")
                .connect_with_connector(tower::service_fn(move |_: Uri| {
                    let (shared, name) = (shared.clone(), name.clone());
                    async move { dial(&shared, &name).await.map(TokioIo::new) }
                }))
                .await?;
            Ok(Connection { channel, authorization: None })
        })
    })
}

async fn dial(shared: &Shared, name: &str) -> io::Result<Io> {
    let entry = shared.clusters.load().get(name).cloned();
    let entry =
        entry.ok_or_else(|| io::Error::other(format!("cluster {name} does not exist or has no endpoints yet")))?;
    let host = entry.endpoints.load().hosts().next().cloned();
    let host = host.ok_or_else(|| io::Error::other(format!("cluster {name} has no endpoints")))?;
    let raw: Raw = tokio::time::timeout(
        entry.cluster.connect_timeout,
        socket::connect(&host.address, socket::ConnectOptions::default()),
    )
    .await??;
    match entry.client_tls(&host) {
        Some(tls) => tls.connect(raw, &shared.secrets, None, None).await.map(|(stream, _)| Io::Client(stream)),
        None => Ok(Io::Raw(raw)),
    }
}
