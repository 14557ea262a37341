//! What a shape rule may look at, and the arithmetic that rules share.

use super::super::dim::{Dim, Symbols};
use super::super::infer::{BATCH, Fact, Value};
use crate::onnx::{Graph, Node, elem_type};

/// The node at hand and what is known of its inputs.
pub struct Context<'a> {
    pub graph: &'a Graph,
    pub node: &'a Node,
    pub inputs: &'a [Fact],
    pub symbols: &'a mut Symbols,
    pub static_batch: Option<i64>,
    /// Set by `Reshape` when its literal target has the batch baked in: a target without it.
    pub repaired: Option<Vec<i64>>,
    /// Set where an axis that grows with the batch must have a certain size.
    pub batch_is_bound: bool,
}

pub fn is_integer(ty: i32) -> bool {
    matches!(ty, elem_type::INT32 | elem_type::INT64)
}

/// Position of `axis` (may be negative) in a tensor of `rank` dimensions.
pub fn axis(axis: i64, rank: usize) -> Option<usize> {
    let rank = i64::try_from(rank).ok()?;
    let axis = if axis < 0 {
        axis.checked_add(rank)?
    } else {
        axis
    };
    (0..rank).contains(&axis).then_some(axis as usize)
}

/// As [`axis`], with the end of the axes allowed too.
pub fn axis_or_end(at: i64, rank: usize) -> Option<usize> {
    if at == i64::try_from(rank).ok()? {
        Some(rank)
    } else {
        axis(at, rank)
    }
}

pub fn ints_value(value: &Value) -> Option<&[Dim]> {
    match value {
        Value::Ints(v) => Some(v),
        Value::Floats(_) => None,
    }
}

impl Context<'_> {
    pub fn input(&self, i: usize) -> Option<&Fact> {
        self.node.input(i).and(self.inputs.get(i))
    }

    pub fn ty(&self, i: usize) -> i32 {
        self.input(i).map_or(0, |f| f.elem_type)
    }

    pub fn shape(&self, i: usize) -> Option<&[Dim]> {
        self.input(i)?.shape.as_deref()
    }

    pub fn dims(&self, i: usize) -> Option<Vec<Dim>> {
        self.shape(i).map(<[Dim]>::to_vec)
    }

    pub fn ints(&self, i: usize) -> Option<Vec<i64>> {
        self.input(i)?.known_ints()
    }

    pub fn value(&self, i: usize) -> Option<&Value> {
        self.input(i)?.value.as_ref()
    }

    /// Integers, possibly symbolic, given as an attribute (old opsets) or as an input.
    pub fn dims_given(&self, attribute: &str, input: usize) -> Option<Vec<Dim>> {
        match self.node.ints(attribute) {
            Some(list) => Some(list.iter().map(|&n| n.into()).collect()),
            None => ints_value(self.value(input)?).map(<[Dim]>::to_vec),
        }
    }

    /// Known integers given as an attribute (old opsets) or as an input.
    pub fn ints_given(&self, attribute: &str, input: usize) -> Option<Vec<i64>> {
        self.dims_given(attribute, input)?
            .iter()
            .map(Dim::known)
            .collect()
    }

    /// A list attribute of `len` numbers, or `default` that many times.
    pub fn list(&self, name: &str, default: i64, len: usize) -> Vec<i64> {
        let given = self.node.ints(name).filter(|v| v.len() == len);
        given.map_or_else(|| vec![default; len], <[i64]>::to_vec)
    }

    pub fn flag(&self, name: &str) -> bool {
        self.node.int(name).unwrap_or(0) != 0
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.node.attribute(name)?.s.as_ref()?).ok()
    }

    pub fn fresh(&mut self) -> Dim {
        self.symbols.fresh("?").into()
    }

    /// The size in numbers of a multiple of the batch that the exporter baked in.
    pub fn literal(&self, size: &Dim) -> Option<i64> {
        let batch = self.static_batch?;
        let per_row = size.over(&BATCH.into())?.times(&batch.into())?;
        per_row.known()
    }

    /// Numpy broadcasting; where two symbolic sizes meet they must be equal at run time.
    pub fn broadcast(&mut self, a: &[Dim], b: &[Dim]) -> Vec<Dim> {
        let rank = a.len().max(b.len());
        let one = Dim::from(1);
        let at = |dims: &[Dim], i: usize| {
            (i + dims.len())
                .checked_sub(rank)
                .map_or_else(|| one.clone(), |j| dims[j].clone())
        };
        (0..rank)
            .map(|i| {
                let (a, b) = (at(a, i), at(b, i));
                match (a.known(), b.known()) {
                    (Some(1), _) => b,
                    (_, Some(1)) => a,
                    _ => self.unify(&a, &b),
                }
            })
            .collect()
    }

    /// The better known of two sizes that must be equal: the batch, then a number, then the first.
    pub fn unify(&mut self, a: &Dim, b: &Dim) -> Dim {
        if a == b {
            return a.clone();
        }
        let grows = [a, b].map(|d| d.depends_on(BATCH));
        // A size that is not known may well be the batch.
        let fixed = [a, b].map(|d| d.known().is_some());
        self.batch_is_bound |= (grows[0] && fixed[1]) || (grows[1] && fixed[0]);
        // The batch, then a number, then the first.
        let second = !grows[0] && (grows[1] || (fixed[1] && !fixed[0]));
        if second { b.clone() } else { a.clone() }
    }
}

/// A fact like the first input: its type and shape, no value.
pub fn same(c: &Context) -> Fact {
    Fact::of(c.ty(0), c.dims(0))
}

/// [`same`] as a rule.
pub fn like_first(c: &mut Context) -> Option<Fact> {
    Some(same(c))
}

/// A fact of type `ty` and the shape of the first input.
pub fn same_as(c: &Context, ty: i32) -> Option<Fact> {
    Some(Fact::of(ty, c.dims(0)))
}

/// The value a float of type `ty` would hold; a shape-derived scale in float16 carries that rounding.
pub fn round_to(ty: i32, value: f64) -> f64 {
    match ty {
        elem_type::FLOAT16 => half::f16::from_f64(value).to_f64(),
        elem_type::BFLOAT16 => half::bf16::from_f64(value).to_f64(),
        elem_type::FLOAT => f64::from(value as f32),
        _ => value,
    }
}

/// The elements of `value` at these positions.
pub fn at_positions(value: &Value, positions: &[usize]) -> Option<Value> {
    fn all<T: Clone>(v: &[T], positions: &[usize]) -> Option<Vec<T>> {
        positions.iter().map(|&p| v.get(p).cloned()).collect()
    }
    match value {
        Value::Ints(v) => all(v, positions).map(Value::Ints),
        Value::Floats(v) => all(v, positions).map(Value::Floats),
    }
}
