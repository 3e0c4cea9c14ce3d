//! Who may do what: AuthorizationPolicies as RBAC filters (istiod `security/authz`).

mod provider;
mod rule;

use std::any::TypeId;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use envoy_api::http::HttpFilter;
use envoy_api::listener::Filter;
use envoy_api::pb::envoy::config::rbac::v3::{
    Permission, Policy, Principal, Rbac, permission, principal, rbac::Action as RbacAction,
};
use envoy_api::pb::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use envoy_api::pb::envoy::extensions::filters::network::rbac::v3::Rbac as TcpRbac;
use istio_api::AuthorizationPolicy;
use istio_api::authorization_policy::Action;
use push_context::{Config, Same};

use crate::context::Context;
use crate::filters;
use crate::proto::{any, network_filter};

pub(crate) use rule::jwt_claim;

const HTTP_RBAC: &str = "envoy.filters.http.rbac";
const TCP_RBAC: &str = "envoy.filters.network.rbac";
const EXT_AUTHZ_PREFIX: &str = "istio-ext-authz";
const EXT_AUTHZ_STAT: &str = "istio_ext_authz_";

/// Policies of one kind as RBAC rules: those that hold, and those in dry run.
struct Rules {
    enforced: Option<Rbac>,
    shadow: Option<Rbac>,
}

fn rbac(action: RbacAction) -> Rbac {
    Rbac { action: action as i32, policies: HashMap::new(), ..Rbac::default() }
}

/// A rule that nothing fulfils: of a policy without rules.
fn never() -> Policy {
    let any = Permission { rule: Some(permission::Rule::Any(true)) };
    let anyone = Principal { identifier: Some(principal::Identifier::Any(true)) };
    Policy {
        permissions: vec![Permission { rule: Some(permission::Rule::NotRule(Box::new(any))) }],
        principals: vec![Principal { identifier: Some(principal::Identifier::NotId(Box::new(anyone))) }],
        ..Policy::default()
    }
}

fn is_dry_run(policy: &Config<AuthorizationPolicy>) -> bool {
    let value = policy.annotations.get("istio.io/dry-run").map(String::as_str);
    matches!(value, Some("1" | "t" | "T" | "true" | "TRUE" | "True"))
}

fn add(
    cx: &Context<'_>,
    out: &mut Rbac,
    policy: &Config<AuthorizationPolicy>,
    prefix: &str,
    action: RbacAction,
    tcp: bool,
) {
    let name = |i: usize| format!("{prefix}ns[{}]-policy[{}]-rule[{i}]", policy.namespace, policy.name);
    for (i, rule) in policy.spec.rules.iter().enumerate() {
        if let Some(generated) = rule::generate(cx, rule, &policy.namespace, action, tcp) {
            out.policies.insert(name(i), generated);
        }
    }
    if policy.spec.rules.is_empty() {
        out.policies.insert(name(0), never());
    }
}

fn policies<'a>(cx: &'a Context<'_>, action: Action) -> Vec<&'a Arc<Config<AuthorizationPolicy>>> {
    let mut all = cx.push.authorization_policies(&cx.node.namespace, &cx.node.labels);
    all.retain(|p| p.spec.action == action);
    all
}

fn rules(cx: &Context<'_>, of: Action, action: RbacAction, tcp: bool) -> Option<Rules> {
    let policies = policies(cx, of);
    if policies.is_empty() {
        return None;
    }
    let mut out = Rules { enforced: None, shadow: None };
    for policy in policies {
        let slot = if is_dry_run(policy) { &mut out.shadow } else { &mut out.enforced };
        add(cx, slot.get_or_insert_with(|| rbac(action)), policy, "", action, tcp);
    }
    Some(out)
}

const DRY_RUN_ALLOW: &str = "istio_dry_run_allow_";

