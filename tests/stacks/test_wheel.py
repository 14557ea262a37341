"""The installed wheel, as somebody meets it who has nothing else of this repository."""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import ditfastattn
import numpy as np
import onnxruntime
import pytest

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
PLAN = FIXTURES / "dit.plan.json"
HOST = tuple(int(n) for n in onnxruntime.__version__.split(".")[:2])
STEPS = len(json.loads(PLAN.read_text())["steps"])
ARRAYS = np.load(FIXTURES / "dit.npz")
# What an activated environment has.
ACTIVATED = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def model(tmp_path):
    return shutil.copy(FIXTURES / "dit__ts17.onnx", tmp_path / "dit.onnx")


@pytest.fixture
def rewritten(model):
    return ditfastattn.rewrite(model, PLAN)


def feed(step):
    arrays = {name.removeprefix("fixed_"): ARRAYS[name] for name in ARRAYS.files if name.startswith("fixed_")}
    arrays |= {name.removeprefix(f"step{step}_"): ARRAYS[name] for name in ARRAYS.files if name.startswith(f"step{step}_")}
    del arrays["out"]
    return arrays


def test_it_is_the_installed_package_that_is_tested():
    assert Path(ditfastattn.__file__).is_relative_to(sys.prefix)
    assert Path(ditfastattn.get_program_path()).is_relative_to(sys.prefix)
    assert Path(ditfastattn.get_library_path()).is_relative_to(sys.prefix)


def test_the_command_is_on_the_path():
    said = subprocess.run(["dfa-rewrite", "--version"], env=ACTIVATED, check=True, capture_output=True, text=True).stdout
    assert said.split() == ["dfa-rewrite", ditfastattn.__version__]


def test_a_rewritten_model_computes_what_pytorch_does_and_says_so(rewritten, model):
    assert rewritten == Path(model).with_suffix(".dfa.onnx")
    ditfastattn.reset()
    session = ditfastattn.session(rewritten, threads=1)
    for step in range(STEPS):
        expected = ARRAYS[f"step{step}_out"]
        assert np.abs(session.run(None, feed(step))[0] - expected).max() < 1e-4 * np.abs(expected).max()
    counters = ditfastattn.stats()
    assert counters["steps"] == STEPS and counters["layers_reused"] > 0 and counters["layers_window"] > 0 and counters["recomputes"] == 0
    ditfastattn.reset()
    assert ditfastattn.stats()["steps"] == 0


def test_repeated_inputs_go_through_a_plan_that_expects_them(model):
    """What docs/serving/perf-test.md builds on."""
    inputs = feed(3)
    plan = json.loads(PLAN.read_text()) | {"timesteps": [float(inputs["timestep"][0])] * STEPS}
    session = ditfastattn.session(ditfastattn.rewrite(model, plan), threads=1)
    ditfastattn.reset()
    for _ in range(2 * STEPS):
        session.run(None, inputs)
    counters = ditfastattn.stats()
    assert counters["generations"] == 2 and counters["unplanned"] == counters["contested"] == counters["recomputes"] == 0
    assert counters["layers_reused"] == 2 * sum(row.count("ast") for row in plan["steps"])


def test_a_session_takes_options_and_bytes(rewritten):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = ditfastattn.session(rewritten.read_bytes(), options=options, providers=[("CPUExecutionProvider", {})])
    assert session.get_session_options().intra_op_num_threads == 2 and session.get_providers() == ["CPUExecutionProvider"]
    assert ditfastattn.session(rewritten, threads=1).get_session_options().intra_op_num_threads == 1


def test_a_plan_may_be_a_mapping(model, rewritten, tmp_path):
    other = ditfastattn.rewrite(model, json.loads(PLAN.read_text()), tmp_path / "other.onnx", flags=["--quiet"])
    assert other.read_bytes() == rewritten.read_bytes()


def test_the_report_is_logged(model, caplog):
    with caplog.at_level("INFO", "ditfastattn"):
        ditfastattn.rewrite(model, PLAN)
    assert "dit.dfa.onnx" in caplog.text and "module" in caplog.text


