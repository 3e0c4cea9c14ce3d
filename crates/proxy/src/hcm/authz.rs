//! Filters that ask somebody: JWT (keys), external authorization.

use super::exchange::{Exchange, Stop};
use super::local_reply::LocalReply;
use crate::stream::RecvBody;
use proxy_core::filters::{ExtAuthz, JwtAuthn, PerFilter};
use std::sync::Arc;

pub(super) async fn jwt(_exchange: &mut Exchange, _jwt: &Arc<JwtAuthn>, _per: Option<&PerFilter>) -> Result<(), Stop> {
    Err(LocalReply::new(401, "Jwt verification fails", "jwt_authn_access_denied").into())
}

pub(super) async fn ext_authz(
    _exchange: &mut Exchange,
    _config: &Arc<ExtAuthz>,
    _per: Option<&PerFilter>,
    _body: &mut RecvBody,
) -> Result<(), Stop> {
    Err(LocalReply::new(403, "", "ext_authz_error").into())
}
