//! Parts of a tensor along one axis: the results of a Split, or Slices side by side.

use crate::onnx::{Graph, Node};
use crate::shapes::{self, Dim, Facts, Value};

/// The tensor that is cut, and which part of it this is.
struct Part<'g> {
    of: &'g str,
    cut: Cut,
}

enum Cut {
    /// One of the results of the Split with this index.
    Split { node: usize, slot: usize },
    /// From one bound to the other, as a Slice names them.
    Slice { from: Dim, to: Dim },
}

/// The tensor that all of `values` are cut from along `axis`, whichever parts they are.
pub fn common<'g>(
    graph: &'g Graph,
    facts: &Facts,
    values: &[&str],
    axis: usize,
) -> Option<&'g str> {
    let parts = all(graph, facts, values, axis)?;
    let of = parts.first()?.of;
    parts.iter().all(|p| p.of == of).then_some(of)
}

/// The tensor that `values` are together: all of its parts along `axis`, in order.
pub fn whole<'g>(graph: &'g Graph, facts: &Facts, values: &[&str], axis: usize) -> Option<&'g str> {
    let of = common(graph, facts, values, axis)?;
    let parts = all(graph, facts, values, axis)?;
    let is_whole = match &parts[0].cut {
        Cut::Split { node, .. } => are_results(graph, &parts, *node),
        Cut::Slice { .. } => are_side_by_side(&parts, facts.shape(of)?.get(axis)?),
    };
    is_whole.then_some(of)
}

fn all<'g>(graph: &'g Graph, facts: &Facts, values: &[&str], axis: usize) -> Option<Vec<Part<'g>>> {
    values.iter().map(|v| part(graph, facts, v, axis)).collect()
}

fn part<'g>(graph: &'g Graph, facts: &Facts, value: &str, axis: usize) -> Option<Part<'g>> {
    let (index, slot) = graph.producer_index(value)?;
    let node = &graph.nodes[index];
    let of = node.input(0)?;
    let rank = facts.shape(of)?.len();
    let along = |a: i64| shapes::axis(a, rank) == Some(axis);
    if node.is("Split") {
        let cut = Cut::Split { node: index, slot };
        return along(node.int("axis").unwrap_or(0)).then_some(Part { of, cut });
    }
    if !node.is("Slice") {
        return None;
    }
    let axes = sizes(facts, node, "axes", 3).or_else(|| {
        // Without axes they are the first ones.
        (node.input(3).is_none()).then(|| vec![Dim::from(0)])
    })?;
    let steps = sizes(facts, node, "", 4);
    let (starts, ends) = (
        sizes(facts, node, "starts", 1)?,
        sizes(facts, node, "ends", 2)?,
    );
    let one_by_one = match (node.input(4), &steps) {
        (None, _) => true,
        (Some(_), Some(steps)) => steps.iter().all(|s| s.known() == Some(1)),
        (Some(_), None) => false,
    };
    match (axes.as_slice(), starts.as_slice(), ends.as_slice()) {
        ([at], [from], [to]) if one_by_one && at.known().is_some_and(along) => {
            let (from, to) = (from.clone(), to.clone());
            let cut = Cut::Slice { from, to };
            Some(Part { of, cut })
        }
        _ => None,
    }
}

/// What `node` is given by an attribute (before opset 10) or an input.
fn sizes(facts: &Facts, node: &Node, attribute: &str, input: usize) -> Option<Vec<Dim>> {
    if let Some(given) = node.ints(attribute) {
        return Some(given.iter().map(|&n| n.into()).collect());
    }
    match facts.of(node.input(input)?).value? {
        Value::Ints(given) => Some(given),
        Value::Floats(_) => None,
    }
}

/// Whether `parts` are all results of the Split `node`, in order.
fn are_results(graph: &Graph, parts: &[Part], node: usize) -> bool {
    let is_next = |(place, part): (usize, &Part)| match part.cut {
        Cut::Split { node: n, slot } => n == node && slot == place,
        Cut::Slice { .. } => false,
    };
    graph.nodes[node].proto.output.len() == parts.len() && parts.iter().enumerate().all(is_next)
}

/// Whether `parts` are Slices of an axis of `size`, each beginning where the one before it ends.
fn are_side_by_side(parts: &[Part], size: &Dim) -> bool {
    let mut bounds = Vec::with_capacity(parts.len());
    for part in parts {
        match &part.cut {
            Cut::Slice { from, to } => {
                bounds.push((counted(from, size), counted(to, size)));
            }
            Cut::Split { .. } => return false,
        }
    }
    let begins = bounds.first().and_then(|b| b.0.known()) == Some(0);
    let ends = bounds.last().is_some_and(|b| b.1 == *size);
    let meet = bounds.windows(2).all(|pair| pair[0].1 == pair[1].0);
    let inner: Vec<Option<i64>> = bounds[1..].iter().map(|b| b.0.known()).collect();
    // One bound cuts an axis in two wherever it is; of several each must be known not to lie before the last.
    let sorted =
        inner.len() == 1 || inner.iter().all(|n| n.is_some_and(|n| n >= 0)) && inner.is_sorted();
    begins && ends && meet && sorted
}

/// A bound that counts from the end, or lies beyond it, as what it stands for in an axis of `size`.
fn counted(bound: &Dim, size: &Dim) -> Dim {
    match (bound.known(), size.known()) {
        (Some(at), _) if at >= i64::from(i32::MAX) => size.clone(),
        (Some(at), Some(size)) if at < 0 => at.saturating_add(size).max(0).into(),
        (Some(at), Some(size)) => at.min(size).into(),
        _ => bound.clone(),
    }
}
