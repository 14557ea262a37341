//! `DiTFastAttn`: the attention of one layer in one run.
//!
//! Owns the mapping from a directive to kernel calls: which rows, which residual, what is captured. In the core form it
//! also does what select, share and reuse do around a whole region.

use std::sync::Arc;

use ditfastattn_kernels::{self as kernels, Band, Computed, Input, Mode, Output, Shape, Strides};
use ditfastattn_plans::Plan;

use crate::abi::context::Context;
use crate::abi::info::Info;
use crate::abi::op::Kernel;
use crate::abi::status::{Code, Error};
use crate::abi::tensor::Tensor;
use crate::state::{Directive, Residual, Rows, Run, Work};

use super::band::Text;
use super::io::{self, Io};
use super::layer::{ByType, all_finite, by_type, in_run, layer_of};
use super::layout::{Layout, View};
use super::mask::{MaskInput, Scores};
use super::share::{keep, serve};
use super::storage::{CachedTensor, Real, allocate, nothing, values};

/// q, k, v, ticket, mask?, text?, past? → softmax(scale · q kᵀ + mask) v, as the run's directive says, and present?.
///
/// `past` and `present` are R `[B or B/2, H, N, D]` where the graph carries the state, `[0, H, N, D]` for none.
///
/// `docs/architecture.md` says what it accepts.
///
/// In the form `module` the tensors hold the rows that `DiTFastAttnSelect` let through; in the form `core` they hold
/// the whole batch, and so does the output.
#[derive(Debug)]
pub(crate) struct DiTFastAttn {
    pub(super) layer: usize,
    scale: f32,
    pub(super) core: bool,
    pub(super) layouts: Layouts,
    pub(super) text: Text,
    /// Rows that the mask hides everything from give 0.
    pub(super) guarded: bool,
    pub(super) io: Option<Io>,
}

#[derive(Debug)]
pub(super) struct Layouts {
    pub q: Layout,
    pub k: Layout,
    pub v: Layout,
    pub o: Layout,
}

impl Layouts {
    /// q, k and v of these shapes as batch, heads, tokens and channels.
    ///
    /// # Errors
    /// If they are not of their layouts, or do not belong together.
    pub fn views(&self, q: &[usize], k: &[usize], v: &[usize]) -> Result<[View; 3], Error> {
        // Operands of rank 3 have as many heads as those of rank 4; if all are of rank 3, their heads are batch rows.
        let kv_heads = self
            .k
            .heads(k)
            .or(self.v.heads(v))
            .or(self.q.heads(q))
            .unwrap_or(1);
        let q_heads = self.q.heads(q).unwrap_or(kv_heads);
        let views = [
            self.q.view(q, q_heads, "q")?,
            self.k.view(k, kv_heads, "k")?,
            self.v.view(v, kv_heads, "v")?,
        ];
        let [q_view, k_view, v_view] = &views;
        if q_view.batch != k_view.batch
            || k_view.batch != v_view.batch
            || q_view.channels != k_view.channels
            || k_view.tokens != v_view.tokens
            || k_view.heads != v_view.heads
        {
            return Err(Error::invalid(format!(
                "q {q:?}, k {k:?} and v {v:?} do not belong together; expected one batch, q and k of one head size, \
                 k and v of one length and number of heads"
            )));
        }
        Ok(views)
    }

    /// The output's shape.
    pub fn output_dims(&self, q: &View, v: &View) -> Result<Vec<usize>, Error> {
        self.o
            .dims([q.batch, q.heads, q.tokens, v.channels], |b, h| {
                b.checked_mul(h)
            })
            .ok_or_else(|| Error::invalid("the output's shape overflows"))
    }
}

const DEFAULT_LAYOUT: &str = "BHSD";

pub(super) const TICKET: usize = 3;
pub(super) const MASK: usize = 4;
pub(super) const TEXT: usize = 5;
pub(super) const PAST: usize = 6;
/// The output that holds R where the graph carries the state.
pub(super) const PRESENT: usize = 1;

