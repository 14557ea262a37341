//! Axes on their way through the graph: where one of interest lies in a tensor's memory, as the product of all sizes outside it.
//!
//! A tensor is a row-major list. An axis keeps its offset in that list through every Reshape. Fails closed: behind an operator without a rule an axis has none. The rules are in
//! [`super::rules`].

use super::dim::Dim;
use super::infer::Facts;
use super::rules;
use crate::onnx::Node;

/// The product of all dimensions outside the axis; 1 = outermost.
pub type AxisOffset = Dim;

/// The axis of `shape` in which `place` begins, and what of that axis is still outside it.
fn axis_of(shape: &[Dim], place: &AxisOffset) -> Option<(usize, Dim)> {
    let one = Dim::from(1);
    let mut outer = one.clone();
    let mut found = None;
    for (axis, dim) in shape.iter().enumerate() {
        // The last axis that begins at the place: axes of size 1 before it do not matter.
        if outer == *place {
            if *dim == one && axis + 1 < shape.len() {
                outer = outer.times(dim)?;
                found = Some((axis, one.clone()));
                continue;
            }
            return Some((axis, one));
        }
        outer = outer.times(dim)?;
    }
    if found.is_some() {
        return found;
    }
    // Inside an axis: [H·B, …] has the batch after H.
    let mut outer = one.clone();
    for (axis, dim) in shape.iter().enumerate() {
        let inner = place.over(&outer)?;
        let rest = dim.over(&inner)?;
        if inner.is_whole() && rest.is_whole() && inner != *dim {
            return Some((axis, inner));
        }
        outer = outer.times(dim)?;
    }
    None
}

/// The axis of `value` that starts exactly at `place`.
pub fn axis_at(facts: &Facts, value: &str, place: &AxisOffset) -> Option<usize> {
    let (axis, inner) = axis_of(facts.shape(value)?, place)?;
    (inner.known() == Some(1)).then_some(axis)
}

/// An axis on its way through a node; what axis rules look at.
pub struct AxisStep<'a> {
    pub facts: &'a Facts,
    pub node: &'a Node,
    /// The input that has the axis, its shape, and the axis' place there.
    pub slot: usize,
    pub input: &'a [Dim],
    pub place: &'a AxisOffset,
    /// The output of interest and its shape, if that is known.
    pub out: usize,
    pub output: Option<&'a [Dim]>,
}

impl AxisStep<'_> {
    /// The axis of the input, and what of it is still outside the place.
    pub fn at(&self) -> Option<(usize, Dim)> {
        axis_of(self.input, self.place)
    }

    /// The result has the axis at `to`, behind `inner` of it.
    pub fn moved(&self, to: usize, inner: &Dim) -> Option<AxisOffset> {
        Dim::product(self.output?.get(..to)?)?.times(inner)
    }

    /// Axes count from the end.
    pub fn aligned(&self) -> Option<AxisOffset> {
        let (axis, inner) = self.at()?;
        let axis = (axis + self.output?.len()).checked_sub(self.input.len())?;
        self.moved(axis, &inner)
    }

    /// The axis stays where it is unless its size changes: then the result has another sequence of its elements.
    pub fn unless_resized(&self) -> Option<AxisOffset> {
        let (axis, inner) = self.at()?;
        let output = self.output?;
        (output.len() == self.input.len() && output.get(axis) == self.input.get(axis))
            .then(|| self.moved(axis, &inner))?
    }
}

/// Where the axis that lies at `place` in input `slot` of `node` lies in its output `out`; `None` where it is lost.
pub fn propagate_axis(
    facts: &Facts,
    node: &Node,
    slot: usize,
    place: &AxisOffset,
    out: usize,
) -> Option<AxisOffset> {
    match trace_axis(facts, node, slot, place, out) {
        AxisFate::At(place) => Some(place),
        AxisFate::Ends | AxisFate::Lost => None,
    }
}

/// What becomes of an axis in a node.
#[derive(Clone, Debug, PartialEq)]
pub enum AxisFate {
    /// It lies at this place of the result.
    At(AxisOffset),
    /// It is summed over, or one element of it is picked: the result has no such axis.
    Ends,
    /// Nobody knows.
    Lost,
}

/// What becomes of the axis that lies at `place` in input `slot` of `node`, in its output `out`.
pub fn trace_axis(
    facts: &Facts,
    node: &Node,
    slot: usize,
    place: &AxisOffset,
    out: usize,
) -> AxisFate {
    let Some(input) = node.input(slot).and_then(|i| facts.shape(i)) else {
        return AxisFate::Lost;
    };
    let step = AxisStep {
        facts,
        node,
        slot,
        input,
        place,
        out,
        output: facts.shape(node.output(out)),
    };
    match rules::propagate(&step) {
        Some(place) => AxisFate::At(place),
        None if rules::ends(&step) => AxisFate::Ends,
        None => AxisFate::Lost,
    }
}

/// As [`propagate_axis`], for an axis whose elements must know nothing of one another, such as rows of a batch.
pub fn propagate_axis_apart(
    facts: &Facts,
    node: &Node,
    slot: usize,
    place: &AxisOffset,
    out: usize,
) -> Option<AxisOffset> {
    let input = facts.shape(node.input(slot)?)?;
    let (axis, _) = axis_of(input, place)?;
    if rules::mixes(node, axis, input.len()) {
        return None;
    }
    propagate_axis(facts, node, slot, place, out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shapes::Symbols;

    #[test]
    fn places_are_found_in_folded_axes() {
        let mut symbols = Symbols::default();
        let batch = Dim::from(symbols.named("batch"));
        let tokens = Dim::from(symbols.named("tokens"));
        let [one, heads, width]: [Dim; 3] = [1.into(), 4.into(), 18.into()];
        let folded = |a: &Dim, b: &Dim| a.times(b).unwrap();
        // [tokens, batch·heads, width]
        let shape = [tokens.clone(), folded(&batch, &heads), width.clone()];
        assert_eq!(axis_of(&shape, &tokens), Some((1, one.clone())));
        // [heads·batch, tokens, width]: the batch lies behind the heads in one axis.
        let shape = [folded(&heads, &batch), tokens.clone(), width.clone()];
        assert_eq!(axis_of(&shape, &heads), Some((0, heads.clone())));
        // [batch, tokens, width]
        let shape = [batch.clone(), tokens.clone(), width];
        assert_eq!(axis_of(&shape, &one), Some((0, one.clone())));
        assert_eq!(axis_of(&shape, &batch), Some((1, one)));
    }
}
