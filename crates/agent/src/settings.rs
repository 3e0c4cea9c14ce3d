//! Everything the agent runs with, resolved once from flags, environment and files.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use envoy_api::core;
use identity::{Authority, Files, KeyKind, Roots, Rotation, Source};
use mesh_types::SpiffeId;
use serde_json::Value;

use crate::environment::Environment;
use crate::flags::{DataPlane, ProxyFlags, Role};
use crate::probes::Probers;
use crate::proxy_config::{self, Sources};
use crate::scrape::Scrape;
use crate::{node, podinfo};

/// Where the files of a pod are mounted; another root in tests.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// The file system's.
    pub fn system() -> Root {
        Root(PathBuf::from("/"))
    }

    /// Everything below `dir`.
    pub fn at(dir: impl Into<PathBuf>) -> Root {
        Root(dir.into())
    }

    /// An absolute path, moved below the root.
    pub fn path(&self, absolute: &str) -> PathBuf {
        self.0.join(absolute.trim_start_matches('/'))
    }
}

const TOKEN: &str = "/var/run/secrets/tokens/istio-token";
const ISTIOD_ROOT: &str = "/var/run/secrets/istio/root-cert.pem";
const MOUNTED_CERTS: &str = "/etc/certs";
const KUBERNETES_ROOT: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

const WORKLOAD_CERTS: &str = "/var/run/secrets/workload-spiffe-credentials";
/// Where Istio's image has its Envoy; one from elsewhere is taken for a stock one, unless ISTIO_META_PROFILE says otherwise.
const ISTIO_ENVOY: &str = "/usr/local/bin/envoy";
/// What is left of the pod's grace for closing what is open and for ending.
const GRACE_RESERVE: Duration = Duration::from_secs(1);

/// What the agent does and with whom.
#[derive(Clone, Debug)]
pub struct Settings {
    pub role: Role,
    pub data_plane: DataPlane,
    pub node: core::Node,
    pub addresses: Vec<IpAddr>,
    pub namespace: String,
    /// `NAMESPACE.svc.cluster.local`.
    pub domain: String,
    pub discovery: Discovery,
    pub certificates: Source,
    pub rotation: Rotation,
    /// OUTPUT_CERTS.
    pub output_certs: Option<PathBuf>,
    pub ports: Ports,
    pub drain: Drain,
    /// `None`: DNS is not captured.
    pub dns: Option<Dns>,
    pub probers: Probers,
    /// The address at which the application is probed.
    pub probe_destination: IpAddr,
    /// Whether this workload has a WorkloadEntry that follows its agent: it registers itself, or tells its health.
    pub registers: bool,
    /// `None`: the application has no metrics to merge.
    pub scrape: Option<Scrape>,
    /// Metrics are for this pod alone, METRICS_LOCALHOST_ACCESS_ONLY.
    pub metrics_localhost_only: bool,
    /// Worker threads; 0: as many as CPUs.
    pub concurrency: usize,
    pub proxy_config: istio_api::MeshProxyConfig,
    pub proxy_log_level: String,
    pub proxy_component_log_level: String,
    pub template_file: Option<PathBuf>,
    pub outlier_log_path: Option<String>,
    /// What only Envoy's bootstrap and command line take.
    pub envoy: EnvoyOptions,
    pub root: Root,
}

