//! Two hundred random changes under a running Envoy.

use std::net::Ipv4Addr;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use control_plane::Update;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::process::{Envoy, MODES};
use super::secrets::Secrets;
use super::{block_on, network, node, program};
use crate::mesh::Mesh;

const CHANGES: usize = 200;
/// Services that requests are for, each with two versions of two pods.
const SERVICES: usize = 4;
/// Of the services and of the servers.
const PORT: u16 = 8000;

/// Numbers that are the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    fn pick<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len())]
    }
}

/// The address of a pod of a service.
fn pod_ip(service: usize, pod: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 1 + service as u8, 1 + pod as u8)
}

/// Pods 0 and 1 are version 1, 2 and 3 version 2.
fn endpoints(service: usize, pods: &[usize]) -> String {
    let mut out = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: app{service}-x, namespace: default, \
         labels: {{kubernetes.io/service-name: app{service}}}}}\naddressType: IPv4\n\
         ports: [{{name: http, port: {PORT}}}]\nendpoints:\n"
    );
    for pod in pods {
        out += &format!(
            "- {{addresses: [{}], conditions: {{ready: true}}, targetRef: {{kind: Pod, name: app{service}-{pod}, namespace: default}}}}\n",
            pod_ip(service, *pod)
        );
    }
    out
}

/// What there is before the first change. Every version keeps a pod and its subset, so that every request has somewhere to go.
fn start() -> String {
    let mut out = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n".to_owned();
    for service in 0..SERVICES {
        out += &format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: app{service}, namespace: default}}\n\
             spec: {{clusterIP: 10.96.0.{service}, selector: {{app: app{service}}}, ports: [{{name: http, port: {PORT}}}]}}\n"
        );
        for pod in 0..4 {
            out += &format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: app{service}-{pod}, namespace: default, labels: {{app: app{service}, version: v{}}}}}\n\
                 spec: {{containers: []}}\nstatus: {{podIP: {}, phase: Running, conditions: [{{type: Ready, status: 'True'}}]}}\n",
                1 + pod / 2,
                pod_ip(service, pod)
            );
        }
        out += &format!(
            "---\n{}---\n{}",
            endpoints(service, &[0, 1, 2, 3]),
            rule(service, "{loadBalancer: {simple: ROUND_ROBIN}}")
        );
    }
    // The client has a port of its own, for what policies do to servers.
    out + "---\napiVersion: v1\nkind: Service\nmetadata: {name: client, namespace: default}\n\
           spec: {clusterIP: 10.96.0.99, selector: {app: client}, ports: [{name: http, port: 8000, targetPort: 8081}, {name: tcp, port: 9000, targetPort: 9001}]}\n\
           ---\napiVersion: v1\nkind: Pod\nmetadata: {name: client, namespace: default, labels: {app: client}}\n\
           spec: {containers: []}\nstatus: {podIP: 127.0.0.2, phase: Running, conditions: [{type: Ready, status: 'True'}]}\n"
}

fn rule(service: usize, policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: app{service}, namespace: default}}\n\
         spec:\n  host: app{service}\n  trafficPolicy: {policy}\n  subsets:\n\
         \x20 - {{name: v1, labels: {{version: v1}}}}\n  - {{name: v2, labels: {{version: v2}}, trafficPolicy: {policy}}}\n"
    )
}

/// A destination that answers.
fn destination(random: &mut Random) -> String {
    let (service, subset) = (random.below(SERVICES), random.pick(&["", ", subset: v1", ", subset: v2"]));
    format!("{{host: app{service}{subset}, port: {{number: {PORT}}}}}")
}

