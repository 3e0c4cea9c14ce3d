//! HTTP at one proxy: what the connection manager does to a request until it goes to a cluster or is answered.

use std::sync::Arc;

use proxy_core::filters::{Abort, CorsDecision, HttpFilter, Needs, PerFilter, cors_decide};
use proxy_core::hcm::{PathVerdict, Routes, conform_request, normalize};
use proxy_core::rbac::{RbacInput, RbacVerdict};
use proxy_core::route::{Action, ClusterSpecifier, Forward, HashContext, Matched, RouteInput, RouteResult};
use proxy_core::{
    Address, ArcStr, ConnectionInfo, FilterState, FormatContext, Headers, HttpConnectionManager, Metadata, Random,
    Rbac, RouteTable, StreamInfo,
};

use crate::mesh::{Mesh, Pod};
use crate::trace::{Logged, Outcome, PassedOver, Side, Source, Step};
use crate::{Configuration, allowances, origin, scope};

/// One request at one connection manager.
pub(crate) struct Hop<'a> {
    pub(crate) at: &'a Configuration,
    pub(crate) mesh: Option<&'a Mesh>,
    /// The pod of this proxy, if it is known.
    pub(crate) pod: Option<&'a Pod>,
    pub(crate) hcm: &'a HttpConnectionManager,
    pub(crate) connection: &'a Arc<ConnectionInfo>,
    /// Decides weights and shares.
    pub(crate) random: u64,
}

/// A request on its way to a cluster.
pub(crate) struct Onward {
    pub(crate) cluster: ArcStr,
    pub(crate) matched: Matched,
    /// The head as it goes upstream.
    pub(crate) head: Headers,
    /// The ALPN that Istio's filter wants for HTTP/1.1 and HTTP/2.
    pub(crate) alpn: Option<Arc<proxy_core::filters::AlpnOverride>>,
}

