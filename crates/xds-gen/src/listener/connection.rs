//! Limits of HTTP connections by ProxyConfig (istiod `applyConnectionSettingsToHCM`).

use envoy_api::core::{Http2ProtocolOptions, HttpProtocolOptions, http_protocol_options::HeadersWithUnderscoresAction};
use envoy_api::http::{HttpConnectionManager, http_connection_manager::PathWithEscapedSlashesAction};
use envoy_api::wkt::UInt32Value;
use istio_api::mesh_proxy::{
    ConnectionSettings, HeadersWithUnderscoresAction as Underscores, PathWithEscapedSlashesAction as EscapedSlashes,
};

use crate::context::Context;
use crate::proto::{duration, u32_value};

/// The proxy's own settings, else the mesh's. What they leave open keeps the value that it has. The profile `EDGE` is
/// for gateways.
pub(super) fn apply(cx: &Context<'_>, manager: &mut HttpConnectionManager) {
    let default = cx.push.mesh.default_config.as_ref();
    let own = cx.proxy_config.connection_settings.as_ref();
    let Some(settings) = own.or_else(|| default?.connection_settings.as_ref()) else { return };
    timeouts(settings, manager);
    http2(settings, manager);
    let underscores = match settings.http_headers_with_underscores_action {
        Underscores::HeadersWithUnderscoresUnspecified => None,
        Underscores::HeadersWithUnderscoresAllow => Some(HeadersWithUnderscoresAction::Allow),
        Underscores::HeadersWithUnderscoresRejectRequest => Some(HeadersWithUnderscoresAction::RejectRequest),
        Underscores::HeadersWithUnderscoresDropHeader => Some(HeadersWithUnderscoresAction::DropHeader),
    };
    if let Some(action) = underscores {
        let common: &mut HttpProtocolOptions = manager.common_http_protocol_options.get_or_insert_default();
        common.headers_with_underscores_action = action as i32;
    }
    if let Some(merge) = settings.http_merge_slashes {
        manager.merge_slashes = merge;
    }
    let slashes = match settings.http_path_with_escaped_slashes_action {
        EscapedSlashes::PathWithEscapedSlashesUnspecified => return,
        EscapedSlashes::KeepUnchanged => PathWithEscapedSlashesAction::KeepUnchanged,
        EscapedSlashes::RejectRequest => PathWithEscapedSlashesAction::RejectRequest,
        EscapedSlashes::UnescapeAndRedirect => PathWithEscapedSlashesAction::UnescapeAndRedirect,
        EscapedSlashes::UnescapeAndForward => PathWithEscapedSlashesAction::UnescapeAndForward,
    };
    manager.path_with_escaped_slashes_action = slashes as i32;
}

fn timeouts(settings: &ConnectionSettings, manager: &mut HttpConnectionManager) {
    let of_connection =
        [settings.http_idle_timeout, settings.http_max_connection_duration, settings.http_max_stream_duration];
    if of_connection.iter().any(Option::is_some) {
        let common: &mut HttpProtocolOptions = manager.common_http_protocol_options.get_or_insert_default();
        let [idle, connection, stream] = of_connection.map(|own| own.map(duration));
        common.idle_timeout = idle.or(common.idle_timeout);
        common.max_connection_duration = connection.or(common.max_connection_duration);
        common.max_stream_duration = stream.or(common.max_stream_duration);
    }
    if let Some(own) = settings.http_stream_idle_timeout {
        manager.stream_idle_timeout = Some(duration(own));
    }
    manager.request_timeout = settings.http_request_timeout.map(duration);
    manager.request_headers_timeout = settings.http_request_headers_timeout.map(duration);
    manager.drain_timeout = settings.http_drain_timeout.map(duration);
}

fn http2(settings: &ConnectionSettings, manager: &mut HttpConnectionManager) {
    let all = [
        settings.http_max_concurrent_streams,
        settings.http2_initial_stream_window_size,
        settings.http2_initial_connection_window_size,
    ];
    if all.iter().all(Option::is_none) {
        return;
    }
    let http2: &mut Http2ProtocolOptions = manager.http2_protocol_options.get_or_insert_default();
    // Negative numbers count as none.
    let limit = |own: Option<i32>| -> Option<UInt32Value> { u32_value(u32::try_from(own?).ok()?) };
    let [streams, stream_window, connection_window] = all.map(limit);
    http2.max_concurrent_streams = streams;
    http2.initial_stream_window_size = stream_window;
    http2.initial_connection_window_size = connection_window;
}
