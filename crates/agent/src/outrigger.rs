//! Our own proxy as the data plane, in this process: no relay, no files, the certificate passed by reference.

use std::sync::Arc;

use ads::client::{Connector, Handler, Subscriptions};
use envoy_api::type_url::{HEALTH, NAME_TABLE};
use identity::WorkloadCertificate;
use tokio::sync::watch;

use crate::bootstrap::bootstrap;
use crate::dataplane::{DataPlane, Later};
use crate::health::Said;
use crate::settings::Settings;

/// Starts the proxy. `names` takes the name table, which comes by the proxy's stream; `health` is said on it.
pub(crate) fn start(
    settings: &Settings,
    certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>,
    connector: Connector,
    names: Option<Box<dyn Handler>>,
    mut health: watch::Receiver<Said>,
) -> anyhow::Result<Arc<dyn DataPlane>> {
    let subscriptions = Subscriptions::new();
    let saying = subscriptions.clone();
    // Ends with the sender, which the agent's main task holds.
    tokio::spawn(async move {
        while health.changed().await.is_ok() {
            if let Some(problem) = health.borrow_and_update().clone() {
                saying.say(HEALTH, problem);
            }
        }
    });
    let options = proxy::Options {
        subscriptions,
        concurrency: settings.concurrency,
        certificates: Some(certificate),
        ads: Some(connector),
        extra: names.into_iter().map(|handler| (NAME_TABLE.to_owned(), handler)).collect(),
        drain_time: settings.drain.listeners,
        ..Default::default()
    };
    Ok(Arc::new(InProcess(proxy::start(bootstrap(settings), options)?)))
}

struct InProcess(proxy::Handle);

impl DataPlane for InProcess {
    fn ready(&self) -> Later<'_, Result<(), String>> {
        Box::pin(std::future::ready(self.0.ready()))
    }

    fn prometheus<'a>(&'a self, query: &'a str) -> Later<'a, Result<String, String>> {
        let used_only = query.split('&').any(|part| part == "usedonly" || part.starts_with("usedonly="));
        Box::pin(std::future::ready(Ok(self.0.stats_prometheus(used_only))))
    }

    fn drain(&self) -> Later<'_, ()> {
        self.0.drain();
        Box::pin(std::future::ready(()))
    }

    fn active_connections(&self) -> Later<'_, Option<u64>> {
        Box::pin(std::future::ready(Some(self.0.connections())))
    }

    fn stop(&self) -> Later<'_, ()> {
        self.0.shutdown();
        Box::pin(std::future::ready(()))
    }

    fn ended(&self) -> Later<'_, ()> {
        Box::pin(self.0.quit_requested())
    }
}
