//! `explain` against what really happens: random configurations and requests, through our proxy and through real Envoy, as clients
//! and as servers; every access log must say what the explanation says.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::{Mesh, Output, can_run_meshes, envoy, outrigger};
use serde_json::{Value, json};

const CONFIGURATIONS: usize = 30;
const REQUESTS: usize = 34;
/// Seed of everything that is drawn; `OUTRIGGER_SEED` tries another.
const SEED: u64 = 8;
/// Draws of `explain` that give the first and the last of weighted clusters.
const ENDS: [u64; 2] = [0, 99];
const MESH: &str = "e2e-answers";
const CLIENTS: [&str; 2] = ["client-ours", "client-envoy"];
const SERVERS: [&str; 4] = ["alpha-v1", "alpha-v2", "beta-v1", "beta-v2"];
const LOG: &str = "/etc/istio/proxy/access.log";

/// Draws by SplitMix64.
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    /// True in so many of a hundred draws.
    fn percent(&mut self, share: usize) -> bool {
        self.below(100) < share
    }
}

/// What a configuration is about. A connection that a proxy keeps is judged by the policies of when it was made, and only clusters of
/// services can be told to keep none; so requests that pass through untouched and policies are not drawn together.
#[derive(Clone, Copy, PartialEq)]
enum About {
    Scopes,
    Policies,
}

/// Namespace, services and pods: each service has one pod with each proxy.
fn base(envoy: &Path) -> Vec<Value> {
    let format = json!({
        "id": "%REQ(X-REQUEST-ID)%", "route": "%ROUTE_NAME%", "cluster": "%UPSTREAM_CLUSTER_RAW%", "code": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%", "details": "%RESPONSE_CODE_DETAILS%", "host": "%UPSTREAM_HOST%",
    });
    let mesh = json!({ "accessLogFile": LOG, "accessLogEncoding": "JSON", "accessLogFormat": format.to_string() });
    let mut all = vec![json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "istio", "namespace": "istio-system" },
        "data": { "mesh": mesh.to_string() },
    })];
    for service in ["alpha", "beta"] {
        all.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": service },
            "spec": { "selector": { "app": service }, "ports": [
                { "name": "http", "port": 8000, "targetPort": 8080 }, { "name": "http-more", "port": 8001, "targetPort": 8080 },
            ] },
        }));
    }
    let ours = ["client-ours", "alpha-v1", "beta-v2"];
    for pod in CLIENTS.iter().chain(&SERVERS) {
        let (app, version) = pod.split_once('-').unwrap();
        let version = if app == "client" { "v1" } else { version };
        let config = match ours.contains(pod) {
            true => json!({ "concurrency": 1 }),
            false => {
                json!({ "concurrency": 1, "binaryPath": envoy, "proxyMetadata": { "OUTRIGGER_DATA_PLANE": "envoy" } })
            }
        };
        let container = match app {
            "client" => json!({ "name": "app", "image": "curlimages/curl" }),
            _ => json!({ "name": "app", "image": "mccutchen/go-httpbin", "ports": [{ "containerPort": 8080 }] }),
        };
        all.push(json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": app } }));
        all.push(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": pod, "labels": { "app": app, "version": version },
                "annotations": { "proxy.istio.io/config": config.to_string() },
            },
            "spec": { "serviceAccountName": app, "containers": [container] },
        }));
    }
    all
}

fn object(group: &str, kind: &str, name: &str, spec: Value) -> Value {
    let version = format!("{group}.istio.io/v1");
    json!({ "apiVersion": version, "kind": kind, "metadata": { "name": name, "namespace": "default" }, "spec": spec })
}

const PATHS: [&str; 8] = ["/", "/a", "/a/b", "/ab", "/A/b", "/api/v1/items", "/api/v2", "/deep/er/est"];
const VALUES: [&str; 4] = ["one", "two", "one-two", ""];
const HEADERS: [&str; 3] = ["x-user", "x-canary", "x-tenant"];

fn text_match(draw: &mut Draw, values: &[&str]) -> Value {
    let value = draw.one(values);
    match draw.below(4) {
        0 | 1 => json!({ "exact": value }),
        2 => json!({ "prefix": if value.is_empty() { "o" } else { value } }),
        _ => json!({ "regex": draw.one(&["o.*", "[a-z]+-[a-z]+", "(one|three)", "/a(/.*)?", "/api/v[12].*"]) }),
    }
}

