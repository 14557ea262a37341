"""What a plan makes of a model, in NumPy: the exported graph runs in ONNX Runtime with its attention taken out, and that is computed here
in float64, under the plan. Nothing is shared with what it judges.

Where the module ends in a product, reusing the attention's result is the same as reusing the module's.
"""

import json

import numpy as np
import onnx
import onnxruntime as ort
from conftest import distance, session, tool
from onnx import TensorProto, helper
from small import ACTIONS, TIMES

PLAN = {"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "timesteps": TIMES, "steps": ACTIONS}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def band(tokens, window, text, side):
    """Who sees whom."""
    width = max(1, int(window * (tokens - text)))
    i = np.arange(tokens)
    is_text = i < text if side == "start" else i >= tokens - text
    return (abs(i[:, None] - i) <= width) | is_text | is_text[:, None]


class Layer:
    """One column of a plan, and what it remembers."""

    def __init__(self, plan, text):
        self.plan, self.text, self.residual, self.result = plan, text, None, None

    def __call__(self, action, q, k, v):
        if action == "ast":
            return self.result
        rows = len(q)
        half = slice(0, rows // 2) if self.plan["cfg"] == "cond-first" else slice(rows // 2, rows)
        used = half if action.endswith("asc") else slice(None)
        both = lambda x: np.concatenate([x, x]) if action.endswith("asc") else x
        q, k, v = (z[used].astype(np.float64) for z in (q, k, v))
        scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
        seen = band(q.shape[2], self.plan.get("window", 0.125), *self.text)
        windowed = softmax(np.where(seen, scores, -np.inf)) @ v
        if action.startswith("wa-rs"):
            out = windowed + self.residual[used]
        else:
            out = softmax(scores) @ v
            self.residual = both(out - windowed)
        self.result = both(out)
        return self.result


def host(model):
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def with_outputs(model, names):
    model.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)


def planned(model, cores, plan, feeds, texts=None):
    """The results of all steps. `texts`: per layer how many tokens are text, and on which side."""
    results = [core[3] for core in cores]
    dense, cut = onnx.ModelProto(), onnx.ModelProto()
    dense.CopyFrom(model)
    with_outputs(dense, results)
    empty = {n: np.zeros_like(r) for n, r in zip(results, host(dense).run(results, feeds[0]), strict=True)}
    cut.CopyFrom(model)
    kept = [n for n in cut.graph.node if n.output[0] not in results]
    del cut.graph.node[:]
    cut.graph.node.extend(kept)
    cut.graph.input.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in results)
    with_outputs(cut, dict.fromkeys(n for core in cores for n in core[:3]))
    rest = host(cut)
    layers = [Layer(plan, text) for text in texts or [(0, "start")] * len(cores)]
    outputs = []
    for row, feed in zip(plan["steps"], feeds, strict=True):
        have = dict(empty)
        for layer, action, core in zip(layers, row, cores, strict=True):
            have[core[3]] = layer(action, *rest.run(core[:3], feed | have)).astype(np.float32)
        outputs.append(rest.run(["out"], feed | have)[0])
    return outputs


def feeds(sizes, steps=len(ACTIONS), seed=1):
    """A generation's inputs, each row another; everything but latents and timestep stays."""
    rng = np.random.default_rng(seed)
    fixed = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    x = fixed.pop("x")
    for step in range(steps):
        yield fixed | {"x": x, "t": np.full(len(x), TIMES[step], np.float32)}
        x = (0.98 * x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)


def fed(model, rows=2, tokens=32):
    """Inputs of `model`'s shapes, without the timestep."""
    size = lambda d: d.dim_value or (rows if d.dim_param == "b" else tokens)
    inputs = {i.name: [size(d) for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    return list(feeds({name: size for name, size in inputs.items() if name != "t"}))


def write(folder, model, plan):
    """Paths of both."""
    path, plan_path = folder / "model.onnx", folder / "plan.json"
    path.write_bytes(model.SerializeToString())
    plan_path.write_text(json.dumps(plan))
    return path, plan_path


def rewritten(folder, model, plan, check=True):
    """A session of the rewritten model; without `check` what the tool said."""
    path, plan_path = write(folder, model, plan)
    said = tool(path, "--plan", plan_path, "--force", check=check)
    return session(path.with_suffix(".dfa.onnx"), threads=1) if check else said


def follows(folder, model, cores, plan=PLAN, texts=None, tokens=32):
    """Whether the rewritten model computes what the plan says, and the plan changes anything."""
    inputs = fed(model, tokens=tokens)
    expected = planned(model, cores, plan, inputs, texts)
    dense = planned(model, cores, plan | {"steps": [["full"] * len(cores)] * len(inputs)}, inputs, texts)
    session = rewritten(folder, model, plan)
    for step, (feed, wanted) in enumerate(zip(inputs, expected, strict=True)):
        assert distance(session.run(None, feed)[0], wanted) < 1e-4, f"step {step}"
    assert max(distance(a, b) for a, b in zip(expected, dense, strict=True)) > 1e-2, "the plan changes nothing"
