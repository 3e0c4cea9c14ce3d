//! Nothing that can be configured is ignored in silence: each field of each message that is understood changes what is
//! compiled, is refused, or stands in `fields/without_effect.txt` with the reason why it needs no effect here.

use std::collections::{BTreeMap, BTreeSet};

use envoy_api::{Any, Message};
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage, Value as Field};
use proxy_core::endpoints::Endpoints;
use proxy_core::{Bootstrap, Cluster, Listener, Options, RouteTable};
use serde_json::{Value, json};

use crate::reference::message;

const PREFIX: &str = "type.googleapis.com/";

/// Depth of nesting up to which fields are looked at; deeper ones are in messages that are met elsewhere, too.
const DEPTH: usize = 7;

/// What a message is compiled to, as text, or why it is refused.
type Compile = Box<dyn Fn(&[u8]) -> Result<String, String>>;

/// A message that is walked, and how it is compiled.
struct Root {
    type_name: &'static str,
    base: Value,
    compile: Compile,
}

/// What is compiled, without the hashes of the whole encoding, which any field changes.
fn shown(compiled: &impl std::fmt::Debug) -> String {
    let text = format!("{compiled:?}");
    let mut parts = text.split("hash: ");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out.push_str("hash: ");
        out.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    out
}

fn options() -> Options {
    Options::default()
}

fn decoded<M: Message + Default>(bytes: &[u8]) -> M {
    M::decode(bytes).expect("its own encoding")
}

fn listener(bytes: &[u8]) -> Result<String, String> {
    Listener::compile(&decoded(bytes), &options()).map(|l| shown(&l)).map_err(|e| e.to_string())
}

fn cluster(bytes: &[u8]) -> Result<String, String> {
    Cluster::compile(&decoded(bytes), &options()).map(|c| shown(&c)).map_err(|e| e.to_string())
}

fn routes(bytes: &[u8]) -> Result<String, String> {
    RouteTable::compile(&decoded(bytes), &options()).map(|t| shown(&t)).map_err(|e| e.to_string())
}

/// A place for a message inside another one: `put` gets the outer message in its JSON form, in which `"@here"` stands for it.
fn inside<M: Message + Default>(
    type_name: &'static str,
    outer: &str,
    outer_json: &Value,
    put: impl Fn(&mut M, Any) + 'static,
    compile: fn(&[u8]) -> Result<String, String>,
) -> Compile {
    let outer: Vec<u8> = message::<M>(outer_json, &format!("{PREFIX}{outer}")).encode_to_vec();
    Box::new(move |bytes| {
        let mut whole: M = decoded(&outer);
        put(&mut whole, Any { type_url: format!("{PREFIX}{type_name}"), value: bytes.to_vec() });
        compile(&whole.encode_to_vec())
    })
}

fn address() -> Value {
    json!({"socket_address": {"address": "127.0.0.1", "port_value": 80}})
}

fn tcp_proxy() -> Value {
    json!({"name": "tcp", "typed_config": {"@type": format!("{PREFIX}envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"),
        "stat_prefix": "t", "cluster": "c"}})
}

fn router() -> Value {
    json!({"name": "router", "typed_config": {"@type": format!("{PREFIX}envoy.extensions.filters.http.router.v3.Router")}})
}

fn base_listener() -> Value {
    json!({"name": "l", "address": address(), "filter_chains": [{"filters": [tcp_proxy()]}]})
}

fn base_cluster() -> Value {
    json!({"name": "c", "type": "STATIC"})
}

fn base_routes() -> Value {
    json!({"name": "r", "virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [
        {"match": {"prefix": "/"}, "route": {"cluster": "c"}}]}]})
}

fn base_hcm() -> Value {
    json!({"stat_prefix": "h", "route_config": base_routes(), "http_filters": [router()]})
}

const LISTENER: &str = "envoy.config.listener.v3.Listener";
const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const ROUTES: &str = "envoy.config.route.v3.RouteConfiguration";

/// A network filter, the last of its chain if `terminal`.
fn network_filter(type_name: &'static str, base: Value, terminal: bool) -> Root {
    let compile = inside::<envoy_api::listener::Listener>(
        type_name,
        LISTENER,
        &base_listener(),
        move |listener, any| {
            let filters = &mut listener.filter_chains[0].filters;
            let mut own = filters[0].clone();
            own.config_type = Some(envoy_api::listener::filter::ConfigType::TypedConfig(any));
            if terminal {
                *filters = vec![own];
            } else {
                filters.insert(0, own);
            }
        },
        listener,
    );
    Root { type_name, base, compile }
}

