//! Shape and value rules per operator, for the operators of exported transformers. An operator without a rule yields
//! nothing.

use super::dim::{Dim, Symbols};
use super::infer::{BATCH, Fact, Value};
use crate::onnx::{Graph, Node, elem_type};

/// What a rule may look at.
pub(super) struct Context<'a> {
    pub graph: &'a Graph,
    pub node: &'a Node,
    pub inputs: &'a [Fact],
    pub symbols: &'a mut Symbols,
    pub static_batch: Option<i64>,
    /// Set by `Reshape` when its literal target has the batch baked in.
    pub repaired: Option<Vec<i64>>,
}

pub(super) fn is_integer(ty: i32) -> bool {
    matches!(ty, elem_type::INT32 | elem_type::INT64)
}

impl Context<'_> {
    fn input(&self, i: usize) -> Option<&Fact> {
        self.node.input(i).and(self.inputs.get(i))
    }

    fn ty(&self, i: usize) -> i32 {
        self.input(i).map_or(0, |f| f.elem_type)
    }

    fn shape(&self, i: usize) -> Option<&[Dim]> {
        self.input(i)?.shape.as_deref()
    }

    fn ints(&self, i: usize) -> Option<Vec<i64>> {
        self.input(i)?.known_ints()
    }

    fn value(&self, i: usize) -> Option<&Value> {
        self.input(i)?.value.as_ref()
    }

    /// Axes given as an attribute (old opsets) or as an input.
    fn axes(&self, input: usize) -> Option<Vec<i64>> {
        self.node
            .ints("axes")
            .map(<[i64]>::to_vec)
            .or_else(|| self.ints(input))
    }

    fn fresh(&mut self) -> Dim {
        self.symbols.fresh("?").into()
    }

    /// The size in numbers of a multiple of the batch that the exporter baked in.
    fn literal(&self, size: &Dim) -> Option<i64> {
        let batch = self.static_batch?;
        let per_row = size.over(&BATCH.into())?.times(&batch.into())?;
        per_row.known()
    }
}

/// Position of `axis` (may be negative) in a tensor of `rank` dimensions.
pub fn axis(axis: i64, rank: usize) -> Option<usize> {
    let rank = i64::try_from(rank).ok()?;
    let axis = if axis < 0 { axis + rank } else { axis };
    (0..rank).contains(&axis).then_some(axis as usize)
}

pub(super) fn outputs(c: &mut Context) -> Vec<Fact> {
    let count = c.node.proto.output.len();
    let domain = c.node.domain().to_owned();
    let op = c.node.op().to_owned();
    match (domain.as_str(), op.as_str()) {
        ("", "Split") => return split(c).unwrap_or_default(),
        ("", "DynamicQuantizeLinear") => {
            let shape = c.shape(0).map(<[Dim]>::to_vec);
            return vec![
                Fact::of(2, shape),
                Fact::of(elem_type::FLOAT, Some(vec![])),
                Fact::of(2, Some(vec![])),
            ];
        }
        (
            "",
            "LayerNormalization" | "RMSNormalization" | "SimplifiedLayerNormalization" | "Dropout",
        ) => {
            return vec![same(c)];
        }
        ("com.microsoft", "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization") => {
            let fact = same(c);
            return vec![fact.clone(), Fact::default(), Fact::default(), fact];
        }
        _ => {}
    }
    let fact = match domain.as_str() {
        "" => onnx(c, &op),
        "com.microsoft" => microsoft(c, &op),
        _ => None,
    };
    let mut facts = vec![Fact::default(); count];
    if let (Some(first), Some(fact)) = (facts.first_mut(), fact) {
        *first = fact;
    }
    facts
}

