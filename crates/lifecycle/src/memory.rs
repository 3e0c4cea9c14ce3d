//! Giving back memory that is not in use.
//!
//! Every role is the same large program, and a start runs through much more of it than serving does: flags, YAML,
//! certificates, the first configuration. The kernel maps what was touched, and sixteen pages around each touch, and
//! counts it as resident until somebody else needs the memory. The pages are the page cache's, so letting go of them
//! costs nothing but a minor fault for each that is needed again.

// Dropping pages and trimming the heap have no safe interface.
#![allow(unsafe_code)]

use std::io::Write;

/// Takes the program's own code and constants out of the resident set, and returns free heap to the kernel. What is
/// in use comes back by itself, page by page.
///
/// Worth calling when a process has started and settles down to serve, and now and then after that; it takes about a
/// millisecond. Does nothing where `/proc` cannot be read.
pub fn release_unused() {
    // The heap first: trimming runs code, too.
    trim_heap();
    let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else { return };
    for (start, end) in unmodified_file_mappings(&maps) {
        // SAFETY: the range is a mapping of this process's own, it is not writable and none of its pages was ever
        // written (relocated data is: it counts as anonymous, and such mappings are left out). The kernel reads
        // a dropped page from the same file again, so no value that anybody can see changes.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED);
        }
    }
}

/// Ends the process with this status, standard output written. The libraries do not take their leave, for which they would touch
/// more memory than a short role ever held.
pub fn end(status: u8) -> ! {
    // Nobody is left to hear that it could not be written.
    let _ = std::io::stdout().flush();
    // SAFETY: only leaves out what is registered to run at exit, which is there to free what the kernel frees anyway.
    unsafe { libc::_exit(status.into()) }
}

#[cfg(target_env = "gnu")]
fn trim_heap() {
    // SAFETY: `malloc_trim` takes the allocator's own locks and gives back only what nobody holds.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(not(target_env = "gnu"))]
fn trim_heap() {}

/// For roles that make and drop big things as they serve: few heaps, and big buffers apart from them, so that what is dropped
/// goes back to the kernel instead of leaving holes. Worth calling before anything else is done.
pub fn keep_heap_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` sets numbers of the allocator's own; which they are does not matter to anybody else.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 20);
    }
}

/// For roles whose many small things live as long as a request: what is freed is merged with its neighbours at once, not all of
/// it together whenever something big is made, as every request's task is. Worth a twentieth of a request's CPU.
pub fn merge_what_is_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: as above.
    unsafe {
        libc::mallopt(libc::M_MXFAST, 0);
    }
}

/// The read-only mappings of files in which no page was ever written, as addresses from and to.
fn unmodified_file_mappings(smaps: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut current = None;
    for line in smaps.lines() {
        if let Some(range) = file_mapping(line) {
            current = range;
        } else if line.strip_prefix("Anonymous:").is_some_and(|rest| rest.trim() == "0 kB") {
            found.extend(current.take());
        }
    }
    found
}

/// `None`: not the first line of a mapping. `Some(None)`: one to leave alone.
fn file_mapping(line: &str) -> Option<Option<(usize, usize)>> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let range = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let permissions = words.next()?;
    let inode = words.nth(2)?;
    let ours = permissions.starts_with('r') && !permissions.contains('w') && permissions.ends_with('p') && inode != "0";
    Some(ours.then_some(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_untouched_files_are_found() {
        let smaps = "\
1000-3000 r--p 00000000 fe:00 77 /bin/x
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
3000-5000 r-xp 00002000 fe:00 77 /bin/x
Anonymous:             0 kB
5000-6000 r--p 00004000 fe:00 77 /bin/x
Anonymous:             4 kB
6000-7000 rw-p 00005000 fe:00 77 /bin/x
Anonymous:             0 kB
7000-8000 r--p 00000000 00:00 0 [vvar]
Anonymous:             0 kB
8000-9000 r--s 00000000 00:01 9 /tmp/shared
Anonymous:             0 kB
";
        assert_eq!(unmodified_file_mappings(smaps), [(0x1000, 0x3000), (0x3000, 0x5000)]);
    }

    #[test]
    fn a_process_goes_on_after_it() {
        keep_heap_small();
        merge_what_is_freed();
        let kept: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
        release_unused();
        assert_eq!(kept[999], "999");
        assert_eq!("code and constants are read again".len(), 33);
    }
}
