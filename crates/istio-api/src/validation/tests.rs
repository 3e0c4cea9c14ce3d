use mesh_types::Labels;
use serde::de::DeserializeOwned;

use crate::{
    AuthorizationPolicy, DestinationRule, EnvoyFilter, PeerAuthentication, RequestAuthentication, ServiceEntry,
    Sidecar, Telemetry, Violation, VirtualService, WorkloadEntry,
};

/// Reads the YAML of a spec.
fn spec<T: DeserializeOwned>(yaml: &str) -> T {
    let documents = manifest::parse_plain(std::path::Path::new("a.yaml"), yaml).unwrap();
    documents[0].decode().unwrap()
}

/// Every violation as `path: message` must start with the expected text, in order; none may be left over.
#[track_caller]
fn check(found: Vec<Violation>, expected: &[&str]) {
    let found: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found} does not start with {expected}");
    }
}

#[track_caller]
fn virtual_service(yaml: &str, expected: &[&str]) {
    check(spec::<VirtualService>(yaml).validate("default"), expected);
}

const ROUTE: &str = "route: [{destination: {host: a}}]";

#[test]
fn virtual_services() {
    virtual_service(&format!("hosts: [a]\nhttp: [{{{ROUTE}}}]"), &[]);
    virtual_service(&format!("http: [{{{ROUTE}}}]"), &[]);
    virtual_service("hosts: [a]", &["spec: http, tcp or tls must be"]);
    virtual_service(&format!("hosts: ['*']\nhttp: [{{{ROUTE}}}]"), &["spec.hosts[0]: wildcard host *"]);
    virtual_service(&format!("hosts: ['*']\ngateways: [gw]\nhttp: [{{{ROUTE}}}]"), &[]);
    virtual_service(&format!("hosts: [a.b, '*.b']\nhttp: [{{{ROUTE}}}]"), &["spec.hosts[1]: duplicate hosts"]);
    virtual_service(
        &format!("hosts: [a]\nhttp: [{{timeout: 0s, {ROUTE}}}]"),
        &["spec.http[0].timeout: duration 0s must"],
    );
    virtual_service("hosts: [a]\nhttp: [{}]", &["spec.http[0]: HTTP route, redirect or direct_response is required"]);
    virtual_service(
        "hosts: [a]\nhttp: [{route: [{destination: {host: a, subset: _}, weight: -1}]}]",
        &["spec.http[0].route[0].destination.subset: ", "spec.http[0].route[0].weight: "],
    );
    virtual_service(
        &format!("hosts: [a]\nhttp: [{{match: [{{uri: {{exact: a, regex: '('}}}}], {ROUTE}}}]"),
        &["spec.http[0].match[0].uri: only one of exact, regex", "spec.http[0].match[0].uri.regex: "],
    );
    virtual_service(
        &format!("hosts: [a]\nhttp: [{{redirect: {{uri: /}}, {ROUTE}}}]"),
        &["spec.http[0]: HTTP route cannot contain both route and redirect"],
    );
    virtual_service(
        &format!("hosts: [a]\nhttp: [{{fault: {{abort: {{httpStatus: 100, percentage: {{value: 101}}}}}}, {ROUTE}}}]"),
        &["spec.http[0].fault.abort.percentage: ", "spec.http[0].fault.abort.httpStatus: "],
    );
    virtual_service(
        &format!("hosts: [a]\nhttp: [{{{ROUTE}}}, {{{ROUTE}}}]"),
        &["spec.http[1]: rule not used (a route without matches is defined before)"],
    );
    virtual_service(
        "hosts: [a.com]\ntls: [{match: [{sniHosts: [b.com]}], route: [{destination: {host: a}}]}]",
        &["spec.tls[0].match[0].sniHosts[0]: SNI host"],
    );
    virtual_service(
        &format!("hosts: [a]\nhttp: [{{headers: {{request: {{set: {{':path': x}}}}}}, {ROUTE}}}]"),
        &["spec.http[0].headers.request.set[\":path\"]: invalid header"],
    );
    virtual_service(
        &format!("hosts: [a]\nexportTo: ['.', default, '*']\nhttp: [{{{ROUTE}}}]"),
        &["spec.exportTo[1]: duplicate", "spec.exportTo: cannot have both"],
    );
}