fn http_match(draw: &mut Draw) -> Value {
    let mut out = json!({});
    if draw.percent(60) {
        out["uri"] = text_match(draw, &PATHS);
        if draw.percent(20) {
            out["ignoreUriCase"] = json!(true);
        }
    }
    if draw.percent(40) {
        let name = draw.one(&HEADERS);
        out["headers"][name] = if draw.percent(20) { json!({}) } else { text_match(draw, &VALUES[..3]) };
    }
    if draw.percent(15) {
        let name = draw.one(&HEADERS);
        out["withoutHeaders"][name] = if draw.percent(50) { json!({}) } else { text_match(draw, &VALUES[..3]) };
    }
    if draw.percent(20) {
        out["method"] = json!({ "exact": draw.one(&["GET", "POST", "DELETE"]) });
    }
    if draw.percent(15) {
        out["queryParams"]["q"] = json!({ "exact": draw.one(&["1", "2"]) });
    }
    if draw.percent(15) {
        out["port"] = json!(draw.one(&[8000, 8001]));
    }
    if draw.percent(10) {
        out["sourceLabels"]["app"] = json!(draw.one(&["client", "other"]));
    }
    if draw.percent(10) {
        out["authority"] = text_match(draw, &["alpha", "alpha:8000", "beta.default"]);
    }
    out
}

fn destination(draw: &mut Draw, host: &str) -> Value {
    let mut out = json!({ "host": draw.one(&[host, host, "alpha", "beta.default.svc.cluster.local"]) });
    // `none` fits no pod, `undefined` is in no DestinationRule.
    if let Some(subset) =
        draw.one(&[None, Some("v1"), Some("v2"), Some("v1"), Some("v2"), Some("none"), Some("undefined")])
    {
        out["subset"] = json!(subset);
    }
    if draw.percent(30) {
        out["port"]["number"] = json!(draw.one(&[8000, 8001]));
    }
    out
}

fn http_route(draw: &mut Draw, host: &str, is_last: bool) -> Value {
    let mut out = json!({});
    if draw.percent(50) {
        out["name"] = json!(draw.one(&["first", "second", "third"]));
    }
    if !is_last {
        let matches: Vec<Value> = (0..=draw.below(3)).map(|_| http_match(draw)).collect();
        out["match"] = json!(matches);
    }
    match draw.below(10) {
        0 => {
            out["redirect"] =
                json!({ "uri": draw.one(&["/moved", "/"]), "redirectCode": draw.one(&[301, 302, 307, 308]) });
            if draw.percent(50) {
                out["redirect"]["authority"] = json!("elsewhere.example");
            }
        }
        1 => {
            out["directResponse"] = json!({ "status": draw.one(&[200, 204, 418, 503]), "body": { "string": "said" } });
        }
        2 | 3 => {
            let weighted: Vec<Value> =
                [40, 60].map(|w| json!({ "destination": destination(draw, host), "weight": w })).into();
            out["route"] = json!(weighted);
        }
        kind => {
            out["route"] = json!([{ "destination": destination(draw, host) }]);
            if kind == 4 {
                out["rewrite"] = json!({ "uri": "/rewritten" });
            }
            if kind == 5 {
                out["rewrite"] = json!({ "authority": "other.example" });
            }
            if kind == 6 {
                out["headers"] = json!({ "request": { "set": { "x-user": "one" }, "remove": ["x-canary"] } });
            }
            if kind == 7 {
                out["timeout"] = json!("10s");
                out["retries"] = json!({ "attempts": 1 + draw.below(3), "retryOn": "connect-failure" });
            }
        }
    }
    out
}

fn rule(draw: &mut Draw) -> Value {
    let mut out = json!({});
    if draw.percent(50) {
        let mut source = json!({});
        match draw.below(5) {
            0 => source["principals"] = json!(["cluster.local/ns/default/sa/client"]),
            1 => source["principals"] = json!(["*/sa/somebody"]),
            2 => source["namespaces"] = json!([draw.one(&["default", "other"])]),
            3 => source["notPrincipals"] = json!(["*"]),
            _ => source["principals"] = json!(["*"]),
        }
        out["from"] = json!([{ "source": source }]);
    }
    if draw.percent(70) {
        let mut operation = json!({});
        if draw.percent(60) {
            operation["paths"] = json!([draw.one(&["/a", "/a*", "/api/*", "*/b", "/rewritten", "/"])]);
        } else if draw.percent(40) {
            operation["notPaths"] = json!([draw.one(&["/a*", "/api/*"])]);
        }
        if draw.percent(40) {
            operation["methods"] = json!([draw.one(&["GET", "POST"])]);
        }
        if draw.percent(15) {
            operation["hosts"] = json!([draw.one(&["alpha*", "beta", "*:8001"])]);
        }
        if draw.percent(15) {
            operation["ports"] = json!([draw.one(&["8080", "9999"])]);
        }
        out["to"] = json!([{ "operation": operation }]);
    }
    if draw.percent(25) {
        out["when"] = json!([{
            "key": format!("request.headers[{}]", draw.one(&HEADERS)), "values": [draw.one(&["one", "two", "o*"])],
        }]);
    }
    // An empty operation is refused.
    if out
        .pointer("/to/0/operation")
        .is_some_and(|operation| operation.as_object().is_some_and(serde_json::Map::is_empty))
    {
        out["to"][0]["operation"]["methods"] = json!(["GET"]);
    }
    out
}

