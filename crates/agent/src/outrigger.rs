//! Our own proxy as the data plane, in this process.

use std::sync::Arc;

use ads::client::{Connector, Handler};
use identity::WorkloadCertificate;
use tokio::sync::watch;

use crate::bootstrap::bootstrap;
use crate::dataplane::DataPlane;
use crate::settings::Settings;

/// Starts the proxy. `names` takes the name table, which comes by the proxy's stream.
pub(crate) fn start(
    settings: &Settings,
    certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>,
    connector: Connector,
    names: Option<Box<dyn Handler>>,
) -> anyhow::Result<Arc<dyn DataPlane>> {
    let bootstrap = bootstrap(settings);
    let _ = (bootstrap, certificate, connector, names);
    anyhow::bail!("the proxy cannot be started in this process yet")
}