#[test]
fn destination_rules() {
    let rule = |yaml: &str, expected: &[&str]| check(spec::<DestinationRule>(yaml).validate("default"), expected);
    rule("host: a\nsubsets: [{name: v1, labels: {version: v1}}]", &[]);
    rule("host: ''", &["spec.host: empty domain name"]);
    rule("host: a\nsubsets: [{name: v1}, {name: v1}]", &["spec.subsets[1].name: duplicate"]);
    rule("host: a\ntrafficPolicy: {}", &["spec.trafficPolicy: traffic policy must have"]);
    rule(
        "host: a\ntrafficPolicy: {tls: {mode: MUTUAL}}",
        &["spec.trafficPolicy.tls: client", "spec.trafficPolicy.tls: private"],
    );
    rule(
        "host: a\ntrafficPolicy: {loadBalancer: {consistentHash: {maglev: {tableSize: 4}}}}",
        &["spec.trafficPolicy.loadBalancer.consistentHash.maglev.tableSize: must be a prime"],
    );
    rule(
        "host: a\ntrafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: a/*, to: {b/*: 50, c: 40}}]}}}",
        &["spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0]: total"],
    );
    rule(
        "host: a\ntrafficPolicy: {outlierDetection: {interval: 1ns, maxEjectionPercent: 200}}",
        &["spec.trafficPolicy.outlierDetection.interval: ", "spec.trafficPolicy.outlierDetection.maxEjectionPercent: "],
    );
}

#[test]
fn service_entries() {
    let none = Labels::new();
    let entry = |yaml: &str, expected: &[&str]| check(spec::<ServiceEntry>(yaml).validate("default", &none), expected);
    entry("hosts: [a.com]\nports: [{number: 80, name: http, protocol: HTTP}]\nresolution: DNS", &[]);
    entry("hosts: ['*']", &["spec.hosts[0]: invalid host *"]);
    entry("hosts: ['*.a.com']\nresolution: DNS", &["spec.hosts[0]: must be FQDN"]);
    entry(
        "hosts: [a.com]\nresolution: STATIC\nendpoints: [{address: b.com}]",
        &["spec.endpoints[0].address: endpoint address"],
    );
    entry("hosts: [a.com]\naddresses: [10.0.0.0/33]", &["spec.addresses[0]: "]);
    entry("hosts: [a.com]\naddresses: [10.0.0.0/8]\nresolution: DNS", &["spec.addresses: CIDR"]);
    entry(
        "hosts: [a.com]\nports: [{number: 0, name: a_b, protocol: X}]",
        &["spec.ports[0].name: ", "spec.ports[0].protocol: ", "spec.ports[0].number: "],
    );
    let needs = "spec.ports[0]: addresses are required for ports serving TCP";
    entry("hosts: [a.com]\nports: [{number: 1, name: a, protocol: TCP}]", &[needs]);
    entry("hosts: [a.com]\nports: [{number: 1, name: a, protocol: MONGO}]", &[]);
    entry("hosts: [a.com]\naddresses: [10.1.1.1]\nports: [{number: 1, name: a}]", &[]);
    let plain = "hosts: [a.com]\nresolution: DNS\nports: [{number: 1, name: a}]";
    entry(plain, &[]);
    let refuses = [("networking.istio.io/enable-autoallocate-ip".to_owned(), "FALSE".to_owned())].into_iter().collect();
    check(spec::<ServiceEntry>(plain).validate("default", &refuses), &[needs]);
    let two = "hosts: [a.com, b.com]\nresolution: DNS\naddresses: [10.1.1.1]\nports: [{number: 1, name: a, protocol: ";
    let several = "spec: service entry can not have more than one host specified simultaneously";
    entry(&format!("{two}TLS}}]"), &[several]);
    entry(&format!("{two}HTTP}}]"), &[]);
    entry(&format!("{two}TCP}}]"), &[several, "spec: multiple hosts provided with non-HTTP, non-TLS ports"]);
    let endpoint = |endpoint: &str| {
        format!(
            "hosts: [a.com]\nresolution: DNS\nports: [{{number: 80, name: http, protocol: HTTP}}]\nendpoints: [{endpoint}]"
        )
    };
    entry(&endpoint("{address: b.com, ports: {http: 8080}}"), &[]);
    for bad in ["{address: 'unix:///a'}", "{network: net}", "{}"] {
        entry(&endpoint(bad), &["spec.endpoints[0].address: endpoint address"]);
    }
    let workload = |yaml: &str, expected: &[&str]| check(spec::<WorkloadEntry>(yaml).validate("default"), expected);
    workload("address: 10.0.0.1\nports: {http: 80}", &[]);
    workload("address: unix:///a\nports: {http: 80}", &["spec: unix endpoint must not"]);
    workload("{}", &["spec.address: address is required"]);
}

