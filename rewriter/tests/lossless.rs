//! What a rewrite does not touch comes back byte for byte.

use ditfastattn_plans::Plan;
use ditfastattn_rewriter::find::{Choice, InputsRequest, survey};
use ditfastattn_rewriter::lower::{DOMAIN, RequestInputs, lower};
use ditfastattn_rewriter::onnx::{GraphEdit, ModelFile};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// Every export of the corpus that can be rewritten, with what the command line would have to be told.
fn fixtures() -> Vec<(PathBuf, InputsRequest)> {
    let text = std::fs::read_to_string(folder().join("corpus.json")).unwrap();
    let corpus: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let mut models: Vec<_> = corpus
        .iter()
        .filter(|entry| entry["expect"] == "rewritten")
        .map(|entry| {
            let flags = entry["flags"].as_array().unwrap();
            let mut flags = flags.iter().map(|f| f.as_str().unwrap().to_owned());
            let mut request = InputsRequest::default();
            while let (Some(flag), Some(value)) = (flags.next(), flags.next()) {
                match flag.as_str() {
                    "--timestep-input" => request.timestep = Some(value),
                    "--latents-input" => request.latents = Some(value),
                    other => {
                        panic!("corpus.json has the flag {other}, which this test does not know")
                    }
                }
            }
            (folder().join(entry["file"].as_str().unwrap()), request)
        })
        .collect();
    models.sort_by(|a, b| a.0.cmp(&b.0));
    models.dedup_by(|a, b| a.0 == b.0);
    assert!(models.len() > 100, "the fixtures are missing");
    models
}

fn joined(pieces: &[bytes::Bytes]) -> Vec<u8> {
    pieces.iter().flat_map(|p| p.to_vec()).collect()
}

fn rewritten(path: &Path, request: &InputsRequest) -> (ModelFile, ModelFile, HashSet<String>) {
    let model = ModelFile::open(path).unwrap();
    let survey = survey(&model.graph, request, &Choice::default()).unwrap();
    let plan = Plan::all_full(survey.layers().count(), 4);
    let lowered = lower(&model, &survey, &plan, RequestInputs::Optional).unwrap();
    let touched = survey
        .layers()
        .flat_map(|l| {
            let inside = l
                .module
                .as_ref()
                .map(|m| m.inside.clone())
                .unwrap_or_default();
            inside
                .into_iter()
                .chain(ditfastattn_rewriter::find::dead_without(
                    &model.graph,
                    &l.core,
                ))
        })
        .map(|i| model.graph.nodes[i].label().to_owned())
        .collect();
    let again = ModelFile::parse(path, joined(&lowered.pieces).into()).unwrap();
    (model, again, touched)
}

#[test]
fn an_empty_edit_changes_no_byte() {
    for (path, _) in fixtures() {
        let model = ModelFile::open(&path).unwrap();
        let pieces = model.serialize(&GraphEdit::default(), None, &[]);
        assert_eq!(
            joined(&pieces),
            std::fs::read(&path).unwrap(),
            "{}",
            path.display()
        );
    }
}

#[test]
fn nodes_outside_the_modules_keep_their_bytes_and_their_order() {
    for (path, request) in fixtures() {
        let (before, after, touched) = rewritten(&path, &request);
        let kept = after
            .graph
            .nodes
            .iter()
            .filter(|n| n.domain() != DOMAIN && n.op() != "If");
        let expected = before
            .graph
            .nodes
            .iter()
            .filter(|n| !touched.contains(n.label()));
        let expected: Vec<_> = expected.map(|n| &n.raw).collect();
        let kept: Vec<_> = kept.map(|n| &n.raw).collect();
        // Constants that only the replaced nodes used are gone as well, so what is kept is a subsequence.
        let mut rest = expected.iter();
        for raw in &kept {
            assert!(
                rest.any(|e| e == raw),
                "{}: a node changed or moved",
                path.display()
            );
        }
        assert!(
            2 * kept.len() > expected.len(),
            "{}: most of the graph is gone",
            path.display()
        );
    }
}

#[test]
fn everything_else_of_the_file_is_kept() {
    for (path, request) in fixtures() {
        let (before, after, _) = rewritten(&path, &request);
        assert_eq!(after.ir_version, before.ir_version);
        assert_eq!(after.producer, before.producer);
        assert_eq!(after.graph.outputs, before.graph.outputs);
        assert!(
            before
                .opset_imports
                .iter()
                .all(|o| after.opset_imports.contains(o))
        );
        assert!(before.metadata.iter().all(|m| after.metadata.contains(m)));
        assert_eq!(
            after.external_data_locations(),
            before.external_data_locations()
        );
        for input in &before.graph.inputs {
            assert!(
                after
                    .graph
                    .inputs
                    .iter()
                    .any(|i| i.name == input.name && i.dims == input.dims)
            );
        }
        for (name, constant) in &after.graph.initializers {
            if let Some(old) = before.graph.initializers.get(name) {
                assert_eq!(old, constant, "{name}");
            } else {
                assert!(name.starts_with("dfa_"), "{name} is new");
            }
        }
    }
}

#[test]
fn custom_ops_are_annotated_with_their_type() {
    for (path, request) in fixtures() {
        let (_, after, _) = rewritten(&path, &request);
        for node in after
            .graph
            .nodes
            .iter()
            .filter(|n| n.domain() == DOMAIN || n.op() == "If")
        {
            for output in &node.proto.output {
                assert!(
                    after.graph.value_info.contains_key(output),
                    "{}: {output}",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn any_truncation_is_an_error_and_no_panic() {
    let (path, _) = &fixtures()[0];
    let bytes = std::fs::read(path).unwrap();
    // Every length near the ends, where the headers are, and a sample between.
    let near_ends = (0..200).chain(bytes.len() - 200..bytes.len());
    for length in near_ends.chain((200..bytes.len() - 200).step_by(997)) {
        if let Ok(model) = ModelFile::parse(path, bytes::Bytes::copy_from_slice(&bytes[..length])) {
            // A cut at a field's end is a smaller but well-formed message.
            let _ = survey(&model.graph, &InputsRequest::default(), &Choice::default());
        }
    }
}
