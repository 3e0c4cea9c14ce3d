use mesh_types::ArcStr;

use crate::any::Typed;
use crate::config_source::grpc_cluster;
use crate::fields;
use crate::matchers::canonical_name;
use crate::pb;
use crate::percent::Fraction;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::runtime::Runtime;

/// Which requests are traced, and what spans say.
#[derive(Clone, Debug)]
pub struct Tracing {
    /// Of requests that ask for it by `x-client-trace-id`.
    pub client: Fraction,
    /// Of all requests.
    pub random: Fraction,
    /// Of those at most.
    pub overall: Fraction,
    /// Spans hold events, too.
    pub verbose: bool,
    /// The path is cut off after this.
    pub max_path_tag_length: u32,
    /// Tags of spans.
    pub custom_tags: Vec<CustomTag>,
    /// Spans for upstream requests.
    pub spawn_upstream_span: bool,
    /// Trace headers are not passed on.
    pub no_context_propagation: bool,
    /// Where spans go; `None`: nowhere (or where the bootstrap says).
    pub provider: Option<TracingProvider>,
}

/// Where spans go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TracingProvider {
    /// A Zipkin collector.
    Zipkin {
        /// The cluster.
        cluster: ArcStr,
        /// The path.
        endpoint: ArcStr,
        /// The host to send; empty: the cluster's name.
        hostname: ArcStr,
        /// 128-bit trace ids.
        long_ids: bool,
        /// Client and server share a span.
        shared_span: bool,
    },
    /// An OpenTelemetry collector over gRPC.
    OpenTelemetry {
        /// The cluster.
        cluster: ArcStr,
        /// `service.name`.
        service: ArcStr,
    },
}

/// A tag of spans.
#[derive(Clone, Debug)]
pub struct CustomTag {
    /// Its name.
    pub name: ArcStr,
    /// Its value.
    pub source: TagSource,
}

/// Where a tag's value comes from; the last part is the value if there is none.
#[derive(Clone, Debug)]
pub enum TagSource {
    /// The configuration.
    Literal(ArcStr),
    /// The environment.
    Environment(ArcStr, ArcStr),
    /// A request header.
    Header(ArcStr, ArcStr),
    /// Metadata: of what, namespace, path.
    Metadata { of: crate::format::MetadataSource, namespace: ArcStr, path: Vec<ArcStr>, default: ArcStr },
}

impl Tracing {
    pub(super) fn compile(tracing: &pb::hcm::http_connection_manager::Tracing, runtime: &Runtime) -> Compiled<Self> {
        let share = |percent: &Option<pb::kind::Percent>, key: &str| {
            percent.as_ref().map_or(Fraction::ALL, |p| Fraction::of_percent(p.value)).under(key, runtime)
        };
        let mut custom_tags = Vec::with_capacity(tracing.custom_tags.len());
        for (i, tag) in tracing.custom_tags.iter().enumerate() {
            custom_tags.push(CustomTag::compile(tag).at_index("custom_tags", i)?);
        }
        Ok(Self {
            client: share(&tracing.client_sampling, "tracing.client_enabled"),
            random: share(&tracing.random_sampling, "tracing.random_sampling"),
            overall: share(&tracing.overall_sampling, "tracing.global_enabled"),
            verbose: tracing.verbose,
            max_path_tag_length: fields::uint(tracing.max_path_tag_length.as_ref(), 256),
            custom_tags,
            spawn_upstream_span: fields::flag(tracing.spawn_upstream_span.as_ref(), false),
            no_context_propagation: tracing.no_context_propagation,
            provider: tracing.provider.as_ref().map(TracingProvider::compile).transpose().at("provider")?,
        })
    }
}

impl TracingProvider {
    pub(crate) fn compile(provider: &pb::trace::tracing::Http) -> Compiled<Self> {
        use pb::trace::tracing::http::ConfigType;
        let typed = Typed::open(provider.config_type.as_ref().map(|ConfigType::TypedConfig(any)| any))?;
        match typed.name.as_str() {
            "envoy.config.trace.v3.ZipkinConfig" => {
                let config: pb::trace::ZipkinConfig = typed.decode()?;
                use pb::trace::zipkin_config::CollectorEndpointVersion as Version;
                let protobuf = config.collector_endpoint_version == Version::HttpProto as i32;
                refuse! {
                    "collector_endpoint_version": protobuf,
                    "collector_service": config.collector_service.is_some(),
                }
                Ok(Self::Zipkin {
                    cluster: fields::required("collector_cluster", &config.collector_cluster)?,
                    endpoint: fields::required("collector_endpoint", &config.collector_endpoint)?,
                    hostname: config.collector_hostname.as_str().into(),
                    long_ids: config.trace_id_128bit,
                    shared_span: fields::flag(config.shared_span_context.as_ref(), true),
                })
            }
            "envoy.config.trace.v3.OpenTelemetryConfig" => {
                let config: pb::trace::OpenTelemetryConfig = typed.decode()?;
                refuse!("exporter": config.exporter.is_some());
                let service = config.grpc_service.as_ref().ok_or_else(|| Invalid::new("grpc_service", "is missing"))?;
                Ok(Self::OpenTelemetry {
                    cluster: grpc_cluster(service).at("grpc_service")?,
                    service: config.service_name.as_str().into(),
                })
            }
            _ => Err(typed.unknown()),
        }
    }
}

impl CustomTag {
    fn compile(tag: &pb::tracing_tag::CustomTag) -> Compiled<Self> {
        use crate::format::MetadataSource as Of;
        use pb::metadata_key::metadata_key::path_segment::Segment;
        use pb::metadata_key::metadata_kind::Kind;
        use pb::tracing_tag::custom_tag::Type;
        let source = match &tag.r#type {
            Some(Type::Literal(literal)) => TagSource::Literal(literal.value.as_str().into()),
            Some(Type::Environment(env)) => {
                TagSource::Environment(env.name.as_str().into(), env.default_value.as_str().into())
            }
            Some(Type::RequestHeader(header)) => {
                TagSource::Header(canonical_name(&header.name).into(), header.default_value.as_str().into())
            }
            Some(Type::Metadata(metadata)) => {
                let key = metadata.metadata_key.clone().unwrap_or_default();
                let path = key.path.iter().map(|segment| match &segment.segment {
                    Some(Segment::Key(key)) => Ok(key.as_str().into()),
                    _ => Err(Invalid::unsupported("metadata.metadata_key.path")),
                });
                TagSource::Metadata {
                    of: match metadata.kind.as_ref().and_then(|k| k.kind.as_ref()) {
                        Some(Kind::Route(_)) => Of::Route,
                        Some(Kind::Cluster(_)) => Of::Cluster,
                        Some(Kind::Host(_)) => Of::UpstreamHost,
                        Some(Kind::Request(_)) | None => Of::Dynamic,
                    },
                    namespace: key.key.as_str().into(),
                    path: path.collect::<Compiled<_>>()?,
                    default: metadata.default_value.as_str().into(),
                }
            }
            _ => return Err(Invalid::unsupported("type")),
        };
        Ok(Self { name: fields::required("tag", &tag.tag)?, source })
    }
}
