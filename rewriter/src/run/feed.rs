//! What the model is fed at each step: a recorded trajectory, or calibration inputs that a scheduler moves on.
//!
//! Owns how arrays of a file become the graph's inputs. Under guidance in one batch the rows are two halves, in the order of `cfg`.

use super::array::{Array, Data};
use super::engine::{EngineError, Values, to_value};
use super::scheduler::Scheduler;
use crate::find::Inputs;
use crate::onnx::{Graph, GraphInput};
use ditfastattn_plans::Cfg;
use std::collections::BTreeMap;

/// Why calibration inputs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(
        "{file} has an array `{name}`, but the model's inputs are {inputs}; name arrays like inputs"
    )]
    Unknown {
        file: &'static str,
        name: String,
        inputs: String,
    },
    #[error("{file} has no array for the model's input `{name}`; add one of that name")]
    Missing { file: &'static str, name: String },
    #[error("the array `{name}` has the shape {found:?}; expected {expected}")]
    Shape {
        name: String,
        found: Vec<usize>,
        expected: String,
    },
    #[error(
        "no array of the trajectory has an axis of steps: expected at least the timestep or the latents with one leading axis more than the model's input"
    )]
    NoSteps,
    #[error(
        "the model's output has the shape {output:?} for latents of shape {latents:?}, which a scheduler cannot use; expected the same shape, or twice the channels (axis 1) for a learnt variance; record a trajectory instead (--trajectory)"
    )]
    Output {
        output: Vec<usize>,
        latents: Vec<usize>,
    },
}

/// The inputs of a whole denoising, for all calibration samples.
pub trait Feed {
    /// Steps of the denoising.
    fn steps(&self) -> usize;

    /// The timesteps as the model is fed them, where each step has one.
    fn timesteps(&self) -> Option<Vec<f64>>;

    /// How many runs make up one step: samples that do not go into one batch.
    fn groups(&self) -> usize;

    /// The model's inputs at `step` for `group`.
    ///
    /// # Errors
    /// Arrays that the model's types do not take.
    fn inputs(&self, step: usize, group: usize) -> Result<Values, FeedError>;

    /// The model's output at `step` for `group`: moves the latents on, if they are not recorded.
    ///
    /// # Errors
    /// An output that the scheduler cannot use.
    fn advance(&mut self, step: usize, group: usize, output: &Array) -> Result<(), FeedError>;
}

/// An output as one list of numbers per sample: both of its halves under guidance in one batch.
pub fn samples(output: &Array, cfg: Cfg) -> Vec<Vec<f32>> {
    let rows = output.rows().unwrap_or(1).max(1);
    let Data::Float(values) = &output.data else {
        return Vec::new();
    };
    let len = values.len() / rows;
    let row = |i: usize| &values[i * len..(i + 1) * len];
    match cfg {
        Cfg::CondFirst | Cfg::UncondFirst if rows.is_multiple_of(2) => {
            let half = rows / 2;
            (0..half)
                .map(|i| [row(i), row(half + i)].concat())
                .collect()
        }
        _ => (0..rows).map(|i| row(i).to_vec()).collect(),
    }
}

/// The model's inputs that have to be fed.
fn fed(graph: &Graph) -> Vec<GraphInput> {
    let inputs = graph.inputs.iter();
    inputs.filter(|i| !i.has_default).cloned().collect()
}

/// Every array is an input's, and every input has one, but for those in `without`.
fn check_names(
    file: &'static str,
    inputs: &[GraphInput],
    arrays: &BTreeMap<String, Array>,
    without: &[&str],
) -> Result<(), FeedError> {
    if let Some(name) = arrays
        .keys()
        .find(|name| !inputs.iter().any(|i| i.name == **name))
    {
        let names: Vec<_> = inputs.iter().map(|i| format!("`{}`", i.name)).collect();
        return Err(FeedError::Unknown {
            file,
            name: name.clone(),
            inputs: names.join(", "),
        });
    }
    let missing = inputs
        .iter()
        .find(|i| !arrays.contains_key(&i.name) && !without.contains(&i.name.as_str()));
    match missing {
        None => Ok(()),
        Some(input) => Err(FeedError::Missing {
            file,
            name: input.name.clone(),
        }),
    }
}

/// What any pipeline fed: per input an array of the input's own shape, or one with a leading axis of steps.
pub struct Recording {
    inputs: Vec<GraphInput>,
    arrays: BTreeMap<String, Array>,
    timestep: String,
    steps: usize,
}

