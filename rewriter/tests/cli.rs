//! The command as people meet it: what it prints, what it writes, and its exit codes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name)
}

/// A folder with a model, its plan, and nothing else.
struct Workplace(tempfile::TempDir);

impl Workplace {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixture("dit__ts17.onnx"), folder.path().join("model.onnx")).unwrap();
        std::fs::copy(fixture("dit.plan.json"), folder.path().join("plan.json")).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    fn files(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.0.path())
            .unwrap()
            .map(|f| f.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_dfa-rewrite"))
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .unwrap()
    }

    /// Exit code and both streams, as one text for snapshots.
    fn transcript(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        format!(
            "$ dfa-rewrite {}\n{}{}exit {}",
            arguments.join(" "),
            text(&output.stdout),
            text(&output.stderr),
            output.status.code().unwrap()
        )
    }
}

const REWRITE: [&str; 3] = ["model.onnx", "--plan", "plan.json"];

#[test]
fn help() {
    let workplace = Workplace::new();
    insta::assert_snapshot!("help", workplace.transcript(&["--help"]));
    for command in ["inspect", "search", "study", "import"] {
        let transcript = workplace.transcript(&[command, "--help"]);
        insta::assert_snapshot!(format!("help_{command}"), transcript);
    }
}

#[test]
fn a_search_that_cannot_begin_says_what_is_missing() {
    let workplace = Workplace::new();
    workplace.write("calib.npz", "no archive");
    let search = |more: &[&str]| {
        let mut all = vec!["search", "model.onnx", "-o", "new.json"];
        all.extend(more);
        workplace.transcript(&all)
    };
    let calib = [
        "--calib",
        "calib.npz",
        "--scheduler",
        "ddim",
        "--steps",
        "4",
        "--onnxruntime",
        "nowhere",
    ];
    let with = |more: &[&'static str]| search(&[more, &calib[..]].concat());
    let transcripts = [
        search(&["--preset", "d3"]),
        with(&[]),
        with(&["--delta", "0.1", "--cfg", "separate"]),
        with(&["--delta", "0.1"]),
        with(&["--delta", "0.1", "--window", "2"]),
    ];
    insta::assert_snapshot!("search_refused", transcripts.join("\n\n"));
    assert_eq!(workplace.files(), ["calib.npz", "model.onnx", "plan.json"]);
}

#[test]
fn a_rewrite_writes_one_file_beside_the_model_and_reports() {
    let workplace = Workplace::new();
    insta::assert_snapshot!("rewrite", workplace.transcript(&REWRITE));
    assert_eq!(
        workplace.files(),
        ["model.dfa.onnx", "model.onnx", "plan.json"]
    );
    assert_eq!(
        std::fs::read(workplace.path("model.onnx")).unwrap(),
        std::fs::read(fixture("dit__ts17.onnx")).unwrap(),
        "the model itself changed"
    );
}

#[test]
fn a_dry_run_writes_nothing() {
    let workplace = Workplace::new();
    let output = workplace.run(&[REWRITE.as_slice(), &["--dry-run"]].concat());
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(workplace.files(), ["model.onnx", "plan.json"]);
}

#[test]
fn inspect_names_every_attention_and_why_it_is_left_alone() {
    let workplace = Workplace::new();
    std::fs::copy(fixture("pixart__ts17.onnx"), workplace.path("pixart.onnx")).unwrap();
    insta::assert_snapshot!("inspect", workplace.transcript(&["inspect", "pixart.onnx"]));
    insta::assert_snapshot!(
        "inspect_json",
        workplace.transcript(&["inspect", "model.onnx", "--plan", "plan.json", "--json"])
    );
    assert_eq!(
        workplace.files(),
        ["model.onnx", "pixart.onnx", "plan.json"]
    );
}

#[test]
fn bad_input_is_exit_2_and_writes_nothing() {
    let workplace = Workplace::new();
    workplace.write("empty.onnx", b"");
    workplace.write("text.onnx", b"this is not a model");
    let model = std::fs::read(workplace.path("model.onnx")).unwrap();
    workplace.write("cut.onnx", &model[..model.len() / 2]);
    workplace.write(
        "broken.json",
        b"{\"format\": \"ditfastattn-plan\", \"version\": 1,\n \"steps\": [[\"full\", \"asx\"]]}",
    );
    let before = workplace.files();
    let all: Vec<String> = [
        &["missing.onnx", "--plan", "plan.json"][..],
        &["model.onnx", "--plan", "missing.json"],
        &["model.onnx", "--plan", "broken.json"],
        &["empty.onnx", "--plan", "plan.json"],
        &["text.onnx", "--plan", "plan.json"],
        &["cut.onnx", "--plan", "plan.json"],
        &[
            "model.onnx",
            "--plan",
            "plan.json",
            "-o",
            "model.onnx",
            "--force",
        ],
        &[
            "model.onnx",
            "--plan",
            "plan.json",
            "-o",
            "no/such/folder/out.onnx",
        ],
        &[
            "model.onnx",
            "--plan",
            "plan.json",
            "-o",
            "out.onnx",
            "--timestep-input",
            "time",
        ],
        &["model.onnx"],
        &["inspect", "plan.json"],
        &["plot", "plan.json", "-o", "plan.gif"],
    ]
    .iter()
    .map(|arguments| workplace.transcript(arguments))
    .collect();
    assert!(all.iter().all(|t| t.ends_with("exit 2")), "{all:#?}");
    assert_eq!(workplace.files(), before);
    insta::assert_snapshot!("bad_input", all.join("\n\n"));
}

#[test]
fn a_no_is_exit_1_and_writes_nothing() {
    let workplace = Workplace::new();
    std::fs::copy(fixture("fbdit.plan.json"), workplace.path("two.json")).unwrap();
    let three =
        r#"{"format": "ditfastattn-plan", "version": 1, "steps": [["full", "full", "full"]]}"#;
    workplace.write("three.json", three);
    let heads = r#"{"format": "ditfastattn-plan", "version": 1, "model": {"heads": 16}, "steps": [["full", "full"]]}"#;
    workplace.write("heads.json", heads);
    workplace.run(&REWRITE);
    let before = workplace.files();
    let all: Vec<String> = [
        &["model.onnx", "--plan", "three.json", "-o", "out.onnx"][..],
        &["model.onnx", "--plan", "heads.json", "-o", "out.onnx"],
        &["model.dfa.onnx", "--plan", "plan.json", "-o", "out.onnx"],
    ]
    .iter()
    .map(|arguments| workplace.transcript(arguments))
    .collect();
    assert!(all.iter().all(|t| t.ends_with("exit 1")), "{all:#?}");
    assert_eq!(workplace.files(), before);
    insta::assert_snapshot!("no", all.join("\n\n"));
}

#[test]
fn overwriting_needs_force() {
    let workplace = Workplace::new();
    workplace.write("model.dfa.onnx", b"precious");
    let output = workplace.run(&REWRITE);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--force"));
    assert_eq!(
        std::fs::read(workplace.path("model.dfa.onnx")).unwrap(),
        b"precious"
    );
    let forced = workplace.run(&[REWRITE.as_slice(), &["--force"]].concat());
    assert_eq!(forced.status.code(), Some(0));
    assert_ne!(
        std::fs::read(workplace.path("model.dfa.onnx")).unwrap(),
        b"precious"
    );
}

#[test]
fn external_weights_stay_where_they_are() {
    let workplace = Workplace::new();
    for suffix in ["", ".data"] {
        let name = format!("dit__ts17-external.onnx{suffix}");
        std::fs::copy(fixture(&name), workplace.path(&name)).unwrap();
    }
    let weights = std::fs::read(workplace.path("dit__ts17-external.onnx.data")).unwrap();
    // Never opened: the rewrite works just as well without the file.
    std::fs::remove_file(workplace.path("dit__ts17-external.onnx.data")).unwrap();
    let output = workplace.run(&["dit__ts17-external.onnx", "--plan", "plan.json"]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    workplace.write("dit__ts17-external.onnx.data", weights);
    std::fs::create_dir(workplace.path("elsewhere")).unwrap();
    let output = workplace.run(&[
        "dit__ts17-external.onnx",
        "--plan",
        "plan.json",
        "-o",
        "elsewhere/out.onnx",
    ]);
    assert_eq!(output.status.code(), Some(2));
    insta::assert_snapshot!(
        "external_elsewhere",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn rewriting_is_deterministic() {
    let workplace = Workplace::new();
    workplace.run(&[REWRITE.as_slice(), &["-o", "a.onnx"]].concat());
    workplace.run(&[REWRITE.as_slice(), &["-o", "b.onnx"]].concat());
    let read = |name| std::fs::read(workplace.path(name)).unwrap();
    assert_eq!(read("a.onnx"), read("b.onnx"));
}

#[test]
fn pictures_and_schema() {
    let workplace = Workplace::new();
    for name in ["plan.svg", "plan.png"] {
        assert_eq!(
            workplace
                .run(&["plot", "plan.json", "-o", name])
                .status
                .code(),
            Some(0)
        );
    }
    assert!(
        std::fs::read_to_string(workplace.path("plan.svg"))
            .unwrap()
            .starts_with("<")
    );
    assert_eq!(
        &std::fs::read(workplace.path("plan.png")).unwrap()[1..4],
        b"PNG"
    );
    let schema = workplace.run(&["schema"]);
    let schema: serde_json::Value = serde_json::from_slice(&schema.stdout).unwrap();
    assert!(schema["properties"]["steps"].is_object());
    assert!(!workplace.run(&["completions", "bash"]).stdout.is_empty());
}

#[test]
fn layers_can_be_left_out_by_index_and_by_name() {
    let workplace = Workplace::new();
    std::fs::copy(fixture("latte__ts17.onnx"), workplace.path("latte.onnx")).unwrap();
    insta::assert_snapshot!(
        "skip",
        workplace.transcript(&["inspect", "latte.onnx", "--skip", "*temporal*"])
    );
    let layers = |choice: &[&str]| {
        let output = workplace.run(&[&["inspect", "latte.onnx", "--json"], choice].concat());
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        report["model"]["layers"].as_u64().unwrap()
    };
    assert_eq!(layers(&[]), 2);
    assert_eq!(layers(&["--only", "1"]), 1);
    assert_eq!(layers(&["--only", "0-1", "--skip", "/blocks"]), 1);
    insta::assert_snapshot!(
        "skip_nothing",
        workplace.transcript(&["inspect", "latte.onnx", "--skip", "0,spatial"])
    );
}