#[test]
fn sidecars() {
    let sidecar = |yaml: &str, expected: &[&str]| check(spec::<Sidecar>(yaml).validate("default"), expected);
    sidecar("egress: [{hosts: [./*, 'istio-system/*', '~/*', '*/*.a.com']}]", &[]);
    sidecar("{}", &["spec: empty configuration"]);
    sidecar("egress: [{hosts: [a]}]", &["spec.egress[0].hosts[0]: host must be of form"]);
    sidecar("egress: [{hosts: []}]", &["spec.egress[0]: egress listener must"]);
    sidecar(
        "egress: [{hosts: ['./*']}, {port: {number: 80}, hosts: ['./*']}]",
        &["spec.egress[0]: the egress listener with empty port"],
    );
    sidecar("egress: [{port: {number: 0, protocol: HTTP}, bind: 'unix:///a', hosts: ['./*']}]", &[]);
    sidecar("egress: [{hosts: ['./*', 'default/a.b']}]", &["spec.egress[0].hosts[1]: duplicated"]);
    sidecar("egress: [{hosts: ['*/*', '~a/*', '~*/b.c', '~./*.d.e', '~/f.g', '~a/*']}]", &[]);
    sidecar("egress: [{hosts: ['~~/*']}]", &["spec.egress[0].hosts[0]: invalid namespace value"]);
    sidecar("egress: [{hosts: ['./a']}]", &["spec.egress[0].hosts[0]: short names"]);
    sidecar("egress: [{hosts: ['./*-a.b']}]", &["spec.egress[0].hosts[0]: partial wildcard"]);
    for endpoint in ["127.0.0.1:80", "0.0.0.0:80", "'[::1]:80'", "unix:///a", ":80"] {
        sidecar(&format!("ingress: [{{port: {{number: 80, protocol: HTTP}}, defaultEndpoint: {endpoint}}}]"), &[]);
    }
    for endpoint in ["10.0.0.1:80", "unix://a", "127.0.0.1", "127.0.0.1:0"] {
        sidecar(
            &format!("ingress: [{{port: {{number: 80, protocol: HTTP}}, defaultEndpoint: '{endpoint}'}}]"),
            &["spec.ingress[0].defaultEndpoint: "],
        );
    }
    sidecar(
        "ingress: [{port: {number: 80, protocol: HTTP}, tls: {mode: SIMPLE, serverCertificate: a, privateKey: b}}]",
        &["spec.ingress[0].tls: server cannot have TLS settings"],
    );
}

