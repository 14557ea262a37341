//! Visible key ranges of a query block under a band: which tiles are skipped, full, or masked. Index arithmetic, no tensors.
//!
//! A block of keys is cut into [`KeySegment`]s within which the same vectors of queries are at work, so that the edges of
//! the band cost what they contain (to one vector of queries), and blocks outside the band cost nothing.

use std::ops::Range;

use smallvec::SmallVec;

use super::isa::MAX_NR;
use crate::api::Band;

/// Which side of the band's edge is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BandSide {
    /// Every key: there is no band.
    All,
    /// The keys the band lets a query see.
    Inside(Band),
    /// The other ones.
    Outside(Band),
}

impl BandSide {
    pub fn band(&self) -> Option<&Band> {
        match self {
            BandSide::All => None,
            BandSide::Inside(band) | BandSide::Outside(band) => Some(band),
        }
    }
}

/// Keys `keys` (counted in the sequence) times the query vectors `vectors` (counted in the query block).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeySegment {
    pub keys: Range<usize>,
    pub vectors: Range<usize>,
    /// Bit v: some key of the segment is hidden from some query of vector v, so scores must be masked.
    pub masked: u64,
    /// From the first to the last of such keys; no text is among them.
    pub partial: Range<usize>,
}

impl KeySegment {
    /// All of a block.
    pub fn whole(keys: Range<usize>, vectors: Range<usize>) -> Self {
        KeySegment {
            keys,
            vectors,
            masked: 0,
            partial: 0..0,
        }
    }

    /// Vectors of which some query does not see some key of the segment.
    pub fn partial_vectors(&self) -> impl Iterator<Item = usize> {
        (self.vectors.clone()).filter(|&v| self.is_partially_masked(v))
    }

    /// Whether some query of vector `v` does not see some of its keys.
    pub fn is_partially_masked(&self, v: usize) -> bool {
        self.masked >> v & 1 == 1
    }

    /// Whether every query of vector `v` sees all of its keys.
    pub fn is_fully_visible(&self, v: usize) -> bool {
        self.vectors.contains(&v) && !self.is_partially_masked(v)
    }
}

/// What one vector of queries (a group of lanes) sees.
#[derive(Clone, Debug, PartialEq, Eq)]
struct LaneGroup {
    /// Keys some query sees, text columns aside.
    some: Range<usize>,
    /// Keys every query sees, text columns aside.
    every: Range<usize>,
}

/// Keys between which nothing changes: the same queries see all of them, alone or with others of their vector.
#[derive(Clone, Debug)]
struct Interval {
    keys: Range<usize>,
    /// Bit v: some query of vector v sees them. Not zero.
    active: u64,
    /// Bit v: some query of vector v does, and some does not.
    masked: u64,
}

/// What the queries of one block see of a sequence on one side, vector by vector.
#[derive(Clone, Debug)]
pub(crate) struct VisibleKeys {
    side: BandSide,
    text: Range<usize>,
    vectors: usize,
    /// In the order of the keys.
    intervals: SmallVec<[Interval; MAX_EDGES - 1]>,
}

/// Keys at which something changes for the largest block of queries. Lists of so many need no memory
/// of their own: with AVX2, where blocks are small, these cost 2 % of a window of 1024 tokens and 6 % of one of 256.
const MAX_EDGES: usize = 4 + 4 * MAX_NR;

