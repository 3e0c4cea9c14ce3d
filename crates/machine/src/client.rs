//! The commands that talk to a running mesh: `down`, `apply`, `delete`, `ps`, `exec`, `logs`, `run-job`.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::args::{
    ApplyArgs, ConfigureArgs, DeleteArgs, DownArgs, ExecArgs, LogsArgs, PsArgs, RotateRootArgs, RunJobArgs,
};
use crate::cluster::command::{Found, PodRow};
use crate::container::enter;
use crate::control::{Info, Request, Response, TextFile};
use crate::folder::{self, Folder};

/// How long `down` waits for an orderly end before it kills `up`.
const DOWN_PATIENCE: Duration = Duration::from_secs(15);

/// Asks the mesh `name` one thing.
pub(crate) fn ask(folder: &Folder, request: &Request) -> anyhow::Result<Response> {
    let mut stream = UnixStream::connect(folder.socket()).map_err(|_| not_running(folder))?;
    stream.write_all(&serde_json::to_vec(request)?)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    serde_json::from_slice(&text).context("the mesh ended before it answered")
}

fn not_running(folder: &Folder) -> anyhow::Error {
    // What a killed mesh left behind is no mesh.
    let runs = |name: &String| Folder::of(name).and_then(|folder| folder.is_running()).unwrap_or(false);
    let others: Vec<String> = folder::names().into_iter().filter(runs).collect();
    let hint = match others.as_slice() {
        [] => "start one with `outrigger up PATH`".to_owned(),
        names => format!("there is {} (--name)", names.join(", ")),
    };
    anyhow::anyhow!("no mesh {:?} is running; {hint}", folder.name())
}

fn info(folder: &Folder) -> Option<Info> {
    match ask(folder, &Request::Info) {
        Ok(Response::Info(info)) => Some(info),
        _ => None,
    }
}

