use std::sync::{Arc, LazyLock};
use std::time::Duration;

use crate::any::Typed;
use crate::matchers::{StringMatcher, canonical_name};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::{Options, fields};

/// HTTP version towards a cluster's hosts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, with prior knowledge without TLS.
    Http2,
    /// What the client speaks.
    UseDownstream,
    /// What ALPN says.
    Auto,
}

/// How header names are written in HTTP/1.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum HeaderCase {
    /// Lower case.
    #[default]
    Lower,
    /// First letter of each word in upper case.
    Proper,
    /// As they came, on the other side's connection, too.
    Preserve {
        /// Names that did not come are written as with [`HeaderCase::Proper`].
        proper_others: bool,
        /// The reason phrase of responses is passed on.
        reason: bool,
    },
}

/// HTTP/1 options, of a listener or a cluster.
#[derive(Clone, Debug, Default)]
pub struct Http1Options {
    /// Requests with a whole URL are taken (default).
    pub allow_absolute_url: Option<bool>,
    /// HTTP/1.0 is spoken.
    pub accept_http_10: bool,
    /// Host of HTTP/1.0 requests without one.
    pub default_host_for_http_10: Option<Box<str>>,
    /// How names are written.
    pub header_case: HeaderCase,
    /// Trailers are passed on.
    pub enable_trailers: bool,
    /// Messages with both lengths are taken, the length is dropped.
    pub allow_chunked_length: bool,
    /// Answer and keep the connection after a bad message.
    pub stream_error_on_invalid_message: Option<bool>,
    /// Requests carry the whole URL.
    pub send_fully_qualified_url: bool,
    /// Methods beyond the registered ones are taken.
    pub allow_custom_methods: bool,
    /// Upgrades that are offered in vain: requests go on without them.
    pub ignored_upgrades: Arc<[StringMatcher]>,
}

/// HTTP/2 options, of a listener or a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Http2Options {
    /// Streams at a time.
    pub max_concurrent_streams: u32,
    /// Bytes of one stream that may be under way.
    pub initial_stream_window: u32,
    /// Bytes of all streams.
    pub initial_connection_window: u32,
    /// Size of the table for header compression.
    pub hpack_table_size: u32,
    /// CONNECT with `:protocol` (RFC 8441).
    pub allow_connect: bool,
    /// A bad message ends the stream, not the connection.
    pub stream_error_on_invalid_message: bool,
    /// Frames waiting to be sent before the peer counts as hostile.
    pub max_outbound_frames: u32,
    /// The same for control frames.
    pub max_outbound_control_frames: u32,
    /// Empty frames in a row.
    pub max_consecutive_empty_frames: u32,
    /// PRIORITY frames a stream.
    pub max_priority_frames_per_stream: u32,
    /// WINDOW_UPDATE frames a DATA frame sent.
    pub max_window_updates_per_data_frame: u32,
    /// PING to keep connections.
    pub keepalive: Option<Keepalive>,
}

/// HTTP/2 PINGs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Keepalive {
    /// One every so often; `None`: only after idle time.
    pub interval: Option<Duration>,
    /// And up to so much of the interval later.
    pub jitter_percent: u32,
    /// Answer by then, or the connection is closed.
    pub timeout: Duration,
    /// And before a request on a connection that was idle for this long.
    pub idle_interval: Option<Duration>,
}

impl Default for Http2Options {
    fn default() -> Self {
        // Envoy 1.40's defaults.
        Self {
            max_concurrent_streams: 1024,
            initial_stream_window: 16 << 20,
            initial_connection_window: 24 << 20,
            hpack_table_size: 4096,
            allow_connect: false,
            stream_error_on_invalid_message: false,
            max_outbound_frames: 10_000,
            max_outbound_control_frames: 1000,
            max_consecutive_empty_frames: 1,
            max_priority_frames_per_stream: 100,
            max_window_updates_per_data_frame: 10,
            keepalive: None,
        }
    }
}