impl Kernel for DiTFastAttn {
    fn create(info: &Info<'_>) -> Result<Self, Error> {
        let layout = |name: &str| {
            let text = info.string(name);
            Layout::parse(text.as_deref().unwrap_or(DEFAULT_LAYOUT))
                .map_err(|error| Error::graph(format!("{name}: {}", error.message)))
        };
        let layouts = Layouts {
            q: layout("q_layout")?,
            k: layout("k_layout")?,
            v: layout("v_layout")?,
            o: layout("o_layout")?,
        };
        let core = match info.string("form").as_deref() {
            None | Some("module") => false,
            Some("core") => true,
            Some(other) => {
                return Err(Error::graph(format!(
                    "the attribute `form` is `{other}`, expected `module` or `core`"
                )));
            }
        };
        if core && !layouts.o.batch_is_outermost() {
            return Err(Error::graph(
                "the form `core` needs an o_layout that starts with B: it copies halves of the batch",
            ));
        }
        Ok(DiTFastAttn {
            layer: layer_of(info)?,
            scale: info.float("scale").unwrap_or(0.0),
            core,
            layouts,
            text: Text::of(info)?,
            guarded: info.int("mask_guard").unwrap_or(0) != 0,
            io: Io::of(info)?,
        })
    }

    fn compute(&self, context: &Context<'_>) -> Result<(), Error> {
        let q = context.input(0)?;
        by_type(q.element(), Call { op: self, context })
    }
}

struct Call<'a> {
    op: &'a DiTFastAttn,
    context: &'a Context<'a>,
}

impl ByType for Call<'_> {
    fn call<T: Real>(self) -> Result<(), Error> {
        let (op, context) = (self.op, self.context);
        let ticket = context.input(TICKET)?;
        match &op.io {
            Some(io) => self.attend::<T>(Memory::Graph(io), io::directive(&ticket, op.layer)?),
            None => in_run(&ticket, op.layer, |run, directive| {
                self.attend::<T>(Memory::Run(run), directive)
            }),
        }
    }
}

impl Call<'_> {
    fn attend<T: Real>(&self, memory: Memory<'_>, directive: Directive) -> Result<(), Error> {
        let (op, context) = (self.op, self.context);
        let operands = Operands::<T>::read(op, context)?;
        let (q, k) = (&operands.q.1, &operands.k.1);
        let halved = directive.rows == Rows::Half && !op.core;
        let scores = Scores::new(
            q,
            k,
            op.layouts.q.is_folded(),
            halved.then(|| memory.conditional_first()),
        );
        let mask = context
            .optional_input(MASK)?
            .map(|mask| MaskInput::read(&mask, &scores, op.guarded))
            .transpose()?;
        let text = context.optional_input(TEXT)?;
        let band = op.text.band(memory.plan(), text.as_ref(), q.tokens)?;
        let o_dims = op.layouts.output_dims(q, &operands.v.1)?;
        let mut out = context.output(0, &o_dims)?;
        let out = out.as_mut_slice::<T>().unwrap_or_default();
        let call = Layer {
            op,
            context,
            memory,
            directive,
            operands,
            mask,
            band,
        };
        op.refuse_if_served(&memory, directive)?;
        if op.core {
            call.whole_batch(out, &o_dims)
        } else {
            call.compute(0, call.operands.q.1.batch, out)
        }
    }
}

impl DiTFastAttn {
    /// What scores are multiplied by.
    pub(super) fn scale_of(&self, channels: usize) -> f32 {
        if self.scale == 0.0 {
            1.0 / (channels as f32).sqrt()
        } else {
            self.scale
        }
    }