fn configuration(draw: &mut Draw, about: About) -> Vec<Value> {
    let mut all = Vec::new();
    for host in ["alpha", "beta"] {
        // Every request makes a connection of its own, so that the policies of now judge it.
        let mut policy = json!({ "connectionPool": { "http": { "maxRequestsPerConnection": 1 } } });
        if about == About::Policies && draw.percent(20) {
            policy["tls"]["mode"] = json!("DISABLE");
        }
        let subset = |name: &str, version: &str| json!({ "name": name, "labels": { "version": version } });
        let subsets = [subset("v1", "v1"), subset("v2", "v2"), subset("none", "v9")];
        let spec = json!({ "host": host, "trafficPolicy": policy, "subsets": subsets });
        all.push(object("networking", "DestinationRule", host, spec));
        if draw.percent(90) {
            let count = draw.below(5);
            let mut routes: Vec<Value> = (0..count).map(|_| http_route(draw, host, false)).collect();
            if count == 0 || draw.percent(70) {
                routes.push(http_route(draw, host, true));
            }
            all.push(object("networking", "VirtualService", host, json!({ "hosts": [host], "http": routes })));
        }
    }
    match about {
        About::Scopes => {
            if draw.percent(60) {
                let hosts = draw.one(&[
                    json!(["./*"]),
                    json!(["./alpha.default.svc.cluster.local"]),
                    json!(["istio-system/*"]),
                ]);
                let mut spec = json!({ "egress": [{ "hosts": hosts }] });
                if draw.percent(70) {
                    spec["outboundTrafficPolicy"]["mode"] = json!(draw.one(&["REGISTRY_ONLY", "ALLOW_ANY"]));
                }
                if draw.percent(50) {
                    spec["workloadSelector"]["labels"]["app"] = json!("client");
                }
                all.push(object("networking", "Sidecar", "scope", spec));
            }
        }
        About::Policies => {
            for index in 0..draw.below(4) {
                let mut spec = json!({});
                let action = draw.one(&["ALLOW", "ALLOW", "DENY", "AUDIT"]);
                spec["action"] = json!(action);
                if draw.percent(80) {
                    spec["selector"]["matchLabels"]["app"] = json!(draw.one(&["alpha", "beta"]));
                }
                let rules: Vec<Value> = (0..=draw.below(2)).map(|_| rule(draw)).collect();
                spec["rules"] = json!(rules);
                all.push(object("security", "AuthorizationPolicy", &format!("policy-{index}"), spec));
            }
            if draw.percent(50) {
                let spec = json!({ "mtls": { "mode": draw.one(&["STRICT", "PERMISSIVE", "DISABLE"]) } });
                all.push(object("security", "PeerAuthentication", "default", spec));
            }
        }
    }
    all
}

fn request(draw: &mut Draw, about: About) -> Value {
    let host = draw.one(&["alpha", "beta", "alpha.default", "beta.default.svc", "alpha.default.svc.cluster.local"]);
    let port = draw.one(&[8000, 8000, 8001]);
    let query = draw.one(&["", "", "?q=1", "?q=2&x"]);
    let mut headers = json!({});
    for name in HEADERS {
        if draw.percent(40) {
            headers[name] = json!(draw.one(&VALUES[..3]));
        }
    }
    if about == About::Scopes && draw.percent(15) {
        headers["host"] = json!(draw.one(&["nowhere.example", "beta", "alpha:8001"]));
    }
    let path = draw.one(&PATHS);
    json!({
        "url": format!("http://{host}:{port}{path}{query}"),
        "method": draw.one(&["GET", "GET", "POST", "DELETE"]), "headers": headers,
    })
}

fn write(path: &Path, objects: &[Value]) {
    let mut file = std::fs::File::create(path).unwrap();
    for object in objects {
        writeln!(file, "---\n{object}").unwrap();
    }
}

