//! The two matrix products of attention, in every spelling: MatMul, FusedMatMul, Einsum.

use super::known;
use crate::find::Reason;
use crate::find::operand::Operand;
use crate::onnx::Node;
use crate::shapes::{self, Facts, PRODUCT};
use std::collections::HashMap;

/// q·kᵀ times a factor.
pub struct Scores {
    pub q: Operand,
    pub k: Operand,
    pub factor: f64,
}

/// Probabilities times v.
pub struct Weighted {
    pub v: Operand,
    pub out: Operand,
}

pub fn is_product(node: &Node) -> bool {
    shapes::is(node, PRODUCT)
}

/// Reads `node` as q·kᵀ whose result has `rank` axes ending in queries, keys.
pub fn scores(node: &Node, rank: usize) -> Result<Scores, Reason> {
    let (a, b) = operands(node)?;
    let (rows, columns) = batched(node, rank)?;
    match (node.domain(), node.op()) {
        ("", "Einsum") => {
            let [x, y, result] = equation(node)?;
            // Batch and heads are in both, channels in both but not in the result.
            let names = name_axes(node, &result, rank, "SK")?;
            let channel = contracted(node, &x, &y, &result)?;
            let named = |term: &str, tokens: char| layout(node, term, &names, channel, tokens);
            let (q, k) = match (named(&x, 'S'), named(&y, 'K')) {
                (Ok(q), Ok(k)) => (Operand::new(a, &q), Operand::new(b, &k)),
                // The operands may be written in either order.
                _ => (
                    Operand::new(b, &named(&y, 'S')?),
                    Operand::new(a, &named(&x, 'K')?),
                ),
            };
            Ok(Scores { q, k, factor: 1.0 })
        }
        ("", _) => Ok(Scores {
            q: Operand::new(a, &format!("{rows}SD")),
            k: Operand::new(b, &format!("{columns}DS")),
            factor: 1.0,
        }),
        _ => {
            let flags = Flags::of(node)?;
            Ok(Scores {
                q: Operand::new(a, &stored(&rows, ['S', 'D'], flags.a, node)?),
                k: Operand::new(b, &stored(&columns, ['D', 'S'], flags.b, node)?),
                factor: f64::from(node.float("alpha").unwrap_or(1.0)),
            })
        }
    }
}

/// Reads `node` as the product of the probabilities `p` with v.
pub fn weighted(node: &Node, p: &str, rank: usize) -> Result<Weighted, Reason> {
    let (a, b) = operands(node)?;
    let (rows, _) = batched(node, rank)?;
    let swapped = || {
        Reason::new(
            "the probabilities are the second operand of the product with v, expected the first",
            [node.label()],
        )
    };
    match (node.domain(), node.op()) {
        ("", "Einsum") => {
            let [x, y, result] = equation(node)?;
            let (probabilities, values, v) = if a == p { (x, y, b) } else { (y, x, a) };
            let names = name_axes(node, &probabilities, rank, "SK")?;
            let channel = values
                .chars()
                .find(|l| !probabilities.contains(*l))
                .ok_or_else(|| unreadable(node))?;
            Ok(Weighted {
                v: Operand::new(v, &layout(node, &values, &names, channel, 'K')?),
                out: Operand::new(
                    node.output(0),
                    &layout(node, &result, &names, channel, 'S')?,
                ),
            })
        }
        _ if a != p => Err(swapped()),
        ("", _) => Ok(Weighted {
            v: Operand::new(b, &format!("{rows}SD")),
            out: Operand::new(node.output(0), &format!("{rows}SD")),
        }),
        _ => {
            let flags = Flags::of(node)?;
            if flags.a != (false, false) || node.float("alpha").unwrap_or(1.0) != 1.0 {
                return Err(Reason::new(
                    "the product with v transposes or scales the probabilities",
                    [node.label()],
                ));
            }
            Ok(Weighted {
                v: Operand::new(b, &stored(&rows, ['S', 'D'], flags.b, node)?),
                out: Operand::new(node.output(0), &format!("{rows}SD")),
            })
        }
    }
}

/// The rank of the scores that `node` computes, where an operand's rank shows it.
pub fn rank(facts: &Facts, node: &Node) -> Option<usize> {
    if node.is("Einsum") {
        return equation(node).ok().map(|[_, _, result]| result.len());
    }
    [node.output(0), node.input(0)?, node.input(1)?]
        .iter()
        .find_map(|v| facts.of(v).rank())
}

