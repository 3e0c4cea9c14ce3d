//! The folder that describes a machine to be: cluster.env, hosts, istio-token, mesh.yaml, root-cert.pem.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, bail};

/// What the folder says; what is missing in it is said by flags.
#[derive(Debug, Default)]
pub(super) struct Folder {
    /// cluster.env
    pub(super) variables: BTreeMap<String, String>,
    /// hosts: addresses by name.
    pub(super) hosts: BTreeMap<String, IpAddr>,
    pub(super) token: Option<String>,
    pub(super) mesh: Option<String>,
    pub(super) root_cert: Option<String>,
}

impl Folder {
    pub(super) fn read(folder: &Path) -> anyhow::Result<Folder> {
        if !folder.is_dir() {
            bail!("{} is not a folder", folder.display());
        }
        let read = |name: &str| {
            let path = folder.join(name);
            match std::fs::read_to_string(&path) {
                Ok(text) => Ok(Some(text)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
            }
        };
        let mut found = Folder {
            token: read("istio-token")?,
            mesh: read("mesh.yaml")?,
            root_cert: read("root-cert.pem")?,
            ..Folder::default()
        };
        if let Some(text) = read("cluster.env")? {
            for (line, number) in text.lines().zip(1..) {
                let wrong = || format!("{}:{number}", folder.join("cluster.env").display());
                let line = line.trim();
                if line.is_empty() || line.starts_with('#') {
                    continue;
                }
                let (name, value) = line.split_once('=').with_context(|| format!("{}: not NAME=VALUE", wrong()))?;
                let value = unquoted(value).with_context(|| format!("{}: {name}: a quote is not closed", wrong()))?;
                found.variables.insert(name.trim_start_matches("export ").trim().to_owned(), value);
            }
        }
        for (line, number) in read("hosts")?.unwrap_or_default().lines().zip(1..) {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(ip) = words.next() else { continue };
            let ip: IpAddr = ip
                .parse()
                .with_context(|| format!("{}:{number}: {ip:?} is not an IP address", folder.join("hosts").display()))?;
            found.hosts.extend(words.map(|name| (name.to_owned(), ip)));
        }
        if found.is_empty() && found.token.is_none() && found.root_cert.is_none() {
            bail!("{} has none of cluster.env, mesh.yaml, istio-token and root-cert.pem", folder.display());
        }
        Ok(found)
    }

    /// It says nothing of the workload.
    pub(super) fn is_empty(&self) -> bool {
        self.variables.is_empty() && self.mesh.is_none()
    }

    /// `defaultConfig.discoveryAddress` of the mesh configuration; what is wrong with that the agent says.
    pub(super) fn discovery_address(&self) -> Option<String> {
        let documents = manifest::parse_plain(Path::new("mesh.yaml"), self.mesh.as_deref()?).ok()?;
        let address = documents.first()?.value.pointer("/defaultConfig/discoveryAddress")?.as_str()?;
        (!address.is_empty()).then(|| address.to_owned())
    }
}

/// A word as a shell reads it: quoted singly, doubly, by backslash, or in pieces of each. Nothing is expanded.
fn unquoted(text: &str) -> Option<String> {
    let (mut out, mut quote) = (String::new(), None);
    let mut chars = text.trim().chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None | Some('"'), '\\') => out.push(chars.next()?),
            (_, c) => out.push(c),
        }
    }
    quote.is_none().then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_istioctl_writes() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert!(Folder::read(dir.path()).unwrap_err().to_string().contains("has none of"));
        write("cluster.env", "A='x y'\n# no\nB=plain\nC='it'\"'\"'s'\nD=''\nexport E=\"a\\\"b\"\n");
        write("hosts", "10.10.10.11 istiod.istio-system.svc other # why\n\n");
        write("mesh.yaml", "defaultConfig:\n  discoveryAddress: istiod.istio-system.svc:15012\n");
        let folder = Folder::read(dir.path()).unwrap();
        let value = |name: &str| folder.variables[name].as_str();
        assert_eq!(["A", "B", "C", "D", "E"].map(value), ["x y", "plain", "it's", "", "a\"b"]);
        assert_eq!(folder.hosts["other"], IpAddr::from([10, 10, 10, 11]));
        assert_eq!(folder.discovery_address().unwrap(), "istiod.istio-system.svc:15012");

        for (name, text, said) in [
            ("cluster.env", "A=1\nB\n", "cluster.env:2: not NAME=VALUE"),
            ("cluster.env", "A='x\n", "cluster.env:1: A: a quote is not closed"),
            ("hosts", "here istiod\n", "hosts:1: \"here\" is not an IP address"),
        ] {
            write("cluster.env", "");
            write(name, text);
            let error = Folder::read(dir.path()).unwrap_err().to_string();
            assert!(error.ends_with(said), "{error}");
        }
    }
}
