"""What a search costs and what its loop does, on a model of DiT-XL's depth with weights outside the file."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import HOST, ROOT, TARGET, tool

pytest.importorskip("onnx", reason="the environments of older hosts have no onnx")
import synthetic  # noqa: E402

pytestmark = pytest.mark.skipif(HOST < (1, 24), reason="searched with the newest hosts only")
RUNTIME = Path(onnxruntime.__file__).parent / "capi"
DIGITS = ROOT / "examples" / "digits" / "digits-dit.onnx"


def deep(folder, layers=28, steps=3):
    model = folder / "deep.onnx"
    synthetic.dit(model, layers, 16, 2, 32)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 2, 32, 16)).astype(np.float32)
    drift = rng.standard_normal((steps, 2, 32, 16)).astype(np.float32)
    timestep = np.repeat(np.linspace(900, 100, steps).astype(np.int64)[:, None], 2, 1)
    np.savez(folder / "trajectory.npz", x=x + 0.2 * drift, timestep=timestep)
    return ["search", model, "--trajectory", folder / "trajectory.npz", "--cfg", "cond-first", "--onnxruntime", RUNTIME, "--threads", 1]


def test_28_layers_cost_at_most_0_55_of_the_naive_loop(tmp_path):
    command = deep(tmp_path)
    said = json.loads(tool(*command, "-o", tmp_path / "plan.json", "--delta", 0.02, "--json").stdout)
    assert said["layers"] == 28
    assert said["forwards"] <= 0.55 * said["naive_forwards"], said
    # The plan is one of the model in the folder, whose weights are outside the file.
    tool(tmp_path / "deep.onnx", "--plan", tmp_path / "plan.json", "--quiet")


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(tmp_path):
    command = deep(tmp_path, layers=8, steps=6)
    tool(*command, "-o", tmp_path / "whole.json", "--delta", 0.05)
    journal = tmp_path / "cut.search.jsonl"
    cut = list(map(str, [TARGET / "dfa-rewrite", *command, "-o", tmp_path / "cut.json", "--delta", 0.05, "--resume"]))
    for lines in (2, 9, 20, 31):
        process = subprocess.Popen(cut, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < lines):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = subprocess.run(cut, capture_output=True, text=True)
    assert result.returncode == 0 or "exists" in result.stderr, result.stderr
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert journal.read_bytes() == (tmp_path / "whole.search.jsonl").read_bytes()


def test_ctrl_c_keeps_the_journal_and_says_how_to_go_on(tmp_path):
    command = deep(tmp_path, layers=8, steps=8)
    journal = tmp_path / "plan.search.jsonl"
    process = subprocess.Popen(
        list(map(str, [TARGET / "dfa-rewrite", *command, "-o", tmp_path / "plan.json", "--delta", 0.05])),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 3):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 1 and "--resume" in said, said
    assert not (tmp_path / "plan.json").exists()
    again = tool(*command, "-o", tmp_path / "plan.json", "--delta", 0.05, check=False)
    assert again.returncode == 2 and "--resume" in again.stderr, "without --resume a journal is not overwritten"
    tool(*command, "-o", tmp_path / "plan.json", "--delta", 0.05, "--resume")


def test_another_threshold_reuses_what_is_known(tmp_path):
    command = deep(tmp_path, layers=8, steps=4)
    tool(*command, "-o", tmp_path / "a.json", "--delta", 0.03)
    tool(*command, "-o", tmp_path / "b.json", "--delta", 0.04)
    reused = tool(*command, "-o", tmp_path / "c.json", "--delta", 0.04, "--reuse", tmp_path / "a.search.jsonl", "--json")
    assert "layer-steps are known" in reused.stderr
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    other = tool(*command, "-o", tmp_path / "d.json", "--delta", 0.04, "--metric", "mse", "--reuse", tmp_path / "a.search.jsonl", check=False)
    assert other.returncode == 1 and "another search" in other.stderr


def test_a_larger_threshold_saves_more_on_the_example(tmp_path):
    rng = np.random.default_rng(3)
    np.savez(tmp_path / "calib.npz", hidden_states=rng.standard_normal((2, 1, 32, 32)), class_labels=np.array([3, 8, 10, 10]))
    saved = []
    for delta in (0, 0.03, 0.1):
        said = tool("search", DIGITS, "-o", tmp_path / f"{delta}.json", "--delta", delta, "--cfg", "cond-first", "--calib", tmp_path / "calib.npz",
                    "--scheduler", "ddim", "--steps", 5, "--onnxruntime", RUNTIME, "--json")  # fmt: skip
        saved.append(json.loads(said.stdout)["account"]["module_flops"])
    assert saved[0] == 0 and saved == sorted(saved) and saved[2] > 0, saved


def test_samples_in_several_runs_find_the_plan_of_one(tmp_path):
    rng = np.random.default_rng(4)
    np.savez(tmp_path / "calib.npz", hidden_states=rng.standard_normal((2, 1, 32, 32)), class_labels=np.array([3, 8, 10, 10]))
    command = ["search", DIGITS, "--delta", 0.1, "--cfg", "cond-first", "--calib", tmp_path / "calib.npz", "--scheduler", "euler-flow", "--steps", 4,
               "--onnxruntime", RUNTIME]  # fmt: skip
    tool(*command, "-o", tmp_path / "one.json")
    tool(*command, "-o", tmp_path / "two.json", "--per-run", 1)
    steps = [json.loads((tmp_path / f"{n}.json").read_text())["steps"] for n in ("one", "two")]
    assert steps[0] == steps[1]