fn listener_filter(type_name: &'static str, base: Value) -> Root {
    let mut outer = base_listener();
    outer["listener_filters"] = json!([{"name": "f"}]);
    let put = |listener: &mut envoy_api::listener::Listener, any| {
        let kind = envoy_api::pb::envoy::config::listener::v3::listener_filter::ConfigType::TypedConfig(any);
        listener.listener_filters[0].config_type = Some(kind);
    };
    Root { type_name, base, compile: inside(type_name, LISTENER, &outer, put, listener) }
}

/// An HTTP filter of a listener's connection manager.
fn http_filter(type_name: &'static str, base: Value) -> Root {
    let outer = base_hcm();
    let compile = inside::<envoy_api::http::HttpConnectionManager>(
        type_name,
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        &outer,
        move |hcm, any| {
            let mut own = hcm.http_filters[0].clone();
            let router = any.type_url.ends_with("router.v3.Router");
            own.config_type = Some(envoy_api::http::http_filter::ConfigType::TypedConfig(any));
            if router {
                hcm.http_filters = vec![own];
            } else {
                own.name = "own".to_owned();
                hcm.http_filters.insert(0, own);
            }
        },
        hcm,
    );
    Root { type_name, base, compile }
}

fn hcm(bytes: &[u8]) -> Result<String, String> {
    let root = network_filter(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        Value::Null,
        true,
    );
    (root.compile)(bytes)
}

/// What a route says to a filter.
fn per_route(type_name: &'static str, base: Value) -> Root {
    let put = |table: &mut envoy_api::route::RouteConfiguration, any| {
        let route = &mut table.virtual_hosts[0].routes[0];
        route.typed_per_filter_config.insert("own".to_owned(), any);
    };
    Root { type_name, base, compile: inside(type_name, ROUTES, &base_routes(), put, routes) }
}

fn transport_of_listener(type_name: &'static str, base: Value) -> Root {
    let mut outer = base_listener();
    outer["filter_chains"][0]["transport_socket"] = json!({"name": "t"});
    let put = |listener: &mut envoy_api::listener::Listener, any| {
        let socket = listener.filter_chains[0].transport_socket.as_mut().expect("it is there");
        socket.config_type = Some(envoy_api::core::transport_socket::ConfigType::TypedConfig(any));
    };
    Root { type_name, base, compile: inside(type_name, LISTENER, &outer, put, listener) }
}

fn transport_of_cluster(type_name: &'static str, base: Value) -> Root {
    let mut outer = base_cluster();
    outer["transport_socket"] = json!({"name": "t"});
    let put = |cluster: &mut envoy_api::cluster::Cluster, any| {
        let socket = cluster.transport_socket.as_mut().expect("it is there");
        socket.config_type = Some(envoy_api::core::transport_socket::ConfigType::TypedConfig(any));
    };
    Root { type_name, base, compile: inside(type_name, CLUSTER, &outer, put, cluster) }
}

fn balancing(type_name: &'static str, base: Value) -> Root {
    let mut outer = base_cluster();
    outer["load_balancing_policy"] = json!({"policies": [{"typed_extension_config": {"name": "p"}}]});
    let put = |cluster: &mut envoy_api::cluster::Cluster, any| {
        let policy = cluster.load_balancing_policy.as_mut().expect("it is there");
        policy.policies[0].typed_extension_config.as_mut().expect("it is there").typed_config = Some(any);
    };
    Root { type_name, base, compile: inside(type_name, CLUSTER, &outer, put, cluster) }
}

/// A cluster type of its own; `fields` on top of the cluster.
fn cluster_type(type_name: &'static str, base: Value, fields: Value) -> Root {
    let mut outer = json!({"name": "c"});
    for (name, value) in fields.as_object().into_iter().flatten() {
        outer[name] = value.clone();
    }
    let put = move |cluster: &mut envoy_api::cluster::Cluster, any| {
        let kind = envoy_api::cluster::cluster::CustomClusterType { name: "t".into(), typed_config: Some(any) };
        cluster.cluster_discovery_type = Some(envoy_api::cluster::cluster::ClusterDiscoveryType::ClusterType(kind));
    };
    Root { type_name, base, compile: inside(type_name, CLUSTER, &outer, put, cluster) }
}

fn protocol_options(type_name: &'static str, base: Value) -> Root {
    let put = |cluster: &mut envoy_api::cluster::Cluster, any| {
        let name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned();
        cluster.typed_extension_protocol_options.insert(name, any);
    };
    Root { type_name, base, compile: inside(type_name, CLUSTER, &base_cluster(), put, cluster) }
}