#[test]
fn security_policies() {
    let policy = |yaml: &str, expected: &[&str]| check(spec::<AuthorizationPolicy>(yaml).validate("default"), expected);
    policy("{}", &[]);
    policy("action: DENY", &["spec: DENY action without"]);
    policy("rules: [{from: [{source: {ipBlocks: [x]}}]}]", &["spec.rules[0].from[0].source.ipBlocks[0]: "]);
    policy("rules: [{to: [{operation: {ports: ['0']}}]}]", &["spec.rules[0].to[0].operation.ports[0]: "]);
    policy("rules: [{when: [{key: nothing, values: [a]}]}]", &["spec.rules[0].when[0].key: unknown attribute"]);
    policy(
        "action: DENY\nrules: [{to: [{operation: {paths: [/a]}}]}]",
        &["spec.rules[0]: will deny all traffic to TCP"],
    );
    policy("rules: [{to: [{operation: {paths: ['/a/{*}/b*']}}]}]", &["spec.rules[0].to[0].operation.paths[0]: "]);
    policy(
        "action: CUSTOM\nprovider: {name: a}\nrules: [{from: [{source: {principals: [a]}}]}]",
        &["spec.rules[0].from[0].source.principals: is currently not supported"],
    );
    check(
        spec::<PeerAuthentication>("portLevelMtls: {80: {mode: STRICT}}").validate("a"),
        &["spec: mesh/namespace peer"],
    );
    check(
        spec::<RequestAuthentication>("jwtRules: [{issuer: a, jwksUri: 'ftp://a'}]").validate("a"),
        &["spec.jwtRules[0].jwksUri: "],
    );
    check(spec::<RequestAuthentication>("jwtRules: [{}]").validate("a"), &["spec.jwtRules[0]: issuer or jwksUri"]);
}

#[test]
fn extensions() {
    check(
        spec::<Telemetry>("tracing: [{randomSamplingPercentage: 101}]").validate("a"),
        &["spec.tracing[0].randomSamplingPercentage: "],
    );
    let filter = |yaml: &str, expected: &[&str]| check(spec::<EnvoyFilter>(yaml).validate("a"), expected);
    filter("configPatches: [{applyTo: CLUSTER, patch: {operation: MERGE, value: {name: a}}}]", &[]);
    filter("configPatches: [{applyTo: CLUSTER}]", &["spec.configPatches[0].patch: missing patch"]);
    filter("configPatches: [{patch: {operation: REMOVE}}]", &["spec.configPatches[0].applyTo: missing applyTo"]);
    filter("configPatches: [{match: {context: WAYPOINT}}]", &[]);
    filter("configPatches: [{applyTo: CLUSTER, patch: {operation: REMOVE, value: {name: a}}}]", &[]);
    filter("configPatches: [{applyTo: CLUSTER, patch: {operation: INSERT_FIRST, value: {name: a}}}]", &[]);
    let matched = |apply_to: &str, wanted: &str, expected: &[&str]| {
        let yaml =
            format!("configPatches: [{{applyTo: {apply_to}, match: {{{wanted}}}, patch: {{operation: REMOVE}}}}]");
        filter(&yaml, expected);
    };
    let at = "spec.configPatches[0].match";
    matched("CLUSTER", "listener: {}", &[&format!("{at}.listener: applyTo CLUSTER takes a cluster match only")]);
    matched("HTTP_ROUTE", "cluster: {}", &[&format!("{at}.cluster: applyTo HTTP_ROUTE takes a routeConfiguration")]);
    matched("LISTENER_FILTER", "cluster: {}", &[]);
    let chain = |filter: &str| format!("listener: {{filterChain: {{filter: {{{filter}}}}}}}");
    let at = format!("{at}.listener.filterChain.filter");
    matched("NETWORK_FILTER", &chain(""), &[&format!("{at}: filter match has no name")]);
    matched(
        "NETWORK_FILTER",
        &chain("name: a, subFilter: {name: b}"),
        &[&format!("{at}.subFilter: subfilter match can")],
    );
    matched("HTTP_FILTER", &chain("name: a, subFilter: {name: b}"), &[&format!("{at}.subFilter: subfilter match req")]);
    matched("FILTER_CHAIN", &chain("name: a"), &[&format!("{at}: has no effect")]);
    let long = format!("proxy: {{proxyVersion: {}}}", "a".repeat(1025));
    matched("CLUSTER", &long, &["spec.configPatches[0].match.proxy.proxyVersion: has more than 1024"]);
}

