//! The patch of one layer: the module form wraps projections and attention in an `If`; the core form replaces
//! softmax(q·kᵀ)·v only.

use super::attention::Attention;
use super::build::{self, Names, Writer};
use super::step::Step;
use super::text::TextTokens;
use super::{DOMAIN, LowerError, explicit_state};
use crate::find::{Layer, Module, Survey, Target};
use crate::onnx::{AttributeProto, Graph, Node, NodeProto};
use crate::shapes::Fact;
use bytes::Bytes;
use ditfastattn_contract::attributes::layer as attributes_of;
use ditfastattn_contract::operators::{REUSE, SELECT, SHARE};
use prost::Message;
use std::collections::{BTreeSet, HashMap};

/// What to do for one layer.
pub struct Patch {
    /// Index of the node after whose place the new nodes go.
    pub position: usize,
    pub nodes: Vec<Bytes>,
    /// Nodes that leave the main graph for the branch.
    pub moved: BTreeSet<usize>,
    pub value_info: Vec<Bytes>,
}

pub fn build(
    graph: &Graph,
    survey: &Survey,
    layer: &Layer,
    replaced: &BTreeSet<usize>,
    step: &Step,
    text: &TextTokens,
    names: &mut Names,
) -> Result<Patch, LowerError> {
    let prefix = format!("dfa/layer_{}", layer.index);
    let lowering = Lowering {
        graph,
        survey,
        layer,
        replaced,
        step,
        text,
        prefix: &prefix,
    };
    match &layer.module {
        Ok(module) => lowering.module_form(module, names),
        Err(_) => lowering.core_form(names),
    }
}

pub struct Lowering<'a> {
    pub graph: &'a Graph,
    survey: &'a Survey,
    pub layer: &'a Layer,
    /// The exporter's nodes that the op stands for.
    pub replaced: &'a BTreeSet<usize>,
    pub step: &'a Step,
    text: &'a TextTokens,
    pub prefix: &'a str,
}

