//! `outrigger x authz check`: the authorization policies that a proxy holds, as istioctl lists them.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use envoy_api::Message;
use envoy_api::http::{HttpConnectionManager, http_filter};
use envoy_api::listener::{Listener, filter::ConfigType};
use envoy_api::pb::envoy::config::rbac::v3::{Rbac as Rules, rbac::Action};
use envoy_api::pb::envoy::extensions::filters::{http::rbac::v3::Rbac as HttpRbac, network::rbac::v3::Rbac as TcpRbac};

use crate::Target;
use crate::table::Table;

/// What a filter without policies is listed as.
const NOTHING: &str = "_anonymous_match_nothing_";

/// List the authorization policies that a pod's proxy applies, as `istioctl x authz check`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger x authz check productpage
  outrigger x authz check -f envoy-dump.json")]
pub struct Args {
    #[command(flatten)]
    target: Target,
}

/// Runs the command.
///
/// # Errors
/// When the proxy cannot be reached, or the dump is none.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    print!("{}", table(&args.target.dump()?.listeners));
    Ok(ExitCode::SUCCESS)
}

#[derive(Default)]
struct Found {
    /// Policies by action, in the order in which actions are listed.
    policies: BTreeMap<usize, BTreeSet<String>>,
    /// Rules of each policy.
    rules: BTreeMap<String, BTreeSet<String>>,
}

const ACTIONS: [(Action, &str); 3] = [(Action::Deny, "DENY"), (Action::Allow, "ALLOW"), (Action::Log, "LOG")];

impl Found {
    fn add(&mut self, rules: Option<&Rules>) {
        let action = rules.map(Rules::action).unwrap_or_default();
        let place = ACTIONS.iter().position(|(known, _)| *known == action).unwrap_or(0);
        let none = Default::default();
        let policies = rules.map_or(&none, |rules| &rules.policies);
        let mut names: Vec<(String, String)> = policies.keys().map(|name| parts(name)).collect();
        if names.is_empty() {
            names.push((NOTHING.to_owned(), "0".to_owned()));
        }
        for (policy, rule) in names {
            self.policies.entry(place).or_default().insert(policy.clone());
            self.rules.entry(policy).or_default().insert(rule);
        }
    }
}

fn table(listeners: &[Listener]) -> String {
    let mut found = Found::default();
    let filters = listeners.iter().flat_map(|listener| &listener.filter_chains).flat_map(|chain| &chain.filters);
    for filter in filters {
        let Some(ConfigType::TypedConfig(any)) = &filter.config_type else { continue };
        match filter.name.as_str() {
            "envoy.filters.network.rbac" => {
                if let Ok(rbac) = TcpRbac::decode(any.value.as_slice()) {
                    found.add(rbac.rules.as_ref());
                }
            }
            "envoy.filters.network.http_connection_manager" => {
                let manager = HttpConnectionManager::decode(any.value.as_slice()).unwrap_or_default();
                for filter in manager.http_filters.iter().filter(|filter| filter.name == "envoy.filters.http.rbac") {
                    if let Some(http_filter::ConfigType::TypedConfig(any)) = &filter.config_type
                        && let Ok(rbac) = HttpRbac::decode(any.value.as_slice())
                    {
                        found.add(rbac.rules.as_ref());
                    }
                }
            }
            _ => {}
        }
    }
    let mut table = Table::new(3, &["ACTION", "AuthorizationPolicy", "RULES"]);
    for (place, names) in &found.policies {
        for name in names {
            let rules = found.rules.get(name).map_or(0, BTreeSet::len);
            table.row([ACTIONS[*place].1.to_owned(), name.clone(), rules.to_string()]);
        }
    }
    table.render()
}

/// Policy and rule of a name such as `ns[default]-policy[reviews]-rule[0]`.
fn parts(name: &str) -> (String, String) {
    let split = || {
        let (_, rest) = name.split_once("ns[")?;
        let (namespace, rest) = rest.split_once("]-policy[")?;
        let (policy, rest) = rest.split_once("]-rule[")?;
        Some((format!("{policy}.{namespace}"), rest.split_once(']')?.0.to_owned()))
    };
    split().unwrap_or_else(|| (name.to_owned(), String::new()))
}

#[cfg(test)]
mod tests {
    use envoy_api::listener::{Filter, FilterChain};

    use super::*;

    #[test]
    fn policies_are_listed_as_istioctl_does() {
        let filter = |action: Action, names: &[&str]| {
            let policies = names.iter().map(|name| ((*name).to_owned(), Default::default())).collect();
            let rules = Rules { action: action.into(), policies, ..Rules::default() };
            let rbac = TcpRbac { rules: Some(rules), ..TcpRbac::default() };
            let any = envoy_api::Any { type_url: String::new(), value: rbac.encode_to_vec() };
            Filter { name: "envoy.filters.network.rbac".into(), config_type: Some(ConfigType::TypedConfig(any)) }
        };
        let filters = vec![
            filter(Action::Allow, &["ns[b]-policy[z]-rule[0]", "ns[b]-policy[z]-rule[1]", "ns[b]-policy[a]-rule[0]"]),
            filter(Action::Deny, &[]),
        ];
        let chain = FilterChain { filters, ..FilterChain::default() };
        let listener = Listener { filter_chains: vec![chain], ..Listener::default() };
        assert_eq!(
            table(&[listener]),
            "ACTION   AuthorizationPolicy         RULES\n\
             DENY     _anonymous_match_nothing_   1\n\
             ALLOW    a.b                         1\n\
             ALLOW    z.b                         2\n"
        );
    }
}
