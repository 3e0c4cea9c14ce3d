//! Role-based access control: policies compiled to trees, a verdict with the policy's name.

mod rules;

use mesh_types::ArcStr;

use crate::address::Address;
use crate::headers::Headers;
use crate::metadata::{FilterState, Metadata};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::stream_info::ConnectionInfo;
use rules::{Permission, Principal};

/// The RBAC filter of a chain or a route: enforced rules and shadow rules.
#[derive(Debug, Default)]
pub struct Rbac {
    /// Decide.
    rules: Option<Rules>,
    /// Are only reported.
    shadow: Option<Rules>,
    /// Prefix of statistics and metadata of the shadow rules.
    pub shadow_prefix: ArcStr,
    /// Prefix of statistics.
    pub stat_prefix: ArcStr,
    /// Policies that match are counted, each.
    pub tracks_policies: bool,
    /// Network filter: check on every read instead of once.
    pub continuous: bool,
    /// Network filter: close after this delay.
    pub delay_deny: Option<std::time::Duration>,
}

#[derive(Debug)]
struct Rules {
    action: Action,
    /// Sorted by name: Envoy keeps policies in a sorted map and takes the first that matches.
    policies: Box<[Policy]>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Action {
    Allow,
    Deny,
    Log,
}

#[derive(Debug)]
struct Policy {
    name: ArcStr,
    permissions: Box<[Permission]>,
    principals: Box<[Principal]>,
}

/// What RBAC looks at.
#[derive(Clone, Copy, Debug)]
pub struct RbacInput<'a> {
    /// Request head; `None` for TCP.
    pub headers: Option<&'a Headers>,
    /// The connection.
    pub connection: &'a ConnectionInfo,
    /// The trusted client address.
    pub remote: &'a Address,
    /// Written by earlier filters.
    pub metadata: &'a Metadata,
    /// Written by earlier filters.
    pub filter_state: &'a FilterState,
    /// The route's metadata, for `sourced_metadata`.
    pub route_metadata: Option<&'a Metadata>,
}

/// May it go on, and why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RbacVerdict {
    /// Go on.
    pub allowed: bool,
    /// The policy that matched, if one did.
    pub policy: Option<ArcStr>,
    /// What the shadow rules would have said.
    pub shadow: Option<ShadowVerdict>,
    /// What the enforced rules said; `None`: there are none.
    pub enforced: Option<bool>,
    /// The rules only mark requests for the log: `envoy.common`/`access_log_hint` is to be set to this.
    pub log_hint: Option<bool>,
}

/// What the shadow rules would have said. Istio's dry run and its external authorization read it from the dynamic
/// metadata `envoy.filters.http.rbac` under the prefix.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ShadowVerdict {
    /// It would have gone on.
    pub allowed: bool,
    /// The policy that matched, if one did.
    pub policy: Option<ArcStr>,
}

impl RbacVerdict {
    /// Envoy's response code details of a refusal.
    pub fn details(&self) -> String {
        let policy = self.policy.as_deref().unwrap_or("none");
        // `RoleBasedAccessControlFilter`: white space would break the log's columns.
        format!("rbac_access_denied_matched_policy[{}]", policy.replace([' ', '\t', '\n'], "_"))
    }
}

impl Rbac {
    pub(crate) fn compile_http(config: &pb::http_filter::rbac::v3::Rbac) -> Compiled<Self> {
        refuse!("matcher": config.matcher.is_some(), "shadow_matcher": config.shadow_matcher.is_some());
        Ok(Self {
            rules: config.rules.as_ref().map(|r| Rules::compile(r, true)).transpose().at("rules")?,
            shadow: config.shadow_rules.as_ref().map(|r| Rules::compile(r, true)).transpose().at("shadow_rules")?,
            shadow_prefix: config.shadow_rules_stat_prefix.as_str().into(),
            stat_prefix: config.rules_stat_prefix.as_str().into(),
            tracks_policies: config.track_per_rule_stats,
            ..Self::default()
        })
    }

