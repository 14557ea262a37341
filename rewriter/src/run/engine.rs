//! A model that can be run from any layer on, with any action in every layer.
//!
//! Owns the sessions of the segments and what a run needs besides the model's inputs: directives and the layers' state. Remembers
//! nothing between runs: state and results are the caller's.

use super::array::{Array, Data};
use super::cut::{Segment, cut};
use super::host::{Host, HostError};
use crate::find::Survey;
use crate::lower::{
    DirectiveSource, LayerState, LowerError, State, directive, fits_windows, lower,
};
use crate::onnx::{ModelFile, ReadError, ValueInfoProto, elem_type};
use ditfastattn_contract::directive::Directive;
use ditfastattn_contract::graph;
use ditfastattn_plans::{Action, Plan};
use half::{bf16, f16};
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, Tensor, TensorElementType, ValueType};
use prost::Message;
use std::collections::HashMap;
use std::rc::Rc;

/// A tensor of ONNX Runtime; runs share it without copying.
pub type Value = Rc<DynValue>;

/// Values by name.
pub type Values = HashMap<String, Value>;

/// What a layer remembers of earlier steps.
#[derive(Clone, Default)]
pub struct Memory {
    /// R of its latest `full` or `asc`.
    pub residual: Option<Value>,
    /// Its latest outputs that were not `ast`, one per result of the module; empty at the start.
    pub outputs: Vec<Value>,
}

/// What a run has computed, segment by segment.
pub type Frontier = Vec<Rc<Values>>;

/// Why a model cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Lower(#[from] LowerError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(
        "the input `{name}` is of {found}, expected an array that converts to {expected} without loss of kind"
    )]
    Input {
        name: String,
        expected: &'static str,
        found: &'static str,
    },
    #[error("the model's input `{0}` is missing: give it as an array of that name")]
    Missing(String),
    #[error("the value `{name}` is {found}, which no session here takes")]
    Type { name: String, found: String },
}

struct Part {
    session: Session,
    segment: Segment,
}

/// A model, cut and loaded.
pub struct Engine {
    parts: Vec<Part>,
    layers: Vec<LayerState>,
    skip: Vec<String>,
    /// Layers that can have windows; the others leave no R.
    windows: Vec<bool>,
    elem_type: i32,
    /// Values that the exported model returns.
    outputs: Vec<String>,
    products: usize,
}

impl Engine {
    /// Loads `model`, whose layers `survey` lists, for the window, guidance and text of `plan` (its steps do not matter).
    ///
    /// # Errors
    /// A plan that does not fit, and what ONNX Runtime says about the parts.
    pub fn load(
        host: &Host,
        model: &ModelFile,
        survey: &Survey,
        plan: &Plan,
    ) -> Result<Self, EngineError> {
        let lowered = lower(model, survey, plan, State::Io(DirectiveSource::Directives))?;
        let outputs = model.graph.outputs.clone();
        let bytes: Vec<u8> = lowered.pieces.concat();
        let whole = ModelFile::parse(&model.path, bytes.into())?;
        let segments = cut(&whole.graph, &lowered, &outputs);
        let elem_type = survey
            .layers()
            .next()
            .map_or(elem_type::FLOAT, |l| l.core.elem_type);
        let folder = model.folder();
        let external = !model.external_data_locations().is_empty();
        let mut types = known_types(&whole, &lowered.skip, &lowered.state, elem_type);
        let mut parts = Vec::new();
        for (s, segment) in segments.into_iter().enumerate() {
            let inputs = segment
                .reads
                .iter()
                .map(|name| {
                    let elem_type = types.get(name).copied().unwrap_or(0);
                    // The rows of what passes between segments are open, like those of a state.
                    let sizes = survey.facts.shape(name).map(|dims| {
                        let known = dims.iter().enumerate();
                        known
                            .map(|(i, d)| if i == 0 { None } else { d.known() })
                            .collect()
                    });
                    let is_state = lowered.state.iter().any(|l| l.reads(name));
                    let sizes = if is_state { None } else { sizes };
                    ValueInfoProto::tensor(name, elem_type, sizes)
                        .encode_to_vec()
                        .into()
                })
                .collect::<Vec<_>>();
            let model = whole.part(&segment.nodes, &inputs, &segment.gives);
            let what = match s {
                0 => "the part in front of the layers".to_owned(),
                _ => format!("the part of layer {}", s - 1),
            };
            let session = host.session(&what, &model, folder, external)?;
            for output in session.outputs() {
                let ty = match output.dtype() {
                    ValueType::Tensor { ty, .. } => onnx_type(*ty),
                    other => {
                        return Err(EngineError::Type {
                            name: output.name().to_owned(),
                            found: format!("{other:?}"),
                        });
                    }
                };
                types.insert(output.name().to_owned(), ty);
            }
            parts.push(Part { session, segment });
        }
        let products = parts.iter().map(|p| p.segment.products).sum();
        Ok(Self {
            parts,
            layers: lowered.state,
            skip: lowered.skip,
            windows: survey.layers().map(fits_windows).collect(),
            elem_type,
            outputs,
            products,
        })
    }

