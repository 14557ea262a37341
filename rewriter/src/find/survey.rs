//! The whole model's attention: every site, what it is, and which form a self-attention layer would get.

use super::Reason;
use super::anchor::{self, Core};
use super::inputs::{self, Inputs, InputsError, InputsRequest};
use super::module::{self, Module};
use super::source::{self, Dependence};
use crate::onnx::Graph;
use crate::shapes::{self, Facts};
use ditfastattn_plans::Fingerprint;
use std::collections::BTreeSet;

/// What an attention site is.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Self-attention of the diffusion transformer: will be rewritten.
    Layer(Box<Layer>),
    /// Keys and values come from elsewhere (a prompt): left alone.
    Cross { queries: String, keys: String },
    /// Self-attention, but not of the denoiser (a text encoder, a decoder): left alone.
    Elsewhere(Reason),
    /// Self-attention that the op cannot compute yet: left alone.
    Unsupported(Reason),
    /// Not an attention that is recognised: left alone.
    Unknown(Reason),
}

/// A self-attention layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Position among the layers, in topological order.
    pub index: usize,
    pub core: Core,
    /// Text and image tokens share the sequence, from two streams.
    pub joint: bool,
    /// The module to wrap, or why only the core can be replaced.
    pub module: Result<Module, Reason>,
}

/// One softmax or attention operator.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    pub node: String,
    pub op: String,
    pub kind: Kind,
}

/// Everything that was found.
#[derive(Debug)]
pub struct Survey {
    pub inputs: Inputs,
    pub facts: Facts,
    pub sites: Vec<Site>,
}

impl Survey {
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.sites.iter().filter_map(|s| match &s.kind {
            Kind::Layer(layer) => Some(layer.as_ref()),
            _ => None,
        })
    }

    /// Name of the softmax or attention node of `layer`.
    pub fn label(&self, layer: &Layer) -> String {
        let is_it = |s: &&Site| matches!(&s.kind, Kind::Layer(l) if l.index == layer.index);
        self.sites
            .iter()
            .find(is_it)
            .map_or_else(String::new, |s| s.node.clone())
    }

    /// What a plan made for this model would say of it; numbers that differ between layers are left out.
    pub fn fingerprint(&self) -> Fingerprint {
        let same = |number: fn(&Layer) -> Option<i64>| {
            let mut all = self.layers().map(number);
            let first = all.next()??;
            all.all(|n| n == Some(first))
                .then(|| usize::try_from(first).ok())
                .flatten()
        };
        Fingerprint {
            layers: Some(self.layers().count()),
            heads: same(|l| l.core.heads),
            head_dim: same(|l| l.core.head_dim),
            tokens: same(|l| l.core.tokens.as_ref()?.parse().ok()),
        }
    }
}

/// Looks at every site of `graph`.
///
/// # Errors
/// Only when the model's inputs cannot be told apart; sites that do not match are part of the result.
pub fn survey(graph: &Graph, request: &InputsRequest) -> Result<Survey, InputsError> {
    let inputs = inputs::find(graph, request)?;
    let facts = shapes::infer(graph, Some(&inputs.latents));
    let dependence = Dependence::new(graph);
    let mut layers = 0;
    let sites = graph
        .nodes
        .iter()
        .enumerate()
        .filter(|(_, node)| anchor::is_anchor(graph, node))
        .map(|(index, node)| {
            let kind = match anchor::core(graph, &facts, index) {
                Ok(core) => classify(graph, &facts, &dependence, &inputs, core, &mut layers),
                Err(reason) => Kind::Unknown(reason),
            };
            Site {
                node: node.label().to_owned(),
                op: node.op().to_owned(),
                kind,
            }
        })
        .collect();
    Ok(Survey {
        inputs,
        facts,
        sites,
    })
}

fn classify(
    graph: &Graph,
    facts: &Facts,
    dependence: &Dependence,
    inputs: &Inputs,
    core: Core,
    layers: &mut usize,
) -> Kind {
    let label = graph.nodes[core.anchor].label();
    let [q, k, v] =
        [&core.q, &core.k, &core.v].map(|o| source::sources(graph, dependence, &o.value));
    let roots = |set: &BTreeSet<String>| {
        set.iter()
            .map(|s| source::root(graph, s).to_owned())
            .collect::<BTreeSet<_>>()
    };
    let (rq, rk, rv) = (roots(&q), roots(&k), roots(&v));
    let list = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(", ");
    if rq != rk || rq != rv {
        return Kind::Cross {
            queries: list(&rq),
            keys: list(&rk.union(&rv).cloned().collect()),
        };
    }
    let needs = |input: &str| q.iter().any(|s| dependence.on(s, input));
    for input in [&inputs.latents, &inputs.timestep] {
        if !needs(input) {
            let text =
                format!("self-attention outside the denoiser: it does not depend on `{input}`");
            return Kind::Elsewhere(Reason::new(text, [label]));
        }
    }
    if let Some(mask) = &core.mask {
        let text = format!("self-attention with a mask (`{mask}`) is not supported yet");
        return Kind::Unsupported(Reason::new(text, [label]));
    }
    let module = match (q.len(), rq.len()) {
        (1, _) if q == k && q == v => {
            module::isolate(graph, facts, &core, q.first().expect("one source"))
        }
        (_, 1) => module::isolate(graph, facts, &core, rq.first().expect("one source")),
        (_, streams) => {
            let text = format!("joint attention over {streams} streams: {}", list(&rq));
            Err(Reason::new(text, [label]))
        }
    };
    let index = *layers;
    *layers += 1;
    Kind::Layer(Box::new(Layer {
        index,
        core,
        joint: rq.len() > 1,
        module,
    }))
}
