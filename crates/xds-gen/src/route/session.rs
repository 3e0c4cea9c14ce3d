//! Sessions that stick to an endpoint (istiod `MaybeBuildStatefulSessionFilterConfig`).

use envoy_api::Any;
use envoy_api::pb::envoy::extensions::filters::http::stateful_session::v3::{
    StatefulSession, StatefulSessionPerRoute, stateful_session_per_route,
};
use envoy_api::pb::envoy::extensions::http::stateful_session::{
    cookie::v3::CookieBasedSessionState, header::v3::HeaderBasedSessionState,
};
use envoy_api::pb::envoy::r#type::http::v3::Cookie;
use registry::Service;

use crate::context::Context;
use crate::proto::{any, extension};

/// How the sessions of a service are kept, if its labels ask for it; goes where the filter's settings for a route or
/// virtual host do.
pub(super) fn of_service(cx: &Context<'_>, service: &Service) -> Option<Any> {
    let session = stateful_session_per_route::Override::StatefulSession(filter(cx, service)?);
    Some(any(&StatefulSessionPerRoute { r#override: Some(session) }))
}

/// The same as settings of the filter itself.
pub(crate) fn filter(cx: &Context<'_>, service: &Service) -> Option<StatefulSession> {
    let settings = &cx.push.settings;
    if !settings.persistent_sessions {
        return None;
    }
    let session_state = if let Some(cookie) = service.session(&settings.session_label) {
        let (name, path) = cookie.split_once(':').unwrap_or((cookie, "/"));
        // Without a time to live: gone when the browser is closed.
        let cookie = Cookie { name: name.to_owned(), path: path.to_owned(), ..Cookie::default() };
        extension("envoy.http.stateful_session.cookie", any(&CookieBasedSessionState { cookie: Some(cookie) }))
    } else {
        let name = service.session(&settings.session_header_label)?.to_owned();
        extension("envoy.http.stateful_session.header", any(&HeaderBasedSessionState { name }))
    };
    Some(StatefulSession { session_state: Some(session_state), ..StatefulSession::default() })
}

/// Of the services that a route leads to the last one's, but the first of two in a row that both keep sessions: as
/// istiod goes over them.
pub(super) fn of_route<'a>(cx: &Context<'_>, services: impl Iterator<Item = Option<&'a Service>>) -> Option<Any> {
    let mut chosen = None;
    for service in services {
        let own = service.and_then(|service| of_service(cx, service));
        if own.is_some() && chosen.is_some() {
            break;
        }
        chosen = own;
    }
    chosen
}
