//! istioctl's flags that mean nothing without a cluster.

use std::ffi::OsString;

/// Flags that istioctl's users and their scripts write; accepted, and named when they would have mattered.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "istioctl's flags")]
pub(super) struct IstioctlFlags {
    #[arg(long = "meshConfigMapName", hide = true)]
    mesh_config_map_name: Option<String>,
    #[arg(long = "injectConfigMapName", hide = true)]
    inject_config_map_name: Option<String>,
    #[arg(long = "webhookConfig", hide = true)]
    webhook_config: Option<String>,
    #[arg(short = 'i', long = "istioNamespace", hide = true)]
    istio_namespace: Option<String>,
    #[arg(short = 'n', long, hide = true)]
    namespace: Option<String>,
    #[arg(short = 'c', long, hide = true)]
    kubeconfig: Option<OsString>,
    #[arg(long, hide = true)]
    context: Option<String>,
    #[arg(long = "as", hide = true)]
    impersonate: Option<String>,
    #[arg(long, hide = true)]
    as_uid: Option<String>,
    #[arg(long, hide = true)]
    as_group: Vec<String>,
    #[arg(long, hide = true)]
    kubeclient_timeout: Option<String>,
    #[arg(long, hide = true)]
    xds_address: Option<String>,
    #[arg(long, hide = true)]
    xds_label: Option<String>,
    #[arg(long, hide = true)]
    xds_port: Option<u16>,
    #[arg(long, hide = true)]
    cert_dir: Option<OsString>,
    #[arg(long, hide = true)]
    authority: Option<String>,
    #[arg(long, hide = true)]
    timeout: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    insecure: Option<bool>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    plaintext: Option<bool>,
    #[arg(long, hide = true)]
    vklog: Option<i64>,
    #[arg(long = "log_output_level", hide = true)]
    log_output_level: Option<String>,
    #[arg(long = "log_as_json", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    log_as_json: Option<bool>,
    #[arg(long = "log_caller", hide = true)]
    log_caller: Option<String>,
    #[arg(long = "log_stacktrace_level", hide = true)]
    log_stacktrace_level: Option<String>,
    #[arg(long = "log_target", hide = true)]
    log_target: Vec<String>,
    #[arg(long = "log_rotate", hide = true)]
    log_rotate: Option<String>,
    #[arg(long = "log_rotate_max_age", hide = true)]
    log_rotate_max_age: Option<i64>,
    #[arg(long = "log_rotate_max_backups", hide = true)]
    log_rotate_max_backups: Option<i64>,
    #[arg(long = "log_rotate_max_size", hide = true)]
    log_rotate_max_size: Option<i64>,
    /// As istioctl, which passes over them
    #[arg(hide = true)]
    stray: Vec<String>,
}

impl IstioctlFlags {
    /// The flags given that name what istioctl would have asked of a cluster.
    pub(super) fn of_a_cluster(&self) -> Vec<&'static str> {
        [
            ("--meshConfigMapName", self.mesh_config_map_name.is_some()),
            ("--injectConfigMapName", self.inject_config_map_name.is_some()),
            ("--webhookConfig", self.webhook_config.is_some()),
            ("--istioNamespace", self.istio_namespace.is_some()),
            ("--kubeconfig", self.kubeconfig.is_some()),
            ("--context", self.context.is_some()),
            ("--xds-address", self.xds_address.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, given)| given.then_some(name))
        .collect()
    }
}
