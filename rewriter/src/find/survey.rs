//! The whole model's attention: every site, what it is, and which form a self-attention layer would get.

use super::Reason;
use super::anchor::{self, Core};
use super::batch::Batch;
use super::choice::Choice;
use super::inputs::{self, Inputs, InputsError, InputsRequest};
use super::linear;
use super::module::{self, Module, Scene};
use super::online;
use super::order;
use super::pair;
use super::source::{self, Dependence};
use super::streams::{Streams, Text};
use super::subgraph;
use crate::onnx::Graph;
use crate::shapes::{self, Facts, SIZE};
use ditfastattn_plans::Fingerprint;
use std::collections::{BTreeSet, HashMap};

/// What an attention site is.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Self-attention of the diffusion transformer: will be rewritten.
    Layer(Box<Layer>),
    /// A layer that the user leaves out.
    Skipped(Reason),
    /// Keys and values come from elsewhere (a prompt): left alone.
    Cross { queries: String, keys: String },
    /// Self-attention, but not of the denoiser (a text encoder, a decoder): left alone.
    Elsewhere(Reason),
    /// Self-attention that the op cannot compute: left alone.
    Unsupported(Reason),
    /// Not an attention that is recognised: left alone.
    Unknown(Reason),
}

/// A self-attention layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Position among the layers that are rewritten, in the order of their numbers (`order`): the plan's column.
    pub index: usize,
    pub core: Core,
    /// Text and image tokens share the sequence, from two streams.
    pub joint: bool,
    /// The text tokens of the sequence.
    pub text: Text,
    /// The module to wrap, or why only the core can be replaced.
    pub module: Result<Module, Reason>,
    /// Whether halves of its rows are halves of the batch, as ASC needs it; else why that is not known.
    pub halves: Result<(), Reason>,
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

    /// Whether any layer has text tokens in its sequence: then a layer that shows none has none.
    pub fn has_text(&self) -> bool {
        self.layers().any(|l| l.joint || l.text != Text::None)
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
        let same = |number: &dyn Fn(&Layer) -> Option<i64>| {
            let mut all = self.layers().map(number);
            let first = all.next()??;
            all.all(|n| n == Some(first))
                .then(|| usize::try_from(first).ok())
                .flatten()
        };
        Fingerprint {
            layers: Some(self.layers().count()),
            heads: same(&|l| l.core.heads),
            head_dim: same(&|l| l.core.head_dim),
            tokens: same(&|l| l.core.tokens.as_ref()?.known()),
        }
    }
}

/// A self-attention of the denoiser, before it is known which of them are rewritten.
struct Candidate {
    core: Core,
    /// Inputs of the projections, and the streams they are spellings of.
    sources: BTreeSet<String>,
    streams: BTreeSet<String>,
    /// Whether it depends on the timestep; a first layer may not yet.
    timed: bool,
}

enum Found {
    Candidate(Box<Candidate>),
    Other(Kind),
}

/// Looks at every site of `graph`.
///
/// # Errors
/// Only when the model's inputs cannot be told apart; sites that do not match are part of the result.
pub fn survey(
    graph: &Graph,
    request: &InputsRequest,
    choice: &Choice,
) -> Result<Survey, InputsError> {
    let inner = subgraph::sites(graph);
    let inputs =
        inputs::find(graph, request).map_err(|error| out_of_reach(graph, &inner, error))?;
    let dependence = Dependence::new(graph);
    let mut facts = shapes::infer(graph, Some(&inputs.latents));
    let mut found = attentions(graph, &facts, &dependence, &inputs);
    let pairs = pair::pairs(graph, &facts, &dependence, &inputs.latents);
    let sources = found.iter().flat_map(|(_, f)| match f {
        Found::Candidate(c) => c.sources.iter().collect::<Vec<_>>(),
        Found::Other(_) => Vec::new(),
    });
    if !pairs.is_empty() && pair::are_behind(&facts, &inputs.latents, sources) {
        facts = shapes::infer_paired(graph, Some(&inputs.latents), pairs);
        found = attentions(graph, &facts, &dependence, &inputs);
    }
    set_untimed_aside(graph, &inputs, &mut found);
    number(graph, &dependence, &inputs, &mut found);
    set_decoders_aside(graph, choice, &mut found);
    let layers: Vec<String> = found
        .iter()
        .filter(|(_, f)| matches!(f, Found::Candidate(_)))
        .map(|(node, _)| graph.nodes[*node].label().to_owned())
        .collect();
    if let Some((option, pattern)) = choice.unmatched(&layers) {
        return Err(InputsError::NoSuchLayer {
            option,
            pattern: pattern.to_string(),
            layers: layers.len(),
        });
    }
    let kinds = into_kinds(graph, &facts, &dependence, &inputs, choice, found);
    let mut sites: Vec<Site> = kinds
        .into_iter()
        .map(|(index, kind)| Site {
            node: graph.nodes[index].label().to_owned(),
            op: graph.nodes[index].op().to_owned(),
            kind,
        })
        .collect();
    sites.extend(linear::sites(graph).into_iter().map(|node| {
        let text = "linear attention: without a softmax there is nothing to window or to share";
        Site {
            node: node.label().to_owned(),
            op: node.op().to_owned(),
            kind: Kind::Unsupported(Reason::new(text, [node.label()])),
        }
    }));
    sites.extend(online::sites(graph).into_iter().map(|(node, why)| Site {
        node: node.label().to_owned(),
        op: node.op().to_owned(),
        kind: Kind::Unknown(Reason::new(why, [node.label()])),
    }));
    sites.extend(inner.into_iter().map(|inner| Site {
        node: inner.label,
        op: inner.op,
        kind: Kind::Unsupported(inner.reason),
    }));
    Ok(Survey {
        inputs,
        facts,
        sites,
    })
}