@pytest.mark.parametrize(
    ("plan", "code", "message"),
    [
        (FIXTURES / "flux.plan.json", 1, "layers is 3 in the plan and 2 in the model"),
        (Path("nothing.json"), 2, "cannot read the plan nothing.json"),
        ({"format": "ditfastattn-plan"}, 2, "version"),
    ],
)
def test_a_refusal_carries_the_message_and_the_exit_code(model, plan, code, message):
    with pytest.raises(ditfastattn.RewriteError, match=message) as refusal:
        ditfastattn.rewrite(model, plan)
    assert refusal.value.exit_code == code and not refusal.value.message.startswith("dfa-rewrite")
    assert not Path(model).with_suffix(".dfa.onnx").exists()


def test_nothing_is_overwritten_without_force(model, rewritten):
    rewritten.write_bytes(b"mine")
    with pytest.raises(ditfastattn.RewriteError, match="--force"):
        ditfastattn.rewrite(model, PLAN)
    assert rewritten.read_bytes() == b"mine"
    assert len(ditfastattn.rewrite(model, PLAN, force=True).read_bytes()) > 4


def test_a_recorded_loop_can_be_searched_with_what_the_wheel_brings(model, tmp_path):
    with ditfastattn.record_trajectory(ditfastattn.session(model, threads=1)) as recorder:
        for step in range(4):
            recorder.run(None, feed(step))
    recorder.save(tmp_path / "traj.npz")
    command = ["dfa-rewrite", "search", model, "--trajectory", tmp_path / "traj.npz", "--cfg", "cond-first", "-o", tmp_path / "plan.json"]
    # Neither the library nor ONNX Runtime is named: both are in the environment.
    environment = {name: value for name, value in ACTIVATED.items() if name != "ORT_DYLIB_PATH"}
    said = subprocess.run([*command, "--delta", "0.2", "--threads", "1"], env=environment, capture_output=True, text=True)
    if HOST < (1, 19):
        # Their wheels have no library that a program could load.
        assert said.returncode == 2 and "wheels of onnxruntime have it from 1.19 on" in said.stderr
        return
    assert said.returncode == 0, said.stderr
    assert len(json.loads((tmp_path / "plan.json").read_text())["steps"]) == 4


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(TypeError, match="cannot record a int"), ditfastattn.record_trajectory(3):
        pass


def test_what_a_session_cannot_be_made_of_is_said(rewritten, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no model at nothing.onnx"):
        ditfastattn.session("nothing.onnx")
    with pytest.raises(ValueError, match="threads is 0"):
        ditfastattn.session(rewritten, threads=0)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        ditfastattn.session(rewritten)


def test_a_host_that_does_not_import_is_not_called_missing(tmp_path, monkeypatch):
    """Such as 1.17 beside NumPy 2."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('numpy.core.multiarray failed to import')")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ImportError, match="does not import: .*multiarray failed to import.*numpy<2"):
        ditfastattn.session(tmp_path / "model.onnx")


def test_sessions_are_created_at_the_same_time(rewritten):
    """In a process of its own: only the first sessions of a process are in danger."""
    code = (
        "import sys, threading, ditfastattn\n"
        "made = []\n"
        "threads = [threading.Thread(target=lambda: made.append(ditfastattn.session(sys.argv[1], threads=1))) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(len(made))\n"
    )
    said = subprocess.run([sys.executable, "-c", code, rewritten], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "8", said.stderr


def test_the_package_is_typed():
    assert Path(ditfastattn.__file__).with_name("py.typed").exists()


def linked(package):
    """(name, version) of every crate in the binary that `package` builds, as cargo resolves them for the wheel's target."""
    command = ["cargo", "tree", "--locked", "--package", package, "--target", f"{platform.machine()}-unknown-linux-gnu"]
    command += ["--edges", "normal,no-proc-macro", "--prefix", "none", "--format", "{p}"]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return {(line.split()[0], line.split()[1].removeprefix("v")) for line in lines if line}


@pytest.mark.parametrize(("package", "artefact"), [("ditfastattn-rewriter", "dfa-rewrite"), ("ditfastattn-ops", "libditfastattn")])
def test_the_sbom_names_every_crate_that_is_linked(package, artefact):
    # The other tests run in environments without it.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = distribution("ditfastattn").read_text(f"sboms/{artefact}.cdx.json")
    bill = json.loads(text)
    assert JsonStrictValidator(SchemaVersion.from_version(bill["specVersion"])).validate_str(text) is None
    named = {(component["name"], component["version"]) for component in [bill["metadata"]["component"], *bill["components"]]}
    expected = linked(package)
    assert len(expected) > 20 and expected <= named, expected - named
    assert str(ROOT) not in text, "the folder that it was built in"