fn onnx(c: &mut Context, op: &str) -> Option<Fact> {
    match op {
        "Constant" => c.graph.constant(c.node.output(0)).as_ref().map(Fact::from),
        "Identity" => c.input(0).cloned(),
        "Cast" => cast(c),
        "Shape" => shape(c),
        "Size" => {
            let size = Dim::product(c.shape(0)?)?;
            Some(Fact {
                elem_type: elem_type::INT64,
                shape: Some(vec![]),
                value: Some(Value::Ints(vec![size])),
            })
        }
        "Gather" => gather(c),
        "Slice" => slice(c),
        "Concat" => concat(c),
        "Unsqueeze" => unsqueeze(c),
        "Squeeze" => squeeze(c),
        "Reshape" => reshape(c),
        "Flatten" => {
            let dims = c.shape(0)?;
            let at = axis_or_end(c.node.int("axis").unwrap_or(1), dims.len())?;
            let (a, b) = (Dim::product(&dims[..at])?, Dim::product(&dims[at..])?);
            Some(Fact::of(c.ty(0), Some(vec![a, b])))
        }
        "Transpose" => transpose(c),
        "Expand" => expand(c),
        "Tile" => {
            let dims = c
                .shape(0)?
                .iter()
                .zip(ints_value(c.value(1)?)?)
                .map(|(d, n)| d.times(n))
                .collect::<Option<_>>()?;
            Some(Fact::of(c.ty(0), Some(dims)))
        }
        "OneHot" => one_hot(c),
        "MatMul" => matmul(c.shape(0)?, c.shape(1)?, c.ty(0)),
        "MatMulInteger" => matmul(c.shape(0)?, c.shape(1)?, elem_type::INT32),
        "Gemm" => gemm(c),
        "Conv" => conv(c),
        "ConvTranspose" => conv_transpose(c),
        "MaxPool" | "AveragePool" | "LpPool" => pool(c),
        "GlobalAveragePool" | "GlobalMaxPool" => {
            let dims = c.shape(0)?;
            let kept = dims.iter().take(2).cloned();
            let ones = dims.iter().skip(2).map(|_| Dim::from(1));
            Some(Fact::of(c.ty(0), Some(kept.chain(ones).collect())))
        }
        "Resize" | "Upsample" => resize(c),
        "Pad" => pad(c),
        "DepthToSpace" | "SpaceToDepth" => blocks(c, op),
        "Einsum" => einsum(c),
        "Attention" => attention(c),
        "ConstantOfShape" => constant_of_shape(c),
        "Range" => {
            let dim = match (c.input(0)?.scalar(), c.value(1), c.input(2)?.scalar()) {
                (Some(0.0), Some(Value::Ints(limit)), Some(1.0)) if limit.len() == 1 => {
                    limit[0].clone()
                }
                _ => c.fresh(),
            };
            Some(Fact::of(c.ty(0), Some(vec![dim])))
        }
        "QuantizeLinear" => Some(Fact::of(
            c.input(2).map_or(2, |f| f.elem_type),
            c.shape(0).map(<[Dim]>::to_vec),
        )),
        "DequantizeLinear" => Some(Fact::of(c.ty(1), c.shape(0).map(<[Dim]>::to_vec))),
        "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceL2" | "ReduceProd" => {
            reduce(c)
        }
        "Softmax"
        | "LogSoftmax"
        | "GroupNormalization"
        | "InstanceNormalization"
        | "BatchNormalization"
        | "Trilu"
        | "ScatterND"
        | "ScatterElements"
        | "CumSum"
        | "Clip" => Some(same(c)),
        "Neg" | "Abs" | "Exp" | "Log" | "Sqrt" | "Reciprocal" | "Sin" | "Cos" | "Tanh"
        | "Sigmoid" | "Erf" | "Gelu" | "Relu" | "LeakyRelu" | "Elu" | "Selu" | "Softplus"
        | "Floor" | "Ceil" | "Round" | "Sign" | "HardSwish" | "HardSigmoid" | "Swish" | "Mish" => {
            unary(c, op)
        }
        "Not" => Some(same(c)),
        "IsNaN" | "IsInf" => Some(Fact::of(elem_type::BOOL, c.shape(0).map(<[Dim]>::to_vec))),
        "Equal" | "Greater" | "Less" | "GreaterOrEqual" | "LessOrEqual" | "And" | "Or" | "Xor" => {
            let dims = broadcast(c.shape(0)?, c.shape(1)?)?;
            let value = (op == "Equal").then(|| equal(c)).flatten();
            Some(Fact {
                elem_type: elem_type::BOOL,
                shape: Some(dims),
                value,
            })
        }
        "Where" => {
            let dims = broadcast(&broadcast(c.shape(0)?, c.shape(1)?)?, c.shape(2)?)?;
            Some(Fact {
                elem_type: c.ty(1),
                shape: Some(dims),
                value: chosen(c),
            })
        }
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Mod" | "Min" | "Max" | "PRelu" => binary(c, op),
        _ => None,
    }
}

/// What ONNX Runtime's optimizers leave in the graphs they save.
fn microsoft(c: &mut Context, op: &str) -> Option<Fact> {
    match op {
        "FusedMatMul" => fused_matmul(c),
        "Gelu" | "FastGelu" | "QuickGelu" | "BiasGelu" | "BiasSoftmax" => Some(same(c)),
        "MultiHeadAttention" => fused_attention(c),
        "Attention" => projecting_attention(c),
        "DynamicQuantizeMatMul" | "MatMulIntegerToFloat" => {
            matmul(c.shape(0)?, c.shape(1)?, elem_type::FLOAT)
        }
        "FusedConv" => conv(c),
        "FusedGemm" => gemm(c),
        _ => None,
    }
}

fn same(c: &Context) -> Fact {
    Fact::of(c.ty(0), c.shape(0).map(<[Dim]>::to_vec))
}

fn axis_or_end(at: i64, rank: usize) -> Option<usize> {
    if at == i64::try_from(rank).ok()? {
        Some(rank)
    } else {
        axis(at, rank)
    }
}

fn ints_value(value: &Value) -> Option<&[Dim]> {
    match value {
        Value::Ints(v) => Some(v),
        Value::Floats(_) => None,
    }
}

fn cast(c: &Context) -> Option<Fact> {
    let to = i32::try_from(c.node.int("to")?).ok()?;
    let value = match (c.value(0), to) {
        (Some(Value::Ints(v)), elem_type::INT32 | elem_type::INT64) => Some(Value::Ints(v.clone())),
        (Some(Value::Ints(v)), _) => v
            .iter()
            .map(Dim::known)
            .map(|i| i.map(|i| i as f64))
            .collect::<Option<_>>()
            .map(Value::Floats),
        (Some(Value::Floats(v)), elem_type::INT32 | elem_type::INT64) => Some(Value::Ints(
            v.iter().map(|f| Dim::from(f.trunc() as i64)).collect(),
        )),
        (Some(Value::Floats(v)), ty) => {
            Some(Value::Floats(v.iter().map(|&f| round_to(ty, f)).collect()))
        }
        (None, _) => None,
    };
    Some(Fact {
        elem_type: to,
        shape: c.shape(0).map(<[Dim]>::to_vec),
        value,
    })
}

