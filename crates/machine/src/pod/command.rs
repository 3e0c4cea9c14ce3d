//! What a container runs on this machine: its own command, the user's mapping, or a built-in stand-in for a well-known image.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Container;
use serde::Deserialize;

/// `outrigger.yaml` beside the manifests: which program stands for an image.
///
/// ```yaml
/// images:
///   example.com/shop/cart: ["./target/release/cart", "--port", "8080"]
///   example.com/shop/web:*: {command: [python3], args: ["-m", "http.server"]}
/// ```
#[derive(Clone, Debug, Default)]
pub(crate) struct Images {
    entries: Vec<(String, Program)>,
}

#[derive(Clone, Debug)]
struct Program {
    command: Vec<String>,
    args: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    images: BTreeMap<String, WrittenProgram>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum WrittenProgram {
    Line(String),
    List(Vec<String>),
    Full {
        command: Vec<String>,
        #[serde(default)]
        args: Option<Vec<String>>,
    },
}

impl Images {
    /// Adds the entries of one `outrigger.yaml`. Commands that start with `./` or `../` are relative to its folder.
    pub(crate) fn add(&mut self, file: &Path, document: &manifest::Document) -> Result<(), manifest::Error> {
        let written: Written = document.decode()?;
        let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        for (image, program) in written.images {
            let (mut command, args) = match program {
                WrittenProgram::Line(line) => (line.split_whitespace().map(str::to_owned).collect::<Vec<_>>(), None),
                WrittenProgram::List(list) => (list, None),
                WrittenProgram::Full { command, args } => (command, args),
            };
            let Some(first) = command.first_mut() else {
                return Err(document.error(&format!("images[\"{image}\"]"), "the command is empty"));
            };
            if first.starts_with("./") || first.starts_with("../") {
                let path = folder.join(&*first);
                *first = std::path::absolute(&path).unwrap_or(path).display().to_string();
            }
            self.entries.push((image, Program { command, args }));
        }
        Ok(())
    }

