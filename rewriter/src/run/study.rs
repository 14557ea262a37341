//! How similar attention is between steps and between the halves of guidance, along the dense trajectory: what makes sharing it
//! possible (Figures 3a and 4 of the paper).

use super::array::{Array, Data};
use super::feed::Feed;
use super::trials::{TrialError, Trials};
use ditfastattn_plans::{Action, Cfg, Denoiser};
use serde::Serialize;

/// One number per step and layer, `[T][L]`; of the first step those that compare with the step before are NaN (JSON: null).
///
/// Outputs are the attention module's first result, behind its output projection. The residual's part of it is the difference between
/// full and window attention there, which is R projected: projections are linear and their bias falls out.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Study {
    /// Cosine similarity of a layer's output to that of the step before, mean over samples.
    pub step_similarity: Vec<Vec<f64>>,
    /// Cosine similarity between the halves of guidance, mean over samples; rows are empty without halves.
    pub half_similarity: Vec<Vec<f64>>,
    /// Mean squared difference of the window attention's output to that of the step before.
    pub window_drift: Vec<Vec<f64>>,
    /// Mean squared difference of the residual's part to that of the step before.
    pub residual_drift: Vec<Vec<f64>>,
}

/// Follows the dense trajectory of `trials`. `None` if `go_on` says no between two steps.
///
/// # Errors
/// What the model or its inputs say.
pub fn study<F: Feed>(
    trials: &mut Trials<F>,
    cfg: Cfg,
    go_on: &dyn Fn() -> bool,
) -> Result<Option<Study>, TrialError> {
    let (steps, layers) = (trials.feed().steps(), trials.engine().layers());
    let row = vec![Action::Full; layers];
    let halves = matches!(cfg, Cfg::CondFirst | Cfg::UncondFirst);
    let mut study = Study::default();
    let mut before: Vec<Vec<[Array; 2]>> = Vec::new();
    for step in 0..steps {
        if !go_on() {
            return Ok(None);
        }
        trials.settle(step, &row)?;
        let now = (0..layers)
            .map(|layer| trials.full_and_window(layer))
            .collect::<Result<Vec<_>, _>>()?;
        let compare = |f: &dyn Fn(&[Array; 2], &[Array; 2]) -> f64| -> Vec<f64> {
            let layer = |l: usize| match before.get(l) {
                Some(before) => mean(before.iter().zip(&now[l]).map(|(a, b)| f(a, b))),
                None => f64::NAN,
            };
            (0..layers).map(layer).collect()
        };
        study
            .step_similarity
            .push(compare(&|a, b| rows_cosine(&a[0], &b[0])));
        study
            .window_drift
            .push(compare(&|a, b| squares(floats(&a[1]), floats(&b[1]))));
        study.residual_drift.push(compare(&|a, b| {
            squares(difference(&a[0], &a[1]), difference(&b[0], &b[1]))
        }));
        let between = |l: usize| mean(now[l].iter().map(|both| halves_cosine(&both[0])));
        study.half_similarity.push(match halves {
            true => (0..layers).map(between).collect(),
            false => Vec::new(),
        });
        before = now;
        trials.commit(step, &row)?;
    }
    Ok(Some(study))
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(s, n), v| (s + v, n + 1.0));
    sum / count
}

fn floats(array: &Array) -> Vec<f64> {
    match &array.data {
        Data::Float(values) => values.iter().map(|&x| f64::from(x)).collect(),
        _ => Vec::new(),
    }
}

fn difference(a: &Array, b: &Array) -> Vec<f64> {
    let pairs = floats(a).into_iter().zip(floats(b));
    pairs.map(|(a, b)| a - b).collect()
}

fn squares(a: Vec<f64>, b: Vec<f64>) -> f64 {
    mean(a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)))
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Mean over rows.
fn rows_cosine(a: &Array, b: &Array) -> f64 {
    let (a_all, b_all) = (floats(a), floats(b));
    let len = a_all.len() / a.rows().unwrap_or(1).max(1);
    let pairs = a_all
        .chunks_exact(len.max(1))
        .zip(b_all.chunks_exact(len.max(1)));
    mean(pairs.map(|(a, b)| cosine(a, b)))
}

/// Mean over the rows of one half, each with its partner in the other.
fn halves_cosine(array: &Array) -> f64 {
    let all = floats(array);
    let rows = array.rows().unwrap_or(1).max(1);
    let len = (all.len() / rows).max(1);
    let (first, second) = all.split_at(all.len() / 2);
    let pairs = first.chunks_exact(len).zip(second.chunks_exact(len));
    mean(pairs.map(|(a, b)| cosine(a, b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_halves_are_compared_pair_by_pair() {
        let a = Array::floats(vec![2, 2], vec![1.0, 0.0, 0.0, 2.0]);
        let b = Array::floats(vec![2, 2], vec![3.0, 0.0, 1.0, 0.0]);
        assert_eq!(rows_cosine(&a, &b), 0.5);
        assert_eq!(halves_cosine(&a), 0.0);
        assert_eq!(halves_cosine(&b), 1.0);
        assert_eq!(squares(floats(&a), floats(&b)), (4.0 + 1.0 + 4.0) / 4.0);
        assert_eq!(difference(&b, &a), [2.0, 0.0, 1.0, -2.0]);
    }
}