/// What only Envoy's bootstrap and command line take.
#[derive(Clone, Debug, Default)]
pub struct EnvoyOptions {
    /// The merged proxy configuration as it was written.
    pub config: Value,
    /// The pod's annotations, some of which choose statistics.
    pub annotations: BTreeMap<String, String>,
    /// --log_as_json.
    pub log_json: bool,
    /// ISTIO_BOOTSTRAP_OVERRIDE: a file that is merged over the bootstrap.
    pub bootstrap_override: Option<PathBuf>,
    /// HOST_IP, which the override may refer to.
    pub host_ip: String,
    /// ISTIO_ENVOY_ENABLE_CORE_DUMP.
    pub core_dump: bool,
    /// ENVOY_SKIP_DEPRECATED_LOGS, a flag that only Istio's Envoy has.
    pub skip_deprecated_logs: bool,
    /// ENVOY_STATUS_PORT_ENABLE_PROXY_PROTOCOL.
    pub status_proxy_protocol: bool,
    /// HTTP_STRIP_FRAGMENT_FROM_PATH_UNSAFE_IF_DISABLED.
    pub strip_fragment: bool,
    /// ISTIO_DUAL_STACK.
    pub dual_stack: bool,
    /// ISTIO_META_ENABLE_SELF_DISCOVERY.
    pub self_discovery: bool,
}

/// The control plane's xDS server.
#[derive(Clone, Debug)]
pub struct Discovery {
    /// `HOST:PORT`.
    pub address: String,
    /// The name in its certificate.
    pub server_name: String,
    pub roots: Roots,
    /// Delta or state of the world, ISTIO_DELTA_XDS.
    pub delta: bool,
    /// Present the token as well as the certificate: needed where there is no client certificate.
    pub token: Option<PathBuf>,
}

/// The ports the agent and the proxy listen on.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    pub admin: u16,
    pub status: u16,
    pub health: u16,
    pub prometheus: u16,
    /// The proxy's metrics over mutual TLS, ENVOY_SECURE_METRICS_PORT; 0: none.
    pub secure_metrics: u16,
    /// The merged ones, ENVOY_SECURE_MERGED_METRICS_PORT; 0: none.
    pub secure_merged_metrics: u16,
}

/// How to end.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// How long listeners drain, `drainDuration`.
    pub listeners: Duration,
    /// How long to go on after SIGTERM, `terminationDrainDuration`.
    pub termination: Duration,
    /// With `exit_on_zero`: at least this long, MINIMUM_DRAIN_DURATION.
    pub minimum: Duration,
    /// End when the last connection has, EXIT_ON_ZERO_ACTIVE_CONNECTIONS.
    pub exit_on_zero: bool,
    /// End then at the latest, whatever is open: a little before the pod's grace is over and the kubelet kills. From
    /// OUTRIGGER_TERMINATION_GRACE_SECONDS; unlimited without it, as in Istio.
    pub deadline: Option<Duration>,
}

/// The DNS server.
#[derive(Clone, Debug)]
pub struct Dns {
    pub addresses: Vec<SocketAddr>,
    /// Ask all upstream servers at once, DNS_FORWARD_PARALLEL.
    pub parallel: bool,
    /// DNS_FORWARD_TIMEOUT.
    pub timeout: Duration,
    pub resolv_conf: PathBuf,
}

