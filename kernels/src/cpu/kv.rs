//! K and V as tasks read them: float32 or pairs of bfloat16, each (batch, head) by itself, in blocks of [`BLOCK_N`] keys.
//!
//! Float32 tensors that are contiguous per head are used in place. Token-interleaved layouts (`[batch, tokens, heads,
//! channels]`) are used in place where few queries see a key and [`TaskPacking`] does not say otherwise, else packed: by
//! each task for itself, or, where many queries see a key, once per call, on all threads. In these layouts each token of
//! a head lies in a page of its own, whose translation costs as much as its data; packing all heads at once visits it
//! once.
//!
//! Owns where K and V are read and the packing per call. No result depends on either, bit for bit.

use std::ops::Range;

use super::isa::{TaskPacking, Tuning};
use super::load_store::{BatchHead, Layout, gather, offset, read_line};
use super::pack_bf16::{pack_adjacent, pack_interleaved};
use super::prefetch::LineStream;
use super::scratch::Scratch;

use crate::api::{Attention, Mode};
use crate::parallel::Parallel;
use crate::tensor::{DType, Input};

/// Keys in a block. With the queries of a block it sets the working set: scores, Q, O, K and V of a block should stay in
/// L2 and mostly in L1. Even, so that no pair of keys is in two blocks.
pub(crate) const BLOCK_N: usize = 120;

impl TaskPacking {
    /// Where K and V are read that are not packed per call.
    fn placements(self, values: &Input<'_>, mode: &Mode<'_>) -> [KvPlacement; 2] {
        let line = values.strides.token.unsigned_abs() * values.dtype.size();
        let copied = match self {
            TaskPacking::Never => [false, false],
            TaskPacking::AliasedValues => [false, line.is_multiple_of(4096)],
            TaskPacking::Always => {
                let outside = !matches!(mode, Mode::Window { .. });
                [outside, outside || line.is_multiple_of(2048)]
            }
        };
        copied.map(|copied| {
            if copied {
                KvPlacement::PackedPerTask
            } else {
                KvPlacement::InPlace
            }
        })
    }
}

/// Where the blocks of an operand are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KvPlacement {
    /// In the tensor itself.
    InPlace,
    /// Packed once per call: for each (batch, head) its blocks, `[tokens, channels]` or `[channels, BLOCK_N]`.
    PackedPerCall,
    /// Each task packs them for itself.
    PackedPerTask,
}

/// What a 32-bit word of a packed operand holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PackedLayout {
    /// A float32.
    Float32,
    /// Two neighbouring channels of a key, in bfloat16: scores are sums over channels.
    ChannelPairs,
    /// Two neighbouring keys of a channel, in bfloat16: outputs are sums over keys.
    KeyPairs,
}

impl PackedLayout {
    /// Words that keys and channels take, along each.
    fn extent(self, keys: usize, channels: usize) -> (usize, usize) {
        match self {
            PackedLayout::Float32 => (keys, channels),
            PackedLayout::ChannelPairs => (keys, channels.div_ceil(2)),
            PackedLayout::KeyPairs => (keys.div_ceil(2), channels),
        }
    }
}

/// Where K and V of a call are read, and how they are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvPlan {
    k: (KvPlacement, PackedLayout),
    v: (KvPlacement, PackedLayout),
    /// Words that one (batch, head) of both needs where they are packed per call.
    head_words: usize,
}

impl KvPlan {
    /// `each` is how many elements a word holds.
    pub fn of(a: &Attention<'_>, each: usize, tuning: Tuning) -> Self {
        let queries_per_key = match &a.mode {
            Mode::Window { band, .. } => (band.half_width.saturating_mul(2))
                .saturating_add(band.text + 1)
                .min(a.shape.q_tokens),
            _ => a.shape.q_tokens,
        };
        let packed = KvPlan::new(a, each, [KvPlacement::PackedPerCall; 2]);
        if queries_per_key > tuning.pack_threshold_queries
            && packed.head_words <= tuning.max_packed_words
        {
            packed
        } else {
            KvPlan::new(a, each, tuning.task_packing.placements(&a.v, &a.mode))
        }
    }

