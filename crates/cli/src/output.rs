//! Ending as a Unix program does when nobody takes what it prints (`outrigger … | head`), instead of with a panic.

use std::panic;

/// As if SIGPIPE had ended it. The signal itself stays ignored: it would come from sockets, too, and end servers.
const STATUS: i32 = 128 + 13;

/// What `println!` panics with.
const FAILED: &str = "failed printing to stdout";

/// Installs it for the rest of the process.
pub(crate) fn end_with_the_reader() {
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let message = info.payload_as_str().unwrap_or_default();
        if !message.starts_with(FAILED) {
            return default(info);
        }
        if !reader_is_gone() {
            let why = message.trim_start_matches(FAILED).trim_start_matches(": ");
            // The last word there is; where it goes nowhere either, the status tells.
            let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("Error: cannot print: {why}\n"));
            std::process::exit(1);
        }
        std::process::exit(STATUS);
    }));
}

/// Whether standard output is a pipe or a socket that nobody reads any more.
pub(crate) fn reader_is_gone() -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let stdout = std::io::stdout();
    let mut fds = [PollFd::new(&stdout, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP)
}

/// The status for an error of a command: quietly the same if it only could not print.
pub(crate) fn status_of(error: &anyhow::Error) -> Option<i32> {
    let broken = error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    });
    (broken && reader_is_gone()).then_some(STATUS)
}