    /// Layers of the model.
    pub fn layers(&self) -> usize {
        self.skip.len()
    }

    /// The share of a forward pass that running from `layer` on is (`None`: everything), by matrix products.
    pub fn share(&self, layer: Option<usize>) -> f64 {
        let first = layer.map_or(0, |l| l + 1);
        let run: usize = self.parts[first..].iter().map(|p| p.segment.products).sum();
        run as f64 / self.products.max(1) as f64
    }

    /// Runs the model with `row[l]` in layer l. From `layer` on only, if given; then `before` has computed what lies in front, for the
    /// same `inputs` and with the same actions there.
    ///
    /// # Errors
    /// What ONNX Runtime says, and inputs that are missing.
    pub fn run(
        &mut self,
        layer: Option<usize>,
        inputs: &Values,
        row: &[Action],
        memory: &[Memory],
        before: &[Rc<Values>],
    ) -> Result<Frontier, EngineError> {
        let first = layer.map_or(0, |l| l + 1);
        self.run_segments(first..self.parts.len(), inputs, row, memory, before)
    }

    /// Runs `layer` alone, and what lies between it and the next one. As [`Engine::run`].
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn run_layer(
        &mut self,
        layer: usize,
        inputs: &Values,
        row: &[Action],
        memory: &[Memory],
        before: &[Rc<Values>],
    ) -> Result<Frontier, EngineError> {
        self.run_segments(layer + 1..layer + 2, inputs, row, memory, before)
    }