fn virtual_service(random: &mut Random) -> String {
    let number = random.below(SERVICES);
    let special = random.pick(&[
        "{match: [{uri: {prefix: /old}}], redirect: {uri: /new, redirectCode: 302}}",
        "{match: [{uri: {exact: /teapot}, headers: {x-a: {regex: 'a.*'}}}], directResponse: {status: 418, body: {string: short}}}",
        "{match: [{headers: {x-fault: {exact: 'yes'}}}], fault: {abort: {httpStatus: 555, percentage: {value: 50}}}, route: [{destination: {host: app0}}]}",
        "{match: [{queryParams: {q: {exact: '1'}}, method: {exact: GET}}, {authority: {prefix: x}}], route: [{destination: {host: app1}}]}",
        "{match: [{sourceLabels: {app: other}, withoutHeaders: {x-b: {}}}], route: [{destination: {host: nobody.example}}]}",
    ]);
    let extra = random.pick(&[
        "timeout: 20s",
        "retries: {attempts: 3, perTryTimeout: 10s, retryOn: 'connect-failure,503'}",
        "mirror: {host: app1}\n    mirrorPercentage: {value: 10}",
        "headers: {request: {set: {x-set: '%PROTOCOL%'}, remove: [x-gone]}, response: {add: {x-added: b}}}",
        "rewrite: {authority: other.example}",
        "corsPolicy: {allowOrigins: [{regex: '.*'}], allowMethods: [GET], maxAge: 1h}",
    ]);
    let weight = 1 + random.below(99);
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: app{number}, namespace: default}}\n\
         spec:\n  hosts: [app{number}]\n  http:\n  - {special}\n  - {extra}\n    route:\n\
         \x20   - {{destination: {}, weight: {weight}}}\n    - {{destination: {}, weight: {}}}\n",
        destination(random),
        destination(random),
        100 - weight
    )
}

fn destination_rule(random: &mut Random) -> String {
    let policy = random.pick(&[
        "{loadBalancer: {simple: RANDOM}}",
        "{loadBalancer: {simple: LEAST_REQUEST, warmup: {duration: 10s}}}",
        "{loadBalancer: {consistentHash: {httpHeaderName: x-user}}}",
        "{loadBalancer: {consistentHash: {httpCookie: {name: c, ttl: 0s}, maglev: {tableSize: 1009}}}}",
        "{connectionPool: {tcp: {maxConnections: 500, connectTimeout: 5s}, http: {http1MaxPendingRequests: 500, maxRequestsPerConnection: 3}}}",
        "{outlierDetection: {consecutive5xxErrors: 7, interval: 30s}, loadBalancer: {localityLbSetting: {enabled: true}}}",
        "{tls: {mode: DISABLE}}",
    ]);
    rule(random.below(SERVICES), policy)
}

fn route(random: &mut Random) -> String {
    let (service, other) = (random.below(SERVICES), random.below(SERVICES));
    let filter = random.pick(&[
        "{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-a, value: b}], remove: [x-c]}}",
        "{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}",
        "{type: RequestMirror, requestMirror: {backendRef: {name: app2, port: 8000}, percent: 5}}",
        "{type: CORS, cors: {allowOrigins: ['https://*.example.com'], maxAge: 5}}",
    ]);
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: route{service}, namespace: default}}\nspec:\n\
         \x20 parentRefs: [{{group: '', kind: Service, name: app{service}, port: {PORT}}}]\n  rules:\n\
         \x20 - matches: [{{path: {{type: PathPrefix, value: /sub}}}}]\n    filters: [{filter}]\n    backendRefs: [{{name: app{other}, port: {PORT}}}]\n\
         \x20 - backendRefs: [{{name: app{other}, port: {PORT}, weight: 3}}, {{name: app{service}, port: {PORT}}}]\n"
    )
}

fn sidecar(random: &mut Random) -> String {
    let selector = random.pick(&["{labels: {app: client}}", "{labels: {app: other}}", "null"]);
    let port = 9100 + random.below(3);
    let host = random.pick(&["./app1.default.svc.cluster.local", "default/*", "*/*.example.com"]);
    let policy = random.pick(&["REGISTRY_ONLY", "ALLOW_ANY"]);
    let number = random.below(2);
    format!(
        "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: sidecar{number}, namespace: default}}\nspec:\n\
         \x20 workloadSelector: {selector}\n  outboundTrafficPolicy: {{mode: {policy}}}\n  egress:\n\
         \x20 - {{port: {{number: {port}, protocol: HTTP, name: http}}, bind: 127.0.0.1, hosts: ['{host}']}}\n  - hosts: ['./*', '*/*.example.com']\n"
    )
}

