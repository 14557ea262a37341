"""Attention computed in blocks is one layer; keys before the image's leave no room for windows. NumPy is the judge of both."""

import json

import numpy as np
import pytest
from conftest import distance, inspect, session, tool

pytest.importorskip("onnx", reason="builds its models with the onnx package")
from naive import softmax  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402
from small import ACTIONS, HEADS, TIMES, TOKENS, C, denoiser, rewritten, save  # noqa: E402

PREFIX = 5


def heads(i, n):
    """q, k and v of a layer, `[b, h, n, d]`."""
    lines = (f"{r}f{i} = MatMul ({n}, w{r}{i}) {r}h{i} = Reshape ({r}f{i}, split) {r}{i} = Transpose <perm = [0, 2, 1, 3]> ({r}h{i})" for r in "qkv")
    return "\n".join(lines)


def attend(name, q, k, v):
    return f"""kt{name} = Transpose <perm = [0, 1, 3, 2]> ({k}) s{name} = MatMul ({q}, kt{name})
        c{name} = Constant <value_float: float = 0.25> () ss{name} = Mul (s{name}, c{name})
        p{name} = Softmax <axis = -1> (ss{name}) o{name} = MatMul (p{name}, {v})"""


def merge(i, o):
    return f"t{i} = Transpose <perm = [0, 2, 1, 3]> ({o}) j{i} = Reshape (t{i}, merge) a{i} = MatMul (j{i}, wo{i})"


def by_heads(i, n):
    """In two groups of heads: one, and the three others."""
    cut = "\n".join(f"{r}{i}x, {r}{i}y = Split <axis = 1> ({r}{i}, sizes)" for r in "qkv")
    blocks = "\n".join(attend(f"{i}{b}", f"q{i}{b}", f"k{i}{b}", f"v{i}{b}") for b in "xy")
    return f"{heads(i, n)} sizes = Constant <value_ints: ints = [1, {HEADS - 1}]> () {cut} {blocks} o{i} = Concat <axis = 1> (o{i}x, o{i}y) {merge(i, f'o{i}')}".replace("sizes", f"sizes{i}")


def by_queries(i, n):
    """Three blocks of queries, as slices."""
    bounds = [0, 7, 16, 2**63 - 1]
    numbers = "\n".join(f"at{i}{j} = Constant <value_ints: ints = [{at}]> ()" for j, at in enumerate(bounds))
    cut = "\n".join(f"q{i}{b} = Slice (q{i}, at{i}{j}, at{i}{j + 1}, along{i})" for j, b in enumerate("xyz"))
    blocks = "\n".join(attend(f"{i}{b}", f"q{i}{b}", f"k{i}", f"v{i}") for b in "xyz")
    along = f"along{i} = Constant <value_ints: ints = [2]> ()"
    return f"{heads(i, n)} {along} {numbers} {cut} {blocks} o{i} = Concat <axis = 2> (o{i}x, o{i}y, o{i}z) {merge(i, f'o{i}')}"


def with_prefix(i, n):
    """Keys and values of a prompt before the image's."""
    joined = f"kp{i} = Concat <axis = 2> (past, k{i}) vp{i} = Concat <axis = 2> (past, v{i})"
    return f"{heads(i, n)} {joined} {attend(i, f'q{i}', f'kp{i}', f'vp{i}')} {merge(i, f'o{i}')}"


def feeds():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, TOKENS, 8)).astype(np.float32)
    for time in TIMES:
        yield {"x": x, "t": np.full(2, time, np.float32)}
        x = (x * 0.98 + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)


