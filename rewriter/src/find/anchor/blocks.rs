//! Attention that an exporter computes in blocks: of heads or rows (q, k and v are cut alike) or of queries (q is cut, each
//! block sees all keys), with the blocks' results put together by a Concat. That is one attention of the whole tensors.
//!
//! What looks like such blocks and cannot be shown to be them stays apart, with the reason.

use super::mask::{Mask, Term};
use super::{Core, finish, part};
use crate::find::Reason;
use crate::find::operand::{Operand, Prep};
use crate::onnx::{Graph, Node};
use crate::shapes::{self, Facts};
use std::collections::{HashMap, HashSet};

/// A core's result as a Concat reads it: the op's own, or with the heads side by side.
struct Block {
    core: usize,
    out: Operand,
}

/// Puts together what belongs together in `cores`, which are by their anchors.
pub fn join(graph: &Graph, facts: &Facts, cores: &mut Vec<(usize, Result<Core, Reason>)>) {
    let mut results: HashMap<String, Block> = HashMap::new();
    for (index, (_, core)) in cores.iter().enumerate() {
        if let Ok(core) = core {
            enter(graph, facts, index, core, &mut results);
        }
    }
    let mut gone = HashSet::new();
    // Nodes are in the order of computation, so blocks of blocks come after the blocks.
    for concat in graph.nodes.iter().filter(|n| n.is("Concat")) {
        let inputs = concat.proto.input.iter();
        let found: Vec<Option<&Block>> = inputs.map(|v| results.get(v)).collect();
        let blocks: Vec<&Block> = found.iter().copied().flatten().collect();
        let parts: Vec<(&Core, &Operand)> = blocks
            .iter()
            .filter_map(|b| Some((cores[b.core].1.as_ref().ok()?, &b.out)))
            .collect();
        if parts.len() < 2 {
            continue;
        }
        let complete = found.iter().all(Option::is_some);
        let members: Vec<usize> = blocks.iter().map(|b| b.core).collect();
        match joined(graph, facts, concat, &parts, complete) {
            Ok(core) => {
                enter(graph, facts, members[0], &core, &mut results);
                cores[members[0]] = (core.anchor, Ok(core));
                gone.extend(members[1..].iter().map(|&m| cores[m].0));
            }
            Err(Some(why)) => {
                let text = format!(
                    "one of several attentions whose results are joined, which are not known to be blocks of one: {why}"
                );
                let reason = Reason::new(text, [concat.label()]);
                for member in members {
                    if let Ok(core) = &mut cores[member].1 {
                        core.apart = Some(reason.clone());
                    }
                }
            }
            Err(None) => {}
        }
    }
    cores.retain(|(anchor, _)| !gone.contains(anchor));
}

/// Notes the result of core `index`, in each form that a Concat may read.
fn enter(
    graph: &Graph,
    facts: &Facts,
    index: usize,
    core: &Core,
    results: &mut HashMap<String, Block>,
) {
    let merged = graph
        .only_consumer(&core.out.value)
        .map(|user| &graph.nodes[user])
        .filter(|_| core.out.layout == "BSHD" && core.out.prep.is_empty())
        .and_then(|node| side_by_side(facts, node, core.out.value.as_str(), node.output(0)));
    for out in [Some(core.out.clone()), merged].into_iter().flatten() {
        results.insert(out.value.clone(), Block { core: index, out });
    }
}

/// `[B, S, H·D]` on the other side of the Reshape `node` from `[B, S, H, D]`.
fn side_by_side(facts: &Facts, node: &Node, apart: &str, merged: &str) -> Option<Operand> {
    let (heads, flat) = (facts.shape(apart)?, facts.shape(merged)?);
    let ([b, s, h, d], [b2, s2, c]) = (heads, flat) else {
        return None;
    };
    let is_split = node.is("Reshape") && (b, s) == (b2, s2) && h.times(d).as_ref() == Some(c);
    is_split.then(|| Some(Operand::packed(merged, h.known()?)))?
}