    fn run_segments(
        &mut self,
        segments: std::ops::Range<usize>,
        inputs: &Values,
        row: &[Action],
        memory: &[Memory],
        before: &[Rc<Values>],
    ) -> Result<Frontier, EngineError> {
        let first = segments.start;
        let directives = row.iter().zip(&self.windows).map(|(&a, &windows)| {
            let residual = a.is_full() && windows;
            Directive {
                residual_live: residual,
                ..directive(a)
            }
            .encode()
        });
        let control = self.control(directives.collect(), row, memory)?;
        let mut frontier: Frontier = before[..first.min(before.len())].to_vec();
        for s in segments {
            let part = &mut self.parts[s];
            let mut feed: Vec<(&str, SessionInputValue<'_>)> = Vec::new();
            for name in &part.segment.reads {
                let earlier = || frontier.iter().rev().find_map(|values| values.get(name));
                let value = control
                    .get(name)
                    .or_else(|| inputs.get(name))
                    .or_else(earlier)
                    .ok_or_else(|| EngineError::Missing(name.clone()))?;
                feed.push((name, SessionInputValue::from(value.as_ref())));
            }
            let what = || match s {
                0 => "the part in front of the layers".to_owned(),
                _ => format!("layer {} as {}", s - 1, row[s - 1]),
            };
            let mut outputs = part.session.run(feed).map_err(|source| HostError::Run {
                what: what(),
                source,
            })?;
            let mut values = Values::new();
            for name in &part.segment.gives {
                if let Some(value) = outputs.remove(name) {
                    values.insert(name.clone(), Rc::new(value));
                }
            }
            frontier.push(Rc::new(values));
        }
        Ok(frontier)
    }

    /// Directives, skips and state by the names that the segments read.
    fn control(
        &self,
        directives: Vec<i64>,
        row: &[Action],
        memory: &[Memory],
    ) -> Result<Values, EngineError> {
        let failed = |source: ort::Error| HostError::Run {
            what: "a step's control".into(),
            source,
        };
        let mut control = Values::new();
        let layers = directives.len();
        let directives = Tensor::from_array((vec![layers], directives)).map_err(failed)?;
        control.insert(graph::DIRECTIVES.into(), Rc::new(directives.into_dyn()));
        let nothing = self.nothing()?;
        let none = Tensor::from_array((vec![1usize], vec![0i64])).map_err(failed)?;
        let none: Value = Rc::new(none.into_dyn());
        for (l, state) in self.layers.iter().enumerate() {
            let skip = Tensor::from_array((Vec::<usize>::new(), vec![row[l] == Action::Ast]));
            let skip = skip.map_err(failed)?;
            control.insert(self.skip[l].clone(), Rc::new(skip.into_dyn()));
            control.insert(state.residual_rows.clone(), none.clone());
            let residual = memory[l].residual.as_ref().unwrap_or(&nothing);
            control.insert(state.past_residual.clone(), residual.clone());
            for (i, name) in state.past_outputs.iter().enumerate() {
                let output = memory[l].outputs.get(i).unwrap_or(&nothing);
                control.insert(name.clone(), output.clone());
            }
        }
        Ok(control)
    }

    /// R of zeros, like `residual`.
    ///
    /// # Errors
    /// What ONNX Runtime says.
    pub fn zeros_like(&self, residual: &Value) -> Result<Value, EngineError> {
        let dims = dims(residual);
        let len = dims.iter().product();
        to_value(
            "residual",
            &Array::floats(dims, vec![0.0; len]),
            self.elem_type,
        )
    }

    /// A state without rows.
    fn nothing(&self) -> Result<Value, EngineError> {
        let empty = Array::floats(vec![0, 1, 1, 1], Vec::new());
        to_value("past", &empty, self.elem_type)
    }

    /// What layers remember after a run with `row`, given what they remembered before.
    pub fn remember(&self, row: &[Action], frontier: &Frontier, memory: &mut [Memory]) {
        for (l, state) in self.layers.iter().enumerate() {
            let values = &frontier[l + 1];
            if row[l].is_full() {
                memory[l].residual = values.get(&state.present_residual).cloned();
            }
            if row[l] != Action::Ast {
                memory[l].outputs = self.outputs(l, frontier);
            }
        }
    }

    /// R that layer `l` left in a run.
    pub fn residual<'f>(&self, l: usize, frontier: &'f Frontier) -> Option<&'f Value> {
        frontier[l + 1].get(&self.layers[l].present_residual)
    }

    /// All results of layer `l`'s module in a run.
    pub fn outputs(&self, l: usize, frontier: &Frontier) -> Vec<Value> {
        let sinks = self.layers[l].sinks.iter();
        sinks
            .filter_map(|s| frontier[l + 1].get(s).cloned())
            .collect()
    }

    /// The first result of layer `l`'s module in a run.
    ///
    /// # Errors
    /// If the run did not come to that layer, or it is no floating-point tensor.
    pub fn output(&self, l: usize, frontier: &Frontier) -> Result<Array, EngineError> {
        let value = self.layers[l]
            .sinks
            .first()
            .and_then(|s| frontier[l + 1].get(s));
        let missing = || EngineError::Missing(format!("the output of layer {l}"));
        to_array("attention", value.ok_or_else(missing)?)
    }

    /// The model's first output in a run.
    ///
    /// # Errors
    /// If it is no floating-point tensor.
    pub fn result(&self, frontier: &Frontier) -> Result<Array, EngineError> {
        let name = self.outputs.first().cloned().unwrap_or_default();
        let value = frontier.iter().rev().find_map(|values| values.get(&name));
        to_array(
            &name,
            value.ok_or_else(|| EngineError::Missing(name.clone()))?,
        )
    }
}

/// Element types of everything that is not computed by a segment.
fn known_types(
    model: &ModelFile,
    skip: &[String],
    state: &[LayerState],
    float: i32,
) -> HashMap<String, i32> {
    let inputs = model.graph.inputs.iter();
    let mut types: HashMap<String, i32> = inputs.map(|i| (i.name.clone(), i.elem_type)).collect();
    types.extend(skip.iter().map(|s| (s.clone(), elem_type::BOOL)));
    for layer in state {
        types.insert(layer.residual_rows.clone(), elem_type::INT64);
        types.insert(layer.past_residual.clone(), float);
        types.extend(layer.past_outputs.iter().map(|p| (p.clone(), float)));
    }
    types
}

