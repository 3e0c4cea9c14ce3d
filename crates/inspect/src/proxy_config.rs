//! `outrigger proxy-config`: istioctl's command of that name.

mod clusters;
mod endpoints;
mod listeners;
mod routes;
mod secrets;

use std::process::ExitCode;

use anyhow::{Context, bail};
use envoy_api::{Message, json, type_url};
use prost_reflect::SerializeOptions;
use serde_json::Value;

use crate::{Dump, Target};

/// Look at what a proxy holds, as `istioctl proxy-config`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger proxy-config routes productpage-v1 --name 9080
  outrigger proxy-config endpoints productpage-v1 --cluster 'outbound|9080||reviews.default.svc.cluster.local'
  outrigger proxy-config listeners -f envoy-dump.json --port 15006")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// Clusters.
    #[command(visible_aliases = ["clusters", "c"])]
    Cluster(Table<ClusterFilter>),
    /// Listeners.
    #[command(visible_aliases = ["listeners", "l"])]
    Listener(Table<ListenerFilter>),
    /// Route tables.
    #[command(visible_aliases = ["routes", "r"])]
    Route(Table<RouteFilter>),
    /// Endpoints.
    #[command(visible_aliases = ["endpoints", "ep", "eds"])]
    Endpoint(Table<EndpointFilter>),
    /// Certificates and roots.
    #[command(visible_aliases = ["secrets", "s"])]
    Secret(Table<NoFilter>),
    /// What the proxy was started with; -o short is the versions alone.
    #[command(visible_aliases = ["b"])]
    Bootstrap(BootstrapArgs),
    /// Filters that are discovered by themselves.
    #[command(visible_aliases = ["ec"])]
    Ecds(Table<NoFilter>),
    /// Everything.
    #[command(visible_aliases = ["a"])]
    All(Table<NoFilter>),
    /// Log levels, and setting them.
    #[command(visible_aliases = ["o"])]
    Log(LogArgs),
}

#[derive(Clone, Debug, clap::Args)]
struct Table<F: clap::Args> {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    filter: F,
    /// How it is written
    #[arg(long, short = 'o', value_enum, default_value_t = Output::Short)]
    output: Output,
}

#[derive(Clone, Debug, clap::Args)]
struct BootstrapArgs {
    #[command(flatten)]
    target: Target,
    /// How it is written; as with istioctl, this one is for programs if nothing is said
    #[arg(long, short = 'o', value_enum, default_value_t = Output::Json)]
    output: Output,
}

/// How an answer is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
enum Output {
    /// As a table.
    #[value(alias = "table")]
    Short,
    /// For programs.
    Json,
    /// For programs and people.
    Yaml,
}

#[derive(Clone, Debug, Default, clap::Args)]
struct NoFilter {}

#[derive(Clone, Debug, Default, clap::Args)]
struct ClusterFilter {
    /// Only clusters whose name has this in it
    #[arg(long)]
    fqdn: Option<String>,
    /// Only clusters of this direction
    #[arg(long, value_name = "inbound|outbound")]
    direction: Option<String>,
    /// Only clusters of this subset
    #[arg(long)]
    subset: Option<String>,
    /// Only clusters of this port
    #[arg(long)]
    port: Option<u16>,
}

#[derive(Clone, Debug, clap::Args)]
struct ListenerFilter {
    /// Only listeners with this address
    #[arg(long)]
    address: Option<String>,
    /// Only listeners of this port
    #[arg(long)]
    port: Option<u32>,
    /// Only listeners of this type
    #[arg(long = "type", value_name = "HTTP|TCP|HTTP+TCP|UNKNOWN")]
    kind: Option<String>,
    /// With matches and destinations
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    verbose: bool,
}

#[derive(Clone, Debug, clap::Args)]
struct RouteFilter {
    /// Only this route table
    #[arg(long)]
    name: Option<String>,
    /// With domains and matches
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    verbose: bool,
}

#[derive(Clone, Debug, Default, clap::Args)]
struct EndpointFilter {
    /// Only endpoints with this address, `IP:PORT`
    #[arg(long)]
    address: Option<String>,
    /// Only endpoints of this port
    #[arg(long)]
    port: Option<u32>,
    /// Only endpoints of this cluster
    #[arg(long)]
    cluster: Option<String>,
    /// Only endpoints of this status
    #[arg(long, value_name = "healthy|unhealthy|…")]
    status: Option<String>,
}

#[derive(Clone, Debug, clap::Args)]
struct LogArgs {
    #[command(flatten)]
    target: Target,
    /// Set levels: one for all, or LOGGER:LEVEL, several by commas
    #[arg(long)]
    level: Option<String>,
    /// Set all levels to warning
    #[arg(long, short = 'r', conflicts_with = "level")]
    reset: bool,
}

