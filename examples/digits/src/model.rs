//! Denoising with one ONNX model: the loop any server runs around a Diffusion Transformer.
//!
//! It is the same loop for the dense and for the rewritten model: the only difference is the
//! library that the session is given. Nothing here knows what a plan is.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ort::environment::Environment;
use ort::session::Session;
use ort::value::TensorRef;

use ditfastattn_rewriter::run::scheduler::{Betas, DpmSolver, Scheduler};

/// Columns and rows of an image.
pub const SIDE: usize = 32;
/// Digits the model can be asked for.
pub const CLASSES: usize = 10;
/// The label that stands for "no class".
const NO_CLASS: i64 = 10;

/// A loaded model.
pub struct Model {
    session: Session,
}

/// What a loop made, and how long it took.
pub struct Generation {
    /// The images one after another, clamped to [-1, 1].
    pub images: Vec<f32>,
    /// Wall time of the model's run at each step.
    pub steps: Vec<Duration>,
    /// Wall time of the whole loop.
    pub total: Duration,
}

impl Model {
    /// Opens a model, with the op library if it needs one. `threads`: 0 lets ONNX Runtime choose.
    pub fn open(
        environment: &Environment,
        path: &Path,
        library: Option<&Path>,
        threads: usize,
    ) -> Result<Model> {
        let mut options = Session::builder(environment)?;
        if threads > 0 {
            options = options
                .with_intra_threads(threads)
                .map_err(ort::Error::<()>::from)?;
        }
        if let Some(library) = library {
            options = options
                .with_operator_library(library)
                .map_err(ort::Error::<()>::from)
                .with_context(|| format!("{}: cannot be registered", library.display()))?;
        }
        let session = options
            .commit_from_file(path)
            .with_context(|| format!("{}: ONNX Runtime refuses the model", path.display()))?;
        Ok(Model { session })
    }

    /// One run whose result nobody needs: memory is allocated, threads are awake.
    pub fn warm_up(&mut self, labels: &[i64], timestep: i64) -> Result<()> {
        let noise = vec![0.5; labels.len() * SIDE * SIDE];
        self.predict(&noise, &guided(labels), timestep).map(drop)
    }

    /// Draws one image per label from `noise`, in `steps` steps.
    ///
    /// Classifier-free guidance: the batch is the conditional half, then the unconditional one.
    pub fn denoise(
        &mut self,
        noise: &[f32],
        labels: &[i64],
        steps: usize,
        guidance: f32,
        mut progress: impl FnMut(usize),
    ) -> Result<Generation> {
        let labels = guided(labels);
        let mut sampler = DpmSolver::new(&Betas::default(), steps);
        let mut images = noise.to_vec();
        let mut times = Vec::with_capacity(steps);
        let start = Instant::now();
        for (step, timestep) in sampler.timesteps().to_vec().into_iter().enumerate() {
            let (seen, took) = self.predict(&images, &labels, timestep as i64)?;
            times.push(took);
            let (with_class, without) = seen.split_at(images.len());
            let noise: Vec<f32> = with_class
                .iter()
                .zip(without)
                .map(|(&c, &u)| u + guidance * (c - u))
                .collect();
            sampler.step(&noise, None, &mut images);
            progress(step + 1);
        }
        let total = start.elapsed();
        for pixel in &mut images {
            *pixel = pixel.clamp(-1.0, 1.0);
        }
        Ok(Generation {
            images,
            steps: times,
            total,
        })
    }

    /// The noise the model sees in `images`, for both halves of `labels`, and the time of its run.
    fn predict(
        &mut self,
        images: &[f32],
        labels: &[i64],
        timestep: i64,
    ) -> Result<(Vec<f32>, Duration)> {
        let rows = labels.len();
        let both = [images, images].concat();
        let timesteps = vec![timestep; rows];
        let inputs = ort::inputs![
            "hidden_states" => TensorRef::from_array_view(([rows, 1, SIDE, SIDE], both.as_slice()))?,
            "timestep" => TensorRef::from_array_view(([rows], timesteps.as_slice()))?,
            "class_labels" => TensorRef::from_array_view(([rows], labels))?,
        ];
        let start = Instant::now();
        let outputs = self.session.run(inputs)?;
        let took = start.elapsed();
        let (_, seen) = outputs["out"].try_extract_tensor::<f32>()?;
        ensure!(
            seen.len() == both.len(),
            "the model returned {} values, expected {} (one channel, noise prediction only)",
            seen.len(),
            both.len()
        );
        Ok((seen.to_vec(), took))
    }
}

/// The labels of a guided batch: those asked for, then as many of "no class".
fn guided(labels: &[i64]) -> Vec<i64> {
    let mut both = labels.to_vec();
    both.resize(2 * labels.len(), NO_CLASS);
    both
}