fn access_log(type_name: &'static str, base: Value) -> Root {
    let mut outer = base_listener();
    outer["access_log"] = json!([{"name": "log"}]);
    let put = |listener: &mut envoy_api::listener::Listener, any| {
        let kind = envoy_api::pb::envoy::config::accesslog::v3::access_log::ConfigType::TypedConfig(any);
        listener.access_log[0].config_type = Some(kind);
    };
    Root { type_name, base, compile: inside(type_name, LISTENER, &outer, put, listener) }
}

fn tracer(type_name: &'static str, base: Value) -> Root {
    let mut outer = base_hcm();
    outer["tracing"] = json!({"provider": {"name": "p"}});
    let put = |hcm: &mut envoy_api::http::HttpConnectionManager, any| {
        let provider = hcm.tracing.as_mut().and_then(|t| t.provider.as_mut()).expect("it is there");
        provider.config_type =
            Some(envoy_api::pb::envoy::config::trace::v3::tracing::http::ConfigType::TypedConfig(any));
    };
    let outer_name = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    Root { type_name, base, compile: inside(type_name, outer_name, &outer, put, hcm) }
}

fn roots() -> Vec<Root> {
    let cluster_with = |fields: Value| {
        let mut base = base_cluster();
        for (name, value) in fields.as_object().into_iter().flatten() {
            base[name] = value.clone();
        }
        Root { type_name: CLUSTER, base, compile: Box::new(cluster) }
    };
    let plain = |type_name, base, compile: fn(&[u8]) -> Result<String, String>| Root {
        type_name,
        base,
        compile: Box::new(compile),
    };
    let assignment = |bytes: &[u8]| {
        let outer = json!({"name": "c", "type": "EDS", "eds_cluster_config": {"eds_config": {"ads": {}}}});
        let cluster: envoy_api::cluster::Cluster = message(&outer, &format!("{PREFIX}{CLUSTER}"));
        let cluster = Cluster::compile(&cluster, &options()).expect("a cluster");
        Endpoints::compile(&decoded(bytes), &cluster, None).map(|e| shown(&e)).map_err(|e| e.to_string())
    };
    let bootstrap =
        |bytes: &[u8]| Bootstrap::compile(&decoded(bytes), &options()).map(|b| shown(&b)).map_err(|e| e.to_string());
    let grpc = || json!({"envoy_grpc": {"cluster_name": "c"}});
    vec![
        plain("envoy.config.bootstrap.v3.Bootstrap", json!({"admin": {"address": address()}}), bootstrap),
        plain(LISTENER, base_listener(), listener),
        plain(CLUSTER, base_cluster(), cluster),
        cluster_with(json!({"lb_policy": "RING_HASH"})),
        cluster_with(json!({"lb_policy": "MAGLEV"})),
        cluster_with(json!({"lb_policy": "LEAST_REQUEST"})),
        cluster_with(json!({"lb_subset_config": {"subset_selectors": [{"keys": ["version"]}]}})),
        cluster_with(json!({"type": "EDS", "eds_cluster_config": {"eds_config": {"ads": {}}}})),
        cluster_with(json!({"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
            "original_dst_lb_config": {"use_http_header": true}})),
        cluster_with(json!({"type": "STRICT_DNS", "load_assignment": {"cluster_name": "c"}})),
        cluster_type(
            "envoy.extensions.clusters.dns.v3.DnsCluster",
            json!({}),
            json!({"load_assignment": {"cluster_name": "c"}}),
        ),
        cluster_type(
            "envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig",
            json!({"dns_cache_config": {"name": "d"}}),
            json!({"lb_policy": "CLUSTER_PROVIDED"}),
        ),
        plain(ROUTES, base_routes(), routes),
        plain("envoy.config.endpoint.v3.ClusterLoadAssignment", json!({"cluster_name": "c"}), assignment),
        network_filter(
            "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            base_hcm(),
            true,
        ),
        network_filter(
            "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            json!({"stat_prefix": "t", "cluster": "c"}),
            true,
        ),
        network_filter("envoy.extensions.filters.network.rbac.v3.RBAC", json!({"stat_prefix": "r"}), false),
        network_filter(
            "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit",
            json!({"stat_prefix": "l", "token_bucket": {"max_tokens": 3, "fill_interval": "1s"}}),
            false,
        ),
        network_filter(
            "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit",
            json!({"stat_prefix": "l", "max_connections": 1}),
            false,
        ),
        network_filter(
            "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz",
            json!({"stat_prefix": "l", "grpc_service": grpc()}),
            false,
        ),
        network_filter("envoy.extensions.filters.network.direct_response.v3.Config", json!({}), true),
        network_filter(
            "envoy.extensions.filters.network.sni_dynamic_forward_proxy.v3.FilterConfig",
            json!({"dns_cache_config": {"name": "d"}}),
            false,
        ),
        listener_filter("envoy.extensions.filters.listener.original_dst.v3.OriginalDst", json!({})),
        listener_filter("envoy.extensions.filters.listener.original_src.v3.OriginalSrc", json!({})),
        listener_filter("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector", json!({})),
        listener_filter("envoy.extensions.filters.listener.http_inspector.v3.HttpInspector", json!({})),
        listener_filter("envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol", json!({})),
        listener_filter(
            "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
            json!({"pass_through_tlvs": {"match_type": "INCLUDE"}}),
        ),
        http_filter("envoy.extensions.filters.http.router.v3.Router", json!({})),
        http_filter(
            "envoy.extensions.filters.http.fault.v3.HTTPFault",
            json!({"delay": {"fixed_delay": "1s"}, "abort": {"http_status": 503},
                "response_rate_limit": {"fixed_limit": {"limit_kbps": 5}}}),
        ),
        http_filter("envoy.extensions.filters.http.rbac.v3.RBAC", json!({})),
        http_filter("envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication", json!({})),
        http_filter("envoy.extensions.filters.http.ext_authz.v3.ExtAuthz", json!({"grpc_service": grpc()})),
        http_filter(
            "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
            json!({"stat_prefix": "l", "token_bucket": {"max_tokens": 3, "fill_interval": "1s"}}),
        ),
        http_filter("envoy.extensions.filters.http.buffer.v3.Buffer", json!({"max_request_bytes": 9})),
        http_filter("envoy.extensions.filters.http.grpc_stats.v3.FilterConfig", json!({"stats_for_all_methods": true})),
        http_filter("envoy.extensions.filters.http.header_mutation.v3.HeaderMutation", json!({})),
        http_filter(
            "envoy.extensions.filters.http.health_check.v3.HealthCheck",
            json!({"pass_through_mode": false, "headers": [{"name": ":path", "exact_match": "/x"}]}),
        ),
        per_route("envoy.extensions.filters.http.cors.v3.CorsPolicy", json!({})),
        per_route("envoy.extensions.filters.http.rbac.v3.RBACPerRoute", json!({})),
        per_route("envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute", json!({"check_settings": {}})),
        per_route("envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig", json!({"disabled": true})),
        transport_of_listener(
            "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            json!({"common_tls_context": {"tls_certificates": [
                {"certificate_chain": {"inline_string": "x"}, "private_key": {"inline_string": "y"}}]}}),
        ),
        transport_of_cluster("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", json!({})),
        transport_of_cluster(
            "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport",
            json!({"config": {}, "transport_socket": {"name": "raw", "typed_config": {
                "@type": format!("{PREFIX}envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer")}}}),
        ),
        balancing("envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin", json!({})),
        balancing("envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest", json!({})),
        balancing("envoy.extensions.load_balancing_policies.random.v3.Random", json!({})),
        balancing("envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash", json!({})),
        balancing("envoy.extensions.load_balancing_policies.maglev.v3.Maglev", json!({})),
        protocol_options(
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            json!({"explicit_http_config": {"http2_protocol_options": {}}}),
        ),
        access_log("envoy.extensions.access_loggers.file.v3.FileAccessLog", json!({"path": "/dev/null"})),
        access_log("envoy.extensions.access_loggers.stream.v3.StdoutAccessLog", json!({})),
        access_log(
            "envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig",
            json!({"grpc_service": grpc()}),
        ),
        access_log(
            "envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig",
            json!({"common_config": {"log_name": "l", "grpc_service": grpc(), "transport_api_version": "V3"}}),
        ),
        tracer(
            "envoy.config.trace.v3.ZipkinConfig",
            json!({"collector_cluster": "c", "collector_endpoint": "/x", "collector_endpoint_version": "HTTP_JSON"}),
        ),
        tracer("envoy.config.trace.v3.OpenTelemetryConfig", json!({"grpc_service": grpc()})),
    ]
}