    /// The core form's kept output, for an output of shape `o_dims`.
    pub(super) fn kept(
        &self,
        run: &Run<CachedTensor>,
        o_dims: &[usize],
    ) -> Result<CachedTensor, Error> {
        let kept = run.output(self.layer, 0).ok_or_else(|| {
            Error::new(
                Code::RuntimeException,
                format!("layer {} has lost its cached output", self.layer),
            )
        })?;
        if super::share::rows_of_both(kept.dims(), kept.rows()) == o_dims {
            Ok(kept)
        } else {
            Err(self.does_not_fit(&kept, o_dims))
        }
    }

    pub(super) fn does_not_fit(&self, kept: &CachedTensor, o_dims: &[usize]) -> Error {
        let dims = super::share::rows_of_both(kept.dims(), kept.rows());
        Error::new(
            Code::RuntimeException,
            format!(
                "layer {} has a cached output of shape {dims:?} where {o_dims:?} is needed; \
                 the latents did not show the change, so feed dfa_start when shapes change",
                self.layer
            ),
        )
    }

    /// A layer that is served from the cache must not get here, unless it serves itself.
    pub(super) fn refuse_if_served(
        &self,
        memory: &Memory<'_>,
        directive: Directive,
    ) -> Result<(), Error> {
        let serves_itself = self.core && matches!(memory, Memory::Run(_));
        if directive.work == Work::Reuse && !serves_itself {
            return Err(Error::graph(format!(
                "layer {} is served from the cache in this run, yet it was computed; \
                 the If around it must take its condition from the skip output of the same run",
                self.layer
            )));
        }
        Ok(())
    }
}

/// Who remembers what the layer left at earlier steps.
#[derive(Clone, Copy)]
pub(super) enum Memory<'a> {
    /// The run's request.
    Run(&'a Arc<Run<CachedTensor>>),
    /// The graph: R is an input and an output.
    Graph(&'a Io),
}

impl<'a> Memory<'a> {
    pub fn plan(&self) -> &'a Plan {
        match self {
            Memory::Run(run) => run.program().plan(),
            Memory::Graph(io) => io.plan(),
        }
    }

    pub fn conditional_first(&self) -> bool {
        match self {
            Memory::Run(run) => run.program().conditional_first(),
            Memory::Graph(io) => io.conditional_first(),
        }
    }
}

/// R of an earlier step.
enum Earlier<'a> {
    Cached(Residual<CachedTensor>),
    Given(Tensor<'a>),
}

impl Earlier<'_> {
    fn dims(&self) -> &[usize] {
        match self {
            Earlier::Cached(residual) => residual.tensor.dims(),
            Earlier::Given(tensor) => tensor.dims(),
        }
    }

    fn values<T: Real>(&self) -> Option<&[T]> {
        match self {
            Earlier::Cached(residual) => residual.tensor.values::<T>(),
            Earlier::Given(tensor) => tensor.as_slice::<T>(),
        }
    }
}

