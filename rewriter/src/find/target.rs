//! Shape vectors that have the batch in them, and how to write them without it.

use super::batch::leads;
use crate::onnx::Node;
use crate::shapes::{BATCH, Dim, Facts, Value};

/// What a `Reshape` or `Expand` inside a module gets instead of the shape it was exported with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A constant; 0 copies the input's size (`allowzero` is dropped).
    Constant(Vec<i64>),
    /// The exported shape at run time, with these elements replaced.
    Patched(Vec<Option<i64>>),
}

/// A shape for the `Reshape` or `Expand` `node` that works for any number of rows.
pub fn batch_free(facts: &Facts, index: usize, node: &Node) -> Option<Target> {
    if let Some(target) = facts.batch_free_target(index) {
        return Some(Target::Constant(target.to_vec()));
    }
    let Some(Value::Ints(target)) = facts.of(node.input(1)?).value else {
        return None;
    };
    if node.is("Expand") {
        return expand(facts, node, &target);
    }
    if traced_rows(facts, node) {
        return None;
    }
    let input = facts.shape(node.input(0)?)?;
    let output = facts.shape(node.output(0))?;
    let allow_zero = node.int("allowzero") == Some(1);
    let mut free = Vec::with_capacity(target.len());
    for (i, dim) in target.iter().enumerate() {
        let known = dim
            .known()
            .filter(|&size| output.get(i) == Some(dim) || size == -1 || (size == 0 && !allow_zero));
        free.push(match known {
            Some(size) => Some(size),
            None if input.get(i) == Some(dim) => Some(0),
            None if dim.depends_on(BATCH) => Some(-1),
            None => None,
        });
    }
    // One -1 at most: elsewhere it is the size that it stands for.
    if free.iter().filter(|f| **f == Some(-1)).count() > 1 {
        for (i, dim) in target.iter().enumerate() {
            if dim.known() == Some(-1) {
                free[i] = Some(output.get(i)?.known()?);
            }
        }
    }
    if free.iter().filter(|f| **f == Some(-1)).count() > 1 {
        return None;
    }
    if free.iter().all(Option::is_some) {
        return Some(Target::Constant(free.into_iter().flatten().collect()));
    }
    match free.iter().filter(|f| f.is_none()).count() {
        // What is left to infer may be inferred.
        1 if !free.contains(&Some(-1)) => Some(Target::Constant(
            free.into_iter().map(|f| f.unwrap_or(-1)).collect(),
        )),
        // A literal that is not the output's size is a batch the exporter baked in: it must not stay.
        _ if target
            .iter()
            .zip(&free)
            .any(|(dim, f)| f.is_none() && dim.known().is_some()) =>
        {
            None
        }
        _ => Some(Target::Patched(free)),
    }
}

/// For graphs whose batch is said to be dynamic: a `Reshape` that turns the batch into a literal number of rows all the same,
/// as TorchScript does with shapes that Python computed.
pub fn traced_rows(facts: &Facts, node: &Node) -> bool {
    let rows_in = node.input(0).is_some_and(|v| leads(facts, v));
    let literal_out = facts
        .leading(node.output(0))
        .and_then(|d| d.known())
        .is_some_and(|n| n > 1);
    // Elsewhere in the result the batch is whole: it only lies behind other axes. Where it was outermost before, it cannot.
    let outermost = Dim::from(BATCH);
    let is_outermost = node.input(0).and_then(|v| facts.leading(v)) == Some(&outermost);
    let whole = !is_outermost
        && facts.shape(node.output(0)).is_some_and(|s| {
            s.iter().any(|d| {
                d.depends_on(BATCH) && d.over(&outermost).is_some_and(|rest| rest.is_whole())
            })
        });
    node.is("Reshape") && rows_in && literal_out && !whole
}

/// Sizes that the input already has need not be named: 1 leaves them.
fn expand(facts: &Facts, node: &Node, target: &[Dim]) -> Option<Target> {
    let input = facts.shape(node.input(0)?)?;
    let offset = target.len().checked_sub(input.len());
    let replaced: Vec<Option<i64>> = target
        .iter()
        .enumerate()
        .map(|(i, dim)| {
            let has = offset
                .and_then(|o| input.get(i.checked_sub(o)?))
                .is_some_and(|d| d == dim);
            if has { Some(1) } else { dim.known() }
        })
        .collect();
    let batch_is_gone = target
        .iter()
        .zip(&replaced)
        .all(|(dim, r)| r.is_some() || !dim.depends_on(BATCH));
    if !batch_is_gone {
        return None;
    }
    Some(match replaced.iter().copied().collect::<Option<Vec<_>>>() {
        Some(all) => Target::Constant(all),
        None => Target::Patched(replaced),
    })
}