impl Lowering<'_> {
    fn position(&self, value: &str) -> usize {
        self.graph
            .producer_index(value)
            .map_or(0, |(index, _)| index)
    }

    pub fn fact(&self, value: &str) -> Fact {
        let mut fact = self.survey.facts.of(value);
        if fact.elem_type == 0 {
            fact.elem_type = self.layer.core.elem_type;
        }
        fact
    }

    pub fn attention<'a>(
        &'a self,
        renamed: &'a HashMap<String, String>,
        present: &'a str,
    ) -> Attention<'a> {
        let io = self.step.io.as_ref().map(|io| {
            let state = &io.layers[self.layer.index];
            (
                io.attributes.as_slice(),
                state.past_residual.as_str(),
                present,
            )
        });
        Attention {
            survey: self.survey,
            layer: self.layer,
            ticket: &self.step.ticket,
            text: self.text,
            io,
            prefix: self.prefix,
            renamed,
        }
    }

    /// One of the ops around the attention: `x`, ticket, past output if any → result.
    fn around(
        &self,
        w: &mut Writer<'_>,
        op: &str,
        (x, past): (&str, Option<&str>),
        result: &str,
        mut attributes: Vec<AttributeProto>,
    ) {
        attributes.insert(
            0,
            AttributeProto::int(attributes_of::LAYER, self.layer.index as i64),
        );
        let name = w.names.fresh(&format!("{result}/op"));
        let mut inputs = vec![x, &self.step.ticket];
        inputs.extend(past);
        if let Some(io) = &self.step.io {
            attributes.extend_from_slice(&io.attributes);
        }
        w.nodes.push(build::node(
            DOMAIN,
            op,
            name,
            &inputs,
            &[result],
            &attributes,
        ));
    }

    /// Which of the module's results an op stands for.
    fn place(sink: usize, sinks: usize) -> Vec<AttributeProto> {
        if sinks == 1 {
            return Vec::new();
        }
        vec![
            AttributeProto::int(attributes_of::SINK, sink as i64),
            AttributeProto::int(attributes_of::SINKS, sinks as i64),
        ]
    }

    /// How many leading rows of `sink` there are for each of `source`; 0 if that is no whole number.
    fn fold(&self, source: &str, sink: &str) -> i64 {
        let rows = |value: &str| self.survey.facts.shape(value)?.first().cloned();
        rows(sink)
            .zip(rows(source))
            .and_then(|(sink, source)| sink.over(&source)?.known())
            .unwrap_or(0)
    }

    fn core_form(&self, names: &mut Names) -> Result<Patch, LowerError> {
        let out = &self.layer.core.out.value;
        let mut w = Writer::new(names);
        if self.step.io.is_some() {
            self.core_with_state(&mut w);
        } else {
            self.attend(&mut w, &HashMap::new(), "")?;
        }
        let annotate = (self.step.io.is_some() || self.layer.core.out.prep.is_empty())
            && !self.graph.value_info.contains_key(out);
        Ok(Patch {
            position: self.position(out),
            nodes: w.nodes,
            moved: BTreeSet::new(),
            value_info: annotate
                .then(|| build::value_info(out, &self.fact(out)))
                .into_iter()
                .chain(w.value_info)
                .collect(),
        })
    }

    /// The core form where the graph carries the state: without a memory of its own the op cannot serve `ast`, so an `If` does.
    fn core_with_state(&self, w: &mut Writer<'_>) {
        let core = &self.layer.core;
        let computed = w.names.fresh(&format!("{}/computed", self.prefix));
        let renamed = HashMap::from([(core.out.value.clone(), computed.clone())]);
        let present = w.names.fresh(&format!("{}/residual", self.prefix));
        let outside = std::mem::take(&mut w.nodes);
        self.attention(&renamed, &present).write(w);
        let fact = self.fact(&core.out.value);
        let outputs = vec![build::value_info(&computed, &fact)];
        let types = std::mem::take(&mut w.value_info);
        let sinks = std::slice::from_ref(&core.out.value);
        let compute = std::mem::replace(&mut w.nodes, outside);
        let if_node = self.either(w, compute, (outputs, types), &present, sinks, |_| {
            core.q.value.as_str()
        });
        w.nodes.push(if_node);
    }

    fn module_form(&self, module: &Module, names: &mut Names) -> Result<Patch, LowerError> {
        let prefix = self.prefix;
        let sinks = module.sinks.len();
        let mut w = Writer::new(names);
        let renamed = self.renamed(module, w.names);
        let mut inner_info = Vec::new();
        for value in module.sources.iter().chain(&module.selected) {
            let selected = &renamed[value];
            self.around(&mut w, SELECT.as_str(), (value, None), selected, Vec::new());
            inner_info.push(build::value_info(selected, &self.fact(value)));
        }
        let present = w.names.fresh(&format!("{prefix}/residual"));
        self.inside(module, &renamed, &present, &mut w)?;
        inner_info.append(&mut w.value_info);
        let core = &self.layer.core;
        let result = renamed.get(&core.out.value).unwrap_or(&core.out.value);
        if core.out.prep.is_empty() && !module.sinks.contains(&core.out.value) {
            inner_info.push(build::value_info(result, &self.fact(&core.out.value)));
        }
        let mut outputs = Vec::new();
        for (sink, value) in module.sinks.iter().enumerate() {
            let shared = w.names.fresh(&format!("{prefix}/shared"));
            let place = Self::place(sink, sinks);
            let computed = (renamed[value].as_str(), None);
            self.around(&mut w, SHARE.as_str(), computed, &shared, place);
            outputs.push(build::value_info(&shared, &self.fact(value)));
        }
        let compute = std::mem::take(&mut w.nodes);
        let inner = (outputs, inner_info);
        let node = self.either(&mut w, compute, inner, &present, &module.sinks, |sink| {
            &module.sources[sink.min(module.sources.len() - 1)]
        });
        Ok(Patch {
            position: module
                .sinks
                .iter()
                .map(|s| self.position(s))
                .min()
                .unwrap_or(0),
            nodes: vec![node],
            moved: module
                .inside
                .difference(&module.duplicated)
                .copied()
                .collect(),
            value_info: module
                .sinks
                .iter()
                .filter(|s| !self.graph.value_info.contains_key(*s))
                .map(|s| build::value_info(s, &self.fact(s)))
                .collect(),
        })
    }

    /// The `If` of a layer: served from the cache, or computed by the nodes `compute`, whose outputs and annotations are `inner`.
    /// Where the graph carries the state, `present` is R after the computation. `source` gives the input that a sink is like.
    fn either<'s>(
        &self,
        w: &mut Writer<'_>,
        compute: Vec<Bytes>,
        inner: (Vec<Bytes>, Vec<Bytes>),
        present: &str,
        sinks: &[String],
        source: impl Fn(usize) -> &'s str,
    ) -> Bytes {
        let prefix = self.prefix;
        let state = self.step.io.as_ref().map(|io| &io.layers[self.layer.index]);
        let residual = |name: &str| {
            build::sized(
                name,
                self.layer.core.elem_type,
                &[None, self.layer.core.heads, None, None],
            )
        };
        let (mut outputs, inner_info) = inner;
        outputs.extend(state.map(|_| residual(present)));
        let full = build::branch(format!("{prefix}/compute"), compute, outputs, inner_info);

        let before = std::mem::take(&mut w.nodes);
        let mut outputs = Vec::new();
        for (sink, value) in sinks.iter().enumerate() {
            let reused = w.names.fresh(&format!("{prefix}/reused"));
            let mut attributes = Self::place(sink, sinks.len());
            let fold = self.fold(source(sink), value);
            if fold != 1 {
                attributes.push(AttributeProto::int(attributes_of::FOLD, fold));
            }
            let past = state.map(|s| s.past_outputs[sink].as_str());
            let from = (source(sink), past);
            self.around(w, REUSE.as_str(), from, &reused, attributes);
            outputs.push(build::value_info(&reused, &self.fact(value)));
        }
        if let Some(state) = state {
            let handed_on = w.names.fresh(&format!("{prefix}/residual_kept"));
            explicit_state::rows(w, &state.past_residual, &state.residual_rows, &handed_on);
            outputs.push(residual(&handed_on));
        }
        let nodes = std::mem::replace(&mut w.nodes, before);
        let cached = build::branch(format!("{prefix}/cached"), nodes, outputs, Vec::new());

        let name = w.names.fresh(&format!("{prefix}/if"));
        let results = sinks.iter().map(String::as_str);
        let results: Vec<&str> = results
            .chain(state.map(|s| s.present_residual.as_str()))
            .collect();
        let skip = &self.step.skip[self.layer.index];
        build::either(name, skip, cached, full, &results)
    }

    /// Inside, sources are the selected rows, sinks are not yet doubled, and duplicates need names of their own.
    fn renamed(&self, module: &Module, names: &mut Names) -> HashMap<String, String> {
        let prefix = self.prefix;
        let mut renamed = HashMap::new();
        for value in module.sources.iter().chain(&module.selected) {
            renamed.insert(value.clone(), names.fresh(&format!("{prefix}/selected")));
        }
        for value in &module.sinks {
            renamed.insert(value.clone(), names.fresh(&format!("{prefix}/computed")));
        }
        for &index in &module.duplicated {
            for output in &self.graph.nodes[index].proto.output {
                if !output.is_empty() && !module.sinks.contains(output) {
                    renamed.insert(output.clone(), names.fresh(&format!("{prefix}/{output}")));
                }
            }
        }
        renamed
    }

    /// The exporter's nodes, with the op where the attention was.
    fn inside(
        &self,
        module: &Module,
        renamed: &HashMap<String, String>,
        present: &str,
        w: &mut Writer<'_>,
    ) -> Result<(), LowerError> {
        let op_at = self.position(&self.layer.core.out.value);
        let mut attended = false;
        for &index in &module.inside {
            if index > op_at && !attended {
                self.attend(w, renamed, present)?;
                attended = true;
            }
            let node = &self.graph.nodes[index];
            let target = module
                .retargeted
                .get(&index)
                .map(|target| self.target(w, node, target, renamed));
            let duplicate = module.duplicated.contains(&index);
            let moved = self.moved_node(node, renamed, target, duplicate, w.names)?;
            w.nodes.push(moved);
        }
        if !attended {
            self.attend(w, renamed, present)?;
        }
        Ok(())
    }

    /// The shape that `node` gets instead of its own.
    fn target(
        &self,
        w: &mut Writer<'_>,
        node: &Node,
        target: &Target,
        renamed: &HashMap<String, String>,
    ) -> String {
        let near = format!("{}/shape", self.prefix);
        match target {
            Target::Constant(sizes) => w.ints(&near, sizes),
            Target::Patched(sizes) => {
                let exported = node.input(1).unwrap_or_default();
                let exported = renamed.get(exported).map_or(exported, String::as_str);
                let kept: Vec<bool> = sizes.iter().map(Option::is_none).collect();
                let ours: Vec<i64> = sizes.iter().map(|s| s.unwrap_or(1)).collect();
                let (kept, ours) = (w.bools(&near, &kept), w.ints(&near, &ours));
                w.push("Where", &near, &[&kept, exported, &ours], &[])
            }
        }
    }

    /// `node` as it stands inside the branch: the exporter's own bytes unless something in it changes.
    pub fn moved_node(
        &self,
        node: &Node,
        renamed: &HashMap<String, String>,
        target: Option<String>,
        duplicate: bool,
        names: &mut Names,
    ) -> Result<Bytes, LowerError> {
        let touched = node
            .proto
            .input
            .iter()
            .chain(&node.proto.output)
            .any(|n| renamed.contains_key(n));
        if !touched && target.is_none() {
            return Ok(node.raw.clone());
        }
        if !NodeProto::is_fully_known(&node.raw) {
            return Err(LowerError::UnknownFields {
                node: node.label().into(),
            });
        }
        let mut proto = node.proto.clone();
        for name in proto.input.iter_mut().chain(&mut proto.output) {
            if let Some(new) = renamed.get(name) {
                name.clone_from(new);
            }
        }
        if let Some(target) = target {
            proto.input[1] = target;
            // Our shapes use 0 for "copy", never for an empty axis.
            proto
                .attribute
                .retain(|a| AttributeProto::decode(a.clone()).is_ok_and(|a| a.name != "allowzero"));
        }
        if let (true, Some(name)) = (duplicate, &mut proto.name)
            && !name.is_empty()
        {
            *name = names.fresh(&format!("{}/{name}", self.prefix));
        }
        Ok(proto.encode_to_vec().into())
    }
}
