//! The admin endpoint: Envoy's paths and shapes on port 15000.

mod dump;
mod server_stats;
mod tables;

pub(crate) use dump::timestamp;

use crate::bootstrap::Parts;
use crate::control::Control;
use crate::drain::DrainStrategy;
use crate::runtime::Shared;
use crate::socket::{self, BindOptions, Bound};
use crate::start::Options;
use crate::stats::{
    self, Buckets, HttpStats, Kind, ListenerHttpStats, ListenerStats, Naming, OfManager, OfThread, Sample,
};
use lifecycle::http::{Handler, Request, Response, with_type};
use proxy_core::Address;
use regex_automata::meta::Regex;
use serde_json::{Value, json};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

const TEXT: &str = "text/plain; charset=UTF-8";
const JSON: &str = "application/json";

/// Log components whose levels Envoy lets one set, in its order; ours has one level for all, so these are kept for show.
const LOGGERS: [&str; 73] = [
    "a2a",
    "admin",
    "ai_protocol_manager",
    "alternate_protocols_cache",
    "aws",
    "assert",
    "backtrace",
    "basic_auth",
    "cache_filter",
    "client",
    "config",
    "connection",
    "conn_handler",
    "compression",
    "credential_injector",
    "decompression",
    "dns",
    "dubbo",
    "envoy_bug",
    "ext_authz",
    "ext_proc",
    "rocketmq",
    "file",
    "filter",
    "forward_proxy",
    "geolocation",
    "grpc",
    "happy_eyeballs",
    "hc",
    "health_checker",
    "http",
    "http2",
    "hystrix",
    "init",
    "io",
    "jwt",
    "json_rpc",
    "kafka",
    "key_value_store",
    "lua",
    "local_rate_limit",
    "main",
    "matcher",
    "mcp",
    "misc",
    "mongo",
    "multi_connection",
    "notification",
    "oauth2",
    "quic",
    "quic_stream",
    "pool",
    "rate_limit_quota",
    "rbac",
    "rds",
    "redis",
    "router",
    "runtime",
    "stats",
    "secret",
    "sse",
    "tap",
    "testing",
    "thrift",
    "tracing",
    "upstream",
    "udp",
    "wasm",
    "websocket",
    "golang",
    "stats_sinks",
    "dynamic_modules",
    "ip_tagging",
];

pub(crate) struct Admin {
    shared: Arc<Shared>,
    control: Arc<Mutex<Control>>,
    bootstrap: Arc<Parts>,
    stats: Arc<HttpStats>,
    answers: Arc<ListenerHttpStats>,
    listener: Arc<ListenerStats>,
    /// By logger.
    levels: Mutex<[&'static str; LOGGERS.len()]>,
    log_level: String,
    /// What the command line says, where `/server_info` shows it.
    given: Vec<(&'static str, Value)>,
    /// What the bootstrap says of statistics.
    naming: Naming,
    quit: Notify,
}

/// Binds the admin port.
pub(crate) fn bind(address: &Address) -> io::Result<Bound> {
    let options = BindOptions { transparent: false, freebind: false, reuse_port: false, backlog: 128, others: &[] };
    socket::listen(address, options)
}

/// Serves it.
pub(crate) async fn serve(bound: Bound, admin: Arc<Admin>) {
    let (_trigger, watch) = lifecycle::drain::channel();
    let served = Arc::new(Served(admin));
    let result = match bound {
        Bound::Tcp(listener) => match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => {
                lifecycle::http::serve(listener, served, watch).await;
                Ok(())
            }
            Err(e) => Err(e),
        },
        Bound::Unix(listener) => match tokio::net::UnixListener::from_std(listener) {
            Ok(listener) => {
                lifecycle::http::serve_unix(listener, served, watch).await;
                Ok(())
            }
            Err(e) => Err(e),
        },
    };
    if let Err(e) = result {
        tracing::error!(error = %e, "cannot serve the admin port");
    }
}

struct Served(Arc<Admin>);

impl Handler for Served {
    fn handle(&self, request: Request) -> Pin<Box<dyn Future<Output = Response> + Send + '_>> {
        let admin = self.0.clone();
        Box::pin(async move {
            // Hardly anybody asks twice on a connection: each request counts as one.
            let (of_listener, of_http) = (&admin.listener, &admin.stats);
            of_listener.downstream_cx_total.inc();
            of_http.downstream_cx_total.inc();
            of_http.downstream_cx_http1_total.inc();
            of_http.downstream_rq_total.inc();
            of_http.downstream_rq_http1_total.inc();
            of_listener.downstream_cx_active.inc();
            let gauges =
                [&of_http.downstream_cx_active, &of_http.downstream_cx_http1_active, &of_http.downstream_rq_active];
            gauges.iter().for_each(|gauge| gauge.inc());
            let query = request.uri().query().unwrap_or_default().to_owned();
            let path = request.uri().path().to_owned();
            let mut answer = admin.answer(&path, &query, request.method());
            // As Envoy's `Utility::populateFallbackResponseHeaders` has it.
            let headers = answer.headers_mut();
            headers.insert(http::header::CACHE_CONTROL, http::HeaderValue::from_static("no-cache, max-age=0"));
            headers.insert(http::header::X_CONTENT_TYPE_OPTIONS, http::HeaderValue::from_static("nosniff"));
            headers.insert(http::header::SERVER, http::HeaderValue::from_static("envoy"));
            gauges.iter().for_each(|gauge| gauge.dec());
            of_listener.downstream_cx_active.dec();
            of_listener.downstream_cx_destroy.inc();
            of_http.downstream_cx_destroy.inc();
            of_http.downstream_cx_destroy_local.inc();
            of_http.downstream_rq.inc(answer.status().as_u16());
            admin.answers.downstream_rq.inc(answer.status().as_u16());
            answer
        })
    }
}

