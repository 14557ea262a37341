//! `DiTFastAttn`: the attention of one layer in one run.
//!
//! Owns the operator's attributes and the numbers of its inputs and outputs. `task` has what is decided before anything is
//! computed, `host_attention` and `cuda::attention` what is computed then.

use ditfastattn_contract::attributes::attention as names;

use crate::abi::error::{Code, Error};
use crate::abi::kernel_info::KernelInfo;
use crate::state::Run;

use super::band::TextTokens;
use super::cache_entry::CachedTensor;
use super::io::Io;
use super::layout::{Layout, View};
use super::op_common::layer_of;

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
    pub(super) text: TextTokens,
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

pub(super) use ditfastattn_contract::operators::attention::{MASK, PAST, PRESENT, TEXT, TICKET};

impl DiTFastAttn {
    /// From the node's attributes.
    ///
    /// # Errors
    /// If they are none of ours.
    pub(super) fn of(info: &KernelInfo<'_>) -> Result<Self, Error> {
        let layout = |name: &str| {
            let text = info.string(name);
            Layout::parse(text.as_deref().unwrap_or(DEFAULT_LAYOUT))
                .map_err(|error| Error::graph(format!("{name}: {}", error.message)))
        };
        let layouts = Layouts {
            q: layout(names::Q_LAYOUT)?,
            k: layout(names::K_LAYOUT)?,
            v: layout(names::V_LAYOUT)?,
            o: layout(names::O_LAYOUT)?,
        };
        let core = match info.string(names::FORM).as_deref() {
            None | Some(names::FORM_MODULE) => false,
            Some(names::FORM_CORE) => true,
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
            scale: info.float(names::SCALE).unwrap_or(0.0),
            core,
            layouts,
            text: TextTokens::of(info)?,
            guarded: info.int(names::MASK_GUARD).unwrap_or(0) != 0,
            io: Io::of(info)?,
        })
    }

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
}