    pub(crate) fn compile_network(config: &pb::network_filter::rbac::v3::Rbac) -> Compiled<Self> {
        refuse!("matcher": config.matcher.is_some(), "shadow_matcher": config.shadow_matcher.is_some());
        Ok(Self {
            rules: config.rules.as_ref().map(|r| Rules::compile(r, false)).transpose().at("rules")?,
            shadow: config.shadow_rules.as_ref().map(|r| Rules::compile(r, false)).transpose().at("shadow_rules")?,
            shadow_prefix: config.shadow_rules_stat_prefix.as_str().into(),
            stat_prefix: crate::fields::required("stat_prefix", &config.stat_prefix)?,
            tracks_policies: false,
            continuous: config.enforcement_type == 1,
            delay_deny: crate::fields::duration("delay_deny", config.delay_deny.as_ref())?,
        })
    }

    /// Whether any rule is there at all; without, everything passes.
    pub fn is_empty(&self) -> bool {
        self.rules.is_none() && self.shadow.is_none()
    }

    /// Names of the enforced policies in the order in which they are tried, and whether a match means yes (`ALLOW`).
    /// `None` without enforced rules.
    pub fn policies(&self) -> Option<(bool, impl Iterator<Item = &ArcStr>)> {
        let rules = self.rules.as_ref()?;
        Some((rules.action == Action::Allow, rules.policies.iter().map(|policy| &policy.name)))
    }

    /// Decides.
    pub fn check(&self, input: &RbacInput<'_>) -> RbacVerdict {
        let shadow = self.shadow.as_ref().map(|rules| {
            let (allowed, policy) = rules.check(input);
            ShadowVerdict { allowed, policy: policy.cloned() }
        });
        let Some(rules) = &self.rules else {
            return RbacVerdict { allowed: true, policy: None, shadow, enforced: None, log_hint: None };
        };
        let (allowed, policy) = rules.check(input);
        let log_hint = (rules.action == Action::Log).then_some(policy.is_some());
        RbacVerdict { allowed, policy: policy.cloned(), shadow, enforced: Some(allowed), log_hint }
    }
}

impl Rules {
    fn compile(rules: &pb::rbac::Rbac, http: bool) -> Compiled<Self> {
        // Istio sets no audit loggers; they would have to be called.
        refuse!("audit_logging_options": rules.audit_logging_options.as_ref().is_some_and(|a| a.audit_condition != 0));
        let action = match rules.action {
            0 => Action::Allow,
            1 => Action::Deny,
            2 => Action::Log,
            other => return Err(Invalid::new("action", format!("{other} is no known value"))),
        };
        let mut policies = Vec::with_capacity(rules.policies.len());
        for (name, policy) in &rules.policies {
            policies.push(Policy::compile(name, policy, http).at_key("policies", name)?);
        }
        policies.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { action, policies: policies.into() })
    }

    /// Envoy `RoleBasedAccessControlEngineImpl::handleAction`.
    fn check(&self, input: &RbacInput<'_>) -> (bool, Option<&ArcStr>) {
        let policy = self.policies.iter().find(|p| p.matches(input)).map(|p| &p.name);
        let allowed = match self.action {
            Action::Allow => policy.is_some(),
            Action::Deny => policy.is_none(),
            Action::Log => true,
        };
        (allowed, policy)
    }
}

impl Policy {
    fn compile(name: &str, policy: &pb::rbac::Policy, http: bool) -> Compiled<Self> {
        refuse! {
            "condition": policy.condition.is_some(),
            "checked_condition": policy.checked_condition.is_some(),
        }
        let permissions = policy.permissions.iter().enumerate();
        let principals = policy.principals.iter().enumerate();
        let policy = Self {
            name: name.into(),
            permissions: permissions
                .map(|(i, p)| Permission::compile(p, http).at_index("permissions", i))
                .collect::<Compiled<_>>()?,
            principals: principals
                .map(|(i, p)| Principal::compile(p, http).at_index("principals", i))
                .collect::<Compiled<_>>()?,
        };
        if policy.permissions.is_empty() || policy.principals.is_empty() {
            return Err(Invalid::new("", "needs at least one permission and one principal"));
        }
        Ok(policy)
    }

    fn matches(&self, input: &RbacInput<'_>) -> bool {
        self.permissions.iter().any(|p| p.matches(input)) && self.principals.iter().any(|p| p.matches(input))
    }
}

#[cfg(test)]
mod tests;