impl Recording {
    /// # Errors
    /// Names and shapes that are not the model's, and arrays of different numbers of steps.
    pub fn new(
        graph: &Graph,
        roles: &Inputs,
        arrays: BTreeMap<String, Array>,
    ) -> Result<Self, FeedError> {
        let inputs = fed(graph);
        check_names("the trajectory", &inputs, &arrays, &[])?;
        let mut steps: Option<usize> = None;
        for input in &inputs {
            let array = &arrays[&input.name];
            let Some(dims) = &input.dims else { continue };
            let wrong = |expected: String| FeedError::Shape {
                name: input.name.clone(),
                found: array.dims.clone(),
                expected,
            };
            if array.dims.len() == dims.len() + 1 {
                let found = array.dims[0];
                if found == 0 || steps.is_some_and(|s| s != found) {
                    return Err(wrong(format!(
                        "{} steps along axis 0, as the arrays before it have",
                        steps.unwrap_or(1)
                    )));
                }
                steps = Some(found);
            } else if array.dims.len() != dims.len() {
                let rank = dims.len();
                return Err(wrong(format!(
                    "rank {rank}, or rank {} with an axis of steps in front",
                    rank + 1
                )));
            }
        }
        Ok(Self {
            inputs,
            arrays,
            timestep: roles.timestep.clone(),
            steps: steps.ok_or(FeedError::NoSteps)?,
        })
    }

    fn at(&self, input: &GraphInput, step: usize) -> Array {
        let array = &self.arrays[&input.name];
        let rank = input.dims.as_ref().map(Vec::len);
        match rank.is_some_and(|rank| array.dims.len() == rank + 1) {
            true => array.entry(step),
            false => array.clone(),
        }
    }
}

impl Feed for Recording {
    fn steps(&self) -> usize {
        self.steps
    }

    fn timesteps(&self) -> Option<Vec<f64>> {
        let input = self.inputs.iter().find(|i| i.name == self.timestep)?;
        let all = (0..self.steps).map(|step| self.at(input, step).data.number(0));
        all.collect()
    }

    fn groups(&self) -> usize {
        1
    }

    fn inputs(&self, step: usize, _: usize) -> Result<Values, FeedError> {
        let value = |input: &GraphInput| {
            let value = to_value(&input.name, &self.at(input, step), input.elem_type)?;
            Ok((input.name.clone(), value))
        };
        self.inputs.iter().map(value).collect()
    }

    fn advance(&mut self, _: usize, _: usize, _: &Array) -> Result<(), FeedError> {
        Ok(())
    }
}

/// Makes one generation's scheduler; the argument is the number of the group.
pub type MakeScheduler<'a> = dyn Fn(usize) -> Box<dyn Scheduler> + 'a;

/// Calibration inputs under a scheduler: the denoising loop itself.
pub struct Loop {
    inputs: Vec<GraphInput>,
    roles: Inputs,
    cfg: Cfg,
    guidance: f32,
    groups: Vec<Group>,
}

struct Group {
    /// Everything but latents and timestep, as it is fed.
    fixed: BTreeMap<String, Array>,
    /// One row per sample.
    latents: Array,
    scheduler: Box<dyn Scheduler>,
}

impl Loop {
    /// `arrays` hold the latents' initial noise, a row per sample, and what else the model is fed: under guidance in one batch with twice
    /// as many rows in the order of `cfg`, or with one row per sample for both halves. At most `per_run` samples (0: no limit) share
    /// a run, fewer where the model's batch is fixed.
    ///
    /// # Errors
    /// Names and shapes that are not the model's.
    pub fn new(
        graph: &Graph,
        roles: &Inputs,
        mut arrays: BTreeMap<String, Array>,
        cfg: Cfg,
        guidance: f32,
        per_run: usize,
        scheduler: &MakeScheduler<'_>,
    ) -> Result<Self, FeedError> {
        let inputs = fed(graph);
        arrays.remove(&roles.timestep);
        check_names("the calibration", &inputs, &arrays, &[&roles.timestep])?;
        let halves = if matches!(cfg, Cfg::CondFirst | Cfg::UncondFirst) {
            2
        } else {
            1
        };
        let noise = &arrays[&roles.latents];
        let wrong = |array: &Array, name: &str, expected: String| FeedError::Shape {
            name: name.to_owned(),
            found: array.dims.clone(),
            expected,
        };
        let declared = inputs.iter().find(|i| i.name == roles.latents);
        let declared = declared.and_then(|i| i.dims.as_ref());
        if declared.is_some_and(|d| d.len() != noise.dims.len()) || noise.rows().unwrap_or(0) == 0 {
            return Err(wrong(
                noise,
                &roles.latents,
                "one row of noise per sample, in the shape of the model's latents".into(),
            ));
        }
        let count = noise.dims[0];
        let fixed_rows = declared
            .and_then(|d| d.first()?.clone().ok())
            .and_then(|rows| usize::try_from(rows).ok());
        let mut size = if per_run == 0 {
            count
        } else {
            per_run.min(count)
        };
        if let Some(rows) = fixed_rows {
            size = rows / halves;
        }
        if size == 0 || !count.is_multiple_of(size) {
            return Err(wrong(
                noise,
                &roles.latents,
                format!(
                    "a multiple of {} samples, because so many go into one run of this model",
                    size.max(1)
                ),
            ));
        }
        let mut groups = Vec::new();
        for g in 0..count / size {
            let rows: Vec<usize> = (g * size..(g + 1) * size).collect();
            let both: Vec<usize> = rows
                .iter()
                .copied()
                .chain(rows.iter().map(|r| r + count))
                .collect();
            let mut fixed = BTreeMap::new();
            for (name, array) in arrays.iter().filter(|(name, _)| **name != roles.latents) {
                let fed = match array.rows() {
                    Some(n) if halves == 2 && n == 2 * count => array.take_rows(&both),
                    Some(n) if n == count => array.take_rows(&rows.repeat(halves)),
                    _ if count == size => array.clone(),
                    _ => {
                        let expected =
                            format!("{count} rows, or {} for both halves of guidance", 2 * count);
                        return Err(wrong(array, name, expected));
                    }
                };
                fixed.insert(name.clone(), fed);
            }
            groups.push(Group {
                fixed,
                latents: noise.take_rows(&rows),
                scheduler: scheduler(g),
            });
        }
        Ok(Self {
            inputs,
            roles: roles.clone(),
            cfg,
            guidance,
            groups,
        })
    }

