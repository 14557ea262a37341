//! Any bytes as a model: refused, or inspected and rewritten into something that can be read again.
#![no_main]

use bytes::Bytes;
use ditfastattn_plans::Plan;
use ditfastattn_rewriter::find::{Choice, InputsRequest, survey};
use ditfastattn_rewriter::lower::{RequestInputs, lower};
use ditfastattn_rewriter::onnx::ModelFile;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("fuzzed.onnx");
    let Ok(model) = ModelFile::parse(path, Bytes::copy_from_slice(bytes)) else {
        return;
    };
    let Ok(survey) = survey(&model.graph, &InputsRequest::default(), &Choice::default()) else {
        return;
    };
    let layers = survey.layers().count();
    if layers == 0 {
        return;
    }
    if let Ok(lowered) = lower(&model, &survey, &Plan::all_full(layers, 2), RequestInputs::Optional) {
        let whole: Vec<u8> = lowered.pieces.iter().flat_map(|p| p.to_vec()).collect();
        ModelFile::parse(path, whole.into()).expect("what was written can be read");
    }
});