/// Query parameters, percent-decoded.
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|p| !p.is_empty());
        Self(
            pairs
                .map(|p| {
                    let (k, v) = p.split_once('=').unwrap_or((p, ""));
                    (decode(k), decode(v))
                })
                .collect(),
        )
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// A parameter's value; Envoy takes an empty one for none.
    pub(crate) fn given(&self, key: &str) -> Option<&str> {
        self.get(key).filter(|value| !value.is_empty())
    }

    fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }
}

fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = bytes.get(i + 1..i + 3).and_then(|h| std::str::from_utf8(h).ok());
        match (bytes[i], hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(b)) => {
                out.push(b);
                i += 3;
            }
            (b, _) => {
                out.push(b);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Seconds between Envoy's flushes of histograms (`stats_flush_interval`).
const FLUSH_INTERVAL: u64 = 5;

/// The list of commands, in the words of Envoy 1.40's `/help`, which clients look into.
const HELP: &str = include_str!("admin/help.txt");

/// Whether a path is one that only POST may ask for.
fn changes_something(path: &str) -> bool {
    HELP.lines().any(|line| line.trim_start().strip_prefix(path).is_some_and(|rest| rest.starts_with(" (POST):")))
}

impl Admin {
    pub(crate) fn new(
        shared: Arc<Shared>,
        control: Arc<Mutex<Control>>,
        bootstrap: Arc<Parts>,
        naming: Naming,
        options: &Options,
    ) -> Arc<Self> {
        let stats = Arc::new(HttpStats::default());
        let listener = Arc::new(ListenerStats::default());
        shared.registry.add(Kind::Http, "admin".into(), Arc::new(server_stats::WithoutRouter(stats.clone())));
        let answers = Arc::new(ListenerHttpStats::default());
        shared.registry.add(Kind::Listener, "admin".into(), listener.clone());
        shared.registry.add(
            Kind::Listener,
            "admin".into(),
            Arc::new(OfThread(listener.clone(), "main_thread".to_owned())),
        );
        shared.registry.add(Kind::Listener, "admin".into(), Arc::new(OfManager(answers.clone(), "admin".into())));
        server_stats::register(&shared, &Arc::downgrade(&control));
        Arc::new(Self {
            naming,
            shared,
            control,
            bootstrap,
            stats,
            answers,
            listener,
            levels: Mutex::new([level_name(&options.log_level); LOGGERS.len()]),
            log_level: options.log_level.clone(),
            given: options.given.clone(),
            quit: Notify::new(),
        })
    }

    pub(crate) async fn quit_requested(&self) {
        self.quit.notified().await;
    }

    fn control(&self) -> std::sync::MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> &'static str {
        // Listeners that drain do not count (Envoy `Utility::serverState`).
        if self.shared.health_failed.load(Ordering::Relaxed) {
            "DRAINING"
        } else {
            let control = self.control();
            match (control.ready(), control.waits_for_clusters()) {
                (Ok(()), _) => "LIVE",
                (Err(_), true) => "PRE_INITIALIZING",
                (Err(_), false) => "INITIALIZING",
            }
        }
    }

    fn answer(&self, path: &str, query: &str, method: &http::Method) -> Response {
        let query = Query::parse(query);
        if method != http::Method::POST && changes_something(path) {
            return text(405, format!("Method {method} not allowed, POST required."));
        }
        match path {
            "/ready" => {
                let state = self.state();
                text(if state == "LIVE" { 200 } else { 503 }, format!("{state}\n"))
            }
            "/stats" | "/stats/prometheus" => self.stats(&query, path == "/stats/prometheus"),
            "/server_info" => pretty(&self.server_info()),
            "/requests" => {
                let number = |key: &str| query.get(key).and_then(|n| n.parse::<u64>().ok());
                let limit = number("limit").map_or(100, |n| n.min(10_000) as usize);
                let code = number("code").and_then(|n| u16::try_from(n).ok());
                pretty(&self.shared.rings.read(query.get("id"), query.get("cluster"), code, limit))
            }
            "/clusters" => {
                let Ok(wanted) = query.given("filter").map(search).transpose() else {
                    return text(400, "Invalid re2 regex".to_owned());
                };
                match query.get("format") {
                    Some("json") => pretty(&self.clusters_json(wanted.as_ref())),
                    _ => text(200, self.clusters_text(wanted.as_ref())),
                }
            }
            "/listeners" => match query.get("format") {
                Some("json") => pretty(&self.listeners_json()),
                _ => text(200, self.listeners_text()),
            },
            "/config_dump" => self.config_dump_answer(&query),
            "/certs" => pretty(&self.certs()),
            "/memory" => pretty(&memory()),
            "/runtime" => pretty(&self.runtime_json()),
            "/runtime_modify" => {
                if query.0.is_empty() {
                    return text(400, RUNTIME_USAGE.to_owned());
                }
                let changes = query.0.iter().map(|(key, value)| (key.as_str(), value.as_str()));
                match self.control().modify_runtime(changes) {
                    true => text(200, "OK\n".to_owned()),
                    false => text(503, "No admin layer specified".to_owned()),
                }
            }
            "/logging" => self.logging(&query),
            "/healthcheck/fail" => {
                self.shared.health_failed.store(true, Ordering::Relaxed);
                text(200, "OK\n".to_owned())
            }
            "/healthcheck/ok" => {
                self.shared.health_failed.store(false, Ordering::Relaxed);
                text(200, "OK\n".to_owned())
            }
            "/reset_counters" => {
                self.shared.registry.reset();
                text(200, "OK\n".to_owned())
            }
            "/drain_listeners" => self.drain_listeners(&query),
            "/quitquitquit" => {
                self.quit.notify_one();
                text(200, "OK\n".to_owned())
            }
            "/reopen_logs" => text(200, "OK\n".to_owned()),
            "/contention" => text(
                200,
                "Mutex contention tracing is not enabled. To enable, run Envoy with flag --enable-mutex-tracing."
                    .to_owned(),
            ),
            "/stats/recentlookups" => text(
                200,
                "Lookup tracking is not enabled. Use /stats/recentlookups/enable to enable.\n\ntotal: 0\n".to_owned(),
            ),
            "/stats/recentlookups/enable" | "/stats/recentlookups/disable" | "/stats/recentlookups/clear" => {
                text(200, "OK\n".to_owned())
            }
            // DIFFERS: no profile is taken.
            "/cpuprofiler" | "/allocprofiler" => match query.get("enable") {
                Some("y" | "n") => text(200, "OK\n".to_owned()),
                _ => text(400, "?enable=<y|n>\n".to_owned()),
            },
            "/heapprofiler" => text(501, "The current build does not support heap profiler".to_owned()),
            // DIFFERS: there is no such profile.
            "/heap_dump" | "/peak_heap_dump" | "/memory/tcmalloc" => text(200, "not supported\n".to_owned()),
            "/hot_restart_version" => text(200, "disabled".to_owned()),
            "/init_dump" => pretty(&self.init_dump()),
            "/help" => text(200, HELP.to_owned()),
            "/" => with_type(200, "text/html; charset=UTF-8", format!("<!doctype html><pre>{HELP}</pre>")),
            _ => text(404, format!("invalid path. {HELP}")),
        }
    }

    /// Envoy `StatsHandler`. `always_prometheus`: whatever the format that is asked for.
    fn stats(&self, query: &Query, always_prometheus: bool) -> Response {
        let filter = match query.given("filter").map(search).transpose() {
            Ok(filter) => filter,
            Err(why) => return text(400, format!("Invalid re2 regex: {why}")),
        };
        if query.get("histogram_buckets").is_some_and(|mode| !BUCKETS.contains(&mode)) {
            return text(400, format!("usage: /stats?histogram_buckets=({})\n", BUCKETS[2..].join("|")));
        }
        let kind: fn(&Sample) -> bool = match query.get("type") {
            None | Some("" | "All") => |_| true,
            Some("Counters") => |sample| matches!(sample, Sample::Counter(_)),
            Some("Gauges") => |sample| matches!(sample, Sample::Gauge(_)),
            Some("Histograms") => |sample| matches!(sample, Sample::Histogram(_)),
            Some("TextReadouts") => |sample| matches!(sample, Sample::Text(_)),
            Some(_) => return text(400, "invalid &type= param".to_owned()),
        };
        let mode = query.given("histogram_buckets");
        if query.given("hidden").is_some_and(|mode| !["include", "only", "exclude"].contains(&mode)) {
            return text(400, "usage: /stats?hidden=(include|only|exclude)\n\n".to_owned());
        }
        let prometheus = match query.given("format") {
            _ if always_prometheus => true,
            None | Some("text" | "json" | "html" | "active-html") => false,
            Some("prometheus") => true,
            Some(_) => {
                return text(400, "usage: /stats?format=(html|active-html|json|prometheus|text)\n\n".to_owned());
            }
        };
        let buckets = match mode {
            Some("detailed" | "disjoint") if prometheus => {
                return text(400, "unsupported prometheus histogram bucket mode".to_owned());
            }
            Some("prometheusnative") if prometheus => {
                let why = "unsupported prometheusnative histogram type when not using protobuf exposition format";
                return text(400, why.to_owned());
            }
            Some("prometheusnative") => {
                return text(400, "Invalid histogram_buckets type for non prometheus stats type".to_owned());
            }
            None if prometheus => Buckets::Cumulative,
            Some("cumulative") => Buckets::Cumulative,
            Some("disjoint") => Buckets::Disjoint,
            Some("detailed") => Buckets::Detailed,
            _ => Buckets::Quantiles,
        };
        let wanted =
            |name: &str| filter.as_ref().is_none_or(|f| f.is_match(name.as_bytes()) != query.has("invert_filter"));
        let mut entries = self.entries(query.has("usedonly"));
        // Prometheus has no type for texts, so that they are told to whoever asks for them only.
        let texts = query.has("text_readouts");
        let shown = |sample: &Sample| match prometheus {
            true => texts || !matches!(sample, Sample::Text(_)),
            false => kind(sample),
        };
        // There are no hidden ones here.
        let only_hidden = query.get("hidden") == Some("only");
        entries.retain(|e| !only_hidden && shown(&e.sample) && wanted(&e.full_name()));
        if prometheus {
            return text(200, self.exposition(&entries, buckets, &wanted));
        }
        match query.given("format") {
            Some("json") => with_type(200, JSON, stats::json(&entries, buckets, &self.naming).to_string()),
            None | Some("text") => text(200, stats::text(&entries, buckets, &self.naming)),
            // DIFFERS: Envoy's pages have forms.
            Some(_) => {
                // Requests can give names to statistics.
                let all = stats::text(&entries, buckets, &self.naming).replace('&', "&amp;").replace('<', "&lt;");
                with_type(
                    200,
                    "text/html; charset=UTF-8",
                    format!("<!DOCTYPE html>\n<html lang='en'>\n<pre>\n{all}</pre>"),
                )
            }
        }
    }

    /// How many times Envoy would have flushed its histograms.
    fn flushes(&self) -> u64 {
        self.shared.started.elapsed().as_secs() / FLUSH_INTERVAL
    }

    /// All that is counted. `used_only`: without what was never touched.
    fn entries(&self, used_only: bool) -> Vec<stats::Entry> {
        let mut entries = self.shared.registry.read_flushed(self.flushes());
        self.naming.choose(&mut entries);
        if used_only {
            let counted = stats::counted(&entries);
            entries.retain(|e| e.is_used(&counted));
        }
        entries
    }

    /// Istio's metrics that are wanted by name, and Envoy's that are given.
    fn exposition(&self, entries: &[stats::Entry], buckets: Buckets, wanted: &dyn Fn(&str) -> bool) -> String {
        let mut out = self.shared.registry.istio.render(wanted);
        out.push_str(&stats::prometheus(entries, buckets, &self.naming));
        out
    }

    /// Envoy's and Istio's metrics.
    pub(crate) fn prometheus(&self, used_only: bool) -> String {
        let mut entries = self.entries(used_only);
        entries.retain(|e| !matches!(e.sample, Sample::Text(_)));
        self.exposition(&entries, Buckets::Cumulative, &|_| true)
    }

    /// Open connections of all listeners but the admin's.
    pub(crate) fn connections(&self) -> u64 {
        let entries = self.shared.registry.read();
        let active = entries.iter().filter(|e| e.kind == Kind::Listener && e.name == "downstream_cx_active");
        active
            .map(|e| match e.sample {
                Sample::Gauge(n) => n,
                _ => 0,
            })
            .sum()
    }

    fn drain_listeners(&self, query: &Query) -> Response {
        let inbound_only = query.has("inboundonly");
        let mut control = self.control();
        control.drain(inbound_only);
        if query.has("skip_exit") {
            // The connections end, the listeners stay.
        } else if !query.has("graceful") {
            control.stop_listeners(inbound_only);
        } else {
            let control = self.control.clone();
            let wait = self.shared.drain_time.min(Duration::from_secs(3600));
            // Nobody waits: it ends with the process or after the drain time.
            tokio::spawn(async move {
                tokio::time::sleep(wait).await;
                control.lock().unwrap_or_else(PoisonError::into_inner).stop_listeners(inbound_only);
            });
        }
        text(200, "OK\n".to_owned())
    }

    /// Envoy `LogsHandler::handlerLogging`.
    fn logging(&self, query: &Query) -> Response {
        let mut levels = self.levels.lock().unwrap_or_else(PoisonError::into_inner);
        match changed(&query.0, *levels) {
            Ok(new) => {
                *levels = new;
                text(200, active(&levels))
            }
            Err(why) => text(400, format!("error: {why}\n\n{LOGGING_USAGE}{}", active(&levels))),
        }
    }

    fn runtime_json(&self) -> Value {
        let control = self.control();
        let runtime = control.runtime();
        let mut entries = serde_json::Map::new();
        for (key, values) in runtime.entries() {
            let holds = values.iter().rfind(|value| !value.is_empty()).cloned().unwrap_or_default();
            entries.insert(key.to_string(), json!({"layer_values": values, "final_value": holds}));
        }
        let layers: Vec<String> = runtime.layers().iter().map(ToString::to_string).collect();
        json!({"entries": entries, "layers": layers})
    }

    /// `envoy.admin.v3.CommandLineOptions`: those that this proxy has, and Envoy's defaults of all others.
    fn options(&self) -> Value {
        let shared = &self.shared;
        let mut options = json!({
            "base_id": "0",
            "concurrency": shared.concurrency,
            "config_path": "",
            "config_yaml": "",
            "allow_unknown_static_fields": false,
            "admin_address_path": "",
            "local_address_ip_version": "v4",
            "log_level": self.log_level,
            "component_log_level": "",
            "log_format": "[%Y-%m-%d %T.%e][%t][%l][%n] [%g:%#] %v",
            "log_path": "",
            "service_cluster": "",
            "service_node": "",
            "service_zone": "",
            "file_flush_interval": "10s",
            "drain_time": format!("{}s", shared.drain_time.as_secs()),
            "parent_shutdown_time": "900s",
            "mode": "Serve",
            "disable_hot_restart": true,
            "enable_mutex_tracing": false,
            "restart_epoch": 0,
            "cpuset_threads": false,
            "reject_unknown_dynamic_fields": false,
            "log_format_escaped": false,
            "disabled_extensions": [],
            "ignore_unknown_dynamic_fields": false,
            "use_dynamic_base_id": false,
            "base_id_path": "",
            "drain_strategy": match shared.draining.strategy {
                DrainStrategy::Gradual => "Gradual",
                DrainStrategy::Immediate => "Immediate",
            },
            "enable_fine_grain_logging": false,
            "socket_path": "@envoy_domain_socket",
            "socket_mode": 0,
            "enable_core_dump": false,
            "stats_tag": [],
            "skip_hot_restart_on_no_parent": false,
            "skip_hot_restart_parent_stats": false,
            "skip_deprecated_logs": false,
            "file_flush_min_size": 0,
            "log_stacktrace_single_entry": false,
        });
        for (name, value) in &self.given {
            options[*name] = value.clone();
        }
        options
    }

    fn server_info(&self) -> Value {
        let uptime = format!("{}s", self.shared.started.elapsed().as_secs());
        let mut node = envoy_api::json::to_json(
            "type.googleapis.com/envoy.config.core.v3.Node",
            &envoy_api::Message::encode_to_vec(&self.shared.node.message),
        )
        .unwrap_or_default();
        node["user_agent_name"] = json!("envoy");
        // Whose 1.40 this is compatible with. DIFFERS: the list of extensions is left out.
        node["user_agent_build_version"] =
            json!({"version": {"major_number": 1, "minor_number": 40, "patch": 0}, "metadata": {}});
        for (list, empty) in [
            ("client_features", json!([])),
            ("extensions", json!([])),
            ("dynamic_parameters", json!({})),
            ("listening_addresses", json!([])),
        ] {
            node[list] = empty;
        }
        if let Some(locality) = node.get_mut("locality") {
            for part in ["region", "zone", "sub_zone"] {
                let known = locality.get(part).cloned();
                locality[part] = known.unwrap_or_else(|| json!(""));
            }
        }
        json!({
            "version": concat!("outrigger/", env!("CARGO_PKG_VERSION"), "/Clean/RELEASE/rustls"),
            "state": self.state(),
            "uptime_current_epoch": uptime,
            "uptime_all_epochs": uptime,
            "hot_restart_version": "disabled",
            "hot_restart_initializing": false,
            "command_line_options": self.options(),
            "node": node,
        })
    }
}

