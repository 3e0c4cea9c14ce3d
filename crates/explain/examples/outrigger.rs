use clap::Parser;
#[derive(Parser)]
enum Cli {
    Explain(Box<explain::Args>),
}
fn main() -> anyhow::Result<std::process::ExitCode> {
    match Cli::parse() {
        Cli::Explain(a) => explain::run(&a),
    }
}
