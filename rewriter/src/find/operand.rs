//! Reading an attention operand further upstream: transposes become a layout, scalar factors become the scale.
//!
//! The op reads q, k and v with any strides, so the exporter's head transposes, its Kᵀ in all spellings and its two
//! √scale multiplications need not run at all.

use crate::onnx::Graph;
use crate::shapes::{Dim, Facts};

/// A tensor the op reads or writes, and what its axes are.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    pub value: String,
    /// One letter per axis: B batch, H head, S token, D channel; rank 3 has B for batch × heads.
    pub layout: String,
    /// The last axis holds this many heads side by side ([B, S, H·D]); lowering splits it.
    pub packed_heads: Option<i64>,
}

impl Operand {
    pub fn new(value: &str, layout: &str) -> Self {
        Self {
            value: value.into(),
            layout: layout.into(),
            packed_heads: None,
        }
    }

    pub fn packed(value: &str, heads: i64) -> Self {
        Self {
            value: value.into(),
            layout: "BSHD".into(),
            packed_heads: Some(heads),
        }
    }

    /// The size of the axis called `letter`.
    pub fn size<'f>(&self, facts: &'f Facts, letter: char) -> Option<&'f Dim> {
        let axis = self.layout.find(letter)?;
        let shape = facts.shape(&self.value)?;
        (shape.len() == self.layout.len()).then(|| &shape[axis])
    }
}

fn permuted(layout: &str, perm: &[i64]) -> Option<String> {
    // x = Transpose(y, perm): axis i of x is axis perm[i] of y.
    let letters: Vec<char> = layout.chars().collect();
    let mut result = vec!['?'; letters.len()];
    if perm.len() != letters.len() {
        return None;
    }
    for (letter, &axis) in letters.iter().zip(perm) {
        *result.get_mut(usize::try_from(axis).ok()?)? = *letter;
    }
    (!result.contains(&'?')).then(|| result.into_iter().collect())
}

/// Walks `operand` upstream while nothing but layout (and, with `scale`, a constant factor) is in the way. The factor is
/// multiplied into `scale`.
pub fn absorb(graph: &Graph, facts: &Facts, operand: &Operand, scale: Option<&mut f64>) -> Operand {
    if operand.packed_heads.is_some() {
        return operand.clone();
    }
    let rank = operand.layout.len();
    let mut at = operand.clone();
    let mut factor = 1.0;
    let mut best = (at.clone(), factor);
    while let Some((node, _)) = graph.producer(&at.value) {
        if !node.domain().is_empty() {
            break;
        }
        let next = match node.op() {
            "Identity" => node.input(0).map(|v| Operand {
                value: v.into(),
                ..at.clone()
            }),
            "Cast" => node
                .input(0)
                .filter(|v| {
                    facts.of(v).elem_type == facts.of(&at.value).elem_type
                        && facts.of(v).elem_type != 0
                })
                .map(|v| Operand {
                    value: v.into(),
                    ..at.clone()
                }),
            "Transpose" => node
                .ints("perm")
                .and_then(|perm| permuted(&at.layout, perm))
                .and_then(|layout| {
                    Some(Operand {
                        value: node.input(0)?.into(),
                        layout,
                        packed_heads: None,
                    })
                }),
            "Reshape" => node.input(0).and_then(|v| regrouped(facts, &at, v)),
            "Mul" | "Div" if scale.is_some() => {
                scalar_factor(facts, node.op(), node.input(0), node.input(1)).map(|(v, f)| {
                    factor *= f;
                    Operand {
                        value: v.into(),
                        ..at.clone()
                    }
                })
            }
            _ => None,
        };
        let Some(next) = next else { break };
        at = next;
        if at.layout.len() == rank {
            best = (at.clone(), factor);
        }
    }
    if let Some(scale) = scale {
        *scale *= best.1;
    }
    best.0
}

/// `(tensor, factor)` of a multiplication or division by one known number.
pub fn scalar_factor<'g>(
    facts: &Facts,
    op: &str,
    a: Option<&'g str>,
    b: Option<&'g str>,
) -> Option<(&'g str, f64)> {
    let (a, b) = (a?, b?);
    let number = |v: &str| facts.of(v).scalar().filter(|f| f.is_finite() && *f != 0.0);
    match (op, number(a), number(b)) {
        ("Mul", _, Some(f)) => Some((a, f)),
        ("Mul", Some(f), None) => Some((b, f)),
        ("Div", _, Some(f)) => Some((a, 1.0 / f)),
        _ => None,
    }
}

/// The operand seen through a Reshape that only joins or splits batch and head: [B, H, a, b] ↔ [B·H, a, b].
fn regrouped(facts: &Facts, at: &Operand, input: &str) -> Option<Operand> {
    let (to, from) = (facts.shape(&at.value)?, facts.shape(input)?);
    if to == from {
        return Some(Operand {
            value: input.into(),
            ..at.clone()
        });
    }
    let n = to.len();
    if from.len() < 2 || n < 2 || to[n - 2..] != from[from.len() - 2..] {
        return None;
    }
    let tail = &at.layout[at.layout.len() - 2..];
    let layout = match (n, from.len()) {
        (4, 3) if at.layout.starts_with("BH") => format!("B{tail}"),
        (3, 4) if at.layout.starts_with('B') => format!("BH{tail}"),
        _ => return None,
    };
    Some(Operand {
        value: input.into(),
        layout,
        packed_heads: None,
    })
}

/// Follows the attention's result downstream through transposes that nothing else sees.
pub fn absorb_result(graph: &Graph, facts: &Facts, result: &Operand) -> Operand {
    let mut at = result.clone();
    if at.packed_heads.is_some() {
        return at;
    }
    while let Some(index) = graph.only_consumer(&at.value) {
        let node = &graph.nodes[index];
        let layout = match node.op() {
            "Transpose" if node.domain().is_empty() => node.ints("perm").and_then(|perm| {
                let letters: Vec<char> = at.layout.chars().collect();
                perm.iter()
                    .map(|&p| letters.get(usize::try_from(p).ok()?).copied())
                    .collect::<Option<String>>()
            }),
            "Identity" => Some(at.layout.clone()),
            "Cast" if facts.of(node.output(0)).elem_type == facts.of(&at.value).elem_type => {
                Some(at.layout.clone())
            }
            _ => None,
        };
        let Some(layout) = layout else { break };
        at = Operand {
            value: node.output(0).into(),
            layout,
            packed_heads: None,
        };
    }
    at
}
