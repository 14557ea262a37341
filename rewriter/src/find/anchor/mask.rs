//! What stands between q·kᵀ and the softmax: masks and biases.

use crate::onnx::{Data, Graph, Node};
use crate::shapes::{self, COPY, Facts, LAYOUT, REPEAT, RESHAPE, Value};

/// The masks of one attention, all in force together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mask {
    pub terms: Vec<Term>,
    /// Rows that see nothing give 0, not NaN: the exporters' `Where(IsNaN(p), 0, p)`.
    pub guard: bool,
}

/// One mask, broadcast to [B, H, queries, keys].
#[derive(Clone, Debug, PartialEq)]
pub enum Term {
    /// `factor · value` is added to the scores.
    Add { value: String, factor: f64 },
    /// Boolean: where false (`inverted`: where true) the score becomes `fill`, −∞ or a large negative number.
    Show {
        value: String,
        inverted: bool,
        fill: f64,
    },
}

impl Term {
    pub fn value(&self) -> &str {
        match self {
            Self::Add { value, .. } | Self::Show { value, .. } => value,
        }
    }

    /// The same done with another tensor.
    pub fn with_value(&self, value: &str) -> Self {
        let mut term = self.clone();
        match &mut term {
            Self::Add { value: own, .. } | Self::Show { value: own, .. } => *own = value.into(),
        }
        term
    }
}

impl Mask {
    pub fn added(value: &str, factor: f64) -> Term {
        Term::Add {
            value: value.into(),
            factor,
        }
    }

    pub fn values(&self) -> impl Iterator<Item = &str> {
        self.terms.iter().map(Term::value)
    }
}

/// Hidden scores are far below all others: softmax makes them 0 in any float type.
const HIDDEN: f64 = -1e4;

/// `(scores, term)` of `Where(cond, scores, −∞)` or `Where(cond, −∞, scores)`; `None` if it is something else.
pub fn hidden_by_where<'g>(facts: &Facts, node: &'g Node) -> Option<(&'g str, Term)> {
    let (cond, yes, no) = (node.input(0)?, node.input(1)?, node.input(2)?);
    let hides = |v: &str| constant_number(facts, v).filter(|&f| f <= HIDDEN);
    let term = |inverted, fill| Term::Show {
        value: cond.into(),
        inverted,
        fill,
    };
    match (hides(yes), hides(no)) {
        (None, Some(fill)) => Some((yes, term(false, fill))),
        (Some(fill), None) => Some((no, term(true, fill))),
        _ => None,
    }
}

/// A number, or a tensor of one number repeated.
fn constant_number(facts: &Facts, value: &str) -> Option<f64> {
    match facts.of(value).value? {
        Value::Floats(v) => v.first().copied().filter(|&x| v.iter().all(|&y| y == x)),
        Value::Ints(_) => None,
    }
}

/// Whether `value` is zero everywhere whatever is fed: what `baddbmm(beta=0)` adds.
pub fn is_zero(graph: &Graph, facts: &Facts, value: &str) -> bool {
    if constant_number(facts, value) == Some(0.0) {
        return true;
    }
    let Some((node, _)) = graph.producer(value) else {
        return false;
    };
    if !node.domain().is_empty() {
        return false;
    }
    let zero = |i: usize| node.input(i).is_some_and(|v| is_zero(graph, facts, v));
    match node.op() {
        _ if shapes::is(node, LAYOUT | REPEAT) => zero(0),
        "ConstantOfShape" => node
            .attribute("value")
            .and_then(|a| a.t.as_ref())
            .is_none_or(|t| {
                crate::onnx::Constant::read(t).is_some_and(|(_, c)| match c.data {
                    Some(Data::Ints(v)) => v.iter().all(|&x| x == 0),
                    Some(Data::Floats(v)) => v.iter().all(|&x| x == 0.0),
                    None => false,
                })
            }),
        // 0 · x is 0 for every finite x, and beta = 0 means that x is not to be looked at.
        "Mul" => {
            let finite = |i: usize| node.input(i).is_some_and(|v| is_filled(graph, facts, v));
            (zero(0) && finite(1)) || (zero(1) && finite(0))
        }
        _ => false,
    }
}

/// Whether `value` is made of constants and sizes alone.
fn is_filled(graph: &Graph, facts: &Facts, value: &str) -> bool {
    if facts.of(value).value.is_some() || graph.initializers.contains_key(value) {
        return true;
    }
    graph.producer(value).is_some_and(|(node, _)| {
        node.domain().is_empty()
            && match node.op() {
                "ConstantOfShape" | "Constant" | "Shape" => true,
                _ if shapes::is(node, COPY | RESHAPE | REPEAT) => {
                    node.input(0).is_some_and(|v| is_filled(graph, facts, v))
                }
                _ => false,
            }
    })
}