fn id(configuration: usize, number: usize, client: &str) -> String {
    format!("{configuration}-{number}-{client}")
}

/// Sends all requests out of a pod by one curl.
fn send(mesh: &Mesh, client: &str, configuration: usize, requests: &[Value]) {
    let mut script = String::from("curl -K - <<'END'\n");
    for (number, request) in requests.iter().enumerate() {
        let text = |key: &str| request[key].as_str().unwrap();
        let mut lines = vec![
            format!("url = \"{}\"", text("url")),
            format!("request = \"{}\"", text("method")),
            "silent".to_owned(),
            "globoff".to_owned(),
            "max-time = 15".to_owned(),
            "output = \"/dev/null\"".to_owned(),
            format!("header = \"x-request-id: {}\"", id(configuration, number, client)),
        ];
        for (name, value) in request["headers"].as_object().unwrap() {
            lines.push(format!("header = \"{name}: {}\"", value.as_str().unwrap()));
        }
        script.push_str(&lines.join("\n"));
        script.push_str("\nnext\n");
    }
    script.push_str("END\n");
    mesh.exec(client, "app", &["sh", "-c", &script]);
}

/// The access log of a pod's proxy, by request.
fn log(mesh: &Mesh, pod: &str) -> HashMap<String, Value> {
    let text = mesh.exec(pod, "istio-proxy", &["cat", LOG]).stdout;
    let entries = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    entries.filter_map(|entry| Some((entry["id"].as_str()?.to_owned(), entry))).collect()
}

/// What the access logs must say, by the explanation: at the client route, clusters, code, flags, details; at the server code and
/// details, if the request gets there as HTTP. The status of an application is its own affair: what the server's proxy logged.
fn expected(explanation: &Value, from_application: u64) -> (Value, Option<(u64, String)>) {
    let outcome = &explanation["outcome"];
    let sides = explanation["sides"].as_array().unwrap();
    let logged = &sides[0]["logged"];
    let text = |value: &Value, none: &str| value.as_str().filter(|text| !text.is_empty()).unwrap_or(none).to_owned();
    let code = outcome["status"].as_u64();
    let answer = |code: u64, flags: &str, details: &str| {
        let (route, cluster) = (text(&logged["route"], ""), text(&logged["cluster"], ""));
        json!({ "route": route, "cluster": cluster, "code": code, "flags": flags, "details": details })
    };
    // A proxy that only sees bytes logs no request.
    if logged.get("virtualHost").is_none() && outcome["details"] != "route_not_found" {
        let arrives = outcome["delivered"].as_bool().unwrap() && sides.len() == 2;
        return (Value::Null, arrives.then(|| (from_application, "via_upstream".to_owned())));
    }
    let at_client = |sides: &[Value]| sides.len() == 1;
    match (outcome["delivered"].as_bool().unwrap(), code) {
        (true, _) => {
            let code = from_application;
            (answer(code, "-", "via_upstream"), Some((code, "via_upstream".to_owned())))
        }
        (false, Some(code)) if at_client(sides) => {
            (answer(code, &text(&outcome["flag"], "-"), &text(&outcome["details"], "-")), None)
        }
        (false, Some(code)) => (answer(code, "-", "via_upstream"), Some((code, text(&outcome["details"], "-")))),
        // The server's proxy closes the connection: it wants TLS and gets none.
        (false, None) => {
            let details = "upstream_reset_before_response_started{connection_termination}";
            (answer(503, "UC", details), None)
        }
    }
}

/// What an entry says, in the same form. `-` in a log is JSON's null.
fn said(entry: &Value) -> Value {
    let text = |key: &str| entry[key].as_str().unwrap_or("").to_owned();
    let flags = if text("flags").is_empty() { "-".to_owned() } else { text("flags") };
    json!({
        "route": text("route"), "cluster": text("cluster"), "code": entry["code"], "flags": flags, "details": text("details"),
    })
}

/// Explanations beside what the proxies logged.
#[derive(Default)]
struct Verdict {
    right: usize,
    wrong: Vec<String>,
    /// How many requests ended in which way.
    kinds: BTreeMap<String, usize>,
}

/// A request and its explanations, by configuration and number.
type Explained = BTreeMap<(usize, usize), (Value, Vec<Value>)>;

