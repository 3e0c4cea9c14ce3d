//! What is looked up about networks of the mesh: the file that names them, and addresses of gateways that have names.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use istio_api::MeshNetworks;
use mesh_types::ArcStr;
use registry::GatewayAddresses;
use tracing::{info, warn};

use crate::serve::Handle;
use crate::world::{Update, World};

/// Between two look-ups of a name (istiod's `MinGatewayTTL`).
///
/// DIFFERS: istiod asks DNS servers itself and heeds longer times to live; here the system's resolver is asked, which
/// also knows `/etc/hosts`.
const REFRESH: Duration = Duration::from_secs(30);
/// How often the file is looked at.
const INTERVAL: Duration = Duration::from_millis(500);

/// Keeps addresses of all gateways that have names, until dropped.
pub(crate) async fn follow(world: World) {
    let mut revisions = world.revisions();
    let (mut known, mut asked) = (GatewayAddresses::new(), BTreeSet::new());
    loop {
        let push = world.current().push.clone();
        let wanted = match push.settings.resolve_gateways {
            true => push.registry.networks().names(),
            false => BTreeSet::new(),
        };
        drop(push);
        let due = tokio::time::Instant::now() + REFRESH;
        if wanted != asked || !wanted.is_empty() {
            let mut found = GatewayAddresses::new();
            for name in &wanted {
                found.insert(name.clone(), addresses(name, known.remove(name)).await);
            }
            (known, asked) = (found, wanted);
            if known != *world.current().push.settings.gateway_addresses {
                info!(names = known.len(), "addresses of networks' gateways have changed");
                world.update(vec![Update::GatewayAddresses(known.clone())]).await;
            }
        }
        loop {
            tokio::select! {
                changed = revisions.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if world.current().push.registry.networks().names() != asked {
                        break;
                    }
                }
                () = tokio::time::sleep_until(due), if !asked.is_empty() => break,
            }
        }
    }
}

/// The addresses of a name; those it had while nobody knows.
async fn addresses(name: &ArcStr, before: Option<Vec<IpAddr>>) -> Vec<IpAddr> {
    match tokio::net::lookup_host((&**name, 0)).await {
        Ok(found) => found.map(|address| address.ip()).collect::<BTreeSet<_>>().into_iter().collect(),
        Err(error) => {
            let kept = before.as_ref().is_some_and(|list| !list.is_empty());
            warn!(name = &**name, kept, %error, "the address of a network's gateway is not known");
            before.unwrap_or_default()
        }
    }
}

/// MeshNetworks of a file; none where there is no such file.
pub(crate) fn read(path: &Path) -> anyhow::Result<Option<MeshNetworks>> {
    use anyhow::Context;
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(MeshNetworks::load(path, &text)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Follows the file for ever; one that cannot be read leaves the networks as they are.
pub(crate) async fn follow_file(path: PathBuf, handle: Handle) {
    let look = || std::fs::metadata(&path).and_then(|file| Ok((file.modified()?, file.len()))).ok();
    let mut seen = look();
    loop {
        tokio::time::sleep(INTERVAL).await;
        let now = look();
        if now == seen || now.is_none() {
            continue;
        }
        seen = now;
        match read(&path) {
            Ok(Some(networks)) => drop(handle.update(vec![Update::Networks(Arc::new(networks))]).await),
            Ok(None) => {}
            Err(error) => warn!("{error:#}; the mesh keeps its last networks"),
        }
    }
}
