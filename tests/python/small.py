"""Small denoisers written as text, and what a generation of them computes."""

import json

import numpy as np
from conftest import session, tool
from onnx import numpy_helper, parser

C, HEADS, TOKENS = 32, 4, 24
ACTIONS = [["full", "full"], ["wa-rs", "ast"], ["asc", "full"], ["wa-rs+asc", "wa-rs"], ["ast", "asc"], ["full", "full"]]
TIMES = [900.0, 700.0, 500.0, 300.0, 200.0, 100.0]


def weights(graph, names, seed=0):
    rng = np.random.default_rng(seed)
    for name, shape in names.items():
        graph.initializer.append(numpy_helper.from_array((rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32), name))


def denoiser(layer, functions="", imports='"" : 17, "my" : 1', ir=8):
    """Two layers of `layer(index, normed)`, a text that defines `a{index}`."""
    names = {"freq": (1, C), "wt": (C, C), "win": (8, C), "wend": (C, 8)}
    names |= {f"w{r}{i}": (C, C) for i in range(2) for r in "qkvo"}
    body = "\n".join(f"n{i} = LayerNormalization <axis = -1> (h{i}, one)\n {layer(i, f'n{i}')}\n h{i + 1} = Add (h{i}, a{i})" for i in range(2))
    model = parser.parse_model(
        f"""<ir_version: {ir}, opset_import: [{imports}]>
        g (float[b, {TOKENS}, 8] x, float[b] t) => (float[b, {TOKENS}, 8] out)
        <int64[1] axis = {{1}}, int64[4] split = {{0, 0, {HEADS}, {C // HEADS}}}, int64[3] merge = {{0, 0, {C}}}> {{
            column = Unsqueeze (t, axis)
            angle = Mul (column, freq)
            sine = Sin (angle)
            te = MatMul (sine, wt)
            time = Unsqueeze (te, axis)
            in = MatMul (x, win)
            h0 = Add (in, time)
            {body}
            out = MatMul (h2, wend)
        }}
        {functions}"""
    )
    weights(model.graph, names | {"one": (C,)})
    return model


def plain(i, n):
    heads = "\n".join(f"{r}f{i} = MatMul ({n}, w{r}{i}) {r}h{i} = Reshape ({r}f{i}, split)" for r in "qkv")
    return f"""{heads}
        q{i} = Transpose <perm = [0, 2, 1, 3]> (qh{i}) k{i} = Transpose <perm = [0, 2, 3, 1]> (kh{i}) v{i} = Transpose <perm = [0, 2, 1, 3]> (vh{i})
        s{i} = MatMul (q{i}, k{i}) half{i} = Constant <value_float: float = 0.25> () ss{i} = Mul (s{i}, half{i})
        p{i} = Softmax <axis = -1> (ss{i}) o{i} = MatMul (p{i}, v{i})
        ot{i} = Transpose <perm = [0, 2, 1, 3]> (o{i}) oj{i} = Reshape (ot{i}, merge) a{i} = MatMul (oj{i}, wo{i})"""


def save(folder, name, model):
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def rewritten(folder, path, steps=ACTIONS, cfg="cond-first"):
    plan = {"format": "ditfastattn-plan", "version": 1, "cfg": cfg, "timesteps": TIMES[: len(steps)], "steps": steps}
    (folder / "plan.json").write_text(json.dumps(plan))
    tool(path, "--plan", folder / "plan.json", "--force")
    return path.with_suffix(".dfa.onnx")


def run(path, steps=len(ACTIONS), name="t", dtype=np.float32, sizes=(2,)):
    """The results of a generation's steps; the timestep goes to the input `name`, in these sizes."""
    rng = np.random.default_rng(1)
    x = np.repeat(rng.standard_normal((1, TOKENS, 8)), 2, axis=0).astype(np.float32)
    host, results = session(path), []
    for step in range(steps):
        results.append(host.run(None, {"x": x, name: np.full(sizes, TIMES[step], dtype)})[0])
        x = (x * 0.98 + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)
    return results
