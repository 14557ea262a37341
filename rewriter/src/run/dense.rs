//! Which is faster at a step that stays dense: the op library's attention or the host's.
//!
//! Owns the measurement: one dense step of the whole model in both forms, in turn, in one process. So whatever the choice costs
//! besides attention (the `If`, transposes, copies between providers) is in it.

use super::feed::Feed;
use super::host::Host;
use super::prepare::{Source, feed};
use super::whole::{Moment, Whole};
use crate::find::Survey;
use crate::lower::{Dense, RequestInputs, Schedule, State, lower_with};
use crate::onnx::ModelFile;
use ditfastattn_plans::Plan;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Runs of each form before those that count: the first allocates, on a GPU it also loads and chooses kernels.
const WARM: usize = 2;
const ROUNDS: usize = 9;
/// No further round begins after that long.
const ENOUGH: Duration = Duration::from_secs(20);
/// The host must be faster by this factor: less is noise, and the op alone is the simpler graph.
const MARGIN: f64 = 0.98;

/// What a measurement found.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// Milliseconds of a dense step, medians.
    pub library_ms: f64,
    pub host_ms: f64,
    /// Median of the host's time over the library's in the same round.
    pub ratio: f64,
    pub rounds: usize,
    pub provider: &'static str,
}

impl Measured {
    /// Who should compute dense steps.
    pub fn faster(&self) -> Dense {
        match self.ratio < MARGIN {
            true => Dense::Host,
            false => Dense::Library,
        }
    }
}

/// Runs a dense step of `model` on random inputs, its open sizes being `sizes`. `None` if `go_on` says no between two rounds.
///
/// # Errors
/// A size that neither the model nor `sizes` says, and what ONNX Runtime says.
pub fn measure(
    host: &Host,
    model: &ModelFile,
    survey: &Survey,
    plan: &Plan,
    sizes: &[(String, usize)],
    go_on: &dyn Fn() -> bool,
) -> anyhow::Result<Option<Measured>> {
    let full = plan.with_all_full();
    let source = Source::Random { sizes, seed: 0 };
    let inputs = feed(model, survey, &full, &source)?.inputs(0, 0, 0)?;
    let load = |what, dense| -> anyhow::Result<Whole> {
        let state = State::Hidden(RequestInputs::Optional);
        let lowered = lower_with(model, survey, &full, state, dense, Schedule::Planned)?;
        Ok(Whole::load(host, what, model, &lowered.pieces.concat())?)
    };
    let mut library = load("the model with the library's attention", Dense::Library)?;
    let mut theirs = load("the model with ONNX Runtime's attention", Dense::Host)?;
    // Every run begins a generation, so that no step is lost.
    let moment = Moment {
        request: 1,
        start: true,
        end: false,
    };
    let timed = |form: &mut Whole| -> anyhow::Result<f64> {
        let start = Instant::now();
        form.run(&inputs, Some(moment))?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    for _ in 0..WARM {
        timed(&mut library)?;
        timed(&mut theirs)?;
    }
    let start = Instant::now();
    let mut rounds: Vec<[f64; 2]> = Vec::new();
    while rounds.len() < ROUNDS && (rounds.is_empty() || start.elapsed() < ENOUGH) {
        if !go_on() {
            return Ok(None);
        }
        // Whoever goes second finds the caches as the other left them.
        let round = match rounds.len() % 2 {
            0 => [timed(&mut library)?, timed(&mut theirs)?],
            _ => {
                let second = timed(&mut theirs)?;
                [timed(&mut library)?, second]
            }
        };
        rounds.push(round);
    }
    let of = |f: fn(&[f64; 2]) -> f64| median(rounds.iter().map(f).collect());
    Ok(Some(Measured {
        library_ms: of(|r| r[0]),
        host_ms: of(|r| r[1]),
        ratio: of(|r| r[1] / r[0]),
        rounds: rounds.len(),
        provider: host.provider().name(),
    }))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_must_be_clearly_faster() {
        let measured = |ratio| Measured {
            library_ms: 1.0,
            host_ms: ratio,
            ratio,
            rounds: 1,
            provider: "CPU",
        };
        assert_eq!(measured(0.9).faster(), Dense::Host);
        assert_eq!(measured(0.99).faster(), Dense::Library);
        assert_eq!(measured(1.1).faster(), Dense::Library);
        assert_eq!(measured(f64::NAN).faster(), Dense::Library);
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }
}
