//! `outrigger explain`.

use std::collections::{BTreeMap, HashMap};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};

use crate::configuration::Resources;
use crate::mesh::Mesh;
use crate::request::{Request, Url};
use crate::text::Paint;
use crate::trace::Explanation;
use crate::{Configuration, Files, Sources, calls, past, text, walk};

/// Where a request goes, and why.
///
/// Every decision on the way is the proxy's own: name, capture, listener, filter chain, virtual host, route and why those before it
/// did not apply, cluster, endpoints, timeouts and retries, mutual TLS with both identities, authorization; each with the object and
/// the line it comes from.
///
/// Asked are files (--input), else the running mesh; or one proxy's own configuration (--live, --config-dump, --admin).
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger explain -f samples/bookinfo --from productpage GET http://reviews:9080/reviews/0 -H 'end-user: jason'
  outrigger explain -f samples/bookinfo --to ratings --from reviews GET http://ratings:9080/ratings/0
  outrigger explain --from productpage GET http://reviews:9080/reviews/0        (of the running mesh)
  outrigger explain --request-id latest                                         (what a request did a moment ago)
  outrigger explain --config-dump dump.json GET http://reviews:9080/            (of any Envoy)")]
pub struct Args {
    #[command(flatten)]
    sources: Sources,
    /// The pod that sends the request: its name, the beginning of it, its workload or its `app` label, with `.NAMESPACE` if need be
    #[arg(long, value_name = "POD")]
    from: Option<String>,
    /// The pod that gets it: only what happens there is explained
    #[arg(long, value_name = "POD")]
    to: Option<String>,
    /// Explain what a request of the recent past really did, by its x-request-id, or `latest`; with --from or --to only at that pod
    #[arg(long, value_name = "ID", conflicts_with_all = ["input", "calls", "requests", "config_dump", "request"])]
    request_id: Option<String>,
    /// A proxy's own configuration: what Envoy or ours answers to /config_dump?include_eds; - reads standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input", "calls"])]
    config_dump: Option<PathBuf>,
    /// The same from a proxy's admin port
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with_all = ["input", "calls", "config_dump"])]
    admin: Option<String>,
    /// What a control plane, ours or istiod, sends to the pod's proxy: the address of its monitoring port, 15014; the pod is named
    /// NAME.NAMESPACE
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with_all = ["input", "calls", "config_dump", "admin"])]
    control_plane: Option<String>,
    /// Of the running mesh, the configuration that the pod's proxy holds at this moment
    #[arg(long, conflicts_with_all = ["input", "calls", "config_dump", "admin", "control_plane"])]
    live: bool,
    /// With --config-dump or --admin: the request comes to the pod, instead of leaving it
    #[arg(long)]
    inbound: bool,
    /// Name of the running mesh that is asked where there is no --input
    #[arg(long, alias = "name", default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
    /// Answer all calls of a file at once, in the form of Istio's request simulator
    #[arg(long, value_name = "FILE", requires = "proxy")]
    calls: Option<PathBuf>,
    /// Explain all requests of a file: a YAML or JSON list of {url, method, headers, from, to, port, http2, tls, seed}, where what is
    /// left out is as on the command line
    #[arg(long, value_name = "FILE", conflicts_with_all = ["calls", "request", "config_dump", "admin", "control_plane", "live"])]
    requests: Option<PathBuf>,
    /// Method and URL, or the URL alone; schemes are http, https, tcp and tls
    #[arg(value_name = "[METHOD] URL", num_args = 0..=2)]
    request: Vec<String>,
    /// A header of the request, several times
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// Port, over that of the URL
    #[arg(long)]
    port: Option<u16>,
    /// The application speaks HTTP/2
    #[arg(long)]
    http2: bool,
    /// TLS of the connection that reaches --to
    #[arg(long, value_enum, default_value_t = Tls::Auto)]
    tls: Tls,
    /// Weights, shares and endpoints are drawn by this number
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How the answer is written
    #[arg(long, short = 'o', value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// What a client does that reaches a pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Tls {
    /// Mutual, if it has a sidecar.
    Auto,
    /// Mutual.
    Mutual,
    /// None.
    Plaintext,
}

/// How an answer is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Runs the command.
///
/// # Errors
/// When the input cannot be read, or does not say what is asked about.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(id) = &args.request_id {
        let pod = args.from.as_deref().or(args.to.as_deref());
        let explanation = past::explain(id, &past::Whose { mesh: &args.mesh, pod, admin: args.admin.as_deref() })?;
        return write(&explanation, args.output);
    }
    if args.config_dump.is_some() || args.admin.is_some() || args.control_plane.is_some() || args.live {
        return of_proxy(args);
    }
    let files = match args.sources.input.is_empty() {
        true => Files::running(&args.mesh, &args.sources)?,
        false => Files::load(&args.sources, args.calls.is_none())?,
    };
    for error in &files.refused {
        eprintln!("warning: {error}");
    }
    if let Some(path) = &args.calls {
        return many(&files, path);
    }
    let mesh = Mesh::new(files)?;
    let Some(path) = &args.requests else {
        return write(&explain(&mesh, &Asked::of(args)?, args)?, args.output);
    };
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let all: Vec<Asked> = serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?;
    let explained = all.iter().enumerate().map(|(index, asked)| {
        explain(&mesh, asked, args).with_context(|| format!("{}: request {}", path.display(), index + 1))
    });
    let explained: Vec<Explanation> = explained.collect::<anyhow::Result<_>>()?;
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&explained)?),
        Output::Text => explained.iter().for_each(|explanation| println!("{}", text::render(explanation, paint()))),
    }
    Ok(ExitCode::SUCCESS)
}

