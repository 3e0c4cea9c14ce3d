//! What the agent needs of the proxy beside it, whichever it is.

use std::pin::Pin;

/// A boxed future, for a trait that is used as an object.
pub(crate) type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A running proxy.
pub(crate) trait DataPlane: Send + Sync + 'static {
    /// Whether it serves: first clusters and listeners are in use. An error says what it waits for.
    fn ready(&self) -> Later<'_, Result<(), String>>;

    /// Its metrics in Prometheus' text format.
    fn prometheus<'a>(&'a self, query: &'a str) -> Later<'a, Result<String, String>>;

    /// Starts draining: listeners tell their clients to go, new connections are still served for a while.
    fn drain(&self) -> Later<'_, ()>;

    /// Connections open from clients, not counting the agent's own; `None` if that cannot be known.
    fn active_connections(&self) -> Later<'_, Option<u64>>;

    /// Ends now, closing what is open.
    fn stop(&self) -> Later<'_, ()>;

    /// Resolves when the proxy has ended, or was told to on its own admin port.
    fn ended(&self) -> Later<'_, ()>;
}