/// q, k, v as batch, heads, tokens and channels.
struct Operands<'a, T> {
    q: (&'a [T], View),
    k: (&'a [T], View),
    v: (&'a [T], View),
}

impl<'a, T: Real> Operands<'a, T> {
    fn read(op: &DiTFastAttn, context: &Context<'a>) -> Result<Self, Error> {
        let (q, k, v) = (context.input(0)?, context.input(1)?, context.input(2)?);
        let views = op.layouts.views(q.dims(), k.dims(), v.dims())?;
        Ok(Operands {
            q: (values(&q, "q")?, views[0]),
            k: (values(&k, "k")?, views[1]),
            v: (values(&v, "v")?, views[2]),
        })
    }
}

/// One layer in one run.
struct Layer<'a, T> {
    op: &'a DiTFastAttn,
    context: &'a Context<'a>,
    memory: Memory<'a>,
    directive: Directive,
    operands: Operands<'a, T>,
    mask: Option<MaskInput<'a>>,
    band: Band,
}

impl<T: Real> Layer<'_, T> {
    /// The core form: selects, computes, shares, keeps, reuses.
    fn whole_batch(&self, out: &mut [T], o_dims: &[usize]) -> Result<(), Error> {
        let batch = self.operands.q.1.batch;
        if self.directive.work == Work::Reuse {
            return self.serve_kept(out, o_dims);
        }
        match self.directive.rows {
            Rows::All => {
                self.compute(0, batch, out)?;
                self.finish(out, o_dims);
            }
            Rows::Half => {
                let mut half_dims = o_dims.to_vec();
                super::select::halve(&mut half_dims)?;
                let (first, second) = out.split_at_mut(out.len() / 2);
                let (from, to, start) = if self.memory.conditional_first() {
                    (first, second, 0)
                } else {
                    (second, first, batch / 2)
                };
                self.compute(start, batch / 2, from)?;
                super::layer::copy(self.context, from, to);
                self.finish(from, &half_dims);
            }
        }
        Ok(())
    }

    fn serve_kept(&self, out: &mut [T], o_dims: &[usize]) -> Result<(), Error> {
        let layer = self.op.layer;
        let Memory::Run(run) = self.memory else {
            return Ok(());
        };
        let kept = self.op.kept(run, o_dims)?;
        serve(self.context, &kept, out).ok_or_else(|| self.op.does_not_fit(&kept, o_dims))?;
        run.finish(layer, 0, 1, None);
        Ok(())
    }

    /// The core form's end: what `DiTFastAttnShare` does around a module.
    fn finish(&self, computed: &[T], dims: &[usize]) {
        if let Memory::Run(run) = self.memory {
            let kept = keep(self.context, run, self.directive, computed, dims);
            run.finish(self.op.layer, 0, 1, kept);
        }
    }

    /// Attention of rows `start..start + rows` of the operands into `out`, which holds just those rows.
    fn compute(&self, start: usize, rows: usize, out: &mut [T]) -> Result<(), Error> {
        let whole = self.band.covers(self.operands.q.1.tokens);
        match self.directive.work {
            Work::Full if self.directive.capture && whole => {
                self.attention(start, rows, out, Mode::Full)?;
                self.capture_nothing()
            }
            Work::Full if self.directive.capture => self.capture(start, rows, out),
            Work::Window if whole => {
                if let Memory::Run(run) = self.memory {
                    run.count_window_as_full();
                }
                self.attention(start, rows, out, Mode::Full)?;
                self.no_present()
            }
            Work::Window => match self.residual(rows)? {
                Some((residual, place)) => {
                    self.window(start, rows, out, &residual, place)?;
                    match self.directive.capture {
                        true => self.pass_on(&residual),
                        false => self.no_present(),
                    }
                }
                None => self.without_residual(start, rows, out),
            },
            Work::Full | Work::Reuse => {
                self.attention(start, rows, out, Mode::Full)?;
                self.no_present()
            }
        }
    }

    /// Window attention whose R is missing: full attention, which leaves another one where the graph asks for it.
    fn without_residual(&self, start: usize, rows: usize, out: &mut [T]) -> Result<(), Error> {
        match self.memory {
            Memory::Run(run) => {
                run.discard_residual(self.op.layer);
                self.attention(start, rows, out, Mode::Full)
            }
            Memory::Graph(_) if self.directive.capture => self.capture(start, rows, out),
            Memory::Graph(_) => {
                self.attention(start, rows, out, Mode::Full)?;
                self.no_present()
            }
        }
    }

    /// Full attention that leaves R.
    fn capture(&self, start: usize, rows: usize, out: &mut [T]) -> Result<(), Error> {
        let dims = self.residual_dims(rows);
        let len = dims.iter().product();
        let run = match self.memory {
            Memory::Run(run) => run,
            Memory::Graph(_) if self.wants_present()? => {
                let mut present = self.context.output(PRESENT, &dims)?;
                let residual = present.as_mut_slice::<T>().unwrap_or_default();
                self.attend_and_capture(start, rows, out, residual)?;
                return Ok(());
            }
            Memory::Graph(_) => return self.attention(start, rows, out, Mode::Full),
        };
        let Some(mut room) = allocate::<T>(run, len) else {
            return self.attention(start, rows, out, Mode::Full);
        };
        let computed = self.attend_and_capture(start, rows, out, &mut room.values)?;
        if computed.residual_is_finite {
            let tensor = room.store(&dims, self.directive.rows);
            run.capture(self.op.layer, tensor, self.directive.rows);
        } else {
            run.refuse_non_finite();
        }
        Ok(())
    }

    fn attend_and_capture(
        &self,
        start: usize,
        rows: usize,
        out: &mut [T],
        residual: &mut [T],
    ) -> Result<Computed, Error> {
        let mode = Mode::FullCapture {
            band: self.band,
            residual: Output::from_slice(residual, self.residual_strides()),
        };
        self.attend(start, rows, out, mode)
    }

    /// R is known to be zero and nobody will read it.
    fn capture_nothing(&self) -> Result<(), Error> {
        let Memory::Run(run) = self.memory else {
            return self.no_present();
        };
        if let Some(zero) = nothing(run, self.directive.rows) {
            run.capture(self.op.layer, zero, self.directive.rows);
        }
        Ok(())
    }

    fn wants_present(&self) -> Result<bool, Error> {
        Ok(self.context.output_count()? > PRESENT)
    }

    /// Explicit state: there is no R after this step.
    fn no_present(&self) -> Result<(), Error> {
        if matches!(self.memory, Memory::Graph(_)) && self.wants_present()? {
            self.context.output(PRESENT, &self.residual_dims(0))?;
        }
        Ok(())
    }

    /// Explicit state: R is after this step what it was before.
    fn pass_on(&self, residual: &Earlier<'_>) -> Result<(), Error> {
        if matches!(self.memory, Memory::Run(_)) || !self.wants_present()? {
            return Ok(());
        }
        let mut present = self.context.output(PRESENT, residual.dims())?;
        let to = present.as_mut_slice::<T>().unwrap_or_default();
        let from = residual.values::<T>().unwrap_or_default();
        super::layer::copy(self.context, from, to);
        Ok(())
    }

    /// R for the `rows` rows at hand and where they are in it; `None` if there is none that fits.
    fn residual(&self, rows: usize) -> Result<Option<(Earlier<'_>, Stored)>, Error> {
        let (residual, all) = match self.memory {
            Memory::Run(run) => match run.residual(self.op.layer) {
                Some(residual) => {
                    let all = residual.rows == Rows::All;
                    (Earlier::Cached(residual), all)
                }
                None => return Ok(None),
            },
            Memory::Graph(_) => match self.context.optional_input(PAST)? {
                Some(past) => {
                    let whole = match self.directive.rows {
                        Rows::All => rows,
                        Rows::Half => rows * 2,
                    };
                    let all = past.dims().first() == Some(&whole);
                    // What is not finite would poison every step that adds it, as a run's R would.
                    let finite = |past: &[T]| all_finite(self.context, past);
                    if !past.as_slice::<T>().is_some_and(finite) {
                        return Ok(None);
                    }
                    (Earlier::Given(past), all)
                }
                None => return Ok(None),
            },
        };
        let conditional_first = self.memory.conditional_first();
        let Some(place) = Stored::find(self.directive.rows, all, rows, conditional_first) else {
            return Ok(None);
        };
        let fits =
            residual.dims() == self.residual_dims(place.rows) && residual.values::<T>().is_some();
        Ok(fits.then_some((residual, place)))
    }

    /// Window attention plus residual. A residual of half the rows is used twice.
    fn window(
        &self,
        start: usize,
        rows: usize,
        out: &mut [T],
        residual: &Earlier<'_>,
        place: Stored,
    ) -> Result<(), Error> {
        let strides = self.residual_strides();
        let values = residual.values::<T>().unwrap_or_default();
        let values = values
            .get(place.offset * strides.batch.unsigned_abs()..)
            .unwrap_or_default();
        let mode = || Mode::Window {
            band: self.band,
            residual: Some(Input::from_slice(values, strides)),
        };
        if place.twice {
            self.attention(start, rows / 2, out, mode())?;
            let row = self.output_view()?.strides.batch.unsigned_abs();
            let second = out.get_mut(rows / 2 * row..).unwrap_or_default();
            self.attention(start + rows / 2, rows / 2, second, mode())
        } else {
            self.attention(start, rows, out, mode())
        }
    }

    fn attention(
        &self,
        start: usize,
        rows: usize,
        out: &mut [T],
        mode: Mode<'_>,
    ) -> Result<(), Error> {
        self.attend(start, rows, out, mode).map(|_| ())
    }

    fn attend(
        &self,
        start: usize,
        rows: usize,
        out: &mut [T],
        mode: Mode<'_>,
    ) -> Result<Computed, Error> {
        let Operands { q, k, v } = &self.operands;
        let o = self.output_view()?;
        let shape = Shape {
            batch: rows,
            heads: q.1.heads,
            kv_heads: k.1.heads,
            q_tokens: q.1.tokens,
            kv_tokens: k.1.tokens,
            head_dim: q.1.channels,
            v_dim: v.1.channels,
        };
        let scale = self.op.scale_of(q.1.channels);
        kernels::attention(
            &kernels::Attention {
                shape,
                scale,
                q: from_row(*q, start),
                k: from_row(*k, start),
                v: from_row(*v, start),
                mask: self.mask.map(|mask| mask.starting_at(start)),
                out: Output::from_slice(out, o.strides),
                mode,
            },
            self.context,
        )
        .map_err(|error| Error::invalid(error.to_string()))
    }

    /// The output as batch, heads, tokens and channels. Its strides hold for parts of the batch too.
    fn output_view(&self) -> Result<View, Error> {
        let Operands { q, v, .. } = &self.operands;
        let dims = self.op.layouts.output_dims(&q.1, &v.1)?;
        self.op
            .layouts
            .o
            .view(&dims, self.operands.q.1.heads, "the output")
    }

    fn residual_dims(&self, rows: usize) -> [usize; 4] {
        let (q, v) = (&self.operands.q.1, &self.operands.v.1);
        [rows, q.heads, q.tokens, v.channels]
    }

    fn residual_strides(&self) -> Strides {
        let (q, v) = (&self.operands.q.1, &self.operands.v.1);
        Strides::bhsd(q.heads, q.tokens, v.channels)
    }
}