/// Every attention of `graph`, and what it is.
fn attentions(
    graph: &Graph,
    facts: &Facts,
    dependence: &Dependence,
    inputs: &Inputs,
) -> Vec<(usize, Found)> {
    let cores = anchor::cores(graph, facts, dependence).into_iter();
    cores
        .map(|(index, core)| {
            let found = match core {
                Ok(core) => classify(graph, facts, dependence, inputs, core),
                Err(reason) => Found::Other(Kind::Unknown(reason)),
            };
            (index, found)
        })
        .collect()
}

/// Self-attention of the denoiser, or what it is instead.
fn classify(
    graph: &Graph,
    facts: &Facts,
    dependence: &Dependence,
    inputs: &Inputs,
    core: Core,
) -> Found {
    let label = graph.nodes[core.anchor].label();
    let [q, k, v] = [&core.q, &core.k, &core.v].map(|o| {
        if o.projects() {
            BTreeSet::from([o.value.clone()])
        } else {
            source::sources(graph, facts, dependence, &o.value)
        }
    });
    let roots = |set: &BTreeSet<String>| {
        set.iter()
            .map(|s| source::root(graph, s).to_owned())
            .collect::<BTreeSet<_>>()
    };
    let (rq, rk, rv) = (roots(&q), roots(&k), roots(&v));
    let list = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(", ");
    // Values may be mixed with those of an earlier layer (a value residual); keys decide whose tokens are seen.
    if rq != rk || !rq.is_subset(&rv) {
        return Found::Other(Kind::Cross {
            queries: list(&rq),
            keys: list(&rk.union(&rv).cloned().collect()),
        });
    }
    let depends = |input: &str| q.iter().any(|s| dependence.on(s, input));
    if !depends(&inputs.latents) {
        return Found::Other(elsewhere(&inputs.latents, label));
    }
    let timed = depends(&inputs.timestep);
    // As they stand in the graph, if all agree; else what they are spellings of.
    let sources = if q == k && q.is_subset(&v) {
        q
    } else {
        rq.clone()
    };
    Found::Candidate(Box::new(Candidate {
        core,
        sources: quantized_sources(graph, sources),
        streams: rq,
        timed,
    }))
}

fn elsewhere(input: &str, label: &str) -> Kind {
    let text = format!("self-attention outside the denoiser: it does not depend on `{input}`");
    Kind::Elsewhere(Reason::new(text, [label]))
}

/// Attention of the latents alone is the denoiser's where its result goes on into layers that depend on the timestep.
fn set_untimed_aside(graph: &Graph, inputs: &Inputs, found: &mut [(usize, Found)]) {
    let mut leads = vec![false; graph.nodes.len()];
    for (node, found) in found.iter() {
        leads[*node] = matches!(found, Found::Candidate(c) if c.timed);
    }
    let timed = leads.clone();
    for index in (0..graph.nodes.len()).rev() {
        let node = &graph.nodes[index];
        let mut users = node.proto.output.iter().flat_map(|o| graph.consumers(o));
        // A size is not data.
        let data = |&&user: &&usize| !shapes::is(&graph.nodes[user], SIZE);
        leads[index] = users.by_ref().filter(data).any(|&u| leads[u] || timed[u]);
    }
    for (node, found) in found {
        if matches!(found, Found::Candidate(c) if !c.timed) && !leads[*node] {
            *found = Found::Other(elsewhere(&inputs.timestep, graph.nodes[*node].label()));
        }
    }
}