    /// `interleaved`: where token-interleaved K and V are read.
    fn new(a: &Attention<'_>, each: usize, interleaved: [KvPlacement; 2]) -> Self {
        let s = a.shape;
        let placement = |t: &Input<'_>,
                         packing: PackedLayout,
                         channels: usize,
                         interleaved: KvPlacement| {
            // Contiguous rows are read as fast as packed ones.
            let dense = t.strides.token == channels as isize;
            let words = match packing {
                PackedLayout::Float32 => t.dtype == DType::F32,
                PackedLayout::ChannelPairs => {
                    t.dtype == DType::BF16 && channels.is_multiple_of(2) && t.strides.token % 2 == 0
                }
                PackedLayout::KeyPairs => false,
            };
            let lines = words && t.strides.channel == 1 && t.strides.token > 0;
            match (lines, interleaved) {
                (true, interleaved) if dense || interleaved == KvPlacement::InPlace => {
                    KvPlacement::InPlace
                }
                (_, KvPlacement::PackedPerCall) => KvPlacement::PackedPerCall,
                _ => KvPlacement::PackedPerTask,
            }
        };
        let (k_packing, v_packing) = match each {
            1 => (PackedLayout::Float32, PackedLayout::Float32),
            _ => (PackedLayout::ChannelPairs, PackedLayout::KeyPairs),
        };
        let k = (
            placement(&a.k, k_packing, s.head_dim, interleaved[0]),
            k_packing,
        );
        let v = (
            placement(&a.v, v_packing, s.v_dim, interleaved[1]),
            v_packing,
        );
        let words = |(placement, packing): (KvPlacement, PackedLayout), channels| match placement {
            // Inputs that repeat elements may have any number of tokens.
            KvPlacement::PackedPerCall => {
                let (along_keys, along_channels) = packing.extent(BLOCK_N, channels);
                (s.kv_tokens.div_ceil(BLOCK_N))
                    .saturating_mul(along_keys)
                    .saturating_mul(along_channels)
            }
            _ => 0,
        };
        KvPlan {
            k,
            v,
            head_words: words(k, s.head_dim).saturating_add(words(v, s.v_dim)),
        }
    }
}

/// A chunk of a call: some rows of the batch, or some heads of one row. Packed per call at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KvChunk {
    pub batch: Range<usize>,
    pub kv_heads: Range<usize>,
}

impl KvChunk {
    /// The chunks of a call. One after the other: there are as many as rows, which may be thousands.
    pub fn all(a: &Attention<'_>, plan: KvPlan, tuning: Tuning) -> impl Iterator<Item = KvChunk> {
        let batch_heads = tuning.max_packed_words.checked_div(plan.head_words);
        KvChunk::of(
            a.shape.batch,
            a.shape.kv_heads,
            batch_heads.unwrap_or(usize::MAX),
        )
    }

    /// Chunks of at most `batch_heads` (batch, head)s, or one.
    fn of(batch: usize, kv_heads: usize, batch_heads: usize) -> impl Iterator<Item = KvChunk> {
        let rows = (batch_heads / kv_heads).clamp(1, batch);
        let heads = batch_heads.clamp(1, kv_heads);
        (0..batch).step_by(rows).flat_map(move |b| {
            (0..kv_heads).step_by(heads).map(move |h| KvChunk {
                batch: b..batch.min(b + rows),
                kv_heads: h..kv_heads.min(h + heads),
            })
        })
    }

    fn batch_heads(&self) -> usize {
        self.batch.len() * self.kv_heads.len()
    }

    /// The index of a (batch, head) in the chunk.
    fn index(&self, p: BatchHead) -> usize {
        (p.batch - self.batch.start) * self.kv_heads.len() + p.head - self.kv_heads.start
    }
}

/// K or V of a chunk.
pub(crate) struct KvOperand<'a> {
    from: Input<'a>,
    channels: usize,
    tokens: usize,
    layout: Layout,
    /// Words between the lines of two keys, or of two pairs of keys.
    row: usize,
    chunk: KvChunk,
    placement: KvPlacement,
    packing: PackedLayout,
    /// Memory of the call, if packed there.
    packed: *mut f32,
}