impl VisibleKeys {
    /// For the queries `queries` of a sequence, `lanes` of them to a vector; the last vector may be ragged.
    pub fn new(side: BandSide, queries: Range<usize>, kv_tokens: usize, lanes: usize) -> Self {
        let text = side.band().map_or(0..0, |band| band.text_range(kv_tokens));
        let vectors: SmallVec<[LaneGroup; MAX_NR]> = queries
            .clone()
            .step_by(lanes)
            .map(|first| {
                lane_group(
                    side.band(),
                    first..queries.end.min(first + lanes),
                    kv_tokens,
                    &text,
                )
            })
            .collect();
        // Where vectors begin and end to see something, in part and as a whole: bits that change there. All but in order,
        // which is what sorting them is fast with.
        let bits = || vectors.iter().enumerate().map(|(i, v)| (1u64 << i, v));
        let mut edges = SmallVec::<[(usize, u64, u64); MAX_EDGES]>::new();
        edges.push((0, 0, 0));
        if side != BandSide::All {
            edges.extend(bits().map(|(bit, v)| (v.some.start, bit, 0)));
            edges.extend(bits().map(|(bit, v)| (v.every.start, 0, bit)));
            edges.extend(bits().map(|(bit, v)| (v.every.end, 0, bit)));
            edges.extend(bits().map(|(bit, v)| (v.some.end, bit, 0)));
            edges.extend([(text.start, 0, 0), (text.end, 0, 0)]);
        }
        edges.push((kv_tokens, 0, 0));
        edges.sort_unstable_by_key(|edge| edge.0);
        let all = ones(vectors.len());
        let (mut some, mut every) = (0, 0);
        let mut intervals = SmallVec::new();
        for pair in edges.windows(2) {
            let ((start, begins, fills), (end, ..)) = (pair[0], pair[1]);
            some ^= begins;
            every ^= fills;
            if start == end {
                continue;
            }
            let (some, every) = match text.contains(&start) {
                true => (all, all),
                false => (some, every),
            };
            let (active, masked) = match side {
                BandSide::All => (all, 0),
                BandSide::Inside(_) => (some, some & !every),
                BandSide::Outside(_) => (all & !every, some & !every),
            };
            if active != 0 {
                intervals.push(Interval {
                    keys: start..end,
                    active,
                    masked,
                });
            }
        }
        VisibleKeys {
            side,
            text,
            vectors: vectors.len(),
            intervals,
        }
    }

    /// The intervals, clipped to `keys`.
    fn clip(&self, keys: Range<usize>) -> impl Iterator<Item = Interval> {
        let both = move |s: &Interval| keys.start.max(s.keys.start)..keys.end.min(s.keys.end);
        let clipped = (self.intervals.iter()).map(move |s| Interval {
            keys: both(s),
            ..*s
        });
        clipped.filter(|s| !s.keys.is_empty())
    }

    /// Whether some query of the block sees some key of `keys` on this side.
    pub fn intersects(&self, keys: &Range<usize>) -> bool {
        self.clip(keys.clone()).next().is_some()
    }

    /// The smallest range that contains all of `keys` that some query of the block sees on this side.
    pub fn bounding_range(&self, keys: &Range<usize>) -> Range<usize> {
        hull(self.clip(keys.clone()).map(|s| s.keys))
    }

    pub fn side(&self) -> BandSide {
        self.side
    }

    /// The vectors of queries of the block.
    pub fn vectors(&self) -> Range<usize> {
        0..self.vectors
    }

    /// The text tokens of the band; their columns are never masked.
    pub fn text(&self) -> Range<usize> {
        self.text.clone()
    }

    /// Cuts the block of keys `keys` into segments, in the order of the keys.
    pub fn segments(&self, keys: Range<usize>, segments: &mut Vec<KeySegment>) {
        segments.clear();
        // Neighbours at which the same vectors are at work are merged, for a segment costs a product of its own.
        let mut last: Option<(Interval, Range<usize>)> = None;
        for interval in self.clip(keys) {
            let partial = match interval.masked {
                0 => 0..0,
                _ => interval.keys.clone(),
            };
            match &mut last {
                Some((before, all))
                    if before.active == interval.active
                        && before.keys.end == interval.keys.start =>
                {
                    before.keys.end = interval.keys.end;
                    before.masked |= interval.masked;
                    *all = hull([all.clone(), partial].into_iter());
                }
                _ => {
                    if let Some((interval, partial)) = last.replace((interval, partial)) {
                        split(&interval, &partial, segments);
                    }
                }
            }
        }
        if let Some((interval, partial)) = last {
            split(&interval, &partial, segments);
        }
    }
}

/// A segment for each group of neighbouring vectors that are at work.
fn split(interval: &Interval, partial: &Range<usize>, segments: &mut Vec<KeySegment>) {
    let mut rest = interval.active;
    while rest != 0 {
        let first = rest.trailing_zeros() as usize;
        let n = (rest >> first).trailing_ones() as usize;
        let bits = ones(n) << first;
        rest &= !bits;
        segments.push(KeySegment {
            keys: interval.keys.clone(),
            vectors: first..first + n,
            masked: interval.masked & bits,
            partial: partial.clone(),
        });
    }
}

fn ones(n: usize) -> u64 {
    if n >= 64 { !0 } else { (1 << n) - 1 }
}

/// The smallest range that contains all of these.
pub(crate) fn hull(ranges: impl Iterator<Item = Range<usize>>) -> Range<usize> {
    let filled = ranges.filter(|range| !range.is_empty());
    let both = |a: Range<usize>, b: Range<usize>| a.start.min(b.start)..a.end.max(b.end);
    filled.reduce(both).unwrap_or(0..0)
}