fn operands(node: &Node) -> Result<(&str, &str), Reason> {
    node.input(0)
        .zip(node.input(1))
        .ok_or_else(|| Reason::new("a product with one operand", [node.label()]))
}

/// The letters of the axes before the last two, for both operands.
fn batched(node: &Node, rank: usize) -> Result<(String, String), Reason> {
    let letters = match rank {
        4 => "BH",
        3 => "B",
        _ => {
            return Err(Reason::new(
                format!("the scores have rank {rank}, expected 3 or 4"),
                [node.label()],
            ));
        }
    };
    Ok((letters.into(), letters.into()))
}

/// (trans, transBatch) of each operand of a FusedMatMul.
struct Flags {
    a: (bool, bool),
    b: (bool, bool),
}

impl Flags {
    fn of(node: &Node) -> Result<Self, Reason> {
        if !node.domain().is_empty() {
            known::FUSED_MATMUL.check(node)?;
        }
        let flag = |name: &str| node.int(name).unwrap_or(0) != 0;
        Ok(Self {
            a: (flag("transA"), flag("transBatchA")),
            b: (flag("transB"), flag("transBatchB")),
        })
    }
}

/// How an operand of FusedMatMul lies in memory: `trans` swaps its last two axes, `transBatch` has moved the second to
/// last axis in front of the batch.
fn stored(
    batch: &str,
    [row, column]: [char; 2],
    (trans, trans_batch): (bool, bool),
    node: &Node,
) -> Result<String, Reason> {
    match (trans, trans_batch) {
        (false, false) => Ok(format!("{batch}{row}{column}")),
        (true, false) => Ok(format!("{batch}{column}{row}")),
        _ if batch.len() == 1 && trans_batch => Err(Reason::new(
            "a FusedMatMul that moves the folded batch is not supported",
            [node.label()],
        )),
        (false, true) => Ok(format!("{row}{batch}{column}")),
        (true, true) => Err(Reason::new(
            "a FusedMatMul that transposes both the batch and the matrix is not supported",
            [node.label()],
        )),
    }
}

fn unreadable(node: &Node) -> Reason {
    Reason::new(
        "the Einsum is not one of attention's two products",
        [node.label()],
    )
}

/// Left, right and result of an Einsum of two operands, in single letters.
fn equation(node: &Node) -> Result<[String; 3], Reason> {
    let text = node
        .attribute("equation")
        .and_then(|a| a.s.as_ref())
        .and_then(|s| std::str::from_utf8(s).ok())
        .map(|s| s.replace(' ', ""))
        .ok_or_else(|| unreadable(node))?;
    let parts = text
        .split_once("->")
        .and_then(|(terms, result)| Some((terms.split_once(',')?, result)));
    match parts {
        Some(((a, b), result)) if !text.contains('.') && !b.contains(',') => {
            Ok([a.into(), b.into(), result.into()])
        }
        _ => Err(unreadable(node)),
    }
}

/// What each letter of `scores` means: batch, heads, queries, keys (`tail` names the last two).
fn name_axes(
    node: &Node,
    scores: &str,
    rank: usize,
    tail: &str,
) -> Result<HashMap<char, char>, Reason> {
    let (batch, _) = batched(node, rank)?;
    let names: Vec<char> = batch.chars().chain(tail.chars()).collect();
    let map: HashMap<char, char> = scores.chars().zip(names.iter().copied()).collect();
    if scores.chars().count() == names.len() && map.len() == names.len() {
        Ok(map)
    } else {
        Err(unreadable(node))
    }
}

fn contracted(node: &Node, x: &str, y: &str, result: &str) -> Result<char, Reason> {
    let mut shared = x.chars().filter(|l| y.contains(*l) && !result.contains(*l));
    match (shared.next(), shared.next()) {
        (Some(channel), None) => Ok(channel),
        _ => Err(unreadable(node)),
    }
}

/// The layout of an operand whose sequence is `tokens` (S the queries, K the keys).
fn layout(
    node: &Node,
    term: &str,
    names: &HashMap<char, char>,
    channel: char,
    tokens: char,
) -> Result<String, Reason> {
    let layout: Option<String> = term
        .chars()
        .map(|l| match names.get(&l) {
            _ if l == channel => Some('D'),
            Some(&name) if name == tokens => Some('S'),
            Some(&name @ ('B' | 'H')) => Some(name),
            _ => None,
        })
        .collect();
    layout
        .filter(|l| {
            l.contains('S') && l.contains('D') && l.len() == names.len() && l.starts_with('B')
        })
        .ok_or_else(|| unreadable(node))
}
