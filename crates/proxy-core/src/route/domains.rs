use std::sync::Arc;

use foldhash::{HashMap, HashMapExt};

use crate::rejected::{Compiled, Invalid};
use crate::route::VirtualHost;

/// Virtual hosts by domain (Envoy `RouteMatcher::findVirtualHost`): exact, then `*suffix`, then `prefix*`, the longest
/// of a kind first, then `*`. All in lower case.
#[derive(Debug, Default)]
pub(super) struct Domains {
    exact: HashMap<Box<str>, usize>,
    suffixes: ByLength,
    prefixes: ByLength,
    any: Option<usize>,
}

/// Wildcards by the length of their fixed part, the longest first, so that a lookup costs one hash for each length in use.
type ByLength = Vec<(usize, HashMap<Box<str>, usize>)>;

impl Domains {
    pub(super) fn compile(hosts: &[Arc<VirtualHost>]) -> Compiled<Self> {
        let mut domains = Self::default();
        for (index, host) in hosts.iter().enumerate() {
            for domain in &host.domains {
                domains.add(&domain.to_ascii_lowercase(), index).map_err(|reason| {
                    Invalid::new(format!("virtual_hosts[{index}].domains"), format!("{reason} {domain}"))
                })?;
            }
        }
        for wildcards in [&mut domains.suffixes, &mut domains.prefixes] {
            wildcards.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
        }
        Ok(domains)
    }

    fn add(&mut self, domain: &str, index: usize) -> Result<(), &'static str> {
        let taken = if domain == "*" {
            self.any.replace(index).is_some()
        } else if let Some(suffix) = domain.strip_prefix('*') {
            bucket(&mut self.suffixes, suffix.len()).insert(suffix.into(), index).is_some()
        } else if let Some(prefix) = domain.strip_suffix('*') {
            bucket(&mut self.prefixes, prefix.len()).insert(prefix.into(), index).is_some()
        } else {
            self.exact.insert(domain.into(), index).is_some()
        };
        match taken {
            true if domain == "*" => Err("only a single wildcard domain is permitted:"),
            true => Err("only unique values for domains are permitted, duplicate entry of domain"),
            false => Ok(()),
        }
    }

    pub(super) fn find(&self, host: &str) -> Option<usize> {
        if self.exact.is_empty() && self.suffixes.is_empty() && self.prefixes.is_empty() {
            return self.any;
        }
        let lower;
        let host = if host.bytes().any(|b| b.is_ascii_uppercase()) {
            lower = host.to_ascii_lowercase();
            &lower
        } else {
            host
        };
        let wildcard = |wildcards: &ByLength, part: fn(&str, usize) -> Option<&str>| {
            // The wildcard stands for at least one character.
            wildcards
                .iter()
                .filter(|(length, _)| *length < host.len())
                .find_map(|(length, map)| map.get(part(host, *length)?).copied())
        };
        self.exact
            .get(host)
            .copied()
            .or_else(|| wildcard(&self.suffixes, |host, length| host.get(host.len() - length..)))
            .or_else(|| wildcard(&self.prefixes, |host, length| host.get(..length)))
            .or(self.any)
    }
}

fn bucket(wildcards: &mut ByLength, length: usize) -> &mut HashMap<Box<str>, usize> {
    let at = match wildcards.iter().position(|(l, _)| *l == length) {
        Some(at) => at,
        None => {
            wildcards.push((length, HashMap::new()));
            wildcards.len() - 1
        }
    };
    &mut wildcards[at].1
}
