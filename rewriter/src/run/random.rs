//! Inputs of the model's shapes made of random numbers, where nobody has real ones: enough to compare two forms of one model, not to
//! judge images.

use super::array::{Array, Data};
use super::feed::{FeedError, fed, runs};
use crate::find::{Inputs, indexes_table};
use crate::onnx::{Graph, GraphInput, elem_type};
use ditfastattn_plans::{Cfg, Plan};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use std::collections::BTreeMap;

/// Timesteps where the plan has none fall from here to 0: what most models are trained with. Where they pick rows of a table they are
/// counted from 0.
const FIRST_TIMESTEP: f64 = 1000.0;

/// How far the latents go in all steps, as a part of the way to other noise.
const WAY: f32 = 0.5;

/// A trajectory of as many steps as `plan` has (see [`super::feed::Recording`]): latents that move from noise towards other noise, the
/// plan's timesteps, normal numbers (the same at every step) for other floating-point inputs. Integers are 1, which hides nothing as a mask and is in every
/// vocabulary, but for labels (rank 1), of which a step's first half are 0.
///
/// # Errors
/// An input whose size neither the model nor `sizes` says.
pub fn arrays(
    graph: &Graph,
    roles: &Inputs,
    plan: &Plan,
    sizes: &[(String, usize)],
    seed: u64,
) -> Result<BTreeMap<String, Array>, FeedError> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut normal =
        |len: usize| -> Vec<f32> { StandardNormal.sample_iter(&mut random).take(len).collect() };
    let (steps, runs) = (plan.step_count(), runs(plan.cfg));
    let rows = indexes_table(graph, &roles.timestep);
    let mut arrays = BTreeMap::new();
    for input in fed(graph) {
        let dims = dims(&input, plan.cfg, sizes)?;
        // Of all runs of a step.
        let len = runs * dims.iter().product::<usize>();
        let data = if input.name == roles.timestep {
            Data::Float(
                (0..steps)
                    .flat_map(|t| vec![timestep(plan, t, rows); len])
                    .collect(),
            )
        } else if input.name == roles.latents {
            let (from, to) = (normal(len / runs), normal(len / runs));
            let at = |t: usize| {
                let part = WAY * t as f32 / steps as f32;
                let pairs = from.iter().zip(&to);
                let latents: Vec<f32> = pairs.map(|(a, b)| a + part * (b - a)).collect();
                latents.repeat(runs)
            };
            Data::Float((0..steps).flat_map(at).collect())
        } else {
            match input.elem_type {
                elem_type::INT32 | elem_type::INT64 if dims.len() == 1 => {
                    let labels: Vec<i64> = (0..len).map(|i| i64::from(i >= len / 2)).collect();
                    Data::Int(labels.repeat(steps))
                }
                elem_type::INT32 | elem_type::INT64 => Data::Int(vec![1; len * steps]),
                elem_type::BOOL => Data::Bool(vec![true; len * steps]),
                _ => Data::Float(normal(len).repeat(steps)),
            }
        };
        let dims = [&[steps * runs], dims.as_slice()].concat();
        arrays.insert(input.name, Array { dims, data });
    }
    Ok(arrays)
}

/// Whole numbers, which inputs of every type take; `rows`: they pick rows of a table, of which there may be few.
fn timestep(plan: &Plan, step: usize, rows: bool) -> f32 {
    let counted = || match rows {
        true => step as f64,
        false => (FIRST_TIMESTEP * (1.0 - step as f64 / plan.step_count() as f64)).round(),
    };
    let planned = plan.timesteps.as_ref().and_then(|t| t.get(step).copied());
    planned.unwrap_or_else(counted) as f32
}

/// The input's sizes. What is open on axis 0 are the rows of one image.
fn dims(input: &GraphInput, cfg: Cfg, sizes: &[(String, usize)]) -> Result<Vec<usize>, FeedError> {
    let declared = input.dims.as_ref().ok_or_else(|| FeedError::Open {
        input: input.name.clone(),
        dim: "its rank".into(),
        flag: "record a trajectory instead (--trajectory)".into(),
    })?;
    let size = |(axis, dim): (usize, &Result<i64, String>)| {
        let open = match dim {
            Ok(size) => return Ok(usize::try_from(*size).unwrap_or(1)),
            Err(name) => name,
        };
        let place = format!("{}.{axis}", input.name);
        let said = sizes
            .iter()
            .find(|(name, _)| *name == place || name == open);
        match said {
            Some((_, size)) => Ok(*size),
            None if axis == 0 => Ok(match cfg {
                Cfg::CondFirst | Cfg::UncondFirst => 2,
                Cfg::Separate | Cfg::None => 1,
            }),
            None => Err(FeedError::Open {
                input: input.name.clone(),
                dim: format!("axis {axis}, `{open}`,"),
                flag: format!("say --size {place}=N"),
            }),
        }
    };
    declared.iter().enumerate().map(size).collect()
}
