//! How exporters lay out q, k, v and the attention output.

use ditfastattn_kernels::Strides;

use crate::abi::error::Error;

/// The order of a tensor's axes: `B` batch, `H` heads, `S` sequence, `D` channels of a head. In rank 3 batch and heads
/// are folded into the leading axis, batch first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// The axis of batch, heads (the batch's in rank 3), sequence, channels.
    axes: [usize; 4],
    rank: usize,
}

/// A tensor seen as `[batch, heads, tokens, channels]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub batch: usize,
    pub heads: usize,
    pub tokens: usize,
    pub channels: usize,
    pub strides: Strides,
}

impl Layout {
    pub fn parse(text: &str) -> Result<Layout, Error> {
        let axis = |letter: char| text.find(letter);
        let rank = text.len();
        let found = match rank {
            4 => axis('B').zip(axis('H')).zip(axis('S').zip(axis('D'))),
            3 if text.starts_with('B') => Some((0, 0)).zip(axis('S').zip(axis('D'))),
            _ => None,
        };
        match found {
            Some(((b, h), (s, d))) => Ok(Layout {
                axes: [b, h, s, d],
                rank,
            }),
            None => Err(Error::graph(format!(
                "the layout is `{text}`, expected a permutation of BHSD, or BSD or BDS"
            ))),
        }
    }

    /// Whether the rows of a batch lie one after the other, so that halves of it are halves of the memory.
    pub fn batch_is_outermost(&self) -> bool {
        self.axes[0] == 0
    }

    /// Whether batch and heads are one axis.
    pub fn is_folded(&self) -> bool {
        self.rank == 3
    }

    /// The number of heads, if this layout has an axis for them.
    pub fn heads(&self, dims: &[usize]) -> Option<usize> {
        (self.rank == 4).then(|| dims.get(self.axes[1]).copied())?
    }

    /// Sees a contiguous tensor of shape `dims` as batch, heads, tokens and channels. `heads` says how many heads are
    /// folded into the batch if this layout has no axis for them.
    pub fn view(&self, dims: &[usize], heads: usize, what: &str) -> Result<View, Error> {
        if dims.len() != self.rank {
            return Err(Error::invalid(format!(
                "{what} has shape {dims:?}, expected rank {}",
                self.rank
            )));
        }
        let mut step = [0isize; 4];
        let mut stride = 1usize;
        for axis in (0..self.rank).rev() {
            step[axis] = stride as isize;
            // No overflow: the tensor exists, and an empty one has no strides to speak of.
            stride = stride.saturating_mul(dims[axis]);
        }
        let [b, h, s, d] = self.axes;
        let (batch, heads, head_stride) = if self.rank == 4 {
            (dims[b], dims[h], step[h])
        } else if heads != 0 && dims[b].is_multiple_of(heads) {
            (dims[b] / heads, heads, step[b])
        } else {
            return Err(Error::invalid(format!(
                "{what} has shape {dims:?}, whose leading axis is no multiple of {heads} heads"
            )));
        };
        let batch_stride = if self.rank == 4 {
            step[b]
        } else {
            step[b] * heads as isize
        };
        Ok(View {
            batch,
            heads,
            tokens: dims[s],
            channels: dims[d],
            strides: Strides {
                batch: batch_stride,
                head: head_stride,
                token: step[s],
                channel: step[d],
            },
        })
    }

    /// The shape of a tensor in this layout. `fold` multiplies batch and heads for rank 3.
    pub fn dims<N: Clone>(
        &self,
        [b, h, s, d]: [N; 4],
        fold: impl Fn(N, N) -> Option<N>,
    ) -> Option<Vec<N>> {
        let mut dims: Vec<(usize, N)> = vec![(self.axes[2], s), (self.axes[3], d)];
        if self.rank == 4 {
            dims.extend([(self.axes[0], b), (self.axes[1], h)]);
        } else {
            dims.push((self.axes[0], fold(b, h)?));
        }
        dims.sort_by_key(|(axis, _)| *axis);
        Some(dims.into_iter().map(|(_, n)| n).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_permutation_has_the_strides_of_its_axes() {
        let sizes = [('B', 2), ('H', 3), ('S', 5), ('D', 7)];
        for text in ["BHSD", "BSHD", "BHDS", "SBHD", "DSHB"] {
            let dims: Vec<usize> = text
                .chars()
                .filter_map(|c| sizes.iter().find(|(l, _)| *l == c))
                .map(|(_, n)| *n)
                .collect();
            let view = Layout::parse(text)
                .and_then(|l| l.view(&dims, 0, "q"))
                .expect("a valid layout");
            assert_eq!(
                (view.batch, view.heads, view.tokens, view.channels),
                (2, 3, 5, 7)
            );
            let stride = |letter: char| -> isize {
                let axis = text.find(letter).expect("letter");
                dims[axis + 1..].iter().product::<usize>() as isize
            };
            let s = view.strides;
            assert_eq!(
                [s.batch, s.head, s.token, s.channel],
                [stride('B'), stride('H'), stride('S'), stride('D')],
                "{text}"
            );
            let layout = Layout::parse(text).expect("a valid layout");
            assert_eq!(layout.dims([2, 3, 5, 7], |_, _| None), Some(dims), "{text}");
        }
    }

    #[test]
    fn rank_three_folds_heads_into_the_batch() {
        let layout = Layout::parse("BDS").expect("a valid layout");
        let view = layout.view(&[6, 7, 5], 3, "k").expect("fits");
        assert_eq!(
            (view.batch, view.heads, view.tokens, view.channels),
            (2, 3, 5, 7)
        );
        assert_eq!(
            view.strides,
            Strides {
                batch: 105,
                head: 35,
                token: 1,
                channel: 5
            }
        );
        assert!(layout.view(&[5, 7, 5], 3, "k").is_err());
        assert_eq!(
            layout.dims([2, 3, 5, 7], |b, h| Some(b * h)),
            Some(vec![6, 7, 5])
        );
    }

    #[test]
    fn other_layouts_are_refused() {
        for text in ["", "BHS", "SBD", "BHSDX", "BBSD", "bhsd", "BH\u{e9}"] {
            assert!(Layout::parse(text).is_err(), "{text}");
        }
    }
}
