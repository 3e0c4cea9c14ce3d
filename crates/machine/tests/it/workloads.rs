//! What runs in a mesh, and how its parts reach each other.

use crate::mesh::{Mesh, out, outrigger};

const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: any
        command: [python3, -m, http.server, "8080"]
        workingDir: /data
        ports: [{name: http, containerPort: 8080}]
        env:
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: URL, value: "http://$(POD_IP):8080"}
        readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1}
        volumeMounts: [{name: page, mountPath: /data}]
        securityContext: {runAsUser: 1234, runAsGroup: 1234, capabilities: {drop: [ALL]}}
      volumes: [{name: page, configMap: {name: page}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: page}
data: {index.html: "hello from the mesh\n"}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: web-headless}
spec:
  clusterIP: None
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: alias}
spec: {type: ExternalName, externalName: web.default.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: nobody}
spec:
  selector: {app: nobody}
  ports: [{port: 80}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec:
  initContainers:
  - {name: first, image: any, command: [sh, -c, "echo from $(hostname) > /shared/out"], volumeMounts: [{name: shared, mountPath: /shared}]}
  containers:
  - {name: main, image: any, command: [sleep, infinity], volumeMounts: [{name: shared, mountPath: /shared}]}
  volumes: [{name: shared, emptyDir: {}}]
"#;

pub(crate) fn services_dns_and_volumes() {
    let mesh = Mesh::start("t-services", WEB, &["--publish", "web:80=127.0.0.1:28080"]);
    mesh.says("all 3 pods ready");
    let client = |script: &str| out(&mesh.exec("client", script));
    assert_eq!(client("cat /shared/out"), "from client\n");
    for url in [
        "http://web",
        "http://web.default",
        "http://web.default.svc.cluster.local",
        "http://web-headless:8080",
        "http://alias",
    ] {
        assert_eq!(client(&format!("curl -sS -m 5 {url}/")), "hello from the mesh\n", "{url}");
    }
    // A pod reaches itself through its own service.
    for _ in 0..6 {
        assert_eq!(out(&mesh.exec("web", "curl -sS -m 5 http://web/")), "hello from the mesh\n");
    }
    let began = std::time::Instant::now();
    assert_eq!(
        mesh.exec("client", "curl -s -m 5 http://nobody/").status.code(),
        Some(7),
        "a service without endpoints refuses"
    );
    assert!(began.elapsed().as_secs() < 3);
    assert!(client("getent hosts web-headless").lines().count() >= 1);
    assert_eq!(client("id -u").trim(), "0");
    let web = |script: &str| out(&mesh.exec("web", script));
    assert_eq!(web("id -u; id -g"), "1234\n1234\n");
    assert!(web("echo $URL").starts_with("http://10.244.0."));
    assert!(web("grep CapBnd /proc/self/status").ends_with("0000000000000000\n"));
    // The host's files are readable and stay as they are.
    client("echo changed > /etc/outrigger-test; rm -f /etc/hostname; cat /etc/outrigger-test");
    assert!(!std::path::Path::new("/etc/outrigger-test").exists());
    assert!(
        mesh.exec("client", "echo 1 > /proc/sys/vm/drop_caches").status.code() != Some(0),
        "kernel settings are read-only"
    );
    assert!(!client("ls /run").contains("outrigger"), "other pods' secrets are out of sight");
    let page = std::process::Command::new("curl").args(["-sS", "-m", "5", "http://127.0.0.1:28080/"]).output().unwrap();
    assert_eq!(out(&page), "hello from the mesh\n");
    assert!(out(&outrigger(&["logs", "web", "--name", "t-services"])).contains("GET / "));
}

pub(crate) fn probes_and_restarts() {
    let yaml = r#"
apiVersion: v1
kind: Pod
metadata: {name: flaky}
spec:
  containers:
  - {name: main, image: any, command: [sh, -c, "echo run; exit 3"]}
---
apiVersion: v1
kind: Pod
metadata: {name: sick}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: any
    command: [sh, -c, "trap 'exit 0' TERM; touch /tmp/alive; sleep 2; rm /tmp/alive; while :; do sleep 0.1; done"]
    livenessProbe: {exec: {command: [test, -f, /tmp/alive]}, periodSeconds: 1, failureThreshold: 2}
---
apiVersion: v1
kind: Pod
metadata: {name: slow}
spec:
  containers:
  - name: main
    image: any
    command: [sh, -c, "sleep 1; exec python3 -m http.server 8080"]
    startupProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 30}
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
    lifecycle: {postStart: {exec: {command: [touch, /tmp/started]}}}
"#;
    let mesh = Mesh::start("t-probes", yaml, &["--timeout", "1"]);
    // One restart at once, then back-off.
    mesh.shows(|ps| {
        ps.lines().any(|line| line.contains("flaky") && line.contains("CrashLoopBackOff") && line.contains(" 1 "))
    });
    mesh.shows(|ps| ps.lines().any(|line| line.contains("sick") && line.contains(" 1 ")));
    mesh.shows(|ps| ps.lines().any(|line| line.contains("slow") && line.contains("1/1")));
    assert!(mesh.exec("slow", "test -f /tmp/started").status.success());
    assert_eq!(out(&outrigger(&["logs", "flaky", "--name", "t-probes"])), "run\nrun\n");
}