fn service_entry(random: &mut Random) -> String {
    let number = random.below(6);
    let (protocol, port) =
        [("HTTP", 8000 + random.below(3)), ("TCP", 9200 + number), ("TLS", 8443), ("HTTPS", 8443)][random.below(4)];
    let resolution = random.pick(&[
        "resolution: STATIC\n  endpoints: [{address: 127.0.9.1, weight: 3}, {address: 127.0.9.2, labels: {version: v2}}]",
        "resolution: DNS\n  endpoints: [{address: localhost}]",
        "resolution: NONE",
        "resolution: STATIC\n  workloadSelector: {labels: {app: machine}}",
    ]);
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: entry{number}, namespace: default}}\nspec:\n\
         \x20 hosts: [entry{number}.example.com]\n  location: MESH_EXTERNAL\n  ports: [{{number: {port}, name: p, protocol: {protocol}}}]\n  {resolution}\n"
    )
}

fn machine(random: &mut Random) -> String {
    let number = random.below(3);
    let weight = 1 + random.below(5);
    format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: machine{number}, namespace: default}}\n\
         spec: {{address: 127.0.9.{}, weight: {weight}, labels: {{app: machine}}, locality: region/zone}}\n",
        10 + number
    )
}

fn pods(random: &mut Random) -> String {
    let mut kept = vec![random.below(2), 2 + random.below(2)];
    kept.extend((0..4).filter(|_| random.below(2) == 0));
    kept.sort_unstable();
    kept.dedup();
    endpoints(random.below(SERVICES), &kept)
}

fn peer_authentication(random: &mut Random) -> String {
    let (mode, other) =
        (random.pick(&["STRICT", "PERMISSIVE", "DISABLE"]), random.pick(&["STRICT", "DISABLE", "UNSET"]));
    let scope = random.pick(&[
        "metadata: {name: default, namespace: istio-system}\nspec: {",
        "metadata: {name: default, namespace: default}\nspec: {",
        "metadata: {name: client, namespace: default}\nspec: {selector: {matchLabels: {app: client}}, portLevelMtls: {9001: {mode: OTHER}}, ",
    ]);
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n{}mtls: {{mode: {mode}}}}}\n",
        scope.replace("OTHER", other)
    )
}

fn authorization_policy(random: &mut Random) -> String {
    let number = random.below(3);
    let action = random.pick(&["ALLOW", "DENY", "AUDIT"]);
    let rules = random.pick(&[
        "[{}]",
        "[{from: [{source: {principals: ['cluster.local/ns/default/sa/*']}}]}]",
        "[{to: [{operation: {methods: [GET], paths: ['/a/*'], ports: ['8081']}}], when: [{key: 'request.headers[x-a]', notValues: [b]}]}]",
        "[{from: [{source: {notNamespaces: [other], ipBlocks: [10.0.0.0/8]}}], to: [{operation: {notPaths: ['/{*}/b']}}]}]",
        "[{from: [{source: {requestPrincipals: ['*']}}]}]",
    ]);
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: policy{number}, namespace: default}}\n\
         spec: {{action: {action}, rules: {rules}}}\n"
    )
}

fn telemetry(random: &mut Random) -> String {
    let logging = random.pick(&["[{providers: [{name: envoy}]}]", "[{disabled: true, providers: [{name: envoy}]}]"]);
    format!(
        "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: default, namespace: default}}\nspec: {{accessLogging: {logging}}}\n"
    )
}

/// What may come, change and go.
const KINDS: [fn(&mut Random) -> String; 11] = [
    virtual_service,
    virtual_service,
    route,
    sidecar,
    service_entry,
    service_entry,
    machine,
    peer_authentication,
    authorization_policy,
    authorization_policy,
    telemetry,
];
/// What may only change.
const LASTING: [fn(&mut Random) -> String; 3] = [destination_rule, pods, pods];

