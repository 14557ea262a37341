"""Attention inside model-local functions, and in operators that are whole attentions: what ONNX Runtime computes of the original is the judge."""

import json

import numpy as np
import onnxruntime as ort
import pytest
from conftest import distance, inspect, session, tool

pytest.importorskip("onnx", reason="builds its models with the onnx package")
import onnx  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402
from small import HEADS, TOKENS, C, denoiser, plain, rewritten, run, save  # noqa: E402

# heads: by attribute; `Project` is a function of a function, `Scaled` has a default and an input that may be left out.
FUNCTIONS = """
<domain: "my", opset_import: ["" : 17, "my" : 1]>
Project <heads> (x, w) => (y) {
    flat = MatMul (x, w)
    shape = Shape (x)
    two = Constant <value_ints: ints = [2]> ()
    zero = Constant <value_ints: ints = [0]> ()
    lead = Slice (shape, zero, two)
    h = Constant <value_int: int = @heads> ()
    axis = Constant <value_ints: ints = [0]> ()
    hs = Unsqueeze (h, axis)
    rest = Constant <value_ints: ints = [-1]> ()
    target = Concat <axis = 0> (lead, hs, rest)
    y = Reshape (flat, target)
}
<domain: "my", opset_import: ["" : 17]>
Scaled <factor: float = 1.0> (x, bias) => (y) {
    f = Constant <value_float: float = @factor> ()
    y = Mul (x, f)
}
<domain: "my", opset_import: ["" : 17, "my" : 1]>
Attend <heads, factor> (x, wq, wk, wv, wo) => (y, same) {
    q0 = my.Project <heads: int = @heads> (x, wq)
    k0 = my.Project <heads: int = @heads> (x, wk)
    v0 = my.Project <heads: int = @heads> (x, wv)
    q = Transpose <perm = [0, 2, 1, 3]> (q0)
    k = Transpose <perm = [0, 2, 3, 1]> (k0)
    v = Transpose <perm = [0, 2, 1, 3]> (v0)
    s0 = MatMul (q, k)
    s = my.Scaled <factor: float = @factor> (s0)
    p = Softmax <axis = -1> (s)
    o = MatMul (p, v)
    t = Transpose <perm = [0, 2, 1, 3]> (o)
    merged = Constant <value_ints: ints = [0, 0, -1]> ()
    j = Reshape (t, merged)
    y = MatMul (j, wo)
    same = Identity (x)
}
<domain: "my", opset_import: ["" : 17]>
Never (x) => (y) { y = Abs (x) }
"""


def called(i, n):
    return f"a{i}, unused{i} = my.Attend <heads: int = {HEADS}, factor: float = 0.25> ({n}, wq{i}, wk{i}, wv{i}, wo{i})"


def test_functions_are_put_in_place_of_their_calls(tmp_path):
    """The same results as of the model without functions, under every action; the functions that nothing calls stay."""
    functions, written_out = save(tmp_path, "functions", denoiser(called, FUNCTIONS)), save(tmp_path, "plain", denoiser(plain))
    assert inspect(functions)["model"]["module_form"] == 2
    feed = {"x": np.ones((2, TOKENS, 8), np.float32), "t": np.full(2, 900.0, np.float32)}
    dense = session(functions, custom_ops=False).run(None, feed)[0]
    full = session(rewritten(tmp_path, functions, [["full", "full"]])).run(None, feed)[0]
    assert distance(full, dense) < 1e-5
    out = rewritten(tmp_path, functions)
    expected = run(rewritten(tmp_path, written_out))
    for step, (actual, wanted) in enumerate(zip(run(out), expected)):
        assert distance(actual, wanted) < 1e-5, f"step {step}"
    model = onnx.load(out)
    assert [f.name for f in model.functions] == ["Never"]
    assert not [n for n in model.graph.node if n.domain == "my"]
    onnx.checker.check_model(onnx.load(functions))