/// The attention whose blocks `parts` are, with their results as `concat` reads them. `complete`: it reads nothing else.
///
/// # Errors
/// Why they are no blocks of one attention; `None` where they do not look like it.
fn joined(
    graph: &Graph,
    facts: &Facts,
    concat: &Node,
    parts: &[(&Core, &Operand)],
    complete: bool,
) -> Result<Core, Option<String>> {
    let outs: Vec<&Operand> = parts.iter().map(|(_, out)| *out).collect();
    let cores: Vec<&Core> = parts.iter().map(|(core, _)| *core).collect();
    let letter = axis_letter(facts, concat, &outs).ok_or(None)?;
    let blocks = Blocks {
        graph,
        facts,
        letter,
    };
    // Casts to a common type come again with the whole.
    let uncast = |operand: &Operand| {
        let mut operand = operand.clone();
        operand.prep.retain(|p| !matches!(p, Prep::Cast(_)));
        operand
    };
    let of = |role: fn(&Core) -> &Operand| -> Vec<Operand> {
        cores.iter().map(|c| uncast(role(c))).collect()
    };
    let cut = blocks.cut(of(|c| &c.q)).ok_or(None)?;
    let refuse = |why: &str| Err(Some(why.to_owned()));
    if !complete {
        return refuse("other values are joined with theirs");
    }
    if outs.iter().any(|o| graph.only_consumer(&o.value).is_none()) {
        return refuse("the result of one is used elsewhere too");
    }
    let Some(q) = blocks.whole(&cut) else {
        return refuse("their q are not the parts of one tensor, all of them and in order");
    };
    let (k, v) = if letter == 'S' {
        match (same(of(|c| &c.k)), same(of(|c| &c.v))) {
            (Some(k), Some(v)) => (k, v),
            _ => return refuse("they do not see the same keys and values"),
        }
    } else {
        match (blocks.along(of(|c| &c.k)), blocks.along(of(|c| &c.v))) {
            (Some(k), Some(v)) if blocks.share_alike(&cores) => (k, v),
            _ => {
                return refuse(
                    "their k and v are not the parts of one tensor, all of them, in order and as those of q",
                );
            }
        }
    };
    let first = cores[0];
    if cores.iter().any(|c| c.scale != first.scale) {
        return refuse("their scales differ");
    }
    if cores.iter().any(|c| c.elem_type != first.elem_type) {
        return refuse("their types differ");
    }
    let Some(mask) = blocks.mask(&cores) else {
        return refuse("their masks are not known to be that of one attention");
    };
    let out = match blocks.prep(&outs) {
        Some(prep) => Operand {
            value: concat.output(0).to_owned(),
            prep,
            layout: outs[0].layout.clone(),
        },
        None => return refuse("their results differ in layout"),
    };
    let whole = Core::seen(first.anchor, [q, k, v, out], first.scale, mask);
    finish(graph, facts, whole).map_err(|reason| Some(reason.text))
}

/// What the axis that `concat` joins is in all of `outs`: rows, heads or queries.
fn axis_letter(facts: &Facts, concat: &Node, outs: &[&Operand]) -> Option<char> {
    let rank = facts.of(concat.output(0)).rank()?;
    let axis = shapes::axis(concat.int("axis")?, rank)?;
    let is_joined = |letter: &char| {
        let found = |o: &&Operand| axis_of(o, *letter) == Some(axis) && o.layout == outs[0].layout;
        outs.iter().all(found)
    };
    "BHS".chars().find(is_joined)
}

/// The axis of the operand's value that holds `letter`, if `prep` leaves that to be seen.
fn axis_of(operand: &Operand, letter: char) -> Option<usize> {
    match operand.prep.as_slice() {
        [] => operand.layout.find(letter),
        // Heads side by side in [B, S, H·D].
        [Prep::SplitHeads(_)] => "BSH".find(letter),
        _ => None,
    }
}

/// The one operand that all of `operands` are.
fn same(operands: Vec<Operand>) -> Option<Operand> {
    let mut all = operands.into_iter();
    let first = all.next()?;
    all.all(|o| o == first).then_some(first)
}

/// Blocks along the axis called `letter`.
struct Blocks<'g> {
    graph: &'g Graph,
    facts: &'g Facts,
    letter: char,
}

