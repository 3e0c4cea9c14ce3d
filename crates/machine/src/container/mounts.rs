//! A container's view of the file system: an overlay over the host's `/` whose changes live in memory, with the pod's volumes in it.
//!
//! Runs in the container's own mount namespace; nothing of it is seen by the host, and all of it is gone with the last process.
#![allow(unsafe_code)]

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::{Mount, Spec};

/// Devices every container has (OCI runtime spec, default devices).
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// Kernel interfaces that are the whole machine's: read-only inside (OCI runtimes' default).
const READ_ONLY: [&str; 5] = ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs"];
/// Hidden altogether.
const MASKED: [&str; 4] = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug"];
/// File systems of the host, other than `/`, whose content containers see (copy on write).
const REAL: [&str; 7] = ["ext4", "xfs", "btrfs", "zfs", "f2fs", "ext3", "ext2"];

/// A mount cloned from the host's tree, to be attached in the new one.
struct Detached<'a> {
    tree: OwnedFd,
    is_dir: bool,
    mount: &'a Mount,
}

/// Where something will be mounted.
struct Target<'a> {
    path: &'a Path,
    is_dir: bool,
}

fn failed<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}

/// Replaces this process's root by the container's.
pub(super) fn build(spec: &Spec) -> Result<(), String> {
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(failed("make mounts private"))?;
    let own = own_mounts(spec);
    let detached = own.iter().chain(&spec.mounts).map(detach).collect::<Result<Vec<_>, _>>()?;
    let devices = DEVICES
        .iter()
        .filter_map(|name| clone_tree(Path::new("/dev").join(name).as_path()).ok().map(|tree| (*name, tree)))
        .collect::<Vec<_>>();

    let targets: Vec<Target<'_>> =
        detached.iter().map(|one| Target { path: Path::new(&one.mount.target), is_dir: one.is_dir }).collect();
    let root = overlay(&spec.scratch, &targets)?;
    // Before the switch: a new proc or sysfs may only be mounted while an old, complete one is visible (user namespaces).
    mount_proc_and_sys(&root, spec.privileged)?;
    switch_root(&root)?;

    device_files(devices)?;
    private_tmpfs("/run", "mode=755")?;
    hide_state(&spec.scratch)?;
    for one in detached {
        attach(one)?;
    }
    if !spec.privileged {
        protect_kernel()?;
    }
    if spec.read_only_root {
        set_read_only(CWD.as_fd(), "/", false).map_err(failed("make / read-only"))?;
    }
    Ok(())
}

fn own_mounts(spec: &Spec) -> Vec<Mount> {
    ["outrigger", "pilot-agent", "istio-iptables"]
        .iter()
        .map(|name| Mount {
            source: spec.program.clone(),
            sub_path: None,
            target: format!("/usr/local/bin/{name}"),
            read_only: true,
        })
        .collect()
}

fn clone_tree(path: &Path) -> Result<OwnedFd, rustix::io::Errno> {
    rustix::mount::open_tree(
        CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE,
    )
}

fn detach(mount: &Mount) -> Result<Detached<'_>, String> {
    let source = mount.source.display();
    let at = rustix::fs::open(&mount.source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed(format_args!("volume {source}")))?;
    let at = match &mount.sub_path {
        None => at,
        // The content of a volume is the containers': links in it must not lead out of it.
        Some(sub) => {
            rustix::fs::openat2(&at, sub.as_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)
                .map_err(failed(format_args!("subPath {sub} of volume {source}")))?
        }
    };
    let is_dir = rustix::fs::fstat(&at)
        .map(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir())
        .map_err(failed(format_args!("volume {source}")))?;
    let tree = rustix::mount::open_tree(
        &at,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE
            | OpenTreeFlags::AT_EMPTY_PATH,
    )
    .map_err(failed(format_args!("clone the mount of volume {source}")))?;
    Ok(Detached { tree, is_dir, mount })
}