    fn find(&self, image: &str) -> Option<&Program> {
        let bare = without_tag(image);
        self.entries
            .iter()
            .find(|(pattern, _)| {
                pattern == image
                    || pattern == bare
                    || pattern.strip_suffix('*').is_some_and(|prefix| image.starts_with(prefix))
            })
            .map(|(_, program)| program)
    }
}

/// Decides what a container runs.
///
/// `command` and `args` are those of the container, expanded. `mounted` are its mount paths: a command in a volume is trusted to exist.
pub(crate) fn resolve(
    container: &Container,
    command: &[String],
    args: &[String],
    mounted: &[String],
    images: &Images,
) -> Result<Vec<String>, String> {
    let image = container.image.as_deref().unwrap_or_default();
    if let Some(program) = command.first()
        && exists(program, mounted)
    {
        return Ok(command.iter().chain(args).cloned().collect());
    }
    if let Some(program) = images.find(image) {
        let own = if args.is_empty() { program.args.as_deref().unwrap_or_default() } else { args };
        return Ok(program.command.iter().chain(own).cloned().collect());
    }
    if let Some(argv) = stand_in(container, image, args) {
        return Ok(argv);
    }
    let place = "add `images: {IMAGE: [COMMAND, …]}` to an outrigger.yaml beside the YAML";
    Err(match command.first() {
        Some(program) => {
            format!("container {}: command {program:?} does not exist on this machine; {place}", container.name)
        }
        None => format!("container {}: no program for image {image:?} on this machine; {place}", container.name),
    })
}

/// Image reference without tag and digest. A colon before the last slash belongs to a port.
fn without_tag(image: &str) -> &str {
    let image = image.split_once('@').map_or(image, |(name, _)| name);
    match image.rfind(':') {
        Some(colon) if !image[colon..].contains('/') => &image[..colon],
        _ => image,
    }
}

/// Programs of this binary that stand for well-known images.
fn stand_in(container: &Container, image: &str, args: &[String]) -> Option<Vec<String>> {
    let path = without_tag(image);
    let name = path.rsplit('/').next().unwrap_or(path);
    let own = |words: &[&str]| Some(words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
    if name == "proxyv2" {
        return Some(std::iter::once("pilot-agent".to_owned()).chain(args.iter().cloned()).collect());
    }
    if let Some(rest) = name.strip_prefix("examples-bookinfo-") {
        let (service, version) = rest.split_once('-').unwrap_or((rest, "v1"));
        return match service {
            "productpage" | "details" | "reviews" | "ratings" => {
                own(&["outrigger", "sample", "bookinfo", service, "--port", "9080", "--version", version])
            }
            _ => None,
        };
    }
    if path.ends_with("curlimages/curl") || matches!(name, "curl" | "sleep" | "pause" | "alpine-curl") {
        return own(&["outrigger", "sample", "sleep"]);
    }
    if name.contains("httpbin") || name.contains("echo") {
        let declared = container.ports.iter().flatten().next().map(|port| port.container_port);
        // mccutchen/go-httpbin listens on 8080, kennethreitz/httpbin on 80.
        let port = declared.unwrap_or(if name == "go-httpbin" { 8080 } else { 80 }).to_string();
        return own(&["outrigger", "sample", "echo", "--port", &port]);
    }
    None
}

fn exists(program: &str, mounted: &[String]) -> bool {
    if matches!(program, "outrigger" | "pilot-agent" | "istio-iptables") {
        return true;
    }
    let runnable = |path: PathBuf| {
        std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    if program.contains('/') {
        return program.starts_with("/usr/local/bin/outrigger")
            || program.starts_with("/usr/local/bin/pilot-agent")
            || mounted.iter().any(|folder| Path::new(program).starts_with(folder))
            || runnable(PathBuf::from(program));
    }
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        .split(':')
        .any(|folder| runnable(Path::new(folder).join(program)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(image: &str) -> Container {
        Container { name: "c".to_owned(), image: Some(image.to_owned()), ..Container::default() }
    }

    fn run(image: &str, command: &[&str], args: &[&str], images: &Images) -> Result<String, String> {
        let list = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        resolve(&container(image), &list(command), &list(args), &["/scripts".to_owned()], images)
            .map(|argv| argv.join(" "))
    }

    #[test]
    fn own_command_then_mapping_then_stand_in() {
        let mut images = Images::default();
        let text = "images: {'registry:5000/shop': [./bin/shop, -v], 'curlimages/curl': echo hello}";
        let document = &manifest::parse_plain(Path::new("/cfg/outrigger.yaml"), text).unwrap()[0];
        images.add(Path::new("/cfg/outrigger.yaml"), document).unwrap();
        let none = Images::default();
        assert_eq!(run("x", &["/bin/sh", "-c"], &["true"], &none).unwrap(), "/bin/sh -c true");
        assert_eq!(run("x", &["/scripts/run.sh"], &[], &none).unwrap(), "/scripts/run.sh");
        assert_eq!(run("registry:5000/shop:v1", &[], &[], &images).unwrap(), "/cfg/bin/shop -v");
        assert_eq!(run("curlimages/curl:8", &[], &[], &images).unwrap(), "echo hello");
        assert_eq!(run("curlimages/curl:8", &[], &[], &none).unwrap(), "outrigger sample sleep");
        assert_eq!(
            run("docker.io/istio/examples-bookinfo-reviews-v3:1.20.3", &[], &[], &none).unwrap(),
            "outrigger sample bookinfo reviews --port 9080 --version v3"
        );
        assert_eq!(
            run("outrigger/proxyv2:dev", &[], &["proxy", "sidecar"], &none).unwrap(),
            "pilot-agent proxy sidecar"
        );
        assert!(run("acme/unknown", &[], &[], &none).unwrap_err().contains("acme/unknown"));
        assert!(run("acme/unknown", &["/no/such/program"], &[], &none).unwrap_err().contains("/no/such/program"));
    }
}