/// The value a float of type `ty` would hold; a shape-derived scale in float16 carries that rounding.
fn round_to(ty: i32, value: f64) -> f64 {
    match ty {
        elem_type::FLOAT16 => half::f16::from_f64(value).to_f64(),
        elem_type::BFLOAT16 => half::bf16::from_f64(value).to_f64(),
        elem_type::FLOAT => f64::from(value as f32),
        _ => value,
    }
}

fn shape(c: &Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let rank = i64::try_from(dims.len()).ok()?;
    let clamp = |at: i64| (if at < 0 { at + rank } else { at }).clamp(0, rank) as usize;
    let start = clamp(c.node.int("start").unwrap_or(0));
    let end = clamp(c.node.int("end").unwrap_or(rank)).max(start);
    let dims = dims[start..end].to_vec();
    Some(Fact {
        elem_type: elem_type::INT64,
        shape: Some(vec![(dims.len() as i64).into()]),
        value: Some(Value::Ints(dims)),
    })
}

fn gather(c: &Context) -> Option<Fact> {
    let data = c.shape(0)?;
    let indices = c.shape(1)?;
    let at = axis(c.node.int("axis").unwrap_or(0), data.len())?;
    let dims: Vec<Dim> = data[..at]
        .iter()
        .chain(indices)
        .chain(&data[at + 1..])
        .cloned()
        .collect();
    let value = (|| {
        if data.len() != 1 {
            return None;
        }
        let picked = c.ints(1)?;
        let pick = |i: i64, len: usize| axis(i, len);
        match c.value(0)? {
            Value::Ints(v) => picked
                .iter()
                .map(|&i| v.get(pick(i, v.len())?).cloned())
                .collect::<Option<_>>()
                .map(Value::Ints),
            Value::Floats(v) => picked
                .iter()
                .map(|&i| v.get(pick(i, v.len())?).copied())
                .collect::<Option<_>>()
                .map(Value::Floats),
        }
    })();
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(dims),
        value,
    })
}

fn slice(c: &mut Context) -> Option<Fact> {
    let mut dims = c.shape(0)?.to_vec();
    let starts = c
        .node
        .ints("starts")
        .map(<[i64]>::to_vec)
        .or_else(|| c.ints(1));
    let ends = c
        .node
        .ints("ends")
        .map(<[i64]>::to_vec)
        .or_else(|| c.ints(2));
    let axes = c
        .axes(3)
        .or_else(|| (c.input(3).is_none()).then(|| (0..dims.len() as i64).collect()));
    let steps = if c.input(4).is_some() {
        c.ints(4)
    } else {
        Some(vec![1; dims.len()])
    };
    let axes = axes?;
    let mut value = None;
    for (i, &at) in axes.iter().enumerate() {
        let at = axis(at, dims.len())?;
        let start = starts.as_ref().and_then(|s| s.get(i).copied());
        let end = ends.as_ref().and_then(|s| s.get(i).copied());
        let step = steps.as_ref().and_then(|s| s.get(i).copied());
        let known = dims[at].known();
        dims[at] = match (start, end, step, known) {
            (Some(start), Some(end), Some(step), Some(size)) => {
                let (count, picked) = positions(start, end, step, size)?;
                if dims.len() == 1 && picked.len() as i64 == count {
                    value = c.value(0).and_then(|v| match v {
                        Value::Ints(v) => picked
                            .iter()
                            .map(|&p| v.get(p).cloned())
                            .collect::<Option<_>>()
                            .map(Value::Ints),
                        Value::Floats(v) => picked
                            .iter()
                            .map(|&p| v.get(p).copied())
                            .collect::<Option<_>>()
                            .map(Value::Floats),
                    });
                }
                count.into()
            }
            (_, _, Some(1), _) => {
                let bounds = (symbolic(c, 1, "starts", i), symbolic(c, 2, "ends", i));
                match bounds {
                    (Some(from), Some(to)) => {
                        span(c, &dims[at].clone(), &from, &to).unwrap_or_else(|| c.fresh())
                    }
                    _ => c.fresh(),
                }
            }
            _ => c.fresh(),
        };
    }
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(dims),
        value,
    })
}

/// Bound `i` of a slice, which may be computed from sizes.
fn symbolic(c: &Context, input: usize, attribute: &str, i: usize) -> Option<Dim> {
    match c.node.ints(attribute) {
        Some(list) => list.get(i).map(|&n| n.into()),
        None => ints_value(c.value(input)?)?.get(i).cloned(),
    }
}

/// How much of an axis of size `size` lies between two bounds, which exporters keep inside the axis: one stream of a joint
/// sequence, one half of a batch.
fn span(c: &mut Context, size: &Dim, from: &Dim, to: &Dim) -> Option<Dim> {
    let absolute = |c: &mut Context, at: &Dim| match at.known() {
        Some(end) if end >= i64::from(i32::MAX) => Some(size.clone()),
        // A literal bound of a batch that was traced: half of it, as in `x[: len(x) // 2]`.
        Some(n) if n > 0 && size.depends_on(BATCH) && c.static_batch.is_some() => {
            size.times(&n.into())?.over(&c.literal(size)?.into())
        }
        _ if at.is_negative() => c.symbols.sum(size, at, false),
        // A slice stops at the end of the axis: a literal beyond it would be no size.
        Some(n) if n > 0 && size.known().is_none() && !c.symbols.is_part(at, size) => None,
        _ => Some(at.clone()),
    };
    let (from, to) = (absolute(c, from)?, absolute(c, to)?);
    c.symbols
        .sum(&to, &from, true)
        .filter(|d| d.known().is_none_or(|n| n >= 0) && !d.is_negative())
}

