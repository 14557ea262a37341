//! Lines of tensors as pairs of bfloat16, the first of a pair in the low half of a 32-bit word.
//!
//! Owns how they are rounded and interleaved. Float16 has three bits more, which are rounded to nearest. Contiguous
//! elements are read with AVX-512, which took 15 % off a band's time in float16; the rest is for everything else.

use super::isa::{Backend, Native};
use super::load_store::{read_line, round_bf16};
use crate::tensor::{DType, Input};

/// Elements at a time.
const CHUNK: usize = 64;

/// Reads `n` elements from the `at`-th on, `stride` apart, two adjacent elements to a word; beside an odd last one is 0.
///
/// # Safety
/// They must lie inside the tensor.
#[inline(always)]
pub(crate) unsafe fn pack_adjacent(
    t: &Input<'_>,
    at: isize,
    stride: isize,
    n: usize,
    to: &mut [f32],
) {
    let to = &mut to[..n.div_ceil(2)];
    if is_native(t, stride) {
        let from = t.data.cast::<u16>().wrapping_offset(at);
        // SAFETY: promised by the caller, or just asked; `to` holds a word for every two elements.
        unsafe { Native::pack_adjacent(from, t.dtype == DType::F16, n, to.as_mut_ptr()) };
        return;
    }
    let mut bits = [0; CHUNK];
    for (i, words) in to.chunks_mut(CHUNK / 2).enumerate() {
        let first = i * CHUNK;
        let len = CHUNK.min(n - first);
        // SAFETY: a part of the line that the caller speaks of.
        unsafe { read(t, at + first as isize * stride, stride, &mut bits[..len]) };
        bits[len..].fill(0);
        for (word, pair) in words.iter_mut().zip(bits.as_chunks().0) {
            *word = pack_pair(*pair);
        }
    }
}

/// Reads two lines, an element of each to a word: `to.len()` elements each, from the `first`-th and the `second`-th on,
/// `stride` apart. Without a second line there is 0 beside the first.
///
/// # Safety
/// They must lie inside the tensor.
#[inline(always)]
pub(crate) unsafe fn pack_interleaved(
    t: &Input<'_>,
    first: isize,
    second: Option<isize>,
    stride: isize,
    to: &mut [f32],
) {
    if is_native(t, stride) {
        let line = |at: isize| t.data.cast::<u16>().wrapping_offset(at);
        let (first, second, is_f16) = (line(first), second.map(line), t.dtype == DType::F16);
        // SAFETY: promised by the caller, or just asked; `to` holds a word for every element.
        unsafe { Native::pack_interleaved(first, second, is_f16, to.len(), to.as_mut_ptr()) };
        return;
    }
    let mut bits = [[0; CHUNK]; 2];
    for (i, words) in to.chunks_mut(CHUNK).enumerate() {
        let skip = (i * CHUNK) as isize * stride;
        let [low, high] = &mut bits;
        let (low, high) = (&mut low[..words.len()], &mut high[..words.len()]);
        // SAFETY: parts of the lines that the caller speaks of.
        unsafe {
            read(t, first + skip, stride, low);
            if let Some(second) = second {
                read(t, second + skip, stride, high);
            }
        }
        for (i, word) in words.iter_mut().enumerate() {
            *word = pack_pair([low[i], high[i]]);
        }
    }
}

#[inline(always)]
fn pack_pair([low, high]: [u16; 2]) -> f32 {
    f32::from_bits(u32::from(low) | u32::from(high) << 16)
}

/// The bits of at most [`CHUNK`] elements, rounded to bfloat16.
///
/// # Safety
/// They must lie inside the tensor.
#[inline(always)]
unsafe fn read(t: &Input<'_>, at: isize, stride: isize, to: &mut [u16]) {
    if t.dtype == DType::BF16 {
        let p = t.data.cast::<u16>().wrapping_offset(at);
        // SAFETY (both): promised by the caller.
        if stride == 1 {
            unsafe { p.copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) }
        } else {
            for (i, x) in to.iter_mut().enumerate() {
                *x = unsafe { *p.offset(i as isize * stride) };
            }
        }
        return;
    }
    let mut line = [0f32; CHUNK];
    let line = &mut line[..to.len()];
    // SAFETY: promised by the caller.
    unsafe { read_line(t, at, stride, line) };
    for (x, y) in to.iter_mut().zip(line) {
        *x = round_bf16(*y).to_bits();
    }
}

/// Whether these elements can be packed by the instruction set's own functions.
fn is_native(t: &Input<'_>, stride: isize) -> bool {
    stride == 1 && t.dtype != DType::F32 && Native::packs_bf16()
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::tensor::{Element, Strides};

    /// Every length around a chunk and stride, against the half crate's rounding.
    fn lines<T: Element>() {
        let data: Vec<T> = (0..1000)
            .map(|i| T::from_f32(i as f32 * 0.37 - 99.0))
            .collect();
        let t = Input::from_slice(&data, Strides::default());
        let bits = |at: usize| u32::from(bf16::from_f32(data[at].to_f32()).to_bits());
        let words = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits()).collect() };
        for stride in [1, 3] {
            for n in [0, 1, 2, 7, 63, 64, 65, 128, 131] {
                // A word more, which nobody may touch.
                let mut guarded = vec![f32::NAN; n + 1];
                let to = &mut guarded[..n];
                // SAFETY (all): 10 + 131 · 3 and 500 + 131 · 3 are below 1000.
                unsafe { pack_adjacent(&t, 10, stride as isize, n, to) };
                let want: Vec<u32> = (0..n.div_ceil(2))
                    .map(|i| {
                        let high = 2 * i + 1;
                        let high = if high < n {
                            bits(10 + high * stride)
                        } else {
                            0
                        };
                        bits(10 + 2 * i * stride) | high << 16
                    })
                    .collect();
                assert_eq!(words(&to[..n.div_ceil(2)]), want);
                assert!(to[n.div_ceil(2)..].iter().all(|x| x.is_nan()));
                unsafe { pack_interleaved(&t, 10, Some(500), stride as isize, to) };
                let want = |i: usize| bits(10 + i * stride) | bits(500 + i * stride) << 16;
                assert_eq!(words(to), (0..n).map(want).collect::<Vec<_>>());
                unsafe { pack_interleaved(&t, 10, None, stride as isize, to) };
                let want = |i: usize| bits(10 + i * stride);
                assert_eq!(words(to), (0..n).map(want).collect::<Vec<_>>());
                assert!(guarded[n].is_nan());
            }
        }
    }

    #[test]
    fn lines_become_pairs() {
        lines::<bf16>();
        lines::<f16>();
    }
}
