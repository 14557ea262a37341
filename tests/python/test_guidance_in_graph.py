"""Guidance that the graph itself makes of one row: its halves are those of guidance, as if the caller had fed them."""

import numpy as np
import pytest
from conftest import inspect, session, stats

onnx = pytest.importorskip("onnx", reason="models are built here; the newest host's environment can")
import small  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

STEPS = len(small.ACTIONS)


def doubled(rows, how):
    """The two-row denoiser behind a graph that makes two rows of one: the second is half of the first, or the same with a shift."""
    model = small.denoiser(small.plain)
    graph = model.graph
    fed = helper.make_tensor_value_info("row", TensorProto.FLOAT, [rows, small.TOKENS, 8])
    time = helper.make_tensor_value_info("t", TensorProto.FLOAT, [rows])
    del graph.input[:]
    graph.input.extend([fed, time])
    half = helper.make_tensor("half", TensorProto.FLOAT, [2, 1, 1], [1.0, 0.5])
    graph.initializer.append(half)
    if how == "concat":
        graph.initializer.append(helper.make_tensor("by", TensorProto.FLOAT, [1], [0.5]))
        made = [
            helper.make_node("Mul", ["row", "by"], ["other"]),
            helper.make_node("Concat", ["row", "other"], ["x"], axis=0),
        ]
    else:
        graph.initializer.append(helper.make_tensor("twice", TensorProto.INT64, [3], [2, 1, 1]))
        made = [
            helper.make_node("Tile", ["row", "twice"], ["both"]),
            helper.make_node("Mul", ["both", "half"], ["x"]),
        ]
    nodes = [*made, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output[0].type.tensor_type.shape.dim[0].Clear()
    return model


def generation(path, name, rows, xs):
    host = session(path)
    return [host.run(None, {name: rows(x), "t": np.full(len(rows(x)), t, np.float32)})[0] for t, x in zip(small.TIMES, xs, strict=False)]


@pytest.mark.parametrize("how", ["concat", "tile"])
@pytest.mark.parametrize("rows", [1, "b"])
@pytest.mark.parametrize("cfg", ["cond-first", "uncond-first"])
def test_its_halves_are_halves_of_guidance(tmp_path, how, rows, cfg):
    rng = np.random.default_rng(2)
    xs = [rng.standard_normal((1, small.TOKENS, 8)).astype(np.float32)]
    while len(xs) < STEPS:
        xs.append((xs[-1] * 0.98 + 0.1 * rng.standard_normal(xs[0].shape)).astype(np.float32))
    fed = small.rewritten(tmp_path, small.save(tmp_path, "fed", small.denoiser(small.plain)), cfg=cfg)
    expected = generation(fed, "x", lambda x: np.concatenate([x, 0.5 * x]), xs)
    path = small.save(tmp_path, "made", doubled(rows, how))
    layers = [site for site in inspect(path)["sites"] if site["kind"] in ("self", "joint")]
    assert [layer["form"] for layer in layers] == ["module", "module"]
    before = stats()["layers_halved"]
    made = generation(small.rewritten(tmp_path, path, cfg=cfg), "row", lambda x: x, xs)
    for a, b in zip(made, expected, strict=True):
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max()
    shared = sum(action in ("asc", "wa-rs+asc") for step in small.ACTIONS for action in step)
    assert stats()["layers_halved"] - before == shared