/// With the prefix of statistics of policies in dry run.
const KINDS: [(Action, RbacAction, &str); 3] = [
    (Action::Audit, RbacAction::Log, ""),
    (Action::Deny, RbacAction::Deny, "istio_dry_run_deny_"),
    (Action::Allow, RbacAction::Allow, DRY_RUN_ALLOW),
];

/// istiod writes the prefix of ALLOW where there is nothing in dry run.
fn stat_prefix(rules: &Rules, own: &str) -> String {
    if rules.shadow.is_some() { own.to_owned() } else { DRY_RUN_ALLOW.to_owned() }
}

/// Filters of the proxy's policies: every one of its ports has the same, and so have other proxies of these policies.
fn of_policies<T: Clone + Send + Sync + 'static>(cx: &Context<'_>, make: impl FnOnce() -> Vec<T>) -> Vec<T> {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(TypeId, Vec<Same<Config<AuthorizationPolicy>>>);
    let policies = cx.push.authorization_policies(&cx.node.namespace, &cx.node.labels);
    let policies: Vec<_> =
        policies.into_iter().filter(|p| p.spec.action != Action::Custom).cloned().map(Same).collect();
    match policies.is_empty() {
        true => Vec::new(),
        false => cx.push.memo().get(Key(TypeId::of::<T>(), policies), || Arc::new(make())).to_vec(),
    }
}

/// HTTP filters of AUDIT, DENY and ALLOW policies, in this order.
pub(crate) fn http(cx: &Context<'_>) -> Vec<HttpFilter> {
    of_policies(cx, || http_of_policies(cx))
}

fn http_of_policies(cx: &Context<'_>) -> Vec<HttpFilter> {
    let filter = |(of, action, stat): &(Action, RbacAction, &str)| {
        let rules = rules(cx, *of, *action, false)?;
        let config = HttpRbac {
            shadow_rules_stat_prefix: stat_prefix(&rules, stat),
            rules: rules.enforced,
            shadow_rules: rules.shadow,
            ..HttpRbac::default()
        };
        Some(filters::http(HTTP_RBAC, &config))
    };
    KINDS.iter().filter_map(filter).collect()
}

/// Network filters of the same policies; only what TCP connections show counts.
pub(crate) fn tcp(cx: &Context<'_>) -> Vec<Filter> {
    of_policies(cx, || tcp_of_policies(cx))
}

fn tcp_of_policies(cx: &Context<'_>) -> Vec<Filter> {
    let filter = |(of, action, stat): &(Action, RbacAction, &str)| {
        let rules = rules(cx, *of, *action, true)?;
        let config = TcpRbac {
            stat_prefix: "tcp.".to_owned(),
            shadow_rules_stat_prefix: stat_prefix(&rules, stat),
            rules: rules.enforced,
            shadow_rules: rules.shadow,
            ..TcpRbac::default()
        };
        Some(network_filter(TCP_RBAC, any(&config)))
    };
    KINDS.iter().filter_map(filter).collect()
}

/// The policies of one action for a gRPC server (istiod `grpcgen/lds.go`, `buildRBAC`), which knows neither AUDIT nor CUSTOM.
///
/// DIFFERS: istiod leaves the filter out when the policies have no rules, so that an ALLOW that should let nobody in lets in
/// everybody; it enforces policies in dry run; and it does not know a principal by the aliases of its trust domain.
pub(crate) fn grpc(cx: &Context<'_>, of: Action, action: RbacAction) -> Option<HttpRbac> {
    let mut out = rbac(action);
    for policy in policies(cx, of).into_iter().filter(|policy| !is_dry_run(policy)) {
        let name = |i: usize| format!("{}-{}-{i}", policy.namespace, policy.name);
        for (i, rule) in policy.spec.rules.iter().enumerate() {
            // A rule that cannot be said lets nobody in, and keeps nobody out.
            let made = rule::generate(cx, rule, &policy.namespace, action, false).unwrap_or_else(never);
            out.policies.insert(name(i), made);
        }
        if policy.spec.rules.is_empty() {
            out.policies.insert(name(0), never());
        }
    }
    (!out.policies.is_empty()).then(|| HttpRbac { rules: Some(out), ..HttpRbac::default() })
}

