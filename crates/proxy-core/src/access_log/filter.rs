use crate::any::Typed;
use crate::cel::{Expression, Options};
use crate::format::FormatContext;
use crate::hash::xx64;
use crate::matchers::{HeaderMatcher, MetadataMatcher};
use crate::pb;
use crate::percent::Fraction;
use crate::random::Random;
use crate::rejected::{At, Compiled, Invalid};
use crate::runtime::{Live, Runtime};
use crate::stream_info::ResponseFlags;

/// Which records are written (`config.accesslog.v3.AccessLogFilter`).
#[derive(Clone, Debug)]
pub enum LogFilter {
    /// By status.
    Status(Comparison, Live<u64>),
    /// By duration in milliseconds.
    Duration(Comparison, Live<u64>),
    /// No health checks.
    NotHealthCheck,
    /// Traced requests.
    Traced,
    /// A share; by the request id unless it shall be independent.
    Share { fraction: Fraction, independent: bool },
    /// All hold.
    And(Vec<LogFilter>),
    /// One holds.
    Or(Vec<LogFilter>),
    /// By a request header.
    Header(HeaderMatcher),
    /// One of these flags is set; empty: any flag.
    Flags(ResponseFlags),
    /// By gRPC status.
    GrpcStatus { statuses: Vec<u32>, exclude: bool },
    /// By dynamic metadata.
    Metadata { matcher: Option<Box<MetadataMatcher>>, if_missing: bool },
    /// By kind of record.
    Type { types: Vec<&'static str>, exclude: bool },
    /// By expression.
    Cel(Box<Expression>),
}

/// How a number is compared.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Comparison {
    /// Equal.
    Equal,
    /// At least.
    AtLeast,
    /// At most.
    AtMost,
    /// Not equal.
    NotEqual,
}

fn comparison(
    filter: Option<&pb::accesslog::ComparisonFilter>,
    runtime: &Runtime,
) -> Compiled<(Comparison, Live<u64>)> {
    let filter = filter.ok_or_else(|| Invalid::new("comparison", "is missing"))?;
    let how = match filter.op {
        0 => Comparison::Equal,
        1 => Comparison::AtLeast,
        2 => Comparison::AtMost,
        3 => Comparison::NotEqual,
        other => return Err(Invalid::new("comparison.op", format!("{other} is no known value"))),
    };
    let value = filter.value.as_ref().ok_or_else(|| Invalid::new("comparison.value", "is missing"))?;
    Ok((how, runtime.live(&value.runtime_key, value.default_value.into())))
}

impl Comparison {
    fn holds(self, a: u64, b: u64) -> bool {
        match self {
            Self::Equal => a == b,
            Self::AtLeast => a >= b,
            Self::AtMost => a <= b,
            Self::NotEqual => a != b,
        }
    }
}

