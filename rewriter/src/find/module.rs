//! Isolating the attention module: its sources (the hidden state that feeds the projections, one per stream), its sinks
//! (the output projections' results), and nothing inside that the batch or the rest of the graph could trip over.

use super::Reason;
use super::anchor::Core;
use super::batch::{Batch, leads};
use super::inputs::Inputs;
use super::sink;
use super::source::{Dependence, is_weight};
use super::target::{self, Target};
use crate::onnx::{Graph, Node, elem_type};
use crate::shapes::{self, BATCH, COPY, Dim, Facts, LAYOUT, PICK, RESHAPE, SIZE, Value};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// A module that can run inside an `If` and on any number of batch rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// What feeds the projections, one value per stream.
    pub sources: Vec<String>,
    /// The results, one value per stream.
    pub sinks: Vec<String>,
    /// Side inputs that carry the batch (rotary tables of each row): their rows are selected as the sources' are.
    pub selected: Vec<String>,
    /// Nodes to move into the branch, in order. The attention core's own nodes are not among them.
    pub inside: BTreeSet<usize>,
    /// Nodes inside whose results are used outside too: they stay where they are and run again inside.
    pub duplicated: BTreeSet<usize>,
    /// `Reshape` and `Expand` nodes inside that get another shape, because theirs has the batch in it.
    pub retargeted: BTreeMap<usize, Target>,
    /// Whether the module ends in output projections; without one AST reuses the core's result.
    pub projects_out: bool,
}

/// What isolating a module looks at.
pub struct Scene<'a> {
    pub graph: &'a Graph,
    pub facts: &'a Facts,
    pub batch: &'a Batch,
    pub dependence: &'a Dependence,
    pub inputs: &'a Inputs,
}

type Retargeted = BTreeMap<usize, Target>;

/// The module around `core`, whose q, k and v are projections of `sources`.
///
/// # Errors
/// Why the region cannot be isolated; the core can still be replaced.
pub fn isolate(scene: &Scene, core: &Core, sources: &[String]) -> Result<Module, Reason> {
    let &Scene {
        graph,
        facts,
        batch,
        ..
    } = scene;
    let label = graph.nodes[core.anchor].label();
    let refuse = |text: String| Err(Reason::new(text, [label]));
    let sinks = sink::find(scene, core);
    let sources: Vec<String> = sources
        .iter()
        .map(|s| batch_major_source(scene, s))
        .collect();
    for (what, value) in sources
        .iter()
        .map(|s| ("input", s))
        .chain(sinks.values.iter().map(|s| ("result", s)))
    {
        if !batch.has_halves(facts, value) {
            return refuse(format!(
                "the module's {what} `{value}` {} is not known to have the batch outermost",
                facts.show(value)
            ));
        }
        let ty = facts.of(value).elem_type;
        if ty != 0 && ty != core.elem_type {
            return refuse(format!(
                "the module's {what} `{value}` is {}, the attention {}",
                elem_type::name(ty),
                elem_type::name(core.elem_type)
            ));
        }
    }
    let mut retargeted = Retargeted::new();
    let mut inside = region(graph, core, &sources, &sinks.values, &retargeted);
    let selected = match check(scene, &inside, &sources, core, &retargeted) {
        Ok(selected) => selected,
        Err(_) => {
            // Second try: every shape from outside that can be written without the batch is.
            let from_outside = |i: &&usize| {
                let shape = graph.nodes[**i].input(1);
                let producer = shape.and_then(|s| graph.producer_index(s));
                producer.is_none_or(|(p, _)| !inside.contains(&p))
            };
            retargeted = inside
                .iter()
                .filter(|&&i| graph.nodes[i].is("Reshape") || graph.nodes[i].is("Expand"))
                .filter(from_outside)
                .filter_map(|&i| Some((i, target::batch_free(facts, i, &graph.nodes[i])?)))
                .collect();
            inside = region(graph, core, &sources, &sinks.values, &retargeted);
            retargeted.retain(|i, _| inside.contains(i));
            check(scene, &inside, &sources, core, &retargeted)?
        }
    };
    let duplicated = duplicated(graph, facts, core, &sinks.values, &inside)?;
    Ok(Module {
        sources,
        sinks: sinks.values,
        selected: selected.into_iter().collect(),
        inside,
        duplicated,
        retargeted,
        projects_out: sinks.projected,
    })
}

