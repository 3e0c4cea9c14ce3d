//! Access logs: where records go, which are written, and how.

mod filter;

use std::sync::Arc;
use std::time::Duration;

use envoy_api::pb::opentelemetry::proto::common::v1 as otlp;
use mesh_types::ArcStr;

pub use filter::LogFilter;

use crate::any::Typed;
use crate::collector::GrpcService;
use crate::format::{Dialect, Format, FormatContext, FormatString};
use crate::pb;
use crate::random::Random;
use crate::rejected::{At, Compiled, Invalid};
use crate::{Options, fields};

/// One access log.
#[derive(Debug)]
pub struct AccessLog {
    /// Where records go.
    pub sink: LogSink,
    /// Which are written; `None`: all.
    pub filter: Option<LogFilter>,
    /// How they read; not used by the gRPC sinks.
    pub format: FormatString,
}

/// Where records go.
#[derive(Clone, Debug)]
pub enum LogSink {
    /// To a file.
    File(ArcStr),
    /// To standard output.
    Stdout,
    /// To standard error.
    Stderr,
    /// To an OpenTelemetry collector.
    Otlp(Arc<OtlpLog>),
    /// To Envoy's access log service.
    Als(Arc<AlsLog>),
}

/// Records for an OpenTelemetry collector.
#[derive(Debug)]
pub struct OtlpLog {
    /// The collector.
    pub service: Arc<GrpcService>,
    /// The log's name.
    pub name: ArcStr,
    /// The body of a record.
    pub body: Option<Format>,
    /// Attributes of a record.
    pub attributes: Vec<(ArcStr, Format)>,
    /// Attributes of the resource.
    pub resource: Vec<(ArcStr, ArcStr)>,
    /// Leave out `log_name`, `zone_name`, `cluster_name`, `node_name`.
    pub disable_builtin_labels: bool,
    /// Send at the latest after this.
    pub flush_interval: Duration,
    /// Send at the latest with this many bytes.
    pub buffer_bytes: u32,
}

/// Records for Envoy's access log service.
#[derive(Debug)]
pub struct AlsLog {
    /// The service.
    pub service: Arc<GrpcService>,
    /// The log's name.
    pub name: ArcStr,
    /// Records of requests rather than connections.
    pub http: bool,
    /// Filter state to log.
    pub filter_state: Vec<ArcStr>,
    /// Request headers to log.
    pub request_headers: Vec<ArcStr>,
    /// Response headers to log.
    pub response_headers: Vec<ArcStr>,
    /// Response trailers to log.
    pub response_trailers: Vec<ArcStr>,
    /// Send at the latest after this.
    pub flush_interval: Duration,
    /// Send at the latest with this many bytes.
    pub buffer_bytes: u32,
}

/// Envoy's format for logs that name none (`SubstitutionFormatUtils::DEFAULT_FORMAT`).
const DEFAULT_FORMAT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
    %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \
    \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

impl AccessLog {
    pub(crate) fn compile_all(logs: &[pb::accesslog::AccessLog], options: &Options) -> Compiled<Vec<Arc<Self>>> {
        let mut all = Vec::with_capacity(logs.len());
        for (i, log) in logs.iter().enumerate() {
            all.push(Arc::new(Self::compile(log, options).at_index("access_log", i)?));
        }
        Ok(all)
    }

