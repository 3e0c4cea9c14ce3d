//! The program's allocator: the system's, behind a store of freed blocks on the threads that keep one.
//!
//! A thread that serves requests frees what the next request needs again, in the same sizes, a task's state of some
//! kilobytes included. The system's allocator merges and splits blocks of that size each time. Here they wait in a list for each
//! size, which costs a few instructions. Threads that keep no store pay for one look at a thread-local pointer.

// An allocator is unsafe by its nature.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr;

/// The allocator, for `#[global_allocator]`.
#[derive(Debug)]
pub struct Blocks;

/// Sizes differ by this. It is also the alignment of all blocks that are kept.
const STEP: usize = 16;
/// The system's allocator needs this many bytes of its last step for itself: sizes are rounded up to what it would hand out anyway.
const HEADER: usize = 8;
/// Larger blocks are not kept.
const LARGEST: usize = 16 << 10;
const CLASSES: usize = LARGEST / STEP + 1;
/// A store with more bytes than this is emptied.
const MOST: usize = 1 << 20;

/// A block that nobody uses.
struct Free {
    next: *mut Free,
}

/// Free blocks by size.
struct Store {
    classes: [*mut Free; CLASSES],
    bytes: usize,
}

thread_local! {
    static STORE: Cell<*mut Store> = const { Cell::new(ptr::null_mut()) };
}

/// While it lives its thread keeps freed blocks, up to a megabyte.
#[derive(Debug)]
pub struct Keeping {
    /// It belongs to its thread.
    thread: PhantomData<*mut ()>,
}

/// Lets this thread keep the blocks that it frees. Has no effect unless [`Blocks`] is the program's allocator.
pub fn keep() -> Keeping {
    STORE.with(|store| {
        if store.get().is_null() {
            // SAFETY: the layout is not empty; all bytes zero are null pointers and the number 0. Without memory nothing is kept.
            store.set(unsafe { System.alloc_zeroed(Layout::new::<Store>()) }.cast());
        }
    });
    Keeping { thread: PhantomData }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        let store = STORE.replace(ptr::null_mut());
        if !store.is_null() {
            // SAFETY: only this thread knew the store, and does not any more; `keep` allocated it with this layout.
            unsafe {
                (*store).empty();
                System.dealloc(store.cast(), Layout::new::<Store>());
            }
        }
    }
}

/// The size class of a layout, if such blocks are kept.
#[inline]
fn class_of(layout: Layout) -> Option<usize> {
    let kept = layout.align() <= STEP && layout.size() <= LARGEST;
    kept.then(|| layout.size().saturating_sub(HEADER).div_ceil(STEP).max(1))
}

/// What the system is asked for: whoever gets the block later must find all of its class's room.
#[inline]
fn rounded(layout: Layout) -> Layout {
    if layout.align() > STEP {
        return layout;
    }
    let size = class_of(layout).map_or(layout.size(), room);
    // No allocator has the sizes that are not valid here.
    Layout::from_size_align(size, STEP).unwrap_or(layout)
}

const fn room(class: usize) -> usize {
    class * STEP + HEADER
}

impl Store {
    #[inline]
    fn take(&mut self, class: usize) -> Option<*mut u8> {
        let block = self.classes[class];
        if block.is_null() {
            return None;
        }
        // SAFETY: `put` wrote the link into a block that nobody else has.
        self.classes[class] = unsafe { (*block).next };
        self.bytes -= room(class);
        Some(block.cast())
    }

    /// SAFETY: the block must be of this class, and not be used any more.
    #[inline]
    unsafe fn put(&mut self, class: usize, block: *mut u8) {
        if self.bytes >= MOST {
            self.empty();
        }
        let block: *mut Free = block.cast();
        // SAFETY: every class has room and alignment for a link.
        unsafe { (*block).next = self.classes[class] };
        self.classes[class] = block;
        self.bytes += room(class);
    }

    /// Gives all blocks back to the system.
    #[cold]
    fn empty(&mut self) {
        for class in 1..CLASSES {
            while let Some(block) = self.take(class) {
                // SAFETY: blocks of a class were allocated with this layout, see `rounded`.
                unsafe { System.dealloc(block, Layout::from_size_align_unchecked(room(class), STEP)) };
            }
        }
    }
}

