//! A real Kubernetes API server for tests: `tools/kube-lite`, which `cargo xtask setup` builds where there is Go.
//!
//! One server serves all tests of a process; each test makes [`KubeLite::namespace`]s of its own. It ends with the
//! process, however that ends.
//!
//! In: the built server (`OUTRIGGER_BUILD`, else the workspace's build folder). Out: a kubeconfig and `kubectl`.
//! Never: crates of the product.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, bail};

/// A running API server with etcd, the usual controllers and a pretended kubelet. Dropping it ends it.
#[derive(Debug)]
pub struct KubeLite {
    process: Child,
    program: PathBuf,
    kubeconfig: PathBuf,
    namespaces: AtomicU32,
}

/// What `kubectl` printed and how it ended.
#[derive(Debug)]
pub struct Output {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Whether the exit status was 0.
    pub success: bool,
}

impl KubeLite {
    /// The server of this test process, started by the first who asks. Where it was not built, says so visibly and
    /// gives `None`.
    pub fn shared(test: &str) -> Option<&'static KubeLite> {
        static SHARED: OnceLock<Option<KubeLite>> = OnceLock::new();
        let server = SHARED.get_or_init(|| {
            let program = program();
            let built = program.is_file();
            built.then(|| KubeLite::start(program).unwrap_or_else(|error| panic!("kube-lite: {error:#}")))
        });
        if server.is_none() {
            println!("SKIPPED: {test}: no kube-lite; `cargo xtask setup` builds it where Go is installed");
        }
        server.as_ref()
    }

    fn start(program: PathBuf) -> anyhow::Result<KubeLite> {
        // The server removes the folder when it ends: values in statics are not dropped.
        let folder = tempfile::Builder::new().prefix("kube-lite-").tempdir()?.keep();
        let mut process = Command::new(&program)
            .args(["up", "--until-stdin-closes", "--data-dir"])
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(folder.join("log"))?)
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let output = process.stdout.take().context("its output is piped")?;
        let mut lines = BufReader::new(output).lines();
        let up = lines.by_ref().map_while(Result::ok).find(|line| line.starts_with("up "));
        if up.is_none() {
            let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
            let _ = process.wait();
            bail!("it ended before it was ready:\n{log}");
        }
        // Whoever writes to a pipe that nobody reads stands still, or dies.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(KubeLite { process, program, kubeconfig: folder.join("kubeconfig"), namespaces: AtomicU32::new(0) })
    }

    /// The administrator's kubeconfig file.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Runs `kubectl` as administrator.
    pub fn kubectl(&self, arguments: &[&str]) -> Output {
        self.kubectl_with_input(arguments, "")
    }

    /// Runs `kubectl` with something on its standard input.
    pub fn kubectl_with_input(&self, arguments: &[&str], input: &str) -> Output {
        let run = || -> anyhow::Result<Output> {
            let mut child = Command::new(&self.program)
                .arg("kubectl")
                .args(arguments)
                .env("KUBECONFIG", &self.kubeconfig)
                // Its cache of what the server serves would be shared by servers of many tests.
                .env("KUBECACHEDIR", self.kubeconfig.with_file_name("kubectl-cache"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?;
            child.stdin.take().context("its input is piped")?.write_all(input.as_bytes())?;
            let output = child.wait_with_output()?;
            Ok(Output {
                stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
                success: output.status.success(),
            })
        };
        run().unwrap_or_else(|error| panic!("cannot run kubectl {arguments:?}: {error:#}"))
    }

    /// `kubectl apply` of manifests; panics with its message when they are refused.
    pub fn apply(&self, namespace: &str, yaml: &str) {
        let output = self.try_apply(namespace, yaml);
        assert!(output.success, "kubectl apply: {}", output.stderr);
    }

    /// `kubectl apply` of manifests that may be refused.
    pub fn try_apply(&self, namespace: &str, yaml: &str) -> Output {
        self.kubectl_with_input(&["apply", "-n", namespace, "--server-side", "--force-conflicts", "-f", "-"], yaml)
    }

    /// Makes a namespace that no other test of this process has.
    pub fn namespace(&self, prefix: &str) -> String {
        let name = format!("{prefix}-{}", self.namespaces.fetch_add(1, Ordering::Relaxed));
        let output = self.kubectl(&["create", "namespace", &name]);
        assert!(output.success, "{}", output.stderr);
        name
    }
}

impl Drop for KubeLite {
    fn drop(&mut self) {
        // It ends, and cleans up, when its standard input does.
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

fn program() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the crate lies two below the root");
    let build = std::env::var_os("OUTRIGGER_BUILD").map_or_else(|| root.join("build"), PathBuf::from);
    build.join("kube-lite")
}
