//! Role-based access control: policies or a matcher tree, and a verdict with the name of what decided.

mod rules;

use std::sync::{Arc, LazyLock};

use mesh_types::ArcStr;
use serde_json::{Map, Value};

use crate::address::Address;
use crate::any::Typed;
use crate::cel::{Expression, Options};
use crate::format::FormatContext;
use crate::headers::Headers;
use crate::match_tree::{MatchData, MatchTree, Place};
use crate::metadata::{FilterState, Metadata};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::route::Matched;
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
    by: By,
    /// What is noted of a request that matches nothing.
    unmatched: Note,
}

#[derive(Debug)]
enum By {
    /// Sorted by name: Envoy keeps policies in a sorted map and takes the first that matches.
    Policies(Action, Box<[Policy]>),
    /// What it does not lead anywhere is denied. One of its actions may be to log.
    Tree { tree: MatchTree<TreeAction>, logs: bool },
}

/// A leaf of a tree (`config.rbac.v3.Action`).
#[derive(Debug)]
struct TreeAction {
    name: ArcStr,
    action: Action,
    note: Note,
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
    fn compile(action: i32) -> Compiled<Self> {
        match action {
            0 => Ok(Action::Allow),
            1 => Ok(Action::Deny),
            2 => Ok(Action::Log),
            other => Err(Invalid::new("action", format!("{other} is no known value"))),
        }
    }

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
    /// The request's route, for its metadata and how paths match there.
    pub route: Option<&'a Matched>,
    /// What is known of the request, for conditions; without, they know only what else stands here.
    pub stream: Option<&'a StreamInfo>,
}

impl RbacInput<'_> {
    fn match_data(&self) -> MatchData<'_> {
        MatchData {
            remote: Some(self.remote),
            filter_state: Some(self.filter_state),
            metadata: Some(self.metadata),
            request: self.headers,
            stream: self.stream,
            ..MatchData::of_connection(self.connection)
        }
    }

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
    pub(crate) fn compile_http(config: &pb::http_filter::rbac::v3::Rbac, options: &crate::Options) -> Compiled<Self> {
        let enforced = Engine { place: Place::HttpRbac, shadow: false, prefix: &config.rules_stat_prefix, options };
        let shadow = Engine { shadow: true, prefix: &config.shadow_rules_stat_prefix, ..enforced };
        Ok(Self {
            rules: enforced.compile(config.matcher.as_ref(), config.rules.as_ref())?,
            shadow: shadow.compile(config.shadow_matcher.as_ref(), config.shadow_rules.as_ref())?,
            shadow_prefix: config.shadow_rules_stat_prefix.as_str().into(),
            stat_prefix: config.rules_stat_prefix.as_str().into(),
            tracks_policies: config.track_per_rule_stats,
            ..Self::default()
        })
    }

    pub(crate) fn compile_network(
        config: &pb::network_filter::rbac::v3::Rbac,
        options: &crate::Options,
    ) -> Compiled<Self> {
        let enforced = Engine { place: Place::NetworkRbac, shadow: false, prefix: "", options };
        let shadow = Engine { shadow: true, prefix: &config.shadow_rules_stat_prefix, ..enforced };
        Ok(Self {
            rules: enforced.compile(config.matcher.as_ref(), config.rules.as_ref())?,
            shadow: shadow.compile(config.shadow_matcher.as_ref(), config.shadow_rules.as_ref())?,
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
    /// `None` without enforced rules, or with a matcher tree, in which each action has its own meaning.
    pub fn policies(&self) -> Option<(bool, impl Iterator<Item = &ArcStr>)> {
        match &self.rules.as_ref()?.by {
            By::Policies(action, policies) => {
                Some((*action == Action::Allow, policies.iter().map(|policy| &policy.name)))
            }
            By::Tree { .. } => None,
        }
    }

    /// Decides.
    pub fn check(&self, input: &RbacInput<'_>) -> RbacVerdict {
        let shadow = self.shadow.as_ref().map(|rules| {
            let Decision { allowed, policy, note, .. } = rules.check(input);
            ShadowVerdict { allowed, policy: policy.cloned(), note: note.clone() }
        });
        let Some(rules) = &self.rules else {
            return RbacVerdict { allowed: true, policy: None, shadow, enforced: None, note: None, log_hint: None };
        };
        let Decision { allowed, policy, note, log_hint } = rules.check(input);
        let (policy, note) = (policy.cloned(), Some(note.clone()));
        RbacVerdict { allowed, policy, shadow, enforced: Some(allowed), note, log_hint }
    }
}

/// What rules say.
struct Decision<'r> {
    allowed: bool,
    policy: Option<&'r ArcStr>,
    note: &'r Note,
    log_hint: Option<bool>,
}

/// What compiling rules needs to know of them.
#[derive(Clone, Copy)]
struct Engine<'e> {
    place: Place,
    shadow: bool,
    prefix: &'e str,
    options: &'e crate::Options,
}