/// `outrigger down`
pub fn down(args: &DownArgs) -> anyhow::Result<ExitCode> {
    let names = if args.all { folder::names() } else { vec![args.mesh.name.clone()] };
    for name in names {
        let folder = Folder::of(&name)?;
        if folder.is_running()? {
            let pid = info(&folder).map(|info| info.pid);
            let _ = ask(&folder, &Request::Down);
            let began = Instant::now();
            while folder.is_running()? {
                if began.elapsed() > DOWN_PATIENCE {
                    let pid = pid.and_then(|pid| rustix::process::Pid::from_raw(i32::try_from(pid).ok()?));
                    let Some(pid) = pid else { bail!("mesh {name:?} does not end") };
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            folder.remove_stale()?;
            println!("mesh {name} ended");
        } else if folder.remove_stale()? {
            println!("mesh {name} was not running; what it left behind is removed");
        } else {
            println!("mesh {name} is not running");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn read_files(paths: &[PathBuf], recursive: bool) -> anyhow::Result<Vec<TextFile>> {
    let mut files = Vec::new();
    for path in crate::load::files(paths, recursive)? {
        let text = if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            text
        } else {
            std::fs::read_to_string(&path).with_context(|| path.display().to_string())?
        };
        files.push(TextFile { path, text });
    }
    Ok(files)
}

fn report(response: Response) -> anyhow::Result<ExitCode> {
    match response {
        Response::Done(report, skipped) => {
            for line in skipped.iter().chain(&report.lines) {
                println!("{line}");
            }
            for id in &report.missing {
                eprintln!("error: {id} not found");
            }
            Ok(if report.missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Response::Refused(errors) => {
            for error in errors {
                eprintln!("error: {error}");
            }
            Ok(ExitCode::FAILURE)
        }
        Response::Text(text) => {
            println!("{text}");
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("the mesh answered something else; is it of another version?"),
    }
}

/// Makes a change and, if asked to, waits for the sidecars.
fn change(folder: &Folder, request: &Request, wait: Option<u64>) -> anyhow::Result<ExitCode> {
    let response = ask(folder, request)?;
    let revision = match &response {
        Response::Done(done, _) => Some(done.revision),
        _ => None,
    };
    let code = report(response)?;
    match (revision, wait) {
        (Some(revision), Some(seconds)) => {
            let waited = report(ask(folder, &Request::Wait { revision, seconds })?)?;
            Ok(if waited == ExitCode::SUCCESS { code } else { waited })
        }
        _ => Ok(code),
    }
}

/// `outrigger apply -f`
pub fn apply(args: &ApplyArgs) -> anyhow::Result<ExitCode> {
    let folder = Folder::of(&args.mesh.name)?;
    let files = read_files(&args.filename, args.recursive)?;
    let dry_run = args.dry_run != "none";
    let wait = args.wait.filter(|_| !dry_run);
    change(&folder, &Request::Apply { files, namespace: args.namespace.clone(), dry_run }, wait)
}

/// `outrigger ca rotate-root`
pub fn rotate_root(args: &RotateRootArgs) -> anyhow::Result<ExitCode> {
    let folder = Folder::of(&args.mesh.name)?;
    report(ask(&folder, &Request::RotateRoot { settle: args.settle })?)
}

/// `outrigger workload configure`
pub fn configure_workload(args: &ConfigureArgs) -> anyhow::Result<ExitCode> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let folder = Folder::of(&args.mesh.name)?;
    let request = Request::Workload { namespace: args.namespace.clone(), group: args.group.clone() };
    let files = match ask(&folder, &request)? {
        Response::Files(files) => files,
        other => return report(other),
    };
    let cannot = |what: &str, path: &std::path::Path| format!("cannot {what} {}", path.display());
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&args.output)
        .with_context(|| cannot("make", &args.output))?;
    for (name, text) in files {
        let path = args.output.join(name);
        let _ = std::fs::remove_file(&path); // so that the mode applies
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).with_context(|| cannot("write", &path))?;
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// `outrigger delete -f FILE` or `outrigger delete KIND NAME`
pub fn delete(args: &DeleteArgs) -> anyhow::Result<ExitCode> {
    let folder = Folder::of(&args.mesh.name)?;
    let objects = named_objects(&args.object, args.namespace.as_deref())?;
    if objects.is_empty() && args.filename.is_empty() {
        bail!("{DELETE_WHAT}");
    }
    let files = read_files(&args.filename, args.recursive)?;
    let ignore_missing = args.ignore_not_found;
    change(&folder, &Request::Delete { files, objects, namespace: args.namespace.clone(), ignore_missing }, args.wait)
}

/// Kind, namespace and name of `KIND NAME…` or `KIND/NAME…`.
fn named_objects(words: &[String], namespace: Option<&str>) -> anyhow::Result<Vec<(String, String, String)>> {
    let pairs: Vec<(&str, &str)> = match words {
        [] => Vec::new(),
        _ if words.iter().all(|word| word.contains('/')) => {
            words.iter().filter_map(|word| word.split_once('/')).collect()
        }
        [kind, names @ ..] if !names.is_empty() => names.iter().map(|name| (kind.as_str(), name.as_str())).collect(),
        _ => bail!("{DELETE_WHAT}"),
    };
    let object = |(kind, name): (&str, &str)| {
        let kind = known_kind(kind).with_context(|| format!("{kind:?} is no kind of object that a mesh here has"))?;
        let (name, own) = name.split_once('.').map_or((name, None), |(name, own)| (name, Some(own)));
        let namespace = if kind == "Namespace" { "" } else { own.or(namespace).unwrap_or("default") };
        anyhow::Ok((kind.to_owned(), namespace.to_owned(), name.to_owned()))
    };
    pairs.into_iter().map(object).collect()
}

const DELETE_WHAT: &str =
    "say `outrigger delete KIND NAME`, `outrigger delete KIND/NAME` or `outrigger delete -f FILE`";

/// `vs`, `virtualservices` and `VirtualService` are the same kind; what is no kind stays as it is.
pub fn kind_name(text: &str) -> String {
    known_kind(text).map_or_else(|| text.to_owned(), str::to_owned)
}

fn known_kind(text: &str) -> Option<&'static str> {
    const KINDS: [(&str, &str); 31] = [
        ("VirtualService", "vs"),
        ("DestinationRule", "dr"),
        ("ServiceEntry", "se"),
        ("Sidecar", ""),
        ("WorkloadEntry", "we"),
        ("WorkloadGroup", "wg"),
        ("PeerAuthentication", "pa"),
        ("RequestAuthentication", "ra"),
        ("AuthorizationPolicy", "ap"),
        ("Telemetry", "telemetries"),
        ("EnvoyFilter", ""),
        ("Gateway", "gw"),
        ("HTTPRoute", ""),
        ("GRPCRoute", ""),
        ("ProxyConfig", ""),
        ("WasmPlugin", ""),
        ("TrafficExtension", ""),
        ("Namespace", "ns"),
        ("Service", "svc"),
        ("Endpoints", "ep"),
        ("EndpointSlice", ""),
        ("ServiceAccount", "sa"),
        ("ConfigMap", "cm"),
        ("Secret", ""),
        ("Deployment", "deploy"),
        ("StatefulSet", "sts"),
        ("DaemonSet", "ds"),
        ("ReplicaSet", "rs"),
        ("Job", ""),
        ("CronJob", "cj"),
        ("Pod", "po"),
    ];
    let lower = text.to_ascii_lowercase();
    KINDS
        .iter()
        .find(|(kind, short)| {
            let kind = kind.to_ascii_lowercase();
            lower == kind
                || lower == *short
                || lower.strip_suffix('s') == Some(&kind)
                || lower.strip_suffix("es") == Some(&kind)
                || lower.strip_suffix("ies").is_some_and(|stem| kind.strip_suffix('y') == Some(stem))
        })
        .map(|(kind, _)| *kind)
}

/// `outrigger ps`
pub fn ps(args: &PsArgs) -> anyhow::Result<ExitCode> {
    let folder = Folder::of(&args.mesh.name)?;
    match ask(&folder, &Request::Ps)? {
        Response::Pods(mut rows) => {
            rows.retain(|row| args.namespace.as_ref().is_none_or(|namespace| row.namespace == *namespace));
            match args.output.as_str() {
                "json" => println!("{}", serde_json::to_string_pretty(&rows)?),
                _ => print!("{}", table(&rows)),
            }
        }
        other => return report(other),
    }
    Ok(ExitCode::SUCCESS)
}

/// The rows as aligned columns.
pub(crate) fn table(rows: &[PodRow]) -> String {
    let head = ["NAMESPACE", "POD", "READY", "STATUS", "RESTARTS", "AGE", "IP", "SIDECAR"].map(str::to_owned);
    let mut lines = vec![head];
    for row in rows {
        lines.push([
            row.namespace.clone(),
            row.name.clone(),
            format!("{}/{}", row.ready, row.containers),
            row.status.clone(),
            row.restarts.to_string(),
            row.age.clone(),
            row.ips.first().map_or_else(String::new, ToString::to_string),
            row.sidecar.clone().unwrap_or_else(|| "none".to_owned()),
        ]);
    }
    let mut out = columns(&lines);
    for row in rows.iter().filter(|row| !row.settled) {
        if let Some(message) = &row.message {
            out.push_str(&format!("{}: {message}\n", row.name));
        }
    }
    out
}

/// Pads every column to its widest cell.
pub(crate) fn columns<const N: usize>(lines: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for line in lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for line in lines {
        let cells: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

fn find(name: &str, pod: &str, namespace: Option<&str>, container: Option<String>) -> anyhow::Result<Found> {
    let folder = Folder::of(name)?;
    let (pod, own) = pod.split_once('.').map_or((pod, None), |(pod, own)| (pod, Some(own)));
    let namespace = own.or(namespace).map(str::to_owned);
    match ask(&folder, &Request::Find { pod: pod.to_owned(), namespace, container })? {
        Response::Found(found) => Ok(*found),
        Response::Refused(errors) => bail!("{}", errors.join("; ")),
        _ => bail!("the mesh answered something else; is it of another version?"),
    }
}

/// A process of a pod of a running mesh, by which its network namespace and its cgroup can be found.
pub fn pod_process(mesh: &str, pod: &str) -> anyhow::Result<u32> {
    let found = find(mesh, pod, None, None)?;
    let pid = found.enter.and_then(|enter| u32::try_from(enter.pid).ok());
    pid.with_context(|| format!("pod {} has no running container", found.pod))
}

/// `outrigger exec POD[.NS] [-c CONTAINER] -- CMD`. Must be called before the process has made any thread.
pub fn exec(args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let found = find(&args.mesh.name, &args.pod, args.namespace.as_deref(), args.container.clone())?;
    let Some(mut enter) = found.enter else {
        bail!("container {} of pod {} is not running", found.container, found.pod);
    };
    enter.argv.clone_from(&args.command);
    // A mesh of a user without root lives in a user namespace of its own.
    enter.user_namespace = !rustix::process::geteuid().is_root();
    if let Ok(term) = std::env::var("TERM") {
        enter.env.push(("TERM".to_owned(), term));
    }
    enter::run(&enter, None).map_err(|error| anyhow::anyhow!(error))
}

/// `outrigger logs POD[.NS] [-c CONTAINER] [-f]`
pub fn logs(args: &LogsArgs) -> anyhow::Result<ExitCode> {
    let found = find(&args.mesh.name, &args.pod, args.namespace.as_deref(), args.container.clone())?;
    let folder = Folder::of(&args.mesh.name)?;
    let mut out = std::io::stdout().lock();
    let mut position = 0;
    if let Ok(mut file) = std::fs::File::open(&found.log) {
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        position = text.len() as u64;
        let from = match args.tail {
            Some(lines) => tail_start(&text, lines),
            None => 0,
        };
        out.write_all(&text[from..])?;
        out.flush()?;
    } else if !args.follow {
        bail!("container {} of pod {} has written nothing yet", found.container, found.pod);
    }
    if !args.follow {
        return Ok(ExitCode::SUCCESS);
    }
    loop {
        if let Ok(mut file) = std::fs::File::open(&found.log) {
            // Shorter than before: it was rotated.
            if file.metadata()?.len() < position {
                position = 0;
            }
            file.seek(SeekFrom::Start(position))?;
            position += std::io::copy(&mut file, &mut out)?;
            out.flush()?;
        } else if !folder.is_running()? {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn tail_start(text: &[u8], lines: usize) -> usize {
    let end = text.strip_suffix(b"\n").unwrap_or(text);
    if lines == 0 {
        return text.len();
    }
    end.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').nth(lines - 1).map_or(0, |(at, _)| at + 1)
}

/// `outrigger run-job CRONJOB[.NS]`
pub fn run_job(args: &RunJobArgs) -> anyhow::Result<ExitCode> {
    let folder = Folder::of(&args.mesh.name)?;
    let (name, namespace) = args.cron_job.split_once('.').unwrap_or((&args.cron_job, &args.namespace));
    report(ask(&folder, &Request::RunCron { name: name.to_owned(), namespace: namespace.to_owned() })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_short_and_plural_names() {
        for (text, kind) in [
            ("vs", "VirtualService"),
            ("services", "Service"),
            ("deploy", "Deployment"),
            ("AuthorizationPolicies", "AuthorizationPolicy"),
            ("ingresses", "ingresses"),
        ] {
            assert_eq!(kind_name(text), kind);
        }
    }

    #[test]
    fn objects_are_named_in_kubectls_ways() {
        let of = |words: &[&str], namespace| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            let all = named_objects(&words, namespace).map_err(|error| error.to_string())?;
            Ok::<_, String>(all.into_iter().map(|(k, ns, n)| format!("{k} {ns}/{n}")).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(of(&["vs", "a", "b.x"], None).unwrap(), "VirtualService default/a VirtualService x/b");
        assert_eq!(of(&["vs/a", "dr/b.x"], Some("y")).unwrap(), "VirtualService y/a DestinationRule x/b");
        assert_eq!(of(&["ns", "a"], Some("y")).unwrap(), "Namespace /a");
        assert!(of(&["vs"], None).is_err());
        assert!(of(&["frob", "a"], None).unwrap_err().contains("frob"));
    }

    #[test]
    fn tail_counts_lines() {
        let text = b"a\nb\nc\n";
        assert_eq!(&text[tail_start(text, 2)..], b"b\nc\n");
        assert_eq!(&text[tail_start(text, 9)..], text);
        assert_eq!(&text[tail_start(text, 0)..], b"");
    }
}
