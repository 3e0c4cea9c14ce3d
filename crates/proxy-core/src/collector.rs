//! Services that take spans and records of logs.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_types::ArcStr;

use crate::config_source::grpc_cluster;
use crate::fields;
use crate::format::{Format, FormatContext};
use crate::matchers::canonical_name;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::stream_info::{ConnectionInfo, StreamInfo};

/// A gRPC service behind a cluster (`config.core.v3.GrpcService`).
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct GrpcService {
    /// The cluster.
    pub cluster: ArcStr,
    /// The `:authority` to send.
    pub authority: ArcStr,
    /// More headers of each call.
    pub metadata: Vec<(ArcStr, ArcStr)>,
}

/// An HTTP service behind a cluster (`config.core.v3.HttpService`).
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct HttpCollector {
    /// The cluster.
    pub cluster: ArcStr,
    /// The host to send.
    pub host: ArcStr,
    /// The path.
    pub path: ArcStr,
    /// More headers of each request, see [`about_process`].
    pub headers: Vec<(ArcStr, ArcStr)>,
    /// An answer takes no longer than this.
    pub timeout: Duration,
}

impl GrpcService {
    pub(crate) fn compile(service: &pb::core::GrpcService) -> Compiled<Arc<Self>> {
        use pb::core::grpc_service::TargetSpecifier;
        let cluster = grpc_cluster(service)?;
        let authority = match &service.target_specifier {
            Some(TargetSpecifier::EnvoyGrpc(grpc)) if !grpc.authority.is_empty() => grpc.authority.as_str().into(),
            _ => cluster.clone(),
        };
        let mut metadata = Vec::with_capacity(service.initial_metadata.len());
        for header in &service.initial_metadata {
            refuse!("initial_metadata.raw_value": !header.raw_value.is_empty());
            metadata.push(field(header).at("initial_metadata")?);
        }
        Ok(Arc::new(Self { cluster, authority, metadata }))
    }
}

impl HttpCollector {
    pub(crate) fn compile(service: &pb::core::HttpService) -> Compiled<Arc<Self>> {
        use pb::core::http_uri::HttpUpstreamType;
        let uri = service.http_uri.as_ref().ok_or_else(|| Invalid::new("http_uri", "is missing"))?;
        let cluster = match &uri.http_upstream_type {
            Some(HttpUpstreamType::Cluster(cluster)) => fields::required("http_uri.cluster", cluster)?,
            None => return Err(Invalid::new("http_uri.cluster", "is missing")),
        };
        // Envoy `Http::Utility::extractHostPathFromUri`.
        let rest = uri.uri.split_once("://").map_or(uri.uri.as_str(), |(_, rest)| rest);
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if host.is_empty() {
            return Err(Invalid::new("http_uri.uri", format!("{:?} names no host", uri.uri)));
        }
        let mut headers = Vec::with_capacity(service.request_headers_to_add.len());
        for header in &service.request_headers_to_add {
            let header = header.header.as_ref().ok_or_else(|| Invalid::new("request_headers_to_add", "is empty"))?;
            Format::compile(&header.value, true).at("request_headers_to_add.value")?;
            headers.push(field(header).at("request_headers_to_add")?);
        }
        Ok(Arc::new(Self {
            cluster,
            host: host.into(),
            path: if path.is_empty() { "/" } else { path }.into(),
            headers,
            timeout: fields::duration("http_uri.timeout", uri.timeout.as_ref())?
                .ok_or_else(|| Invalid::new("http_uri.timeout", "is missing"))?,
        }))
    }
}

/// What headers of such services may say: commands about the process; others print nothing.
pub fn about_process(value: &str, environment: fn(&str) -> Option<String>) -> Vec<u8> {
    let connection = ConnectionInfo { environment, ..ConnectionInfo::default() };
    let info = StreamInfo::new(Arc::new(connection), SystemTime::UNIX_EPOCH);
    let mut out = Vec::new();
    // It was parsed when the configuration came.
    if let Ok(format) = Format::parse(value, true) {
        format.write(&FormatContext::new(&info, None, None), &mut out);
    }
    out
}

/// Name and value of a header.
fn field(header: &pb::core::HeaderValue) -> Compiled<(ArcStr, ArcStr)> {
    let name: ArcStr = fields::required("key", &header.key)?;
    Ok((canonical_name(&name).into(), header.value.as_str().into()))
}
