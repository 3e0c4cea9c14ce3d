use std::sync::Arc;
use std::time::Duration;

use mesh_types::ArcStr;

use crate::any::Typed;
use crate::collector::{GrpcService, HttpCollector};
use crate::format::Format;
use crate::matchers::canonical_name;
use crate::pb;
use crate::percent::Fraction;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::trace::Propagation;
use crate::{Options, fields};

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
    pub custom_tags: Box<[CustomTag]>,
    /// Spans for upstream requests.
    pub spawn_upstream_span: bool,
    /// The name of a request's span.
    pub operation: Option<Format>,
    /// The name of an upstream request's span.
    pub upstream_operation: Option<Format>,
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
        /// The collector.
        collector: Arc<HttpCollector>,
        /// 128-bit trace ids.
        long_ids: bool,
        /// Client and server share a span.
        shared_span: bool,
        /// A hop's span is its server's, whichever way it faces.
        split: bool,
        /// The headers, a form of B3.
        propagation: Propagation,
    },
    /// An OpenTelemetry collector.
    OpenTelemetry {
        /// The collector; without one, spans go nowhere.
        collector: Option<SpanService>,
        /// `service.name`.
        service: ArcStr,
        /// The environment's `OTEL_RESOURCE_ATTRIBUTES` say more of the service.
        detects_environment: bool,
    },
}

/// Who takes spans by OpenTelemetry's protocol.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum SpanService {
    /// As gRPC.
    Grpc(Arc<GrpcService>),
    /// As HTTP requests.
    Http(Arc<HttpCollector>),
}

/// A request to a Zipkin collector takes no longer (Envoy `tracing.zipkin.request_timeout`).
const ZIPKIN_TIMEOUT: Duration = Duration::from_secs(5);

/// A tag of spans.
#[derive(Clone, Debug)]
pub struct CustomTag {
    /// Its name.
    pub name: ArcStr,
    /// Its value.
    pub source: TagSource,
}

/// Tracing of one route: what it says in the place of the listener.
#[derive(Clone, Debug)]
pub struct RouteTracing {
    /// Of requests that ask for it.
    pub client: Fraction,
    /// Of all requests.
    pub random: Fraction,
    /// Of those at most.
    pub overall: Fraction,
    /// Tags of spans, instead of those of the listener with the same names.
    pub custom_tags: Box<[CustomTag]>,
    /// The name of a request's span.
    pub operation: Option<Format>,
    /// The name of an upstream request's span.
    pub upstream_operation: Option<Format>,
}

impl RouteTracing {
    /// `share`: reads a sampling with its runtime key.
    pub(crate) fn compile(
        tracing: &pb::route::Tracing,
        share: impl Fn(&Option<pb::kind::FractionalPercent>, &'static str) -> Compiled<Fraction>,
    ) -> Compiled<Self> {
        Ok(Self {
            client: share(&tracing.client_sampling, "tracing.client_enabled")?,
            random: share(&tracing.random_sampling, "tracing.random_sampling")?,
            overall: share(&tracing.overall_sampling, "tracing.global_enabled")?,
            custom_tags: CustomTag::compile_all(&tracing.custom_tags)?,
            operation: operation(&tracing.operation).at("operation")?,
            upstream_operation: operation(&tracing.upstream_operation).at("upstream_operation")?,
        })
    }
}

fn operation(format: &str) -> Compiled<Option<Format>> {
    Ok(if format.is_empty() { None } else { Some(Format::compile(format, true)?) })
}

/// Where a tag's value comes from; the last part is the value if there is none.
#[derive(Clone, Debug)]
pub enum TagSource {
    /// The configuration.
    Literal(ArcStr),
    /// A format.
    Format(Format),
    /// The environment.
    Environment(ArcStr, ArcStr),
    /// A request header.
    Header(ArcStr, ArcStr),
    /// Metadata: of what, namespace, path.
    Metadata { of: crate::format::MetadataSource, namespace: ArcStr, path: Vec<ArcStr>, default: ArcStr },
}

impl Tracing {
    pub(super) fn compile(tracing: &pb::hcm::http_connection_manager::Tracing, options: &Options) -> Compiled<Self> {
        let share = |percent: &Option<pb::kind::Percent>, key: &str| {
            percent.as_ref().map_or(Fraction::ALL, |p| Fraction::of_percent(p.value)).under(key, &options.runtime)
        };
        Ok(Self {
            client: share(&tracing.client_sampling, "tracing.client_enabled"),
            random: share(&tracing.random_sampling, "tracing.random_sampling"),
            overall: share(&tracing.overall_sampling, "tracing.global_enabled"),
            verbose: tracing.verbose,
            max_path_tag_length: fields::uint(tracing.max_path_tag_length.as_ref(), 256),
            custom_tags: CustomTag::compile_all(&tracing.custom_tags)?,
            operation: operation(&tracing.operation).at("operation")?,
            upstream_operation: operation(&tracing.upstream_operation).at("upstream_operation")?,
            spawn_upstream_span: fields::flag(tracing.spawn_upstream_span.as_ref(), false),
            no_context_propagation: tracing.no_context_propagation,
            provider: match &tracing.provider {
                Some(provider) => Some(TracingProvider::compile(provider).at("provider")?),
                None => options.tracing.clone(),
            }
            .map(TracingProvider::used)
            .transpose()?,
        })
    }
}

impl TracingProvider {
    /// What a connection manager asks of it.
    fn used(self) -> Compiled<Self> {
        match self {
            Self::OpenTelemetry { collector: None, .. } => {
                Err(Invalid::new("provider", "an OpenTelemetry tracer needs grpc_service or http_service"))
            }
            provider => Ok(provider),
        }
    }

