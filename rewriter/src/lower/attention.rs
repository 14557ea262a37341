//! The attention op of one layer, and the nodes that bring its operands into a form that it reads.

use super::DOMAIN;
use super::build::{self, Writer};
use super::text::TextTokens;
use crate::find::{Core, Layer, Mask, Operand, Prep, Survey, Term};
use crate::onnx::{AttributeProto, elem_type};
use ditfastattn_contract::attributes::{self, attention as names};
use ditfastattn_contract::operators::{ATTENTION, attention as inputs};
use std::collections::HashMap;

/// What an attention op is made of.
pub struct Attention<'a> {
    pub survey: &'a Survey,
    pub layer: &'a Layer,
    pub ticket: &'a str,
    pub text: &'a TextTokens,
    /// Explicit state: attributes, and where R comes from and goes to.
    pub io: Option<(&'a [AttributeProto], &'a str, &'a str)>,
    /// What the names of this layer's new values and nodes begin with.
    pub prefix: &'a str,
    /// Values that have another name where the op stands.
    pub renamed: &'a HashMap<String, String>,
}

impl Attention<'_> {
    fn name_here<'n>(&'n self, value: &'n str) -> &'n str {
        self.renamed.get(value).map_or(value, String::as_str)
    }

    /// Writes the op; its result has the name of the exporter's.
    pub fn write(&self, w: &mut Writer<'_>) {
        let Self {
            layer,
            prefix,
            ticket,
            ..
        } = *self;
        let core = &layer.core;
        let mut prepared = HashMap::new();
        let [q, k, v] = [(&core.q, "q"), (&core.k, "k"), (&core.v, "v")]
            .map(|(operand, role)| self.operand(w, operand, role, &mut prepared));
        let mask = self.mask(w, core);
        let mut attributes = vec![
            AttributeProto::int(attributes::layer::LAYER, layer.index as i64),
            AttributeProto::float(names::SCALE, core.scale.map_or(0.0, |s| s as f32)),
            AttributeProto::string(names::FORM, form(layer)),
            AttributeProto::string(names::Q_LAYOUT, &core.q.layout),
            AttributeProto::string(names::K_LAYOUT, &core.k.layout),
            AttributeProto::string(names::V_LAYOUT, &core.v.layout),
            AttributeProto::string(names::O_LAYOUT, &core.out.layout),
        ];
        if core.mask.guard && mask.is_some() {
            attributes.push(AttributeProto::int(names::MASK_GUARD, 1));
        }
        let text = self.text(w, &mut attributes);
        let mut inputs = vec![q.as_str(), &k, &v, ticket];
        match (&mask, &text) {
            (Some(mask), Some(text)) => inputs.extend([mask.as_str(), text]),
            (Some(mask), None) => inputs.push(mask),
            (None, Some(text)) => inputs.extend(["", text]),
            (None, None) => {}
        }
        let mut outputs = Vec::new();
        if let Some((state, past, present)) = self.io {
            inputs.resize(inputs::PAST, "");
            inputs.push(past);
            outputs.push(present);
            attributes.extend_from_slice(state);
        }
        let result = self.name_here(&core.out.value).to_owned();
        let merged = matches!(core.out.prep.as_slice(), [Prep::SplitHeads(_)]);
        let cast = self.result_type();
        let out = if merged || cast.is_some() {
            w.names.fresh(&format!("{prefix}/out_heads"))
        } else {
            result.clone()
        };
        outputs.insert(0, &out);
        let name = w.names.fresh(&format!("{prefix}/attention"));
        w.nodes.push(build::node(
            DOMAIN,
            ATTENTION.as_str(),
            name,
            &inputs,
            &outputs,
            &attributes,
        ));
        let joined = match cast {
            Some(_) if merged => w.names.fresh(&format!("{prefix}/out_joined")),
            Some(_) => out.clone(),
            None => result.clone(),
        };
        if out != result {
            let heads = |letter| if letter == 'H' { core.heads } else { None };
            let sizes: Vec<Option<i64>> = core.out.layout.chars().map(heads).collect();
            w.value_info
                .push(build::sized(&out, core.elem_type, &sizes));
        }
        if merged {
            let shape = w.ints(&out, &[0, 0, -1]);
            w.push_as("Reshape", &joined, &[&out, &shape], &[]);
        }
        if let Some(ty) = cast {
            let to = AttributeProto::int("to", i64::from(ty));
            w.push_as("Cast", &result, &[&joined], &[to]);
        }
    }

    /// The type of the exporter's result, where it is not the op's.
    fn result_type(&self) -> Option<i32> {
        let core = &self.layer.core;
        let ty = self.survey.facts.of(&core.out.value).elem_type;
        (ty != 0 && core.elem_type != 0 && ty != core.elem_type).then_some(ty)
    }

    /// `operand` as the op reads it; steps that q, k and v share are written once.
    pub fn operand(
        &self,
        w: &mut Writer<'_>,
        operand: &Operand,
        role: &str,
        prepared: &mut HashMap<(String, Vec<Prep>), String>,
    ) -> String {
        let mut at = self.name_here(&operand.value).to_owned();
        for (i, step) in operand.prep.iter().enumerate() {
            let key = (operand.value.clone(), operand.prep[..=i].to_vec());
            at = match prepared.get(&key) {
                Some(done) => done.clone(),
                None => {
                    let done = self.step(w, step, &at, role);
                    prepared.insert(key, done.clone());
                    done
                }
            };
        }
        at
    }

    fn step(&self, w: &mut Writer<'_>, step: &Prep, x: &str, role: &str) -> String {
        let near = format!("{}/{role}", self.prefix);
        let columns = |w: &mut Writer<'_>, x: &str, near: &str, from: i64, to: i64, axis: i64| {
            let bounds = [from, to, axis].map(|i| w.ints(near, &[i]));
            let [from, to, axis] = &bounds;
            w.push("Slice", near, &[x, from, to, axis], &[])
        };
        match step {
            Prep::Project { weights, bias } => {
                let near = format!("{}/qkv", self.prefix);
                let product = w.push("MatMul", &near, &[x, weights], &[]);
                match bias {
                    Some(bias) => w.push("Add", &format!("{near}_biased"), &[&product, bias], &[]),
                    None => product,
                }
            }
            Prep::AddBias { bias, from, to } => {
                let part = columns(w, bias, &format!("{near}_bias"), *from, *to, 0);
                w.push("Add", &format!("{near}_biased"), &[x, &part], &[])
            }
            Prep::Columns { from, to } => columns(w, x, &format!("{near}_columns"), *from, *to, -1),
            Prep::SplitHeads(heads) => {
                let near = format!("{near}_heads");
                let shape = w.ints(&near, &[0, 0, *heads, -1]);
                w.push("Reshape", &near, &[x, &shape], &[])
            }
            Prep::Times(factor) => {
                let ty = self.survey.facts.of(factor).elem_type;
                let mut factor = self.name_here(factor).to_owned();
                if ty != self.layer.core.elem_type {
                    factor = self.cast(w, &near, &factor, self.layer.core.elem_type);
                }
                w.push("Mul", &format!("{near}_scaled"), &[x, &factor], &[])
            }
            Prep::Cast(to) => self.cast(w, &near, x, *to),
            Prep::Pick { axis, index } => {
                let near = format!("{near}_picked");
                let index = w.int(&near, *index);
                w.push(
                    "Gather",
                    &near,
                    &[x, &index],
                    &[AttributeProto::int("axis", *axis)],
                )
            }
        }
    }

    fn cast(&self, w: &mut Writer<'_>, near: &str, x: &str, to: i32) -> String {
        let to = AttributeProto::int("to", i64::from(to));
        w.push("Cast", &format!("{near}_cast"), &[x], &[to])
    }

    /// All masks as one value: boolean if all are and hide by −∞, else one that is added.
    fn mask(&self, w: &mut Writer<'_>, core: &Core) -> Option<String> {
        let Mask { terms, .. } = &core.mask;
        let near = format!("{}/mask", self.prefix);
        let boolean = terms
            .iter()
            .all(|t| matches!(t, Term::Show { fill, .. } if *fill == f64::NEG_INFINITY));
        let mut all: Option<String> = None;
        for term in terms {
            let value = self.name_here(term.value()).to_owned();
            let one = match term {
                Term::Show { inverted, .. } if boolean => {
                    if *inverted {
                        w.push("Not", &format!("{near}_shown"), &[&value], &[])
                    } else {
                        value
                    }
                }
                Term::Show { inverted, fill, .. } => {
                    let (zero, fill) = (w.float(&near, 0.0), w.float(&near, *fill));
                    let (yes, no) = if *inverted {
                        (&fill, &zero)
                    } else {
                        (&zero, &fill)
                    };
                    w.push("Where", &format!("{near}_added"), &[&value, yes, no], &[])
                }
                Term::Add { factor, .. } => self.added(w, value, *factor, terms.len(), &near),
            };
            all = Some(match all {
                None => one,
                Some(before) => {
                    let op = if boolean { "And" } else { "Add" };
                    w.push(op, &format!("{near}_all"), &[&before, &one], &[])
                }
            });
        }
        all
    }

    /// `factor · value`, in float32 where it is computed with or is of a type that the op does not read.
    fn added(
        &self,
        w: &mut Writer<'_>,
        value: String,
        factor: f64,
        terms: usize,
        near: &str,
    ) -> String {
        let ty = self.survey.facts.of(&value).elem_type;
        let as_it_is = terms == 1 && factor == 1.0 && elem_type::is_supported_float(ty);
        if as_it_is {
            return value;
        }
        let value = self.cast(w, near, &value, elem_type::FLOAT);
        if factor == 1.0 {
            return value;
        }
        let factor = w.float(near, factor);
        w.push("Mul", &format!("{near}_scaled"), &[&value, &factor], &[])
    }

    /// The op's text input, if it has one, and its attributes about text.
    fn text(&self, w: &mut Writer<'_>, attributes: &mut Vec<AttributeProto>) -> Option<String> {
        let side = |at_start: bool| {
            AttributeProto::string(
                names::TEXT_SIDE,
                if at_start {
                    names::SIDE_START
                } else {
                    names::SIDE_END
                },
            )
        };
        match self.text {
            TextTokens::Never => attributes.push(AttributeProto::int(names::JOINT, 0)),
            TextTokens::ByPlan => {}
            TextTokens::Fixed { tokens, at_start } => {
                attributes.extend([AttributeProto::int(names::TEXT, *tokens), side(*at_start)]);
            }
            TextTokens::Measured { axes, at_start } => {
                attributes.push(side(*at_start));
                let near = format!("{}/text", self.prefix);
                let mut total: Option<String> = None;
                for (value, axis) in axes {
                    let value = self.name_here(value).to_owned();
                    let shape = w.push("Shape", &format!("{near}_shape"), &[&value], &[]);
                    let axis = w.ints(&near, &[*axis as i64]);
                    let one = w.push("Gather", &format!("{near}_tokens"), &[&shape, &axis], &[]);
                    total = Some(match total {
                        None => one,
                        Some(before) => {
                            w.push("Add", &format!("{near}_all"), &[&before, &one], &[])
                        }
                    });
                }
                return total;
            }
        }
        None
    }
}

pub fn form(layer: &Layer) -> &'static str {
    if layer.module.is_ok() {
        names::FORM_MODULE
    } else {
        names::FORM_CORE
    }
}
