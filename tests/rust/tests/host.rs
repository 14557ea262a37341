//! The whole path from a Rust host: rewrite with the library crate, run through ONNX Runtime with
//! `libditfastattn.so` registered, compare with PyTorch's outputs.
//!
//! `ORT_DYLIB_PATH` names `libonnxruntime.so`, `DITFASTATTN_LIB` the op library; `scripts/test` sets both.

use ditfastattn_plans::Plan;
use ditfastattn_rewriter::find::{Choice, InputsRequest, survey};
use ditfastattn_rewriter::lower::{RequestInputs, lower};
use ditfastattn_rewriter::onnx::{ModelFile, write_atomically};
use ndarray::{ArrayD, OwnedRepr};
use ndarray_npy::NpzReader;
use ort::environment::Environment;
use ort::session::{Session, SessionInputValue};
use ort::value::Tensor;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

fn environment() -> &'static Arc<Environment> {
    static ENVIRONMENT: OnceLock<Arc<Environment>> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let library = setting("ORT_DYLIB_PATH");
        ort::init_from(library)
            .expect("load ONNX Runtime")
            .build()
            .expect("make an environment")
            .into()
    })
}

/// A path that `scripts/test` provides. Without it the test fails: it must not pass by not running.
fn setting(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set; run scripts/test"))
        .into()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fixtures")
        .join(name)
}

struct Case {
    arrays: NpzReader<File>,
    names: Vec<String>,
}

impl Case {
    fn open(name: &str) -> Self {
        let mut arrays =
            NpzReader::new(File::open(fixture(&format!("{name}.npz"))).unwrap()).unwrap();
        let names = arrays.names().unwrap();
        Self { arrays, names }
    }

    fn steps(&self) -> usize {
        self.names
            .iter()
            .filter(|n| n.starts_with("step") && n.ends_with("_out"))
            .count()
    }

    fn expected(&mut self, step: usize) -> ArrayD<f32> {
        self.floats(&format!("step{step}_out"))
    }

    fn floats(&mut self, name: &str) -> ArrayD<f32> {
        self.arrays.by_name::<OwnedRepr<f32>, _>(name).unwrap()
    }

    fn feed(&mut self, step: usize) -> HashMap<String, SessionInputValue<'static>> {
        let prefix = format!("step{step}_");
        let names = self.names.clone();
        names
            .iter()
            .filter_map(|n| {
                Some((
                    n,
                    n.strip_prefix("fixed_")
                        .or_else(|| n.strip_prefix(&prefix))?,
                ))
            })
            .filter(|(_, input)| *input != "out")
            .map(|(name, input)| {
                let value = match self.arrays.by_name::<OwnedRepr<i64>, ndarray::IxDyn>(name) {
                    Ok(ints) => tensor(ints),
                    Err(_) => tensor(self.floats(name)),
                };
                (input.to_owned(), value)
            })
            .collect()
    }
}

fn tensor<T: ort::value::PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static>(
    array: ArrayD<T>,
) -> SessionInputValue<'static> {
    let shape = array.shape().to_vec();
    Tensor::from_array((shape, array.into_raw_vec_and_offset().0))
        .unwrap()
        .into()
}

fn session(path: &Path) -> Session {
    // ONNX Runtime's table of operator domains is not guarded: two first sessions at once can both
    // try to add ours, and one of them fails (docs/operations.md).
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    Session::builder(environment())
        .unwrap()
        .with_operator_library(setting("DITFASTATTN_LIB"))
        .unwrap()
        .commit_from_file(path)
        .unwrap()
}

fn rewrite(model: &str, plan: &Plan, folder: &Path) -> PathBuf {
    let model = ModelFile::open(&fixture(model)).unwrap();
    let survey = survey(&model.graph, &InputsRequest::default(), &Choice::default()).unwrap();
    let lowered = lower(&model, &survey, plan, RequestInputs::Optional).unwrap();
    let path = folder.join("model.dfa.onnx");
    write_atomically(&path, &lowered.pieces, &|| false).unwrap();
    path
}

fn distance(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    actual
        .iter()
        .zip(expected)
        .fold(0f32, |m, (a, e)| m.max((a - e).abs()))
        / largest
}

#[test]
fn follows_the_plan_at_every_step() {
    for (name, dialect) in [
        ("dit", "ts17"),
        ("dit", "dyn23"),
        ("pixart", "ts17"),
        ("fbdit", "dyn18"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let plan =
            Plan::parse(&std::fs::read_to_string(fixture(&format!("{name}.plan.json"))).unwrap())
                .unwrap();
        let mut session = session(&rewrite(
            &format!("{name}__{dialect}.onnx"),
            &plan,
            folder.path(),
        ));
        let mut case = Case::open(name);
        for step in 0..case.steps() {
            let outputs = session.run(case.feed(step)).unwrap();
            let (_, actual) = outputs[0].try_extract_tensor::<f32>().unwrap();
            let expected = case.expected(step);
            let worst = distance(actual, expected.as_slice().unwrap());
            assert!(worst < 2e-3, "{name} {dialect}, step {step}: {worst}");
        }
    }
}

#[test]
fn a_fault_in_an_op_is_an_error_and_the_session_lives_on() {
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan::all_full(2, 10);
    let mut session = session(&rewrite("dit__ts17.onnx", &plan, folder.path()));
    let mut case = Case::open("dit");
    let mut bad = case.feed(0);
    // A request id must be one number.
    bad.insert(
        "dfa_request_id".into(),
        tensor(ArrayD::from_elem(vec![3], 1i64)),
    );
    let error = session.run(bad).map(|_| ()).unwrap_err().to_string();
    assert!(
        error.contains("dfa_request_id") || error.contains("request id"),
        "{error}"
    );
    assert!(session.run(case.feed(0)).is_ok());
}