/// A message that is accepted where an empty one is not.
fn seed(name: &str) -> Value {
    let matcher = json!({"exact": "x"});
    match name {
        "envoy.config.core.v3.Address" => address(),
        "envoy.config.core.v3.SocketAddress" => address()["socket_address"].clone(),
        "envoy.config.core.v3.ConfigSource" => json!({"ads": {}}),
        "envoy.config.core.v3.GrpcService" => json!({"envoy_grpc": {"cluster_name": "c"}}),
        "envoy.config.core.v3.ApiConfigSource" => {
            json!({"api_type": "GRPC", "grpc_services": [{"envoy_grpc": {"cluster_name": "c"}}]})
        }
        "envoy.config.core.v3.DataSource" => json!({"inline_string": "z"}),
        "envoy.config.core.v3.DnsResolutionConfig" => json!({"resolvers": [address()]}),
        "envoy.config.listener.v3.Listener.ConnectionBalanceConfig" => json!({"exact_balance": {}}),
        "envoy.config.overload.v3.OverloadManager" => json!({"resource_monitors": [{"name": "x", "typed_config": {
            "@type": format!("{PREFIX}envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig"),
            "max_heap_size_bytes": "1000"}}]}),
        "envoy.config.overload.v3.BufferFactoryConfig" => json!({"minimum_account_to_track_power_of_two": 21}),
        "envoy.config.overload.v3.Trigger" => json!({"name": "x", "threshold": {"value": 0.4}}),
        "envoy.type.metadata.v3.MetadataKind" => json!({"request": {}}),
        "envoy.config.overload.v3.LoadShedPoint" => {
            json!({"name": "x", "triggers": [{"name": "x", "threshold": {"value": 0.5}}]})
        }
        "envoy.config.core.v3.TlvEntry" => json!({"type": 3, "value": "eHh4eA=="}),
        "envoy.config.core.v3.CidrRange" => json!({"address_prefix": "10.0.0.0", "prefix_len": 8}),
        "envoy.config.core.v3.HeaderValueOption" => json!({"header": {"key": "x", "value": "y"}}),
        "envoy.config.core.v3.HeaderValue" => json!({"key": "x", "value": "y"}),
        "envoy.config.core.v3.HealthCheck" => json!({"timeout": "1s", "interval": "1s", "unhealthy_threshold": 3,
            "healthy_threshold": 4, "http_health_check": {"path": "/"}}),
        "envoy.config.core.v3.SubstitutionFormatString" => json!({"text_format_source": {"inline_string": "x"}}),
        "envoy.type.matcher.v3.StringMatcher" => matcher,
        "envoy.type.matcher.v3.RegexMatcher" => json!({"regex": "x"}),
        "envoy.type.matcher.v3.MetadataMatcher" => {
            json!({"filter": "f", "path": [{"key": "k"}], "value": {"bool_match": true}})
        }
        "envoy.config.route.v3.HeaderMatcher" => json!({"name": "x", "present_match": true}),
        "envoy.config.route.v3.QueryParameterMatcher" => json!({"name": "x", "present_match": true}),
        "envoy.config.route.v3.RouteMatch" => json!({"prefix": "/"}),
        "envoy.config.route.v3.Route" => json!({"match": {"prefix": "/a"}, "route": {"cluster": "c"}}),
        "envoy.config.route.v3.RouteAction" => json!({"cluster": "c"}),
        "envoy.config.route.v3.VirtualHost" => json!({"name": "w", "domains": ["w"]}),
        "envoy.config.route.v3.WeightedCluster" => json!({"clusters": [{"name": "c", "weight": 1}]}),
        "envoy.config.route.v3.WeightedCluster.ClusterWeight" => json!({"name": "c", "weight": 1}),
        "envoy.config.route.v3.RateLimit" => json!({"actions": [{"source_cluster": {}}]}),
        "envoy.config.route.v3.DirectResponseAction" => json!({"status": 200}),
        "envoy.config.route.v3.RouteAction.RequestMirrorPolicy" => json!({"cluster": "m"}),
        "envoy.config.route.v3.RouteAction.HashPolicy" => json!({"header": {"header_name": "x"}}),
        "envoy.config.route.v3.RetryPolicy" => json!({"retry_on": "5xx"}),
        "envoy.config.route.v3.RetryPolicy.RetryBackOff" => json!({"base_interval": "1s"}),
        "envoy.config.listener.v3.FilterChain" => json!({"filters": [tcp_proxy()]}),
        "envoy.config.listener.v3.Filter" => tcp_proxy(),
        "envoy.config.rbac.v3.RBAC" => json!({"action": "ALLOW", "policies": {"p": {
            "permissions": [{"any": true}], "principals": [{"any": true}]}}}),
        "envoy.config.rbac.v3.Policy" => json!({"permissions": [{"any": true}], "principals": [{"any": true}]}),
        "envoy.config.rbac.v3.Permission" | "envoy.config.rbac.v3.Principal" => json!({"any": true}),
        "envoy.config.endpoint.v3.LbEndpoint" => json!({"endpoint": {"address": address()}}),
        "envoy.config.endpoint.v3.Endpoint" => json!({"address": address()}),
        "envoy.config.endpoint.v3.LocalityLbEndpoints" => {
            json!({"lb_endpoints": [{"endpoint": {"address": address()}}]})
        }
        "envoy.extensions.transport_sockets.tls.v3.SdsSecretConfig" => json!({"name": "s", "sds_config": {"ads": {}}}),
        "envoy.extensions.transport_sockets.tls.v3.TlsCertificate" => {
            json!({"certificate_chain": {"inline_string": "x"}, "private_key": {"inline_string": "y"}})
        }
        "envoy.extensions.transport_sockets.tls.v3.SubjectAltNameMatcher" => {
            json!({"san_type": "DNS", "matcher": {"exact": "w"}})
        }
        "envoy.type.v3.TokenBucket" => json!({"max_tokens": 3, "fill_interval": "1s"}),
        "envoy.config.core.v3.Metadata" => json!({"filter_metadata": {"envoy.lb": {"a": "b"}}}),
        "envoy.config.core.v3.RuntimeFractionalPercent" => json!({"default_value": {"numerator": 7}}),
        "envoy.config.core.v3.RuntimeFeatureFlag" => json!({"default_value": false, "runtime_key": "x"}),
        "envoy.config.core.v3.RuntimeDouble" => json!({"default_value": 0.3, "runtime_key": "x"}),
        "envoy.config.cluster.v3.Cluster.SlowStartConfig"
        | "envoy.extensions.load_balancing_policies.common.v3.SlowStartConfig" => json!({"slow_start_window": "1s"}),
        "envoy.config.core.v3.ProxyProtocolConfig" => json!({}),
        "envoy.config.core.v3.TransportSocket" => json!({"name": "raw", "typed_config": {
            "@type": format!("{PREFIX}envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer")}}),
        "envoy.config.listener.v3.UdpListenerConfig" => json!({}),
        "envoy.type.matcher.v3.ListStringMatcher" => json!({"patterns": [{"exact": "x"}]}),
        "envoy.type.tracing.v3.CustomTag" => json!({"tag": "t", "literal": {"value": "x"}}),
        "opentelemetry.proto.common.v1.KeyValueList" => {
            json!({"values": [{"key": "k", "value": {"string_value": "v"}}]})
        }
        "opentelemetry.proto.common.v1.AnyValue" => json!({"string_value": "v"}),
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.AutoHttpConfig"
        | "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.UseDownstreamHttpConfig" => {
            json!({"http2_protocol_options": {"max_concurrent_streams": 3}})
        }
        "envoy.config.core.v3.Http1ProtocolOptions" => json!({"accept_http_10": true}),
        "envoy.config.cluster.v3.CircuitBreakers.Thresholds" => json!({"max_connections": 3}),
        "envoy.config.route.v3.HedgePolicy" => json!({"hedge_on_per_try_timeout": true}),
        "envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext" => {
            json!({"trusted_ca": {"inline_string": "x"}})
        }
        "envoy.type.v3.Percent" => json!({"value": 7}),
        "envoy.type.v3.FractionalPercent" => json!({"numerator": 7}),
        "google.protobuf.Duration" => json!("7.003s"),
        "google.protobuf.Struct" => json!({"a": {"b": "c"}}),
        "google.protobuf.Value" => json!("x"),
        "google.protobuf.Any" => json!({"@type": format!("{PREFIX}google.protobuf.StringValue"), "value": "x"}),
        "google.protobuf.StringValue" | "google.protobuf.BytesValue" => json!("eHh4eA=="),
        "google.protobuf.BoolValue" => json!(true),
        "google.protobuf.UInt32Value" | "google.protobuf.DoubleValue" => json!(7),
        "google.protobuf.UInt64Value" | "google.protobuf.Int64Value" => json!("7"),
        "google.protobuf.Timestamp" => json!("2024-01-01T00:00:00Z"),
        _ => json!({}),
    }
}