/// Where the rows at hand are in a stored R.
#[derive(Clone, Copy)]
pub(super) struct Stored {
    /// Rows that R must have.
    pub rows: usize,
    /// The row at which those at hand start.
    pub offset: usize,
    /// R has half of the rows at hand, and each half uses it.
    pub twice: bool,
}

impl Stored {
    /// Where `rows` rows at hand, which are all or the conditional half, are in an R of `all` rows or of half of them; `None`
    /// if it has nothing to say about them.
    pub fn find(at_hand: Rows, all: bool, rows: usize, conditional_first: bool) -> Option<Stored> {
        match (at_hand, all) {
            (Rows::All, true) | (Rows::Half, false) => Some(Stored::at(rows, 0)),
            // R of the conditional half stands for both halves.
            (Rows::All, false) if rows.is_multiple_of(2) => Some(Stored {
                twice: true,
                ..Stored::at(rows / 2, 0)
            }),
            (Rows::All, false) => None,
            (Rows::Half, true) if conditional_first => Some(Stored::at(rows * 2, 0)),
            (Rows::Half, true) => Some(Stored::at(rows * 2, rows)),
        }
    }

    fn at(rows: usize, offset: usize) -> Self {
        Stored {
            rows,
            offset,
            twice: false,
        }
    }
}

/// An operand from row `start` on; the kernel checks that what it needs is there.
fn from_row<'a, T: Real>((values, view): (&'a [T], View), start: usize) -> Input<'a> {
    let first = (start * view.strides.batch.unsigned_abs()).min(values.len());
    Input::from_slice(&values[first..], view.strides)
}
