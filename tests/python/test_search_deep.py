"""The search on deep models against Algorithm 1 in NumPy (naive.py), and what it costs there."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import HOST, session, tool

pytest.importorskip("onnx", reason="the environments of older hosts have no onnx")
import naive  # noqa: E402
import synthetic  # noqa: E402

pytestmark = pytest.mark.skipif(HOST < (1, 24), reason="searched with the newest hosts only")
RUNTIME = Path(onnxruntime.__file__).parent / "capi"
WIDTH, HEADS, TOKENS = 16, 2, 32


def recorded(folder, steps, prompt):
    """(path, feeds) of a smooth trajectory; both halves of guidance have the same latents where a prompt tells them apart."""
    rng = np.random.default_rng(7)
    rows = 1 if prompt else 2
    start, end = (rng.standard_normal((rows, TOKENS, WIDTH)) for _ in range(2))
    part = np.linspace(0, 0.3, steps)[:, None, None, None]
    x = np.broadcast_to(start + part * (end - start), (steps, 2, TOKENS, WIDTH)).astype(np.float32)
    timestep = np.repeat(np.linspace(900, 600, steps).astype(np.int64)[:, None], 2, 1)
    fixed = {"prompt": rng.standard_normal((2, prompt, WIDTH)).astype(np.float32)} if prompt else {}
    np.savez(folder / "trajectory.npz", x=x, timestep=timestep, **fixed)
    return folder / "trajectory.npz", [{"x": x[t], "timestep": timestep[t], **fixed} for t in range(steps)]


# A DiT of DiT-XL's depth, and PixArt's form: text by cross-attention, the unconditional half first. What a search costs beside the naive loop
# depends on the plan: a little over half, more where early layers refuse what late ones accept.
@pytest.mark.parametrize(
    ("layers", "steps", "prompt", "cfg", "delta", "cost"),
    [(28, 3, 0, "cond-first", 0.06, 0.55), (28, 2, 0, "cond-first", 0.2, 0.65), (12, 4, 7, "uncond-first", 0.2, 0.6)],
)
def test_the_plan_is_the_naive_one_at_about_half_the_cost(tmp_path, layers, steps, prompt, cfg, delta, cost):
    path = tmp_path / "model.onnx"
    synthetic.dit(path, layers, WIDTH, HEADS, TOKENS, prompt=prompt)
    model = naive.Transformer(path, layers, HEADS, cfg)
    trajectory, feeds = recorded(tmp_path, steps, prompt)
    dense = session(path, custom_ops=False).run(None, feeds[0])[0]
    own = model.step(feeds[0], ["full"] * layers, [(None, None)] * layers)
    assert np.abs(own - dense).max() < 1e-4 * np.abs(dense).max(), "not the same model"
    said = json.loads(tool("search", path, "--trajectory", trajectory, "-o", tmp_path / "plan.json", "--delta", delta, "--cfg", cfg, "--candidates",
                           ",".join(naive.ORDER), "--onnxruntime", RUNTIME, "--threads", 1, "--json").stdout)  # fmt: skip
    assert said["forwards"] <= cost * said["naive_forwards"], said
    found = json.loads((tmp_path / "plan.json").read_text())["steps"]
    rows, tried = naive.search(model, feeds, delta)
    assert len({action for row in rows for action in row}) >= 3, "few actions were chosen: the thresholds test little"
    for step, (ours, theirs) in enumerate(zip(found, rows)):
        for layer, (a, b) in enumerate(zip(ours, theirs)):
            if a != b:
                limit = (layer + 1) / layers * delta
                near = [v for (s, l, _), v in tried.items() if (s, l) == (step, layer) and abs(v - limit) < 1e-4]
                assert near, f"step {step}, layer {layer}: {a} here, {b} naively"
                return  # float32 decided a close cell otherwise; what follows is another search
    assert found == rows