/// `keys` without the part at one of its ends that is text.
fn trim(keys: &Range<usize>, text: &Range<usize>) -> Range<usize> {
    if text.start == 0 {
        keys.start.max(text.end).min(keys.end)..keys.end
    } else {
        keys.start..keys.end.min(text.start).max(keys.start)
    }
}

fn lane_group(
    band: Option<&Band>,
    queries: Range<usize>,
    tokens: usize,
    text: &Range<usize>,
) -> LaneGroup {
    let Some(band) = band else {
        return LaneGroup {
            some: 0..tokens,
            every: 0..tokens,
        };
    };
    let image = trim(&queries, text);
    if image.is_empty() {
        return LaneGroup {
            some: 0..tokens,
            every: 0..tokens,
        };
    }
    let w = band.half_width;
    let (first, last) = (image.start, image.end - 1);
    let every = last.saturating_sub(w)..first.saturating_add(w).saturating_add(1).min(tokens);
    let every = if every.is_empty() { 0..0 } else { every };
    let some = if image == queries {
        first.saturating_sub(w)..last.saturating_add(w).saturating_add(1).min(tokens)
    } else {
        0..tokens
    };
    LaneGroup { some, every }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Segments, masks and `intersects` of every key block against the definition, pair by pair.
    fn compare(band: Band, tokens: usize, lanes: usize, block: usize) {
        let mut segments = Vec::new();
        for side in [
            BandSide::All,
            BandSide::Inside(band),
            BandSide::Outside(band),
        ] {
            let shown = |i: usize, j: usize| match side {
                BandSide::All => true,
                BandSide::Inside(band) => band.sees(i, j, tokens),
                BandSide::Outside(band) => !band.sees(i, j, tokens),
            };
            for first in (0..tokens).step_by(32) {
                let queries = first..tokens.min(first + 32);
                let visible = VisibleKeys::new(side, queries.clone(), tokens, lanes);
                for keys in (0..tokens).step_by(block).map(|k| k..tokens.min(k + block)) {
                    visible.segments(keys.clone(), &mut segments);
                    assert_eq!(visible.intersects(&keys), !segments.is_empty());
                    let seen = hull(segments.iter().map(|s| s.keys.clone()));
                    assert_eq!(visible.bounding_range(&keys), seen);
                    for key in keys {
                        for (v, start) in queries.clone().step_by(lanes).enumerate() {
                            let rows = start..queries.end.min(start + lanes);
                            let some = rows.clone().any(|i| shown(i, key));
                            let every = rows.clone().all(|i| shown(i, key));
                            let mut at = segments
                                .iter()
                                .filter(|s| s.keys.contains(&key) && s.vectors.contains(&v));
                            let segment = at.next();
                            assert!(at.next().is_none(), "key {key} twice for vector {v}");
                            assert!(
                                segment.is_some() || !some,
                                "key {key} missing for vector {v}"
                            );
                            if let Some(s) = segment {
                                // Nothing is worked on in vain, and what needs a mask gets one.
                                assert!(some, "key {key} needless for vector {v}");
                                assert!(
                                    every || s.masked >> v & 1 == 1 && s.partial.contains(&key)
                                );
                                let text = band.text_range(tokens);
                                assert!(!(s.partial.contains(&key) && text.contains(&key)));
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn segments_are_what_the_band_lets_queries_see() {
        for tokens in [1, 5, 16, 31, 32, 33, 70, 100] {
            for half_width in [0, 1, 4, 15, 16, 40, usize::MAX] {
                for text in [0, 1, 9, 31, 100] {
                    for text_at_start in [false, true] {
                        let band = Band {
                            half_width,
                            text: text.min(tokens),
                            text_at_start,
                        };
                        compare(band, tokens, 8, 24);
                        compare(band, tokens, 4, 7);
                    }
                }
            }
        }
    }

    #[test]
    fn a_wide_block_is_one_segment() {
        let visible = VisibleKeys::new(BandSide::Inside(Band::new(500)), 1000..1064, 2000, 16);
        let mut segments = Vec::new();
        visible.segments(900..1000, &mut segments);
        let all = KeySegment {
            keys: 900..1000,
            vectors: 0..4,
            masked: 0,
            partial: 0..0,
        };
        assert_eq!(segments, [all]);
        assert!(!visible.intersects(&(300..500)) && !visible.intersects(&(1564..1700)));
    }
}