    /// A cluster that must be there (Envoy `Config::Utility::checkCluster`).
    pub fn needed_cluster(&self) -> Option<&ArcStr> {
        match self {
            Self::Zipkin { collector, .. } => Some(&collector.cluster),
            Self::OpenTelemetry { .. } => None,
        }
    }

    /// How requests carry the context.
    pub fn propagation(&self) -> Propagation {
        match self {
            Self::Zipkin { propagation, .. } => *propagation,
            Self::OpenTelemetry { .. } => Propagation::W3c,
        }
    }

    pub(crate) fn compile(provider: &pb::trace::tracing::Http) -> Compiled<Self> {
        use pb::trace::tracing::http::ConfigType;
        let typed = Typed::open(provider.config_type.as_ref().map(|ConfigType::TypedConfig(any)| any))?;
        match typed.name.as_str() {
            "envoy.config.trace.v3.ZipkinConfig" => {
                let config: pb::trace::ZipkinConfig = typed.decode()?;
                use pb::trace::zipkin_config::{
                    CollectorEndpointVersion as Version, TraceContextOption as ContextOption,
                };
                let version: Version =
                    fields::enumeration("collector_endpoint_version", config.collector_endpoint_version)?;
                refuse!("collector_endpoint_version": version != Version::HttpJson);
                let collector = match &config.collector_service {
                    Some(service) => HttpCollector::compile(service).at("collector_service")?,
                    None => {
                        let cluster: ArcStr = fields::required("collector_cluster", &config.collector_cluster)?;
                        let host = match config.collector_hostname.as_str() {
                            "" => cluster.clone(),
                            host => host.into(),
                        };
                        let path = fields::required("collector_endpoint", &config.collector_endpoint)?;
                        Arc::new(HttpCollector { cluster, host, path, headers: Vec::new(), timeout: ZIPKIN_TIMEOUT })
                    }
                };
                Ok(Self::Zipkin {
                    collector,
                    long_ids: config.trace_id_128bit,
                    split: config.split_spans_for_request,
                    shared_span: fields::flag(config.shared_span_context.as_ref(), true),
                    propagation: match config.trace_context_option {
                        option if option == ContextOption::UseB3WithW3cPropagation as i32 => Propagation::B3AndW3c,
                        _ => Propagation::B3,
                    },
                })
            }
            "envoy.config.trace.v3.OpenTelemetryConfig" => {
                let config: pb::trace::OpenTelemetryConfig = typed.decode()?;
                refuse!("exporter": config.exporter.is_some());
                let collector = match (&config.grpc_service, &config.http_service) {
                    (Some(_), Some(_)) => {
                        return Err(Invalid::new("http_service", "cannot stand beside grpc_service"));
                    }
                    (Some(grpc), None) => Some(SpanService::Grpc(GrpcService::compile(grpc).at("grpc_service")?)),
                    (None, Some(http)) => Some(SpanService::Http(HttpCollector::compile(http).at("http_service")?)),
                    (None, None) => None,
                };
                let of_environment = |detector: &pb::core::TypedExtensionConfig| {
                    let url = detector.typed_config.as_ref().map(|any| any.type_url.as_str());
                    url.is_some_and(|url| url.ends_with(".EnvironmentResourceDetectorConfig"))
                };
                Ok(Self::OpenTelemetry {
                    collector,
                    service: match config.service_name.as_str() {
                        "" => "unknown_service:envoy",
                        name => name,
                    }
                    .into(),
                    detects_environment: config.resource_detectors.iter().any(of_environment),
                })
            }
            _ => Err(typed.unknown()),
        }
    }
}

impl CustomTag {
    fn compile_all(tags: &[pb::tracing_tag::CustomTag]) -> Compiled<Box<[Self]>> {
        tags.iter().enumerate().map(|(i, tag)| Self::compile(tag).at_index("custom_tags", i)).collect()
    }

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
            Some(Type::Value(value)) => TagSource::Format(Format::compile(value, true).at("value")?),
            None => return Err(Invalid::new("type", "is missing")),
        };
        Ok(Self { name: fields::required("tag", &tag.tag)?, source })
    }
}