pub(crate) fn stateful_jobs_and_sidecars() {
    let yaml = r#"
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  volumeClaimTemplates: [{metadata: {name: data}, spec: {}}]
  template:
    metadata: {labels: {app: db}}
    spec:
      containers:
      - {name: db, image: any, command: [sh, -c, "hostname > /data/id; exec sleep infinity"], volumeMounts: [{name: data, mountPath: /data}]}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 5432}]}
---
apiVersion: batch/v1
kind: Job
metadata: {name: once}
spec:
  template:
    spec:
      restartPolicy: Never
      initContainers:
      - name: helper
        image: any
        restartPolicy: Always
        command: [sh, -c, "trap 'echo bye; exit 0' TERM; sleep 0.5; touch /s/up; while :; do sleep 0.05; done"]
        startupProbe: {exec: {command: [test, -f, /s/up]}, periodSeconds: 1}
        volumeMounts: [{name: s, mountPath: /s}]
      containers:
      - {name: main, image: any, command: [sh, -c, "test -f /s/up && echo helper was there"], volumeMounts: [{name: s, mountPath: /s}]}
      volumes: [{name: s, emptyDir: {}}]
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: nightly}
spec:
  schedule: "0 0 * * *"
  jobTemplate: {spec: {template: {spec: {restartPolicy: Never, containers: [{name: main, image: any, command: ["true"]}]}}}}
"#;
    let mesh = Mesh::start("t-state", yaml, &[]);
    mesh.shows(|ps| ps.contains("db-1") && ps.lines().any(|line| line.contains("once-") && line.contains("Completed")));
    mesh.shows(|ps| ps.lines().filter(|line| line.contains("db-") && line.contains("1/1")).count() == 2);
    assert_eq!(out(&mesh.exec("db-1", "cat /data/id")), "db-1\n");
    let address = out(&mesh.exec("db-0", "getent hosts db-1.db.default.svc.cluster.local"));
    assert!(address.starts_with("10.244."), "{address}");
    assert_eq!(out(&outrigger(&["logs", "once", "--name", "t-state"])), "helper was there\n");
    assert_eq!(out(&outrigger(&["logs", "once", "-c", "helper", "--name", "t-state"])), "bye\n");
    out(&outrigger(&["run-job", "nightly", "--name", "t-state"]));
    mesh.shows(|ps| ps.lines().any(|line| line.contains("nightly-") && line.contains("Completed")));
}