    fn compile(log: &pb::accesslog::AccessLog, options: &Options) -> Compiled<Self> {
        use loggers::stream::v3::stderr_access_log::AccessLogFormat as ErrFormat;
        use loggers::stream::v3::stdout_access_log::AccessLogFormat as OutFormat;
        use pb::accesslog::access_log::ConfigType;
        use pb::ext::access_loggers as loggers;
        let filter = log.filter.as_ref().map(|f| LogFilter::compile(f, &options.runtime)).transpose().at("filter")?;
        let typed = Typed::open(log.config_type.as_ref().map(|ConfigType::TypedConfig(any)| any))?;
        let (sink, format) = match typed.name.as_str() {
            "envoy.extensions.access_loggers.file.v3.FileAccessLog" => file(&typed.decode()?)?,
            "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog" => {
                let config: loggers::stream::v3::StdoutAccessLog = typed.decode()?;
                (LogSink::Stdout, config.access_log_format.map(|OutFormat::LogFormat(f)| f))
            }
            "envoy.extensions.access_loggers.stream.v3.StderrAccessLog" => {
                let config: loggers::stream::v3::StderrAccessLog = typed.decode()?;
                (LogSink::Stderr, config.access_log_format.map(|ErrFormat::LogFormat(f)| f))
            }
            "envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig" => {
                (LogSink::Otlp(Arc::new(OtlpLog::compile(&typed.decode()?)?)), None)
            }
            "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig" => {
                let config: loggers::grpc::v3::HttpGrpcAccessLogConfig = typed.decode()?;
                let names = |names: &[String]| names.iter().map(|n| n.to_ascii_lowercase().into()).collect();
                let log = AlsLog {
                    request_headers: names(&config.additional_request_headers_to_log),
                    response_headers: names(&config.additional_response_headers_to_log),
                    response_trailers: names(&config.additional_response_trailers_to_log),
                    ..AlsLog::compile(config.common_config.as_ref(), true)?
                };
                (LogSink::Als(Arc::new(log)), None)
            }
            "envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig" => {
                let config: loggers::grpc::v3::TcpGrpcAccessLogConfig = typed.decode()?;
                (LogSink::Als(Arc::new(AlsLog::compile(config.common_config.as_ref(), false)?)), None)
            }
            _ => return Err(typed.unknown()),
        };
        let format = match format {
            Some(format) => FormatString::compile(&format).at("log_format")?,
            None => FormatString::Text(Format::compile(DEFAULT_FORMAT, false)?),
        };
        Ok(Self { sink, filter, format })
    }

    /// Whether a record is written for this stream.
    pub fn wants(&self, cx: &FormatContext<'_>, random: &mut Random) -> bool {
        self.filter.as_ref().is_none_or(|f| f.matches(cx, random))
    }

    /// Appends a record, unless the filter leaves it out (false).
    pub fn write(&self, cx: &FormatContext<'_>, random: &mut Random, out: &mut Vec<u8>) -> bool {
        let wanted = self.wants(cx, random);
        if wanted {
            self.format.write(cx, out);
        }
        wanted
    }
}

fn file(
    config: &pb::ext::access_loggers::file::v3::FileAccessLog,
) -> Compiled<(LogSink, Option<pb::core::SubstitutionFormatString>)> {
    use pb::core::substitution_format_string::Format as Kind;
    use pb::ext::access_loggers::file::v3::file_access_log::AccessLogFormat;
    let sink = match config.path.as_str() {
        "/dev/stdout" => LogSink::Stdout,
        "/dev/stderr" => LogSink::Stderr,
        "" => return Err(Invalid::new("path", "is empty")),
        path => LogSink::File(path.into()),
    };
    let of = |format: Kind| pb::core::SubstitutionFormatString { format: Some(format), ..Default::default() };
    let format = config.access_log_format.as_ref().map(|format| match format {
        AccessLogFormat::LogFormat(format) => format.clone(),
        AccessLogFormat::Format(text) => of(Kind::TextFormat(text.clone())),
        AccessLogFormat::JsonFormat(fields) | AccessLogFormat::TypedJsonFormat(fields) => {
            of(Kind::JsonFormat(fields.clone()))
        }
    });
    Ok((sink, format))
}

impl OtlpLog {
    fn compile(config: &pb::ext::access_loggers::open_telemetry::v3::OpenTelemetryAccessLogConfig) -> Compiled<Self> {
        if config.http_service.is_some() {
            return Err(Invalid::unsupported("http_service"));
        }
        let common = config.common_config.clone().unwrap_or_default();
        let service = config.grpc_service.as_ref().or(common.grpc_service.as_ref());
        let service = service.ok_or_else(|| Invalid::new("grpc_service", "is missing"))?;
        let name = if config.log_name.is_empty() { &common.log_name } else { &config.log_name };
        let dialect = Dialect::of(&config.formatters)?;
        let mut attributes = Vec::new();
        for pair in config.attributes.iter().flat_map(|a| &a.values) {
            let text =
                plain(pair.value.as_ref()).ok_or_else(|| Invalid::unsupported(format!("attributes.{}", pair.key)))?;
            attributes.push((pair.key.as_str().into(), Format::in_dialect(&text, false, dialect).at("attributes")?));
        }
        let resource = config.resource_attributes.iter().flat_map(|a| &a.values);
        let body = config.body.as_ref().and_then(|b| plain(Some(b)));
        if config.body.is_some() && body.is_none() {
            return Err(Invalid::new("body", "only string_value is supported"));
        }
        Ok(Self {
            service: GrpcService::compile(service).at("grpc_service")?,
            name: name.as_str().into(),
            body: body.map(|b| Format::in_dialect(&b, false, dialect)).transpose().at("body")?,
            attributes,
            resource: resource
                .filter_map(|pair| Some((pair.key.as_str().into(), plain(pair.value.as_ref())?.as_str().into())))
                .collect(),
            disable_builtin_labels: config.disable_builtin_labels,
            flush_interval: fields::positive(
                "buffer_flush_interval",
                config.buffer_flush_interval.as_ref().or(common.buffer_flush_interval.as_ref()),
                Duration::from_secs(1),
            )?,
            buffer_bytes: fields::uint(config.buffer_size_bytes.as_ref().or(common.buffer_size_bytes.as_ref()), 16_384),
        })
    }
}

