//! Text tokens found by running: in the exported model with each token alone, those of text are the ones that stay the same when the
//! latents change.
//!
//! Owns that comparison. It takes layers' queries and values from what was found, but nothing of what was found about text, so it shows
//! where that, or the plan, is wrong. Where it cannot tell, it says so.

use super::array::{Array, Data};
use super::engine::{Values, dims, to_array, to_value};
use super::feed::Feed;
use super::host::{Host, HostError};
use super::prepare::feed;
pub use super::tokens::Verdict;
use super::tokens::{Tokens, judge, remedy};
use super::verify::Subject;
use crate::find::{Choice, Dependence, InputsRequest, Kind, Layer, Reason, Survey, survey};
use crate::lower::{TextTokens, Texts, alone};
use crate::onnx::ModelFile;
use ort::session::{Session, SessionInputValue};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;
use std::collections::BTreeSet;
use std::rc::Rc;

/// Queries that are apart by less than this part of the largest number are the same: what rounding may do where a host adds up in
/// another order.
const SAME: f32 = 1e-6;

/// The text tokens of one layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerText {
    pub layer: usize,
    pub node: String,
    /// Tokens of the sequence.
    pub tokens: Option<usize>,
    /// Those that do not depend on the latents, as first and last of each stretch.
    pub found: Option<Tokens>,
    /// Those that windows spare under the plan.
    pub used: Option<Tokens>,
    pub verdict: Verdict,
    /// Whether it matters: the plan has windows in this layer that do not cover everything.
    pub windowed: bool,
    /// What is wrong, or why it is not known.
    pub why: Option<String>,
    #[serde(skip)]
    pub remedy: String,
}

impl LayerText {
    pub fn is_wrong(&self) -> bool {
        self.verdict == Verdict::Differs && self.windowed
    }
}

/// Finds the text of all layers of `subject` by running, on the inputs of the first step.
///
/// # Errors
/// Inputs that are not the model's.
pub fn check(host: &Host, subject: &Subject<'_>) -> anyhow::Result<Vec<LayerText>> {
    let Subject {
        model,
        survey,
        plan,
        source,
        ..
    } = subject;
    let feed = feed(model, survey, plan, source)?;
    let runs: Vec<Values> = (0..feed.runs())
        .map(|run| feed.inputs(0, 0, run))
        .collect::<Result<_, _>>()?;
    let texts = Texts::new(&model.graph, survey);
    let layers: Vec<Watched> = survey
        .layers()
        .filter_map(|layer| {
            let text = texts.of(layer, plan).ok()?.settled(plan);
            Some(Watched { layer, text })
        })
        .collect();
    let unknown = |why: String| {
        let unknown = |w: &Watched| w.unknown(survey, why.clone());
        layers.iter().map(unknown).collect()
    };
    let mut probe = match Probe::load(host, subject, &layers) {
        Ok(probe) => probe,
        Err(why) => return Ok(unknown(why)),
    };
    let mut said: Vec<LayerText> = Vec::new();
    for inputs in &runs {
        let others = with_others(inputs, model, &survey.inputs.latents);
        let seen = others.and_then(|others| Ok([probe.run(inputs)?, probe.run(&others)?]));
        let seen = match seen {
            Ok(seen) => seen,
            Err(why) => return Ok(unknown(why)),
        };
        let mixes = probe.mixes.as_deref();
        let now = layers.iter().map(|w| w.look(subject, &seen, mixes));
        match said.is_empty() {
            true => said = now.collect(),
            // Of two runs the one that shows more.
            false => said.iter_mut().zip(now).for_each(|(said, now)| {
                if !said.is_wrong() && now.is_wrong() {
                    *said = now;
                }
            }),
        }
    }
    Ok(said)
}

/// A layer, and what it is told about text.
struct Watched<'a> {
    layer: &'a Layer,
    text: TextTokens,
}

