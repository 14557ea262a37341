//! `dfa-rewrite verify`: does the rewritten model compute what it should, and how far does its plan move the result.

use super::load::{host, open};
use super::run_args::VerifyArgs;
use super::{Failure, INTERRUPTED, print, read_plan};
use crate::find::Survey;
use crate::lower::{RequestInputs, lower, plan_in};
use crate::onnx::{ModelFile, elem_type};
use crate::run::distance::Distance;
use crate::run::prepare::Source;
use crate::run::text::{LayerText, Verdict};
use crate::run::verify::{Step, Subject, Verified, verify};
use anyhow::{Context, anyhow};
use comfy_table::{ContentArrangement, Table, presets};
use ditfastattn_plans::Plan;
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::Ordering;

/// What a verification tells.
#[derive(Serialize)]
struct Outcome {
    model: String,
    rewritten: Option<String>,
    plan: Option<String>,
    #[serde(flatten)]
    verified: Verified,
    tolerance: f64,
    /// What is not as it should be; empty: all is well.
    failures: Vec<String>,
}

pub fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let (model, survey) = open(&args.run)?;
    let (plan, file) = match (&args.rewritten, &args.plan) {
        (Some(path), _) => {
            let (plan, file) = read_rewritten(path)?;
            (plan, Some(file))
        }
        (None, Some(path)) => (read_plan(path)?, None),
        (None, None) => return Err(Failure::Bad(anyhow!("expected --plan or --rewritten"))),
    };
    // For a file that was rewritten before, too: it says whether the plan in it is one for this model.
    let lowered = lower(&model, &survey, &plan, RequestInputs::Optional)
        .map_err(|e| Failure::No(e.into()))?;
    let bytes = match &file {
        Some(file) => std::fs::read(&file.path)
            .with_context(|| format!("cannot read {}", file.path.display()))?,
        None => lowered.pieces.concat(),
    };
    let make = |group: usize| args.run.scheduler.make(group);
    let random = Source::Random {
        sizes: &args.sizes,
        seed: args.run.scheduler.seed,
    };
    let source = args.run.source(&make).map_or(random, |(_, source)| source);
    let subject = Subject {
        model: &model,
        survey: &survey,
        plan: &plan,
        rewritten: (file.as_ref().unwrap_or(&model), &bytes),
        source: &source,
    };
    super::watch_interrupts();
    let go_on = || !INTERRUPTED.load(Ordering::Relaxed);
    let verified = verify(&host(&args.run)?, &subject, &go_on)?
        .ok_or_else(|| Failure::No(anyhow!("stopped before the last step")))?;
    let tolerance = args
        .tolerance
        .unwrap_or_else(|| default_tolerance(&model, &survey));
    let outcome = Outcome {
        model: model.path.display().to_string(),
        rewritten: file.map(|f| f.path.display().to_string()),
        plan: plan.name.clone(),
        failures: failures(&verified, tolerance, args),
        verified,
        tolerance,
    };
    match (args.quiet, args.json) {
        (true, _) => {}
        (_, true) => print(&(serde_json::to_string_pretty(&outcome)? + "\n"))?,
        _ => print(&outcome.table())?,
    }
    match outcome.failures.is_empty() {
        true => Ok(()),
        false => Err(Failure::No(anyhow!("{}", outcome.failures.join("\n")))),
    }
}

/// A rewritten model and the plan in it.
fn read_rewritten(path: &Path) -> Result<(Plan, ModelFile), Failure> {
    let file = ModelFile::open(path)?;
    let plan = plan_in(&file.graph).with_context(|| {
        format!(
            "{} is not a rewritten model: expected the step operator in it with a plan and hidden state (`dfa-rewrite MODEL --plan PLAN` writes one)",
            path.display()
        )
    })?;
    let plan = plan.map_err(|e| anyhow!("the plan in {} is not valid: {e}", path.display()))?;
    Ok((plan, file))
}

/// What rounding does to the model's numbers, generously.
fn default_tolerance(model: &ModelFile, survey: &Survey) -> f64 {
    let quantised = ["DynamicQuantizeLinear", "QuantizeLinear"];
    if model
        .graph
        .nodes
        .iter()
        .any(|n| quantised.contains(&n.op()))
    {
        // Activations may fall on the other side of a step.
        return 0.1;
    }
    match survey.layers().next().map(|l| l.core.elem_type) {
        Some(elem_type::FLOAT16) => 0.01,
        Some(elem_type::BFLOAT16) => 0.05,
        _ => 1e-4,
    }
}

