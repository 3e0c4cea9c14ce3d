//! Runs `iptables-restore` and friends: found without side effects, at most one process per family on a clean namespace.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use netns::nft::{self, Family, Nft};

use super::plan::{self, Saved};
use crate::rules::RuleSet;

/// Seconds to wait for another program that holds the legacy lock.
const LOCK_WAIT: &str = "30";
const TABLES: [&str; 3] = ["mangle", "nat", "raw"];

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{program} cannot be run")]
    Run { program: String, source: io::Error },
    #[error("{program} failed ({status}): {stderr}")]
    Failed { program: String, status: std::process::ExitStatus, stderr: String },
    #[error("--force-iptables-binary {name:?}: {program} is not in PATH")]
    Missing { name: &'static str, program: String },
    #[error("cannot read the nftables state")]
    Netlink(#[from] netns::Error),
}

/// Which kernel interface the programs speak to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Backend {
    Nft,
    Legacy,
    /// `iptables` as it is called on this system, without knowing which of the two it is.
    Plain,
}

impl Backend {
    fn program(self, v6: bool, verb: &str) -> String {
        let family = if v6 { "ip6tables" } else { "iptables" };
        match self {
            Self::Nft => format!("{family}-nft-{verb}"),
            Self::Legacy => format!("{family}-legacy-{verb}"),
            Self::Plain => format!("{family}-{verb}"),
        }
    }
}

/// Where rules of ours live now.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Leftovers {
    /// IPv4, IPv6.
    pub(crate) nft: [bool; 2],
    pub(crate) legacy: [bool; 2],
}

/// The programs on this system, and a search path that tests can replace.
pub(crate) struct Programs {
    path: Vec<PathBuf>,
}

impl Programs {
    pub(crate) fn from_env() -> Self {
        // An init container may come without PATH.
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        Self { path: std::env::split_paths(&path).collect() }
    }

    fn find(&self, name: &str) -> Option<PathBuf> {
        self.path.iter().map(|dir| dir.join(name)).find(|file| file.is_file())
    }

    pub(crate) fn has(&self, backend: Backend) -> bool {
        self.find(&backend.program(false, "restore")).is_some()
    }

    /// The back end that `--force-iptables-binary` names.
    pub(crate) fn forced(&self, name: &'static str) -> Result<Backend, Error> {
        let backend = if name == "legacy" { Backend::Legacy } else { Backend::Nft };
        if self.has(backend) {
            Ok(backend)
        } else {
            Err(Error::Missing { name, program: backend.program(false, "restore") })
        }
    }

    /// Where our rules are already; else legacy when somebody uses it here, else nft, else whatever `iptables` is. `None`: no iptables.
    ///
    /// DIFFERS: Istio finds out by running iptables-legacy, which loads the very tables that it then takes for existing rules.
    pub(crate) fn choose(&self, leftovers: &Leftovers, kernel_has_nft: bool) -> Result<Option<Backend>, Error> {
        if !kernel_has_nft && self.has(Backend::Legacy) {
            return Ok(Some(Backend::Legacy));
        }
        if leftovers.nft.contains(&true) && self.has(Backend::Nft) {
            return Ok(Some(Backend::Nft));
        }
        if self.has(Backend::Legacy) && (leftovers.legacy.contains(&true) || self.legacy_in_use()?) {
            return Ok(Some(Backend::Legacy));
        }
        Ok([Backend::Nft, Backend::Plain].into_iter().find(|b| self.has(*b)))
    }

