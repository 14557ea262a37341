//! Moving tensors in and out: any strides and dtype on the outside, float32 in two dense orders on the inside.
//!
//! Owns every access to the caller's memory. All conversions between dtypes happen here.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::api::{DType, Input, Output, Strides};

/// One (batch, head) of a tensor.
#[derive(Clone, Copy)]
pub(crate) struct Plane {
    pub batch: usize,
    pub head: usize,
}

/// Which index of a dense float32 matrix runs fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// `[tokens, channels]`, rows `channels` apart.
    Tokens,
    /// `[channels, stride]`, the first columns of which are tokens.
    Channels { stride: usize },
}

impl Order {
    /// The order that can be copied from or to `strides` line by line.
    pub fn natural(strides: Strides, stride: usize) -> Self {
        if strides.channel != 1 && strides.token == 1 {
            Order::Channels { stride }
        } else {
            Order::Tokens
        }
    }
}

fn offset(s: Strides, p: Plane, token: usize, channel: usize) -> isize {
    p.batch as isize * s.batch
        + p.head as isize * s.head
        + token as isize * s.token
        + channel as isize * s.channel
}

/// Reads tokens `tokens` of a plane into `to`, in `order`.
///
/// # Safety
/// The elements must lie inside the tensor, as `check` has made sure of for every index inside the shape.
#[inline(always)]
pub(crate) unsafe fn gather(
    t: &Input<'_>,
    p: Plane,
    tokens: Range<usize>,
    channels: usize,
    order: Order,
    to: &mut [f32],
) {
    let s = t.strides;
    match order {
        Order::Tokens => {
            for (i, token) in tokens.enumerate() {
                let line = &mut to[i * channels..(i + 1) * channels];
                // SAFETY: the line is `channels` elements from this token on.
                unsafe { read_line(t, offset(s, p, token, 0), s.channel, line) }
            }
        }
        Order::Channels { stride } => {
            for c in 0..channels {
                let line = &mut to[c * stride..c * stride + tokens.len()];
                // SAFETY: the line is these tokens of this channel.
                unsafe { read_line(t, offset(s, p, tokens.start, c), s.token, line) }
            }
        }
    }
}

/// Writes `from`, in `order`, to tokens `tokens` of a plane, rounding to the tensor's dtype.
///
/// # Safety
/// As for [`gather`], and no other task may touch these elements.
#[inline(always)]
pub(crate) unsafe fn scatter(
    t: &Output<'_>,
    p: Plane,
    tokens: Range<usize>,
    channels: usize,
    order: Order,
    from: &[f32],
) {
    let s = t.strides;
    match order {
        Order::Tokens => {
            for (i, token) in tokens.enumerate() {
                let line = &from[i * channels..(i + 1) * channels];
                // SAFETY: the line is `channels` elements from this token on.
                unsafe { write_line(t, offset(s, p, token, 0), s.channel, line) }
            }
        }
        Order::Channels { stride } => {
            for c in 0..channels {
                let line = &from[c * stride..c * stride + tokens.len()];
                // SAFETY: the line is these tokens of this channel.
                unsafe { write_line(t, offset(s, p, tokens.start, c), s.token, line) }
            }
        }
    }
}