// SAFETY: while tasks share an operand they only read what it points to; while it is packed each task writes blocks of
// its own.
unsafe impl Sync for KvOperand<'_> {}

impl<'a> KvOperand<'a> {
    fn new(
        from: Input<'a>,
        chunk: &KvChunk,
        tokens: usize,
        channels: usize,
        (placement, packing): (KvPlacement, PackedLayout),
    ) -> Self {
        let (stride, along_channels) = packing.extent(BLOCK_N, channels);
        let layout = match placement {
            KvPlacement::InPlace => Layout::RowMajor,
            _ => Layout::natural(from.strides, stride),
        };
        let row = match placement {
            KvPlacement::InPlace => packing.extent(0, from.strides.token.unsigned_abs()).1,
            _ => along_channels,
        };
        KvOperand {
            from,
            channels,
            tokens,
            layout,
            row,
            chunk: chunk.clone(),
            placement,
            packing,
            packed: std::ptr::null_mut(),
        }
    }

    /// Words of a block.
    fn block_len(&self) -> usize {
        let (along_keys, along_channels) = self.packing.extent(BLOCK_N, self.channels);
        along_keys * along_channels
    }

    /// Words that the call packs it into.
    fn len(&self) -> usize {
        match self.placement {
            KvPlacement::PackedPerCall => {
                self.chunk.batch_heads() * self.tokens.div_ceil(BLOCK_N) * self.block_len()
            }
            _ => 0,
        }
    }

    /// Words that a task needs for a block of a head.
    pub fn task_len(&self) -> usize {
        match self.placement {
            KvPlacement::PackedPerTask => self.block_len(),
            _ => 0,
        }
    }

    /// The block `keys` of a (batch, head), whose first is a multiple of [`BLOCK_N`]. `buf` has [`KvOperand::task_len`]
    /// words. Where pairs are read in the tensor itself, words are not aligned.
    ///
    /// # Safety
    /// The keys must lie inside the shape.
    #[inline(always)]
    pub unsafe fn block(&self, p: BatchHead, keys: Range<usize>, buf: &mut [f32]) -> *const f32 {
        match self.placement {
            KvPlacement::InPlace => {
                let at = offset(self.from.strides, p, keys.start, 0);
                let bytes = at * self.from.dtype.size() as isize;
                self.from.data.wrapping_offset(bytes).cast()
            }
            KvPlacement::PackedPerCall => self.packed.wrapping_add(self.at(p, keys.start)),
            KvPlacement::PackedPerTask => {
                // SAFETY (both): promised by the caller.
                if self.packing == PackedLayout::Float32 {
                    unsafe { gather(&self.from, p, keys, self.channels, self.layout, buf) };
                } else {
                    for i in 0..self.shape(keys.len()).0 {
                        unsafe { self.read(p, keys.clone(), i, buf) };
                    }
                }
                buf.as_ptr()
            }
        }
    }

    /// Where a block is, if packed per call.
    fn at(&self, p: BatchHead, first: usize) -> usize {
        let blocks = self.tokens.div_ceil(BLOCK_N);
        (self.chunk.index(p) * blocks + first / BLOCK_N) * self.block_len()
    }

    /// Lines of a block with so many keys, words between two of them, and words of each.
    #[inline(always)]
    fn shape(&self, keys: usize) -> (usize, usize, usize) {
        let (along_keys, along_channels) = self.packing.extent(keys, self.channels);
        match self.layout {
            Layout::RowMajor => (along_keys, self.row, along_channels),
            Layout::ColMajor { stride } => (along_channels, stride, along_keys),
        }
    }

