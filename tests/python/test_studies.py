"""Studies, imports, recordings and the accounting, through the command line."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import HOST, ROOT, session, tool

sys.path.insert(0, str(ROOT / "examples"))
from record_trajectory import Recorder, record  # noqa: E402

pytest.importorskip("onnx", reason="the environments of older hosts have no onnx")
import synthetic  # noqa: E402

RUNTIME = Path(onnxruntime.__file__).parent / "capi"
newest = pytest.mark.skipif(HOST < (1, 24), reason="models are run by the command with the newest hosts only")


def recorded(model, folder, steps):
    """A recording of a loop over an ordinary session."""
    recorder = Recorder(session(model.path, custom_ops=False))
    for step in range(steps):
        recorder.run(None, model.feed(recorder, step))
    path = folder / "traj.npz"
    recorder.save(path)
    return path


@newest
def test_a_recorded_loop_is_searched_and_studied(load, tmp_path):
    model = load("pixart__ts17")
    path = recorded(model, tmp_path, 4)
    arrays = np.load(path)
    assert arrays["hidden_states"].shape == (4, 2, 4, 8, 8) and arrays["encoder_hidden_states"].shape == (2, 6, 16)
    common = [model.path, "--trajectory", path, "--cfg", "uncond-first", "--onnxruntime", RUNTIME, "--threads", 1]
    tool("search", *common, "-o", tmp_path / "plan.json", "--delta", 0.2)
    assert len(json.loads((tmp_path / "plan.json").read_text())["steps"]) == 4
    tool("study", *common, "-o", tmp_path / "study")
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    for rows in study.values():
        assert len(rows) == 4 and all(len(row) == 2 for row in rows)
    assert study["step_similarity"][0] == [None, None] and all(-1 <= v <= 1.000001 for v in study["step_similarity"][3])
    assert all(v > 0 for v in study["window_drift"][2] + study["residual_drift"][2])
    for picture in ("similarity", "drift"):
        assert (tmp_path / "study" / f"{picture}.svg").read_text().startswith("<svg")
    assert tool("study", *common, "-o", tmp_path / "study", check=False).returncode == 2, "what is there is kept"


@newest
def test_similarities_are_those_of_the_module_outputs(load, tmp_path):
    """Cosines against outputs that a graph with explicit state returns, all steps full."""
    model = load("dit__ts17")
    path = recorded(model, tmp_path, 3)
    tool("study", model.path, "--trajectory", path, "--cfg", "cond-first", "--onnxruntime", RUNTIME, "--threads", 1, "-o", tmp_path / "study")
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    # AST at every second step keeps the outputs of the steps before alive, so they can be read.
    plan = dict(model.plan, steps=[["full", "full"], ["ast", "ast"]], timesteps=model.plan["timesteps"][:2])
    explicit = session(model.rewrite(plan, "--state", "io"), threads=1)
    names = [o.name for o in explicit.get_outputs()]
    past = {i.name: np.zeros([0] + [d if isinstance(d, int) else 1 for d in i.shape[1:]], np.float32) for i in explicit.get_inputs() if i.name.startswith("past.")}
    outputs = []
    for step in range(3):
        values = dict(zip(names, explicit.run(None, model.feed(explicit, step, dfa_step=np.array(0)) | past)))
        outputs.append([values[f"present.{layer}.output"].astype(np.float64).reshape(2, -1) for layer in range(2)])
    cosine = lambda a, b: (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    for step in (1, 2):
        for layer in range(2):
            assert abs(study["step_similarity"][step][layer] - cosine(outputs[step][layer], outputs[step - 1][layer]).mean()) < 1e-5
            assert abs(study["half_similarity"][step][layer] - cosine(outputs[step][layer][0], outputs[step][layer][1])) < 1e-5


def test_the_recorder_refuses_two_generations(tmp_path):
    recorder = Recorder()
    with pytest.raises(ValueError, match="nothing was recorded"):
        recorder.save(tmp_path / "x.npz")
    recorder.add({"x": np.zeros(2), "dfa_request_id": np.array(1)})
    recorder.add({"x": np.zeros(3)})
    with pytest.raises(ValueError, match=r"`x` is float64 \(2,\) at step 0 and is float64 \(3,\) at step 1"):
        recorder.save(tmp_path / "x.npz")


def test_the_recorder_hooks_a_module(tmp_path):
    class Tensor:  # what the recorder asks of torch.Tensor
        dtype = "float32"

        def __init__(self, values):
            self.values = np.asarray(values, np.float32)

        detach = cpu = lambda self: self

        def numpy(self):
            return self.values

    class Module:
        def forward(self, x, timestep=None, return_dict=True):
            return x

    module = Module()
    with record(module) as recorder:
        for t in (2.0, 1.0):
            module.forward(Tensor([1.0]), timestep=Tensor(t), return_dict=False)
    module.forward(Tensor([9.0]))
    recorder.save(tmp_path / "x.npz", names={"x": "latents"})
    arrays = np.load(tmp_path / "x.npz")
    assert sorted(arrays.files) == ["latents", "timestep"] and arrays["timestep"].tolist() == [2.0, 1.0] and arrays["latents"].tolist() == [1.0]


def test_plans_of_xdit_are_imported(tmp_path):
    (tmp_path / "theirs.json").write_text(json.dumps({
        "block0": {"step0": "FULL_ATTN", "step1": "OUTPUT_SHARE"},
        "block1": {"step0": "FULL_ATTN", "step1": "RESIDUAL_WINDOW_ATTN_CFG_SHARE"},
    }))  # fmt: skip
    tool("import", tmp_path / "theirs.json", "--window", 0.125, "--cfg", "uncond-first", "--name", "theirs", "-o", tmp_path / "ours.json")
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert ours["steps"] == [["full", "full"], ["ast", "wa-rs+asc"]] and ours["cfg"] == "uncond-first" and ours["name"] == "theirs"
    (tmp_path / "broken.json").write_text("{")
    said = tool("import", tmp_path / "broken.json", "--window", 0.125, "--cfg", "none", "-o", tmp_path / "x.json", check=False)
    assert said.returncode == 2 and "broken.json cannot be imported" in said.stderr and not (tmp_path / "x.json").exists()


def account(model, plan, folder, *flags):
    path = folder / "account.json"
    path.write_text(json.dumps({"format": "ditfastattn-plan", "version": 1, **plan}))
    return json.loads(tool("inspect", model, "--plan", path, "--json", *flags).stdout)["plan"]


def test_sizes_that_the_graph_leaves_open_can_be_said(tmp_path):
    model = tmp_path / "open.onnx"
    synthetic.dit(model, 2, 1152, 16, "tokens", sparse=True)
    plan = {"cfg": "cond-first", "steps": [["full", "full"], ["wa-rs", "wa-rs+asc"]]}
    assert "--tokens" in account(model, plan, tmp_path)["unknown"]
    # Table 2 of the paper: 77, 51 and 33 % with wa-rs, half of that with asc.
    for tokens, left in ((1024, 76.4), (4096, 51.0), (16384, 32.9)):
        said = account(model, plan, tmp_path, "--tokens", tokens, "--attention-share", 0.5)["saved"]
        assert abs(100 * (1 - said["module_flops"]) - (200 + 1.5 * left) / 4) < 0.1
        w = tokens // 8
        rho = (tokens * (2 * w + 1) - w * (w + 1)) / tokens**2
        assert abs(said["sizes"][0]["band_density"] - rho) < 1e-12 and said["sizes"][0]["layers"] == 2
        assert abs(said["attention_flops"] - (1 - (2 + 1.5 * rho) / 4)) < 1e-9
        assert 0.5 < said["step_time"] < 1 and said["covered"] == 0
    # DiT-512 at 20 steps of 28 layers: 2705.83 GMAC, here 2 of each.
    assert abs(account(model, plan, tmp_path, "--tokens", 1024)["saved"]["dense_attention_gmac"] - 2705.83 / 140) < 0.01


def test_a_window_over_everything_saves_nothing_and_is_said(load, tmp_path):
    model = load("dit__ts17")
    said = account(model.path, {"window": 1.0, "steps": [["full", "full"], ["wa-rs", "wa-rs"]]}, tmp_path)["saved"]
    assert said["covered"] == 2 and said["attention_flops"] == 0 and said["module_flops"] == 0