/// Reads `to.len()` elements from the `at`-th on, `stride` apart.
///
/// # Safety
/// They must lie inside the tensor.
#[inline(always)]
pub(crate) unsafe fn read_line(t: &Input<'_>, at: isize, stride: isize, to: &mut [f32]) {
    if to.is_empty() {
        return;
    }
    // SAFETY: the caller says that `to.len()` elements from `at`, `stride` apart, can be read.
    unsafe {
        match t.dtype {
            DType::F32 => {
                let p = t.data.cast::<f32>().offset(at);
                if stride == 1 {
                    copy(p, to.as_mut_ptr(), to.len());
                } else {
                    for (i, x) in to.iter_mut().enumerate() {
                        *x = *p.offset(i as isize * stride);
                    }
                }
            }
            DType::F16 => {
                let p = t.data.cast::<f16>().offset(at);
                if stride == 1 {
                    std::slice::from_raw_parts(p, to.len()).convert_to_f32_slice(to);
                } else {
                    for (i, x) in to.iter_mut().enumerate() {
                        *x = (*p.offset(i as isize * stride)).to_f32();
                    }
                }
            }
            DType::BF16 => {
                // A bfloat16 is the upper half of a float32; said this way, the compiler vectorises it.
                let p = t.data.cast::<u16>().offset(at);
                if stride == 1 {
                    let from = std::slice::from_raw_parts(p, to.len());
                    for (x, &bits) in to.iter_mut().zip(from) {
                        *x = f32::from_bits(u32::from(bits) << 16);
                    }
                } else {
                    for (i, x) in to.iter_mut().enumerate() {
                        *x = f32::from_bits(u32::from(*p.offset(i as isize * stride)) << 16);
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn write_line(t: &Output<'_>, at: isize, stride: isize, from: &[f32]) {
    if from.is_empty() {
        return;
    }
    // SAFETY: the caller says that `from.len()` elements from `at`, `stride` apart, are this task's to write. They
    // may be uninitialised, so no reference to them is made.
    unsafe {
        match t.dtype {
            DType::F32 => {
                let p = t.data.cast::<f32>().offset(at);
                if stride == 1 {
                    copy(from.as_ptr(), p, from.len());
                } else {
                    for (i, &x) in from.iter().enumerate() {
                        p.offset(i as isize * stride).write(x);
                    }
                }
            }
            DType::F16 => {
                let p = t.data.cast::<f16>().offset(at);
                let mut part = [f16::ZERO; 64];
                for (i, chunk) in from.chunks(64).enumerate() {
                    let part = &mut part[..chunk.len()];
                    part.convert_from_f32_slice(chunk);
                    write_part(p.offset((i * 64) as isize * stride), stride, part);
                }
            }
            DType::BF16 => {
                let p = t.data.cast::<bf16>().offset(at);
                let mut part = [bf16::ZERO; 64];
                for (i, chunk) in from.chunks(64).enumerate() {
                    let part = &mut part[..chunk.len()];
                    for (y, &x) in part.iter_mut().zip(chunk) {
                        *y = round_bf16(x);
                    }
                    write_part(p.offset((i * 64) as isize * stride), stride, part);
                }
            }
        }
    }
}

/// Copies `n` floats. Lines are short and many: the call that a `memcpy` is would cost as much again.
#[inline(always)]
unsafe fn copy(from: *const f32, to: *mut f32, n: usize) {
    const STEP: usize = 8;
    // SAFETY: the caller says that n floats can be read and written; a last, ragged step overlaps the one before.
    unsafe {
        let step = |at: usize| {
            let x = from.add(at).cast::<[f32; STEP]>().read_unaligned();
            to.add(at).cast::<[f32; STEP]>().write_unaligned(x);
        };
        if n < STEP {
            for i in 0..n {
                *to.add(i) = *from.add(i);
            }
            return;
        }
        for at in (0..n - STEP + 1).step_by(STEP) {
            step(at);
        }
        if !n.is_multiple_of(STEP) {
            step(n - STEP);
        }
    }
}

/// Nearest bfloat16, ties to even; without branches, so that it vectorises.
#[inline(always)]
fn round_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let nan = bits >> 16 | 0x40;
    bf16::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 {
        nan
    } else {
        rounded
    } as u16)
}

#[inline(always)]
unsafe fn write_part<T: Copy>(p: *mut T, stride: isize, part: &[T]) {
    // SAFETY: as in `write_line`.
    unsafe {
        if stride == 1 {
            p.copy_from_nonoverlapping(part.as_ptr(), part.len());
        } else {
            for (i, &x) in part.iter().enumerate() {
                p.offset(i as isize * stride).write(x);
            }
        }
    }
}

/// `to[j][i] = from[i][j]` for i < rows, j < columns; rows of `from` are `from_stride` apart, of `to` `to_stride`.
///
/// Walks along the rows of `from` if `READS`, else along those of `to`: whichever is far away in memory.
///
/// # Safety
/// Those elements must be readable and writable, and the two matrices must not overlap.
#[inline(always)]
pub(crate) unsafe fn transpose<const READS: bool>(
    from: *const f32,
    from_stride: isize,
    to: *mut f32,
    to_stride: isize,
    rows: usize,
    columns: usize,
) {
    let (outer, inner) = if READS {
        (rows, columns)
    } else {
        (columns, rows)
    };
    let (outer4, inner4) = (outer / 4 * 4, inner / 4 * 4);
    for a in (0..outer4).step_by(4) {
        for b in (0..inner4).step_by(4) {
            let (i, j) = if READS { (a, b) } else { (b, a) };
            let from = from.wrapping_offset(i as isize * from_stride + j as isize);
            let to = to.wrapping_offset(j as isize * to_stride + i as isize);
            // SAFETY: i + 3 < rows and j + 3 < columns.
            unsafe { transpose_4x4(from, from_stride, to, to_stride) }
        }
    }
    for a in 0..outer {
        let ragged = if a < outer4 { inner4 } else { 0 };
        for b in ragged..inner {
            let (i, j) = if READS { (a, b) } else { (b, a) };
            let from = from.wrapping_offset(i as isize * from_stride + j as isize);
            let to = to.wrapping_offset(j as isize * to_stride + i as isize);
            // SAFETY: i < rows and j < columns.
            unsafe { *to = *from }
        }
    }
}

/// Left to itself the compiler moves the 16 elements one by one.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose_4x4(from: *const f32, from_stride: isize, to: *mut f32, to_stride: isize) {
    use std::arch::x86_64::{
        _mm_loadu_ps, _mm_movehl_ps, _mm_movelh_ps, _mm_storeu_ps, _mm_unpackhi_ps, _mm_unpacklo_ps,
    };
    // SAFETY: SSE is part of x86-64; the caller says that 4 × 4 elements can be read and written.
    unsafe {
        let row = |i: isize| _mm_loadu_ps(from.offset(i * from_stride));
        let (a, b, c, d) = (row(0), row(1), row(2), row(3));
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        _mm_storeu_ps(to, _mm_movelh_ps(ab, cd));
        _mm_storeu_ps(to.offset(to_stride), _mm_movehl_ps(cd, ab));
        _mm_storeu_ps(to.offset(2 * to_stride), _mm_movelh_ps(ab_high, cd_high));
        _mm_storeu_ps(to.offset(3 * to_stride), _mm_movehl_ps(cd_high, ab_high));
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
unsafe fn transpose_4x4(from: *const f32, from_stride: isize, to: *mut f32, to_stride: isize) {
    for i in 0..4 {
        for j in 0..4 {
            // SAFETY: the caller says that 4 × 4 elements can be read and written.
            unsafe { *to.offset(j * to_stride + i) = *from.offset(i * from_stride + j) }
        }
    }
}

/// Reads tokens `tokens` of a plane into `to`, `[channels, stride]`, whatever the tensor's layout.
///
/// # Safety
/// As for [`gather`]; `rows` must hold `[tokens, channels]`.
#[inline(always)]
pub(crate) unsafe fn gather_channels(
    t: &Input<'_>,
    p: Plane,
    tokens: Range<usize>,
    channels: usize,
    stride: usize,
    to: &mut [f32],
    rows: &mut [f32],
) {
    let n = tokens.len();
    assert!(channels == 0 || (n <= stride && (channels - 1) * stride + n <= to.len()));
    // SAFETY: the caller says that the elements are readable; `to` was compared above.
    unsafe {
        match Order::natural(t.strides, stride) {
            Order::Tokens if t.dtype == DType::F32 && t.strides.channel == 1 => {
                let from = t
                    .data
                    .cast::<f32>()
                    .offset(offset(t.strides, p, tokens.start, 0));
                transpose::<true>(
                    from,
                    t.strides.token,
                    to.as_mut_ptr(),
                    stride as isize,
                    n,
                    channels,
                );
            }
            Order::Tokens => {
                gather(t, p, tokens, channels, Order::Tokens, rows);
                let from = rows[..n * channels].as_ptr();
                transpose::<true>(
                    from,
                    channels as isize,
                    to.as_mut_ptr(),
                    stride as isize,
                    n,
                    channels,
                );
            }
            order => gather(t, p, tokens, channels, order, to),
        }
    }
}

/// Writes `from`, `[channels, stride]`, to tokens `tokens` of a plane, whatever the tensor's layout.
///
/// # Safety
/// As for [`scatter`]; `rows` must hold `[tokens, channels]`.
#[inline(always)]
pub(crate) unsafe fn scatter_channels(
    t: &Output<'_>,
    p: Plane,
    tokens: Range<usize>,
    channels: usize,
    stride: usize,
    from: &[f32],
    rows: &mut [f32],
) {
    let n = tokens.len();
    assert!(channels == 0 || (n <= stride && (channels - 1) * stride + n <= from.len()));
    // SAFETY: the caller says that the elements are this task's to write; `from` was compared above.
    unsafe {
        match Order::natural(t.strides, stride) {
            Order::Tokens if t.dtype == DType::F32 && t.strides.channel == 1 => {
                let to = t
                    .data
                    .cast::<f32>()
                    .offset(offset(t.strides, p, tokens.start, 0));
                transpose::<false>(
                    from.as_ptr(),
                    stride as isize,
                    to,
                    t.strides.token,
                    channels,
                    n,
                );
            }
            Order::Tokens => {
                let to = rows[..n * channels].as_mut_ptr();
                transpose::<false>(
                    from.as_ptr(),
                    stride as isize,
                    to,
                    channels as isize,
                    channels,
                    n,
                );
                scatter(t, p, tokens, channels, Order::Tokens, rows);
            }
            order => scatter(t, p, tokens, channels, order, from),
        }
    }
}

/// Asks for the memory of coming tokens a token at a time, while something else is computed.
pub(crate) struct Ahead {
    next: *const u8,
    token: isize,
    bytes: isize,
    left: usize,
}

impl Ahead {
    /// Of tokens `tokens` of a plane. Layouts whose channels are not neighbours are left to the hardware.
    pub fn new(t: &Input<'_>, p: Plane, tokens: Range<usize>, channels: usize) -> Self {
        let size = t.dtype.size() as isize;
        let at = offset(t.strides, p, tokens.start, 0) * size;
        Ahead {
            next: t.data.wrapping_offset(at),
            token: t.strides.token * size,
            bytes: channels as isize * size,
            left: if t.strides.channel == 1 {
                tokens.len()
            } else {
                0
            },
        }
    }

    /// Of `count` lines of `bytes`, the first at `next`, `distance` bytes apart.
    pub fn lines(next: *const u8, distance: isize, bytes: isize, count: usize) -> Self {
        Ahead {
            next,
            token: distance,
            bytes,
            left: count,
        }
    }

    /// Of an output, which is written.
    pub fn output(t: &Output<'_>, p: Plane, tokens: Range<usize>, channels: usize) -> Self {
        // SAFETY: nothing is read through this input, only asked for.
        let t = unsafe { Input::from_raw(t.data, t.dtype, t.strides) };
        Self::new(&t, p, tokens, channels)
    }

    pub fn nothing() -> Self {
        Ahead {
            next: std::ptr::null(),
            token: 0,
            bytes: 0,
            left: 0,
        }
    }

    /// Tokens not yet asked for.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Asks for all of it now.
    #[inline(always)]
    pub fn all(mut self) {
        while self.step() {}
    }

    /// Asks for one more token; says whether there was one.
    #[inline(always)]
    pub fn step(&mut self) -> bool {
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        #[cfg(target_arch = "x86_64")]
        for at in (0..self.bytes).step_by(64) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: a prefetch is allowed on any address; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.next.wrapping_offset(at).cast()) }
        }
        self.next = self.next.wrapping_offset(self.token);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bfloat16_rounds_like_the_half_crate() {
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                assert_eq!(
                    round_bf16(x).to_bits(),
                    bf16::from_f32(x).to_bits(),
                    "{:08x}",
                    x.to_bits()
                );
            }
        }
    }

    #[test]
    fn transposition_of_ragged_matrices() {
        for rows in 0..10 {
            for columns in 0..10 {
                let (from_stride, to_stride) = (columns + 3, rows + 2);
                let from: Vec<f32> = (0..rows * from_stride).map(|i| i as f32).collect();
                for reads in [false, true] {
                    let mut to = vec![-1f32; columns * to_stride];
                    // SAFETY: both matrices are inside their vectors.
                    unsafe {
                        let (f, t) = (from.as_ptr(), to.as_mut_ptr());
                        let (fs, ts) = (from_stride as isize, to_stride as isize);
                        if reads {
                            transpose::<true>(f, fs, t, ts, rows, columns);
                        } else {
                            transpose::<false>(f, fs, t, ts, rows, columns);
                        }
                    }
                    for (at, &x) in to.iter().enumerate() {
                        let (j, i) = (at / to_stride, at % to_stride);
                        let want = if i < rows {
                            from[i * from_stride + j]
                        } else {
                            -1.0
                        };
                        assert_eq!(x, want, "{rows} x {columns}: [{i}, {j}]");
                    }
                }
            }
        }
    }
}
