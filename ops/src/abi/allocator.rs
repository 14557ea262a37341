//! The library's memory: the system's, and a reserve for what is small while the system has none.
//!
//! Rust ends the process when memory for a string or a short list is refused. Here such a request is served from the
//! reserve instead, so that a run can end in a status. Owns no policy beyond that: who asks for much asks fallibly
//! (`try_reserve`), gets nothing from here, and says so; operators look at [`is_short`] before they begin.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

use super::error::{Code, Error};

/// Requests are rounded up to this, and aligned to it at most.
const CELL: usize = 128;

/// Half of it is for operators that begin while it is in use, half for what is at work by then: 128 threads, at the
/// 16 KiB that a task of attention takes for its lists. In pages that are never touched unless they are needed.
const CELLS: usize = (4 << 20) / CELL;

/// From this size on requests are not served. Whatever grows with a model is asked for fallibly, or stays below.
const LARGE: usize = 16 << 10;

/// What the system has to have before an operator begins although the reserve is in use.
const PROBE: usize = 64 << 10;

static RESERVE: Reserve = Reserve::new();

#[global_allocator]
static ALLOCATOR: EmergencyAllocator = EmergencyAllocator;

/// Whether the reserve is needed now: it is in use, and either half of it is gone or the system still has no memory.
///
/// What outlives a shortage in the reserve does not matter once the system has memory again.
pub(crate) fn is_short() -> bool {
    let used = RESERVE.used();
    used != 0 && (used > CELL * CELLS / 2 || Vec::<u8>::new().try_reserve_exact(PROBE).is_err())
}

/// Refuses to begin while the reserve is needed by what has begun.
pub(crate) fn check() -> Result<(), Error> {
    if is_short() {
        return Err(no_memory(RESERVE.used()));
    }
    Ok(())
}

#[cold]
fn no_memory(used: usize) -> Error {
    Error::new(
        Code::RuntimeException,
        format!(
            "no memory: the system refused a small allocation, and {used} bytes of the reserve of {} are in use; \
             give the process more memory, run fewer requests at once, or lower DITFASTATTN_CACHE_BYTES",
            CELL * CELLS
        ),
    )
}

/// Whether memory came from the reserve. What is to stay should not.
pub(crate) fn is_reserved<T>(memory: &[T]) -> bool {
    RESERVE.owns(memory.as_ptr().cast())
}