/// Positions that a slice of an axis of `size` elements picks: their count, and the list itself where the axis is short enough
/// to be a shape vector.
fn positions(start: i64, end: i64, step: i64, size: i64) -> Option<(i64, Vec<usize>)> {
    let wrap = |at: i64| if at < 0 { at.saturating_add(size) } else { at };
    let (start, span) = match step {
        1.. => {
            let start = wrap(start).clamp(0, size);
            (start, wrap(end).clamp(0, size) - start)
        }
        0 => return None,
        _ => {
            let start = wrap(start).clamp(-1, size - 1);
            (start, start - wrap(end).clamp(-1, size - 1))
        }
    };
    let stride = i64::try_from(step.unsigned_abs()).ok()?;
    let count = if span <= 0 {
        0
    } else {
        (span - 1) / stride + 1
    };
    let list = if size <= LISTED {
        (0..count).map(|i| (start + i * step) as usize).collect()
    } else {
        Vec::new()
    };
    Some((count, list))
}

fn concat(c: &mut Context) -> Option<Fact> {
    let count = c.inputs.len();
    let mut dims = c.shape(0)?.to_vec();
    let at = axis(c.node.int("axis").unwrap_or(0), dims.len())?;
    for i in 1..count {
        let other = c.shape(i)?.to_vec();
        if other.len() != dims.len() {
            return None;
        }
        let sum = c.symbols.sum(&dims[at], &other[at], false)?;
        for (axis, dim) in other.into_iter().enumerate() {
            dims[axis] = if axis == at {
                sum.clone()
            } else {
                unify(&dims[axis], &dim)
            };
        }
    }
    let value = (dims.len() == 1)
        .then(|| {
            let mut all = Vec::new();
            for i in 0..count {
                all.extend(ints_value(c.value(i)?)?.iter().cloned());
            }
            Some(Value::Ints(all))
        })
        .flatten();
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(dims),
        value,
    })
}

fn unsqueeze(c: &Context) -> Option<Fact> {
    let mut dims = c.shape(0)?.to_vec();
    let axes = c.axes(1)?;
    let rank = dims.len() + axes.len();
    let mut axes = axes
        .into_iter()
        .map(|a| axis(a, rank))
        .collect::<Option<Vec<_>>>()?;
    axes.sort_unstable();
    for at in axes {
        dims.insert(at.min(dims.len()), 1.into());
    }
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(dims),
        value: c.value(0).cloned(),
    })
}

fn squeeze(c: &Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let axes = match c.axes(1) {
        Some(axes) => axes
            .into_iter()
            .map(|a| axis(a, dims.len()))
            .collect::<Option<Vec<_>>>()?,
        None if c.input(1).is_none() => {
            let known = dims.iter().map(Dim::known).collect::<Option<Vec<_>>>()?;
            known
                .iter()
                .enumerate()
                .filter(|&(_, &d)| d == 1)
                .map(|(i, _)| i)
                .collect()
        }
        None => return None,
    };
    let dims = dims
        .iter()
        .enumerate()
        .filter(|(i, _)| !axes.contains(i))
        .map(|(_, d)| d.clone())
        .collect();
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(dims),
        value: c.value(0).cloned(),
    })
}

fn reshape(c: &mut Context) -> Option<Fact> {
    let ty = c.ty(0);
    let target = ints_value(c.value(1)?)?.to_vec();
    let value = c.value(0).cloned();
    let input = c.shape(0).map(<[Dim]>::to_vec);
    let allow_zero = c.node.int("allowzero") == Some(1);
    let mut dims = Vec::with_capacity(target.len());
    let mut inferred = None;
    for (i, dim) in target.iter().enumerate() {
        dims.push(match dim.known() {
            Some(-1) => {
                inferred = Some(i);
                1.into()
            }
            Some(0) if !allow_zero => input.as_ref()?.get(i)?.clone(),
            _ => dim.clone(),
        });
    }
    let Some(input) = input else {
        // The input's shape is unknown; only a target without -1 says everything.
        return inferred.is_none().then(|| Fact::of(ty, Some(dims)));
    };
    let total = Dim::product(&input)?;
    let resolve = |dims: &[Dim]| Some(total.over(&Dim::product(dims)?));
    // A batch that the exporter baked into the target: the input's size still depends on the
    // batch, the target's does not.
    let first = target.first().and_then(Dim::known);
    let mut baked = false;
    if let (Some(batch), Some(first)) = (c.static_batch, first) {
        let rest = resolve(&dims)?;
        let misses_batch = rest.as_ref().is_some_and(|r| r.depends_on(BATCH));
        baked = misses_batch && first > 0 && first % batch == 0 && inferred != Some(0);
        if baked {
            dims[0] = Dim::from(BATCH).times(&(first / batch).into())?;
        }
    }
    if let Some(i) = inferred {
        dims[i] = resolve(&dims)??;
    }
    if baked {
        c.repaired = without_batch(&target, &dims, input.first(), inferred, allow_zero);
    }
    Some(Fact {
        elem_type: ty,
        shape: Some(dims),
        value,
    })
}

