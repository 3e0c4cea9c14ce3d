use crate::hcm::request::is_upgrade;
use crate::hcm::{HttpConnectionManager, ServerHeader};
use crate::headers::Headers;

/// Brings a response head into the form that clients get (Envoy `ConnectionManagerUtility::mutateResponseHeaders` and
/// `ConnectionManagerImpl::ActiveStream::encodeHeaders`): hop-by-hop headers, `server`, `via`, request id.
///
/// The connection headers of a response that accepts an upgrade stay. The date is the caller's part.
pub fn conform_response(config: &HttpConnectionManager, headers: &mut Headers, request: &Headers) {
    if is_upgrade(request) && is_upgrade(headers) {
        let unframed = !headers.contains("transfer-encoding") && !headers.contains("content-length");
        // 1xx responses must not have a length.
        if unframed && headers.status().is_none_or(|s| s >= 200) {
            headers.set("content-length", b"0");
        }
    } else {
        headers.remove("connection");
        headers.remove("upgrade");
    }
    headers.remove("transfer-encoding");
    headers.remove("keep-alive");
    headers.remove("proxy-connection");
    tell_request_id(config, headers, request);
    if let Some(via) = &config.via {
        headers.append("via", via.as_bytes(), ", ");
    }
    let set = match config.server_header {
        ServerHeader::Overwrite => true,
        ServerHeader::AppendIfAbsent => !headers.contains("server"),
        ServerHeader::PassThrough => false,
    };
    if set {
        headers.set("server", config.server_name.as_bytes());
    }
}

/// Tells the client the request's id, where it is to know it; in interim answers of upstreams, too.
pub fn tell_request_id(config: &HttpConnectionManager, headers: &mut Headers, request: &Headers) {
    if (config.always_set_request_id_in_response || request.contains("x-envoy-force-trace"))
        && let Some(id) = request.get("x-request-id")
    {
        headers.set("x-request-id", id);
    }
}