fn seeded(descriptor: &MessageDescriptor) -> DynamicMessage {
    DynamicMessage::deserialize(descriptor.clone(), seed(descriptor.full_name())).expect("a seed fits its type")
}

/// Values that are none of the defaults.
fn candidates(kind: &Kind) -> Vec<Field> {
    match kind {
        Kind::Bool => vec![Field::Bool(true), Field::Bool(false)],
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => vec![Field::I32(1), Field::I32(77)],
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => vec![Field::I64(1), Field::I64(77)],
        Kind::Uint32 | Kind::Fixed32 => vec![Field::U32(1), Field::U32(20), Field::U32(77), Field::U32(100_000)],
        Kind::Uint64 | Kind::Fixed64 => vec![Field::U64(1), Field::U64(77)],
        Kind::Float => vec![Field::F32(0.3)],
        Kind::Double => vec![Field::F64(0.7)],
        Kind::String => ["x", "/x", "10.1.2.3", "%PROTOCOL%"].map(|s| Field::String(s.to_owned())).into(),
        Kind::Bytes => vec![Field::Bytes(bytes_of(b"longer than others"))],
        Kind::Enum(of) => {
            let numbers: BTreeSet<i32> = of.values().map(|v| v.number()).collect();
            numbers.into_iter().rev().map(Field::EnumNumber).collect()
        }
        Kind::Message(of) => match of.full_name() {
            // Both: the default of a flag may be either.
            "google.protobuf.BoolValue" => ["true", "false"].map(|text| json_field(of, text)).into(),
            "envoy.config.core.v3.RuntimeFractionalPercent" => {
                [7, 0].map(|n| json_field(of, &json!({"default_value": {"numerator": n}}).to_string())).into()
            }
            "google.protobuf.UInt32Value" => ["7", "0", "100000"].map(|text| json_field(of, text)).into(),
            "google.protobuf.Duration" => ["\"7.003s\"", "\"0s\""].map(|text| json_field(of, text)).into(),
            _ => vec![Field::Message(seeded(of)), Field::Message(DynamicMessage::new(of.clone()))],
        },
    }
}