/// How histograms may be shown; the first two say nothing.
const BUCKETS: [&str; 7] = ["", "none", "cumulative", "disjoint", "detailed", "summary", "prometheusnative"];
const RUNTIME_USAGE: &str = "usage: /runtime_modify?key1=value1&key2=value2&keyN=valueN\n       or send the parameters as form values\nuse an empty value to remove a previously added override";
const LOGGING_USAGE: &str = "usage: /logging?<name>=<level> (change single level)
usage: /logging?paths=name1:level1,name2:level2,... (change multiple levels)
usage: /logging?level=<level> (change all levels)
usage: /logging?group=<group_name>:<level> (change group of loggers)
levels: trace debug info warning error critical off \n";

type Levels = [&'static str; LOGGERS.len()];

fn active(levels: &Levels) -> String {
    let mut out = String::from("active loggers:\n");
    for (name, level) in LOGGERS.iter().zip(levels) {
        out.push_str(&format!("  {name}: {level}\n"));
    }
    out.push('\n');
    out
}

const KNOWN: [&str; 7] = ["trace", "debug", "info", "warning", "error", "critical", "off"];

/// The levels after such a request.
fn changed(query: &[(String, String)], mut levels: Levels) -> Result<Levels, &'static str> {
    let level = |name: &str| KNOWN.into_iter().find(|known| *known == name).ok_or("unknown logger level");
    let mut set = |name: &str, to: &str| {
        let to = level(to)?;
        let at = LOGGERS.iter().position(|known| *known == name).ok_or("unknown logger name")?;
        levels[at] = to;
        Ok::<_, &'static str>(())
    };
    // Nothing to set is nothing said; of one said twice the first counts.
    let mut said: Vec<(&str, &str)> = Vec::new();
    for (key, value) in query.iter().filter(|(_, value)| !value.is_empty()) {
        if said.iter().all(|(known, _)| known != key) {
            said.push((key, value));
        }
    }
    match said[..] {
        [] => {}
        [("paths", value)] => {
            for pair in value.split(',').filter(|pair| !pair.is_empty()) {
                match pair.split_once(':') {
                    Some((name, to)) if !name.is_empty() && !to.is_empty() => set(name, to)?,
                    _ => return Err("empty logger name or empty logger level"),
                }
            }
        }
        [("group", _)] => return Err("group parameter requires fine-grain logging to be enabled"),
        [("level", value)] => levels = [level(value)?; LOGGERS.len()],
        [(name, value)] => set(name, value)?,
        _ => return Err("invalid number of parameters"),
    }
    Ok(levels)
}