impl Settings {
    /// Resolves everything; the first thing that is wrong is the error.
    pub fn resolve(flags: &ProxyFlags, env: &Environment, root: Root) -> anyhow::Result<Settings> {
        let annotations = podinfo::read(&root.path("/etc/istio/pod/annotations"));
        let labels = podinfo::read(&root.path("/etc/istio/pod/labels"));
        let (mut proxy_config, mut config_json) = merged_config(flags, env, &annotations)?;
        apply_older_flags(flags, &annotations, &mut proxy_config, &mut config_json)?;

        let pod_name = env.or("POD_NAME", "");
        let namespace = env.or("POD_NAMESPACE", "");
        let service_account = env.or("SERVICE_ACCOUNT", "default");
        let domain =
            flags.domain.clone().filter(|d| !d.is_empty()).unwrap_or_else(|| format!("{namespace}.svc.cluster.local"));
        let excluded = annotations.get("traffic.sidecar.istio.io/excludeInterfaces").map_or("", String::as_str);
        let addresses = addresses(env.get("INSTANCE_IP"), excluded);
        let trust_domain = flags.older.trust_domain.clone().unwrap_or_else(|| env.or("TRUST_DOMAIN", "cluster.local"));
        let exit_on_zero = env.flag("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", false)?;
        let ports = Ports {
            admin: port("proxyAdminPort", proxy_config.proxy_admin_port)?,
            status: port("statusPort", proxy_config.status_port)?,
            health: env.number("ENVOY_STATUS_PORT", 15021)?,
            prometheus: env.number("ENVOY_PROMETHEUS_PORT", 15090)?,
            secure_metrics: env.number("ENVOY_SECURE_METRICS_PORT", 0)?,
            secure_merged_metrics: env.number("ENVOY_SECURE_MERGED_METRICS_PORT", 0)?,
        };
        let discovery = discovery(env, &root, &proxy_config)?;
        let node = node::node(
            &node::Facts {
                role: flags.role,
                addresses: &addresses,
                pod_name: &pod_name,
                namespace: &namespace,
                domain: &domain,
                service_account: &service_account,
                labels: &labels,
                annotations: &annotations,
                proxy_config: &config_json,
                status_port: ports.health,
                prometheus_port: ports.prometheus,
                exit_on_zero_active_connections: exit_on_zero,
                pilot_san: match discovery.roots {
                    Roots::Plaintext => "",
                    _ => &discovery.server_name,
                },
                outlier_log_path: flags.outlier_log_path.as_deref(),
                stock_envoy: flags.proxy == DataPlane::Envoy && proxy_config.binary_path != ISTIO_ENVOY,
                own_proxy: flags.proxy == DataPlane::Outrigger,
            },
            env,
        );
        let probe_destination = probe_destination(env, &addresses)?;
        let certificates = if namespace.is_empty() && !env.flag("FILE_MOUNTED_CERTS", false)? {
            bail!("POD_NAMESPACE is not set: without a namespace there is no identity to ask for");
        } else {
            let workload = (trust_domain.as_str(), namespace.as_str(), service_account.as_str());
            certificates(env, &root, &discovery, &proxy_config, workload)?
        };
        let duration = |d: Option<istio_api::Duration>, default: u64| {
            d.and_then(istio_api::Duration::to_std).unwrap_or(Duration::from_secs(default))
        };
        let drain = Drain {
            listeners: duration(proxy_config.drain_duration, 45),
            termination: duration(proxy_config.termination_drain_duration, 5),
            minimum: env.duration("MINIMUM_DRAIN_DURATION", Duration::from_secs(5))?,
            exit_on_zero,
            deadline: match env.number("OUTRIGGER_TERMINATION_GRACE_SECONDS", 0)? {
                0 => None,
                grace => Some(Duration::from_secs(grace).saturating_sub(GRACE_RESERVE).max(GRACE_RESERVE)),
            },
        };
        Ok(Settings {
            role: flags.role,
            data_plane: flags.proxy,
            registers: registers(&node),
            node,
            discovery,
            certificates,
            rotation: Rotation {
                grace_ratio: ratio("SECRET_GRACE_PERIOD_RATIO", env.number("SECRET_GRACE_PERIOD_RATIO", 0.5)?)?,
                jitter_ratio: ratio(
                    "SECRET_GRACE_PERIOD_RATIO_JITTER",
                    env.number("SECRET_GRACE_PERIOD_RATIO_JITTER", 0.01)?,
                )?,
            },
            output_certs: env.get("OUTPUT_CERTS").map(PathBuf::from),
            ports,
            drain,
            dns: dns(env, &root, &config_json, flags.role)?,
            probers: Probers::parse(env.get("ISTIO_KUBE_APP_PROBERS"), probe_destination)?,
            probe_destination,
            scrape: match (flags.role, env.get("ISTIO_PROMETHEUS_ANNOTATIONS")) {
                (Role::Sidecar, Some(text)) => Scrape::parse(text, ports.status)?,
                _ => None,
            },
            metrics_localhost_only: env.flag("METRICS_LOCALHOST_ACCESS_ONLY", false)?,
            concurrency: match proxy_config.concurrency {
                Some(threads) => usize::try_from(threads).context("concurrency is negative")?,
                // A thread per CPU of the limit, not of the machine: more would only be throttled.
                None => env.number("ISTIO_CPU_LIMIT", 0)?,
            },
            proxy_config,
            proxy_log_level: flags.proxy_log_level.clone(),
            proxy_component_log_level: flags.proxy_component_log_level.clone(),
            template_file: flags.template_file.clone(),
            outlier_log_path: flags.outlier_log_path.clone(),
            envoy: match flags.proxy {
                DataPlane::Envoy => envoy_options(env, annotations, config_json, flags)?,
                DataPlane::Outrigger => EnvoyOptions::default(),
            },
            addresses,
            namespace,
            domain,
            root,
        })
    }
}