/// The literal `target`, whose first size is the batch, rewritten for any batch: -1 there if every
/// other size is known, else 0 (copy) if the input starts with it too.
fn without_batch(
    target: &[Dim],
    dims: &[Dim],
    input_first: Option<&Dim>,
    inferred: Option<usize>,
    allow_zero: bool,
) -> Option<Vec<i64>> {
    let mut literal = target.iter().map(Dim::known).collect::<Option<Vec<_>>>()?;
    match inferred {
        None => literal[0] = -1,
        Some(i) => match dims[i].known() {
            Some(size) => {
                literal[i] = size;
                literal[0] = -1;
            }
            None if !allow_zero && input_first == dims.first() => literal[0] = 0,
            None => return None,
        },
    }
    Some(literal)
}

fn transpose(c: &Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let perm: Vec<i64> = match c.node.ints("perm") {
        Some(perm) if !perm.is_empty() => perm.to_vec(),
        _ => (0..dims.len() as i64).rev().collect(),
    };
    if perm.len() != dims.len() {
        return None;
    }
    let dims = perm
        .iter()
        .map(|&p| Some(dims[axis(p, dims.len())?].clone()))
        .collect::<Option<_>>()?;
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn expand(c: &Context) -> Option<Fact> {
    let target = ints_value(c.value(1)?)?;
    Some(Fact::of(c.ty(0), Some(broadcast(c.shape(0)?, target)?)))
}

/// Shape vectors are short; longer fills are data.
const LISTED: i64 = 64;

fn constant_of_shape(c: &Context) -> Option<Fact> {
    let dims = ints_value(c.value(0)?)?.to_vec();
    let fill = match c.node.attribute("value").and_then(|a| a.t.as_ref()) {
        Some(tensor) => crate::onnx::Constant::read(tensor)?.1,
        None => crate::onnx::Constant {
            elem_type: elem_type::FLOAT,
            dims: vec![1],
            data: Some(crate::onnx::Data::Floats(vec![0.0])),
        },
    };
    let count = Dim::product(&dims).and_then(|n| n.known());
    let value = count.filter(|n| (0..=LISTED).contains(n)).and_then(|n| {
        let n = n as usize;
        Some(match fill.data.as_ref()? {
            crate::onnx::Data::Ints(v) => Value::Ints(vec![(*v.first()?).into(); n]),
            crate::onnx::Data::Floats(v) => Value::Floats(vec![*v.first()?; n]),
        })
    });
    Some(Fact {
        elem_type: fill.elem_type,
        shape: Some(dims),
        value,
    })
}

/// Which elements of two shape vectors are equal, as 0 and 1: exporters compare sizes with −1 to find what to keep.
fn equal(c: &Context) -> Option<Value> {
    let (Value::Ints(a), Value::Ints(b)) = (c.value(0)?, c.value(1)?) else {
        return None;
    };
    let one = |(a, b): (Dim, Dim)| -> Option<Dim> {
        let differ = match (a.known(), b.known()) {
            (Some(a), Some(b)) => a != b,
            // Sizes are not negative.
            (Some(n), None) | (None, Some(n)) if n < 0 => true,
            _ if a == b => false,
            _ => return None,
        };
        Some(i64::from(!differ).into())
    };
    pairs(a, b)?
        .into_iter()
        .map(one)
        .collect::<Option<_>>()
        .map(Value::Ints)
}

/// `Where` over shape vectors.
fn chosen(c: &Context) -> Option<Value> {
    let condition = c.ints(0)?;
    let (yes, no) = (ints_value(c.value(1)?)?, ints_value(c.value(2)?)?);
    let pairs = pairs(yes, no)?;
    if condition.len() != pairs.len() {
        return None;
    }
    let picked = condition
        .iter()
        .zip(pairs)
        .map(|(&c, (yes, no))| if c != 0 { yes } else { no });
    Some(Value::Ints(picked.collect()))
}

/// TorchScript spells `repeat_interleave` with it: a shape vector of ones and one repeat count.
fn one_hot(c: &Context) -> Option<Fact> {
    let mut dims = c.shape(0)?.to_vec();
    let depth = c.input(1)?.scalar()? as i64;
    let at = axis(c.node.int("axis").unwrap_or(-1), dims.len() + 1)?;
    dims.insert(at, depth.into());
    let value = (|| {
        let [hot] = c.ints(0)?[..] else { return None };
        let [off, on] = ints_value(c.value(2)?)? else {
            return None;
        };
        let hot = axis(hot, usize::try_from(depth).ok()?)?;
        (depth <= 64).then(|| {
            Value::Ints(
                (0..depth as usize)
                    .map(|i| if i == hot { on } else { off }.clone())
                    .collect(),
            )
        })
    })();
    Some(Fact {
        elem_type: c.ty(2),
        shape: Some(dims),
        value,
    })
}

fn matmul(a: &[Dim], b: &[Dim], ty: i32) -> Option<Fact> {
    let (ra, rb) = (a.len(), b.len());
    if ra == 0 || rb == 0 {
        return None;
    }
    let mut dims = broadcast(&a[..ra.saturating_sub(2)], &b[..rb.saturating_sub(2)])?;
    if ra >= 2 {
        dims.push(a[ra - 2].clone());
    }
    if rb >= 2 {
        dims.push(b[rb - 1].clone());
    }
    Some(Fact::of(ty, Some(dims)))
}

fn fused_matmul(c: &mut Context) -> Option<Fact> {
    let (mut a, mut b) = (c.shape(0)?.to_vec(), c.shape(1)?.to_vec());
    if c.node.int("transBatchA").unwrap_or(0) != 0 || c.node.int("transBatchB").unwrap_or(0) != 0 {
        return None;
    }
    for (flag, dims) in [("transA", &mut a), ("transB", &mut b)] {
        let n = dims.len();
        if c.node.int(flag).unwrap_or(0) != 0 && n >= 2 {
            dims.swap(n - 1, n - 2);
        }
    }
    matmul(&a, &b, c.ty(0))
}

fn gemm(c: &Context) -> Option<Fact> {
    let (a, b) = (c.shape(0)?, c.shape(1)?);
    if a.len() != 2 || b.len() != 2 {
        return None;
    }
    let trans = |name: &str| c.node.int(name).unwrap_or(0) != 0;
    let rows = a[usize::from(trans("transA"))].clone();
    let columns = b[usize::from(!trans("transB"))].clone();
    Some(Fact::of(c.ty(0), Some(vec![rows, columns])))
}

fn conv(c: &mut Context) -> Option<Fact> {
    let (x, w) = (c.shape(0)?.to_vec(), c.shape(1)?.to_vec());
    if x.len() < 3 || x.len() != w.len() {
        return None;
    }
    let spatial = x.len() - 2;
    let list = |name: &str, default: i64, len: usize| {
        c.node
            .ints(name)
            .filter(|v| v.len() == len)
            .map_or_else(|| vec![default; len], <[i64]>::to_vec)
    };
    let (strides, dilations, pads) = (
        list("strides", 1, spatial),
        list("dilations", 1, spatial),
        list("pads", 0, 2 * spatial),
    );
    if c.node
        .attribute("auto_pad")
        .and_then(|a| a.s.as_ref())
        .is_some_and(|s| &s[..] != b"NOTSET")
    {
        return None;
    }
    let mut dims = vec![x[0].clone(), w[0].clone()];
    for i in 0..spatial {
        let kernel = w[i + 2].known()?;
        let reach = dilations[i].checked_mul(kernel - 1)?.checked_add(1)?;
        let padding = pads[i].checked_add(pads[i + spatial])?;
        dims.push(match x[i + 2].known() {
            Some(size) => (size
                .checked_add(padding)?
                .checked_sub(reach)?
                .div_euclid(strides[i].max(1))
                + 1)
            .into(),
            // A patch embedding: the image is a whole number of patches.
            None if reach == strides[i] && padding == 0 => x[i + 2].over(&strides[i].into())?,
            None if strides[i] == 1 && padding == reach - 1 => x[i + 2].clone(),
            None => c.fresh(),
        });
    }
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// Sizes as they come out of a transposed convolution; unusual padding leaves them open.
fn conv_transpose(c: &mut Context) -> Option<Fact> {
    let (x, w) = (c.shape(0)?.to_vec(), c.shape(1)?.to_vec());
    if x.len() < 3 || x.len() != w.len() {
        return None;
    }
    let spatial = x.len() - 2;
    let channels = w[1].times(&c.node.int("group").unwrap_or(1).into())?;
    let mut dims = vec![x[0].clone(), channels];
    let list = |name: &str, default: i64, len: usize| {
        let given = c.node.ints(name).filter(|v| v.len() == len);
        given.map_or_else(|| vec![default; len], <[i64]>::to_vec)
    };
    let (strides, dilations) = (list("strides", 1, spatial), list("dilations", 1, spatial));
    let (pads, extra) = (
        list("pads", 0, 2 * spatial),
        list("output_padding", 0, spatial),
    );
    let plain =
        c.node.attribute("auto_pad").is_none() && c.node.attribute("output_shape").is_none();
    for i in 0..spatial {
        let size = (|| {
            let (input, kernel) = (x[i + 2].known()?, w[i + 2].known()?);
            let reach = dilations[i].checked_mul(kernel - 1)?.checked_add(1)?;
            let grown = strides[i].checked_mul(input - 1)?.checked_add(reach)?;
            let size = grown.checked_add(extra[i])?;
            plain.then(|| size - pads[i] - pads[i + spatial])
        })();
        dims.push(size.map_or_else(|| c.fresh(), Dim::from));
    }
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// Pooling keeps the rank, the batch and the channels; its sizes matter to no attention.
fn pool(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?.to_vec();
    let dims = dims
        .into_iter()
        .enumerate()
        .map(|(axis, d)| if axis < 2 { d } else { c.fresh() })
        .collect();
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// Interpolation: sizes given, or each the input's times a whole scale.
fn resize(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?.to_vec();
    if let Some(sizes) = c.value(3).and_then(ints_value) {
        let sizes = (sizes.len() == dims.len()).then(|| sizes.to_vec());
        return Some(Fact::of(c.ty(0), Some(sizes?)));
    }
    let slot = if c.node.is("Upsample") { 1 } else { 2 };
    let scales = match c.value(slot) {
        Some(Value::Floats(v)) if v.len() == dims.len() => Some(v.clone()),
        _ => None,
    };
    let dims = dims
        .into_iter()
        .enumerate()
        .map(|(axis, dim)| match scales.as_ref().map(|s| s[axis]) {
            Some(scale) if scale == scale.trunc() && scale >= 1.0 => {
                dim.times(&(scale as i64).into())
            }
            // An image is scaled in its last axes.
            None if axis < 2 => Some(dim),
            _ => None,
        })
        .map(|dim| dim.unwrap_or_else(|| c.fresh()))
        .collect();
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn pad(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?.to_vec();
    let rank = dims.len();
    let pads = match c.node.ints("pads") {
        Some(pads) => Some(pads.to_vec()),
        None => c.ints(1),
    }
    .filter(|p| p.len() == 2 * rank && c.input(3).is_none());
    let dims = dims
        .into_iter()
        .enumerate()
        .map(|(axis, dim)| {
            let more = pads.as_ref().map(|p| p[axis] + p[axis + rank]);
            more.and_then(|more| c.symbols.sum(&dim, &more.into(), false))
                .unwrap_or_else(|| c.fresh())
        })
        .collect();
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// Blocks of pixels become channels, or the reverse.
fn blocks(c: &Context, op: &str) -> Option<Fact> {
    let [batch, channels, height, width] = c.shape(0)? else {
        return None;
    };
    let size = Dim::from(c.node.int("blocksize")?);
    let area = size.times(&size)?;
    let dims = if op == "DepthToSpace" {
        [
            batch.clone(),
            channels.over(&area)?,
            height.times(&size)?,
            width.times(&size)?,
        ]
    } else {
        [
            batch.clone(),
            channels.times(&area)?,
            height.over(&size)?,
            width.over(&size)?,
        ]
    };
    Some(Fact::of(c.ty(0), Some(dims.to_vec())))
}

fn einsum(c: &Context) -> Option<Fact> {
    let equation = c.node.attribute("equation")?.s.as_ref()?;
    let equation = std::str::from_utf8(equation).ok()?.replace(' ', "");
    let (terms, result) = equation.split_once("->")?;
    if equation.contains('.') {
        return None;
    }
    let mut sizes = std::collections::HashMap::new();
    for (i, term) in terms.split(',').enumerate() {
        let dims = c.shape(i)?;
        if term.chars().count() != dims.len() {
            return None;
        }
        sizes.extend(term.chars().zip(dims.iter().cloned()));
    }
    let dims = result
        .chars()
        .map(|l| sizes.get(&l).cloned())
        .collect::<Option<_>>()?;
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn attention(c: &Context) -> Option<Fact> {
    let (q, v) = (c.shape(0)?, c.shape(2)?);
    let mut dims = q.to_vec();
    match q.len() {
        4 => *dims.last_mut()? = v.last()?.clone(),
        3 => {
            let (heads, kv_heads) = (c.node.int("q_num_heads")?, c.node.int("kv_num_heads")?);
            let head_dim = v.last()?.over(&kv_heads.into())?;
            *dims.last_mut()? = head_dim.times(&heads.into())?;
        }
        _ => return None,
    }
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// com.microsoft MultiHeadAttention: [B, S, H·D] from q of that shape, or from packed [B, S, H, 3, D].
fn fused_attention(c: &Context) -> Option<Fact> {
    let q = c.shape(0)?;
    let dims = match q.len() {
        3 => {
            let width = match c.shape(2) {
                Some([_, _, v]) => v.clone(),
                Some([_, heads, _, head_dim]) => heads.times(head_dim)?,
                _ => q[2].clone(),
            };
            vec![q[0].clone(), q[1].clone(), width]
        }
        5 => vec![q[0].clone(), q[1].clone(), q[2].times(&q[4])?],
        _ => return None,
    };
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// com.microsoft Attention, whose weights project x to q, k and v: [B, S, width of v].
fn projecting_attention(c: &Context) -> Option<Fact> {
    let (x, weights) = (c.shape(0)?, c.shape(1)?);
    let width = match c.node.ints("qkv_hidden_sizes") {
        Some(&[_, _, v]) => v.into(),
        _ => weights.last()?.over(&3.into())?,
    };
    let [batch, tokens, _] = x else { return None };
    let dims = vec![batch.clone(), tokens.clone(), width];
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn split(c: &mut Context) -> Option<Vec<Fact>> {
    let dims = c.shape(0)?.to_vec();
    let count = c.node.proto.output.len();
    let at = axis(c.node.int("axis").unwrap_or(0), dims.len())?;
    let sizes: Option<Vec<Dim>> = match c.node.ints("split").filter(|s| !s.is_empty()) {
        Some(list) => Some(list.iter().map(|&n| n.into()).collect()),
        None => c.value(1).and_then(ints_value).map(<[Dim]>::to_vec),
    };
    let ty = c.ty(0);
    let value = c.value(0).filter(|_| dims.len() == 1).cloned();
    let mut offset = 0usize;
    (0..count)
        .map(|i| {
            let mut out = dims.clone();
            out[at] = match &sizes {
                Some(sizes) => sizes.get(i)?.clone(),
                None if c.input(1).is_some() => return None,
                None => dims[at].over(&(count as i64).into())?,
            };
            let piece = match (
                &value,
                out[at].known().and_then(|n| usize::try_from(n).ok()),
            ) {
                (Some(Value::Ints(v)), Some(n)) => {
                    v.get(offset..offset + n).map(|s| Value::Ints(s.to_vec()))
                }
                _ => None,
            };
            offset += out[at]
                .known()
                .and_then(|n| usize::try_from(n).ok())
                .unwrap_or(0);
            Some(Fact {
                elem_type: ty,
                shape: Some(out),
                value: piece,
            })
        })
        .collect()
}

fn reduce(c: &Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let keep = c.node.int("keepdims").unwrap_or(1) != 0;
    let axes: Vec<usize> = match c.axes(1) {
        Some(axes) => axes
            .into_iter()
            .map(|a| axis(a, dims.len()))
            .collect::<Option<_>>()?,
        None if c.input(1).is_none() => (0..dims.len()).collect(),
        None => return None,
    };
    let dims = dims
        .iter()
        .enumerate()
        .filter_map(|(i, d)| {
            if !axes.contains(&i) {
                Some(d.clone())
            } else {
                keep.then(|| 1.into())
            }
        })
        .collect();
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn unary(c: &Context, op: &str) -> Option<Fact> {
    let mut fact = same(c);
    fact.value = match (c.value(0), op) {
        (Some(Value::Ints(v)), "Neg") => v
            .iter()
            .map(|d| d.times(&(-1).into()))
            .collect::<Option<_>>()
            .map(Value::Ints),
        (Some(Value::Floats(v)), _) => {
            let apply: fn(f64) -> f64 = match op {
                "Sqrt" => f64::sqrt,
                "Reciprocal" => f64::recip,
                "Neg" => |x| -x,
                "Floor" => f64::floor,
                "Ceil" => f64::ceil,
                _ => return Some(fact),
            };
            Some(Value::Floats(
                v.iter()
                    .map(|&x| round_to(fact.elem_type, apply(x)))
                    .collect(),
            ))
        }
        _ => None,
    };
    Some(fact)
}

fn binary(c: &mut Context, op: &str) -> Option<Fact> {
    let (Some(a), Some(b)) = (c.shape(0), c.shape(1)) else {
        return Some(Fact::of(c.ty(0), None));
    };
    let dims = broadcast(a, b)?;
    let ty = c.ty(0);
    let values = (c.value(0).cloned(), c.value(1).cloned());
    let value = match values {
        (Some(Value::Ints(a)), Some(Value::Ints(b))) => pairs(&a, &b).and_then(|pairs| {
            pairs
                .into_iter()
                .map(|(a, b)| match op {
                    "Add" => c.symbols.sum(&a, &b, false),
                    "Sub" => c.symbols.sum(&a, &b, true),
                    "Mul" => a.times(&b),
                    "Div" => match (a.known(), b.known()) {
                        // ONNX integer division truncates; sizes are never negative.
                        (Some(a), Some(b)) if b != 0 => a.checked_div(b).map(Dim::from),
                        (Some(_), Some(_)) => None,
                        _ => a.over(&b),
                    },
                    "Mod" => match (a.known()?, b.known()?) {
                        (a, b) if b != 0 => a.checked_rem(b).map(Dim::from),
                        _ => None,
                    },
                    _ => None,
                })
                .collect::<Option<_>>()
                .map(Value::Ints)
        }),
        (Some(Value::Floats(a)), Some(Value::Floats(b))) => pairs(&a, &b).and_then(|pairs| {
            let apply: fn(f64, f64) -> f64 = match op {
                "Add" => |a, b| a + b,
                "Sub" => |a, b| a - b,
                "Mul" => |a, b| a * b,
                "Div" => |a, b| a / b,
                "Pow" => f64::powf,
                _ => return None,
            };
            Some(Value::Floats(
                pairs
                    .into_iter()
                    .map(|(a, b)| round_to(ty, apply(a, b)))
                    .collect(),
            ))
        }),
        _ => None,
    };
    Some(Fact {
        elem_type: ty,
        shape: Some(dims),
        value,
    })
}

/// Pairs up two value lists of equal length, or repeats the one that has a single element.
fn pairs<T: Clone>(a: &[T], b: &[T]) -> Option<Vec<(T, T)>> {
    match (a.len(), b.len()) {
        (x, y) if x == y => Some(a.iter().cloned().zip(b.iter().cloned()).collect()),
        (1, _) => Some(b.iter().map(|y| (a[0].clone(), y.clone())).collect()),
        (_, 1) => Some(a.iter().map(|x| (x.clone(), b[0].clone())).collect()),
        _ => None,
    }
}

/// Numpy broadcasting; where two symbolic sizes meet they must be equal at run time.
fn broadcast(a: &[Dim], b: &[Dim]) -> Option<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let one = Dim::from(1);
    let at = |dims: &[Dim], i: usize| {
        (i + dims.len())
            .checked_sub(rank)
            .map_or_else(|| one.clone(), |j| dims[j].clone())
    };
    Some(
        (0..rank)
            .map(|i| unify_broadcast(&at(a, i), &at(b, i)))
            .collect(),
    )
}

fn unify_broadcast(a: &Dim, b: &Dim) -> Dim {
    match (a.known(), b.known()) {
        (Some(1), _) => b.clone(),
        (_, Some(1)) => a.clone(),
        _ => unify(a, b),
    }
}

/// The better known of two sizes that must be equal: the batch, then a number, then the first.
fn unify(a: &Dim, b: &Dim) -> Dim {
    if a == b || a.depends_on(BATCH) {
        a.clone()
    } else if b.depends_on(BATCH) || (b.known().is_some() && a.known().is_none()) {
        b.clone()
    } else {
        a.clone()
    }
}
