//! Isolating the attention module: one source (the hidden state that feeds the projections), one sink (the output
//! projection's result), and nothing inside that the batch or the rest of the graph could trip over.

use super::Reason;
use super::anchor::Core;
use super::source::{is_weight, projected};
use crate::onnx::{Graph, Node};
use crate::shapes::{BATCH, Facts, Value};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// A module that can run inside an `If` and on any number of batch rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    pub source: String,
    pub sink: String,
    /// Nodes to move into the branch, in order. The attention core's own nodes are not among them.
    pub inside: BTreeSet<usize>,
    /// Nodes inside whose results are used outside too: they stay where they are and run again inside.
    pub duplicated: BTreeSet<usize>,
    /// `Reshape` nodes inside that get a constant target, because theirs has the batch in it.
    pub reshaped: BTreeMap<usize, Vec<i64>>,
    /// Whether the module ends in an output projection; without one AST reuses the core's result.
    pub projects_out: bool,
}

/// The module around `core`, whose q, k and v are projections of `source`.
///
/// # Errors
/// Why the region cannot be isolated; the core can still be replaced.
pub fn isolate(graph: &Graph, facts: &Facts, core: &Core, source: &str) -> Result<Module, Reason> {
    let label = graph.nodes[core.anchor].label();
    let (sink, projects_out) = sink(graph, core);
    let batched = facts
        .shape(source)
        .and_then(|s| s.first())
        .map(|d| d.depends_on(BATCH));
    match batched {
        Some(true) => {}
        Some(false) if batch_is_one(graph, facts) => {}
        Some(false) => {
            return Err(Reason::new(
                format!(
                    "the first axis of the module's input `{source}` {} is not the batch",
                    facts.show(source)
                ),
                [label],
            ));
        }
        None => {
            return Err(Reason::new(
                format!("the shape of the module's input `{source}` is unknown"),
                [label],
            ));
        }
    }
    let (source_type, sink_type) = (facts.of(source).elem_type, facts.of(&sink).elem_type);
    if source_type != 0 && sink_type != 0 && source_type != sink_type {
        return Err(Reason::new(
            format!("the module's input `{source}` and result `{sink}` have different types"),
            [label],
        ));
    }
    let mut reshaped = BTreeMap::new();
    let mut inside = region(graph, core, source, &sink, &reshaped);
    if check(graph, facts, &inside, source, core, &reshaped).is_err() {
        // Second try: every Reshape whose target can be written without the batch gets such a target.
        reshaped = inside
            .iter()
            .filter(|&&i| graph.nodes[i].is("Reshape"))
            .filter_map(|&i| Some((i, batch_free_target(facts, i, &graph.nodes[i])?)))
            .collect();
        inside = region(graph, core, source, &sink, &reshaped);
        check(graph, facts, &inside, source, core, &reshaped)?;
        reshaped.retain(|i, _| inside.contains(i));
    }
    let duplicated = duplicated(graph, core, &sink, &inside)?;
    Ok(Module {
        source: source.to_owned(),
        sink,
        inside,
        duplicated,
        reshaped,
        projects_out,
    })
}

/// A model exported for a single row has no halves, so nothing can depend on their number.
fn batch_is_one(graph: &Graph, facts: &Facts) -> bool {
    facts.static_batch.is_none()
        && !graph.inputs.iter().any(|i| {
            facts
                .shape(&i.name)
                .is_some_and(|s| s.iter().any(|d| d.depends_on(BATCH)))
        })
}

/// Downstream from the core: layout, one product with a weight, its bias.
fn sink(graph: &Graph, core: &Core) -> (String, bool) {
    let mut at = core.out.value.clone();
    while let Some(node) = data_consumer(graph, &at) {
        let layout = node.domain().is_empty()
            && matches!(
                node.op(),
                "Reshape"
                    | "Transpose"
                    | "Cast"
                    | "Identity"
                    | "Squeeze"
                    | "Unsqueeze"
                    | "Flatten"
                    | "Dropout"
            );
        if layout {
            if node.input(0) != Some(at.as_str()) {
                break;
            }
            at = node.output(0).to_owned();
            continue;
        }
        if projected(graph, node) != Some(at.as_str()) || node.is("Conv") {
            break;
        }
        let projection = node.output(0);
        let bias = data_consumer(graph, projection).filter(|add| {
            add.is("Add")
                && add
                    .proto
                    .input
                    .iter()
                    .all(|i| i == projection || is_weight(graph, i))
        });
        return (
            bias.map_or(projection, |add| add.output(0)).to_owned(),
            true,
        );
    }
    (core.out.value.clone(), false)
}

/// The one node that uses `value` as data; reading its shape does not count.
fn data_consumer<'g>(graph: &'g Graph, value: &str) -> Option<&'g Node> {
    if graph.is_output(value) {
        return None;
    }
    let mut users = graph
        .consumers(value)
        .iter()
        .map(|&i| &graph.nodes[i])
        .filter(|n| !n.is("Shape"));
    let first = users.next()?;
    users.next().is_none().then_some(first)
}

