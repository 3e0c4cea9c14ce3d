//! `outrigger explain`.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{anyhow, bail};

use crate::configuration::Resources;
use crate::mesh::Mesh;
use crate::request::{Request, Url};
use crate::text::Paint;
use crate::trace::Explanation;
use crate::{Configuration, Files, Sources, calls, text, walk};

/// Where a request goes, and why.
///
/// Every decision on the way is the proxy's own: name, capture, listener, filter chain, virtual host, route and why those before it
/// did not apply, cluster, endpoints, timeouts and retries, mutual TLS with both identities, authorization; each with the object and
/// the line it comes from.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger explain -f samples/bookinfo --from productpage GET http://reviews:9080/reviews/0 -H 'end-user: jason'
  outrigger explain -f samples/bookinfo --to ratings --from reviews GET http://ratings:9080/ratings/0
  outrigger explain --from productpage GET http://reviews:9080/reviews/0        (of the running mesh)
  outrigger explain --config-dump dump.json GET http://reviews:9080/")]
pub struct Args {
    #[command(flatten)]
    sources: Sources,
    /// The pod that sends the request: its name, the beginning of it, its workload or its `app` label, with `.NAMESPACE` if need be
    #[arg(long, value_name = "POD")]
    from: Option<String>,
    /// The pod that gets it: only what happens there is explained
    #[arg(long, value_name = "POD")]
    to: Option<String>,
    /// A proxy's own configuration: what Envoy or ours answers to /config_dump?include_eds; - reads standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input", "calls"])]
    config_dump: Option<PathBuf>,
    /// With --config-dump: the request comes to the pod, instead of leaving it
    #[arg(long, requires = "config_dump")]
    inbound: bool,
    /// Name of the running mesh that is asked where there is no --input
    #[arg(long, default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
    /// Answer all calls of a file at once, in the form of Istio's request simulator
    #[arg(long, value_name = "FILE", requires = "proxy")]
    calls: Option<PathBuf>,
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
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
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
    if args.sources.input.is_empty() {
        return of_proxy(args);
    }
    let files = Files::load(&args.sources, args.calls.is_none())?;
    for error in &files.refused {
        eprintln!("warning: {error}");
    }
    if let Some(path) = &args.calls {
        return many(&files, path);
    }
    let mesh = Mesh::new(files)?;
    let request = request(args)?;
    let from = args.from.as_deref().map(|name| mesh.pod(name)).transpose()?;
    let explanation = match (&args.to, &from) {
        (Some(to), _) => {
            let mutual = match args.tls {
                Tls::Auto => from.as_ref().is_some_and(|pod| pod.has_sidecar),
                Tls::Mutual => true,
                Tls::Plaintext => false,
            };
            walk::to_pod(&mesh, &mesh.pod(to)?, from.as_deref(), &request, mutual, args.seed)
        }
        (None, Some(from)) => walk::from_pod(&mesh, from, &request, args.seed),
        (None, None) => bail!("say where the request comes from (--from POD), or where it goes to (--to POD)"),
    };
    write(&explanation, args.output)
}

/// Asks one proxy's own configuration: out of a file, or of a pod of a running mesh.
fn of_proxy(args: &Args) -> anyhow::Result<ExitCode> {
    let (pod, inbound) = match (&args.config_dump, &args.from, &args.to) {
        (Some(_), _, _) => (None, args.inbound),
        (None, Some(from), None) => (Some(from.clone()), false),
        (None, _, Some(to)) => (Some(to.clone()), true),
        (None, None, None) => bail!("say where the request comes from (--from POD), or where it goes to (--to POD)"),
    };
    let target = inspect::Target { pod, file: args.config_dump.clone(), mesh: args.mesh.clone() };
    let dump = target.dump()?;
    let name = dump.name.clone();
    let configuration = Configuration::new(Resources {
        listeners: dump.listeners,
        routes: dump.routes,
        clusters: dump.clusters,
        endpoints: dump.endpoints,
    });
    write(&walk::at_proxy(&configuration, &name, "", &request(args)?, inbound, args.seed), args.output)
}

fn request(args: &Args) -> anyhow::Result<Request> {
    let (method, url) = match args.request.as_slice() {
        [url] => ("GET", url),
        [method, url] => (method.as_str(), url),
        _ => bail!("say what is asked: [METHOD] URL"),
    };
    let mut url: Url = url.parse().map_err(|error| anyhow!("URL: {error}"))?;
    url.port = args.port.unwrap_or(url.port);
    let headers = args.header.iter().map(|header| {
        let (name, value) = header.split_once(':').ok_or_else(|| anyhow!("header {header:?} is not NAME: VALUE"))?;
        Ok((name.trim().to_owned(), value.trim().to_owned()))
    });
    Ok(Request {
        method: method.to_ascii_uppercase(),
        url,
        headers: headers.collect::<anyhow::Result<_>>()?,
        http2: args.http2,
    })
}

fn write(explanation: &Explanation, output: Output) -> anyhow::Result<ExitCode> {
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(explanation)?),
        Output::Text => {
            let wanted = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            print!("{}", text::render(explanation, if wanted { Paint::Colour } else { Paint::Plain }));
        }
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