fn judge(mesh: &Mesh, explained: &Explained) -> Verdict {
    let logs = CLIENTS.map(|client| log(mesh, client));
    let servers = SERVERS.map(|pod| log(mesh, pod));
    let mut verdict = Verdict::default();
    for ((index, number), (request, explanations)) in explained {
        for (client, log) in CLIENTS.iter().zip(&logs) {
            let id = id(*index, *number, client);
            let entry_of_server = servers.iter().find_map(|log| log.get(&id));
            let server = entry_of_server
                .map(|entry| (entry["code"].as_u64().unwrap_or(0), entry["details"].as_str().unwrap_or("").to_owned()));
            let from_application = server.as_ref().map_or(0, |server| server.0);
            let happened = (log.get(&id).map_or(Value::Null, said), server);
            let expected: Vec<_> = explanations.iter().map(|e| expected(e, from_application)).collect();
            if expected.contains(&happened) {
                verdict.right += 1;
                let by = happened.1.map_or_else(|| happened.0["details"].clone(), |server| json!(server.1));
                let kind = by.as_str().unwrap_or("bytes that go nowhere").split(['{', '[']).next().unwrap().to_owned();
                *verdict.kinds.entry(kind).or_default() += 1;
            } else {
                let told = format!("explained {expected:?}\n  happened  {happened:?}");
                verdict.wrong.push(format!("{id}: {request}\n  {told}"));
            }
        }
    }
    verdict
}

#[test]
fn explanations_are_what_both_proxies_do() {
    const NAME: &str = "explanations_are_what_both_proxies_do";
    if !can_run_meshes(NAME) {
        return;
    }
    let Some(envoy) = envoy() else {
        return println!("SKIPPED: {NAME}: no Envoy; `cargo xtask setup` installs it");
    };
    if !Output::of(Command::new("curl").arg("--version")).success {
        return println!("SKIPPED: {NAME}: no curl on this machine");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    write(&path("base.yaml"), &base(&envoy));
    let mesh = Mesh::up(MESH, &[path("base.yaml").to_str().unwrap()]).unwrap();
    let seed = std::env::var("OUTRIGGER_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut draw = Draw(seed.unwrap_or(SEED));
    let mut explained = Explained::new();
    for index in 0..CONFIGURATIONS {
        let about = if index % 2 == 0 { About::Scopes } else { About::Policies };
        let objects = configuration(&mut draw, about);
        let requests: Vec<Value> = (0..REQUESTS).map(|_| request(&mut draw, about)).collect();
        let (file, asked) = (path(&format!("{index}.yaml")), path(&format!("{index}-requests.json")));
        write(&file, &objects);
        let both = requests.iter().flat_map(|request| {
            ENDS.map(|seed| {
                let mut request = request.clone();
                request["seed"] = json!(seed);
                request
            })
        });
        std::fs::write(&asked, json!(both.collect::<Vec<_>>()).to_string()).unwrap();
        mesh.apply(&file);
        let waited = Output::of(outrigger().args(["wait", "--all", "--mesh", MESH]));
        assert!(waited.success, "{index}: {}", waited.all());
        std::thread::scope(|scope| {
            for client in CLIENTS {
                let (mesh, requests) = (&mesh, &requests);
                scope.spawn(move || send(mesh, client, index, requests));
            }
            let explain = outrigger()
                .args(["explain", "-o", "json", "--from", CLIENTS[0], "--input"])
                .args([path("base.yaml"), file.clone()])
                .arg("--requests")
                .arg(&asked)
                .output()
                .unwrap();
            assert!(explain.status.success(), "{index}: {}", String::from_utf8_lossy(&explain.stderr));
            let all: Vec<Value> = serde_json::from_slice(&explain.stdout).unwrap();
            assert_eq!(all.len(), REQUESTS * ENDS.len());
            for (number, (request, explanations)) in requests.iter().zip(all.chunks(ENDS.len())).enumerate() {
                explained.insert((index, number), (request.clone(), explanations.to_vec()));
            }
        });
        mesh.delete(&file);
    }

    // Envoy writes its log every second.
    let patience = Instant::now() + Duration::from_secs(10);
    let Verdict { right, wrong, kinds } = loop {
        let verdict = judge(&mesh, &explained);
        if verdict.wrong.is_empty() || Instant::now() > patience {
            break verdict;
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    println!("{right} requests as explained, {} not; {kinds:?}", wrong.len());
    if !wrong.is_empty() {
        let kept = folder.keep();
        panic!(
            "{} of {}, see {}:\n{}",
            wrong.len(),
            right + wrong.len(),
            kept.display(),
            wrong[..wrong.len().min(12)].join("\n")
        );
    }
    assert!(right >= 2 * 1000 && kinds.len() >= 6, "{right}, {kinds:?}");
}