/// Mounts the overlay below `scratch` and returns its folder.
fn overlay(scratch: &Path, targets: &[Target<'_>]) -> Result<PathBuf, String> {
    rustix::mount::mount("tmpfs", scratch, "tmpfs", MountFlags::NODEV | MountFlags::NOSUID, Some(c"mode=755"))
        .map_err(failed("mount a tmpfs for the container's changes"))?;
    let root = scratch.join("root");
    let mounted = mount_points();
    let mut layers = Layers { scratch, count: 0, targets: &[] };
    if layers.stack(Path::new("/"), &root).is_ok() {
        for (below, kind) in &mounted {
            let hidden = scratch.starts_with(below) || below == Path::new("/") || !below.is_dir();
            if hidden || !REAL.contains(&kind.as_str()) {
                continue;
            }
            if let Err(error) = layers.stack(below, &root.join(below.strip_prefix("/").unwrap_or(below))) {
                // A file system that cannot be stacked is missing in the container; its programs then are too, with a clear error.
                tracing::debug!(path = %below.display(), error, "not visible in the container");
            }
        }
    } else {
        // In a user namespace the kernel refuses a layer that has mounts of others in it: they could be uncovered. So the folders
        // without any are stacked one by one.
        fs::create_dir_all(&root).map_err(failed(format_args!("make {}", root.display())))?;
        // A root must be a mount of its own.
        rustix::mount::mount("tmpfs", &root, "tmpfs", MountFlags::NODEV | MountFlags::NOSUID, Some(c"mode=755"))
            .map_err(failed("mount a tmpfs for the container's root"))?;
        // Nor may anything be made in folders of users that the namespace does not know, so what is needed is made beforehand.
        layers.targets = targets;
        layers.piecewise(Path::new("/"), &root, &mounted)?;
    }
    Ok(root)
}

/// Overlays in the making.
struct Layers<'a> {
    /// Where the changes go, each overlay's in folders with its number.
    scratch: &'a Path,
    count: usize,
    /// Mount targets to be made in the upper layers; none where they can be made later.
    targets: &'a [Target<'a>],
}

impl Layers<'_> {
    /// Rebuilds `lower` at `target`: folders without mounts below them as overlays, the others as plain folders with the same inside.
    fn piecewise(&mut self, lower: &Path, target: &Path, mounted: &[(PathBuf, String)]) -> Result<(), String> {
        fs::create_dir_all(target).map_err(failed(format_args!("make {}", target.display())))?;
        let entries = fs::read_dir(lower).map_err(failed(format_args!("read {}", lower.display())))?;
        for entry in entries.flatten() {
            let (from, to) = (entry.path(), target.join(entry.file_name()));
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_symlink() {
                if let Ok(link) = fs::read_link(&from) {
                    let _ = std::os::unix::fs::symlink(link, &to);
                }
                continue;
            }
            if !kind.is_dir() {
                continue;
            }
            // Mounted anew below, or hidden on purpose.
            if ["/proc", "/sys", "/dev", "/run"].iter().any(|own| from == Path::new(own)) {
                let _ = fs::create_dir(&to);
                continue;
            }
            let mounts_below = mounted.iter().any(|(point, _)| point != &from && point.starts_with(&from));
            let itself = mounted.iter().find(|(point, _)| point == &from);
            if mounts_below && itself.is_none() {
                // What cannot be read stays empty.
                let _ = self.piecewise(&from, &to, mounted);
            } else if itself.is_none_or(|(_, kind)| REAL.contains(&kind.as_str()))
                && let Err(error) = self.stack(&from, &to)
            {
                tracing::debug!(path = %from.display(), error, "not visible in the container");
            }
        }
        Ok(())
    }

    /// Mounts an overlay of `lower` at `target`.
    fn stack(&mut self, lower: &Path, target: &Path) -> Result<(), String> {
        let name = self.count;
        self.count += 1;
        let folder = |kind: &str| -> Result<PathBuf, String> {
            let path = self.scratch.join(format!("{kind}{name}"));
            fs::DirBuilder::new().mode(0o755).create(&path).map_err(failed(format_args!("make {}", path.display())))?;
            Ok(path)
        };
        let (upper, work) = (folder("upper")?, folder("work")?);
        like(lower, &upper);
        for wanted in self.targets {
            if let Some(path) = below(lower, wanted.path) {
                make_target(lower, &upper, &path, wanted.is_dir);
            }
        }
        fs::create_dir_all(target).map_err(failed(format_args!("make {}", target.display())))?;
        let escape =
            |path: &Path| path.display().to_string().replace('\\', "\\\\").replace(',', "\\,").replace(':', "\\:");
        let options = format!("lowerdir={},upperdir={},workdir={}", escape(lower), escape(&upper), escape(&work));
        let plain = std::ffi::CString::new(options.clone()).map_err(failed("overlay options"))?;
        // userxattr: needed in a user namespace (no trusted.* there), harmless otherwise, but unknown before Linux 5.11.
        let user = std::ffi::CString::new(format!("{options},userxattr")).map_err(failed("overlay options"))?;
        rustix::mount::mount("overlay", target, "overlay", MountFlags::empty(), Some(plain.as_c_str()))
            .or_else(|_| rustix::mount::mount("overlay", target, "overlay", MountFlags::empty(), Some(user.as_c_str())))
            .map_err(failed(format_args!("mount an overlay over {}", lower.display())))
    }
}

