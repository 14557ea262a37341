//! Which keys a block of queries sees: pure index arithmetic, no tensors.
//!
//! A block of keys is cut into [`Segment`]s within which the same vectors of queries are at work, so that corners of
//! the band cost what they contain (to one vector of queries), and blocks outside the band cost nothing.

use std::ops::Range;

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
    /// The first to the last of such keys; none are elsewhere.
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

    /// The vectors and keys whose scores must be masked; columns of `text` never are.
    pub fn corners(&self, text: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
        let keys = self.partial.clone();
        let masked = (self.vectors.clone()).filter(|v| self.masked >> v & 1 == 1);
        masked.flat_map(move |v| {
            let text = text.clone();
            keys.clone()
                .filter(move |key| !text.contains(key))
                .map(move |key| (v, key))
        })
    }
}

/// The segments of one block of keys. Kept from block to block for its memory.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    pub list: Vec<Segment>,
    cuts: Vec<usize>,
}

/// What one vector of queries sees.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Vector {
    /// Keys some query sees, text columns aside.
    some: Range<usize>,
    /// Keys every query sees, text columns aside.
    every: Range<usize>,
}

/// What the queries of one block see of a sequence, vector by vector.
#[derive(Clone, Debug)]
pub(crate) struct Sight {
    side: Side,
    kv_tokens: usize,
    text: Range<usize>,
    vectors: Vec<Vector>,
}

impl Sight {
    /// For the queries `queries` of a sequence, `lanes` of them to a vector; the last vector may be ragged.
    pub fn new(side: Side, queries: Range<usize>, kv_tokens: usize, lanes: usize) -> Self {
        let text = side.band().map_or(0..0, |band| band.text_range(kv_tokens));
        let vectors = queries
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
        Sight {
            side,
            kv_tokens,
            text,
            vectors,
        }
    }

    /// Whether some query of the block sees some key of `keys` on this side.
    pub fn touches(&self, keys: &Range<usize>) -> bool {
        match self.side {
            Side::All => !keys.is_empty(),
            Side::Inside(_) => {
                overlaps(keys, &self.text) || self.vectors.iter().any(|v| overlaps(keys, &v.some))
            }
            Side::Outside(_) => self.vectors.iter().any(|v| {
                let image = trim(keys, &self.text);
                !image.is_empty() && (image.start < v.every.start || v.every.end < image.end)
            }),
        }
    }

    /// The keys of `keys` that queries of the block see on this side lie in this range.
    pub fn part(&self, keys: &Range<usize>) -> Range<usize> {
        let Side::Inside(_) = self.side else {
            return keys.clone();
        };
        let seen = self.vectors.iter().map(|v| &v.some).chain([&self.text]);
        hull(seen.map(|seen| keys.start.max(seen.start)..keys.end.min(seen.end)))
    }

    pub fn side(&self) -> Side {
        self.side
    }

    /// The vectors of queries of the block.
    pub fn vectors(&self) -> Range<usize> {
        0..self.vectors.len()
    }

    /// The text tokens of the band; their columns are never masked.
    pub fn text(&self) -> Range<usize> {
        self.text.clone()
    }