fn onnx_type(ty: TensorElementType) -> i32 {
    match ty {
        TensorElementType::Float32 => elem_type::FLOAT,
        TensorElementType::Uint8 => 2,
        TensorElementType::Int8 => 3,
        TensorElementType::Uint16 => 4,
        TensorElementType::Int16 => 5,
        TensorElementType::Int32 => elem_type::INT32,
        TensorElementType::Int64 => elem_type::INT64,
        TensorElementType::Bool => elem_type::BOOL,
        TensorElementType::Float16 => elem_type::FLOAT16,
        TensorElementType::Float64 => elem_type::DOUBLE,
        TensorElementType::Uint32 => 12,
        TensorElementType::Uint64 => 13,
        TensorElementType::Bfloat16 => elem_type::BFLOAT16,
        _ => 0,
    }
}

/// `array` as a tensor of the type that the model wants for `name`.
///
/// # Errors
/// If the kinds of number do not go together, or the model wants a type that no array has.
pub fn to_value(name: &str, array: &Array, elem_type: i32) -> Result<Value, EngineError> {
    let failed = |source: ort::Error| HostError::Run {
        what: format!("the input `{name}`"),
        source,
    };
    let dims = array.dims.clone();
    let floats = |f: fn(f64) -> f32| -> Vec<f32> {
        let len = array.data.len();
        (0..len)
            .filter_map(|i| array.data.number(i))
            .map(f)
            .collect()
    };
    macro_rules! tensor {
        ($values:expr) => {
            Tensor::from_array((dims, $values))
                .map_err(failed)?
                .into_dyn()
        };
    }
    let value = match (elem_type, &array.data) {
        (elem_type::FLOAT, Data::Float(v)) => tensor!(v.clone()),
        (elem_type::FLOAT, _) => tensor!(floats(|x| x as f32)),
        (elem_type::DOUBLE, Data::Float(v)) => {
            tensor!(v.iter().map(|&x| f64::from(x)).collect::<Vec<_>>())
        }
        (elem_type::FLOAT16, _) => {
            tensor!(
                floats(|x| x as f32)
                    .into_iter()
                    .map(f16::from_f32)
                    .collect::<Vec<_>>()
            )
        }
        (elem_type::BFLOAT16, _) => {
            tensor!(
                floats(|x| x as f32)
                    .into_iter()
                    .map(bf16::from_f32)
                    .collect::<Vec<_>>()
            )
        }
        (elem_type::INT64, Data::Int(v)) => tensor!(v.clone()),
        (elem_type::INT32, Data::Int(v)) => {
            tensor!(v.iter().map(|&x| x as i32).collect::<Vec<_>>())
        }
        // Schedulers have whole timesteps as floating-point numbers too.
        (elem_type::INT64 | elem_type::INT32, Data::Float(v))
            if v.iter().all(|x| x.fract() == 0.0) =>
        {
            match elem_type {
                elem_type::INT64 => tensor!(v.iter().map(|&x| x as i64).collect::<Vec<_>>()),
                _ => tensor!(v.iter().map(|&x| x as i32).collect::<Vec<_>>()),
            }
        }
        (elem_type::BOOL, Data::Bool(v)) => tensor!(v.clone()),
        (elem_type::BOOL, Data::Int(v)) => tensor!(v.iter().map(|&x| x != 0).collect::<Vec<_>>()),
        (other, data) => {
            return Err(EngineError::Input {
                name: name.into(),
                expected: elem_type::name(other),
                found: match data {
                    Data::Float(_) => "floating-point numbers",
                    Data::Int(_) => "integers",
                    Data::Bool(_) => "truth values",
                },
            });
        }
    };
    Ok(Rc::new(value))
}

/// The sizes of a tensor, without a look at its numbers.
pub fn dims(value: &DynValue) -> Vec<usize> {
    let shape = value.dtype().tensor_shape();
    shape.map_or(Vec::new(), |s| s.iter().map(|&d| d as usize).collect())
}

/// A floating-point tensor as an array of float32.
///
/// # Errors
/// If it is none.
pub fn to_array(name: &str, value: &DynValue) -> Result<Array, EngineError> {
    let dims = dims(value);
    if let Ok((_, values)) = value.try_extract_tensor::<f32>() {
        return Ok(Array::floats(dims, values.to_vec()));
    }
    if let Ok((_, values)) = value.try_extract_tensor::<f16>() {
        let values = values.iter().map(|x| x.to_f32()).collect();
        return Ok(Array::floats(dims, values));
    }
    if let Ok((_, values)) = value.try_extract_tensor::<bf16>() {
        let values = values.iter().map(|x| x.to_f32()).collect();
        return Ok(Array::floats(dims, values));
    }
    Err(EngineError::Type {
        name: name.into(),
        found: format!("{:?}", value.dtype()),
    })
}