/// Runs the command.
///
/// # Errors
/// When the proxy cannot be reached, or the dump is none.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let text = match &args.what {
        What::Cluster(args) => {
            let dump = args.target.dump()?;
            match args.output {
                Output::Short => clusters::table(dump.clusters, &args.filter, false)?,
                form => write(&clusters::select(dump.clusters, &args.filter), type_url::CLUSTER, form)?,
            }
        }
        What::Listener(args) => {
            let dump = args.target.dump()?;
            match args.output {
                Output::Short => listeners::table(dump.listeners, &args.filter, false)?,
                form => write(&listeners::select(dump.listeners, &args.filter), type_url::LISTENER, form)?,
            }
        }
        What::Route(args) => {
            let dump = args.target.dump()?;
            match args.output {
                Output::Short => routes::table(dump.routes, &args.filter, false)?,
                form => write(&routes::select(dump.routes, &args.filter), type_url::ROUTE, form)?,
            }
        }
        What::Endpoint(args) => {
            let dump = args.target.dump()?;
            match args.output {
                Output::Short => endpoints::table(dump.endpoints, &args.filter, false),
                form => write(&endpoints::select(dump.endpoints, &args.filter), type_url::ENDPOINT, form)?,
            }
        }
        What::Secret(args) => {
            let dump = args.target.dump()?;
            match args.output {
                Output::Short => secrets::table(&dump, false)?,
                form => section(&dump, "SecretsConfigDump", form)?,
            }
        }
        What::Bootstrap(args) => {
            let dump = args.target.dump()?;
            match args.output {
                Output::Short => secrets::versions(&dump)?,
                form => section(&dump, "BootstrapConfigDump", form)?,
            }
        }
        What::Ecds(args) => {
            let dump = args.target.dump()?;
            match args.output {
                Output::Short => filters(&dump),
                form => section(&dump, "EcdsConfigDump", form)?,
            }
        }
        What::All(args) => match args.output {
            Output::Short => all(args.target.dump()?)?,
            form => text(&args.target.dump_json()?, form)?,
        },
        What::Log(args) => log(args)?,
    };
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

/// All tables; the first column says what a row is.
fn all(dump: Dump) -> anyhow::Result<String> {
    let listener = ListenerFilter { address: None, port: None, kind: None, verbose: true };
    let route = RouteFilter { name: None, verbose: true };
    let (versions, secrets) = (secrets::versions(&dump)?, secrets::table(&dump, true)?);
    let parts = [
        versions,
        clusters::table(dump.clusters, &ClusterFilter::default(), true)?,
        listeners::table(dump.listeners, &listener, true)?,
        routes::table(dump.routes, &route, true)?,
        secrets,
        endpoints::table(dump.endpoints, &EndpointFilter::default(), true),
    ];
    Ok(parts.join("\n"))
}

fn log(args: &LogArgs) -> anyhow::Result<String> {
    if args.target.pod.is_none() {
        bail!("log needs a pod");
    }
    let ask = |query: String| args.target.ask("POST", &format!("/logging{query}"));
    match (&args.level, args.reset) {
        (None, false) => {}
        (None, true) => drop(ask("?level=warning".to_owned())?),
        (Some(levels), _) => {
            for entry in levels.split(',') {
                let query = match entry.split_once([':', '=']) {
                    Some((logger, level)) => format!("?{logger}={level}"),
                    None => format!("?level={entry}"),
                };
                ask(query)?;
            }
        }
    }
    Ok(String::from_utf8_lossy(&ask(String::new())?).into_owned())
}

/// Messages as a JSON list with lowerCamel names, as istioctl writes them.
fn write<M: Message>(messages: &[M], type_url: &str, form: Output) -> anyhow::Result<String> {
    let options = SerializeOptions::new().stringify_64_bit_integers(true);
    let one = |message: &M| -> anyhow::Result<Value> {
        let dynamic = json::decode(type_url, &message.encode_to_vec())?;
        dynamic.serialize_with_options(serde_json::value::Serializer, &options).context("write JSON")
    };
    text(&Value::Array(messages.iter().map(one).collect::<anyhow::Result<_>>()?), form)
}

/// Filters that are discovered by themselves, by name.
fn filters(dump: &Dump) -> String {
    let filters = dump.section("EcdsConfigDump").and_then(|section| section["ecds_filters"].as_array());
    let mut rows: Vec<[String; 2]> = filters
        .into_iter()
        .flatten()
        .map(|entry| ["/name", "/typed_config/@type"].map(|path| entry["ecds_filter"].pointer(path)))
        .map(|cells| cells.map(|cell| cell.and_then(Value::as_str).unwrap_or_default()))
        .map(|[name, kind]| [name.to_owned(), kind.trim_start_matches("type.googleapis.com/").to_owned()])
        .collect();
    rows.sort();
    let mut table = crate::table::Table::new(5, &["ECDS NAME", "TYPE"]);
    for row in rows {
        table.row(row);
    }
    table.render()
}

fn section(dump: &Dump, kind: &str, form: Output) -> anyhow::Result<String> {
    let section = dump.section(kind).with_context(|| format!("the dump has no {kind}"))?;
    text(section, form)
}

fn text(value: &Value, form: Output) -> anyhow::Result<String> {
    Ok(match form {
        Output::Yaml => serde_saphyr::to_string(value)?,
        Output::Json | Output::Short => format!("{}\n", serde_json::to_string_pretty(value)?),
    })
}

/// The object behind a resource: `reviews.default` for `/apis/networking.istio.io/v1/namespaces/default/virtual-service/reviews`.
fn management(metadata: Option<&envoy_api::core::Metadata>) -> String {
    use envoy_api::wkt::value::Kind;
    let config = metadata
        .and_then(|metadata| metadata.filter_metadata.get("istio"))
        .and_then(|istio| istio.fields.get("config"))
        .and_then(|config| config.kind.as_ref());
    let Some(Kind::StringValue(path)) = config else { return String::new() };
    if !path.starts_with("/apis/networking.istio.io/") {
        return "<unknown>".to_owned();
    }
    match path.split('/').collect::<Vec<_>>()[..] {
        [_, _, _, _, _, namespace, _, name] => format!("{name}.{namespace}"),
        _ => String::new(),
    }
}