fn bytes_of(bytes: &'static [u8]) -> bytes::Bytes {
    bytes::Bytes::from_static(bytes)
}

fn json_field(of: &MessageDescriptor, text: &str) -> Field {
    let value: Value = serde_json::from_str(text).expect("JSON");
    Field::Message(DynamicMessage::deserialize(of.clone(), value).expect("it fits"))
}

/// The field's whole value around one item.
fn whole(field: &FieldDescriptor, item: Field, before: &Field) -> Field {
    if field.is_map() {
        let mut map = before.as_map().cloned().unwrap_or_default();
        map.insert(MapKey::String("own".to_owned()), item);
        return Field::Map(map);
    }
    if field.is_list() {
        let mut list = before.as_list().unwrap_or_default().to_vec();
        list.push(item);
        return Field::List(list);
    }
    item
}

/// The kind of one item; `None` for maps by something else than names.
fn item_kind(field: &FieldDescriptor) -> Option<Kind> {
    if !field.is_map() {
        return Some(field.kind());
    }
    let Kind::Message(entry) = field.kind() else { return None };
    matches!(entry.map_entry_key_field().kind(), Kind::String).then(|| entry.map_entry_value_field().kind())
}

/// Where the walk stands: the message around, and how a changed message is put back into the root.
struct Walk<'a> {
    root: &'a Root,
    seen: BTreeSet<String>,
    /// Fields that have an effect somewhere.
    read: &'a mut BTreeSet<String>,
    /// Fields that have none where they were looked at.
    ignored: BTreeSet<String>,
    excused: &'a BTreeMap<String, String>,
    checked: &'a mut usize,
}

