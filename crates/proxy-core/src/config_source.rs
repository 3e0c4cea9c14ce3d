//! Who is asked for a resource: the aggregated stream, a gRPC server, or a file.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_types::ArcStr;

use crate::address::Address;
use crate::fields;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};

/// How long a first answer is waited for unless the configuration says (`ConfigSource.initial_fetch_timeout`).
const INITIAL_FETCH: Duration = Duration::from_secs(15);

/// Who is asked for a resource, and how long what needs it waits for the first answer.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ConfigSource {
    /// Who is asked.
    pub origin: Origin,
    /// Then things go on without the resource; `None`: never.
    pub initial_fetch_timeout: Option<Duration>,
}

/// Who is asked.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Origin {
    /// The aggregated stream.
    Ads,
    /// A gRPC server.
    Grpc(Arc<GrpcSource>),
    /// A file that holds a `DiscoveryResponse`.
    Path(ArcStr),
    /// Static resources of this process (no source given).
    Static,
}

/// A gRPC server for resources.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct GrpcSource {
    /// Incremental protocol.
    pub delta: bool,
    /// In the order in which they are tried.
    pub services: Vec<GrpcService>,
}

/// One way to a gRPC server.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct GrpcService {
    /// Where it is.
    pub target: GrpcTarget,
    /// The authority to send; empty: the cluster's name or the target's.
    pub authority: ArcStr,
    /// Headers of each stream.
    pub initial_metadata: Vec<(ArcStr, ArcStr)>,
}

/// Where a gRPC server is.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum GrpcTarget {
    /// A cluster's hosts (`envoy_grpc`).
    Cluster(ArcStr),
    /// An address, reached in plain text (`google_grpc`).
    Address(Address),
    /// A name and a port, likewise.
    Name(ArcStr, u16),
}

impl ConfigSource {
    pub(crate) fn compile(source: Option<&pb::core::ConfigSource>) -> Compiled<Self> {
        use pb::core::config_source::ConfigSourceSpecifier as Specifier;
        let Some(source) = source else { return Ok(Self { origin: Origin::Static, initial_fetch_timeout: None }) };
        refuse!("authorities": !source.authorities.is_empty());
        Ok(Self {
            origin: match &source.config_source_specifier {
                Some(Specifier::Ads(_) | Specifier::Self_(_)) => Origin::Ads,
                Some(Specifier::Path(path)) => Origin::Path(fields::required("path", path)?),
                Some(Specifier::PathConfigSource(path)) => {
                    Origin::Path(fields::required("path_config_source.path", &path.path)?)
                }
                Some(Specifier::ApiConfigSource(api)) => {
                    Origin::Grpc(Arc::new(GrpcSource::compile(api, false).at("api_config_source")?))
                }
                None => return Err(Invalid::new("config_source", "is empty")),
            },
            initial_fetch_timeout: fields::duration_or_off(
                "initial_fetch_timeout",
                source.initial_fetch_timeout.as_ref(),
                Some(INITIAL_FETCH),
            )?,
        })
    }
}

impl GrpcSource {
    /// `aggregated`: this is `ads_config`, whose type may also be one of the aggregated ones.
    pub(crate) fn compile(api: &pb::core::ApiConfigSource, aggregated: bool) -> Compiled<Self> {
        use pb::core::api_config_source::ApiType;
        let delta = match (ApiType::try_from(api.api_type), aggregated) {
            (Ok(ApiType::Grpc), _) | (Ok(ApiType::AggregatedGrpc), true) => false,
            (Ok(ApiType::DeltaGrpc), _) | (Ok(ApiType::AggregatedDeltaGrpc), true) => true,
            _ => return Err(Invalid::new("api_type", "only GRPC and DELTA_GRPC are supported")),
        };
        refuse!("config_validators": !api.config_validators.is_empty());
        if !api.cluster_names.is_empty() {
            return Err(Invalid::new("cluster_names", "is for REST only"));
        }
        if api.transport_api_version == pb::core::ApiVersion::V2 as i32 {
            return Err(Invalid::new("transport_api_version", "V2 is no longer supported"));
        }
        let services = api.grpc_services.iter().enumerate();
        let services: Vec<_> =
            services.map(|(i, s)| GrpcService::compile(s).at_index("grpc_services", i)).collect::<Compiled<_>>()?;
        if services.is_empty() {
            return Err(Invalid::new("grpc_services", "is empty"));
        }
        Ok(Self { delta, services })
    }
}

