//! Names: what the control plane's name table knows is answered here, everything else by the pod's own resolver, unchanged.
//!
//! ```text
//!  NDS name table ─► zone::Zone ─┐
//!  query ─► message::Query ──────┴─► answer, or upstream: bytes out, bytes back
//! ```

mod cache;
pub(crate) mod explain;
mod message;
mod server;
mod upstream;
mod zone;

use std::sync::Arc;

use ads::client::{Handler, Rejected, Update};
use arc_swap::ArcSwapOption;
use mesh_types::ArcStr;
use tracing::info;

pub(crate) use server::Server;
pub(crate) use upstream::ResolvConf;
pub(crate) use zone::{Naming, Zone};

/// The current zone, `None` until the first name table; written by [`TableHandler`] only.
pub(crate) type SharedTable = Arc<ArcSwapOption<Zone>>;

/// Turns name tables from the control plane into zones.
#[derive(Debug)]
pub(crate) struct TableHandler {
    naming: Naming,
    table: SharedTable,
}

impl TableHandler {
    /// A handler that fills `table`.
    pub(crate) fn new(naming: Naming, table: SharedTable) -> TableHandler {
        TableHandler { naming, table }
    }
}

impl Handler for TableHandler {
    fn update(&mut self, _type_url: &str, updated: Vec<Update>, _removed: Vec<ArcStr>) -> Result<(), Rejected> {
        // There is one table per proxy; a removal never comes, and would leave the last one in use.
        let Some(update) = updated.into_iter().next_back() else { return Ok(()) };
        let name = update.name;
        let zone = Zone::build(update.body, &self.naming).map_err(|e| Rejected(vec![(name, e.to_string())]))?;
        let first = self.table.load().is_none();
        if first {
            info!(names = zone.count(), "first name table");
        }
        self.table.store(Some(Arc::new(zone)));
        Ok(())
    }
}
