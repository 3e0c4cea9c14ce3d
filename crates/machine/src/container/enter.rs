//! Running one more program inside a container: exec probes, hooks and `outrigger exec`.
#![allow(unsafe_code)]

use std::os::fd::OwnedFd;
use std::process::ExitCode;

use rustix::process::{Pid, PidfdFlags};
use rustix::thread::ThreadNameSpaceType;
use serde::{Deserialize, Serialize};

use super::{credentials::Credentials, init};

/// What to run, and where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Enter {
    /// Process 1 of the container, as numbered in the caller's pid namespace.
    pub(crate) pid: i32,
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) cwd: Option<String>,
    pub(crate) credentials: Credentials,
    /// Whether the container's user namespace must be entered too (rootless mesh, seen from outside).
    pub(crate) user_namespace: bool,
}

/// Enters the container, runs the program there and returns its exit code. Must be called in a process without other threads.
///
/// With `report`, the program dies with its parent (`up`), and the report closes once the program runs; without, the caller is a user's
/// shell and the program simply is its child.
pub(crate) fn run(enter: &Enter, report: Option<&OwnedFd>) -> Result<ExitCode, String> {
    let pid = Pid::from_raw(enter.pid).ok_or("the container has no process")?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .map_err(|_| "the container's process has ended".to_owned())?;
    let mut kinds = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION;
    if enter.user_namespace {
        kinds |= ThreadNameSpaceType::USER;
    }
    rustix::thread::move_into_thread_name_spaces(std::os::fd::AsFd::as_fd(&pidfd), kinds)
        .map_err(|error| format!("enter the container's namespaces: {error}"))?;
    // Only a child is in the pid namespace entered.
    // SAFETY: this process has one thread, so the child may do anything the parent could.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(format!("fork: {}", std::io::Error::last_os_error()));
    }
    if child == 0 {
        let error = become_program(enter, report);
        match report {
            Some(report) => {
                let _ = rustix::io::write(report, error.message.as_bytes());
            }
            None => eprintln!("outrigger exec: {}", error.message),
        }
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(error.status) }
    }
    if let Some(report) = report {
        // The report must close when the program has replaced the child: this copy stands in the way.
        // SAFETY: the owner never uses it again, as this process only waits from here on; closing it early is what closes the pipe.
        unsafe { libc::close(std::os::fd::AsRawFd::as_raw_fd(report)) };
    } else {
        ignore_terminal_signals();
    }
    let child = Pid::from_raw(child).ok_or("fork gave no process id")?;
    loop {
        match rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty()) {
            Ok(Some((_, status))) => {
                let code = status
                    .exit_status()
                    .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
                    .unwrap_or(255);
                let code = ExitCode::from(u8::try_from(code).unwrap_or(255));
                if report.is_some() {
                    // The report's descriptor number is closed already; leave without dropping its owner.
                    std::process::exit(
                        status.exit_status().or_else(|| status.terminating_signal().map(|s| 128 + s)).unwrap_or(255),
                    );
                }
                return Ok(code);
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("wait for the program: {error}")),
        }
    }
}

/// Ctrl-C on the terminal is for the program inside; this process must stay to report its exit code.
fn ignore_terminal_signals() {
    // SAFETY: sets dispositions to a constant; no handler code is involved.
    unsafe {
        libc::signal(libc::SIGINT, libc::SIG_IGN);
        libc::signal(libc::SIGQUIT, libc::SIG_IGN);
    }
}

fn become_program(enter: &Enter, report: Option<&OwnedFd>) -> init::Failure {
    init::close_inherited();
    if let Err(error) = enter.credentials.assume() {
        return error.into();
    }
    if let Some(report) = report
        && let Err(error) = init::die_with_parent(report)
    {
        return error.into();
    }
    init::exec(&enter.argv, &enter.env, Some(enter.cwd.as_deref().unwrap_or("/")))
}