impl GrpcService {
    fn compile(service: &pb::core::GrpcService) -> Compiled<Self> {
        use pb::core::grpc_service::TargetSpecifier;
        let (target, authority) = match &service.target_specifier {
            Some(TargetSpecifier::EnvoyGrpc(grpc)) => {
                let name = fields::required("envoy_grpc.cluster_name", &grpc.cluster_name)?;
                (GrpcTarget::Cluster(name), grpc.authority.as_str())
            }
            Some(TargetSpecifier::GoogleGrpc(grpc)) => (GrpcTarget::google(grpc).at("google_grpc")?, ""),
            None => return Err(Invalid::new("target_specifier", "is missing")),
        };
        let mut initial_metadata = Vec::with_capacity(service.initial_metadata.len());
        for header in &service.initial_metadata {
            refuse!("initial_metadata.raw_value": !header.raw_value.is_empty());
            initial_metadata
                .push((fields::required("initial_metadata.key", &header.key)?, header.value.as_str().into()));
        }
        Ok(Self { target, authority: authority.into(), initial_metadata })
    }
}

impl GrpcTarget {
    /// The targets of gRPC's own names (`unix:`, `ipv4:`, `dns:` …) that Istio's agents and SDS servers are reached by.
    fn google(grpc: &pb::core::grpc_service::GoogleGrpc) -> Compiled<Self> {
        use pb::core::grpc_service::google_grpc::channel_credentials::CredentialSpecifier;
        let credentials = grpc.channel_credentials.as_ref().and_then(|c| c.credential_specifier.as_ref());
        refuse! {
            "channel_credentials": !matches!(credentials, None | Some(CredentialSpecifier::LocalCredentials(_))),
            "channel_credentials_plugin": !grpc.channel_credentials_plugin.is_empty(),
            "call_credentials": !grpc.call_credentials.is_empty(),
            "call_credentials_plugin": !grpc.call_credentials_plugin.is_empty(),
            "credentials_factory_name": !grpc.credentials_factory_name.is_empty(),
            "channel_args": grpc.channel_args.is_some(),
        }
        let uri = grpc.target_uri.as_str();
        let bad = || Invalid::new("target_uri", format!("{uri:?} is no unix:, ipv4:, ipv6:, dns: or host:port target"));
        if let Some(name) = uri.strip_prefix("unix-abstract:") {
            return Ok(Self::Address(Address::Pipe(format!("@{name}").into())));
        }
        if let Some(path) = uri.strip_prefix("unix:") {
            // `unix:relative/path`, `unix:/absolute` and `unix:///absolute`.
            let path = path.strip_prefix("//").filter(|rest| rest.starts_with('/')).unwrap_or(path);
            return match path {
                "" => Err(bad()),
                path => Ok(Self::Address(Address::Pipe(path.into()))),
            };
        }
        if let Some(literal) = uri.strip_prefix("ipv4:").or_else(|| uri.strip_prefix("ipv6:")) {
            return literal.parse::<SocketAddr>().map(|a| Self::Address(Address::Ip(a))).map_err(|_| bad());
        }
        let name = uri.strip_prefix("dns:").map_or(uri, |rest| rest.trim_start_matches('/'));
        if let Ok(address) = name.parse::<SocketAddr>() {
            return Ok(Self::Address(Address::Ip(address)));
        }
        let (host, port) = name.rsplit_once(':').ok_or_else(bad)?;
        match port.parse() {
            Ok(port) if !host.is_empty() && !host.contains([':', '/']) => Ok(Self::Name(host.into(), port)),
            _ => Err(bad()),
        }
    }
}

