//! Words of host memory that kernels can set: "a number was not finite".
//!
//! They are pinned and mapped, so reporting costs a kernel nothing unless there is something to report, and asking costs
//! no copy. A word is used again only when the kernels that may set it are done.

use std::ptr::null_mut;

use super::driver::{CudaError, Event, driver};

/// The words of one device.
#[derive(Debug, Default)]
pub(super) struct Flags {
    free: Vec<Word>,
    /// Words that kernels may still set, until the moment.
    retired: Vec<(Event, Word)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word(*mut u32);

// SAFETY: pinned memory that is never freed; accesses are volatile and ordered by events.
unsafe impl Send for Word {}
// SAFETY: as above.
unsafe impl Sync for Word {}

/// Words of one allocation.
const SLAB: usize = 1024;

impl Flags {
    /// A word that is 0. Needs a current context.
    pub fn take(&mut self) -> Result<Word, CudaError> {
        let mut i = 0;
        while i < self.retired.len() {
            if self.retired[i].0.is_past() {
                self.free.push(self.retired.swap_remove(i).1);
            } else {
                i += 1;
            }
        }
        if self.free.is_empty() {
            let mut slab = null_mut();
            // SAFETY: a place for the answer. 2: CU_MEMHOSTALLOC_DEVICEMAP.
            unsafe { driver!(cuMemHostAlloc(&mut slab, SLAB * 4, 2))? };
            let slab = slab.cast::<u32>();
            // SAFETY: the slab has `SLAB` words.
            self.free
                .extend((0..SLAB).map(|i| Word(unsafe { slab.add(i) })));
        }
        let word = self.free.pop().expect("there are free words");
        // SAFETY: a word of the slab that no kernel sets any more.
        unsafe { word.0.write_volatile(0) };
        Ok(word)
    }

    /// Gives a word back; kernels may set it until `event`.
    pub fn give_back(&mut self, word: Word, event: Event) {
        self.retired.push((event, word));
    }
}

impl Word {
    /// Where kernels write. With unified addressing (every 64-bit system) the host's address is the device's.
    pub fn address(self) -> *mut u32 {
        self.0
    }

    pub fn is_set(self) -> bool {
        // SAFETY: a word of a slab that is never freed.
        unsafe { self.0.read_volatile() != 0 }
    }
}
