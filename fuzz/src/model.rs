//! Any bytes as a model: refused, or inspected, and rewritten under several plans into models that are whole.

use bytes::Bytes;
use ditfastattn_plans::{Action, Cfg, Plan, Side, TextTokens};
use ditfastattn_rewriter::find::{Choice, InputsRequest, Survey, survey};
use ditfastattn_rewriter::lower::{
    Dense, DirectiveSource, LowerError, RequestInputs, Schedule, State, lower, lower_with, plan_in,
};
use ditfastattn_rewriter::onnx::{Graph, GraphEdit, ModelFile};
use ditfastattn_rewriter::report::Report;
use std::collections::HashSet;
use std::path::Path;

/// How far a file came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    Refused,
    NoLayer,
    NotLowered,
    Written,
}

/// Does everything to `bytes` that `dfa-rewrite` does to a model.
///
/// # Panics
/// Where a promise does not hold.
pub fn check(bytes: &[u8]) -> Reached {
    let Some(model) = parse(bytes.to_vec()) else {
        return Reached::Refused;
    };
    let unchanged = joined(&model.serialize(&GraphEdit::default(), None, &[]));
    assert!(
        model.inlined || unchanged == bytes,
        "an empty edit changed bytes"
    );
    let Some(survey) = surveyed(&model) else {
        return Reached::NoLayer;
    };
    let _ = Report::new(&model, &survey).table();
    let layers = survey.layers().count();
    if layers == 0 {
        let refused = lower(
            &model,
            &survey,
            &Plan::all_full(1, 2),
            State::Io(DirectiveSource::Step),
        )
        .is_err();
        assert!(refused, "a model without a layer was rewritten");
        return Reached::NoLayer;
    }
    let mut reached = Reached::NotLowered;
    for (plan, state) in cases(layers) {
        for dense in [Dense::Library, Dense::Host] {
            if let Ok(lowered) = lower_with(&model, &survey, &plan, state, dense, Schedule::Planned)
            {
                written(&model, &plan, state, joined(&lowered.pieces));
                reached = Reached::Written;
            }
        }
    }
    reached
}

/// Plans that use each method, each under another form of the state. They may well be refused: for text, for halves.
fn cases(layers: usize) -> [(Plan, State); 4] {
    let plan = |cfg, actions: &[Action]| Plan {
        cfg,
        steps: actions.iter().map(|&a| vec![a; layers]).collect(),
        ..Plan::all_full(layers, 1)
    };
    let shared = [Action::Full, Action::WaRsAsc, Action::Asc, Action::Ast];
    let text = TextTokens {
        tokens: 3,
        side: Side::Start,
    };
    let texted = Plan {
        text: Some(text),
        ..plan(Cfg::None, &[Action::Full, Action::WaRs])
    };
    [
        (Plan::all_full(layers, 2), RequestInputs::Optional.into()),
        (plan(Cfg::CondFirst, &shared), RequestInputs::Triton.into()),
        (
            plan(Cfg::UncondFirst, &shared),
            State::Io(DirectiveSource::Step),
        ),
        (texted, State::Io(DirectiveSource::Directives)),
    ]
}

fn written(model: &ModelFile, plan: &Plan, state: State, bytes: Vec<u8>) {
    let whole = bytes.clone();
    let again = parse(bytes).expect("what was written can be read");
    let nodes = again.graph.nodes.iter().map(|n| n.raw.clone()).collect();
    let in_order = GraphEdit {
        nodes: Some(nodes),
        ..GraphEdit::default()
    };
    let sorted = joined(&again.serialize(&in_order, None, &[]));
    assert!(sorted == whole, "a node stands before one that it needs");
    let (before, after) = (undefined(&model.graph), undefined(&again.graph));
    let lost: Vec<_> = after.difference(&before).collect();
    assert!(lost.is_empty(), "nothing defines {lost:?} any more");
    let weights = again.external_data_locations();
    assert!(
        weights.is_subset(&model.external_data_locations()),
        "{weights:?}"
    );
    if let State::Hidden(_) = state {
        assert_eq!(plan_in(&again.graph).as_ref(), Some(&Ok(plan.clone())));
    }
    if let Some(survey) = surveyed(&again) {
        let twice = lower(&again, &survey, plan, state);
        let refused = matches!(twice, Err(LowerError::AlreadyRewritten));
        assert!(refused, "a rewritten model was rewritten again");
    }
}

/// Names that are read and that nothing defines.
fn undefined(graph: &Graph) -> HashSet<String> {
    let read = graph.nodes.iter().flat_map(|node| {
        let inputs = node.proto.input.iter().chain(&node.captured);
        inputs.filter(|name| !name.is_empty())
    });
    read.chain(&graph.outputs)
        .filter(|name| {
            graph.producer(name).is_none()
                && !graph.initializers.contains_key(*name)
                && !graph.is_input(name)
        })
        .cloned()
        .collect()
}

fn parse(bytes: Vec<u8>) -> Option<ModelFile> {
    ModelFile::parse(Path::new("model.onnx"), bytes.into()).ok()
}

fn surveyed(model: &ModelFile) -> Option<Survey> {
    survey(&model.graph, &InputsRequest::default(), &Choice::default()).ok()
}

fn joined(pieces: &[Bytes]) -> Vec<u8> {
    pieces.concat()
}