type Rebuild<'a> = dyn Fn(DynamicMessage) -> DynamicMessage + 'a;

impl Walk<'_> {
    fn compile(&self, root: &DynamicMessage) -> Result<String, String> {
        (self.root.compile)(&root.encode_to_vec())
    }

    /// Whether the rules of Envoy's API allow it: what they refuse says nothing about who reads it.
    fn allowed(&self, root: &DynamicMessage) -> bool {
        proxy_core::rules::are_kept(self.root.type_name, &root.encode_to_vec())
    }

    /// Whether anything in `message` has an effect; what has none is noted.
    fn message(&mut self, message: &DynamicMessage, rebuild: &Rebuild<'_>, depth: usize) -> bool {
        let descriptor = message.descriptor();
        let name = descriptor.full_name().to_owned();
        let well_known = name.starts_with("google.protobuf.");
        if well_known || depth == 0 || !self.seen.insert(name.clone()) {
            return false;
        }
        let Ok(before) = self.compile(&rebuild(message.clone())) else { return true };
        let mut any = false;
        for field in descriptor.fields() {
            let full = format!("{name}.{}", field.name());
            *self.checked += 1;
            let (read, below) = self.field(message, &field, &before, rebuild, depth);
            any |= read || below;
            if read || below {
                self.read.insert(full);
            } else {
                self.ignored.insert(full);
            }
        }
        any
    }

    /// Whether the field has an effect by itself, and whether anything below it has.
    fn field(
        &mut self,
        message: &DynamicMessage,
        field: &FieldDescriptor,
        before: &str,
        rebuild: &Rebuild<'_>,
        depth: usize,
    ) -> (bool, bool) {
        let Some(kind) = item_kind(field) else { return (true, false) };
        let old = message.get_field(field).into_owned();
        let roots = candidates(&kind).into_iter().map(|item| {
            let mut changed = message.clone();
            changed.set_field(field, whole(field, item, &old));
            rebuild(changed)
        });
        let without = message.has_field(field).then(|| {
            let mut changed = message.clone();
            changed.clear_field(field);
            rebuild(changed)
        });
        let roots = roots.chain(without);
        let (allowed, broken): (Vec<_>, Vec<_>) = roots.partition(|root| self.allowed(root));
        let has_effect = |root: &DynamicMessage| self.compile(root).map_or(true, |after| after != before);
        let mut read = allowed.iter().any(has_effect);
        if self.excused.contains_key(field.full_name()) {
            return (read, false);
        }
        // Where all that is tried breaks a rule, that it is refused has to do.
        read |= allowed.is_empty() && broken.iter().any(has_effect);
        let Kind::Message(of) = kind else { return (read, false) };
        let put = |inner: DynamicMessage| {
            let mut changed = message.clone();
            changed.set_field(field, whole(field, Field::Message(inner), &old));
            rebuild(changed)
        };
        // What is there already is walked in its place, where it has its effect.
        let inner = match &old {
            Field::Message(inner) if message.has_field(field) => inner.clone(),
            _ => seeded(&of),
        };
        let (seen, ignored) = (self.seen.clone(), self.ignored.clone());
        let below = self.message(&inner, &put, depth - 1);
        if !read && !below {
            // One line says it for the whole message, which may well have an effect elsewhere.
            (self.seen, self.ignored) = (seen, ignored);
        }
        (read, below)
    }
}

