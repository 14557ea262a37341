"""Which inputs are the timestep and the latents, and what is said where that is not clear."""

import numpy as np
import pytest
from conftest import distance, inspect, tool

pytest.importorskip("onnx", reason="builds its models with the onnx package")
import onnx  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402
from small import TOKENS, denoiser, plain, rewritten, run, save  # noqa: E402


def test_an_index_into_a_table_is_the_timestep(tmp_path):
    """A step as an int32 that picks a row: found, and followed under a plan as the sine of the same number is."""
    rows = 1000
    sine, table = denoiser(plain), denoiser(plain)
    weights = {i.name: numpy_helper.to_array(i) for i in sine.graph.initializer}
    angles = np.arange(rows, dtype=np.float32)[:, None] * weights["freq"]
    table.graph.initializer.append(numpy_helper.from_array(np.sin(angles), "rows"))
    # column, angle, sine → one look-up
    del table.graph.node[:3]
    table.graph.node.insert(0, helper.make_node("Gather", ["rows", "t"], ["sine"], axis=0))
    table.graph.input[1].CopyFrom(helper.make_tensor_value_info("t", onnx.TensorProto.INT32, ["b"]))
    found = inspect(save(tmp_path, "table", table))
    assert found["inputs"]["timestep"] == "t" and found["model"]["layers"] == 2
    expected = run(rewritten(tmp_path, save(tmp_path, "sine", sine)))
    actual = run(rewritten(tmp_path, tmp_path / "table.onnx"), dtype=np.int32)
    for step, (a, b) in enumerate(zip(actual, expected)):
        assert distance(a, b) < 1e-4, f"step {step}"


@pytest.mark.parametrize("shape", [["b", 1, 1, 1], ["b", "n"]])
def test_a_timestep_of_any_rank(tmp_path, shape):
    """[B, 1, 1, 1], or one per token: one step where all are equal."""
    expected = run(rewritten(tmp_path, save(tmp_path, "vector", denoiser(plain))))
    model = denoiser(plain)
    model.graph.input[1].CopyFrom(helper.make_tensor_value_info("when", onnx.TensorProto.FLOAT, shape))
    first = "first" if shape[1] == "n" else "when"
    flat = [helper.make_node("Reshape", [first, "flat"], ["t"])]
    if shape[1] == "n":
        flat.insert(0, helper.make_node("ReduceMax", ["when"], ["first"], axes=[1]))
    for node in reversed(flat):
        model.graph.node.insert(0, node)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "flat"))
    path = save(tmp_path, "any", model)
    assert inspect(path)["inputs"]["timestep"] == "when"
    sizes = [2, 1, 1, 1] if len(shape) == 4 else [2, TOKENS]
    for step, (a, b) in enumerate(zip(run(rewritten(tmp_path, path), name="when", sizes=sizes), expected)):
        assert distance(a, b) < 1e-5, f"step {step}"


def test_equally_likely_latents_are_named_and_nothing_is_written(tmp_path):
    model = denoiser(plain)
    for node in model.graph.node:
        node.input[:] = ["p" if i == "x" else i for i in node.input]
    model.graph.input[0].name = "p"
    model.graph.input.append(helper.make_tensor_value_info("q", onnx.TensorProto.FLOAT, ["b", TOKENS, 8]))
    path = save(tmp_path, "two", model)
    said = tool("inspect", path, check=False)
    assert said.returncode == 1
    assert "`p`, `q`" in said.stderr and "--latents-input" in said.stderr
    assert inspect(path, "--latents-input", "p")["model"]["layers"] == 2


def test_an_import_of_the_domain_is_no_rewritten_model(tmp_path):
    """A process that has the library writes its domain into every model that it saves; and a domain is imported once."""
    model = denoiser(plain, imports='"" : 17, "ai.ditfastattn" : 1')
    out = rewritten(tmp_path, save(tmp_path, "imported", model))
    domains = [o.domain for o in onnx.load(out).opset_import]
    assert domains.count("ai.ditfastattn") == 1
    again = tool(out, "--plan", tmp_path / "plan.json", "-o", tmp_path / "again.onnx", check=False)
    assert again.returncode == 1 and "already rewritten" in again.stderr


def test_a_window_inside_the_operator_is_refused_by_name(tmp_path):
    def layer(i, n):
        return f"""q{i} = MatMul ({n}, wq{i}) k{i} = MatMul ({n}, wk{i}) v{i} = MatMul ({n}, wv{i})
            o{i} = Attention <q_num_heads: int = 4, kv_num_heads: int = 4, left_window_size: int = 2> (q{i}, k{i}, v{i}) a{i} = MatMul (o{i}, wo{i})"""

    path = save(tmp_path, "window", denoiser(layer, imports='"" : 25', ir=11))
    reasons = [site["reason"] for site in inspect(path)["sites"]]
    assert len(reasons) == 2 and all("left_window_size = 2" in reason for reason in reasons)
