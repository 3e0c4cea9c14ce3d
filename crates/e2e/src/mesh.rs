use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

/// The workspace's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("crates/e2e lies two below the root").to_owned()
}

/// The program under test, as a command.
pub fn outrigger() -> Command {
    let binary = std::env::var_os("OUTRIGGER_BIN").map(PathBuf::from);
    let binary = root().join(binary.unwrap_or_else(|| "target/release/outrigger".into()));
    assert!(binary.is_file(), "{} is missing: run `cargo build --release` first", binary.display());
    let mut command = Command::new(binary);
    command.current_dir(root());
    command
}

/// Real Envoy, as `cargo xtask setup` installs it.
pub fn envoy() -> Option<PathBuf> {
    // Relative ones are meant from the workspace's root, as `cargo xtask` passes them.
    let folder = std::env::var_os("OUTRIGGER_BUILD").map_or_else(|| "build".into(), PathBuf::from);
    let path = std::fs::canonicalize(root().join(folder).join("envoy")).ok()?;
    Some(path).filter(|path| path.is_file())
}

/// A file of `samples/bookinfo`.
pub fn sample(path: &str) -> PathBuf {
    root().join("samples/bookinfo").join(path)
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Output {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Whether the exit status was 0.
    pub success: bool,
}

impl Output {
    /// Runs a command to its end.
    pub fn of(command: &mut Command) -> Output {
        let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
        Output {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            success: output.status.success(),
        }
    }

    /// Both outputs, for messages.
    pub fn all(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// A mesh of a test's own; dropping it takes it down.
pub struct Mesh {
    name: String,
    up: Child,
}

impl Mesh {
    /// Starts `outrigger up ARGUMENTS` under a name of its own and waits until all pods are ready.
    pub fn up(name: &str, arguments: &[&str]) -> anyhow::Result<Mesh> {
        let mut mesh = Mesh::start(name, arguments)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            let pods = mesh.pods().unwrap_or_default();
            if !pods.is_empty() && pods.iter().all(|pod| pod["ready"] == pod["containers"]) {
                return Ok(mesh);
            }
            if let Some(status) = mesh.up.try_wait().context("cannot look after outrigger up")? {
                bail!("outrigger up {arguments:?} ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("not all pods became ready:\n{}", Output::of(&mut mesh.command("ps")).all())
    }

    /// Starts `outrigger up ARGUMENTS` and returns at once.
    pub fn start(name: &str, arguments: &[&str]) -> anyhow::Result<Mesh> {
        let mut command = outrigger();
        command.arg("up").args(arguments).args(["--name", name]).stdin(Stdio::null()).stdout(Stdio::null());
        let up = command.spawn().context("cannot start outrigger up")?;
        Ok(Mesh { name: name.to_owned(), up })
    }

    /// The mesh's name, for subcommands of two words.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A subcommand about this mesh.
    pub fn command(&self, verb: &str) -> Command {
        let mut command = outrigger();
        command.args([verb, "--name", &self.name]);
        command
    }

    /// The pods as `ps -o json` lists them.
    pub fn pods(&self) -> anyhow::Result<Vec<Value>> {
        let output = Output::of(self.command("ps").args(["-o", "json"]));
        if !output.success {
            bail!("{}", output.all());
        }
        Ok(serde_json::from_str(&output.stdout)?)
    }

    /// The full name of the one pod whose name starts so.
    pub fn pod(&self, prefix: &str) -> String {
        let pods = self.pods().expect("ps");
        let names: Vec<_> = pods.iter().filter_map(|pod| pod["name"].as_str()).collect();
        let found: Vec<_> = names.iter().filter(|name| name.starts_with(prefix)).collect();
        assert_eq!(found.len(), 1, "pods that start with {prefix} among {names:?}");
        (*found[0]).to_owned()
    }

    /// `apply -f` of a file; panics with its message if it is refused.
    pub fn apply(&self, file: &Path) {
        let output = Output::of(self.command("apply").arg("-f").arg(file));
        assert!(output.success, "apply {}: {}", file.display(), output.all());
    }

    /// `delete -f` of a file.
    pub fn delete(&self, file: &Path) {
        let output = Output::of(self.command("delete").arg("-f").arg(file));
        assert!(output.success, "delete {}: {}", file.display(), output.all());
    }

    /// What a command in a container of a pod printed.
    pub fn exec(&self, pod: &str, container: &str, command: &[&str]) -> Output {
        Output::of(self.command("exec").args([pod, "-c", container, "--"]).args(command))
    }

    /// Kills `up` as the kernel's out-of-memory killer would, and forgets it.
    pub fn kill(&mut self) {
        self.up.kill().expect("up is ours to kill");
        self.up.wait().expect("up is our child");
    }

    /// The process of `up`.
    pub fn pid(&self) -> u32 {
        self.up.id()
    }

    /// Runs a program inside a pod's network namespace, with the rights of the test.
    pub fn in_pod_network(&self, pod: &str, command: &[&str]) -> Output {
        let pods = self.pods().expect("ps");
        let pid = pods.iter().find(|row| row["name"] == pod).and_then(|row| row["pid"].as_u64());
        let pid = pid.unwrap_or_else(|| panic!("no process of pod {pod} among {pods:?}"));
        Output::of(Command::new("nsenter").arg(format!("--net=/proc/{pid}/ns/net")).arg("--").args(command))
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        Output::of(&mut self.command("down"));
        let _ = self.up.kill();
        let _ = self.up.wait();
    }
}