/// One request as it is asked about; what is missing is as the command line says.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    url: String,
    #[serde(default = "get")]
    method: String,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    from: Option<String>,
    to: Option<String>,
    port: Option<u16>,
    #[serde(default)]
    http2: bool,
    tls: Option<Tls>,
    seed: Option<u64>,
}

fn get() -> String {
    "GET".to_owned()
}

impl Asked {
    /// What the command line asks.
    fn of(args: &Args) -> anyhow::Result<Self> {
        let (method, url) = match args.request.as_slice() {
            [url] => (get(), url),
            [method, url] => (method.clone(), url),
            _ => bail!("say what is asked: [METHOD] URL"),
        };
        let headers = args.header.iter().map(|header| {
            let (name, value) =
                header.split_once(':').ok_or_else(|| anyhow!("header {header:?} is not NAME: VALUE"))?;
            Ok((name.trim().to_owned(), value.trim().to_owned()))
        });
        Ok(Self {
            url: url.clone(),
            method,
            headers: headers.collect::<anyhow::Result<_>>()?,
            from: None,
            to: None,
            port: args.port,
            http2: args.http2,
            tls: None,
            seed: None,
        })
    }

    fn request(&self) -> anyhow::Result<Request> {
        let mut url: Url = self.url.parse().map_err(|error| anyhow!("URL: {error}"))?;
        url.port = self.port.unwrap_or(url.port);
        Ok(Request {
            method: self.method.to_ascii_uppercase(),
            url,
            headers: self.headers.clone().into_iter().collect(),
            http2: self.http2,
        })
    }
}

fn explain(mesh: &Mesh, asked: &Asked, args: &Args) -> anyhow::Result<Explanation> {
    let request = asked.request()?;
    let seed = asked.seed.unwrap_or(args.seed);
    let from = asked.from.as_deref().or(args.from.as_deref()).map(|name| mesh.pod(name)).transpose()?;
    Ok(match (asked.to.as_deref().or(args.to.as_deref()), &from) {
        (Some(to), _) => {
            let mutual = match asked.tls.unwrap_or(args.tls) {
                Tls::Auto => from.as_ref().is_some_and(|pod| pod.has_sidecar),
                Tls::Mutual => true,
                Tls::Plaintext => false,
            };
            walk::to_pod(mesh, &mesh.pod(to)?, from.as_deref(), &request, mutual, seed)
        }
        (None, Some(from)) => walk::from_pod(mesh, from, &request, seed),
        (None, None) => bail!("say where the request comes from (--from POD), or where it goes to (--to POD)"),
    })
}

/// Asks one proxy's own configuration: out of a file, from its admin port, from its control plane, or of a pod of a running mesh.
fn of_proxy(args: &Args) -> anyhow::Result<ExitCode> {
    let target = |pod: Option<&String>| inspect::Target {
        namespace: None,
        pod: pod.cloned(),
        file: args.config_dump.clone(),
        mesh: args.mesh.clone(),
    };
    let (dump, inbound) = match (&args.admin, args.config_dump.is_some(), &args.from, &args.to) {
        (Some(address), ..) => (inspect::Dump::of_admin(address)?, args.inbound),
        _ if args.control_plane.is_some() => {
            let (pod, inbound) = match (&args.from, &args.to) {
                (_, Some(to)) => (to, true),
                (Some(from), None) => (from, false),
                (None, None) => bail!("say which proxy is asked about: --from NAME.NAMESPACE or --to NAME.NAMESPACE"),
            };
            let mut dump = inspect::Dump::of_control_plane(args.control_plane.as_deref().unwrap_or_default(), pod)?;
            dump.name.clone_from(pod);
            (dump, inbound)
        }
        (None, true, ..) => (target(None).dump()?, args.inbound),
        (None, false, Some(from), None) => (target(Some(from)).dump()?, false),
        (None, false, _, Some(to)) => (target(Some(to)).dump()?, true),
        (None, false, None, None) => {
            bail!("say where the request comes from (--from POD), or where it goes to (--to POD)")
        }
    };
    let (name, address) = (dump.name.clone(), dump.address.parse().ok());
    let configuration = Configuration::new(Resources {
        listeners: dump.listeners,
        routes: dump.routes,
        clusters: dump.clusters,
        endpoints: dump.endpoints,
    });
    let request = Asked::of(args)?.request()?;
    write(&walk::at_proxy(&configuration, &name, address, &request, inbound, args.seed), args.output)
}

fn paint() -> Paint {
    let wanted = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if wanted { Paint::Colour } else { Paint::Plain }
}

fn write(explanation: &Explanation, output: Output) -> anyhow::Result<ExitCode> {
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(explanation)?),
        Output::Text => print!("{}", text::render(explanation, paint())),
    }
    Ok(ExitCode::SUCCESS)
}

fn many(files: &Files, path: &std::path::Path) -> anyhow::Result<ExitCode> {
    let mut configurations: HashMap<&str, Configuration> = HashMap::new();
    let mut answers = Vec::new();
    for entry in &calls::read(path)? {
        let node = match &entry.proxy {
            None => files.proxies.first().ok_or_else(|| anyhow!("--calls needs --proxy"))?,
            Some(name) => {
                let found = files.proxies.iter().find(|node| *node.name == **name);
                found.ok_or_else(|| anyhow!("no proxy {name} in --proxy"))?
            }
        };
        let configuration = configurations.entry(&node.name).or_insert_with(|| {
            let configuration = Configuration::new(Resources::of_node(&files.push, node));
            for error in &configuration.rejected {
                eprintln!("warning: proxy {} would refuse {error}", node.name);
            }
            configuration
        });
        answers.push(calls::answer(entry, configuration)?);
    }
    println!("{}", serde_json::to_string_pretty(&answers)?);
    Ok(ExitCode::SUCCESS)
}