/// Where the inputs cannot be told because the attention is elsewhere, that is what is wrong.
fn out_of_reach(graph: &Graph, inner: &[subgraph::Inner], error: InputsError) -> InputsError {
    let outer = graph.nodes.iter().filter(|n| anchor::is_anchor(graph, n));
    let named = matches!(error, InputsError::NoSuchInput { .. });
    match inner.first() {
        Some(first) if !named && outer.count() <= inner.len() => InputsError::InSubgraph {
            reason: first.reason.to_string(),
        },
        _ => error,
    }
}

/// A quantised source is quantised inside the module, so that its scale is that of the rows at hand.
fn quantized_sources(graph: &Graph, sources: BTreeSet<String>) -> BTreeSet<String> {
    sources
        .into_iter()
        .map(|s| match graph.producer(&s) {
            Some((node, 0)) if node.is("DynamicQuantizeLinear") => {
                node.input(0).map_or(s.clone(), str::to_owned)
            }
            _ => s,
        })
        .collect()
}

/// Puts the layers in the order of their numbers, in the places that layers have among the sites.
fn number(
    graph: &Graph,
    dependence: &Dependence,
    inputs: &Inputs,
    found: &mut Vec<(usize, Found)>,
) {
    let is_layer = |(_, f): &(usize, Found)| matches!(f, Found::Candidate(_));
    let places: Vec<usize> = (0..found.len()).filter(|&i| is_layer(&found[i])).collect();
    let results: Vec<&str> = places
        .iter()
        .filter_map(|&i| match &found[i].1 {
            Found::Candidate(c) => Some(c.core.out.value.as_str()),
            Found::Other(_) => None,
        })
        .collect();
    let order = order::order(graph, dependence, &inputs.latents, &results);
    let mut from: Vec<usize> = (0..found.len()).collect();
    for (&place, &layer) in places.iter().zip(&order) {
        from[place] = places[layer];
    }
    let mut sites: Vec<Option<(usize, Found)>> =
        std::mem::take(found).into_iter().map(Some).collect();
    found.extend(from.into_iter().filter_map(|i| sites[i].take()));
}

/// An image decoder behind the transformer in the same file has attention that depends on latents and timestep too. It
/// stands alone: fewer sites of another shape, all after the transformer's and fed by them.
fn set_decoders_aside(graph: &Graph, choice: &Choice, found: &mut [(usize, Found)]) {
    let shape = |c: &Candidate| (c.core.heads, c.core.head_dim);
    let mut groups: HashMap<_, Vec<usize>> = HashMap::new();
    for (at, (_, found)) in found.iter().enumerate() {
        if let Found::Candidate(c) = found {
            groups.entry(shape(c)).or_default().push(at);
        }
    }
    let Some(main) = groups.values().max_by_key(|g| g.len()).cloned() else {
        return;
    };
    let last = main.last().copied().unwrap_or(0);
    if main.len() < 2 || !choice.only.is_empty() {
        return;
    }
    for (shape, group) in groups {
        let single_headed = shape.0 == Some(1) || shape.0.is_none();
        let apart = group.first().is_some_and(|&first| first > last);
        if !apart || group.len() >= main.len() || !(single_headed || group.len() == 1) {
            continue;
        }
        for at in group {
            let label = graph.nodes[found[at].0].label();
            let text = format!(
                "self-attention of another shape after the {} layers of the transformer: a decoder's; --only takes it in",
                main.len()
            );
            found[at].1 = Found::Other(Kind::Elsewhere(Reason::new(text, [label])));
        }
    }
}

fn into_kinds(
    graph: &Graph,
    facts: &Facts,
    dependence: &Dependence,
    inputs: &Inputs,
    choice: &Choice,
    found: Vec<(usize, Found)>,
) -> Vec<(usize, Kind)> {
    let cores: Vec<Core> = found
        .iter()
        .filter_map(|(_, f)| match f {
            Found::Candidate(c) => Some(c.core.clone()),
            Found::Other(_) => None,
        })
        .collect();
    let streams = Streams::new(graph, facts, &inputs.latents, &cores);
    let batch = Batch::new(graph, facts);
    let scene = Scene {
        graph,
        facts,
        batch: &batch,
        dependence,
        inputs,
    };
    let (mut seen, mut layers) = (0, 0);
    found
        .into_iter()
        .map(|(node, found)| {
            let candidate = match found {
                Found::Candidate(candidate) => candidate,
                Found::Other(kind) => return (node, kind),
            };
            let label = graph.nodes[node].label();
            let excluded = choice.excludes(seen, label);
            seen += 1;
            if let Some(why) = excluded {
                return (node, Kind::Skipped(Reason::new(why, [label])));
            }
            let text = streams.text(graph, facts, &candidate.core);
            let sources: Vec<String> = candidate.sources.iter().cloned().collect();
            // A block of an attention has no module of its own, and that is the better reason.
            let module = module::isolate(&scene, &candidate.core, &sources)
                .map_err(|why| candidate.core.apart.clone().unwrap_or(why));
            let halves = halves(&scene, &candidate.core);
            let layer = Layer {
                halves,
                index: layers,
                joint: candidate.streams.len() > 1,
                core: candidate.core,
                text,
                module,
            };
            layers += 1;
            (node, Kind::Layer(Box::new(layer)))
        })
        .collect()
}