fn envoy_options(
    env: &Environment,
    annotations: BTreeMap<String, String>,
    config: Value,
    flags: &ProxyFlags,
) -> anyhow::Result<EnvoyOptions> {
    Ok(EnvoyOptions {
        config,
        annotations,
        log_json: flags.log_json,
        bootstrap_override: env.get("ISTIO_BOOTSTRAP_OVERRIDE").map(PathBuf::from),
        host_ip: env.or("HOST_IP", ""),
        core_dump: env.flag("ISTIO_ENVOY_ENABLE_CORE_DUMP", false)?,
        // DIFFERS: true in Istio, whose Envoy knows the flag; a stock one does not start with it.
        skip_deprecated_logs: env.flag("ENVOY_SKIP_DEPRECATED_LOGS", false)?,
        status_proxy_protocol: env.flag("ENVOY_STATUS_PORT_ENABLE_PROXY_PROTOCOL", false)?,
        strip_fragment: env.flag("HTTP_STRIP_FRAGMENT_FROM_PATH_UNSAFE_IF_DISABLED", true)?,
        dual_stack: env.flag("ISTIO_DUAL_STACK", false)?,
        self_discovery: env.flag("ISTIO_META_ENABLE_SELF_DISCOVERY", false)?,
    })
}

fn merged_config(
    flags: &ProxyFlags,
    env: &Environment,
    annotations: &BTreeMap<String, String>,
) -> anyhow::Result<(istio_api::MeshProxyConfig, Value)> {
    let mesh_file = match std::fs::read_to_string(&flags.mesh_config) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            return Err(error)
                .with_context(|| format!("mesh configuration {} cannot be read", flags.mesh_config.display()));
        }
    };
    let sources = Sources {
        mesh_file: mesh_file.as_deref(),
        environment: env.get("PROXY_CONFIG"),
        annotation: annotations.get("proxy.istio.io/config").map(String::as_str),
    };
    Ok(proxy_config::merge(sources)?)
}