    /// Reads line `i` of a block into its place in `block`.
    ///
    /// # Safety
    /// The keys must lie inside the shape.
    #[inline(always)]
    unsafe fn read(&self, p: BatchHead, keys: Range<usize>, i: usize, block: &mut [f32]) {
        let (t, s) = (&self.from, self.from.strides);
        let (_, distance, len) = self.shape(keys.len());
        let to = &mut block[i * distance..i * distance + len];
        // In the tensor: numbers in a line, lines, the stride inside one, and where each begins.
        let (n, lines, stride) = match self.layout {
            Layout::RowMajor => (self.channels, keys.len(), s.channel),
            Layout::ColMajor { .. } => (keys.len(), self.channels, s.token),
        };
        let at = |line: usize| match self.layout {
            Layout::RowMajor => offset(s, p, keys.start + line, 0),
            Layout::ColMajor { .. } => offset(s, p, keys.start, line),
        };
        // SAFETY: lines of these keys.
        unsafe {
            match (self.packing, self.layout) {
                (PackedLayout::Float32, _) => read_line(t, at(i), stride, to),
                (PackedLayout::ChannelPairs, Layout::RowMajor)
                | (PackedLayout::KeyPairs, Layout::ColMajor { .. }) => {
                    pack_adjacent(t, at(i), stride, n, to);
                }
                (PackedLayout::ChannelPairs, Layout::ColMajor { .. })
                | (PackedLayout::KeyPairs, Layout::RowMajor) => {
                    let second = (2 * i + 1 < lines).then(|| at(2 * i + 1));
                    pack_interleaved(t, at(2 * i), second, stride, to);
                }
            }
        }
    }

    /// Calls `f` with each line of the first keys of a block.
    ///
    /// # Safety
    /// The block must have so many keys.
    #[inline(always)]
    pub unsafe fn lines(&self, block: *const f32, keys: usize, mut f: impl FnMut(&[f32])) {
        let (lines, distance, len) = self.shape(keys);
        for i in 0..lines {
            // SAFETY: promised by the caller.
            f(unsafe { std::slice::from_raw_parts(block.add(i * distance), len) });
        }
    }

    /// Words in a block between keys and between channels; between pairs of keys or of channels where a word holds a pair.
    #[inline(always)]
    pub fn strides(&self) -> (usize, usize) {
        match self.layout {
            Layout::RowMajor => (self.row, 1),
            Layout::ColMajor { stride } => (1, stride),
        }
    }

    /// The cache lines of some keys of a block; where packed per call, those of the first head only, and from where the
    /// block begins.
    pub fn prefetch(&self, p: BatchHead, heads: usize, keys: Range<usize>) -> LineStream {
        match self.placement {
            KvPlacement::PackedPerCall => {
                let (lines, words) = self
                    .packing
                    .extent(keys.end - keys.start / BLOCK_N * BLOCK_N, self.channels);
                let line = words * size_of::<f32>();
                let block = self.packed.wrapping_add(self.at(p, keys.start));
                LineStream::strided(block.cast_const().cast(), line as isize, line, lines)
            }
            _ => LineStream::new(
                &self.from,
                p.batch,
                p.head..p.head + heads,
                keys,
                self.channels,
            ),
        }
    }

    /// Packs one block of keys of all heads of one row of the batch.
    ///
    /// # Safety
    /// It must be packed per call, and nobody else may use this block meanwhile.
    unsafe fn pack(&self, batch: usize, keys: Range<usize>) {
        let s = self.from.strides;
        let line = |head: usize, i: usize| {
            let p = BatchHead { batch, head };
            let block = self.packed.wrapping_add(self.at(p, keys.start));
            // SAFETY: the block is this task's by the promise of the caller; keys and heads lie inside the shape.
            unsafe {
                let block = std::slice::from_raw_parts_mut(block, self.block_len());
                self.read(p, keys.clone(), i, block);
            }
        };
        let lines = 0..self.shape(keys.len()).0;
        let heads = self.chunk.kv_heads.clone();
        if self.layout == Layout::RowMajor && s.head.abs() < s.token.abs() {
            lines.for_each(|i| heads.clone().for_each(|head| line(head, i)));
        } else {
            heads.for_each(|head| lines.clone().for_each(|i| line(head, i)));
        }
    }
}

/// K and V of a chunk.
pub(crate) struct KvSource<'a> {
    pub k: KvOperand<'a>,
    pub v: KvOperand<'a>,
}

