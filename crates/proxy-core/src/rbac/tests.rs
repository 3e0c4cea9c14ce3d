use std::collections::HashMap;
use std::sync::Arc;

use super::*;
use crate::stream_info::{PeerCertificate, TlsInfo};
use pb::rbac::permission::Rule;
use pb::rbac::principal::{Authenticated, Identifier};

fn compile(config: pb::http_filter::rbac::v3::Rbac) -> Compiled<Rbac> {
    Rbac::compile_http(&config, &crate::Options::default())
}

fn exact(text: &str) -> pb::matcher::StringMatcher {
    pb::matcher::StringMatcher {
        ignore_case: false,
        match_pattern: Some(pb::matcher::string_matcher::MatchPattern::Exact(text.into())),
    }
}

fn policy(rule: Rule, identifier: Identifier) -> pb::rbac::Policy {
    pb::rbac::Policy {
        permissions: vec![pb::rbac::Permission { rule: Some(rule) }],
        principals: vec![pb::rbac::Principal { identifier: Some(identifier) }],
        ..Default::default()
    }
}

fn rbac(action: i32, policies: &[(&str, pb::rbac::Policy)]) -> Rbac {
    let policies: HashMap<_, _> = policies.iter().map(|(n, p)| ((*n).to_owned(), p.clone())).collect();
    let rules = pb::rbac::Rbac { action, policies, audit_logging_options: None };
    compile(pb::http_filter::rbac::v3::Rbac { rules: Some(rules), ..Default::default() }).unwrap()
}

fn check(rbac: &Rbac, headers: &Headers, uri: Option<&str>) -> RbacVerdict {
    let peer = PeerCertificate { uri_sans: uri.iter().map(|u| (*u).into()).collect(), ..PeerCertificate::default() };
    let connection = ConnectionInfo {
        local: Address::Ip(([10, 0, 0, 1], 8080).into()),
        tls: uri.map(|_| Arc::new(TlsInfo { peer: Some(peer), ..TlsInfo::default() })),
        ..ConnectionInfo::default()
    };
    rbac.check(&RbacInput {
        headers: Some(headers),
        connection: &connection,
        remote: &connection.remote,
        metadata: &Metadata::default(),
        filter_state: &FilterState::default(),
        route: None,
        stream: None,
    })
}

fn sleep() -> Identifier {
    Identifier::Authenticated(Authenticated { principal_name: Some(exact("spiffe://td/ns/a/sa/sleep")) })
}

#[test]
fn allow_needs_a_policy_and_names_it() {
    let rbac = rbac(
        0,
        &[("b", policy(Rule::DestinationPort(8080), sleep())), ("a", policy(Rule::DestinationPort(1), sleep()))],
    );
    let yes = check(&rbac, &Headers::new(), Some("spiffe://td/ns/a/sa/sleep"));
    assert_eq!((yes.allowed, yes.policy.as_deref()), (true, Some("b")));
    let no = check(&rbac, &Headers::new(), Some("spiffe://td/ns/a/sa/other"));
    assert_eq!(no.details(), "rbac_access_denied_matched_policy[none]");
    assert!(!no.allowed && !check(&rbac, &Headers::new(), None).allowed);
}

#[test]
fn deny_names_the_policy_and_ignores_the_query() {
    let path = pb::matcher::PathMatcher { rule: Some(pb::matcher::path_matcher::Rule::Path(exact("/admin"))) };
    let rbac = rbac(1, &[("ns[x]-policy[y]-rule[0]", policy(Rule::UrlPath(path), Identifier::Any(true)))]);
    let no = check(&rbac, &Headers::of([(":path", "/admin?x")]), None);
    assert!(!no.allowed);
    assert_eq!(no.details(), "rbac_access_denied_matched_policy[ns[x]-policy[y]-rule[0]]");
    assert!(check(&rbac, &Headers::of([(":path", "/admin/x")]), None).allowed);
}

#[test]
fn empty_rules_deny_and_absent_rules_allow() {
    assert!(!check(&rbac(0, &[]), &Headers::new(), None).allowed);
    assert!(check(&Rbac::default(), &Headers::new(), None).allowed);
    assert!(check(&rbac(2, &[]), &Headers::new(), None).allowed);
}

#[test]
fn conditions_narrow_policies_and_must_be_whole() {
    use pb::cel::expr::{Call, ExprKind, Ident, Select};
    use pb::cel::{Constant, Expr, constant::ConstantKind};
    let expr = |kind| Expr { id: 0, expr_kind: Some(kind) };
    let ident = expr(ExprKind::IdentExpr(Ident { name: "request".into() }));
    let select = Select { operand: Some(Box::new(ident)), field: "method".into(), test_only: false };
    let text = Constant { constant_kind: Some(ConstantKind::StringValue("GET".into())) };
    let arguments = vec![expr(ExprKind::SelectExpr(Box::new(select))), expr(ExprKind::ConstExpr(text))];
    let call = |function: &str| {
        let call = Call { target: None, function: function.into(), args: arguments.clone() };
        expr(ExprKind::CallExpr(Box::new(call)))
    };
    let with = |condition| {
        let policy = pb::rbac::Policy { condition: Some(condition), ..policy(Rule::Any(true), Identifier::Any(true)) };
        let rules = pb::rbac::Rbac { policies: HashMap::from([("p".to_owned(), policy)]), ..Default::default() };
        compile(pb::http_filter::rbac::v3::Rbac { rules: Some(rules), ..Default::default() })
    };
    let rbac = with(call("_==_")).unwrap();
    assert!(check(&rbac, &Headers::of([(":method", "GET")]), None).allowed);
    assert!(!check(&rbac, &Headers::of([(":method", "PUT")]), None).allowed);
    for (condition, reason) in [
        (Expr::default(), "invalid empty expression"),
        (call("nope"), "No overload found in reference resolve step for nope"),
    ] {
        let rejected = with(condition).unwrap_err().of("listener", "l").to_string();
        let place = r#"listener l: rules.policies["p"].condition: failed to create an expression: "#;
        assert_eq!(rejected, format!("{place}{reason}"));
    }
}