/// As the command line may say it; what is unknown is the default's.
fn level_name(said: &str) -> &'static str {
    KNOWN.into_iter().find(|known| *known == said).unwrap_or("warning")
}

/// An expression to be found anywhere in a text, or what RE2 says against it.
fn search(pattern: &str) -> Result<Regex, String> {
    proxy_core::matchers::searched(pattern).map_err(|why| re2_error(pattern, why))
}

/// An expression that must match a whole text.
fn whole(pattern: &str) -> Result<proxy_core::matchers::Regex, String> {
    proxy_core::matchers::Regex::new(pattern).map_err(|why| re2_error(pattern, why))
}

/// RE2 words its errors in its own way; the common ones are imitated.
fn re2_error(pattern: &str, why: String) -> String {
    let count = |c: char| pattern.matches(c).count();
    if !why.starts_with("invalid regex") && !why.starts_with("regex ") {
        return why;
    }
    if let Some(at) = pattern.rfind('[').filter(|at| !pattern[*at..].contains(']')) {
        return format!("missing ]: {}", &pattern[at..]);
    }
    if let Some(repeated) = pattern.chars().next().filter(|c| matches!(c, '*' | '+' | '?')) {
        return format!("no argument for repetition operator: {repeated}");
    }
    if pattern.ends_with('\\') {
        return "trailing \\".to_owned();
    }
    if let Some(range) = pattern.as_bytes().windows(3).position(|w| w[1] == b'-' && w[0] > w[2]) {
        return format!("invalid character class range: {}", pattern.get(range..range + 3).unwrap_or_default());
    }
    if let Some(at) = pattern.find("\\").filter(|at| pattern[at + 1..].starts_with(|c: char| c.is_ascii_lowercase())) {
        return format!("invalid escape sequence: {}", &pattern[at..at + 2]);
    }
    if let Some(at) = ["(?=", "(?!"].iter().find_map(|operator| pattern.find(operator)) {
        return format!("invalid perl operator: {}", &pattern[at..at + 3]);
    }
    match count('(').cmp(&count(')')) {
        std::cmp::Ordering::Greater => format!("missing ): {pattern}"),
        std::cmp::Ordering::Less => format!("unexpected ): {pattern}"),
        std::cmp::Ordering::Equal => format!("invalid: {pattern}"),
    }
}

