//! Whole meshes of plain programs, without sidecars. This test binary is its own `outrigger`: it starts itself as `up`, `ps`, … and the
//! machine starts it as `container-init`.

mod bad_input;
mod cleanliness;
mod mesh;
mod workloads;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
enum Program {
    Up(machine::UpArgs),
    Down(machine::DownArgs),
    Apply(machine::ApplyArgs),
    Delete(machine::DeleteArgs),
    Ps(machine::PsArgs),
    Exec(machine::ExecArgs),
    Logs(machine::LogsArgs),
    RunJob(machine::RunJobArgs),
}

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("container-init") => machine::container_init(),
        Some(word) if !word.starts_with('-') && Program::try_parse().is_ok() => command(),
        filter => tests(filter.filter(|word| !word.starts_with('-'))),
    }
}

fn command() -> ExitCode {
    let outcome = match Program::parse() {
        Program::Up(args) => machine::up(&args),
        Program::Down(args) => machine::down(&args),
        Program::Apply(args) => machine::apply(&args),
        Program::Delete(args) => machine::delete(&args),
        Program::Ps(args) => machine::ps(&args),
        Program::Exec(args) => machine::exec(&args),
        Program::Logs(args) => machine::logs(&args),
        Program::RunJob(args) => machine::run_job(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn tests(filter: Option<&str>) -> ExitCode {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: meshes on this machine need root");
        return ExitCode::SUCCESS;
    }
    let all: &[(&str, fn())] = &[
        ("services_dns_and_volumes", workloads::services_dns_and_volumes),
        ("probes_and_restarts", workloads::probes_and_restarts),
        ("stateful_jobs_and_sidecars", workloads::stateful_jobs_and_sidecars),
        ("apply_delete_and_rollout", workloads::apply_delete_and_rollout),
        ("files_are_watched", workloads::files_are_watched),
        ("dual_stack", workloads::dual_stack),
        ("detached_until_down", cleanliness::detached_until_down),
        ("bad_input_is_named_and_the_rest_runs", bad_input::named_and_the_rest_runs),
        ("nothing_starts_with_a_syntax_error", bad_input::nothing_starts_with_a_syntax_error),
        ("a_second_up_of_the_same_name", bad_input::second_up_of_the_same_name),
        ("down_leaves_nothing", cleanliness::down_leaves_nothing),
        ("sigkill_leaves_nothing_but_a_folder", cleanliness::sigkill_leaves_nothing_but_a_folder),
        ("two_names_at_once", cleanliness::two_names_at_once),
    ];
    let mut failed = 0;
    for (name, test) in all.iter().filter(|(name, _)| filter.is_none_or(|f| name.contains(f))) {
        let good = std::panic::catch_unwind(test).is_ok();
        println!("test {name} ... {}", if good { "ok" } else { "FAILED" });
        failed += u32::from(!good);
    }
    println!("{failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