/// Inputs of node `index` that remain once `reshaped` targets are constants.
fn live_inputs<'g>(
    node: &'g Node,
    index: usize,
    reshaped: &BTreeMap<usize, Vec<i64>>,
) -> impl Iterator<Item = &'g str> {
    let limit = if reshaped.contains_key(&index) {
        1
    } else {
        usize::MAX
    };
    node.proto
        .input
        .iter()
        .chain(&node.captured)
        .take(limit)
        .map(String::as_str)
        .filter(|i| !i.is_empty())
}

/// Nodes between `source` and `sink` once the core is one op: ancestors of the sink that depend on the source.
fn region(
    graph: &Graph,
    core: &Core,
    source: &str,
    sink: &str,
    reshaped: &BTreeMap<usize, Vec<i64>>,
) -> BTreeSet<usize> {
    let core_inputs = [&core.q.value, &core.k.value, &core.v.value];
    let mut ancestors = BTreeSet::new();
    let mut seen: HashSet<&str> = HashSet::new();
    let mut pending = vec![sink];
    while let Some(value) = pending.pop() {
        if value == source || !seen.insert(value) {
            continue;
        }
        if value == core.out.value {
            pending.extend(core_inputs.iter().map(|v| v.as_str()));
            pending.extend(core.mask.as_deref());
            continue;
        }
        if let Some((index, _)) = graph.producer_index(value) {
            ancestors.insert(index);
            pending.extend(live_inputs(&graph.nodes[index], index, reshaped));
        }
    }
    // File order is topological, so one pass marks what depends on the source; the core's result does.
    let mut dependent: HashSet<&str> = HashSet::from([source, core.out.value.as_str()]);
    let mut inside = BTreeSet::new();
    for index in ancestors {
        let node = &graph.nodes[index];
        if live_inputs(node, index, reshaped).any(|i| dependent.contains(i)) {
            inside.insert(index);
            dependent.extend(node.proto.output.iter().map(String::as_str));
        }
    }
    inside
}

/// Whether the nodes `inside` compute the same rows whatever rows the source has.
fn check(
    graph: &Graph,
    facts: &Facts,
    inside: &BTreeSet<usize>,
    source: &str,
    core: &Core,
    reshaped: &BTreeMap<usize, Vec<i64>>,
) -> Result<(), Reason> {
    let produced: HashSet<&str> = inside
        .iter()
        .flat_map(|&i| graph.nodes[i].proto.output.iter().map(String::as_str))
        .collect();
    let is_inside = |v: &str| v == source || v == core.out.value || produced.contains(v);
    for operand in [&core.q, &core.k, &core.v] {
        if !is_inside(&operand.value) {
            return Err(Reason::new(
                format!(
                    "`{}` of the attention core does not come from the module's input",
                    operand.value
                ),
                [graph.nodes[core.anchor].label()],
            ));
        }
    }
    for &index in inside {
        let node = &graph.nodes[index];
        if node.has_subgraph() {
            return Err(Reason::new(
                "a node inside the module has a subgraph",
                [node.label()],
            ));
        }
        for value in live_inputs(node, index, reshaped) {
            if is_inside(value) || is_weight(graph, value) {
                continue;
            }
            match facts.of(value).depends_on_batch() {
                Some(false) => {}
                Some(true) => {
                    return Err(Reason::new(
                        format!(
                            "the side input `{value}` {} carries the batch",
                            facts.show(value)
                        ),
                        [node.label()],
                    ));
                }
                None => {
                    return Err(Reason::new(
                        format!("it is unknown whether the side input `{value}` carries the batch"),
                        [node.label()],
                    ));
                }
            }
        }
        if facts.static_batch.is_some() && !reshaped.contains_key(&index) {
            batch_not_baked_in(facts, index, node)?;
        }
    }
    Ok(())
}

/// For graphs exported with a fixed batch: `node` must not have it in a constant.
fn batch_not_baked_in(facts: &Facts, index: usize, node: &Node) -> Result<(), Reason> {
    let rows = |v: &str| {
        facts
            .shape(v)
            .and_then(|s| s.first())
            .is_some_and(|d| d.depends_on(BATCH))
    };
    let baked = match node.op() {
        "Reshape" => {
            facts.batch_free_target(index).is_some()
                || {
                    let target = node.input(1).map(|t| facts.of(t)).unwrap_or_default();
                    rows(node.output(0))
                        && target
                            .known_ints()
                            .is_none_or(|t| t.first().is_some_and(|&d| d > 0))
                        && !matches!(target.value, Some(Value::Ints(v)) if v.iter().any(|d| d.depends_on(BATCH)))
                }
        }
        "Expand" | "Tile" | "ConstantOfShape" => rows(node.output(0)),
        "Slice" | "Split" | "Gather" => {
            node.input(0).is_some_and(rows)
                && node.input(0).and_then(|i| facts.shape(i)?.first().cloned())
                    != facts.shape(node.output(0)).and_then(|s| s.first().cloned())
        }
        _ => false,
    };
    if baked {
        return Err(Reason::new(
            "the exporter baked the batch into a constant here",
            [node.label()],
        ));
    }
    Ok(())
}

