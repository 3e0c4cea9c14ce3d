//! What the machine must offer; each lack is one sentence that says how to get it.

use anyhow::bail;

/// Refuses to start where it cannot work.
pub(crate) fn check() -> anyhow::Result<()> {
    let Some((major, minor)) = kernel_version() else { return Ok(()) };
    // mount_setattr(2) with AT_EMPTY_PATH and clone3(2) with pidfds.
    if (major, minor) < (5, 12) {
        bail!("Linux {major}.{minor} is too old: 5.12 or newer is needed");
    }
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has_overlay = known.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay");
    if !has_overlay && !std::path::Path::new("/sys/module/overlay").exists() {
        bail!("the kernel has no overlay file system: `modprobe overlay` loads it where it is a module");
    }
    Ok(())
}

fn kernel_version() -> Option<(u32, u32)> {
    let name = rustix::system::uname();
    let text = name.release().to_str().ok()?;
    let mut parts = text.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
