//! `outrigger wait`: until a change is live everywhere, or it is clear that it will not be.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};

/// How often the control plane is asked.
const PERIOD: Duration = Duration::from_millis(50);

/// Wait until every affected proxy has accepted and applied a change.
///
/// Ends with 0 once they all have; with 1, and the names of those that have not, when time is over; and with 1 at once when a proxy
/// refuses what it was sent, with the resource, the field and the proxy.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger apply -f samples/bookinfo/networking/canary.yaml
  outrigger wait --for=distribution VirtualService/reviews.default --timeout 30s")]
pub struct Args {
    /// What is waited for
    #[arg(long = "for", value_name = "distribution", default_value = "distribution", value_parser = ["distribution", "delete"])]
    condition: String,
    /// The object: KIND/NAME[.NAMESPACE], or KIND NAME
    #[arg(value_name = "KIND/NAME[.NAMESPACE]", required_unless_present = "all", num_args = 0..=2)]
    object: Vec<String>,
    /// All changes so far
    #[arg(long, conflicts_with = "object")]
    all: bool,
    /// How long at most: 30s, 2m
    #[arg(long, default_value = "30s", value_parser = duration)]
    timeout: Duration,
    /// Name of the mesh, when several run on this machine
    #[arg(long, alias = "name", default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
}

fn duration(text: &str) -> Result<Duration, String> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..at].parse().map_err(|_| format!("{text:?} is no duration"))?;
    let unit = match &text[at..] {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        other => return Err(format!("unit {other:?} is none of ms, s, m, h")),
    };
    Duration::try_from_secs_f64(number * unit).map_err(|error| error.to_string())
}

/// How far one proxy is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Sync {
    /// `NAME.NAMESPACE`.
    pub proxy: String,
    /// It has accepted all that concerns it up to this revision.
    pub synced_to: u64,
    /// What it refuses, with its reasons.
    pub nacks: Vec<String>,
}

/// How far a change got, as the control plane says.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// The revision that holds the change.
    pub wanted: u64,
    /// The connected proxies.
    pub proxies: Vec<Sync>,
}

/// What waiting came to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// So many proxies have it.
    Live(usize),
    /// These refuse their configuration: proxy and reason.
    Refused(Vec<(String, String)>),
    /// Not yet everywhere; these lag.
    Pending(Vec<String>),
}

/// Judges what the control plane says, time after time. The revision that is waited for is the first one seen: later changes are
/// somebody else's.
#[derive(Clone, Debug, Default)]
pub struct Waiter {
    wanted: Option<u64>,
}

impl Waiter {
    /// One look.
    pub fn look(&mut self, progress: &Progress) -> Verdict {
        let wanted = *self.wanted.get_or_insert(progress.wanted);
        let behind: Vec<&Sync> = progress.proxies.iter().filter(|proxy| proxy.synced_to < wanted).collect();
        let refused: BTreeSet<(String, String)> = behind
            .iter()
            .flat_map(|proxy| proxy.nacks.iter().map(|nack| (proxy.proxy.clone(), nack.clone())))
            .collect();
        if !refused.is_empty() {
            return Verdict::Refused(refused.into_iter().collect());
        }
        if behind.is_empty() {
            return Verdict::Live(progress.proxies.len());
        }
        let mut names: Vec<String> = behind.iter().map(|proxy| proxy.proxy.clone()).collect();
        names.sort();
        Verdict::Pending(names)
    }
}

/// Runs the command.
///
/// # Errors
/// When no such mesh runs, or it has no such object.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let object = if args.all { None } else { Some(object(&args.object)?) };
    let began = Instant::now();
    let mut waiter = Waiter::default();
    loop {
        let distribution = machine::distribution(&args.mesh, object.clone())?;
        let proxies = distribution.proxies.into_iter();
        let progress = Progress {
            wanted: distribution.wanted,
            proxies: proxies.map(|p| Sync { proxy: p.proxy, synced_to: p.synced_to, nacks: p.nacks }).collect(),
        };
        match waiter.look(&progress) {
            Verdict::Live(count) => {
                println!("live at all {count} proxies after {:.1} s", began.elapsed().as_secs_f64());
                return Ok(ExitCode::SUCCESS);
            }
            Verdict::Refused(refused) => {
                for (proxy, why) in refused {
                    eprintln!("{proxy} refuses {why}");
                }
                eprintln!("`outrigger doctor` names the object and its line, where they are known");
                return Ok(ExitCode::FAILURE);
            }
            Verdict::Pending(names) if began.elapsed() >= args.timeout => {
                eprintln!(
                    "not live at {} of {} proxies after {:?}:",
                    names.len(),
                    progress.proxies.len(),
                    args.timeout
                );
                names.iter().for_each(|name| eprintln!("  {name}"));
                return Ok(ExitCode::FAILURE);
            }
            Verdict::Pending(_) => std::thread::sleep(PERIOD),
        }
    }
}

/// Kind, namespace and name.
fn object(said: &[String]) -> anyhow::Result<(String, String, String)> {
    let (kind, name) = match said {
        [one] => one.split_once('/').ok_or_else(|| anyhow!("{one:?} is not KIND/NAME[.NAMESPACE]"))?,
        [kind, name] => (kind.as_str(), name.as_str()),
        _ => bail!("say KIND/NAME[.NAMESPACE], or --all"),
    };
    let (name, namespace) = name.split_once('.').unwrap_or((name, "default"));
    Ok((machine::kind_name(kind), namespace.to_owned(), name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(name: &str, synced_to: u64, nacks: &[&str]) -> Sync {
        Sync { proxy: name.into(), synced_to, nacks: nacks.iter().map(|n| (*n).to_owned()).collect() }
    }

    #[test]
    fn it_is_live_when_all_have_the_revision_first_seen() {
        let mut waiter = Waiter::default();
        let pending = Progress { wanted: 5, proxies: vec![proxy("b", 4, &[]), proxy("a", 5, &[])] };
        assert_eq!(waiter.look(&pending), Verdict::Pending(vec!["b".into()]));
        let later = Progress { wanted: 9, proxies: vec![proxy("b", 5, &[]), proxy("a", 8, &[])] };
        assert_eq!(waiter.look(&later), Verdict::Live(2));
    }

    #[test]
    fn a_refusal_ends_it_unless_it_is_of_later() {
        let mut waiter = Waiter::default();
        let refused = Progress { wanted: 5, proxies: vec![proxy("a", 4, &["Listener: x"]), proxy("b", 1, &[])] };
        assert_eq!(waiter.look(&refused), Verdict::Refused(vec![("a".into(), "Listener: x".into())]));
        let later = Progress { wanted: 6, proxies: vec![proxy("a", 5, &["Listener: y"])] };
        assert_eq!(waiter.look(&later), Verdict::Live(1));
    }

    #[test]
    fn objects_and_durations_are_read() {
        let of = |said: &[&str]| object(&said.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()).ok();
        let reviews = Some(("VirtualService".to_owned(), "shop".to_owned(), "reviews".to_owned()));
        assert_eq!(of(&["vs/reviews.shop"]), reviews);
        assert_eq!(of(&["VirtualService", "reviews.shop"]), reviews);
        assert_eq!(of(&["reviews"]), None);
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert!(duration("x").is_err() && duration("-1s").is_err());
    }
}