fn plain(value: Option<&otlp::AnyValue>) -> Option<String> {
    match value?.value.as_ref()? {
        otlp::any_value::Value::StringValue(text) => Some(text.clone()),
        otlp::any_value::Value::IntValue(n) => Some(n.to_string()),
        otlp::any_value::Value::BoolValue(b) => Some(b.to_string()),
        _ => None,
    }
}

impl AlsLog {
    fn compile(
        config: Option<&pb::ext::access_loggers::grpc::v3::CommonGrpcAccessLogConfig>,
        http: bool,
    ) -> Compiled<Self> {
        let config = config.ok_or_else(|| Invalid::new("common_config", "is missing"))?;
        let service =
            config.grpc_service.as_ref().ok_or_else(|| Invalid::new("common_config.grpc_service", "is missing"))?;
        Ok(Self {
            service: GrpcService::compile(service).at("common_config.grpc_service")?,
            name: config.log_name.as_str().into(),
            http,
            filter_state: config.filter_state_objects_to_log.iter().map(|k| k.as_str().into()).collect(),
            request_headers: Vec::new(),
            response_headers: Vec::new(),
            response_trailers: Vec::new(),
            flush_interval: fields::positive(
                "common_config.buffer_flush_interval",
                config.buffer_flush_interval.as_ref(),
                Duration::from_secs(1),
            )?,
            buffer_bytes: fields::uint(config.buffer_size_bytes.as_ref(), 16_384),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream_info::{ConnectionInfo, ResponseFlags, StreamInfo};
    use serde_json::json;
    use std::time::UNIX_EPOCH;

    fn log(filter: serde_json::Value) -> AccessLog {
        let config = json!({"name": "l", "filter": filter, "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog", "path": "/dev/stdout",
            "log_format": {"text_format_source": {"inline_string": "%RESPONSE_CODE% %RESPONSE_FLAGS%\n"}}}});
        let bytes =
            envoy_api::json::from_json("type.googleapis.com/envoy.config.accesslog.v3.AccessLog", &config).unwrap();
        AccessLog::compile(&prost::Message::decode(bytes.as_slice()).unwrap(), &Options::default()).unwrap()
    }

    #[test]
    fn filters_choose_the_records() {
        let mut info = StreamInfo::new(Arc::new(ConnectionInfo::default()), UNIX_EPOCH);
        info.response_code = Some(503);
        info.flags = ResponseFlags::NO_ROUTE;
        let status =
            |op: &str| json!({"status_code_filter": {"comparison": {"op": op, "value": {"default_value": 500}}}});
        let flag = |flag: &str| json!({"response_flag_filter": {"flags": [flag]}});
        let cel = json!({"extension_filter": {"name": "cel", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter", "expression": "response.code >= 400"}}});
        for (filter, wanted) in [
            (status("GE"), true),
            (status("LE"), false),
            (flag("NR"), true),
            (flag("UH"), false),
            (cel.clone(), true),
            (json!({"and_filter": {"filters": [cel.clone(), flag("UH")]}}), false),
            (json!({"or_filter": {"filters": [cel, flag("UH")]}}), true),
        ] {
            let mut out = Vec::new();
            let written =
                log(filter.clone()).write(&FormatContext::new(&info, None, None), &mut Random::new(1), &mut out);
            assert_eq!(written, wanted, "{filter}");
            assert_eq!(out, if wanted { &b"503 NR\n"[..] } else { b"" });
        }
        assert!(matches!(log(flag("NR")).sink, LogSink::Stdout));
    }
}
