//! `outrigger analyze`: istioctl's arguments, output and exit codes.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{ArgAction, Parser, ValueEnum};
use istio_api::MeshConfig;
use manifest::Document;

use crate::checks;
use crate::message::{Level, Message, documentation};

/// As istioctl's: issues were found.
const FOUND_ISSUES: u8 = 79;
/// As istioctl's: an input cannot be parsed.
const BAD_INPUT: u8 = 65;

/// Look for faults in the configuration of a mesh, and say what each is.
///
/// In files, in a cluster, or in a cluster as it would be with the files applied.
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Examples:
  outrigger analyze --use-kube=false samples/bookinfo/bookinfo.yaml samples/bookinfo/networking/canary.yaml
  outrigger analyze --all-namespaces
  outrigger analyze -S \"IST0103=Pod testing/*\" my-change.yaml")]
pub struct AnalyzeArgs {
    /// Files, folders with everything below them, or `-` for standard input.
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Whether to look at what the cluster holds, too.
    #[arg(short = 'k', long, default_value_t = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set)]
    use_kube: bool,
    /// Kubeconfig of the API server; without, the pod's service account, or KUBECONFIG and ~/.kube/config.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// The namespace that is looked at, and that objects without one are of.
    #[arg(short, long, value_name = "NAME", default_value = "default")]
    namespace: String,
    /// Look at all namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Namespace of the control plane.
    #[arg(short = 'i', long = "istioNamespace", value_name = "NAME", default_value = "istio-system")]
    istio_namespace: String,
    /// MeshConfig over the built-in defaults, in place of the cluster's.
    #[arg(long = "meshConfigFile", alias = "mesh-config", value_name = "FILE")]
    mesh_config: Option<PathBuf>,
    /// How the findings are written.
    #[arg(short, long, value_enum, ignore_case = true, default_value_t = Format::Log)]
    output: Format,
    /// Exit with 79 when anything is found that is as bad as this.
    #[arg(long, value_enum, ignore_case = true, default_value_t = Level::Error)]
    failure_threshold: Level,
    /// Write only what is as bad as this.
    #[arg(long, value_enum, ignore_case = true, default_value_t = Level::Info)]
    output_threshold: Level,
    /// Leave out a code of an object, `IST0103=Pod testing/*`; again for more.
    #[arg(short = 'S', long, value_name = "CODE=OBJECT", value_parser = Suppression::parse)]
    suppress: Vec<Suppression>,
    /// Only this check; again for more.
    #[arg(long, value_name = "NAME")]
    analyzer: Vec<String>,
    /// List the checks and do nothing else.
    #[arg(short = 'L', long)]
    list_analyzers: bool,
    /// Inputs that cannot be parsed are no reason to fail.
    #[arg(long)]
    ignore_unknown: bool,
    /// Whether levels are coloured; on terminals unless said otherwise.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    color: Option<bool>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Format {
    Log,
    Json,
    Yaml,
}

/// What not to tell.
#[derive(Clone, Debug)]
struct Suppression {
    code: String,
    /// `Pod testing/*`.
    object: String,
}

impl Suppression {
    fn parse(text: &str) -> Result<Suppression, String> {
        let (code, object) = text.split_once('=').ok_or("expected CODE=OBJECT, such as IST0103=Pod testing/mypod")?;
        Ok(Suppression { code: code.to_owned(), object: object.to_owned() })
    }

    fn covers(&self, message: &Message) -> bool {
        self.code == message.code && glob(&self.object, &message.subject.to_string())
    }
}

/// Whether a pattern with `*` for any text fits.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(text) = text.strip_prefix(start) else { return false };
    let starts = text.char_indices().map(|(at, _)| at).chain([text.len()]);
    starts.into_iter().any(|at| glob(rest, &text[at..]))
}