/// CUSTOM policies by provider.
fn custom(cx: &Context<'_>, tcp: bool) -> BTreeMap<String, Rules> {
    let mut out: BTreeMap<String, Rules> = BTreeMap::new();
    for policy in policies(cx, Action::Custom) {
        let name = policy.spec.provider.as_ref().map(|p| p.name.clone()).unwrap_or_default();
        let prefix =
            if name.is_empty() { format!("{EXT_AUTHZ_PREFIX}-") } else { format!("{EXT_AUTHZ_PREFIX}-{name}-") };
        let own = out.entry(name).or_insert(Rules { enforced: None, shadow: None });
        let slot = if is_dry_run(policy) { &mut own.shadow } else { &mut own.enforced };
        add(cx, slot.get_or_insert_with(|| rbac(RbacAction::Deny)), policy, &prefix, RbacAction::Deny, tcp);
    }
    out
}

/// A provider that cannot be asked refuses what it should have decided.
fn refuse(rules: Option<Rbac>) -> Rbac {
    let policies = rules.unwrap_or_else(|| rbac(RbacAction::Deny)).policies;
    let renamed = policies.into_iter().map(|(name, policy)| (format!("{name}-deny-due-to-bad-CUSTOM-action"), policy));
    Rbac { policies: renamed.collect(), ..rbac(RbacAction::Deny) }
}

/// HTTP filters of CUSTOM policies: a shadow RBAC notes the request, the external authorizer decides.
pub(crate) fn http_custom(cx: &Context<'_>) -> Vec<HttpFilter> {
    let all = custom(cx, false);
    let several = all.len() > 1 && !cx.push.settings.several_authorizers;
    let mut out = Vec::new();
    for (name, rules) in all {
        let external = if several { None } else { provider::http(cx, &name) };
        let Some(external) = external else {
            out.push(filters::http(
                HTTP_RBAC,
                &HttpRbac { rules: Some(refuse(rules.enforced)), ..HttpRbac::default() },
            ));
            continue;
        };
        let config = HttpRbac {
            rules: rules.shadow.filter(|shadow| !shadow.policies.is_empty()),
            shadow_rules: Some(rules.enforced.unwrap_or_else(|| rbac(RbacAction::Deny))),
            shadow_rules_stat_prefix: EXT_AUTHZ_STAT.to_owned(),
            ..HttpRbac::default()
        };
        out.push(filters::http(HTTP_RBAC, &config));
        out.push(filters::http("envoy.filters.http.ext_authz", &external));
    }
    out
}

/// Network filters of the same; providers that speak HTTP are not asked about TCP.
pub(crate) fn tcp_custom(cx: &Context<'_>) -> Vec<Filter> {
    let all = custom(cx, true);
    let several = all.len() > 1 && !cx.push.settings.several_authorizers;
    let mut out = Vec::new();
    let filter = |config: TcpRbac| network_filter(TCP_RBAC, any(&TcpRbac { stat_prefix: "tcp.".to_owned(), ..config }));
    for (name, rules) in all {
        let external = if several { None } else { provider::tcp(cx, &name) };
        match external {
            None => out.push(filter(TcpRbac { rules: Some(refuse(rules.enforced)), ..TcpRbac::default() })),
            Some(None) => {}
            Some(Some(external)) => {
                out.push(filter(TcpRbac {
                    rules: rules.shadow.filter(|shadow| !shadow.policies.is_empty()),
                    shadow_rules: Some(rules.enforced.unwrap_or_else(|| rbac(RbacAction::Deny))),
                    shadow_rules_stat_prefix: EXT_AUTHZ_STAT.to_owned(),
                    ..TcpRbac::default()
                }));
                out.push(network_filter("envoy.filters.network.ext_authz", any(&external)));
            }
        }
    }
    out
}