impl Http1Options {
    pub(crate) fn compile(options: Option<&pb::core::Http1ProtocolOptions>) -> Compiled<Self> {
        use pb::core::http1_protocol_options::header_key_format::HeaderFormat;
        let Some(options) = options else { return Ok(Self::default()) };
        let format = match &options.header_key_format {
            None => None,
            Some(format) if format.header_format.is_none() => {
                return Err(Invalid::new("header_key_format", "says no format"));
            }
            Some(format) => format.header_format.as_ref(),
        };
        let header_case = match format {
            None => HeaderCase::Lower,
            Some(HeaderFormat::ProperCaseWords(_)) => HeaderCase::Proper,
            Some(HeaderFormat::StatefulFormatter(extension)) => {
                let typed = Typed::open(extension.typed_config.as_ref()).at("header_key_format")?;
                match typed.name.as_str() {
                    "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig" => {
                        use pb::ext::http::header_formatters::preserve_case::v3::PreserveCaseFormatterConfig;
                        let config: PreserveCaseFormatterConfig = typed.decode().at("header_key_format")?;
                        HeaderCase::Preserve {
                            proper_others: config.formatter_type_on_envoy_headers == 1,
                            reason: config.forward_reason_phrase,
                        }
                    }
                    _ => return Err(typed.unknown()).at("header_key_format"),
                }
            }
        };
        Ok(Self {
            allow_absolute_url: options.allow_absolute_url.as_ref().map(|v| v.value),
            accept_http_10: options.accept_http_10,
            default_host_for_http_10: (!options.default_host_for_http_10.is_empty())
                .then(|| options.default_host_for_http_10.as_str().into()),
            header_case,
            enable_trailers: options.enable_trailers,
            allow_chunked_length: options.allow_chunked_length,
            stream_error_on_invalid_message: options
                .override_stream_error_on_invalid_http_message
                .as_ref()
                .map(|v| v.value),
            send_fully_qualified_url: options.send_fully_qualified_url,
            allow_custom_methods: options.allow_custom_methods,
            ignored_upgrades: StringMatcher::compile_list(&options.ignore_http_11_upgrade)
                .at("ignore_http_11_upgrade")?
                .into(),
        })
    }
}

impl Http2Options {
    /// The same object for all clusters that ask for nothing else than the defaults.
    pub(super) fn shared(self) -> Arc<Self> {
        static DEFAULT: LazyLock<Arc<Http2Options>> = LazyLock::new(Arc::default);
        if self == **DEFAULT { DEFAULT.clone() } else { Arc::new(self) }
    }

    pub(crate) fn compile(options: Option<&pb::core::Http2ProtocolOptions>) -> Compiled<Self> {
        let Some(options) = options else { return Ok(Self::default()) };
        refuse! {
            "allow_metadata": options.allow_metadata,
            "custom_settings_parameters": !options.custom_settings_parameters.is_empty(),
            "max_header_field_size_kb": options.max_header_field_size_kb.is_some(),
        }
        let default = Self::default();
        let window = |field: &str, value: Option<&pb::UInt32Value>, default: u32| match value.map(|v| v.value) {
            None => Ok(default),
            Some(size) if (65_535..=0x7fff_ffff).contains(&size) => Ok(size),
            Some(size) => Err(Invalid::new(field, format!("{size} is not between 65535 and 2147483647"))),
        };
        let keepalive = match &options.connection_keepalive {
            None => None,
            Some(keepalive) => Some(Keepalive {
                interval: fields::duration_or_off("interval", keepalive.interval.as_ref(), None)
                    .at("connection_keepalive")?,
                // Envoy's default; as a whole number.
                jitter_percent: keepalive.interval_jitter.as_ref().map_or(15, |p| p.value.clamp(0.0, 100.0) as u32),
                timeout: match &keepalive.timeout {
                    None => return Err(Invalid::new("timeout", "must be set")).at("connection_keepalive"),
                    given => fields::positive("timeout", given.as_ref(), Duration::ZERO).at("connection_keepalive")?,
                },
                idle_interval: fields::duration_or_off(
                    "connection_idle_interval",
                    keepalive.connection_idle_interval.as_ref(),
                    None,
                )
                .at("connection_keepalive")?,
            }),
        };
        let uint = |value: &Option<pb::UInt32Value>, default: u32| fields::uint(value.as_ref(), default);
        Ok(Self {
            max_concurrent_streams: uint(&options.max_concurrent_streams, default.max_concurrent_streams),
            initial_stream_window: window(
                "initial_stream_window_size",
                options.initial_stream_window_size.as_ref(),
                default.initial_stream_window,
            )?,
            initial_connection_window: window(
                "initial_connection_window_size",
                options.initial_connection_window_size.as_ref(),
                default.initial_connection_window,
            )?,
            hpack_table_size: uint(&options.hpack_table_size, default.hpack_table_size),
            allow_connect: options.allow_connect,
            stream_error_on_invalid_message: fields::flag(
                options.override_stream_error_on_invalid_http_message.as_ref(),
                options.stream_error_on_invalid_http_messaging,
            ),
            max_outbound_frames: uint(&options.max_outbound_frames, default.max_outbound_frames),
            max_outbound_control_frames: uint(
                &options.max_outbound_control_frames,
                default.max_outbound_control_frames,
            ),
            max_consecutive_empty_frames: uint(
                &options.max_consecutive_inbound_frames_with_empty_payload,
                default.max_consecutive_empty_frames,
            ),
            max_priority_frames_per_stream: uint(
                &options.max_inbound_priority_frames_per_stream,
                default.max_priority_frames_per_stream,
            ),
            max_window_updates_per_data_frame: uint(
                &options.max_inbound_window_update_frames_per_data_frame_sent,
                default.max_window_updates_per_data_frame,
            ),
            keepalive,
        })
    }
}