impl Watched<'_> {
    fn unknown(&self, survey: &Survey, why: String) -> LayerText {
        LayerText {
            layer: self.layer.index,
            node: survey.label(self.layer),
            tokens: None,
            found: None,
            used: None,
            verdict: Verdict::Unknown,
            windowed: false,
            why: Some(why),
            remedy: String::new(),
        }
    }

    /// Values of the graph that tell how many tokens are text.
    fn measured(&self) -> impl Iterator<Item = &(String, usize)> {
        match &self.text {
            TextTokens::Measured { axes, .. } => axes.iter(),
            _ => [].iter(),
        }
    }

    /// The tokens that windows spare, of `all`.
    fn used(&self, all: usize, size: impl Fn(&str, usize) -> Option<usize>) -> Option<Tokens> {
        let (tokens, at_start) = match &self.text {
            TextTokens::Never | TextTokens::ByPlan => (0, true),
            TextTokens::Fixed { tokens, at_start } => (usize::try_from(*tokens).ok()?, *at_start),
            TextTokens::Measured { axes, at_start } => {
                let sizes = axes.iter().map(|(value, axis)| size(value, *axis));
                (sizes.sum::<Option<usize>>()?, *at_start)
            }
        };
        let tokens = tokens.min(all);
        Some(match at_start {
            true => (0..tokens).collect(),
            false => (all - tokens..all).collect(),
        })
    }

    fn look(
        &self,
        subject: &Subject<'_>,
        [first, second]: &[Values; 2],
        mixes: Option<&str>,
    ) -> LayerText {
        let unknown = |why: &str| self.unknown(subject.survey, why.to_owned());
        let q = &self.layer.core.q;
        let axis = q.token_axis().unwrap_or(usize::MAX);
        let queries = |run: &Values| to_array(&q.value, run.get(&q.value)?).ok();
        let (first_q, second_q) = match (queries(first), queries(second)) {
            (Some(a), Some(b)) if a.dims == b.dims && axis < a.dims.len() => (a, b),
            _ => return unknown("its queries cannot be compared"),
        };
        let size = |value: &str, axis: usize| dims(first.get(value)?).get(axis).copied();
        let all = first_q.dims[axis];
        let Some(used) = self.used(all, size) else {
            return unknown("the number of its text tokens cannot be measured here");
        };
        let Some(found) = unchanged(&first_q, &second_q, axis) else {
            return unknown("with each token alone its queries are not finite");
        };
        let (verdict, why) = judge(all, &found, &used, mixes);
        let plan = subject.plan;
        let steps = 0..plan.step_count();
        let l = self.layer.index;
        let has_window = steps.into_iter().any(|t| plan.action(t, l).is_windowed());
        LayerText {
            layer: l,
            node: subject.survey.label(self.layer),
            tokens: Some(all),
            remedy: remedy(l, all, &found, self.text != TextTokens::Never),
            windowed: has_window && plan.half_width(all, used.len()) + 1 < all,
            found: Some(found),
            used: Some(used),
            verdict,
            why,
        }
    }
}

/// The tokens along `axis` that are the same in `a` and `b`; `None` if there is a number that is not finite.
fn unchanged(a: &Array, b: &Array, axis: usize) -> Option<Tokens> {
    let (a, b, all) = (a.data.as_floats(), b.data.as_floats(), &a.dims);
    let inner: usize = all[axis + 1..].iter().product();
    let tokens = all[axis];
    let largest = a
        .iter()
        .chain(b)
        .fold(0.0, |most: f32, x| most.max(x.abs()));
    let mut changed = vec![false; tokens];
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        if !x.is_finite() || !y.is_finite() {
            return None;
        }
        changed[i / inner % tokens] |= (x - y).abs() > SAME * largest;
    }
    Some((0..tokens).filter(|&t| !changed[t]).collect())
}

/// The same inputs with other latents.
///
/// # Errors
/// Why there are none.
fn with_others(inputs: &Values, model: &ModelFile, latents: &str) -> Result<Values, String> {
    let declared = model.graph.inputs.iter().find(|i| i.name == latents);
    let (Some(value), Some(declared)) = (inputs.get(latents), declared) else {
        return Err(format!("the latents `{latents}` are not fed"));
    };
    let mut array = to_array(latents, value).map_err(|e| e.to_string())?;
    if let Data::Float(numbers) = &mut array.data {
        let squares: f32 = numbers.iter().map(|x| x * x).sum();
        let size = (squares / numbers.len().max(1) as f32).sqrt();
        let size = if size > 0.0 { size } else { 1.0 };
        let mut random = ChaCha8Rng::seed_from_u64(0);
        for number in numbers {
            let normal: f32 = StandardNormal.sample(&mut random);
            *number += size * normal;
        }
    }
    let other = to_value(latents, &array, declared.elem_type).map_err(|e| e.to_string())?;
    let mut others = inputs.clone();
    others.insert(latents.to_owned(), other);
    Ok(others)
}