/// The fields without effect, each with the reason.
fn excused() -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut reason = String::new();
    for line in include_str!("fields/without_effect.txt").lines() {
        match line.trim() {
            "" => reason.clear(),
            text => match text.strip_prefix("# ") {
                Some(text) => {
                    reason.push_str(text);
                    reason.push(' ');
                }
                None => {
                    assert!(!reason.is_empty(), "{text} has no reason");
                    assert!(all.insert(text.to_owned(), reason.clone()).is_none(), "{text} is there twice");
                }
            },
        }
    }
    all
}

#[test]
fn no_field_is_ignored_in_silence() {
    let excused = excused();
    let (mut read, mut ignored, mut checked) = (BTreeSet::new(), BTreeSet::new(), 0);
    let mut refused = Vec::new();
    for root in roots() {
        let descriptor = envoy_api::json::descriptor(root.type_name).expect("a known type");
        let base = DynamicMessage::deserialize(descriptor, root.base.clone()).expect("a base fits its type");
        let mut walk = Walk {
            root: &root,
            seen: BTreeSet::new(),
            read: &mut read,
            ignored: BTreeSet::new(),
            excused: &excused,
            checked: &mut checked,
        };
        if let Err(e) = walk.compile(&base) {
            refused.push(format!("{}: {e}", root.type_name));
        }
        walk.message(&base, &|message| message, DEPTH);
        ignored.extend(walk.ignored);
    }
    assert!(refused.is_empty(), "bases must be accepted: {refused:#?}");
    println!("{checked} fields");
    assert!(checked > 1000, "{checked}");
    ignored.retain(|name| !read.contains(name));
    let silent: Vec<&String> = ignored.iter().filter(|name| !excused.contains_key(*name)).collect();
    let lines: Vec<&str> = silent.iter().map(|name| name.as_str()).collect();
    assert!(silent.is_empty(), "{} fields are ignored:\n{}", silent.len(), lines.join("\n"));
    let stale: Vec<_> = excused.keys().filter(|name| !ignored.contains(*name)).collect();
    assert!(stale.is_empty(), "these are read after all, or gone: {stale:#?}");
}