impl Hop<'_> {
    /// In the proxy's order: head, route, filters, action.
    pub(crate) fn run(&self, mut head: Headers, side: &mut Side) -> Result<Onward, Outcome> {
        let Side { steps, logged, .. } = side;
        let info = StreamInfo::new(Arc::clone(self.connection), std::time::SystemTime::UNIX_EPOCH);
        let identity =
            conform_request(self.hcm, &mut head, &info, || "00000000-0000-4000-8000-000000000000".to_owned());
        match normalize(self.hcm, &mut head) {
            PathVerdict::Ok => {}
            PathVerdict::Reject(details) => {
                steps.push(Step::new("path", "it is refused").end());
                return Err(answered(400, None, details, "the path is malformed"));
            }
            PathVerdict::Redirect(to) => {
                steps.push(Step::new("path", format!("redirected to {to}")).end());
                return Err(answered(307, None, "path_normalization_redirect", &format!("redirected to {to}")));
            }
        }
        let table = self.table(steps)?;
        let mut matched = self.route(&table, &head, steps);
        let hashed = matched.as_mut().is_ok_and(|matched| self.draw_by_hash(matched, &head, &identity.remote));
        if let Ok(matched) = &matched {
            matched_names(matched, &head, hashed, logged);
        }
        let mut metadata = Metadata::default();
        self.filters(&matched, &mut head, &identity.remote, &mut metadata, steps)?;
        let matched = matched?;
        let forward = self.action(&matched, &head, hashed, steps)?;
        let Some(cluster) = matched.cluster(&head) else {
            return Err(answered(
                forward.cluster_not_found_status,
                Some("NC"),
                "cluster_not_found",
                "no cluster is named",
            ));
        };
        if let Some(step) = limits(&matched, forward, &mut head, self.router_respects_expected()) {
            steps.push(self.limits_written(&matched).into_iter().fold(step, |step, source| step.source(Some(source))));
        }
        for mirror in matched.mirrors() {
            steps.push(Step::new("mirror", format!("{} of requests also go to {}", mirror.fraction, mirror.cluster)));
        }
        let before = (head.authority().map(str::to_owned), head.path().map(str::to_owned));
        matched.finalize_request(&mut head, &FormatContext::new(&info, None, None), true);
        let after = (head.authority().map(str::to_owned), head.path().map(str::to_owned));
        if before != after {
            let text = |(host, path): (Option<String>, Option<String>)| {
                format!("{}{}", host.unwrap_or_default(), path.unwrap_or_default())
            };
            steps.push(Step::new("rewrite", format!("{} becomes {}", text(before), text(after))));
        }
        let alpn = self.hcm.filters.iter().find_map(|entry| match &entry.filter {
            HttpFilter::IstioAlpn(alpn) => Some(Arc::clone(alpn)),
            _ => None,
        });
        Ok(Onward { cluster, matched, head, alpn })
    }

    /// Where timeout and retries are written, if they are not the defaults.
    fn limits_written(&self, matched: &Matched) -> Vec<Source> {
        let Some((mesh, (key, field))) = self.mesh.zip(origin::of_route(&matched.route.metadata)) else {
            // Without a rule of its own a service has the mesh's retries.
            let is_out = |forward: &Forward| forward.cluster_names().any(|name| name.starts_with("outbound|"));
            let mesh = self.mesh.filter(|_| matched.forward().is_some_and(is_out));
            return mesh.and_then(|mesh| mesh.files.mesh_source("defaultHttpRetryPolicy")).into_iter().collect();
        };
        let own = ["timeout", "retries"].map(|part| mesh.files.written(&key, &format!("{field}.{part}")));
        own.into_iter().flatten().collect()
    }

    fn router_respects_expected(&self) -> bool {
        self.hcm.filters.iter().any(|entry| match &entry.filter {
            HttpFilter::Router(router) => router.respect_expected_rq_timeout,
            _ => false,
        })
    }

    fn table(&self, steps: &mut Vec<Step>) -> Result<Arc<RouteTable>, Outcome> {
        match &self.hcm.routes {
            Routes::Inline(table) => Ok(Arc::clone(table)),
            Routes::Rds { name, .. } => match self.at.tables.get(name) {
                Some(table) => {
                    steps.push(Step::new("route table", &**name));
                    Ok(Arc::clone(table))
                }
                None => {
                    steps.push(Step::new("route table", format!("{name} is not there")).end());
                    let why = match self.at.refusal(name) {
                        Some(error) => origin::refused(error, self.mesh.zip(self.pod)),
                        None => "the route table is missing".to_owned(),
                    };
                    Err(answered(404, Some("NR"), "route_not_found", &why))
                }
            },
        }
    }

    /// The route, or the answer in its place, which filters may still forestall.
    fn route(&self, table: &RouteTable, head: &Headers, steps: &mut Vec<Step>) -> Result<Matched, Outcome> {
        let input = RouteInput {
            headers: head,
            metadata: &Metadata::default(),
            filter_state: &FilterState::default(),
            tls: self.connection.tls.as_deref(),
            random: self.random,
        };
        let host = head.authority().unwrap_or_default();
        let result = table.find(&input);
        let vhost = match &result {
            RouteResult::NoVirtualHost => {
                let step = Step::new("virtual host", format!("none is for {host:?}"));
                steps.push(step.end());
                return Err(answered(404, Some("NR"), "route_not_found", &format!("no virtual host is for {host:?}")));
            }
            RouteResult::NoRoute(vhost) | RouteResult::RedirectToTls(vhost, _) => vhost,
            RouteResult::Found(matched) => &matched.vhost,
        };
        let mut step = Step::new("virtual host", &*vhost.name);
        if vhost.domains.iter().any(|domain| &**domain == "*") {
            step = step.fact(format!("it takes every host that no other takes; this one is {host:?}"));
        }
        steps.push(step);
        let (answer, passed) = match &result {
            RouteResult::Found(matched) => (Some(matched), matched.route.index),
            RouteResult::NoRoute(_) => (None, vhost.routes.len()),
            _ => (None, 0),
        };
        let passed_over = vhost.routes.iter().take(passed).map(|route| PassedOver {
            what: route_name(&route.name, route.index),
            why: table.mismatch(route, &input).unwrap_or_default(),
            source: self.origin(&route.metadata),
        });
        let mut step = match answer {
            Some(matched) => {
                let route = &matched.route;
                let conditions = route.matcher.conditions().join(", ");
                let name = route_name(&route.name, route.index);
                let of = if vhost.routes.len() > 1 { format!(" of {}", vhost.routes.len()) } else { String::new() };
                Step::new("route", format!("{name}{of}: {conditions}")).source(self.origin(&route.metadata))
            }
            None if passed > 0 => Step::new("route", "none of them applies").end(),
            None => Step::new("route", "the virtual host has no routes").end(),
        };
        step.passed_over = passed_over.collect();
        match result {
            RouteResult::Found(matched) => {
                steps.push(step);
                Ok(matched)
            }
            RouteResult::RedirectToTls(_, location) => {
                steps.push(Step::new("route", format!("the virtual host wants TLS: redirected to {location}")).end());
                Err(answered(301, None, "direct_response", &format!("redirected to {location}")))
            }
            _ => {
                steps.push(step);
                Err(answered(404, Some("NR"), "route_not_found", "no route applies"))
            }
        }
    }

    /// Lets the hash of the request choose among weighted clusters, where the route wants that. Returns whether it leaves nothing to
    /// chance: a cookie that the client has yet to be given is made of its port, which nobody knows here.
    fn draw_by_hash(&self, matched: &mut Matched, head: &Headers, remote: &Address) -> bool {
        let (local, filter_state) = (&self.connection.local, &FilterState::default());
        let cx = HashContext { headers: head, remote, local, filter_state };
        matched.draw_by_hash(&cx);
        matched.forward().is_some_and(|forward| match forward.clusters {
            ClusterSpecifier::Weighted { by_hash: true, .. } => matches!(forward.hash(&[], &cx), (Some(_), None)),
            _ => false,
        })
    }

    fn origin(&self, metadata: &Metadata) -> Option<Source> {
        origin::of_metadata(metadata, self.mesh)
    }

    fn filters(
        &self,
        matched: &Result<Matched, Outcome>,
        head: &mut Headers,
        remote: &Address,
        metadata: &mut Metadata,
        steps: &mut Vec<Step>,
    ) -> Result<(), Outcome> {
        let matched = matched.as_ref().ok();
        for entry in &self.hcm.filters {
            let per = matched.and_then(|m| m.per_filter(&entry.name));
            let off = match per {
                Some(PerFilter::Disabled) => true,
                Some(_) => false,
                None => entry.disabled,
            };
            if off {
                continue;
            }
            let per = per.and_then(PerFilter::settings);
            match (&entry.filter, per) {
                (HttpFilter::Fault(_), Some(PerFilter::Fault(fault))) | (HttpFilter::Fault(fault), _) => {
                    self.fault(fault, matched, head, steps)?;
                }
                (HttpFilter::Cors, _) => {
                    let policies = matched.map(Matched::cors_policies).unwrap_or_default();
                    match cors_decide(&policies, head) {
                        CorsDecision::Invalid => {
                            steps.push(Step::new("cors", "the origin is not allowed; the browser will see no headers"))
                        }
                        CorsDecision::Actual(_) => steps.push(Step::new("cors", "the origin is allowed")),
                        CorsDecision::Preflight(_) | CorsDecision::Refused(_) => {
                            steps.push(Step::new("cors", "a preflight request, which the proxy answers").end());
                            return Err(answered(
                                200,
                                None,
                                "cors_response",
                                "the proxy answers the preflight request",
                            ));
                        }
                        // No answer of the proxy's own, and nothing that the browser sees.
                        _ => {}
                    }
                }
                (HttpFilter::Rbac(_), Some(PerFilter::Rbac(rbac))) | (HttpFilter::Rbac(rbac), _) => {
                    self.rbac(rbac, matched, head, remote, metadata, steps)?;
                }
                (HttpFilter::Jwt(jwt), per) => {
                    let over = match per {
                        Some(PerFilter::Jwt(over)) => Some(over),
                        _ => None,
                    };
                    if let Ok(Needs::Token(_)) = jwt.requirement(head, &FilterState::default(), over) {
                        let step = if head.contains("authorization") {
                            Step::new("token", "there is one; its signature is not checked here, it counts as absent")
                        } else {
                            Step::new("token", "none is sent; the token filter lets such requests pass on")
                        };
                        steps.push(step);
                    }
                }
                (HttpFilter::ExtAuthz(_), _) => {
                    steps.push(Step::new("authorization", "an external service is asked; it is taken to say yes"));
                }
                (HttpFilter::LocalRateLimit(_), Some(PerFilter::LocalRateLimit(limit)))
                | (HttpFilter::LocalRateLimit(limit), _) => {
                    let text = match &limit.bucket {
                        Some(bucket) => format!(
                            "{} at once, {} more every {:?}",
                            bucket.max_tokens, bucket.tokens_per_fill, bucket.fill_interval
                        ),
                        None => "only requests with certain descriptors are limited".to_owned(),
                    };
                    steps.push(Step::new("rate limit", text));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn fault(
        &self,
        fault: &proxy_core::filters::Fault,
        matched: Option<&Matched>,
        head: &Headers,
        steps: &mut Vec<Step>,
    ) -> Result<(), Outcome> {
        let cluster = matched.and_then(|m| m.cluster(head));
        if !fault.touches(head, cluster.as_deref()) {
            return Ok(());
        }
        let effects = fault.describe();
        if effects.is_empty() {
            return Ok(());
        }
        let source = matched.and_then(|m| self.origin(&m.route.metadata)).map(|mut source| {
            if let Some(at) = source.field.find(".match") {
                source.field.truncate(at);
            }
            source.field.push_str(".fault");
            match self.mesh {
                Some(_) => self.refine(&source),
                None => source,
            }
        });
        let mut random = Random::new(self.random);
        let decision = fault.decide(head, cluster.as_deref(), &mut random, 0);
        let mut step = Step::new("fault", format!("on purpose: {}", effects.join(", "))).source(source);
        step.ends = decision.abort.is_some();
        steps.push(step);
        match decision.abort {
            None => Ok(()),
            Some(Abort::Http(status)) => {
                Err(answered(status, Some("FI"), "fault_filter_abort", "an injected fault answers"))
            }
            Some(Abort::Grpc(status)) => Err(answered(
                200,
                Some("FI"),
                "fault_filter_abort",
                &format!("an injected fault answers with gRPC status {status}"),
            )),
        }
    }

    /// The line of a field that was changed after the source was found.
    fn refine(&self, source: &Source) -> Source {
        let Some((kind, name)) = source.object.split_once(' ') else { return source.clone() };
        let Some((namespace, name)) = name.split_once('/') else { return source.clone() };
        let kind = config_store::Kind::ALL.iter().find(|known| known.as_str() == kind);
        match (kind, self.mesh) {
            (Some(kind), Some(mesh)) => mesh.source(&config_store::Key::new(*kind, namespace, name), &source.field),
            _ => source.clone(),
        }
    }

    fn rbac(
        &self,
        rbac: &Rbac,
        matched: Option<&Matched>,
        head: &Headers,
        remote: &Address,
        metadata: &Metadata,
        steps: &mut Vec<Step>,
    ) -> Result<(), Outcome> {
        let verdict = rbac.check(&RbacInput {
            headers: Some(head),
            connection: self.connection,
            remote,
            metadata,
            filter_state: &FilterState::default(),
            route: matched,
            stream: None,
        });
        steps.extend(verdict_step(rbac, &verdict, self.mesh, self.pod));
        match verdict.allowed {
            true => Ok(()),
            false => Err(answered(403, None, &verdict.details(), &denial(&verdict))),
        }
    }

    fn action<'m>(
        &self,
        matched: &'m Matched,
        head: &Headers,
        hashed: bool,
        steps: &mut Vec<Step>,
    ) -> Result<&'m Forward, Outcome> {
        match &matched.route.action {
            Action::Forward(forward) => {
                if let ClusterSpecifier::Weighted { clusters, .. } = &forward.clusters {
                    let total = clusters.iter().map(|c| c.weight.get()).sum();
                    let all = clusters.iter().map(|c| format!("{} {}", percent(c.weight.get(), total), c.name));
                    let drawn = matched.cluster(head).unwrap_or_else(|| "none".into());
                    let step = Step::new("weights", all.collect::<Vec<_>>().join(", "));
                    let how = if hashed { "the request's hash draws" } else { "this draw" };
                    steps.push(step.fact(format!("{how}: {drawn}")));
                }
                Ok(forward)
            }
            Action::Redirect(redirect) => {
                let (status, location) = redirect.location(&matched.route.matcher, head);
                steps.push(Step::new("action", format!("redirect {status} to {location}")).end());
                Err(answered(status, None, "direct_response", &format!("redirected to {location}")))
            }
            Action::Direct(direct) => {
                steps.push(Step::new("action", format!("the proxy answers {} itself", direct.status)).end());
                // istiod's name for what stands where hosts that a proxy does not know are refused.
                let why = if &*matched.vhost.name == "block_all" {
                    steps.push(scope::blocked(self.mesh.zip(self.pod), head.authority().unwrap_or_default()));
                    "the proxy does not know the host, and may call no others (REGISTRY_ONLY)"
                } else {
                    "the route answers by itself"
                };
                Err(answered(direct.status, None, "direct_response", why))
            }
            Action::NonForwarding => Err(answered(404, Some("NR"), "route_not_found", "the route does not forward")),
        }
    }
}

/// What an RBAC filter said, with the policies it had; nothing for one without enforced rules and without opinion.
pub(crate) fn verdict_step(rbac: &Rbac, verdict: &RbacVerdict, mesh: Option<&Mesh>, pod: Option<&Pod>) -> Vec<Step> {
    let mut steps = Vec::new();
    if let Some(shadow) = &verdict.shadow {
        let word = if shadow.allowed { "allow" } else { "deny" };
        let mut step = Step::new("dry run", format!("would {word}"));
        step = step.source(shadow.policy.as_deref().and_then(|name| origin::of_policy(name, mesh)));
        steps.push(step);
    }
    let Some((allows, policies)) = rbac.policies() else {
        // A matcher tree, which Istio's policies are not made of.
        steps.extend(verdict.enforced.map(|allowed| match allowed {
            true => Step::new("authorization", "allowed by a matcher tree"),
            false => Step::new("authorization", "denied by a matcher tree").end(),
        }));
        return steps;
    };
    let names: Vec<&ArcStr> = policies.collect();
    let source = verdict.policy.as_deref().and_then(|name| origin::of_policy(name, mesh));
    let mut step = match (verdict.allowed, allows, source.is_some()) {
        (true, true, _) => Step::new("authorization", "allowed by a rule").source(source),
        (true, false, _) => Step::new("authorization", "not denied: no DENY rule applies"),
        (false, _, true) => Step::new("authorization", "denied by a rule").source(source).end(),
        (false, true, false) => {
            Step::new("authorization", "denied: there are ALLOW policies, and no rule of theirs applies").end()
        }
        (false, ..) => Step::new("authorization", "denied").end(),
    };
    if let (false, true, None, Some((mesh, pod))) = (verdict.allowed, allows, &verdict.policy, mesh.zip(pod)) {
        step.passed_over = allowances::passed_over(mesh, pod, |name| names.iter().any(|own| ***own == *name));
    } else if verdict.policy.is_none() {
        step.passed_over = names
            .iter()
            .map(|name| PassedOver {
                what: (**name).to_string(),
                why: String::new(),
                source: origin::of_policy(name, mesh),
            })
            .collect();
    }
    steps.push(step);
    steps
}

fn denial(verdict: &RbacVerdict) -> String {
    match &verdict.policy {
        Some(policy) => format!("denied by {policy}"),
        None => "denied: no ALLOW rule applies".to_owned(),
    }
}

/// What the access log will say of the route. `hashed`: no chance decides among its clusters.
fn matched_names(matched: &Matched, head: &Headers, hashed: bool, logged: &mut Logged) {
    logged.virtual_host = matched.vhost.name.to_string();
    logged.route = matched.route.name.to_string();
    logged.cluster = matched.cluster(head).as_deref().unwrap_or_default().to_owned();
    if !hashed
        && let Some(forward) = matched.forward()
        && let ClusterSpecifier::Weighted { clusters, .. } = &forward.clusters
    {
        let possible = clusters.iter().filter(|cluster| cluster.weight.get() > 0);
        logged.clusters = possible.map(|cluster| cluster.name.to_string()).collect();
    }
}

/// An answer of the proxy itself.
pub(crate) fn answered(status: u16, flag: Option<&'static str>, details: &str, summary: &str) -> Outcome {
    let summary = format!("{status}: {summary}");
    let flag = flag.map(str::to_owned);
    Outcome { delivered: false, status: Some(status), flag, details: details.to_owned(), summary }
}

fn limits(matched: &Matched, forward: &Forward, head: &mut Headers, respect_expected: bool) -> Option<Step> {
    let retry = matched.retry_policy();
    let timeouts = forward.timeouts(retry.map(Arc::as_ref), head, respect_expected, true);
    let text =
        |limit: Option<std::time::Duration>| limit.map_or_else(|| "none".to_owned(), |limit| format!("{limit:?}"));
    let mut step = Step::new("timeout", text(timeouts.global));
    if let Some(retry) = retry.filter(|retry| retry.num_retries > 0) {
        step = step.fact(format!("up to {} retries on {}", retry.num_retries, retry.on));
        if timeouts.per_try.is_some() {
            step = step.fact(format!("each try within {}", text(timeouts.per_try)));
        }
    } else {
        step = step.fact("no retries");
    }
    Some(step)
}

fn route_name(name: &str, index: usize) -> String {
    match name {
        "" => format!("#{}", index + 1),
        name => format!("#{} {name:?}", index + 1),
    }
}

fn percent(part: u64, total: u64) -> String {
    let share = part as f64 * 100.0 / total.max(1) as f64;
    if share.fract() == 0.0 { format!("{share:.0} %") } else { format!("{share:.1} %") }
}

#[cfg(test)]
mod tests {
    use envoy_api::{Message, cluster, json, listener, type_url};
    use serde_json::{Value, json};

    use crate::request::Request;
    use crate::trace::Side;
    use crate::{Configuration, Resources, walk};

    /// One proxy whose listener sends requests by the hash of `policy` to a, b and c.
    fn at_proxy(policy: Value, path: &str, headers: &[(&str, &str)], seed: u64) -> Side {
        let cluster = |(name, weight): (&str, u32)| json!({"name": name, "weight": weight});
        let clusters: Vec<Value> = [("a", 50), ("b", 30), ("c", 20)].into_iter().map(cluster).collect();
        let route = json!({
            "weighted_clusters": {"use_hash_policy": true, "clusters": clusters},
            "hash_policy": [policy]
        });
        let routes = json!([{"match": {"prefix": "/"}, "route": route}]);
        let manager = json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "x",
            "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}]},
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
            }]
        });
        let config = json!({
            "name": "virtualOutbound",
            "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15001}},
            "filter_chains": [{"filters": [
                {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
            ]}]
        });
        let bytes = json::from_json(type_url::LISTENER, &config).unwrap();
        let listeners = vec![listener::Listener::decode(bytes.as_slice()).unwrap()];
        let clusters = ["a", "b", "c"].map(|name| cluster::Cluster { name: name.to_owned(), ..Default::default() });
        let configuration =
            Configuration::new(Resources { listeners, clusters: clusters.into(), ..Default::default() });
        assert!(configuration.rejected.is_empty(), "{:?}", configuration.rejected);
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let url = format!("http://somewhere{path}").parse().unwrap();
        let request = Request { method: "GET".to_owned(), url, headers, http2: false };
        walk::at_proxy(&configuration, "", None, &request, false, seed).sides.remove(0)
    }

    /// The choices are Envoy's, as the proxy's case `weighted_by_hash` has them.
    #[test]
    fn the_hash_of_a_request_draws_its_cluster_whatever_the_seed() {
        let header = || json!({"header": {"header_name": "x-h"}});
        let query = || json!({"query_parameter": {"name": "q"}});
        for seed in [0, 99] {
            for (value, wanted) in [("v0", "a"), ("v1", "b"), ("v5", "c"), ("v8", "c"), ("v11", "b")] {
                let logged = at_proxy(header(), "/", &[("x-h", value)], seed).logged;
                assert_eq!((&*logged.cluster, logged.clusters.as_slice()), (wanted, &[][..]), "{value}");
            }
            for (value, wanted) in [("0", "a"), ("2", "b"), ("3", "c")] {
                let logged = at_proxy(query(), &format!("/?q={value}"), &[], seed).logged;
                assert_eq!((&*logged.cluster, logged.clusters.as_slice()), (wanted, &[][..]), "{value}");
            }
        }
        let side = at_proxy(header(), "/", &[("x-h", "v5")], 0);
        let step = side.steps.iter().find(|step| step.decides == "weights").unwrap();
        assert_eq!(step.facts, ["the request's hash draws: c"]);
    }

    #[test]
    fn chance_draws_where_nothing_known_is_hashed() {
        let cookie = json!({"cookie": {"name": "s", "ttl": "60s"}});
        let drawn = |policy: &Value, seed| at_proxy(policy.clone(), "/", &[], seed).logged;
        // A cookie that is yet to be given away is made of the client's port.
        assert_eq!(drawn(&cookie, 0).clusters, ["a", "b", "c"]);
        let absent = json!({"header": {"header_name": "x-h"}});
        assert_eq!(drawn(&absent, 0).clusters, ["a", "b", "c"]);
        assert_eq!((&*drawn(&absent, 0).cluster, &*drawn(&absent, 99).cluster), ("a", "c"));
        let brought = at_proxy(cookie, "/", &[("cookie", "s=1")], 0).logged;
        assert!(brought.clusters.is_empty(), "{brought:?}");
    }
}
