//! `outrigger proxy`: Envoy's command line.

use crate::drain::DrainStrategy;
use crate::start::{Options, start_parts};
use anyhow::Context as _;
use clap::Parser;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Runs the proxy with an Envoy v3 bootstrap.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Bootstrap file, JSON or YAML.
    #[arg(short = 'c', long = "config-path")]
    config_path: Option<PathBuf>,
    /// Bootstrap as YAML text, merged over the file.
    #[arg(long)]
    config_yaml: Option<String>,
    /// Worker threads; 0 or absent: one per processor.
    #[arg(long, default_value_t = 0)]
    concurrency: usize,
    /// Overrides the node's id.
    #[arg(long)]
    service_node: Option<String>,
    /// Overrides the node's cluster.
    #[arg(long)]
    service_cluster: Option<String>,
    /// Overrides the zone of the node's locality.
    #[arg(long)]
    service_zone: Option<String>,
    /// trace, debug, info, warning, error, critical or off.
    #[arg(short = 'l', long, default_value = "warning")]
    log_level: String,
    /// Levels by component, as Envoy's; accepted for compatibility.
    #[arg(long)]
    component_log_level: Option<String>,
    /// Where the log goes; standard error without it.
    #[arg(long)]
    log_path: Option<PathBuf>,
    /// Accepted for compatibility.
    #[arg(long)]
    log_format: Option<String>,
    /// Seconds over which removed listeners let connections go on.
    #[arg(long, default_value_t = 600)]
    drain_time_s: u64,
    /// gradual: more and more connections end while listeners drain; immediate: all with their next answer.
    #[arg(long, default_value = "gradual")]
    drain_strategy: Strategy,
    /// Accepted for compatibility: there is no hot restart.
    #[arg(long, default_value_t = 900)]
    parent_shutdown_time_s: u64,
    /// Accepted for compatibility.
    #[arg(long, default_value_t = 0)]
    base_id: u32,
    /// Accepted for compatibility.
    #[arg(long, default_value_t = 0)]
    restart_epoch: u32,
    /// Accepted for compatibility.
    #[arg(long)]
    disable_hot_restart: bool,
    /// serve, or validate: check the bootstrap and end.
    #[arg(long, default_value = "serve")]
    mode: Mode,
    /// Accept filters that are not understood (Lua, Wasm) and leave them out.
    #[arg(long)]
    allow_unsupported_filters: bool,
    /// Accepted for compatibility: unknown fields are always refused in static configuration.
    #[arg(long)]
    allow_unknown_static_fields: bool,
    /// Accepted for compatibility.
    #[arg(long)]
    reject_unknown_dynamic_fields: bool,
    /// A file that gets the admin port's address.
    #[arg(long)]
    admin_address_path: Option<PathBuf>,
    /// Accepted for compatibility.
    #[arg(long)]
    local_address_ip_version: Option<String>,
    /// Accepted for compatibility: access logs are written out four times a second.
    #[arg(long)]
    file_flush_interval_msec: Option<u64>,
    /// Accepted for compatibility: nothing is said about deprecated fields.
    #[arg(long)]
    skip_deprecated_logs: bool,
    /// Accepted for compatibility.
    #[arg(long)]
    ignore_unknown_dynamic_fields: bool,
    /// Accepted for compatibility: there is no hot restart.
    #[arg(long)]
    use_dynamic_base_id: bool,
    /// Accepted for compatibility: there is no hot restart.
    #[arg(long)]
    skip_hot_restart_on_no_parent: bool,
    /// Accepted for compatibility: there is no hot restart.
    #[arg(long)]
    skip_hot_restart_parent_stats: bool,
    /// Accepted for compatibility.
    #[arg(long)]
    cpuset_threads: bool,
    /// Accepted for compatibility.
    #[arg(long)]
    enable_fine_grain_logging: bool,
    /// Accepted for compatibility.
    #[arg(long)]
    enable_mutex_tracing: bool,
    /// Accepted for compatibility.
    #[arg(long)]
    log_format_escaped: bool,
    /// Accepted for compatibility.
    #[arg(long)]
    enable_core_dump: bool,
    /// Accepted for compatibility: there is no hot restart.
    #[arg(long)]
    socket_path: Option<String>,
    /// Accepted for compatibility: there is no hot restart.
    #[arg(long)]
    socket_mode: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Strategy {
    Gradual,
    Immediate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    Serve,
    Validate,
}