    fn legacy_in_use(&self) -> Result<bool, Error> {
        for v6 in [false, true] {
            if legacy_tables(v6) && self.save_text(Backend::Legacy, v6)?.lines().any(|l| l.starts_with("-A ")) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn run(&self, program: &str, args: &[&str], input: &str) -> Result<String, Error> {
        let error = |source| Error::Run { program: program.to_owned(), source };
        let file = self.find(program).ok_or_else(|| error(io::Error::from(io::ErrorKind::NotFound)))?;
        let mut child = Command::new(file)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(error)?;
        // A program that refuses early closes its input; its own message says more than our broken pipe.
        let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
        let out = child.wait_with_output().map_err(error)?;
        if out.status.success() {
            Ok(String::from_utf8_lossy(&out.stdout).into_owned())
        } else {
            let stderr = String::from_utf8_lossy(&out.stderr).trim().replace('\n', "; ");
            Err(Error::Failed { program: program.to_owned(), status: out.status, stderr })
        }
    }

    fn save_text(&self, backend: Backend, v6: bool) -> Result<String, Error> {
        self.run(&backend.program(v6, "save"), &[], "")
    }

    /// What is there, with counters.
    pub(crate) fn counted(&self, backend: Backend, v6: bool) -> Result<String, Error> {
        self.run(&backend.program(v6, "save"), &["-c"], "")
    }

    /// What is there, read without making tables come into being.
    fn saved(&self, backend: Backend, v6: bool, leftovers: &Leftovers) -> Result<Saved, Error> {
        let worth_reading = match backend {
            Backend::Nft => leftovers.nft[usize::from(v6)],
            Backend::Legacy => legacy_tables(v6),
            Backend::Plain => true,
        };
        if !worth_reading || self.find(&backend.program(v6, "save")).is_none() {
            return Ok(Saved::default());
        }
        self.save_text(backend, v6).map(|text| Saved::parse(&text))
    }
}

/// The kernel lists legacy tables that are in use in this namespace; reading the list loads none.
pub(crate) fn legacy_tables(v6: bool) -> bool {
    let file = if v6 { "/proc/thread-self/net/ip6_tables_names" } else { "/proc/thread-self/net/ip_tables_names" };
    std::fs::read_to_string(file).is_ok_and(|names| !names.trim().is_empty())
}

/// Looks for chains of ours in both kernel interfaces.
pub(crate) fn find_leftovers(nft: Option<&mut Nft>, programs: &Programs) -> Result<Leftovers, Error> {
    let mut found = Leftovers::default();
    if let Some(nft) = nft {
        for table in nft.tables()? {
            let v6 = match table.family {
                Family::Ip => false,
                Family::Ip6 => true,
                Family::Inet => continue,
            };
            if TABLES.contains(&table.name.as_str()) && nft.chains(&table)?.iter().any(|c| c.name.starts_with("ISTIO_"))
            {
                found.nft[usize::from(v6)] = true;
            }
        }
    }
    for v6 in [false, true] {
        if legacy_tables(v6) && programs.find(&Backend::Legacy.program(v6, "save")).is_some() {
            let text = programs.save_text(Backend::Legacy, v6)?;
            found.legacy[usize::from(v6)] = text.lines().any(|l| l.starts_with(":ISTIO_"));
        }
    }
    Ok(found)
}

/// What was done, or would be.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// Input of `iptables-restore` per family; none when nothing had to change.
    pub(crate) v4: Option<String>,
    pub(crate) v6: Option<String>,
    /// Marks of TPROXY rules that were there before.
    pub(crate) marks: Vec<u32>,
}

/// Brings one back end from what is there to the wanted rules (`None`: no rules of ours). Each table changes atomically.
pub(crate) fn apply(
    programs: &Programs,
    backend: Backend,
    wanted: Option<&RuleSet>,
    leftovers: &Leftovers,
    dry_run: bool,
) -> Result<Done, Error> {
    let mut done = Done::default();
    for v6 in [false, true] {
        let saved = programs.saved(backend, v6, leftovers)?;
        done.marks.extend(saved.tproxy_marks());
        let Some(text) = plan::plan(&saved, wanted, v6) else { continue };
        if !dry_run {
            let mut args = vec!["--noflush"];
            if backend != Backend::Plain {
                args.extend(["-w", LOCK_WAIT]);
            }
            programs.run(&backend.program(v6, "restore"), &args, &text)?;
            if wanted.is_none() && backend != Backend::Legacy {
                drop_empty_tables(v6, &saved)?;
            }
        }
        *(if v6 { &mut done.v6 } else { &mut done.v4 }) = Some(text);
    }
    Ok(done)
}

/// iptables-nft makes tables and built-in chains on first use and never removes them. After a clean-up those that our rules stood in
/// and that hold nothing any more go too; an empty chain that accepts does the same as none.
fn drop_empty_tables(v6: bool, saved: &Saved) -> Result<(), Error> {
    let family = if v6 { Family::Ip6 } else { Family::Ip };
    let mut nft = Nft::open()?;
    let mut batch = nft::Batch::new();
    let present = nft.tables()?;
    for (name, hooks) in saved.touched() {
        let table = nft::Table::new(family, name);
        if !present.contains(&table) {
            continue;
        }
        let rules = nft.rules(&table)?;
        let chains = nft.chains(&table)?;
        let (gone, left): (Vec<_>, Vec<_>) = chains.into_iter().partition(|c| {
            hooks.contains(c.name.as_str()) && c.hook.is_some() && !c.drops && rules.iter().all(|r| r.chain != c.name)
        });
        if left.is_empty() {
            batch.delete_table(&table);
        } else {
            gone.iter().for_each(|chain| {
                batch.delete_chain(&table, &chain.name);
            });
        }
    }
    nft.apply(&batch)?;
    Ok(())
}
