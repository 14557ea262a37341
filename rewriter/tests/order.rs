//! The order in which a file has its nodes means nothing: layers have the same numbers, and what is written says the same.

use ditfastattn_plans::Plan;
use ditfastattn_rewriter::find::{Choice, InputsRequest, Survey, survey};
use ditfastattn_rewriter::lower::{RequestInputs, lower};
use ditfastattn_rewriter::onnx::{GraphEdit, ModelFile, Node};
use proptest::prelude::*;
use prost::Message;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// Self-, joint, dual and cross-attention; video; static and dynamic.
const MODELS: [&str; 8] = [
    "dit__ts17",
    "sd3__dyn18",
    "sd35__ts17-static",
    "flux__ts17-static-slim",
    "latte__dyn18",
    "stdit__ts17",
    "pixart__ts17",
    "hunyuan__ts17-static-slim",
];

fn path(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    folder.join(name).with_extension("onnx")
}

/// The nodes of `model` in another order: each is any of those whose inputs are there.
fn resorted(model: &ModelFile, seed: u64) -> ModelFile {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let nodes = &model.graph.nodes;
    let needs = |node: &Node| -> Vec<usize> {
        let read = node.proto.input.iter().chain(&node.captured);
        let producers = read.filter_map(|v| model.graph.producer_index(v));
        producers.map(|(index, _)| index).collect()
    };
    let mut missing: Vec<usize> = Vec::new();
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    for (index, node) in nodes.iter().enumerate() {
        let needs = needs(node);
        missing.push(needs.len());
        for needed in needs {
            users[needed].push(index);
        }
    }
    let mut ready: Vec<usize> = (0..nodes.len()).filter(|&i| missing[i] == 0).collect();
    let mut sorted = Vec::new();
    while !ready.is_empty() {
        let next = ready.swap_remove(random.next_u64() as usize % ready.len());
        sorted.push(nodes[next].raw.clone());
        for &user in &users[next] {
            missing[user] -= 1;
            if missing[user] == 0 {
                ready.push(user);
            }
        }
    }
    assert_eq!(sorted.len(), nodes.len());
    let edit = GraphEdit {
        nodes: Some(sorted),
        ..GraphEdit::default()
    };
    let bytes = model.serialize(&edit, None, &[]).concat();
    ModelFile::parse(&model.path, bytes.into()).unwrap()
}

fn surveyed(model: &ModelFile) -> Survey {
    let (request, choice) = (InputsRequest::default(), Choice::default());
    survey(&model.graph, &request, &choice).unwrap()
}

/// What a rewritten model says, whatever the order of its nodes.
struct Meaning {
    /// Nodes of the layers, by their numbers.
    layers: Vec<String>,
    nodes: BTreeMap<Vec<u8>, usize>,
    /// Inputs, outputs, initializers, metadata.
    around: Vec<String>,
}

fn meaning(model: &ModelFile) -> Meaning {
    let survey = surveyed(model);
    let plan = Plan::all_full(survey.layers().count(), 2);
    let lowered = lower(model, &survey, &plan, RequestInputs::Optional).unwrap();
    let out = ModelFile::parse(&model.path, lowered.pieces.concat().into()).unwrap();
    let mut nodes = BTreeMap::new();
    for node in unordered(&out.graph.nodes) {
        *nodes.entry(node).or_default() += 1;
    }
    let mut initializers: Vec<&String> = out.graph.initializers.keys().collect();
    initializers.sort();
    let graph = &out.graph;
    let inputs = graph.inputs.iter().map(|i| &i.name);
    let names = inputs.chain(&graph.outputs).chain(initializers).cloned();
    let metadata = out
        .metadata
        .iter()
        .map(|(key, value)| format!("{key}={value}"));
    Meaning {
        layers: survey.layers().map(|l| survey.label(l)).collect(),
        nodes,
        around: names.chain(metadata).collect(),
    }
}

/// The bytes of `nodes`, sorted, and in place of branches what is in them. Our constants are numbered in the order in which they are
/// written, so they go by what they hold.
fn unordered(nodes: &[Node]) -> Vec<Vec<u8>> {
    let ours = |n: &&Node| n.is("Constant") && n.output(0).starts_with("dfa/");
    let held = nodes.iter().filter(ours);
    let held: HashMap<&str, String> = held
        .map(|n| (n.output(0), format!("{:?}", n.proto.attribute)))
        .collect();
    let bytes = |node: &Node| {
        let mut proto = node.proto.clone();
        for input in &mut proto.input {
            if let Some(held) = held.get(input.as_str()) {
                input.clone_from(held);
            }
        }
        if held.contains_key(node.output(0)) {
            return held[node.output(0)].clone().into_bytes();
        }
        if node.has_subgraph() {
            proto.attribute.clear();
            let inner = unordered(&node.inner()).concat();
            return [proto.encode_to_vec(), inner].concat();
        }
        proto.encode_to_vec()
    };
    let mut all: Vec<Vec<u8>> = nodes.iter().map(bytes).collect();
    all.sort();
    all
}

static AS_EXPORTED: LazyLock<HashMap<&'static str, (ModelFile, Meaning)>> = LazyLock::new(|| {
    let read = |name: &&'static str| {
        let model = ModelFile::open(&path(name)).unwrap();
        let meaning = meaning(&model);
        assert!(meaning.layers.len() > 1);
        (*name, (model, meaning))
    };
    MODELS.iter().map(read).collect()
});

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn nodes_in_another_order_are_the_same_model(
        name in prop::sample::select(&MODELS[..]),
        seed in any::<u64>(),
    ) {
        let (model, expected) = &AS_EXPORTED[name];
        let found = meaning(&resorted(model, seed));
        prop_assert_eq!(&found.layers, &expected.layers);
        prop_assert_eq!(&found.around, &expected.around);
        let differs = |node: &&Vec<u8>| found.nodes.get(*node) != expected.nodes.get(*node);
        let mut nodes = found.nodes.keys().chain(expected.nodes.keys());
        let other = nodes.find(differs).map(|node| String::from_utf8_lossy(node));
        prop_assert_eq!(other, None);
    }
}
