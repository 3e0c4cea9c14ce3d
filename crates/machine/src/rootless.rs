//! `up` without root: the same program again as root of a user namespace of its own.
//!
//! Inside, user 0 is the caller and the users 1 to 65535 are those that `/etc/subuid` grants, so that containers can run as 1337 and
//! files keep different owners. `newuidmap` and `newgidmap` write the maps, as only they may.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use rustix::pipe::{PipeFlags, pipe_with};

/// Tells the inner program what it is.
const MARK: &str = "OUTRIGGER_ROOTLESS";
/// Ids needed: 1337 for sidecars, 65534 for nobody.
const IDS: u32 = 65_535;

/// Whether this program is root of such a namespace.
pub(crate) fn inside() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Runs this program with the same arguments inside a new user namespace, and returns its status.
pub(crate) fn run() -> anyhow::Result<ExitCode> {
    allowed()?;
    let user = user_name()?;
    let uids = granted("/etc/subuid", &user)?;
    let gids = granted("/etc/subgid", &user)?;
    let (ready_read, ready_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let (go_read, go_write) = pipe_with(PipeFlags::CLOEXEC)?;
    // `spawn` returns only after the child's exec, which waits for the maps: so it has a thread of its own. The thread stays until
    // the child has ended, as the parent death signal follows it.
    let child = std::thread::spawn(move || {
        let mut command = Command::new("/proc/self/exe");
        command.args(std::env::args_os().skip(1)).env(MARK, "1");
        // SAFETY: between fork and exec only system calls are made, on descriptors that the closure owns.
        unsafe {
            command.pre_exec(move || enter(&ready_write, &go_read));
        }
        command.status()
    });
    let mut pid = [0u8; 4];
    if !rustix::io::read(&ready_read, &mut pid).is_ok_and(|length| length == 4) {
        let why = child.join().map_err(|_| anyhow::anyhow!("the helper thread failed"))?;
        why.context("make a user namespace")?;
        bail!("the user namespace ended at once");
    }
    let pid = i32::from_ne_bytes(pid);
    let mapped = map("newuidmap", pid, rustix::process::getuid().as_raw(), uids)
        .and_then(|()| map("newgidmap", pid, rustix::process::getgid().as_raw(), gids));
    // Closing the pipe without a word makes the child give up.
    if mapped.is_ok() {
        let _ = rustix::io::write(&go_write, &[1]);
    }
    drop(go_write);
    let status = child.join().map_err(|_| anyhow::anyhow!("the helper thread failed"))?;
    mapped?;
    let status = status.context("run inside the user namespace")?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// In the child: into a new user namespace, and wait there for the maps.
fn enter(ready: &OwnedFd, go: &OwnedFd) -> io::Result<()> {
    // SAFETY: plain system calls; the process has one thread.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM, 0, 0, 0);
        if libc::unshare(libc::CLONE_NEWUSER) < 0 {
            return Err(io::Error::last_os_error());
        }
        let pid = libc::getpid().to_ne_bytes();
        if libc::write(ready.as_raw_fd(), pid.as_ptr().cast(), pid.len()) != 4 {
            return Err(io::Error::last_os_error());
        }
        let mut word = 0u8;
        if libc::read(go.as_raw_fd(), (&raw mut word).cast(), 1) != 1 {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
    }
    Ok(())
}

/// Refuses, with what to do, where the kernel does not let users make namespaces.
fn allowed() -> anyhow::Result<()> {
    let setting = |path: &str| std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    if setting("/proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
        bail!("user namespaces are switched off: run as root, or `sysctl kernel.unprivileged_userns_clone=1`");
    }
    if setting("/proc/sys/user/max_user_namespaces") == Some(0) {
        bail!("user namespaces are switched off: run as root, or `sysctl user.max_user_namespaces=10000`");
    }
    if setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        bail!(
            "AppArmor restricts user namespaces: run as root, or `sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
        );
    }
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        bail!("XDG_RUNTIME_DIR is not set: log in with a session, or set it to a folder of mode 0700 of yours");
    }
    Ok(())
}

fn user_name() -> anyhow::Result<String> {
    let uid = rustix::process::getuid().as_raw();
    let passwd = std::fs::read_to_string("/etc/passwd").context("/etc/passwd")?;
    let line = passwd.lines().find(|line| line.split(':').nth(2) == Some(&uid.to_string()));
    Ok(line.and_then(|line| line.split(':').next()).map_or_else(|| uid.to_string(), str::to_owned))
}

/// First of the subordinate ids of a user (subuid(5)).
fn granted(file: &str, user: &str) -> anyhow::Result<u32> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    first_granted(&text, user, &rustix::process::getuid().as_raw().to_string()).with_context(|| {
        format!("{file} grants user {user} no {IDS} ids: `sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`")
    })
}

fn first_granted(text: &str, user: &str, uid: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut parts = line.split(':');
        let owner = parts.next()?;
        let (first, count): (u32, u32) = (parts.next()?.parse().ok()?, parts.next()?.trim().parse().ok()?);
        ((owner == user || owner == uid) && count >= IDS).then_some(first)
    })
}

fn map(program: &str, pid: i32, own: u32, first: u32) -> anyhow::Result<()> {
    let output = Command::new(program)
        .args([
            pid.to_string(),
            "0".to_owned(),
            own.to_string(),
            "1".to_owned(),
            "1".to_owned(),
            first.to_string(),
            IDS.to_string(),
        ])
        .output()
        .with_context(|| {
            format!("{program} is missing: install the package uidmap (Debian, Ubuntu) or shadow-utils (Fedora)")
        })?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_ids_by_name_or_number() {
        let text = "other:1:65536\nann:100000:10\nann:200000:65536\n1000:300000:65536\n";
        assert_eq!(first_granted(text, "ann", "7"), Some(200_000));
        assert_eq!(first_granted(text, "bob", "1000"), Some(300_000));
        assert_eq!(first_granted(text, "bob", "7"), None);
    }
}