fn text(status: u16, body: String) -> Response {
    with_type(status, TEXT, body)
}

/// JSON as protobuf's printer writes it for Envoy: one space a level, numbers without a fraction of 0, and an end of line.
fn printed(value: &Value) -> String {
    let mut out = String::new();
    for line in serde_json::to_string_pretty(value).unwrap_or_default().lines() {
        let text = line.trim_start_matches(' ');
        out.extend(std::iter::repeat_n(' ', (line.len() - text.len()) / 2));
        // Lines of strings end with their quotes.
        match (text.strip_suffix(".0"), text.strip_suffix(".0,")) {
            (Some(number), _) => out.push_str(number),
            (_, Some(number)) => out.extend([number, ","]),
            _ => out.push_str(text),
        }
        out.push('\n');
    }
    out
}

fn pretty(value: &Value) -> Response {
    with_type(200, JSON, printed(value))
}

/// From /proc: what the allocator took is not known more exactly.
fn memory() -> Value {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = |i: usize| statm.split(' ').nth(i).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    let size = 4096;
    json!({
        "allocated": (pages(5) * size).to_string(),
        "heap_size": (pages(5) * size).to_string(),
        "pageheap_unmapped": "0",
        "pageheap_free": "0",
        "total_thread_cache": "0",
        "total_physical_bytes": (pages(1) * size).to_string(),
    })
}