/// Flags over configuration, then the two annotations over all. Source: `pilot/cmd/pilot-agent/config/config.go`, `ConstructProxyConfig`.
fn apply_older_flags(
    flags: &ProxyFlags,
    annotations: &BTreeMap<String, String>,
    config: &mut istio_api::MeshProxyConfig,
    config_json: &mut Value,
) -> anyhow::Result<()> {
    let older = &flags.older;
    let mut over = serde_json::Map::new();
    let text = [
        ("configPath", &older.config_path),
        ("binaryPath", &older.binary_path),
        ("drainDuration", &older.drain_duration),
        ("discoveryAddress", &older.discovery_address),
        ("controlPlaneAuthPolicy", &older.control_plane_auth_policy),
    ];
    over.extend(text.into_iter().filter_map(|(name, value)| Some((name.to_owned(), Value::from(value.as_deref()?)))));
    let numbers = [
        ("proxyAdminPort", older.proxy_admin_port),
        ("statusPort", older.status_port),
        ("concurrency", flags.concurrency),
    ];
    over.extend(
        numbers
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), Value::from(value.filter(|v| *v != 0)?)))),
    );
    if let Some(address) = &older.zipkin_address {
        over.insert("tracing".to_owned(), serde_json::json!({ "zipkin": { "address": address } }));
    }
    if let Some(cluster) =
        flags.service_cluster.as_ref().filter(|_| config.service_cluster.as_deref().is_none_or(|c| c == "istio-proxy"))
    {
        over.insert("serviceCluster".to_owned(), cluster.as_str().into());
    }
    if let Some(address) = annotations.get("sidecar.istio.io/discoveryAddress") {
        over.insert("discoveryAddress".to_owned(), address.as_str().into());
    }
    if let Some(port) = annotations.get("status.sidecar.istio.io/port") {
        let port: i32 = port
            .parse()
            .with_context(|| format!("annotation status.sidecar.istio.io/port: {port:?} is not a number"))?;
        over.insert("statusPort".to_owned(), port.into());
    }
    if let Value::Object(fields) = &mut *config_json {
        fields.extend(over);
    }
    *config = serde_json::from_value(config_json.clone()).context("flags of older releases")?;
    let wrong = config.validate().into_iter().filter(|fault| fault.severity == istio_api::Severity::Error);
    let wrong: Vec<String> = wrong.map(|fault| format!("{}: {}", fault.path, fault.message)).collect();
    if wrong.is_empty() { Ok(()) } else { bail!("the proxy configuration is not usable: {}", wrong.join("; ")) }
}

fn discovery(env: &Environment, root: &Root, config: &istio_api::MeshProxyConfig) -> anyhow::Result<Discovery> {
    let address = config.discovery_address.clone();
    let (host, port) =
        address.rsplit_once(':').with_context(|| format!("discovery address {address:?} is not HOST:PORT"))?;
    port.parse::<u16>().with_context(|| format!("discovery address {address:?} is not HOST:PORT"))?;
    let server_name = match env.get("ISTIOD_SAN") {
        Some(name) => name.to_owned(),
        // As `GetPilotSan`: for a control plane on this machine the certificate is still istiod's.
        None if host == "localhost" => "istiod.istio-system.svc".to_owned(),
        None => host.trim_matches(['[', ']']).to_owned(),
    };
    let plaintext =
        config.control_plane_auth_policy == istio_api::mesh_proxy::AuthenticationPolicy::None || port == "15010";
    let roots = if plaintext { Roots::Plaintext } else { control_plane_roots(env, root, "XDS_ROOT_CA") };
    let token = token_file(env, root);
    Ok(Discovery {
        address,
        server_name,
        roots,
        delta: env.flag("ISTIO_DELTA_XDS", true)?,
        token: token.exists().then_some(token),
    })
}

/// Where pods have it mounted, or where `outrigger join` keeps it.
fn token_file(env: &Environment, root: &Root) -> PathBuf {
    env.get("OUTRIGGER_TOKEN_FILE").map_or_else(|| root.path(TOKEN), PathBuf::from)
}

