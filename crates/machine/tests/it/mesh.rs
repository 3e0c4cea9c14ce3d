//! A running mesh for a test.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A mesh that ends with the test, whatever happens.
pub(crate) struct Mesh {
    pub(crate) name: String,
    pub(crate) up: Child,
    folder: tempfile::TempDir,
    log: PathBuf,
}

/// Runs this binary as `outrigger`.
pub(crate) fn outrigger(args: &[&str]) -> Output {
    Command::new("/proc/self/exe").args(args).stdin(Stdio::null()).output().expect("this binary runs")
}

/// Output of a successful command.
#[track_caller]
pub(crate) fn out(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Mesh {
    /// Starts a mesh of the YAML; the folder of its file may hold more.
    pub(crate) fn start(name: &str, yaml: &str, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("mesh.yaml");
        std::fs::write(&file, yaml).expect("write the YAML");
        let log = folder.path().join("up.log");
        let out = std::fs::File::create(&log).expect("a log");
        let up = Command::new("/proc/self/exe")
            .args(["up", file.to_str().expect("a plain path"), "--name", name, "--no-default-injection"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a second descriptor"))
            .stderr(out)
            .spawn()
            .expect("this binary runs");
        Self { name: name.to_owned(), up, folder, log }
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.folder.path().join("mesh.yaml")
    }

    pub(crate) fn log(&self) -> String {
        let mut text = String::new();
        let _ = std::fs::File::open(&self.log).and_then(|mut file| file.read_to_string(&mut text));
        text
    }

    /// Waits for a word in what `up` says.
    #[track_caller]
    pub(crate) fn says(&self, word: &str) {
        self.until(|| self.log().contains(word), || format!("`up` never said {word:?}:\n{}", self.log()));
    }

    /// Waits for something in `ps`.
    #[track_caller]
    pub(crate) fn shows(&self, what: impl Fn(&str) -> bool) {
        let ps = || String::from_utf8_lossy(&outrigger(&["ps", "--name", &self.name]).stdout).into_owned();
        self.until(|| what(&ps()), || format!("it never came to that:\n{}\n{}", ps(), self.log()));
    }

    #[track_caller]
    fn until(&self, done: impl Fn() -> bool, complaint: impl Fn() -> String) {
        let began = Instant::now();
        while !done() {
            assert!(began.elapsed() < Duration::from_secs(40), "{}", complaint());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn exec(&self, pod: &str, script: &str) -> Output {
        outrigger(&["exec", pod, "--name", &self.name, "--", "sh", "-c", script])
    }

    pub(crate) fn apply(&self, yaml: &str) -> Output {
        let file = self.folder.path().join("apply.yaml");
        std::fs::write(&file, yaml).expect("write the YAML");
        outrigger(&["apply", "-f", file.to_str().expect("a plain path"), "--name", &self.name])
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        let _ = outrigger(&["down", "--name", &self.name]);
        let _ = self.up.kill();
        let _ = self.up.wait();
    }
}