impl Blocks<'_> {
    /// `operands`, in the form in which they are parts of one tensor; `None` if there is none.
    fn cut(&self, operands: Vec<Operand>) -> Option<Vec<Operand>> {
        if self.are_cut(&operands) {
            return Some(operands);
        }
        // Cut before the heads were told apart.
        let merged: Option<Vec<Operand>> = operands.iter().map(|o| self.merged(o)).collect();
        merged.filter(|merged| self.are_cut(merged))
    }

    fn are_cut(&self, operands: &[Operand]) -> bool {
        let values: Vec<&str> = operands.iter().map(|o| o.value.as_str()).collect();
        let axis = operands.first().and_then(|o| axis_of(o, self.letter));
        axis.is_some_and(|axis| part::common(self.graph, self.facts, &values, axis).is_some())
    }

    /// The operand before the Reshape that told its heads apart.
    fn merged(&self, operand: &Operand) -> Option<Operand> {
        let (node, _) = self.graph.producer(&operand.value)?;
        let plain = operand.layout == "BSHD" && operand.prep.is_empty();
        let merged = node.input(0).filter(|_| plain)?;
        side_by_side(self.facts, node, &operand.value, merged)
    }

    /// The operand that `operands` are the parts of, all of them and in order.
    fn whole(&self, operands: &[Operand]) -> Option<Operand> {
        let all: Vec<&Operand> = operands.iter().collect();
        let values: Vec<&str> = operands.iter().map(|o| o.value.as_str()).collect();
        let axis = axis_of(&operands[0], self.letter)?;
        let value = part::whole(self.graph, self.facts, &values, axis)?;
        Some(Operand {
            value: value.to_owned(),
            prep: self.prep(&all)?,
            layout: operands[0].layout.clone(),
        })
    }

    /// What has to be done to the whole of `operands`, if that is the same in all.
    fn prep(&self, operands: &[&Operand]) -> Option<Vec<Prep>> {
        let first = operands.first()?;
        if operands.iter().any(|o| o.layout != first.layout) {
            return None;
        }
        let heads = |o: &&Operand| match o.prep.as_slice() {
            [Prep::SplitHeads(heads)] => Some(*heads),
            _ => None,
        };
        if self.letter == 'H' && !first.prep.is_empty() {
            let all: Option<Vec<i64>> = operands.iter().map(heads).collect();
            return Some(vec![Prep::SplitHeads(all?.iter().sum())]);
        }
        let alike = operands.iter().all(|o| o.prep == first.prep);
        alike.then(|| first.prep.clone())
    }

    /// k or v of blocks of heads or rows: cut as q is, or a single head that all of them see.
    fn along(&self, operands: Vec<Operand>) -> Option<Operand> {
        if let Some(cut) = self.cut(operands.clone()) {
            return self.whole(&cut);
        }
        let shared = same(operands)?;
        let size = shared.size(self.facts, self.letter)?;
        (self.letter == 'H' && size.known() == Some(1)).then_some(shared)
    }

    /// Whether each head of k and v is seen by as many heads of q in all blocks.
    fn share_alike(&self, cores: &[&Core]) -> bool {
        let ratio = |core: &Core| {
            let [q, k, v] = [&core.q, &core.k, &core.v].map(|o| o.size(self.facts, self.letter));
            let (q, k, v) = (q?, k?, v?);
            if k == v { q.over(&k) } else { None }
        };
        // A single head of keys may be seen by any number.
        let single = |core: &&Core| core.kv_heads == Some(1);
        let shared = cores.iter().all(single) && same_key(cores);
        let first = ratio(cores[0]);
        shared || (first.is_some() && cores.iter().all(|c| ratio(c) == first))
    }

    /// The mask of the whole: one that does not tell the blocks apart, or whose parts the blocks have.
    fn mask(&self, cores: &[&Core]) -> Option<Mask> {
        let first = &cores[0].mask;
        let rank = cores[0].q.layout.len();
        let from_end = match self.letter {
            'S' => 2,
            'H' => 3,
            _ => rank,
        };
        let alike = |m: &Mask| m.guard == first.guard && m.terms.len() == first.terms.len();
        if !cores.iter().all(|c| alike(&c.mask)) {
            return None;
        }
        let mut terms = Vec::new();
        for (place, term) in first.terms.iter().enumerate() {
            let all: Vec<&Term> = cores.iter().map(|c| &c.mask.terms[place]).collect();
            if !all.iter().all(|t| t.with_value("") == term.with_value("")) {
                return None;
            }
            let values: Vec<&str> = all.iter().map(|t| t.value()).collect();
            let axis = self.facts.shape(values[0])?.len().checked_sub(from_end);
            let is_one = |axis: usize| {
                let size = self.facts.shape(values[0]).and_then(|s| s[axis].known());
                size == Some(1)
            };
            if values.iter().all(|v| *v == values[0]) && axis.is_none_or(is_one) {
                terms.push(term.clone());
            } else {
                terms.push(term.with_value(part::whole(self.graph, self.facts, &values, axis?)?));
            }
        }
        let guard = first.guard;
        Some(Mask { terms, guard })
    }
}

fn same_key(cores: &[&Core]) -> bool {
    cores.iter().all(|c| c.k == cores[0].k && c.v == cores[0].v)
}

#[cfg(test)]
mod tests;