/// Runs `outrigger proxy` until it is told to end.
pub fn run(args: Args) -> ExitCode {
    init_logging(&args);
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

impl Args {
    /// What `/server_info` shows besides what has an effect.
    fn shown(&self) -> Vec<(&'static str, Value)> {
        let path = |path: &Option<PathBuf>| json!(path.as_ref().map_or(String::new(), |p| p.display().to_string()));
        let text = |text: &Option<String>| json!(text.as_deref().unwrap_or_default());
        let mut shown = vec![
            ("base_id", json!(self.base_id.to_string())),
            ("config_path", path(&self.config_path)),
            ("config_yaml", text(&self.config_yaml)),
            ("allow_unknown_static_fields", json!(self.allow_unknown_static_fields)),
            ("admin_address_path", path(&self.admin_address_path)),
            ("component_log_level", text(&self.component_log_level)),
            ("log_path", path(&self.log_path)),
            ("service_cluster", text(&self.service_cluster)),
            ("service_node", text(&self.service_node)),
            ("service_zone", text(&self.service_zone)),
            ("parent_shutdown_time", json!(format!("{}s", self.parent_shutdown_time_s))),
            ("enable_mutex_tracing", json!(self.enable_mutex_tracing)),
            ("restart_epoch", json!(self.restart_epoch)),
            ("cpuset_threads", json!(self.cpuset_threads)),
            ("reject_unknown_dynamic_fields", json!(self.reject_unknown_dynamic_fields)),
            ("log_format_escaped", json!(self.log_format_escaped)),
            ("ignore_unknown_dynamic_fields", json!(self.ignore_unknown_dynamic_fields)),
            ("use_dynamic_base_id", json!(self.use_dynamic_base_id)),
            ("enable_fine_grain_logging", json!(self.enable_fine_grain_logging)),
            ("skip_hot_restart_on_no_parent", json!(self.skip_hot_restart_on_no_parent)),
            ("skip_hot_restart_parent_stats", json!(self.skip_hot_restart_parent_stats)),
            ("skip_deprecated_logs", json!(self.skip_deprecated_logs)),
            ("enable_core_dump", json!(self.enable_core_dump)),
        ];
        if let Some(path) = &self.socket_path {
            shown.push(("socket_path", json!(path)));
        }
        if let Some(mode) = self.socket_mode {
            shown.push(("socket_mode", json!(mode)));
        }
        if let Some(format) = &self.log_format {
            shown.push(("log_format", json!(format)));
        }
        if let Some(version) = &self.local_address_ip_version {
            shown.push(("local_address_ip_version", json!(version)));
        }
        if let Some(interval) = self.file_flush_interval_msec {
            shown.push(("file_flush_interval", json!(duration_text(interval))));
        }
        shown
    }
}

/// As protobuf prints durations: whole seconds, or three digits behind the point.
fn duration_text(milliseconds: u64) -> String {
    match (milliseconds / 1000, milliseconds % 1000) {
        (seconds, 0) => format!("{seconds}s"),
        (seconds, rest) => format!("{seconds}.{rest:03}s"),
    }
}

fn init_logging(args: &Args) {
    let level = match args.log_level.as_str() {
        "trace" => "trace",
        "debug" => "debug",
        "info" => "info",
        "error" | "critical" => "error",
        "off" => "none",
        _ => "warn",
    };
    let options = lifecycle::logging::Options { json: false, levels: level.to_owned() };
    if let Err(e) = lifecycle::logging::init(&options) {
        eprintln!("error: {e}");
    }
}

fn serve(args: Args) -> anyhow::Result<()> {
    anyhow::ensure!(
        args.config_path.is_some() || args.config_yaml.is_some(),
        "at least one of --config-path or --config-yaml must be given"
    );
    let given = args.shown();
    let mut bootstrap = crate::bootstrap::read(args.config_path.as_deref(), args.config_yaml.as_deref())?;
    let node = bootstrap.head.node.get_or_insert_default();
    if let Some(id) = args.service_node {
        node.id = id;
    }
    if let Some(cluster) = args.service_cluster {
        node.cluster = cluster;
    }
    if let Some(zone) = args.service_zone {
        node.locality.get_or_insert_default().zone = zone;
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    let options = Options {
        concurrency: args.concurrency,
        allow_unsupported_filters: args.allow_unsupported_filters,
        drain_time: Duration::from_secs(args.drain_time_s),
        drain_strategy: match args.drain_strategy {
            Strategy::Gradual => DrainStrategy::Gradual,
            Strategy::Immediate => DrainStrategy::Immediate,
        },
        admin_address_path: args.admin_address_path.clone(),
        validate: args.mode == Mode::Validate,
        log_level: args.log_level.clone(),
        given,
        ..Options::default()
    };
    runtime.block_on(async {
        let mut signals = lifecycle::signal::Signals::listen().context("cannot listen for signals")?;
        let handle = start_parts(bootstrap, options)?;
        if args.mode == Mode::Validate {
            println!("configuration OK");
            return Ok(());
        }
        let settle = async {
            while handle.ready().is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            lifecycle::memory::release_unused();
            std::future::pending::<()>().await
        };
        tokio::select! {
            _ = signals.next() => {}
            () = handle.quit_requested() => {}
            () = settle => {}
        }
        handle.shutdown();
        Ok(())
    })
}