impl Engine<'_> {
    /// A tree stands for the policies (Envoy `createEngine`).
    fn compile(
        self,
        tree: Option<&pb::xds_matcher::Matcher>,
        rules: Option<&pb::rbac::Rbac>,
    ) -> Compiled<Option<Rules>> {
        let (tree_field, field) = if self.shadow { ("shadow_matcher", "shadow_rules") } else { ("matcher", "rules") };
        match tree {
            Some(tree) => self.tree(tree).map(Some).at(tree_field),
            None => rules.map(|rules| self.policies(rules)).transpose().at(field),
        }
    }

    fn tree(self, tree: &pb::xds_matcher::Matcher) -> Compiled<Rules> {
        let mut logs = false;
        let tree = MatchTree::compile(tree, self.place, self.options, &mut |typed: &Typed<'_>| {
            if typed.name != "envoy.config.rbac.v3.Action" {
                return Err(typed.unknown());
            }
            let config: pb::rbac::Action = typed.decode()?;
            let action = Action::compile(config.action)?;
            logs |= action == Action::Log;
            let name: ArcStr = crate::fields::required("name", &config.name)?;
            let note = note(self.prefix, self.shadow, action.allows(true), Some(&name));
            Ok(TreeAction { name, action, note })
        })?;
        Ok(Rules { by: By::Tree { tree, logs }, unmatched: note(self.prefix, self.shadow, false, None) })
    }

    fn policies(self, rules: &pb::rbac::Rbac) -> Compiled<Rules> {
        // Istio sets no audit loggers; they would have to be called.
        refuse!("audit_logging_options": rules.audit_logging_options.as_ref().is_some_and(|a| a.audit_condition != 0));
        let action = Action::compile(rules.action)?;
        let http = self.place == Place::HttpRbac;
        let mut policies = Vec::with_capacity(rules.policies.len());
        for (name, policy) in &rules.policies {
            let note = note(self.prefix, self.shadow, action.allows(true), Some(name));
            policies.push(Policy::compile(name, policy, note, http).at_key("policies", name)?);
        }
        policies.sort_by(|a, b| a.name.cmp(&b.name));
        let unmatched = note(self.prefix, self.shadow, action.allows(false), None);
        Ok(Rules { by: By::Policies(action, policies.into()), unmatched })
    }
}

impl Rules {
    fn check(&self, input: &RbacInput<'_>) -> Decision<'_> {
        match &self.by {
            // Envoy `RoleBasedAccessControlEngineImpl::handleAction`.
            By::Policies(action, policies) => {
                let policy = policies.iter().find(|p| p.matches(input));
                Decision {
                    allowed: action.allows(policy.is_some()),
                    policy: policy.map(|p| &p.name),
                    note: policy.map_or(&self.unmatched, |p| &p.note),
                    log_hint: (*action == Action::Log).then_some(policy.is_some()),
                }
            }
            // Envoy `RoleBasedAccessControlMatcherEngineImpl::handleAction`.
            By::Tree { tree, logs } => match tree.evaluate(&input.match_data()).found() {
                Some(found) => Decision {
                    allowed: found.action.allows(true),
                    policy: Some(&found.name),
                    note: &found.note,
                    log_hint: logs.then_some(found.action == Action::Log),
                },
                None => Decision { allowed: false, policy: None, note: &self.unmatched, log_hint: None },
            },
        }
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