/// The thread's store, if it keeps one.
///
/// SAFETY: the reference must be gone before the next call.
#[inline]
unsafe fn store<'a>() -> Option<&'a mut Store> {
    // SAFETY: the pointer is null or what `keep` allocated, and only this thread has it.
    unsafe { STORE.get().as_mut() }
}

// SAFETY: blocks come from the system with the rounded layout, and go back with the same one, which depends on the layout
// alone. In between they may pass through a store, of whichever thread freed them, which hands them out for layouts of the
// same class: those have the same rounded layout.
unsafe impl GlobalAlloc for Blocks {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the reference is gone before anything is allocated; the layout is the caller's promise.
        unsafe {
            if let (Some(store), Some(class)) = (store(), class_of(layout))
                && let Some(block) = store.take(class)
            {
                return block;
            }
            System.alloc(rounded(layout))
        }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller gives up the block, which it got for this layout.
        unsafe {
            match (store(), class_of(layout)) {
                (Some(store), Some(class)) => store.put(class, block),
                _ => System.dealloc(block, rounded(layout)),
            }
        }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`; a block has room for its layout's size.
        unsafe {
            if let (Some(store), Some(class)) = (store(), class_of(layout))
                && let Some(block) = store.take(class)
            {
                block.write_bytes(0, layout.size());
                return block;
            }
            System.alloc_zeroed(rounded(layout))
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size is valid for this alignment.
        let (old, new) = unsafe { (rounded(layout), rounded(Layout::from_size_align_unchecked(size, layout.align()))) };
        if old == new {
            return block;
        }
        // SAFETY: the block is the system's, with that layout. Both alignments are the same.
        unsafe { System.realloc(block, old, new.size()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 8).unwrap()
    }

    #[test]
    fn every_size_has_room_in_its_class() {
        for size in 1..=LARGEST {
            let class = class_of(layout(size)).unwrap();
            assert!(class < CLASSES && room(class) >= size && room(class) < size + STEP + HEADER, "{size}");
            assert_eq!(rounded(layout(size)).size(), room(class));
        }
        assert_eq!(class_of(layout(LARGEST + 1)), None);
        assert_eq!(class_of(Layout::from_size_align(64, 64).unwrap()), None);
    }

    #[test]
    fn a_freed_block_serves_its_whole_class_again() {
        let _keeping = keep();
        // SAFETY: each block is used for its layout and freed once.
        unsafe {
            let first = Blocks.alloc(layout(4000));
            Blocks.dealloc(first, layout(4000));
            let second = Blocks.alloc_zeroed(layout(4008));
            assert_eq!(first, second);
            assert!(std::slice::from_raw_parts(second, 4008).iter().all(|b| *b == 0));
            let other = Blocks.alloc(layout(4008));
            assert_ne!(second, other);
            Blocks.dealloc(other, layout(4008));
            Blocks.dealloc(second, layout(4008));
        }
    }

    #[test]
    fn a_store_is_bounded_and_grown_blocks_keep_their_bytes() {
        let _keeping = keep();
        let blocks: Vec<*mut u8> = (0..3 * MOST / 8192)
            // SAFETY: the layout is not empty.
            .map(|_| unsafe { Blocks.alloc(layout(8192)) })
            .collect();
        // SAFETY: each block is used for its layout and freed once.
        unsafe {
            blocks.into_iter().for_each(|block| Blocks.dealloc(block, layout(8192)));
            assert!(store().unwrap().bytes <= MOST + 8192 + STEP);
            let mut size = 20;
            let mut block = Blocks.alloc(layout(size));
            block.write_bytes(7, size);
            for larger in [24, 25, 2000, LARGEST, LARGEST + 1, 100_000, 300] {
                block = Blocks.realloc(block, layout(size), larger);
                size = larger;
                assert!(std::slice::from_raw_parts(block, 20).iter().all(|b| *b == 7));
            }
            Blocks.dealloc(block, layout(size));
        }
    }

    #[test]
    fn blocks_of_other_threads_are_taken_in() {
        // SAFETY: the block is used for its layout and freed once.
        let address = unsafe { Blocks.alloc(layout(100)) } as usize;
        let thread = std::thread::spawn(move || {
            let _keeping = keep();
            // SAFETY: as above.
            unsafe {
                Blocks.dealloc(address as *mut u8, layout(100));
                let again = Blocks.alloc(layout(100));
                assert_eq!(again as usize, address);
                Blocks.dealloc(again, layout(100));
            }
        });
        thread.join().unwrap();
    }
}