impl LogFilter {
    pub(crate) fn compile(filter: &pb::accesslog::AccessLogFilter, runtime: &Runtime) -> Compiled<Self> {
        use pb::accesslog::access_log_filter::FilterSpecifier as Kind;
        let all = |filters: &[pb::accesslog::AccessLogFilter]| {
            filters
                .iter()
                .enumerate()
                .map(|(i, f)| Self::compile(f, runtime).at_index("filters", i))
                .collect::<Compiled<Vec<_>>>()
        };
        Ok(match filter.filter_specifier.as_ref().ok_or_else(|| Invalid::new("filter_specifier", "is missing"))? {
            Kind::StatusCodeFilter(f) => {
                let (how, value) = comparison(f.comparison.as_ref(), runtime).at("status_code_filter")?;
                Self::Status(how, value)
            }
            Kind::DurationFilter(f) => {
                let (how, value) = comparison(f.comparison.as_ref(), runtime).at("duration_filter")?;
                Self::Duration(how, value)
            }
            Kind::NotHealthCheckFilter(_) => Self::NotHealthCheck,
            Kind::TraceableFilter(_) => Self::Traced,
            Kind::RuntimeFilter(f) => Self::Share {
                fraction: Fraction::compile(f.percent_sampled.as_ref(), Fraction::NONE)
                    .at("runtime_filter")?
                    .under(&f.runtime_key, runtime),
                independent: f.use_independent_randomness,
            },
            Kind::AndFilter(f) => Self::And(all(&f.filters).at("and_filter")?),
            Kind::OrFilter(f) => Self::Or(all(&f.filters).at("or_filter")?),
            Kind::HeaderFilter(f) => {
                let header = f.header.as_ref().ok_or_else(|| Invalid::new("header_filter.header", "is missing"))?;
                Self::Header(HeaderMatcher::compile(header).at("header_filter.header")?)
            }
            Kind::ResponseFlagFilter(f) => {
                let mut flags = ResponseFlags::NONE;
                for flag in &f.flags {
                    let unknown = || Invalid::new("response_flag_filter.flags", format!("{flag:?} is no known flag"));
                    flags.insert(ResponseFlags::from_short(flag).ok_or_else(unknown)?);
                }
                Self::Flags(flags)
            }
            Kind::GrpcStatusFilter(f) => Self::GrpcStatus {
                statuses: f.statuses.iter().filter_map(|s| u32::try_from(*s).ok()).collect(),
                exclude: f.exclude,
            },
            Kind::MetadataFilter(f) => {
                // Envoy's filter looks at path and value only.
                let matcher = f
                    .matcher
                    .clone()
                    .map(|m| MetadataMatcher::compile(&pb::matcher::MetadataMatcher { invert: false, ..m }));
                let matcher = matcher.transpose();
                Self::Metadata {
                    matcher: matcher.at("metadata_filter.matcher")?.map(Box::new),
                    if_missing: f.match_if_key_not_found.as_ref().is_none_or(|v| v.value),
                }
            }
            Kind::LogTypeFilter(f) => Self::Type {
                types: f.types.iter().filter_map(|t| TYPES.get(usize::try_from(*t).ok()?).copied()).collect(),
                exclude: f.exclude,
            },
            Kind::ExtensionFilter(f) => {
                use pb::accesslog::extension_filter::ConfigType;
                let typed = Typed::open(f.config_type.as_ref().map(|ConfigType::TypedConfig(any)| any))
                    .at("extension_filter")?;
                if typed.name != "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter" {
                    return Err(typed.unknown()).at("extension_filter");
                }
                let config: pb::ext::access_loggers::filters::cel::v3::ExpressionFilter = typed.decode()?;
                let options = Options::of(config.cel_config.as_ref());
                Self::Cel(Box::new(Expression::with(&config.expression, options).at("extension_filter.expression")?))
            }
        })
    }

    /// Whether the record is written.
    pub fn matches(&self, cx: &FormatContext<'_>, random: &mut Random) -> bool {
        let info = cx.info;
        match self {
            Self::Status(how, value) => how.holds(info.response_code.unwrap_or(0).into(), value.get()),
            Self::Duration(how, value) => {
                let lasted = cx.lasted().unwrap_or_default();
                how.holds(lasted.as_millis() as u64, value.get())
            }
            Self::NotHealthCheck => !info.health_check,
            Self::Traced => info.traced,
            Self::Share { fraction, independent } => {
                let id = cx.request.and_then(|r| r.get("x-request-id")).filter(|_| !independent);
                match id {
                    // The same requests are logged by every proxy on the way.
                    Some(id) => fraction.holds_for(xx64(id, 0)),
                    None => fraction.hit(random),
                }
            }
            Self::And(filters) => filters.iter().all(|f| f.matches(cx, random)),
            Self::Or(filters) => filters.iter().any(|f| f.matches(cx, random)),
            Self::Header(header) => cx.request.is_some_and(|r| header.matches(r)),
            Self::Flags(flags) if flags.is_empty() => !info.flags.is_empty(),
            Self::Flags(flags) => info.flags.intersects(*flags),
            Self::GrpcStatus { statuses, exclude } => {
                let status = [cx.trailers, cx.response].into_iter().flatten().find_map(|h| h.get_str("grpc-status"));
                let code = match status {
                    Some(status) => status.parse().ok(),
                    None => info.response_code.map(crate::retry::grpc_status_of_http),
                };
                statuses.contains(&code.unwrap_or(2)) != *exclude
            }
            Self::Metadata { matcher, if_missing } => match matcher {
                Some(matcher) if matcher.find(&info.dynamic_metadata).is_some() => {
                    matcher.matches(&info.dynamic_metadata)
                }
                _ => *if_missing,
            },
            Self::Type { types, exclude } => types.contains(&cx.access_log_type) != *exclude,
            Self::Cel(expression) => expression.holds(cx),
        }
    }
}

/// `data.accesslog.v3.AccessLogType` by number, as `%ACCESS_LOG_TYPE%` prints them.
const TYPES: [&str; 12] = [
    "NotSet",
    "TcpUpstreamConnected",
    "TcpPeriodic",
    "TcpConnectionEnd",
    "DownstreamStart",
    "DownstreamPeriodic",
    "DownstreamEnd",
    "UpstreamPoolReady",
    "UpstreamPeriodic",
    "UpstreamEnd",
    "DownstreamTunnelSuccessfullyEstablished",
    "UdpTunnelUpstreamConnected",
];