def expected(model, steps, past=None):
    """What a generation of `model` under `steps` computes, each layer as one attention; the conditional half comes first."""
    w = {i.name: numpy_helper.to_array(i).astype(np.float64) for i in model.graph.initializer}
    memory = [(None, None)] * 2
    apart = np.abs(np.arange(TOKENS)[:, None] - np.arange(TOKENS))
    for row, feed in zip(steps, feeds()):
        x = feed["x"] @ w["win"] + (np.sin(feed["t"][:, None] * w["freq"]) @ w["wt"])[:, None]
        for i, action in enumerate(row):
            residual, output = memory[i]
            if action != "ast":
                shared = action.endswith("asc")
                rows = slice(0, 1) if shared else slice(None)
                n = x[rows] - x[rows].mean(-1, keepdims=True)
                n = n / np.sqrt((n**2).mean(-1, keepdims=True) + 1e-5) * w["one"]
                q, k, v = ((n @ w[f"w{r}{i}"]).reshape(len(n), -1, HEADS, C // HEADS).transpose(0, 2, 1, 3) for r in "qkv")
                if past is not None:
                    k, v = (np.concatenate([past[rows], y], 2) for y in (k, v))
                scores = 0.25 * q @ k.transpose(0, 1, 3, 2)
                o = softmax(scores) @ v
                if past is None:
                    band = softmax(np.where(apart <= max(1, TOKENS // 8), scores, -np.inf)) @ v
                    if action.startswith("wa-rs"):
                        o = band + residual[rows]
                    else:
                        residual = np.concatenate([o - band] * 2) if shared else o - band
                output = o.transpose(0, 2, 1, 3).reshape(len(n), TOKENS, C) @ w[f"wo{i}"]
                output = np.concatenate([output] * 2) if shared else output
                memory[i] = (residual, output)
            x = x + output
        yield x @ w["wend"]


@pytest.mark.parametrize("layer", [by_heads, by_queries])
@pytest.mark.parametrize("dense", ["library", "host"])
def test_blocks_are_one_layer_under_every_action(tmp_path, layer, dense):
    model = denoiser(layer)
    path = save(tmp_path, "blocks", model)
    found = inspect(path)
    assert [s["form"] for s in found["sites"]] == ["module", "module"]
    assert found["model"]["layers"] == 2 and all(s["heads"] == HEADS and s["tokens"] == str(TOKENS) for s in found["sites"])
    planned = rewritten(tmp_path, path)
    tool(path, "--plan", tmp_path / "plan.json", "--force", "--dense", dense)
    host = session(planned)
    for step, (feed, wanted) in enumerate(zip(feeds(), expected(model, ACTIONS))):
        assert distance(host.run(None, feed)[0], wanted) < 1e-5, f"step {step}"


def test_more_keys_than_queries_have_no_windows(tmp_path):
    model = denoiser(with_prefix)
    model.graph.input.append(helper.make_tensor_value_info("past", 1, ["b", HEADS, "p", C // HEADS]))
    path = save(tmp_path, "prefix", model)
    sites = inspect(path)["sites"]
    assert [s["form"] for s in sites] == ["module", "module"] and all("p" in s["keys"] for s in sites)
    plan = {"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "timesteps": TIMES[:2]}
    for row in (["wa-rs", "full"], ["full", "wa-rs+asc"]):
        (tmp_path / "plan.json").write_text(json.dumps(plan | {"steps": [["full", "full"], row]}))
        said = tool(path, "--plan", tmp_path / "plan.json", check=False)
        layer = row.index("full") ^ 1
        assert said.returncode == 1 and f"layer {layer} " in said.stderr and f"--skip {layer}" in said.stderr
        assert f"{TOKENS} query tokens" in said.stderr and "key tokens" in said.stderr
        assert not path.with_suffix(".dfa.onnx").exists()
    past = np.random.default_rng(2).standard_normal((2, HEADS, PREFIX, C // HEADS)).astype(np.float32)
    fed = [feed | {"past": past} for feed in feeds()]
    np.savez(tmp_path / "fed.npz", **{name: np.stack([f[name] for f in fed]) for name in fed[0]})
    trials = ["--cfg", "cond-first", "--trajectory", tmp_path / "fed.npz"]
    tool("search", path, "-o", tmp_path / "found.json", "--delta", "0.1", *trials)
    found = {action for row in json.loads((tmp_path / "found.json").read_text())["steps"] for action in row}
    assert found & {"ast", "asc"} and not found & {"wa-rs", "wa-rs+asc"}
    said = tool("study", path, "-o", tmp_path / "study", *trials, check=False)
    assert said.returncode == 1 and "cannot have windows" in said.stderr
    steps = [["full", "asc"], ["asc", "ast"], ["ast", "full"], ["full", "asc"], ["ast", "ast"], ["full", "full"]]
    host = session(rewritten(tmp_path, path, steps))
    for step, (feed, wanted) in enumerate(zip(fed, expected(model, steps, past))):
        assert distance(host.run(None, feed)[0], wanted) < 1e-5, f"step {step}"
