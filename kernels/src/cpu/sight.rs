//! Which keys a block of queries sees: pure index arithmetic, no tensors.
//!
//! A block of keys is cut into [`Segment`]s within which the same vectors of queries are at work, so that corners of
//! the band cost what they contain (to one vector of queries), and blocks outside the band cost nothing.

use std::ops::Range;

use smallvec::SmallVec;

use super::gemm::MOST_VECTORS;
use crate::api::Band;

/// Which of its keys a query is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Every key: there is no band.
    All,
    /// The keys the band lets a query see.
    Inside(Band),
    /// The other ones.
    Outside(Band),
}

impl Side {
    pub fn band(&self) -> Option<&Band> {
        match self {
            Side::All => None,
            Side::Inside(band) | Side::Outside(band) => Some(band),
        }
    }
}

/// Keys `keys` (counted in the sequence) times the query vectors `vectors` (counted in the query block).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub keys: Range<usize>,
    pub vectors: Range<usize>,
    /// Bit v: some key of the segment is hidden from some query of vector v, so scores must be masked.
    pub masked: u64,
    /// The first to the last of such keys; none are elsewhere, and no text is among them.
    pub partial: Range<usize>,
}

impl Segment {
    /// All of a block.
    pub fn whole(keys: Range<usize>, vectors: Range<usize>) -> Self {
        Segment {
            keys,
            vectors,
            masked: 0,
            partial: 0..0,
        }
    }

    /// Vectors of which some query does not see some key of the segment.
    pub fn masked_vectors(&self) -> impl Iterator<Item = usize> {
        (self.vectors.clone()).filter(|&v| self.hides(v))
    }

    /// Whether some query of vector `v` does not see some of its keys.
    pub fn hides(&self, v: usize) -> bool {
        self.masked >> v & 1 == 1
    }

    /// Whether every query of vector `v` sees all of its keys.
    pub fn shows(&self, v: usize) -> bool {
        self.vectors.contains(&v) && !self.hides(v)
    }
}

/// What one vector of queries sees.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Vector {
    /// Keys some query sees, text columns aside.
    some: Range<usize>,
    /// Keys every query sees, text columns aside.
    every: Range<usize>,
}

/// Keys between which nothing changes: the same queries see all of them, alone or with others of their vector.
#[derive(Clone, Debug)]
struct Stretch {
    keys: Range<usize>,
    /// Bit v: some query of vector v sees them. Not zero.
    active: u64,
    /// Bit v: some query of vector v does, and some does not.
    masked: u64,
}

/// What the queries of one block see of a sequence on one side, vector by vector.
#[derive(Clone, Debug)]
pub(crate) struct Sight {
    side: Side,
    text: Range<usize>,
    vectors: usize,
    /// In the order of the keys.
    stretches: SmallVec<[Stretch; EDGES - 1]>,
}

/// Keys at which something changes for the largest block of queries. Lists of so many need no memory
/// of their own: with AVX2, where blocks are small, these cost 2 % of a window of 1024 tokens and 6 % of one of 256.
const EDGES: usize = 4 + 4 * MOST_VECTORS;