/// A cluster's HTTP settings, out of the extension or the deprecated fields.
pub(super) struct HttpOptions {
    pub(super) protocol: UpstreamProtocol,
    pub(super) http1: Http1Options,
    pub(super) http2: Http2Options,
    /// There are options about names in TLS.
    pub(super) names_in_tls: bool,
    pub(super) auto_sni: bool,
    pub(super) auto_sni_header: Option<Box<str>>,
    pub(super) auto_san_validation: bool,
    pub(super) idle_timeout: Option<Duration>,
    pub(super) max_connection_duration: Option<Duration>,
    pub(super) max_requests_per_connection: Option<u32>,
    pub(super) max_stream_duration: Option<Duration>,
    pub(super) max_response_headers: u32,
    pub(super) max_response_header_bytes: Option<u32>,
}

const EXTENSION: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

impl HttpOptions {
    pub(super) fn compile(cluster: &pb::cluster::Cluster, options: &Options) -> Compiled<Self> {
        for name in cluster.typed_extension_protocol_options.keys() {
            if name != EXTENSION && !options.allow_unsupported_filters {
                return Err(Invalid::unsupported(format!("typed_extension_protocol_options[{name:?}]")));
            }
        }
        match cluster.typed_extension_protocol_options.get(EXTENSION) {
            Some(any) => {
                let config: pb::ext::upstreams::http::v3::HttpProtocolOptions = Typed::open(Some(any))?.decode()?;
                Self::of_extension(&config, cluster).at_key("typed_extension_protocol_options", EXTENSION)
            }
            None => {
                let protocol = match (&cluster.http2_protocol_options, cluster.protocol_selection) {
                    (_, 1) => UpstreamProtocol::UseDownstream,
                    (Some(_), _) => UpstreamProtocol::Http2,
                    (None, _) => UpstreamProtocol::Http1,
                };
                Self::new(
                    protocol,
                    Http1Options::compile(cluster.http_protocol_options.as_ref()).at("http_protocol_options")?,
                    Http2Options::compile(cluster.http2_protocol_options.as_ref()).at("http2_protocol_options")?,
                    cluster.upstream_http_protocol_options.as_ref(),
                    cluster.common_http_protocol_options.as_ref(),
                    cluster,
                )
            }
        }
    }