#[test]
fn nothing_in_a_list_is_something_empty() {
    let service: VirtualService = spec("hosts: [a, null]\nhttp: [{match: [null], route: [null]}]");
    assert_eq!(service.hosts, ["a", ""]);
    assert_eq!(service.http[0].r#match.len(), 1);
    let found: Vec<String> = service.validate("default").iter().map(ToString::to_string).collect();
    assert!(found.iter().any(|violation| violation.starts_with("spec.http[0].route[0]: destination")), "{found:?}");
    let documents = manifest::parse_plain(std::path::Path::new("a.yaml"), "selector: []").unwrap();
    let error = documents[0].decode::<PeerAuthentication>().unwrap_err();
    assert!(error.to_string().contains("an object"), "a list is no message: {error}");
}

#[test]
fn zone_aware_load_balancing_leaves_zones_to_the_proxy() {
    let rule = |lb: &str| {
        let yaml = format!(
            "host: a\ntrafficPolicy: {{outlierDetection: {{}}, loadBalancer: {{zoneAwareLbSetting: {{{lb}}}}}}}"
        );
        spec::<DestinationRule>(&yaml).validate("default")
    };
    let at = "spec.trafficPolicy.loadBalancer.zoneAwareLbSetting";
    check(rule("failoverPriority: [version]"), &[]);
    check(rule("failoverPriority: [topology.kubernetes.io/zone]"), &[&format!("{at}.failoverPriority[0]: ")]);
    check(
        rule("failover: [{from: a, to: a}, {from: a/b, to: '*'}]"),
        &[
            &format!("{at}.failover[0]: failover settings must"),
            &format!("{at}.failover[1]: failover only specifies"),
            &format!("{at}.failover[1]: failover region should not"),
        ],
    );
}

#[test]
fn roots_in_config_maps_are_the_rules_own_namespaces() {
    let rule = |name: &str| {
        let yaml = format!(
            "host: a\nsubsets: [{{name: s, trafficPolicy: {{tls: {{mode: SIMPLE, credentialName: '{name}'}}}}}}]"
        );
        spec::<DestinationRule>(&yaml).validate("default")
    };
    let at = "spec.subsets[0].trafficPolicy.tls.credentialName: ";
    check(rule("configmap://default/roots"), &[]);
    check(rule("kubernetes://other/roots"), &[]);
    check(rule("configmap://roots"), &[&format!("{at}must be of form")]);
    check(rule("configmap://other/roots"), &[&format!("{at}names another namespace")]);
}

#[test]
fn empty_filters_and_odd_accounts() {
    let logs = |filter: &str| spec::<Telemetry>(&format!("accessLogging: [{{filter: {filter}}}]")).validate("default");
    check(logs("{expression: response.code > 400}"), &[]);
    check(logs("{}"), &["spec.accessLogging[0].filter.expression: must be a valid CEL"]);
    let when = |value: &str| {
        let yaml = format!("rules: [{{when: [{{key: source.serviceAccount, notValues: ['{value}']}}]}}]");
        spec::<AuthorizationPolicy>(&yaml).validate("default")
    };
    check(when("default/sleep"), &[]);
    check(when("sleep"), &[]);
    for odd in ["default/sleep/", "/sleep", "default/", "default/*"] {
        check(when(odd), &["spec.rules[0].when[0].notValues[0]: "]);
    }
}

#[test]
fn of_a_mesh_config_outbound_retries_and_providers_are_not_refused() {
    let mesh = |yaml: &str| crate::MeshConfig::load(std::path::Path::new("mesh.yaml"), yaml).map(|_| ());
    mesh("defaultHttpRetryPolicy: {attempts: 2, retryOn: 'reset, 418'}").unwrap();
    mesh("extensionProviders: [{name: a, zipkin: {service: '', port: 0}}]").unwrap();
    mesh("defaultInboundHttpRetryPolicy: {attempts: 2, retryOn: 'reset, 418'}").unwrap_err();
    mesh("zoneAwareLbSetting: {failover: [{from: a, to: a}]}").unwrap_err();
}