/// Finds what is wrong and writes it.
///
/// # Errors
/// When a file is missing, or the cluster cannot be asked.
pub fn run(args: &AnalyzeArgs) -> anyhow::Result<ExitCode> {
    if args.list_analyzers {
        for (name, _) in checks::ALL {
            println!("* {name}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (files, unreadable) = manifest::read(&listed(&args.files)?);
    for error in &unreadable {
        eprintln!("Error(s) adding files: {error}");
    }
    let mut mesh = None;
    let mut documents = Vec::new();
    if args.use_kube {
        let cluster = of_cluster(args)?;
        mesh = mesh_of(&cluster, &args.istio_namespace)?;
        documents = cluster;
    } else if args.files.is_empty() {
        anyhow::bail!("at least one file and/or Kubernetes source must be provided");
    }
    if let Some(path) = &args.mesh_config {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        mesh = Some(MeshConfig::load(path, &text)?);
    }
    let mesh = mesh.unwrap_or_else(MeshConfig::builtin);
    let documents = applied(documents, files, &args.namespace);
    let found = findings(args, &documents, &mesh);
    write(args, &found)?;
    let target = match args.all_namespaces {
        true => "all namespaces".to_owned(),
        false => format!("namespace: {}", args.namespace),
    };
    if !found.iter().any(|message| message.level <= args.output_threshold) {
        none_found(args, &target, unreadable.len());
    }
    // As istioctl: only who reads the log is told by the exit code.
    if args.output == Format::Log {
        if found.iter().any(|message| message.level <= args.failure_threshold) {
            eprintln!("Error: Analyzers found issues when analyzing {target}.");
            eprintln!("See {} for more information about causes and resolutions.", documentation());
            return Ok(FOUND_ISSUES.into());
        }
        if !unreadable.is_empty() && !args.ignore_unknown {
            eprintln!("Error: Some files couldn't be parsed.");
            return Ok(BAD_INPUT.into());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn none_found(args: &AnalyzeArgs, target: &str, unreadable: usize) {
    let files: Vec<String> = args.files.iter().map(|file| file.display().to_string()).collect();
    match (&files[..], unreadable) {
        (_, 1..) => {
            let files = if unreadable == 1 { "file" } else { "files" };
            let count = unreadable;
            eprintln!("No validation issues found when analyzing {target} (but {count} {files} could not be parsed).");
        }
        ([], _) => eprintln!("\u{2714} No validation issues found when analyzing {target}."),
        ([only], _) => eprintln!("\u{2714} No validation issues found when analyzing {only}."),
        (several, _) => {
            eprintln!("\u{2714} No validation issues found when analyzing:\n  - {}", several.join("\n  - "));
        }
    }
}

fn findings(args: &AnalyzeArgs, documents: &[Document], mesh: &MeshConfig) -> Vec<Message> {
    let mut found = match args.analyzer.is_empty() {
        true => crate::analyze(documents, mesh, &args.namespace),
        false => {
            let chosen = |name: &str| args.analyzer.iter().any(|wanted| wanted == name);
            crate::analyze_some(documents, mesh, &args.namespace, chosen)
        }
    };
    found.retain(|message| {
        let subject = &message.subject;
        // The namespace of a namespace is itself.
        let namespace = if subject.kind == "Namespace" { &subject.name } else { &subject.namespace };
        let wanted = args.all_namespaces || namespace.is_empty() || *namespace == args.namespace;
        wanted && !args.suppress.iter().any(|suppression| suppression.covers(message))
    });
    found
}

fn write(args: &AnalyzeArgs, found: &[Message]) -> anyhow::Result<()> {
    let shown: Vec<&Message> = found.iter().filter(|message| message.level <= args.output_threshold).collect();
    let text = match args.output {
        Format::Log => {
            let dumb = std::env::var_os("TERM").is_some_and(|term| term.eq_ignore_ascii_case("dumb"));
            let colour = args.color.unwrap_or_else(|| !dumb && std::io::stdout().is_terminal());
            let line = |m: &&Message| if colour { m.coloured() } else { m.to_string() };
            shown.iter().map(line).collect::<Vec<_>>().join("\n")
        }
        Format::Json => {
            let list: Vec<_> = shown.iter().map(|message| message.json()).collect();
            tabbed(&list)?
        }
        Format::Yaml => inject::to_yaml(&shown.iter().map(|message| message.json()).collect()),
    };
    println!("{text}");
    Ok(())
}

/// JSON as Go's `MarshalIndent` with tabs.
fn tabbed(list: &[serde_json::Value]) -> anyhow::Result<String> {
    use serde::Serialize;
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    list.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))?;
    Ok(String::from_utf8(out)?)
}

/// Files as given, and those below folders.
fn listed(paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    fn walk(folder: &Path, out: &mut Vec<PathBuf>) -> std::io::Result<()> {
        let mut entries: Vec<PathBuf> =
            std::fs::read_dir(folder)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
        entries.sort();
        for path in entries {
            if path.is_dir() {
                walk(&path, out)?;
            } else {
                take(&path, out);
            }
        }
        Ok(())
    }
    fn take(path: &Path, out: &mut Vec<PathBuf>) {
        const KNOWN: [&str; 3] = ["json", "yaml", "yml"];
        match path.extension().and_then(|extension| extension.to_str()) {
            Some(extension) if KNOWN.contains(&extension) => out.push(path.to_owned()),
            _ => eprintln!("Skipping file {}, recognized file extensions are: [.json .yaml .yml]", path.display()),
        }
    }
    let mut out = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            out.push(path.clone());
        } else if path.is_dir() {
            walk(path, &mut out).with_context(|| format!("cannot read {}", path.display()))?;
        } else if path.exists() {
            take(path, &mut out);
        } else {
            anyhow::bail!("{}: no such file or directory", path.display());
        }
    }
    Ok(out)
}

fn of_cluster(args: &AnalyzeArgs) -> anyhow::Result<Vec<Document>> {
    let options = kube_source::Options { kubeconfig: args.kubeconfig.clone(), context: args.context.clone() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let cluster = kube_source::Cluster::connect(&options)
            .await
            .context("cannot find the cluster; --use-kube=false looks at files only")?;
        cluster.documents().await.context("cannot ask the cluster; --use-kube=false looks at files only")
    })
}

/// The mesh's settings as the cluster holds them.
fn mesh_of(documents: &[Document], namespace: &str) -> anyhow::Result<Option<MeshConfig>> {
    let map = documents.iter().find(|document| {
        document.kind() == "ConfigMap" && document.name() == "istio" && document.namespace() == Some(namespace)
    });
    let text = map.and_then(|map| map.value.pointer("/data/mesh")?.as_str());
    Ok(text.map(|text| MeshConfig::load(Path::new("the ConfigMap istio"), text)).transpose()?)
}

/// The cluster's objects with the files' in their places.
fn applied(cluster: Vec<Document>, files: Vec<Document>, namespace: &str) -> Vec<Document> {
    let mut out: Vec<Document> = Vec::new();
    let mut places: BTreeMap<[String; 4], usize> = BTreeMap::new();
    for document in cluster.into_iter().chain(files) {
        let own = document.namespace().unwrap_or(namespace);
        let key = [document.group(), document.kind(), own, document.name()].map(str::to_owned);
        match places.get(&key) {
            Some(place) => out[*place] = document,
            None => {
                places.insert(key, out.len());
                out.push(document);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_fit_anything() {
        assert!(glob("Pod testing/*", "Pod testing/a") && glob("*", "") && glob("*/b*", "Pod a/bc"));
        assert!(!glob("Pod testing/*", "Pod other/a") && !glob("a", "ab") && !glob("*b", "a"));
    }

    #[test]
    fn files_stand_before_the_cluster() {
        let parse = |text: &str| manifest::parse(Path::new("a.yaml"), text).unwrap();
        let service = |port: u16| {
            format!("apiVersion: v1\nkind: Service\nmetadata: {{name: a}}\nspec: {{ports: [{{port: {port}}}]}}\n")
        };
        let merged = applied(parse(&service(1)), parse(&service(2)), "default");
        assert_eq!(merged.len(), 1);
        assert_eq!(merged[0].value.pointer("/spec/ports/0/port"), Some(&2.into()));
    }
}
