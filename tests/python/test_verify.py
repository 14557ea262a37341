"""`dfa-rewrite verify`: its numbers against a loop over ordinary sessions, and that each of its checks can fail."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import HOST, ROOT, mrae, session, tool

pytestmark = pytest.mark.skipif(HOST < (1, 24), reason="models are run by the command with the newest hosts only")
RUNTIME = Path(onnxruntime.__file__).parent / "capi"
DIGITS = ROOT / "examples" / "digits"


def verify(*arguments, check=True):
    return tool("verify", *arguments, "--onnxruntime", RUNTIME, "--threads", 1, check=check)


def write(folder, plan):
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder / "plan.json"


@pytest.mark.parametrize("name", ["dit__ts17", "pixart__ts17", "flux__dyn18", "dit__ts17-external", "dit-separate__ts17", "flux-separate__dyn18"])
def test_distances_are_those_of_a_loop_over_sessions(load, tmp_path, name):
    model = load(name)
    fed = model.trajectory(tmp_path / "t.npz")
    rewritten = model.rewrite()
    said = json.loads(verify(model.place(), "--rewritten", rewritten, "--trajectory", fed, "--json").stdout)
    assert said["failures"] == [] and len(said["steps"]) == model.steps
    original, planned = session(model.path, custom_ops=False, threads=1), session(rewritten, threads=1)
    for step, told in enumerate(said["steps"]):
        a, b = (np.concatenate([s.run(None, model.feed(s, step, branch))[0] for branch in model.branches]) for s in (original, planned))
        assert told["timestep"] == pytest.approx(model.plan["timesteps"][step])
        assert abs(told["max_abs"] - np.abs(a - b).max()) <= 1e-4 * np.abs(a).max(), f"step {step}"
        assert abs(told["mrae"] - mrae(a, b)) < 1e-3
        assert told["full"] < 1e-5 and told["followed"] < 1e-5
    assert said["final"] == {k: said["steps"][-1][k] for k in said["final"]}, "recorded: the last output"
    assert said["final"]["max_abs"] > 1e-3, "the plan changes nothing: the distances test nothing"


def test_a_plan_and_its_file_say_the_same(load, tmp_path):
    model = load("dit__ts17")
    fed = model.trajectory(tmp_path / "t.npz")
    of_plan = json.loads(verify(model.path, "--plan", model.plan_path, "--trajectory", fed, "--json").stdout)
    of_file = json.loads(verify(model.path, "--rewritten", model.rewrite(), "--trajectory", fed, "--json").stdout)
    assert of_plan["steps"] == of_file["steps"] and of_plan["plan"] == of_file["plan"] == model.plan["name"]
    assert of_plan["rewritten"] is None and of_file["rewritten"] == str(model.output())


@pytest.mark.parametrize("name", ["dit-separate__ts17", "flux-separate__dyn18"])
def test_two_runs_per_step_on_random_inputs(load, name):
    """The second run is fed other conditioning and takes what the first one shares."""
    model = load(name)
    said = json.loads(verify(model.path, "--plan", model.plan_path, "--json").stdout)
    assert said["failures"] == [] and said["final"]["max_abs"] > 1e-3


def test_two_runs_per_step_under_a_scheduler_are_two_halves_of_one(load, tmp_path):
    """Guidance in two runs or in one batch: the same images, dense and planned."""
    model = load("dit-separate__ts17")
    rng = np.random.default_rng(5)
    calib = tmp_path / "calib.npz"
    np.savez(calib, hidden_states=rng.standard_normal((1, 4, 8, 8)), class_labels=np.array([3, 10]))
    told = {}
    for cfg in ("separate", "cond-first"):
        plan = {k: v for k, v in model.plan.items() if k != "timesteps"} | {"cfg": cfg}
        common = ["--plan", write(tmp_path, plan), "--calib", calib, "--scheduler", "ddim", "--steps", 6]
        told[cfg] = json.loads(verify(model.path, *common, "--json").stdout)
        assert told[cfg]["failures"] == []
    for key in ("max_abs", "mrae", "psnr"):
        assert told["separate"]["final"][key] == pytest.approx(told["cond-first"]["final"][key], rel=1e-2)


@pytest.mark.parametrize(("name", "apart"), [("dit__ts17", 1e-5), ("pixart__ts17-fp16", 1e-2), ("loud__ts17-int8", 0.1)])
def test_a_plan_that_changes_nothing_moves_nothing(load, tmp_path, name, apart):
    """What a search with δ = 0 finds; on random inputs."""
    model = load(name)
    plan = write(tmp_path, model.plan | {"steps": [["full"] * len(row) for row in model.plan["steps"]]})
    said = json.loads(verify(model.path, "--plan", plan, "--json").stdout)
    assert said["failures"] == []
    assert max(step["relative"] for step in said["steps"]) < apart


def test_a_scheduler_moves_both_generations_on_their_own(tmp_path):
    rng = np.random.default_rng(3)
    calib = tmp_path / "calib.npz"
    np.savez(calib, hidden_states=rng.standard_normal((2, 1, 32, 32)), class_labels=np.array([3, 8, 10, 10]))
    plan = json.loads((DIGITS / "plan.json").read_text())
    rows = plan["steps"][:1] + plan["steps"][-5:]
    del plan["timesteps"]
    plan = write(tmp_path, plan | {"steps": rows})
    common = [DIGITS / "digits-dit.onnx", "--plan", plan, "--calib", calib, "--scheduler", "ddim", "--json"]
    said = json.loads(verify(*common, "--steps", 6).stdout)
    last = said["steps"][-1]
    assert said["failures"] == [] and 0 < said["final"]["max_abs"] != last["max_abs"], "the latents, not the last output"
    # In runs of one sample: other requests, the same generations.
    alone = json.loads(verify(*common, "--steps", 6, "--per-run", 1).stdout)
    assert alone["final"]["mrae"] == pytest.approx(said["final"]["mrae"], rel=1e-2)
    wrong = verify(*common, "--steps", 5, check=False)
    assert wrong.returncode == 2 and "5 steps" in wrong.stderr and "the plan has, 6" in wrong.stderr


def test_timesteps_that_are_not_the_plans_are_not_followed(load, tmp_path):
    model = load("dit__ts17")
    fed = model.trajectory(tmp_path / "t.npz")
    moved = [t + 37 for t in model.plan["timesteps"]]
    said = verify(model.path, "--plan", write(tmp_path, model.plan | {"timesteps": moved}), "--trajectory", fed, "--json", check=False)
    assert said.returncode == 1 and "does not follow its plan" in said.stderr
    told = json.loads(said.stdout)
    assert len(told["failures"]) == 1 and max(s["followed"] for s in told["steps"]) > 1e-3
    assert max(s["relative"] for s in told["steps"]) < 1e-5, "dense: right pixels, nothing saved"


def test_a_file_that_computes_something_else_is_found_out(load, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = load("dit__ts17")
    broken = onnx.load(model.rewrite())
    attribute = next(a for n in broken.graph.node for a in n.attribute if n.op_type == "DiTFastAttnStep" and a.name == "plan")
    plan = json.loads(attribute.s)
    wrong = next(i for i in broken.graph.initializer if len(i.dims) == 2 and i.raw_data)
    wrong.raw_data = (1.5 * np.frombuffer(wrong.raw_data, np.float32)).astype(np.float32).tobytes()
    onnx.save(broken, tmp_path / "broken.onnx")
    said = verify(model.path, "--rewritten", tmp_path / "broken.onnx", check=False)
    assert said.returncode == 1 and "does not follow its plan" in said.stderr
    # A plan for another model in it.
    attribute.s = json.dumps(plan | {"steps": [row + row for row in plan["steps"]]}).encode()
    onnx.save(broken, tmp_path / "broken.onnx")
    said = verify(model.path, "--rewritten", tmp_path / "broken.onnx", check=False)
    assert said.returncode == 1 and "layers" in said.stderr


def test_limits_are_limits(load, tmp_path):
    model = load("dit__ts17")
    common = [model.path, "--plan", model.plan_path, "--trajectory", model.trajectory(tmp_path / "t.npz")]
    exact = verify(*common, "--tolerance", 0, check=False)
    assert exact.returncode == 1 and "with every layer full" in exact.stderr
    loss = json.loads(verify(*common, "--json").stdout)["final"]
    for metric in ("mrae", "authors", "cosine", "mse"):
        limit = ["--metric", metric, "--quiet", "--max-loss"]
        assert verify(*common, *limit, 1.01 * loss[metric]).stdout == ""
        said = verify(*common, *limit, 0.99 * loss[metric], check=False)
        assert said.returncode == 1 and metric in said.stderr and said.stdout == ""


def test_sizes_that_the_model_leaves_open_are_asked_for(tmp_path):
    pytest.importorskip("onnx")
    import synthetic

    synthetic.dit(tmp_path / "open.onnx", 2, 16, 2, "tokens")
    plan = write(tmp_path, {"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "steps": [["full", "full"], ["wa-rs", "ast"], ["wa-rs+asc", "asc"]]})
    common = [tmp_path / "open.onnx", "--plan", plan]
    said = verify(*common, check=False)
    assert said.returncode == 2 and "axis 1, `tokens`" in said.stderr and "--size x.1=N" in said.stderr
    by_name, by_place = (json.loads(verify(*common, "--json", "--size", size).stdout) for size in ("tokens=32", "x.1=32"))
    assert by_name == by_place and by_name["failures"] == [] and by_name["final"]["max_abs"] > 0
    other = json.loads(verify(*common, "--json", "--size", "tokens=32", "--seed", 1).stdout)
    assert other["final"]["max_abs"] != by_name["final"]["max_abs"]


def test_what_is_no_rewritten_model_is_refused(load, tmp_path):
    model = load("dit__ts17")
    for file in (model.path, model.rewrite(None, "--state", "io")):
        said = verify(model.path, "--rewritten", file, check=False)
        assert said.returncode == 2 and f"{file} is not a rewritten model" in said.stderr