/// Gives a new folder the permissions of the one it stands for (`/tmp` must stay writable for all).
fn like(lower: &Path, new: &Path) {
    if let Ok(meta) = fs::metadata(lower) {
        let _ = fs::set_permissions(new, fs::Permissions::from_mode(meta.permissions().mode()));
    }
}

/// The part of a mount target below `lower`, with the links of the host's path followed.
fn below(lower: &Path, target: &Path) -> Option<PathBuf> {
    let mut existing = target;
    let mut rest = Vec::new();
    let real = loop {
        if let Ok(real) = fs::canonicalize(existing) {
            break real;
        }
        rest.push(existing.file_name()?);
        existing = existing.parent()?;
    };
    // The last part itself is replaced, not followed.
    let real = if rest.is_empty() { fs::canonicalize(target.parent()?).ok()?.join(target.file_name()?) } else { real };
    let whole = rest.iter().rev().fold(real, |path, part| path.join(part));
    whole.strip_prefix(lower).ok().filter(|path| !path.as_os_str().is_empty()).map(Path::to_owned)
}

/// Makes a target in an upper layer, its folders with the permissions that they have below.
fn make_target(lower: &Path, upper: &Path, path: &Path, is_dir: bool) {
    let (mut below, mut above) = (lower.to_owned(), upper.to_owned());
    if let Some(parent) = path.parent() {
        for part in parent.components() {
            below.push(part);
            above.push(part);
            if fs::create_dir(&above).is_ok() {
                like(&below, &above);
            }
        }
    }
    let place = upper.join(path);
    // It is there already when two targets share it; any other failure shows when the mount is attached.
    let _ = if is_dir { fs::create_dir(&place) } else { fs::File::create(&place).map(drop) };
}

/// All mount points and their file systems' types, in mount order.
fn mount_points() -> Vec<(PathBuf, String)> {
    let Ok(table) = fs::read_to_string("/proc/self/mountinfo") else {
        return Vec::new();
    };
    table
        .lines()
        .filter_map(|line| {
            // man 5 proc_pid_mountinfo: fields before " - " are positional, the fifth is the mount point; after it comes the type.
            let (left, right) = line.split_once(" - ")?;
            let point = left.split(' ').nth(4)?.replace("\\040", " ");
            Some((PathBuf::from(point), right.split(' ').next()?.to_owned()))
        })
        .collect()
}

fn mount_proc_and_sys(root: &Path, privileged: bool) -> Result<(), String> {
    let hardened = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("proc", root.join("proc"), "proc", hardened, None).map_err(failed("mount /proc"))?;
    let flags = if privileged { hardened } else { hardened | MountFlags::RDONLY };
    if let Err(error) = rustix::mount::mount("sysfs", root.join("sys"), "sysfs", flags, None) {
        // Nothing that containers need; some sandboxes refuse it.
        tracing::debug!(%error, "no /sys in the container");
    }
    Ok(())
}

