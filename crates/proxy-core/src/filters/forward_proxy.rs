use std::sync::Arc;

use mesh_types::ArcStr;

use crate::cluster::NameCache;
use crate::headers::Headers;
use crate::matchers::canonical_name;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// A compiled `dynamic_forward_proxy.v3.FilterConfig`: resolves the request's host, for a cluster that makes hosts of names.
#[derive(Debug)]
pub struct ForwardProxy {
    /// What is known of the names.
    pub cache: Arc<NameCache>,
    /// Filter state may name another host and port.
    pub from_filter_state: bool,
}

/// A compiled `dynamic_forward_proxy.v3.PerRouteConfig`.
#[derive(Clone, Debug)]
pub enum HostRewrite {
    /// Nothing changes.
    Keep,
    /// This is the host.
    Literal(ArcStr),
    /// The host is the value of this header, if it is there.
    Header(ArcStr),
}

impl ForwardProxy {
    pub(super) fn compile(config: &pb::http_filter::dynamic_forward_proxy::v3::FilterConfig) -> Compiled<Self> {
        use pb::http_filter::dynamic_forward_proxy::v3::filter_config::ImplementationSpecifier as Kind;
        let Some(Kind::DnsCacheConfig(cache)) = &config.implementation_specifier else {
            return Err(Invalid::unsupported("sub_cluster_config"));
        };
        let cache = Arc::new(NameCache::compile(cache).at("dns_cache_config")?);
        Ok(Self { cache, from_filter_state: config.allow_dynamic_host_from_filter_state })
    }
}

impl HostRewrite {
    pub(super) fn compile(config: pb::http_filter::dynamic_forward_proxy::v3::PerRouteConfig) -> Self {
        use pb::http_filter::dynamic_forward_proxy::v3::per_route_config::HostRewriteSpecifier as Kind;
        match config.host_rewrite_specifier {
            Some(Kind::HostRewriteLiteral(host)) if !host.is_empty() => Self::Literal(host.into()),
            Some(Kind::HostRewriteHeader(name)) if !name.is_empty() => Self::Header(canonical_name(&name).into()),
            _ => Self::Keep,
        }
    }

    /// Changes the request's host.
    pub fn apply(&self, request: &mut Headers) {
        let host = match self {
            Self::Keep => None,
            Self::Literal(host) => Some(host.as_bytes().to_vec()),
            Self::Header(name) => request.get(name).map(<[u8]>::to_vec),
        };
        if let Some(host) = host {
            request.set(":authority", &host);
        }
    }
}