/// `source`, or what it is a transposition of, so that the batch is outermost: sequence-first attention modules turn their
/// input round first.
fn batch_major_source(scene: &Scene, source: &str) -> String {
    let mut at = source;
    while !scene.batch.is_outermost(scene.facts, at) {
        match scene.graph.producer(at) {
            Some((node, 0)) if shapes::is(node, LAYOUT) => match node.input(0) {
                Some(input) => at = input,
                None => return source.to_owned(),
            },
            _ => return source.to_owned(),
        }
    }
    at.to_owned()
}

/// Inputs of node `index` that remain once `retargeted` shapes are constants.
fn live_inputs<'g>(
    node: &'g Node,
    index: usize,
    retargeted: &Retargeted,
) -> impl Iterator<Item = &'g str> {
    let limit = if matches!(retargeted.get(&index), Some(Target::Constant(_))) {
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

/// Nodes between sources and sinks once the core is one op: ancestors of the sinks that depend on the sources.
fn region(
    graph: &Graph,
    core: &Core,
    sources: &[String],
    sinks: &[String],
    retargeted: &Retargeted,
) -> BTreeSet<usize> {
    let mut ancestors = BTreeSet::new();
    let mut seen: HashSet<&str> = sources.iter().map(String::as_str).collect();
    let mut pending: Vec<&str> = sinks.iter().map(String::as_str).collect();
    while let Some(value) = pending.pop() {
        if !seen.insert(value) {
            continue;
        }
        if value == core.out.value {
            pending.extend(core.reads());
            continue;
        }
        if let Some((index, _)) = graph.producer_index(value) {
            ancestors.insert(index);
            pending.extend(live_inputs(&graph.nodes[index], index, retargeted));
        }
    }
    // File order is topological, so one pass marks what depends on the sources; the core's result does.
    let mut dependent: HashSet<&str> = sources.iter().map(String::as_str).collect();
    dependent.insert(&core.out.value);
    let mut inside = BTreeSet::new();
    for index in ancestors {
        let node = &graph.nodes[index];
        if live_inputs(node, index, retargeted).any(|i| dependent.contains(i)) {
            inside.insert(index);
            dependent.extend(node.proto.output.iter().map(String::as_str));
        }
    }
    inside
}

/// Whether the nodes `inside` compute the same rows whatever rows the sources have, and the side inputs whose rows must be
/// selected for that. Masks are not among them: the op halves them by itself.
fn check(
    scene: &Scene,
    inside: &BTreeSet<usize>,
    sources: &[String],
    core: &Core,
    retargeted: &Retargeted,
) -> Result<BTreeSet<String>, Reason> {
    let &Scene {
        graph,
        facts,
        batch,
        ..
    } = scene;
    let produced: HashSet<&str> = inside
        .iter()
        .flat_map(|&i| graph.nodes[i].proto.output.iter().map(String::as_str))
        .collect();
    let is_inside =
        |v: &str| v == core.out.value || produced.contains(v) || sources.iter().any(|s| s == v);
    let mut selected = BTreeSet::new();
    for operand in [&core.q, &core.k, &core.v] {
        let rows = operand.size(facts, 'B');
        if rows.is_none_or(|d| !d.depends_on(BATCH)) && !batch.is_single() {
            return Err(Reason::new(
                format!(
                    "`{}` {} of the attention core is not known to have the rows of the batch",
                    operand.value,
                    facts.show(&operand.value)
                ),
                [graph.nodes[core.anchor].label()],
            ));
        }
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
        let shape_slot = retargeted.contains_key(&index).then_some(1);
        let mut has_row_table = false;
        for (slot, value) in live_inputs(node, index, retargeted).enumerate() {
            // A patched shape is read with its batch, which is then replaced.
            if is_inside(value) || shape_slot == Some(slot) {
                continue;
            }
            if is_row_table(facts, node, slot, value) {
                has_row_table = true;
                selected.insert(value.to_owned());
            } else if !is_weight(graph, value) && carries_batch(scene, value, node)? {
                selected.insert(value.to_owned());
            }
        }
        if retargeted.contains_key(&index) {
            continue;
        }
        if facts.batch_free_target(index).is_some() || (facts.binds_batch(index) && !has_row_table)
        {
            return Err(baked(node));
        }
        if facts.static_batch.is_some() {
            batch_not_baked_in(facts, node)?;
        } else if target::traced_rows(facts, node) {
            return Err(baked(node));
        }
    }
    Ok(selected)
}

/// Whether `value` has a row for each row of a batch that the exporter baked in, and `node` combines them row by row: a table
/// that was folded into a constant.
fn is_row_table(facts: &Facts, node: &Node, slot: usize, value: &str) -> bool {
    let rows = facts.leading(value).and_then(Dim::known);
    let outermost = Dim::from(1);
    rows.is_some()
        && rows == facts.static_batch
        && leads(facts, node.output(0))
        && shapes::propagate_axis(facts, node, slot, &outermost, 0) == Some(outermost)
        && elem_type::is_supported_float(facts.of(value).elem_type)
}

/// Whether the side input `value` of `node` has rows that must be selected.
fn carries_batch(scene: &Scene, value: &str, node: &Node) -> Result<bool, Reason> {
    let &Scene { facts, batch, .. } = scene;
    let refuse = |text: String| Err(Reason::new(text, [node.label()]));
    match facts.of(value).depends_on_batch() {
        Some(false) => Ok(false),
        None => refuse(format!(
            "it is unknown whether the side input `{value}` carries the batch"
        )),
        Some(true)
            if batch.is_outermost(facts, value)
                && elem_type::is_supported_float(facts.of(value).elem_type) =>
        {
            Ok(true)
        }
        Some(true) => refuse(format!(
            "the side input `{value}` {} carries the batch",
            facts.show(value)
        )),
    }
}

/// For graphs exported with a fixed batch: `node` must not have it in a constant.
fn batch_not_baked_in(facts: &Facts, node: &Node) -> Result<(), Reason> {
    let rows = |v: &str| leads(facts, v);
    let baked = match node.op() {
        "Reshape" => {
            let target = node.input(1).map(|t| facts.of(t)).unwrap_or_default();
            rows(node.output(0))
                && target
                    .known_ints()
                    .is_none_or(|t| t.first().is_some_and(|&d| d > 0))
                && !matches!(target.value, Some(Value::Ints(v)) if v.iter().any(|d| d.depends_on(BATCH)))
        }
        "Expand" | "Tile" | "ConstantOfShape" => rows(node.output(0)),
        "Slice" | "Split" | "Gather" => {
            node.input(0).is_some_and(rows)
                && node.input(0).and_then(|i| facts.leading(i)) != facts.leading(node.output(0))
        }
        _ => false,
    };
    if baked {
        Err(self::baked(node))
    } else {
        Ok(())
    }
}

fn baked(node: &Node) -> Reason {
    Reason::new(
        "the exporter baked the batch into a constant here",
        [node.label()],
    )
}

/// Nodes `inside` that the outside still needs: cheap ones may run twice.
fn duplicated(
    graph: &Graph,
    facts: &Facts,
    core: &Core,
    sinks: &[String],
    inside: &BTreeSet<usize>,
) -> Result<BTreeSet<usize>, Reason> {
    let dead = dead_without(graph, core);
    let mut duplicated = BTreeSet::new();
    // Backwards, so that what a duplicate needs outside becomes a duplicate too.
    for &index in inside.iter().rev() {
        let node = &graph.nodes[index];
        for output in &node.proto.output {
            if output.is_empty() || sinks.contains(output) {
                continue;
            }
            let outside = graph.consumers(output).iter().find(|&&user| {
                (!inside.contains(&user) && !dead.contains(&user)) || duplicated.contains(&user)
            });
            if graph.is_output(output) || outside.is_some() {
                if !is_cheap(facts, node) {
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
fn is_cheap(facts: &Facts, node: &Node) -> bool {
    let is_size = |value: &String| {
        let fact = facts.of(value);
        matches!(
            fact.elem_type,
            elem_type::INT32 | elem_type::INT64 | elem_type::BOOL
        ) && fact.rank().is_some_and(|r| r <= 1)
    };
    node.domain().is_empty()
        && (shapes::is(node, COPY | RESHAPE | PICK | SIZE) || node.proto.output.iter().all(is_size))
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
    let kept: HashSet<&str> = core.reads().collect();
    sweep_dead(graph, &mut dead, &kept, &BTreeMap::new());
    dead
}

/// Extends `dead` upstream: a node is dead when all its results that were used are used by dead nodes only. A node in
/// `retargeted` with a constant shape no longer uses the one it was exported with.
pub fn sweep_dead(
    graph: &Graph,
    dead: &mut BTreeSet<usize>,
    kept: &HashSet<&str>,
    retargeted: &Retargeted,
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
            // All inputs of a consumer are live, unless its shape became a constant; looking through them takes the square of their number.
            let reshaped = |user| matches!(retargeted.get(&user), Some(Target::Constant(_)));
            let uses = |user: usize| {
                !dead.contains(&user)
                    && (!reshaped(user)
                        || live_inputs(&graph.nodes[user], user, retargeted).any(|i| i == o))
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