fn headers(env: &Environment, prefix: &str) -> Vec<(String, String)> {
    env.with_prefix(prefix).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The file that verifies the control plane. Source: istio `pkg/istio-agent/agent.go`, `FindRootCAForXDS`, `FindRootCAForCA`.
fn control_plane_roots(env: &Environment, root: &Root, variable: &str) -> Roots {
    if let Some(path) = env.get(variable) {
        return Roots::File(if path == "SYSTEM" { root.path(SYSTEM_ROOTS) } else { PathBuf::from(path) });
    }
    if let Some(dir) = env.get("PROV_CERT") {
        return Roots::File(Path::new(dir).join("root-cert.pem"));
    }
    match env.get("PILOT_CERT_PROVIDER") {
        Some("kubernetes") => Roots::File(root.path(KUBERNETES_ROOT)),
        Some("custom") => Roots::File(root.path(MOUNTED_CERTS).join("root-cert.pem")),
        _ => Roots::File(root.path(ISTIOD_ROOT)),
    }
}

fn certificates(
    env: &Environment,
    root: &Root,
    discovery: &Discovery,
    config: &istio_api::MeshProxyConfig,
    (trust_domain, namespace, service_account): (&str, &str, &str),
) -> anyhow::Result<Source> {
    let prov_cert = env.get("PROV_CERT");
    if env.flag("FILE_MOUNTED_CERTS", false)? {
        if prov_cert.is_some() {
            bail!("PROV_CERT and FILE_MOUNTED_CERTS exclude each other");
        }
        return Ok(Source::Files(Files::in_dir(&root.path(MOUNTED_CERTS))));
    }
    // A workload certificate mounted where Istio looks for one is used without asking.
    // Source: istio `pkg/istio-agent/agent.go`, `initSdsServer`.
    let workload_credentials = root.path(WORKLOAD_CERTS);
    let workload = Files {
        chain: workload_credentials.join("certificates.pem"),
        key: workload_credentials.join("private_key.pem"),
        roots: workload_credentials.join("ca_certificates.pem"),
    };
    for mounted in [Files::in_dir(&workload_credentials), workload, Files::in_dir(&root.path(MOUNTED_CERTS))] {
        if mounted.exist() {
            return Ok(Source::Files(mounted));
        }
    }
    let address = env.or("CA_ADDR", &discovery.address);
    let plaintext =
        address.ends_with(":15010") || (env.get("CA_ADDR").is_none() && matches!(discovery.roots, Roots::Plaintext));
    let server_name = if env.get("CA_ADDR").is_none() || address == discovery.address {
        Some(discovery.server_name.clone())
    } else {
        None
    };
    let token = Some(token_file(env, root)).filter(|_| env.or("JWT_POLICY", "third-party-jwt") != "none");
    let key = match (env.get("ECC_SIGNATURE_ALGORITHM"), env.get("ECC_CURVE"), env.get("WORKLOAD_RSA_KEY_SIZE")) {
        (Some(_), Some("P384"), _) => KeyKind::EcdsaP384,
        // Asked for RSA by naming its size.
        (None, _, Some(_)) => KeyKind::Rsa(env.number("WORKLOAD_RSA_KEY_SIZE", 2048)?),
        _ => KeyKind::EcdsaP256,
    };
    let identity = SpiffeId::new(trust_domain, namespace, service_account).context("the workload's identity")?;
    Ok(Source::Authority(Box::new(Authority {
        address,
        server_name,
        roots: if plaintext { Roots::Plaintext } else { control_plane_roots(env, root, "CA_ROOT_CA") },
        token,
        identity,
        ttl: env.duration("SECRET_TTL", Duration::from_secs(24 * 3600))?,
        key,
        trust_bundle: config.ca_certificates_pem.clone(),
        cluster_id: env.or("ISTIO_META_CLUSTER_ID", "Kubernetes"),
        headers: headers(env, "CA_HEADER_"),
        provisioned: prov_cert.map(|dir| Files::in_dir(Path::new(dir))),
        cert_signer: env.get("ISTIO_META_CERT_SIGNER").map(str::to_owned),
    })))
}

fn dns(env: &Environment, root: &Root, config: &Value, role: Role) -> anyhow::Result<Option<Dns>> {
    let metadata =
        |name: &str| config.get("proxyMetadata").and_then(|m| m.get(name)).and_then(Value::as_str) == Some("true");
    let capture = env.flag("ISTIO_META_DNS_CAPTURE", metadata("ISTIO_META_DNS_CAPTURE"))?;
    let gateway =
        role == Role::Router && env.flag("ISTIO_META_ENABLE_DNS_SERVER", metadata("ISTIO_META_ENABLE_DNS_SERVER"))?;
    if !capture && !gateway {
        return Ok(None);
    }
    let address = env.or("DNS_PROXY_ADDR", "localhost:15053");
    let addresses = match address.strip_prefix("localhost:") {
        Some(port) => {
            let port: u16 = port.parse().with_context(|| format!("DNS_PROXY_ADDR {address:?} is not HOST:PORT"))?;
            vec![SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port))]
        }
        None => vec![address.parse().with_context(|| format!("DNS_PROXY_ADDR {address:?} is not HOST:PORT"))?],
    };
    // With DNS on port 53 itself, resolv.conf points at us; the original is kept beside our data.
    let kept = root.path("/var/lib/istio/resolv.conf");
    let own = addresses.iter().any(|a| a.port() == 53) && kept.exists();
    Ok(Some(Dns {
        addresses,
        parallel: env.flag("DNS_FORWARD_PARALLEL", false)?,
        timeout: env.duration("DNS_FORWARD_TIMEOUT", Duration::from_secs(5))?,
        resolv_conf: if own { kept } else { root.path("/etc/resolv.conf") },
    }))
}