pub(crate) fn apply_delete_and_rollout() {
    let mesh = Mesh::start("t-apply", WEB, &[]);
    mesh.says("all 3 pods ready");
    let changed = WEB
        .replace("--- # none", "")
        .replace("labels: {app: web}}\n    spec", "labels: {app: web, release: two}}\n    spec");
    assert_ne!(changed, WEB);
    let answer = out(&mesh.apply(&changed));
    assert!(answer.contains("deployment/web configured") && answer.contains("service/web unchanged"), "{answer}");
    // The service never stops answering while pods are replaced.
    for _ in 0..40 {
        assert_eq!(out(&mesh.exec("client", "curl -sS -m 5 http://web/")), "hello from the mesh\n");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    mesh.shows(|ps| ps.lines().filter(|line| line.contains("web-")).count() == 2);
    assert!(out(&outrigger(&["delete", "service", "web", "--name", "t-apply"])).contains("service/web deleted"));
    assert!(!mesh.exec("client", "curl -s -m 3 http://web/").status.success());
    assert!(out(&outrigger(&["delete", "deploy", "web", "--name", "t-apply"])).contains("deployment/web deleted"));
    mesh.shows(|ps| !ps.contains("web-"));
    let gone = outrigger(&["delete", "deploy/web", "--name", "t-apply"]);
    assert!(!gone.status.success() && String::from_utf8_lossy(&gone.stderr).contains("deployment/web not found"));
    out(&outrigger(&["delete", "deploy/web", "--ignore-not-found", "--name", "t-apply"]));
    let map = mesh.file().with_file_name("map.yaml");
    std::fs::write(&map, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata: {a: b}\n").unwrap();
    let apply = |more: &[&str]| {
        let arguments = [&["apply", "--name", "t-apply", "-n", "shop", "-f", map.to_str().unwrap()], more].concat();
        out(&outrigger(&arguments))
    };
    assert_eq!(apply(&["--dry-run"]), "configmap/m.shop created (dry run)\n");
    assert_eq!(apply(&[]), "configmap/m.shop created\n");
    assert_eq!(apply(&["--dry-run=server"]), "configmap/m.shop unchanged (dry run)\n");
    std::fs::write(&map, "# nothing\n").unwrap();
    let nothing = outrigger(&["apply", "--name", "t-apply", "-f", map.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("there are no objects here"), "{nothing:?}");
    assert_eq!(mesh.exec("client", "exit 3").status.code(), Some(3));
    let missing = outrigger(&["exec", "cli", "--name", "t-apply", "--", "no-such-program"]);
    assert_eq!(missing.status.code(), Some(127), "{missing:?}");
    let refused = mesh.apply("apiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec: {ports: [{port: 0}]}\n");
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("spec.ports[0].port"), "{refused:?}");
}

pub(crate) fn files_are_watched() {
    let pod = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{terminationGracePeriodSeconds: 1, containers: [{{name: c, image: any, command: [sleep, infinity]}}]}}\n"
        )
    };
    let mesh = Mesh::start("t-watch", &pod("one"), &["--watch"]);
    mesh.says("all 1 pods ready");
    std::fs::write(mesh.file(), format!("{}---\n{}", pod("one"), pod("two"))).unwrap();
    mesh.shows(|ps| ps.lines().any(|line| line.contains("two") && line.contains("1/1")));
    // Half a file changes nothing; a removed object goes.
    std::fs::write(mesh.file(), "kind: [").unwrap();
    mesh.says("mesh.yaml:1");
    assert!(mesh.exec("one", "true").status.success());
    std::fs::write(mesh.file(), pod("two")).unwrap();
    mesh.shows(|ps| !ps.lines().any(|line| line.contains(" one ")));
    assert!(mesh.exec("two", "true").status.success());
}

pub(crate) fn dual_stack() {
    let yaml =
        WEB.replace("[python3, -m, http.server, \"8080\"]", "[python3, -m, http.server, \"8080\", --bind, \"::\"]");
    let mesh = Mesh::start("t-dual", &yaml, &["--dual-stack"]);
    mesh.says("all 3 pods ready");
    let client = |script: &str| out(&mesh.exec("client", script));
    for family in ["-4", "-6"] {
        assert_eq!(client(&format!("curl {family} -sS -m 5 http://web/")), "hello from the mesh\n", "{family}");
        assert_eq!(
            client(&format!("curl {family} -sS -m 5 http://web-headless:8080/")),
            "hello from the mesh\n",
            "{family}"
        );
    }
}
