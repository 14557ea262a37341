"""Algorithm 1 on the command line, against an implementation that shares nothing with it: whole models, whole generations, every trial."""

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import HOST, TARGET, session, tool

# Parts of a model share one thread pool and find their weights beside a model in memory: newer hosts only.
pytestmark = pytest.mark.skipif(HOST < (1, 24), reason="searched with the newest hosts only")
RUNTIME = Path(onnxruntime.__file__).parent / "capi"
ORDER = ["ast", "wa-rs+asc", "wa-rs", "asc"]


def trajectory(model, folder, steps):
    """What was fed, as a pipeline would record it."""
    arrays = {k.removeprefix("fixed_"): model.arrays[k] for k in model.arrays.files if k.startswith("fixed_")}
    for name in [k.removeprefix("step0_") for k in model.arrays.files if k.startswith("step0_") and k != "step0_out"]:
        arrays[name] = np.stack([model.arrays[f"step{t}_{name}"] for t in range(steps)])
    path = folder / "trajectory.npz"
    np.savez(path, **arrays)
    return path


def arguments(model, recorded, output, delta, *more):
    return ["search", model.path, "-o", output, "--delta", delta, "--cfg", model.plan["cfg"], "--trajectory", recorded,
            "--candidates", ",".join(ORDER), "--onnxruntime", RUNTIME, "--threads", "1", *more]  # fmt: skip


def outputs(model, rows):
    """The output of the last step of a generation under `rows`."""
    plan = model.plan | {"steps": rows, "timesteps": model.plan["timesteps"][: len(rows)]}
    planned = session(model.rewrite(plan), threads=1)
    for step in range(len(rows)):
        out = planned.run(None, model.feed(planned, step))[0]
    return out.astype(np.float64)


def loss(a, b):
    """Mean relative absolute error (A.2 of the paper)."""
    largest = np.maximum(np.abs(a), np.abs(b))
    return np.where(largest > 0, np.abs(a - b) / np.where(largest > 0, largest, 1), 0).mean()


def naive(model, steps, delta):
    """(rows, per cell the losses tried): every trial runs the whole generation."""
    layers = len(model.plan["steps"][0])
    rows, tried = [["full"] * layers], {}
    for step in range(1, steps):
        reference = outputs(model, rows + [["full"] * layers])
        row = []
        for layer in range(layers):
            chosen = "full"
            for action in ORDER:
                trial = row + [action] + ["full"] * (layers - layer - 1)
                tried[step, layer, action] = loss(outputs(model, rows + [trial]), reference)
                if tried[step, layer, action] < (layer + 1) / layers * delta:
                    chosen = action
                    break
            row.append(chosen)
        rows.append(row)
    return rows, tried


@pytest.mark.parametrize(("name", "delta"), [("dit__ts17", 0.12), ("pixart__ts17", 0.2)])
def test_finds_the_plan_of_the_naive_algorithm(load, tmp_path, name, delta):
    model, steps = load(name), 5
    tool(*arguments(model, trajectory(model, tmp_path, steps), tmp_path / "found.json", delta))
    found = json.loads((tmp_path / "found.json").read_text())["steps"]
    rows, tried = naive(model, steps, delta)
    assert any(action != "full" for row in rows for action in row), "nothing was chosen: the threshold tests nothing"
    assert any(action == "full" for row in rows[1:] for action in row), "everything was chosen"
    for step, (ours, theirs) in enumerate(zip(found, rows)):
        if ours != theirs:
            layer = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
            limit = (layer + 1) / len(ours) * delta
            near = [v for (s, l, _), v in tried.items() if (s, l) == (step, layer) and abs(v - limit) < 1e-4]
            assert near, f"step {step}, layer {layer}: {ours[layer]} here, {theirs[layer]} naively"
            return


def test_no_change_allowed_gives_the_dense_plan_and_trials_cost_less_than_forwards(load, tmp_path):
    model = load("dit__ts17")
    said = json.loads(tool(*arguments(model, trajectory(model, tmp_path, 5), tmp_path / "p.json", 0, "--json")).stdout)
    assert {a for row in json.loads((tmp_path / "p.json").read_text())["steps"] for a in row} == {"full"}
    assert said["forwards"] < 0.9 * said["naive_forwards"]


def test_a_killed_search_resumes_to_the_same_bytes(load, tmp_path):
    model = load("dit__ts17")
    recorded = trajectory(model, tmp_path, 10)
    tool(*arguments(model, recorded, tmp_path / "whole.json", 0.2))
    journal = tmp_path / "whole.search.jsonl"
    lines = journal.read_bytes()
    for cut in (len(lines) // 3, len(lines) // 2, len(lines) - 5):
        (tmp_path / "cut.search.jsonl").write_bytes(lines[:cut])
        tool(*arguments(model, recorded, tmp_path / "cut.json", 0.2, "--resume", "--force"))
        assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
        assert (tmp_path / "cut.search.jsonl").read_bytes() == lines


def test_kill_leaves_no_plan_and_a_journal(load, tmp_path):
    model = load("dit__ts17")
    command = [TARGET / "dfa-rewrite", *arguments(model, trajectory(model, tmp_path, 10), tmp_path / "plan.json", 0.3)]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "plan.json").exists()
    resume = ["--resume"] if (tmp_path / "plan.search.jsonl").exists() else []
    tool(*arguments(model, tmp_path / "trajectory.npz", tmp_path / "plan.json", 0.3, *resume))
    assert (tmp_path / "plan.json").exists()


def test_wrong_inputs_are_named(load, tmp_path):
    model = load("dit__ts17")
    recorded = trajectory(model, tmp_path, 5)
    arrays = dict(np.load(recorded))
    np.savez(recorded, **{("label" if k == "class_labels" else k): v for k, v in arrays.items()})
    said = tool(*arguments(model, recorded, tmp_path / "p.json", 0.1), check=False)
    assert said.returncode == 2 and "`label`" in said.stderr and "class_labels" in said.stderr
    assert not (tmp_path / "p.json").exists()