/// The pod's address first, then all others of the interfaces that are up, as istio's `initProxy` lists them.
fn addresses(instance_ip: Option<&str>, excluded_interfaces: &str) -> Vec<IpAddr> {
    let own: Vec<IpAddr> = instance_ip.and_then(|ip| ip.parse().ok()).into_iter().collect();
    let (mut others, excluded) = match interface_addresses(excluded_interfaces) {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "the interfaces' addresses cannot be listed");
            Default::default()
        }
    };
    if others.is_empty() {
        others = vec![IpAddr::from([127, 0, 0, 1]), IpAddr::from(std::net::Ipv6Addr::LOCALHOST)];
    }
    others.retain(|ip| !own.contains(ip) && !excluded.contains(ip));
    let found = [own, others].concat();
    if found.is_empty() { vec![IpAddr::from([127, 0, 0, 1])] } else { found }
}

/// The addresses that lead out, and those of the interfaces that are named.
fn interface_addresses(excluded: &str) -> Result<(Vec<IpAddr>, Vec<IpAddr>), netns::Error> {
    let mut netlink = netns::Netlink::open()?;
    let addresses = netlink.addrs()?;
    let (mut found, mut left_out) = (Vec::new(), Vec::new());
    for link in netlink.links()? {
        let local = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_unspecified(),
            IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified(),
        };
        let own = addresses.iter().filter(|address| address.index == link.index);
        let own = own.map(|address| address.ip.to_canonical()).filter(|ip| !local(ip));
        if excluded.split(',').any(|name| name == link.name) {
            left_out.extend(own.clone());
        }
        if link.up && !link.loopback {
            found.extend(own);
        }
    }
    Ok((found, left_out))
}

fn registers(node: &core::Node) -> bool {
    let fields = node.metadata.as_ref().map(|metadata| &metadata.fields);
    ["AUTO_REGISTER_GROUP", "WORKLOAD_ENTRY"].iter().any(|name| fields.is_some_and(|fields| fields.contains_key(*name)))
}

fn probe_destination(env: &Environment, addresses: &[IpAddr]) -> anyhow::Result<IpAddr> {
    let legacy = env.flag("REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION", false)?;
    let first = addresses.first().copied().unwrap_or(IpAddr::from([127, 0, 0, 1]));
    Ok(match (legacy, first) {
        (false, ip) => ip,
        (true, IpAddr::V4(_)) => IpAddr::from([127, 0, 0, 1]),
        (true, IpAddr::V6(_)) => IpAddr::from(std::net::Ipv6Addr::LOCALHOST),
    })
}

fn port(name: &str, value: i32) -> anyhow::Result<u16> {
    u16::try_from(value).with_context(|| format!("{name} {value} is not a port"))
}

fn ratio(name: &str, value: f64) -> anyhow::Result<f64> {
    if (0.0..=1.0).contains(&value) { Ok(value) } else { bail!("{name} {value} is not between 0 and 1") }
}