    fn of_extension(
        config: &pb::ext::upstreams::http::v3::HttpProtocolOptions,
        cluster: &pb::cluster::Cluster,
    ) -> Compiled<Self> {
        use explicit_http_config::ProtocolConfig as Explicit;
        use pb::ext::upstreams::http::v3::http_protocol_options::{
            UpstreamProtocolOptions as Kind, explicit_http_config,
        };
        // The codec filter is what every request ends in anyway.
        let codec = "envoy.filters.http.upstream_codec";
        if let Some(other) = config.http_filters.iter().find(|f| f.name != codec) {
            return Err(Invalid::new("http_filters", format!("{} is not supported", other.name)));
        }
        refuse! {
            "hash_policy": !config.hash_policy.is_empty(),
            "header_validation_config": config.header_validation_config.is_some(),
            "outlier_detection": config.outlier_detection.is_some(),
            "request_mirror_policies": !config.request_mirror_policies.is_empty(),
            "retry_policy": config.retry_policy.is_some(),
        }
        let http3 = match &config.upstream_protocol_options {
            Some(Kind::UseDownstreamProtocolConfig(both)) => both.http3_protocol_options.is_some(),
            Some(Kind::AutoConfig(both)) => {
                both.http3_protocol_options.is_some() || both.alternate_protocols_cache_options.is_some()
            }
            _ => false,
        };
        refuse!("http3_protocol_options": http3);
        let none1 = || Ok(Http1Options::default());
        let none2 = || Ok(Http2Options::default());
        let (protocol, http1, http2) = match &config.upstream_protocol_options {
            Some(Kind::ExplicitHttpConfig(explicit)) => match &explicit.protocol_config {
                Some(Explicit::HttpProtocolOptions(one)) => {
                    (UpstreamProtocol::Http1, Http1Options::compile(Some(one)), none2())
                }
                Some(Explicit::Http2ProtocolOptions(two)) => {
                    (UpstreamProtocol::Http2, none1(), Http2Options::compile(Some(two)))
                }
                Some(Explicit::Http3ProtocolOptions(_)) => return Err(Invalid::unsupported("http3_protocol_options")),
                None => return Err(Invalid::new("explicit_http_config", "is empty")),
            },
            Some(Kind::UseDownstreamProtocolConfig(both)) => (
                UpstreamProtocol::UseDownstream,
                Http1Options::compile(both.http_protocol_options.as_ref()),
                Http2Options::compile(both.http2_protocol_options.as_ref()),
            ),
            Some(Kind::AutoConfig(both)) => (
                UpstreamProtocol::Auto,
                Http1Options::compile(both.http_protocol_options.as_ref()),
                Http2Options::compile(both.http2_protocol_options.as_ref()),
            ),
            None => return Err(Invalid::new("upstream_protocol_options", "is missing")),
        };
        Self::new(
            protocol,
            http1?,
            http2?,
            config.upstream_http_protocol_options.as_ref(),
            config.common_http_protocol_options.as_ref(),
            cluster,
        )
    }

    fn new(
        protocol: UpstreamProtocol,
        http1: Http1Options,
        http2: Http2Options,
        sni: Option<&pb::core::UpstreamHttpProtocolOptions>,
        common: Option<&pb::core::HttpProtocolOptions>,
        cluster: &pb::cluster::Cluster,
    ) -> Compiled<Self> {
        let common = common.cloned().unwrap_or_default();
        let per_connection = common.max_requests_per_connection.or(cluster.max_requests_per_connection);
        Ok(Self {
            protocol,
            http1,
            http2,
            names_in_tls: sni.is_some(),
            auto_sni: sni.is_some_and(|s| s.auto_sni),
            auto_sni_header: sni
                .map(|s| s.override_auto_sni_header.as_str())
                .filter(|name| !name.is_empty())
                .map(|name| canonical_name(name).into()),
            auto_san_validation: sni.is_some_and(|s| s.auto_san_validation),
            idle_timeout: fields::duration_or_off(
                "idle_timeout",
                common.idle_timeout.as_ref(),
                Some(Duration::from_secs(3600)),
            )?,
            max_connection_duration: fields::duration_or_off(
                "max_connection_duration",
                common.max_connection_duration.as_ref(),
                None,
            )?,
            max_requests_per_connection: per_connection.map(|v| v.value).filter(|n| *n > 0),
            max_stream_duration: fields::duration_or_off(
                "max_stream_duration",
                common.max_stream_duration.as_ref(),
                None,
            )?,
            max_response_headers: fields::uint(common.max_headers_count.as_ref(), 100),
            max_response_header_bytes: common.max_response_headers_kb.as_ref().map(|kb| kb.value.saturating_mul(1024)),
        })
    }
}