/// The first step at which each comparison is beyond its limit, and the layers with the wrong text. A NaN is beyond every limit.
fn failures(verified: &Verified, tolerance: f64, args: &VerifyArgs) -> Vec<String> {
    let within = |apart: f64| apart <= tolerance;
    let first = |apart: fn(&Step) -> f64| {
        let all = verified.steps.iter().map(apart).enumerate();
        all.into_iter().find(|&(_, apart)| !within(apart))
    };
    let mut failures = Vec::new();
    if let Some((step, apart)) = first(|s| s.full) {
        failures.push(format!(
            "step {step}: with every layer full the rewritten model is {apart:.1e} of the largest number away from the original, expected at most {tolerance:.1e} (--tolerance)"
        ));
    }
    if let Some((step, apart)) = first(|s| s.followed) {
        failures.push(format!(
            "step {step}: the rewritten model does not follow its plan: it is {apart:.1e} of the largest number away from what the plan says, expected at most {tolerance:.1e} (--tolerance); the library computes densely where a timestep fed is not the plan's or the caches do not fit (DITFASTATTN_CACHE_BYTES)"
        ));
    }
    for text in verified.text.iter().filter(|t| t.is_wrong()) {
        failures.push(format!(
            "layer {} ({}): {}; {}",
            text.layer,
            text.node,
            text.why.as_deref().unwrap_or_default(),
            text.remedy
        ));
    }
    let loss = verified.result.losses[args.metric.name()];
    if let Some(most) = args.max_loss
        && !loss.is_some_and(|loss| loss <= most)
    {
        let found = loss.map_or("not finite".into(), |loss| format!("{loss:.4}"));
        failures.push(format!(
            "the plan moves the result too far: its {} from the dense one is {found}, expected at most {most} (--max-loss)",
            args.metric
        ));
    }
    failures
}

impl Outcome {
    fn table(&self) -> String {
        let mut text = String::new();
        let plan = self.plan.as_deref().unwrap_or("the plan");
        let _ = writeln!(text, "{} under {plan}", self.model);
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_content_arrangement(ContentArrangement::Disabled)
            .set_header([
                "step", "timestep", "all full", "followed", "max abs", "mrae", "cosine", "mse",
                "PSNR",
            ]);
        for (i, step) in self.verified.steps.iter().enumerate() {
            // Timesteps are fed as float32; more digits would be noise.
            let timestep = step
                .timestep
                .map_or(String::new(), |t| (t as f32).to_string());
            let exact = [step.full, step.followed].map(|x| format!("{x:.1e}"));
            table.add_row(
                [
                    vec![i.to_string(), timestep],
                    exact.to_vec(),
                    cells(&step.planned),
                ]
                .concat(),
            );
        }
        let name = ["final", "", "", ""].map(str::to_owned).to_vec();
        table.add_row([name, cells(&self.verified.result)].concat());
        let _ = writeln!(text, "{}", table.trim_fmt());
        let worst = |of: fn(&Step) -> f64| {
            let steps = self.verified.steps.iter().map(of);
            steps.fold(
                0.0,
                |most: f64, x| if x > most || x.is_nan() { x } else { most },
            )
        };
        let _ = writeln!(
            text,
            "all full: at most {:.1e} of the largest number from the original; followed: at most {:.1e} from what the plan says; allowed {:.1e}",
            worst(|s| s.full),
            worst(|s| s.followed),
            self.tolerance
        );
        text += &about_text(&self.verified.text);
        text
    }
}

/// The text of all layers: how many use what running shows, and per reason the layers that do not, or where it shows nothing.
fn about_text(layers: &[LayerText]) -> String {
    let same = layers.iter().filter(|l| l.verdict == Verdict::Same);
    let mut text = format!(
        "text tokens: as running shows them in {} of {} layers\n",
        same.count(),
        layers.len()
    );
    let mut reasons: Vec<(&str, Vec<String>)> = Vec::new();
    for layer in layers {
        let Some(why) = &layer.why else { continue };
        let what = match layer.verdict {
            Verdict::Differs if !layer.windowed => format!("{} (without windows)", layer.layer),
            _ => layer.layer.to_string(),
        };
        match reasons.iter_mut().find(|(reason, _)| reason == why) {
            Some((_, layers)) => layers.push(what),
            None => reasons.push((why, vec![what])),
        }
    }
    for (why, layers) in reasons {
        let _ = writeln!(text, "  layer {}: {why}", layers.join(", "));
    }
    text
}

/// How far the plan moves a result.
fn cells(distance: &Distance) -> Vec<String> {
    let loss = |name: &str| distance.losses[name].map_or("none".into(), |x| format!("{x:.2e}"));
    vec![
        format!("{:.2e}", distance.max_abs),
        loss("mrae"),
        loss("cosine"),
        loss("mse"),
        match distance.psnr.is_infinite() {
            true => "equal".into(),
            false => format!("{:.1} dB", distance.psnr),
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(layer: usize, verdict: Verdict, windowed: bool, why: Option<&str>) -> LayerText {
        LayerText {
            layer,
            node: format!("node_{layer}"),
            tokens: Some(40),
            found: None,
            used: None,
            verdict,
            windowed,
            why: why.map(str::to_owned),
            remedy: String::new(),
        }
    }

    #[test]
    fn the_layers_of_one_reason_share_a_line() {
        let layers = [
            layer(0, Verdict::Same, true, None),
            layer(1, Verdict::Differs, true, Some("tokens 0-7 are text")),
            layer(2, Verdict::Differs, false, Some("tokens 0-7 are text")),
            layer(
                3,
                Verdict::Unknown,
                true,
                Some("all tokens depend on the latents"),
            ),
        ];
        insta::assert_snapshot!(about_text(&layers), @r"
        text tokens: as running shows them in 1 of 4 layers
          layer 1, 2 (without windows): tokens 0-7 are text
          layer 3: all tokens depend on the latents
        ");
    }

    #[test]
    fn a_layer_without_windows_may_have_any_text() {
        assert!(layer(0, Verdict::Differs, true, None).is_wrong());
        assert!(!layer(0, Verdict::Differs, false, None).is_wrong());
        assert!(!layer(0, Verdict::Unknown, true, None).is_wrong());
    }
}