    /// Cuts the block of keys `keys` into segments, in the order of the keys.
    pub fn segments(&self, keys: Range<usize>, segments: &mut Segments) {
        let Segments { list, cuts } = segments;
        list.clear();
        cuts.clear();
        debug_assert!(keys.end <= self.kv_tokens);
        cuts.extend([keys.start, keys.end]);
        if self.side != Side::All {
            let edges = self
                .vectors
                .iter()
                .flat_map(|v| [&v.some, &v.every])
                .chain([&self.text])
                .flat_map(|r| [r.start, r.end]);
            cuts.extend(edges.filter(|&e| keys.start < e && e < keys.end));
            cuts.sort_unstable();
            cuts.dedup();
        }
        // Between two cuts every vector sees all, some or none of the keys. Neighbours at which the same vectors
        // are at work are merged, for a segment costs a product of its own.
        let mut last: Option<(Range<usize>, u64, u64, Range<usize>)> = None;
        let mut flush = |last: &mut Option<(Range<usize>, u64, u64, Range<usize>)>| {
            if let Some((keys, active, masked, partial)) = last.take() {
                let mut rest = active;
                while rest != 0 {
                    let first = rest.trailing_zeros() as usize;
                    let n = (rest >> first).trailing_ones() as usize;
                    let bits = ones(n) << first;
                    rest &= !bits;
                    list.push(Segment {
                        keys: keys.clone(),
                        vectors: first..first + n,
                        masked: masked & bits,
                        partial: partial.clone(),
                    });
                }
            }
        };
        for pair in cuts.windows(2) {
            let (mut active, mut masked) = (0u64, 0u64);
            for (i, v) in self.vectors.iter().enumerate() {
                let key = pair[0];
                let text = self.text.contains(&key);
                let (some, every) = (
                    text || v.some.contains(&key),
                    text || v.every.contains(&key),
                );
                let (some, every) = match self.side {
                    Side::All => (true, true),
                    Side::Inside(_) => (some, every),
                    Side::Outside(_) => (!every, !some),
                };
                active |= u64::from(some) << i;
                masked |= u64::from(some && !every) << i;
            }
            let keys = pair[0]..pair[1];
            let partial = if masked != 0 { keys.clone() } else { 0..0 };
            match &mut last {
                Some((before, a, m, p)) if *a == active => {
                    before.end = keys.end;
                    *m |= masked;
                    if Range::is_empty(p) {
                        *p = partial;
                    } else if masked != 0 {
                        p.end = partial.end;
                    }
                }
                _ => {
                    flush(&mut last);
                    last = Some((keys, active, masked, partial));
                }
            }
        }
        flush(&mut last);
    }
}

fn ones(n: usize) -> u64 {
    if n >= 64 { !0 } else { (1 << n) - 1 }
}

fn overlaps(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
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

/// For every query of `queries` the keys it sees, text columns aside, as a range; what masks are made from.
pub(crate) fn row(band: &Band, query: usize, tokens: usize) -> Range<usize> {
    if band.text_range(tokens).contains(&query) {
        return 0..tokens;
    }
    let w = band.half_width;
    query.saturating_sub(w)..query.saturating_add(w).saturating_add(1).min(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Segments, masks and `touches` of every key block against the definition, pair by pair.
    fn compare(band: Band, tokens: usize, lanes: usize, block: usize) {
        let mut segments = Segments::default();
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
                    let segments = &segments.list;
                    assert_eq!(sight.touches(&keys), !segments.is_empty());
                    let seen = hull(segments.iter().map(|s| s.keys.clone()));
                    match side {
                        Side::Inside(_) => assert_eq!(sight.part(&keys), seen),
                        _ => assert_eq!(sight.part(&keys), keys),
                    }
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
    fn rows_are_the_band_without_text_columns() {
        let band = Band {
            half_width: 3,
            text: 4,
            text_at_start: true,
        };
        for i in 0..20 {
            for j in 4..20 {
                assert_eq!(
                    row(&band, i, 20).contains(&j),
                    band.sees(i, j, 20),
                    "{i} {j}"
                );
            }
        }
    }

    #[test]
    fn a_wide_block_is_one_segment() {
        let sight = Sight::new(Side::Inside(Band::new(500)), 1000..1064, 2000, 16);
        let mut segments = Segments::default();
        sight.segments(900..1000, &mut segments);
        let all = Segment {
            keys: 900..1000,
            vectors: 0..4,
            masked: 0,
            partial: 0..0,
        };
        assert_eq!(segments.list, [all]);
        assert!(!sight.touches(&(300..500)) && !sight.touches(&(1564..1700)));
    }
}