/// The model with each token alone.
struct Probe {
    session: Session,
    /// Attention that stayed, by which the latents may come to text tokens.
    mixes: Option<String>,
}

impl Probe {
    /// # Errors
    /// Why there is none.
    fn load(host: &Host, subject: &Subject<'_>, watched: &[Watched<'_>]) -> Result<Self, String> {
        let model = subject.model;
        let inputs = &subject.survey.inputs;
        let request = InputsRequest {
            timestep: Some(inputs.timestep.clone()),
            latents: Some(inputs.latents.clone()),
        };
        // Layers that the user leaves out mix tokens as well.
        let all = survey(&model.graph, &request, &Choice::default()).map_err(|e| e.to_string())?;
        let mut layers: Vec<&Layer> = all.layers().collect();
        let more = subject.survey.layers();
        let known: BTreeSet<usize> = layers.iter().map(|l| l.core.anchor).collect();
        layers.extend(more.filter(|l| !known.contains(&l.core.anchor)));
        let queries = watched.iter().map(|w| &w.layer.core.q.value);
        let measured = watched
            .iter()
            .flat_map(|w| w.measured().map(|(value, _)| value));
        let outputs: BTreeSet<&String> = queries
            .chain(measured)
            .filter(|value| !model.graph.is_input(value))
            .collect();
        let outputs: Vec<String> = outputs.into_iter().cloned().collect();
        let bytes =
            alone(model, &all, &layers, &outputs).map_err(|reason: Reason| reason.to_string())?;
        let external = !model.external_data_locations().is_empty();
        let session = host.session(
            "the model with each token alone",
            &bytes,
            model.folder(),
            external,
        );
        Ok(Self {
            session: session.map_err(whole_story)?,
            mixes: mixes(subject, &all),
        })
    }

    /// `inputs` and what it computes of them.
    ///
    /// # Errors
    /// What ONNX Runtime says.
    fn run(&mut self, inputs: &Values) -> Result<Values, String> {
        let read = self.session.inputs().iter();
        let read: Vec<String> = read.map(|i| i.name().to_owned()).collect();
        let feed: Vec<(&str, SessionInputValue<'_>)> = inputs
            .iter()
            .filter(|(name, _)| read.contains(name))
            .map(|(name, value)| (name.as_str(), SessionInputValue::from(value.as_ref())))
            .collect();
        let outputs = self.session.run(feed).map_err(|source| {
            whole_story(HostError::Run {
                what: "the model with each token alone".into(),
                source,
            })
        })?;
        let mut values = inputs.clone();
        values.extend(
            outputs
                .into_iter()
                .map(|(name, value)| (name.to_owned(), Rc::new(value))),
        );
        Ok(values)
    }
}

/// What failed, and why.
fn whole_story(error: HostError) -> String {
    let source = std::error::Error::source(&error).map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default())
}

/// A site of `all` that stays in the model and may mix image tokens into text tokens.
fn mixes(subject: &Subject<'_>, all: &Survey) -> Option<String> {
    let dependence = Dependence::new(&subject.model.graph);
    let latents = &all.inputs.latents;
    let site = all.sites.iter().find(|site| match &site.kind {
        Kind::Unsupported(_) | Kind::Unknown(_) => true,
        Kind::Cross { keys, .. } => keys.split(", ").any(|key| dependence.on(key, latents)),
        Kind::Layer(_) | Kind::Skipped(_) | Kind::Elsewhere(_) => false,
    });
    site.map(|site| site.node.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_the_same_if_all_of_its_numbers_are() {
        let a = Array::floats(vec![2, 3, 2], (0..12).map(|i| i as f32).collect());
        let mut b = a.clone();
        let Data::Float(numbers) = &mut b.data else {
            panic!("floats");
        };
        // Row 1, token 1; and rounding in row 0, token 0.
        numbers[9] += 1.0;
        numbers[1] += 1e-7;
        assert_eq!(unchanged(&a, &b, 1), Some([0, 2].iter().collect()));
        let Data::Float(numbers) = &mut b.data else {
            panic!("floats");
        };
        numbers[0] = f32::NAN;
        assert_eq!(unchanged(&a, &b, 1), None);
    }
}