/// One change, and in words; `present` is what may go.
fn change(random: &mut Random, present: &mut Vec<config_store::Key>) -> (Update, String) {
    let kinds = random.below(KINDS.len() + LASTING.len() + 4);
    if kinds >= KINDS.len() + LASTING.len() && !present.is_empty() {
        let key = present.swap_remove(random.below(present.len()));
        let what = format!("without {key}");
        return (Update::Delete(key), what);
    }
    let make = KINDS.iter().chain(&LASTING).nth(kinds).copied().unwrap_or(KINDS[0]);
    let document = manifest::parse(Path::new("change.yaml"), &make(random)).unwrap().remove(0);
    let key = config_store::Key::of(&document).unwrap();
    let what = key.to_string();
    if kinds < KINDS.len() && !present.contains(&key) {
        present.push(key);
    }
    (Update::Apply(Box::new(document)), what)
}

/// A server that answers every request with 200.
async fn serve(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        // Ends with the connection.
        tokio::spawn(async move {
            let (mut head, mut buffer) = (Vec::new(), [0; 4096]);
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                head.extend_from_slice(&buffer[..read]);
                while let Some(end) = head.windows(4).position(|window| window == b"\r\n\r\n") {
                    head.drain(..end + 4);
                    if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.is_err() {
                        return;
                    }
                }
            }
        });
    }
}

/// One request over a connection of its own; the answer's first line.
async fn get(service: usize) -> std::io::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).await?;
    let request = format!("GET /index HTTP/1.1\r\nhost: app{service}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.lines().next().unwrap_or("nothing").to_owned())
}

async fn survive(program: &Path, mode: &'static str) {
    let mesh = Mesh::empty().await;
    mesh.apply(&start()).await;
    for (service, pod) in (0..SERVICES).flat_map(|service| (0..4).map(move |pod| (service, pod))) {
        tokio::spawn(serve(TcpListener::bind((pod_ip(service, pod), PORT)).await.unwrap()));
    }
    let folder = tempfile::tempdir().unwrap();
    let secrets = Secrets::serve(folder.path()).await;
    let client = serde_json::json!({
        "name": "client", "ips": ["127.0.0.2"], "labels": {"app": "client"}, "metadata": {"INTERCEPTION_MODE": "NONE"},
    });
    let envoy = Rc::new(Envoy::start(program, folder.path(), mode, node(&client), mesh.grpc, &secrets));
    assert_eq!(envoy.initial_problems().await, [""; 0], "{mode}");

    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut present, mut failed, mut answered) = (Vec::new(), Vec::new(), 0);
    for number in 0..CHANGES {
        let (update, what) = change(&mut random, &mut present);
        let what = format!("change {number}, {what}");
        let (revision, rejected) = mesh.handle.update(vec![update]).await;
        assert!(rejected.is_empty(), "{what}: {rejected:?}");
        let mut applied = std::pin::pin!(mesh.handle.wait(revision, Duration::from_secs(20)));
        let mut requests = 0;
        loop {
            // Requests while the change is on its way, and some after it.
            match get(requests % SERVICES).await {
                Ok(line) if line == "HTTP/1.1 200 OK" => answered += 1,
                other => failed.push(format!("{what}: {other:?}")),
            }
            requests += 1;
            let done = tokio::select! {
                biased;
                done = &mut applied => done,
                () = tokio::task::yield_now() => continue,
            };
            done.unwrap_or_else(|laggards| panic!("{mode}: {what}: {laggards}"));
            break;
        }
        for service in 0..SERVICES {
            match get(service).await {
                Ok(line) if line == "HTTP/1.1 200 OK" => answered += 1,
                other => failed.push(format!("after {what}: {other:?}")),
            }
        }
        let refused = envoy.refusals().await;
        assert!(refused.is_empty(), "{mode}: {what}: {refused:?}");
    }
    println!("{mode}: {CHANGES} changes, {answered} requests answered, {} failed", failed.len());
    assert!(failed.is_empty(), "{mode}: {}", failed.join("\n"));
    assert!(mesh.handle.sync_status().iter().all(|status| status.refusals().next().is_none()));
}

#[test]
fn envoy_survives_random_changes() {
    const TEST: &str = "envoy_survives_random_changes";
    let Some(program) = program(TEST) else { return };
    std::thread::scope(|scope| {
        let run = |mode| {
            let Some(network) = network(TEST) else { return };
            network.enter().unwrap();
            block_on(survive(&program, mode));
        };
        let threads = MODES.map(|mode| scope.spawn(move || run(mode)));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}