def test_functions_in_subgraphs_and_subgraphs_in_functions(tmp_path):
    """An If in a function and a call in an If: names and attributes reach into both."""
    functions = FUNCTIONS + """
    <domain: "my", opset_import: ["" : 17, "my" : 1]>
    Chosen <factor: float = 0.5> (x) => (y) {
        zero = Constant <value_float: float = 0.0> ()
        top = ReduceMax <keepdims = 0> (x)
        positive = Greater (top, zero)
        kept = Abs (x)
        y = If (positive) <
            then_branch = yes () => (a) { b = my.Scaled <factor: float = @factor> (kept) a = Add (b, x) },
            else_branch = no () => (a) { a = Neg (x) }
        >
    }"""

    def layer(i, n):
        return f"""c{i} = my.Chosen <factor: float = 0.75> ({n}) {called(i, f"c{i}").replace(f"a{i},", f"d{i},")}
            top{i} = ReduceMax <keepdims = 0> (d{i}) positive{i} = Greater (top{i}, top{i})
            a{i} = If (positive{i}) <
                then_branch = yes () => (r{i}) {{ r{i} = my.Scaled <factor: float = 3.0> (d{i}) }},
                else_branch = no () => (s{i}) {{ s{i} = my.Scaled (d{i}) }}
            >"""

    path = save(tmp_path, "nested", denoiser(layer, functions))
    assert inspect(path)["model"]["module_form"] == 2
    feed = {"x": np.ones((2, TOKENS, 8), np.float32), "t": np.full(2, 900.0, np.float32)}
    out = rewritten(tmp_path, path, [["full", "full"]])
    assert distance(session(out).run(None, feed)[0], session(path, custom_ops=False).run(None, feed)[0]) < 1e-5


def test_attention_in_a_branch_is_named(tmp_path):
    def layer(i, n):
        branches = f"""zero{i} = Constant <value_float: float = 0.0> () top{i} = ReduceMax <keepdims = 0> (ss{i}) positive{i} = Greater (top{i}, zero{i})
            p{i} = If (positive{i}) <
                then_branch = yes () => (r{i}) {{ r{i} = Softmax <axis = -1> (ss{i}) }},
                else_branch = no () => (u{i}) {{ u{i} = Softmax <axis = -1> (ss{i}) }}
            >"""
        return plain(i, n).replace(f"p{i} = Softmax <axis = -1> (ss{i})", branches)

    path = save(tmp_path, "branches", denoiser(layer))
    reasons = [s["reason"] for s in inspect(path)["sites"]]
    assert len(reasons) == 4 and all("then_branch" in r or "else_branch" in r for r in reasons), reasons
    (tmp_path / "plan.json").write_text(json.dumps({"format": "ditfastattn-plan", "version": 1, "steps": [["full", "full"]]}))
    said = tool(path, "--plan", tmp_path / "plan.json", check=False)
    assert said.returncode == 1 and "then_branch" in said.stderr, said.stderr


@pytest.mark.parametrize("packed", [False, True])
def test_group_query_attention_that_sees_all_keys(tmp_path, packed):
    """As the operator computes it, and as the plan says; the causal one is left alone."""

    def layer(i, n, causal=0):
        q, k, v = (f"{r}f{i}" for r in "qkv")
        fed = f"cat{i}, , " if packed else f"{q}, {k}, {v}"
        cat = f"cat{i} = Concat <axis = 2> ({q}, {k}, {v})" if packed else ""
        return f"""{q} = MatMul ({n}, wq{i}) {k} = MatMul ({n}, wk{i}) {v} = MatMul ({n}, wv{i}) {cat}
            o{i} = com.microsoft.GroupQueryAttention <num_heads: int = {HEADS}, kv_num_heads: int = {HEADS}, causal: int = {causal}, scale: float = 0.25> ({fed}, , , last, total)
            a{i} = MatMul (o{i}, wo{i})"""

    def model(layer):
        made = denoiser(layer, imports='"" : 17, "com.microsoft" : 1')
        made.graph.initializer.append(numpy_helper.from_array(np.full(2, TOKENS - 1, np.int32), "last"))
        made.graph.initializer.append(numpy_helper.from_array(np.array(TOKENS, np.int32), "total"))
        made.graph.value_info.extend(helper.make_tensor_value_info(f"o{i}", 1, ["b", TOKENS, C]) for i in range(2))
        return made

    path = save(tmp_path, "gqa", model(layer))
    try:
        session(path, custom_ops=False)
    except Exception as error:
        pytest.skip(f"onnxruntime {ort.__version__} has no GroupQueryAttention that is not causal: {str(error)[-120:]}")
    assert inspect(path)["model"]["layers"] == 2
    expected = run(rewritten(tmp_path, save(tmp_path, "plain", denoiser(plain))))
    for step, (actual, wanted) in enumerate(zip(run(rewritten(tmp_path, path)), expected)):
        assert distance(actual, wanted) < 1e-5, f"step {step}"
    feed = {"x": np.ones((2, TOKENS, 8), np.float32), "t": np.full(2, 900.0, np.float32)}
    full = session(rewritten(tmp_path, path, [["full", "full"]])).run(None, feed)[0]
    assert distance(full, session(path, custom_ops=False).run(None, feed)[0]) < 1e-5
    causal = inspect(save(tmp_path, "causal", model(lambda i, n: layer(i, n, causal=1))))
    assert causal["model"]["layers"] == 0 and "causal = 1" in causal["sites"][0]["reason"]