/// Asks the system for large pages where memory begins that nobody has touched yet. Its first write to a small page is a fault
/// of a microsecond, which for a residual of 67 MB was 3 % of the full step that captures it.
///
/// A hint: where the system does not take it, nothing changes.
pub(crate) fn in_large_pages<T>(memory: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 2 << 20;
        let bytes = memory.as_ptr_range();
        let first = (bytes.start as usize).next_multiple_of(PAGE);
        let end = bytes.end as usize / PAGE * PAGE;
        if first < end {
            let at = memory
                .as_ptr()
                .cast::<u8>()
                .wrapping_add(first - bytes.start as usize);
            // SAFETY: whole pages inside a slice that lives; the hint does not change what is in them.
            unsafe { libc::madvise(at.cast_mut().cast(), end - first, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// Bytes of the reserve in use.
pub(crate) fn reserve_used() -> usize {
    RESERVE.used()
}

/// The system's memory, and the reserve behind it.
struct EmergencyAllocator;

// SAFETY: memory is the system's, or cells of the reserve that belong to nobody else, and goes back to where it is from.
// Nothing here panics.
unsafe impl GlobalAlloc for EmergencyAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let memory = unsafe { System.alloc(layout) };
        if memory.is_null() {
            return RESERVE.take(layout);
        }
        memory
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let memory = unsafe { System.alloc_zeroed(layout) };
        if memory.is_null() {
            let memory = RESERVE.take(layout);
            if !memory.is_null() {
                // SAFETY: just taken, of that size.
                unsafe { memory.write_bytes(0, layout.size()) };
            }
            return memory;
        }
        memory
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if RESERVE.owns(memory) {
            RESERVE.give(memory, layout);
        } else {
            // SAFETY: the caller's promise, and it is not of the reserve.
            unsafe { System.dealloc(memory, layout) };
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !RESERVE.owns(memory) {
            // SAFETY: the caller's promise, and it is not of the reserve.
            let grown = unsafe { System.realloc(memory, layout, size) };
            if !grown.is_null() {
                return grown;
            }
        }
        // SAFETY: the caller promises a size that is valid with this alignment.
        let layout_after = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: not of size 0, by the caller's promise. From the system if it has memory: what grows leaves the reserve.
        let moved = unsafe { self.alloc(layout_after) };
        if !moved.is_null() {
            // SAFETY: both have that many bytes, and the new one is nobody else's; the old one goes once.
            unsafe {
                std::ptr::copy_nonoverlapping(memory, moved, layout.size().min(size));
                self.dealloc(memory, layout);
            }
        }
        moved
    }
}

/// Memory that is always there, in cells of which requests take as many in a row as they need.
struct Reserve {
    /// A lock that takes no memory itself, held for one search.
    locked: AtomicBool,
    used: AtomicUsize,
    /// Whether each cell is taken; changed under the lock.
    taken: [AtomicU8; CELLS],
    cells: UnsafeCell<Slab>,
}

#[repr(C, align(128))]
struct Slab([[u8; CELL]; CELLS]);

const _: () = assert!(align_of::<Slab>() == CELL);

// SAFETY: the cells are only reached through pointers that `take` hands to one owner at a time.
unsafe impl Sync for Reserve {}

impl Reserve {
    const fn new() -> Self {
        Reserve {
            locked: AtomicBool::new(false),
            used: AtomicUsize::new(0),
            taken: [const { AtomicU8::new(0) }; CELLS],
            cells: UnsafeCell::new(Slab([[0; CELL]; CELLS])),
        }
    }

    fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn start(&self) -> *mut u8 {
        self.cells.get().cast()
    }

    fn owns(&self, memory: *const u8) -> bool {
        (memory as usize).wrapping_sub(self.start() as usize) < CELL * CELLS
    }

    /// Null if the request is too large, or the reserve is used up.
    #[cold]
    fn take(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= LARGE || layout.align() > CELL {
            return std::ptr::null_mut();
        }
        let count = layout.size().div_ceil(CELL).max(1);
        let found = self.locked(|| {
            let mut free = 0;
            for (index, cell) in self.taken.iter().enumerate() {
                free = if cell.load(Ordering::Relaxed) == 0 {
                    free + 1
                } else {
                    0
                };
                if free == count {
                    let first = index + 1 - count;
                    self.mark(first, count, 1);
                    return Some(first);
                }
            }
            None
        });
        let Some(first) = found else {
            return std::ptr::null_mut();
        };
        self.used.fetch_add(count * CELL, Ordering::Relaxed);
        self.start().wrapping_add(first * CELL)
    }

    /// `memory` was taken with the same layout.
    #[cold]
    fn give(&self, memory: *mut u8, layout: Layout) {
        let first = (memory as usize).wrapping_sub(self.start() as usize) / CELL;
        let count = layout.size().div_ceil(CELL).max(1);
        self.locked(|| self.mark(first, count, 0));
        self.used.fetch_sub(count * CELL, Ordering::Relaxed);
    }

    fn mark(&self, first: usize, count: usize, value: u8) {
        for cell in self.taken.iter().skip(first).take(count) {
            cell.store(value, Ordering::Relaxed);
        }
    }

    fn locked<R>(&self, f: impl FnOnce() -> R) -> R {
        while self.locked.swap(true, Ordering::Acquire) {
            std::hint::spin_loop();
        }
        let result = f();
        self.locked.store(false, Ordering::Release);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 8).expect("a layout")
    }

    #[test]
    fn cells_are_lent_once_and_come_back() {
        static RESERVE: Reserve = Reserve::new();
        let reserve = &RESERVE;
        let sizes = [1, CELL, CELL + 1, LARGE - 1];
        let mut lent: Vec<_> = sizes.map(|size| (reserve.take(layout(size)), size)).into();
        assert!(reserve.take(layout(LARGE)).is_null());
        assert!(
            reserve
                .take(Layout::from_size_align(8, 2 * CELL).expect("a layout"))
                .is_null()
        );
        while let memory = reserve.take(layout(3 * CELL))
            && !memory.is_null()
        {
            lent.push((memory, 3 * CELL));
        }
        let mut places: Vec<_> = lent
            .iter()
            .map(|(memory, size)| (*memory as usize, *memory as usize + size))
            .collect();
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        assert!(places.iter().all(|(start, _)| start % CELL == 0));
        let end = reserve.start() as usize + CELL * CELLS;
        assert!(reserve.owns(reserve.start()) && !reserve.owns(end as *const u8));
        assert!(places.iter().all(|(_, last)| *last <= end));
        assert!(reserve.used() > CELL * CELLS - 3 * CELL);

        for (memory, size) in lent {
            reserve.give(memory, layout(size));
        }
        assert_eq!(reserve.used(), 0);
        // In one piece again.
        let all: Vec<_> = (0..CELL * CELLS / LARGE)
            .map(|_| reserve.take(layout(LARGE - 1)))
            .collect();
        assert!(all.iter().all(|memory| !memory.is_null()));
        assert!(reserve.take(layout(1)).is_null());
    }

    #[test]
    fn threads_never_share_a_cell() {
        static RESERVE: Reserve = Reserve::new();
        let reserve = &RESERVE;
        std::thread::scope(|scope| {
            let threads = [0u8, 1, 2, 3].map(|thread| {
                scope.spawn(move || {
                    for round in 0..500 {
                        let size = 1 + (round * 37 + usize::from(thread) * 101) % 700;
                        let memory = reserve.take(layout(size));
                        assert!(!memory.is_null());
                        // SAFETY: just taken, of that size.
                        unsafe { memory.write_bytes(thread, size) };
                        std::thread::yield_now();
                        // SAFETY: written above, and nobody else's.
                        let bytes = unsafe { std::slice::from_raw_parts(memory, size) };
                        assert!(bytes.iter().all(|&byte| byte == thread));
                        reserve.give(memory, layout(size));
                    }
                })
            });
            for thread in threads {
                thread.join().expect("no panic");
            }
        });
        assert_eq!(reserve.used(), 0);
    }
}