/// A constant target for the `Reshape` `node` that works for any number of rows.
fn batch_free_target(facts: &Facts, index: usize, node: &Node) -> Option<Vec<i64>> {
    if let Some(target) = facts.batch_free_target(index) {
        return Some(target.to_vec());
    }
    let Some(Value::Ints(target)) = facts.of(node.input(1)?).value else {
        return None;
    };
    let input = facts.shape(node.input(0)?)?;
    let output = facts.shape(node.output(0))?;
    let allow_zero = node.int("allowzero") == Some(1);
    let mut free = Vec::with_capacity(target.len());
    for (i, dim) in target.iter().enumerate() {
        let known = dim.known().filter(|_| {
            output.get(i) == Some(dim) || dim.known() == Some(-1) || dim.known() == Some(0)
        });
        free.push(match known {
            Some(size) => size,
            None if !allow_zero && input.get(i) == Some(dim) => 0,
            None => -1,
        });
    }
    (free.iter().filter(|&&d| d == -1).count() <= 1).then_some(free)
}

/// Nodes `inside` that the outside still needs: cheap ones may run twice.
fn duplicated(
    graph: &Graph,
    core: &Core,
    sink: &str,
    inside: &BTreeSet<usize>,
) -> Result<BTreeSet<usize>, Reason> {
    let dead = dead_without(graph, core);
    let mut duplicated = BTreeSet::new();
    // Backwards, so that what a duplicate needs outside becomes a duplicate too.
    for &index in inside.iter().rev() {
        let node = &graph.nodes[index];
        for output in &node.proto.output {
            if output.is_empty() || *output == sink {
                continue;
            }
            let outside = graph.consumers(output).iter().find(|&&user| {
                (!inside.contains(&user) && !dead.contains(&user)) || duplicated.contains(&user)
            });
            if graph.is_output(output) || outside.is_some() {
                if !is_cheap(node) {
                    let user = outside.map_or("the model's outputs", |&u| graph.nodes[u].label());
                    return Err(Reason::new(
                        format!("`{output}` inside the module is also used outside, by {user}"),
                        [node.label()],
                    ));
                }
                duplicated.insert(index);
            }
        }
    }
    Ok(duplicated)
}

/// Shape arithmetic costs nothing to run twice.
fn is_cheap(node: &Node) -> bool {
    node.domain().is_empty()
        && matches!(
            node.op(),
            "Shape"
                | "Gather"
                | "Slice"
                | "Unsqueeze"
                | "Squeeze"
                | "Concat"
                | "Cast"
                | "Size"
                | "Constant"
        )
}

/// Nodes whose results nobody needs any more once the op produces the core's result. Nodes that were unused before are
/// not among them.
pub fn dead_without(graph: &Graph, core: &Core) -> BTreeSet<usize> {
    let mut dead = BTreeSet::new();
    let Some((first, _)) = graph.producer_index(&core.out.value) else {
        return dead;
    };
    dead.insert(first);
    // What the op reads stays.
    let kept = [
        Some(&core.q.value),
        Some(&core.k.value),
        Some(&core.v.value),
        core.mask.as_ref(),
    ];
    let kept: HashSet<&str> = kept.into_iter().flatten().map(String::as_str).collect();
    sweep_dead(graph, &mut dead, &kept, &BTreeMap::new());
    dead
}

/// Extends `dead` upstream: a node is dead when all its results that were used are used by dead nodes only. A `Reshape` in
/// `reshaped` has a constant target and no longer uses the one it was exported with.
pub fn sweep_dead(
    graph: &Graph,
    dead: &mut BTreeSet<usize>,
    kept: &HashSet<&str>,
    reshaped: &BTreeMap<usize, Vec<i64>>,
) {
    for index in (0..graph.nodes.len()).rev() {
        if dead.contains(&index) {
            continue;
        }
        let outputs = || {
            graph.nodes[index]
                .proto
                .output
                .iter()
                .filter(|o| !o.is_empty())
        };
        let was_used = outputs().any(|o| !graph.consumers(o).is_empty());
        let needed = outputs().any(|o| {
            let uses = |user: usize| {
                !dead.contains(&user)
                    && live_inputs(&graph.nodes[user], user, reshaped).any(|input| input == o)
            };
            graph.is_output(o)
                || kept.contains(o.as_str())
                || graph.consumers(o).iter().any(|&user| uses(user))
        });
        if was_used && !needed {
            dead.insert(index);
        }
    }
}
