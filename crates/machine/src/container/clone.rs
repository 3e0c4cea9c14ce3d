//! Starting processes in new namespaces from one thread that lives as long as the program.
//!
//! Why a thread of its own: the parent death signal follows the *thread* that made the child, and tokio's blocking threads come and go.
//! Why `clone3` by hand: `unshare(CLONE_NEWPID)` is refused to a program with threads, and an intermediate process per container would
//! double the count of processes.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc;

use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

/// Where the new process finds its job (read end of a pipe).
pub(crate) const SPEC_FD: RawFd = 3;
/// Where it reports a failure; closes on exec.
pub(crate) const REPORT_FD: RawFd = 4;
/// The network namespace to enter.
pub(crate) const NETNS_FD: RawFd = 5;
/// Descriptors used here are moved above this number first, so that `dup2` cannot overwrite one that is still needed.
const FIRST_FREE: RawFd = 16;

/// Which namespaces the new process gets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Namespaces {
    /// pid, mount, uts and ipc of its own.
    Fresh,
    /// Those of `up`; the process enters others by itself.
    Inherited,
}

/// One process to start. The descriptors are the child's.
pub(crate) struct Request {
    pub(crate) namespaces: Namespaces,
    pub(crate) spec: OwnedFd,
    pub(crate) report: OwnedFd,
    pub(crate) netns: Option<OwnedFd>,
    pub(crate) output: OwnedFd,
}

/// A new process as its parent sees it.
pub(crate) struct Child {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

type Reply = oneshot::Sender<io::Result<Child>>;

/// Handle to the thread that starts processes. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Spawner {
    jobs: mpsc::Sender<(Request, Reply)>,
}

impl Spawner {
    /// Starts the thread. `environment` is what `container-init` itself sees (log level); containers get theirs from their spec.
    pub(crate) fn start_thread() -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<(Request, Reply)>();
        std::thread::Builder::new().name("spawner".to_owned()).spawn(move || {
            for (request, reply) in queue {
                let child = clone_and_exec(request);
                // The asker may have been cancelled; the child then finds its pipes closed and ends.
                let _ = reply.send(child);
            }
            // All handles are gone, the program is ending; this thread must outlive the containers, so it only sleeps.
            loop {
                std::thread::park();
            }
        })?;
        Ok(Self { jobs })
    }

    pub(crate) async fn clone_process(&self, request: Request) -> io::Result<Child> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send((request, reply)).map_err(|_| io::Error::other("the spawner thread has ended"))?;
        answer.await.map_err(|_| io::Error::other("the spawner thread has ended"))?
    }
}

/// Registers a process descriptor with the runtime; it becomes readable when the process has ended.
pub(crate) fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: `OwnedFd` keeps the same open descriptor for as long as it lives, and `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(pidfd, tokio::io::Interest::READABLE) }.map_err(Into::into)
}

/// Duplicates to a number above the fixed ones.
fn high(fd: &OwnedFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, FIRST_FREE)?)
}

fn clone_and_exec(request: Request) -> io::Result<Child> {
    let null = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let null = high(&null)?;
    let spec = high(&request.spec)?;
    let report = high(&request.report)?;
    let output = high(&request.output)?;
    let netns = request.netns.as_ref().map(high).transpose()?;
    let program = CString::new("/proc/self/exe").map_err(io::Error::other)?;
    let name = CString::new("outrigger").map_err(io::Error::other)?;
    let subcommand = CString::new("container-init").map_err(io::Error::other)?;
    let argv = [name.as_ptr(), subcommand.as_ptr(), std::ptr::null()];
    let envp: [*const libc::c_char; 1] = [std::ptr::null()];
    let wanted = [
        (null.as_raw_fd(), 0),
        (output.as_raw_fd(), 1),
        (output.as_raw_fd(), 2),
        (spec.as_raw_fd(), SPEC_FD),
        (report.as_raw_fd(), REPORT_FD),
        (netns.as_ref().map_or(-1, AsRawFd::as_raw_fd), NETNS_FD),
    ];

    let flags = match request.namespaces {
        Namespaces::Fresh => libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC,
        Namespaces::Inherited => 0,
    } | libc::CLONE_PIDFD;
    let mut pidfd: RawFd = -1;
    // SAFETY: an all-zero clone_args is valid; the fields needed are set below.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    #[allow(clippy::cast_sign_loss, reason = "flag bits, not a number")]
    {
        args.flags = flags as u64;
        args.exit_signal = libc::SIGCHLD as u64;
    }
    args.pidfd = (&raw mut pidfd) as u64;
    // SAFETY: without CLONE_VM this is a fork: the child has its own copy of memory and stack. It only makes system calls on values
    // prepared above until execve or _exit, so locks held by other threads at this moment do not matter.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        // SAFETY: as above: async-signal-safe calls only, all pointers point into memory prepared before the fork.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
            // tokio and the standard library ignore SIGPIPE; programs expect the default.
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            libc::setsid();
            for (from, to) in wanted {
                if from >= 0 && libc::dup2(from, to) < 0 {
                    libc::_exit(126);
                }
            }
            libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr());
            libc::_exit(127);
        }
    }
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: the kernel stored a new descriptor owned by nobody else (CLONE_PIDFD).
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid, pidfd })
}
