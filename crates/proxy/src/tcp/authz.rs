//! `envoy.filters.network.ext_authz`: a service says whether a connection may go on.

use crate::downstream::Connection;
use crate::hcm::{check_head, connection_attributes, grpc_frame, is_allowed};
use crate::internal;
use proxy_core::filters::{AuthzService, ExtAuthz};

/// Asks; false: close. Envoy asks at the first byte, so a server that speaks first is only heard after that.
pub(crate) async fn check(connection: &Connection, config: &ExtAuthz) -> bool {
    let worker = &connection.worker;
    let stats = worker.named_stats();
    let count = |what: &str| stats.inc(&format!("ext_authz.{}.{what}", config.stat_prefix));
    count("total");
    let allowed = ask(connection, config).await;
    match allowed {
        Some(true) => count("ok"),
        Some(false) => count("denied"),
        None => count("error"),
    }
    let goes_on = allowed.unwrap_or(config.failure_mode_allow);
    if goes_on && allowed.is_none() {
        count("failure_mode_allowed");
    }
    if !goes_on {
        count("cx_closed");
    }
    goes_on
}

/// `None`: no answer.
async fn ask(connection: &Connection, config: &ExtAuthz) -> Option<bool> {
    let AuthzService::Grpc { service, timeout } = &config.service else { return None };
    let worker = &connection.worker;
    let mut headers = check_head(service, *timeout);
    internal::mark(worker, &mut headers, Some(*timeout));
    let request = grpc_frame(&connection_attributes(config, &connection.info));
    let (status, headers, body) = internal::ask(worker, &service.cluster, headers, request, *timeout, 1 << 20).await?;
    is_allowed(status, &headers, &body)
}
