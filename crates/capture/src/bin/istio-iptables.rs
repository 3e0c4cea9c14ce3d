//! `istio-iptables` alone, for images that hold nothing else.

fn main() -> std::process::ExitCode {
    capture::main(std::env::args_os()).into()
}
