//! What proxies hold and how far changes got: istioctl's inspection commands, and waiting for distribution.
//!
//! In: config dumps (of Envoy or ours; from files or from pods of a running mesh) and the control plane's sync status.
//! Out: tables as istioctl's, JSON and YAML, and verdicts on whether a change is live. Never: decisions about traffic.

mod authz;
mod dump;
mod live;
mod proxy_config;
mod proxy_status;
mod table;
mod version;
mod wait;

pub use authz::{Args as AuthzArgs, run as authz};
pub use dump::Dump;
pub use live::{Target, ask_admin};
pub use proxy_config::{Args as ProxyConfigArgs, run as proxy_config};
pub use proxy_status::{Args as ProxyStatusArgs, run as proxy_status};
pub use version::{Args as VersionArgs, run as version};
pub use wait::{Args as WaitArgs, Progress, Sync, Verdict, Waiter, run as wait};