fn switch_root(root: &Path) -> Result<(), String> {
    rustix::process::chdir(root).map_err(failed("enter the container's root"))?;
    // man 2 pivot_root, "pivot_root(".", ".")": the old root lands on top of the new one and is then taken off.
    rustix::process::pivot_root(".", ".").map_err(failed("switch to the container's root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("leave the host's root"))?;
    rustix::process::chdir("/").map_err(failed("enter the container's root"))
}

fn private_tmpfs(path: &str, options: &str) -> Result<(), String> {
    fs::create_dir_all(path).map_err(failed(format_args!("make {path}")))?;
    let options = std::ffi::CString::new(options).map_err(failed("mount options"))?;
    rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::NOSUID, Some(options.as_c_str()))
        .map_err(failed(format_args!("mount a tmpfs at {path}")))
}

/// Takes the state folders of all meshes out of sight, wherever they are: they hold other pods' tokens.
fn hide_state(scratch: &Path) -> Result<(), String> {
    // …/outrigger/NAME/pods/UID/scratch
    let Some(folders) = scratch.ancestors().nth(4).filter(|path| path.is_dir()) else { return Ok(()) };
    rustix::mount::mount("tmpfs", folders, "tmpfs", MountFlags::NOSUID | MountFlags::RDONLY, Some(c"mode=000"))
        .map_err(failed("hide the state folder"))
}

fn device_files(devices: Vec<(&str, OwnedFd)>) -> Result<(), String> {
    private_tmpfs("/dev", "mode=755")?;
    for (name, tree) in devices {
        let path = format!("/dev/{name}");
        fs::File::create(&path).map_err(failed(format_args!("make {path}")))?;
        move_to(&tree, &path)?;
    }
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        std::os::unix::fs::symlink(target, format!("/dev/{link}")).map_err(failed(format_args!("make /dev/{link}")))?;
    }
    fs::create_dir_all("/dev/shm").map_err(failed("make /dev/shm"))?;
    rustix::mount::mount(
        "shm",
        "/dev/shm",
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        Some(c"mode=1777,size=64m"),
    )
    .map_err(failed("mount /dev/shm"))?;
    fs::create_dir_all("/dev/pts").map_err(failed("make /dev/pts"))?;
    if rustix::mount::mount(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        Some(c"newinstance,ptmxmode=0666,mode=0620"),
    )
    .is_ok()
    {
        let _ = std::os::unix::fs::symlink("pts/ptmx", "/dev/ptmx");
    }
    Ok(())
}

fn move_to(tree: &OwnedFd, target: &str) -> Result<(), String> {
    // A folder may be a link, as /var/run is in most images; its target counts.
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    rustix::mount::move_mount(tree, "", CWD, target, flags).map_err(failed(format_args!("mount at {target}")))
}

fn attach(one: Detached<'_>) -> Result<(), String> {
    let target = Path::new(&one.mount.target);
    if one.is_dir {
        fs::create_dir_all(target).map_err(failed(format_args!("make {}", target.display())))?;
    } else if fs::symlink_metadata(target).map_or(true, |meta| meta.file_type().is_symlink()) {
        // A link (resolv.conf often is one) would be followed to a place that may not exist here.
        let _ = fs::remove_file(target);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(failed(format_args!("make {}", parent.display())))?;
        }
        let file = fs::File::create(target).map_err(failed(format_args!("make {}", target.display())))?;
        let _ = file.set_permissions(fs::Permissions::from_mode(0o644));
    }
    if one.mount.read_only {
        set_read_only(one.tree.as_fd(), "", true)
            .map_err(failed(format_args!("make {} read-only", target.display())))?;
    }
    move_to(&one.tree, &one.mount.target)
}

fn protect_kernel() -> Result<(), String> {
    for path in READ_ONLY {
        if Path::new(path).exists() {
            let tree = clone_tree(Path::new(path)).map_err(failed(format_args!("clone {path}")))?;
            set_read_only(tree.as_fd(), "", true).map_err(failed(format_args!("make {path} read-only")))?;
            move_to(&tree, path)?;
        }
    }
    for path in MASKED {
        if Path::new(path).exists() {
            let tree = clone_tree(Path::new("/dev/null")).map_err(failed("clone /dev/null"))?;
            move_to(&tree, path)?;
        }
    }
    Ok(())
}

/// `mount_setattr(2)` with read-only, for a whole cloned tree or one mount.
fn set_read_only(at: std::os::fd::BorrowedFd<'_>, path: &str, recursive: bool) -> std::io::Result<()> {
    let path = std::ffi::CString::new(path)?;
    // SAFETY: an all-zero mount_attr means "change nothing".
    let mut attributes: libc::mount_attr = unsafe { std::mem::zeroed() };
    attributes.attr_set = libc::MOUNT_ATTR_RDONLY;
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: all pointers live through the call, and the size passed is that of the struct pointed to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            at.as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