    fn halves(&self) -> usize {
        match self.cfg {
            Cfg::CondFirst | Cfg::UncondFirst => 2,
            Cfg::Separate | Cfg::None => 1,
        }
    }

    /// The latents as they are now, group by group.
    pub fn latents(&self) -> impl Iterator<Item = &Array> {
        self.groups.iter().map(|g| &g.latents)
    }
}

impl Feed for Loop {
    fn steps(&self) -> usize {
        self.groups[0].scheduler.timesteps().len()
    }

    fn timesteps(&self) -> Option<Vec<f64>> {
        Some(self.groups[0].scheduler.timesteps().to_vec())
    }

    fn groups(&self) -> usize {
        self.groups.len()
    }

    fn inputs(&self, step: usize, group: usize) -> Result<Values, FeedError> {
        let group = &self.groups[group];
        let samples = group.latents.dims[0];
        let rows: Vec<usize> = (0..samples).collect();
        let latents = group.latents.take_rows(&rows.repeat(self.halves()));
        let timestep = group.scheduler.timesteps()[step] as f32;
        let mut values = Values::new();
        for input in &self.inputs {
            let name = &input.name;
            let array = if *name == self.roles.latents {
                latents.clone()
            } else if *name == self.roles.timestep {
                let dims = match input.dims.as_deref() {
                    Some([]) => vec![],
                    Some([Ok(one)]) => vec![usize::try_from(*one).unwrap_or(1)],
                    _ => vec![latents.dims[0]],
                };
                let len = dims.iter().product();
                Array::floats(dims, vec![timestep; len])
            } else {
                group.fixed[name].clone()
            };
            values.insert(name.clone(), to_value(name, &array, input.elem_type)?);
        }
        Ok(values)
    }

    fn advance(&mut self, _: usize, group: usize, output: &Array) -> Result<(), FeedError> {
        let (halves, guidance, cfg) = (self.halves(), self.guidance, self.cfg);
        let group = &mut self.groups[group];
        let prediction = Prediction::of(output, &group.latents, halves)?;
        let Data::Float(sample) = &mut group.latents.data else {
            return Ok(());
        };
        let n = sample.len();
        let guided: Vec<f32> = if halves == 1 {
            prediction.mean
        } else {
            let (first, second) = prediction.mean.split_at(n);
            let (cond, uncond) = match cfg {
                Cfg::UncondFirst => (second, first),
                _ => (first, second),
            };
            let pairs = cond.iter().zip(uncond);
            pairs.map(|(&c, &u)| u + guidance * (c - u)).collect()
        };
        let variance = prediction.variance.map(|v| match cfg {
            Cfg::UncondFirst => v[n..].to_vec(),
            _ => v[..n].to_vec(),
        });
        group.scheduler.step(&guided, variance.as_deref(), sample);
        Ok(())
    }
}

/// A model's output in its parts, all rows.
struct Prediction {
    mean: Vec<f32>,
    variance: Option<Vec<f32>>,
}

impl Prediction {
    fn of(output: &Array, latents: &Array, halves: usize) -> Result<Self, FeedError> {
        let mut expected = latents.dims.clone();
        expected[0] *= halves;
        let Data::Float(values) = &output.data else {
            return Err(Self::unusable(output, &expected));
        };
        if output.dims == expected {
            return Ok(Self {
                mean: values.clone(),
                variance: None,
            });
        }
        let mut doubled = expected.clone();
        if let Some(channels) = doubled.get_mut(1) {
            *channels *= 2;
        }
        if doubled.len() < 2 || output.dims != doubled {
            return Err(Self::unusable(output, &expected));
        }
        let row: usize = doubled[1..].iter().product();
        let part = |second: bool| {
            let rows = values.chunks_exact(row);
            rows.flat_map(|r| if second { &r[row / 2..] } else { &r[..row / 2] })
                .copied()
                .collect()
        };
        Ok(Self {
            mean: part(false),
            variance: Some(part(true)),
        })
    }

    fn unusable(output: &Array, latents: &[usize]) -> FeedError {
        FeedError::Output {
            output: output.dims.clone(),
            latents: latents.to_vec(),
        }
    }
}
