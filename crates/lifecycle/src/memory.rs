//! Giving back memory that is not in use.
//!
//! Every role is the same large program, and a start runs through much more of it than serving does: flags, YAML,
//! certificates, the first configuration. The kernel maps what was touched, and sixteen pages around each touch, and
//! counts it as resident until somebody else needs the memory. The pages are the page cache's, so letting go of them
//! costs nothing but a minor fault for each that is needed again.

// Dropping pages and trimming the heap have no safe interface.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

/// Takes the program's own code and constants out of the resident set, and returns free heap to the kernel. What is
/// in use comes back by itself, page by page.
///
/// Worth calling when a process has started and settles down to serve, and now and then after that; it takes about a
/// millisecond. Does nothing where `/proc` cannot be read.
pub fn release_unused() {
    // The heap first: trimming runs code, too.
    trim_heap();
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    let Ok(pages) = File::open("/proc/self/pagemap") else { return };
    for (start, end) in maps.lines().filter_map(file_mapping).filter(|range| is_unmodified(&pages, *range)) {
        // SAFETY: the range is a mapping of this process's own, it is not writable and none of its pages was ever
        // written (relocated data is, and code with a debugger's breakpoint: it is anonymous, and such mappings are left out).
        // The kernel reads a dropped page from the same file again, so no value that anybody can see changes.
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

/// A line of `/proc/self/maps` that is a read-only private mapping of a file: its addresses from and to.
fn file_mapping(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let range = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let permissions = words.next()?;
    let inode = words.nth(2)?;
    let ours = permissions.starts_with('r') && !permissions.contains('w') && permissions.ends_with('p') && inode != "0";
    ours.then_some(range)
}

/// Whether every page of the mapping that is in memory is the file's own (Linux `Documentation/admin-guide/mm/pagemap.rst`: eight
/// bytes a page). Cheaper by far than what `smaps` adds up. `false` when it cannot be told.
fn is_unmodified(pages: &File, (start, end): (usize, usize)) -> bool {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;
    // SAFETY: asks for a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let Ok(page @ 1..) = usize::try_from(page) else { return false };
    let mut at = start / page * 8;
    let last = end / page * 8;
    let mut buffer = [0; 4096];
    while at < last {
        let wanted = buffer.len().min(last - at);
        let Ok(n @ 8..) = pages.read_at(&mut buffer[..wanted], at as u64) else { return false };
        let own = |entry: u64| entry & SWAPPED == 0 && (entry & PRESENT == 0 || entry & OF_FILE != 0);
        let (entries, _) = buffer[..n].as_chunks::<8>();
        if !entries.iter().all(|entry| own(u64::from_ne_bytes(*entry))) {
            return false;
        }
        at += n / 8 * 8;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn only_read_only_files_are_meant() {
        let of = |line| file_mapping(line);
        assert_eq!(of("1000-3000 r--p 00000000 fe:00 77 /bin/x"), Some((0x1000, 0x3000)));
        assert_eq!(of("3000-5000 r-xp 00002000 fe:00 77 /bin/x"), Some((0x3000, 0x5000)));
        assert_eq!(of("6000-7000 rw-p 00005000 fe:00 77 /bin/x"), None);
        assert_eq!(of("7000-8000 r--p 00000000 00:00 0 [vvar]"), None);
        assert_eq!(of("8000-9000 r--s 00000000 00:01 9 /tmp/shared"), None);
    }

    /// A private page of a file is the file's until it is written, and stays the process's own when it can only be read again.
    #[test]
    fn written_pages_are_seen() {
        let page = 4096;
        let file = File::open("/proc/self/exe").unwrap();
        let pages = File::open("/proc/self/pagemap").unwrap();
        // SAFETY: a new mapping of three pages, private to this test, whose second is written and which is unmapped at the end.
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let at = libc::mmap(std::ptr::null_mut(), 3 * page, protection, libc::MAP_PRIVATE, file.as_raw_fd(), 0);
            assert_ne!(at, libc::MAP_FAILED);
            let bytes = at.cast::<u8>();
            let range = (at as usize, at as usize + 3 * page);
            let _ = bytes.read_volatile();
            assert!(is_unmodified(&pages, range));
            bytes.add(page).write_volatile(7);
            libc::mprotect(at, 3 * page, libc::PROT_READ);
            assert!(!is_unmodified(&pages, range));
            assert!(is_unmodified(&pages, (range.0, range.0 + page)));
            libc::munmap(at, 3 * page);
        }
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