impl Sight {
    /// For the queries `queries` of a sequence, `lanes` of them to a vector; the last vector may be ragged.
    pub fn new(side: Side, queries: Range<usize>, kv_tokens: usize, lanes: usize) -> Self {
        let text = side.band().map_or(0..0, |band| band.text_range(kv_tokens));
        let vectors: SmallVec<[Vector; MOST_VECTORS]> = queries
            .clone()
            .step_by(lanes)
            .map(|first| {
                vector(
                    side.band(),
                    first..queries.end.min(first + lanes),
                    kv_tokens,
                    &text,
                )
            })
            .collect();
        // Where vectors begin and end to see something, in part and as a whole: bits that change there. All but in order, which
        // is what sorting them is fast with.
        let bits = || vectors.iter().enumerate().map(|(i, v)| (1u64 << i, v));
        let mut edges = SmallVec::<[(usize, u64, u64); EDGES]>::new();
        edges.push((0, 0, 0));
        if side != Side::All {
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
        let mut stretches = SmallVec::new();
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
                Side::All => (all, 0),
                Side::Inside(_) => (some, some & !every),
                Side::Outside(_) => (all & !every, some & !every),
            };
            if active != 0 {
                stretches.push(Stretch {
                    keys: start..end,
                    active,
                    masked,
                });
            }
        }
        Sight {
            side,
            text,
            vectors: vectors.len(),
            stretches,
        }
    }

    /// The stretches of `keys`, cut to them.
    fn cut(&self, keys: Range<usize>) -> impl Iterator<Item = Stretch> {
        let both = move |s: &Stretch| keys.start.max(s.keys.start)..keys.end.min(s.keys.end);
        let cut = (self.stretches.iter()).map(move |s| Stretch {
            keys: both(s),
            ..*s
        });
        cut.filter(|s| !s.keys.is_empty())
    }

    /// Whether some query of the block sees some key of `keys` on this side.
    pub fn touches(&self, keys: &Range<usize>) -> bool {
        self.cut(keys.clone()).next().is_some()
    }

    /// The keys of `keys` that queries of the block see on this side lie in this range.
    pub fn part(&self, keys: &Range<usize>) -> Range<usize> {
        hull(self.cut(keys.clone()).map(|s| s.keys))
    }

    pub fn side(&self) -> Side {
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
    pub fn segments(&self, keys: Range<usize>, segments: &mut Vec<Segment>) {
        segments.clear();
        // Neighbours at which the same vectors are at work are merged, for a segment costs a product of its own.
        let mut last: Option<(Stretch, Range<usize>)> = None;
        for stretch in self.cut(keys) {
            let partial = match stretch.masked {
                0 => 0..0,
                _ => stretch.keys.clone(),
            };
            match &mut last {
                Some((before, all))
                    if before.active == stretch.active && before.keys.end == stretch.keys.start =>
                {
                    before.keys.end = stretch.keys.end;
                    before.masked |= stretch.masked;
                    *all = hull([all.clone(), partial].into_iter());
                }
                _ => {
                    if let Some((stretch, partial)) = last.replace((stretch, partial)) {
                        split(&stretch, &partial, segments);
                    }
                }
            }
        }
        if let Some((stretch, partial)) = last {
            split(&stretch, &partial, segments);
        }
    }
}

/// A segment for each group of neighbouring vectors that are at work.
fn split(stretch: &Stretch, partial: &Range<usize>, segments: &mut Vec<Segment>) {
    let mut rest = stretch.active;
    while rest != 0 {
        let first = rest.trailing_zeros() as usize;
        let n = (rest >> first).trailing_ones() as usize;
        let bits = ones(n) << first;
        rest &= !bits;
        segments.push(Segment {
            keys: stretch.keys.clone(),
            vectors: first..first + n,
            masked: stretch.masked & bits,
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

fn vector(
    band: Option<&Band>,
    queries: Range<usize>,
    tokens: usize,
    text: &Range<usize>,
) -> Vector {
    let Some(band) = band else {
        return Vector {
            some: 0..tokens,
            every: 0..tokens,
        };
    };
    let image = trim(&queries, text);
    if image.is_empty() {
        return Vector {
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
    Vector { some, every }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Segments, masks and `touches` of every key block against the definition, pair by pair.
    fn compare(band: Band, tokens: usize, lanes: usize, block: usize) {
        let mut segments = Vec::new();
        for side in [Side::All, Side::Inside(band), Side::Outside(band)] {
            let shown = |i: usize, j: usize| match side {
                Side::All => true,
                Side::Inside(band) => band.sees(i, j, tokens),
                Side::Outside(band) => !band.sees(i, j, tokens),
            };
            for first in (0..tokens).step_by(32) {
                let queries = first..tokens.min(first + 32);
                let sight = Sight::new(side, queries.clone(), tokens, lanes);
                for keys in (0..tokens).step_by(block).map(|k| k..tokens.min(k + block)) {
                    sight.segments(keys.clone(), &mut segments);
                    assert_eq!(sight.touches(&keys), !segments.is_empty());
                    let seen = hull(segments.iter().map(|s| s.keys.clone()));
                    assert_eq!(sight.part(&keys), seen);
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
        let sight = Sight::new(Side::Inside(Band::new(500)), 1000..1064, 2000, 16);
        let mut segments = Vec::new();
        sight.segments(900..1000, &mut segments);
        let all = Segment {
            keys: 900..1000,
            vectors: 0..4,
            masked: 0,
            partial: 0..0,
        };
        assert_eq!(segments, [all]);
        assert!(!sight.touches(&(300..500)) && !sight.touches(&(1564..1700)));
    }
}