/// Rows of the core may be folded with heads, frames or positions; the batch must be the outermost of them.
fn halves(scene: &Scene, core: &Core) -> Result<(), Reason> {
    let &Scene {
        graph,
        facts,
        batch,
        ..
    } = scene;
    let out = &core.out.value;
    if batch.has_halves(facts, out) {
        return Ok(());
    }
    let text = format!(
        "it is not known that the batch is outermost in the attention's result `{out}` {}",
        facts.show(out)
    );
    Err(Reason::new(text, [graph.nodes[core.anchor].label()]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::testing::model;

    fn surveyed(text: &str) -> Result<Survey, InputsError> {
        survey(
            &model(text).graph,
            &InputsRequest::default(),
            &Choice::default(),
        )
    }

    /// Attention of `x` with its projections, as operators of its own.
    fn layer(x: &str, name: &str) -> String {
        format!(
            "q{name} = MatMul({x}, w)
             k{name} = MatMul({x}, w)
             v{name} = MatMul({x}, w)
             o{name} = Attention(q{name}, k{name}, v{name}) q_num_heads=4 kv_num_heads=4
             a{name} = MatMul(o{name}, w)"
        )
    }

    const HEAD: &str = "opset 23
        input x float [b, 64, 32]
        input t float [b]
        weight w [32, 32]
        weight f [1, 32]
        ints axes [1]
        t1 = Unsqueeze(t, axes)
        tf = Mul(t1, f)
        ts = Sin(tf)
        te = Unsqueeze(ts, axes)
        output out float [b, 64, 32]";

    #[test]
    fn a_first_layer_that_does_not_know_the_time_is_a_layer() {
        let text = format!(
            "{HEAD}
             input text float [b, 64, 32]
             {}
             {}
             {}
             y = Add(aone, atext)
             z = Add(y, te)
             {}
             {}
             out = Add(atwo, alast)",
            layer("x", "one"),
            layer("text", "text"),
            // Nothing of it goes into a layer that knows the time.
            layer("x", "last"),
            layer("z", "two"),
            "unused = Identity(olast)",
        );
        let found = surveyed(&text).unwrap();
        let kinds: Vec<_> = found
            .sites
            .iter()
            .map(|s| (s.node.as_str(), &s.kind))
            .collect();
        let is_layer = |node: &str| {
            let kind = kinds.iter().find(|(n, _)| *n == node).unwrap().1;
            matches!(kind, Kind::Layer(_))
        };
        assert!(is_layer("node_oone") && is_layer("node_otwo"), "{kinds:?}");
        assert!(
            !is_layer("node_otext") && !is_layer("node_olast"),
            "{kinds:?}"
        );
    }

    #[test]
    fn attention_in_a_subgraph_is_named() {
        let branch = "graph body
             p = Softmax(s)
             r = MatMul(p, x)
             output r
             end";
        let text = format!(
            "{branch}
             {HEAD}
             y = Add(x, te)
             s = MatMul(y, w)
             out = If(t) then_branch=@body else_branch=@body"
        );
        let found = surveyed(&text).unwrap();
        assert_eq!(found.sites.len(), 2);
        let Kind::Unsupported(reason) = &found.sites[1].kind else {
            panic!("{:?}", found.sites[1]);
        };
        assert!(
            reason.text.contains("`else_branch` of the If `node_out`"),
            "{reason}"
        );
        // The whole denoiser in a loop: the timestep is not what is wrong.
        let text = format!(
            "{branch}
             opset 17
             input x float [b, 64, 32]
             input steps int64 []
             input s float [b, 64, 64]
             out = Loop(steps, _, x) body=@body
             output out float [b, 64, 32]"
        );
        let error = surveyed(&text).unwrap_err().to_string();
        assert!(error.contains("`body` of the Loop `node_out`"), "{error}");
    }

    #[test]
    fn an_attention_operator_of_whatever_domain_is_named() {
        let text = format!(
            "opset acme 1
             {HEAD}
             y = Add(x, te)
             out = acme::FlashAttention(y, y, y)"
        );
        let found = surveyed(&text).unwrap();
        let [site] = &found.sites[..] else {
            panic!("{:?}", found.sites);
        };
        let Kind::Unknown(reason) = &site.kind else {
            panic!("{site:?}");
        };
        assert!(reason.text.contains("acme::FlashAttention"), "{reason}");
    }
}
