//! Loads and stores of tensors: any strides and dtype on the outside, float32 in two dense layouts on the inside.
//!
//! Owns every access to the caller's memory. All conversions between dtypes happen here.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::Simd;

use super::transpose::transpose;

use crate::tensor::{DType, Input, Output, Strides};

/// One (batch, head) of a tensor: a matrix of tokens and channels.
#[derive(Clone, Copy)]
pub(crate) struct BatchHead {
    pub batch: usize,
    pub head: usize,
}

/// Which index of a dense float32 matrix runs fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[tokens, channels]`, rows `channels` apart.
    RowMajor,
    /// `[channels, stride]`, the first columns of which are tokens.
    ColMajor { stride: usize },
}

impl Layout {
    /// The layout that can be copied from or to `strides` line by line.
    pub fn natural(strides: Strides, stride: usize) -> Self {
        if strides.channel != 1 && strides.token == 1 {
            Layout::ColMajor { stride }
        } else {
            Layout::RowMajor
        }
    }
}

pub(crate) fn offset(s: Strides, p: BatchHead, token: usize, channel: usize) -> isize {
    p.batch as isize * s.batch
        + p.head as isize * s.head
        + token as isize * s.token
        + channel as isize * s.channel
}

/// Reads tokens `tokens` of a (batch, head) into `to`, in `layout`.
///
/// # Safety
/// The elements must lie inside the tensor, as `check` has made sure of for every index inside the shape.
#[inline(always)]
pub(crate) unsafe fn gather(
    t: &Input<'_>,
    p: BatchHead,
    tokens: Range<usize>,
    channels: usize,
    layout: Layout,
    to: &mut [f32],
) {
    let s = t.strides;
    match layout {
        Layout::RowMajor => {
            for (i, token) in tokens.enumerate() {
                let line = &mut to[i * channels..(i + 1) * channels];
                // SAFETY: the line is `channels` elements from this token on.
                unsafe { read_line(t, offset(s, p, token, 0), s.channel, line) }
            }
        }
        Layout::ColMajor { stride } => {
            for c in 0..channels {
                let line = &mut to[c * stride..c * stride + tokens.len()];
                // SAFETY: the line is these tokens of this channel.
                unsafe { read_line(t, offset(s, p, tokens.start, c), s.token, line) }
            }
        }
    }
}

/// Writes `from`, in `layout`, to tokens `tokens` of a (batch, head), rounding to the tensor's dtype.
///
/// # Safety
/// As for [`gather`], and no other task may touch these elements.
#[inline(always)]
pub(crate) unsafe fn scatter(
    t: &Output<'_>,
    p: BatchHead,
    tokens: Range<usize>,
    channels: usize,
    layout: Layout,
    from: &[f32],
) {
    let s = t.strides;
    match layout {
        Layout::RowMajor => {
            for (i, token) in tokens.enumerate() {
                let line = &from[i * channels..(i + 1) * channels];
                // SAFETY: the line is `channels` elements from this token on.
                unsafe { write_line(t, offset(s, p, token, 0), s.channel, line) }
            }
        }
        Layout::ColMajor { stride } => {
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
pub(crate) fn round_bf16(x: f32) -> bf16 {
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

/// Reads tokens `tokens` of a (batch, head) into `to`, `[channels, stride]`, whatever the tensor's layout.
///
/// # Safety
/// As for [`gather`]; `rows` must hold `[tokens, channels]`.
#[inline(always)]
pub(crate) unsafe fn gather_channels<S: Simd>(
    t: &Input<'_>,
    p: BatchHead,
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
        match Layout::natural(t.strides, stride) {
            Layout::RowMajor if t.dtype == DType::F32 && t.strides.channel == 1 => {
                let from = t
                    .data
                    .cast::<f32>()
                    .offset(offset(t.strides, p, tokens.start, 0));
                transpose::<S, true>(
                    from,
                    t.strides.token,
                    to.as_mut_ptr(),
                    stride as isize,
                    n,
                    channels,
                );
            }
            Layout::RowMajor => {
                gather(t, p, tokens, channels, Layout::RowMajor, rows);
                let from = rows[..n * channels].as_ptr();
                transpose::<S, true>(
                    from,
                    channels as isize,
                    to.as_mut_ptr(),
                    stride as isize,
                    n,
                    channels,
                );
            }
            layout => gather(t, p, tokens, channels, layout, to),
        }
    }
}

/// Where [`ScatterChannels::run`] writes: tokens `tokens` of a (batch, head), whatever the tensor's layout, with `add`
/// added in float32.
pub(crate) struct ScatterChannels<'a, 'b> {
    pub to: &'a Output<'b>,
    pub add: Option<&'a Input<'b>>,
    pub batch_head: BatchHead,
    pub tokens: Range<usize>,
    pub channels: usize,
}

impl ScatterChannels<'_, '_> {
    /// Writes `from`, `[channels, stride]`.
    ///
    /// Sums are made of lines of channels, so that `add` needs no transposition of its own.
    ///
    /// # Safety
    /// As for [`gather`] and [`scatter`]; `rows` must hold `[tokens, channels]`, `buf` `[channels, stride]`.
    #[inline(always)]
    pub unsafe fn run<S: Simd>(
        self,
        stride: usize,
        from: &mut [f32],
        rows: &mut [f32],
        buf: &mut [f32],
    ) {
        let ScatterChannels {
            to: t,
            add,
            batch_head: p,
            tokens,
            channels,
        } = self;
        let n = tokens.len();
        assert!(channels == 0 || (n <= stride && (channels - 1) * stride + n <= from.len()));
        // SAFETY: the caller says that the elements are this task's to write, and those of `add` readable; `from` was
        // compared above.
        unsafe {
            if let layout @ Layout::ColMajor { .. } = Layout::natural(t.strides, stride) {
                if let Some(add) = add {
                    gather_channels::<S>(add, p, tokens.clone(), channels, stride, buf, rows);
                    add_to(from, buf);
                }
                scatter(t, p, tokens, channels, layout, from);
                return;
            }
            let dense = t.dtype == DType::F32 && t.strides.channel == 1 && add.is_none();
            let (to, to_stride) = if dense {
                let at = offset(t.strides, p, tokens.start, 0);
                (t.data.cast::<f32>().offset(at), t.strides.token)
            } else {
                (rows[..n * channels].as_mut_ptr(), channels as isize)
            };
            let from = from.as_ptr();
            transpose::<S, false>(from, stride as isize, to, to_stride, channels, n);
            if dense {
                return;
            }
            for (i, token) in tokens.enumerate() {
                let line = &mut rows[i * channels..(i + 1) * channels];
                let at = |s: Strides| offset(s, p, token, 0);
                if let Some(add) = add {
                    let buf = &mut buf[..channels];
                    read_line(add, at(add.strides), add.strides.channel, buf);
                    add_to(line, buf);
                }
                write_line(t, at(t.strides), t.strides.channel, line);
            }
        }
    }
}

#[inline(always)]
fn add_to(to: &mut [f32], x: &[f32]) {
    for (to, x) in to.iter_mut().zip(x) {
        *to += x;
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
}