/// The cluster of an `envoy_grpc` service.
pub(crate) fn grpc_cluster(service: &pb::core::GrpcService) -> Compiled<ArcStr> {
    use pb::core::grpc_service::TargetSpecifier;
    match &service.target_specifier {
        Some(TargetSpecifier::EnvoyGrpc(grpc)) => fields::required("envoy_grpc.cluster_name", &grpc.cluster_name),
        Some(TargetSpecifier::GoogleGrpc(_)) => Err(Invalid::unsupported("google_grpc")),
        None => Err(Invalid::new("target_specifier", "is missing")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn compile(value: serde_json::Value) -> Result<ConfigSource, String> {
        let url = "type.googleapis.com/envoy.config.core.v3.ConfigSource";
        let bytes = envoy_api::json::from_json(url, &value).expect("a config source");
        let message = prost::Message::decode(&bytes[..]).expect("its own encoding");
        ConfigSource::compile(Some(&message)).map_err(|e| e.of("source", "").to_string())
    }

    fn google(uri: &str) -> Result<GrpcTarget, String> {
        let source = compile(json!({"api_config_source": {
            "api_type": "GRPC", "grpc_services": [{"google_grpc": {"target_uri": uri, "stat_prefix": "x"}}]}}))?;
        match source.origin {
            Origin::Grpc(grpc) => Ok(grpc.services[0].target.clone()),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn the_first_answer_is_awaited_for_fifteen_seconds_unless_told_otherwise() {
        let timeout = |value| compile(value).map(|s| s.initial_fetch_timeout);
        assert_eq!(timeout(json!({"ads": {}})), Ok(Some(Duration::from_secs(15))));
        assert_eq!(timeout(json!({"ads": {}, "initial_fetch_timeout": "0s"})), Ok(None));
        assert_eq!(timeout(json!({"ads": {}, "initial_fetch_timeout": "2s"})), Ok(Some(Duration::from_secs(2))));
    }

    #[test]
    fn google_grpc_targets() {
        let pipe = |path: &str| Ok(GrpcTarget::Address(Address::Pipe(path.into())));
        assert_eq!(google("unix:./var/socket"), pipe("./var/socket"));
        assert_eq!(google("unix:/var/socket"), pipe("/var/socket"));
        assert_eq!(google("unix:///var/socket"), pipe("/var/socket"));
        assert_eq!(google("unix-abstract:name"), pipe("@name"));
        assert_eq!(google("sds.example:8234"), Ok(GrpcTarget::Name("sds.example".into(), 8234)));
        assert_eq!(google("dns:///sds.example:8234"), Ok(GrpcTarget::Name("sds.example".into(), 8234)));
        let ip = Ok(GrpcTarget::Address(Address::Ip("10.0.0.1:80".parse().expect("an address"))));
        assert_eq!(google("ipv4:10.0.0.1:80"), ip);
        assert_eq!(google("10.0.0.1:80"), ip);
        assert!(google("xds:///x").expect_err("refused").contains("target_uri"));
    }

    #[test]
    fn what_cannot_be_asked_is_refused_by_name() {
        let api = |fields: serde_json::Value| compile(json!({ "api_config_source": fields })).expect_err("refused");
        let rest = api(json!({"api_type": "REST", "cluster_names": ["c"]}));
        assert_eq!(rest, "source : api_config_source.api_type: only GRPC and DELTA_GRPC are supported");
        let credentials = json!({"api_type": "GRPC", "grpc_services": [{"google_grpc": {
            "target_uri": "x:1", "stat_prefix": "x", "channel_credentials": {"ssl_credentials": {}}}}]});
        assert!(api(credentials).contains("grpc_services[0].google_grpc.channel_credentials: is not supported"));
    }
}
