//! The hidden subcommand `container-init`: becomes a container, or enters one.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rustix::process::Signal;
use rustix::thread::LinkNameSpaceType;

use super::clone::{NETNS_FD, REPORT_FD, SPEC_FD};
use super::{Job, Spec, enter, mounts};

/// Entry of the subcommand. Called by the program's `main` before it makes any thread; returns only on failure.
pub fn container_init() -> ExitCode {
    // SAFETY: the descriptors were put in place by `clone_and_exec`; when a user calls the subcommand by hand, they are closed or
    // strangers, and the reads below fail. Nothing else in this process owns them.
    let (spec, report) = unsafe { (OwnedFd::from_raw_fd(SPEC_FD), OwnedFd::from_raw_fd(REPORT_FD)) };
    if let Err(error) = close_on_exec(&report) {
        eprintln!("outrigger container-init is started by `outrigger up` only: {error}");
        return ExitCode::from(2);
    }
    let error = match read_job(spec) {
        Ok(Job::Start(spec)) => match become_container(&spec, &report) {
            Ok(never) => match never {},
            Err(error) => error,
        },
        Ok(Job::Enter(enter)) => match enter::run(&enter, Some(&report)) {
            Ok(code) => return code,
            Err(error) => error,
        },
        Err(error) => error,
    };
    let _ = File::from(report).write_all(error.as_bytes());
    ExitCode::from(127)
}

fn close_on_exec(fd: &OwnedFd) -> std::io::Result<()> {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(())
}

fn read_job(spec: OwnedFd) -> Result<Job, String> {
    let mut text = String::new();
    File::from(spec).read_to_string(&mut text).map_err(|error| format!("read the container's spec: {error}"))?;
    // An empty or cut text means that `up` died meanwhile.
    serde_json::from_str(&text).map_err(|error| format!("understand the container's spec: {error}"))
}

/// Dies with `up` from here on, also when `up` died before this call: then nobody holds the report's other end.
pub(super) fn die_with_parent(report: &OwnedFd) -> Result<(), String> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| format!("set parent death signal: {e}"))?;
    let mut polled = [rustix::event::PollFd::new(report, rustix::event::PollFlags::OUT)];
    rustix::event::poll(&mut polled, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))
        .map_err(|e| format!("ask whether `up` still runs: {e}"))?;
    if polled[0].revents().contains(rustix::event::PollFlags::ERR) {
        return Err("`up` has ended".to_owned());
    }
    Ok(())
}

fn become_container(spec: &Spec, report: &OwnedFd) -> Result<std::convert::Infallible, String> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    // SAFETY: put in place by `clone_and_exec`; only borrowed for the call.
    let netns = unsafe { BorrowedFd::borrow_raw(NETNS_FD) };
    rustix::thread::move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))
        .map_err(|error| format!("enter the pod's network namespace: {error}"))?;
    rustix::system::sethostname(spec.hostname.as_bytes()).map_err(|error| format!("set host name: {error}"))?;
    mounts::build(spec)?;
    close_inherited();
    spec.credentials.assume()?;
    // Changing the user cleared the death signal.
    die_with_parent(report)?;
    Err(exec(&spec.argv, &spec.env, spec.cwd.as_deref()).message)
}

/// Marks every descriptor above standard error close-on-exec, so that no namespace or pipe of ours leaks into the program.
pub(super) fn close_inherited() {
    // SAFETY: plain system call without pointers; marking descriptors changes nothing for this process.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
}

/// Becomes the program; returns why not.
pub(super) fn exec(argv: &[String], env: &[(String, String)], cwd: Option<&str>) -> Failure {
    let Some((program, args)) = argv.split_first() else {
        return "no command".to_owned().into();
    };
    if let Some(cwd) = cwd {
        // As container runtimes do: a missing working folder is made.
        let _ = std::fs::create_dir_all(cwd);
        if let Err(error) = rustix::process::chdir(cwd) {
            return format!("change to working folder {cwd}: {error}").into();
        }
    }
    let error = Command::new(program).args(args).env_clear().envs(env.iter().map(|(k, v)| (k, v))).exec();
    let status = if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 };
    Failure { message: format!("run {program}: {error}"), status }
}

/// Why a program did not start, and the exit status that shells give for it: 127 if it is not there, else 126.
pub(super) struct Failure {
    pub(super) message: String,
    pub(super) status: i32,
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self { message, status: 126 }
    }
}
