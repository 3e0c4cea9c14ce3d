use std::cmp::Ordering;

use envoy_api::route::{
    RouteConfiguration, RouteMatch, route::Action, route_action::ClusterSpecifier, route_match::PathSpecifier,
};

use super::{RouteFilter, management};
use crate::table::Table;

/// Domains that are shown of a virtual host.
const DOMAINS: usize = 2;

pub(super) fn select(routes: Vec<RouteConfiguration>, filter: &RouteFilter) -> Vec<RouteConfiguration> {
    routes.into_iter().filter(|table| filter.name.as_ref().is_none_or(|name| *name == table.name)).collect()
}

/// Ports first, by number. DIFFERS: istioctl leaves the order of all other names to chance; here they are sorted.
fn order(a: &RouteConfiguration, b: &RouteConfiguration) -> Ordering {
    match (a.name.parse::<i64>(), b.name.parse::<i64>()) {
        (Ok(a), Ok(b)) => a.cmp(&b),
        (Ok(_), Err(_)) => Ordering::Less,
        (Err(_), Ok(_)) => Ordering::Greater,
        (Err(_), Err(_)) => a.name.cmp(&b.name),
    }
}

pub(super) fn table(mut routes: Vec<RouteConfiguration>, filter: &RouteFilter, typed: bool) -> anyhow::Result<String> {
    if routes.is_empty() {
        anyhow::bail!("no routes found");
    }
    routes.sort_by(order);
    let head: &[&str] = match filter.verbose {
        true => &["NAME", "VHOST NAME", "DOMAINS", "MATCH", "VIRTUAL SERVICE"],
        false => &["NAME", "VIRTUAL HOSTS"],
    };
    let mut table = Table::new(5, head);
    for config in select(routes, filter) {
        let name = if typed { format!("route/{}", config.name) } else { config.name.clone() };
        if !filter.verbose {
            table.row([name, config.virtual_hosts.len().to_string()]);
            continue;
        }
        for host in &config.virtual_hosts {
            let shown = domains(&host.domains);
            for route in host.routes.iter().filter(|route| !is_passthrough(route.action.as_ref())) {
                let matched = route.r#match.as_ref().map(describe).unwrap_or_default();
                let rule = management(route.metadata.as_ref());
                table.row([name.clone(), host.name.clone(), shown.clone(), matched, rule]);
            }
            if host.routes.is_empty() {
                table.row([name.clone(), host.name.clone(), shown, "/*".to_owned(), "404".to_owned()]);
            }
        }
    }
    Ok(table.render())
}

/// Headers are left out, as istioctl does.
pub(super) fn describe(matched: &RouteMatch) -> String {
    match &matched.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) if !prefix.is_empty() => format!("{prefix}*"),
        Some(PathSpecifier::PathSeparatedPrefix(prefix)) => format!("PathPrefix:{prefix}"),
        Some(PathSpecifier::Path(path)) => path.clone(),
        Some(PathSpecifier::SafeRegex(regex)) => format!("regex {}", regex.regex),
        _ => String::new(),
    }
}

fn is_passthrough(action: Option<&Action>) -> bool {
    let Some(Action::Route(action)) = action else { return false };
    matches!(&action.cluster_specifier, Some(ClusterSpecifier::Cluster(name)) if name == "PassthroughCluster")
}

fn domains(all: &[String]) -> String {
    if let [only] = all {
        return only.clone();
    }
    let without_port = |domain: &&String| match domain.matches(':').count() {
        0 => true,
        colons => colons > 2 && domain.ends_with(']'),
    };
    let kept: Vec<&String> = all.iter().filter(without_port).collect();
    // Of `a.b.svc.cluster.local`, `a.b.svc` and `a.b` the shortest is enough.
    let has = |short: &str| kept.iter().any(|domain| *domain == short);
    let is_long = |domain: &&&String| {
        let shorter = |suffix: &str| domain.strip_suffix(suffix).is_some_and(has);
        !shorter(".svc.cluster.local") && !shorter(".svc")
    };
    let kept: Vec<&str> = kept.iter().filter(is_long).map(|domain| domain.as_str()).collect();
    match kept.len() {
        more if more > DOMAINS => format!("{} + {} more...", kept[..DOMAINS].join(", "), more - DOMAINS),
        _ => kept.join(", "),
    }
}
