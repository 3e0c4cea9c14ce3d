//! Role-based access control: policies compiled to trees, a verdict with the policy's name.

mod rules;

use std::sync::{Arc, LazyLock};

use mesh_types::ArcStr;
use serde_json::{Map, Value};

use crate::address::Address;
use crate::cel::{Expression, Options};
use crate::format::FormatContext;
use crate::headers::Headers;
use crate::metadata::{FilterState, Metadata};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::stream_info::{ConnectionInfo, StreamInfo};
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
    /// What is noted of a request that none of them matches.
    unmatched: Note,
}

/// What is written into a request's metadata about a decision, under the filter's name.
pub type Note = Arc<Map<String, Value>>;

/// Namespace of the metadata that the HTTP filter writes (Envoy `HttpFilterNames::Rbac`).
pub static HTTP_NAMESPACE: LazyLock<ArcStr> = LazyLock::new(|| "envoy.filters.http.rbac".into());

/// Namespace of the metadata that the network filter writes.
pub static NETWORK_NAMESPACE: LazyLock<ArcStr> = LazyLock::new(|| "envoy.filters.network.rbac".into());

/// The note of a decision: `PREFIXenforced_engine_result` and, if a policy matched, `PREFIXenforced_effective_policy_id`;
/// with `shadow` in their names for shadow rules (Envoy `DynamicMetadataKeys`).
pub fn note(prefix: &str, shadow: bool, allowed: bool, policy: Option<&str>) -> Note {
    let kind = if shadow { "shadow" } else { "enforced" };
    let policy = policy.map(|policy| (format!("{prefix}{kind}_effective_policy_id"), policy));
    let result = (format!("{prefix}{kind}_engine_result"), if allowed { "allowed" } else { "denied" });
    let fields = policy.into_iter().chain([result]);
    Arc::new(fields.map(|(name, value)| (name, value.into())).collect())
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Action {
    Allow,
    Deny,
    Log,
}

impl Action {
    fn allows(self, matched: bool) -> bool {
        match self {
            Action::Allow => matched,
            Action::Deny => !matched,
            Action::Log => true,
        }
    }
}

#[derive(Debug)]
struct Policy {
    name: ArcStr,
    note: Note,
    permissions: Box<[Permission]>,
    principals: Box<[Principal]>,
    /// What must hold, too.
    condition: Option<Expression>,
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
    /// What is known of the request, for conditions; without, they know only what else stands here.
    pub stream: Option<&'a StreamInfo>,
}

impl RbacInput<'_> {
    fn satisfies(&self, condition: &Expression) -> bool {
        if let Some(stream) = self.stream {
            return condition.holds(&FormatContext::new(stream, self.headers, None));
        }
        let now = (self.connection.clock)();
        let mut stream = StreamInfo::new(Arc::new(self.connection.clone()), now);
        stream.dynamic_metadata = self.metadata.clone();
        condition.holds(&FormatContext::new(&stream, self.headers, None))
    }
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
    /// What is noted of that.
    pub note: Option<Note>,
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
    /// What is noted of that.
    pub note: Note,
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
        let rules = |rules, shadow, prefix| Rules::compile_some(rules, true, shadow, prefix);
        Ok(Self {
            rules: rules(config.rules.as_ref(), false, &config.rules_stat_prefix)?,
            shadow: rules(config.shadow_rules.as_ref(), true, &config.shadow_rules_stat_prefix)?,
            shadow_prefix: config.shadow_rules_stat_prefix.as_str().into(),
            stat_prefix: config.rules_stat_prefix.as_str().into(),
            tracks_policies: config.track_per_rule_stats,
            ..Self::default()
        })
    }

    pub(crate) fn compile_network(config: &pb::network_filter::rbac::v3::Rbac) -> Compiled<Self> {
        refuse!("matcher": config.matcher.is_some(), "shadow_matcher": config.shadow_matcher.is_some());
        let rules = |rules, shadow, prefix| Rules::compile_some(rules, false, shadow, prefix);
        Ok(Self {
            rules: rules(config.rules.as_ref(), false, "")?,
            shadow: rules(config.shadow_rules.as_ref(), true, &config.shadow_rules_stat_prefix)?,
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
            let (allowed, policy, note) = rules.check(input);
            ShadowVerdict { allowed, policy: policy.cloned(), note: note.clone() }
        });
        let Some(rules) = &self.rules else {
            return RbacVerdict { allowed: true, policy: None, shadow, enforced: None, note: None, log_hint: None };
        };
        let (allowed, policy, note) = rules.check(input);
        let log_hint = (rules.action == Action::Log).then_some(policy.is_some());
        let (policy, note) = (policy.cloned(), Some(note.clone()));
        RbacVerdict { allowed, policy, shadow, enforced: Some(allowed), note, log_hint }
    }
}

impl Rules {
    fn compile_some(rules: Option<&pb::rbac::Rbac>, http: bool, shadow: bool, prefix: &str) -> Compiled<Option<Self>> {
        let field = if shadow { "shadow_rules" } else { "rules" };
        rules.map(|rules| Self::compile(rules, http, shadow, prefix)).transpose().at(field)
    }

    fn compile(rules: &pb::rbac::Rbac, http: bool, shadow: bool, prefix: &str) -> Compiled<Self> {
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
            let note = note(prefix, shadow, action.allows(true), Some(name));
            policies.push(Policy::compile(name, policy, note, http).at_key("policies", name)?);
        }
        policies.sort_by(|a, b| a.name.cmp(&b.name));
        let unmatched = note(prefix, shadow, action.allows(false), None);
        Ok(Self { action, policies: policies.into(), unmatched })
    }

    /// Envoy `RoleBasedAccessControlEngineImpl::handleAction`.
    fn check(&self, input: &RbacInput<'_>) -> (bool, Option<&ArcStr>, &Note) {
        let policy = self.policies.iter().find(|p| p.matches(input));
        (self.action.allows(policy.is_some()), policy.map(|p| &p.name), policy.map_or(&self.unmatched, |p| &p.note))
    }
}

impl Policy {
    fn compile(name: &str, policy: &pb::rbac::Policy, note: Note, http: bool) -> Compiled<Self> {
        // Envoy takes the expression of a checked one, without a look at its types.
        let checked = policy.checked_condition.as_ref().map(|checked| checked.expr.clone().unwrap_or_default());
        let condition = policy.condition.as_ref().or(checked.as_ref());
        if policy.condition.is_some() && policy.checked_condition.is_some() {
            return Err(Invalid::new("checked_condition", "cannot stand beside condition"));
        }
        let options = Options::of(policy.cel_config.as_ref());
        let permissions = policy.permissions.iter().enumerate();
        let principals = policy.principals.iter().enumerate();
        let policy = Self {
            name: name.into(),
            note,
            permissions: permissions
                .map(|(i, p)| Permission::compile(p, http).at_index("permissions", i))
                .collect::<Compiled<_>>()?,
            principals: principals
                .map(|(i, p)| Principal::compile(p, http).at_index("principals", i))
                .collect::<Compiled<_>>()?,
            condition: condition.map(|c| Expression::of_message(c, options)).transpose().at("condition")?,
        };
        if policy.permissions.is_empty() || policy.principals.is_empty() {
            return Err(Invalid::new("", "needs at least one permission and one principal"));
        }
        Ok(policy)
    }

    fn matches(&self, input: &RbacInput<'_>) -> bool {
        self.permissions.iter().any(|p| p.matches(input))
            && self.principals.iter().any(|p| p.matches(input))
            && self.condition.as_ref().is_none_or(|condition| input.satisfies(condition))
    }
}

#[cfg(test)]
mod tests;