impl<'a> KvSource<'a> {
    /// Packs a chunk into `scratch`, where the plan says so.
    pub fn new(
        a: &Attention<'a>,
        plan: KvPlan,
        chunk: &KvChunk,
        scratch: &'a mut Scratch,
        pool: &dyn Parallel,
    ) -> Self {
        let s = a.shape;
        let mut kv = KvSource {
            k: KvOperand::new(a.k, chunk, s.kv_tokens, s.head_dim, plan.k),
            v: KvOperand::new(a.v, chunk, s.kv_tokens, s.v_dim, plan.v),
        };
        let bufs = scratch.cut([kv.k.len(), kv.v.len()]);
        let blocks = s.kv_tokens.div_ceil(BLOCK_N);
        for (operand, buf) in [&mut kv.k, &mut kv.v].into_iter().zip(bufs) {
            if operand.placement != KvPlacement::PackedPerCall {
                continue;
            }
            operand.packed = buf.as_mut_ptr();
            let operand = &*operand;
            pool.run(chunk.batch.len() * blocks, &|i| {
                let first = i % blocks * BLOCK_N;
                let batch = chunk.batch.start + i / blocks;
                // SAFETY: each block is of one task.
                unsafe { operand.pack(batch, first..s.kv_tokens.min(first + BLOCK_N)) };
            });
        }
        kv
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Band;
    use crate::cpu::isa::kernels;
    use crate::tensor::Strides;

    #[test]
    fn tasks_pack_what_they_are_told_to() {
        let numbers = [0f32; 1];
        let placements = |copy: TaskPacking, token, mode: &Mode<'_>| {
            let strides = Strides {
                batch: 0,
                head: 64,
                token,
                channel: 1,
            };
            // SAFETY: nothing is read through it.
            let t = unsafe { Input::from_raw(numbers.as_ptr().cast(), DType::F32, strides) };
            copy.placements(&t, mode)
                .map(|placement| placement == KvPlacement::PackedPerTask)
        };
        let band = Mode::Window {
            band: Band::new(2),
            residual: None,
        };
        for (copy, token, full, window) in [
            (TaskPacking::Never, 1024, [false, false], [false, false]),
            (
                TaskPacking::AliasedValues,
                1024,
                [false, true],
                [false, true],
            ),
            (
                TaskPacking::AliasedValues,
                3072,
                [false, true],
                [false, true],
            ),
            (
                TaskPacking::AliasedValues,
                1536,
                [false, false],
                [false, false],
            ),
            (TaskPacking::Always, 1536, [true, true], [false, true]),
            (TaskPacking::Always, 1152, [true, true], [false, false]),
        ] {
            assert_eq!(
                placements(copy, token, &Mode::Full),
                full,
                "{copy:?} {token}"
            );
            assert_eq!(placements(copy, token, &band), window, "{copy:?} {token}");
        }
    }

    #[test]
    fn no_pair_of_keys_is_in_two_blocks() {
        for kernel in kernels() {
            assert!(BLOCK_N.is_multiple_of(kernel.elems_per_word), "{kernel:?}");
        }
    }

    #[test]
    fn chunks_are_every_batch_and_head_once() {
        for (batch, heads) in [(1, 1), (1, 5), (3, 4), (4, 1)] {
            for batch_heads in [0, 1, 2, 3, 4, 7, 8, 100] {
                let chunks: Vec<KvChunk> = KvChunk::of(batch, heads, batch_heads).collect();
                let mut seen = vec![0; batch * heads];
                for chunk in &chunks {
                    assert!(chunk.batch_heads() <= batch_heads.max(1));
                    let mut index = 0;
                    for b in chunk.batch.clone() {
                        for head in chunk.kv_heads.clone() {
                            seen[b * heads + head] += 1;
                            assert_eq!(chunk.index(BatchHead { batch: b, head }), index);
                            index += 1;
                        }
                    }
                }
                assert!(seen.iter().all(|&n| n == 1), "{chunks:?}");
            }
        }
    }
}
