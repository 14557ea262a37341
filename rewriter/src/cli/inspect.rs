//! `dfa-rewrite inspect`: look, say, change nothing.

use super::args::InspectArgs;
use super::{Failure, inputs_failure, print, read_plan};
use crate::find::survey;
use crate::lower::check_fit;
use crate::onnx::ModelFile;
use crate::report::Report;

pub fn run(args: &InspectArgs) -> Result<(), Failure> {
    let model = ModelFile::open(&args.model)?;
    let plan = args.plan.as_deref().map(read_plan).transpose()?;
    let survey = survey(&model.graph, &(&args.inputs).into(), &(&args.choice).into())
        .map_err(inputs_failure)?;
    let mut report = Report::new(&model, &survey);
    if let Some(plan) = &plan {
        check_fit(&survey, plan).map_err(|e| Failure::No(e.into()))?;
        report = report.with_plan(
            plan,
            &survey,
            &(&args.sizes).into(),
            args.sizes.attention_share,
        );
    }
    if args.json {
        print(&(serde_json::to_string_pretty(&report)? + "\n"))
    } else {
        print(&report.table())
    }
}
