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

#[inline(always)]
unsafe fn read_line(t: &Input<'_>, at: isize, stride: isize, to: &mut [f32]) {
    if to.is_empty() {
        return;
    }
    // SAFETY: the caller says that `to.len()` elements from `at`, `stride` apart, can be read.
    unsafe {
        match t.dtype {
            DType::F32 => {
                let p = t.data.cast::<f32>().offset(at);
                if stride == 1 {
                    to.copy_from_slice(std::slice::from_raw_parts(p, to.len()));
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
                    p.copy_from_nonoverlapping(from.as_ptr(), from.len());
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
#[inline(always)]
pub(crate) fn transpose(
    from: &[f32],
    from_stride: usize,
    to: &mut [f32],
    to_stride: usize,
    rows: usize,
    columns: usize,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns <= from_stride && (rows - 1) * from_stride + columns <= from.len());
    assert!(rows <= to_stride && (columns - 1) * to_stride + rows <= to.len());
    let (f, t) = (from.as_ptr(), to.as_mut_ptr());
    // SAFETY: i < rows and j < columns below, and the assertions bound both matrices.
    unsafe {
        let (r4, c4) = (rows / 4 * 4, columns / 4 * 4);
        for j in (0..c4).step_by(4) {
            for i in (0..r4).step_by(4) {
                let a: [[f32; 4]; 4] = std::array::from_fn(|k| {
                    f.add((i + k) * from_stride + j)
                        .cast::<[f32; 4]>()
                        .read_unaligned()
                });
                for k in 0..4 {
                    let line = [a[0][k], a[1][k], a[2][k], a[3][k]];
                    t.add((j + k) * to_stride + i)
                        .cast::<[f32; 4]>()
                        .write_unaligned(line);
                }
            }
            for i in r4..rows {
                for k in 0..4 {
                    *t.add((j + k) * to_stride + i) = *f.add(i * from_stride + j + k);
                }
            }
        }
        for j in c4..columns {
            for i in 0..rows {
                *t.add(j * to_stride + i) = *f.add(i * from_stride + j);
            }
        }
    }
}
